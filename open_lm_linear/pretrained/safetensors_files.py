"""The safetensors format by itself: a header without its tensors, a file written block by block, a file's SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from open_lm_linear.cli import UserError

Tensor = torch.Tensor

MAX_HEADER = 100_000_000  # the format's own limit
BLOCK = 8 << 20

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
# What the format knows and torch 2.6 does not, in bits.
_BITS = {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; ``begin`` and ``end`` are bytes from the start of the file.

    ``dtype`` is the format's own name where torch has no such dtype.
    """

    dtype: torch.dtype | str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BinaryIO, size: int, what: str) -> dict[str, Entry]:
    """The tensors of a safetensors file in the order of their data, from its first bytes alone.

    Args:
        file: at its start; only the header is read from it.
        size: bytes of the whole file.
        what: the file's name for errors.

    Raises:
        UserError: anything that the format does not allow, with the tensor's key where one is at fault.
    """

    def broken(reason: str) -> UserError:
        return UserError(f"{what} is not a whole safetensors file: {reason}; copy or download it again.")

    length = int.from_bytes(_read(file, 8), "little")
    if size < 8 or length > size - 8:
        raise broken(f"it has {size} bytes, and its header alone takes {8 + length}")
    if length > MAX_HEADER:
        raise broken(f"its header has {length} bytes, more than the format's {MAX_HEADER}")
    text = _read(file, length)
    if len(text) < length:
        raise broken("it ends inside its header")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for key, value in header.items():
        try:
            entries[key] = _entry(value, 8 + length)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise broken(f"its header gives {key!r} {reason}") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + length
    for key, entry in entries.items():
        if entry.begin != end:
            raise broken(f"{key!r} begins at byte {entry.begin}, and the data before it end at {end}")
        end = entry.end
    if end != size:
        raise broken(f"it has {size} bytes, and its header asks for {end}")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands in it twice")
        values[key] = value
    return values


def _entry(value: Any, data: int) -> Entry:
    """One entry of the header, checked by itself; the messages go on from "its header gives 'key' ..."."""
    if not isinstance(value, dict):
        raise TypeError("no dtype, shape and data_offsets")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(name, str) and (name in _TORCH or name in _BITS)):
        raise ValueError(f"the unknown dtype {name!r}")
    if not _sizes(shape):
        raise ValueError(f"the shape {shape!r}")
    if not (_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(f"the data_offsets {offsets!r}")
    dtype = _TORCH.get(name, name)
    bits = math.prod(shape) * (dtype.itemsize * 8 if isinstance(dtype, torch.dtype) else _BITS[name])
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{offsets[1] - offsets[0]} bytes, and {name} of shape {shape} takes {bits / 8:g}")
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _read(file: BinaryIO, count: int) -> bytes:
    """``count`` bytes, fewer only at the file's end: one read() of an unbuffered file may give less."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, each in blocks of rows, and never holds more than one block.

    Args:
        path: where to; an existing file is overwritten.
        tensors: name -> (dtype, shape) of everything to come, in the order in which it will come.
        metadata: the format's ``__metadata__``; transformers wants ``{"format": "pt"}`` there.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._entries: dict[str, Entry] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            if dtype not in _NAMES or name == "__metadata__":
                raise ValueError(f"{name!r} of dtype {dtype} cannot be written as safetensors")
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._entries[name] = Entry(dtype, tuple(shape), begin, end)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise ValueError(f"a header of {len(text)} bytes is more than the format's {MAX_HEADER}")
        self.path = Path(path)
        self._size, self._written = end, 0  # bytes of data, without the header
        self._hashes = {name: hashlib.sha256() for name in self._entries}
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, rows: Tensor) -> None:
        """Appends the next rows of ``name`` (n, *shape[1:]), or the whole of a scalar ().

        Raises:
            ValueError: another dtype or shape than announced, or not this tensor's turn.
        """
        entry = self._entries[name]
        if rows.dtype != entry.dtype or tuple(rows.shape[1:]) != entry.shape[1:] or rows.dim() != len(entry.shape):
            raise ValueError(f"{name!r} was announced as {entry.dtype} {entry.shape}: {rows.dtype} {tuple(rows.shape)}")
        # The tensors lie without a gap, so the place in the file alone says whether all before it is there.
        if not entry.begin <= self._written <= self._written + rows.nbytes <= entry.end:
            raise ValueError(f"{name!r} takes bytes {entry.begin} to {entry.end}: {rows.nbytes} at {self._written}")
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._file.write(data)
        self._hashes[name].update(data)
        self._written += rows.nbytes

    def close(self) -> dict[str, str]:
        """Brings the file to the disk; the SHA-256 of each tensor's bytes.

        Raises:
            ValueError: something announced was not written.
        """
        if self._written < self._size:
            name = next(k for k, e in self._entries.items() if e.end > self._written)
            raise ValueError(f"{self.path} is not complete: {name!r} was not written to its end")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Lets the file go; whether it is whole only ``close`` tells."""
        self._file.close()


def tensor_checksums(path: str | Path) -> dict[str, str]:
    """The SHA-256 of each tensor's bytes as the disk holds them: the file is dropped from the page cache first, where
    that goes."""
    path = Path(path)
    with path.open("rb") as file:
        entries = read_header(file, path.stat().st_size, str(path))
    digests = {}
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.fsync(file.fileno())  # only clean pages are dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        view = memoryview(bytearray(BLOCK))
        for name, entry in entries.items():
            digest, left = hashlib.sha256(), entry.end - entry.begin
            file.seek(entry.begin)
            while left and (count := file.readinto(view[:left])):
                digest.update(view[:count])
                left -= count
            digests[name] = digest.hexdigest()
    return digests
