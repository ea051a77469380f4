"""A run's loss: cross entropy of the data, or what a frozen teacher says, of its logits or layer by layer.

Every loss is a sum over tokens divided by their true number over all ranks and pieces of the global batch, so that the
update does not depend on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F

from open_lm_linear import attention, gauges, parallel, pretrained
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config
from open_lm_linear.data import masks, stream
from open_lm_linear.data.teacher_logits import TeacherLogits
from open_lm_linear.model import Transformer
from open_lm_linear.objectives import LAYERWISE
from open_lm_linear.ops.losses import IGNORE, Teaching, TopTeaching
from open_lm_linear.parallel import Context
from open_lm_linear.validation import Part, loss_of

Tensor = torch.Tensor


class Objective:
    """Cross entropy (nats) a target token.

    Args:
        model: the student, which may have no memory yet.
        teacher: the source of the frozen model; only its header is read before ``load``.
    """

    logits: TeacherLogits | None = None
    """What the training data hold of a teacher beside the tokens, if that is learnt from."""
    notes: tuple[str, ...] = ()
    """What the plan says of it."""
    reached: Collection[str] | None = None
    """Names of the parameters that the loss has a gradient for; None: all."""

    def __init__(self, cfg: Config, model: Transformer, teacher: pretrained.Source | None, ctx: Context) -> None:
        self.cfg, self.weights, self.source, self.ctx = cfg, cfg.objective.weights, teacher, ctx
        self.teacher: Transformer | None = None
        if teacher is not None:
            with torch.device("meta"):
                self.teacher = Transformer(teacher.config).to(ctx.param_dtype)
            pretrained.match(self.teacher, teacher)
            self.teacher.requires_grad_(False)
            self.require_fit(model)

    def require_fit(self, model: Transformer) -> None:
        """Refuses a teacher that this student cannot learn from."""

    def require_same(self, model: Transformer, *names: str) -> None:
        assert self.teacher is not None
        for name in names:
            ours, theirs = getattr(model.config, name), getattr(self.teacher.config, name)
            if ours != theirs:
                losses = " and ".join(self.weights)
                raise UserError(f"the teacher has {name} {theirs}, the student {ours}: {losses} needs the same.")

    def load(self) -> None:
        """Gives the teacher memory, sharded as the student, and its weights."""
        if self.teacher is not None:
            self.teacher = pretrained.materialise(self.teacher, self.source, self.cfg.parallel, self.ctx).eval()

    def begin(self, first_batch: Callable[[], Tensor]) -> None:
        """Measures what the loss needs to know of the data, on its first global batch."""

    def sums(self, model: Transformer, part: Part) -> Tensor:
        """(K,) of a piece of the batch: sums over its tokens for ``named``, the last of them to be differentiated."""
        return self.weights["ce"] * loss_of(model, self.ctx, part, self.cfg.optim.z_loss_coefficient)

    def judged(self, model: Transformer, part: Part) -> tuple[Tensor, Tensor | None]:
        """Of validation data, without gradients: every sequence's cross entropy (B,), and ``sums`` under a teacher."""
        losses = loss_of(model, self.ctx, part, per_sequence=True)[:, 0]
        return losses, None if self.teacher is None else self.sums(model, part)

    def count(self, targets: Tensor) -> Tensor:
        """How many tokens of (B, T) ``sums`` is over."""
        return (targets != IGNORE).sum()

    def named(self, means: Tensor) -> dict[str, Any]:
        """``loss`` and its parts, from means of what ``sums`` gave over the global batch; tensors are by layer."""
        return {"loss": float(means[0])}

    def flops(self, model: Transformer, seq_len: int) -> float:
        """FLOPs of one trained token."""
        return gauges.training_flops(model, seq_len)

    def accumulate(self, model: Transformer, batch: Tensor) -> tuple[dict[str, Any], int]:
        """Gradients of the loss of this rank's rows of the global batch; returns ``named`` and the tokens of it all."""
        pieces = self.pieces(batch)
        count = self.ctx.sum(torch.stack([self.count(piece[1]) for piece in pieces]).sum())
        divisor = count.clamp(min=1)  # a batch may have no target at all
        total: Any = 0.0
        for i, piece in enumerate(pieces):
            parallel.accumulating(model, self.ctx, last=i == len(pieces) - 1)
            sums = self.sums(model, piece)
            # Gradients are averaged over ranks on the way, hence the factor.
            (sums[-1] * (self.ctx.world_size / divisor)).backward()
            total = total + sums.detach()
        return self.named(self.ctx.sum(total) / divisor), int(count)

    def pieces(self, batch: Tensor) -> list[Any]:
        """This rank's rows in as many parts as ``--accum-freq`` says."""
        return [self.part(rows) for rows in batch.chunk(self.cfg.run.accum_freq)]

    def part(self, rows: Tensor) -> Any:
        """What ``sums`` takes, of rows of the training data: inputs, targets, first and what else there is."""
        return masks.inputs_and_targets(rows, self.cfg.data)


