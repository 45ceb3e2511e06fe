"""This module streams the cells of snapshots, ragged or as tokens, in the order of the sample plan.

Stages overlap: threads decode the windows to come, others make the batches to come, the consumer takes them in order.
"""

from __future__ import annotations

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
from store.records import is_local
from store.schema import measured_column
from store.snapshot import Snapshot
from train.batches import BatchMaker
from train.cache import BlockCache
from train.controls import MatchedControls
from train.drawn import Draws, Weights
from train.held import Key
from train.labels import FIELDS, Labels, read_labels
from train.plan import RowOrder, SamplePlan
from train.plan import Window as WindowKey
from train.reader import Budget, Reader, Slot, Window
from train.sources import Source, find_sources, refuse_mixed_layers, vocabulary_sizes
from train.telemetry import ShuffleTelemetry
from train.tokens import TokenSettings, first_numbers

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
NOT_SAID_ONCE = {"split", "measurements", "values"}
"""What states of before do not say; what they mean by numbers of features is taken for the same."""
MOST_CELLS = 2**44
"""A state that has passed more cells is none."""
SHARES = 2**30
"""Shares of sources are told to the plan in whole numbers of this sum."""


class Stream:
    """One split of a snapshot, or of several, as batches of cells.

    ::

        stream = Stream(open_snapshot(lake, name), batch=256, tokens=TokenSettings(budget=2048))
        for tokens in stream.epoch(0, rank=rank, world=world):
            ...

    The only state is the number of the next step: ``state_dict()`` and ``load_state_dict()`` carry it, and any number
    of ranks goes on where any other stopped: the same loop over all epochs finds nothing left of those that are over.

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
        weights: Weights | None = None,
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
        self._draws = Draws(self.sources, seed, split, weights)
        portions = self._draws.shares / self._draws.shares.sum()
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
        self.step = self.loaded = self._loaded_epoch = 0
        self.uncounted = False
        self._maker = BatchMaker(
            self.plan,
            self.sources,
            self._draws,
            self.measurements,
            self.fields,
            self.labels,
            first_numbers({name: sizes[name] for name in self.measurements}),
            self.tokens,
            self._divisors(factors, sizes) if factors is not None else None,
            controls,
            sets,
            balance,
        )
        self._slots: list[list[list[Slot]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": []}

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
        return {
            "step": self.step,
            "snapshot_id": "+".join(snapshot.id for snapshot in self.snapshots),
            "split": self.split,
            "n_rows": plan.n_rows,
            "global_batch": plan.global_batch,
            "seed": plan.seed,
            "blocks": [[order.block, order.window, order.lanes] for order in plan.orders],
            "weights": self._draws.digest,
            "shares": list(plan.shares),
            "measurements": list(self.measurements),
            **({"values": self.tokens.values} if self.tokens else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood, at any number of ranks.

        Raises:
            UsageError: It streamed other cells or measurements, in another order or as other values; the message says
                what differs.
        """
        if not isinstance(state, Mapping):
            raise UsageError(f"{state!r} is no state of a stream: say what state_dict returned")
        standing = self._standing()
        if missing := sorted(standing.keys() - state.keys() - NOT_SAID_ONCE):
            raise UsageError(f"this is no state of a stream: it has no {missing[0]!r}")
        step = state["step"]
        _reachable("step", step, self.plan.global_batch)
        step = index(step)
        for key, mine in standing.items():
            if key != "step" and state.get(key, mine) != mine:
                raise UsageError(f"this stream has {key} = {mine!r} and the saved one had {state[key]!r}")
        self.step, self._loaded_epoch = step, self.plan.epoch_of(step)[0]
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

    # ----------------------------------------------------------------------------------------------------- batches
    def epoch(self, epoch: int, *, rank: int = 0, world: int = 1, start: int | None = None) -> Iterator[Any]:
        """Yield one rank's share of every step of an epoch: Cells, or Tokens where the stream has settings for them.

        It begins with step ``start`` of the epoch; left out, with the step at which the stream stands if that is in
        this epoch, else with the first. As long as the stream stands in the epoch to which a loaded state brought it,
        nothing is left of those before.

        Raises:
            UsageError: The epoch has no such start.
        """
        start = self.start_of(epoch, start)
        first = epoch * self.plan.steps_per_epoch
        if start < self.plan.steps_per_epoch:
            yield from self.steps(first + start, first + self.plan.steps_per_epoch, rank=rank, world=world)

    def start_of(self, epoch: int, start: int | None = None) -> int:
        """Return with which of an epoch's steps :meth:`epoch` begins; as many as it has: none is left."""
        _reachable("epoch", epoch, self.plan.n_rows)
        steps = self.plan.steps_per_epoch
        if start is not None:
            _at_least("start", start, 0)
            if start > steps:
                raise UsageError(f"start = {start}: an epoch has {steps:,} steps")
            return start
        now, step = self.plan.epoch_of(self.step)
        if epoch < now == self._loaded_epoch:
            return steps
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
        _reachable("start", start, self.plan.global_batch)
        many = self._steps_together(world, every)
        firsts = range(start, stop, many * every)
        last_needed = self._last_windows(range(start, stop, every)[-1]) if firsts else []
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
            for key in self._behind(needed, last_needed):
                ask(key)
            made.append(makers.submit(self._maker.make, {key: windows[key] for key in needed}, group, rank, world))

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

    def _behind(self, needed: list[Key], last_needed: list[WindowKey]) -> list[Key]:
        """Return the windows that come after those that a step needs, of each source, as far as is read ahead."""
        found = []
        for number, last in dict(needed).items():
            window = last
            for _ in range(self._ahead):
                window = self.plan.orders[number].following(window)
                if window <= last_needed[number]:
                    found.append((number, window))
        return found

    def _first_windows(self, step: int) -> list[WindowKey]:
        """Return, for each source, the first window that this step or a later one needs."""
        spans = self.plan.spans(step)
        return [order.window_of(first) for order, (first, _) in zip(self.plan.orders, spans, strict=True)]

    def _last_windows(self, step: int) -> list[WindowKey]:
        """Return, for each source, the last window that this step or an earlier one needs."""
        spans = self.plan.spans(step)
        return [order.window_of(max(0, stop - 1)) for order, (_, stop) in zip(self.plan.orders, spans, strict=True)]

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
        firsts, lasts = self._draws.rows(number, window[0], starts), self._draws.rows(number, window[0], stops - 1)
        return blocks, [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise UsageError(f"{name} = {value!r}: a whole number")
    if value < least:
        raise UsageError(f"{name} = {value}: at least {least}")


def _reachable(name: str, value: int, n_cells: int) -> None:
    """Refuse what is no number of something that takes so many cells, or one to which no stream comes."""
    _at_least(name, value, 0)
    if index(value) * n_cells > MOST_CELLS:
        raise UsageError(f"{name} = {value}: no stream has come so far")


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
    _at_least("world", world, 1)
    _at_least("rank", rank, 0)
    if rank >= world:
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
