"""This module finds the cells of a lake whose embeddings are nearest: an approximate index in a file, beside them.

::

    <lake>/somaflow/embeddings/<organism>/<key>/<generation>/index/
        vectors.usearch      the graph and the vectors, in half precision where that holds them; read in place (mmap)
        cells.arrow          joinids and labels of the same cells, in ascending order; read in place too
        manifest.json        SHA-256 of both; last, so that without it there is no index

Distances are Euclidean, as those that novelty is told by (``train.novelty``): far means the same in both.

Shape letters used in this module:
    C  cells that are asked about      K  neighbours      D  width of an embedding      N  cells of the index
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from usearch.index import Index

from store import records
from store.embeddings import Generation, list_embeddings, open_embeddings
from store.errors import InputRefused, MissingError
from store.lake import Lake, open_lake, utc_now

VECTORS, CELLS, MANIFEST = "vectors.usearch", "cells.arrow", "manifest.json"
LABELS = (
    "cell_type",
    "cell_type_ontology_term_id",
    "tissue",
    "tissue_general",
    "disease",
    "dataset_id",
    "donor_id",
    "assay",
    "sex",
    "development_stage",
    "perturbation",
    "cell_id",
)
"""Columns of obs that an index keeps, and that can be asked for."""
HALF = 2.0**14
"""Vectors whose values stay below are kept in half precision."""
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 128, 128


def folder_of(generation: Generation) -> str:
    """Return where the index of embeddings stands."""
    return records.join(generation.folder, "index")


def make_index(generation: Generation, *, threads: int = 1) -> dict[str, Any]:
    """Build the index of complete embeddings, the manifest last; return the manifest. One that stands is left alone.

    Vectors are read block by block; what is built has all of them in memory, at 2 bytes a value and some 150 a cell.
    """
    folder = folder_of(generation)
    standing = records.read(records.join(folder, MANIFEST))
    if standing is not None:
        return standing
    lake = open_lake(generation.lake_uri, int(generation.plan["commit"]))
    table, largest = _labels(lake, generation)
    with tempfile.TemporaryDirectory(prefix="somaflow-index-") as scratch:
        vectors, cells = Path(scratch) / VECTORS, Path(scratch) / CELLS
        dtype = "f16" if largest < HALF else "f32"
        _write_vectors(generation, table["soma_joinid"].to_numpy(), vectors, dtype, threads)
        with pa.OSFile(str(cells), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        manifest = {
            "organism": generation.organism,
            "key": generation.key,
            "generation": generation.number,
            "model_sha256": generation.plan["model_sha256"],
            "dimension": int(generation.plan["dimension"]),
            "n_cells": table.num_rows,
            "metric": "euclidean",
            "dtype": dtype,
            "commit": generation.plan["commit"],
            "files": {path.name: _described(path) for path in (vectors, cells)},
            "created": utc_now(),
        }
        for path in (vectors, cells):
            _put(path, records.join(folder, path.name))
    records.create(records.join(folder, MANIFEST), manifest)
    return manifest


def _labels(lake: Lake, generation: Generation) -> tuple[pa.Table, float]:
    """Return the cells that embeddings hold, with their labels, ascending, in one piece, and their largest value."""
    texts = [name for name in LABELS if name != "cell_id"]
    obs = lake.obs(generation.organism, generation.plan["where"] or None, list(LABELS), coded=texts)
    held, largest = [np.zeros(0, bool)], 0.0
    for part_CD, found_C in generation.blocks(obs["soma_joinid"].to_numpy()):
        held.append(found_C)
        largest = max(largest, float(np.abs(part_CD[found_C]).max(initial=0.0)))
    obs = obs.filter(pa.array(np.concatenate(held))).combine_chunks()
    return obs.select(["soma_joinid", *texts, "cell_id"]), largest


def _write_vectors(generation: Generation, joinid_N: NDArray[np.int64], path: Path, dtype: str, threads: int) -> None:
    index = Index(
        ndim=int(generation.plan["dimension"]),
        metric="l2sq",
        dtype=dtype,
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
    )
    start = 0
    for part, _ in generation.blocks(joinid_N):
        index.add(joinid_N[start : start + len(part)].astype(np.uint64), part, threads=threads)
        start += len(part)
    index.save(str(path))


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _put(path: Path, uri: str) -> None:
    """Bring a file to its place, whole."""
    if not records.is_local(uri):
        filesystem, there = fsspec.core.url_to_fs(uri)
        filesystem.put_file(str(path), there)
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(path, temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


@dataclass(frozen=True)
class Known:
    """An index that stands beside a lake: complete embeddings and the index's own manifest."""

    generation: Generation
    manifest: dict[str, Any]

    @property
    def id(self) -> tuple[str, str, str, int]:
        """What tells it from any other."""
        one = self.generation
        return (one.lake_uri, one.organism, one.key, one.number)


