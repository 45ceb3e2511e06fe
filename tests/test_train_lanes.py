"""Loops of sixteen values do what plain ones do, and rows that go around the caches arrive whole and nowhere else."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from test_train_tokens import whole

from train import kernels, lanes
from train.stream import _Room
from train.tokens import TokenSettings, fast_tokens, make_tokens

wide = pytest.mark.skipif(not lanes.WIDE, reason="this processor puts no values side by side by itself")
LENGTHS = (0, 1, 15, 16, 17, 64, 1001)


COMPACT = [numba.njit(way) for way in (lanes.compact_plain, lanes.compact_wide)]
LOOK_UP = [numba.njit(way) for way in (lanes.look_up_plain, lanes.look_up_wide)]


@wide
@pytest.mark.parametrize("feature", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [np.uint8, np.uint16, np.uint32])
def test_sixteen_at_a_time_keeps_what_one_at_a_time_keeps(feature: Any, count: Any) -> None:
    rng = np.random.default_rng(0)
    for n in LENGTHS:
        draws = rng.integers(0, 2**32, n, dtype=np.uint32)
        draws[: n // 3] = 2**31  # on the border
        features = rng.integers(0, np.iinfo(feature).max, n, dtype=feature, endpoint=True) // 2
        counts = rng.integers(0, np.iinfo(count).max, n, dtype=count, endpoint=True)
        for lowest in (0, 1, 2**31, 2**31 + 1, 2**32 - 1):
            answers = []
            for function in COMPACT:
                to, count_to = np.zeros(n + lanes.LANES, np.int32), np.zeros(n + lanes.LANES, np.uint32)
                kept = function(draws, features, counts, n, np.uint32(lowest), 7, to, count_to)
                answers.append((to[:kept].tolist(), count_to[:kept].tolist()))
            chosen = draws >= lowest
            expected = ((features[chosen].astype(np.int64) + 7).astype(np.int32).tolist(), counts[chosen].tolist())
            assert answers == [expected, expected], (n, lowest)


@wide
@pytest.mark.parametrize("count", [np.uint8, np.uint16, np.uint32])
def test_sixteen_at_a_time_finds_what_one_at_a_time_finds(count: Any) -> None:
    rng = np.random.default_rng(1)
    table = rng.random(lanes.SMALL).astype(np.float32)
    for n in LENGTHS:
        for largest in (15, 31, 32, 250):
            counts = rng.integers(0, largest, n, dtype=count, endpoint=True)
            small = counts < lanes.SMALL
            for function in LOOK_UP:
                value, large = np.zeros(n, np.float32), np.zeros(n + lanes.LANES, np.int32)
                n_large = function(counts, n, table, value, large)
                assert large[:n_large].tolist() == np.flatnonzero(~small).tolist()
                assert (value[small] == table[counts[small]]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("around", [False, True])
def test_a_row_is_written_whole_and_nothing_beside_it(dtype: Any, around: bool) -> None:
    room = np.full(8192, 7, np.uint8)
    first = -room.ctypes.data % lanes.LINE
    rows = room[first : first + 4096].view(dtype).reshape(8, 128)
    for kept in (0, 1, 16, 100, 127, 128):
        room[:] = 7
        row = np.arange(1, 129 + lanes.LANES, dtype=dtype)
        lanes.put_row(row, kept, np.zeros(lanes.LANES, np.int32), rows[3], around)
        assert rows[3].tolist() == [*range(1, kept + 1), *[0] * (128 - kept)]
        rows[3] = np.full(512, 7, np.uint8).view(dtype)
        assert (room == 7).all()


def test_rows_are_written_around_the_caches_only_where_they_are_many_and_whole(monkeypatch: Any) -> None:
    batch = whole(8192, 1, 3000, np.uint16)
    budget = kernels.AROUND_BYTES // 8 // batch.n_cells
    everything = np.arange(batch.n_cells)
    spans = {"RNA": [(batch.counts["RNA"].spans, everything)]}
    chance = (3, 17)
    for settings in (TokenSettings(budget=budget), TokenSettings(budget=budget + 1), TokenSettings(budget=1000)):
        room = _Room()
        words = (spans, batch.measured, batch, {"RNA": 5}, settings, chance)
        fast = fast_tokens(*words, empty=room.take)[0]
        assert fast.feature_CL.data_ptr() % lanes.LINE == fast.value_CL.data_ptr() % lanes.LINE == 0
        with monkeypatch.context() as patch:
            patch.setattr("train.tokens.kernels", None)
            slow = make_tokens(batch, {"RNA": 5}, settings, chance=chance)
        assert torch.equal(fast.feature_CL, slow.feature_CL)
        torch.testing.assert_close(fast.value_CL, slow.value_CL, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", ["compact", "look_up"])
def test_a_processor_without_wide_instructions_takes_plain_loops(function: str) -> None:
    name = f"{function}_{'wide' if lanes.WIDE else 'plain'}"
    assert getattr(lanes, function).py_func is getattr(lanes, name)
