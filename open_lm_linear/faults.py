"""What a long run meets: signals, a launcher that dies, steps without a number, and the record of the data consumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm_linear import checkpoint
from open_lm_linear.checkpoint import TrainState
from open_lm_linear.cli import UserError
from open_lm_linear.metrics import replace_text, rewind, whole_rows

if TYPE_CHECKING:
    from open_lm_linear.parallel import Context
    from open_lm_linear.saver import Saver

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A signal asked the run to end early; it has saved and can be resumed."""


@dataclass
class Stop:
    """``signal`` is the name of the one that came, empty until then."""

    signal: str = ""


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """SIGTERM and SIGUSR1 ask for an end at the next step, for as long as the block runs.

    Worker processes of the data inherit this and so outlive a signal to the whole group: they end with their rank.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only there Python takes signals
        yield stop
        return

    def note(number: int, frame: Any) -> None:
        stop.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_launcher() -> None:
    """Under torchrun: this process is killed when the agent that started it is.

    An agent that is killed leaves its ranks alone with the run folder, where they would write beside those that the
    next one starts.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """This process is killed when the one that started it is. Linux only; elsewhere nothing happens."""
    import ctypes

    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def agree(ctx: Context, **flags: bool) -> dict[str, bool]:
    """Whether any rank says yes, flag by flag: one small all-reduce."""
    import torch

    values = ctx.sum(torch.tensor([float(flag) for flag in flags.values()], device=ctx.device))
    return {name: value > 0 for name, value in zip(flags, values.tolist(), strict=True)}


class SampleLog:
    """RUN/samples.jsonl: which samples each step took. Written by rank 0.

    One row a step: ``step`` (the update that it made or tried to make), ``first_sample``, ``samples`` and ``skipped``
    (no update was made of them, or it was undone). After any history of kills each sample is in it once.
    """

    def __init__(self, path: Path, is_main: bool) -> None:
        self.path, self.is_main = path, is_main

    def add(self, step: int, first: int, samples: int, skipped: bool) -> None:
        if not self.is_main:
            return
        row = {"step": step, "first_sample": first, "samples": samples, "skipped": skipped}
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")

    def rewind(self, state: TrainState) -> None:
        """Makes the log that of ``state``: what came after is dropped, what was skipped is marked."""
        if not self.is_main or not self.path.exists():
            return
        rows = []
        for _, row in whole_rows(self.path):
            first = row["first_sample"]
            if first >= state.samples:
                break
            row["skipped"] = any(start <= first < start + count for start, count in state.skipped)
            rows.append(json.dumps(row) + "\n")
        replace_text(self.path, "".join(rows))


def rewind_logs(run: Path, samples: SampleLog, state: TrainState) -> None:
    """Puts the run's logs back to where ``state`` is."""
    if samples.is_main:
        for file in ("metrics.jsonl", "alignment.jsonl", "results.jsonl", "states.jsonl", "evaluations.jsonl"):
            rewind(run / file, state.step)
    samples.rewind(state)


def skip(state: TrainState, first: int, loss: float, norm: float) -> str:
    """Notes a step without an update, on samples ``first`` to ``state.samples`` - 1; returns what to say of it."""
    state.skip(first, state.samples - first)
    state.skipped_in_row += 1
    return (
        f"warning: step {state.step + 1}: loss {loss}, gradient norm {norm}: no update is made of samples {first} to "
        f"{state.samples - 1} ({state.skipped_in_row} in a row)"
    )


def roll_back(saver: Saver, samples: SampleLog, state: TrainState) -> TrainState:
    """Back to the last checkpoint, past the data that came after it.

    Raises:
        UserError: there is none, or it was done often enough.
    """
    saver.wait()
    target, advice = saver.newest, "lower --lr or --lr-new, or set --grad-clip-norm"
    row = f"step {state.step + 1}: {state.skipped_in_row} steps in a row had no finite loss and gradients"
    if target is None:
        raise UserError(f"{row}, and there is no checkpoint to go back to: {advice}, and start again.")
    if state.rollbacks >= saver.cfg.max_rollbacks:
        raise UserError(
            f"{row}, after {state.rollbacks} returns to a checkpoint (--max-rollbacks): {advice}, and go on from an "
            f"earlier checkpoint than {target.name} with --resume PATH."
        )
    back = checkpoint.load(target, saver.model, saver.optimizer, saver.ctx)
    if saver.averagers is not None:
        checkpoint.load_averages(target, saver.averagers)
    saver.say(
        f"warning: {row}: back to step {back.step} ({target}), past samples {back.samples} to {state.samples - 1}"
    )
    back.skip(back.samples, state.samples - back.samples)
    back.samples, back.seconds, back.skipped_in_row = state.samples, state.seconds, 0
    back.rollbacks = state.rollbacks + 1
    saver.amend(back)
    rewind_logs(saver.run, samples, back)
    return back
