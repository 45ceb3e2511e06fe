"""This module writes and reads the lake's small JSON records: each is created once, whole, and never changed.

Creating a record that exists fails, on a local disk (a hard link) and on S3 (a conditional put) alike: this is the only
lock-free primitive that the commit protocol leans on.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet
from botocore.exceptions import BotoCoreError, ClientError

from store.errors import SettingsError, StorageError, UsageError, VerificationError

T = TypeVar("T")

FOLDER = "somaflow"
MARK = "_mark"
REMOVED_AT_ONCE = 1000
"""Keys that S3 removes in one request."""
ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError)
"""What a store says of a place that it can look at."""
FAILURES = (OSError, BotoCoreError, ClientError)
"""What a disk or a store raises that cannot."""


def is_local(uri: str) -> bool:
    """Say whether ``uri`` is a path or ``file://`` URI on this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def is_s3(uri: str) -> bool:
    """Say whether ``uri`` lies on S3 or a server that speaks its protocol."""
    return uri.startswith("s3://")


def absolute(uri: str | Path) -> str:
    """Return a local path as an absolute one, without ``..``, for other processes.

    Other URIs lose a last slash, and have their scheme as TileDB knows it: ``S3://`` and ``s3a://`` are ``s3://``.
    """
    scheme, sign, rest = str(uri).partition("://")
    if not sign:
        return os.path.abspath(uri)
    scheme = scheme.lower()
    if scheme == "file":
        return os.path.abspath(rest)
    return f"{'s3' if scheme == 's3a' else scheme}://{rest.rstrip('/')}"


def s3_endpoint() -> str:
    """Return the address of the S3 server that the environment names; empty where it names none.

    Raises:
        SettingsError: It is no address.
    """
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if endpoint := os.environ.get(name):
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise SettingsError(
                    f"{name}={endpoint!r}: is no address of a server; it begins with http:// or https://"
                )
            return endpoint
    return ""


def join(uri: str, *parts: str) -> str:
    """Join path parts below ``uri``."""
    return "/".join([uri.rstrip("/"), *parts])


@contextmanager
def _reached(uri: str, what: str = "read") -> Iterator[tuple[Any, str]]:
    """Give the file system of ``uri`` and its path there; that it cannot be reached, or refuses, is a StorageError.

    What it says of the place itself, as that nothing stands there, is left to the block, but where it is ``written``.
    """
    if is_s3(uri):
        s3_endpoint()
    try:
        yield _split(uri)
    except StorageError:
        raise
    except FAILURES as error:
        if isinstance(error, ANSWERS) and what != "written":
            raise
        remedy = "check the place and your rights to it"
        if not is_local(uri):
            remedy += ", its server (AWS_ENDPOINT_URL) and the credentials of the environment"
        reason = told(error)
        raise StorageError(f"{uri}: cannot be {what}: {reason}; {remedy}, and run the same command again") from error


def told(error: BaseException) -> str:
    """Return what a disk or store says of its failure, with the HTTP status and S3's name for it where it has some."""
    answer = _answer(error)
    if not answer:
        return str(error) or type(error).__name__
    status, name = str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", "")), answer["Error"].get("Code", "")
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # its errno is a guess
    return f"HTTP {' '.join(dict.fromkeys(filter(None, (status, name))))}: {words}"


def _answer(error: BaseException) -> dict[str, Any]:
    """Return what S3 answered, of an error of its client or of s3fs, which turns some of them into another's; or {}."""
    found = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return found if isinstance(found, dict) and "Error" in found else {}


def _split(uri: str) -> tuple[Any, str]:
    if "::" in uri:
        raise UsageError(f"{uri}: fsspec reads '::' as a chain of places; choose a path without it")
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:  # a protocol that fsspec does not know, or not without a package
        raise UsageError(f"{uri}: no such kind of place: {error}; say a folder or s3://BUCKET/PATH") from error
    return filesystem, path


def create(uri: str, values: dict[str, Any]) -> bool:
    """Write ``values`` to ``uri`` unless something stands there; say whether this call made it.

    When the store applied a request and its reply was lost, the client asks again and is told that something stands
    there, or it fails: a mark in the record tells whether that is this call's own.

    Raises:
        StorageError: The place cannot be written; a request that is still on its way may yet arrive.
    """
    mark = secrets.token_hex(8)
    data = json.dumps({**values, MARK: mark}).encode()
    try:
        if is_local(uri):
            return _create_local(Path(uri), data)
        _create_far(uri, data)
    except FileExistsError:
        return (_read(uri) or {}).get(MARK) == mark
    except FAILURES as error:
        with suppress(StorageError):
            if (standing := _read(uri)) is not None:
                return standing.get(MARK) == mark
        reason = told(error)
        raise StorageError(f"{uri}: cannot write: {reason}; check that the place exists and may be written") from error
    return True


