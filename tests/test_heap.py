"""Memory that a process keeps, and what leaves malloc alone; parameters in huge pages."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from open_lm_linear.heap import HUGE_PAGE, HUGE_REGIONS, TUNED, in_memory, kept_memory, to_huge_pages

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


def huge_bytes() -> int:
    """Of this process, in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages for who asks")
def test_parameters_move_to_huge_pages_and_keep_their_values() -> None:
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape).to(dtype))
        for shape, dtype in (((700, 3001), torch.float32), ((5, 7), torch.bfloat16), ((2048, 1024), torch.bfloat16))
    ]
    kept, before = [p.detach().clone() for p in parameters], huge_bytes()
    places = [p.data_ptr() for p in parameters]
    moved = to_huge_pages([*parameters, parameters[0]])
    assert sum(p.nbytes for p in parameters) <= moved < sum(p.nbytes + 64 for p in parameters)
    assert not set(places) & {p.data_ptr() for p in parameters}
    assert parameters[0].data_ptr() % HUGE_PAGE == 0
    for parameter, value in zip(parameters, kept, strict=True):
        assert torch.equal(parameter, value) and parameter.shape == value.shape and parameter.dtype == value.dtype
        assert parameter.requires_grad and parameter.untyped_storage().nbytes() == parameter.nbytes
    parameters[0].sum().backward()
    assert torch.equal(parameters[0].grad, torch.ones(700, 3001))
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert huge_bytes() > before


def test_memory_that_something_else_shares_is_left() -> None:
    whole = torch.randn(2, 1024, 1024)
    part, columns = nn.Parameter(whole[0]), nn.Parameter(torch.randn(1024, 1024).T)
    twice = torch.randn(1024, 1024)
    shared = [nn.Parameter(twice), nn.Parameter(twice)]
    others = nn.Parameter(torch.randn(1024, 1024).share_memory_())
    with torch.inference_mode():
        unknown = nn.Parameter(torch.randn(1024, 1024), requires_grad=False)
    given = [part, columns, *shared, others, unknown]
    places = [p.data_ptr() for p in given]
    assert to_huge_pages(given) == 0
    assert [p.data_ptr() for p in given] == places


def test_less_than_a_page_is_left() -> None:
    small = nn.Parameter(torch.randn(10, 10))
    place = small.data_ptr()
    assert to_huge_pages([small]) == to_huge_pages([]) == 0
    assert small.data_ptr() == place


def test_where_memory_is_refused_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    parameter = nn.Parameter(torch.randn(1024, 1024))
    place = parameter.data_ptr()
    assert to_huge_pages([parameter]) == 0 and parameter.data_ptr() == place


def test_a_model_is_made_in_huge_pages_and_need_not_move() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024, dtype=torch.bfloat16), nn.LayerNorm(1024), nn.Linear(1024, 600))
    model[2].bias.requires_grad_(False)
    facts = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    others = len(HUGE_REGIONS)
    assert in_memory(model, "cpu") is model
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == facts
    for i, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, i)
    assert all((p == i).all() and p.untyped_storage().nbytes() == p.nbytes for i, p in enumerate(model.parameters()))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert model[0].weight.data_ptr() % HUGE_PAGE == 0 and to_huge_pages(model.parameters()) == 0
        assert len(HUGE_REGIONS) == others + 1
        del model, parameter
        assert len(HUGE_REGIONS) == others


def test_only_a_model_of_the_meta_device_is_put_in_memory() -> None:
    with pytest.raises(ValueError, match="meta device"):
        in_memory(nn.Linear(2, 2), "cpu")
