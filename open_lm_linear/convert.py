"""Brings a checkpoint of any format into ours or into Hugging Face's, its attention swapped where asked, and proves it.

    python -m open_lm_linear.convert SOURCE DESTINATION [--attn-name linear] [--plan]
    python -m open_lm_linear.convert --verify SOURCE

Tensors stream by blocks of rows from the source into the copy; neither is ever in memory. Everything that can be
refused is refused from the headers, before a byte is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from open_lm_linear.architecture import ModelSection
from open_lm_linear.cli import UserError, command, flags_in, parse, peek
from open_lm_linear.config import options_class
from open_lm_linear.metrics import human_bytes

if TYPE_CHECKING:
    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.pretrained.copies import Job

PROG = "python -m open_lm_linear.convert"


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
    """Compare our logits with those of transformers on the same weights, layer by layer."""
    format: Literal["openlm", "hf"] = "openlm"
    """openlm: a checkpoint of ours, in OpenLM's keys. hf: what transformers loads without us (softmax and Mamba)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. auto: each tensor's own (float32 where it was quantised)."""
    seed: int = 0
    """Of the parameters that a swap adds."""
    overwrite: bool = False
    """Replace a converted copy that is in the folder."""
    max_shard_gb: float = 5.0
    """Most gigabytes of one file."""
    text: str = ""
    """--verify: a UTF-8 file to run on. Empty: a page of the Python documentation."""
    tokens: int = 512
    """--verify: tokens of it."""
    layers: int = 0
    """--verify: compare models of the first so many layers. 0: all, or as many as memory takes."""
    model: ModelSection = field(default_factory=ModelSection)
    """The model."""


# ---- the plan ------------------------------------------------------------------------------------------------------

GROUPS = (
    ("token embeddings", ("tok_embeddings.", "post_embed_norm.")),
    ("feature maps", ("_totrain_embed",)),
    ("query and key norms", ("q_norm.", "k_norm.")),
    ("attention projections", ("in_proj.", "out_proj.")),
    ("state spaces", (".conv1d.", ".x_proj.", ".dt_proj.", ".A_log", ".attention.D")),
    ("feed-forward", (".feed_forward.",)),
    ("norms", ("norm.",)),
    ("output", ("output.",)),
)


def plan_text(job: Job) -> str:
    """What a conversion will do, for people: the architecture, every group of parameters, the swap's changes, sizes."""
    from open_lm_linear.pretrained.loading import describe
    from open_lm_linear.pretrained.matching import changes_of

    source, config = job.source, job.model.config
    lines = [
        f"source: {source.name} ({source.family})",
        f"model: {describe(config)}",
        "config: " + json.dumps(_spelt(config)),
        "",
        *_table(job),
        "",
        *(f"change: {change}" for change in changes_of(source, config)),
        *(f"note: {note}" for note in source.notes),
        f"to write: {human_bytes(job.nbytes)}",
        f"memory: converting takes about {human_bytes(_peak(job))} beyond the interpreter's; "
        f"loading takes {human_bytes(4 * _parameters(job))} in float32, {human_bytes(2 * _parameters(job))} in "
        "bfloat16, under --fsdp divided by the ranks",
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
        count = math.prod(recipe.shape)
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


def _peak(job: Job) -> int:
    """Bytes that converting takes, about: blocks of rows on the way, and a new part of the model as it is drawn."""
    from open_lm_linear.pretrained.matching import BLOCK_BYTES

    parts: dict[str, int] = {}
    fresh = {name.rsplit(".", 2)[0] if "_totrain" in name else name.rsplit(".", 1)[0] for name in job.match.new}
    for name, param in job.model.named_parameters():
        part = next((p for p in fresh if name.startswith(p + ".")), None)
        if part is not None:
            parts[part] = parts.get(part, 0) + 4 * param.numel()
    return 6 * BLOCK_BYTES + 3 * max(parts.values(), default=0)  # torch draws with temporaries


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
    import torch

    from open_lm_linear.pretrained import open_source
    from open_lm_linear.pretrained.copies import check_folder, convert, prepare

    if args.destination and not args.plan:
        check_folder(Path(args.destination).resolve(), args.overwrite)

    source = open_source(args.source, args.model.model)
    if args.verify:
        from open_lm_linear import parity

        print(parity.verify(source, text=args.text, tokens=args.tokens, layers=args.layers, **changes))
        if not args.destination and not args.plan:
            return
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    job = prepare(source, args.model.attn_name or None, format=args.format, dtype=dtype, seed=args.seed, **changes)
    print(plan_text(job))
    if args.plan:
        return
    done = convert(job, args.destination, overwrite=args.overwrite, max_shard_bytes=int(args.max_shard_gb * 10**9))
    rate = done.nbytes / 1e6 / done.seconds
    print(
        f"{done.folder}: {human_bytes(done.nbytes)} in {done.files} file{'s' * (done.files > 1)}, written and read "
        f"back with equal SHA-256 in {done.seconds:.1f} s ({rate:,.0f} MB/s)"
    )


if __name__ == "__main__":
    command(main)()
