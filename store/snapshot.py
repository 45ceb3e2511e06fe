"""This module makes and reads snapshots: immutable, globally shuffled, row-major copies of a query's cells.

::

    <lake>/snapshots/<name>/              SOMA Collection
        cells                             DataFrame: row -> soma_joinid, organism, split, labels, what was measured
        <measurement>/                    SOMA Collection, the same rows in the same order in each
            indptr, features, counts      one-dimensional DenseNDArrays: a ragged CSR
            var                           DataFrame: position -> feature_id, feature_name, organism
            presence                      SparseNDArray: dataset (position in the manifest) x feature
        snapshot.json                     the manifest, created last: without it there is no snapshot

Shape letters used in this module:
    C  cells      G  features of one measurement      D  datasets
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import tiledb
import tiledb.libtiledb
import tiledbsoma
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from store import records, schema
from store.context import soma_context, tiledb_context
from store.errors import MissingError, UsageError, VerificationError
from store.lake import open_lake
from store.settings import Settings

FORMAT = 2
READING_THREADS = 1
"""TileDB's threads for one read: callers read from several threads of their own."""
MANIFEST = "snapshot.json"
LABELS = (
    "dataset_id",
    "cell_type",
    "tissue",
    "assay",
    "donor_id",
    "disease",
    "sex",
    "development_stage",
    "perturbation_type",
    "perturbation",
    "dose",
    "time",
    "batch",
    "sample_id",
    "cell_id",
    "is_primary_data",
)
"""obs columns that every snapshot carries beside its counts."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what it has in all."""


class SnapshotSettings(Settings):
    """What a snapshot holds and how it is split."""

    where: str | None = None
    """A SOMA value filter on obs; none takes every cell."""
    organisms: tuple[str, ...] = ()
    """Organisms, by their Census key; empty takes all of the lake's."""
    measurements: tuple[str, ...] = ()
    """Measurements; empty takes all that any chosen cell has."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of rows and the splits."""
    split_by: str = ""
    """An obs column whose groups (donors, perturbations, ...) stay whole in one split; empty splits cell by cell."""
    fractions: dict[str, float] = Field(default_factory=lambda: {"train": 0.9, "test": 0.1})
    """Split to its expected share of cells (or of groups); the shares sum to 1."""

    assign: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=dict)
    """Split to obs column to values: cells that have one of them go to this split, whatever was drawn."""
    apart: tuple[str, ...] = ()
    """obs columns of which no value may be in two splits, beside ``split_by``; the snapshot is refused if one is."""

    @model_validator(mode="after")
    def _columns_and_splits_exist(self) -> SnapshotSettings:
        named = [*filter(None, [self.split_by]), *self.apart, *(name for by in self.assign.values() for name in by)]
        for name in named:
            if name not in LABELS:
                raise ValueError(f"{name!r} is none of the obs columns that a split may look at: {', '.join(LABELS)}")
        for split in self.assign:
            if split not in self.fractions:
                raise ValueError(f"assign.{split}: fractions names no such split; 0 is a fraction too")
        return self

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or min(value.values()) < 0 or abs(sum(value.values()) - 1) > 1e-9:
            raise ValueError("the shares are not negative and sum to 1")
        return value


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


def create_snapshot(lake_uri: str, name: str, settings: SnapshotSettings, progress: Progress | None = None) -> Snapshot:
    """Copy the cells that ``settings`` choose from the lake's newest commit into a new snapshot.

    The same commit, settings and seed give the same rows in the same order. Memory is bounded by a block of cells; the
    shuffle spills to the temporary directory.

    Raises:
        MissingError: There is no lake.
        UsageError: The name is taken, the filter does not parse, or no cell fits it.
    """
    from store.shuffle import build

    uri = snapshot_uri(lake_uri, name)
    if records.read(records.join(uri, MANIFEST)) is not None:
        raise UsageError(
            f"{uri}: there is a snapshot {name!r}; snapshots never change: choose another name or delete it with "
            f"python -m store snapshot delete {name} --lake {lake_uri}"
        )
    build(open_lake(lake_uri), name, uri, settings, progress or _silent)
    return open_snapshot(lake_uri, name)


def _silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def open_snapshot(lake_uri: str, name: str) -> Snapshot:
    """Open a snapshot by its name.

    Raises:
        MissingError: The lake has no such snapshot; the message lists those that it has.
        UsageError: It was made in another format.
    """
    manifest = read_manifest(lake_uri, name)
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{snapshot_uri(lake_uri, name)}: was made in format {manifest['format']}, this version reads format "
            f"{FORMAT}; make it again: python -m store snapshot delete {name} --lake {lake_uri}, then create it"
        )
    return Snapshot(records.absolute(lake_uri), name, manifest)


