"""This module writes datasets into a lake so that each appears whole and once, whatever dies in between.

A driver reserves ranges (a record, before any write); any number of processes write blocks of counts into them; the
driver writes features, presence and provenance, and last of all obs; then it makes the commit record. Readers see the
dataset from the commit record on. Recovery is the same plan run again: the same cells get the same joinids, and equal
counts at equal coordinates replace themselves, at a later timestamp.

Shape letters used in this module:
    C  cells of a block      G  features of the dataset in one measurement
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse
from numpy.typing import NDArray

from store import catalog, fragments, records, schema, tables
from store.catalog import Commit, Content, Plan
from store.context import read_parts, storage
from store.errors import ConflictError, InputRefused, MissingError, VerificationError
from store.fragments import FragmentWriter, merge_footers, merge_small, take_back
from store.hashes import hashed
from store.lake import Lake, create_lake, ensure_measurement, layer_uris, open_lake, refuse_place, table_uris, utc_now
from store.lock import WriterLock

LARGEST_COUNT = 2**24
"""float32, the Census's type of counts, holds every integer up to here."""

READ_BACK_BYTES = 2**27

MERGED_EVERY = 32
"""Commits after which the tables' small files are to be merged: an array with many opens slowly, the more so on S3.

It is done while there is time for what the last merge made needless to be removed first, and when the lake is left.
"""

UNMERGED = "small files were not merged, opening it gets slower"
LEFT = "what a commit that failed wrote is not taken back yet; that is done before the next one"

log = logging.getLogger("somaflow.store")

VERSIONED = ("tiledbsoma", "tiledb", "pyarrow", "numpy")


@dataclass(frozen=True)
class Reservation:
    """Where one dataset goes: made before anything is written, sent to every process that writes."""

    lake_uri: str
    plan: Plan
    dataset: schema.DatasetPlan = field(repr=False)
    feature_joinids: dict[str, NDArray[np.int64]] = field(repr=False)
    floor_ms: int

    def timestamp(self) -> int:
        """A TileDB timestamp for a write that begins now: later than everything that this dataset builds on."""
        return max(int(time.time() * 1000), self.floor_ms + 1)


@dataclass(frozen=True)
class BlockStats:
    """What one block of counts held when it was written and read back."""

    measurement: str
    row_start: int
    nnz_C: NDArray[np.int64] = field(repr=False)
    sum_C: NDArray[np.float64] = field(repr=False)
    squares_C: NDArray[np.float64] = field(repr=False)
    feature_nnz_G: NDArray[np.int64] = field(repr=False)
    digest: int
    timestamp_ms: int
    fragments: tuple[str, ...] = ()

    @property
    def row_stop(self) -> int:
        """The row behind the block's last."""
        return self.row_start + len(self.nnz_C)


def content_digest(rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float32]) -> int:
    """Digest non-zeros so that their order does not matter and the digests of blocks add up (mod 2**64)."""
    mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= columns.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64) * np.uint64(
        0x165667B19E3779F9
    )
    return int(hashed(mixed).sum(dtype=np.uint64))


Rows = Callable[[int, int], scipy.sparse.csr_matrix]
"""Rows start to stop (exclusive) of a dataset as counts_CG, columns in the order of the plan's features."""


def write_counts(
    reservation: Reservation, measurement: str, row_start: int, counts: scipy.sparse.csr_matrix
) -> BlockStats:
    """Write rows ``row_start`` onwards of a dataset that are in memory; see :func:`write_rows`."""
    return write_rows(
        reservation,
        measurement,
        (row_start, row_start + counts.shape[0]),
        lambda start, stop: counts[start - row_start : stop - row_start],
    )


