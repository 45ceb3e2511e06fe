"""This module writes a query's cells to an h5ad (one measurement) or h5mu (several) file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd

from store import schema
from store.errors import StorageError, UsageError
from store.lake import Lake

MODALITY = {"RNA": "rna", "protein": "prot", "ATAC": "atac"}
"""MuData's customary names of modalities; other measurements keep ours."""


def export(lake: Lake, path: str | Path, organism: str, measurements: Sequence[str], where: str | None = None) -> int:
    """Write the chosen cells with raw counts in X, obs, and var under its feature ids; return the number of cells.

    The file appears whole or not at all. A cell without a measurement is not in that modality of an h5mu.

    Raises:
        UsageError: No cell fits, several measurements are asked for as h5ad, or an unknown name or filter.
        StorageError: The file cannot be written there.
    """
    path = Path(path)
    if path.suffix not in (".h5ad", ".h5mu"):
        raise UsageError(f"{path}: export writes .h5ad (one measurement) or .h5mu (several)")
    if path.suffix == ".h5ad" and len(measurements) != 1:
        raise UsageError(f"{path}: an h5ad holds one measurement, not {', '.join(measurements)}; name the file .h5mu")
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder; give the file another name" if path.is_dir() else "its folder does not exist; make it first"
        raise StorageError(f"{path}: {why}")
    obs = lake.obs(organism, where).to_pandas()
    obs.index = obs["soma_joinid"].astype(str)
    parts = {name: _part(lake, organism, name, obs) for name in measurements}
    empty = [name for name, part in parts.items() if part.n_obs == 0]
    if empty:
        raise UsageError(f"{lake.uri}: no cell with {empty[0]} fits where = {where!r} in {organism}")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        if path.suffix == ".h5ad":
            parts[measurements[0]].write_h5ad(temporary)
        else:
            with mudata.set_options(pull_on_update=False):
                mudata.MuData({MODALITY.get(name, name): part for name, part in parts.items()}).write_h5mu(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}; check the place, its room and your rights") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(set().union(*(part.obs_names for part in parts.values())))


def _part(lake: Lake, organism: str, measurement: str, obs: pd.DataFrame) -> anndata.AnnData:
    var = lake.var(organism, measurement).to_pandas()
    mine = obs[obs[schema.measured_column(measurement)]] if measurement in schema.MEASUREMENTS else obs
    counts = lake.counts(organism, measurement, mine["soma_joinid"].to_numpy(np.int64))[
        :, var["soma_joinid"].to_numpy()
    ]
    var.index = var["feature_id"].astype(str)
    mine = mine.rename_axis(None)
    var = var.drop(columns="feature_id").rename_axis("feature_id")
    part = anndata.AnnData(counts, obs=mine, var=var)
    part.uns["somaflow"] = {"commit": lake.commit.number, "commit_id": lake.commit.id, "organism": organism}
    return part
