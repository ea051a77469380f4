"""Text -> shards: ``python -m open_lm_linear.data.prepare --input a.txt b.jsonl.zst --tokenizer NAME --output DIR``.

Documents are tokenised, joined with the end-of-document token after each, cut into sequences of seq_len + 1 tokens that
do not overlap, and shuffled all together. Whole documents are kept aside for validation. The output is a function of
the inputs, the tokenizer and the settings, byte by byte, whatever the number of workers and however often the command
was killed and given again.

The inputs are cut into pieces (``inputs``), each piece is tokenised and packed by one worker (``tokenise``), and the
sequences of all are sorted by random keys on disk (``shuffle``). OUTPUT/.work says what is done (``journal``).

On a Ray cluster, with inputs and output where every node sees them (the package installed on each with its ``ray``
extra): ``RAY_ADDRESS=HOST:PORT python -m open_lm_linear.data.prepare --engine ray ...``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from open_lm_linear.cli import UserError, command, flags_in, parse
from open_lm_linear.data.engines import Serial, choose
from open_lm_linear.data.inputs import HUB, Input, Part, Reading, find_inputs, plan, work_in
from open_lm_linear.data.journal import Journal
from open_lm_linear.data.manifest import CARD, MANIFEST, Shard, write_manifest
from open_lm_linear.data.shuffle import (
    RunFile,
    bucket_count,
    missing_shards,
    record_type,
    shard_path,
    shard_ranks,
    token_type,
)
from open_lm_linear.data.teacher_logits import SETTINGS, TeacherLogits, TeacherSection
from open_lm_linear.data.tokenise import (
    SIDES,
    Job,
    held_out,
    pack,
    pack_rests,
    portable,
    tokenise_piece,
    write_span,
)

__all__ = ["PrepareConfig", "Speed", "Split", "held_out", "pack", "prepare", "summary"]

FORMAT = 1  # of what an unfinished preparation keeps
FEWEST_SHARDS = 4  # even little data is cut into some shards
SPANS_PER_WORKER = 4  # in which shards are written, so that all workers end at about one time
MOST_SHARDS_PER_SPAN = 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare."""

    input: tuple[str, ...]
    """Text (.txt .md .rst, one document each), JSON lines (.jsonl .ndjson .json), both plain or .gz .xz .zst, and
    .parquet; local or a url (s3:// gs:// https://), with globs and braces; or hf://datasets/NAME, streamed."""
    tokenizer: str
    """Tokenizer: a preset, a folder, or a name on the hub. It must be that of the model to be trained."""
    output: Path
    """Folder that receives train/ and val/, each with shards, manifest.jsonl and dataset.json."""
    seq_len: int = 2048
    """Tokens that the model reads per sequence; a sample holds one more."""
    holdout_documents: float = 0.02
    """Share of documents kept aside for validation, chosen by a hash of the text: a document's side never changes."""
    sequences_per_shard: int = 512
    """Sequences per shard at most."""
    text_key: str = "text"
    """Key of the text in JSON lines, column of the text in parquet and in data sets."""
    seed: int = 0
    """Seed of the shuffle."""
    overwrite: bool = False
    """Replace what an earlier run wrote to the output folder."""
    dataset: str | None = None
    """A data set of the Hugging Face hub, NAME or NAME@REVISION, streamed (beside or instead of --input)."""
    dataset_config: str | None = None
    """Its configuration, where it has several."""
    dataset_split: str = "train"
    """Its split."""
    sample_format: Literal["npy", "json"] = "npy"
    """Samples as arrays of uint16 or uint32, or as the JSON lists that every OpenLM reads."""
    workers: int = 0
    """Cores to use: worker processes, and threads where there are fewer pieces of work than cores. 0: all."""
    engine: Literal["local", "ray"] = "local"
    """Where the work is done: on this machine, or as tasks of the Ray cluster at RAY_ADDRESS."""
    benchmark: bool = False
    """Also let the tokenizer alone run over the same texts, batch by batch in turn, and print both speeds."""
    teaching: TeacherSection = field(default_factory=TeacherSection)


