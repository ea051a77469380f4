"""Shows what came of a study: tables, ``report.md``, ``report.json``, ``curves.png`` and ``positions.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation.run import write_json
from open_lm_linear.evaluation.tables import Table
from open_lm_linear.metrics import human_time

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
TEACHER_COLOUR = "#4b5d78"


def report(output: Path, facts: Mapping[str, Any]) -> None:
    """Prints the tables and writes the files; the texts before the plots, which need matplotlib.

    Raises:
        UserError: nothing was measured yet, or matplotlib is missing.
    """
    if facts["teacher"] is None or not facts["arms"]:
        raise UserError(f"{output} holds no measured arm yet: run the study, or its evaluation, first.")
    write_json(output / "report.json", facts)
    (output / "report.md").write_text(markdown(facts), encoding="utf-8")
    for table in tables(facts):
        print(table.text(), end="\n\n")
    print("\n".join(notes(facts)))
    plot(output, facts)
    print(f"\nwritten into {output}: report.md, report.json, curves.png, positions.png")


# ---- tables --------------------------------------------------------------------------------------------------------


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """Arms with losses and scores, tokens to recover, and the loss by position."""
    return [_main(facts), *_recovery(facts), _positions(facts)]


def _main(facts: Mapping[str, Any]) -> Table:
    teacher = facts["teacher"]
    labels = list(teacher["scores"])
    header = ["arm", "tokens", "training", "held-out nats", "gap", *labels]
    if _scored(facts):
        header += ["of teacher", "above chance"]
    of = teacher["heldout"]
    rows = [["teacher", "-", "-", _pair(of["value"], of["standard_error"], "{:.4f}"), "-"]]
    rows[0] += [_score(of, of["value"], of["standard_error"]) for of in teacher["scores"].values()]
    rows[0] += ["100.0%", "100.0%"] if _scored(facts) else []
    for arm in facts["arms"]:
        loss = arm["heldout"]
        row = [_name(arm), f"{arm['tokens']:,}", human_time(arm["seconds"]["mean"])]
        row += [_pair(loss["mean"], _error(loss), "{:.4f}"), _text(arm["gap"]["mean"], "{:+.4f}")]
        row += [_score(teacher["scores"][k], arm["scores"][k]["mean"], _error(arm["scores"][k])) for k in labels]
        if _scored(facts):
            row += [_text(arm[name]["mean"], "{:.1%}") for name in ("share", "above_chance")]
        rows.append(row)
    return Table(facts["title"], tuple(header), tuple(tuple(row) for row in rows))


def _scored(facts: Mapping[str, Any]) -> bool:
    return facts["teacher"]["share"] is not None


def _error(of: Mapping[str, Any]) -> float | None:
    """Over seeds where there are several, else over what was measured."""
    return of["standard_error"] if of["deviation"] is None else of["deviation"]


def _score(kind: Mapping[str, Any], value: float, error: float | None) -> str:
    percent = kind["chance"] is not None and kind["chance"] <= 1
    scale, form = (100, "{:.1f}") if percent else (1, "{:.3f}")
    return _pair(scale * value, None if error is None else scale * error, form)


def _pair(value: float | None, error: float | None, form: str) -> str:
    return _text(value, form) + ("" if error is None or value is None else f" ± {form.format(error)}")


def _text(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _name(arm: Mapping[str, Any]) -> str:
    return f"{arm['name']} (control)" if arm["control"] else arm["name"]


def _recovery(facts: Mapping[str, Any]) -> list[Table]:
    trained = [arm for arm in facts["arms"] if arm["runs"][0]["curve"]]
    if not trained:
        return []
    distances = list(trained[0]["runs"][0]["recovered"])
    rows = []
    for arm in trained:
        cells = []
        for distance in distances:
            found = [run["recovered"][distance] for run in arm["runs"]]
            cells.append(", ".join("-" if at is None else f"{at:,}" for at in found))
        rows.append((_name(arm), *cells))
    header = ("arm", *(f"{distance} nats" for distance in distances))
    return [Table("Tokens until the held-out loss is within so much of the teacher's, by seed", header, tuple(rows))]


def _positions(facts: Mapping[str, Any]) -> Table:
    def cells(of: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_pair(p["value"], p["standard_error"], "{:.3f}") for p in of["positions"])

    rows = [("teacher", *cells(facts["teacher"])), *((_name(arm), *cells(arm["runs"][0])) for arm in facts["arms"])]
    header = ("arm", *(f"{a}-{b}" for a, b in (p["position"] for p in facts["teacher"]["positions"])))
    return Table(f"Held-out nats by position, seed {facts['seeds'][0]}", header, tuple(rows))


def notes(facts: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader needs to take the numbers for what they are."""
    seeds, of = facts["seeds"], facts["teacher"]["heldout"]
    runs = "one run an arm; ± is the standard error over the held-out text or the examples"
    if len(seeds) > 1:
        runs = f"{len(seeds)} runs an arm (seeds {', '.join(map(str, seeds))}); ± is the standard deviation over them"
    found = [
        f"Every arm: {facts['tokens']:,} tokens, the same data and evaluation, {runs}.",
        f"The held-out loss is over {of['tokens']:,} tokens, the same for all arms.",
        "Tokens to recover: the first point of an arm's curve that is near enough; - where none is.",
    ]
    if _scored(facts):
        found.append(
            "of teacher: mean over the tasks of score / teacher's score, which guessing does not bring to 0; above "
            "chance: mean of (score - chance) / (teacher's - chance)."
        )
    for suite in facts["suites"]:
        if suite["limit"]:
            found.append(f"The suite {suite['suite']}: the first {suite['limit']} examples of each task alone.")
    if facts["missing"]:
        found.append(f"Not there yet: {'; '.join(facts['missing'])}.")
    return found + _order_notes(facts["order"])


