"""This module reads the arrays of one part of a snapshot: rows that were shuffled and written together.

Shape letters used in this module:
    F  fields      R  rows
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import tiledb
import tiledb.libtiledb
import tiledbsoma
from numpy.typing import NDArray

from store import records, schema
from store.context import EVER, MAKE_AGAIN, asked_again, new_tiledb_context, reading, soma_context
from store.errors import UsageError, VerificationError

READING_THREADS = 1
"""TileDB's threads, for computing and for waiting: callers read from several threads of their own.

Who hands a request to another of TileDB's threads turns round and round until it is answered; who finds none that is
free makes it himself, and sleeps.
"""
QUERIES = 2**13
"""Queries of this process after which a part's arrays are opened anew, for what TileDB keeps of each: 100 MB of all."""
VERIFIED_ELEMENTS = 2**22
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
    "x",
    "y",
)
"""obs columns that every snapshot carries beside its counts."""
NUMBERS = ("time", "dose", "x", "y")
"""Those of them that are numbers: rows of the array ``numbers``."""
CODED = ("organism", *(name for name in LABELS if name not in (*NUMBERS, "cell_id", "is_primary_data")))
"""Those that have few values, each with a code in the table ``labels``."""
FIELDS = (*CODED, *(schema.measured_column(name) for name in schema.MEASUREMENTS))
"""Rows of the array ``codes``: codes of ``CODED``, then whether the cell was measured, 0 or 1."""

CELLS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("soma_joinid", pa.int64()), ("organism", pa.large_string()), ("split", pa.large_string())]
    + [(name, schema.OBS_SCHEMA.field(name).type) for name in LABELS]
    + [(schema.measured_column(name), pa.bool_()) for name in schema.MEASUREMENTS]
)


class _Opened:
    """Arrays of a part, opened at their first use, with a TileDB context of their own; any thread may ask.

    Args:
        uri: The part.
        shapes: How many values each array holds, along each dimension.

    Attributes:
        context: Of all of them.
        since: The number of this process's query from which on they are used.
    """

    queries = count()
    """Numbers the queries of all parts."""

    def __init__(self, uri: str, shapes: dict[tuple[str, ...], tuple[int, ...]]) -> None:
        self.context = new_tiledb_context(READING_THREADS)
        self.since = next(self.queries)
        self._uri, self._shapes = uri, shapes
        self._arrays: dict[tuple[str, ...], tiledb.Array] = {}
        self._opening = threading.Lock()
        self._locks: dict[tuple[str, ...], threading.Lock] = {}

    def array(self, member: tuple[str, ...]) -> tiledb.Array:
        """Return one array.

        Raises:
            StorageError: The store does not answer.
            VerificationError: It is damaged, or files of it are lost: TileDB would give fill values for what they held,
                without a word.
        """
        with reading(records.join(self._uri, *member), MAKE_AGAIN):
            return self._array(member)

    def _array(self, member: tuple[str, ...]) -> tiledb.Array:
        with self._opening:
            mine = self._locks.setdefault(member, threading.Lock())
        with mine:  # several arrays may be opened at the same time: from afar that takes a while
            if member not in self._arrays:
                uri = records.join(self._uri, *member)
                opened = asked_again(lambda: tiledb.open(uri, timestamp=EVER, ctx=self.context))
                self._refuse_lost(member, opened.nonempty_domain())  # known since it was opened: nothing is asked
                self._arrays[member] = opened
            return self._arrays[member]

    def _refuse_lost(self, member: tuple[str, ...], held: tuple[tuple[int, int], ...] | None) -> None:
        shape = self._shapes[member]
        if 0 not in shape and held != tuple((0, length - 1) for length in shape):
            there = " x ".join(f"{first:,} to {last:,}" for first, last in held) if held else "none"
            needed = " x ".join(f"0 to {length - 1:,}" for length in shape)
            raise VerificationError(
                f"{records.join(self._uri, *member)}: of its elements {needed} there are {there}: files of it are "
                "lost, or the snapshot is being deleted; put the files back, or delete the snapshot and make it again"
            )

    def anew(self) -> _Opened:
        """Open the same arrays again."""
        fresh = _Opened(self._uri, self._shapes)
        for member in list(self._arrays):
            fresh._array(member)
        return fresh


