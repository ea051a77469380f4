"""The folder of an unfinished preparation: settings, a journal of what is done, and the finished pieces.

A process may be killed at any moment. What it leaves is either whole, under its final name, or has a name that the next
run removes; the journal gains a line only after what the line says is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from open_lm_linear.cli import UserError

WORK = ".work"
FINISHED = ".work-finished"  # under this name the folder is only removed


class Journal:
    """Opens ``output/.work``, or goes on in it; one process at a time.

    Args:
        settings: everything that the output depends on, by flag. ``inputs`` is a list of (path, size, stamp).
        overwrite: begin anew where the unfinished preparation had other settings.

    Raises:
        UserError: another process is at work there, or an unfinished preparation had other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.output, self.folder, self.pieces_folder = output, output / WORK, output / WORK / "pieces"
        shutil.rmtree(output / FINISHED, ignore_errors=True)
        self.existed = self.folder.exists()
        self.pieces_folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(self.folder / "lock")
        self.pieces: dict[int, dict[str, Any]] = {}
        self.shards_begun = False
        try:
            self._open(json.loads(json.dumps(settings)), overwrite)
        except BaseException:
            self.lock.close()
            raise

    def _open(self, settings: dict[str, Any], overwrite: bool) -> None:
        path, self.lines = self.folder / "settings.json", self.folder / "journal.jsonl"
        self._read()
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if before != settings:
            if self.pieces and before is not None and not overwrite:
                raise UserError(
                    f"{self.folder} holds an unfinished preparation {_difference(before, settings)}: give the same "
                    "settings to go on, or --overwrite to begin anew."
                )
            self.pieces, self.shards_begun = {}, False
            self.lines.unlink(missing_ok=True)  # before the settings change, so that no piece is taken for another's
            shutil.rmtree(self.pieces_folder)
            self.pieces_folder.mkdir()
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            os.replace(unfinished, path)
        for left in [*self.pieces_folder.glob("*.tmp"), *self.output.glob("*/shard-*.tar.tmp")]:
            left.unlink()

    def _read(self) -> None:
        """Takes the whole lines in; a last line that was cut short is removed."""
        content = self.lines.read_bytes() if self.lines.exists() else b""
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            entry = json.loads(line)
            if "piece" in entry:
                self.pieces[entry["piece"]] = entry["counts"]
            self.shards_begun = self.shards_begun or entry.get("shards", False)
        if whole < len(content):
            os.truncate(self.lines, whole)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def piece_done(self, piece: int, counts: dict[str, Any]) -> None:
        self._append({"piece": piece, "counts": counts})
        self.pieces[piece] = counts

    def begin_shards(self) -> None:
        """From here on, shards in the output folder are this preparation's own."""
        self._append({"shards": True})
        self.shards_begun = True

    def remove(self) -> None:
        """Removes the folder, so that a process killed here leaves no half of it under its name."""
        os.replace(self.folder, self.output / FINISHED)
        shutil.rmtree(self.output / FINISHED)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.folder.exists() and not self.pieces:
            self.remove()
        self.lock.close()


def _lock(path: Path) -> Any:
    import fcntl

    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process is preparing data in {path.parent.parent}: wait for its end, or choose another --output."
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What the unfinished preparation had and this command has not."""
    if before.get("format") != now["format"]:
        return "by another version of this package"
    for name in now:
        if name != "inputs" and before.get(name) != now[name]:
            flag = "--" + name.replace("_", "-")
            return f"with {flag} {before.get(name)}, and this command has {flag} {now[name]}"
    known = {path: rest for path, *rest in before["inputs"]}
    for path, *rest in now["inputs"]:
        if path not in known:
            return f"of an --input without {path}"
        if known[path] != rest:
            return f"of {path}, which has changed since"
    gone = sorted(set(known) - {path for path, *_ in now["inputs"]})
    return f"of an --input that had {gone[0]}" if gone else "of the same --input in another order"
