"""Sources: what can be ingested, one module for each kind, and how a kind is recognised.

Shape letters used in these modules:
    C  cells of a block      F  features as the source has them, in its order
"""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path

from ingest.job import SourceSettings
from ingest.sources.form import SourceDataset
from store.errors import InputRefused, MissingError, UsageError
from store.records import is_local

KINDS = {
    "census": "ingest.sources.census",
    "h5ad": "ingest.sources.h5ad",
    "h5mu": "ingest.sources.h5mu",
    "10x": "ingest.sources.tenx",
    "simulated": "ingest.sources.simulated",
}
KNOWN = (
    "an .h5ad or .h5mu file, a 10x .h5 file, a 10x folder with matrix.mtx(.gz), a Census (its folder, release date or "
    "'stable'), or simulated:"
)


def recognise(uri: str) -> str:
    """Say what kind of source ``uri`` is, from its name and, for a local path, what stands there.

    Raises:
        MissingError: A local path that does not exist; near names are offered.
        InputRefused: It is none of the kinds.
    """
    if uri.startswith("simulated:"):
        return "simulated"
    name = uri.rstrip("/").rsplit("/", 1)[-1].lower()
    if is_local(uri) and (uri in ("stable", "latest") or _is_date(uri)):
        return "census"
    path = Path(uri.removeprefix("file://"))
    if is_local(uri) and not path.exists():
        raise MissingError(f"{uri}: no such file or folder{_near(path)}; a source is {KNOWN}")
    by_name = {".h5ad": "h5ad", ".h5mu": "h5mu", ".h5": "10x"}
    for ending, kind in by_name.items():
        if name.endswith(ending):
            return kind
    if is_local(uri) and path.is_dir():
        if any(path.glob("matrix.mtx*")):
            return "10x"
        if (path / "__tiledb_group.tdb").exists() or (path / "__group").exists():
            return "census"
    elif not is_local(uri) and not Path(name).suffix:
        return "census"
    raise InputRefused(f"{uri}: cannot tell what it is; a source is {KNOWN}; or say it with --set kind=KIND")


def _is_date(text: str) -> bool:
    parts = text.split("-")
    return [len(part) for part in parts] == [4, 2, 2] and all(part.isdigit() for part in parts)


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
    module = import_module(KINDS[kind_of(source)])
    found: list[str] = module.names(source)
    if len(found) > 1 and source.dataset_id:
        raise UsageError(f"{source.uri}: holds {len(found)} datasets, so dataset_id={source.dataset_id!r} fits none")
    return found


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open one dataset of a source for reading; cheap, so that every task opens its own."""
    module = import_module(KINDS[kind_of(source)])
    opened: SourceDataset = module.open_dataset(source, name)
    return opened
