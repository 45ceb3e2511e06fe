"""This module streams the cells of snapshots, ragged or as tokens, in the order of the sample plan.

Stages overlap: threads decode the windows to come, others make the batches to come, the consumer takes them in order.

Shape letters used in this module:
    B  rows of a batch      C  cells of a batch that a rank gets      S  controls of a cell
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from store.errors import UsageError
from store.part import CODED
from store.part import NUMBERS as PART_NUMBERS
from store.records import is_local
from store.schema import measured_column
from store.snapshot import Snapshot
from train.cache import BlockCache
from train.cells import CONTROL, NUMBERS, PROMPTS, Cells, Controls
from train.controls import ControlGroups, MatchedControls, find_controls, group_controls
from train.held import Held, Key, Room, fair_share, gathered
from train.labels import FIELDS, Labels, read_labels
from train.plan import RowOrder, Rows, SamplePlan
from train.plan import Window as WindowKey
from train.reader import Budget, Reader, Slot, Window
from train.sources import Source, find_sources, refuse_mixed_layers, vocabulary_sizes
from train.telemetry import ShuffleTelemetry
from train.tokens import TokenSettings, fast_tokens, first_numbers, make_tokens

MEMORY_BYTES = 512 * 2**20
CACHE_BYTES = 50 * 2**30
GROUP_CELLS = 2048
"""Steps are made together until they have so many cells: what a making costs anew is the same for one and for all."""
GROUPS_AHEAD = 3
WINDOWS_AHEAD = 1
REMOTE = 4
"""So many times more threads read from a remote store, and as many beside them: two arrays at the same time."""
KEPT_BYTES = 31 * 2**20
"""Freed once, a block of this size lets glibc keep what is freed from then on instead of giving its pages back: TileDB
takes new buffers for whatever comes from a remote store, and new pages are slow."""
EPOCHS_KEPT = 2
"""Of so many epochs at a time is kept which cells come how often: at a border steps of both are made."""
SHARES = 2**30
"""Shares of sources are told to the plan in whole numbers of this sum."""


class Stream:
    """One split of a snapshot, or of several, as batches of cells.

    ::

        stream = Stream(open_snapshot(lake, name), batch=256, tokens=TokenSettings(budget=2048))
        for tokens in stream.epoch(0, rank=rank, world=world):
            ...

    The only state is the number of the next step: ``state_dict()`` and ``load_state_dict()`` carry it, and any number
    of ranks goes on where any other stopped.

    Args:
        snapshot: What is streamed; or several snapshots, each with its share of every batch. Their vocabularies must
            begin alike (``store snapshot create --set like=...``).
        batch: Cells of a step, over all ranks; with ``sets``, sets.
        seed: Decides the order, and the chances of tokens.
        split: The split.
        tokens: How cells become :class:`~train.tokens.Tokens`, by chance as training needs it; without it batches are
            ragged :class:`~train.cells.Cells`.
        factors: For ranks: measurement to what its features' counts are divided by, factor_G, as
            :func:`train.ranks.rank_factors` finds it; ones where left out.
        measurements: Which measurements; all when left out.
        block: Consecutive rows that are read together.
        window: Blocks whose rows are mixed. Sources share ``block`` times ``window`` rows by their shares of a batch.
        lanes: Parts of a window that ranks read apart, so that no rank reads everything: as many as there are ranks, or
            a multiple; divides ``window``. Part of the order, whatever the number of ranks.
        threads: Threads that decode, and as many that make batches; from a remote store eight times as many read.
        memory_bytes: Most that decoded windows may take.
        cache: A folder for decoded blocks, or a cache that several streams share: from the second epoch on nothing is
            decoded.
        cache_bytes: What that folder may hold.
        weights: How often each cell of the split comes, relative to the others: numbers in row order, or a label (as
            ``"cell_type"``) whose values then come equally often, beside the cells of which none is said (as
            ``"unknown"``), which come as if there were no weights. An epoch has as many cells as the split has; a cell
            comes as often as it should up to one, rare ones several times, common ones in some epochs. Of several
            snapshots each keeps its share: weights choose within it.
        balance: Deal a batch out so that ranks get about equally many non-zeros, not only equally many cells; not with
            several lanes, where a rank has only its own to choose from.
        labels: What is said of the cells, if it was read before.
        controls: Unperturbed cells that perturbed ones come with; with ragged batches only.
        sets: Deal out whole sets of cells (``set_size`` of the snapshot's settings): niches, or cells that share a
            perturbation. ``Cells.set_C`` tells them apart; ranks get equally many sets, up to one.

    Attributes:
        step: The next step.
        telemetry: How well batches are mixed so far.
        loaded: How many saved states it was given.
        uncounted: Workers elsewhere make its batches, and nobody here counts those that are taken.

    Raises:
        UsageError: No cell is in the split, a measurement is unknown, a batch is larger than a window, vocabularies
            differ, or factors are not those of the features.
    """

    def __init__(
        self,
        snapshot: Snapshot | Mapping[Snapshot, float],
        *,
        batch: int,
        tokens: TokenSettings | None = None,
        seed: int = 0,
        split: str = "train",
        factors: Mapping[str, NDArray[np.float32]] | None = None,
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
        controls: MatchedControls | None = None,
        sets: bool = False,
    ) -> None:
        counts = {"batch": batch, "block": block, "window": window, "lanes": lanes, "threads": threads}
        for name, value in counts.items():
            _at_least(name, value, 1)
        _at_least("seed", seed, 0)
        if window % lanes:
            raise UsageError(f"lanes = {lanes} does not divide window = {window}")
        _refuse_other_kinds(tokens, balance, measurements)
        if tokens and controls:
            raise UsageError("controls come with ragged batches: leave tokens out, and make tokens of both")
        if sets and (tokens or weights is not None):
            raise UsageError("sets come in ragged batches and without weights: make tokens of what comes")
        shares = _shares(snapshot)
        self.snapshots = tuple(shares)
        sizes = vocabulary_sizes(self.snapshots)
        unknown = sorted(set(measurements or ()) - set(sizes))
        if unknown:
            known = ", ".join(sizes)
            raise UsageError(f"{self.snapshots[0].uri}: no measurement {unknown[0]!r}; measurements: {known}")
        self.measurements = tuple(measurements or sizes)
        refuse_mixed_layers(self.snapshots, self.measurements)
        self.split = split
        self.sources, self.sets = find_sources(shares, split, sets=sets), sets
        matched = controls.fields if controls else ()
        measured = (measured_column(name) for name in self.measurements)
        self.fields = tuple(dict.fromkeys((*FIELDS, *matched, *measured)))
        levels = tuple(name for name in self.measurements if any(name in one.levels for one in self.snapshots))
        self.tokens = replace(tokens, levels=levels) if tokens and levels else tokens
        self.controls = controls
        self.threads, self.memory_bytes = threads, memory_bytes
        # whoever reads from afar waits most of the time: more wait together, and earlier
        remote = any(not is_local(source.part.uri) for source in self.sources)
        self._reading, self._ahead = (REMOTE * threads, WINDOWS_AHEAD + 1) if remote else (threads, WINDOWS_AHEAD)
        self.cache = cache if cache is None or isinstance(cache, BlockCache) else BlockCache(cache, cache_bytes)
        self.labels = labels or read_labels(self.snapshots)
        self.balance = balance
        portions = np.array([source.share for source in self.sources])
        self._upper: list[NDArray[np.float64]] = []
        if weights is not None:
            portions = self._weigh(weights, split)
        portions = portions / portions.sum()
        whole = len(shares) == 1 and weights is None
        self.plan = SamplePlan(
            _orders(self.sources, portions, seed, block, window, lanes),
            batch,
            seed,
            () if whole else self._whole_shares(portions),
        )
        room = sum(order.window_rows for order in self.plan.orders)
        if min(batch, self.plan.n_rows) > room:
            what = "sets" if sets else "cells"
            raise UsageError(
                f"a batch of {batch:,} {what} is larger than a window of {room:,}; choose a larger block or "
                f"window: together they are {block * window:,} cells"
            )
        expected = None if weights is not None or sets else _dataset_shares(self.sources, self.labels, split, portions)
        self.telemetry = ShuffleTelemetry(expected)
        self._drawn_for: dict[int, dict[int, NDArray[np.int64]]] = {}
        self._drawing = threading.Lock()
        self.step = self.loaded = 0
        self.uncounted = False
        self._offsets = first_numbers({name: sizes[name] for name in self.measurements})
        self._factors = self._divisors(factors, sizes) if factors is not None else None
        self._room = Room()
        self._slots: list[list[list[Slot]]] = []

    def __getstate__(self) -> dict[str, Any]:
        own = ("_room", "_slots", "_drawn_for", "_drawing")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _room=Room(), _slots=[], _drawn_for={}, _drawing=threading.Lock())

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: the next step and what its number means.

        Raises:
            UsageError: Workers of a DataLoader made its batches, and nobody here knows which were taken.
        """
        if self.uncounted:
            raise UsageError(
                "workers of a DataLoader do not tell the stream which batches were taken: use "
                "train.dataset.EpochLoader in its place, with the same arguments, or num_workers=0"
            )
        return self._standing()

    def _standing(self) -> dict[str, Any]:
        plan = self.plan
        weights = hashlib.sha256(b"".join(upper.tobytes() for upper in self._upper)).hexdigest()
        return {
            "step": self.step,
            "snapshot_id": "+".join(snapshot.id for snapshot in self.snapshots),
            "split": self.split,
            "n_rows": plan.n_rows,
            "global_batch": plan.global_batch,
            "seed": plan.seed,
            "blocks": [[order.block, order.window, order.lanes] for order in plan.orders],
            "weights": weights if self._upper else None,
            "shares": list(plan.shares),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood, at any number of ranks.

        Raises:
            UsageError: It streamed other cells or in another order; the message says what differs.
        """
        standing = self._standing()
        if missing := sorted(standing.keys() - state.keys() - {"split"}):
            raise UsageError(f"this is no state of a stream: it has no {missing[0]!r}")
        try:
            step = index(state["step"])
        except TypeError:
            step = -1
        if step < 0:
            raise UsageError(f"step = {state['step']!r}: at least 0, and a whole number")
        for key, mine in standing.items():
            if key != "step" and state.get(key, mine) != mine:  # states once had no split
                raise UsageError(f"this stream has {key} = {mine!r} and the saved one had {state[key]!r}")
        self.step = step
        self.loaded += 1
        self.uncounted = False

    def _divisors(self, factors: Mapping[str, NDArray[np.float32]], sizes: dict[str, int]) -> torch.Tensor:
        """Return what counts are divided by, by the number of the feature among all; 0 is padding."""
        if self.tokens is None or self.tokens.values != "rank":
            raise UsageError("factors are for ranks: say tokens=TokenSettings(values='rank')")
        if unknown := sorted(set(factors) - set(self.measurements)):
            raise UsageError(f"factors: no measurement {unknown[0]!r} is streamed; {', '.join(self.measurements)} are")
        parts = [np.ones(1, np.float32)]
        for name in self.measurements:
            factor_G = np.asarray(factors.get(name, np.ones(sizes[name])), np.float32)
            if factor_G.shape != (sizes[name],):
                raise UsageError(f"factors: {factor_G.shape} of {name}, which has {sizes[name]:,} features")
            if not (np.isfinite(factor_G) & (factor_G > 0)).all():
                raise UsageError(f"factors: some of {name} are not finite numbers above 0")
            parts.append(factor_G)
        return torch.from_numpy(np.concatenate(parts))

    def _whole_shares(self, portions: NDArray[np.float64]) -> tuple[int, ...]:
        """Return the sources' shares in whole numbers."""
        wholes = np.rint(portions * SHARES).astype(np.int64)
        of_snapshot = np.bincount([source.number for source in self.sources], wholes)
        if not of_snapshot.all():
            where = self.snapshots[int(np.argmin(of_snapshot))].uri
            raise UsageError(f"{where}: its share is below 1 in {2 * SHARES:,}, and never streamed; leave it out")
        return tuple(wholes.tolist())

    # ----------------------------------------------------------------------------------------------------- weights
    def _weigh(self, weights: Sequence[float] | NDArray[Any] | str, split: str) -> NDArray[np.float64]:
        """Note how often the cells up to each one should come together in an epoch; return each source's share."""
        n_rows = sum(source.n_rows for source in self.sources)
        if isinstance(weights, str):
            if weights not in CODED:
                raise UsageError(f"weights = {weights!r} is none of: {', '.join(CODED)}")
            values = np.concatenate([source.label_weights(weights, split) for source in self.sources])
        else:
            values = np.asarray(weights, dtype=np.float64)
        if values.shape != (n_rows,) or not np.isfinite(values).all() or values.min() < 0 or values.sum() <= 0:
            raise UsageError(
                f"weights are {n_rows:,} numbers, one for each cell of the split, not negative, not all zero"
            )
        first, sums = 0, np.empty(len(self.sources))
        for number, source in enumerate(self.sources):
            upper = np.cumsum(values[first : first + source.n_rows])
            first += source.n_rows
            sums[number] = upper[-1]
            if sums[number] > 0:  # else none of its cells comes
                upper *= source.n_rows / sums[number]
            upper[-1] = source.n_rows
            self._upper.append(upper)
        which = np.array([source.number for source in self.sources])
        total = np.bincount(which, sums)
        if not total.all():
            raise UsageError(f"{self.snapshots[int(np.argmin(total))].uri}: all its cells have weight 0; leave it out")
        shares = np.bincount(which, [source.share for source in self.sources])
        return np.asarray(shares[which] * sums / total[which])

    def _rows(self, source: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of a source's part at these positions of an epoch's cells, which lie in row order.

        Systematic sampling where there are weights: with one random offset an epoch, a cell comes its expected number
        of times, rounded down or up, and all together exactly as often as there are cells (Madow 1949).
        """
        if self._upper:
            positions = self._drawn(source, epoch)[positions]
        return self.sources[source].rows(positions)

    def _drawn(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return a source's cells of an epoch, each as often as it comes; two epochs are kept, which meet at a border.

        Several threads ask, of one epoch and of the next: each is drawn once.
        """
        with self._drawing:
            kept = self._drawn_for.setdefault(source, {})
            copies = kept.pop(epoch, None)
            if copies is None:
                for longest_unused in list(kept)[: len(kept) + 1 - EPOCHS_KEPT]:
                    del kept[longest_unused]
                offset = np.random.default_rng([self.plan.seed, epoch, 0, *([source] if source else [])]).random()
                ends = np.floor(self._upper[source] + offset).astype(np.int64)
                copies = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
            kept[epoch] = copies
            return copies

    # ----------------------------------------------------------------------------------------------------- batches
    def epoch(self, epoch: int, *, rank: int = 0, world: int = 1, start: int | None = None) -> Iterator[Any]:
        """Yield one rank's share of every step of an epoch: Cells, or Tokens where the stream has settings for them.

        It begins with step ``start`` of the epoch; left out, with the step at which the stream stands if that is in
        this epoch, else with the first.
        """
        first = epoch * self.plan.steps_per_epoch
        start = self.start_of(epoch) if start is None else start
        _at_least("start", start, 0)
        yield from self.steps(first + start, first + self.plan.steps_per_epoch, rank=rank, world=world)

    def start_of(self, epoch: int) -> int:
        """Return the step of an epoch at which the stream stands, counted from the epoch's first; 0 outside of it."""
        now, step = self.plan.epoch_of(self.step)
        return step if now == epoch else 0

    def steps(self, start: int, stop: int, *, rank: int = 0, world: int = 1, every: int = 1) -> Iterator[Any]:
        """Yield one rank's share of global steps ``start`` to ``stop`` (exclusive), over epoch borders.

        A share may be empty when a last batch has fewer rows than there are ranks. With ``every``, only each so
        many-th step is made: processes that share a rank's work take turns.

        Raises:
            VerificationError: The snapshot's stored bytes are damaged.
            UsageError: Windows take more memory than is allowed, or there is no such rank.
        """
        _check_rank(rank, world)
        _at_least("start", start, 0)
        many = self._steps_together(world, every)
        firsts = range(start, stop, many * every)
        kept = self._slots.pop() if self._slots else []
        self._add_slots(kept, many * every)
        decoders = ThreadPoolExecutor(self._reading, thread_name_prefix="somaflow-read")
        beside = ThreadPoolExecutor(self._reading, thread_name_prefix="somaflow-beside")
        makers = ThreadPoolExecutor(self.threads, thread_name_prefix="somaflow-batch")
        readers = self._readers(decoders, beside, kept)
        windows: dict[Key, Future[Window]] = {}
        made: deque[Future[list[tuple[Any, NDArray[Any]]]]] = deque()

        def ask(key: Key) -> None:
            if key not in windows:
                windows[key] = readers[key[0]].ask(*self._blocks(key, rank, world))

        def submit(first: int) -> None:
            group = range(first, min(first + many * every, stop), every)
            needed = list(dict.fromkeys(key for step in group for key in self._windows(step)))
            for key in needed:
                ask(key)
            for key in self._behind(needed) if group[-1] + every < stop else []:
                ask(key)
            made.append(makers.submit(self._make, {key: windows[key] for key in needed}, group, rank, world))

        try:
            for first in firsts[:GROUPS_AHEAD]:
                submit(first)
            for number, first in enumerate(firsts):
                batches = made.popleft().result()
                self._give_back(windows, readers, first + many * every)
                for ahead in firsts[number + GROUPS_AHEAD : number + GROUPS_AHEAD + 1]:
                    submit(ahead)
                for place, (batch, datasets) in enumerate(batches):
                    self.step = first + place * every + 1
                    self.telemetry.add(datasets)
                    yield batch
        finally:
            for waiting in windows.values():
                waiting.cancel()
            makers.shutdown(wait=True, cancel_futures=True)
            for reader in readers:
                reader.close()
            decoders.shutdown(wait=True, cancel_futures=True)
            beside.shutdown()
            self._slots.append(kept)

    def _give_back(self, windows: dict[Key, Future[Window]], readers: list[Reader], step: int) -> None:
        """Drop the windows that neither this step nor a later one needs."""
        first_needed = self._first_windows(step)
        for key in [key for key in windows if key[1] < first_needed[key[0]]]:
            readers[key[0]].give_back(windows.pop(key).result())

    def _steps_together(self, world: int, every: int) -> int:
        """Return how many steps are made together: enough cells, from no more than half a window or epoch."""
        if self.sets or self.controls:
            return 1
        room = min(self.plan.n_rows, sum(order.window_rows for order in self.plan.orders))
        enough = -(-GROUP_CELLS * world // self.plan.global_batch)
        return max(1, min(enough, room // (2 * self.plan.global_batch * every)))

    def _add_slots(self, kept: list[list[Slot]], steps: int) -> None:
        """Have room for the windows of each source: at least for all those that so many steps may need together."""
        for number, order in enumerate(self.plan.orders):
            passed = order.most_windows(self.plan.most_rows(number, steps))
            if number == len(kept):
                kept.append([])
            kept[number] += [Slot() for _ in range(max(2 + self._ahead, passed) - len(kept[number]))]

    def _readers(
        self, decoders: ThreadPoolExecutor, beside: ThreadPoolExecutor, kept: list[list[Slot]]
    ) -> list[Reader]:
        """Return a reader for each source, and have the arrays opened side by side."""
        if self._reading > self.threads:
            np.empty(KEPT_BYTES, np.uint8)  # freed in this moment, which is all
        for source in self.sources:
            for array in source.part.arrays(self.measurements):
                decoders.submit(source.part.warm, array)
        budget = Budget(self.memory_bytes)
        return [
            Reader(
                source.part,
                self.measurements,
                self.fields,
                threads=decoders,
                beside=None if is_local(source.part.uri) else beside,
                small_threads=max(1, self._reading // 2),
                budget=budget,
                slots=slots,
                cache=self.cache,
            )
            for source, slots in zip(self.sources, kept, strict=True)
        ]

    def _windows(self, step: int) -> list[Key]:
        """Return the windows that a step needs, each source's in order."""
        orders = self.plan.orders
        spans = self.plan.spans(step)
        return [
            (number, window)
            for number, (first, last) in enumerate(spans)
            for window, _, _ in orders[number].pieces(first, last)
        ]

    def _behind(self, needed: list[Key]) -> list[Key]:
        """Return the windows that come after those that a step needs, of each source, as far as is read ahead."""
        found = []
        for number, last in dict(needed).items():
            window = last
            for _ in range(self._ahead):
                window = self.plan.orders[number].following(window)
                found.append((number, window))
        return found

    def _first_windows(self, step: int) -> list[WindowKey]:
        """Return, for each source, the first window that this step or a later one needs."""
        spans = self.plan.spans(step)
        return [order.window_of(first) for order, (first, _) in zip(self.plan.orders, spans, strict=True)]

    def _blocks(self, key: Key, rank: int, world: int) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """Return the numbers of a window's blocks that a rank needs, ascending, and each one's first and last rows."""
        number, window = key
        order = self.plan.orders[number]
        blocks = order.blocks(window, self.plan.lanes_of(number, window, rank, world))
        if len(blocks) == 0:
            return blocks, []
        starts = blocks * order.block
        stops = np.minimum(starts + order.block, order.n_rows)
        if self.sets:
            borders = self.sources[number].sets
            return blocks, list(zip(borders[starts].tolist(), borders[stops].tolist(), strict=True))
        firsts, lasts = self._rows(number, window[0], starts), self._rows(number, window[0], stops - 1)
        return blocks, [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]

    def _make(
        self, waiting: dict[Key, Future[Window]], steps: range, rank: int, world: int
    ) -> list[tuple[Any, NDArray[Any]]]:
        """Return a rank's batches of some steps, each with the datasets of its cells."""
        windows = {key: future.result() for key, future in waiting.items()}
        held, lengths = self._share(windows, steps, rank, world)
        cells = self._cells(held)
        ends = np.cumsum(lengths).tolist()
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        datasets = [cells.panel[part] for part in parts]
        if self.tokens:
            spans = {name: held.spans(name) for name in self.measurements}
            whole = all(part.counts.dtype.kind == "u" for some in spans.values() for part, _ in some)
            if whole and not self.tokens.levels:
                chance = (self.plan.seed, np.repeat(np.array(steps), lengths))
                words = {"ends": ends, "empty": self._room.take, "factors": self._factors}
                made = fast_tokens(spans, cells.measured, cells, self._offsets, self.tokens, chance, **words)
                return list(zip(made, datasets, strict=True))
        cells = self._with_counts(cells, held)
        if self.controls:
            cells = replace(cells, controls=self._find_controls(held, cells.row, (self.plan.seed, steps[0])))
        batches = [cells.take(part) for part in parts]
        if not self.tokens:
            return list(zip(batches, datasets, strict=True))
        return [
            (
                make_tokens(batch, self._offsets, self.tokens, chance=(self.plan.seed, step), factors=self._factors),
                which,
            )
            for step, batch, which in zip(steps, batches, datasets, strict=True)
        ]

    def _share(self, windows: dict[Key, Window], steps: range, rank: int, world: int) -> tuple[Held, list[int]]:
        """Find a rank's rows of some steps, one step's behind the other's, and how many they are of each step."""
        balance = self.balance and not self.sets and world > 1 and all(order.lanes == 1 for order in self.plan.orders)
        rows = [self.plan.batch(step) if balance else self.plan.share(step, rank, world) for step in steps]
        held = self._find(windows, Rows.concatenate(rows))
        if self.sets:  # one step; its sets have any number of cells
            return held, [held.n_cells]
        if balance:
            ends = np.cumsum([len(part) for part in rows])[:-1]
            chosen = [fair_share(sizes, rank, world) for sizes in np.split(held.sizes(), ends)]
            held = held.take(np.concatenate([mine + first for mine, first in zip(chosen, [0, *ends], strict=True)]))
            return held, [len(mine) for mine in chosen]
        return held, [len(part) for part in rows]

    def _find(self, windows: dict[Key, Window], rows: Rows) -> Held:
        """Find a batch's rows, or all rows of its sets, in the windows."""
        source, row, dealt, set_C = rows.source, np.empty(len(rows), np.int64), rows, None
        if self.sets:
            source, row, set_C = self._rows_of_sets(rows)
            dealt = rows.take(set_C)
        else:
            for number, epoch in dict.fromkeys((key[0], key[1][0]) for key in windows):
                mine = np.flatnonzero((source == number) & (rows.epoch == epoch))
                row[mine] = self._rows(number, epoch, rows.row[mine])
        pieces = []
        n_found = 0
        for key, window in windows.items():  # a cell may lie in several: of two epochs, or, drawn twice, of two blocks
            number, (epoch, of_epoch) = key
            order = self.plan.orders[number]
            _, its = order.window_of(dealt.place)
            mine = np.flatnonzero((source == number) & (dealt.epoch == epoch) & (its == of_epoch))
            place = window.places(dealt.row[mine] // order.block, row[mine])
            n_found += int((place >= 0).sum())
            pieces.append((key, window, mine, place))
        if n_found < len(row):
            raise AssertionError(f"{len(row) - n_found} rows of a batch are in none of the windows {list(windows)}")
        return Held(len(row), source, row, pieces, set_C)

    def _rows_of_sets(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return source, row and number of the set of all cells of the sets of a batch."""
        sources, found, numbers = [], [], []
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(rows.source == number)
            row, place = source.rows_of_sets(rows.row[mine])
            sources.append(np.full(len(row), number))
            found.append(row)
            numbers.append(mine[place])
        order = np.argsort(np.concatenate(numbers), kind="stable")
        return np.concatenate(sources)[order], np.concatenate(found)[order], np.concatenate(numbers)[order]

    def _cells(self, held: Held) -> Cells:
        """Return rows with what is said of them, and no counts."""
        labels, n_cells = self.labels, held.n_cells
        codes = np.empty((n_cells, len(self.fields)), np.int32)
        numbers = np.empty((n_cells, len(PART_NUMBERS)), np.float32)
        for _, window, mine, place in held.pieces:
            codes[mine] = window.codes_RF.take(place, axis=0)
            numbers[mine] = window.numbers_RF.take(place, axis=0)
        of_field = dict(zip(self.fields, codes.T, strict=True))
        prompts = {name: np.empty(n_cells, np.int32) for name in PROMPTS}
        perturbation = np.empty((n_cells, labels.perturbation[0].shape[1]), np.int32)
        panel, row = np.empty(n_cells, np.int32), np.empty(n_cells, np.int64)
        measured = {name: of_field[measured_column(name)].astype(bool) for name in self.measurements}
        for number, source in enumerate(self.sources):
            its: Any = np.flatnonzero(held.source == number) if len(self.sources) > 1 else slice(None)
            which = source.number
            for name in PROMPTS:
                prompts[name][its] = labels.prompts[which][name][of_field[name][its]]
            perturbation[its] = labels.perturbation[which][of_field["perturbation"][its]]
            panel[its] = labels.panel[which][of_field["dataset_id"][its]]
            row[its] = source.first_row + held.row[its]
            for name in self.measurements:
                if name not in source.snapshot.measurements:  # the lake has it, this snapshot left it out
                    measured[name][its] = False
        return Cells(
            n_cells=n_cells,
            counts={},
            measured=measured,
            panel=panel,
            prompts=prompts,
            perturbation=perturbation,
            numbers={name: np.ascontiguousarray(numbers[:, PART_NUMBERS.index(name)]) for name in NUMBERS},
            row=row,
            set_C=held.set_C,
            place_CX=numbers[:, [PART_NUMBERS.index(name) for name in ("x", "y")]] if self.sets else None,
        )

    def _with_counts(self, cells: Cells, held: Held) -> Cells:
        counts = {name: gathered(held.spans(name), held.n_cells, self._room) for name in self.measurements}
        return replace(cells, counts=counts)

    def _find_controls(self, held: Held, row: NDArray[np.int64], chance: tuple[int, int]) -> Controls:
        """Return matched controls of a batch's cells, from the windows in which the cells lie."""
        assert self.controls is not None
        place_CS = np.full((held.n_cells, self.controls.size), -1, np.int64)
        sources, rows, pieces, n_controls = [], [], [], 0
        for key, window, mine, place in held.pieces:
            own, groups = self._control_groups(key, window)
            chosen = find_controls(self.controls, groups, place, row[mine], chance)
            there, position = np.unique(chosen, return_inverse=True)
            position = position.reshape(chosen.shape)
            if len(there) and there[0] < 0:
                there, position = there[1:], position - 1
            place_CS[mine] = np.where(position < 0, -1, n_controls + position)
            pieces.append((key, window, np.arange(n_controls, n_controls + len(there)), there))
            sources.append(np.full(len(there), key[0]))
            rows.append(own[there])
            n_controls += len(there)
        found = Held(n_controls, np.concatenate(sources), np.concatenate(rows), pieces)
        return Controls(self._with_counts(self._cells(found), found), place_CS)

    def _control_groups(self, key: Key, window: Window) -> tuple[NDArray[np.int64], ControlGroups]:
        """Return the part's row of each of a window's rows, and its controls; the window remembers both."""
        assert self.controls is not None
        if "controls" not in window.notes:
            source, own = self.sources[key[0]], window.rows()
            names = source.snapshot.label_values()["perturbation"]
            plain_V = np.array([value in ("", "control") for value in names])
            hit_V: NDArray[np.bool_] = np.any(self.labels.perturbation[source.number] > CONTROL, axis=1)
            code_R = window.codes_RF[:, self.fields.index("perturbation")]
            unperturbed_R = plain_V[code_R] & ~np.isin(own, source.snapshot.dead - source.part.first_row)
            lane_R = self._lanes(key, window)
            groups = group_controls(self.controls, self.fields, window, lane_R, unperturbed_R, hit_V[code_R])
            window.notes["controls"] = own, groups
        found: tuple[NDArray[np.int64], ControlGroups] = window.notes["controls"]
        return found

    def _lanes(self, key: Key, window: Window) -> NDArray[np.int64]:
        """Return the lane of each of a window's rows."""
        lanes = self.plan.orders[key[0]].lanes_of_blocks(key[1], window.numbers)
        return np.repeat(lanes, np.diff(window.offsets))


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise UsageError(f"{name} = {value!r}: a whole number")
    if value < least:
        raise UsageError(f"{name} = {value}: at least {least}")


def _refuse_other_kinds(tokens: object, balance: object, measurements: object) -> None:
    """Refuse words of other kinds than they should be, of those that are easily taken for something else."""
    if tokens is not None and not isinstance(tokens, TokenSettings):
        raise UsageError(f"tokens = {tokens!r}: say TokenSettings(budget=...), of train.tokens")
    if not isinstance(balance, bool):
        raise UsageError(
            f"balance = {balance!r} is not true or false: it is about ranks; weights = 'cell_type' lets the values "
            "of a label come equally often"
        )
    if isinstance(measurements, str):
        raise UsageError(f"measurements = {measurements!r}: say a list, [{measurements!r}]")
    if measurements is not None and not measurements:
        raise UsageError("measurements = []: name some, or leave it out for all")


def _shares(snapshot: Snapshot | Mapping[Snapshot, float]) -> dict[Snapshot, float]:
    for one in snapshot if isinstance(snapshot, Mapping) else [snapshot]:
        if not isinstance(one, Snapshot):
            raise UsageError(f"{one!r} is no snapshot: say open_snapshot(lake, name), of store.snapshot")
    shares = dict(snapshot) if isinstance(snapshot, Mapping) else {snapshot: 1.0}
    if not shares:
        raise UsageError("no snapshot is named; a mixture maps snapshots to their weights")
    return shares


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise UsageError(f"rank = {rank} of world = {world}: ranks are counted from 0")


def _orders(
    sources: Sequence[Source], portions: NDArray[np.float64], seed: int, block: int, window: int, lanes: int
) -> tuple[RowOrder, ...]:
    """Return the sources' orders; each one's blocks are as small as its share of a batch, counted in what it deals."""
    sizes = [
        int(np.ceil(block * share * one.n_units / one.n_rows)) for one, share in zip(sources, portions, strict=True)
    ]
    return tuple(
        RowOrder(source.n_units, seed, max(1, size), window, lanes, number)
        for number, (source, size) in enumerate(zip(sources, sizes, strict=True))
    )


def _dataset_shares(
    sources: Sequence[Source], labels: Labels, split: str, portions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the share of each dataset among the cells that are streamed."""
    shares = np.zeros(len(labels.datasets))
    for number in {source.number for source in sources}:
        mine = [place for place, source in enumerate(sources) if source.number == number]
        snapshot = sources[mine[0]].snapshot
        counts = np.array([of.get(split, 0) for of in snapshot.label_values()["dataset_id"].values()], np.float64)
        shares[labels.panel[number]] += counts / counts.sum() * portions[mine].sum()
    return shares / shares.sum()
