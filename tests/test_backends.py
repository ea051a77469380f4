"""Who computes linear attention: the choice, its refusals, and the calls of others' kernels by stand-ins."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import relative, tiny

from open_lm_linear import train
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.model import create_model
from open_lm_linear.ops import backends
from open_lm_linear.ops.linear_attention import chunked, naive

B, T, H, HKV, K, V = 2, 20, 4, 2, 32, 20


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    yield
    backends.use_backend("")


def inputs(dtype=torch.float32):
    """q, k, v, log_decay."""
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, HKV, K) / K**0.5, torch.randn(B, T, HKV, V)
    return [x.to(dtype) for x in (q, k, v)] + [-torch.rand(H)]


def test_flag_beats_environment_beats_auto(monkeypatch):
    assert backends.chosen_backend() == "auto"
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
    assert backends.chosen_backend() == "torch"
    backends.use_backend("fla")
    assert backends.chosen_backend() == "fla"
    with pytest.raises(UserError, match="unknown linear attention backend 'tritn'; there are: triton"):
        backends.use_backend("tritn")
    backends.use_backend("")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cuda")
    with pytest.raises(UserError, match="OPEN_LM_LINEAR_BACKEND=cuda"):
        backends.linear_operator(*inputs())


def test_training_takes_the_flag():
    flags = ["--model", "open_lm_11m", "--dataset-type", "synthetic", "--train-num-samples", "8"]
    for more, name in ((["--linear-backend", "torch"], "torch"), ([], "auto")):
        cfg = from_cli([*flags, *more])
        ctx, log = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(say=print)
        train._choose_backend(cfg, create_model(tiny()), ctx, log)
        assert backends.chosen_backend() == name


@pytest.mark.parametrize("name", ["fla", "lightning"])
def test_what_was_asked_for_and_is_not_here_is_refused(name):
    backends.use_backend(name)
    with pytest.raises(UserError, match=f"backend {name}: it needs a GPU; backend auto or torch runs here"):
        create_model(tiny())(torch.zeros(1, 3, dtype=torch.long))


def test_every_backend_says_what_it_cannot_take(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name, gpu: "")
    half, wide = inputs(torch.bfloat16), inputs()
    trained = half[:3] + [half[3].clone().requires_grad_()]
    flags = torch.zeros(B, T, dtype=torch.bool)
    empty = (None, None, None)
    assert not any(backends.why_not(name, *half, *empty) for name in backends.BACKENDS[1:])
    assert "bfloat16 or float16, not float32" in backends.why_not("fla", *wide, *empty)
    assert not backends.why_not("triton", *wide, *empty)
    assert "not float64" in backends.why_not("triton", *(x.double() for x in wide), *empty)
    assert not any(backends.why_not(name, *trained, *empty) for name in ("triton", "fla"))
    assert "decays that are fixed" in backends.why_not("lightning", *trained, *empty)
    with torch.no_grad():
        assert not backends.why_not("lightning", *trained, *empty)
    by_token = half[3].expand(B, T, -1)
    assert "not one for each token" in backends.why_not("triton", *half[:3], by_token, *empty)
    vast = [x[..., :1].expand(-1, -1, -1, 257) for x in half[:3]]
    assert "up to 256 dimensions, not 257" in backends.why_not("triton", *vast, half[3], *empty)
    for more in ((torch.zeros(B, H, K, V), None, None), (None, flags, None), (None, None, flags)):
        assert "whole sequences" in backends.why_not("lightning", *half, *more)
        assert not backends.why_not("triton", *half, *more)


def test_auto_on_a_gpu_takes_triton_or_says_once_why_not(monkeypatch):
    monkeypatch.setattr(backends, "on_gpu", lambda x: True)
    q, k, v, decay = inputs()
    lacks = {"triton": "it is not installed"}
    monkeypatch.setattr(backends, "missing", lambda name, gpu: lacks[name])
    backends._said.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            out, _ = backends.linear_operator(q, k, v, decay)
    assert relative(out, chunked(q, k, v, decay)[0]) < 1e-6
    assert [str(x.message) for x in said] == [
        "linear attention runs in its torch form, which is slower on a GPU: it is not installed"
    ]
    lacks["triton"] = ""
    kernel = SimpleNamespace(triton_attention=lambda *x: ("triton", x))
    monkeypatch.setitem(backends.KERNEL_MODULES, "triton", kernel)
    keep = torch.ones(B, T, dtype=torch.bool)
    assert backends.linear_operator(q, k, v, decay, None, None, keep) == ("triton", (q, k, v, decay, None, None, keep))


class SimpleGLA:
    """fla.ops.simple_gla by the definition, with its names, layouts and checks; keeps the calls."""

    def __init__(self):
        self.calls = []

    def chunk_simple_gla(
        self, q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
    ):
        assert q.shape == k.shape and v.shape[:3] == q.shape[:3] and scale == 1.0 and output_final_state
        assert (g is None) != (g_gamma is None) and (g is None or g.shape == q.shape[:3])
        self.calls.append(("chunk", "g" if g_gamma is None else "g_gamma"))
        decay = g_gamma if g is None else g
        if cu_seqlens is None:
            out, S = naive(q, k, v, decay, initial_state)
            return out.to(q.dtype), S.float()
        assert q.shape[0] == 1 and (initial_state is None or len(initial_state) == len(cu_seqlens) - 1)
        outs, states = [], []
        for n, (begin, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            span = slice(int(begin), int(end))
            before = None if initial_state is None else initial_state[n : n + 1]
            out, S = naive(*(x[:, span] for x in (q, k, v)), decay if g is None else g[:, span], before)
            outs.append(out)
            states.append(S)
        return torch.cat(outs, 1).to(q.dtype), torch.cat(states).float()

    def fused_recurrent_simple_gla(self, *args, **options):
        found = self.chunk_simple_gla(*args, **options)
        self.calls[-1] = ("recurrent", self.calls[-1][1])
        return found


@pytest.fixture
def fla(monkeypatch):
    kernels = SimpleGLA()
    monkeypatch.setattr(backends, "missing", lambda name, gpu: "")
    monkeypatch.setitem(backends.KERNEL_MODULES, "fla", kernels)
    backends.use_backend("fla")
    return kernels


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fla_gets_what_the_definition_gets(packed, padded, fla):
    q, k, v, decay = inputs(torch.float16)
    keep = torch.rand(B, T) > 0.2 if padded else None
    first = torch.rand(B, T) < 0.1 if packed else None
    if keep is not None:
        k = k * keep[:, :, None, None]
    state = torch.randn(B, H, K, V)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    out, last = backends.linear_operator(q, k, v, decay, state, first, keep)
    per_token = decay if keep is None else decay * keep[:, :, None]
    exact, exact_last = naive(q, k, v, per_token, state, first)
    assert relative(out, exact) < 1e-3 and relative(last, exact_last) < 1e-5
    assert fla.calls == [("chunk", "g" if padded else "g_gamma")]
    ours, theirs = (torch.autograd.grad(x.double().square().sum(), leaves) for x in (out, exact))
    assert all(relative(a, b) < 1e-2 for a, b in zip(ours, theirs, strict=True))


def test_fla_few_tokens_no_decay_and_trained_decays(fla):
    q, k, v, decay = inputs(torch.float16)
    with torch.no_grad():
        out, _ = backends.linear_operator(q[:, :1], k[:, :1], v[:, :1], None)
    assert relative(out, naive(q[:, :1], k[:, :1], v[:, :1])[0]) < 1e-3
    decay.requires_grad_()
    gradients = []
    for form in (backends.linear_operator, naive):
        gradients.append(torch.autograd.grad(form(q, k, v, decay)[0].double().square().sum(), decay)[0])
    assert relative(*gradients) < 1e-2
    assert fla.calls == [("recurrent", "g_gamma"), ("chunk", "g")]


def test_lightning_gets_its_layout_and_the_state_comes_beside_it(monkeypatch):
    def lightning_attn_func(q, k, v, s):
        assert q.shape == k.shape and q.is_contiguous() and s.shape == (H, 1, 1) and (s >= 0).all()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return naive(q, k, v, -s.flatten())[0].to(q.dtype).transpose(1, 2)

    monkeypatch.setattr(backends, "missing", lambda name, gpu: "")
    kernels = SimpleNamespace(lightning_attn_func=lightning_attn_func)
    monkeypatch.setitem(backends.KERNEL_MODULES, "lightning", kernels)
    backends.use_backend("lightning")
    q, k, v, decay = inputs(torch.bfloat16)
    for given in (decay, None):
        out, last = backends.linear_operator(q, k, v, given)
        exact, exact_last = naive(q, k, v, given)
        assert relative(out, exact) < 1e-2 and relative(last, exact_last) < 1e-5
    with pytest.raises(UserError, match="backend lightning: it takes whole sequences"):
        backends.linear_operator(q, k, v, decay, last)


def test_the_mark_of_a_constant_is_that_of_torch():
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(backends.constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
