"""Suites: lists of tasks, as YAML files under configs/suites or anywhere else.

A file is a list of entries, or a mapping with the list under ``tasks`` and ``title``, ``average`` and ``published``
beside it. An entry has the keys of `Entry`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_lm_linear.architecture import read_shipped
from open_lm_linear.cli import UserError, did_you_mean

KINDS = ("harness", "perplexity", "recall", "generation")


@dataclass(frozen=True)
class Entry:
    """One task as it is measured."""

    task: str
    kind: str = "harness"
    """harness: a task or group of lm-evaluation-harness. The others are modules of this package."""
    metric: str = ""
    """harness: which of the task's metrics is reported."""
    shots: int = 0
    """harness: examples before each question."""
    chance: float | None = None
    """What guessing scores, from 0 to 1; without it there is no relative score."""
    context: int | None = None
    """Tokens that a request is cut to, from the left (default: the model's own length)."""
    offline: str = ""
    """harness: the task of --include-path that stands in for this one (default: TASK_local)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the modules of other kinds take."""

    @property
    def label(self) -> str:
        """The entry's name in tables and of its file."""
        return self.task if self.context is None else f"{self.task}@{self.context}"


@dataclass(frozen=True)
class Suite:
    """Entries under a name."""

    name: str
    tasks: tuple[Entry, ...]
    title: str = ""
    average: bool = False
    """Whether the mean over the tasks is reported too."""
    published: str = ""
    """The table of published.yaml that holds others' figures for these tasks."""


def read_suite(source: str) -> Suite:
    """A suite by its name under configs/suites or by its path.

    Raises:
        UserError: no such file, an unknown key, or a value of the wrong kind.
    """
    path, values = read_shipped("suites", "suite", source)
    values = {"tasks": values} if isinstance(values, list) else values
    if not isinstance(values, dict) or not isinstance(values.get("tasks"), list) or not values["tasks"]:
        raise UserError(f"the suite {path} is neither a list of tasks nor a mapping with such a list under `tasks`.")
    entries = tuple(_entry(entry, path) for entry in values["tasks"])
    suite = Suite(path.stem, entries, **_known({k: v for k, v in values.items() if k != "tasks"}, Suite, path))
    labels = [entry.label for entry in entries]
    doubled = next((label for label in labels if labels.count(label) > 1), None)
    if doubled is not None:
        raise UserError(f"the suite {path} has the task {doubled} twice.")
    return suite


def _entry(values: Any, path: Path) -> Entry:
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise UserError(f"the suite {path}: {values!r} is not a mapping with the name of a task under `task`.")
    entry = Entry(**_known(values, Entry, path))
    where = f"the suite {path}, task {entry.task}"
    if entry.kind not in KINDS:
        raise UserError(f"{where}: the kind {entry.kind!r} is not one of {', '.join(KINDS)}.")
    if entry.kind == "harness" and not entry.metric:
        raise UserError(f"{where}: name the metric to report, such as acc_norm.")
    for name, least in (("shots", 0), ("context", 1)):
        value = getattr(entry, name)
        if value is not None and (type(value) is not int or value < least):
            raise UserError(f"{where}: {name} must be a whole number from {least} on, not {value!r}.")
    if entry.chance is not None and not (type(entry.chance) in (int, float) and 0 <= entry.chance < 1):
        raise UserError(f"{where}: chance is a share from 0 to 1, not {entry.chance!r}.")
    if not isinstance(entry.options, dict):
        raise UserError(f"{where}: options must be a mapping, not {entry.options!r}.")
    return entry


def _known(values: Mapping[str, Any], schema: type, path: Path) -> dict[str, Any]:
    """The values, after a look that the dataclass has them all."""
    names = [f.name for f in dataclasses.fields(schema)]
    for key in values:
        if key not in names:
            raise UserError(f"the suite {path} has an unknown key {key!r}.{did_you_mean(str(key), names)}")
    return dict(values)
