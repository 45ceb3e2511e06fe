"""This module looks whether counts are what they claim to be, and restores counts from log1p where that is exact.

Shape letters used in this module:
    C  cells of a block      F  features of the source
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from store.errors import InputRefused


def problems(counts_CF: scipy.sparse.csr_matrix, features: Sequence[str], first_cell: int) -> list[str]:
    """Say what makes a block unfit as counts: not finite, negative, or not whole numbers, with an example of each."""
    data = counts_CF.data
    finite = np.isfinite(data)
    found = []
    for wrong, what in (
        (~finite, "not finite"),
        (finite & (data < 0), "negative"),
        (finite & (data >= 0) & (data != np.rint(data)), "not a whole number"),
    ):
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            cell = first_cell + int(np.searchsorted(counts_CF.indptr, at, side="right")) - 1
            found.append(
                f"{int(wrong.sum()):,} of {len(data):,} values are {what}, such as {data[at]:g} "
                f"(cell {cell}, feature {features[int(counts_CF.indices[at])]!r})"
            )
    return found


def counts_from_log1p(values_CF: scipy.sparse.csr_matrix, first_cell: int) -> scipy.sparse.csr_matrix:
    """Restore counts from log1p of counts scaled by one factor per cell.

    The smallest non-zero value of a cell stands for 1 (or 2, or 3) counts; then every other one must be a whole number
    within what rounding in the source explains.

    Raises:
        InputRefused: Some cell has no such factor: the values are something else.
    """
    restored = scipy.sparse.csr_matrix(values_CF, dtype=np.float64, copy=True)
    restored.eliminate_zeros()
    if not np.all(np.isfinite(restored.data)) or np.any(restored.data < 0):
        raise InputRefused("values = 'log1p': some values are negative or not finite; log1p of counts never is")
    scaled = np.expm1(restored.data)
    for row in range(restored.shape[0]):
        mine = slice(restored.indptr[row], restored.indptr[row + 1])
        if mine.stop > mine.start:
            restored.data[mine] = _whole(scaled[mine], first_cell + row)
    return restored


def _whole(
    scaled: np.ndarray[tuple[int], np.dtype[np.float64]], cell: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    unit = scaled / scaled.min()
    for smallest in (1, 2, 3):
        counts = np.rint(unit * smallest)
        if np.all(np.abs(unit * smallest - counts) <= 0.02 + 0.002 * counts):
            return counts
    raise InputRefused(
        f"values = 'log1p': cell {cell} holds no scaled counts (multiples of its smallest value: "
        f"{', '.join(f'{value:.3f}' for value in np.unique(unit)[:4])}); give the matrix with raw counts instead"
    )
