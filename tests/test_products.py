"""bfloat16 on CPUs that have an instruction for its products, and on those that have none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from open_lm_linear import parallel
from open_lm_linear.ops import linear_attention as ops
from open_lm_linear.ops import products
from open_lm_linear.ops.losses import chunked_cross_entropy
from open_lm_linear.ops.rows import ROWS, RowsParameter
from open_lm_linear.parallel import Context, ParallelConfig

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["with", "without"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU with an instruction, or without one."""
    monkeypatch.setattr(products, "CPU_MULTIPLIES_BFLOAT16", request.param)
    return request.param


@pytest.fixture(autouse=True)
def unsaid() -> Iterator[None]:
    products._say.cache_clear()
    yield
    products._say.cache_clear()


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def test_the_dtype_of_products(able: bool) -> None:
    assert products.product_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if able else torch.float32)
    assert products.product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert products.product_dtype(dtype, CPU) == dtype


@pytest.mark.parametrize("rank", ["0", "1"])
def test_amp_says_once_that_it_computes_in_float32(able: bool, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    ctx = Context(int(rank), 2, CPU, "amp_bf16")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            with ctx.autocast():
                assert torch.is_autocast_enabled("cpu") == able
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if able else torch.float32)
    assert len(said) == (not able and rank == "0")
    assert all("no instruction for bfloat16 products" in str(w.message) for w in said)


def test_pure_bfloat16_is_warned_of(able: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with parallel.setup(ParallelConfig(device="cpu", precision="bf16")) as ctx:
            assert ctx.param_dtype == torch.bfloat16
    assert ["--precision fp32" in str(w.message) for w in said] == ([] if able else [True])


def test_many_rows(able: bool) -> None:
    """What the compiled code leaves to torch."""
    x, weight, bias = halves(ROWS + 1, 48), halves(40, 48), halves(40)
    wide = F.linear(x.float(), weight.float(), bias.float()).bfloat16()
    with torch.no_grad():
        y = F.linear(x, RowsParameter(weight), bias)
    assert torch.equal(y, F.linear(x, weight, bias) if able else wide)
    torch.testing.assert_close(y, wide, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("tokens", [50, 130])
def test_the_operator(able: bool, tokens: int) -> None:
    q, k, v = (halves(2, tokens, heads, 16).requires_grad_() for heads in (4, 2, 2))
    decay = -torch.tensor([0.5, 0.1, 0.01, 0.0])
    out, state = ops.chunked(q, k, v, decay)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert {x.dtype for x in (out, *grads)} == {torch.bfloat16} and state.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    exact, last = ops.chunked(*wide, decay)
    if able:
        assert (out - exact).norm() < 0.02 * exact.norm()
    else:
        assert torch.equal(out, exact.bfloat16()) and torch.equal(state, last)
        expected = torch.autograd.grad(exact.bfloat16().float().square().sum(), wide)
        assert all(torch.equal(x, y.bfloat16()) for x, y in zip(grads, expected, strict=True))


@pytest.mark.parametrize("inside", [True, False], ids=["autocast", "bfloat16 weights"])
def test_losses(able: bool, inside: bool) -> None:
    hidden, weight = (x if not inside else x.float() for x in (halves(30, 16), halves(50, 16)))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.arange(30)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        loss = chunked_cross_entropy(hidden, weight, targets)[-1]
    loss.backward()
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    exact = chunked_cross_entropy(*wide, targets)[-1]
    exact.backward()
    if able:
        torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    else:
        assert torch.equal(loss, exact)
        assert all(torch.equal(x.grad, y.grad.to(x.dtype)) for x, y in zip((hidden, weight), wide, strict=True))
