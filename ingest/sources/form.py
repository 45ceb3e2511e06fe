"""This module is the form that every source takes once it is open: obs, features per measurement, rows of counts."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from ingest.job import SourceSettings
from store.errors import InputRefused, MissingError

Rows = Callable[[int, int], scipy.sparse.csr_matrix]
"""Rows start to stop (exclusive) of a matrix, as the source holds them."""

ENDINGS = (".gz", ".bgz", ".zip", ".tgz", ".tar", ".h5ad", ".h5mu", ".h5", ".zarr", ".loom", ".tsv", ".csv", ".txt")
SIGNED = re.compile(
    r"[?&](?:x-amz-[a-z-]+|x-goog-[a-z-]+|(?:[a-z]+[-_])?signature|sig|(?:[a-z]+[-_])?token|api[-_]?key|password)=",
    re.I,
)
"""Names of what lets whoever holds an address read what is there."""
TAGS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "Content-MD5", "Digest")
"""What file systems and stores call the time of a file, and tags that change with its content."""
UNTAGGED = "untagged:"
NAMELESS = re.compile(
    r"((filtered|raw)_(feature|gene|peak|probe)_bc_matri(x|ces)(_h5|_mex)?|10x|outs|matrix|(atac_)?fragments|"
    r"square_\d+um|binned_outputs)"
)
"""Names that tools give to everything: the folder around one says more."""


@dataclass(frozen=True)
class Part:
    """One measurement of a dataset, features in the source's order.

    Attributes:
        var: One row per feature, indexed by the source's names.
        rows: Reads values; those of a ``value`` layer may be zero or negative, and what is missing is not stored.
        measured_C: Which cells were measured; none means all.
        layer: What the values are, a key of ``store.schema.LAYERS``; none leaves it to the source's settings.
    """

    var: pd.DataFrame
    rows: Rows
    measured_C: NDArray[np.bool_] | None = None
    layer: str | None = None


@dataclass(frozen=True)
class SourceDataset:
    """One dataset of a source, opened; obs and counts are read as they are asked for.

    Attributes:
        read_obs: Reads one row per cell as the source describes it, indexed by the source's names of the cells.
        n_obs: Cells.
        parts: Measurement to its features and counts.
        content: Computes the SHA-256 (hex) over the content.
        info: Provenance for the lake's datasets table.
        sides: Reads tables that no column of the lake can hold, one row per cell, by name.
        origin: Whose next version would replace this one; empty: the source's address.
        notes: What people should know about how it was read.
        matrices: What else could be read in the place of these values, as ``layer`` names it.
    """

    dataset_id: str
    organism: str
    read_obs: Callable[[], pd.DataFrame]
    n_obs: int
    parts: dict[str, Part]
    content: Callable[[], str]
    info: dict[str, str] = field(default_factory=dict)
    sides: dict[str, Callable[[], pd.DataFrame]] = field(default_factory=dict)
    origin: str = ""
    notes: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()

    @cached_property
    def obs(self) -> pd.DataFrame:
        """One row per cell, read once."""
        return self.read_obs()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the content, computed once."""
        return self.content()


def read_obs_table(table: str | BinaryIO, where: str, cells: pd.Index) -> tuple[pd.DataFrame, list[str]]:
    """Read a tab-separated table whose first column names cells, all of it as text: a donor ``01`` stays ``01``.

    Args:
        table: Its address, or the open file.
        where: What messages call it.
        cells: The source's names of its cells.

    Returns:
        One row per cell, in their order, NaN where a field is empty or a cell has no line; and what people should know.

    Raises:
        InputRefused: No such table, a name stands twice in it, or it names none of the cells.
        MissingError: It is not there.
    """
    try:
        if isinstance(table, str):
            with fsspec.open(table, "rb", compression="infer") as file:
                text = file.read().decode("utf-8-sig")
        else:
            text = table.read().decode("utf-8-sig")
        stray = any(line.count('"') % 2 for line in text.splitlines())  # one that opens would join lines
        # a first column that is named as the index would be read as numbers
        lines = pd.read_csv(
            StringIO(text),
            sep="\t",
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            quoting=csv.QUOTE_NONE if stray else csv.QUOTE_MINIMAL,
        )
    except FileNotFoundError:
        raise MissingError(f"{where}: no such table of cells") from None
    except (ValueError, OSError) as error:
        raise InputRefused(f"{where}: not a readable table: {str(error).splitlines()[0]}") from error
    if isinstance(lines.index, pd.RangeIndex):  # as R writes tables, the names of lines have no header
        lines = lines.set_index(lines.columns[0])
    if lines.index.has_duplicates:
        twice = lines.index[lines.index.duplicated()][0]
        raise InputRefused(f"{where}: cell {twice!r} stands in more than one line; leave one")
    without = int((~cells.isin(lines.index)).sum())
    if without == len(cells):
        names = f"{', '.join(map(repr, lines.index[:2]))}, ...) is one of the source ({', '.join(map(repr, cells[:2]))}"
        raise InputRefused(
            f"{where}: none of its cells ({names}, ...); its first column names cells as the source does"
        )
    return lines.reindex(cells), [f"{where}: {without:,} of {len(cells):,} cells have no line"] if without else []


def without_query(uri: str) -> str:
    """Return an address on the web without what follows its path (``?download=1``); others as they are."""
    return uri.split("?", 1)[0] if uri.startswith(("http://", "https://")) else uri


def read_names(file: BinaryIO) -> list[str]:
    """Read the first column of lines that tabs part, without a mark of the encoding and empty lines at the end."""
    return [line.split("\t")[0].strip() for line in file.read().decode("utf-8-sig").rstrip().splitlines()]


