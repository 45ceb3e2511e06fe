"""This module builds a snapshot: it reads the chosen cells in lake order, spills them, and writes them shuffled.

Shape letters used in this module:
    C  cells      G  features of one measurement      D  datasets
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import scipy.sparse
import tiledbsoma
from numpy.typing import NDArray

from store import records, schema, snapshot
from store.context import soma_context
from store.errors import UsageError
from store.lake import Lake, utc_now

if TYPE_CHECKING:
    from store.snapshot import Progress, SnapshotSettings

READ_CELLS = 8192
SLAB_ELEMENTS = 2**23
TILE_ELEMENTS = 2**18


class Checksum:
    """SHA-256 over the bytes of arrays in the order they come."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, values: NDArray[Any]) -> None:
        """Take the next values."""
        self._hash.update(np.ascontiguousarray(values).tobytes())

    def hex(self) -> str:
        """Return the digest of all that was added."""
        return self._hash.hexdigest()


def build(lake: Lake, name: str, uri: str, settings: SnapshotSettings, progress: Progress) -> None:
    """Build the snapshot at ``uri``, the manifest last; leavings of a killed build are removed first."""
    cells = _chosen_cells(lake, settings)
    measurements = _chosen_measurements(cells, settings)
    split_C = _splits(cells, settings)
    order, split_rows = _order(split_C, settings)
    records.remove(uri)
    with tiledbsoma.Collection.create(uri, context=soma_context()) as root:
        root.metadata["somaflow_snapshot_format"] = snapshot.FORMAT
    datasets = sorted(set(cells["dataset_id"].to_pylist()))
    entries: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="somaflow-shuffle-") as folder:
        for measurement in measurements:
            spill = _Spill(Path(folder), measurement)
            spill.fill(lake, cells, progress)
            entries[measurement] = _write_measurement(lake, uri, spill, order, datasets, progress)
            spill.remove()
    names = np.array(list(settings.fractions), dtype=object)
    _write_cells(uri, cells.take(pa.array(order)), names[split_C[order]].tolist())
    _write_manifest(lake, name, uri, settings, datasets, entries, split_rows)


def _chosen_cells(lake: Lake, settings: SnapshotSettings) -> pa.Table:
    organisms = settings.organisms or tuple(lake.organisms)
    wanted = ["soma_joinid", *snapshot.LABELS, *(schema.measured_column(name) for name in schema.MEASUREMENTS)]
    parts = []
    for organism in organisms:
        table = lake.obs(organism, settings.where, wanted)
        parts.append(table.append_column("organism", pa.array([organism] * table.num_rows, pa.large_string())))
    if not parts or sum(part.num_rows for part in parts) == 0:
        raise UsageError(f"{lake.uri}: no cell fits where = {settings.where!r} in {', '.join(organisms) or 'the lake'}")
    return pa.concat_tables(parts)


def _chosen_measurements(cells: pa.Table, settings: SnapshotSettings) -> list[str]:
    present = [name for name in schema.MEASUREMENTS if any(cells[schema.measured_column(name)].to_pylist())]
    missing = sorted(set(settings.measurements) - set(present))
    if missing:
        raise UsageError(f"no chosen cell has measurement {missing[0]!r}; measurements here: {', '.join(present)}")
    return [name for name in present if not settings.measurements or name in settings.measurements]


