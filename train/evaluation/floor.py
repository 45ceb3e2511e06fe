"""This module is the floor: predictors of effects that a model must beat, behind the model's own fit and predict.

Written afresh after their papers; all learn from mean profiles of training cells only. In this field they still decide
(Ahlmann-Eltze, Huber and Anders 2025).

Shape letters used in this module:
    E  effects      G  features      K  components or neighbours      P  pathways      T  targets
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags_array
from sklearn.decomposition import PCA, TruncatedSVD

from train.evaluation.effects import Effects, effects
from train.evaluation.study import Study

Vector = NDArray[np.float64]


class Baseline:
    """What all baselines share: effects of the training cells."""

    name = ""

    def __init__(self, measurement: str, columns: Sequence[str] = ("cell_type",)) -> None:
        """Say what is predicted: a measurement, and the columns that make a context."""
        self.measurement, self.columns = measurement, tuple(columns)

    def fit(self, train: Study) -> Self:
        """Learn from these cells."""
        return self.learn(effects(train, self.measurement, self.columns))

    def learn(self, train: Effects) -> Self:
        """Learn from effects that somebody has summed up."""
        self.train = train
        return self

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return delta_G."""
        raise NotImplementedError

    def lines(self, target: str, context: str) -> NDArray[np.int64]:
        """Return the training effects of a perturbation: in this context, else elsewhere."""
        own_E = np.array([one == target for one in self.train.perturbation])
        here_E = own_E & np.array([at == context for at in self.train.context])
        return np.flatnonzero(here_E if here_E.any() else own_E)

    @property
    def training_mean(self) -> Vector:
        """The mean delta_G over all training effects: one mean for every question, never a leave-one-out mean."""
        mean_G: Vector = self.train.delta_EG.mean(axis=0)
        return mean_G

    def single(self, target: str, context: str) -> Vector | None:
        """Return what a training perturbation does: in this context, else on average elsewhere; None where unknown."""
        lines = self.lines(target, context)
        return self.train.delta_EG[lines].mean(axis=0) if len(lines) else None


class ControlPasted(Baseline):
    """Nothing happens."""

    name = "control"

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return zeros."""
        return np.zeros(len(self.train.features))


class TrainingMean(Baseline):
    """Every perturbation does what the training perturbations do on average."""

    name = "training mean"

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return the same for every question."""
        return self.training_mean


class ContextMean(Baseline):
    """Every perturbation does what the training perturbations do on average in the same context."""

    name = "context mean"

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return the context's mean; of a context without training effects, the mean of all."""
        here_E = np.array([at == context for at in self.train.context])
        return self.train.delta_EG[here_E].mean(axis=0) if here_E.any() else self.training_mean


class SameElsewhere(Baseline):
    """A perturbation does what it does in other contexts; one never seen does what they do on average."""

    name = "same elsewhere"

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return the perturbation's own mean."""
        known = self.single(perturbation, context)
        return self.training_mean if known is None else known