class Part:
    """Rows 0 to ``n_rows`` of one part, opened for reading; cheap to pickle, safe to read from several threads.

    Attributes:
        uri: The collection that holds the arrays.
        id: Digest of all that the part holds.
        n_rows: Its rows.
        first_row: The number of its first row in the snapshot.
        measurements: Those that some of its cells have.
        split_rows: Split to its rows, first and behind the last, counted within the part.
    """

    def __init__(self, lake_uri: str, entry: dict[str, Any], first_row: int) -> None:
        self.lake_uri, self.entry, self.first_row = lake_uri, entry, first_row
        self.name: str = entry["name"]
        self.uri = records.join(lake_uri, "snapshots", self.name)
        self.id: str = entry["id"]
        self.n_rows: int = entry["n_rows"]
        self.measurements: dict[str, dict[str, Any]] = entry["measurements"]
        self.split_rows: dict[str, tuple[int, int]] = {key: (a, b) for key, (a, b) in entry["split_rows"].items()}
        self._opened = _Opened(self.uri, self._shapes())
        self._renewing = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Part, (self.lake_uri, self.entry, self.first_row))

    def arrays(self, measurements: Sequence[str]) -> list[tuple[str, ...]]:
        """Name the arrays from which these measurements are read, for ``warm``."""
        names = [name for name in measurements if name in self.measurements]
        return [("codes",), ("numbers",), *((name, one) for name in names for one in ("indptr", "features", "counts"))]

    def _shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """Say how many values each array holds, along each dimension."""
        found: dict[tuple[str, ...], tuple[int, ...]] = {
            ("codes",): (len(FIELDS), self.n_rows),
            ("numbers",): (len(NUMBERS), self.n_rows),
            ("sets",): (self.entry.get("n_sets", 0) + 1,),
        }
        for name, of in self.measurements.items():
            found[name, "indptr"] = (self.n_rows + 1,)
            found[name, "features"] = found[name, "counts"] = (of["nnz"],)
        return found

    @cached_property
    def set_starts(self) -> NDArray[np.int64]:
        """Where each set of rows begins, and where the last one ends.

        Raises:
            UsageError: The part was not made of sets.
            VerificationError: The stored bytes are damaged.
        """
        if not self.entry.get("n_sets", 0):
            raise UsageError(
                f"{self.uri}: has no sets; make a snapshot that has: python -m store snapshot create NAME "
                '--set set_size=32 --set \'set_by=["dataset_id", "sample_id"]\''
            )
        return self._set_starts()

    def _set_starts(self) -> NDArray[np.int64]:
        n_sets = self.entry["n_sets"]
        starts = np.empty(n_sets + 1, np.int64)
        self._read(("sets",), [(0, n_sets)], starts)
        if np.any(starts[1:] <= starts[:-1]) or (starts[0], starts[-1]) != (0, self.n_rows):
            raise self._damaged("sets", 0, n_sets + 1, "sets do not follow each other from the first row to the last")
        return starts

    def warm(self, array: tuple[str, ...]) -> None:
        """Open one array ahead of its use."""
        self._opened.array(array)

    def indptr(self, measurement: str, start: int, stop: int) -> NDArray[np.int64]:
        """Return where rows ``start`` to ``stop`` (exclusive) begin among all values, and where the last one ends.

        Raises:
            UsageError: Rows outside the part.
            VerificationError: The stored bytes are damaged.
        """
        if not 0 <= start <= stop <= self.n_rows:
            raise UsageError(f"{self.uri}: rows {start} to {stop} are outside 0 to {self.n_rows}")
        out = np.zeros(stop + 1 - start, np.int64)
        if measurement not in self.measurements:
            return out
        self._read((measurement, "indptr"), [(start, stop)], out)
        nnz = self.measurements[measurement]["nnz"]
        if np.any(out[1:] < out[:-1]):
            raise self._damaged(f"{measurement}/indptr", start, stop, "rows end before they begin")
        first, last = 0 if start == 0 else out[0], nnz if stop == self.n_rows else out[-1]
        if not 0 <= out[0] == first or not out[-1] == last <= nnz:
            raise self._damaged(f"{measurement}/indptr", start, stop, f"rows lie outside the {nnz:,} values")
        return out

    def dtype(self, measurement: str, member: str) -> np.dtype[Any]:
        """Return how ``indptr``, ``features`` or ``counts`` are stored."""
        if measurement not in self.measurements:
            return np.dtype(np.int64 if member == "indptr" else np.uint8)
        return np.dtype(self._opened.array((measurement, member)).attr("soma_data").dtype)

    def read_into(
        self,
        measurement: str,
        start: int,
        features: NDArray[Any],
        counts: NDArray[Any],
        *,
        beside: Executor | None = None,
    ) -> None:
        """Fill both arrays with the values from ``start`` on; they are contiguous and of the stored types.

        Threads may call this at the same time; nothing but the arrays is allocated for long. With ``beside``, which
        must not be what calls this, both are read at the same time: from afar that waits once instead of twice.

        Raises:
            VerificationError: The stored bytes are damaged.
        """
        if len(features) == 0:
            return
        stop = start + len(features)
        if beside is None:
            self._read((measurement, "features"), [(start, stop - 1)], features)
            self._read((measurement, "counts"), [(start, stop - 1)], counts)
        else:
            other = beside.submit(self._read, (measurement, "counts"), [(start, stop - 1)], counts)
            try:
                self._read((measurement, "features"), [(start, stop - 1)], features)
            finally:
                wait([other])  # nobody writes into the arrays any more when this has ended
            other.result()
        n_features = self.measurements[measurement]["n_features"]
        if features.max() >= n_features:
            raise self._damaged(f"{measurement}/features", start, stop, f"a feature is beyond {n_features - 1}")

    def block(self, measurement: str, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        """Return indptr (from 0 on), features and counts of rows ``start`` to ``stop`` (exclusive), as stored."""
        indptr = self.indptr(measurement, start, stop)
        first, last = int(indptr[0]), int(indptr[-1])
        features, counts = (np.empty(last - first, self.dtype(measurement, name)) for name in ("features", "counts"))
        self.read_into(measurement, first, features, counts)
        return indptr - first, features, counts

    def codes(self, fields: Sequence[str], start: int, stop: int) -> NDArray[np.int32]:
        """Return codes_FR of some of ``FIELDS`` for rows ``start`` to ``stop`` (exclusive).

        Raises:
            VerificationError: The stored bytes are damaged.
        """
        codes_FR = self._lines("codes", [FIELDS.index(name) for name in fields], start, stop, np.int32)
        if codes_FR.min(initial=0) < 0:
            raise self._damaged("codes", start, stop, "a code is below 0")
        return codes_FR

    def numbers(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return numbers_FR of ``NUMBERS`` for rows ``start`` to ``stop`` (exclusive); NaN is "not said"."""
        return self._lines("numbers", list(range(len(NUMBERS))), start, stop, np.float32)

    def cells(self, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return one line for each of the rows ``start`` to ``stop`` (exclusive), as it was when the part was made.

        Raises:
            UsageError: Unknown column.
            VerificationError: The stored bytes are damaged, or some rows are not there.
        """
        wanted = list(CELLS_SCHEMA.names if columns is None else dict.fromkeys(["row", *columns]))
        if unknown := sorted(set(wanted) - set(CELLS_SCHEMA.names)):
            raise UsageError(f"{self.uri}: no column {unknown[0]!r}; columns: {', '.join(CELLS_SCHEMA.names)}")
        if start == stop:
            return CELLS_SCHEMA.empty_table().select(wanted)
        uri = records.join(self.uri, "cells")
        with reading(uri, MAKE_AGAIN), tiledbsoma.DataFrame.open(uri, context=soma_context(EVER)) as frame:
            found = frame.read((slice(start, stop - 1),), column_names=wanted).concat()
        if len(found) != stop - start:
            raise self._damaged("cells", start, stop, f"{len(found):,} of {stop - start:,} rows are there")
        return found.select(wanted).sort_by("row")

    def _lines(self, member: str, lines: list[int], start: int, stop: int, kind: type[Any]) -> NDArray[Any]:
        out = np.empty((len(lines), stop - start), kind)
        if out.size:
            # ranges come in ascending order, whatever the order in which they are asked for
            order = np.argsort(lines)
            found = np.empty_like(out)
            self._read((member,), [(start, stop - 1)], found.reshape(-1), sorted(lines))
            out[order] = found
        return out

    def _read(
        self, member: tuple[str, ...], ranges: list[tuple[int, int]], out: NDArray[Any], lines: Sequence[int] = ()
    ) -> None:
        """Fill ``out``; ranges are inclusive, ``lines`` are those of the first dimension of an array of two."""
        opened = self._renewed()
        array, context = opened.array(member), opened.context
        first, last = ranges[0]

        def ask() -> bool:
            query = tiledb.libtiledb.Query(context, tiledb.libtiledb.Array(context, array))
            query.layout = tiledb.libtiledb.LayoutType.ROW_MAJOR
            wanted = tiledb.Subarray(array, context)
            for line in lines:
                wanted.add_dim_range(0, (line, line))
            wanted.add_dim_range(1 if lines else 0, (first, last))
            query.set_subarray(wanted)
            query.set_data_buffer("soma_data", out, len(out))
            query._submit()
            return bool(query.query_status() == tiledb.libtiledb.QueryStatus.COMPLETE)

        remedy = f"{MAKE_AGAIN} (elements {first} to {last + 1} could not be read)"
        with reading(records.join(self.uri, *member), remedy):
            whole = asked_again(ask)
        if not whole:
            raise self._damaged("/".join(member), first, last + 1, "fewer values came than were asked")

    def _damaged(self, member: str, start: int, stop: int, why: str) -> VerificationError:
        return VerificationError(
            f"{self.uri}/{member}: elements {start} to {stop} cannot be read ({why}); the stored bytes are damaged: "
            "delete the snapshot and make it again"
        )

    def _renewed(self) -> _Opened:
        """Return the opened arrays; whoever makes one query too many opens them anew, while others use the old ones."""
        opened = self._opened
        if (number := next(_Opened.queries)) > opened.since + QUERIES and self._renewing.acquire(blocking=False):
            try:
                if self._opened is opened:
                    self._opened = opened.anew()
            except tiledb.TileDBError:  # those that are open will do until the store answers again
                opened.since = number
            finally:
                self._renewing.release()
        return self._opened

    def verify(self) -> None:
        """Read all rows again and compare them with their checksums, and the vocabularies with their hashes.

        Raises:
            VerificationError: Something is not what was written; the message names the array and the rows.
        """
        sums = records.read(records.join(self.uri, "checksums.json")) or {}
        if checksums_digest(sums) != self.entry["checksums"]:
            raise VerificationError(f"{self.uri}/checksums.json: is not what was written; make the snapshot again")
        self._verify_beside()
        size = self.entry["bucket_rows"]
        for bucket, start in enumerate(range(0, self.n_rows, size)):
            stop = min(start + size, self.n_rows)
            for member, digest in self._digests(start, stop):
                if sums[member][bucket] != digest:
                    raise VerificationError(
                        f"{self.uri}/{member}: rows {start:,} to {stop:,} differ from the checksum that was taken when "
                        "they were written; delete the snapshot and make it again"
                    )

    def _verify_beside(self) -> None:
        """Compare vocabularies and sets, which stand beside the part, with the manifest that does."""
        manifest = records.read(records.join(self.uri, MANIFEST))
        if manifest is None:
            raise VerificationError(f"{self.uri}/{MANIFEST}: is lost; put it back, or make the snapshot again")
        check_manifest(self.uri, manifest)
        for name, of in manifest["measurements"].items():
            uri = records.join(self.uri, name, "var")
            with reading(uri, MAKE_AGAIN), tiledbsoma.DataFrame.open(uri, context=soma_context(EVER)) as frame:
                var = frame.read().concat().sort_by("soma_joinid")
            check_vocabulary(self.uri, name, var, of["vocabulary_hash"])
        if n_sets := self.entry.get("n_sets", 0):
            digest = digest_of(self._set_starts())
            if manifest.get("tables", {}).get("sets", digest) != digest:
                raise self._damaged("sets", 0, n_sets + 1, "sets begin elsewhere than where they were written to")

    def _digests(self, start: int, stop: int) -> Iterator[tuple[str, str]]:
        for name in self.measurements:
            indptr = self.indptr(name, start, stop)
            yield f"{name}/indptr", digest_of(indptr[1:])
            for member in ("features", "counts"):
                found = hashlib.sha256()
                for first in range(int(indptr[0]), int(indptr[-1]), VERIFIED_ELEMENTS):
                    part = np.empty(min(VERIFIED_ELEMENTS, int(indptr[-1]) - first), self.dtype(name, member))
                    self._read((name, member), [(first, first + len(part) - 1)], part)
                    found.update(part.data)
                yield f"{name}/{member}", found.hexdigest()
        yield "codes", digest_of(self.codes(FIELDS, start, stop))
        yield "numbers", digest_of(self.numbers(start, stop))
        yield "cells", cells_digest(self.cells(start, stop))


def check_vocabulary(uri: str, measurement: str, var: pa.Table, expected: str) -> None:
    """Compare the features that a snapshot's table ``var`` names, in the order of their numbers, with their hash.

    Raises:
        VerificationError: They are others, or stand in another order: every count would be told of a wrong feature.
    """
    from store.snapshot_arrays import vocabulary_hash  # which imports this module

    if vocabulary_hash(measurement, var["feature_id"].to_pylist(), var["organism"].to_pylist()) != expected:
        raise VerificationError(
            f"{uri}/{measurement}/var: its features are not those of the manifest's vocabulary_hash, or stand in "
            "another order; put its files back, or delete the snapshot and make it again"
        )


def manifest_digest(said: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, that is the ``id`` of a manifest or of a part's entry in it: over all else it says.

    When it was made is said beside it, so that the same cells have the same id whenever they are copied.
    """
    content = {key: value for key, value in said.items() if key not in ("id", "created")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_manifest(uri: str, manifest: Mapping[str, Any]) -> None:
    """Compare what the manifest of the snapshot ``uri`` says, of the whole and of each part, with its ids.

    Raises:
        VerificationError: It says something else than when it was written.
    """
    for said in (manifest, *manifest.get("parts", ())):
        if manifest_digest(said) != said.get("id"):
            raise VerificationError(
                f"{uri}/{MANIFEST}: is not what was written: it does not fit the ids in it; put the file back, or "
                "delete the snapshot and make it again"
            )


def checksums_digest(sums: dict[str, list[str]]) -> str:
    """Return the SHA-256 over the checksums of all arrays, in hex."""
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()


def digest_of(values: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def labels_digest(labels: Mapping[str, Mapping[str, Mapping[str, int]]], splits: Sequence[str]) -> str:
    """Return a SHA-256 over fields, their values in the order of their codes, and the cells of each split, in hex."""
    said = [
        [field, [[value, [of.get(split, 0) for split in splits]] for value, of in by.items()]]
        for field, by in labels.items()
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def presence_digest(measured_DG: NDArray[np.bool_]) -> str:
    """Return a SHA-256 over which dataset measures which feature, in hex."""
    return digest_of(np.packbits(measured_DG))


def cells_digest(cells: pa.Table) -> str:
    """Return a SHA-256 over what a table of cells says, whatever its chunks."""
    found = hashlib.sha256()
    for name in CELLS_SCHEMA.names:
        column = cells[name].combine_chunks()
        if pa.types.is_large_string(column.type):
            offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
            found.update(np.ascontiguousarray(np.diff(offsets)).data)
            found.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        else:
            found.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).data)
    return found.hexdigest()
