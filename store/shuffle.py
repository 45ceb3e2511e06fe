"""This module is the two passes of a snapshot's shuffle, as tasks that run anywhere and in any order.

``scatter`` reads one chunk of cells in lake order and writes them, sorted by bucket, into one spill file. A bucket is a
range of the snapshot's rows. ``gather`` reads its bucket from every spill file, puts the rows in order and writes them
into the snapshot's arrays. Each task ends with a record, made once and whole: a task with a record is not run again.
What a task does is decided by the plan alone, never by who runs it.

Shape letters used in this module:
    C  cells of a chunk      R  rows of a bucket      F  fields
"""

from __future__ import annotations

import base64
import secrets
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import tiledbsoma
from numpy.typing import NDArray

from store import records, schema
from store.context import reading, soma_context
from store.errors import StorageError, VerificationError
from store.lake import Lake, open_lake
from store.members import write_time
from store.part import CELLS_SCHEMA, CODED, LABELS, NUMBERS, cells_digest, digest_of
from store.splits import coded

READ_ELEMENTS = 2**22
"""Values that one read of X should bring."""
READ_CELLS = 2**17
"""Cells of obs, chosen or not, that one read brings where chosen ones are scattered: half a kilobyte each or more."""
CLOSE = 2
"""Cells are scattered where they are fewer than one of so many."""

MEASURED = tuple(schema.measured_column(name) for name in schema.MEASUREMENTS)


@dataclass(frozen=True)
class Chunk:
    """Cells that one task of the first pass moves.

    Attributes:
        number: Position among the chunks.
        organism: Of all of them.
        joinids_C: Ascending.
        rows_C: Where each goes among the part's rows.
        split_C: Its split, by number.
        offsets: Measurement to what is added to the organism's feature joinids, so that organisms lie side by side.
        kept: Measurement to which joinids are kept; what is not listed keeps all.
        per_cell: Measurement to the values of a cell, about.
        levels: Measurements of which levels are taken, not counts, whether the organism has them or not.
    """

    number: int
    organism: str
    joinids_C: NDArray[np.int64]
    rows_C: NDArray[np.int64]
    split_C: NDArray[np.int8]
    offsets: dict[str, int]
    kept: dict[str, NDArray[np.bool_]]
    per_cell: dict[str, float]
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Scatter:
    """What all tasks of the first pass share."""

    lake_uri: str
    commit: int
    work: str
    spill: str
    mark: str
    bucket_rows: int
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Bucket:
    """Rows that one task of the second pass writes: its number, and (file, first byte, bytes, CRC-32) of each share."""

    number: int
    shares: list[tuple[str, int, int, int]]


@dataclass(frozen=True)
class Gather:
    """What all tasks of the second pass share.

    Attributes:
        uri: The snapshot's collection.
        work: Where records go.
        bucket_rows: Rows of a bucket.
        n_rows: Rows of the part.
        numbers: Measurement to the position in the vocabulary of each joinid (with its organism's offset).
        kinds: Measurement to the types of features and counts.
        starts: Measurement to where each bucket's values begin.
        codes: Field to value to code.
    """

    uri: str
    work: str
    bucket_rows: int
    n_rows: int
    numbers: dict[str, NDArray[np.int64]]
    kinds: dict[str, tuple[str, str]]
    starts: dict[str, NDArray[np.int64]]
    codes: dict[str, dict[str, int]]


def scatter_record(work: str, number: int) -> str:
    """Return where a finished task of the first pass leaves its record."""
    return records.join(work, "scattered", f"{number:08d}.json")


def gather_record(work: str, bucket: int) -> str:
    """Return where a finished task of the second pass leaves its record."""
    return records.join(work, "gathered", f"{bucket:08d}.json")


