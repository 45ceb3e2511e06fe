"""Baselines against answers worked out by hand or planted in made-up cells; scores against arithmetic on paper."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, random_array
from scipy.stats import ttest_1samp, ttest_rel
from studies import FEATURES, perturbed, study

from store.errors import InputRefused, UsageError
from train.evaluation.cellfloor import (
    Forecaster,
    PrincipalComponents,
    annotation_floor,
    forecast_floor,
    translation_floor,
)
from train.evaluation.effects import Effects, effects, profile
from train.evaluation.floor import (
    Additive,
    BilinearRidge,
    ContextMean,
    ControlPasted,
    KnowledgeNeighbours,
    SameElsewhere,
    Shrunken,
    ShrunkenAdditive,
    TrainingMean,
    effect_floor,
)
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.gated import TargetVectors
from train.evaluation.judge import by_seed
from train.evaluation.perturb import CAPPED, METRICS, TOLD_APART, perturb_suite
from train.evaluation.score import REPLICATE, Value, fieller, holm, score
from train.evaluation.study import Study
from train.evaluation.suites import forecast_suite


@pytest.fixture(scope="module")
def cells() -> Study:
    return perturbed(["x", "y", "z", "x+y"])


def test_an_effect_is_the_difference_of_pseudobulk_profiles(cells: Study) -> None:
    found = effects(cells, "RNA")
    assert found.n_effects == 8
    line = [*zip(found.perturbation, found.context, strict=True)].index(("x", "b"))
    here = cells.label("cell_type") == "b"
    counts = cells.counts["RNA"].toarray()
    total = counts[here & (cells.label("perturbation") == "x")].sum(0)
    np.testing.assert_allclose(found.treated_EG[line], np.log1p(1e4 * total / total.sum()))
    assert found.n_cells[line] == 60
    with pytest.raises(InputRefused, match="no perturbation has 8 with RNA beside as many controls"):
        effects(cells.take(cells.label("perturbation") != "control"), "RNA")


def test_baselines_say_what_they_are_named_after(cells: Study) -> None:
    train = cells.take(cells.label("perturbation") != "x+y")
    known = effects(train, "RNA")
    delta = {
        key: d
        for *key, d in zip(known.perturbation, known.context, known.delta_EG, strict=True)
        for key in [tuple(key)]
    }
    control = cells.take(cells.label("perturbation") == "control")

    def said(kind: type, perturbation: str, context: str) -> np.ndarray:
        return np.asarray(kind("RNA").fit(train).predict(control, perturbation, context))

    assert not said(ControlPasted, "x+y", "a").any()
    np.testing.assert_allclose(said(TrainingMean, "q", "a"), known.delta_EG.mean(0))
    in_a = np.mean([d for (_, context), d in delta.items() if context == "a"], axis=0)
    np.testing.assert_allclose(said(ContextMean, "q", "a"), in_a)
    np.testing.assert_allclose(said(Additive, "x+y", "a"), delta["x", "a"] + delta["y", "a"])
    elsewhere = SameElsewhere("RNA").fit(train.take(train.label("cell_type") == "a")).predict(control, "x", "b")
    np.testing.assert_allclose(elsewhere, delta["x", "a"])


def test_a_mean_is_trusted_as_far_as_effects_agree_and_a_target_as_far_as_its_cells_do(cells: Study) -> None:
    train = cells.take(cells.label("perturbation") != "x+y")
    known = effects(train, "RNA")
    one = known.take(np.array([key == ("x", "a") for key in zip(known.perturbation, known.context, strict=True)]))
    same = replace(
        known,
        treated_EG=known.control_EG + one.delta_EG,
        noise_E=np.zeros(known.n_effects),
        control_noise_E=np.zeros(known.n_effects),
    )
    np.testing.assert_allclose(Shrunken("RNA").learn(same).predict(train, "q", "a"), one.delta_EG[0], atol=1e-12)
    opposed_EG = np.resize([[1.0], [-1.0]], (known.n_effects, 1)) * np.random.default_rng(0).normal(size=len(FEATURES))
    opposed = replace(same, treated_EG=known.control_EG + opposed_EG)
    nothing = Shrunken("RNA").learn(opposed)
    assert not nothing.predict(train, "q", "a").any()
    delta = dict(zip(zip(opposed.perturbation, opposed.context, strict=True), opposed_EG, strict=True))
    np.testing.assert_allclose(nothing.predict(train, "x+z", "a"), delta["x", "a"] + delta["z", "a"], rtol=1e-9)
    noisy = replace(opposed, noise_E=np.full(known.n_effects, 1e9))
    assert not Shrunken("RNA").learn(noisy).predict(train, "x+z", "a").any()
    quarter, tenth = (np.array([share * float((one.delta_EG**2).mean())]) for share in (0.25, 0.1))
    alone = Shrunken("RNA").learn(replace(one, noise_E=quarter, control_noise_E=tenth))
    np.testing.assert_allclose(alone.predict(train, "q", "a"), 0.65 * one.delta_EG[0])


def made_effects(
    common: float, apart: float, noise: float, of_controls: float, contexts: int, seed: int
) -> tuple[Effects, np.ndarray]:
    """Twelve effects in each context, whose controls' noise is in all of them; treated_EG less that is the truth."""
    random, n_features = np.random.default_rng(seed), 2000
    mean_G = random.normal(0, common, n_features)
    true_EG = mean_G + random.normal(0, apart, (12 * contexts, n_features))
    where = np.repeat(np.arange(contexts), 12)
    control_EG = random.normal(0, of_controls, (contexts, n_features))[where]
    made = Effects(
        tuple(f"t{number}" for number in range(len(where))),
        tuple(f"c{one}" for one in where),
        control_EG,
        true_EG + random.normal(0, noise, true_EG.shape),
        np.full(len(where), 50),
        np.full(len(where), noise**2),
        np.full(len(where), of_controls**2),
        tuple(f"g{number}" for number in range(n_features)),
    )
    return made, true_EG


