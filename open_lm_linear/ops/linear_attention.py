"""Decayed linear attention: the one operator behind every mixer of SUPRA's family.

    S_t = exp(g_t) S_(t-1) + k_t^T v_t        o_t = q_t S_t

with one log decay g_t <= 0 per head and token, and S = 0 before the first token of a document. Three forms of the
same function stand here: `naive` (the definition, token by token in float64), `quadratic` (the masked T x T matrix)
and `chunked` (matrix products inside chunks, the state between them; linear in T, forward and backward).

Shapes: q (B, T, H, K); k (B, T, Hkv, K); v (B, T, Hkv, V), where query head h reads key head h // (H / Hkv);
log_decay None (no decay), (H,) (fixed per head) or (B, T, H); state (B, H, K, V), float32; first (B, T) bool, True at
the first token of a document. A padded position is k = 0 and log_decay = 0. Returns out (B, T, H, V) in q's dtype and
the state after the last token, in float32 (float64 for float64 inputs).

The chunked form and its gradients follow from unrolling the recurrence over one chunk. Beside q, k and v it keeps for
the backward pass one state a chunk and the (chunk x chunk) scores, each of q's size when chunk = K = V.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from open_lm_linear.ops.products import product_dtype

Tensor = torch.Tensor

CHUNK = 64


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator by its fastest form: one recurrent step for one token, chunks for more."""
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        return step(q, k, v, log_decay, state, first)
    return chunked(q, k, v, log_decay, state, first)


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in float64."""
    batch, tokens, heads, _ = q.shape
    q, k, v = q.double(), _per_query_head(k, heads).double(), _per_query_head(v, heads).double()
    S = q.new_zeros(batch, heads, q.shape[-1], v.shape[-1]) if state is None else state.double()
    decay = _decay_per_token(log_decay, first, q).double()
    out = []
    for t in range(tokens):
        S = decay[:, t, :, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(out, 1), S


def quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """The masked T x T form without state or resets: what a transformer would compute. To compare with."""
    heads, tokens = q.shape[2], q.shape[1]
    k, v = _per_query_head(k, heads), _per_query_head(v, heads)
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    age = torch.arange(tokens, device=q.device)[:, None] - torch.arange(tokens, device=q.device)
    slope = torch.zeros(heads, device=q.device) if log_decay is None else log_decay.to(_state_dtype(q))
    weight = torch.exp(slope[:, None, None] * age.clamp(min=0)) * (age >= 0)
    return torch.einsum("bhij,bjhv->bihv", scores * weight.to(q.dtype), v)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token (T = 1): reads and renews the state at a cost that does not depend on the context."""
    batch, _, heads, dim = q.shape
    accumulate = _state_dtype(q)
    q1, k1, v1 = (x[:, 0].to(accumulate) for x in (q, _per_query_head(k, heads), _per_query_head(v, heads)))
    autocast = torch.is_autocast_enabled(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        new = k1[..., :, None] * v1[..., None, :]  # (B, H, K, V)
        if state is not None:
            if log_decay is None and first is None:
                decay = torch.ones((), dtype=accumulate, device=q.device)
            elif first is None and log_decay is not None and log_decay.dim() == 1:
                decay = log_decay.exp().to(accumulate)[:, None, None]
            else:
                decay = _decay_per_token(log_decay, first, q)[:, 0, :, None, None].to(accumulate)
            new = torch.addcmul(new, state.to(accumulate), decay.expand(batch, heads, 1, 1))
        out = torch.matmul(q1[..., None, :], new)  # (B, H, 1, V)
    return out.transpose(1, 2).to(q.dtype), new


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The operator by chunks of ``chunk`` tokens: O(T chunk + T K V / chunk), forward and backward."""
    batch, tokens, heads, dim = q.shape
    if heads % k.shape[2] or k.shape[2] != v.shape[2]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[2]} key and {v.shape[2]} value heads")
    wide = product_dtype(q.dtype, q.device)
    if wide != q.dtype:
        out, state = chunked(q.to(wide), k.to(wide), v.to(wide), log_decay, state, first, chunk)
        return out.to(q.dtype), state
    if state is None:
        state = torch.zeros(batch, heads, dim, v.shape[-1], dtype=_state_dtype(q), device=q.device)
    # Whole chunks in one call and the rest as one shorter chunk in another, so that nothing is ever padded.
    whole = tokens - tokens % chunk
    outs = []
    for begin, end in ((0, whole), (whole, tokens)):
        if begin == end:
            continue
        span = slice(begin, end)
        decay = log_decay[:, span] if log_decay is not None and log_decay.dim() == 3 else log_decay
        resets = None if first is None else first[:, span]
        out, state = _Chunked.apply(q[:, span], k[:, span], v[:, span], decay, state, resets, min(chunk, end - begin))
        outs.append(out)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)), state


class _Weights(NamedTuple):
    """How far everything in a chunk has decayed; each broadcasts over (B, Hkv, N, R, ...) with R = H / Hkv."""

    within: Tensor | None  # (.., C, C): of key j as seen by query i; None: causal without decay
    head: Tensor | None  # (.., C, 1): of the incoming state as seen by query i
    tail: Tensor | None  # (.., 1, C): of key j at the chunk's end
    carry: Tensor | None  # (.., 1, 1): of the incoming state at the chunk's end


def _decay_weights(log_decay: Tensor | None, first: Tensor | None, groups: int, chunk: int, device: Any) -> _Weights:
    if log_decay is None and first is None:
        return _Weights(None, None, None, None)
    if log_decay is None:
        total = torch.zeros(1, 1, 1, 1, chunk, device=device)
    elif log_decay.dim() == 1:  # fixed: the same in every row and chunk
        steps = torch.arange(1, chunk + 1, device=device, dtype=torch.promote_types(log_decay.dtype, torch.float32))
        total = (log_decay[:, None] * steps).view(1, -1, 1, groups, chunk)
    else:
        g = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32))
        if first is not None:
            g = g.masked_fill(first[..., None], 0.0)
        batch, tokens, heads = g.shape
        total = g.view(batch, tokens // chunk, chunk, heads // groups, groups).permute(0, 3, 1, 4, 2).cumsum(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    # exp only where the exponent is at most 0: above the diagonal it could overflow.
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    head, tail, carry = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None, :], total[..., -1:].exp()
    carry = carry[..., None]
    if first is not None:
        segment = first.view(first.shape[0], 1, -1, 1, chunk).long().cumsum(-1)
        within = within * (segment[..., :, None] == segment[..., None, :])
        head = head * (segment == 0)[..., None]
        tail = tail * (segment == segment[..., -1:])[..., None, :]
        carry = carry * (segment[..., -1:] == 0)[..., None]
    return _Weights(within, head, tail, carry)


def _scaled(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight.to(x.dtype)


def _add(x: Tensor, more: Tensor, weight: Tensor | None) -> None:
    """x += weight * more, in place."""
    if weight is None:
        x.add_(more)
    else:
        x.addcmul_(more, weight.to(x.dtype))


def _add_groups(x: Tensor, more: Tensor, weight: Tensor | None) -> None:
    """x (B, Hkv, N, C, D) += the sum over a group of weight * more (B, Hkv, N, R, C, D), in place."""
    if more.shape[3] == 1:
        _add(x, more[:, :, :, 0], None if weight is None else weight[:, :, :, 0])
    else:
        x.add_(_scaled(more, weight).sum(3))


def _masked(scores: Tensor, weight: Tensor | None) -> Tensor:
    """Scores (B, Hkv, N, R, C, C) with the future removed and the decay applied, in place."""
    return scores.tril_() if weight is None else scores.mul_(weight.to(scores.dtype))


class _Chunked(torch.autograd.Function):
    """Whole chunks only. Inside, a sequence is (B, Hkv, N, C, D), queries (B, Hkv, N, R, C, D): the R query heads
    of a key head lie in the rows of one product, so that keys and values are never repeated."""

    @staticmethod
    def forward(ctx: Any, q, k, v, log_decay, state, first, chunk):  # type: ignore[override]
        groups = q.shape[2] // k.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            w = _decay_weights(log_decay, first, groups, chunk, q.device)
            Q, K, V = _split_heads(q, chunk, groups), _split(k, chunk), _split(v, chunk)
            scores = _scores(Q, K, w)
            states, last = _scan(_outer(K, V, w.tail), w.carry, state)
            out = _unrows(_rows(scores) @ V, groups)
            _add(out, Q @ states.to(Q.dtype), w.head)
        ctx.save_for_backward(Q, K, V, scores, log_decay, first, states)
        return _merge_heads(out), last.flatten(1, 2).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dlast):  # type: ignore[override]
        Q, K, V, scores, log_decay, first, states = ctx.saved_tensors
        groups, chunk = Q.shape[3:5]
        with torch.autocast(Q.device.type, enabled=False):
            w = _decay_weights(log_decay, first, groups, chunk, Q.device)
            dO = _split_heads(dout.to(Q.dtype), chunk, groups)
            dstates, dfirst = _scan_back(_scaled(Q, w.head).transpose(-1, -2) @ dO, w.carry, dlast)
            dS, S = dstates.to(Q.dtype), states.to(Q.dtype)

            dscores = _scores(dO, V, w)  # the decay is the same on the way back
            dQ = _unrows(_rows(dscores) @ K, groups)
            dQ_head = dO @ S.transpose(-1, -2)  # still undecayed
            _add(dQ, dQ_head, w.head)
            dK = _rows(dscores).transpose(-1, -2) @ _rows(Q)
            tail = None if w.tail is None else w.tail.transpose(-1, -2)
            dK_tail = V.unsqueeze(3) @ dS.transpose(-1, -2)  # (B, Hkv, N, R, C, K), still undecayed
            dV = _rows(scores).transpose(-1, -2) @ _rows(dO)
            _add_groups(dV, K.unsqueeze(3) @ dS, tail)
            dlog = None
            if ctx.needs_input_grad[3]:
                assert w.head is not None and w.tail is not None and w.carry is not None
                wide = dstates.dtype
                pairs = dscores.mul_(_undecayed(Q, K))
                head = _scaled((dQ_head.to(wide) * Q).sum(-1), w.head[..., 0])
                tailed = _scaled((dK_tail.to(wide) * K.unsqueeze(3)).sum(-1), w.tail[..., 0, :])
                carried = _scaled((dstates * states).sum((-1, -2)), w.carry[..., 0, 0])
                total = pairs.sum(-1, dtype=wide) - pairs.sum(-2, dtype=wide) + head - tailed
                total[..., -1] += tailed.sum(-1) + carried
                dlog = _decay_gradient(total, first, log_decay)
            _add_groups(dK, dK_tail, tail)
        dstate = dfirst.flatten(1, 2) if ctx.needs_input_grad[4] else None
        return _merge_heads(dQ), _merge(dK), _merge(dV), dlog, dstate, None, None


def _undecayed(Q: Tensor, K: Tensor) -> Tensor:
    return _unrows(_rows(Q) @ K.transpose(-1, -2), Q.shape[3])


def _scores(Q: Tensor, K: Tensor, w: _Weights) -> Tensor:
    """Causal, decayed q_i . k_j: (B, Hkv, N, R, C, C)."""
    return _masked(_undecayed(Q, K), w.within)


def _outer(K: Tensor, V: Tensor, tail: Tensor | None) -> Tensor:
    """What each chunk adds to the state: (B, Hkv, N, R or 1, K, V); 1 where all heads of a group add the same."""
    keys = _scaled(K.transpose(-1, -2).unsqueeze(3), tail)
    return (keys.flatten(3, 4) @ V).unflatten(3, keys.shape[3:5])


def _scan(added: Tensor, carry: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk (B, Hkv, N, R, K, V) and the one after the last (B, Hkv, R, K, V)."""
    batch, kv_heads, chunks, _, dim_k, dim_v = added.shape
    states = state.new_empty(batch, kv_heads, chunks, state.shape[1] // kv_heads, dim_k, dim_v)
    last = torch.empty_like(states[:, :, 0])
    slots = [*states.unbind(2), last]
    slots[0].copy_(state.unflatten(1, (kv_heads, -1)))
    for n in range(chunks):
        _carry(slots[n], added[:, :, n], carry, n, slots[n + 1])
    return states, last


def _scan_back(added: Tensor, carry: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each chunk (B, Hkv, N, R, K, V) and before the first (B, Hkv, R, K, V)."""
    dtype = torch.promote_types(added.dtype, torch.float32)
    states = torch.empty(added.shape, dtype=dtype, device=added.device)
    before = torch.empty_like(states[:, :, 0])
    slots = [before, *states.unbind(2)]
    if last is None:
        slots[-1].zero_()
    else:
        slots[-1].copy_(last.unflatten(1, (added.shape[1], -1)))
    for n in reversed(range(added.shape[2])):
        _carry(slots[n + 1], added[:, :, n], carry, n, slots[n])
    return states, before


def _carry(now: Tensor, added: Tensor, carry: Tensor | None, n: int, out: Tensor) -> None:
    """One chunk further: out = added + carry * now."""
    if carry is None:
        torch.add(now, added, out=out)
    else:
        torch.addcmul(added.to(out.dtype), now, carry[:, :, n % carry.shape[2]], out=out)


def _decay_gradient(total: Tensor, first: Tensor | None, log_decay: Tensor) -> Tensor:
    """From the gradient by the log decay cumulated over each chunk (B, Hkv, N, R, C) to that by the log decay itself.

    A key j that token i of its chunk sees counts +x at i and -x at j; +x at i alone, what i sees of the incoming state.
    So a token's log decay gathers what comes after it in its chunk, and rounding in half precision never adds up over
    a sequence.
    """
    flow = total.flip(-1).cumsum(-1).flip(-1).permute(0, 2, 4, 1, 3).flatten(3, 4).flatten(1, 2)  # (B, T, H)
    if first is not None:
        flow = flow.masked_fill(first[..., None], 0.0)
    return (flow.sum((0, 1)) if log_decay.dim() == 1 else flow).to(log_decay.dtype)


def _split(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, D) -> (B, H, N, C, D), contiguous."""
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _merge(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)


def _split_heads(x: Tensor, chunk: int, groups: int) -> Tensor:
    """(B, T, H, D) -> (B, Hkv, N, R, C, D), contiguous."""
    return x.unflatten(2, (-1, groups)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 4, 2, 5).contiguous()


def _merge_heads(x: Tensor) -> Tensor:
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, Hkv, N, R, C, D) -> (B, Hkv, N, R * C, D)."""
    return x.flatten(3, 4)


def _unrows(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(3, (groups, -1))


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _decay_per_token(log_decay: Tensor | None, first: Tensor | None, q: Tensor) -> Tensor:
    """exp(log_decay), 0 at the first token of a document: (B, T, H)."""
    shape = q.shape[:3]
    decay = torch.ones(shape, device=q.device) if log_decay is None else log_decay.exp().expand(shape)
    return decay if first is None else decay.masked_fill(first[..., None], 0.0)