def read_manifest(lake_uri: str, name: str) -> dict[str, Any]:
    """Return a snapshot's manifest, whatever its format.

    Raises:
        MissingError: The lake has no such snapshot; the message lists those that it has.
    """
    manifest = records.read(records.join(snapshot_uri(lake_uri, name), MANIFEST))
    if manifest is None:
        open_lake(lake_uri)
        known = ", ".join(list_snapshots(lake_uri)) or "none yet"
        raise MissingError(
            f"{lake_uri}: no snapshot {name!r} (snapshots here: {known}); make it with: "
            f"python -m store snapshot create {name} --lake {lake_uri}"
        )
    return manifest


def list_snapshots(lake_uri: str) -> list[str]:
    """Name the lake's snapshots, in alphabetical order; half-made ones do not exist."""
    folder = records.join(records.absolute(lake_uri), "snapshots")
    return [name for name in records.folders(folder) if records.read(records.join(folder, name, MANIFEST)) is not None]


def delete_snapshot(lake_uri: str, name: str) -> None:
    """Remove a snapshot, the manifest first, so that nobody sees half of it.

    Raises:
        MissingError: There is none of this name.
    """
    read_manifest(lake_uri, name)
    uri = snapshot_uri(lake_uri, name)
    records.remove(records.join(uri, MANIFEST))
    records.remove(uri)


