"""Feature maps phi of linear attention, whose products <phi(q), phi(k)> stand for softmax's exp(<q, k>)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor

Layout = Literal["full", "per_head", "none"]
Init = Literal["default", "identity"]
Activation = Literal["relu", "elu", "softmax", "exp", "identity"]

NON_NEGATIVE = ("relu", "elu", "softmax", "exp")
EXP_LIMIT = 30.0  # of what is exponentiated; a sum of exp(30)^2 over any context is a float32


class FeatureMap(nn.Module):
    """phi(x) = activation(W x + b): (B, T, H, D) -> (B, T, H, ``features``).

    ==========  ====================================================  ==============================
    activation  phi of z = W x + b                                    source
    ==========  ====================================================  ==============================
    relu        max(z, 0)                                             T2R, SUPRA (arXiv 2103.13076)
    elu         elu(z) + 1                                            arXiv 2006.16236
    softmax     softmax(z) and softmax(-z), side by side              Hedgehog (arXiv 2402.04347)
    exp         exp(z), z at most 30                                  Performer without its randomness
    identity    z                                                     RetNet (arXiv 2307.08621)
    ==========  ====================================================  ==============================

    Args:
        rows: rows of W a head. ``softmax`` gives twice as many features, the others as many.
        layout: ``full`` mixes all heads in one (H rows x H D) matrix, the reference's; ``per_head`` has one (rows x D)
            a head; ``none`` has no W and no b.
        init: ``default`` is torch's Linear initialisation, the reference's; ``identity`` starts at activation(x).
    """

    def __init__(self, heads: int, dim: int, rows: int, *, layout: Layout, activation: Activation, init: Init) -> None:
        super().__init__()
        self.heads, self.dim, self.rows = heads, dim, rows
        self.layout, self.activation, self.init = layout, activation, init
        self.features = width(rows, activation)
        if layout != "none":
            shape = (heads * rows, heads * dim) if layout == "full" else (heads, rows, dim)
            self.weight = nn.Parameter(torch.empty(shape))
            self.bias = nn.Parameter(torch.empty(shape[:-1]))
            if not self.weight.is_meta:  # where an identity matrix would import the compiler
                self.init_weights()

    def init_weights(self) -> None:
        if self.layout == "none":
            return
        if self.init == "default":
            bound = 1.0 / math.sqrt(self.weight.shape[-1])  # what torch's Linear draws from
            nn.init.uniform_(self.weight, -bound, bound)
            nn.init.uniform_(self.bias, -bound, bound)
            return
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            self.weight.zero_()
            rows = self.weight.view(self.heads, self.rows, -1)
            eye = torch.eye(self.rows, self.dim, device=self.weight.device, dtype=self.weight.dtype)
            for head in range(self.heads):
                begin = head * self.dim if self.layout == "full" else 0
                rows[head, :, begin : begin + self.dim] = eye

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.linear(x))

    def linear(self, x: Tensor) -> Tensor:
        """W x + b: (B, T, H, rows)."""
        if self.layout == "none":
            return x
        if self.layout == "full":
            return F.linear(x.flatten(2), self.weight, self.bias).unflatten(-1, (self.heads, -1))
        return torch.einsum("bthd,hfd->bthf", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)

    def activate(self, z: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(z)
        if self.activation == "elu":
            return F.elu(z) + 1
        if self.activation == "softmax":
            return torch.cat((z.softmax(-1), (-z).softmax(-1)), -1)
        return z.clamp(max=EXP_LIMIT).exp() if self.activation == "exp" else z

    def flops_per_token(self) -> float:
        """Of W alone."""
        return 0.0 if self.layout == "none" else 2.0 * self.weight.numel()


def width(rows: int, activation: Activation) -> int:
    """Features that ``rows`` rows of W give."""
    return 2 * rows if activation == "softmax" else rows
