"""Hashes that are stored keep their bits, whatever is made of the code."""

from __future__ import annotations

import numpy as np

from store.hashes import hashed
from train.tokens import drawn

GAMMA = 0x9E3779B97F4A7C15
FIRST = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
"""What SplitMix64 of seed 0 begins with, as its authors' program prints it."""


def test_integers_are_hashed_as_splitmix_does_here_and_in_training() -> None:
    state = np.arange(1, 4, dtype=np.uint64) * np.uint64(GAMMA)
    assert hashed(state).tolist() == list(FIRST)
    salt = np.zeros((1, 1), np.uint64)
    assert drawn(np.arange(1, 4), salt).tolist() == [list(FIRST)]
