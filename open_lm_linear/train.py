"""One run, from the configuration to the last checkpoint. `train` reads from top to bottom as the run goes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from open_lm_linear import checkpoint, optim, parallel, pretrained
from open_lm_linear.checkpoint import TrainState
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config, write_run_config
from open_lm_linear.data import stream
from open_lm_linear.fit import fit_output_projections
from open_lm_linear.metrics import Logger, Window, human_bytes, human_time, log_line, memory_bytes, rewind
from open_lm_linear.model import Transformer, read_config, swap
from open_lm_linear.ops.losses import IGNORE
from open_lm_linear.parallel import Context

Tensor = torch.Tensor


def train(cfg: Config) -> Path | None:
    """Trains as ``cfg`` says; returns the run folder (None after a dry run).

    Raises:
        UserError: whatever is wrong with the model, the data or the run folder, before any training time is spent.
    """
    with parallel.setup(cfg.parallel) as ctx:
        if cfg.data.dataset_type != "synthetic":
            stream.count_sequences(cfg.data)  # missing data is said before gigabytes of weights are fetched
        source = pretrained.open_source(cfg.model.pretrained, cfg.model.model) if cfg.model.pretrained else None
        with torch.device("meta"):
            model = Transformer(_architecture(cfg, source)).to(ctx.param_dtype)
        if source is not None:
            pretrained.match(model, source)  # what does not fit is said before memory is taken
        seq_len = cfg.data.seq_len or model.config.seq_len
        stream.check(cfg.data, seq_len, model.config.vocab_size)
        plan = Plan.of(cfg, model, source, seq_len, ctx)
        run = cfg.folder
        resume_from = _claim_run_folder(cfg, run, ctx)
        log = Logger(
            run,
            cfg.run.report_to,
            is_main=ctx.is_main,
            dry=cfg.run.dry_run,
            resolved=cfg.flat(),
            project=cfg.run.wandb_project_name,
        )
        log.say(plan.text())

        model = parallel.apply(model, cfg.parallel, ctx)
        model.to_empty(device=ctx.device)
        if source is not None:
            pretrained.load_weights(model, source, cfg.run.seed)
        else:
            pretrained.initialise(model, cfg.run.seed)
        model.train()
        optimizer = optim.build(model, cfg.optim, plan.new)
        state = TrainState(samples=cfg.run.first_sample)
        if resume_from is not None:
            state = checkpoint.load(resume_from, model, optimizer)
            log.say(f"resumed {resume_from}: step {state.step}, {state.samples:,} samples seen")
        for file in ("metrics.jsonl", "results.jsonl"):
            if ctx.is_main and not cfg.run.dry_run:
                rewind(run / file, state.step)

        micro = cfg.run.global_batch_size // ctx.world_size // cfg.run.accum_freq
        seconds = _rehearse(model, cfg, ctx, micro, seq_len)
        log.say(plan.forecast(seconds, state.step, memory_bytes(ctx.device)))
        if cfg.run.dry_run:
            log.close()
            return None
        if state.step == 0:
            _validate(model, cfg, ctx, log, state, micro, seq_len)
            if source is not None and cfg.run.fit_tokens:
                _fit(model, source, cfg, ctx, log, seq_len)
                _validate(model, cfg, ctx, log, state, micro, seq_len, fitted=True)

        batches = stream.global_batches(
            cfg.data,
            seed=cfg.run.seed,
            samples_seen=state.samples,
            global_batch_size=cfg.run.global_batch_size,
            rank=ctx.rank,
            world_size=ctx.world_size,
            seq_len=seq_len,
            vocab_size=model.config.vocab_size,
        )
        log.start_bar(plan.steps, state.step)
        window = Window()
        while state.step < plan.steps:
            began = time.perf_counter()
            batch = next(batches).to(ctx.device, non_blocking=True)
            waited = time.perf_counter() - began
            lr = optim.set_learning_rates(optimizer, cfg.optim, state.step, plan.steps)
            loss, tokens = _accumulate(model, cfg, ctx, batch)
            norm = parallel.clip_gradients(model, cfg.optim.grad_clip_norm)
            if not (math.isfinite(norm) and math.isfinite(loss)):
                raise UserError(
                    f"step {state.step + 1}: loss {loss}, gradient norm {norm}; stopped before the update. "
                    "Lower --lr or --lr-new, or set --grad-clip-norm, and go on with --resume latest."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.samples += cfg.run.global_batch_size
            state.tokens += tokens
            state.seconds += time.perf_counter() - began
            window.add(loss, tokens, waited)
            log.tick()
            if state.step % cfg.run.log_every_n_steps == 0 or state.step == plan.steps:
                _report(log, window, state, lr, norm, plan, ctx)
            epoch, ended = divmod(state.step, plan.steps_per_epoch)
            last = state.step == plan.steps
            if (ended == 0 and epoch % cfg.checkpoint.save_frequency == 0) or last:
                _save(run, model, optimizer, state, ctx, cfg, log)
            if (ended == 0 and epoch % cfg.run.val_frequency == 0) or last:
                _validate(model, cfg, ctx, log, state, micro, seq_len)
                window.reset()
        log.say(f"done: {state.tokens:,} tokens in {human_time(state.seconds)}; the run is in {run}")
        log.close()
        return run


def train_stages(stages: Sequence[Config]) -> list[Path]:
    """Trains a run's stages one after the other, each on the weights and the data that the one before left behind.

    With ``resume: latest`` stages that are over are passed by, so the same command goes on after any interruption.
    """
    folders: list[Path] = []
    for number, cfg in enumerate(stages):
        if folders:
            done = checkpoint.require_whole(checkpoint.latest(folders[-1]))
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, first_sample=done["samples"]))
        folder = train(cfg)
        if folder is None:
            print(f"dry run: the stages after number {number} begin with weights that are not there yet")
            break
        folders.append(folder)
    return folders


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
    notes: tuple[str, ...]

    @classmethod
    def of(cls, cfg: Config, model: Transformer, source: pretrained.Source | None, seq_len: int, ctx: Context) -> Plan:
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
        cfg.optim.check(steps)
        if cfg.run.fit_tokens and not (source is not None and pretrained.is_swap(model, source)):
            raise UserError("--fit-tokens fits a swapped attention to its teacher: give --pretrained and --attn-name.")
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        swapped = source is not None and pretrained.is_swap(model, source)
        new = tuple(sorted(model.new_keys() if swapped else source.untrained if source else ()))
        added = sum(sizes[n] for n in new)
        trained = added if cfg.optim.train_params == "new" else sum(sizes.values())
        shards = ctx.world_size if cfg.parallel.fsdp else 1
        width = 2 if ctx.param_dtype == torch.bfloat16 else 4
        return cls(
            model=pretrained.describe(model.config),
            parameters=sum(sizes.values()),
            new=new,
            new_parameters=added,
            trained_parameters=trained,
            steps=steps,
            steps_per_epoch=per_epoch,
            tokens_per_step=batch * seq_len,
            state_bytes=width * (sum(sizes.values()) + 3 * trained) // shards,
            notes=(*pretrained.changes_of(source, model.config), *source.notes) if source else (),
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
        lines.append(f"weights, gradients and optimiser: {human_bytes(self.state_bytes)} per device")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def forecast(self, seconds_per_token: float, done: int, memory: int) -> str:
        left = (self.steps - done) * self.tokens_per_step * seconds_per_token
        return (
            f"expected: {human_time(left)} at {1 / seconds_per_token:,.0f} tokens/s (one micro-batch measured), "
            f"memory so far {human_bytes(memory)}"
        )


def _architecture(cfg: Config, source: pretrained.Source | None) -> Any:
    changes = cfg.model.changes()
    if source is None:
        return read_config(cfg.model.model, cfg.model.attn_name or None, **changes)
    return swap(source.config, cfg.model.attn_name or None, **changes)


def _claim_run_folder(cfg: Config, run: Path, ctx: Context) -> Path | None:
    """Makes the run folder this run's own; returns the checkpoint to resume, if any. A dry run claims nothing."""
    resume = cfg.checkpoint.resume
    holds_run = (run / "config.yaml").exists()
    if holds_run and not resume and not cfg.run.dry_run:
        raise UserError(f"{run} already holds a run: choose another --name, or go on with --resume latest.")
    resume_from = Path(resume) if resume and resume != "latest" else None
    if resume == "latest" and checkpoint.checkpoints(run):
        resume_from = checkpoint.latest(run)
    if resume_from is not None:
        checkpoint.require_whole(resume_from)
    ctx.barrier()  # every rank has looked before rank 0 writes
    if ctx.is_main and not cfg.run.dry_run:
        run.mkdir(parents=True, exist_ok=True)
        if not holds_run:
            write_run_config(cfg, run)
            if cfg.model.pretrained:
                _keep_tokenizer(cfg.model.pretrained, run)
    ctx.barrier()
    return resume_from


