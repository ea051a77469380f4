"""Prompts whose answer stands in them: passkey, needle in a haystack, and the thirteen tasks of RULER.

RULER's tasks (arXiv 2404.06654, section 3 and appendix B) are written from their definitions with wording, word lists
and haystacks of our own, so that scores are near but not equal to those of its authors' code.

A builder draws one prompt from a random state at a size: words of haystack, or whatever a task has as its filler. The
same state at another size asks the same question, which is how ``fitted`` finds the size that fills a context.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from open_lm_linear.cli import UserError
from open_lm_linear.data.inputs import records
from open_lm_linear.evaluation import haystacks

ZETA_OF_TWO = 1.6449340668  # sum of 1 / k^2
GUESSES = 8  # by interpolation, before a search halves the range


@dataclass(frozen=True)
class Prompt:
    """A question in a text, the words that its answer begins with, and the strings that the answer must hold."""

    text: str
    beginning: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What a prompt is drawn from."""

    seed: str
    """Of the random state."""
    depth: float | None = None
    """Where the needle lies, in [0, 1]; None: anywhere. Other needles always lie anywhere."""
    haystack: tuple[str, ...] = ()
    """Files of text; none: generated sentences."""
    questions: tuple[dict[str, Any], ...] = ()
    """What `read_questions` returned, for qa."""
    index: int = 0
    """Number of the sample: of the question, for qa."""

    def words(self, kind: str, size: int) -> list[str]:
        """``size`` words of haystack, which do not depend on what else is drawn."""
        rng = random.Random(self.seed + " haystack")
        if kind == "noise":
            return list(itertools.islice(haystacks.noise(), size))
        found = haystacks.text_of(self.haystack, rng) if self.haystack else haystacks.prose(rng)
        return list(itertools.islice(found, size))

    def example(self) -> Source:
        """Another source of the same kind, for an example in front of the question."""
        return replace(self, seed=self.seed + " example")


Builder = Callable[[Source, int], Prompt]


@dataclass(frozen=True)
class Task:
    """A builder, the tokens that its answer may take, and whether all of the answers are wanted or any."""

    build: Builder
    new_tokens: int
    wanted: Literal["all", "any"] = "all"
    filler: str = "none"
    """What surrounds the needles: noise, text, needles, or none where the task has a text of its own."""

    def score(self, prompt: Prompt, output: str) -> float:
        """Share of the answers that the output contains, case aside; for ``any`` 1 where it contains one of them."""
        found = [answer.lower() in output.lower() for answer in prompt.answers]
        return float(any(found)) if self.wanted == "any" else sum(found) / len(found)


def fitted(build: Callable[[int], Prompt], length: Callable[[Prompt], int], budget: int, name: str) -> Prompt:
    """The prompt of the largest size whose length (tokens) is within the budget; lengths grow about evenly with size.

    Raises:
        UserError: nothing fits.
    """
    low, best = 0, build(0)
    below = length(best)
    if below > budget:
        raise UserError(
            f"{name} takes at least {below} tokens without its filler and has {budget}: ask longer contexts."
        )
    high = 64
    while (above := length(longer := build(high))) <= budget:
        low, below, best = high, above, longer
        high = max(high + 1, int(high * 1.02 * budget / max(1, above)) + 1)
    guesses = 0
    while high - low > 1:
        guess = low + int((high - low) * (budget - below) / (above - below))
        guess = min(max(guess, low + 1), high - 1) if guesses < GUESSES else (low + high) // 2
        candidate, guesses = build(guess), guesses + 1
        if (tokens := length(candidate)) <= budget:
            low, below, best = guess, tokens, candidate
        else:
            high, above = guess, tokens
    return best


# ---- needles in a haystack ---------------------------------------------------------------------------------------


def passkey(source: Source, size: int) -> Prompt:
    """A number in repeated noise (arXiv 2305.16300)."""
    rng = random.Random(source.seed)
    key = haystacks.value("number", rng)
    depth = rng.random() if source.depth is None else source.depth
    hidden = haystacks.hide(source.words("noise", size), [(depth, f"The pass key is {key}. Keep it in mind.")])
    text = f"A pass key is hidden in the text below. Find it.\n\n{hidden}\n\nWhat is the pass key?\n"
    return Prompt(text, "The pass key is", (key,))


