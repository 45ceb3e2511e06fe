"""This module drives an ingestion: expand, inspect, check, reserve, write, commit, dataset by dataset, on Ray.

Datasets overlap (the next ones are inspected and checked while one is written), a few at a time so that the driver's
memory does not grow with their number. Ranges are reserved and commits made in the order of the job, so that the same
job makes the same lake whatever the workers do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from ingest import quality, tasks
from ingest.expand import expand
from ingest.gauges import Gauges
from ingest.job import JobSettings, SourceSettings
from ingest.progress import Progress
from ingest.sources import SEVERAL, kind_of
from ingest.sources.form import dataset_name, is_tagged
from ingest.tasks import Limits
from store import catalog, records
from store.cluster import ray_cluster, refuse_fleeting
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, UsageError
from store.lake import open_lake, utc_now
from store.schema import DatasetPlan
from store.writer import BlockStats, LakeWriter, Reservation

AHEAD = 4
"""Datasets that are inspected or checked while an earlier one is still being written."""

AHEAD_CELLS = 2**21
"""Cells of those; with more in hand no other dataset is begun. The driver holds some 300 bytes for each."""

WORKER_LOST = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)

PASSED = 5
"""Files of no known kind that are named."""


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
    problems: list[str] = field(default_factory=list)
    exit_code: int = 0
    quality: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def refuse(self, *problems: str, exit_code: int = InputRefused.exit_code) -> None:
        """Set down why the dataset does not come in, and the exit status if that holds for all."""
        self.state, self.exit_code = "refused", exit_code
        self.problems += problems
        self.error = " | ".join(self.problems)


@dataclass
class _Dataset:
    """A dataset on its way into the lake."""

    source: SourceSettings
    name: str
    outcome: Outcome
    begun: float = field(default_factory=time.monotonic)
    values: dict[str, Any] = field(default_factory=dict)
    plan: DatasetPlan | None = None
    frames: dict[str, pa.Table] = field(default_factory=dict)
    checked: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    inspecting: Any = None
    checking: dict[Any, tuple[str, int]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is called while it comes in; one without a name, like its source."""
        return self.name or self.source.uri

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Half-open ranges of rows, in order."""
        return [(start, stop) for start, stop in self.values["spans"]]

    def cells(self, measurement: str, column: str) -> Any:
        """Join what the checks of a measurement's spans found of each cell."""
        return np.concatenate([self.checked[measurement, start][column] for start, _ in self.spans])


_Held = dict[str, tuple[dict[str, str], str]]
"""Name of a dataset in the lake, or planned, to its organism, key and origin, and what brings it in."""


_Brought = dict[str, dict[str, str]]
"""Name of a dataset to organism, key, origin and address of what a source of this job brings in under it."""


def plan(job: JobSettings) -> list[Outcome]:
    """Inspect and check all sources, and look what the lake has of them already, if there is one; write nothing."""
    _refuse_nothing(job)
    held = _held(job.lake)
    with _cluster(job), Progress(None) as progress:
        outcomes, brought = [], _Brought()
        for dataset in _examined(job, progress):
            _refuse_second(dataset, brought)
            if dataset.plan and not dataset.outcome.problems:
                _foresee(dataset, dataset.plan, held)
            progress.done(dataset.label, dataset.outcome.state)
            outcomes.append(dataset.outcome)
    return outcomes


def _held(lake_uri: str) -> _Held:
    """Return what is in a lake; nothing where there is no lake yet."""
    try:
        current = open_lake(lake_uri).current
    except MissingError:
        return {}
    return {commit.dataset["dataset_id"]: (commit.dataset, f"commit {commit.number}") for commit in current}


def _foresee(dataset: _Dataset, plan: DatasetPlan, held: _Held) -> None:
    """Say what a run would do with a dataset that nothing is wrong with, and add it to what is ``held``."""
    before, by = held.get(plan.dataset_id, ({}, ""))
    mine = {"organism": plan.organism, "key": plan.key, "origin": plan.origin}
    if before and all(before[name] == mine[name] for name in ("organism", "key")):
        dataset.outcome.state = "present"
        return
    if before and (why := catalog.refusal(plan, before, by, replaces=dataset.source.replaces)):
        dataset.outcome.refuse(why, exit_code=ConflictError.exit_code)
        return
    dataset.outcome.state = "planned"
    if before:
        dataset.outcome.notes.append(f"a new version: takes the place of the one of {by}")
    held[plan.dataset_id] = (mine, "this plan")


