"""What a comparison of models came to: a table for the terminal and as markdown, and plots.

    from open_lm_linear.evaluation import tables; tables.report(Path("evaluations/paper_table1"))

shows the ``result.json`` of an evaluation again, and measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm_linear.cli import UserError

Row = dict[str, Any]

RESULT = "result.json"
AVERAGE = "average"
PARTS = ("domain", "position", "depth")  # what rows of a task may be split by
SHARES = ("acc", "acc_norm", "exact_match", "em", "f1")  # from 0 to 1, shown in per cent as all with such a chance are
COLOURS = ("#4b5d78", "#d1602b", "#6a994e", "#9a6fb0", "#c9a227", "#5aa9c9")


@dataclass(frozen=True)
class Table:
    """Columns under a title; the first column is text, the others are right-aligned numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """For a terminal."""
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]

        def line(cells: tuple[str, ...]) -> str:
            others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
            return "  ".join([cells[0].ljust(widths[0]), *others])

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title, rule, line(self.header), rule, *map(line, self.rows), rule])

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        ruler = line("---" if i == 0 else "---:" for i in range(len(self.header)))
        return "\n".join([f"### {self.title}", "", line(self.header), ruler, *map(line, self.rows)])


# ---- what follows from the scores ----------------------------------------------------------------------------------


def complete(rows: Sequence[Row], *, teacher: str, average: bool, published: str) -> list[Row]:
    """The rows with the mean of each model, the score relative to the teacher, and the published figure beside it.

    ``relative`` is (score - chance) / (teacher's - chance), None where the teacher is not above chance or is missing.
    ``published`` and ``difference`` (ours - theirs) are in per cent, for models whose name is that of a published row.
    """
    found = [dict(row) for row in rows]
    if average:
        found += _averages(found)
    of_teacher = {(row["label"], row["metric"]): row["value"] for row in found if row["model"] == teacher}
    figures = published_tables()[published] if published else None
    if figures and set(figures["columns"]) - {AVERAGE} - {row["label"] for row in rows}:
        figures["columns"] = [None if c == AVERAGE else c for c in figures["columns"]]  # a mean over other tasks
    for row in found:
        row["relative"] = relative(row["value"], of_teacher.get((row["label"], row["metric"])), row["chance"])
        figure = figure_of(figures, row["model"], row["label"]) if figures else None
        row["published"] = figure
        row["difference"] = None if figure is None else 100 * row["value"] - figure
    return found


def relative(value: float, teacher: float | None, chance: float | None) -> float | None:
    """(value - chance) / (teacher - chance), or None where the teacher is no better than chance.

    A chance above 1 is that of a loss, which is better below it.
    """
    if teacher is None or chance is None or (teacher >= chance if chance > 1 else teacher <= chance):
        return None
    return (value - chance) / (teacher - chance)