class Additive(Baseline):
    """A combination does the sum of what its targets do alone."""

    name = "additive"

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return the sum over targets; a target that was never hit alone adds the training mean."""
        parts = [self.single(target, context) for target in perturbation.split("+")]
        summed: Vector = np.sum([self.training_mean if part is None else part for part in parts], axis=0)
        return summed


class Shrunken(Baseline):
    """Means that are trusted as far as their noise allows (James and Stein 1961, the positive part).

    The mean over training effects is drawn towards nothing, the more the less they have in common beyond the noise of
    the controls that they share. What a known target does is drawn towards that mean by how much of its distance is
    noise, between its cells or of controls; of a combination, what sets its targets apart from the mean is added up. A
    target that was never hit adds nothing.
    """

    name = "shrunken mean"
    keeps_mean = False

    def learn(self, train: Effects) -> Self:
        """Shrink the mean."""
        super().learn(train)
        delta_EG, mean_G = self.train.delta_EG, self.training_mean
        _, self.context_E = np.unique(self.train.context, return_inverse=True)
        n, (weight_E, shared) = len(delta_EG), self._weights(np.arange(len(delta_EG)))
        if n > 1:
            apart = float(((delta_EG - mean_G) ** 2).mean(axis=1).sum()) / (n - 1)
            of_controls = (float(self.train.control_noise_E.mean()) - shared) * n / (n - 1)  # of several contexts'
            noise = max(0.0, apart - of_controls) / n + shared
        else:
            noise = float(self.train.noise_E[0]) + shared
        kept = 1.0 if self.keeps_mean else _kept(mean_G, noise)
        self.mean_G, self.weight_E = kept * mean_G, kept * weight_E
        return self

    def _weights(self, lines: NDArray[np.int64]) -> tuple[Vector, float]:
        """Return weight_E of each effect's controls in a mean of some effects, and the variance that they give it."""
        share = np.bincount(self.context_E[lines], minlength=self.context_E.max() + 1) / len(lines)
        weight_E: Vector = share[self.context_E]
        return weight_E, float((weight_E * self.train.control_noise_E)[lines].mean())

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return the shrunken mean, and what is known to set the targets apart from it."""
        total_G = self.mean_G.copy()
        for target in perturbation.split("+"):
            lines = self.lines(target, context)
            if len(lines):
                beyond_G = self.train.delta_EG[lines].mean(axis=0) - self.mean_G
                total_G += _kept(beyond_G, self._noise(lines)) * beyond_G
        return total_G

    def _noise(self, lines: NDArray[np.int64]) -> float:
        """Return how much of what sets some effects apart from the mean is noise.

        So far as the mean has the noise of the same controls in it, it is no part of what sets them apart.
        """
        weight_E, _ = self._weights(lines)
        of_controls = ((weight_E - self.weight_E) * self.train.control_noise_E)[lines].mean()
        return max(0.0, float(self.train.noise_E[lines].mean()) / len(lines) + float(of_controls))


class ShrunkenAdditive(Shrunken):
    """The training mean, and what is known to set a perturbation's targets apart from it, as the shrunken mean has it.

    Beside the controls that the mean was measured beside, whose error it holds, it is right not to shrink it.
    """

    name = "shrunken additive"
    keeps_mean = True


def _kept(estimate_G: Vector, noise: float) -> float:
    """Return the share of an estimate that is not noise: 1 - its sampling variance over its mean square, 0 at least."""
    return max(0.0, 1.0 - noise / max(float((estimate_G**2).mean()), 1e-12))


class BilinearRidge(Baseline):
    """Y ≈ G W Pᵀ + b: effects as a bilinear form of features' and targets' vectors, by ridge regression.

    Features' vectors are principal components of the training profiles; a target's vector is its own gene's, or what a
    file of knowledge says of it (after the linear model of Ahlmann-Eltze, Huber and Anders 2025).
    """

    name = "bilinear ridge"

    def __init__(
        self,
        measurement: str,
        columns: Sequence[str] = ("cell_type",),
        components: int = 10,
        penalty: float = 0.1,
        vectors: Mapping[str, Vector] | None = None,
        name: str = "bilinear ridge",
    ) -> None:
        """Say how.

        Args:
            measurement: What is predicted.
            columns: What makes a context.
            components: K of the features' vectors.
            penalty: Ridge penalty of both sides.
            vectors: Target to a vector; left out, a target has its gene's components, where the gene is measured.
            name: What it is called in tables.
        """
        super().__init__(measurement, columns)
        self.name = name
        self.components, self.penalty, self.given = components, penalty, vectors

    def learn(self, train: Effects) -> Self:
        """Solve for W."""
        super().learn(train)
        delta_EG = self.train.delta_EG
        self.offset_G = self.training_mean
        profiles_EG = np.concatenate([self.train.treated_EG, np.unique(self.train.control_EG, axis=0)])
        n_components = max(1, min(self.components, len(profiles_EG) - 1, profiles_EG.shape[1]))
        found = PCA(n_components, svd_solver="full", random_state=0).fit(profiles_EG)
        self.feature_GK = found.components_.T * np.sqrt(found.explained_variance_)
        own = {name: self.feature_GK[place] for name, place in self.train.places.items()}
        self.vectors = dict(self.given) if self.given is not None else own
        known = [number for number, name in enumerate(self.train.perturbation) if self._vector(name) is not None]
        self.weight: Vector | None = None
        if known:
            target_EK = np.stack(
                [v for number in known if (v := self._vector(self.train.perturbation[number])) is not None]
            )
            residual_GE = (delta_EG[known] - self.offset_G).T
            left = self.feature_GK.T @ self.feature_GK + self.penalty * np.eye(self.feature_GK.shape[1])
            right = target_EK.T @ target_EK + self.penalty * np.eye(target_EK.shape[1])
            middle = self.feature_GK.T @ residual_GE @ target_EK
            self.weight = np.linalg.solve(left, middle) @ np.linalg.inv(right)
        return self

    def _vector(self, perturbation: str) -> Vector | None:
        parts = [self.vectors[target] for target in perturbation.split("+") if target in self.vectors]
        return np.sum(parts, axis=0) if parts else None

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return G W p + b; b alone for a target without a vector."""
        vector = self._vector(perturbation)
        if vector is None or self.weight is None:
            return self.offset_G
        predicted: Vector = self.feature_GK @ self.weight @ vector + self.offset_G
        return predicted


class KnowledgeNeighbours(Baseline):
    """A target does what the K training targets do that share most sets with it, weighted by how many they share."""

    name = "kNN on knowledge"

    def __init__(
        self,
        measurement: str,
        members: Mapping[str, Sequence[str]],
        columns: Sequence[str] = ("cell_type",),
        neighbours: int = 5,
    ) -> None:
        """Say how.

        Args:
            measurement: What is predicted.
            members: Set (a pathway, a process) to its members.
            columns: What makes a context.
            neighbours: K.
        """
        super().__init__(measurement, columns)
        self.neighbours = neighbours
        self.sets: dict[str, set[str]] = {}
        for name, inside in members.items():
            for member in inside:
                self.sets.setdefault(member, set()).add(name)

    def _likeness(self, one: str, other: str) -> float:
        first, second = self.sets.get(one, set()), self.sets.get(other, set())
        return len(first & second) / np.sqrt(len(first) * len(second)) if first and second else 0.0

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return the weighted mean of the neighbours, summed over targets; the training mean where there is none."""
        singles = sorted({name for name in self.train.perturbation if "+" not in name})
        total = np.zeros(len(self.train.features))
        for target in perturbation.split("+"):
            likeness = {name: self._likeness(target, name) for name in singles}
            nearest = sorted(singles, key=lambda name: -likeness[name])[: self.neighbours]
            weights = np.array([likeness[name] for name in nearest])
            if not weights.sum():
                total += self.training_mean
                continue
            parts = [self.training_mean if (v := self.single(name, context)) is None else v for name in nearest]
            total += np.average(parts, axis=0, weights=weights)
        return total


def effect_floor(
    measurement: str, columns: Sequence[str] = ("cell_type",), members: Mapping[str, Sequence[str]] | None = None
) -> list[Baseline]:
    """Return every baseline of effects, the most trusted first; those that need knowledge where there is some."""
    plain: list[Baseline] = [
        kind(measurement, columns)
        for kind in (Shrunken, ShrunkenAdditive, TrainingMean, ContextMean, SameElsewhere, Additive, BilinearRidge)
    ]
    nothing = ControlPasted(measurement, columns)
    if not members:
        return [*plain, nothing]
    ridge = BilinearRidge(measurement, columns, vectors=set_vectors(members), name="bilinear ridge on knowledge")
    return [*plain, KnowledgeNeighbours(measurement, members, columns), ridge, nothing]


def set_vectors(members: Mapping[str, Sequence[str]], components: int = 16) -> dict[str, Vector]:
    """Return a vector for each member of a set, from the sets that it is in: alike where the sets are.

    Args:
        members: Set to its members.
        components: Dimensions at most, by singular values; members of many sets are not longer for it.
    """
    names = sorted({member for inside in members.values() for member in inside})
    place = {name: number for number, name in enumerate(names)}
    rows = [place[name] for inside in members.values() for name in inside]
    columns = np.repeat(np.arange(len(members)), [len(inside) for inside in members.values()])
    table = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(members)))
    table.data[:] = 1  # named twice is a member once
    table = csr_matrix(diags_array(1 / np.sqrt(np.asarray(table.sum(axis=1)).ravel())) @ table)
    if min(table.shape) <= components:
        return dict(zip(names, table.toarray(), strict=True))
    return dict(zip(names, TruncatedSVD(components, random_state=0).fit_transform(table), strict=True))
