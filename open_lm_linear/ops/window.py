"""Softmax over a window of the last tokens and over sinks, the first tokens of a document, with a state of fixed size.

A row of W + T columns holds the last W tokens of the calls before, then the T of this one, and all padding moved to
the front (`line_up`). There every token's predecessors stand right before it, so a key at distance d from a query is
of its document if and only if d is at most the query's number in the document; nothing else needs a mask.

    band       keys at distance 0 to W - 1
    sinks      token numbers 0 to s - 1 of the document, where they have left the band
    left       the key at distance W, which leaves the band as the query comes
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


class Line(NamedTuple):
    """Rows in which every token follows its predecessor.

    ``tokens``: each (B, W + T, ...). ``number`` (B, W + T): the token's number in its document, from 0; -1 at padding.
    ``order`` (B, T): the column that each of the last T columns had among the new ones; None where nothing moved.
    """

    tokens: tuple[Tensor, ...]
    number: Tensor
    order: Tensor | None

    def align(self, x: Tensor) -> Tensor:
        """(B, T, ...) of this call in the columns of the line."""
        return x if self.order is None else _take(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of ``align``."""
        return x if self.order is None else _take(x, self.order.argsort(1))


def line_up(
    ring: tuple[Tensor, ...],
    seen: Tensor,
    new: tuple[Tensor, ...],
    keep: Tensor | None = None,
    first: Tensor | None = None,
) -> Line:
    """Joins the tokens of the calls before with those of this one.

    Args:
        ring: each (B, W, ...), the last W tokens, as the last W columns of an earlier line.
        seen: (B,) tokens of the present document so far.
        new: each (B, T, ...).
        keep: (B, T) bool, False at padding. first: (B, T) bool, True where a document begins.
    """
    window, tokens = ring[0].shape[1], new[0].shape[1]
    before = seen[:, None] - window + torch.arange(window, device=seen.device)
    real = torch.ones(len(seen), tokens, dtype=torch.long, device=seen.device) if keep is None else keep.long()
    count = seen[:, None] + real.cumsum(1)
    if first is not None:
        count = count - torch.where(first, count - real, 0).cummax(1).values
    number = torch.where(real.bool(), count - 1, -1)
    number = torch.cat((before.clamp(min=-1), number), 1)
    joined = tuple(torch.cat((old.to(x.dtype), x), 1) for old, x in zip(ring, new, strict=True))
    if keep is None:
        return Line(joined, number, None)
    order = torch.cat((before >= 0, keep), 1).long().argsort(dim=1, stable=True)
    return Line(
        tuple(_take(x, order) for x in joined), number.gather(1, order), keep.long().argsort(dim=1, stable=True)
    )


def find_sinks(line: Line, stored: tuple[Tensor, ...], tokens: int, documents: bool) -> tuple[Tensor, ...]:
    """Keys and values of the first s tokens of each column's document, for the last ``tokens`` columns.

    Args:
        stored: keys and values (B, s, ...) of the document that was going on.
        documents: whether the columns may be of several documents; else one answer stands for all.

    Returns:
        Each (B, ``tokens`` or 1, s, ...).
    """
    sinks = stored[0].shape[1]
    length = line.number.shape[1]
    columns = torch.arange(length - tokens if documents else length - 1, length, device=line.number.device)
    begin = columns - line.number[:, columns]  # column of token 0
    slots = torch.arange(sinks, device=columns.device)
    index = begin[:, :, None] + slots
    # Where that column holds another token, the sink was stored, or is yet to come.
    there = line.number.gather(1, index.clamp(0, length - 1).flatten(1)).view_as(index) == slots
    index = torch.where(there & (index >= 0), index + sinks, slots)
    found = (
        _take(torch.cat((old.to(x.dtype), x), 1), index.flatten(1))
        for old, x in zip(stored, line.tokens[:2], strict=True)
    )
    return tuple(x.unflatten(1, index.shape[1:]) for x in found)


class Partial(NamedTuple):
    """A softmax before its division: sum of exp(s - m) v (B, T, H, V), and sum of exp(s - m) (B, T, H, 1), float32."""

    values: Tensor
    weights: Tensor


def attend(q: Tensor, line: Line, sinks: tuple[Tensor, ...], *, scale: float, softcap: float | None = None) -> Partial:
    """Softmax of q (B, T, H, K), aligned, over band and sinks, in blocks of as many queries as the window has tokens.

    Args:
        line: its first two tokens are keys (B, W + T, Hkv, K) and values (B, W + T, Hkv, V); queries where its
            ``number`` is -1 get 0.
        sinks: keys and values (B, T or 1, s, Hkv, .), as `find_sinks` gives them; s may be 0.
    """
    k, v, *_ = line.tokens
    tokens, window = q.shape[1], k.shape[1] - q.shape[1]
    block = min(window, tokens)
    rest = -tokens % block
    groups = q.shape[2] // k.shape[2]
    q = F.pad(q.unflatten(2, (-1, groups)), (0, 0) * 3 + (0, rest)).unflatten(1, (-1, block))  # (B, N, C, Hkv, R, K)
    k, v = (F.pad(x, (0, 0) * 2 + (0, rest)).unfold(1, window + block, block) for x in (k, v))  # (B, N, Hkv, ., W + C)
    own = F.pad(line.number[:, window:], (0, rest), value=-1).unflatten(1, (-1, block))  # (B, N, C)
    distance = window + torch.arange(block, device=q.device)[:, None] - torch.arange(window + block, device=q.device)
    seen = (distance >= 0) & (distance < window) & (distance <= own[..., None])  # (B, N, C, W + C)
    scores = _soft_capped(torch.einsum("bncgrk,bngks->bngrcs", q, k).float() * scale, softcap)
    scores = scores.masked_fill(~seen[:, :, None, None], float("-inf"))
    if sinks[0].shape[2]:
        k_sinks, v_sinks = (_blocks(x, rest, block) for x in sinks)  # (B, N, C, s, Hkv, .), N and C 1 for all alike
        index = torch.arange(k_sinks.shape[3], device=q.device)
        far = (own[..., None] - index >= window)[:, :, None, None]  # (B, N, 1, 1, C, s)
        more = _soft_capped(torch.einsum("bncgrk,bncsgk->bngrcs", q, _like(k_sinks, q)).float() * scale, softcap)
        scores = torch.cat((scores, more.masked_fill(~far, float("-inf"))), -1)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)).exp()
    near = weights[..., : window + block]
    values = torch.einsum("bngrcs,bngvs->bncgrv", near.to(v.dtype), v).float()
    if sinks[0].shape[2]:
        far_weights = weights[..., window + block :].to(v.dtype)
        values = values + torch.einsum("bngrcs,bncsgv->bncgrv", far_weights, _like(v_sinks, q)).float()
    total = weights.sum(-1, keepdim=True).permute(0, 1, 4, 2, 3, 5)  # (B, N, C, Hkv, R, 1)
    return Partial(*(x.flatten(3, 4).flatten(1, 2)[:, :tokens] for x in (values, total)))


def _blocks(x: Tensor, rest: int, block: int) -> Tensor:
    """(B, T or 1, s, Hkv, .) -> (B, N or 1, C or 1, s, Hkv, .)."""
    return x[:, None] if x.shape[1] == 1 else F.pad(x, (0, 0) * 3 + (0, rest)).unflatten(1, (-1, block))


def _like(x: Tensor, q: Tensor) -> Tensor:
    return x.expand(-1, q.shape[1], q.shape[2], -1, -1, -1)


def _soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Row b of the result is x[b, columns[b]]."""
    return x[torch.arange(len(x), device=x.device)[:, None], columns]
