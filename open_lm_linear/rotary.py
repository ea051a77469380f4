"""Rotary position embeddings by explicit positions, in the three layouts of OpenLM, and their scalings.

angle(p, i) = p / (scale * base^(2i/d)) for the pair i of d/2 pairs. ``rotary`` pairs feature i with i + d/2 (the
layout of Hugging Face weights), ``llama_rotary`` pairs 2i with 2i + 1 (Meta's), ``head_rotary`` turns by the head's
index in place of the position (what early OpenLM checkpoints were trained with). Angles are float32 always.

A scaling stretches the angles of a trained model to longer contexts, by transformers' names and formulas: ``dynamic``
(NTK-aware: the base grows with the context), ``yarn`` (arXiv 2309.00071), ``llama3``, ``longrope`` (arXiv 2402.13753).
``dynamic`` and ``longrope`` choose by the furthest position of a call, and what was cached before stays as it was
turned then: with them, and with them alone, a sequence beyond the original context depends on how it is cut.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.ops.constants import constant, numbers
from open_lm_linear.ops.native_pointwise import native_turn

Tensor = torch.Tensor

# By kind of angles: the last positions, their version, and their cosines and sines, as long as the positions live.
_LAST: dict[Any, tuple[weakref.ref[Tensor], int, tuple[Tensor, Tensor]]] = {}


class Rotary:
    """Turns queries and keys of one layer of an architecture; holds no parameters and no buffers."""

    def __init__(self, arch: ModelConfig, head_dim: int, layer: int = 0) -> None:
        self.layout = "none" if layer in arch.no_rotary_layers else arch.positional_embedding_type
        self.turned = int(head_dim * arch.partial_rotary_factor)  # dimensions from the front; the others stay
        self.base, self.scale = float(arch.rotary_base_frequency), float(arch.rotary_scale)
        self.rounding = arch.rotary_rounding
        self.scaling = arch.rotary_scaling
        if layer in arch.rotary_local_layers:
            assert arch.rotary_local_base_frequency is not None
            self.base, self.scale, self.scaling = float(arch.rotary_local_base_frequency), 1.0, None
        if self.scaling is not None and self.scaling["rope_type"] == "longrope":
            for key in ("short_factor", "long_factor"):
                if len(self.scaling[key]) != self.turned // 2:
                    raise UserError(
                        f"rotary_scaling's {key} has {len(self.scaling[key])} values for {self.turned // 2} pairs."
                    )
        self.magnitude = _magnitude(self.scaling)
        self.kind = (self.turned, self.base, self.scale, self.rounding, repr(self.scaling))  # of its angles

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turns q (B, T, H, D) and k (B, T, Hkv, D) by ``positions`` (B or 1, T); dtypes are kept."""
        if self.layout == "none":
            return q, k
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.layout == "head_rotary":
            frequencies = self.frequencies(positions)
            # A group of query heads shares its key head's angle, so the products are those of one key per head.
            kv_heads = torch.arange(k.shape[2], device=k.device)
            q_heads = kv_heads.repeat_interleave(q.shape[2] // k.shape[2])
            tables = (self._table(heads[None, None], frequencies, wide) for heads in (q_heads, kv_heads))
            return self._turn(q, *next(tables)), self._turn(k, *next(tables))
        cos, sin = self._table_of(positions, wide)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _table_of(self, positions: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B or 1, T, 1, D/2) at ``positions``, computed once for all layers that turn alike."""
        if _changes_unseen(positions):
            return self._table(positions[:, :, None], self.frequencies(positions), wide)
        kind = (self.kind, wide)
        kept = _LAST.get(kind)
        if kept is None or kept[0]() is not positions or kept[1] != positions._version:
            table = self._table(positions[:, :, None], self.frequencies(positions), wide)
            kept = weakref.ref(positions, lambda gone: _forget(kind, gone)), positions._version, table
            _LAST[kind] = kept
        return kept[2]

    def _table(self, index: Tensor, frequencies: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = index[..., None].to(frequencies.dtype) * frequencies  # (..., D/2), broadcast over heads or tokens
        return (angles.cos() * self.magnitude).to(wide), (angles.sin() * self.magnitude).to(wide)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        done = native_turn(x, cos, sin, interleaved=self.layout == "llama_rotary")
        if done is not None:
            return done
        wide = cos.dtype
        rest = x[..., self.turned :]
        x = x[..., : self.turned] if rest.shape[-1] else x
        if self.layout == "llama_rotary":
            even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        else:
            low, high = x.to(wide).chunk(2, -1)
            turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        turned = turned.to(x.dtype)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def follows_length(self) -> bool:
        """Whether the frequencies depend on how far a call reaches."""
        return self.scaling is not None and self.scaling["rope_type"] in ("dynamic", "longrope")

    def frequencies(self, positions: Tensor) -> Tensor:
        """The D/2 frequencies, float32, for a call whose furthest position is that of ``positions``."""
        if not self.follows_length():
            frozen = None if self.scaling is None else tuple(sorted(self.scaling.items()))
            return _fixed(self.turned, self.base, self.scale, self.rounding, frozen, positions.device)
        assert self.scaling is not None
        length, original = positions.max() + 1, self.scaling["original_max_position_embeddings"]
        if self.scaling["rope_type"] == "dynamic":
            # The base grows so that the slowest pair turns over the longer context as far as it did over the trained.
            stretch = self.scaling["factor"] * length.clamp(min=original) / original - (self.scaling["factor"] - 1)
            base = self.base * stretch ** (self.turned / (self.turned - 2))
            return _round(1.0 / (self.scale * base ** _exponents(self.turned, positions.device)), self.rounding)
        long, short = (
            _divided(self.turned, self.base, self.scale, tuple(self.scaling[key]), positions.device)
            for key in ("long_factor", "short_factor")
        )
        return _round(torch.where(length > original, long, short), self.rounding)


def _changes_unseen(positions: Tensor) -> bool:
    """In a graph that is compiled or captured, and in tensors of inference mode, no version tells of other values."""
    if torch.compiler.is_compiling() or positions.is_inference():
        return True
    return positions.is_cuda and torch.cuda.is_current_stream_capturing()


def _forget(kind: Any, reference: weakref.ref[Tensor]) -> None:
    if kind in _LAST and _LAST[kind][0] is reference:
        del _LAST[kind]


def _exponents(dims: int, device: torch.device) -> Tensor:
    return torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims


def _round(frequencies: Tensor, rounding: str) -> Tensor:
    return frequencies.to(torch.bfloat16).float() if rounding == "bfloat16" else frequencies


@constant
def _divided(dims: int, base: float, scale: float, factors: tuple[float, ...], device: torch.device) -> Tensor:
    return 1.0 / (numbers(factors, device) * scale * base ** _exponents(dims, device))


@constant
def _fixed(dims: int, base: float, scale: float, rounding: str, scaling: Any, device: torch.device) -> Tensor:
    """Frequencies that do not depend on the context's length."""
    frequencies = 1.0 / (scale * base ** _exponents(dims, device))
    if scaling is not None:
        options = dict(scaling)
        scaled = {"llama3": _llama3, "yarn": _yarn}[options["rope_type"]]
        frequencies = scaled(frequencies, options, base)
    return _round(frequencies, rounding)


def _llama3(frequencies: Tensor, options: Mapping[str, Any], _: float) -> Tensor:
    """Pairs that turn often stay, those that turn seldom are slowed by ``factor``, in between by degrees."""
    turns = options["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the trained context
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / options["factor"] + kept * frequencies


def _yarn(frequencies: Tensor, options: Mapping[str, Any], base: float) -> Tensor:
    """As ``_llama3`` does, but by degrees over the index of the pair (arXiv 2309.00071, section 3.2)."""
    dims, trained = 2 * len(frequencies), options["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dims * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(options.get("beta_fast") or 32), pair_that_turns(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if low == high else high
    index = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    slowed = ((index - low) / (high - low)).clamp(0, 1)
    return frequencies / options["factor"] * slowed + frequencies * (1 - slowed)


def _magnitude(scaling: Mapping[str, Any] | None) -> float:
    """What cosine and sine are multiplied by: the root of YaRN's attention temperature; 1 but for yarn, longrope."""
    if scaling is None or scaling["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)
