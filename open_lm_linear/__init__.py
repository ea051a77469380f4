"""open_lm_linear: turn a pretrained softmax transformer into a linear recurrent model (SUPRA, arXiv 2405.06640)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from open_lm_linear.model import create_model as create_model
    from open_lm_linear.pretrained import load_pretrained as load_pretrained

__all__ = ["create_model", "load_pretrained"]

_HOMES = {"create_model": "open_lm_linear.model", "load_pretrained": "open_lm_linear.pretrained"}


def __getattr__(name: str) -> Any:
    """Loads torch only when a model is asked for, so that ``--help`` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
