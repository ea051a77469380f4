"""Batches of tokens whose order is a pure function of (seed, samples_seen).

The state of the data is one integer, the number of samples seen: a run resumes at any step, on any number of ranks and
worker processes, and reads what the uninterrupted run would have read.

Which sample comes when is said by ``order``; here samples become batches.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from open_lm_linear.cli import UserError
from open_lm_linear.data.manifest import CARD, MANIFEST, Shard, local, read_dataset_card, read_manifest
from open_lm_linear.data.order import EpochOrder, Key, Order, check_weights, random
from open_lm_linear.data.remote import CACHE_GB, Ahead, beside, is_remote, suffix, within
from open_lm_linear.data.shards import ShardIndex, open_paths
from open_lm_linear.data.teacher_logits import TeacherLogits

if TYPE_CHECKING:
    import torch

OPEN_SHARDS = 2  # per process; an epoch reads one shard after the other
RESAMPLED_SHARDS = 64  # independent draws come back to all of them
CHECKED_SHARDS = 1000  # `check` opens at most this many; every other shard is checked when its turn comes
VOCABULARY_PADDING = 512  # a model may have this many rows more than its tokenizer has tokens


@dataclass(frozen=True)
class DataConfig:
    """The data."""

    train_data: tuple[str, ...] = ()
    """Training data: manifest.jsonl paths, their folders, or tars with braces such as shard-{00000..00012}.tar; on this
    machine or behind s3://, gs:// or https://. Remote tars want a manifest: named alone they are
    fetched to be counted."""
    dataset_manifest: tuple[str, ...] = ()
    """OpenLM's name for manifests of training data; added to --train-data."""
    train_data_mix_weights: tuple[float, ...] | None = None
    """Share of the samples that comes from each path of --train-data; each is read in an order of its own. An epoch
    without --train-num-samples then ends where the first of them is used up. None: all data once an epoch."""
    multiple_data_passes: bool = False
    """Let a run read data more than once; without it a run that would is refused."""
    dataset_resampled: bool = False
    """Draw samples with replacement, each on its own. Best with local data, as every sample is from another shard."""
    val_data: tuple[str, ...] = ()
    """Validation data, named as training data is; NAME=PATH gives a set its name in the results."""
    val_num_samples: int | None = None
    """Tokens of each validation set to use at most (OpenLM's name; it counts tokens). None: all."""
    val_iter_ci: int = 1000
    """Resamples of the validation sequences for the loss's 95 % interval (bootstrap). 0: none."""
    data_key: str = "auto"
    """Extension of the samples in the tars: npy, json, json.gz or txt. auto: the first of these that a shard has."""
    data_cache_gb: float = CACHE_GB
    """What fetched shards may take on this machine's disk, in 10^9 bytes; those longest unused make room."""
    seq_len: int | None = None
    """Tokens that the model reads per sequence. None: the model's own length."""
    workers: int = 1
    """Processes per rank that read ahead; 0 reads in the training process. The order never depends on it."""
    dataset_type: Literal["auto", "webdataset", "synthetic"] = "auto"
    """synthetic: pseudo-random tokens, no files. auto and webdataset: shards."""
    target_mask_left: int | None = None
    """Token id: in each sample everything up to and including the last such token is no target."""
    target_mask_individual: int | None = None
    """Token id that is never a target."""
    squash_mask_left: bool = False
    """With --target-mask-left: take that token itself out of the sequence."""
    reset_state_at_document: bool = False
    """Begin the model's state anew after each document separator: packed documents do not see each other."""
    document_separator: int | None = None
    """Token id that ends a document. None: the one that dataset.json beside the training data names."""


def shards_of(sources: Iterable[str], data_key: str = "auto", cache_gb: float = CACHE_GB) -> list[Shard]:
    """The shards that ``sources`` name (see DataConfig.train_data), in order; tars are opened and counted."""
    shards: list[Shard] = []
    for path in _files(sources):
        if suffix(path) == ".jsonl":
            shards += read_manifest(path)
        elif suffix(path) == ".tar":
            shards.append(Shard(path, len(ShardIndex(path, data_key, cache_gb=cache_gb))))
        else:
            raise UserError(f"{path} is no data: give a {MANIFEST}, its folder, or shards whose names end in .tar.")
    return shards


