"""This module keeps embeddings of a lake's cells in the lake, beside their counts: whole, or not to be seen.

::

    <lake>/somaflow/embeddings/<organism>/<key>/000000000000/     a generation of the embeddings that are called <key>
        plan.json                which cells, by which model; made before anything is written
        array.json               the array was made: from now on any process may write blocks
        done/000000000007.json   a block was written and read back
        manifest.json            complete: the newest generation that has one is what readers see
    <lake>/census_data/<organism>/ms/<measurement>/obsm/<key>.0   its array; a member of ``obsm`` once it is complete

A generation never changes once it is complete. Other cells or another model make the next one, which takes its place
in ``obsm`` when it is complete in turn; the one before stays until then, for those who read it.

Shape letters used in this module:
    C  cells of a block      D  width of an embedding
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse
import tiledbsoma
from numpy.typing import NDArray

from store import records, schema
from store.context import EVER, soma_context, storage
from store.errors import ConflictError, MissingError, StorageError, UsageError, VerificationError
from store.fragments import FragmentWriter, fragments, merge_footers, remove_fragments
from store.lake import Lake, open_lake, utc_now
from store.lock import WriterLock
from store.members import enter, members, write_time
from store.writer import content_digest, read_back

KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
ROW_TILE = 512
BLOCK_CELLS = 4096
"""Cells of a block, about: what is embedded again when a worker dies."""
READ_BYTES = 2**27
OPENED_BLOCKS = 256
"""Blocks that are read before the array is opened anew: TileDB keeps memory of each read until then."""
IDENTITY = ("model_sha256", "where")
"""What a generation must share with the one before to take over its vectors, and its name without being told to."""
MANIFEST = "somaflow_manifest"
"""Name of the array's metadata that hold the manifest, as JSON."""


def check_key(key: str) -> str:
    """Return the name of embeddings if it can be one.

    Raises:
        UsageError: It cannot.
    """
    if not KEY.fullmatch(key):
        raise UsageError(f"{key!r} names no embeddings; take a letter, then letters, digits, '_' and '-', 64 at most")
    return key


def writer_lock(lake_uri: str) -> WriterLock:
    """Return the lock that whoever embeds a lake holds; ingestion goes on beside it."""
    uri = records.absolute(lake_uri)
    return WriterLock(uri, records.join(uri, records.FOLDER, "embedding-locks"), "an embedding")


