"""`torchrun -m open_lm_linear.main`: trains the stages that the command line asks for.

Exit codes: 0 done, 1 or 2 with a sentence, 75 stopped by a signal and saved.
"""

from __future__ import annotations

import os
import sys

from open_lm_linear.cli import command
from open_lm_linear.config import stages_from_cli


@command
def main() -> None:
    stages = stages_from_cli()
    from open_lm_linear import faults
    from open_lm_linear.train import train, train_stages

    faults.die_with_launcher()
    code = 0
    try:
        if len(stages) == 1:
            train(stages[0])
        else:
            train_stages(stages)
    except faults.Stopped:
        code = faults.EXIT_STOPPED
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and the ranks have parted. Python's own way out would tear down gloo's threads in any order,
        # which now and then aborts a rank (seen with torch 2.13) and makes torchrun call a finished run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
