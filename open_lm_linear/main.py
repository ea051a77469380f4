"""`torchrun -m open_lm_linear.main`: train(from_cli()), nothing else."""

from __future__ import annotations

import os
import sys

from open_lm_linear.cli import command
from open_lm_linear.config import from_cli


@command
def main() -> None:
    cfg = from_cli()
    from open_lm_linear.train import train

    train(cfg)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # All is written and the ranks have parted. Python's own way out would tear down gloo's threads in any order,
        # which now and then aborts a rank (seen with torch 2.13) and makes torchrun call a finished run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