@pytest.mark.parametrize("contexts", [1, 2, 12])
@pytest.mark.parametrize(("common", "apart"), [(0.0, 0.1), (0.3, 0.1), (1.0, 0.3)])
def test_the_noise_of_controls_is_no_effect(common: float, apart: float, contexts: int) -> None:
    """Shares that are kept are those that make the error least, of an unseen target and of those that were seen."""
    known, true_EG = made_effects(common, apart, 0.2, 0.4, contexts, 0)
    method = Shrunken("RNA").learn(known)
    mean_G, measured_G = np.asarray(method.predict(None, "q", "c0")), known.delta_EG.mean(axis=0)
    best = max(0.0, float((measured_G @ true_EG.mean(axis=0)) / (measured_G @ measured_G)))
    assert float((mean_G @ measured_G) / (measured_G @ measured_G)) == pytest.approx(best, abs=0.07)
    if not common:
        assert (mean_G**2).mean() < 0.1 * (measured_G**2).mean()
    told, ideal = [], []
    for line, name in enumerate(known.perturbation):
        beyond_G, wanted_G = known.delta_EG[line] - mean_G, true_EG[line] - mean_G
        told.append(((np.asarray(method.predict(None, name, "c0")) - true_EG[line]) ** 2).mean())
        weight = max(0.0, float((beyond_G @ wanted_G) / (beyond_G @ beyond_G)))
        ideal.append(((weight * beyond_G - wanted_G) ** 2).mean())
    assert np.mean(told) < 1.03 * np.mean(ideal)


