"""Every kind of source, on published files: what the lake holds is what other readers find in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from unittest import mock

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.io
import scipy.sparse

from ingest import sources
from ingest.dataset import OpenDataset
from ingest.expand import expand
from ingest.job import JobSettings, SourceSettings
from ingest.run import Outcome, run
from ingest.sources import h5ad, tenx
from store import records
from store.errors import InputRefused, MissingError, UsageError
from store.lake import Lake, open_lake
from store.validate import validate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*without encoding metadata"),  # anndata, on older files
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),  # anndata, on 10x symbols
    pytest.mark.filterwarnings("ignore:Transforming to str index"),  # anndata, on tables it makes itself
    pytest.mark.filterwarnings("ignore::FutureWarning:mudata"),  # mudata, on its own coming defaults
]
SCHEMES = JobSettings().schemes
Filled = tuple[Lake, dict[str, Outcome]]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Peaks on chromosome 22, one of them without a fragment."""
    path = tmp_path_factory.mktemp("bed") / "peaks.bed"
    path.write_text("chr22\t17000000\t17200000\nchr22\t20000000\t20500000\nchr9\t5\t9\n")
    return path


@pytest.fixture(scope="module")
def filled(
    shared_data: Path, peaks: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[Lake, dict[str, Outcome]]:
    """A lake with one dataset of each kind."""
    d = shared_data
    values = {"values": "value"}
    given = {
        "zarr": {"uri": d / "rna/pbmc68k_reduced.zarr.zip", "layer": "counts"},
        "old zarr": {"uri": d / "rna/anndata_v0.7.8.zarr.zip"},
        "loom": {"uri": d / "spatial/mpfc-starmap.loom", "organism": "mus_musculus"},
        "visium": {"uri": d / "spatial/scanpy_visium/1.0.0"},
        "tiles": {"uri": d / "atac/macs_test.fragments.tsv.gz", "tile_bp": 1000},
        "peaks": {"uri": d / "atac/macs_test.fragments.tsv.gz", "peaks": peaks},
        "bgzip": {"uri": d / "atac/cxg_fragments.tsv.bgz", "min_fragments": 5},
        "peptides": {"uri": d / "derived/leduc_scp_peptides.h5ad", "measurement": "peptide", **values},
        "urine": {"uri": d / "metabolomics/MTBLS1"},
        "serum": {"uri": d / "metabolomics/MTBLS60", "assay_file": "a_MTBLS60_dippB_GCxGC_MS.txt"},
        "bulk": {"uri": d / "derived/tcga_brca_mrna_mirna_protein.h5mu", **values},
        "methylation": {
            "uri": d / "methylation/unioncom/scGEM/DNAmethylation.txt",
            "kind": "table",
            "measurement": "methylation",
            **values,
        },
        "archive": {"uri": d / "citeseq/pbmc_10k_protein_v3_mtx.tar.gz"},
        "nameless features": {"uri": d / "perturb/liger_ctrl.h5"},
        "normalised": {"uri": d / "perturb/perturbench_devel.h5ad", "values": "lognorm"},
        "two genomes": {"uri": d / "rna/10x_v2_scanpy/multiple_genomes.h5"},
        "one genome": {"uri": d / "rna/10x_v2_scanpy/multiple_genomes.h5", "genome": "hg19_chr21"},
        "kang-2000 as h5ad": {"uri": d / "census-mini/h5ads/kang-2000.h5ad"},
    }
    sources = [
        SourceSettings(
            **{
                **{key: str(value) if isinstance(value, Path) else value for key, value in one.items()},
                "dataset_id": name,
            }
        )
        for name, one in given.items()
    ]
    sources.append(SourceSettings(uri=str(d / "census-mini/soma")))
    uri = str(tmp_path_factory.mktemp("lakes") / "kinds")
    done = run(JobSettings(lake=uri, source=tuple(sources)))
    return open_lake(uri), {outcome.dataset_id: outcome for outcome in done}


def table(
    lake: Lake, dataset: str, measurement: str = "RNA", organism: str = "homo_sapiens", layer: str = "raw"
) -> pd.DataFrame:
    """A dataset's stored values as a table of cells x features; what is not stored is NaN."""
    obs = lake.obs(organism, f"dataset_id == {dataset!r}", ["cell_id"]).to_pandas()
    var = lake.var(organism, measurement).to_pandas().set_index("soma_joinid")["feature_id"]
    stored = lake.counts(organism, measurement, obs["soma_joinid"].to_numpy(), layer).tocoo()
    frame = pd.DataFrame(
        {"cell": obs["cell_id"].to_numpy()[stored.row], "feature": var.loc[stored.col].to_numpy(), "value": stored.data}
    )
    return frame.pivot(index="cell", columns="feature", values="value").reindex(obs["cell_id"])


def non_zeros(matrix: object, cells: list[str], features: list[str]) -> dict[tuple[str, str], float]:
    stored = scipy.sparse.coo_matrix(matrix)
    found: Counter[tuple[str, str]] = Counter()
    for row, column, value in zip(stored.row, stored.col, stored.data, strict=True):
        if value:
            found[cells[row], features[column]] += float(value)
    return dict(found)


def lake_non_zeros(lake: Lake, dataset: str, **where: str) -> dict[tuple[str, str], float]:
    stacked = table(lake, dataset, **where).stack()
    return {key: float(value) for key, value in stacked.items() if value == value}  # type: ignore[misc]


@pytest.mark.ray
def test_all_come_in_or_are_refused_for_a_reason_and_the_lake_is_proved(
    filled: Filled,
) -> None:
    lake, done = filled
    refused = {name: outcome.error for name, outcome in done.items() if outcome.error}
    assert list(refused) == ["two genomes"], refused
    assert "choose one with genome=NAME" in refused["two genomes"]
    assert [check for check in validate(lake) if check.problem] == []


@pytest.mark.ray
def test_zarr_and_old_zarr_hold_what_h5ad_holds(filled: Filled, shared_data: Path) -> None:
    lake, _ = filled
    counts = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad")
    assert lake_non_zeros(lake, "zarr") == non_zeros(counts.X, list(counts.obs_names), list(counts.var_names))
    old = anndata.read_h5ad(shared_data / "rna/anndata_v0.7.8.h5ad")
    assert lake_non_zeros(lake, "old zarr") == non_zeros(old.X, list(old.obs_names), list(old.var_names))


@pytest.mark.ray
def test_a_loom_gives_counts_and_coordinates(filled: Filled, shared_data: Path) -> None:
    lake, _ = filled
    with h5py.File(shared_data / "spatial/mpfc-starmap.loom") as file:
        matrix = file["matrix"][:].T
        genes = [name.decode() for name in file["row_attrs/Gene"][:]]
        x, y = file["col_attrs/Spatial_coordinates"][:].T
    obs = lake.obs("mus_musculus", "dataset_id == 'loom'").to_pandas()
    names = [f"cell{number}" for number in range(len(obs))]
    assert lake_non_zeros(lake, "loom", organism="mus_musculus") == non_zeros(matrix, names, genes)
    assert np.allclose(obs["x"], x)
    assert np.allclose(obs["y"], y)


@pytest.mark.ray
def test_visium_spots_have_their_places_and_scale_factors(filled: Filled, shared_data: Path) -> None:
    lake, _ = filled
    folder = shared_data / "spatial/scanpy_visium/1.0.0"
    read = scanpy.read_10x_h5(folder / "filtered_feature_bc_matrix.h5")
    assert lake_non_zeros(lake, "visium") == non_zeros(read.X, list(read.obs_names), list(read.var["gene_ids"]))
    with (folder / "spatial/tissue_positions_list.csv").open() as file:
        places = {row[0]: (float(row[5]), float(row[4])) for row in csv.reader(file)}
    obs = lake.obs("homo_sapiens", "dataset_id == 'visium'").to_pandas()
    assert {row.cell_id: (row.x, row.y) for row in obs.itertuples()} == {cell: places[cell] for cell in read.obs_names}
    number = next(c.dataset["number"] for c in lake.current if c.dataset["dataset_id"] == "visium")
    side = records.read_table(f"{lake.uri}/somaflow/sides/{number:012d}-spatial.parquet").to_pandas()
    scales = json.loads((folder / "spatial/scalefactors_json.json").read_text())
    said = dict(zip(side["name"], side["value"], strict=True))
    assert float(said["spot_diameter_fullres"]) == scales["spot_diameter_fullres"]
    assert said["tissue_hires_image.png"].endswith("spatial/tissue_hires_image.png")


@pytest.mark.ray
def test_visium_hd_positions_come_from_parquet(shared_data: Path, tmp_path: Path, ray_cluster: None) -> None:
    folder = shared_data / "spatial/scanpy_visium/1.0.0"
    made = tmp_path / "binned_outputs/square_008um"
    (made / "spatial").mkdir(parents=True)
    shutil.copy(folder / "filtered_feature_bc_matrix.h5", made)
    columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    positions = pd.read_csv(folder / "spatial/tissue_positions_list.csv", header=None, names=columns)
    positions.to_parquet(made / "spatial/tissue_positions.parquet")
    done = run(JobSettings(lake=str(tmp_path / "lake"), source=(SourceSettings(uri=str(tmp_path / "binned_outputs")),)))
    assert [(outcome.state, outcome.cells) for outcome in done] == [("committed", 100)], done[0].error
    obs = open_lake(str(tmp_path / "lake")).obs("homo_sapiens").to_pandas().set_index("cell_id")
    assert (obs["x"] == positions.set_index("barcode").loc[obs.index, "pxl_col_in_fullres"]).all()


@pytest.mark.ray
def test_fragments_are_counted_in_tiles_and_peaks(filled: Filled, shared_data: Path) -> None:
    lake, _ = filled
    in_tiles: Counter[tuple[str, str]] = Counter()
    in_peaks: Counter[tuple[str, str]] = Counter()
    with gzip.open(shared_data / "atac/macs_test.fragments.tsv.gz", "rt") as file:
        for line in file:
            chrom, start, end, barcode = line.split("\t")[:4]
            for place in (int(start), int(end) - 1):
                first = place // 1000 * 1000
                in_tiles[barcode.strip(), f"{chrom}:{first}-{first + 1000}"] += 1
                for low, high in ((17000000, 17200000), (20000000, 20500000)):
                    if chrom == "chr22" and low <= place < high:
                        in_peaks[barcode.strip(), f"chr22:{low}-{high}"] += 1
    assert lake_non_zeros(lake, "tiles", measurement="ATAC") == {key: float(count) for key, count in in_tiles.items()}
    assert lake_non_zeros(lake, "peaks", measurement="ATAC") == {key: float(count) for key, count in in_peaks.items()}
    assert {"chr9:5-9"} <= set(lake.var("homo_sapiens", "ATAC")["feature_id"].to_pylist())
    with gzip.open(shared_data / "atac/cxg_fragments.tsv.bgz", "rt") as file:
        per_cell = Counter(line.rstrip("\n").split("\t")[3] for line in file if not line.startswith("#"))
    cells = lake.obs("homo_sapiens", "dataset_id == 'bgzip'", ["cell_id"])["cell_id"].to_pylist()
    assert sorted(cells) == sorted(cell for cell, count in per_cell.items() if count >= 5)


@pytest.mark.ray
def test_what_files_beside_a_source_hold_makes_a_dataset_and_not_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragments.tsv").write_text("chr1\t10\t20\tA\t1\nchr1\t30\t40\tB\t1\n")
    (tmp_path / "cells.txt").write_text("A\n")
    (tmp_path / "peaks.bed").write_text("chr1\t0\t100\n")
    (tmp_path / "more.tsv").write_text("cell\tdonor\nA\td1\n")
    monkeypatch.chdir(tmp_path)

    def key(before: str) -> str:
        names = {"barcodes": "cells.txt", "peaks": "peaks.bed", "obs_table": "more.tsv"}
        beside = {name: f"{before}{path}" for name, path in names.items()}
        return OpenDataset(SourceSettings(uri="fragments.tsv", **beside), "f").inspect().plan.key

    plain = key("")
    assert key("./") == key(f"{tmp_path}/") == plain
    for name, text in (("cells.txt", "A\nB\n"), ("peaks.bed", "chr1\t0\t50\n"), ("more.tsv", "cell\tdonor\nA\td2\n")):
        (tmp_path / name).write_text(text)
        assert key("") != plain, name
        plain = key("")
    (tmp_path / "cells.txt").write_text("A\nB\nA\n")
    with pytest.raises(InputRefused, match=r"cells\.txt: barcode 'A' stands more than once"):
        key("")


def test_levels_keep_zeros_and_leave_out_what_is_missing(filled: Filled, shared_data: Path) -> None:
    lake, _ = filled
    peptides = anndata.read_h5ad(shared_data / "derived/leduc_scp_peptides.h5ad")
    found = table(lake, "peptides", measurement="peptide", layer="value")
    expected = pd.DataFrame(peptides.X, peptides.obs_names, peptides.var_names)
    assert np.isnan(expected.to_numpy()).any()
    pd.testing.assert_frame_equal(found[expected.columns], expected, check_names=False, check_dtype=False, rtol=1e-6)
    levels = np.loadtxt(shared_data / "methylation/unioncom/scGEM/DNAmethylation.txt")
    found = table(lake, "methylation", measurement="methylation", layer="value")
    assert np.allclose(found[[f"feature{number}" for number in range(levels.shape[1])]], levels)
    assert (levels == 0).any()
    bulk = mudata.read_h5mu(shared_data / "derived/tcga_brca_mrna_mirna_protein.h5mu")
    for modality, measurement in (("mrna", "RNA"), ("mirna", "miRNA"), ("protein", "protein")):
        found = table(lake, "bulk", measurement=measurement, layer="value")
        own = bulk[modality]
        assert np.allclose(found[list(own.var_names)], own.X, rtol=1e-6)


@pytest.mark.ray
def test_metabolites_of_a_study_have_their_identifiers_samples_and_gaps(filled: Filled, shared_data: Path) -> None:
    lake, done = filled
    folder = shared_data / "metabolomics/MTBLS1"
    maf = pd.read_csv(folder / "m_MTBLS1_metabolite_profiling_NMR_spectroscopy_v2_maf.tsv", sep="\t", dtype=str)
    samples = [column for column in maf if column.startswith("ADG")]
    found = table(lake, "urine", measurement="metabolite", layer="value")
    assert sorted(found.index) == sorted(samples)
    expected = maf[samples].apply(pd.to_numeric, errors="coerce")
    assert int(found.notna().sum().sum()) == int(expected.notna().sum().sum())
    assert np.isclose(np.nansum(found.to_numpy()), np.nansum(expected.to_numpy()), rtol=1e-5)
    assert any("264 of 28,908 levels are missing" in note for note in done["urine"].notes)
    single = maf[~maf["database_identifier"].duplicated(keep=False)].iloc[0]
    assert np.allclose(found[single["database_identifier"]], expected.loc[single.name, found.index], equal_nan=True)
    obs = lake.obs("homo_sapiens", "dataset_id == 'urine'").to_pandas()
    assert set(obs["tissue"]) == {"urine"}
    assert set(obs["sex_ontology_term_id"]) == {"PATO:0000383", "PATO:0000384"}
    assert not obs["measured_metabolite"].any()
    ranges = lake.measurement_presence("homo_sapiens").to_pandas().set_index("dataset_id")
    assert ranges.loc["urine", "layer"] == "value"
    assert ranges.loc["urine", "n_measured_obs"] == 132
    assert done["serum"].cells == 419


def test_an_archive_is_unpacked_once_and_again_when_that_was_cut_short(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    unpack = mock.Mock(side_effect=tenx.members)
    monkeypatch.setattr(tenx, "members", unpack)
    uri = str(shared_data / "citeseq/pbmc_10k_protein_v3_mtx.tar.gz")
    found = tenx._archive(uri)
    assert set(found) == {"matrix", "features", "barcodes"}
    assert tenx._archive(uri) == found
    assert unpack.call_count == 1
    (done,) = tmp_path.glob("*/*/done")
    done.unlink()
    Path(found["barcodes"]).write_bytes(b"half")
    assert tenx._archive(uri) == found
    assert gzip.decompress(Path(found["barcodes"]).read_bytes()).count(b"-1\n") > 700


@pytest.mark.ray
def test_an_archive_and_a_matrix_with_names_only_are_read(filled: Filled, shared_data: Path) -> None:
    lake, done = filled
    with tarfile.open(shared_data / "citeseq/pbmc_10k_protein_v3_mtx.tar.gz") as packed:
        content = {
            member.name.rsplit("/", 1)[-1]: gzip.decompress(packed.extractfile(member).read())  # type: ignore[union-attr]
            for member in packed.getmembers()
            if member.isfile() and member.name.endswith(".gz") and not member.name.rsplit("/", 1)[-1].startswith("._")
        }
    matrix = scipy.io.mmread(io.BytesIO(content["matrix.mtx.gz"])).T.tocsr()
    ids = [line.split("\t")[0] for line in content["features.tsv.gz"].decode().splitlines()]
    kinds = [line.split("\t")[2] for line in content["features.tsv.gz"].decode().splitlines()]
    cells = content["barcodes.tsv.gz"].decode().split()
    for measurement, kind in (("RNA", "Gene Expression"), ("protein", "Antibody Capture")):
        mine = [number for number, name in enumerate(kinds) if name == kind]
        expected = non_zeros(matrix[:, mine], cells, [ids[number] for number in mine])
        assert lake_non_zeros(lake, "archive", measurement=measurement) == expected
    assert done["nameless features"].measurements == {"RNA": 266}


@pytest.mark.ray
def test_normalised_values_have_their_own_layer_and_no_counts(filled: Filled, shared_data: Path) -> None:
    lake, _ = filled
    read = anndata.read_h5ad(shared_data / "perturb/perturbench_devel.h5ad")
    obs = lake.obs("homo_sapiens", "dataset_id == 'normalised'").to_pandas()
    stored = lake.counts("homo_sapiens", "RNA", obs["soma_joinid"].to_numpy(), "lognorm")
    assert np.isclose(stored.sum(), scipy.sparse.csr_matrix(read.X).sum(), rtol=1e-6)
    assert lake.counts("homo_sapiens", "RNA", obs["soma_joinid"].to_numpy()).nnz == 0
    assert not obs["measured_RNA"].any()
    kinds = read.obs["perturbation_type"].astype(str).map({"CRISPRa": "activation", "CRISPRi": "genetic"})
    assert obs["perturbation_type"].tolist() == kinds.tolist()
    assert any("+" in name for name in obs["perturbation"])


@pytest.mark.ray
def test_a_census_and_its_source_files_agree(filled: Filled) -> None:
    lake, done = filled
    assert any("CELLxGENE schema 7.0.0" in note for note in done["kang-2000 as h5ad"].notes)
    assert lake_non_zeros(lake, "kang-2000") == {
        (cell, feature): value for (cell, feature), value in _named_by_joinid(lake, "kang-2000 as h5ad").items()
    }
    assert {"kang-2000", "kang-reanalysis", "pbmc10k-rna", "mouse-embryo"} <= set(done)


@pytest.mark.ray
def test_a_census_that_says_something_else_of_a_dataset_replaces_it(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    lake = str(tmp_path / "lake")
    census = SourceSettings(uri=str(shared_data / "census-mini/soma"), where="dataset_id == 'kang-reanalysis'")
    part = census.model_copy(update={"where": "dataset_id == 'kang-reanalysis' and cell_type == 'B cell'"})
    assert [outcome.state for outcome in run(JobSettings(lake=lake, source=(part,)))] == ["committed"]
    few = open_lake(lake).obs("homo_sapiens").num_rows
    (whole,) = run(JobSettings(lake=lake, source=(census,)))
    assert (whole.state, whole.commit) == ("committed", 2), whole.error
    (again,) = run(JobSettings(lake=lake, source=(census,)))
    assert again.state == "present"
    obs = open_lake(lake).obs("homo_sapiens")
    assert obs.num_rows == whole.cells > few
    assert not any(obs["is_primary_data"].to_pylist())
    (file,) = run(
        JobSettings(
            lake=lake, source=(SourceSettings(uri=str(shared_data / "census-mini/h5ads/kang-reanalysis.h5ad")),)
        )
    )
    assert "comes from census:kang-reanalysis" in file.error


def _named_by_joinid(lake: Lake, dataset: str) -> dict[tuple[str, str], float]:
    """Non-zeros under the observation_joinid of each cell, which a Census has as its name of the cell."""
    obs = lake.obs("homo_sapiens", f"dataset_id == {dataset!r}", ["cell_id", "observation_joinid"]).to_pandas()
    other = dict(zip(obs["cell_id"], obs["observation_joinid"], strict=True))
    return {(other[cell], feature): value for (cell, feature), value in lake_non_zeros(lake, dataset).items()}


def test_genes_of_another_organism_are_refused_unless_somebody_says_whose_they_are(shared_data: Path) -> None:
    uri = str(shared_data / "derived/worm_l2.h5ad")
    unsaid = OpenDataset(SourceSettings(uri=uri), "").inspect()
    assert any("say organism=caenorhabditis_elegans" in problem for problem in unsaid.problems)
    worm = OpenDataset(SourceSettings(uri=uri, organism="caenorhabditis_elegans"), "").inspect()
    assert not any("organism" in sentence for sentence in (*worm.problems, *worm.notes))
    orthologs = OpenDataset(SourceSettings(uri=uri, organism="homo_sapiens"), "").inspect()
    assert not any("organism" in problem for problem in orthologs.problems)
    assert any("most genes are of caenorhabditis_elegans" in note for note in orthologs.notes)


def test_folders_globs_and_manifests_become_single_sources(shared_data: Path, tmp_path: Path) -> None:
    for name in ("a.h5ad", "b.h5ad", "notes.txt", ".hidden.h5ad"):
        (tmp_path / name).touch()
    (tmp_path / "run1/10x").mkdir(parents=True)
    (tmp_path / "run1/10x/matrix.mtx.gz").touch()
    (tmp_path / "run1/10x/metrics.csv").touch()
    (tmp_path / "run1/cells.rds").touch()
    expanded = expand(SourceSettings(uri=str(tmp_path)), SCHEMES)
    found = [source.uri.removeprefix(f"{tmp_path}/") for source in expanded.sources]
    assert found == ["a.h5ad", "b.h5ad", "run1/10x"]
    assert [uri.removeprefix(f"{tmp_path}/") for uri in expanded.passed] == ["notes.txt", "run1/cells.rds"]
    assert expand(SourceSettings(uri=f"{tmp_path}/*"), SCHEMES).passed == [f"{tmp_path}/notes.txt", f"{tmp_path}/run1"]
    by_glob = expand(SourceSettings(uri=f"{tmp_path}/*.h5ad", organism="mus_musculus"), SCHEMES).sources
    assert [source.uri.rsplit("/", 1)[1] for source in by_glob] == ["a.h5ad", "b.h5ad"]
    assert {source.organism for source in by_glob} == {"mus_musculus"}
    (tmp_path / "list.tsv").write_text(
        "uri\tdataset_id\tobs.tissue\tlayer\na.h5ad\tfirst\t=lung\t\nb.h5ad\tsecond\t\traw"
    )
    listed = expand(SourceSettings(uri=str(tmp_path / "list.tsv"), title="all"), SCHEMES).sources
    assert [(one.dataset_id, one.obs, one.layer, one.title) for one in listed] == [
        ("first", {"tissue": "=lung"}, "", "all"),
        ("second", {}, "raw", "all"),
    ]
    assert [one.uri for one in listed] == [f"{tmp_path}/a.h5ad", f"{tmp_path}/b.h5ad"]
    (tmp_path / "files.csv").write_text(
        "uri,genes,obs_table,hgnc\na.h5ad,genes.csv,s3://bucket/more.tsv,/at/hgnc.txt\n"
    )
    (one,) = expand(SourceSettings(uri=str(tmp_path / "files.csv")), SCHEMES).sources
    assert (one.genes, one.obs_table, one.hgnc) == (f"{tmp_path}/genes.csv", "s3://bucket/more.tsv", "/at/hgnc.txt")
    pd.DataFrame({"uri": ["a.h5ad"], "organism": ["mus_musculus"]}).to_parquet(tmp_path / "list.parquet")
    assert expand(SourceSettings(uri=str(tmp_path / "list.parquet")), SCHEMES).sources[0].organism == "mus_musculus"
    assert len(expand(SourceSettings(uri=str(shared_data / "census-mini/soma")), SCHEMES).sources) == 1
    for far in ("gs://bucket/a.h5ad", "https://host/b.loom", "s3://bucket/c.h5mu", "https://host/d.h5ad?download=1"):
        assert expand(SourceSettings(uri=far), SCHEMES).sources[0].uri == far


def test_signs_of_a_glob_may_stand_in_a_name_and_a_query_behind_an_address(tmp_path: Path) -> None:
    for name in ("a[1].h5ad", "a1.h5ad", "what?.h5ad"):
        (tmp_path / name).touch()
    for name in ("a[1].h5ad", "what?.h5ad"):
        (one,) = expand(SourceSettings(uri=f"{tmp_path}/{name}"), SCHEMES).sources
        assert one.uri == f"{tmp_path}/{name}"
    assert [one.uri for one in expand(SourceSettings(uri=f"{tmp_path}/?1.h5ad"), SCHEMES).sources] == [
        f"{tmp_path}/a1.h5ad"
    ]
    for name, kind in (("x.h5ad", "h5ad"), ("x.zarr.zip", "zarr"), ("x.h5", "10x"), ("fragments.tsv.gz", "fragments")):
        told = SourceSettings(uri=f"https://host/files/{name}?download=1&token=a*b")
        assert expand(told, SCHEMES).sources == [told]
        assert sources.kind_of(told) == kind
        assert sources.names(told) == ["files-fragments" if kind == "fragments" else "x"]
    zipped = "https://host/x.zarr.zip?download=1"
    with (
        mock.patch("ingest.sources.h5ad.downloaded", return_value=tmp_path / "not here") as asked,
        pytest.raises(InputRefused, match=r"not a readable zarr group: .*not here"),
    ):
        h5ad.open_group(zipped)
    asked.assert_called_once_with(zipped)


def test_manifests_are_read_as_excel_and_r_write_them(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").touch()
    written = {
        "excel.csv": "\ufeffuri,organism\r\na.h5ad,mus_musculus\r\n",
        "quoted.csv": '\ufeff"organism","uri"\n"mus_musculus","a.h5ad"\n',
        "write.csv": '"","uri","organism"\n"1","a.h5ad","mus_musculus"\n',
        "write.table.tsv": '"uri"\t"organism"\n"1"\t"a.h5ad"\t"mus_musculus"\n',
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        (one,) = expand(SourceSettings(uri=str(tmp_path / name)), SCHEMES).sources
        assert (one.uri, one.organism) == (f"{tmp_path}/a.h5ad", "mus_musculus"), name
    (tmp_path / "other.csv").write_text("uris,organism\na.h5ad,mus_musculus\n")
    with pytest.raises(InputRefused, match="cannot tell what it is"):
        expand(SourceSettings(uri=str(tmp_path / "other.csv")), SCHEMES)


def test_manifests_that_list_each_other_are_refused_by_name_and_one_that_two_list_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    lists = {
        "own.tsv": ["own.tsv"],
        "one.tsv": ["a.h5ad", "two.tsv"],
        "two.tsv": ["./one.tsv"],
        "spelt.tsv": ["link/spelt.tsv"],
        "both.tsv": ["left.tsv", "right.tsv"],
        "left.tsv": ["last.tsv"],
        "right.tsv": ["last.tsv"],
        "last.tsv": ["a.h5ad"],
    }
    for name, listed in lists.items():
        (tmp_path / name).write_text("\n".join(["uri", *listed, ""]))
    for name, chain in (("own", "own"), ("one", r"one\.tsv > .*/two\.tsv > .*/one"), ("spelt", "link/link/spelt")):
        with pytest.raises(InputRefused, match=rf"manifests list each other.*{chain}\.tsv"):
            expand(SourceSettings(uri=str(tmp_path / f"{name}.tsv")), SCHEMES)
    twice = expand(SourceSettings(uri=str(tmp_path / "both.tsv")), SCHEMES).sources
    assert [one.uri for one in twice] == [str(tmp_path / "a.h5ad")] * 2


def test_local_paths_become_absolute_for_workers_stand_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.h5ad", "list.csv", "genes.csv"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("uri,genes\na.h5ad,genes.csv\n")
    spelt = {
        tmp_path: ("a.h5ad", "./a.h5ad", "below/../a.h5ad", "*.h5ad", "list.csv", ".", f"file://{tmp_path}/a.h5ad")
    }
    spelt[tmp_path / "below"] = ("../a.h5ad", "..", "../*.h5ad", "../list.csv", "~/a.h5ad")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, uris in spelt.items():
        monkeypatch.chdir(folder)
        genes = os.path.relpath(tmp_path / "genes.csv")
        for uri in uris:
            (one,) = expand(SourceSettings(uri=uri, genes=genes), SCHEMES).sources
            assert (one.uri, one.genes) == (f"{tmp_path}/a.h5ad", f"{tmp_path}/genes.csv"), uri
            assert "organism" not in one.model_fields_set, uri
    monkeypatch.chdir(tmp_path / "below")
    assert records.absolute("../a.h5ad") == f"{tmp_path}/a.h5ad"
    (given,) = expand(SourceSettings(uri="../a.h5ad", kind="h5ad", peaks="p.bed"), SCHEMES).sources
    assert (given.uri, given.peaks) == (f"{tmp_path}/a.h5ad", f"{tmp_path}/below/p.bed")
    for uri in ("stable", "simulated:", "s3://bucket/../a.h5ad"):
        (same,) = expand(SourceSettings(uri=uri, genes="s3://bucket/genes.csv"), SCHEMES).sources
        assert (same.uri, same.genes) == (uri, "s3://bucket/genes.csv")


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"uri": "ftp://host/a.h5ad"}, UsageError, "addresses of kind 'ftp' are not allowed"),
        ({"uri": "s3://me:secret@bucket/a.h5ad"}, UsageError, "credentials come from the environment"),
        ({"uri": "{folder}/*.loom"}, MissingError, "matches nothing"),
        ({"uri": "{folder}/empty"}, MissingError, "holds nothing that can be ingested"),
        ({"uri": "{folder}/*.h5ad", "dataset_id": "x"}, UsageError, "holds 2 sources, so dataset_id='x' fits none"),
        ({"uri": "{folder}/list.tsv"}, InputRefused, "lists nothing"),
        ({"uri": "{folder}/a.h5ad", "genes": "ftp://host/genes.csv"}, UsageError, "'ftp' are not allowed"),
    ],
)
def test_what_cannot_be_expanded_is_said(tmp_path: Path, settings: dict[str, str], error: type, said: str) -> None:
    (tmp_path / "a.h5ad").touch()
    (tmp_path / "b.h5ad").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.tsv").write_text("uri\torganism\n")
    given = {key: value.format(folder=tmp_path) for key, value in settings.items()}
    with pytest.raises(error, match=said) as caught:
        expand(SourceSettings(**given), SCHEMES)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_what_lies_beside_the_counts_of_an_h5ad_is_read_kept_or_named(shared_data: Path, tmp_path: Path) -> None:
    data = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad")[:60].copy()
    antibodies = np.random.default_rng(0).poisson(3, (60, 5)).astype(np.float32)
    data.obsm["protein_expression"] = scipy.sparse.csr_matrix(antibodies)
    data.obsm["X_adt"] = pd.DataFrame(np.ones((60, 2)), index=data.obs_names, columns=["a", "b"])
    data.obsm["spatial"] = np.arange(120.0).reshape(60, 2)
    data.obs["tissue"] = pd.Series(["blood", np.nan] * 30, index=data.obs_names, dtype=object)
    data.var["feature_types"] = ["Gene Expression"] * (data.n_vars - 2) + ["Multiplexing Capture"] * 2
    data.write_h5ad(tmp_path / "one.h5ad")
    opened = OpenDataset(SourceSettings(uri=str(tmp_path / "one.h5ad")), "one")
    found = opened.inspect()
    assert not found.problems
    assert "CD14-positive monocyte" in set(found.obs["cell_type"])
    assert list(found.sides["obs"]["bulk_labels"]) == list(data.obs["bulk_labels"]), "labels that were changed are kept"
    assert (opened.block("protein", 0, 60) != antibodies).sum() == 0
    assert found.obs["x"].tolist() == data.obsm["spatial"][:, 0].tolist()
    assert list(found.obs["tissue"]) == ["blood", "unknown"] * 30
    assert "features left out: 2 of type 'Multiplexing Capture'" in found.notes
    assert "obsm left out: X_adt; if one holds counts of antibodies, say antibodies=NAME" in found.notes
    chosen = OpenDataset(SourceSettings(uri=str(tmp_path / "one.h5ad"), antibodies="X_adt"), "one")
    assert chosen.block("protein", 0, 60).toarray().tolist() == [[1, 1]] * 60
    with pytest.raises(InputRefused, match=r"no obsm\['adt'\]; there are .*X_adt"):
        OpenDataset(SourceSettings(uri=str(tmp_path / "one.h5ad"), antibodies="adt"), "one")


@pytest.mark.parametrize("values", ["value", {"protein": "value"}])
def test_zeros_of_levels_are_stored_however_it_is_said_what_the_values_are(tmp_path: Path, values: object) -> None:
    levels = np.array([[0, 1.5, np.nan], [2.5, 0, -1]])
    cells, features = pd.DataFrame(index=["c0", "c1"]), pd.DataFrame(index=["p0", "p1", "p2"])
    named = pd.DataFrame(levels, index=cells.index, columns=features.index)
    anndata.AnnData(levels, cells, features).write_h5ad(tmp_path / "dense.h5ad")
    counts = anndata.AnnData(np.ones((2, 3)), cells, pd.DataFrame(index=["g0", "g1", "g2"]), obsm={"adt": named})
    counts.write_h5ad(tmp_path / "beside.h5ad")
    typed = anndata.AnnData(np.hstack([levels, np.ones((2, 1))]), cells, pd.DataFrame(index=["p0", "p1", "p2", "g0"]))
    typed.var["feature_types"] = ["Antibody Capture"] * 3 + ["Gene Expression"]
    typed.write_h5ad(tmp_path / "typed.h5ad")
    named.to_csv(tmp_path / "levels.csv")
    with h5py.File(tmp_path / "one.loom", "w") as file:
        file["matrix"], file["row_attrs/Gene"], file["col_attrs/CellID"] = levels.T, ["p0", "p1", "p2"], ["c0", "c1"]
    for name in ("dense.h5ad", "beside.h5ad", "typed.h5ad", "levels.csv", "one.loom"):
        told: dict[str, object] = {"uri": str(tmp_path / name), "values": values}
        told |= {} if name in ("beside.h5ad", "typed.h5ad") else {"measurement": "protein"}
        told |= {"kind": "table"} if name == "levels.csv" else {}
        opened = OpenDataset(SourceSettings.model_validate(told), "one")
        assert opened.block("protein", 0, 2).nnz == 5, name
        if values != "value" and "RNA" in opened.form.parts:
            assert opened.values("RNA") == "counts"


def test_zeros_of_a_modality_that_lacks_cells_are_stored(tmp_path: Path) -> None:
    def modality(cells: list[str], values: list[list[float]], prefix: str) -> anndata.AnnData:
        names = pd.DataFrame(index=[f"{prefix}{number}" for number in range(2)])
        return anndata.AnnData(np.array(values), pd.DataFrame(index=cells), names)

    counts = modality(["a", "b", "c"], [[1, 0], [0, 2], [3, 0]], "g")
    mudata.MuData({"rna": counts, "adt": modality(["c", "a"], [[0, 1.5], [0, np.nan]], "p")}).write(tmp_path / "2.h5mu")
    opened = OpenDataset(SourceSettings(uri=str(tmp_path / "2.h5mu"), values={"protein": "value"}), "two")
    cells = list(opened.form.obs.index)
    stored = opened.block("protein", 0, 3)
    assert dict(zip(cells, np.diff(stored.indptr).tolist(), strict=True)) == {"a": 1, "b": 0, "c": 2}
    assert stored.toarray()[cells.index("c")].tolist() == [0, 1.5]
    np.testing.assert_array_equal(opened.block("RNA", 0, 3).toarray().sum(axis=1)[cells.index("b")], 2)


def _10x_folder(folder: Path, cells: list[str]) -> None:
    folder.mkdir()
    (folder / "genes.tsv").write_text("ENSG00000000001\tAAA\nENSG00000000002\tBBB\n")
    (folder / "barcodes.tsv").write_text("".join(f"{cell}\n" for cell in cells))
    scipy.io.mmwrite(folder / "matrix.mtx", scipy.sparse.coo_matrix(np.ones((2, len(cells)), int)))


@pytest.mark.parametrize("header", ["cell\t", ""])  # R gives the names of lines no header
@pytest.mark.parametrize("beside", [True, False])
def test_a_table_of_cells_is_taken_word_for_word(tmp_path: Path, beside: bool, header: str) -> None:
    _10x_folder(tmp_path / "run", ["001", "002", "003"])
    columns = ["donor_id", "batch", "sample_id", "dose", "is_primary_data", "x"]
    lines = [["002", "01", "1", "None", "2.50", "0", "null"], ["001", "007", "", "NA", "1e1", "TRUE", "1"]]
    path = tmp_path / ("run/metadata.tsv" if beside else "more.tsv")
    path.write_text(header + "\n".join("\t".join(line) for line in [columns, *lines]) + "\n")
    table = {} if beside else {"obs_table": str(path)}
    found = OpenDataset(SourceSettings(uri=str(tmp_path / "run"), **table), "run").inspect()
    assert found.problems == []
    assert [note.rsplit(": ", 1)[1] for note in found.notes if "line" in note] == ["1 of 3 cells have no line"]
    obs = found.obs.set_index("cell_id")
    assert obs["donor_id"].tolist()[:2] == ["007", "01"]
    assert obs["batch"].tolist()[1] == "1"
    assert obs["sample_id"].tolist()[:2] == ["NA", "None"]
    assert obs["dose"].tolist()[:2] == [10, 2.5]
    assert obs["x"].isna().tolist() == [False, True, True]
    assert obs["is_primary_data"].tolist()[:2] == [True, False]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("cell\tdonor\nc1\ta\nc1\tb\n", "cell 'c1' stands in more than one line"),
        ("cell\tdonor\nrun1_c1\ta\n", r"none of its cells \('run1_c1', ...\) is one of the source \('c1', 'c2'"),
        ("", "not a readable table"),
    ],
)
def test_a_table_of_cells_that_cannot_fit_is_refused(tmp_path: Path, lines: str, said: str) -> None:
    _10x_folder(tmp_path / "run", ["c1", "c2"])
    (tmp_path / "more.tsv").write_text(lines)
    given = SourceSettings(uri=str(tmp_path / "run"), obs_table=str(tmp_path / "more.tsv"))
    (problem,) = OpenDataset(given, "run").inspect().problems
    assert re.search(f"more.tsv: {said}", problem)
    (tmp_path / "run/metadata.tsv").write_text(lines)
    with pytest.raises(InputRefused, match=f"metadata.tsv: {said}"):
        OpenDataset(SourceSettings(uri=str(tmp_path / "run")), "run")


