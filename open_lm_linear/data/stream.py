"""Batches of tokens whose order is a pure function of (seed, samples_seen).

The state of the data is one integer, the number of samples seen: a run resumes at any step, on any number of ranks and
worker processes, and reads what the uninterrupted run would have read.

Epoch e visits the shards in a permutation given by (seed, e), and the samples of shard s in one given by (seed, e, s).
No permutation over all samples is ever made, so a corpus of 10^11 tokens costs no more memory than a small one.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from open_lm_linear.cli import UserError
from open_lm_linear.data.manifest import CARD, MANIFEST, Shard, local, read_dataset_card, read_manifest
from open_lm_linear.data.shards import ShardIndex

if TYPE_CHECKING:
    import torch

OPEN_SHARDS = 8  # per process; an epoch reads one shard after the other
CHECKED_SHARDS = 1000  # `check` opens at most this many; every other shard is checked when its turn comes
VOCABULARY_PADDING = 512  # a model may have this many rows more than its tokenizer has tokens


@dataclass(frozen=True)
class DataConfig:
    """The data."""

    train_data: tuple[str, ...] = ()
    """Training data: manifest.jsonl paths, their folders, or tars with braces such as shard-{00000..00012}.tar."""
    dataset_manifest: tuple[str, ...] = ()
    """OpenLM's name for manifests of training data; added to --train-data."""
    val_data: tuple[str, ...] = ()
    """Validation data, named as training data is."""
    val_num_samples: int | None = None
    """Tokens of validation data to use at most (OpenLM's name; it counts tokens). None: all."""
    data_key: str = "auto"
    """Extension of the samples in the tars: json, json.gz or txt. auto: the first of these that a shard has."""
    seq_len: int | None = None
    """Tokens that the model reads per sequence. None: the model's own length."""
    workers: int = 1
    """Processes per rank that read ahead; 0 reads in the training process. The order never depends on it."""
    dataset_type: Literal["auto", "webdataset", "synthetic"] = "auto"
    """synthetic: pseudo-random tokens, no files. auto and webdataset: shards."""


def shards_of(sources: Iterable[str], data_key: str = "auto") -> list[Shard]:
    """The shards that ``sources`` name (see DataConfig.train_data), in order; tars are opened and counted."""
    shards: list[Shard] = []
    for path in _files(sources):
        if path.endswith(".jsonl"):
            shards += read_manifest(path)
        elif path.endswith(".tar"):
            shards.append(Shard(path, len(ShardIndex(path, data_key))))
        else:
            raise UserError(f"{path} is no data: give a {MANIFEST}, its folder, or shards whose names end in .tar.")
    return shards


def _files(sources: Iterable[str]) -> list[str]:
    """Manifests and tars: braces expanded, and a folder replaced by the manifest in it."""
    paths = [path for source in sources for path in expand_braces(local(source))]
    return [os.path.join(path, MANIFEST) if os.path.isdir(path) else path for path in paths]


