"""Gated linear attention (arXiv 2312.06635) in the place of softmax.

    S_t = diag(alpha_t) S_(t-1) + phi(k_t)^T v_t,    o_t = norm(phi(q_t) S_t / sqrt(K)),
    alpha_t = sigmoid(W2 W1 x_t + c)^(1/16)

with one alpha a token and feature of a key head. Queries, keys, values and the output keep the checkpoint's
projections, and rotary embeddings turn queries and keys where softmax has them. phi is the identity, as in the paper,
unless said otherwise. All alphas begin near 1 and do not depend on x.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, Choice, State, Tensor, truncated_normal
from open_lm_linear.attention.linear import GROUP_NORM_EPS, SLOPE_CHOICES, Gate, LinearState
from open_lm_linear.cli import UserError
from open_lm_linear.feature_maps import Activation, FeatureMap, width
from open_lm_linear.ops.gated_linear import gated_linear_attention, widened
from open_lm_linear.rotary import Rotary

GATE_ROOT = 16  # alpha is a sigmoid's 16th root
GATE_START = 4.0  # c; alpha begins at 0.9989, and forgets half in 611 tokens


class GatedAttention(Attention):
    """What the mixers with data-dependent gates share: all but the recurrence. Their state is one a key head."""

    @dataclass(frozen=True)
    class Config:
        """Options of a gated mixer."""

        rotary_at: Literal["projection", "none"] = "projection"
        """Where rotary embeddings turn queries and keys: where softmax has it, or nowhere."""
        normaliser: Literal["group_norm", "rms_norm", "none"] = "rms_norm"
        """What stands for softmax's: a norm per head without a gain, or nothing."""
        output_gate: bool = False
        """Multiply the output, before its projection, by 2 sigmoid(W x), which begins at 1."""

    config: Config
    features: int  # of a query or key, as the recurrence sees it
    reads: int  # products of the state with a key head's vectors, a token: what is written, and what was there

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        self.rotary = Rotary(arch, arch.qk_dim, layer)
        if self.config.output_gate:
            self._totrain_gate = Gate(arch.hidden_dim, arch.n_heads * arch.v_dim)

    @abstractmethod
    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, first: Tensor | None, S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, H, V) and the state (B, Hkv, K, V) from the layer's input and its heads, turned."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        keep: Tensor | None = None,
        first: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        assert state is None or isinstance(state, LinearState)
        q, k, v = self._project(x)
        if self.config.rotary_at == "projection":
            q, k = self.rotary(q, k, positions)
        out, S = self._recur(x, q, k, v, keep, first, None if state is None else state.S)
        out = widened(out)
        if self.config.normaliser == "group_norm":
            out = F.layer_norm(out, out.shape[-1:], eps=GROUP_NORM_EPS)
        elif self.config.normaliser == "rms_norm":
            out = F.rms_norm(out, out.shape[-1:], eps=GROUP_NORM_EPS)
        out = out.to(x.dtype).flatten(2)
        return self.out_proj(self._totrain_gate(x) * out if self.config.output_gate else out), LinearState(S)

    def new_keys(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.startswith("_totrain_")}

    def init_weights(self) -> None:
        super().init_weights()
        for name, module in self.named_children():
            if name.startswith("_totrain_"):
                module.init_weights()  # type: ignore[operator]

    def flops_per_token(self, seq_len: int) -> float:
        a = self.arch
        gates = sum(p.numel() for name, p in self.named_parameters() if name.startswith("_totrain_") and p.dim() == 2)
        products = (a.n_heads + self.reads * a.kv_heads) * self.features * a.v_dim
        return self._projection_flops() + 2.0 * gates + 2.0 * products

    def state_bytes(self, batch: int, seq_len: int) -> int:
        return 4 * batch * self.arch.kv_heads * self.features * self.arch.v_dim

    @classmethod
    def complete(cls, arch: ModelConfig) -> ModelConfig:
        arch = super().complete(arch)
        if "softmax" in arch.attn_layers:
            return arch
        # What only softmax has: a window over keys, and the scale and cap of its logits.
        arch = replace(arch, sliding_window=None, sliding_window_layers=None)
        return replace(arch, query_pre_attn_scalar=None, attn_logit_softcap=None)


class ForgetGate(nn.Module):
    """log alpha = logsigmoid(W2 W1 x + c) / 16: (B, T, hidden_dim) -> (B, T, Hkv, K), 0 or less, in float32."""

    def __init__(self, dim: int, heads: int, features: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, heads * features)
        self.init_weights()

    def init_weights(self) -> None:
        truncated_normal(self.down.weight, self.down.in_features**-0.5)
        nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.up.bias, GATE_START)

    def forward(self, x: Tensor) -> Tensor:
        # The bias is added in float32: near 1, alphas would not survive half precision.
        z = widened(F.linear(self.down(x), self.up.weight)) + widened(self.up.bias)
        return F.logsigmoid(z).unflatten(-1, (self.heads, -1)) / GATE_ROOT


class GatedLinearAttention(GatedAttention):
    @dataclass(frozen=True)
    class Config(GatedAttention.Config):
        """Options of gated linear attention."""

        feature_activation: Activation = "identity"
        """phi: identity, the paper's, softmax (of z and of -z: twice the features), exp, elu (plus 1), or relu."""
        gate_rank: int = 16
        """Rank of the projection that the gates come from."""

    config: Config
    reads = 1

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        c = self.config
        if c.gate_rank < 1:
            raise UserError(f"gate_rank must be above 0, not {c.gate_rank}.")
        self.features = width(arch.qk_dim, c.feature_activation)
        kinds: Any = {"layout": "none", "activation": c.feature_activation, "init": "identity"}
        self.feature_map = FeatureMap(arch.n_heads, arch.qk_dim, arch.qk_dim, **kinds)
        self._totrain_forget = ForgetGate(arch.hidden_dim, arch.kv_heads, self.features, c.gate_rank)

    def choices(self) -> list[Choice]:
        """The gates' bias: decays that do not depend on x to begin with, all features of a head alike."""
        heads, gate = self.arch.kv_heads, self._totrain_forget
        # logsigmoid(c) / 16 = -slope
        biases = [-math.log(math.expm1(GATE_ROOT * slope)) for slope in SLOPE_CHOICES]
        return [
            Choice("_totrain_forget.up.bias", heads, [torch.full((gate.up.out_features,), bias) for bias in biases])
        ]

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, first: Tensor | None, S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k = self.feature_map(q).to(v.dtype), self.feature_map(k).to(v.dtype) * self.features**-0.5
        log_gate = self._totrain_forget(x)
        if keep is not None:
            padding = ~keep[:, :, None, None]
            k, log_gate = k.masked_fill(padding, 0.0), log_gate.masked_fill(padding, 0.0)
        return gated_linear_attention(q, k, v, log_gate, S, first)


MIXER = GatedLinearAttention
