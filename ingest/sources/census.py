"""This module reads a CELLxGENE Census: the public one by release, or any of the same layout by URI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse

from ingest.job import SourceSettings
from ingest.sources import is_census_name
from ingest.sources.form import Part, SourceDataset, changed
from ingest.turn import made_once, scratch_errors, scratch_of
from store.context import EVER, tiledb_config
from store.errors import InputRefused, StorageError, UsageError
from store.fragments import written_files
from store.schema import DATASET_INFO, OBS_DEFAULTS, ORGANISMS

BUFFERS = {"soma.init_buffer_bytes": 2**20, "sm.mem.total_budget": 2**28, "sm.mem.malloc_trim": "false"}
"""What a read holds of each column before it hands a part over; the client's own gigabyte is too much for a worker, and
obs has some thirty columns, each with offsets and validity."""

PUBLIC = "s3://cellxgene-census-public-"
"""How the addresses of the public Census begin."""

SIGNED = {"vfs.s3.no_sign_request": "false", "vfs.s3.region": ""}
"""TileDB's own defaults, for a Census in somebody's bucket."""

CELL = "observation_joinid"
"""The Census's own name of a cell, which stays from release to release."""

DIGEST_ROWS = 2**17

ALL = slice(None)

CELLS_OWN = {CELL, "cell_id"}
"""Columns in which cells differ from each other."""

OWN_TYPE = {pa.large_string(): pd.ArrowDtype(pa.large_string())}
"""Keeps those in Arrow's memory; as Python's objects they would take three times as much."""


@lru_cache(maxsize=4)
def _open(uri: str) -> Any:
    ours = tiledb_config()
    config = BUFFERS | {key: value for key, value in ours.items() if key.endswith(("concurrency_level", "handlers"))}
    if not is_census_name(uri) and not uri.startswith(PUBLIC):  # the client would ask without keys, and in one region
        config |= SIGNED | {key: value for key, value in ours.items() if key.startswith("vfs.s3.")}
    try:
        if is_census_name(uri):
            return cellxgene_census.open_soma(census_version=uri, tiledb_config=config)
        context = cellxgene_census.get_default_soma_context()
        context = context.replace(tiledb_config=config, timestamp=EVER)  # without a config it would forget its own
        return cellxgene_census.open_soma(uri=uri, context=context)
    except Exception as error:
        raise StorageError(f"{uri}: cannot be opened as a Census: {error}") from error


def _experiments(census: Any) -> dict[str, Any]:
    data = census["census_data"]
    return {name: data[name] for name in data if name in ORGANISMS and "raw" in data[name].ms["RNA"].X}


def names(source: SourceSettings) -> list[str]:
    """Name each dataset of each organism as ``organism/dataset_id``, those with cells that fit the filter."""
    experiments = _experiments(_open(source.uri))
    found = [f"{organism}/{name}" for organism in experiments for name in _cells(source, experiments[organism])]
    if not found:
        raise InputRefused(f"{source.uri}: no cell fits where = {source.where!r}")
    return found


def _cells(source: SourceSettings, experiment: Any) -> dict[str, tuple[int, int, int]]:
    """Return first and last joinid, and the number, of each dataset's cells that fit the filter, in their order.

    All cells of the Census are looked at, once on a machine for each state of it: nothing says where a dataset lies.
    """
    uri, config = experiment.obs.uri, experiment.context.tiledb_config
    written = written_files(uri, config)
    folder = scratch_of(uri, source.where, written)

    def make() -> None:
        found: dict[str, tuple[int, int, int]] = {}
        with type(experiment.obs).open(uri, context=experiment.context) as obs:  # as it is now
            for part in _parts(source, obs, ["soma_joinid", "dataset_id"]):
                named = pa.table({"name": part["dataset_id"].cast(pa.string()), "cell": part["soma_joinid"]})
                shares = named.group_by("name").aggregate([("cell", "min"), ("cell", "max"), ("cell", "count")])
                for share in shares.to_pylist():
                    first, last, many = found.get(share["name"], (share["cell_min"], share["cell_max"], 0))
                    these = min(first, share["cell_min"]), max(last, share["cell_max"]), many + share["cell_count"]
                    found[share["name"]] = these
        if written_files(uri, config) != written:
            raise changed(source.uri)
        (folder / "cells.json").write_text(json.dumps(found), encoding="utf-8")

    with scratch_errors(folder):
        made_once(folder, make)
        return dict(json.loads((folder / "cells.json").read_text(encoding="utf-8")))


