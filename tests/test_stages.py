"""Several stages in one run: each a run of its own, on the weights and the data that the one before left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import data, words  # noqa: F401 (data is a fixture)

import open_lm_linear as oll
from open_lm_linear.checkpoint import latest, require_whole
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli, stages_from_cli
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.shards import write_shard
from open_lm_linear.hf.card import history_of
from open_lm_linear.pretrained.loading import tokenizer_source
from open_lm_linear.pretrained.sources import open_source
from open_lm_linear.train import train, train_stages

STAGES = [
    {"stage_name": "first", "train_num_samples": 16 * 8 * 2, "epochs": 1, "lr": 1e-2},
    {"train_num_samples": 16 * 8 * 3, "epochs": 1, "lr": 3e-3, "lr-scheduler": "const"},
]


def command(tmp_path: Path, data: Path, stages: Any, *more: str) -> list[str]:  # noqa: F811
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"stages": stages, "beta1": 0.8}))
    given = words(tmp_path, data, "staged", *more)
    given[given.index("--warmup") + 1] = "1"
    for flag in ("--train-num-samples", "--epochs", "--lr"):  # flags beat every stage, so they stay away
        at = given.index(flag)
        del given[at : at + 2]
    return [*given, "--config", str(tmp_path / "run.yaml")]


def test_each_stage_is_a_run_that_goes_on_where_the_one_before_ended(tmp_path: Path, data: Path) -> None:  # noqa: F811
    stages = stages_from_cli(command(tmp_path, data, STAGES))
    assert [cfg.folder.name for cfg in stages] == ["stage_0_first", "stage_1_1"]
    assert [cfg.optim.lr for cfg in stages] == [1e-2, 3e-3] and {cfg.optim.beta1 for cfg in stages} == {0.8}
    assert stages[1].model.pretrained == str(stages[0].folder) and not stages[1].model.model
    first, second = train_stages(stages)
    assert first.parent == second.parent == tmp_path / "logs" / "staged"
    ends = [require_whole(latest(folder)) for folder in (first, second)]
    assert [end["samples"] for end in ends] == [16, 16 + 24]
    assert [end["step"] for end in ends] == [2, 3]
    # By hand: the second stage alone, from the first's weights, on the samples from the sixteenth on.
    by_hand = command(tmp_path, data, STAGES[1:], "--first-sample", "16", "--pretrained", str(first))
    at = by_hand.index("--model")
    del by_hand[at : at + 2]
    (cfg,) = stages_from_cli([*by_hand, "--name", "by-hand"])
    folder = train(cfg)
    assert folder is not None
    one, other = (load_file(latest(f) / "model.safetensors") for f in (second, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_stages_go_on_after_an_interruption(tmp_path: Path, data: Path) -> None:  # noqa: F811
    stages = stages_from_cli(command(tmp_path, data, STAGES))
    train(stages[0])
    again = stages_from_cli(command(tmp_path, data, STAGES, "--resume", "latest"))
    folders = train_stages(again)
    assert require_whole(latest(folders[1]))["samples"] == 40
    steps = [json.loads(line)["step"] for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]  # the first stage was over, and was not trained again


def test_options_beside_a_preset_stay_through_all_stages(tmp_path: Path, data: Path) -> None:  # noqa: F811
    given = command(tmp_path, data, STAGES, "--output-gate")
    given[given.index("--attn-name") + 1] = "hedgehog"
    folders = train_stages(stages_from_cli(given))
    gates = [
        load_file(latest(folder) / "model.safetensors")["layers.0.attention._totrain_gate.weight"] for folder in folders
    ]
    assert gates[0].any() and not torch.equal(*gates)


def test_the_folder_of_stages_stands_for_the_last(tmp_path: Path, data: Path) -> None:  # noqa: F811
    first, second = train_stages(stages_from_cli(command(tmp_path, data, STAGES)))
    (second / "tokenizer_config.json").write_text("{}")
    (first.parent / "evaluation.json").write_text('{"seconds": {}}')
    model = oll.load_pretrained(first.parent)
    weights = load_file(latest(second) / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.named_parameters())
    assert tokenizer_source(first.parent) == (str(second), {})
    history = history_of(open_source(str(first.parent)))
    assert history.tokens == (16 + 24) * 16 and history.recipe["lr"] == 3e-3
    assert history.evaluation == {"seconds": {}}
    assert history_of(open_source(str(first))).tokens == 16 * 16


def test_a_stage_on_longer_texts_begins_with_their_first_sample(tmp_path: Path, data: Path) -> None:  # noqa: F811
    """A long-context stage: its own data and sequence length, the weights of the stage before, resumable."""
    rows = (np.arange(4)[:, None] + 3 * np.arange(49)) % 64
    write_shard(tmp_path / "long.tar", rows)
    card = {"vocab_size": 64, "seq_len": 48, "tokenizer": "toy"}
    write_manifest(tmp_path / "long.jsonl", [Shard(str(tmp_path / "long.tar"), 4)], card)
    long = {"stage_name": "long", "train_num_samples": 48 * 4, "epochs": 1, "lr": 1e-3, "seq_len": 48}
    long |= {"train_data": str(tmp_path / "long.jsonl"), "global_batch_size": 2}
    given = command(tmp_path, data, [STAGES[0], long], "--resume", "latest")
    for flag in ("--train-data", "--global-batch-size"):  # flags beat the file
        at = given.index(flag)
        del given[at : at + 2]
    file = yaml.safe_load((tmp_path / "run.yaml").read_text())
    file["stages"][0] |= {"train_data": str(data), "global_batch_size": 8}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    first, second = train_stages(stages_from_cli(given))
    assert require_whole(latest(first))["samples"] == 16
    end = require_whole(latest(second))
    assert (end["samples"], end["step"], end["tokens"]) == (4, 2, 2 * 2 * 48)
    taken = [json.loads(line) for line in (second / "samples.jsonl").read_text().splitlines()]
    assert [row["first_sample"] for row in taken] == [0, 2]
    assert train_stages(stages_from_cli(given)) == [first, second]  # nothing is left to do


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({"lr": 1}, "stages must be a list of mappings"),
        ([], "stages must be a list of mappings"),
        ([3], "stages must be a list of mappings"),
        ([{"lrr": 1e-3}], "unknown config key 'lrr'. Did you mean 'lr'?"),
    ],
)
def test_stages_that_are_none_are_refused(stages: Any, sentence: str, tmp_path: Path, data: Path) -> None:  # noqa: F811
    with pytest.raises(UserError) as error:
        stages_from_cli(command(tmp_path, data, stages))
    assert sentence in str(error.value)


def test_one_configuration_is_asked_for_where_there_are_two(tmp_path: Path, data: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="has several stages"):
        from_cli(command(tmp_path, data, STAGES))
    with pytest.raises(UserError, match="--first-sample must be 0 or more"):
        from_cli([*words(tmp_path, data, "x"), "--first-sample", "-1"])
