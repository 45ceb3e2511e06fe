"""This module hashes integers: the finaliser of SplitMix (Steele, Lea and Flood 2014).

What it returns is stored in lakes and decides splits: its bits stay.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stirred(mixed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser's two rounds without its last step."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


def hashed(mixed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finaliser of integers; those that differ have different hashes."""
    mixed = stirred(mixed)
    return mixed ^ (mixed >> np.uint64(31))