class Distillation(Objective):
    """The divergence from a teacher's next token, with or without cross entropy beside it, a target token."""

    def require_fit(self, model: Transformer) -> None:
        self.require_same(model, "vocab_size")
        if self.cfg.objective.kl_top_k > model.config.vocab_size:
            raise UserError(
                f"--kl-top-k {self.cfg.objective.kl_top_k} is more than the vocabulary, {model.config.vocab_size}."
            )

    @property
    def scales(self) -> dict[str, float]:
        weights, temperature = self.weights, self.cfg.objective.kl_temperature
        return {"ce": weights.get("ce", 0.0), "kl": weights["kl"], "temperature": temperature}

    def load(self) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        super().load()
        assert self.teacher is not None
        register_fsdp_forward_method(self.teacher, "hidden")  # of a student it is called within ``loss``

    def sums(self, model: Transformer, part: Part) -> Tensor:
        return self._taught(model, part)

    def judged(self, model: Transformer, part: Part) -> tuple[Tensor, Tensor | None]:
        if self.teacher is None:
            return super().judged(model, part)
        rows = self._taught(model, part, per_sequence=True)  # one pass gives both
        return rows[:, 0], rows.sum(0)

    def _taught(self, model: Transformer, part: Part, per_sequence: bool = False) -> Tensor:
        assert self.teacher is not None
        inputs, targets, first = part
        with self.ctx.autocast(), torch.no_grad():
            hidden, _ = self.teacher.hidden(inputs, first=first)
        with self.ctx.autocast(), parallel.unsharded(self.teacher):
            head, cap = self.teacher.head_weight(), self.teacher.config.logit_softcap
            teaching = Teaching(hidden, head, cap, top_k=self.cfg.objective.kl_top_k, **self.scales)
            z_loss = self.cfg.optim.z_loss_coefficient
            return model.loss(inputs, targets, z_loss, first, per_sequence, teaching)

    def named(self, means: Tensor) -> dict[str, Any]:
        entropy, divergence, _ = means.tolist()
        total = self.weights.get("ce", 0.0) * entropy + self.weights["kl"] * divergence  # without z-loss
        return {"loss": total, "loss_ce": entropy, "loss_kl": divergence}

    def flops(self, model: Transformer, seq_len: int) -> float:
        assert self.teacher is not None
        return super().flops(model, seq_len) + self.teacher.flops_per_token(seq_len)


class OfflineDistillation(Distillation):
    """The same from what a teacher said beforehand, which the training data hold; there is no teacher in memory.

    Validation data are read without it, and so have the cross entropy alone.
    """

    def __init__(self, cfg: Config, model: Transformer, ctx: Context) -> None:
        super().__init__(cfg, model, None, ctx)
        self.seq_len = cfg.data.seq_len or model.config.seq_len
        self.logits = logits = stream.teacher_logits_of(cfg.data)
        if cfg.data.squash_mask_left:
            raise UserError("--squash-mask-left moves tokens, and the logits beside them stay: give a real --teacher.")
        for name, ours, theirs in (
            ("a vocabulary of", model.config.vocab_size, logits.vocab_size),
            ("--kl-temperature", cfg.objective.kl_temperature, logits.temperature),
            ("the --document-separator to reset at", cfg.data.document_separator, logits.document_separator),
        ):
            if ours != theirs:
                raise UserError(
                    f"the teacher's logits in the shards were written with {name} {theirs}, and this run has {ours}: "
                    "give the same, or write them anew with open_lm_linear.data.teach."
                )
        self.notes = (f"learns from the top {logits.top_k} tokens of {logits.source}, which the shards hold",)

    def load(self) -> None:
        """There is nothing to load."""

    def part(self, rows: Tensor) -> Any:
        assert self.logits is not None
        tokens, ids, log_p = self.logits.split(rows, self.seq_len)
        return *masks.inputs_and_targets(tokens, self.cfg.data), TopTeaching(ids, log_p, **self.scales)

    def sums(self, model: Transformer, part: Any) -> Tensor:
        inputs, targets, first, teaching = part
        with self.ctx.autocast():
            return model.loss(inputs, targets, self.cfg.optim.z_loss_coefficient, first=first, teaching=teaching)

    def flops(self, model: Transformer, seq_len: int) -> float:
        return gauges.training_flops(model, seq_len)


