"""A study's grid: a YAML file of settings and arms.

    tokens: 8_192
    run: {pretrained: smollm2, seq_len: 256, global_batch_size: 4, lr: 5.0e-4}
    arms:
      supra: {attn_name: supra}
      two_step: {attn_name: supra, stages: [{stage_name: new, train_params: new}, {stage_name: all}]}

``run`` holds flags of the trainer for every arm, an arm flags of its own, and a stage flags of that stage. ``tokens``
are shared out over an arm's stages by their ``share``, equally where none is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm_linear.architecture import read_shipped, shipped
from open_lm_linear.cli import UserError
from open_lm_linear.evaluation.options import read_options
from open_lm_linear.evaluation.run import PROMPTS
from open_lm_linear.evaluation.suites import read_suite
from open_lm_linear.evaluation.tables import published_tables

PUBLISHED = "table3"
# What the study sets itself, and what would make arms unequal.
OWN = (
    *("name", "logs", "resume", "seed", "stages", "train_num_samples", "epochs", "first_sample"),
    *("train_data", "val_data", "val_num_samples", "dataset_manifest"),
)
SAME = (*OWN, "pretrained", "model", "seq_len", "global_batch_size")

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a grid beside ``run``, ``arms``, ``suites`` and ``controls``."""

    tokens: int
    """Training tokens of every arm, all its stages together."""
    title: str = ""
    """Of the report."""
    seeds: tuple[int, ...] = (0,)
    """Every arm is run with each: new weights and the order of the data."""
    validations: int = 4
    """Points of an arm's curve behind its start, about."""
    heldout_tokens: int = 8192
    """Tokens of the held-out data that are predicted, in curves and tables."""
    first_bucket: int = 128
    """Positions in the first bucket of the loss by position; the others double."""
    recover: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """Distances from the teacher, in nats, that the tokens to recover are counted for."""
    prompts: tuple[str, ...] = PROMPTS
    """Beginnings that every arm goes on from."""


