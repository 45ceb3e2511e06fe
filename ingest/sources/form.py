"""This module is the form that every source takes once it is open: obs, features per measurement, rows of counts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from ingest.job import SourceSettings

Rows = Callable[[int, int], scipy.sparse.csr_matrix]
"""Rows start to stop (exclusive) of a matrix, as the source holds them."""


@dataclass(frozen=True)
class Part:
    """One measurement of a dataset, features in the source's order."""

    var: pd.DataFrame
    rows: Rows
    measured_C: NDArray[np.bool_] | None = None
    """Which cells were measured; none means all."""


@dataclass(frozen=True)
class SourceDataset:
    """One dataset of a source, opened; counts are read as they are asked for.

    Attributes:
        obs: One row per cell as the source describes it, indexed by the source's names of the cells.
        parts: Measurement to its features and counts.
        digest: SHA-256 (hex) over the content.
        info: Provenance for the lake's datasets table.
        leftovers: What no cell or feature column can hold, for people.
    """

    dataset_id: str
    organism: str
    obs: pd.DataFrame
    parts: dict[str, Part]
    digest: str
    info: dict[str, str] = field(default_factory=dict)
    leftovers: dict[str, Any] = field(default_factory=dict)

    @property
    def n_obs(self) -> int:
        """Cells."""
        return len(self.obs)


def dataset_name(source: SourceSettings) -> str:
    """Name a dataset after its file: ``filtered_feature_bc_matrix`` takes the folder's name, endings go."""
    if source.dataset_id:
        return source.dataset_id
    path = Path(source.uri.rstrip("/"))
    stem = path.name
    for ending in (".h5ad", ".h5mu", ".h5", ".zarr"):
        stem = stem.removesuffix(ending)
    if re.fullmatch(r"(filtered|raw)_(feature|gene|peak)_bc_matri(x|ces)|10x", stem) and path.parent.name:
        stem = f"{path.parent.name}-{stem}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem) or "dataset"


def content_digest(uri: str) -> str:
    """Return the SHA-256 (hex) of a file, or of all files in a folder with their names."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    names = sorted(filesystem.find(path)) if filesystem.isdir(path) else [path]
    total = hashlib.sha256()
    for name in names:
        total.update(name.removeprefix(path).encode() + b"\0")
        with filesystem.open(name, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def memory_rows(matrix: Any) -> Rows:
    """Return the rows of a matrix that is in memory."""
    counts = scipy.sparse.csr_matrix(matrix)
    return lambda start, stop: counts[start:stop]


def feature_types_to_measurements(types: pd.Series) -> dict[str, NDArray[np.int64]]:
    """Split 10x features by their type: measurement to column positions; unknown types are left out."""
    measurement_of = {
        "gene expression": "RNA",
        "antibody capture": "protein",
        "peaks": "ATAC",
        "crispr guide capture": "guide",
    }
    lowered = types.astype(str).str.lower()
    split = {name: np.flatnonzero((lowered == kind).to_numpy()) for kind, name in measurement_of.items()}
    return {name: columns for name, columns in split.items() if len(columns)}
