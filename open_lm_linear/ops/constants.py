"""Tensors that are computed once: no buffers, so that nothing of them is in a checkpoint or on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


def constant(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``function``, whose results are kept, one for each set of (hashable) arguments."""
    cached = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def call(*args: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a graph computes it by itself: it cannot look into the cache
            return function(*args)
        with torch.inference_mode(False):  # kept for later calls, of which some may be training
            return cached(*args)

    return call


def numbers(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """(N,) in float32, made on the device: no CUDA graph can copy from the CPU at every replay."""
    return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])
