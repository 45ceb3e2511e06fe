"""This module reads loom files (features x cells, HDF5) in row blocks of cells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
import pandas as pd

from ingest.harmonize import NO_NAME
from ingest.job import SourceSettings
from ingest.sources.form import Part, SourceDataset, are_levels, content_digest, fingerprint
from ingest.sources.h5ad import open_group
from ingest.turn import Coordinates, turned
from store.errors import InputRefused

CELL_NAMES = ("CellID", "obs_names", "cell_id", "barcode", "Barcode", "cell_names")
FEATURE_NAMES = ("Accession", "var_names", "Gene", "gene_names", "GeneName", "name")
X_NAMES, Y_NAMES = ("X", "x", "x_coord", "spatial_x"), ("Y", "y", "y_coord", "spatial_y")
EMBEDDING = ("_X", "_Y")
"""What looms of the Linnarsson lab (cytograph) call a t-SNE or UMAP."""
NO_PLACES = "_X and _Y are taken for an embedding; where they are places in space, say obs.x=_X and obs.y=_Y"
CHUNK = 64


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a file; attributes of columns become obs (coordinates ``x`` and ``y`` if there are any), those of rows var.

    Raises:
        InputRefused: Not a loom file, or it lacks the layer that the source names.
    """
    file = open_group(source.uri)
    if "matrix" not in file or "col_attrs" not in file or "row_attrs" not in file:
        raise InputRefused(f"{source.uri}: not a loom file: it needs matrix, row_attrs and col_attrs")
    key = f"layers/{source.layer}" if source.layer else "matrix"
    if key not in file:
        layers = ", ".join(file["layers"]) if "layers" in file else "none"
        raise InputRefused(f"{source.uri}: has no layer {source.layer!r}; layers: {layers}")
    matrix = file[key]
    n_features, n_cells = matrix.shape
    var = _attributes(file["row_attrs"], n_features)
    var.index = _names(var, FEATURE_NAMES, "feature")
    levels = are_levels(source, source.measurement)
    identity = [source.uri, fingerprint(source.uri), key, "levels" if levels else "counts"]
    rows = turned(identity, (n_cells, n_features), lambda: _parts(matrix, levels))
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: _obs(file["col_attrs"], n_cells),
        n_obs=n_cells,
        parts={source.measurement: Part(var, rows)},
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
        notes=(NO_PLACES,) if set(EMBEDDING) <= set(file["col_attrs"]) - set(source.obs.values()) else (),
        matrices=tuple(str(name) for name in file.get("layers", ()) if name != source.layer),
    )


def _obs(group: h5py.Group, n_cells: int) -> pd.DataFrame:
    obs = _attributes(group, n_cells)
    obs.index = _names(obs, CELL_NAMES, "cell")
    names = [str(name) for name in obs]
    together = next(
        (name[:-2] for name in names if re.fullmatch(r"(?i)(?!.*(sne|umap|pca))(spatial|.*coord).*_0", name)), ""
    )
    for column, known in (("x", (*X_NAMES, f"{together}_0")), ("y", (*Y_NAMES, f"{together}_1"))):
        found = next((name for name in known if name in names), None)
        if found and column not in names:
            obs[column] = obs[found]
    return obs


def _attributes(group: h5py.Group, size: int) -> pd.DataFrame:
    """Read attributes; one of several dimensions becomes several columns."""
    columns: dict[str, Any] = {}
    for name in group:
        values = group[name][:]
        if values.shape[:1] != (size,):
            raise InputRefused(f"{group.name}/{name}: has shape {values.shape}, not {size:,} entries")
        if values.ndim == 2:
            columns |= {f"{name}_{number}": values[:, number] for number in range(values.shape[1])}
        else:
            texts = values.dtype.kind in "OS"
            columns[name] = np.array([_text(value) for value in values], object) if texts else values
    return pd.DataFrame(columns, index=range(size))


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _names(table: pd.DataFrame, known: tuple[str, ...], kind: str) -> pd.Index:
    """Return what the first known attribute says; where that is empty, what the next says."""
    there = [table[name].astype(str) for name in known if name in table]
    if not there:
        return pd.Index([f"{kind}{number}" for number in range(len(table))])
    names = there[0]
    for others in there[1:]:
        names = names.where(~names.str.strip().isin(NO_NAME), others)
    return pd.Index(names)


def _parts(matrix: h5py.Dataset, levels: bool) -> Iterator[Coordinates]:
    """Read features a few at a time, along the file's chunks; a zero among ``levels`` is stored, and NaN is missing."""
    step = max(1, min(matrix.chunks[0] if matrix.chunks else CHUNK, 2**24 // max(1, matrix.shape[1])))
    for first in range(0, matrix.shape[0], step):
        part = matrix[first : first + step]
        feature, cell = np.nonzero(~np.isnan(part) if levels else part)
        yield cell, feature + first, part[feature, cell]
