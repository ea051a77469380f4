"""Which parameters a run trains and with what settings, decided from their names alone."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from open_lm_linear.cli import UserError, did_you_mean

SETTINGS = {"lr": float, "wd": float, "warmup": int}
WORDS = ("all", "new")


@dataclass(frozen=True)
class Settings:
    """What a parameter is trained with.

    Args:
        label: of its group, as logs and tables name it.
        lr: peak learning rate.
        wd: weight decay of matrices.
        warmup: steps of linear warmup.
    """

    label: str
    lr: float
    wd: float
    warmup: int


@dataclass(frozen=True)
class Rule:
    """One ``--param-group``: the settings given for the parameters that a pattern names."""

    pattern: str
    given: dict[str, Any]


def parse_rule(text: str) -> Rule:
    """``PATTERN:lr=1e-4,wd=0.1,warmup=500``, each setting at most once, at least one of them.

    Raises:
        UserError: anything else.
    """
    pattern, colon, rest = text.rpartition(":")
    if not colon or not pattern or not rest:
        raise UserError(f"--param-group {text!r} is not of the form PATTERN:lr=1e-4,wd=0.1,warmup=500.")
    given: dict[str, Any] = {}
    for part in rest.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in SETTINGS or not equals:
            raise UserError(
                f"--param-group {text!r}: {part!r} sets none of {', '.join(SETTINGS)}.{did_you_mean(key, SETTINGS)}"
            )
        if key in given:
            raise UserError(f"--param-group {text!r} sets {key} twice: give it once.")
        try:
            given[key] = SETTINGS[key](value)
        except ValueError as error:
            kind = "a whole number" if SETTINGS[key] is int else "a number"
            raise UserError(f"--param-group {text!r}: {key} must be {kind}, not {value!r}.") from error
        if given[key] < 0 or not math.isfinite(given[key]) or (key == "lr" and given[key] == 0):
            least = "above 0" if key == "lr" else "0 or more"
            raise UserError(f"--param-group {text!r}: {key} must be {least}; --freeze keeps parameters as they are.")
    return Rule(pattern, given)


def assign(
    matrices: dict[str, bool],
    new: Collection[str],
    *,
    train: str,
    freeze: str,
    rules: Sequence[str],
    kept: Settings,
    added: Settings,
    reached: Collection[str] | None = None,
) -> dict[str, Settings | None]:
    """The settings of every parameter, by its name; None: frozen.

    Args:
        matrices: every parameter's name -> whether weight decay applies to it.
        new: names of those that the pretrained checkpoint did not have.
        train: ``all``, ``new`` or patterns, with commas. ``freeze``: the same, and it wins.
        rules: texts of ``--param-group``; a later one beats an earlier one, setting by setting.
        kept: of what the checkpoint has; ``added``: of what is new.
        reached: names of those that the loss has a gradient for; the others are frozen. None: all.

    Raises:
        UserError: a pattern that names nothing, a rule that changes nothing, or nothing left to train.
    """
    names = list(matrices)
    trained = _named(train, names, new, "--train-params") - _named(freeze, names, new, "--freeze")
    if not trained:
        if train == "new" and not new:
            raise UserError(
                "--train-params new: this model has no new parameters; use --train-params all or --attn-name."
            )
        raise UserError(f"--train-params {train} with --freeze {freeze!r} leaves nothing to train.")
    if reached is not None:
        trained &= set(reached)
        if not trained:
            raise UserError(
                f"--train-params {train} with --freeze {freeze!r} leaves nothing to train: --loss align trains the "
                "attentions that are not the teacher's, and nothing else."
            )
    settings = {name: added if name in new else kept for name in names}
    for text in rules:
        rule = parse_rule(text)
        chosen = _named(rule.pattern, names, new, "--param-group")
        if not chosen & trained:
            raise UserError(f"--param-group {text!r} names frozen parameters only: drop it, or train them.")
        if rule.given.get("wd") and not any(matrices[name] for name in chosen & trained):
            raise UserError(f"--param-group {text!r} names no matrix, and weight decay applies to nothing else.")
        for name in chosen:
            settings[name] = replace(settings[name], label=rule.pattern, **rule.given)
    return {name: settings[name] if name in trained else None for name in names}


def _named(patterns: str, names: Sequence[str], new: Collection[str], flag: str) -> set[str]:
    """The names that words and patterns with commas between them stand for."""
    found: set[str] = set()
    for pattern in filter(None, (p.strip() for p in patterns.split(","))):
        if pattern in WORDS:
            matched = set(names if pattern == "all" else new)
        else:
            matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched and pattern not in WORDS:
            raise UserError(f"{flag} {pattern!r} names no parameter; the nearest are {_nearest(pattern, names)}.")
        found |= matched
    return found


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """The three names most like a pattern, with the layers' numbers as ``*``."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    return ", ".join(difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.0))
