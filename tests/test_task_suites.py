"""The suites of our own tasks hold what their modules take."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from open_lm_linear.evaluation.options import read_options
from open_lm_linear.evaluation.recall_tasks import TASKS

SUITES = Path(__file__).parent.parent / "configs" / "suites"


def entries(name: str) -> list[dict[str, Any]]:
    return yaml.safe_load((SUITES / f"{name}.yaml").read_text())["tasks"]


@pytest.mark.parametrize("name", ["perplexity", "recall", "generation"])
def test_options_are_known(name: str) -> None:
    module = importlib.import_module(f"open_lm_linear.evaluation.{name}")
    for entry in entries(name):
        assert entry["kind"] == name
        read_options(module.Options, {"task": entry["task"], **entry["options"]}, name)


def test_recall_has_every_task_that_needs_no_file_from_1k_to_64k() -> None:
    contexts = {entry["task"]: entry["options"]["contexts"] for entry in entries("recall")}
    assert set(contexts) == {*TASKS, "mqar"} - {"qa"}
    assert {c[-1] for c in contexts.values()} == {65536}
    assert {task for task, c in contexts.items() if c[0] != 1024} == {"common_words"}
