"""This module writes the small tables of a commit: features, presence, provenance, summaries, and obs last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

from store import catalog, records, schema
from store.context import EVER, is_of_store, read_parts, soma_context
from store.errors import InputRefused

if TYPE_CHECKING:
    from store.catalog import Commit
    from store.lake import Lake
    from store.writer import BlockStats, Reservation


OBS_ROWS = 2**18
"""Rows of obs that are written at a time: only they have each text of each cell in full."""
WHOLE_ROWS = 2**17
"""Features up to which each commit writes var whole; with more of them it does so after ``WHOLE_EVERY`` writes."""
WHOLE_EVERY = 16
WHOLE_INFO = ("census_info/summary", "census_info/summary_cell_counts")
"""Tables that every commit writes whole."""


def obs_table(reservation: Reservation, obs: pd.DataFrame | pa.Table, blocks: Sequence[BlockStats]) -> pa.Table:
    """Complete a source's obs to the lake's columns: defaults, joinids, and statistics of the RNA counts.

    Returns:
        The columns of ``schema.OBS_SCHEMA``; texts that cells share are dictionaries, a number for each cell.

    Raises:
        InputRefused: A wrong number of rows, an unknown column, or a value of the wrong type.
    """
    name, n_obs = reservation.plan.dataset_id, reservation.plan.n_obs
    if len(obs) != n_obs:
        raise InputRefused(f"dataset {name!r}: obs has {len(obs)} rows, the plan {n_obs}")
    given = {schema.measured_column(measurement) for measurement in schema.MEASUREMENTS} | set(schema.OBS_DEFAULTS)
    unknown = sorted(set(_names(obs)) - given)
    if unknown:
        raise InputRefused(f"dataset {name!r}: obs column {unknown[0]!r} is not of the lake's schema; map or drop it")
    columns: dict[str, Any] = {
        "soma_joinid": np.arange(n_obs, dtype=np.int64) + reservation.plan.obs_start,
        "dataset_id": _same(name, n_obs),
    }
    columns |= _statistics(reservation, blocks)
    try:
        for column, default in schema.OBS_DEFAULTS.items():
            columns[column] = _filled(obs, column, default)
        for measurement in schema.MEASUREMENTS:
            column = schema.measured_column(measurement)
            measured = measurement in reservation.dataset.features and reservation.dataset.layer(measurement) == "raw"
            columns[column] = _filled(obs, column, measured) & measured
        return pa.table(
            {
                field.name: columns[field.name]
                if isinstance(columns[field.name], pa.Array | pa.ChunkedArray)
                else pa.array(columns[field.name], field.type)
                for field in schema.OBS_SCHEMA
            }
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputRefused(f"dataset {name!r}: obs does not fit the lake's schema: {error}") from None


def _names(obs: pd.DataFrame | pa.Table) -> list[str]:
    return obs.column_names if isinstance(obs, pa.Table) else [str(name) for name in obs.columns]


def _same(text: str, n_obs: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n_obs, np.int8)), pa.array([text], pa.large_string()))


def _filled(obs: pd.DataFrame | pa.Table, column: str, default: Any) -> Any:
    """Return a column of obs as the lake has it, its default where there is none or a value is missing."""
    if column not in _names(obs):
        return _same(default, len(obs)) if isinstance(default, str) else np.full(len(obs), default)
    values = obs[column]
    if isinstance(obs, pa.Table):
        if isinstance(default, str) and pa.types.is_large_string(values.type):
            return values.fill_null(default)
        values = values.combine_chunks().to_pandas()
    if isinstance(default, bool):
        return values.fillna(default).astype(bool).to_numpy()
    if isinstance(default, float):
        return pd.to_numeric(values, errors="raise").astype(float).to_numpy()
    return _texts(values, default)


def _texts(values: pd.Series, default: str) -> pa.Array:
    """Return each cell's text, as a dictionary if it came as a categorical."""
    if not isinstance(values.dtype, pd.CategoricalDtype):
        return pa.array(values.astype(object).where(values.notna(), default).map(str).to_numpy(), pa.large_string())
    place: dict[str, int] = {}
    texts = [*(str(value) for value in values.cat.categories), default]  # the last is what a missing value's -1 finds
    numbers = np.array([place.setdefault(text, len(place)) for text in texts], dtype=np.int32)
    return pa.DictionaryArray.from_arrays(
        pa.array(numbers[values.cat.codes.to_numpy()]), pa.array(list(place), pa.large_string())
    )


