"""The same multiple-choice questions asked by likelihood and by free generation, and the gap between the two.

A model picks the likelier of given answers long after it has lost the ability to write one down: likelihood scores hide
damage that generation shows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from open_lm_linear.cli import UserError
from open_lm_linear.data.inputs import records
from open_lm_linear.evaluation.estimates import row
from open_lm_linear.evaluation.options import read_options
from open_lm_linear.evaluation.reading import Reader, encode, greedy
from open_lm_linear.evaluation.subject import Subject

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Options:
    """Options of an entry of kind ``generation``."""

    task: str = ""
    """Name in the tables; the name of the data's file where it is left out."""
    data: str = ""
    """JSON lines of questions in any of the forms that `question_of` reads; may be a glob."""
    examples: str = ""
    """File that the shots are drawn from; none: the data itself, less what was drawn."""
    shots: int = 0
    """Questions with their answers in front of each question."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template."""
    max_new_tokens: int = 32
    """Tokens of a free answer at most."""


@dataclass(frozen=True)
class Question:
    """A question, its choices and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answers:
    """What a subject chose, as indices: by likelihood of the texts, of the letters, and in writing (None: neither)."""

    text: int
    text_per_byte: int
    letter: int
    written: int | None


def run(subject: Subject, options: Mapping[str, Any], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Rows of accuracy by each way of asking, of the gaps, and of what the free answers look like.

    Args:
        limit: questions at most.
        seed: of the draw of the shots, and of the questions where the file holds more than ``limit``.

    Raises:
        UserError: an unknown option, a file without questions, or a chat template that is not there.
    """
    opts = read_options(Options, options, "generation")
    if not opts.data:
        raise UserError("generation has no questions: give its option `data` a JSON lines file.")
    if opts.shots < 0 or opts.max_new_tokens < 1:
        raise UserError("generation's option shots must not be below 0, nor max_new_tokens below 1.")
    questions, rng = read_questions(opts.data), random.Random(seed)
    pool = read_questions(opts.examples) if opts.examples else questions
    shots = rng.sample(pool, min(opts.shots, len(pool)))
    if not opts.examples:
        questions = [question for question in questions if question not in shots]
    if len(shots) < opts.shots or not questions:
        raise UserError(f"{opts.examples or opts.data} holds too few questions for {opts.shots} shots: ask fewer.")
    if limit is not None and limit < len(questions):
        questions = rng.sample(questions, limit)
    answers = [answer(subject, question, shots, opts) for question in questions]
    return _rows(opts.task or Path(opts.data).name.split(".")[0], questions, answers)


def _rows(task: str, questions: list[Question], answers: list[Answers]) -> list[dict[str, Any]]:
    pairs = list(zip(questions, answers, strict=True))
    chance = sum(1 / len(q.choices) for q in questions) / len(questions)
    right = {
        "likelihood_text": [float(a.text == q.answer) for q, a in pairs],
        "likelihood_text_per_byte": [float(a.text_per_byte == q.answer) for q, a in pairs],
        "likelihood_letter": [float(a.letter == q.answer) for q, a in pairs],
        "generation": [float(a.written == q.answer) for q, a in pairs],
    }
    rows = [row(task, name, values, chance=chance) for name, values in right.items()]
    for name in ("text", "letter"):  # the error is that of the difference, question by question
        gap = [a - b for a, b in zip(right[f"likelihood_{name}"], right["generation"], strict=True)]
        rows.append(row(task, f"gap_{name}", gap, chance=0.0))
    rows.append(row(task, "unparsable", [float(a.written is None) for a in answers]))
    share_of_a = sum(q.answer == 0 for q in questions) / len(questions)  # in the key: what a good model comes to
    rows.append(row(task, "answers_a_letter", [float(a.letter == 0) for a in answers], chance=share_of_a))
    rows.append(row(task, "answers_a_generation", [float(a.written == 0) for a in answers], chance=share_of_a))
    return rows


# ---- asking ------------------------------------------------------------------------------------------------------


def answer(subject: Subject, question: Question, shots: list[Question], opts: Options) -> Answers:
    """Asks one question in every way. Prompts longer than the subject's length are cut from the left."""
    room = subject.max_length - opts.max_new_tokens
    if room < 1:
        raise UserError(f"max_new_tokens {opts.max_new_tokens} leaves {subject.name} no room for the question.")
    plain = _prompt([(_plainly(q), q.choices[q.answer]) for q in shots], _plainly(question), opts.chat)
    listed = _prompt([(_listed(q), LETTERS[q.answer]) for q in shots], _listed(question), opts.chat)
    nats = choice_nats(subject, plain, question.choices, chat=opts.chat)
    per_byte = [n / max(1, len(choice.encode())) for n, choice in zip(nats, question.choices, strict=True)]
    letters = choice_nats(subject, listed, tuple(LETTERS[: len(question.choices)]), chat=opts.chat)
    written = greedy(subject, encode(subject.tokenizer, listed, chat=opts.chat)[-room:], opts.max_new_tokens)
    return Answers(_least(nats), _least(per_byte), _least(letters), parse(written, question.choices))


