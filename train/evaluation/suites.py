"""This module is the evaluation suites on single cells: annotation, translation, forecasting; each with its replicate.

What stands for a replicate is said with each suite: there is no second experiment on the same cells, but there are two
halves of its cells, or of its molecules.

Shape letters used in this module:
    C  cells      H  features of the measurement that is predicted      Y  types
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from store.errors import InputRefused, UsageError
from train.evaluation.cellfloor import Forecaster, PrincipalComponents, Tells, Translator, annotation_floor
from train.evaluation.folds import Fold
from train.evaluation.score import REPLICATE, Value, Way
from train.evaluation.study import Study

ANNOTATE: dict[str, Way] = {"macro F1": "higher", "calibration error": "lower"}
TRANSLATE: dict[str, Way] = {"correlation within types": "higher", "squared error": "lower"}
FORECAST: dict[str, Way] = {"energy distance": "lower"}
RISK = "risk over coverage"
MOST_CELLS = 1500
FEWEST_CELLS = 20


def annotate_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Tells]],
    measurement: str = "RNA",
    column: str = "cell_type",
    seeds: Iterable[int] = range(3),
    unit: str = "donor_id",
) -> list[Value]:
    """Tell the types of held-out groups; the units are the donors (or another column's values) in them.

    The replicate is a logistic regression that was also shown one half of the held-out group's own cells: no shift
    between groups is left. Every method is judged on the other half. Types that training does not have are left out.
    The risk over coverage is told, not scored: the calibration suite scores it.

    Raises:
        InputRefused: No held-out group has enough cells.
        UsageError: The training cells of a fold are of one type.
    """
    values = []
    for seed in seeds:
        for fold in folds:
            rows = shuffled(np.flatnonzero(fold.test_C), seed)
            known = np.isin(study.label(column)[rows], study.label(column)[fold.train_C])
            own_C, judged = fold.train_C.copy(), study.take(rows[known][1::2])
            own_C[rows[known][::2]] = True
            if judged.n_cells < FEWEST_CELLS:
                continue
            train = study.take(fold.train_C)
            refuse_one_type(train, fold, column)
            fitted = {name: make(seed).fit(train) for name, make in methods.items()}
            fitted[REPLICATE] = annotation_floor(measurement, column, seed)[1].fit(study.take(own_C))
            for where, group in units(judged, fold, unit):
                for name, method in fitted.items():
                    for metric, value in _told(method, group, column).items():
                        values.append(Value(name, metric, where, seed, value))
    return _some(values, f"no held-out group has {2 * FEWEST_CELLS} cells of known {column}")


def refuse_one_type(train: Study, fold: Fold, column: str) -> None:
    """Refuse a fold that leaves nothing to tell apart.

    Raises:
        UsageError: Its training cells are of one type.
    """
    types = sorted(set(train.label(column)))
    if len(types) < 2:
        raise UsageError(
            f"with {fold.name} held out, all {train.n_cells:,} cells to train on have {column} {types[0]!r}: it takes "
            "two to tell apart; hold out other groups (held), or by another column"
        )


def _told(method: Tells, judged: Study, column: str) -> dict[str, float]:
    types = sorted({*method.types.tolist(), *judged.label(column)})
    probability_CY = np.zeros((judged.n_cells, len(types)))
    probability_CY[:, [types.index(name) for name in method.types]] = method.predict_proba(judged)
    predicted = torch.from_numpy(probability_CY)
    wrong_C = np.array(types)[probability_CY.argmax(axis=1)] != judged.label(column)
    truth = torch.tensor([types.index(name) for name in judged.label(column)])
    per_type = multiclass_f1_score(predicted.argmax(1), truth, len(types), average="none")
    return {
        "macro F1": float(per_type[torch.bincount(truth, minlength=len(types)) > 0].mean()),
        "calibration error": float(multiclass_calibration_error(predicted, truth, len(types))),
        RISK: risk_over_coverage(probability_CY.max(axis=1), wrong_C),
    }


def risk_over_coverage(confidence_C: NDArray[np.float64], wrong_C: NDArray[np.bool_]) -> float:
    """Return the mean error over all ways of answering only the most confident cells (AURC; Geifman et al. 2019)."""
    order = np.argsort(-confidence_C, kind="stable")
    return float((np.cumsum(wrong_C[order]) / np.arange(1, len(order) + 1)).mean())


def translate_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Translator]],
    source: str,
    target: str,
    column: str = "cell_type",
    seeds: Iterable[int] = range(3),
    unit: str = "donor_id",
) -> list[Value]:
    """Predict one measurement of held-out cells from another; the units are donors, and types of them.

    The replicate is the same cells measured again: the target's molecules are dealt to two halves at random (count
    splitting; Neufeld et al. 2024), of which one is the truth and the other the replicate. Methods are fitted on one
    half of the target's molecules too: logs of shares depend on how many molecules they are of. Correlations are of
    each feature over the cells of one type, so that telling types apart earns nothing. Methods that choose something by
    cells that they were not fitted on are given the fold's calibration cells.
    """
    values = []
    for seed in seeds:
        for fold in folds:
            test = with_both(study.take(fold.test_C), source, target)
            if test.n_cells < FEWEST_CELLS:
                continue
            train, _ = deal_molecules(study.take(fold.train_C), target, seed)
            fitted = {name: make(seed).fit(train) for name, make in methods.items()}
            for method in fitted.values():
                if isinstance(method, Calibrated):
                    chosen_by = with_both(study.take(fold.calibrate_C), source, target)
                    method.calibrate(deal_molecules(chosen_by, target, seed)[0])
            for where, group in units(test, fold, unit):
                truth, again = deal_molecules(group, target, seed)
                truth_CH = truth.logs(target).toarray().astype(np.float64)
                answers = {name: method.predict(group) for name, method in fitted.items()}
                answers[REPLICATE] = again.logs(target).toarray().astype(np.float64)
                for name, answer_CH in answers.items():
                    error = float(((answer_CH - truth_CH) ** 2).mean())
                    values.append(Value(name, "squared error", where, seed, error))
                    for type_, value in _within(answer_CH, truth_CH, group.label(column)).items():
                        values.append(Value(name, "correlation within types", f"{where} | {type_}", seed, value))
    return _some(values, f"no fold holds {FEWEST_CELLS} cells out that have {source} and {target}")


@runtime_checkable
class Calibrated(Protocol):
    """A method that chooses something by cells that it was not fitted on."""

    def calibrate(self, cells: Study) -> None:
        """Choose."""


def with_both(cells: Study, source: str, target: str) -> Study:
    """Return the cells in which both were measured."""
    return cells.take(cells.has(source) & cells.has(target))


def units(test: Study, fold: Fold, column: str) -> list[tuple[str, Study]]:
    """Return the units of a fold's cells that have enough cells, with their cells."""
    label_C = test.label(column)
    found = []
    for value in sorted(set(label_C)):
        group = test.take(label_C == value)
        if group.n_cells >= FEWEST_CELLS:
            found.append((fold.name if value == fold.name else f"{fold.name}: {value}", group))
    return found


