"""Mixing: proportions, passes and draws that any place of resumption finds again at once."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_lm_linear.cli import UserError, parse
from open_lm_linear.config import from_cli, read_run_config, write_run_config
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.order import Order, Schedule
from open_lm_linear.data.shards import write_shard
from open_lm_linear.data.stream import DataConfig, check, check_passes, count_sequences, global_batches

SEQ_LEN, VOCAB = 3, 1000
SIZES = {"a": (5, 4, 3), "b": (6, 2), "c": (7,)}  # sequences of each shard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources; the first token of a sample is its number within its source plus 100 times the source's."""
    folder = tmp_path_factory.mktemp("data")
    for source, (name, sizes) in enumerate(SIZES.items()):
        (folder / name).mkdir()
        shards, first = [], 100 * source
        for i, size in enumerate(sizes):
            path = folder / name / f"shard-{i}.tar"
            rows = (np.full(SEQ_LEN + 1, n) for n in range(first, first + size))
            write_shard(path, rows, vocab_size=VOCAB)
            shards.append(Shard(str(path), size))
            first += size
        write_manifest(folder / name / "manifest.jsonl", shards, {"seq_len": SEQ_LEN, "vocab_size": VOCAB})
    return folder


def config(data: Path, weights: tuple[float, ...] | None = (0.5, 0.3, 0.2), **settings: Any) -> DataConfig:
    paths = (str(data / "a" / "manifest.jsonl"), str(data / "b"), str(data / "c" / "shard-{0..0}.tar"))
    return DataConfig(train_data=paths, train_data_mix_weights=weights, **{"workers": 0, **settings})


