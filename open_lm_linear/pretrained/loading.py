"""Weights into a model, sharded or not, and the initial values of what a checkpoint does not have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig, ModelSection
from open_lm_linear.cache import cache_folder
from open_lm_linear.cli import UserError
from open_lm_linear.heap import in_memory
from open_lm_linear.model import Transformer, read_config, swap
from open_lm_linear.parallel import Context, ParallelConfig, apply, put, put_rows, storage
from open_lm_linear.pretrained.matching import Match, Recipe, match, require_equal
from open_lm_linear.pretrained.sources import TORCH_SUFFIXES, Source, open_source
from open_lm_linear.stages import stage_folders

Tensor = torch.Tensor


def load_pretrained(
    source: str | Path,
    attn_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    model: str = "",
    **changes: Any,
) -> Transformer:
    """A pretrained model in our definition, with another attention where asked (the swap).

    Args:
        source: a preset (``smollm2``, ``mistral``, ``llama2``, ``llama3``), a path, a URL or a hub id: see
            ``open_source``.
        attn_name: the attention to swap in; None keeps the checkpoint's.
        seed: for the parameters that the checkpoint does not have.
        model: the architecture of weights that do not say their own (an OpenLM ``.pt``).
        changes: fields of the config or options of the attention, such as ``seq_len=4096`` or ``use_decay=False``.

    Raises:
        UserError: one sentence on what cannot be read, represented or matched.
    """
    opened = open_source(str(source), model)
    with torch.device("meta"):
        made = Transformer(swap(opened.config, attn_name, **changes))
    matched = match(made, opened)  # before memory is taken
    made = in_memory(made.to(dtype), device)
    load_weights(made, opened, seed, matched)
    return made.eval()


def build_model(
    section: ModelSection, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> Transformer:
    """The model of a run as it stands before its first step: pretrained, its attention swapped, or from scratch."""
    if section.pretrained:
        chosen, attn_name = section.pretrained, section.attn_name or None
        return load_pretrained(chosen, attn_name, dtype, device, seed, section.model, **section.changes())
    with torch.device("meta"):
        model = Transformer(read_config(section.model, section.attn_name or None, **section.changes()))
    model = in_memory(model.to(dtype), device)
    initialise(model, seed)
    return model.eval()


def materialise(
    model: Transformer, source: Source | None, cfg: ParallelConfig, ctx: Context, seed: int = 0
) -> Transformer:
    """A model of the meta device cut over the ranks and filled: from the checkpoint, without one from ``seed``."""
    model = apply(model, cfg, ctx)
    model.to_empty(device=storage(cfg, ctx))
    if source is not None:
        load_weights(model, source, seed)
    else:
        initialise(model, seed)
    return model


def load_weights(model: Transformer, source: Source, seed: int = 0, matched: Match | None = None) -> Match:
    """Fills every parameter of ``model`` from the checkpoint, and the new ones from ``seed``.

    A sharded parameter takes from the file the rows of this rank's shard and no others; no rank ever holds more than
    its shards and a block of rows.

    Raises:
        UserError: a missing, an unexpected or a mis-shaped tensor, by its key; one whose checksum is not what it was.
    """
    matched = matched or match(model, source)
    if source.checksums and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        verify_checksums(source)
    require_equal(source, matched.tied)
    params = dict(model.named_parameters())
    for name, recipe in matched.kept.items():
        put_rows(params[name], recipe.read)
    for name, value in new_values(model.config, seed, set(matched.new)):
        put(params[name], value)
    return matched


def verify_checksums(source: Source) -> None:
    """Reads every tensor of a converted copy as it lies on the disk and compares it with what was written.

    Raises:
        UserError: a tensor has changed since.
    """
    for name, expected in source.checksums.items():
        if name in source.reader.names() and checksum(Recipe(source.reader, (name,))) != expected:
            raise UserError(
                f"{source.reader.where(name)} is not what the conversion wrote (its SHA-256 differs): the copy is "
                "damaged; convert the original again."
            )


def checksum(recipe: Recipe) -> str:
    """SHA-256 of a tensor's bytes, little-endian and in order, block by block."""
    digest = hashlib.sha256()
    for rows in recipe.rows():
        digest.update(as_bytes(rows))
    return digest.hexdigest()


