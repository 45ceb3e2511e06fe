"""This module says how unlike all that a model was trained on a cell is: a p value from distances in its latent space.

A checkpoint keeps the embeddings of some training cells, and how far cells that it did not learn from are from them. A
new cell's p value is the share of these that are at least as far: where the cell is of the same kind, small values are
as rare as they say (conformal outlier detection, Bates et al. 2023). Nothing but the organism is said of any of them.

Shape letters used in this module:
    C  cells      R  reference cells      N  held-out cells      K  neighbours      D  width
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.cells import Cells

REFERENCE_CELLS = 2048
HELD_OUT_CELLS = 1024
FEWEST = 20
"""Cells of each kind without which no p value is told."""
NEIGHBOURS = 15


@dataclass(frozen=True)
class Reference:
    """What is known, in a model's latent space.

    Attributes:
        embedding_RD: float32, of training cells.
        distance_N: float32, of cells that were held out, ascending.
    """

    embedding_RD: Tensor
    distance_N: Tensor

    def p_values(self, embedding_CD: Tensor) -> NDArray[np.float32]:
        """Return p_C: at least 1 / (N + 1)."""
        far_C = distances(embedding_CD.float().cpu(), self.embedding_RD)
        return p_values(self.distance_N.numpy(), far_C.numpy()).astype(np.float32)


def p_values(calibration_C: NDArray[np.floating], score_C: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return conformal p values: how often a known cell, exchangeable with the calibration cells, is at least as new.

    Flagging cells with p <= 0.1 flags at most a tenth of known cells, on average over calibration sets (Vovk,
    Gammerman and Shafer 2005).

    Args:
        calibration_C: Scores of known cells that training did not have.
        score_C: Scores of the cells in question.
    """
    ascending = np.sort(calibration_C)
    at_least = len(ascending) - np.searchsorted(ascending, score_C, side="left")
    p_C: NDArray[np.float64] = (1 + at_least) / (1 + len(ascending))
    return p_C


def distances(embedding_CD: Tensor, embedding_RD: Tensor) -> Tensor:
    """Return distance_C: the mean to the K nearest reference cells."""
    far_CR = torch.cdist(embedding_CD, embedding_RD, compute_mode="donot_use_mm_for_euclid_dist")
    return far_CR.topk(min(NEIGHBOURS, len(embedding_RD)), dim=1, largest=False).values.mean(1)


def make_reference(known: Tensor, held_out: Tensor) -> Reference | None:
    """Return the reference that embeddings of training cells and of others make; None where there are too few."""
    if min(len(known), len(held_out)) < FEWEST:
        return None
    known = known.float().cpu()
    return Reference(known, distances(held_out.float().cpu(), known).sort().values)


def unsaid(cells: Cells) -> Cells:
    """Return cells of which nothing is said but their organism."""
    silent = {
        name: codes_C if name == "organism" else np.zeros_like(codes_C) for name, codes_C in cells.prompts.items()
    }
    return replace(
        cells,
        prompts=silent,
        perturbation=np.zeros((cells.n_cells, 1), np.int32),
        numbers={name: np.full(cells.n_cells, np.nan, np.float32) for name in cells.numbers},
        controls=None,
        set_C=None,
        place_CX=None,
    )


def first_cells(batches: Iterable[Cells], n_cells: int) -> list[Cells]:
    """Return batches until there are so many cells, the last one cut."""
    taken: list[Cells] = []
    for batch in batches:
        room = n_cells - sum(one.n_cells for one in taken)
        plain = unsaid(batch)
        taken.append(plain.take(np.arange(min(room, batch.n_cells))))
        if room <= batch.n_cells:
            break
    return taken
