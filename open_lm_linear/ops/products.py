"""Matrix products of bfloat16 numbers on a CPU that has no instruction for them.

Many have none (AVX2 alone, as in most laptops), and there torch multiplies bfloat16 matrices up to a hundred times as
slowly as float32 ones (docs/performance.md). So products take float32 there: where weights are float32 there is no
autocast at all, and where they are bfloat16 both factors are widened first, which changes nothing but the time, since
sums are float32 in either case.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from typing import Any

import torch

Tensor = torch.Tensor


def _cpu_multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


CPU_MULTIPLIES_BFLOAT16 = _cpu_multiplies_bfloat16()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are at least as fast as float32's there. GPUs are taken to be."""
    return device.type != "cpu" or CPU_MULTIPLIES_BFLOAT16


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply matrices of ``dtype`` in: theirs, or float32 for bfloat16 ones without an instruction."""
    return torch.float32 if dtype == torch.bfloat16 and not multiplies_bfloat16(device) else dtype


def autocast(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> contextlib.AbstractContextManager[Any]:
    """torch's autocast; for bfloat16 on a CPU without an instruction for it nothing, which one sentence says."""
    if product_dtype(dtype, device) == dtype:
        return torch.autocast(device.type, dtype=dtype)
    if os.environ.get("RANK", "0") == "0":
        _say("amp_bf16: this CPU has no instruction for bfloat16 products, so they are computed in float32.")
    return contextlib.nullcontext()


def warn_of_bfloat16_weights(device: torch.device) -> None:
    """One sentence before training in pure bfloat16 on a CPU without an instruction for its products."""
    if not multiplies_bfloat16(device) and os.environ.get("RANK", "0") == "0":
        _say(
            "--precision bf16: this CPU has no instruction for bfloat16 products, and training will take ten to a "
            "hundred times as long as with --precision fp32."
        )


@functools.cache
def _say(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
