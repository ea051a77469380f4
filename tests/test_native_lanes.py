"""The compiled code as processors have it whose registers are shorter than this one's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from open_lm_linear.ops.native import native_library

HERE = Path(__file__).parent
FLAGS = {"x86-64-v3": "avx2", "x86-64": "sse2"}  # -march, and what the processor must have to run it
CASES = (
    "test_native_pointwise.py",
    "test_rows.py::test_few_rows_are_multiplied_at_every_size",
    "test_rows.py::test_the_bits_of_an_output_do_not_depend_on_the_rows_read_beside_it",
    "test_losses.py::test_the_compiled_code_at_every_size",
    "test_native_model.py::test_a_token_is_what_the_model_gives[dtype0-supra]",
    "test_native_model.py::test_a_token_is_what_the_model_gives[dtype1-supra]",
)


@pytest.mark.skipif(native_library() is None or platform.machine() != "x86_64", reason="no C++ compiler for x86-64")
@pytest.mark.parametrize("march", FLAGS)
def test_shorter_registers_give_the_same(march: str, tmp_path: Path) -> None:
    if FLAGS[march] not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {FLAGS[march]}")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/bash\nexec {os.environ.get("CXX", "c++")} "${{@/-march=native/-march={march}}}"\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "OPEN_LM_LINEAR_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / case) for case in CASES)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(list((tmp_path / "cache" / "native").glob("*.so"))) == 1
