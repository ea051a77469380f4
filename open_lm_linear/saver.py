"""Writes checkpoints while training goes on: each rank its own shards, one checkpoint at a time.

`Saver.start` copies what this rank writes to the CPU and leaves the rest to a thread. Threads never talk to each other:
whether all are done is asked in the all-reduce of every step (`faults.agree`), and then rank 0 gives the folder its
name. A thread that failed stops every rank at that step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from open_lm_linear import checkpoint
from open_lm_linear.checkpoint import SHARDS, CheckpointConfig, TrainState
from open_lm_linear.cli import UserError
from open_lm_linear.optim import dequantised

if TYPE_CHECKING:
    from open_lm_linear.averaging import Averagers
    from open_lm_linear.model import Transformer
    from open_lm_linear.parallel import Context
    from open_lm_linear.remote_copy import RemoteCopy

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor, and is the one to write: a box that begins at ``offset``."""

    value: Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, rank: int) -> Piece | None:
        """A copy on the CPU; None where another rank writes the same, or there is nothing to write."""
        if not hasattr(tensor, "to_local"):
            return cls(_copy(tensor), (0,) * tensor.dim(), tuple(tensor.shape)) if rank == 0 else None
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        where = mesh.get_coordinate()
        if where is None or any(p.is_replicate() and at for p, at in zip(placements, where, strict=True)):
            return None
        local = tensor.to_local()
        if not local.numel():
            return None
        _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        return cls(_copy(local), tuple(offset), tuple(tensor.shape))