def _statistics(reservation: Reservation, blocks: Sequence[BlockStats]) -> dict[str, Any]:
    n_obs = reservation.plan.n_obs
    nnz, total, squares = np.zeros(n_obs, np.int64), np.zeros(n_obs), np.zeros(n_obs)
    for block in blocks:
        if block.measurement == "RNA" and reservation.dataset.layer("RNA") == "raw":
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
    before: Lake,
    reservation: Reservation,
    obs: pa.Table,
    blocks: Sequence[BlockStats],
    timestamp: int,
    standing: Commit | None,
) -> tuple[str, ...]:
    """Write all tables of one dataset at ``timestamp``, computing totals from the parent commit ``before``.

    Nothing here depends on what a killed attempt left: totals are those of the parent plus this dataset's, less those
    of ``standing``, the version that it takes the place of. obs is written last.

    Returns:
        The tables that were written whole, as in ``Commit.whole``.
    """
    organism = reservation.plan.organism
    organism_uri = records.join(before.uri, "census_data", organism)
    gone = _Removed(before, standing)
    whole = list(WHOLE_INFO)
    if standing:
        _delete_rows(before, standing, timestamp - 1)
        whole += _write_var_without(before, standing, gone, set(reservation.feature_joinids), timestamp)
    for measurement, joinids in reservation.feature_joinids.items():
        uri = records.join(organism_uri, "ms", measurement)
        _write_presence(records.join(uri, "feature_dataset_presence_matrix"), reservation, joinids, timestamp)
        mine = [block for block in blocks if block.measurement == measurement]
        path = catalog.var_path(organism, measurement)
        known = _read_at(path, before)
        is_whole = _in_whole(before, organism, measurement, len(known))
        var = _var_table(known, reservation, measurement, mine, _n_measured(obs, mine), gone, is_whole=is_whole)
        _write_table(records.join(before.uri, path), var, timestamp)
        whole += [path] * is_whole
    presence = _measurement_presence(reservation, obs, blocks)
    _write_table(records.join(organism_uri, "obs_measurement_presence"), presence, timestamp)
    info_uri = records.join(before.uri, "census_info")
    for name, table in _info_tables(before, organism, obs, gone.obs).items():
        _write_table(records.join(info_uri, name), table, timestamp)
    _write_table(records.join(info_uri, "datasets"), _dataset_table(reservation), timestamp)
    _write_obs(records.join(organism_uri, "obs"), obs, timestamp)
    return tuple(whole)


def _in_whole(before: Lake, organism: str, measurement: str, n_known: int) -> bool:
    """Say whether a var is to be written whole: always while it is small, later every few commits that write to it."""
    if n_known <= WHOLE_ROWS:
        return True
    since = catalog.last_whole(before.history, catalog.var_path(organism, measurement))
    writes = sum(
        commit.dataset["organism"] == organism and measurement in commit.content
        for commit in before.history
        if commit.timestamp_ms > since and commit.dataset
    )
    return writes >= WHOLE_EVERY


def remove_all(before: Lake, standing: Commit, timestamp: int) -> tuple[str, ...]:
    """Take a dataset out of all tables at ``timestamp``; its counts stay where only earlier commits find them.

    Returns:
        The tables that were written whole, as in ``Commit.whole``.
    """
    organism = standing.dataset["organism"]
    gone = _Removed(before, standing)
    whole = _write_var_without(before, standing, gone, set(), timestamp)
    nothing = schema.OBS_SCHEMA.empty_table()
    for name, table in _info_tables(before, organism, nothing, gone.obs).items():
        _write_table(records.join(before.uri, "census_info", name), table, timestamp)
    _delete_rows(before, standing, timestamp - 1)
    return (*WHOLE_INFO, *whole)


