"""Pretrained weights into our model: strict, one tensor at a time, the attention swapped on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig, ModelSection
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer, read_config, swap
from open_lm_linear.parallel import put
from open_lm_linear.pretrained.presets import PRESETS, Preset, cache_folder
from open_lm_linear.pretrained.sources import Source, open_source

Tensor = torch.Tensor

__all__ = [
    "PRESETS",
    "Preset",
    "Source",
    "build_model",
    "initialise",
    "load_pretrained",
    "load_tokenizer",
    "load_weights",
    "open_source",
]


@dataclass
class Loaded:
    """What a checkpoint gave: names of the parameters kept from it, new to it, and of its own that found no place."""

    kept: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def load_pretrained(
    source: str | Path,
    attn_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **changes: Any,
) -> Transformer:
    """A pretrained model in our definition, with another attention where asked (the swap).

    Args:
        source: a preset (``smollm2``, ``mistral``, ``llama2``, ``llama3``), a run or checkpoint folder of ours, a
            Hugging Face folder or hub id, a GGUF file.
        attn_name: the attention to swap in; None keeps the checkpoint's.
        seed: for the parameters that the checkpoint does not have.
        changes: fields of the config or options of the attention, such as ``seq_len=4096`` or ``use_decay=False``.

    Raises:
        UserError: one sentence on what cannot be read, represented or matched.
    """
    opened = open_source(source)
    with torch.device("meta"):
        model = Transformer(swap(opened.config, attn_name, **changes))
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, opened, seed)
    return model.eval()


def build_model(
    section: ModelSection, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> Transformer:
    """The model of a run as it stands before its first step: pretrained, its attention swapped, or from scratch."""
    if section.pretrained:
        return load_pretrained(section.pretrained, section.attn_name or None, dtype, device, seed, **section.changes())
    with torch.device("meta"):
        model = Transformer(read_config(section.model, section.attn_name or None, **section.changes()))
    model = model.to(dtype).to_empty(device=device)
    initialise(model, seed)
    return model.eval()


def is_swap(model: Transformer, source: Source) -> bool:
    """Whether the model has another attention than the checkpoint."""
    return model.config.attn_name != attention.canonical(source.config.attn_name)


def load_weights(model: Transformer, source: Source, seed: int = 0) -> Loaded:
    """Fills every parameter of ``model``, sharded or not: from the checkpoint, and the new ones from ``seed``.

    Missing keys must be exactly those that a swapped-in attention declares as new.

    Raises:
        UserError: a missing, an unexpected or a mis-shaped tensor, by its key.
    """
    params = dict(model.named_parameters())
    swapped = is_swap(model, source)
    loaded = Loaded()
    available = source.reader.names()
    keys = source.keys or {name: (name,) for name in available}
    dropped = {f"layers.{i}.attention.{k}" for i, b in enumerate(model.blocks()) for k in b.attention.dropped_keys()}
    for ours, theirs in keys.items():
        absent = [t for t in theirs if t not in available]
        if ours not in params:
            if absent:
                continue
            if ours == "output.weight" and model.config.weight_tying:
                _require_tied(source, keys)
            elif not (swapped and ours in dropped):
                raise UserError(f"{source.name}: the checkpoint's {theirs[0]!r} has no place in this model ({ours!r}).")
            loaded.dropped.append(ours)
        elif absent:
            raise UserError(f"{source.name}: the tensor {absent[0]!r} is missing from the checkpoint.")
        else:
            _fill(params[ours], _read(source, theirs), f"{source.name}: {theirs[0]!r}")
            loaded.kept.append(ours)
    used = {t for theirs in keys.values() for t in theirs}
    for name in sorted(available - used):
        if not name.endswith("rotary_emb.inv_freq"):  # a buffer of older files, implied by the config
            raise UserError(f"{source.name}: the checkpoint's {name!r} has no place in this model.")
    loaded.new = sorted(set(params) - set(loaded.kept))
    declared = model.new_keys() if swapped else set()
    if undeclared := sorted(set(loaded.new) ^ declared):
        raise UserError(f"{source.name}: {undeclared[0]!r} is not in the checkpoint, and nothing declares it new.")
    initialise(model, seed, only=set(loaded.new))
    return loaded


def initialise(model: Transformer, seed: int, only: set[str] | None = None) -> None:
    """Initialises parameters (all, or those named) as a function of (seed, name) alone.

    Each part is initialised whole on the CPU and every rank keeps its shard, so the values do not depend on the
    number of ranks, on sharding or on the device.
    """
    params = dict(model.named_parameters())
    with torch.device("meta"):
        twin = Transformer(model.config)
    for prefix, part in _parts(twin):
        names = [n for n, _ in part.named_parameters() if only is None or f"{prefix}.{n}" in only]
        if not names:
            continue
        part.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{prefix}".encode()).digest()[:7], "big"))
            twin.init_part(part)
        values = dict(part.named_parameters())
        for name in names:
            _fill(params[f"{prefix}.{name}"], values[name].detach(), f"{prefix}.{name}")
        part.to("meta")  # one part in memory at a time


def _parts(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if name != "layers":
            yield name, child
            continue
        for i, block in enumerate(model.layers):
            for part, module in block.named_children():
                yield f"layers.{i}.{part}", module


def _read(source: Source, names: tuple[str, ...]) -> Tensor:
    parts = [source.reader.read(name) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _require_tied(source: Source, keys: dict[str, tuple[str, ...]]) -> None:
    head, embedding = (_read(source, keys[k]) for k in ("output.weight", "tok_embeddings.weight"))
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise UserError(f"{source.name}: the config ties input and output embeddings, but the checkpoint's differ.")


def _fill(param: Tensor, value: Tensor, what: str) -> None:
    """Copies ``value`` into a parameter of the same shape, sharded or not."""
    if tuple(param.shape) != tuple(value.shape):
        raise UserError(
            f"{what} has shape {tuple(value.shape)} in the checkpoint and {tuple(param.shape)} in the model."
        )
    put(param, value)


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
    for folder in (path, path.parent.parent):  # a run folder, or a checkpoint inside one
        if (folder / "tokenizer_config.json").exists():
            return str(folder), {}
    opened = open_source(source)
    if opened.tokenizer is None:
        raise UserError(f"{source} holds no tokenizer: give the run folder, or --tokenizer.")
    return opened.tokenizer


def describe(config: ModelConfig) -> str:
    """One line on an architecture, for logs."""
    return (
        f"{config.n_layers} layers, hidden {config.hidden_dim}, {config.n_heads} heads ({config.kv_heads} key-value), "
        f"head_dim {config.qk_dim}, vocabulary {config.vocab_size}, {config.attn_name} attention"
    )
