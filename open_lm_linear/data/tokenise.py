"""Text -> tokens -> sequences: what one worker does with one piece of the inputs.

Packing is per piece: its documents are joined in their order, with the end-of-document token after each, and cut into
sequences that do not overlap. What is left at the end of every piece is joined in the order of the pieces, and packed
too. So memory holds a batch of text and a run of sequences, nothing depends on which worker did what, and no token but
the last few of each side is dropped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from open_lm_linear.data.inputs import Part, Reading, documents
from open_lm_linear.data.shuffle import RunFile, RunWriter, record_type, shuffled, token_type, write_shards

BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at once
SIDES = ("train", "val")
EXACT_BITS = 7  # lengths of documents are counted with this many leading bits: the quantiles are within 2 %


@dataclass(frozen=True)
class Job:
    """What every worker must know; the same for all pieces."""

    pieces: Path  # folder of the files of runs
    output: Path
    tokenizer: (
        Any  # JSON of a fast tokenizer, which loads in a moment and without transformers, or the tokenizer itself
    )
    tokenizer_id: str
    vocab_size: int
    eod: int
    seq_len: int
    holdout: float
    seed: int
    buckets: int
    sample_format: str
    reading: Reading = field(default_factory=Reading)
    benchmark: bool = False

    @property
    def tokens(self) -> np.dtype:
        return token_type(self.vocab_size)

    def path(self, piece: int, side: str) -> Path:
        return self.pieces / f"{piece:06d}.{side}"

    def writer(self, piece: int, side: str) -> RunWriter:
        stream = (self.seed, piece * len(SIDES) + SIDES.index(side))
        return RunWriter(self.path(piece, side), self.seq_len, self.tokens, stream, self.buckets)


class Packer:
    """Cuts a stream of tokens into sequences of seq_len + 1."""

    def __init__(self, seq_len: int, tokens: np.dtype | type = np.int32) -> None:
        self.length = seq_len + 1
        self.rest = np.empty(0, dtype=tokens)

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """The sequences that these tokens complete (any number, seq_len + 1)."""
        joined = np.concatenate([self.rest, tokens]) if len(self.rest) else tokens
        whole = len(joined) // self.length * self.length
        self.rest = joined[whole:].copy()
        return joined[:whole].reshape(-1, self.length)


def join(token_lists: Sequence[Sequence[int]], eod: int, tokens: np.dtype | type = np.int32) -> np.ndarray:
    """The documents' tokens in one array, the end-of-document token after each."""
    total = sum(map(len, token_lists)) + len(token_lists)
    parts = (part for ids in token_lists for part in (ids, (eod,)))
    return np.fromiter(chain.from_iterable(parts), dtype=tokens, count=total)


def pack(token_lists: Iterable[Sequence[int]], seq_len: int, eod: int) -> Iterator[np.ndarray]:
    """Sequences, int32 (seq_len + 1,), of the documents' tokens; what is left at the end is dropped.

    Consecutive sequences do not overlap: joined, they are the start of doc_0 eod doc_1 eod ...
    """
    packer = Packer(seq_len)
    for ids in token_lists:
        yield from packer.add(join([ids], eod))


def held_out(text: str, share: float) -> bool:
    """Whether a document is kept for validation: a pure function of its text, true for ``share`` of all texts."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Encoder:
    """Texts -> token ids without special tokens around them."""

    def __init__(self, tokenizer: Any) -> None:
        self.slow = None if isinstance(tokenizer, str) else tokenizer
        if self.slow is None:
            from tokenizers import Tokenizer

            self.fast = Tokenizer.from_str(tokenizer)
            self.batch = getattr(self.fast, "encode_batch_fast", self.fast.encode_batch)  # without offsets, where it is

    def __call__(self, texts: list[str]) -> list[list[int]]:
        try:
            return self._encode(texts)
        except (UnicodeError, TypeError):  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
            return self._encode([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self.slow is not None:
            encoded = self.slow(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            return encoded["input_ids"]
        return [encoding.ids for encoding in self.batch(texts, add_special_tokens=False)]

    def alone(self, texts: list[str]) -> None:
        """The tokenizer's own work and nothing else, for comparison."""
        if self.slow is not None:
            self._encode(texts)
        else:
            self.batch(texts, add_special_tokens=False)


