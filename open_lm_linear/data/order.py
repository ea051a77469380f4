"""Which sample comes when: pure functions of (seed, index), whatever the place of resumption.

Epoch e of a source visits its shards in a permutation given by (seed, e), and the samples of shard s in one given by
(seed, e, s). No permutation over all samples is ever made, so a corpus of 10^11 tokens costs no more memory than a
small one. Several sources are mixed by a schedule that says in constant time which source sample i is from and how
many earlier samples were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from open_lm_linear.cli import UserError

SOURCES, DRAWS = 1 << 62, 1 << 63  # random streams of further sources' shards and of draws; samples use 1 + shard


class Key(NamedTuple):
    """A sample, and the shard that its source visits next (-1: not known)."""

    shard: int
    sample: int
    following: int = -1


class EpochOrder:
    """The order of one source's epoch: position 0 .. total - 1 -> (shard number, sample number), each exactly once.

    Args:
        counts: int64 (shards,), samples per shard.
        first: number of the source's first shard among all shards.
    """

    def __init__(self, seed: int, epoch: int, counts: np.ndarray, source: int = 0, first: int = 0) -> None:
        self.seed, self.epoch, self.counts, self.first = seed, epoch, counts, first
        self.shards = permutation(seed, epoch, SOURCES + source if source else 0, len(counts))
        self.ends = np.cumsum(counts[self.shards])  # the position at which each visited shard is over
        self._visit = (0, 0, -1, -1, self.shards)  # begin, end, shard, the one after it, its samples' order

    def __getitem__(self, position: int) -> tuple[int, int]:
        return self.key(position)[:2]

    def key(self, position: int) -> Key:
        begin, end, shard, following, samples = self._visit
        if not begin <= position < end:
            self._visit = begin, end, shard, following, samples = self._visited(position)
        return Key(shard, int(samples[position - begin]), following)

    def _visited(self, position: int) -> tuple[int, int, int, int, np.ndarray]:
        visit = int(np.searchsorted(self.ends, position, side="right"))
        local, end = int(self.shards[visit]), int(self.ends[visit])
        count, shard = int(self.counts[local]), self.first + local
        following = self.first + int(self.shards[visit + 1]) if visit + 1 < len(self.shards) else -1
        return end - count, end, shard, following, permutation(self.seed, self.epoch, 1 + shard, count)


@lru_cache(maxsize=64)
def permutation(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    return np.argsort(random(seed, epoch, stream, n), kind="stable")


def random(seed: int, a: int, b: int, n: int) -> np.ndarray:
    """n uint64 of the Philox stream that (seed, a, b) names.

    Raw words, since numpy promises these to stay the same over its versions and ``Generator.permutation`` not to.
    """
    key, counter = np.array([seed % 2**64, a], dtype=np.uint64), np.array([0, 0, 0, b], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


class Schedule:
    """Which source each index is from, in proportions as exact as whole samples allow.

    The first source takes the indices at which floor(i * p) steps up, p its share; the others share the rest likewise,
    and so on. After any i indices every source has had its share of them within the number of sources, and the place
    in each source is known without counting. Weights are kept as fractions, so 10^9 indices add up no rounding.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(float(weight))) for weight in weights]
        self.shares = [weight / sum(exact[number:]) for number, weight in enumerate(exact)]

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, how many earlier indices are from it)"""
        for source, share in enumerate(self.shares):
            top, bottom = share.numerator, share.denominator
            before = index * top // bottom
            if (index + 1) * top // bottom > before:
                return source, before
            index -= before
        raise AssertionError("the last source takes whatever is left")

    def counts(self, total: int) -> list[int]:
        """How many of the first ``total`` indices are from each source."""
        counts = []
        for share in self.shares:
            counts.append(total * share.numerator // share.denominator)
            total -= counts[-1]
        return counts

    def one_pass(self, sizes: Sequence[int]) -> int:
        """The most indices for which no source of these sizes has to begin again."""
        low, high = 0, sum(sizes)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(count <= size for count, size in zip(self.counts(middle), sizes, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


class Order:
    """Global index (0, 1, ... without end) -> sample.

    Args:
        counts: per source the samples of its shards; shards are numbered over all sources.
        weights: a share of the samples per source. None: all shards are one source.
        resampled: samples are drawn with replacement, each with equal chance within its source.
    """

    def __init__(
        self,
        seed: int,
        counts: Sequence[Sequence[int]],
        weights: Sequence[float] | None = None,
        resampled: bool = False,
    ) -> None:
        if weights is None:
            counts, weights = [[count for source in counts for count in source]], [1.0]
        self.seed, self.resampled, self.schedule = seed, resampled, Schedule(weights)
        self.counts = [np.array(source, dtype=np.int64) for source in counts]
        self.sizes = [int(source.sum()) for source in self.counts]
        self.firsts = np.cumsum([0, *(len(source) for source in self.counts)]).tolist()
        self._epochs = lru_cache(maxsize=2 * len(self.counts))(self._epoch)

    def _epoch(self, source: int, epoch: int) -> EpochOrder:
        return EpochOrder(self.seed, epoch, self.counts[source], source, self.firsts[source])

    def __getitem__(self, index: int) -> Key:
        source, nth = self.schedule[index]
        size = self.sizes[source]
        if self.resampled:
            return self._drawn(source, int(random(self.seed, index, DRAWS + source, 1)[0] % np.uint64(size)))
        epoch, position = divmod(nth, size)
        key = self._epochs(source, epoch).key(position)
        if key.following < 0:  # the last shard of its epoch; the next epoch is made for its first shard alone
            key = key._replace(following=self._epochs(source, epoch + 1).key(0).shard)
        return key

    def _drawn(self, source: int, sample: int) -> Key:
        ends = np.cumsum(self.counts[source])
        shard = int(np.searchsorted(ends, sample, side="right"))
        return Key(self.firsts[source] + shard, sample - int(ends[shard] - self.counts[source][shard]))


def check_weights(weights: Sequence[float], sources: int) -> None:
    """Raises UserError unless there is one number above 0 a source."""
    if len(weights) != sources:
        raise UserError(
            f"--train-data-mix-weights has {len(weights)} weights for {sources} sources of training data: give one for "
            "each path of --train-data."
        )
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise UserError(f"--train-data-mix-weights {wrong[0]} is not above 0: leave that source out of --train-data.")
