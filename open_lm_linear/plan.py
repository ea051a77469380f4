"""What a run is about to do, worked out from headers alone, and said before anything is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from open_lm_linear import optim, pretrained
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config
from open_lm_linear.data import stream
from open_lm_linear.distillation import Objective
from open_lm_linear.metrics import human_bytes, human_time
from open_lm_linear.model import Transformer, read_config, swap
from open_lm_linear.parallel import Context


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is about to do, worked out from headers alone."""

    model: str
    parameters: int
    new: tuple[str, ...]
    new_parameters: int
    trained_parameters: int
    steps: int
    steps_per_epoch: int
    tokens_per_step: int
    state_bytes: int
    loss: str
    teacher: str
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        cfg: Config,
        model: Transformer,
        source: pretrained.Source | None,
        seq_len: int,
        ctx: Context,
        objective: Objective,
    ) -> Plan:
        """Raises UserError where the numbers do not fit together."""
        batch, pieces = cfg.run.global_batch_size, cfg.run.accum_freq
        if batch % (ctx.world_size * pieces):
            raise UserError(
                f"--global-batch-size {batch} does not divide into {ctx.world_size} ranks x {pieces} (--accum-freq)."
            )
        samples = None if cfg.run.train_num_samples is None else cfg.run.train_num_samples // seq_len
        if samples is None:
            if cfg.data.dataset_type == "synthetic":
                raise UserError("--dataset-type synthetic has no end: give --train-num-samples.")
            samples = stream.count_sequences(cfg.data)
        per_epoch = samples // batch
        if not per_epoch:
            raise UserError(f"an epoch of {samples} sequences is less than one global batch of {batch}.")
        steps = per_epoch * cfg.run.epochs
        stream.check_passes(cfg.data, cfg.run.first_sample + steps * batch)
        cfg.optim.check(steps, per_epoch)
        cfg.measure.check(steps)
        for flag, tokens in (("--init-tokens", cfg.run.init_tokens), ("--fit-tokens", cfg.run.fit_tokens)):
            if tokens and not (source is not None and pretrained.is_swap(model, source)):
                raise UserError(f"{flag} fits a swapped attention to its teacher: give --pretrained and --attn-name.")
        if cfg.run.init_tokens and not any(block.attention.choices() for block in model.blocks()):
            raise UserError(f"--init-tokens: heads of {model.config.attn_name} have nothing to choose; leave it out.")
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        swapped = source is not None and pretrained.is_swap(model, source)
        new = tuple(sorted(model.new_keys() if swapped else source.untrained if source else ()))
        added = sum(sizes[n] for n in new)
        trained = sum(sizes[n] for n in optim.trained_names(model, cfg.optim, new, objective.reached))
        shards = cfg.parallel.shard_size(ctx.world_size)
        width = 2 if ctx.param_dtype == torch.bfloat16 else 4
        teacher = objective.teacher
        held = sum(p.numel() for m in (model, teacher) if m is not None for p in m.parameters())
        return cls(
            model=pretrained.describe(model.config),
            parameters=sum(sizes.values()),
            new=new,
            new_parameters=added,
            trained_parameters=trained,
            steps=steps,
            steps_per_epoch=per_epoch,
            tokens_per_step=batch * seq_len,
            state_bytes=(width * held + optim.bytes_per_trained(cfg.optim, width) * trained) // shards,
            loss=" + ".join(f"{weight:g} {name}" for name, weight in objective.weights.items()),
            teacher="" if teacher is None else pretrained.describe(teacher.config),
            notes=objective.notes + ((*pretrained.changes_of(source, model.config), *source.notes) if source else ()),
        )

    def text(self) -> str:
        kept, total = self.parameters - self.new_parameters, self.parameters
        kind = "kept from the checkpoint" if self.new else "in all"
        lines = [
            f"model: {self.model}",
            f"parameters: {kept:,} {kind}, {self.new_parameters:,} new ({self.new_parameters / total:.1%}), "
            f"{self.trained_parameters:,} trained ({self.trained_parameters / total:.1%})",
        ]
        if self.new:
            groups = sorted({".".join(n.split(".")[3:]) for n in self.new})
            lines.append(f"new in each attention: {', '.join(groups)}")
        lines.append(
            f"budget: {self.steps * self.tokens_per_step:,} tokens in {self.steps} steps of {self.tokens_per_step:,}"
        )
        held = "weights, gradients and optimiser"
        if self.teacher:
            lines.append(f"loss: {self.loss}; frozen teacher: {self.teacher}")
            held += ", the teacher's weights among them"
        lines.append(f"{held}: {human_bytes(self.state_bytes)} per device")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def forecast(self, seconds_per_token: float, done: int, memory: int) -> str:
        left = (self.steps - done) * self.tokens_per_step * seconds_per_token
        return (
            f"expected: {human_time(left)} at {1 / seconds_per_token:,.0f} tokens/s (one micro-batch measured), "
            f"memory so far {human_bytes(memory)}"
        )


def architecture(cfg: Config, source: pretrained.Source | None) -> Any:
    changes = cfg.model.changes()
    if source is None:
        return read_config(cfg.model.model, cfg.model.attn_name or None, **changes)
    return swap(source.config, cfg.model.attn_name or None, **changes)
