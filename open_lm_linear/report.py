"""Shows what a run came to: a table in the terminal, ``report.md``, ``report.json``, ``loss.png``, ``decoding.png``.

    python -m open_lm_linear.report RUN

reads the run folder's ``config.yaml``, ``metrics.jsonl`` and ``results.jsonl`` (the trainer's) and ``evaluation.json``
(``open_lm_linear.evaluate``'s), and measures nothing itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.evaluation.tables import Table
from open_lm_linear.objectives import LAYERWISE
from open_lm_linear.stages import stage_folders

EVALUATION = "evaluation.json"
PAPER_TOKENS = (20_000_000_000, 100_000_000_000)  # arXiv 2405.06640, the range of its uptraining
GOOD_MODEL = (
    "torchrun --nproc-per-node 8 -m open_lm_linear.main --attn-name linear --pretrained mistral "
    "--dataset-manifest DATA/manifest.jsonl --config configs/runs/mistral_7b_supra_100b.yaml"
)
LABELS = {
    "teacher": "teacher (softmax)",
    "swapped": "swapped, untrained",
    "fitted": "swapped and fitted, untrained",
    "uptrained": "uptrained (RNN)",
}
COLOURS = {"teacher": "#4b5d78", "swapped": "#9a9a9a", "uptrained": "#d1602b", "beside": "#7a5ba6"}
# Settings that the report names; the run's config.yaml has all of them.
SETTINGS = (
    *("pretrained", "attn_name", "feature_map", "feature_map_init", "feature_dim", "use_decay", "use_retnet_slopes"),
    *("decay_start", "loss", "init_tokens", "fit_tokens", "train_params", "optimizer", "lr", "lr_new"),
    *("lr_scheduler", "lr_cooldown_end", "warmup", "wd"),
    *("beta1", "beta2", "eps", "grad_clip_norm", "z_loss_coefficient", "train_data", "dataset_manifest"),
    *("global_batch_size", "accum_freq", "seq_len", "train_num_samples", "epochs", "precision", "seed"),
)
OF_THE_START = ("pretrained", "attn_name", "feature_map", "feature_map_init", "init_tokens", "fit_tokens")


def report(run: Path) -> dict[str, Any]:
    """Prints the tables and writes the four files into the run folder; returns what ``report.json`` holds.

    The texts are written before the plots, so that a machine without matplotlib still gets them.

    Raises:
        UserError: the folder holds no evaluation or a file that cannot be read, or matplotlib is missing.
    """
    facts = gather(run)
    (run / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (run / "report.md").write_text(markdown(facts), encoding="utf-8")
    for table in tables(facts):
        print(table.text(), end="\n\n")
    print("\n".join(notes(facts)))
    plots = plot(run, facts)
    print(f"\nwritten into {run}: report.md, report.json{''.join(f', {name}' for name in plots)}")
    return facts


def gather(run: Path) -> dict[str, Any]:
    """Everything the report says, as JSON.

    Keys: run, settings, training (steps, tokens, seconds, final_loss, curve, held_out), beside (the same of other runs
    by name), evaluation (the file whole), comparison (ratios of perplexities), paper (tokens, share).
    """
    if not run.is_dir():
        raise UserError(f"no run folder at {run}.")
    if not (run / EVALUATION).is_file():
        raise UserError(f"{run} is not measured yet: `python -m open_lm_linear.evaluate --run {run}` does that.")
    evaluation = _read_json(run / EVALUATION)
    stages = stage_folders(run)
    training = _training(stages)
    facts: dict[str, Any] = {
        "run": str(run),
        "settings": _settings([_read_yaml(stage / "config.yaml") for stage in stages], evaluation.get("model", {})),
        "training": training,
        "beside": {Path(other).name: _training(stage_folders(Path(other))) for other in evaluation.get("beside", [])},
        "evaluation": evaluation,
        "comparison": _comparison(evaluation),
        "paper": {"tokens": list(PAPER_TOKENS), "command": GOOD_MODEL},
    }
    if training["tokens"]:
        facts["paper"]["share"] = [training["tokens"] / tokens for tokens in PAPER_TOKENS]
    return facts


def _training(stages: Sequence[Path]) -> dict[str, Any]:
    """Steps, tokens and losses of all stages, one behind the other; a loss is cross entropy whatever was minimised."""
    found: dict[str, Any] = {"steps": 0, "tokens": 0, "seconds": 0.0, "final_loss": None, "curve": [], "held_out": []}
    fitted = None
    for stage in stages:
        metrics, results = _read_lines(stage / "metrics.jsonl"), _read_lines(stage / "results.jsonl")
        before = found["tokens"]
        for row in metrics:
            entropy = row.get("loss_ce", None if any(name in row for name in LAYERWISE) else row.get("loss"))
            if "tokens" in row and entropy is not None:
                found["curve"].append((before + row["tokens"], entropy))
        found["held_out"] += [(before + row["tokens"], row["loss"]) for row in results if row.get("loss") is not None]
        fitted = fitted or next((_as_perplexity(row) for row in results if row.get("fitted")), None)
        last, seconds = metrics[-1] if metrics else {}, _seconds(metrics)
        found["steps"] += last.get("step") or 0
        found["tokens"] += last.get("tokens") or 0
        found["seconds"] = None if seconds is None or found["seconds"] is None else found["seconds"] + seconds
    if found["curve"]:
        found["final_loss"] = found["curve"][-1][1]
    return {**found, "fitted": fitted}


def _as_perplexity(row: Mapping[str, Any]) -> dict[str, Any]:
    """A validation row of the trainer under the names that ``evaluate`` gives its own."""
    return {
        "perplexity": row["perplexity"],
        "nats_per_token": row["loss"],
        "nats_per_token_standard_error": row["standard_error"],
        "tokens": row["counted"],
    }


def _seconds(metrics: list[dict[str, Any]]) -> float | None:
    """Seconds of training: the trainer's own count, or else from the tokens of each row and their rate."""
    if metrics and metrics[-1].get("seconds") is not None:
        return float(metrics[-1]["seconds"])
    total, before = 0.0, 0
    for row in metrics:
        if not row.get("tokens_per_s") or "tokens" not in row:
            return None
        total += (row["tokens"] - before) / row["tokens_per_s"]
        before = row["tokens"]
    return total or None


