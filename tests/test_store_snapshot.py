"""Snapshots: the lake's cells in a shuffled, immutable, verifiable form."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import tiledbsoma
from encoded import add_dataset

from store import records
from store.errors import MissingError, SettingsError, UsageError, VerificationError
from store.lake import open_lake
from store.settings import load_settings, parse_settings
from store.snapshot import (
    Snapshot,
    SnapshotSettings,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
    open_snapshot,
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
    block = snapshot.block(measurement, 0, snapshot.n_cells)
    shape = (snapshot.n_cells, snapshot.vocabulary(measurement).num_rows)
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
    with pytest.raises(UsageError, match="of its cells are also assigned to 'test'"):
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


def test_a_half_made_snapshot_does_not_exist_and_is_made_anew(lake_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("store.shuffle._write_cells", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            create_snapshot(lake_uri, "half", SnapshotSettings())
    assert "half" not in list_snapshots(lake_uri)
    with pytest.raises(MissingError, match="no snapshot 'half'"):
        open_snapshot(lake_uri, "half")
    create_snapshot(lake_uri, "half", SnapshotSettings()).verify()
    delete_snapshot(lake_uri, "half")
    assert "half" not in list_snapshots(lake_uri)


def test_damage_is_an_error_that_names_the_array_never_a_wrong_batch(lake_uri: str) -> None:
    snapshot = create_snapshot(lake_uri, "damaged", SnapshotSettings())
    data = next(Path(snapshot.uri, "RNA/counts/__fragments").glob("*/a0.tdb"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(VerificationError, match="RNA/counts"):
        open_snapshot(lake_uri, "damaged").block("RNA", 0, snapshot.n_cells)
    delete_snapshot(lake_uri, "damaged")


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


def test_records_are_created_once_and_whole(tmp_path: Path) -> None:
    uri = str(tmp_path / "r" / "1.json")
    assert records.create(uri, {"a": 1})
    assert not records.create(uri, {"a": 2})
    assert records.read(uri) == {"a": 1}
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["1.json"]
