"""This module judges embeddings: what clusters and neighbourhoods keep of types, how batches mix, and without labels.

Measures of types and batches are those of scib-metrics (Luecken et al. 2022; BRAS: Rautenstrauch and Ohler 2025). No
label is in the other one: two halves of a cell's molecules should be found beside each other.

Shape letters used in this module:
    C  cells      K  dimensions of an embedding
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from store.errors import InputRefused
from train.evaluation.cellfloor import Embedder, PrincipalComponents, VariableFeatures
from train.evaluation.folds import Fold
from train.evaluation.score import REPLICATE, Value, Way
from train.evaluation.study import Study
from train.evaluation.suites import FEWEST_CELLS, deal_molecules, shuffled, units

EMBED: dict[str, Way] = {"NMI": "higher", "ARI": "higher", "cLISI": "higher", "BRAS": "higher", "iLISI": "higher"}
FOUND = "halves that find each other"
NEIGHBOURS = 90
MOST_CELLS = 1500
Matrix = NDArray[np.float64]


def embedding_floor(measurement: str, seed: int = 0) -> list[Embedder]:
    """Return the embeddings to beat."""
    return [VariableFeatures(measurement), PrincipalComponents(measurement, seed=seed)]


class ToldTypes:
    """Linear discriminants of principal components: an embedding that was told types."""

    name = REPLICATE

    def __init__(self, measurement: str, column: str, seed: int) -> None:
        """Say of what."""
        self.components, self.column = PrincipalComponents(measurement, seed=seed), column
        self.discriminants = LinearDiscriminantAnalysis()

    def fit(self, train: Study) -> Self:
        """Learn from cells and their types."""
        self.discriminants.fit(self.components.fit(train).embed(train), train.label(self.column).astype(str))
        return self

    def embed(self, cells: Study) -> Matrix:
        """Return embedding_CK."""
        embedded: Matrix = self.discriminants.transform(self.components.embed(cells))
        return embedded


def embed_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Embedder]],
    measurement: str = "RNA",
    column: str = "cell_type",
    seeds: Iterable[int] = range(3),
    batch: str = "donor_id",
) -> list[Value]:
    """Embed held-out groups; the units are folds.

    The replicate is discriminants that were also told the types of one half of the held-out cells; every embedding is
    judged on the other half. Batches are the donors (or another column's values) in it: how they mix is not defined
    where there is but one.
    """
    values = []
    for seed in seeds:
        for fold in folds:
            rows = shuffled(np.flatnonzero(fold.test_C), seed)
            own_C, judged = fold.train_C.copy(), study.take(rows[1::2][:MOST_CELLS])
            own_C[rows[::2]] = True
            if judged.n_cells < FEWEST_CELLS or len(set(judged.label(column))) < 2:
                continue
            train = study.take(fold.train_C)
            fitted: dict[str, Embedder] = {name: make(seed).fit(train) for name, make in methods.items()}
            fitted[REPLICATE] = ToldTypes(measurement, column, seed).fit(study.take(own_C))
            for name, method in fitted.items():
                kept = _kept(method.embed(judged), judged.label(column), judged.label(batch))
                values += [Value(name, metric, fold.name, seed, value) for metric, value in kept.items()]
    if not values:
        raise InputRefused(f"no fold holds {2 * FEWEST_CELLS} cells of two {column}s out")
    return values


def _kept(embedding_CK: Matrix, type_C: NDArray[Any], batch_C: NDArray[Any]) -> dict[str, float]:
    """Return what an embedding keeps of types, and how it mixes batches; NaN where that is not defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scib_metrics  # compiles for seconds: only who asks for it waits
        from scib_metrics.nearest_neighbors import NeighborsResults

        x = np.ascontiguousarray(embedding_CK, dtype=np.float32)
        _, type_C = np.unique(type_C.astype(str), return_inverse=True)
        _, batch_C = np.unique(batch_C.astype(str), return_inverse=True)
        found = scib_metrics.nmi_ari_cluster_labels_kmeans(x, type_C)
        n_neighbours = min(NEIGHBOURS, len(x) - 1)
        distances, indices = NearestNeighbors(n_neighbors=n_neighbours).fit(x).kneighbors(x)
        near = NeighborsResults(indices=indices, distances=distances)
        several = len(set(batch_C)) > 1
        return {
            "NMI": float(found["nmi"]),
            "ARI": float(found["ari"]),
            "cLISI": float(scib_metrics.clisi_knn(near, type_C)),
            "BRAS": float(scib_metrics.bras(x, type_C, batch_C)) if several else np.nan,
            "iLISI": float(scib_metrics.ilisi_knn(near, batch_C)) if several else np.nan,
        }


def concordance(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Embedder]],
    measurement: str = "RNA",
    seeds: Iterable[int] = range(3),
    unit: str = "donor_id",
) -> list[Value]:
    """Embed two halves of each held-out cell's molecules: how often is the other half nearest, of all cells' others?

    The units are donors. No label is looked at. The replicate is perfect: every half finds its own.
    """
    values = []
    for seed in seeds:
        for fold in folds:
            test = study.take(shuffled(np.flatnonzero(fold.test_C), seed)[:MOST_CELLS])
            groups = units(test.take(np.diff(test.measured(measurement).indptr) > 1), fold, unit)
            fitted = (
                {name: make(seed).fit(study.take(fold.train_C)) for name, make in methods.items()} if groups else {}
            )
            for where, group in groups:
                halves = deal_molecules(group, measurement, seed)
                values.append(Value(REPLICATE, FOUND, where, seed, 1.0))
                for name, method in fitted.items():
                    far_CC = pairwise_distances(*(method.embed(half) for half in halves))
                    share = float((far_CC.argmin(axis=1) == np.arange(group.n_cells)).mean())
                    values.append(Value(name, FOUND, where, seed, share))
    if not values:
        raise InputRefused(f"no held-out group has {FEWEST_CELLS} cells of {measurement}")
    return values
