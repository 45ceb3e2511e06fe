"""New versions, removal, time travel, and what upkeep leaves of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledb
import tiledbsoma
from click.testing import Result
from encoded import add_dataset, encoded_counts, numbered
from typer.testing import CliRunner

import store.__main__ as commands
import store.writer
from store import catalog, command, lock, records, tables, upkeep
from store.errors import ConflictError, MissingError, StorageError, UsageError, VerificationError
from store.fragments import fragments
from store.lake import Lake, layer_uris, open_lake, table_uris
from store.lock import WriterLock
from store.schema import DatasetPlan
from store.upkeep import collect, consolidate, recover, vacuum
from store.validate import Check, validate
from store.writer import LakeWriter, write_counts

ROOT = Path(__file__).parent.parent


def census_cells(uri: str) -> int:
    with cellxgene_census.open_soma(uri=uri) as census:
        return len(cellxgene_census.get_obs(census, "homo_sapiens"))


def summary(lake: Lake) -> dict[str, str]:
    table = lake.root["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    return {key: table[key] for key in ("total_cell_count", "unique_cell_count")}


def contents(lake: Lake) -> dict[str, dict[str, tuple[int, float]]]:
    return {
        commit.dataset["dataset_id"]: {name: (part.nnz, part.total) for name, part in commit.content.items()}
        for commit in lake.current
    }


@pytest.fixture
def two_versions(tmp_path: Path) -> str:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 100, {"RNA": 40, "protein": 6}, origin="a.h5ad")
        add_dataset(writer, "b", 50, {"RNA": 60}, origin="b.h5ad")
        add_dataset(writer, "a", 70, {"RNA": 30}, origin="a.h5ad", version=1)
    return uri


def test_a_new_version_takes_the_old_ones_place_everywhere(two_versions: str, tmp_path: Path) -> None:
    fresh = str(tmp_path / "fresh")
    with LakeWriter(fresh) as writer:
        add_dataset(writer, "a", 70, {"RNA": 30}, version=1)
        add_dataset(writer, "b", 50, {"RNA": 60})
    lake, expected = open_lake(two_versions), open_lake(fresh)
    assert contents(lake) == contents(expected)
    assert summary(lake) == summary(expected) == {"total_cell_count": "120", "unique_cell_count": "108"}
    assert census_cells(two_versions) == 120
    assert lake.datasets().num_rows == 2
    keys = ["feature_id", "nnz", "n_measured_obs"]
    assert (
        lake.var("homo_sapiens", "RNA")
        .select(keys)
        .to_pandas()
        .equals(
            expected.var("homo_sapiens", "RNA").select(keys).to_pandas().sort_values("feature_id", ignore_index=True)
        )
    )
    assert lake.var("homo_sapiens", "protein")["nnz"].to_pylist() == [0] * 6
    assert [row.nnz for row in lake.presence("homo_sapiens", "RNA")] == [30, 60]
    assert lake.presence("homo_sapiens", "protein").nnz == 0
    joinids = lake.obs("homo_sapiens", "dataset_id == 'a'", [])["soma_joinid"].to_numpy()
    assert (lake.counts("homo_sapiens", "RNA", joinids)[:, :30] != encoded_counts(1000, 70, 30)).nnz == 0
    ranges = lake.measurement_presence("homo_sapiens").to_pylist()
    assert [(row["dataset_id"], row["measurement"], row["n_measured_obs"]) for row in ranges] == [
        ("a", "RNA", 70),
        ("b", "RNA", 50),
    ]
    assert [check for check in validate(lake) if check.problem] == []


def test_the_old_version_is_reached_by_commit_until_a_vacuum(two_versions: str) -> None:
    before = open_lake(two_versions, 2)
    assert before.obs("homo_sapiens").num_rows == 150
    assert [check for check in validate(before) if check.problem] == []
    first, removed = vacuum(two_versions)
    assert (first, removed) == (3, 4)
    with pytest.raises(MissingError, match="commit 2 was vacuumed; the oldest that can be opened is 3"):
        open_lake(two_versions, 2)
    assert [check for check in validate(open_lake(two_versions)) if check.problem] == []
    assert vacuum(two_versions) == (3, 0)
    with pytest.raises(UsageError, match="commits 0 to 3"):
        vacuum(two_versions, 9)


@pytest.mark.parametrize("number", [-1, 4])
def test_a_commit_that_never_was_is_not_called_vacuumed(two_versions: str, number: int) -> None:
    with pytest.raises(MissingError, match=f"no commit {number}; the lake has commits 0 to 3"):
        open_lake(two_versions, number)


def test_a_content_that_comes_back_is_a_version_of_its_own(two_versions: str) -> None:
    with LakeWriter(two_versions) as writer:
        add_dataset(writer, "a", 100, {"RNA": 40, "protein": 6}, origin="a.h5ad")
    lake = open_lake(two_versions)
    assert contents(lake) == contents(open_lake(two_versions, 2))
    assert lake.obs("homo_sapiens").num_rows == census_cells(two_versions) == 150
    assert [check for check in validate(lake) if check.problem] == []


def test_a_dataset_is_removed_from_all_but_earlier_commits(two_versions: str) -> None:
    with LakeWriter(two_versions) as writer:
        writer.remove("a")
        with pytest.raises(MissingError, match="no datasets named 'a'; datasets: b"):
            writer.remove("a")
    lake = open_lake(two_versions)
    assert summary(lake)["total_cell_count"] == "50"
    assert census_cells(two_versions) == 50
    assert lake.var("homo_sapiens", "RNA")["nnz"].to_numpy().sum() == encoded_counts(0, 50, 60).nnz
    assert [check for check in validate(lake) if check.problem] == []
    assert open_lake(two_versions, 3).obs("homo_sapiens").num_rows == 120


def test_consolidation_changes_no_commit(two_versions: str) -> None:
    before = [open_lake(two_versions, number).obs("homo_sapiens").to_pandas() for number in (1, 2, 3)]
    assert consolidate(two_versions) == len(table_uris(two_versions)) + len(layer_uris(two_versions))
    assert all(len(fragments(uri)) <= 1 for uri in table_uris(two_versions))
    for number, frame in zip((1, 2, 3), before, strict=True):
        lake = open_lake(two_versions, number)
        assert lake.obs("homo_sapiens").to_pandas().equals(frame)
        assert [check for check in validate(lake) if check.problem] == []
    with LakeWriter(two_versions) as writer:
        add_dataset(writer, "c", 30, {"RNA": 10})
    assert [check for check in validate(open_lake(two_versions)) if check.problem] == []


@pytest.mark.parametrize("verb", [recover, collect, vacuum, consolidate], ids=lambda verb: verb.__name__)
def test_where_no_lake_is_upkeep_says_so_and_makes_none(tmp_path: Path, verb: Callable[[str], object]) -> None:
    with pytest.raises(MissingError, match="no lake here"):
        verb(str(tmp_path / "misspelt"))
    assert list(tmp_path.iterdir()) == []


def test_a_removal_from_no_lake_makes_none(tmp_path: Path) -> None:
    asked = CliRunner().invoke(commands.app, ["remove", "x", "--lake", str(tmp_path / "misspelt")])
    assert isinstance(asked.exception, MissingError)
    assert list(tmp_path.iterdir()) == []


def keep_sides(uri: str, *plans: int) -> None:
    """Leave what an ingestion keeps of datasets beside the tables."""
    labels = pa.table({"donor": ["somebody"]})
    for number in plans:
        for name in ("obs", "cells", "obsm_X_umap"):
            records.write_table(f"{uri}/somaflow/sides/{number:012d}-{name}.parquet", labels)
        records.replace(f"{uri}/somaflow/quality/{number:012d}.json", {"cells": 1})


def sides_of(uri: str) -> set[int]:
    """Plans of which something stands beside the tables."""
    names = [*records.names(f"{uri}/somaflow/sides"), *records.names(f"{uri}/somaflow/quality")]
    return {int(name[:12]) for name in names}


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_a_vacuum_leaves_no_label_of_removed_cells(two_versions: str, merged: bool) -> None:
    keep_sides(two_versions, 0, 1, 2)
    if merged:
        consolidate(two_versions)
    with LakeWriter(two_versions) as writer:
        add_dataset(writer, "c", 20, {"RNA": 10})
        writer.remove("a")
        add_dataset(writer, "d", 30, {"RNA": 10})
    newest = open_lake(two_versions).obs("homo_sapiens").to_pandas()
    earlier = open_lake(two_versions, 3).obs("homo_sapiens").to_pandas()
    timestamp = open_lake(two_versions, 3).commit.timestamp_ms
    vacuum(two_versions, keep_from=3)
    assert sides_of(two_versions) == {1, 2}
    assert open_lake(two_versions, 3).obs("homo_sapiens").to_pandas().equals(earlier)
    vacuum(two_versions)
    assert sides_of(two_versions) == {1}
    obs = f"{two_versions}/census_data/homo_sapiens/obs"
    assert sum(info.cell_num for info in tiledb.array_fragments(obs)) == 50 + 20 + 30
    with tiledb.open(obs, timestamp=timestamp) as array:
        assert set(array.df[:]["dataset_id"]) <= {"b"}
    assert open_lake(two_versions).obs("homo_sapiens").to_pandas().equals(newest)
    assert [check for check in validate(open_lake(two_versions)) if check.problem] == []
    with LakeWriter(two_versions) as writer:
        add_dataset(writer, "f", 10, {"RNA": 10})
        for name in ("b", "c", "d", "f"):
            writer.remove(name)
    vacuum(two_versions)
    assert fragments(obs) == []
    assert [check for check in validate(open_lake(two_versions)) if check.problem] == []
    with LakeWriter(two_versions) as writer:
        add_dataset(writer, "e", 15, {"RNA": 10})
    vacuum(two_versions)
    assert census_cells(two_versions) == 15
    assert sum(info.cell_num for info in tiledb.array_fragments(obs)) == 15


def said(*words: str) -> Result:
    """What a command of the store says on a terminal that is 80 columns wide."""
    return CliRunner().invoke(commands.app, list(words), env={"COLUMNS": "80"})


def test_history_says_what_a_commit_took_out(two_versions: str) -> None:
    with LakeWriter(two_versions) as writer:
        writer.remove("b")
    rows = json.loads(said("history", "--lake", two_versions, "--json").stdout)["commits"]
    assert [row["took_out"] for row in rows] == [
        [],
        [],
        [],
        [{"dataset_id": "a", "cells": 100, "commit": 1}],
        [{"dataset_id": "b", "cells": 50, "commit": 2}],
    ]
    assert "b of commit 2" in " ".join(said("history", "--lake", two_versions).stderr.split())


def test_names_and_paths_are_shown_as_they_are_and_whole(
    two_versions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.console, "width", 80)  # the paths are longer
    uri = str(Path(two_versions).rename(tmp_path / "of [all] that were sequenced in the year [red]2026"))
    with LakeWriter(uri) as writer:
        add_dataset(writer, "[x]", 20, {"RNA": 10})
    shown = said("info", "--lake", uri).stderr
    assert shown.startswith(f"{uri} at commit 4 (")
    assert "[x]" in shown
    assert "[x]" in said("history", "--lake", uri).stderr
    out = str(tmp_path / "[x] of some length that no terminal has room for.h5ad")
    assert said("export", out, "--where", "dataset_id == '[x]'", "--lake", uri).stderr == f"wrote 20 cells to {out}\n"
    problem = [Check("obs", uri, "differs from [all] others")]
    monkeypatch.setattr(commands, "validate_lake", lambda *given: problem)
    assert f"obs {uri}: differs from [all] others\n" in said("validate", "--lake", uri).stderr


DIES = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from store import catalog
from encoded import add_dataset
from store.writer import LakeWriter
catalog.create_commit = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
with LakeWriter({uri!r}) as writer:
    {what}
"""


