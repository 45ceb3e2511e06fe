"""This module makes and reads snapshots: immutable, globally shuffled, row-major copies of a query's cells.

::

    <lake>/snapshots/<name>/              SOMA Collection
        cells                             DataFrame: row -> soma_joinid, organism, split, labels, what was measured
        codes, numbers                    DenseNDArrays, field x row: the labels as numbers, for training
        labels                            DataFrame: field, code -> value, and how many cells of each split have it
        dead                              DenseNDArray: rows of earlier parts that the lake no longer holds, if any
        sets                              DenseNDArray: where each set of rows begins, and the end, if there are sets
        <measurement>/                    SOMA Collection, the same rows in the same order in each
            indptr, features, counts      one-dimensional DenseNDArrays: a ragged CSR
            var                           DataFrame: position -> feature_id, feature_name, organism
            presence                      SparseNDArray: dataset (position in the manifest) x feature
        checksums.json                    of each array, bucket of rows by bucket of rows
        card.md                           the dataset card
        snapshot.json                     the manifest, created last: without it there is no snapshot

A snapshot that was refreshed has several parts. The arrays of the earlier ones stand where they were made; tables that
speak of the whole (var, presence, labels) stand in the newest. Features and codes keep their numbers from part to part.
Rows are numbered through all parts, the oldest first.

Shape letters used in this module:
    C  cells      G  features of one measurement      D  datasets
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import tiledbsoma
from numpy.typing import NDArray

from store import records
from store.cluster import Tasks, in_this_process
from store.context import EVER, MAKE_AGAIN, reading, soma_context
from store.errors import MissingError, UsageError, VerificationError
from store.lake import open_lake
from store.part import (
    CODED,
    LABELS,
    MANIFEST,
    Part,
    check_manifest,
    check_vocabulary,
    digest_of,
    labels_digest,
    presence_digest,
)
from store.settings import parse_settings
from store.snapshot_arrays import FORMAT
from store.splits import SnapshotSettings

__all__ = ["LABELS", "Snapshot", "SnapshotSettings", "create_snapshot", "open_snapshot", "refresh_snapshot"]

CARD = "card.md"
SCANNED_ROWS = 2**20

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what it has in all."""


@dataclass(frozen=True)
class CSRBlock:
    """Consecutive rows of one measurement: row i holds features[indptr[i]:indptr[i + 1]] and their counts.

    Attributes:
        indptr: int64, one longer than there are rows, beginning with 0.
        features: Positions in the vocabulary, ascending in a row; uint16 or uint32, as stored.
        counts: uint8, uint16, uint32 or float32, as stored.
    """

    indptr: NDArray[np.int64]
    features: NDArray[Any]
    counts: NDArray[Any]


