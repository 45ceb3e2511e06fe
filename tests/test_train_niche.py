"""Cells that read each other: only within their set, where they are, and as nothing before it was learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import add_dataset
from made_cells import OFFSETS, cells
from scipy.sparse import csr_matrix
from test_train_model import CONFIG, SETTINGS

from store.errors import InputRefused
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.cells import Cells, Csr
from train.loop import Run
from train.model import CellModel
from train.niche import Company
from train.objective import Objective, company_of
from train.predictor import Predictor
from train.settings import RunSettings
from train.tokens import TokenSettings, make_tokens

SETS = np.array([0, 0, 0, 1, 1, 2])
PLACES = np.array([[0.0, 0], [2, 0], [1, 3], [np.nan, np.nan], [5, 5], [7, 7]], np.float32)


def social(*, learned: bool) -> CellModel:
    torch.manual_seed(0)
    model = CellModel(replace(CONFIG, niche=True)).eval()
    if learned and model.niche is not None:
        torch.nn.init.normal_(model.niche.block.attention.o_proj.weight, std=0.3)
    return model


def test_company_begins_as_nothing_and_reads_only_its_set() -> None:
    tokens = make_tokens(cells(6), OFFSETS, SETTINGS)
    company = Company(torch.from_numpy(SETS), torch.from_numpy(PLACES))
    new = social(learned=False)
    torch.testing.assert_close(new(tokens, company=company).embedding_CD, new(tokens).embedding_CD)
    model = social(learned=True)
    before = model(tokens, company=company).embedding_CD
    assert (before - model(tokens).embedding_CD).abs().max() > 1e-3
    other = replace(tokens, value_CL=torch.where(torch.arange(6)[:, None] == 1, tokens.value_CL + 1, tokens.value_CL))
    moved = (model(other, company=company).embedding_CD - before).abs().amax(1) > 1e-6
    assert moved.tolist() == [True, True, True, False, False, False]
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    mixed = replace(tokens, **{n: v[order] for n, v in vars(tokens).items() if isinstance(v, torch.Tensor)})
    again = model(mixed, company=Company(company.set_C[order], company.place_CX[order])).embedding_CD
    torch.testing.assert_close(again, before[order], rtol=1e-4, atol=1e-5)


def test_places_are_relative_to_the_middle_of_the_set() -> None:
    found = Company(torch.from_numpy(SETS), torch.from_numpy(PLACES)).apart_CX
    moved = Company(torch.from_numpy(SETS), torch.from_numpy(PLACES) * 10 + 4).apart_CX
    torch.testing.assert_close(found, moved, equal_nan=True)
    assert found[0, 0] == -found[1, 0]
    assert found[3].isnan().all()
    assert not found[5].any()
    model, tokens = social(learned=True), make_tokens(cells(6), OFFSETS, SETTINGS)
    here, there = (
        model(tokens, company=Company(torch.from_numpy(SETS), torch.from_numpy(part))).embedding_CD
        for part in (PLACES, PLACES[[1, 0, 2, 3, 4, 5]])
    )
    assert (here - there).abs().max() > 1e-4


def niches(n_sets: int = 40, size: int = 8) -> Cells:
    """Sets whose cells share a program, of which each cell alone shows next to nothing."""
    rng = np.random.default_rng(0)
    n_cells = n_sets * size
    set_C = np.repeat(np.arange(n_sets), size)
    program = rng.integers(0, 3, n_sets)[set_C]
    rate = 0.4 + 2.5 * (np.arange(30)[None, :] % 3 == program[:, None])
    counts = csr_matrix(rng.poisson(rate)).astype(np.float32)
    counts.sort_indices()
    batch = cells(n_cells)
    return replace(
        batch,
        counts=batch.counts | {"RNA": Csr(counts.indptr.astype(np.int64), counts.indices, counts.data)},
        measured=batch.measured | {"protein": np.zeros(n_cells, bool)},
        set_C=set_C,
        place_CX=np.zeros((n_cells, 2), np.float32),
    )


def test_company_tells_what_a_cell_alone_does_not() -> None:
    batch = niches()
    panels = {"RNA": np.ones((1, 30), bool), "protein": np.ones((1, 8), bool)}
    settings = TokenSettings(budget=64, hide=(0.93, 0.97), drop_measurement=0.0)
    losses = []
    for niche in (False, True):
        torch.manual_seed(0)
        model = CellModel(replace(CONFIG, niche=niche))
        objective = Objective(panels, settings, 0, torch.device("cpu"))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        last = []
        for step in range(120):
            loss, *_ = objective(model, model, batch, step)
            optimizer.zero_grad()
            torch.autograd.backward(loss.total / loss.pairs)
            optimizer.step()
            last.append(float((loss.rebuilt / loss.pairs).detach()))
        losses.append(np.mean(last[-10:]))
    assert losses[1] < losses[0] - 0.05
    company = company_of(batch, torch.device("cpu"))
    assert company.place_CX.shape == (batch.n_cells, 2)


def test_a_run_streams_sets_and_its_checkpoint_takes_them(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 160, {"RNA": 40})
    create_snapshot(uri, "s", SnapshotSettings(seed=2, set_size=8))
    values = {
        "lake": uri,
        "snapshot": "s",
        "output": str(tmp_path / "runs"),
        "steps": 4,
        "workers": 1,
        "model": {"width": 16, "layers": 1, "heads": 2},
        "data": {"global_batch": 4, "block": 64, "window": 2, "tokens": 32, "sets": True},
        "optim": {"warmup_steps": 1},
    }
    summary = Run(parse_settings(RunSettings, values, where="test"), world=1).train()
    predictor = Predictor.load(summary.checkpoint)
    assert predictor.model.config.niche
    counts = {"RNA": csr_matrix(np.random.default_rng(0).poisson(2.0, (600, 40)).astype(np.float32))}
    sets = np.arange(600) // 7
    together = predictor.embed(predictor.cells(counts, sets=sets, places=np.zeros((600, 2), np.float32)))
    part = {"RNA": counts["RNA"][252:259]}
    alone = predictor.embed(predictor.cells(part, sets=[0] * 7, places=np.zeros((7, 2), np.float32)))
    np.testing.assert_allclose(together[252:259], alone, atol=1e-5)
    with pytest.raises(InputRefused, match="one number for each of the 600 cells is needed, ascending"):
        predictor.cells(counts, sets=sets[::-1])
