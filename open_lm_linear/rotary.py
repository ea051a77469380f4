"""Rotary position embeddings by explicit positions, in the three layouts of OpenLM.

angle(p, i) = p / (scale * base^(2i/d)) for the pair i of d/2 pairs. ``rotary`` pairs feature i with i + d/2 (the
layout of Hugging Face weights), ``llama_rotary`` pairs 2i with 2i + 1 (Meta's), ``head_rotary`` turns by the head's
index in place of the position (what early OpenLM checkpoints were trained with). Angles are float32 always.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from open_lm_linear.architecture import ModelConfig


class Rotary:
    """Turns queries and keys of one architecture; holds no parameters and no buffers."""

    def __init__(self, arch: ModelConfig, head_dim: int) -> None:
        self.layout = arch.positional_embedding_type
        self.head_dim = head_dim
        self.base, self.scale = float(arch.rotary_base_frequency), float(arch.rotary_scale)
        self.rounding = arch.rotary_rounding

    def __call__(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns q (B, T, H, D) and k (B, T, Hkv, D) by ``positions`` (B or 1, T); dtypes are kept."""
        if self.layout == "none":
            return q, k
        if self.layout == "head_rotary":
            # A group of query heads shares its key head's angle, so the products are those of one key per head.
            kv_heads = torch.arange(k.shape[2], device=k.device)
            q_heads = kv_heads.repeat_interleave(q.shape[2] // k.shape[2])
            return self._turn(q, q_heads[None, None]), self._turn(k, kv_heads[None, None])
        return self._turn(q, positions[:, :, None]), self._turn(k, positions[:, :, None])

    def _turn(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        frequencies = _frequencies(self.head_dim, self.base, self.scale, self.rounding, x.device)
        angles = index[..., None].to(frequencies.dtype) * frequencies  # (..., D/2), broadcast over heads or tokens
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        if self.layout == "llama_rotary":
            even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        else:
            low, high = x.to(wide).chunk(2, -1)
            turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        return turned.to(x.dtype)


@lru_cache(maxsize=64)
def _frequencies(head_dim: int, base: float, scale: float, rounding: str, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / (scale * base**exponents)
    return frequencies.to(torch.bfloat16).float() if rounding == "bfloat16" else frequencies
