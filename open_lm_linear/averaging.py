"""Running averages of the trained weights (``--averagers``), in float32 and sharded as the weights are.

    ema_D[_N]    a <- D a + (1 - D) w
    poly_E[_N]   a <- (1 - r) a + r w,   r = (E + 1) / (E + t)   (arXiv 1212.1824, equation 10)

every N steps (1), with t the number of updates, this one included; both begin at the weights they find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from open_lm_linear.cli import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = {"ema": 0.99, "poly": 0.0}
"""The kinds with the value that each has when none is given."""


@dataclass(frozen=True)
class Average:
    """One way to average: ``kind`` with its ``value`` (decay or eta), every ``every`` steps."""

    name: str
    kind: str
    value: float
    every: int

    def share(self, step: int) -> float:
        """The weight of the present parameters in the average after ``step`` steps (from 1); 0: no update."""
        if step % self.every:
            return 0.0
        if self.kind == "ema":
            return 1.0 - self.value
        return (self.value + 1.0) / (self.value + step // self.every)


def parse_averager(name: str) -> Average:
    """``ema_0.999``, ``poly_8_1``: kind, value, and the steps between two updates.

    Raises:
        UserError: another kind, or values out of range.
    """
    kind, *rest = name.strip().split("_")
    if kind not in KINDS:
        raise UserError(
            f"--averagers {name!r}: {kind!r} is none of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)} "
            "Write ema_0.999 or poly_8_1."
        )
    try:
        if len(rest) > 2:
            raise ValueError
        value = float(rest[0]) if rest else KINDS[kind]
        every = int(rest[1]) if len(rest) == 2 else 1
        if every < 1 or not (0 <= value < 1 if kind == "ema" else 0 <= value < float("inf")):
            raise ValueError
    except ValueError as error:
        raise UserError(
            f"--averagers {name!r} is not of the form ema_DECAY[_EVERY] (a decay from 0 to below 1) or "
            "poly_ETA[_EVERY] (an eta of 0 or more, EVERY a whole number from 1)."
        ) from error
    return Average(name.strip(), kind, value, every)


class Averagers:
    """All running averages of a model's trained parameters.

    Args:
        model: built, loaded, and frozen where it is to be; frozen parameters are their own average.
        spec: names with commas between them; empty: none.
    """

    def __init__(self, model: nn.Module, spec: str) -> None:
        from open_lm_linear.parallel import reshard

        reshard(model)
        self.model = model
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages = [parse_averager(name) for name in spec.split(",") if name.strip()]
        if len({a.name for a in self.averages}) < len(self.averages):
            raise UserError(f"--averagers {spec!r} names one average twice: give each once.")
        self.values = {a.name: {n: p.detach().float().clone() for n, p in self.params.items()} for a in self.averages}

    def names(self) -> list[str]:
        return [a.name for a in self.averages]

    def step(self, step: int) -> None:
        """Takes the weights after ``step`` steps (from 1) into every average that is due."""
        import torch

        for average in self.averages:
            share = average.share(step)
            if share:
                with torch.no_grad():
                    for name, value in self.values[average.name].items():
                        value.lerp_(self.params[name].detach().float(), share)

    def state(self) -> dict[str, Tensor]:
        """``AVERAGE/PARAMETER`` -> float32 tensor, sharded as the parameter is. The step is all else there is."""
        return {f"{a}/{n}": value for a, values in self.values.items() for n, value in values.items()}

    def require_same(self, names: Collection[str]) -> None:
        """Raises UserError where ``names`` are those of other averages or other trained parameters than this run's."""
        own = self.state()
        if odd := sorted(set(own) ^ set(names)):
            side = "this run" if odd[0] in own else "the checkpoint"
            raise UserError(f"the average {odd[0]!r} is only in {side}: resume with the same --averagers.")

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the values of ``state()``, whole or sharded.

        Raises:
            UserError: other averages or other trained parameters than this run's.
        """
        from open_lm_linear.parallel import put

        self.require_same(state.keys())
        for key, value in self.state().items():
            put(value, state[key])

    @contextlib.contextmanager
    def swap_in(self, name: str) -> Iterator[None]:
        """The model with the average ``name`` for its weights, for as long as the block runs."""
        import torch

        with torch.no_grad():
            present = {n: p.detach().clone() for n, p in self.params.items()}
            self._fill(self.values[name])
        try:
            yield
        finally:
            with torch.no_grad():
                self._fill(present)

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        from open_lm_linear.parallel import reshard

        for name, param in self.params.items():
            param.copy_(values[name])
        reshard(self.model)
