"""This module says which row of a source stands at which place of an epoch: each once, or by weights more often.

Systematic sampling where there are weights: with one random offset an epoch, a cell comes its expected number of times,
rounded down or up, and all together exactly as often as there are cells (Madow 1949).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.part import CODED
from train.sources import SCANNED_ROWS, Source

EPOCHS_KEPT = 2
"""Of so many epochs at a time is kept which cells come how often: at a border steps of both are made."""

Weights = Sequence[float] | NDArray[Any] | str


class Draws:
    """The cells of each epoch.

    Args:
        sources: Where they lie.
        seed: Decides which cells come once more, or not.
        split: The split.
        weights: How often each cell of the split comes, relative to the others, in the order of rows; or a label.

    Attributes:
        shares: Each source's share of every batch, relative to the others.

    Raises:
        UsageError: Weights are not one for each cell, or there is no such label, or all of a snapshot are 0.
    """

    def __init__(self, sources: Sequence[Source], seed: int, split: str, weights: Weights | None) -> None:
        self._sources, self._seed = sources, seed
        self._upper: list[NDArray[np.float64]] = []
        self._drawn_for: dict[int, dict[int, NDArray[np.int32 | np.int64]]] = {}
        self._drawing = threading.Lock()
        self.shares = np.array([source.share for source in sources])
        if weights is not None:
            self._weigh(self._values(weights, split))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_drawn_for", "_drawing")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _drawn_for={}, _drawing=threading.Lock())

    @cached_property
    def digest(self) -> str | None:
        """A SHA-256 of the weights; None without."""
        if not self._upper:
            return None
        found = hashlib.sha256()
        for upper in self._upper:
            found.update(upper.data)
        return found.hexdigest()

    def rows(self, source: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of a source's part at these positions of an epoch's cells, which lie in row order."""
        if self._upper:
            positions = self._drawn(source, epoch)[positions].astype(np.int64)
        return self._sources[source].rows(positions)

    def _values(self, weights: Weights, split: str) -> Iterator[NDArray[np.float64]]:
        """Yield the weights of each source's cells."""
        if isinstance(weights, str):
            if weights not in CODED:
                raise UsageError(f"weights = {weights!r} is none of: {', '.join(CODED)}")
            yield from (source.label_weights(weights, split) for source in self._sources)
            return
        n_rows = sum(source.n_rows for source in self._sources)
        try:
            values = np.asarray(weights, dtype=np.float64)
        except (TypeError, ValueError):  # words
            values = np.empty(0)
        if values.shape != (n_rows,) or not np.isfinite(values).all() or values.min() < 0 or values.sum() <= 0:
            raise UsageError(
                f"weights are {n_rows:,} numbers, one for each cell of the split, not negative, not all zero"
            )
        yield from np.split(values, np.cumsum([source.n_rows for source in self._sources])[:-1])

    def _weigh(self, values: Iterator[NDArray[np.float64]]) -> None:
        """Note how often the cells up to each one should come together in an epoch, and each source's share."""
        sums = np.empty(len(self._sources))
        for number, (source, weights) in enumerate(zip(self._sources, values, strict=True)):
            upper = np.cumsum(weights)
            sums[number] = upper[-1]
            if sums[number] > 0:  # else none of its cells comes
                upper *= source.n_rows / sums[number]
            upper[-1] = source.n_rows
            self._upper.append(upper)
        which = np.array([source.number for source in self._sources])
        total = np.bincount(which, sums)
        if not total.all():
            uri = next(source.snapshot.uri for source in self._sources if total[source.number] == 0)
            raise UsageError(f"{uri}: all its cells have weight 0; leave it out")
        self.shares = np.bincount(which, self.shares)[which] * sums / total[which]

    def _drawn(self, source: int, epoch: int) -> NDArray[np.int32 | np.int64]:
        """Return a source's cells of an epoch, each as often as it comes; two epochs are kept, which meet at a border.

        Several threads ask, of one epoch and of the next: each is drawn once.
        """
        with self._drawing:
            kept = self._drawn_for.setdefault(source, {})
            copies = kept.pop(epoch, None)
            if copies is None:
                for longest_unused in list(kept)[: len(kept) + 1 - EPOCHS_KEPT]:
                    del kept[longest_unused]
                offset = np.random.default_rng([self._seed, epoch, 0, *([source] if source else [])]).random()
                copies = _copies(self._upper[source], offset)
            kept[epoch] = copies
            return copies


def _copies(upper: NDArray[np.float64], offset: float) -> NDArray[np.int32 | np.int64]:
    """Return the numbers of the cells that come, ascending, each as often as it does; as many as there are cells."""
    kind = np.int32 if len(upper) < 2**31 else np.int64
    copies: NDArray[np.int32 | np.int64] = np.empty(len(upper), kind)
    begun = 0
    for first in range(0, len(upper), SCANNED_ROWS):
        ends = np.floor(upper[first : first + SCANNED_ROWS] + offset).astype(np.int64)
        numbers = np.arange(first, first + len(ends))
        copies[begun : ends[-1]] = np.repeat(numbers, np.diff(ends, prepend=begun))
        begun = int(ends[-1])
    return copies
