"""Checkpoints: one folder a checkpoint, there whole or not at all, safetensors and JSON only.

    RUN/checkpoints/step_00000060/
        model.safetensors  optimizer.safetensors    where one rank holds everything: weights under OpenLM's keys, and
                                                    the optimiser's state as NAME.exp_avg and so on
        model-rank00000.safetensors ...             under FSDP instead, each rank's own shards,
        optimizer-rank00000.safetensors ...
        averages.safetensors                        --averagers: AVERAGE/PARAMETER, likewise
        shards.json                                 and of every tensor its whole shape and which file holds what of it
        model.json                                  the architecture
        random-rank00000.safetensors ...            each rank's random states
        state.json                                  step, samples and tokens seen, what was skipped, the configuration,
                                                    and the size of every file above

``state.json`` is written last and the folder gets its name last, so that a killed run leaves nothing that looks whole.
Written by ``saver.py``; this module says what a folder holds, which is whole, and puts one back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch

    from open_lm_linear.averaging import Averagers
    from open_lm_linear.model import Transformer
    from open_lm_linear.parallel import Context
    from open_lm_linear.pretrained.readers import Reader

SHARDS = "shards.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and faults."""

    resume: str = ""
    """latest: go on from the newest whole checkpoint of this run, here or under --remote-sync (or start it); or the
    path of a checkpoint folder."""
    save_frequency: int = 1
    """Save every this many epochs; the last epoch is always saved."""
    save_every_steps: int = 0
    """Save every this many steps too. 0: not."""
    save_every_minutes: float = 0.0
    """Save when this many minutes have passed since the last checkpoint too. 0: not."""
    keep_last: int = 0
    """Keep only this many of the newest checkpoints. 0: all."""
    keep_every: int = 0
    """Keep for ever the checkpoints whose step is a multiple of this, whatever --keep-last says. 0: none."""
    delete_previous_checkpoint: bool = False
    """OpenLM's name for --keep-last 1."""
    remote_sync: str = ""
    """URL (s3://, gs://, file://) of a folder that gets a copy of every checkpoint, under the run's name; nothing is
    ever deleted there."""
    max_skipped_steps: int = 10
    """A step whose loss or gradients are not finite makes no update; after this many in a row the run goes back to its
    last checkpoint and leaves out the data since."""
    max_rollbacks: int = 3
    """Go back this many times at most, then stop."""

    @property
    def kept(self) -> int:
        """How many of the newest checkpoints are kept; 0: all."""
        return 1 if self.delete_previous_checkpoint else self.keep_last

    def check(self) -> None:
        """Refuses numbers that mean nothing."""
        for name in ("save_every_steps", "save_every_minutes", "keep_last", "keep_every", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}.")
        for name in ("save_frequency", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if self.delete_previous_checkpoint and self.keep_last > 1:
            raise UserError(f"--delete-previous-checkpoint is --keep-last 1: leave out one of it and {self.keep_last}.")


@dataclass
class TrainState:
    """Where a run stands. ``step`` counts updates, ``samples`` is the whole state of the data.

    ``skipped`` are the ranges [first, count] of samples that no update was made of; they lie before ``samples``.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: list[list[int]] = field(default_factory=list)
    skipped_in_row: int = 0
    rollbacks: int = 0

    def skip(self, first: int, count: int) -> None:
        """Notes samples without an update; ranges that touch become one, and one that holds others replaces them."""
        self.skipped = [r for r in self.skipped if r[0] < first]
        if self.skipped and sum(self.skipped[-1]) >= first:
            start = self.skipped.pop()[0]
            first, count = start, first + count - start
        self.skipped.append([first, count])

    def copy(self) -> TrainState:
        return dataclasses.replace(self, skipped=[list(r) for r in self.skipped])


def load(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, ctx: Context) -> TrainState:
    """Puts a checkpoint of any number of ranks into a model and its optimiser; each rank reads its own rows.

    Raises:
        UserError: a half-written checkpoint, or one of another architecture or of other trained parameters.
    """
    from open_lm_linear.parallel import put_rows

    record = require_whole(folder)
    saved = json.loads((folder / "model.json").read_text())
    for key, value in model.config.to_json().items():
        if saved.get(key) != value:
            raise UserError(f"{folder}: the checkpoint has {key} = {saved.get(key)!r}, this run {value!r}.")
    weights = open_part(folder, "model")
    for name, param in model.named_parameters():
        put_rows(param, _rows(weights, name))
    _load_moments(folder, model, optimizer)
    _load_random(folder, ctx, int(record.get("world_size", 0)))
    fields = (f.name for f in dataclasses.fields(TrainState))
    return TrainState(**{name: record[name] for name in fields if name in record})


def load_averages(folder: Path, averagers: Averagers) -> None:
    """Puts a checkpoint's running averages into those of a run.

    Raises:
        UserError: it holds none, or others.
    """
    from open_lm_linear.parallel import put_rows

    own = averagers.state()
    if not own:
        return
    if not any(name.startswith("averages") for name in require_whole(folder)["files"]):
        raise UserError(f"{folder} holds no running averages: resume it without --averagers.")
    reader = open_part(folder, "averages")
    averagers.require_same(reader.names())
    for name, value in own.items():
        put_rows(value, _rows(reader, name))


def _rows(reader: Reader, name: str) -> Callable[[int, int], torch.Tensor]:
    return lambda begin, end: reader.read(name, begin, end)


def open_part(folder: Path, part: str) -> Reader:
    """The tensors of ``model``, ``optimizer`` or ``averages`` of a checkpoint folder, one file or sharded."""
    from open_lm_linear.pretrained.places import LocalPlace
    from open_lm_linear.pretrained.readers import SafetensorsReader
    from open_lm_linear.pretrained.shards import ShardsReader

    place = LocalPlace(folder)
    return ShardsReader(place, part) if SHARDS in place else SafetensorsReader(place, [f"{part}.safetensors"])


def _load_moments(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's state: as the first step would make it, and then filled, unless nothing was saved of it."""
    from open_lm_linear import optim
    from open_lm_linear.parallel import put, put_rows

    reader = open_part(folder, "optimizer")
    optimizer.state.clear()
    if not reader.names():
        return
    optim.begin_states(optimizer)
    expected = dict(moments(model, optimizer))
    if odd := sorted(set(expected) ^ reader.names()):
        raise UserError(
            f"{folder}: the optimiser's {odd[0]!r} is only on one side; was it trained with other --train-params?"
        )
    for name, value in expected.items():
        if optim.is_eight_bit(value):
            put(value, reader.read(name))
        else:
            put_rows(value, _rows(reader, name))


def moments(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimiser's state by the names of the parameters: ``NAME.exp_avg``, ``NAME.step`` and so on."""
    import torch

    for name, param in model.named_parameters():
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}", value


def random_file(rank: int) -> str:
    return f"random-rank{rank:05d}.safetensors"


def random_states(ctx: Context) -> dict[str, torch.Tensor]:
    """torch's random states of this rank."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if ctx.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ctx.device)
    return states


def _load_random(folder: Path, ctx: Context, world_size: int) -> None:
    """This rank's random states; at another world size there are none that are this rank's own."""
    import torch
    from safetensors.torch import load_file

    path = folder / random_file(ctx.rank)
    if world_size != ctx.world_size or not path.exists():
        return
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and ctx.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], ctx.device)


# ---- what is whole -------------------------------------------------------------------------------------------------


def require_whole(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose every file is there at its recorded size.

    Raises:
        UserError: a file is missing or cut short; the sentence names it.
    """
    path = folder / "state.json"
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
    try:
        text = path.read_text() if path.exists() else ""
    except ValueError:  # not even text
        text = ""
    return require_files(text, sizes, str(folder))


def require_files(text: str, sizes: Mapping[str, int], folder: str) -> dict[str, Any]:
    """``require_whole`` of a folder that may be remote, from the text of its state.json and the sizes of its files."""
    try:
        record = json.loads(text)
        recorded = dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a whole checkpoint (no readable state.json): use an earlier one.") from error
    for name, size in recorded.items():
        if (found := sizes.get(name)) != size:
            has = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"{folder} is a half-written checkpoint: {name} {has} instead of {size} bytes; use an earlier one."
            )
    return record


