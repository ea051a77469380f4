"""The tensors of a checkpoint by name and by rows, from every format behind one class; no code of a file ever runs."""

from __future__ import annotations

import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.safetensors_files import Entry, read_header

if TYPE_CHECKING:
    from open_lm_linear.pretrained.places import Place

Tensor = torch.Tensor

WEIGHTS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class Reader(ABC):
    """The tensors of one checkpoint by name, read by rows.

    ``label`` names the checkpoint's files in errors, ``bytes_read`` counts what was read of tensors as stored, so that
    a test can prove that a rank reads only its share.
    """

    label: str
    bytes_read: int = 0

    @abstractmethod
    def names(self) -> set[str]: ...

    @abstractmethod
    def where(self, name: str) -> str:
        """The tensor's file and key, for errors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """What ``read`` returns: the stored dtype, float32 where it is quantised.

        Raises:
            UserError: integers, float8 and others that are no plain weights.
        """

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows [begin, end) along dim 0 on the CPU, contiguous: (end - begin, *shape[1:]), or () of a scalar.

        Raises:
            UserError: the file is damaged or was changed, or the tensor is no plain weight.
        """
        self.dtype(name)
        shape = self.shape(name)
        rows = shape[0] if shape else 1
        end = rows if end is None else end
        if not 0 <= begin <= end <= rows or (not shape and begin == end):
            raise IndexError(f"{self.where(name)} has {rows} rows, and rows {begin} to {end} are asked for")
        return self._read(name, begin, end)

    @abstractmethod
    def _read(self, name: str, begin: int, end: int) -> Tensor:
        """``read`` within the bounds; adds to ``bytes_read``."""


def label_of(place: Place, file: str) -> str:
    return place.name if place.single == file else f"{place.name.rstrip('/')}/{file}"


