"""Where a model begins, and what training in memory comes to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from small_checkpoint import write_checkpoint
from studies import FEATURES, perturbed, study

from store.errors import InputRefused
from train.evaluation import scratch
from train.evaluation.ours import ModelEmbedder
from train.evaluation.scratch import ScratchSettings, adapt_on, held_out_loss, train_on
from train.evaluation.study import Study
from train.model import CellModel
from train.objective import Objective
from train.predictor import Predictor
from train.start import SPREAD, log_shares, mean_share, principal_axes
from train.tokens import TokenSettings


def test_features_that_vary_together_begin_alike_also_across_measurements() -> None:
    rng = np.random.default_rng(0)
    level = rng.choice([0.2, 3.0], (400, 2))
    rna = rng.poisson(5 * level[:, [0, 0, 0, 1, 1, 1]]).astype(np.float32)
    protein = rng.poisson(40 * np.c_[level, 1 / level]).astype(np.float32)
    axes = principal_axes({"RNA": log_shares(csr_matrix(rna)), "protein": log_shares(csr_matrix(protein))}, width=3)
    assert {name: part.shape for name, part in axes.items()} == {"RNA": (6, 3), "protein": (4, 3)}
    assert all(abs(part.std() - SPREAD) < 1e-5 for part in axes.values())
    likeness = np.corrcoef(axes["RNA"])
    assert likeness[0, 1] > 0.9 > likeness[0, 4]
    beside = [np.dot(axes["protein"][row], axes["RNA"][0] - axes["RNA"][3]) for row in range(2)]
    assert beside[0] > 0 > beside[1]


def test_axes_beyond_the_rank_and_of_features_without_counts_are_zeros() -> None:
    counts = np.random.default_rng(1).poisson(3, (30, 5)).astype(np.float32)
    counts[:, 2] = 0
    axes = principal_axes({"RNA": log_shares(csr_matrix(counts))}, width=16)["RNA"]
    assert np.abs(axes[2]).max() < 1e-12
    assert not axes[:, 4:].any()
    assert not principal_axes({"RNA": log_shares(csr_matrix((4, 3), dtype=np.float32))}, width=2)["RNA"].any()


def test_mean_shares_keep_features_without_counts_possible() -> None:
    np.testing.assert_allclose(mean_share(csr_matrix([[3.0, 0.0], [1.0, 0.0]])), [0.9, 0.1])


def types(n_cells: int = 300, seed: int = 0) -> Study:
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n_cells)
    rate = np.random.default_rng(5).uniform(0.5, 4, (3, len(FEATURES)))
    return study(pd.DataFrame({"cell_type": [f"t{k}" for k in kind], "donor_id": "d"}), rate[kind], seed)


def test_a_model_trained_in_memory_learns_and_is_the_same_for_a_seed() -> None:
    train, test = types(), types(seed=1)
    short = ScratchSettings(steps=60, batch=32, model={"width": 32})
    first, again = train_on(train, short, seed=2), train_on(train, short, seed=2)
    untrained = train_on(train, ScratchSettings(steps=2, batch=32, model={"width": 32}, lr=1e-9), seed=2)
    assert held_out_loss(first, test, short) < held_out_loss(untrained, test, short) - 0.02
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    embedding = ModelEmbedder(first).embed(test)
    centres = np.stack([embedding[test.label("cell_type") == f"t{k}"].mean(axis=0) for k in range(3)])
    nearest = ((embedding[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (np.char.add("t", nearest.astype(str)) == test.label("cell_type").astype(str)).mean() > 0.9


def test_a_model_trained_in_memory_answers_like_a_checkpoint() -> None:
    cells = perturbed(["x", "y"], n_cells=20)
    model = train_on(cells, ScratchSettings(steps=3, batch=16, model={"width": 16}))
    assert model.prompts["perturbation"] == ["", "control", "x", "y"]
    part = model.cells({"RNA": cells.counts["RNA"][:5]})
    assert np.isfinite(model.perturb(part, ["x"])["RNA"].delta_G).all()
    with pytest.raises(InputRefused, match="'z' was never seen in training"):
        model.perturb(part, ["z"])


def told(n_cells: int, seed: int) -> Study:
    """Cells of which everything that is said moves ten features, each another ten."""
    rng = np.random.default_rng(seed)
    obs = {
        "tissue": rng.choice(["blood", "lung"], n_cells),
        "assay": rng.choice(["one", "other"], n_cells),
        "sex": rng.choice(["female", "male"], n_cells),
        "cell_type": rng.choice(["t0", "t1"], n_cells),
        "perturbation": rng.choice(["control", "x"], n_cells),
        "time": rng.choice([0.0, 72.0], n_cells),
    }
    log_rate = np.full((n_cells, len(FEATURES)), 1.0)
    for number, values in enumerate(obs.values()):
        log_rate[values == np.unique(values)[1], 10 * number : 10 * number + 10] += 1.5
    return study(pd.DataFrame(obs | {"donor_id": "d"}), np.exp(log_rate), seed)


def test_each_prompt_is_listened_to_shuffling_it_makes_predictions_worse() -> None:
    hidden = TokenSettings(hide=(0.93, 0.97), drop_cell_type=0.15)
    settings = ScratchSettings(steps=150, batch=64, model={"width": 32, "heads": 2}, tokens=hidden)
    model, test = train_on(told(1200, 0), settings), told(500, 1)
    expected = held_out_loss(model, test, settings)
    random = np.random.default_rng(2)
    for name in ("tissue", "assay", "sex", "cell_type", "perturbation", "time"):
        shuffled = test.obs.assign(**{name: random.permutation(test.obs[name])})
        worse = held_out_loss(model, Study(test.counts, test.features, shuffled), settings)
        assert worse > expected + 0.01, name


def test_an_adapter_in_memory_learns_with_the_models_tokens_also_where_a_study_measures_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Predictor.load(write_checkpoint(tmp_path / "checkpoint", tokens=7))
    counts = csr_matrix(np.random.default_rng(0).poisson(1.0, (12, 40)).astype(np.float32))
    genes = {"RNA": base.vocabulary["RNA"].feature_id}
    study = Study({"RNA": counts}, genes, pd.DataFrame({"tissue": ["blood", "lung"] * 6}))
    budgets: list[int] = []
    real = scratch.objective_of

    def seen(model: CellModel, settings: ScratchSettings, seed: int) -> Objective:
        budgets.append(settings.tokens.budget)
        return real(model, settings, seed)

    monkeypatch.setattr(scratch, "objective_of", seen)
    grown = adapt_on(base, study, ScratchSettings(steps=2, batch=4))
    assert budgets == [7]
    assert np.isfinite(held_out_loss(grown, study, ScratchSettings()))
