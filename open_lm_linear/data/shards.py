"""One shard: a tar in webdataset's format, written once and read at random places. Nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from open_lm_linear.cli import UserError, nearest
from open_lm_linear.data import offsets, remote
from open_lm_linear.data.manifest import local
from open_lm_linear.data.samples import DATA_KEYS, TEACHER_KEY, Malformed, decode, decode_npy, encode_npy

Members = dict[str, np.ndarray]

_open_indices: weakref.WeakSet[ShardIndex] = weakref.WeakSet()  # whose files the cache of remote shards must keep
_open_lock = threading.Lock()


def write_shard(
    path: str | os.PathLike[str],
    sequences: Iterable[np.ndarray],
    first_key: int = 0,
    vocab_size: int | None = None,
) -> int:
    """Writes token sequences as samples ``00000123.json`` or ``00000123.npy`` of a tar; returns how many.

    The same sequences give the same bytes, and the file appears under its name only when it is whole.

    Args:
        sequences: integer arrays (seq_len + 1,).
        first_key: the number that names the first sample.
        vocab_size: writes ``.npy``, uint16 up to 65,536 tokens and uint32 beyond. None writes ``.json``.

    Raises:
        UserError: a token is outside the vocabulary.
    """
    path = os.fspath(path)
    extension = "json" if vocab_size is None else "npy"

    def members() -> Iterator[tuple[str, bytes]]:
        for number, sequence in enumerate(sequences, first_key):
            name = f"{number:08d}.{extension}"
            try:
                yield name, _json(sequence) if vocab_size is None else encode_npy(sequence, vocab_size)
            except Malformed as error:
                raise UserError(f"sample {name} for {path} is {error}: use the model's tokenizer.") from None

    return write_members(path, members())


def write_members(path: str | os.PathLike[str], members: Iterable[tuple[str, bytes]]) -> int:
    """Writes files, name and content, into a tar that appears under its name only when it is whole; returns how many.

    The same files give the same bytes.
    """
    path = os.fspath(path)
    unfinished = path + ".tmp"
    count = 0
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)  # mtime, uid and gid stay 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            count += 1
    os.replace(unfinished, path)
    offsets.forget(path)
    return count


def _json(sequence: np.ndarray) -> bytes:
    return json.dumps(sequence.tolist(), separators=(",", ":")).encode()


class ShardIndex:
    """Random access to the samples of an uncompressed tar, local or fetched whole into the cache of remote shards.

    Its headers are scanned once; where the samples lie is then kept in a small file (see offsets). Reads with
    ``pread``, which moves no shared file offset: processes forked from this one can read too.

    Args:
        path: a local path or a URL.
        data_key: the samples' extension: npy, json, json.gz or txt; ``auto`` takes the first of these that the shard
            has.
        expected: the number of samples that the manifest promises.
        cache_gb: what the cache of remote shards may hold.

    Raises:
        UserError: the shard is missing, no plain tar, empty, lacks the key or has another number of samples.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        data_key: str = "auto",
        expected: int | None = None,
        cache_gb: float = remote.CACHE_GB,
    ) -> None:
        self.name = local(path, remote=True)
        self.path, self._file = self._opened(cache_gb)
        members = offsets.load(self.path)
        if members is None:
            members = _scan(self.name, self._file)
            offsets.save(self.path, members)
        self.data_key = _choose_key(self.name, data_key, list(members))
        self.spans = members[self.data_key]
        self.teacher_spans = members.get(TEACHER_KEY)
        if expected is not None and len(self) != expected:
            raise UserError(
                f"shard {self.name} holds {len(self)} samples and its manifest says {expected}: copy the shard "
                "again, or name the tars themselves in --train-data, which counts their samples."
            )

    def _opened(self, cache_gb: float) -> tuple[str, BinaryIO]:
        if not remote.is_remote(self.name):
            return self.name, _open(self.name, self.name)
        for _ in range(3):  # another process may make room between the fetch and the opening
            path = str(remote.fetch(self.name, cache_gb, keep=open_paths))
            with _open_lock:
                self.path = path
                _open_indices.add(self)
            try:
                return path, _open(path, self.name)
            except UserError:
                if os.path.exists(path):
                    raise
        raise UserError(f"shard {self.name} is removed from the cache as soon as it is there: raise --data-cache-gb.")

    def __len__(self) -> int:
        return len(self.spans)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, i: int) -> np.ndarray:
        """All tokens of sample ``i``, int64 (length,).

        Raises:
            UserError: the sample is corrupt.
        """
        return self._stored(i).astype(np.int64, copy=False)

    def _stored(self, i: int) -> np.ndarray:
        """All tokens of sample ``i`` in the dtype that they are stored in."""
        try:
            return decode(self.content(i), self.data_key)
        except Malformed as error:
            raise UserError(f"{self._name(i)} is corrupt, {error}: copy or prepare this shard again.") from error

    def content(self, i: int) -> bytes:
        """The bytes of sample ``i``."""
        offset, size = self.spans[i].tolist()
        return os.pread(self._file.fileno(), size, offset)

    @property
    def taught(self) -> bool:
        """Whether a teacher's logits lie beside every sample."""
        return self.teacher_spans is not None and len(self.teacher_spans) == len(self)

    def read_teacher(self, i: int, count: int) -> np.ndarray:
        """The first ``count`` words of what a teacher said of sample ``i``: uint16 (count,), see teacher_logits.

        Raises:
            UserError: the shard has none, or they are corrupt or fewer.
        """
        if self.teacher_spans is None or not self.taught:
            raise UserError(f"shard {self.name} holds no teacher's logits beside its samples: see data.teach.")
        offset, size = self.teacher_spans[i].tolist()
        try:
            words = decode_npy(os.pread(self._file.fileno(), size, offset))[:count]
            if words.dtype != np.uint16 or len(words) < count:
                raise Malformed(f"{len(words)} values of {words.dtype} where {count} of uint16 belong")
        except Malformed as error:
            name = f"shard {self.name} sample {self.key(i)}.{TEACHER_KEY}"
            raise UserError(f"{name} is corrupt, {error}: copy or teach this shard again.") from error
        return words

    def read_sequence(self, i: int, seq_len: int, vocab_size: int) -> np.ndarray:
        """The first seq_len + 1 tokens of sample ``i``, (seq_len + 1,) of the integer dtype that they are stored in.

        Raises:
            UserError: the sample is corrupt or shorter, or one of these tokens is not in [0, vocab_size).
        """
        tokens = self._stored(i)[: seq_len + 1]
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"{self._name(i)} has {len(tokens)} tokens, fewer than the {seq_len + 1} that length {seq_len} needs: "
                f"train with --seq-len {len(tokens) - 1} or less, or prepare longer sequences."
            )
        unsigned = tokens.dtype.kind == "u"
        if unsigned and vocab_size >> 8 * tokens.itemsize:  # every value of the dtype is a token
            return tokens
        low, high = 0 if unsigned else int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{self._name(i)} has token id {low if low < 0 else high}, outside the model's vocabulary "
                f"of {vocab_size}: prepare the data with the model's own tokenizer."
            )
        return tokens

    def key(self, i: int) -> str:
        """The name of sample ``i`` without its extension, from the tar's header."""
        header = os.pread(self._file.fileno(), 100, int(self.spans[i, 0]) - tarfile.BLOCKSIZE)
        return os.path.basename(header.split(b"\0")[0].decode(errors="replace")).partition(".")[0]

    def _name(self, i: int) -> str:
        return f"shard {self.name} sample {self.key(i)}.{self.data_key}"


