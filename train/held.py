"""This module knows where a batch's rows lie in the windows that are decoded, and copies their values together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train import kernels
from train.cells import Csr, Spans
from train.lanes import LINE
from train.plan import Window as WindowKey
from train.reader import Window

Key = tuple[int, WindowKey]
"""A source's number and one of its windows."""


@dataclass(frozen=True)
class Held:
    """Where the rows of a batch lie in the windows.

    Attributes:
        n_cells: Rows.
        source: The source of each.
        row: The row of each in its part.
        pieces: Windows with the places in the batch, and the places among the window's rows, of the rows they hold.
        set_C: The set of each, by its number in the batch, where there are sets.
    """

    n_cells: int
    source: NDArray[np.int64]
    row: NDArray[np.int64]
    pieces: list[tuple[Key, Window, NDArray[np.int64], NDArray[np.int64]]]
    set_C: NDArray[np.int64] | None = None

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of values of each row."""
        size = np.zeros(self.n_cells, np.int64)
        for _, window, mine, place in self.pieces:
            size[mine] = sum(spans.lengths[place] for spans in window.spans.values())
        return size

    def spans(self, measurement: str) -> list[tuple[Spans, NDArray[np.int64]]]:
        """Return the rows' values, window by window, with their places in the batch."""
        return [(window.spans[measurement].take(place), mine) for _, window, mine, place in self.pieces]

    def take(self, which: NDArray[np.int64]) -> Held:
        """Return some of the rows, in this order."""
        position = np.full(self.n_cells, -1, np.int64)
        position[which] = np.arange(len(which))
        pieces = []
        for key, window, mine, place in self.pieces:
            kept = position[mine] >= 0
            pieces.append((key, window, position[mine][kept], place[kept]))
        return Held(len(which), self.source[which], self.row[which], pieces)


def fair_share(size: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """Choose a rank's cells of a batch: dealt out from the largest to the smallest, there and back again."""
    order = np.argsort(-size, kind="stable")
    turn, seat = np.divmod(np.arange(len(size)), world)
    return np.sort(order[np.where(turn % 2, world - 1 - seat, seat) == rank])


def gathered(parts: Sequence[tuple[Spans, NDArray[np.int64]]], n_cells: int, room: Room) -> Csr:
    """Copy rows that lie in several buffers into one, in the order of their places."""
    lengths = np.zeros(n_cells, np.int64)
    for spans, place in parts:
        lengths[place] = spans.lengths
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    kinds = [{getattr(spans, name).dtype for spans, _ in parts} for name in ("features", "counts")]
    features = room.take(int(indptr[-1]), np.result_type(*kinds[0]))
    floats = any(kind.kind == "f" for kind in kinds[1])
    counts = room.take(int(indptr[-1]), np.float32 if floats else np.result_type(*kinds[1]))
    for spans, place in parts:
        kernels.gather(spans.starts, spans.lengths, spans.features, spans.counts, indptr[:-1][place], features, counts)
    return Csr(indptr, features, counts)


class Room:
    """Memory for batches, used again when nobody holds the batch any more: fresh pages are slow."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Room], tuple[()]]:
        return Room, ()  # another process has its own

    def take(self, length: int, dtype: Any) -> NDArray[Any]:
        """Return an array of any content."""
        size = length * np.dtype(dtype).itemsize
        with self._lock:
            for number in range(len(self._blocks)):
                # the list and getrefcount's argument: nobody else looks at it, by whatever view
                if self._blocks[number].nbytes >= size + LINE and sys.getrefcount(self._blocks[number]) == 2:
                    return _from_line(self._blocks[number], size).view(dtype)
            block = np.zeros(-(-size * 5 // 4 // 4096) * 4096 + 4096, np.uint8)
            if len(self._blocks) < 64:
                self._blocks.append(block)
        return _from_line(block, size).view(dtype)


def _from_line(block: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return so many bytes of a block, from where a line of the processor's caches begins."""
    first = -block.ctypes.data % LINE
    return block[first : first + size]