def _keep_tokenizer(source: str, run: Path) -> None:
    """Puts the tokenizer into the run folder, so that the run is whole in itself."""
    try:
        pretrained.load_tokenizer(source).save_pretrained(run)
    except UserError as error:
        print(f"warning: {error} Generation from this run will need --tokenizer.")


def _rehearse(model: Transformer, cfg: Config, ctx: Context, micro: int, seq_len: int) -> float:
    """Seconds per token of the whole job, by one micro-batch of made-up tokens run forward and backward.

    What would fail in the first step (memory above all) fails here, before the run begins.
    """
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(model.config.vocab_size, (micro, seq_len + 1), generator=generator).to(ctx.device)
    seconds = 0.0
    for _ in range(1 if ctx.device.type == "cpu" else 2):  # a GPU's first pass pays for compilation
        began = time.perf_counter()
        _loss(model, ctx, batch)[1].backward()
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds / (micro * seq_len * ctx.world_size)


def _fit(model: Transformer, source: pretrained.Source, cfg: Config, ctx: Context, log: Logger, seq_len: int) -> None:
    """Fits the output projections to the teacher's attention, on the first samples of the training data."""
    with torch.device("meta"):
        teacher = Transformer(source.config).to(ctx.param_dtype)
    teacher = parallel.apply(teacher, cfg.parallel, ctx)
    teacher.to_empty(device=ctx.device)
    pretrained.load_weights(teacher, source)
    batch = 4 * ctx.world_size
    batches = stream.global_batches(
        cfg.data,
        seed=cfg.run.seed,
        samples_seen=0,
        global_batch_size=batch,
        rank=ctx.rank,
        world_size=ctx.world_size,
        seq_len=seq_len,
        vocab_size=model.config.vocab_size,
    )
    count = -(-cfg.run.fit_tokens // (batch * seq_len))
    began = time.perf_counter()
    explained = fit_output_projections(model, teacher, [next(batches)[:, :-1] for _ in range(count)], ctx)
    log.say(
        f"fitted {len(explained)} output projections on {count * batch * seq_len:,} tokens in "
        f"{human_time(time.perf_counter() - began)}: the new attention explains {min(explained):.0%} to "
        f"{max(explained):.0%} of the teacher's attention output, {sum(explained) / len(explained):.0%} on average"
    )


def _loss(model: Transformer, ctx: Context, batch: Tensor, z_loss: float = 0.0, per_sequence: bool = False) -> Tensor:
    """(2,): summed cross entropy and total of (B, seq_len + 1) tokens; or (B, 2)."""
    with ctx.autocast():
        return model.loss(batch[:, :-1], batch[:, 1:], z_loss, per_sequence=per_sequence)


def _accumulate(model: Transformer, cfg: Config, ctx: Context, batch: Tensor) -> tuple[float, int]:
    """Gradients of the mean loss over all target tokens of the global batch; returns that mean and their number.

    The divisor is the true count over every rank and piece, so the update does not depend on how a batch is cut.
    """
    count = ctx.sum((batch[:, 1:] != IGNORE).sum())
    pieces = batch.chunk(cfg.run.accum_freq)
    entropy = torch.zeros((), device=ctx.device)
    for i, piece in enumerate(pieces):
        parallel.accumulating(model, ctx, last=i == len(pieces) - 1)
        sums = _loss(model, ctx, piece, cfg.optim.z_loss_coefficient)
        # Gradients are averaged over ranks on the way, hence the factor.
        (sums[1] * (ctx.world_size / count)).backward()
        entropy += sums[0].detach()
    return float(ctx.sum(entropy) / count), int(count)


def _report(log: Logger, window: Window, state: TrainState, lr: float, norm: float, plan: Plan, ctx: Context) -> None:
    values = window.summary()
    row = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": values["loss"],
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_s": values["tokens_per_s"],
        "tokens_per_s_per_device": values["tokens_per_s"] / ctx.world_size,
        "data_share": values["data_share"],
        "memory_bytes": memory_bytes(ctx.device),
        "seconds": state.seconds,
        "seconds_left": values["seconds_per_step"] * (plan.steps - state.step),
    }
    log.row("metrics.jsonl", row)
    log.say(log_line(row, plan.steps))
    window.reset()


