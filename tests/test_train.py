"""The trainer: updates that do not depend on how a batch is cut, exact resume, ranks, logs, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative
from ranks import Ranks

from open_lm_linear import optim, pretrained
from open_lm_linear.checkpoint import checkpoints, latest, open_part, require_whole
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.shards import write_shard
from open_lm_linear.ops import products
from open_lm_linear.optim import OptimConfig, schedule
from open_lm_linear.train import train

MODEL = {
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_heads_kv": 2,
    "seq_len": 16,
    "vocab_size": 64,
    "model_norm": "rms_norm",
    "weight_tying": True,
    "intermediate_dim_ffn": 48,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path)


def make_data(tmp_path: Path) -> Path:
    """Three shards of 16 sequences of a language in which each token follows from the one before."""
    rng = np.random.default_rng(0)
    shards = []
    for i in range(3):
        start = rng.integers(0, 64, (16, 1))
        rows = (start + 3 * np.arange(17)) % 64
        path = tmp_path / "data" / f"shard-{i:05d}.tar"
        path.parent.mkdir(exist_ok=True)
        write_shard(path, rows)
        shards.append(Shard(str(path), 16))
    card = {"vocab_size": 64, "seq_len": 16, "tokenizer": "toy"}
    write_manifest(tmp_path / "data" / "manifest.jsonl", shards, card)
    return tmp_path / "data" / "manifest.jsonl"


def words(tmp_path: Path, data: Path, name: str, *more: str) -> list[str]:
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MODEL))
    return [
        *("--model", str(model), "--attn-name", "linear", "--train-data", str(data), "--logs", str(tmp_path / "logs")),
        *("--name", name, "--precision", "fp32", "--device", "cpu", "--workers", "0", "--global-batch-size", "8"),
        *("--train-num-samples", str(16 * 8 * 3), "--epochs", "2", "--warmup", "2", "--lr", "1e-2", "--wd", "0.1"),
        *("--grad-clip-norm", "1.0", "--z-loss-coefficient", "1e-4", "--log-every-n-steps", "1"),
        *("--multiple-data-passes", *more),
    ]


def run(tmp_path: Path, data: Path, name: str, *more: str) -> Path:
    folder = train(from_cli(words(tmp_path, data, name, *more)))
    assert folder is not None
    return folder


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    reader = open_part(latest(folder), part)
    return {name: reader.read(name) for name in reader.names()}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max(relative(a[k], b[k]) for k in a)


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def test_the_loss_falls_and_everything_is_written(tmp_path: Path, data: Path) -> None:
    folder = run(tmp_path, data, "a", "--val-data", str(data), "--epochs", "8", "--report-to", "tensorboard")
    logged, results = rows(folder, "metrics.jsonl"), rows(folder, "results.jsonl")
    assert [r["step"] for r in logged] == list(range(1, 25))
    assert logged[-1]["tokens"] == 24 * 8 * 16
    assert results[0]["step"] == 0 and results[-1]["step"] == 24
    assert results[-1]["loss"] < 0.8 * results[0]["loss"]
    assert results[-1]["counted"] == 48 * 16
    assert results[0]["perplexity"] == pytest.approx(np.exp(results[0]["loss"]))
    assert logged[0]["lr"] == pytest.approx(5e-3) and logged[1]["lr"] == pytest.approx(1e-2)
    assert {"grad_norm", "tokens_per_s", "data_share", "memory_bytes", "seconds_left"} <= set(logged[0])
    assert any((folder / "tensorboard").iterdir())
    assert "parameters:" in (folder / "out.log").read_text()
    assert len(checkpoints(folder)) == 8


def test_the_update_does_not_depend_on_accumulation(tmp_path: Path, data: Path) -> None:
    whole = weights(run(tmp_path, data, "1x8"))
    for pieces in ("2", "4", "8"):
        assert worst(weights(run(tmp_path, data, f"x{pieces}", "--accum-freq", pieces)), whole) < 1e-5


def test_the_update_does_not_depend_on_accumulation_with_masks_and_documents(tmp_path: Path, data: Path) -> None:
    """Pieces then hold different numbers of targets."""
    more = ["--target-mask-left", "5", "--target-mask-individual", "40", "--squash-mask-left"]
    more += ["--reset-state-at-document", "--document-separator", "17"]
    whole = run(tmp_path, data, "1x8", *more)
    for pieces in ("2", "8"):
        assert worst(weights(run(tmp_path, data, f"x{pieces}", "--accum-freq", pieces, *more)), weights(whole)) < 1e-5
    assert worst(weights(run(tmp_path, data, "plain")), weights(whole)) > 1e-3
    last = rows(whole, "metrics.jsonl")[-1]
    assert 0 < last["tokens"] < 6 * 8 * 16  # targets alone are counted


def test_the_separator_of_the_data_is_kept_with_the_run(tmp_path: Path, data: Path) -> None:
    card = data.parent / "dataset.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "eod_token_id": 17}))
    folder = run(tmp_path, data, "card", "--reset-state-at-document")
    given = run(tmp_path, data, "given", "--reset-state-at-document", "--document-separator", "17")
    assert "document_separator: 17" in (folder / "config.yaml").read_text()
    assert worst(weights(folder), weights(given)) == 0


def test_each_validation_set_has_its_row_and_interval(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "a.tar", np.random.default_rng(1).integers(0, 64, (20, 17)), vocab_size=64)
    sets = ["--val-data", f"toy={data}", str(other / "a.tar"), "--val-iter-ci", "200"]
    folder = run(tmp_path, data, "val", *sets)
    results = rows(folder, "results.jsonl")
    assert [(r["step"], r["val_data"]) for r in results] == [
        (step, name) for step in (0, 3, 6) for name in ("toy", str(other / "a.tar"))
    ]
    for row in results:
        assert row["loss_ci_low"] < row["loss"] < row["loss_ci_high"]
        width = (row["loss_ci_high"] - row["loss_ci_low"]) / 2
        assert width == pytest.approx(1.96 * row["standard_error"], rel=0.35)
    assert results[-2]["loss"] < results[-1]["loss"] and results[-1]["sequences"] == 20
    again = rows(run(tmp_path, data, "again", *sets, "--accum-freq", "2"), "results.jsonl")[0]
    ends = ("loss_ci_low", "loss_ci_high", "standard_error")
    assert [again[k] for k in ends] == pytest.approx([results[0][k] for k in ends])
    masked = rows(run(tmp_path, data, "masked", *sets, "--target-mask-individual", "3"), "results.jsonl")[1]
    assert 20 * 16 * 0.9 < masked["counted"] < 20 * 16 and masked["loss_ci_low"] < masked["loss"]
    without = rows(run(tmp_path, data, "none", *sets, "--val-iter-ci", "0"), "results.jsonl")[0]
    assert without["loss_ci_low"] is without["loss_ci_high"] is None


def test_a_mix_of_sources_resumes_exactly(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other.tar"
    write_shard(other, np.random.default_rng(1).integers(0, 64, (20, 17)), vocab_size=64)
    mix = ["--train-data", str(data), str(other), "--train-data-mix-weights", "3", "1"]
    whole = run(tmp_path, data, "whole", *mix, "--epochs", "3", "--save-frequency", "1")
    part = run(tmp_path, data, "part", *mix, "--epochs", "3", "--resume", str(checkpoints(whole)[0]))
    assert worst(weights(whole), weights(part)) == 0


def test_checkpointed_activations_give_the_same_update(tmp_path: Path, data: Path) -> None:
    plain, recomputed = run(tmp_path, data, "plain"), run(tmp_path, data, "recomputed", "--grad-checkpointing")
    assert worst(weights(recomputed), weights(plain)) < 1e-6


def test_resume_is_exact(tmp_path: Path, data: Path) -> None:
    whole = run(tmp_path, data, "whole", "--epochs", "4")
    part = run(tmp_path, data, "part", "--epochs", "4")
    for folder in checkpoints(part)[2:]:  # as if killed after the second epoch
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    (part / "metrics.jsonl").write_text("".join((part / "metrics.jsonl").read_text().splitlines(True)[:8]))
    resumed = run(tmp_path, data, "part", "--epochs", "4", "--resume", "latest")
    assert resumed == part
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(part)[name]), name
    one, two = weights(whole, "optimizer"), weights(part, "optimizer")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert [r["step"] for r in rows(part, "metrics.jsonl")] == list(range(1, 13))
    assert [r["loss"] for r in rows(part, "metrics.jsonl")] == [r["loss"] for r in rows(whole, "metrics.jsonl")]


@pytest.mark.parametrize(("launcher", "more"), [("ranks", []), ("torchrun", ["--fsdp"])])
def test_two_ranks_give_the_update_of_one(
    tmp_path: Path, data: Path, launcher: str, more: list[str], ranks: Ranks
) -> None:
    alone = run(tmp_path, data, "alone")
    argv = words(tmp_path, data, "two", "--accum-freq", "2", "--val-data", str(data), *more)
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "open_lm_linear.main", "--"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *argv], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert ranks.run(2, argv) == [0, 0], ranks.text()[-3000:]
    two = tmp_path / "logs" / "two"
    assert worst(weights(two), weights(alone)) < 1e-5
    assert rows(two, "results.jsonl")[-1]["counted"] == 48 * 16
    # a checkpoint of two ranks goes on in one process
    run(tmp_path, data, "two", "--val-data", str(data), "--epochs", "3", "--resume", "latest")
    assert rows(two, "metrics.jsonl")[-1]["step"] == 9


def test_training_only_the_new_parameters_leaves_the_rest(tmp_path: Path, data: Path) -> None:
    base = run(tmp_path, data, "softmax", "--attn-name", "softmax")
    argv = words(tmp_path, data, "swap", "--train-params", "new", "--lr-new", "1e-2", "--resume", "latest")
    argv[argv.index("--model") : argv.index("--model") + 2] = ["--pretrained", str(base)]
    folder = train(from_cli(argv))
    assert folder is not None
    before, after = weights(base), weights(folder)
    new = {k for k in after if "_totrain_" in k}
    assert set(after) - set(before) == new and len(new) == 2 * 4
    assert all(torch.equal(before[k], after[k]) for k in before)
    untrained = dict(pretrained.load_pretrained(base, "linear").named_parameters())
    assert all(not torch.equal(untrained[k], after[k]) for k in new if k.endswith("weight"))
    # and it goes on, with an optimiser that holds the new parameters alone
    argv[argv.index("--epochs") + 1] = "3"
    assert train(from_cli(argv)) == folder


def test_groups_have_their_own_learning_rates_and_decay() -> None:
    from conftest import tiny

    from open_lm_linear.model import create_model

    model = create_model(tiny("linear"))
    cfg = OptimConfig(lr=1.0, lr_new=0.1, wd=0.5, warmup=10, lr_cooldown_end=0.2)
    optimizer = optim.build(model, cfg, model.new_keys())
    assert len(optimizer.param_groups) == 4
    assert optim.set_learning_rates(optimizer, cfg, 4, 100) == pytest.approx(0.5)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.05, 0.5])
    for group in optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.5}
    count = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert count == sum(p.numel() for p in model.parameters())


def test_the_schedule() -> None:
    cfg = OptimConfig(lr=1.0, warmup=4, lr_cooldown_end=0.1)
    course = [schedule(cfg, s, 20) for s in range(20)]
    assert course[:4] == [0.25, 0.5, 0.75, 1.0]
    assert course[4] == 1.0 and course[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(course[4:], course[5:], strict=False))
    assert schedule(OptimConfig(warmup=0, lr_scheduler="const"), 7, 9) == 1.0


def test_bf16_autocast_trains_float32_weights(tmp_path: Path, data: Path) -> None:
    folder = run(tmp_path, data, "amp", "--precision", "amp_bf16")
    assert {v.dtype for v in weights(folder).values()} == {torch.float32}
    assert rows(folder, "metrics.jsonl")[-1]["loss"] < rows(folder, "metrics.jsonl")[0]["loss"]
    pure = run(tmp_path, data, "pure", "--precision", "bf16")
    assert {v.dtype for v in weights(pure).values()} == {torch.bfloat16}


def test_amp_without_an_instruction_is_float32(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BFLOAT16", False)
    products._say.cache_clear()
    with pytest.warns(UserWarning, match="no instruction for bfloat16 products"):
        amp = weights(run(tmp_path, data, "amp", "--precision", "amp_bf16"))
    full = weights(run(tmp_path, data, "full", "--precision", "fp32"))
    assert all(torch.equal(value, full[name]) for name, value in amp.items()) and amp.keys() == full.keys()


def test_a_dry_run_leaves_nothing(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(from_cli(words(tmp_path, data, "dry", "--dry-run"))) is None
    assert "expected:" in capsys.readouterr().out
    assert not (tmp_path / "logs" / "dry").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--accum-freq", "3"], "does not divide into 1 ranks x 3"),
        (["--train-num-samples", "64"], "is less than one global batch of 8"),
        (["--seq-len", "32"], "has sequences of 16 tokens and the model wants 32"),
        (["--warmup", "1000"], "warmup 1000 takes the whole run of 6 steps"),
        (["--lr", "-1"], "learning rates must be above 0"),
        (["--lr-cooldown-end", "1"], "is above lr"),
        (["--train-params", "new"], "this model has no new parameters"),
        (["--train-data", "/nowhere/manifest.jsonl"], "/nowhere/manifest.jsonl"),
        (["--device", "tpu9"], "is not a device"),
        (["--feature-dim", "7"], "an even feature_dim"),
        (["--resume", "/nowhere"], "is not a whole checkpoint"),
        (["--no-multiple-data-passes", "--epochs", "3"], "which holds 48: lower --train-num-samples or --epochs"),
        (["--squash-mask-left"], "--squash-mask-left takes out the token"),
        (["--reset-state-at-document"], "name no end-of-document tokens"),
        (["--train-data-mix-weights", "1", "2"], "has 2 weights for 1 sources"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    tmp_path: Path, data: Path, more: list[str], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path, data, "bad", *more)
    assert sentence in str(error.value)
    assert not checkpoints(tmp_path / "logs" / "bad")


def test_a_run_folder_belongs_to_one_run(tmp_path: Path, data: Path) -> None:
    run(tmp_path, data, "mine")
    with pytest.raises(UserError, match="already holds a run: choose another --name, or go on with --resume latest"):
        run(tmp_path, data, "mine")
    with pytest.raises(UserError, match="the checkpoint has model_norm = 'rms_norm', this run 'default_layer_norm'"):
        run(tmp_path, data, "mine", "--resume", "latest", "--model-norm", "default_layer_norm")


def test_another_vocabulary_is_refused(tmp_path: Path, data: Path) -> None:
    card = data.parent / "dataset.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "vocab_size": 5000, "tokenizer": "other"}))
    with pytest.raises(UserError, match=r"vocabulary of 5000 \(other\) and the model one of 64"):
        run(tmp_path, data, "vocabulary")


def test_a_half_written_checkpoint_is_refused(tmp_path: Path, data: Path) -> None:
    folder = latest(run(tmp_path, data, "cut"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    for use in (
        lambda: pretrained.load_pretrained(folder),
        lambda: run(tmp_path, data, "cut", "--resume", str(folder)),
    ):
        with pytest.raises(UserError, match="half-written checkpoint: model.safetensors has"):
            use()
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        require_whole(folder)


def test_a_loss_that_stays_without_a_number_ends_the_run(tmp_path: Path, data: Path) -> None:
    argv = words(tmp_path, data, "nan", "--lr", "1e30", "--grad-clip-norm", "1e30", "--warmup", "0")
    with pytest.raises(
        UserError, match="10 steps in a row had no finite loss and gradients, and there is no checkpoint"
    ):
        train(from_cli(argv))


def test_delete_previous_checkpoint_keeps_the_newest(tmp_path: Path, data: Path) -> None:
    folder = run(tmp_path, data, "keep", "--delete-previous-checkpoint")
    assert [p.name for p in checkpoints(folder)] == ["step_00000006"]
    require_whole(latest(folder))
