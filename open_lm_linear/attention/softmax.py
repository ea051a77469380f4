"""Softmax attention: the teacher and the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, State, Tensor
from open_lm_linear.rotary import Rotary


class _Buffer:
    """Keys, values and document numbers of a batch, with room to grow; shared by successive states."""

    def __init__(self, k: Tensor, v: Tensor, document: Tensor) -> None:
        self.k, self.v, self.document = k, v, document
        self.free = {k.shape[1]}  # where the next tokens may go; none while a state is writing them

    def take(self, begin: int, more: int) -> bool:
        """Whether ``more`` tokens can be written after ``begin`` without touching what another state or graph reads.

        Of several states, or threads, that go on from one place, the first one gets it.
        """
        # A graph may need the buffer as it is, and what inference mode made cannot be written outside of it.
        writable = not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not self.k.is_inference())
        if not writable or begin + more > self.k.shape[1]:
            return False
        try:
            self.free.remove(begin)  # one step, so that no other thread can come between
        except KeyError:
            return False
        return True

    def write(self, begin: int, k: Tensor, v: Tensor, document: Tensor) -> None:
        end = begin + k.shape[1]
        self.k[:, begin:end], self.v[:, begin:end], self.document[:, begin:end] = k, v, document
        self.free = {end}

    @classmethod
    def copy(cls, k: Tensor, v: Tensor, document: Tensor, capacity: int) -> _Buffer:
        def grown(x: Tensor) -> Tensor:
            room = x.new_empty(x.shape[0], capacity, *x.shape[2:])
            room[:, : x.shape[1]] = x
            return room

        buffer = cls(grown(k), grown(v), grown(document))
        buffer.free = {k.shape[1]}
        return buffer


@dataclass(frozen=True)
class KVState(State):
    """Tokens ``begin`` to ``length`` of a buffer: k (B, S, Hkv, K), v (B, S, Hkv, V), document (B, S).

    ``begin`` is above 0 where a sliding window has left earlier tokens behind.
    ``document`` numbers the packed document of each key; -1 marks padding, which no query sees. ``current`` (B,) is
    the document that goes on in the next call. ``plain`` says that all is one document without padding.
    """

    buffer: _Buffer
    length: int
    current: Tensor
    plain: bool
    begin: int = 0

    @property
    def k(self) -> Tensor:
        return self.buffer.k[:, self.begin : self.length]

    @property
    def v(self) -> Tensor:
        return self.buffer.v[:, self.begin : self.length]

    @property
    def document(self) -> Tensor:
        return self.buffer.document[:, self.begin : self.length]

    def extended(self, k: Tensor, v: Tensor, document: Tensor, current: Tensor, plain: bool) -> KVState:
        """This state with T tokens more. Written in place where no other state has gone on from here."""
        more, length = k.shape[1], self.length + k.shape[1]
        if self.buffer.take(self.length, more):
            buffer, begin = self.buffer, self.begin
        else:
            # Under autograd no room: a later call without it must not write into what the graph has saved.
            length, begin = length - self.begin, 0
            capacity = length if torch.is_grad_enabled() else max(length + 64, length * 3 // 2)
            buffer = _Buffer.copy(self.k, self.v, self.document, capacity)
        buffer.write(length - more, k, v, document)
        return KVState(buffer, length, current, plain, begin)

    def within(self, window: int | None) -> KVState:
        """What a call after this one can see through a sliding window."""
        if window is None or not self.plain:  # padding takes no place in the window, so its keys cannot be counted out
            return self
        return replace(self, begin=max(self.begin, self.length - window))

    def select(self, rows: Tensor) -> KVState:
        rows = rows.to(self.document.device)  # layers may lie on several devices
        k, v, document = (x.index_select(0, rows) for x in (self.k, self.v, self.document))
        return KVState(_Buffer(k, v, document), k.shape[1], self.current.index_select(0, rows), self.plain)

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v, "document": self.document, "current": self.current}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> KVState:
        document = tensors["document"]
        buffer = _Buffer(tensors["k"], tensors["v"], document)
        return cls(buffer, document.shape[1], tensors["current"], plain=bool((document == 0).all()))


class SoftmaxAttention(Attention):
    """softmax(q k^T / sqrt(K)) v by torch's scaled_dot_product_attention, keys and values cached."""

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        self.rotary = Rotary(arch, arch.qk_dim, layer)
        self.window = arch.window(layer)
        self.scale = (arch.query_pre_attn_scalar or arch.qk_dim) ** -0.5

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        keep: Tensor | None = None,
        first: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        q, k, v = self._project(x)
        q, k = self.rotary(q, k, positions)
        assert state is None or isinstance(state, KVState)
        new, document = self._remember(k, v, keep, first, state)
        tokens, keys = x.shape[1], new.length - new.begin
        # One token, or all of them without a past, need no mask where they see all that is there.
        plain = new.plain and (state is None or tokens == 1) and (self.window is None or keys <= self.window)
        mask = None if plain else _mask(document, new, self.window)
        causal = mask is None and state is None
        out = _attend(q, new.k, new.v, mask, causal=causal, scale=self.scale, softcap=self.arch.attn_logit_softcap)
        return self.out_proj(out.flatten(2)), new.within(self.window)

    @staticmethod
    def _remember(
        k: Tensor, v: Tensor, keep: Tensor | None, first: Tensor | None, state: KVState | None
    ) -> tuple[KVState, Tensor]:
        """The state with these tokens added, and the document number (B, T) of each of them."""
        begin = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device) if state is None else state.current
        document = begin[:, None].expand(k.shape[:2])
        if first is not None:
            document = document + first.int().cumsum(1, dtype=torch.int32)
        current = document[:, -1]
        plain = keep is None and first is None and (state is None or state.plain)
        seen = document if keep is None else document.masked_fill(~keep, -1)
        if state is None:
            return KVState(_Buffer(k, v, seen), k.shape[1], current, plain), document
        return state.extended(k, v, seen, current, plain), document

    def flops_per_token(self, seq_len: int) -> float:
        a, window = self.arch, min(self.window or seq_len, seq_len)
        seen = window - window * window / (2 * seq_len)  # keys of a query on average
        return self._projection_flops() + 2.0 * a.n_heads * (a.qk_dim + a.v_dim) * seen

    def state_bytes(self, batch: int, seq_len: int) -> int:
        a = self.arch
        return 2 * batch * min(self.window or seq_len, seq_len) * a.kv_heads * (a.qk_dim + a.v_dim)