def dies_before_its_commit(uri: str, what: str) -> None:
    script = textwrap.dedent(DIES.format(tests=str(ROOT / "tests"), uri=uri, what=what))
    died = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()


@pytest.mark.parametrize(
    "what",
    [
        'add_dataset(writer, "z", 40, {"RNA": 99})',
        'add_dataset(writer, "b", 40, {"RNA": 99}, version=2, origin="b.h5ad")',
        'writer.remove("b")',
    ],
)
def test_what_a_driver_did_without_its_commit_is_undone_for_census_clients_too(two_versions: str, what: str) -> None:
    before = open_lake(two_versions)
    rows = before.obs("homo_sapiens").to_pandas()
    dies_before_its_commit(two_versions, what)
    assert before.obs("homo_sapiens").to_pandas().equals(rows)
    left = recover(two_versions)
    assert left.writes > 0
    assert left.plans == (() if "remove" in what else ("z",) if '"z"' in what else ("b",))
    assert census_cells(two_versions) == 120
    assert open_lake(two_versions).obs("homo_sapiens").to_pandas().equals(rows)
    orphans = collect(two_versions)
    assert (orphans.writes, orphans.fragments > 0) == (0, "remove" not in what)
    assert collect(two_versions).fragments == 0
    assert [check for check in validate(open_lake(two_versions)) if check.problem] == []
    with LakeWriter(two_versions) as writer:
        add_dataset(writer, "next", 10, {"RNA": 5})
    assert census_cells(two_versions) == 130