def _files(sources: Iterable[str]) -> list[str]:
    """Manifests and tars: braces expanded, and a folder replaced by the manifest in it."""
    paths = [path for source in sources for path in expand_braces(local(source, remote=True))]
    return [_manifest_in(path) for path in paths]


def _manifest_in(path: str) -> str:
    if is_remote(path):
        return path if suffix(path) in (".jsonl", ".tar") else within(path, MANIFEST)
    return os.path.join(path, MANIFEST) if os.path.isdir(path) else path


def named(source: str) -> tuple[str, str]:
    """(name, path) of validation data given as NAME=PATH; a path without a name is its own."""
    found = re.fullmatch(r"([\w.-]+)=(.+)", source)
    return (found[1], found[2]) if found and not os.path.exists(source) else (source, source)


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

    ``counts``: int64 (number of shards,), samples per shard. ``len(dataset)``: samples in all. With ``logits`` a sample
    is a row of its tokens and what a teacher said of them (``TeacherLogits.row``).
    """

    def __init__(
        self,
        shards: list[Shard],
        seq_len: int,
        vocab_size: int,
        data_key: str = "auto",
        cache_gb: float = CACHE_GB,
        keep_open: int = OPEN_SHARDS,
        logits: TeacherLogits | None = None,
    ) -> None:
        self.shards, self.seq_len, self.vocab_size, self.data_key = shards, seq_len, vocab_size, data_key
        self.cache_gb, self.keep_open, self.logits = cache_gb, keep_open, logits
        self.row_length = logits.row_length(seq_len) if logits else seq_len + 1
        self.counts = np.array([shard.num_sequences for shard in shards], dtype=np.int64)
        self._open: OrderedDict[int, ShardIndex] = OrderedDict()
        self._ahead = Ahead(cache_gb)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, key: tuple[int, ...]) -> np.ndarray:
        """The sample (shard, sample), or (shard, sample, shard to fetch meanwhile): (row_length,) of an integer dtype.

        Raises:
            UserError: a missing or wrong shard or sample; the message names it.
        """
        shard, sample, *following = key
        index = self.index(shard)
        row = index.read_sequence(sample, self.seq_len, self.vocab_size)
        if self.logits:
            row = self.logits.row(row, index.read_teacher(sample, self.seq_len * self.logits.words))
        if following and following[0] >= 0 and is_remote(self.shards[following[0]].path):
            self._ahead.start(self.shards[following[0]].path, open_paths)
        return row

    def index(self, shard: int) -> ShardIndex:
        """The opened shard; the last few used stay open."""
        if shard not in self._open:
            while len(self._open) >= self.keep_open:  # before the next is fetched, so that its file may make room
                self._open.popitem(last=False)
            path, count = self.shards[shard].path, self.shards[shard].num_sequences
            self._ahead.wait(path)
            self._open[shard] = ShardIndex(path, self.data_key, expected=count, cache_gb=self.cache_gb)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files do not travel to a spawned worker


class SyntheticTokens:
    """Sample ``index`` is pseudo-random tokens, a pure function of (seed, index): int64 (seq_len + 1,)."""

    def __init__(self, seed: int, seq_len: int, vocab_size: int) -> None:
        self.seed, self.seq_len, self.vocab_size = seed, seq_len, vocab_size
        self.row_length = seq_len + 1

    def __getitem__(self, index: int) -> np.ndarray:
        return (random(self.seed, index, 0, self.seq_len + 1) % np.uint64(self.vocab_size)).astype(np.int64)


def order(seed: int, epoch: int, dataset: TokenDataset) -> EpochOrder:
    """The order in which epoch ``epoch`` visits ``dataset``, all of it one source: a pure function of its arguments."""
    return EpochOrder(seed, epoch, dataset.counts)


def count_sequences(cfg: DataConfig) -> int:
    """Training sequences in one epoch, read from the manifests (tars that are named directly are counted).

    With weights an epoch ends where the first source is used up: the most samples that repeat none.

    Raises:
        UserError: no training data is given, a manifest or a tar is missing or wrong, or the weights do not fit.
    """
    training = _training_order(cfg, seed=0)
    return training.schedule.one_pass(training.sizes)


def check_passes(cfg: DataConfig, samples: int) -> None:
    """Refuses a run of ``samples`` sequences that reads a source more than once without being told to.

    Raises:
        UserError: it does; the sentence names the source.
    """
    if cfg.multiple_data_passes or cfg.dataset_resampled or cfg.dataset_type == "synthetic":
        return
    training = _training_order(cfg, seed=0)
    names = _train_sources(cfg) if cfg.train_data_mix_weights else ("the training data",)
    for name, needed, size in zip(names, training.schedule.counts(samples), training.sizes, strict=True):
        if needed > size:
            raise UserError(
                f"this run reads {needed:,} sequences of {name}, which holds {size:,}: lower --train-num-samples or "
                "--epochs, or pass --multiple-data-passes to read it more than once."
            )


def _train_sources(cfg: DataConfig) -> tuple[str, ...]:
    sources = cfg.train_data + cfg.dataset_manifest
    if not sources:
        raise UserError("no training data: give --train-data DIR/manifest.jsonl, or --dataset-type synthetic.")
    return sources


def _train_shards(cfg: DataConfig) -> list[list[Shard]]:
    """The shards of every source of training data."""
    sources = _train_sources(cfg)
    if cfg.train_data_mix_weights is not None:
        check_weights(cfg.train_data_mix_weights, len(sources))
    return [shards_of([source], cfg.data_key, cfg.data_cache_gb) for source in sources]


def _training_order(cfg: DataConfig, seed: int, sources: list[list[Shard]] | None = None) -> Order:
    counts = [[shard.num_sequences for shard in source] for source in sources or _train_shards(cfg)]
    return Order(seed, counts, cfg.train_data_mix_weights, cfg.dataset_resampled)


def _dataset(
    shards: list[Shard],
    cfg: DataConfig,
    seq_len: int,
    vocab_size: int,
    sources: int = 1,
    logits: TeacherLogits | None = None,
) -> TokenDataset:
    keep_open = RESAMPLED_SHARDS if cfg.dataset_resampled else max(OPEN_SHARDS, 2 * sources)
    return TokenDataset(shards, seq_len, vocab_size, cfg.data_key, cfg.data_cache_gb, keep_open, logits)


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
    logits: TeacherLogits | None = None,
) -> Iterator[torch.Tensor]:
    """Rank ``rank``'s rows of every global batch from sample ``samples_seen`` on, without end.

    Global batch k is the samples samples_seen + k * global_batch_size onwards, and rank r holds the r-th of its
    ``world_size`` equal parts, so the batches of all ranks, joined in rank order, do not depend on ``world_size``.

    Yields:
        int64 (global_batch_size // world_size, seq_len + 1); with ``logits`` longer rows, for its ``split``.

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
        sources = _train_shards(cfg)
        shards = [shard for source in sources for shard in source]
        dataset = _dataset(shards, cfg, seq_len, vocab_size, len(sources), logits)
        item = _training_order(cfg, seed, sources).__getitem__
    share = global_batch_size // world_size
    starts = itertools.count(samples_seen + rank * share, global_batch_size)
    return _load(dataset, ([item(i) for i in range(start, start + share)] for start in starts), cfg.workers)


def _val_shards(cfg: DataConfig) -> list[Shard]:
    return shards_of([named(source)[1] for source in cfg.val_data], cfg.data_key, cfg.data_cache_gb)


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
    dataset = _dataset(_val_shards(cfg), cfg, seq_len, vocab_size)
    total = len(dataset)
    if cfg.val_num_samples is not None:
        if cfg.val_num_samples < seq_len:
            raise UserError(
                f"--val-num-samples {cfg.val_num_samples} is less than the {seq_len} tokens of one sequence."
            )
        total = min(total, cfg.val_num_samples // seq_len)
    last = len(dataset.shards) - 1
    in_order = (
        Key(shard, sample, shard + 1 if shard < last else -1)
        for shard, count in enumerate(dataset.counts)
        for sample in range(count)
    )
    pairs = itertools.islice(in_order, total)
    batches = iter(lambda: list(itertools.islice(pairs, global_batch_size)), [])
    return _load(dataset, (batch[rank::world_size] for batch in batches), cfg.workers)


class _Batches:
    """A dataset whose items are whole batches: a list of keys -> int64 tensor (len(keys), row_length)."""

    def __init__(self, dataset: TokenDataset | SyntheticTokens) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: list[Any]) -> torch.Tensor | UserError:
        import torch

        try:
            rows = np.empty((len(keys), self.dataset.row_length), dtype=np.int64)
            for row, key in zip(rows, keys, strict=True):
                row[:] = self.dataset[key]
        except UserError as error:
            return error  # raised by _load: DataLoader would bury the sentence in a worker's traceback
        return torch.from_numpy(rows)


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

    At most CHECKED_SHARDS local shards, evenly spaced, are opened; the others must exist. Of remote shards one a folder
    is fetched.

    Raises:
        UserError: no training data, or data that is missing, disagrees with its manifest or does not fit the model.
    """
    if cfg.workers < 0:
        raise UserError(f"--workers {cfg.workers} is less than 0; 0 reads in the training process.")
    if not cfg.data_cache_gb > 0:
        raise UserError(f"--data-cache-gb {cfg.data_cache_gb} is not above 0.")
    if cfg.val_iter_ci < 0:
        raise UserError(f"--val-iter-ci {cfg.val_iter_ci} is less than 0; 0 makes no interval.")
    sources: tuple[str, ...] = tuple(named(source)[1] for source in cfg.val_data)
    shards = _val_shards(cfg)
    if cfg.dataset_type == "synthetic":
        if cfg.train_data or cfg.dataset_manifest:
            warnings.warn("--dataset-type synthetic: the training data given is not read.", stacklevel=2)
    else:
        sources += _train_sources(cfg)
        shards += [shard for source in _train_shards(cfg) for shard in source]
    for path in _files(sources):
        card = read_dataset_card(path) if suffix(path) == ".jsonl" else None
        if card is not None:
            check_card(card, beside(path, CARD), seq_len, vocab_size)
    near = [shard for shard in shards if not is_remote(shard.path)]
    for shard in near:
        if not os.path.isfile(shard.path):
            raise UserError(f"shard {shard.path} is missing: copy it there, or take it out of its manifest.")
    far = {os.path.dirname(shard.path): shard for shard in shards if is_remote(shard.path)}  # one of each folder
    opened = near[:: 1 + len(near) // CHECKED_SHARDS] + list(far.values())
    dataset = _dataset(opened, cfg, seq_len, vocab_size)
    for number in range(len(opened)):
        dataset[number, 0]


def separator_of(cfg: DataConfig) -> int:
    """The end-of-document token of the training data, from the cards beside its manifests.

    Raises:
        UserError: no card says it, or two disagree.
    """
    paths = [] if cfg.dataset_type == "synthetic" else _files(_train_sources(cfg))
    cards = [read_dataset_card(path) for path in paths if suffix(path) == ".jsonl"]
    found = {card["eod_token_id"] for card in cards if card and isinstance(card.get("eod_token_id"), int)}
    if len(found) != 1:
        raise UserError(
            f"the {CARD} files beside the training data name {len(found) or 'no'} end-of-document tokens: give "
            "--document-separator TOKEN_ID."
        )
    return found.pop()


def manifests_of(cfg: DataConfig) -> list[str]:
    """The manifests of the training data.

    Raises:
        UserError: there is none, or a tar is named directly.
    """
    paths = _files(_train_sources(cfg))
    tars = [path for path in paths if suffix(path) != ".jsonl"]
    if tars:
        raise UserError(f"{tars[0]} is no manifest, which is needed here: give a {MANIFEST}, or its folder.")
    return paths


def teacher_logits_of(cfg: DataConfig) -> TeacherLogits:
    """What the shards of the training data hold of a teacher, from the cards beside the manifests.

    Raises:
        UserError: some hold nothing, or two disagree.
    """
    if cfg.dataset_type == "synthetic":
        raise UserError("--teacher shards: synthetic tokens lie in no shards; give --train-data.")
    found: dict[TeacherLogits, str] = {}
    for path in manifests_of(cfg):
        found.setdefault(TeacherLogits.of_card(read_dataset_card(path), path), path)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(f"{one} and {other} hold logits of different teachers or settings: write both with the same.")
    return next(iter(found))


def check_card(card: dict[str, Any], path: str, seq_len: int, vocab_size: int) -> None:
    """Compares ``dataset.json``, which lies at ``path``, with the model."""
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