def _prompt(shots: list[tuple[str, str]], asked: str, chat: bool) -> str:
    """Questions with their answers, then one without; in a chat the answer's beginning is left to the template."""
    shown = "".join(f"{question}\nAnswer: {text}\n\n" for question, text in shots)
    return shown + asked + ("" if chat else "\nAnswer:")


def _plainly(question: Question) -> str:
    return f"Question: {question.text}"


def _listed(question: Question) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([_plainly(question), *lines, "Answer with the letter of the right choice."])


def choice_nats(subject: Subject, prompt: str, choices: tuple[str, ...], *, chat: bool = False) -> list[float]:
    """Nats of each choice behind the prompt: the sum over the tokens that the choice adds to it.

    What all have in common is read once. A token that the choice changes at the prompt's end belongs to the choice.
    """
    asked = encode(subject.tokenizer, prompt, chat=chat)
    wholes = [encode(subject.tokenizer, prompt, f" {choice}", chat=chat) for choice in choices]
    common = _common_prefix([asked, *wholes])
    cut = max(0, max(map(len, wholes)) - subject.max_length)
    known = max(cut, common - 1)  # the last shared token is read again, for what it predicts
    begin = Reader(subject.model)
    if known > cut:
        begin.read(torch.tensor(asked[cut:known]))
    found = []
    for whole in wholes:
        ids = torch.tensor(whole[known:])
        reader, nats = begin.fork(), 0.0
        for span, logits in reader.pieces(ids[:-1]):
            targets = ids[1:][span, None].to(logits.device)
            nats -= float(logits.float().log_softmax(-1).gather(-1, targets).double().sum())
        found.append(nats)
    return found


def _common_prefix(rows: list[list[int]]) -> int:
    """Tokens at the beginning that all rows share."""
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _least(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def parse(output: str, choices: tuple[str, ...]) -> int | None:
    """The choice that a free answer names, by its letter or by its text; None where it names none, or several.

    A letter counts at the beginning (``B``, ``(B)``, ``B. Paris``) or behind "answer is"; the article of ``A cat`` does
    not. Further questions that the model goes on to ask itself are left out.
    """
    text = output.split("Question:")[0].strip()
    letter = rf"\(?([A-{LETTERS[len(choices) - 1]}])\)?(?=\W*$|[.,:;)]|\s*\n)"
    if found := re.match(letter, text) or re.search(rf"\b(?i:answer|choice|option)(?i: is)?:?\s+{letter}", text):
        return LETTERS.index(found[1])
    plain = _plain(text)
    named = [i for i, choice in enumerate(choices) if _plain(choice) and f" {_plain(choice)} " in f" {plain} "]
    # "hot air" also names "air": a choice inside another named one does not count.
    named = [i for i in named if not any(i != j and _plain(choices[i]) in _plain(choices[j]) for j in named)]
    return named[0] if len(named) == 1 else None


def _plain(text: str) -> str:
    """Lower case words with single spaces and no punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


# ---- reading questions -------------------------------------------------------------------------------------------


def read_questions(path: str) -> list[Question]:
    """The questions of a file, in order.

    Raises:
        UserError: an entry is no question.
    """
    found = []
    for number, entry in enumerate(records(path), start=1):
        try:
            found.append(question_of(entry))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"entry {number} of {path} is no multiple-choice question ({error!r}): give {{question, choices, "
                "answer}, with the answer's index, letter or text."
            ) from None
    return found


def question_of(entry: dict[str, Any]) -> Question:
    """A question in one of the usual forms.

    ``{question or query, choices, answer or gold}``; ARC's ``{question, choices: {text, label}, answerKey}`` and its
    older ``{question: {stem, choices: [{text, label}]}, answerKey}``; PIQA's ``{goal, sol1, sol2, label}``. The answer
    is an index from 0, a label, a letter or the text of a choice.
    """
    if "goal" in entry:
        texts = [entry["sol1"], entry["sol2"]]
        return Question(entry["goal"].strip(), tuple(texts), _index(int(entry["label"]), texts, []))
    asked = entry["question"] if "question" in entry else entry["query"]
    choices = entry.get("choices")
    if isinstance(asked, dict):
        asked, choices = asked["stem"], asked["choices"]
    labels: list[str] = []
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    elif choices and isinstance(choices[0], dict):
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    else:
        texts = list(choices or [])
    key = next((entry[name] for name in ("answer", "gold", "answerKey", "label") if name in entry), None)
    text = asked.removeprefix("Question:").strip()
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"{len(texts)} choices")
    return Question(text, tuple(str(t).strip() for t in texts), _index(key, texts, labels))


def _index(key: Any, texts: list[str], labels: list[str]) -> int:
    forms: list[list[Any]] = [labels, list(range(len(texts))), texts, list(LETTERS[: len(texts)])]
    for known in forms:
        if key in known:
            return known.index(key)
    raise ValueError(f"answer {key!r}")
