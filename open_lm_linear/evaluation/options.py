"""The options of a suite's entry, read into the dataclass of its kind."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.config import coerce

T = TypeVar("T")


def read_options(kind: type[T], options: Mapping[str, Any], where: str) -> T:
    """``options``, as YAML gives them, as the dataclass ``kind``; ``where`` names the evaluation in messages.

    Raises:
        UserError: an unknown option or a value of the wrong kind.
    """
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            near = did_you_mean(key, known) or f" It takes {', '.join(known)}."
            raise UserError(f"{where} has no option {key!r}.{near}")
    return kind(**{key: coerce(key, value, hints[key]) for key, value in options.items()})
