"""What ``prepare`` reads: files behind paths, globs and braces, cut into pieces of work, and the documents of a piece.

Formats: text (a file is one document), JSON lines, parquet, plain or compressed, local or behind any url that fsspec
reads; and data sets of the Hugging Face hub, streamed.
"""

from __future__ import annotations

import functools
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm_linear.cli import UserError

TEXT = (".txt", ".md", ".rst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
COMPRESSIONS = (".gz", ".xz", ".zst")
HUB = "hf://datasets/"
PIECES = 512  # a corpus is cut into about as many, within these bounds of bytes of text
SMALLEST_PIECE, LARGEST_PIECE = 2**20, 2**28
EXPANSION = 4  # bytes of text per byte of a compressed file, to guess the work in it
ROWS = 1024  # of a parquet file, in memory at once


@dataclass(frozen=True)
class Input:
    """A file, or a data set of the hub, as it was found."""

    path: str
    size: int
    stamp: str = ""  # changes when the file does
    cuts: int = 0  # parts into which it must be cut; 0 leaves it to ``plan``


@dataclass(frozen=True)
class Part:
    """Number ``cut`` of the ``cuts`` equal cuts of an input: by bytes of JSON lines, row groups, or shards."""

    path: str
    size: int
    cut: int = 0
    cuts: int = 1


@dataclass(frozen=True)
class Reading:
    """How documents are taken out of the inputs."""

    text_key: str = "text"
    dataset_config: str | None = None
    dataset_split: str = "train"


def kind(path: str) -> str:
    """The extension under the compression's: ``a.jsonl.zst`` -> .jsonl"""
    stem, extension = os.path.splitext(path)
    return os.path.splitext(stem)[1] if extension in COMPRESSIONS else extension


def is_dataset(path: str) -> bool:
    """Whether a path names a whole data set of the hub rather than files in it."""
    return path.startswith(HUB) and kind(path) not in TEXT + JSON_LINES + PARQUET


def braces(pattern: str) -> list[str]:
    """The paths of a pattern such as ``part-{000..127}.{a,b}.gz``; other patterns are left as they are."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    span = found and re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if not found or not (span or "," in found[1]):
        return [pattern]
    if span:
        first, last = int(span[1]), int(span[2])
        step = 1 if last >= first else -1
        words = [f"{i:0{len(span[1])}d}" for i in range(first, last + step, step)]
    else:
        words = found[1].split(",")
    return [path for word in words for path in braces(pattern[: found.start()] + word + pattern[found.end() :])]


def find_inputs(patterns: Iterable[str], reading: Reading | None = None) -> list[Input]:
    """Every input before any is read, in the order given; what a glob matches is sorted.

    Raises:
        UserError: a file is missing, is named twice or has an extension that is not read.
    """
    found: list[Input] = []
    for pattern in (path for given in patterns for path in braces(given)):
        found += [_dataset(pattern, reading or Reading())] if is_dataset(pattern) else _files(pattern)
    seen: set[str] = set()
    for entry in found:
        if entry.path in seen:
            raise UserError(f"{entry.path} is named twice by --input: its documents would be read twice.")
        seen.add(entry.path)
    return found


def _files(pattern: str) -> list[Input]:
    from fsspec.core import url_to_fs

    known = TEXT + JSON_LINES + PARQUET
    if kind(pattern) not in known and not any(letter in pattern for letter in "*?["):
        raise UserError(
            f"{pattern} has an extension that is not read; it must be one of {' '.join(known)}, "
            f"plain or with {' '.join(COMPRESSIONS)}."
        )
    try:
        filesystem, name = url_to_fs(pattern)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {pattern} ({error}): check the url, or install the `remote` extra.") from None
    infos: dict[str, dict[str, Any]] = {}
    if filesystem.isfile(name):
        infos[pattern] = filesystem.info(name)
    elif "://" not in pattern:
        infos = {path: filesystem.info(path) for path in sorted(glob.glob(pattern, recursive=True))}
    elif any(letter in pattern for letter in "*?["):
        matched = filesystem.glob(name, detail=True)
        infos = {filesystem.unstrip_protocol(path): matched[path] for path in sorted(matched)}
    files = {path: info for path, info in infos.items() if info.get("type", "file") == "file"}
    files = {path: info for path, info in files.items() if path == pattern or kind(path) in known}
    if not files:
        raise UserError(f"no input file at {pattern}: check the path.")
    stamps = ("mtime", "ETag", "etag", "LastModified", "updated")
    return [
        Input(path, info.get("size") or 0, next((str(info[key]) for key in stamps if info.get(key)), ""))
        for path, info in files.items()
    ]


def _dataset(path: str, reading: Reading) -> Input:
    return Input(path, 0, cuts=_stream(path, reading).num_shards)


@functools.lru_cache(maxsize=2)  # to open one asks the hub for its list of files
def _stream(path: str, reading: Reading) -> Any:
    """The data set at ``hf://datasets/NAME[@REVISION]``, streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{path} is read by the package `datasets`, which is not installed: pip install 'open_lm_linear[prepare]'."
        ) from None
    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        return load_dataset(
            name, reading.dataset_config, split=reading.dataset_split, revision=revision or None, streaming=True
        )
    except Exception as error:  # the hub, the network and its builders raise all kinds
        raise UserError(f"the data set {name} cannot be opened: {_reason(error)}") from error


