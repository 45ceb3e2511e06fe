"""This module opens SOMA and TileDB objects: one configuration, taken from the environment, for local paths and S3."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import tiledb
import tiledbsoma

from store.errors import StorageError, VerificationError, is_of_memory
from store.records import s3_endpoint

T = TypeVar("T")

BUFFER_BYTES = 256 * 2**20
ORDER_TILES = "sm.query.sparse_global_order.preprocess_tile_merge"
"""TileDB's setting whether a sparse read orders all its tiles first, in a task that it does not wait for to the end.

TileDB 2.30 may free what that task still uses when the read has ended: rarely, that is a segmentation fault
(docs/decisions/0003). Without it each fragment that a read touches has an equal share of half of TileDB's budget, and
must get a tile into it.
"""
EVER = 2**62
"""A timestamp later than every write: who reads at it sees also what machines wrote whose clock is ahead."""
SMALL_BYTES = 2**25
"""Tables of up to so many bytes go to S3 a file a request: twice as much fits, and no file of a table is larger."""
THREADS = "SOMAFLOW_TILEDB_THREADS"
"""Environment variable: threads of TileDB in this process; unset, as many as there are cores."""
INGEST_AGAIN = "python -m store validate tells of which datasets; remove those and ingest them again"
"""What to do about damage of a lake."""
MAKE_AGAIN = "delete the snapshot and make it again"
"""What to do about damage of a snapshot."""


@cache
def tiledb_config() -> dict[str, Any]:
    """Return the TileDB settings of this process.

    Credentials come from the usual AWS variables or the node's identity, never from a setting of ours.
    ``AWS_ENDPOINT_URL`` points at another S3 server, which is then addressed by path.
    """
    config: dict[str, Any] = {
        "soma.init_buffer_bytes": BUFFER_BYTES,
        "sm.mem.reader.sparse_global_order.ratio_array_data": 0.3,
        "sm.mem.malloc_trim": "false",  # giving pages back after each query makes the next one fault them in again
        "sm.enable_signal_handlers": "false",  # its own crashes on Ctrl-C where a shell lets the process ignore that
        "vfs.s3.connect_max_tries": 10,
        ORDER_TILES: 0,
    }
    if endpoint := s3_endpoint():
        parts = urlsplit(endpoint)
        config |= {
            "vfs.s3.endpoint_override": parts.netloc,
            "vfs.s3.scheme": parts.scheme,
            "vfs.s3.use_virtual_addressing": "false",
        }
    threads = os.environ.get(THREADS)
    if threads:
        config |= _concurrency(threads)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        config["vfs.s3.region"] = region
    return config


def _concurrency(threads: int | str) -> dict[str, str]:
    return dict.fromkeys(("sm.compute_concurrency_level", "sm.io_concurrency_level"), str(threads))


def soma_context(
    timestamp_ms: int | None = None,
    budget_bytes: int | None = None,
    *,
    scattered: bool = False,
    written_bytes: int | None = None,
) -> tiledbsoma.SOMATileDBContext:
    """Return a context that opens objects as they were at ``timestamp_ms`` (none: as they are now by the local clock).

    ``budget_bytes`` is what a read may hold before it hands a part over (none: what is fastest). With a small one, say
    ``scattered`` if a read may reach into many fragments: shared out evenly it would not be enough for a tile of each.
    ``written_bytes`` is what will be written at most (none: any number): S3 gets each file of a small table in one
    request in place of three, which takes all of it into memory first.
    """
    config = tiledb_config()
    if budget_bytes is not None:
        config = config | {"soma.init_buffer_bytes": budget_bytes // 8, "sm.mem.total_budget": budget_bytes}
    if scattered:
        config = {key: value for key, value in config.items() if key != ORDER_TILES}
    if written_bytes is not None and written_bytes <= SMALL_BYTES:
        config = config | {"vfs.s3.use_multipart_upload": "false", "vfs.s3.multipart_part_size": 2 * SMALL_BYTES}
    return tiledbsoma.SOMATileDBContext(tiledb_config=config, timestamp=timestamp_ms)


@contextmanager
def storage(uri: str, kept: str = "nothing was committed and what was there is untouched") -> Iterator[None]:
    """Turn what a failing disk or object store raises below ``uri`` into a StorageError that says what to do.

    ``kept`` is what holds all the same.
    """
    try:
        yield
    except (tiledb.TileDBError, tiledbsoma.SOMAError, OSError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{uri}: cannot be written: {reason_of(error)}; {kept}; free "
            "some space, or check the place and your rights to it, and run the same command again"
        ) from error


@contextmanager
def reading(uri: str, remedy: str = INGEST_AGAIN) -> Iterator[None]:
    """Turn what reading the array (or lake) ``uri`` raises into an error that says whether its bytes are damaged.

    ``remedy`` is what to do if they are.

    Raises:
        StorageError: The store does not answer, a file is not there, or no memory was left.
        VerificationError: What is there is not what was written.
    """
    try:
        yield
    except (tiledb.TileDBError, tiledbsoma.SOMAError) as error:
        reason = reason_of(error)
        if is_of_memory(error):
            raise StorageError(
                f"{uri}: no memory was left to read it; run the same command with fewer workers"
            ) from error
        if is_of_store(error):
            raise StorageError(
                f"{uri}: cannot be read: {reason}; check the place and your rights to it, and run the same command "
                "again"
            ) from error
        raise VerificationError(f"{uri}: cannot be read: {reason}; the stored bytes are damaged: {remedy}") from error


def asked_again(ask: Callable[[], T]) -> T:
    """Return what TileDB reads; what came otherwise than it was stored, such as a short answer, is asked for once more.

    What a store refuses is not: TileDB has asked often enough.
    """
    try:
        return ask()
    except tiledb.TileDBError as error:
        if "HTTP Response Code" in str(error):
            raise
        return ask()


def is_of_store(error: Exception) -> bool:
    """Say whether an error of TileDB or SOMA tells what a disk or an object store said, not what was read there.

    That a file on a disk is shorter than it was written is what was read.
    """
    return any(_tells_of_store(line) for line in str(error).splitlines())


def _tells_of_store(line: str) -> bool:
    # "S3: " and "VFS: " stand behind whatever part of TileDB passed the error on
    words = ("IO Error", "TileDB::IO", "TileDB::S3", "TileDB::VFS", "S3: ", "VFS: ", "HTTP Response Code")
    return any(word in line for word in words) and "exceeds file size" not in line


def reason_of(error: Exception) -> str:
    """Return the line that says most: the one that tells of the store, or the first; without an answer's headers."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = next((line for line in lines if _tells_of_store(line)), lines[0])
    return line.partition(" [Remote IP:")[0][:400]


