"""DataLoaders of a stream: who counts the batches that are taken, and what is refused."""

from __future__ import annotations

import pickle

import pytest
from encoded import add_dataset
from torch.utils.data import DataLoader

from store.errors import UsageError
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.dataset import EpochDataset, EpochLoader
from train.stream import Stream


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 200, {"RNA": 20})
    return create_snapshot(uri, "s", SnapshotSettings(seed=2, fractions={"train": 1.0}))


def test_an_epoch_loader_counts_its_own_workers_batches_and_no_other_loaders(snapshot: Snapshot) -> None:
    stream = Stream(snapshot, batch=20)
    dataset = EpochDataset(stream)
    taken = iter(EpochLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn"))
    next(taken)
    assert stream.state_dict()["step"] == 1
    pickle.dumps(dataset)  # as a plain DataLoader sends it to its workers, while the other still runs
    with pytest.raises(UsageError, match=r"use train\.dataset\.EpochLoader in its place"):
        stream.state_dict()
    taken.close()
    assert len(list(EpochLoader(dataset, batch_size=None))) == 10
    assert stream.state_dict()["step"] == 10
    pickle.dumps(dataset)
    with pytest.raises(UsageError, match=r"use train\.dataset\.EpochLoader in its place"):
        stream.state_dict()


def test_an_epoch_loader_that_would_batch_batches_and_a_start_before_the_first_are_refused(snapshot: Snapshot) -> None:
    stream = Stream(snapshot, batch=20)
    with pytest.raises(UsageError, match="batch_size = 1: say batch_size=None"):
        next(iter(EpochLoader(EpochDataset(stream))))
    for made in (lambda: EpochDataset(stream, 1, start=-2), lambda: next(stream.epoch(1, start=-2))):
        with pytest.raises(UsageError, match="start = -2: at least 0"):
            made()
    assert len(list(DataLoader(EpochDataset(stream, 1, start=8), batch_size=None))) == 2


def test_a_dataset_stays_with_its_epoch_which_kept_workers_would_not_leave(snapshot: Snapshot) -> None:
    dataset = EpochDataset(Stream(snapshot, batch=10), 1)
    for name in ("epoch", "rank", "world", "start"):
        with pytest.raises(UsageError, match=f"{name} = 2: an EpochDataset is of one epoch and rank; make a new one"):
            setattr(dataset, name, 2)
    assert (dataset.epoch, dataset.rank, dataset.world, dataset.start) == (1, 0, 1, 0)
    assert pickle.loads(pickle.dumps(dataset)).epoch == 1
