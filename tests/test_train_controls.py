"""Which cells a cell of a window learns from, where rows are made up one by one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from store.part import NUMBERS
from train.controls import MatchedControls, find_controls, group_controls


def test_a_cell_whose_time_nobody_knows_comes_with_no_earlier_one() -> None:
    time_R = np.array([0, 1, 2, 3, np.nan, np.nan], np.float32)
    numbers_RF = np.full((6, len(NUMBERS)), np.nan, np.float32)
    numbers_RF[:, NUMBERS.index("time")] = time_R
    window = SimpleNamespace(codes_RF=np.zeros((6, 2), np.int32), numbers_RF=numbers_RF)
    wanted = MatchedControls(match=("dataset_id", "time"), earlier=1.0)
    everybody = np.ones(6, dtype=bool)
    groups = group_controls(wanted, wanted.fields, window, np.zeros(6, np.int64), everybody, ~everybody)
    found = [find_controls(wanted, groups, np.arange(6), np.arange(6), (0, step))[:, 0] for step in range(30)]
    assert [sorted(set(column)) for column in np.array(found).T.tolist()] == [[-1], [0], [0, 1], [0, 1, 2], [-1], [-1]]
