"""Vocabularies that grow: known features answer as before, new ones inherit or share, and everything is finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from small_checkpoint import GENES, write_checkpoint

from store.errors import InputRefused
from train import checkpoint
from train.evaluation.scratch import ScratchSettings, objective_of
from train.grow import grow
from train.predictor import Predictor

NEW = {"RNA": [("ENSG99999999999", "NEW", "homo_sapiens"), (GENES[3], "G3", "homo_sapiens")]}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    return checkpoint.load(write_checkpoint(tmp_path_factory.mktemp("grow") / "checkpoint"))


def counts(n_genes: int) -> dict[str, csr_matrix]:
    drawn = np.random.default_rng(0).poisson(2, (4, 40)).astype(np.float32)
    wide = np.zeros((4, n_genes), np.float32)
    wide[:, :40] = drawn
    return {"RNA": csr_matrix(wide)}


def test_known_features_answer_as_before(loaded: checkpoint.Checkpoint) -> None:
    before, after = Predictor(loaded), Predictor(grow(loaded, NEW))
    assert after.vocabulary["RNA"].feature_id == [*GENES, "ENSG99999999999"]  # what was known is not added twice
    np.testing.assert_allclose(after.embed(after.cells(counts(41))), before.embed(before.cells(counts(40))), atol=1e-6)
    for name, size in (("RNA", 40), ("protein", 5)):
        grown = after.shares(after.cells(counts(41)), name)
        np.testing.assert_allclose(grown[:, :size], before.shares(before.cells(counts(40)), name), rtol=0.02, atol=1e-5)


def test_a_gene_never_seen_is_read_and_gives_finite_answers(loaded: checkpoint.Checkpoint) -> None:
    model = Predictor(grow(loaded, NEW))
    shown = counts(41)
    without = model.embed(model.cells(shown))
    shown["RNA"] = shown["RNA"].tolil()
    shown["RNA"][:, 40] = 30
    with_it = model.embed(model.cells({"RNA": csr_matrix(shown["RNA"])}))
    assert np.isfinite(with_it).all()
    assert np.abs(with_it - without).max() > 1e-3
    again = Predictor(grow(loaded, NEW)).model.identity.own.weight[41]
    assert torch.equal(again, model.model.identity.own.weight[41])


def test_a_protein_inherits_from_its_gene(loaded: checkpoint.Checkpoint) -> None:
    model = grow(loaded, {"protein": [("CDX", "CDX", "homo_sapiens")]}, {"CDX": GENES[7]}).model
    heir = model.config.offsets["protein"] + 5
    assert torch.equal(model.identity.own.weight[heir], loaded.model.identity.own.weight[1 + 7])
    assert model.decoders["protein"].features.weight[5].abs().sum() == 0
    with pytest.raises(InputRefused, match="cannot inherit from 'nobody'"):
        grow(loaded, {"protein": [("CDX", "CDX", "")]}, {"CDX": "nobody"})
    with pytest.raises(InputRefused, match="inherit: 'CDY' is none of the new features"):
        grow(loaded, {"protein": [("CDX", "CDX", "")]}, {"CDY": GENES[7]})
    grow(loaded, {"protein": []}, {"P1": GENES[7]})  # is known already, and stays as it is
    with pytest.raises(InputRefused, match="no measurement 'lipids'"):
        grow(loaded, {"lipids": []})


def test_a_feature_is_its_id_and_its_organism(loaded: checkpoint.Checkpoint) -> None:
    mouse, human = "mus_musculus", "homo_sapiens"
    more = [(GENES[3], "G3", mouse), ("DUP", "D", human), ("DUP", "d", mouse), (GENES[4], "G4", human)]
    grown = grow(loaded, {"RNA": more}, {"DUP": GENES[3]})
    part = grown.vocabulary["RNA"]
    assert part.feature_id[40:] == [GENES[3], "DUP", "DUP"]
    assert part.feature_name[40:] == ["G3", "D", "d"]
    assert part.organism[40:] == [mouse, human, mouse]
    both = grow(grown, {"protein": [("P9", "CD9", mouse), ("P9", "CD9", human)]}, {"P9": GENES[3]})
    own, first = both.model.identity.own.weight, both.model.config.offsets
    assert not torch.equal(own[first["RNA"] + 3], own[first["RNA"] + 40])
    assert torch.equal(own[first["protein"] + 5], own[first["RNA"] + 40])  # of the mouse
    assert torch.equal(own[first["protein"] + 6], own[first["RNA"] + 3])
    with pytest.raises(InputRefused, match=r"of rattus cannot inherit from .*RNA of homo_sapiens, RNA of mus_musculus"):
        grow(grown, {"protein": [("P9", "CD9", "rattus")]}, {"P9": GENES[3]})


def test_an_heir_of_an_id_of_several_measurements_takes_that_of_its_own(loaded: checkpoint.Checkpoint) -> None:
    named = grow(loaded, {"RNA": [("P1", "P1", "homo_sapiens")]})  # a gene that is called as a protein is
    first = named.model.config.offsets
    for name, place in (("RNA", 40), ("protein", 1)):
        heir = grow(named, {name: [("NEW", "NEW", "homo_sapiens")]}, {"NEW": "P1"})
        last = heir.model.config.offsets[name] + len(heir.vocabulary[name].feature_id) - 1
        assert torch.equal(heir.model.identity.own.weight[last], named.model.identity.own.weight[first[name] + place])
    grow(loaded, {"RNA": [("NEW", "NEW", "mus_musculus")]}, {"NEW": GENES[3]})  # another organism's, the only one


def test_training_teaches_the_shared_vectors_and_evaluation_uses_none(loaded: checkpoint.Checkpoint) -> None:
    model, predictor = loaded.model, Predictor(loaded)
    protein = csr_matrix(np.random.default_rng(1).poisson(9, (4, 5)).astype(np.float32))
    cells = predictor.cells(counts(40) | {"protein": protein})
    cells.panel[:] = 0
    objective = objective_of(model, ScratchSettings(), seed=0)
    model.zero_grad()
    for step in range(8):
        loss, *_ = objective(model, model, cells, step)
        torch.autograd.backward(loss.total)
    reached = {int(row) for row in torch.nonzero(model.identity.shared.weight.grad.abs().sum(1))}
    assert len(reached) > 5
    first, *_ = objective(model, model, cells, None)
    with torch.no_grad():
        model.identity.shared.weight.add_(1.0)
        again, *_ = objective(model, model, cells, None)
        model.identity.shared.weight.sub_(1.0)
    model.zero_grad()
    assert float(first.total.detach()) == float(again.total)
