"""This module gathers the training cells that a model begins at; dead rows are never among them.

Shape letters used in this module:
    C  cells      G  features of a measurement
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from store.errors import UsageError
from store.part import Part
from store.schema import measured_column
from train.sources import SCANNED_ROWS, Source

BASELINE_CELLS = 16384
"""Cells that are gathered at most."""
READ_ROWS = 2**14
"""Rows that are read together at most."""
SCANNED_MOST = 2**25
"""Rows of a source that are looked at for cells that have a measurement, unless none of them has it."""


def first_values(sources: Sequence[Source], sizes: Mapping[str, int]) -> dict[str, csr_matrix]:
    """Return values_CG of each measurement of the same cells: the first of the largest source.

    Args:
        sources: Of the split to train on.
        sizes: Measurement to its features, G.
    """
    source = max(sources, key=lambda one: one.n_rows)
    rows = source.rows(np.arange(min(source.n_rows, BASELINE_CELLS)))
    return {name: read_values(source.part, name, rows, n_features) for name, n_features in sizes.items()}


def measured_values(sources: Sequence[Source], name: str, n_features: int) -> csr_matrix:
    """Return values_CG of one measurement of cells that have it, from all sources, so that none speaks for the others.

    Sources give in turn, so that a small one is heard in whole and a large one fills up.

    Raises:
        UsageError: No cell of the split has a value.
    """
    having = [source for source in sources if source.part.measurements.get(name, {}).get("nnz", 0)]
    turn = -(-BASELINE_CELLS // max(len(having), 1))
    asked = {number: measured_rows(source, name, turn) for number, source in enumerate(having)}
    gathered: list[list[NDArray[np.int64]]] = [[] for _ in having]
    left = BASELINE_CELLS
    while asked and left:
        for number, found in list(asked.items()):
            rows = next(found, None)
            if rows is None:
                del asked[number]
            elif left:
                gathered[number].append(rows[:left])
                left -= len(gathered[number][-1])
    values = [
        read_values(source.part, name, np.concatenate(rows), n_features)
        for source, rows in zip(having, gathered, strict=True)
        if rows
    ]
    if not sum(part.nnz for part in values):
        raise UsageError(
            f"{sources[0].snapshot.uri}: no cell of the split to train on (data.split) has levels of {name!r}, so that "
            "nothing says what they are measured by; make a snapshot without this measurement (measurements = [...]), "
            "or one that has cells with it in that split"
        )
    return csr_matrix(vstack(values, format="csr"))


def measured_rows(source: Source, name: str, turn: int) -> Iterator[NDArray[np.int64]]:
    """Yield the part's rows of a source's cells that have a measurement, ``turn`` at a time, at the end fewer.

    Where few have it, ever more rows are looked at together; once some were found, ``SCANNED_MOST`` are enough.
    """
    start, step, found = 0, READ_ROWS, False
    kept = np.empty(0, np.int64)
    while start < source.n_rows and not (found and start >= SCANNED_MOST):
        rows = source.rows(np.arange(start, min(start + step, source.n_rows)))
        measured = source.part.codes([measured_column(name)], int(rows[0]), int(rows[-1]) + 1)[0]
        kept = np.concatenate([kept, rows[measured[rows - rows[0]] > 0]])
        start, step, found = start + step, min(2 * step, SCANNED_ROWS), found or len(kept) > 0
        while len(kept) >= turn:
            yield kept[:turn]
            kept = kept[turn:]
    if len(kept):
        yield kept


def read_values(part: Part, name: str, rows: NDArray[np.int64], n_features: int) -> csr_matrix:
    """Return values_CG of some of a part's rows, which ascend; no read is of more than ``READ_ROWS``."""
    pieces = []
    for mine in np.split(rows, np.flatnonzero(np.diff(rows // READ_ROWS)) + 1):
        first, last = int(mine[0]), int(mine[-1])
        indptr, features, values = part.block(name, first, last + 1)
        whole = csr_matrix((values.astype(np.float32), features, indptr), shape=(last + 1 - first, n_features))
        pieces.append(whole if len(mine) == last + 1 - first else whole[mine - first])
    return csr_matrix(vstack(pieces, format="csr"))
