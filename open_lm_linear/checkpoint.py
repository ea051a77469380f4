"""Checkpoints: one folder a checkpoint, there whole or not at all, safetensors and JSON only.

    RUN/checkpoints/step_00000060/
        model.safetensors  model.json            weights under OpenLM's keys, and the architecture
        optimizer.safetensors                    AdamW's moments, by parameter name
        state.json                               step, samples and tokens seen, and the size of every file above

``state.json`` is written last and the folder gets its name last, so that a killed run leaves nothing that looks whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch

    from open_lm_linear.model import Transformer
    from open_lm_linear.parallel import Context


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    resume: str = ""
    """latest: go on from the newest checkpoint of this run (or start it); or the path of a checkpoint folder."""
    save_frequency: int = 1
    """Save every this many epochs; the last epoch is always saved."""
    delete_previous_checkpoint: bool = False
    """Keep only the newest checkpoint."""


@dataclass
class TrainState:
    """Where a run stands. The data's whole state is ``samples``."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    run: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    ctx: Context,
    config: dict[str, Any],
) -> Path:
    """Writes a checkpoint of a model, sharded or not; every rank takes part, rank 0 writes."""
    from safetensors.torch import save_file

    weights = _gather(model.named_parameters(), ctx)
    moments = _gather(_moments(model, optimizer), ctx)
    folder = run / "checkpoints" / f"step_{state.step:08d}"
    if ctx.is_main:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "model.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
        sizes = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        record = {**dataclasses.asdict(state), "config": config, "files": sizes}
        (partial / "state.json").write_text(json.dumps(record, indent=2) + "\n")
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    ctx.barrier()
    return folder


def load(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> TrainState:
    """Puts a checkpoint into a model and its optimiser, sharded or not.

    Raises:
        UserError: a half-written checkpoint, or one of another architecture.
    """
    import torch
    from safetensors.torch import load_file

    from open_lm_linear.parallel import put

    record = require_whole(folder)
    saved = json.loads((folder / "model.json").read_text())
    for key, value in model.config.to_json().items():
        if saved.get(key) != value:
            raise UserError(f"{folder}: the checkpoint has {key} = {saved.get(key)!r}, this run {value!r}.")
    weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    for name, param in model.named_parameters():
        put(param, weights[name])
    for group in optimizer.param_groups:
        for param in group["params"]:  # as the first step would make it
            optimizer.state[param] = {"step": torch.zeros((), device=param.device)}
            optimizer.state[param] |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
    expected = dict(_moments(model, optimizer))
    if odd := sorted(set(expected) ^ set(moments)):
        raise UserError(
            f"{folder}: the optimiser's {odd[0]!r} is only on one side; was it trained with other --train-params?"
        )
    for name, moment in expected.items():
        put(moment, moments[name])
    return TrainState(**{f.name: record[f.name] for f in dataclasses.fields(TrainState)})


def _moments(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """AdamW's state by the names of the parameters: ``NAME.exp_avg``, ``NAME.exp_avg_sq``, ``NAME.step``."""
    for name, param in model.named_parameters():
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            yield f"{name}.{key}", value


def _gather(tensors: Iterable[tuple[str, torch.Tensor]], ctx: Context) -> dict[str, torch.Tensor]:
    """Whole copies on rank 0's CPU, one tensor at a time; nothing on the other ranks, which take part."""
    from open_lm_linear.parallel import whole

    gathered = {}
    for name, tensor in tensors:
        full = whole(tensor)
        if ctx.is_main:
            gathered[name] = full.detach().cpu().contiguous()
    return gathered


def require_whole(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose every file is there at its recorded size.

    Raises:
        UserError: a file is missing or cut short; the sentence names it.
    """
    path = folder / "state.json"
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
    return require_files(path.read_text() if path.exists() else "", sizes, str(folder))


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


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def latest(run: Path) -> Path:
    """The newest checkpoint folder of a run."""
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet.")
    return found[-1]


def remove(folders: list[Path]) -> None:
    """Deletes checkpoints, each at once: a half-deleted one no longer has the name of one."""
    for folder in folders:
        partial = folder.with_name(f".{folder.name}.partial")
        folder.rename(partial)
        shutil.rmtree(partial)


def _flush(folder: Path) -> None:
    """Puts the files on the disk before the folder gets its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
