"""Gated linear attention (arXiv 2312.06635): every key channel forgets at its own rate, which the data choose.

    S_t = diag(exp(g_t)) S_(t-1) + k_t^T v_t        o_t = q_t S_t

with S = 0 before the first token of a document. `gla_naive` is the definition, token by token in float64; `gla_chunked`
has matrix products inside chunks and the state between them; on CUDA flash-linear-attention's kernels compute the same.

Shapes: q (B, T, H, K); k and log_gate (B, T, Hkv, K), log_gate <= 0; v (B, T, Hkv, V); state (B, Hkv, K, V), one a key
head, which query heads h with h // (H / Hkv) alike share; first (B, T) bool, True at the first token of a document. A
padded position is k = 0 and log_gate = 0. Returns out (B, T, H, V) in q's dtype and the state after the last token in
float32 (float64 for float64 inputs).

The chunked form splits a chunk into halves, these into halves, and so on. A query in a second half meets the keys of
the first half over the border between them: exp(the gates' sum from the border to the query) times exp(the sum from
the key to the border). All exponents are sums of log gates, never differences of sums: none is above 0, none loses
digits to its neighbours, and the reset of a document is a log gate of -inf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from open_lm_linear.ops.kernels import call_fla, fla_module, is_short

Tensor = torch.Tensor

GATED_CHUNK = 64


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The operator by its fastest form: a kernel, one recurrent step for one token, chunks for more."""
    fla = fla_module("gla", q)
    if fla is not None:
        name = "gk" if is_short(q) else "g"
        kernel = fla.fused_recurrent_gla if is_short(q) else fla.chunk_gla
        return call_fla(kernel, q, {"k": k, "v": v, name: log_gate}, state, first)
    form = gla_recurrent if q.shape[1] == 1 else gla_chunked
    return form(q, k, v, log_gate, state, first)


def gla_naive(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in float64."""
    q, k, v, log_gate = (x.double() for x in (q, k, v, log_gate))
    return gla_recurrent(q, k, v, log_gate, state, first)


def gla_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token."""
    dtype, kv_heads = q.dtype, k.shape[2]
    q, k, v, gate = widened(q), widened(k), widened(v), reset_gates(log_gate, first).exp()
    S = initial_state(k, v, state)
    out = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            S = gate[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t].unflatten(1, (kv_heads, -1)) @ S).flatten(1, 2))
    return torch.stack(out, 1).to(dtype), S


def gla_chunked(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By chunks of up to 64 tokens, in float32: O(T K (64 + V)), and log2(64) copies of q, k and the gates."""
    tokens, dtype = q.shape[1], q.dtype
    chunk = min(GATED_CHUNK, 1 << (tokens - 1).bit_length())
    S = initial_state(k, v, state)
    q, k, v, g = in_chunks(chunk, k.shape[2], q, k, v, reset_gates(log_gate, first))
    with torch.autocast(q.device.type, enabled=False):
        out = (q * k[..., None, :]).sum(-1, keepdim=True) * v[..., None, :]  # every token meets itself
        span = 1
        while span < chunk:
            _add_second_halves(out, q, k, v, g, span)
            span *= 2
        since = g.cumsum(-2).exp()
        added = (k * _until_end(g)).transpose(-1, -2) @ v
        states = []
        for n in range(q.shape[2]):
            states.append(S)
            S = since[:, :, n, -1, :, None] * S + added[:, :, n]
        seen = (q * since[..., None, :]).flatten(3, 4) @ torch.stack(states, 2)
        out = out + seen.view_as(out)
    return from_chunks(out, tokens).to(dtype), S


def _add_second_halves(out: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, span: int) -> None:
    """Adds to the second half of each 2 ``span`` tokens what it sees in the first, in place."""

    def half(x: Tensor, which: int) -> Tensor:
        return x.unflatten(3, (-1, 2, span)).select(4, which)

    queries = half(q, 1) * half(g, 1).cumsum(-2).exp()[..., None, :]
    keys = half(k, 0) * _until_end(half(g, 0))
    met = queries.flatten(4, 5) @ keys.transpose(-1, -2) @ half(v, 0)
    half(out, 1).add_(met.unflatten(4, (span, -1)))


def _until_end(g: Tensor) -> Tensor:
    """How far what a token wrote has decayed at the end of its part: (..., T, K) of log gates (..., T, K)."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2).exp()


# ---------------------------------------------------------------- shared with the gated delta rule


def widened(x: Tensor) -> Tensor:
    """In float32, or as wide as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reset_gates(log_gate: Tensor, first: Tensor | None) -> Tensor:
    """Log gates in float32, -inf at the first token of a document."""
    log_gate = widened(log_gate)
    if first is None:
        return log_gate
    return log_gate.masked_fill(first.view(*first.shape, *[1] * (log_gate.dim() - 2)), float("-inf"))


def initial_state(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The state (B, Hkv, K, V) to begin with, in float32 or as wide as the keys."""
    if state is not None:
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = state.clone()  # as it is, no graph may keep it
        return state.to(torch.promote_types(k.dtype, torch.float32))
    return widened(k).new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


def in_chunks(chunk: int, kv_heads: int, q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """q as (B, Hkv, N, C, R, K), the others (B, T, Hkv, ...) as (B, Hkv, N, C, ...), zeros at the end."""
    found = []
    for x in (q.unflatten(2, (kv_heads, -1)), *others):
        x = widened(x).movedim(2, 1).contiguous()
        missing = -x.shape[2] % chunk
        if missing:
            x = torch.cat((x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])), 2)
        found.append(x.unflatten(2, (-1, chunk)))
    return tuple(found)


def from_chunks(out: Tensor, tokens: int) -> Tensor:
    """(B, T, H, V) from (B, Hkv, N, C, R, V)."""
    return out.flatten(2, 3)[:, :, :tokens].movedim(1, 2).flatten(2, 3)
