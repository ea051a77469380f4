"""Where a checkpoint's files lie: on this machine, behind a URL or on the Hugging Face hub, behind one small class.

A remote file is read by ranges, so a header costs no more than itself; ``local`` fetches a file whole, once.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from open_lm_linear.cli import UserError

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


class Place(ABC):
    """The files of one folder, or one single file.

    ``name`` is the place as the user wrote it, for messages. ``single`` is the name of the one file where the user
    named a file, None for a folder.
    """

    name: str
    single: str | None = None

    @abstractmethod
    def files(self) -> dict[str, int]:
        """File name -> bytes: the folder's own files, without its subfolders."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """The file for reading and seeking. A remote one is read by ranges, and a failed read is a UserError."""

    @abstractmethod
    def local(self, name: str) -> Path:
        """The file on this machine; a remote one is fetched whole, once, into a cache."""

    def local_folder(self, names: Iterable[str]) -> Path:
        """A folder on this machine that holds these files under their names; it may hold others too."""
        paths = [self.local(name) for name in names]
        if not paths:
            raise UserError(f"{self.name} holds none of the files that were looked for there.")
        return paths[0].parent

    def parent(self) -> Place | None:
        """The folder above (of a single file: its folder), or None where there is none."""
        return None

    def __contains__(self, name: object) -> bool:
        return name in self.files()

    def size(self, name: str) -> int:
        """The file's size in bytes."""
        files = self.files()
        if name not in files:
            some = ", ".join(sorted(files)[:8]) + (", ..." if len(files) > 8 else "")
            raise UserError(f"{self.name} holds no {name}; its files are: {some or 'none'}.")
        return files[name]

    def text(self, name: str) -> str:
        """A small UTF-8 file as a string."""
        with self.open(name) as file:
            content = file.read()
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{name} of {self.name} is not a text file ({error}): copy or download it again.") from None

    def json(self, name: str) -> Any:
        """A small JSON file's value."""
        try:
            return json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise UserError(f"{name} of {self.name} is not JSON ({error}): copy or download it again.") from None


class LocalPlace(Place):
    """A folder or a file of this machine."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.folder = Path(path)
        if self.folder.is_file():
            self.single = self.folder.name
            self.folder = self.folder.parent

    def files(self) -> dict[str, int]:
        if self.single is not None:
            paths = [self.folder / self.single]
        else:
            try:
                paths = sorted(self.folder.iterdir())
            except OSError as error:
                raise UserError(
                    f"the folder {self.name} cannot be read ({error.strerror}): check the path and its permissions."
                ) from None
        return {path.name: path.stat().st_size for path in paths if path.is_file()}

    def open(self, name: str) -> BinaryIO:
        try:
            return self.local(name).open("rb")
        except OSError as error:
            raise UserError(f"cannot open {self.folder / name} ({error.strerror}): check its permissions.") from None

    def local(self, name: str) -> Path:
        self.size(name)
        return self.folder / name

    def local_folder(self, names: Iterable[str]) -> Path:
        for name in names:
            self.size(name)
        return self.folder

    def parent(self) -> Place | None:
        if self.single is not None:
            return LocalPlace(self.folder)
        folder = Path(os.path.abspath(self.folder))
        return None if folder.parent == folder else LocalPlace(folder.parent)


def find_place(source: str | Path) -> Place | None:
    """The place that ``source`` names: an existing path, else a URL, else a hub id (``owner/name[@revision]``).

    Nothing remote is asked here: a place that is not there raises a UserError when it is first used.
    """
    from open_lm_linear.pretrained.remote import HubPlace, RemotePlace

    name = os.fspath(source)
    if os.path.exists(name):
        return LocalPlace(name)
    if name.startswith("file://"):
        path = name.removeprefix("file://")
        return LocalPlace(path) if os.path.exists(path) else None
    if "://" in name:
        return RemotePlace(name)
    repo, at, revision = name.partition("@")
    if HUB_ID.fullmatch(repo) and bool(at) == bool(revision):
        return HubPlace(name)
    return None