def test_columns_of_a_table_of_cells_that_the_source_has_are_named(tmp_path: Path) -> None:
    _10x_folder(tmp_path / "run", ["c1", "c2"])
    (tmp_path / "run/metadata.tsv").write_text("cell\tdonor\nc1\ta\nc2\tb\n")
    (tmp_path / "more.tsv").write_text("cell\tdonor\tbatch\nc1\tx\t1\nc2\ty\t2\n")
    given = SourceSettings(uri=str(tmp_path / "run"), obs_table=str(tmp_path / "more.tsv"))
    found = OpenDataset(given, "run").inspect()
    assert f"{tmp_path}/more.tsv: not taken, for the source has them: donor" in found.notes
    assert (found.obs["donor_id"].tolist(), found.obs["batch"].tolist()) == (["a", "b"], ["1", "2"])
    with pytest.raises(MissingError, match=r"none.tsv: no such table of cells"):
        OpenDataset(given.model_copy(update={"obs_table": str(tmp_path / "none.tsv")}), "run").inspect()


def test_a_measurement_without_a_feature_is_refused(tmp_path: Path) -> None:
    anndata.AnnData(np.zeros((3, 0), np.float32), pd.DataFrame(index=["a", "b", "c"])).write_h5ad(tmp_path / "no.h5ad")
    with pytest.raises(InputRefused, match=r"no\.h5ad: dataset 'no': RNA has no features; leave out"):
        OpenDataset(SourceSettings(uri=str(tmp_path / "no.h5ad")), "no").inspect()


