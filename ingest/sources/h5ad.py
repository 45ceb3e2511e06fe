"""This module reads AnnData files row block by row block, without loading their matrices."""

from __future__ import annotations

from typing import Any

import anndata.io
import fsspec
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

from ingest.job import SourceSettings
from ingest.sources.form import (
    Part,
    Rows,
    SourceDataset,
    content_digest,
    dataset_name,
    feature_types_to_measurements,
    memory_rows,
)
from store.errors import InputRefused
from store.records import is_local

PROTEIN_TABLES = ("protein_expression", "protein_counts", "protein", "ADT", "adt")
"""obsm entries that hold antibody counts, by custom; their names stand in ``uns['protein_names']`` or the table."""


def names(source: SourceSettings) -> list[str]:
    """A file is one dataset."""
    return [dataset_name(source)]


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a file; it stays open as long as the dataset is in use.

    Raises:
        InputRefused: Not an AnnData file, or it lacks the matrix that the source names.
    """
    file = open_file(source.uri)
    obs = read_table(file, "obs", source.uri)
    var, rows = _matrix(file, source)
    if "feature_types" in var and source.measurement == "RNA":
        split = feature_types_to_measurements(var["feature_types"]) or {"RNA": np.arange(len(var))}
    else:
        split = {source.measurement: np.arange(len(var))}
    parts = {
        measurement: Part(var.iloc[columns], _columns(rows, columns, len(var)))
        for measurement, columns in split.items()
    }
    parts |= _proteins(file, len(obs))
    title = source.title or (str(read(file["uns/title"])) if "uns/title" in file else "")
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        obs=obs,
        parts=parts,
        digest=content_digest(source.uri),
        info={"dataset_title": title, "dataset_h5ad_path": source.uri.rsplit("/", 1)[-1]},
    )


def open_file(path: str) -> h5py.File:
    """Open an HDF5 file for reading, also one that lies behind a URI."""
    try:
        return h5py.File(path if is_local(path) else fsspec.open(path, "rb").open(), "r")
    except OSError as error:
        raise InputRefused(f"{path}: not a readable HDF5 file: {error}") from error


def read(element: Any) -> Any:
    """Read one element of an AnnData file."""
    return anndata.io.read_elem(element)


def read_table(group: Any, key: str, where: str) -> pd.DataFrame:
    """Read obs or var, also as AnnData before 0.7 wrote them."""
    if key not in group:
        raise InputRefused(f"{where}: has no {key!r}; is it an AnnData file?")
    element = group[key]
    if isinstance(element, h5py.Group):
        table = read(element)
    else:
        records = pd.DataFrame.from_records(element[()])
        index = "index" if "index" in records else records.columns[0]
        table = records.set_index(index)
        table.index = pd.Index([_text(name) for name in table.index])
        for column in table:
            if f"uns/{column}_categories" in group:
                names = [_text(name) for name in np.atleast_1d(group[f"uns/{column}_categories"][()])]
                table[column] = np.array([*names, ""], dtype=object)[table[column].to_numpy(dtype=int)]
    table.index = table.index.astype(str)
    return pd.DataFrame(table)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _matrix(file: h5py.File, source: SourceSettings) -> tuple[pd.DataFrame, Rows]:
    var_key, key = "var", {"": "X", "raw": "raw/X"}.get(source.layer, f"layers/{source.layer}")
    if source.layer == "raw":
        var_key = "raw/var"
        if "raw" not in file and "raw.X" in file:
            var_key, key = "raw.var", "raw.X"
    if key not in file:
        layers = [f"layers/{name}" for name in file.get("layers", ())]
        known = [name for name in ("X", "raw/X") if name in file] + layers
        raise InputRefused(f"{source.uri}: has no matrix {key}; it has {', '.join(known) or 'none'}: set layer=NAME")
    return read_table(file, var_key, source.uri), matrix_rows(file[key], f"{source.uri}: {key}")


def matrix_rows(element: Any, where: str) -> Rows:
    """Return a reader of row blocks; a matrix that is stored by columns is turned once, in memory."""
    if isinstance(element, h5py.Dataset):
        if element.ndim != 2:
            raise InputRefused(f"{where}: is not a matrix (shape {element.shape})")
        return lambda start, stop: scipy.sparse.csr_matrix(element[start:stop])
    form = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "")))
    if "csc" in form:
        return memory_rows(read(element))
    if "csr" not in form:
        raise InputRefused(f"{where}: unknown form of matrix {form!r}; csr, csc and dense are known")
    if "h5sparse_format" in element.attrs:
        shape = tuple(element.attrs["h5sparse_shape"])
        parts = (element["data"][()], element["indices"][()], element["indptr"][()])
        return memory_rows(scipy.sparse.csr_matrix(parts, shape=shape))
    stored = anndata.io.sparse_dataset(element)
    return lambda start, stop: scipy.sparse.csr_matrix(stored[start:stop])


def _columns(rows: Rows, columns: Any, n_all: int) -> Rows:
    if len(columns) == n_all:
        return rows
    return lambda start, stop: rows(start, stop)[:, columns]


def _proteins(file: h5py.File, n_obs: int) -> dict[str, Part]:
    for key in PROTEIN_TABLES:
        if f"obsm/{key}" in file:
            table = read(file[f"obsm/{key}"])
            if isinstance(table, pd.DataFrame):
                features = [str(name) for name in table.columns]
            elif "uns/protein_names" in file:
                features = [_text(name) for name in read(file["uns/protein_names"])]
            else:
                features = [f"{key}_{number}" for number in range(table.shape[1])]
            if table.shape == (n_obs, len(features)):
                return {"protein": Part(pd.DataFrame(index=features), memory_rows(np.asarray(table)))}
    return {}
