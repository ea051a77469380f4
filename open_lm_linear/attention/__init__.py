"""The attention registry. The folder is the registry: a module here, or `package.module:Class` outside, is a name.

Every module of this folder but `base` is a registered attention: its file name is the name, its ``MIXER`` the class.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from open_lm_linear.cli import UserError, nearest

if TYPE_CHECKING:
    from open_lm_linear.attention.base import Attention

# OpenLM's names for what we have.
ALIASES = {"linear_attn": "linear", "auto": "softmax", "torch_attn": "softmax", "xformers_attn": "softmax"}


def names() -> list[str]:
    """The registered attentions, found without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def canonical(name: str) -> str:
    """The registered name behind an alias; a plug-in's `package.module:Class` is its own name.

    Raises:
        UserError: an unknown name; the sentence lists the known ones, the nearest first.
    """
    name = ALIASES.get(name, name)
    if ":" in name or name in names():
        return name
    raise UserError(
        f"unknown attention {name!r}; known: {nearest(name, [*names(), *ALIASES])}; "
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
