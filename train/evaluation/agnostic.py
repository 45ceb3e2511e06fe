"""This module judges without trusting human labels: by molecules nobody showed, and by a modality neither side used.

Labels can punish discovery: a model that sees more than its annotators loses points for it. Held-out molecules of the
same cell know no labels; and where a model and a label disagree, another measurement of the cell decides.

Shape letters used in this module:
    C  cells      H  features of a measurement
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, gammaincc
from scipy.stats import kstest, nbinom, poisson
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from store.errors import InputRefused
from train.evaluation.cellfloor import Annotator, PrincipalComponents, Tells
from train.evaluation.embedding import FOUND
from train.evaluation.folds import Fold
from train.evaluation.score import REPLICATE, Value, Way
from train.evaluation.study import Study
from train.evaluation.suites import FEWEST_CELLS, deal_molecules, refuse_one_type, shuffled, units, with_both

AGNOSTIC: dict[str, Way] = {
    "nats per held-out molecule": "lower",
    "CRPS of held-out counts": "lower",
    "distance of the PIT from uniform": "lower",
    FOUND: "higher",
}
MOST_CELLS = MOST_FEATURES = 200
"""How counts scatter is judged on so many cells and features."""
BEYOND = 1e-6
"""Chance of counts that are not looked at."""
PSEUDO = 1e-6
Matrix = NDArray[np.float64]


class Shares(Protocol):
    """Anything that says of which features a cell's next molecules will be."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def fit(self, train: Study) -> Self:
        """Learn from cells."""

    def shares(self, cells: Study) -> Matrix:
        """Return share_CH of molecules; zeros are possible."""


@runtime_checkable
class Dispersed(Protocol):
    """Shares whose counts scatter more than a Poisson's."""

    def dispersion(self, cells: Study) -> Matrix | None:
        """Return the inverse dispersion r_H of a negative binomial, or None."""


class Marginal:
    """Every cell is the mean of all training cells."""

    name = "training mean"

    def __init__(self, measurement: str) -> None:
        """Say of what."""
        self.measurement = measurement

    def fit(self, train: Study) -> Self:
        """Sum up."""
        total_H = np.asarray(train.measured(self.measurement).sum(axis=0), dtype=np.float64).ravel()
        self.share_H = total_H / max(1.0, total_H.sum())
        return self

    def shares(self, cells: Study) -> Matrix:
        """Return the same for every cell."""
        return np.tile(self.share_H, (cells.n_cells, 1))


class Neighbours:
    """A cell is the pooled counts of the training cells that are nearest on principal components."""

    def __init__(self, measurement: str, neighbours: int = 30, seed: int = 0, name: str = "kNN on PCs") -> None:
        """Say how many are pooled."""
        self.name, self.measurement, self.neighbours = name, measurement, neighbours
        self.components = PrincipalComponents(measurement, components=20, seed=seed)

    def fit(self, train: Study) -> Self:
        """Remember the training cells."""
        self.counts_CH = train.measured(self.measurement)
        vectors_CK = self.components.fit(train).embed(train)
        self.index = NearestNeighbors(n_neighbors=min(self.neighbours, train.n_cells)).fit(vectors_CK)
        return self

    def shares(self, cells: Study) -> Matrix:
        """Return the pooled neighbours' shares."""
        near = self.index.kneighbors(self.components.embed(cells), return_distance=False)
        pooled_CH = np.stack([np.asarray(self.counts_CH[rows].sum(axis=0), dtype=np.float64).ravel() for rows in near])
        shares_CH: Matrix = pooled_CH / np.maximum(pooled_CH.sum(axis=1, keepdims=True), 1)
        return shares_CH


def shares_floor(measurement: str, seed: int = 0) -> list[Shares]:
    """Return the baselines of held-out molecules."""
    return [Marginal(measurement), Neighbours(measurement, seed=seed)]


def molecules_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Shares]],
    measurement: str = "RNA",
    seeds: Iterable[int] = range(3),
    unit: str = "donor_id",
) -> list[Value]:
    """Show one half of a held-out cell's molecules, ask for the other; the units are donors.

    The replicate pools neighbours that include one half of the held-out group's own cells: nothing shifts. Every share
    is mixed with a millionth of all features alike, so that no molecule is impossible. How a method's counts scatter is
    judged on the features with most counts: by the continuous ranked probability score, and by how far the randomised
    probability integral transform (Czado, Gneiting and Held 2009) is from uniform (Kolmogorov and Smirnov's distance).
    """
    values: list[Value] = []
    for seed in seeds:
        for fold in folds:
            rows = shuffled(np.flatnonzero(fold.test_C), seed)
            own, judged = rows[::2], study.take(rows[1::2])
            judged = judged.take(np.diff(judged.measured(measurement).indptr) > 1)
            if judged.n_cells < FEWEST_CELLS:
                continue
            fitted: dict[str, Shares] = {
                name: make(seed).fit(study.take(fold.train_C)) for name, make in methods.items()
            }
            both = study.take(np.concatenate([np.flatnonzero(fold.train_C), own]))
            fitted[REPLICATE] = Neighbours(measurement, seed=seed).fit(both)
            for where, group in units(judged, fold, unit):
                hidden, shown = deal_molecules(group, measurement, seed)
                hidden_CH = hidden.measured(measurement)
                truth_CH = hidden_CH[:MOST_CELLS].toarray().astype(np.float64)
                often = np.argsort(-np.asarray(hidden_CH.sum(axis=0)).ravel(), kind="stable")[:MOST_FEATURES]
                for name, method in fitted.items():
                    share_CH = method.shares(shown)
                    share_CH = (share_CH + PSEUDO / share_CH.shape[1]) / (1 + PSEUDO)
                    cost = -float(hidden_CH.multiply(np.log(share_CH)).sum()) / max(1.0, float(hidden_CH.sum()))
                    values.append(Value(name, "nats per held-out molecule", where, seed, cost))
                    r_H = method.dispersion(shown) if isinstance(method, Dispersed) else None
                    rate_CH = truth_CH.sum(axis=1, keepdims=True) * share_CH[:MOST_CELLS]
                    crps, distance = scatter(
                        truth_CH[:, often], rate_CH[:, often], None if r_H is None else r_H[often], seed
                    )
                    values.append(Value(name, "CRPS of held-out counts", where, seed, crps))
                    values.append(Value(name, "distance of the PIT from uniform", where, seed, distance))
    if not values:
        raise InputRefused(f"no held-out group has {2 * FEWEST_CELLS} cells of {measurement}")
    return values


