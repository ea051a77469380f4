"""Memory that a process keeps: page faults of tensors that come and go, and what leaves malloc alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from open_lm_linear.heap import TUNED, kept_memory

MEASURE = """
import json, pathlib, resource, sys
import torch
from open_lm_linear.heap import kept_memory
from open_lm_linear.parallel import ParallelConfig, setup

ROUNDS, BYTES = 4, 64 << 20
PAGE = resource.getpagesize()

def share():  # of the pages of a few large tensors, one after the other, that the kernel hands out anew
    found = []
    for _ in range(4):  # until malloc has its places for them
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(ROUNDS):
            torch.ones(BYTES // 4)
        found.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * PAGE / (ROUNDS * BYTES))
    return min(found)

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE / BYTES

def run():
    with setup(ParallelConfig(device="cpu")):
        return share()

measured = {"before": share(), "resident before": resident()}
try:
    with kept_memory() as measured["kept"]:
        measured["inside"], measured["resident inside"] = share(), resident()
        raise ValueError
except ValueError:
    measured["resident after"] = resident()
measured["run"] = run()
print(json.dumps(measured))
"""


def test_a_freed_tensor_gives_the_next_its_memory() -> None:
    """In a process of its own, whose heap no other test has shaped."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(TUNED)}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=env)
    measured = json.loads(done.stdout)
    if not measured["kept"] or measured["before"] < 0.5:
        pytest.skip("not glibc, or pages are huge")
    assert measured["inside"] < 0.01
    assert measured["run"] < 0.01
    assert measured["resident inside"] > measured["resident before"] + 0.9
    assert measured["resident after"] < measured["resident before"] + 0.1


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_malloc_that_is_tuned_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with kept_memory() as kept:
        assert not kept