def portable(tokenizer: Any) -> Any:
    """What a job carries for this tokenizer of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return tokenizer
    from tokenizers import Tokenizer

    try:
        copy = Tokenizer.from_str(backend.to_str())
    except Exception:  # parts written in Python cannot be taken along
        return tokenizer
    copy.no_truncation()
    copy.no_padding()
    return copy.to_str()


_encoders: dict[str, Encoder] = {}


def encoder_of(job: Job) -> Encoder:
    """This process's encoder, made once."""
    if job.tokenizer_id not in _encoders:
        _encoders.clear()
        _encoders[job.tokenizer_id] = Encoder(job.tokenizer)
    return _encoders[job.tokenizer_id]


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of BATCH_CHARACTERS or little more."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _bins(lengths: np.ndarray) -> np.ndarray:
    """Lengths with all but their leading bits cleared."""
    shift = np.maximum(np.frexp(np.maximum(lengths, 1))[1] - EXACT_BITS, 0)
    return lengths >> shift << shift


class Side:
    """The training or the validation documents of one piece."""

    def __init__(self, job: Job, piece: int, side: str) -> None:
        self.job, self.writer = job, job.writer(piece, side)
        self.packer = Packer(job.seq_len, job.tokens)
        self.documents = self.characters = self.tokens = 0
        self.lengths: dict[int, int] = {}

    def add(self, texts: list[str], token_lists: list[list[int]]) -> None:
        self.characters += sum(map(len, texts))
        self.documents += len(texts)
        tokens = join(token_lists, self.job.eod, self.job.tokens)
        self.tokens += len(tokens)
        self.writer.add(self.packer.add(tokens))
        lengths = np.fromiter(map(len, token_lists), dtype=np.int64, count=len(token_lists))
        for length, count in zip(*np.unique(_bins(lengths), return_counts=True), strict=True):
            self.lengths[int(length)] = self.lengths.get(int(length), 0) + int(count)

    def close(self) -> dict[str, Any]:
        self.writer.close(self.packer.rest)
        return {
            "documents": self.documents,
            "characters": self.characters,
            "tokens": self.tokens,
            "sequences": self.writer.count,
            "lengths": {str(length): self.lengths[length] for length in sorted(self.lengths)},
        }


def tokenise_piece(job: Job, piece: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Writes the piece's sequences as runs; returns its counts by side, and the seconds that were spent.

    Raises:
        UserError: an input is unreadable or malformed.
    """
    begin = time.perf_counter()
    alone = 0.0
    encode = encoder_of(job)
    sides = [Side(job, piece, side) for side in SIDES]
    try:
        for number, texts in enumerate(batches(documents(parts, job.reading))):
            if job.benchmark and number % 2 == 0:  # in turn before and after, for what the first leaves in caches
                alone += _alone(encode, texts)
            lists = encode(texts)
            held = [held_out(text, job.holdout) for text in texts] if job.holdout else [False] * len(texts)
            for side, value in zip(sides, (False, True), strict=True):
                chosen = [i for i, is_held in enumerate(held) if is_held is value]
                if chosen:
                    side.add([texts[i] for i in chosen], [lists[i] for i in chosen])
            if job.benchmark and number % 2:
                alone += _alone(encode, texts)
        counts = {side: counter.close() for side, counter in zip(SIDES, sides, strict=True)}
    finally:
        for counter in sides:
            counter.writer.abandon()
    seconds = time.perf_counter() - begin - alone
    return {"piece": piece, "counts": counts, "seconds": seconds, "alone": alone}


def _alone(encode: Encoder, texts: list[str]) -> float:
    begin = time.perf_counter()
    encode.alone(texts)
    return time.perf_counter() - begin


def pack_rests(job: Job, pieces: int) -> dict[str, Any]:
    """Packs what the pieces left over, as one more piece."""
    counts = {}
    for side in SIDES:
        packer, writer = Packer(job.seq_len, job.tokens), job.writer(pieces, side)
        for piece in range(pieces):
            writer.add(packer.add(RunFile(job.path(piece, side), record_type(job.seq_len, job.tokens)).rest()))
        writer.close(packer.rest)
        counts[side] = {"documents": 0, "characters": 0, "tokens": 0, "sequences": writer.count, "lengths": {}}
    return {"piece": pieces, "counts": counts}


def write_span(
    job: Job, side: str, pieces: int, starts: np.ndarray, ranks: np.ndarray, span: tuple[int, int]
) -> dict[str, Any]:
    """Writes the shards ``span`` of a side out of the runs of all pieces; returns the seconds spent."""
    begin = time.perf_counter()
    paths = [job.path(piece, side) for piece in range(pieces)]
    record = record_type(job.seq_len, job.tokens)
    sequences = shuffled(paths, record, starts, ranks[span[0]].item(), ranks[span[1]].item())
    vocab_size = job.vocab_size if job.sample_format == "npy" else None
    write_shards(job.output / side, span, ranks, sequences, vocab_size)
    return {"shards": span[1] - span[0], "seconds": time.perf_counter() - begin}
