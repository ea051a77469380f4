"""The linear attention operator: chunked, step and quadratic against naive, the definition in float64.

Errors are ||out - ref|| / ||ref||. Bounds: 1e-11 in float64, 1e-5 in float32, 1e-2 in bfloat16.
"""

from __future__ import annotations

import random

import pytest
import torch
from conftest import relative, spans

from open_lm_linear.ops.linear_attention import CHUNK, chunked, linear_attention, naive, quadratic, step

DECAYS = ("none", "fixed", "per token")
SHAPES = [  # B, T, H, Hkv, K, V
    (2, 1, 2, 2, 8, 8),
    (1, CHUNK - 1, 2, 2, 8, 8),
    (2, CHUNK, 4, 2, 8, 4),
    (1, CHUNK + 1, 3, 1, 4, 8),
    (2, 2 * CHUNK, 2, 2, 5, 7),
    (2, 2 * CHUNK + 37, 6, 3, 16, 12),
]


def inputs(shape, decay="fixed", *, state=True, first=True, dtype=torch.float64, strength=1.0):
    """q, k, v, log_decay, state, first of a shape (B, T, H, Hkv, K, V)."""
    batch, tokens, heads, kv_heads, dim_k, dim_v = shape
    wide = torch.promote_types(dtype, torch.float32)
    q = torch.randn(batch, tokens, heads, dim_k, dtype=dtype)
    k = torch.randn(batch, tokens, kv_heads, dim_k, dtype=dtype) / dim_k**0.5
    v = torch.randn(batch, tokens, kv_heads, dim_v, dtype=dtype)
    size = {"fixed": (heads,), "per token": (batch, tokens, heads)}.get(decay)
    log_decay = None if size is None else -strength * torch.rand(size, dtype=wide)
    S = torch.randn(batch, heads, dim_k, dim_v, dtype=wide) if state else None
    resets = torch.rand(batch, tokens) < 0.03 if first else None
    return q, k, v, log_decay, S, resets


def tokenwise(q, k, v, log_decay, state, first):
    """The operator by `step`, one token after another."""
    outs = []
    for t in range(q.shape[1]):
        decay = log_decay[:, t : t + 1] if log_decay is not None and log_decay.dim() == 3 else log_decay
        resets = None if first is None else first[:, t : t + 1]
        out, state = step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], decay, state, resets)
        outs.append(out)
    return torch.cat(outs, 1), state


