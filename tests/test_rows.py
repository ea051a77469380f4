"""Products of a matrix and a few rows on a CPU by the compiled code, and how that is built."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.ops import native
from open_lm_linear.ops.rows import RowsParameter

compiled = pytest.mark.skipif(native.native_library() is None, reason="no C++ compiler")


def matrix(out: int = 40, inputs: int = 24, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(out, inputs) * torch.logspace(-6, 0, inputs)).to(dtype)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("the compiled code was used")

    monkeypatch.setattr(RowsParameter, "times", never)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out, inputs", [(40, 24), (1, 1), (7, 33), (2, 64), (300, 259), (129, 96)])
def test_few_rows_are_multiplied_at_every_size(
    out: int, inputs: int, biased: bool, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_lm_linear.ops.rows.native_threads", lambda elements: threads)
    weight, bias = matrix(out, inputs, dtype), torch.randn(out).to(dtype) if biased else None
    for shape in ((1, inputs), (8, inputs), (2, 1, inputs), (3, 2, inputs)):
        x, used, times = torch.randn(shape).to(dtype), [], RowsParameter.times
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(RowsParameter, "times", lambda *args, t=times, u=used: u.append(1) or t(*args))
            y = F.linear(x, RowsParameter(weight), bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert used and y.dtype == dtype and y.shape == (*shape[:-1], out) and type(y) is torch.Tensor
        relative = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), exact, rtol=relative, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out, inputs", [(300, 259), (64, 512), (1001, 48), (17, 2100)])
def test_the_bits_of_an_output_do_not_depend_on_the_rows_read_beside_it(
    out: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [1]
    monkeypatch.setattr("open_lm_linear.ops.rows.native_threads", lambda elements: count[0])
    weight, x = torch.randn(out, inputs).to(dtype), torch.randn(3, inputs).to(dtype)
    with torch.no_grad():
        expected = torch.cat([F.linear(x, RowsParameter(row[None])) for row in weight], 1)
        for count[0] in (1, 2, 3, 7):
            assert torch.equal(F.linear(x, RowsParameter(weight)), expected)
            assert torch.equal(F.linear(x[1:2], RowsParameter(weight)), expected[1:2])


@compiled
@pytest.mark.parametrize("case", ["gradients", "many rows", "a vector", "no rows", "columns", "autocast"])
def test_all_other_products_are_as_they_were(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    weight = matrix()
    shape = {"many rows": (9, 24), "a vector": (24,), "no rows": (0, 24)}.get(case, (1, 24))
    x = torch.randn(shape).bfloat16()
    if case == "gradients":
        parameter = RowsParameter(weight)
        F.linear(x, parameter).sum().backward()
        assert torch.equal(parameter.grad, x.expand(40, 24))
        return
    if case == "columns":
        weight = weight.T.contiguous().T
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(F.linear(x, RowsParameter(weight)), F.linear(x, weight))


@compiled
def test_wrong_shapes_and_dtypes_say_what_torch_says() -> None:
    weight = RowsParameter(matrix())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(torch.randn(1, 24), weight)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(torch.randn(1, 23).bfloat16(), weight)


@compiled
def test_products_follow_the_values() -> None:
    linear, x = nn.Linear(24, 40, bias=False).bfloat16(), torch.randn(1, 24).bfloat16()
    linear.weight = RowsParameter(linear.weight)
    with torch.no_grad():
        before = linear(x)
        linear.weight.mul_(2)
        assert torch.equal(linear(x), 2 * before)
        linear.load_state_dict({"weight": torch.zeros(40, 24)})
        assert not linear(x).any()
        linear.weight.data = torch.ones(40, 24).bfloat16()
        assert torch.equal(linear(x), x.float().sum().bfloat16().expand(1, 40))


def test_it_is_a_parameter_like_any_other(tmp_path) -> None:
    linear = nn.Linear(24, 40, bias=False).bfloat16()
    weight = linear.weight.detach().clone()
    linear.weight = RowsParameter(linear.weight, requires_grad=False)
    assert not linear.weight.requires_grad and dict(linear.named_parameters())["weight"] is linear.weight
    torch.save(linear.state_dict(), tmp_path / "linear.pt")
    assert torch.equal(torch.load(tmp_path / "linear.pt", weights_only=True)["weight"], weight)
    assert torch.equal(copy.deepcopy(linear).weight, weight)
    assert torch.equal(linear.float().weight, weight.float())


# ---- how the code is built -------------------------------------------------------------------------------------------


def build(folder: Path, **environment: str) -> str:
    """What a fresh process says of its library, with a cache folder of its own."""
    code = "from open_lm_linear.ops.native import native_library as n; print('built' if n() else 'none', n() is n())"
    env = {**os.environ, "OPEN_LM_LINEAR_CACHE": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@compiled
def test_it_is_built_once_and_kept(tmp_path: Path) -> None:
    assert build(tmp_path).startswith("built True")
    (made,) = (tmp_path / "native").iterdir()
    assert made.suffix == ".so"
    before = made.stat().st_mtime_ns
    assert build(tmp_path).startswith("built True")
    assert [p.stat().st_mtime_ns for p in (tmp_path / "native").iterdir()] == [before]


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    assert build(tmp_path, OPEN_LM_LINEAR_NATIVE="0") == "none True\n"


@pytest.mark.parametrize("case", ["no compiler", "a compiler that fails"])
def test_where_it_cannot_be_built_a_warning_says_so_once(case: str, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    if case == "no compiler":
        said, reason = build(tmp_path, CXX=str(compiler)), f"no C++ compiler: {compiler}"
    else:
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cc: out of order" >&2\nexit 1\n')
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        said, reason = build(tmp_path, CXX=str(compiler)), "cc: out of order"
    assert said.startswith("none True\n") and reason in said
    assert said.count("decoding and losses on a CPU take torch's own operators") == 1
    assert not list((tmp_path / "native").glob("*.so")) if (tmp_path / "native").exists() else True
