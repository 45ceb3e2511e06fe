"""This module turns a matrix that comes in any order into rows, on disk, with bounded memory.

Sources store counts by column (CSC), as coordinates in a text (MatrixMarket), or sorted by place in the genome
(fragments). Rows are wanted. Coordinates are spilled once in the order they come, counted by row, then put in place in
memory-mapped arrays: the pages of those belong to the file system's cache, not to the process.

Shape letters used in this module:
    C  cells (rows)      F  features (columns)      N  stored values
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from ingest.sources.form import Rows, fingerprint, without_query
from store.errors import InputRefused, SomaflowError, StorageError
from store.records import is_local

Coordinates = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.floating]]
"""rows_N, columns_N, values_N of a part of a matrix; a coordinate may come again, its values are added."""

SPILL = np.dtype([("row", "<i8"), ("column", "<i4"), ("value", "<f8")])
PART = 2**20
FORM = 3
"""Raised when other things are made of the same, so that what lies there from before is not taken."""
OURS = re.compile("[0-9a-f]{32}")
"""What ``scratch_of`` calls folders."""
FORGOTTEN_S = 7 * 24 * 3600
"""What nobody has opened for so long goes before something new is made."""
SCARCE_S = 3600
"""The same, where less than ``FREE`` of the disk is."""
FREE = 0.2


def scratch_folder() -> Path:
    """Return this user's folder for intermediate files, in ``SOMAFLOW_SCRATCH`` or the system's temporary folder."""
    return Path(os.environ.get("SOMAFLOW_SCRATCH") or tempfile.gettempdir()) / f"somaflow-{os.getuid()}"


def scratch_of(*identity: object) -> Path:
    """Return the folder of what is made of something: the same identity, the same folder."""
    return scratch_folder() / hashlib.sha256(json.dumps([FORM, *identity]).encode()).hexdigest()[:32]


def downloaded(uri: str) -> Path:
    """Return a local copy of a file that lies elsewhere, made once on this machine; a local one is its own copy.

    Raises:
        InputRefused: It cannot be read.
        StorageError: The scratch folder is full or cannot be written.
    """
    if is_local(uri):
        return Path(uri.removeprefix("file://"))
    folder = scratch_of(uri, fingerprint(uri), "download")
    copy = folder / without_query(uri).rsplit("/", 1)[-1].lower()
    with scratch_errors(folder):
        made_once(folder, lambda: _fetch(uri, copy))
    return copy


def _fetch(uri: str, copy: Path) -> None:
    with copy.open("wb") as file:
        for part in _content(uri):
            file.write(part)


def _content(uri: str) -> Iterator[bytes]:
    try:
        with fsspec.open(uri, "rb") as file:
            while part := file.read(2**22):
                yield part
    except OSError as error:
        raise InputRefused(f"{uri}: cannot be read: {error}") from error


def turned(identity: list[str], shape: tuple[int, int], parts: Callable[[], Iterator[Coordinates]]) -> Rows:
    """Return the rows of a matrix that ``parts`` yields in any order.

    Args:
        identity: What the matrix is (address, fingerprint, settings): the same is turned once on this machine, and the
            result is shared by all processes. Its address, which messages name, comes first.
        shape: Cells and features.
        parts: Reads the matrix from its beginning.

    Raises:
        InputRefused: A coordinate lies outside ``shape``.
        StorageError: The scratch folder is full or cannot be written.
    """
    folder = scratch_of(*identity, shape)
    with scratch_errors(folder):
        made_once(folder, lambda: _turn(folder, shape, parts(), identity[0]))
    return _rows(folder, shape)


@contextmanager
def scratch_errors(folder: Path) -> Iterator[None]:
    """Say of errors of the file system that they are about a scratch folder."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SomaflowError):
            raise
        raise StorageError(
            f"{folder}: cannot write intermediate files: {error}; free some space or set SOMAFLOW_SCRATCH=FOLDER"
        ) from error


