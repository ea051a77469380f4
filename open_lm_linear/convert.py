"""Brings a checkpoint of any format into ours or into Hugging Face's, its attention swapped where asked, and proves it.

    python -m open_lm_linear.convert SOURCE DESTINATION [--attn-name linear] [--plan]
    python -m open_lm_linear.convert --verify SOURCE

Tensors stream by blocks of rows from the source into the copy; neither is ever in memory. Everything that can be
refused is refused from the headers, before a byte is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from open_lm_linear.architecture import ModelSection
from open_lm_linear.cli import UserError, command, flags_in, parse, peek
from open_lm_linear.config import options_class
from open_lm_linear.metrics import human_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.model import Transformer
    from open_lm_linear.pretrained.matching import Match
    from open_lm_linear.pretrained.sources import Source

PROG = "python -m open_lm_linear.convert"
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ConvertArgs:
    """Bring a checkpoint of any format into ours or Hugging Face's."""

    source: tyro.conf.Positional[str]
    """A preset (smollm2, mistral, llama2, llama3), folder, file, URL, or hub id (owner/name@revision)."""
    destination: tyro.conf.Positional[str] = ""
    """Folder to write."""
    plan: bool = False
    """Read the headers alone and print what would be done."""
    verify: bool = False
    """Compare our softmax logits with those of transformers on the same weights, layer by layer."""
    format: Literal["openlm", "hf"] = "openlm"
    """openlm: a checkpoint of ours, in OpenLM's keys. hf: what transformers loads without us (softmax models)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. auto: each tensor's own (float32 where it was quantised)."""
    seed: int = 0
    """Of the parameters that a swap adds."""
    overwrite: bool = False
    """Replace a converted copy that is in the folder."""
    max_shard_gb: float = SHARD_BYTES / 1e9
    """Most gigabytes of one file."""
    text: str = ""
    """--verify: a UTF-8 file to run on. Empty: a page of the Python documentation."""
    tokens: int = 512
    """--verify: tokens of it."""
    layers: int = 0
    """--verify: compare models of the first so many layers. 0: all, or as many as memory takes."""
    model: ModelSection = field(default_factory=ModelSection)
    """The model."""


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
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


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
    import torch

    from open_lm_linear.model import Transformer, swap
    from open_lm_linear.pretrained.families import to_hugging_face
    from open_lm_linear.pretrained.matching import in_layout, match

    config = swap(source.config, attn_name, **changes)
    if format == "hf":
        config = in_layout(config, "rotary")
    with torch.device("meta"):
        model = Transformer(config)
    matched = match(model, source)
    table: Mapping[str, tuple[str, ...]] = {}
    values: dict[str, Any] = model.config.to_json()
    if format == "hf":
        if model.config.attn_name != "softmax":
            raise UserError(
                "--format hf writes softmax models, which transformers knows: export a linear one with "
                "`python -m open_lm_linear.hf.export`."
            )
        family, values = to_hugging_face(model.config, source.family)
        values |= _special_tokens(source, model.config.vocab_size)
        table = family.table(config.n_layers)
    items = [item for name in dict(model.named_parameters()) for item in _items(model, matched, name, table, dtype)]
    if format == "hf":
        values["dtype"] = str(max(items, key=lambda item: item.nbytes).dtype).removeprefix("torch.")
    return Job(source, model, matched, items, values, format, seed)


