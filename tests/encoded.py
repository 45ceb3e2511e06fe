"""Datasets whose counts encode their coordinates, so that a mix-up shows in the assertion."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse

from store.schema import DatasetPlan, Features
from store.writer import LakeWriter, write_counts


def encoded_counts(first_cell: int, n_cells: int, n_features: int) -> scipy.sparse.csr_matrix:
    """Counts that say where they belong: cell c has feature g where (c + g) % 3 == 0, as 1 + (7c + 13g) % 500."""
    cells, features = np.meshgrid(np.arange(first_cell, first_cell + n_cells), np.arange(n_features), indexing="ij")
    values = np.where((cells + features) % 3 == 0, 1 + (7 * cells + 13 * features) % 500, 0)
    return scipy.sparse.csr_matrix(values.astype(np.float32))


def numbered(prefix: str, n: int) -> Features:
    """Features named after their position."""
    names = [f"{prefix}{number:04d}" for number in range(n)]
    return Features(names, [name.lower() for name in names], ["gene"] * n, [1000] * n)


def add_dataset(
    writer: LakeWriter,
    dataset_id: str,
    n_cells: int,
    sizes: dict[str, int],
    organism: str = "homo_sapiens",
    *,
    version: int = 0,
    origin: str = "",
    time_unit: str = "",
) -> None:
    """Ingest a dataset whose counts encode their coordinates within it, counted from 1,000 x ``version``."""
    features = {name: numbered(name, n) for name, n in sizes.items()}
    plan = DatasetPlan(dataset_id, organism, f"key-{dataset_id}-{version}", n_cells, features, origin=origin)
    reservation = writer.reserve(plan)
    blocks = [
        write_counts(reservation, name, start, encoded_counts(1000 * version + start, min(64, n_cells - start), n))
        for name, n in sizes.items()
        for start in range(0, n_cells, 64)
    ]
    cells = np.arange(n_cells)
    obs = pd.DataFrame(
        {
            "cell_id": [f"{dataset_id}-{cell}" for cell in cells],
            "cell_type": np.where(cells % 2 == 0, "even", "odd"),
            "donor_id": [f"donor{cell % 5}" for cell in cells],
            "tissue": "blood",
            "is_primary_data": cells % 10 != 9,
            "perturbation": np.where(cells % 4 == 3, "RNA0003", "control"),
            "perturbation_type": "genetic",
            "time": cells % 3,
            "time_unit": time_unit,
        }
    )
    writer.commit(reservation, obs, blocks)