def require_readable(folder: Path) -> dict[str, Any]:
    """``require_whole``, and every safetensors header and JSON file in it can be read too."""
    from open_lm_linear.pretrained.safetensors_files import read_header

    record = require_whole(folder)
    for name, size in record["files"].items():
        path = folder / name
        if name.endswith(".safetensors"):
            with path.open("rb") as file:
                read_header(file, size, str(path))
        elif name.endswith(".json"):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path} is not JSON ({error}): use an earlier checkpoint.") from error
    return record


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def latest(run: Path) -> Path:
    """The newest checkpoint folder of a run."""
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet.")
    return found[-1]


def latest_whole(run: Path) -> tuple[Path | None, str]:
    """The newest checkpoint of a run that is whole, and what is wrong with those passed over, in one sentence.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    reasons = []
    found = None
    for folder in reversed(checkpoints(run)):
        try:
            require_readable(folder)
        except (UserError, OSError) as error:
            reasons.append(str(error).rstrip("."))
            continue
        found = folder
        break
    if reasons and found is None:
        raise UserError(f"no checkpoint of {run} is whole: {'; '.join(reasons)}; move checkpoints/ away to start anew.")
    return found, f"warning: passed over: {'; '.join(reasons)}." if reasons else ""


# ---- folders that come and go at once ------------------------------------------------------------------------------


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is before it has its name, and after it has lost it."""
    return folder.with_name(f".{folder.name}.partial")


def remove_partial(run: Path) -> None:
    """Removes what a killed run left half written or half deleted."""
    for folder in (run / "checkpoints").glob(".step_*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(folders: list[Path]) -> None:
    """Deletes checkpoints, each at once: a half-deleted one no longer has the name of one."""
    for folder in folders:
        partial = folder.with_name(f".{folder.name}.old.partial")
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
        shutil.rmtree(partial)


def superseded(run: Path, step: int, keep_last: int, keep_every: int) -> list[Path]:
    """The checkpoints that may go once that of ``step`` is whole; those of later steps are never among them."""
    steps = {folder: int(folder.name.removeprefix("step_")) for folder in checkpoints(run)}
    older = [folder for folder, s in steps.items() if s <= step]
    surplus = older[:-keep_last] if keep_last else []
    return [folder for folder in surplus if not (keep_every and steps[folder] % keep_every == 0)]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, down to the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Brings a file, or the names in a folder, down to the disk."""
    with contextlib.suppress(OSError):  # some file systems know no fsync of a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