def open_paths() -> set[str]:
    """The cached files of remote shards that this process has open."""
    with _open_lock:
        return {index.path for index in _open_indices}


def _open(path: str, name: str) -> BinaryIO:
    try:
        file = open(path, "rb")  # noqa: SIM115 (the index keeps it open)
    except OSError as error:
        raise UserError(f"cannot open shard {name} ({error.strerror}): check the path, or copy it there.") from None
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise UserError(f"shard {name} is an empty file: copy or prepare it again.")
    return file


def _scan(name: str, file: BinaryIO) -> Members:
    """Extension -> int64 (samples, 2), offset and bytes; names are split at the first dot, as webdataset does."""
    members: dict[str, list[tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                extension = os.path.basename(member.name).partition(".")[2]
                if member.isfile():
                    members.setdefault(extension, []).append((member.offset_data, member.size))
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")  # tarfile takes a broken header for the end
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"shard {name} is not a whole, uncompressed tar file ({error}): copy it again, or unpack its compression."
        ) from None
    if not members:
        raise UserError(f"shard {name} holds no samples: prepare it again, or take it out of the manifest.")
    return {extension: np.array(spans, dtype=np.int64) for extension, spans in members.items()}


def _choose_key(name: str, data_key: str, present: list[str]) -> str:
    if data_key == "auto":
        found = [key for key in DATA_KEYS if key in present]
        if not found:
            raise UserError(f"shard {name} holds {', '.join(present)} files and no samples of {', '.join(DATA_KEYS)}.")
        return found[0]
    if data_key not in DATA_KEYS:
        raise UserError(f"--data-key {data_key} is not known; it is one of: {nearest(data_key, ('auto', *DATA_KEYS))}.")
    if data_key not in present:
        raise UserError(f"shard {name} holds no {data_key} samples but {', '.join(present)}: set --data-key to match.")
    return data_key
