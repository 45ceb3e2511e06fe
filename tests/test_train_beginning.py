"""Where a run's model begins: at training cells of all parts that the lake still holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encoded import add_dataset
from test_store_layers import add_levels
from test_train_loop import settings

from store.errors import UsageError
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot, open_snapshot, refresh_snapshot
from store.writer import LakeWriter
from train import beginning
from train.beginning import first_values, measured_rows, measured_values
from train.loop import Run
from train.sources import find_sources


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A snapshot s of two datasets, of which one went; s2 has it again and metabolites beside, in a part of its own."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 90, {"RNA": 30}, origin="a.h5ad")
        add_levels(writer, "old", 200, {"RNA": 30, "peptide": 5}, "homo_sapiens")
        create_snapshot(uri, "s", SnapshotSettings(seed=3))
        add_dataset(writer, "a", 40, {"RNA": 30}, version=1, origin="a.h5ad")
        add_levels(writer, "new", 60, {"RNA": 30, "metabolite": 6, "peptide": 8}, "homo_sapiens")
    refresh_snapshot(uri, "s", "s2")
    return uri


def levels_of(snapshot: Snapshot, name: str, split: str = "train") -> list[float]:
    """All levels of a split's cells, sorted; read in another way."""
    block, cells = snapshot.block(name, 0, snapshot.n_rows), snapshot.cells(["split"]).to_pandas()
    wanted = np.repeat((cells.sort_values("row")["split"] == split).to_numpy(), np.diff(block.indptr))
    return sorted(block.counts[wanted].tolist())


def test_levels_are_measured_by_the_training_cells_of_every_part(lake: str) -> None:
    snapshot = open_snapshot(lake, "s2")
    sources = find_sources({snapshot: 1.0}, "train")
    assert len(sources) == 2
    for name, n_features in (("peptide", 8), ("metabolite", 6)):
        found = measured_values(sources, name, n_features)
        assert sorted(found.data.tolist()) == levels_of(snapshot, name)
        assert found.shape[1] == n_features
        assert (np.diff(found.indptr) > 0).all()


@pytest.mark.parametrize("read_rows", [1, 7, 2**14])
def test_cells_are_the_same_however_many_rows_are_read_together_and_no_more_than_asked_for(
    lake: str, monkeypatch: pytest.MonkeyPatch, read_rows: int
) -> None:
    sources = find_sources({open_snapshot(lake, "s2"): 1.0}, "train")
    monkeypatch.setattr(beginning, "BASELINE_CELLS", 60)
    expected = {"peptide": measured_values(sources, "peptide", 8), "RNA": first_values(sources, {"RNA": 30})["RNA"]}
    monkeypatch.setattr(beginning, "READ_ROWS", read_rows)
    peptides = measured_values(sources, "peptide", 8)
    assert peptides.shape[0] == 60
    np.testing.assert_array_equal(peptides.toarray(), expected["peptide"].toarray())
    np.testing.assert_array_equal(first_values(sources, {"RNA": 30})["RNA"].toarray(), expected["RNA"].toarray())
    assert peptides[:, 5:].nnz, "features that only the new part has"


def test_dead_rows_say_nothing_of_where_a_model_begins(lake: str) -> None:
    snapshot = open_snapshot(lake, "s2")
    assert len(snapshot.dead) == 90
    sources = find_sources({snapshot: 1.0}, "train")
    largest = max(sources, key=lambda one: one.n_rows)
    cells = snapshot.cells(["dataset_id", "split"]).to_pandas()
    mine = cells[(cells["split"] == "train") & (cells["row"] < 290)]
    assert set(mine["dataset_id"]) == {"old"}
    values = first_values(sources, {"RNA": 30})["RNA"]
    assert values.shape[0] == len(mine) == largest.n_rows
    assert sorted(values.data.tolist()) == sorted(
        value for row in mine["row"] for value in snapshot.block("RNA", row, row + 1).counts.tolist()
    )


def test_few_cells_that_have_levels_are_looked_for_in_so_many_rows_only(
    lake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_sources({open_snapshot(lake, "s"): 1.0}, "train")[0]
    whole = np.concatenate(list(measured_rows(source, "peptide", 1000)))
    monkeypatch.setattr(beginning, "READ_ROWS", 4)
    monkeypatch.setattr(beginning, "SCANNED_MOST", 40)
    some = np.concatenate(list(measured_rows(source, "peptide", 3)))
    assert 0 < len(some) < len(whole)
    np.testing.assert_array_equal(some, whole[: len(some)])


def test_one_part_whose_cells_are_all_there_begins_where_its_first_rows_are(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_levels(writer, "m", 80, {"RNA": 30, "peptide": 5}, "homo_sapiens")
    snapshot = create_snapshot(uri, "s", SnapshotSettings())
    sources = find_sources({snapshot: 1.0}, "train")
    first = sources[0].first
    block = snapshot.block("peptide", first, first + sources[0].n_rows)
    for found in (measured_values(sources, "peptide", 5), first_values(sources, {"peptide": 5})["peptide"]):
        np.testing.assert_array_equal(found.indptr, block.indptr)
        np.testing.assert_array_equal(found.indices, block.features)
        np.testing.assert_array_equal(found.data, block.counts)


def test_a_new_parts_levels_are_standardised_and_the_loss_is_of_their_order(lake: str, tmp_path: Path) -> None:
    run = Run(settings(lake, tmp_path, snapshot="s2"), 1)
    levels, config = run.plain.levels, run.plain.config
    assert levels is not None
    first = config.offsets["metabolite"]
    mine = slice(first, first + config.n_features["metabolite"])
    assert levels.logged_F[mine].all()
    assert (levels.center_F[mine] > 1).all()
    assert run.train().loss_test_first < 20


def test_levels_that_no_training_cell_has_are_refused_with_what_to_do(lake: str, tmp_path: Path) -> None:
    held = SnapshotSettings(assign={"test": {"dataset_id": ("new",)}})
    create_snapshot(lake, "held", held)
    with pytest.raises(UsageError, match=r"\(data\.split\) has levels of 'metabolite'.* without this measurement"):
        Run(settings(lake, tmp_path, snapshot="held"), 1)
