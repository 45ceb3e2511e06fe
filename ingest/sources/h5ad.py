"""This module reads AnnData files (h5ad and zarr) row block by row block, without loading their matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import anndata.io
import fsspec
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

from ingest.chunks import check_zarr, stored_files
from ingest.job import SourceSettings
from ingest.preflight import refuse_links_out
from ingest.sources.form import (
    Part,
    Rows,
    SourceDataset,
    are_levels,
    chosen_columns,
    content_digest,
    dataset_name,
    feature_types_to_measurements,
    fingerprint,
    has_ending,
    level_rows,
    memory_rows,
    single,
    types_left_out,
    without_query,
)
from ingest.turn import PART, Coordinates, downloaded, turned
from store.errors import InputRefused
from store.hdf5 import check_hdf5
from store.records import is_local
from store.schema import ORGANISMS

PROTEIN_TABLES = ("protein_expression", "protein_counts", "protein", "ADT", "adt")
"""obsm entries that hold antibody counts, by custom; their names stand in ``uns['protein_names']`` or the table."""

SIDE_COLUMNS = 512
"""obsm tables up to this width are kept beside the lake's obs."""


def names(source: SourceSettings) -> list[str]:
    """A file is one dataset."""
    return [dataset_name(source)]


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a file; it stays open as long as the dataset is in use.

    A file of CELLxGENE Discover (``uns['schema_version']``) says its organism, and its counts are ``raw.X`` if it
    has one.

    Raises:
        InputRefused: Not an AnnData file, or it lacks the matrix that the source names.
    """
    notes = list[str]()
    file = open_group(source.uri, notes)
    layer = source.layer
    published = str(read(file["uns/schema_version"])) if "uns/schema_version" in file else ""
    if published:
        notes.append(f"CELLxGENE schema {published}")
        layer = layer or ("raw" if "raw/X" in file else "")
    var, rows_if = named_matrix(file, source.uri, layer, [source.uri, fingerprint(source.uri)])
    if "feature_types" in var and source.measurement == "RNA":
        split = feature_types_to_measurements(var["feature_types"]) or {"RNA": np.arange(len(var))}
        notes += types_left_out(var["feature_types"])
    else:
        split = {source.measurement: np.arange(len(var))}
    parts = {
        measurement: Part(
            var.iloc[columns], chosen_columns(rows_if(are_levels(source, measurement)), columns, len(var))
        )
        for measurement, columns in split.items()
    }
    n_obs = table_length(file, "obs", source.uri)
    proteins, used = _proteins(file, n_obs, source)
    sides = _sides(file, n_obs, used)
    notes += _left_out(file, sides, used)
    return SourceDataset(
        dataset_id=name,
        organism=_organism(file, source),
        read_obs=lambda: _with_places(read_table(file, "obs", source.uri), file),
        n_obs=n_obs,
        parts=parts | proteins,
        content=lambda: content_digest(source.uri),
        info={
            "dataset_title": source.title or _text_at(file, "uns/title"),
            "citation": _text_at(file, "uns/citation"),
            "dataset_h5ad_path": without_query(source.uri).rstrip("/").rsplit("/", 1)[-1],
        },
        sides=sides,
        notes=tuple(notes),
        matrices=tuple(name for name in matrices(file) if name != layer),
    )


def open_group(uri: str, notes: list[str] | None = None) -> Any:
    """Open an HDF5 file or a zarr group for reading, also one behind a URI; ``notes`` takes what people should know.

    Raises:
        InputRefused: It cannot be read, reaches outside itself, or holds matrices that are none.
    """
    if has_ending(uri, ".zarr", ".zarr.zip"):
        return _open_zarr(uri, [] if notes is None else notes)
    try:
        # no lock: whoever owns the file may write to it at any time, and a change is noticed by its fingerprint
        if is_local(uri):
            file = h5py.File(uri.removeprefix("file://"), "r", locking=False)
        else:
            opened = fsspec.open(uri, "rb").open()
            if getattr(opened, "size", 0) is None:  # a server packs it, or sends it as a whole only
                opened.close()
                opened = downloaded(uri)
            file = h5py.File(opened, "r")
    except OSError as error:
        raise InputRefused(f"{uri}: not a readable HDF5 file: {error}") from error
    check_hdf5(file, uri)
    return file


def _open_zarr(uri: str, notes: list[str]) -> Any:
    import zarr

    refuse_links_out(uri)
    root: Any
    zipped = downloaded(uri) if has_ending(uri, ".zip") else None
    try:
        # consolidated metadata is read whole: one strange member of uns would make the file unreadable
        store = zarr.storage.ZipStore(zipped, mode="r") if zipped else uri.removeprefix("file://")
        root = zarr.open_group(store, mode="r", use_consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputRefused(f"{uri}: not a readable zarr group: {error}") from error
    notes += check_zarr(root, stored_files(uri, archive=str(zipped or "")), uri)
    if "obs" not in root:
        inner = [key for key in root if "obs" in root[key]]
        if len(inner) == 1:
            return root[inner[0]]
    return root


def read(element: Any) -> Any:
    """Read one element of an AnnData file."""
    return anndata.io.read_elem(element)


def _text_at(file: Any, key: str) -> str:
    return str(read(file[key])) if key in file else ""


def _organism(file: Any, source: SourceSettings) -> str:
    """Return the organism that the source's settings or, for a CELLxGENE file, the file names."""
    if "organism" in source.model_fields_set:
        return source.organism
    term = _text_at(file, "uns/organism_ontology_term_id")
    if not term and "obs/organism_ontology_term_id/categories" in file:
        terms = [_text(value) for value in np.atleast_1d(read(file["obs/organism_ontology_term_id/categories"]))]
        if len(terms) > 1:
            raise InputRefused(f"{source.uri}: holds cells of {', '.join(terms)}; split it by organism first")
        term = terms[0]
    known = {taxon: name for name, (taxon, _) in ORGANISMS.items()}
    if term and term not in known:
        raise InputRefused(f"{source.uri}: unknown organism {term}; known: {', '.join(known)}")
    return known.get(term, source.organism)


