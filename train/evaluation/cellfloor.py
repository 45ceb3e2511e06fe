"""This module is the floor of tasks on single cells: embedding, annotation, translation, forecasting.

Everything that is chosen or scaled (variable features, components, neighbours) is fitted on training cells only.

Shape letters used in this module:
    C  cells      G  features      H  features of the measurement that is predicted      K  components      Y  types
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import ot
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from store.errors import InputRefused, UsageError
from train.evaluation.study import Study

Matrix = NDArray[np.float64]


class Embedder(Protocol):
    """Anything that learns to write cells as vectors."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def fit(self, train: Study) -> Self:
        """Learn from cells."""

    def embed(self, cells: Study) -> Matrix:
        """Return embedding_CK."""


class VariableFeatures:
    """The log shares of the most variable features: an embedding that nobody learned."""

    name = "HVG"

    def __init__(self, measurement: str, n_features: int = 2000) -> None:
        """Say how many features stay."""
        self.measurement, self.n_features = measurement, n_features

    def fit(self, train: Study) -> Self:
        """Choose the features with the largest dispersion (variance over mean) of log shares in training cells."""
        logs_CG = train.logs(self.measurement)
        mean_G = np.asarray(logs_CG.mean(axis=0)).ravel()
        square_G = np.asarray(logs_CG.multiply(logs_CG).mean(axis=0)).ravel()
        dispersion_G = (square_G - mean_G**2) / np.maximum(mean_G, 1e-3)
        self.chosen = np.sort(np.argsort(-dispersion_G, kind="stable")[: self.n_features])
        return self

    def embed(self, cells: Study) -> Matrix:
        """Return the chosen features' log shares."""
        return np.asarray(cells.logs(self.measurement)[:, self.chosen].todense(), dtype=np.float64)


class PrincipalComponents:
    """Principal components of the most variable features: the embedding to beat."""

    name = "HVG + PCA"

    def __init__(self, measurement: str, n_features: int = 2000, components: int = 50, seed: int = 0) -> None:
        """Say how many features and components."""
        self.features = VariableFeatures(measurement, n_features)
        self.components, self.seed = components, seed

    def fit(self, train: Study) -> Self:
        """Fit features and components on training cells."""
        values_CG = self.features.fit(train).embed(train)
        self.pca = PCA(max(1, min(self.components, min(values_CG.shape) - 1)), random_state=self.seed).fit(values_CG)
        return self

    def embed(self, cells: Study) -> Matrix:
        """Return components_CK."""
        embedded: Matrix = self.pca.transform(self.features.embed(cells))
        return embedded


# ------------------------------------------------------------------------------------------------------ annotation
class Annotator:
    """A classifier of cells on an embedding: what every annotation baseline, and a probe of the model, is."""

    def __init__(self, name: str, embedder: Embedder | None, classifier: Any, column: str = "cell_type") -> None:
        """Say how.

        Args:
            name: What it is called in tables.
            embedder: Writes cells as vectors; None: nothing of the cell is looked at.
            classifier: An estimator of scikit-learn with ``predict_proba``.
            column: The obs column that is told.
        """
        self.name, self.embedder, self.classifier, self.column = name, embedder, classifier, column

    def fit(self, train: Study) -> Self:
        """Learn from cells and their labels."""
        if self.embedder is not None:
            self.embedder.fit(train)
        self.classifier.fit(self._vectors(train), train.label(self.column).astype(str))
        self.types: NDArray[np.str_] = self.classifier.classes_
        return self

    def predict_proba(self, cells: Study) -> Matrix:
        """Return probability_CY, in the order of ``types``."""
        probability: Matrix = self.classifier.predict_proba(self._vectors(cells))
        return probability

    def predict(self, cells: Study) -> NDArray[np.str_]:
        """Return each cell's most probable type."""
        return self.types[self.predict_proba(cells).argmax(axis=1)]

    def _vectors(self, cells: Study) -> Matrix:
        return np.zeros((cells.n_cells, 1)) if self.embedder is None else self.embedder.embed(cells)


