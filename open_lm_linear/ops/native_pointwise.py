"""SwiGLU and rotary embeddings on a CPU by compiled code: each value is read and written once."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_lm_linear.ops.native import NativeTurn, native_library, native_threads, takes_native


def native_swiglu(x: Tensor) -> Tensor | None:
    """silu(gate) * up (..., H) of x = gate | up (..., 2 H), in x's dtype, rounded as torch rounds; differentiable once.

    None where the compiled code cannot have it.
    """
    if not takes_native(x) or not x.is_contiguous() or not x.numel():
        return None
    return _SwiGLU.apply(x)


def native_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor | None:
    """x (B, T, H, D) turned by float32 tables (B or 1, T, 1, D' / 2), dimensions from D' on left as they are.

    Pairs are i and i + D' / 2 or, interleaved, 2 i and 2 i + 1. None where the compiled code cannot have it.
    """
    batch, tokens = x.shape[:2]
    fitting = cos.dim() == 4 and cos.shape[0] in (1, batch) and cos.shape[1:3] == (tokens, 1)
    if not fitting or cos.dtype != torch.float32 or not takes_native(x, cos, sin) or not x.numel():
        return None
    return _Turn.apply(x, cos.contiguous(), sin.contiguous(), interleaved)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _swiglu(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _swiglu(x, grad.contiguous())


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.interleaved, -1.0), None, None, None


def _swiglu(x: Tensor, grad: Tensor | None) -> Tensor:
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width)) if grad is None else torch.empty_like(x)
    library = native_library()
    assert library is not None
    library.swiglu(
        *(x.data_ptr(), None if grad is None else grad.data_ptr(), out.data_ptr()),
        *(x.numel() // x.shape[-1], width, native_threads(x.numel()), x.dtype == torch.bfloat16),
    )
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    pairs = cos.shape[-1]
    tables = cos.data_ptr(), sin.data_ptr(), pairs, cos.stride(0) if cos.shape[0] > 1 else 0
    call = NativeTurn(*x.shape, *x.stride()[:3], *tables, interleaved, sign)
    library = native_library()
    assert library is not None
    threads = native_threads(x.numel())
    library.turn(ctypes.byref(call), x.data_ptr(), out.data_ptr(), threads, x.dtype == torch.bfloat16)
    return out