def has_ending(uri: str, *endings: str) -> bool:
    """Say whether the name of a file or folder ends so, in capitals too."""
    return without_query(uri).rstrip("/").lower().endswith(endings)


def lasting(uri: str) -> str:
    """Return an address on the web as a lake may keep it: without a password, and without a query that signs it.

    Whoever reads a signature or a token can use it, and the next address of the same file has another one.
    """
    if not uri.startswith(("http://", "https://")):
        return uri
    scheme, _, rest = uri.partition("://")
    place, slash, path = rest.partition("/")
    kept = f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"
    return without_query(kept) if SIGNED.search(kept) else kept


def dataset_name(source: SourceSettings) -> str:
    """Name a dataset after its file: endings go, and names that tools give to everything take the folder's."""
    if source.dataset_id:
        return source.dataset_id
    path = Path(without_query(source.uri).rstrip("/"))
    stem = path.name
    while (ending := next((end for end in ENDINGS if stem.lower().endswith(end)), "")) and len(stem) > len(ending):
        stem = stem[: -len(ending)]
    folder = path.parent
    while NAMELESS.fullmatch(stem.split("-")[0]) and folder.name:
        stem = f"{folder.name}-{stem}"
        folder = folder.parent
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem) or "dataset"


def content_digest(*uris: str) -> str:
    """Return the SHA-256 (hex) of a file, or of all files in folders with their names."""
    total = hashlib.sha256()
    for uri in uris:
        filesystem, path = fsspec.core.url_to_fs(uri)
        names = sorted(filesystem.find(path)) if filesystem.isdir(path) else [path]
        for name in names:
            total.update(name.removeprefix(path).encode() + b"\0")
            with filesystem.open(name, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def fingerprint(uri: str) -> str:
    """Return what changes when a file or folder is written to: sizes, times and the store's own tags of its files.

    Of a file that has neither times nor tags (a server on the web may send none) the content is read, which costs
    time: ``tags`` alone do not say that it is the same.
    """
    found = tags(uri)
    return found if is_tagged(found) else found + content_digest(uri)


def is_tagged(tagged: str) -> bool:
    """Say whether every file has a time or a tag, by its ``tags`` or ``fingerprint``."""
    return not tagged.startswith(UNTAGGED)


def tags(uri: str) -> str:
    """Return a file's or folder's sizes, times and tags (hex), the beginning of its fingerprint; it asks, not reads."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        found = filesystem.find(path, detail=True) if filesystem.isdir(path) else {path: filesystem.info(path)}
    except FileNotFoundError:
        raise MissingError(f"{uri}: no such file or folder") from None
    files = sorted(found.items())
    told = [[name.removeprefix(path), *(str(info.get(key)) for key in ("size", "ino", *TAGS))] for name, info in files]
    untagged = any(all(info.get(key) is None for key in TAGS) for _, info in files)
    return UNTAGGED * untagged + hashlib.sha256(repr(told).encode()).hexdigest()


def changed(uri: str) -> InputRefused:
    """Return the error of a source that somebody writes to."""
    return InputRefused(f"{uri}: changed while it was being read; run the same command again")


def are_levels(source: SourceSettings, measurement: str) -> bool:
    """Say whether a measurement's values are levels, among which zero is one."""
    values = source.values
    return (values.get(measurement) if isinstance(values, dict) else values) == "value"


def memory_rows(matrix: Any) -> Rows:
    """Return the rows of a matrix that is in memory."""
    counts = scipy.sparse.csr_matrix(single(matrix))
    return lambda start, stop: counts[start:stop]


def single(values: Any) -> Any:
    """Return half-precision numbers, which sparse matrices do not know, in single precision; others as they are."""
    return values.astype(np.float32) if getattr(values, "dtype", None) == np.float16 else values


def level_rows(table: Any) -> Rows:
    """Return the rows of a dense table of levels: NaN is missing and not stored, zero is stored."""

    def read(start: int, stop: int) -> scipy.sparse.csr_matrix:
        part = np.asarray(table[start:stop], dtype=np.float64)
        row, column = np.nonzero(~np.isnan(part))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=stop - start))])
        return scipy.sparse.csr_matrix((part[row, column], column, indptr), shape=part.shape)

    return read


def chosen_columns(rows: Rows, columns: NDArray[np.int64], n_all: int) -> Rows:
    """Return rows of some of the columns."""
    if len(columns) == n_all:
        return rows
    return lambda start, stop: rows(start, stop)[:, columns]


GENES = "gene expression"
MEASUREMENT_OF = {
    GENES: "RNA",
    "antibody capture": "protein",
    "peaks": "ATAC",
    "crispr guide capture": "guide",
}
"""What features of 10x's types measure."""


def feature_types_to_measurements(types: pd.Series) -> dict[str, NDArray[np.int64]]:
    """Split 10x features by their type: measurement to column positions; unknown types are left out.

    What has no type is a gene: a table joined from several lacks the types of some.
    """
    lowered = types.astype(object).where(types.notna(), GENES).astype(str).str.lower()
    split = {name: np.flatnonzero((lowered == kind).to_numpy()) for kind, name in MEASUREMENT_OF.items()}
    return {name: columns for name, columns in split.items() if len(columns)}


def types_left_out(types: pd.Series) -> tuple[str, ...]:
    """Say which features of 10x have no place in the lake."""
    said = types.dropna().astype(str)
    nameless = len(types) - len(said)
    notes = (f"{nameless:,} features without a type are taken for genes",) if 0 < nameless < len(types) else ()
    left = said[~said.str.lower().isin(list(MEASUREMENT_OF))].value_counts()
    if left.empty or len(types) == left.sum():
        return notes
    return (*notes, f"features left out: {', '.join(f'{n:,} of type {str(name)!r}' for name, n in left.items())}")
