"""Softmax over a window of the last tokens and over sinks (arXiv 2309.17453): what a linear part is to be better than.

The state is a ring of the last tokens and the sinks, of one size from the first token on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, State, Tensor
from open_lm_linear.cli import UserError
from open_lm_linear.ops.window import Line, attend, find_sinks, line_up
from open_lm_linear.rotary import Rotary


@dataclass(frozen=True)
class WindowState(State):
    """``ring``: each (B, W, Hkv, .), the last W tokens; ``sinks``: keys and values (B, s, Hkv, .); ``seen`` (B,)."""

    ring: tuple[Tensor, ...]
    sinks: tuple[Tensor, ...]
    seen: Tensor

    @classmethod
    def empty(cls, new: tuple[Tensor, ...], window: int, sinks: int) -> WindowState:
        """Before the first token, for tokens like these (B, T, ...), of which the first two are keys and values."""

        def zeros(x: Tensor, tokens: int) -> Tensor:
            return x.new_zeros(x.shape[0], tokens, *x.shape[2:])

        seen = torch.zeros(len(new[0]), dtype=torch.long, device=new[0].device)
        return cls(tuple(zeros(x, window) for x in new), tuple(zeros(x, sinks) for x in new[:2]), seen)

    def after(self, line: Line) -> WindowState:
        """Behind the last column of a line that began with this state."""
        window = self.ring[0].shape[1]
        sinks = tuple(x[:, 0] for x in find_sinks(line, self.sinks, 1, False))
        return WindowState(tuple(x[:, -window:] for x in line.tokens), sinks, line.number[:, -1] + 1)

    def select(self, rows: Tensor) -> WindowState:
        ring, sinks = (tuple(x.index_select(0, rows) for x in part) for part in (self.ring, self.sinks))
        return WindowState(ring, sinks, self.seen.index_select(0, rows))

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.ring, *self.sinks))

    def tensors(self) -> dict[str, Tensor]:
        ring = {f"ring{i}": x for i, x in enumerate(self.ring)}
        return {**ring, **{f"sinks{i}": x for i, x in enumerate(self.sinks)}, "seen": self.seen}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> WindowState:
        def part(name: str) -> tuple[Tensor, ...]:
            return tuple(tensors[f"{name}{i}"] for i in range(len(tensors)) if f"{name}{i}" in tensors)

        return cls(part("ring"), part("sinks"), tensors["seen"])


def check_window(window: int, sinks: int) -> None:
    """Refuses a window or a number of sinks that cannot be."""
    if window < 1 or not 0 <= sinks <= window:
        raise UserError(f"window must be 1 or more and sinks at most as many, not {window} and {sinks}.")


class WindowAttention(Attention):
    @dataclass(frozen=True)
    class Config:
        """Options of softmax attention over a window and sinks."""

        window: int = 64
        """Tokens that a query sees, itself included."""
        sinks: int = 4
        """First tokens of the document that it sees too."""

    config: Config

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        check_window(self.config.window, self.config.sinks)
        self.rotary = Rotary(arch, arch.qk_dim, layer)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        keep: Tensor | None = None,
        first: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        assert state is None or isinstance(state, WindowState)
        q, k, v = self._project(x)
        q, k = self.rotary(q, k, positions)
        before = state or WindowState.empty((k, v), self.config.window, self.config.sinks)
        line = line_up(before.ring, before.seen, (k, v), keep, first)
        sinks = find_sinks(line, before.sinks, x.shape[1], first is not None)
        values, weights = attend(line.align(q), line, sinks, **softmax_options(self.arch))
        out = line.restore(values / weights.clamp(min=1.0))  # 1 is the largest weight; there are none at padding
        return self.out_proj(out.to(x.dtype).flatten(2)), before.after(line)

    def flops_per_token(self, seq_len: int) -> float:
        return self._projection_flops() + window_flops(self.arch, self.config.window, self.config.sinks)

    def state_bytes(self, batch: int, seq_len: int) -> int:
        a, c = self.arch, self.config
        return 2 * batch * (c.window + c.sinks) * a.kv_heads * (a.qk_dim + a.v_dim)

    @classmethod
    def complete(cls, arch: ModelConfig) -> ModelConfig:
        return replace(super().complete(arch), sliding_window=None, sliding_window_layers=None)


def softmax_options(arch: ModelConfig) -> dict[str, Any]:
    """Scale and cap of an architecture's logits."""
    return {"scale": (arch.query_pre_attn_scalar or arch.qk_dim) ** -0.5, "softcap": arch.attn_logit_softcap}


def window_flops(arch: ModelConfig, window: int, sinks: int) -> float:
    """Of scores and weighted values of one token."""
    return 2.0 * arch.n_heads * (arch.qk_dim + arch.v_dim) * (window + sinks)


MIXER = WindowAttention
