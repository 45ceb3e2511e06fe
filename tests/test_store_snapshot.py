"""Snapshots: the lake's cells in a shuffled, immutable, verifiable form."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import scipy.sparse
import tiledb
import tiledbsoma
from encoded import add_dataset

from store import records
from store.build import builder_lock, cut
from store.chosen import CELL_ELEMENTS
from store.cluster import Tasks, in_this_process, ray_tasks
from store.errors import ConflictError, MissingError, SettingsError, UsageError, VerificationError
from store.lake import open_lake
from store.part import Part, manifest_digest
from store.settings import load_settings, parse_settings
from store.shuffle import _borders, _narrow
from store.snapshot import (
    Snapshot,
    SnapshotSettings,
    begun_snapshots,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
    open_snapshot,
    read_card,
    refresh_snapshot,
)
from store.writer import LakeWriter


@pytest.fixture(scope="module")
def lake_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 150, {"RNA": 40, "protein": 6})
        add_dataset(writer, "second", 90, {"RNA": 60})
        add_dataset(writer, "mouse", 70, {"RNA": 30}, organism="mus_musculus")
    return uri


@pytest.fixture(scope="module")
def all_cells(lake_uri: str) -> Snapshot:
    return create_snapshot(lake_uri, "all", SnapshotSettings(seed=5, split_by="donor_id"))


def matrix(snapshot: Snapshot, measurement: str) -> scipy.sparse.csr_matrix:
    block = snapshot.block(measurement, 0, snapshot.n_rows)
    shape = (snapshot.n_rows, snapshot.vocabulary(measurement).num_rows)
    return scipy.sparse.csr_matrix((block.counts, block.features, block.indptr), shape=shape)


def test_every_row_holds_its_cells_counts(lake_uri: str, all_cells: Snapshot) -> None:
    lake = open_lake(lake_uri)
    cells, vocabulary = all_cells.cells().to_pandas(), all_cells.vocabulary("RNA").to_pandas()
    counts = matrix(all_cells, "RNA")
    for organism in lake.organisms:
        rows, columns = (
            np.flatnonzero(cells["organism"] == organism),
            np.flatnonzero(vocabulary["organism"] == organism),
        )
        var = lake.var(organism, "RNA").to_pandas().set_index("feature_id")["soma_joinid"]
        expected = lake.counts(organism, "RNA", cells["soma_joinid"].to_numpy()[rows])
        assert (counts[rows][:, columns] != expected[:, var[vocabulary["feature_id"][columns]]]).nnz == 0
        assert counts[rows].nnz == expected.nnz
    assert sorted(zip(cells["organism"], cells["soma_joinid"], strict=True)) == [
        *(("homo_sapiens", joinid) for joinid in range(240)),
        *(("mus_musculus", joinid) for joinid in range(70)),
    ]


def test_an_absent_modality_is_an_empty_row_marked_unmeasured(all_cells: Snapshot) -> None:
    cells = all_cells.cells(["dataset_id", "measured_protein"]).to_pandas()
    nnz = np.diff(all_cells.block("protein", 0, all_cells.n_cells).indptr)
    assert (cells["measured_protein"] == (cells["dataset_id"] == "first")).all()
    assert (nnz[~cells["measured_protein"]] == 0).all()
    assert (nnz[cells["measured_protein"]] > 0).all()


def test_presence_tells_not_measured_from_zero(all_cells: Snapshot) -> None:
    datasets, measured = all_cells.presence("RNA")
    assert dict(zip(datasets, measured.sum(axis=1).tolist(), strict=True)) == {"first": 40, "second": 60, "mouse": 30}


def test_the_order_is_shuffled_and_the_same_from_the_same_seed(lake_uri: str, all_cells: Snapshot) -> None:
    again = create_snapshot(lake_uri, "again", SnapshotSettings(seed=5, split_by="donor_id"))
    other = create_snapshot(lake_uri, "other", SnapshotSettings(seed=6, split_by="donor_id"))
    rows = [s.cells(["soma_joinid"])["soma_joinid"].to_pylist() for s in (all_cells, again, other)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert again.manifest["measurements"] == all_cells.manifest["measurements"]
    assert abs(np.corrcoef(rows[0], np.arange(len(rows[0])))[0, 1]) < 0.2


def test_groups_stay_whole_in_one_split(all_cells: Snapshot) -> None:
    cells = all_cells.cells(["donor_id", "split"]).to_pandas()
    assert (cells.groupby("donor_id")["split"].nunique() == 1).all()
    assert (
        all_cells.manifest["splits"] == cells["split"].value_counts().reindex(["train", "test"], fill_value=0).to_dict()
    )


def test_a_toml_assigns_groups_to_splits_and_no_group_may_leak(lake_uri: str, tmp_path: Path) -> None:
    path = tmp_path / "splits.toml"
    path.write_text("""
        split_by = "donor_id"
        fractions = { train = 0.8, validation = 0.2, test = 0.0 }
        apart = ["dataset_id"]
        where = "tissue == 'blood'"
        organisms = ["mus_musculus"]
        [assign.test]
        donor_id = ["donor1", "donor3"]
        """)
    with pytest.raises(UsageError, match="1 of 1 values of dataset_id are in several splits, such as 'mouse' in train"):
        create_snapshot(lake_uri, "leak", load_settings(SnapshotSettings, path))
    assert "leak" not in list_snapshots(lake_uri)
    settings = load_settings(SnapshotSettings, path, ["apart=[]"])
    cells = create_snapshot(lake_uri, "assigned", settings).cells(["donor_id", "split"]).to_pandas()
    assert set(cells["donor_id"][cells["split"] == "test"]) == {"donor1", "donor3"}
    assert set(cells["split"][cells["donor_id"].isin(["donor1", "donor3"])]) == {"test"}
    assert cells["split"].tolist() == sorted(cells["split"], key=list(settings.fractions).index)
    typo = settings.model_copy(update={"assign": {"test": {"donor_id": ("doner1",)}}})
    with pytest.raises(UsageError, match="no chosen cell has 'doner1'; did you mean 'donor1'"):
        create_snapshot(lake_uri, "typo", typo)
    twice = settings.model_copy(update={"assign": {"test": {"donor_id": ("donor1",)}, "train": {"sex": ("unknown",)}}})
    with pytest.raises(UsageError, match=r"assign.train.sex = 'unknown': \d+ of its cells are also assigned to 'test'"):
        create_snapshot(lake_uri, "twice", twice)
    crossed = settings.model_copy(update={"assign": {"test": {"cell_type": ("odd",)}}})
    with pytest.raises(UsageError, match="of 5 values of donor_id are in several splits"):
        create_snapshot(lake_uri, "crossed", crossed)
    with pytest.raises(SettingsError, match="fractions names no such split"):
        parse_settings(SnapshotSettings, {"assign": {"exam": {}}}, where="t")
    with pytest.raises(SettingsError, match="'colour' is none of the obs columns"):
        parse_settings(SnapshotSettings, {"apart": ["colour"]}, where="t")
    delete_snapshot(lake_uri, "assigned")


def test_a_filter_and_a_choice_of_measurements_narrow_the_snapshot(lake_uri: str) -> None:
    snapshot = create_snapshot(
        lake_uri,
        "odd",
        SnapshotSettings(where="cell_type == 'odd'", organisms=("homo_sapiens",), measurements=("RNA",)),
    )
    assert snapshot.n_cells == 120
    assert snapshot.measurements == ("RNA",)
    assert set(snapshot.cells(["cell_type"])["cell_type"].to_pylist()) == {"odd"}


def test_the_arrays_open_in_plain_tiledbsoma(all_cells: Snapshot) -> None:
    with tiledbsoma.open(all_cells.uri) as root:
        indptr = root["RNA"]["indptr"].read().to_numpy()
        features = root["RNA"]["features"].read().to_numpy()
        assert root["cells"].count == all_cells.n_cells
    block = all_cells.block("RNA", 0, all_cells.n_cells)
    assert indptr.tolist() == block.indptr.tolist()
    assert features.tolist() == block.features.tolist()


def test_threads_and_pickled_copies_read_the_same(all_cells: Snapshot) -> None:
    copy = pickle.loads(pickle.dumps(all_cells))
    spans = [(start, min(start + 40, all_cells.n_cells)) for start in range(0, all_cells.n_cells, 40)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda span: copy.block("RNA", *span).counts, spans))
    assert np.array_equal(np.concatenate(parts), all_cells.block("RNA", 0, all_cells.n_cells).counts)


def test_a_snapshot_stays_when_the_lake_grows(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 30, {"RNA": 10})
        made = create_snapshot(uri, "s", SnapshotSettings())
        add_dataset(writer, "b", 30, {"RNA": 10})
    assert open_snapshot(uri, "s").n_cells == 30
    assert open_snapshot(uri, "s").commit_id == made.commit_id == open_lake(uri, 1).commit.id


class Stopped(BaseException):
    """A driver that dies."""


def stopping_after(n_tasks: int, done: list[Any]) -> Tasks:
    """Run tasks here, note each, and die when so many were run."""

    def tasks(function: Any, common: Any, items: Any) -> Iterator[None]:
        for item in items:
            if len(done) == n_tasks:
                raise Stopped
            function(common, item)
            done.append((function.__name__, item))
            yield

    return tasks


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a few cells each, so that a small lake takes many."""
    monkeypatch.setattr("store.build.ELEMENTS", 2500)


