"""How sure a mean loss is: a bootstrap over sequences."""

from __future__ import annotations

import numpy as np

from open_lm_linear.data.order import random

GROUPS = 10_000  # more sequences than these are resampled in groups, so that the time stays bounded
PERCENTILES = (2.5, 97.5)


def bootstrap(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of sum(sums) / sum(counts) when the sequences are drawn anew, a pure function of its arguments.

    Args:
        sums: float64 (sequences,), the summed loss of each sequence.
        counts: (sequences,), its targets.
        resamples: how often all are drawn with replacement; the ends are percentiles over these.

    Returns:
        (low, high), or None for fewer than two sequences or no resamples.
    """
    n = min(len(sums), GROUPS)
    if n < 2 or resamples < 1:
        return None
    group = np.arange(len(sums)) % n
    sums, counts = (np.bincount(group, values, n) for values in (sums, counts))
    means = np.full(resamples, np.nan)
    for i in range(resamples):
        drawn = (random(seed, i, 0, n) % np.uint64(n)).astype(np.int64)
        if total := counts[drawn].sum():
            means[i] = sums[drawn].sum() / total
    means = means[np.isfinite(means)]
    low, high = np.percentile(means, PERCENTILES) if len(means) else (np.nan, np.nan)
    return float(low), float(high)
