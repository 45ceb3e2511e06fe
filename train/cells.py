"""This module is the form in which stream, predictor and server hand cells around: ragged counts and codes, numpy only.

Shape letters used in this module:
    C  cells      S  controls of a cell      T  perturbation targets of a cell at most
    X  x and y
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROMPTS = ("organism", "tissue", "assay", "disease", "sex", "development_stage", "cell_type", "perturbation_type")
"""Prompt fields, each one code per cell; perturbations and numbers stand beside them."""

NUMBERS = ("time", "dose")

CONTROL = 1
"""Code of "control" among perturbations; 0 is "not said"."""


@dataclass(frozen=True)
class Spans:
    """Rows that lie anywhere in a buffer: row i holds features[starts[i]:starts[i] + lengths[i]] and their counts."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    features: NDArray[Any]
    counts: NDArray[Any]

    def take(self, rows: NDArray[np.int64]) -> Spans:
        """Return these rows, in this order; no value is copied."""
        return Spans(self.starts[rows], self.lengths[rows], self.features, self.counts)


@dataclass(frozen=True)
class Csr:
    """Ragged rows: row i holds features[indptr[i]:indptr[i + 1]] and their counts.

    Attributes:
        indptr: int64, one longer than there are rows.
        features: Integers; a snapshot gives them as stored, uint16 or uint32.
        counts: Numbers; a snapshot gives them as stored, uint8, uint16, uint32 or float32.
    """

    indptr: NDArray[np.int64]
    features: NDArray[Any]
    counts: NDArray[Any]

    @property
    def spans(self) -> Spans:
        """The same rows, nothing copied."""
        return Spans(self.indptr[:-1], np.diff(self.indptr), self.features, self.counts)

    def take(self, rows: NDArray[np.int64] | slice) -> Csr:
        """Return these rows, in this order; of a slice without a step no value is copied."""
        if isinstance(rows, slice):
            first, stop, _ = rows.indices(len(self.indptr) - 1)
            there = slice(self.indptr[first], self.indptr[stop])
            return Csr(self.indptr[first : stop + 1] - self.indptr[first], self.features[there], self.counts[there])
        length = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        where = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], length)
        return Csr(indptr, self.features[where], self.counts[where])

    def below(self, n_features: int) -> Csr:
        """Return the same rows without features from this number on."""
        kept = self.features < n_features
        return Csr(np.concatenate([[0], np.cumsum(kept)])[self.indptr], self.features[kept], self.counts[kept])

    @staticmethod
    def concatenate(parts: list[Csr]) -> Csr:
        """Return the rows of all parts, one after the other."""
        starts = np.cumsum([0, *(part.indptr[-1] for part in parts)])
        indptr = [part.indptr[1:] + start for part, start in zip(parts, starts, strict=False)]
        return Csr(
            np.concatenate([[0], *indptr]).astype(np.int64),
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )


@dataclass(frozen=True)
class Cells:
    """Cells in a checkpoint's vocabulary order.

    Attributes:
        n_cells: C.
        counts: Measurement to ragged raw counts; a cell that was not measured is an empty row.
        measured: Measurement to [C]: was the cell measured at all? Absent is never zero.
        panel: [C] number of the dataset whose panel says which features were measured; -1 when nobody knows.
        prompts: Field of ``PROMPTS`` to [C] code in the prompt vocabulary; 0 is "not said".
        perturbation: [C, T] codes of the targets hit together; 0 fills up.
        numbers: Name of ``NUMBERS`` to [C]; NaN is "not said".
        row: [C] a number that stays with the cell (its row in the snapshot), so that chance can depend on it.
        controls: The cells' matched controls, where they were asked for.
        set_C: The number within the batch of each cell's set; None where cells come singly.
        place_CX: Where each cell is, x and y; NaN is not known. None where cells come singly.
    """

    n_cells: int
    counts: dict[str, Csr]
    measured: dict[str, NDArray[np.bool_]]
    panel: NDArray[np.int32]
    prompts: dict[str, NDArray[np.int32]]
    perturbation: NDArray[np.int32]
    numbers: dict[str, NDArray[np.float32]]
    row: NDArray[np.int64]
    controls: Controls | None = None
    set_C: NDArray[np.int64] | None = None
    place_CX: NDArray[np.float32] | None = None

    def take(self, rows: NDArray[np.int64] | slice) -> Cells:
        """Return these cells, in this order; of a slice without a step nothing is copied."""
        return Cells(
            n_cells=len(self.row[rows]),
            counts={name: part.take(rows) for name, part in self.counts.items()},
            measured={name: part[rows] for name, part in self.measured.items()},
            panel=self.panel[rows],
            prompts={name: part[rows] for name, part in self.prompts.items()},
            perturbation=self.perturbation[rows],
            numbers={name: part[rows] for name, part in self.numbers.items()},
            row=self.row[rows],
            controls=None if self.controls is None else self.controls.take(rows),
            set_C=None if self.set_C is None else self.set_C[rows],
            place_CX=None if self.place_CX is None else self.place_CX[rows],
        )


@dataclass(frozen=True)
class Controls:
    """Unperturbed cells that go with the cells of a batch.

    Attributes:
        cells: The controls, each once.
        place_CS: Which of them go with each cell; -1 where there is none.
    """

    cells: Cells
    place_CS: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64] | slice) -> Controls:
        """Return the controls of these cells; controls that go with none of them stay."""
        return Controls(self.cells, self.place_CS[rows])


def with_absent(cells: Cells, names: Iterable[str]) -> Cells:
    """Return cells with measurements that none of them has: a base may know more than a snapshot measures."""
    names = tuple(names)
    if not names:
        return cells
    empty = Csr(np.zeros(cells.n_cells + 1, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.float32))
    others = cells.controls
    return replace(
        cells,
        counts=cells.counts | dict.fromkeys(names, empty),
        measured=cells.measured | {name: np.zeros(cells.n_cells, dtype=bool) for name in names},
        controls=None if others is None else replace(others, cells=with_absent(others.cells, names)),
    )


def with_known(cells: Cells, sizes: Mapping[str, int]) -> Cells:
    """Return cells with the first features alone of some measurements: a snapshot may have more than a base knows."""
    if not sizes:
        return cells
    others = cells.controls
    return replace(
        cells,
        counts=cells.counts | {name: cells.counts[name].below(size) for name, size in sizes.items()},
        controls=None if others is None else replace(others, cells=with_known(others.cells, sizes)),
    )
