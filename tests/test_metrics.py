"""What a run says of itself: FLOPs, memory, norms, states, sinks, traces."""

from __future__ import annotations

import gzip
import json
import math
import mmap
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from open_lm_linear import gauges, metrics, optim
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.gauges import MeasureConfig
from open_lm_linear.model import create_model
from open_lm_linear.optim import OptimConfig
from open_lm_linear.parallel import Context
from open_lm_linear.profiling import Profile, parse_window
from open_lm_linear.train import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_those_of_the_device_by_its_whole_name(name: str, peak: float | None) -> None:
    assert gauges.peak_flops(name) == peak


@pytest.mark.parametrize("seq_len", [64, 512])
@pytest.mark.parametrize("attn_name", ["linear", "softmax"])
def test_training_takes_three_forwards_and_fewer_where_weights_are_frozen(attn_name: str, seq_len: int) -> None:
    model = create_model(tiny(attn_name))
    forward = model.flops_per_token(seq_len)
    assert gauges.training_flops(model, seq_len) == pytest.approx(3 * forward)
    for param in model.parameters():
        param.requires_grad_(False)
    assert gauges.training_flops(model, seq_len) == pytest.approx(2 * forward)
    grows = model.flops_per_token(2 * seq_len) > forward
    assert grows == (attn_name == "softmax")


@pytest.mark.parametrize(
    ("device", "precision", "share"), [("cuda", "amp_bf16", 0.1), ("cuda", "fp32", None), ("cpu", "amp_bf16", None)]
)
def test_speed_is_of_all_devices_and_of_one(
    device: str, precision: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H100 80GB HBM3")
    values = gauges.speed(4 * 989e6, 1e5, Context(0, 4, torch.device(device), precision))
    assert values["flops_per_s"] == pytest.approx(4 * 989e11)
    assert values["flops_per_s_per_device"] == pytest.approx(989e11)
    assert values.get("flops_share") == (None if share is None else pytest.approx(share))


def test_memory_now_and_at_most() -> None:
    size = 64 << 20
    before = gauges.memory(CPU)
    with mmap.mmap(-1, size) as held:  # pages that no allocator had before
        held.write(b"1" * size)
        during = gauges.memory(CPU)
    after = gauges.memory(CPU)
    assert during["memory_now_bytes"] - before["memory_now_bytes"] > size // 2
    assert after["memory_now_bytes"] < during["memory_now_bytes"] - size // 2
    assert after["memory_peak_bytes"] >= during["memory_now_bytes"] - (1 << 20)


def test_norms_of_groups_make_up_the_norm_of_all() -> None:
    model = create_model(tiny("linear"))
    cfg = OptimConfig(lr=1.0, lr_new=0.5, param_group=("layers.1.feed_forward.*:lr=0.1",), freeze="norm.*")
    optimizer = optim.build(model, cfg, model.new_keys())
    model.loss(torch.arange(24).view(2, 12), torch.arange(24).view(2, 12))[1].backward()
    found = gauges.gradient_norms(optimizer)
    assert set(found) == {"grad_norm/pretrained", "grad_norm/new", "grad_norm/layers.1.feed_forward.*"}
    for label, choose in (("new", "_totrain_"), ("layers.1.feed_forward.*", "layers.1.feed_forward.")):
        grads = [p.grad.flatten() for n, p in model.named_parameters() if choose in n and p.grad is not None]
        assert found[f"grad_norm/{label}"] == pytest.approx(float(torch.cat(grads).norm()), rel=1e-5)
    every = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert math.sqrt(sum(v**2 for v in found.values())) == pytest.approx(float(every.norm()), rel=1e-5)


def test_a_probe_of_the_states_sees_them_and_disturbs_nothing() -> None:
    model = create_model(tiny("linear")).train()
    ids = torch.randint(61, (3, 20))
    model.loss(ids, ids)[1].backward()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    rng = torch.get_rng_state()
    found = gauges.probe_states(model, ids, Context(0, 1, CPU, "fp32"))
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name][0]) and torch.equal(param.grad, before[name][1])
    past = model.eval()(ids[:1], use_cache=True)[2]
    norms = torch.stack([s.S[0].flatten(1).norm(dim=1) for s in past.layers]).flatten().double()
    assert found["state_norm_min"] == pytest.approx(norms.min().item())
    assert found["state_norm_max"] == pytest.approx(norms.max().item())
    assert found["state_norm_median"] == pytest.approx(norms.quantile(0.5).item())