class _Spill:
    """One measurement's counts in lake order on local disk, with an index to every cell."""

    def __init__(self, folder: Path, measurement: str) -> None:
        self.measurement = measurement
        self.paths = (folder / f"{measurement}.features", folder / f"{measurement}.counts")
        self.var: list[tuple[str, str, str, int]] = []  # feature_id, feature_name, organism, var joinid
        self.nnz_C = np.zeros(0, dtype=np.int64)
        self.largest, self.integral = 0.0, True

    def fill(self, lake: Lake, cells: pa.Table, progress: Progress) -> None:
        """Read all cells; features are numbered organism by organism, in joinid order, if any cell has them."""
        measured = cells[schema.measured_column(self.measurement)].to_numpy()
        organism_of = np.array(cells["organism"].to_pylist(), dtype=object)
        joinids = cells["soma_joinid"].to_numpy()
        nnz_parts, used_parts, offset = [], [], 0
        with self.paths[0].open("wb") as features, self.paths[1].open("wb") as counts:
            for organism in dict.fromkeys(organism_of):
                mine = np.flatnonzero(organism_of == organism)
                if not measured[mine].any():
                    nnz_parts.append(np.zeros(len(mine), dtype=np.int64))
                    continue
                var = lake.var(organism, self.measurement)
                used = np.zeros(1 + int(var["soma_joinid"].to_numpy().max()), dtype=bool)
                for block in self._blocks(lake, organism, joinids[mine], progress, cells.num_rows, int(mine[0])):
                    features.write((block.indices.astype(np.int64) + offset).astype(np.uint32).tobytes())
                    counts.write(block.data.astype(np.float32).tobytes())
                    nnz_parts.append(np.diff(block.indptr).astype(np.int64))
                    used[block.indices] = True
                    if block.nnz:
                        self.largest = max(self.largest, float(block.data.max()))
                        self.integral = self.integral and bool(np.all(block.data == np.rint(block.data)))
                used_parts.append(used)
                self._note(var, organism, len(used))
                offset += len(used)
        self.nnz_C = np.concatenate(nnz_parts)
        self.used = np.concatenate(used_parts)

    def _blocks(
        self, lake: Lake, organism: str, joinids: NDArray[np.int64], progress: Progress, total: int, done: int
    ) -> Iterator[scipy.sparse.csr_matrix]:
        for start in range(0, len(joinids), READ_CELLS):
            part = joinids[start : start + READ_CELLS]
            block = lake.counts(organism, self.measurement, part)
            block.sort_indices()
            yield block
            progress(f"read {self.measurement}", done + start + len(part), total)

    def _note(self, var: pa.Table, organism: str, n_joinids: int) -> None:
        slots = [("", "", organism, joinid) for joinid in range(n_joinids)]
        for joinid, feature_id, name in zip(
            *(var[column].to_pylist() for column in ("soma_joinid", "feature_id", "feature_name")), strict=True
        ):
            slots[joinid] = (feature_id, name, organism, joinid)
        self.var.extend(slots)

    def rows(self, order: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.float32]]]:
        """Yield features (as numbered in the snapshot) and counts of the cells in ``order``, slab by slab."""
        number = np.cumsum(self.used) - 1
        start_C = np.concatenate([[0], np.cumsum(self.nnz_C)])[:-1]
        features = _mapped(self.paths[0], np.uint32)
        counts = _mapped(self.paths[1], np.float32)
        ends = np.cumsum(self.nnz_C[order])
        first = 0
        while first < len(order):
            before = ends[first - 1] if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + SLAB_ELEMENTS, side="right")))
            part = order[first:stop]
            where = _ranges(start_C[part], self.nnz_C[part])
            yield number[features[where]].astype(np.uint32), counts[where]
            first = stop

    def remove(self) -> None:
        """Delete the spilled files."""
        for path in self.paths:
            path.unlink()


