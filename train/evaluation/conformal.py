"""This module is conformal prediction where cells come in groups: donors, studies, perturbations.

Cells of a group are alike, so counting each as one calibration point promises too much. Here every group weighs the
same, however many cells it has (hierarchical conformal prediction; Lee, Barber and Willett 2023).

Shape letters used in this module:
    C  calibration points      Y  types
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def group_quantile(score_C: NDArray[np.float64], group_C: NDArray[Any], level: float, *, promise: bool = True) -> float:
    """Return the score that a point of a new group stays below with a probability of at least ``level``.

    Over groups that are exchangeable. Each of n groups has the weight 1 / (n + 1), dealt evenly to its points; the rest
    lies at infinity, so that with few groups the answer is infinite: nothing smaller is safe.

    Args:
        score_C: Scores; rows of a matrix are points of one group.
        group_C: The group of each (row of) score.
        level: In (0, 1).
        promise: False leaves out what lies at infinity: the groups' own quantile, which promises nothing.
    """
    scores = np.asarray(score_C, dtype=np.float64)
    _, code_C, size = np.unique(np.asarray(group_C, dtype=str), return_inverse=True, return_counts=True)
    weight_C = 1 / (len(size) + promise) / size[code_C]
    if scores.ndim > 1:
        weight_C = np.repeat(weight_C / scores.shape[1], scores.shape[1])
    order = np.argsort(scores.ravel(), kind="stable")
    below = np.cumsum(weight_C[order])
    place = int(np.searchsorted(below, level - 1e-9))
    return float(scores.ravel()[order[place]]) if place < len(order) else float("inf")
