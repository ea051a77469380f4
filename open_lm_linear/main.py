"""`torchrun -m open_lm_linear.main`: trains the stages that the command line asks for, and nothing else."""

from __future__ import annotations

import os
import sys

from open_lm_linear.cli import command
from open_lm_linear.config import stages_from_cli


@command
def main() -> None:
    stages = stages_from_cli()
    from open_lm_linear.train import train, train_stages

    if len(stages) == 1:
        train(stages[0])
    else:
        train_stages(stages)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and the ranks have parted. Python's own way out would tear down gloo's threads in any order,
        # which now and then aborts a rank (seen with torch 2.13) and makes torchrun call a finished run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
