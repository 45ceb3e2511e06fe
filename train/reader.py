"""This module reads a part's rows ahead of their use, window by window, in threads and within a bounded memory.

A window is some blocks of consecutive rows. Its values are decoded straight into a slot: arrays that are kept and used
again, because on many machines fresh pages cost as much as decoding. The slots are all that reading holds.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.part import NUMBERS, Part
from train.cache import BlockCache
from train.cells import Spans

Block = tuple[int, int]
"""Rows from the first to behind the last."""
Said = tuple[NDArray[np.int32], NDArray[np.float32]]
"""What is said of a block's rows: codes_FR and numbers_FR."""


@dataclass
class Slot:
    """Room for the values of one window."""

    features: dict[str, NDArray[Any]] = field(default_factory=dict)
    counts: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """The decoded rows of a window.

    Attributes:
        numbers: Number of each block in the source's plan, ascending.
        firsts: First row of each block.
        offsets: Where the rows of each block begin among the window's rows; one longer.
        spans: Measurement to all rows, block after block.
        codes_RF: What is said of the rows: codes of the reader's fields, in the snapshot's numbering.
        numbers_RF: ``store.part.NUMBERS`` of the rows.
        slot: What holds the values.
        notes: What users of the window found out about it and need again.
    """

    numbers: NDArray[np.int64]
    firsts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    spans: dict[str, Spans]
    codes_RF: NDArray[np.int32]
    numbers_RF: NDArray[np.float32]
    slot: Slot
    notes: dict[Any, Any] = field(default_factory=dict)

    def rows(self) -> NDArray[np.int64]:
        """Return the part's row of each of the window's rows."""
        lengths = np.diff(self.offsets)
        return np.repeat(self.firsts - self.offsets[:-1], lengths) + np.arange(self.offsets[-1])

    def places(self, numbers: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where rows of these blocks lie among the window's; -1 for those that it does not hold."""
        if len(self.numbers) == 0:
            return np.full(len(rows), -1)
        block = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        within = rows - self.firsts[block]
        held = (self.numbers[block] == numbers) & (within >= 0) & (within < np.diff(self.offsets)[block])
        return np.where(held, self.offsets[block] + within, -1)


class Budget:
    """What the slots of several readers may hold together, and what each of them needs so far."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._needed: dict[int, int] = {}
        self._lock = threading.Lock()

    def claim(self, reader: object, needed: int) -> int:
        """Note what a reader needs; return what all need."""
        with self._lock:
            self._needed[id(reader)] = max(needed, self._needed.get(id(reader), 0))
            return sum(self._needed.values())


class Reader:
    """Reads windows of one part in the order in which they are asked for.

    Args:
        part: What is read.
        measurements: Which measurements.
        fields: Which of ``store.part.FIELDS``.
        threads: Threads that decode; several readers may share them.
        beside: Threads that read the second of two arrays while the first is read; without, one comes after the other.
        small_threads: Threads of its own that read lengths and labels.
        budget: What the slots may hold together, with those of other readers.
        slots: Room for the windows in memory: the one in use, the next, those that are being read.
        cache: Where decoded blocks are looked for first, and kept.
    """

    def __init__(
        self,
        part: Part,
        measurements: Sequence[str],
        fields: Sequence[str],
        *,
        threads: ThreadPoolExecutor,
        beside: ThreadPoolExecutor | None = None,
        small_threads: int = 1,
        budget: Budget,
        slots: Sequence[Slot],
        cache: BlockCache | None = None,
    ) -> None:
        self.part, self.measurements, self.fields = part, tuple(measurements), tuple(fields)
        self.budget, self.cache = budget, cache
        self._fields_mark = zlib.crc32(" ".join(self.fields).encode())
        self._lengths = ThreadPoolExecutor(1, thread_name_prefix="somaflow-lengths")
        self._small = ThreadPoolExecutor(small_threads, thread_name_prefix="somaflow-small")
        self._values, self._beside = threads, beside
        self._free, self._n_slots = list(slots), len(slots)
        self._returned = threading.Semaphore(len(self._free))
        self._closed = False

    def close(self) -> None:
        """Begin nothing more, and end the thread that begins. The threads that decode are the caller's."""
        self._closed = True
        self._returned.release()
        self._lengths.shutdown(wait=True, cancel_futures=True)
        self._small.shutdown(wait=True, cancel_futures=True)

    def ask(self, numbers: NDArray[np.int64], blocks: Sequence[Block]) -> Future[Window]:
        """Read a window, blocks with their numbers in ascending order, as soon as a slot is free."""
        answer: Future[Window] = Future()
        self._lengths.submit(self._begin, numbers, blocks, answer)
        return answer

    def give_back(self, window: Window) -> None:
        """Say that a window's values are no longer looked at."""
        self._free.append(window.slot)
        self._returned.release()

    def _begin(self, numbers: NDArray[np.int64], blocks: Sequence[Block], answer: Future[Window]) -> None:
        """Find out how long the rows are, then have the blocks read side by side."""
        try:
            names = [name for name in self.measurements for _ in blocks]
            asked = self._small.map(self._block_lengths, names, [*blocks] * len(self.measurements))
            said = [self._small.submit(self._block_labels, block) for block in blocks]  # while values are read
            found = list(asked)
            lengths = {
                name: found[number * len(blocks) : (number + 1) * len(blocks)]
                for number, name in enumerate(self.measurements)
            }
            self._returned.acquire()
            if self._closed:
                answer.cancel()
                return
            slot = self._free.pop(0)
            reads, spans = [], {}
            for name, parts in lengths.items():
                sizes = [int(part.sum()) for part, _ in parts]
                starts = np.concatenate([[0], np.cumsum(sizes)])
                features, counts = self._room(slot, name, int(starts[-1]))
                for block, (part, first), start, size in zip(blocks, parts, starts, sizes, strict=False):
                    where = slice(int(start), int(start) + size)
                    reads.append((name, block, part, first, features[where], counts[where]))
                length = np.concatenate([np.empty(0, np.int64), *(part for part, _ in parts)])
                spans[name] = Spans(np.cumsum(length) - length, length, features, counts)
            offsets = np.cumsum([0, *(stop - start for start, stop in blocks)])
            firsts = np.array([start for start, _ in blocks])
            window = partial(Window, numbers, firsts, offsets, spans, slot=slot)
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
            answer.set_exception(error)
            return
        waiting = _Countdown(len(reads), answer, lambda: window(*self._together(said)))
        for read in reads:
            self._values.submit(waiting.run, self._read, *read)
        if not reads:
            waiting.end()

    def _together(self, said: Sequence[Future[Said]]) -> Said:
        """Return codes_RF and numbers_RF of the rows of all blocks."""
        parts = [one.result() for one in said]
        codes = [np.empty((len(self.fields), 0), np.int32), *(codes for codes, _ in parts)]
        numbers = [np.empty((len(NUMBERS), 0), np.float32), *(numbers for _, numbers in parts)]
        # row by row in memory: batches take whole rows
        codes_RF, numbers_RF = (np.ascontiguousarray(np.concatenate(part, axis=1).T) for part in (codes, numbers))
        return codes_RF, numbers_RF

    def _block_labels(self, block: Block) -> Said:
        key = (self.part.id, f"labels-{self._fields_mark}", *block)
        size = block[1] - block[0]
        codes, numbers = np.empty((len(self.fields), size), np.int32), np.empty((len(NUMBERS), size), np.float32)
        if not (self.cache and self.cache.load(key, codes.reshape(-1), numbers.reshape(-1))):
            codes, numbers = self.part.codes(self.fields, *block), self.part.numbers(*block)
            if self.cache:
                self.cache.store(key, np.empty(0, np.int64), codes.reshape(-1), numbers.reshape(-1))
        return codes, numbers

    def _block_lengths(self, name: str, block: Block) -> tuple[NDArray[np.int64], int | None]:
        """Return how long the rows of a block are, and where its values begin in the part if that was read."""
        known = self.cache.lengths(self._key(name, block)) if self.cache else None
        if known is not None:
            return known, None
        indptr = self.part.indptr(name, *block)
        return np.diff(indptr), int(indptr[0])

    def _read(
        self,
        name: str,
        block: Block,
        lengths: NDArray[np.int64],
        first: int | None,
        features: NDArray[Any],
        counts: NDArray[Any],
    ) -> None:
        if self.cache and self.cache.load(self._key(name, block), features, counts):
            return
        if first is None:  # the file went between the question and now
            first = int(self.part.indptr(name, block[0], block[0])[0])
        self.part.read_into(name, first, features, counts, beside=self._beside)
        if self.cache:
            self.cache.store(self._key(name, block), lengths, features, counts)

    def _key(self, name: str, block: Block) -> tuple[str, str, int, int]:
        return (self.part.id, name, *block)

    def _room(self, slot: Slot, name: str, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if name not in slot.features or len(slot.features[name]) < size:
            kinds = [self.part.dtype(name, member) for member in ("features", "counts")]
            room = int(size * 1.05) + 1
            own = room * sum(kind.itemsize for kind in kinds)
            others = sum(held[one].nbytes for held in (slot.features, slot.counts) for one in held if one != name)
            needed = self.budget.claim(self, self._n_slots * (own + others))
            if needed > self.budget.n_bytes:
                own_mib, all_mib, allowed_mib = (n / 2**20 for n in (self._n_slots * own, needed, self.budget.n_bytes))
                raise UsageError(
                    f"{self.part.uri}: {self._n_slots} windows take {own_mib:,.3g} MiB ({name}), with all that is read "
                    f"beside them {all_mib:,.3g}, and {allowed_mib:,.3g} MiB are allowed; choose a smaller window or "
                    "block, or allow more"
                )
            # every page is touched once, here; np.zeros would leave that to the first read
            slot.features[name], slot.counts[name] = (np.full(room, 0, kind) for kind in kinds)
        return slot.features[name], slot.counts[name]


class _Countdown:
    """Gives the answer when the last of several reads has ended."""

    def __init__(self, n_reads: int, answer: Future[Window], window: Callable[[], Window]) -> None:
        self._left, self._answer, self._window = n_reads, answer, window
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self, read: Any, *words: Any) -> None:
        try:
            if self._error is None:
                read(*words)
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
            self._error = error
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.end()

    def end(self) -> None:
        """Give the answer: what is said of the rows may still be read."""
        try:
            if self._error is not None:
                raise self._error
            window = self._window()
        except BaseException as error:  # noqa: BLE001  it belongs to whoever waits
            self._answer.set_exception(error)
        else:
            self._answer.set_result(window)