def scatter(job: Scatter, chunk: Chunk) -> None:
    """Run one task of the first pass; its record is what ``store.spilled.Spilled`` takes."""
    lake = open_lake(job.lake_uri, job.commit)
    obs = _labels(lake, chunk)
    names = np.array(job.splits, dtype=object)[chunk.split_C]
    columns: dict[str, Any] = {
        "row": pa.array(chunk.rows_C),
        "soma_joinid": pa.array(chunk.joinids_C),
        "organism": pa.array([chunk.organism] * len(chunk.joinids_C), pa.large_string()),
        "split": pa.array(names.tolist(), pa.large_string()),
    }
    columns |= {name: obs[name].combine_chunks() for name in (*LABELS, *MEASURED)}
    used, largest, integral = {}, {}, {}
    measured = {name: np.zeros(len(chunk.joinids_C), dtype=bool) for name in chunk.levels}  # obs speaks of counts
    for name in chunk.offsets:
        lengths, features, counts = _counts(lake, chunk, name)
        borders = pa.array(np.concatenate([[0], np.cumsum(lengths)]))  # in 64 bits, however large a task gets
        columns[f"{name}.features"] = pa.LargeListArray.from_arrays(borders, pa.array(features))
        columns[f"{name}.counts"] = pa.LargeListArray.from_arrays(borders, pa.array(counts))
        if name in chunk.levels:
            measured[name] = lengths > 0
        seen = np.zeros(int(features.max(initial=0)) + 1, dtype=bool)
        seen[features] = True
        used[name] = base64.b64encode(np.packbits(seen).tobytes()).decode()
        largest[name] = float(counts.max(initial=0))
        integral[name] = counts.dtype == np.uint16 or bool(np.all(counts == np.rint(counts)))
    columns |= {schema.measured_column(name): pa.array(measured_C) for name, measured_C in measured.items()}
    table = pa.table(columns)
    counted = {name: _counted(table, name) for name in CODED}
    file = records.join(job.spill, f"{chunk.number:08d}-{job.mark}-{secrets.token_hex(6)}.arrows")
    found = {"used": used, "largest": largest, "integral": integral, "labels": counted}
    records.create(
        scatter_record(job.work, chunk.number), {"file": file, **_spill(file, table, chunk, job.bucket_rows), **found}
    )


def _labels(lake: Lake, chunk: Chunk) -> pa.Table:
    """Return the obs of the chunk's cells, in their order.

    Cells that lie close are read at once, which is fastest; scattered ones a stretch at a time, so that what lies
    between them does not fill the memory.
    """
    obs, uri = lake.experiment(chunk.organism).obs, records.join(lake.uri, "census_data", chunk.organism, "obs")
    wanted = ["soma_joinid", *LABELS, *MEASURED]
    span = int(chunk.joinids_C[-1] - chunk.joinids_C[0]) + 1
    step = span if span <= CLOSE * len(chunk.joinids_C) else READ_CELLS
    parts, start = [], 0
    while start < len(chunk.joinids_C):
        first = int(chunk.joinids_C[start])
        stop = int(np.searchsorted(chunk.joinids_C, first + step))
        mine = chunk.joinids_C[start:stop]
        with reading(uri):
            found = obs.read((slice(first, int(mine[-1])),), column_names=wanted).concat().sort_by("soma_joinid")
        parts.append(found.take(pa.array(np.searchsorted(found["soma_joinid"].to_numpy(), mine))))
        start = stop
    return pa.concat_tables(parts)


def _counts(
    lake: Lake, chunk: Chunk, measurement: str
) -> tuple[NDArray[np.int64], NDArray[np.unsignedinteger], NDArray[np.uint16 | np.float32]]:
    """Return each cell's number of values, and the features (ascending in a cell) and counts of all.

    Both in 16 bits where all fit, so that spill files and what tasks hold are half as large.
    """
    lengths, features, counts = [], [], []
    step = int(np.clip(READ_ELEMENTS / max(chunk.per_cell[measurement], 1), 256, 65536))
    kept, layer = chunk.kept.get(measurement), "value" if measurement in chunk.levels else "raw"
    uri = records.join(lake.uri, "census_data", chunk.organism, "ms", measurement, "X", layer)
    for start, stop in pairwise(_borders(chunk.joinids_C, step, schema.ROW_TILE[measurement])):
        with reading(uri):
            block = lake.counts(chunk.organism, measurement, chunk.joinids_C[start:stop], layer)
        if kept is not None:
            inside = kept[: block.shape[1]][block.indices]
            ends = np.concatenate([[0], np.cumsum(inside)])[block.indptr]
            lengths.append(np.diff(ends))
            block.indices, block.data = block.indices[inside], block.data[inside]
        else:
            lengths.append(np.diff(block.indptr))
        offset = chunk.offsets[measurement]
        kind = np.uint16 if offset + block.shape[1] <= 2**16 else np.uint32
        features.append(block.indices.astype(kind) + np.asarray(offset, kind))
        counts.append(_narrow(block.data))
    return np.concatenate(lengths).astype(np.int64), np.concatenate(features), np.concatenate(counts)