def _settings(configs: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``SETTINGS`` from the run's config, and where it is silent from the model that came of it.

    Where stages differ, all of their values in a list, but for what the first alone is given: where it began.
    """
    flats = [{**model, **{k: v for k, v in config.items() if v is not None}} for config in configs]
    found = {}
    for name in SETTINGS:
        values = [flat.get(name) for flat in flats[: 1 if name in OF_THE_START else None]]
        value = values[0] if all(v == values[0] for v in values) else values
        if value not in (None, "", []):
            found[name] = value
    return found


def _comparison(evaluation: Mapping[str, Any]) -> dict[str, float]:
    models = evaluation.get("perplexity", {}).get("models", {})
    found = {name: row["perplexity"] for name, row in models.items() if row["perplexity"]}
    return {
        f"uptrained_over_{name}": found["uptrained"] / found[name]
        for name in ("swapped", "teacher")
        if name in found and "uptrained" in found
    }


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """What was measured, as tables; a part that was skipped has none."""
    evaluation, found = facts["evaluation"], []
    if "perplexity" in evaluation:
        part = evaluation["perplexity"]
        models: dict[str, dict[str, Any]] = dict(part["models"])
        if fitted := facts["training"]["fitted"]:  # measured by the trainer, on the way
            models["fitted"] = fitted
            models = {name: models[name] for name in LABELS if name in models}
        rows = tuple(
            (
                LABELS.get(name, name),
                _number(row["perplexity"]),
                _number(row["nats_per_token"], "{:.4f}"),
                _number(row["nats_per_token_standard_error"], "{:.4f}"),
                f"{row['tokens']:,}",
            )
            for name, row in models.items()
        )
        header = ("model", "perplexity", "nats per token", "standard error", "held-out tokens")
        found.append(Table(f"Held-out perplexity (per token, sequences of {part['seq_len']})", header, rows))
    if "decoding" in evaluation:
        found += _decoding_tables(evaluation["decoding"])
    return found


def _decoding_tables(part: Mapping[str, Any]) -> list[Table]:
    names = list(dict.fromkeys(row["model"] for row in part["rows"]))
    cells = {(row["model"], row["context_tokens"]): row for row in part["rows"]}
    contexts = sorted({context for _, context in cells})
    header = ["context"]
    for column in ("MB", "ms", "tokens/s"):
        header += [f"{name} {column}" for name in names]
    rows = []
    for context in contexts:
        of = [cells[name, context] for name in names]
        row = [f"{context:,}", *(f"{r['state_bytes'] / 1e6:.2f}" for r in of)]
        row += [f"{r['milliseconds_per_token']:.1f}" for r in of]
        rows.append((*row, *(_number(r["prefill_tokens_per_second"], "{:,.0f}") for r in of)))
    title = (
        f"Decoding one sequence at growing context ({part['weights']} weights): MB of memory, ms per token (median), "
        "tokens/s of the prompt"
    )
    return [Table(title, tuple(header), tuple(rows))]


def notes(facts: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader needs to take the numbers for what they are."""
    training, comparison, paper = facts["training"], facts["comparison"], facts["paper"]
    found = []
    if "uptrained_over_swapped" in comparison:
        line = f"Uptraining took the perplexity to {comparison['uptrained_over_swapped']:.2%} of the swapped model's"
        if "uptrained_over_teacher" in comparison:
            line += f"; that is {comparison['uptrained_over_teacher']:.1f} times the teacher's"
        found.append(line + ".")
    if training["tokens"]:
        low, high = (f"{tokens / 1e9:.0f}" for tokens in paper["tokens"])
        of_low, of_high = (_percent(share) for share in paper["share"])
        found.append(
            f"Trained on {training['tokens']:,} tokens in {training['steps']:,} steps"
            + (f" and {_duration(training['seconds'])}" if training["seconds"] else "")
            + f". The paper (arXiv 2405.06640) used {low} to {high} billion: this is {of_low} of the lower number and "
            f"{of_high} of the higher."
        )
    settings = facts["settings"]
    ways = {
        "init_tokens": "every head's decay and feature map were chosen by the teacher's head",
        "fit_tokens": "the output projections were fitted in closed form to the teacher's attention",
    }
    started = [
        f"{way} on {settings[name]:,} tokens (--{name.replace('_', '-')})"
        for name, way in ways.items()
        if settings.get(name)
    ]
    if started:
        found.append(f"Before the first step {', and '.join(started)}; the paper does not do that.")
    for name, other in facts["beside"].items():
        if other["held_out"]:
            tokens, loss = other["held_out"][-1]
            found.append(f"Beside it the run {name} stood at {loss:.4f} held-out nats after {tokens:,} tokens.")
    part = facts["evaluation"].get("decoding")
    if part:
        found += _growth(part)
    if "perplexity" in facts["evaluation"]:
        found.append(
            "The perplexity is that of the run's own held-out text; the demo's is documentation, so the numbers of the "
            "demo show that the method works and are no measure of general language."
        )
    found.append(f"For a good model, on a machine with 8 GPUs: {paper['command']}")
    return found


def _growth(part: Mapping[str, Any]) -> list[str]:
    found = []
    for name in dict.fromkeys(row["model"] for row in part["rows"]):
        rows = sorted((r for r in part["rows"] if r["model"] == name), key=lambda r: r["context_tokens"])
        first, last = rows[0], rows[-1]
        size, ms = ([row[key] for row in (first, last)] for key in ("state_bytes", "milliseconds_per_token"))
        grown = f"goes from {size[0] / 1e6:.2f} to" if size[0] != size[1] else "stays at"
        found.append(
            f"From {first['context_tokens']:,} to {last['context_tokens']:,} tokens of context the {name} model's "
            f"memory {grown} {size[1] / 1e6:.2f} MB per sequence, and its time goes from {ms[0]:.1f} to {ms[1]:.1f} ms "
            "per token."
        )
    if any(row["prefill_tokens_per_second"] is None for row in part["rows"]):
        found.append(
            f"Beyond {part['prefill_up_to']:,} tokens the teacher's cache was filled up with its own keys and values, "
            "since to compute it takes quadratic time; decoding does the same work on it."
        )
    return found


def markdown(facts: Mapping[str, Any]) -> str:
    """The whole of ``report.md``."""
    evaluation, training = facts["evaluation"], facts["training"]
    parts = [f"# {Path(facts['run']).name}", *(f"- {note}" for note in notes(facts))]
    text = ["\n".join([parts[0], "", *parts[1:]])]
    text += [table.markdown() for table in tables(facts)]
    if training["curve"]:
        text.append("![Loss over tokens](loss.png)")
    if "decoding" in evaluation:
        text.append("![Memory and time per token over context](decoding.png)")
    for row in evaluation.get("samples", {}).get("rows", []):
        lines = [f"**{row['prompt']}**", ""]
        lines += [f"- {LABELS.get(name, name)}: {_one_line(said)}" for name, said in row.items() if name != "prompt"]
        text.append("\n".join(lines))
    if "samples" in evaluation:
        s = evaluation["samples"]
        text.append(
            f"Samples: temperature {s['temperature']:g}, repetition penalty {s['repetition_penalty']:g}, "
            f"at most {s['max_new_tokens']} tokens."
        )
    text.append(_listed("What was run", _run_facts(facts)))
    text.append(_listed("Where it was measured", _machine_facts(evaluation)))
    return "\n\n".join(text) + "\n"


def _run_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    training, rows = facts["training"], dict(facts["settings"])
    parameters = facts["evaluation"].get("parameters")
    if parameters:
        share = parameters["new"] / parameters["total"]
        rows["parameters"] = f"{parameters['total']:,}, of which {parameters['new']:,} new ({share:.1%})"
    for name, value in (("steps", training["steps"]), ("tokens", training["tokens"])):
        rows[name] = "-" if value is None else f"{value:,}"
    rows["training time"] = _duration(training["seconds"]) if training["seconds"] else "-"
    rows["last training loss"] = _number(training["final_loss"], "{:.4f} nats per token")
    return rows


def _machine_facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    machine = dict(evaluation.get("machine", {}))
    if "memory_bytes" in machine:
        machine["memory"] = f"{machine.pop('memory_bytes') / 1e9:.0f} GB"
    times = {f"time for {part}": _duration(seconds) for part, seconds in evaluation.get("seconds", {}).items()}
    return {k: v for k, v in machine.items() if v is not None} | times


def _listed(title: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"### {title}", "", *(f"- {name}: {_plain(value)}" for name, value in rows.items())])


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def plot(run: Path, facts: Mapping[str, Any]) -> list[str]:
    """Writes ``loss.png`` and ``decoding.png``, each where there is something to draw; returns their names.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            f"the plots need matplotlib: pip install open_lm_linear[report]; report.md and report.json are in {run}."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
    drawn = []
    with plt.rc_context(style):
        if facts["training"]["curve"]:
            drawn.append(("loss.png", _loss_figure(plt, facts)))
        if "decoding" in facts["evaluation"]:
            drawn.append(("decoding.png", _decoding_figure(plt, facts["evaluation"]["decoding"])))
        for name, figure in drawn:
            figure.savefig(run / name, dpi=150)
            plt.close(figure)
    return [name for name, _ in drawn]


def _loss_figure(plt: Any, facts: Mapping[str, Any]) -> Any:
    training = facts["training"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(
        *zip(*training["curve"], strict=True), color=COLOURS["uptrained"], lw=1.2, alpha=0.75, label="training loss"
    )
    for name, other in facts["beside"].items():
        for points, style in ((other["curve"], "-"), (other["held_out"], "s--")):
            if points:
                label = f"{name}, {'training' if style == '-' else 'held-out'}"
                axes.plot(*zip(*points, strict=True), style, color=COLOURS["beside"], lw=1.2, ms=4, label=label)
    models = facts["evaluation"].get("perplexity", {}).get("models", {})
    for name, x, side in (("swapped", 0.995, "right"), ("teacher", 0.005, "left")):  # where the curve is not
        level = models.get(name, {}).get("nats_per_token")
        if level is not None:
            axes.axhline(level, color=COLOURS[name], lw=1.2, ls="--")
            label = f"{LABELS[name]}, held-out: {level:.2f}"
            where = axes.get_yaxis_transform()  # x from 0 to 1 over the axes, y in nats
            axes.text(x, level, label, transform=where, ha=side, va="bottom", color=COLOURS[name], fontsize=9)
    points = list(training["held_out"])
    level = models.get("uptrained", {}).get("nats_per_token")
    if level is not None and training["tokens"]:
        points.append((training["tokens"], level))
    if points:
        look = {"color": "black", "lw": 1, "ms": 5, "clip_on": False, "zorder": 3}
        axes.plot(*zip(*points, strict=True), "o-", label="held-out loss", **look)
    axes.set(xlabel="tokens trained on", ylabel="loss (nats per token)", title="Uptraining: loss over tokens")
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="center right")
    return figure


def _decoding_figure(plt: Any, part: Mapping[str, Any]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    contexts = sorted({row["context_tokens"] for row in part["rows"]})
    for name in dict.fromkeys(row["model"] for row in part["rows"]):
        rows = sorted((r for r in part["rows"] if r["model"] == name), key=lambda r: r["context_tokens"])
        x = [r["context_tokens"] for r in rows]
        look = {"color": COLOURS.get(name), "label": LABELS.get(name, name), "marker": "o", "ms": 4.5, "lw": 1.8}
        panels[0].plot(x, [r["state_bytes"] / 1e6 for r in rows], **look)
        panels[1].plot(x, [r["milliseconds_per_token"] for r in rows], **look)
        low, high = ([r[f"milliseconds_per_token_{p}"] for r in rows] for p in ("p10", "p90"))
        panels[1].fill_between(x, low, high, color=COLOURS.get(name), alpha=0.15, lw=0)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axes.minorticks_off()
        axes.set_xlabel("tokens of context")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="upper left")
    panels[0].set(ylabel="MB per sequence", title="Memory of one sequence")
    panels[1].set(ylabel="ms per token (median, 10 to 90 % shaded)", title="Time to decode one token")
    return figure


def _tokens(n: float) -> str:
    """512, 20k, 1.5M, 100B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:g}{unit}"
    return f"{n:g}"


def _number(value: float | None, form: str = "{:,.2f}") -> str:
    return "-" if value is None else form.format(value)


def _percent(share: float) -> str:
    """Two digits that count, never in powers of ten: 3e-6 -> 0.00030 %."""
    return f"{100 * share:.{max(0, 1 - math.floor(math.log10(100 * share)))}f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, none where it is missing; a last line cut off by a crash is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path} line {number} is not JSON: {line[:80]}") from error
    return rows


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


@dataclass(frozen=True)
class Args:
    """Flags of ``python -m open_lm_linear.report``."""

    run: tyro.conf.Positional[str]
    """The run folder."""


@command
def main() -> None:
    args = parse(Args, prog="python -m open_lm_linear.report", description="Show a measured run: tables, files, plots.")
    report(Path(args.run))


if __name__ == "__main__":
    main()
