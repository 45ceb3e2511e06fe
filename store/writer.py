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
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse
import tiledbsoma
from numpy.typing import NDArray

from store import catalog, records, schema, tables
from store.catalog import Commit, Content, Plan
from store.context import soma_context
from store.errors import ConflictError, InputRefused, VerificationError
from store.lake import Lake, create_lake, ensure_measurement, open_lake, utc_now

LARGEST_COUNT = 2**24
"""float32, the Census's type of counts, holds every integer up to here."""

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
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return int(mixed.sum(dtype=np.uint64))


def write_counts(
    reservation: Reservation, measurement: str, row_start: int, counts_CG: scipy.sparse.csr_matrix
) -> BlockStats:
    """Write rows ``row_start`` onwards of a dataset, read them back and compare.

    May run in any process. One call makes one fragment, so a killed call leaves nothing that anybody sees.

    Args:
        reservation: From ``LakeWriter.reserve``.
        measurement: One of the plan's measurements.
        row_start: The block's first row, counted within the dataset.
        counts_CG: Raw counts; columns in the order of the plan's features.

    Raises:
        InputRefused: The block does not fit the plan, or holds NaN, negative or too large values.
        VerificationError: What was read back is not what was written.
    """
    joinids_G = reservation.feature_joinids[measurement]
    n_rows, n_features = counts_CG.shape
    if n_features != len(joinids_G) or row_start < 0 or row_start + n_rows > reservation.plan.n_obs:
        raise InputRefused(
            f"dataset {reservation.plan.dataset_id!r}: rows {row_start} to {row_start + n_rows} with {n_features} "
            f"{measurement} features do not fit the plan of {reservation.plan.n_obs} cells x {len(joinids_G)} features"
        )
    counts = scipy.sparse.csr_matrix(counts_CG, dtype=np.float32, copy=True)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    _refuse_impossible(counts, reservation, measurement, row_start)
    first = reservation.plan.obs_start + row_start
    nnz_C = np.diff(counts.indptr).astype(np.int64)
    rows = np.repeat(np.arange(first, first + n_rows, dtype=np.int64), nnz_C)
    columns = joinids_G[counts.indices]
    timestamp = reservation.timestamp()
    uri = records.join(reservation.lake_uri, "census_data", reservation.plan.organism, "ms", measurement, "X", "raw")
    digest = content_digest(rows, columns, counts.data)
    if len(rows):
        _write_block(uri, rows, columns, counts.data, timestamp)
    _read_back(uri, first, n_rows, digest, timestamp)
    doubles = counts.astype(np.float64)
    return BlockStats(
        measurement=measurement,
        row_start=row_start,
        nnz_C=nnz_C,
        sum_C=np.asarray(doubles.sum(axis=1), dtype=np.float64).ravel(),
        squares_C=np.asarray(doubles.multiply(doubles).sum(axis=1), dtype=np.float64).ravel(),
        feature_nnz_G=np.bincount(counts.indices, minlength=n_features).astype(np.int64),
        digest=digest,
        timestamp_ms=timestamp,
    )


def _refuse_impossible(
    counts: scipy.sparse.csr_matrix, reservation: Reservation, measurement: str, row_start: int
) -> None:
    bad = ~(np.isfinite(counts.data) & (counts.data > 0) & (counts.data <= LARGEST_COUNT))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        row = row_start + int(np.searchsorted(counts.indptr, at, side="right")) - 1
        feature = reservation.dataset.features[measurement].feature_id[int(counts.indices[at])]
        raise InputRefused(
            f"dataset {reservation.plan.dataset_id!r}: {measurement} cell {row}, feature {feature!r} holds "
            f"{counts.data[at]!r}; counts lie between 0 and {LARGEST_COUNT:,}"
        )


def _write_block(
    uri: str, rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float32], timestamp: int
) -> None:
    block = pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": values})
    with tiledbsoma.SparseNDArray.open(uri, "w", tiledb_timestamp=timestamp, context=soma_context()) as array:
        array.write(block)