def test_the_shrunken_additive_keeps_the_mean_whole_and_of_what_is_known_what_is_no_noise() -> None:
    known, true_EG = made_effects(0.0, 0.3, 0.2, 0.4, 1, 0)
    measured_G = known.delta_EG.mean(axis=0)  # nothing is common but their controls' error
    told, mean = (kind("RNA").learn(known) for kind in (ShrunkenAdditive, TrainingMean))
    np.testing.assert_array_equal(told.predict(None, "q", "c0"), mean.predict(None, "q", "c0"))
    beyond = [told.predict(None, name, "c0") - measured_G for name in ("t0", "t1")]
    for line, beyond_G in enumerate(beyond):
        apart_G = known.delta_EG[line] - measured_G
        assert float(beyond_G @ apart_G / (apart_G @ apart_G)) == pytest.approx(0.3**2 / (0.3**2 + 0.2**2), abs=0.04)
    np.testing.assert_allclose(told.predict(None, "t0+t1", "c0"), measured_G + sum(beyond))
    both_G = true_EG[0] + true_EG[1] - known.control_EG[0]  # beside the same controls
    error = {
        one.name: float(((one.learn(known).predict(None, "t0+t1", "c0") - both_G) ** 2).mean())
        for one in (ShrunkenAdditive("RNA"), Shrunken("RNA"), Additive("RNA"), TrainingMean("RNA"))
    }
    assert min(error, key=lambda name: error[name]) == "shrunken additive", error


def test_a_mean_of_perturbations_that_do_nothing_is_not_kept() -> None:
    for n_controls in (20, 200):
        counts = study(
            pd.DataFrame({"perturbation": ["control"] * n_controls + [f"t{n // 40}" for n in range(800)]}),
            np.full((n_controls + 800, 60), 5.0) * np.random.default_rng(1).uniform(0.2, 2, 60),
        )
        method = Shrunken("RNA").fit(counts)
        assert (method.mean_G**2).sum() < 0.1 * (method.training_mean**2).sum()
    few = counts.take(np.arange(n_controls - 7, counts.n_cells))
    with pytest.raises(InputRefused, match="no perturbation has 8 with RNA beside as many controls"):
        effects(few, "RNA")


def test_targets_are_found_by_what_people_call_features_as_by_their_ids() -> None:
    hit = FEATURES[:6]
    named = perturbed(hit, ("a",))
    ids = [f"ENSG{number:011d}" for number in range(len(FEATURES))]
    called = replace(named, features={"RNA": ids}, called={"RNA": FEATURES})
    assert called.take(np.arange(5)).places("RNA") == named.places("RNA") | {
        name: place for place, name in enumerate(ids)
    }
    folds = make_folds(named, FoldSettings(by="target", folds=2))
    methods = {"ridge": lambda seed: BilinearRidge("RNA"), "mean": lambda seed: TrainingMean("RNA")}
    one, other = (perturb_suite(study, folds, methods, seeds=[0]) for study in (named, called))
    assert [replace(value, value=0.0) for value in one] == [replace(value, value=0.0) for value in other]
    np.testing.assert_allclose([value.value for value in one], [value.value for value in other], rtol=1e-9)
    ridge, mean = ([value.value for value in other if value.method == name] for name in methods)
    assert ridge != mean, "it knows the targets' own genes"
    twice = replace(called, called={"RNA": ["same", "same", *FEATURES[2:]]})
    assert "same" not in twice.places("RNA"), "what two are called names neither"
    told = TargetVectors().beside(effects(called, "RNA").places, np.arange(120.0).reshape(60, 2))
    assert told[FEATURES[3]].tolist() == told[ids[3]].tolist() != [0, 0]


def test_a_replicate_of_a_perturbation_that_stands_alone_is_as_good_as_noise_allows() -> None:
    alone = perturbed(["x"], tuple("abcdef"), n_cells=80)
    folds = make_folds(alone, FoldSettings(by="cell_type"))
    found = perturb_suite(alone, folds, {"mean": lambda seed: TrainingMean("RNA")}, seeds=range(4))
    error = {
        name: np.mean([value.value for value in found if (value.method, value.metric) == (name, CAPPED)])
        for name in (REPLICATE, "mean")
    }
    assert abs(error[REPLICATE]) < 0.3 * error["mean"], "with a cap it were larger than that of the mean"
    assert all(math.isnan(value.value) for value in found if value.metric == TOLD_APART)