def _create_far(uri: str, data: bytes) -> None:
    """Create an object; where two requests for one name meet, S3 may answer that they are to try again (HTTP 409)."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    for pause_s in (0.1, 0.2, 0.4, 0.8, None):
        try:
            filesystem.pipe_file(path, data, mode="create")
            return
        except OSError as error:
            if not _met_another(error) or pause_s is None:
                raise
            time.sleep(pause_s * random.uniform(0.5, 1.5))


def _met_another(error: OSError) -> bool:
    """Say whether s3fs tells of HTTP 409; its errno of that stands for 503 too, which was tried often enough."""
    return bool(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == 409)


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
    """Write ``values`` to ``uri``, whole, over what stands there.

    Raises:
        StorageError: The place cannot be written.
    """
    data = json.dumps(values).encode()
    with _reached(uri, "written") as (filesystem, path_there):
        if is_local(uri):
            _replace_local(Path(uri), data)
        else:
            filesystem.pipe_file(path_there, data)


def _replace_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def typed(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """Return the values of a record as an object of its (data) class.

    Raises:
        StorageError: It tells what the class does not know.
    """
    unknown = sorted(set(values) - {field.name for field in fields(cast(Any, kind))})
    if unknown:
        raise StorageError(f"{what} tells {unknown[0]!r}: a newer version of somaflow made it; use that one")
    return kind(**values)


def read(uri: str) -> dict[str, Any] | None:
    """Read one record; none where there is none.

    Raises:
        StorageError: The store cannot be reached, or refuses.
        VerificationError: It is not whole.
    """
    values = _read(uri)
    return None if values is None else _unmarked(values)


def _unmarked(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != MARK}


def _read(uri: str) -> dict[str, Any] | None:
    try:
        with _reached(uri) as (filesystem, path):
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
    found = (name.rstrip("/").rsplit("/", 1)[-1] for name in _listed(folder, detail=False))
    return sorted(name for name in found if not name.startswith("."))


def _listed(folder: str, *, detail: bool) -> list[Any]:
    try:
        with _reached(folder) as (filesystem, path):
            filesystem.invalidate_cache(path)
            return list(filesystem.ls(path, detail=detail))
    except FileNotFoundError:
        return []


def read_all(folder: str) -> list[dict[str, Any]]:
    """Read every record of a folder in the order of its names."""
    found = read_each([join(folder, name) for name in names(folder) if name.endswith(".json")])
    return [record for record in found if record is not None]


def read_each(uris: Sequence[str]) -> list[dict[str, Any] | None]:
    """Read records that stand in one place of storage, at the same time; none for each that is not there."""
    if not uris:
        return []
    with _reached(uris[0]) as (filesystem, _):
        # unlike cat, this takes no path for a pattern
        found = filesystem.cat_ranges([_split(uri)[1] for uri in uris], None, None, on_error="return")
    return [_content(uri, content) for uri, content in zip(uris, found, strict=True)]


def _content(uri: str, content: bytes | Exception) -> dict[str, Any] | None:
    if isinstance(content, FileNotFoundError):
        return None
    if isinstance(content, Exception):
        with _reached(uri):
            raise content
    return _unmarked(_parsed(uri, content))


def exists(uri: str) -> bool:
    """Say whether a file or folder stands at ``uri``."""
    with _reached(uri) as (filesystem, path):
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))


def remove(uri: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none."""
    remove_each([uri], files=False)


def remove_each(uris: Sequence[str], *, files: bool) -> None:
    """Remove files, or folders with all that is in them, of one place of storage: on S3 a thousand files a request.

    Those that are gone already do not matter. Nothing else goes: no path is taken for a pattern, as fsspec's ``rm``
    would (``a*b`` is not ``aXb``), and a folder is no beginning of a name (``a`` is not ``ab``).
    """
    if not uris:
        return
    with _reached(uris[0], "removed") as (filesystem, _):
        paths = [_split(uri)[1] for uri in uris]
        if is_local(uris[0]):
            for path in filter(filesystem.exists, paths):
                filesystem.rm(path, recursive=True)  # the only one that takes no patterns
            return
        if not files:
            filesystem.invalidate_cache()
            paths = [found for path in paths for found in filesystem.find(path)]
        if is_s3(uris[0]):
            _remove_keys(filesystem, paths)
        else:
            for path in paths:
                with suppress(FileNotFoundError):
                    filesystem.rm_file(path)


def _remove_keys(filesystem: Any, paths: list[str]) -> None:
    """Remove objects of one bucket; s3fs's own call is silent about those that S3 refuses to remove."""

    def remove_some(start: int) -> None:
        some = [filesystem.split_path(path) for path in paths[start : start + REMOVED_AT_ONCE]]
        told = {"Objects": [{"Key": key} for _, key, _ in some], "Quiet": True}
        for refused in filesystem.call_s3("delete_objects", Bucket=some[0][0], Delete=told).get("Errors", ()):
            raise OSError(f"{refused.get('Key')}: {refused.get('Message') or refused.get('Code')}")

    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(remove_some, range(0, len(paths), REMOVED_AT_ONCE)):
            pass
    filesystem.invalidate_cache()


def folders(uri: str) -> list[str]:
    """Name the folders in ``uri``, in alphabetical order."""
    found = [item["name"] for item in _listed(uri, detail=True) if item["type"] == "directory"]
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def newest(folder: str, ending: str = "") -> dt.datetime | None:
    """Return when the newest file of a folder whose name ends so was written (UTC); none where there is none."""
    with _reached(folder) as (filesystem, path):
        times = [filesystem.modified(join(path, name)) for name in names(folder) if name.endswith(ending)]
    return max(times, default=None)


def write_table(uri: str, table: pa.Table) -> None:
    """Write a Parquet file; one that stands there is replaced.

    Raises:
        StorageError: The place cannot be written.
    """
    with _reached(uri, "written") as (filesystem, path):
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with filesystem.open(path, "wb") as file:
            pyarrow.parquet.write_table(table, file)


def read_table(uri: str) -> pa.Table:
    """Read a Parquet file.

    Raises:
        FileNotFoundError: There is none.
        StorageError: The store cannot be reached, or refuses.
        VerificationError: It is not whole.
    """
    try:
        with _reached(uri) as (filesystem, path), filesystem.open(path, "rb") as file:
            return pyarrow.parquet.read_table(file)
    except pa.ArrowInvalid as error:
        raise VerificationError(f"{uri}: is not whole: {error}; put the file back from a copy") from error
