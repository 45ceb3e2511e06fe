"""This module finds the cells of a lake whose embeddings are nearest: an approximate index in a file, beside them.

::

    <lake>/somaflow/embeddings/<organism>/<key>/<generation>/index/
        000000000000/            cells whose joinids lie in the same stretch of ``PART_CELLS``
            *.usearch            their graph and vectors, in half precision where that holds them; read in place (mmap)
            *.arrow              their joinids and labels, in ascending order; read in place too
            part.json            names and SHA-256 of both; last, so that without it there is no such part
        index.json               the parts; last, so that without it there is no index

Each part is made by itself, in one worker's memory, and what a lake that grows adds goes into its last parts: those
before are taken over. A question is put to all parts, and the nearest of their answers are the answer.

Distances are Euclidean, as those that novelty is told by (``train.novelty``): far means the same in both.

Shape letters used in this module:
    C  cells that are asked about      K  neighbours      D  width of an embedding      N  cells of a part
    P  parts                           F  cells that parts found
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from usearch.index import Index

from store import records
from store.embeddings import Generation, earlier, generations, list_embeddings
from store.errors import InputRefused, MissingError, VerificationError
from store.lake import open_lake, utc_now

VECTORS, CELLS = ".usearch", ".arrow"
PART, MANIFEST = "part.json", "index.json"
PART_CELLS = 2**17
"""Joinids of a part. Smaller graphs are built faster and find more, but each costs a question its time."""
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
FEW = 4096
"""In parts of so many cells all are looked at, and where so many are asked for that a graph may miss some."""
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 128, 128


def folder_of(generation: Generation) -> str:
    """Return where the index of embeddings stands."""
    return records.join(generation.folder, "index")


def standing_index(generation: Generation) -> dict[str, Any] | None:
    """Return the manifest of the index of embeddings; None while it is not complete."""
    return records.read(records.join(folder_of(generation), MANIFEST))


def usable_index(generation: Generation) -> dict[str, Any] | None:
    """Return the manifest of an index that stands; where a file of it is gone or cut off, the index is no more.

    So the parts whose folders somebody removed, as errors tell people to, are made again, and only they.
    """
    manifest = standing_index(generation)
    if manifest is None:
        return None
    folders = [_part_folder(generation, part["part"]) for part in manifest["parts"]]
    stand = records.read_each([records.join(folder, PART) for folder in folders])
    broken = [
        folder
        for folder, part, record in zip(folders, manifest["parts"], stand, strict=True)
        if record is None or not _has_all(folder, part)
    ]
    if not broken:
        return manifest
    for folder in broken:
        records.remove(records.join(folder, PART))
    records.remove(records.join(folder_of(generation), MANIFEST))
    return None


def _has_all(folder: str, part: dict[str, Any]) -> bool:
    return all(_size(records.join(folder, one["name"])) == one["bytes"] for one in part["files"].values())


def _size(uri: str) -> int | None:
    """Return a file's size in bytes; None where there is none."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        return int(filesystem.size(path))
    except FileNotFoundError:
        return None


