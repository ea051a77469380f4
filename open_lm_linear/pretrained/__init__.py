"""Pretrained weights in any format into our model: strict, by rows, the attention swapped on the way."""

from __future__ import annotations

from open_lm_linear.pretrained.loading import (
    build_model,
    describe,
    initialise,
    load_pretrained,
    load_tokenizer,
    load_weights,
    materialise,
)
from open_lm_linear.pretrained.matching import changes_of, is_swap, match
from open_lm_linear.pretrained.presets import PRESETS, Preset
from open_lm_linear.pretrained.sources import Source, open_source

__all__ = [
    "PRESETS",
    "Preset",
    "Source",
    "build_model",
    "changes_of",
    "describe",
    "initialise",
    "is_swap",
    "load_pretrained",
    "load_tokenizer",
    "load_weights",
    "match",
    "materialise",
    "open_source",
]