def _refuse_second(dataset: _Dataset, brought: _Brought) -> None:
    """Refuse what would take the place of a dataset of the same job: the next run would bring both in anew.

    What two sources bring in alike is there already when the second one comes.
    """
    plan = dataset.plan
    if plan is None or dataset.outcome.problems:
        return
    mine = {"organism": plan.organism, "key": plan.key, "origin": plan.origin, "uri": plan.info["source_uri"]}
    other = brought.setdefault(plan.dataset_id, mine)
    alike = [name for name in mine if mine[name] == other[name]]
    if "organism" in alike and "key" not in alike and ("origin" in alike or dataset.source.replaces):
        dataset.outcome.refuse(
            f"{dataset.outcome.source}: would take the place of dataset {plan.dataset_id!r}, which the same job brings "
            f"in from {other['uri']}; set dataset_id=NAME on one of the two",
            exit_code=UsageError.exit_code,
        )
        dataset.frames, dataset.checked = {}, {}


def run(job: JobSettings) -> list[Outcome]:
    """Ingest all sources; a dataset that is refused does not stop the others.

    Raises:
        ConflictError: Another driver writes to the lake.
        StorageError: The lake cannot be written.
        UsageError: There is nothing to ingest, or the lake would be deleted with the job's working directory.
    """
    _refuse_nothing(job)
    refuse_fleeting(lake=job.lake)
    outcomes: list[Outcome] = []
    with (
        LakeWriter(job.lake) as writer,
        _cluster(job),
        Gauges(job.lake) as gauges,
        Progress(writer.uri, gauges) as progress,
    ):
        try:
            brought = _Brought()
            for dataset in _examined(job, progress):
                outcomes.append(dataset.outcome)
                _refuse_second(dataset, brought)
                if not dataset.outcome.problems:
                    _ingest(writer, dataset, Limits.of(job), progress)
                dataset.outcome.seconds = round(time.monotonic() - dataset.begun, 3)
                failed = dataset.outcome.exit_code not in (0, InputRefused.exit_code)
                progress.done(dataset.label, dataset.outcome.state, failed)
        finally:
            if outcomes:
                _keep_report(writer.uri, outcomes)
    return outcomes


def _refuse_nothing(job: JobSettings) -> None:
    if not job.source:
        raise UsageError("nothing to ingest: name a SOURCE, or a JOB.toml with [[source]] sections")


def _cluster(job: JobSettings) -> AbstractContextManager[None]:
    return ray_cluster(job.address, cpus=job.workers, packages=("ingest", "store"), object_store_bytes=2**28)


def _examined(job: JobSettings, progress: Progress) -> Iterator[_Dataset]:
    """Inspect and check every dataset of every source, some ahead; yield them in the order of the job."""
    limits = Limits.of(job)
    ahead: list[_Dataset] = []
    coming = _named(job, limits, progress)
    more = True
    while more or ahead:
        while more and len(ahead) <= AHEAD and sum(dataset.outcome.cells for dataset in ahead) < AHEAD_CELLS:
            dataset = next(coming, None)
            if dataset is None:
                more = False
                break
            progress.add(dataset.label)
            if not dataset.outcome.problems:
                dataset.inspecting = tasks.inspect.remote(dataset.source, dataset.name, limits)
            ahead.append(dataset)
        if not ahead:
            return
        first = ahead[0]
        while first.inspecting is not None or first.checking:
            _advance(ahead, limits, progress)
        _conclude(first)
        yield ahead.pop(0)


