"""The simulator: repeatable, and as true as it says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mudata
import numpy as np
import pytest
import scanpy

from ingest.simulate import Simulation, SimulationSettings, simulate, write_files
from ingest.sources.form import content_digest

SMALL = SimulationSettings(cells=900, genes=120, proteins=8, peaks=20, targets=5, null_targets=1)


@pytest.fixture(scope="module")
def made() -> Simulation:
    return simulate(SMALL)


def test_the_same_settings_make_the_same_cells(made: Simulation) -> None:
    again = simulate(SMALL)
    assert made.obs.equals(again.obs)
    assert all((made.counts[name] != again.counts[name]).nnz == 0 for name in made.counts)
    other = simulate(SMALL.model_copy(update={"seed": 1}))
    assert (made.counts["RNA"] != other.counts["RNA"]).nnz > 0
    assert np.array_equal(made.truth.effect_TG, other.truth.effect_TG)


def test_knock_outs_do_what_the_truth_says(made: Simulation) -> None:
    counts = made.counts["RNA"].toarray()
    mean = {}
    for target in [*made.truth.targets, "control"]:
        cells = counts[made.obs["perturbation"] == target]
        mean[target] = np.log(cells.sum(0) / cells.sum() + 1e-5)
    for target, effect in zip(made.truth.targets, made.truth.effect_TG, strict=True):
        change = mean[target] - mean["control"]
        if target in made.truth.null_targets:
            assert not effect.any()
        else:
            assert np.corrcoef(change, effect)[0, 1] > 0.7
            assert effect[made.truth.genes.index(target)] < 0


def test_proteins_follow_the_rna_of_their_gene(made: Simulation) -> None:
    groups = made.obs.groupby(["cell_type", "time"]).indices.values()
    mean = {
        name: np.stack([np.log(made.counts[name][cells].toarray().mean(0) + 0.05) for cells in groups])
        for name in ("RNA", "protein")
    }
    links = enumerate(made.truth.gene_of_protein)
    linked = [np.corrcoef(mean["RNA"][:, gene], mean["protein"][:, protein])[0, 1] for protein, gene in links]
    assert np.median(linked) > 0.7


@pytest.mark.filterwarnings("ignore:.*pull_on_update.*:FutureWarning")  # mudata, on reading any file
@pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")  # the same
def test_the_files_hold_the_same_cells_for_other_peoples_readers(made: Simulation, tmp_path: Path) -> None:
    write_files(tmp_path, made)
    digest = content_digest(str(tmp_path / "10x"))
    time.sleep(1.1)  # a file that held the time of day would differ now
    write_files(tmp_path, made)
    assert content_digest(str(tmp_path / "10x")) == digest
    tenx = scanpy.read_10x_mtx(tmp_path / "10x", gex_only=False)
    assert (tenx.X[:, :120] != made.counts["RNA"]).nnz == 0
    assert (tenx.X[:, 120:] != made.counts["protein"]).nnz == 0
    h5mu = mudata.read_h5mu(tmp_path / "cells.h5mu")
    assert (made.counts["ATAC"] != h5mu["atac"].X).nnz == 0
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert list(truth["log_fold_change"]) == made.truth.targets
    assert truth["null_targets"] == made.truth.null_targets
    assert len(truth["genes"]) == 120
