"""This module decides which rows are trained on at which step: pure functions, with no state but the step's number.

The rows of one source (a split of one part of a snapshot) lie in blocks. Each epoch permutes the blocks, takes a window
of them at a time, and permutes the rows of a window: that is the source's order, and it has no end. A plan takes from
the orders of one or several sources, each by its share, and cuts global batches; a rank takes its part of each batch.
Nothing depends on the number of ranks but that last step, so any number of them resumes any other.

With lanes, a window's blocks are dealt out to lanes, rows are permuted within a lane, and the window's order takes one
row of each lane in turn. A rank then takes its rows from a few lanes and needs not read the blocks of the others.

Shape letters used in this module:
    B  rows of a batch
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Window = tuple[int, int]
"""An epoch of a source and the number of a window in it."""
Places = TypeVar("Places", int, NDArray[np.int64])


@dataclass(frozen=True)
class RowOrder:
    """An endless order of a source's rows: each once in its first ``n_rows`` places, once in the next, and so on.

    Attributes:
        n_rows: Rows, numbered 0 to n_rows - 1.
        seed: Decides the order.
        block: Consecutive rows that are read together.
        window: Blocks whose rows are mixed.
        lanes: Parts of a window that ranks can read apart; divides ``window``. As many as there will be ranks, or a
            multiple; part of the order, and independent of the number of ranks.
        source: Number of the source, so that equal ones are ordered differently.

    Raises:
        ValueError: ``lanes`` does not divide ``window``.
    """

    n_rows: int
    seed: int = 0
    block: int = 1024
    window: int = 16
    lanes: int = 1
    source: int = 0

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window % self.lanes:
            raise ValueError(f"lanes={self.lanes} does not divide window={self.window}")

    @property
    def window_rows(self) -> int:
        """Rows of a full window."""
        return self.block * self.window

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.n_rows // self.window_rows)

    def window_order(self, window: Window) -> NDArray[np.int64]:
        """Return the rows of one window, in the order in which they are used."""
        return _window_order(self, *window)

    def window_of(self, place: Places) -> tuple[Places, Places]:
        """Return the window in which a place of the order lies; of an array of places, two arrays."""
        epoch, within = divmod(place, self.n_rows)
        return epoch, within // self.window_rows

    def pieces(self, first: int, stop: int) -> list[tuple[Window, int, int]]:
        """Cut places ``first`` to ``stop`` of the order by windows: each, and the places within it."""
        found = []
        while first < stop:
            epoch, place = divmod(first, self.n_rows)
            number, within = divmod(place, self.window_rows)
            there = min(self.window_rows, self.n_rows - number * self.window_rows)
            end = min(there, within + stop - first)
            found.append(((epoch, number), within, end))
            first += end - within
        return found

    def most_windows(self, n_places: int) -> int:
        """Return in how many windows so many consecutive places lie at most; 0 for none.

        Each border between two of them opens one more. Borders are ``window_rows`` apart, and once an epoch, behind
        its last window, as few rows as that one has.
        """
        if n_places == 0:
            return 0
        epochs, rest = divmod(n_places - 1, self.n_rows)
        last = self.n_rows - (self.n_windows - 1) * self.window_rows
        further = max(0, rest - 1 - last + self.window_rows) // self.window_rows
        return 1 + epochs * self.n_windows + min(rest, 1) + further

    def rows(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at places ``first`` to ``stop`` (exclusive) of the order."""
        parts = [self.window_order(window)[start:end] for window, start, end in self.pieces(first, stop)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def lane(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the lane of each of these places; 0 in a window that has none."""
        parts = [
            np.arange(start, end) % self.lanes if self._has_lanes(window) else np.zeros(end - start, np.int64)
            for window, start, end in self.pieces(first, stop)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def following(self, window: Window) -> Window:
        """Return the window that comes next."""
        epoch, number = window
        return (epoch, number + 1) if number + 1 < self.n_windows else (epoch + 1, 0)

    def blocks(self, window: Window, lanes: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the numbers of a window's blocks, ascending: all, or those of some lanes."""
        there = _window_blocks(self, *window)
        if lanes is not None and self._has_lanes(window):
            there = there.reshape(self.lanes, -1)[lanes].ravel()
        return np.sort(there)

    def lanes_of_blocks(self, window: Window, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lane of each of a window's blocks; 0 in a window that has none."""
        there = _window_blocks(self, *window)
        if not self._has_lanes(window):
            return np.zeros(len(blocks), np.int64)
        order = np.argsort(there)
        return order[np.searchsorted(there[order], blocks)] // (self.window // self.lanes)

    def _has_lanes(self, window: Window) -> bool:
        """Say whether a window is dealt out to lanes: the last of an epoch is not, they would be uneven."""
        there = _window_blocks(self, *window)
        return self.lanes > 1 and len(there) == self.window and int(there.max() + 1) * self.block <= self.n_rows


@dataclass(frozen=True)
class Rows:
    """Rows of a step.

    Attributes:
        source: The source of each.
        epoch: The epoch of that source's order.
        row: The row of that source.
        lane: The lane in its window; 0 where there is none.
        place: The place in the source's order.
    """

    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    row: NDArray[np.int64]
    lane: NDArray[np.int64]
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: NDArray[np.int64]) -> Rows:
        """Return some of them."""
        return Rows(*(getattr(self, name)[which] for name in ROWS))

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """Return the rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in ROWS))


ROWS = tuple(one.name for one in fields(Rows))


@dataclass(frozen=True)
class SamplePlan:
    """What is trained on at each step.

    Attributes:
        orders: The sources' orders.
        global_batch: Rows of one step over all ranks; the last step of an epoch takes what is left.
        seed: Decides the order within a batch of several sources.
        shares: Of each source in every batch, relative to the others; left out, by their rows, and then every row of
            every source comes once in each epoch.
    """

    orders: tuple[RowOrder, ...]
    global_batch: int
    seed: int = 0
    shares: tuple[int, ...] = ()

    @staticmethod
    def of(
        n_rows: int, global_batch: int, seed: int = 0, block: int = 1024, window: int = 16, lanes: int = 1
    ) -> SamplePlan:
        """Return the plan of one source."""
        return SamplePlan((RowOrder(n_rows, seed, block, window, lanes),), global_batch, seed)

    @cached_property
    def n_rows(self) -> int:
        """Rows of an epoch: as many as all sources have."""
        return sum(order.n_rows for order in self.orders)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps until as many rows were used as there are."""
        return -(-self.n_rows // self.global_batch)

    def epoch_of(self, global_step: int) -> tuple[int, int]:
        """Return the epoch of a step and the step's number within it."""
        return divmod(global_step, self.steps_per_epoch)

    def spans(self, global_step: int) -> list[tuple[int, int]]:
        """Return the places of each source's order that a step takes, first and behind the last."""
        epoch, step = self.epoch_of(global_step)
        first = step * self.global_batch
        stop = min(first + self.global_batch, self.n_rows)
        ends = (self._taken(epoch * self.n_rows + place) for place in (first, stop))
        return list(zip(*ends, strict=True))

    def most_rows(self, source: int, steps: int = 1) -> int:
        """Return how many rows of a source so many consecutive steps have at most.

        That is its share of them and less than one more for each time that ``_taken`` rounds.
        """
        shares = self.shares or tuple(order.n_rows for order in self.orders)
        n_rows = steps * min(self.global_batch, self.n_rows)
        return min(n_rows, n_rows * shares[source] // sum(shares) + len(shares))

    def _taken(self, place: int) -> list[int]:
        """Return how many of the first ``place`` rows come from each source.

        One source after the other gets its share of what is left, rounded down; in whole numbers, so that it never
        decreases from place to place, and with shares by rows an epoch takes each source's rows exactly once.
        """
        shares = self.shares or tuple(order.n_rows for order in self.orders)
        left, taken = sum(shares), []
        for share in shares:
            rest = place * (left - share) // left if left else 0
            taken.append(place - rest)
            place, left = rest, left - share
        return taken

    def batch(self, global_step: int) -> Rows:
        """Return the rows of a step, over all ranks."""
        return _batch(self, global_step)

    def share(self, global_step: int, rank: int, world: int) -> Rows:
        """Return one rank's part of a step; ranks differ by at most one row."""
        rows = _batch(self, global_step)
        return rows if world == 1 else rows.take(_part(rows.lane, rank, world))

    def lanes_of(self, source: int, window: Window, rank: int, world: int) -> NDArray[np.int64] | None:
        """Return the lanes of a source's window in which a rank has rows, ascending; None if it needs all."""
        order = self.orders[source]
        if order.lanes == 1 or world == 1:
            return None
        epoch, number = window
        first = epoch * order.n_rows + number * order.window_rows
        stop = min(first + order.window_rows, (epoch + 1) * order.n_rows)
        step = self._step_of(source, first)
        found: list[NDArray[np.int64]] = []
        while (span := self.spans(step)[source])[0] < stop:
            mine = self.share(step, rank, world)
            inside = (mine.source == source) & (mine.place >= first) & (mine.place < stop)
            found.append(np.unique(mine.lane[inside]))
            if span[1] >= stop:
                break
            step += 1
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def _step_of(self, source: int, place: int) -> int:
        """Return the first step that takes a place of a source's order or one behind it."""
        low, high = 0, 1
        while self.spans(high)[source][1] <= place:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.spans(middle)[source][1] <= place else (low, middle)
        return low


def _part(lane: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Return which rows of a batch a rank takes: every so many-th, or, where there are lanes, neighbouring lanes."""
    if not lane.any():
        return np.arange(rank, len(lane), world)
    mine = slice(rank * len(lane) // world, (rank + 1) * len(lane) // world)
    return np.sort(np.argsort(lane, kind="stable")[mine])


@lru_cache(maxsize=64)
def _batch(plan: SamplePlan, step: int) -> Rows:
    spans = plan.spans(step)
    place = np.concatenate([np.arange(*span) for span in spans])
    source = np.repeat(np.arange(len(spans)), [stop - first for first, stop in spans])
    rows = Rows(
        source,
        place // np.array([order.n_rows for order in plan.orders])[source],
        np.concatenate([order.rows(*span) for order, span in zip(plan.orders, spans, strict=True)]),
        np.concatenate([order.lane(*span) for order, span in zip(plan.orders, spans, strict=True)]),
        place,
    )
    if len(plan.orders) == 1:  # its rows are in no order already
        return rows
    return rows.take(np.random.default_rng([plan.seed, step, 2]).permutation(len(rows)))


@lru_cache(maxsize=8)
def _block_order(order: RowOrder, epoch: int) -> NDArray[np.int64]:
    """Permute the full blocks; a short last block keeps its place, so that windows stay equally long."""
    n_full, rest = divmod(order.n_rows, order.block)
    seed = [order.seed, epoch, *([order.source, 1] if order.source else [])]
    blocks = np.random.default_rng(seed).permutation(n_full)
    return np.concatenate([blocks, [n_full]]).astype(np.int64) if rest else blocks.astype(np.int64)


def _window_blocks(order: RowOrder, epoch: int, number: int) -> NDArray[np.int64]:
    return _block_order(order, epoch)[number * order.window : (number + 1) * order.window]


@lru_cache(maxsize=32)
def _window_order(order: RowOrder, epoch: int, number: int) -> NDArray[np.int64]:
    blocks = _window_blocks(order, epoch, number)
    rows = blocks[:, None] * order.block + np.arange(order.block)
    draw = np.random.default_rng([order.seed, epoch, 1 + number, *([order.source] if order.source else [])])
    if not order._has_lanes((epoch, number)):
        mixed = rows.ravel()
        return draw.permutation(mixed[mixed < order.n_rows])
    return draw.permuted(rows.reshape(order.lanes, -1), axis=1).T.ravel()