def work_in(entry: Input) -> int:
    """Bytes of text to expect in an input."""
    if entry.cuts:
        return entry.cuts * LARGEST_PIECE
    dense = kind(entry.path) in PARQUET or os.path.splitext(entry.path)[1] in COMPRESSIONS
    return entry.size * (EXPANSION if dense else 1)


def plan(inputs: Sequence[Input]) -> list[tuple[Part, ...]]:
    """The pieces of work, which join small neighbours and cut large files where they can: a function of sizes alone."""
    piece = min(max(sum(map(work_in, inputs)) // PIECES, SMALLEST_PIECE), LARGEST_PIECE)
    pieces: list[tuple[Part, ...]] = []
    current: list[Part] = []
    filled = 0
    for entry in inputs:
        path, work = entry.path, work_in(entry)
        plain = os.path.splitext(path)[1] in JSON_LINES + PARQUET
        cuts = entry.cuts or (max(1, -(-work // piece)) if plain else 1)
        for cut in range(cuts):
            if current and filled + work // cuts > piece:
                pieces.append(tuple(current))
                current, filled = [], 0
            current.append(Part(path if "://" in path else os.path.abspath(path), entry.size, cut, cuts))
            filled += work // cuts
    return [*pieces, tuple(current)] if current else pieces


def documents(parts: Iterable[Part], reading: Reading) -> Iterator[str]:
    """The text of every document in order; those of white space alone are passed over.

    Raises:
        UserError: a file is unreadable, or an entry is malformed or lacks the key of the text.
    """
    for part in parts:
        for text in _read(part, reading):
            if text.strip():
                yield text


def _read(part: Part, reading: Reading) -> Iterator[str]:
    import fsspec

    if is_dataset(part.path):
        yield from _rows(part, reading)
        return
    if kind(part.path) in PARQUET:
        read = _parquet
    else:
        read = _text if kind(part.path) in TEXT else _json_lines
    try:
        with fsspec.open(part.path, "rb") as raw:
            yield from read(part, raw, reading.text_key)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
        raise UserError(f"cannot read {part.path} ({error}): copy the file again.") from error


def _text(part: Part, raw: Any, text_key: str) -> Iterator[str]:
    try:
        yield _decompress(part.path, raw).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{part.path} is not UTF-8 text (byte {error.start}): convert it first.") from None


def _json_lines(part: Part, raw: Any, text_key: str) -> Iterator[str]:
    """The lines that begin inside the cut."""
    begin, end = (part.size * cut // part.cuts for cut in (part.cut, part.cut + 1))
    file = _decompress(part.path, raw)
    at = begin
    if begin:
        file.seek(begin - 1)
        at += len(file.readline()) - 1  # the line in which the cut falls belongs to the cut before
    for number, line in enumerate(file, start=1):
        if part.cuts > 1 and at >= end:
            return
        if line.strip():
            try:
                yield _text_of(line, text_key)
            except ValueError as error:
                raise UserError(f"{part.path} line {number + _lines_before(part, begin)} {error}") from None
        at += len(line)


def _lines_before(part: Part, begin: int) -> int:
    """The lines that begin before a cut, for an error message."""
    import fsspec

    if not begin:
        return 0
    count = 1
    with fsspec.open(part.path, "rb") as raw:
        while begin > 1 and (block := raw.read(min(begin - 1, 2**20))):
            count += block.count(b"\n")
            begin -= len(block)
    return count


def _text_of(line: bytes, text_key: str) -> str:
    """Raises ValueError with the end of a sentence that begins with the line."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}): each line must be one JSON object.") from None
    if not isinstance(entry, dict):
        raise ValueError(f"is not a JSON object: each line must be one, with the text under {text_key!r}.")
    if text_key not in entry:
        raise ValueError(f"has no key {text_key!r}: set --text-key to one of {', '.join(entry) or 'none'}.")
    if not isinstance(entry[text_key], str):
        raise ValueError(f"has under {text_key!r} no string but {json.dumps(entry[text_key])[:40]}: set --text-key.")
    return entry[text_key]


def records(path: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, with all their keys: JSON lines, or in .json also a list of objects or a single one.

    Raises:
        UserError: the file is missing or unreadable, or holds anything else.
    """
    import fsspec

    for found in find_inputs([path]):
        if kind(found.path) not in JSON_LINES:
            raise UserError(f"{found.path} is not read here: give {' or '.join(JSON_LINES)}, plain or compressed.")
        try:
            with fsspec.open(found.path, "rb") as raw:
                yield from _objects(found.path, _decompress(found.path, raw))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
            raise UserError(f"cannot read {found.path} ({error}): copy the file again.") from error


def _objects(path: str, file: Any) -> Iterator[dict[str, Any]]:
    lines: Iterable[Any] = file
    if kind(path) == ".json":
        content = file.read()
        try:
            whole = json.loads(content)
            lines = map(json.dumps, whole if isinstance(whole, list) else [whole])
        except ValueError:
            lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON ({error}): each line must be one object.") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path} line {number} is not a JSON object: each line must be one.")
        yield entry


def _parquet(part: Part, raw: Any, text_key: str) -> Iterator[str]:
    """The strings of the cut's row groups; nulls are passed over."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{part.path} is read by the package `pyarrow`, which is not installed: "
            "pip install 'open_lm_linear[prepare]'."
        ) from None
    try:
        file = pq.ParquetFile(raw)
        if text_key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{part.path} has no column {text_key!r}: set --text-key to one of {names}.")
        column = file.schema_arrow.field(text_key).type
        if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
            raise UserError(f"{part.path} has under {text_key!r} no strings but {column}: set --text-key.")
        first, last = (file.num_row_groups * cut // part.cuts for cut in (part.cut, part.cut + 1))
        if first == last:
            return
        for batch in file.iter_batches(batch_size=ROWS, row_groups=list(range(first, last)), columns=[text_key]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pa.ArrowException as error:
        raise UserError(f"cannot read {part.path} ({_reason(error)}): copy the file again.") from error


def _rows(part: Part, reading: Reading) -> Iterator[str]:
    stream, key = _stream(part.path, reading), reading.text_key
    try:
        for row in stream.shard(num_shards=part.cuts, index=part.cut):
            if key not in row:
                names = ", ".join(row)
                raise UserError(f"the data set {part.path} has no column {key!r}: set --text-key to one of {names}.")
            if isinstance(row[key], str):
                yield row[key]
            elif row[key] is not None:
                raise UserError(f"the data set {part.path} has under {key!r} no strings: set --text-key.")
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"cannot read the data set {part.path} ({_reason(error)}): the same command goes on."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _decompress(path: str, raw: Any) -> Any:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".xz"):
        return lzma.LZMAFile(raw)
    if path.endswith(".zst"):
        import zstandard

        # fsspec's own zstd stops, silently, after the first of several frames
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader)  # type: ignore[arg-type]  # iterates over lines
    return raw


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError
