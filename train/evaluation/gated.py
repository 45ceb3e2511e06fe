"""This module is the transition head over a baseline: the best baseline plus g times what a learned flow adds.

g is zero until cross-fitting over held-out groups of the training cells shows a gain that chance gives once in 200
times (Student's t: the fewer groups, the more standard errors it takes); with g at zero the answer is the baseline's,
bit for bit. Everything that is chosen here (the baseline, g, the width of intervals) is chosen on training cells only,
each of which is predicted by baselines and flows that did not see its group; the latent space is that of all of them.

Shape letters used in this module:
    C  cells      E  effects      G  features      J  folds of training groups      K  latent dimensions
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from store.errors import InputRefused
from train.evaluation.cellfloor import PrincipalComponents
from train.evaluation.conformal import group_quantile
from train.evaluation.effects import Effects, contexts, effects
from train.evaluation.floor import effect_floor, set_vectors
from train.evaluation.flow import Flow, FlowSettings, Passage, fit_flow
from train.evaluation.folds import UNPERTURBED, drawn_place
from train.evaluation.score import ERRORS, standard_errors
from train.evaluation.study import Study
from train.evaluation.suites import shuffled

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
HEAD = "transition"
FOLDS = 5
CHANCE = 0.005
MOST_CELLS = 256
COMPONENTS = 19
"""Dimensions in which flows move cells: so many had the heads that ``docs/benchmarks/model.md`` tells of."""


class EffectBaseline(Protocol):
    """What the head can stand on: it learns from effects alone."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def learn(self, train: Effects) -> Self:
        """Learn from effects."""

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return delta_G."""


@dataclass(frozen=True)
class Gate:
    """What cross-fitting found.

    Attributes:
        baseline: The baseline that was chosen by its error on held-out groups.
        g: The weight of what the flow adds; 0 is shut.
        gain: How many standard errors over groups the flow lowers the error.
        errors: Baseline to its mean squared error on held-out groups.
    """

    baseline: str
    g: float
    gain: float
    errors: dict[str, float]


class TargetVectors:
    """What is known of a target before it is ever hit: its gene's loadings, the sets that it is in, vectors of files.

    A combination is the sum of its targets, if each of them is known: half of a combination is another one.
    """

    def __init__(
        self,
        members: Mapping[str, Sequence[str]] | None = None,
        given: Mapping[str, Vector] | None = None,
    ) -> None:
        """Say what is known.

        Args:
            members: Set to its members.
            given: Target to a vector, such as a checkpoint's identity of the gene or a sequence model's.
        """
        self.given = dict(given or {})
        self.loadings: dict[str, Vector] = {}
        self.by_sets = set_vectors(members) if members else {}

    def beside(self, places: Mapping[str, int], loading_GK: Matrix) -> TargetVectors:
        """Return the same with the loadings of features, by all their names, learned from training cells."""
        size = np.linalg.norm(loading_GK, axis=1).max()
        known = copy.copy(self)
        known.loadings = {name: loading_GK[place] / max(size, 1e-9) for name, place in places.items()}
        return known

    def __getitem__(self, perturbation: str) -> Vector:
        """Return the vector of a target or a combination; zeros where nobody knows it, or one of its targets."""
        vectors = [self._of(target) for target in perturbation.split("+")]
        total = np.sum(vectors, axis=0)
        return total if all(vector.any() for vector in vectors) else np.zeros_like(total)

    def _of(self, target: str) -> Vector:
        return np.concatenate(
            [
                known.get(target, np.zeros(len(next(iter(known.values()), ()))))
                for known in (self.loadings, self.by_sets, self.given)
            ]
        )


class GatedEffects:
    """Effects of perturbations: the best baseline plus g times the flow, with intervals."""

    name = HEAD

    def __init__(
        self,
        measurement: str,
        columns: Sequence[str] = ("cell_type",),
        by: str = "target",
        targets: TargetVectors | None = None,
        candidates: Sequence[EffectBaseline] | None = None,
        settings: FlowSettings | None = None,
        seed: int = 0,
        found: Callable[[Gate], object] | None = None,
    ) -> None:
        """Say how.

        Args:
            measurement: What is predicted.
            columns: What makes a context.
            by: What will be held out, and so is held out to choose: "target", "perturbation" or a context's column.
            targets: What is known of targets.
            candidates: Baselines to stand on; the floor's when left out.
            settings: How the flow learns.
            seed: Of folds and flows.
            found: Is told what each fit found.
        """
        self.measurement, self.columns, self.by, self.found = measurement, tuple(columns), by, found
        self.targets = targets or TargetVectors()
        self.candidates = list(candidates if candidates is not None else effect_floor(measurement, columns))
        self.settings, self.seed = settings or FlowSettings(), seed

    def fit(self, train: Study) -> Self:
        """Choose the baseline, teach the flows, and find g, all by held-out groups of these cells.

        Raises:
            InputRefused: No perturbation has enough cells, there are fewer than two groups to hold out in turn, or one
                group is in every effect.
        """
        self.table = effects(train, self.measurement, self.columns)
        group_E = self.table.groups(self.by, self.columns)
        self.label_E = np.array(["+".join(sorted(group)) for group in group_E])
        self.fold_EJ = _deal(group_E, self.seed)
        self._look_at(train)
        told = self._choose()
        added_EG = np.zeros_like(told)
        lessons = [self._lessons(fold) for fold in range(self.fold_EJ.shape[1])]
        if all(lessons):  # else nothing is left to learn from without two folds, as where there are but two
            self.flows = [self._teach(fold, lesson) for fold, lesson in enumerate(lessons)]
            for line in range(self.table.n_effects):
                added_EG[line] = self._added([self.flows[self._fold(line)]], line, told[line])
            self._open(told, added_EG)
        self._widen(told + self.gate.g * added_EG)
        self.baseline.learn(self.table)
        if self.found is not None:
            self.found(self.gate)
        return self

    def _look_at(self, train: Study) -> None:
        """Learn the latent space, and keep the cells of each effect and context in it."""
        self.space = Space(self.measurement, self.seed).fit(train)
        self.known = self.targets.beside(self.table.places, self.space.loading_GK)
        perturbation_C, context_C = train.label("perturbation"), contexts(train, self.columns)
        latent_CK = self.space.embed(train)
        unperturbed_C = np.isin(perturbation_C, UNPERTURBED)
        plain = {where: np.flatnonzero(unperturbed_C & (context_C == where)) for where in set(self.table.context)}
        self.control = {where: latent_CK[rows] for where, rows in plain.items()}
        hit = [
            (perturbation_C == name) & (context_C == where)
            for name, where in zip(self.table.perturbation, self.table.context, strict=True)
        ]
        self.treated = [latent_CK[rows] for rows in hit]
        logs_CG = train.logs(self.measurement)
        plain_G = {where: np.asarray(logs_CG[rows].mean(axis=0)).ravel() for where, rows in plain.items()}
        moved_EG = np.stack(
            [
                np.asarray(logs_CG[rows].mean(axis=0)).ravel() - plain_G[where]
                for rows, where in zip(hit, self.table.context, strict=True)
            ]
        )
        self.space.learn_factors(moved_EG, self.table.delta_EG)
        self.plain = {
            where: train.take(np.sort(shuffled(rows, self.seed)[:MOST_CELLS])) for where, rows in plain.items()
        }

    def _fold(self, line: int) -> int:
        return int(np.argmax(self.fold_EJ[line]))

    def _answers(self, baseline: EffectBaseline, without: list[int], lines: Sequence[int]) -> dict[int, Vector]:
        """Return what a baseline that did not see some folds says of some effects."""
        seen_E: NDArray[np.bool_] = ~np.any(self.fold_EJ[:, without], axis=1)
        baseline.learn(self.table.take(seen_E))
        names, where = self.table.perturbation, self.table.context
        return {line: baseline.predict(self.plain[where[line]], names[line], where[line]) for line in lines}

    def _lines(self, fold: int) -> list[int]:
        return [line for line in range(self.table.n_effects) if self._fold(line) == fold]

    def _choose(self) -> Matrix:
        """Choose a baseline by its error on held-out groups; return what it says of them, delta_EG.

        It is the first of the candidates that is no worse than the best by two standard errors over groups: where they
        can hardly be told apart, the one that is trusted more.
        """
        errors_E, answers = {}, {}
        for number, baseline in enumerate(self.candidates):
            found: dict[int, Vector] = {}
            for fold in range(self.fold_EJ.shape[1]):
                found |= self._answers(baseline, [fold], self._lines(fold))
            answers[number] = np.stack([found[line] for line in range(self.table.n_effects)])
            errors_E[number] = ((answers[number] - self.table.delta_EG) ** 2).mean(axis=1)
        errors = {number: float(error_E.mean()) for number, error_E in errors_E.items()}
        best = min(errors, key=lambda number: errors[number])
        behind = (standard_errors(self._by_group(errors_E[number] - errors_E[best])) for number in errors)
        chosen = next(number for number, se in enumerate(behind) if se <= ERRORS or number == best)
        self.baseline = self.candidates[chosen]
        self.gate = Gate(
            self.baseline.name, 0.0, 0.0, {self.candidates[number].name: error for number, error in errors.items()}
        )
        return answers[chosen]

    def _by_group(self, value_E: Vector) -> Vector:
        """Return the mean of each group that is held out whole."""
        return np.array([value_E[self.label_E == label].mean() for label in sorted(set(self.label_E))])

    def _lessons(self, fold: int) -> dict[int, list[int]]:
        """Return the effects to teach a flow without one fold, by their own fold: a baseline can do without both."""
        found = {}
        for other in range(self.fold_EJ.shape[1]):
            lines = [line for line in self._lines(other) if not self.fold_EJ[line, fold]]
            if lines and not self.fold_EJ[:, [fold, other]].any(axis=1).all():
                found[other] = lines
        return found

    def _teach(self, fold: int, lessons: Mapping[int, list[int]]) -> Flow:
        """Teach a flow without one fold: each effect starts where the baseline leaves it that saw neither its fold."""
        told: dict[int, Vector] = {}
        for other, lines in lessons.items():
            told |= self._answers(self.baseline, [fold, other], lines)
        passages = [
            Passage(
                self.control[self.table.context[line]] + self.space.into(delta_G),
                self.treated[line],
                self.known[self.table.perturbation[line]],
                np.zeros(0),
            )
            for line, delta_G in sorted(told.items())
        ]
        return fit_flow(passages, self.settings, self.seed * FOLDS + fold)

    def _added(self, flows: Sequence[Flow], line: int, delta_G: Vector) -> Vector:
        start_CK = spread(self.control[self.table.context[line]])
        return self._shift(flows, start_CK, delta_G, self.table.perturbation[line]).mean(axis=0)

    def _shift(self, flows: Sequence[Flow], start_CK: Matrix, delta_G: Vector, perturbation: str) -> Matrix:
        """Return what each flow adds to a baseline's answer, [flows, G]."""
        start_CK = start_CK + self.space.into(delta_G)
        condition_P = self.known[perturbation]
        shifts = [flow.move(start_CK, condition_P, np.zeros(0)).mean(axis=0) for flow in flows]
        return np.stack([self.space.out_of(shift_K) for shift_K in shifts])

    def _open(self, told_EG: Matrix, added_EG: Matrix) -> None:
        """Open the gate as far as lowers the error most, if the error of held-out groups is lower beyond chance.

        The gain of a fold is measured with the g that the other folds ask for.
        """
        missing_EG = self.table.delta_EG - told_EG
        along_E, size_E = (missing_EG * added_EG).sum(axis=1), (added_EG**2).sum(axis=1)
        own = np.array([self._fold(line) for line in range(self.table.n_effects)])
        gain_E = np.zeros(len(own))
        for fold in range(self.fold_EJ.shape[1]):
            g = best_weight(along_E[own != fold], size_E[own != fold])
            gain_E[own == fold] = (2 * g * along_E - g**2 * size_E)[own == fold]
        gain = standard_errors(self._by_group(gain_E))
        g = best_weight(along_E, size_E) if gain >= needed(len(set(self.label_E))) else 0.0
        self.gate = Gate(self.gate.baseline, g, gain, self.gate.errors)

    def _widen(self, told_EG: Matrix) -> None:
        """Learn each feature's usual error, and the errors of held-out groups in units of it."""
        error_EG = np.abs(self.table.delta_EG - told_EG)
        square_G = (error_EG**2).mean(axis=0)
        seen_G = (self.table.treated_EG > 0).any(axis=0) | (self.table.control_EG > 0).any(axis=0)
        common = float(np.median(square_G[seen_G])) if seen_G.any() else 0.0
        self.usual_G = np.sqrt(square_G + common / 4 + 1e-12)
        self.score_EG = (error_EG / self.usual_G)[:, seen_G]  # features without a count are always right

    def predict(self, control: Study, perturbation: str, context: str) -> Vector:
        """Return delta_G; of a target that nothing is known of, what the baseline says: the flow abstains.

        It does so of a combination too unless something is known of each of its targets.

        Raises:
            InputRefused: The cells have other features than those of the fit, or in another order.
        """
        if tuple(control.features[self.measurement]) != self.table.features:
            raise InputRefused(
                f"{self.measurement} of these cells has other features than the head was fitted on, or in another "
                "order; bring the columns into the order of head.table.features"
            )
        told_G = self.baseline.predict(control, perturbation, context)
        if self.gate.g == 0 or not self.known[perturbation].any():
            return told_G
        start_CK = spread(self.space.embed(control))
        added_G: Vector = self._shift(self.flows, start_CK, told_G, perturbation).mean(axis=0)
        return told_G + self.gate.g * added_G

    def interval(self, control: Study, perturbation: str, context: str, level: float = 0.9) -> tuple[Vector, Vector]:
        """Return low_G and high_G, which hold ``level`` of the features' effects of a new group on average.

        The guarantee is over groups (perturbations or contexts) that are exchangeable with the training ones, and over
        features together, not for each feature (hierarchical conformal prediction; Lee, Barber and Willett 2023).
        Infinite where there are too few groups to say.
        """
        told_G, half_G = self.predict(control, perturbation, context), self.half_width(level)
        return told_G - half_G, told_G + half_G

    def half_width(self, level: float = 0.9) -> Vector:
        """Return how far :meth:`interval` reaches to either side, for each of G features."""
        half_G: Vector = group_quantile(self.score_EG, self.label_E, level) * self.usual_G
        return half_G


