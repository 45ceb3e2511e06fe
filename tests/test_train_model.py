"""The model: hidden values never enter, company does not matter, likelihoods are those of the textbook."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from test_train_tokens import OFFSETS, cells

from train.cells import NUMBERS, PROMPTS, Controls
from train.model import CellModel, ModelConfig, log_rates, negative_log_likelihood, reconstruction_loss
from train.objective import Objective, seen_cells
from train.tokens import TokenSettings, make_tokens

CONFIG = ModelConfig(
    {"RNA": 30, "protein": 8}, dict.fromkeys(PROMPTS, 5), 4, n_numbers=len(NUMBERS), width=16, layers=2, heads=2
)
SETTINGS = TokenSettings(budget=64)


@pytest.fixture
def model() -> CellModel:
    torch.manual_seed(0)
    made = CellModel(CONFIG).eval()
    torch.nn.init.normal_(made.target.weight)
    return made


def test_offsets_number_all_features_from_one() -> None:
    assert CONFIG.offsets == OFFSETS


def test_garbage_in_hidden_values_changes_nothing_at_the_same_depth(model: CellModel) -> None:
    """The depth is told on purpose (a prompt, and the unit of visible values); hidden counts are in that sum only."""
    batch = cells()
    tokens = make_tokens(batch, OFFSETS, SETTINGS, chance=(0, 3))
    shown = {(c, f) for c in range(batch.n_cells) for f in tokens.feature_CL[c][tokens.valid_CL[c]].tolist()}
    part = batch.counts["protein"]
    cell_of = np.repeat(np.arange(batch.n_cells), np.diff(part.indptr))
    hidden = np.array([(c, f + OFFSETS["protein"]) not in shown for c, f in zip(cell_of, part.features, strict=True)])
    assert hidden.any()
    garbled = part.counts.copy()
    for cell in range(batch.n_cells):  # all hidden counts of a cell go to one feature: the depth stays
        mine = np.flatnonzero(hidden & (cell_of == cell))
        if len(mine):
            garbled[mine[1:]], garbled[mine[0]] = 0, part.counts[mine].sum()
    assert not np.array_equal(garbled, part.counts)
    other = replace(batch, counts={**batch.counts, "protein": replace(part, counts=garbled)})
    again = make_tokens(other, OFFSETS, SETTINGS, chance=(0, 3))
    assert torch.equal(model(tokens)[0], model(again)[0])


def test_a_cell_alone_is_the_same_as_in_company(model: CellModel) -> None:
    batch = cells()
    together = model(make_tokens(batch, OFFSETS, SETTINGS))
    for cell in (0, 17):
        alone = model(make_tokens(batch.take(np.array([cell])), OFFSETS, SETTINGS))
        torch.testing.assert_close(alone[0][0], together[0][cell], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[1]["RNA"][0], together[1]["RNA"][cell], rtol=1e-4, atol=1e-5)


def test_the_order_of_tokens_does_not_matter(model: CellModel) -> None:
    tokens = make_tokens(cells(), OFFSETS, SETTINGS)
    order = torch.randperm(tokens.feature_CL.shape[1], generator=torch.Generator().manual_seed(1))
    names = ("feature_CL", "value_CL")
    shuffled = replace(tokens, **{name: getattr(tokens, name)[:, order] for name in names})
    torch.testing.assert_close(model(shuffled)[0], model(tokens)[0], rtol=1e-4, atol=1e-5)


def test_a_measurement_that_is_absent_is_not_one_of_zeros(model: CellModel) -> None:
    batch = cells()
    nothing = replace(
        batch.counts["protein"],
        indptr=np.zeros(41, np.int64),
        features=np.empty(0, np.int32),
        counts=np.empty(0, np.float32),
    )
    zeros = replace(batch, counts={**batch.counts, "protein": nothing})
    absent = replace(zeros, measured={**batch.measured, "protein": np.zeros(40, bool)})
    first, second = (model(make_tokens(b, OFFSETS, SETTINGS))[0] for b in (zeros, absent))
    assert (first - second).abs().max() > 1e-3


def test_likelihoods_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, (6, 10)).astype(np.float32)
    logits = torch.from_numpy(rng.normal(size=(6, 10)))
    panel = torch.ones(6, 10, dtype=torch.bool)
    panel[:, 8:] = False
    counts[:, 8:] = 0
    shares = log_rates(logits, panel)
    mean = counts.sum(1, keepdims=True) * shares.exp().numpy()
    expected = -scipy.stats.poisson.logpmf(counts[:, :8], mean[:, :8]).mean(1)
    found = negative_log_likelihood(torch.from_numpy(counts).double(), shares, panel, None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    r = 2.5
    raw = torch.full((10,), float(np.log(np.expm1(r - 1e-4))), dtype=torch.float64)
    expected = -scipy.stats.nbinom.logpmf(counts[:, :8], r, r / (r + mean[:, :8])).mean(1)
    found = negative_log_likelihood(torch.from_numpy(counts).double(), shares, panel, raw)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_an_unmeasured_feature_and_an_unmeasured_cell_carry_no_loss(model: CellModel) -> None:
    batch = cells()
    panels = {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}
    panels["RNA"][0, 5] = False
    objective = Objective(panels, SETTINGS, 0, torch.device("cpu"))
    counts, panel = objective.targets(batch, model)
    logits = model(make_tokens(batch, OFFSETS, SETTINGS))[1]
    before = reconstruction_loss(model, logits, counts, panel)
    moved = {name: values.clone() for name, values in logits.items()}
    moved["RNA"][:, 5] += 100.0
    after = reconstruction_loss(model, moved, counts, panel)
    assert float(before.pairs) == 80
    torch.testing.assert_close(before.total, after.total)
    absent = replace(batch, measured={**batch.measured, "protein": np.arange(40) < 10})
    _, panel = objective.targets(absent, model)
    assert float(reconstruction_loss(model, logits, counts, panel).pairs) == 50


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = CellModel(CONFIG)
    torch.nn.init.normal_(model.target.weight)
    objective = Objective(
        {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}, SETTINGS, 0, torch.device("cpu")
    )
    loss, *_ = objective(model, model, cells(), 1)
    loss.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_rank_without_cells_adds_nothing_and_still_has_gradients(model: CellModel) -> None:
    objective = Objective(
        {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}, SETTINGS, 0, torch.device("cpu")
    )
    loss, n_tokens, n_cells = objective(model, model, cells(1).take(np.empty(0, np.int64)), 1)
    loss.total.backward()
    assert (float(loss.total.detach()), float(loss.pairs), n_tokens, n_cells) == (0.0, 0.0, 0, 0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and not grad.any() for grad in gradients.values()), gradients


def test_a_cell_with_a_control_is_seen_as_its_control() -> None:
    batch, others = cells(6), cells(3)
    place = np.array([[-1], [2], [0], [-1], [2], [-1]])
    seen = seen_cells(replace(batch, controls=Controls(others, place)))
    for name, part in seen.counts.items():
        for cell in range(6):
            source, row = (others, place[cell, 0]) if place[cell, 0] >= 0 else (batch, cell)
            expected = source.counts[name].take(np.array([row]))
            found = part.take(np.array([cell]))
            assert found.features.tolist() == expected.features.tolist()
            assert found.counts.tolist() == expected.counts.tolist()
    assert (seen.row == batch.row).all()
    assert seen_cells(batch) is batch
