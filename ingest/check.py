"""This module looks whether counts are what they claim to be, and restores counts from log1p where that is exact.

Shape letters used in this module:
    C  cells of a block      F  features of the source      N  stored values
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from store.errors import InputRefused
from store.hashes import stirred

LARGEST_COUNT = 2**24


def problems(counts_CF: scipy.sparse.csr_matrix, features: Sequence[str], first_cell: int) -> list[str]:
    """Say what makes a block unfit as counts, with an example of each, and what the values look like instead.

    Counts are finite, not negative, whole, and at most 2**24 (what float32 holds exactly).
    """
    data = counts_CF.data
    finite = np.isfinite(data)
    found = []
    for wrong, what in (
        (~finite, "not finite"),
        (finite & (data < 0), "negative"),
        (finite & (data >= 0) & (data != np.rint(data)), "not a whole number"),
        (finite & (data > LARGEST_COUNT), f"larger than {LARGEST_COUNT:,}"),
    ):
        if wrong.any():
            found.append(_example(counts_CF, wrong, what, features, first_cell))
    if found:
        guess = looks_like(counts_CF)
        found += [guess] if guess else []
    return found


FEW_VALUES = 1000
"""So many values are no logarithms by chance if all are whole numbers."""


def lognorm_problems(values_CF: scipy.sparse.csr_matrix, features: Sequence[str], first_cell: int) -> list[str]:
    """Say what makes a block unfit as logarithms of normalised counts: they are finite, and no counts."""
    data = values_CF.data
    if len(data) >= FEW_VALUES and np.all(data == np.rint(data)) and data.max() > 1:
        return [f"values are whole numbers up to {data.max():g}, such as counts, and are to be kept as lognorm"]
    return level_problems(values_CF, features, first_cell)


def level_problems(values_CF: scipy.sparse.csr_matrix, features: Sequence[str], first_cell: int) -> list[str]:
    """Say what makes a block unfit as levels: they are finite."""
    wrong = ~np.isfinite(values_CF.data)
    return [_example(values_CF, wrong, "not finite", features, first_cell)] if wrong.any() else []


def _example(
    values_CF: scipy.sparse.csr_matrix, wrong: NDArray[np.bool_], what: str, features: Sequence[str], first_cell: int
) -> str:
    at = int(np.flatnonzero(wrong)[0])
    cell = first_cell + int(np.searchsorted(values_CF.indptr, at, side="right")) - 1
    return (
        f"{int(wrong.sum()):,} of {len(values_CF.data):,} values are {what}, such as {values_CF.data[at]:.8g} "
        f"(cell {cell}, feature {features[int(values_CF.indices[at])]!r})"
    )


def looks_like(values_CF: scipy.sparse.csr_matrix) -> str:
    """Guess what values are that are not counts, from the sums of cells; empty when nothing is evident."""
    data = values_CF.data
    if not len(data) or not np.all(np.isfinite(data)):
        return ""
    if np.any(data < 0):
        return "values below zero point to scaled or centred values"
    totals = np.asarray(values_CF.sum(axis=1), dtype=float).ravel()
    if data.max() < 40:
        unlogged = scipy.sparse.csr_matrix((np.expm1(data.astype(float)), values_CF.indices, values_CF.indptr))
        logged = np.asarray(unlogged.sum(axis=1), dtype=float).ravel()
        if _alike(logged):
            return f"exp(x)-1 sums to {np.median(logged[logged > 0]):,.0f} in every cell: log1p of normalised counts"
        return "no value reaches 40: logarithms, perhaps"
    if _alike(totals):
        total = np.median(totals[totals > 0])
        return f"every cell sums to {total:,.0f}: {'CPM, TPM or RPKM' if total > 5e5 else 'normalised counts'}"
    return ""


def _alike(totals: NDArray[np.float64]) -> bool:
    filled = totals[totals > 0]
    return len(filled) > 2 and bool(np.ptp(filled) <= 0.01 * np.median(filled))


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


FARTHEST = 0.25
"""So far from a whole number is no count, however large: rounding to three digits explains it up to 250 counts."""


def _whole(
    scaled: np.ndarray[tuple[int], np.dtype[np.float64]], cell: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    unit = scaled / scaled.min()
    for smallest in (1, 2, 3):
        counts = np.rint(unit * smallest)
        if np.all(np.abs(unit * smallest - counts) <= np.minimum(0.02 + 0.002 * counts, FARTHEST)):
            return counts
    raise InputRefused(
        f"values = 'log1p': cell {cell} holds no scaled counts (multiples of its smallest value: "
        f"{', '.join(f'{value:.3f}' for value in np.unique(unit)[:4])}); give the matrix with raw counts instead"
    )


def cell_digests(counts_CG: scipy.sparse.csr_matrix, digest_G: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Digest each cell's counts so that neither the order of features nor what else is in the matrix matters.

    Args:
        counts_CG: Counts.
        digest_G: A digest of each feature's id.

    Returns:
        digest_C; equal cells have equal digests, in whichever dataset they stand. An empty cell has 0.
    """
    value_N = np.ascontiguousarray(counts_CG.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
    mixed_N = stirred(digest_G[counts_CG.indices] ^ (value_N * np.uint64(0x9E3779B97F4A7C15)))
    digest_C = np.zeros(counts_CG.shape[0], np.uint64)
    filled = np.flatnonzero(np.diff(counts_CG.indptr))
    if len(filled):
        digest_C[filled] = np.add.reduceat(mixed_N, counts_CG.indptr[filled])
    return digest_C