@pytest.mark.parametrize(("retnet", "reach"), [(True, [32.0, 64.0, 128.0, 256.0]), (False, None)])
def test_the_effective_context_is_the_sum_of_all_weights(retnet: bool, reach: list[float] | None) -> None:
    model = create_model(tiny("linear", {"use_retnet_slopes": retnet}))
    slopes = model.layers[0].attention.slopes
    found = gauges.effective_contexts([slopes])
    sums = [sum(math.exp(-s * j) for j in range(20_000)) for s in slopes]
    assert found == pytest.approx(sums, rel=1e-6)
    if reach:
        assert found == pytest.approx(reach)


@pytest.mark.parametrize("attn_name", ["linear", "softmax"])
def test_without_decay_there_is_no_effective_context(attn_name: str) -> None:
    model = create_model(tiny(attn_name, {"use_decay": False} if attn_name == "linear" else {}))
    found = gauges.probe_states(model, torch.arange(8).view(1, 8), Context(0, 1, CPU, "fp32"))
    assert {k.rsplit("_", 1)[0] for k in found} == ({"state_norm"} if attn_name == "linear" else set())


@pytest.mark.parametrize("spec", ["", "3", "0:2", "2:0", "a:b", "1:2:3", "-1:2", "1.5:2"])
def test_windows_that_are_none_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="is not START:STEPS"):
        parse_window(spec)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"profile": "5:3"}, "ends after the run's 6 steps"), ({"log_state_every": -1}, "must be 0 or more")],
)
def test_measurements_that_never_come_are_refused(fields: dict[str, Any], sentence: str) -> None:
    MeasureConfig(profile="5:2").check(6)
    with pytest.raises(UserError, match=sentence):
        MeasureConfig(**fields).check(6)


