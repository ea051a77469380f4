"""Decayed linear attention by Triton: the operator of `linear_attention` for one decay per head, fixed or trained.

`triton_attention` takes the same arguments as the torch form, in bfloat16 or float32 on a GPU (or anywhere under
TRITON_INTERPRET=1), and gives the gradients by q, k, v, the decays and the state. The two functions that launch kernels
are custom operators of torch, with shapes for a compiler and a gradient, so that a compiled block keeps them in its one
graph.

The decays' gradient needs no kernel. With L the loss, g a head's log decay and p_t the tokens read up to t, token i
sees key j by w_ij = exp(g (p_i - p_j)) (q_i . k_j) (do_i . v_j), whose sum over j is q_i . dq_i and over i k_j . dk_j:

    dL/dg = sum_ij (p_i - p_j) w_ij = sum_i (p_i - p_T) (q_i . dq_i) - sum_j (p_j - p_T) (k_j . dk_j) + p_T <dS_0, S_0>,

where the last state takes part as one more reader, at p_T, and the first one as a key at 0. The two sums nearly cancel:
dq and dk are left in float32 for them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from open_lm_linear.ops.triton_decoding import triton_step
from open_lm_linear.ops.triton_kernels import INTERPRETED, link_kernel, scan_kernel

__all__ = ["INTERPRETED", "triton_attention", "triton_step"]  # what `backends` takes from here

Tensor = torch.Tensor

LIBRARY = "open_lm_linear"
TUNED_FROM = 1024  # tokens: below, block sizes are not searched for
SEGMENT = 512  # tokens that a program walks along at least: shorter, and the states cost more than the tokens
# Whether what a kernel computes itself enters half precision products as the sum of two numbers: twice the products,
# and errors of 1e-5 in place of 2e-3. Outputs are rounded to half precision anyway; gradients must not drift.
SPLIT_FORWARD, SPLIT_BACKWARD = False, True


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """The operator: out (B, T, H, V) in q's dtype and the state after the last token (B, H, K, V) in float32.

    Args:
        q: (B, T, H, K); k: (B, T, Hkv, K); v: (B, T, Hkv, V), of one dtype, bfloat16 or float32.
        log_decay: (H,), 0 or less; None: no decay.
        state: (B, H, K, V).
        first: (B, T) bool, True at the first token of a document.
        keep: (B, T) bool, False at a padded token, where nothing decays; its key must be 0.
        segment: tokens that one program walks along (0: as fills the device).

    Raises:
        ValueError: dtypes, shapes or a decay that the kernels do not take.
    """
    if q.shape[2] % k.shape[2] or k.shape[2] != v.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key and {v.shape[2]} value heads")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernels take bfloat16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}")
    if log_decay is None:
        log_decay = torch.zeros(q.shape[2], device=q.device)
    if log_decay.dim() != 1:
        raise ValueError("the Triton kernels take one decay a head: the torch form has one for each token")
    if state is not None:
        state = state.float()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and state.is_inference():
            state = state.clone()  # as it is, no graph may keep it
    return triton_forward(q, k, v, log_decay.float(), state, first, keep, segment)


@torch.library.custom_op(f"{LIBRARY}::linear_attention_scan", mutates_args=())
def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    first: Tensor | None,
    keep: Tensor | None,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state; the arguments of `triton_attention`."""
    q, k, v = (_rows_together(x) for x in (q, k, v))
    scan = _Scan(q, log_decay, first, keep, segment or _segment(q, v), SPLIT_FORWARD)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    last = _empty_state(q, v)
    with torch.cuda.device_of(q):
        scan.run(q, k, v, scan.starts(k, v, state, backwards=False), out, last)
    return out, last


@triton_forward.register_fake
def _(q, k, v, log_decay, state, first, keep, segment):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:3], v.shape[3])), _empty_state(q, v)