def _borders(joinids_C: NDArray[np.int64], step: int, tile: int) -> list[int]:
    """Cut cells into reads of at most ``step``, where a tile of X begins if one does: none is then decoded twice."""
    begins = np.flatnonzero(np.diff(joinids_C // tile, prepend=-1))
    borders = [0]
    while borders[-1] < len(joinids_C):
        until = min(borders[-1] + step, len(joinids_C))
        last = int(begins[np.searchsorted(begins, until, side="right") - 1])
        borders.append(last if borders[-1] < last and until < len(joinids_C) else until)
    return borders


def _narrow(counts: NDArray[np.float32]) -> NDArray[np.uint16 | np.float32]:
    """Return counts as 16-bit numbers if all are such."""
    if not len(counts) or counts.min() < 0 or not counts.max() < 2**16:
        return counts
    whole = counts.astype(np.uint16)
    return whole if np.array_equal(whole, counts) else counts


def _counted(table: pa.Table, name: str) -> dict[str, dict[str, int]]:
    """Return how many cells of each split have each value of a column."""
    found: dict[str, dict[str, int]] = {}
    for line in table.group_by([name, "split"]).aggregate([([], "count_all")]).to_pylist():
        found.setdefault(line[name], {})[line["split"]] = line["count_all"]
    return found


def _spill(file: str, table: pa.Table, chunk: Chunk, bucket_rows: int) -> dict[str, Any]:
    """Write each bucket's cells, one Arrow stream behind the other; return where they lie."""
    order = np.argsort(chunk.rows_C, kind="stable")
    present, firsts = np.unique(chunk.rows_C[order] // bucket_rows, return_index=True)
    where: list[list[int]] = []
    nnz: dict[str, list[int]] = {name: [] for name in chunk.offsets}
    at = 0
    filesystem, path = fsspec.core.url_to_fs(file)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with filesystem.open(path, "wb") as out:
        for first, stop in zip(firsts, [*firsts[1:], len(order)], strict=True):
            part = table.take(pa.array(order[first:stop])).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
                stream.write_table(part)
            content = sink.getvalue()
            out.write(content)
            where.append([at, content.size, zlib.crc32(content)])
            for name, counted in nnz.items():
                counted.append(pa.compute.sum(pa.compute.list_value_length(part[f"{name}.counts"])).as_py())
            at += content.size
    return {"buckets": present.tolist(), "where": where, "nnz": nnz}


def gather(job: Gather, bucket: Bucket) -> None:
    """Run one task of the second pass."""
    start = bucket.number * job.bucket_rows
    stop = min(start + job.bucket_rows, job.n_rows)
    tables = list(_collected(bucket))
    rows = np.concatenate([table["row"].to_numpy() for table in tables])
    order = np.argsort(rows)
    if not np.array_equal(rows[order], np.arange(start, stop)):
        raise VerificationError(f"{job.uri}: the spill files do not hold rows {start:,} to {stop:,} once each")
    sums: dict[str, str] = {}
    for name in job.kinds:
        written = _write_counts(job, name, bucket.number, tables, (start, stop))
        sums |= {f"{name}/{member}": digest for member, digest in written.items()}
    cells = pa.concat_tables([table.select(CELLS_SCHEMA.names) for table in tables]).combine_chunks()
    cells = cells.take(pa.array(order)).cast(CELLS_SCHEMA)
    sums |= _write_labels(job, cells, start, stop)
    records.create(gather_record(job.work, bucket.number), {"sha256": sums})


def _collected(bucket: Bucket) -> Iterator[pa.Table]:
    """Read a bucket's cells from every spill file that has some."""
    filesystem, _ = fsspec.core.url_to_fs(bucket.shares[0][0])
    contents = filesystem.cat_ranges(
        [fsspec.core.url_to_fs(file)[1] for file, *_ in bucket.shares],
        [at for _, at, _, _ in bucket.shares],
        [at + size for _, at, size, _ in bucket.shares],
        on_error="return",
    )
    for (file, at, size, crc), content in zip(bucket.shares, contents, strict=True):
        if isinstance(content, FileNotFoundError):
            raise StorageError(f"{file}: is gone; delete the half-made snapshot and make it again")
        if isinstance(content, Exception):
            raise StorageError(
                f"{file}: cannot be read: {records.told(content)}; check the place and your rights to it, and run the "
                "same command again: what was done stays done"
            ) from content
        if len(content) != size or zlib.crc32(content) != crc:
            raise VerificationError(
                f"{file}: bytes {at:,} to {at + size:,} are not what was written; delete the half-made snapshot and "
                "make it again"
            )
        yield pa.ipc.open_stream(content).read_all()


def _write_counts(job: Gather, name: str, bucket: int, tables: list[pa.Table], rows: tuple[int, int]) -> dict[str, str]:
    """Write one measurement of a bucket; return a digest of each array's share."""
    measured = [table for table in tables if f"{name}.features" in table.schema.names]
    first, length_R = int(job.starts[name][bucket]), np.zeros(rows[1] - rows[0], np.int64)
    for table in measured:
        length_R[table["row"].to_numpy() - rows[0]] = pa.compute.list_value_length(table[f"{name}.features"]).to_numpy()
    ends = first + np.cumsum(length_R)
    if ends[-1] != job.starts[name][bucket + 1]:
        raise VerificationError(f"{job.uri}/{name}: bucket {bucket} has {ends[-1] - first:,} values, not as counted")
    features, counts = (np.empty(ends[-1] - first, kind) for kind in job.kinds[name])
    numbers = job.numbers[name].astype(features.dtype)
    for table in measured:
        row = table["row"].to_numpy() - rows[0]
        begins = np.cumsum(length_R[row]) - length_R[row]
        place = np.repeat(ends[row] - length_R[row] - first - begins, length_R[row])
        place += np.arange(len(place))
        features[place] = numbers[_flat(table[f"{name}.features"])]
        counts[place] = _flat(table[f"{name}.counts"])
    _write(job, f"{name}/indptr", (slice(rows[0] + 1, rows[1]),), ends)
    if len(features):
        where = (slice(first, first + len(features) - 1),)
        _write(job, f"{name}/features", where, features)
        _write(job, f"{name}/counts", where, counts)
    return {"indptr": digest_of(ends), "features": digest_of(features), "counts": digest_of(counts)}


def _flat(lists: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(lists.combine_chunks().flatten())


def _write_labels(job: Gather, cells: pa.Table, start: int, stop: int) -> dict[str, str]:
    codes_FR = np.stack(
        [_code(cells, name, job.codes[name]) for name in CODED]
        + [cells[name].to_numpy().astype(np.int32) for name in MEASURED]
    )
    numbers_FR = np.stack([cells[name].to_numpy().astype(np.float32) for name in NUMBERS])
    for member, values in (("codes", codes_FR), ("numbers", numbers_FR)):
        _write(job, member, (slice(0, len(values) - 1), slice(start, stop - 1)), values)
    uri = records.join(job.uri, "cells")
    with tiledbsoma.DataFrame.open(uri, "w", context=soma_context(write_time(uri))) as frame:
        frame.write(cells)
    return {"codes": digest_of(codes_FR), "numbers": digest_of(numbers_FR), "cells": cells_digest(cells)}


def _code(cells: pa.Table, name: str, codes: dict[str, int]) -> NDArray[np.int32]:
    values, value_R = coded(cells, name)
    return np.array([codes[value] for value in values], dtype=np.int32)[value_R]


def _write(job: Gather, member: str, where: tuple[slice, ...], values: NDArray[Any]) -> None:
    uri = records.join(job.uri, *member.split("/"))
    with tiledbsoma.DenseNDArray.open(uri, "w", context=soma_context(write_time(uri))) as array:
        array.write(where, pa.Tensor.from_numpy(np.ascontiguousarray(values)))
