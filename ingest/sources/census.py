"""This module reads a CELLxGENE Census: the public one by release, or any of the same layout by URI."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse

from ingest.job import SourceSettings
from ingest.sources.form import Part, SourceDataset
from store.errors import InputRefused, StorageError, UsageError
from store.schema import DATASET_INFO, OBS_DEFAULTS, ORGANISMS

BUFFERS = {"soma.init_buffer_bytes": 2**22, "sm.mem.total_budget": 2**28, "sm.mem.malloc_trim": "false"}
"""What a read holds of each column before it hands a part over; the client's own gigabyte is too much for a worker."""

CELL = "observation_joinid"
"""The Census's own name of a cell, which stays from release to release."""


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
    found: list[str] = []
    for organism, experiment in _experiments(_open(source.uri)).items():
        known = dict[str, None]()
        for part in _parts(source, experiment, ["dataset_id"]):
            known |= dict.fromkeys(str(name) for name in pc.unique(part["dataset_id"]).to_pylist())
        found += [f"{organism}/{name}" for name in known]
    if not found:
        raise InputRefused(f"{source.uri}: no cell fits where = {source.where!r}")
    return found


def _parts(
    source: SourceSettings, experiment: Any, columns: list[str], dataset: str | None = None
) -> Iterator[pa.Table]:
    """Read obs part by part: a Census has more cells than a reader has memory for."""
    filters = [f"({source.where})"] if source.where else []
    if dataset is not None:
        filters.append(f"dataset_id == {dataset!r}")
    try:
        yield from experiment.obs.read(value_filter=" and ".join(filters) or None, column_names=columns)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{source.uri}: where = {source.where!r}: {reason}") from error


def _obs(source: SourceSettings, experiment: Any, columns: list[str], dataset: str) -> pd.DataFrame:
    """Read columns of a dataset's cells, by joinid; texts that cells share as categoricals."""
    parts = [_shared(part) for part in _parts(source, experiment, columns, dataset)]
    obs = pa.concat_tables(parts, promote_options="permissive").combine_chunks().to_pandas()
    return pd.DataFrame(obs).sort_values("soma_joinid", ignore_index=True)


def _shared(table: pa.Table) -> pa.Table:
    texts = {name for name in table.column_names if pa.types.is_large_string(table[name].type)} - {CELL}
    return pa.table(
        {name: table[name].dictionary_encode() if name in texts else table[name] for name in table.column_names}
    )


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open one dataset of one organism; features that it does not measure are left out."""
    organism, _, dataset_id = name.partition("/")
    census = _open(source.uri)
    experiment = _experiments(census)[organism]
    datasets = census["census_info"]["datasets"].read().concat().to_pandas().set_index("dataset_id")
    row = datasets.loc[dataset_id]
    var = experiment.ms["RNA"].var.read().concat().to_pandas().sort_values("soma_joinid", ignore_index=True)
    presence = experiment.ms["RNA"]["feature_dataset_presence_matrix"].read((int(row["soma_joinid"]),))
    measured = [part["soma_dim_1"].to_numpy()[part["soma_data"].to_numpy() != 0] for part in presence.tables()]
    var = var[np.isin(var["soma_joinid"], np.concatenate([[], *measured]))].set_index("feature_id", drop=False)
    joinids = _obs(source, experiment, ["soma_joinid"], dataset_id)["soma_joinid"].to_numpy(np.int64)
    known = [column for column in OBS_DEFAULTS if column in experiment.obs.schema.names]
    named = [CELL] if CELL in experiment.obs.schema.names else []

    def obs() -> pd.DataFrame:
        cells = _obs(source, experiment, list(dict.fromkeys(["soma_joinid", *known, *named])), dataset_id)
        cells.index = pd.Index(cells[CELL].astype(str) if named else joinids.astype(str))
        return cells[known]

    def digest() -> str:
        # joinids change with every release; a version of a dataset and its own names of cells do not
        cells = list(_obs(source, experiment, ["soma_joinid", *named], dataset_id)[CELL]) if named else []
        version = str(row["dataset_version_id"])
        identity = [version, source.where or "", organism, dataset_id, str(len(joinids)), "\n".join(map(str, cells))]
        return hashlib.sha256("|".join(identity).encode()).hexdigest()

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
        read_obs=obs,
        n_obs=len(joinids),
        parts={"RNA": Part(var, rows, layer="raw")},
        content=digest,
        info={column: str(row.get(column, "")) for column in DATASET_INFO},
        origin=f"census:{dataset_id}",
    )
