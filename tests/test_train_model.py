"""The model: hidden values never enter, company does not matter, likelihoods are those of the textbook."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from made_cells import OFFSETS, cells

from train.cells import NUMBERS, PROMPTS, Controls
from train.config import ModelConfig
from train.layout import lay_out
from train.likelihood import Targets, log_rates, mean_cost
from train.model import CellModel
from train.objective import Loss, Objective, seen_cells
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
    values = torch.from_numpy(counts).double()
    targets = Targets(values, panel, values > 0, torch.log(values.sum(1, keepdim=True)))
    found = mean_cost("poisson", targets, shares, None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    r = 2.5
    raw = torch.full((10,), float(np.log(np.expm1(r - 1e-4))), dtype=torch.float64)
    expected = -scipy.stats.nbinom.logpmf(counts[:, :8], r, r / (r + mean[:, :8])).mean(1)
    found = mean_cost("negative binomial", targets, shares, raw)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_an_unmeasured_feature_and_an_unmeasured_cell_carry_no_loss(model: CellModel) -> None:
    batch = cells()
    panels = {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}
    panels["RNA"][0, 5] = False
    objective = Objective(panels, SETTINGS, 0, torch.device("cpu"))
    targets = objective.targets(batch, model)
    logits = model(make_tokens(batch, OFFSETS, SETTINGS))[1]
    before = rebuilt(objective, model, logits, targets)
    moved = {name: values.clone() for name, values in logits.items()}
    moved["RNA"][:, 5] += 100.0
    after = rebuilt(objective, model, moved, targets)
    assert float(before.pairs) == 80
    torch.testing.assert_close(before.rebuilt, after.rebuilt)
    absent = replace(batch, measured={**batch.measured, "protein": np.arange(40) < 10})
    targets = objective.targets(absent, model)
    assert float(rebuilt(objective, model, logits, targets).pairs) == 50


def rebuilt(
    objective: Objective,
    model: CellModel,
    logits: dict[str, torch.Tensor],
    targets: dict[str, Targets],
) -> Loss:
    none = torch.empty(0, dtype=torch.int64)
    return objective._loss(model, logits, torch.empty(0), targets, dict.fromkeys(targets, (none, none)))


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


def test_what_is_asked_for_is_hidden_or_zero_and_the_same_whoever_sits_beside() -> None:
    batch = cells()
    panels = {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}
    objective = Objective(panels, SETTINGS, 0, torch.device("cpu"), queries=8)
    model = CellModel(CONFIG)
    tokens = make_tokens(batch, OFFSETS, SETTINGS, chance=(0, 5))
    targets = objective.targets(batch, model)["RNA"]
    itself = np.ones(batch.n_cells, bool)
    cell, feature = objective._ask("RNA", batch, itself, tokens, targets, model, (0, 5))
    shown = {(c, f - 1) for c in range(batch.n_cells) for f in tokens.feature_CL[c][tokens.valid_CL[c]].tolist()}
    asked = set(zip(cell.tolist(), feature.tolist(), strict=True))
    assert not asked & shown
    n_nonzero = np.bincount(cell[targets.found[cell, feature]], minlength=batch.n_cells)
    assert n_nonzero.max() == 4
    some = batch.take(np.array([3, 30]))
    alone = objective._ask(
        "RNA",
        some,
        itself[:2],
        make_tokens(some, OFFSETS, SETTINGS, chance=(0, 5)),
        objective.targets(some, model)["RNA"],
        model,
        (0, 5),
    )
    for place, row in enumerate((3, 30)):
        assert sorted(alone[1][alone[0] == place].tolist()) == sorted(feature[cell == row].tolist())


def test_blocks_read_what_their_kind_says() -> None:
    """Within-measurement blocks alone let nothing of a protein reach RNA's tokens; a joint block does."""
    config = replace(CONFIG, layers=4, attention="hybrid")
    assert config.kinds == ["within", "between", "within", "joint"]
    assert replace(config, attention="full").kinds == ["joint"] * 4
    torch.manual_seed(0)
    model = CellModel(config).eval()
    batch = cells()
    part = batch.counts["protein"]
    other = replace(batch, counts={**batch.counts, "protein": replace(part, counts=part.counts[::-1].copy())})
    tokens = [make_tokens(one, OFFSETS, SETTINGS) for one in (batch, other)]
    n_head = 1 + CONFIG.prompt_tokens
    layouts = [lay_out(one, n_head, config.bottlenecks) for one in tokens]
    first, second = (model.encode(one)[0] for one in tokens)
    rna = layouts[0].feature_N[tokens[0].feature_CL.flatten()[layouts[0].source_N] < OFFSETS["protein"]]
    assert (first[rna] - second[rna]).abs().max() > 1e-5
    for number, kind in enumerate(config.kinds):
        x = torch.randn(layouts[0].n_tokens, config.width, generator=torch.Generator().manual_seed(number))
        changed = x.clone()
        changed[np.setdiff1d(np.arange(len(x)), [*rna.tolist(), *layouts[0].hub_H.tolist()])] += 1.0
        cut = layouts[0].cells if kind == "joint" else layouts[0].pieces
        if kind != "between":
            moved = (model.blocks[number](x, cut)[rna] - model.blocks[number](changed, cut)[rna]).abs().max()
            assert (moved > 1e-6) == (kind == "joint")


def test_the_layout_puts_every_token_in_one_place() -> None:
    tokens = make_tokens(cells(), OFFSETS, SETTINGS)
    layout = lay_out(tokens, 5, 3)
    places = torch.cat([layout.head_CP.flatten(), layout.bottleneck_B, layout.feature_N])
    assert sorted(places.tolist()) == list(range(layout.n_tokens))
    assert len(layout.feature_N) == int(tokens.valid_CL.sum())
    assert (layout.cells.segment_N[layout.feature_N] == layout.cell_N).all()
    assert layout.hubs.lengths.tolist() == (5 + 3 * tokens.measured_CM.sum(1)).tolist()