def expand_braces(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` -> a-08.tar, a-09.tar, a-10.tar; ``{x,y}.tar`` -> x.tar, y.tar; several braces multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        words = ",".join(str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [expanded for word in words.split(",") for expanded in expand_braces(head + word + tail)]


class TokenDataset:
    """The samples of many shards, each addressed by (shard number, sample number).

    ``counts``: int64 (number of shards,), samples per shard. ``len(dataset)``: samples in all.
    """

    def __init__(self, shards: list[Shard], seq_len: int, vocab_size: int, data_key: str = "auto") -> None:
        self.shards, self.seq_len, self.vocab_size, self.data_key = shards, seq_len, vocab_size, data_key
        self.counts = np.array([shard.num_sequences for shard in shards], dtype=np.int64)
        self._open: OrderedDict[int, ShardIndex] = OrderedDict()

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, pair: tuple[int, int]) -> np.ndarray:
        """int64 (seq_len + 1,).

        Raises:
            UserError: a missing or wrong shard or sample; the message names it.
        """
        shard, sample = pair
        return self.index(shard).read_sequence(sample, self.seq_len, self.vocab_size)

    def index(self, shard: int) -> ShardIndex:
        """The opened shard; the last few used stay open."""
        if shard not in self._open:
            path, count = self.shards[shard].path, self.shards[shard].num_sequences
            self._open[shard] = ShardIndex(path, self.data_key, expected=count)
        self._open.move_to_end(shard)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files do not travel to a spawned worker


class SyntheticTokens:
    """Sample ``index`` is pseudo-random tokens, a pure function of (seed, index): int64 (seq_len + 1,)."""

    def __init__(self, seed: int, seq_len: int, vocab_size: int) -> None:
        self.seed, self.seq_len, self.vocab_size = seed, seq_len, vocab_size

    def __getitem__(self, index: int) -> np.ndarray:
        return (_random(self.seed, index, 0, self.seq_len + 1) % np.uint64(self.vocab_size)).astype(np.int64)


class EpochOrder:
    """The order of one epoch: position 0 .. total - 1 -> (shard number, sample number), each pair exactly once."""

    def __init__(self, seed: int, epoch: int, counts: np.ndarray) -> None:
        self.seed, self.epoch, self.counts = seed, epoch, counts
        self.shards = _permutation(seed, epoch, 0, len(counts))
        self.ends = np.cumsum(counts[self.shards])  # the position at which each visited shard is over

    def __getitem__(self, position: int) -> tuple[int, int]:
        visit = int(np.searchsorted(self.ends, position, side="right"))
        shard = int(self.shards[visit])
        count = int(self.counts[shard])
        within = position - (int(self.ends[visit]) - count)
        return shard, int(_permutation(self.seed, self.epoch, 1 + shard, count)[within])


def order(seed: int, epoch: int, dataset: TokenDataset) -> EpochOrder:
    """The order in which epoch ``epoch`` visits ``dataset``, a pure function of its arguments."""
    return EpochOrder(seed, epoch, dataset.counts)


@lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    return np.argsort(_random(seed, epoch, stream, n), kind="stable")


def _random(seed: int, a: int, b: int, n: int) -> np.ndarray:
    """n uint64 of the Philox stream that (seed, a, b) names.

    Raw words, since numpy promises these to stay the same over its versions and ``Generator.permutation`` not to.
    """
    key, counter = np.array([seed % 2**64, a], dtype=np.uint64), np.array([0, 0, 0, b], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


def locate(seed: int, dataset: TokenDataset) -> Callable[[int], tuple[int, int]]:
    """A function from the global index (0, 1, ... without end, epoch after epoch) to (shard number, sample number)."""
    total = len(dataset)
    epoch_order = lru_cache(maxsize=2)(lambda epoch: order(seed, epoch, dataset))

    def pair(index: int) -> tuple[int, int]:
        epoch, position = divmod(index, total)
        return epoch_order(epoch)[position]

    return pair


def count_sequences(cfg: DataConfig) -> int:
    """Training sequences in one epoch, read from the manifests (tars that are named directly are counted).

    Raises:
        UserError: no training data is given, or a manifest or a tar is missing or wrong.
    """
    return sum(shard.num_sequences for shard in shards_of(_train_sources(cfg), cfg.data_key))


def _train_sources(cfg: DataConfig) -> tuple[str, ...]:
    sources = cfg.train_data + cfg.dataset_manifest
    if not sources:
        raise UserError("no training data: give --train-data DIR/manifest.jsonl, or --dataset-type synthetic.")
    return sources


def global_batches(
    cfg: DataConfig,
    *,
    seed: int,
    samples_seen: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seq_len: int,
    vocab_size: int,
) -> Iterator[torch.Tensor]:
    """Rank ``rank``'s rows of every global batch from sample ``samples_seen`` on, without end.

    Global batch k is the samples samples_seen + k * global_batch_size onwards, and rank r holds the r-th of its
    ``world_size`` equal parts, so the batches of all ranks, joined in rank order, do not depend on ``world_size``.

    Yields:
        int64 (global_batch_size // world_size, seq_len + 1).

    Raises:
        UserError: the batch does not divide over the ranks, no data is given, or a shard or sample is wrong.
    """
    assert cfg.seq_len in (None, seq_len), "the caller resolves cfg.seq_len"
    if global_batch_size % world_size:
        raise UserError(f"--global-batch-size {global_batch_size} does not divide over {world_size} ranks.")
    dataset: TokenDataset | SyntheticTokens
    item: Callable[[int], Any]
    if cfg.dataset_type == "synthetic":
        dataset, item = SyntheticTokens(seed, seq_len, vocab_size), int
    else:
        dataset = TokenDataset(shards_of(_train_sources(cfg), cfg.data_key), seq_len, vocab_size, cfg.data_key)
        item = locate(seed, dataset)
    share = global_batch_size // world_size
    starts = itertools.count(samples_seen + rank * share, global_batch_size)
    return _load(dataset, ([item(i) for i in range(start, start + share)] for start in starts), cfg.workers)


def validation_batches(
    cfg: DataConfig, *, global_batch_size: int, rank: int, world_size: int, seq_len: int, vocab_size: int
) -> Iterator[torch.Tensor]:
    """Rank ``rank``'s rows of the validation data in its fixed order: every sample once over all ranks and batches.

    Every rank gets the same number of batches, as sharded forward passes must keep step. The last batch may be partial:
    ranks then differ by one row, and a rank may hold none, a tensor (0, seq_len + 1).

    Yields:
        int64 (at most ceil(global_batch_size / world_size), seq_len + 1); nothing where no ``val_data`` is given.

    Raises:
        UserError: ``val_num_samples`` is less than one sequence, or a manifest, shard or sample is wrong.
    """
    assert cfg.seq_len in (None, seq_len), "the caller resolves cfg.seq_len"
    dataset = TokenDataset(shards_of(cfg.val_data, cfg.data_key), seq_len, vocab_size, cfg.data_key)
    total = len(dataset)
    if cfg.val_num_samples is not None:
        if cfg.val_num_samples < seq_len:
            raise UserError(
                f"--val-num-samples {cfg.val_num_samples} is less than the {seq_len} tokens of one sequence."
            )
        total = min(total, cfg.val_num_samples // seq_len)
    in_order = ((shard, sample) for shard, count in enumerate(dataset.counts) for sample in range(count))
    pairs = itertools.islice(in_order, total)
    batches = iter(lambda: list(itertools.islice(pairs, global_batch_size)), [])
    return _load(dataset, (batch[rank::world_size] for batch in batches), cfg.workers)


class _Batches:
    """A dataset whose items are whole batches: a list of keys -> int64 tensor (len(keys), seq_len + 1)."""

    def __init__(self, dataset: TokenDataset | SyntheticTokens) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: list[Any]) -> torch.Tensor | UserError:
        import torch

        try:
            rows = [self.dataset[key] for key in keys]
        except UserError as error:
            return error  # raised by _load: DataLoader would bury the sentence in a worker's traceback
        return torch.from_numpy(np.stack(rows) if rows else np.empty((0, self.dataset.seq_len + 1), dtype=np.int64))


def _load(
    dataset: TokenDataset | SyntheticTokens, batches: Iterable[list[Any]], workers: int
) -> Iterator[torch.Tensor]:
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),  # type: ignore[arg-type]  # map-style by duck typing, so that torch is imported late
        batch_size=None,  # an item is a batch already
        sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def check(cfg: DataConfig, seq_len: int, vocab_size: int) -> None:
    """Fails before training does: reads the manifests, opens shards, counts their samples and reads the first of each.

    At most CHECKED_SHARDS shards, evenly spaced, are opened; the others must exist.

    Raises:
        UserError: no training data, or data that is missing, disagrees with its manifest or does not fit the model.
    """
    if cfg.workers < 0:
        raise UserError(f"--workers {cfg.workers} is less than 0; 0 reads in the training process.")
    sources = cfg.val_data
    if cfg.dataset_type == "synthetic":
        if cfg.train_data or cfg.dataset_manifest:
            warnings.warn("--dataset-type synthetic: the training data given is not read.", stacklevel=2)
    else:
        sources = _train_sources(cfg) + sources
    for path in _files(sources):
        if path.endswith(".jsonl"):
            _check_card(path, seq_len, vocab_size)
    shards = shards_of(sources, cfg.data_key)
    for shard in shards:
        if not os.path.isfile(shard.path):
            raise UserError(f"shard {shard.path} is missing: copy it there, or take it out of its manifest.")
    dataset = TokenDataset(shards, seq_len, vocab_size, cfg.data_key)
    for number in range(0, len(shards), 1 + len(shards) // CHECKED_SHARDS):
        dataset[number, 0]


def _check_card(manifest: str, seq_len: int, vocab_size: int) -> None:
    """Compares ``dataset.json`` beside a manifest, where there is one, with the model."""
    card = read_dataset_card(manifest)
    if card is None:
        return
    path = os.path.join(os.path.dirname(manifest), CARD)
    vocabulary = card.get("vocab_size", vocab_size)
    if not vocabulary <= vocab_size < vocabulary + VOCABULARY_PADDING:
        raise UserError(
            f"{path} has a vocabulary of {vocabulary} ({card.get('tokenizer')}) and the model one of {vocab_size}: "
            "prepare the data with the model's own tokenizer."
        )
    length = card.get("seq_len", seq_len)
    if length < seq_len:
        raise UserError(
            f"{path} has sequences of {length} tokens and the model wants {seq_len}: train with --seq-len {length}, or "
            f"prepare the data with --seq-len {seq_len}."
        )
    if length > seq_len:
        warnings.warn(f"{path}: of every {length} tokens only the first {seq_len} are used.", stacklevel=3)
