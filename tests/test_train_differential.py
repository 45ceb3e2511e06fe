"""Fold changes of the features that a perturbation changes: whose they are, and what predictions of them are worth."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import ttest_ind

from train.evaluation.differential import DIRECTIONS, FOLD_CHANGES, chances, compared
from train.evaluation.floor import ControlPasted, TrainingMean
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.perturb import perturb_suite
from train.evaluation.score import REPLICATE, Value
from train.evaluation.study import Study

N_FEATURES, N_CHANGED = 60, 20


def screen(targets: int = 6, n_cells: int = 120, seed: int = 0) -> Study:
    """Perturbations that double the same twenty features' counts of a hundred; controls beside them."""
    rng = np.random.default_rng(seed)
    label = np.repeat(["control", *(f"t{number}" for number in range(targets))], n_cells)
    mean_CG = np.full((len(label), N_FEATURES), 20.0)
    mean_CG[label != "control", :N_CHANGED] *= 2
    counts = csr_matrix(rng.poisson(mean_CG).astype(np.float32))
    features = [f"g{number}" for number in range(N_FEATURES)]
    obs = pd.DataFrame({"perturbation": label, "cell_type": "a"})
    return Study({"RNA": counts}, {"RNA": features}, obs)


def reached(found: list[Value], method: str, metric: str) -> list[float]:
    return [one.value for one in found if (one.method, one.metric) == (method, metric)]


def test_no_change_is_one_and_a_shared_change_is_as_good_as_a_replicate() -> None:
    study = screen()
    methods = {"control": lambda seed: ControlPasted("RNA"), "mean": lambda seed: TrainingMean("RNA")}
    found = perturb_suite(study, make_folds(study, FoldSettings(by="target", folds=2)), methods, seeds=range(2))
    assert reached(found, "control", FOLD_CHANGES) == pytest.approx([1.0] * 12)
    assert reached(found, "control", DIRECTIONS) == [0.0] * 12
    assert max(reached(found, "mean", FOLD_CHANGES)) < 0.15
    assert max(reached(found, REPLICATE, FOLD_CHANGES)) < 0.2
    assert min(reached(found, REPLICATE, DIRECTIONS) + reached(found, "mean", DIRECTIONS)) == 1.0


def test_where_nothing_changes_nothing_is_scored() -> None:
    study = screen()
    counts = csr_matrix(np.random.default_rng(1).poisson(20.0, (study.n_cells, N_FEATURES)).astype(np.float32))
    still = Study({"RNA": counts}, study.features, study.obs)
    methods = {"control": lambda seed: ControlPasted("RNA")}
    found = perturb_suite(still, make_folds(still, FoldSettings(by="target", folds=2)), methods, seeds=[0])
    for metric in (FOLD_CHANGES, DIRECTIONS):
        values = reached(found, REPLICATE, metric)
        assert len(values) == 6
        assert all(math.isnan(value) for value in values)


def test_both_metrics_are_what_they_say_they_are() -> None:
    rng = np.random.default_rng(2)
    true, told = rng.normal(0, 1, 40), rng.normal(0, 1, 40)
    changed = np.arange(40) % 2 == 0
    values = {
        (metric, name): value
        for metric, name, value in compared(
            {"x": told, "y": told}, {"x": true, "y": true}, {"x": np.where(changed, 0.01, 0.5), "y": np.ones(40)}
        )
    }
    error = np.abs(told - true)[changed].mean() / np.abs(true)[changed].mean()
    assert values[FOLD_CHANGES, "x"] == pytest.approx(error)
    assert values[DIRECTIONS, "x"] == pytest.approx((np.sign(told) == np.sign(true))[changed].mean())
    assert math.isnan(values[FOLD_CHANGES, "y"])
    assert math.isnan(values[DIRECTIONS, "y"])


def test_features_change_at_the_rate_of_false_discoveries_that_is_said() -> None:
    rng = np.random.default_rng(3)
    treated, control = rng.poisson(2.0, (80, 500)).astype(float), rng.poisson(2.0, (200, 500)).astype(float)
    treated[:, 0] = control[:, 0] = 0
    p_G = chances(csr_matrix(treated), csr_matrix(control))
    assert p_G[0] == 1.0, "nobody has it"
    assert (p_G < 0.05).sum() <= 2
    treated[:, 10:40] += rng.poisson(3.0, (80, 30))
    p_G = chances(csr_matrix(treated), csr_matrix(control))
    assert (p_G[10:40] < 0.05).all()
    raw_G = ttest_ind(treated[:, 10:40], control[:, 10:40], equal_var=False).pvalue
    assert (p_G[10:40] >= raw_G * (1 - 1e-9)).all(), "adjusted for being many"