def table_length(group: Any, key: str, where: str) -> int:
    """Count the rows of obs or var without reading them."""
    if key not in group:
        raise InputRefused(f"{where}: has no {key!r}; is it an AnnData file?")
    element = group[key]
    if is_array(element):
        return int(element.shape[0])
    index = element.attrs.get("_index", "_index")
    return int(element[_text(index)].shape[0])


def is_array(element: Any) -> bool:
    """Say whether an element of a file is an array, not a group."""
    return hasattr(element, "shape") and not hasattr(element, "keys")


def read_table(group: Any, key: str, where: str) -> pd.DataFrame:
    """Read obs or var, also as AnnData before 0.7 wrote them."""
    if key not in group:
        raise InputRefused(f"{where}: has no {key!r}; is it an AnnData file?")
    element = group[key]
    if is_array(element):
        records = pd.DataFrame.from_records(element[()])
        index = "index" if "index" in records else records.columns[0]
        table = records.set_index(index)
        table.index = pd.Index([_text(name) for name in table.index])
        for column in table:
            if f"uns/{column}_categories" in group:
                names = [_text(name) for name in np.atleast_1d(group[f"uns/{column}_categories"][()])]
                table[column] = np.array([*names, ""], dtype=object)[table[column].to_numpy(dtype=int)]
            elif table[column].dtype.kind in "OS":
                table[column] = [_text(value) for value in table[column]]
    else:
        table = read(element)
    table.index = table.index.astype(str)
    return pd.DataFrame(table)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def named_matrix(file: Any, where: str, layer: str, identity: list[str]) -> tuple[pd.DataFrame, Callable[[bool], Rows]]:
    """Return var, and the rows of its matrix as those of levels or not.

    Args:
        file: An AnnData file, or the group of one.
        where: What messages call it.
        layer: Empty for X, ``raw``, or a layer's name.
        identity: What tells this version of the file from others.

    Raises:
        InputRefused: It has no such matrix.
    """
    var_key, key = "var", {"": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if layer == "raw":
        var_key = "raw/var"
        if "raw" not in file and "raw.X" in file:
            var_key, key = "raw.var", "raw.X"
    if key not in file:
        known = [f"layer={name}" for name in matrices(file)] + ["X (no layer)"] * ("X" in file)
        raise InputRefused(f"{where}: has no matrix {key}; it has {', '.join(known) or 'none'}")
    rows_if = cache(partial(matrix_rows, file[key], f"{where}: {key}", identity))
    return read_table(file, var_key, where), rows_if


def matrices(file: Any) -> list[str]:
    """Name the matrices of a file beside X as ``layer`` does."""
    raw = ["raw"] if "raw/X" in file or "raw.X" in file else []
    return [*raw, *(str(name) for name in file.get("layers", ()))]


def matrix_rows(element: Any, where: str, identity: list[str], levels: bool = False) -> Rows:
    """Return a reader of row blocks; a matrix that is stored by columns is turned once, on disk.

    Args:
        element: A dataset or group of an open file.
        where: The matrix's name in messages.
        identity: What tells this version of the file from others.
        levels: A zero in a dense matrix is a level, and NaN is missing.
    """
    if is_array(element):
        if element.ndim != 2:
            raise InputRefused(f"{where}: is not a matrix (shape {element.shape})")
        if levels:
            return level_rows(element)
        return lambda start, stop: scipy.sparse.csr_matrix(single(element[start:stop]))
    if not hasattr(element, "keys"):
        raise InputRefused(f"{where}: holds no matrix")
    form = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "")))
    shape = tuple(int(size) for size in element.attrs.get("shape", element.attrs.get("h5sparse_shape", ())))
    if not any(known in form for known in ("csr", "csc")) or len(shape) != 2:
        raise InputRefused(f"{where}: unknown form of matrix {form!r}; csr, csc and dense are known")
    if "csc" in form:
        return turned([*identity, where], (shape[0], shape[1]), lambda: _columns_first(element))
    return compressed_rows(element, shape[1])


