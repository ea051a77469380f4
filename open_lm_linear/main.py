"""`torchrun -m open_lm_linear.main`: train(from_cli()), nothing else."""

from __future__ import annotations

from open_lm_linear.cli import command
from open_lm_linear.config import from_cli


@command
def main() -> None:
    cfg = from_cli()
    from open_lm_linear.train import train

    train(cfg)


if __name__ == "__main__":
    main()
