"""The whole road on published cells: Census, Perturb-seq, CITE-seq and multiome, from sources to a served answer.

What the lake holds is compared with the sources as other people's readers give them, never with our own reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import cellxgene_census
import httpx
import mudata
import numpy as np
import pytest
import scipy.sparse
import tiledbsoma
import tiledbsoma_ml
from ports import free_port

pytestmark = [
    pytest.mark.road,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Transforming to str index"),  # anndata, on the Census client's obs
    pytest.mark.filterwarnings("ignore:.*pull_on_update.*:FutureWarning"),  # mudata, on reading any file
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),  # the same
    pytest.mark.filterwarnings("ignore:.*without encoding metadata"),  # anndata, on an older file
    pytest.mark.filterwarnings("ignore:The HDF5 file was not created by"),  # mudata, on a file of another tool
]
ROOT = Path(__file__).parent.parent


def ours(*words: str, code: int = 0) -> dict[str, Any]:
    """Run one of our commands with --json; return its answer."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *words, "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def lake(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("road") / "lake")
    sources = [
        shared_data / "census-mini/soma",
        shared_data / "derived/papalexi_dev.h5mu",
        shared_data / "citeseq/pbmc_10k_protein_v3.h5ad",
        shared_data / "multiome/muon_test_rna_atac.h5mu",
    ]
    genes = shared_data / "ref/gencode/genes_homo_sapiens.csv.gz"
    done = ours("ingest", "run", *map(str, sources), "--lake", uri, "--set", f"genes={genes}")
    assert {row["state"] for row in done["datasets"]} == {"committed"}
    assert len(done["datasets"]) == 7
    return uri


def ids_of_symbols(shared_data: Path) -> dict[str, str]:
    """Symbols that one gene alone carries, read from the gene table by hand."""
    import csv
    import gzip

    found: dict[str, list[str]] = {}
    with gzip.open(shared_data / "ref/gencode/genes_homo_sapiens.csv.gz", "rt") as file:
        for gene_id, name, *_ in csv.reader(file):
            found.setdefault(name, []).append(gene_id)
    return {name: ids[0] for name, ids in found.items() if len(ids) == 1}


def by_feature(counts: Any, cells: list[str], features: list[str]) -> dict[str, dict[str, float]]:
    """Counts as nested dictionaries, equal features summed: the plainest form to compare."""
    table = scipy.sparse.coo_matrix(counts)
    out: dict[str, dict[str, float]] = {cell: {} for cell in cells}
    for row, column, value in zip(table.row, table.col, table.data, strict=True):
        if value:
            mine = out[cells[row]]
            mine[features[column]] = mine.get(features[column], 0.0) + float(value)
    return out


def lake_counts(lake: str, organism: str, dataset: str, measurement: str = "RNA") -> dict[str, dict[str, float]]:
    """A dataset's counts through the Census client, by the source's names of cells."""
    with cellxgene_census.open_soma(uri=lake) as census:
        name = organism.replace("_", " ").capitalize()
        cells = cellxgene_census.get_anndata(
            census, name, measurement_name=measurement, obs_value_filter=f"dataset_id == {dataset!r}"
        )
    return by_feature(cells.X, list(cells.obs["cell_id"]), list(cells.var["feature_id"]))


@pytest.mark.parametrize(
    ("organism", "dataset"),
    [
        ("homo_sapiens", "kang-2000"),
        ("homo_sapiens", "kang-reanalysis"),
        ("homo_sapiens", "pbmc10k-rna"),
        ("mus_musculus", "mouse-embryo"),
    ],
)
def test_a_dataset_of_the_census_equals_its_source_file(
    lake: str, shared_data: Path, organism: str, dataset: str
) -> None:
    source = anndata.read_h5ad(shared_data / f"census-mini/h5ads/{dataset}.h5ad")
    counts = source.raw.X if source.raw is not None else source.X
    features = list(source.raw.var_names if source.raw is not None else source.var_names)
    expected = by_feature(counts, list(source.obs_names), features)
    with cellxgene_census.open_soma(uri=str(shared_data / "census-mini/soma")) as census:
        kept = set(census["census_data"][organism].ms["RNA"].var.read().concat()["feature_id"].to_pylist())
    expected = {cell: {f: v for f, v in row.items() if f in kept} for cell, row in expected.items()}
    found = lake_counts(lake, organism, dataset)
    assert sorted(map(sorted, (row.items() for row in found.values()))) == sorted(
        map(sorted, (row.items() for row in expected.values()))
    )


def test_perturb_seq_equals_its_source_file_with_targets_and_controls(lake: str, shared_data: Path) -> None:
    source = mudata.read_h5mu(shared_data / "derived/papalexi_dev.h5mu")
    ids = ids_of_symbols(shared_data)
    rna, guide = source["rna"], source["guide"]
    expected = by_feature(rna.X, list(rna.obs_names), [ids.get(name, name) for name in rna.var_names])
    assert lake_counts(lake, "homo_sapiens", "papalexi_dev") == expected
    expected = by_feature(guide.X, list(guide.obs_names), list(guide.var_names))
    assert lake_counts(lake, "homo_sapiens", "papalexi_dev", "guide") == expected
    with cellxgene_census.open_soma(uri=lake) as census:
        obs = cellxgene_census.get_obs(census, "homo_sapiens", value_filter="dataset_id == 'papalexi_dev'")
    given = rna.obs["target_gene"].astype(str).reindex(obs["cell_id"]).to_numpy()
    control = obs["perturbation"] == "control"
    assert control.sum() > 100
    assert (obs["perturbation"][~control].to_numpy() == given[~control]).all()
    assert all(name.lower().startswith(("nt", "non")) for name in set(given[control]))
    assert set(obs["perturbation_type"]) == {"genetic"}


