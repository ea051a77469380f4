"""Products of a matrix and a few rows on a CPU, from second copies of bfloat16 weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear.ops import rows
from open_lm_linear.ops.rows import PackedParameter

pytestmark = pytest.mark.skipif(not rows.packable(torch.ones(2, 2).bfloat16()), reason="torch without FBGEMM")


def matrix(out: int = 40, inputs: int = 24) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(out, inputs).bfloat16() * torch.logspace(-6, 0, inputs).bfloat16()


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("the second copy was used")

    monkeypatch.setattr(PackedParameter, "times", never)


@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (2, 1, 24), (2, 2, 2, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_are_multiplied_by_the_copy_more_exactly_than_by_bfloat16(
    shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = matrix(), torch.randn(shape).bfloat16()
    bias = torch.randn(40).bfloat16() if biased else None
    packed, used, times = PackedParameter(weight), [], PackedParameter.times
    monkeypatch.setattr(PackedParameter, "times", lambda *args: used.append(1) or times(*args))
    with torch.no_grad():
        y = F.linear(x, packed, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert used and y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], 40)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("case", ["gradients", "many rows", "a vector", "float32 rows", "no rows"])
def test_all_other_products_are_as_they_were(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch)
    weight = matrix()
    shape = {"many rows": (9, 24), "a vector": (24,), "no rows": (0, 24)}.get(case, (1, 24))
    x = torch.randn(shape).bfloat16()
    if case == "float32 rows":
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            F.linear(x.float(), PackedParameter(weight))
    elif case == "gradients":
        packed = PackedParameter(weight)
        F.linear(x, packed).sum().backward()
        assert torch.equal(packed.grad, x.expand(40, 24))
    else:
        with torch.no_grad():
            assert torch.equal(F.linear(x, PackedParameter(weight)), F.linear(x, weight))


def test_the_copy_follows_the_values() -> None:
    linear, x = nn.Linear(24, 40, bias=False).bfloat16(), torch.randn(1, 24).bfloat16()
    linear.weight = PackedParameter(linear.weight)
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
    linear.weight = PackedParameter(linear.weight, requires_grad=False)
    assert not linear.weight.requires_grad and dict(linear.named_parameters())["weight"] is linear.weight
    torch.save(linear.state_dict(), tmp_path / "linear.pt")
    assert torch.equal(torch.load(tmp_path / "linear.pt", weights_only=True)["weight"], weight)
    assert torch.equal(copy.deepcopy(linear).weight, weight)
    assert torch.equal(linear.float().weight, weight.float())


def test_what_float16_cannot_hold_is_not_packed() -> None:
    weight = matrix()
    assert rows.packable(weight) and not rows.packable(weight.float())
    weight[0, 0] = 70_000.0
    assert not rows.packable(weight)


def test_columns_are_for_wide_float32_matrices() -> None:
    wide, tall = nn.Linear(24, 40), nn.Linear(40, 24)
    before = wide.weight.clone()
    for linear in (wide, tall):
        rows.by_columns(linear)
    assert wide.weight.stride() == (1, 40) and tall.weight.is_contiguous()
    assert torch.equal(wide.weight, before)
