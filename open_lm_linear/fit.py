"""A swapped model's start, from the teacher's attention on a few thousand tokens and without a gradient.

Two ways, each by itself or the first before the second; a layer's input x is always the teacher's.

`choose_heads`: of every head, its decay, the scale of its feature map or whatever else the attention says may be chosen
(`Attention.choices`), so that the head's output is as like as can be to that of the teacher's head in its place; then
the one factor a head that brings it nearest. A teacher has heads that look at the token before and heads that look at
everything, in no order that decays by the head's number could follow.

`fit_output_projections`: the swap leaves every output projection W behind features it has never seen. The best
projection is a ridge regression:

    W = argmin sum_x ||W s(x) - a(x)||^2 + lambda ||W||^2 = R^T (G + lambda I)^-1,   G = sum s s^T,   R = sum s a^T

where s(x) (H V) is what the new attention gives to its output projection, a(x) (hidden_dim) what the teacher's
attention adds to the residual stream, and lambda = ridge * mean(diag G). Nothing is added to the model, and a
checkpoint looks as it did. The published recipe (SUPRA) does without; so does this package unless asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from open_lm_linear.attention.base import Attention
from open_lm_linear.model import Block, Transformer
from open_lm_linear.parallel import Context, put, unsharded

Tensor = torch.Tensor

RIDGE = 1e-2
LEAST_FACTOR = 0.1  # of a head's output: a head that is switched off would get no gradient either


@torch.no_grad()
def choose_heads(
    student: Transformer, teacher: Transformer, batches: Sequence[Tensor], ctx: Context
) -> list[tuple[float, float]]:
    """Sets what the heads of ``student`` may choose, and the length of their outputs, in place.

    A head's likeness to the teacher's, y and a its outputs (B, T, V) before the output projection, is the share of
    sum |a|^2 that the best multiple of y explains: <y, a>^2 / (|y|^2 |a|^2), 0 where <y, a> < 0. Choices are made one
    after the other, twice round. The best multiple goes into the columns of the output projection.

    Args:
        batches: this rank's ids, each (B, T); as many batches on every rank.

    Returns:
        For each layer the mean likeness of its heads before and after; nothing of layers without a choice.
    """
    streams = [_embed(teacher, ids.to(ctx.device), ctx) for ids in batches]
    found = []
    for i, (before, after) in enumerate(zip(teacher.blocks(), student.blocks(), strict=True)):
        with unsharded(before), unsharded(after):
            if i not in student.config.attn_layers.get(teacher.config.attn_name, ()) and after.attention.choices():
                inputs = [before.before_attention(h) for h in streams]
                targets = [_heads(before.attention, x, ctx) for x in inputs]
                chosen, likenesses = _choose(after.attention, inputs, targets, ctx)
                found.append(likenesses)
            else:
                chosen = {}
            streams = [_through(before, h, ctx) for h in streams]
        for name, value in chosen.items():
            put(after.attention.get_parameter(name), value)
    return found


def _choose(
    attention: Attention, inputs: list[Tensor], targets: list[Tensor], ctx: Context
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """The parameters that are chosen, by name, and the mean likeness of the heads before and after."""

    def products() -> tuple[Tensor, Tensor, Tensor]:
        """|y|^2, <y, a> and |a|^2 of each head (H,), over all tokens and ranks."""
        sums = torch.zeros(3, attention.arch.n_heads, dtype=torch.float64, device=ctx.device)
        for x, a in zip(inputs, targets, strict=True):
            y = _heads(attention, x, ctx)
            sums += torch.stack([(u * w).sum((0, 1, 3)) for u, w in ((y, y), (y, a), (a, a))]).double()
        y_y, y_a, a_a = ctx.sum(sums)
        return y_y, y_a, a_a

    def likeness() -> Tensor:
        y_y, y_a, a_a = products()
        return y_a.clamp(min=0).square() / (y_y * a_a).clamp(min=torch.finfo(torch.float64).tiny)

    start, chosen = likeness(), {}
    for choice in attention.choices() * 2:
        parameter, values = attention.get_parameter(choice.name), torch.stack(choice.values).to(ctx.device)
        scores = []
        for value in values:
            parameter.copy_(value)
            scores.append(likeness().unflatten(0, (choice.heads, -1)).mean(-1))  # query heads that share it
        best = torch.stack(scores).argmax(0)
        rows = values.unflatten(1, (choice.heads, -1))[best, torch.arange(choice.heads, device=best.device)]
        chosen[choice.name] = rows.flatten(0, 1)
        parameter.copy_(chosen[choice.name])
    y_y, y_a, _ = products()
    factor = torch.where(y_y > 0, y_a / y_y, 1.0).clamp(min=LEAST_FACTOR).float()
    chosen["out_proj.weight"] = attention.out_proj.weight * factor.repeat_interleave(attention.arch.v_dim)
    return chosen, (float(start.mean()), float(likeness().mean()))


def _heads(attention: Attention, x: Tensor, ctx: Context) -> Tensor:
    """The outputs of the heads (B, T, H, V) of a layer's input, in float32."""
    with ctx.autocast():
        found = _before_projection(attention, x, torch.arange(x.shape[1], device=x.device)[None])
    return found.float().unflatten(-1, (attention.arch.n_heads, -1))


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


def _before_projection(attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
    """What an attention hands to its output projection: (B, T, H V)."""

    class Reached(Exception):
        """The attention has come to it; what lies behind is not computed."""

    def stop(_: Any, args: tuple[Tensor, ...]) -> None:
        raise Reached(args[0])

    hook = attention.out_proj.register_forward_pre_hook(stop)
    try:
        attention(x, positions)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise AssertionError(f"{type(attention).__name__} does not call its out_proj")
