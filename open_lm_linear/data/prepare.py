"""Text -> shards: ``python -m open_lm_linear.data.prepare --input a.txt b.jsonl.zst --tokenizer NAME --output DIR``.

Documents are tokenised, joined with the end-of-document token after each, cut into sequences of seq_len + 1 tokens that
do not overlap, and shuffled. Whole documents are kept aside for validation.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.data.manifest import CARD, MANIFEST, Shard, write_manifest
from open_lm_linear.data.shards import write_shard

TEXT = (".txt", ".md", ".rst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".xz", ".zst")
BUCKETS = 100  # the shuffle holds one of these in memory: a hundredth of the corpus, at 4 bytes a token
FEWEST_SHARDS = 4  # even little data is cut into some shards
BATCH_CHARACTERS = 1_000_000  # text handed to the tokenizer at once


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare."""

    input: tuple[str, ...]
    """Text files (.txt .md .rst, one document each) or JSON lines (.jsonl .ndjson .json), plain or .gz .xz .zst."""
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
    """Key of the text in JSON lines."""
    seed: int = 0
    """Seed of the shuffle."""
    overwrite: bool = False
    """Replace what an earlier run wrote to the output folder."""


class Packer:
    """Joins documents, with the end-of-document token after each, and cuts sequences of seq_len + 1 tokens."""

    def __init__(self, seq_len: int, eod: int) -> None:
        self.length, self.eod = seq_len + 1, np.array([eod], dtype=np.int32)
        self.rest = np.empty(0, dtype=np.int32)

    def add(self, tokens: Iterable[int]) -> np.ndarray:
        """The sequences that this document completes, int32 (any number, seq_len + 1)."""
        joined = np.concatenate([self.rest, np.asarray(tokens, dtype=np.int32), self.eod])
        whole = len(joined) // self.length * self.length
        self.rest = joined[whole:]
        return joined[:whole].reshape(-1, self.length)


def pack(token_lists: Iterable[Iterable[int]], seq_len: int, eod: int) -> Iterator[np.ndarray]:
    """Sequences, int32 (seq_len + 1,), of the documents' tokens; what is left at the end is dropped.

    Consecutive sequences do not overlap: joined, they are the start of doc_0 eod doc_1 eod ...
    """
    packer = Packer(seq_len, eod)
    for tokens in token_lists:
        yield from packer.add(tokens)


