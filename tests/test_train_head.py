"""A kept transition head answers as the one that was fitted, and a damaged or foreign one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from studies import perturbed, switched_off

from store.errors import ConflictError, InputRefused, MissingError
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
