"""Mamba (arXiv 2312.00752): a gated selective state space in place of attention.

    x, z = in_proj(u);   x = silu(conv1d(x));   dt, B, C = x_proj(x);   out_proj(scan(x, dt, B, C) * silu(z))

Names and shapes of the parameters are those of mamba_ssm and of transformers' MambaMixer. The model around it has
neither positions nor feed-forward parts (``ffn_type`` none).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, State, Tensor
from open_lm_linear.cli import UserError
from open_lm_linear.ops.selective_scan import selective_scan

# softplus(dt_proj.bias) begins between these, evenly in the logarithm.
DT_MIN = 1e-3
DT_MAX = 1e-1


@dataclass(frozen=True)
class MambaState(State):
    """After token t of one document, padding left out.

    S (B, E, N) in float32: the state of the scan. ``tail`` (B, d_conv - 1, E): the last inputs of the convolution, 0
    before the document's beginning.
    """

    S: Tensor
    tail: Tensor

    def select(self, rows: Tensor) -> MambaState:
        return MambaState(self.S.index_select(0, rows), self.tail.index_select(0, rows))

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.S, self.tail))


class MambaMixer(Attention):
    @dataclass(frozen=True)
    class Config:
        """Options of Mamba."""

        d_state: int = 16
        """States of a channel."""
        d_conv: int = 4
        """Tokens that the convolution sees, the present one included."""
        expand: int = 2
        """Channels, in multiples of hidden_dim."""
        dt_rank: int | None = None
        """Rank of the projection to the steps dt (None: hidden_dim / 16, rounded up)."""
        conv_bias: bool = True
        """A bias of the convolution."""

    config: Config
    has_heads = False

    def make_projections(self) -> None:
        c, dim = self.config, self.arch.hidden_dim
        if self.arch.qk_norm:
            raise UserError("qk_norm is of queries and keys, which mamba does not have: leave it out.")
        for name in ("d_state", "d_conv", "expand", "dt_rank"):
            value = getattr(c, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be above 0, not {value}.")
        self.channels, self.rank = c.expand * dim, c.dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=self.arch.qkv_bias)
        self.conv1d = nn.Conv1d(self.channels, self.channels, c.d_conv, groups=self.channels, bias=c.conv_bias)
        self.x_proj = nn.Linear(self.channels, self.rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.channels)
        self.A_log = nn.Parameter(torch.empty(self.channels, c.d_state))
        self.D = nn.Parameter(torch.empty(self.channels))
        self.out_proj = nn.Linear(self.channels, dim, bias=self.arch.attn_out_bias)
        self.init_weights()

    def new_keys(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if not name.startswith(("in_proj.", "out_proj."))}

    @torch.no_grad()
    def init_weights(self) -> None:
        """mamba_ssm's: A = -1, ..., -N in every channel, steps from 0.001 to 0.1, torch's own for all else, and
        ``out_proj`` smaller by the root of the depth."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.out_proj.weight /= math.sqrt(self.arch.n_layers)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        span = math.log(DT_MAX) - math.log(DT_MIN)
        step = torch.exp(torch.rand_like(self.dt_proj.bias) * span + math.log(DT_MIN))
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        states = torch.arange(1, self.config.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        keep: Tensor | None = None,
        first: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        assert state is None or isinstance(state, MambaState)
        u, gate = self.in_proj(x).chunk(2, -1)
        mixed, tail = self._convolve(u, keep, first, None if state is None else state.tail)
        mixed = F.silu(mixed)
        dt, B, C = self.x_proj(mixed).split((self.rank, self.config.d_state, self.config.d_state), -1)
        dt = F.linear(dt, self.dt_proj.weight)  # its bias is added in the scan, which does not round it
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        before = None if state is None else state.S
        out, S = selective_scan(mixed, dt, self.dt_proj.bias, A, B, C, self.D, keep=keep, first=first, state=before)
        return self.out_proj(out.to(gate.dtype) * F.silu(gate)), MambaState(S, tail)

    def _convolve(
        self, u: Tensor, keep: Tensor | None, first: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The causal convolution of u (B, T, E) over the tokens of a document, and its last inputs for a later call."""
        width, (batch, tokens, _) = self.config.d_conv - 1, u.shape
        tail = u.new_zeros(batch, width, self.channels) if tail is None else tail.to(u.dtype)
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if keep is None and first is None:
            window = torch.cat((tail, u), 1)
            out = F.conv1d(window.transpose(1, 2), weight, bias, groups=self.channels).transpose(1, 2)
            return out, window[:, tokens:].clone()
        packed = _Packed.of(keep, first, batch, tokens, u.device)
        window = torch.cat((tail, _gathered(u, packed.order)), 1)
        documents = F.pad(packed.document, (width, 0))
        out = u.new_zeros(()) if bias is None else bias
        for j in range(self.config.d_conv):
            same = documents[:, j : j + tokens] == packed.document
            out = out + (window[:, j : j + tokens] * weight[:, 0, j]).masked_fill(~same[..., None], 0.0)
        ends = packed.real[:, None] + torch.arange(width, device=u.device)
        ended = documents.gather(1, ends) != packed.current[:, None]
        return _gathered(out, packed.place), _gathered(window, ends).masked_fill(ended[..., None], 0.0)

    def flops_per_token(self, seq_len: int) -> float:
        c = self.config
        linears = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        products = 2.0 * sum(linear.weight.numel() for linear in linears)
        # Of each state: what is added, what decays, what is read.
        return products + self.channels * (2.0 * c.d_conv + 6.0 * c.d_state)

    def state_bytes(self, batch: int, seq_len: int) -> int:
        return batch * self.channels * (4 * self.config.d_state + 2 * (self.config.d_conv - 1))

    @classmethod
    def complete(cls, arch: ModelConfig) -> ModelConfig:
        arch = super().complete(arch)
        options = dict(arch.attn_options)
        if options["dt_rank"] is None:
            options["dt_rank"] = math.ceil(arch.hidden_dim / 16)
        return replace(arch, attn_options=options)


class _Packed(NamedTuple):
    """The tokens of a padded or packed batch, each row's real ones first."""

    order: Tensor  # (B, T): which token stands at each place
    place: Tensor  # (B, T): where each token stands
    document: Tensor  # (B, T): the document of each place, 0 for the one that went on from an earlier call
    current: Tensor  # (B,): the document that goes on in the next call
    real: Tensor  # (B,): how many tokens are real

    @classmethod
    def of(cls, keep: Tensor | None, first: Tensor | None, batch: int, tokens: int, device: Any) -> _Packed:
        every = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        keep = every if keep is None else keep
        order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)
        document = (~every if first is None else first).long().cumsum(1)
        return cls(order, order.argsort(1), document.gather(1, order), document[:, -1], keep.sum(1))


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, E) at the places index (B, S): (B, S, E)."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))


MIXER = MambaMixer
