"""What a checkpoint folder holds, who can read it, when it is written, how long it is kept, and its copy elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from test_train import data, make_data, rows, run, weights, words

from open_lm_linear import checkpoint, convert, pretrained
from open_lm_linear.checkpoint import CheckpointConfig, checkpoints, latest, open_part, require_readable, superseded
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.pretrained.places import LocalPlace
from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter
from open_lm_linear.pretrained.shards import ShardsReader

__all__ = ["data"]  # a fixture


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- what is in it -------------------------------------------------------------------------------------------------


def test_one_process_writes_plain_files(tmp_path: Path, data: Path) -> None:
    folder = latest(run(tmp_path, data, "plain"))
    files = {"model.safetensors", "optimizer.safetensors", "random-rank00000.safetensors", "model.json"}
    assert {p.name for p in folder.iterdir()} == files | {"state.json"}
    record = require_readable(folder)
    assert set(record["files"]) == files and record["config"]["lr"] == 1e-2
    assert (record["step"], record["samples"], record["tokens"], record["skipped"]) == (6, 48, 768, [])
    assert equal(load_file(folder / "model.safetensors"), weights(folder.parent.parent))


def test_a_checkpoint_of_the_old_kind_is_resumed(tmp_path: Path, data: Path) -> None:
    whole = run(tmp_path, data, "whole", "--epochs", "4")
    part = tmp_path / "logs" / "part"
    shutil.copytree(whole, part)
    for folder in checkpoints(part)[2:]:
        shutil.rmtree(folder)
    old = checkpoints(part)[1]  # as it was written before there were ranks' files, skipped samples and random states
    (old / "random-rank00000.safetensors").unlink()
    record = json.loads((old / "state.json").read_text())
    kept = {k: record[k] for k in ("step", "samples", "tokens", "seconds", "config")}
    files = {k: v for k, v in record["files"].items() if not k.startswith("random")}
    (old / "state.json").write_text(json.dumps({**kept, "files": files}))
    run(tmp_path, data, "part", "--epochs", "4", "--resume", "latest")
    for kind in ("model", "optimizer"):
        assert equal(weights(part, kind), weights(whole, kind))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A run of two ranks under FSDP, and one of three, resumed from it."""
    tmp_path = tmp_path_factory.mktemp("sharded")
    manifest = make_data(tmp_path)
    more = ["--fsdp", "--global-batch-size", "12", "--resume", "latest"]
    assert ranks.run(2, words(tmp_path, manifest, "run", *more)) == [0, 0], ranks.text()
    assert ranks.run(3, words(tmp_path, manifest, "run", *more, "--epochs", "3")) == [0, 0, 0], ranks.text()
    return tmp_path / "logs" / "run"


def test_each_rank_writes_its_own_shards(sharded: Path) -> None:
    two, three = checkpoints(sharded)[0], checkpoints(sharded)[-1]
    for folder, world in ((two, 2), (three, 3)):
        for part in ("model", "optimizer"):
            files = sorted(p.name for p in folder.glob(f"{part}-*.safetensors"))
            assert files == [f"{part}-rank{r:05d}.safetensors" for r in range(world)]
            tensors = weights_of(folder, part)
            total = sum(t.nbytes for t in tensors.values())
            stored = [sum(t.nbytes for t in load_file(folder / file).values()) for file in files]
            assert sum(stored) == total  # nothing is written twice
            assert max(stored) < 1.2 * total / world  # 32 rows do not divide by 3
        index = json.loads((folder / "shards.json").read_text())
        assert index["world_size"] == world
        pieces = index["model"]["layers.0.feed_forward.w12.weight"]["pieces"]
        assert len(pieces) == world and pieces[1]["offset"][0] == pieces[0]["shape"][0]