def _mask(document: Tensor, state: KVState, window: int | None) -> Tensor:
    """(B, 1, T, S): True where a query sees a key. Every query sees itself, so that no row is empty."""
    tokens, keys = document.shape[1], state.length - state.begin
    index = torch.arange(keys, device=document.device)
    query = index[keys - tokens :, None]
    seen = state.document
    same = document[:, :, None] == seen[:, None, :]
    near = index <= query
    if window is not None:
        count = (seen >= 0).cumsum(1)  # padding takes no place in the window
        near = near & (count[:, keys - tokens :, None] - count[:, None, :] < window)
    return ((same & near) | (index == query))[:, None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """(B, T, H, V) from q (B, T, H, K), k (B, S, Hkv, K), v (B, S, Hkv, V)."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is not None:
        return _attend_capped(q, k, v, mask, causal=causal, scale=scale, softcap=softcap)
    if q.shape[1] == 1 and groups > 1 and mask is None:
        # One token: the query heads of a group are rows of one product, so the cache is read once, unrepeated.
        rows = q[:, 0].unflatten(1, (k.shape[2], groups))  # (B, Hkv, R, K)
        one = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return one.flatten(1, 2)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2)


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float, softcap: float
) -> Tensor:
    """The same with logits x as softcap * tanh(x / softcap) (arXiv 2408.00118), which torch's kernel cannot."""
    q = q.unflatten(2, (k.shape[2], -1))  # (B, T, Hkv, R, K)
    logits = torch.einsum("btgrk,bsgk->bgrts", q, k).float() * scale
    logits = softcap * torch.tanh(logits / softcap)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~(mask[:, :, None] if mask.dim() == 4 else mask), float("-inf"))
    return torch.einsum("bgrts,bsgv->btgrv", logits.softmax(-1).to(v.dtype), v).flatten(2, 3)


MIXER = SoftmaxAttention
