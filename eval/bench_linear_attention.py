"""Times linear attention against softmax attention and the masked quadratic form, in one run.

    python eval/bench_linear_attention.py            # what `make bench` runs: float32, 2 x 8 heads x 4096 x 64
    python eval/bench_linear_attention.py --tokens 4096 8192 --bf16
    python eval/bench_linear_attention.py --device cuda --bf16 --json linear_attention.json

Each side in turn, round after round, so that a drift of the machine hits all alike. On a GPU every backend that is
there takes part (docs/kernels.md), the forward pass is timed alone too, and beside each time stands the share that it
reaches of the memory's floor: each input read and each result written once, at the bandwidth of a copy measured in the
same run. It prints what was measured and asserts nothing.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from machine import in_words, others, processor

from open_lm_linear import cli

if TYPE_CHECKING:
    import torch

GPU_SIZES: dict[str, Any] = {
    "batch": 4,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "tokens": (2048, 4096, 8192, 16384, 32768, 65536),
}
CPU_SIZES: dict[str, Any] = {"batch": 2, "heads": 8, "head_dim": 64, "tokens": (4096,)}
PASSES = ("forward", "forward + backward")
NAMES = {"torch": "chunked", "triton": "triton", "fla": "fla", "lightning": "lightning-attn"}


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    batch: int = 0
    """Sequences (0: 2 on a CPU, 4 on a GPU)."""
    heads: int = 0
    """Query heads (0: 8 on a CPU, 32 on a GPU)."""
    kv_heads: int = 0
    """Key and value heads (0: as many, or with the GPU's 32 heads 8)."""
    tokens: tuple[int, ...] = ()
    """Lengths to measure, one table each. None given: 4096 on a CPU, 2048 to 65536 on a GPU."""
    head_dim: int = 0
    """Dimension of a head (0: 64 on a CPU, 128 on a GPU)."""
    runs: int = 5
    """Timed rounds, after the warm-up; the median stands in the table."""
    warmup: int = 2
    """Rounds that are not timed."""
    bf16: bool = False
    """Also in bfloat16; on a GPU in bfloat16 alone."""
    quadratic: bool = True
    """Also the masked quadratic form, whose memory grows with the square of the length."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    json: str = ""
    """File for all figures."""

    def complete(self) -> Bench:
        """With the sizes that were left to the device."""
        sizes = dict(GPU_SIZES if self.device == "cuda" else CPU_SIZES)
        if self.heads:
            sizes.pop("kv_heads", None)
        chosen = replace(self, **{name: getattr(self, name) or size for name, size in sizes.items()})
        return replace(chosen, kv_heads=chosen.kv_heads or chosen.heads)


def sides(bench: Bench, tokens: int, dtype: str) -> dict[str, Callable[[bool], None]]:
    """Name -> a call, with the backward pass or without, all on one random q, k, v (batch, tokens, heads, head_dim)."""
    import torch
    import torch.nn.functional as F

    from open_lm_linear.attention.linear import lightning_slopes
    from open_lm_linear.ops import backends, check
    from open_lm_linear.ops import linear_attention as ops

    def normal(heads: int) -> torch.Tensor:
        shape = (bench.batch, tokens, heads, bench.head_dim)
        return torch.randn(shape, device=bench.device).to(getattr(torch, dtype))

    torch.manual_seed(0)
    q, k, v, dout = (normal(heads) for heads in (bench.heads, bench.kv_heads, bench.kv_heads, bench.heads))
    k = k * bench.head_dim**-0.5
    decay = -torch.tensor(lightning_slopes(bench.heads), device=bench.device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shared = bench.heads != bench.kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(1, 2)

    def linear(name: str, *rows: torch.Tensor) -> torch.Tensor:
        return backends.run_backend(name, *rows, decay, None, None, None)[0]

    present = check.present_backends(torch.device(bench.device))
    taken = [name for name in present if not backends.why_not(name, q, k, v, decay, None, None, None)]
    forms: dict[str, Callable[..., torch.Tensor]] = {NAMES[name]: functools.partial(linear, name) for name in taken}
    forms["softmax (SDPA)"] = softmax
    if bench.quadratic:
        forms["masked quadratic"] = lambda *x: ops.quadratic(*x, decay)

    def call(form: Callable[..., torch.Tensor], backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = form(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, dout)

    return {name: functools.partial(call, form) for name, form in forms.items()}


def milliseconds(call: Callable[[], None], device: str) -> float:
    """What one call takes; on a GPU by the GPU's own clock."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(bench: Bench, tokens: int, dtype: str, backward: bool) -> dict[str, list[float]]:
    """Milliseconds of every timed run of every side; none for one whose memory is not there."""
    import torch

    calls = sides(bench, tokens, dtype)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(bench.warmup + bench.runs):
        for name, call in list(calls.items()):
            try:
                taken = milliseconds(lambda call=call: call(backward), bench.device)
            except torch.cuda.OutOfMemoryError:
                del calls[name]
                times[name].clear()
                torch.cuda.empty_cache()
                continue
            if turn >= bench.warmup:
                times[name].append(taken)
    return times


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, counted as read and written; the best of ten."""
    import torch

    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best * 1000


def floor_bytes(bench: Bench, tokens: int, dtype: str, backward: bool) -> int:
    """Forward: q, k, v read, out written. Backward: q, k, v and out's gradient read, three gradients written."""
    rows = bench.batch * tokens * bench.head_dim * (2 if dtype == "bfloat16" else 4)
    forward = rows * (2 * bench.heads + 2 * bench.kv_heads)
    return forward + (rows * (3 * bench.heads + 4 * bench.kv_heads) if backward else 0)


def table(times: dict[str, list[float]], floor: float | None) -> str:
    """One line a side: median, least, most, how many times the first side's median, and the share of the floor."""
    first = next(iter(times))
    base = statistics.median(times[first]) if times[first] else math.nan
    share = "" if floor is None else f"{'of the floor':>14}"
    lines = [f"{'':18}{'median ms':>11}{'min':>10}{'max':>10}{'x ' + first:>11}{share}"]
    for name, each in times.items():
        if not each:
            lines.append(f"{name:18}{'no memory':>11}")
            continue
        middle = statistics.median(each)
        digits = 1 if floor is None else 3
        cells = f"{middle:11.{digits}f}{min(each):10.{digits}f}{max(each):10.{digits}f}{middle / base:11.2f}"
        lines.append(f"{name:18}{cells}" + ("" if floor is None else f"{floor / middle:14.0%}"))
    return "\n".join(lines)


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Side and pass -> p of the fit time = c tokens^p, least squares over the logarithms of the medians."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (math.log(row["tokens"]), math.log(row["median_ms"]))
        found.setdefault(f"{row['dtype']}, {row['pass']}, {row['side']}", []).append(point)
    return {
        name: statistics.linear_regression(*zip(*points, strict=True)).slope
        for name, points in found.items()
        if len(points) > 1
    }


def run(bench: Bench) -> list[dict[str, Any]]:
    """All tables, printed; one row a side, pass, length and dtype."""
    from open_lm_linear.ops import backends

    gpu = bench.device == "cuda"
    rate = bandwidth(bench.device) if gpu else None
    for name in NAMES if gpu else ():
        if backends.missing(name, gpu):
            print(f"not timed: {NAMES[name]}: {backends.missing(name, gpu)}")
    if rate is not None:
        print(f"a copy moves {rate / 1e9:.0f} GB/s, read and written")
    dtypes = ("float32", "bfloat16")[bench.bf16 if gpu else 0 : 1 + bench.bf16]
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        for tokens in bench.tokens:
            for kind in PASSES if gpu else PASSES[1:]:
                backward = kind == PASSES[1]
                floor = None if rate is None else 1000 * floor_bytes(bench, tokens, dtype, backward) / rate
                heads = f"{bench.heads} heads" + (
                    f" ({bench.kv_heads} of keys)" if bench.kv_heads < bench.heads else ""
                )
                print(f"\n{dtype}, batch {bench.batch}, {heads}, {tokens} tokens, head_dim {bench.head_dim}, {kind}")
                times = measure(bench, tokens, dtype, backward)
                print(table(times, floor), flush=True)
                same = {"dtype": dtype, "tokens": tokens, "pass": kind, "floor_ms": floor}
                for name, each in times.items():
                    if each:
                        figures = {"median_ms": statistics.median(each), "min_ms": min(each), "max_ms": max(each)}
                        rows.append({**same, "side": name, **figures})
    return rows


@cli.command
def main() -> None:
    """Reads the flags, names the machine, prints one table a length, pass and dtype."""
    bench = cli.parse(Bench, prog="bench_linear_attention.py", description=str(__doc__).split("\n")[0]).complete()
    sizes = (bench.batch, bench.heads, bench.kv_heads, bench.head_dim, bench.runs, *bench.tokens)
    if min(sizes) < 1 or bench.warmup < 0 or bench.heads % bench.kv_heads:
        raise cli.UserError(
            "--batch, --heads, --kv-heads, --head-dim, --tokens and --runs must be above 0, --warmup at least 0, and "
            "--kv-heads must divide --heads."
        )
    import torch

    if bench.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no CUDA device here.")
    if bench.threads:
        torch.set_num_threads(bench.threads)
    machine = f"{processor(bench.device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    print(machine)
    print(in_words(others()))
    print(f"{bench.runs} interleaved runs after {bench.warmup} to warm up")
    rows = run(bench)
    fits = exponents(rows)
    if fits:
        print("\ntime = c tokens^p, p by side:")
        print("\n".join(f"{name:50}{p:6.2f}" for name, p in fits.items()))
    if bench.json:
        found = {"machine": machine, "bench": asdict(bench), "rows": rows, "exponents": fits}
        Path(bench.json).write_text(json.dumps(found, indent=1) + "\n")
        print(f"all figures are in {bench.json}")


if __name__ == "__main__":
    main()