def weights_of(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    reader = open_part(folder, part)
    return {name: reader.read(name) for name in reader.names()}


def test_a_sharded_checkpoint_is_read_everywhere(tmp_path: Path, sharded: Path, monkeypatch) -> None:
    expected = weights_of(latest(sharded))
    model = pretrained.load_pretrained(sharded)
    assert equal({k: v.detach() for k, v in model.named_parameters()}, expected)
    monkeypatch.setattr(sys, "argv", ["convert", str(sharded), str(tmp_path / "one")])
    convert.main()
    assert equal(load_file(tmp_path / "one" / "model.safetensors"), expected)


def test_rows_of_a_sharded_tensor(sharded: Path) -> None:
    reader = open_part(latest(sharded), "model")
    name = "tok_embeddings.weight"
    whole = reader.read(name)
    assert torch.equal(reader.read(name, 20, 50), whole[20:50])
    assert reader.read(name, 5, 5).shape == (0, 32)
    before = reader.bytes_read
    reader.read(name, 60, 64)
    assert reader.bytes_read - before == 4 * 32 * 4


def test_an_index_that_lies_is_refused(tmp_path: Path, sharded: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(latest(sharded), folder)
    index = json.loads((folder / "shards.json").read_text())
    name = "tok_embeddings.weight"
    lies = {
        "do not make up its shape": lambda e: e["pieces"].pop(),
        "is not what it says": lambda e: e["pieces"][0]["shape"].__setitem__(0, 5),
        "not an index of shards": lambda e: e.pop("shape"),
    }
    for sentence, lie in lies.items():
        changed = json.loads(json.dumps(index))
        lie(changed["model"][name])
        (folder / "shards.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=sentence):
            ShardsReader(LocalPlace(folder))


def test_random_states_come_back(tmp_path: Path, data: Path) -> None:
    folder = latest(run(tmp_path, data, "random"))
    expected = torch.get_rng_state()
    torch.manual_seed(123)
    run(tmp_path, data, "random", "--epochs", "3", "--resume", "latest")
    assert torch.equal(load_file(folder / "random-rank00000.safetensors")["cpu"], expected)
    assert torch.equal(torch.get_rng_state(), expected)  # nothing in training draws from it


# ---- when it is written --------------------------------------------------------------------------------------------


def test_training_goes_on_while_it_is_written(tmp_path: Path, data: Path, monkeypatch) -> None:
    write, seen = SafetensorsWriter.write, []

    def slow(self: SafetensorsWriter, name: str, value: torch.Tensor) -> None:
        end = time.monotonic() + 10
        while not seen and len(rows(tmp_path / "logs" / "slow", "samples.jsonl")) < 4 and time.monotonic() < end:
            time.sleep(0.005)
        seen.append(len(rows(tmp_path / "logs" / "slow", "samples.jsonl")))
        write(self, name, value)

    whole = run(tmp_path, data, "whole")
    monkeypatch.setattr(SafetensorsWriter, "write", slow)
    folder = run(tmp_path, data, "slow")
    assert seen[0] >= 4  # the first tensor of step 3's checkpoint waited for step 4
    for one, two in zip(checkpoints(whole), checkpoints(folder), strict=True):
        assert equal(weights_of(one), weights_of(two)) and require_readable(two)


def test_saving_by_steps_and_by_the_clock(tmp_path: Path, data: Path) -> None:
    steps = [p.name for p in checkpoints(run(tmp_path, data, "steps", "--save-every-steps", "2"))]
    assert [int(name[5:]) for name in steps] == [2, 3, 4, 6]
    clock = run(tmp_path, data, "clock", "--save-every-minutes", "1e-6", "--save-frequency", "9")
    assert [int(p.name[5:]) for p in checkpoints(clock)] == [1, 2, 3, 4, 5, 6]


# ---- how long it is kept -------------------------------------------------------------------------------------------


def test_retention(tmp_path: Path, data: Path) -> None:
    more = ["--save-every-steps", "1", "--epochs", "3", "--keep-last", "2", "--keep-every", "4"]
    folder = run(tmp_path, data, "kept", *more)
    assert [int(p.name[5:]) for p in checkpoints(folder)] == [4, 8, 9]
    for path in checkpoints(folder):
        require_readable(path)


def test_what_may_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        checkpoint.folder_of(tmp_path, step).mkdir(parents=True)

    def gone(*args: int) -> list[int]:
        return [int(p.name[5:]) for p in superseded(tmp_path, *args)]

    assert gone(4, 0, 0) == []
    assert gone(4, 1, 0) == [1, 2, 3]  # step 9 is later: of a run that was taken up again at 3, and never counted
    assert gone(4, 2, 2) == [1]
    assert gone(9, 1, 3) == [1, 2, 4]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"keep_last": -1}, "--keep-last must be 0 or more"),
        ({"max_skipped_steps": 0}, "--max-skipped-steps must be at least 1"),
        ({"delete_previous_checkpoint": True, "keep_last": 3}, "is --keep-last 1"),
    ],
)
def test_numbers_that_mean_nothing(values: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CheckpointConfig(**values).check()


# ---- its copy elsewhere --------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_remote_copy(tmp_path: Path, data: Path, capsys) -> None:
    whole = run(tmp_path, data, "whole", "--epochs", "3")
    more = [
        "--remote-sync",
        f"file://{tmp_path}/bucket/runs",
        "--epochs",
        "3",
        "--resume",
        "latest",
        "--keep-last",
        "1",
    ]
    folder = run(tmp_path, data, "away", *more)
    there = tmp_path / "bucket" / "runs" / "away"
    assert [p.name for p in checkpoints(folder)] == ["step_00000009"]
    assert [p.name for p in checkpoints(there)] == ["step_00000003", "step_00000006", "step_00000009"]
    assert equal(weights_of(checkpoints(there)[1]), weights_of(checkpoints(whole)[1]))
    shutil.rmtree(folder)  # the machine is gone, and the last upload was cut
    (checkpoints(there)[-1] / "state.json").unlink()
    capsys.readouterr()
    assert run(tmp_path, data, "away", *more) == folder
    said = capsys.readouterr().out
    assert "warning: passed over" in said and "fetching" in said and "step 6, 48 samples seen" in said
    assert equal(weights_of(latest(folder)), weights_of(latest(whole)))
    assert rows(folder, "samples.jsonl") == rows(whole, "samples.jsonl")
    require_readable(checkpoints(there)[-1])


def test_a_remote_that_takes_nothing_costs_no_training(tmp_path: Path, data: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    folder = run(tmp_path, data, "alone", "--remote-sync", f"file://{tmp_path}/file")
    assert "is not copied to" in capsys.readouterr().out
    assert len(checkpoints(folder)) == 2


def test_a_protocol_that_is_not_there(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="--remote-sync nowhere://x cannot be opened"):
        run(tmp_path, data, "nowhere", "--remote-sync", "nowhere://x")


def test_the_flags_are_flags(tmp_path: Path, data: Path) -> None:
    cfg = from_cli(words(tmp_path, data, "x", "--save-every-minutes", "30", "--keep-last", "3", "--max-rollbacks", "5"))
    assert (cfg.checkpoint.save_every_minutes, cfg.checkpoint.kept, cfg.checkpoint.max_rollbacks) == (30.0, 3, 5)