@dataclass
class Split:
    """The documents of one side, training or validation, as they were counted and written."""

    name: str
    documents: int = 0
    characters: int = 0
    tokens: int = 0  # with the end-of-document tokens
    sequences: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)

    def add(self, counts: Mapping[str, Any]) -> None:
        for name in ("documents", "characters", "tokens", "sequences"):
            setattr(self, name, getattr(self, name) + counts[name])
        for length, count in counts["lengths"].items():
            self.lengths[int(length)] = self.lengths.get(int(length), 0) + count

    def tokens_per_document(self) -> dict[str, float | int]:
        """Mean and quantiles of the lengths, without the end-of-document token; the quantiles within 2 %."""
        if not self.documents:
            return {}
        lengths = np.array(sorted(self.lengths))
        up_to = np.cumsum([self.lengths[length] for length in lengths.tolist()])
        found: dict[str, float | int] = {"mean": round((self.tokens - self.documents) / self.documents, 2)}
        for quantile in QUANTILES:
            rank = max(1, math.ceil(quantile * self.documents))
            found[f"p{100 * quantile:g}"] = lengths[np.searchsorted(up_to, rank)].item()
        return found


@dataclass
class Speed:
    """Core-seconds of this process's run, which may be the rest of one that was stopped."""

    tokens: int = 0
    tokenising: float = 0.0
    writing: float = 0.0
    alone: float = 0.0

    def lines(self) -> list[str]:
        """Tokens per second and core, all work included; beside the tokenizer alone where that was measured."""
        if not self.tokens:
            return []
        rate = self.tokens / (self.tokenising + self.writing)
        line = f"per core: {rate:,.0f} tokens/s from text to shards"
        if not self.alone:
            return [line]
        alone = self.tokens / self.alone
        return [f"{line}; the tokenizer alone, on the same texts, {alone:,.0f} tokens/s: {rate / alone:.1%} of it"]


def prepare(cfg: PrepareConfig, speed: Speed | None = None) -> dict[str, Split]:
    """Does what the command does; returns the splits ``train`` and ``val`` as they were written.

    Args:
        speed: receives the seconds spent.

    Raises:
        UserError: bad settings or inputs, an output folder already in use, or too little text for one sequence.
    """
    _check_settings(cfg)
    speed = speed or Speed()
    reading = Reading(cfg.text_key, cfg.dataset_config, cfg.dataset_split)
    inputs = find_inputs([*cfg.input, *([HUB + cfg.dataset] if cfg.dataset else [])], reading)
    pieces = plan(inputs)
    job = _job(cfg, reading, sum(map(work_in, inputs)))
    logits = _logits(cfg, job)
    with Journal(cfg.output, _settings(cfg, inputs, job), cfg.overwrite) as journal:
        if not journal.shards_begun:
            _refuse_existing(cfg)
        with choose(cfg.engine, job, cfg.workers, len(pieces)) as engine:
            _tokenise(engine, journal, pieces, speed)
            if len(pieces) not in journal.pieces:
                journal.piece_done(len(pieces), pack_rests(job, len(pieces))["counts"])
            splits = {side: Split(side) for side in SIDES}
            for piece in range(len(pieces) + 1):
                for side in SIDES:
                    splits[side].add(journal.pieces[piece][side])
            if not splits["train"].sequences:
                journal.remove()
                raise UserError(
                    f"too little text: {splits['train'].tokens} training tokens do not fill one sequence of "
                    f"{cfg.seq_len + 1}; give more text, or a smaller --seq-len."
                )
            if not journal.shards_begun:
                for side in SIDES:
                    _remove_old(cfg.output / side)
                journal.begin_shards()
            for split in splits.values():
                _write(engine, cfg, split, len(pieces) + 1, speed)
        taught = _taught(cfg, splits["train"], logits)
        for split in reversed(splits.values()):  # training data last: it is there when all is
            if split.sequences:
                card = _card(cfg, split, splits["val"], job, inputs) | (taught if split.name == "train" else {})
                write_manifest(cfg.output / split.name / MANIFEST, split.shards, card)
        journal.remove()
    return splits


