"""The stream: one order, whatever the ranks, the workers and the place of resumption."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_lm_linear.cli import UserError, parse
from open_lm_linear.data import stream
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.shards import write_shard
from open_lm_linear.data.stream import (
    DataConfig,
    TokenDataset,
    check,
    count_sequences,
    expand_braces,
    global_batches,
    order,
    shards_of,
    validation_batches,
)

SEQ_LEN, VOCAB = 4, 200
SIZES = (5, 3, 7, 2, 6)
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of different sizes; the first token of sample n, counted over all, is n."""
    return make(tmp_path_factory.mktemp("data"))


def make(folder: Path, **card: Any) -> Path:
    shards, first = [], 0
    for i, size in enumerate(SIZES):
        path = folder / f"shard-{i:05d}.tar"
        write_shard(path, (np.array([n, i, n, i, n]) for n in range(first, first + size)), first_key=first)
        shards.append(Shard(str(path), size))
        first += size
    write_manifest(
        folder / "manifest.jsonl", shards, {"seq_len": SEQ_LEN, "vocab_size": VOCAB, "tokenizer": "t", **card}
    )
    return folder


def batches(
    cfg: DataConfig, n: int, seen: int = 0, world: int = 1, batch: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    """The first n global batches, the parts of all ranks joined."""
    ranks = [
        global_batches(
            cfg,
            seed=seed,
            samples_seen=seen,
            global_batch_size=batch,
            rank=rank,
            world_size=world,
            seq_len=SEQ_LEN,
            vocab_size=VOCAB,
        )
        for rank in range(world)
    ]
    parts = [list(itertools.islice(rank, n)) for rank in ranks]
    assert all(part.shape == (batch // world, SEQ_LEN + 1) and part.dtype == torch.int64 for part in sum(parts, []))
    return [torch.cat(step) for step in zip(*parts, strict=True)]


def config(data: Path, workers: int = 0, **settings: Any) -> DataConfig:
    return DataConfig(train_data=(str(data / "manifest.jsonl"),), workers=workers, **settings)


def seen_samples(found: list[torch.Tensor]) -> list[int]:
    return torch.cat(found)[:, 0].tolist()


def test_every_sample_once_per_epoch_in_another_order_each(data: Path) -> None:
    samples = seen_samples(batches(config(data), 3 * TOTAL, batch=1))
    epochs = [samples[i * TOTAL : (i + 1) * TOTAL] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(TOTAL))
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert epochs[0] != seen_samples(batches(config(data), TOTAL, batch=1, seed=1))


def test_a_batch_may_span_epochs(data: Path) -> None:
    assert Counter(seen_samples(batches(config(data), 1, batch=2 * TOTAL))) == Counter(2 * list(range(TOTAL)))
    one_by_one = seen_samples(batches(config(data), 2 * TOTAL, batch=1))
    assert seen_samples(batches(config(data), TOTAL, batch=2)) == one_by_one


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_depends_on_neither_workers_nor_world(data: Path, workers: int, world: int) -> None:
    found = batches(config(data, workers), 8, world=world)
    assert torch.equal(torch.stack(found), torch.stack(batches(config(data), 8)))


@pytest.mark.parametrize("seen", [4, 12, 20, 24, 48])
def test_resuming_equals_the_uninterrupted_run(data: Path, seen: int) -> None:
    resumed = batches(config(data, workers=1), 6, seen=seen, world=2)
    assert torch.equal(torch.stack(resumed), torch.stack(batches(config(data), 6 + seen // 4)[seen // 4 :]))


def test_resuming_a_thousand_epochs_later(data: Path) -> None:
    dataset = TokenDataset(shards_of([str(data)]), SEQ_LEN, VOCAB)
    expected = [int(dataset[order(0, 1000, dataset)[i]][0]) for i in range(4, 20)]
    assert seen_samples(batches(config(data), 4, seen=1000 * TOTAL + 4)) == expected


def test_resuming_with_another_batch_size(data: Path) -> None:
    samples = seen_samples(batches(config(data), 60, batch=1))
    assert seen_samples(batches(config(data), 8, seen=7, batch=6, world=3)) == samples[7 : 7 + 48]


def test_the_order_is_the_one_that_checkpoints_rely_on(data: Path) -> None:
    """If this fails, runs begun with earlier versions would resume in another order."""
    dataset = TokenDataset(shards_of([str(data)]), SEQ_LEN, VOCAB)
    assert [order(0, 0, dataset)[i] for i in range(6)] == [(0, 4), (0, 2), (0, 0), (0, 1), (0, 3), (2, 0)]
    assert [order(7, 2, dataset)[i] for i in range(6)] == [(4, 3), (4, 5), (4, 4), (4, 1), (4, 0), (4, 2)]


def test_order_needs_no_files_and_scales() -> None:
    """A corpus of 10^11 tokens: 100,000 shards of 512 samples."""
    dataset = TokenDataset([Shard(f"{i}.tar", 512) for i in range(100_000)], 2048, VOCAB)
    assert len(dataset) == 51_200_000
    epoch = order(0, 3, dataset)
    middle = [epoch[i] for i in range(25_600_000, 25_600_512)]
    assert len({shard for shard, _ in middle}) == 1 and sorted(sample for _, sample in middle) == list(range(512))


def test_the_global_random_state_is_left_alone(data: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(config(data), 2)
    assert torch.equal(torch.rand(3), expected)


def test_only_the_last_shards_stay_open(data: Path) -> None:
    shards = shards_of([str(data)]) * 4
    dataset = TokenDataset(shards, SEQ_LEN, VOCAB)
    for number in range(len(shards)):
        dataset[number, 0]
    assert list(dataset._open) == list(range(len(shards) - stream.OPEN_SHARDS, len(shards)))


def test_datasets_travel_to_spawned_workers_and_files_to_forked_ones(data: Path) -> None:
    dataset = TokenDataset(shards_of([str(data)]), SEQ_LEN, VOCAB)
    first = dataset[2, 1]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[2, 1], first)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(dataset[2, 1], first) and dataset[2, 0][0] == 8 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(dataset[2, 1], first)


def test_synthetic_tokens_are_a_function_of_seed_and_index() -> None:
    cfg = DataConfig(dataset_type="synthetic", workers=0)
    whole = torch.cat(batches(cfg, 6))
    assert torch.equal(torch.cat(batches(cfg, 3, seen=12, world=2)), whole[12:])
    assert not torch.equal(torch.cat(batches(cfg, 6, seed=1)), whole)
    assert int(whole.min()) >= 0 and int(whole.max()) < VOCAB and len(torch.unique(whole)) > 60


def test_sources_may_be_manifests_folders_or_tars(data: Path) -> None:
    shards = shards_of([str(data / "manifest.jsonl")])
    assert shards_of([str(data)]) == shards
    assert shards_of([str(data / "shard-{00000..00004}.tar")]) == shards
    assert [shard.num_sequences for shard in shards] == list(SIZES)
    cfg = DataConfig(train_data=(str(data),), dataset_manifest=(str(data / "manifest.jsonl"),))
    assert count_sequences(cfg) == 2 * TOTAL


def test_braces() -> None:
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def validate(cfg: DataConfig, world: int, batch: int = 4) -> list[list[list[int]]]:
    """rank -> batch -> samples"""
    return [
        [
            rows[:, 0].tolist()
            for rows in validation_batches(
                cfg, global_batch_size=batch, rank=rank, world_size=world, seq_len=SEQ_LEN, vocab_size=VOCAB
            )
        ]
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (3, 1), (4, 0)])
def test_validation_reads_every_sample_once(data: Path, world: int, workers: int) -> None:
    ranks = validate(DataConfig(val_data=(str(data),), workers=workers), world)
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == list(range(TOTAL))
    assert {len(rank) for rank in ranks} == {6}  # 23 samples in batches of 4, for every rank
    if world == 1:
        assert ranks[0][-1] == [20, 21, 22]
    if world == 4:
        assert [rank[-1] for rank in ranks] == [[20], [21], [22], []]


def test_validation_is_bounded_in_tokens(data: Path) -> None:
    assert validate(DataConfig(val_data=(str(data),), val_num_samples=6 * SEQ_LEN + 1, workers=0), 1) == [
        [[0, 1, 2, 3], [4, 5]]
    ]
    assert validate(DataConfig(workers=0), 2) == [[], []]
    with pytest.raises(UserError, match="--val-num-samples 3 is less than the 4 tokens of one sequence"):
        validate(DataConfig(val_data=(str(data),), val_num_samples=3, workers=0), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_workers_stay_one_sentence(tmp_path: Path, workers: int) -> None:
    folder = make(tmp_path)
    (folder / "shard-00003.tar").unlink()
    with pytest.raises(UserError) as caught:
        batches(config(folder, workers), TOTAL, batch=1)
    assert str(caught.value).startswith(f"cannot open shard {folder}/shard-00003.tar")
    assert "\n" not in str(caught.value)


def test_batches_must_divide(data: Path) -> None:
    with pytest.raises(UserError, match="--global-batch-size 4 does not divide over 3 ranks"):
        batches(config(data), 1, world=3)


def test_check_passes_good_data(data: Path, recwarn: pytest.WarningsRecorder) -> None:
    check(config(data, val_data=(str(data),)), SEQ_LEN, VOCAB)
    check(DataConfig(dataset_type="synthetic"), SEQ_LEN, VOCAB)
    check(config(data), SEQ_LEN, VOCAB + 56)  # rows that pad the model's vocabulary
    assert not recwarn.list


def test_check_names_what_is_missing_or_disagrees(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training data: give --train-data"):
        check(DataConfig(), SEQ_LEN, VOCAB)
    with pytest.raises(UserError, match="no manifest at .*nowhere/manifest.jsonl"):
        check(config(tmp_path / "nowhere"), SEQ_LEN, VOCAB)
    with pytest.raises(UserError, match="data.bin is no data: give a manifest.jsonl"):
        check(DataConfig(train_data=("data.bin",)), SEQ_LEN, VOCAB)
    with pytest.raises(UserError, match="--data-cache-gb 0 is not above 0"):
        check(config(tmp_path, data_cache_gb=0), SEQ_LEN, VOCAB)
    with pytest.raises(UserError, match="--val-iter-ci -1 is less than 0"):
        check(config(tmp_path, val_iter_ci=-1), SEQ_LEN, VOCAB)
    with pytest.raises(UserError, match="--workers -1 is less than 0"):
        check(DataConfig(workers=-1), SEQ_LEN, VOCAB)
    folder = make(tmp_path)
    write_shard(folder / "shard-00002.tar", [np.arange(5)] * 3)
    with pytest.raises(UserError, match="shard-00002.tar holds 3 samples and its manifest says 7"):
        check(config(folder), SEQ_LEN, VOCAB)
    write_shard(folder / "shard-00002.tar", [np.arange(5) + VOCAB] * 7)
    with pytest.raises(UserError, match="shard-00002.tar sample 00000000.json has token id 204, outside"):
        check(config(folder), SEQ_LEN, VOCAB)
    (folder / "shard-00002.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shard-00002.tar is an empty file"):
        check(config(folder), SEQ_LEN, VOCAB)
    (folder / "shard-00002.tar").unlink()
    with pytest.raises(UserError, match="shard-00002.tar is missing"):
        check(config(folder), SEQ_LEN, VOCAB)


def test_check_compares_the_data_with_the_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a vocabulary of 200 .t. and the model one of 150: prepare the data"):
        check(config(data), SEQ_LEN, 150)
    with pytest.raises(UserError, match="has a vocabulary of 200 .t. and the model one of 50432: prepare the data"):
        check(config(data), SEQ_LEN, 50432)
    with pytest.raises(UserError, match="has sequences of 4 tokens and the model wants 8: train with --seq-len 4"):
        check(config(data), 8, VOCAB)
    with pytest.raises(UserError, match="the model wants 8"):
        check(DataConfig(dataset_type="synthetic", val_data=(str(data),)), 8, VOCAB)
    with pytest.warns(UserWarning, match="of every 4 tokens only the first 3 are used"):
        check(config(data), 3, VOCAB)
    with pytest.warns(UserWarning, match="the training data given is not read"):
        check(config(tmp_path, dataset_type="synthetic"), SEQ_LEN, VOCAB)


def test_check_opens_a_bounded_number_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path)
    monkeypatch.setattr(stream, "CHECKED_SHARDS", 2)
    (folder / "shard-00001.tar").write_bytes(b"not opened")
    check(config(folder), SEQ_LEN, VOCAB)
    (folder / "shard-00003.tar").write_bytes(b"opened")
    with pytest.raises(UserError, match="shard-00003.tar is not a whole"):
        check(config(folder), SEQ_LEN, VOCAB)


def test_flags_and_help_need_no_torch() -> None:
    cfg = parse(DataConfig, ["--train-data", "a", "b", "--workers", "3"], prog="p", description="d")
    assert cfg == DataConfig(train_data=("a", "b"), workers=3)
    modules = "manifest, shards, stream, prepare, python_docs"
    code = f"import sys; from open_lm_linear.data import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
