"""This module drives the building of a snapshot: what goes where is decided here, the tasks of the shuffle move it.

What a build needs to go on after its driver died stands in ``<lake>/somaflow/building/<name>``: the plan (settings and
commit, from which everything else follows) and a record of each finished task, in a folder that bears the plan's mark.
The driver itself takes some 100 bytes of each cell, and no counts.

Shape letters used in this module:
    C  chosen cells, in lake order      R  rows of the part that is made
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from store import records, schema, snapshot
from store.chosen import (
    CELL_ELEMENTS,
    chosen_cells,
    chosen_measurements,
    difference,
    kept_features,
    n_of_each,
    offsets,
    organisms_with,
    sizes,
    without,
)
from store.cluster import Tasks
from store.context import reading, storage
from store.errors import ConflictError, MissingError, SomaflowError, StorageError, UsageError, VerificationError
from store.lake import Lake, open_lake, utc_now
from store.lock import WriterLock
from store.order import order_of, units_of
from store.part import CODED, MANIFEST, checksums_digest, manifest_digest
from store.shuffle import (
    Bucket,
    Chunk,
    Gather,
    Scatter,
    gather,
    gather_record,
    scatter,
    scatter_record,
)
from store.snapshot_arrays import FORMAT, Contents, VarRow, array_uris, create_arrays, tidy, vocabulary_hash
from store.snapshot_card import write_card
from store.spilled import Spilled, add_cells
from store.splits import SnapshotSettings, coded, draw_splits

if TYPE_CHECKING:
    from store.snapshot import Progress, Snapshot

log = logging.getLogger("somaflow.store")

PLAN = "plan.json"
ELEMENTS = 2**24
"""Values that a task moves, about; it needs some 60 bytes of memory for each."""
MANY_ELEMENTS = 2**33
"""From so many values on, tasks move four times as many: the number of reads of spill files falls by sixteen."""

READ_RECORDS = 16
"""Records that are read at the same time; one of a build with thousands of buckets takes a megabyte or more."""
CHECKED_EVERY_S = 5.0
"""While tasks run, the driver looks so often whether the build is still its own."""


def work_folder(lake_uri: str, name: str) -> str:
    """Return where a snapshot that is being built keeps its plan, records and, unless told otherwise, spill files."""
    return records.join(lake_uri, records.FOLDER, "building", name)


def _as_begun(lake: Lake, name: str, commit: int) -> Lake:
    """Open the lake as it was when a build began."""
    try:
        return open_lake(lake.uri, commit)
    except MissingError as error:
        raise MissingError(
            f"{lake.uri}: snapshot {name!r} was begun with commit {commit}, which a vacuum has let go since; drop what "
            f"was done with: python -m store snapshot delete {name} --lake {lake.uri}, and give this command again"
        ) from error


def _plan(work: str) -> dict[str, Any]:
    """Return the plan of a build; nothing where there is none, or one that is damaged: no build goes on with it."""
    try:
        return records.read(records.join(work, PLAN)) or {}
    except VerificationError:
        return {}


def remove_work(lake_uri: str, name: str) -> None:
    """Remove what a build keeps for itself, and of the folder into which it spilled nothing but its own files.

    The plan says first that all is dropped, and goes last: of what a killed removal leaves, no build uses anything.
    """
    work = work_folder(lake_uri, name)
    plan = _plan(work)
    if plan:
        records.replace(records.join(work, PLAN), {**plan, "dropped": True})
        for file in records.names(plan["spill"]):
            if plan["mark"] in file:
                records.remove(records.join(plan["spill"], file))
        if plan["made_spill"] and records.is_local(plan["spill"]):
            with contextlib.suppress(OSError):  # somebody else put something there
                Path(plan["spill"]).rmdir()
        for member in records.names(work):
            if member != PLAN:
                records.remove(records.join(work, member))
    records.remove(work)


def build(
    lake: Lake,
    name: str,
    settings: SnapshotSettings,
    progress: Progress,
    tasks: Tasks,
    spill: str | None = None,
    base: Snapshot | None = None,
) -> None:
    """Build a snapshot, or go on with a build of the same settings; the manifest comes last.

    Args:
        lake: The commit to take cells from; a build that goes on keeps the commit with which it began.
        name: The snapshot's name.
        settings: What it holds.
        progress: Told after each task.
        tasks: Where tasks run.
        spill: A folder that all workers see, for what lies between the two passes; none keeps it in the lake.
        base: A snapshot whose cells are taken as they are, so that only new cells are read.

    Raises:
        UsageError: The settings do not fit the lake, a build of this name has others, or the name is taken.
        ConflictError: Another process builds it now, or took the build over: this one leaves all as it is.
    """
    work = work_folder(lake.uri, name)
    like = base or (snapshot.open_snapshot(lake.uri, settings.like) if settings.like else None)
    wanted = {
        "settings": settings.model_dump(mode="json"),
        "base": base.id if base else "",
        "like": like.id if like else "",
        "format": FORMAT,
        "sizes": [ELEMENTS, CELL_ELEMENTS, MANY_ELEMENTS],
    }
    lock = builder_lock(lake.uri, name)
    with storage(lake.uri):
        lock.acquire()
        try:
            snapshot.refuse_taken(lake.uri, name)  # another may have made it since the caller looked
            known = _plan(work)
            if not known or known.get("dropped"):
                remove_work(lake.uri, name)
                known = {}
            if known and known["wanted"] != wanted:
                raise UsageError(
                    f"{lake.uri}: snapshot {name!r} was begun with other settings, from another snapshot, or by "
                    "another version; choose another name, or drop what was done with: "
                    f"python -m store snapshot delete {name} --lake {lake.uri}"
                )
            if known:
                lake = _as_begun(lake, name, known["commit"])
            with reading(lake.uri):
                job = _Build(lake, name, settings, progress, tasks, base, like, lock.check)
            if not known:
                folder = records.absolute(spill) if spill else records.join(work, "spill")
                known = {
                    "wanted": wanted,
                    "needs": like.name if like else "",
                    "commit": lake.commit.number,
                    "spill": folder,
                    "made_spill": not records.exists(folder),
                    "mark": secrets.token_hex(6),
                }
                records.create(records.join(work, PLAN), known)
            job.run(known["spill"], known["mark"])
            lock.check()
            try:
                remove_work(lake.uri, name)
            except StorageError as error:  # as where one may write and not remove
                log.warning("snapshot %r is whole; what its build left stays until `store gc`: %s", name, error)
        except SomaflowError:
            lock.check()  # a build that was taken over trips over what the other one has removed
            raise
        finally:
            lock.release()


def remove_leavings(lake_uri: str) -> int:
    """Remove what builds have left of which the snapshot is whole; return of how many. A living one removes its own."""
    removed = 0
    for name in records.folders(records.join(lake_uri, records.FOLDER, "building")):
        uri = snapshot.snapshot_uri(lake_uri, name)
        if not snapshot.has_manifest(uri):
            continue
        lock = builder_lock(lake_uri, name)
        try:
            lock.acquire()
            if snapshot.has_manifest(uri):  # else it was deleted, and begun anew, meanwhile
                remove_work(lake_uri, name)
                removed += 1
        except ConflictError:
            continue
        finally:
            lock.release()
    return removed


def needed_snapshot(lake_uri: str, name: str) -> str:
    """Return the snapshot from whose arrays or vocabulary a begun one is built; empty where there is none."""
    plan = _plan(work_folder(lake_uri, name))
    return "" if plan.get("dropped") else str(plan.get("needs", ""))


def builder_lock(lake_uri: str, name: str) -> WriterLock:
    """Return the lock that whoever builds the snapshot holds."""
    folder = records.join(lake_uri, records.FOLDER, "building-locks", name)
    return WriterLock(lake_uri, folder, f"snapshot {name!r}")


class _Build:
    """One build; everything in it follows from lake commit, settings and base.

    ``check`` raises when the build is another's: it comes before whatever would change what that one has made.
    """

    def __init__(
        self,
        lake: Lake,
        name: str,
        settings: SnapshotSettings,
        progress: Progress,
        tasks: Tasks,
        base: Snapshot | None,
        like: Snapshot | None,
        check: Callable[[], None],
    ) -> None:
        self.lake, self.name, self.settings, self.base, self.like = lake, name, settings, base, like
        self.progress, self.tasks, self.check = progress, tasks, check
        self.uri = snapshot.snapshot_uri(lake.uri, name)
        self.splits = tuple(settings.fractions)
        cells = chosen_cells(lake, settings, refreshed=base is not None)
        self.organisms, organism_C = coded(cells, "organism")
        self.measurements, self.levels = chosen_measurements(lake, cells, settings, base)
        self.kept = kept_features(lake, settings, self.organisms, self.measurements, refreshed=base is not None)
        split_C = draw_splits(cells, settings, refreshed=base is not None)
        joinid_C = cells["soma_joinid"].to_numpy()
        self.dead, fresh = np.empty(0, np.int64), np.arange(cells.num_rows)
        if base is not None:
            fresh, self.dead = difference(base, self.organisms, self.splits, organism_C, joinid_C, split_C)
            organism_C, joinid_C, split_C = organism_C[fresh], joinid_C[fresh], split_C[fresh]
        self.organism_C, self.joinid_C, self.split_C = organism_C, joinid_C, split_C
        self.n_rows = len(joinid_C)
        number = len(base.parts) if base else 0
        self.row_C, self.split_rows, self.set_starts = order_of(
            split_C, self.splits, [settings.seed, number], units_of(cells, settings, fresh), settings.set_size
        )
        self.layers = {name: "value" if name in self.levels else "raw" for name in self.measurements}
        self.n_without = without(lake, cells, self.layers)
        self.units = {name: n_of_each(cells, f"{name}_unit") for name in ("time", "dose")}
        of_size = cells.select(["soma_joinid", "nnz", *map(schema.measured_column, schema.MEASUREMENTS)])
        sized = of_size if base is None else of_size.take(pa.array(fresh))
        self.size_C, self.per_cell = sizes(lake, self.organisms, self.layers, sized, organism_C)
        total = float(self.size_C.sum())
        self.elements = ELEMENTS if total < MANY_ELEMENTS else 4 * ELEMENTS
        per_bucket = self.elements / max(1.0, total / max(1, self.n_rows))
        self.bucket_rows = max(1, min(self.n_rows, int(per_bucket)))
        self.n_buckets = -(-self.n_rows // self.bucket_rows)
        self.offsets = {
            name: offsets(lake, name, organisms_with(lake, name, self.layers[name], self.organisms))
            for name in self.measurements
        }

    def run(self, spill: str, mark: str) -> None:
        """Run what is not done yet of both passes, then write the manifest.

        ``mark`` is in the names of spill files, and names the folder of the records.
        """
        self.work = records.join(work_folder(self.lake.uri, self.name), mark)
        self._refuse_changed()
        spilled = self._scatter(spill, mark)
        with reading(self.lake.uri):
            common = self._plan_arrays(spilled)
            datasets = self.lake.datasets()
        self.check()
        path, meant = records.join(self.work, "arrays.json"), self._vocabulary_hashes()
        made = records.read(path)
        if made is None:
            records.remove(self.uri)
            vectors = {"dead": self.dead, "sets": self.set_starts}
            contents = Contents(self.layers, self.var, self.labels, self.splits, vectors)
            made = {"vocabulary": meant, "tables": create_arrays(self.lake, self.uri, common, contents)}
            records.create(path, made)
        elif made["vocabulary"] != meant:
            raise VerificationError(
                f"{self.uri}: its features are not those with which it was begun; delete the half-made snapshot and "
                "make it again"
            )
        sums = self._gather(common, spilled)
        self.check()
        for member in array_uris(self.uri, self.measurements):
            tidy(member)
        self.check()
        self._refuse_changed()
        self._write_manifest(common, sums, made.get("tables", {}), datasets)

    def _refuse_changed(self) -> None:
        """Make sure that the snapshot from which this one is built is the one that was opened.

        Whoever deletes it looks at plans first: this finds a deletion that began before the plan stood there.
        """
        if self.like and (records.read(records.join(self.like.uri, MANIFEST)) or {}).get("id") != self.like.id:
            raise ConflictError(
                f"{self.like.uri}: was deleted or made anew since {self.name!r} is built from it; drop what was done "
                f"with: python -m store snapshot delete {self.name} --lake {self.lake.uri}"
            )

    # ------------------------------------------------------------------------------------------------------ pass 1
    def _chunks(self) -> Iterator[Chunk]:
        """Cut the cells, in lake order, into chunks of one organism and about as many values."""
        for number, (first, stop) in enumerate(pairwise(cut(self.size_C, self.organism_C, self.elements))):
            organism = self.organisms[self.organism_C[first]]
            mine = {name: by[organism] for name, by in self.offsets.items() if organism in by}
            yield Chunk(
                number,
                organism,
                self.joinid_C[first:stop],
                self.row_C[first:stop],
                self.split_C[first:stop],
                mine,
                {name: self.kept[name][organism] for name in mine if name in self.kept},
                {name: self.per_cell[organism, name] for name in mine},
                tuple(self.levels),
            )

    def _scatter(self, spill: str, mark: str) -> Spilled:
        chunks = list(self._chunks())
        common = Scatter(self.lake.uri, self.lake.commit.number, self.work, spill, mark, self.bucket_rows, self.splits)
        n_features = {
            name: sum(self.lake.n_features(organism, name) for organism in offsets)
            for name, offsets in self.offsets.items()
        }
        spilled = Spilled(len(chunks), self.n_buckets, n_features)
        for record in self._run("read", scatter, common, Lazy(range(len(chunks)), chunks.__getitem__), scatter_record):
            spilled.add(record)
        return spilled

    def _run(
        self,
        stage: str,
        function: Callable[[Any, Any], None],
        common: Any,
        items: Lazy,
        record: Callable[[str, int], str],
    ) -> Iterator[dict[str, Any]]:
        """Run the tasks of a pass that have no record yet; then yield the records of all, in order."""
        ended = set(records.names(record(self.work, 0).rpartition("/")[0]))
        uris = [record(self.work, number) for number in items.numbers]
        missing = Lazy(
            [number for number, uri in enumerate(uris) if uri.rpartition("/")[2] not in ended], items.__getitem__
        )
        done = len(items) - len(missing)
        self.progress(stage, done, len(items))
        checked = time.monotonic()
        for _ in self.tasks(function, common, missing):
            done += 1
            self.progress(stage, done, len(items))
            if time.monotonic() > checked + CHECKED_EVERY_S:
                self.check()
                checked = time.monotonic()
        for first in range(0, len(uris), READ_RECORDS):
            for uri, found in zip(uris[first:], records.read_each(uris[first : first + READ_RECORDS]), strict=False):
                if found is None:
                    raise VerificationError(f"{uri}: has gone; delete the half-made snapshot and make it again")
                yield found

    # ------------------------------------------------------------------------------------------- between the passes
    def _plan_arrays(self, spilled: Spilled) -> Gather:
        """Number features and labels, choose types, and find out where each bucket's values begin."""
        self.var: dict[str, list[VarRow]] = {}
        numbers, kinds, starts = {}, {}, {}
        for name in self.measurements:
            numbers[name] = self._number_features(name, spilled.used_F[name])
            starts[name] = np.concatenate([[0], np.cumsum(spilled.nnz_B[name])])
            largest, whole = spilled.largest[name], spilled.integral[name]
            features = "uint16" if len(self.var[name]) <= 2**16 else "uint32"
            counts = str(np.min_scalar_type(int(largest))) if whole and name not in self.levels else "float32"
            kinds[name] = (features, counts)
        self.labels = self._label_counts(spilled)
        codes = {field: {value: code for code, value in enumerate(by)} for field, by in self.labels.items()}
        return Gather(self.uri, self.work, self.bucket_rows, self.n_rows, numbers, kinds, starts, codes)

    def _number_features(self, measurement: str, used: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Number the features that occur behind those of the snapshot whose vocabulary comes first."""
        offsets = self.offsets[measurement]
        sizes = {organism: self.lake.n_features(organism, measurement) for organism in offsets}
        number = np.full(len(used), -1, dtype=np.int64)
        rows: list[VarRow] = list(self.like.var_rows(measurement)) if self.like else []
        for position, (_, _, organism, joinid) in enumerate(rows):
            if organism in offsets:
                number[offsets[organism] + joinid] = position
        for organism, offset in offsets.items():
            fresh = np.flatnonzero(used[offset : offset + sizes[organism]] & (number[offset:][: sizes[organism]] < 0))
            number[offset + fresh] = np.arange(len(rows), len(rows) + len(fresh))
            var = self.lake.var(organism, measurement)
            place = np.searchsorted(var["soma_joinid"].to_numpy(), fresh)
            named = var.select(["feature_id", "feature_name"]).take(pa.array(place)).to_pylist()
            rows += [
                (line["feature_id"], line["feature_name"], organism, int(joinid))
                for line, joinid in zip(named, fresh, strict=True)
            ]
        self.var[measurement] = rows
        return number

    def _vocabulary_hashes(self) -> dict[str, str]:
        return {
            name: vocabulary_hash(name, [row[0] for row in rows], [row[2] for row in rows])
            for name, rows in self.var.items()
        }

    def _label_counts(self, spilled: Spilled) -> dict[str, dict[str, dict[str, int]]]:
        """Return field to value, in the order of codes, to cells of each split."""
        counts: dict[str, dict[str, dict[str, int]]] = {field: {} for field in CODED}
        if self.base is not None:
            for field, by in self.base.label_counts(self.dead).items():
                counts[field] = {value: dict(of) for value, of in by.items()}
        for field in CODED:
            for value in sorted(spilled.labels[field]):
                add_cells(counts[field].setdefault(value, {}), spilled.labels[field][value])
        return counts

    # ------------------------------------------------------------------------------------------------------ pass 2
    def _gather(self, common: Gather, spilled: Spilled) -> dict[str, list[str]]:
        buckets = Lazy(range(self.n_buckets), lambda number: Bucket(number, spilled.shares(number)))
        sums: dict[str, list[str]] = {}
        for record in self._run("write", gather, common, buckets, gather_record):
            for member, digest in record["sha256"].items():
                sums.setdefault(member, []).append(digest)
        return sums

    # ---------------------------------------------------------------------------------------------------- manifest
    def _write_manifest(
        self, common: Gather, sums: dict[str, list[str]], tables: dict[str, str], datasets: pa.Table
    ) -> None:
        records.create(records.join(self.uri, "checksums.json"), sums)
        part: dict[str, Any] = {
            "name": self.name,
            "n_rows": self.n_rows,
            "bucket_rows": self.bucket_rows,
            "split_rows": {split: list(rows) for split, rows in self.split_rows.items()},
            "measurements": {
                name: {"n_features": len(self.var[name]), "nnz": int(common.starts[name][-1])}
                for name in self.measurements
            },
            "n_sets": max(0, len(self.set_starts) - 1),
            "checksums": checksums_digest(sums),
        }
        part["id"] = manifest_digest(part)
        before = self.base.manifest["parts"] if self.base else []
        counts = list(self.labels["dataset_id"].values())
        splits = {split: sum(of.get(split, 0) for of in counts) for split in self.splits}
        nnz = {
            name: sum(one["measurements"].get(name, {"nnz": 0})["nnz"] for one in [*before, part])
            for name in self.measurements
        }
        entries: dict[str, dict[str, Any]] = {
            name: {"n_features": len(self.var[name]), "nnz": nnz[name], "vocabulary_hash": digest}
            for name, digest in self._vocabulary_hashes().items()
        }
        for name in self.levels:
            entries[name]["layer"] = "value"
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "n_cells": sum(splits.values()),
            "n_dead": len(self.dead),
            "n_without": self.n_without,
            "units": self.units,
            "splits": splits,
            "measurements": entries,
            "datasets": list(self.labels["dataset_id"]),
            "tables": tables,
            "parts": [*before, part],
            "settings": self.settings.model_dump(mode="json"),
            "commit": self.lake.commit.number,
            "commit_id": self.lake.commit.id,
            "lake_timestamp": self.lake.commit.timestamp_ms,
            "vocabulary_hash": hashlib.sha256(
                "".join(entry["vocabulary_hash"] for entry in entries.values()).encode()
            ).hexdigest(),
            "versions": {key: importlib.metadata.version(key) for key in ("tiledbsoma", "tiledb", "numpy")},
        }
        manifest["id"] = manifest_digest(manifest)
        manifest["created"] = utc_now()
        filesystem, path = fsspec.core.url_to_fs(records.join(self.uri, snapshot.CARD))
        filesystem.pipe_file(path, write_card(manifest, self.labels, datasets).encode())
        records.create(records.join(self.uri, MANIFEST), manifest)


@dataclass(frozen=True)
class Lazy(Sequence[Any]):
    """Items that are made when they are asked for, by their numbers."""

    numbers: Sequence[int]
    make: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: Any) -> Any:
        chosen = self.numbers[position]
        return Lazy(chosen, self.make) if isinstance(position, slice) else self.make(chosen)


def cut(size_C: NDArray[np.float32], organism_C: NDArray[np.int32], elements: int) -> list[int]:
    """Return where stretches of one organism and of about so many elements begin, and where the last one ends."""
    # in double precision: a sum in single precision stops growing where cells are some twenty million
    stretch_C = (np.cumsum(size_C, dtype=np.float64) / elements).astype(np.int64)
    changes = (np.diff(stretch_C) != 0) | (np.diff(organism_C) != 0)
    return [0, *(np.flatnonzero(changes) + 1).tolist(), len(size_C)] if len(size_C) else [0]
