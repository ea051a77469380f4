"""One run, from the configuration to the last checkpoint. `train` reads from top to bottom as the run goes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from open_lm_linear import checkpoint, faults, gauges, optim, parallel, pretrained, run_folder
from open_lm_linear.attention.linear import LinearAttention
from open_lm_linear.averaging import Averagers
from open_lm_linear.checkpoint import TrainState
from open_lm_linear.config import Config
from open_lm_linear.data import masks, stream
from open_lm_linear.distillation import Objective, objective_of
from open_lm_linear.evaluation.during_training import Evaluator
from open_lm_linear.fit import choose_heads, fit_output_projections
from open_lm_linear.metrics import Logger, Window, human_time, log_line, memory_bytes
from open_lm_linear.model import Transformer
from open_lm_linear.objectives import LAYERWISE
from open_lm_linear.ops.backends import use_backend
from open_lm_linear.ops.check import check_at_start
from open_lm_linear.parallel import Context
from open_lm_linear.plan import Plan, architecture
from open_lm_linear.profiling import Profile
from open_lm_linear.remote_copy import RemoteCopy
from open_lm_linear.saver import Saver
from open_lm_linear.validation import validate

Tensor = torch.Tensor


def train(cfg: Config) -> Path | None:
    """Trains as ``cfg`` says; returns the run folder (None after a dry run).

    Raises:
        UserError: whatever is wrong with the model, the data or the run folder, before any training time is spent; and
            later, a disk that takes no checkpoint, or steps that go on giving no number.
        Stopped: SIGTERM or SIGUSR1 came; the run is saved.
    """
    cfg.checkpoint.check()
    with parallel.setup(cfg.parallel) as ctx, faults.signals() as stop:
        if cfg.data.dataset_type != "synthetic":
            stream.count_sequences(cfg.data)  # missing data is said before gigabytes of weights are fetched
        source = pretrained.open_source(cfg.model.pretrained, cfg.model.model) if cfg.model.pretrained else None
        with torch.device("meta"):
            model = Transformer(architecture(cfg, source)).to(ctx.param_dtype)
        if source is not None:
            pretrained.match(model, source)  # what does not fit is said before memory is taken
        seq_len = cfg.data.seq_len or model.config.seq_len
        cfg = dataclasses.replace(cfg, data=masks.resolved(cfg.data, model.config.vocab_size))
        stream.check(cfg.data, seq_len, model.config.vocab_size)
        objective = objective_of(cfg, model, source, ctx)
        plan = Plan.of(cfg, model, source, seq_len, ctx, objective)
        evaluator = Evaluator(cfg, ctx, model.config.vocab_size, seq_len, plan.steps)
        run = cfg.folder
        remote = RemoteCopy(cfg.checkpoint.remote_sync, run) if cfg.checkpoint.remote_sync and ctx.is_main else None
        resume_from, warning = run_folder.claim(cfg, run, ctx, remote)
        log = _logger(cfg, run, ctx)
        log.say(plan.text())
        _choose_backend(cfg, model, ctx, log)
        if warning:
            log.say(warning)

        model = pretrained.materialise(model, source, cfg.parallel, ctx, cfg.run.seed).train()
        objective.load()
        optimizer = optim.build(model, cfg.optim, plan.new, objective.reached)
        log.say(optim.table(model, optimizer, cfg.optim))
        state = TrainState(samples=cfg.run.first_sample)
        if resume_from is not None:
            state = checkpoint.load(resume_from, model, optimizer, ctx)
            log.say(f"resumed {resume_from}: step {state.step}, {state.samples:,} samples seen")
        samples = faults.SampleLog(run / "samples.jsonl", ctx.is_main and not cfg.run.dry_run)
        faults.rewind_logs(run, samples, state)

        micro = cfg.run.global_batch_size // ctx.world_size // cfg.run.accum_freq
        seconds = _rehearse(model, objective, micro, seq_len)
        log.say(plan.forecast(seconds, state.step, memory_bytes(ctx.device)))
        if cfg.run.dry_run:
            log.close()
            return None
        objective.begin(lambda: next(_batches(objective, cfg.run.first_sample, seq_len, model.config.vocab_size)))
        if state.step == 0:
            validate(model, objective, log, state, micro, seq_len)
            if source is not None and (cfg.run.init_tokens or cfg.run.fit_tokens):
                _fit(model, source, cfg, ctx, log, seq_len)
                validate(model, objective, log, state, micro, seq_len, fitted=True)

        averagers = Averagers(model, cfg.optim.averagers)
        if resume_from is not None:
            checkpoint.load_averages(resume_from, averagers)
        profile = Profile(cfg.measure.profile, run / "profile", ctx.device, active=ctx.is_main)
        flops = objective.flops(model, seq_len)
        saver = Saver(
            run,
            cfg.checkpoint,
            ctx,
            model,
            optimizer,
            config=cfg.flat(),
            say=log.say,
            remote=remote,
            newest=resume_from,
            also_flush=(samples.path,),
            averagers=averagers,
        )
        if remote is not None:
            remote.say = log.say
        batches = _batches(objective, state.samples, seq_len, model.config.vocab_size)
        log.start_bar(plan.steps, state.step)
        window = Window()
        while state.step < plan.steps:
            profile.at(state.step)
            began = time.perf_counter()
            batch = next(batches).to(ctx.device, non_blocking=True)
            waited = time.perf_counter() - began
            lr = optim.set_learning_rates(optimizer, cfg.optim, state.step, plan.steps, plan.steps_per_epoch)
            losses, tokens = objective.accumulate(model, batch)
            log_step = (state.step + 1) % cfg.run.log_every_n_steps == 0 or state.step + 1 == plan.steps
            norms = gauges.gradient_norms(optimizer) if log_step else {}
            norm = parallel.clip_gradients(model, cfg.optim.grad_clip_norm)
            agreed = faults.agree(
                ctx,
                bad=not (math.isfinite(norm) and math.isfinite(losses["loss"])),
                stop=bool(stop.signal),
                save=saver.due(state.step + 1),
                busy=saver.busy,
                failed=saver.failed,
            )
            saver.advance(agreed["busy"], agreed["failed"])
            first, bad = state.samples, agreed["bad"]
            if not bad:
                optimizer.step()
                state.step += 1
                state.tokens += tokens
                state.skipped_in_row = 0
            optimizer.zero_grad(set_to_none=True)
            state.samples += cfg.run.global_batch_size
            state.seconds += time.perf_counter() - began
            samples.add(state.step + bad, first, cfg.run.global_batch_size, bad)
            if bad:
                log.say(faults.skip(state, first, losses["loss"], norm))
                if state.skipped_in_row >= cfg.checkpoint.max_skipped_steps:
                    state = faults.roll_back(saver, samples, state)
                    batches = _batches(objective, state.samples, seq_len, model.config.vocab_size)
                    window.reset()
            else:
                averagers.step(state.step)
                window.add(losses, tokens, waited)
                log.tick()
                if log_step:
                    _report(log, window, state, lr, norm, plan, ctx, flops, norms)
                if cfg.measure.log_state_every and state.step % cfg.measure.log_state_every == 0:
                    log.row("states.jsonl", {"step": state.step, **gauges.probe_states(model, batch[:, :seq_len], ctx)})
                evaluator.after_step(model, log, state, window)
            epoch, within = divmod(state.step, plan.steps_per_epoch)
            last = state.step == plan.steps
            ended = within == 0 and not bad
            wanted = (ended and epoch % cfg.checkpoint.save_frequency == 0) or (agreed["save"] and not bad)
            if wanted or last or agreed["stop"]:
                saver.start(state)
            if agreed["stop"] and not last:
                break
            if (ended and epoch % cfg.run.val_frequency == 0) or last:
                if cfg.data.val_data:
                    saver.wait()  # a long validation must not keep a written checkpoint without its name
                for name in averagers.names():
                    with averagers.swap_in(name):
                        validate(model, objective, log, state, micro, seq_len, average=name)
                validate(model, objective, log, state, micro, seq_len)
                window.reset()
        profile.close(state.step)
        saver.close()
        if state.step < plan.steps:
            log.say(f"stopped after step {state.step} ({stop.signal or 'a signal'} came), saved {saver.newest}")
            log.close()
            raise faults.Stopped(f"stopped after step {state.step} of {plan.steps}; go on with --resume latest.")
        log.say(f"done: {state.tokens:,} tokens in {human_time(state.seconds)}; the run is in {run}")
        log.close()
        return run


def train_stages(stages: Sequence[Config]) -> list[Path]:
    """Trains a run's stages one after the other, each on the weights and the data that the one before left behind.

    A stage with data of its own, such as longer texts, begins at their first sample.
    With ``resume: latest`` stages that are over are passed by, so the same command goes on after any interruption.
    """
    folders: list[Path] = []
    for number, cfg in enumerate(stages):
        if folders:
            done = checkpoint.require_whole(checkpoint.latest(folders[-1]))
            seen = done["samples"] if _sources(cfg) == _sources(stages[len(folders) - 1]) else 0
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, first_sample=seen))
        folder = train(cfg)
        if folder is None:
            print(f"dry run: the stages after number {number} begin with weights that are not there yet")
            break
        folders.append(folder)
    return folders


def _choose_backend(cfg: Config, model: Transformer, ctx: Context, log: Logger) -> None:
    """Takes the linear attention's backend from the configuration, and checks its kernels where they will run."""
    use_backend(cfg.parallel.linear_backend)
    if any(isinstance(module, LinearAttention) for module in model.modules()):
        check_at_start(ctx.device, log.say)


