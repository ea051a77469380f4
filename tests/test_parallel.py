"""Memory and ranks: recomputed activations, hybrid and offloaded sharding, and updates that stay those of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative, tiny
from ranks import Ranks
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from open_lm_linear import parallel
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer, create_model
from open_lm_linear.parallel import Context, ParallelConfig

HERE = Context(0, 1, torch.device("cpu"), "fp32")


class Count(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def gradients(model: Transformer) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The gradients of a loss, and how often each operator ran in forward and backward."""
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    with Count() as count:
        model.loss(ids[:, :-1], ids[:, 1:], 1e-4)[1].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, count.calls


@pytest.mark.parametrize("attn_name", ["linear", "softmax"])
@pytest.mark.parametrize(("every", "mode"), [(1, "full"), (2, "full"), (3, "full"), (1, "selective"), (2, "selective")])
def test_recomputing_gives_the_same_gradients(attn_name: str, every: int, mode: Any) -> None:
    model = create_model(tiny(attn_name, n_layers=4, n_heads_kv=2)).train()
    expected, plain = gradients(model)
    model.zero_grad()
    cfg = ParallelConfig(grad_checkpointing=True, grad_checkpointing_every=every, grad_checkpointing_mode=mode)
    found, calls = gradients(parallel.apply(model, cfg, HERE))
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-6, name
    again = calls["aten.silu.default"] - plain["aten.silu.default"]
    assert again == len(range(0, 4, every))  # one feed-forward for each block that is computed again
    products = calls["aten.mm.default"] - plain["aten.mm.default"]
    assert products == 0 if mode == "selective" else products > again


def test_what_is_kept_shrinks_with_recomputation() -> None:
    """Bytes that the graph holds between forward and backward."""
    kept = {}
    for every, mode in ((0, "full"), (2, "full"), (1, "selective"), (1, "full")):
        model = create_model(tiny("linear", n_layers=4)).train()
        model.grad_checkpointing, model.grad_checkpointing_mode = every, mode
        sizes: dict[int, int] = {}

        def hold(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.data_ptr()] = x.numel() * x.element_size()
            return x

        ids = torch.arange(48).view(2, 24)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            model.loss(ids, ids)
        kept[every, mode] = sum(sizes.values())
    assert kept[1, "full"] < kept[2, "full"] < kept[0, "full"]
    assert kept[1, "selective"] < kept[0, "full"]


