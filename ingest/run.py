"""This module runs an ingestion as Ray tasks: inspect, reserve, write blocks, commit dataset by dataset."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import ray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ingest import sources
from ingest.dataset import Inspected, OpenDataset
from ingest.job import JobSettings, SourceSettings
from store import records
from store.cluster import ray_cluster
from store.command import console
from store.errors import ConflictError, SomaflowError, UsageError
from store.lake import utc_now
from store.writer import BlockStats, LakeWriter, Reservation, write_counts


@dataclass
class Outcome:
    """What became of one dataset."""

    source: str
    dataset_id: str
    state: str = "refused"  # committed | present | planned | refused
    cells: int = 0
    measurements: dict[str, int] = field(default_factory=dict)
    nnz: dict[str, int] = field(default_factory=dict)
    commit: int | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


@ray.remote(num_cpus=1, max_retries=2)
def _names(source: SourceSettings) -> list[str]:
    return sources.names(source)


@ray.remote(num_cpus=1, max_retries=2)
def _inspect(source: SourceSettings, name: str) -> Inspected:
    return OpenDataset(source, name).inspect()


@ray.remote(num_cpus=1, max_retries=2)
def _write(
    source: SourceSettings, name: str, reservation: Reservation, measurement: str, span: tuple[int, int]
) -> BlockStats:
    return write_counts(reservation, measurement, span[0], OpenDataset(source, name).block(measurement, *span))


def _cause(error: Exception) -> Exception:
    """Return the error that a task raised, without Ray's wrapping."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) and error.cause else error


def _cluster(job: JobSettings) -> AbstractContextManager[None]:
    return ray_cluster(job.address, cpus=job.workers, packages=("ingest", "store"), object_store_bytes=2**29)


def plan(job: JobSettings) -> list[Outcome]:
    """Inspect all sources; write nothing."""
    _refuse_nothing(job)
    with _cluster(job):
        found = [(outcome, inspected) for _, _, outcome, inspected in _inspect_all(job)]
    for outcome, inspected in found:
        if inspected is not None:
            outcome.state = "planned"
    return [outcome for outcome, _ in found]


def run(job: JobSettings) -> list[Outcome]:
    """Ingest all sources; a dataset that is refused does not stop the others.

    Raises:
        ConflictError: Another driver writes to the lake.
        StorageError: The lake cannot be written.
    """
    _refuse_nothing(job)
    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with LakeWriter(job.lake) as writer, _cluster(job), Progress(*columns, console=console) as bars:
        for source, name, outcome, inspected in _inspect_all(job):
            outcomes.append(outcome)
            if inspected is not None:
                _ingest(writer, source, name, inspected, outcome, bars)
    _keep_report(writer.uri, outcomes)
    return outcomes


def _refuse_nothing(job: JobSettings) -> None:
    if not job.source:
        raise UsageError("nothing to ingest: name a SOURCE, or a JOB.toml with [[source]] sections")


def _inspect_all(job: JobSettings) -> Iterator[tuple[SourceSettings, str, Outcome, Inspected | None]]:
    """Inspect every dataset of every source, several at a time; yield them in the order of the job."""
    named = [(source, _names.remote(source)) for source in job.source]
    begun: list[tuple[SourceSettings, str, Any]] = []
    refused: list[tuple[SourceSettings, str, Outcome, None]] = []
    for source, reference in named:
        try:
            begun += [(source, name, _inspect.remote(source, name)) for name in ray.get(reference)]
        except Exception as error:  # noqa: BLE001  one source's error is that source's outcome
            refused.append((source, "", _refusal(source, "", error), None))
    for source, name, reference in begun:
        try:
            inspected = ray.get(reference)
        except Exception as error:  # noqa: BLE001
            yield source, name, _refusal(source, name, error), None
            continue
        outcome = Outcome(
            source=source.uri,
            dataset_id=inspected.plan.dataset_id,
            cells=inspected.plan.n_obs,
            measurements={key: len(features) for key, features in inspected.plan.features.items()},
            nnz=inspected.nnz,
            notes=inspected.notes,
        )
        yield source, name, outcome, inspected
    yield from refused


def _refusal(source: SourceSettings, name: str, error: Exception) -> Outcome:
    cause = _cause(error)
    text = str(cause) if isinstance(cause, SomaflowError) else f"{type(cause).__name__}: {cause}"
    return Outcome(source=source.uri, dataset_id=name, error=text)


def _ingest(
    writer: LakeWriter, source: SourceSettings, name: str, inspected: Inspected, outcome: Outcome, bars: Progress
) -> None:
    begin = time.monotonic()
    try:
        if writer.committed(inspected.plan):
            outcome.state = "present"
            return
        reservation = writer.reserve(inspected.plan)
        blocks = _write_blocks(source, name, reservation, inspected, bars)
        if len(inspected.leftovers.columns):
            table = pa.Table.from_pandas(inspected.leftovers.astype(str))
            writer.side_table(reservation, "obs", table)
        outcome.commit = writer.commit(reservation, inspected.obs, blocks).number
        outcome.state = "committed"
    except ConflictError as error:
        outcome.error = str(error)
    except Exception as error:  # noqa: BLE001  the others go on
        outcome.error = _refusal(source, name, error).error
    finally:
        outcome.seconds = round(time.monotonic() - begin, 3)


def _write_blocks(
    source: SourceSettings, name: str, reservation: Reservation, inspected: Inspected, bars: Progress
) -> list[BlockStats]:
    shared = ray.put(reservation)
    waiting = {
        _write.remote(source, name, shared, measurement, span): span
        for measurement, spans in inspected.spans.items()
        for span in spans
    }
    total = inspected.plan.n_obs * len(inspected.spans)
    bar = bars.add_task(f"{inspected.plan.dataset_id} (cells x measurements)", total=total)
    blocks = []
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        start, stop = waiting.pop(done[0])
        blocks.append(ray.get(done[0]))
        bars.update(bar, advance=stop - start)
    return blocks


def _keep_report(lake_uri: str, outcomes: list[Outcome]) -> None:
    stamp = f"{utc_now().replace(':', '')}-{os.getpid()}"
    uri = records.join(lake_uri, records.FOLDER, "reports", f"{stamp}.json")
    records.create(uri, {"command": sys.argv, "datasets": [asdict(outcome) for outcome in outcomes]})