def test_modalities_without_a_measurement_are_left_out_and_can_be_given_one(tmp_path: Path) -> None:
    def modality(cells: list[str], features: int, seed: int) -> anndata.AnnData:
        counts = np.random.default_rng(seed).poisson(2, (len(cells), features)).astype(np.float32)
        names = pd.DataFrame(index=[f"f{seed}-{number}" for number in range(features)])
        return anndata.AnnData(scipy.sparse.csr_matrix(counts), pd.DataFrame(index=cells), names)

    cells = [f"cell{number}" for number in range(40)]
    made = {"rna": modality(cells[:30], 50, 0), "hto": modality(cells[10:], 4, 1), "adt": modality(cells[5:30], 6, 2)}
    uri = str(tmp_path / "three.h5mu")
    mudata.MuData(made).write(uri)
    opened = OpenDataset(SourceSettings(uri=uri), "three")
    assert set(opened.form.parts) == {"RNA", "protein"}
    assert list(opened.form.obs.index) == cells[:30]  # those of hto alone have nothing that comes in
    assert any("modalities left out: hto" in note for note in opened.inspect().notes)
    proteins = opened.block("protein", 0, 30).toarray()
    np.testing.assert_array_equal(proteins[5:], made["adt"].X.toarray())
    assert not proteins[:5].any()
    tags = OpenDataset(SourceSettings(uri=uri, modalities={"hto": "protein", "adt": ""}), "three")
    assert {name: len(part.var) for name, part in tags.form.parts.items()} == {"RNA": 50, "protein": 4}
    assert tags.form.n_obs == 40
    for given, said in (
        ({"hto": "protein"}, "modalities adt and hto are protein both|modalities hto and adt are protein both"),
        ({"tags": "protein"}, "has no modality 'tags'; it has"),
        ({"rna": "", "adt": ""}, "unknown modality"),
    ):
        with pytest.raises(InputRefused, match=said):
            OpenDataset(SourceSettings(uri=uri, modalities=given), "three")


