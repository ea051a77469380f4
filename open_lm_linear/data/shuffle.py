"""A shuffle of more than fits in memory: all sequences in the order of random keys, sorted in two passes on disk.

A sequence's key is a random 64-bit number that depends on the seed, its piece and its number there alone, so the order
depends neither on the number of workers nor on the sizes below. The first pass leaves one file per piece: runs of a
bounded size, each sorted by key. The second takes one range of keys after another (a bucket: the keys that share their
first bits) out of all runs, sorts it in memory and writes it to shards. Memory holds one run or a few buckets; the disk
holds the tokens twice, as runs and as shards, until the shards are whole.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from open_lm_linear.data.shards import write_shard

RUN_BYTES = 2**27  # sorted in memory at once
BUCKET_BYTES = 2**27  # aimed at; smaller ones would be read in smaller bits
MOST_BUCKETS = 2**14
CHUNK = 4096  # sequences
FOOTER = 3  # int64 numbers at the end of a file: runs, buckets, tokens left over


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned integers that hold every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def record_type(seq_len: int, tokens: np.dtype) -> np.dtype:
    """A sequence with its key."""
    return np.dtype([("key", "<u8"), ("tokens", tokens, (seq_len + 1,))])


def bucket_count(work: int, tokens: np.dtype) -> int:
    """A power of two for about ``work`` bytes of text, three of which make a token."""
    wanted = work // 3 * tokens.itemsize // BUCKET_BYTES
    return min(max(2, 1 << wanted.bit_length()), MOST_BUCKETS)


class RunWriter:
    """Writes the sequences of one piece as sorted runs; the file appears under its name only when it is whole.

    Args:
        stream: what tells this piece's keys from those of all others: (seed, piece and side).
        buckets: a power of two, the same for all pieces.
    """

    def __init__(self, path: Path, seq_len: int, tokens: np.dtype, stream: tuple[int, int], buckets: int) -> None:
        self.path, self.unfinished = path, path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        self.record, self.tokens = record_type(seq_len, tokens), tokens
        self.random = np.random.Philox(key=np.array([number % 2**64 for number in stream], dtype=np.uint64))
        shift = np.uint64(64 - (buckets.bit_length() - 1))
        self.bounds = np.arange(1, buckets, dtype=np.uint64) << shift  # first key of each bucket but the first
        self.index: list[np.ndarray] = []
        self.waiting: list[np.ndarray] = []
        self.bytes = self.count = 0
        self.file = self.unfinished.open("wb")

    def add(self, sequences: np.ndarray) -> None:
        """Takes (n, seq_len + 1)."""
        if len(sequences):
            self.waiting.append(sequences)
            self.bytes += sequences.nbytes
        if self.bytes >= RUN_BYTES:
            self._flush()

    def _flush(self) -> None:
        sequences = np.concatenate(self.waiting)
        self.waiting, self.bytes = [], 0
        keys = self.random.random_raw(len(sequences))
        order = np.argsort(keys, kind="stable")
        records = np.empty(len(sequences), dtype=self.record)
        records["key"] = keys[order]
        for i in range(0, len(order), CHUNK):  # without a second copy of all
            records["tokens"][i : i + CHUNK] = sequences[order[i : i + CHUNK]]
        starts = np.searchsorted(records["key"], self.bounds)
        self.index.append(np.concatenate([[0], starts, [len(records)]]) + self.count)
        self.count += len(records)
        self.file.write(records.view(np.uint8).data)

    def close(self, rest: np.ndarray) -> None:
        """Ends the file with ``rest``, the tokens that fill no sequence."""
        if self.waiting:
            self._flush()
        self.file.write(rest.astype(self.tokens).tobytes())
        index = np.array(self.index, dtype="<i8").reshape(len(self.index), len(self.bounds) + 2)
        self.file.write(index.tobytes())
        self.file.write(np.array([len(self.index), len(self.bounds) + 1, len(rest)], dtype="<i8").tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.unfinished, self.path)

    def abandon(self) -> None:
        """Removes what was written, unless it is whole."""
        self.file.close()
        self.unfinished.unlink(missing_ok=True)


class RunFile:
    """The file that a ``RunWriter`` wrote."""

    def __init__(self, path: Path, record: np.dtype) -> None:
        self.path, self.record, self.tokens = path, record, record["tokens"].base
        with path.open("rb") as file:
            end = file.seek(-8 * FOOTER, os.SEEK_END)
            self.runs, self.buckets, self.left = np.fromfile(file, dtype="<i8", count=FOOTER).tolist()
        self.index_at = end - self.runs * (self.buckets + 1) * 8

    def counts(self) -> np.ndarray:
        """Sequences per bucket."""
        with self.path.open("rb") as file:
            file.seek(self.index_at)
            index = np.fromfile(file, dtype="<i8", count=self.runs * (self.buckets + 1))
        return np.diff(index.reshape(self.runs, self.buckets + 1)).sum(0)

    def rest(self) -> np.ndarray:
        """The tokens that filled no sequence."""
        with self.path.open("rb") as file:
            file.seek(self.index_at - self.left * self.tokens.itemsize)
            return np.fromfile(file, dtype=self.tokens, count=self.left)

    def read(self, bucket: int) -> Iterator[np.ndarray]:
        """The records of a bucket, one array per run that has some."""
        with self.path.open("rb", buffering=0) as file:
            for run in range(self.runs):
                at = self.index_at + (run * (self.buckets + 1) + bucket) * 8
                first, last = np.frombuffer(os.pread(file.fileno(), 16, at), dtype="<i8").tolist()
                if last > first:
                    file.seek(first * self.record.itemsize)
                    yield np.fromfile(file, dtype=self.record, count=last - first)


def shuffled(
    paths: Sequence[Path], record: np.dtype, starts: np.ndarray, first: int, last: int
) -> Iterator[np.ndarray]:
    """The sequences of rank ``first`` to ``last`` in the order of their keys.

    Args:
        paths: the files of runs; sequences whose keys are equal keep this order.
        starts: the rank of each bucket's first sequence, and the total.
    """
    files = [RunFile(path, record) for path in paths]
    bucket = int(np.searchsorted(starts, first, side="right")) - 1
    while first < last:
        begin, end = starts[bucket].item(), starts[bucket + 1].item()
        if begin <= first < end:
            records = np.concatenate([part for file in files for part in file.read(bucket)])
            order = np.argsort(records["key"], kind="stable")
            tokens = records["tokens"]
            for i in order[first - begin : last - begin]:
                yield tokens[i]
            first = min(end, last)
        bucket += 1


def shard_ranks(total: int, per_shard: int, fewest: int) -> np.ndarray:
    """The rank of each shard's first sequence, and the total: shards of equal size within one sequence."""
    number = min(total, max(fewest, -(-total // per_shard)))
    return np.array([total * i // number for i in range(number + 1)]) if number else np.zeros(1, dtype=np.int64)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.tar"


def missing_shards(folder: Path, number_of_shards: int, at_most: int) -> list[tuple[int, int]]:
    """The spans of shards, ``at_most`` long, in which one or more are missing."""
    present = {path.name for path in folder.glob("shard-*.tar")}
    spans = ((i, min(i + at_most, number_of_shards)) for i in range(0, number_of_shards, at_most))
    return [span for span in spans if any(shard_path(folder, i).name not in present for i in range(*span))]


def write_shards(
    folder: Path,
    span: tuple[int, int],
    ranks: np.ndarray,
    sequences: Iterable[np.ndarray],
    vocab_size: int | None,
) -> None:
    """Writes the shards of a span that are not there yet.

    Args:
        ranks: the rank of each shard's first sequence, and the total.
        sequences: those of the whole span, in order.
        vocab_size: for samples of ``.npy``; None writes JSON.
    """
    rows = iter(sequences)
    for number in range(*span):
        first, last = ranks[number].item(), ranks[number + 1].item()
        path = shard_path(folder, number)
        taken = (next(rows) for _ in range(last - first))
        if path.exists():
            for _ in taken:
                pass
        else:
            write_shard(path, taken, first_key=first, vocab_size=vocab_size)