def deal_molecules(study: Study, measurement: str, seed: int) -> tuple[Study, Study]:
    """Deal the molecules of each cell to two halves at random, each molecule by itself."""
    counts_CH = csr_matrix(study.measured(measurement)).copy()
    half = counts_CH.copy()
    half.data = np.random.default_rng([seed, 2]).binomial(counts_CH.data.astype(np.int64), 0.5).astype(np.float32)
    rest = (counts_CH - half).tocsr()
    one, other = ({**study.counts, measurement: csr_matrix(part)} for part in (half, rest))
    return replace(study, counts=one), replace(study, counts=other)


def _within(
    answer_CH: NDArray[np.float64], truth_CH: NDArray[np.float64], type_C: NDArray[np.object_]
) -> dict[str, float]:
    """Return for each type the mean correlation over features that vary in its cells; no variation predicted is 0."""
    found = {}
    for name in sorted(set(type_C)):
        mine = type_C == name
        if mine.sum() < FEWEST_CELLS:
            continue
        told, true = (part[mine] - part[mine].mean(axis=0) for part in (answer_CH, truth_CH))
        spread = np.sqrt((true**2).sum(axis=0))
        size = np.sqrt((told**2).sum(axis=0)) * spread
        varies = spread > 1e-6
        if varies.any():
            safe = np.where(size > 1e-9, size, 1.0)
            found[name] = float(((told * true).sum(axis=0) / safe * (size > 1e-9))[varies].mean())
    return found


def forecast_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Forecaster]],
    measurement: str = "RNA",
    seeds: Iterable[int] = range(3),
) -> list[Value]:
    """Predict the cells of a time that was held out; the replicate is the other half of its cells.

    A time of which several folds hold out cells, as of several donors, is a unit in each. The energy distance (Székely
    and Rizzo 2013) is taken on 20 principal components of training cells.
    """
    values = []
    often = Counter(time for fold in folds for time in set(study.obs["time"].to_numpy(dtype=np.float64)[fold.test_C]))
    for seed in seeds:
        for fold in folds:
            train, test = study.take(fold.train_C), study.take(fold.test_C)
            random = np.random.default_rng([seed, 3])
            components = PrincipalComponents(measurement, components=20, seed=seed).fit(train)
            fitted = {name: make(seed).fit(train) for name, make in methods.items()}
            time_C, logs_CG = test.obs["time"].to_numpy(dtype=np.float64), test.logs(measurement)
            for time in np.unique(time_C):
                rows = shuffled(np.flatnonzero(time_C == time), seed)
                if len(rows) < FEWEST_CELLS:
                    continue
                unit = f"{time:g} | {fold.name}" if often[time] > 1 else f"{time:g}"
                answers = {name: method.predict(float(time)) for name, method in fitted.items()}
                answers[REPLICATE] = logs_CG[rows[1::2]]
                chosen = components.features.chosen
                truth = components.pca.transform(logs_CG[rows[::2][:MOST_CELLS]][:, chosen].toarray())
                for name, sample in answers.items():
                    kept = random.permutation(sample.shape[0])[:MOST_CELLS]
                    told = components.pca.transform(sample[kept][:, chosen].toarray())
                    values.append(Value(name, "energy distance", unit, seed, energy_distance(told, truth)))
    return _some(values, f"no held-out time has {FEWEST_CELLS} cells")


def energy_distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, without a cell's distance to itself."""
    within = [cdist(part, part).sum() / max(1, len(part) * (len(part) - 1)) for part in (one, other)]
    return float(2 * cdist(one, other).mean() - sum(within))


def shuffled(rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return rows in the random order of a seed."""
    return np.random.default_rng([seed, 4]).permutation(rows)


def _some(values: list[Value], otherwise: str) -> list[Value]:
    if not values:
        raise InputRefused(otherwise)
    return values