class _Removed:
    """What a version that leaves the lake had: its obs, and how much of each feature."""

    def __init__(self, before: Lake, standing: Commit | None) -> None:
        self.standing = standing
        self.obs = schema.OBS_SCHEMA.empty_table()
        if standing:
            first = standing.dataset["obs_start"]
            obs = before.experiment(standing.dataset["organism"]).obs
            wanted = ["is_primary_data", *_category_columns(), *map(schema.measured_column, schema.MEASUREMENTS)]
            rows = (slice(first, first + standing.dataset["n_obs"] - 1),)
            self.obs = obs.read(rows, column_names=wanted).concat()
        self._before = before

    def features(self, measurement: str) -> pd.DataFrame:
        """Return nnz and n_measured_obs by feature joinid; empty when the version lacked the measurement."""
        empty = pd.DataFrame({"nnz": [], "n_measured_obs": []}, dtype=np.int64)
        if self.standing is None or measurement not in self.standing.content:
            return empty
        dataset, content = self.standing.dataset, self.standing.content[measurement]
        uri = records.join(self._before.uri, "census_data", dataset["organism"], "ms", measurement)
        at = soma_context(self._before.commit.timestamp_ms)
        nnz = np.zeros(schema.FEATURE_CAPACITY[measurement], np.int64)
        has_value_C = np.zeros(dataset["n_obs"], dtype=bool)
        rows = slice(dataset["obs_start"], dataset["obs_start"] + dataset["n_obs"] - 1)
        with tiledbsoma.SparseNDArray.open(records.join(uri, "X", content.layer), context=at) as layer:
            for part in layer.read((rows,)).tables():
                nnz += np.bincount(part["soma_dim_1"].to_numpy(), minlength=len(nnz))
                if content.layer != "raw":
                    has_value_C[part["soma_dim_0"].to_numpy() - dataset["obs_start"]] = True
        joinid = dataset["dataset_joinid"]
        with tiledbsoma.SparseNDArray.open(records.join(uri, "feature_dataset_presence_matrix"), context=at) as matrix:
            found = matrix.read((slice(joinid, joinid),)).tables().concat()["soma_dim_1"].to_numpy()
        column = self.obs[schema.measured_column(measurement)].to_numpy()
        n_measured = int(np.count_nonzero(column)) if content.layer == "raw" else int(has_value_C.sum())
        return pd.DataFrame({"nnz": nnz[found], "n_measured_obs": n_measured}, index=found)


def _n_measured(obs: pa.Table, blocks: Sequence[BlockStats]) -> int:
    """Count the cells that have a measurement: by obs where X holds counts, else those with any value."""
    measurement = blocks[0].measurement
    counted = int(np.count_nonzero(obs[schema.measured_column(measurement)].to_numpy()))
    return counted or int(sum(np.count_nonzero(block.nnz_C) for block in blocks))


def _measurement_presence(reservation: Reservation, obs: pa.Table, blocks: Sequence[BlockStats]) -> pa.Table:
    plan = reservation.plan
    rows = [
        {
            "soma_joinid": plan.dataset_joinid * len(schema.MEASUREMENTS) + schema.MEASUREMENTS.index(measurement),
            "dataset_id": plan.dataset_id,
            "measurement": measurement,
            "layer": reservation.dataset.layer(measurement),
            "obs_start": plan.obs_start,
            "obs_stop": plan.obs_start + plan.n_obs,
            "n_measured_obs": _n_measured(obs, [block for block in blocks if block.measurement == measurement]),
        }
        for measurement in reservation.dataset.features
    ]
    return pa.Table.from_pylist(rows, schema=schema.MEASUREMENT_PRESENCE)


