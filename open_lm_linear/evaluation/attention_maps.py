"""Attention as matrices, and how alike those of two models are (Figures 3 and 4 of arXiv 2405.06640).

A layer's matrix of one head is what its values are weighed with: softmax(q k^T / sqrt(K)), or for linear attention
gamma^(i-j) <phi(q_i), phi(k_j)> / sqrt(F), before any normaliser. Each model runs on its own residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from open_lm_linear.attention.base import Attention
from open_lm_linear.attention.linear import LinearAttention
from open_lm_linear.attention.linear_window import LinearWindowAttention
from open_lm_linear.attention.softmax import SoftmaxAttention
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer

Tensor = torch.Tensor


@dataclass(frozen=True)
class Likeness:
    """Of the matrices A and B of a head: lists (layers, heads).

    ``cosine``: <A, B> / (|A| |B|), over all entries. ``singular``: |s(A) - s(B)| / |s(A)|, of the singular values.
    """

    cosine: list[list[float]]
    singular: list[list[float]]


@torch.no_grad()
def likeness(teacher: Transformer, student: Transformer, ids: Tensor) -> dict[str, Likeness]:
    """How alike the student's matrices are to the teacher's on one sequence of ids (1, T), head by head.

    Returns:
        ``raw``: the matrices as they are; ``by row``: each row over the sum of its absolute values, which leaves
        softmax's as they are.

    Raises:
        UserError: models of other depths or heads, or an attention that is no matrix.
    """
    shape = [(model.config.n_layers, model.config.n_heads) for model in (teacher, student)]
    if shape[0] != shape[1]:
        raise UserError(f"the models have {shape[0]} and {shape[1]} layers and heads: only equal ones are compared.")
    found: dict[str, tuple[list[list[float]], list[list[float]]]] = {"raw": ([], []), "by row": ([], [])}
    for a, b in zip(matrices(teacher, ids), matrices(student, ids), strict=True):
        for name, (cosines, singulars) in found.items():
            one, other = (a, b) if name == "raw" else (_by_row(a), _by_row(b))
            cosines.append(torch.cosine_similarity(one.flatten(1), other.flatten(1), dim=1).tolist())
            values, others = torch.linalg.svdvals(one), torch.linalg.svdvals(other)
            singulars.append(((values - others).norm(dim=1) / values.norm(dim=1)).tolist())
    return {name: Likeness(*lists) for name, lists in found.items()}


def matrices(model: Transformer, ids: Tensor) -> Iterator[Tensor]:
    """The matrices (H, T, T) of each layer, one layer in memory at a time."""
    inputs: list[Tensor] = []
    model.hidden(ids, block_inputs=inputs)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    for block, x in zip(model.blocks(), inputs, strict=True):
        yield matrix(block.attention, block.before_attention(x), positions)[0].double()


def matrix(attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
    """What an attention weighs values with, (B, H, T, T), for its input x (B, T, hidden_dim).

    Raises:
        UserError: another attention than softmax and linear.
    """
    q, k, v = attention._project(x)
    if isinstance(attention, SoftmaxAttention):
        return _softmax(attention, *attention.rotary(q, k, positions))
    if not isinstance(attention, LinearAttention) or isinstance(attention, LinearWindowAttention):
        raise UserError(f"{type(attention).__name__} is no single matrix: softmax and linear attention are.")
    if attention.config.rotary_at == "projection":
        q, k = attention.rotary(q, k, positions)
    q, k, _ = attention._features(q, k, v)
    if attention.config.rotary_at == "features":
        q, k = attention.rotary(q, k, positions)
    scores, age = _products(q, k), _age(x)
    log_decay = attention._log_decay(x.device)
    if log_decay is not None:
        scores = scores * torch.exp(log_decay[:, None, None] * age.clamp(min=0))
    return scores * (age >= 0)


def _softmax(attention: SoftmaxAttention, q: Tensor, k: Tensor) -> Tensor:
    cap, age = attention.arch.attn_logit_softcap, _age(q)
    scores = _products(q, k) * attention.scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    seen = (age >= 0) & (age < (attention.window or age.shape[0]))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """<q_i, k_j> (B, H, T, T) in float32 from q (B, T, H, K) and k (B, T, Hkv, K)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bihk,bjhk->bhij", q.float(), k.float())


def _age(x: Tensor) -> Tensor:
    index = torch.arange(x.shape[1], device=x.device)
    return index[:, None] - index


def _by_row(a: Tensor) -> Tensor:
    return a / a.abs().sum(-1, keepdim=True).clamp(min=1e-12)
