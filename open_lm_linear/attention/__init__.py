"""The attention registry. The folder is the registry: a module here, or `package.module:Class` outside, is a name.

Every module of this folder but `base` is a registered attention: its file name is the name, its ``MIXER`` the class.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from open_lm_linear.cli import UserError, nearest

if TYPE_CHECKING:
    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.attention.base import Attention

_HEDGEHOG = {
    **{"feature_map": "per_head", "feature_map_init": "identity", "feature_activation": "softmax"},
    **{"share_feature_map": False, "rotary_at": "projection", "normaliser": "sum", "use_decay": False},
}
# Relatives of SUPRA by name: the attention that they are options of, and these options.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "supra": ("linear", {}),
    # Divided by the sum of the weights, without decay (arXiv 2103.13076).
    "t2r": ("linear", {"normaliser": "sum", "use_decay": False}),
    # elu(x) + 1 and no map (arXiv 2006.16236), turned behind it (arXiv 2104.09864).
    "elu": (
        "linear",
        {"feature_map": "none", "feature_activation": "elu", "normaliser": "sum", "use_decay": False},
    ),
    # Softmax of the features and of their negatives, a map a head for queries and one for keys (arXiv 2402.04347).
    "hedgehog": ("linear", _HEDGEHOG),
    # Hedgehog with a trained decay a head and an output gate: what --init-tokens begins and --loss align trains best.
    "hedgehog_decay": ("linear", {**_HEDGEHOG, "use_decay": True, "learn_decay": True, "output_gate": True}),
    # Hedgehog beside a softmax window (arXiv 2410.10254).
    "lolcats": ("linear_window", {**_HEDGEHOG, "window": 64}),
    # No map, RetNet's decays, an output gate (arXiv 2307.08621; its gate is swish, which would not begin at 1).
    "retention": (
        "linear",
        {"feature_map": "none", "feature_activation": "identity", "use_retnet_slopes": True, "output_gate": True},
    ),
}

# OpenLM's names for what we have.
ALIASES = {"linear_attn": "linear", "auto": "softmax", "torch_attn": "softmax", "xformers_attn": "softmax"}


def names() -> list[str]:
    """The registered attentions, found without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def canonical(name: str) -> str:
    """The registered name behind an alias or a preset; a plug-in's `package.module:Class` is its own name.

    Raises:
        UserError: an unknown name; the sentence lists the known ones, the nearest first.
    """
    name = PRESETS[name][0] if name in PRESETS else ALIASES.get(name, name)
    if ":" in name or name in names():
        return name
    raise UserError(
        f"unknown attention {name!r}; known: {nearest(name, [*names(), *PRESETS, *ALIASES])}; "
        "a plug-in is named package.module:Class."
    )


def resolve(name: str) -> type[Attention]:
    """The class of an attention by name, alias or `package.module:Class`."""
    from open_lm_linear.attention.base import Attention

    name = canonical(name)
    if ":" not in name:
        return importlib.import_module(f"{__name__}.{name}").MIXER
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the attention plug-in {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Attention)):
        raise UserError(f"the attention plug-in {name!r} is not a subclass of open_lm_linear.attention.base.Attention.")
    return found


def expand(config: ModelConfig) -> ModelConfig:
    """``config`` with the registered name in place of an alias or a preset, whose options give way to the config's.

    Raises:
        UserError: an unknown name, or a preset in ``attn_layers``, whose attentions have their own defaults alone.
    """
    preset = next((name for name in config.attn_layers if name in PRESETS), None)
    if preset is not None:
        raise UserError(f"attn_layers takes attentions without options: {', '.join(names())}, not {preset!r}.")
    _, options = PRESETS.get(config.attn_name, ("", {}))
    return replace(
        config,
        attn_name=canonical(config.attn_name),
        attn_options={**options, **config.attn_options},
        attn_layers={canonical(name): layers for name, layers in config.attn_layers.items()},
    )
