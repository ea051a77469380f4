"""How well a model finds again what it has read: passkey, needles, RULER's tasks, multi-query associative recall."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.evaluation.estimates import row
from open_lm_linear.evaluation.options import read_options
from open_lm_linear.evaluation.reading import Reader, check_memory, encode, greedy, start_tokens
from open_lm_linear.evaluation.recall_tasks import TASKS, Prompt, Source, fitted, read_questions
from open_lm_linear.evaluation.subject import Subject

MQAR = "mqar"


@dataclass(frozen=True)
class Options:
    """Options of an entry of kind ``recall``."""

    task: str = ""
    """mqar or one of those of `recall_tasks.TASKS`."""
    contexts: tuple[int, ...] = (1024, 2048, 4096)
    """Tokens of prompt and answer together, by the subject's own tokenizer; they may exceed what it was trained at."""
    samples: int = 20
    """Prompts at each context."""
    depths: tuple[float, ...] = ()
    """Percent of the haystack before the needle, in turn over the samples; none: anywhere."""
    haystack: tuple[str, ...] = ()
    """Files of text, for tasks whose haystack is text; none: generated sentences."""
    questions: str = ""
    """For qa: SQuAD's JSON, or entries {context, question, answers}."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template."""
    pairs: int = 16
    """For mqar: keys with their values at the beginning of the context."""
    queries: int = 16
    """For mqar: keys that come again."""


