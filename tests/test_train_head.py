"""A kept transition head answers as the one that was fitted, and a damaged or foreign one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from studies import FEATURES, perturbed, switched_off

from store.errors import ConflictError, InputRefused, MissingError, UsageError
from train.evaluation.context import context_of, values_of
from train.evaluation.effects import effects
from train.evaluation.floor import ControlPasted, effect_floor
from train.evaluation.flow import FlowSettings
from train.evaluation.gated import GatedEffects, TargetVectors
from train.evaluation.head import HeadSettings, fit_head, load_head, save_head
from train.evaluation.study import Study

QUICK = FlowSettings(steps=40, sets=4, cells=16, width=32, layers=1)
HARDLY = FlowSettings(steps=1, sets=1, cells=4, width=4, layers=1)


@pytest.mark.parametrize("opened", [False, True])
def test_a_loaded_head_answers_bit_for_bit(tmp_path: Path, opened: bool) -> None:
    cells, programs = switched_off(n_targets=10, n_contexts=2, n_cells=20)
    members = {name: tuple(inside) for name, inside in programs.items()}
    given = {"t0": np.ones(3), "t1": np.zeros(3)}
    head = GatedEffects(
        "RNA",
        targets=TargetVectors(members, given),
        candidates=effect_floor("RNA", ("cell_type",), members),
        settings=QUICK,
    ).fit(cells)
    if opened:
        object.__setattr__(head.gate, "g", 0.7)  # whether it opens is another test's question
    save_head(tmp_path / "head", head, members, {"snapshot": {"name": "made up"}})
    again = load_head(tmp_path / "head")
    assert again.gate == head.gate
    control = cells.take(cells.label("perturbation") == "control")
    here = sorted(set(cells.label("cell_type")))[0]
    mine = control.take(control.label("cell_type") == here)
    for target in (*sorted(set(cells.label("perturbation")))[:3], "never heard of", "t0+t1"):
        np.testing.assert_array_equal(again.predict(mine, target, here), head.predict(mine, target, here))
        for one, other in zip(again.interval(mine, target, here), head.interval(mine, target, here), strict=True):
            np.testing.assert_array_equal(one, other)
    if opened:
        shut = head.baseline.predict(mine, "t1", here)
        assert np.abs(again.predict(mine, "t1", here) - shut).max() > 0
    names = list(mine.features["RNA"])
    turned = Study({"RNA": csr_matrix(mine.counts["RNA"][:, ::-1])}, {"RNA": names[::-1]}, mine.obs)
    with pytest.raises(InputRefused, match="other features than the head was fitted on"):
        again.predict(turned, "t1", here)


def test_an_open_head_answers_the_same_in_whatever_order_cells_come() -> None:
    cells = perturbed(["x", "y", "z"], ("a",), n_cells=20)
    known = {name: np.eye(3)[place] for place, name in enumerate("xyz")}
    head = GatedEffects("RNA", targets=TargetVectors(given=known), settings=QUICK).fit(cells)
    object.__setattr__(head.gate, "g", 0.7)
    control = cells.take(cells.label("perturbation") == "control")
    depth = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 11), 60))  # the deep ones are nowhere together
    rate_CG = np.random.default_rng(1).gamma(1, 1, (600, control.counts["RNA"].shape[1])) * depth[:, None]
    counts_CG = np.random.default_rng(2).poisson(rate_CG)
    obs = pd.concat([control.obs] * 600).iloc[:600].reset_index(drop=True)
    mine = Study({"RNA": csr_matrix(counts_CG.astype(np.float32))}, control.features, obs)
    answers = [head.predict(mine.take(order), "x", "a") for order in (np.arange(600), np.argsort(depth))]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-6)
    assert np.abs(answers[0] - head.baseline.predict(mine, "x", "a")).max() > 1e-3


@given(st.lists(st.text(st.sampled_from("a| \\\n") | st.characters()), min_size=1))
def test_the_values_of_a_context_are_told_apart_again_whatever_they_hold(values: list[str]) -> None:
    assert values_of(context_of(values)) == values


def test_a_column_whose_values_hold_bars_is_held_out_by_its_values() -> None:
    cells = perturbed(["x"], ("a",), n_cells=40)
    type_C = np.where(np.arange(cells.n_cells) % 2, "CD4 | naive", "CD4 | memory")
    cells = replace(cells, obs=cells.obs.assign(cell_type=type_C, sex="f"))
    found = effects(cells, "RNA", ("cell_type", "sex")).groups("sex", ("cell_type", "sex"))
    assert found == [frozenset({"f"})] * 2


@pytest.mark.parametrize("seed", range(4))
def test_the_error_of_shared_controls_is_nothing_to_learn(seed: int) -> None:
    cells = perturbed([f"g{place}" for place in range(20)], ("a",), n_cells=40, strength=0, seed=seed)
    gate = GatedEffects("RNA", settings=QUICK, seed=seed).fit(cells).gate
    assert gate.g == 0
    assert gate.baseline in {"control", "shrunken mean"}
    assert gate.errors["training mean"] > gate.errors["control"]


@pytest.mark.parametrize("by", ["target", "cell_type"])
def test_the_error_of_controls_counts_once(by: str) -> None:
    """Groups that share controls err together, those with their own do not: both ways it is what repeats differ by."""
    gains, errors = [], []
    for seed in range(24):
        contexts = ("a",) if by == "target" else tuple("abcdefghijkl")
        targets = [f"g{place}" for place in range(12)] if by == "target" else ["g0"]
        cells = perturbed(targets, contexts, n_cells=40, strength=0, seed=seed)
        head = GatedEffects("RNA", by=by, candidates=[ControlPasted("RNA")], settings=HARDLY, seed=seed).fit(cells)
        slope_EG = np.tile(np.linspace(0, 2, len(FEATURES)), (head.table.n_effects, 1))
        value_E = (slope_EG * head.true_EG).sum(axis=1)  # 0 but for chance
        gains.append(value_E.mean())
        errors.append(value_E.mean() / head._standard_errors(value_E, slope_EG))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.sqrt(np.mean(np.square(gains))), rel=0.35)


def test_what_a_head_cannot_hold_out_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="by = 'donor': a head can hold out target, perturbation, cell_type; name"):
        fit_head(HeadSettings(str(tmp_path / "no lake"), "s", by="donor"), tmp_path / "head")


def test_a_damaged_or_foreign_head_is_refused(tmp_path: Path) -> None:
    head = GatedEffects("RNA", settings=QUICK).fit(perturbed(["x", "y"], ("a",), n_cells=20))
    folder = save_head(tmp_path / "head", head, {}, {})
    with pytest.raises(MissingError, match="no checkpoint here"):
        load_head(tmp_path / "none")
    words = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(words | {"seed": 4}))
    with pytest.raises(InputRefused, match="SHA-256 differs"):
        load_head(folder)
    with pytest.raises(ConflictError, match="there is something already"):
        fit_head(HeadSettings("nowhere", "s"), folder)