def test_features_of_10x_without_a_place_are_named(tmp_path: Path) -> None:
    kinds = ["Gene Expression", "Gene Expression", "Multiplexing Capture"]
    lines = [f"F{number}\tF{number}\t{kind}\n" for number, kind in enumerate(kinds)]
    (tmp_path / "features.tsv").write_text("".join(lines))
    (tmp_path / "barcodes.tsv").write_text("AAACATACAACCAC-1\nAAACATTGAGCTAC-1\n")
    scipy.io.mmwrite(tmp_path / "matrix.mtx", scipy.sparse.coo_matrix(np.ones((3, 2), int)))
    found = OpenDataset(SourceSettings(uri=str(tmp_path)), "one").inspect()
    assert found.plan.features["RNA"].feature_id == ["F0", "F1"]
    assert "features left out: 1 of type 'Multiplexing Capture'" in found.notes


def test_a_table_that_lies_on_its_side_is_refused_with_the_way_on(shared_data: Path, tmp_path: Path) -> None:
    data = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad")[:20]
    pd.DataFrame(data.X.toarray().T, index=data.var_names, columns=data.obs_names).to_csv(tmp_path / "side.csv")
    told = {"uri": str(tmp_path / "side.csv"), "kind": "table"}
    with pytest.raises(InputRefused, match=r"called as cells are \('AAA.*set transposed=true"):
        OpenDataset(SourceSettings(**told), "side")
    assert OpenDataset(SourceSettings(**told, transposed=True), "side").form.n_obs == 20