def parts_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Which part of its task a row is on; nothing for the whole, which is the domain ``all``."""
    return {part: row[part] for part in PARTS if row.get(part) not in (None, "all")}


def _averages(rows: Sequence[Row]) -> list[Row]:
    """The mean over the tasks of each model that has them all."""
    labels = {row["label"] for row in rows}
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        if {row["label"] for row in own} != labels:
            continue
        errors = [row["standard_error"] for row in own]
        chances = [row["chance"] for row in own]
        found.append(
            {
                "model": model,
                "label": AVERAGE,
                "task": AVERAGE,
                "metric": "mean",
                "value": sum(row["value"] for row in own) / len(own),
                "standard_error": None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(own),
                "n": sum(row["n"] for row in own),
                "chance": None if None in chances else sum(chances) / len(own),
            }
        )
    return found


def published_tables() -> dict[str, Any]:
    """The figures of published.yaml: table -> title, source, columns and rows."""
    import yaml

    return yaml.safe_load((Path(__file__).with_name("published.yaml")).read_text(encoding="utf-8"))


def figure_of(table: Mapping[str, Any], model: str, label: str) -> float | None:
    """The published figure, in per cent, of the row that is called as the model is."""
    row = next((r for key, r in table["rows"].items() if model in (key, r.get("also"))), None)
    if row is None or label not in table["columns"]:
        return None
    return row["values"][table["columns"].index(label)]


# ---- tables --------------------------------------------------------------------------------------------------------


def report(folder: Path) -> None:
    """Prints the tables of an evaluation and writes ``table.md`` and ``scores.png`` beside its ``result.json``.

    The text is written before the plot, so that a machine without matplotlib still gets it.

    Raises:
        UserError: no result there, or matplotlib is not installed.
    """
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RESULT} cannot be read: {error}.") from error
    found = tables(result)
    print("\n\n".join(table.text() for table in found))
    (folder / "table.md").write_text(markdown(result, found), encoding="utf-8")
    plot(folder, result)
    print(f"\nwritten: {folder}/result.json, table.md, scores.png")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The scores, and where others published theirs, those beside ours."""
    suite = result["suite"]
    models, cells = list(result["models"]), _cells(result)
    header = ["task", "metric", "shots", "n"]
    for model in models:
        header += [model] if model == result["teacher"] else [model, "relative"]
    rows = []
    for (label, metric), of in cells.items():
        first = next(iter(of.values()))
        line = [label, metric, _text(first.get("shots"), "{}"), _text(first["n"], "{:,}")]
        for model in models:
            line.append(_score(of.get(model)))
            if model != result["teacher"]:
                line.append(_text((of.get(model) or {}).get("relative"), "{:.1%}"))
        rows.append(tuple(line))
    title = (suite["title"] or suite["name"]) + (f", first {result['limit']} examples" if result["limit"] else "")
    found = [Table(title, tuple(header), tuple(rows))]
    if suite["published"]:
        found.append(_published(result, published_tables()[suite["published"]]))
    return found


def _cells(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Row]]:
    """(label, metric) -> model -> row, in the order of the rows."""
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result["rows"]:
        cells.setdefault((row["label"], row["metric"]), {})[row["model"]] = row
    return cells


def _published(result: Mapping[str, Any], table: Mapping[str, Any]) -> Table:
    """Every published row; below one whose name a model of ours has, ours and the difference."""
    columns = table["columns"]
    ours = {(row["model"], row["label"]): row for row in result["rows"] if row["label"] in columns}
    rows = []
    for key, published in table["rows"].items():
        about = published.get("tokens") or published.get("context")
        rows.append((key, str(about), *(_text(value, "{:.1f}") for value in published["values"])))
        for model in result["models"]:
            if model in (key, published.get("also")):
                own = [ours.get((model, column)) for column in columns]
                rows.append(("  ours", "", *(_text(row and 100 * row["value"], "{:.1f}") for row in own)))
                rows.append(("  difference", "", *(_text(row and row["difference"], "{:+.1f}") for row in own)))
    first = next(iter(table["rows"].values()))
    header = ("model", "tokens" if "tokens" in first else "trained at", *columns)
    return Table(f"Published, {table['title']} ({table['source']})", header, tuple(rows))


def _in_percent(row: Mapping[str, Any]) -> bool:
    chance = row["chance"]
    return row["metric"] in SHARES if chance is None else chance <= 1


