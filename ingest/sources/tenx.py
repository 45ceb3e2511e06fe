"""This module reads 10x feature-barcode matrices: .h5 of Cell Ranger 2 and 3, folders with matrix.mtx(.gz)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pandas as pd

from ingest.job import SourceSettings
from ingest.sources.form import (
    Part,
    SourceDataset,
    content_digest,
    dataset_name,
    feature_types_to_measurements,
    memory_rows,
)
from store.errors import InputRefused
from store.records import is_local


def names(source: SourceSettings) -> list[str]:
    """A matrix is one dataset."""
    return [dataset_name(source)]


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Read a matrix; its features go to RNA, protein, ATAC and guide by their type.

    A ``metadata.tsv`` in a folder, whose first column names the cells, becomes obs.
    """
    counts = _read(source.uri)
    counts.var = counts.var.rename_axis("gene_symbols").reset_index().set_index("gene_ids")
    types = (
        counts.var["feature_types"] if "feature_types" in counts.var else pd.Series(["Gene Expression"] * counts.n_vars)
    )
    split = feature_types_to_measurements(types)
    if not split:
        raise InputRefused(f"{source.uri}: none of its feature types is known: {sorted(set(types))}")
    matrix = counts.X.tocsr()
    obs = counts.obs
    metadata = Path(source.uri) / "metadata.tsv"
    if metadata.exists():
        obs = obs.join(pd.read_csv(metadata, sep="\t", index_col=0))
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        obs=obs,
        parts={
            measurement: Part(counts.var.iloc[columns], memory_rows(matrix[:, columns]))
            for measurement, columns in split.items()
        },
        digest=content_digest(source.uri),
        info={"dataset_title": source.title},
    )


def _read(uri: str) -> Any:
    """Read a folder on this machine, or a file, which is copied here first when it lies behind a URI."""
    import scanpy

    path = Path(uri.removeprefix("file://") if is_local(uri) else fsspec.open_local(f"simplecache::{uri}"))
    try:
        if path.is_dir():
            return scanpy.read_10x_mtx(path, var_names="gene_symbols", make_unique=False, gex_only=False)
        return scanpy.read_10x_h5(path, gex_only=False)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise InputRefused(f"{path}: not a readable 10x matrix: {error}") from error
