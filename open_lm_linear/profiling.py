"""A trace of a few steps of a run (``--profile START:STEPS``), by torch's profiler, and of a GPU's memory in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch

MEMORY_EVENTS = 100_000
"""Allocations and releases that a memory trace remembers, the latest."""


def parse_window(spec: str) -> tuple[int, int]:
    """``START:STEPS`` -> the first step (from 1) and the number of steps.

    Raises:
        UserError: anything but two whole numbers from 1.
    """
    start, _, steps = spec.partition(":")
    if not (start.isdecimal() and steps.isdecimal() and int(start) and int(steps)):
        raise UserError(f"--profile {spec!r} is not START:STEPS, two whole numbers from 1 such as 10:3.")
    return int(start), int(steps)


class Profile:
    """Records a window of steps, once, and writes it into a folder.

    Args:
        spec: ``START:STEPS``, or empty for none.
        folder: made when the window ends; holds ``trace_START_LAST.json.gz`` (chrome://tracing, Perfetto) and on a GPU
            ``memory_START_LAST.html`` (a page to look at) and ``.json.gz`` (the same snapshot as data).
        active: False on the ranks that record nothing.
    """

    def __init__(self, spec: str, folder: Path, device: torch.device, *, active: bool) -> None:
        self.window = parse_window(spec) if spec and active else None
        self.folder, self.device = folder, device
        self.recorder: Any = None
        self.begun = 0

    def at(self, step: int) -> None:
        """Before each step, with the number of steps done before it."""
        if self.window is None:
            return
        start, steps = self.window
        if self.recorder is None and step == start - 1:
            self._begin(step)
        elif self.recorder is not None and step >= start - 1 + steps:
            self.close(step)

    def close(self, step: int) -> None:
        """Ends the window, if it is open, after ``step`` steps."""
        if self.recorder is None:
            return
        recorder, self.recorder, self.window = self.recorder, None, None
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = f"{self.begun + 1}_{step}"
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        recorder.stop()
        recorder.export_chrome_trace(str(self.folder / f"trace_{steps}.json.gz"))
        if self.device.type == "cuda":
            self._write_memory(steps)

    def _begin(self, step: int) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities, self.begun = [ProfilerActivity.CPU], step
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.recorder = profile(activities=activities, record_shapes=True)
        self.recorder.start()

    def _write_memory(self, steps: str) -> None:
        import torch
        from torch.cuda import _memory_viz

        # torch's own dump would be a pickle, which this package never writes.
        snapshot = torch.cuda.memory._snapshot(self.device)
        torch.cuda.memory._record_memory_history(enabled=None)
        with gzip.open(self.folder / f"memory_{steps}.json.gz", "wt") as file:
            json.dump(snapshot, file, default=str)
        (self.folder / f"memory_{steps}.html").write_text(_memory_viz.trace_plot(snapshot))