@pytest.mark.parametrize(
    ("lines", "given", "cells", "features", "said"),
    [
        (",7157,672,675/cA,1,0,2/cB,0,3,1", {}, ["cA", "cB"], ["7157", "672", "675"], ""),
        (",TP53,KRAS,MYC/1,1,0,2/2,0,3,1", {}, ["1", "2"], ["TP53", "KRAS", "MYC"], ""),
        ("cell,7157,672,675/1,1,0,2/2,0,3,1", {}, ["1", "2"], ["7157", "672", "675"], ""),
        ("well,TP53,672,675/cA,1,0,2/cB,0,3,1", {}, ["cA", "cB"], ["TP53", "672", "675"], ""),
        ("gene,c1,c2/7157,1,0/672,0,3/675,2,1", {"transposed": True}, ["c1", "c2"], ["7157", "672", "675"], ""),
        ("cA,1,0,2/cB,0,3,1", {}, ["cA", "cB"], ["feature1", "feature2", "feature3"], "no line names the columns"),
        ("TP53,KRAS,MYC/1,0,2/0,3,1", {}, ["cell0", "cell1"], ["TP53", "KRAS", "MYC"], "no column names the lines"),
        ("cell,TP53,KRAS,age/cA,1,0,2/cB,0,3,1", {}, ["cA", "cB"], ["TP53", "KRAS", "age"], "with obs.COLUMN=age"),
    ],
)
def test_lines_and_columns_of_names_are_known_also_where_they_are_numbers(
    tmp_path: Path, lines: str, given: dict[str, object], cells: list[str], features: list[str], said: str
) -> None:
    (tmp_path / "one.csv").write_text(lines.replace("/", "\n"))
    settings = SourceSettings.model_validate({"uri": str(tmp_path / "one.csv"), "kind": "table", **given})
    opened = OpenDataset(settings, "one")
    found = opened.inspect()
    assert found.obs["cell_id"].tolist() == cells
    assert found.plan.features["RNA"].feature_id == features
    assert opened.block("RNA", 0, 2).toarray().tolist() == [[1, 0, 2], [0, 3, 1]]
    notes = [note for note in found.notes if "Ensembl" not in note]
    assert len(notes) == bool(said)
    assert said in "".join(notes)


