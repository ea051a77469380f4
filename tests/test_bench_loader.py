"""The benchmark of the loader runs, and its sides read the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_benchmark_prints_every_side(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    script = Path(__file__).parents[1] / "eval" / "bench_loader.py"
    flags = ["--megabytes", "1", "--seq-len", "64", "--runs", "1", "--folder", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert any("tokens, 1 MB as json and " in line for line in lines)
    assert [line[:18].strip() for line in lines[-4:]] == [
        "webdataset, json",
        "webdataset, npy",
        "this loader, json",
        "this loader, npy",
    ]
