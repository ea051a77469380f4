"""SUPRA's linear attention (arXiv 2405.06640).

    v'_i = GroupNorm( sum_{j<=i} gamma^(i-j) <RoPE(phi(q_i)), RoPE(phi(k_j))> v_j / sqrt(K) ),   phi(x) = relu(W x + b)

The feature map's W is shared by queries and keys where they have as many heads; gamma is fixed per head; the
GroupNorm (no gain, no bias, one group a head) stands where softmax has its normaliser. These are the defaults; the
options reach its relatives, and `open_lm_linear.attention.PRESETS` names the known ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, Choice, State, Tensor, build_norm, norm_over_heads
from open_lm_linear.cli import UserError
from open_lm_linear.feature_maps import NON_NEGATIVE, Activation, FeatureMap, Init, Layout, width
from open_lm_linear.ops.backends import linear_operator
from open_lm_linear.ops.constants import constant, numbers
from open_lm_linear.rotary import Rotary

GROUP_NORM_EPS = 1e-5
# What a head may begin with: its slope, -log gamma, and the scale of its feature map's matrix.
SLOPE_CHOICES = (1e-4, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
SCALE_CHOICES = (0.5, 1.0, 2.0)
SUM_EPS = 1e-6  # the least that is divided by: a query whose features are all 0 has no weights


@dataclass(frozen=True)
class LinearState(State):
    """S (B, H, K, V) in float32: sum_j gamma^(t-j) k_j v_j^T / sqrt(K) after token t.

    ``Z`` (B, H, K, 1), where the normaliser is the sum: the same of unturned keys and ones.
    """

    S: Tensor
    Z: Tensor | None = None

    def select(self, rows: Tensor) -> LinearState:
        rows = rows.to(self.S.device)  # layers may lie on several devices
        return LinearState(self.S.index_select(0, rows), None if self.Z is None else self.Z.index_select(0, rows))

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.S, self.Z) if x is not None)


def lightning_slopes(heads: int, start: float | None = None) -> list[float]:
    """s_h = start * ratio^h with ratio = 2^(-8/heads) and start = ratio unless given; gamma_h = exp(-s_h).

    A number of heads that is not a power of two takes the slopes of the next lower power, then every second one of
    the next higher, as ALiBi does (arXiv 2108.12409).
    """

    def geometric(n: int) -> list[float]:
        ratio = 2.0 ** (-8.0 / n)
        return [(ratio if start is None else start) * ratio**h for h in range(n)]

    lower = 1 << (heads.bit_length() - 1)
    return geometric(lower) + geometric(2 * lower)[0::2][: heads - lower]


def retnet_slopes(heads: int) -> list[float]:
    """s_h = -log(1 - 2^(-5-h)) (arXiv 2307.08621)."""
    return [-math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]


class Decay(nn.Module):
    """Trained decays: log gamma_h = -exp(w_h), so that gamma stays between 0 and 1."""

    def __init__(self, slopes: tuple[float, ...]) -> None:
        super().__init__()
        self.slopes = slopes
        self.log_slopes = nn.Parameter(torch.empty(len(slopes)))
        if not self.log_slopes.is_meta:  # where a logarithm would import the compiler
            self.init_weights()

    def init_weights(self) -> None:
        with torch.no_grad():
            self.log_slopes.copy_(torch.tensor(self.slopes, dtype=torch.float64).log())

    def forward(self) -> Tensor:
        return -self.log_slopes.float().exp()


class Gate(nn.Linear):
    """2 sigmoid(W x): (B, T, hidden_dim) -> (B, T, H V). W begins at 0, so that the gate leaves all as it was."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(super().forward(x))