@pytest.mark.parametrize(
    ("spec", "first", "last", "expected"),
    [("2:2", 0, 5, (2, 3)), ("1:1", 0, 5, (1, 1)), ("4:2", 0, 5, (4, 5)), ("2:2", 3, 5, None), ("", 0, 5, None)],
)
def test_a_trace_holds_its_window_and_no_other_step(
    spec: str, first: int, last: int, expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Each step multiplies matrices of a size of its own, which the trace records."""
    for active in (True, False):
        profile = Profile(spec, tmp_path / str(active), CPU, active=active)
        for step in range(first, last):
            profile.at(step)
            torch.ones(2, 100 + step + 1) @ torch.ones(100 + step + 1, 2)
        profile.close(last)
    assert not (tmp_path / "False").exists()
    files = sorted(p.name for p in (tmp_path / "True").glob("*"))
    assert files == ([] if expected is None else [f"trace_{expected[0]}_{expected[1]}.json.gz"])
    if expected is not None:
        with gzip.open(tmp_path / "True" / files[0], "rt") as file:
            events = json.load(file)["traceEvents"]
        sizes = [e["args"]["Input Dims"][0][1] - 100 for e in events if e.get("name") == "aten::mm"]
        assert sizes == list(range(expected[0], expected[1] + 1))


def toy(tmp_path: Path, name: str, *more: str) -> Path:
    model = tmp_path / "model.json"
    fields = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 16, "vocab_size": 64}
    model.write_text(json.dumps({**fields, "intermediate_dim_ffn": 48, "weight_tying": True}))
    argv = ["--model", str(model), "--attn-name", "linear", "--dataset-type", "synthetic", "--name", name]
    argv += ["--logs", str(tmp_path / "logs"), "--precision", "fp32", "--device", "cpu", "--workers", "0"]
    argv += ["--global-batch-size", "4", "--train-num-samples", str(16 * 4 * 3), "--epochs", "2", "--lr", "1e-2"]
    argv += ["--warmup", "1", "--grad-clip-norm", "0.1", "--log-every-n-steps", "2", *more]
    folder = train(from_cli(argv))
    assert folder is not None
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_logs_what_it_measured_and_is_the_run_it_would_have_been(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    measured = toy(tmp_path, "measured", "--log-state-every", "3", "--profile", "2:2", "--averagers", "ema_0.9")
    rows = lines(measured / "metrics.jsonl")
    assert [r["step"] for r in rows] == [2, 4, 6]
    flops = 3 * create_model(from_json(tmp_path)).flops_per_token(16)
    for row in rows:
        assert row["flops_per_s"] == pytest.approx(flops * row["tokens_per_s"])
        assert row["flops_per_s_per_device"] == row["flops_per_s"]
        assert "flops_share" not in row
        assert row["grad_norm/all"] == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["grad_norm"] > 0.1  # before clipping
        assert 0 < row["memory_now_bytes"] <= row["memory_peak_bytes"]
        assert 0 <= row["data_seconds"] <= row["seconds"]
    states = lines(measured / "states.jsonl")
    assert [r["step"] for r in states] == [3, 6]
    assert states[0]["state_norm_median"] != states[1]["state_norm_median"]
    assert states[0]["effective_context_max"] == states[1]["effective_context_max"]
    assert [p.name for p in (measured / "profile").iterdir()] == ["trace_2_3.json.gz"]
    table = (measured / "out.log").read_text()
    assert "trained with adamw" in table and "all, matrices" in table
    plain = toy(tmp_path, "plain")
    one, two = (load_file(p / "checkpoints" / "step_00000006" / "model.safetensors") for p in (measured, plain))
    assert all(torch.equal(one[k], two[k]) for k in two)
    assert not (plain / "states.jsonl").exists() and not (plain / "profile").exists()


def from_json(tmp_path: Path) -> Any:
    from open_lm_linear.model import read_config

    return read_config(tmp_path / "model.json", "linear")


def test_averages_are_validated_beside_the_weights(tmp_path: Path) -> None:
    data = ["--val-data", str(shards(tmp_path))]
    folder = toy(tmp_path, "averaged", "--averagers", "ema_0.9,poly_8_1", *data)
    rows = lines(folder / "results.jsonl")
    assert [(r["step"], r.get("average")) for r in rows] == [
        (0, None),
        *[(step, name) for step in (3, 6) for name in ("ema_0.9", "poly_8_1", None)],
    ]
    assert len({r["loss"] for r in rows}) == len(rows)
    plain = lines(toy(tmp_path, "plain", *data) / "results.jsonl")
    assert [r["loss"] for r in plain] == [r["loss"] for r in rows if "average" not in r]


def test_averages_resume_exactly(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = toy(tmp_path, "averaged", "--averagers", "ema_0.9,poly_8_2")
    last = folder / "checkpoints" / "step_00000006" / "averages.safetensors"
    whole = load_file(last)
    assert {k.split("/")[0] for k in whole} == {"ema_0.9", "poly_8_2"}
    shutil.rmtree(last.parent)
    toy(tmp_path, "averaged", "--averagers", "ema_0.9,poly_8_2", "--resume", "latest")
    resumed = load_file(last)
    assert set(resumed) == set(whole) and all(torch.equal(resumed[k], whole[k]) for k in whole)
    bare = toy(tmp_path, "bare")
    with pytest.raises(UserError, match="holds no running averages: resume it without --averagers"):
        toy(tmp_path, bare.name, "--averagers", "ema_0.9", "--resume", "latest")


def shards(tmp_path: Path) -> Path:
    import numpy as np

    from open_lm_linear.data.manifest import Shard, write_manifest
    from open_lm_linear.data.shards import write_shard

    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "shard-00000.tar", (np.arange(8)[:, None] + 3 * np.arange(17)) % 64)
    card = {"vocab_size": 64, "seq_len": 16, "tokenizer": "toy"}
    manifest = tmp_path / "data" / "manifest.jsonl"
    write_manifest(manifest, [Shard(str(tmp_path / "data" / "shard-00000.tar"), 8)], card)
    return manifest


def test_a_run_trains_what_the_flags_say(tmp_path: Path) -> None:
    folder = toy(
        *(tmp_path, "partial", "--train-params", "layers.*.attention.*", "--freeze", "*.out_proj.*"),
        *("--param-group", "layers.0.*:lr=1e-3", "--param-group", "layers.1.*:lr=1e-4,warmup=3"),
    )
    log = (folder / "out.log").read_text()
    assert "layers.0.*, matrices" in log and "1.00e-03" in log and "frozen" in log
    assert set(lines(folder / "metrics.jsonl")[0]) >= {"grad_norm/layers.0.*", "grad_norm/layers.1.*"}
    kept = from_cli(["--config", str(folder / "config.yaml")]).optim
    assert kept.param_group == ("layers.0.*:lr=1e-3", "layers.1.*:lr=1e-4,warmup=3")
    with pytest.raises(UserError, match="names no parameter; the nearest are"):
        toy(tmp_path, "wrong", "--freeze", "layer.*.attention.*")
    assert not (tmp_path / "logs" / "wrong").exists()


def test_wandb_gets_the_numbers_and_not_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, Any], int]] = []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: sent.append((values, step)), finish=lambda: sent.append(({}, -1))
    )
    fake.init = lambda **kwargs: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = metrics.Logger(tmp_path, "wandb", is_main=True, dry=False, resolved={}, project="p")
    log.row("metrics.jsonl", {"step": 3, "loss": 1.5, "grad_norm/new": 0.5, "note": "words"})
    log.close()
    assert sent == [({"metrics/step": 3, "metrics/loss": 1.5, "metrics/grad_norm/new": 0.5}, 3), ({}, -1)]


def test_the_line_names_the_share_of_the_peak_only_where_there_is_one() -> None:
    row = {"step": 1, "tokens": 2, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 5.0, "data_share": 0.1}
    row |= {"memory_bytes": 1024, "seconds_left": 60}
    assert "peak" not in metrics.log_line(row, 9)
    assert "5 tokens/s (41% of the GPU's bf16 peak) |" in metrics.log_line({**row, "flops_share": 0.412}, 9)


def test_on_a_gpu_its_memory_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording itself needs a GPU; what is asked of torch and what is written does not."""
    asked: list[dict[str, Any]] = []
    snapshot = {"segments": [], "device_traces": [[]], "stream": object()}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: asked.append(kwargs))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: dict(snapshot))
    monkeypatch.setattr("torch.cuda._memory_viz.trace_plot", lambda data: f"<html>{sorted(data)}</html>")
    profile = Profile("1:1", tmp_path, torch.device("cuda:0"), active=True)
    profile.at(0)
    assert asked == [{"max_entries": 100_000}]
    profile.at(1)
    assert asked[1:] == [{"enabled": None}]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"trace_1_1.json.gz", "memory_1_1.json.gz", "memory_1_1.html"}
    with gzip.open(tmp_path / "memory_1_1.json.gz", "rt") as file:
        assert json.load(file)["device_traces"] == [[]]
    assert "segments" in (tmp_path / "memory_1_1.html").read_text()


def test_a_log_is_put_back_whatever_a_kill_left_of_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.rewind(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    metrics.rewind(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    path.write_text('{"step": 1}\n{"st')
    metrics.rewind(path, 3)
    assert path.read_text() == '{"step": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
