"""One shard: a tar in webdataset's format, written once and read at random places. Nothing is ever unpickled."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from open_lm_linear.cli import UserError, nearest
from open_lm_linear.data.manifest import local

DATA_KEYS = ("json", "json.gz", "txt")


def write_shard(path: str | os.PathLike[str], sequences: Iterable[np.ndarray], first_key: int = 0) -> int:
    """Writes token sequences as samples ``00000123.json`` of a tar; returns how many.

    The same sequences give the same bytes, and the file appears under its name only when it is whole.

    Args:
        sequences: integer arrays (seq_len + 1,).
        first_key: the number that names the first sample.
    """
    path = os.fspath(path)
    unfinished = path + ".tmp"
    count = 0
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sequence in sequences:
            content = json.dumps(sequence.tolist(), separators=(",", ":")).encode()
            member = tarfile.TarInfo(f"{first_key + count:08d}.json")  # mtime, uid and gid stay 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            count += 1
    os.replace(unfinished, path)
    return count


class ShardIndex:
    """Random access to the samples of a local, uncompressed tar, after one scan of its headers.

    Reads with ``pread``, which moves no shared file offset: processes forked from this one can read too.

    Args:
        data_key: the samples' extension: json, json.gz or txt; ``auto`` takes the first of these that the shard has.
        expected: the number of samples that the manifest promises.

    Raises:
        UserError: the shard is missing, remote, no plain tar, empty, lacks the key or has another number of samples.
    """

    def __init__(self, path: str | os.PathLike[str], data_key: str = "auto", expected: int | None = None) -> None:
        self.path = local(path)
        self._file = _open(self.path)
        members = _scan(self.path, self._file)
        self.data_key = _choose_key(self.path, data_key, list(members))
        self.samples = members[self.data_key]
        if expected is not None and len(self.samples) != expected:
            raise UserError(
                f"shard {self.path} holds {len(self.samples)} samples and its manifest says {expected}: copy the shard "
                "again, or name the tars themselves in --train-data, which counts their samples."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, i: int) -> np.ndarray:
        """All tokens of sample ``i``, int64 (length,).

        Raises:
            UserError: the sample is corrupt.
        """
        _, offset, size = self.samples[i]
        content = os.pread(self._file.fileno(), size, offset)
        try:
            tokens = np.asarray(_decode(content, self.data_key))
        except (ValueError, EOFError, OSError, zlib.error) as error:
            raise self._corrupt(i) from error
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind != "i"):
            raise self._corrupt(i)
        return tokens.astype(np.int64, copy=False)

    def read_sequence(self, i: int, seq_len: int, vocab_size: int) -> np.ndarray:
        """The first seq_len + 1 tokens of sample ``i``, int64 (seq_len + 1,).

        Raises:
            UserError: the sample is corrupt or shorter, or one of these tokens is not in [0, vocab_size).
        """
        tokens = self.read(i)[: seq_len + 1]
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"{self._name(i)} has {len(tokens)} tokens, fewer than the {seq_len + 1} that length {seq_len} needs: "
                f"train with --seq-len {len(tokens) - 1} or less, or prepare longer sequences."
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{self._name(i)} has token id {low if low < 0 else high}, outside the model's vocabulary "
                f"of {vocab_size}: prepare the data with the model's own tokenizer."
            )
        return tokens

    def _name(self, i: int) -> str:
        return f"shard {self.path} sample {self.samples[i][0]}.{self.data_key}"

    def _corrupt(self, i: int) -> UserError:
        return UserError(f"{self._name(i)} is corrupt, not a list of token ids: copy or prepare this shard again.")


def _open(path: str) -> BinaryIO:
    try:
        file = open(path, "rb")  # noqa: SIM115 (the index keeps it open)
    except OSError as error:
        raise UserError(f"cannot open shard {path} ({error.strerror}): check the path, or copy it there.") from None
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise UserError(f"shard {path} is an empty file: copy or prepare it again.")
    return file


def _scan(path: str, file: BinaryIO) -> dict[str, list[tuple[str, int, int]]]:
    """Extension -> its (sample key, offset, size in bytes); names are split at the first dot, as webdataset does."""
    members: dict[str, list[tuple[str, int, int]]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = os.path.basename(member.name).partition(".")
                if member.isfile():
                    members.setdefault(extension, []).append((key, member.offset_data, member.size))
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")  # tarfile takes a broken header for the end
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"shard {path} is not a whole, uncompressed tar file ({error}): copy it again, or unpack its compression."
        ) from None
    if not members:
        raise UserError(f"shard {path} holds no samples: prepare it again, or take it out of the manifest.")
    return members


def _choose_key(path: str, data_key: str, present: list[str]) -> str:
    if data_key == "auto":
        found = [key for key in DATA_KEYS if key in present]
        if not found:
            raise UserError(f"shard {path} holds {', '.join(present)} files and no samples of {', '.join(DATA_KEYS)}.")
        return found[0]
    if data_key not in DATA_KEYS:
        raise UserError(f"--data-key {data_key} is not known; it is one of: {nearest(data_key, ('auto', *DATA_KEYS))}.")
    if data_key not in present:
        raise UserError(f"shard {path} holds no {data_key} samples but {', '.join(present)}: set --data-key to match.")
    return data_key


def _decode(content: bytes, data_key: str) -> list[int]:
    """Raises ValueError, EOFError, OSError or zlib.error where the content is not what the key says."""
    if data_key == "txt":  # OpenLM writes a Python list here, which need not be JSON
        return [int(word) for word in content.decode().strip().strip("[]()").replace(",", " ").split()]
    return json.loads(gzip.decompress(content) if data_key == "json.gz" else content)