def _special_tokens(source: Source, vocab_size: int) -> dict[str, Any]:
    """The ids that begin, end and pad: the source's config has them, or its tokenizer; a config's defaults are others."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if source.hugging_face is not None:
        return {name: source.hugging_face.get(name) for name in names}
    if source.tokenizer() is None:
        return dict.fromkeys(names)
    from open_lm_linear.pretrained.loading import load_tokenizer

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
    sizes = [shape[0]]
    if len(names) > 1:
        c = model.config
        q, k = c.n_heads * c.qk_dim, c.kv_heads * c.qk_dim
        sizes = [q, k, c.kv_heads * c.v_dim] if "in_proj" in name else [shape[0] // 2] * 2
    begin = 0
    for theirs, size in zip(names, sizes, strict=True):
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
        RuntimeError: what lies on the disk is not what was written.
    """
    import time

    folder = Path(folder).resolve()
    check_folder(folder, overwrite)
    room = shutil.disk_usage(_existing(folder)).free
    if room < job.nbytes + (64 << 20):
        raise UserError(f"{folder} needs {human_bytes(job.nbytes)} and the disk has {human_bytes(room)} left.")
    began = time.perf_counter()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        from open_lm_linear.pretrained.matching import require_equal

        require_equal(job.source, job.match.tied)
        shards = _shards(job.items, max_shard_bytes)
        checksums = _write(job, partial, shards)
        _read_back(partial, checksums)
        _write_records(job, partial, shards, checksums)
        _keep_tokenizer(job.source, partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(folder, job.nbytes, len(shards), time.perf_counter() - began)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError where a copy cannot be written to ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to write.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{folder} is not empty: give another folder, or --overwrite to replace the copy in it.")
    if not (folder / "state.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no converted copy, and --overwrite replaces nothing else: give another folder.")


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
    from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter

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
        from open_lm_linear.pretrained.loading import new_values

        self.match = job.match
        self.fresh = new_values(job.model.config, job.seed, set(job.match.new))

    def of(self, item: Item) -> Iterator[Tensor]:
        if item.parameter in self.match.kept:
            yield from self.match.kept[item.parameter].rows(item.begin, item.end)
            return
        name, value = next(self.fresh)
        assert name == item.parameter, (name, item)
        yield value


def _read_back(folder: Path, checksums: Mapping[str, str]) -> None:
    """Compares what lies on the disk with what was written, tensor by tensor."""
    from open_lm_linear.pretrained.safetensors_files import tensor_checksums

    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= tensor_checksums(path)
    if odd := sorted(name for name in {*found, *checksums} if found.get(name) != checksums.get(name)):
        raise RuntimeError(f"{odd[0]!r} does not read back from the disk as it was written; nothing was put in place.")


def _write_records(job: Job, folder: Path, shards: dict[str, list[Item]], checksums: Mapping[str, str]) -> None:
    from open_lm_linear.pretrained.sources import INDEX

    if len(shards) > 1:
        weight_map = {item.name: file for file, items in shards.items() for item in items}
        index = {"metadata": {"total_size": job.nbytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
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
        "tokens": 0,
        "seconds": 0.0,
        "config": {"pretrained": job.source.name},
        "family": job.source.family,
        "notes": job.source.notes,
        "untrained": untrained,
        "files": sizes,
        "sha256": dict(checksums),
    }
    (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n")


def _keep_tokenizer(source: Source, folder: Path) -> None:
    """Lays the source's tokenizer beside the copy, where it has one."""
    from open_lm_linear.pretrained.loading import load_tokenizer
    from open_lm_linear.pretrained.sources import TOKENIZER_FILES

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


# ---- the plan ------------------------------------------------------------------------------------------------------

GROUPS = (
    ("token embeddings", ("tok_embeddings.", "post_embed_norm.")),
    ("feature maps", ("_totrain_embed",)),
    ("query and key norms", ("q_norm.", "k_norm.")),
    ("attention projections", ("in_proj.", "out_proj.")),
    ("feed-forward", (".feed_forward.",)),
    ("norms", ("norm.",)),
    ("output", ("output.",)),
)


def plan_text(job: Job) -> str:
    """What a conversion will do, for people: the architecture, every group of parameters, the swap's changes, sizes."""
    from open_lm_linear.pretrained.loading import describe

    source, config = job.source, job.model.config
    lines = [
        f"source: {source.name} ({source.family})",
        f"model: {describe(config)}",
        "config: " + json.dumps(_spelt(config)),
        "",
        *_table(job),
        "",
        *(f"change: {change}" for change in changes_of(source.config, config, source.layout)),
        *(f"note: {note}" for note in source.notes),
        f"to write: {human_bytes(job.nbytes)}",
        f"memory: converting takes about {human_bytes(_peak(job))} beyond the interpreter's; "
        f"loading takes {human_bytes(4 * _parameters(job))} in float32, {human_bytes(2 * _parameters(job))} in bfloat16, "
        "under --fsdp divided by the ranks",
    ]
    return "\n".join(lines)


def _spelt(config: ModelConfig) -> dict[str, Any]:
    """The config's JSON without fields that hold their defaults."""
    from open_lm_linear.architecture import ModelConfig

    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    return {k: v for k, v in config.to_json().items() if k not in defaults or (v or None) != (defaults[k] or None)}


def _parameters(job: Job) -> int:
    return sum(p.numel() for p in job.model.parameters())


def _group(name: str) -> str:
    return next((label for label, marks in GROUPS if any(mark in name for mark in marks)), "others")


def _table(job: Job) -> list[str]:
    """Group, what becomes of it, tensors, parameters, bytes as stored (new ones: as written)."""
    rows: dict[tuple[str, str], list[int]] = {}

    def add(name: str, state: str, count: int, nbytes: int) -> None:
        row = rows.setdefault((_group(name), state), [0, 0, 0])
        for i, value in enumerate((1, count, nbytes)):
            row[i] += value

    def stored(name: str, state: str, recipe: Any) -> None:
        count = 1
        for size in recipe.shape:
            count *= size
        add(name, state, count, count * recipe.dtype.itemsize)

    sizes = {item.parameter: item for item in job.items}
    for name, param in job.model.named_parameters():
        if name in job.match.kept:
            stored(name, "kept", job.match.kept[name])
        else:
            add(name, "new", param.numel(), param.numel() * sizes[name].dtype.itemsize)
    for name, recipe in job.match.dropped.items():
        stored(name, "dropped", recipe)
    for name, (recipe, _) in job.match.tied.items():
        stored(name, "tied", recipe)
    if job.model.config.weight_tying and "output.weight" not in job.match.tied:
        add("output.weight", "tied", 0, 0)
    lines = [f"{'group':<22} {'state':<8} {'tensors':>7} {'parameters':>15} {'bytes':>12}"]
    for (label, state), (tensors, count, nbytes) in rows.items():
        lines.append(f"{label:<22} {state:<8} {tensors:>7} {count:>15,} {human_bytes(nbytes):>12}")
    return lines


def changes_of(before: ModelConfig, after: ModelConfig, layout: str) -> list[str]:
    """What a swap or the flags change in the computation, in words."""
    from open_lm_linear import attention

    out = []
    old, new = attention.canonical(before.attn_name), attention.canonical(after.attn_name)
    if old != new:
        out.append(f"attention {old} -> {new}")
        if before.sliding_window and not after.sliding_window:
            out.append(f"the sliding window of {before.sliding_window} tokens is dropped: the state has no window")
        if before.attn_logit_softcap and not after.attn_logit_softcap:
            out.append("the cap of the attention's logits is dropped: there are none")
        if before.rotary_scaling or before.rotary_scale != 1:
            out.append("the rotary scaling is kept")
    for name in ("rotary_scaling", "rotary_scale", "rotary_base_frequency", "seq_len"):
        if getattr(before, name) != getattr(after, name):
            out.append(f"{name} {getattr(before, name)} -> {getattr(after, name)}")
    if {layout, after.positional_embedding_type} == {"rotary", "llama_rotary"}:
        out.append(f"rows of queries and keys reordered, {layout} -> {after.positional_embedding_type}")
    return out


def _peak(job: Job) -> int:
    """Bytes that converting takes: blocks of rows on the way, and a new part of the model as it is drawn."""
    from open_lm_linear.pretrained.matching import BLOCK_BYTES

    parts: dict[str, int] = {}
    fresh = {name.rsplit(".", 2)[0] if "_totrain" in name else name.rsplit(".", 1)[0] for name in job.match.new}
    for name, param in job.model.named_parameters():
        part = next((p for p in fresh if name.startswith(p + ".")), None)
        if part is not None:
            parts[part] = parts.get(part, 0) + 4 * param.numel()
    return 4 * BLOCK_BYTES + max(parts.values(), default=0)


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = options_class(peek(argv, "attn_name"))
    schema: type[ConvertArgs] = ConvertArgs
    if options is not None:
        extra: list[Any] = [("attention", options, field(default_factory=options))]
        schema = dataclasses.make_dataclass("ConvertArgs", extra, bases=(ConvertArgs,), frozen=True)
        schema.__doc__ = ConvertArgs.__doc__
    args = parse(schema, argv, prog=PROG, description=ConvertArgs.__doc__ or "")
    changes = args.model.changes()
    if options is not None:
        flags = {f.name for f in dataclasses.fields(options)} & flags_in(argv)
        changes |= {name: getattr(args.attention, name) for name in flags}  # type: ignore[attr-defined]
    run(args, changes)


def run(args: ConvertArgs, changes: dict[str, Any]) -> None:
    """Does what the command line asks for."""
    if not (args.plan or args.verify or args.destination):
        raise UserError(f"nothing to do: give a folder to write, --plan or --verify; `{PROG} --help` explains.")
    if args.model.pretrained:
        raise UserError("--pretrained is the source, which stands first: leave the flag out.")
    if not 0 < args.max_shard_gb < float("inf"):
        raise UserError(f"--max-shard-gb must be above 0, not {args.max_shard_gb}.")
    if args.destination and not args.plan:
        check_folder(Path(args.destination).resolve(), args.overwrite)
    import torch

    from open_lm_linear.pretrained import open_source

    source = open_source(args.source, args.model.model)
    if args.verify:
        from open_lm_linear import parity

        print(parity.verify(source, text=args.text, tokens=args.tokens, layers=args.layers, **changes))
        if not args.destination and not args.plan:
            return
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    job = prepare(
        source, args.model.attn_name or None, format=args.format, dtype=dtype, seed=args.seed, **changes
    )
    print(plan_text(job))
    if args.plan:
        return
    done = convert(
        job, args.destination, overwrite=args.overwrite, max_shard_bytes=int(args.max_shard_gb * 10**9)
    )
    rate = done.nbytes / 1e6 / done.seconds
    print(
        f"{done.folder}: {human_bytes(done.nbytes)} in {done.files} file{'s' * (done.files > 1)}, written and read back "
        f"with equal SHA-256 in {done.seconds:.1f} s ({rate:,.0f} MB/s)"
    )


if __name__ == "__main__":
    command(main)()
