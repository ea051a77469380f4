"""Gated delta net (arXiv 2412.06464) in the place of softmax.

    S_t = a_t (I - b_t k_t^T k_t) S_(t-1) + b_t k_t^T v_t,    o_t = norm(q_t S_t / sqrt(K)),
    a_t = exp(-A softplus(w x_t + d)),    b_t = sigmoid(u x_t)

with q_t and k_t divided by their length, and one a and one b a token and key head. Queries, keys, values and the
output keep the checkpoint's projections, and rotary embeddings turn queries and keys where softmax has them. The
paper's short convolutions and SiLU are left out: a checkpoint's projections were trained without. All a begin near 1,
at memories of 10 to 1000 tokens, all b at 1/2, and neither depends on x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Choice, Tensor
from open_lm_linear.attention.gated_linear import GatedAttention
from open_lm_linear.attention.linear import SLOPE_CHOICES
from open_lm_linear.ops.gated_delta import gated_delta_rule
from open_lm_linear.ops.gated_linear import widened

SLOWEST = 1e-3  # -log a of the first head to begin with; those between are spaced evenly by their logarithms
FASTEST = 1e-1  # of the last


class ScalarDecay(nn.Module):
    """log a = -exp(A_log) softplus(w x + dt_bias): (B, T, hidden_dim) -> (B, T, Hkv), 0 or less, in float32."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        if not self.weight.is_meta:  # where a range of numbers would import the compiler
            self.init_weights()

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.A_log)
        steps = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), len(self.dt_bias), dtype=torch.float64)
        with torch.no_grad():
            self.dt_bias.copy_(steps.expm1().log())  # whose softplus they are

    def forward(self, x: Tensor) -> Tensor:
        # The bias is added in float32: near 1, decays would not survive half precision.
        z = widened(F.linear(x, self.weight)) + widened(self.dt_bias)
        return -widened(self.A_log).exp() * F.softplus(z)


class WriteGate(nn.Linear):
    """b = sigmoid(u x): (B, T, hidden_dim) -> (B, T, Hkv) in float32. u begins at 0."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(widened(super().forward(x)))


class GatedDeltaNet(GatedAttention):
    @dataclass(frozen=True)
    class Config(GatedAttention.Config):
        """Options of gated delta net."""

    config: Config
    reads = 2

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        self.features = arch.qk_dim
        self._totrain_decay = ScalarDecay(arch.hidden_dim, arch.kv_heads)
        self._totrain_write = WriteGate(arch.hidden_dim, arch.kv_heads)

    def choices(self) -> list[Choice]:
        """The decays' bias: those of a head do not depend on x to begin with."""
        heads = self.arch.kv_heads
        biases = [math.log(math.expm1(slope)) for slope in SLOPE_CHOICES]  # whose softplus the slopes are
        return [Choice("_totrain_decay.dt_bias", heads, [torch.full((heads,), bias) for bias in biases])]

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, first: Tensor | None, S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k = (F.normalize(widened(z), dim=-1) for z in (q, k))
        q, k = (q * self.features**-0.5).to(v.dtype), k.to(v.dtype)
        log_gate, b = self._totrain_decay(x), self._totrain_write(x)
        if keep is not None:
            log_gate, b = log_gate.masked_fill(~keep[..., None], 0.0), b.masked_fill(~keep[..., None], 0.0)
        return gated_delta_rule(q, k, v, log_gate, b, S, first)


MIXER = GatedDeltaNet