def snapshot_uri(lake_uri: str, name: str) -> str:
    """Return where a lake keeps its snapshot ``name``.

    Raises:
        UsageError: The name is not one plain word.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"snapshot name {name!r}: use letters, digits, '_', '-' and '.', at most 100 of them")
    return records.join(records.absolute(lake_uri), "snapshots", name)


def create_snapshot(
    lake_uri: str,
    name: str,
    settings: SnapshotSettings,
    progress: Progress | None = None,
    *,
    tasks: Tasks | None = None,
    spill: str | None = None,
) -> Snapshot:
    """Copy the cells that ``settings`` choose from the lake's newest commit into a new snapshot.

    The same commit, settings and seed give the same arrays, wherever and in whatever order tasks run. A build that was
    stopped goes on when it is asked for again, with the commit with which it began.

    Args:
        lake_uri: The lake.
        name: The new snapshot's name.
        settings: What it holds and how it is split.
        progress: Told after each task.
        tasks: Where tasks run: ``store.cluster.ray_tasks``; one after the other in this process when left out.
        spill: A folder that all workers see for what lies between the two passes; left out, it lies in the lake.

    Raises:
        MissingError: There is no lake.
        UsageError: The name is taken, the filter does not parse, or no cell fits it.
        ConflictError: Another process builds it now.
    """
    from store.build import build

    refuse_taken(lake_uri, name)
    build(open_lake(lake_uri), name, settings, progress or _silent, tasks or in_this_process, spill)
    return open_snapshot(lake_uri, name)


def refresh_snapshot(
    lake_uri: str,
    old: str,
    name: str,
    progress: Progress | None = None,
    *,
    tasks: Tasks | None = None,
    spill: str | None = None,
) -> Snapshot:
    """Make a new snapshot of what ``old`` asks for, as the lake is now, reading only the cells that ``old`` has not.

    Old cells stay where they are, in the order in which they are; new ones are shuffled among themselves and become
    another part. Cells that the lake no longer holds are left out. In every batch of a stream each part has its share,
    so batches mix old and new; splits, features' numbers and labels' codes stay as they were. ``old`` is needed as
    long as the new one is.

    Raises:
        MissingError: There is no such snapshot.
        UsageError: The name is taken, nothing has changed, or a cell would change its split.
        SettingsError: Today's settings refuse what the old one was made with, such as an organism named twice.
    """
    from store.build import build

    base = open_snapshot(lake_uri, old)
    refuse_taken(lake_uri, name)
    lake = open_lake(lake_uri)
    if lake.commit.id == base.commit_id:
        raise UsageError(f"{base.uri}: the lake has not changed since commit {lake.commit.number}: nothing to refresh")
    settings = parse_settings(SnapshotSettings, base.manifest["settings"], where=base.uri)
    build(lake, name, settings, progress or _silent, tasks or in_this_process, spill, base)
    return open_snapshot(lake_uri, name)


def refuse_taken(lake_uri: str, name: str) -> None:
    """Make sure that a lake has no whole snapshot of this name.

    Raises:
        UsageError: It has one.
    """
    uri = snapshot_uri(lake_uri, name)
    if has_manifest(uri):
        raise UsageError(
            f"{uri}: there is a snapshot {name!r}; snapshots never change: choose another name or delete it with "
            f"python -m store snapshot delete {name} --lake {lake_uri}"
        )


def has_manifest(uri: str) -> bool:
    """Say whether a snapshot's manifest stands there, whole or damaged."""
    try:
        return records.read(records.join(uri, MANIFEST)) is not None
    except VerificationError:
        return True


def _silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def open_snapshot(lake_uri: str, name: str) -> Snapshot:
    """Open a snapshot by its name.

    Raises:
        MissingError: The lake has no such snapshot; the message lists those that it has.
        UsageError: It was made in another format.
        VerificationError: Its manifest is not what was written.
    """
    manifest = read_manifest(lake_uri, name)
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{snapshot_uri(lake_uri, name)}: was made in format {manifest['format']}, this version reads format "
            f"{FORMAT}; make it again: python -m store snapshot delete {name} --lake {lake_uri}, then create it"
        )
    check_manifest(snapshot_uri(lake_uri, name), manifest)
    return Snapshot(records.absolute(lake_uri), name, manifest)


def read_manifest(lake_uri: str, name: str) -> dict[str, Any]:
    """Return a snapshot's manifest, whatever its format.

    Raises:
        MissingError: The lake has no such snapshot; the message lists those that it has.
        VerificationError: The manifest is not whole.
    """
    try:
        manifest = records.read(records.join(snapshot_uri(lake_uri, name), MANIFEST))
    except VerificationError as error:
        raise VerificationError(
            f"{error}, or delete the snapshot and make it again: "
            f"python -m store snapshot delete {name} --lake {lake_uri}"
        ) from error
    if manifest is None:
        open_lake(lake_uri)
        known = ", ".join(list_snapshots(lake_uri)) or "none yet"
        raise MissingError(
            f"{lake_uri}: no snapshot {name!r} (snapshots here: {known}); make it with: "
            f"python -m store snapshot create {name} --lake {lake_uri}"
        )
    return manifest


def list_snapshots(lake_uri: str) -> list[str]:
    """Name the lake's snapshots, also damaged ones, in alphabetical order; half-made ones do not exist."""
    folder = records.join(records.absolute(lake_uri), "snapshots")
    return [name for name in records.folders(folder) if has_manifest(records.join(folder, name))]


