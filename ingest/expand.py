"""This module turns what a user names (a folder of files, a glob, a manifest) into single sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pandas as pd

from ingest.job import FILES, SourceSettings
from ingest.sources import KNOWN, is_census_name, is_dataset_folder, kind_by_name, recognise
from ingest.sources.form import without_query
from store.errors import InputRefused, MissingError, UsageError
from store.records import absolute, is_local
from store.settings import parse_settings

MANIFESTS = (".tsv", ".csv", ".parquet")
DEEPEST = 6
"""So many folders are looked at below one, and so many manifests may list each other."""


@dataclass
class Expanded:
    """What a user's address stands for.

    Attributes:
        sources: Single sources, in the order of their names.
        passed: Files beside them that are of no kind that can be ingested.
    """

    sources: list[SourceSettings]
    passed: list[str] = field(default_factory=list)


def expand(source: SourceSettings, schemes: Sequence[str], listed_in: tuple[str, ...] = ()) -> Expanded:
    """Find the single sources that ``source`` stands for; local paths become absolute, for workers stand elsewhere.

    Raises:
        UsageError: An address of a kind that the job does not allow, or with a password in it; a setting that fits one
            dataset only beside several.
        MissingError: Nothing is there.
        InputRefused: A manifest that is none, or that lists itself.
    """
    source = _placed(source)
    allow(source, schemes)
    uri = source.uri
    if source.kind is not None or uri.startswith("simulated:") or (is_local(uri) and is_census_name(uri)):
        return Expanded([source])
    if _is_pattern(uri):
        return _each(source, schemes, *_matching(uri))
    if without_query(uri).lower().endswith(MANIFESTS) and (rows := _manifest(uri)) is not None:
        found, chain = Expanded([]), (*listed_in, uri)
        if uri in listed_in or len(listed_in) == DEEPEST:
            raise InputRefused(
                f"{uri}: manifests list each other, or lie more than {DEEPEST} deep ({' > '.join(chain)}); list the "
                "sources themselves"
            )
        for row in rows:
            listed = parse_settings(SourceSettings, _merged(source, row), where=f"{uri}: {row['uri']}")
            one = expand(listed, schemes, chain)
            found.sources += one.sources
            found.passed += one.passed
        return found
    if kind_by_name(uri) or (is_local(uri) and not _is_folder(uri)):
        recognise(uri)
        return Expanded([source])
    if _is_folder(uri) and not is_dataset_folder(uri):
        below, passed = _below(uri, DEEPEST)
        if not below:
            raise MissingError(f"{uri}: holds nothing that can be ingested; a source is {KNOWN}")
        return _each(source, schemes, below, passed)
    return Expanded([source])


def _placed(source: SourceSettings) -> SourceSettings:
    """Make the local paths of a source absolute."""
    given = {key: getattr(source, key) for key in ("uri", *FILES, "truth")}
    local = {key: path for key, path in given.items() if path and _scheme(path) == "file"}
    return source.model_copy(update={key: absolute(os.path.expanduser(path)) for key, path in local.items()})


def allow(source: SourceSettings, schemes: Sequence[str]) -> None:
    """Refuse addresses of other kinds than ``schemes``.

    Raises:
        UsageError: The address is of another kind, is a chain of them, or carries a password.
    """
    addresses = [source.uri, *(getattr(source, key) for key in FILES)]
    for address in filter(None, addresses):
        if "::" in address:
            raise UsageError(
                f"{_bare(address)}: '::' is read as a chain of places, which is not allowed; rename a file or folder "
                "that has it in its name, and write %3A%3A in an address on the web"
            )
        scheme = _scheme(address)
        if scheme not in schemes:
            raise UsageError(
                f"{_bare(address)}: addresses of kind {scheme!r} are not allowed here; allowed: {', '.join(schemes)} "
                "(the job's key 'schemes')"
            )
        if scheme != "simulated" and urlsplit(address).password is not None:
            raise UsageError(f"{_bare(address)}: holds a password; credentials come from the environment only")


def _scheme(address: str) -> str:
    if address.startswith("simulated:"):
        return "simulated"
    if "://" not in address:
        return "census" if is_census_name(address) else "file"
    return address.split("://", 1)[0].lower()


def _bare(address: str) -> str:
    """Return an address without the part that may be secret."""
    head, sign, rest = address.partition("://")
    return f"{head}://{rest.rpartition('@')[2]}" if sign else address


def _each(source: SourceSettings, schemes: Sequence[str], uris: list[str], passed: list[str]) -> Expanded:
    if source.dataset_id and len(uris) > 1:
        raise UsageError(f"{source.uri}: holds {len(uris)} sources, so dataset_id={source.dataset_id!r} fits none")
    sources = [source.model_copy(update={"uri": uri}) for uri in uris]
    for one in sources:
        allow(one, schemes)
    return Expanded(sources, passed)


def _is_pattern(uri: str) -> bool:
    """Say whether an address is a glob; a file may have such signs in its name, and an address on the web a query."""
    if is_local(uri) and os.path.exists(uri):
        return False
    return any(sign in without_query(uri) for sign in "*?[")


def _is_folder(uri: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return bool(filesystem.isdir(path))


def _matching(pattern: str) -> tuple[list[str], list[str]]:
    filesystem, path = fsspec.core.url_to_fs(pattern)
    found = sorted(name for name in filesystem.glob(path) if not name.rsplit("/", 1)[-1].startswith("."))
    uris = [_address(filesystem, name, pattern) for name in found]
    known = [uri for uri in uris if _known(uri)]
    if not known:
        raise MissingError(f"{pattern}: {'matches nothing' if not found else 'matches nothing that can be ingested'}")
    of_known = set(known)
    return known, [uri for uri in uris if uri not in of_known]


def _address(filesystem: Any, name: str, like: str) -> str:
    return name if "://" not in like else str(filesystem.unstrip_protocol(name))


def _known(uri: str) -> bool:
    try:
        recognise(uri)
    except (InputRefused, MissingError):
        return False
    return True


def _below(folder: str, depth: int) -> tuple[list[str], list[str]]:
    """Return the datasets in a folder and its folders, and files beside them.

    What is inside a dataset's folder is not looked at.
    """
    filesystem, path = fsspec.core.url_to_fs(folder)
    found, passed = list[str](), list[str]()
    for item in sorted(filesystem.ls(path, detail=True), key=lambda item: str(item["name"])):
        uri = _address(filesystem, item["name"].rstrip("/"), folder)
        if uri.rsplit("/", 1)[-1].startswith("."):
            continue
        if _known(uri):
            found.append(uri)
        elif item["type"] != "directory":
            passed.append(uri)
        elif depth > 0:
            deeper = _below(uri, depth - 1)
            found += deeper[0]
            passed += deeper[1]
    return found, passed


def _manifest(uri: str) -> list[dict[str, Any]] | None:
    """Read a manifest's rows; none when the table has no column ``uri`` and so is something else."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        if uri.lower().endswith(".parquet"):
            table = pd.read_parquet(BytesIO(filesystem.cat_file(path)))
        else:
            separator = "\t" if uri.lower().endswith(".tsv") else ","
            with filesystem.open(path, "rb") as file:
                header = file.readline().decode("utf-8-sig", errors="replace").strip().split(separator)
                if "uri" not in [name.strip('"') for name in header]:
                    return None
                file.seek(0)
                # Excel begins with a mark of the encoding
                table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
                table = table.drop(columns="Unnamed: 0", errors="ignore")  # R's numbers of lines
    except FileNotFoundError:
        raise MissingError(f"{uri}: no such file") from None
    except (ValueError, OSError) as error:
        raise InputRefused(f"{uri}: not a readable manifest: {error}") from error
    if "uri" not in table:
        return None
    base = uri.rsplit("/", 1)[0] if "/" in uri else "."
    rows = []
    for row in table.to_dict("records"):
        filled = {str(key): value for key, value in row.items() if value is not None and str(value) != ""}
        for key in ("uri", *FILES):
            address = filled.get(key, "")
            if address and not address.startswith("/") and ":" not in address:
                filled[key] = f"{base}/{address}"
        rows.append(filled)
    if not rows:
        raise InputRefused(f"{uri}: the manifest lists nothing")
    return rows


def _merged(source: SourceSettings, row: dict[str, Any]) -> dict[str, Any]:
    """Lay a manifest's row (``obs.tissue`` sets a key of a section) over the settings that hold for all of them."""
    merged: dict[str, Any] = source.model_dump(exclude_unset=True)
    for key, value in row.items():
        section, _, name = key.partition(".")
        if name:
            merged[section] = {**merged.get(section, {}), name: value}
        else:
            merged[key] = value
    return merged