def test_noise_of_an_effect_is_the_sampling_variance_of_its_profile() -> None:
    made = perturbed(["x"], ("a",), n_cells=2000)
    label = [f"x{number % 40}" if one == "x" else one for number, one in enumerate(made.label("perturbation"))]
    found = effects(Study(made.counts, made.features, made.obs.assign(perturbation=label)), "RNA")
    assert found.n_effects == 40
    assert found.noise_E.mean() == pytest.approx(found.treated_EG.var(axis=0, ddof=1).mean(), rel=0.1)
    alike = perturbed(["control"], tuple("a"), n_cells=1000)
    again = alike.obs.assign(perturbation=np.where(np.arange(2000) % 2, "x", "control"), cell_type="a")
    dealt = again.assign(cell_type=[f"c{number // 2 % 25}" for number in range(2000)])
    told = effects(Study(alike.counts, alike.features, dealt), "RNA")
    assert told.control_noise_E.mean() == pytest.approx(told.control_EG.var(axis=0, ddof=1).mean(), rel=0.15)


def test_bilinear_ridge_recovers_effects_that_follow_vectors_given_for_targets() -> None:
    rng = np.random.default_rng(1)
    vectors = {f"t{number}": rng.normal(size=3) for number in range(24)}
    mix = rng.normal(size=(3, len(FEATURES))) * 0.6
    base = rng.uniform(20, 60, len(FEATURES))
    lines, rates = [], []
    for name, vector in [("control", np.zeros(3)), *vectors.items()]:
        lines += [{"perturbation": name, "cell_type": "a"}] * 40
        rates += [base * np.exp(vector @ mix)] * 40
    made = study(pd.DataFrame(lines), np.array(rates))
    held = [f"t{number}" for number in range(6)]
    train = made.take(~np.isin(made.label("perturbation"), held))
    truth = effects(made, "RNA")

    def error(method: object) -> float:
        predicted = [method.predict(made, name, "a") for name in held]  # type: ignore[attr-defined]
        real = [truth.delta_EG[truth.perturbation.index(name)] for name in held]
        return float(np.mean((np.array(predicted) - np.array(real)) ** 2))

    ridge = BilinearRidge("RNA", vectors=vectors).fit(train)
    assert error(ridge) < 0.3 * error(TrainingMean("RNA").fit(train))
    np.testing.assert_allclose(ridge.predict(made, "nobody", "a"), ridge.training_mean)


def test_knowledge_neighbours_copy_targets_of_the_same_sets(cells: Study) -> None:
    train = cells.take(~np.isin(cells.label("perturbation"), ["z", "x+y"]))
    like = KnowledgeNeighbours("RNA", {"s1": ["z", "x"], "s2": ["y", "w"]}, neighbours=1).fit(train)
    np.testing.assert_allclose(like.predict(cells, "z", "a"), like.single("x", "a"))
    np.testing.assert_allclose(like.predict(cells, "unheard", "a"), like.training_mean)


# ----------------------------------------------------------------------------------------------------------- scores
def values(**by_method: list[float]) -> list[Value]:
    return [
        Value(method.replace("_", " "), "m", f"u{number}", 0, value)
        for method, line in by_method.items()
        for number, value in enumerate(line)
    ]


def test_a_score_is_ours_between_the_strongest_baseline_and_the_replicate() -> None:
    found = values(weak=[0, 0, 0, 0], strong=[1, 1.1, 0.9, 1], replicate=[2, 2.1, 2, 1.9], ours=[1.5, 1.6, 1.4, 1.5])
    (one,) = score(found, {"m": "higher"}, "ours")
    assert one.b_method == "strong"
    assert one.s == pytest.approx(0.5)
    assert one.verdict == "above"
    assert one.low > 0
    (turned,) = score([replace(v, value=-v.value) for v in found], {"m": "lower"}, "ours")
    assert (turned.s, turned.b_method) == (pytest.approx(0.5), "strong")
    (floor_only,) = score(found, {"m": "higher"})
    assert floor_only.verdict == "not told apart" or floor_only.verdict == "floor only"


