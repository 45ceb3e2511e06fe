"""This module writes the small tables of a commit: features, presence, provenance, summaries, and obs last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

from store import records, schema
from store.context import soma_context
from store.errors import InputRefused

if TYPE_CHECKING:
    from store.lake import Lake
    from store.writer import BlockStats, Reservation


def obs_table(reservation: Reservation, obs: pd.DataFrame | pa.Table, blocks: Sequence[BlockStats]) -> pa.Table:
    """Complete a source's obs to the lake's schema: defaults, joinids, and statistics of the RNA counts.

    Raises:
        InputRefused: A wrong number of rows, an unknown column, or a value of the wrong type.
    """
    name = reservation.plan.dataset_id
    frame = (obs.to_pandas() if isinstance(obs, pa.Table) else obs).reset_index(drop=True)
    n_obs = reservation.plan.n_obs
    if len(frame) != n_obs:
        raise InputRefused(f"dataset {name!r}: obs has {len(frame)} rows, the plan {n_obs}")
    given = {schema.measured_column(measurement) for measurement in schema.MEASUREMENTS} | set(schema.OBS_DEFAULTS)
    unknown = sorted(set(frame.columns) - given)
    if unknown:
        raise InputRefused(f"dataset {name!r}: obs column {unknown[0]!r} is not of the lake's schema; map or drop it")
    columns: dict[str, Any] = {
        "soma_joinid": np.arange(n_obs, dtype=np.int64) + reservation.plan.obs_start,
        "dataset_id": [name] * n_obs,
    }
    for column, default in schema.OBS_DEFAULTS.items():
        columns[column] = _filled(frame, column, default)
    columns |= _statistics(reservation, blocks)
    for measurement in schema.MEASUREMENTS:
        column = schema.measured_column(measurement)
        measured = measurement in reservation.dataset.features
        columns[column] = _filled(frame, column, measured) & measured
    try:
        return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema.OBS_SCHEMA})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputRefused(f"dataset {name!r}: obs does not fit the lake's schema: {error}") from None


def _filled(frame: pd.DataFrame, column: str, default: Any) -> Any:
    if column not in frame:
        return np.full(len(frame), default, dtype=object if isinstance(default, str) else None)
    values = frame[column]
    if isinstance(default, bool):
        return values.fillna(default).astype(bool).to_numpy()
    if isinstance(default, float):
        return pd.to_numeric(values, errors="raise").astype(float).to_numpy()
    return values.astype(object).where(values.notna(), default).map(str).to_numpy()


def _statistics(reservation: Reservation, blocks: Sequence[BlockStats]) -> dict[str, Any]:
    n_obs = reservation.plan.n_obs
    nnz, total, squares = np.zeros(n_obs, np.int64), np.zeros(n_obs), np.zeros(n_obs)
    for block in blocks:
        if block.measurement == "RNA":
            rows = slice(block.row_start, block.row_stop)
            nnz[rows], total[rows], squares[rows] = block.nnz_C, block.sum_C, block.squares_C
    mean = np.divide(total, nnz, out=np.zeros(n_obs), where=nnz > 0)
    spread = np.maximum(squares - nnz * mean**2, 0)
    variance = np.divide(spread, nnz - 1, out=np.zeros(n_obs), where=nnz > 1)
    n_measured = len(reservation.dataset.features["RNA"]) if "RNA" in reservation.dataset.features else 0
    return {
        "raw_sum": total,
        "nnz": nnz,
        "raw_mean_nnz": mean,
        "raw_variance_nnz": variance,
        "n_measured_vars": np.full(n_obs, n_measured, np.int64),
    }


def write_all(
    before: Lake, reservation: Reservation, obs: pa.Table, blocks: Sequence[BlockStats], timestamp: int
) -> None:
    """Write all tables of one dataset at ``timestamp``, computing totals from the parent commit ``before``.

    Nothing here depends on what a killed attempt left: totals are those of the parent plus this dataset's.
    """
    organism_uri = records.join(before.uri, "census_data", reservation.plan.organism)
    for measurement, joinids in reservation.feature_joinids.items():
        uri = records.join(organism_uri, "ms", measurement)
        _write_presence(records.join(uri, "feature_dataset_presence_matrix"), reservation, joinids, timestamp)
        mine = [block for block in blocks if block.measurement == measurement]
        n_measured = int(np.count_nonzero(obs[schema.measured_column(measurement)].to_numpy()))
        var = _var_table(records.join(uri, "var"), before, reservation, measurement, mine, n_measured)
        _write_table(records.join(uri, "var"), var, timestamp)
    info_uri = records.join(before.uri, "census_info")
    for name, table in _info_tables(before, reservation, obs).items():
        _write_table(records.join(info_uri, name), table, timestamp)
    _write_table(records.join(organism_uri, "obs"), obs, timestamp)


def _write_table(uri: str, table: pa.Table, timestamp: int) -> None:
    with tiledbsoma.DataFrame.open(uri, "w", tiledb_timestamp=timestamp, context=soma_context()) as frame:
        frame.write(table.combine_chunks())


def _write_presence(uri: str, reservation: Reservation, joinids: Any, timestamp: int) -> None:
    ascending = np.sort(joinids)
    rows = np.full(len(ascending), reservation.plan.dataset_joinid, dtype=np.int64)
    table = pa.table({"soma_dim_0": rows, "soma_dim_1": ascending, "soma_data": np.ones(len(rows), dtype=bool)})
    with tiledbsoma.SparseNDArray.open(uri, "w", tiledb_timestamp=timestamp, context=soma_context()) as array:
        array.write(table)


def _read_at(uri: str, before: Lake, columns: list[str] | None = None) -> pd.DataFrame:
    """Read a table as it was at the parent commit; empty where it was made later."""
    try:
        opened = tiledbsoma.DataFrame.open(uri, context=soma_context(before.commit.timestamp_ms))
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError):
        opened = None
    if opened is None:
        with tiledbsoma.DataFrame.open(uri, context=soma_context()) as now:
            return now.schema.empty_table().to_pandas()
    with opened as frame:
        return frame.read(column_names=columns).concat().to_pandas()


def _var_table(
    uri: str, before: Lake, reservation: Reservation, measurement: str, blocks: list[BlockStats], n_measured: int
) -> pa.Table:
    features = reservation.dataset.features[measurement]
    nnz = np.zeros(len(features), np.int64)
    for block in blocks:
        nnz += block.feature_nnz_G
    mine = pd.DataFrame(
        {
            "soma_joinid": reservation.feature_joinids[measurement],
            "feature_id": features.feature_id,
            "feature_name": features.feature_name,
            "feature_type": features.feature_type,
            "feature_length": features.feature_length,
            "nnz": nnz,
            "n_measured_obs": n_measured,
        }
    ).set_index("soma_joinid")
    known = _read_at(uri, before).set_index("soma_joinid")
    shared = mine.index.intersection(known.index)
    for column in ("feature_name", "feature_type", "feature_length"):
        mine.loc[shared, column] = known.loc[shared, column]
    for column in ("nnz", "n_measured_obs"):
        mine.loc[shared, column] += known.loc[shared, column]
    return pa.Table.from_pandas(mine.sort_index().reset_index(), schema=schema.VAR_SCHEMA, preserve_index=False)


def _info_tables(before: Lake, reservation: Reservation, obs: pa.Table) -> dict[str, pa.Table]:
    uri = records.join(before.uri, "census_info")
    plan, info = reservation.plan, reservation.dataset.info
    datasets = pd.DataFrame(
        [
            {
                "soma_joinid": plan.dataset_joinid,
                "dataset_id": plan.dataset_id,
                **{name: info.get(name, "") for name in schema.DATASET_INFO},
                "dataset_total_cell_count": plan.n_obs,
                "organism": plan.organism,
                "source_uri": info.get("source_uri", ""),
                "source_kind": info.get("source_kind", ""),
                "obs_start": plan.obs_start,
                "measurements": ",".join(reservation.dataset.features),
            }
        ]
    )
    organisms = _organisms(_read_at(records.join(uri, "organisms"), before), plan.organism)
    counts = _cell_counts(_read_at(records.join(uri, "summary_cell_counts"), before), plan.organism, obs)
    everything = counts[counts["category"] == "all"]
    summary = {
        "census_schema_version": schema.CENSUS_SCHEMA_VERSION,
        "census_build_date": _today(),
        "dataset_schema_version": schema.DATASET_SCHEMA_VERSION,
        "total_cell_count": str(everything["total_cell_count"].sum()),
        "unique_cell_count": str(everything["unique_cell_count"].sum()),
    }
    frames = {
        "datasets": datasets,
        "organisms": organisms,
        "summary_cell_counts": counts,
        "summary": pd.DataFrame(
            {"soma_joinid": range(len(summary)), "label": list(summary), "value": list(summary.values())}
        ),
    }
    return {
        name: pa.Table.from_pandas(frame, schema=schema.INFO_SCHEMAS[name], preserve_index=False)
        for name, frame in frames.items()
    }


def _today() -> str:
    from store.lake import utc_now

    return utc_now()[:10]


def _organisms(known: pd.DataFrame, organism: str) -> pd.DataFrame:
    if organism in set(known["organism"]):
        return known
    term, label = schema.ORGANISMS[organism]
    mine = {"soma_joinid": len(known), "organism_ontology_term_id": term, "organism_label": label, "organism": organism}
    return pd.concat([known, pd.DataFrame([mine])], ignore_index=True) if len(known) else pd.DataFrame([mine])


def _cell_counts(known: pd.DataFrame, organism: str, obs: pa.Table) -> pd.DataFrame:
    """Add a dataset's cells to the Census's counts by category and label."""
    frame = obs.select(["is_primary_data", *_category_columns()]).to_pandas()
    parts = [known.drop(columns="soma_joinid").assign(order=known["soma_joinid"])]
    groups = [("all", frame.assign(label="na", term="na"))]
    for category in schema.SUMMARY_CATEGORIES:
        term = f"{category}_ontology_term_id"
        terms = frame.get(term, "na")
        groups.append((category, frame.assign(label=frame[category], term=terms)))
    for category, rows in groups:
        counted = rows.groupby(["label", "term"], as_index=False, observed=True).agg(
            total_cell_count=("is_primary_data", "size"), unique_cell_count=("is_primary_data", "sum")
        )
        counted = counted.rename(columns={"term": "ontology_term_id"})
        parts.append(counted.assign(organism=organism, category=category, order=np.inf))
    keys = ["organism", "category", "label", "ontology_term_id"]
    parts = [part for part in parts if len(part)]
    merged = (
        pd.concat(parts)
        .groupby(keys, as_index=False, sort=True)
        .agg(
            total_cell_count=("total_cell_count", "sum"),
            unique_cell_count=("unique_cell_count", "sum"),
            order=("order", "min"),
        )
    )
    merged = merged.sort_values("order", kind="stable", ignore_index=True)
    merged.insert(0, "soma_joinid", np.arange(len(merged), dtype=np.int64))
    return merged.drop(columns="order")


def _category_columns() -> list[str]:
    terms = [f"{category}_ontology_term_id" for category in schema.SUMMARY_CATEGORIES]
    return [*schema.SUMMARY_CATEGORIES, *(term for term in terms if term in schema.OBS_DEFAULTS)]