def _plain(dtype: torch.dtype | str, where: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in WEIGHTS:
        return dtype
    kind = str(dtype).removeprefix("torch.")
    raise UserError(
        f"{where} has dtype {kind}, which is no plain weight: quantised checkpoints must be dequantised first."
    )


def damaged(what: str, kind: str, reason: object) -> UserError:
    return UserError(f"{what} is not a whole {kind} file ({reason}); copy or download it again.")


class ModelReader(Reader):
    """The parameters of a model in memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.label = "the model"
        self._parameters = dict(model.named_parameters())

    def names(self) -> set[str]:
        return set(self._parameters)

    def where(self, name: str) -> str:
        return f"{self.label}: {name!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return _plain(self._parameters[name].dtype, self.where(name))

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        value = self._parameters[name].detach()
        return (value[begin:end] if value.dim() else value).cpu().contiguous()


@dataclass(frozen=True)
class Home:
    """Where a tensor lies: its file, its key there, and what the file said of it."""

    file: str
    key: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]


class FileReader(Reader):
    """What the formats share: one or several files of a place, each tensor at home in one of them."""

    def __init__(self, place: Place, files: Sequence[str]) -> None:
        self.place = place
        self.label = ", ".join(label_of(place, file) for file in files)
        self._homes: dict[str, Home] = {}
        self._paths: dict[str, Path] = {}

    def names(self) -> set[str]:
        return set(self._homes)

    def where(self, name: str) -> str:
        home = self._homes[name]
        return f"{label_of(self.place, home.file)}: {home.key!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._homes[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _plain(self._homes[name].dtype, self.where(name))

    def _claim(self, name: str, home: Home) -> None:
        if name in self._homes:
            raise UserError(
                f"{label_of(self.place, home.file)}: {home.key!r} is the tensor {name!r}, which is also "
                f"{self.where(name)}; keep one of the two."
            )
        self._homes[name] = home

    def _local(self, file: str) -> Path:
        """The file on this machine; asked for once, since a remote place then looks whether it changed."""
        if file not in self._paths:
            self._paths[file] = self.place.local(file)
        return self._paths[file]

    def _changed(self, name: str) -> UserError:
        return UserError(f"{self.where(name)} is no longer what it was when the file was opened; start again.")


class SafetensorsReader(FileReader):
    """One or several safetensors files; ``prefix`` is cut from the front of the names.

    Only the headers are read here. A file is opened and mapped for each tensor and let go with it, so a process that
    streams a large file stays small.
    """

    def __init__(self, place: Place, files: Sequence[str], prefix: str = "") -> None:
        super().__init__(place, files)
        self._headers: dict[str, dict[str, Entry]] = {}
        for file in files:
            self._headers[file] = self._header(place.open(file), place.size(file), file)
            for key, entry in self._headers[file].items():
                self._claim(key.removeprefix(prefix), Home(file, key, entry.dtype, entry.shape))

    def _header(self, stream: BinaryIO, size: int, file: str) -> dict[str, Entry]:
        with stream:
            return read_header(stream, size, label_of(self.place, file))

    def _local(self, file: str) -> Path:
        """The file on this machine, once compared with the header that was read of it before."""
        known = file in self._paths
        path = super()._local(file)
        if not known and self._header(path.open("rb"), path.stat().st_size, file) != self._headers[file]:
            del self._paths[file]
            raise UserError(f"{label_of(self.place, file)} is no longer what it was when it was opened; start again.")
        return path

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        home = self._homes[name]
        try:
            with safe_open(self._local(home.file), framework="pt") as opened:
                if home.shape:
                    part = opened.get_slice(home.key)
                    whole, value = tuple(part.get_shape()), part[begin:end]
                else:
                    value = opened.get_tensor(home.key)
                    whole = tuple(value.shape)
        except (SafetensorError, OSError) as error:
            raise damaged(label_of(self.place, home.file), "safetensors", error) from error
        if whole != home.shape or value.dtype != home.dtype:
            raise self._changed(name)
        self.bytes_read += value.nbytes
        return value


class TorchReader(FileReader):
    """Files of torch.save (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) with a state dict, bare or under ``state_dict``
    or ``model``; read with torch's weights-only loader, which runs no code of the file.

    ``strip`` are what wrappers put before names: they are taken off the front as often as they stand there, and
    torch.compile's ``_orig_mod.`` inside names too; then ``prefix`` is cut from the front. ``extra`` are the plain
    values beside the state dict, such as the epoch.

    A zip file, torch's format since 1.6, is mapped, and mapped anew after every ``window`` bytes, so that what was read
    does not stay in memory; its checksums are compared before the first tensor of it is read. An older file has no
    checksums and is held in memory whole.
    """

    window = 128 << 20

    def __init__(
        self, place: Place, files: Sequence[str], prefix: str = "", strip: Sequence[str] = ("module.", "_orig_mod.")
    ) -> None:
        super().__init__(place, files)
        self.extra: dict[str, Any] = {}
        self._held: dict[str, dict[str, Any]] = {}  # the state dicts of older files
        self._mapped: tuple[str, dict[str, Any]] | None = None
        self._since = 0  # bytes read since that was mapped
        self._checked: set[str] = set()
        for file in files:
            what = label_of(place, file)
            place.size(file)  # a sentence where it is not there
            path = self._local(file)
            zipped = _is_zip(path)
            if zipped:
                _check_zip(path, what, data=False)
            state, extra = _unwrap(_load(path, what), what)
            self.extra.update(extra)
            for key, value in state.items():
                if not isinstance(key, str) or type(value) not in (Tensor, torch.nn.Parameter):
                    raise UserError(
                        f"{what}: {key!r} is of type {type(value).__name__}, and a state dict holds tensors by name: "
                        "save the model's state_dict() alone, or under the key 'state_dict'."
                    )
                plain = value.layout is torch.strided and value.device.type == "cpu"
                dtype = value.dtype if plain else f"{value.dtype} ({value.layout}, on {value.device})"
                name = _stripped(key, strip).removeprefix(prefix)
                self._claim(name, Home(file, key, dtype, tuple(value.shape)))
            if not zipped:
                self._held[file] = state

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        home = self._homes[name]
        value = self._state(home.file).get(home.key)
        if value is None or tuple(value.shape) != home.shape or value.dtype != home.dtype:
            raise self._changed(name)
        part = value.detach()[begin:end] if home.shape else value.detach()
        # A copy: the mapping goes with the window, and a change in place would come back with the next read.
        part = part.clone(memory_format=torch.contiguous_format)
        self.bytes_read += part.nbytes
        self._since += part.nbytes
        return part

    def _state(self, file: str) -> dict[str, Any]:
        if file in self._held:
            return self._held[file]
        if self._mapped is None or self._mapped[0] != file or self._since >= self.window:
            path, what = self._local(file), label_of(self.place, file)
            if file not in self._checked:
                if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine
                    _check_zip(path, what, data=True)
                self._checked.add(file)
            self._mapped = None  # lets the old mapping go first
            self._mapped, self._since = (file, _unwrap(_load(path, what), what)[0]), 0
        return self._mapped[1]


def _is_zip(path: Path) -> bool:
    """Whether torch will take the file for a zip: by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_zip(path: Path, what: str, data: bool) -> None:
    """Compares the CRC-32 of the zip's members: those of tensors' data, or all others (a few kB)."""
    name = "its directory"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch.serialization.set_crc32_options(False) writes zeros.
            written = any(member.CRC for member in members)
            for member in members:
                name = member.filename
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("is compressed, which torch never does")
                if written and data == ("/data/" in name):
                    with archive.open(member) as file:
                        while file.read(1 << 20):
                            pass
    except Exception as error:  # zipfile has a dozen kinds for a damaged file
        raise damaged(what, "torch", f"{name}: {error}") from error


def _load(path: Path, what: str) -> Any:
    zipped = _is_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of a damaged file nearly anything can come
        # torch wraps the reason into advice to switch the check off.
        reason = str(error.__context__ or error).strip().partition("\n")[0]
        asked = re.search(r"GLOBAL (\S+)", reason)
        with path.open("rb") as file:
            is_pickle = zipped or file.read(1) == b"\x80"
        if type(error).__name__ == "UnpicklingError" and (asked or is_pickle):
            reason = f"it names {asked[1]}" if asked else reason.rstrip(".")
        elif isinstance(error, RuntimeError) and "TorchScript" in str(error):
            reason = "it is TorchScript"
        else:
            raise damaged(what, "torch", reason or type(error).__name__) from error
        raise UserError(
            f"{what} is a pickle that asks to run code ({reason}), which is never done here: convert it to "
            "safetensors where you trust it."
        ) from error


def _unwrap(loaded: Any, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict of what torch.load gave, and the plain values beside it."""
    if isinstance(loaded, dict):
        for outer in ("state_dict", "model"):
            inner = loaded.get(outer)
            if isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values()):
                return inner, {k: v for k, v in loaded.items() if k != outer and not _has_tensors(v)}
        if loaded:
            return loaded, {}
    kind = "nothing" if isinstance(loaded, dict) else f"one {type(loaded).__name__}"
    raise UserError(f"{what} holds {kind} and no tensors by name: save the model's state_dict().")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple, set)) and any(_has_tensors(part) for part in value)
    )


def _stripped(name: str, strip: Sequence[str]) -> str:
    while found := next((s for s in strip if s and name.startswith(s)), None):
        name = name[len(found) :]
    return re.sub(r"\.(_orig_mod\.)+", ".", name) if "_orig_mod." in strip else name


class ModelParallelReader(Reader):
    """Meta's ``consolidated.00.pth``, ``.01.pth`` and so on: each part holds a slice of every matrix of Llama 1 to 3.

    Args:
        parts: one reader per file, in the order of their numbers.
        embedding_dim: the model's hidden size. It tells whether the embedding is cut by tokens (Llama 3) or by
            dimensions (Llama 1 and 2).
    """

    def __init__(self, parts: Sequence[Reader], embedding_dim: int) -> None:
        self.parts = list(parts)
        self.label = ", ".join(part.label for part in parts)
        self._dims: dict[str, int | None] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        first = self.parts[0]
        for part in self.parts[1:]:
            for name in sorted(first.names() ^ part.names()):
                has, lacks = (first, part) if name in first.names() else (part, first)
                raise UserError(f"{has.where(name)} is missing from {lacks.label}: they are not of one checkpoint.")
        for name in sorted(first.names()):
            shapes = [part.shape(name) for part in self.parts]
            dim = self._dims[name] = self._cut(name, shapes[0], embedding_dim)
            for part, shape in zip(self.parts, shapes, strict=True):
                fits = len(shape) == len(shapes[0]) and all(
                    a == b for i, (a, b) in enumerate(zip(shape, shapes[0], strict=True)) if i != dim
                )
                if not fits:
                    raise UserError(
                        f"{part.where(name)} has shape {shape}, and {first.where(name)} has {shapes[0]}: they are not "
                        "of one checkpoint."
                    )
            total = list(shapes[0])
            if dim is not None:
                total[dim] = sum(shape[dim] for shape in shapes)
            self._shapes[name] = tuple(total)

    def _cut(self, name: str, shape: tuple[int, ...], embedding_dim: int) -> int | None:
        """The dimension along which the parts are slices of ``name``; None: each holds it whole."""
        if len(shape) < 2:
            return None
        if len(self.parts) == 1:
            return 0
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind == "tok_embeddings":
            if shape[1] == embedding_dim:
                return 0
            if shape[1] * len(self.parts) == embedding_dim:
                return 1
        elif kind in ("wq", "wk", "wv", "w1", "w3", "output"):
            return 0
        elif kind in ("wo", "w2"):
            return 1
        raise UserError(
            f"{self.parts[0].where(name)} has shape {shape}, and how a Llama of hidden size {embedding_dim} in "
            f"{len(self.parts)} parts is cut there is not known: convert the checkpoint to safetensors."
        )

    def names(self) -> set[str]:
        return self.parts[0].names()

    def where(self, name: str) -> str:
        return self.parts[0].where(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        first = self.parts[0]
        for part in self.parts[1:]:
            if part.dtype(name) != first.dtype(name):
                raise UserError(f"{part.where(name)} has another dtype than {first.where(name)}.")
        return first.dtype(name)

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        dim = self._dims[name]
        if dim == 0:
            value = self._read_rows(name, begin, end)
        elif dim == 1:
            value = torch.cat([part.read(name, begin, end) for part in self.parts], 1)
        else:
            value = self.parts[0].read(name, begin, end)
            for part in self.parts[1:]:
                if not torch.equal(part.read(name, begin, end), value):
                    raise UserError(
                        f"{part.where(name)} differs from {self.where(name)}: they are not of one checkpoint."
                    )
        self.bytes_read = sum(part.bytes_read for part in self.parts)
        return value

    def _read_rows(self, name: str, begin: int, end: int) -> Tensor:
        found, at = [], 0
        for part in self.parts:
            rows = part.shape(name)[0]
            low, high = max(begin - at, 0), min(end - at, rows)
            if low < high:
                found.append(part.read(name, low, high))
            at += rows
        if not found:
            return self.parts[0].read(name, 0, 0)
        return found[0] if len(found) == 1 else torch.cat(found)
