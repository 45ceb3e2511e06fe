"""The state of a stream: where a loop over epochs goes on, and which states are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from encoded import add_dataset

from store.errors import UsageError
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.dataset import EpochDataset, EpochLoader
from train.stream import Stream
from train.tokens import TokenSettings

EPOCHS, STEPS, BATCH = 3, 10, 20


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", STEPS * BATCH, {"RNA": 20, "protein": 6})
    return create_snapshot(uri, "s", SnapshotSettings(seed=2, fractions={"train": 1.0}))


def made(snapshot: Snapshot, **words: Any) -> Stream:
    return Stream(snapshot, **({"batch": BATCH, "block": 16, "window": 4} | words))


def by_epoch(stream: Stream, epoch: int, rank: int, world: int) -> Iterator[Any]:
    return stream.epoch(epoch, rank=rank, world=world)


def by_loader(stream: Stream, epoch: int, rank: int, world: int) -> Iterator[Any]:
    dataset = EpochDataset(stream, epoch, rank=rank, world=world)
    batches = list(EpochLoader(dataset, batch_size=None))
    assert len(dataset) == len(batches)
    return iter(batches)


def loop(stream: Stream, epoch: Any = by_epoch, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Train as the docs say: over all epochs."""
    return [cells.row.tolist() for number in range(EPOCHS) for cells in epoch(stream, number, rank, world)]


@pytest.mark.parametrize("step", [0, 3, STEPS, STEPS + 3, 2 * STEPS, EPOCHS * STEPS - 1, EPOCHS * STEPS])
@pytest.mark.parametrize("epoch", [by_epoch, by_loader])
def test_the_same_loop_over_all_epochs_goes_on_at_exactly_the_next_step_at_any_number_of_ranks(
    snapshot: Snapshot, step: int, epoch: Any
) -> None:
    whole = loop(made(snapshot))
    stopped = made(snapshot)
    taken = [cells.row.tolist() for cells in stopped.steps(0, step)]
    state = json.loads(json.dumps(stopped.state_dict()))
    for world in (1, 3):
        streams = [made(snapshot) for _ in range(world)]
        for stream in streams:
            stream.load_state_dict(state)
        parts = [loop(stream, epoch, rank, world) for rank, stream in enumerate(streams)]
        rest = [sorted(row for part in step_ for row in part) for step_ in zip(*parts, strict=True)]
        assert [sorted(rows) for rows in taken] + rest == [sorted(rows) for rows in whole]
        assert {stream.step for stream in streams} == {EPOCHS * STEPS}


def test_a_loop_goes_on_again_after_an_error_in_the_epoch_in_which_it_went_on(snapshot: Snapshot) -> None:
    stream, whole = made(snapshot), loop(made(snapshot))
    stream.load_state_dict(stream.state_dict() | {"step": STEPS + 2})
    for epoch in range(2):
        for cells in stream.epoch(epoch):
            assert cells.row.tolist() == whole[stream.step - 1]
            if stream.step == STEPS + 5:
                break
    assert loop(stream) == whole[STEPS + 5 :]


def test_an_epoch_comes_again_where_no_state_was_loaded_or_its_start_is_said(snapshot: Snapshot) -> None:
    stream, whole = made(snapshot), loop(made(snapshot))
    assert loop(stream) == whole
    assert loop(stream) == whole
    stream.load_state_dict(stream.state_dict() | {"step": STEPS + 2})
    assert [len(EpochDataset(stream, epoch)) for epoch in range(3)] == [0, STEPS - 2, STEPS]
    assert [cells.row.tolist() for cells in stream.epoch(0)] == []
    assert [cells.row.tolist() for cells in stream.epoch(0, start=0)] == whole[:STEPS]
    stream.load_state_dict(stream.state_dict() | {"step": STEPS + 2})
    assert loop(stream) == whole[STEPS + 2 :]
    assert loop(stream) == whole  # the epoch in which it went on is over


@pytest.mark.parametrize("start", [STEPS + 1, 100, -1, True, 1.5])
def test_a_start_that_an_epoch_does_not_have_is_refused(snapshot: Snapshot, start: Any) -> None:
    stream = made(snapshot)
    for begun in (lambda: EpochDataset(stream, 1, start=start), lambda: next(stream.epoch(1, start=start))):
        with pytest.raises(UsageError, match=r"start = (.*: an epoch has 10 steps|-1: at least 0|.*: a whole number)"):
            begun()
    assert list(stream.epoch(1, start=STEPS)) == []
    with pytest.raises(UsageError, match="epoch = -1: at least 0"):
        EpochDataset(stream, -1)


def test_a_state_of_other_measurements_or_values_is_refused_as_numbers_of_features_mean_others(
    snapshot: Snapshot,
) -> None:
    counts, ranks = TokenSettings(budget=8), TokenSettings(values="rank", budget=8)
    state = json.loads(json.dumps(made(snapshot, tokens=counts).state_dict()))
    with pytest.raises(UsageError, match=r"measurements = \['protein'\] and the saved one had \['RNA', 'protein'\]"):
        made(snapshot, tokens=counts, measurements=["protein"]).load_state_dict(state)
    with pytest.raises(UsageError, match=r"measurements = \['protein', 'RNA'\] and the saved one had"):
        made(snapshot, tokens=counts, measurements=["protein", "RNA"]).load_state_dict(state)
    with pytest.raises(UsageError, match="values = 'rank' and the saved one had 'log1p'"):
        made(snapshot, tokens=ranks).load_state_dict(state)
    made(snapshot, tokens=TokenSettings(budget=16), measurements=["RNA", "protein"]).load_state_dict(state)
    made(snapshot).load_state_dict(state)  # ragged: what is made of them is not the stream's
    made(snapshot, tokens=ranks).load_state_dict(made(snapshot).state_dict())
    of_before = {key: value for key, value in state.items() if key not in ("measurements", "values")}
    made(snapshot, tokens=ranks, measurements=["protein"]).load_state_dict(of_before)
