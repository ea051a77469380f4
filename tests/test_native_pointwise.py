"""SwiGLU and rotary embeddings by compiled code against torch's operators, and what leaves them to those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from torch.utils.flop_counter import FlopCounterMode

from open_lm_linear.ops.native import native_library
from open_lm_linear.ops.native_pointwise import native_swiglu, native_turn

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """By complex numbers: the pair (a, b) is a + ib, which the angle multiplies."""
    pairs = cos.shape[-1]
    kept = x[..., 2 * pairs :]
    a, b = (x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]) if interleaved else x[..., : 2 * pairs].chunk(2, -1)
    turned = torch.complex(a.contiguous(), b.contiguous()) * torch.complex(cos, sin).to(torch.complex128)
    both = torch.stack((turned.real, turned.imag), -1).flatten(-2) if interleaved else None
    return torch.cat((torch.cat((turned.real, turned.imag), -1) if both is None else both, kept), -1)


def tables(rows: int, tokens: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 10 * torch.rand(rows, tokens, 1, pairs)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2), (2, 7, 62), (1, 64), (2, 300, 2 * 130)], ids=str)
def test_swiglu_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    x = (6 * torch.randn(shape)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, wanted = native_swiglu(x), swiglu(exact)
    assert out is not None
    assert out.dtype == dtype and out.shape == wanted.shape
    assert relative(out, wanted) < bound
    grad = torch.randn_like(wanted).to(dtype)
    (ours,), (theirs,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(wanted, exact, grad.double())
    assert ours.dtype == dtype
    assert relative(ours, theirs) < bound


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    """All but the few numbers that the last bit of an exponential carries over."""
    x = (4 * torch.randn(200, 256)).bfloat16().requires_grad_()
    out, wanted, grad = native_swiglu(x), swiglu(x), torch.randn(200, 128).bfloat16()
    assert out is not None
    assert (out != wanted).float().mean() < 1e-3
    (ours,), (theirs,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(wanted, x, grad)
    assert (ours != theirs).float().mean() < 1e-2


def test_swiglu_of_large_and_of_broken_numbers() -> None:
    gate = torch.tensor([0.0, 90.0, 1e4, -90.0, -1e4, torch.nan, torch.inf])
    x = torch.stack((gate, torch.ones(7)), -1)
    out = native_swiglu(x)
    assert out is not None
    assert torch.allclose(out[:, 0], torch.tensor([0.0, 90.0, 1e4, 0.0, 0.0, torch.nan, torch.inf]), equal_nan=True)
    half = native_swiglu(x.bfloat16())
    assert half is not None and half[5].isnan()


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (2, 16), (2, 22), (1, 90)])
def test_turn_and_its_gradient(rows: int, dim: int, interleaved: bool, dtype: torch.dtype, bound: float) -> None:
    """Dimensions behind the first 16 or 80 stay; a tensor may lie in a wider one, as a projection's parts do."""
    wide = torch.randn(2, 9, 5, dim).to(dtype).requires_grad_()
    exact = wide.detach().double().requires_grad_()
    cos, sin = tables(rows, 9, (dim - dim % 16) // 2)
    out = native_turn(wide[:, :, 1:4], cos, sin, interleaved)
    wanted = turn(exact[:, :, 1:4], cos.double(), sin.double(), interleaved)
    assert out is not None
    assert out.dtype == dtype
    assert relative(out, wanted) < bound
    grad = torch.randn_like(wanted).transpose(1, 2).contiguous().transpose(1, 2).to(dtype)
    (ours,), (theirs,) = torch.autograd.grad(out, wide, grad), torch.autograd.grad(wanted, exact, grad.double())
    assert relative(ours, theirs) < bound


def test_turning_keeps_lengths_and_what_it_does_not_turn() -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 24), tables(2, 5, 8)
    out = native_turn(x, cos, sin, False)
    assert out is not None
    assert torch.equal(out[..., 16:], x[..., 16:])
    assert relative(out.norm(dim=-1), x.norm(dim=-1)) < 1e-6
    assert not torch.allclose(out, x)


def test_an_expanded_gradient() -> None:
    x = torch.randn(2, 4, 8, requires_grad=True)
    out = native_swiglu(x)
    assert out is not None
    out.sum().backward()
    exact = x.detach().double().requires_grad_()
    swiglu(exact).sum().backward()
    assert x.grad is not None and exact.grad is not None
    assert relative(x.grad, exact.grad) < 1e-6


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(2, 8, dtype=torch.float64), id="float64"),
        pytest.param(torch.randn(2, 8, dtype=torch.float16), id="float16"),
        pytest.param(torch.randn(8, 2).T, id="not contiguous"),
        pytest.param(torch.randn(0, 8), id="empty"),
        pytest.param(torch.randn(2, 8, device="meta"), id="meta"),
    ],
)
def test_what_torch_does(x: torch.Tensor) -> None:
    assert native_swiglu(x) is None


def test_what_looks_on_sees_torchs_operators() -> None:
    x = torch.randn(2, 8)

    def unseen(x: torch.Tensor) -> torch.Tensor:
        assert native_swiglu(x) is None
        return x

    with FlopCounterMode(display=False):
        unseen(x)
    torch.func.vmap(unseen)(x)
    torch.jit.trace(unseen, (x,), check_trace=False)
    assert native_swiglu(x) is not None


@pytest.mark.parametrize("shape", [(1, 1, 3, 4), (2, 4, 1, 4), (3, 5, 1, 4)], ids=str)
def test_tables_of_another_shape_are_left_to_torch(shape: Any) -> None:
    assert native_turn(torch.randn(2, 5, 3, 8), torch.ones(shape), torch.zeros(shape), False) is None
