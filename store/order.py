"""This module decides the order of a snapshot's rows: cells, or sets of neighbouring cells, shuffled within each split.

Shape letters used in this module:
    C  cells of a part, in lake order
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from store.splits import SnapshotSettings, coded


def units_of(
    cells: pa.Table, settings: SnapshotSettings, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Return the group of each chosen cell, of which sets are cut, and its place in it; None where there are no sets.

    Places follow a Morton curve through the cells' positions (Morton 1966), so that a stretch of it is a patch of the
    tissue; cells without a position are in no order.
    """
    if not settings.set_size:
        return None
    group = np.zeros(len(chosen), np.int64)
    for name in settings.set_by:
        values, code = coded(cells, name)
        group = np.unique(group * len(values) + code[chosen], return_inverse=True)[1]
    place = np.random.default_rng([settings.seed, 3]).random(len(chosen))
    position = np.stack([cells[name].to_numpy()[chosen] for name in ("x", "y")])
    placed = np.flatnonzero(np.isfinite(position).all(axis=0))
    placed = placed[np.argsort(group[placed], kind="stable")]
    for mine in np.split(placed, np.flatnonzero(np.diff(group[placed])) + 1):
        if len(mine):
            place[mine] = _morton(position[:, mine])
    return group, place


def _morton(position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each point's place along a Morton curve through all, from 0 to 1."""
    low = position.min(axis=1, keepdims=True)
    extent = max(float((position.max(axis=1, keepdims=True) - low).max()), np.finfo(float).tiny)
    grid = np.minimum((position - low) / extent * 2**16, 2**16 - 1).astype(np.uint64)
    place = np.zeros(position.shape[1], np.uint64)
    for bit in range(16):
        for axis in range(2):
            place |= ((grid[axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return place / float(2**32)


def order_of(
    split_C: NDArray[np.int8],
    splits: tuple[str, ...],
    seed: list[int],
    units: tuple[NDArray[np.int64], NDArray[np.float64]] | None,
    set_size: int,
) -> tuple[NDArray[np.int64], dict[str, tuple[int, int]], NDArray[np.int64]]:
    """Return the row of each cell, the rows (first, behind the last) of each split, and where sets begin.

    Cells, or sets of them, are shuffled within each split. A split's rows lie together, so that streaming it reads
    nothing else.
    """
    draw = np.random.default_rng(seed)
    if units is None:
        shuffled = draw.permutation(len(split_C))
        order = shuffled[np.argsort(split_C[shuffled], kind="stable")]
        starts = np.empty(0, np.int64)
    else:
        order, starts = _set_order(split_C, *units, set_size, draw)
    row_C = np.empty(len(order), np.int64)
    row_C[order] = np.arange(len(order))
    ends = np.cumsum(np.bincount(split_C, minlength=len(splits))).tolist()
    rows = {name: (start, end) for name, start, end in zip(splits, [0, *ends], ends, strict=False)}
    return row_C, rows, starts


def _set_order(
    split_C: NDArray[np.int8],
    group_C: NDArray[np.int64],
    place_C: NDArray[np.float64],
    set_size: int,
    draw: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut each group of each split into sets of neighbours, shuffle them, and return the cells and where sets begin."""
    if len(split_C) == 0:
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    cells = np.lexsort((place_C, group_C, split_C))
    split, group = split_C[cells], group_C[cells]
    new_group = (
        np.concatenate([[True], (np.diff(split) != 0) | (np.diff(group) != 0)]) if len(cells) else np.empty(0, bool)
    )
    first = np.flatnonzero(new_group)
    within = np.arange(len(cells)) - np.repeat(first, np.diff([*first, len(cells)]))
    number = np.cumsum(new_group | (within % set_size == 0)) - 1
    n_sets = int(number[-1]) + 1
    shuffled = draw.permutation(n_sets)
    split_of = split[np.flatnonzero(np.diff(number, prepend=-1))]
    sets = shuffled[np.argsort(split_of[shuffled], kind="stable")]
    rank = np.empty(n_sets, np.int64)
    rank[sets] = np.arange(n_sets)
    order = cells[np.argsort(rank[number], kind="stable")]
    sizes = np.bincount(number, minlength=n_sets)[sets]
    return order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
