"""Softmax attention: the teacher and the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, State, Tensor, build_norm, norm_over_heads
from open_lm_linear.rotary import Rotary


class _Buffer:
    """Keys, values and document numbers of a batch, with room to grow; shared by successive states."""

    def __init__(self, k: Tensor, v: Tensor, document: Tensor) -> None:
        self.k, self.v, self.document, self.used = k, v, document, k.shape[1]

    def fits(self, begin: int, more: int) -> bool:
        """Whether ``more`` tokens can be written after ``begin`` without touching what another state or graph reads."""
        # A graph may need the buffer as it is, and what inference mode made cannot be written outside of it.
        writable = not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not self.k.is_inference())
        return writable and begin == self.used and begin + more <= self.k.shape[1]

    def write(self, begin: int, k: Tensor, v: Tensor, document: Tensor) -> None:
        end = begin + k.shape[1]
        self.k[:, begin:end], self.v[:, begin:end], self.document[:, begin:end] = k, v, document
        self.used = end

    @classmethod
    def copy(cls, k: Tensor, v: Tensor, document: Tensor, capacity: int) -> _Buffer:
        def grown(x: Tensor) -> Tensor:
            room = x.new_empty(x.shape[0], capacity, *x.shape[2:])
            room[:, : x.shape[1]] = x
            return room

        buffer = cls(grown(k), grown(v), grown(document))
        buffer.used = k.shape[1]
        return buffer


@dataclass(frozen=True)
class KVState(State):
    """The first ``length`` tokens of a buffer: k (B, length, Hkv, K), v (B, length, Hkv, V), document (B, length).

    ``document`` numbers the packed document of each key; -1 marks padding, which no query sees. ``current`` (B,) is
    the document that goes on in the next call. ``plain`` says that all is one document without padding.
    """

    buffer: _Buffer
    length: int
    current: Tensor
    plain: bool

    @property
    def k(self) -> Tensor:
        return self.buffer.k[:, : self.length]

    @property
    def v(self) -> Tensor:
        return self.buffer.v[:, : self.length]

    @property
    def document(self) -> Tensor:
        return self.buffer.document[:, : self.length]

    def extended(self, k: Tensor, v: Tensor, document: Tensor, current: Tensor, plain: bool) -> KVState:
        """This state with T tokens more. Written in place where no other state has gone on from here."""
        more, length = k.shape[1], self.length + k.shape[1]
        if self.buffer.fits(self.length, more):
            buffer = self.buffer
        else:
            # Under autograd no room: a later call without it must not write into what the graph has saved.
            capacity = length if torch.is_grad_enabled() else max(length + 64, length * 3 // 2)
            buffer = _Buffer.copy(self.k, self.v, self.document, capacity)
        buffer.write(self.length, k, v, document)
        return KVState(buffer, length, current, plain)

    def select(self, rows: Tensor) -> KVState:
        k, v, document = (x.index_select(0, rows) for x in (self.k, self.v, self.document))
        return KVState(_Buffer(k, v, document), self.length, self.current.index_select(0, rows), self.plain)

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))


class SoftmaxAttention(Attention):
    """softmax(q k^T / sqrt(K)) v by torch's scaled_dot_product_attention, keys and values cached."""

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        self.rotary = Rotary(arch, arch.qk_dim)
        if arch.qk_norm:
            self.q_norm = build_norm(arch.model_norm, arch.n_heads * arch.qk_dim, arch.norm_eps)
            self.k_norm = build_norm(arch.model_norm, arch.kv_heads * arch.qk_dim, arch.norm_eps)

    def init_weights(self) -> None:
        super().init_weights()
        if self.arch.qk_norm:
            self.q_norm.init_weights()
            self.k_norm.init_weights()

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
        if self.arch.qk_norm:
            q, k = norm_over_heads(self.q_norm, q).to(v.dtype), norm_over_heads(self.k_norm, k).to(v.dtype)
        q, k = self.rotary(q, k, positions)
        assert state is None or isinstance(state, KVState)
        new, document = self._remember(k, v, keep, first, state)
        mask = None if new.plain and (state is None or x.shape[1] == 1) else _mask(document, new, keep)
        out = _attend(q, new.k, new.v, mask, causal=mask is None and state is None)
        return self.out_proj(out.flatten(2)), new

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
        a = self.arch
        return self._projection_flops() + 2.0 * a.n_heads * (a.qk_dim + a.v_dim) * seq_len / 2

    def state_bytes(self, batch: int, seq_len: int) -> int:
        a = self.arch
        return 2 * batch * seq_len * a.kv_heads * (a.qk_dim + a.v_dim)


def _mask(document: Tensor, state: KVState, keep: Tensor | None) -> Tensor:
    """(B, 1, T, S): True where a query sees a key. Every query sees itself, so that no row is empty."""
    tokens, keys = document.shape[1], state.length
    index = torch.arange(keys, device=document.device)
    query = index[keys - tokens :, None]
    same = document[:, :, None] == state.document[:, None, :]
    return ((same & (index <= query)) | (index == query))[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """(B, T, H, V) from q (B, T, H, K), k (B, S, Hkv, K), v (B, S, Hkv, V)."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.shape[1] == 1 and groups > 1 and mask is None:
        # One token: the query heads of a group are rows of one product, so the cache is read once, unrepeated.
        rows = q[:, 0].unflatten(1, (k.shape[2], groups))  # (B, Hkv, R, K)
        return F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2)).flatten(1, 2)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
    return out.transpose(1, 2)


MIXER = SoftmaxAttention
