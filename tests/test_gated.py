"""Gated linear attention and gated delta net: every form against the definition, and the calls of the kernels."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import relative, tiny

import open_lm_linear as oll
from open_lm_linear.attention.gated_delta import GatedDeltaNet
from open_lm_linear.attention.gated_linear import GatedLinearAttention
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.convert import main as convert
from open_lm_linear.generate import generate
from open_lm_linear.hf.export import export_hf
from open_lm_linear.hf.wrap import wrap
from open_lm_linear.model import create_model
from open_lm_linear.ops import gated_delta, gated_linear, kernels
from open_lm_linear.rotary import Rotary

Tensor = torch.Tensor
B, H, HKV, K, V = 2, 4, 2, 8, 6
MIXERS = {"gated_linear": GatedLinearAttention, "gated_delta": GatedDeltaNet}
every_mixer = pytest.mark.parametrize("name", MIXERS)
GATES = {
    "near 1": lambda u: -1e-3 * u,
    "near 0": lambda u: -20 * u,
    "both": lambda u: torch.where(u < 0.3, -100 * u, -1e-2 * u),
    "at 0": lambda u: torch.where(u < 0.2, -1e4, 0.0) - 1e-3 * u,
}


def inputs_of(name: str, tokens: int, gates: str = "both") -> dict[str, Tensor]:
    """The arguments of a mixer's operator, a state among them."""
    found = {
        "q": torch.randn(B, tokens, H, K),
        "k": torch.randn(B, tokens, HKV, K),
        "v": torch.randn(B, tokens, HKV, V),
    }
    if name == "gated_linear":
        found["log_gate"] = GATES[gates](torch.rand(B, tokens, HKV, K))
    else:
        found["k"] = F.normalize(found["k"], dim=-1)
        found |= {"log_gate": GATES[gates](torch.rand(B, tokens, HKV)), "b": torch.rand(B, tokens, HKV)}
    return {**found, "state": torch.randn(B, HKV, K, V)}


def forms(name: str):
    """Operator, definition, chunked form."""
    if name == "gated_linear":
        return gated_linear.gated_linear_attention, gated_linear.gla_naive, gated_linear.gla_chunked
    return gated_delta.gated_delta_rule, gated_delta.delta_naive, gated_delta.delta_chunked


# ---------------------------------------------------------------- the operators


def test_the_definitions_are_their_formulas():
    """Written with whole matrices, for one head."""
    x = {name: value.double() for name, value in inputs_of("gated_delta", 9).items()}
    alpha = torch.rand(B, 9, HKV, K).double()
    linear, _ = gated_linear.gla_naive(x["q"], x["k"], x["v"], alpha.log(), x["state"])
    delta, _ = gated_delta.delta_naive(**x)
    for row, head in ((0, 0), (1, 3)):
        kv = head // 2
        S, D = x["state"][row, kv], x["state"][row, kv]
        for t in range(9):
            q, k, v = x["q"][row, t, head], x["k"][row, t, kv], x["v"][row, t, kv]
            S = torch.diag(alpha[row, t, kv]) @ S + torch.outer(k, v)
            b, a = x["b"][row, t, kv], x["log_gate"][row, t, kv].exp()
            D = a * (torch.eye(K) - b * torch.outer(k, k)) @ D + b * torch.outer(k, v)
            assert relative(linear[row, t, head], q @ S) < 1e-12
            assert relative(delta[row, t, head], q @ D) < 1e-12


@every_mixer
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 65, 150])
@pytest.mark.parametrize("documents", [False, True])
def test_chunks_and_their_gradients_are_the_definitions(name, gates, tokens, documents):
    _, naive, chunked = forms(name)
    inputs, first = inputs_of(name, tokens, gates), torch.rand(B, tokens) < 0.05 if documents else None
    weights = torch.randn(B, tokens, H, V), torch.randn(B, HKV, K, V)
    results = []
    for form, dtype in ((chunked, torch.float32), (naive, torch.float64)):
        given = {key: x.to(dtype).requires_grad_() for key, x in inputs.items()}
        both = form(**given, first=first)
        assert all(x.dtype == dtype for x in both)
        total = sum((x * w).sum() for x, w in zip(both, weights, strict=True))
        results.append((*both, *torch.autograd.grad(total, list(given.values()))))
    for got, exact in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert relative(got, exact) < 1e-5