class Alignment(Objective):
    """Each attention against the teacher's on the teacher's residual stream, so that no layer waits for another.

    Of layer l, with a the teacher's output and y the student's (B, T, hidden_dim):

        error_l = mean |y - a|^2 / mean |a - mean a|^2

    with means over all tokens: 0 where both agree, 1 where the student does as well as the best constant. The loss is
    the mean over layers. The variance below the line is measured once, on the run's first global batch: it is the same
    after every interruption, and for any cut of a batch. ``hidden`` is the same with the streams behind the blocks.
    """

    def __init__(self, cfg: Config, model: Transformer, teacher: pretrained.Source | None, ctx: Context) -> None:
        super().__init__(cfg, model, teacher, ctx)
        assert self.teacher is not None
        layers, theirs = len(self.teacher.layers), self.teacher.config
        swapped = [i for i in range(layers) if model.config.attention_of(i) != theirs.attention_of(i)]
        inside = tuple(f"layers.{i}.attention." for i in swapped)
        self.reached = {name for name, _ in model.named_parameters() if name.startswith(inside)}
        self.variances = torch.ones(2, layers, device=ctx.device)  # of attentions, of blocks

    def require_fit(self, model: Transformer) -> None:
        self.require_same(model, "vocab_size", "hidden_dim", "n_layers")

    @torch.no_grad()
    def begin(self, first_batch: Callable[[], Tensor]) -> None:
        assert self.teacher is not None
        width, layers = self.teacher.config.hidden_dim, len(self.teacher.layers)
        sums = torch.zeros(2, layers, width + 1, dtype=torch.float64, device=self.ctx.device)
        tokens = torch.zeros((), device=self.ctx.device)
        for inputs, _, first in self.pieces(first_batch().to(self.ctx.device)):
            tokens += inputs.numel()
            for i, (_, *outputs) in enumerate(self._of_teacher(inputs, first)):
                for kind, output in enumerate(outputs):
                    x = output.double().flatten(0, 1)
                    sums[kind, i] += torch.cat((x.sum(0), x.square().sum()[None]))
        means = self.ctx.sum(sums) / self.ctx.sum(tokens)
        # mean |a - mean a|^2 over channels too, as the errors are
        self.variances = ((means[..., -1] - means[..., :-1].square().sum(-1)) / width).float()
        if not bool((self.variances > 0).all()):
            layer = int((self.variances <= 0).any(0).nonzero()[0])
            raise UserError(f"layer {layer} of the teacher gives every token the same: there is nothing to align to.")

    def sums(self, model: Transformer, part: Part) -> Tensor:
        inputs, _, first = part
        theirs = self._of_teacher(inputs, first)
        with self.ctx.autocast():
            streams, whole = [x for x, _, _ in theirs], "hidden" in self.weights
            ours: list[Any] = model.trace(inputs, first, streams, whole)
        errors, total = [], torch.zeros((), device=inputs.device)
        for name, variances, output in zip(LAYERWISE, self.variances, (1, 2), strict=True):
            if name in self.weights:
                pairs = [(y[output].float(), a[output].float()) for y, a in zip(ours, theirs, strict=True)]
                squares = torch.stack([F.mse_loss(y, a, reduction="sum") for y, a in pairs])
                errors.append(squares / (variances * pairs[0][0].shape[-1]))
                total = total + self.weights[name] * errors[-1].mean()
        return torch.cat((*errors, total[None]))

    def count(self, targets: Tensor) -> Tensor:
        return torch.tensor(targets.numel(), device=targets.device)

    def named(self, means: Tensor) -> dict[str, Any]:
        by_layer = means[:-1].cpu().chunk(len(self.weights))
        names = [name for name in LAYERWISE if name in self.weights]
        return {"loss": float(means[-1]), **dict(zip(names, by_layer, strict=True))}

    def flops(self, model: Transformer, seq_len: int) -> float:
        assert self.teacher is not None
        trained = sum(block.attention.flops_per_token(seq_len) for block in model.blocks())
        return self.teacher.flops_per_token(seq_len) + 3.0 * trained

    def _of_teacher(self, inputs: Tensor, first: Tensor | None) -> list[Any]:
        assert self.teacher is not None
        with torch.no_grad(), self.ctx.autocast():
            return self.teacher.trace(inputs, first)


def objective_of(cfg: Config, model: Transformer, source: pretrained.Source | None, ctx: Context) -> Objective:
    """The loss that a run asks for, its teacher not yet in memory.

    Raises:
        UserError: there is no teacher, or the student cannot learn from it.
    """
    asked = cfg.objective
    if not asked.taught:
        return Objective(cfg, model, None, ctx)
    if asked.offline:
        return OfflineDistillation(cfg, model, ctx)
    if asked.teacher:
        teacher = pretrained.open_source(asked.teacher)
    elif source is not None and attention.canonical(source.config.attn_name) == "softmax":
        teacher = source
    else:
        raise UserError(f"--loss {' '.join(asked.loss)} needs a teacher: give --teacher, such as the softmax original.")
    return (Alignment if asked.layerwise else Distillation)(cfg, model, teacher, ctx)