def _score(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    scale, form = (100, "{:.1f}") if _in_percent(row) else (1, "{:.3f}")
    error = row["standard_error"]
    return form.format(scale * row["value"]) + ("" if error is None else f" ± {form.format(scale * error)}")


def _text(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def markdown(result: Mapping[str, Any], found: Iterable[Table]) -> str:
    """The whole of ``table.md``."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    notes = [
        f"Scores in per cent with their standard errors; relative: (score - chance) / ({result['teacher']} - chance).",
        f"Measured with {versions}, torch {result['machine']['torch']}, on "
        f"{result['machine']['gpu'] or result['machine']['cpu']}; log-likelihoods in the {result['form']} form.",
    ]
    if result["limit"]:
        notes.insert(0, f"A try on the first {result['limit']} examples of each task: no results to compare.")
    instead = {
        row["task"]: row["harness_task"]
        for row in result["rows"]
        if row.get("harness_task", row["task"]) != row["task"]
    }
    if instead:
        notes.append("Tasks of --include-path: " + ", ".join(f"{v} for {k}" for k, v in instead.items()) + ".")
    models = [
        f"{name}: {card['source']}, {card['parameters']:,} parameters, {card['dtype']}, requests cut to "
        f"{card['max_length']:,} tokens, fingerprint {card['fingerprint']}"
        for name, card in result["models"].items()
    ]
    parts = [f"# {result['suite']['name']}", "\n".join(f"- {line}" for line in notes + models)]
    parts += [table.markdown() for table in found]
    return "\n\n".join([*parts, "![Scores](scores.png)"]) + "\n"


# ---- the plot ------------------------------------------------------------------------------------------------------


def plot(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes ``scores.png``: bars with standard errors, and lines over the context for tasks that have one.

    Rows on a part of a task stand in the table alone.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            f"the plot needs matplotlib: pip install 'open_lm_linear[report]'; {folder} has the table and result.json."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, bool], list[Row]] = {}  # (title, over the context) -> rows
    for row in result["rows"]:
        if parts_of(row):
            continue  # the table has them
        over_context = row.get("context") is not None
        title = f"{row['task']}, {row['metric']}" if over_context else "score" if _in_percent(row) else row["metric"]
        panels.setdefault((title, over_context), []).append(row)
    if not panels:
        return
    colours = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(result["models"])}
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
    with plt.rc_context(style):
        size = (7, 3.6 * len(panels))
        figure, axes = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
        for ((title, over_context), rows), panel in zip(panels.items(), axes[:, 0], strict=True):
            (_lines if over_context else _bars)(panel, rows, colours)
            panel.set_title(title)
            panel.set_ylabel("per cent" if _in_percent(rows[0]) else rows[0]["metric"])
            panel.grid(axis="y", alpha=0.25)
            panel.legend(frameon=False, fontsize=8)
        figure.savefig(folder / "scores.png", dpi=150)
        plt.close(figure)


def _points(rows: Iterable[Row]) -> tuple[list[float], list[float]]:
    """Values and errors as they are shown; an unknown error is drawn as none."""
    shown = [(100 if _in_percent(row) else 1, row) for row in rows]
    return [s * row["value"] for s, row in shown], [s * (row["standard_error"] or 0.0) for s, row in shown]


def _bars(panel: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    metrics: dict[str, set[str]] = {}
    for row in rows:
        metrics.setdefault(row["label"], set()).add(row["metric"])

    def name(row: Row) -> str:
        return row["label"] if len(metrics[row["label"]]) == 1 else f"{row['label']}, {row['metric']}"

    names = list(dict.fromkeys(name(row) for row in rows))
    width = 0.8 / len(colours)
    for i, (model, colour) in enumerate(colours.items()):
        own = [row for row in rows if row["model"] == model]
        values, errors = _points(own)
        x = [names.index(name(row)) + (i - (len(colours) - 1) / 2) * width for row in own]
        panel.bar(x, values, width * 0.92, yerr=errors, color=colour, label=model, error_kw={"lw": 1, "capsize": 2})
    for row in rows:
        if row["chance"] and _in_percent(row):
            at = names.index(name(row))
            panel.hlines(100 * row["chance"], at - 0.45, at + 0.45, color="black", lw=1, ls=":")
    panel.set_xticks(range(len(names)), names, rotation=20, ha="right", rotation_mode="anchor", fontsize=8)


def _lines(panel: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    for model, colour in colours.items():
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["context"])
        values, errors = _points(own)
        x = [row["context"] for row in own]
        panel.errorbar(x, values, yerr=errors, color=colour, label=model, marker="o", ms=4, lw=1.6, capsize=2)
    contexts = sorted({row["context"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
    panel.minorticks_off()
    panel.set_xlabel("tokens of context")
