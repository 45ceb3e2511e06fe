"""The stream: every streamed cell carries its own counts and labels; a step number is all that is needed to resume."""

from __future__ import annotations

import gc
import json
import pickle
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from encoded import add_dataset, encoded_counts, numbered
from torch.utils.data import DataLoader

from store.errors import UsageError, VerificationError
from store.lake import open_lake
from store.part import Part
from store.schema import DatasetPlan
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot, refresh_snapshot
from store.writer import LakeWriter, write_counts
from train.cells import Cells, Csr
from train.controls import MatchedControls
from train.dataset import EpochDataset, EpochLoader
from train.labels import read_labels
from train.stream import Stream
from train.telemetry import ShuffleTelemetry
from train.tokens import Tokens, TokenSettings, make_tokens


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


@pytest.mark.parametrize("name", ["read_into", "codes", "numbers", "indptr"])
def test_an_error_of_a_reading_thread_reaches_the_consumer(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def broken(self: Part, *where: object, **how: object) -> None:
        raise VerificationError("RNA/counts: damaged")

    told = stream(snapshot)
    monkeypatch.setattr(Part, name, broken)
    with pytest.raises(VerificationError, match="damaged"):
        next(told.epoch(0))


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
    codes = held.parts[0].codes(["perturbation"], 0, held.n_rows)[0]
    code = learned.perturbation[0][codes]
    unknown = ~cells["perturbation"].isin(set(learned.values["perturbation"])).to_numpy()
    assert (code[unknown] == 0).all()
    assert (code[(cells["split"] == "train").to_numpy()] > 0).all()


def test_a_split_without_cells_is_refused_with_those_that_have_some(snapshot: Snapshot) -> None:
    with pytest.raises(UsageError, match="splits with cells: test, train"):
        stream(snapshot, split="validation")


@pytest.fixture(scope="module")
def one_measurement(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """RNA alone, so that tokens come from the compiled kernel."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 400, {"RNA": 60})
    return create_snapshot(uri, "s", SnapshotSettings(seed=4))


TOKENS = TokenSettings(budget=9, hide=(0.1, 0.5))


def same_tokens(one: Tokens, other: Tokens) -> None:
    for name in ("feature_CL", "value_CL", "prompt_CF", "row_C", "measured_CM"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_streamed_tokens_are_those_of_the_streamed_cells(one_measurement: Snapshot) -> None:
    ragged = Stream(one_measurement, batch=33, seed=7, block=20, window=3)
    tokens = Stream(one_measurement, batch=33, seed=7, block=20, window=3, tokens=TOKENS)
    labels_first = 1
    for step, (cells, made) in enumerate(zip(ragged.steps(0, 30), tokens.steps(0, 30), strict=True)):
        same_tokens(made, make_tokens(cells, {"RNA": labels_first}, TOKENS, chance=(7, step)))


def test_batches_that_are_kept_do_not_change(one_measurement: Snapshot) -> None:
    """Buffers are used again, but never while somebody holds a batch."""
    kept = list(Stream(one_measurement, batch=33, seed=7, block=20, window=3, tokens=TOKENS).steps(0, 60))
    again = Stream(one_measurement, batch=33, seed=7, block=20, window=3, tokens=TOKENS)
    for old, new in zip(kept, again.steps(0, 60), strict=True):
        same_tokens(old, new)


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_cell_comes_once_for_any_number_of_ranks_and_threads(
    one_measurement: Snapshot, world: int, threads: int
) -> None:
    streams = [Stream(one_measurement, batch=50, block=16, window=4, threads=threads, tokens=TOKENS)] * world
    rows = [
        row
        for rank, stream in enumerate(streams)
        for made in stream.epoch(2, rank=rank, world=world)
        for row in made.row_C.tolist()
    ]
    first, stop = one_measurement.parts[0].split_rows["train"]
    assert sorted(rows) == list(range(first, stop))


def test_a_saved_state_goes_on_where_it_stood_also_with_other_ranks(one_measurement: Snapshot) -> None:
    words = {"batch": 30, "seed": 3, "block": 16, "window": 4}
    stream = Stream(one_measurement, **words)
    for number, _ in enumerate(stream.epoch(1)):
        if number == 4:
            break
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [row for cells in stream.epoch(1) for row in cells.row.tolist()]
    resumed = []
    for rank in range(3):
        other = Stream(one_measurement, **words)
        other.load_state_dict(state)
        resumed += [row for cells in other.epoch(1, rank=rank, world=3) for row in cells.row.tolist()]
    assert len(rest) == stream.plan.n_rows - 5 * 30
    assert sorted(resumed) == sorted(rest)
    with pytest.raises(UsageError, match="global_batch = 31 and the saved one had 30"):
        Stream(one_measurement, **(words | {"batch": 31})).load_state_dict(state)


def test_too_large_a_window_is_refused_with_what_it_takes(one_measurement: Snapshot) -> None:
    with pytest.raises(UsageError, match=r"3 windows take .* MiB \(RNA\), .* MiB are allowed; choose a smaller window"):
        next(Stream(one_measurement, batch=16, memory_bytes=1000).epoch(0))
    with pytest.raises(UsageError, match="larger than a window of 32"):
        Stream(one_measurement, batch=40, block=16, window=2)
    with pytest.raises(UsageError, match="no measurement 'ATAC'"):
        Stream(one_measurement, batch=40, measurements=["ATAC"])


def test_memory_is_that_of_all_measurements_together(snapshot: Snapshot) -> None:
    def fits(allowed: int, measurements: list[str]) -> bool:
        try:
            next(Stream(snapshot, batch=16, measurements=measurements, memory_bytes=allowed).epoch(0))
        except UsageError:
            return False
        return True

    least = {}
    for names in (["RNA"], ["protein"], ["RNA", "protein"]):
        low, high = 0, 2**20
        while high - low > 64:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle, names) else (middle, high)
        least[len(names) - 1, names[0]] = high
    assert least[1, "RNA"] >= least[0, "RNA"] + least[0, "protein"] - 192


def test_twenty_epochs_leave_no_threads_files_or_memory_behind(one_measurement: Snapshot, tmp_path: Path) -> None:
    stream = Stream(one_measurement, batch=64, block=16, window=4, tokens=TOKENS, cache=tmp_path)
    process = psutil.Process()
    after: list[tuple[int, int, int]] = []
    for epoch in range(20):
        for number, _ in enumerate(stream.epoch(epoch, start=0)):
            if epoch % 2 and number == 2:
                break  # a consumer that leaves early
        gc.collect()
        after.append((process.num_fds(), threading.active_count(), process.memory_info().rss))
    assert after[-1][:2] == after[4][:2]
    assert after[-1][2] - after[4][2] < 20 * 2**20


def test_weights_make_labels_come_equally_often(one_measurement: Snapshot) -> None:
    first, stop = one_measurement.parts[0].split_rows["train"]
    label = np.array(one_measurement.cells(["donor_id"])["donor_id"].to_pylist())[first:stop]
    names, times = np.unique(label, return_counts=True)
    weight = np.where(label == names[0], 5.0, 1.0)
    stream = Stream(one_measurement, batch=32, block=16, window=4, weights=weight, seed=1)
    expected = weight * len(weight) / weight.sum()
    total = np.zeros(len(weight))
    for epoch in range(30):
        rows = np.concatenate([cells.row for cells in stream.epoch(epoch, start=0)])
        comes = np.bincount(rows - first, minlength=len(weight))
        assert len(rows) == stop - first
        assert (comes >= np.floor(expected)).all()
        assert (comes <= np.ceil(expected)).all()
        total += comes
    assert np.abs(total / 30 - expected).max() < 0.6
    balanced = Stream(one_measurement, batch=32, block=16, window=4, weights="donor_id")
    ranks = [np.concatenate([c.row for c in balanced.epoch(0, start=0, rank=r, world=3)]) for r in range(3)]
    shown = np.unique(label[np.concatenate(ranks) - first], return_counts=True)[1]
    assert len(names) > 1
    assert times.max() > times.min()
    assert shown.max() <= 1.1 * shown.min()
    with pytest.raises(UsageError, match="one for each cell of the split"):
        Stream(one_measurement, batch=32, block=16, window=4, weights=[1.0])
    with pytest.raises(UsageError, match="weights = 'colour' is none of"):
        Stream(one_measurement, batch=32, block=16, window=4, weights="colour")
    with pytest.raises(UsageError, match="'cell_type' is not true or false"):
        Stream(one_measurement, batch=32, block=16, window=4, balance="cell_type")  # type: ignore[arg-type]


def test_weighted_cells_carry_their_own_counts_and_resume(one_measurement: Snapshot) -> None:
    words = {"batch": 32, "block": 16, "window": 4, "weights": "cell_type", "seed": 5}
    plain = {
        row: values
        for cells in Stream(one_measurement, batch=32, block=16, window=4).epoch(0)
        for row, values in identity(cells)
    }
    whole = [identity(cells) for cells in Stream(one_measurement, **words).steps(0, 40)]
    assert all(values == plain[row] for step in whole for row, values in step)
    assert [identity(cells) for cells in Stream(one_measurement, **words).steps(17, 40)] == whole[17:]
    with pytest.raises(UsageError, match="weights"):
        Stream(one_measurement, batch=32, block=16, window=4, seed=5).load_state_dict(
            Stream(one_measurement, **words).state_dict()
        )


def test_which_cells_come_is_drawn_once_for_each_epoch(
    one_measurement: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(one_measurement, batch=16, block=16, window=4, weights="cell_type")
    drawn: list[int] = []
    whole = np.random.default_rng

    def counted(seed: list[int]) -> np.random.Generator:
        if len(seed) == 3 and seed[2] == 0:
            drawn.append(seed[1])
        return whole(seed)

    monkeypatch.setattr("train.stream.np.random.default_rng", counted)
    rows = [cells.row.tolist() for cells in stream.steps(0, 3 * stream.plan.steps_per_epoch)]
    assert drawn == [0, 1, 2]
    again = pickle.loads(pickle.dumps(stream))
    assert [cells.row.tolist() for cells in again.steps(0, len(rows))] == rows
    assert drawn[3:] == [0, 1, 2]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_get_equally_many_cells_and_about_equally_many_values(snapshot: Snapshot, world: int) -> None:
    streams = [Stream(snapshot, batch=72, seed=7, block=20, window=4, balance=balance) for balance in (True, False)]
    spread = []
    for stream in streams:
        steps = [list(stream.epoch(0, start=0, rank=rank, world=world)) for rank in range(world)]
        apart = []
        for shares in zip(*steps, strict=True):
            cells = [share.n_cells for share in shares]
            values = [sum(len(part.counts) for part in share.counts.values()) for share in shares]
            assert max(cells) - min(cells) <= 1
            if sum(cells) == 72:
                apart.append(max(values) / min(values))
        spread.append(float(np.mean(apart)))
    assert spread[0] < 1.04
    assert world < 8 or spread[0] - 1 < (spread[1] - 1) / 3


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, int]]:
    """What is read of the values from now on: part, measurement, first, how many."""
    found: list[tuple[str, str, int, int]] = []
    whole = Part.read_into

    def noted(
        self: Part, measurement: str, start: int, features: np.ndarray, counts: np.ndarray, *, beside: None
    ) -> None:
        found.append((self.id, measurement, start, len(features)))
        whole(self, measurement, start, features, counts, beside=beside)

    monkeypatch.setattr(Part, "read_into", noted)
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_lanes_ranks_share_the_reading_and_the_steps_stay_the_same(
    one_measurement: Snapshot, reads: list[tuple[str, str, int, int]], world: int
) -> None:
    words = {"batch": 32, "block": 16, "window": 8, "lanes": 4, "seed": 5}
    alone = [sorted(identity(cells)) for cells in Stream(one_measurement, **words).epoch(0)]
    reads.clear()
    shares = []
    for rank in range(world):
        stream = Stream(one_measurement, **words)
        last = stream.plan.steps_per_epoch
        shares.append([identity(cells) for cells in stream.steps(0, last, rank=rank, world=world)])
    assert [sorted(chain.from_iterable(step)) for step in zip(*shares, strict=True)] == alone
    everything = one_measurement.manifest["measurements"]["RNA"]["nnz"]
    assert sum(size for *_, size in reads) < 2.2 * everything  # the last window is read by all
    with pytest.raises(UsageError, match="lanes = 3 does not divide window = 8"):
        Stream(one_measurement, **(words | {"lanes": 3}))


@pytest.mark.parametrize("words", [{}, {"lanes": 2}, {"weights": "donor_id"}], ids=lambda words: " ".join(words))
def test_nothing_is_read_that_no_step_needs(
    grown: Snapshot, reads: list[tuple[str, str, int, int]], words: dict[str, Any]
) -> None:
    stream = Stream(grown, **SMALL, **words)
    of_epoch = stream.plan.steps_per_epoch
    for start, stop in ((0, of_epoch), (of_epoch, 2 * of_epoch), (3, 5), (of_epoch - 2, of_epoch + 2), (7, 7)):
        reads.clear()
        list(stream.steps(start, stop))
        needed = set(chain.from_iterable(map(stream._windows, range(start, stop))))
        blocks = sum(len(stream._blocks(key, 0, 1)[0]) for key in needed)
        assert len(reads) == blocks * len(stream.measurements)
    if "weights" not in words:  # with them a block of an epoch may hold cells of several blocks of the part
        reads.clear()
        list(stream.epoch(2))
        some = [read for read in reads if read[-1]]
        assert len(set(some)) == len(some) > 0


def test_more_ranks_than_cells_of_a_step_leave_some_without(one_measurement: Snapshot) -> None:
    words = {"batch": 4, "block": 16, "window": 8, "lanes": 8, "tokens": TOKENS}
    rows = []
    for rank in range(8):
        shares = [made.row_C.tolist() for made in Stream(one_measurement, **words).epoch(0, rank=rank, world=8)]
        assert max(map(len, shares)) <= 1
        rows += list(chain.from_iterable(shares))
    assert sorted(rows) == list(range(*one_measurement.parts[0].split_rows["train"]))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A snapshot of three parts, from which cells went."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 300, {"RNA": 40, "protein": 6})
        add_dataset(writer, "second", 90, {"RNA": 60}, origin="b")
        create_snapshot(uri, "one", SnapshotSettings(seed=2))
        add_dataset(writer, "second", 110, {"RNA": 60}, version=1, origin="b")
        refresh_snapshot(uri, "one", "two")
        add_dataset(writer, "third", 160, {"RNA": 70})
    return refresh_snapshot(uri, "two", "three")


SMALL = {"batch": 8, "block": 32, "window": 4, "seed": 3}
"""Half a window holds eight such steps."""


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"lanes": 2},
        {"weights": "donor_id"},
        {"measurements": ["RNA"], "tokens": TOKENS},
        {"tokens": TOKENS},
        {"tokens": TokenSettings(budget=9, values="bins")},
    ],
    ids=lambda words: " ".join(map(str, words)) or "ragged",
)
@pytest.mark.parametrize(("world", "every"), [(1, 1), (3, 1), (8, 2)])
def test_steps_made_together_are_those_made_alone(
    grown: Snapshot, monkeypatch: pytest.MonkeyPatch, words: dict[str, object], world: int, every: int
) -> None:
    together = Stream(grown, **SMALL, **words)
    assert together._steps_together(world, every) == 8 // every
    ranks = [list(together.steps(1, 90, rank=rank, world=world, every=every)) for rank in range(world)]
    monkeypatch.setattr("train.stream.GROUP_CELLS", 1)
    alone = Stream(grown, **SMALL, **words)
    assert alone._steps_together(world, every) == 1
    for rank, made in enumerate(ranks):
        for one, other in zip(alone.steps(1, 90, rank=rank, world=world, every=every), made, strict=True):
            if "tokens" in words:
                same_tokens(other, one)
                assert other.number_CF.numpy().tobytes() == one.number_CF.numpy().tobytes()
                assert torch.equal(other.log_depth_CM, one.log_depth_CM)
            else:
                assert [*map(str, vars(other).items())] == [*map(str, vars(one).items())]
    assert together.telemetry.ratio == pytest.approx(alone.telemetry.ratio, rel=0, abs=0, nan_ok=True)


def living(snapshot: Snapshot) -> list[int]:
    return [row for row, split in enumerate(snapshot.cells(["split"])["split"].to_pylist()) if split == "train"]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 3), (3, 1), (8, 4)])
def test_every_cell_of_every_part_comes_once_for_any_ranks_and_workers(
    grown: Snapshot, world: int, workers: int, lanes: int
) -> None:
    made = Stream(grown, batch=32, seed=3, block=12, window=4, lanes=lanes)
    first, stop = made.plan.steps_per_epoch, 2 * made.plan.steps_per_epoch
    rows: list[int] = []
    by_step: dict[int, int] = {}
    for rank in range(world):
        for worker in range(workers):
            steps = made.steps(first + worker, stop, rank=rank, world=world, every=workers)
            for step, cells in zip(range(first + worker, stop, workers), steps, strict=True):
                rows += cells.row.tolist()
                by_step[step] = by_step.get(step, 0) + cells.n_cells
    assert sorted(rows) == living(grown)
    assert list(by_step.values()).count(32) >= len(by_step) - 1


def test_a_refreshed_snapshot_streams_its_own_counts_mixed_in_every_batch_and_resumes(grown: Snapshot) -> None:
    table = grown.cells().to_pandas()
    counts = {name: encoded_counts(start, 400, 70).toarray() for name, start in (("first", 0), ("third", 0))}
    counts["second"] = encoded_counts(1000, 110, 70).toarray()
    sizes = {"first": 40, "second": 60, "third": 70}
    ids = [int(name.removeprefix("RNA")) for name in grown.vocabulary("RNA")["feature_id"].to_pylist()]
    labels = read_labels(grown)
    kinds = []
    for cells in Stream(grown, batch=64, seed=3, block=16, window=4).epoch(0):
        kinds.append(len(set(cells.panel.tolist())))
        for number, row in enumerate(cells.row):
            line = table.iloc[row]
            dataset, cell = line["dataset_id"], int(line["cell_id"].rsplit("-", 1)[1])
            expected = np.where(np.arange(70) < sizes[dataset], counts[dataset][cell], 0)[ids]
            assert (dense(cells.counts["RNA"], number, len(ids)) == expected).all()
            assert labels.datasets[cells.panel[number]] == dataset
            assert cells.measured["protein"][number] == (dataset == "first")
    assert min(kinds[:-1]) == 3
    whole = [cells.row.tolist() for cells in Stream(grown, batch=64, seed=3, block=16, window=4).epoch(1)]
    again = Stream(grown, batch=64, seed=3, block=16, window=4)
    again.load_state_dict(again.state_dict() | {"step": again.plan.steps_per_epoch + 3})
    assert [cells.row.tolist() for cells in again.epoch(1)] == whole[3:]


def test_snapshots_are_mixed_by_their_shares_and_only_with_one_vocabulary(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 150, {"RNA": 40})
        add_dataset(writer, "second", 400, {"RNA": 60})
    small = create_snapshot(uri, "small", SnapshotSettings(where="dataset_id == 'first'"))
    other = create_snapshot(uri, "other", SnapshotSettings(features={"RNA": ("RNA0005",)}))
    with pytest.raises(UsageError, match=r"number RNA features differently .* --set like=small"):
        Stream({small: 1, other: 1}, batch=32)
    large = create_snapshot(uri, "large", SnapshotSettings(where="dataset_id == 'second'", like="small"))
    made = Stream({small: 3, large: 1}, batch=32, block=16, window=4, seed=1)
    found = [cells for epoch in range(3) for cells in made.epoch(epoch)]
    panel = np.concatenate([cells.panel for cells in found])
    names = np.array(made.labels.datasets)[panel]
    assert abs((names == "first").mean() - 0.75) < 0.01
    assert all(abs(cells.panel.tolist().count(0) - 0.75 * cells.n_cells) <= 1 for cells in found)
    rows = np.concatenate([cells.row for cells in found])
    ids = [int(name.removeprefix("RNA")) for name in large.vocabulary("RNA")["feature_id"].to_pylist()]
    tables = {"first": small.cells().to_pandas(), "second": large.cells().to_pandas()}
    offsets = {"first": 0, "second": small.n_rows}
    seen = np.unique(rows[names == "first"], return_counts=True)[1]
    assert len(seen) == small.splits["train"]
    assert seen.max() - seen.min() <= 1
    cells = found[-2]
    for number, row in enumerate(cells.row):
        name = made.labels.datasets[cells.panel[number]]
        line = tables[name].iloc[row - offsets[name]]
        expected = encoded_counts(int(line["cell_id"].rsplit("-", 1)[1]), 1, 60).toarray()[0]
        expected[{"first": 40, "second": 60}[name] :] = 0
        assert (dense(cells.counts["RNA"], number, len(ids)) == expected[ids]).all()
    half = made.steps(3, 9, rank=0, world=2), made.steps(3, 9, rank=1, world=2)
    together = [sorted([*a.row, *b.row]) for a, b in zip(*half, strict=True)]
    assert together == [sorted(cells.row) for cells in found[3:9]]
    with pytest.raises(UsageError, match="shares are positive"):
        Stream({small: 1, large: 0}, batch=8)
    two = "cell_id == 'first-4' or cell_id == 'first-6'"
    tiny = create_snapshot(uri, "tiny", SnapshotSettings(where=two, like="small", fractions={"train": 1.0}))
    drawn = next(Stream({tiny: 1, large: 1}, batch=64, block=32, window=4).epoch(0))
    assert sorted(np.unique(drawn.row[drawn.row < 2], return_counts=True)[1].tolist()) == [16, 16]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Snapshot]:
    """Three snapshots of one vocabulary, the last one small."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    sizes = {"a": 176, "b": 169, "c": 43}
    with LakeWriter(uri) as writer:
        for number, (name, n_cells) in enumerate(sizes.items()):
            add_dataset(writer, name, n_cells, {"RNA": 30}, version=number)
    made: list[Snapshot] = []
    for name in sizes:
        words = {"where": f"dataset_id == '{name}'", "like": made[0].name if made else ""}
        made.append(create_snapshot(uri, name, SnapshotSettings(seed=1, fractions={"train": 1.0}, **words)))
    return made


def chosen_by_chance(number: int) -> tuple[tuple[float, ...], dict[str, int], int]:
    """Shares, words of a stream and how many take turns; the first choice once waited for ever."""
    if number == 0:
        return (1.775, 4.137, 0.089), {"batch": 24, "block": 4, "window": 4}, 1
    rng = np.random.default_rng(number)
    block, window = int(rng.choice([1, 2, 4, 16])), int(rng.choice([1, 2, 4]))
    batch = int(rng.integers(1, block * window + 1))
    return tuple(rng.uniform(0.05, 4, 3)), {"batch": batch, "block": block, "window": window}, int(rng.integers(1, 3))


class Impatient(threading.Semaphore):
    """Says that nothing comes where others wait for ever."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        there = super().acquire(blocking, 20 if blocking and timeout is None else timeout)
        assert there or timeout is not None, "no room for a window is ever given back"
        return there


@pytest.mark.parametrize("number", range(6))
def test_no_choice_of_shares_and_windows_waits_for_ever(
    three: list[Snapshot], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    shares, words, every = chosen_by_chance(number)
    made = Stream(dict(zip(three, shares, strict=True)), **words)
    stop = min(2 * made.plan.steps_per_epoch, 120)
    monkeypatch.setattr("train.reader.threading.Semaphore", Impatient)
    cells = [batch.n_cells for batch in made.steps(0, stop, every=every)]
    assert len(cells) == len(range(0, stop, every))


@pytest.mark.parametrize(("lanes", "world"), [(1, 1), (1, 3), (4, 2), (4, 4)])
def test_controls_match_and_are_the_same_at_any_number_of_ranks(grown: Snapshot, lanes: int, world: int) -> None:
    words = {"batch": 32, "block": 24, "window": 4, "lanes": lanes, "seed": 5, "balance": False}
    wanted = MatchedControls(size=3, share=0.7, match=("dataset_id", "cell_type", "time"))
    table = grown.cells().to_pandas()

    def pairs(rank: int, world: int) -> list[dict[int, list[int]]]:
        made = Stream(grown, controls=wanted, **words)
        steps = []
        for cells in made.epoch(0, rank=rank, world=world):
            controls = cells.controls
            assert controls is not None
            row = np.append(controls.cells.row, -1)
            steps.append({int(r): row[place].tolist() for r, place in zip(cells.row, controls.place_CS, strict=True)})
            chosen = table.iloc[controls.cells.row]
            assert (chosen["perturbation"] == "control").all()
            assert (chosen["split"] == "train").all()
            assert (controls.cells.prompts["cell_type"] > 0).all()
        return steps

    shares = [pairs(rank, world) for rank in range(world)]
    together = [{key: value for part in step for key, value in part.items()} for step in zip(*shares, strict=True)]
    assert together == pairs(0, 1)
    found = [(row, others) for step in together for row, others in step.items()]
    perturbed = [others for row, others in found if table["perturbation"][row] != "control"]
    assert all(others == [-1] * 3 for row, others in found if table["perturbation"][row] == "control")
    assert 0.3 < np.mean([others[0] >= 0 for others in perturbed]) < 0.8
    for row, others in found:
        for other in others:
            if other >= 0:
                for name in ("dataset_id", "cell_type", "time"):
                    assert table[name][row] == table[name][other]
    with pytest.raises(UsageError, match="match some of"):
        MatchedControls(match=("colour",))


def test_a_cell_whose_perturbation_has_no_code_comes_with_no_control(grown: Snapshot) -> None:
    words = read_labels(grown).values
    assert "RNA0003" in words["perturbation"]
    unknowing = read_labels(grown, words={**words, "perturbation": ["", "control"]})
    for labels, any_found in ((None, True), (unknowing, False)):
        made = Stream(grown, batch=32, block=24, window=4, controls=MatchedControls(), labels=labels)
        places = [cells.controls.place_CS for cells in made.epoch(0) if cells.controls is not None]
        assert bool((np.concatenate(places) >= 0).any()) == any_found


def test_an_unperturbed_cell_comes_with_an_earlier_one(grown: Snapshot) -> None:
    table = grown.cells().to_pandas()
    wanted = MatchedControls(share=0.0, earlier=0.8)
    found = []
    for cells in Stream(grown, batch=32, block=24, window=4, controls=wanted).epoch(0):
        controls = cells.controls
        assert controls is not None
        place = controls.place_CS[:, 0]
        found += zip(cells.row[place >= 0], controls.cells.row[place[place >= 0]], strict=True)
    assert len(found) > 20
    for row, other in found:
        assert table["time"][other] < table["time"][row]
        assert table["dataset_id"][other] == table["dataset_id"][row]
        assert {table["perturbation"][row], table["perturbation"][other]} <= {"", "control"}
    assert len({table["cell_type"][row] == table["cell_type"][other] for row, other in found}) == 2
    with pytest.raises(UsageError, match="share and earlier from 0 to 1"):
        MatchedControls(earlier=1.5)


def test_telemetry_tells_a_mixed_stream_from_one_in_runs(grown: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stream(grown, batch=64, block=16, window=4)
    assert np.isnan(made.telemetry.ratio)
    list(made.epoch(0))
    assert 0.97 < made.telemetry.ratio < 1.05
    sorted_once = ShuffleTelemetry(np.array([0.5, 0.5]))
    for number in range(10):
        sorted_once.add(np.full(64, number // 5, np.int32))
    assert sorted_once.ratio == 0


SPAWNED = {"num_workers": 2, "multiprocessing_context": "spawn"}


@pytest.mark.parametrize("words", [{}, SPAWNED], ids=["here", "workers"])
def test_a_dataloader_with_workers_gives_the_same_batches_in_the_same_order_and_resumes(
    snapshot: Snapshot, words: dict[str, object]
) -> None:
    def made() -> Stream:
        return Stream(snapshot, batch=32, tokens=TOKENS, block=20, window=3)

    expected = [tokens.feature_CL for tokens in made().epoch(1, rank=1, world=2, start=0)]
    stream = made()
    first = EpochDataset(stream, 1, rank=1, world=2, start=2)
    assert len(first) == len(expected) - 2
    taken = []
    for tokens in EpochLoader(first, batch_size=None, **words):
        taken.append(tokens.feature_CL)
        if len(taken) == 2:
            break
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["step"] == len(expected) + 4
    resumed = made()
    resumed.load_state_dict(state)
    rest = EpochDataset(resumed, 1, rank=1, world=2)
    assert len(rest) == len(expected) - 4
    taken += [tokens.feature_CL for tokens in EpochLoader(rest, batch_size=None, **words)]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected[2:], strict=True))
    assert resumed.state_dict()["step"] == 2 * len(expected)
    assert len(EpochDataset(resumed, 1)) == len(EpochDataset(resumed, 2)) == len(expected)


def test_a_dataloader_resumes_or_says_that_it_would_not(snapshot: Snapshot) -> None:
    stream = Stream(snapshot, batch=32, block=20, window=3)
    rows = [cells.row.tolist() for cells in stream.epoch(0)]
    state = stream.state_dict() | {"step": 3}
    before = EpochDataset(stream)
    stream.load_state_dict(state)
    with pytest.raises(UsageError, match="call load_state_dict before, or say start"):
        next(iter(before))
    plain = DataLoader(EpochDataset(stream), batch_size=None)
    assert [cells.row.tolist() for cells in plain] == rows[3:]
    stream.load_state_dict(state)
    workers = DataLoader(EpochDataset(stream), batch_size=None, **SPAWNED)
    assert [cells.row.tolist() for cells in workers] == rows[3:]
    with pytest.raises(UsageError, match=r"use train\.dataset\.EpochLoader in its place"):
        stream.state_dict()
    assert [cells.row.tolist() for cells in DataLoader(EpochDataset(stream, 1), batch_size=None)] != rows
    assert stream.state_dict()["step"] == 2 * len(rows)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """Two slides of 20 x 20 cells on a grid, in random order, as sets of 16 neighbours; and cells without a place."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    rng = np.random.default_rng(0)
    with LakeWriter(uri) as writer:
        for number, name in enumerate(("left", "right")):
            plan = DatasetPlan(name, "homo_sapiens", f"key-{name}", 400, {"RNA": numbered("RNA", 30)})
            reservation = writer.reserve(plan)
            place = rng.permutation(400)
            obs = pd.DataFrame(
                {
                    "cell_id": [f"{name}-{cell}" for cell in range(400)],
                    "sample_id": name,
                    "x": place % 20 * 1.5,
                    "y": place // 20 * 1.5,
                }
            )
            block = write_counts(reservation, "RNA", 0, encoded_counts(1000 * number, 400, 30))
            writer.commit(reservation, obs, [block])
        add_dataset(writer, "loose", 70, {"RNA": 30})
    return create_snapshot(uri, "sets", SnapshotSettings(set_size=16, set_by=("dataset_id",), seed=4))


@pytest.mark.parametrize(("lanes", "world"), [(1, 1), (1, 3), (4, 4)])
def test_sets_come_whole_once_an_epoch_and_are_niches(tissue: Snapshot, lanes: int, world: int) -> None:
    table = tissue.cells().to_pandas()
    lake = open_lake(tissue.lake_uri)
    places = lake.obs("homo_sapiens", None, ["soma_joinid", "x", "y"]).to_pandas().set_index("soma_joinid")
    seen: list[int] = []
    sizes = []
    for rank in range(world):
        made = Stream(tissue, batch=8, block=64, window=4, lanes=lanes, sets=True)
        for cells in made.epoch(1, rank=rank, world=world):
            assert cells.set_C is not None
            seen += cells.row.tolist()
            for number in np.unique(cells.set_C):
                rows = cells.row[cells.set_C == number]
                assert (np.diff(rows) == 1).all()
                lines = table.iloc[rows]
                assert lines["dataset_id"].nunique() == 1
                sizes.append(len(rows))
                if lines["dataset_id"].iloc[0] != "loose":
                    where = places.loc[lines["soma_joinid"]].to_numpy()
                    extent = where.max(axis=0) - where.min(axis=0)
                    sizes[-1] = len(rows) if extent.max() <= 21 else -1
            for number, row in enumerate(cells.row):
                line = table.iloc[row]
                cell = int(line["cell_id"].rsplit("-", 1)[1]) + 1000 * (line["dataset_id"] == "right")
                ids = [int(name.removeprefix("RNA")) for name in tissue.vocabulary("RNA")["feature_id"].to_pylist()]
                assert (dense(cells.counts["RNA"], number, 30) == encoded_counts(cell, 1, 30).toarray()[0][ids]).all()
                break
    assert sorted(seen) == np.flatnonzero(table["split"] == "train").tolist()
    assert sizes.count(16) > 0.85 * len(sizes)
    random_extent = places.iloc[:400].to_numpy()[:16]
    assert (random_extent.max(axis=0) - random_extent.min(axis=0)).max() > 21


def test_sets_need_a_snapshot_of_sets_and_come_ragged(snapshot: Snapshot, tissue: Snapshot) -> None:
    with pytest.raises(UsageError, match=r"has no sets; make a snapshot that has: .* set_size=32"):
        Stream(snapshot, batch=4, sets=True)
    with pytest.raises(UsageError, match="ragged batches and without weights"):
        Stream(tissue, batch=4, sets=True, tokens=TOKENS)
    alone = [cells.row.tolist() for cells in Stream(tissue, batch=32, block=64).epoch(0)]
    assert sorted(chain.from_iterable(alone)) == list(range(tissue.splits["train"]))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"batch": 0}, "batch = 0: at least 1"),
        ({"batch": -3}, "batch = -3: at least 1"),
        ({"threads": 0}, "threads = 0: at least 1"),
        ({"measurements": "RNA"}, r"measurements = 'RNA': say a list, \['RNA'\]"),
    ],
)
def test_what_no_stream_can_be_made_of_is_refused(snapshot: Snapshot, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Stream(snapshot, **{"batch": 8, "block": 16} | asked)


def test_a_number_that_no_stream_reaches_is_refused_and_one_that_means_no_end_is_not(snapshot: Snapshot) -> None:
    one = stream(snapshot)
    with pytest.raises(UsageError, match="epoch = 1180591620717411303424: no stream has come so far"):
        next(one.epoch(2**70))
    with pytest.raises(UsageError, match="start = 1180591620717411303424: no stream has come so far"):
        next(one.steps(2**70, 2**70 + 1))
    first = next(one.epoch(0))
    assert next(one.steps(0, sys.maxsize)).row.tolist() == first.row.tolist()


def test_ranks_are_counted_from_nought_and_a_mixture_has_snapshots(snapshot: Snapshot) -> None:
    stream = Stream(snapshot, batch=8, block=16)
    for rank, world, said in (
        (2, 2, "rank = 2 of world = 2: ranks are counted from 0"),
        (-1, 2, "rank = -1: at least 0"),
        (0, 0, "world = 0: at least 1"),
        (0.5, 2, "rank = 0.5: a whole number"),
        (1, 2.5, "world = 2.5: a whole number"),
        (0, "2", "world = '2': a whole number"),
    ):
        with pytest.raises(UsageError, match=said):
            next(iter(stream.epoch(0, rank=rank, world=world)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no snapshot is named"):
        Stream({}, batch=8)