def test_what_was_begun_is_given_up_when_a_later_plan_of_the_dataset_is_committed(two_versions: str) -> None:
    with LakeWriter(two_versions) as writer:
        features = {"RNA": numbered("RNA", 9)}
        for number, name in enumerate(("b", "new")):
            writer.reserve(DatasetPlan(name, "homo_sapiens", f"begun{number}", 30, features, origin="b.h5ad"))
        assert [plan.dataset_id for plan in writer.lake().pending()] == ["b", "new"]
        add_dataset(writer, "b", 40, {"RNA": 9}, origin="b.h5ad", version=7)
    assert [plan.dataset_id for plan in open_lake(two_versions).pending()] == ["new"]
    assert [plan.dataset_id for plan in open_lake(two_versions, 0).pending()] == ["new"], "also seen from before"
    keep_sides(two_versions, 1, 3, 4, 5)
    assert collect(two_versions).plans == ("new",)
    assert sides_of(two_versions) == {1, 5}


def test_a_writer_takes_away_what_a_dead_driver_said_of_its_progress(two_versions: str) -> None:
    said = f"{two_versions}/somaflow/running/somewhere-77.json"
    records.replace(said, {"pid": 77})
    with LakeWriter(two_versions):
        assert not Path(said).exists()


def test_values_stand_in_a_layer_of_their_own_with_zeros_and_negatives(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    levels = encoded_counts(0, 10, 8).astype(np.float32)
    levels.data -= 100
    levels.data[3] = 0
    plan = DatasetPlan("v", "homo_sapiens", "k", 10, {"peptide": numbered("p", 8)}, layers={"peptide": "value"})
    with LakeWriter(uri) as writer:
        reservation = writer.reserve(plan)
        writer.commit(reservation, pd.DataFrame(index=range(10)), [write_counts(reservation, "peptide", 0, levels)])
    lake = open_lake(uri)
    stored = lake.counts("homo_sapiens", "peptide", np.arange(10), "value")
    assert stored.nnz == levels.nnz
    assert np.array_equal(stored.toarray(), levels.toarray())
    assert lake.measurement_presence("homo_sapiens")["layer"].to_pylist() == ["value"]
    assert not any(lake.obs("homo_sapiens")["measured_peptide"].to_pylist())
    with pytest.raises(UsageError, match="no layer 'raw'; layers: value"):
        lake.counts("homo_sapiens", "peptide", np.arange(2))
    assert [check for check in validate(lake) if check.problem] == []


def holder_elsewhere(uri: str) -> WriterLock:
    """A lock that a driver on another machine took."""
    held = WriterLock(uri)
    mine = {"host": "elsewhere", "pid": os.getpid(), "born": "x", "since": "today"}
    records.create(records.join(held.folder, "000000000004.json"), mine)
    return held


def test_a_silent_driver_elsewhere_is_passed_and_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.5)
    uri = str(tmp_path / "lake")
    silent = holder_elsewhere(uri)
    silent.number = 4
    silent.check()
    with LakeWriter(uri), pytest.raises(ConflictError, match="another driver holds the lake now"):
        silent.check()


