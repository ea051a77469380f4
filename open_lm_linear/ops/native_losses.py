"""Losses of whole chunks of logits on a CPU by compiled code, in a fifth of the time of torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from open_lm_linear.ops.native import native_library, native_threads, takes_native


def native_entropy(logits: Tensor, targets: Tensor, z_loss: float, gradient: bool) -> Tensor | None:
    """(2,) float32: the summed cross entropy of logits (n, V), and the same with z-loss.

    The logits become the gradient of the second, if it is wanted. None, and nothing done, where the compiled code
    cannot have them.

    Raises:
        IndexError: a target (n,) that is neither a token nor -100.
    """
    if not _readable(logits, targets):
        return None
    return _summed("entropy_rows", [logits], targets, [z_loss, gradient], kinds=2)


def native_divergence(
    logits: Tensor, teacher: Tensor, targets: Tensor, ce: float, kl: float, gradient: bool
) -> Tensor | None:
    """(3,) float32: cross entropy, divergence from the teacher's logits (n, V), and ce and kl times these.

    Otherwise as ``native_entropy``; the gradient is that of the last.
    """
    alike = teacher.dtype == logits.dtype and teacher.shape == logits.shape and teacher.is_contiguous()
    if not alike or not takes_native(teacher) or not _readable(logits, targets):
        return None
    return _summed("divergence_rows", [logits, teacher], targets, [ce, kl, gradient], kinds=3)


def _readable(logits: Tensor, targets: Tensor) -> bool:
    plain = logits.dim() == 2 and logits.is_contiguous() and logits.numel() > 0
    return plain and targets.device.type == "cpu" and targets.dtype == torch.long and takes_native(logits)


def _summed(function: str, given: list[Tensor], targets: Tensor, options: list[float], kinds: int) -> Tensor:
    """(kinds,) float32: what the compiled function has summed over the rows of logits, the first of those given."""
    logits, targets, library = given[0], targets.contiguous(), native_library()
    assert library is not None
    sums = torch.empty(len(logits), kinds, dtype=torch.float64)
    wrong = getattr(library, function)(
        *(x.data_ptr() for x in [*given, targets]),
        *(*logits.shape, *options, sums.data_ptr()),
        *(native_threads(logits.numel()), logits.dtype == torch.bfloat16),
    )
    if wrong:
        raise IndexError("a target is neither a token of the vocabulary nor -100")
    return sums.sum(0).float()
