"""Copies of checkpoints in our format or Hugging Face's: worked out from headers, streamed by rows, read back."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from open_lm_linear.cli import ProofError, UserError
from open_lm_linear.metrics import human_bytes
from open_lm_linear.model import Transformer, swap
from open_lm_linear.pretrained.families import ATTENTIONS, to_hugging_face
from open_lm_linear.pretrained.loading import load_tokenizer, new_values
from open_lm_linear.pretrained.matching import BLOCK_BYTES, Match, in_layout, match, part_rows, require_equal
from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter, tensor_checksums
from open_lm_linear.pretrained.sources import INDEX, TOKENIZER_FILES, Source

Tensor = torch.Tensor

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Item:
    """One tensor to write: rows [begin, end) of one of our parameters, under its name in the copy."""

    name: str
    parameter: str
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Job:
    """A conversion worked out from headers: the model on the meta device, where each parameter comes from, what is
    written."""

    source: Source
    model: Transformer
    match: Match
    items: list[Item]
    config_json: dict[str, Any]
    format: str
    seed: int

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def prepare(
    source: Source,
    attn_name: str | None = None,
    *,
    format: str = "openlm",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **changes: Any,
) -> Job:
    """Works a conversion out from headers alone.

    Args:
        dtype: of what is written; None keeps each tensor's own.
        changes: fields of the config or options of the attention.

    Raises:
        UserError: whatever does not fit, by its key; a model that Hugging Face's format cannot hold.
    """

    config = swap(source.config, attn_name, **changes)
    if format == "hf":
        config = in_layout(config, "rotary")
    with torch.device("meta"):
        model = Transformer(config)
    matched = match(model, source)
    table: Mapping[str, tuple[str, ...]] = {}
    values: dict[str, Any] = model.config.to_json()
    if format == "hf":
        if model.config.attn_name not in ATTENTIONS:
            raise UserError(
                f"--format hf writes {' and '.join(sorted(ATTENTIONS, reverse=True))} models, which transformers "
                "knows: export a linear one with `python -m open_lm_linear.export`."
            )
        family, values = to_hugging_face(model.config, source.family)
        values |= _special_tokens(source, model.config.vocab_size)
        table = family.table(config.n_layers)
    items = [item for name in dict(model.named_parameters()) for item in _items(model, matched, name, table, dtype)]
    if format == "hf":
        values["dtype"] = str(max(items, key=lambda item: item.nbytes).dtype).removeprefix("torch.")
    return Job(source, model, matched, items, values, format, seed)


def _special_tokens(source: Source, vocab_size: int) -> dict[str, Any]:
    """The ids that begin, end and pad, of the source's config or of its tokenizer; a config's defaults are others."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if source.hugging_face is not None:
        return {name: source.hugging_face.get(name) for name in names}
    if source.tokenizer() is None:
        return dict.fromkeys(names)
    try:
        tokenizer = load_tokenizer(source.name)
    except UserError:  # said when it would be laid beside the copy
        return dict.fromkeys(names)
    ids = {name: getattr(tokenizer, name, None) for name in names}
    return {name: i if i is not None and i < vocab_size else None for name, i in ids.items()}


def _items(
    model: Transformer, matched: Match, name: str, table: Mapping[str, tuple[str, ...]], dtype: torch.dtype | None
) -> Iterator[Item]:
    """A parameter as it will be written: as it is, or cut into the tensors that Hugging Face's format has for it."""
    shape = tuple(model.get_parameter(name).shape)
    own = matched.kept[name].dtype if name in matched.kept else _main_dtype(matched)
    names = table.get(name, (name,))
    begin = 0
    for theirs, size in zip(names, part_rows(model.config, name, len(names), shape[0]), strict=True):
        yield Item(theirs, name, begin, begin + size, (size, *shape[1:]), dtype or own)
        begin += size


def _main_dtype(matched: Match) -> torch.dtype:
    """The dtype that most of the checkpoint's parameters have."""
    return matched.kept["tok_embeddings.weight"].dtype


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    folder: Path
    nbytes: int
    files: int
    seconds: float


