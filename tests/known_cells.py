"""A lake whose cells a small checkpoint knows (``small_checkpoint``): two types that their genes tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from small_checkpoint import GENES, PROTEINS

from serve.index import VectorIndex, list_indexes
from store.schema import DatasetPlan, Features
from store.writer import LakeWriter, write_counts

TYPES = {"B cell": "CL:0000236", "T cell": "CL:0000084", "unknown": "unknown"}
STRANGE = "ENSG99999999999"
"""A gene of the lake that the checkpoint does not know."""


def known_counts(n_cells: int, seed: int) -> dict[str, scipy.sparse.csr_matrix]:
    """Draw counts: genes 0 to 19 are a B cell's, the others a T cell's; kinds take turns, every tenth is unknown."""
    random = np.random.default_rng(seed)
    b_cell = (np.arange(n_cells) % 2 == 0)[:, None]
    rate = np.where((np.arange(len(GENES) + 1) < 20)[None, :] == b_cell, 4.0, 0.3)
    proteins = random.poisson(2.0, (n_cells, len(PROTEINS)))
    return {
        "RNA": scipy.sparse.csr_matrix(random.poisson(rate).astype(np.float32)),
        "protein": scipy.sparse.csr_matrix(proteins.astype(np.float32)),
    }


def add_cells(
    writer: LakeWriter, dataset_id: str, n_cells: int, *, seed: int = 0, proteins: bool = False, origin: str = ""
) -> None:
    """Ingest such cells; the lake's genes stand in another order than the checkpoint's."""
    genes, counts = [*GENES[::-1], STRANGE], known_counts(n_cells, seed)
    counts["RNA"] = scipy.sparse.csr_matrix(counts["RNA"][:, [*reversed(range(len(GENES))), len(GENES)]])
    names = {"RNA": genes, "protein": PROTEINS} if proteins else {"RNA": genes}
    features = {
        name: Features(ids, [one.lower() for one in ids], ["gene"] * len(ids), [1] * len(ids))
        for name, ids in names.items()
    }
    plan = DatasetPlan(dataset_id, "homo_sapiens", f"{dataset_id}-{seed}", n_cells, features, origin=origin)
    reservation = writer.reserve(plan)
    blocks = [write_counts(reservation, name, 0, counts[name]) for name in names]
    numbers = np.arange(n_cells)
    types = np.where(numbers % 10 == 9, "unknown", np.where(numbers % 2 == 0, "B cell", "T cell"))
    obs = pd.DataFrame(
        {
            "cell_id": [f"{dataset_id}-{number}" for number in numbers],
            "cell_type": types,
            "cell_type_ontology_term_id": [TYPES[name] for name in types],
            "tissue": np.where(numbers % 3 == 0, "lung", "blood"),
            "donor_id": [f"donor{number % 5}" for number in numbers],
        }
    )
    writer.commit(reservation, obs, blocks)


def make_lake(folder: Path | str, n_cells: int = 1_400) -> str:
    """Make a lake of two datasets, one with proteins."""
    with LakeWriter(str(folder)) as writer:
        add_cells(writer, "first", n_cells - 300)
        add_cells(writer, "second", 300, seed=1, proteins=True)
    return str(folder)


def open_index(lake: str, key: str) -> VectorIndex:
    """Open the index of a name of the lake, which has one of it."""
    (known,) = [one for one in list_indexes(lake) if one.generation.key == key]
    return VectorIndex(known)