def _copy(tensor: Tensor) -> Tensor:
    return dequantised(tensor.detach()).to("cpu", copy=True).contiguous()


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether no rank holds everything."""
    return any(tuple(t.to_local().shape) != tuple(t.shape) for t in tensors if hasattr(t, "to_local"))


@dataclasses.dataclass
class Job:
    """One checkpoint on its way: what this rank writes and how far that is."""

    folder: Path
    state: TrainState
    sharded: bool
    pieces: dict[str, dict[str, Piece]]
    random: dict[str, Tensor]
    thread: threading.Thread | None = None
    writing: str = ""
    error: str = ""

    @property
    def partial(self) -> Path:
        return checkpoint.partial_of(self.folder)


class Saver:
    """The checkpoints of one run. Every method is called on every rank, at the same step.

    Args:
        config: the resolved flags, for the record.
        also_flush: files of the run that must be on the disk before a checkpoint that goes with them.
    """

    def __init__(
        self,
        run: Path,
        cfg: CheckpointConfig,
        ctx: Context,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        *,
        config: dict[str, Any],
        say: Callable[[str], None],
        remote: RemoteCopy | None = None,
        newest: Path | None = None,
        also_flush: Iterable[Path] = (),
        averagers: Averagers | None = None,
    ) -> None:
        self.averagers = averagers
        self.run, self.cfg, self.ctx, self.model, self.optimizer = run, cfg, ctx, model, optimizer
        self.config, self.say, self.remote, self.also_flush = config, say, remote, tuple(also_flush)
        self.newest = newest  # the last whole one, to go back to; resumed from or written
        self.job: Job | None = None
        self._saved_at = time.monotonic()

    # ---- asked and told once a step ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self.job is not None and self.job.thread is not None and self.job.thread.is_alive()

    @property
    def failed(self) -> bool:
        return self.job is not None and bool(self.job.error)

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint after update ``step``; by rank 0's clock."""
        by_steps = bool(self.cfg.save_every_steps) and step % self.cfg.save_every_steps == 0
        waited = (time.monotonic() - self._saved_at) / 60
        return by_steps or (self.ctx.is_main and 0 < self.cfg.save_every_minutes <= waited)

    def advance(self, busy: bool, failed: bool) -> None:
        """Brings the checkpoint in flight to its end where all ranks have written theirs.

        Args:
            busy, failed: what ``self.busy`` and ``self.failed`` are on any rank.

        Raises:
            UserError: some rank could not write.
        """
        if failed:
            self._give_up()
        if self.job is not None and not busy:
            job, self.job = self.job, None
            if self.ctx.is_main:
                self._finish(job)
            self.newest = job.folder

    def wait(self) -> None:
        """Until the last checkpoint has its name, seen by every rank."""
        from open_lm_linear.faults import agree

        if self.job is not None:
            if self.job.thread is not None:
                self.job.thread.join()
            self.advance(False, agree(self.ctx, failed=self.failed)["failed"])
        self.ctx.barrier()  # also where a step advanced it: rank 0 may be renaming still

    def close(self) -> None:
        """Waits for all that is in flight, the remote copies too."""
        self.wait()
        if self.remote is not None:
            self.remote.close()

    # ---- saving --------------------------------------------------------------------------------------------------

    def start(self, state: TrainState) -> None:
        """Begins a checkpoint of now. Waits for the one before.

        Where this step has one already (what came since were skipped steps), only its record is written anew.
        """
        self.wait()
        self._saved_at = time.monotonic()
        folder = checkpoint.folder_of(self.run, state.step)
        if self.newest == folder:
            self.amend(state)
            return
        job = self._collect(folder, state.copy())
        if self.ctx.is_main:
            try:
                shutil.rmtree(job.partial, ignore_errors=True)
                job.partial.mkdir(parents=True)
            except OSError as error:
                job.error = _sentence(job.partial, error)
        self.job = job
        self.ctx.barrier()  # the folder is there
        job.thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
        job.thread.start()

    def amend(self, state: TrainState) -> None:
        """Writes the position in the data anew into the newest checkpoint, if it is one of this run."""
        folder = self.newest
        self.ctx.barrier()  # every rank has read the old one
        if self.ctx.is_main and folder is not None and folder.parent == self.run / "checkpoints":
            for path in self.also_flush:
                checkpoint.flush(path)
            record = {**checkpoint.require_whole(folder), **dataclasses.asdict(state)}
            try:
                checkpoint.write_json(folder / "state.json", record)
            except OSError as error:
                raise UserError(_sentence(folder / "state.json", error)) from error
            if self.remote is not None:
                self.remote.put(folder)
        self.ctx.barrier()

    def _collect(self, folder: Path, state: TrainState) -> Job:
        """Copies on the CPU of all that this rank writes."""
        parts: dict[str, dict[str, Tensor]] = {
            "model": dict(self.model.named_parameters()),
            "optimizer": dict(checkpoint.moments(self.model, self.optimizer)),
        }
        if self.averagers is not None and self.averagers.averages:
            parts["averages"] = self.averagers.state()
        pieces: dict[str, dict[str, Piece]] = {}
        for part, tensors in parts.items():
            found = ((name, Piece.of(tensor, self.ctx.rank)) for name, tensor in tensors.items())
            pieces[part] = {name: piece for name, piece in found if piece is not None}
        return Job(folder, state, is_sharded(parts["model"].values()), pieces, checkpoint.random_states(self.ctx))

    def _write(self, job: Job) -> None:
        """What the thread does: this rank's files, and last a list of them for rank 0."""
        from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter

        rank, index, files = self.ctx.rank, {}, []
        if job.error:
            return
        try:
            for part, pieces in job.pieces.items():
                name = f"{part}-rank{rank:05d}.safetensors" if job.sharded else f"{part}.safetensors"
                if not job.sharded and rank != 0:
                    continue
                index[part] = {key: _entry(name, piece) for key, piece in pieces.items()}
                self._write_file(job, name, {key: piece.value for key, piece in pieces.items()}, SafetensorsWriter)
                files.append(name)
            name = checkpoint.random_file(rank)
            self._write_file(job, name, job.random, SafetensorsWriter)
            job.writing = f"rank{rank:05d}.json"
            sizes = {name: (job.partial / name).stat().st_size for name in [*files, name]}
            job.pieces, job.random = {}, {}
            checkpoint.write_json(job.partial / job.writing, {"files": sizes, "index": index})
        except Exception as error:  # raised by `advance`, in the thread that trains
            job.error = _sentence(job.partial / job.writing, error)

    @staticmethod
    def _write_file(job: Job, name: str, tensors: Mapping[str, Tensor], kind: Any) -> None:
        job.writing = name
        entries = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        with kind(job.partial / name, entries, {"format": "pt"}) as writer:
            for key, value in tensors.items():
                writer.write(key, value)
            writer.close()

    def _finish(self, job: Job) -> None:
        """On rank 0, when every rank has written: the index, the record, and the folder's name."""
        partial, folder = job.partial, job.folder
        try:
            sizes, index = self._gather(partial)
            if job.sharded:
                checkpoint.write_json(partial / SHARDS, {"world_size": self.ctx.world_size, **index})
                sizes[SHARDS] = (partial / SHARDS).stat().st_size
            checkpoint.write_json(partial / "model.json", self.model.config.to_json())
            sizes["model.json"] = (partial / "model.json").stat().st_size
            for path in self.also_flush:
                checkpoint.flush(path)
            record = {
                **dataclasses.asdict(job.state),
                "world_size": self.ctx.world_size,
                "config": self.config,
                "files": dict(sorted(sizes.items())),
            }
            checkpoint.write_json(partial / "state.json", record)
            checkpoint.flush(partial)
            if folder.exists():
                checkpoint.remove([folder])
            partial.rename(folder)
            checkpoint.flush(folder.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(_sentence(partial, error)) from error
        self.say(f"saved {folder}")
        waiting = self.remote.put(folder) if self.remote is not None else set()
        old = checkpoint.superseded(self.run, job.state.step, self.cfg.kept, self.cfg.keep_every)
        checkpoint.remove([f for f in old if f not in waiting])

    def _gather(self, partial: Path) -> tuple[dict[str, int], dict[str, Any]]:
        """The sizes of all files and the index over all ranks, from the lists that the ranks left."""
        sizes: dict[str, int] = {}
        index: dict[str, Any] = {}
        for rank in range(self.ctx.world_size):
            path = partial / f"rank{rank:05d}.json"
            try:
                listed = json.loads(path.read_text())
            except FileNotFoundError as error:
                raise UserError(
                    f"rank {rank} has written its shards and {path} is not there for rank 0: put --logs on a file "
                    "system that all nodes share."
                ) from error
            sizes |= listed["files"]
            for part, entries in listed["index"].items():
                held = index.setdefault(part, {})
                for name, entry in entries.items():
                    known = held.setdefault(name, {"shape": entry["shape"], "pieces": []})
                    known["pieces"].append(entry["piece"])
            path.unlink()
        return sizes, index

    def _give_up(self) -> None:
        """After a failure anywhere: nothing is left of the checkpoint, and every rank stops."""
        job, self.job = self.job, None
        assert job is not None
        if job.thread is not None:
            job.thread.join()
        self.ctx.barrier()
        if self.ctx.is_main:
            shutil.rmtree(job.partial, ignore_errors=True)
        self.ctx.barrier()
        kept = f"the last whole checkpoint is {self.newest}" if self.newest else "there is no whole checkpoint yet"
        why = job.error or f"another rank could not write its part of {job.folder}"
        raise UserError(f"{why}; {kept}: make room or mend the disk, and go on with --resume latest.")


def _entry(file: str, piece: Piece) -> dict[str, Any]:
    box = {"file": file, "offset": list(piece.offset), "shape": list(piece.value.shape)}
    return {"shape": list(piece.whole), "piece": box}


def _sentence(path: Path, error: BaseException) -> str:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else f"{error}"
    return f"cannot write {path} ({reason})"