def run(subject: Subject, options: Mapping[str, Any], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Rows of one task at each context, and at each depth where depths are given.

    Args:
        limit: prompts at each context at most.

    Raises:
        UserError: an unknown task or option, or a context too short for the task or too long for the memory.
    """
    opts = read_options(Options, options, "recall")
    _check(opts)
    check_memory(subject, max(opts.contexts))
    samples = opts.samples if limit is None else min(opts.samples, limit)
    measure = _mqar_rows if opts.task == MQAR else _prompt_rows
    return [one for context in opts.contexts for one in measure(subject, opts, context, samples, seed)]


def _check(opts: Options) -> None:
    if opts.task != MQAR and opts.task not in TASKS:
        known = [MQAR, *TASKS]
        near = did_you_mean(opts.task, known)
        raise UserError(f"recall has no task {opts.task!r}.{near} It has {', '.join(known)}.")
    if min(opts.samples, opts.pairs, opts.queries, *opts.contexts, len(opts.contexts)) < 1:
        raise UserError("recall's options contexts, samples, pairs and queries must be above 0.")
    if any(not 0 <= depth <= 100 for depth in opts.depths):
        raise UserError(f"recall's option depths is in percent, from 0 to 100, not {list(opts.depths)}.")
    if opts.depths and opts.task not in ("passkey", "needle") and not opts.task.startswith("niah_"):
        raise UserError(f"recall's task {opts.task} has no needle to put at a depth: leave depths out.")
    if opts.task == "qa" and not opts.questions:
        raise UserError("recall's task qa needs the option questions: SQuAD's JSON, or {context, question, answers}.")


def prompts(
    subject: Subject, opts: Options, context: int, samples: int, seed: int
) -> list[tuple[Prompt, list[int], float | None]]:
    """Each prompt, its ids (at most ``context`` less the tokens of the answer) and its needle's depth in percent."""
    task = TASKS[opts.task]
    questions = read_questions(opts.questions) if opts.task == "qa" else ()

    def ids(prompt: Prompt) -> list[int]:
        return encode(subject.tokenizer, prompt.text, prompt.beginning, chat=opts.chat)

    made = []
    for index in range(samples):
        depth = opts.depths[index % len(opts.depths)] if opts.depths else None
        name = f"{seed} {opts.task} {context} {index}"
        source = Source(name, None if depth is None else depth / 100, opts.haystack, questions, index)
        best = fitted(partial(task.build, source), lambda p: len(ids(p)), context - task.new_tokens, opts.task)
        made.append((best, ids(best), depth))
    return made


def _prompt_rows(subject: Subject, opts: Options, context: int, samples: int, seed: int) -> list[dict[str, Any]]:
    task, scores = TASKS[opts.task], list[tuple[float, float | None]]()
    for prompt, ids, depth in prompts(subject, opts, context, samples, seed):
        scores.append((task.score(prompt, greedy(subject, ids, task.new_tokens)), depth))
    filler = ("given" if opts.haystack else "generated") if task.filler == "text" else task.filler
    place = {"context": context, "haystack": filler}
    rows = [row(opts.task, "string_match", [score for score, _ in scores], chance=0.0) | place]
    for depth in opts.depths:
        at = [score for score, d in scores if d == depth]
        if at:
            rows.append(row(opts.task, "string_match", at, chance=0.0) | place | {"depth": depth})
    return rows


# ---- multi-query associative recall ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """A sequence for MQAR: ids (T,), where the keys come again, what must follow, and all of the values."""

    ids: list[int]
    asked_at: list[int]
    answers: list[int]
    values: list[int]


def associations(words: list[int], start: list[int], context: int, opts: Options, rng: random.Random) -> Pairs:
    """``k1 v1 k2 v2 ...``, then random words among which keys come again, each followed by its value.

    Multi-query associative recall (arXiv 2312.04927, section 3) on tokens that the subject knows: keys, values and
    the words between are different tokens each; the places of the queries are uniform.

    Raises:
        UserError: the context or the vocabulary is too small.
    """
    pairs, room = opts.pairs, context - len(start) - 2 * opts.pairs
    if room < 2 * opts.queries:
        need = len(start) + 2 * (pairs + opts.queries)
        raise UserError(f"mqar of {pairs} pairs and {opts.queries} queries takes a context of {need}, not {context}.")
    if len(words) <= 2 * pairs:
        raise UserError(f"mqar of {pairs} pairs takes more than the {len(words)} words of the vocabulary: ask fewer.")
    drawn = rng.sample(words, len(words))
    keys, values, rest = drawn[:pairs], drawn[pairs : 2 * pairs], drawn[2 * pairs :]
    ids = [*start, *(token for pair in zip(keys, values, strict=True) for token in pair)]
    rounds = -(-opts.queries // pairs)
    asked = [i for _ in range(rounds) for i in rng.sample(range(pairs), pairs)][: opts.queries]
    slots = dict(zip(sorted(rng.sample(range(room // 2), opts.queries)), asked, strict=True))
    asked_at, answers = [], []
    for slot in range(room // 2):
        if slot in slots:
            asked_at.append(len(ids))
            answers.append(values[slots[slot]])
            ids += [keys[slots[slot]], values[slots[slot]]]
        else:
            ids += rng.choices(rest, k=2)
    return Pairs(ids, asked_at, answers, values)


def words_of(subject: Subject) -> list[int]:
    """The tokens that are words of three letters or more; all but the special ones where these are few."""
    tokenizer = subject.tokenizer
    special = set(tokenizer.all_special_ids)
    ids = [
        i for i in range(min(len(tokenizer), subject.model.get_input_embeddings().num_embeddings)) if i not in special
    ]
    words = [i for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True) if _is_word(text)]
    return words if len(words) >= 1000 else ids


def _is_word(text: str) -> bool:
    return len(text.strip()) > 2 and text.strip().isalpha() and text.isascii()


def _mqar_rows(subject: Subject, opts: Options, context: int, samples: int, seed: int) -> list[dict[str, Any]]:
    words, start = words_of(subject), start_tokens(subject.tokenizer)
    exact, among = list[float](), list[float]()
    for index in range(samples):
        rng = random.Random(f"{seed} {MQAR} {context} {index}")
        made = associations(words, start, context, opts, rng)
        logits = _logits_at(subject, made)
        answers, values = torch.tensor(made.answers), torch.tensor(made.values)
        exact.append((logits.argmax(-1) == answers).float().mean().item())
        among.append((values[logits[:, values].argmax(-1)] == answers).float().mean().item())
    place = {"context": context, "pairs": opts.pairs, "queries": opts.queries}
    return [
        row(MQAR, "accuracy", exact, chance=0.0) | place,
        row(MQAR, "accuracy_among_values", among, chance=1 / opts.pairs) | place,
    ]


def _logits_at(subject: Subject, made: Pairs) -> torch.Tensor:
    """Logits (queries, V) behind the keys that come again."""
    found = []
    for span, logits in Reader(subject.model).pieces(torch.tensor(made.ids)):
        inside = [at - span.start for at in made.asked_at if span.start <= at < span.stop]
        found.append(logits[inside].float().cpu())
    return torch.cat(found)
