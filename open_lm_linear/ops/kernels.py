"""Kernels of flash-linear-attention, where the package and a GPU are there.

They take half precision on CUDA; all else runs in the plain torch forms beside them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

Tensor = torch.Tensor

SHORT = 64  # up to so many tokens without a gradient, their recurrent kernels are faster than the chunked


def fla_module(name: str, x: Tensor) -> Any:
    """The module ``fla.ops.<name>`` where its kernels take ``x``, or None; a missing package is said once."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    return _imported(f"fla.ops.{name}") if _installed() else None


@lru_cache(maxsize=1)
def _installed() -> bool:
    try:
        importlib.import_module("fla.ops")
    except ImportError as error:
        warnings.warn(
            f"flash-linear-attention cannot be imported ({error}): gated attention runs in its torch form, which is "
            "slower. pip install 'open_lm_linear[gpu]' has the kernels.",
            stacklevel=2,
        )
        return False
    return True


@lru_cache(maxsize=8)
def _imported(module: str) -> Any:
    return importlib.import_module(module)


def is_short(x: Tensor) -> bool:
    """Whether a recurrent kernel, which may have no backward pass, is the one to take for (B, T, ...)."""
    return x.shape[1] <= SHORT and not torch.is_grad_enabled()


def call_fla(
    kernel: Callable[..., Any], q: Tensor, inputs: dict[str, Tensor], state: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One call of a kernel: outputs (B, T, H, V) and the state (B, Hkv, K, V) in float32.

    The kernels want as many key heads as query heads, and packed documents as one row with the places where they
    begin (``cu_seqlens``), one state a document.

    Args:
        inputs: by the kernel's names, each (B, T, Hkv, ...).
    """
    batch, tokens, heads = q.shape[:3]
    groups = heads // inputs["k"].shape[2]
    given = {"q": q, **{name: x.repeat_interleave(groups, 2).contiguous() for name, x in inputs.items()}}
    before = None if state is None else state.float().repeat_interleave(groups, 1)
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if first is None:
        out, after = kernel(**given, **options, initial_state=before)
        return out, after[:, ::groups]
    begins = first.clone()
    begins[:, 0] = True
    places = begins.flatten().nonzero()[:, 0]
    document = begins.flatten().cumsum(0).view(batch, tokens) - 1
    if before is not None:
        before = before.masked_fill(first[:, 0, None, None, None], 0.0)
        before = before.new_zeros(len(places), *before.shape[1:]).index_copy(0, document[:, 0], before)
    given = {name: x.flatten(0, 1)[None] for name, x in given.items()}
    ends = torch.cat((places, places.new_tensor([batch * tokens])))
    out, after = kernel(**given, **options, initial_state=before, cu_seqlens=ends)
    return out.view(batch, tokens, heads, -1), after.index_select(0, document[:, -1])[:, ::groups]
