"""Cross entropy that never holds the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor

IGNORE = -100
LOGITS_CHUNK = 1024


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    chunk: int = LOGITS_CHUNK,
    softcap: float | None = None,
) -> Tensor:
    """Summed cross entropy of ``hidden @ weight.T`` against ``targets``, by chunks of tokens.

    The gradients are computed on the way forward, while a chunk's logits are at hand, so that backward multiplies and
    no logits are kept or computed twice. Logits are made in the autocast dtype and reduced in float32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) token ids, -100 where there is nothing to predict.
        z_loss: coefficient of sum(logsumexp(logits)^2), over the same tokens (arXiv 2204.02311).
        softcap: logits x become softcap * tanh(x / softcap) (arXiv 2408.00118).

    Returns:
        (2,) float32: the cross entropy alone, for the log, and the total with z-loss, to be differentiated.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = hidden.dtype
    need = torch.is_grad_enabled() and (hidden.requires_grad, weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, targets, z_loss, chunk, softcap, dtype, need or (False, False))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, z_loss, chunk, softcap, dtype, need):  # type: ignore[override]
        wide = torch.promote_types(dtype, torch.float32)
        dhidden = torch.empty_like(hidden, dtype=dtype) if need[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if need[1] else None
        entropy, square = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for begin in range(0, hidden.shape[0], chunk):
                span = slice(begin, begin + chunk)
                h, target = hidden[span].to(dtype), targets[span]
                counted = target != IGNORE
                logits = (h @ w.T).to(wide)
                slope = None
                if softcap is not None:
                    logits = logits.div_(softcap).tanh_()
                    slope = 1 - logits.square()  # of the cap, for the gradient
                    logits = logits.mul_(softcap)
                picked = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0]
                # One exponential serves both the normaliser and the gradient, in place of the logits.
                top = logits.amax(-1)
                total = logits.sub_(top[:, None]).exp_().sum(-1)
                log_z = top + total.log()
                entropy += ((log_z - picked) * counted).sum()
                square += (log_z.square() * counted).sum()
                if not any(need):
                    continue
                # d/dlogits = softmax * (1 + 2 z log_z) - one_hot(target)
                grad = logits.mul_((counted * (1 + 2 * z_loss * log_z) / total)[:, None])
                grad.scatter_add_(-1, target.clamp(min=0)[:, None], -counted.to(wide)[:, None])
                grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
                if dhidden is not None:
                    dhidden[span] = grad @ w
                if dweight is not None:
                    dweight += grad.T @ h
        ctx.save_for_backward(*(g if g is not None else torch.empty(0) for g in (dhidden, dweight)))
        ctx.dtypes, ctx.need = (hidden.dtype, weight.dtype), need
        return torch.stack((entropy, entropy + z_loss * square))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        grads = []
        for saved, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True):
            grads.append((saved * grad[1].to(saved.dtype)).to(dtype) if need else None)
        return *grads, *[None] * 6


def cross_entropy_per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (nats) of each target: logits (B, T, V), targets (B, T) -> (B, T) float32, 0 where ignored."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none").view(
        targets.shape
    )