def _delete_rows(before: Lake, standing: Commit, timestamp: int) -> None:
    """Delete a version's rows: seen from ``timestamp`` on, and not by readers of earlier commits."""
    dataset = standing.dataset
    organism_uri = records.join(before.uri, "census_data", dataset["organism"])
    joinid, first = dataset["dataset_joinid"], dataset["obs_start"]
    width = len(schema.MEASUREMENTS)
    frames = {
        records.join(before.uri, "census_info", "datasets"): (joinid, joinid),
        records.join(organism_uri, "obs_measurement_presence"): (joinid * width, joinid * width + width - 1),
        records.join(organism_uri, "obs"): (first, first + dataset["n_obs"] - 1),
    }
    for measurement in standing.content:
        uri = records.join(organism_uri, "ms", measurement, "feature_dataset_presence_matrix")
        with tiledbsoma.SparseNDArray.open(uri, "d", tiledb_timestamp=timestamp, context=soma_context()) as array:
            array.delete_cells((slice(joinid, joinid),))
    for uri, (low, high) in frames.items():
        with tiledbsoma.DataFrame.open(uri, "d", tiledb_timestamp=timestamp, context=soma_context()) as frame:
            frame.delete_cells((slice(low, high),))


def _write_var_without(
    before: Lake, standing: Commit, gone: _Removed, except_for: set[str], timestamp: int
) -> list[str]:
    """Lower the totals of the features of measurements that only the old version had; return what was written."""
    organism = standing.dataset["organism"]
    written = []
    for measurement in sorted(set(standing.content) - except_for):
        path = catalog.var_path(organism, measurement)
        known = _read_at(path, before).set_index("soma_joinid")
        _subtract(known, gone.features(measurement))
        table = pa.Table.from_pandas(known.sort_index().reset_index(), schema=schema.VAR_SCHEMA, preserve_index=False)
        _write_table(records.join(before.uri, path), table, timestamp)
        written.append(path)
    return written


def _subtract(var: pd.DataFrame, less: pd.DataFrame) -> None:
    for column in ("nnz", "n_measured_obs"):
        var.loc[less.index, column] -= less[column]


def _write_table(uri: str, table: pa.Table, timestamp: int, kind: Any = tiledbsoma.DataFrame) -> None:
    context = soma_context(written_bytes=table.nbytes)
    with kind.open(uri, "w", tiledb_timestamp=timestamp, context=context) as array:
        array.write(table.combine_chunks())


def _write_obs(uri: str, obs: pa.Table, timestamp: int) -> None:
    for start in range(0, len(obs), OBS_ROWS):
        _write_table(uri, obs.slice(start, OBS_ROWS).cast(schema.OBS_SCHEMA), timestamp)


def _write_presence(uri: str, reservation: Reservation, joinids: Any, timestamp: int) -> None:
    ascending = np.sort(joinids)
    rows = np.full(len(ascending), reservation.plan.dataset_joinid, dtype=np.int64)
    table = pa.table({"soma_dim_0": rows, "soma_dim_1": ascending, "soma_data": np.ones(len(rows), dtype=bool)})
    _write_table(uri, table, timestamp, tiledbsoma.SparseNDArray)


def _read_at(path: str, before: Lake) -> pd.DataFrame:
    """Read a table of the lake as it was at the parent commit; empty where it was made later."""
    uri, since = records.join(before.uri, path), catalog.last_whole(before.history, path)
    if since:
        return pa.concat_tables(read_parts(uri, since, before.commit.timestamp_ms)).to_pandas()
    try:
        opened = tiledbsoma.DataFrame.open(uri, context=soma_context(before.commit.timestamp_ms))
    except tiledbsoma.SOMAError as error:
        if is_of_store(error):
            raise
        opened = None
    if opened is None:
        with tiledbsoma.DataFrame.open(uri, context=soma_context(EVER)) as now:
            return now.schema.empty_table().to_pandas()
    with opened as frame:
        return frame.read().concat().to_pandas()


