"""A run's folder: whose it is, which of its checkpoints a run goes on from, and the tokenizer that it keeps."""

from __future__ import annotations

from pathlib import Path

import torch

from open_lm_linear import checkpoint, pretrained
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config, write_run_config
from open_lm_linear.parallel import Context
from open_lm_linear.remote_copy import RemoteCopy


def claim(cfg: Config, run: Path, ctx: Context, remote: RemoteCopy | None) -> tuple[Path | None, str]:
    """Makes the run folder this run's own; returns the checkpoint to resume, if any, and what was passed over for it.

    A dry run claims nothing.
    """
    resume, dry = cfg.checkpoint.resume, cfg.run.dry_run
    holds_run = (run / "config.yaml").exists()
    if holds_run and not resume and not dry:
        raise UserError(f"{run} already holds a run: choose another --name, or go on with --resume latest.")
    ctx.barrier()  # every rank has looked before rank 0 writes
    if ctx.is_main and not dry:
        run.mkdir(parents=True, exist_ok=True)
    resume_from, warning = Path(resume) if resume and resume != "latest" else None, ""
    if resume == "latest":
        resume_from, warning = _latest(run, ctx, None if dry else remote)
    elif resume_from is not None:
        checkpoint.require_readable(resume_from)
    if ctx.is_main and not dry:
        checkpoint.remove_partial(run)
        if not holds_run:
            write_run_config(cfg, run)
            if cfg.model.pretrained:
                _keep_tokenizer(cfg.model.pretrained, run)
    ctx.barrier()
    return resume_from, warning


def _latest(run: Path, ctx: Context, remote: RemoteCopy | None) -> tuple[Path | None, str]:
    """The newest whole checkpoint, here or else there. Rank 0 looks, and the others take its word."""
    found, warning = None, ""
    if ctx.is_main:
        try:
            found, warning = checkpoint.latest_whole(run)
        except UserError as error:
            if remote is None:
                raise
            warning = f"warning: {error}"
        if found is None and remote is not None:
            found = remote.fetch()
    number = -1 if found is None else int(found.name.removeprefix("step_"))
    word = ctx.sum(torch.tensor(number + 1 if ctx.is_main else 0, device=ctx.device))
    return checkpoint.folder_of(run, int(word) - 1) if int(word) else None, warning


def _keep_tokenizer(source: str, run: Path) -> None:
    """Puts the tokenizer into the run folder, so that the run is whole in itself."""
    try:
        pretrained.load_tokenizer(source).save_pretrained(run)
    except UserError as error:
        print(f"warning: {error} Generation from this run will need --tokenizer.")
