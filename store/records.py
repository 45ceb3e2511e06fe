"""This module writes and reads the lake's small JSON records: each is created once, whole, and never changed.

Creating a record that exists fails, on a local disk (a hard link) and on S3 (a conditional put) alike: this is the only
lock-free primitive that the commit protocol leans on.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import random
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet

from store.errors import StorageError, VerificationError

FOLDER = "somaflow"
MARK = "_mark"


def is_local(uri: str) -> bool:
    """Say whether ``uri`` is a path or ``file://`` URI on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str | Path) -> str:
    """Return a local path as an absolute one, without ``..``, for other processes; other URIs lose a last slash."""
    text = str(uri)
    return os.path.abspath(text.removeprefix("file://")) if is_local(text) else text.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Join path parts below ``uri``."""
    return "/".join([uri.rstrip("/"), *parts])


def create(uri: str, values: dict[str, Any]) -> bool:
    """Write ``values`` to ``uri`` unless something stands there; say whether this call made it.

    When the store applied a request and its reply was lost, the client asks again and is told that something stands
    there: a mark in the record tells whether that is this call's own.

    Raises:
        StorageError: The place cannot be written.
    """
    mark = secrets.token_hex(8)
    data = json.dumps({**values, MARK: mark}).encode()
    try:
        if is_local(uri):
            return _create_local(Path(uri), data)
        _create_far(uri, data)
    except FileExistsError:
        return (_read(uri) or {}).get(MARK) == mark
    except OSError as error:
        raise StorageError(f"{uri}: cannot write: {error}; check that the place exists and may be written") from error
    return True


def _create_far(uri: str, data: bytes) -> None:
    """Create an object; where two requests for one name meet, S3 may answer that they are to try again (HTTP 409)."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    for pause_s in (0.1, 0.2, 0.4, 0.8, None):
        try:
            filesystem.pipe_file(path, data, mode="create")
            return
        except OSError as error:
            if error.errno != errno.EBUSY or pause_s is None:
                raise
            time.sleep(pause_s * random.uniform(0.5, 1.5))


def _create_local(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def replace(uri: str, values: dict[str, Any]) -> None:
    """Write ``values`` to ``uri``, whole, over what stands there."""
    data = json.dumps(values).encode()
    if is_local(uri):
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    else:
        filesystem, path_there = fsspec.core.url_to_fs(uri)
        filesystem.pipe_file(path_there, data)


def read(uri: str) -> dict[str, Any] | None:
    """Read one record; none where there is none.

    Raises:
        VerificationError: It is not whole.
    """
    values = _read(uri)
    return None if values is None else _unmarked(values)


def _unmarked(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != MARK}


def _read(uri: str) -> dict[str, Any] | None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        content = filesystem.cat_file(path)
    except FileNotFoundError:
        return None
    return _parsed(uri, content)


def _parsed(uri: str, content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise VerificationError(f"{uri}: is not whole: {error}; put the file back from a copy") from error


def names(folder: str) -> list[str]:
    """Name what stands in a folder, hidden files left out, in alphabetical order; nothing where there is no folder."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache(path)
    try:
        found = filesystem.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(last for name in found if not (last := name.rstrip("/").rsplit("/", 1)[-1]).startswith("."))


def read_all(folder: str) -> list[dict[str, Any]]:
    """Read every record of a folder in the order of its names."""
    found = read_each([join(folder, name) for name in names(folder) if name.endswith(".json")])
    return [record for record in found if record is not None]


def read_each(uris: Sequence[str]) -> list[dict[str, Any] | None]:
    """Read records that stand in one place of storage, at the same time; none for each that is not there."""
    if not uris:
        return []
    filesystem, paths = fsspec.core.url_to_fs(uris[0])[0], [fsspec.core.url_to_fs(uri)[1] for uri in uris]
    # unlike cat, this takes no path for a pattern
    found = filesystem.cat_ranges(paths, None, None, on_error="return")
    return [_content(uri, content) for uri, content in zip(uris, found, strict=True)]


def _content(uri: str, content: bytes | Exception) -> dict[str, Any] | None:
    if isinstance(content, FileNotFoundError):
        return None
    if isinstance(content, Exception):
        raise content
    return _unmarked(_parsed(uri, content))


def exists(uri: str) -> bool:
    """Say whether a file or folder stands at ``uri``."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()
    return bool(filesystem.exists(path))


def remove(uri: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def remove_each(uris: Sequence[str], *, files: bool) -> None:
    """Remove files, or folders with all that is in them, of one place of storage: on S3 a thousand files a request.

    Those that are gone already do not matter.
    """
    if not uris or is_local(uris[0]):
        for uri in uris:
            remove(uri)
        return
    filesystem = fsspec.core.url_to_fs(uris[0])[0]
    with suppress(FileNotFoundError):
        filesystem.rm([fsspec.core.url_to_fs(uri)[1] for uri in uris], recursive=not files)


def folders(uri: str) -> list[str]:
    """Name the folders in ``uri``, in alphabetical order."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache(path)
    try:
        found = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return []
    return sorted(item["name"].rstrip("/").rsplit("/", 1)[-1] for item in found if item["type"] == "directory")


def newest(folder: str, ending: str = "") -> dt.datetime | None:
    """Return when the newest file of a folder whose name ends so was written (UTC); none where there is none."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    times = [filesystem.modified(join(path, name)) for name in names(folder) if name.endswith(ending)]
    return max(times, default=None)


def write_table(uri: str, table: pa.Table) -> None:
    """Write a Parquet file; one that stands there is replaced."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with filesystem.open(path, "wb") as file:
        pyarrow.parquet.write_table(table, file)


def read_table(uri: str) -> pa.Table:
    """Read a Parquet file."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    with filesystem.open(path, "rb") as file:
        return pyarrow.parquet.read_table(file)
