"""What a benchmark of a model is asked for, its rounds, and the lines of its table."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; the flags below it say for which of them they are."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """cpu: of the weights; a GPU takes bfloat16."""
    hidden_dim: int = 512
    """cpu: of the model, whose heads have 64 dimensions."""
    n_layers: int = 8
    """cpu: of the model."""
    vocab_size: int = 50_432
    """cpu: of the model."""
    tokens: int = 1024
    """cpu: of the prompt and of a training sequence."""
    batch: int = 2
    """cpu: training sequences."""
    growth: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    """cpu: lengths over which the operator's time and memory are fitted."""
    decoded: int = 64
    """Tokens timed."""
    runs: int = 3
    """Timed rounds of prefill and training; the median stands in the table."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    models: tuple[Literal["smollm2", "1b", "mistral_7b"], ...] = ("smollm2", "1b", "mistral_7b")
    """cuda: shapes to train, with random weights."""
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """cuda: training sequences."""
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    """cuda: tokens before the decoded ones, of Mistral-7B's shapes."""
    batches: tuple[int, ...] = (1, 16, 64, 256)
    """cuda: sequences decoded at once."""
    json: str = ""
    """Also write the rows to this file."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    side: str
    per_second: float
    """Tokens a second, of the median time."""
    milliseconds: float
    """Median."""
    least: float
    most: float
    ratio: float | None = None
    """The other side's median over ours; None in other rows than ours."""
    note: str = ""


def timed(calls: Calls, runs: int, warmup: int, wait: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Milliseconds of each side's calls, the sides in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + runs):
        for name, call in calls.items():
            wait()
            begin = time.perf_counter()
            call()
            wait()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - begin))
    return times


def rows(what: str, times: dict[str, list[float]], tokens: int, note: str = "") -> list[Row]:
    """A row a side, the first of them ours, the second what it is compared with."""
    middle = {name: statistics.median(each) for name, each in times.items()}
    found = [
        Row(what, name, 1000 * tokens / middle[name], middle[name], min(each), max(each))
        for name, each in times.items()
    ]
    ratio = found[1].milliseconds / found[0].milliseconds if len(found) > 1 else None
    found[0] = dataclasses.replace(found[0], ratio=ratio, note=note)
    return found


def show(found: Sequence[Row]) -> None:
    for row in found:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        spread = f"{row.milliseconds:10.1f}{row.least:10.1f}{row.most:10.1f}"
        print(f"{row.what:44}{row.side:14}{row.per_second:10.0f}{spread}{ratio:>9}  {row.note}", flush=True)