def made_once(folder: Path, make: Callable[[], object]) -> None:
    """Let ``make`` fill a scratch folder, once on this machine; others wait, and what was cut short goes first."""
    _make_own(folder.parent)
    with _locked(folder):
        if not (folder / "done").exists():
            _forget_old(folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make()
            (folder / "done").touch()
        os.utime(folder)


def _make_own(scratch: Path) -> None:
    """Make the scratch folder, or look whether it is this user's: whoever else writes there says what is ingested.

    Raises:
        StorageError: It belongs to somebody else, or others may write there.
    """
    scratch.mkdir(0o700, parents=True, exist_ok=True)
    found = scratch.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StorageError(
            f"{scratch}: is not a folder that only this user ({os.getuid()}) can write to, but "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}, so what lies there is not trusted; remove it, "
            "or set SOMAFLOW_SCRATCH=FOLDER"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        scratch.chmod(0o700)  # as it was made before: others could read it


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_old(scratch: Path) -> None:
    """Remove what no run has opened for a week; where the disk gets full, for an hour, what was opened first first.

    Who still has it mapped reads on; who opens it again makes it again.
    """
    ours = (folder for folder in scratch.iterdir() if OURS.fullmatch(folder.name) and folder.is_dir())
    for folder in sorted(ours, key=_opened):
        disk = shutil.disk_usage(scratch)
        if time.time() - _opened(folder) > (SCARCE_S if disk.free < FREE * disk.total else FORGOTTEN_S):
            shutil.rmtree(folder, ignore_errors=True)


def _opened(folder: Path) -> float:
    """Return when a folder was opened last; now, if another process has removed it meanwhile."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _turn(folder: Path, shape: tuple[int, int], parts: Iterator[Coordinates], where: str) -> None:
    spill = folder / "spill"
    nnz_C, single = np.zeros(shape[0], np.int64), True
    with spill.open("wb") as file:
        for rows, columns, values in parts:
            _check(rows, columns, shape, where)
            nnz_C += np.bincount(rows, minlength=shape[0])
            record = np.empty(len(rows), SPILL)
            record["row"], record["column"], record["value"] = rows, columns, values
            single = single and _fits_single(record["value"])
            record.tofile(file)
    indptr = np.concatenate([[0], np.cumsum(nnz_C)])
    np.save(folder / "indptr.npy", indptr)
    indices = np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int32, (int(indptr[-1]),))
    data = np.lib.format.open_memmap(folder / "data.npy", "w+", np.float32 if single else np.float64, indices.shape)
    cursor_C = indptr[:-1].copy()
    with spill.open("rb") as file:
        while len(record := np.fromfile(file, SPILL, PART)):
            order = np.argsort(record["row"], kind="stable")
            rows = record["row"][order]
            first = np.flatnonzero(np.diff(rows, prepend=-1))
            run = np.diff(first, append=len(rows))
            place = np.arange(len(rows)) - np.repeat(first, run) + cursor_C[rows]
            indices[place], data[place] = record["column"][order], record["value"][order]
            cursor_C[rows[first]] += run
    indices.flush()
    data.flush()
    spill.unlink()


def _fits_single(values: NDArray[np.float64]) -> bool:
    """Say whether single precision holds values as they are: 2**24 + 1 and 1.00000001 would pass for counts there."""
    with np.errstate(over="ignore"):
        return np.array_equal(values, values.astype(np.float32), equal_nan=True)


def _check(rows: NDArray[np.integer], columns: NDArray[np.integer], shape: tuple[int, int], where: str) -> None:
    for what, found, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < size:
            raise InputRefused(
                f"{where}: a coordinate lies outside the matrix: {what}s {found.min()} to {found.max()} of {size}"
            )


def _rows(folder: Path, shape: tuple[int, int]) -> Rows:
    indptr = np.load(folder / "indptr.npy", mmap_mode="r")
    indices = np.load(folder / "indices.npy", mmap_mode="r") if indptr[-1] else np.empty(0, np.int32)
    data = np.load(folder / "data.npy", mmap_mode="r") if indptr[-1] else np.empty(0, np.float32)

    def read(start: int, stop: int) -> scipy.sparse.csr_matrix:
        here = slice(int(indptr[start]), int(indptr[stop]))
        parts = (np.array(data[here]), np.array(indices[here]), np.asarray(indptr[start : stop + 1]) - indptr[start])
        counts = scipy.sparse.csr_matrix(parts, shape=(stop - start, shape[1]))
        counts.sum_duplicates()
        return counts

    return read
