"""Mamba's selective scan (S6, arXiv 2312.00752): a linear recurrence whose decay and inputs depend on the token.

    h_t = exp(d_t A) h_(t-1) + d_t B_t x_t        y_t = C_t h_t + D x_t        d_t = softplus(dt_t + dt_bias)

Shapes: x, dt (B, T, E), a scalar recurrence for each of E channels and N states; A (E, N), below 0; B, C (B, T, N);
dt_bias, D (E,); state h (B, E, N), float32 (float64 for float64 inputs). keep (B, T) bool, False at padding, where
d_t = 0; first (B, T) bool, True at the first token of a document, before which h is 0.

`scan` is the definition, token by token, and its gradients. Nothing of size T E N stands in memory: it goes by chunks,
and a chunk is computed again when its gradients are taken, so what is kept for them is one state a chunk. On CUDA the
kernel of the package mamba_ssm stands in for it where it computes the same: no padding, no documents, no past.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from open_lm_linear.ops.recompute import recomputed

Tensor = torch.Tensor

SCAN_CHUNK = 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    keep: Tensor | None = None,
    first: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, E) in x's dtype and the state after the last token, by the fastest form that computes it."""
    if x.is_cuda and x.shape[1] > 1 and keep is None and first is None and state is None:
        kernel = _mamba_ssm()
        if kernel is not None:
            return fused(kernel, x, dt, dt_bias, A, B, C, D)
    if x.shape[1] == 1:
        return _scan_chunk(x, dt, dt_bias, A, B, C, D, keep, first, _beginning(state, x, A))
    return scan(x, dt, dt_bias, A, B, C, D, keep=keep, first=first, state=state)


@lru_cache(maxsize=1)
def _mamba_ssm() -> Callable[..., Any] | None:
    """The kernel of mamba_ssm, or None, which is said once."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        warnings.warn(
            "Mamba's scan runs token by token in torch, which is slow on a GPU: pip install 'open_lm_linear[mamba]' "
            "for the kernel of mamba-ssm.",
            stacklevel=2,
        )
        return None
    return selective_scan_fn


def fused(
    kernel: Callable[..., Any], x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by ``selective_scan_fn`` of mamba_ssm, which knows no gradient of the state: it comes detached."""
    u, delta, keys, queries = (tensor.to(x.dtype).transpose(1, 2).contiguous() for tensor in (x, dt, B, C))
    out, state = kernel(
        u,
        delta,
        A.float(),
        keys,
        queries,
        D.float(),
        delta_bias=dt_bias.float(),
        delta_softplus=True,
        return_last_state=True,
    )
    return out.transpose(1, 2), state.detach().float()


@torch.compiler.disable  # a compiler would unroll its loop over the tokens
def scan(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    keep: Tensor | None = None,
    first: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = SCAN_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The definition, by chunks of ``chunk`` tokens."""
    state, outs = _beginning(state, x, A), []
    for begin in range(0, x.shape[1], chunk):
        span = slice(begin, begin + chunk)
        masks = (None if keep is None else keep[:, span], None if first is None else first[:, span])
        inputs = (x[:, span], dt[:, span], dt_bias, A, B[:, span], C[:, span], D, *masks, state)
        if torch.is_grad_enabled():
            out, state = recomputed("full", _scan_chunk, *inputs)
        else:
            out, state = _scan_chunk(*inputs)
        outs.append(out)
    return torch.cat(outs, 1), state


def _beginning(state: Tensor | None, x: Tensor, A: Tensor) -> Tensor:
    """The state to go on from, in the dtype of the sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        return torch.zeros(x.shape[0], *A.shape, dtype=wide, device=x.device)
    state = state.to(wide)
    # A graph cannot save what inference mode made.
    return state.clone() if torch.is_grad_enabled() and state.is_inference() else state


def _scan_chunk(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    keep: Tensor | None,
    first: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        wide = state.dtype
        u, keys, queries = x.to(wide), B.to(wide), C.to(wide)
        delta = F.softplus(dt.to(wide) + dt_bias.to(wide))
        if keep is not None:
            delta = delta.masked_fill(~keep[..., None], 0.0)
        decay = torch.exp(delta[..., None] * A.to(wide))  # (B, T, E, N)
        if first is not None:
            decay = decay.masked_fill(first[..., None, None], 0.0)
        added = (delta * u)[..., None] * keys[:, :, None]
        one = x.shape[1] == 1
        states = torch.addcmul(added, decay, state[:, None]) if one else _Recurrence.apply(decay, added, state)
        out = torch.einsum("bten,btn->bte", states, queries) + D.to(wide) * u
        return out.to(x.dtype), states[:, 0] if one else states[:, -1].clone()


class _Recurrence(torch.autograd.Function):
    """h_t = decay_t h_(t-1) + added_t for all t: (B, T, E, N) from two such tensors and h_0 (B, E, N)."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        batch, tokens, *shape = added.shape
        states = added.new_empty(batch, tokens + 1, *shape)
        states[:, 0] = state
        for t in range(tokens):
            torch.addcmul(added[:, t], decay[:, t], states[:, t], out=states[:, t + 1])
        ctx.save_for_backward(decay, states)
        return states[:, 1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        decay, states = ctx.saved_tensors
        dadded = grad.clone()
        for t in reversed(range(grad.shape[1] - 1)):
            dadded[:, t].addcmul_(decay[:, t + 1], dadded[:, t + 1])
        return dadded * states[:, :-1], dadded, decay[:, 0] * dadded[:, 0]