def samples(cfg: DataConfig, n: int, seen: int = 0, batch: int = 1, world: int = 1, seed: int = 0) -> list[int]:
    """The first tokens of the first n global batches after ``seen`` samples."""
    shared = {"seed": seed, "samples_seen": seen, "global_batch_size": batch, "world_size": world}
    ranks = [
        global_batches(cfg, rank=rank, seq_len=SEQ_LEN, vocab_size=VOCAB, **shared)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    steps = zip(*(itertools.islice(rank, n) for rank in ranks), strict=True)
    return torch.cat([torch.cat(step)[:, 0] for step in steps]).tolist()


WEIGHTS = [(1.0,), (0.5, 0.5), (3, 1), (0.5, 0.3, 0.2), (1, 1e-3, 7), (0.1,) * 10, (0.7, 0.1234567, 0.002)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_schedule_counts_what_it_gives(weights: tuple[float, ...]) -> None:
    schedule = Schedule(weights)
    given = [0] * len(weights)
    for i in range(3000):
        assert schedule.counts(i) == given
        source, before = schedule[i]
        assert before == given[source]
        given[source] += 1
        share = np.array(weights) / sum(weights) * (i + 1)
        assert np.abs(np.array(given) - share).max() <= len(weights)


@pytest.mark.parametrize("index", [10**9, 10**12 + 7])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_schedule_is_exact_and_fast_far_on(weights: tuple[float, ...], index: int) -> None:
    schedule = Schedule(weights)
    counts = schedule.counts(index)
    began = time.perf_counter()
    for i in range(index, index + 300):
        source, before = schedule[i]
        assert before == counts[source]
        counts[source] += 1
    assert time.perf_counter() - began < 2
    share = np.array(weights) / sum(weights) * (index + 300)
    assert np.abs(np.array(counts) - share).max() <= len(weights) + 1


@pytest.mark.parametrize(("weights", "sizes"), [((0.5, 0.3, 0.2), (12, 8, 7)), ((3, 1), (10, 10)), ((1,), (9,))])
def test_one_pass_is_the_most_that_repeats_nothing(weights: tuple[float, ...], sizes: tuple[int, ...]) -> None:
    schedule = Schedule(weights)
    n = schedule.one_pass(sizes)
    assert all(count <= size for count, size in zip(schedule.counts(n), sizes, strict=True))
    assert any(count > size for count, size in zip(schedule.counts(n + 1), sizes, strict=True))


def test_each_source_is_read_without_repeats_until_its_pass_is_over(data: Path) -> None:
    found = samples(config(data), 240)
    for source, (sizes, share) in enumerate(zip(SIZES.values(), (0.5, 0.3, 0.2), strict=True)):
        size, mine = sum(sizes), [s - 100 * source for s in found if s // 100 == source]
        assert abs(len(mine) - share * 240) <= 3
        passes = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(passes) > 2 and all(sorted(p) == list(range(size)) for p in passes)
        assert passes[0] != passes[1] and passes[0] != sorted(passes[0])
    assert samples(config(data), 50, seed=1) != found[:50]
    assert Counter(s // 100 for s in found[100:110]) == {0: 5, 1: 3, 2: 2}  # every batch is mixed, not only the whole


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize(("seen", "batch", "world", "workers"), [(7, 4, 2, 0), (40, 6, 3, 1), (113, 2, 1, 2)])
def test_a_mix_resumes_anywhere(data: Path, resampled: bool, seen: int, batch: int, world: int, workers: int) -> None:
    whole = samples(config(data, dataset_resampled=resampled), seen + 24)
    cfg = config(data, dataset_resampled=resampled, workers=workers)
    assert samples(cfg, 24 // batch, seen, batch, world) == whole[seen:]


@pytest.mark.parametrize("resampled", [False, True])
def test_resuming_far_on_costs_nothing(data: Path, resampled: bool) -> None:
    cfg = config(data, dataset_resampled=resampled)
    began = time.perf_counter()
    found = samples(cfg, 20, seen=10**9, batch=2)
    assert time.perf_counter() - began < 5
    assert found == [samples(cfg, 1, seen=10**9 + i)[0] for i in range(40)]
    assert Counter(s // 100 for s in found) == {0: 20, 1: 12, 2: 8}


def test_a_heavy_weight_on_the_same_data_twice_is_two_orders(data: Path) -> None:
    path = str(data / "a")
    cfg = DataConfig(train_data=(path, path), train_data_mix_weights=(1, 1), workers=0)
    found = samples(cfg, 24)
    assert sorted(found) == sorted(2 * list(range(12)))
    assert found[0::2] != found[1::2]


def test_draws_are_even_and_repeat(data: Path) -> None:
    order = Order(0, list(SIZES.values()), None, resampled=True)
    found = Counter(order[i][:2] for i in range(13_500))
    every = [(s, n) for s, size in enumerate(itertools.chain(*SIZES.values())) for n in range(size)]
    assert set(found) == set(every)
    assert max(found.values()) < 640 and min(found.values()) > 380  # 500 each, standard deviation 22
    assert len({order[i] for i in range(27)}) < 27
    assert [order[i] for i in range(9)] != [Order(1, list(SIZES.values()), None, True)[i] for i in range(9)]


def test_the_next_shard_is_known_beforehand(data: Path) -> None:
    order = Order(0, list(SIZES.values()), (0.5, 0.3, 0.2))
    keys = [order[i] for i in range(300)]
    for source, shards in enumerate(({0, 1, 2}, {3, 4}, {5})):
        mine = [key for key in keys if key.shard in shards]
        changes = [(a, b) for a, b in itertools.pairwise(mine) if a.shard != b.shard]
        assert all(a.following == b.shard for a, b in changes), source
        assert changes or source == 2


def test_an_epoch_ends_where_the_first_source_is_used_up(data: Path) -> None:
    assert count_sequences(config(data, None)) == 27
    assert count_sequences(config(data)) == 25  # of 12, 8 and 7 sequences: the 13th of a is the 26th in all
    n = count_sequences(config(data, (1, 1, 8)))
    assert n == 7  # an eighth would be of c again, which has 7
    counts = Counter(s // 100 for s in samples(config(data, (1, 1, 8)), n))
    assert counts[2] == 7


def test_a_second_pass_must_be_asked_for(data: Path) -> None:
    check_passes(config(data, None), 27)
    check_passes(config(data), 25)
    with pytest.raises(UserError, match="this run reads 28 sequences of the training data, which holds 27: lower"):
        check_passes(config(data, None), 28)
    with pytest.raises(
        UserError, match=r"reads 13 sequences of .*/a/manifest.jsonl, which holds 12: lower --train-num"
    ):
        check_passes(config(data), 26)
    with pytest.raises(UserError, match=r"reads 8 sequences of .*shard-\{0..0\}.tar, which holds 7"):
        check_passes(config(data, (1, 1, 8)), 9)
    check_passes(config(data, multiple_data_passes=True), 10**9)
    check_passes(config(data, dataset_resampled=True), 10**9)
    check_passes(DataConfig(dataset_type="synthetic"), 10**9)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2), "has 2 weights for 3 sources of training data"),
        ((1, 2, 0), "--train-data-mix-weights 0 is not above 0: leave that source out"),
        ((1, -2, 1), "-2 is not above 0"),
        ((1, float("nan"), 1), "nan is not above 0"),
        ((1, float("inf"), 1), "inf is not above 0"),
    ],
)
def test_wrong_weights_are_named(data: Path, weights: tuple[float, ...], message: str) -> None:
    for use in (count_sequences, lambda cfg: check(cfg, SEQ_LEN, VOCAB)):
        with pytest.raises(UserError, match=message):
            use(config(data, weights))


def test_weights_come_by_flag_and_by_file(tmp_path: Path) -> None:
    words = ["--train-data", "x", "y", "--train-data-mix-weights", "0.25", "3", "--dataset-resampled"]
    assert parse(DataConfig, words, prog="p", description="d").train_data_mix_weights == (0.25, 3.0)
    cfg = from_cli(["--model", "linear_tiny", *words])
    write_run_config(cfg, tmp_path)
    assert read_run_config(tmp_path) == cfg and cfg.data.dataset_resampled
    (tmp_path / "config.yaml").write_text("train_data_mix_weights: [1, heavy]")
    with pytest.raises(UserError, match="'train_data_mix_weights' must be of type float, not 'heavy'"):
        read_run_config(tmp_path)
