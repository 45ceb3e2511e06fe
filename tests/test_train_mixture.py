"""Mixtures of snapshots, and snapshots of unlike parts: shares, what was not measured, memory, the same controls."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from encoded import add_dataset, encoded_counts, numbered

from store.errors import UsageError
from store.schema import DatasetPlan
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot, refresh_snapshot
from store.writer import LakeWriter, write_counts
from train.controls import MatchedControls
from train.ranks import rank_factors
from train.stream import Stream
from train.tokens import TokenSettings

ALL = {"train": 1.0}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two datasets of unlike sizes, and one whose proteins are levels."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    levels = {"RNA": numbered("RNA", 30), "protein": numbered("protein", 6)}
    with LakeWriter(uri) as writer:
        add_dataset(writer, "big", 2048, {"RNA": 30, "protein": 6})
        add_dataset(writer, "small", 128, {"RNA": 30, "protein": 6})
        plan = DatasetPlan("levels", "homo_sapiens", "levels", 100, levels, layers={"protein": "value"})
        reserved = writer.reserve(plan)
        written = [write_counts(reserved, name, 0, encoded_counts(0, 100, len(of))) for name, of in levels.items()]
        writer.commit(reserved, pd.DataFrame({"cell_id": [str(cell) for cell in range(100)]}), written)
    return uri


def of_dataset(lake: str, dataset: str, like: str = "", **words: Any) -> Snapshot:
    where = f"dataset_id == '{dataset}'"
    return create_snapshot(
        lake, f"{dataset}{len(words)}", SnapshotSettings(where=where, fractions=ALL, like=like, **words)
    )


@pytest.fixture(scope="module")
def big(lake: str) -> Snapshot:
    return of_dataset(lake, "big")


@pytest.fixture(scope="module")
def small(lake: str, big: Snapshot) -> Snapshot:
    return of_dataset(lake, "small", like=big.name)


@pytest.mark.parametrize("weights", [None, "numbers", "cell_type", "donor_id"])
def test_shares_hold_whatever_the_weights_within_the_snapshots(
    big: Snapshot, small: Snapshot, weights: str | None
) -> None:
    numbers = np.concatenate([np.full(big.n_rows, 1.0), np.full(small.n_rows, 50.0)])
    words: dict[str, Any] = {"weights": numbers if weights == "numbers" else weights}
    stream = Stream({big: 0.9, small: 0.1}, batch=100, block=64, window=4, **words)
    for cells in list(stream.epoch(0))[:-1]:
        assert abs(int((cells.row < big.n_rows).sum()) - 90) <= 1


def test_cells_without_a_label_keep_their_share_and_values_come_equally_often(tmp_path: Path) -> None:
    words = np.repeat(["unknown", "NaN", "T cell", "B cell"], [300, 100, 300, 100])
    obs = pd.DataFrame({"cell_id": [str(cell) for cell in range(800)], "cell_type": words, "tissue": "unknown"})
    with LakeWriter(str(tmp_path / "lake")) as writer:
        reserved = writer.reserve(DatasetPlan("one", "homo_sapiens", "one", 800, {"RNA": numbered("RNA", 30)}))
        writer.commit(reserved, obs, [write_counts(reserved, "RNA", 0, encoded_counts(0, 800, 30))])
    snapshot = create_snapshot(str(tmp_path / "lake"), "s", SnapshotSettings(fractions=ALL))
    of_row = np.array(snapshot.cells(["cell_type"])["cell_type"].to_pylist())
    stream = Stream(snapshot, batch=100, weights="cell_type")
    comes = of_row[np.concatenate([cells.row for cells in stream.epoch(0)])]
    names, times = np.unique(comes, return_counts=True)
    for name, n in {"unknown": 300, "NaN": 100, "T cell": 200, "B cell": 200}.items():
        assert abs(times[names == name][0] - n) <= 1, name
    plain = Stream(snapshot, batch=100, weights="tissue")  # nobody says any
    assert sorted(np.concatenate([cells.row for cells in plain.epoch(0)])) == list(range(800))


def test_a_share_that_would_never_be_streamed_is_refused(big: Snapshot, small: Snapshot) -> None:
    with pytest.raises(UsageError, match=r"small0: its share is below 1 in 2,147,483,648, and never streamed"):
        Stream({big: 1.0, small: 1e-10}, batch=100)
    assert Stream({big: 1.0, small: 1e-9}, batch=np.int64(100)).plan.shares[1] == 1


def test_a_snapshot_that_no_weight_lets_in_is_named(big: Snapshot, small: Snapshot) -> None:
    numbers = np.concatenate([np.ones(big.n_rows), np.zeros(small.n_rows)])
    with pytest.raises(UsageError, match=r"small0: all its cells have weight 0; leave it out"):
        Stream({big: 0.9, small: 0.1}, batch=100, weights=numbers)


def test_what_a_snapshot_left_out_is_not_measured_in_a_mixture(lake: str, big: Snapshot) -> None:
    bare = of_dataset(lake, "small", like=big.name, measurements=("RNA",))
    for cells in Stream({big: 1, bare: 1}, batch=60, block=32, window=4).steps(0, 3):
        from_big = cells.row < big.n_rows
        assert 20 < from_big.sum() < 40
        assert (cells.measured["protein"] == from_big).all()
        assert cells.measured["RNA"].all()


def test_counts_and_levels_of_one_measurement_are_not_mixed(lake: str, big: Snapshot) -> None:
    levels = of_dataset(lake, "levels", like=big.name)
    with pytest.raises(UsageError, match="protein is levels in 'levels0' and counts in 'big0', and cannot be mixed"):
        Stream({big: 1, levels: 1}, batch=20)
    assert next(Stream({big: 1, levels: 1}, batch=20, measurements=["RNA"]).epoch(0)).n_cells == 20
    with pytest.raises(UsageError, match=r"has levels only \(protein\), and no counts to rank"):
        rank_factors(of_dataset(lake, "levels", measurements=("protein",)))


def test_a_few_deep_cells_beside_many_take_what_they_need(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")

    def add(writer: LakeWriter, name: str, n_cells: int, per_cell: int) -> None:
        reserved = writer.reserve(DatasetPlan(name, "homo_sapiens", name, n_cells, {"RNA": numbered("RNA", 2000)}))
        column = np.tile(np.arange(per_cell), n_cells)
        counts = np.full(len(column), 3, np.float32)
        rows = scipy.sparse.csr_matrix((counts, column, np.arange(n_cells + 1) * per_cell), shape=(n_cells, 2000))
        obs = pd.DataFrame({"cell_id": [f"{name}{cell}" for cell in range(n_cells)]})
        writer.commit(reserved, obs, [write_counts(reserved, "RNA", 0, rows)])

    with LakeWriter(uri) as writer:
        add(writer, "droplets", 1000, 50)
        create_snapshot(uri, "s", SnapshotSettings(fractions=ALL))
        add(writer, "plates", 5, 1500)
    grown = refresh_snapshot(uri, "s", "grown")
    needed = 3 * 1.05 * (1000 * 50 + 5 * 1500) * 3  # three windows of 3 bytes a value
    assert next(Stream(grown, batch=64, memory_bytes=int(needed * 1.1)).epoch(0)).n_cells == 64
    with pytest.raises(
        UsageError, match=r"3 windows take .* MiB \(RNA\), with all that is read beside them .* are allowed"
    ):
        list(Stream(grown, batch=64, memory_bytes=int(needed * 0.9)).epoch(0))


def pairs(stream: Stream, rank: int, world: int) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """Yield the cells of each step with their controls, by row."""
    for cells in stream.steps(0, 20, rank=rank, world=world):
        row = np.append(cells.controls.cells.row, -1)
        yield [
            (int(own), tuple(row[place].tolist()))
            for own, place in zip(cells.row, cells.controls.place_CS, strict=True)
        ]


@pytest.mark.parametrize("mixed", [True, False])
def test_controls_are_the_same_at_any_number_of_ranks_also_of_cells_that_come_again(
    big: Snapshot, small: Snapshot, *, mixed: bool
) -> None:
    words: dict[str, Any] = {"block": 32, "lanes": 4, "controls": MatchedControls(size=3)}

    def made() -> Stream:
        if mixed:
            return Stream({big: 0.5, small: 0.5}, batch=200, window=8, **words)
        return Stream(big, batch=64, window=4, weights=np.where(np.arange(big.n_rows) % 7, 1.0, 20.0), **words)

    alone = [sorted(step) for step in pairs(made(), 0, 1)]
    assert sum(len(step) for step in alone) > 1000
    for world in (2, 4):
        shared = zip(*(pairs(made(), rank, world) for rank in range(world)), strict=True)
        assert [sorted(chain.from_iterable(parts)) for parts in shared] == alone


def test_a_state_of_another_split_or_of_no_stream_is_refused(lake: str) -> None:
    where = "dataset_id == 'small'"
    halves = create_snapshot(lake, "halves", SnapshotSettings(where=where, fractions={"train": 0.5, "test": 0.5}))
    state = Stream(halves, batch=10).state_dict()
    before = {key: value for key, value in state.items() if key != "split"}
    Stream(halves, batch=10).load_state_dict(before)  # as they once were
    with pytest.raises(UsageError, match="split = 'test' and the saved one had 'train'"):
        Stream(halves, batch=10, split="test").load_state_dict(state)
    with pytest.raises(UsageError, match="no state of a stream: it has no 'blocks'"):
        Stream(halves, batch=10).load_state_dict({})
    for odd in ("x", 1.5, None, True):
        with pytest.raises(UsageError, match=r"step = .*: a whole number"):
            Stream(halves, batch=10).load_state_dict(state | {"step": odd})
    with pytest.raises(UsageError, match="step = 2000000000000: no stream has come so far"):
        Stream(halves, batch=10).load_state_dict(state | {"step": 2 * 10**12})
    for none in (None, [], "state"):
        with pytest.raises(UsageError, match="is no state of a stream: say what state_dict returned"):
            Stream(halves, batch=10).load_state_dict(none)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="step = -1: at least 0"):
        Stream(halves, batch=10).load_state_dict(state | {"step": -1})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"seed": -1}, "seed = -1: at least 0"),
        ({"tokens": 64}, r"tokens = 64: say TokenSettings\(budget=...\)"),
        ({"measurements": []}, r"measurements = \[\]: name some, or leave it out"),
        ({"batch": 0}, "batch = 0: at least 1"),
        ({"batch": 32.0}, r"batch = 32\.0: a whole number"),
        ({"batch": True}, "batch = True: a whole number"),
        ({"lanes": 1.0}, r"lanes = 1\.0: a whole number"),
        ({"seed": "1"}, "seed = '1': a whole number"),
        ({"weights": ["a"] * 700}, "weights are .* numbers, one for each cell of the split"),
        ({"weights": [1j] * 700}, "weights are .* numbers, one for each cell of the split"),
    ],
)
def test_words_of_another_kind_are_refused_with_what_to_say(big: Snapshot, words: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Stream(big, **({"batch": 10} | words))


def test_what_is_no_snapshot_and_an_epoch_before_the_first_are_refused(big: Snapshot) -> None:
    for snapshot in ("blood", [big, big]):
        with pytest.raises(UsageError, match="is no snapshot: say open_snapshot"):
            Stream(snapshot, batch=10)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="its share is 'a'; shares are positive numbers"):
        Stream({big: "a"}, batch=10)  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="epoch = -1: at least 0"):
        next(Stream(big, batch=10, tokens=TokenSettings(budget=8)).epoch(-1))