def held_out(text: str, share: float) -> bool:
    """Whether a document is kept for validation: a pure function of its text, true for ``share`` of all texts."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Bucket:
    """A shuffle on disk: sequences are thrown into files at random, and each file is shuffled in memory when read."""

    def __init__(self, folder: Path, seq_len: int, seed: int) -> None:
        self.folder, self.length = folder, seq_len + 1
        self.random = np.random.Generator(np.random.Philox(seed % 2**64))
        self.files: dict[int, io.BufferedWriter] = {}
        self.count = 0
        folder.mkdir()

    def add(self, sequences: np.ndarray) -> None:
        """Takes int32 (n, seq_len + 1)."""
        for sequence, number in zip(sequences, self.random.integers(BUCKETS, size=len(sequences)), strict=True):
            if number not in self.files:
                self.files[number] = (self.folder / str(number)).open("wb")
            self.files[number].write(sequence.tobytes())
        self.count += len(sequences)

    def shuffled(self) -> Iterator[np.ndarray]:
        """All sequences, int32 (seq_len + 1,), in an order fixed by the seed; the files are removed on the way."""
        for number in sorted(self.files):
            self.files[number].close()
            path = self.folder / str(number)
            sequences = np.fromfile(path, dtype=np.int32).reshape(-1, self.length)
            path.unlink()
            yield from sequences[self.random.permutation(len(sequences))]


@dataclass
class Split:
    """The documents of one side, training or validation, on their way to shards."""

    name: str
    packer: Packer
    bucket: Bucket
    documents: int = 0
    tokens: int = 0
    shards: list[Shard] = field(default_factory=list)

    def add(self, tokens: list[int]) -> None:
        self.documents += 1
        self.tokens += len(tokens) + 1  # with its end-of-document token
        self.bucket.add(self.packer.add(tokens))

    def write(self, folder: Path, sequences_per_shard: int) -> None:
        """Writes the shards, of equal size within one sequence."""
        total = self.bucket.count
        number_of_shards = min(total, max(FEWEST_SHARDS, -(-total // sequences_per_shard)))
        sequences = self.bucket.shuffled()
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(number_of_shards):
            first, last = (total * n // number_of_shards for n in (number, number + 1))
            path = folder / f"shard-{number:05d}.tar"
            write_shard(path, (next(sequences) for _ in range(last - first)), first_key=first)
            self.shards.append(Shard(str(path), last - first))


def documents(paths: Iterable[str], text_key: str, bar: Any) -> Iterator[str]:
    """The text of every document, in order; ``bar`` (a tqdm) follows the bytes read.

    Raises:
        UserError: a file is unreadable, or a line of JSON lines is malformed or lacks ``text_key``.
    """
    import fsspec

    for path in paths:
        done = bar.n
        with fsspec.open(path, "rb") as raw:
            try:
                for text in _documents(path, _decompress(path, raw), text_key):
                    bar.update(done + raw.tell() - bar.n)
                    if text.strip():
                        yield text
            except (OSError, EOFError, zlib.error, lzma.LZMAError, _zstd_error()) as error:
                raise UserError(f"cannot read {path} ({error}): copy the file again.") from error


def _documents(path: str, file: io.BufferedIOBase, text_key: str) -> Iterator[str]:
    if _kind(path) in TEXT:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first.") from None
        yield text
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _text_of(line, f"{path} line {number}", text_key)


def _text_of(line: bytes, where: str, text_key: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): each line must be one JSON object.") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not a JSON object: each line must be one, with the text under {text_key!r}.")
    if text_key not in entry:
        raise UserError(f"{where} has no key {text_key!r}: set --text-key to one of {', '.join(entry) or 'none'}.")
    if not isinstance(entry[text_key], str):
        raise UserError(
            f"{where} has under {text_key!r} no string but {json.dumps(entry[text_key])[:40]}: set --text-key."
        )
    return entry[text_key]


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


def _kind(path: str) -> str:
    """The extension under the compression's: ``a.jsonl.zst`` -> .jsonl"""
    stem, extension = os.path.splitext(path)
    return os.path.splitext(stem)[1] if extension in COMPRESSIONS else extension


def find_inputs(inputs: Iterable[str]) -> list[tuple[str, int]]:
    """(path, size in bytes) of every input, before any is read.

    Raises:
        UserError: a file is missing or has an extension that is not read.
    """
    from fsspec.core import url_to_fs

    found = []
    for path in inputs:
        if _kind(path) not in TEXT + JSON_LINES:
            raise UserError(
                f"{path} has an extension that is not read; it must be one of {' '.join(TEXT + JSON_LINES)}, "
                f"plain or with {' '.join(COMPRESSIONS)}."
            )
        filesystem, name = url_to_fs(path)
        if not filesystem.isfile(name):
            raise UserError(f"no input file at {path}: check the path.")
        found.append((path, filesystem.size(name) or 0))
    return found