def test_a_metric_whose_replicate_does_not_beat_the_floor_gets_no_score() -> None:
    found = values(strong=[1, 2, 3, 4], replicate=[1.5, 1.7, 3.2, 3.8], ours=[9, 9, 9, 9])
    (one,) = score(found, {"m": "higher"}, "ours")
    assert one.gate < 2
    assert math.isnan(one.s)
    assert one.verdict == "not informative"
    (few,) = score(values(strong=[1, 1], replicate=[9, 9], ours=[5, 5]), {"m": "higher"}, "ours")
    assert few.verdict == "too few units"


def test_worse_than_the_floor_is_said() -> None:
    found = values(strong=[1, 1.1, 0.9, 1], replicate=[2, 2.1, 2, 1.9], ours=[0.5, 0.6, 0.4, 0.5])
    (one,) = score(found, {"m": "higher"}, "ours")
    assert one.verdict == "below"
    assert one.s == pytest.approx(-0.5)


def test_units_that_a_method_lacks_count_for_none() -> None:
    found = values(strong=[1, 1, 1, 1], replicate=[2, 2, 2, 2], ours=[1.5, 1.5, 1.5, math.nan])
    (one,) = score(found, {"m": "higher"}, "ours")
    assert one.n_units == 3
    with pytest.raises(InputRefused, match="needs a replicate"):
        score([v for v in found if v.method != REPLICATE], {"m": "higher"}, "ours")


def test_a_method_that_answers_nowhere_is_not_taken_for_nobody() -> None:
    found = values(strong=[1, 1, 1, 1], replicate=[2, 2, 2.1, 2], ours=[math.nan] * 4)
    (one,) = score(found, {"m": "higher"}, "ours")
    assert (one.verdict, one.n_units, one.b, math.isnan(one.u)) == ("no answer", 4, 1.0, True)
    (nobody,) = score(found, {"m": "higher"})
    assert nobody.verdict == "floor only"


def test_few_units_are_told_apart_no_more_often_than_chance_allows() -> None:
    for n_units in (3, 6):
        told = 0
        for number in range(300):
            b, noise, more = np.random.default_rng([n_units, number]).normal(0, 1, (3, n_units))
            found = values(base=list(b), ours=list(b + noise), replicate=list(b + 10 + more))
            told += score(found, {"m": "higher"}, "ours")[0].verdict != "not told apart"
        assert told <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_p_is_that_of_a_paired_t_test_and_an_interval_without_0_goes_with_it() -> None:
    random = np.random.default_rng(0)
    for shift in (-1.0, 0.0, 0.4, 2.0):
        base = random.normal(0, 3, 7)
        ours = base + shift + random.normal(0, 1, 7)
        found = values(base=list(base), ours=list(ours), replicate=list(base + 3 + random.normal(0, 1, 7)))
        (one,) = score(found, {"m": "higher"}, "ours")
        assert one.p == pytest.approx(ttest_rel(ours, base).pvalue)
        assert (one.low > 0, one.high < 0) == (one.verdict == "above", one.verdict == "below")
        assert one.low < one.s < one.high
    same = values(base=[1, 2, 3, 4], ours=[1, 2, 3, 4], replicate=[6, 8, 9, 9])
    (one,) = score(same, {"m": "higher"}, "ours")
    assert (one.s, one.low, one.high, one.p, one.verdict) == (0, 0, 0, 1, "not told apart")