@dataclass(frozen=True)
class Needles:
    """Builder of RULER's retrieval tasks: ``keys`` needles of ``values`` values each, of which ``queries`` are asked.

    ``filler`` "needles" is a haystack that consists of further needles, one a line.
    """

    filler: Literal["noise", "text", "needles"]
    kind: Literal["number", "uuid", "word"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    uuid_keys: bool = False

    def __call__(self, source: Source, size: int) -> Prompt:
        rng = random.Random(source.seed)
        keys = self._keys(rng)
        pairs = [(next(keys), haystacks.value(self.kind, rng)) for _ in range(self.keys)]
        pairs += [(pairs[0][0], haystacks.value(self.kind, rng)) for _ in range(self.values - 1)]
        depths = [rng.random() for _ in pairs]
        if source.depth is not None:
            depths[0] = source.depth
        needles = [(depth, self._sentence(*pair)) for depth, pair in zip(depths, pairs, strict=True)]
        if self.filler == "needles":
            lines = [self._sentence(next(keys), haystacks.value(self.kind, rng)) for _ in range(size)]
            for depth, needle in needles:
                lines.insert(round(depth * len(lines)), needle)
            hidden = "\n".join(lines)
        else:
            hidden = haystacks.hide(source.words(self.filler, size), needles)
        asked = list(dict.fromkeys(key for key, _ in pairs))[: self.queries]
        answers = tuple(answer for key, answer in pairs if key in asked)
        return self._asked(hidden, asked, answers)

    def _keys(self, rng: random.Random) -> Iterator[str]:
        if self.uuid_keys:
            return (haystacks.value("uuid", rng) for _ in itertools.count())
        return haystacks.names(rng)

    def _sentence(self, key: str, value: str) -> str:
        return f"The secret {self.kind} of {key} is {value}."

    def _asked(self, hidden: str, asked: list[str], answers: tuple[str, ...]) -> Prompt:
        plural = len(answers) > 1
        thing, which = (f"{self.kind}s", "are all") if plural else (self.kind, "is")
        whose = " and ".join([", ".join(asked[:-1]), asked[-1]]) if len(asked) > 1 else asked[0]
        text = (
            f"The text below hides secret {self.kind}s. Keep them in mind.\n\n{hidden}\n\n"
            f"What {which} the secret {thing} of {whose} in the text?\n"
        )
        return Prompt(text, f"The secret {thing} of {whose} {'are' if plural else 'is'}", answers)


# ---- tracing and counting ----------------------------------------------------------------------------------------


def variable_tracking(source: Source, size: int) -> Prompt:
    """A value handed on along a chain of five variables, scattered in order over noise: which variables hold it?"""
    return _behind(_variables(source.example(), 20), _variables(source, size))


def _variables(source: Source, size: int) -> Prompt:
    rng = random.Random(source.seed)
    chain = ["".join(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)) for _ in range(5)]
    number = str(rng.randrange(10**4, 10**5))
    steps = [f"VAR {new} = {old}." for new, old in zip(chain, [number, *chain], strict=False)]
    depths = sorted(rng.random() for _ in chain)
    hidden = haystacks.hide(source.words("noise", size), list(zip(depths, steps, strict=True)))
    text = (
        f"The text below sets variables. Follow them.\n\n{hidden}\n\n"
        f"Which {len(chain)} variables hold the value {number}, directly or through others?\n"
    )
    return Prompt(text, f"The variables that hold {number} are", tuple(chain))


def common_words(source: Source, size: int) -> Prompt:
    """A shuffled list of 10 words that stand in it 30 times each and ``size`` words that stand 3 times each."""
    return _behind(_common_words(source.example(), 10, often=4, seldom=1), _common_words(source, size))


def _common_words(source: Source, size: int, often: int = 30, seldom: int = 3) -> Prompt:
    rng = random.Random(source.seed)
    found = haystacks.names(rng)
    common = [next(found) for _ in range(10)]
    listed = common * often + [next(found) for _ in range(size)] * seldom
    rng.shuffle(listed)
    lines = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
    text = f"Some words of the list below come up more often than the others.\n\n{lines}\n\nWhich 10 words are these?\n"
    return Prompt(text, "The 10 most frequent words are", tuple(common))


