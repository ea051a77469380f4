"""The paper's ablations (Table 3) and ours: arms with the same data, tokens, seeds and evaluation, beside controls.

    python eval/ablation.py --grid small --train-data DATA/train --val-data DATA/val --output studies/small --controls
    python eval/ablation.py --grid gpu ... --arms supra --only train          # one arm a call
    python eval/ablation.py --grid gpu ... --only evaluate

Prints the plan with a forecast, trains and measures what is not there yet, and writes OUTPUT/report.md, report.json,
curves.png and positions.png. The same command goes on after an interruption. See docs/ablation.md.
"""

from __future__ import annotations

import shlex
import sys

from open_lm_linear import faults
from open_lm_linear.cli import command, parse
from open_lm_linear.study.run import StudyArgs, run


@command
def main() -> None:
    args = parse(StudyArgs, prog="python eval/ablation.py", description=StudyArgs.__doc__ or "")
    try:
        run(args, shlex.join(["python", *sys.argv]))
    except faults.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(faults.EXIT_STOPPED)


if __name__ == "__main__":
    main()
