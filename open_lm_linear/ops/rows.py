"""A matrix times a few rows on a CPU, which is what decoding is made of.

Every weight is read once a token, so the floor is the time of reading them. The compiled code reads them in the order
of memory, with all threads; oneDNN and torch's own products reach a third to a half of that (docs/performance.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from open_lm_linear.ops.native import native_library, native_matrix, native_threads, takes_matrix
from open_lm_linear.ops.products import product_dtype

ROWS = 8  # above, reading the weights is not what a product costs


class RowsParameter(nn.Parameter):
    """A matrix (out, in) whose products with up to ``ROWS`` rows, outside of autograd, are the compiled code's.

    More rows of bfloat16 are multiplied in float32 where the CPU has no instruction for them. Everything else sees a
    parameter like any other.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> RowsParameter:
        return torch.Tensor._make_subclass(cls, data.detach(), requires_grad)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
                x, weight = args[:2]
                bias = args[2] if len(args) > 2 else None
                if type(weight) is cls and _few(x, weight):
                    return weight.times(x, bias)
                wide = product_dtype(weight.dtype, weight.device)
                if x.dtype == weight.dtype != wide and not torch.is_autocast_enabled("cpu"):
                    return func(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)
            return func(*args, **(kwargs or {}))

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias (..., out) from few rows x (..., in) of the same dtype; sums are float32."""
        library, (out, inputs) = native_library(), self.shape
        assert library is not None
        x, bias = x.contiguous(), None if bias is None else bias.detach().float()
        rows, threads = x.numel() // inputs, native_threads(self.numel())
        y, memory = x.new_empty(*x.shape[:-1], out), torch.empty(rows * (out + threads * inputs))
        matrix = ctypes.byref(native_matrix(self, bias))
        half = x.dtype == torch.bfloat16
        library.few_rows(matrix, rows, x.data_ptr(), y.data_ptr(), memory.data_ptr(), threads, half)
        return y


def _few(x: Tensor, weight: Tensor) -> bool:
    few = x.dim() > 1 and x.shape[-1] == weight.shape[1] and 0 < x.numel() <= ROWS * x.shape[-1]
    plain = type(x) is Tensor and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return few and plain and x.device.type == "cpu" and x.dtype == weight.dtype and takes_matrix(weight)