def test_a_beating_driver_elsewhere_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 5.0)
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    held = holder_elsewhere(str(tmp_path / "lake"))
    held.number = 4
    held._thread = threading.Thread(target=held._beat, daemon=True)
    held._thread.start()
    with pytest.raises(ConflictError, match=r"process .* on elsewhere since today"):
        LakeWriter(str(tmp_path / "lake")).__enter__()
    held.release()
    with LakeWriter(str(tmp_path / "lake")):
        pass


class Elsewhere:
    """A driver on another machine, that beats no more, and what another one does to its lake meanwhile.

    The lake has 60 cells of dataset ``a``.
    """

    def __init__(self, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with LakeWriter(uri) as writer:
            add_dataset(writer, "a", 60, {"RNA": 30})
        monkeypatch.setattr(lock, "PATIENCE_S", 1.0)
        monkeypatch.setattr(lock, "BEAT_S", 0.1)
        self.uri, self._patch = uri, monkeypatch
        self.writer = LakeWriter(uri)
        with monkeypatch.context() as there:
            there.setattr(lock.socket, "gethostname", lambda: "elsewhere")
            self.writer.__enter__()

    def cut_off(self) -> None:
        """Let no beat of it through, as when its link to the store is cut."""
        self._patch.setattr(self.writer._lock, "_show_life", lambda: None)

    def commit_while(self, module: Any, name: str, meanwhile: Callable[[], None]) -> None:
        """Commit a dataset; when it comes to a function it is cut off, and something happens before it goes on."""
        real = getattr(module, name)

        def late(*given: Any) -> Any:
            self._patch.setattr(module, name, real)
            self.cut_off()
            meanwhile()
            return real(*given)

        self._patch.setattr(module, name, late)
        with pytest.raises(ConflictError, match="another driver"):
            add_dataset(self.writer, "late", 50, {"RNA": 30}, version=1)
        self.writer._lock._stop.set()


def cells_of(uri: str) -> dict[str, int]:
    """Cells of each dataset as any SOMA client finds them."""
    path = f"{uri}/census_data/homo_sapiens/obs"
    with tiledbsoma.DataFrame.open(path) as obs:
        found = obs.read(column_names=["dataset_id"]).concat().to_pandas()
    return {str(name): int(count) for name, count in found["dataset_id"].value_counts().items()}


@pytest.mark.parametrize(
    ("module", "name"), [(catalog, "create_commit"), (tables, "write_all")], ids=["commit", "tables"]
)
@pytest.mark.parametrize("writes", [False, True], ids=["looks", "writes"])
def test_a_driver_that_was_taken_for_dead_changes_nothing_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, writes: bool
) -> None:
    uri = str(tmp_path / "lake")
    elsewhere = Elsewhere(uri, monkeypatch)

    def another() -> None:
        with LakeWriter(uri) as here:
            if writes:
                add_dataset(here, "b", 40, {"RNA": 30}, version=2)

    elsewhere.commit_while(module, name, another)
    lake, there = open_lake(uri), {"a": 60, "b": 40} if writes else {"a": 60}
    assert cells_of(uri) == there, "and no cell of the one that came late"
    assert [check for check in validate(lake) if check.problem] == []
    assert lake.counts("homo_sapiens", "RNA", np.arange(60)).nnz == lake.current[0].content["RNA"].nnz
    with LakeWriter(uri) as writer:
        assert writer.undone == 0, "it took back what it wrote by itself"
        add_dataset(writer, "late", 50, {"RNA": 30}, version=1)
    assert cells_of(uri) == there | {"late": 50}
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_what_a_late_driver_left_between_commits_is_undone_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "lake")
    elsewhere = Elsewhere(uri, monkeypatch)

    def another() -> None:
        with LakeWriter(uri) as here:
            add_dataset(here, "b", 40, {"RNA": 30}, version=2)

    monkeypatch.setattr(store.writer, "take_back", lambda uri, unwanted: 0)  # it dies before it could
    elsewhere.commit_while(tables, "write_all", another)
    assert cells_of(uri)["late"] == 50
    assert any("beside" in check.problem for check in validate(open_lake(uri)))
    monkeypatch.undo()
    with LakeWriter(uri) as writer:
        assert writer.undone > 0
    assert cells_of(uri) == {"a": 60, "b": 40}
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_beat_that_fails_does_not_end_a_drivers_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    real, failed = records.replace, list[str]()

    def flaky(uri: str, values: Any) -> None:
        if uri.endswith("beat") and len(failed) < 3:
            failed.append(uri)
            raise OSError("SlowDown: please reduce your request rate")
        real(uri, values)

    monkeypatch.setattr(records, "replace", flaky)
    held = WriterLock(str(tmp_path / "lake"))
    held.acquire()
    try:
        until = time.monotonic() + 10
        while records.read(held._record(held.number, "beat")) is None and time.monotonic() < until:
            time.sleep(0.02)
        assert len(failed) == 3
        assert records.read(held._record(held.number, "beat"))["beat"] > 3  # type: ignore[index]
        held.check()
    finally:
        held.release()