class Ensemble:
    """Several classifiers of the same cells, their probabilities averaged: where they disagree, it is less sure."""

    def __init__(self, name: str, members: Sequence[Annotator]) -> None:
        """Take the members; they tell the same column.

        Args:
            name: What it is called in tables.
            members: At least one.
        """
        self.name, self.members, self.column = name, list(members), members[0].column

    def fit(self, train: Study) -> Self:
        """Fit each member."""
        for member in self.members:
            member.fit(train)
        self.types = self.members[0].types
        return self

    def predict_proba(self, cells: Study) -> Matrix:
        """Return the mean probability_CY, in the order of ``types``."""
        probability: Matrix = np.mean([member.predict_proba(cells) for member in self.members], axis=0)
        return probability


class Tells(Protocol):
    """Anything that tells types with probabilities: an annotator or an ensemble of them."""

    types: NDArray[np.str_]

    @property
    def name(self) -> str:
        """What it is called in tables."""

    @property
    def column(self) -> str:
        """The obs column that is told."""

    def fit(self, train: Study) -> Self:
        """Learn from cells and their labels."""

    def predict_proba(self, cells: Study) -> Matrix:
        """Return probability_CY, in the order of ``types``."""


def annotation_floor(measurement: str, column: str = "cell_type", seed: int = 0) -> list[Annotator]:
    """Return the annotation baselines."""

    def components() -> PrincipalComponents:
        return PrincipalComponents(measurement, seed=seed)

    logistic = LogisticRegression(max_iter=2000, C=1.0, random_state=seed)
    return [
        Annotator("most frequent", None, LogisticRegression(max_iter=200), column),
        Annotator("logistic regression on PCs", components(), logistic, column),
        Annotator("kNN on PCs", components(), KNeighborsClassifier(15, weights="distance"), column),
    ]


# ----------------------------------------------------------------------------------------------------- translation
class Translator:
    """Predicts the log shares of one measurement from another."""

    name = "mean"

    def __init__(self, source: str, target: str) -> None:
        """Say from which measurement to which."""
        self.source, self.target = source, target

    def fit(self, train: Study) -> Self:
        """Remember the mean profile."""
        self.mean_H = np.asarray(train.logs(self.target).mean(axis=0), dtype=np.float64).ravel()
        return self

    def predict(self, cells: Study) -> Matrix:
        """Return expected log shares_CH; only the source's counts (and, where said, labels) are looked at."""
        return np.tile(self.mean_H, (cells.n_cells, 1))


class TypeMean(Translator):
    """Every cell is the mean of its type: strong, since it is told the type."""

    name = "type mean"

    def __init__(self, source: str, target: str, column: str = "cell_type") -> None:
        """Say from which measurement to which, and which column is the type."""
        super().__init__(source, target)
        self.column = column

    def fit(self, train: Study) -> Self:
        """Average each type."""
        super().fit(train)
        logs_CH, label_C = train.logs(self.target), train.label(self.column)
        self.by_type = {name: np.asarray(logs_CH[label_C == name].mean(axis=0)).ravel() for name in set(label_C)}
        return self

    def predict(self, cells: Study) -> Matrix:
        """Return each cell's type's mean; the mean of all for a type never seen."""
        return np.stack([self.by_type.get(name, self.mean_H) for name in cells.label(self.column)])


class OnComponents(Translator):
    """A regression of scikit-learn from the source's principal components."""

    def __init__(self, name: str, source: str, target: str, regression: Any, seed: int = 0) -> None:
        """Say how: ``regression`` has fit and predict."""
        super().__init__(source, target)
        self.name, self.regression = name, regression
        self.components = PrincipalComponents(source, seed=seed)

    def fit(self, train: Study) -> Self:
        """Fit components and regression."""
        super().fit(train)
        vectors_CK = self.components.fit(train).embed(train)
        self.regression.fit(vectors_CK, np.asarray(train.logs(self.target).todense(), dtype=np.float64))
        return self

    def predict(self, cells: Study) -> Matrix:
        """Return the regression's answer."""
        predicted: Matrix = self.regression.predict(self.components.embed(cells))
        return predicted.reshape(cells.n_cells, -1)


def translation_floor(source: str, target: str, column: str = "cell_type", seed: int = 0) -> list[Translator]:
    """Return the translation baselines; that of types only where ``column`` is given."""
    plain = [
        Translator(source, target),
        OnComponents("ridge on PCs", source, target, Ridge(alpha=10.0), seed),
        OnComponents("kNN on PCs", source, target, KNeighborsRegressor(15, weights="distance"), seed),
    ]
    return [*plain, TypeMean(source, target, column)] if column else plain


