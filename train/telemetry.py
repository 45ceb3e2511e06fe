"""This module watches how well batches are mixed, cheaply enough for every step of training."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 256


class ShuffleTelemetry:
    """Compares the entropy of the datasets of each batch with what random batches of the same size would have.

    Args:
        shares: Of each dataset among the cells that are streamed; None when nobody knows (weights by cell).
    """

    def __init__(self, shares: NDArray[np.float64] | None) -> None:
        self._shares = shares
        self._expected: dict[int, float] = {}
        self._found = self._ideal = 0.0

    def add(self, datasets: NDArray[np.int32]) -> None:
        """Take the datasets of a batch's cells, by number."""
        n_cells = len(datasets)
        if self._shares is None or n_cells == 0:
            return
        if n_cells not in self._expected:
            counts = np.random.default_rng(0).multinomial(n_cells, self._shares, size=DRAWS)
            self._expected[n_cells] = float(np.mean([_entropy(line) for line in counts]))
        self._found += _entropy(np.bincount(datasets + 1)[1:])
        self._ideal += self._expected[n_cells]

    @property
    def ratio(self) -> float:
        """Entropy so far over what was to be expected: 1 is an ideal shuffle; NaN where there is one dataset only."""
        return self._found / self._ideal if self._ideal > 0 else float("nan")


def _entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy of a sample, in nats: log n - sum(c log c) / n."""
    total = int(counts.sum())
    return float(np.log(total) - _c_log_c(total)[counts].sum() / total) if total else 0.0


@lru_cache(maxsize=8)
def _c_log_c(most: int) -> NDArray[np.float64]:
    counts = np.arange(most + 1, dtype=np.float64)
    return counts * np.log(np.maximum(counts, 1.0))