@pytest.mark.parametrize(
    ("fields", "world", "sentence"),
    [
        ({"fsdp_hybrid": True}, 4, "--fsdp-hybrid is a way of sharding: give --fsdp too"),
        ({"fsdp_cpu_offload": True}, 1, "--fsdp-cpu-offload is a way of sharding: give --fsdp too"),
        ({"fsdp": True, "fsdp_shard_size": 2}, 4, "give that too"),
        ({"fsdp": True, "fsdp_hybrid": True, "fsdp_shard_size": 3}, 4, "cannot cut 4 ranks into groups of 3"),
        ({"fsdp": True, "fsdp_hybrid": True, "fsdp_shard_size": 0}, 4, "into groups of 0"),
        ({"grad_checkpointing": True, "grad_checkpointing_every": 0}, 1, "must be at least 1, not 0"),
        ({"grad_checkpointing_every": 2}, 1, "say how --grad-checkpointing works"),
        ({"grad_checkpointing_mode": "selective"}, 1, "say how --grad-checkpointing works"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], world: int, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        ParallelConfig(**fields).check(world)
    assert sentence in str(error.value)


def test_a_hybrid_shards_over_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ParallelConfig(fsdp=True, fsdp_hybrid=True).shard_size(8) == 2
    assert ParallelConfig(fsdp=True, fsdp_hybrid=True, fsdp_shard_size=4).shard_size(8) == 4
    assert ParallelConfig(fsdp=True).shard_size(8) == 8
    assert ParallelConfig().shard_size(8) == 1


CASES: dict[str, dict[str, Any]] = {
    "hybrid": {"fsdp": True, "fsdp_hybrid": True, "fsdp_shard_size": 2},
    "offloaded": {"fsdp": True, "fsdp_cpu_offload": True},
    "hybrid, offloaded, selective": {
        **{"fsdp": True, "fsdp_hybrid": True, "fsdp_shard_size": 2, "fsdp_cpu_offload": True},
        **{"grad_checkpointing": True, "grad_checkpointing_mode": "selective"},
    },
    "replicated": {},
}
AVERAGES = "ema_0.5,poly_2"

# Three steps on all ranks with clipping, averages and validation by an average in between; run with and without ranks.
PROGRAM = """
import dataclasses, json, sys
import torch
from conftest import tiny
from open_lm_linear import gauges, optim, parallel
from open_lm_linear.averaging import Averagers
from open_lm_linear.model import Transformer
from open_lm_linear.optim import OptimConfig
from open_lm_linear.parallel import Context, ParallelConfig
from open_lm_linear.pretrained import loading


def steps(fields, ctx, averages):
    cfg = ParallelConfig(device="cpu", precision="fp32", **fields)
    with torch.device("meta"):
        model = Transformer(tiny("linear", n_heads_kv=2))
    model = parallel.apply(model, cfg, ctx)
    model.to_empty(device=parallel.storage(cfg, ctx))
    loading.initialise(model, 0)
    opt = OptimConfig(lr=1e-2, lr_new=3e-2, warmup=0, freeze="layers.0.feed_forward.*", averagers=averages)
    optimizer = optim.build(model, opt, model.new_keys())
    out = {}
    ids = torch.randint(61, (8, 25), generator=torch.Generator().manual_seed(3)).chunk(ctx.world_size)[ctx.rank]
    with torch.no_grad():
        model.loss(ids[:, :-1], ids[:, 1:])  # as a first validation, which leaves parameters gathered
    averagers = Averagers(model, averages)
    for step in range(3):
        optim.set_learning_rates(optimizer, opt, step, 10)
        parallel.accumulating(model, ctx, last=True)
        (model.loss(ids[:, :-1], ids[:, 1:])[1] * ctx.world_size / (8 * 24)).backward()
        for label, norm in gauges.gradient_norms(optimizer).items():
            out[f"{label} {step}"] = torch.tensor(norm)
        out[f"norm {step}"] = torch.tensor(parallel.clip_gradients(model, 0.5))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averagers.step(step + 1)
        model.eval()
        with torch.no_grad(), averagers.swap_in("ema_0.5"):
            out[f"average {step}"] = ctx.sum(model.loss(ids[:, :-1], ids[:, 1:]))[0].clone()
        with torch.no_grad():
            out[f"after {step}"] = ctx.sum(model.loss(ids[:, :-1], ids[:, 1:]))[0].clone()
        states = gauges.probe_states(model.train(), ids, dataclasses.replace(ctx))
        out[f"context {step}"] = torch.tensor(states["effective_context_max"])
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
    again = Averagers(model, averages)
    again.load({k: parallel.whole(v) for k, v in averagers.state().items()})
    for found in (averagers.state(), again.state()):
        for name, value in found.items():
            out.setdefault(name, parallel.whole(value))
            assert torch.equal(out[name], parallel.whole(value))
    out |= {n: parallel.whole(p.detach()).clone() for n, p in model.named_parameters()}
    shard = max((p.to_local() if hasattr(p, "to_local") else p).numel() / p.numel() for p in model.parameters())
    return out, shard


if __name__ == "__main__":
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder, cases, averages = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    with parallel.setup(ParallelConfig(device="cpu", precision="fp32")) as ctx:
        for name, fields in cases.items():
            out, shard = steps(fields, ctx, averages)
            if ctx.is_main:
                save_file({**out, "shard": torch.tensor(shard)}, f"{folder}/{name}.safetensors")
"""


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """Every case on four ranks of one launch; a file of results each."""
    import json

    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    argv = [str(folder), json.dumps(CASES), AVERAGES]
    assert ranks.run(4, argv, program=folder / "program.py") == [0] * 4, ranks.text()[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    space: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM, space)  # noqa: S102 (the very text that the ranks run)
    steps: Callable[..., Any] = space["steps"]
    return steps({}, HERE, AVERAGES)[0]


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_give_the_updates_of_one(case: str, on_four_ranks: Path, alone: dict[str, torch.Tensor]) -> None:
    found = load_file(on_four_ranks / f"{case}.safetensors")
    shard = float(found.pop("shard"))
    assert set(found) == set(alone)
    for name, expected in alone.items():
        # Norms of gradients after an update follow what AdamW makes of rounding: it divides by roots of small numbers.
        assert relative(found[name], expected) < (1e-4 if "norm" in name else 2e-5), name
    assert relative(alone["average 0"], alone["after 0"]) > 1e-3  # or the averages prove nothing
    expected_shard = {"hybrid": 0.5, "offloaded": 0.25, "replicated": 1.0}.get(case, 0.5)
    assert shard == pytest.approx(expected_shard, abs=0.2 * expected_shard)


def test_one_rank_offloads_too(alone: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM, space)  # noqa: S102
    cfg = {"fsdp": True, "fsdp_cpu_offload": True}
    with parallel.setup(ParallelConfig(device="cpu", precision="fp32", **cfg)) as ctx:
        found = space["steps"](cfg, ctx, AVERAGES)[0]
    for name, expected in alone.items():
        assert relative(found[name], expected) < 1e-5, name


def test_an_offloaded_run_is_the_plain_run_and_goes_on(tmp_path: Path) -> None:
    import json

    from open_lm_linear.config import from_cli
    from open_lm_linear.train import train

    fields = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 16, "vocab_size": 64}
    (tmp_path / "model.json").write_text(json.dumps({**fields, "intermediate_dim_ffn": 48}))

    def weights(name: str, *more: str) -> dict[str, torch.Tensor]:
        argv = ["--model", str(tmp_path / "model.json"), "--attn-name", "linear", "--dataset-type", "synthetic"]
        argv += ["--name", name, "--logs", str(tmp_path), "--precision", "fp32", "--device", "cpu", "--workers", "0"]
        argv += ["--global-batch-size", "4", "--train-num-samples", "128", "--warmup", "1", "--lr", "1e-2", *more]
        folder = train(from_cli(argv))
        assert folder is not None
        return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")

    offload = ["--fsdp", "--fsdp-cpu-offload", "--lr-scheduler", "const"]
    weights("offloaded", "--epochs", "1", *offload)
    resumed = weights("offloaded", "--epochs", "2", "--resume", "latest", *offload)
    expected = weights("plain", "--epochs", "2", "--lr-scheduler", "const")
    for name, value in expected.items():
        assert relative(resumed[name], value) < 1e-5, name
