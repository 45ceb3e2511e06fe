"""This module is the work of an ingestion that Ray's workers do: name, inspect, check and write pieces of a source.

Every task may run twice (Ray runs it again when a worker dies): none changes anything but X, and there the second run
puts the same values at the same coordinates.
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from ingest.job import JobSettings, SourceSettings
from ingest.sandbox import Reader
from ingest.sources.form import changed
from store.errors import StorageError
from store.schema import DatasetPlan
from store.writer import BlockStats, Reservation, Rows, write_rows

NNZ_PER_MB = 2**12
"""Values that a worker holds at a time for each MiB of its memory: a value in hand costs about 110 bytes, copies and
TileDB's buffers included, and about 400 MiB are there before the first."""


@dataclass(frozen=True)
class Limits:
    """What one worker may use."""

    memory_mb: int
    timeout_s: float

    @classmethod
    def of(cls, job: JobSettings) -> Limits:
        """Take them from a job's settings."""
        return cls(job.worker_memory_mb, job.timeout_s)

    @property
    def budget_nnz(self) -> int:
        """Values that may be in hand at a time."""
        return max(2**16, (self.memory_mb - 448) * NNZ_PER_MB)


_held: dict[str, Reader] = {}


def _reader(source: SourceSettings, name: str, limits: Limits) -> Reader:
    """Return this worker's reader of a dataset; it holds one at a time, so that the next block needs no opening."""
    key = f"{source.model_dump_json()} {name} {limits}"
    if key not in _held:
        _let_go()
        _held[key] = Reader(source, name, memory_mb=limits.memory_mb, timeout_s=limits.timeout_s)
    return _held[key]


def _let_go() -> None:
    while _held:
        _held.popitem()[1].close()


atexit.register(_let_go)


@ray.remote(num_cpus=1, max_retries=5)
def names(source: SourceSettings, limits: Limits) -> list[str]:
    """Name the datasets in a source."""
    with Reader(source, "", memory_mb=limits.memory_mb, timeout_s=limits.timeout_s) as reader:
        return reader.names()


@ray.remote(num_cpus=1, max_retries=5)
def unchanged(source: SourceSettings, fingerprint: str, limits: Limits) -> None:
    """Look whether a source that only its content tells from another is still what was read.

    Raises:
        InputRefused: It has changed.
    """
    with Reader(source, "", memory_mb=limits.memory_mb, timeout_s=limits.timeout_s) as reader:
        if reader.fingerprint() != fingerprint:
            raise changed(source.uri)


Checked = dict[tuple[str, int], dict[str, Any]]
"""Measurement and first row of a span to what ``ingest.dataset.Checked`` says of it."""


@ray.remote(num_cpus=1, max_retries=5)
def inspect(
    source: SourceSettings, name: str, limits: Limits
) -> tuple[dict[str, Any], DatasetPlan, dict[str, pa.Table], Checked]:
    """Read everything of a dataset but its values, and those too when they are a single span."""

    def found(reader: Reader) -> tuple[dict[str, Any], DatasetPlan, dict[str, pa.Table], Checked]:
        values, plan, frames = reader.inspect()
        checked = {}
        if len(values["spans"]) == 1:
            start, stop = values["spans"][0]
            for measurement in plan.features:
                checked[measurement, start] = reader.check(
                    measurement, (start, stop), limits.budget_nnz, values["fingerprint"]
                )
        return values, plan, frames, checked

    return _guarded(source, name, limits, found)


@ray.remote(num_cpus=1, max_retries=5)
def check(
    source: SourceSettings, name: str, measurement: str, span: tuple[int, int], fingerprint: str, limits: Limits
) -> dict[str, Any]:
    """Read the values of a span and look whether they are what they claim to be."""
    return _guarded(
        source, name, limits, lambda reader: reader.check(measurement, span, limits.budget_nnz, fingerprint)
    )


@ray.remote(num_cpus=1, max_retries=5)
def write(
    source: SourceSettings,
    name: str,
    reservation: Reservation,
    pieces: list[tuple[str, tuple[int, int], int]],
    fingerprint: str,
    limits: Limits,
) -> list[BlockStats]:
    """Write pieces (measurement, span, rows to read at a time) of a dataset into the lake."""

    def written(reader: Reader) -> list[BlockStats]:
        return [
            write_rows(reservation, measurement, span, _rows(reader, reservation, measurement, fingerprint), step=step)
            for measurement, span, step in pieces
        ]

    try:
        return _guarded(source, name, limits, written)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{reservation.lake_uri}: cannot be written: {error}") from error


def _rows(reader: Reader, reservation: Reservation, measurement: str, fingerprint: str) -> Rows:
    n_features = len(reservation.feature_joinids[measurement])
    return lambda start, stop: reader.rows(measurement, start, stop, n_features, fingerprint)


def _guarded(source: SourceSettings, name: str, limits: Limits, work: Any) -> Any:
    """Do work with a reader; one that answered with an error may be in any state, so it goes."""
    try:
        return work(_reader(source, name, limits))
    except BaseException:
        _let_go()
        raise