@pytest.mark.parametrize("n_units", [3, 5, 20])
def test_an_interval_of_s_holds_the_truth_as_often_as_it_says(n_units: int) -> None:
    random = np.random.default_rng(n_units)
    inside = 0
    for _ in range(3000):
        base, one, other = random.normal(0, 1, (3, n_units))
        gain_U, lead_U = 1.2 + one - base, 2 + other - base
        low, high = fieller(gain_U, lead_U) if lead_U.mean() > 0 else (-math.inf, math.inf)
        inside += low <= 0.6 <= high
    assert 0.938 < inside / 3000 < (0.985 if n_units == 3 else 0.962), "of three units many intervals have no end"


def test_an_interval_of_s_is_what_a_t_test_does_not_refuse() -> None:
    random = np.random.default_rng(1)
    gain_U, lead_U = 1 + random.normal(0, 0.5, 6), 3 + random.normal(0, 1, 6)
    low, high = fieller(gain_U, lead_U)

    def chance(s: float) -> float:
        return float(ttest_1samp(gain_U - s * lead_U, 0).pvalue)

    assert [chance(low), chance(high)] == pytest.approx([0.05, 0.05])
    assert chance((low + high) / 2) > 0.05 > max(chance(low - 0.01), chance(high + 0.01))
    unsure_U = np.array([0.1, 0.3, 9.0])
    low, high = fieller(np.array([1.0, 1.1, 0.9]), unsure_U)
    assert (low > 0, high) == (True, math.inf), "better, but of nobody knows how much"
    assert ttest_1samp(np.array([1.0, 1.1, 0.9]) - low * unsure_U, 0).pvalue == pytest.approx(0.05)
    assert fieller(-np.array([1.0, 1.1, 0.9]), unsure_U) == (-math.inf, -low)
    assert fieller(np.array([1.0, -1.1, 0.9]), unsure_U) == (-math.inf, math.inf)


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, math.nan, 0.03])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, math.nan, 0.03])[3] == pytest.approx(0.06)
    assert math.isnan(holm([math.nan])[0])


# ------------------------------------------------------------------------------------------------------------ suites
def test_a_replicate_beats_every_baseline_where_effects_cannot_be_guessed() -> None:
    cells = perturbed([f"t{number}" for number in range(12)], contexts=("a",), n_cells=50)
    folds = make_folds(cells, FoldSettings(by="target", folds=2))
    methods = {one.name: (lambda seed, one=one: one) for one in effect_floor("RNA")}
    found = perturb_suite(cells, folds, methods, seeds=range(2))
    scores = {one.metric: one for one in score(found, METRICS)}
    assert scores["pds_cosine"].r > 0.9
    assert 0.3 < scores["pds_cosine"].b < 0.7
    assert all(one.gate > 2 for one in scores.values())
    assert {one.unit for one in found} == {f"t{number} | a" for number in range(12)}


def test_the_same_effect_elsewhere_is_found_in_a_new_context() -> None:
    cells = perturbed([f"t{number}" for number in range(8)], contexts=("a", "b"), n_cells=50)
    settings = FoldSettings(by="cell_type", held=("b",), where={"perturbation": tuple(f"t{n}" for n in range(8))})
    methods = {one.name: (lambda seed, one=one: one) for one in effect_floor("RNA")}
    found = perturb_suite(cells, make_folds(cells, settings), methods, seeds=[0])
    pds = {name: np.mean([v.value for v in found if v.method == name and v.metric == "pds_cosine"]) for name in methods}
    assert pds["same elsewhere"] > 0.9
    assert pds["training mean"] == pytest.approx(0.5, abs=0.01)


def two_types(n_cells: int = 240, seed: int = 0) -> Study:
    rng = np.random.default_rng(seed)
    types = np.array(["t", "u", "v"])[np.arange(n_cells) % 3]
    means = {name: rng.uniform(1, 12, len(FEATURES)) for name in "tuv"}
    proteins = {name: rng.uniform(5, 50, 8) for name in "tuv"}
    one = study(
        pd.DataFrame({"cell_type": types, "donor_id": [f"d{n % 5}" for n in range(n_cells)]}),
        np.array([means[name] for name in types]),
    )
    other = study(
        pd.DataFrame({"cell_type": types}), np.array([proteins[name] for name in types]), 1, [f"p{n}" for n in range(8)]
    )
    return Study(
        {"RNA": one.counts["RNA"], "protein": other.counts["RNA"]},
        {"RNA": one.features["RNA"], "protein": other.features["RNA"]},
        one.obs,
    )


