"""This module puts a stream into ``torch.utils.data``, for code that wants a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from train.stream import Stream


class EpochDataset(IterableDataset[Any]):
    """One rank's batches of one epoch of a stream, in order, for ``DataLoader(..., batch_size=None)``.

    The stream's own threads do the work, so ``num_workers=0`` is fastest. Workers (``multiprocessing_context="spawn"``)
    take turns: of n of them each makes every n-th batch, and reads everything.

    Args:
        stream: The stream.
        epoch: The epoch.
        rank: This process of the training.
        world: All of them.
        start: Step of the epoch to begin with.
    """

    def __init__(self, stream: Stream, epoch: int = 0, *, rank: int = 0, world: int = 1, start: int = 0) -> None:
        self.stream, self.epoch, self.rank, self.world, self.start = stream, epoch, rank, world, start

    def __len__(self) -> int:
        return self.stream.plan.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        turn, every = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.epoch * self.stream.plan.steps_per_epoch
        stop = first + self.stream.plan.steps_per_epoch
        return self.stream.steps(first + self.start + turn, stop, rank=self.rank, world=self.world, every=every)
