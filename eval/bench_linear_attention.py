"""Times chunked linear attention against softmax attention and the masked quadratic form, in one run.

    python eval/bench_linear_attention.py            # what `make bench` runs: float32, 2 x 8 heads x 4096 x 64
    python eval/bench_linear_attention.py --tokens 4096 8192 --bf16
    python eval/bench_linear_attention.py --device cuda --bf16

Forward and backward of each side in turn, round after round, so that a drift of the machine hits all alike. It prints
what was measured and asserts nothing.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from open_lm_linear import cli


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    batch: int = 2
    """Sequences."""
    heads: int = 8
    """Query, key and value heads."""
    tokens: tuple[int, ...] = (4096,)
    """Lengths to measure, one table each."""
    head_dim: int = 64
    """Dimension of a head."""
    runs: int = 5
    """Timed rounds, after the warm-up; the median stands in the table."""
    warmup: int = 2
    """Rounds that are not timed."""
    bf16: bool = False
    """Also in bfloat16."""
    quadratic: bool = True
    """Also the masked quadratic form, whose memory grows with the square of the length."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""


def processor(device: str) -> str:
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


def sides(bench: Bench, tokens: int, dtype: str) -> dict[str, Callable[[], None]]:
    """Name -> forward and backward on the same random q, k, v (batch, tokens, heads, head_dim)."""
    import torch
    import torch.nn.functional as F

    from open_lm_linear.attention.linear import lightning_slopes
    from open_lm_linear.ops import linear_attention as ops

    shape = (bench.batch, tokens, bench.heads, bench.head_dim)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(shape, device=bench.device).to(getattr(torch, dtype)) for _ in range(4))
    k = k * bench.head_dim**-0.5
    decay = -torch.tensor(lightning_slopes(bench.heads), device=bench.device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    forms = {"chunked": lambda *x: ops.chunked(*x, decay)[0], "softmax (SDPA)": softmax}
    if bench.quadratic:
        forms["masked quadratic"] = lambda *x: ops.quadratic(*x, decay)
    return {name: lambda form=form: torch.autograd.grad(form(*leaves), leaves, dout) for name, form in forms.items()}


def measure(bench: Bench, tokens: int, dtype: str) -> dict[str, list[float]]:
    """Milliseconds of every timed run of every side."""
    import torch

    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    calls = sides(bench, tokens, dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(bench.warmup + bench.runs):
        for name, call in calls.items():
            wait()
            begin = time.perf_counter()
            call()
            wait()
            if turn >= bench.warmup:
                times[name].append(1000 * (time.perf_counter() - begin))
    return times


def table(times: dict[str, list[float]]) -> str:
    """One line a side: median, least, most, and how many times the chunked form's median it takes."""
    base = statistics.median(times["chunked"])
    lines = [f"{'':18}{'median ms':>11}{'min':>10}{'max':>10}{'x chunked':>11}"]
    for name, each in times.items():
        middle = statistics.median(each)
        lines.append(f"{name:18}{middle:11.1f}{min(each):10.1f}{max(each):10.1f}{middle / base:11.2f}")
    return "\n".join(lines)


@cli.command
def main() -> None:
    """Reads the flags, names the machine, prints one table a length and dtype."""
    bench = cli.parse(Bench, prog="bench_linear_attention.py", description=str(__doc__).split("\n")[0])
    if min(bench.batch, bench.heads, bench.head_dim, bench.runs, *bench.tokens) < 1 or bench.warmup < 0:
        raise cli.UserError("--batch, --heads, --head-dim, --tokens and --runs must be above 0, --warmup at least 0.")
    import torch

    if bench.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no CUDA device here.")
    if bench.threads:
        torch.set_num_threads(bench.threads)
    print(f"{processor(bench.device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    note = " (others are computing here: the times below are theirs too)" if busy > 0.5 else ""
    print(f"load average before the start {busy:.2f}{note}")
    print(f"forward + backward, {bench.runs} interleaved runs after {bench.warmup} to warm up")
    for dtype in ("float32", "bfloat16")[: 1 + bench.bf16]:
        for tokens in bench.tokens:
            print(f"\n{dtype}, batch {bench.batch}, {bench.heads} heads, {tokens} tokens, head_dim {bench.head_dim}")
            print(table(measure(bench, tokens, dtype)), flush=True)


if __name__ == "__main__":
    main()
