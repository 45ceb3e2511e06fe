"""This module creates the arrays of a snapshot, fills in what speaks of the whole, and tidies them at the end.

Shape letters used in this module:
    D  datasets      G  features of one measurement
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import tiledb
import tiledbsoma
from numpy.typing import NDArray

from store import fragments, records, schema
from store.context import reading, soma_context, tiledb_context
from store.lake import Lake
from store.part import CELLS_SCHEMA, FIELDS, NUMBERS, digest_of, labels_digest, presence_digest
from store.shuffle import Gather

FORMAT = 4
TILE_ELEMENTS = 2**18
INDPTR_TILE = 2**13
LINE_TILE = 2**11
"""Rows of a tile of labels: a block is read at a time, and a tile is decoded whole."""
MANY_FRAGMENTS = 2

VarRow = tuple[str, str, str, int]
"""feature_id, feature_name, organism, joinid in the lake."""


@dataclass(frozen=True)
class Contents:
    """What a snapshot says of the whole.

    Attributes:
        layers: Its measurements, and the layer of X that each is taken from.
        var: Measurement to features, in the order of their numbers.
        labels: Field to value, in the order of codes, to cells of each split.
        splits: Names of the splits.
        vectors: Name to whole numbers that are few: rows of earlier parts that are left out, where sets begin.
    """

    layers: dict[str, str]
    var: dict[str, list[VarRow]]
    labels: dict[str, dict[str, dict[str, int]]]
    splits: tuple[str, ...]
    vectors: dict[str, NDArray[np.int64]]


def create_arrays(lake: Lake, uri: str, plan: Gather, contents: Contents) -> dict[str, str]:
    """Create the collection at ``uri`` with all its arrays, and fill in what speaks of the whole.

    Returns:
        Member to SHA-256, in hex, of what was filled in and has no other digest.
    """
    digests = {"labels": labels_digest(contents.labels, contents.splits)}
    with tiledbsoma.Collection.create(uri, context=soma_context()) as root:
        root.metadata["somaflow_snapshot_format"] = FORMAT
        for name, layer in contents.layers.items():
            member = root.add_new_collection(name)
            nnz = int(plan.starts[name][-1])
            _new_vector(member, "indptr", "int64", plan.n_rows + 1, tile=INDPTR_TILE).write(
                (slice(0, 0),), pa.Tensor.from_numpy(np.zeros(1, np.int64))
            )
            _new_vector(member, "features", plan.kinds[name][0], nnz, quick=True)
            _new_vector(member, "counts", plan.kinds[name][1], nnz)
            _write_vocabulary(member, contents.var[name])
            digests[f"{name}/presence"] = _write_presence(
                lake, member, (name, layer), contents.var[name], list(contents.labels["dataset_id"])
            )
        for member, kind, lines in (("codes", "int32", len(FIELDS)), ("numbers", "float32", len(NUMBERS))):
            root.add_new_dense_ndarray(
                member,
                type=pa.from_numpy_dtype(np.dtype(kind)),
                shape=(lines, max(1, plan.n_rows)),
                platform_config=schema.lines_options(LINE_TILE),
            )
        root.add_new_dataframe(
            "cells",
            schema=CELLS_SCHEMA,
            index_column_names=["row"],
            domain=[(0, max(0, plan.n_rows - 1))],
            platform_config=schema.table_options(CELLS_SCHEMA, index="row"),
        )
        _write_labels(root, contents.labels, contents.splits)
        for name, values in contents.vectors.items():
            if len(values):
                vector = _new_vector(root, name, "int64", len(values), tile=INDPTR_TILE)
                vector.write((slice(0, len(values) - 1),), pa.Tensor.from_numpy(values))
                digests[name] = digest_of(values)
    return digests


def vocabulary_hash(measurement: str, feature_ids: list[str], organisms: list[str]) -> str:
    """Digest a vocabulary: the same features of the same organisms in the same order give the same hash."""
    return hashlib.sha256(json.dumps([measurement, feature_ids, organisms]).encode()).hexdigest()


def array_uris(uri: str, measurements: list[str]) -> list[str]:
    """Return the arrays that tasks write."""
    vectors = [records.join(uri, name, member) for name in measurements for member in ("indptr", "features", "counts")]
    return [*vectors, *(records.join(uri, member) for member in ("codes", "numbers", "cells"))]


def tidy(uri: str) -> None:
    """Remove what tasks that were killed wrote once more or by half, and merge the fragments' footers if many."""
    newest: dict[str, tuple[int, str]] = {}
    now_ms = int(time.time() * 1000)
    found = tiledb.array_fragments(uri, ctx=tiledb_context())
    for fragment in found:
        name = fragment.uri.rstrip("/").rsplit("/", 1)[-1]
        key, mark = repr(fragment.nonempty_domain), (fragment.timestamp_range[1], name)
        newest[key] = max(newest.get(key, mark), mark)
    kept = {name for _, name in newest.values()}
    there = fragments.fragments(uri)
    extra = [item.name for item in there if item.name not in kept and item.last_ms <= now_ms]  # others are not listed
    fragments.remove_fragments(uri, extra)
    if len(kept) > MANY_FRAGMENTS:
        fragments.consolidate(uri, ("fragment_meta", "commits"))


