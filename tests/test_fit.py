"""The closed-form start: it is the least-squares solution, it helps, and it is the same on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import relative, tiny
from ranks import Ranks

import open_lm_linear as oll
from open_lm_linear.checkpoint import latest, open_part
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.fit import choose_heads, fit_output_projections
from open_lm_linear.model import Transformer, create_model
from open_lm_linear.parallel import ParallelConfig, setup
from open_lm_linear.train import train


def pair(**fields: object) -> tuple[Transformer, Transformer]:
    """A random teacher and the same weights with linear attention."""
    teacher = create_model(tiny("softmax", n_heads_kv=2, **fields)).eval()
    student = create_model(tiny("linear", n_heads_kv=2, **fields)).eval()
    state = student.state_dict() | teacher.state_dict()
    student.load_state_dict(state)
    return teacher, student


def outputs(model: Transformer, layer: int, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.layers[layer].attention(x, torch.arange(x.shape[1])[None])[0]


def test_no_other_projection_explains_more() -> None:
    teacher, student = pair()
    ids = torch.randint(61, (24, 32))
    with setup(ParallelConfig(device="cpu", precision="fp32")) as ctx:
        explained = fit_output_projections(student, teacher, list(ids.split(8)), ctx, ridge=1e-9)
    x = teacher.layers[0].attention_norm(teacher.tok_embeddings(ids)).detach()
    target = outputs(teacher, 0, x)

    def error() -> float:
        return (outputs(student, 0, x) - target).square().sum().item()

    best = error()
    assert explained[0] == pytest.approx(1 - best / target.square().sum().item(), abs=1e-3)
    assert 0 < explained[0] < 1 and len(explained) == 2
    weight = student.layers[0].attention.out_proj.weight
    for _ in range(5):
        step = 1e-2 * torch.randn_like(weight)
        with torch.no_grad():
            weight += step
            assert error() > best
            weight -= step


def test_a_bias_and_norms_behind_the_attention_are_reckoned_with() -> None:
    fields = {"attn_out_bias": True, "qkv_bias": True, "norm_placement": "both", "embedding_scale": 3.0}
    teacher = create_model(tiny("softmax", **fields)).eval()
    with torch.no_grad():
        for name, param in teacher.named_parameters():
            if name.endswith("bias"):
                param.normal_()
    twin = create_model(teacher.config).eval()
    twin.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for block in twin.layers:
            block.attention.out_proj.weight.zero_()
    with setup(ParallelConfig(device="cpu", precision="fp32")) as ctx:
        explained = fit_output_projections(twin, teacher, [torch.randint(61, (24, 32))], ctx, ridge=1e-9)
    assert min(explained) > 0.9999
    for ours, theirs in zip(twin.layers, teacher.layers, strict=True):
        assert relative(ours.attention.out_proj.weight, theirs.attention.out_proj.weight) < 1e-2


def test_only_the_output_projections_change_and_softmax_fits_itself() -> None:
    teacher, student = pair()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with setup(ParallelConfig(device="cpu", precision="fp32")) as ctx:
        fit_output_projections(student, teacher, [torch.randint(61, (16, 32))], ctx)
        changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {f"layers.{i}.attention.out_proj.weight" for i in range(2)}
        twin = create_model(teacher.config).eval()
        twin.load_state_dict(teacher.state_dict())
        explained = fit_output_projections(twin, teacher, [torch.randint(61, (16, 32))], ctx, ridge=1e-9)
    assert min(explained) > 0.9999
    for i in range(2):
        ours, theirs = (m.layers[i].attention.out_proj.weight for m in (twin, teacher))
        assert relative(ours, theirs) < 1e-2


def words(tmp_path: Path, base: Path, name: str, *more: str) -> list[str]:
    return [
        *("--pretrained", str(base), "--attn-name", "linear", "--dataset-type", "synthetic", "--fit-tokens", "2000"),
        *("--logs", str(tmp_path / "logs"), "--name", name, "--precision", "fp32", "--device", "cpu", "--workers", "0"),
        *("--global-batch-size", "8", "--train-num-samples", str(16 * 8), "--warmup", "0", "--lr", "1e-12"),
        *("--wd", "0", "--seq-len", "16", *more),
    ]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A softmax run to swap."""
    model = tmp_path / "model.json"
    model.write_text(json.dumps(tiny("softmax", n_heads_kv=2, seq_len=16).to_json()))
    argv = ["--model", str(model), "--dataset-type", "synthetic", "--train-num-samples", "128", "--warmup", "0"]
    argv += ["--global-batch-size", "8", "--logs", str(tmp_path / "logs"), "--name", "base", "--device", "cpu"]
    folder = train(from_cli([*argv, "--workers", "0", "--precision", "fp32"]))
    assert folder is not None
    return folder


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_fit_as_one_does(tmp_path: Path, base: Path, fsdp: bool, ranks: Ranks) -> None:
    # 2000 tokens make 32 batches of 4 x 16 in one process and 16 of 8 x 16 over two: the same 2048 tokens.
    alone = train(from_cli(words(tmp_path, base, "alone")))
    more = ["--fsdp"] if fsdp else []
    assert ranks.run(2, words(tmp_path, base, "two", *more)) == [0, 0], ranks.text()[-3000:]
    assert "fitted 2 output projections on 2,048 tokens" in ranks.text()
    assert alone is not None
    one, two = (open_part(latest(f), "model") for f in (alone, tmp_path / "logs" / "two"))
    plain = oll.load_pretrained(base, "linear").state_dict()
    for key in (f"layers.{i}.attention.out_proj.weight" for i in range(2)):
        assert relative(two.read(key), one.read(key)) < 1e-4
        assert relative(one.read(key), plain[key]) > 0.1


