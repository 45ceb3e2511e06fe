"""This module streams a snapshot's cells, ragged or as tokens, in the order of the sample plan.

Stages overlap: threads decode the windows to come, others make the batches to come, the consumer takes them in order.

Shape letters used in this module:
    C  cells      D  datasets      G  features of a measurement      T  targets of a perturbation
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from store.errors import UsageError
from store.schema import measured_column
from store.snapshot import LABELS, Snapshot
from train import kernels
from train.cache import BlockCache
from train.cells import NUMBERS, PROMPTS, Cells, Csr, Spans
from train.plan import SamplePlan
from train.reader import SLOTS, Reader, Slot, Window
from train.tokens import TokenSettings, fast_tokens, first_numbers, make_tokens

MEMORY_BYTES = 512 * 2**20
CACHE_BYTES = 50 * 2**30
BATCHES_AHEAD = 4


@dataclass(frozen=True)
class Labels:
    """Codes of what is said of every row of a snapshot, and the values behind the codes."""

    values: dict[str, list[str]]
    prompts: dict[str, NDArray[np.int32]]
    perturbation: NDArray[np.int32]
    numbers: dict[str, NDArray[np.float32]]
    measured: dict[str, NDArray[np.bool_]]
    panel: NDArray[np.int32]


NOT_SAID = {"", "unknown", "na", "nan"}


def read_labels(snapshot: Snapshot, learned: str | None = None) -> Labels:
    """Code the labels of a snapshot; values are numbered in alphabetical order after "" (not said).

    Args:
        snapshot: Whose labels.
        learned: The split that is trained on: a value that only other splits have gets no code and is "not said"
            there, so that a checkpoint never claims to know what it was not shown. None codes every value.
    """
    cells = snapshot.cells().to_pandas()
    mine = cells["split"].eq(learned) if learned is not None else pd.Series(True, index=cells.index)
    values, prompts = {}, {}
    for name in PROMPTS:
        said = cells[name].astype(str).where(~cells[name].isin(NOT_SAID), "")
        values[name] = ["", *sorted(set(said[mine]) - {""})]
        prompts[name] = np.maximum(_codes(said, values[name]), 0)
    split = cells["perturbation"].astype(str).str.split("+")
    names = sorted({name for parts in split[mine] for name in parts} - {"", "control"})
    values["perturbation"] = ["", "control", *names]
    n_targets = max(1, int(split.str.len().max()))
    columns = [split.str[number].fillna("") for number in range(n_targets)]
    targets = np.stack([_codes(column, values["perturbation"]) for column in columns], axis=1)
    targets[(targets < 0).any(axis=1)] = 0  # one unknown target makes the whole combination unknown
    return Labels(
        values=values,
        prompts=prompts,
        perturbation=targets,
        numbers={name: cells[name].to_numpy(np.float32) for name in NUMBERS},
        measured={name: cells[measured_column(name)].to_numpy(bool) for name in snapshot.measurements},
        panel=_codes(cells["dataset_id"], list(snapshot.datasets)),
    )


def _codes(column: pd.Series, values: list[str]) -> NDArray[np.int32]:
    return pd.Categorical(column, categories=values).codes.astype(np.int32)


class Stream:
    """One split of a snapshot as batches of cells.

    ::

        stream = Stream(open_snapshot(lake, name), batch=256, tokens=TokenSettings(budget=2048))
        for tokens in stream.epoch(0, rank=rank, world=world):
            ...

    The only state is the number of the next step: ``state_dict()`` and ``load_state_dict()`` carry it, and any number
    of ranks goes on where any other stopped.

    Args:
        snapshot: What is streamed.
        batch: Cells of a step, over all ranks.
        seed: Decides the order, and the chances of tokens.
        split: The split.
        tokens: How cells become :class:`~train.tokens.Tokens`, by chance as training needs it; without it batches are
            ragged :class:`~train.cells.Cells`.
        measurements: Which measurements; all when left out.
        block: Consecutive rows that are read together.
        window: Blocks whose rows are mixed.
        lanes: Parts of a window that ranks read apart, so that no rank reads everything: as many as there are ranks, or
            a multiple; divides ``window``. Part of the order, whatever the number of ranks.
        threads: Threads that decode, and as many that make batches.
        memory_bytes: Most that decoded windows may take.
        cache: A folder for decoded blocks, or a cache that several streams share: from the second epoch on nothing is
            decoded.
        cache_bytes: What that folder may hold.
        weights: How often each cell of the split comes, relative to the others: numbers in row order, or a label (as
            ``"cell_type"``) whose values then come equally often. An epoch has as many cells as the split has; a cell
            comes as often as it should up to one, rare ones several times, common ones in some epochs.
        balance: Deal a batch out so that ranks get about equally many non-zeros, not only equally many cells; not with
            several lanes, where a rank has only its own to choose from.
        labels: What is said of the cells, if it was read before.

    Raises:
        UsageError: No cell is in the split, a measurement is unknown, or a batch is larger than a window.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        batch: int,
        tokens: TokenSettings | None = None,
        seed: int = 0,
        split: str = "train",
        measurements: Sequence[str] | None = None,
        block: int = 2048,
        window: int = 4,
        lanes: int = 1,
        threads: int = 2,
        memory_bytes: int = MEMORY_BYTES,
        cache: str | Path | BlockCache | None = None,
        cache_bytes: int = CACHE_BYTES,
        weights: Sequence[float] | NDArray[Any] | str | None = None,
        balance: bool = True,
        labels: Labels | None = None,
    ) -> None:
        self.snapshot = snapshot
        first, stop = snapshot.split_rows.get(split, (0, 0))
        if first == stop:
            known = ", ".join(name for name, (a, b) in sorted(snapshot.split_rows.items()) if b > a)
            raise UsageError(f"{snapshot.uri}: no cell is in split {split!r}; splits with cells: {known}")
        unknown = sorted(set(measurements or ()) - set(snapshot.measurements))
        if unknown:
            known = ", ".join(snapshot.measurements)
            raise UsageError(f"{snapshot.uri}: no measurement {unknown[0]!r}; measurements: {known}")
        self.measurements = tuple(measurements or snapshot.measurements)
        self.first_row = first
        if window % max(1, lanes):
            raise UsageError(f"lanes = {lanes} does not divide window = {window}")
        self.plan = SamplePlan(stop - first, batch, seed, block, window, lanes)
        if min(batch, self.plan.n_rows) > self.plan.window_rows:
            raise UsageError(
                f"a batch of {batch:,} cells is larger than a window of {self.plan.window_rows:,} (block times window)"
            )
        self.tokens = tokens
        self.threads, self.memory_bytes = threads, memory_bytes
        self.cache = cache if cache is None or isinstance(cache, BlockCache) else BlockCache(cache, cache_bytes)
        self.labels = labels or read_labels(snapshot)
        self.balance = balance
        self._upper = None if weights is None else self._expected(weights)
        self._copies: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self.step = 0
        sizes = snapshot.manifest["measurements"]
        self._offsets = first_numbers({name: sizes[name]["n_features"] for name in self.measurements})
        self._room = _Room()
        self._slots: list[list[Slot]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_room", "_slots")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _room=_Room(), _slots=[])

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: the next step and what its number means."""
        plan = self.plan
        return {
            "step": self.step,
            "snapshot_id": self.snapshot.id,
            "n_rows": plan.n_rows,
            "global_batch": plan.global_batch,
            "seed": plan.seed,
            "block": plan.block,
            "window": plan.window,
            "lanes": plan.lanes,
            "weights": None if self._upper is None else hashlib.sha256(self._upper.tobytes()).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood, at any number of ranks.

        Raises:
            UsageError: It streamed other cells or in another order; the message says what differs.
        """
        for key, mine in self.state_dict().items():
            if key != "step" and state[key] != mine:
                raise UsageError(f"this stream has {key} = {mine!r} and the saved one had {state[key]!r}")
        self.step = int(state["step"])

    def _expected(self, weights: Sequence[float] | NDArray[Any] | str) -> NDArray[np.float64]:
        """Return how often the cells up to each one should come together in an epoch."""
        n_rows = self.plan.n_rows
        if isinstance(weights, str):
            if weights not in LABELS:
                raise UsageError(f"weights = {weights!r} is none of: {', '.join(LABELS)}")
            column = self.snapshot.cells([weights])[weights].to_pandas()[self.first_row : self.first_row + n_rows]
            values = 1.0 / column.map(column.value_counts()).to_numpy(np.float64)
        else:
            values = np.asarray(weights, dtype=np.float64)
        if values.shape != (n_rows,) or not np.isfinite(values).all() or values.min() < 0 or values.sum() <= 0:
            raise UsageError(
                f"weights are {n_rows:,} numbers, one for each cell of the split, not negative, not all zero"
            )
        upper = np.cumsum(values)
        upper *= n_rows / upper[-1]
        upper[-1] = n_rows
        return upper

    def _drawn(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows at these positions of an epoch's cells, which lie in row order, each as often as it comes.

        Systematic sampling: with one random offset an epoch, a cell comes its expected number of times, rounded down or
        up, and all together exactly as often as there are cells (Madow 1949).
        """
        if self._upper is None:
            return self.first_row + positions
        drawn_for, rows = self._copies
        if drawn_for != epoch:
            offset = np.random.default_rng([self.plan.seed, epoch, 0]).random()
            ends = np.floor(self._upper + offset).astype(np.int64)
            rows = np.repeat(np.arange(self.first_row, self.first_row + self.plan.n_rows), np.diff(ends, prepend=0))
            self._copies = (epoch, rows)
        return rows[positions]

    def epoch(self, epoch: int, *, rank: int = 0, world: int = 1, start: int | None = None) -> Iterator[Any]:
        """Yield one rank's share of every step of an epoch: Cells, or Tokens where the stream has settings for them.

        It begins with step ``start`` of the epoch; left out, with the step at which the stream stands if that is in
        this epoch, else with the first.
        """
        first = epoch * self.plan.steps_per_epoch
        stop = first + self.plan.steps_per_epoch
        if start is None:
            start = self.step - first if first <= self.step < stop else 0
        yield from self.steps(first + start, stop, rank=rank, world=world)

    def steps(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """Yield one rank's share of global steps ``start`` to ``stop`` (exclusive), over epoch borders.

        A share may be empty when a last batch has fewer rows than there are ranks.

        Raises:
            VerificationError: The snapshot's stored bytes are damaged.
            UsageError: Windows take more memory than is allowed.
        """
        slots = self._slots.pop() if self._slots else [Slot() for _ in range(SLOTS)]
        reader = Reader(
            self.snapshot,
            self.measurements,
            threads=self.threads,
            memory_bytes=self.memory_bytes,
            slots=slots,
            cache=self.cache,
        )
        makers = ThreadPoolExecutor(self.threads, thread_name_prefix="somaflow-batch")
        windows: dict[tuple[int, int], Future[Window]] = {}
        batches: deque[Future[Any]] = deque()

        def ask(key: tuple[int, int]) -> None:
            if key not in windows:
                windows[key] = reader.ask(self._blocks(*key, rank, world))

        def submit(step: int) -> None:
            needed = self._windows(step)
            for key in needed:
                ask(key)
            if step + 1 < stop:
                ask(self._behind(needed[-1]))
            batches.append(makers.submit(self._make, [windows[key] for key in needed], step, rank, world))

        try:
            for step in range(start, min(start + BATCHES_AHEAD, stop)):
                submit(step)
            for step in range(start, stop):
                batch = batches.popleft().result()
                following = self._windows(step + 1)[0]
                for key in [key for key in windows if key < following]:
                    reader.give_back(windows.pop(key).result())
                if step + BATCHES_AHEAD < stop:
                    submit(step + BATCHES_AHEAD)
                self.step = step + 1
                yield batch
        finally:
            for waiting in windows.values():
                waiting.cancel()
            makers.shutdown(wait=True, cancel_futures=True)
            reader.close()
            self._slots.append(slots)

    def _windows(self, step: int) -> list[tuple[int, int]]:
        epoch, number = self.plan.epoch_of(step)
        first = number * self.plan.global_batch
        last = min(first + self.plan.global_batch, self.plan.n_rows) - 1
        return [(epoch, w) for w in range(first // self.plan.window_rows, last // self.plan.window_rows + 1)]

    def _behind(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, number = key
        return (epoch, number + 1) if number + 1 < self.plan.n_windows else (epoch + 1, 0)

    def _blocks(self, epoch: int, number: int, rank: int, world: int) -> list[tuple[int, int]]:
        starts = self.plan.blocks(epoch, number, rank, world) * self.plan.block
        stops = np.minimum(starts + self.plan.block, self.plan.n_rows)
        firsts, lasts = self._drawn(epoch, starts), self._drawn(epoch, stops - 1)
        return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]

    def _make(self, waiting: list[Future[Window]], step: int, rank: int, world: int) -> Any:
        balance = self.balance and self.plan.lanes == 1
        positions = self.plan.batch(step) if balance else self.plan.share(step, rank, world)
        rows = self._drawn(self.plan.epoch_of(step)[0], positions)
        if balance and world > 1:
            rows = rows[self._mine(rows, [future.result() for future in waiting], rank, world)]
        parts: dict[str, list[tuple[Spans, NDArray[np.int64]]]] = {name: [] for name in self.measurements}
        for future in waiting:
            window = future.result()
            place = window.places(rows)
            held = np.flatnonzero(place >= 0)
            for name, spans in window.spans.items():
                mine = Spans(spans.starts[place[held]], spans.lengths[place[held]], spans.features, spans.counts)
                parts[name].append((mine, held))
        name, chance = self.measurements[0], (self.plan.seed, step)
        stored = parts[name][0][0].counts.dtype.kind
        if self.tokens and self.tokens.values == "log1p" and len(parts) == 1 and stored == "u":
            cells = self._cells(rows, {})
            measured = cells.measured[name]
            return fast_tokens(parts[name], measured, cells, self._offsets[name], self.tokens, chance, self._room.take)
        cells = self._cells(rows, {key: _gathered(part, len(rows), self._room) for key, part in parts.items()})
        return make_tokens(cells, self._offsets, self.tokens, chance=chance) if self.tokens else cells

    def _mine(self, rows: NDArray[np.int64], windows: Sequence[Window], rank: int, world: int) -> NDArray[np.int64]:
        """Choose a rank's cells of a batch: dealt out from the largest to the smallest, there and back again."""
        size = np.zeros(len(rows), np.int64)
        for window in windows:
            place = window.places(rows)
            held = np.flatnonzero(place >= 0)
            size[held] = sum(spans.lengths[place[held]] for spans in window.spans.values())
        order = np.argsort(-size, kind="stable")
        turn, seat = np.divmod(np.arange(len(rows)), world)
        return np.sort(order[np.where(turn % 2, world - 1 - seat, seat) == rank])

    def _cells(self, rows: NDArray[np.int64], counts: dict[str, Csr]) -> Cells:
        """Return rows with these counts and what is said of them."""
        labels = self.labels
        return Cells(
            n_cells=len(rows),
            counts=counts,
            measured={name: labels.measured[name][rows] for name in self.measurements},
            panel=labels.panel[rows],
            prompts={name: part[rows] for name, part in labels.prompts.items()},
            perturbation=labels.perturbation[rows],
            numbers={name: part[rows] for name, part in labels.numbers.items()},
            row=rows,
        )


def _gathered(parts: Sequence[tuple[Spans, NDArray[np.int64]]], n_cells: int, room: _Room) -> Csr:
    """Copy rows that lie in several buffers into one, in the order of their places."""
    lengths = np.zeros(n_cells, np.int64)
    for spans, place in parts:
        lengths[place] = spans.lengths
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    first = parts[0][0]
    features = room.take(int(indptr[-1]), first.features.dtype)
    counts = room.take(int(indptr[-1]), first.counts.dtype)
    for spans, place in parts:
        kernels.gather(spans.starts, spans.lengths, spans.features, spans.counts, indptr[:-1][place], features, counts)
    return Csr(indptr, features, counts)


class _Room:
    """Memory for batches, used again when nobody holds the batch any more: fresh pages are slow."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, length: int, dtype: Any) -> NDArray[Any]:
        """Return an array of any content."""
        size = length * np.dtype(dtype).itemsize
        with self._lock:
            for number in range(len(self._blocks)):
                # the list and getrefcount's argument: nobody else looks at it, by whatever view
                if self._blocks[number].nbytes >= size and sys.getrefcount(self._blocks[number]) == 2:
                    return self._blocks[number][:size].view(dtype)
            block = np.zeros(-(-size * 5 // 4 // 4096) * 4096 + 4096, np.uint8)
            if len(self._blocks) < 64:
                self._blocks.append(block)
        return block[:size].view(dtype)
