"""The benchmark of a model runs; its two sides compute the same thing, and its fit finds a known exponent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import relative

SCRIPT = Path(__file__).parents[1] / "eval" / "bench_model.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("bench_model", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_model"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def small(bench: ModuleType):
    return bench.Bench(hidden_dim=64, n_layers=2, vocab_size=101, tokens=24)


def test_the_benchmark_prints_and_writes_every_side(tmp_path: Path) -> None:
    sizes = ["--hidden-dim", "64", "--n-layers", "1", "--vocab-size", "101", "--tokens", "70", "--growth", "64", "128"]
    flags = [*sizes, "--runs", "1", "--decoded", "2", "--dtypes", "float32", "--json", str(tmp_path / "bench.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["side"] for row in rows] == [
        *("64 tokens", "128 tokens"),
        *("ours", "token loop"),
        *("ours", "token loop", "floor", "floor, huge"),
        *("ours", "quadratic"),
    ]
    for row in rows:
        assert row["side"] in done.stdout and 0 < row["least"] <= row["milliseconds"] <= row["most"]
        assert (row["ratio"] is not None) == (row["side"] == "ours")
    assert "of the floor" in rows[4]["note"] and "time grows as tokens^" in done.stdout


def test_both_sides_compute_the_same(bench: ModuleType) -> None:
    model, ids = bench.small_model(small(bench), "float32"), torch.randint(101, (2, 24))
    with torch.no_grad():
        expected, _, past = model(ids, use_cache=True)
        with bench.by(bench.token_loop):
            found, _, old = model(ids, use_cache=True)
            after, _, _ = model(ids[:, :1], past_key_values=old)
        assert relative(found, expected) < 1e-5
        assert relative(after, model(ids[:, :1], past_key_values=past)[0]) < 1e-5
    gradients = []
    for call in bench.training_calls(model, ids).values():
        call()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(gradients[0], gradients[1]) < 1e-4


def test_the_fit_finds_the_exponent(bench: ModuleType) -> None:
    lengths = (2048, 8192, 65536)
    assert bench.exponent(lengths, [3.0 * n**1.5 for n in lengths]) == pytest.approx(1.5)
