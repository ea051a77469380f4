"""Where this package keeps on a machine what it would else have to fetch or make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$OPEN_LM_LINEAR_CACHE, or ~/.cache/open_lm_linear."""
    return Path(os.environ.get("OPEN_LM_LINEAR_CACHE", Path.home() / ".cache" / "open_lm_linear"))
