"""This module is where a model begins: at mean shares of counts, and at the principal axes of log counts.

Features that vary together then begin alike, and a model that sums up a cell's features begins with the cell's
principal components, which are a floor of this field. Axes are found for all measurements of the same cells together,
so that a protein begins beside the genes that it goes with.

Shape letters used in this module:
    C  cells      G  features of a measurement      F  features of all measurements      D  width
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags_array, hstack
from sklearn.decomposition import TruncatedSVD

from train.tokens import SCALE

SPREAD = 0.2
"""Standard deviation of the vectors that features begin with."""
MOST_AXES = 64
MOST_CELLS = 4096


def principal_axes(counts: Mapping[str, csr_matrix], width: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return axes_GD of every measurement: the right singular vectors of log1p of counts per ``SCALE``.

    Axes beyond the rank of the counts are zeros, as are features without counts. Each measurement weighs the same.

    Args:
        counts: Measurement to raw counts_CG of the same cells; a cell that was not measured is an empty row.
        width: D, of which ``MOST_AXES`` are used at most; ``MOST_CELLS`` cells are looked at, the first.
        seed: Of the randomised decomposition.
    """
    width = min(width, MOST_AXES)
    blocks = [log_shares(part[:MOST_CELLS]) for part in counts.values()]
    sizes = [np.sqrt((block.data**2).sum()) or 1.0 for block in blocks]
    joint_CF = csr_matrix(hstack([block / size for block, size in zip(blocks, sizes, strict=True)]))
    n_axes = min(width, joint_CF.shape[0] - 1, joint_CF.shape[1] - 1)
    axes_FD = np.zeros((joint_CF.shape[1], width), np.float32)
    if n_axes > 0 and joint_CF.nnz:
        found = TruncatedSVD(n_axes, random_state=seed).fit(joint_CF)
        axes_FD[:, :n_axes] = found.components_.T
    first = np.cumsum([0, *(block.shape[1] for block in blocks)])
    axes = {name: axes_FD[first[place] : first[place + 1]] for place, name in enumerate(counts)}
    return {name: part * (SPREAD / max(float(part.std()), 1e-9)) for name, part in axes.items()}


def mean_share(counts_CG: csr_matrix) -> NDArray[np.float32]:
    """Return each feature's share_G of all counts, with half a count more for each."""
    total_G = np.asarray(counts_CG.sum(axis=0), dtype=np.float64).ravel() + 0.5
    return (total_G / total_G.sum()).astype(np.float32)


def log_shares(counts_CG: csr_matrix) -> csr_matrix:
    """Return log1p of counts per ``SCALE`` of the cell's counts, [C, G] float64."""
    counts_CG = counts_CG.astype(np.float64)
    depth_C = np.asarray(counts_CG.sum(axis=1)).ravel()
    return csr_matrix(diags_array(SCALE / np.maximum(depth_C, 1)) @ counts_CG).log1p()
