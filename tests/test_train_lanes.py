"""Loops of sixteen values do what plain ones do, and rows that go around the caches arrive whole and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from made_cells import whole

from train import kernels, lanes
from train.held import Room
from train.tokens import TokenSettings, fast_tokens, make_tokens

wide = pytest.mark.skipif(not lanes.WIDE, reason="this processor puts no values side by side by itself")
LENGTHS = (0, 1, 15, 16, 17, 64, 1001)


FACTOR = np.float32(0.7)
KEEP = [kernels._keep_plain, kernels._keep_wide]
LOG1P = [kernels._log1p_plain, kernels._log1p_wide]


def room(n: int) -> tuple[Any, ...]:
    """What a cell's tokens are made in: number, whole, log, table, large."""
    kinds = (np.int32, np.uint32, np.float32)
    made = [np.zeros(n + lanes.LANES, kind) for kind in kinds]
    return (*made, np.zeros(kernels.TABLE, np.float32), np.zeros(n + lanes.LANES, np.int32))


@wide
@pytest.mark.parametrize("feature", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [np.uint8, np.uint16, np.uint32])
def test_sixteen_at_a_time_keeps_what_one_at_a_time_keeps(feature: Any, count: Any) -> None:
    rng = np.random.default_rng(0)
    rooms = [room(max(LENGTHS)) for _ in KEEP]  # used again, as from cell to cell
    for n in LENGTHS:
        draws = rng.integers(0, 2**32, n, dtype=np.uint32)
        draws[: n // 3] = 2**31  # on the border
        features = rng.integers(0, np.iinfo(feature).max // 2, n, dtype=feature)
        for most in (15, 32, 255, np.iinfo(count).max):
            counts = rng.integers(0, most, n, dtype=count, endpoint=True)
            for lowest in (0, 1, 2**31, 2**31 + 1, 2**32 - 1):
                answers = []
                for keep, its in zip(KEEP, rooms, strict=True):
                    kept = keep(draws, features, counts, n, np.uint32(lowest), 7, np.int64(most), FACTOR, its)
                    answers.append((its[0][:kept].tolist(), its[2][:kept].tolist()))
                assert answers[0] == answers[1], (n, most, lowest)
                chosen = draws >= lowest
                assert answers[0][0] == (features[chosen].astype(np.int64) + 7).tolist()
                expected = np.log1p(counts[chosen].astype(np.float32) * FACTOR)
                np.testing.assert_allclose(answers[0][1], expected, rtol=1e-6)


@wide
@pytest.mark.parametrize("count", [np.uint8, np.uint16, np.uint32])
def test_sixteen_at_a_time_takes_the_logarithms_that_one_at_a_time_takes(count: Any) -> None:
    rng = np.random.default_rng(1)
    rooms = [room(max(LENGTHS)) for _ in LOG1P]
    for n in LENGTHS:
        for most in (1, 15, 31, 32, 250, np.iinfo(count).max):
            counts = rng.integers(0, most, n, dtype=count, endpoint=True)
            answers = []
            for log1p, (_, _, log, table, large) in zip(LOG1P, rooms, strict=True):
                log1p(counts, n, np.int64(most), FACTOR, table, log, large)
                answers.append(log[:n].tolist())
            assert answers[0] == answers[1], (n, most)
            np.testing.assert_allclose(answers[0], np.log1p(counts.astype(np.float32) * FACTOR), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("around", [False, True])
def test_a_row_is_written_whole_and_nothing_beside_it(dtype: Any, around: bool) -> None:
    held = np.full(8192, 7, np.uint8)
    first = -held.ctypes.data % lanes.LINE
    rows = held[first : first + 4096].view(dtype).reshape(8, 128)
    for kept in (0, 1, 16, 100, 127, 128):
        held[:] = 7
        row = np.arange(1, 129 + lanes.LANES, dtype=dtype)
        lanes.put_row(row, kept, rows[3], around)
        assert rows[3].tolist() == [*range(1, kept + 1), *[0] * (128 - kept)]
        rows[3] = np.full(512, 7, np.uint8).view(dtype)
        assert (held == 7).all()


def test_rows_are_written_around_the_caches_only_where_they_are_many_and_whole(monkeypatch: Any) -> None:
    batch = whole(8192, 1, 3000, np.uint16)
    budget = kernels.AROUND_BYTES // 8 // batch.n_cells
    everything = np.arange(batch.n_cells)
    spans = {"RNA": [(batch.counts["RNA"].spans, everything)]}
    chance = (3, 17)
    for settings in (TokenSettings(budget=budget), TokenSettings(budget=budget + 1), TokenSettings(budget=1000)):
        words = (spans, batch.measured, batch, {"RNA": 5}, settings, chance)
        fast = fast_tokens(*words, empty=Room().take)[0]
        assert fast.feature_CL.data_ptr() % lanes.LINE == fast.value_CL.data_ptr() % lanes.LINE == 0
        with monkeypatch.context() as patch:
            patch.setattr("train.tokens.kernels", None)
            slow = make_tokens(batch, {"RNA": 5}, settings, chance=chance)
        assert torch.equal(fast.feature_CL, slow.feature_CL)
        assert torch.equal(fast.value_CL, slow.value_CL)


def test_a_processor_without_wide_instructions_takes_plain_loops() -> None:
    assert kernels._keep is KEEP[lanes.WIDE]
    assert kernels._log1p_of is LOG1P[lanes.WIDE]
