"""Which of a checkpoint's tensors become which of a model's parameters: worked out from headers, before any is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer
from open_lm_linear.pretrained.readers import Reader
from open_lm_linear.pretrained.sources import Source

Tensor = torch.Tensor

BLOCK_BYTES = 16 << 20  # of one read where a tensor streams
# What the config says already.
IMPLIED = (
    "rotary_emb.inv_freq",
    "rope.freqs",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


@dataclass(frozen=True)
class Turn:
    """Another order of the rows of each head, of which the first ``turned`` are rotary pairs.

    Pairs side by side (``llama_rotary``) become pairs half of ``turned`` apart (``rotary``), or back. Only the first
    ``rows`` rows of the tensor, those of queries and keys, are concerned.
    """

    rows: int
    head_dim: int
    turned: int
    to_halves: bool

    def __call__(self, heads: Tensor) -> Tensor:
        """Rows (heads * head_dim, ...) in the other order."""
        split = heads.unflatten(0, (-1, self.head_dim))
        pairs = (
            split[:, : self.turned].unflatten(1, (-1, 2) if self.to_halves else (2, -1)).transpose(1, 2).flatten(1, 2)
        )
        return torch.cat((pairs, split[:, self.turned :]), 1).flatten(0, 1)


@dataclass(frozen=True)
class Recipe:
    """One tensor of ours: the rows of a checkpoint's, several one below the other, perhaps in another order."""

    reader: Reader
    names: tuple[str, ...]
    turn: Turn | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [self.reader.shape(name) for name in self.names]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the parts'."""
        dtype = self.reader.dtype(self.names[0])
        for name in self.names[1:]:
            dtype = torch.promote_types(dtype, self.reader.dtype(name))
        return dtype

    def read(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) on the CPU; of a scalar, all of it."""
        if self.turn is None or begin >= self.turn.rows:
            return self._stacked(begin, end)
        first = begin - begin % self.turn.head_dim
        last = min(-(-end // self.turn.head_dim) * self.turn.head_dim, self.turn.rows)
        rows = self.turn(self._stacked(first, last))[begin - first : end - first]
        return rows if end <= last else torch.cat((rows, self._stacked(last, end)))

    def _stacked(self, begin: int, end: int) -> Tensor:
        if len(self.names) == 1:
            return self.reader.read(self.names[0], begin, end)
        parts, offset = [], 0
        for name in self.names:
            rows = self.reader.shape(name)[0]
            low, high = max(begin - offset, 0), min(end - offset, rows)
            if low < high:
                parts.append(self.reader.read(name, low, high))
            offset += rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Tensor]:
        """Rows [begin, end), to the last unless given, in blocks of at most `BLOCK_BYTES`, one row at the least."""
        shape = self.shape
        end = (shape[0] if shape else 1) if end is None else end
        step = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * self.dtype.itemsize))
        for first in range(begin, end, step):
            yield self.read(first, min(first + step, end))


@dataclass
class Match:
    """What becomes of each tensor: parameters ``kept`` from the checkpoint, ``new`` to it, and its own that find no
    place (``dropped``) or are another one's (``tied``)."""

    kept: dict[str, Recipe] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    dropped: dict[str, Recipe] = field(default_factory=dict)
    tied: dict[str, tuple[Recipe, Recipe]] = field(default_factory=dict)


def is_swap(model: Transformer, source: Source) -> bool:
    """Whether the model has another attention than the checkpoint."""
    return model.config.attn_name != attention.canonical(source.config.attn_name)


def match(model: Transformer, source: Source) -> Match:
    """Finds every parameter's place, by names, shapes and dtypes alone.

    Missing keys must be exactly those that a swapped-in attention declares as new.

    Raises:
        UserError: a missing, an unexpected or a mis-shaped tensor, by its key.
    """
    params = dict(model.named_parameters())
    swapped = is_swap(model, source)
    if swapped:
        _require_heads(model, source)
    available = source.reader.names()
    turns = _Turns(source, model.config)
    result = Match()
    droppable = {f"layers.{i}.attention.{k}" for i, b in enumerate(model.blocks()) for k in b.attention.dropped_keys()}
    missing: list[str] = []
    homeless: list[str] = []
    for ours, theirs in source.keys.items():
        present = [t for t in theirs if t in available]
        if ours not in params and not present:
            continue  # an idle row of the table
        recipe = Recipe(source.reader, theirs, turns.of(ours))
        if ours in params:
            if len(present) < len(theirs):
                missing += [t for t in theirs if t not in available]
                continue
            _require_shapes(recipe, ours, tuple(params[ours].shape), model.config)
            result.kept[ours] = recipe
        elif ours == "output.weight" and model.config.weight_tying:
            result.tied[ours] = (recipe, Recipe(source.reader, source.keys["tok_embeddings.weight"]))
        elif swapped and ours in droppable:
            result.dropped[ours] = recipe
        else:
            homeless += present
    for main, other in source.doubled:
        result.tied[other] = (Recipe(source.reader, (other,)), Recipe(source.reader, (main,)))
    used = {t for theirs in source.keys.values() for t in theirs} | {other for _, other in source.doubled}
    homeless += [name for name in sorted(available - used) if not name.endswith(IMPLIED)]
    result.new = sorted(set(params) - set(result.kept))
    declared = model.new_keys() if swapped else set()
    missing += sorted(name for name in set(result.new) ^ declared if name not in source.keys)
    if missing or homeless:
        raise UserError(f"{source.name}: {_misfits(missing, homeless)}.")
    return result