def _mapped(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _ranges(start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate arange(start[i], start[i] + length[i]) for all i."""
    total = int(length.sum())
    shift = np.repeat(start - np.concatenate([[0], np.cumsum(length)[:-1]]), length)
    return np.arange(total, dtype=np.int64) + shift


def _write_measurement(
    lake: Lake, uri: str, spill: _Spill, order: NDArray[np.int64], datasets: list[str], progress: Progress
) -> dict[str, Any]:
    name = spill.measurement
    kept = np.flatnonzero(spill.used)
    var = [spill.var[slot] for slot in kept]
    nnz = int(spill.nnz_C.sum())
    feature_type = np.uint16 if len(var) <= 2**16 else np.uint32
    count_type = np.float32 if not spill.integral else np.min_scalar_type(int(spill.largest)).type
    with tiledbsoma.Collection.open(uri, "w", context=soma_context()) as root:
        member = root.add_new_collection(name)
        sums = {key: Checksum() for key in ("indptr", "features", "counts")}
        indptr = np.concatenate([[0], np.cumsum(spill.nnz_C[order])]).astype(np.int64)
        vectors = {
            "indptr": _new_vector(member, "indptr", np.int64, len(indptr), tile=2**14),
            "features": _new_vector(member, "features", feature_type, nnz, quick=True),
            "counts": _new_vector(member, "counts", count_type, nnz),
        }
        _write_vector(vectors["indptr"], 0, indptr, sums["indptr"])
        at = 0
        for features, counts in spill.rows(order):
            _write_vector(vectors["features"], at, features.astype(feature_type), sums["features"])
            _write_vector(vectors["counts"], at, counts.astype(count_type), sums["counts"])
            at += len(features)
            progress(f"write {name}", at, nnz)
        _write_vocabulary(member, var)
        _write_presence(lake, member, name, var, datasets)
    return {
        "n_features": len(var),
        "nnz": nnz,
        "vocabulary_hash": vocabulary_hash(name, [row[0] for row in var], [row[2] for row in var]),
        "sha256": {key: checksum.hex() for key, checksum in sums.items()},
    }


def vocabulary_hash(measurement: str, feature_ids: list[str], organisms: list[str]) -> str:
    """Digest a vocabulary: the same features of the same organisms in the same order give the same hash."""
    return hashlib.sha256(json.dumps([measurement, feature_ids, organisms]).encode()).hexdigest()


def _new_vector(
    member: Any, name: str, dtype: type[np.generic], length: int, tile: int = TILE_ELEMENTS, *, quick: bool = False
) -> Any:
    return member.add_new_dense_ndarray(
        name,
        type=pa.from_numpy_dtype(np.dtype(dtype)),
        shape=(max(1, length),),
        platform_config=schema.vector_options(tile, np.dtype(dtype).itemsize, quick=quick),
    )


def _write_vector(vector: Any, start: int, values: NDArray[Any], checksum: Checksum) -> None:
    checksum.add(values)
    if len(values):
        vector.write((slice(start, start + len(values) - 1),), pa.Tensor.from_numpy(np.ascontiguousarray(values)))


def _write_vocabulary(member: Any, var: list[tuple[str, str, str, int]]) -> None:
    columns = pa.schema(
        [("soma_joinid", pa.int64())]
        + [(name, pa.large_string()) for name in ("feature_id", "feature_name", "organism")]
        + [("lake_joinid", pa.int64())]
    )
    frame = member.add_new_dataframe(
        "var",
        schema=columns,
        index_column_names=["soma_joinid"],
        domain=[(0, max(0, len(var) - 1))],
        platform_config=schema.table_options(columns),
    )
    rows = [list(column) for column in zip(*var, strict=True)] or [[], [], [], []]
    values = [list(range(len(var))), *rows]
    frame.write(pa.table([pa.array(v, t.type) for v, t in zip(values, columns, strict=True)], schema=columns))


def _write_presence(
    lake: Lake, member: Any, measurement: str, var: list[tuple[str, str, str, int]], datasets: list[str]
) -> None:
    array = member.add_new_sparse_ndarray(
        "presence",
        type=pa.bool_(),
        shape=(len(datasets), max(1, len(var))),
        platform_config=schema.counts_options(),
    )
    joinid_of = {
        commit.dataset["dataset_id"]: (commit.dataset["organism"], commit.dataset["dataset_joinid"])
        for commit in lake.current
    }
    rows, columns = [], []
    for organism in dict.fromkeys(row[2] for row in var):
        positions = np.array([number for number, row in enumerate(var) if row[2] == organism])
        joinids = np.array([var[number][3] for number in positions])
        matrix = lake.presence(organism, measurement)
        for row, dataset in enumerate(datasets):
            if joinid_of[dataset][0] == organism:
                measured = np.asarray(matrix[joinid_of[dataset][1]].todense()).ravel()[joinids]
                rows.append(np.full(int(measured.sum()), row, dtype=np.int64))
                columns.append(positions[measured])
    if rows and sum(map(len, rows)):
        joined = np.concatenate(rows)
        array.write(
            pa.table(
                {
                    "soma_dim_0": joined,
                    "soma_dim_1": np.concatenate(columns).astype(np.int64),
                    "soma_data": np.ones(len(joined), dtype=bool),
                }
            )
        )


def _splits(cells: pa.Table, settings: SnapshotSettings) -> NDArray[np.int64]:
    """Choose each cell's split (its number among the settings'): by cell or by whole groups, then as assigned.

    Raises:
        UsageError: An assigned value does not occur, a cell is assigned to two splits, or a group is in two splits.
    """
    edges = np.cumsum(list(settings.fractions.values()))
    if settings.split_by:
        labels, group_C = np.unique(_texts(cells, settings.split_by), return_inverse=True)
        draws = np.array([_draw(settings.seed, label) for label in labels])[group_C]
    else:
        draws = np.random.default_rng([settings.seed, 1]).random(cells.num_rows)
    split_C = np.minimum(np.searchsorted(edges, draws, side="right"), len(edges) - 1).astype(np.int64)
    assigned_C = _assigned(cells, settings)
    split_C = np.where(assigned_C >= 0, assigned_C, split_C)
    for column in dict.fromkeys([*filter(None, [settings.split_by]), *settings.apart]):
        _refuse_leaks(column, _texts(cells, column), split_C, list(settings.fractions))
    return split_C


def _assigned(cells: pa.Table, settings: SnapshotSettings) -> NDArray[np.int64]:
    """Return the number of the split that each cell is assigned to; -1 for those that are not."""
    names = list(settings.fractions)
    assigned_C = np.full(cells.num_rows, -1, dtype=np.int64)
    wanted = [(name, *item) for name, columns in settings.assign.items() for item in columns.items()]
    for name, column, values in wanted:
        number, texts = names.index(name), _texts(cells, column)
        for value in values:
            found = texts == value
            if not found.any():
                near = difflib.get_close_matches(value, sorted(set(texts)), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"assign.{name}.{column}: no chosen cell has {value!r}{hint}")
            other = assigned_C[found & (assigned_C >= 0) & (assigned_C != number)]
            if len(other):
                raise UsageError(
                    f"assign.{name}.{column} = {value!r}: {len(other):,} of its cells are also assigned to "
                    f"{names[other[0]]!r}"
                )
            assigned_C[found] = number
    return assigned_C


def _texts(cells: pa.Table, column: str) -> NDArray[np.object_]:
    return np.array([str(value) for value in cells[column].to_pylist()], dtype=object)


def _refuse_leaks(column: str, texts: NDArray[np.object_], split_C: NDArray[np.int64], names: list[str]) -> None:
    values, group_C = np.unique(texts, return_inverse=True)
    holds = np.zeros((len(values), len(names)), dtype=bool)
    holds[group_C, split_C] = True
    leaking = np.flatnonzero(holds.sum(axis=1) > 1)
    if len(leaking):
        first = leaking[0]
        where = " and ".join(names[number] for number in np.flatnonzero(holds[first]))
        raise UsageError(
            f"{len(leaking)} of {len(values)} values of {column} are in several splits, such as {values[first]!r} in "
            f"{where}; split by {column}, assign it whole, or narrow the cells with where"
        )


def _order(
    split_C: NDArray[np.int64], settings: SnapshotSettings
) -> tuple[NDArray[np.int64], dict[str, tuple[int, int]]]:
    """Return the cell of each row, shuffled within each split, and the rows (first, behind the last) of each split.

    A split's rows lie together, so that streaming it reads nothing else.
    """
    shuffled = np.random.default_rng([settings.seed, 0]).permutation(len(split_C))
    order = shuffled[np.argsort(split_C[shuffled], kind="stable")]
    ends = np.cumsum(np.bincount(split_C, minlength=len(settings.fractions))).tolist()
    return order, {name: (start, end) for name, start, end in zip(settings.fractions, [0, *ends], ends, strict=False)}


def _draw(seed: int, label: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}|{label}".encode()).digest()[:8], "big") / 2**64


def _write_cells(uri: str, cells: pa.Table, split: list[str]) -> None:
    made = {"row": np.arange(cells.num_rows, dtype=np.int64), "split": split}
    columns = snapshot.CELLS_SCHEMA
    table = pa.table(
        [
            pa.array(made[field.name], field.type) if field.name in made else cells[field.name].combine_chunks()
            for field in columns
        ],
        schema=columns,
    )
    with tiledbsoma.Collection.open(uri, "w", context=soma_context()) as root:
        frame = root.add_new_dataframe(
            "cells",
            schema=columns,
            index_column_names=["row"],
            domain=[(0, cells.num_rows - 1)],
            platform_config=schema.table_options(columns, index="row"),
        )
        frame.write(table)


def _write_manifest(
    lake: Lake,
    name: str,
    uri: str,
    settings: SnapshotSettings,
    datasets: list[str],
    entries: dict[str, Any],
    split_rows: dict[str, tuple[int, int]],
) -> None:
    manifest: dict[str, Any] = {
        "format": snapshot.FORMAT,
        "name": name,
        "n_cells": max(stop for _, stop in split_rows.values()),
        "splits": {key: stop - start for key, (start, stop) in split_rows.items()},
        "split_rows": {key: list(rows) for key, rows in split_rows.items()},
        "measurements": entries,
        "datasets": datasets,
        "settings": settings.model_dump(mode="json"),
        "commit": lake.commit.number,
        "commit_id": lake.commit.id,
        "lake_timestamp": lake.commit.timestamp_ms,
        "vocabulary_hash": hashlib.sha256(
            "".join(entry["vocabulary_hash"] for entry in entries.values()).encode()
        ).hexdigest(),
        "versions": {key: importlib.metadata.version(key) for key in ("tiledbsoma", "tiledb", "numpy")},
    }
    manifest["id"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    records.create(records.join(uri, snapshot.MANIFEST), {**manifest, "created": utc_now()})
