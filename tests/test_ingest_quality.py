"""What people and programs are told of a lake's datasets: quality, duplicates, the page, the status of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from ingest import duplicates, page
from ingest.job import JobSettings, SourceSettings
from ingest.progress import Progress
from ingest.run import run
from store import records
from store.lake import Lake, open_lake

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ray


def cells(n_cells: int, seed: int) -> anndata.AnnData:
    counts = scipy.sparse.random(n_cells, 200, 0.5, "csr", random_state=seed, dtype=np.float32)
    counts.data = np.ceil(counts.data * 20)
    names = [f"ENSG{number:011d}" for number in range(200)]
    symbols = [f"MT-{number}" if number < 10 else f"GENE{number}" for number in range(200)]
    obs = pd.DataFrame({"is_primary_data": True}, index=[f"{seed}-{number}" for number in range(n_cells)])
    return anndata.AnnData(counts, obs, pd.DataFrame({"feature_name": symbols}, index=names))


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Lake:
    """Two datasets that share 30 cells, in another order and among other genes; the third has none of them."""
    folder = tmp_path_factory.mktemp("shared cells")
    first = cells(100, 1)
    first.write_h5ad(folder / "first.h5ad")
    again = first[29::-1, ::-1].copy()
    again.obs["is_primary_data"] = np.arange(30) >= 10
    again.obs_names = [f"other name {number}" for number in range(30)]
    anndata.concat([again, cells(50, 2)], join="outer").write_h5ad(folder / "second.h5ad")
    third = cells(20, 3)
    third.X = scipy.sparse.csr_matrix(third.X.toarray() * (np.arange(20) >= 5)[:, None])
    third.write_h5ad(folder / "<b>third.h5ad")
    uri = str(folder / "lake")
    sources = tuple(SourceSettings(uri=str(folder / f"{name}.h5ad")) for name in ("first", "second", "<b>third"))
    assert [outcome.state for outcome in run(JobSettings(lake=uri, source=sources))] == ["committed"] * 3
    return open_lake(uri)


@pytest.mark.parametrize("piece_cells", [2**24, 40])
def test_cells_that_two_datasets_share_are_found_by_their_counts(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, piece_cells: int
) -> None:
    monkeypatch.setattr(duplicates, "PIECE_CELLS", piece_cells)
    (found,) = duplicates.find(lake)
    assert (found.first, found.second, found.cells, found.share) == ("first", "second", 30, 0.375)
    assert found.both_primary == 20


@pytest.mark.parametrize(("large", "small"), [("a", "b"), ("b", "a")])
def test_cells_that_a_dataset_repeats_are_shared_as_often_as_both_hold_them(
    large: str, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell stands 90 times in the large dataset and once in the small one, another 3 and 2 times."""

    class Made:
        """A lake that holds nothing but who calls which cell primary."""

        def experiment(self, organism: str) -> Any:
            frame = pd.DataFrame({"soma_joinid": range(96), "is_primary_data": np.arange(96) < 94})
            read = SimpleNamespace(concat=lambda: SimpleNamespace(to_pandas=lambda: frame))
            return SimpleNamespace(obs=SimpleNamespace(read=lambda *_, **__: read))

    digests, datasets = [7] * 91 + [8] * 5, [large] * 90 + [small] + [large] * 3 + [small] * 2
    again = pd.DataFrame({"digest": digests, "joinid": range(96), "dataset": datasets})
    found = duplicates._shared(Made(), "homo_sapiens", again, {large: 200, small: 50})
    (between,) = [one for one in found if one.first != one.second]
    assert (between.cells, between.share, between.both_primary) == (3, 0.06, 1)


def test_the_quality_table_holds_what_the_counts_say(lake: Lake) -> None:
    rows: dict[str, dict[str, Any]] = {row["dataset"]: row for row in page.table(lake)}
    first = cells(100, 1)
    totals = np.asarray(first.X.sum(axis=1)).ravel()
    mito = np.asarray(first.X[:, :10].sum(axis=1)).ravel() / totals
    assert rows["first"]["sum"]["q50"] == pytest.approx(np.median(totals))
    assert rows["first"]["mito"] == pytest.approx(np.median(mito))
    assert rows["first"]["nnz"] == first.X.nnz
    third = next(row for name, row in rows.items() if "third" in name)
    assert (third["cells"], third["empty_cells"], third["mapped"]) == (15, 5, 1.0)


