"""The tensors of a checkpoint whose ranks each wrote their own shards: whole again, by rows, whoever asks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from open_lm_linear.checkpoint import SHARDS
from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.readers import Reader, SafetensorsReader

if TYPE_CHECKING:
    from open_lm_linear.pretrained.places import Place


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: the file that holds it under the tensor's name, where it begins, and its extent."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class ShardsReader(Reader):
    """``part`` ("model" or "optimizer") of a checkpoint as its ``shards.json`` describes it.

    Raises:
        UserError: the index and the files disagree, or a tensor has a gap.
    """

    def __init__(self, place: Place, part: str = "model") -> None:
        self.label = f"{place.name.rstrip('/')}/{SHARDS}"
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[Piece]] = {}
        try:
            for name, entry in place.json(SHARDS)[part].items():
                self._shapes[name] = tuple(entry["shape"])
                pieces = [Piece(p["file"], tuple(p["offset"]), tuple(p["shape"])) for p in entry["pieces"]]
                self._pieces[name] = sorted(pieces, key=lambda p: p.offset)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.label} is not an index of shards: use an earlier checkpoint.") from error
        files = sorted({piece.file for pieces in self._pieces.values() for piece in pieces})
        self._files = {file: SafetensorsReader(place, [file]) for file in files}
        for name in self._pieces:
            self._check(name)

    def _check(self, name: str) -> None:
        whole, pieces = self._shapes[name], self._pieces[name]
        for piece in pieces:
            reader = self._files[piece.file]
            if name not in reader.names() or reader.shape(name) != piece.shape:
                raise UserError(f"{self.label}: {name!r} in {piece.file} is not what it says: use an earlier one.")
        fits = all(
            len(p.shape) == len(whole) and all(o + n <= w for o, n, w in zip(p.offset, p.shape, whole, strict=True))
            for p in pieces
        )
        if not fits or sum(math.prod(p.shape) for p in pieces) != math.prod(whole):
            raise UserError(
                f"{self.label}: the pieces of {name!r} do not make up its shape {whole}: use an earlier one."
            )

    def names(self) -> set[str]:
        return set(self._pieces)

    def where(self, name: str) -> str:
        return f"{self.label}: {name!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._files[self._pieces[name][0].file].dtype(name)

    def _read(self, name: str, begin: int, end: int) -> torch.Tensor:
        whole, pieces = self._shapes[name], self._pieces[name]
        if not whole:
            return self._count(pieces[0], name, 0, 1)
        out = torch.empty((end - begin, *whole[1:]), dtype=self.dtype(name))
        for piece in pieces:
            first = piece.offset[0]
            low, high = max(begin, first), min(end, first + piece.shape[0])
            if low < high:
                box = (slice(o, o + n) for o, n in zip(piece.offset[1:], piece.shape[1:], strict=True))
                at = (slice(low - begin, high - begin), *box)
                out[at] = self._count(piece, name, low - first, high - first)
        return out

    def _count(self, piece: Piece, name: str, begin: int, end: int) -> torch.Tensor:
        value = self._files[piece.file].read(name, begin, end)
        self.bytes_read += value.nbytes
        return value