def _parts(
    source: SourceSettings, obs: Any, columns: list[str], dataset: str | None = None, span: slice = ALL
) -> Iterator[pa.Table]:
    """Read obs part by part: a Census has more cells than a reader has memory for.

    ``span`` is the joinids to look at, both ends included: a filter alone looks at all cells of the Census.
    """
    filters = [f"({source.where})"] if source.where else []
    if dataset is not None:
        filters.append(f"dataset_id == {dataset!r}")
    try:
        yield from obs.read((span,), value_filter=" and ".join(filters) or None, column_names=columns)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{source.uri}: where = {source.where!r}: {reason}") from error


def _obs(source: SourceSettings, experiment: Any, columns: list[str], dataset: str, span: slice) -> pd.DataFrame:
    """Read columns of a dataset's cells, by joinid; texts that cells share as categoricals."""
    parts = [_shared(part) for part in _parts(source, experiment.obs, columns, dataset, span)]
    table = pa.concat_tables(parts).unify_dictionaries()
    del parts
    obs = table.to_pandas(split_blocks=True, self_destruct=True, types_mapper=OWN_TYPE.get)
    return obs if obs["soma_joinid"].is_monotonic_increasing else obs.sort_values("soma_joinid", ignore_index=True)


def _shared(table: pa.Table) -> pa.Table:
    """Return a table with texts that cells share as dictionaries, in memory that is no larger than they are."""
    texts = {name for name in table.column_names if pa.types.is_large_string(table[name].type)} - CELLS_OWN
    return pa.table(
        {
            name: table[name].dictionary_encode() if name in texts else _fitted(table[name])
            for name in table.column_names
        }
    )


def _fitted(column: pa.ChunkedArray) -> pa.Array:
    """Copy a column; what a read hands over lies in buffers of their full size, however little is in them."""
    return pa.concat_arrays([pa.array([], column.type), *column.chunks])


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open one dataset of one organism; features that it does not measure are left out."""
    organism, _, dataset_id = name.partition("/")
    census = _open(source.uri)
    experiment = _experiments(census)[organism]
    datasets = census["census_info"]["datasets"].read().concat().to_pandas().set_index("dataset_id")
    cells_of = _cells(source, experiment)
    if dataset_id not in cells_of or dataset_id not in datasets.index:
        raise changed(source.uri)
    first, last, many = cells_of[dataset_id]
    span = slice(first, last)  # a dataset's cells lie together
    joinids = _obs(source, experiment, ["soma_joinid"], dataset_id, span)["soma_joinid"].to_numpy(np.int64)
    if len(joinids) != many:
        raise changed(source.uri)
    row = datasets.loc[dataset_id]
    var = experiment.ms["RNA"].var.read().concat().to_pandas().sort_values("soma_joinid", ignore_index=True)
    presence = experiment.ms["RNA"]["feature_dataset_presence_matrix"].read((int(row["soma_joinid"]),))
    measured = [part["soma_dim_1"].to_numpy()[part["soma_data"].to_numpy() != 0] for part in presence.tables()]
    var = var[np.isin(var["soma_joinid"], np.concatenate([[], *measured]))].set_index("feature_id", drop=False)
    known = [column for column in OBS_DEFAULTS if column in experiment.obs.schema.names]
    named = CELL in known

    def obs() -> pd.DataFrame:
        cells = _obs(source, experiment, ["soma_joinid", *known], dataset_id, span)
        whole = named and (cells[CELL] != "").all()  # a lake of ours has such names only of what came from a Census
        cells.index = pd.Index(cells[CELL].array if whole else joinids.astype(str))
        return cells[known]

    def digest() -> str:
        # joinids change with every release; a version of a dataset and its own names of cells do not
        version = str(row["dataset_version_id"])
        total = hashlib.sha256(
            "|".join([version, source.where or "", organism, dataset_id, f"{len(joinids)}|"]).encode()
        )
        if named:
            names = _obs(source, experiment, ["soma_joinid", CELL], dataset_id, span)[CELL]
            for start in range(0, len(names), DIGEST_ROWS):
                total.update(("\n" * (start > 0) + "\n".join(map(str, names[start : start + DIGEST_ROWS]))).encode())
        return total.hexdigest()

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
