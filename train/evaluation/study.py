"""This module is a study: cells in memory that methods are fitted on and judged by.

Shape letters used in this module:
    C  cells      G  features of a measurement
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from store.errors import InputRefused
from store.schema import OBS_DEFAULTS, measured_column
from store.snapshot import Snapshot
from train.start import log_shares

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Study:
    """Cells with their labels; methods get a part of it to be fitted on, and another part to be judged by.

    Methods and suites take every cell for measured in what they look at: :func:`only_measured` leaves out the others.

    Attributes:
        counts: Measurement to raw counts_CG; the row of a cell that was not measured is empty.
        features: Measurement to the names of its G features.
        obs: One line per cell, columns as the lake names them (``perturbation``, ``cell_type``, ``donor_id``, ...).
        called: Measurement to what people call its features (a gene's symbol), where ``features`` are ids.
        left_out: Cells that :func:`only_measured` left out.
    """

    counts: dict[str, csr_matrix]
    features: dict[str, list[str]]
    obs: pd.DataFrame
    called: dict[str, list[str]] = field(default_factory=dict)
    left_out: int = 0

    def __post_init__(self) -> None:
        for name, part in self.counts.items():
            if part.shape != (len(self.obs), len(self.features[name])):
                raise InputRefused(
                    f"counts of {name} have shape {part.shape}, with {len(self.obs)} lines of obs and "
                    f"{len(self.features[name])} features; they must go together"
                )

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return len(self.obs)

    def take(self, rows: NDArray[Any]) -> Study:
        """Return the cells of a mask or of row numbers, in this order."""
        counts = {name: part[rows] for name, part in self.counts.items()}
        return replace(self, counts=counts, obs=self.obs.iloc[rows])

    def places(self, measurement: str) -> dict[str, int]:
        """Return the place of each feature by its name, and by what people call it; targets go by either."""
        return places(self.features[measurement], self.called.get(measurement, ()))

    def label(self, column: str) -> NDArray[np.object_]:
        """Return a column of obs as text, one value per cell.

        Raises:
            InputRefused: There is no such column.
        """
        if column not in self.obs:
            raise InputRefused(f"the cells have no column {column!r}; columns: {', '.join(self.obs.columns)}")
        return self.obs[column].astype(str).to_numpy(dtype=object)

    def measured(self, measurement: str) -> csr_matrix:
        """Return raw counts_CG of a measurement.

        Raises:
            InputRefused: There is no such measurement.
        """
        if measurement not in self.counts:
            raise InputRefused(f"the cells have no {measurement}; measurements: {', '.join(self.counts)}")
        return self.counts[measurement]

    def has(self, measurement: str) -> NDArray[np.bool_]:
        """Return of which cells a measurement was made: as obs says, else of those with a count in it.

        A cell that was measured may have no count, so what the lake says of it (``measured_RNA``) goes first.

        Raises:
            InputRefused: There is no such measurement.
        """
        counts_CG = self.measured(measurement)
        column = measured_column(measurement)
        if column in self.obs:
            return self.obs[column].to_numpy(dtype=bool)
        has_C: NDArray[np.bool_] = np.asarray(counts_CG.sum(axis=1)).ravel() > 0
        return has_C

    def logs(self, measurement: str) -> csr_matrix:
        """Return log1p of counts per 10,000 of the cell's counts in a measurement, [C, G] float32.

        Raises:
            InputRefused: There is no such measurement.
        """
        return log_shares(self.measured(measurement)).astype(np.float32)


def places(features: Sequence[str], called: Sequence[str] = ()) -> dict[str, int]:
    """Return the place of each feature by its name, and by what people call it where no other is called so.

    Args:
        features: Names (ids) of all.
        called: What people call each; empty if that is the same.
    """
    counted = Counter(called)
    by_call = {name: place for place, name in enumerate(called) if counted[name] == 1}
    return by_call | {name: place for place, name in enumerate(features)}


def only_measured(study: Study, measurements: Sequence[str]) -> Study:
    """Leave out the cells of which not all of these measurements were made: what is absent is not zero.

    Raises:
        InputRefused: There is no such measurement, or no cell is left.
    """
    kept_C = np.ones(study.n_cells, dtype=bool)
    for name in measurements:
        kept_C &= study.has(name)
    if study.n_cells and not kept_C.any():
        each = ", ".join(f"{name} of {int(study.has(name).sum()):,}" for name in measurements)
        raise InputRefused(
            f"of the {study.n_cells:,} cells none has {' and '.join(measurements)} measured ({each}); ask for another "
            "measurement, or of a snapshot whose cells have it"
        )
    return replace(study.take(kept_C), left_out=study.left_out + int((~kept_C).sum()))


def read_study(snapshot: Snapshot, max_cells: int = 200_000) -> Study:
    """Read a snapshot's cells into memory: all, or as large a share of each split as comes to ``max_cells``.

    Rows are shuffled, so the first ones of a split are a sample of it. ``obs`` gets the snapshot's columns, and
    ``split``; cells that are in no split are left out.
    """
    alive = max(1, sum(snapshot.manifest["splits"].values()))
    share = min(1.0, max_cells / alive)
    spans = []
    for part in snapshot.parts:
        for first, stop in part.split_rows.values():
            spans.append((part.first_row + first, part.first_row + first + math.ceil((stop - first) * share)))
    obs = snapshot.cells(spans=spans).to_pandas()
    kept = (obs["split"] != "").to_numpy()
    counts, features, called = {}, {}, {}
    for name in snapshot.measurements:
        if name in snapshot.levels:
            continue  # the suites judge counts
        var = snapshot.var_rows(name)
        features[name], called[name] = [str(row[0]) for row in var], [str(row[1]) for row in var]
        blocks = [
            _matrix(snapshot, name, start, min(start + BLOCK_ROWS, stop), len(features[name]))
            for first, stop in spans
            for start in range(first, stop, BLOCK_ROWS)
        ]
        counts[name] = csr_matrix(vstack(blocks))[kept]
    return Study(counts, features, obs[kept].reset_index(drop=True), called)


def _matrix(snapshot: Snapshot, measurement: str, start: int, stop: int, n_features: int) -> csr_matrix:
    block = snapshot.block(measurement, start, stop)
    return csr_matrix((block.counts.astype(np.float32), block.features, block.indptr), shape=(stop - start, n_features))


def from_anndata(
    data: Mapping[str, Any], labels: Mapping[str, str] | None = None, constants: Mapping[str, Any] | None = None
) -> Study:
    """Take AnnData objects of the same cells as a study.

    Args:
        data: Measurement to AnnData whose ``X`` holds raw counts.
        labels: The lake's column to the source's column.
        constants: The lake's column to one value for all cells.

    Raises:
        InputRefused: Columns that the cells do not have, or counts that are negative or no numbers.
    """
    first = next(iter(data.values()))
    obs = pd.DataFrame(index=pd.RangeIndex(first.n_obs))
    for ours, theirs in (labels or {}).items():
        if theirs not in first.obs:
            raise InputRefused(f"obs has no column {theirs!r} for {ours!r}; columns: {', '.join(first.obs.columns)}")
        obs[ours] = first.obs[theirs].to_numpy()
    for ours, value in (constants or {}).items():
        obs[ours] = value
    for ours, value in OBS_DEFAULTS.items():
        if ours not in obs:
            obs[ours] = value
    counts = {}
    for name, part in data.items():
        counts[name] = csr_matrix(part.X, dtype=np.float32)
        if not (np.isfinite(counts[name].data).all() and (counts[name].data >= 0).all()):
            raise InputRefused(f"{name}: X holds values that are negative or no numbers; give raw counts")
    return Study(counts, {name: [str(value) for value in part.var_names] for name, part in data.items()}, obs)