def test_there_must_be_a_teacher(tmp_path: Path, base: Path) -> None:
    argv = words(tmp_path, base, "none")
    argv[argv.index("--attn-name") + 1] = "softmax"
    with pytest.raises(UserError, match="--fit-tokens fits a swapped attention to its teacher"):
        train(from_cli(argv))
    with pytest.raises(UserError, match="--fit-tokens must be 0 or more"):
        from_cli(words(tmp_path, base, "none", "--fit-tokens", "-1"))


def head_outputs(model: Transformer, layer: int, x: torch.Tensor) -> torch.Tensor:
    """(B, T, H, V), before the output projection."""
    caught: list[torch.Tensor] = []
    attention = model.layers[layer].attention
    with attention.out_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0])), torch.no_grad():
        attention(x, torch.arange(x.shape[1])[None])
    return caught[0].unflatten(-1, (attention.arch.n_heads, -1))


def likeness(y: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """(H,) squared cosines."""
    y, a = (z.movedim(2, 0).flatten(1).double() for z in (y, a))
    return (y * a).sum(1).clamp(min=0).square() / (y.square().sum(1) * a.square().sum(1))


@pytest.mark.parametrize("name", ["hedgehog_decay", "gated_linear", "gated_delta", "lolcats"])
def test_heads_take_the_start_that_is_most_like_the_teacher(name: str) -> None:
    teacher = create_model(tiny("softmax", n_heads_kv=2)).eval()
    student = create_model(tiny(name, n_heads_kv=2)).eval()
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    before = {k: v.clone() for k, v in student.state_dict().items()}
    ids = torch.randint(61, (6, 32))
    x = teacher.layers[0].attention_norm(teacher.tok_embeddings(ids)).detach()
    target, start = head_outputs(teacher, 0, x), head_outputs(student, 0, x)
    with setup(ParallelConfig(device="cpu", precision="fp32")) as ctx:
        found = choose_heads(student, teacher, list(ids.split(2)), ctx)
    assert len(found) == 2 and all(after > earlier for earlier, after in found)
    reached = likeness(head_outputs(student, 0, x), target)
    assert found[0] == pytest.approx((likeness(start, target).mean().item(), reached.mean().item()), rel=1e-4)
    attention = student.layers[0].attention
    # Each head's output is as long as its likeness to the teacher's allows.
    y = head_outputs(student, 0, x).movedim(2, 0).flatten(1)
    factor = ((y * target.movedim(2, 0).flatten(1)).sum(1) / y.square().sum(1)).clamp(min=0.1)
    wide = factor.repeat_interleave(attention.arch.v_dim)
    assert relative(attention.out_proj.weight, before["layers.0.attention.out_proj.weight"] * wide) < 1e-5
    changed = {k.split(".", 3)[3] for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {"out_proj.weight"} | {choice.name for choice in attention.choices()}


def test_the_choice_made_last_is_the_best_that_there_is() -> None:
    teacher = create_model(tiny("softmax", n_heads_kv=2)).eval()
    student = create_model(tiny("gated_delta", n_heads_kv=2)).eval()
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    ids = torch.randint(61, (6, 32))
    x = teacher.layers[1].attention_norm(teacher.layers[0](teacher.tok_embeddings(ids), torch.arange(32)[None],
                                                           None, None, None)[0]).detach()  # fmt: skip
    target = head_outputs(teacher, 1, x)
    with setup(ParallelConfig(device="cpu", precision="fp32")) as ctx:
        choose_heads(student, teacher, [ids], ctx)
    attention = student.layers[1].attention
    (choice,) = attention.choices()
    parameter, scores = attention.get_parameter(choice.name), []
    chosen = parameter.detach().clone()
    for value in choice.values:
        with torch.no_grad():
            parameter.copy_(value)
        scores.append(likeness(head_outputs(student, 1, x), target).unflatten(0, (choice.heads, -1)).mean(-1))
    best = torch.stack(scores).argmax(0)
    assert torch.equal(chosen, torch.stack(choice.values)[best, torch.arange(choice.heads)])


def test_there_must_be_something_to_choose(tmp_path: Path, base: Path) -> None:
    argv = words(tmp_path, base, "none")
    argv[argv.index("--fit-tokens")] = "--init-tokens"
    with pytest.raises(UserError, match="--init-tokens: heads of linear have nothing to choose"):
        train(from_cli(argv))


def test_a_run_begins_with_chosen_heads(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(tmp_path, base, "chosen")
    argv[argv.index("--fit-tokens")] = "--init-tokens"
    argv[argv.index("--attn-name") + 1] = "hedgehog_decay"
    folder = train(from_cli(argv))
    assert folder is not None and "chose the start of the heads of 2 layers on 2,048 tokens" in capsys.readouterr().out
    key = "layers.0.attention._totrain_decay.log_slopes"
    chosen = open_part(latest(folder), "model").read(key)
    plain = oll.load_pretrained(base, "hedgehog_decay").state_dict()[key]
    assert relative(chosen, plain) > 0.1
