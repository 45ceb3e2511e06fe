"""New kinds of cells are told from known ones, and known ones are flagged no oftener than promised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from studies import FEATURES, study

from store.errors import InputRefused, UsageError
from train.evaluation.calibration import calibration_suite
from train.evaluation.cellfloor import annotation_floor
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.judge import by_seed
from train.evaluation.novelty import NOVELTY, novelty_floor, novelty_suite
from train.evaluation.score import REPLICATE, score
from train.evaluation.study import Study
from train.evaluation.suites import annotate_suite
from train.novelty import p_values


def four_types(spread: float, n_cells: int = 480) -> Study:
    rng = np.random.default_rng(3)
    base = rng.uniform(2, 8, len(FEATURES))
    means = {name: base * np.exp(rng.normal(0, spread, len(FEATURES))) for name in "abcd"}
    types = np.array(list("abcd"))[np.arange(n_cells) % 4]
    return study(pd.DataFrame({"cell_type": types}), np.array([means[name] for name in types]))


def test_a_type_that_stands_apart_is_found_and_one_that_does_not_is_not() -> None:
    for spread, low, high in ((0.6, 0.85, 1.0), (0.0, 0.35, 0.65)):
        cells = four_types(spread)
        folds = make_folds(cells, FoldSettings(by="cell_type"))
        found = novelty_suite(cells, folds, by_seed(lambda seed: novelty_floor("RNA", seed=seed)), seeds=[0])
        assert {value.unit for value in found} == set("abcd")
        mean = np.mean([v.value for v in found if v.method == "kNN distance on PCs" and v.metric == "AUROC"])
        assert low <= mean <= high
    scores = score(found, NOVELTY)
    assert {one.verdict for one in scores} <= {"not informative", "floor only"}
    assert REPLICATE in {value.method for value in found}


def test_known_cells_are_flagged_no_oftener_than_promised() -> None:
    rng = np.random.default_rng(0)
    flagged = [(p_values(rng.normal(size=99), rng.normal(size=200)) <= 0.1).mean() for _ in range(200)]
    assert np.mean(flagged) == pytest.approx(0.1, abs=0.01)
    assert p_values(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 9.0])).tolist() == [1.0, 0.75, 0.25]


def test_too_few_new_cells_are_refused() -> None:
    cells = four_types(0.5, n_cells=60)
    with pytest.raises(InputRefused, match="no held-out group has 40 cells"):
        novelty_suite(cells, make_folds(cells, FoldSettings(by="cell_type")), {}, seeds=[0])


def test_a_fold_whose_training_cells_are_of_one_type_is_refused_in_words() -> None:
    cells = four_types(0.5, n_cells=320)
    cells = cells.take(np.isin(cells.label("cell_type"), ["a", "b"]))
    with pytest.raises(UsageError, match=r"with [ab] held out, all \d+ cells to train on have cell_type '[ab]'"):
        novelty_suite(
            cells, make_folds(cells, FoldSettings(by="cell_type")), by_seed(lambda seed: novelty_floor("RNA"))
        )
    donor_C = np.where((cells.label("cell_type") == "b") | (np.arange(cells.n_cells) % 4 == 0), "mixed", "pure")
    halves = replace(cells, obs=cells.obs.assign(donor_id=donor_C))
    folds = make_folds(halves, FoldSettings(by="donor_id", held=("mixed",)))
    floor = by_seed(lambda seed: annotation_floor("RNA", seed=seed))
    with pytest.raises(UsageError, match=r"with mixed held out, all .* cells to train on have cell_type 'a'"):
        annotate_suite(halves, folds, floor)
    folds = [replace(fold, calibrate_C=fold.test_C) for fold in folds]
    with pytest.raises(UsageError, match="with mixed held out"):
        calibration_suite(halves, folds, floor)
