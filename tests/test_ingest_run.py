"""Ingestion end to end: every kind of source into a lake, what is refused, what a second run does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse
from rich.console import Console
from typer.testing import CliRunner

from ingest import __main__ as command
from ingest import sources
from ingest.job import JobSettings, SourceSettings
from ingest.progress import Progress
from ingest.run import Outcome, plan, run
from store.errors import InputRefused, MissingError, StorageError, UsageError
from store.lake import open_lake
from store.validate import validate

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*without encoding metadata"),  # anndata, on older files
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),  # anndata, on 10x symbols; we use the ids
    pytest.mark.filterwarnings("ignore:Transforming to str index"),  # anndata, on tables it makes itself
]


def ingest(lake: Path, *given: SourceSettings) -> list[Outcome]:
    return run(JobSettings(lake=str(lake), source=given))


def source(path: Path | str, **values: Any) -> SourceSettings:
    return SourceSettings(uri=str(path), **values)


def lake_frame(lake: Path, dataset: str, measurement: str = "RNA", organism: str = "homo_sapiens") -> pd.DataFrame:
    """A dataset as a table: the source's cells by feature ids, features without any count left out."""
    opened = open_lake(str(lake))
    obs = opened.obs(organism, f"dataset_id == {dataset!r}", ["cell_id"]).to_pandas()
    var = opened.var(organism, measurement).to_pandas()
    counts = opened.counts(organism, measurement, obs["soma_joinid"].to_numpy())[:, var["soma_joinid"].to_numpy()]
    frame = pd.DataFrame(counts.toarray(), index=list(obs["cell_id"]), columns=list(var["feature_id"]))
    return frame.loc[:, frame.any()].sort_index(axis=1)


def frame_of(counts: Any, cells: list[str], features: list[str]) -> pd.DataFrame:
    dense = scipy.sparse.csr_matrix(counts).toarray().astype(np.float32)
    frame = pd.DataFrame(dense, index=cells, columns=features).T.groupby(level=0).sum().T
    return frame.loc[:, frame.any()].sort_index(axis=1)


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("simulated:", "simulated"),
        ("stable", "census"),
        ("2025-11-08", "census"),
        ("s3://bucket/a.zarr", "zarr"),
        ("s3://bucket/run7/atac_fragments.tsv.gz", "fragments"),
        ("https://host/a.loom", "loom"),
        ("s3://bucket/a.h5ad", "h5ad"),
        ("gs://bucket/matrix.h5", "10x"),
    ],
)
def test_kinds_are_recognised_by_name(uri: str, kind: str) -> None:
    assert sources.recognise(uri) == kind


def test_what_is_missing_or_unknown_is_said_with_what_would_do(tmp_path: Path) -> None:
    (tmp_path / "cells.h5ad").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(MissingError, match=r"did you mean .*cells\.h5ad\?"):
        sources.recognise(str(tmp_path / "cell.h5ad"))
    with pytest.raises(MissingError, match="nor is there a folder"):
        sources.recognise(str(tmp_path / "no/such/file.h5ad"))
    with pytest.raises(InputRefused, match=r"cannot tell what it is; a source is an \.h5ad"):
        sources.recognise(str(tmp_path / "notes.txt"))
    with pytest.raises(UsageError, match="nothing to ingest"):
        plan(JobSettings(lake=str(tmp_path / "lake")))


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_no_workers_at_all_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    asked: list[JobSettings] = []
    monkeypatch.setattr(f"ingest.run.{verb}", lambda job: asked.append(job) or [])
    runner = CliRunner()
    given = [verb, str(tmp_path / "a.h5ad"), "--workers"]
    assert (runner.invoke(command.app, [*given, "0"]).exit_code, asked) == (2, [])
    assert (runner.invoke(command.app, [*given, "1"]).exit_code, asked[0].workers) == (0, 1)


