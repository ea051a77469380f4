"""Where a tar's samples lie, kept in a small file so that a restart scans no headers. It is a cache and may vanish.

The file is int64 (1 + samples, 3): a first row (FORMAT and the CRC of the others, the tar's bytes, its mtime in ns),
then one row a sample: number of its extension in MEMBER_KEYS, offset, bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from open_lm_linear.data.samples import MEMBER_KEYS

FORMAT = 2
SUFFIX = ".index.npy"


def load(path: str) -> dict[str, np.ndarray] | None:
    """Extension -> int64 (samples, 2), offset and bytes; None where nothing valid is kept for the tar as it is now."""
    for place in _places(path):
        with contextlib.suppress(OSError, ValueError, EOFError):
            members = _members(np.load(place, allow_pickle=False), path)
            if members:
                return members
    return None


def save(path: str, members: Mapping[str, np.ndarray]) -> None:
    """Keeps what a scan found, beside the tar or, where that folder is read-only, in the cache; else nowhere."""
    parts = [
        np.column_stack([np.full(len(members[key]), number), members[key]])
        for number, key in enumerate(MEMBER_KEYS)
        if key in members
    ]
    if not parts:
        return
    rows = np.concatenate(parts).astype(np.int64)
    table = np.concatenate([[_stamp(path, rows)], rows])
    for place in _places(path):
        unfinished = f"{place}.{uuid.uuid4().hex}.tmp"
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(unfinished, "wb") as file:
                np.save(file, table, allow_pickle=False)
            os.replace(unfinished, place)
            return
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


def forget(path: str) -> None:
    """Removes what is kept for a tar that was written anew."""
    for place in _places(path):
        with contextlib.suppress(OSError):
            os.unlink(place)


def _members(table: np.ndarray, path: str) -> dict[str, np.ndarray] | None:
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 3 or not len(table):
        return None
    if table[0].tolist() != _stamp(path, table[1:]):
        return None
    kinds, spans = table[1:, 0], table[1:, 1:]
    return {key: spans[kinds == number] for number, key in enumerate(MEMBER_KEYS) if (kinds == number).any()}


def _stamp(path: str, rows: np.ndarray) -> list[int]:
    found = os.stat(path)
    return [FORMAT << 32 | zlib.crc32(rows.tobytes()), found.st_size, found.st_mtime_ns]


def _places(path: str) -> Iterator[str]:
    """Beside the tar, then in the cache."""
    from open_lm_linear.cache import cache_folder

    path = os.path.abspath(path)
    yield path + SUFFIX
    name = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    yield str(cache_folder() / "indexes" / (name + SUFFIX))