class Snapshot:
    """A snapshot opened for reading; cheap to pickle, safe to read from several threads."""

    def __init__(self, lake_uri: str, name: str, manifest: dict[str, Any]) -> None:
        self.lake_uri = lake_uri
        self.name = name
        self.manifest = manifest
        self.uri = snapshot_uri(lake_uri, name)
        self.n_cells: int = manifest["n_cells"]
        self.measurements: tuple[str, ...] = tuple(manifest["measurements"])
        self.datasets: tuple[str, ...] = tuple(manifest["datasets"])
        self.split_rows: dict[str, tuple[int, int]] = {key: (a, b) for key, (a, b) in manifest["split_rows"].items()}
        self.seed: int = manifest["settings"]["seed"]
        self.commit_id: str = manifest["commit_id"]
        self.lake_timestamp: int = manifest["lake_timestamp"]
        self.vocabulary_hash: str = manifest["vocabulary_hash"]
        self.id: str = manifest["id"]
        self._arrays: dict[tuple[str, str], tiledb.Array] = {}
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Snapshot, (self.lake_uri, self.name, self.manifest))

    def vocabulary(self, measurement: str) -> pa.Table:
        """Return feature_id, feature_name, organism of each feature; its position is its number in ``block``."""
        return self._table(measurement, "var").select(["feature_id", "feature_name", "organism"])

    def cells(self, columns: list[str] | None = None) -> pa.Table:
        """Return one line for each row of the snapshot, in row order: joinid, organism, split, labels."""
        return self._table("", "cells", columns)

    def _table(self, measurement: str, member: str, columns: list[str] | None = None) -> pa.Table:
        index = "row" if member == "cells" else "soma_joinid"
        uri = records.join(self.uri, *(part for part in (measurement, member) if part))
        wanted = None if columns is None else list(dict.fromkeys([index, *columns]))
        with tiledbsoma.DataFrame.open(uri, context=soma_context()) as frame:
            return frame.read(column_names=wanted).concat().sort_by(index)

    def presence(self, measurement: str) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
        """Return the dataset names, and measured_DG: which of them measures which feature of the vocabulary."""
        self._know(measurement)
        shape = (len(self.datasets), self.manifest["measurements"][measurement]["n_features"])
        measured_DG = np.zeros(shape, dtype=bool)
        with tiledbsoma.SparseNDArray.open(
            records.join(self.uri, measurement, "presence"), context=soma_context()
        ) as array:
            found = array.read().tables().concat()
        measured_DG[found["soma_dim_0"].to_numpy(), found["soma_dim_1"].to_numpy()] = True
        return self.datasets, measured_DG

    def block(self, measurement: str, start: int, stop: int) -> CSRBlock:
        """Read rows ``start`` to ``stop`` (exclusive).

        Many consecutive rows in one call are fast, single rows are not. Threads may call this at the same time.

        Raises:
            UsageError: Unknown measurement or rows outside the snapshot.
            VerificationError: The stored bytes are damaged.
        """
        indptr = self.indptr(measurement, start, stop)
        first, last = int(indptr[0]), int(indptr[-1])
        features, counts = (np.empty(last - first, self.dtype(measurement, name)) for name in ("features", "counts"))
        self.read_into(measurement, first, features, counts)
        return CSRBlock(indptr - first, features, counts)

    def indptr(self, measurement: str, start: int, stop: int) -> NDArray[np.int64]:
        """Return where rows ``start`` to ``stop`` (exclusive) begin among all values, and where the last one ends.

        Raises:
            UsageError: Unknown measurement or rows outside the snapshot.
            VerificationError: The stored bytes are damaged.
        """
        self._know(measurement)
        if not 0 <= start <= stop <= self.n_cells:
            raise UsageError(f"{self.uri}: rows {start} to {stop} are outside 0 to {self.n_cells}")
        out = np.empty(stop + 1 - start, np.int64)
        self._read(measurement, "indptr", start, out)
        if np.any(np.diff(out) < 0):
            raise self._damaged(f"{measurement}/indptr", start, stop, "rows end before they begin")
        return out

    def dtype(self, measurement: str, member: str) -> np.dtype[Any]:
        """Return how ``indptr``, ``features`` or ``counts`` are stored."""
        self._know(measurement)
        return np.dtype(self._array(measurement, member).attr("soma_data").dtype)

    def read_into(self, measurement: str, start: int, features: NDArray[Any], counts: NDArray[Any]) -> None:
        """Fill both arrays with the values from ``start`` on; they are contiguous and of the stored types.

        Threads may call this at the same time; nothing but the arrays is allocated for long.

        Raises:
            VerificationError: The stored bytes are damaged.
        """
        self._read(measurement, "features", start, features)
        self._read(measurement, "counts", start, counts)
        n_features = self.manifest["measurements"][measurement]["n_features"]
        if len(features) and features.max() >= n_features:
            stop = start + len(features)
            raise self._damaged(f"{measurement}/features", start, stop, f"a feature is beyond {n_features - 1}")

    def _know(self, measurement: str) -> None:
        if measurement not in self.measurements:
            known = ", ".join(self.measurements)
            raise UsageError(f"{self.uri}: no measurement {measurement!r}; measurements: {known}")

    def _read(self, measurement: str, member: str, start: int, out: NDArray[Any]) -> None:
        if len(out) == 0:
            return
        array, context = self._array(measurement, member), tiledb_context(READING_THREADS)
        try:
            query = tiledb.libtiledb.Query(context, tiledb.libtiledb.Array(context, array))
            query.layout = tiledb.libtiledb.LayoutType.ROW_MAJOR
            wanted = tiledb.Subarray(array, context)
            wanted.add_dim_range(0, (start, start + len(out) - 1))
            query.set_subarray(wanted)
            query.set_data_buffer("soma_data", out, len(out))
            query._submit()
            whole = query.query_status() == tiledb.libtiledb.QueryStatus.COMPLETE
        except tiledb.TileDBError as error:
            raise self._damaged(f"{measurement}/{member}", start, start + len(out), str(error)) from error
        if not whole:
            raise self._damaged(f"{measurement}/{member}", start, start + len(out), "fewer values came than were asked")

    def _damaged(self, member: str, start: int, stop: int, why: str) -> VerificationError:
        return VerificationError(
            f"{self.uri}/{member}: elements {start} to {stop} cannot be read ({why}); the stored bytes are damaged: "
            "delete the snapshot and make it again"
        )

    def _array(self, measurement: str, member: str) -> tiledb.Array:
        key = (measurement, member)
        with self._opening:
            if key not in self._arrays:
                self._arrays[key] = tiledb.open(records.join(self.uri, *key), ctx=tiledb_context(READING_THREADS))
            return self._arrays[key]

    def verify(self) -> None:
        """Read everything again and compare with the checksums of the manifest.

        Raises:
            VerificationError: Some array is not what was written; the message names it.
        """
        from store.shuffle import Checksum

        for measurement, entry in self.manifest["measurements"].items():
            for member, expected in entry["sha256"].items():
                length = {"indptr": self.n_cells + 1}.get(member, entry["nnz"])
                checksum = Checksum()
                kind = self.dtype(measurement, member)
                for start in range(0, length, 2**22):
                    part = np.empty(min(2**22, length - start), kind)
                    self._read(measurement, member, start, part)
                    checksum.add(part)
                if checksum.hex() != expected:
                    raise VerificationError(
                        f"{self.uri}/{measurement}/{member}: content differs from the manifest's checksum; delete the "
                        "snapshot and make it again"
                    )


CELLS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("soma_joinid", pa.int64()), ("organism", pa.large_string()), ("split", pa.large_string())]
    + [(name, schema.OBS_SCHEMA.field(name).type) for name in LABELS]
    + [(schema.measured_column(name), pa.bool_()) for name in schema.MEASUREMENTS]
)