def part_numbers(joinid_C: NDArray[np.int64]) -> list[int]:
    """Return the parts that cells lie in."""
    return [int(number) for number in np.unique(joinid_C // PART_CELLS)]


def make_part(generation: Generation, number: int, *, threads: int = 1) -> dict[str, Any]:
    """Build a part of the index of complete embeddings; return its record. One that stands is left alone.

    May run in any process, and again in another. Vectors are read block by block; what is built has those of the part
    in memory, at 2 bytes a value and some 150 a cell. A part of the generation before is gone on with if it has lost no
    cell since.
    """
    folder = _part_folder(generation, number)
    standing = records.read(records.join(folder, PART))
    if standing is not None:
        return standing
    table, largest = _labels(generation, number)
    joinid_N, dtype = table["soma_joinid"].to_numpy(), "f16" if largest < HALF else "f32"
    with tempfile.TemporaryDirectory(prefix="somaflow-index-") as scratch:
        vectors, cells = Path(scratch) / f"made{VECTORS}", Path(scratch) / f"made{CELLS}"
        index, new_N = _begun(generation, number, joinid_N, dtype)
        _add(index, generation, joinid_N[new_N], threads)
        index.save(str(vectors))
        with pa.OSFile(str(cells), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        record = {
            "part": number,
            "n_cells": table.num_rows,
            "n_taken_over": int((~new_N).sum()),
            "dtype": dtype,
            "files": {path.suffix: _named(path) for path in (vectors, cells)},
        }
        for path in (vectors, cells):
            _put(path, records.join(folder, record["files"][path.suffix]["name"]))
    if not records.create(records.join(folder, PART), record):  # a worker that was given up was still at it
        return records.read(records.join(folder, PART)) or record
    return record


def complete_index(generation: Generation, numbers: Sequence[int]) -> dict[str, Any]:
    """Let readers see an index all of whose parts are made; return its manifest. Killed, it may be called again.

    Raises:
        VerificationError: A part is gone.
    """
    found = records.read_each([records.join(_part_folder(generation, number), PART) for number in numbers])
    parts = [part for part in found if part is not None]
    if len(parts) < len(numbers):
        gone = numbers[found.index(None)]
        raise VerificationError(f"{folder_of(generation)}: part {gone} is gone; run the same embed-lake command again")
    manifest = {
        "organism": generation.organism,
        "key": generation.key,
        "generation": generation.number,
        "model_sha256": generation.plan["model_sha256"],
        "dimension": int(generation.plan["dimension"]),
        "n_cells": sum(part["n_cells"] for part in parts),
        "metric": "euclidean",
        "commit": generation.plan["commit"],
        "parts": parts,
        "created": utc_now(),
    }
    records.create(records.join(folder_of(generation), MANIFEST), manifest)
    return manifest


def _part_folder(generation: Generation, number: int) -> str:
    return records.join(folder_of(generation), f"{number:012d}")


def _labels(generation: Generation, number: int) -> tuple[pa.Table, float]:
    """Return a part's cells that embeddings hold, with labels, ascending, in one piece, and their largest value."""
    lake = open_lake(generation.lake_uri, int(generation.plan["commit"]))
    texts = [name for name in LABELS if name != "cell_id"]
    span = (number * PART_CELLS, (number + 1) * PART_CELLS - 1)
    obs = lake.obs(generation.organism, generation.plan["where"] or None, list(LABELS), span, coded=texts)
    held, largest = [np.zeros(0, bool)], 0.0
    for part_CD, found_C in generation.blocks(obs["soma_joinid"].to_numpy()):
        held.append(found_C)
        largest = max(largest, float(np.abs(part_CD[found_C]).max(initial=0.0)))
    obs = obs.filter(pa.array(np.concatenate(held))).combine_chunks()
    return obs.select(["soma_joinid", *texts, "cell_id"]), largest


def _begun(
    generation: Generation, number: int, joinid_N: NDArray[np.int64], dtype: str
) -> tuple[Index, NDArray[np.bool_]]:
    """Return the graph to go on with, and which cells it lacks: the part before, or an empty one."""
    for before in earlier(generation):
        record = records.read(records.join(_part_folder(before, number), PART))
        if record is None or record["dtype"] != dtype:
            continue
        with suppress(MissingError, InputRefused), _Part(_part_folder(before, number), record["files"]) as part:
            if np.isin(part.joinid_N, joinid_N, assume_unique=True).all():
                index = Index.restore(part.vectors)
                index.expansion_add = EXPANSION_ADD
                return index, ~np.isin(joinid_N, part.joinid_N, assume_unique=True)
    index = Index(
        ndim=int(generation.plan["dimension"]),
        metric="l2sq",
        dtype=dtype,
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
    )
    return index, np.ones(len(joinid_N), bool)


def _add(index: Index, generation: Generation, joinid_C: NDArray[np.int64], threads: int) -> None:
    start = 0
    for part_CD, _ in generation.blocks(joinid_C):
        index.add(joinid_C[start : start + len(part_CD)].astype(np.uint64), part_CD, threads=threads)
        start += len(part_CD)


def _named(path: Path) -> dict[str, Any]:
    """Describe a file under a name of its own, so that two makers of a part do not write over each other."""
    said = _described(path)
    return {"name": f"{said['sha256'][:16]}{path.suffix}", **said}


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
    """Return the newest index of every name: that of the embeddings before while the newest have none yet."""
    found = (_newest(one) for one in list_embeddings(lake_uri))
    return [known for known in found if known is not None]


def _newest(newest: Generation) -> Known | None:
    """Return the newest index of a name, of whose complete embeddings the newest are given."""
    manifest = standing_index(newest)
    if manifest is not None:
        return Known(newest, manifest)
    for one in reversed(generations(newest.lake_uri, newest.organism, newest.key)):
        if one.number < newest.number and one.manifest and (manifest := standing_index(one)) is not None:
            return Known(one, manifest)
    return None


class _Part:
    """A part of an index, mapped into memory; from an object store, its files are fetched first.

    Attributes:
        vectors: Where its graph lies.
        cells: Joinids and labels.
        joinid_N: The joinids, ascending.
    """

    def __init__(self, folder: str, files: dict[str, Any]) -> None:
        """Compare its files with what is promised of them.

        Raises:
            InputRefused: A file is not what its record says.
            MissingError: A file is gone.
        """
        self._scratch = ExitStack()
        weakref.finalize(self, self._scratch.close)
        places = {ending: self._local(folder, files[ending]) for ending in (VECTORS, CELLS)}
        self.vectors = str(places[VECTORS])
        self.cells = pa.ipc.open_file(pa.memory_map(str(places[CELLS]))).read_all()
        self.joinid_N: NDArray[np.int64] = self.cells["soma_joinid"].to_numpy()

    def _local(self, folder: str, promised: dict[str, Any]) -> Path:
        uri = records.join(folder, promised["name"])
        path = Path(uri)
        again = f"remove {folder} and embed the lake again: python -m serve embed-lake"
        if not records.is_local(uri):
            scratch = self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="somaflow-index-"))
            path = Path(scratch) / path.name
            filesystem, there = fsspec.core.url_to_fs(uri)
            with suppress(FileNotFoundError):
                filesystem.get_file(there, str(path))
        if not path.is_file():
            raise MissingError(f"{uri}: is gone; {again}")
        if _described(path)["sha256"] != promised["sha256"]:
            raise InputRefused(f"{uri}: its SHA-256 differs from the manifest's; {again}")
        return path

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    @cached_property
    def graph(self) -> Index:
        """Its graph and vectors, read in place."""
        graph = Index.restore(self.vectors, view=True)
        graph.expansion_search = EXPANSION_SEARCH
        return graph


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
        self._parts = [
            _Part(_part_folder(known.generation, one["part"]), one["files"]) for one in known.manifest["parts"]
        ]
        self._first_P = np.array([part.joinid_N[0] for part in self._parts])
        self._n_cells = sum(len(part.joinid_N) for part in self._parts)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._n_cells

    def search(self, embedding_CD: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return joinid_CK and distance_CK of the nearest cells, nearest first; K is k, or all cells if fewer."""
        query_CD = np.ascontiguousarray(embedding_CD, np.float32)
        joinid_CK, distance_CK = np.empty((len(query_CD), 0), np.int64), np.empty((len(query_CD), 0), np.float32)
        with self._lock:
            for part in self._parts:  # only the nearest so far are kept: parts may be hundreds
                joinid_CF, distance_CF = _search(part, query_CD, k)
                joinid_CF = np.concatenate([joinid_CK, joinid_CF], axis=1)
                distance_CF = np.concatenate([distance_CK, distance_CF], axis=1)
                nearest_CK = np.argsort(distance_CF, axis=1, kind="stable")[:, :k]
                joinid_CK = np.take_along_axis(joinid_CF, nearest_CK, axis=1)
                distance_CK = np.take_along_axis(distance_CF, nearest_CK, axis=1)
        return joinid_CK, np.sqrt(np.maximum(distance_CK, 0))

    def labels(self, joinids: NDArray[np.int64], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return these columns of obs of cells of the index, a row for each joinid in the order asked."""
        part_C = np.searchsorted(self._first_P, joinids, side="right") - 1
        rows: list[dict[str, Any]] = [{} for _ in joinids]
        for number in np.unique(part_C):
            part, asked = self._parts[number], np.flatnonzero(part_C == number)
            taken = part.cells.select(list(columns)).take(pa.array(np.searchsorted(part.joinid_N, joinids[asked])))
            for name in columns:
                for row, value in zip(asked, taken[name].to_pylist(), strict=True):
                    rows[row][name] = value
        return rows


def _search(part: _Part, query_CD: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return joinids and squared distances of a part's nearest cells, as many as are asked for and there are.

    A graph does not reach all cells that are alike (empty ones, say): where it finds too few, all are looked at.
    """
    n_cells = len(part.joinid_N)
    n_found = min(k, n_cells)
    if len(query_CD) == 0:
        return np.empty((0, n_found), np.int64), np.empty((0, n_found), np.float32)
    for exact in (True,) if n_cells <= FEW or 2 * n_found > n_cells else (False, True):
        found = part.graph.search(query_CD, n_found, threads=1, exact=exact)
        if len(query_CD) == 1:
            complete = len(found.keys) == n_found
        else:
            complete = bool((np.asarray(found.counts) == n_found).all())
        if complete:
            break
    shape = (len(query_CD), n_found)
    joinid_CK, distance_CK = np.asarray(found.keys).astype(np.int64), np.asarray(found.distances, np.float32)
    return joinid_CK.reshape(shape), distance_CK.reshape(shape)