class LinearAttention(Attention):
    @dataclass(frozen=True)
    class Config:
        """Options of SUPRA's linear attention."""

        use_decay: bool = True
        """Forget by a fixed factor per head and token."""
        use_retnet_slopes: bool = False
        """RetNet's decays 1 - 2^(-5-h) in place of lightning attention's exp(-2^(-8(h+1)/heads))."""
        decay_start: float | None = None
        """First slope of lightning attention's decays (None: 2^(-8/heads))."""
        learn_decay: bool = False
        """Train the decays, one a head, from those values on."""
        feature_map: Layout = "full"
        """Its matrix: one over all heads, as the reference's, one a head, or none."""
        feature_map_init: Init = "default"
        """torch's Linear initialisation, as the reference's, or the identity to begin with."""
        feature_activation: Activation = "relu"
        """After the matrix: relu, elu (plus 1), softmax (of z and of -z: twice the features), exp, or identity."""
        feature_dim: int | None = None
        """Rows of the map's matrix per head (None: qk_head_dim)."""
        share_feature_map: bool = True
        """One map for queries and keys, where they have as many heads."""
        rotary_at: Literal["features", "projection", "none"] = "features"
        """Where rotary embeddings turn queries and keys: behind the map, before it as softmax has it, or nowhere."""
        normaliser: Literal["group_norm", "rms_norm", "sum", "none"] = "group_norm"
        """What stands for softmax's: GroupNorm (SUPRA), RMSNorm per head, the sum of the weights (T2R), or nothing."""
        qk_norm_at: Literal["projection", "features"] = "projection"
        """Where qk_norm applies: to the projections, by the checkpoint's norms, or as the reference to the features."""
        output_gate: bool = False
        """Multiply the output, before its projection, by 2 sigmoid(W x), which begins at 1."""

    config: Config

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        self._check()
        c = self.config
        rows = c.feature_dim or arch.qk_dim
        self.features = width(rows, c.feature_activation)

        def feature_map(heads: int) -> FeatureMap:
            kinds: Any = {"layout": c.feature_map, "activation": c.feature_activation, "init": c.feature_map_init}
            return FeatureMap(heads, arch.qk_dim, rows, **kinds)

        self._totrain_embed = feature_map(arch.n_heads)
        self._totrain_embed_kv = None
        if arch.kv_heads != arch.n_heads or not c.share_feature_map:
            self._totrain_embed_kv = feature_map(arch.kv_heads)
        if arch.qk_norm and not self.norms_projection():
            self._totrain_q_norm = build_norm(arch.model_norm, arch.n_heads * self.features, arch.norm_eps)
            self._totrain_k_norm = build_norm(arch.model_norm, arch.n_heads * self.features, arch.norm_eps)
        self.slopes = self._slopes()
        if self.slopes is not None and c.learn_decay:
            self._totrain_decay = Decay(self.slopes)
        if c.output_gate:
            self._totrain_gate = Gate(arch.hidden_dim, arch.n_heads * arch.v_dim)
        self.rotary = Rotary(arch, self.features if c.rotary_at == "features" else arch.qk_dim, layer)

    def _check(self) -> None:
        c, arch = self.config, self.arch
        turned = arch.positional_embedding_type != "none" and c.rotary_at == "features"
        if c.feature_dim is not None and c.feature_dim < 1:
            raise UserError(f"feature_dim must be above 0, not {c.feature_dim}.")
        if c.feature_dim is not None and c.feature_dim % 2 and turned and c.feature_activation != "softmax":
            raise UserError(f"rotary embeddings need an even feature_dim, not {c.feature_dim}.")
        if c.feature_map == "none" and c.feature_dim not in (None, arch.qk_dim):
            raise UserError(
                f"feature_map none leaves the {arch.qk_dim} dimensions of a head as they are: drop feature_dim."
            )
        if c.normaliser == "sum" and c.feature_activation not in NON_NEGATIVE:
            raise UserError(f"normaliser sum needs features of 0 or more, and {c.feature_activation} has others too.")
        if c.normaliser == "sum" and arch.qk_norm and c.qk_norm_at == "features":
            raise UserError("normaliser sum needs features of 0 or more: it does not go with qk_norm_at features.")
        if c.qk_norm_at == "features" and arch.qk_norm_per_head:
            raise UserError("qk_norm_at features norms all heads together: it does not go with qk_norm_per_head.")
        if c.decay_start is not None and (c.use_retnet_slopes or not c.use_decay):
            raise UserError(
                "decay_start belongs to the lightning slopes: drop it, use_retnet_slopes or --no-use-decay."
            )
        if c.decay_start is not None and not c.decay_start > 0:
            raise UserError(f"decay_start must be above 0, not {c.decay_start}; --no-use-decay switches the decay off.")
        if c.learn_decay and not c.use_decay:
            raise UserError("learn_decay needs decays to begin with: drop it or --no-use-decay.")

    def _slopes(self) -> tuple[float, ...] | None:
        if not self.config.use_decay:
            return None
        heads = self.arch.n_heads
        retnet = self.config.use_retnet_slopes
        return tuple(retnet_slopes(heads) if retnet else lightning_slopes(heads, self.config.decay_start))

    def norms_projection(self) -> bool:
        return self.config.qk_norm_at == "projection"

    def new_keys(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.startswith("_totrain_")}

    def dropped_keys(self) -> set[str]:
        if self.norms_projection():
            return set()
        return {"q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"}

    def init_weights(self) -> None:
        super().init_weights()
        for name, module in self.named_children():
            if name.startswith("_totrain_"):
                module.init_weights()  # type: ignore[operator]

    def choices(self) -> list[Choice]:
        """Trained decays, and the scale of feature maps that change more than their length with it."""
        found = []
        if self.config.learn_decay:
            heads = self.arch.n_heads
            slopes = [torch.full((heads,), math.log(slope)) for slope in SLOPE_CHOICES]
            found.append(Choice("_totrain_decay.log_slopes", heads, slopes))
        if self.config.feature_map != "none" and self.config.feature_activation not in ("relu", "identity"):
            for name in ("_totrain_embed", "_totrain_embed_kv"):
                if (feature_map := getattr(self, name)) is not None:
                    scaled = [feature_map.weight.detach() * scale for scale in SCALE_CHOICES]
                    found.append(Choice(f"{name}.weight", feature_map.heads, scaled))
        return found

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
        q, k, v = self._features(q, k, v)
        log_decay = self._log_decay(x.device)
        if keep is not None:
            k = k.masked_fill(~keep[:, :, None, None], 0.0)
        turned_q, turned_k = self.rotary(q, k, positions) if self.config.rotary_at == "features" else (q, k)
        before = None if state is None else state.S
        if self.config.normaliser == "sum":
            ones, sums = torch.ones_like(v[..., :1]), None if state is None else state.Z
            if turned_q is q and state is None and not x.is_cuda:
                # One more value, always 1, has the weights summed on the way; a GPU's kernels want powers of two.
                both, after = linear_operator(q, k, torch.cat((v, ones), -1), log_decay, None, first, keep)
                (out, weights), (S, Z) = (z.split((v.shape[-1], 1), -1) for z in (both, after))
            else:
                # The weights' sum is that of unturned features, which are never negative (arXiv 2104.09864, eq. 19).
                out, S = linear_operator(turned_q, turned_k, v, log_decay, before, first, keep)
                weights, Z = linear_operator(q, k, ones, log_decay, sums, first, keep)
            return self._output(_wide(out) / _wide(weights).clamp(min=SUM_EPS), x), LinearState(S, Z)
        norm_eps = GROUP_NORM_EPS if self.config.normaliser == "group_norm" else None
        out, S = linear_operator(turned_q, turned_k, v, log_decay, before, first, keep, norm_eps)
        return self._output(out if norm_eps else self._normalised(out), x), LinearState(S)

    def _normalised(self, out: Tensor) -> Tensor:
        """Outputs (B, T, H, V) in float32, over what stands for softmax's normaliser, but for the sum."""
        out = _wide(out)
        if self.config.normaliser == "group_norm":
            return F.layer_norm(out, out.shape[-1:], eps=GROUP_NORM_EPS)
        return F.rms_norm(out, out.shape[-1:], eps=GROUP_NORM_EPS) if self.config.normaliser == "rms_norm" else out

    def _output(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, T, hidden_dim) from the heads' outputs (B, T, H, V) and the layer's input."""
        out = out.to(x.dtype).flatten(2)
        return self.out_proj(self._totrain_gate(x) * out if self.config.output_gate else out)

    def _features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, keys divided by sqrt(features), and values; one dtype for all three."""
        k = (self._totrain_embed_kv or self._totrain_embed)(k)
        q = self._totrain_embed(q)
        if self.arch.qk_norm and not self.norms_projection():
            # The norm's gain is one per query head, so here, and only here, a shared key becomes one a head.
            groups = self.arch.n_heads // self.arch.kv_heads
            k = k.repeat_interleave(groups, dim=2)
            v = v.repeat_interleave(groups, dim=2)
            q, k = norm_over_heads(self._totrain_q_norm, q), norm_over_heads(self._totrain_k_norm, k)
        return q.to(v.dtype), k.to(v.dtype) * self.features**-0.5, v

    def _log_decay(self, device: torch.device) -> Tensor | None:
        """(H,) float32, 0 or less; None without decay."""
        if self.config.learn_decay:
            return self._totrain_decay()
        return None if self.slopes is None else _log_decay(self.slopes, device)

    def flops_per_token(self, seq_len: int) -> float:
        maps = [m for m in (self._totrain_embed, self._totrain_embed_kv) if m is not None]
        shared = self._totrain_embed_kv is None  # then the one map runs on q and on k
        mapping = sum(m.flops_per_token() for m in maps) * (2 if shared else 1)
        gate = 2.0 * self._totrain_gate.weight.numel() if self.config.output_gate else 0.0
        return self._projection_flops() + mapping + gate + 4.0 * self.arch.n_heads * self.features * self._state_width

    def state_bytes(self, batch: int, seq_len: int) -> int:
        return 4 * batch * self.arch.n_heads * self.features * self._state_width

    @property
    def _state_width(self) -> int:
        return self.arch.v_dim + (self.config.normaliser == "sum")

    @classmethod
    def complete(cls, arch: ModelConfig) -> ModelConfig:
        arch = super().complete(arch)
        options = dict(arch.attn_options)
        if options["feature_dim"] is None:
            options["feature_dim"] = arch.qk_dim
        arch = replace(arch, attn_options=options)
        if "softmax" in arch.attn_layers:
            return arch
        # What only softmax has: a window over keys, and the scale and cap of its logits.
        arch = replace(arch, sliding_window=None, sliding_window_layers=None)
        return replace(arch, query_pre_attn_scalar=None, attn_logit_softcap=None)

    @classmethod
    def from_openlm(cls, arch: ModelConfig) -> ModelConfig:
        """OpenLM's default is no decay; its qk_norm and its qk_head_dim are those of the features."""
        options = {"use_decay": False, "qk_norm_at": "features", **arch.attn_options}
        if "feature_dim" not in options:
            options["feature_dim"] = arch.qk_dim
            arch = replace(arch, qk_head_dim=None)
        return replace(arch, attn_options=options)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@constant
def _log_decay(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    return -numbers(slopes, device)


MIXER = LinearAttention