def _named(job: JobSettings, limits: Limits, progress: Progress) -> Iterator[_Dataset]:
    """Expand the job's sources to datasets; what cannot be named comes as a refused one."""
    for n_given, given in enumerate(job.source, 1):
        given_left = len(job.source) - n_given
        progress.coming(given_left + 1)
        try:
            expanded = expand(given, job.schemes)
            sources, passed = expanded.sources, _passed(given, expanded.passed)
        except Exception as error:  # noqa: BLE001  one source's error is that source's outcome
            outcome = Outcome(given.uri, "")
            outcome.refuse(_reason(error), exit_code=_exit_code(error))
            progress.coming(given_left)
            yield _Dataset(given, "", outcome)
            continue
        for n_source, source in enumerate(sources, 1):
            sources_left = given_left + len(sources) - n_source
            progress.coming(sources_left + 1)
            try:
                known = kind_of(source) not in SEVERAL
                found = [dataset_name(source)] if known else ray.get(tasks.names.remote(source, limits))
            except Exception as error:  # noqa: BLE001  one source's error is that source's outcome
                outcome = Outcome(source.uri, "", notes=[*passed])
                passed.clear()
                outcome.refuse(_reason(error))
                progress.coming(sources_left)
                yield _Dataset(source, "", outcome)
                continue
            for n_name, name in enumerate(found, 1):
                progress.coming(sources_left + len(found) - n_name)
                outcome = Outcome(source.uri, name, notes=[*passed])
                passed.clear()
                yield _Dataset(source, name, outcome)


def _passed(given: SourceSettings, uris: list[str]) -> list[str]:
    """Say which files of a folder or glob are not looked at, in one note or none."""
    names = [uri.removeprefix(f"{records.absolute(given.uri)}/") for uri in uris]
    more = f" and {len(names) - PASSED:,} more" if len(names) > PASSED else ""
    return [f"passed over, of no known kind: {', '.join(names[:PASSED])}{more}"] if names else []


def _cause(error: Exception) -> Exception:
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) and error.cause else error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    if isinstance(cause, SomaflowError):
        return str(cause)
    if isinstance(cause, ImportError):
        return f"{cause} (this kind of address needs a library that is not installed with somaflow)"
    if isinstance(cause, WORKER_LOST):
        return "the worker died again and again; is its memory enough? see worker_memory_mb"
    return f"{type(cause).__name__}: {cause}"


def _exit_code(error: Exception) -> int:
    cause = _cause(error)
    return cause.exit_code if isinstance(cause, SomaflowError) else SomaflowError.exit_code


def _advance(ahead: list[_Dataset], limits: Limits, progress: Progress) -> None:
    """Wait for one task of the datasets ahead and act on it."""
    owner = {dataset.inspecting: dataset for dataset in ahead if dataset.inspecting is not None}
    owner |= {reference: dataset for dataset in ahead for reference in dataset.checking}
    (done, *_), _ = ray.wait(list(owner), num_returns=1)
    progress.task_ended()
    dataset = owner[done]
    if done is dataset.inspecting or done == dataset.inspecting:
        dataset.inspecting = None
        try:
            dataset.values, dataset.plan, frames, dataset.checked = ray.get(done)
            # one piece of the driver's own, so that the object store, which is small, lets go of the others
            dataset.frames = {name: table.combine_chunks() for name, table in frames.items()}
        except Exception as error:  # noqa: BLE001
            dataset.outcome.refuse(_reason(error))
            return
        _checks(dataset, limits, progress)
        return
    key = dataset.checking.pop(done)
    try:
        dataset.checked[key] = ray.get(done)
    except Exception as error:  # noqa: BLE001
        dataset.outcome.refuse(_reason(error))
        for reference in dataset.checking:
            ray.cancel(reference, force=False)
        dataset.checking.clear()


def _checks(dataset: _Dataset, limits: Limits, progress: Progress) -> None:
    """Begin to check all values of a dataset whose names are known."""
    assert dataset.plan is not None
    outcome = dataset.outcome
    outcome.dataset_id, outcome.cells = dataset.plan.dataset_id, dataset.plan.n_obs
    outcome.measurements = {key: len(features) for key, features in dataset.plan.features.items()}
    outcome.notes += dataset.values["notes"]
    progress.size(dataset.name, dataset.plan.n_obs * len(dataset.plan.features))
    if len(dataset.spans) == 1:
        return  # checked when it was inspected
    fingerprint = dataset.values["fingerprint"]
    dataset.checking = {
        tasks.check.remote(dataset.source, dataset.name, measurement, span, fingerprint, limits): (measurement, span[0])
        for measurement in dataset.plan.features
        for span in dataset.spans
    }


