"""This module finds what counts are divided by where features are ranked, so that ranks say what is unusual of a cell.

Shape letters used in this module:
    C  cells      G  features of a measurement      N  non-zeros of all cells
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.snapshot import Snapshot
from train.sources import vocabulary_sizes
from train.stream import Stream
from train.tokens import shares

BATCH = 1024


def rank_factors(
    snapshot: Snapshot,
    *,
    measurements: Sequence[str] | None = None,
    split: str = "train",
    n_cells: int = 20_000,
    seed: int = 0,
    **reading: Any,
) -> dict[str, NDArray[np.float32]]:
    """Return each feature's median count per ``SCALE`` among the cells that have it, factor_G of each measurement.

    That is what rank values are made of (Geneformer, Theodoris et al. 2023): housekeeping genes, which are high in
    every cell, come behind those that tell cells apart. A feature that no cell has gets 1.

    Args:
        snapshot: Whose cells are looked at.
        measurements: Of counts; all of counts when left out.
        split: Whose cells.
        n_cells: Cells that are looked at, drawn by the seed; each value takes 12 bytes meanwhile.
        seed: Decides which.
        reading: Handed on to :class:`~train.stream.Stream`: ``block``, ``window``, ``memory_bytes``, ``cache``.

    Raises:
        UsageError: No such measurement, no cell in the split, or a window that does not fit into ``memory_bytes``.
    """
    if measurements is None:
        measurements = [name for name in snapshot.measurements if name not in snapshot.levels]
        if not measurements:
            raise UsageError(f"{snapshot.uri}: has levels only ({', '.join(snapshot.levels)}), and no counts to rank")
    stream = Stream(snapshot, batch=BATCH, seed=seed, split=split, measurements=measurements, **reading)
    features: dict[str, list[NDArray[np.uint32]]] = {name: [] for name in stream.measurements}
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in stream.measurements}
    seen, sizes = 0, vocabulary_sizes([snapshot])
    for cells in stream.epoch(0):
        for name, part in cells.counts.items():
            features[name].append(part.features.astype(np.uint32))
            found[name].append(shares(part).numpy())
        seen += cells.n_cells
        if seen >= n_cells:
            break
    return {name: _medians(features.pop(name), found.pop(name), sizes[name]) for name in stream.measurements}


def _medians(
    features: list[NDArray[np.uint32]], found: list[NDArray[np.float32]], n_features: int
) -> NDArray[np.float32]:
    """Return each feature's median share; both lists are used up."""
    counted_G = np.zeros(n_features, np.int64)
    for part in features:
        counted_G += np.bincount(part, minlength=n_features)
    ends_G = np.cumsum(counted_G)
    place_G, ordered = ends_G - counted_G, np.empty(int(counted_G.sum()), np.float32)
    while features:  # each feature's values side by side, a batch at a time
        feature_N, share_N = features.pop(), found.pop()
        order = np.argsort(feature_N, kind="stable")
        sorted_N = feature_N[order]
        within = np.arange(len(order)) - np.searchsorted(sorted_N, sorted_N)
        ordered[place_G[sorted_N] + within] = share_N[order]
        place_G += np.bincount(feature_N, minlength=n_features)
    factor_G = np.ones(n_features, np.float32)
    for feature, (count, end) in enumerate(zip(counted_G, ends_G, strict=True)):
        if count:
            factor_G[feature] = np.median(ordered[end - count : end])
    return factor_G
