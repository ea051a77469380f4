"""The loss: of a batch, and of the validation sets with its uncertainty."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from open_lm_linear.checkpoint import TrainState
from open_lm_linear.cli import UserError
from open_lm_linear.data import masks, stream
from open_lm_linear.data.interval import bootstrap
from open_lm_linear.metrics import Logger
from open_lm_linear.model import Transformer
from open_lm_linear.objectives import LAYERWISE
from open_lm_linear.ops.losses import IGNORE
from open_lm_linear.parallel import Context, reshard

if TYPE_CHECKING:
    from open_lm_linear.distillation import Objective

Tensor = torch.Tensor

TAUGHT = ("loss_kl", *LAYERWISE)  # of what a teacher is asked

Part = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, first (data/masks.py)


def loss_of(model: Transformer, ctx: Context, part: Part, z_loss: float = 0.0, per_sequence: bool = False) -> Tensor:
    """(2,): summed cross entropy and total over the targets; or (B, 2)."""
    inputs, targets, first = part
    with ctx.autocast():
        return model.loss(inputs, targets, z_loss, first=first, per_sequence=per_sequence)


def validate(
    model: Transformer,
    objective: Objective,
    log: Logger,
    state: TrainState,
    micro: int,
    seq_len: int,
    *,
    fitted: bool = False,
    average: str = "",
) -> None:
    """Mean loss on each validation set, with its standard error and interval over sequences, to results.jsonl.

    It is cross entropy whatever is minimised; what a teacher says of the set stands beside it.
    """
    cfg, ctx = objective.cfg, objective.ctx
    for source in cfg.data.val_data:
        data = dataclasses.replace(cfg.data, val_data=(source,))
        batches = stream.validation_batches(
            data,
            global_batch_size=micro * ctx.world_size,
            rank=ctx.rank,
            world_size=ctx.world_size,
            seq_len=seq_len,
            vocab_size=model.config.vocab_size,
        )
        name = stream.named(source)[0]
        row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "val_data": name, "fitted": fitted}
        row |= ({"average": average} if average else {}) | evaluate_loss(model, objective, batches, micro)
        log.row("results.jsonl", row)
        log.say(
            f"validation {name}{f' of {average}' if average else ''}: "
            f"loss {row['loss']:.4f} +- {row['standard_error']:.4f}, "
            f"perplexity {row['perplexity']:,.1f} over {row['counted']:,} tokens"
            + "".join(f", {name.removeprefix('loss_')} {np.mean(row[name]):.4f}" for name in TAUGHT if name in row)
        )


@torch.no_grad()
def evaluate_loss(model: Transformer, objective: Objective, batches: Iterable[Tensor], micro: int) -> dict[str, Any]:
    """Loss per target (nats), its standard error and 95 % interval over sequences, perplexity, over all ranks.

    Under a teacher also ``loss_kl``, or ``align`` and ``hidden`` of each layer.

    Args:
        batches: this rank's rows (at most ``micro``, seq_len + 1), equally many batches on every rank.
    """
    cfg, ctx = objective.cfg, objective.ctx
    was_training, began = model.training, time.perf_counter()
    taught: Any = 0.0  # what the objective's sums come to, and the tokens that they are over
    model.eval()
    found = []  # a batch: loss and targets of every sequence, each rank in places of its own
    for batch in batches:
        # Every rank makes as many calls, so that shards keep step: one without rows computes on a blank one.
        rows = batch if len(batch) else torch.zeros(1, batch.shape[1], dtype=torch.long)
        part = masks.inputs_and_targets(rows.to(ctx.device), cfg.data)
        here = torch.zeros(micro, ctx.world_size, 3, dtype=torch.float64)
        losses, sums = objective.judged(model, part)
        here[: len(batch), ctx.rank, 0] = losses[: len(batch)].double().cpu()
        here[: len(batch), ctx.rank, 1] = (part[1] != IGNORE).sum(1)[: len(batch)].double().cpu()
        here[: len(batch), ctx.rank, 2] = 1
        found.append(here.flatten(0, 1))
        if sums is not None:
            taught = taught + torch.cat((sums, objective.count(part[1])[None])) * bool(len(batch))
    model.train(was_training)
    reshard(model)  # a forward pass without gradients leaves FSDP's root gathered
    table = ctx.sum(torch.cat(found).to(ctx.device)).cpu()
    sums, counts, _ = table[table[:, 2] > 0].unbind(1)
    sequences, tokens = len(sums), counts.sum().item()
    if not tokens:
        raise UserError("the validation data has no targets: see --val-data and --target-mask-left.")
    mean = sums.sum().item() / tokens
    # Of a ratio of sums: var = n / (n - 1) * sum (sum_i - mean * count_i)^2 / tokens^2
    squares = (sums - mean * counts).square().sum().item()
    learnt = {}
    if objective.teacher is not None:
        taught = ctx.sum(taught)
        named = objective.named(taught[:-1] / taught[-1])
        learnt = {k: torch.as_tensor(named[k]).tolist() for k in TAUGHT if k in named}
    low, high = bootstrap(sums.numpy(), counts.numpy(), cfg.data.val_iter_ci, cfg.run.seed) or (None, None)
    return {
        "loss": mean,
        "standard_error": math.sqrt(squares * sequences / max(1, sequences - 1)) / tokens,
        "loss_ci_low": low,
        "loss_ci_high": high,
        "perplexity": math.exp(min(mean, 700.0)),
        "counted": int(tokens),
        "sequences": sequences,
        "seconds": time.perf_counter() - began,
        **learnt,
    }