@pytest.mark.usefixtures("small_tasks")
def test_a_build_killed_after_any_task_goes_on_and_makes_the_same(lake_uri: str) -> None:
    done: list[Any] = []
    whole = create_snapshot(lake_uri, "whole", SnapshotSettings(seed=2), tasks=stopping_after(-1, done))
    whole.verify()
    assert len([name for name, _ in done if name == "scatter"]) > 4
    assert len([name for name, _ in done if name == "gather"]) > 4
    for n_tasks in range(0, len(done), 3):
        before: list[Any] = []
        with pytest.raises(Stopped):
            create_snapshot(lake_uri, "stopped", SnapshotSettings(seed=2), tasks=stopping_after(n_tasks, before))
        assert "stopped" in begun_snapshots(lake_uri)
        assert "stopped" not in list_snapshots(lake_uri)
        with pytest.raises(MissingError, match="no snapshot 'stopped'"):
            open_snapshot(lake_uri, "stopped")
        with pytest.raises(UsageError, match="begun with other settings"):
            create_snapshot(lake_uri, "stopped", SnapshotSettings(seed=3))
        after: list[Any] = []
        made = create_snapshot(lake_uri, "stopped", SnapshotSettings(seed=2), tasks=stopping_after(-1, after))
        assert len(before) == n_tasks
        assert len(before) + len(after) == len(done)
        made.verify()
        assert made.parts[0].entry["checksums"] == whole.parts[0].entry["checksums"]
        assert begun_snapshots(lake_uri) == []
        delete_snapshot(lake_uri, "stopped")
        assert not Path(lake_uri, "snapshots", "stopped").exists()
    delete_snapshot(lake_uri, "whole")


