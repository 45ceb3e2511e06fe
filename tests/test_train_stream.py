"""The stream: every streamed cell carries its own counts and labels; a step number is all that is needed to resume."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from encoded import add_dataset, encoded_counts

from store.errors import UsageError, VerificationError
from store.part import Part
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.cells import Cells, Csr
from train.labels import read_labels
from train.stream import Stream
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


def test_an_error_of_the_reading_thread_reaches_the_consumer(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Part, *where: object) -> None:
        raise VerificationError("RNA/counts: damaged")

    monkeypatch.setattr(Part, "read_into", broken)
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


def test_a_loader_of_torch_yields_the_same_batches_from_a_process_of_its_own(one_measurement: Snapshot) -> None:
    stream = Stream(one_measurement, batch=60, block=16, window=4, tokens=TOKENS)
    loader = torch.utils.data.DataLoader(
        EpochOf(stream, 1), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for one, other in zip(loader, stream.epoch(1), strict=True):
        same_tokens(one, other)


class EpochOf(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """One epoch of a stream as torch wants it."""

    def __init__(self, stream: Stream, epoch: int) -> None:
        self.stream, self.epoch = stream, epoch

    def __iter__(self) -> Iterator[Tokens]:
        return self.stream.epoch(self.epoch)


def test_too_large_a_window_is_refused_with_what_it_takes(one_measurement: Snapshot) -> None:
    with pytest.raises(UsageError, match=r"3 windows of RNA take .* MiB are allowed; choose a smaller window"):
        next(Stream(one_measurement, batch=16, memory_bytes=1000).epoch(0))
    with pytest.raises(UsageError, match="larger than a window of 32"):
        Stream(one_measurement, batch=40, block=16, window=2)
    with pytest.raises(UsageError, match="no measurement 'ATAC'"):
        Stream(one_measurement, batch=40, measurements=["ATAC"])


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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_lanes_ranks_share_the_reading_and_the_steps_stay_the_same(
    one_measurement: Snapshot, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    words = {"batch": 32, "block": 16, "window": 8, "lanes": 4, "seed": 5}
    alone = [sorted(identity(cells)) for cells in Stream(one_measurement, **words).epoch(0)]
    read: list[int] = []
    whole = Part.read_into

    def counted(self: Part, measurement: str, start: int, features: np.ndarray, counts: np.ndarray) -> None:
        read.append(len(features))
        whole(self, measurement, start, features, counts)

    monkeypatch.setattr(Part, "read_into", counted)
    shares = []
    for rank in range(world):
        stream = Stream(one_measurement, **words)
        last = stream.plan.steps_per_epoch
        shares.append([identity(cells) for cells in stream.steps(0, last, rank=rank, world=world)])
    assert [sorted(chain.from_iterable(step)) for step in zip(*shares, strict=True)] == alone
    everything = one_measurement.manifest["measurements"]["RNA"]["nnz"]
    assert sum(read) < 2.2 * everything  # the last window is read by all
    with pytest.raises(UsageError, match="lanes = 3 does not divide window = 8"):
        Stream(one_measurement, **(words | {"lanes": 3}))


def test_more_ranks_than_cells_of_a_step_leave_some_without(one_measurement: Snapshot) -> None:
    words = {"batch": 4, "block": 16, "window": 8, "lanes": 8, "tokens": TOKENS}
    rows = []
    for rank in range(8):
        shares = [made.row_C.tolist() for made in Stream(one_measurement, **words).epoch(0, rank=rank, world=8)]
        assert max(map(len, shares)) <= 1
        rows += list(chain.from_iterable(shares))
    assert sorted(rows) == list(range(*one_measurement.parts[0].split_rows["train"]))