def _read_back(uri: str, first: int, n_rows: int, digest: int, timestamp: int) -> None:
    found = 0
    with tiledbsoma.SparseNDArray.open(uri, tiledb_timestamp=timestamp, context=soma_context()) as array:
        for part in array.read((slice(first, first + n_rows - 1),)).tables():
            found += content_digest(*(part[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")))
    if found % 2**64 != digest:
        raise VerificationError(
            f"{uri}: cells {first} to {first + n_rows - 1} read back differ from what was written; nothing was "
            "committed; check the disk and run the same command again"
        )


class LakeWriter:
    """One driver's hold on a lake: reserves ranges and makes commits; the lake is made when there is none.

    A context manager. While it is open, another driver is told to wait.
    """

    def __init__(self, uri: str) -> None:
        self.uri = records.absolute(uri)
        self._lock = WriterLock(self.uri)
        self._names: dict[tuple[str, str], catalog.FeatureNames] = {}

    def __enter__(self) -> LakeWriter:
        self._lock.acquire()
        try:
            create_lake(self.uri)
            self._plans = catalog.plans(self.uri)
            self._commits = catalog.commits(self.uri)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def lake(self) -> Lake:
        """Open the newest commit for reading."""
        return open_lake(self.uri)

    def committed(self, plan: schema.DatasetPlan) -> bool:
        """Say whether this very content is in the lake.

        Raises:
            ConflictError: The dataset's name stands for other content.
        """
        for commit in self._commits:
            if commit.dataset.get("dataset_id") == plan.dataset_id and commit.dataset["organism"] == plan.organism:
                if commit.dataset["key"] == plan.key:
                    return True
                raise ConflictError(
                    f"{self.uri}: dataset {plan.dataset_id!r} is there with other content (commit {commit.number}); "
                    "give the new content another name with --set dataset_id=NAME"
                )
        return False

    def reserve(self, plan: schema.DatasetPlan) -> Reservation:
        """Hand out joinids; a plan that was begun before and never committed gets the same again.

        Raises:
            ConflictError: The content is committed, or another driver interfered.
        """
        if self.committed(plan):
            raise ConflictError(f"{self.uri}: dataset {plan.dataset_id!r} is in the lake already")
        begun = [known for known in self._plans if known.key == plan.key and known.organism == plan.organism]
        for measurement in plan.features:
            ensure_measurement(self.uri, plan.organism, measurement)
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
            )
            self._plans.append(mine)
        joinids = {
            name: self._feature_names(plan.organism, name).joinids(features) for name, features in plan.features.items()
        }
        floor = max(self._commits[-1].timestamp_ms, int(time.time() * 1000))
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
        """
        parent = self._commits[-1]
        content = {name: _content(reservation, name, blocks) for name in reservation.dataset.features}
        table = tables.obs_table(reservation, obs, blocks)
        latest = max((block.timestamp_ms for block in blocks), default=0)
        timestamp = max(reservation.timestamp(), latest + 1, parent.timestamp_ms + 1)
        before = Lake(self.uri, self._commits)
        tables.write_all(before, reservation, table, blocks, timestamp)
        made = Commit(
            number=parent.number + 1,
            timestamp_ms=timestamp,
            parent=parent.id,
            created=utc_now(),
            dataset=asdict(reservation.plan),
            content=content,
            versions={name: importlib.metadata.version(name) for name in VERSIONED},
        )
        catalog.create_commit(self.uri, made)
        self._commits.append(made)
        return made


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
    )


class WriterLock:
    """A record that says who writes to a lake; that of a dead process on this machine is swept away."""

    def __init__(self, lake_uri: str) -> None:
        self.lake_uri = lake_uri
        self.uri = records.join(lake_uri, records.FOLDER, "writer.lock")

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConflictError: A living process, or one on another machine, holds it.
        """
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": utc_now()}
        if records.create(self.uri, mine):
            return
        holder = records.read(self.uri) or {}
        if holder.get("host") == mine["host"] and not _alive(int(holder.get("pid", 0))):
            records.remove(self.uri)
            if records.create(self.uri, mine):
                return
        raise ConflictError(
            f"{self.lake_uri}: the lake is being written by process {holder.get('pid')} on {holder.get('host')} since "
            f"{holder.get('since')}; wait for it, or, when you know that it is gone, remove {self.uri}"
        )

    def release(self) -> None:
        """Give the lock back."""
        records.remove(self.uri)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