def _new_vector(
    member: Any, name: str, kind: str, length: int, tile: int = TILE_ELEMENTS, *, quick: bool = False
) -> Any:
    return member.add_new_dense_ndarray(
        name,
        type=pa.from_numpy_dtype(np.dtype(kind)),
        shape=(max(1, length),),
        platform_config=schema.vector_options(tile, np.dtype(kind).itemsize, quick=quick),
    )


def _write_vocabulary(member: Any, var: list[VarRow]) -> None:
    columns = pa.schema(
        [("soma_joinid", pa.int64())]
        + [(name, pa.large_string()) for name in ("feature_id", "feature_name", "organism")]
        + [("lake_joinid", pa.int64())]
    )
    rows = [list(column) for column in zip(*var, strict=True)] or [[], [], [], []]
    _write_frame(member, "var", columns, [list(range(len(var))), *rows])


def _write_labels(root: Any, labels: dict[str, dict[str, dict[str, int]]], splits: tuple[str, ...]) -> None:
    columns = pa.schema(
        [("soma_joinid", pa.int64()), ("field", pa.large_string()), ("code", pa.int64())]
        + [(name, pa.large_string()) for name in ("value", "split")]
        + [("n_cells", pa.int64())]
    )
    rows = [
        (field, code, value, split, of.get(split, 0))
        for field, by in labels.items()
        for code, (value, of) in enumerate(by.items())
        for split in splits
    ]
    _write_frame(
        root, "labels", columns, [list(range(len(rows))), *(list(column) for column in zip(*rows, strict=True))]
    )


def _write_frame(member: Any, name: str, columns: pa.Schema, values: list[list[Any]]) -> None:
    frame = member.add_new_dataframe(
        name,
        schema=columns,
        index_column_names=["soma_joinid"],
        domain=[(0, max(0, len(values[0]) - 1))],
        platform_config=schema.table_options(columns),
    )
    frame.write(pa.table([pa.array(v, t.type) for v, t in zip(values, columns, strict=True)], schema=columns))


def _write_presence(lake: Lake, member: Any, source: tuple[str, str], var: list[VarRow], datasets: list[str]) -> str:
    """Write which dataset has which feature in the measurement and layer ``source``; return its digest."""
    measurement, layer = source
    array = member.add_new_sparse_ndarray(
        "presence",
        type=pa.bool_(),
        shape=(max(1, len(datasets)), max(1, len(var))),
        platform_config=schema.counts_options(),
    )
    joinid_of = {
        commit.dataset["dataset_id"]: (commit.dataset["organism"], commit.dataset["dataset_joinid"])
        for commit in lake.current
        if measurement in commit.content and commit.content[measurement].layer == layer
    }
    measured_DG = np.zeros((len(datasets), len(var)), dtype=bool)
    for organism in dict.fromkeys(row[2] for row in var):
        if organism not in lake.organisms or measurement not in lake.measurements(organism):
            continue
        positions = np.array([number for number, row in enumerate(var) if row[2] == organism])
        joinids = np.array([var[number][3] for number in positions])
        path = ("census_data", organism, "ms", measurement, "feature_dataset_presence_matrix")
        with reading(records.join(lake.uri, *path)):
            matrix = lake.presence(organism, measurement)
        for row, dataset in enumerate(datasets):
            if joinid_of.get(dataset, ("", 0))[0] == organism:
                measured_DG[row, positions] = np.asarray(matrix[joinid_of[dataset][1]].todense()).ravel()[joinids]
    rows, columns = np.nonzero(measured_DG)
    if len(rows):
        there = np.ones(len(rows), dtype=bool)
        array.write(pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": there}))
    return presence_digest(measured_DG)