def _job(cfg: PrepareConfig, reading: Reading, work: int) -> Job:
    from open_lm_linear.pretrained import load_tokenizer

    tokenizer = load_tokenizer(cfg.tokenizer)
    eod = tokenizer.eos_token_id
    if eod is None:
        raise UserError(f"the tokenizer {cfg.tokenizer} has no end-of-text token, which must part the documents.")
    vocabulary = tokenizer.get_vocab()
    vocab_size = max(len(tokenizer), max(vocabulary.values()) + 1)  # ids can have gaps
    carried = portable(tokenizer)
    told = carried if isinstance(carried, str) else repr(sorted(vocabulary.items()))
    return Job(
        pieces=Path(os.path.abspath(cfg.output), ".work", "pieces"),
        output=Path(os.path.abspath(cfg.output)),
        tokenizer=carried,
        tokenizer_id=hashlib.sha256(told.encode()).hexdigest(),
        vocab_size=vocab_size,
        eod=eod,
        seq_len=cfg.seq_len,
        holdout=cfg.holdout_documents,
        seed=cfg.seed,
        buckets=bucket_count(work, token_type(vocab_size)),
        sample_format=cfg.sample_format,
        reading=reading,
        benchmark=cfg.benchmark,
    )


def _settings(cfg: PrepareConfig, inputs: list[Input], job: Job) -> dict[str, Any]:
    """What the output depends on, by flag."""
    names = ("seq_len", "holdout_documents", "sequences_per_shard", "text_key", "seed", "sample_format")
    return {
        "format": FORMAT,
        "tokenizer": f"{cfg.tokenizer} ({job.tokenizer_id[:12]})",
        **{name: getattr(cfg, name) for name in (*names, "dataset", "dataset_config", "dataset_split")},
        "inputs": [(entry.path, entry.size, entry.stamp, entry.cuts) for entry in inputs],
        **({"teaching": dataclasses.asdict(cfg.teaching)} if cfg.teaching.teacher else {}),
    }


def _check_settings(cfg: PrepareConfig) -> None:
    if cfg.seq_len < 1 or cfg.sequences_per_shard < 1:
        raise UserError("--seq-len and --sequences-per-shard must be at least 1.")
    if not 0 <= cfg.holdout_documents < 1:
        raise UserError(f"--holdout-documents {cfg.holdout_documents} is a share and must be at least 0 and below 1.")
    if cfg.workers < 0:
        raise UserError(f"--workers {cfg.workers} must be at least 1, or 0 for all cores.")
    if not cfg.input and not cfg.dataset:
        raise UserError("there is nothing to read: give --input FILES, or --dataset NAME.")
    cfg.teaching.check()


def _refuse_existing(cfg: PrepareConfig) -> None:
    for name in SIDES:
        manifest = cfg.output / name / MANIFEST
        if manifest.exists() and not cfg.overwrite:
            raise UserError(f"{manifest} exists: choose another --output, or pass --overwrite to replace that data.")


def _remove_old(folder: Path) -> None:
    """The manifest goes first, so that a run stopped here leaves no manifest without its shards."""
    for path in [folder / MANIFEST, folder / CARD, folder / SETTINGS, *folder.glob("shard-*.tar")]:
        path.unlink(missing_ok=True)