def _save(
    run: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    ctx: Context,
    cfg: Config,
    log: Logger,
) -> None:
    before = checkpoint.checkpoints(run)
    folder = checkpoint.save(run, model, optimizer, state, ctx, cfg.flat())
    if cfg.checkpoint.delete_previous_checkpoint and ctx.is_main:
        checkpoint.remove([old for old in before if old != folder])
    log.say(f"saved {folder}")


def _validate(
    model: Transformer,
    cfg: Config,
    ctx: Context,
    log: Logger,
    state: TrainState,
    micro: int,
    seq_len: int,
    *,
    fitted: bool = False,
) -> None:
    """Mean loss on each validation set, with the standard error over its sequences, to results.jsonl."""
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
        row = {"step": state.step, "tokens": state.tokens, "val_data": source, "fitted": fitted}
        row |= evaluate_loss(model, ctx, batches)
        log.row("results.jsonl", row)
        log.say(
            f"validation {source}: loss {row['loss']:.4f} +- {row['standard_error']:.4f}, "
            f"perplexity {row['perplexity']:,.1f} over {row['counted']:,} tokens"
        )


@torch.no_grad()
def evaluate_loss(model: Transformer, ctx: Context, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Loss per token (nats), its standard error over sequences, perplexity and the count of tokens, over all ranks."""
    was_training, began = model.training, time.perf_counter()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, tokens, sequences, squared loss per sequence
    for batch in batches:
        # Every rank makes as many calls, so that shards keep step: one without rows computes on a blank one.
        rows = batch if len(batch) else torch.zeros(1, batch.shape[1], dtype=torch.long)
        losses = _loss(model, ctx, rows.to(ctx.device), per_sequence=True)[: len(batch), 0].double().cpu()
        length = batch.shape[1] - 1
        squares = (losses / length).square().sum().item()
        sums += torch.tensor([losses.sum().item(), length * len(batch), len(batch), squares], dtype=torch.float64)
    model.train(was_training)
    total, tokens, sequences, squares = ctx.sum(sums.to(ctx.device)).tolist()
    mean = total / tokens
    error = math.sqrt(max(0.0, squares / sequences - mean**2) / max(1.0, sequences - 1))
    return {
        "loss": mean,
        "standard_error": error,
        "perplexity": math.exp(min(mean, 700.0)),
        "counted": int(tokens),
        "sequences": int(sequences),
        "seconds": time.perf_counter() - began,
    }
