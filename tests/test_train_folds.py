"""What is held out stays out: folds keep groups whole, and the audit finds every planted leak."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy.sparse import csr_matrix
from studies import perturbed

from store.errors import UsageError, VerificationError
from train.evaluation.audit import _near_pairs, audit, refuse_leaks
from train.evaluation.effects import halves
from train.evaluation.folds import Fold, FoldSettings, make_folds
from train.evaluation.study import Study

TARGETS = ["x", "y", "z", "x+y"]


@pytest.fixture(scope="module")
def cells() -> Study:
    return perturbed(TARGETS, n_cells=30)


def test_a_held_out_target_takes_its_combinations_with_it_and_leaves_the_controls(cells: Study) -> None:
    (fold,) = make_folds(cells, FoldSettings(by="target", held=("x",)))
    held = set(cells.label("perturbation")[fold.test_C])
    assert held == {"x", "x+y"}
    assert set(cells.label("perturbation")[fold.train_C]) == {"control", "y", "z"}


def test_every_group_is_held_out_once_and_folds_share_nothing(cells: Study) -> None:
    folds = make_folds(cells, FoldSettings(by="perturbation", folds=2))
    assert len(folds) == 2
    assert not (folds[0].test_C & folds[1].test_C).any()
    held = set(cells.label("perturbation")[folds[0].test_C | folds[1].test_C])
    assert held == set(TARGETS)


def test_cells_outside_where_stay_in_training(cells: Study) -> None:
    settings = FoldSettings(by="cell_type", held=("a",), where={"perturbation": ("x",)})
    (fold,) = make_folds(cells, settings)
    assert set(zip(cells.label("cell_type")[fold.test_C], cells.label("perturbation")[fold.test_C], strict=True)) == {
        ("a", "x")
    }
    assert audit(cells, [fold], settings) == []


def test_calibration_takes_whole_groups(cells: Study) -> None:
    folds = make_folds(cells, FoldSettings(by="donor_id", folds=4, calibrate=0.4))
    for fold in folds:
        donors = [set(cells.label("donor_id")[part]) for part in (fold.train_C, fold.calibrate_C, fold.test_C)]
        assert donors[1]
        assert len(set.union(*donors)) == sum(map(len, donors))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"by": "target", "held": ("xx",)}, "no cell has target 'xx'; did you mean 'x'"),
        ({"by": "perturbation", "where": {"cell_type": ("c",)}}, "no cell has 'c'"),
        ({"by": "donor_id", "calibrate": 0.01}, "give a larger share"),
        ({"by": "organism_id"}, "no column 'organism_id'"),
    ],
)
def test_what_cannot_be_held_out_is_refused(cells: Study, words: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_folds(cells, FoldSettings(**words))


def test_one_group_beside_the_held_ones_does_not_calibrate_and_train(cells: Study) -> None:
    with pytest.raises(UsageError, match=r"1 other is left, which cannot calibrate and train; hold out fewer"):
        make_folds(cells, FoldSettings(by="cell_type", calibrate=0.5))
    with pytest.raises(UsageError, match=r"cell_type . held out, and . to calibrate on, leaves no cell to train on"):
        make_folds(cells, FoldSettings(by="cell_type", calibrate=0.9))
    with pytest.raises(UsageError, match=r"donor_id d. held out, and d.* to calibrate on, leaves no cell to train on"):
        make_folds(cells, FoldSettings(by="donor_id", calibrate=0.99))
    (fold,) = make_folds(
        cells, FoldSettings(by="cell_type", held=("a",), calibrate=0.9, where={"donor_id": ("d0", "d1")})
    )
    assert fold.calibrate_C.any(), "a part of the other group still trains"


def test_holding_out_all_is_refused(cells: Study) -> None:
    with pytest.raises(UsageError, match="leaves no cell to train on"):
        make_folds(cells, FoldSettings(by="cell_type", folds=1))


def test_halves_are_disjoint_and_even(cells: Study) -> None:
    one, other = halves(cells, ["cell_type"], 3)
    assert (one ^ other).all()
    for target in TARGETS:
        mine = cells.label("perturbation") == target
        assert abs(int((one & mine).sum()) - int((other & mine).sum())) <= 2
    assert (halves(cells, ["cell_type"], 4)[0] != one).any()


# -------------------------------------------------------------------------------------------------------- the audit
def with_cell(cells: Study, row: int, counts: np.ndarray) -> Study:
    matrix = cells.counts["RNA"].toarray()
    matrix[row] = counts
    return replace(cells, counts={"RNA": csr_matrix(matrix)})


def test_a_clean_fold_passes_the_audit(cells: Study) -> None:
    settings = FoldSettings(by="target", folds=3)
    findings = audit(cells, make_folds(cells, settings), settings)
    assert findings == []
    refuse_leaks(findings)


def test_the_audit_finds_every_planted_leak(cells: Study) -> None:
    settings = FoldSettings(by="target", held=("z",))
    (fold,) = make_folds(cells, settings)
    test, train = int(np.flatnonzero(fold.test_C)[0]), int(np.flatnonzero(fold.train_C)[0])
    counts = cells.counts["RNA"].toarray()[train]

    def checks(study: Study, one: Fold = fold, **words: object) -> set[str]:
        return {finding.check for finding in audit(study, [one], settings, **words)}  # type: ignore[arg-type]

    assert checks(with_cell(cells, test, counts)) == {"duplicates"}
    almost = counts.copy()
    almost[np.flatnonzero(almost)[0]] += 1
    assert checks(with_cell(cells, test, almost)) == {"near-duplicates"}
    far = counts.copy()
    far[np.flatnonzero(far)[:20]] += 1
    assert checks(with_cell(cells, test, far)) == set()
    copies = replace(cells, obs=cells.obs.assign(is_primary_data=np.arange(cells.n_cells) != test))
    assert checks(copies) == {"primary"}
    assert checks(replace(cells, obs=cells.obs.drop(columns="is_primary_data"))) == {"primary"}
    both = replace(fold, train_C=fold.train_C | (np.arange(cells.n_cells) == test))
    assert checks(cells, both) == {"cells", "groups", "duplicates"}
    assert checks(cells, pretrained_C=np.arange(cells.n_cells) == test) == {"pretraining"}
    assert checks(cells, pretrained_C=fold.train_C) == set()


def test_a_target_with_a_comma_in_its_name_is_no_other_target(cells: Study) -> None:
    names = {"x": "IL2, high", "y": "IL2", "x+y": "both"}
    label_C = np.array([names.get(one, one) for one in cells.label("perturbation")])
    named = replace(cells, obs=cells.obs.assign(perturbation=label_C))
    settings = FoldSettings(by="target", held=("IL2, high",))
    (fold,) = make_folds(named, settings)
    assert (fold.held, fold.name) == (("IL2, high",), "IL2, high")
    assert audit(named, [fold], settings) == []
    leaked = replace(fold, train_C=fold.train_C | fold.test_C)
    assert "groups" in {finding.check for finding in audit(named, [leaked], settings)}


def test_near_copies_are_found_also_among_very_many_cells_that_are_much_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    peaks = (random.random((1200, 150)) < random.beta(2, 1, 150)).astype(np.float32)
    copies = peaks[:50].copy()
    for copy in copies:
        copy[random.choice(np.flatnonzero(copy), 2, replace=False)] = 0
    counts, n_cells = csr_matrix(np.concatenate([peaks, copies])), 1250
    overlap = (counts @ counts.T).toarray()
    union = counts.getnnz(axis=1)[:, None] + counts.getnnz(axis=1) - overlap
    expected = np.argwhere(np.triu(10 * overlap >= 9 * union, 1))
    assert len(expected) >= 50
    assert _near_pairs(counts).tolist() == expected.tolist()
    obs = pd.DataFrame({"donor_id": np.where(np.arange(n_cells) < 1200, "d0", "d1"), "is_primary_data": True})
    cells = Study({"ATAC": counts}, {"ATAC": [str(number) for number in range(150)]}, obs)
    settings = FoldSettings(by="donor_id", held=("d1",))
    folds = make_folds(cells, settings)
    (finding,) = audit(cells, folds, settings)
    assert finding.message.startswith("50 pairs of a held-out and a training cell")
    for limit in ("COMPARED", "CANDIDATES"):
        with monkeypatch.context() as patched:
            patched.setattr(f"train.evaluation.audit.{limit}", 1000)
            (finding,) = audit(cells, folds, settings)
        assert "too many cells are too much alike in ATAC for near-duplicates to be looked for" in finding.message


def test_the_audit_fails_closed_on_what_it_cannot_know(cells: Study) -> None:
    settings = FoldSettings(by="target", held=("z",), selection="all", knowledge_until="2020-01-01")
    folds = make_folds(cells, settings)
    findings = audit(
        cells, folds, settings, knowledge=[("go.gmt", ""), ("old.gmt", "2019-05-01"), ("new.gmt", "2021-01-01")]
    )
    assert sorted(finding.check for finding in findings) == ["knowledge", "knowledge", "selection"]
    with pytest.raises(VerificationError, match=r"(?s)no number is made.*new.gmt is from 2021-01-01") as raised:
        refuse_leaks(findings)
    assert "old.gmt" not in str(raised.value)
    assert raised.value.exit_code == 8
    unsaid = FoldSettings(by="target", held=("z",))
    (finding,) = audit(cells, folds, unsaid, chosen=("RNA",))
    assert "chosen features of RNA" in finding.message
    assert "selection=train" in finding.message
    assert audit(cells, folds, FoldSettings(by="target", held=("z",), selection="train"), chosen=("RNA",)) == []
    with pytest.raises(ValidationError, match="knowledge_until = 'last year' is no day; write it as 2024-12-31"):
        FoldSettings(by="target", knowledge_until="last year")
