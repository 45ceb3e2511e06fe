"""The stream: every streamed cell carries its own counts and labels; a step number is all that is needed to resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encoded import add_dataset, encoded_counts

from store.errors import UsageError, VerificationError
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.cells import Cells, Csr
from train.stream import Stream, read_labels


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 150, {"RNA": 40, "protein": 6})
        add_dataset(writer, "second", 90, {"RNA": 60})
    return create_snapshot(uri, "s", SnapshotSettings(seed=2))


def stream(snapshot: Snapshot, split: str = "train", batch: int = 16) -> Stream:
    return Stream(snapshot, batch=batch, seed=7, split=split, block=20, window=3)


def dense(part: Csr, row: int, n_features: int) -> np.ndarray:
    out = np.zeros(n_features)
    mine = slice(part.indptr[row], part.indptr[row + 1])
    out[part.features[mine]] = part.counts[mine]
    return out


def identity(cells: Cells) -> list[tuple[int, tuple[float, ...]]]:
    return [(int(row), tuple(dense(cells.counts["RNA"], i, 60))) for i, row in enumerate(cells.row)]


def test_every_streamed_cell_carries_its_own_counts_and_labels(snapshot: Snapshot) -> None:
    table = snapshot.cells().to_pandas()
    ids = snapshot.vocabulary("RNA")["feature_id"].to_pylist()
    column = [int(name.removeprefix("RNA")) for name in ids]
    expected = {"first": encoded_counts(0, 150, 60).toarray(), "second": encoded_counts(0, 90, 60).toarray()}
    expected["first"][:, 40:] = 0
    labels = read_labels(snapshot)
    for cells in stream(snapshot).epoch(0):
        for number, row in enumerate(cells.row):
            line = table.iloc[row]
            cell = int(line["cell_id"].rsplit("-", 1)[1])
            assert (dense(cells.counts["RNA"], number, 60) == expected[line["dataset_id"]][cell][column]).all()
            assert cells.measured["protein"][number] == (line["dataset_id"] == "first")
            assert labels.values["cell_type"][cells.prompts["cell_type"][number]] == line["cell_type"]
            assert labels.values["perturbation"][cells.perturbation[number, 0]] == line["perturbation"]
            assert cells.numbers["time"][number] == line["time"]
            assert snapshot.datasets[cells.panel[number]] == line["dataset_id"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_holds_every_cell_of_the_split_once(snapshot: Snapshot, world: int) -> None:
    rows = [int(r) for rank in range(world) for c in stream(snapshot).epoch(1, rank=rank, world=world) for r in c.row]
    split = snapshot.cells(["split"])["split"].to_pylist()
    assert sorted(rows) == [row for row, name in enumerate(split) if name == "train"]


def test_resuming_at_a_step_goes_on_as_if_never_stopped(snapshot: Snapshot) -> None:
    whole = [identity(cells) for cells in stream(snapshot).steps(0, 40)]
    resumed = [identity(cells) for cells in stream(snapshot).steps(23, 40)]
    assert whole[23:] == resumed
    halves = [[identity(c) for c in stream(snapshot).steps(23, 40, rank=rank, world=2)] for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(step) for step in whole[23:]]


def test_an_error_of_the_reading_thread_reaches_the_consumer(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Snapshot, *where: object) -> None:
        raise VerificationError("RNA/counts: damaged")

    monkeypatch.setattr(Snapshot, "read_into", broken)
    with pytest.raises(VerificationError, match="damaged"):
        next(stream(snapshot).epoch(0))


def test_a_value_that_training_never_shows_has_no_code(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 150, {"RNA": 40})
    held = create_snapshot(
        uri, "held", SnapshotSettings(split_by="perturbation", fractions={"train": 0.5, "test": 0.5})
    )
    cells = held.cells().to_pandas()
    shown = set(cells["perturbation"][cells["split"] == "train"])
    assert len(shown) == 1
    every, learned = read_labels(held), read_labels(held, "train")
    assert set(every.values["perturbation"]) == {"", "control", "RNA0003"}
    assert set(learned.values["perturbation"]) == {"", "control"} | shown
    unknown = ~cells["perturbation"].isin(set(learned.values["perturbation"])).to_numpy()
    assert (learned.perturbation[unknown] == 0).all()
    assert (learned.perturbation[(cells["split"] == "train").to_numpy()] > 0).all()


def test_a_split_without_cells_is_refused_with_those_that_have_some(snapshot: Snapshot) -> None:
    with pytest.raises(UsageError, match="splits with cells: test, train"):
        stream(snapshot, split="validation")
