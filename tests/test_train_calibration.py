"""Label sets against answers on paper, and against groups that calibration never saw."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from studies import donors

from store.errors import InputRefused, UsageError
from train.evaluation.calibration import CALIBRATION, LabelSets, calibration_suite
from train.evaluation.cellfloor import Annotator, PrincipalComponents, annotation_floor, translation_floor
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.gatedtranslate import GatedTranslator
from train.evaluation.judge import by_seed
from train.evaluation.report import means
from train.evaluation.score import REPLICATE
from train.evaluation.study import Study
from train.evaluation.suites import risk_over_coverage
from train.ontology import covering_type


def fitted(train: Study) -> Annotator:
    components = PrincipalComponents("RNA", components=10)
    return Annotator("pcs", components, LogisticRegression(max_iter=500)).fit(train)


def test_sets_cover_cells_of_fresh_donors_as_often_as_they_say_and_are_not_everything() -> None:
    cells = donors(n_donors=90, n_cells=15)
    number = np.array([int(name[1:]) for name in cells.label("donor_id")])
    train, calibration, fresh = (cells.take(number % 3 == part) for part in range(3))
    method = LabelSets(fitted(train), calibration, calibration.label("donor_id"))
    assert method.promised
    inside = method.sets(fresh)
    true = method.annotator.types[None, :] == fresh.label("cell_type")[:, None]
    assert 0.85 <= (inside & true).any(axis=1).mean() <= 0.97
    assert 1 < inside.sum(axis=1).mean() < 2.6
    assert inside.any(axis=1).all()


class AlwaysTheSame:
    """Tells every cell the same: what decides is whether a border is the number that it was made from."""

    column, types = "cell_type", np.array(["t0", "t1", "t2"])

    def __init__(self, probability_Y: list[float]) -> None:
        self.probability_Y = np.array(probability_Y)

    def predict_proba(self, cells: Study) -> np.ndarray:
        return np.tile(self.probability_Y, (cells.n_cells, 1))


def test_probabilities_that_are_alike_are_on_the_same_side_of_the_border() -> None:
    cells = donors(n_donors=30, n_cells=15)
    true_CY = AlwaysTheSame.types[None, :] == cells.label("cell_type")[:, None]
    for share_Y in np.random.default_rng(0).dirichlet([5, 5, 5], 20):
        method = LabelSets(AlwaysTheSame(share_Y.tolist()), cells, cells.label("donor_id"))
        assert (method.sets(cells) & true_CY).any(axis=1).mean() >= 0.88, share_Y


def test_few_donors_promise_nothing_and_it_is_said() -> None:
    cells = donors(n_donors=6)
    number = np.array([int(name[1:]) for name in cells.label("donor_id")])
    method = LabelSets(fitted(cells.take(number < 3)), cells.take(number >= 3), cells.label("donor_id")[number >= 3])
    assert not method.promised
    assert 0 < method.least < 1
    strange = cells.take(number >= 3)
    strange = Study(strange.counts, strange.features, strange.obs.assign(cell_type="never seen"))
    with pytest.raises(InputRefused, match="no calibration cell has a known cell_type"):
        LabelSets(method.annotator, strange, strange.label("donor_id"))


def test_types_roll_up_to_the_nearest_one_that_is_all_of_them() -> None:
    helper, killer = "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"
    assert covering_type([helper]) == helper
    assert covering_type([helper, killer]) == "mature alpha-beta T cell"
    assert covering_type([helper, "B cell"]) == "lymphocyte"
    assert covering_type([helper, "mature alpha-beta T cell"]) == "mature alpha-beta T cell"
    assert covering_type([helper, "alpha"]) == covering_type([]) == ""


def test_a_set_is_told_as_the_type_that_covers_it_or_one_by_one() -> None:
    cells = donors(n_donors=6)
    named = {"t0": "CD4-positive, alpha-beta T cell", "t1": "CD8-positive, alpha-beta T cell", "t2": "B cell"}
    cells = Study(cells.counts, cells.features, cells.obs.assign(cell_type=cells.obs["cell_type"].map(named)))
    method = LabelSets(fitted(cells), cells, cells.label("donor_id"))
    method.least = 0.2
    told, inside = method.told(cells), method.sets(cells)
    types = method.annotator.types
    for words, inside_Y in zip(told, inside, strict=True):
        assert words == covering_type(types[inside_Y].tolist())
    assert {"CD4-positive, alpha-beta T cell", "mature alpha-beta T cell"} <= set(told)
    plain = donors(n_donors=6)
    other = LabelSets(fitted(plain), plain, plain.label("donor_id"))
    other.least = 0.0
    assert set(other.told(plain)) == {"t0 or t1 or t2"}


def test_risk_over_coverage_counted_by_hand() -> None:
    wrong = np.array([False, True, False, True])
    assert risk_over_coverage(np.array([0.9, 0.8, 0.7, 0.6]), wrong) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert risk_over_coverage(np.array([0.6, 0.2, 0.7, 0.1]), wrong) == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)


def test_the_suite_judges_coverage_under_shift_and_needs_groups_to_calibrate_on() -> None:
    cells = donors(n_donors=12, n_cells=60)
    floor = by_seed(lambda seed: annotation_floor("RNA", seed=seed))
    folds = make_folds(cells, FoldSettings(by="donor_id", folds=2, calibrate=0.5))
    values = calibration_suite(cells, folds, floor, seeds=range(1))
    found = {(method, metric): mean for method, metric, mean in means(values)}
    for method in (*floor, REPLICATE):
        assert {metric for name, metric in found if name == method} == {*CALIBRATION, "coverage at 90%"}
    assert found["logistic regression on PCs", "set size at 90%"] < found["most frequent", "set size at 90%"]
    assert 0.8 <= found["logistic regression on PCs", "coverage at 90%"] <= 1
    assert found[REPLICATE, "risk over coverage"] < found["most frequent", "risk over coverage"]
    with pytest.raises(UsageError, match="say --set calibrate"):
        calibration_suite(cells, make_folds(cells, FoldSettings(by="donor_id", folds=2)), floor)


class Garbage:
    """Says nothing of use."""

    name = "ours"

    def fit(self, train: Study) -> Garbage:
        return self

    def predict(self, cells: Study) -> np.ndarray:
        return np.random.default_rng(0).normal(3, 3, (cells.n_cells, 4))


class Knowing(Garbage):
    """Knows the truth, and is too sure of it."""

    def predict(self, cells: Study) -> np.ndarray:
        logs = cells.logs("protein").toarray().astype(float)
        return logs.mean(axis=0) + 2 * (logs - logs.mean(axis=0))


class Zero(Garbage):
    """Says that nothing is there."""

    def predict(self, cells: Study) -> np.ndarray:
        return np.zeros((cells.n_cells, 4))


class Up(Zero):
    """Says that all is higher by one."""

    def predict(self, cells: Study) -> np.ndarray:
        return np.ones((cells.n_cells, 4))


@pytest.mark.parametrize(
    ("higher", "opens"),
    [
        ([1.0, 0.9], False),
        ([1.0, 0.9, -0.1], False),
        ([1.0, 0.9, 0.8, 0.2], False),
        ([1.0, 0.99, 0.98], True),
        ([1.0, 0.95, 0.9, 0.85], True),
    ],
)
def test_few_donors_open_the_gate_only_if_they_gain_alike_however_many_cells_they_have(
    higher: list[float], opens: bool
) -> None:
    donor_C = np.repeat(np.arange(len(higher)), 200)

    class Cells:
        n_cells = len(donor_C)

        def logs(self, measurement: str) -> csr_matrix:
            return csr_matrix(np.random.default_rng(0).normal(np.array(higher)[donor_C, None], 0.1, (self.n_cells, 4)))

        def label(self, column: str) -> np.ndarray:
            return donor_C.astype(str).astype(object)

    method = GatedTranslator(Up(), [Zero()], "protein")
    method.calibrate(Cells())
    assert (method.gate.g > 0) == opens


def test_translations_open_the_gate_only_if_they_add_to_the_best_baseline() -> None:
    cells = donors(n_donors=12, n_cells=30)
    rng = np.random.default_rng(1)
    protein = csr_matrix(rng.poisson(rng.gamma(2, 4, (cells.n_cells, 4))).astype(np.float32) + 1)
    names = {**cells.features, "protein": ["a", "b", "c", "d"]}
    cells = Study({**cells.counts, "protein": protein}, names, cells.obs)
    number = np.array([int(name[1:]) for name in cells.label("donor_id")])
    train, calibration, fresh = (cells.take(number % 3 == part) for part in range(3))
    for ours, opens in ((Garbage(), False), (Knowing(), True)):
        method = GatedTranslator(ours, translation_floor("RNA", "protein", ""), "protein").fit(train)
        method.calibrate(calibration)
        alone = next(one for one in method.floor if one.name == method.gate.baseline)
        if opens:
            assert 0.3 < method.gate.g < 0.9  # half way undoes that it is too sure
            truth = fresh.logs("protein").toarray()
            assert ((method.predict(fresh) - truth) ** 2).mean() < 0.3 * ((alone.predict(fresh) - truth) ** 2).mean()
        else:
            assert method.gate.g == 0
            np.testing.assert_array_equal(method.predict(fresh), alone.predict(fresh))