def _var_table(
    before: pd.DataFrame,
    reservation: Reservation,
    measurement: str,
    blocks: list[BlockStats],
    n_measured: int,
    gone: _Removed,
    *,
    is_whole: bool,
) -> pa.Table:
    """Return features with this dataset's counts: those that it touches, or all, so that no earlier write is needed."""
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
    known = before.set_index("soma_joinid")
    less = gone.features(measurement)
    _subtract(known, less)
    shared = mine.index.intersection(known.index)
    said = known.loc[shared]
    says = {
        "feature_name": ~_stands_for_a_name(said["feature_name"], said["feature_id"]),
        "feature_type": ~said["feature_type"].isin(["", "gene"]),
        "feature_length": said["feature_length"] > 0,
    }
    for column, told in says.items():  # what the first dataset said stays, if it said anything
        mine.loc[shared[told.to_numpy()], column] = said.loc[told, column]
    for column in ("nnz", "n_measured_obs"):
        mine.loc[shared, column] += known.loc[shared, column]
    others = (known if is_whole else less).index.difference(mine.index)
    if len(others):
        mine = pd.concat([mine, known.loc[others, mine.columns]]).rename_axis("soma_joinid")
    return pa.Table.from_pandas(mine.sort_index().reset_index(), schema=schema.VAR_SCHEMA, preserve_index=False)


def _stands_for_a_name(name: pd.Series, feature_id: pd.Series) -> pd.Series:
    """Say which names are none: nothing, or a feature's id, also with a version."""
    return (name == "") | (name == feature_id) | (name.str.replace(r"\.\d+$", "", regex=True) == feature_id)


def _dataset_table(reservation: Reservation) -> pa.Table:
    plan, info = reservation.plan, reservation.dataset.info
    row = {
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
    return pa.Table.from_pylist([row], schema=schema.INFO_SCHEMAS["datasets"])


def _info_tables(before: Lake, organism: str, obs: pa.Table, gone: pa.Table) -> dict[str, pa.Table]:
    """Return the Census's summaries with the cells of ``obs`` and without those of ``gone``, as far as they change."""
    counts = _cell_counts(_read_at("census_info/summary_cell_counts", before), organism, obs, gone)
    everything = counts[counts["category"] == "all"]
    summary = {
        "census_schema_version": schema.CENSUS_SCHEMA_VERSION,
        "census_build_date": _today(),
        "dataset_schema_version": schema.DATASET_SCHEMA_VERSION,
        "total_cell_count": str(everything["total_cell_count"].sum()),
        "unique_cell_count": str(everything["unique_cell_count"].sum()),
    }
    frames = {
        "summary_cell_counts": counts,
        "summary": pd.DataFrame(
            {"soma_joinid": range(len(summary)), "label": list(summary), "value": list(summary.values())}
        ),
    }
    if organism not in before.organisms:
        frames["organisms"] = _organisms(_read_at("census_info/organisms", before), organism)
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


def _cell_counts(known: pd.DataFrame, organism: str, obs: pa.Table, gone: pa.Table) -> pd.DataFrame:
    """Add a dataset's cells to the Census's counts by category and label, and take those of ``gone`` away.

    A label that loses its last cell stays, with zero.
    """
    parts = [known.drop(columns="soma_joinid").assign(order=known["soma_joinid"])]
    for table, sign in ((obs, 1), (gone, -1)):
        for start in range(0, len(table), OBS_ROWS):
            for category, counted in _tallied(table.slice(start, OBS_ROWS), sign):
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


def _tallied(obs: pa.Table, sign: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """Count some cells by the labels and terms of each category; each counts ``sign``."""
    frame = obs.select(["is_primary_data", *_category_columns()]).to_pandas().assign(cells=sign)
    frame["primary"] = frame["is_primary_data"] * sign
    groups = [("all", frame.assign(label="na", term="na"))]
    for category in schema.SUMMARY_CATEGORIES:
        terms = frame.get(f"{category}_ontology_term_id", "na")
        groups.append((category, frame.assign(label=frame[category], term=terms)))
    for category, rows in groups:
        counted = rows.groupby(["label", "term"], as_index=False, observed=True).agg(
            total_cell_count=("cells", "sum"), unique_cell_count=("primary", "sum")
        )
        counted = counted.rename(columns={"term": "ontology_term_id"})
        yield category, counted.astype({"label": object, "ontology_term_id": object})


def _category_columns() -> list[str]:
    terms = [f"{category}_ontology_term_id" for category in schema.SUMMARY_CATEGORIES]
    return [*schema.SUMMARY_CATEGORIES, *(term for term in terms if term in schema.OBS_DEFAULTS)]