def test_annotators_learn_types_and_are_fitted_on_training_cells_only() -> None:
    cells = two_types()
    train, test = cells.take(np.arange(120)), cells.take(np.arange(120, 240))
    accuracy = {}
    for method in annotation_floor("RNA"):
        method.fit(train)
        accuracy[method.name] = (method.predict(test) == test.label("cell_type").astype(str)).mean()
        np.testing.assert_allclose(method.predict_proba(test).sum(axis=1), 1)
    assert accuracy["logistic regression on PCs"] > 0.95
    assert accuracy["kNN on PCs"] > 0.9
    assert accuracy["most frequent"] < 0.5
    changed = Study(cells.counts, cells.features, cells.obs)
    twice = [PrincipalComponents("RNA").fit(one.take(np.arange(120))).embed(test) for one in (cells, changed)]
    np.testing.assert_array_equal(*twice)


def test_translators_know_what_goes_with_a_type() -> None:
    cells = two_types()
    train, test = cells.take(np.arange(120)), cells.take(np.arange(120, 240))
    truth = test.logs("protein").toarray()
    error = {
        method.name: float(((method.fit(train).predict(test) - truth) ** 2).mean())
        for method in translation_floor("RNA", "protein")
    }
    assert error["ridge on PCs"] < 0.5 * error["mean"]
    assert error["kNN on PCs"] < 0.5 * error["mean"]
    assert error["type mean"] < 0.5 * error["mean"]
    with pytest.raises(InputRefused, match="the cells have no ATAC; measurements: RNA, protein"):
        test.logs("ATAC")


def test_transport_lands_between_the_times_where_copies_do_not() -> None:
    rng = np.random.default_rng(0)
    early, late = rng.uniform(1, 6, 60), rng.uniform(1, 6, 60)
    times = np.repeat([0.0, 1.0, 2.0], 80)
    rates = np.stack([early + (late - early) * time / 2 for time in times]) * 5
    cells = study(pd.DataFrame({"time": times}), rates)
    train, truth = cells.take(times != 1.0), profile(cells.counts["RNA"][times == 1.0])
    distance = {}
    for method in forecast_floor("RNA"):
        sample = method.fit(train).predict(1.0)
        distance[method.name] = float(np.abs(np.asarray(sample.mean(axis=0)).ravel() - truth).mean())
    assert distance["OT midpoint"] < 0.6 * min(distance["copy of the time before"], distance["copy of the time after"])
    assert distance["both times"] < min(distance["copy of the time before"], distance["copy of the time after"])
    beyond = Forecaster("RNA", "transport").fit(train).predict(5.0)
    assert beyond.shape[0] == 80  # nothing after: the last time as it was
    with pytest.raises(InputRefused, match="way='backwards'"):
        Forecaster("RNA", "backwards")


def test_components_are_as_many_as_were_asked_for_or_as_the_cells_have() -> None:
    rng = np.random.default_rng(0)
    for n_cells, n_features, asked, given in ((100, 60, 20, 20), (100, 12, 20, 11), (9, 60, 20, 8)):
        counts = csr_matrix(rng.poisson(3, (n_cells, n_features)).astype(np.float32))
        cells = Study({"RNA": counts}, {"RNA": [*map(str, range(n_features))]}, pd.DataFrame(index=range(n_cells)))
        assert PrincipalComponents("RNA", components=asked).fit(cells).embed(cells).shape == (n_cells, given)