def frequent_words(source: Source, size: int) -> Prompt:
    """``size`` words, about, of which the k-th most frequent has a share of 1 / (k^2 zeta(2)); the first is noise."""
    rng = random.Random(source.seed)
    size += 64  # fewer words have no clear order
    words = ["...", *dict.fromkeys(haystacks.coded_word(rng) for _ in range(int(size**0.5) + 4))]
    listed = [w for k, w in enumerate(words, start=1) for _ in range(round(size / (ZETA_OF_TWO * k * k)))]
    rng.shuffle(listed)
    text = (
        f"The text below is in a code; the dots mean nothing.\n\n{' '.join(listed)}\n\n"
        "Which three words of the code come up most often?\n"
    )
    return Prompt(text, "The three most frequent words of the code are", tuple(words[1:4]))


def _behind(example: Prompt, asked: Prompt) -> Prompt:
    """The prompt behind another one with its answer, as RULER has it for the tasks that need telling."""
    shown = f"{example.text}{example.beginning} {', '.join(example.answers)}.\n\n"
    return replace(asked, text=shown + asked.text)


# ---- questions over documents ------------------------------------------------------------------------------------


def questions_over_documents(source: Source, size: int) -> Prompt:
    """A question, the paragraph that answers it, and ``size`` other paragraphs of the same file in random order."""
    rng = random.Random(source.seed)
    asked = source.questions[source.index % len(source.questions)]
    others = list(dict.fromkeys(q["context"] for q in source.questions if q["context"] != asked["context"]))
    rng.shuffle(others)
    if size > len(others):  # a file of few paragraphs fills long contexts by going round
        others = list(itertools.islice(itertools.cycle(others or [" ".join(haystacks.NOISE)]), size))
    shown = others[:size]
    shown.insert(rng.randrange(size + 1), asked["context"])
    listed = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(shown, start=1))
    text = (
        f"Answer the question from the documents below, in a few words.\n\n{listed}\n\nQuestion: {asked['question']}\n"
    )
    return Prompt(text, "Answer:", tuple(asked["answers"]))


def read_questions(path: str) -> tuple[dict[str, Any], ...]:
    """SQuAD's JSON, or entries {context, question, answers}, as such entries; unanswerable questions are left out.

    Raises:
        UserError: the file holds no such questions.
    """
    rows = []
    for entry in records(path):
        if isinstance(entry.get("data"), list):
            paragraphs = [p for article in entry["data"] for p in article["paragraphs"]]
            rows += [{**qa, "context": p["context"]} for p in paragraphs for qa in p["qas"]]
        else:
            rows.append(entry)
    found = []
    for r in rows:
        answers = r.get("answers", [])
        answers = answers.get("text", []) if isinstance(answers, dict) else answers
        answers = [a["text"] if isinstance(a, dict) else a for a in answers]
        if answers and isinstance(r.get("context"), str) and isinstance(r.get("question"), str):
            found.append({"context": r["context"], "question": r["question"], "answers": answers})
    if not found:
        raise UserError(f"{path} holds no questions: give SQuAD's JSON, or entries {{context, question, answers}}.")
    return tuple(found)


TASKS: dict[str, Task] = {
    "passkey": Task(passkey, 16, filler="noise"),
    "needle": Task(Needles("text", "word"), 32, filler="text"),
    "niah_single_1": Task(Needles("noise"), 128, filler="noise"),
    "niah_single_2": Task(Needles("text"), 128, filler="text"),
    "niah_single_3": Task(Needles("text", "uuid"), 128, filler="text"),
    "niah_multikey_1": Task(Needles("text", keys=4), 128, filler="text"),
    "niah_multikey_2": Task(Needles("needles"), 128, filler="needles"),
    "niah_multikey_3": Task(Needles("needles", "uuid", uuid_keys=True), 128, filler="needles"),
    "niah_multivalue": Task(Needles("text", values=4), 128, filler="text"),
    "niah_multiquery": Task(Needles("text", keys=4, queries=4), 128, filler="text"),
    "variable_tracking": Task(variable_tracking, 48, filler="noise"),
    "common_words": Task(common_words, 120),
    "frequent_words": Task(frequent_words, 50),
    "qa": Task(questions_over_documents, 32, "any"),
}