@cache
def tiledb_context(budget_bytes: int | None = None) -> tiledb.Ctx:
    """Return the process's TileDB context for arrays without SOMA's copies.

    ``budget_bytes`` is what a read may hold before it hands a part over (none: what is fastest).
    """
    config = _without_soma()
    if budget_bytes is not None:
        config |= {"py.init_buffer_bytes": budget_bytes // 8, "sm.mem.total_budget": budget_bytes}
    return tiledb.Ctx(config)


def new_tiledb_context(threads: int) -> tiledb.Ctx:
    """Return a TileDB context with this many threads of TileDB's, for callers that bring their own.

    Whoever makes thousands of queries lets the context go now and then: TileDB 2.30 keeps some 12 KB of statistics of
    each query as long as its context lives, also where statistics are disabled (TileDB-Py issue 2194).
    """
    return tiledb.Ctx(_without_soma() | _concurrency(threads))


def _without_soma() -> dict[str, Any]:
    return {key: value for key, value in tiledb_config().items() if not key.startswith("soma.")}


def read_parts(
    uri: str,
    since_ms: int,
    until_ms: int,
    columns: Sequence[str] | None = None,
    *,
    rows: slice = slice(None),
    budget_bytes: int | None = None,
) -> Iterator[pa.Table]:
    """Read what was written to a sparse array from one timestamp to another, both included; SOMA reads all until one.

    Args:
        uri: The array.
        since_ms: Timestamp of the first write to read: earlier ones are not even looked at.
        until_ms: Timestamp of the last.
        columns: Dimensions and attributes wanted (none: all).
        rows: Coordinates in the first dimension, both ends included.
        budget_bytes: What the read may hold before it hands a part over (none: all comes as one).
    """
    with _opened(uri, since_ms, until_ms, tiledb_context(budget_bytes=budget_bytes)) as array:
        domain, in_parts = array.schema.domain, budget_bytes is not None
        names = [domain.dim(number).name for number in range(domain.ndim)]
        dims = names if columns is None else [name for name in names if name in columns]
        attributes = None if columns is None else [name for name in columns if name not in names]
        query = array.query(attrs=attributes, dims=dims, order="U", return_arrow=True, return_incomplete=in_parts)
        found = query.df[rows] if domain.ndim == 1 else query.df[rows, :]
        for part in found if in_parts else (found,):
            yield part.replace_schema_metadata(None)  # it asks for pandas' types with missing values


def _opened(uri: str, since_ms: int, until_ms: int, context: tiledb.Ctx) -> tiledb.Array:
    """Open an array; once more, if a file went away meanwhile that a merge had made needless."""
    try:
        return tiledb.open(uri, timestamp=(since_ms, until_ms), ctx=context)
    except tiledb.TileDBError:
        return tiledb.open(uri, timestamp=(since_ms, until_ms), ctx=context)