def as_bytes(rows: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return rows.detach().contiguous().flatten().view(torch.uint8).numpy().data


def initialise(model: Transformer, seed: int) -> None:
    """Initialises all parameters, sharded or not, as a function of (seed, name) alone."""
    params = dict(model.named_parameters())
    for name, value in new_values(model.config, seed, set(params)):
        put(params[name], value)


def new_values(config: ModelConfig, seed: int, only: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The initial values of the parameters ``only``, one part of the model at a time.

    Each part is drawn whole on the CPU from its own seed, so the values depend neither on the number of ranks nor on
    sharding or the device.
    """
    if not only:
        return
    with torch.device("meta"):
        twin = Transformer(config)
    left = set(only)
    for prefix, part in _parts(twin):
        names = [n for n, _ in part.named_parameters() if f"{prefix}.{n}" in left]
        if not names:
            continue
        left -= {f"{prefix}.{n}" for n in names}
        part.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{prefix}".encode()).digest()[:7], "big"))
            twin.init_part(part)
        for name in names:
            yield f"{prefix}.{name}", part.get_parameter(name).detach()
        part.to("meta")  # one part in memory at a time


def _parts(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are drawn each by itself, the inner before the outer: where both hold a parameter, the first
    draws it."""
    for name, child in model.named_children():
        if name != "layers":
            yield name, child
            continue
        for i, block in enumerate(model.layers):
            for part, module in block.named_children():
                for inner, child in module.named_children():
                    if hasattr(child, "init_weights"):
                        yield f"layers.{i}.{part}.{inner}", child
                yield f"layers.{i}.{part}", module


def load_tokenizer(source: str | Path) -> Any:
    """The transformers tokenizer that belongs to a preset, a run folder, a Hugging Face folder or hub id, or a GGUF.

    Raises:
        UserError: no tokenizer there.
    """
    from transformers import AutoTokenizer

    place, options = tokenizer_source(source)
    # To read a tokenizer out of a GGUF takes transformers ten seconds; what came of it is kept beside a cached file.
    kept = Path(place) / "tokenizer"
    cached = bool(options) and cache_folder() in kept.parents
    try:
        if cached and (kept / "tokenizer_config.json").exists():
            return AutoTokenizer.from_pretrained(str(kept))
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
        if cached:
            tokenizer.save_pretrained(kept)
        return tokenizer
    except Exception as error:  # transformers raises many kinds for one fact: there is no tokenizer it can read
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no tokenizer can be read from {str(source)!r}: {reason}") from error


def tokenizer_source(source: str | Path) -> tuple[str, dict[str, Any]]:
    """What ``AutoTokenizer.from_pretrained`` takes for ``source``."""
    path = Path(source)
    for folder in (stage_folders(path)[-1], path.parent.parent):  # a run folder, or a checkpoint inside one
        if (folder / "tokenizer_config.json").exists():
            return str(folder), {}
    weights_alone = path.is_file() and path.suffix in TORCH_SUFFIXES
    found = None if weights_alone else open_source(str(source)).tokenizer()
    if found is None:
        raise UserError(f"{source} holds no tokenizer: give the run folder, or --tokenizer.")
    return found


def describe(config: ModelConfig) -> str:
    """One line on an architecture, for logs."""
    heads = f"{config.n_heads} heads ({config.kv_heads} key-value), head_dim {config.qk_dim}, "
    return (
        f"{config.n_layers} layers, hidden {config.hidden_dim}, "
        f"{heads if attention.resolve(config.attn_name).has_heads else ''}"
        f"vocabulary {config.vocab_size}, {config.attn_name} attention"
    )