def read_manifests(lake_uri: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the lake's snapshots to their manifests, whatever their format, and the names of damaged ones."""
    found, damaged = {}, []
    for name in list_snapshots(lake_uri):
        try:
            found[name] = read_manifest(lake_uri, name)
        except VerificationError:
            damaged.append(name)
    return found, damaged


def begun_snapshots(lake_uri: str) -> list[str]:
    """Name the snapshots whose building or deletion was begun and has not ended; what a whole one has left is none."""
    lake_uri = records.absolute(lake_uri)
    places = records.join(lake_uri, records.FOLDER, "building"), records.join(lake_uri, "snapshots")
    begun = sorted({name for place in places for name in records.folders(place)})
    return [name for name in begun if not has_manifest(records.join(lake_uri, "snapshots", name))]


def read_card(lake_uri: str, name: str) -> str:
    """Return a snapshot's dataset card, as Markdown."""
    read_manifest(lake_uri, name)
    filesystem, path = fsspec.core.url_to_fs(records.join(snapshot_uri(lake_uri, name), CARD))
    return bytes(filesystem.cat_file(path)).decode()


def delete_snapshot(lake_uri: str, name: str) -> None:
    """Remove a snapshot, the manifest first, so that nobody sees half of it; or what is there of one half-made.

    One whose manifest is damaged can be removed too, and what a deletion that was stopped has left.

    Raises:
        MissingError: There is none of this name.
        UsageError: Another snapshot was refreshed from it and needs its arrays, or is being built from it.
        ConflictError: It is half-made, and a living process is building it.
    """
    from store.build import builder_lock, remove_work

    lake_uri = records.absolute(lake_uri)
    uri = snapshot_uri(lake_uri, name)
    if not has_manifest(uri) and name not in begun_snapshots(lake_uri):
        read_manifest(lake_uri, name)  # which says that there is none
    lock = builder_lock(lake_uri, name)
    lock.acquire()
    try:
        _refuse_needed(lake_uri, name)
        records.remove(records.join(uri, MANIFEST))
        remove_work(lake_uri, name)
        records.remove(uri)
    finally:
        lock.release()


def _refuse_needed(lake_uri: str, name: str) -> None:
    """Make sure that no other snapshot, whole or begun, needs this one; a damaged one needs none any more."""
    from store.build import needed_snapshot

    uri = snapshot_uri(lake_uri, name)
    for other in begun_snapshots(lake_uri):
        if other != name and needed_snapshot(lake_uri, other) == name:
            raise UsageError(
                f"{uri}: snapshot {other!r} is being built from it; let that end, or delete {other!r} first"
            )
    for other, manifest in read_manifests(lake_uri)[0].items():
        if other != name and name in {part["name"] for part in manifest.get("parts", ())}:
            raise UsageError(f"{uri}: snapshot {other!r} was refreshed from it and needs it; delete {other!r} first")


class Snapshot:
    """A snapshot opened for reading; cheap to pickle, safe to read from several threads.

    Attributes:
        n_cells: Cells that are in a split.
        n_rows: Rows of all parts; more than cells where the lake has let some go.
        parts: Its parts, the oldest first.
        splits: Split to its cells.
    """

    def __init__(self, lake_uri: str, name: str, manifest: dict[str, Any]) -> None:
        self.lake_uri = lake_uri
        self.name = name
        self.manifest = manifest
        self.uri = snapshot_uri(lake_uri, name)
        self.n_cells: int = manifest["n_cells"]
        self.measurements: tuple[str, ...] = tuple(manifest["measurements"])
        self.levels = tuple(name for name, of in manifest["measurements"].items() if of.get("layer") == "value")
        self.datasets: tuple[str, ...] = tuple(manifest["datasets"])
        self.splits: dict[str, int] = manifest["splits"]
        firsts = np.cumsum([0, *(entry["n_rows"] for entry in manifest["parts"])]).tolist()
        self.parts = tuple(
            Part(lake_uri, entry, first) for entry, first in zip(manifest["parts"], firsts, strict=False)
        )
        self.n_rows: int = firsts[-1]
        self.seed: int = manifest["settings"]["seed"]
        self.commit_id: str = manifest["commit_id"]
        self.lake_timestamp: int = manifest["lake_timestamp"]
        self.vocabulary_hash: str = manifest["vocabulary_hash"]
        self.id: str = manifest["id"]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Snapshot, (self.lake_uri, self.name, self.manifest))

    def vocabulary(self, measurement: str) -> pa.Table:
        """Return feature_id, feature_name, organism of each feature; its position is its number in ``block``."""
        self._know(measurement)
        return self._var(measurement).select(["feature_id", "feature_name", "organism"])

    def var_rows(self, measurement: str) -> list[tuple[str, str, str, int]]:
        """Return feature_id, feature_name, organism and joinid in the lake of each feature."""
        if measurement not in self.measurements:
            return []
        columns = ("feature_id", "feature_name", "organism", "lake_joinid")
        found = self._var(measurement)
        return list(zip(*(found[column].to_pylist() for column in columns), strict=True))

    def cells(self, columns: Sequence[str] | None = None, spans: Sequence[tuple[int, int]] | None = None) -> pa.Table:
        """Return one line for each row: its number, joinid, organism, split, labels.

        Args:
            columns: Columns wanted (none: all); ``row`` is always among them.
            spans: Rows wanted, each first and behind the last, in the order asked (none: all, which for many millions
                of cells takes some hundred bytes of memory each).

        The split of a cell that the lake no longer holds is empty.

        Raises:
            UsageError: Unknown column, or rows outside the snapshot.
        """
        tables = [self.parts[0].cells(0, 0, columns)]
        for first, stop in [(0, self.n_rows)] if spans is None else spans:
            self._refuse_outside(first, stop)
            for part, start, end in self._within(first, stop):
                table = part.cells(start, end, columns)
                rows = pa.array(table["row"].to_numpy() + part.first_row)
                tables.append(table.set_column(0, "row", rows))
        whole = pa.concat_tables(tables)
        if len(self.dead) and "split" in whole.schema.names:
            gone = pa.array(np.isin(whole["row"].to_numpy(), self.dead))
            position = whole.schema.names.index("split")
            nothing = pa.scalar("", whole["split"].type)
            whole = whole.set_column(position, "split", pa.compute.if_else(gone, nothing, whole["split"]))
        return whole

    def _refuse_outside(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_rows:
            raise UsageError(f"{self.uri}: rows {start} to {stop} are outside 0 to {self.n_rows}")

    def _within(self, first: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Yield the parts that have some of these rows, with the first and the one behind the last, counted in it."""
        for part in self.parts:
            start, end = max(first - part.first_row, 0), min(stop - part.first_row, part.n_rows)
            if start < end:
                yield part, start, end

    @cached_property
    def dead(self) -> NDArray[np.int64]:
        """Rows, ascending, of cells that the lake no longer held when the snapshot was made; they are in no split.

        Raises:
            VerificationError: The array is not what was written.
        """
        if not self.manifest["n_dead"]:
            return np.empty(0, np.int64)
        uri = records.join(self.uri, "dead")
        with reading(uri, MAKE_AGAIN), tiledbsoma.DenseNDArray.open(uri, context=soma_context(EVER)) as array:
            dead = np.asarray(array.read().to_numpy())
        self._compare("dead", digest_of(dead))
        return dead

    def label_values(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return, for each of ``store.part.CODED``, its values in the order of their codes, to cells of each split."""
        return self._labels

    @cached_property
    def _labels(self) -> dict[str, dict[str, dict[str, int]]]:
        found: dict[str, dict[str, dict[str, int]]] = {name: {} for name in CODED}
        table = self._table("", "labels")
        columns = ("field", "value", "split", "n_cells")
        for name, value, split, n_cells in zip(*(table[column].to_pylist() for column in columns), strict=True):
            found[name].setdefault(value, {})[split] = n_cells
        self._compare("labels", labels_digest(found, tuple(self.splits)))
        return found

    def _compare(self, member: str, digest: str) -> None:
        """Compare a table's digest with the manifest; those of snapshots that were made earlier have none."""
        if self.manifest.get("tables", {}).get(member, digest) != digest:
            raise VerificationError(
                f"{self.uri}/{member}: is not what was written: files of it are lost or damaged; put them back, or "
                "delete the snapshot and make it again"
            )

    def label_counts(self, dead: NDArray[np.int64]) -> dict[str, dict[str, dict[str, int]]]:
        """Return what ``label_values`` would be if these rows, and no others, were dead."""
        known = self.label_values()
        if len(dead) == len(self.dead):
            return known
        names = {field: list(values) for field, values in known.items()}
        counts = {field: np.zeros((len(names[field]), len(self.splits)), np.int64) for field in CODED}
        gone = np.zeros(self.n_rows, dtype=bool)
        gone[dead] = True
        for part in self.parts:
            for number, split in enumerate(self.splits):
                first, stop = part.split_rows[split]
                for start in range(first, stop, SCANNED_ROWS):
                    end = min(start + SCANNED_ROWS, stop)
                    alive = ~gone[part.first_row + start : part.first_row + end]
                    for field, codes in zip(CODED, part.codes(CODED, start, end), strict=True):
                        counts[field][:, number] += np.bincount(codes[alive], minlength=len(names[field]))
        return {
            field: {
                value: dict(zip(self.splits, of.tolist(), strict=True))
                for value, of in zip(names[field], counts[field], strict=True)
            }
            for field in CODED
        }

    def identities(self) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield organism, and joinid, row and split (by number) of its cells that are in a split, some at a time."""
        organisms = list(self.label_values()["organism"])
        for part in self.parts:
            for start in range(0, part.n_rows, SCANNED_ROWS):
                stop, first = min(start + SCANNED_ROWS, part.n_rows), part.first_row + start
                split = np.full(stop - start, -1, np.int64)
                for number, name in enumerate(self.splits):
                    begin, end = (max(row - start, 0) for row in part.split_rows[name])
                    split[begin:end] = number
                low, high = np.searchsorted(self.dead, [first, part.first_row + stop])
                split[self.dead[low:high] - first] = -1
                joinids = part.cells(start, stop, ["soma_joinid"])["soma_joinid"].to_numpy()
                (code,) = part.codes(["organism"], start, stop)
                for number, organism in enumerate(organisms):
                    if len(rows := np.flatnonzero((code == number) & (split >= 0))):
                        yield organism, joinids[rows], first + rows, split[rows]

    def _var(self, measurement: str) -> pa.Table:
        """Read the features, and compare them with the manifest."""
        table = self._table(measurement, "var")
        expected = self.manifest["measurements"][measurement]["vocabulary_hash"]
        check_vocabulary(self.uri, measurement, table, expected)
        return table

    def _table(self, measurement: str, member: str) -> pa.Table:
        uri = records.join(self.uri, *(part for part in (measurement, member) if part))
        with reading(uri, MAKE_AGAIN), tiledbsoma.DataFrame.open(uri, context=soma_context(EVER)) as frame:
            return frame.read().concat().sort_by("soma_joinid")

    def presence(self, measurement: str) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
        """Return the dataset names, and measured_DG: which of them measures which feature of the vocabulary.

        Raises:
            UsageError: Unknown measurement.
            VerificationError: The array is not what was written.
        """
        self._know(measurement)
        shape = (len(self.datasets), self.manifest["measurements"][measurement]["n_features"])
        measured_DG = np.zeros(shape, dtype=bool)
        uri = records.join(self.uri, measurement, "presence")
        with reading(uri, MAKE_AGAIN), tiledbsoma.SparseNDArray.open(uri, context=soma_context(EVER)) as array:
            found = array.read().tables().concat()
        measured_DG[found["soma_dim_0"].to_numpy(), found["soma_dim_1"].to_numpy()] = True
        self._compare(f"{measurement}/presence", presence_digest(measured_DG))
        return self.datasets, measured_DG

    def block(self, measurement: str, start: int, stop: int) -> CSRBlock:
        """Read rows ``start`` to ``stop`` (exclusive).

        Many consecutive rows in one call are fast, single rows are not. Threads may call this at the same time.

        Raises:
            UsageError: Unknown measurement or rows outside the snapshot.
            VerificationError: The stored bytes are damaged.
        """
        self._know(measurement)
        self._refuse_outside(start, stop)
        pieces = [part.block(measurement, first, last) for part, first, last in self._within(start, stop)]
        if not pieces:
            pieces = [self.parts[0].block(measurement, 0, 0)]
        ends = np.cumsum([0, *(piece[0][-1] for piece in pieces)])
        indptr = [piece[0][1:] + end for piece, end in zip(pieces, ends, strict=False)]
        return CSRBlock(
            np.concatenate([[0], *indptr]).astype(np.int64),
            np.concatenate([piece[1] for piece in pieces]),
            np.concatenate([piece[2] for piece in pieces]),
        )

    def _know(self, measurement: str) -> None:
        if measurement not in self.measurements:
            known = ", ".join(self.measurements)
            raise UsageError(f"{self.uri}: no measurement {measurement!r}; measurements: {known}")

    def verify(self) -> None:
        """Read everything again and compare with the checksums, in every part, and the tables with the manifest.

        Raises:
            VerificationError: Some array is not what was written; the message names it.
        """
        for name in self.measurements:
            self.presence(name)
        self.label_values()
        _ = self.dead
        for part in self.parts:
            part.verify()