@torch.library.custom_op(f"{LIBRARY}::linear_attention_scan_backward", mutates_args=())
def triton_backward(
    dout: Tensor,
    dlast: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    first: Tensor | None,
    keep: Tensor | None,
    trained: bool,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by q, k, v, the log decays (empty if they are not ``trained``) and the state before the first token."""
    q, k, v, dout = (_rows_together(x) for x in (q, k, v, dout))
    scan = _Scan(q, log_decay, first, keep, segment or _segment(q, v), SPLIT_BACKWARD)
    dq, dstate = (
        torch.empty(q.shape, dtype=q.dtype if not trained else torch.float32, device=q.device),
        _empty_state(q, v),
    )
    dk, dv = scan.per_query_head(k, wide=trained), scan.per_query_head(v)
    with torch.cuda.device_of(q):
        before = scan.starts(k, v, state, backwards=False)
        after = scan.starts(q, dout, dlast, backwards=True)
        scan.run(dout, v, k, before, dq, turned=True)
        scan.run(k, q, dout, after, dv, dstate, backwards=True)
        scan.run(v, dout, q, after, dk, backwards=True, turned=True)
    decays = log_decay.new_empty(0)
    if trained:
        carried = torch.zeros_like(dstate[..., 0, 0]) if state is None else (dstate * state).sum((2, 3))
        decays = _decay_gradient(q, dq, k, dk, carried, keep).to(log_decay.dtype)
    return dq.to(q.dtype), scan.summed(dk, k), scan.summed(dv, v), decays, dstate


@triton_backward.register_fake
def _(dout, dlast, q, k, v, log_decay, state, first, keep, trained, segment):  # type: ignore[no-untyped-def]
    decays = log_decay.new_empty(log_decay.shape[0] if trained else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), decays, _empty_state(q, v)


def _decay_gradient(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, carried: Tensor, keep: Tensor | None) -> Tensor:
    """(H,) float64, from dq and dk (B, T, H, K) of every query head and <dS_0, S_0> (B, H)."""
    read = torch.ones(q.shape[:2], device=q.device) if keep is None else keep
    read = read.cumsum(1, dtype=torch.float64)
    k = k.unsqueeze(3).expand(*k.shape[:3], q.shape[2] // k.shape[2], k.shape[3]).flatten(2, 3)
    each = (q * dq).sum(-1, dtype=torch.float64) - (k * dk).sum(-1, dtype=torch.float64)  # (B, T, H)
    return torch.einsum("bt,bth->h", read - read[:, -1:], each) + torch.einsum("b,bh->h", read[:, -1], carried.double())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.segment = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    dq, dk, dv, decays, dstate = triton_backward(dout, dlast, *ctx.saved_tensors, needed[3], ctx.segment)
    return dq, dk, dv, (decays if needed[3] else None), (dstate if needed[4] else None), None, None, None


triton_forward.register_autograd(_gradients, setup_context=_save)


class _Scan:
    """What the launches of one call share."""

    def __init__(
        self, q: Tensor, log_decay: Tensor, first: Tensor | None, keep: Tensor | None, segment: int, split: bool
    ) -> None:
        self.batch, self.tokens, self.heads, _ = q.shape
        self.log_decay = log_decay
        self.first, self.keep = (None if x is None else x.contiguous() for x in (first, keep))
        self.segment, self.split = segment, split and q.dtype != torch.float32
        self.parts = triton.cdiv(self.tokens, segment)

    def per_query_head(self, x: Tensor, wide: bool = False) -> Tensor:
        """Room for the gradient of x (B, T, Hkv, D); in float32 if ``wide`` or if query heads of a group are summed."""
        dtype = x.dtype if x.shape[2] == self.heads and not wide else torch.float32
        return torch.empty((self.batch, self.tokens, self.heads, x.shape[3]), dtype=dtype, device=x.device)

    def summed(self, dx: Tensor, x: Tensor) -> Tensor:
        """The gradient of x from that of each query head."""
        return (dx if x.shape[2] == self.heads else dx.unflatten(2, (x.shape[2], -1)).sum(3)).to(x.dtype)

    def starts(self, b: Tensor, c: Tensor, given: Tensor | None, *, backwards: bool) -> Tensor | None:
        """The state that each segment starts with (B, H, N, K, V); None: zeros."""
        given = None if given is None else given.contiguous()
        if self.parts == 1:
            return given
        shape = (self.batch, self.heads, self.parts)
        states = torch.empty((*shape, b.shape[3], c.shape[3]), dtype=torch.float32, device=b.device)
        carries = torch.empty(shape, dtype=torch.float32, device=b.device)
        self._launch(None, b, c, None, None, states, carries, backwards=backwards, turned=False)
        size = b.shape[3] * c.shape[3]
        grid = (triton.cdiv(size, 1024), self.batch * self.heads)
        kinds = {"HAS_GIVEN": given is not None, "BACKWARDS": backwards}
        link_kernel[grid](states, carries, _any(given, states), self.parts, SIZE=size, BLOCK=1024, **kinds)
        return states

    def run(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        starts: Tensor | None,
        out: Tensor,
        last: Tensor | None = None,
        *,
        backwards: bool = False,
        turned: bool = False,
    ) -> None:
        """Fills ``out`` (B, T, H, V) and ``last``; ``turned`` where the states are stored (.., V, K)."""
        self._launch(a, b, c, starts, out, last, None, backwards=backwards, turned=turned)

    def _launch(
        self,
        a: Tensor | None,
        b: Tensor,
        c: Tensor,
        starts: Tensor | None,
        out: Tensor | None,
        ends: Tensor | None,
        carries: Tensor | None,
        *,
        backwards: bool,
        turned: bool,
    ) -> None:
        dim_a, dim_c = b.shape[3], c.shape[3]
        share_a = 1 if a is None else self.heads // a.shape[2]
        arguments = [
            *(_any(a, b), b, c, self.log_decay, _any(self.first, b), _any(self.keep, b), _any(starts, b)),
            *(_any(out, b), _any(ends, b), _any(carries, b), self.tokens, self.segment, self.heads),
            *(share_a, self.heads // b.shape[2]),
            *(stride for x in (_any(a, b), b, c) for stride in x.stride()[:3]),
            *((1, dim_a) if turned else (dim_c, 1)),
        ]
        kinds: dict[str, Any] = {
            "DIM_A": dim_a,
            "DIM_C": dim_c,
            "BLOCK_A": _power_of_2(dim_a),
            "HAS_FIRST": self.first is not None,
            "HAS_KEEP": self.keep is not None,
            "HAS_START": starts is not None,
            "WANT_END": ends is not None,
            "OUTPUT": out is not None,
            "BACKWARDS": backwards,
            "SPLIT": self.split,
            "PRECISION": "tf32x3",
        }

        def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
            return triton.cdiv(dim_c, meta["BLOCK_C"]), self.parts, self.batch * self.heads

        if INTERPRETED:
            scan_kernel[grid](*arguments, **kinds, CHUNK=16, BLOCK_C=min(32, _power_of_2(dim_c)))
        elif self.tokens < TUNED_FROM:
            scan_kernel[grid](*arguments, **kinds, **_untuned(dim_a, dim_c, b.dtype))
        else:
            _tuned(dim_c)[grid](*arguments, **kinds)


def _untuned(dim_a: int, dim_c: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes that fit everywhere, for sequences that are over before a search has paid off."""
    if dtype == torch.float32:
        return {"CHUNK": 32, "BLOCK_C": min(32, _power_of_2(dim_c)), "num_warps": 8, "num_stages": 1}
    return {"CHUNK": 64, "BLOCK_C": min(64, _power_of_2(dim_c)), "num_warps": 4 if dim_a <= 128 else 8, "num_stages": 2}


@functools.lru_cache(maxsize=8)
def _tuned(dim_c: int) -> Any:
    """The kernel with the block sizes to try; the fastest is found at the first call of each kind and kept."""
    blocks = [(64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2)]
    blocks += [(32, 32, 4, 1), (32, 32, 8, 1)]  # for float32 and wide heads, which have no room for more
    widest = _power_of_2(dim_c)
    tried = dict.fromkeys((chunk, min(block, widest), warps, stages) for chunk, block, warps, stages in blocks)
    configs = [
        triton.Config({"CHUNK": chunk, "BLOCK_C": block}, num_warps=warps, num_stages=stages)
        for chunk, block, warps, stages in tried
    ]
    key = ["DIM_A", "DIM_C", "HAS_FIRST", "HAS_KEEP", "OUTPUT", "BACKWARDS", "SPLIT"]
    return triton.autotune(configs, key=key)(scan_kernel)


def _power_of_2(dim: int) -> int:
    """The block that holds so many columns; a matrix product wants at least 16."""
    return max(16, triton.next_power_of_2(dim))


def _any(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that a kernel does not read."""
    return other if x is None else x


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _empty_state(q: Tensor, v: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _segment(q: Tensor, v: Tensor) -> int:
    """Tokens a program walks along, so that there are about two programs for each multiprocessor."""
    if not q.is_cuda:
        return q.shape[1]
    programs = q.shape[0] * q.shape[2] * triton.cdiv(v.shape[3], 64)
    parts = -(-2 * _multiprocessors(q.device.index or 0) // programs)
    return max(SEGMENT, triton.cdiv(triton.cdiv(q.shape[1], max(parts, 1)), 128) * 128)


@functools.lru_cache(maxsize=8)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