def compressed_rows(element: Any, n_columns: int) -> Rows:
    """Return the rows of a group with ``data``, ``indices`` and ``indptr``."""
    indptr = np.asarray(element["indptr"][:], dtype=np.int64)

    def read_rows(start: int, stop: int) -> scipy.sparse.csr_matrix:
        here = slice(int(indptr[start]), int(indptr[stop]))
        parts = (single(element["data"][here]), element["indices"][here], indptr[start : stop + 1] - indptr[start])
        return scipy.sparse.csr_matrix(parts, shape=(stop - start, n_columns))

    return read_rows


def _columns_first(element: Any) -> Iterator[Coordinates]:
    indptr = np.asarray(element["indptr"][:], dtype=np.int64)
    first = 0
    while first < len(indptr) - 1:
        last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + PART, side="right")) - 1)
        here = slice(int(indptr[first]), int(indptr[last]))
        columns = np.repeat(np.arange(first, last), np.diff(indptr[first : last + 1]))
        yield element["indices"][here], columns, single(element["data"][here])
        first = last


def _proteins(file: Any, n_obs: int, source: SourceSettings) -> tuple[dict[str, Part], str]:
    if source.antibodies and f"obsm/{source.antibodies}" not in file:
        raise InputRefused(
            f"{source.uri}: no obsm[{source.antibodies!r}]; there are {', '.join(_tables(file)) or 'none'}"
        )
    for key in (source.antibodies,) if source.antibodies else PROTEIN_TABLES:
        if f"obsm/{key}" in file:
            table = read(file[f"obsm/{key}"])
            if isinstance(table, pd.DataFrame):
                features = [str(name) for name in table.columns]
            elif "uns/protein_names" in file:
                features = [_text(name) for name in read(file["uns/protein_names"])]
            else:
                features = [f"{key}_{number}" for number in range(table.shape[1])]
            if table.shape == (n_obs, len(features)):
                dense_levels = are_levels(source, "protein") and not scipy.sparse.issparse(table)
                rows = level_rows(table) if dense_levels else memory_rows(table)
                return {"protein": Part(pd.DataFrame(index=features), rows)}, key
    return {}, ""


def _with_places(obs: pd.DataFrame, file: Any) -> pd.DataFrame:
    """Add positions in space from ``obsm["spatial"]``, where obs has none."""
    places = None if {"x", "y"} & set(obs.columns) else _places(file, len(obs))
    if places is None:
        return obs
    x, y = np.asarray(places, np.float64).T
    return obs.assign(x=x, y=y)


def _places(file: Any, n_obs: int) -> Any:
    """Return the first two columns of ``obsm["spatial"]``, an array or a DataFrame; none where it has no numbers."""
    places: Any = file.get("obsm/spatial")
    if hasattr(places, "keys"):
        table = read(places)
        table = table.select_dtypes("number") if isinstance(table, pd.DataFrame) else pd.DataFrame()
        chosen = ["x", "y"] if {"x", "y"} <= set(table.columns) else list(table.columns[:2])
        return table[chosen] if len(table) == n_obs and len(chosen) == 2 else None
    shape: tuple[int, ...] = getattr(places, "shape", ())
    return places[:, :2] if len(shape) == 2 and shape[0] == n_obs and shape[1] >= 2 else None


def _left_out(file: Any, kept: Mapping[str, Any], used: str) -> list[str]:
    """Say which tables of cells have no place in the lake."""
    left = [key for key in _tables(file) if key != used and f"obsm_{Path(key).name}" not in kept]
    return [f"obsm left out: {', '.join(left)}; if one holds counts of antibodies, say antibodies=NAME"] if left else []


def _tables(file: Any) -> list[str]:
    """Name the tables of cells of a file."""
    return [str(key) for key in file["obsm"]] if "obsm" in file and hasattr(file["obsm"], "keys") else []


def _sides(file: Any, n_obs: int, used: str) -> dict[str, Callable[[], pd.DataFrame]]:
    """Return readers of the tables of cells that the lake has no place for: embeddings and the like."""
    tables: dict[str, Callable[[], pd.DataFrame]] = {}
    for key in _tables(file):
        element = file["obsm"][key]
        shape: tuple[int, ...] = getattr(element, "shape", ())
        if key != used and len(shape) == 2 and shape[0] == n_obs and 0 < shape[1] <= SIDE_COLUMNS:
            tables[f"obsm_{Path(key).name}"] = partial(_numbers, element)
        elif key == "spatial" and hasattr(element, "keys") and _places(file, n_obs) is not None:
            tables["obsm_spatial"] = partial(_numbers, element)
    return tables


def _numbers(element: Any) -> pd.DataFrame:
    if is_array(element):
        return pd.DataFrame(element[:]).add_prefix("c")
    return pd.DataFrame(read(element)).select_dtypes("number").reset_index(drop=True)