def _require_heads(model: Transformer, source: Source) -> None:
    """Raises UserError where a swap has nothing to carry over: one of the two has no queries, keys and values."""
    before, after = attention.canonical(source.config.attn_name), model.config.attn_name
    for kind in (attention.resolve(before), *(type(block.attention) for block in model.blocks())):
        if not kind.has_heads:
            raise UserError(
                f"{source.name}: {before} cannot be swapped for {after}: {kind.__name__} has no queries, keys and "
                "values, so no weights carry over; train from scratch with --model."
            )


def _misfits(missing: list[str], homeless: list[str]) -> str:
    def listed(names: list[str]) -> str:
        return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    parts = [f"missing from the checkpoint: {listed(missing)}"] if missing else []
    parts += [f"in the checkpoint and without a place in this model: {listed(homeless)}"] if homeless else []
    return "; ".join(parts)


def part_rows(config: ModelConfig, key: str, parts: int, rows: int) -> list[int]:
    """How a parameter's rows fall to the ``parts`` tensors that other formats have for it: q | k | v, gate | up."""
    if parts == 1:
        return [rows]
    if ".in_proj." in key:
        return [config.n_heads * config.qk_dim, config.kv_heads * config.qk_dim, config.kv_heads * config.v_dim]
    assert ".w12." in key and parts == 2, key
    return [rows // 2] * 2


def _require_shapes(recipe: Recipe, key: str, shape: tuple[int, ...], config: ModelConfig) -> None:
    recipe.dtype  # noqa: B018 (refuses what is no plain weight)
    sizes = part_rows(config, key, len(recipe.names), shape[0]) if shape else [0]
    for name, rows in zip(recipe.names, sizes, strict=True):
        found, wanted = recipe.reader.shape(name), (rows, *shape[1:]) if shape else ()
        if found != wanted:
            where = recipe.reader.where(name)
            raise UserError(f"{where} has shape {found} in the checkpoint, {wanted} in the model.")


class _Turns:
    """Which parameters' rows must be put into another order, since the model turns other pairs than the file's."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self.config, self.to = config, config.positional_embedding_type
        layouts = {source.layout, self.to}
        self.needed = layouts == {"rotary", "llama_rotary"}
        if self.needed and attention.canonical(source.config.attn_name) != "softmax":
            raise UserError(
                f"{source.name}: its features were trained in the layout {source.layout}: leave out "
                f"--positional-embedding-type {self.to}."
            )

    def of(self, key: str) -> Turn | None:
        """The turn of a parameter, None where its rows stay."""
        part = key.partition(".attention.")[2]
        if not self.needed or part.split(".")[0] not in ("in_proj", "q_norm", "k_norm"):
            return None
        c = self.config
        heads = {"q_norm": c.n_heads, "k_norm": c.kv_heads}.get(part.split(".")[0], c.n_heads + c.kv_heads)
        if c.qk_norm_per_head and not part.startswith("in_proj"):
            heads = 1
        turned = int(c.qk_dim * c.partial_rotary_factor)
        return Turn(heads * c.qk_dim, c.qk_dim, turned, to_halves=self.to == "rotary")


def require_equal(source: Source, pairs: dict[str, tuple[Recipe, Recipe]]) -> None:
    """Raises UserError where two names of one tensor hold different values."""
    for ours, (one, other) in pairs.items():
        same = one.shape == other.shape and all(map(torch.equal, one.rows(), other.rows()))
        if not same and ours == "output.weight":
            raise UserError(f"{source.name}: the config ties input and output embeddings, but the checkpoint's differ.")
        if not same:
            names = f"{one.names[0]!r} and {other.names[0]!r}"
            raise UserError(f"{source.name}: {names} name one tensor but hold different values.")


def in_layout(config: ModelConfig, layout: str) -> ModelConfig:
    """``config`` in another rotary layout: the same function, with other rows of queries and keys."""
    turnable = config.positional_embedding_type in ("rotary", "llama_rotary")
    return dataclasses.replace(config, positional_embedding_type=layout) if turnable else config


def _elsewhere(config: ModelConfig) -> list[str]:
    return [f", but {name} in layers {', '.join(map(str, at))}" for name, at in config.attn_layers.items()]


def changes_of(source: Source, after: ModelConfig) -> list[str]:
    """What a swap or other flags change in the checkpoint's computation, in words."""
    out, before = [], source.config
    old, new = attention.canonical(before.attn_name), attention.canonical(after.attn_name)
    if old != new:
        out.append(f"attention {old} -> {new}" + "".join(_elsewhere(after)))
        if before.sliding_window and not after.sliding_window:
            out.append(f"the sliding window of {before.sliding_window} tokens is dropped: the state has no window")
        if before.attn_logit_softcap and not after.attn_logit_softcap:
            out.append("the cap of the attention's logits is dropped: there are none")
        if before.rotary_scaling or before.rotary_scale != 1:
            out.append("the rotary scaling is kept")
    for name in ("rotary_scaling", "rotary_scale", "rotary_base_frequency", "seq_len"):
        if getattr(before, name) != getattr(after, name):
            out.append(f"{name} {getattr(before, name)} -> {getattr(after, name)}")
    if {source.layout, after.positional_embedding_type} == {"rotary", "llama_rotary"}:
        out.append(f"rows of queries and keys reordered, {source.layout} -> {after.positional_embedding_type}")
    return out