def test_both_times_stay_sparse() -> None:
    counts = random_array((600, 20_000), density=0.01, format="csr", dtype=np.float32, rng=np.random.default_rng(0))
    counts.data[:] = 1
    obs = pd.DataFrame({"time": np.repeat([0.0, 2.0], [200, 400])})
    method = Forecaster("RNA", "union").fit(
        Study({"RNA": csr_matrix(counts)}, {"RNA": [*map(str, range(20_000))]}, obs)
    )
    tracemalloc.start()
    both = method.predict(1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 600 * 20_000 * 4 / 10
    assert both.shape == (600, 20_000)
    assert (both[:200] != method.logs[0.0]).nnz == (both[200:] != method.logs[2.0]).nnz == 0


def test_forecasts_are_judged_by_a_fair_part_of_the_cells_of_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    n_cells = 400
    one, other = np.zeros((2, 30)), np.zeros((2, 30))
    one[0, :15] = other[1, 15:] = 20
    rates = np.repeat(np.concatenate([one[:1], other[1:]]), n_cells, axis=0) + 1  # all of one kind, then of the other
    obs = pd.DataFrame({"time": [0.0, 1.0] * n_cells})
    cells = Study(
        {"RNA": csr_matrix(np.random.default_rng(0).poisson(rates).astype(np.float32))},
        {"RNA": [*map(str, range(30))]},
        obs,
    )
    seen = []
    monkeypatch.setattr("train.evaluation.suites.MOST_CELLS", 40)
    monkeypatch.setattr("train.evaluation.suites.energy_distance", lambda *pair: seen.append(pair) or 0.0)
    folds = make_folds(cells, FoldSettings(by="time", held=("1.0",)))
    forecast_suite(cells, folds, by_seed(lambda seed: forecast_floor("RNA", seed)), seeds=range(1))
    assert len(seen) == len(Forecaster.WAYS) + 1
    for told, truth in seen:
        assert len(told) == len(truth) == 40
        assert 8 <= (truth[:, 0] > 0).sum() <= 32


def test_a_forecast_of_the_only_time_is_refused() -> None:
    cells = study(pd.DataFrame({"time": np.zeros(80), "donor_id": ["a", "b"] * 40}), np.full((80, len(FEATURES)), 3.0))
    folds = make_folds(cells, FoldSettings(by="donor_id", held=("a",)))
    with pytest.raises(UsageError, match="0 is the only time of the training cells"):
        forecast_suite(cells, folds, by_seed(lambda seed: forecast_floor("RNA", seed)), seeds=range(1))
    assert Forecaster("RNA", "union").fit(cells).predict(1.0).shape[0] == 80


def test_a_time_that_donors_hold_out_in_turn_is_a_unit_in_each() -> None:
    random = np.random.default_rng(0)
    obs = pd.DataFrame({"time": np.repeat([0.0, 1.0, 2.0], 80), "donor_id": np.tile(["d0", "d1"], 120)})
    cells = study(obs, random.uniform(1, 6, (240, 60)))
    methods = {"both": lambda seed: Forecaster("RNA", "union")}
    donors = make_folds(cells, FoldSettings(by="donor_id", where={"time": ("1.0",)}))
    found = forecast_suite(cells, donors, methods, seeds=[0])
    assert {value.unit for value in found} == {"1 | d0", "1 | d1"}
    times = make_folds(cells, FoldSettings(by="time", held=("1.0",)))
    assert {value.unit for value in forecast_suite(cells, times, methods, seeds=[0])} == {"1"}


def test_papalexi_shows_why_metrics_are_gated(shared_data: object) -> None:
    """On 21 targets of which few respond, most metrics cannot tell a replicate from a constant."""
    import mudata

    from train.evaluation.study import from_anndata

    with mudata.set_options(pull_on_update=False):
        data = mudata.read_h5mu(f"{shared_data}/derived/papalexi_dev.h5mu")
    assert data is not None
    assert from_anndata({"RNA": data["rna"]}).n_cells == 17490