def test_antibodies_and_chromatin_equal_their_source_files(lake: str, shared_data: Path) -> None:
    cite = anndata.read_h5ad(shared_data / "citeseq/pbmc_10k_protein_v3.h5ad")
    names = [str(name) for name in cite.uns["protein_names"]]
    expected = by_feature(cite.obsm["protein_expression"], list(cite.obs_names), names)
    assert lake_counts(lake, "homo_sapiens", "pbmc_10k_protein_v3", "protein") == expected
    atac = mudata.read_h5mu(shared_data / "multiome/muon_test_rna_atac.h5mu")["atac"]
    expected = by_feature(atac.X, list(atac.obs_names), list(atac.var_names))
    assert lake_counts(lake, "homo_sapiens", "muon_test_rna_atac", "ATAC") == expected


def test_presence_and_primary_data_are_those_of_the_sources(lake: str, shared_data: Path) -> None:
    source = shared_data / "census-mini/soma"
    with cellxgene_census.open_soma(uri=lake) as ours_, cellxgene_census.open_soma(uri=str(source)) as theirs:
        tables = []
        for census in (theirs, ours_):
            datasets = census["census_info"]["datasets"].read().concat().to_pandas().set_index("dataset_id")
            var = cellxgene_census.get_var(census, "homo_sapiens").set_index("soma_joinid")["feature_id"]
            presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens")
            tables.append(
                {
                    name: set(var[presence[[datasets.loc[name, "soma_joinid"]]].indices])
                    for name in ("kang-2000", "kang-reanalysis", "pbmc10k-rna")
                }
            )
        assert tables[0] == tables[1]
        primary = [
            cellxgene_census.get_obs(census, "homo_sapiens", value_filter="dataset_id == 'kang-reanalysis'")
            for census in (theirs, ours_)
        ]
    assert not any(table["is_primary_data"].any() for table in primary)


def test_the_pytorch_loader_of_tiledbsoma_reads_the_same_counts(lake: str, shared_data: Path) -> None:
    source = shared_data / "census-mini/soma"
    sums = []
    for uri in (str(source), lake):
        with cellxgene_census.open_soma(uri=uri) as census:
            human = census["census_data"]["homo_sapiens"]
            where = tiledbsoma.AxisQuery(value_filter="dataset_id == 'pbmc10k-rna'")
            with human.axis_query(measurement_name="RNA", obs_query=where) as query:
                dataset = tiledbsoma_ml.ExperimentDataset(
                    query, layer_name="raw", obs_column_names=["cell_type"], batch_size=50, shuffle=False
                )
                batches = [x for x, _ in dataset]
        rows = np.concatenate([batch.sum(axis=1) for batch in batches])
        sums.append(sorted(rows.tolist()))
    assert len(sums[0]) == 200
    assert sums[0] == sums[1]


def test_train_serve_and_answer_on_real_cells(lake: str, tmp_path: Path) -> None:
    report = ours("store", "validate", "--lake", lake)
    assert report["problems"] == []
    snapshot = ours(
        *("store", "snapshot", "create", "human", "--lake", lake, "--where", "is_primary_data == True"),
        *("--set", 'organisms=["homo_sapiens"]', "--measurements", "RNA,protein,ATAC"),
    )
    assert snapshot["n_cells"] == 17490 + 200 + 1000 + 2200
    recipe = str(ROOT / "infra/runs/real-cells/train.toml")
    settings = [f"lake={lake}", f"output={tmp_path}", "steps=30", "data.global_batch=32", "data.tokens=96"]
    trained = ours("train", recipe, *(word for item in settings for word in ("--set", item)))
    assert trained["loss_test"] < trained["loss_test_first"]
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    server = subprocess.Popen(
        [sys.executable, "-m", "serve", "run", trained["checkpoint"], "--port", str(port)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            try:
                if httpx.get(f"{url}/health/ready").status_code == httpx.codes.OK:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None
            time.sleep(0.5)
        known = httpx.get(f"{url}/perturbations").json()["perturbations"]
        assert {"STAT1", "STAT2", "IFNGR1"} <= set(known)
        cells = {"RNA": [{"CD3D": 4, "IL7R": 2, "LTB": 7, "no such gene": 1}, {"ENSG00000156738": 3, "CD79A": 5}]}
        reply = httpx.post(f"{url}/embed", json={"counts": cells}).raise_for_status().json()
        assert np.isfinite(reply["embeddings"]).all()
        assert reply["coverage"]["RNA"]["unmapped"] == ["no such gene"]
        assert reply["provenance"]["snapshot_id"] == snapshot["id"]
        assert reply["provenance"]["commit_id"] == snapshot["commit_id"]
        effect = httpx.post(f"{url}/perturb", json={"counts": cells, "perturbations": ["STAT1"]}).raise_for_status()
        assert len(effect.json()["perturbations"][0]["effects"]["RNA"]["top"]) == 20
    finally:
        server.terminate()
        status = server.wait(60)
    assert status == 0