def convert(job: Job, folder: str | Path, *, overwrite: bool = False, max_shard_bytes: int = SHARD_BYTES) -> Converted:
    """Writes a job's copy; the folder is there whole and compared with what was meant, or not at all.

    Raises:
        UserError: a folder in use, too little room, or a source that turns out damaged.
        ProofError: what lies on the disk is not what was written.
    """
    folder = Path(folder).resolve()
    check_folder(folder, overwrite)
    require_room(folder, job.nbytes)
    began = time.perf_counter()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        checksums = write_weights(job, partial, max_shard_bytes)
        write_records(job, partial, checksums)
        _keep_tokenizer(job.source, partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = len(list(folder.glob("*.safetensors")))
    return Converted(folder, job.nbytes, files, time.perf_counter() - began)


def write_weights(job: Job, folder: Path, max_shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Streams a job's tensors into safetensors files, with an index where there are several, and reads them back.

    Returns:
        The SHA-256 of each tensor by its name in the copy.

    Raises:
        UserError: a source that turns out damaged.
        ProofError: what lies on the disk is not what was written.
    """
    require_equal(job.source, job.match.tied)
    shards = _shards(job.items, max_shard_bytes)
    checksums = _write(job, folder, shards)
    _read_back(folder, checksums)
    if len(shards) > 1:
        weight_map = {item.name: file for file, items in shards.items() for item in items}
        index = {"metadata": {"total_size": job.nbytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return checksums


def require_room(folder: Path, nbytes: int) -> None:
    """Raises UserError where the disk under ``folder`` cannot take ``nbytes``."""
    room = shutil.disk_usage(_existing(folder)).free
    if room < nbytes + (64 << 20):
        raise UserError(f"{folder} needs {human_bytes(nbytes)} and the disk has {human_bytes(room)} left.")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError where a copy cannot be written to ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to write.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{folder} is not empty: give another folder, or --overwrite to replace the copy in it.")
    if not (folder / "state.json").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds no converted copy, and --overwrite replaces nothing else: give another folder."
        )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _shards(items: list[Item], most: int) -> dict[str, list[Item]]:
    """File name -> its tensors, in order, no file above ``most`` bytes but for one tensor that is larger alone."""
    groups: list[list[Item]] = [[]]
    for item in items:
        if groups[-1] and sum(i.nbytes for i in groups[-1]) + item.nbytes > most:
            groups.append([])
        groups[-1].append(item)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write(job: Job, folder: Path, shards: dict[str, list[Item]]) -> dict[str, str]:
    """Streams every tensor into its file; SHA-256 by the names of the copy."""
    checksums: dict[str, str] = {}
    rows = _Rows(job)
    for file, items in shards.items():
        tensors = {item.name: (item.dtype, item.shape) for item in items}
        with SafetensorsWriter(folder / file, tensors, {"format": "pt"}) as writer:
            for item in items:
                for block in rows.of(item):
                    writer.write(item.name, block.to(item.dtype))
            checksums |= writer.close()
    return checksums


class _Rows:
    """The rows of items in the order of the model's parameters; new parameters are drawn as their turn comes."""

    def __init__(self, job: Job) -> None:
        self.match = job.match
        self.fresh = new_values(job.model.config, job.seed, set(job.match.new))

    def of(self, item: Item) -> Iterator[Tensor]:
        if item.parameter in self.match.kept:
            yield from self.match.kept[item.parameter].rows(item.begin, item.end)
            return
        name, value = next(self.fresh)
        assert name == item.parameter, (name, item)
        yield from value.split(max(1, BLOCK_BYTES // max(1, value[:1].nbytes))) if value.dim() else [value]


def _read_back(folder: Path, checksums: Mapping[str, str]) -> None:
    """Compares what lies on the disk with what was written, tensor by tensor."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= tensor_checksums(path)
    if odd := sorted(name for name in {*found, *checksums} if found.get(name) != checksums.get(name)):
        raise ProofError(f"{odd[0]!r} does not read back from the disk as it was written; nothing was put in place.")


def write_records(
    job: Job,
    folder: Path,
    checksums: Mapping[str, str],
    tokens: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Lays the config beside a copy's weights, and in our own format the record that says the folder is whole.

    Args:
        tokens: that the model was trained on since it left its base, and ``config`` the configuration of that run.
    """
    if job.format == "hf":
        (folder / "config.json").write_text(json.dumps(job.config_json, indent=2) + "\n")
        if job.source.hugging_face is not None and job.source.place and "generation_config.json" in job.source.place:
            (folder / "generation_config.json").write_text(job.source.place.text("generation_config.json"))
        return
    (folder / "model.json").write_text(json.dumps(job.config_json, indent=2) + "\n")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    untrained = sorted(job.match.new or job.source.untrained)
    record = {
        "step": 0,
        "samples": 0,
        "tokens": tokens or 0,
        "seconds": 0.0,
        "config": dict(config or {"pretrained": job.source.name}),
        "family": job.source.family,
        "notes": job.source.notes,
        "untrained": untrained,
        "files": sizes,
        "sha256": dict(checksums),
    }
    (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n")


def _keep_tokenizer(source: Source, folder: Path) -> None:
    """Lays the source's tokenizer beside the copy, where it has one."""

    place = source.place
    files = [f for f in place.files() if TOKENIZER_FILES.fullmatch(f)] if place else []
    for file in files:
        assert place is not None
        shutil.copyfile(place.local(file), folder / file)
    if files or source.tokenizer() is None:
        return
    try:
        load_tokenizer(source.name).save_pretrained(folder)
    except UserError as error:
        print(f"note: the copy has no tokenizer: {error}", file=sys.stderr)
