"""A swapped model's start, in closed form: each output projection fitted to the teacher's attention output.

The swap leaves every output projection W behind features it has never seen. On a few thousand tokens, with the layer's
input x taken from the teacher, the best projection is a ridge regression that needs no gradient:

    W = argmin sum_x ||W s(x) - a(x)||^2 + lambda ||W||^2 = R^T (G + lambda I)^-1,   G = sum s s^T,   R = sum s a^T

where s(x) (H V) is what the new attention gives to its output projection, a(x) (hidden_dim) what the teacher's
attention adds to the residual stream, and lambda = ridge * mean(diag G). Nothing is added to the model, and a
checkpoint looks as it did. The published recipe (SUPRA) does without; so does this package unless asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from open_lm_linear.model import Block, Transformer
from open_lm_linear.parallel import Context, put, unsharded

Tensor = torch.Tensor

RIDGE = 1e-2


@torch.no_grad()
def fit_output_projections(
    student: Transformer, teacher: Transformer, batches: Sequence[Tensor], ctx: Context, ridge: float = RIDGE
) -> list[float]:
    """Sets ``attention.out_proj`` of every block of ``student``, one block after the other, in place.

    Args:
        teacher: the model whose attention was swapped, of the same width and depth; sharded or not, as the student.
        batches: this rank's ids, each (B, T); as many batches on every rank.

    Returns:
        For each layer the share of the teacher's attention output that the new attention explains (1: all of it).
    """
    streams = [_embed(teacher, ids.to(ctx.device), ctx) for ids in batches]
    explained = []
    kept = student.config.attn_layers.get(teacher.config.attn_name, ())  # these have nothing to fit
    for i, (before, after) in enumerate(zip(teacher.blocks(), student.blocks(), strict=True)):
        if i in kept:
            with unsharded(before):
                streams = [_through(before, h, ctx) for h in streams]
            explained.append(1.0)
            continue
        with unsharded(before), unsharded(after):
            gram, cross, square, streams = _moments(before, after, streams, ctx)
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        solution = torch.linalg.solve(gram + penalty, cross)  # (H V, hidden_dim)
        put(after.attention.out_proj.weight, solution.T.to(torch.float32))
        # ||W s - a||^2 = ||a||^2 - 2 <W, R> + <W, G W>
        rest = square - 2 * (solution * cross).sum() + (solution * (gram @ solution)).sum()
        explained.append(float(1 - rest / square))
    return explained


def _embed(model: Transformer, ids: Tensor, ctx: Context) -> Tensor:
    """The residual stream (B, T, hidden_dim) before the first block."""
    with unsharded(model), ctx.autocast():
        x = model.tok_embeddings(ids)
        return x if model.post_embed_norm is None else model.post_embed_norm(x)


def _through(block: Block, h: Tensor, ctx: Context) -> Tensor:
    """The residual stream (B, T, hidden_dim) behind a block."""
    with ctx.autocast():
        return block(h, torch.arange(h.shape[1], device=h.device)[None], None, None, None)[0]


def _moments(
    before: Block, after: Block, streams: Sequence[Tensor], ctx: Context
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """G (H V, H V), R (H V, hidden_dim) and sum ||a||^2 over all ranks in float64, and the streams behind the block."""
    width = (after.attention.out_proj.in_features, after.attention.out_proj.out_features)
    gram = torch.zeros(width[0], width[0], dtype=torch.float64, device=ctx.device)
    cross = torch.zeros(width, dtype=torch.float64, device=ctx.device)
    square = torch.zeros((), dtype=torch.float64, device=ctx.device)
    further = []
    for h in streams:
        with ctx.autocast():
            positions = torch.arange(h.shape[1], device=h.device)[None]
            x = before.before_attention(h)
            target, _ = before.attention(x, positions)
            features = _before_projection(after.attention, x, positions)
            further.append(before.after_attention(h, target))
            if after.attention.out_proj.bias is not None:  # it stays, so W has the rest to explain
                target = target - after.attention.out_proj.bias
        s, a = features.flatten(0, 1).float(), target.flatten(0, 1).float()
        gram += (s.T @ s).double()
        cross += (s.T @ a).double()
        square += a.square().sum().double()
    return ctx.sum(gram), ctx.sum(cross), ctx.sum(square), further


def _before_projection(attention: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """What an attention hands to its output projection: (B, T, H V)."""
    caught: list[Tensor] = []
    hook = attention.out_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0]))  # type: ignore
    try:
        attention(x, positions)
    finally:
        hook.remove()
    return caught[0]
