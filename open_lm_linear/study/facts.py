"""What came of a study, from the files of its arms: losses, scores, tokens to recover, and the paper's order."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_lm_linear.evaluation.tables import parts_of, published_tables, relative
from open_lm_linear.study.arms import TEACHER, TRAINING, Study, measured
from open_lm_linear.study.grid import PUBLISHED, Arm


def gather(study: Study, arms: Sequence[Arm], command: str) -> dict[str, Any]:
    """All that the report says, as JSON. Arms without a measurement are named under ``missing``."""
    teacher = measured(study, study.output / TEACHER)
    level = None if teacher is None else heldout(teacher["heldout"])["value"]
    found, missing = [], []
    for arm in arms:
        runs = [_run(study.folder(arm.name, seed), seed, teacher, study) for seed in study.seeds(arm)]
        known = [run for run in runs if run is not None]
        if known:
            found.append(_arm(arm, known, level))
        missing += [f"{arm.name}, seed {seed}" for seed, run in zip(study.seeds(arm), runs, strict=True) if run is None]
    grid = study.grid
    return {
        "format_version": 1,
        "grid": grid.name,
        "title": grid.settings.title or grid.name,
        "command": command,
        "tokens": grid.settings.tokens,
        "seeds": list(grid.settings.seeds),
        "run": dict(grid.run),
        "suites": [dataclasses.asdict(suite) for suite in grid.suites],
        "machine": None if teacher is None else teacher["machine"],
        "teacher": None if teacher is None else {"source": study.teacher} | _measured(teacher, teacher, study),
        "arms": found,
        "missing": missing,
        "order": order({arm["name"]: arm for arm in found}),
    }


def _run(folder: Path, seed: int, teacher: Mapping[str, Any] | None, study: Study) -> dict[str, Any] | None:
    """One arm with one seed; None where it was not trained and measured."""
    evaluation = measured(study, folder)
    if evaluation is None:
        return None
    training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    found = {"seed": seed, **training, **_measured(evaluation, teacher, study)}
    if teacher is not None:
        level = heldout(teacher["heldout"])["value"]
        found["recovered"] = {str(d): recovered(training["curve"], level, d) for d in study.grid.settings.recover}
    return found


def _measured(evaluation: Mapping[str, Any], teacher: Mapping[str, Any] | None, study: Study) -> dict[str, Any]:
    rows = evaluation["heldout"]
    scores = scores_of(evaluation)
    of_teacher = {} if teacher is None else scores_of(teacher)
    positions = [row for row in rows if "position" in row]
    keys = ("position", "value", "standard_error")
    return {
        "heldout": heldout(rows),
        "positions": [{k: row[k] for k in keys} for row in positions],
        "scores": scores,
        "share": share(scores, of_teacher),
        "above_chance": above_chance(scores, of_teacher),
        "samples": evaluation["samples"],
        "evaluation_seconds": evaluation["seconds"],
    }


def heldout(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Value (nats), standard error and tokens of the loss over all held-out text."""
    row = next(row for row in rows if row["metric"] == "nats_per_token" and not parts_of(row))
    return {"value": row["value"], "standard_error": row["standard_error"], "tokens": row["tokens"]}


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The whole of every task of the suites by its name in tables and its metric: value, standard error, chance, n."""
    keys = ("value", "standard_error", "chance", "n")
    rows = [row for suite in evaluation["suites"].values() for row in suite if not parts_of(row)]
    return {
        f"{row['label']} {row['metric']}": {k: row[k] for k in keys} | {"task": "harness_task" in row}
        for row in rows
        if row["label"] != "average"
    }


def share(scores: Mapping[str, Mapping[str, Any]], teacher: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of score / teacher's score over the harness's tasks at which the teacher scores; None without any."""
    tasks = [(s["value"], teacher[k]["value"]) for k, s in scores.items() if s["task"] and k in teacher]
    found = [value / theirs for value, theirs in tasks if theirs > 0]
    return statistics.fmean(found) if found else None


def above_chance(scores: Mapping[str, Mapping[str, Any]], teacher: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The same of (score - chance) / (teacher's - chance), over the tasks at which the teacher is above chance."""
    each = [
        relative(s["value"], teacher[k]["value"], s["chance"]) for k, s in scores.items() if s["task"] and k in teacher
    ]
    found = [value for value in each if value is not None]
    return statistics.fmean(found) if found else None


def recovered(curve: Sequence[Sequence[float]], teacher: float, distance: float) -> int | None:
    """Tokens of the first point [tokens, loss, ...] of a curve within ``distance`` nats of the teacher; None: never."""
    return next((int(at) for at, loss, *_ in curve if loss <= teacher + distance), None)


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean over seeds and their standard deviation, which one seed does not have."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "deviation": None}
    return {"mean": statistics.fmean(known), "deviation": statistics.stdev(known) if len(known) > 1 else None}


def _arm(arm: Arm, runs: list[dict[str, Any]], level: float | None) -> dict[str, Any]:
    losses = [run["heldout"]["value"] for run in runs]
    return {
        "name": arm.name,
        "control": arm.control,
        "published": arm.published,
        "flags": dict(arm.flags),
        "stages": [dict(stage) for stage in arm.stages],
        "tokens": runs[0]["tokens"],
        "seconds": spread([run["seconds"] for run in runs]),
        "heldout": spread(losses) | {"standard_error": runs[0]["heldout"]["standard_error"]},
        "gap": spread([None if level is None else loss - level for loss in losses]),
        "scores": {
            k: spread([run["scores"][k]["value"] for run in runs])
            | {"standard_error": runs[0]["scores"][k]["standard_error"]}
            for k in runs[0]["scores"]
        },
        "share": spread([run["share"] for run in runs]),
        "above_chance": spread([run["above_chance"] for run in runs]),
        "runs": runs,
    }


def order(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arms of the paper's Table 3, the best first, as the paper has them and as the held-out loss has them.

    ``differs`` are pairs that stand the other way round here, with the difference in nats and its standard error (over
    seeds where there are several, else over the held-out text, as if the two were measured on different texts), with
    the lead in nats that the better one here had before any training, and with the tokens of both there and here.
    """
    rows = published_tables()[PUBLISHED]["rows"]
    mean = {name: statistics.fmean(rows[arm["published"]]["values"]) for name, arm in arms.items() if arm["published"]}
    loss = {name: arms[name]["heldout"]["mean"] for name in mean}
    paper = sorted(mean, key=lambda name: -mean[name])
    differs = []
    for i, better in enumerate(paper):
        for worse in paper[i + 1 :]:
            if loss[better] > loss[worse]:
                errors = [_error(arms[name]) for name in (better, worse)]
                error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
                begun = [arms[name]["runs"][0]["curve"][:1] for name in (better, worse)]
                differs.append(
                    {
                        "paper_better": better,
                        "here_better": worse,
                        "nats": loss[better] - loss[worse],
                        "standard_error": error,
                        "lead_untrained": begun[0][0][1] - begun[1][0][1] if all(begun) else None,
                        "paper_tokens": [rows[arms[name]["published"]]["tokens"] for name in (better, worse)],
                        "tokens": arms[worse]["tokens"],
                    }
                )
    return {
        "paper": [
            {"name": name, "mean": mean[name], "tokens": rows[arms[name]["published"]]["tokens"]} for name in paper
        ],
        "measured": sorted(loss, key=lambda name: loss[name]),
        "differs": differs,
    }


def _error(arm: Mapping[str, Any]) -> float | None:
    deviation, runs = arm["heldout"]["deviation"], len(arm["runs"])
    return arm["heldout"]["standard_error"] if deviation is None else deviation / math.sqrt(runs)
