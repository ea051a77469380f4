"""Writes a checkpoint in a format that others load, and proves it before it is there.

Tensors stream from the source into a folder beside the export's place; that folder is loaded in a fresh process, its
logits are compared with the source's, and only then it gets its name. No more than one layer is ever in memory here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import open_lm_linear
from open_lm_linear.cli import UserError
from open_lm_linear.hf.card import History, card
from open_lm_linear.hf.formats import FORMATS, Format
from open_lm_linear.hf.proof import Differences, Proof, text_ids
from open_lm_linear.hf.wrap import hf_config
from open_lm_linear.model import Transformer
from open_lm_linear.pretrained.copies import SHARD_BYTES, Job, prepare, require_room, write_records, write_weights
from open_lm_linear.pretrained.folding import fold as folded
from open_lm_linear.pretrained.loading import verify_checksums
from open_lm_linear.pretrained.sources import Source, source_of

RECORD = "export.json"  # what an export is and which files are its own


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    differences: Differences
    nbytes: int
    """Of the weights."""
    parameters: int
    saved: int
    """Parameters that folding removed; 0: nothing was folded."""
    files: tuple[str, ...]
    """What lies in the folder of ours."""


def export_hf(model: Transformer, folder: str | Path, **options: Any) -> Exported:
    """``export`` of a model in memory, for ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``."""
    return export(source_of(model), folder, **options)


def export(
    source: Source,
    folder: str | Path,
    *,
    format: str = "hf",
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    fold: bool = False,
    eos_token_id: int | list[int] | None = None,
    history: History | None = None,
    name: str = "",
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes a checkpoint to ``folder``; the folder is there whole and proved, or not at all.

    Args:
        format: ``hf``: what transformers loads with trust_remote_code; ``openlm``: a checkpoint of ours in OpenLM's
            keys; ``safetensors``: one plain file and its config; ``supra``: the folders of linear_open_lm.
        tokenizer: a transformers tokenizer to lay beside it, whose special tokens `generate()` then uses.
        dtype: of the weights (default: the source's).
        fold: fold the feature maps into the projections.
        eos_token_id: what ends a generation (default: the tokenizer's).
        history: for the model card.
        name: what the card has a reader load (default: the folder's name).
        overwrite: replace an export that is there; other files in the folder stay.

    Raises:
        UserError: a folder in use, a tokenizer that does not fit, a model that the format or the fold cannot hold.
        ExportError: the written folder does not load or does not give the source's logits.
    """
    folder = Path(folder).resolve()
    check_folder(folder, overwrite)
    history = history or History()
    dtype = dtype or source.reader.dtype(source.keys["tok_embeddings.weight"][0])
    job = _job(folded(source) if fold else source, FORMATS[format], dtype)
    hf = hf_config(job.model.config, tokenizer, eos_token_id)
    hf.dtype = dtype
    texts = FORMATS[format].texts(job.model.config, hf)  # refuses what the format cannot hold
    require_room(folder, job.nbytes)
    verify_checksums(source)
    proof = Proof(source, job.source, dtype, text_ids(tokenizer, job.model.config))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        checksums = write_weights(job, partial, job.nbytes if format == "safetensors" else max_shard_bytes)
        for file, text in texts.items():
            (partial / file).write_text(text, encoding="utf-8")
        if format == "openlm":
            write_records(job, partial, checksums, tokens=history.tokens, config=history.recipe)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        differences = proof.of(partial, FORMATS[format])
        parameters, before = _parameters(job.source), _parameters(source)
        files = sorted([*(path.name for path in partial.iterdir()), "README.md", RECORD])
        exported = Exported(folder, differences, job.nbytes, parameters, before - parameters, tuple(files))
        record: dict[str, Any] = {"format": format, "dtype": _plain(dtype), "version": open_lm_linear.__version__}
        record |= {"differences": dataclasses.asdict(differences), "parameters": parameters, "files": files}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        text = card(name or folder.name, job.model, format, _plain(dtype), history, exported, tokenizer is not None)
        (partial / "README.md").write_text(text, encoding="utf-8")
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _job(source: Source, format: Format, dtype: torch.dtype) -> Job:
    """What is to be written: every parameter of ours, whole, under all the names that the format has for it."""
    job = prepare(source, dtype=dtype)
    config = job.model.config
    job.items = [
        dataclasses.replace(item, name=name) for item in job.items for name in format.names(config, item.parameter)
    ]
    return job


def _parameters(source: Source) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(source.config).parameters())


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError where an export cannot be written to ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to export to.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{folder} is not empty: give another folder, or --overwrite to replace the export in it.")
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} holds no export, and --overwrite replaces nothing else: give another folder.")


def _put_in_place(partial: Path, folder: Path) -> None:
    """Moves the files over; those of an export that was there are removed, others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    old = json.loads((folder / RECORD).read_text())["files"] if (folder / RECORD).exists() else []
    for path in [folder / Path(name).name for name in old]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
