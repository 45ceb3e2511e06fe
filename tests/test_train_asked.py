"""Tasks are prompts: what is asked follows from what is hidden, every prompt is used, and types hang together."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from made_cells import OFFSETS, cells
from scipy.sparse import csr_matrix
from studies import FEATURES, study
from test_train_model import CONFIG, SETTINGS

from store.errors import InputRefused
from train.asked import TASKS, ask
from train.cells import Controls
from train.evaluation.ours import cells_of
from train.evaluation.scratch import ScratchSettings, train_on
from train.evaluation.study import Study
from train.fourier import FOURIER, fourier
from train.model import CellModel
from train.objective import Objective, seen_cells
from train.ontology import type_terms
from train.predictor import Predictor
from train.prototypes import Prototypes
from train.tokens import TokenSettings, make_tokens

PANELS = {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}


def test_a_number_below_nought_is_read_as_such_and_the_others_as_before() -> None:
    number_CF = torch.tensor([[-6.0, 6.0, 0.0, torch.nan]])
    below, above, nought, unsaid = fourier(number_CF).view(4, -1)
    assert torch.equal(below[:FOURIER], -above[:FOURIER]), "sines"
    assert torch.equal(below[FOURIER : 2 * FOURIER], above[FOURIER : 2 * FOURIER]), "cosines"
    assert float(below[-2]) == pytest.approx(-np.log(7.0))
    assert nought[-2:].tolist() == [0.0, 1.0]
    assert not unsaid.any()


def test_what_is_asked_is_what_is_hidden() -> None:
    batch = cells(400)
    place = np.where(np.arange(400) % 4 == 0, np.arange(400) % 3, -1)[:, None]
    others = replace(cells(3), numbers={"time": np.array([1.0, 2.0, 3.0], np.float32), "dose": np.zeros(3, np.float32)})
    time = np.full(400, 8.0, np.float32)
    hit = np.where(np.arange(400) % 8 == 0, 2, 1)[:, None].astype(np.int32)
    batch = replace(batch, controls=Controls(others, place), perturbation=hit, numbers=batch.numbers | {"time": time})
    settings = replace(SETTINGS, drop_measurement=0.4)
    objective = Objective(PANELS, settings, 0, torch.device("cpu"))
    model, chance = CellModel(CONFIG), (0, 3)
    tokens = make_tokens(batch, OFFSETS, settings, chance=chance, seen=seen_cells(batch))
    asked = objective._asked(batch, place[:, 0] < 0, tokens, objective.targets(batch, model), chance)
    shown = tokens.measured_CM.numpy()
    found = np.array([TASKS[code] for code in asked.task_C.tolist()])
    assert 0.1 < (found == "").mean() < 0.2
    through = place[:, 0] >= 0
    assert set(found[through & (hit[:, 0] == 2)]) == {"", "perturb"}
    assert set(found[through & (hit[:, 0] == 1)]) == {"", "forecast"}
    own = ~through
    assert set(found[own & shown.all(1)]) == {"", "reconstruct", "annotate"}
    assert set(found[own & shown.any(1) & ~shown.all(1)]) == {"", "translate", "annotate"}
    assert set(found[own & ~shown.any(1)]) == {"", "generate"}
    translate = (found == "translate") & asked.target_CM.any(1).numpy()
    np.testing.assert_array_equal(asked.target_CM.numpy()[translate], ~shown[translate])
    elapsed = asked.elapsed_C.numpy()
    said = ~np.isnan(elapsed)
    assert 0.75 < said.mean() < 0.95
    np.testing.assert_array_equal(elapsed[said & through], (8.0 - (1.0 + np.arange(400) % 3))[said & through])
    assert not elapsed[said & own].any()
    depth = np.expm1(asked.log_depth_CM.numpy())
    whole = np.stack([np.add.reduceat(np.append(p.counts, 0), p.indptr[:-1]) for p in batch.counts.values()], axis=1)
    np.testing.assert_allclose(depth[depth > 0.5], whole.clip(min=1)[depth > 0.5], rtol=1e-4)


def test_cells_are_asked_alike_whoever_sits_beside() -> None:
    batch = cells(60)
    objective, model = Objective(PANELS, SETTINGS, 0, torch.device("cpu")), CellModel(CONFIG)

    def asked(rows: np.ndarray) -> torch.Tensor:
        some = batch.take(rows)
        tokens = make_tokens(some, OFFSETS, SETTINGS, chance=(0, 1))
        return objective._asked(some, np.ones(len(rows), bool), tokens, objective.targets(some, model), (0, 1)).task_C

    assert torch.equal(asked(np.arange(60))[[5, 41]], asked(np.array([5, 41])))


def led(column: str, values: list[object]) -> Study:
    """Cells whose counts follow one thing that is said of them, and nothing else."""
    rng = np.random.default_rng(0)
    base = rng.uniform(2, 6, len(FEATURES))
    shift = rng.normal(0, 1.0, (len(values), len(FEATURES)))
    number = np.arange(360) % len(values)
    return study(pd.DataFrame({column: [values[n] for n in number]}), base * np.exp(shift[number]))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tissue", ["blood", "lung", "liver"]),
        ("cell_type", ["B cell", "T cell", "monocyte"]),
        ("perturbation", ["control", "x", "y"]),
        ("perturbation_type", ["none", "drug", "genetic"]),
        ("time", [0.0, 6.0, 48.0]),
        ("dose", [0.1, 1.0, 10.0]),
    ],
)
def test_every_prompt_is_used_and_a_shuffled_one_costs(column: str, values: list[object]) -> None:
    made = led(column, values)
    tokens = TokenSettings(budget=32, drop_measurement=0.8, drop_cell_type=0.15)
    settings = ScratchSettings(steps=60, tokens=tokens, model={"width": 16, "layers": 1, "heads": 2}, lr=2e-2)
    predictor = train_on(made, settings)
    form = cells_of(predictor, made, [], (column,))
    counts_CG = made.counts["RNA"].toarray()

    def cost(rows: np.ndarray) -> float:
        share_CG = predictor.shares(form.take(rows), "RNA")
        return -float((counts_CG * np.log(share_CG)).sum() / counts_CG.sum())

    right = np.arange(made.n_cells)
    assert cost(right) < cost(np.roll(right, 1)) - 0.1


def test_an_answer_later_is_asked_for_by_how_much() -> None:
    """What is seen says where a cell is; where it will be only the elapsed time says."""
    rng = np.random.default_rng(0)
    batch = cells(240)
    start = rng.integers(0, 10, 240)
    later = np.array([0.0, 1.0, 4.0])[np.arange(240) % 3]
    ends = (start + later.astype(int) * 2) % 30
    counts = csr_matrix(rng.poisson(0.2 + 6.0 * (np.abs(np.arange(30)[None] - ends[:, None]) < 2))).astype(np.float32)
    seen = csr_matrix(rng.poisson(0.2 + 6.0 * (np.abs(np.arange(30)[None] - start[:, None]) < 2))).astype(np.float32)

    def with_counts(part: csr_matrix, time: np.ndarray) -> object:
        rna = replace(batch.counts["RNA"], indptr=part.indptr.astype(np.int64), features=part.indices, counts=part.data)
        silent = {name: np.zeros(240, np.int32) for name in batch.prompts}
        return replace(
            batch,
            counts=batch.counts | {"RNA": rna},
            measured=batch.measured | {"protein": np.zeros(240, bool)},
            prompts=silent,
            perturbation=np.ones((240, 1), np.int32),
            numbers={"time": time.astype(np.float32), "dose": np.full(240, np.nan, np.float32)},
        )

    times = rng.uniform(0, 50, 240)
    one = replace(
        with_counts(counts, times + later),  # type: ignore[type-var]
        controls=Controls(with_counts(seen, times), np.arange(240)[:, None]),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    model = CellModel(CONFIG)
    settings = TokenSettings(budget=64, drop_measurement=0.0, hide=(0.0, 0.0), drop_prompt=0.0)
    objective = Objective(PANELS, settings, 0, torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        loss, *_ = objective(model, model, one, step)
        optimizer.zero_grad()
        torch.autograd.backward(loss.total / loss.pairs)
        optimizer.step()

    def cost(elapsed: np.ndarray) -> float:
        tokens = make_tokens(one, OFFSETS, settings, seen=seen_cells(one))
        asked = replace(ask(tokens, "forecast"), elapsed_C=torch.from_numpy(elapsed.astype(np.float32)))
        with torch.no_grad():
            logits = model(tokens, asked=asked).logits["RNA"]
        share = logits.log_softmax(1).numpy()
        return -float(counts.multiply(share).sum() / counts.sum())

    assert cost(later) < cost(np.roll(later, 1)) - 0.1


def test_cells_are_drawn_from_what_is_said_of_them() -> None:
    made = led("tissue", ["blood", "lung"])
    settings = ScratchSettings(steps=60, tokens=TokenSettings(budget=32, drop_measurement=0.8), lr=2e-2)
    predictor = train_on(made, replace(settings, model={"width": 16, "layers": 1, "heads": 2}))
    said = predictor.cells({}, {"tissue": ["blood"] * 200 + ["lung"] * 200})
    drawn = predictor.draw(said, "RNA", 500.0, seed=1)
    assert drawn.shape == (400, len(FEATURES))
    assert drawn.sum(1).mean() == pytest.approx(500, rel=0.1)
    assert (predictor.draw(said, "RNA", 500.0, seed=1) != drawn).nnz == 0
    assert (predictor.draw(said, "RNA", 500.0, seed=2) != drawn).nnz > 0
    share = [np.asarray(part.sum(0)).ravel() / part.sum() for part in (drawn[:200], drawn[200:])]
    truth = [made.counts["RNA"][made.label("tissue") == name].sum(0) for name in ("blood", "lung")]
    own = [np.corrcoef(share[n], np.asarray(truth[n]).ravel())[0, 1] for n in range(2)]
    other = [np.corrcoef(share[n], np.asarray(truth[1 - n]).ravel())[0, 1] for n in range(2)]
    assert min(own) > max(other) + 0.1
    with pytest.raises(InputRefused, match="of RNA they can"):
        predictor.draw(said, "ATAC", 500.0)
    with pytest.raises(InputRefused, match="a span above 0"):
        predictor.forecast(said, 0.0)
    assert predictor.forecast(said, 2.0)["RNA"].delta_G.shape == (len(FEATURES),)


# ---------------------------------------------------------------------------------------------------------------- types
TYPES = ["", "B cell", "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "T cell", "blob 7"]


def test_types_share_terms_and_a_general_one_covers_its_kinds() -> None:
    terms = type_terms(TYPES)
    covers = [{TYPES[kind] for kind in np.flatnonzero(row)} for row in terms.covers_YY]
    assert covers == [set(), {"B cell"}, {TYPES[2]}, {TYPES[3]}, {"T cell", TYPES[2], TYPES[3]}, {"blob 7"}]
    ends = np.append(terms.first_Y, len(terms.term_E))
    own = [set(terms.term_E[ends[n] : ends[n + 1]].tolist()) for n in range(len(TYPES))]
    assert own[4] < own[2], "all that a T cell is, a CD4 T cell is too"
    assert len(own[2] & own[3]) > len(own[2] & own[1]) > 0
    assert (len(own[0]), len(own[5])) == (0, 1)
    assert terms.n_terms == len(set().union(*own))


def test_a_coarse_label_costs_the_chance_of_all_its_kinds_too() -> None:
    terms = type_terms(TYPES)
    config = replace(
        CONFIG, n_prompts=CONFIG.n_prompts | {"cell_type": 6}, n_terms=terms.n_terms, n_term_links=len(terms.term_E)
    )
    torch.manual_seed(0)
    head = Prototypes(config)
    torch.nn.init.normal_(head.terms.weight)
    head.know(*(torch.from_numpy(part) for part in (terms.term_E, terms.first_Y, terms.covers_YY)))
    log_p = head(torch.randn(7, 16))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(7))
    assert not log_p.exp()[:, 0].any()
    p = log_p.exp()
    coarse = head.cost(log_p, torch.full((7,), 4))
    torch.testing.assert_close(coarse, -(torch.log(p[:, 2] + p[:, 3] + p[:, 4]) + log_p[:, 4]) / 2)
    torch.testing.assert_close(head.cost(log_p, torch.full((7,), 2)), -log_p[:, 2])
    ends = np.append(terms.first_Y, len(terms.term_E))
    weight = head.terms.weight
    slow = [weight[terms.term_E[a:b]].sum(0) / max(1, b - a) ** 0.5 for a, b in pairwise(ends)]
    x = torch.randn(3, 16)
    expected = (head.read(x) @ torch.stack(slow).T + head.bias)[:, 1:].log_softmax(1)
    torch.testing.assert_close(head(x)[:, 1:], expected)


def test_a_model_learns_types_without_being_told_them_and_a_saved_one_answers_alike() -> None:
    made = led("cell_type", ["B cell", "T cell", "monocyte", "CD4-positive, alpha-beta T cell"])
    predictor = train_on(made, ScratchSettings(steps=80, model={"width": 16, "layers": 1, "heads": 2}, lr=1e-2))
    form = cells_of(predictor, made, ["RNA"], ("cell_type",))
    blind = cells_of(predictor, made, ["RNA"], ())
    p = predictor.annotate(blind)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-5)
    assert not p[:, 0].any()
    names = np.array(predictor.prompts["cell_type"])
    assert (names[p.argmax(1)] == made.label("cell_type")).mean() > 0.9
    assert p.shape == (form.n_cells, 5)
    none = train_on(made, ScratchSettings(steps=1, types=False, model={"width": 16, "layers": 1, "heads": 2}))
    with pytest.raises(InputRefused, match="not trained to tell cell types"):
        none.annotate(blind)
    assert isinstance(predictor, Predictor)
