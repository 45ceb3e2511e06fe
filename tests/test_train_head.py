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
from studies import perturbed, switched_off

from store.errors import ConflictError, InputRefused, MissingError, UsageError
from train.checkpoint import write_manifest
from train.evaluation.context import context_of, values_of
from train.evaluation.effects import effects
from train.evaluation.floor import effect_floor
from train.evaluation.flow import FlowSettings
from train.evaluation.gated import GatedEffects, TargetVectors
from train.evaluation.head import HeadSettings, fit_head, load_head, save_head
from train.evaluation.study import Study

QUICK = FlowSettings(steps=40, sets=4, cells=16, width=32, layers=1)


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


def test_labels_with_bars_are_kept_and_heads_of_before_are_read(tmp_path: Path) -> None:
    head = GatedEffects("RNA", settings=QUICK).fit(perturbed(["x", "y"], ("CD4 | naive", "b\\c"), n_cells=20))
    save_head(tmp_path / "head", head, {}, {})
    assert load_head(tmp_path / "head").table.context == head.table.context
    assert set(head.table.context) == {context_of(["CD4 | naive"]), context_of(["b\\c"])}
    words = json.loads((tmp_path / "head/head.json").read_text())
    assert {tuple(values) for values in words["context"]} == {("CD4 | naive",), ("b\\c",)}
    words["context"] = [values for [values] in words["context"]]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/head.json").write_text(json.dumps(words))
    (tmp_path / "old/head.safetensors").write_bytes((tmp_path / "head/head.safetensors").read_bytes())
    write_manifest(tmp_path / "old", {"kind": "head"})
    assert load_head(tmp_path / "old").table.context == head.table.context


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