def spread(latent_CK: Matrix, most: int = MOST_CELLS) -> Matrix:
    """Return so many cells at most, the same in whatever order they come: every so many-th along the first axis."""
    order = np.lexsort(latent_CK.T[::-1])
    return latent_CK[order[np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(np.int64)]]


def needed(n_groups: int) -> float:
    """Return the standard errors by which a mean over groups has to be above 0 to open a gate."""
    return float(student.ppf(1 - CHANCE, n_groups - 1)) if n_groups > 1 else float("inf")


def best_weight(along_E: Vector, size_E: Vector) -> float:
    """Return the weight in [0, 1] that lowers the squared error most."""
    return float(np.clip(along_E.sum() / max(size_E.sum(), 1e-12), 0.0, 1.0))


def _deal(group_E: Sequence[frozenset[str]], seed: int) -> NDArray[np.bool_]:
    """Deal groups to folds; return which effects each fold holds out, [E, J]; every effect is in one at least.

    A fold takes no group with which it would hold out every effect: the next one does.
    """
    groups = sorted({name for names in group_E for name in names})
    groups.sort(key=lambda name: drawn_place(seed, name))
    n_folds = min(FOLDS, len(groups))
    if n_folds < 2:
        raise InputRefused(f"the transition head needs two groups to hold out in turn; there is {', '.join(groups)}")
    dealt = np.zeros((len(group_E), n_folds), dtype=bool)
    for number, name in enumerate(groups):
        hit_E = np.array([name in names for names in group_E])
        folds = ((number + step) % n_folds for step in range(n_folds))
        free = next((fold for fold in folds if not (dealt[:, fold] | hit_E).all()), None)
        if free is None:
            beside = "" if hit_E.all() else " and the targets that are held out with it"
            raise InputRefused(
                f"the transition head learns without each target in turn, but without {name}{beside} none of the "
                f'{len(group_E):,} effects is left to learn from; hold out by "perturbation", or add perturbations '
                f"without {name}"
            )
        dealt[hit_E, free] = True
    return dealt