def _sources(cfg: Config) -> tuple[str, ...]:
    return cfg.data.train_data + cfg.data.dataset_manifest


def _logger(cfg: Config, run: Path, ctx: Context) -> Logger:
    return Logger(
        run,
        cfg.run.report_to,
        is_main=ctx.is_main,
        dry=cfg.run.dry_run,
        resolved=cfg.flat(),
        project=cfg.run.wandb_project_name,
    )


def _batches(objective: Objective, samples_seen: int, seq_len: int, vocab_size: int) -> Iterator[Tensor]:
    """This rank's rows of the training data from one sample on."""
    cfg, ctx = objective.cfg, objective.ctx
    return stream.global_batches(
        cfg.data,
        seed=cfg.run.seed,
        samples_seen=samples_seen,
        global_batch_size=cfg.run.global_batch_size,
        rank=ctx.rank,
        world_size=ctx.world_size,
        seq_len=seq_len,
        vocab_size=vocab_size,
        logits=objective.logits,
    )


def _rehearse(model: Transformer, objective: Objective, micro: int, seq_len: int) -> float:
    """Seconds per token of the whole job, by one micro-batch of made-up tokens run forward and backward.

    What would fail in the first step (memory above all) fails here, before the run begins.
    """
    ctx, generator = objective.ctx, torch.Generator().manual_seed(0)
    batch = torch.randint(model.config.vocab_size, (micro, seq_len + 1), generator=generator).to(ctx.device)
    if objective.logits is not None:
        batch = F.pad(batch, (0, objective.logits.row_length(seq_len) - seq_len - 1))
    seconds = 0.0
    for _ in range(1 if ctx.device.type == "cpu" else 2):  # a GPU's first pass pays for compilation
        began = time.perf_counter()
        objective.sums(model, objective.part(batch))[-1].backward()
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds / (micro * seq_len * ctx.world_size)


