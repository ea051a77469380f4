"""One sample's bytes <-> its token ids. Nothing is ever unpickled: an ``.npy`` header is parsed by hand."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from functools import lru_cache

import numpy as np

DATA_KEYS = ("npy", "json", "json.gz", "txt")
TEACHER_KEY = "teacher.npy"  # beside a sample: see teacher_logits
MEMBER_KEYS = (*DATA_KEYS, TEACHER_KEY)
MAGIC = b"\x93NUMPY"
HEADER = re.compile(r"\s*\{\s*'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *\}\s*")


class Malformed(ValueError):
    """The content is not token ids; the message says what it is instead."""


def encode_npy(tokens: np.ndarray, vocab_size: int) -> bytes:
    """Tokens (length,) as an ``.npy`` file: uint16 where the vocabulary fits into it, else uint32.

    Raises:
        Malformed: a token is not an integer in [0, vocab_size).
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise Malformed(f"{tokens.dtype} of shape {tokens.shape}, not one row of token ids")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise Malformed(f"token id {outside[0]}, outside the vocabulary of {vocab_size}")
    file = io.BytesIO()
    np.save(file, tokens.astype("<u2" if vocab_size <= 1 << 16 else "<u4"), allow_pickle=False)
    return file.getvalue()


def decode(content: bytes, data_key: str) -> np.ndarray:
    """The token ids of a sample, (length,) of an integer dtype; of ``.npy`` a view of ``content``, in its own dtype.

    Raises:
        Malformed: the content is not what the key says.
    """
    if data_key == "npy":
        return decode_npy(content)
    try:
        tokens = np.asarray(_listed(content, data_key))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise Malformed("not a list of token ids") from error
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind != "i"):
        raise Malformed("not a list of token ids")
    return tokens.astype(np.int64, copy=False)


def _listed(content: bytes, data_key: str) -> list[int]:
    if data_key == "txt":  # OpenLM writes a Python list here, which need not be JSON
        return [int(word) for word in content.decode().strip().strip("[]()").replace(",", " ").split()]
    return json.loads(gzip.decompress(content) if data_key == "json.gz" else content)


def decode_npy(content: bytes) -> np.ndarray:
    """The one row of integers in an ``.npy`` file, a read-only view of ``content``."""
    if content[:6] != MAGIC or len(content) < 12:
        raise Malformed("no .npy file")
    long = content[6] > 1  # version 1 has two bytes for the header's length, later ones four
    begin = 12 if long else 10
    data = begin + int.from_bytes(content[8:begin], "little")
    dtype, count = _header(content[begin:data])
    if len(content) - data != count * dtype.itemsize:
        raise Malformed(f"{len(content) - data} bytes where {count} values of {dtype} belong")
    return np.frombuffer(content, dtype, count, data)


@lru_cache(maxsize=64)  # the samples of a shard share theirs
def _header(text: bytes) -> tuple[np.dtype, int]:
    """(dtype, number of values) of an ``.npy`` header."""
    found = HEADER.fullmatch(text.decode("latin-1"))
    if not found:
        raise Malformed("an .npy file whose header is not that of one array of numbers")
    if "O" in found[1]:
        raise Malformed("Python objects, which are never unpickled")
    try:
        dtype = np.dtype(found[1])
    except TypeError:
        raise Malformed(f"values of the unknown type {found[1]!r}") from None
    if dtype.kind not in "iu":
        raise Malformed(f"{dtype} values, not integers")
    shape = [int(word) for word in found[3].replace(",", " ").split()]
    if len(shape) != 1:
        raise Malformed(f"an array of shape {tuple(shape)}, not one row")
    return dtype, shape[0]
