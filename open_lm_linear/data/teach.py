"""A teacher's logits into shards: ``python -m open_lm_linear.data.teach --data DIR --teacher NAME --output DIR2``.

Each sample keeps its tokens as they are and gets what the teacher says of them beside it (``teacher_logits``); a run
with ``--loss kl=1 --teacher shards`` then needs no teacher in memory. A shard appears whole or not at all: after an
interruption the same command goes on where it stopped. OUTPUT may be the data's own folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.data.manifest import MANIFEST, Shard, read_dataset_card, write_manifest
from open_lm_linear.data.samples import TEACHER_KEY
from open_lm_linear.data.shards import ShardIndex, write_members
from open_lm_linear.data.teacher_logits import SETTINGS, TeacherLogits, TeacherSection

if TYPE_CHECKING:
    from open_lm_linear.data.stream import DataConfig
    from open_lm_linear.model import Transformer


@dataclass(frozen=True)
class TeachConfig:
    """The data."""

    data: str
    """A manifest.jsonl or its folder."""
    output: Path
    """Folder that receives the shards with the teacher's logits, manifest.jsonl and dataset.json."""
    document_separator: int | None = None
    """With --reset-state-at-document: token id that ends a document. None: the one that dataset.json names."""
    section: TeacherSection = field(default_factory=TeacherSection)


def teach(cfg: TeachConfig) -> TeacherLogits:
    """Does what the command does.

    Raises:
        UserError: bad settings or data, another teacher's vocabulary, or shards there that other settings wrote.
    """
    from open_lm_linear.data import stream

    data = stream.DataConfig(
        (cfg.data,),
        reset_state_at_document=cfg.section.reset_state_at_document,
        document_separator=cfg.document_separator,
    )
    if not cfg.section.teacher:
        raise UserError("there is nobody to ask: give --teacher PRETRAINED.")
    (manifest,) = stream.manifests_of(data)
    card = read_dataset_card(manifest) or {}
    logits = logits_of(cfg.section, data, card, manifest)
    shards = teach_shards(stream.shards_of([manifest]), cfg.output, cfg.section, logits)
    write_manifest(cfg.output / MANIFEST, shards, {**card, "teacher": dataclasses.asdict(logits)})
    return logits


def logits_of(section: TeacherSection, data: DataConfig, card: dict[str, Any], where: str) -> TeacherLogits:
    """What will be written, from the teacher's header alone, which must fit the ``card`` of the data ``where``."""
    from open_lm_linear.data import masks, stream
    from open_lm_linear.pretrained import open_source

    section.check()
    vocab_size = open_source(section.teacher).config.vocab_size
    if section.top_k > vocab_size:
        raise UserError(f"--top-k {section.top_k} is more than the {vocab_size} tokens of {section.teacher}.")
    if card:
        stream.check_card(card, where, card.get("seq_len", 0), vocab_size)
    separator = masks.resolved(data, vocab_size).document_separator
    return TeacherLogits(section.teacher, section.top_k, section.kl_temperature, vocab_size, separator, section.dtype)


def teach_shards(shards: list[Shard], folder: Path, section: TeacherSection, logits: TeacherLogits) -> list[Shard]:
    """Writes those shards into ``folder`` that are not there with logits already; returns all of them as they lie."""
    import torch
    from tqdm import tqdm

    from open_lm_linear.pretrained import load_pretrained

    targets = [Shard(str(folder / os.path.basename(shard.path)), shard.num_sequences) for shard in shards]
    if len({shard.path for shard in targets}) < len(shards):
        raise UserError("two shards of the data have one name, and would lie in one folder: rename them.")
    _claim(folder, logits)
    device = section.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher: Transformer | None = None
    for shard, target in zip(tqdm(shards, unit="shard", desc="teach"), targets, strict=True):
        source = ShardIndex(shard.path, expected=shard.num_sequences)
        if _is_done(target.path, source, logits):
            continue
        teacher = teacher or load_pretrained(section.teacher, dtype=getattr(torch, section.dtype), device=device)
        write_members(target.path, _members(source, teacher, logits, section.batch_size))
    return targets


def _claim(folder: Path, logits: TeacherLogits) -> None:
    """Notes with what the shards of a folder are written, and refuses other settings than those noted."""
    path, asked = folder / SETTINGS, dataclasses.asdict(logits)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(json.dumps(asked) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    found = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name, value in asked.items() if found.get(name) != value]
    if other:
        raise UserError(
            f"{folder} holds logits written with another {other[0]} ({found.get(other[0])}, now {asked[other[0]]}): "
            "choose another --output, or remove that folder."
        )


def _is_done(path: str, source: ShardIndex, logits: TeacherLogits) -> bool:
    """Whether a shard holds the source's tokens and a teacher's logits beside them."""
    if not os.path.exists(path):
        return False
    there = ShardIndex(path)
    if not there.taught or len(there) != len(source):
        return False
    return all(np.array_equal(there.read(i), source.read(i)) for i in range(len(source)))


def _members(
    source: ShardIndex, teacher: Transformer, logits: TeacherLogits, batch_size: int
) -> Iterator[tuple[str, bytes]]:
    """The files of a shard: those of the source, and beside each sample what the teacher says of it."""
    import torch

    from open_lm_linear.data import masks, stream
    from open_lm_linear.data.samples import encode_npy
    from open_lm_linear.ops.losses import top_k_by_chunks

    separator, device = logits.document_separator, teacher.head_weight().device
    data = stream.DataConfig(reset_state_at_document=separator is not None, document_separator=separator)
    for begin in range(0, len(source), batch_size):
        samples = range(begin, min(begin + batch_size, len(source)))
        rows = [source.read(i) for i in samples]
        if len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
            raise UserError(f"shard {source.name} has samples of different lengths: prepare it with one --seq-len.")
        tokens = np.stack(rows)
        if tokens.min() < 0 or tokens.max() >= logits.vocab_size:
            raise UserError(
                f"shard {source.name} has tokens outside the vocabulary of {logits.source}, {logits.vocab_size}: "
                "prepare the data with the teacher's tokenizer."
            )
        inputs, _, first = masks.inputs_and_targets(torch.from_numpy(tokens).to(device), data)
        with torch.no_grad():
            hidden, _ = teacher.hidden(inputs, first=first)
            top = top_k_by_chunks(
                hidden, teacher.head_weight(), logits.top_k, logits.temperature, teacher.config.logit_softcap
            )
        for i, ids, log_p in zip(samples, *(x.cpu().numpy() for x in top), strict=True):
            yield f"{source.key(i)}.{source.data_key}", source.content(i)
            yield f"{source.key(i)}.{TEACHER_KEY}", encode_npy(logits.encode(ids, log_p), 1 << 16)


@command
def main() -> None:
    cfg = parse(
        TeachConfig,
        prog="python -m open_lm_linear.data.teach",
        description="Writes a teacher's likeliest next tokens into shards, beside the tokens.",
    )
    print(f"{teach(cfg).summary()} -> {cfg.output}")


if __name__ == "__main__":
    main()
