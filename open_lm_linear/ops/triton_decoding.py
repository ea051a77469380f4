"""One token of linear attention in one launch: the state's update, the output, and its GroupNorm."""

from __future__ import annotations

import torch
import triton

from open_lm_linear.ops.triton_kernels import step_kernel

Tensor = torch.Tensor


def triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
    keep: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) without a gradient: the arguments of `triton_attention`.

    Args:
        norm_eps: normalise each head's output to mean 0 and variance 1 with this epsilon (None: do not).

    Returns:
        out (B, 1, H, V), in q's dtype or, normalised, in float32; the new state (B, H, K, V) in float32.
    """
    if log_decay is None:
        log_decay = torch.zeros(q.shape[2], device=q.device)
    state = None if state is None else state.float()
    return step_in_one_launch(q, k, v, log_decay.float(), state, first, keep, -1.0 if norm_eps is None else norm_eps)


@torch.library.custom_op("open_lm_linear::linear_attention_step", mutates_args=())
def step_in_one_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    first: Tensor | None,
    keep: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`triton_step`, with an epsilon below 0 for no norm."""
    out, new = _results(q, v, eps)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    first, keep, state = (None if x is None else x.contiguous() for x in (first, keep, state))
    batch, _, heads, dim_k = q.shape
    block_v = triton.next_power_of_2(v.shape[3])
    strides = (stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2)))
    flags = (q if x is None else x for x in (first, keep, state))
    with torch.cuda.device_of(q):
        step_kernel[(batch * heads,)](
            *(q, k, v, log_decay, *flags, out, new, heads, heads // k.shape[2], *strides, eps),
            DIM_K=dim_k,
            DIM_V=v.shape[3],
            BLOCK_K=min(triton.next_power_of_2(dim_k), max(1, 8192 // block_v)),
            BLOCK_V=block_v,
            HAS_FIRST=first is not None,
            HAS_KEEP=keep is not None,
            HAS_STATE=state is not None,
            NORM=eps >= 0,
        )
    return out, new


@step_in_one_launch.register_fake
def _(q, k, v, log_decay, state, first, keep, eps):  # type: ignore[no-untyped-def]
    return _results(q, v, eps)


def _results(q: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Room for the output and the new state."""
    batch, _, heads, dim_k = q.shape
    dtype = torch.float32 if eps >= 0 else q.dtype
    new = torch.empty((batch, heads, dim_k, v.shape[3]), dtype=torch.float32, device=q.device)
    return torch.empty((batch, 1, heads, v.shape[3]), dtype=dtype, device=q.device), new