def _tokenise(engine: Serial, journal: Journal, pieces: list[tuple[Part, ...]], speed: Speed) -> None:
    """Has every piece done that is not; the largest begin first, so that all workers end at about one time."""
    from tqdm import tqdm

    sizes = [max(1, sum(part.size // part.cuts for part in parts)) for parts in pieces]
    done = sum(sizes[piece] for piece in journal.pieces if piece < len(pieces))
    left = sorted(set(range(len(pieces))) - set(journal.pieces), key=lambda piece: -sizes[piece])
    with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, desc="tokenise") as bar:
        for result in engine.run(tokenise_piece, [(piece, pieces[piece]) for piece in left]):
            journal.piece_done(result["piece"], result["counts"])
            speed.tokens += sum(result["counts"][side]["tokens"] for side in SIDES)
            speed.tokenising += result["seconds"] * engine.threads
            speed.alone += result["alone"] * engine.threads
            bar.update(sizes[result["piece"]])


def _write(engine: Serial, cfg: PrepareConfig, split: Split, pieces: int, speed: Speed) -> None:
    """Writes the shards of a split that are not there yet."""
    from tqdm import tqdm

    if not split.sequences:
        return
    job, folder = engine.job, cfg.output / split.name
    folder.mkdir(parents=True, exist_ok=True)
    record = record_type(job.seq_len, job.tokens)
    counts = np.zeros(job.buckets, dtype=np.int64)
    for piece in range(pieces):
        counts += RunFile(job.path(piece, split.name), record).counts()
    starts = np.concatenate([[0], np.cumsum(counts)])
    ranks = shard_ranks(split.sequences, cfg.sequences_per_shard, FEWEST_SHARDS)
    number = len(ranks) - 1
    size = min(max(1, number // (engine.workers * SPANS_PER_WORKER)), MOST_SHARDS_PER_SPAN)
    spans = missing_shards(folder, number, size)
    with tqdm(total=sum(last - first for first, last in spans), unit="shard", desc=f"write {split.name}") as bar:
        for result in engine.run(write_span, [(split.name, pieces, starts, ranks, span) for span in spans]):
            speed.writing += result["seconds"]
            bar.update(result["shards"])
    split.shards = [Shard(str(shard_path(folder, i)), (ranks[i + 1] - ranks[i]).item()) for i in range(number)]


def _logits(cfg: PrepareConfig, job: Job) -> TeacherLogits | None:
    """What a teacher is to write, where one is asked: said before work is done, so that what does not fit is too."""
    if not cfg.teaching.teacher:
        return None
    from open_lm_linear.data.stream import DataConfig
    from open_lm_linear.data.teach import logits_of

    reset = cfg.teaching.reset_state_at_document
    data = DataConfig(reset_state_at_document=reset, document_separator=job.eod if reset else None)
    return logits_of(cfg.teaching, data, {"vocab_size": job.vocab_size, "tokenizer": cfg.tokenizer}, str(cfg.output))


def _taught(cfg: PrepareConfig, split: Split, logits: TeacherLogits | None) -> dict[str, Any]:
    """Writes the teacher's logits into the training shards; for their card."""
    if logits is None:
        return {}
    from open_lm_linear.data.teach import teach_shards

    teach_shards(split.shards, cfg.output / split.name, cfg.teaching, logits)
    print(logits.summary())
    return {"teacher": dataclasses.asdict(logits)}


def _card(cfg: PrepareConfig, split: Split, val: Split, job: Job, inputs: list[Input]) -> dict[str, Any]:
    return {
        "split": split.name,
        "tokenizer": cfg.tokenizer,
        "tokenizer_sha256": job.tokenizer_id,
        "vocab_size": job.vocab_size,
        "seq_len": cfg.seq_len,
        "eod_token_id": job.eod,
        "sample_format": cfg.sample_format,
        "documents": split.documents,
        "characters": split.characters,
        "tokens": split.sequences * (cfg.seq_len + 1),
        "tokens_dropped": split.tokens - split.sequences * (cfg.seq_len + 1),
        "tokens_per_document": split.tokens_per_document(),
        "sequences": split.sequences,
        "heldout_documents": val.documents,
        "heldout_sequences": val.sequences,
        "shuffle_seed": cfg.seed,
        "inputs": [{"path": entry.path, "size": entry.size} for entry in inputs],
    }


def summary(cfg: PrepareConfig, splits: dict[str, Split], seconds: float) -> str:
    """What was written, one line per split, and the speed in tokens per second."""
    lines = []
    for split in splits.values():
        where = cfg.output / split.name / MANIFEST if split.shards else "nothing: too little text for one sequence"
        lines.append(
            f"{split.name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.sequences:,} sequences "
            f"in {len(split.shards)} shards -> {where}"
        )
    tokens = sum(split.tokens for split in splits.values())
    lines.append(f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")
    return "\n".join(lines)


@command
def main() -> None:
    given = flags_in(sys.argv[1:])
    argv = [*sys.argv[1:], *(["--input"] if "dataset" in given and "input" not in given else [])]
    cfg = parse(
        PrepareConfig,
        argv,
        prog="python -m open_lm_linear.data.prepare",
        description="Turns text into shards of tokens for training and validation.",
    )
    start = time.perf_counter()
    speed = Speed()
    splits = prepare(cfg, speed)
    print("\n".join([summary(cfg, splits, time.perf_counter() - start), *speed.lines()]))


if __name__ == "__main__":
    main()