def write_rows(
    reservation: Reservation, measurement: str, span: tuple[int, int], rows: Rows, *, step: int | None = None
) -> BlockStats:
    """Write a span of a dataset's rows, read them back and compare.

    May run in any process. Rows are asked for tile by tile and streamed into one fragment, which becomes visible at the
    end: a killed call leaves nothing that anybody sees.

    Args:
        reservation: From ``LakeWriter.reserve``.
        measurement: One of the plan's measurements.
        span: First row and the row behind the last, counted within the dataset.
        rows: Reads values of the plan's layer: for ``raw`` counts.
        step: Rows to ask for at a time (none: a whole tile); fewer need less memory and make more fragments.

    Raises:
        InputRefused: The rows do not fit the plan, or hold impossible values.
        VerificationError: What was read back is not what was written.
    """
    joinids_G = reservation.feature_joinids[measurement]
    layer = reservation.dataset.layer(measurement)
    start, stop = span
    if not 0 <= start <= stop <= reservation.plan.n_obs:
        raise InputRefused(
            f"dataset {reservation.plan.dataset_id!r}: rows {start} to {stop} do not fit the plan of "
            f"{reservation.plan.n_obs} cells"
        )
    uri = records.join(reservation.lake_uri, "census_data", reservation.plan.organism, "ms", measurement, "X", layer)
    offset = reservation.plan.obs_start
    stats = _Statistics(stop - start, len(joinids_G))
    timestamp = reservation.timestamp()
    with storage(uri), FragmentWriter(uri, timestamp) as writer:
        row, tile = start, writer.row_tile
        while row < stop:
            until = min(stop, ((offset + row) // tile + 1) * tile - offset, row + (step or tile))
            counts = _prepared(rows(row, until), reservation, measurement, row)
            stats.add(row - start, counts)
            placed = scipy.sparse.csr_matrix(
                (counts.data, joinids_G[counts.indices], counts.indptr),
                shape=(counts.shape[0], schema.FEATURE_CAPACITY[measurement]),
            )
            if not placed.has_sorted_indices:
                placed = placed.sorted_indices()  # a copy: what comes from a reader is read-only
            stats.digest += _digest_rows(offset + row, placed)
            writer.write(offset + row, placed)
            row = until
    read_back(uri, offset + start, offset + stop - 1, stats.digest % 2**64, timestamp)
    return BlockStats(
        measurement=measurement,
        row_start=start,
        nnz_C=stats.nnz_C,
        sum_C=stats.sum_C,
        squares_C=stats.squares_C,
        feature_nnz_G=stats.feature_nnz_G,
        digest=stats.digest % 2**64,
        timestamp_ms=timestamp,
        fragments=tuple(writer.names),
    )


class _Statistics:
    """What a span's values add up to."""

    def __init__(self, n_rows: int, n_features: int) -> None:
        self.nnz_C = np.zeros(n_rows, np.int64)
        self.sum_C, self.squares_C = np.zeros(n_rows), np.zeros(n_rows)
        self.feature_nnz_G = np.zeros(n_features, np.int64)
        self.digest = 0

    def add(self, row: int, counts_CG: scipy.sparse.csr_matrix) -> None:
        here = slice(row, row + counts_CG.shape[0])
        self.nnz_C[here] = np.diff(counts_CG.indptr)
        filled = np.flatnonzero(self.nnz_C[here])
        values = counts_CG.data.astype(np.float64)
        begins = counts_CG.indptr[filled]
        if len(filled):
            self.sum_C[here][filled] = np.add.reduceat(values, begins)
            self.squares_C[here][filled] = np.add.reduceat(values * values, begins)
        self.feature_nnz_G += np.bincount(counts_CG.indices, minlength=len(self.feature_nnz_G))


def _prepared(
    counts_CG: scipy.sparse.csr_matrix, reservation: Reservation, measurement: str, row: int
) -> scipy.sparse.csr_matrix:
    n_features = len(reservation.feature_joinids[measurement])
    if counts_CG.shape[1] != n_features:
        raise InputRefused(
            f"dataset {reservation.plan.dataset_id!r}: rows of {counts_CG.shape[1]} {measurement} features do not fit "
            f"the plan of {reservation.plan.n_obs} cells x {n_features} features"
        )
    counts = scipy.sparse.csr_matrix(counts_CG, dtype=np.float32)
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    if reservation.dataset.layer(measurement) != "value" and not counts.data.all():
        counts = counts.copy()
        counts.eliminate_zeros()
    _refuse_impossible(counts, reservation, measurement, row)
    return counts


def _digest_rows(first: int, placed: scipy.sparse.csr_matrix) -> int:
    rows = np.repeat(np.arange(first, first + placed.shape[0], dtype=np.int64), np.diff(placed.indptr))
    return content_digest(rows, placed.indices.astype(np.int64), placed.data)


def _refuse_impossible(
    counts: scipy.sparse.csr_matrix, reservation: Reservation, measurement: str, row_start: int
) -> None:
    data = counts.data
    bad = ~np.isfinite(data)
    if reservation.dataset.layer(measurement) == "raw":
        bad |= (data <= 0) | (data > LARGEST_COUNT)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        row = row_start + int(np.searchsorted(counts.indptr, at, side="right")) - 1
        feature = reservation.dataset.features[measurement].feature_id[int(counts.indices[at])]
        raise InputRefused(
            f"dataset {reservation.plan.dataset_id!r}: {measurement} cell {row}, feature {feature!r} holds "
            f"{counts.data[at]!r}; values are finite, and counts lie between 0 and {LARGEST_COUNT:,}"
        )


def read_back(uri: str, first: int, last: int, digest: int, timestamp: int) -> None:
    """Read the values that were written to rows ``first`` to ``last`` at a timestamp, and no others.

    Raises:
        VerificationError: Their digest is another one.
    """
    found = 0
    for part in read_parts(uri, timestamp, timestamp, rows=slice(first, last), budget_bytes=READ_BACK_BYTES):
        found += content_digest(*(part[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")))
    if found % 2**64 != digest:
        raise VerificationError(
            f"{uri}: cells {first} to {last} read back differ from what was written; nothing was "
            "committed; check the disk and run the same command again"
        )


class LakeWriter:
    """One driver's hold on a lake: reserves ranges and makes commits.

    A context manager. While it is open, another driver is told to wait.

    Args:
        uri: Where the lake is.
        make: Make the lake when there is none; else that is a MissingError.

    Attributes:
        undone: Writes without a commit, by a driver that died, that were taken back when the lake was opened.
    """

    def __init__(self, uri: str, *, make: bool = True) -> None:
        self.uri = records.absolute(uri)
        self._make = make
        self._lock = WriterLock(self.uri)
        self._names: dict[tuple[str, str], catalog.FeatureNames] = {}
        self._made: set[tuple[str, str, str]] = set()
        self._entered_ms = 0
        self._unsettled: tuple[int, Commit | None] | None = None  # timestamp and record of a commit begun

    def __enter__(self) -> LakeWriter:
        refuse_place(self.uri)  # before the lock makes a folder
        if not self._make:
            self.lake()  # raises where there is none
        self._lock.acquire()
        try:
            with storage(self.uri):
                create_lake(self.uri)
            if self._lock.passed_elsewhere:
                self._fence()
            self._plans = catalog.plans(self.uri)
            self._commits = catalog.commits(self.uri)
            with storage(self.uri):
                self.undone = self._roll_back()
            records.remove(records.join(self.uri, records.FOLDER, "running"))  # what drivers say that are gone
            self._merged, self._merged_at = self._commits[-1].number, time.monotonic()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _told(self.uri, LEFT):
                    self.settle()
                if not self._unsettled and self._many_since():
                    self._merge()
        finally:
            self._lock.release()

    def lake(self) -> Lake:
        """Open the newest commit for reading."""
        return open_lake(self.uri)

    def _roll_back(self) -> int:
        """Remove what dead drivers wrote to the tables without a commit; return the number of writes undone.

        Counts that it wrote stay: no table tells of them, and the same plan, run again, uses their coordinates.
        """
        wanted = {commit.timestamp_ms - before for commit in self._commits for before in (0, 1)}  # deletes come before
        return sum(take_back(uri, lambda item: item.first_ms not in wanted) for uri in table_uris(self.uri))

    def _fence(self) -> None:
        """Make a commit that changes nothing at the next number.

        A driver elsewhere that was taken for dead may have sent its commit already. Either that arrives first, and
        counts, or it is refused.
        """
        made = False
        while not made:
            self._lock.check()
            with suppress(ConflictError):
                last = catalog.commits(self.uri)[-1]
                catalog.create_commit(self.uri, self._after(last, last.timestamp_ms))
                made = True

    def settle(self) -> None:
        """Take back what a commit of this driver that failed wrote to the tables: commits after it would show that.

        Its record may have been made though no answer said so, or be still on its way: a commit that changes nothing
        is made after it, or in its place.

        Raises:
            StorageError: The store does not answer yet; no other commit is made before it does.
        """
        if self._unsettled is None:
            return
        timestamp, record = self._unsettled
        with storage(self.uri):
            if record is not None:
                with suppress(ConflictError):  # another driver holds the lake: it has done that when it took it over
                    self._fence()
                self._commits = catalog.commits(self.uri)
            if record is None or not self._holds(record):
                for uri in table_uris(self.uri):
                    take_back(uri, lambda item: item.first_ms in (timestamp - 1, timestamp))
        self._unsettled = None

    def _holds(self, record: Commit) -> bool:
        return any(commit.id == record.id for commit in self._commits)

    def committed(self, plan: schema.DatasetPlan) -> bool:
        """Say whether this very content is in the lake, under this name."""
        standing = self._standing(plan)
        return standing is not None and standing.dataset["key"] == plan.key

    def _standing(self, plan: schema.DatasetPlan) -> Commit | None:
        """Return the commit whose dataset has the plan's name now."""
        for commit in catalog.current(self._commits):
            if _named(commit, plan) and commit.dataset["organism"] == plan.organism:
                return commit
        return None

    def reserve(self, plan: schema.DatasetPlan, *, replaces: bool = False) -> Reservation:
        """Hand out joinids; a plan that was begun before and never committed gets the same again.

        Another content of the same origin under the same name is a new version: its commit takes the old one out.
        ``replaces`` says that it is one although it comes from elsewhere.

        Raises:
            ConflictError: The content is committed, its name belongs to a dataset of another origin, or another
                driver interfered.
            StorageError: The store does not answer, or not yet what became of the commit before (see :meth:`settle`).
        """
        self.settle()
        standing = self._standing(plan)
        if standing and standing.dataset["key"] == plan.key:
            raise ConflictError(f"{self.uri}: dataset {plan.dataset_id!r} is in the lake already")
        for commit in catalog.current(self._commits):
            if _named(commit, plan):
                why = catalog.refusal(plan, commit.dataset, f"commit {commit.number}", replaces=replaces)
                if why:
                    raise ConflictError(f"{self.uri}: {why}")
        done = {commit.dataset["number"] for commit in self._commits if commit.dataset}
        begun = [
            known
            for known in self._plans
            if known.key == plan.key and known.organism == plan.organism and known.number not in done
        ]
        with storage(self.uri):
            for measurement in plan.features:
                place = (plan.organism, measurement, plan.layer(measurement))
                if place not in self._made:
                    entered = ensure_measurement(self.uri, *place, after_ms=self._commits[-1].timestamp_ms)
                    self._entered_ms = max(self._entered_ms, entered)
                    self._made.add(place)
        if begun:
            mine = begun[-1]
        else:
            mine = catalog.create_plan(
                self.uri,
                self._plans,
                key=plan.key,
                dataset_id=plan.dataset_id,
                organism=plan.organism,
                n_obs=plan.n_obs,
                origin=plan.origin,
            )
            self._plans.append(mine)
        joinids = {
            name: self._feature_names(plan.organism, name).joinids(features) for name, features in plan.features.items()
        }
        floor = max(self._commits[-1].timestamp_ms, self._entered_ms, int(time.time() * 1000))
        return Reservation(self.uri, mine, plan, joinids, floor)

    def _feature_names(self, organism: str, measurement: str) -> catalog.FeatureNames:
        key = (organism, measurement)
        if key not in self._names:
            self._names[key] = catalog.FeatureNames(self.uri, organism, measurement)
        return self._names[key]

    def side_table(self, reservation: Reservation, name: str, table: pa.Table) -> str:
        """Keep what a source gave and no column of the lake holds, as Parquet; return where it stands.

        Args:
            reservation: From ``reserve``.
            name: What the table is (``obs``, ``var_RNA``, ``unmapped_RNA``, ...).
            table: Its rows, in the source's order.
        """
        plan = reservation.plan
        uri = records.join(self.uri, records.FOLDER, "sides", f"{plan.number:012d}-{name}.parquet")
        with storage(uri):
            records.write_table(uri, table)
        return uri

    def commit(self, reservation: Reservation, obs: pd.DataFrame | pa.Table, blocks: Sequence[BlockStats]) -> Commit:
        """Write everything but the counts, obs last, and make the commit record.

        Args:
            reservation: From ``reserve``.
            obs: One row for each cell, in the order of the counts' rows; any of ``schema.OBS_DEFAULTS`` and
                ``measured_<measurement>``; other columns are refused.
            blocks: What ``write_counts`` returned; together they cover every row of every measurement once.

        Raises:
            InputRefused: obs or the blocks do not fit the plan.
            ConflictError: Another driver made a commit meanwhile.
            StorageError: It could not be made; what was written is taken back, at the latest by the next call.
        """
        self.settle()
        standing = self._standing(reservation.dataset)
        if standing and standing.dataset["number"] == reservation.plan.number:
            return standing  # made by an earlier call, which no answer told
        table = tables.obs_table(reservation, obs, blocks)
        content = {name: _content(reservation, name, blocks) for name in reservation.dataset.features}
        latest = max((block.timestamp_ms for block in blocks), default=0)
        timestamp = max(reservation.timestamp(), latest + 1, self._commits[-1].timestamp_ms + 2)
        before = Lake(self.uri, self._commits)
        return self._enter(
            timestamp,
            standing,
            lambda: tables.write_all(before, reservation, table, blocks, timestamp, standing),
            dataset=asdict(reservation.plan),
            content=content,
        )

    def remove(self, dataset_id: str, organism: str | None = None) -> Commit:
        """Take a dataset out of the lake; earlier commits still have it, until a vacuum.

        Raises:
            MissingError: No such dataset, or several organisms have one of that name and none was said.
        """
        self.settle()
        found = [
            commit
            for commit in catalog.current(self._commits)
            if commit.dataset["dataset_id"] == dataset_id and organism in (None, commit.dataset["organism"])
        ]
        if len(found) != 1:
            known = sorted({commit.dataset["dataset_id"] for commit in catalog.current(self._commits)})
            raise MissingError(
                f"{self.uri}: {len(found) or 'no'} datasets named {dataset_id!r}; "
                + (f"datasets: {', '.join(known)}" if not found else "say which with --organism")
            )
        timestamp = max(int(time.time() * 1000), self._commits[-1].timestamp_ms + 2)
        before = Lake(self.uri, self._commits)
        return self._enter(timestamp, found[0], lambda: tables.remove_all(before, found[0], timestamp))

    def _enter(
        self, timestamp: int, superseded: Commit | None, write: Callable[[], tuple[str, ...]], **values: Any
    ) -> Commit:
        """Write the tables at a timestamp and make the commit record, if the lake is still ours; else take all back."""
        gone = (superseded.dataset["number"],) if superseded else ()
        made = None
        self._lock.renew()
        self._unsettled = timestamp, None
        try:
            with storage(self.uri):
                whole = write()
            made = self._after(self._commits[-1], timestamp, superseded=gone, whole=whole, **values)
            self._lock.check()
            self._unsettled = timestamp, made
            catalog.create_commit(self.uri, made)
        except Exception:
            with _told(self.uri, LEFT):
                self.settle()
            if made is None or not self._holds(made):
                raise
        else:
            self._commits.append(made)
            self._unsettled = None
        if self._many_since() and time.monotonic() - self._merged_at > fragments.READERS_S:
            self._merge()
        return made

    @staticmethod
    def _after(parent: Commit, timestamp: int, **values: Any) -> Commit:
        """Return the commit that follows another."""
        return Commit(
            number=parent.number + 1,
            timestamp_ms=timestamp,
            parent=parent.id,
            created=utc_now(),
            versions={name: importlib.metadata.version(name) for name in VERSIONED},
            **values,
        )

    def _many_since(self) -> bool:
        """Say whether it is time to merge again; drivers that make few commits each come round to it too."""
        return self._commits[-1].number // MERGED_EVERY > self._merged // MERGED_EVERY

    def _merge(self) -> None:
        """Merge what the commits before the last one wrote to the tables; a failure is told, and does no harm."""
        last = self._commits[-1]
        merges: list[tuple[str, Callable[[str], None]]] = []
        with _told(self.uri, UNMERGED):
            merges += [(uri, lambda uri: merge_small(uri, last.timestamp_ms)) for uri in table_uris(self.uri)]
            merges += [(uri, merge_footers) for uri in layer_uris(self.uri)]
        for uri, merge in merges:
            with _told(uri, UNMERGED):
                merge(uri)
        self._merged, self._merged_at = last.number, time.monotonic()


def _named(commit: Commit, plan: schema.DatasetPlan) -> bool:
    return bool(commit.dataset["dataset_id"] == plan.dataset_id)


@contextmanager
def _told(uri: str, what: str) -> Iterator[None]:
    """Tell of a failure and go on: the commits stand."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a store's client may raise
        log.warning("%s: %s: %s", uri, what, error)


def _content(reservation: Reservation, measurement: str, blocks: Sequence[BlockStats]) -> Content:
    mine = sorted((block for block in blocks if block.measurement == measurement), key=lambda block: block.row_start)
    row = 0
    for block in mine:
        if block.row_start != row:
            break
        row = block.row_stop
    if row != reservation.plan.n_obs or any(block.row_start >= row for block in mine):
        raise InputRefused(
            f"dataset {reservation.plan.dataset_id!r}: the {measurement} blocks cover rows 0 to {row} of "
            f"{reservation.plan.n_obs}; write every row once before the commit"
        )
    return Content(
        nnz=int(sum(block.nnz_C.sum() for block in mine)),
        total=float(sum(block.sum_C.sum() for block in mine)),
        digest=f"{sum(block.digest for block in mine) % 2**64:016x}",
        layer=reservation.dataset.layer(measurement),
        fragments=tuple(sorted(name for block in mine for name in block.fragments)),
    )
