"""This module puts a stream into ``torch.utils.data``, for code that wants a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from store.errors import UsageError
from train.stream import Stream


class EpochDataset(IterableDataset[Any]):
    """One rank's batches of one epoch of a stream, in order, for ``DataLoader(..., batch_size=None)``.

    A DataLoader that is not told ``batch_size=None`` would put batches of cells into batches.

    The stream's own threads do the work, so ``num_workers=0`` is fastest. Workers (``multiprocessing_context="spawn"``)
    take turns: of n of them each makes every n-th batch, and reads everything. They do not tell the stream here which
    batches were taken: whoever wants its ``state_dict`` then takes an ``EpochLoader``.

    Args:
        stream: The stream.
        epoch: The epoch.
        rank: This process of the training.
        world: All of them.
        start: Step of the epoch to begin with; left out, that with which ``stream.epoch`` would begin now.

    Attributes:
        start: The step of the epoch with which it begins; as many as the epoch has where none is left of it.
        counted: It goes to the workers of an ``EpochLoader``, which counts the batches that are taken.
    """

    def __init__(
        self, stream: Stream, epoch: int = 0, *, rank: int = 0, world: int = 1, start: int | None = None
    ) -> None:
        self.stream, self.epoch, self.rank, self.world = stream, epoch, rank, world
        self.start = stream.start_of(epoch, start)
        self.counted = False
        self._made_for = None if start is not None else stream.loaded

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what may change; the epoch and the rank may not, for workers that are kept would go on with their own."""
        if name in ("epoch", "rank", "world", "start") and name in self.__dict__:
            raise UsageError(
                f"{name} = {value!r}: an EpochDataset is of one epoch and rank; make a new one, and a new loader, for "
                "each epoch"
            )
        super().__setattr__(name, value)

    @property
    def first_step(self) -> int:
        """The step of the whole training with which it begins.

        Raises:
            UsageError: The stream was told another step after this was made.
        """
        if self._made_for not in (None, self.stream.loaded):
            raise UsageError(
                "the stream was given a saved state after this EpochDataset was made, which would begin elsewhere: "
                "call load_state_dict before, or say start"
            )
        return self.epoch * self.stream.plan.steps_per_epoch + self.start

    def __len__(self) -> int:
        return self.stream.plan.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            self.stream.uncounted = False
        turn, every = (worker.id, worker.num_workers) if worker else (0, 1)
        stop = (self.epoch + 1) * self.stream.plan.steps_per_epoch
        return self.stream.steps(self.first_step + turn, stop, rank=self.rank, world=self.world, every=every)

    def __getstate__(self) -> dict[str, Any]:
        """Go to a worker, whose batches only an ``EpochLoader`` counts here."""
        if not self.counted:
            self.stream.uncounted = True
        return self.__dict__


class EpochLoader(DataLoader[Any]):
    """A DataLoader of an :class:`EpochDataset` whose stream knows the next step also where workers make the batches.

    Workers are ahead of whoever takes their batches; the stream's ``state_dict`` speaks of those that were taken.
    """

    dataset: EpochDataset

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises a class of its own
        if self.batch_size is not None:
            raise UsageError(f"batch_size = {self.batch_size}: say batch_size=None, the stream's batches are whole")
        first, self.dataset.stream.uncounted = self.dataset.first_step, False
        self.dataset.counted = True
        try:
            batches = super().__iter__()  # starts the workers
        finally:
            self.dataset.counted = False
        for number, batch in enumerate(batches):
            self.dataset.stream.step = first + number + 1
            yield batch