def test_numbers_of_a_table_that_settings_name_for_obs_are_no_features(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("cell,TP53,plate\ncA,1,45\ncB,0,50\n")
    told = {"uri": str(tmp_path / "one.csv"), "kind": "table", "obs": {"batch": "plate"}}
    found = OpenDataset(SourceSettings.model_validate(told), "one").inspect()
    assert found.plan.features["RNA"].feature_id == ["TP53"]
    assert found.obs["batch"].tolist() == ["45", "50"]


def test_raw_counts_of_a_modality_are_read_and_x_of_one_that_has_none(tmp_path: Path) -> None:
    cells = pd.DataFrame(index=["a", "b", "c"])
    counts = np.array([[1, 0, 4], [0, 2, 0], [3, 0, 7]], np.float32)
    whole = anndata.AnnData(counts, cells, pd.DataFrame(index=["g0", "g1", "g2"]))
    genes = anndata.AnnData(np.log1p(counts[:, :2]), cells, pd.DataFrame(index=["g0", "g1"]))
    genes.raw = whole
    proteins = anndata.AnnData(counts[:, :2], cells, pd.DataFrame(index=["p0", "p1"]))
    mudata.MuData({"rna": genes, "adt": proteins}).write(tmp_path / "raw.h5mu")
    opened = OpenDataset(SourceSettings(uri=str(tmp_path / "raw.h5mu")), "raw")
    assert opened.check("RNA", 0, 3, 1000).problems[-1] == "other matrices here: layer=raw"
    opened = OpenDataset(SourceSettings(uri=str(tmp_path / "raw.h5mu"), layer="raw"), "raw")
    assert opened.block("RNA", 0, 3).toarray().tolist() == counts.tolist()
    assert opened.block("protein", 0, 3).toarray().tolist() == counts[:, :2].tolist()
    assert "layer=raw: X is taken of adt, which lacks it" in opened.inspect().notes
    with pytest.raises(InputRefused, match=r"has no matrix layers/counts; it has .*X \(no layer\)"):
        OpenDataset(SourceSettings(uri=str(tmp_path / "raw.h5mu"), layer="counts"), "raw")


def test_places_in_a_table_half_precision_and_features_without_a_type_are_read(tmp_path: Path) -> None:
    cells, names = pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=["g0", "g1", "g2"])
    counts = np.array([[1, 0, 300], [0, 2, 5]], np.float16)
    names["feature_types"] = ["Gene Expression", np.nan, np.nan]
    data = anndata.AnnData(counts, cells, names)
    data.obsm["spatial"] = pd.DataFrame({"y": [1.5, 2.5], "x": [3.5, 4.5]}, index=cells.index)
    data.write_h5ad(tmp_path / "one.h5ad")
    opened = OpenDataset(SourceSettings(uri=str(tmp_path / "one.h5ad")), "one")
    found = opened.inspect()
    assert (found.obs["x"].tolist(), found.obs["y"].tolist()) == ([3.5, 4.5], [1.5, 2.5])
    assert found.sides["obsm_spatial"]["x"].tolist() == [3.5, 4.5]
    assert opened.block("RNA", 0, 2).toarray().tolist() == counts.tolist()
    assert "2 features without a type are taken for genes" in found.notes
    assert not any("left out" in note for note in found.notes)
    data.obsm["spatial"] = pd.DataFrame({"first": [1.5, 2.5], "second": [3.5, 4.5]}, index=cells.index)
    data.write_h5ad(tmp_path / "two.h5ad")
    found = OpenDataset(SourceSettings(uri=str(tmp_path / "two.h5ad")), "two").inspect()
    assert (found.obs["x"].tolist(), found.obs["y"].tolist()) == ([1.5, 2.5], [3.5, 4.5])