def _order_notes(order: Mapping[str, Any]) -> list[str]:
    if len(order["paper"]) < 2:
        return []
    paper = " > ".join(f"{row['name']} ({row['mean']:.1f} after {row['tokens']})" for row in order["paper"])
    found = [
        f"The paper's Table 3, by the mean of its three tasks in per cent: {paper}.",
        f"Here, by held-out loss at equal tokens: {' > '.join(order['measured'])}.",
    ]
    for pair in order["differs"]:
        nats = _pair(pair["nats"], pair["standard_error"], "{:.3f}")
        there, ours = (
            f"{name} {tokens}"
            for name, tokens in zip((pair["paper_better"], pair["here_better"]), pair["paper_tokens"], strict=True)
        )
        sentence = f"Differs: {pair['here_better']} is before {pair['paper_better']} here, by {nats} nats"
        if pair["lead_untrained"] is not None:
            sentence += f", {pair['lead_untrained']:+.3f} before any training"
        found.append(f"{sentence}. The paper's had {there}, {ours} tokens; here each has {pair['tokens']:,}.")
    if not order["differs"]:
        found.append("That is the paper's order.")
    return found


def markdown(facts: Mapping[str, Any]) -> str:
    """The whole of ``report.md``."""
    machine = facts["machine"]
    text = ["\n".join([f"# {facts['title']}", "", *(f"- {note}" for note in notes(facts))])]
    first, *others = (table.markdown() for table in tables(facts))
    text += [first, "![Held-out loss over tokens](curves.png)", *others]
    text += ["![Held-out loss by position](positions.png)", *_samples(facts)]
    text.append("\n".join(["### The arms", "", *map(_described, facts["arms"])]))
    rows = {
        "command": f"`{facts['command']}`",
        "teacher": facts["teacher"]["source"],
        "every arm": ", ".join(f"{k} {v}" for k, v in facts["run"].items()),
        "machine": f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python']}",
    }
    text.append("\n".join(["### What was run", "", *(f"- {k}: {v}" for k, v in rows.items())]))
    return "\n\n".join(text) + "\n"


def _described(arm: Mapping[str, Any]) -> str:
    def shown(flags: Mapping[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in flags.items()) or "all as given"

    stages = " -> ".join(f"({shown(stage)})" for stage in arm["stages"]) or "not trained"
    return f"- {_name(arm)}: {shown(arm['flags'])}; {stages}"


def _samples(facts: Mapping[str, Any]) -> list[str]:
    models = {"teacher": facts["teacher"]} | {_name(arm): arm["runs"][0] for arm in facts["arms"]}
    found = []
    for i, prompt in enumerate(row["prompt"] for row in facts["teacher"]["samples"]):
        lines = [f"- {name}: {' '.join(of['samples'][i]['text'].split())}" for name, of in models.items()]
        found.append("\n".join([f"**{prompt}**", "", *lines]))
    return found


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot(output: Path, facts: Mapping[str, Any]) -> None:
    """Writes ``curves.png`` and ``positions.png``.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            f"the plots need matplotlib: pip install 'open_lm_linear[report]'; {output} has the report without them."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        for name, draw in (("curves.png", _curves), ("positions.png", _by_position)):
            figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
            draw(axes, facts, _looks(plt, facts["arms"]))
            axes.set_ylabel("held-out loss (nats per token)")
            axes.grid(alpha=0.25)
            figure.legend(frameon=False, fontsize=8, loc="outside right upper")
            figure.savefig(output / name, dpi=150)
            plt.close(figure)


def _looks(plt: Any, arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """An arm's line; controls are dashed."""
    colours = plt.get_cmap("tab20").colors
    return {
        arm["name"]: {
            "color": colours[i % 20],
            "ls": "--" if arm["control"] else "-",
            "marker": "o",
            "ms": 3,
            "lw": 1.5,
        }
        for i, arm in enumerate(arms)
    }


def _curves(axes: Any, facts: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    for arm in facts["arms"]:
        for i, run in enumerate(arm["runs"]):
            if run["curve"]:
                tokens, losses, _ = zip(*run["curve"], strict=True)
                axes.plot(tokens, losses, label=_name(arm) if i == 0 else None, **looks[arm["name"]])
            else:
                axes.axhline(run["heldout"]["value"], label=_name(arm), color=looks[arm["name"]]["color"], ls=":")
    axes.axhline(facts["teacher"]["heldout"]["value"], color=TEACHER_COLOUR, lw=1.5, ls="-.", label="teacher")
    axes.set(xlabel="tokens trained on, all stages", title="Held-out loss over tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(left=0)


def _by_position(axes: Any, facts: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    def line(of: Mapping[str, Any], **look: Any) -> None:
        ends = [p["position"][1] + 1 for p in of["positions"]]
        axes.plot(ends, [p["value"] for p in of["positions"]], **look)

    for arm in facts["arms"]:
        line(arm["runs"][0], label=_name(arm), **looks[arm["name"]])
    line(facts["teacher"], label="teacher", color=TEACHER_COLOUR, lw=2, ls="-.")
    ends = [p["position"][1] + 1 for p in facts["teacher"]["positions"]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [f"{end:,}" for end in ends])
    axes.minorticks_off()
    axes.set(xlabel="end of the bucket of positions", title="Held-out loss by position in the context")
