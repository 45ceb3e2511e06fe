"""This module finds cells that stand in a lake more than once, by their counts.

``is_primary_data`` is a claim of whoever published a dataset. Here the digests of cells' counts are compared, which
were kept at ingestion. They do not depend on the order of features or on features without counts, but on the names of
features: the same cell, aligned to another reference, is another cell here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from store import records
from store.errors import MissingError
from store.lake import Lake

FEWEST_FEATURES = 50
"""Cells with fewer features are left out: two of them may be alike by chance."""

PIECE_CELLS = 2**24
"""Cells that are compared at a time, about: some 100 bytes of memory each, and one reading of all digests."""


@dataclass(frozen=True)
class Shared:
    """Cells that two datasets, or one twice, have in common.

    Attributes:
        organism: Of both.
        first: A dataset.
        second: Another, or the same one.
        cells: Cells that both hold, each as often as both do (of one dataset: cells beyond the first of their kind).
        share: The part of the smaller dataset that this is.
        both_primary: Cells of them that both datasets call primary data: they are counted twice.
    """

    organism: str
    first: str
    second: str
    cells: int
    share: float
    both_primary: int


def find(lake: Lake) -> list[Shared]:
    """Compare all datasets of a lake; pairs with most cells in common come first."""
    found: list[Shared] = []
    for organism in lake.organisms:
        n_cells = sum(commit.dataset["n_obs"] for commit in lake.current if commit.dataset["organism"] == organism)
        n_pieces = -(-n_cells // PIECE_CELLS)
        repeated, sizes = [], Counter[str]()
        for piece in range(n_pieces):
            cells = pd.concat(_cells(lake, organism, piece, n_pieces), ignore_index=True)
            sizes.update({str(name): int(count) for name, count in cells["dataset"].value_counts().items()})
            repeated.append(cells[cells["digest"].duplicated(keep=False)])
        again = pd.concat(repeated, ignore_index=True)
        if len(again):
            found += _shared(lake, organism, again, sizes)
    return sorted(found, key=lambda shared: (-shared.cells, shared.first, shared.second))


def _cells(lake: Lake, organism: str, piece: int, n_pieces: int) -> Iterator[pd.DataFrame]:
    """Yield each dataset's cells whose digests fall to a piece: those that are alike fall to the same."""
    for commit in lake.current:
        dataset = commit.dataset
        if dataset["organism"] != organism:
            continue
        try:
            uri = records.join(lake.uri, records.FOLDER, "sides", f"{dataset['number']:012d}-cells.parquet")
            table = records.read_table(uri)
        except FileNotFoundError:
            raise MissingError(
                f"{lake.uri}: dataset {dataset['dataset_id']!r} has no digests of cells; ingest it again"
            ) from None
        digests = table["digest"].to_numpy()
        mine = np.flatnonzero((table["nnz"].to_numpy() >= FEWEST_FEATURES) & (digests % n_pieces == piece))
        joinids = dataset["obs_start"] + mine
        yield pd.DataFrame({"digest": digests[mine], "joinid": joinids, "dataset": dataset["dataset_id"]})


def _shared(lake: Lake, organism: str, again: pd.DataFrame, sizes: Mapping[str, int]) -> Iterator[Shared]:
    columns = ["soma_joinid", "is_primary_data"]
    obs = lake.experiment(organism).obs.read((again["joinid"].to_numpy(),), column_names=columns)
    primary = obs.concat().to_pandas().set_index("soma_joinid")["is_primary_data"]
    again = again.assign(primary=primary.reindex(again["joinid"]).to_numpy())
    kinds = again.groupby(["digest", "dataset"], as_index=False).agg(
        cells=("joinid", "size"), primary=("primary", "sum")
    )
    for name, rows in kinds[kinds["cells"] > 1].groupby("dataset"):
        beyond = int((rows["cells"] - 1).sum())
        twice = int((rows["primary"] - 1).clip(lower=0).sum())
        yield Shared(organism, str(name), str(name), beyond, round(beyond / sizes[str(name)], 4), twice)
    pairs = kinds.merge(kinds, on="digest", suffixes=("", "_other"))
    pairs = pairs[pairs["dataset"] < pairs["dataset_other"]]
    for (first, second), rows in pairs.groupby(["dataset", "dataset_other"]):
        cells, both = (int(np.minimum(rows[name], rows[f"{name}_other"]).sum()) for name in ("cells", "primary"))
        smaller = min(sizes[str(first)], sizes[str(second)])
        yield Shared(organism, str(first), str(second), cells, round(cells / smaller, 4), both)
