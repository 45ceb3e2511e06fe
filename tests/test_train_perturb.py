"""Held-out cells alone judge effects of perturbations, and nobody learns from a cell that judges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from studies import perturbed

from train.evaluation.effects import halves
from train.evaluation.floor import ControlPasted, TrainingMean
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.gated import GatedEffects
from train.evaluation.perturb import METRICS, perturb_suite
from train.evaluation.score import REPLICATE, Value
from train.evaluation.study import Study

SPLIT = FoldSettings(by="split", held=("test",))
DONOR = FoldSettings(by="donor_id", held=("d1",))
STIMULATED = FoldSettings(by="donor_id", held=("d1",), where={"perturbation": ("x", "y", "z")})


@pytest.fixture(scope="module")
def cells() -> Study:
    made = perturbed(["x", "y", "z"], ("a", "b"), n_cells=96)
    number = np.arange(made.n_cells)
    split, donor = np.where(number % 3, "train", "test"), np.where(number % 2, "d1", "d0")
    return replace(made, obs=made.obs.assign(split=split, donor_id=donor, row=number))


def other_counts(cells: Study, changed_C: np.ndarray) -> Study:
    """Give some cells counts that have nothing to do with anything."""
    counts = cells.counts["RNA"].toarray()
    counts[changed_C] = np.random.default_rng(5).poisson(6, counts[changed_C].shape)
    return replace(cells, counts={"RNA": csr_matrix(counts)})


def judged(cells: Study, settings: FoldSettings, method: Any) -> list[Value]:
    return perturb_suite(cells, make_folds(cells, settings), {"one": lambda seed: method}, seeds=range(2))


class Seen(TrainingMean):
    """Remembers what it is shown and what it says."""

    def __init__(self) -> None:
        super().__init__("RNA")
        self.learned: list[set[int]] = []
        self.shown: list[set[int]] = []
        self.said: list[np.ndarray] = []

    def fit(self, train: Study) -> Self:
        self.learned.append(set(train.obs["row"]))
        return super().fit(train)

    def predict(self, control: Study, perturbation: str, context: str) -> np.ndarray:
        self.shown.append(set(control.obs["row"]))
        self.said.append(super().predict(control, perturbation, context))
        return self.said[-1]


@pytest.mark.parametrize("settings", [SPLIT, DONOR, STIMULATED])
def test_no_cell_outside_the_held_groups_has_a_part_in_what_is_true(cells: Study, settings: FoldSettings) -> None:
    (fold,) = make_folds(cells, settings)
    plain = judged(cells, settings, ControlPasted("RNA"))
    assert {value.unit for value in plain} == {f"{name} | {context}" for name in "xyz" for context in "ab"}
    assert [repr(v) for v in judged(other_counts(cells, ~fold.group_C), settings, ControlPasted("RNA"))] == [
        repr(value) for value in plain
    ]
    changed = judged(other_counts(cells, fold.test_C), settings, ControlPasted("RNA"))
    assert all(
        one.value != other.value
        for one, other in zip(plain, changed, strict=True)
        if one.metric == "expr_mse_unbiased_capped"
    )


@pytest.mark.parametrize("settings", [SPLIT, DONOR, STIMULATED, FoldSettings(by="target", folds=2)])
def test_nobody_learns_from_a_cell_that_is_the_truth(cells: Study, settings: FoldSettings) -> None:
    folds = make_folds(cells, settings)
    method = Seen()
    judged(cells, settings, method)
    plain_C = cells.label("perturbation") == "control"
    assert len(method.learned) == 2 * len(folds)
    for number, learned in enumerate(method.learned):
        fold = folds[number % len(folds)]
        assert not learned & set(np.flatnonzero(fold.test_C))
        controls = plain_C & fold.train_C & (fold.group_C | (not (fold.group_C & plain_C).any()))
        assert len(learned & set(np.flatnonzero(controls))) == controls.sum() / 2
        assert learned >= set(np.flatnonzero(fold.train_C & ~controls))
    first = method.learned[0]
    hidden_C = folds[0].train_C & ~np.isin(np.arange(cells.n_cells), list(first))
    again = Seen()
    values = perturb_suite(other_counts(cells, hidden_C), folds[:1], {"one": lambda seed: again}, seeds=[0])
    n_asked = len(again.said)
    assert n_asked
    np.testing.assert_array_equal(np.stack(again.said), np.stack(method.said[:n_asked]))
    before = perturb_suite(cells, folds[:1], {"one": lambda seed: Seen()}, seeds=[0])
    if hidden_C.any():
        assert [repr(one) for one in values] != [repr(one) for one in before], "they are what is true"


def test_a_method_is_shown_the_controls_that_it_may_learn_from(cells: Study) -> None:
    method = Seen()
    (fold, *_) = folds = make_folds(cells, FoldSettings(by="target", folds=2))
    perturb_suite(cells, folds[:1], {"one": lambda seed: method}, seeds=[0])
    plain = set(np.flatnonzero(cells.label("perturbation") == "control"))
    assert fold.train_C[sorted(plain)].all()
    assert set.union(*method.shown) == method.learned[0] & plain


def test_an_effect_is_a_unit_in_each_donor_and_one_unit_where_the_same_cells_are_held_out_twice(cells: Study) -> None:
    donors = FoldSettings(by="donor_id", where={"perturbation": ("x", "y", "z")})
    found = judged(cells, donors, ControlPasted("RNA"))
    assert {value.unit for value in found} == {
        f"{name} | {where} | {donor}" for name in "xyz" for where in "ab" for donor in ("d0", "d1")
    }
    assert {value.unit for value in found if value.metric in METRICS} == {value.unit for value in found}
    pairs = perturbed(["x", "y", "x+y"], ("a",), n_cells=40)
    twice = judged(pairs, FoldSettings(by="target", folds=2), ControlPasted("RNA"))
    assert {value.unit for value in twice} == {"x | a", "y | a", "x+y | a"}


def test_where_the_held_groups_lack_controls_the_others_of_the_context_judge(cells: Study) -> None:
    plain_C, mine_C = cells.label("perturbation") == "control", cells.label("donor_id") == "d1"
    without = cells.take(~(plain_C & mine_C))
    without = replace(without, obs=without.obs.assign(row=np.arange(without.n_cells)))
    method = Seen()
    found = judged(without, DONOR, method)
    assert {value.unit for value in found} == {f"{name} | {context}" for name in "xyz" for context in "ab"}
    left = np.flatnonzero(without.label("perturbation") == "control")
    assert [len(learned & set(left)) for learned in method.learned] == [len(left) / 2] * 2


def test_effects_that_hold_for_training_cells_alone_are_not_called_right(cells: Study) -> None:
    """Of the same name and context, the test cells do something else: what training cells do is wrong for them."""
    number = cells.obs["split"].map({"train": 0, "test": 1}).to_numpy()
    turned = {"x": "y", "y": "z", "z": "x", "control": "control"}
    label = np.array([turned[one] if at else one for one, at in zip(cells.label("perturbation"), number, strict=True)])
    mixed = replace(cells, obs=cells.obs.assign(perturbation=label))

    class Same(TrainingMean):
        def predict(self, control: Study, perturbation: str, context: str) -> np.ndarray:
            return np.asarray(self.single(perturbation, context))

    reached = {}
    for name, study in (("alike", cells), ("turned", mixed)):
        found = judged(study, SPLIT, Same("RNA"))
        for method in ("one", REPLICATE):
            told = [value.value for value in found if (value.method, value.metric) == (method, "pds_cosine")]
            reached[name, method] = float(np.mean(told))
    assert reached["alike", "one"] == reached["alike", REPLICATE] == reached["turned", REPLICATE] == 1
    assert reached["turned", "one"] < 0.5


def test_a_head_learns_from_the_same_cells_as_the_baselines(cells: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []
    monkeypatch.setattr(GatedEffects, "fit", lambda self, train: learned.append(set(train.obs["row"])) or self)
    monkeypatch.setattr(GatedEffects, "predict", lambda self, control, *asked: np.zeros(60))
    monkeypatch.setattr(GatedEffects, "interval", lambda self, *asked, level: (np.zeros(60), np.zeros(60)))
    method = Seen()
    methods = {"mean": lambda seed: method, "head": lambda seed: GatedEffects("RNA")}
    perturb_suite(cells, make_folds(cells, STIMULATED), methods, seeds=range(2))
    assert learned == method.learned


def test_cells_that_are_halved_apart_are_halved_evenly(cells: Study) -> None:
    apart_C = np.arange(cells.n_cells) % 3 == 0
    one_C, other_C = halves(cells, ["cell_type"], 0, apart_C)
    assert (one_C ^ other_C).all()
    for name in ("control", "x"):
        for part_C in (apart_C, ~apart_C):
            for context in "ab":
                here_C = part_C & (cells.label("perturbation") == name) & (cells.label("cell_type") == context)
                assert abs(int((one_C & here_C).sum()) - int((other_C & here_C).sum())) <= 1
    np.testing.assert_array_equal(halves(cells, [], 1, np.ones(cells.n_cells, bool))[0], halves(cells, [], 1)[0])
