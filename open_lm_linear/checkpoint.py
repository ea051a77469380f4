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
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    weights: dict[str, Any] = dcp.get_model_state_dict(model, options=options)
    moments: dict[str, Any] = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    folder = run / "checkpoints" / f"step_{state.step:08d}"
    if ctx.is_main:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, partial / "model.safetensors", {"format": "pt"})
        tensors = {k: v.contiguous() for k, v in moments.items() if k.startswith("state.")}
        save_file(tensors, partial / "optimizer.safetensors")
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
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import state_dict as dcp

    record = require_whole(folder)
    saved = json.loads((folder / "model.json").read_text())
    for key, value in model.config.to_json().items():
        if saved.get(key) != value:
            raise UserError(f"{folder}: the checkpoint has {key} = {saved.get(key)!r}, this run {value!r}.")
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    dcp.set_model_state_dict(model, weights, options=options)
    moments: dict[str, Any] = load_file(folder / "optimizer.safetensors")
    groups: dict[str, Any] = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    expected = {k for k in groups if k.startswith("state.")}
    if expected != set(moments):
        odd = sorted(expected ^ set(moments))[0]
        raise UserError(
            f"{folder}: the optimiser's {odd!r} is only on one side; was it trained with other --train-params?"
        )
    dcp.set_optimizer_state_dict(model, optimizer, {**groups, **moments}, options=options)
    return TrainState(**{f.name: record[f.name] for f in dataclasses.fields(TrainState)})


def require_whole(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose every file is there at its recorded size.

    Raises:
        UserError: a file is missing or cut short; the sentence names it.
    """
    try:
        record = json.loads((folder / "state.json").read_text())
        sizes = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a whole checkpoint (no readable state.json): use an earlier one.") from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
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