def scatter(count_CH: Matrix, rate_CH: Matrix, r_H: Matrix | None, seed: int) -> tuple[float, float]:
    """Return the mean CRPS of counts, and how far their randomised PIT is from uniform.

    Args:
        count_CH: Whole counts.
        rate_CH: Expected counts.
        r_H: Inverse dispersion of negative binomials; None are Poisson.
        seed: Of the randomised PIT.
    """
    rate_CH = np.maximum(rate_CH, 1e-9)
    drawn = poisson(rate_CH) if r_H is None else nbinom(r_H, r_H / (r_H + rate_CH))
    below_CH, at_CH = drawn.cdf(count_CH - 1), drawn.cdf(count_CH)
    pit_CH = below_CH + np.random.default_rng([seed, 17]).random(count_CH.shape) * (at_CH - below_CH)
    most_H = np.maximum(count_CH.max(axis=0, initial=0), np.max(drawn.ppf(1 - BEYOND), axis=0, initial=0))
    crps_CH = np.zeros_like(count_CH)
    for count in range(int(most_H.max(initial=0)) + 1):
        at = np.flatnonzero(most_H >= count)  # what is left of the others is nothing
        rate_CA = rate_CH[:, at]
        if r_H is None:
            reached_CA = np.asarray(gammaincc(count + 1, rate_CA), np.float64)
        else:
            chance_CA = r_H[at] / (r_H[at] + rate_CA)
            reached_CA = np.asarray(betainc(r_H[at], count + 1, chance_CA), np.float64)
        crps_CH[:, at] += (reached_CA - (count_CH[:, at] <= count)) ** 2
    return float(crps_CH.mean()), float(kstest(pit_CH.ravel(), "uniform").statistic)


def adjudicate(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Tells]],
    judge: str,
    measurement: str = "RNA",
    column: str = "cell_type",
    seeds: Iterable[int] = range(3),
) -> list[Value]:
    """Where a method and the label disagree of a held-out cell, ask another measurement which of the two it is.

    The judge is a logistic regression on the other measurement's principal components, fitted on training cells. It
    sides with neither where it takes the cell for a third type. Beside the shares stands how often it would side with
    the method if its answers were dealt at random to the disputed cells.

    Args:
        study: The cells.
        folds: What is held out.
        methods: Name to what makes a classifier of ``measurement`` of a seed.
        judge: The other measurement.
        measurement: What the methods look at.
        column: The label.
        seeds: Of methods.
    """
    values: list[Value] = []
    for seed in seeds:
        for fold in folds:
            train = with_both(study.take(fold.train_C), measurement, judge)
            test = with_both(study.take(fold.test_C), measurement, judge)
            if min(train.n_cells, test.n_cells) < FEWEST_CELLS:
                continue
            refuse_one_type(train, fold, column)
            components = PrincipalComponents(judge, components=20, seed=seed)
            said = Annotator("", components, LogisticRegression(max_iter=2000), column).fit(train).predict(test)
            label = test.label(column).astype(str)
            for name, make in methods.items():
                method = make(seed).fit(train)
                told = method.types[method.predict_proba(test).argmax(axis=1)]
                found = _disputed(told, label, said, np.random.default_rng([seed, 11]))
                values += [Value(name, metric, fold.name, seed, value) for metric, value in found.items()]
    return values


def _disputed(
    told: NDArray[np.str_], label: NDArray[np.str_], said: NDArray[np.str_], random: np.random.Generator
) -> dict[str, float]:
    disputed = told != label
    if not disputed.any():
        return {"disputed cells": 0.0}
    told, label, said = told[disputed], label[disputed], said[disputed]
    by_chance = np.mean([(random.permutation(said) == told).mean() for _ in range(200)])
    return {
        "disputed cells": float(disputed.mean()),
        "of these, the judge agrees with the method": float((said == told).mean()),
        "of these, the judge agrees with the label": float((said == label).mean()),
        "of these, the method's share by chance": float(by_chance),
    }