# ----------------------------------------------------------------------------------------------------- forecasting
class Forecaster:
    """Predicts the cells of a time that was not seen, as a sample of log shares.

    ``way`` is one of: ``earlier`` and ``later`` copy the nearest time on that side (the nearest on the other side where
    there is none); ``union`` is both; ``transport`` moves cells of the earlier time along an optimal transport plan
    towards the later one, as far as the time asked for lies between them.
    """

    WAYS: ClassVar = {
        "earlier": "copy of the time before",
        "later": "copy of the time after",
        "union": "both times",
        "transport": "OT midpoint",
    }

    def __init__(self, measurement: str, way: str, components: int = 20, most_cells: int = 2000, seed: int = 0) -> None:
        """Say how.

        Args:
            measurement: What is predicted.
            way: One of ``WAYS``.
            components: K in which transport is solved.
            most_cells: Cells of a time that transport looks at, drawn at random.
            seed: Decides which.
        """
        if way not in self.WAYS:
            raise InputRefused(f"way={way!r}: one of {', '.join(self.WAYS)}")
        self.name, self.measurement, self.way = self.WAYS[way], measurement, way
        self.components, self.most_cells, self.seed = components, most_cells, seed

    def fit(self, train: Study) -> Self:
        """Remember each time's cells.

        Raises:
            InputRefused: No cell has a time.
        """
        time_C = train.obs["time"].to_numpy(dtype=np.float64)
        if np.isnan(time_C).all():
            raise InputRefused("no training cell has a time")
        logs_CG = train.logs(self.measurement)
        self.logs = {float(time): logs_CG[time_C == time] for time in np.unique(time_C[~np.isnan(time_C)])}
        if self.way == "transport":
            self.pca = PrincipalComponents(self.measurement, components=self.components, seed=self.seed).fit(train)
        return self

    def _sides(self, time: float) -> tuple[float, float]:
        if not self.logs.keys() - {time}:
            raise UsageError(
                f"{time:g} is the only time of the training cells: a forecast is from one time to another; take cells "
                "of several times, and hold out one of them (by=time)"
            )
        before = [known for known in self.logs if known < time]
        after = [known for known in self.logs if known > time]
        return (max(before) if before else min(after)), (min(after) if after else max(before))

    def predict(self, time: float) -> csr_matrix:
        """Return a sample of cells at a time, log shares_CG.

        Raises:
            UsageError: No training cell has another time.
        """
        before, after = self._sides(time)
        if self.way == "earlier":
            return self.logs[before]
        if self.way == "later":
            return self.logs[after]
        if self.way == "union" or before == after:
            return csr_matrix(vstack([self.logs[side] for side in dict.fromkeys((before, after))]))
        return self._transported(before, after, (time - before) / (after - before))

    def _transported(self, before: float, after: float, how_far: float) -> csr_matrix:
        """Move each pair of an exact transport plan in the components' space (McCann 1997), as far as is asked."""
        random = np.random.default_rng([self.seed, 1])
        sides = [self._sample(self.logs[side], random) for side in (before, after)]
        chosen = self.pca.features.chosen
        vectors = [self.pca.pca.transform(side[:, chosen]) for side in sides]
        weights = [np.full(len(side), 1 / len(side)) for side in sides]
        plan = ot.emd(*weights, ot.dist(*vectors), numItermax=2_000_000)
        one, other = np.nonzero(plan)
        pairs = random.choice(len(one), size=self.most_cells, p=plan[one, other] / plan.sum())
        return csr_matrix((1 - how_far) * sides[0][one[pairs]] + how_far * sides[1][other[pairs]])

    def _sample(self, logs_CG: csr_matrix, random: np.random.Generator) -> Matrix:
        rows = np.arange(logs_CG.shape[0])
        if len(rows) > self.most_cells:
            rows = np.sort(random.choice(rows, self.most_cells, replace=False))
        return np.asarray(logs_CG[rows].todense(), dtype=np.float64)


def forecast_floor(measurement: str, seed: int = 0, most_cells: int = 2000) -> list[Forecaster]:
    """Return the forecasting baselines; transport looks at ``most_cells`` of a time."""
    return [Forecaster(measurement, way, most_cells=most_cells, seed=seed) for way in Forecaster.WAYS]
