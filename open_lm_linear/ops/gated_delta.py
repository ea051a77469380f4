"""The gated delta rule (arXiv 2412.06464): a key's old value gives way to its new one, and all fades.

    S_t = exp(g_t) (I - b_t k_t^T k_t) S_(t-1) + b_t k_t^T v_t        o_t = q_t S_t

with S = 0 before the first token of a document, and keys of length 1. `delta_naive` is the definition, token by token
in float64; `delta_chunked` has matrix products inside chunks and the state between them; on CUDA
flash-linear-attention's kernels compute the same.

Shapes: q (B, T, H, K); k (B, T, Hkv, K); v (B, T, Hkv, V); log_gate <= 0 and b, from 0 to 1, (B, T, Hkv); state
(B, Hkv, K, V), one a key head, which query heads h with h // (H / Hkv) alike share; first (B, T) bool, True at the
first token of a document. A padded position is b = 0 and log_gate = 0. Returns out (B, T, H, V) in q's dtype and the
state after the last token in float32 (float64 for float64 inputs).

The chunked form is the WY representation (arXiv 2406.06484). With u_t = b_t (v_t - exp(g_t) k_t S_(t-1)), what token t
writes is k_t^T u_t, and within a chunk that begins at S

    (1 + A) U = b V - b exp(G) K S,      A_ij = b_i exp(g_(j+1) + .. + g_i) <k_i, k_j> for j < i,

one triangular system for all chunks at once. No exponent is above 0 nor a difference of sums (see `gated_linear`).
"""

from __future__ import annotations

import torch

from open_lm_linear.ops.gated_linear import (
    GATED_CHUNK,
    from_chunks,
    in_chunks,
    initial_state,
    reset_gates,
    widened,
)
from open_lm_linear.ops.kernels import call_fla, fla_module, is_short

Tensor = torch.Tensor

DELTA_WIDTH = 256  # the widest key that the kernel takes


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator by its fastest form: a kernel, one recurrent step for one token, chunks for more."""
    fla = fla_module("gated_delta_rule", q) if q.shape[-1] <= DELTA_WIDTH else None
    if fla is not None:
        kernel = fla.fused_recurrent_gated_delta_rule if is_short(q) else fla.chunk_gated_delta_rule
        return call_fla(kernel, q, {"k": k, "v": v, "g": log_gate, "beta": b}, state, first)
    form = delta_recurrent if q.shape[1] == 1 else delta_chunked
    return form(q, k, v, log_gate, b, state, first)


def delta_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in float64."""
    q, k, v, log_gate, b = (x.double() for x in (q, k, v, log_gate, b))
    return delta_recurrent(q, k, v, log_gate, b, state, first)


def delta_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token."""
    dtype, kv_heads = q.dtype, k.shape[2]
    q, k, v, b, gate = widened(q), widened(k), widened(v), widened(b), reset_gates(log_gate, first).exp()
    S = initial_state(k, v, state)
    out = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            S = gate[:, t, :, None, None] * S
            found = (k[:, t, :, None, :] @ S)[:, :, 0]
            written = b[:, t, :, None] * (v[:, t] - found)
            S = S + k[:, t, :, :, None] * written[:, :, None, :]
            out.append((q[:, t].unflatten(1, (kv_heads, -1)) @ S).flatten(1, 2))
    return torch.stack(out, 1).to(dtype), S


def delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By chunks of up to 64 tokens, in float32: O(T (64 + K) (K + V))."""
    tokens, dtype = q.shape[1], q.dtype
    S = initial_state(k, v, state)
    q, k, v, g, b = in_chunks(min(GATED_CHUNK, tokens), k.shape[2], q, k, v, reset_gates(log_gate, first), b)
    with torch.autocast(q.device.type, enabled=False):
        decay, since, b = _decay_between(g), g.cumsum(-1).exp()[..., None], b[..., None]
        overlap = (b * decay * (k @ k.transpose(-1, -2))).tril(-1)
        both = torch.cat((b * v, b * since * k), -1)
        both = torch.linalg.solve_triangular(overlap, both, upper=False, unitriangular=True)
        plain, through_state = both.split((v.shape[-1], k.shape[-1]), -1)
        keys_at_end = (k * decay[..., -1, :, None]).transpose(-1, -2)
        states, writes = [], []
        for n in range(q.shape[2]):
            states.append(S)
            writes.append(plain[:, :, n] - through_state[:, :, n] @ S)
            S = since[:, :, n, -1:] * S + keys_at_end[:, :, n] @ writes[-1]
        rows = q.flatten(3, 4)  # of all the query heads that share a key head
        scores = (rows @ k.transpose(-1, -2)).unflatten(3, q.shape[3:5]) * decay[..., None, :]
        out = scores.flatten(3, 4) @ torch.stack(writes, 2)
        out = out + (q * since[..., None]).flatten(3, 4) @ torch.stack(states, 2)
        out = out.unflatten(3, q.shape[3:5])
    return from_chunks(out, tokens).to(dtype), S


def _decay_between(g: Tensor) -> Tensor:
    """exp(g_(j+1) + .. + g_i) for i >= j, 0 elsewhere: (..., C, C) of (..., C)."""
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril(-1)
    sums = g[..., :, None].expand(*g.shape, g.shape[-1]).masked_fill(~later, 0.0).cumsum(-2)
    return sums.exp().tril()