def _conclude(dataset: _Dataset) -> None:
    """Gather what was found, all problems of a dataset together."""
    outcome = dataset.outcome
    if dataset.plan is None:
        return
    problems = list(dataset.values["problems"])
    for measurement in dataset.plan.features:
        parts = [part for (name, _), part in sorted(dataset.checked.items()) if name == measurement]
        found: list[str] = next((part["problems"] for part in parts if part["problems"]), [])
        if found:
            if measurement in dataset.plan.layers:
                way = "Say it of other measurements alone (values.NAME=lognorm), or name another matrix with layer=NAME"
            else:
                key = "values" if len(dataset.plan.features) == 1 else f"values.{measurement}"
                way = (
                    f"Counts are wanted: name their layer with layer=raw or layer=NAME, or say {key}=log1p (scaled "
                    f"counts, to be restored), {key}=lognorm or {key}=value (kept as such)"
                )
            problems.append(f"{measurement}: {'; '.join(found)}. {way}")
    if problems:
        outcome.refuse(f"{outcome.source}: {problems[0]}", *problems[1:])
    if outcome.problems:
        dataset.frames, dataset.checked = {}, {}
        return
    outcome.nnz = {name: int(dataset.cells(name, "nnz_C").sum()) for name in dataset.plan.features}
    outcome.quality = quality.summary(
        {
            name: {column: dataset.cells(name, column) for column in ("nnz_C", "sum_C", "mito_C")}
            for name in dataset.plan.features
        },
        dataset.plan,
        dataset.values["mapped"],
    )


def _ingest(writer: LakeWriter, dataset: _Dataset, limits: Limits, progress: Progress) -> None:
    plan, outcome = dataset.plan, dataset.outcome
    assert plan is not None
    writer.settle()  # where the store is still away, the job ends: the rest of it would have to wait as long
    try:
        if writer.committed(plan):
            outcome.state = "present"
            return
        reservation = writer.reserve(plan, replaces=dataset.source.replaces)
        blocks = _write_spans(dataset, reservation, limits, progress)
        if not is_tagged(dataset.values["fingerprint"]):  # others are looked at for each block
            ray.get(tasks.unchanged.remote(dataset.source, dataset.values["fingerprint"], limits))
        for name, frame in dataset.frames.items():
            if name.startswith("side "):
                writer.side_table(reservation, name.removeprefix("side "), frame)
        writer.side_table(reservation, "cells", _cells_table(dataset))
        quality.keep(writer.uri, reservation.plan.number, outcome.quality)
        outcome.commit = writer.commit(reservation, dataset.frames["obs"], blocks).number
        outcome.state = "committed"
    except Exception as error:  # noqa: BLE001  the others go on
        outcome.refuse(_reason(error), exit_code=_exit_code(error))
    finally:
        dataset.frames, dataset.checked = {}, {}


def _cells_table(dataset: _Dataset) -> pa.Table:
    """Return what recognises a cell in another dataset: the digest and number of its first measurement's values."""
    assert dataset.plan is not None
    measurement = "RNA" if "RNA" in dataset.plan.features else next(iter(dataset.plan.features))
    columns = {"digest": dataset.cells(measurement, "digest_C"), "nnz": dataset.cells(measurement, "nnz_C")}
    return pa.table(columns, metadata={"measurement": measurement})


def _write_spans(dataset: _Dataset, reservation: Reservation, limits: Limits, progress: Progress) -> list[BlockStats]:
    shared = ray.put(reservation)
    pieces = [
        (measurement, span, int(dataset.checked[measurement, span[0]]["step"]))
        for measurement in reservation.dataset.features
        for span in dataset.spans
    ]
    groups = [pieces] if len(dataset.spans) == 1 else [[piece] for piece in pieces]
    fingerprint = dataset.values["fingerprint"]
    waiting = [tasks.write.remote(dataset.source, dataset.name, shared, group, fingerprint, limits) for group in groups]
    blocks: list[BlockStats] = []
    try:
        while waiting:
            done, _ = ray.wait(waiting, num_returns=1, timeout=1.0)
            if done:
                waiting.remove(done[0])
                progress.task_ended()
                written = ray.get(done[0])
                blocks += written
                progress.wrote(dataset.name, written)
            progress.tick()
    finally:
        for reference in waiting:
            ray.cancel(reference, force=False)
    return blocks


def _keep_report(lake_uri: str, outcomes: list[Outcome]) -> None:
    stamp = f"{utc_now().replace(':', '')}-{os.getpid()}"
    uri = records.join(lake_uri, records.FOLDER, "reports", f"{stamp}.json")
    records.create(uri, {"command": sys.argv, "datasets": [asdict(outcome) for outcome in outcomes]})
