"""This module reads a CELLxGENE Census: the public one by release, or any of the same layout by URI."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import scipy.sparse

from ingest.job import SourceSettings
from ingest.sources.form import Part, SourceDataset
from store.errors import InputRefused, StorageError, UsageError
from store.schema import DATASET_INFO, OBS_DEFAULTS, ORGANISMS

BUFFERS = {"soma.init_buffer_bytes": 2**22, "sm.mem.total_budget": 2**28, "sm.mem.malloc_trim": "false"}
"""What a read holds of each column before it hands a part over; the client's own gigabyte is too much for a worker."""


@lru_cache(maxsize=4)
def _open(uri: str) -> Any:
    try:
        if re.fullmatch(r"stable|latest|\d{4}-\d{2}-\d{2}", uri):
            return cellxgene_census.open_soma(census_version=uri, tiledb_config=BUFFERS)
        return cellxgene_census.open_soma(uri=uri, tiledb_config=BUFFERS)
    except Exception as error:
        raise StorageError(f"{uri}: cannot be opened as a Census: {error}") from error


def _experiments(census: Any) -> dict[str, Any]:
    data = census["census_data"]
    return {name: data[name] for name in data if name in ORGANISMS and "raw" in data[name].ms["RNA"].X}


def names(source: SourceSettings) -> list[str]:
    """Name each dataset of each organism as ``organism/dataset_id``, those with cells that fit the filter."""
    found = []
    for organism, experiment in _experiments(_open(source.uri)).items():
        cells = _obs(source, experiment, ["dataset_id"])
        found += [f"{organism}/{name}" for name in dict.fromkeys(cells["dataset_id"].astype(str))]
    if not found:
        raise InputRefused(f"{source.uri}: no cell fits where = {source.where!r}")
    return found


def _obs(
    source: SourceSettings, experiment: Any, columns: list[str] | None, dataset: str | None = None
) -> pd.DataFrame:
    filters = [f"({source.where})"] if source.where else []
    if dataset is not None:
        filters.append(f"dataset_id == {dataset!r}")
    try:
        read = experiment.obs.read(value_filter=" and ".join(filters) or None, column_names=columns)
        return pd.DataFrame(read.concat().to_pandas())
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{source.uri}: where = {source.where!r}: {reason}") from error


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open one dataset of one organism; features that it does not measure are left out."""
    organism, _, dataset_id = name.partition("/")
    census = _open(source.uri)
    experiment = _experiments(census)[organism]
    obs = _obs(source, experiment, None, dataset_id).sort_values("soma_joinid", ignore_index=True)
    datasets = census["census_info"]["datasets"].read().concat().to_pandas().set_index("dataset_id")
    row = datasets.loc[dataset_id]
    var = experiment.ms["RNA"].var.read().concat().to_pandas().sort_values("soma_joinid", ignore_index=True)
    presence = cellxgene_census.get_presence_matrix(census, organism)
    measured = np.asarray(presence[int(row["soma_joinid"])].todense()).ravel()[var["soma_joinid"]] > 0
    var = var[measured].set_index("feature_id", drop=False)
    joinids = obs["soma_joinid"].to_numpy(np.int64)
    # joinids change with every release; a version of a dataset and its own names of cells do not
    cells_named = obs["observation_joinid"].astype(str).str.cat(sep="\n") if "observation_joinid" in obs else ""
    identity = [str(row["dataset_version_id"]), source.where or "", organism, dataset_id, str(len(obs)), cells_named]
    digest = hashlib.sha256("|".join(identity).encode()).hexdigest()
    known = [column for column in OBS_DEFAULTS if column in obs]
    cells = obs[known].copy()
    cells.index = pd.Index(
        obs["observation_joinid"].astype(str) if "observation_joinid" in obs else joinids.astype(str)
    )
    columns = var["soma_joinid"].to_numpy(np.int64)
    matrix = experiment.ms["RNA"].X["raw"]

    def rows(start: int, stop: int) -> scipy.sparse.csr_matrix:
        wanted = joinids[start:stop]
        found = matrix.read((wanted,)).tables().concat()
        column_of = np.searchsorted(columns, found["soma_dim_1"].to_numpy())
        placed = (found["soma_data"].to_numpy(), (np.searchsorted(wanted, found["soma_dim_0"].to_numpy()), column_of))
        return scipy.sparse.coo_matrix(placed, shape=(len(wanted), len(columns))).tocsr()

    return SourceDataset(
        dataset_id=dataset_id,
        organism=organism,
        read_obs=lambda: cells,
        n_obs=len(cells),
        parts={"RNA": Part(var, rows, layer="raw")},
        content=lambda: digest,
        info={column: str(row.get(column, "")) for column in DATASET_INFO},
        origin=f"census:{dataset_id}",
    )
