"""The Triton kernels of decayed linear attention. `triton_linear` calls them; nothing else should.

One kernel, `scan_kernel`, is the operator and all of its gradients. With S the state and D its gradient,

    o  = scan(q,  k,  v)     S_t = gamma S_(t-1) + k_t^T v_t       o_t  = q_t S_t
    dq = scan(do, v,  k)     S^T in place of S                     dq_t = do_t S_t^T
    dv = scan(k,  q,  do)    backwards in time: D_t = q_t^T do_t + gamma D_(t+1)     dv_t = k_t D_t
    dk = scan(v,  do, q)     backwards, D^T in place of D          dk_t = v_t D_t^T

so that below the rows are called a, b and c: out_t = a_t . (sum over s of gamma^|t-s| b_s^T c_s). A program holds one
block of columns of the state of one head in registers and walks along one segment of the sequence, chunk by chunk, so
the states are never written; a, b, c are read once for each block of columns and out is written once. Where heads and
rows are too few to fill the device the sequence is cut into segments: a first pass over b and c alone gives what each
segment adds to the state, `link_kernel` runs over the segments, and the second pass starts each at its own state.

Decay enters only as exp of log_decay times a number of tokens, never as a quotient of powers: no exponent is above 0.
All sums and the state are float32. Products of half precision inputs run in half precision with float32 sums; what the
kernel computed itself (scores, state, weighted keys) is rounded for them, or with SPLIT kept as a sum of two numbers.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's numpy has no bfloat16 product


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, summed in float32."""
    if _WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _dot_left(wide, b, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """total + wide @ b with ``wide`` in float32 and b as the inputs are."""
    high = wide.to(b.dtype)
    total = _dot(high, b, total, PRECISION)
    if SPLIT:
        total = _dot((wide - high.to(tl.float32)).to(b.dtype), b, total, PRECISION)
    return total


@triton.jit
def _dot_right(a, wide, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ wide with ``wide`` in float32 and a as the inputs are."""
    high = wide.to(a.dtype)
    total = _dot(a, high, total, PRECISION)
    if SPLIT:
        total = _dot(a, (wide - high.to(tl.float32)).to(a.dtype), total, PRECISION)
    return total


@triton.jit
def _clocks(first, keep, i_t, count, HAS_FIRST: tl.constexpr, HAS_KEEP: tl.constexpr):
    """What a chunk's tokens count up to and with themselves: those that decay, and documents that begin."""
    inside = i_t < count
    if HAS_KEEP:
        clock = tl.cumsum(tl.load(keep + i_t, mask=inside, other=0).to(tl.int32), 0)
        last_clock = tl.max(clock, 0)
    else:
        clock, last_clock = i_t + 1, count
    if HAS_FIRST:
        document = tl.cumsum(tl.load(first + i_t, mask=inside, other=0).to(tl.int32), 0)
    else:
        document = tl.zeros_like(i_t)
    return clock, last_clock, document


@triton.jit
def _decays(g, clock, last_clock, document, HAS_FIRST: tl.constexpr):
    """How far the state before the chunk has decayed at each token, each token at the chunk's end, and all of it."""
    from_start = tl.exp(g * clock.to(tl.float32))
    to_end = tl.exp(g * tl.maximum(last_clock - clock, 0).to(tl.float32))
    whole = tl.exp(g * last_clock.to(tl.float32))
    if HAS_FIRST:
        last_document = tl.max(document, 0)
        from_start = tl.where(document == 0, from_start, 0.0)
        to_end = tl.where(document == last_document, to_end, 0.0)
        whole = tl.where(last_document == 0, whole, 0.0)
    return from_start, to_end, whole


@triton.jit
def _within(g, i_t, clock, document, HAS_FIRST: tl.constexpr, BACKWARDS: tl.constexpr):
    """How far one token of a chunk has decayed as another sees it; 0 where it does not."""
    age = clock[:, None] - clock[None, :]
    if BACKWARDS:
        age = -age
        meets = i_t[:, None] <= i_t[None, :]
    else:
        meets = i_t[:, None] >= i_t[None, :]
    if HAS_FIRST:
        meets = meets & (document[:, None] == document[None, :])
    return tl.exp(tl.where(meets, g * age.to(tl.float32), float("-inf")))


# a (B, T, its heads, DIM_A), b (B, T, heads of b and c, DIM_A), c (.., DIM_C): strides of row, token and head; the
#     last is 1. share_a, share_bc: query heads to one head of a, and of b and c.
# log_decay (H,) float32; first, keep (B, T) bool, read with HAS_FIRST, HAS_KEEP.
# starts (B, H, N, DIM_A, DIM_C) float32 with strides s_a, s_c of the last two, read with HAS_START.
# out (B, T, H, DIM_C) contiguous, written with OUTPUT; then ends is the state after the last segment (B, H, ..).
# Without OUTPUT, ends is what each segment adds to the state (B, H, N, ..), and carries (B, H, N) the share of its
#     first state that a segment leaves.
# fmt: off
@triton.jit(do_not_specialize=["tokens", "segment"])
def scan_kernel(
    a, b, c, log_decay, first, keep, starts, out, ends, carries,
    tokens, segment, heads, share_a, share_bc,
    a_row, a_token, a_head, b_row, b_token, b_head, c_row, c_token, c_head, s_a, s_c,
    DIM_A: tl.constexpr, DIM_C: tl.constexpr, BLOCK_A: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_START: tl.constexpr, WANT_END: tl.constexpr,
    OUTPUT: tl.constexpr, BACKWARDS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # fmt: on
    """One block of columns of one head's state along one segment of the sequence."""
    block, part, both, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    row, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    begin = part.to(tl.int64) * segment
    end = tl.minimum(begin + segment, tokens)
    chunks = ((end - begin + CHUNK - 1) // CHUNK).to(tl.int32)

    i_a, i_c, i_t = tl.arange(0, BLOCK_A), block * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, CHUNK)
    in_a, in_c = i_a < DIM_A, i_c < DIM_C
    a += row * a_row + (head // share_a) * a_head
    b += row * b_row + (head // share_bc) * b_head
    c += row * c_row + (head // share_bc) * c_head
    out += (row * tokens * heads + head) * DIM_C
    g = tl.load(log_decay + head)

    at = both.to(tl.int64) * parts + part  # of this program's state
    place = i_a[:, None] * s_a + i_c[None, :] * s_c
    in_state = in_a[:, None] & in_c[None, :]
    state = tl.zeros([BLOCK_A, BLOCK_C], dtype=tl.float32)
    if HAS_START:
        state += tl.load(starts + at * DIM_A * DIM_C + place, mask=in_state, other=0.0)
    carried = tl.full([], 1.0, dtype=tl.float32)

    for n in range(0, chunks):
        chunk = chunks - 1 - n if BACKWARDS else n
        here = begin + chunk * CHUNK
        count = tl.minimum(end - here, CHUNK).to(tl.int32)
        inside = i_t < count
        flags = row * tokens + here
        clock, last_clock, document = _clocks(first + flags, keep + flags, i_t, count, HAS_FIRST, HAS_KEEP)
        from_start, to_end, whole = _decays(g, clock, last_clock, document, HAS_FIRST)
        if BACKWARDS:
            seen, left = to_end, from_start
        else:
            seen, left = from_start, to_end

        # Wide offsets are for the chunk as a whole: 64 bits for each element would fill the registers.
        b_at = b + here * b_token + (i_t[None, :] * b_token + i_a[:, None])
        c_at = c + here * c_token + (i_t[:, None] * c_token + i_c[None, :])
        b_t = tl.load(b_at, mask=in_a[:, None] & inside[None, :], other=0.0)  # (DIM_A, CHUNK)
        c_t = tl.load(c_at, mask=inside[:, None] & in_c[None, :], other=0.0)
        if OUTPUT:
            a_at = a + here * a_token + (i_t[:, None] * a_token + i_a[None, :])
            a_t = tl.load(a_at, mask=inside[:, None] & in_a[None, :], other=0.0)
            nothing = tl.zeros([CHUNK, BLOCK_C], dtype=tl.float32)
            result = _dot_right(a_t, state, nothing, SPLIT, PRECISION) * seen[:, None]
            scores = _dot(a_t, b_t, tl.zeros([CHUNK, CHUNK], dtype=tl.float32), PRECISION)
            scores *= _within(g, i_t, clock, document, HAS_FIRST, BACKWARDS)
            result = _dot_left(scores, c_t, result, SPLIT, PRECISION)
            out_at = out + here * heads * DIM_C + (i_t[:, None] * (heads * DIM_C) + i_c[None, :])
            tl.store(out_at, result.to(out.dtype.element_ty), mask=inside[:, None] & in_c[None, :])
        state = _dot_left(b_t.to(tl.float32) * left[None, :], c_t, state * whole, SPLIT, PRECISION)
        carried *= whole

    if OUTPUT:
        if WANT_END:  # noqa: SIM102 (decided by the compiler, the next on the device)
            if part == (0 if BACKWARDS else parts - 1):
                tl.store(ends + both.to(tl.int64) * DIM_A * DIM_C + place, state, mask=in_state)
    else:
        tl.store(ends + at * DIM_A * DIM_C + place, state, mask=in_state)
        if block == 0:
            tl.store(carries + at, carried)


@triton.jit
def link_kernel(
    states,  # (B, H, N, SIZE) float32: what each segment adds; becomes the state that it starts with
    carries,  # (B, H, N) float32
    given,  # (B, H, SIZE) float32, the state to begin with; without HAS_GIVEN anything
    parts,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    both = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_GIVEN:
        state += tl.load(given + both * SIZE + i, mask=inside, other=0.0)
    for n in range(0, parts):
        at = both * parts + (parts - 1 - n if BACKWARDS else n)
        added = tl.load(states + at * SIZE + i, mask=inside, other=0.0)
        tl.store(states + at * SIZE + i, state, mask=inside)
        state = added + tl.load(carries + at) * state


# q, k, v (B, 1, their heads, ..): strides of row and head, the last is 1. state, new (B, H, DIM_K, DIM_V) float32
#     contiguous, state read with HAS_STATE. first, keep (B,) bool. out (B, H, DIM_V) contiguous.
# fmt: off
@triton.jit
def step_kernel(
    q, k, v, log_decay, first, keep, state, out, new,
    heads, share, q_row, q_head, k_row, k_head, v_row, v_head, eps,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_STATE: tl.constexpr, NORM: tl.constexpr,
):
    # fmt: on
    """One token of one head: the state is read, decayed, added to and written; the output normalised with NORM."""
    both = tl.program_id(0).to(tl.int64)
    row, head = both // heads, both % heads
    q += row * q_row + head * q_head
    k += row * k_row + (head // share) * k_head
    i_v = tl.arange(0, BLOCK_V)
    in_v = i_v < DIM_V
    values = tl.load(v + row * v_row + (head // share) * v_head + i_v, mask=in_v, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + head))
    if HAS_KEEP:
        decay = tl.where(tl.load(keep + row) != 0, decay, 1.0)
    if HAS_FIRST:
        decay = tl.where(tl.load(first + row) != 0, 0.0, decay)
    result = tl.zeros([BLOCK_V], dtype=tl.float32)
    for begin in range(0, DIM_K, BLOCK_K):
        i_k = begin + tl.arange(0, BLOCK_K)
        in_k = i_k < DIM_K
        place = both * DIM_K * DIM_V + i_k[:, None] * DIM_V + i_v[None, :]
        inside = in_k[:, None] & in_v[None, :]
        S = tl.load(k + i_k, mask=in_k, other=0.0).to(tl.float32)[:, None] * values[None, :]
        if HAS_STATE:
            S += decay * tl.load(state + place, mask=inside, other=0.0)
        tl.store(new + place, S, mask=inside)
        result += tl.sum(tl.load(q + i_k, mask=in_k, other=0.0).to(tl.float32)[:, None] * S, 0)
    if NORM:
        result -= tl.sum(result, 0) / DIM_V
        result = tl.where(in_v, result, 0.0)
        result *= tl.rsqrt(tl.sum(result * result, 0) / DIM_V + eps)
    tl.store(out + both * DIM_V + i_v, result.to(out.dtype.element_ty), mask=in_v)