def test_words_of_sources_are_shown_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(command, "console", Console(file=text, width=300))
    note, problem = "obs columns kept: conc [/mL], [red]", "x[/]: column '[bold]' is none [/b]"
    taken = Outcome("a.h5ad", "a[/b]", "committed", 3, {"RNA": 2}, commit=1, notes=[note])
    refused = Outcome("b[/i].h5ad", "")
    refused.refuse(problem)
    command._show([taken, refused])
    lines = text.getvalue().splitlines()
    assert f"note a[/b]: {note}" in lines
    assert f"refused b[/i].h5ad: {problem}" in lines
    assert sum(name in line for line in lines for name in ("a[/b] ", "b[/i].h5ad ")) == 2
    with Progress(None) as progress:
        progress.add("a[/b]")
        progress.size("a[/b]", 10)
        Console(file=text, width=300).print(progress._bars.get_renderable())
    assert "a[/b]" in text.getvalue().splitlines()[-1]


def test_a_page_that_cannot_be_written_is_told_in_one_line(
    tiny_lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.duplicates.find", lambda lake: [])
    monkeypatch.setattr("ingest.page.page", lambda lake, pairs: "a page")
    page = tmp_path / "no folder/page.html"
    done = CliRunner().invoke(command.app, ["quality", "--lake", str(tiny_lake), "--html", str(page)])
    assert isinstance(done.exception, StorageError)
    assert str(done.exception).startswith(f"{page}: cannot be written: No such file or directory; name a file in")


@pytest.mark.ray
def test_10x_matrices_of_both_versions_as_folder_and_file_hold_what_scanpy_reads(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    rna = shared_data / "rna"
    given = {
        "v3-folder": rna / "10x_v3_scanpy/filtered_feature_bc_matrix",
        "v3-file": rna / "10x_v3_scanpy/filtered_feature_bc_matrix.h5",
        "v2-folder": rna / "10x_v2_scanpy/filtered_gene_bc_matrices/hg19_chr21",
        "v2-file": rna / "10x_v2_scanpy/filtered_gene_bc_matrices_h5.h5",
    }
    done = ingest(tmp_path / "lake", *(source(path, dataset_id=name) for name, path in given.items()))
    assert [outcome.state for outcome in done] == ["committed"] * 4
    for name, path in given.items():
        read = scanpy.read_10x_mtx(path) if path.is_dir() else scanpy.read_10x_h5(path)
        expected = frame_of(read.X, list(read.obs_names), list(read.var["gene_ids"]))
        pd.testing.assert_frame_equal(lake_frame(tmp_path / "lake", name), expected, check_dtype=False)


@pytest.mark.ray
def test_h5ads_of_all_ages_and_forms_hold_what_anndata_reads(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    counts = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad")
    layered = counts.copy()
    layered.layers["umi"] = scipy.sparse.csc_matrix(layered.X)
    layered.X = scipy.sparse.csr_matrix(layered.X.astype(np.float32) / 3)
    layered.write_h5ad(tmp_path / "columns.h5ad")
    dense = counts.copy()
    dense.X = dense.X.toarray()
    dense.write_h5ad(tmp_path / "dense.h5ad")
    log = {"layer": "raw", "values": "log1p"}
    done = ingest(
        tmp_path / "lake",
        source(shared_data / "derived/pbmc68k_reduced_counts.h5ad", dataset_id="plain"),
        source(tmp_path / "columns.h5ad", dataset_id="by columns", layer="umi"),
        source(tmp_path / "dense.h5ad", dataset_id="dense"),
        source(shared_data / "rna/pbmc68k_reduced.h5ad", dataset_id="restored", **log),
        source(shared_data / "rna/anndata_v0.5.0.h5ad", dataset_id="old", **log),
    )
    assert {outcome.dataset_id: outcome.error for outcome in done if outcome.error} == {}
    expected = frame_of(counts.X, list(counts.obs_names), list(counts.var_names))
    for name in ("plain", "by columns", "dense", "restored", "old"):
        pd.testing.assert_frame_equal(lake_frame(tmp_path / "lake", name), expected, check_dtype=False)
    terms = {
        "Dendritic": "dendritic cell",
        "CD14+ Monocyte": "CD14-positive monocyte",
        "CD19+ B": "B cell, CD19-positive",
    }
    labels = [terms.get(label, label) for label in counts.obs["bulk_labels"].astype(str)]
    for name in ("plain", "restored", "old"):
        where = f"dataset_id == {name!r}"
        obs = open_lake(str(tmp_path / "lake")).obs("homo_sapiens", where, ["cell_id", "cell_type"])
        assert obs["cell_type"].to_pylist() == labels


@pytest.mark.ray
def test_bad_datasets_are_refused_whole_and_the_others_go_on(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    good = shared_data / "derived/pbmc68k_reduced_counts.h5ad"
    (tmp_path / "torn.h5ad").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "empty.h5ad").touch()
    done = ingest(
        tmp_path / "lake",
        source(tmp_path / "torn.h5ad"),
        source(tmp_path / "empty.h5ad"),
        source(tmp_path / "missing.h5ad"),
        source(shared_data / "rna/nan.h5ad"),
        source(shared_data / "rna/x-none.h5ad"),
        source(shared_data / "rna/pbmc68k_reduced.h5ad"),
        source(good, dataset_id="good"),
    )
    by_state = {outcome.source.rsplit("/", 1)[1]: outcome for outcome in done}
    assert [outcome.dataset_id for outcome in done if outcome.state == "committed"] == ["good"]
    assert "not a readable HDF5 file" in by_state["torn.h5ad"].error
    assert "no such file" in by_state["missing.h5ad"].error
    assert "not finite" in by_state["nan.h5ad"].error
    assert "negative" in by_state["nan.h5ad"].error
    assert "has no matrix X" in by_state["x-none.h5ad"].error
    assert "other matrices here: layer=raw" in by_state["pbmc68k_reduced.h5ad"].error
    lake = open_lake(str(tmp_path / "lake"))
    assert lake.obs("homo_sapiens").num_rows == 700
    assert all(not check.problem for check in validate(lake))


@pytest.mark.ray
def test_the_same_again_adds_nothing_and_content_from_elsewhere_needs_another_name(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    path = shared_data / "derived/pbmc68k_reduced_counts.h5ad"
    assert [o.state for o in ingest(tmp_path / "lake", source(path, dataset_id="x"))] == ["committed"]
    assert [o.state for o in ingest(tmp_path / "lake", source(path, dataset_id="x"))] == ["present"]
    changed = anndata.read_h5ad(path)[:300].copy()
    changed.write_h5ad(tmp_path / "changed.h5ad")
    refused = ingest(tmp_path / "lake", source(tmp_path / "changed.h5ad", dataset_id="x"))[0]
    assert "comes from" in refused.error
    assert open_lake(str(tmp_path / "lake")).commit.number == 1
    replaced = ingest(tmp_path / "lake", source(tmp_path / "changed.h5ad", dataset_id="x", replaces=True))[0]
    assert (replaced.state, replaced.commit) == ("committed", 2)
    assert open_lake(str(tmp_path / "lake")).obs("homo_sapiens").num_rows == 300
    reports = [json.loads(p.read_text()) for p in (tmp_path / "lake/somaflow/reports").iterdir()]
    assert len(reports) >= 1


@pytest.mark.ray
def test_a_plan_writes_nothing_and_finds_the_same_problems(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    given = (source(shared_data / "derived/papalexi_dev.h5mu"), source(shared_data / "rna/nan.h5ad"))
    found = plan(JobSettings(lake=str(tmp_path / "lake"), source=given))
    assert found[0].state == "planned"
    assert found[0].cells == 17490
    assert found[0].measurements == {"guide": 110, "RNA": 299}
    assert "not finite" in found[1].error
    assert not (tmp_path / "lake").exists()


@pytest.mark.ray
def test_a_plan_says_what_the_lake_would_do_with_each_dataset(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    given = {name: tmp_path / name / "cells.h5ad" for name in ("a", "b", "c", "d")}
    data = anndata.read_h5ad(shared_data / "derived/pbmc68k_reduced_counts.h5ad")
    for number, path in enumerate(given.values(), 1):
        path.parent.mkdir()
        data[: 60 * number].copy().write_h5ad(path)
    lake = str(tmp_path / "lake")

    def both(*asked: SourceSettings) -> list[Outcome]:
        """Plan and run; they say the same of what comes in and what does not."""
        foreseen = plan(JobSettings(lake=lake, source=asked))
        done = ingest(tmp_path / "lake", *asked)
        states = {"planned": "committed"}
        assert [states.get(one.state, one.state) for one in foreseen] == [one.state for one in done]
        assert [one.exit_code for one in foreseen] == [one.exit_code for one in done]
        return foreseen

    (given["a"].parent / "notes.md").touch()
    first = both(SourceSettings(uri=str(given["a"].parent), dataset_id="cells"))
    assert (first[0].state, first[0].notes[0]) == ("planned", "passed over, of no known kind: notes.md")
    data[:100].copy().write_h5ad(given["c"])
    foreseen = both(
        source(given["a"], dataset_id="cells"),
        source(given["b"], dataset_id="cells"),
        source(given["d"], dataset_id="other"),
        source(given["b"], dataset_id="other"),
    )
    assert [one.state for one in foreseen] == ["present", "refused", "planned", "refused"]
    assert "comes from" in foreseen[1].error
    assert "(commit 1)" in foreseen[1].error
    assert "(this plan)" in foreseen[3].error
    foreseen = both(source(given["c"], dataset_id="cells", replaces=True))
    assert foreseen[0].state == "planned"
    assert any("takes the place of the one of commit 1" in note for note in foreseen[0].notes)
    asked = (
        source(given["c"], dataset_id="cells"),
        source(given["c"], dataset_id="cells", obs={"tissue": "=blood"}),
        source(given["c"], dataset_id="cells", title="the same cells"),
        source(given["d"], dataset_id="cells", replaces=True),
    )
    foreseen = both(*asked)
    assert [one.state for one in foreseen] == ["present", "refused", "present", "refused"]
    for number, name in ((1, "c"), (3, "d")):
        assert foreseen[number].exit_code == UsageError.exit_code
        assert foreseen[number].error == (
            f"{given[name]}: would take the place of dataset 'cells', which the same job brings in from "
            f"{given['c']}; set dataset_id=NAME on one of the two"
        )


@pytest.mark.ray
def test_a_filter_takes_part_of_a_census_and_says_when_it_takes_nothing(
    shared_data: Path, tmp_path: Path, ray_cluster: None
) -> None:
    census = shared_data / "census-mini/soma"
    done = ingest(tmp_path / "lake", source(census, where="is_primary_data == False and cell_type == 'B cell'"))
    assert {outcome.dataset_id: outcome.error for outcome in done if outcome.error} == {}
    obs = open_lake(str(tmp_path / "lake")).obs("homo_sapiens").to_pandas()
    assert set(obs["cell_type"]) == {"B cell"}
    assert len(obs) == 298
    assert not obs["is_primary_data"].any()
    assert "no cell fits" in ingest(tmp_path / "lake", source(census, where="cell_type == 'none'"))[0].error
    assert "no_column" in ingest(tmp_path / "lake", source(census, where="no_column == 'x'"))[0].error


@pytest.mark.ray
def test_commands_end_with_one_line_and_the_status_of_what_happened(tmp_path: Path) -> None:
    def ours(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NO_COLOR": "1"}
        command = [sys.executable, "-m", "ingest", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    (tmp_path / "job.toml").write_text('lakee = "x"\n')
    misspelt = ours("run", str(tmp_path / "job.toml"))
    assert misspelt.returncode == 3
    assert misspelt.stderr.strip().splitlines() == [
        f"SettingsError: {tmp_path}/job.toml: unknown key 'lakee'; did you mean 'lake'?"
    ]
    assert ours("status", "--lake", str(tmp_path / "none")).returncode == 5
    lake = str(tmp_path / "lake")
    small = ["--set", "simulation.cells=60", "--set", "simulation.genes=60", "--lake", lake, "--json"]
    partly = ours("run", "simulated:", str(tmp_path / "none.h5ad"), *small)
    assert partly.returncode == 1, partly.stderr
    answer = json.loads(partly.stdout)
    assert [row["state"] for row in answer["datasets"]] == ["committed", "refused"]
    status = json.loads(ours("status", "--lake", lake, "--json").stdout)
    assert [row["n_obs"] for row in status["committed"]] == [60]
    assert status["pending"] == []
