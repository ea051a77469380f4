"""Loss on held-out text by position in the context and by domain, in nats per token and in bits per byte."""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch

from open_lm_linear.cli import UserError
from open_lm_linear.data.inputs import JSON_LINES, Reading, documents, find_inputs, kind, plan, records
from open_lm_linear.data.manifest import MANIFEST
from open_lm_linear.data.stream import TokenDataset, shards_of
from open_lm_linear.evaluation.estimates import row
from open_lm_linear.evaluation.options import read_options
from open_lm_linear.evaluation.reading import check_memory, start_tokens, token_losses
from open_lm_linear.evaluation.subject import Subject


@dataclass(frozen=True)
class Options:
    """Options of an entry of kind ``perplexity``."""

    task: str = "perplexity"
    """Name in the tables."""
    data: tuple[str, ...] = ()
    """Text as `prepare` reads it (text, JSON lines or parquet, plain or compressed), or a manifest.jsonl of shards."""
    text_key: str = "text"
    """Key of the text."""
    domain_key: str = "source"
    """Key of the domain in JSON lines. Where it is missing, and in other files, the file's name is the domain."""
    contexts: tuple[int, ...] = (2048,)
    """Tokens that the last token of a window is predicted from."""
    tokens: int = 200_000
    """Tokens to predict at each context, about. Documents are taken from each domain in turn."""
    windows: int = 4
    """Windows that one document gives at most, from its beginning, side by side."""
    first_bucket: int = 128
    """Positions in the first bucket of the loss by position; each ends at twice the position of the one before."""


@dataclass(frozen=True)
class Document:
    """A text, or ids that are one already."""

    domain: str
    content: str | list[int]


@dataclass(frozen=True)
class Window:
    """What one window gave: nats (T,) float64 of its tokens in order, and the bytes that these tokens spell."""

    domain: str
    document: int
    first: int
    """Position from which the first of the tokens is predicted."""
    nats: torch.Tensor
    bytes: int

    def between(self, first: int, last: int) -> torch.Tensor:
        """The nats at positions ``first`` to ``last``."""
        return self.nats[max(0, first - self.first) : max(0, last + 1 - self.first)]