def test_counts_of_a_commit_that_is_vacuumed_while_it_is_open_are_refused(two_versions: str) -> None:
    before = open_lake(two_versions, 1)
    assert before.counts("homo_sapiens", "RNA", np.arange(100)).nnz > 0
    vacuum(two_versions)
    with pytest.raises(MissingError, match="commit 1 was vacuumed while it was being read"):
        before.counts("homo_sapiens", "RNA", np.arange(100))


def test_a_lost_commit_record_is_named(two_versions: str) -> None:
    lost = Path(two_versions) / "somaflow/commits/000000000002.json"
    lost.unlink()
    with pytest.raises(StorageError, match=r"000000000002\.json: is lost, and later commits are there"):
        open_lake(two_versions)


def test_a_name_belongs_to_one_organism(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 30, {"RNA": 20}, organism="mus_musculus")
        with pytest.raises(ConflictError, match=r"of mus_musculus; .*store remove a --organism mus_musculus"):
            add_dataset(writer, "a", 30, {"RNA": 20})
        writer.remove("a")
        add_dataset(writer, "a", 30, {"RNA": 20})
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_damage_of_obs_is_no_mistake_of_whoever_reads_it(two_versions: str) -> None:
    flipped = 0
    for path in Path(two_versions).glob("census_data/homo_sapiens/obs/__fragments/*/a*.tdb"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        flipped += 1
    assert flipped
    for where in (None, "cell_type == 'odd'"):
        with pytest.raises(VerificationError, match=r"obs: cannot be read: .*damaged"):
            open_lake(two_versions).obs("homo_sapiens", where)
    with pytest.raises(UsageError, match="where = "):
        open_lake(two_versions).obs("homo_sapiens", "cell_type ==")


def test_a_proof_goes_on_where_something_cannot_be_read(two_versions: str) -> None:
    for fragment in (Path(two_versions) / "census_data/homo_sapiens/obs/__fragments").iterdir():
        for part in fragment.glob("*.tdb"):
            part.write_bytes(b"")
    found = validate(open_lake(two_versions))
    assert any(check.name == "obs" and "cannot be read" in check.problem for check in found)
    assert any(check.name == "counts" and not check.problem for check in found)


def test_no_flipped_bit_is_read_as_if_nothing_had_happened(tmp_path: Path) -> None:
    uri = tmp_path / "lake"
    with LakeWriter(str(uri)) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30, "protein": 4})
        add_dataset(writer, "b", 40, {"RNA": 30})

    def seen() -> list[object]:
        lake = open_lake(str(uri))
        return [
            lake.obs("homo_sapiens").to_pandas().to_csv(),
            lake.var("homo_sapiens", "RNA").to_pandas().to_csv(),
            lake.counts("homo_sapiens", "RNA", np.arange(100)).toarray().tolist(),
            lake.datasets().to_pylist(),
        ]

    before = seen()
    files = sorted(path for path in uri.rglob("*.tdb") if "__fragments" in path.parts and path.stat().st_size)
    rng = np.random.default_rng(5)
    found = 0
    for number in range(60):
        path = files[int(rng.integers(len(files)))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            assert seen() == before, (number, path)
        except (AssertionError, KeyboardInterrupt):
            raise
        except Exception:  # noqa: BLE001  an error of any kind is what is wanted: the flip was noticed
            found += 1
        finally:
            path.write_bytes(good)
    assert found > 20


def test_uploads_are_aborted_however_many_lists_they_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {f"lake/{number}": f"id{number}" for number in range(5)} | {"lake-2/0": "other"}

    class Store:
        """S3 that lists two uploads at a time."""

        def call_s3(self, method: str, Bucket: str, **words: str) -> Any:
            assert Bucket == "bucket"
            if method == "abort_multipart_upload":
                del left[words["Key"]]
                return {}
            found = sorted(key for key in left if key.startswith(words["Prefix"]) and key > words.get("KeyMarker", ""))
            answer: dict[str, Any] = {"Uploads": [{"Key": key, "UploadId": left[key]} for key in found[:2]]}
            return answer | ({"IsTruncated": True, "NextKeyMarker": found[1]} if len(found) > 2 else {})

    monkeypatch.setattr("s3fs.S3FileSystem", Store)
    assert upkeep._abort_uploads("s3://bucket/lake") == 5
    assert left == {"lake-2/0": "other"}
