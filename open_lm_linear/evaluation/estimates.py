"""Means with their standard errors, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which a single value does not have."""
    return ratio(values, [1] * len(values))


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) over groups of unequal size, and its standard error over the groups.

    var = n / (n - 1) * sum_i (sum_i - ratio * count_i)^2 / total^2, the ratio estimator's; with all counts 1 it is the
    usual standard error of a mean.
    """
    n, total = len(counts), math.fsum(counts)
    value = math.fsum(sums) / total
    if n < 2:
        return value, None
    squares = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return value, math.sqrt(n / (n - 1) * squares) / total


def row(
    task: str,
    metric: str,
    values: Sequence[float],
    counts: Sequence[float] | None = None,
    *,
    chance: float | None = None,
) -> dict[str, Any]:
    """One row of results: the mean of ``values``, or sum(values) / sum(counts)."""
    value, error = mean(values) if counts is None else ratio(values, counts)
    row = {"task": task, "metric": metric, "value": value, "standard_error": error, "n": len(values)}
    return row | {"chance": chance}