def _fit(model: Transformer, source: pretrained.Source, cfg: Config, ctx: Context, log: Logger, seq_len: int) -> None:
    """Fits the swapped attentions to the teacher's, on the first samples of the training data."""
    with torch.device("meta"):
        teacher = Transformer(source.config).to(ctx.param_dtype)
    teacher = pretrained.materialise(teacher, source, cfg.parallel, ctx)
    batch = 4 * ctx.world_size

    def batches(tokens: int) -> list[Tensor]:
        found = stream.global_batches(
            cfg.data,
            seed=cfg.run.seed,
            samples_seen=0,
            global_batch_size=batch,
            rank=ctx.rank,
            world_size=ctx.world_size,
            seq_len=seq_len,
            vocab_size=model.config.vocab_size,
        )
        return [next(found)[:, :-1] for _ in range(-(-tokens // (batch * seq_len)))]

    def spent(began: float, batches: list[Tensor]) -> str:
        return f"{len(batches) * batch * seq_len:,} tokens in {human_time(time.perf_counter() - began)}"

    if cfg.run.init_tokens:
        began, taken = time.perf_counter(), batches(cfg.run.init_tokens)
        likeness = torch.tensor(choose_heads(model, teacher, taken, ctx)).T
        log.say(
            f"chose the start of the heads of {likeness.shape[1]} layers on {spent(began, taken)}: up to a factor they "
            f"explain {likeness[1].mean():.0%} of what the teacher's heads give, {likeness[0].mean():.0%} before"
        )
    if cfg.run.fit_tokens:
        began, taken = time.perf_counter(), batches(cfg.run.fit_tokens)
        explained = fit_output_projections(model, teacher, taken, ctx)
        log.say(
            f"fitted {len(explained)} output projections on {spent(began, taken)}: the new attention explains "
            f"{min(explained):.0%} to {max(explained):.0%} of the teacher's attention output, "
            f"{sum(explained) / len(explained):.0%} on average"
        )


def _report(
    log: Logger,
    window: Window,
    state: TrainState,
    lr: float,
    norm: float,
    plan: Plan,
    ctx: Context,
    flops: float,
    norms: dict[str, float],
) -> None:
    values = window.summary()
    losses = values["losses"]
    by_layer = {name: losses.pop(name).tolist() for name in LAYERWISE if name in losses}
    row = {
        "step": state.step,
        "tokens": state.tokens,
        **losses,
        "lr": lr,
        "grad_norm": norm,
        "tokens_per_s": values["tokens_per_s"],
        "tokens_per_s_per_device": values["tokens_per_s"] / ctx.world_size,
        "data_share": values["data_share"],
        "data_seconds": values["data_seconds"],
        "memory_bytes": memory_bytes(ctx.device),
        "seconds": state.seconds,
        "seconds_left": values["seconds_per_step"] * (plan.steps - state.step),
    }
    row |= gauges.speed(values["tokens_per_s"], flops, ctx) | gauges.memory(ctx.device) | norms
    for name, found in by_layer.items():
        row |= {name: sum(found) / len(found), f"{name}_min": min(found), f"{name}_max": max(found)}
    log.row("metrics.jsonl", row)
    if by_layer:
        log.row("alignment.jsonl", {"step": state.step, **by_layer})
    log.say(log_line(row, plan.steps))
    for name, found in by_layer.items() if state.step == plan.steps else ():
        log.say(f"{name} by layer: {' '.join(f'{error:.4f}' for error in found)}")
    window.reset()