@dataclass(frozen=True)
class Generation:
    """Embeddings of a lake's cells by one model, complete or on their way.

    Attributes:
        lake_uri: The lake.
        organism: Whose cells.
        key: Their name.
        number: Which generation.
        plan: What was begun: ``IDENTITY``, ``dimension``, ``measurement`` (whose obsm they stand in), ``commit`` ...
    """

    lake_uri: str
    organism: str
    key: str
    number: int
    plan: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Where its records stand."""
        return records.join(_folder(self.lake_uri, self.organism, self.key), _numbered(self.number))

    @property
    def obsm_uri(self) -> str:
        """The collection that it is entered in."""
        experiment = records.join(self.lake_uri, "census_data", self.organism)
        return records.join(experiment, "ms", str(self.plan["measurement"]), "obsm")

    @property
    def array_uri(self) -> str:
        """Its array."""
        return records.join(self.obsm_uri, f"{self.key}.{self.number}")

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """What is promised of it; None while it is not complete."""
        return records.read(records.join(self.folder, "manifest.json"))

    @property
    def name(self) -> str:
        """How people call it."""
        return f"{self.organism}/{self.key}"

    def read(self, joinid_C: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return embedding_CD of cells, ascending, and which of them it holds; NaN where it does not."""
        with self._open() as array:
            return self._read(array, joinid_C)

    def blocks(self, joinid_C: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Read cells, ascending, block by block, each as ``read`` would; the array is opened once for many blocks."""
        borders = list(pairwise(block_starts(joinid_C).tolist()))
        for first in range(0, len(borders), OPENED_BLOCKS):
            with self._open() as array:
                for start, stop in borders[first : first + OPENED_BLOCKS]:
                    yield self._read(array, joinid_C[start:stop])

    def _open(self) -> Any:
        return tiledbsoma.SparseNDArray.open(self.array_uri, context=soma_context(EVER, READ_BYTES, scattered=True))

    def _read(self, array: Any, joinid_C: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        embedding_CD = np.full((len(joinid_C), int(self.plan["dimension"])), np.nan, np.float32)
        if len(joinid_C) == 0:
            return embedding_CD, np.zeros(0, bool)
        contiguous = int(joinid_C[-1] - joinid_C[0]) == len(joinid_C) - 1
        rows = slice(int(joinid_C[0]), int(joinid_C[-1])) if contiguous else pa.array(joinid_C)
        for part in array.read((rows,)).tables():
            row, column, value = (part[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            embedding_CD[np.searchsorted(joinid_C, row), column] = value
        return embedding_CD, np.asarray(np.isfinite(embedding_CD).all(axis=1))


def _folder(lake_uri: str, *parts: str) -> str:
    return records.join(lake_uri, records.FOLDER, "embeddings", *parts)


def _numbered(number: int) -> str:
    return f"{number:012d}"


def generations(lake_uri: str, organism: str, key: str) -> list[Generation]:
    """Return all that stand under a name, oldest first."""
    folder = _folder(lake_uri, organism, key)
    found = []
    for name in records.folders(folder):
        plan = records.read(records.join(folder, name, "plan.json"))
        if plan is not None:
            found.append(Generation(lake_uri, organism, key, int(name), plan))
    return found


def open_embeddings(lake_uri: str, organism: str, key: str) -> Generation:
    """Return the newest complete generation.

    Raises:
        MissingError: There is none.
    """
    uri = records.absolute(lake_uri)
    complete = [one for one in generations(uri, organism, key) if one.manifest]
    if not complete:
        known = ", ".join(one.name for one in list_embeddings(uri)) or "none"
        raise MissingError(f"{uri}: no embeddings {organism}/{key}; complete ones: {known}")
    return complete[-1]


def list_embeddings(lake_uri: str) -> list[Generation]:
    """Return the newest complete generation of every name."""
    uri = records.absolute(lake_uri)
    found = []
    for organism in records.folders(_folder(uri)):
        for key in records.folders(_folder(uri, organism)):
            found += [one for one in generations(uri, organism, key) if one.manifest][-1:]
    return found


def begin(lake: Lake, organism: str, key: str, wanted: Mapping[str, Any], *, replace: bool = False) -> Generation:
    """Return the generation to work on: the one that was begun, or a new one. The caller holds :func:`writer_lock`.

    One that was begun keeps the commit with which it began, unless a vacuum took that away; a complete one stays as it
    is until the lake has another commit. One that was begun, and in which nothing was done, holds the name against
    nobody: its filter may select no cell.

    Args:
        lake: The commit to take cells from.
        organism: Whose cells.
        key: The name.
        wanted: The plan: all of ``IDENTITY``, ``dimension``, ``measurement`` and what else is to be remembered.
        replace: Let another model, or another filter, take the name over.

    Raises:
        ConflictError: The name belongs to another model or filter.
    """
    before = generations(lake.uri, organism, check_key(key))
    newest = next((one for one in reversed(before) if _same(one, wanted) or one.manifest or done(one)), None)
    if newest and not _same(newest, wanted):
        if not replace:
            raise ConflictError(_taken(lake, newest, wanted))
        newest = None
    if newest and newest.manifest and newest.plan["commit_id"] != lake.commit.id:
        newest = None
    if newest and not newest.manifest:
        try:
            open_lake(lake.uri, newest.plan["commit"])
        except MissingError:  # what it read has been vacuumed
            newest = None
    if newest:
        return newest
    number = before[-1].number + 1 if before else 0
    plan = {**wanted, "commit": lake.commit.number, "commit_id": lake.commit.id, "begun": utc_now()}
    made = Generation(lake.uri, organism, key, number, plan)
    if not records.create(records.join(made.folder, "plan.json"), plan):
        raise ConflictError(f"{lake.uri}: another process embeds {made.name}; run the same command again")
    return made


def _same(standing: Generation, wanted: Mapping[str, Any]) -> bool:
    return all(standing.plan[name] == wanted[name] for name in IDENTITY)


def _taken(lake: Lake, standing: Generation, wanted: Mapping[str, Any]) -> str:
    plan = standing.plan
    if plan["model_sha256"] != wanted["model_sha256"]:
        why = f"are of model {plan['model_sha256'][:12]}, and this is model {wanted['model_sha256'][:12]}"
    else:
        why = f"are of the cells where {plan['where'] or 'nothing is asked'!r}, not where {wanted['where'] or 'all'!r}"
    way = "choose another name, or say that these replace them (--replace)"
    return f"{lake.uri}: embeddings {standing.name} {why}; {way}"


def previous(generation: Generation) -> Generation | None:
    """Return the complete generation of the same model before this one: its vectors need not be made again."""
    return next(iter(earlier(generation)), None)


def earlier(generation: Generation) -> list[Generation]:
    """Return all complete generations of the same model before this one, the newest first."""
    same = [
        one
        for one in generations(generation.lake_uri, generation.organism, generation.key)
        if one.number < generation.number
        and one.manifest
        and all(one.plan[name] == generation.plan[name] for name in ("model_sha256", "measurements"))
    ]
    return same[::-1]


def make_array(generation: Generation) -> None:
    """Make the array where it is missing; one that a killed process left half-made is made anew."""
    made = records.join(generation.folder, "array.json")
    if records.read(made) is not None:
        return
    dimension = int(generation.plan["dimension"])
    options = schema.counts_options(ROW_TILE)
    options["tiledb"]["create"]["dims"]["soma_dim_1"]["tile"] = dimension
    with storage(generation.lake_uri):
        _ensure_obsm(generation)
        records.remove(generation.array_uri)
        tiledbsoma.SparseNDArray.create(
            generation.array_uri,
            type=pa.float32(),
            shape=(schema.CELL_CAPACITY, dimension),
            platform_config=options,
            context=soma_context(),
        ).close()
        records.create(made, {})


def _ensure_obsm(generation: Generation) -> None:
    member_uri, _, name = generation.obsm_uri.rpartition("/")
    if name in members(member_uri):
        return
    keys = records.folders(_folder(generation.lake_uri, generation.organism))
    known = [one for key in keys for one in generations(generation.lake_uri, generation.organism, key)]
    here = [one for one in known if one.obsm_uri == generation.obsm_uri]
    if made := next((one for one in here if records.read(records.join(one.folder, "array.json")) is not None), None):
        raise StorageError(
            f"{member_uri}: does not name {name!r}, and embeddings {made.name} stand there; nothing was removed: bring "
            "the files of that folder's __group back from a copy of the lake"
        )
    records.remove(generation.obsm_uri)  # nothing in it was ever entered anywhere
    tiledbsoma.Collection.create(generation.obsm_uri, context=soma_context()).close()
    enter(member_uri, name, name, write_time(member_uri))


def block_starts(joinid_C: NDArray[np.int64], cells: int = BLOCK_CELLS) -> NDArray[np.int64]:
    """Return where blocks of about so many ascending cells begin, and where the last one ends.

    Each has row tiles of its own, so that two writers never share one.
    """
    if len(joinid_C) == 0:
        return np.zeros(1, np.int64)
    tile_starts = np.concatenate([[0], np.flatnonzero(np.diff(joinid_C // ROW_TILE)) + 1])
    firsts = np.flatnonzero(np.diff(tile_starts // cells, prepend=-1))
    return np.append(tile_starts[firsts], len(joinid_C)).astype(np.int64)


def done(generation: Generation) -> dict[int, dict[str, Any]]:
    """Return the records of the blocks that are done, by their number."""
    folder = records.join(generation.folder, "done")
    return {int(record["block"]): record for record in records.read_all(folder)}


def write_block(
    generation: Generation,
    number: int,
    joinid_C: NDArray[np.int64],
    embedding_CD: NDArray[np.float32],
    said: Mapping[str, Any],
) -> None:
    """Write a block, read it back, and record that it is done. May run in any process, and again in another.

    Args:
        generation: Whose array was made.
        number: The block's.
        joinid_C: Its cells, ascending.
        embedding_CD: Finite.
        said: What else the record is to hold.

    Raises:
        VerificationError: What was read back is not what was written, or a value is no number.
    """
    if not np.isfinite(embedding_CD).all():
        cell = int(joinid_C[~np.isfinite(embedding_CD).all(axis=1)][0])
        raise VerificationError(f"{generation.lake_uri}: the embedding of cell {cell} holds what is no number")
    timestamp_ms = write_time(generation.array_uri)
    width = embedding_CD.shape[1]
    columns = np.arange(width, dtype=np.int64)
    with storage(generation.lake_uri), FragmentWriter(generation.array_uri, timestamp_ms) as writer:
        tiles = np.flatnonzero(np.diff(joinid_C // ROW_TILE, prepend=-1))
        for start, stop in zip(tiles, [*tiles[1:], len(joinid_C)], strict=True):
            first, last = int(joinid_C[start]), int(joinid_C[stop - 1])
            n_values = np.zeros(last - first + 1, np.int64)
            n_values[joinid_C[start:stop] - first] = width
            part = (embedding_CD[start:stop].ravel(), np.tile(columns, stop - start), np.cumsum([0, *n_values]))
            writer.write(first, scipy.sparse.csr_matrix(part, shape=(last - first + 1, width)))
    rows = np.repeat(joinid_C, width)
    digest = content_digest(rows, np.tile(columns, len(joinid_C)), embedding_CD.ravel())
    read_back(generation.array_uri, int(joinid_C[0]), int(joinid_C[-1]), digest, timestamp_ms)
    records.create(
        records.join(generation.folder, "done", f"{_numbered(number)}.json"),
        {
            **said,
            "block": number,
            "cells": len(joinid_C),
            "digest": f"{digest:016x}",
            "fragments": writer.names,
            "timestamp_ms": timestamp_ms,
        },
    )


def complete(generation: Generation, said: Mapping[str, Any]) -> dict[str, Any]:
    """Let readers see a generation all of whose blocks are done; return its manifest. Killed, it may be called again.

    Fragments of blocks whose writers died go first, then the manifest is written into the array's metadata, the array
    takes its place in ``obsm``, and the record comes last.
    """
    if (standing := generation.manifest) is not None:
        return standing
    blocks = done(generation)
    kept = {name for record in blocks.values() for name in record["fragments"]}
    manifest = {
        **generation.plan,
        **said,
        "organism": generation.organism,
        "key": generation.key,
        "generation": generation.number,
        "n_cells": sum(record["cells"] for record in blocks.values()),
        "digest": f"{sum(int(record['digest'], 16) for record in blocks.values()) % 2**64:016x}",
        "timestamp_ms": max((record["timestamp_ms"] for record in blocks.values()), default=0),
        "created": utc_now(),
    }
    with storage(generation.lake_uri):
        there = fragments(generation.array_uri)
        remove_fragments(generation.array_uri, [one.name for one in there if one.name not in kept])
        merge_footers(generation.array_uri)
        at = soma_context(write_time(generation.array_uri, manifest["timestamp_ms"]))
        with tiledbsoma.SparseNDArray.open(generation.array_uri, "w", context=at) as array:
            array.metadata[MANIFEST] = json.dumps(manifest, sort_keys=True)
        _enter(generation)
        records.create(records.join(generation.folder, "manifest.json"), manifest)
        vars(generation).pop("manifest", None)
    return manifest


def _enter(generation: Generation) -> None:
    """Make the array the member of ``obsm`` of its name, in place of the one before."""
    folder = generation.array_uri.rpartition("/")[2]
    standing = members(generation.obsm_uri).get(generation.key, "")
    if standing.rstrip("/").rpartition("/")[2] != folder:
        enter(generation.obsm_uri, generation.key, folder, write_time(generation.obsm_uri))


def forget_old(generation: Generation) -> None:
    """Remove generations before this one, but for the last that was complete: somebody may read it.

    To be called when nothing is left to be made of this one.
    """
    older = generations(generation.lake_uri, generation.organism, generation.key)
    older = [one for one in older if one.number < generation.number]
    keep = max((one.number for one in older if one.manifest), default=-1)
    for one in older:
        if one.number != keep:
            records.remove(one.array_uri)
            records.remove(one.folder)
