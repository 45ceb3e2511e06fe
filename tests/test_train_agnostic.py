"""Judging without labels: held-out molecules, and disputes that another measurement decides."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from studies import FEATURES, study

from store.errors import InputRefused
from train.evaluation.agnostic import AGNOSTIC, Marginal, adjudicate, molecules_suite, scatter, shares_floor
from train.evaluation.cellfloor import annotation_floor
from train.evaluation.embedding import concordance, embedding_floor
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.judge import by_seed
from train.evaluation.report import means
from train.evaluation.score import REPLICATE, score
from train.evaluation.study import Study


def mislabelled(wrong: float, n_cells: int = 600) -> Study:
    """Two types that RNA and protein tell apart; some of the labels of held-out donors are wrong."""
    rng = np.random.default_rng(0)
    kind, donor = rng.integers(2, size=n_cells), rng.integers(6, size=n_cells)
    rate = np.random.default_rng(3).uniform(0.5, 4, (2, len(FEATURES)))
    label = np.where((donor < 3) & (rng.random(n_cells) < wrong), 1 - kind, kind)
    cells = study(
        pd.DataFrame({"cell_type": [f"t{k}" for k in label], "donor_id": [f"d{d}" for d in donor]}), rate[kind]
    )
    protein = rng.poisson(np.array([[30.0, 5.0, 10.0], [5.0, 30.0, 10.0]])[kind]).astype(np.float32)
    counts = {**cells.counts, "protein": csr_matrix(protein)}
    return Study(counts, {**cells.features, "protein": ["A", "B", "C"]}, cells.obs)


def test_held_out_molecules_reward_what_knows_the_cell() -> None:
    cells = mislabelled(0.0)
    folds = make_folds(cells, FoldSettings(by="donor_id", folds=3))
    values = molecules_suite(cells, folds, by_seed(lambda seed: shares_floor("RNA", seed)), seeds=range(1))
    found = {method: mean for method, metric, mean in means(values) if metric.startswith("nats")}
    assert found["kNN on PCs"] < found["training mean"] - 0.02
    assert found[REPLICATE] == pytest.approx(found["kNN on PCs"], abs=0.01)
    entropy = -(share := np.random.default_rng(3).uniform(0.5, 4, (2, len(FEATURES)))) / share.sum(1, keepdims=True)
    floor = np.mean([(row * np.log(-row)).sum() for row in entropy])
    assert floor < found["kNN on PCs"] < floor + 0.05  # nothing can be better than the truth's own entropy
    embedders = by_seed(lambda seed: embedding_floor("RNA", seed))
    halves = concordance(cells, folds, embedders, seeds=range(1))
    by_method = {method: mean for method, _, mean in means(halves)}
    chance = 1 / np.mean([np.sum(cells.label("donor_id") == donor) for donor in set(cells.label("donor_id"))])
    assert by_method[REPLICATE] == 1.0
    assert min(by_method["HVG"], by_method["HVG + PCA"]) >= 0
    assert max(by_method["HVG"], by_method["HVG + PCA"]) > chance
    assert [one.metric for one in score(values + halves, AGNOSTIC)] == list(AGNOSTIC)


def test_scatter_is_right_where_the_likelihood_is() -> None:
    rng = np.random.default_rng(0)
    rate, r = rng.uniform(0.2, 6, (300, 40)), rng.uniform(0.5, 3, 40)
    counts = rng.poisson(rate * rng.gamma(r, 1 / r, rate.shape)).astype(float)
    right, narrow, wrong = scatter(counts, rate, r, 0), scatter(counts, rate, None, 0), scatter(counts, rate * 2, r, 0)
    assert right[1] < 0.02 < 0.05 < narrow[1]
    assert right[0] < narrow[0]
    assert right[0] < wrong[0]
    one = scatter(np.array([[2.0]]), np.array([[1e-9]]), None, 0)[0]
    assert one == pytest.approx(2.0, abs=1e-6)  # a certain 0 against a 2: how far it is


def test_a_molecule_that_training_never_saw_is_dear_but_possible() -> None:
    cells = mislabelled(0.0)
    blind = cells.counts["RNA"].tolil()
    seen = cells.label("donor_id") > "d2"
    blind[np.flatnonzero(seen), 0] = 0
    cells = Study({**cells.counts, "RNA": csr_matrix(blind)}, cells.features, cells.obs)
    folds = make_folds(cells, FoldSettings(by="donor_id", held=("d0", "d1", "d2"), folds=1))
    values = molecules_suite(cells, folds, {"training mean": lambda seed: Marginal("RNA")}, seeds=range(1))
    assert all(np.isfinite(value.value) for value in values)


@pytest.mark.parametrize(("wrong", "wins"), [(0.3, True), (0.0, False)])
def test_another_measurement_sides_with_who_is_right(wrong: float, wins: bool) -> None:
    cells = mislabelled(wrong)
    folds = make_folds(cells, FoldSettings(by="donor_id", held=("d0", "d1", "d2"), folds=1))
    methods = by_seed(lambda seed: annotation_floor("RNA", seed=seed)[1:2])
    found = {metric: mean for _, metric, mean in means(adjudicate(cells, folds, methods, "protein", seeds=range(1)))}
    if wins:
        assert found["disputed cells"] == pytest.approx(0.3, abs=0.06)
        assert found["of these, the judge agrees with the method"] > 0.95
        assert found["of these, the judge agrees with the label"] < 0.05
        assert found["of these, the method's share by chance"] < 0.7
    else:
        assert found["disputed cells"] < 0.02


def test_too_few_cells_are_refused() -> None:
    cells = mislabelled(0.0, n_cells=60)
    with pytest.raises(InputRefused, match="no held-out group has 40 cells of RNA"):
        molecules_suite(cells, make_folds(cells, FoldSettings(by="donor_id")), {}, seeds=[0])
