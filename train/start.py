"""This module is where a model begins: at what fits all cells, and at the principal axes of log counts and levels.

Features that vary together then begin alike, and a model that sums up a cell's features begins with the cell's
principal components, which are a floor of this field. Axes are found for all measurements of the same cells together,
so that a protein begins beside the genes that it goes with.

Shape letters used in this module:
    C  cells      G  features of a measurement      F  features of all measurements      D  width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags_array, hstack
from scipy.special import logit

from train.likelihood import COUNTS, Likelihood
from train.model import CellModel
from train.ontology import TypeTerms
from train.tokens import SCALE

SPREAD = 0.2
"""Standard deviation of the vectors that features begin with."""
MOST_AXES = 64
MOST_CELLS = 4096
NO_LOG = 100.0
"""No logarithm of an intensity or a concentration is larger, in any usual base."""


def begin(
    model: CellModel,
    values: Mapping[str, csr_matrix],
    levels: Mapping[str, csr_matrix] | None = None,
    *,
    spectral: bool = True,
    seed: int = 0,
) -> None:
    """Let a model begin where these training cells are.

    Args:
        model: The model.
        values: Measurement to raw counts_CG, or levels_CG whose explicit zeros count, of the same cells.
        levels: Measurement to levels_CG of cells that have it, which say what its levels are measured by; left out,
            those of ``values``.
        spectral: Let features' vectors begin at principal axes.
        seed: Of the decomposition.
    """
    known: dict[str, Standards] = {}
    fitted = dict(values) | dict(levels or {})
    for name, part in fitted.items():
        if name in model.config.levels:
            known[name] = found = standards(part)
            assert model.levels is not None
            numbers = (torch.from_numpy(of_G) for of_G in (found.center_G, found.scale_G, found.limit_G))
            model.levels.learn(model.config.offsets[name], found.logged, *numbers)
    output = {name: first_output(model.config.likelihood_of(name), part) for name, part in fitted.items()}
    model.set_baseline({name: torch.from_numpy(part) for name, part in output.items()})
    if spectral:
        shown = {
            name: known[name].of(part) if name in known else log_shares(part[:MOST_CELLS])
            for name, part in values.items()
        }
        axes = principal_axes(shown, model.config.width, seed)
        model.set_axes({name: torch.from_numpy(part) for name, part in axes.items()})


def tell_types(model: CellModel, terms: TypeTerms) -> None:
    """Let a model know how the types that it tells hang together."""
    assert model.prototypes is not None
    model.prototypes.know(*(torch.from_numpy(part) for part in (terms.term_E, terms.first_Y, terms.covers_YY)))


@dataclass(frozen=True)
class Standards:
    """What levels are measured by.

    Attributes:
        logged: Are logs taken? They are where no level is negative and some are above ``NO_LOG``.
        center_G: Mean of each feature's levels; where no cell has one, the median of the other features' means.
        scale_G: Their standard deviation; where fewer than two cells have one, the median of the other features'.
        limit_G: The least of them, standardised; where no cell has one, the median over features that vary, or -3.
    """

    logged: bool
    center_G: NDArray[np.float32]
    scale_G: NDArray[np.float32]
    limit_G: NDArray[np.float32]

    def of(self, levels_CG: csr_matrix) -> csr_matrix:
        """Return standardised levels; what was not found stays empty."""
        data = np.log1p(levels_CG.data) if self.logged else levels_CG.data
        data = (data - self.center_G[levels_CG.indices]) / self.scale_G[levels_CG.indices]
        return csr_matrix((data.astype(np.float64), levels_CG.indices, levels_CG.indptr), shape=levels_CG.shape)


def standards(levels_CG: csr_matrix) -> Standards:
    """Return what the levels of some cells are measured by."""
    level_N = levels_CG.data.astype(np.float64)
    logged = len(level_N) > 0 and bool(level_N.min() >= 0 and level_N.max() > NO_LOG)
    level_N = np.log1p(level_N) if logged else level_N
    n_features, feature_N = levels_CG.shape[1], levels_CG.indices
    n_G = np.bincount(feature_N, minlength=n_features)
    center_G = np.bincount(feature_N, level_N, n_features) / np.maximum(n_G, 1)
    square_G = np.bincount(feature_N, (level_N - center_G[feature_N]) ** 2, n_features)
    scale_G = np.sqrt(square_G / np.maximum(n_G - 1, 1))
    spread_G = (n_G > 1) & (scale_G > 1e-6)
    scale_G = np.where(spread_G, scale_G, np.median(scale_G[spread_G]) if spread_G.any() else 1.0)
    center_G = np.where(n_G > 0, center_G, np.median(center_G[n_G > 0]) if n_G.any() else 0.0)
    limit_G = np.full(n_features, np.inf)
    np.minimum.at(limit_G, feature_N, level_N)
    limit_G = (limit_G - center_G) / scale_G
    limit_G = np.where(n_G > 0, limit_G, np.median(limit_G[spread_G]) if spread_G.any() else -3.0)
    return Standards(logged, *(of_G.astype(np.float32) for of_G in (center_G, scale_G, limit_G)))


def first_output(likelihood: Likelihood, values_CG: csr_matrix) -> NDArray[np.float32]:
    """Return output_G, what a likelihood is told of each feature, that fits some cells on average."""
    if likelihood in COUNTS:
        output_G: NDArray[np.float32] = np.log(mean_share(values_CG))
        return output_G
    if likelihood == "gaussian":
        return np.zeros(values_CG.shape[1], np.float32)
    total_G = np.asarray(values_CG.sum(axis=0), np.float64).ravel()
    n_G = np.bincount(values_CG.indices, minlength=values_CG.shape[1])
    if likelihood == "bernoulli":
        total_G, n_G = n_G.astype(np.float64), np.full_like(n_G, values_CG.shape[0])
    return np.asarray(logit((total_G + 0.5) / (n_G + 1.0)), np.float32)


def principal_axes(logs: Mapping[str, csr_matrix], width: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return axes_GD of every measurement: the right singular vectors of log counts and standardised levels.

    Axes beyond the rank are zeros, as are features without values. Each measurement weighs the same.

    Args:
        logs: Measurement to :func:`log_shares` or ``Standards.of``, [C, G], of the same cells; a cell that was not
            measured is an empty row.
        width: D, of which ``MOST_AXES`` are used at most; ``MOST_CELLS`` cells are looked at, the first.
        seed: Of the randomised decomposition.
    """
    width = min(width, MOST_AXES)
    blocks = [part[:MOST_CELLS] for part in logs.values()]
    sizes = [np.sqrt((block.data**2).sum()) or 1.0 for block in blocks]
    joint_CF = csr_matrix(hstack([block / size for block, size in zip(blocks, sizes, strict=True)]))
    n_axes = min(width, joint_CF.shape[0] - 1, joint_CF.shape[1] - 1)
    axes_FD = np.zeros((joint_CF.shape[1], width), np.float32)
    if n_axes > 0 and joint_CF.nnz:
        from sklearn.decomposition import TruncatedSVD  # a second to import: only who begins a model waits

        found = TruncatedSVD(n_axes, random_state=seed).fit(joint_CF)
        axes_FD[:, :n_axes] = found.components_.T
    first = np.cumsum([0, *(block.shape[1] for block in blocks)])
    axes = {name: axes_FD[first[place] : first[place + 1]] for place, name in enumerate(logs)}
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
