"""Folds the feature map of linear attention into the projection before it.

    phi(W (W_q x + b_q) + b) = phi((W W_q) x + (W b_q + b)),   and the same of keys

for any activation phi, so the map's parameters and its two products a token are gone, at the price of a bias on the
projection. Products are taken in float64, one layer at a time, as its rows are asked for.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.linear import LinearAttention
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer
from open_lm_linear.pretrained.matching import Recipe, match, part_rows
from open_lm_linear.pretrained.readers import Reader
from open_lm_linear.pretrained.sources import Source

Tensor = torch.Tensor

MAP, MAP_KV = "_totrain_embed", "_totrain_embed_kv"
FOLDABLE = ("full", "per_head")


def folded_config(config: ModelConfig, name: str = "the model") -> ModelConfig:
    """The architecture of the same function without a feature map: features come out of ``in_proj``, with a bias.

    Raises:
        UserError: a model that has no W, or something between the projection and W.
    """
    kind = attention.canonical(config.attn_name)
    mixer = attention.resolve(kind)
    if not issubclass(mixer, LinearAttention):
        raise UserError(f"{name} has {kind} attention, which has no feature map to fold: leave out the fold.")
    config = mixer.complete(config)
    options = dict(config.attn_options)
    if options["feature_map"] not in FOLDABLE:
        raise UserError(
            f"{name} has the feature map {options['feature_map']!r}, and only {' and '.join(FOLDABLE)} can be folded: "
            "leave out the fold."
        )
    if config.qk_norm and options["qk_norm_at"] == "projection":
        raise UserError(
            f"{name} norms its queries and keys between the projection and the feature map, and W cannot pass through "
            "a norm: leave out the fold."
        )
    if options["rotary_at"] == "projection" and config.positional_embedding_type != "none":
        raise UserError(
            f"{name} turns its queries and keys between the projection and the feature map, and W cannot pass through "
            "that: leave out the fold."
        )
    if config.attn_layers and options["feature_dim"] != config.qk_dim:
        raise UserError(
            f"{name} has layers of another attention, whose heads would change with the {options['feature_dim']} "
            "features: leave out the fold."
        )
    options["feature_map"] = "none"
    return dataclasses.replace(config, qk_head_dim=options["feature_dim"], qkv_bias=True, attn_options=options)


def fold(source: Source) -> Source:
    """``source`` with its feature maps folded, its tensors computed as they are read.

    Raises:
        UserError: a model that cannot be folded; a tensor that does not fit.
    """
    config = folded_config(source.config, source.name)
    with torch.device("meta"):
        before, after = Transformer(source.config), Transformer(config)
    shapes = {name: tuple(p.shape) for name, p in after.named_parameters()}
    reader = FoldedReader(source.reader.label, before.config, match(before, source).kept, shapes)
    return dataclasses.replace(
        source,
        config=config,
        reader=reader,
        keys={name: (name,) for name in reader.names()},
        layout=config.positional_embedding_type,
        doubled=[],
        checksums={},
        untrained=frozenset(),
    )


class FoldedReader(Reader):
    """The folded model's tensors under our names: in_proj computed, in float32, everything else as it was.

    Args:
        config: of the model that is folded, ``recipes`` its tensors, ``shapes`` those of the folded one.
    """

    def __init__(
        self, label: str, config: ModelConfig, recipes: dict[str, Recipe], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.label, self.config, self.recipes, self.shapes = label, config, recipes, shapes
        # One layer is kept, since its rows are read one block after the other.
        self._layer = lru_cache(maxsize=1)(self._fold_layer)

    def names(self) -> set[str]:
        return set(self.shapes)

    def where(self, name: str) -> str:
        return f"{self.label}: {name!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        layer, projection, _ = name.partition(".in_proj.")
        own = self.recipes[f"{layer}.in_proj.weight" if projection else name].dtype
        return torch.promote_types(own, torch.float32) if projection else own

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        layer, projection, kind = name.partition(".in_proj.")
        if not projection:
            return self.recipes[name].read(begin, end)
        return self._layer(layer)[KINDS.index(kind)][begin:end].to(self.dtype(name))

    def _fold_layer(self, prefix: str) -> tuple[Tensor, Tensor]:
        """Weight (rows, hidden_dim) and bias (rows,) of a layer's in_proj, rows q | k | v."""

        def read(name: str) -> Tensor | None:
            recipe = self.recipes.get(f"{prefix}.{name}")
            return None if recipe is None else recipe.read(0, recipe.shape[0]).double()

        weight, bias = read("in_proj.weight"), read("in_proj.bias")
        assert weight is not None
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if f"{prefix}.{MAP}.weight" not in self.recipes:  # a layer of another attention
            return weight, bias
        sizes = part_rows(self.config, ".in_proj.", 3, len(weight))
        (q, k, v), (q_bias, k_bias, v_bias) = weight.split(sizes), bias.split(sizes)
        keys = MAP_KV if f"{prefix}.{MAP_KV}.weight" in self.recipes else MAP
        parts = []
        for rows, shift, name in ((q, q_bias, MAP), (k, k_bias, keys)):
            parts.append(_through(read(f"{name}.weight"), read(f"{name}.bias"), rows, shift))
        whole = self.dtype(f"{prefix}.in_proj.weight")
        return (
            torch.cat([*(part.to(whole) for part, _ in parts), v.to(whole)]),
            torch.cat([*(shift for _, shift in parts), v_bias]),
        )


KINDS = ("weight", "bias")


def _through(weight: Tensor | None, bias: Tensor | None, rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W R and W s + b for a map W over all heads (H F, H D) or one a head (H, F, D); R (H D, hidden_dim), s (H D,)."""
    assert weight is not None and bias is not None
    if weight.dim() == 2:
        return weight @ rows, weight @ shift + bias
    heads = weight.shape[0]
    product = weight @ rows.unflatten(0, (heads, -1))
    shifted = (weight @ shift.view(heads, -1, 1))[..., 0] + bias
    return product.flatten(0, 1), shifted.flatten()