def list_indexes(lake_uri: str) -> list[Known]:
    """Return the indexes of the newest complete embeddings of every name."""
    found = ((one, records.read(records.join(folder_of(one), MANIFEST))) for one in list_embeddings(lake_uri))
    return [Known(generation, manifest) for generation, manifest in found if manifest is not None]


class VectorIndex:
    """An index opened for searching; any thread may ask, one at a time.

    Attributes:
        known: Which.
    """

    def __init__(self, known: Known) -> None:
        """Compare its files with the manifest and map them into memory; from an object store, fetch them first.

        Raises:
            InputRefused: A file is not what the manifest says.
            MissingError: A file is gone.
        """
        self.known = known
        places = {name: self._local(name) for name in (VECTORS, CELLS)}
        self._index = Index.restore(str(places[VECTORS]), view=True)
        self._index.expansion_search = EXPANSION_SEARCH
        self._cells = pa.ipc.open_file(pa.memory_map(str(places[CELLS]))).read_all()
        self._joinid_N = self._cells["soma_joinid"].to_numpy()
        self._lock = threading.Lock()

    def _local(self, name: str) -> Path:
        uri = records.join(folder_of(self.known.generation), name)
        path = Path(uri)
        if not records.is_local(uri):
            scratch = tempfile.mkdtemp(prefix="somaflow-index-")
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
            path = Path(scratch) / name
            filesystem, there = fsspec.core.url_to_fs(uri)
            filesystem.get_file(there, str(path))
        if not path.is_file():
            raise MissingError(f"{uri}: is gone; embed the lake again with: python -m serve embed-lake")
        if _described(path) != self.known.manifest["files"][name]:
            raise InputRefused(f"{uri}: its SHA-256 differs from the manifest's; remove its folder and embed again")
        return path

    def __len__(self) -> int:
        return len(self._joinid_N)

    def search(self, embedding_CD: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return joinid_CK and distance_CK of the nearest cells, nearest first; K is k, or all cells if fewer."""
        n_found = min(k, len(self))
        with self._lock:
            found = self._index.search(np.ascontiguousarray(embedding_CD, np.float32), n_found, threads=1)
        shape = (len(embedding_CD), n_found)
        distance_CK = np.sqrt(np.maximum(np.asarray(found.distances, np.float32), 0)).reshape(shape)
        return np.asarray(found.keys).astype(np.int64).reshape(shape), distance_CK

    def labels(self, joinids: NDArray[np.int64], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return these columns of obs of cells of the index, a row for each joinid in the order asked."""
        rows = np.searchsorted(self._joinid_N, joinids)
        taken = self._cells.select(list(columns)).take(pa.array(rows))
        by_column = {name: taken[name].to_pylist() for name in columns}
        return [{name: values[row] for name, values in by_column.items()} for row in range(len(joinids))]


def open_index(lake_uri: str, organism: str, key: str) -> VectorIndex:
    """Open the index of the newest complete embeddings of a name.

    Raises:
        MissingError: There are no such embeddings, or they have no index.
        InputRefused: It is damaged.
    """
    generation = open_embeddings(lake_uri, organism, key)
    manifest = records.read(records.join(folder_of(generation), MANIFEST))
    if manifest is None:
        raise MissingError(f"{lake_uri}: {generation.name} has no index yet; run the same embed-lake command again")
    return VectorIndex(Known(generation, manifest))