def by_hand(q, k, v, log_decay, state, first):
    """The unrolled sum, written without a recurrence and for one row and head at a time: what naive must be."""
    batch, tokens, heads, dim_k = q.shape
    groups, out = heads // k.shape[2], torch.zeros(batch, tokens, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                weight, j = 1.0, i
                while j >= 0:
                    out[b, i, h] += weight * (q[b, i, h] @ k[b, j, h // groups]) * v[b, j, h // groups]
                    if first is not None and first[b, j]:
                        break
                    if log_decay is not None:
                        weight *= (log_decay[h] if log_decay.dim() == 1 else log_decay[b, j, h]).exp()
                    j -= 1
                else:
                    if state is not None:
                        out[b, i, h] += weight * (q[b, i, h] @ state[b, h])
    return out


@pytest.mark.parametrize("decay", DECAYS)
def test_naive_is_the_unrolled_sum(decay):
    values = inputs((2, 9, 4, 2, 3, 5), decay)
    values[-1][:, 4] = True
    assert relative(naive(*values)[0], by_hand(*values)) < 1e-13


@pytest.mark.parametrize("first", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_equals_naive(shape, decay, state, first):
    values = inputs(shape, decay, state=state, first=first)
    exact, last = naive(*values)
    narrow = [x if x is None or x.dtype == torch.bool else x.float() for x in values]
    for dtype, given, bound in ((torch.float64, values, 1e-11), (torch.float32, narrow, 1e-5)):
        for form in (chunked, tokenwise, linear_attention):
            out, S = form(*given)
            assert out.dtype == S.dtype == dtype
            assert relative(out, exact) < bound
            assert relative(S, last) < bound
        if decay != "per token" and not state and not first:
            assert relative(quadratic(*given[:4]), exact) < bound


@pytest.mark.parametrize("chunk", [1, 2, 16, 50, 64, 128])
def test_the_chunk_does_not_matter(chunk):
    values = inputs((2, 100, 4, 2, 6, 3), "per token")
    exact, last = naive(*values)
    out, S = chunked(*values, chunk=chunk)
    assert relative(out, exact) < 1e-11
    assert relative(S, last) < 1e-11


@pytest.mark.parametrize("decay", DECAYS)
def test_any_cut_carries_the_state(decay):
    q, k, v, log_decay, state, first = inputs((2, 140, 4, 2, 6, 3), decay)
    exact, last = naive(q, k, v, log_decay, state, first)
    for lengths in ((64, 76), (1, 63, 76), (70, 1, 1, 68), (139, 1)):
        outs = []
        S = state
        for span in spans(lengths):
            g = log_decay[:, span] if decay == "per token" else log_decay
            with torch.no_grad():
                out, S = linear_attention(q[:, span], k[:, span], v[:, span], g, S, first[:, span])
            outs.append(out)
        assert relative(torch.cat(outs, 1), exact) < 1e-11
        assert relative(S, last) < 1e-11


def test_padding_is_a_zero_key_without_decay():
    q, k, v, log_decay, state, _ = inputs((2, 90, 2, 2, 4, 4), "per token", first=False)
    k[:, 30:70], log_decay[:, 30:70] = 0, 0
    real = torch.cat((torch.arange(30), torch.arange(70, 90)))
    alone, last = naive(q[:, real], k[:, real], v[:, real], log_decay[:, real], state)
    for form in (chunked, tokenwise):
        out, S = form(q, k, v, log_decay, state, None)
        assert relative(out[:, real], alone) < 1e-11
        assert relative(S, last) < 1e-11


def test_a_document_that_begins_anywhere_forgets_all():
    """Resets at the edges of a chunk, twice in one chunk, and on the very last token."""
    values = list(inputs((1, 150, 2, 1, 4, 4), "fixed", first=False))
    for at in ([0], [63], [64], [65], [10, 20], [149], [0, 64, 128], list(range(150))):
        first = torch.zeros(1, 150, dtype=torch.bool)
        first[0, at] = True
        values[5] = first
        exact, last = naive(*values)
        for form in (chunked, tokenwise):
            out, S = form(*values)
            assert relative(out, exact) < 1e-11
            assert relative(S, last) < 1e-11
        alone, _ = naive(*(x[:, at[-1] :] for x in values[:3]), values[3])
        assert relative(exact[:, at[-1] :], alone) < 1e-11


# ---------------------------------------------------------------- gradients


def gradients(form, values, dtype):
    """Gradients of a random weighing of output and last state by every floating input that there is."""
    given = [x if x is None or x.dtype == torch.bool else x.to(dtype).requires_grad_() for x in values]
    out, S = form(*given)
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    b = torch.randn(S.shape, generator=generator, dtype=torch.float64)
    leaves = [x for x in given if x is not None and x.requires_grad]
    return torch.autograd.grad((out * a).sum() + (S * b).sum(), leaves)


@pytest.mark.parametrize("first", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], (2, CHUNK + 30, 4, 2, 5, 6)], ids=str)
def test_gradients(shape, decay, state, first):
    """q, k, v, log_decay and state, against autograd through naive."""
    values = [None if x is None else x.detach() for x in inputs(shape, decay, state=state, first=first)]
    if first:
        values[-1][:, shape[1] // 2] = True
    exact = gradients(naive, values, torch.float64)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        for ours, theirs in zip(gradients(chunked, [clone(x) for x in values], dtype), exact, strict=True):
            assert ours.dtype == dtype
            assert relative(ours, theirs) < bound


def clone(x):
    return None if x is None else x.clone()


def test_gradcheck():
    """Against finite differences, over two whole chunks and a rest, a document beginning inside the second."""
    *leaves, first = inputs((1, 5, 2, 1, 2, 2), "per token")
    first[0, 3] = True
    assert torch.autograd.gradcheck(lambda *x: chunked(*x, first, chunk=2), [x.requires_grad_() for x in leaves])


def test_gradients_of_the_output_or_the_state_alone():
    """Each of the two results may be all that a loss sees."""
    for index in (0, 1):
        grads = []
        for form in (naive, chunked):
            torch.manual_seed(0)
            leaves = [x.requires_grad_() for x in inputs((2, 70, 2, 2, 4, 4), "per token", first=False)[:5]]
            grads.append(torch.autograd.grad(form(*leaves)[index].square().sum(), leaves, allow_unused=True))
        for exact, ours in zip(*grads, strict=True):
            ours = torch.zeros_like(exact if exact is not None else leaves[0]) if ours is None else ours
            assert relative(ours, torch.zeros_like(ours) if exact is None else exact) < 1e-10


def test_gradients_only_where_asked():
    q, k, v, *_ = inputs((1, 70, 2, 2, 4, 4))
    v.requires_grad_()
    chunked(q, k, v)[0].sum().backward()
    assert q.grad is None and k.grad is None
    assert torch.isfinite(v.grad).all()


def test_a_second_derivative_is_refused():
    """Its formula is not here: an error is right, and a wrong number would not be."""
    q, k, v, *_ = (x for x in inputs((1, 70, 2, 2, 4, 4))[:3])
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="differenti"):
        torch.autograd.grad(chunked(q, k, v)[0].square().sum(), q, create_graph=True)[0].square().sum().backward()


def test_inputs_are_left_as_they_were():
    values = inputs((2, 100, 4, 2, 6, 3), "per token", dtype=torch.float32)
    before = [clone(x) for x in values]
    leaves = [x.requires_grad_() for x in values[:5]]
    out, S = chunked(*values)
    torch.autograd.grad(out.sum() + S.sum(), leaves)
    step(*(x[:, :1].detach() for x in values[:4]), values[4].detach(), values[5][:, :1])
    assert all(torch.equal(x.detach(), y) for x, y in zip(values, before, strict=True))


# ---------------------------------------------------------------- extremes and dtypes


@pytest.mark.parametrize("decay", ["fixed", "per token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strong_decay_is_finite(decay, dtype):
    """-60 a token: exp(-60 * 64) is 0 and its inverse infinite; neither may reach the result or the gradients."""
    values = inputs((2, 200, 4, 2, 8, 8), decay, dtype=dtype)
    values[3].fill_(-60.0)
    exact, last = naive(*values)
    leaves = [x.requires_grad_() for x in values[:5]]
    out, S = chunked(*values)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(out, exact) < bound
    assert relative(S, last) < bound
    for grad in torch.autograd.grad(out.sum() + S.sum(), leaves):
        assert torch.isfinite(grad).all()


def test_strong_and_weak_decay_in_one_chunk():
    """Where -60 stands between decays near 0, differences of the cumulated log decay still hold in float32."""
    values = inputs((1, 256, 2, 2, 8, 8), "per token", first=False, strength=0.05)
    values[3][:, ::5] = -60.0
    exact, last = naive(*values)
    out, S = chunked(*(None if x is None else x.float() for x in values))
    assert relative(out, exact) < 1e-4
    assert relative(S, last) < 1e-4


def test_slow_decay_over_many_tokens():
    """4096 tokens at the slowest lightning slope of 32 heads and at none: float32 does not drift."""
    values = inputs((1, 4096, 2, 2, 8, 8), "fixed", state=False, first=False)
    values[3][0], values[3][1] = -(2.0**-8), -1e-7
    exact, last = naive(*values)
    out, S = chunked(*(None if x is None else x.float() for x in values))
    assert relative(out, exact) < 1e-5
    assert relative(S, last) < 1e-5


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16(decay):
    """Inputs in bfloat16, state in float32; out is off by less than 1%, and no more after 20 calls than after one."""
    values = inputs((2, 320, 4, 2, 16, 16), decay, dtype=torch.bfloat16, strength=0.1, first=False)
    q, k, v, log_decay, state, _ = values
    exact, last = naive(*values)
    out, S = chunked(*values)
    assert (out.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    assert relative(out, exact) < 1e-2
    assert relative(S, last) < 1e-2
    outs = []
    for span in spans((16,) * 20):
        out, state = chunked(
            q[:, span], k[:, span], v[:, span], log_decay[:, span] if decay == "per token" else log_decay, state
        )
        outs.append(out)
    assert relative(torch.cat(outs, 1), exact) < 1e-2
    assert relative(state, last) < 1e-2
    out, S = tokenwise(*values)
    assert (out.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    assert relative(out, exact) < 1e-2
    assert relative(S, last) < 1e-4  # token by token the products too are float32


def test_bfloat16_gradients():
    values = inputs((2, 200, 4, 2, 16, 16), "per token", dtype=torch.bfloat16, strength=0.1)
    exact = gradients(naive, values, torch.float64)
    leaves = [clone(x).requires_grad_() for x in values[:5]]
    out, S = chunked(*leaves, values[5])
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    b = torch.randn(S.shape, generator=generator, dtype=torch.float64)
    for leaf, ours, theirs in zip(
        leaves, torch.autograd.grad((out * a).sum() + (S * b).sum(), leaves), exact, strict=True
    ):
        assert ours.dtype == leaf.dtype
        assert relative(ours, theirs) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    """The operator computes in the dtype of its inputs, inside an autocast region as outside of one."""
    values = inputs((2, 100, 4, 2, 8, 8), "fixed", dtype=dtype)
    token = (*(x[:, :1] for x in values[:3]), values[3], values[4], values[5][:, :1])

    def run():
        leaves = [clone(x).requires_grad_() for x in values[:5]]
        out, S = chunked(*leaves, values[5])
        return (out, S, *torch.autograd.grad(out.sum() + S.sum(), leaves), *step(*token))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_one_token_takes_the_step_without_a_graph():
    """And with one, the form that has gradients; both give the same."""
    values = [x[:, :1] if x.dim() > 2 and x.shape[1] == 5 else x for x in inputs((2, 5, 4, 2, 8, 8), "fixed")[:5]]
    with torch.no_grad():
        plain, S = linear_attention(*values)
    values[0].requires_grad_()
    graph, S2 = linear_attention(*values)
    assert graph.requires_grad
    assert not plain.requires_grad
    assert relative(plain, graph) < 1e-13
    assert relative(S, S2) < 1e-13


def test_heads_that_cannot_share_are_refused():
    q, k, v, *_ = inputs((1, 4, 4, 2, 4, 4))
    with pytest.raises(ValueError, match="3 key"):
        chunked(q, torch.cat((k, k), 2)[:, :, :3], v)
    with pytest.raises(ValueError, match="heads"):
        chunked(q, k, v[:, :, :1])


@pytest.mark.parametrize("seed", range(20))
def test_random_sweep(seed):
    """Shapes, decays, states and resets drawn at random: all forms and all gradients in float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads = rng.randint(1, 3)
    shape = (
        rng.randint(1, 3),
        rng.randint(1, 90),
        kv_heads * rng.randint(1, 3),
        kv_heads,
        rng.randint(1, 9),
        rng.randint(1, 9),
    )
    values = inputs(
        shape,
        rng.choice(DECAYS),
        state=rng.random() < 0.5,
        first=rng.random() < 0.5,
        strength=rng.choice((1e-3, 0.1, 1.0, 10.0)),
    )
    chunk = rng.choice((1, 3, 8, 16, 64))
    exact, last = naive(*values)
    for out, S in (chunked(*values, chunk=chunk), tokenwise(*values)):
        assert relative(out, exact) < 1e-11
        assert relative(S, last) < 1e-11
    ours = gradients(lambda *given: chunked(*given, chunk=chunk), [clone(x) for x in values], torch.float64)
    for a, b in zip(ours, gradients(naive, [clone(x) for x in values], torch.float64), strict=True):
        assert relative(a, b) < 1e-10


def test_a_long_sequence_in_half_precision_has_the_decays_gradient():
    """Features are never negative, so that sums over the sequence grow; what is rounded must not grow with them."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1500, heads, 16).relu().bfloat16() for heads in (2, 1))
    v, weight = torch.randn(1, 1500, 1, 16).bfloat16(), torch.randn(1, 1500, 2, 16)
    first = torch.rand(1, 1500) < 0.005
    for documents in (None, first):
        found = []
        for dtype in (torch.float64, torch.bfloat16):
            decay = torch.tensor([-0.5, -0.01], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            out, _ = chunked(q.to(dtype), k.to(dtype), v.to(dtype), decay.requires_grad_(), first=documents)
            found.append(torch.autograd.grad((out * weight.to(out.dtype)).sum(), decay)[0])
        assert relative(found[1].double(), found[0]) < 1e-2
