"""GGUF files by rows: the header by our own parser, quantised blocks through the package gguf."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.readers import FileReader, Home, damaged

if TYPE_CHECKING:
    from open_lm_linear.pretrained.places import Place

Tensor = torch.Tensor


class GGUFReader(FileReader):
    """A GGUF file: float tensors as they are, quantised ones dequantised to float32, both by rows.

    ``fields`` are its metadata without the tokenizer's lists; ``fields["tokens"]`` is the number of its tokens. Rows
    of query and key weights come in the order of the file: llama.cpp puts the two of a rotary pair side by side.
    """

    def __init__(self, place: Place, file: str) -> None:
        super().__init__(place, [file])
        self.fields: dict[str, Any] = {}
        self._stored: dict[str, _Stored] = {}
        with place.open(file) as stream:
            try:
                self._parse(_Cursor(stream, place.size(file)), file)
            except UserError:
                raise
            except (ValueError, RecursionError, struct.error, OverflowError) as error:
                raise damaged(self.label, "GGUF", error) from error

    # gguf.GGUFReader keeps three arrays per token of the vocabulary: for Llama 3's, 12 seconds and 600 MB.
    def _parse(self, cursor: _Cursor, file: str) -> None:
        import gguf

        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise UserError(
                f"{self.label} is a GGUF file {'in big-endian byte order' if big else f'of version {version}'}, which "
                "cannot be read: convert it with a recent llama.cpp."
            )
        count, pairs = cursor.number("Q"), cursor.number("Q")
        for _ in range(pairs):
            key = cursor.string()
            kind = cursor.number("I")
            listed = kind == _ARRAY and key.startswith("tokenizer.")
            value = cursor.value(kind, skip=listed)
            if key == "tokenizer.ggml.tokens":
                self.fields["tokens"] = value
            elif not listed and self.fields.setdefault(key, value) is not value:
                raise ValueError(f"{key!r} stands in it twice")
        for _ in range(count):
            name = cursor.string()
            shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
            kind, begin = cursor.number("I"), cursor.number("Q")
            try:
                kind = gguf.GGMLQuantizationType(kind)
            except ValueError as error:
                raise UserError(
                    f"{self.label}: {name!r} has the unknown type {kind}; update the package gguf."
                ) from error
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if (shape[-1] if shape else 1) % block:
                raise ValueError(f"{name!r} of shape {shape} is not made of {kind.name} blocks of {block}")
            if name in self._homes:
                raise ValueError(f"{name!r} stands in it twice")
            self._homes[name] = Home(file, name, kind.name, shape)
            self._stored[name] = _Stored(kind, begin, math.prod(shape) // block * size)
        align = self.fields.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align & (align - 1):
            raise ValueError(f"general.alignment is {align!r}")
        data = end = cursor.at + -cursor.at % align
        for name, stored in sorted(self._stored.items(), key=lambda item: (item[1].begin, item[1].bytes)):
            stored.begin += data
            if stored.begin != end + -end % align:
                raise ValueError(f"{name!r} begins at byte {stored.begin}, and the data before it end at {end}")
            end = stored.begin + stored.bytes
            if end > cursor.size:
                raise ValueError(f"{name!r} ends at byte {end}, and the file at {cursor.size}")
        self._size = cursor.size

    def dtype(self, name: str) -> torch.dtype:
        import gguf
        import numpy as np

        kind = self._stored[name].kind
        if kind.name in _PLAIN:
            return _PLAIN[kind.name]
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.where(name)} is of type {kind.name}, which the package gguf cannot dequantise: convert the "
                "file to another type, such as Q8_0, with llama.cpp."
            ) from error
        return torch.float32

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        import gguf
        import numpy as np

        home, stored = self._homes[name], self._stored[name]
        plain = _PLAIN.get(stored.kind.name)
        if plain is None and len(home.shape) == 1 and end - begin < home.shape[0]:
            return self._read(name, 0, home.shape[0])[begin:end].clone()  # its rows are parts of blocks
        shape = (end - begin, *home.shape[1:]) if home.shape else ()
        rows = home.shape[0] if home.shape and home.shape[0] else 1
        first, count = (stored.bytes * n // rows for n in (begin, end - begin))
        path = self._local(home.file)
        # Read, not mapped, so that nothing of it stays in memory.
        raw = np.fromfile(path, np.uint8, count, offset=stored.begin + first)
        if len(raw) != count or path.stat().st_size != self._size:
            raise self._changed(name)
        self.bytes_read += len(raw)
        if not math.prod(shape):
            return torch.empty(shape, dtype=plain or torch.float32)
        if plain is not None:
            return torch.from_numpy(raw).view(plain).reshape(shape)
        values = gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), stored.kind)
        return torch.from_numpy(values).reshape(shape)


_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass
class _Stored:
    """A tensor of a GGUF file: its type (gguf.GGMLQuantizationType) and its bytes from the start of the file."""

    kind: Any
    begin: int
    bytes: int


class _Cursor:
    """The values at the front of a GGUF file, one after the other, read in large blocks and never beyond its end."""

    LIMIT = 256 << 20  # what a damaged length may make it read

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.at = stream, size, 0
        self._data = bytearray()

    def take(self, count: int) -> bytearray:
        self.skip(count)
        return self._data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        end = self.at + count
        if end > min(self.size, self.LIMIT):
            raise ValueError(f"its header runs to byte {end} or beyond, and the file has {self.size}")
        while len(self._data) < end:
            block = self.stream.read(max(4 << 20, end - len(self._data)))
            if not block:
                raise ValueError("it ends inside its header")
            self._data += block
        self.at = end

    def number(self, kind: str) -> Any:
        begin = self.at
        self.skip(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self._data, begin)[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int, skip: bool = False) -> Any:
        """A value of metadata; of a list that is skipped, its length."""
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a field has the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            data = self.take(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
            return count if skip else list(struct.unpack(f"<{count}{_NUMBERS[inner]}", data))
        if not skip:
            return [self.value(inner) for _ in range(count)]
        if inner == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"a list of the tokenizer has the type {inner}")
        return count
