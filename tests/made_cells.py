"""Made-up cells as the model gets them; imports numpy and the cells' form alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from train.cells import NUMBERS, PROMPTS, Cells, Csr

OFFSETS = {"RNA": 1, "protein": 31}


def cells(n_cells: int = 40, seed: int = 0) -> Cells:
    rng = np.random.default_rng(seed)
    counts = {}
    for name, size in (("RNA", 30), ("protein", 8)):
        dense = rng.poisson(0.8, (n_cells, size))
        indptr = np.concatenate([[0], np.cumsum((dense > 0).sum(1))]).astype(np.int64)
        row, column = np.nonzero(dense)
        counts[name] = Csr(indptr, column.astype(np.int32), dense[row, column].astype(np.float32))
    return Cells(
        n_cells,
        counts,
        {name: np.ones(n_cells, bool) for name in counts},
        np.zeros(n_cells, np.int32),
        {name: np.full(n_cells, 3, np.int32) for name in PROMPTS},
        np.full((n_cells, 2), 2, np.int32),
        {name: np.full(n_cells, 24.0, np.float32) for name in NUMBERS},
        np.arange(100, 100 + n_cells),
    )


def whole(n_cells: int, seed: int, largest: int, dtype: type[np.generic]) -> Cells:
    """Cells of one measurement with whole counts as a snapshot stores them; some are empty, some very deep."""
    rng = np.random.default_rng(seed)
    dense = rng.negative_binomial(0.3, 0.05, (n_cells, 400)).clip(max=largest)
    dense[3] = 0
    dense[4::5] = np.exp(rng.uniform(0, np.log(largest + 1), dense[4::5].shape)) * (dense[4::5] > 0)
    dense[9:10, ::3] = largest  # of which many tie
    indptr = np.concatenate([[0], np.cumsum((dense > 0).sum(1))]).astype(np.int64)
    row, column = np.nonzero(dense)
    part = Csr(indptr, column.astype(np.uint16), dense[row, column].astype(dtype))
    said = cells(n_cells)
    return replace(said, counts={"RNA": part}, measured={"RNA": np.arange(n_cells) % 7 != 0})


OF = {"several measurements": (cells(400), OFFSETS), "whole counts": (whole(400, 1, 3000, np.uint16), {"RNA": 5})}
