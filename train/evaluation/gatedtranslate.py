"""This module is a gate before translation: the best baseline plus g times what the model would change of it.

Baseline and g are chosen on calibration groups, which neither were fitted on. g is zero, and the answer the baseline's,
unless those groups gain beyond what chance gives once in 200 times (:mod:`train.evaluation.gated`): the fewer they are,
the more alike they have to gain, and fewer than three never open it.

Shape letters used in this module:
    C  cells      H  features of the measurement that is predicted
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from train.evaluation.cellfloor import Translator
from train.evaluation.gated import Gate, best_weight, needed
from train.evaluation.score import standard_errors
from train.evaluation.study import Study

Matrix = NDArray[np.float64]


class Translates(Protocol):
    """Anything that predicts a measurement from another."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def fit(self, train: Study) -> Self:
        """Learn from cells."""

    def predict(self, cells: Study) -> Matrix:
        """Return expected log shares_CH."""


class GatedTranslator:
    """A translator that stays with the best baseline unless ours is shown to add something."""

    def __init__(
        self,
        ours: Translates,
        floor: Sequence[Translator],
        target: str,
        unit: str = "donor_id",
        found: Callable[[Gate], object] | None = None,
    ) -> None:
        """Say how.

        Args:
            ours: What may add something.
            floor: Baselines; the one with the smallest error on the calibration cells is stood on.
            target: The measurement that is predicted.
            unit: The column of groups over which a gain must hold.
            found: Is told what calibration found.
        """
        self.ours, self.floor, self.target, self.unit, self.found = ours, list(floor), target, unit, found
        self.name = ours.name

    def fit(self, train: Study) -> Self:
        """Fit ours and the baselines."""
        self.ours.fit(train)
        for baseline in self.floor:
            baseline.fit(train)
        return self

    def calibrate(self, cells: Study) -> None:
        """Choose the baseline and g on cells that nothing was fitted on."""
        truth_CH = cells.logs(self.target).toarray().astype(np.float64)
        told = [baseline.predict(cells) for baseline in self.floor]
        errors = [float(((one - truth_CH) ** 2).mean()) for one in told]
        best = int(np.argmin(errors))
        self.baseline = self.floor[best]
        added_CH, missing_CH = self.ours.predict(cells) - told[best], truth_CH - told[best]
        along_C, size_C = (missing_CH * added_CH).mean(axis=1), (added_CH**2).mean(axis=1)
        g = best_weight(along_C, size_C)
        gain_C = 2 * g * along_C - g**2 * size_C
        _, code_C = np.unique(cells.label(self.unit).astype(str), return_inverse=True)
        gain_U = np.bincount(code_C, gain_C) / np.bincount(code_C)
        gain = standard_errors(gain_U)
        names = dict(zip((one.name for one in self.floor), errors, strict=True))
        self.gate = Gate(self.baseline.name, g if gain >= needed(len(gain_U)) else 0.0, gain, names)
        if self.found is not None:
            self.found(self.gate)

    def predict(self, cells: Study) -> Matrix:
        """Return expected log shares_CH."""
        told_CH = self.baseline.predict(cells)
        if self.gate.g == 0:
            return told_CH
        return told_CH + self.gate.g * (self.ours.predict(cells) - told_CH)
