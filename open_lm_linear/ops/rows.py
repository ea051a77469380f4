"""A matrix times a few rows on a CPU, which is what decoding is made of: memory laid out so that it is read fast.

Every weight is read once a token, so the floor is the time of reading them. How near a product comes depends on the
order in memory (measured on one core of an AMD EPYC that reads 27 GB/s in a plain sum; docs/performance.md):

- float32, with as many outputs as inputs: by columns (18 GB/s, by rows 10).
- bfloat16: a second copy as float16 in FBGEMM's tiles (20 to 30 GB/s; oneDNN 6 to 9, torch's own product 10 to 17).
  float16 holds every bfloat16 number from 2^-14 to 65504 exactly and is off by at most 2^-25 below; products and sums
  are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 8  # above, reading the weights is not what a product costs
LARGEST = torch.finfo(torch.float16).max


class PackedParameter(nn.Parameter):
    """A bfloat16 matrix (out, in) with a second copy for products with up to ``ROWS`` rows outside of autograd.

    Everything else sees the parameter alone: its values, its names and all other products are as they were. The copy
    follows the values: it is made anew where they were changed in place.
    """

    packed: Any
    seen: tuple[int, int]  # data pointer and version of the values that the copy has

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> PackedParameter:
        return torch.Tensor._make_subclass(cls, data.detach(), requires_grad)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
                x, weight = args[:2]
                if type(weight) is cls and _few_rows(x):
                    return weight.times(x, args[2] if len(args) > 2 else None)
            return func(*args, **(kwargs or {}))

    def pack(self) -> PackedParameter:
        """Itself, its copy made where there is none of these values."""
        now = self.data_ptr(), self._version
        if getattr(self, "seen", None) != now:
            self.packed = torch.ops.quantized.linear_prepack_fp16(self.detach().float(), None)
            self.seen = now
        return self

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias (..., out) in bfloat16 from few rows x (..., in)."""
        y = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.pack().packed)
        return (y if bias is None else y + bias).bfloat16()


def _few_rows(x: Tensor) -> bool:
    rows = x.dim() > 1 and 0 < x.numel() <= ROWS * x.shape[-1]
    return rows and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def by_columns(linear: nn.Linear) -> None:
    """Lets a float32 matrix on a CPU with as many outputs as inputs lie by columns; shape and values stay."""
    weight = linear.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and linear.out_features >= linear.in_features:
        weight.data = weight.data.T.contiguous().T


def packable(weight: Tensor) -> bool:
    """Whether ``PackedParameter`` can hold this matrix here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.quantized.engine in ("x86", "fbgemm")
        and bool(weight.abs().max() <= LARGEST)
    )
