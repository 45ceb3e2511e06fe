"""A large h5ad of made-up counts with the shape of a real atlas, written row by row: any size fits in memory."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd

GENES = 36_000
UMIS = 3_650
"""UMIs of a median cell; with the genes' spread below this gives about 2,300 genes a cell."""


def write_atlas(
    path: Path,
    n_cells: int,
    n_genes: int = GENES,
    seed: int = 0,
    compression: str | None = None,
    *,
    umis: int = UMIS,
) -> int:
    """Write an h5ad with raw counts in X as CSR, ``umis`` of them in a median cell; return its non-zeros.

    Genes differ in level as a log-normal, cells in depth likewise; every count is a draw from the gene's share.
    """
    rng = np.random.default_rng(seed)
    level = np.exp(rng.normal(0.0, 2.0, n_genes))
    upper_G = np.cumsum(level / level.sum())
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        anndata.io.write_elem(file, "obs", _obs(n_cells))
        anndata.io.write_elem(file, "var", _var(n_genes))
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)})
        options = {"maxshape": (None,), "chunks": (2**18,), "compression": compression}
        data = x.create_dataset("data", shape=(0,), dtype="f4", **options)
        indices = x.create_dataset("indices", shape=(0,), dtype="i4", **options)
        indptr = [np.zeros(1, np.int64)]
        for start in range(0, n_cells, 2_000):
            cells = min(2_000, n_cells - start)
            depth_C = np.maximum(umis // 8, (umis * np.exp(rng.normal(0.0, 0.3, cells))).astype(int))
            cell = np.repeat(np.arange(cells, dtype=np.int64), depth_C)
            gene = np.minimum(np.searchsorted(upper_G, rng.random(len(cell))), n_genes - 1)
            placed, counts = np.unique(cell * n_genes + gene, return_counts=True)
            size = data.shape[0]
            data.resize((size + len(placed),))
            indices.resize((size + len(placed),))
            data[size:], indices[size:] = counts, placed % n_genes
            per_cell = np.bincount(placed // n_genes, minlength=cells)
            indptr.append(indptr[-1][-1] + np.cumsum(per_cell))
        x.create_dataset("indptr", data=np.concatenate(indptr))
        return int(data.shape[0])


def _obs(n_cells: int) -> pd.DataFrame:
    cell = np.arange(n_cells)
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.char.add("type", (cell * 7919 % 40).astype(str))),
            "donor_id": pd.Categorical(np.char.add("donor", (cell // 5_000).astype(str))),
        },
        index=np.char.add("cell-", cell.astype(str)),
    )


def _var(n_genes: int) -> pd.DataFrame:
    ids = np.char.add("ENSG", np.char.zfill(np.arange(n_genes).astype(str), 11))
    return pd.DataFrame({"feature_name": np.char.add("GENE", np.arange(n_genes).astype(str))}, index=ids)
