"""What the benchmarks print of the machine before they start."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil


def processor(device: str = "cpu") -> str:
    """The name of what computes."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def others(seconds: float = 1.0) -> float:
    """The cores that others keep busy here, measured for some ``seconds`` in which this process sleeps."""
    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)


def in_words(taken: float) -> str:
    """A line on what ``others()`` found."""
    note = " (the times below are theirs too)" if taken > 0.25 else ""
    return f"others took {taken:.2f} of {psutil.cpu_count()} cores before the start{note}"