class Space:
    """Where cells move: principal components of log values, and how their means show in pooled profiles.

    A pooled profile is the log of a mean, a mean of components is a mean of logs. Between the two stands one factor for
    each feature, fitted to training effects and drawn towards what all features have in common.
    """

    def __init__(self, measurement: str, seed: int = 0, components: int = COMPONENTS) -> None:
        """Say of what, and how many dimensions."""
        self.measurement = measurement
        self.pca = PrincipalComponents(measurement, components=components, seed=seed)

    def fit(self, train: Study) -> Self:
        """Learn components from cells."""
        self.pca.fit(train)
        n_features = train.measured(self.measurement).shape[1]
        self.loading_GK = np.zeros((n_features, self.pca.pca.components_.shape[0]))
        self.loading_GK[self.pca.features.chosen] = self.pca.pca.components_.T
        self.factor_G = np.ones(n_features)
        return self

    def learn_factors(self, logs_EG: Matrix, delta_EG: Matrix) -> None:
        """Fit each feature's factor between changes of mean logs and of pooled profiles."""
        both_G, own_G = (logs_EG * delta_EG).sum(axis=0), (logs_EG**2).sum(axis=0)
        common = both_G.sum() / max(own_G.sum(), 1e-12)
        prior = np.median(own_G) + 1e-12
        self.factor_G = np.clip((both_G + prior * common) / (own_G + prior), 0.2, 10)

    def embed(self, cells: Study) -> Matrix:
        """Return latent_CK."""
        return self.pca.embed(cells)

    def into(self, delta_G: Vector) -> Vector:
        """Return the latent shift_K of a change of profile."""
        shift_K: Vector = self.loading_GK.T @ (delta_G / self.factor_G)
        return shift_K

    def out_of(self, shift_K: Vector) -> Vector:
        """Return the change of profile, delta_G, of a latent shift."""
        delta_G: Vector = self.factor_G * (self.loading_GK @ shift_K)
        return delta_G
