"""This module asks whether a method knows when it is wrong: label sets that hold the truth as often as they say.

Sets are split-conformal: groups of cells that training did not have say how improbable the true type may be. Coverage
is promised for new groups like those (``train.evaluation.conformal``); under a shift to other groups it may break, and
is shown as it is.

Shape letters used in this module:
    C  cells      Y  types
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from store.errors import InputRefused, UsageError
from train.evaluation.cellfloor import Tells, annotation_floor
from train.evaluation.conformal import group_quantile
from train.evaluation.folds import Fold
from train.evaluation.score import REPLICATE, Value, Way
from train.evaluation.study import Study
from train.evaluation.suites import FEWEST_CELLS, RISK, refuse_one_type, risk_over_coverage, shuffled, units
from train.ontology import covering_type

LEVEL = 0.9
CALIBRATION: dict[str, Way] = {
    RISK: "lower",
    f"coverage shortfall at {LEVEL:.0%}": "lower",
    f"set size at {LEVEL:.0%}": "lower",
}
Matrix = NDArray[np.float64]


class LabelSets:
    """A classifier of cells that answers with a set of types.

    A type is in the set if its probability is not lower than what ``level`` of the calibration cells' true types reach
    (Sadinle, Lei and Wasserman 2019), every calibration group weighing the same.

    Attributes:
        annotator: The classifier.
        least: The probability that a type needs; below any probability where there are too few groups to promise.
        promised: Are there enough groups for the promise? n groups promise n / (n + 1) at most; with fewer, ``least``
            is the groups' own quantile, and coverage is a hope.
    """

    def __init__(self, annotator: Tells, calibration: Study, group_C: NDArray[np.object_], level: float = LEVEL):
        """Calibrate a fitted classifier on cells of known types that it did not learn from.

        Raises:
            InputRefused: No calibration cell has a type that the classifier knows.
        """
        self.annotator = annotator
        label_C = calibration.label(annotator.column).astype(str)
        known_C = np.isin(label_C, annotator.types)
        if not known_C.any():
            raise InputRefused(f"no calibration cell has a known {annotator.column}: nothing to calibrate on")
        probability_CY = annotator.predict_proba(calibration.take(known_C))
        column_C = np.searchsorted(annotator.types, label_C[known_C])
        score_C = -probability_CY[np.arange(len(column_C)), column_C]  # exact: 1 - (1 - p) may be above p
        most = group_quantile(score_C, group_C[known_C], level)
        self.promised = bool(np.isfinite(most))
        if not self.promised:
            most = group_quantile(score_C, group_C[known_C], level, promise=False)
        self.least = -most

    def sets(self, cells: Study) -> NDArray[np.bool_]:
        """Return which types are in each cell's set, [C, Y] in the order of the annotator's types; never none."""
        return self.inside(self.annotator.predict_proba(cells))

    def inside(self, probability_CY: Matrix) -> NDArray[np.bool_]:
        """Return which types are in the sets of cells with these probabilities."""
        inside_CY: NDArray[np.bool_] = probability_CY >= min(self.least, 1.0)
        inside_CY[np.arange(len(inside_CY)), probability_CY.argmax(axis=1)] = True
        return inside_CY

    def told(self, cells: Study) -> list[str]:
        """Return each cell's answer in words: its type, or the nearest type of the Cell Ontology that covers its set.

        Types that are not the ontology's are named one by one.
        """
        patterns, cell_C = np.unique(self.sets(cells), axis=0, return_inverse=True)
        names = [self.annotator.types[inside_Y].tolist() for inside_Y in patterns]
        words = [covering_type(types) or " or ".join(types) for types in names]
        return [words[place] for place in cell_C.ravel()]


def calibration_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], Tells]],
    measurement: str = "RNA",
    column: str = "cell_type",
    seeds: Iterable[int] = range(3),
    unit: str = "donor_id",
) -> list[Value]:
    """Answer held-out groups with label sets that other groups calibrated; the units are the held-out groups.

    The replicate is a logistic regression that was shown one half of the held-out group's cells and calibrated on half
    of the rest: nothing shifts. Every method is judged on what is left. Coverage itself stands beside the scores.

    Raises:
        UsageError: The folds calibrate on nothing, or the training cells of one are of one type.
        InputRefused: No held-out group has enough cells.
    """
    if not any(fold.calibrate_C.any() for fold in folds):
        raise UsageError("the calibration suite needs groups to calibrate on: say --set calibrate=0.3")
    values: list[Value] = []
    for seed in seeds:
        for fold in folds:
            label_C, group_C = study.label(column), study.label(unit)
            rows = shuffled(np.flatnonzero(fold.test_C & np.isin(label_C, label_C[fold.train_C])), seed)
            shown, own, judged = rows[::4], rows[2::4], study.take(rows[1::2])
            if judged.n_cells < FEWEST_CELLS:
                continue
            train, calibration = study.take(fold.train_C), study.take(fold.calibrate_C)
            refuse_one_type(train, fold, column)
            sets = {
                name: LabelSets(make(seed).fit(train), calibration, group_C[fold.calibrate_C])
                for name, make in methods.items()
            }
            informed = annotation_floor(measurement, column, seed)[1]
            informed.fit(study.take(np.concatenate([np.flatnonzero(fold.train_C), shown])))
            sets[REPLICATE] = LabelSets(informed, study.take(own), np.arange(len(own)).astype(object))
            for where, cells in units(judged, fold, unit):
                for name, method in sets.items():
                    values += [Value(name, metric, where, seed, told) for metric, told in _told(method, cells)]
    if not values:
        raise InputRefused(f"no held-out group has {2 * FEWEST_CELLS} cells of known {column}")
    return values


def _told(method: LabelSets, cells: Study) -> list[tuple[str, float]]:
    types, label_C = method.annotator.types, cells.label(method.annotator.column)
    probability_CY = method.annotator.predict_proba(cells)
    inside_CY = method.inside(probability_CY)
    true_CY = types[None, :] == label_C[:, None]
    covered = float((inside_CY & true_CY).any(axis=1).mean())
    wrong_C = types[probability_CY.argmax(axis=1)] != label_C
    return [
        (RISK, risk_over_coverage(probability_CY.max(axis=1), wrong_C)),
        (f"coverage shortfall at {LEVEL:.0%}", max(0.0, LEVEL - covered)),
        (f"set size at {LEVEL:.0%}", float(inside_CY.sum(axis=1).mean())),
        (f"coverage at {LEVEL:.0%}", covered),
    ]
