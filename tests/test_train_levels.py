"""Levels and fractions, from files to a trained model: peptides, metabolites and methylation beside counts."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from scipy.sparse import csr_matrix

from ingest.job import JobSettings, SourceSettings
from ingest.run import run
from store.errors import InputRefused, UsageError
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot, open_snapshot
from train.cells import PROMPTS, Cells, Csr
from train.checkpoint import Checkpoint, Vocabulary
from train.config import ModelConfig
from train.grow import grow
from train.likelihood import Targets, beta_binomial_cost, cost, gaussian_cost
from train.loop import Run
from train.model import CellModel
from train.objective import Objective
from train.predictor import Predictor
from train.record import read_metrics
from train.settings import RunSettings
from train.start import begin, first_output, standards
from train.stream import Stream
from train.tokens import TokenSettings, make_tokens


def test_costs_of_levels_and_fractions_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    covered = rng.integers(1, 30, (5, 8)).astype(np.float64)
    methylated = np.floor(covered * rng.uniform(size=covered.shape))
    logit, raw = rng.normal(size=covered.shape), rng.normal(size=8)
    concentration = np.log1p(np.exp(raw)) + 1e-2
    p = 1 / (1 + np.exp(-logit))
    expected = -scipy.stats.betabinom.logpmf(
        methylated, covered, p * concentration + 1e-6, (1 - p) * concentration + 1e-6
    )
    found = beta_binomial_cost(*(torch.from_numpy(part) for part in (methylated, covered, logit, raw)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    level, mean, log_sd = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=8)
    below = rng.uniform(size=level.shape) < 0.4
    normal = scipy.stats.norm(mean, np.exp(log_sd))
    expected = np.where(below, -normal.logcdf(level), -normal.logpdf(level))
    found = gaussian_cost(*(torch.from_numpy(part) for part in (level, mean, log_sd, below)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_censoring_finds_the_mean_that_half_the_minimum_misses() -> None:
    rng = np.random.default_rng(1)
    truth, limit = rng.normal(0.0, 1.0, 20000), 0.5
    below = torch.from_numpy(truth < limit)[:, None]
    levels = torch.from_numpy(np.maximum(truth, limit))[:, None]
    targets = Targets(levels, torch.ones_like(below), ~below, torch.zeros_like(levels))
    mean, log_sd = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([mean, log_sd], max_iter=50)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cost("gaussian", targets, mean.expand_as(levels), log_sd).mean()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(step)
    imputed = np.where(truth < limit, limit / 2, truth).mean()
    assert abs(float(mean.detach())) < 0.05 < abs(imputed)
    assert abs(float(log_sd.detach())) < 0.05


def test_standards_are_of_what_was_found_and_logs_are_taken_of_intensities_only() -> None:
    found = csr_matrix((np.array([2.0, 4.0, 0.0, 5.0]), ([0, 1, 2, 0], [0, 0, 0, 1])), shape=(3, 3))
    plain = standards(found)
    assert not plain.logged
    np.testing.assert_allclose(plain.center_G, [2.0, 5.0, 3.5])  # the last was in no cell: as the others are
    np.testing.assert_allclose(plain.scale_G, [2.0, 2.0, 2.0])
    np.testing.assert_allclose(plain.limit_G, [-1.0, 0.0, -1.0])
    np.testing.assert_allclose(plain.of(found).toarray()[:, 0], [0.0, 1.0, -1.0])
    assert standards(found * 1000).logged
    assert not standards(-found * 1000).logged
    np.testing.assert_allclose(first_output("beta-binomial", found / 5), np.log([1.7 / 2.3, 1.5 / 0.5, 1.0]), rtol=1e-6)
    np.testing.assert_allclose(first_output("bernoulli", found), np.log([3.5 / 0.5, 1.5 / 2.5, 0.5 / 3.5]), rtol=1e-6)


def small(likelihood: dict[str, str] | None = None) -> tuple[CellModel, Objective, Cells]:
    """A model of 4 genes, 3 metabolites and 2 sites; of three cells the last lacks metabolites."""
    genes = Csr(np.array([0, 2, 3, 5]), np.array([0, 2, 1, 0, 3]), np.array([3.0, 1.0, 2.0, 1.0, 4.0]))
    metabolites = Csr(np.array([0, 2, 3, 3]), np.array([0, 1, 1]), np.array([-1.0, 0.0, 2.0]))
    sites = Csr(np.array([0, 1, 3, 3]), np.array([1, 0, 1]), np.array([0.25, 0.0, 1.0]))
    reads = Csr(np.array([0, 1, 2, 2]), np.array([0, 0]), np.array([8.0, 4.0]))
    codes = {name: np.zeros(3, np.int32) for name in PROMPTS}
    cells = Cells(
        3,
        {"RNA": genes, "metabolite": metabolites, "methylation": sites, "methylation_coverage": reads},
        {"RNA": np.ones(3, bool), "metabolite": np.array([1, 1, 0], bool), "methylation": np.array([1, 1, 0], bool)},
        np.zeros(3, np.int32),
        codes,
        np.zeros((3, 1), np.int32),
        {"time": np.full(3, np.nan, np.float32), "dose": np.full(3, np.nan, np.float32)},
        np.arange(3),
    )
    sizes = {"RNA": 4, "metabolite": 3, "methylation": 2}
    levels = ("metabolite", "methylation")
    torch.manual_seed(0)
    model = CellModel(
        ModelConfig(sizes, dict.fromkeys(PROMPTS, 1), 2, 2, 16, 1, 2, levels=levels, likelihood=likelihood or {})  # type: ignore[arg-type]
    )
    matrices = {
        name: csr_matrix((cells.counts[name].counts, cells.counts[name].features, cells.counts[name].indptr), (3, size))
        for name, size in sizes.items()
    }
    begin(model, matrices)
    panels = {name: np.ones((1, size), bool) for name, size in (sizes | {"methylation_coverage": 1}).items()}
    panels["metabolite"][0, 2] = False
    covered = {"methylation": np.array([-1, 0])}
    settings = TokenSettings(budget=16, levels=levels)
    return model, Objective(panels, settings, 0, torch.device("cpu"), 8, covered), cells


def test_what_was_looked_for_and_not_found_is_at_the_limit_and_fractions_weigh_by_their_reads() -> None:
    model, objective, cells = small()
    targets = objective.targets(cells, model)
    metabolite = targets["metabolite"]
    np.testing.assert_array_equal(metabolite.known, [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(metabolite.found[:2], [[1, 1, 0], [0, 1, 0]])
    assert model.levels is not None
    assert float(metabolite.values[1, 0]) == float(model.levels.limit_F[model.config.offsets["metabolite"]])
    methylation = targets["methylation"]
    np.testing.assert_array_equal(methylation.known, [[0, 1], [1, 1], [0, 0]])
    assert methylation.covered is not None
    np.testing.assert_array_equal(methylation.covered[:2, 1], [8.0, 4.0])
    np.testing.assert_array_equal(methylation.covered[:, 0], 1.0)
    loss, *_ = objective(model, model, cells, 0)
    assert float(loss.pairs) == 7
    torch.autograd.backward(loss.total)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_level_of_zero_is_a_token_and_its_standardised_value_is_what_the_model_reads() -> None:
    model, objective, cells = small()
    tokens = make_tokens(cells, model.config.offsets, objective.settings)
    first = model.config.offsets["metabolite"]
    shown = dict(zip(tokens.feature_CL[0].tolist(), tokens.value_CL[0].tolist(), strict=True))
    assert (shown[first], shown[first + 1]) == (-1.0, 0.0)
    number = list(model.config.n_features).index("metabolite")
    assert float(tokens.log_depth_CM[0, number]) == 0.0
    assert model.levels is not None
    assert float(model.levels(torch.tensor([0.0]), torch.tensor([first + 1]))) == pytest.approx(-0.7071, abs=1e-4)
    assert float(model.levels(torch.tensor([1.5]), torch.tensor([1]))) == 1.5
    with pytest.raises(ValueError, match="'rank' are for counts; metabolite holds levels"):
        TokenSettings(values="rank", levels=("metabolite",))


def test_a_likelihood_must_go_with_what_a_measurement_holds() -> None:
    model, *_ = small({"RNA": "bernoulli"})
    assert model.log_dispersion("RNA") is None
    with pytest.raises(ValueError, match="'gaussian' does not go with counts, which RNA holds here"):
        small({"RNA": "gaussian"})
    with pytest.raises(ValueError, match="'poisson' does not go with levels"):
        small({"metabolite": "poisson"})
    with pytest.raises(ValueError, match="there is no such measurement"):
        small({"lipid": "gaussian"})


def test_a_grown_model_measures_levels_as_before_and_takes_no_new_ones() -> None:
    model, objective, _cells = small()
    words = {name: [f"{name}{number}" for number in range(size)] for name, size in model.config.n_features.items()}
    vocabulary = {name: Vocabulary(ids, ids, [""] * len(ids)) for name, ids in words.items()}
    loaded = Checkpoint(model.eval(), objective.settings, vocabulary, {name: [""] for name in PROMPTS}, {})
    grown = grow(loaded, {"RNA": [("new", "new", "")]})
    before, after = (one.model.levels for one in (loaded, grown))
    assert before is not None
    assert after is not None
    for name, first in model.config.offsets.items():
        moved = grown.model.config.offsets[name]
        for number in range(model.config.n_features[name]):
            values = [
                part(torch.tensor([3.0]), torch.tensor([at + number])) for part, at in ((before, first), (after, moved))
            ]
            assert values[0] == values[1]
    assert float(after(torch.tensor([3.0]), torch.tensor([5]))) == 3.0  # the new gene: a count
    with pytest.raises(InputRefused, match="metabolite holds levels"):
        grow(loaded, {"metabolite": [("new", "new", "")]})


# --------------------------------------------------------------------------------------------------------- real files
@pytest.fixture(scope="module")
def lake(shared_data: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> str:
    """Peptides of 73 cells, metabolites of serum, and made-up methylation with its coverage."""
    folder = tmp_path_factory.mktemp("levels")
    rng = np.random.default_rng(0)
    cells = pd.DataFrame(index=[f"m{number}" for number in range(60)])
    sites = pd.DataFrame(index=[f"s{number}" for number in range(12)])
    reads = rng.poisson(4.0, (60, 12)).astype(np.float32)
    kind = np.arange(60) % 2
    rate = np.where((np.arange(12) % 2)[None, :] == kind[:, None], 0.9, 0.1)
    fraction = rng.binomial(reads.astype(int), rate) / np.where(reads > 0, reads, np.nan)
    parts = {
        "methylation": anndata.AnnData(fraction.astype(np.float32), cells, sites),
        "methylation_coverage": anndata.AnnData(reads, cells, sites),
    }
    with mudata.set_options(pull_on_update=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a site has the same name in both
        mudata.MuData(parts).write(folder / "methylation.h5mu")
    given = [
        {"uri": str(shared_data / "derived/leduc_scp_peptides.h5ad"), "measurement": "peptide", "values": "value"},
        {"uri": str(shared_data / "metabolomics/MTBLS60"), "assay_file": "a_MTBLS60_dippB_GCxGC_MS.txt"},
        {
            "uri": str(folder / "methylation.h5mu"),
            "values": {"methylation": "value", "methylation_coverage": "counts"},
            "organism": "homo_sapiens",
        },
    ]
    uri = str(folder / "lake")
    sources = tuple(SourceSettings(**one, dataset_id=name) for one, name in zip(given, "pmf", strict=True))
    outcomes = run(JobSettings(lake=uri, source=sources))
    assert not [outcome for outcome in outcomes if outcome.state == "failed"], outcomes
    create_snapshot(uri, "s", SnapshotSettings(seed=1))
    return uri


@pytest.mark.ray
def test_a_snapshot_holds_levels_as_they_are_and_says_so(lake: str, shared_data: Path) -> None:
    snapshot = open_snapshot(lake, "s")
    assert snapshot.levels == ("peptide", "metabolite", "methylation")
    block = snapshot.block("peptide", 0, snapshot.n_rows)
    source = anndata.read_h5ad(shared_data / "derived/leduc_scp_peptides.h5ad").X
    assert len(block.counts) == np.isfinite(source).sum()
    np.testing.assert_allclose(np.sort(block.counts), np.sort(source[np.isfinite(source)]), rtol=1e-6)
    sites = snapshot.block("methylation", 0, snapshot.n_rows)
    assert (sites.counts == 0).any(), "a site without a methylated read is not a site without reads"
    measured = snapshot.cells(["measured_peptide"])["measured_peptide"].to_numpy()
    np.testing.assert_array_equal(measured, np.diff(block.indptr) > 0)
    assert create_snapshot(lake, "counts", SnapshotSettings(measurements=("methylation_coverage",))).levels == ()
    with pytest.raises(UsageError, match="no chosen cell has levels of 'methylation_coverage'"):
        create_snapshot(lake, "none", SnapshotSettings(levels=("methylation_coverage",)))


@pytest.mark.ray
def test_streamed_tokens_of_levels_are_the_levels(lake: str) -> None:
    snapshot = open_snapshot(lake, "s")
    stream = Stream(snapshot, batch=32, tokens=TokenSettings.whole(budget=300))
    batch = next(iter(stream.epoch(0)))
    first = 1
    for name in snapshot.measurements:
        size = len(snapshot.vocabulary(name))
        mine = (batch.feature_CL >= first) & (batch.feature_CL < first + size)
        if name == "peptide":
            found = batch.value_CL[mine].numpy()
            stored = snapshot.block("peptide", 0, snapshot.n_rows).counts
            assert len(found)
            assert np.isin(found, stored).all()
        first += size


@pytest.mark.ray
def test_steps_with_levels_that_are_made_together_are_those_made_alone(
    lake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(open_snapshot(lake, "s"), batch=8, tokens=TokenSettings(budget=300))
    assert stream._steps_together(1, 1) > 4
    together = list(stream.steps(0, 30))
    monkeypatch.setattr("train.stream.GROUP_CELLS", 1)
    for one, other in zip(together, stream.steps(0, 30), strict=True):
        for name, value in vars(one).items():
            again = getattr(other, name)
            torch.testing.assert_close(again, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.ray
def test_a_model_learns_levels_and_tells_them_in_their_unit(lake: str, tmp_path: Path) -> None:
    values = {
        "lake": lake,
        "snapshot": "s",
        "output": str(tmp_path),
        "steps": 120,
        "workers": 1,
        "model": {"width": 16, "layers": 1, "heads": 2},
        "data": {"global_batch": 64, "block": 64, "tokens": 128},
        "optim": {"warmup_steps": 5, "lr": 0.01},
    }
    summary = Run(parse_settings(RunSettings, values, where="test"), world=1).train()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.05
    predictor = Predictor.load(summary.checkpoint)
    assert list(predictor.vocabulary) == ["peptide", "metabolite", "methylation"]
    assert predictor.model.config.levels == predictor.tokens.levels == ("peptide", "metabolite", "methylation")
    snapshot = open_snapshot(lake, "s")
    block = snapshot.block("methylation", 0, snapshot.n_rows)
    rows = np.flatnonzero(np.diff(block.indptr) > 0)
    sites = csr_matrix((block.counts, block.features, block.indptr), (snapshot.n_rows, 12))[rows]
    cells = predictor.cells({"methylation": sites})
    expected = predictor.shares(cells, "methylation")
    assert ((expected > 0) & (expected < 1)).all()
    stored = sites.tocoo()
    told = expected[stored.row, stored.col]
    assert np.corrcoef(told, stored.data)[0, 1] > 0.5
    peptides = predictor.shares(cells, "peptide")
    assert 5 < np.median(peptides) < 20, "log intensities, as the source has them"
    with pytest.raises(InputRefused, match="negative or no numbers"):
        predictor.cells({"peptide": csr_matrix([[np.nan] * len(predictor.vocabulary["peptide"].feature_id)])})