def run(subject: Subject, options: Mapping[str, Any], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Rows of nats per token and bits per byte: over all text, by domain, by position. ``seed`` changes nothing.

    Args:
        limit: documents at most.

    Raises:
        UserError: an unknown option, no data, or a context whose cache does not fit into memory.
    """
    opts = read_options(Options, options, "perplexity")
    if not opts.data:
        raise UserError("perplexity has no text to read: give its option `data` a text file, JSON lines or a manifest.")
    if min(opts.tokens, opts.windows, opts.first_bucket, len(opts.contexts), *opts.contexts) < 1:
        raise UserError("perplexity's options contexts, tokens, windows and first_bucket must be above 0.")
    check_memory(subject, max(opts.contexts))
    vocab_size = subject.model.get_input_embeddings().num_embeddings
    found, uniform = list(in_turn(_documents(opts, max(opts.contexts), vocab_size))), math.log(vocab_size)
    rows = []
    for context in opts.contexts:
        windows = list(_measured(subject, found[:limit], opts, context))
        if not windows:
            raise UserError(f"the data of {opts.task} holds no document of two tokens: {', '.join(opts.data)}.")
        for one in _rows(opts, windows, context):
            rows.append(one | ({"chance": uniform} if one["metric"] == "nats_per_token" else {}))
    return rows


def _measured(subject: Subject, found: list[Document], opts: Options, context: int) -> Iterator[Window]:
    left, tokenizer = opts.tokens, subject.tokenizer
    for number, document in enumerate(found):
        if left <= 0:
            return
        ids, start = document.content, list[int]()
        if isinstance(ids, str):
            ids, start = tokenizer(ids, add_special_tokens=False, verbose=False)["input_ids"], start_tokens(tokenizer)
        for part in windows_of(ids, context, start)[: opts.windows]:
            first = max(0, len(start) - 1)
            nats, scored = token_losses(subject.model, torch.tensor(part))[first:], part[first + 1 :]
            text = tokenizer.decode(scored, clean_up_tokenization_spaces=False)
            yield Window(document.domain, number, first, nats.double(), len(text.encode()))
            left -= len(scored)


def windows_of(ids: list[int], context: int, start: list[int]) -> list[list[int]]:
    """Pieces of at most ``context + 1`` tokens, each beginning with ``start``; a last piece of one token is left out.

    Without ``start`` a piece begins with the token at which the one before ended, so that every token but the
    document's first is predicted once.
    """
    step = context + 1 - len(start) if start else context
    if step < 1:
        raise UserError(f"a context of {context} tokens has no room behind the {len(start)} that begin a text.")
    pieces = [start + ids[at : at + step + (not start)] for at in range(0, len(ids), step)]
    return [piece for piece in pieces if len(piece) > 1]


def in_turn(found: list[Document]) -> Iterator[Document]:
    """One document of each domain, then the next of each, until all are used up; within a domain in their order."""
    domains: dict[str, list[Document]] = defaultdict(list)
    for document in found:
        domains[document.domain].append(document)
    for together in zip_longest(*domains.values()):
        yield from (document for document in together if document is not None)


def _documents(opts: Options, longest: int, vocab_size: int) -> list[Document]:
    found: list[Document] = []
    for path in opts.data:
        if os.path.basename(path) == MANIFEST:
            dataset = TokenDataset(shards_of([path]), longest, vocab_size)
            name = os.path.basename(os.path.dirname(os.path.abspath(path)))
            keys = ((shard, i) for shard, count in enumerate(dataset.counts) for i in range(count))
            enough = islice(keys, opts.tokens // longest + 1)
            found += [Document(name, dataset[key].tolist()) for key in enough]
            continue
        for entry in find_inputs([path]):
            name = os.path.basename(entry.path).split(".")[0]
            if kind(entry.path) in JSON_LINES:
                found += [_document(r, opts, name, entry.path) for r in records(entry.path)]
            else:
                pieces = plan([entry])
                found += [Document(name, text) for parts in pieces for text in documents(parts, Reading(opts.text_key))]
    return found


def _document(record: dict[str, Any], opts: Options, name: str, path: str) -> Document:
    text = record.get(opts.text_key)
    if not isinstance(text, str):
        raise UserError(f"an entry of {path} has no text under {opts.text_key!r}: set the option text_key.")
    return Document(str(record.get(opts.domain_key) or name), text)


def buckets(context: int, first: int) -> list[tuple[int, int]]:
    """First and last position of each bucket: with 128 0-127, 128-255, 256-511, ... to the last of the context.

    Position p is that of the token that is read; what it is scored on is the prediction of the token behind it.
    """
    edges = [0]
    while edges[-1] < context:
        edges.append(min(context, max(first, 2 * edges[-1])))
    return [(a, b - 1) for a, b in zip(edges, edges[1:], strict=False)]


def _rows(opts: Options, windows: list[Window], context: int) -> list[dict[str, Any]]:
    task = opts.task
    rows = _summary(task, windows, context=context, domain="all")
    domains = sorted({w.domain for w in windows})
    if len(domains) > 1:
        for domain in domains:
            rows += _summary(task, [w for w in windows if w.domain == domain], context=context, domain=domain)
    # Short documents have early positions alone: only full windows compare the same text at every position.
    full = [w for w in windows if w.first + len(w.nats) == context]
    if not full:
        print(
            f"{task}: no document fills a context of {context} tokens, so none is shown by position.", file=sys.stderr
        )
        return rows
    for first, last in buckets(context, opts.first_bucket):
        place = {"context": context, "domain": "all", "position": [first, last]}
        parts = [(w.document, w.between(first, last)) for w in full]
        sums = [(document, float(nats.sum()), len(nats)) for document, nats in parts]
        rows.append(_over_documents(task, "nats_per_token", sums) | place)
    return rows


def _summary(task: str, windows: list[Window], **place: Any) -> list[dict[str, Any]]:
    """Nats per token and bits per byte of all tokens of these windows."""
    tokens = [(w.document, float(w.nats.sum()), len(w.nats)) for w in windows]
    bits = [(document, nats / math.log(2), w.bytes) for (document, nats, _), w in zip(tokens, windows, strict=True)]
    return [
        _over_documents(task, "nats_per_token", tokens) | place,
        _over_documents(task, "bits_per_byte", bits) | place,
    ]


def _over_documents(task: str, metric: str, parts: list[tuple[int, float, int]]) -> dict[str, Any]:
    """sum / count over parts (document, sum, count). Its error is over documents: tokens of one are not independent."""
    sums: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    for document, value, count in parts:
        sums[document] += value
        counts[document] += count
    unit = metric.rpartition("_")[2] + "s"
    return row(task, metric, list(sums.values()), list(counts.values())) | {unit: sum(counts.values())}
