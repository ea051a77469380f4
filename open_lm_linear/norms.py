"""The normalisations of OpenLM's ``model_norm``."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    """What the norms share."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    offset = 0.0  # the gain is offset + weight

    def init_weights(self) -> None:
        """Gain 1, bias 0."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) over the last dimension, with or without gain and bias.

    ``low_precision`` computes in the autocast dtype (OpenLM's ``lp``); otherwise in float32.
    """

    def __init__(self, dim: int, eps: float, *, gain: bool, bias: bool, low_precision: bool) -> None:
        super().__init__()
        self.shape, self.eps, self.low_precision = (dim,), eps, low_precision
        self.register_parameter("weight", nn.Parameter(torch.empty(dim)) if gain else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(dim)) if bias else None)
        self.init_weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        if self.low_precision and autocast:
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = x.dtype if self.low_precision else torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():  # which takes longer than a norm
            return F.layer_norm(x.to(dtype), self.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in float32; Gemma's offset is 1."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.shape, self.eps, self.offset = (dim,), eps, offset
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = None
        self.init_weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        gain = self.weight.to(wide)
        gain = gain + self.offset if self.offset else gain
        return F.rms_norm(x.to(wide), self.shape, gain, self.eps).to(x.dtype)


def build_norm(name: str, dim: int, eps: float) -> Norm:
    """The norm that OpenLM calls ``name`` over ``dim`` features; ``gemma_rms_norm`` is ours."""
    if name in ("rms_norm", "gemma_rms_norm"):
        return RMSNorm(dim, eps, offset=float(name == "gemma_rms_norm"))
    return LayerNorm(
        dim,
        eps,
        gain=name != "no_wb_layer_norm",
        bias=name in ("default_layer_norm", "lp_layer_norm"),
        low_precision="lp" in name,
    )
