"""The shuffle on disk: every sequence once, in an order that is fixed by the seed and looks like chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from open_lm_linear.data import shuffle
from open_lm_linear.data.shuffle import (
    RunFile,
    RunWriter,
    bucket_count,
    missing_shards,
    record_type,
    shard_ranks,
    shuffled,
    token_type,
)

LENGTH = 4
SIZES = (100, 0, 1, 57)  # sequences per piece


def write(folder: Path, buckets: int, tokens: np.dtype, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> list[Path]:
    """Sequences that say (piece, number, 7, 65535), and a rest."""
    paths = []
    for piece, size in enumerate(sizes):
        rows = np.array([[piece, number, 7, 65535] for number in range(size)], dtype=tokens).reshape(size, LENGTH)
        writer = RunWriter(folder / f"{buckets}-{piece}", LENGTH - 1, tokens, (seed, piece), buckets)
        for i in range(0, size, 9):
            writer.add(rows[i : i + 9])
        writer.close(np.arange(piece, dtype=tokens))
        paths.append(writer.path)
    return paths


def ranks_of(paths: list[Path], record: np.dtype) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sum(RunFile(path, record).counts() for path in paths))])


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("run_bytes", [1, 200, 10**6])
@pytest.mark.parametrize("buckets", [2, 16, 1024])
def test_the_order_is_that_of_the_keys_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: int, run_bytes: int, vocab_size: int
) -> None:
    tokens = token_type(vocab_size)
    record = record_type(LENGTH - 1, tokens)
    monkeypatch.setattr(shuffle, "RUN_BYTES", run_bytes)
    paths = write(tmp_path, buckets, tokens)
    starts = ranks_of(paths, record)
    total = sum(SIZES)
    found = [row.tolist() for row in shuffled(paths, record, starts, 0, total)]
    keys = {
        (piece, number): key
        for piece, size in enumerate(SIZES)
        for number, key in enumerate(np.random.Philox(key=[0, piece]).random_raw(size).tolist())
    }
    assert [tuple(row[:2]) for row in found] == sorted(keys, key=lambda name: keys[name])
    assert all(row[2:] == [7, 65535] for row in found)
    assert [RunFile(path, record).rest().tolist() for path in paths] == [[], [0], [0, 1], [0, 1, 2]]
    for first, last in ((0, 1), (5, 5), (30, 99), (total - 1, total)):
        assert [row.tolist() for row in shuffled(paths, record, starts, first, last)] == found[first:last]


def test_seeds_and_pieces_have_orders_of_their_own(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 1, -1):
        (tmp_path / str(seed)).mkdir()
        paths = write(tmp_path / str(seed), 4, token_type(300), seed, (500, 500))
        record = record_type(LENGTH - 1, token_type(300))
        orders.append([row[:2].tolist() for row in shuffled(paths, record, ranks_of(paths, record), 0, 1000)])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    pieces = np.array(orders[0])[:, 0]
    assert 400 < pieces[:500].sum() * 2 < 600  # the pieces are mixed evenly
    numbers = np.array([number for piece, number in orders[0] if piece == 0])
    assert abs(np.corrcoef(numbers, np.arange(500))[0, 1]) < 0.15


def test_a_file_that_is_not_whole_has_not_its_name(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "a", LENGTH - 1, token_type(300), (0, 0), 2)
    writer.add(np.zeros((3, LENGTH), dtype=np.uint16))
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("total", "per_shard", "number"), [(0, 5, 0), (1, 5, 1), (3, 5, 3), (20, 5, 4), (21, 5, 5), (1000, 7, 143)]
)
def test_shards_are_equal_within_one_sequence(total: int, per_shard: int, number: int) -> None:
    sizes = np.diff(shard_ranks(total, per_shard, fewest=4))
    assert len(sizes) == number and sizes.sum() == total
    assert not number or (sizes.max() - sizes.min() <= 1 and sizes.min() >= 1 and sizes.max() <= per_shard)


def test_only_spans_with_missing_shards_are_written(tmp_path: Path) -> None:
    assert missing_shards(tmp_path, 5, 2) == [(0, 2), (2, 4), (4, 5)]
    for number in (0, 1, 2):
        shuffle.shard_path(tmp_path, number).touch()
    (tmp_path / "shard-00004.tar.tmp").touch()
    assert missing_shards(tmp_path, 5, 2) == [(2, 4), (4, 5)]


@pytest.mark.parametrize(("vocab_size", "bytes_"), [(256, 2), (2**16, 2), (2**16 + 1, 4), (200_000, 4)])
def test_tokens_take_the_least_bytes(vocab_size: int, bytes_: int) -> None:
    assert token_type(vocab_size).itemsize == bytes_


@pytest.mark.parametrize(
    ("work", "low", "high"), [(0, 2, 2), (10**9, 8, 16), (4 * 10**11, 2048, 8192), (10**14, 2**14, 2**14)]
)
def test_buckets_are_a_power_of_two_and_fit_in_memory(work: int, low: int, high: int) -> None:
    count = bucket_count(work, token_type(300))
    assert low <= count <= high and count & (count - 1) == 0
