"""Sources: what can be ingested, one module for each kind, and how a kind is recognised.

Shape letters used in these modules:
    C  cells of a block      F  features as the source has them, in its order
"""

from __future__ import annotations

import difflib
import re
from importlib import import_module
from pathlib import Path

import fsspec

from ingest.job import SourceSettings
from ingest.sources.form import SourceDataset, dataset_name, has_ending, without_query
from store.errors import InputRefused, MissingError, StorageError, UsageError
from store.records import is_local

KINDS = {
    "census": "ingest.sources.census",
    "h5ad": "ingest.sources.h5ad",
    "zarr": "ingest.sources.h5ad",
    "h5mu": "ingest.sources.h5mu",
    "10x": "ingest.sources.tenx",
    "loom": "ingest.sources.loom",
    "fragments": "ingest.sources.fragments",
    "visium": "ingest.sources.visium",
    "table": "ingest.sources.table",
    "isatab": "ingest.sources.isatab",
    "simulated": "ingest.sources.simulated",
}
SEVERAL = ("census", "simulated", "isatab")
"""Kinds whose module says itself which datasets are in a source."""

KNOWN = (
    "an .h5ad, .zarr, .h5mu or .loom file, a 10x .h5 file, folder or .tar.gz with matrix.mtx(.gz), a fragments.tsv"
    "(.gz), a Visium or ISA-Tab folder, a table (kind=table), a Census (folder, date or 'stable'), or simulated:"
)
BY_NAME = (
    (r"\.h5ad$", "h5ad"),
    (r"\.zarr(\.zip)?$", "zarr"),
    (r"\.h5mu$", "h5mu"),
    (r"\.loom$", "loom"),
    (r"\.h5$", "10x"),
    (r"fragments.*\.tsv(\.b?gz)?$", "fragments"),
    (r"\.(tar|tar\.gz|tgz)$", "10x"),
)


def recognise(uri: str) -> str:
    """Say what kind of source ``uri`` is, from its name and, for a folder, what stands in it.

    Raises:
        MissingError: A local path that does not exist; near names are offered.
        InputRefused: It is none of the kinds.
    """
    if uri.startswith("simulated:"):
        return "simulated"
    if is_local(uri) and is_census_name(uri):
        return "census"
    path = Path(uri.removeprefix("file://"))
    if is_local(uri) and not path.exists():
        raise MissingError(f"{uri}: no such file or folder{_near(path)}; a source is {KNOWN}")
    kind = kind_by_name(uri) or folder_kind(uri)
    if kind:
        return kind
    if not is_local(uri) and not Path(uri.rstrip("/")).suffix:
        return "census"
    raise InputRefused(f"{uri}: cannot tell what it is; a source is {KNOWN}; or say it with --set kind=KIND")


def kind_by_name(uri: str) -> str:
    """Say what kind of file ``uri`` is by its name alone; empty when that does not tell. No store is asked."""
    name = without_query(uri).rstrip("/").rsplit("/", 1)[-1].lower()
    return next((kind for pattern, kind in BY_NAME if re.search(pattern, name)), "")


def folder_kind(uri: str) -> str:
    """Say what kind of dataset a folder is; empty when it is none."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        there = {name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except Exception as error:
        raise StorageError(f"{uri}: cannot be looked at: {type(error).__name__}: {error}") from error
    there.discard(path.rstrip("/").rsplit("/", 1)[-1])
    if there & {"matrix.mtx", "matrix.mtx.gz"}:
        return "10x"
    if "spatial" in there and any(re.search(r"feature_bc_matrix", name) for name in there):
        return "visium"
    if any(re.fullmatch(r"i_.*\.txt", name) for name in there):
        return "isatab"
    if there & {"__tiledb_group.tdb", "__group"}:
        return "census"
    return "zarr" if there & {"zarr.json", ".zgroup"} else ""


def is_dataset_folder(uri: str) -> bool:
    """Say whether a folder is one source, not a folder of sources."""
    return has_ending(uri, ".zarr") or bool(folder_kind(uri))


def is_census_name(text: str) -> bool:
    """Say whether a word names a release of the CELLxGENE Census."""
    return bool(re.fullmatch(r"stable|latest|\d{4}-\d{2}-\d{2}", text))


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def kind_of(source: SourceSettings) -> str:
    """Return the source's kind, as given or recognised."""
    return source.kind or recognise(source.uri)


def names(source: SourceSettings) -> list[str]:
    """Name the datasets in a source: one, or all of a Census."""
    kind = kind_of(source)
    if kind not in SEVERAL:
        return [dataset_name(source)]
    found: list[str] = import_module(KINDS[kind]).names(source)
    if len(found) > 1 and source.dataset_id:
        raise UsageError(f"{source.uri}: holds {len(found)} datasets, so dataset_id={source.dataset_id!r} fits none")
    return found


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open one dataset of a source for reading; cheap, so that every task opens its own."""
    module = import_module(KINDS[kind_of(source)])
    opened: SourceDataset = module.open_dataset(source, name)
    return opened
