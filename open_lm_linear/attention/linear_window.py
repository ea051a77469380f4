"""Linear attention beside a softmax window: near tokens exactly, all earlier ones through the state.

Every token is in one of the two parts: while it is in the window, or a sink, softmax sees it; as it leaves the window
it enters the linear state, where its decay begins. With ``normaliser: sum`` the parts share their denominator, as in
LoLCATs (arXiv 2410.10254),

    v'_i = (a sum_near exp(s_ij - m_i) v_j + (1 - a) sum_far phi(q_i) phi(k_j) v_j) / (the same without v),

with a in (0, 1) trained a head; with the other normalisers v'_i = near_i + b far_i with b trained a head, from 0 on.
The state is the linear one, a ring of the window's tokens, and the sinks: of one size at any context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Choice, State, Tensor
from open_lm_linear.attention.linear import SUM_EPS, LinearAttention, LinearState
from open_lm_linear.attention.window import WindowState, check_window, softmax_options, window_flops
from open_lm_linear.cli import UserError
from open_lm_linear.ops.backends import linear_operator
from open_lm_linear.ops.window import Line, attend, find_sinks, line_up
from open_lm_linear.rotary import Rotary


@dataclass(frozen=True)
class LinearWindowState(State):
    """The window, and the linear state of what has left it."""

    near: WindowState
    far: LinearState

    def select(self, rows: Tensor) -> LinearWindowState:
        return LinearWindowState(self.near.select(rows), self.far.select(rows))

    def nbytes(self) -> int:
        return self.near.nbytes() + self.far.nbytes()

    def tensors(self) -> dict[str, Tensor]:
        return self.near.tensors() | self.far.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LinearWindowState:
        far = {name: tensors[name] for name in ("S", "Z") if name in tensors}
        return cls(WindowState.from_tensors(tensors), LinearState(**far))


# What a head's share of the linear part may begin with: a number beside a norm, a sigmoid's argument beside the sum.
MIX_CHOICES = (0.0, 0.25, 0.5, 1.0)
SHARE_CHOICES = (-4.0, -2.0, 0.0, 2.0, 4.0)


class Mix(nn.Module):
    """One number a head (H, 1), from 0 on."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        return self.weight.float()[:, None]


class LinearWindowAttention(LinearAttention):
    @dataclass(frozen=True)
    class Config(LinearAttention.Config):
        """Options of linear attention beside a softmax window."""

        window: int = 64
        """Tokens that softmax sees, the query's included."""
        sinks: int = 0
        """First tokens of the document that softmax always sees."""

    config: Config

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        check_window(self.config.window, self.config.sinks)
        if arch.qk_norm and not self.norms_projection():
            raise UserError("a window goes with qk_norm_at projection: softmax has its norms there.")
        self.near_rotary = Rotary(arch, arch.qk_dim, layer)
        self._totrain_mix = Mix(arch.n_heads)

    def choices(self) -> list[Choice]:
        """Those of the linear part, and how much of it there is."""
        heads = self.arch.n_heads
        numbers = SHARE_CHOICES if self.config.normaliser == "sum" else MIX_CHOICES
        mixes = [torch.full((heads,), number) for number in numbers]
        return [Choice("_totrain_mix.weight", heads, mixes), *super().choices()]

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        keep: Tensor | None = None,
        first: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        assert state is None or isinstance(state, LinearWindowState)
        c = self.config
        q, k, v = self._project(x)
        near_q, near_k = self.near_rotary(q, k, positions)
        queries, keys = self._pairs(*((near_q, near_k) if c.rotary_at == "projection" else (q, k)), v, positions)
        before = WindowState.empty((near_k, v, *keys), c.window, c.sinks) if state is None else state.near
        line = line_up(before.ring, before.seen, (near_k, v, *keys), keep, first)
        sinks = find_sinks(line, before.sinks, x.shape[1], first is not None)
        near = attend(line.align(near_q), line, sinks, **softmax_options(self.arch))
        queries = tuple(line.align(q) for q in queries)
        fresh = None if keep is None else line.align(keep)
        values, weights, far = self._far(line, queries, fresh, first is not None, None if state is None else state.far)
        if weights is None:
            out = near.values / near.weights.clamp(min=1.0) + self._totrain_mix() * self._normalised(values)
        else:
            share = torch.sigmoid(self._totrain_mix())
            total = share * near.weights + (1 - share) * weights.float()
            out = (share * near.values + (1 - share) * values.float()) / total.clamp(min=SUM_EPS)
        return self._output(line.restore(out), x), LinearWindowState(before.after(line), far)

    def _pairs(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features of queries and of keys: those that weigh values and, where they differ, those that are summed."""
        q, k, _ = self._features(q, k, v)
        if self.config.rotary_at != "features":
            return (q,), (k,)
        turned_q, turned_k = self.rotary(q, k, positions)
        return ((turned_q, q), (turned_k, k)) if self.config.normaliser == "sum" else ((turned_q,), (turned_k,))

    def _far(
        self, line: Line, queries: tuple[Tensor, ...], fresh: Tensor | None, documents: bool, state: LinearState | None
    ) -> tuple[Tensor, Tensor | None, LinearState]:
        """Weighted values, sum of the weights and state of what has left the window; a key enters at distance W.

        ``fresh`` (B, T) is False where a column of the line is none of this call's tokens.
        """
        tokens = queries[0].shape[1]
        number = line.number[:, -tokens:]
        enters = number >= self.config.window + self.config.sinks
        log_decay = self._log_decay(number.device)
        if fresh is not None:
            enters = enters & fresh
        starts = number == 0 if documents else None
        _, v, *keys = (x[:, :tokens] for x in line.tokens)
        keys = [k.masked_fill(~enters[..., None, None], 0.0) for k in keys]
        S, Z = (None, None) if state is None else (state.S, state.Z)
        values, S = linear_operator(queries[0], keys[0], v, log_decay, S, starts, fresh)
        if self.config.normaliser != "sum":
            return values, None, LinearState(S)
        weights, Z = linear_operator(queries[-1], keys[-1], torch.ones_like(v[..., :1]), log_decay, Z, starts, fresh)
        return values, weights, LinearState(S, Z)

    def flops_per_token(self, seq_len: int) -> float:
        return super().flops_per_token(seq_len) + window_flops(self.arch, self.config.window, self.config.sinks)

    def state_bytes(self, batch: int, seq_len: int) -> int:
        a, c = self.arch, self.config
        features = self.features * (2 if c.normaliser == "sum" and c.rotary_at == "features" else 1)
        token = a.qk_dim + a.v_dim
        near = c.window * (token + features) + c.sinks * token
        return super().state_bytes(batch, seq_len) + 2 * batch * a.kv_heads * near

    @classmethod
    def complete(cls, arch: ModelConfig) -> ModelConfig:
        done = super().complete(arch)
        return replace(
            done, query_pre_attn_scalar=arch.query_pre_attn_scalar, attn_logit_softcap=arch.attn_logit_softcap
        )


MIXER = LinearWindowAttention
