"""This module tells cells of a kind that training did not have: scores, p values with a guarantee, and a suite.

Shape letters used in this module:
    C  cells      K  neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from store.errors import InputRefused
from train.evaluation.cellfloor import Annotator, Embedder, PrincipalComponents
from train.evaluation.folds import Fold
from train.evaluation.score import REPLICATE, Value, Way
from train.evaluation.study import Study
from train.evaluation.suites import refuse_one_type

NOVELTY: dict[str, Way] = {"AUROC": "higher", "FPR at 95 % TPR": "lower"}
KNOWN_SHARE = 0.2
"""Share of the known cells that is kept from training, to be told from the new ones."""
FEWEST_CELLS = 20

Vector = NDArray[np.float64]


class Novelty(Protocol):
    """Anything that learns what is known and says how new a cell is."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def fit(self, train: Study) -> Self:
        """Learn what is known."""

    def score(self, cells: Study) -> Vector:
        """Return score_C: the higher, the newer."""


class NeighbourDistance:
    """The mean distance to the K nearest training cells in an embedding."""

    def __init__(self, name: str, embedder: Embedder, neighbours: int = 15) -> None:
        """Say in which embedding, and K."""
        self.name, self.embedder, self.neighbours = name, embedder, neighbours

    def fit(self, train: Study) -> Self:
        """Remember the training cells."""
        vectors = self.embedder.fit(train).embed(train)
        self.index = NearestNeighbors(n_neighbors=min(self.neighbours, len(vectors))).fit(vectors)
        return self

    def score(self, cells: Study) -> Vector:
        """Return the distances."""
        distance_CK, _ = self.index.kneighbors(self.embedder.embed(cells))
        mean_C: Vector = distance_CK.mean(axis=1)
        return mean_C


class Unsureness:
    """One minus the probability of the type that a classifier finds likeliest."""

    def __init__(self, name: str, annotator: Annotator) -> None:
        """Say whose."""
        self.name, self.annotator = name, annotator

    def fit(self, train: Study) -> Self:
        """Fit the classifier."""
        self.annotator.fit(train)
        return self

    def score(self, cells: Study) -> Vector:
        """Return how unsure it is."""
        unsure_C: Vector = 1 - self.annotator.predict_proba(cells).max(axis=1)
        return unsure_C


def novelty_floor(measurement: str, column: str = "cell_type", seed: int = 0) -> list[Novelty]:
    """Return the novelty baselines."""
    logistic = LogisticRegression(max_iter=2000, random_state=seed)
    return [
        NeighbourDistance("kNN distance on PCs", PrincipalComponents(measurement, seed=seed)),
        Unsureness("max softmax", Annotator("", PrincipalComponents(measurement, seed=seed), logistic, column)),
    ]


def novelty_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Novelty]],
    measurement: str = "RNA",
    column: str = "cell_type",
    seeds: Iterable[int] = range(3),
) -> list[Value]:
    """Tell the cells of a held-out type from known cells that training did not have either; units are types.

    The replicate is a logistic regression on principal components that was shown half of the new type's cells.

    Raises:
        InputRefused: No held-out group has enough cells.
        UsageError: The training cells of a fold are of one type.
    """
    values = []
    for seed in seeds:
        for fold in folds:
            random = np.random.default_rng([seed, 6])
            kept_C = fold.train_C & (random.random(study.n_cells) >= KNOWN_SHARE)
            known = np.flatnonzero(fold.train_C & ~kept_C)
            new = random.permutation(np.flatnonzero(fold.test_C))
            shown, judged = new[::2], new[1::2]
            if min(len(judged), len(known)) < FEWEST_CELLS:
                continue
            cells = study.take(np.concatenate([known, judged]))
            truth = np.repeat([0, 1], [len(known), len(judged)])
            train = study.take(kept_C)
            refuse_one_type(train, fold, column)
            answers = {name: make(seed).fit(train).score(cells) for name, make in methods.items()}
            answers[REPLICATE] = _shown(study, np.flatnonzero(kept_C), shown, cells, measurement, seed)
            for name, score_C in answers.items():
                wrong, right, _ = roc_curve(truth, score_C)
                at_95 = float(wrong[np.argmax(right >= 0.95)])
                values.append(Value(name, "AUROC", fold.name, seed, float(roc_auc_score(truth, score_C))))
                values.append(Value(name, "FPR at 95 % TPR", fold.name, seed, at_95))
    if not values:
        raise InputRefused(
            f"no held-out group has {2 * FEWEST_CELLS} cells beside as many known ones; hold out {column}"
        )
    return values


def _shown(
    study: Study, known: NDArray[np.int64], shown: NDArray[np.int64], cells: Study, measurement: str, seed: int
) -> Vector:
    """Return what somebody says who was shown some of the new cells."""
    train = study.take(np.concatenate([known, shown]))
    components = PrincipalComponents(measurement, seed=seed).fit(train)
    classifier = LogisticRegression(max_iter=2000, class_weight="balanced")
    classifier.fit(components.embed(train), np.repeat([0, 1], [len(known), len(shown)]))
    probability_C: Vector = classifier.predict_proba(components.embed(cells))[:, 1]
    return probability_C
