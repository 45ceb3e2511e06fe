"""The transition head: still at the start, a set at a time, shut unless it gains, right where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, hstack
from studies import going_round, perturbed, switched_off

from store.errors import InputRefused
from train.attention import Segments
from train.evaluation import gatedtime
from train.evaluation.conformal import group_quantile
from train.evaluation.effects import effects
from train.evaluation.floor import TrainingMean, effect_floor
from train.evaluation.flow import FlowSettings, Passage, fit_flow
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.gated import GatedEffects, TargetVectors, _deal, needed
from train.evaluation.gatedtime import GatedForecast
from train.evaluation.study import Study
from train.evaluation.suites import energy_distance
from train.transition import Transition, TransitionConfig

QUICK = FlowSettings(steps=20)


def test_nothing_moves_before_it_has_learned() -> None:
    network = Transition(TransitionConfig(n_latent=3, n_condition=2, n_numbers=1))
    start = torch.randn(5, 3)
    shift = network.move(start, torch.randn(2, 2), torch.ones(2, 1), Segments.of(torch.tensor([2, 3])))
    assert torch.equal(shift, torch.zeros(5, 3))


def test_sets_do_not_see_each_other_and_their_cells_have_no_order() -> None:
    torch.manual_seed(0)
    network = Transition(TransitionConfig(n_latent=3, n_condition=2))
    torch.nn.init.normal_(network.out.weight)
    start, condition, number = torch.randn(7, 3), torch.randn(2, 2), torch.zeros(2, 0)
    both = network.move(start, condition, number, Segments.of(torch.tensor([4, 3])))
    alone = network.move(start[4:], condition[1:], number[1:], Segments.of(torch.tensor([3])))
    torch.testing.assert_close(both[4:], alone)
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6])
    torch.testing.assert_close(
        network.move(start[order], condition, number, Segments.of(torch.tensor([4, 3]))), both[order]
    )
    fewer = network.move(start[:2], condition[:1], number[:1], Segments.of(torch.tensor([2])))
    assert not torch.allclose(fewer, both[:2])  # cells do read the others of their set


def test_a_flow_learns_where_each_condition_leads_and_is_the_same_for_a_seed() -> None:
    rng = np.random.default_rng(0)
    where = {-1.0: np.array([2.0, 0.0]), 1.0: np.array([0.0, -3.0])}
    passages = [
        Passage(rng.normal(size=(80, 2)), rng.normal(size=(80, 2)) + shift, np.array([said]), np.zeros(0))
        for said, shift in where.items()
    ]
    flow = fit_flow(passages, FlowSettings(steps=150), seed=1)
    again = fit_flow(passages, FlowSettings(steps=150), seed=1)
    start = rng.normal(size=(200, 2))
    for said, shift in where.items():
        moved = flow.move(start, np.array([said]), np.zeros(0))
        np.testing.assert_allclose(moved.mean(axis=0), shift, atol=0.35)
        np.testing.assert_array_equal(moved, again.move(start, np.array([said]), np.zeros(0)))


def held_out(study: Study, by: str, folds: int = 3) -> tuple[Study, Study]:
    fold = make_folds(study, FoldSettings(by=by, folds=folds))[0]
    return study.take(fold.train_C), study.take(fold.test_C | np.isin(study.label("perturbation"), ["control"]))


def errors(method: GatedEffects, train: Study, test: Study) -> tuple[float, float, float]:
    """Squared error of the head and of its baseline, and the share of features inside the 90 % intervals."""
    truth, mine, its, inside = effects(test, "RNA"), [], [], []
    for line, (name, where) in enumerate(zip(truth.perturbation, truth.context, strict=True)):
        at = (test.label("cell_type") == where) & (test.label("perturbation") == "control")
        control, delta_G = test.take(at), truth.delta_EG[line]
        low_G, high_G = method.interval(control, name, where)  # around what it predicts
        mine.append((((low_G + high_G) / 2 - delta_G) ** 2).mean())
        its.append(((method.baseline.predict(control, name, where) - delta_G) ** 2).mean())
        inside.append(((low_G <= delta_G) & (delta_G <= high_G)).mean())
    return float(np.mean(mine)), float(np.mean(its)), float(np.mean(inside))


def test_the_head_learns_what_no_baseline_can_say_of_targets_never_seen() -> None:
    study, sets = switched_off()
    train, test = held_out(study, "target")
    method = GatedEffects(
        "RNA",
        targets=TargetVectors(sets),
        candidates=effect_floor("RNA", ("cell_type",), sets),
        settings=FlowSettings(steps=150),
        seed=0,
    ).fit(train)
    assert method.gate.g > 0.3
    assert method.gate.gain > needed(16)
    assert method.gate.baseline == "bilinear ridge on knowledge"
    assert method.gate.errors[method.gate.baseline] == min(method.gate.errors.values())
    control = test.take(test.label("perturbation") == "control")
    told = [one.predict(control, "nobody knows it", "c0") for one in (method, method.baseline)]
    np.testing.assert_array_equal(*told)  # out of support: the flow abstains
    mine, its, inside = errors(method, train, test)
    assert mine < 0.6 * its
    assert 0.85 <= inside < 1  # each was calibrated with one flow, and is predicted with five


def test_a_combination_is_known_only_where_each_of_its_targets_is() -> None:
    known = TargetVectors(given={"x": np.array([1.0, 2.0]), "y": np.array([0.5, -2.0])})
    assert known["x"].tolist() == [1, 2]
    assert known["x+y"].tolist() == [1.5, 0]
    for unknown in ("nobody knows it", "x+nobody knows it", "nobody knows it+x", "x+y+nobody knows it"):
        assert known[unknown].tolist() == [0, 0], unknown


def test_an_open_flow_abstains_of_a_combination_with_a_target_that_nobody_knows() -> None:
    study, sets = switched_off(n_targets=8, n_contexts=1, n_cells=15)
    method = GatedEffects("RNA", targets=TargetVectors(sets), settings=QUICK).fit(study)
    object.__setattr__(method.gate, "g", 0.7)  # whether it opens is another test's question
    control = study.take(study.label("perturbation") == "control")
    for name, abstains in (("t0+t1", False), ("t0+nobody knows it", True), ("nobody knows it+t0", True)):
        told = [one.predict(control, name, "c0") for one in (method, method.baseline)]
        assert np.array_equal(*told) == abstains, name


def test_where_nothing_can_be_learned_the_answer_is_the_baselines_bit_for_bit() -> None:
    study = perturbed([f"t{number}" for number in range(9)], n_cells=30)
    train, test = held_out(study, "target")
    method = GatedEffects("RNA", settings=QUICK).fit(train)
    assert method.gate.g == 0
    alone = next(one for one in effect_floor("RNA") if one.name == method.gate.baseline).fit(train)
    control = test.take(test.label("perturbation") == "control")
    for name in ("t0", "never seen", "t1+t2"):
        expected = alone.predict(control, name, "a")
        assert method.predict(control, name, "a").tobytes() == expected.tobytes()


def test_shuffled_labels_shut_the_gate() -> None:
    study, sets = switched_off(n_targets=12, n_cells=20)
    rng, perturbation = np.random.default_rng(3), study.label("perturbation").copy()
    for context in set(study.label("cell_type")):
        rows = np.flatnonzero((study.label("cell_type") == context) & (perturbation != "control"))
        perturbation[rows] = rng.permutation(perturbation[rows])
    shuffled = Study(study.counts, study.features, study.obs.assign(perturbation=perturbation))
    method = GatedEffects("RNA", targets=TargetVectors(sets), settings=FlowSettings(steps=80)).fit(shuffled)
    assert method.gate.g == 0


def test_two_groups_choose_a_baseline_but_open_no_gate_and_one_group_is_refused() -> None:
    study = perturbed(["x", "y"])
    method = GatedEffects("RNA", settings=QUICK, candidates=[TrainingMean("RNA")]).fit(study)
    assert (method.gate.baseline, method.gate.g) == ("training mean", 0.0)
    control = study.take(study.label("perturbation") == "control")
    low_G, high_G = method.interval(control, "x", "a")
    assert np.isinf(low_G).all()
    assert np.isinf(high_G).all()
    with pytest.raises(InputRefused, match="two groups to hold out in turn; there is x"):
        GatedEffects("RNA").fit(study.take(study.label("perturbation") != "y"))


def test_a_target_that_is_in_every_perturbation_is_refused_by_name_and_taken_by_perturbation() -> None:
    study = perturbed([f"x+t{number}" for number in range(6)], contexts=("a",), n_cells=20)
    with pytest.raises(InputRefused, match=r'without x none of the 6 effects is left .* by "perturbation"'):
        GatedEffects("RNA", settings=QUICK).fit(study)
    with pytest.raises(InputRefused, match="without x none of the 1 effects is left"):
        GatedEffects("RNA", settings=QUICK).fit(study.take(np.isin(study.label("perturbation"), ["control", "x+t0"])))
    head = GatedEffects("RNA", by="perturbation", settings=QUICK).fit(study)
    control = study.take(study.label("perturbation") == "control")
    assert np.isfinite(head.predict(control, "x+t9", "a")).all()


def test_targets_that_are_in_every_perturbation_together_are_held_out_apart() -> None:
    pairs = [f"{one}+t{number}" for one in "xy" for number in range(4)]
    groups = [frozenset(name.split("+")) for name in pairs]
    for seed in range(40):
        dealt_EJ = _deal(groups, seed)
        assert dealt_EJ.any(axis=1).all(), "every effect is held out"
        assert not dealt_EJ.all(axis=0).any(), "every fold leaves effects to learn from"
        for target in sorted(frozenset().union(*groups)):
            hit_E = np.array([target in group for group in groups])
            assert dealt_EJ[hit_E].all(axis=0).any(), "a target is held out whole"
    for seed in range(3):  # a fold of x and one of y leave nothing together
        head = GatedEffects("RNA", settings=QUICK, seed=seed).fit(perturbed(pairs, ("a",), n_cells=20))
        assert set(head.gate.errors) == {one.name for one in effect_floor("RNA")}
    never_two = [frozenset(name for name in "abcdefg" if name != missing) for missing in "abcdefg"]
    with pytest.raises(InputRefused, match="and the targets that are held out with it none of the 7 effects is left"):
        _deal(never_two, 0)


def test_no_flow_is_taught_where_two_folds_together_take_every_effect() -> None:
    study = perturbed(["x+y", "y+z", "x+z"], ("a",), n_cells=20)
    head = GatedEffects("RNA", settings=QUICK).fit(study)
    assert head.fold_EJ.shape == (3, 3)
    assert (head.gate.g, head.gate.gain) == (0.0, 0.0)
    control = study.take(study.label("perturbation") == "control")
    expected = head.baseline.predict(control, "x+y", "a")
    assert head.predict(control, "x+y", "a").tobytes() == expected.tobytes()


def test_features_that_nobody_has_do_not_make_intervals_narrower() -> None:
    study = perturbed([f"t{number}" for number in range(12)], contexts=("a",), n_cells=20)
    empty = hstack([study.counts["RNA"], csr_matrix((study.n_cells, 200), dtype=np.float32)]).tocsr()
    names = [*study.features["RNA"], *(f"none{number}" for number in range(200))]
    wide = Study({"RNA": csr_matrix(empty)}, {"RNA": names}, study.obs)
    both = [
        GatedEffects("RNA", settings=QUICK, candidates=[TrainingMean("RNA")]).fit(one).interval(one, "q", "a", 0.8)
        for one in (study, wide)
    ]
    for plain_G, wider_G in zip(*both, strict=True):
        np.testing.assert_allclose(wider_G[:60], plain_G, rtol=1e-6)
    assert np.isfinite(both[1][0]).all()


def test_over_time_the_head_goes_round_where_baselines_cut_the_corner() -> None:
    study = going_round()
    held = sorted(set(study.obs["time"]))[6]
    train, truth = (
        study.take((study.obs["time"] != held).to_numpy()),
        study.take((study.obs["time"] == held).to_numpy()),
    )
    method = GatedForecast("RNA", settings=FlowSettings(steps=150)).fit(train)
    assert (method.gate.baseline, method.gate.g > 0) == ("OT midpoint", True)
    pca, chosen = method.pca.pca, method.pca.features.chosen
    true = pca.transform(truth.logs("RNA")[:, chosen].toarray())
    mine, its = (
        energy_distance(pca.transform(sample[:500][:, chosen].toarray()), true)
        for sample in (method.predict(held), method.baseline.predict(held))
    )
    assert mine < 0.5 * its


def test_with_few_times_the_forecast_is_the_baselines() -> None:
    study = going_round(n_times=4)
    method = GatedForecast("RNA", settings=QUICK).fit(study)
    assert method.gate.g == 0
    assert (method.predict(8.0) != method.baseline.predict(8.0)).nnz == 0


def test_a_time_of_many_cells_is_judged_by_some_drawn_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatedtime, "MOST_CELLS", 20)
    study = going_round(n_times=4, n_cells=60)
    method = GatedForecast("RNA", settings=QUICK).fit(study)
    for time in method.times[1:-1]:
        all_CK = method.pca.embed(study.take((study.obs["time"] == time).to_numpy()))
        looked_at = [int(np.abs(all_CK - row).sum(axis=1).argmin()) for row in method._truth(float(time))]
        assert len(set(looked_at)) == 20
        assert 3 < sum(place < 20 for place in looked_at) < 17, "neither the first twenty nor the last"


def test_a_group_counts_once_however_many_cells_it_has() -> None:
    scores, groups = np.array([1.0, 2.0, 3.0, 4.0, 9.0]), ["a", "a", "b", "c", "c"]
    # weights: 1/8 1/8 1/4 1/8 1/8, and 1/4 at infinity
    assert group_quantile(scores, groups, 0.25) == 2.0
    assert group_quantile(scores, groups, 0.5) == 3.0
    assert group_quantile(scores, groups, 0.75) == 9.0
    assert group_quantile(scores, groups, 0.76) == np.inf
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert group_quantile(rows, ["a", "b", "c"], 0.7) == 6.0