@dataclass(frozen=True)
class Arm:
    """What is compared: flags of the trainer, and stages in turn; without stages it is not trained."""

    name: str
    flags: Flags
    stages: tuple[Flags, ...]
    published: str = ""
    """The row of the paper's Table 3 that it is."""
    from_scratch: bool = False
    """Random weights in place of the teacher's."""
    control: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite of evaluation, and how many examples of each of its tasks."""

    suite: str
    limit: int | None = None


@dataclass(frozen=True)
class Grid:
    """A grid as its file has it."""

    name: str
    settings: Settings
    run: Flags
    arms: tuple[Arm, ...]
    suites: tuple[Suite, ...]
    controls: Mapping[str, Flags]
    """Flags of single controls."""

    @property
    def steps(self) -> int:
        """Steps of every arm."""
        return self.settings.tokens // (self.run["seq_len"] * self.run["global_batch_size"])


def read_grid(source: str) -> Grid:
    """A grid by its name under configs/studies or by its path.

    Raises:
        UserError: no such file, an unknown key, a value of the wrong kind, or arms that would not be comparable.
    """
    path, values = read_shipped("studies", "grid", source)
    where = f"the grid {path}"
    parts = {"run": dict, "arms": dict, "suites": list, "controls": dict}
    for name, kind in parts.items():
        found = values.get(name, kind()) if isinstance(values, dict) else None
        if not isinstance(found, kind) or (name in ("run", "arms") and not found):
            raise UserError(f"{where} needs mappings under `run` and `arms`, and takes `suites` (list) and `controls`.")
    if "tokens" not in values:
        raise UserError(f"{where} does not say how many tokens an arm is trained on: give `tokens`.")
    grid = Grid(
        path.stem,
        read_options(Settings, {k: v for k, v in values.items() if k not in parts}, where),
        _flags(values["run"], OWN, f"{where}, run"),
        tuple(_arm(str(name), flags, where) for name, flags in values["arms"].items()),
        tuple(_suite(one, where) for one in values.get("suites", [])),
        {name: _flags(flags, SAME, f"{where}, control {name}") for name, flags in values.get("controls", {}).items()},
    )
    _check(grid, where)
    return grid


def _flags(values: Any, refused: Sequence[str], where: str) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of flags to values, not {values!r}.")
    found = {str(k).replace("-", "_"): v for k, v in (values or {}).items()}
    for key in found:
        if key in refused:
            raise UserError(f"{where} sets {key}, which is the study's: it is the same in every arm.")
    return found


def _arm(name: str, values: Any, where: str) -> Arm:
    where = f"{where}, arm {name}"
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of flags to values, not {values!r}.")
    if not name.replace("_", "").replace("-", "").isalnum() or name == "teacher":
        raise UserError(f"{where}: give it a name of letters, digits, - and _, which is not `teacher`.")
    own = {k: values[k] for k in ("published", "from_scratch") if k in values}
    stages = values.get("stages", [{}])
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{where}: stages must be a list of mappings of flags to values.")
    rows = published_tables()[PUBLISHED]["rows"]
    if own.get("published", "") not in ("", *rows):
        raise UserError(f"{where}: published {own['published']!r} is no row of Table 3; it has {', '.join(rows)}.")
    flags = {k: v for k, v in values.items() if k not in ("stages", *own)}
    return Arm(
        name,
        _flags(flags, SAME, where),
        tuple(_flags(stage, SAME, f"{where}, stage {i}") for i, stage in enumerate(stages)),
        **own,
    )


def _suite(values: Any, where: str) -> Suite:
    if not isinstance(values, dict) or not isinstance(values.get("suite"), str):
        raise UserError(f"{where}: {values!r} is not a mapping with the name of a suite under `suite`.")
    found = read_options(Suite, values, f"{where}, suite {values['suite']}")
    read_suite(found.suite)
    return found


def _check(grid: Grid, where: str) -> None:
    settings, run = grid.settings, grid.run
    for name in ("seq_len", "global_batch_size"):
        if type(run.get(name)) is not int or run[name] < 1:
            raise UserError(f"{where}: run needs {name}, a whole number above 0.")
    if not isinstance(run.get("pretrained"), str):
        raise UserError(f"{where}: run needs pretrained, the teacher that the arms begin from.")
    sizes = {"tokens": run["seq_len"] * run["global_batch_size"], "heldout_tokens": run["seq_len"]}
    for name, size in sizes.items():
        value = getattr(settings, name)
        if value < size or value % size:
            raise UserError(f"{where}: {name} must be a multiple of {size:,}, by seq_len and batch, not {value:,}.")
    if min(settings.validations, settings.first_bucket, len(settings.seeds), *settings.recover) <= 0:
        raise UserError(f"{where}: validations, first_bucket and recover must be above 0, and seeds not empty.")
    stems = ["heldout", *(Path(one.suite).stem for one in grid.suites)]
    if len(set(stems)) < len(stems):
        raise UserError(f"{where}: each suite needs a file name of its own, which is not `heldout`, not {stems[1:]}.")
    for arm in grid.arms:
        stage_steps(arm, grid.steps)


def stage_steps(arm: Arm, steps: int) -> list[int]:
    """The steps of each stage, which are ``steps`` together: by their shares, equal where there are none.

    Raises:
        UserError: shares that are not all given, or not 1 together; a stage without a step.
    """
    if not arm.stages:
        return []
    given = [stage["share"] for stage in arm.stages if "share" in stage]
    numbers = all(isinstance(share, (int, float)) and share > 0 for share in given)
    if given and (len(given) != len(arm.stages) or not numbers or abs(sum(given) - 1) > 1e-6):
        raise UserError(f"the arm {arm.name}: the shares of its stages must be numbers above 0 that are 1 together.")
    shares = given or [1 / len(arm.stages)] * len(arm.stages)
    ends = [round(steps * sum(shares[: i + 1])) for i in range(len(shares))]
    found = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if min(found) < 1:
        raise UserError(f"the arm {arm.name}: one of its stages has no step among the {steps} of the arm: give tokens.")
    return found


def arm_config(grid: Grid, arm: Arm, seed: int, folder: Path, train_data: str, val_data: str) -> dict[str, Any]:
    """The trainer's --config file of one arm and seed, whose run is in ``folder``/run."""
    settings, run = grid.settings, dict(grid.run)
    if arm.from_scratch:  # the recipe that comes with a preset's weights holds for all arms alike
        run = {**_recipe(run.pop("pretrained")), **run, "model": str(folder.parents[2] / "teacher.json")}
    per_step = grid.run["seq_len"] * grid.run["global_batch_size"]
    stages = []
    for stage, steps in zip(arm.stages, stage_steps(arm, grid.steps), strict=True):
        wanted = max(1, round(settings.validations * steps / grid.steps))
        epochs = next(n for n in range(wanted, 0, -1) if steps % n == 0)
        tokens = {"epochs": epochs, "train_num_samples": steps // epochs * per_step}
        stages.append({**{k: v for k, v in stage.items() if k != "share"}, **tokens})
    # An epoch is a point of the curve, not worth a checkpoint; the last is always saved.
    own = {"keep_last": 1, "save_frequency": 1_000_000, "log_every_n_steps": 10}
    data = {"train_data": train_data, "val_data": val_data, "val_num_samples": settings.heldout_tokens}
    place = {"logs": str(folder), "name": "run", "seed": seed}
    return {**own, **run, **arm.flags, **data, **place, "stages": stages}


def _recipe(pretrained: str) -> dict[str, Any]:
    import yaml

    from open_lm_linear.pretrained.presets import PRESETS

    if pretrained not in PRESETS:
        return {}
    return yaml.safe_load(shipped("runs", ".yaml")[PRESETS[pretrained].recipe].read_text(encoding="utf-8"))
