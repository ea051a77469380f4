"""The list of shards: OpenLM's ``manifest.jsonl``, and the ``dataset.json`` that says how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm_linear.cli import UserError
from open_lm_linear.data.remote import beside, fetch, fetch_optional, is_remote

MANIFEST = "manifest.jsonl"
CARD = "dataset.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file of samples, each a sequence of seq_len + 1 tokens."""

    path: str
    num_sequences: int


def local(path: str | os.PathLike[str], remote: bool = False) -> str:
    """The path as a string; a ``file://`` URL as the path that it names.

    Args:
        remote: whether URLs are taken too.

    Raises:
        UserError: it is a ``pipe:`` command of webdataset, or a URL where none is taken.
    """
    path = os.fspath(path).removeprefix("file://")
    if path.startswith("pipe:"):
        raise UserError(f"{path} is a command, and data is read from paths and URLs alone: give the URL itself.")
    if is_remote(path) and not remote:
        raise UserError(f"{path} is not a local path: copy it to a local disk first.")
    return path


def read_manifest(path: str | os.PathLike[str]) -> list[Shard]:
    """The shards that a manifest names, in its order, with paths or URLs in the manifest's folder.

    One line is ``{"shard": name, "num_sequences": n}``; ``num_chunks`` (older OpenLM) and names without ``.tar`` are
    taken too. The shards themselves are not opened here.

    Raises:
        UserError: the manifest is missing or empty, or a line is malformed.
    """
    where = local(path, remote=True)
    manifest = fetch(where) if is_remote(where) else Path(where)
    if not manifest.is_file():
        raise UserError(
            f"no manifest at {manifest}: make one from your text with "
            "`python -m open_lm_linear.data.prepare --input TEXT --tokenizer NAME --output DIR`."
        )
    try:
        lines = manifest.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"the manifest {where} is not UTF-8 text: make it anew, or copy it again.") from None
    shards = [_parse(line, where, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not shards:
        raise UserError(f"the manifest {where} names no shards: make it anew with open_lm_linear.data.prepare.")
    return shards


def _parse(line: str, manifest: str, number: int) -> Shard:
    try:
        entry = json.loads(line)
        name = entry["shard"]
        count = entry["num_sequences"] if "num_sequences" in entry else entry["num_chunks"]
    except (ValueError, KeyError, TypeError, IndexError):
        name = count = None
    if not isinstance(name, str) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(
            f'{manifest} line {number} is not {{"shard": NAME, "num_sequences": COUNT}} with a COUNT of at least 1: '
            f"{line.strip()[:80]}"
        )
    name = name if name.endswith(".tar") else name + ".tar"
    if is_remote(manifest) and not is_remote(name):
        return Shard(beside(manifest, name), count)
    return Shard(name if is_remote(name) else os.path.join(os.path.dirname(manifest), local(name)), count)


def write_manifest(path: str | os.PathLike[str], shards: Iterable[Shard], card: Mapping[str, Any]) -> None:
    """Writes ``dataset.json`` (``card``) beside the manifest, then the manifest, each whole or not at all."""
    manifest = Path(path)
    _write(manifest.with_name(CARD), json.dumps({"format_version": FORMAT_VERSION, **card}, indent=2) + "\n")
    lines = [
        json.dumps({"shard": os.path.relpath(shard.path, manifest.parent), "num_sequences": shard.num_sequences})
        for shard in shards
    ]
    _write(manifest, "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_dataset_card(manifest: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``prepare`` wrote about the data of ``manifest``; None where there is no ``dataset.json``, as with OpenLM's.

    Keys: format_version, split, tokenizer, vocab_size, seq_len, eod_token_id, documents, tokens, sequences,
    heldout_documents, heldout_sequences, shuffle_seed.

    Raises:
        UserError: the file is not a JSON object, or is of a later format than this code reads.
    """
    where = local(manifest, remote=True)
    path = beside(where, CARD) if is_remote(where) else os.path.join(os.path.dirname(where), CARD)
    file = fetch_optional(path) if is_remote(path) else Path(path)
    if file is None or not file.is_file():
        return None
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        card = None
    if not isinstance(card, dict):
        raise UserError(f"{path} is not a JSON object: make the data anew with open_lm_linear.data.prepare.")
    version = card.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version} and this code reads {FORMAT_VERSION}: update the code.")
    return card
