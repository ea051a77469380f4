"""Times the reading of tokens: webdataset's own pipeline over JSON in tars, and this project's loader over .npy.

    python eval/bench_loader.py                    # 200 MB of JSON samples, and the same tokens as .npy
    python eval/bench_loader.py --megabytes 1000 --workers 1

Every side reads every token once into int64 batches, in a process of its own, the sides in turn, round after round, so
that a drift of the machine hits all alike. The files were just written, so they come from the page cache. It prints
what was measured and asserts nothing but that all sides read the same tokens.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import in_words, others, processor

from open_lm_linear import cli

VOCAB = 50_432
PER_SHARD = 512
SIDES = ("webdataset, json", "webdataset, npy", "this loader, json", "this loader, npy")


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    megabytes: int = 200
    """Size of the JSON samples."""
    seq_len: int = 2048
    """A sample holds one token more."""
    batch: int = 16
    """Sequences per batch."""
    runs: int = 3
    """Passes of each side, after one that is not counted."""
    workers: int = 0
    """Processes that read ahead, on every side."""
    folder: str = ""
    """Where the shards are made and kept; empty: a temporary folder."""
    side: str = ""
    """Run one side once over the shards in --folder (the benchmark starts itself with this)."""


def make(bench: Bench, folder: Path) -> None:
    """The same random tokens as json/ and as npy/, each with its manifest."""
    from open_lm_linear.data.manifest import Shard, write_manifest
    from open_lm_linear.data.shards import write_shard

    rng = np.random.default_rng(0)
    for name in ("json", "npy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[Shard]] = {"json": [], "npy": []}
    written = number = 0
    while written < bench.megabytes * 1e6:
        rows = rng.integers(0, VOCAB, (PER_SHARD, bench.seq_len + 1))
        for name, found in shards.items():
            path = folder / name / f"shard-{number:05d}.tar"
            write_shard(path, rows, number * PER_SHARD, vocab_size=VOCAB if name == "npy" else None)
            found.append(Shard(str(path), PER_SHARD))
        written += (folder / "json" / f"shard-{number:05d}.tar").stat().st_size
        number += 1
    for name, found in shards.items():
        write_manifest(folder / name / "manifest.jsonl", found, {"vocab_size": VOCAB, "seq_len": bench.seq_len})


def batches(bench: Bench) -> Iterator[object]:
    """One pass of --side over its shards: int64 tensors (batch, seq_len + 1)."""
    import torch

    reader, _, kind = bench.side.partition(", ")
    folder = Path(bench.folder) / kind
    if reader == "this loader":
        from open_lm_linear.data import stream

        cfg = stream.DataConfig(train_data=(str(folder),), workers=bench.workers)
        total = stream.count_sequences(cfg) // bench.batch
        found = stream.global_batches(
            cfg,
            seed=0,
            samples_seen=0,
            global_batch_size=bench.batch,
            rank=0,
            world_size=1,
            seq_len=bench.seq_len,
            vocab_size=VOCAB,
        )
        for _ in range(total):
            yield next(found)
        return
    import webdataset

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(paths, shardshuffle=False).decode().to_tuple(kind)
    pipeline = pipeline.map(lambda sample: torch.as_tensor(np.asarray(sample[0], dtype=np.int64)))
    pipeline = pipeline.batched(bench.batch, collation_fn=torch.stack)
    yield from webdataset.WebLoader(pipeline, batch_size=None, num_workers=bench.workers)


def one_pass(bench: Bench) -> dict[str, float]:
    """Tokens, a sum over them, seconds, and the resident MB of the reading process at start, middle and end."""
    import psutil
    import torch
    import torch.utils.data
    import webdataset  # noqa: F401 (imports are not timed)

    from open_lm_linear.data import stream  # noqa: F401

    torch.set_num_threads(1)
    process = psutil.Process()
    total = sum(json.loads(line)["num_sequences"] for line in (Path(bench.folder) / "npy/manifest.jsonl").open())
    tokens = checksum = 0
    memory = []
    begin = time.perf_counter()
    for number, batch in enumerate(batches(bench)):
        tokens += batch.numel()
        checksum += int(batch.sum())
        if number in (0, total // bench.batch // 2):
            memory.append(process.memory_info().rss / 1e6)
    seconds = time.perf_counter() - begin
    memory.append(process.memory_info().rss / 1e6)
    start, middle, end = memory
    return {"tokens": tokens, "sum": checksum, "seconds": seconds, "start": start, "middle": middle, "end": end}


def measure(bench: Bench, folder: str) -> dict[str, list[dict[str, float]]]:
    """Every counted pass of every side."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(1 + bench.runs):
        for side in SIDES:
            flags = ["--folder", folder, "--side", side, "--workers", str(bench.workers), "--batch", str(bench.batch)]
            command = [sys.executable, __file__, *flags, "--seq-len", str(bench.seq_len)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise cli.UserError(f"the side {side!r} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            if turn:
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    assert len({(row["tokens"], row["sum"]) for rows in found.values() for row in rows}) == 1, "tokens differ"
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """One line a side: tokens/s (median, least, most), how many times the first's, memory of the last pass."""
    head = f"{'':18}{'tokens/s':>13}{'min':>13}{'max':>13}{'x first':>9}   MB at start, middle, end of a pass"
    lines, base = [head], 0.0
    for side, rows in found.items():
        speeds = [row["tokens"] / row["seconds"] for row in rows]
        middle, last = statistics.median(speeds), rows[-1]
        base = base or middle
        memory = ", ".join(f"{last[key]:.0f}" for key in ("start", "middle", "end"))
        line = f"{side:18}{middle:13,.0f}{min(speeds):13,.0f}{max(speeds):13,.0f}{middle / base:9.1f}   {memory}"
        lines.append(line)
    return "\n".join(lines)


@cli.command
def main() -> None:
    bench = cli.parse(Bench, prog="bench_loader.py", description=str(__doc__).split("\n")[0])
    if min(bench.megabytes, bench.seq_len, bench.batch, bench.runs) < 1 or bench.workers < 0:
        raise cli.UserError("--megabytes, --seq-len, --batch and --runs must be above 0, --workers at least 0.")
    if bench.side:
        print(json.dumps(one_pass(bench)))
        return
    import webdataset

    print(f"{processor()}, webdataset {webdataset.__version__}, numpy {np.__version__}")
    print(in_words(others()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(bench.folder or temporary)
        make(bench, folder)
        sizes = {n: sum(p.stat().st_size for p in (folder / n).glob("*.tar")) / 1e6 for n in ("json", "npy")}
        found = measure(bench, str(folder))
    tokens = found[SIDES[0]][0]["tokens"]
    print(f"{tokens:,.0f} tokens, {sizes['json']:.0f} MB as json and {sizes['npy']:.0f} MB as npy; {bench.runs} runs")
    print(f"of each side in turn, after one to warm up; --workers {bench.workers}, batches of {bench.batch}\n")
    print(table(found))


if __name__ == "__main__":
    main()
