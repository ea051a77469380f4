"""SUPRA's linear attention (arXiv 2405.06640).

    v'_i = GroupNorm( sum_{j<=i} gamma^(i-j) <RoPE(phi(q_i)), RoPE(phi(k_j))> v_j / sqrt(K) ),   phi(x) = relu(W x + b)

The feature map's W is shared by queries and keys where they have as many heads; gamma is fixed per head; the
GroupNorm (no gain, no bias, one group a head) stands where softmax has its normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, State, Tensor, build_norm, norm_over_heads
from open_lm_linear.cli import UserError
from open_lm_linear.ops.linear_attention import linear_attention
from open_lm_linear.rotary import Rotary

GROUP_NORM_EPS = 1e-5
SUM_EPS = 1e-6  # the least that is divided by: a query whose features are all 0 has no weights


@dataclass(frozen=True)
class LinearState(State):
    """S (B, H, K, V) in float32: sum_j gamma^(t-j) k_j v_j^T / sqrt(K) after token t.

    ``Z`` (B, H, K, 1), where the normaliser is the sum: the same of unturned keys and ones.
    """

    S: Tensor
    Z: Tensor | None = None

    def select(self, rows: Tensor) -> LinearState:
        return LinearState(self.S.index_select(0, rows), None if self.Z is None else self.Z.index_select(0, rows))

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.S, self.Z) if x is not None)


class FeatureMap(nn.Module):
    """phi(x) = relu(W x + b): (B, T, H, D) -> (B, T, H, F).

    Args:
        kind: ``full`` mixes all heads in one (H F x H D) matrix, the reference's; ``per_head`` has one (F x D) a head.
        init: ``default`` is torch's Linear initialisation, the reference's; ``identity`` starts at relu(x).
    """

    def __init__(self, heads: int, dim: int, features: int, *, kind: str, init: str) -> None:
        super().__init__()
        self.heads, self.dim, self.features, self.kind, self.init = heads, dim, features, kind, init
        shape = (heads * features, heads * dim) if kind == "full" else (heads, features, dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:-1]))
        self.init_weights()

    def init_weights(self) -> None:
        if self.init == "default":
            bound = 1.0 / math.sqrt(self.weight.shape[-1])  # what torch's Linear draws from
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
            return
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            self.weight.zero_()
            rows = self.weight.view(self.heads, self.features, -1)
            eye = torch.eye(self.features, self.dim, device=self.weight.device, dtype=self.weight.dtype)
            for head in range(self.heads):
                begin = head * self.dim if self.kind == "full" else 0
                rows[head, :, begin : begin + self.dim] = eye

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "full":
            return F.relu(F.linear(x.flatten(2), self.weight, self.bias)).unflatten(-1, (self.heads, -1))
        return F.relu(torch.einsum("bthd,hfd->bthf", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype))


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
        feature_map: Literal["full", "per_head"] = "full"
        """One matrix over all heads, as the reference's, or one a head."""
        feature_map_init: Literal["default", "identity"] = "default"
        """torch's Linear initialisation, as the reference's, or relu(x) to begin with."""
        feature_dim: int | None = None
        """Features per head after the map (None: qk_head_dim)."""
        normaliser: Literal["group_norm", "rms_norm", "sum", "none"] = "group_norm"
        """What stands for softmax's: GroupNorm (SUPRA), RMSNorm per head, the sum of the weights (T2R), or nothing."""
        qk_norm_at: Literal["projection", "features"] = "projection"
        """Where qk_norm applies: to the projections, by the checkpoint's norms, or as the reference to the features."""

    config: Config

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__(arch, options, layer)
        self._check()
        features = self.config.feature_dim or arch.qk_dim
        self.features = features
        kinds = {"kind": self.config.feature_map, "init": self.config.feature_map_init}
        self._totrain_embed = FeatureMap(arch.n_heads, arch.qk_dim, features, **kinds)
        self._totrain_embed_kv = None
        if arch.kv_heads != arch.n_heads:
            self._totrain_embed_kv = FeatureMap(arch.kv_heads, arch.qk_dim, features, **kinds)
        if arch.qk_norm and not self.norms_projection():
            self._totrain_q_norm = build_norm(arch.model_norm, arch.n_heads * features, arch.norm_eps)
            self._totrain_k_norm = build_norm(arch.model_norm, arch.n_heads * features, arch.norm_eps)
        self.rotary = Rotary(arch, features, layer)
        self.slopes = self._slopes()

    def _check(self) -> None:
        c = self.config
        if c.feature_map not in ("full", "per_head"):
            raise UserError(f"feature_map must be full or per_head, not {c.feature_map!r}.")
        if c.feature_dim is not None and c.feature_dim < 1:
            raise UserError(f"feature_dim must be above 0, not {c.feature_dim}.")
        if c.feature_dim is not None and c.feature_dim % 2 and self.arch.positional_embedding_type != "none":
            raise UserError(f"rotary embeddings need an even feature_dim, not {c.feature_dim}.")
        if c.feature_map_init not in ("default", "identity"):
            raise UserError(f"feature_map_init must be default or identity, not {c.feature_map_init!r}.")
        if c.normaliser not in ("group_norm", "rms_norm", "sum", "none"):
            raise UserError(f"normaliser must be group_norm, rms_norm, sum or none, not {c.normaliser!r}.")
        if c.normaliser == "sum" and self.arch.qk_norm and c.qk_norm_at == "features":
            raise UserError("normaliser sum needs features of 0 or more: it does not go with qk_norm_at features.")
        if c.qk_norm_at not in ("projection", "features"):
            raise UserError(f"qk_norm_at must be projection or features, not {c.qk_norm_at!r}.")
        if c.qk_norm_at == "features" and self.arch.qk_norm_per_head:
            raise UserError("qk_norm_at features norms all heads together: it does not go with qk_norm_per_head.")
        if c.decay_start is not None and (c.use_retnet_slopes or not c.use_decay):
            raise UserError(
                "decay_start belongs to the lightning slopes: drop it, use_retnet_slopes or --no-use-decay."
            )
        if c.decay_start is not None and not c.decay_start > 0:
            raise UserError(f"decay_start must be above 0, not {c.decay_start}; --no-use-decay switches the decay off.")

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
        q, k, v = self._features(x)
        log_decay = None if self.slopes is None else _log_decay(self.slopes, x.device)
        if keep is not None:
            k = k.masked_fill(~keep[:, :, None, None], 0.0)
            if log_decay is not None:
                log_decay = log_decay * keep[:, :, None]
        turned_q, turned_k = self.rotary(q, k, positions)
        out, S = linear_attention(turned_q, turned_k, v, log_decay, None if state is None else state.S, first)
        out = out.float() if out.dtype != torch.float64 else out
        Z = None
        if self.config.normaliser == "sum":
            # The weights' sum is that of unturned features, which are never negative (arXiv 2104.09864, eq. 19).
            before = None if state is None else state.Z
            weights, Z = linear_attention(q, k, torch.ones_like(v[..., :1]), log_decay, before, first)
            out = out / weights.to(out.dtype).clamp(min=SUM_EPS)
        elif self.config.normaliser == "group_norm":
            out = F.layer_norm(out, out.shape[-1:], eps=GROUP_NORM_EPS)
        elif self.config.normaliser == "rms_norm":
            out = F.rms_norm(out, out.shape[-1:], eps=GROUP_NORM_EPS)
        return self.out_proj(out.to(x.dtype).flatten(2)), LinearState(S, Z)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, keys divided by sqrt(F), and values; one dtype for all three."""
        q, k, v = self._project(x)
        k = (self._totrain_embed_kv or self._totrain_embed)(k)
        q = self._totrain_embed(q)
        if self.arch.qk_norm and not self.norms_projection():
            # The norm's gain is one per query head, so here, and only here, a shared key becomes one a head.
            groups = self.arch.n_heads // self.arch.kv_heads
            k = k.repeat_interleave(groups, dim=2)
            v = v.repeat_interleave(groups, dim=2)
            q, k = norm_over_heads(self._totrain_q_norm, q), norm_over_heads(self._totrain_k_norm, k)
        return q.to(v.dtype), k.to(v.dtype) * self.features**-0.5, v

    def flops_per_token(self, seq_len: int) -> float:
        maps = [m for m in (self._totrain_embed, self._totrain_embed_kv) if m is not None]
        shared = self._totrain_embed_kv is None  # then the one map runs on q and on k
        mapping = 2.0 * sum(m.weight.numel() for m in maps) * (2 if shared else 1)
        return self._projection_flops() + mapping + 4.0 * self.arch.n_heads * self.features * self._state_width

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
        # What only softmax has: a window over keys, and the scale and cap of its logits.
        arch = replace(arch, sliding_window=None, sliding_window_layers=None)
        return replace(arch, attn_options=options, query_pre_attn_scalar=None, attn_logit_softcap=None)

    @classmethod
    def from_openlm(cls, arch: ModelConfig) -> ModelConfig:
        """OpenLM's default is no decay; its qk_norm and its qk_head_dim are those of the features."""
        options = {"use_decay": False, "qk_norm_at": "features", **arch.attn_options}
        if "feature_dim" not in options:
            options["feature_dim"] = arch.qk_dim
            arch = replace(arch, qk_head_dim=None)
        return replace(arch, attn_options=options)


@lru_cache(maxsize=64)
def _log_decay(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, of which some may be training
        return -torch.tensor(slopes, dtype=torch.float32, device=device)


MIXER = LinearAttention
