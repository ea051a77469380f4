"""Mamba beyond the contract that every attention keeps: its scan, its initialisation, its checkpoints, the swap."""

from __future__ import annotations

import json
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative, tiny
from test_families import random_model

import open_lm_linear as oll
from open_lm_linear import gauges, optim
from open_lm_linear.architecture import ModelConfig, shipped
from open_lm_linear.attention.mamba import MambaMixer, MambaState
from open_lm_linear.cli import UserError
from open_lm_linear.generate import generate
from open_lm_linear.model import Transformer, create_model, read_config
from open_lm_linear.ops import selective_scan as scans
from open_lm_linear.parallel import Context
from open_lm_linear.parity import verify
from open_lm_linear.pretrained import describe, open_source
from open_lm_linear.pretrained.copies import convert, prepare
from open_lm_linear.pretrained.families import from_hugging_face

Tensor = torch.Tensor
BATCH, TOKENS, CHANNELS, STATES = 2, 150, 6, 5


def small(**fields: Any) -> ModelConfig:
    return tiny("mamba", fields.pop("options", {}), ffn_type="none", **fields)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of the scan, some steps so long that the state is forgotten at once."""
    torch.manual_seed(3)
    x, dt = torch.randn(BATCH, TOKENS, CHANNELS), 4 * torch.randn(BATCH, TOKENS, CHANNELS)
    B, C = torch.randn(BATCH, TOKENS, STATES), torch.randn(BATCH, TOKENS, STATES)
    A = -torch.exp(torch.randn(CHANNELS, STATES))
    values = {"x": x, "dt": dt, "dt_bias": torch.randn(CHANNELS), "A": A, "B": B, "C": C, "D": torch.randn(CHANNELS)}
    return {name: value.to(dtype) for name, value in values.items()}


def naive(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **masks: Any
) -> tuple[Tensor, Tensor]:
    """The formula in float64, one channel of one row at a time."""
    keep, first, state = masks.get("keep"), masks.get("first"), masks.get("state")
    out = torch.zeros(x.shape, dtype=torch.float64)
    h = torch.zeros(BATCH, CHANNELS, STATES, dtype=torch.float64) if state is None else state.double().clone()
    for b in range(BATCH):
        for e in range(CHANNELS):
            for t in range(x.shape[1]):
                step = math.log1p(math.exp(float(dt[b, t, e] + dt_bias[e]))) if keep is None or keep[b, t] else 0.0
                past = 0 * h[b, e] if first is not None and first[b, t] else h[b, e]
                h[b, e] = torch.exp(step * A[e].double()) * past + step * B[b, t].double() * float(x[b, t, e])
                out[b, t, e] = (C[b, t].double() * h[b, e]).sum() + float(D[e] * x[b, t, e])
    return out, h


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_scan_is_the_formula(masked: bool) -> None:
    values, masks = inputs(), {}
    if masked:
        masks = {"keep": torch.rand(BATCH, TOKENS) < 0.8, "first": torch.rand(BATCH, TOKENS) < 0.05}
        masks["state"] = torch.randn(BATCH, CHANNELS, STATES)
    out, state = scans.scan(**values, **masks)
    exact, last = naive(**values, **masks)
    assert relative(out, exact) < 1e-6 and relative(state, last) < 1e-6
    for chunk in (1, 7, TOKENS):
        other, after = scans.scan(**values, **masks, chunk=chunk)
        assert relative(other, exact) < 1e-6 and relative(after, last) < 1e-6


def test_the_gradients_of_the_scan_are_those_of_the_formula() -> None:
    values = {name: value[:, :9] if value.dim() == 3 else value for name, value in inputs(torch.float64).items()}
    state = torch.randn(BATCH, CHANNELS, STATES, dtype=torch.float64)
    first = torch.zeros(BATCH, 9, dtype=torch.bool)
    first[1, 4] = True
    leaves = [value.requires_grad_() for value in (*values.values(), state)]

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(values, leaves[:-1], strict=True))
        return scans.scan(**named, first=first, state=leaves[-1], chunk=4)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_what_is_kept_for_the_gradients_is_a_state_a_chunk() -> None:
    """Of the tensors with a value for every token, channel and state, of which there are several, none."""
    torch.manual_seed(0)
    layer = MambaMixer(small(), {"d_state": 64}, 0)
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = 512
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        layer(torch.randn(1, tokens, 32), torch.arange(tokens)[None])
    everything = 4 * tokens * layer.channels * 64
    assert 0 < sum(sizes.values()) < everything / 4


# ---------------------------------------------------------------- the kernel of mamba_ssm


def kernel(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, **more: Any) -> Any:
    """Asks of its arguments what the CUDA kernel asks, and computes what it does."""
    batch, channels, tokens = u.shape
    states = A.shape[1]
    assert delta.shape == u.shape and B.shape == C.shape == (batch, states, tokens)
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == D.dtype == torch.float32
    assert all(value.is_contiguous() for value in (u, delta, B, C)) and z is None
    assert more.keys() == {"delta_bias", "delta_softplus", "return_last_state"} and more["delta_bias"].dim() == 1
    step = F.softplus(delta.float() + more["delta_bias"][:, None])
    h, outs = torch.zeros(batch, channels, states), []
    for t in range(tokens):
        h = torch.exp(step[..., t, None] * A) * h + (step * u)[..., t, None] * B[:, None, :, t]
        outs.append((h * C[:, None, :, t]).sum(-1) + D * u[..., t])
    return torch.stack(outs, -1).to(u.dtype), h


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_kernel_is_called_as_it_wants(dtype: torch.dtype, limit: float) -> None:
    values = inputs()
    out, state = scans.scan(**values)
    rounded = {name: value.to(dtype) if value.dim() == 3 else value for name, value in values.items()}
    fused, last = scans.fused(kernel, **rounded)
    assert fused.dtype == dtype and last.dtype == torch.float32
    assert relative(fused, out) < limit and relative(last, state) < limit


def test_without_the_kernel_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scans._mamba_ssm.cache_clear()
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.warns(UserWarning, match=r"open_lm_linear\[mamba\]"):
        assert scans._mamba_ssm() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scans._mamba_ssm() is None
    scans._mamba_ssm.cache_clear()
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = kernel  # type: ignore[attr-defined]
    assert scans._mamba_ssm() is kernel
    scans._mamba_ssm.cache_clear()


# ---------------------------------------------------------------- the layer and the model


def test_it_begins_as_mamba_ssm_does() -> None:
    model = create_model(small(n_layers=9, hidden_dim=64))
    layer = model.layers[3].attention
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
    steps = F.softplus(layer.dt_proj.bias)
    assert 1e-3 * 0.999 < steps.min() < 3e-3 and 3e-2 < steps.max() < 0.1 * 1.001
    assert layer.rank == 4 and layer.dt_proj.weight.abs().max() <= 0.5
    assert torch.equal(layer.D, torch.ones(128))
    # torch's own bound is 1 / sqrt(128), and the depth divides by 3
    assert 0.9 < layer.out_proj.weight.abs().max() * 3 * math.sqrt(128) <= 1.0


def test_weight_decay_spares_the_decays() -> None:
    model = create_model(small())
    optimizer = optim.build(model, optim.OptimConfig(wd=0.1), ())
    decayed = {n for group in optimizer.param_groups if group["weight_decay"] for n in group["names"]}
    parts = {name.rpartition("attention.")[2] for name in decayed if "attention." in name}
    assert parts == {f"{part}.weight" for part in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}


def test_a_block_without_feed_forward() -> None:
    model, fed = create_model(small()), create_model(tiny("mamba"))
    assert not any("feed_forward" in key or "ffn_norm" in key for key in model.state_dict())
    more = sum(p.numel() for block in fed.layers for p in block.feed_forward.parameters())
    assert fed.flops_per_token(64) - model.flops_per_token(64) == 2 * more
    softmax = create_model(tiny("softmax", ffn_type="none", norm_placement="both"))
    assert softmax(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()
    with pytest.raises(UserError, match="ffn_bias does not belong to ffn_type none"):
        small(ffn_bias=True)


def test_selective_recomputation_gives_the_same_gradients() -> None:
    model, ids, grads = create_model(small()).train(), torch.randint(61, (2, 80)), []
    for model.grad_checkpointing, model.grad_checkpointing_mode in ((0, "full"), (1, "selective")):
        model.zero_grad()
        model.loss(ids, ids)[1].backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    assert all(relative(grads[1][key], grads[0][key]) < 1e-6 for key in grads[0])


@pytest.mark.parametrize("lengths", [(100,), (64, 36)])
def test_a_bfloat16_model_keeps_a_float32_state(lengths: tuple[int, ...]) -> None:
    model, ids = create_model(small()).eval(), torch.randint(61, (2, 100))
    with torch.no_grad():
        exact, past, begin, parts = model(ids)[0], None, 0, []
        model.to(torch.bfloat16)
        for length in lengths:
            logits, _, past = model(ids[:, begin : begin + length], past_key_values=past, use_cache=True)
            begin, parts = begin + length, [*parts, logits]
    assert past is not None
    for state in past.layers:
        assert isinstance(state, MambaState)
        assert (state.S.dtype, state.tail.dtype) == (torch.float32, torch.bfloat16)
    assert past.nbytes() == model.state_bytes(2, 1) == model.state_bytes(2, 10**6)
    assert relative(torch.cat(parts, 1), exact) < 0.05


def test_it_compiles() -> None:
    """A call of many tokens around the scan, whose loop is not unrolled; one token whole."""
    model, ids, grads = create_model(small()).train(), torch.randint(61, (2, 20)), []
    with torch.no_grad():
        logits, _, past = model.eval()(ids, use_cache=True)
        after = model(ids[:, :1], past_key_values=past)[0]
        one = torch.compile(lambda x: model(x, past_key_values=past)[0], backend="eager", fullgraph=True)
        assert relative(one(ids[:, :1]), after) < 1e-6
    model.train()
    for compiled in (False, True):
        for layer in model.layers:
            if compiled:
                layer.compile(backend="eager")
        model.zero_grad()
        model.loss(ids, ids)[1].backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    assert all(relative(grads[1][key], grads[0][key]) < 1e-6 for key in grads[0])
    assert relative(model(ids)[0], logits) < 1e-6


def test_it_generates_and_is_gauged() -> None:
    model = create_model(small()).eval()
    prompt = torch.tensor([[0, 0, 5, 9], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    texts = generate(model, prompt, max_new_tokens=12, attention_mask=mask, prefill_chunk=3)
    for row, begin in ((0, 2), (1, 0)):
        ids = prompt[row, begin:].tolist()
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        assert texts[row, begin:].tolist() == ids
    found = gauges.probe_states(model, prompt, Context(0, 1, torch.device("cpu"), "fp32"))
    assert 0 < found["state_norm_min"] < found["state_norm_max"] and len(found) == 3


# ---------------------------------------------------------------- configs and checkpoints


@pytest.mark.parametrize(("name", "width", "layers"), [("130m", 768, 12), ("1b", 2048, 36), ("7b", 4096, 64)])
def test_openlms_own_json_is_the_shipped_model(name: str, width: int, layers: int, tmp_path: Path) -> None:
    path = tmp_path / "mamba.json"
    path.write_text(json.dumps({"d_model": width, "n_layer": layers, "vocab_size": 50432, "seq_len": 2048}))
    with torch.device("meta"):
        theirs, ours = Transformer(read_config(path)), Transformer(read_config(f"mamba_{name}"))
    assert theirs.config == ours.config and f"mamba_{name}" in shipped("models", ".json")
    assert "heads" not in describe(ours.config)
    count = sum(p.numel() for p in ours.parameters())
    assert count == {"130m": 83_992_320, "1b": 1_055_188_992, "7b": 6_946_557_952}[name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"options": {"d_state": 0}}, "d_state must be above 0, not 0"),
        ({"options": {"dt_rank": -1}}, "dt_rank must be above 0, not -1"),
        ({"options": {"d_stat": 8}}, "unknown model config key 'd_stat'.*d_state"),
        ({"qk_norm": True}, "qk_norm is of queries and keys"),
    ],
)
def test_what_mamba_cannot_be_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        create_model(small(**change))


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "relu"), ("intermediate_size", 29)])
def test_a_config_of_transformers_beyond_us_is_refused(field: str, value: Any) -> None:
    values = {"model_type": "mamba", "hidden_size": 36, "num_hidden_layers": 2, "vocab_size": 61, field: value}
    with pytest.raises(UserError, match=f"{field} = {value!r} cannot be represented"):
        from_hugging_face(values, source="config.json")


def test_a_transformers_model_is_verified_layer_by_layer(tmp_path: Path) -> None:
    random_model(tmp_path / "theirs", "mamba", intermediate_size=72)
    text = verify(open_source(str(tmp_path / "theirs")), tokens=20)
    assert "parity" in text and "(mamba)" in text
    assert "in float32 (limit" in verify(open_source(str(tmp_path / "theirs")), tokens=20, layers=2)
    convert(prepare(open_source(str(tmp_path / "theirs"))), tmp_path / "ours")
    assert "filled through our table" in verify(open_source(str(tmp_path / "ours")), tokens=20)


@pytest.mark.parametrize(("kind", "attn_name"), [("llama", "mamba"), ("mamba", "linear"), ("mamba", "softmax")])
def test_there_is_no_swap_to_or_from_it(kind: str, attn_name: str, tmp_path: Path) -> None:
    random_model(tmp_path, kind, intermediate_size=72)
    for attempt in (
        lambda: oll.load_pretrained(tmp_path, attn_name),
        lambda: prepare(open_source(str(tmp_path)), attn_name),
    ):
        with pytest.raises(
            UserError, match="cannot be swapped for .*MambaMixer has no queries, keys and values"
        ) as refusal:
            attempt()
        assert "\n" not in str(refusal.value)
