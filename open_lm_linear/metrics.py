"""What a run says of itself: one line a log step for people, the same as JSONL, TensorBoard and wandb."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch

REPORTS = ("tensorboard", "wandb")


def memory_bytes(device: torch.device) -> int:
    """Peak bytes of this process on its GPU, or its resident bytes on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def human_time(seconds: float) -> str:
    """``3723`` -> ``1h02m``."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s"


def human_bytes(count: float) -> str:
    """``3221225472`` -> ``3.00 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


class Logger:
    """Writes to out.log, metrics.jsonl, results.jsonl, the terminal, TensorBoard and wandb; silent off rank 0.

    A dry run speaks to the terminal alone.
    """

    def __init__(
        self, run: Path, report_to: str, *, is_main: bool, dry: bool, resolved: dict[str, Any], project: str
    ) -> None:
        self.run, self.is_main = run, is_main
        self.bar: Any = None
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.log: IO[str] | None = None
        if not is_main or dry:
            return
        self.log = (run / "out.log").open("a")
        wanted = [r.strip() for r in report_to.split(",") if r.strip()]
        if "tensorboard" in wanted:
            self.tensorboard = _tensorboard(run)
        if "wandb" in wanted:
            self.wandb = _wandb(run, project, resolved)

    def say(self, text: str) -> None:
        """A line for people: terminal and out.log."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
        if self.log is not None:
            self.log.write(text + "\n")
            self.log.flush()

    def start_bar(self, total: int, initial: int) -> None:
        """A progress bar, where the terminal is a person's."""
        if self.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True)

    def tick(self) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def row(self, file: str, values: dict[str, Any]) -> None:
        """One JSON object to RUN/``file`` and its numbers to TensorBoard and wandb."""
        if not self.is_main:
            return
        with (self.run / file).open("a") as out:
            out.write(json.dumps(values) + "\n")
        group = file.removesuffix(".jsonl")
        numbers = {f"{group}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, values["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=values["step"])

    def close(self) -> None:
        for sink in (self.bar, self.tensorboard, self.log):
            if sink is not None:
                sink.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_reports(report_to: str) -> None:
    """Refuses a --report-to that nothing here understands."""
    for name in (r.strip() for r in report_to.split(",")):
        if name and name not in REPORTS:
            raise UserError(f"--report-to {name!r} is not one of {', '.join(REPORTS)}.")


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--report-to tensorboard needs tensorboard: pip install 'open_lm_linear[tensorboard]'."
        ) from error
    return SummaryWriter(str(run / "tensorboard"))


def _wandb(run: Path, project: str, resolved: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--report-to wandb needs wandb: pip install 'open_lm_linear[wandb]'.") from error
    return wandb.init(project=project, name=run.name, id=run.name, resume="allow", dir=str(run), config=resolved)


def rewind(path: Path, step: int) -> None:
    """Drops the rows of a JSONL after ``step``, and a last one that a kill cut off: a resumed run writes them anew."""
    if path.exists():
        kept = [line for line, row in whole_rows(path) if row["step"] <= step]
        replace_text(path, "".join(line + "\n" for line in kept))


def whole_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL and what they say, up to one that was cut off."""
    for line in path.read_text().splitlines():
        try:
            yield line, json.loads(line)
        except ValueError:
            return


def replace_text(path: Path, text: str) -> None:
    """Gives a file another content, the old or the new one at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


class Window:
    """Averages since the last log line: loss, speed and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.began = time.perf_counter()
        self.waited, self.tokens, self.steps = 0.0, 0, 0
        self.losses: dict[str, Any] = {}

    def add(self, losses: dict[str, Any], tokens: int, waited: float) -> None:
        """A step: its ``loss`` and the parts of that, numbers or tensors with a value a layer."""
        self.losses = {name: self.losses.get(name, 0.0) + value for name, value in losses.items()}
        self.tokens, self.steps, self.waited = self.tokens + tokens, self.steps + 1, self.waited + waited

    def summary(self) -> dict[str, Any]:
        elapsed = time.perf_counter() - self.began
        return {
            "losses": {name: total / self.steps for name, total in self.losses.items()},
            "tokens_per_s": self.tokens / elapsed,
            "seconds_per_step": elapsed / self.steps,
            "data_share": self.waited / elapsed,
            "data_seconds": self.waited,
        }


def log_line(row: dict[str, Any], steps: int) -> str:
    """The line of a log step, for people."""
    share = f" ({row['flops_share']:.0%} of the GPU's bf16 peak)" if "flops_share" in row else ""
    parts = [f"{name.removeprefix('loss_')} {row[name]:.4f}" for name in ("loss_ce", "loss_kl") if name in row]
    for name in ("align", "hidden"):
        if name in row:
            parts.append(f"{name} {row[name]:.4f}, by layer {row[name + '_min']:.4f} to {row[name + '_max']:.4f}")
    loss = f"{row['loss']:.4f}" + (f" ({'; '.join(parts)})" if parts else "")
    return (
        f"step {row['step']}/{steps} | tokens {row['tokens']:,} | loss {loss} | lr {row['lr']:.2e} | "
        f"grad norm {row['grad_norm']:.2f} | {row['tokens_per_s']:,.0f} tokens/s{share} | "
        f"data {row['data_share']:.1%} | memory {human_bytes(row['memory_bytes'])} | "
        f"{human_time(row['seconds_left'])} left"
    )
