"""What every comparison needs beside it, made from a grid: what the data, the window or nothing at all would do.

    teacher_same_tokens   the softmax teacher on the same tokens, with cross entropy: what the text alone teaches
    window_alone          the windowed arm without its linear part, trained as it was
    linear_alone          the windowed arm without its window, trained as it was; left out where an arm is just that
    no_attention          a window of the token itself, trained as it was: what the other layers can make up for
    untrained_window      the window with sinks, as swapped in: what no training costs

Window and stages are those of the grid's first arm with a window beside linear attention. A control without new
weights leaves out the stages that train these alone, and its other stages take their tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from open_lm_linear import attention
from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.config import options_class
from open_lm_linear.evaluation.run import progress
from open_lm_linear.study.grid import Arm, Flags, Grid

NAMES = ("teacher_same_tokens", "window_alone", "linear_alone", "no_attention", "untrained_window")
SINKS = 4  # of the untrained window, where the grid's has none (StreamingLLM's number, arXiv 2309.17453)


def controls(grid: Grid) -> list[Arm]:
    """The controls of a grid; ``linear_alone`` where there is an arm with a window, and none that is the same.

    Raises:
        UserError: the grid has flags for a control that there is not, or an arm with the name of one.
    """
    for name in grid.controls:
        if name not in NAMES:
            raise UserError(
                f"the grid {grid.name} has flags for an unknown control {name!r}.{did_you_mean(name, NAMES)}"
            )
    taken = [arm.name for arm in grid.arms if arm.name in NAMES]
    if taken:
        raise UserError(f"the grid {grid.name} calls an arm {taken[0]}, which is a control's name: give it another.")
    windowed = next((arm for arm in grid.arms if _is_windowed(arm)), None)
    window, sinks, shared, stages = _window_of(windowed)
    made = {
        "teacher_same_tokens": ({}, ({"loss": ["ce=1"]},)),
        "window_alone": ({**shared, "attn_name": "window", "window": window, "sinks": sinks}, stages),
        "no_attention": ({**shared, "attn_name": "window", "window": 1, "sinks": 0}, stages),
        "untrained_window": ({"attn_name": "window", "window": window, "sinks": sinks or min(SINKS, window)}, ()),
    }
    if windowed is not None:
        alone = _linear_part(windowed.flags), windowed.stages
        twin = next((arm.name for arm in grid.arms if _linear(arm) == alone), None)
        if twin is None or "linear_alone" in grid.controls:
            made["linear_alone"] = alone
        else:
            progress(f"the control linear_alone is the arm {twin}: it is not run twice")
    return [
        Arm(name, {**made[name][0], **grid.controls.get(name, {})}, made[name][1], control=True)
        for name in NAMES
        if name in made
    ]


def _linear(arm: Arm) -> tuple[Flags, tuple[Flags, ...]] | None:
    """Flags and stages of an arm with linear attention, its preset spelt out."""
    if attention.canonical(arm.flags.get("attn_name", "softmax")) != "linear":
        return None
    return _linear_part(arm.flags), arm.stages


def _is_windowed(arm: Arm) -> bool:
    return attention.canonical(arm.flags.get("attn_name", "softmax")) == "linear_window"


def _window_of(arm: Arm | None) -> tuple[int, int, Flags, tuple[Flags, ...]]:
    """Window, sinks, flags that are not the attention's, and stages without those that train new weights alone."""
    if arm is None:
        default: Any = options_class("window")
        return default().window, default().sinks, {}, ({},)
    options: Any = options_class("linear_window")
    given = {**attention.PRESETS.get(arm.flags["attn_name"], ("", {}))[1], **arm.flags}
    of_attention = {field.name for field in dataclasses.fields(options)} | {"attn_name", "train_params"}
    of_attention |= {"init_tokens", "fit_tokens"}  # a window alone has nothing to choose or to fit
    shared = {k: v for k, v in arm.flags.items() if k not in of_attention}
    kept = [stage for stage in arm.stages if stage.get("train_params", arm.flags.get("train_params")) != "new"]
    total = sum(stage.get("share", 1.0) for stage in kept)
    stages = tuple({**stage, "share": stage.get("share", 1.0) / total} for stage in kept) or ({},)
    return given.get("window", options().window), given.get("sinks", options().sinks), shared, stages


def _linear_part(flags: Flags) -> dict[str, Any]:
    given = {**attention.PRESETS.get(flags["attn_name"], ("", {}))[1], **flags, "attn_name": "linear"}
    return {k: v for k, v in given.items() if k not in ("window", "sinks")}
