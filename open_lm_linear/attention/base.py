"""The contract of an attention layer (a sequence mixer) and of the state that it carries from call to call."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.norms import build_norm
from open_lm_linear.rotary import Rotary

Tensor = torch.Tensor


class State(ABC):
    """What a layer remembers of a batch of sequences. Never changed in place: a call returns a new one."""

    @abstractmethod
    def select(self, rows: Tensor) -> State:
        """The state whose row i is this one's row ``rows[i]`` (beam search, forks, dropping finished rows)."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the remembered content of all rows takes."""

    def tensors(self) -> dict[str, Tensor]:
        """The content by name: all that `from_tensors` needs to make this state again. Here: the dataclass's fields."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> State:
        """The state with this content, whose tensors it takes as they are."""
        return cls(**tensors)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A parameter of which every head may take its rows from one of several values."""

    name: str
    """Of the parameter, within the layer; its first dimension is cut into the rows of ``heads`` heads."""
    heads: int
    """H, or Hkv where query heads share it."""
    values: list[Tensor]
    """Each of the parameter's shape."""


class Attention(nn.Module, ABC):
    """One attention layer: (B, T, hidden_dim) -> (B, T, hidden_dim), causal.

    Any cut of a sequence into calls that hand on the state gives the outputs of one call; padded positions leave
    no trace; packed documents do not see each other.

    Args:
        arch: the architecture (dimensions, norms, rotary).
        options: values for the fields of ``Config``; an unknown key is refused.
        layer: index of the block, from 0.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Options of this attention; the fields become flags when it is chosen."""

    has_heads: ClassVar[bool] = True
    """Whether it has softmax's heads of queries, keys and values, whose weights a swap carries over."""

    def __init__(self, arch: ModelConfig, options: Mapping[str, Any], layer: int) -> None:
        super().__init__()
        self.arch, self.layer = arch, layer
        self.config = self.read_options(options)
        self.make_projections()

    def make_projections(self) -> None:
        """Makes what softmax has: the fused projection q | k | v, that of the output, and under ``qk_norm`` the norms.

        An attention without heads of queries, keys and values makes its own parameters here.
        """
        arch = self.arch
        q, kv = arch.n_heads * arch.qk_dim, arch.kv_heads * (arch.qk_dim + arch.v_dim)
        self.in_proj = nn.Linear(arch.hidden_dim, q + kv, bias=arch.qkv_bias)
        self.out_proj = nn.Linear(arch.n_heads * arch.v_dim, arch.hidden_dim, bias=arch.attn_out_bias)
        if arch.qk_norm and self.norms_projection():
            q_heads, k_heads = (1, 1) if arch.qk_norm_per_head else (arch.n_heads, arch.kv_heads)
            self.q_norm = build_norm(arch.model_norm, q_heads * arch.qk_dim, arch.norm_eps)
            self.k_norm = build_norm(arch.model_norm, k_heads * arch.qk_dim, arch.norm_eps)

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        keep: Tensor | None = None,
        first: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Mixes along the sequence.

        Args:
            x: (B, T, hidden_dim).
            positions: (B or 1, T) whole numbers, for the rotary embedding.
            keep: (B, T) bool, False at padding on either side; None: no padding.
            first: (B, T) bool, True at the first token of a packed document; None: one document.
            state: what an earlier call returned; None: the beginning.
        """

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Multiply-adds times two of one forward token at context ``seq_len``, projections included."""

    @abstractmethod
    def state_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes of state after ``seq_len`` tokens of ``batch`` sequences, with a bfloat16 model."""

    def norms_projection(self) -> bool:
        """Whether ``qk_norm`` applies to queries and keys as they are projected, which is where softmax has it."""
        return True

    def new_keys(self) -> set[str]:
        """Parameters (names within the layer) that a softmax checkpoint does not have."""
        return set()

    def dropped_keys(self) -> set[str]:
        """Parameters of the softmax layer that this one has no place for."""
        return set()

    def choices(self) -> list[Choice]:
        """What may be chosen head by head before training, so that a swapped head gives what the teacher's gives."""
        return []

    def init_weights(self) -> None:
        """Initialises every parameter of the layer as OpenLM does: truncated normal of std 1/sqrt(hidden_dim).

        A child that has an ``init_weights`` of its own may be drawn by that alone, without the layer.
        """
        std = 1.0 / math.sqrt(self.arch.hidden_dim)
        truncated_normal(self.in_proj.weight, std)
        truncated_normal(self.out_proj.weight, std / math.sqrt(2 * (self.layer + 1)))
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for name in ("q_norm", "k_norm"):
            if hasattr(self, name):
                getattr(self, name).init_weights()

    @classmethod
    def read_options(cls, options: Mapping[str, Any]) -> Any:
        """``options`` as this attention's ``Config``.

        Raises:
            UserError: a key that ``Config`` does not have, with the nearest one.
        """
        known = [f.name for f in dataclasses.fields(cls.Config)]
        for key in options:
            if key not in known:
                near = did_you_mean(key, known + [f.name for f in dataclasses.fields(ModelConfig)])
                raise UserError(f"unknown model config key {key!r} for the attention {cls.__name__}.{near}")
        kinds = typing.get_type_hints(cls.Config)
        for key, value in options.items():
            if not _fits(value, kinds[key]):
                kind = getattr(kinds[key], "__name__", None) if not typing.get_args(kinds[key]) else None
                raise UserError(f"{key} must be of type {kind or kinds[key]}, not {value!r}.")
        return cls.Config(**options)

    @classmethod
    def complete(cls, arch: ModelConfig) -> ModelConfig:
        """``arch`` with every option of this attention spelt out, so that a saved config needs no defaults."""
        return dataclasses.replace(arch, attn_options=dataclasses.asdict(cls.read_options(arch.attn_options)))

    @classmethod
    def from_openlm(cls, arch: ModelConfig) -> ModelConfig:
        """Gives a JSON that names this attention itself the meaning it has in OpenLM; other JSONs never pass here."""
        return arch

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, K), k (B, T, Hkv, K), v (B, T, Hkv, V) from the fused rows q | k | v, q and k normed."""
        a = self.arch
        q, k, v = self.in_proj(x).split((a.n_heads * a.qk_dim, a.kv_heads * a.qk_dim, a.kv_heads * a.v_dim), -1)
        q, k, v = q.unflatten(-1, (a.n_heads, -1)), k.unflatten(-1, (a.kv_heads, -1)), v.unflatten(-1, (a.kv_heads, -1))
        if a.qk_norm and self.norms_projection():
            norm = nn.Module.__call__ if a.qk_norm_per_head else norm_over_heads
            q, k = norm(self.q_norm, q).to(v.dtype), norm(self.k_norm, k).to(v.dtype)
        return q, k, v

    def _projection_flops(self) -> float:
        return 2.0 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value, as JSON gives it, is of a simple type; types other than the simple ones take anything."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, k) for k in typing.get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (bool, int, str, type(None)):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return True


def norm_over_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a norm to all heads of (B, T, H, D) together, as OpenLM's qk_norm does."""
    return norm(x.flatten(2)).unflatten(-1, x.shape[2:])


def truncated_normal(weight: Tensor, std: float) -> None:
    """Normal of ``std``, cut at 3 std."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


__all__ = ["Attention", "Choice", "Rotary", "State", "Tensor", "build_norm", "norm_over_heads", "truncated_normal"]
