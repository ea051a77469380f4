"""Where the stages of a run lie: each is a run of its own, in a folder ``stage_NUMBER_LABEL`` inside the run's."""

from __future__ import annotations

import re
from pathlib import Path


def stage_folder(number: int, label: str) -> str:
    """The name of a stage's folder."""
    return f"stage_{number}_{label}"


def stage_folders(run: Path) -> list[Path]:
    """The run folders of a run's stages, in their order; of a run without stages its own alone."""
    numbered = {int(m[1]): f for f in run.glob("stage_*") if (m := re.match(r"stage_(\d+)_", f.name)) and f.is_dir()}
    return [numbered[n] for n in sorted(numbered)] or [run]
