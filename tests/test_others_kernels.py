"""flash-linear-attention's and lightning-attn's kernels by Triton's interpreter, as our backends, are the definition.

They are written for a GPU, and so what the interpreter lacks gets a stand-in: a timing of an autotuner's choices, of
which the first is taken; the mathematics that they import by name; and a loop's index, which they treat as a tensor. In
half precision the interpreter's products are wrong, so that they are compared in float32; `ops.check` compares them in
half precision on a GPU.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from test_triton_linear import CASES, poisoned  # noqa: F401

from open_lm_linear.ops import backends, check, gated_delta, gated_linear
from open_lm_linear.ops.check import Case

if torch.cuda.is_available():
    pytest.skip("python -m open_lm_linear.ops.check is for a GPU", allow_module_level=True)
if not all(map(importlib.util.find_spec, ("fla", "lightning_attn"))):
    pytest.skip("flash-linear-attention or lightning-attn is not installed", allow_module_level=True)

FLOAT32 = [case for case in CASES if case.dtype == "float32"]
WHOLE = [
    Case("shared keys", "float32", (2, 75, 4, 2, 32, 40)),
    Case("wide", "float32", (1, 33, 2, 2, 128, 64)),
    Case("decays that underflow", "float32", (1, 70, 2, 1, 64, 17), 1e4),
    Case("almost no decay", "float32", (1, 65, 2, 1, 64, 32), 1e-5),
]


class Index(int):
    """A loop's index that can be given a width, as a tensor can."""

    def to(self, dtype: Any) -> Index:
        return self


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both as backends for float32 on a CPU."""
    from triton import language
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(backends, "HALF", (torch.float32,))
    monkeypatch.setattr(backends, "missing", lambda name, gpu: backends._import_error(name))
    monkeypatch.setattr(Autotuner, "_bench", lambda *_, **__: (0.0, 0.0, 0.0))
    importlib.import_module("fla.ops")
    for module in [module for name, module in sys.modules.items() if name.startswith("fla.ops")]:
        for name in ("exp", "exp2", "log", "log2"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda x, name=name: getattr(language, name)(x))
        monkeypatch.setattr(module, "range", lambda *ends: map(Index, builtins.range(*map(int, ends))), raising=False)
    yield


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.label)
def test_fla_is_the_definition(case, interpreted, poisoned):  # noqa: F811
    (finding,) = check.check_cases(("fla",), torch.device("cpu"), (case,))
    assert not finding.skipped and finding.right, check.line_of(finding)
    assert set(finding.errors) == set(check.PARTS) - (set() if case.state else {"dstate"})


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.label)
def test_lightning_is_the_definition(case, interpreted, poisoned):  # noqa: F811
    (finding,) = check.check_cases(("lightning",), torch.device("cpu"), (case,))
    assert not finding.skipped and finding.right, check.line_of(finding)
    assert set(finding.errors) == {"out", "state", "dq", "dk", "dv"}


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.label)
def test_lightning_refuses_the_others(case, interpreted):
    (finding,) = check.check_cases(("lightning",), torch.device("cpu"), (case,))
    assert finding.skipped.startswith("it takes") and not finding.errors


@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize("name", ["gla", "gated_delta_rule"])
def test_gated_kernels_are_the_definitions(name, tokens, interpreted, monkeypatch, poisoned):  # noqa: F811
    """Few tokens without gradients, by the recurrent kernels, and many with, by the chunked: a state, documents."""
    module, form, definition = {
        "gla": (gated_linear, gated_linear.gated_linear_attention, gated_linear.gla_naive),
        "gated_delta_rule": (gated_delta, gated_delta.gated_delta_rule, gated_delta.delta_naive),
    }[name]
    monkeypatch.setattr(module, "fla_module", lambda name, x: importlib.import_module(f"fla.ops.{name}"))
    torch.manual_seed(1)
    q, k, v = torch.randn(2, tokens, 4, 32), torch.randn(2, tokens, 2, 32), torch.randn(2, tokens, 2, 24)
    gates = [-torch.rand(2, tokens, 2, 32)] if name == "gla" else [-torch.rand(2, tokens, 2), torch.rand(2, tokens, 2)]
    state, first = torch.randn(2, 2, 32, 24), torch.rand(2, tokens) < 0.05
    leaves = [x.requires_grad_(tokens > 9) for x in (q, F.normalize(k, dim=-1), v, *gates, state)]
    found = []
    for operator in (form, definition):
        with torch.set_grad_enabled(tokens > 9):
            out, last = operator(*leaves, first)
        found.append([out, last])
        if tokens > 9:
            found[-1] += torch.autograd.grad(out.double().square().sum() + last.double().square().sum(), leaves)
    assert len(found[0]) == (2 if tokens == 9 else 2 + len(leaves))
    assert all(relative(ours, exact) < 1e-5 for ours, exact in zip(*found, strict=True))
