"""Copies of a run's checkpoints behind a URL, made in the background; found and fetched again where this disk is gone.

URL/NAME/config.yaml  samples.jsonl  metrics.jsonl  results.jsonl
URL/NAME/checkpoints/step_00000060/...              as in the run folder; state.json is written last
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_lm_linear import checkpoint
from open_lm_linear.cli import UserError

RUN_FILES = ("config.yaml", "samples.jsonl", "metrics.jsonl", "alignment.jsonl", "results.jsonl")


class RemoteCopy:
    """The remote folder of one run. Only rank 0 has one.

    An upload that fails is said and training goes on: the checkpoint is safe on this machine.
    """

    def __init__(self, url: str, run: Path, say: Callable[[str], None] = print) -> None:
        import fsspec

        try:
            self.fs, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"--remote-sync {url} cannot be opened ({error}): check the URL, and install what its protocol needs "
                "(`pip install open_lm_linear[remote]`)."
            ) from error
        self.run, self.say = run, say
        self.url, self.root = f"{url.rstrip('/')}/{run.name}", f"{path.rstrip('/')}/{run.name}"
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._waiting: set[Path] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # ---- there ---------------------------------------------------------------------------------------------------

    def put(self, folder: Path) -> set[Path]:
        """Takes a whole checkpoint into the queue; returns those that must stay until they are copied."""
        with self._lock:
            self._waiting.add(folder)
            self._queue.put(folder)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="remote copy", daemon=True)
                self._thread.start()
            return set(self._waiting)

    def close(self) -> None:
        """Waits until everything in the queue is copied."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (folder := self._queue.get()) is not None:
            try:
                self._upload(folder)
            except Exception as error:  # every protocol has its own kinds; none is worth the run
                self.say(f"warning: {folder} is not copied to {self.url} ({_reason(error)}); training goes on.")
            with self._lock:
                if folder not in self._queue.queue:
                    self._waiting.discard(folder)

    def _upload(self, folder: Path) -> None:
        target = f"{self.root}/checkpoints/{folder.name}"
        record = (folder / "state.json").read_bytes()
        sizes = json.loads(record)["files"]
        there = self._sizes(target)
        if any(there.get(name) != size for name, size in sizes.items()) and "state.json" in there:
            self.fs.rm_file(f"{target}/state.json")  # what is there now is not whole until it comes back
        self.fs.makedirs(target, exist_ok=True)
        for name in sizes:
            self.fs.put_file(str(folder / name), f"{target}/{name}")
        for name in RUN_FILES:
            if (self.run / name).exists():
                content = (self.run / name).read_bytes()
                self.fs.pipe_file(f"{self.root}/{name}", content[: content.rfind(b"\n") + 1])
        self.fs.pipe_file(f"{target}/state.json", record)

    # ---- and back ------------------------------------------------------------------------------------------------

    def latest_whole(self) -> str | None:
        """The name of the newest whole checkpoint there.

        Raises:
            UserError: the place cannot be listed.
        """
        try:
            self.fs.invalidate_cache()
            base = f"{self.root}/checkpoints"
            entries = self.fs.ls(base, detail=False) if self.fs.exists(base) else []
            names = sorted(e.rstrip("/").rpartition("/")[2] for e in entries)
            for name in reversed([n for n in names if n.startswith("step_")]):
                sizes = self._sizes(f"{base}/{name}")
                try:
                    text = self.fs.cat_file(f"{base}/{name}/state.json").decode() if "state.json" in sizes else ""
                    checkpoint.require_files(text, sizes, f"{self.url}/checkpoints/{name}")
                    return name
                except UserError as error:
                    self.say(f"warning: passed over: {error}")
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--remote-sync: {self.url} cannot be listed ({_reason(error)}): check it.") from error
        return None

    def fetch(self) -> Path | None:
        """Brings the newest whole checkpoint here, and the run's own files where they are not here; None: there is
        none."""
        name = self.latest_whole()
        if name is None:
            return None
        folder = self.run / "checkpoints" / name
        partial, source = checkpoint.partial_of(folder), f"{self.root}/checkpoints/{name}"
        self.say(f"fetching {self.url}/checkpoints/{name}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            record = self.fs.cat_file(f"{source}/state.json")
            for file in json.loads(record)["files"]:
                self.fs.get_file(f"{source}/{file}", str(partial / file))
                checkpoint.flush(partial / file)
            (partial / "state.json").write_bytes(record)
            for file in RUN_FILES:
                if not (self.run / file).exists() and self.fs.exists(f"{self.root}/{file}"):
                    (self.run / file).write_bytes(self.fs.cat_file(f"{self.root}/{file}"))
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{self.url}/checkpoints/{name} cannot be fetched ({_reason(error)}).") from error
        checkpoint.require_readable(partial)
        if folder.exists():  # a broken one: `--resume latest` looks here first
            checkpoint.remove([folder])
        partial.rename(folder)
        return folder

    def _sizes(self, folder: str) -> dict[str, int]:
        self.fs.invalidate_cache()
        entries: list[dict[str, Any]] = self.fs.ls(folder, detail=True) if self.fs.exists(folder) else []
        return {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