@every_mixer
def test_a_document_begins_with_nothing(name):
    operator, _, _ = forms(name)
    inputs, first = inputs_of(name, 90), torch.zeros(B, 90, dtype=torch.bool)
    first[:, 70] = True
    out, state = operator(**inputs, first=first)
    late = {key: x[:, 70:] for key, x in inputs.items() if key != "state"}
    alone, alone_state = operator(**late)
    assert relative(out[:, 70:], alone) < 1e-5 and relative(state, alone_state) < 1e-5


@every_mixer
def test_half_precision_keeps_a_float32_state(name):
    operator, naive, _ = forms(name)
    inputs = inputs_of(name, 100)
    half = {key: x.bfloat16() if key in "qkv" else x for key, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out, state = operator(**half)
    exact, exact_state = naive(**half)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative(out, exact) < 1e-2 and relative(state, exact_state) < 1e-5


# ---------------------------------------------------------------- the layers


def layer_of(name: str, **options):
    torch.manual_seed(3)
    layer = MIXERS[name](tiny(name, n_heads_kv=2), options, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("activation", ["softmax", "identity"])
@pytest.mark.parametrize("rotary_at", ["projection", "none"])
@every_mixer
def test_a_layer_is_its_formula(name, rotary_at, activation):
    options = {"feature_activation": activation} if name == "gated_linear" else {"normaliser": "group_norm"}
    layer = layer_of(name, **options, rotary_at=rotary_at, output_gate=True)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    q, k, v = layer._project(x)
    if rotary_at == "projection":
        q, k = Rotary(layer.arch, 8)(q, k, torch.arange(30)[None])
    if name == "gated_linear":
        if activation == "softmax":
            q, k = (torch.cat((z.softmax(-1), (-z).softmax(-1)), -1) for z in (q, k))
        gate = layer._totrain_forget
        alpha = torch.sigmoid(x @ gate.down.weight.T @ gate.up.weight.T + gate.up.bias) ** (1 / 16)
        out, S = gated_linear.gla_naive(q / q.shape[-1] ** 0.5, k, v, alpha.log().unflatten(-1, (2, -1)))
        out = out / (out.square().mean(-1, True) + 1e-5).sqrt()
    else:
        q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
        gate, b = layer._totrain_decay, torch.sigmoid(x @ layer._totrain_write.weight.T)
        log_gate = -gate.A_log.exp() * (1 + (x @ gate.weight.T + gate.dt_bias).exp()).log()
        out, S = gated_delta.delta_naive(q / 8**0.5, k, v, log_gate, b)
        out = (out - out.mean(-1, True)) / (out.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    out = layer.out_proj(2 * torch.sigmoid(x @ layer._totrain_gate.weight.T) * out.flatten(2))
    got, state = layer(x, torch.arange(30)[None])
    assert relative(got, out) < 1e-9
    if name == "gated_delta":
        assert relative(state.S, S) < 1e-9


def test_gates_begin_near_one_whatever_the_input():
    x = 100 * torch.randn(1, 5, 32)
    alpha = GatedLinearAttention(tiny(), {}, 0)._totrain_forget(x).exp()
    assert alpha.min() > 0.998 and alpha.max() < 1 and alpha.shape == (1, 5, 4, 8)
    layer = GatedDeltaNet(tiny(), {}, 0)
    memory = -1 / layer._totrain_decay(x)[0]
    assert torch.allclose(memory, torch.tensor([1000.0, 215.44, 46.416, 10.0]), rtol=1e-3)
    assert (layer._totrain_write(x) == 0.5).all()


@every_mixer
def test_query_heads_share_the_state_of_their_key_head(name):
    model = create_model(tiny(name, n_heads_kv=2))
    grouped, full = model.state_bytes(1, 100), create_model(tiny(name)).state_bytes(1, 100)
    assert 2 * grouped == full == create_model(tiny(name)).state_bytes(1, 10**6)
    assert model.flops_per_token(64) == model.flops_per_token(4096)


def test_a_gate_rank_of_nothing_is_refused():
    with pytest.raises(UserError, match="gate_rank must be above 0"):
        create_model(tiny("gated_linear", {"gate_rank": 0}))


# ---------------------------------------------------------------- the swap


@every_mixer
def test_swap_and_generation(name, tmp_path, capsys):
    """A teacher's weights are kept but for the new; text goes on from a state."""
    torch.manual_seed(0)
    teacher = create_model(tiny("softmax", n_heads_kv=2, qk_norm=True, model_norm="rms_norm"))
    wrap(teacher).save_pretrained(tmp_path / "teacher")
    convert([str(tmp_path / "teacher"), str(tmp_path / "swapped"), "--attn-name", name, "--output-gate"])
    assert f"attention softmax -> {name}" in capsys.readouterr().out
    model = oll.load_pretrained(tmp_path / "swapped")
    weights = model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in teacher.state_dict().items())
    assert model.new_keys() == set(weights) - set(teacher.state_dict())
    prompt = torch.randint(0, 61, (2, 5))
    ids = generate(model, prompt, max_new_tokens=6, temperature=0.0)
    with torch.no_grad():
        for t in range(5, 11):
            assert torch.equal(model(ids[:, :t])[0][:, -1].argmax(-1), ids[:, t])


def test_an_export_carries_both_mixers(tmp_path):
    """One of them in a layer of its own."""
    model = create_model(tiny("gated_linear", attn_layers={"gated_delta": [1]}))
    assert export_hf(model, tmp_path / "hf").differences.reloaded < 1e-5


def test_their_options_are_flags():
    flags = ["--model", "open_lm_11m", "--dataset-type", "synthetic", "--train-num-samples", "8"]
    cfg = from_cli([*flags, "--attn-name", "gated_linear", "--gate-rank", "4", "--normaliser", "none"])
    assert cfg.model.attn == {"gate_rank": 4, "normaliser": "none"}


# ---------------------------------------------------------------- the kernels' calls


class Recorder:
    """Kernels of flash-linear-attention by their definition, with its names, layouts and checks; keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def chunk_gla(self, q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert q.shape == k.shape == g.shape
        return self.run("chunk_gla", gated_linear.gla_naive, (q, k, v, g), scale, initial_state, cu_seqlens)

    def fused_recurrent_gla(
        self, q, k, v, gk=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        assert q.shape == k.shape == gk.shape
        return self.run("fused_recurrent_gla", gated_linear.gla_naive, (q, k, v, gk), scale, initial_state, cu_seqlens)

    def chunk_gated_delta_rule(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        assert q.shape == k.shape and g.shape == beta.shape == v.shape[:3]
        given = (q, k, v, g, beta)
        return self.run("chunk_gated_delta_rule", gated_delta.delta_naive, given, scale, initial_state, cu_seqlens)

    def fused_recurrent_gated_delta_rule(self, q, k, v, g=None, beta=None, **options):
        out = self.chunk_gated_delta_rule(q, k, v, g, beta, **options)
        self.calls[-1] = ("fused_recurrent_gated_delta_rule", self.calls[-1][1])
        return out

    def run(self, name, naive, given, scale, state, cu_seqlens):
        self.calls.append((name, {"scale": scale, "state": state, "cu_seqlens": cu_seqlens, "shape": given[0].shape}))
        assert state is None or state.dtype == torch.float32
        q, *others = given
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        if cu_seqlens is None:
            out, S = naive(q, *others, state)
            return out.to(q.dtype), S.float()
        assert q.shape[0] == 1 and (state is None or len(state) == len(cu_seqlens) - 1)
        outs, states = [], []
        for n, (begin, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            before = None if state is None else state[n : n + 1]
            out, S = naive(q[:, begin:end], *(x[:, begin:end] for x in others), before)
            outs.append(out)
            states.append(S)
        return torch.cat(outs, 1).to(q.dtype), torch.cat(states).float()


@pytest.fixture
def fla(monkeypatch) -> Recorder:
    recorder = Recorder()
    for module in (gated_linear, gated_delta):
        monkeypatch.setattr(module, "fla_module", lambda name, x: recorder)
    return recorder


CHUNK = {"gated_linear": "chunk_gla", "gated_delta": "chunk_gated_delta_rule"}
RECURRENT = {"gated_linear": "fused_recurrent_gla", "gated_delta": "fused_recurrent_gated_delta_rule"}


@every_mixer
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("documents", ["none", "inside", "at once"])
def test_a_kernel_gets_what_the_definition_gets(name, with_state, documents, fla):
    operator, naive, _ = forms(name)
    inputs, first = inputs_of(name, 20), None
    if not with_state:
        inputs["state"] = None
    if documents != "none":
        first = torch.zeros(B, 20, dtype=torch.bool)
        first[0, 7] = first[0, 8] = first[1, 0] = True
        first[0, 0] = documents == "at once"
    given = {key: None if x is None else x.clone().requires_grad_() for key, x in inputs.items()}
    out, state = operator(**given, first=first)
    exact, exact_state = naive(**inputs, first=first)
    assert relative(out, exact) < 1e-6 and relative(state, exact_state) < 1e-6
    (called, seen), *more = fla.calls
    assert called == CHUNK[name] and not more and seen["scale"] == 1.0
    assert seen["shape"] == ((B, 20, H, K) if first is None else (1, B * 20, H, K))
    assert (None if first is None else seen["cu_seqlens"].tolist()) == (None if first is None else [0, 7, 8, 20, 40])
    if with_state:  # the gradient finds its way through the heads that were repeated
        state.square().sum().backward()
        through = given["state"].grad
        given["state"].grad = None
        with pytest.MonkeyPatch.context() as patch:
            for module in (gated_linear, gated_delta):
                patch.setattr(module, "fla_module", lambda name, x: None)
            operator(**given, first=first)[1].square().sum().backward()
        assert relative(through, given["state"].grad) < 1e-5


@every_mixer
def test_few_tokens_without_a_gradient_take_the_recurrent_kernel(name, fla):
    operator, _, _ = forms(name)
    with torch.no_grad():
        for tokens in (1, 64, 65):
            operator(**inputs_of(name, tokens))
    operator(**inputs_of(name, 1))
    assert [called for called, _ in fla.calls] == [RECURRENT[name], RECURRENT[name], CHUNK[name], CHUNK[name]]


@every_mixer
def test_a_model_is_the_same_by_kernels(name, fla, monkeypatch):
    """Packed documents and padding through the whole model, then one token more."""
    torch.manual_seed(0)
    model, ids = create_model(tiny(name, n_heads_kv=2)), torch.randint(0, 61, (2, 40))
    mask, first = torch.ones(2, 40), torch.rand(2, 40) < 0.1
    mask[1, :9] = 0
    results = []
    for _ in range(2):
        with torch.no_grad():
            logits, _, past = model(ids, attention_mask=mask, first=first, use_cache=True)
            results.append(torch.cat((logits, model(ids[:, :1], past_key_values=past)[0]), 1)[mask[:, :1].bool()[:, 0]])
        for module in (gated_linear, gated_delta):
            monkeypatch.setattr(module, "fla_module", lambda name, x: None)
    assert len(fla.calls) == 4 and relative(*results) < 1e-5


def test_kernels_are_for_half_precision_on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    monkeypatch.setattr(kernels, "_imported", lambda module: module)
    cuda = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert kernels.fla_module("gla", cuda) == "fla.ops.gla"
    assert kernels.fla_module("gla", SimpleNamespace(is_cuda=True, dtype=torch.float32)) is None
    assert kernels.fla_module("gla", torch.zeros(1, dtype=torch.bfloat16)) is None


def test_cuda_without_the_package_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    kernels._installed.cache_clear()
    cuda = SimpleNamespace(is_cuda=True, dtype=torch.float16)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert [kernels.fla_module(name, cuda) for name in ("gla", "gated_delta_rule", "gla")] == [None] * 3
    finally:
        kernels._installed.cache_clear()
    assert len(said) == 1 and "open_lm_linear[gpu]" in str(said[0].message)