@pytest.mark.usefixtures("small_tasks")
def test_a_half_made_snapshot_is_not_deleted_under_a_living_builder(lake_uri: str) -> None:
    with pytest.raises(Stopped):
        create_snapshot(lake_uri, "busy", SnapshotSettings(seed=2), tasks=stopping_after(2, []))
    lock = builder_lock(lake_uri, "busy")
    lock.acquire()
    try:
        with pytest.raises(ConflictError, match="snapshot 'busy' is being written by process"):
            delete_snapshot(lake_uri, "busy")
        assert "busy" in begun_snapshots(lake_uri)
    finally:
        lock.release()
    delete_snapshot(lake_uri, "busy")
    assert "busy" not in begun_snapshots(lake_uri)


@pytest.mark.usefixtures("small_tasks")
def test_a_task_killed_while_it_writes_leaves_nothing_twice(lake_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = create_snapshot(lake_uri, "whole", SnapshotSettings(seed=2))
    with monkeypatch.context() as patched:
        patched.setattr("store.shuffle._write_labels", lambda *args: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            create_snapshot(lake_uri, "torn", SnapshotSettings(seed=2))
    with LakeWriter(lake_uri) as writer:  # the build goes on with the commit with which it began
        add_dataset(writer, "later", 20, {"RNA": 40})
    torn = create_snapshot(lake_uri, "torn", SnapshotSettings(seed=2))
    torn.verify()
    assert torn.commit_id == whole.commit_id
    assert torn.parts[0].entry["checksums"] == whole.parts[0].entry["checksums"]
    n_buckets = -(-torn.n_rows // torn.parts[0].entry["bucket_rows"])
    assert len(list(Path(torn.uri, "RNA/counts/__fragments").iterdir())) == n_buckets
    with LakeWriter(lake_uri) as writer:
        writer.remove("later", "homo_sapiens")
    delete_snapshot(lake_uri, "torn")
    delete_snapshot(lake_uri, "whole")


@pytest.mark.usefixtures("ray_cluster")
def test_ray_tasks_of_any_size_make_the_same_rows(lake_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = create_snapshot(lake_uri, "alone", SnapshotSettings(seed=8, split_by="donor_id"))
    monkeypatch.setattr("store.build.ELEMENTS", 4500)
    spread = create_snapshot(lake_uri, "spread", SnapshotSettings(seed=8, split_by="donor_id"), tasks=ray_tasks)
    here = create_snapshot(lake_uri, "here", SnapshotSettings(seed=8, split_by="donor_id"))
    spread.verify()
    assert spread.parts[0].entry["checksums"] == here.parts[0].entry["checksums"]
    assert spread.cells().to_pandas().equals(alone.cells().to_pandas())
    for name in alone.measurements:
        assert (matrix(spread, name) != matrix(alone, name)).nnz == 0
        assert spread.vocabulary(name).equals(alone.vocabulary(name))
    for name in ("alone", "spread", "here"):
        delete_snapshot(lake_uri, name)


@pytest.mark.usefixtures("small_tasks")
def test_a_damaged_spill_file_is_an_error_that_names_it(lake_uri: str, tmp_path: Path) -> None:
    done: list[Any] = []
    with pytest.raises(Stopped):
        create_snapshot(
            lake_uri, "spilt", SnapshotSettings(), tasks=stopping_after(8, done), spill=str(tmp_path / "spill")
        )
    for file in (tmp_path / "spill").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
    with pytest.raises(VerificationError, match=r"spill/0000.* are not what was written"):
        create_snapshot(lake_uri, "spilt", SnapshotSettings())
    delete_snapshot(lake_uri, "spilt")
    assert begun_snapshots(lake_uri) == []
    assert not (tmp_path / "spill").exists()


def test_a_build_leaves_what_is_not_its_own_in_the_folder_of_its_spill_files(lake_uri: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")
    (tmp_path / "00000000-other.arrows").write_text("another build's")
    create_snapshot(lake_uri, "spilling", SnapshotSettings(), spill=str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000000-other.arrows", "mine", "thesis.tex"]
    with pytest.raises(Stopped):
        create_snapshot(lake_uri, "left", SnapshotSettings(), tasks=stopping_after(1, []), spill=str(tmp_path))
    assert len(list(tmp_path.iterdir())) > 2
    delete_snapshot(lake_uri, "left")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00000000-other.arrows", "mine", "thesis.tex"]
    delete_snapshot(lake_uri, "spilling")


def test_a_subset_of_features_and_another_snapshots_vocabulary(lake_uri: str, all_cells: Snapshot) -> None:
    wanted = ("RNA0007", "RNA0003", "RNA0050")
    few = create_snapshot(lake_uri, "few", SnapshotSettings(features={"RNA": wanted}, measurements=("RNA",)))
    ids = few.vocabulary("RNA").to_pylist()
    assert {row["feature_id"] for row in ids} == set(wanted)
    cells = few.cells().to_pandas()
    lake = open_lake(lake_uri)
    for organism in lake.organisms:
        rows = np.flatnonzero(cells["organism"] == organism)
        columns = [number for number, row in enumerate(ids) if row["organism"] == organism]
        var = lake.var(organism, "RNA").to_pandas().set_index("feature_id")["soma_joinid"]
        expected = lake.counts(organism, "RNA", cells["soma_joinid"].to_numpy()[rows])
        expected = expected[:, var[[ids[column]["feature_id"] for column in columns]]]
        assert (matrix(few, "RNA")[rows][:, columns] != expected).nnz == 0
    with pytest.raises(UsageError, match="1 of 1 are in no chosen organism, such as 'TP53'"):
        create_snapshot(lake_uri, "none", SnapshotSettings(features={"RNA": ("TP53",)}))
    mouse = SnapshotSettings(organisms=("mus_musculus",), like="all")
    alike = create_snapshot(lake_uri, "alike", mouse)
    assert alike.vocabulary("RNA").equals(all_cells.vocabulary("RNA"))
    assert alike.n_cells == 70
    for name in ("few", "alike"):
        delete_snapshot(lake_uri, name)


@pytest.mark.parametrize("scanned_rows", [2**20, 25])
def test_a_refreshed_snapshot_reads_new_cells_only_and_leaves_out_those_that_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned_rows: int
) -> None:
    monkeypatch.setattr("store.snapshot.SCANNED_ROWS", scanned_rows)
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 120, {"RNA": 30}, origin="a.h5ad")
        add_dataset(writer, "b", 90, {"RNA": 40})
        old = create_snapshot(uri, "s", SnapshotSettings(seed=3, where="is_primary_data == True"))
        with pytest.raises(UsageError, match="nothing to refresh"):
            refresh_snapshot(uri, "s", "s2")
        add_dataset(writer, "a", 130, {"RNA": 30}, version=1, origin="a.h5ad")
        add_dataset(writer, "c", 100, {"RNA": 60, "protein": 5})
    done: list[Any] = []
    new = refresh_snapshot(uri, "s", "s2", tasks=stopping_after(-1, done))
    new.verify()
    assert sum(len(item.joinids_C) for name, item in done if name == "scatter") == 117 + 90
    assert [part.name for part in new.parts] == ["s", "s2"]
    lake = open_lake(uri)
    cells = new.cells().to_pandas()
    live = cells[cells["split"] != ""]
    assert len(new.dead) == 108
    assert len(live) == new.n_cells == sum(new.splits.values()) == 117 + 81 + 90
    obs = lake.obs("homo_sapiens", "is_primary_data == True", ["soma_joinid"])
    assert sorted(live["soma_joinid"]) == obs["soma_joinid"].to_pylist()
    counts, ids = matrix(new, "RNA"), new.vocabulary("RNA")["feature_id"].to_pylist()
    known = old.vocabulary("RNA")["feature_id"].to_pylist()
    assert ids[: len(known)] == known
    var = lake.var("homo_sapiens", "RNA").to_pandas().set_index("feature_id")["soma_joinid"]
    expected = lake.counts("homo_sapiens", "RNA", live["soma_joinid"].to_numpy())[:, var[ids]]
    assert (counts[live["row"].to_numpy()] != expected).nnz == 0
    again = create_snapshot(uri, "anew", SnapshotSettings(seed=3, where="is_primary_data == True"))
    assert again.splits == new.splits
    split = dict(zip(live["soma_joinid"], live["split"], strict=True))
    assert all(split[line["soma_joinid"]] == line["split"] for line in again.cells().to_pylist())
    alive = {
        name: {value: of for value, of in by.items() if any(of.values())} for name, by in new.label_values().items()
    }
    assert alive == again.label_values()
    with pytest.raises(UsageError, match="'s2' was refreshed from it and needs it"):
        delete_snapshot(uri, "s")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "d", 55, {"RNA": 20})
    third = refresh_snapshot(uri, "s2", "s3")
    assert third.n_cells == new.n_cells + 50
    assert [part.n_rows for part in third.parts] == [189, 207, 50]
    everything, spans = third.cells(), [(400, 440), (100, 300), (7, 7)]
    rows = [row for first, stop in spans for row in range(first, stop)]
    assert third.cells(spans=spans).to_pandas().equals(everything.take(rows).to_pandas())
    assert third.cells(["split"], [(189, 189)]).to_pylist() == []
    with pytest.raises(UsageError, match="rows 400 to 447 are outside 0 to 446"):
        third.cells(spans=[(400, 447)])
    with pytest.raises(UsageError, match="no column 'tisue'; columns: row, soma_joinid"):
        third.cells(["tisue"])
    for name in ("s3", "s2", "s"):
        delete_snapshot(uri, name)
    assert list_snapshots(uri) == ["anew"]


def test_the_card_tells_query_splits_and_datasets(all_cells: Snapshot) -> None:
    card = read_card(all_cells.lake_uri, "all")
    assert card.startswith("---\nlibrary_name: somaflow\n")
    for text in ("310 cells of 3 datasets", "`split_by`: `donor_id`", "| mouse | 70 |", "| homo_sapiens | 240 |"):
        assert text in card


def test_two_drivers_do_not_build_one_snapshot(lake_uri: str) -> None:
    done: list[Any] = []

    def meanwhile(function: Any, common: Any, items: Any) -> Iterator[None]:
        with pytest.raises(ConflictError, match="snapshot 'shared' is being written by process"):
            create_snapshot(lake_uri, "shared", SnapshotSettings())
        done.append(function)
        yield from in_this_process(function, common, items)

    create_snapshot(lake_uri, "shared", SnapshotSettings(), tasks=meanwhile)
    assert len(done) == 2
    delete_snapshot(lake_uri, "shared")


def test_two_arrays_that_are_read_side_by_side_say_the_same(all_cells: Snapshot) -> None:
    (part,), whole = all_cells.parts, all_cells.block("RNA", 0, all_cells.n_cells)
    features, counts = np.zeros_like(whole.features), np.zeros_like(whole.counts)
    with ThreadPoolExecutor(1) as beside:
        part.read_into("RNA", 0, features, counts, beside=beside)
    assert np.array_equal(features, whole.features)
    assert np.array_equal(counts, whole.counts)


@pytest.mark.parametrize("cut", [False, True], ids=["a bit", "cut off"])
@pytest.mark.parametrize("member", ["features", "counts"])
def test_damage_is_an_error_that_names_the_array_never_a_wrong_batch(lake_uri: str, member: str, cut: bool) -> None:
    snapshot = create_snapshot(lake_uri, "damaged", SnapshotSettings())
    data = next(Path(snapshot.uri, f"RNA/{member}/__fragments").glob("*/a0.tdb"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content[: len(content) // 2] if cut else content)
    with pytest.raises(VerificationError, match=f"RNA/{member}: .*damaged"):
        open_snapshot(lake_uri, "damaged").block("RNA", 0, snapshot.n_cells)
    (part,), whole = snapshot.parts, snapshot.manifest["measurements"]["RNA"]["nnz"]
    room = [np.zeros(whole, part.dtype("RNA", name)) for name in ("features", "counts")]
    with ThreadPoolExecutor(1) as beside, pytest.raises(VerificationError, match=f"RNA/{member}"):
        part.read_into("RNA", 0, *room, beside=beside)
    delete_snapshot(lake_uri, "damaged")


@pytest.fixture(scope="module")
def lost(lake_uri: str) -> Snapshot:
    """A snapshot of sets whose files each test takes away and puts back; one task wrote it."""
    return create_snapshot(lake_uri, "lost", SnapshotSettings(set_size=8, set_by=("dataset_id",)))


@pytest.fixture(scope="module")
def lost_of_many(lake_uri: str) -> Snapshot:
    """Another one, written by many tasks, so that the lists of its files are merged."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("store.build.ELEMENTS", 2500)
        return create_snapshot(lake_uri, "lost-of-many", SnapshotSettings(set_size=8, set_by=("dataset_id",)))


@pytest.mark.parametrize("member", ["RNA/indptr", "RNA/features", "RNA/counts", "codes", "numbers", "sets", "cells"])
@pytest.mark.parametrize("which", ["lost", "lost_of_many"])
def test_files_that_are_lost_are_an_error_that_names_the_array_never_a_wrong_batch(
    request: pytest.FixtureRequest, which: str, member: str
) -> None:
    snapshot: Snapshot = request.getfixturevalue(which)
    commits = sorted(Path(snapshot.uri, member, "__commits").iterdir())
    for gone in (commits[:1], commits[-1:], commits):
        contents = [path.read_bytes() for path in gone]
        for path in gone:
            path.unlink()
        (part,) = open_snapshot(snapshot.lake_uri, snapshot.name).parts
        with pytest.raises(VerificationError, match=f"{snapshot.name}/{member}: .* delete the snapshot and make it"):
            something_of(part, member)
        for path, content in zip(gone, contents, strict=True):
            path.write_bytes(content)


def test_arrays_that_lost_files_are_not_taken_when_they_are_opened_anew(
    lost: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = open_snapshot(lost.lake_uri, lost.name).parts
    part.block("RNA", 0, 9)
    monkeypatch.setattr("store.part.QUERIES", 0)
    commits = {path: path.read_bytes() for path in Path(lost.uri, "RNA/counts/__commits").iterdir()}
    for path in commits:
        path.unlink()
    with pytest.raises(VerificationError, match=r"RNA/counts: of its elements .* there are none"):
        part.block("RNA", 0, 9)
    for path, content in commits.items():
        path.write_bytes(content)


def test_a_vocabulary_in_another_order_does_not_pass_verification(lake_uri: str) -> None:
    for name, damage in (("turned", turn), ("renamed", rename), ("short", cut_short)):
        snapshot = create_snapshot(lake_uri, name, SnapshotSettings(seed=1))
        snapshot.verify()
        uri = f"{snapshot.uri}/RNA/var"
        with tiledbsoma.DataFrame.open(uri) as frame:
            var = frame.read().concat().sort_by("soma_joinid")
        damage(uri, var)
        with pytest.raises(VerificationError, match=f"{name}/RNA/var: its features are not those"):
            open_snapshot(lake_uri, name).verify()
        delete_snapshot(lake_uri, name)


def turn(uri: str, var: pa.Table) -> None:
    with tiledbsoma.DataFrame.open(uri, "w") as frame:
        frame.write(var.set_column(1, "feature_id", pa.array(var["feature_id"].to_pylist()[::-1], pa.large_string())))


def rename(uri: str, var: pa.Table) -> None:
    ids = ["ENSG00000000000", *var["feature_id"].to_pylist()[1:]]
    with tiledbsoma.DataFrame.open(uri, "w") as frame:
        frame.write(var.set_column(1, "feature_id", pa.array(ids, pa.large_string())))


def cut_short(uri: str, var: pa.Table) -> None:
    for commit in Path(uri, "__commits").iterdir():
        commit.unlink()
    with tiledbsoma.DataFrame.open(uri, "w") as frame:
        frame.write(var.slice(0, len(var) - 1))


@pytest.mark.parametrize(("moved", "why"), [(-20, "do not follow each other"), (1, "begin elsewhere")])
def test_sets_that_begin_elsewhere_do_not_pass_verification(lake_uri: str, moved: int, why: str) -> None:
    snapshot = create_snapshot(lake_uri, "torn-sets", SnapshotSettings(set_size=8, set_by=("dataset_id",)))
    snapshot.verify()
    start = int(snapshot.parts[0].set_starts[3])
    with tiledb.open(f"{snapshot.uri}/sets", "w") as array:
        array[3:4] = np.array([start + moved], np.int64)
    with pytest.raises(VerificationError, match=f"torn-sets/sets: .* {why}"):
        open_snapshot(lake_uri, "torn-sets").verify()
    delete_snapshot(lake_uri, "torn-sets")


def test_tables_that_lost_their_files_are_an_error_that_names_them_never_fewer_cells(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30}, origin="a.h5ad")
        create_snapshot(uri, "s", SnapshotSettings(seed=3, where="is_primary_data == True"))
        add_dataset(writer, "a", 70, {"RNA": 30}, version=1, origin="a.h5ad")
    refresh_snapshot(uri, "s", "s2").verify()
    reads: dict[str, Callable[[Snapshot], Any]] = {
        "labels": Snapshot.label_values,
        "dead": lambda snapshot: snapshot.dead,
        "RNA/presence": lambda snapshot: snapshot.presence("RNA"),
    }
    for member, read in reads.items():
        read(open_snapshot(uri, "s2"))
        commits = {path: path.read_bytes() for path in Path(uri, "snapshots/s2", member, "__commits").iterdir()}
        for path in commits:
            path.unlink()
        for again in (read, Snapshot.verify):
            with pytest.raises(VerificationError, match=f"s2/{member}: is not what was written: files of it are lost"):
                again(open_snapshot(uri, "s2"))
        for path, content in commits.items():
            path.write_bytes(content)
    open_snapshot(uri, "s2").verify()


def test_a_snapshot_made_before_its_tables_had_digests_is_read(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30})
        made = create_snapshot(uri, "s", SnapshotSettings(set_size=8, set_by=("dataset_id",)))
    manifest = {key: value for key, value in made.manifest.items() if key != "tables"}
    manifest["id"] = manifest_digest(manifest)
    Path(made.uri, "snapshot.json").write_text(json.dumps(manifest))
    old = open_snapshot(uri, "s")
    old.verify()
    assert old.label_values() == made.label_values()


@pytest.mark.parametrize("of_part", [False, True])
def test_a_manifest_that_says_something_else_than_was_written_is_not_opened(tmp_path: Path, of_part: bool) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 60, {"RNA": 30})
        made = create_snapshot(uri, "s", SnapshotSettings(seed=3))
    manifest = made.manifest
    manifest["parts"][0]["split_rows"]["train"][1] += 3  # cells of the test split would be trained on
    if of_part:
        manifest["id"] = manifest_digest(manifest)
    Path(made.uri, "snapshot.json").write_text(json.dumps(manifest))
    for read in (lambda: open_snapshot(uri, "s"), made.verify):
        with pytest.raises(VerificationError, match=r"s/snapshot.json: is not what was written: .* make it again"):
            read()


@pytest.mark.parametrize(
    "place_and_value", [(0, 1), (0, -1), (5, -(2**63)), (310, 1), (310, 2**40)], ids=lambda pair: f"{pair[1]}@{pair[0]}"
)
def test_rows_that_cannot_lie_there_are_damage(lost: Snapshot, place_and_value: tuple[int, int]) -> None:
    place, value = place_and_value
    (part,) = open_snapshot(lost.lake_uri, lost.name).parts
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(part, "_read", written(part.indptr("RNA", 0, 310), place, value))
        with pytest.raises(VerificationError, match=r"RNA/indptr: elements .* delete the snapshot and make it again"):
            part.indptr("RNA", 0, 310)
        with pytest.raises(VerificationError, match=r"codes: .*a code is below 0"):
            part.codes(["tissue"], 0, 9)


def test_rows_whose_ends_fall_by_more_than_64_bits_hold_are_damage(
    lost: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = open_snapshot(lost.lake_uri, lost.name).parts
    far = part.indptr("RNA", 0, 310)
    far[5:7] = 2**63 - 1, -5
    monkeypatch.setattr(part, "_read", written(far, 5, far[5]))
    with pytest.raises(VerificationError, match="rows end before they begin"):
        part.indptr("RNA", 0, 310)


def something_of(part: Part, member: str) -> object:
    """Read some of an array."""
    if member == "sets":
        return part.set_starts
    if member == "cells":
        return part.cells(0, part.n_rows, ["split"])
    if member == "codes":
        return part.codes(["tissue"], 3, 9)
    return part.numbers(3, 9) if member == "numbers" else part.block("RNA", 3, 9)


def written(indptr: np.ndarray, place: int, value: int) -> Any:
    """Return what reads an array in which one value was changed, and codes that are fill values."""

    def read(member: tuple[str, ...], ranges: list[tuple[int, int]], out: np.ndarray, lines: object = ()) -> None:
        out[:] = np.iinfo(np.int32).min
        if member == ("RNA", "indptr"):
            out[:] = np.where(np.arange(len(indptr)) == place, value, indptr)

    return read


def test_bad_requests_say_what_would_be_right(lake_uri: str, all_cells: Snapshot) -> None:
    with pytest.raises(UsageError, match="snapshots never change"):
        create_snapshot(lake_uri, "all", SnapshotSettings())
    with pytest.raises(UsageError, match="no cell fits"):
        create_snapshot(lake_uri, "none", SnapshotSettings(where="cell_type == 'neither'"))
    with pytest.raises(UsageError, match="measurements here: RNA, protein"):
        create_snapshot(lake_uri, "none", SnapshotSettings(measurements=("ATAC",)))
    with pytest.raises(UsageError, match="letters, digits"):
        open_snapshot(lake_uri, "../lake")
    with pytest.raises(UsageError, match="outside 0 to 310"):
        all_cells.block("RNA", 300, 311)
    with pytest.raises(SettingsError, match="did you mean 'split_by'"):
        parse_settings(SnapshotSettings, {"splitby": "x"}, where="t")
    with pytest.raises(SettingsError, match="sum to 1"):
        parse_settings(SnapshotSettings, {"fractions": {"train": 0.5}}, where="t")
    for odd in ("nan", "inf"):
        with pytest.raises(SettingsError, match=r"t: fractions.train: Input should be a finite number"):
            parse_settings(SnapshotSettings, {"fractions": {"train": float(odd), "test": 0.5}}, where="t")


def test_records_are_created_once_and_whole(tmp_path: Path) -> None:
    uri = str(tmp_path / "r" / "1.json")
    assert records.create(uri, {"a": 1})
    assert not records.create(uri, {"a": 2})
    assert records.read(uri) == {"a": 1}
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["1.json"]


@pytest.mark.parametrize("values", [[1, 65535], [1, 65536], [0.5, 2], [-1, 3], [np.nan, 1], []])
def test_counts_are_spilled_in_16_bits_only_where_that_is_exact(values: list[float]) -> None:
    counts = np.array(values, np.float32)
    narrow = _narrow(counts)
    np.testing.assert_array_equal(narrow, counts)
    assert (narrow.dtype == np.uint16) == (values == [1, 65535])


@pytest.mark.parametrize("step", [1, 100, 512, 700, 1500])
def test_reads_cover_all_cells_once_and_begin_with_tiles_where_they_can(step: int) -> None:
    joinids = np.flatnonzero(np.random.default_rng(0).random(5000) < 0.7)
    borders = _borders(joinids, step, 512)
    assert borders[0] == 0
    assert borders[-1] == len(joinids)
    assert all(0 < size <= step for size in np.diff(borders))
    if step > 512:  # a tile begins within every step
        assert all(joinids[border - 1] // 512 < joinids[border] // 512 for border in borders[1:-1])
    assert _borders(joinids[:0], step, 512) == [0]


def test_arrays_that_are_read_for_long_are_opened_anew_meanwhile_and_keep_no_memory(
    all_cells: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = all_cells.block("RNA", 0, all_cells.n_rows)
    monkeypatch.setattr("store.part.QUERIES", 400)
    (part,) = open_snapshot(all_cells.lake_uri, all_cells.name).parts

    def read(number: int) -> bool:
        start = number % (part.n_rows - 3)
        indptr, features, _ = part.block("RNA", start, start + 3)
        first, last = whole.indptr[start], whole.indptr[start + 3]
        return bool(indptr[-1] == last - first) and np.array_equal(features, whole.features[first:last])

    process, opened = psutil.Process(), part._opened
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(600)))
        before = process.memory_info().rss
        assert all(pool.map(read, range(3000)))
    assert part._opened is not opened
    assert process.memory_info().rss - before < 40 * 2**20  # TileDB keeps 12 KB for each of these 9,000 queries


def test_tasks_stay_small_however_many_cells_there_are_and_count_their_labels() -> None:
    size_C = np.full(30_000_000, CELL_ELEMENTS + 8, np.float32)
    borders = cut(size_C, np.zeros(len(size_C), np.int32), 2**24)
    assert borders[0] == 0
    assert borders[-1] == len(size_C)
    assert max(np.diff(borders)) <= 2**24 // (CELL_ELEMENTS + 8) + 1
    assert cut(size_C[:9], np.array([0, 0, 0, 0, 1, 1, 1, 1, 1], np.int32), 80) == [0, 1, 3, 4, 5, 7, 9]
    assert cut(size_C[:0], np.zeros(0, np.int32), 80) == [0]


@pytest.mark.usefixtures("small_tasks")
def test_cells_without_values_fill_a_task_with_their_labels(tmp_path: Path) -> None:
    uri, done = str(tmp_path / "lake"), []
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 400, {"RNA": 1})
    create_snapshot(uri, "s", SnapshotSettings(), tasks=stopping_after(-1, done)).verify()
    sizes = [len(item.joinids_C) for name, item in done if name == "scatter"]
    assert len(sizes) == 6
    assert max(sizes) <= 2500 / CELL_ELEMENTS


def test_a_part_whose_arrays_cannot_be_opened_anew_goes_on_with_those_that_are_open(
    all_cells: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = open_snapshot(all_cells.lake_uri, all_cells.name).parts
    before, opened = part.block("RNA", 0, 9), part._opened
    monkeypatch.setattr("store.part.QUERIES", 0)
    with monkeypatch.context() as patched:
        patched.setattr(type(opened), "anew", failing)
        assert all(np.array_equal(*pair) for pair in zip(part.block("RNA", 0, 9), before, strict=True))
    assert part._opened is opened
    part.block("RNA", 0, 9)
    assert part._opened is not opened


def failing(_: object) -> None:
    raise tiledb.TileDBError("the store does not answer")