def tokenise(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    """(text, its tokens) of every document, encoded in batches and without special tokens."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield from zip(batch, _encode(batch, tokenizer), strict=True)
            batch, characters = [], 0
    if batch:
        yield from zip(batch, _encode(batch, tokenizer), strict=True)


def _encode(batch: list[str], tokenizer: Any) -> list[list[int]]:
    encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def prepare(cfg: PrepareConfig) -> dict[str, Split]:
    """Does what the command does; returns the splits ``train`` and ``val`` as they were written.

    Raises:
        UserError: bad settings or inputs, an output folder already in use, or too little text for one sequence.
    """
    from tqdm import tqdm

    from open_lm_linear.pretrained import load_tokenizer

    _check_settings(cfg)
    inputs = find_inputs(cfg.input)
    tokenizer = load_tokenizer(cfg.tokenizer)
    eod = tokenizer.eos_token_id
    if eod is None:
        raise UserError(f"the tokenizer {cfg.tokenizer} has no end-of-text token, which must part the documents.")
    cfg.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cfg.output, prefix="shuffle-") as folder:
        train, val = (
            Split(name, Packer(cfg.seq_len, eod), Bucket(Path(folder) / name, cfg.seq_len, cfg.seed))
            for name in ("train", "val")
        )
        with tqdm(total=sum(size for _, size in inputs), unit="B", unit_scale=True, desc="tokenise") as bar:
            texts = documents((path for path, _ in inputs), cfg.text_key, bar)
            for text, tokens in tokenise(texts, tokenizer):
                (val if held_out(text, cfg.holdout_documents) else train).add(tokens)
            bar.update(bar.total - bar.n)
        if not train.bucket.count:
            raise UserError(
                f"too little text: {train.tokens} training tokens do not fill one sequence of {cfg.seq_len + 1}; give "
                "more text, or a smaller --seq-len."
            )
        for split in (train, val):
            _remove_old(cfg.output / split.name)
        for split in (train, val):
            if split.bucket.count:
                split.write(cfg.output / split.name, cfg.sequences_per_shard)
                card = _card(cfg, split, val, len(tokenizer), eod)
                write_manifest(cfg.output / split.name / MANIFEST, split.shards, card)
    return {"train": train, "val": val}


def _check_settings(cfg: PrepareConfig) -> None:
    if cfg.seq_len < 1 or cfg.sequences_per_shard < 1:
        raise UserError("--seq-len and --sequences-per-shard must be at least 1.")
    if not 0 <= cfg.holdout_documents < 1:
        raise UserError(f"--holdout-documents {cfg.holdout_documents} is a share and must be at least 0 and below 1.")
    for name in ("train", "val"):
        manifest = cfg.output / name / MANIFEST
        if manifest.exists() and not cfg.overwrite:
            raise UserError(f"{manifest} exists: choose another --output, or pass --overwrite to replace that data.")


def _remove_old(folder: Path) -> None:
    """The manifest goes first, so that a run stopped here leaves no manifest without its shards."""
    for path in [folder / MANIFEST, folder / CARD, *folder.glob("shard-*.tar")]:
        path.unlink(missing_ok=True)


def _card(cfg: PrepareConfig, split: Split, val: Split, vocab_size: int, eod: int) -> dict[str, Any]:
    return {
        "split": split.name,
        "tokenizer": cfg.tokenizer,
        "vocab_size": vocab_size,
        "seq_len": cfg.seq_len,
        "eod_token_id": eod,
        "documents": split.documents,
        "tokens": split.bucket.count * (cfg.seq_len + 1),
        "sequences": split.bucket.count,
        "heldout_documents": val.documents,
        "heldout_sequences": val.bucket.count,
        "shuffle_seed": cfg.seed,
    }


def summary(cfg: PrepareConfig, splits: dict[str, Split], seconds: float) -> str:
    """What was written, one line per split, and the speed in tokens per second."""
    lines = []
    for split in splits.values():
        where = cfg.output / split.name / MANIFEST if split.shards else "nothing: too little text for one sequence"
        lines.append(
            f"{split.name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bucket.count:,} sequences "
            f"in {len(split.shards)} shards -> {where}"
        )
    tokens = sum(split.tokens for split in splits.values())
    lines.append(f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")
    return "\n".join(lines)


@command
def main() -> None:
    cfg = parse(
        PrepareConfig,
        prog="python -m open_lm_linear.data.prepare",
        description="Turns text into shards of tokens for training and validation.",
    )
    start = time.perf_counter()
    splits = prepare(cfg)
    print(summary(cfg, splits, time.perf_counter() - start))


if __name__ == "__main__":
    main()
