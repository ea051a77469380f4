"""Measures models: several side by side on a suite of tasks, or a run against the model that it came from.

    python -m open_lm_linear.evaluate --models smollm2 logs/my-run --suite paper_table1
    python -m open_lm_linear.evaluate --run RUN

The first writes ``result.json``, ``table.md`` and plots under ``--out``; the second ``evaluation.json`` into the run
folder, and has ``report`` show it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.evaluation.compare import SuiteArgs, compare
from open_lm_linear.evaluation.run import RunArgs, evaluate_run

PROG = "python -m open_lm_linear.evaluate"


@dataclass(frozen=True)
class Args:
    """Measure models on a suite of tasks (--models), or a run against the model that it came from (--run)."""

    device: str = "auto"
    """auto: the first GPU, or the CPU where there is none."""
    models: SuiteArgs = field(default_factory=SuiteArgs)
    """Models side by side."""
    run: RunArgs = field(default_factory=RunArgs)
    """One run."""


@command
def main() -> None:
    args = parse(Args, prog=PROG, description=Args.__doc__ or "")
    if bool(args.models.models) == bool(args.run.run):
        raise UserError(f"give either --models or --run; `{PROG} --help` explains both.")
    if args.run.run:
        from open_lm_linear import report

        evaluate_run(args.run, args.device)
        report.report(Path(args.run.run))
        return
    from open_lm_linear.evaluation import tables

    tables.report(compare(args.models, args.device))


if __name__ == "__main__":
    main()
