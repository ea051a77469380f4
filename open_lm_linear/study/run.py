"""A study from its plan to its report. Torch is imported inside, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.data.manifest import MANIFEST
from open_lm_linear.evaluation.run import progress
from open_lm_linear.metrics import human_time

if TYPE_CHECKING:
    from open_lm_linear.study.arms import Study
    from open_lm_linear.study.grid import Arm, Grid


@dataclass(frozen=True)
class StudyArgs:
    """Train and measure the arms of a study: the same data, tokens, seeds and evaluation for each."""

    grid: str
    """A name under configs/studies, or a .yaml path."""
    output: str
    """Folder of the arms and of the report."""
    train_data: str = ""
    """Training data of every arm: a manifest.jsonl, or its folder. The report alone needs none."""
    val_data: str = ""
    """Held-out data, likewise."""
    arms: str = ""
    """Names of arms and controls, with commas. Empty: all arms of the grid."""
    controls: bool = False
    """Train and measure the controls too."""
    only: Literal["all", "train", "evaluate", "report"] = "all"
    """One part of the work; all does them arm by arm."""
    plan: bool = False
    """Print the plan with its forecast and stop."""
    device: str = "auto"
    """auto: the first GPU, or the CPU where there is none."""
    include_path: str = ""
    """Folder of task files for lm-evaluation-harness; a TASK_local of theirs stands in for TASK."""


def run(args: StudyArgs, command: str) -> None:
    """Trains and measures what is not there yet, and writes the report of all that is.

    Raises:
        UserError: something in the grid, the data or the folder is wrong, before anything is trained; or, behind the
            others and the report, an arm that could not be trained.
    """
    from open_lm_linear.study import arms as work
    from open_lm_linear.study import facts, report
    from open_lm_linear.study.controls import controls
    from open_lm_linear.study.grid import read_grid

    grid = read_grid(args.grid)
    known = {arm.name: arm for arm in (*grid.arms, *controls(grid))}
    wanted = _wanted(args, known)
    study = _study(args, grid)
    begun = [arm for arm in known.values() if (study.output / "arms" / arm.name).exists()]
    there = [arm for arm in known.values() if arm in wanted or arm in begun]
    work.lay_out(study, there)
    failed: list[str] = []
    if args.only != "report":
        todo = [arm for arm in wanted if args.only != "evaluate" and not work.trained(study, arm)]
        foreseen = work.forecast(study, todo) if todo else {}
        print(work.plan_text(study, wanted, foreseen), flush=True)
        if args.plan:
            return
        failed = _work(study, wanted, foreseen, args.only)
    if args.only != "train":
        report.report(study.output, facts.gather(study, begun if args.only == "report" else there, command))
    if failed:
        raise UserError(f"not all arms were trained; the same command tries again: {'; '.join(failed)}")


def _study(args: StudyArgs, grid: Grid) -> Study:
    from open_lm_linear.study import arms as work

    output, train, val = Path(args.output), "", ""
    path = output / work.DATA
    before = json.loads(path.read_text()) if path.exists() else None
    if args.only == "report":
        if before is None:
            raise UserError(f"{output} holds no study yet: run it first.")
        data = before
    else:
        train, val = _manifest("--train-data", args.train_data), _manifest("--val-data", args.val_data)
        data = work.data_of(train, val)
        for name, was in (before or {}).items():
            if data[name] != was:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{output} was begun with other data than {flag} has: choose another --output.")
    return work.Study(grid, output, train, val, data, args.device, args.include_path)


def _wanted(args: StudyArgs, known: Mapping[str, Arm]) -> list[Arm]:
    if not args.arms:
        return [arm for arm in known.values() if args.controls or not arm.control]
    names = [name.strip() for name in args.arms.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(
                f"--arms {name!r} is no arm of the grid.{did_you_mean(name, known)} It has {', '.join(known)}."
            )
    return [arm for arm in known.values() if arm.name in names or (args.controls and arm.control)]


def _manifest(flag: str, path: str) -> str:
    if not path:
        raise UserError(f"no data: give {flag}, a {MANIFEST} of `data.prepare` or its folder.")
    found = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise UserError(f"there is no data at {flag} {path}: give a {MANIFEST} of `data.prepare`, or its folder.")
    return str(found)


def _work(study: Study, arms: Sequence[Arm], foreseen: Mapping[str, float], only: str) -> list[str]:
    """Trains and measures; returns what went wrong with single arms, which does not keep the others waiting."""
    from open_lm_linear.study import arms as work

    if only != "train":
        progress("the teacher")
        work.measure(study, work.TEACHER, study.teacher, study.output / work.TEACHER)
    todo = list(study.runs(arms))
    began, due, failed = time.perf_counter(), 0.0, []
    for number, (arm, seed, folder) in enumerate(todo, start=1):
        label = f"{arm.name}, seed {seed}"
        progress(f"[{number}/{len(todo)}] {label}")
        try:
            if only != "evaluate":
                work.train_arm(study, arm, seed)
            if only != "train" and (folder / work.TRAINING).exists():
                work.measure(study, arm.name, str(folder / "weights"), folder)
        except UserError as error:
            failed.append(f"{label}: {error}")
            progress(f"error: {error}")
        if arm.name in foreseen:
            due += foreseen[arm.name] / len(study.seeds(arm))
            spent = time.perf_counter() - began
            left = spent * (sum(foreseen.values()) / due - 1)
            progress(f"{human_time(spent)} so far, about {human_time(left)} to go")
    return failed
