"""This module decides which rows are trained on at which step: a pure function, with no state but the step's number.

The rows of a split lie in blocks. Each epoch permutes the blocks, takes a window of them at a time, permutes the rows
of a window, and cuts the resulting order into global batches. A rank takes every W-th row of a batch. Nothing depends
on the number of ranks W but the last step, so any number of them resumes any other.

With lanes, a window's blocks are dealt out to lanes, rows are permuted within a lane, and the window's order takes one
row of each lane in turn. A rank then takes its rows from a few lanes and needs not read the blocks of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SamplePlan:
    """An endless order of samples.

    Attributes:
        n_rows: Rows of the split, numbered 0 to n_rows - 1.
        global_batch: Rows of one step over all ranks; the last step of an epoch takes what is left.
        seed: Decides the order.
        block: Consecutive rows that are read together.
        window: Blocks whose rows are mixed.
        lanes: Parts of a window that ranks can read apart; divides ``window``. As many as there will be ranks, or a
            multiple; part of the order, and independent of the number of ranks.

    Raises:
        ValueError: ``lanes`` does not divide ``window``.
    """

    n_rows: int
    global_batch: int
    seed: int = 0
    block: int = 1024
    window: int = 16
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window % self.lanes:
            raise ValueError(f"lanes={self.lanes} does not divide window={self.window}")

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was used once."""
        return -(-self.n_rows // self.global_batch)

    @property
    def window_rows(self) -> int:
        """Rows of a full window."""
        return self.block * self.window

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.n_rows // self.window_rows)

    def epoch_of(self, global_step: int) -> tuple[int, int]:
        """Return the epoch of a step and the step's number within it."""
        return divmod(global_step, self.steps_per_epoch)

    def window_order(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Return the rows of one window of an epoch, in the order in which they are used."""
        return _window_order(self, epoch, number)

    def batch(self, global_step: int) -> NDArray[np.int64]:
        """Return the rows of a step, over all ranks."""
        epoch, step = self.epoch_of(global_step)
        first, last = step * self.global_batch, min((step + 1) * self.global_batch, self.n_rows)
        parts = []
        for number in range(first // self.window_rows, (last - 1) // self.window_rows + 1):
            start = number * self.window_rows
            parts.append(self.window_order(epoch, number)[max(0, first - start) : last - start])
        return np.concatenate(parts)

    def share(self, global_step: int, rank: int, world: int) -> NDArray[np.int64]:
        """Return one rank's rows of a step; ranks differ by at most one row."""
        rows = self.batch(global_step)
        if self.lanes == 1:
            return rows[rank::world]
        _, step = self.epoch_of(global_step)
        lane = np.arange(step * self.global_batch, step * self.global_batch + len(rows)) % self.window_rows % self.lanes
        mine = slice(rank * len(rows) // world, (rank + 1) * len(rows) // world)
        return rows[np.sort(np.argsort(lane, kind="stable")[mine])]

    def blocks(self, epoch: int, number: int, rank: int, world: int) -> NDArray[np.int64]:
        """Return the numbers of the blocks of a window that a rank needs, ascending; one even if it needs none."""
        there = _window_blocks(self, epoch, number)
        if self.lanes == 1 or world == 1:
            return np.sort(there)
        first = number * self.window_rows
        steps = range(
            first // self.global_batch,
            -(-min(first + self.window_rows, self.n_rows) // self.global_batch),
        )
        rows = [self.share(epoch * self.steps_per_epoch + step, rank, world) for step in steps]
        needed = np.unique(np.concatenate(rows) // self.block)
        needed = needed[np.isin(needed, there)]
        return needed if len(needed) else there[:1]


@lru_cache(maxsize=8)
def _block_order(plan: SamplePlan, epoch: int) -> NDArray[np.int64]:
    """Permute the full blocks; a short last block keeps its place, so that windows stay equally long."""
    n_full, rest = divmod(plan.n_rows, plan.block)
    order = np.random.default_rng([plan.seed, epoch]).permutation(n_full)
    return np.concatenate([order, [n_full]]).astype(np.int64) if rest else order.astype(np.int64)


def _window_blocks(plan: SamplePlan, epoch: int, number: int) -> NDArray[np.int64]:
    return _block_order(plan, epoch)[number * plan.window : (number + 1) * plan.window]


@lru_cache(maxsize=8)
def _window_order(plan: SamplePlan, epoch: int, number: int) -> NDArray[np.int64]:
    blocks = _window_blocks(plan, epoch, number)
    rows = blocks[:, None] * plan.block + np.arange(plan.block)
    draw = np.random.default_rng([plan.seed, epoch, 1 + number])
    if plan.lanes == 1 or rows.max() >= plan.n_rows or len(blocks) < plan.window:  # the last one: lanes would be uneven
        mixed = rows.ravel()
        return draw.permutation(mixed[mixed < plan.n_rows])
    return draw.permuted(rows.reshape(plan.lanes, -1), axis=1).T.ravel()