def test_the_page_stands_alone_and_escapes_names(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    html = page.page(lake, duplicates.find(lake))
    assert html.count("<svg") == 3
    assert "largest" not in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in html
    assert "<b>" not in html
    assert "37.5" in html
    monkeypatch.setattr(page, "MOST_BARS", 2)
    assert page.page(lake, []).count("the 2 largest of 3 datasets") == 3


def test_each_dataset_has_a_bar_of_its_own_and_the_largest_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = "2024_bonemarrow_10x_v3_donor_batch_"
    sizes = {f"{alike}{letter}": 1000 * number for number, letter in enumerate("ABC", start=1)}
    sizes |= {f"d{number:02d}": number for number in range(1, 60)} | {"x$\\foo$y": 900}
    rows = [
        {"dataset": name, "measurement": kind, "layer": "raw", "cells": cells * times}
        for name, cells in sizes.items()
        for kind, times in (("RNA", 1), ("protein", 2))
    ]
    assert "x$\\foo$y" in page._measured(rows)
    monkeypatch.setattr(page, "_svg", lambda figure: figure)
    (axes,) = page._measured(rows).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(names)) == 40
    end = dict.fromkeys(names, 0.0)
    for bar in axes.patches:
        name = names[round(bar.get_y() + bar.get_height() / 2)]
        assert bar.get_x() == end[name]
        end[name] += bar.get_width()
    largest = sorted(sizes, key=lambda name: -sizes[name])[:40]
    assert list(end.values()) == [3 * sizes[name] for name in largest]
    assert [name[-1] for name in names[:3]] == ["C", "B", "A"]
    assert names[3:] == largest[3:]


def test_a_running_ingest_tells_rows_speed_and_what_is_left(lake: Lake) -> None:
    with Progress(lake.uri) as progress:
        progress.add("large")
        progress.size("large", 1000)
        progress.advance("large", 250)
        progress.tick(force=True)
        (said,) = records.read_all(f"{lake.uri}/somaflow/running")
        assert (said["rows_done"], said["rows_seen"], said["pid"]) == (250, 1000, os.getpid())
        assert said["eta_s"] is not None
        assert said["datasets"] == [{"dataset": "large", "state": "writing", "rows": 1000, "done": 250}]
        progress.done("large", "refused")  # in the middle of it
        assert (progress.status()["rows_done"], progress.status()["rows_seen"], progress.status()["eta_s"]) == (0, 0, 0)
    assert records.read_all(f"{lake.uri}/somaflow/running") == []


def test_bars_of_datasets_that_ended_leave_the_terminal_but_for_the_last_ones() -> None:
    with Progress(None) as progress:
        for number in range(40):
            progress.add(f"d{number}")
            progress.size(f"d{number}", 10)
            if number:
                progress.done(f"d{number}", "committed")
        progress.done("d39", "committed")  # a name that is told of twice
        assert [bar.description for bar in progress._bars.tasks] == ["d0", *(f"d{number}" for number in range(30, 40))]


def test_the_commands_answer_people_and_programs(lake: Lake, tmp_path: Path) -> None:
    def ours(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NO_COLOR": "1"}
        command = [sys.executable, "-m", *words, "--lake", lake.uri]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    answer = json.loads(ours("ingest", "duplicates", "--json").stdout)
    assert answer["pairs"][0]["cells"] == 30
    assert ours("ingest", "quality", "--html", str(tmp_path / "page.html")).returncode == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads(ours("ingest", "recover", "--json").stdout)["writes"] == 0
    assert json.loads(ours("store", "gc", "--json").stdout)["fragments"] == 0
    assert json.loads(ours("store", "consolidate", "--json").stdout)["arrays"] > 5
    unsure = ours("store", "vacuum")
    assert (unsure.returncode, "say --yes" in unsure.stderr) == (2, True)
    assert ours("store", "remove", "second").returncode == 0
    assert json.loads(ours("store", "vacuum", "--yes", "--json").stdout) == {
        "schema": "store-vacuum/v1",
        "first_openable": 4,
        "fragments": 1,
    }
    assert ours("store", "validate").returncode == 0
