"""What is trained and how fast: patterns, groups, schedules, 8-bit moments, running averages."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from conftest import relative, tiny

from open_lm_linear import optim
from open_lm_linear.averaging import Averagers, parse_averager
from open_lm_linear.cli import UserError
from open_lm_linear.groups import parse_rule
from open_lm_linear.model import Transformer, create_model
from open_lm_linear.optim import OptimConfig, schedule


def grouped(**fields: Any) -> tuple[Transformer, torch.optim.Optimizer, OptimConfig]:
    model = create_model(tiny("linear", n_heads_kv=2))
    cfg = OptimConfig(**{"lr": 1.0, "wd": 0.5, "warmup": 10, **fields})
    return model, optim.build(model, cfg, model.new_keys()), cfg


def trained(model: Transformer) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("train", "freeze", "expected"),
    [
        ("all", "", lambda n: True),
        ("new", "", lambda n: "_totrain_" in n),
        ("layers.*.attention.*", "", lambda n: ".attention." in n),
        ("layers.0.*, norm.weight", "", lambda n: n.startswith("layers.0.") or n == "norm.weight"),
        ("new,*norm.weight", "", lambda n: "_totrain_" in n or n.endswith("norm.weight")),
        ("all", "tok_embeddings.*,output.*", lambda n: n.startswith(("layers", "norm"))),
        ("layers.*", "new", lambda n: n.startswith("layers") and "_totrain_" not in n),
        ("new", "layers.1.*", lambda n: "_totrain_" in n and n.startswith("layers.0.")),
    ],
)
def test_patterns_choose_what_is_trained(train: str, freeze: str, expected: Any) -> None:
    model, optimizer, cfg = grouped(train_params=train, freeze=freeze)
    names = {n for n, _ in model.named_parameters()}
    assert trained(model) == {n for n in names if expected(n)} != set()
    assert set(optim.trained_names(model, cfg, model.new_keys())) == trained(model)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.loss(torch.arange(12).view(2, 6), torch.arange(12).view(2, 6))[1].backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained(model)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"train_params": "layers.*.atention.*"}, "names no parameter; the nearest are layers.*.attention"),
        ({"freeze": "embedings.weight"}, "--freeze 'embedings.weight' names no parameter; the nearest are tok_embedd"),
        ({"train_params": "new", "freeze": "layers.*"}, "leaves nothing to train"),
        ({"param_group": ("layers.9.*:lr=1",)}, "--param-group 'layers.9.*' names no parameter"),
        ({"param_group": ("norm.weight:wd=0.1",)}, "names no matrix"),
        ({"param_group": ("norm.weight:lr=0.1",), "freeze": "norm.*"}, "names frozen parameters only"),
        ({"param_group": ("norm.weight",)}, "is not of the form PATTERN:lr=1e-4,wd=0.1,warmup=500"),
        ({"param_group": ("norm.weight:rl=1",)}, "'rl=1' sets none of lr, wd, warmup. Did you mean 'lr'?"),
        ({"param_group": ("norm.weight:lr=1,lr=2",)}, "sets lr twice"),
        ({"param_group": ("norm.weight:lr=fast",)}, "lr must be a number, not 'fast'"),
        ({"param_group": ("norm.weight:warmup=1.5",)}, "warmup must be a whole number, not '1.5'"),
        ({"param_group": ("norm.weight:lr=0",)}, "lr must be above 0; --freeze"),
        ({"param_group": ("norm.weight:wd=nan",)}, "wd must be 0 or more"),
    ],
)
def test_what_names_nothing_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        grouped(**fields)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_groups_have_their_own_settings_and_a_later_rule_wins_setting_by_setting() -> None:
    model, optimizer, cfg = grouped(
        lr_new=0.1,
        wd_new=0.2,
        warmup_new=5,
        param_group=("layers.*:lr=0.5,warmup=2", "layers.1.*:lr=0.25", "new:wd=0.75"),
    )
    found = {n: g for g in optimizer.param_groups for n in g["names"]}

    def settings(name: str) -> tuple[float, float, int]:
        return found[name]["peak_lr"], found[name]["weight_decay"], found[name]["warmup"]

    assert settings("tok_embeddings.weight") == (1.0, 0.5, 10)
    assert settings("norm.weight") == (1.0, 0.0, 10)
    assert settings("layers.0.attention.in_proj.weight") == (0.5, 0.5, 2)
    assert settings("layers.1.attention.in_proj.weight") == (0.25, 0.5, 2)
    assert settings("layers.1.attention._totrain_embed.weight") == (0.25, 0.75, 2)
    assert settings("layers.1.attention._totrain_embed.bias") == (0.25, 0.0, 2)
    plain = OptimConfig(lr=1.0, wd=0.5, warmup=10, lr_new=0.1, wd_new=0.2, warmup_new=5)
    new = optim.build(model, plain, model.new_keys()).param_groups
    assert {(g["peak_lr"], g["warmup"]) for g in new if g["label"] == "new"} == {(0.1, 5)}
    assert {g["weight_decay"] for g in new if g["label"] == "new"} == {0.2, 0.0}


def test_biases_of_one_a_head_have_no_decay() -> None:
    model = create_model(tiny("linear", {"feature_map": "per_head"}))
    optimizer = optim.build(model, OptimConfig(wd=0.5), model.new_keys())
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["names"]}
    assert decay["layers.0.attention._totrain_embed.bias"] == 0.0
    assert decay["layers.0.attention._totrain_embed.weight"] == 0.5


def test_the_learning_rate_of_each_group_is_a_function_of_the_step_alone() -> None:
    _, optimizer, cfg = grouped(lr_new=0.1, warmup_new=2, lr_cooldown_end=0.2, param_group=("norm.*:warmup=4",))

    def rates(step: int) -> list[float]:
        optim.set_learning_rates(optimizer, cfg, step, 20)
        return [g["lr"] for g in optimizer.param_groups]

    forward = [rates(s) for s in range(20)]
    assert [rates(s) for s in reversed(range(20))] == forward[::-1]
    for i, group in enumerate(optimizer.param_groups):
        peak, warmup = group["peak_lr"], group["warmup"]
        assert [r[i] for r in forward[:warmup]] == pytest.approx([peak * (s + 1) / warmup for s in range(warmup)])
        assert forward[-1][i] == pytest.approx(0.2 * peak)
    assert {g["warmup"] for g in optimizer.param_groups} == {10, 2, 4}


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_const_cooldown_stays_at_the_peak_until_its_last_epochs(power: float) -> None:
    cfg = OptimConfig(
        lr=1.0,
        warmup=4,
        lr_scheduler="const-cooldown",
        epochs_cooldown=2,
        lr_cooldown_end=0.1,
        lr_cooldown_power=power,
    )
    course = [schedule(cfg, s, 30, steps_per_epoch=5) for s in range(30)]
    assert course[3:20] == [1.0] * 17
    assert course[20] < 1.0 and course[-1] == pytest.approx(0.1)
    assert course[24] == pytest.approx(0.1 + 0.9 * 0.5**power)
    cfg.check(30, 5)


def test_the_least_learning_rate_holds_after_the_warmup() -> None:
    cfg = OptimConfig(lr=1.0, warmup=4, force_min_lr=0.3)
    course = [schedule(cfg, s, 20) for s in range(20)]
    free = [schedule(OptimConfig(lr=1.0, warmup=4), s, 20) for s in range(20)]
    assert course == [max(f, 0.3) if s >= 4 else f for s, f in enumerate(free)]
    assert course[0] == 0.25 and course[-1] == 0.3 > free[-1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"force_min_lr": 2.0}, "force_min_lr 2.0 is above lr 1.0"),
        ({"lr_scheduler": "const-cooldown"}, "needs --epochs-cooldown"),
        ({"epochs_cooldown": 1}, "--epochs-cooldown belongs to --lr-scheduler const-cooldown"),
        ({"lr_scheduler": "const-cooldown", "epochs_cooldown": 2}, "are more than the run's 20 steps"),
        ({"warmup_new": 20}, "warmup-new 20 takes the whole run of 20 steps"),
        ({"param_group": ("x:warmup=30",)}, "param-group 'x:warmup=30': warmup 30 takes the whole run"),
        ({"lr_cooldown_power": 0.0}, "--lr-cooldown-power must be above 0"),
        ({"averagers": "ema_0.9,mean_3"}, "'mean' is none of ema, poly"),
    ],
)
def test_settings_that_waste_a_run_are_refused(fields: dict[str, Any], sentence: str) -> None:
    cfg = OptimConfig(**{"lr": 1.0, "warmup": 4, **fields})
    with pytest.raises(UserError) as error:
        cfg.check(20, 10)
    assert sentence in str(error.value)


def test_the_table_accounts_for_every_parameter() -> None:
    model, optimizer, cfg = grouped(freeze="output.*", lr_new=0.1, param_group=("norm.*:lr=0.25,warmup=3",))
    lines = optim.table(model, optimizer, cfg).splitlines()
    assert lines[0].split()[-5:] == ["parameters", "peak", "lr", "wd", "warmup"]
    counts = [int(line.replace(",", "").split()[-4]) for line in lines[1:]]
    assert sum(counts) == sum(p.numel() for p in model.parameters())
    frozen = lines[-1].split()
    assert frozen[:3] == ["frozen", "1", f"{61 * 32:,}"]
    (norm,) = [line for line in lines if line.startswith("norm.*")]
    assert norm.split()[-3:] == ["2.50e-01", "0", "3"]
    assert len({len(line) for line in lines}) == 1


def test_rules_are_read() -> None:
    assert parse_rule("layers.*.attention.*:lr=1e-4,wd=0.1,warmup=500").given == {"lr": 1e-4, "wd": 0.1, "warmup": 500}
    assert type(parse_rule("x:warmup=500").given["warmup"]) is int


def test_eight_bits_without_a_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'open_lm_linear\[adamw8bit\]'"):
        grouped(optimizer="adamw8bit")


def test_eight_bits_take_learning_rates_that_lie_in_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        """As torchao's: a group's learning rate is a tensor that stays the same one."""

        def add_param_group(self, group: dict[str, Any]) -> None:
            super().add_param_group(group)
            self.param_groups[-1]["lr"] = torch.tensor(self.param_groups[-1]["lr"])

    package = types.ModuleType("torchao.optim")
    package.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", package)
    _, optimizer, cfg = grouped(optimizer="adamw8bit")
    before = [g["lr"] for g in optimizer.param_groups]
    optim.set_learning_rates(optimizer, cfg, 4, 100)
    assert all(a is g["lr"] for a, g in zip(before, optimizer.param_groups, strict=True))
    assert {round(float(g["lr"]), 6) for g in optimizer.param_groups} == {0.5}


def test_torchao_trains_with_moments_of_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes minutes on a CPU
    model = create_model(tiny("linear", hidden_dim=64, intermediate_dim_ffn=64))
    cfg = OptimConfig(lr=1e-2, warmup=0, optimizer="adamw8bit")
    optimizer, ids = optim.build(model, cfg, model.new_keys()), torch.arange(32).view(2, 16)
    losses = []
    for step in range(8):
        optim.set_learning_rates(optimizer, cfg, step, 100)
        loss = model.loss(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    small = [m for m in moments if hasattr(m, "codes")]
    assert small and all(m.codes.dtype == torch.uint8 for m in small)
    whole = optim.dequantised(small[0])
    assert type(whole) is torch.Tensor and whole.dtype == torch.float32 and whole.abs().sum() > 0
    again = optim.build(model, cfg, model.new_keys())
    optim.begin_states(again)
    for param, state in optimizer.state.items():
        assert set(again.state[param]) == set(state)
        for key, value in state.items():
            target = again.state[param][key]
            assert type(target) is type(value)
            target.copy_(optim.dequantised(value))
            assert relative(optim.dequantised(target), optim.dequantised(value)) < 1e-2


def history(model: Transformer, averagers: Averagers, steps: int) -> list[dict[str, torch.Tensor]]:
    """The parameters before the first and after each of some arbitrary updates."""
    seen = [{n: p.detach().double().clone() for n, p in model.named_parameters()}]
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=0.1)
        averagers.step(step)
        seen.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
    return seen


@pytest.mark.parametrize("spec", ["ema_0.9", "ema_0.5_2", "poly_8_1", "poly_3_2", "poly_0"])
def test_averages_are_what_they_are_defined_to_be(spec: str) -> None:
    model = create_model(tiny("linear"))
    averagers = Averagers(model, spec)
    seen = history(model, averagers, 6)
    kind, *numbers = spec.split("_")
    value, every = float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1
    for name in ("tok_embeddings.weight", "layers.1.attention._totrain_embed.bias"):
        expected = seen[0][name]
        for t, step in enumerate(range(every, 7, every), 1):
            rate = 1 - value if kind == "ema" else (value + 1) / (value + t)
            expected = (1 - rate) * expected + rate * seen[step][name]
        assert relative(averagers.state()[f"{spec}/{name}"], expected) < 1e-6
    if spec == "poly_0":  # which is the plain mean
        mean = torch.stack([s["norm.weight"] for s in seen[1:]]).mean(0)
        assert relative(averagers.state()["poly_0/norm.weight"], mean) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_stands_in_for_the_weights_and_leaves_them_as_they_were(dtype: torch.dtype) -> None:
    model = create_model(tiny("linear"), dtype=dtype)
    for name, param in model.named_parameters():
        param.requires_grad_(name != "norm.weight")
    averagers = Averagers(model, "ema_0.9,poly_8_1")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    averagers.step(1)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert not any(key.endswith("/norm.weight") for key in averagers.state())
    assert {v.dtype for v in averagers.state().values()} == {torch.float32}
    with pytest.raises(RuntimeError), averagers.swap_in("ema_0.9"):
        assert torch.equal(model.norm.weight, after["norm.weight"])  # frozen: its own average
        found = model.tok_embeddings.weight.detach()
        assert found.dtype == dtype
        assert relative(found, 1.1 * before["tok_embeddings.weight"].double()) < (1e-6 if dtype.itemsize == 4 else 1e-2)
        raise RuntimeError("validation failed")
    assert all(torch.equal(p, after[n]) for n, p in model.named_parameters())
    again = Averagers(model, "ema_0.9,poly_8_1")
    again.load({k: v.clone() for k, v in averagers.state().items()})
    assert all(torch.equal(v, averagers.state()[k]) for k, v in again.state().items())
    with pytest.raises(UserError, match="is only in the checkpoint: resume with the same --averagers"):
        Averagers(model, "ema_0.9").load(averagers.state())


@pytest.mark.parametrize("name", ["ema_1", "ema_x", "ema_0.9_0", "poly_-1", "poly_8_1_1", "poly_inf", "cosine", ""])
def test_averages_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="--averagers"):
        parse_averager(name)
    assert math.isclose(parse_averager("ema").value, 0.99)
