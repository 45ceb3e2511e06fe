"""This module reads and writes bodies as Arrow streams, one row for each cell.

A request has two list columns for each measurement, ``RNA/features`` (texts, best as a dictionary) and ``RNA/counts``
(numbers), and the message without its counts as JSON under ``request`` in the schema's metadata. A reply has its large
array as a column of lists of fixed size, and the rest as JSON under ``reply``.

Foreign streams crash readers and claim what they are not: :func:`read` runs in a process apart (``serve.foreign``).

Shape letters used in this module:
    C  cells      D  numbers of a cell in a reply      F  different features      N  stored counts
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from serve.errors import FieldRefused
from serve.npz import LONGEST_NAME, MEASUREMENTS, REPLY, REQUEST
from serve.settings import Limits

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix  # slow, and a reader of streams needs none

ARROW = "application/vnd.apache.arrow.stream"
MOST_METADATA = 2**24
PARTS = ("features", "counts")


def write_request(message: bytes, measurements: dict[str, tuple[csr_matrix, list[str]]]) -> bytes:
    """Write a message, as JSON, and its counts, which stay as they are: a cell's features stand in their order."""
    columns = {}
    for name, (counts_CF, features) in measurements.items():
        offsets = pa.array(counts_CF.indptr.astype(np.int32))
        named = pa.DictionaryArray.from_arrays(pa.array(counts_CF.indices.astype(np.int32)), pa.array(features))
        columns[f"{name}/features"] = pa.ListArray.from_arrays(offsets, named)
        columns[f"{name}/counts"] = pa.ListArray.from_arrays(offsets, pa.array(counts_CF.data))
    return _stream(pa.table(columns).replace_schema_metadata({REQUEST: message}))


def write_reply(field: str, values_CD: NDArray[np.floating], rest: bytes) -> bytes:
    """Write a reply: its array as a column, what else it says as metadata."""
    kind = pa.from_numpy_dtype(values_CD.dtype)
    flat = pa.array(np.ascontiguousarray(values_CD).ravel(), kind)
    column = pa.FixedSizeListArray.from_arrays(flat, values_CD.shape[1])
    return _stream(pa.table({field: column}).replace_schema_metadata({REPLY: rest}))


def read_reply(content: bytes) -> dict[str, Any]:
    """Read what :func:`write_reply` wrote: the message, and its array under the column's name."""
    table = pa.ipc.open_stream(content).read_all()
    table.validate(full=True)
    reply: dict[str, Any] = json.loads(table.schema.metadata[REPLY.encode()])
    for name, column in zip(table.column_names, table.columns, strict=True):
        reply[name] = pc.list_flatten(column).to_numpy().reshape(table.num_rows, column.type.list_size)
    return reply


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read(body: bytes, limits: Limits) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """Return the message of a request, as JSON, and the arrays that an npz would have.

    Every batch is validated in full before its values are looked at.

    Raises:
        FieldRefused: It is no such stream, or larger than it may be.
        pyarrow.ArrowException: It is no stream.
    """
    with pa.ipc.open_stream(body) as stream:
        schema = stream.schema
        message = (schema.metadata or {}).get(REQUEST.encode())
        if message is None or len(message) > MOST_METADATA:
            raise FieldRefused(REQUEST, "the schema's metadata must hold the message without its counts, as JSON")
        names = _measurements(schema)
        batches, n_cells, n_counts = [], 0, 0
        for batch in stream:
            batch.validate(full=True)
            n_cells += batch.num_rows
            n_counts += sum(len(pc.list_flatten(batch.column(f"{name}/counts"))) for name in names)
            if n_cells > limits.cells or n_counts > limits.nonzeros:
                raise FieldRefused(
                    "body",
                    f"more than {limits.cells:,} cells or {limits.nonzeros:,} counts; send fewer at a time",
                )
            batches.append(batch)
    table = pa.Table.from_batches(batches, schema).unify_dictionaries()
    arrays: dict[str, NDArray[Any]] = {}
    for name in names:
        parts = _counts(table[f"{name}/features"], table[f"{name}/counts"], f"counts.{name}", limits)
        arrays |= {f"{name}/{part}": values for part, values in parts.items()}
    return message, arrays


def _measurements(schema: pa.Schema) -> list[str]:
    """Return the measurements that a stream has columns of; nothing else may be in it."""
    found: dict[str, set[str]] = {}
    if len(schema) > MEASUREMENTS * len(PARTS):
        raise FieldRefused("body", f"{len(schema):,} columns; {MEASUREMENTS} measurements have fewer")
    for column in schema:
        name, _, part = column.name.rpartition("/")
        if not name or part not in PARTS or len(name) > LONGEST_NAME or part in found.get(name, ()):
            raise FieldRefused(
                column.name[:80], "no part of counts; send MEASUREMENT/features and MEASUREMENT/counts, each once"
            )
        found.setdefault(name, set()).add(part)
        if not _is_list(column.type) or not _fits(column.type.value_type, part):
            wanted = "a list of texts (or a dictionary of them)" if part == "features" else "a list of numbers"
            raise FieldRefused(f"counts.{name}.{part}", f"is {str(column.type)[:80]}; send {wanted} for each cell")
    for name, parts in found.items():
        for part in PARTS:
            if part not in parts:
                raise FieldRefused(f"counts.{name}.{part}", "is missing")
    if not found:
        raise FieldRefused("counts", "there are no columns; send MEASUREMENT/features and MEASUREMENT/counts")
    return list(found)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _fits(kind: pa.DataType, part: str) -> bool:
    types = pa.types
    if part == "counts":
        return bool(types.is_integer(kind) or types.is_floating(kind))
    text = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(text) or types.is_large_string(text))


def _counts(features: pa.ChunkedArray, counts: pa.ChunkedArray, where: str, limits: Limits) -> dict[str, NDArray[Any]]:
    if features.null_count or counts.null_count:
        raise FieldRefused(where, "a cell is null; send an empty list for a cell without counts")
    lengths_C = pc.list_value_length(counts).to_numpy().astype(np.int64)
    unlike = np.flatnonzero(pc.list_value_length(features).to_numpy() != lengths_C)
    if len(unlike):
        raise FieldRefused(f"{where}.counts.{unlike[0]}", "the cell has not as many counts as features")
    named_N = pc.list_flatten(features)
    data_N = pc.list_flatten(counts)
    if not pa.types.is_dictionary(named_N.type):
        named_N = named_N.dictionary_encode()
    named_N = named_N.combine_chunks()
    if isinstance(named_N, pa.ChunkedArray):  # where there was no chunk
        named_N = pa.array([], named_N.type)
    if named_N.null_count or named_N.dictionary.null_count or data_N.null_count:
        raise FieldRefused(where, "a feature or a count is null; leave it out")
    if not 0 < len(named_N.dictionary) <= limits.features:
        raise FieldRefused(f"{where}.features", f"send 1 to {limits.features:,} different features")
    if pc.max(pc.binary_length(named_N.dictionary)).as_py() > LONGEST_NAME:
        raise FieldRefused(f"{where}.features", f"send names of at most {LONGEST_NAME} characters")
    return {
        "features": np.array([name.encode() for name in named_N.dictionary.to_pylist()]),
        "indptr": np.concatenate([[0], np.cumsum(lengths_C)]),
        "indices": named_N.indices.to_numpy().astype(np.int64),
        "data": data_N.to_numpy(),
    }
