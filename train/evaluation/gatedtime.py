"""This module is the transition head over time: the best forecasting baseline plus g times what a learned flow adds.

Times between the first and the last training time are held out in turn to choose the baseline, to teach the flow what
it misses, and to open the gate, as :mod:`train.evaluation.gated` does for perturbations.

Shape letters used in this module:
    C  cells      K  latent dimensions
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from train.evaluation.cellfloor import Forecaster, PrincipalComponents, forecast_floor
from train.evaluation.flow import Flow, FlowSettings, Passage, fit_flow
from train.evaluation.gated import COMPONENTS, FOLDS, HEAD, Gate, needed
from train.evaluation.score import standard_errors
from train.evaluation.study import Study
from train.evaluation.suites import energy_distance, shuffled

Matrix = NDArray[np.float64]
WEIGHTS = (0.25, 0.5, 0.75, 1.0)
MOST_CELLS = 512


class GatedForecast:
    """Cells of a time nobody measured: the best baseline's, moved on by g times the flow."""

    name = HEAD

    def __init__(
        self,
        measurement: str,
        settings: FlowSettings | None = None,
        seed: int = 0,
        found: Callable[[Gate], object] | None = None,
    ) -> None:
        """Say how.

        Args:
            measurement: What is predicted.
            settings: How the flow learns.
            seed: Of flows and samples.
            found: Is told what each fit found.
        """
        self.measurement, self.seed, self.found = measurement, seed, found
        self.settings = settings or FlowSettings()

    def fit(self, train: Study) -> Self:
        """Choose the baseline, teach the flows, and find g, holding out the inner times of these cells in turn."""
        time_C = train.obs["time"].to_numpy(dtype=np.float64)
        self.times = np.unique(time_C[~np.isnan(time_C)])
        self.pca = PrincipalComponents(self.measurement, components=COMPONENTS, seed=self.seed).fit(train)
        latent_CK = self.pca.embed(train)
        self.cells = {
            float(time): latent_CK[shuffled(np.flatnonzero(time_C == time), self.seed)] for time in self.times
        }
        inner = [float(time) for time in self.times[1:-1]]
        floor = forecast_floor(self.measurement, self.seed, MOST_CELLS)
        told = {
            (number, time): self._embedded(baseline.fit(train.take(time_C != time)).predict(time))
            for time in inner
            for number, baseline in enumerate(floor)
        }
        errors = {
            number: float(np.mean([energy_distance(told[number, time], self._truth(time)) for time in inner] or [0.0]))
            for number in range(len(floor))
        }
        best = min(errors, key=lambda number: errors[number]) if inner else len(floor) - 1
        self.baseline: Forecaster = floor[best]
        self.gate = Gate(self.baseline.name, 0.0, 0.0, {floor[number].name: error for number, error in errors.items()})
        dealt = [inner[first::FOLDS] for first in range(min(FOLDS, len(inner)))]
        if len(dealt) > 2:
            self.flows = [self._teach(train, time_C, held, inner) for held in dealt]
            self._open({time: told[best, time] for time in inner}, dealt)
        self.baseline = forecast_floor(self.measurement, self.seed)[best].fit(train)
        if self.found is not None:
            self.found(self.gate)
        return self

    def _truth(self, time: float) -> Matrix:
        return self.cells[time][:MOST_CELLS]

    def _embedded(self, logs_CG: csr_matrix) -> Matrix:
        chosen = self.pca.features.chosen
        rows = np.random.default_rng([self.seed, 8]).permutation(logs_CG.shape[0])[:MOST_CELLS]
        embedded: Matrix = self.pca.pca.transform(np.asarray(logs_CG[np.sort(rows)][:, chosen].todense()))
        return embedded

    @staticmethod
    def _said(time: float, known: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how long before and after the nearest known times are, and the time itself."""
        before, after = known[known < time], known[known > time]
        return np.array(
            [time - before.max() if len(before) else np.nan, after.min() - time if len(after) else np.nan, time]
        )

    def _teach(self, train: Study, time_C: NDArray[np.float64], held: list[float], inner: list[float]) -> Flow:
        """Teach a flow without some times: the other inner times start where the baseline leaves them without any."""
        passages = []
        for time in sorted(set(inner) - set(held)):
            left = self.baseline.fit(train.take(~np.isin(time_C, [time, *held]))).predict(time)
            known = self.times[~np.isin(self.times, [time, *held])]
            passages.append(Passage(self._embedded(left), self.cells[time], np.zeros(0), self._said(time, known)))
        return fit_flow(passages, self.settings, self.seed)

    def _open(self, told: dict[float, Matrix], dealt: list[list[float]]) -> None:
        """Open the gate as far as brings held-out times nearest, if that gains beyond chance."""
        gain = {}
        for time, start_CK in told.items():
            flow = next(one for one, held in zip(self.flows, dealt, strict=True) if time in held)
            shift_CK = flow.move(start_CK, np.zeros(0), self._said(time, self.times[self.times != time]))
            without = energy_distance(start_CK, self._truth(time))
            for g in WEIGHTS:
                gain[time, g] = without - energy_distance(start_CK + g * shift_CK, self._truth(time))
        mean = {g: np.array([gain[time, g] for time in told]) for g in WEIGHTS}
        best = max(WEIGHTS, key=lambda g: float(mean[g].mean()))
        won = standard_errors(mean[best])
        self.gate = Gate(self.gate.baseline, best if won >= needed(len(told)) else 0.0, won, self.gate.errors)

    def predict(self, time: float) -> csr_matrix:
        """Return a sample of cells at a time, log shares_CG."""
        told_CG = self.baseline.predict(time)
        if self.gate.g == 0:
            return told_CG
        rows = np.random.default_rng([self.seed, 9]).permutation(told_CG.shape[0])[: 4 * MOST_CELLS]
        told = np.asarray(told_CG[np.sort(rows)].todense(), dtype=np.float64)
        chosen = self.pca.features.chosen
        start_CK = self.pca.pca.transform(told[:, chosen])
        said = self._said(time, self.times)
        shift_CK = np.mean([flow.move(start_CK, np.zeros(0), said) for flow in self.flows], axis=0)
        told[:, chosen] += self.gate.g * shift_CK @ self.pca.pca.components_
        return csr_matrix(told)
