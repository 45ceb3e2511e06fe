"""This module makes a lake and reads it as it was at one commit.

Shape letters used in this module:
    C  cells asked for      G  features named so far in a measurement
"""

from __future__ import annotations

import ast
import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import fsspec
import numpy as np
import pyarrow as pa
import scipy.sparse
import tiledbsoma
from numpy.typing import NDArray

from store import catalog, records, schema
from store.catalog import Commit
from store.context import is_of_store, read_parts, reading, reason_of, soma_context
from store.errors import ConflictError, MissingError, StorageError, UsageError
from store.members import enter, members, newest_stamp, write_time

CUTS = "#?;"
"""Signs behind which SOMA does not read a path on."""


def utc_now() -> str:
    """Return the time of day as ISO 8601 in UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def refuse_place(uri: str) -> None:
    """Refuse a place that SOMA would take for another one: it reads paths as URIs, and cuts them at some signs.

    Raises:
        UsageError: The path is such a one, or names no bucket.
    """
    for sign in CUTS:
        if sign in uri:
            raise UsageError(f"{uri}: a lake cannot stand where the path has a {sign!r}; choose a path without it")
    if records.is_local(uri):
        return
    bucket, *folders = uri.partition("://")[2].split("/")
    if not bucket:
        raise UsageError(f"{uri}: names no bucket; say s3://BUCKET/PATH")
    if "" in folders:
        raise UsageError(f"{uri}: a lake cannot stand where the path has two slashes together; take one away")


def create_lake(uri: str) -> None:
    """Make an empty lake at ``uri``; nothing happens where there is one.

    A lake that a killed process left half-made is made anew.

    Raises:
        ConflictError: Something that is no lake stands there.
        UsageError: No lake can stand there.
    """
    uri = records.absolute(uri)
    refuse_place(uri)
    marker = records.join(uri, records.FOLDER, "lake.json")
    if records.read(marker) is not None:
        return
    if not catalog.commits(uri):
        _create_empty(uri)
    records.create(marker, {"format": catalog.FORMAT, "created": utc_now()})


def _create_empty(uri: str) -> None:
    """Make the collections of a lake that has no commit yet, and the first commit."""
    begun = records.join(uri, records.FOLDER, "begun.json")
    if records.read(begun) is not None:
        for member in ("census_info", "census_data", "__group", "__meta", "__tiledb_group.tdb"):
            records.remove(records.join(uri, member))
    elif records.exists(records.join(uri, "__tiledb_group.tdb")) or _holds_files(uri):
        raise ConflictError(f"{uri}: holds something that is not a lake; choose an empty place")
    records.create(begun, {"format": catalog.FORMAT})
    _create_collections(uri)
    catalog.create_commit(uri, Commit(number=0, timestamp_ms=write_time(uri), parent="", created=utc_now()))


def _holds_files(uri: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        return any(not name.rstrip("/").endswith("/" + records.FOLDER) for name in filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        return True


def _create_collections(uri: str) -> None:
    with tiledbsoma.Collection.create(uri, context=soma_context()) as root:
        root.metadata["somaflow_format"] = catalog.FORMAT
        root.add_new_collection("census_data")
        info = root.add_new_collection("census_info")
        for name, columns in schema.INFO_SCHEMAS.items():
            _add_table(info, name, columns, schema.CELL_CAPACITY)


def _add_table(group: Any, name: str, columns: pa.Schema, capacity: int) -> None:
    group.add_new_dataframe(
        name,
        schema=columns,
        index_column_names=["soma_joinid"],
        domain=[(0, capacity - 1)],
        platform_config=schema.table_options(columns),
    )


def ensure_measurement(uri: str, organism: str, measurement: str, layer: str, *, after_ms: int) -> int:
    """Make the organism's experiment, its measurement and the layer of its X where they are missing.

    A member that a killed process made but did not enter in its group is removed and made anew: nothing can have
    been committed to it. It is entered after ``after_ms``, so that readers of earlier commits do not see it.

    Returns:
        The timestamp from which on all three are seen: a commit to them must not be earlier.

    Raises:
        StorageError: One that is not entered in its group is not new: a commit or a plan names it.
    """
    data_uri = records.join(uri, "census_data")
    ms_uri = records.join(data_uri, organism, "ms")
    layers_uri = records.join(ms_uri, measurement, "X")
    names = (organism, measurement, layer)
    for depth, group_uri in enumerate((data_uri, ms_uri, layers_uri)):
        if (name := names[depth]) not in members(group_uri):
            _refuse_loss(uri, names[: depth + 1], group_uri)
            member_uri = records.join(group_uri, name)
            records.remove(member_uri)
            if depth == 0:
                _create_experiment(member_uri)
            elif depth == 1:
                _create_measurement(member_uri, measurement)
            else:
                _create_layer(member_uri, measurement)
            enter(group_uri, name, name, write_time(group_uri, after_ms))
    return max(newest_stamp(group_uri) for group_uri in (data_uri, ms_uri, layers_uri))


def _refuse_loss(uri: str, names: tuple[str, ...], group_uri: str) -> None:
    """Refuse to make a member anew, given by organism, measurement and layer as far as it goes, that is not new.

    Raises:
        StorageError: A commit has counts in it, or a plan or names of features say that it was made.
    """
    organism, *inside = names
    held: set[tuple[str, ...]] = {
        (commit.dataset["organism"], measurement, content.layer)
        for commit in catalog.commits(uri)
        for measurement, content in commit.content.items()
    }
    if not inside:
        held |= {(plan.organism,) for plan in catalog.plans(uri)}
    elif len(inside) == 1 and catalog.FeatureNames(uri, organism, inside[0]).rows:
        held.add(names)
    if any(one[: len(names)] == names for one in held):
        raise StorageError(
            f"{group_uri}: does not name {names[-1]!r}, and datasets of {'/'.join(names)} were committed or begun; "
            "nothing was removed: bring the files of that folder's __group back from a copy of the lake"
        )


def _create_experiment(uri: str) -> None:
    with tiledbsoma.Experiment.create(uri, context=soma_context()) as experiment:
        _add_table(experiment, "obs", schema.OBS_SCHEMA, schema.CELL_CAPACITY)
        _add_table(experiment, "obs_measurement_presence", schema.MEASUREMENT_PRESENCE, schema.CELL_CAPACITY)
        experiment.add_new_collection("ms")


def _create_layer(uri: str, measurement: str) -> None:
    tiledbsoma.SparseNDArray.create(
        uri,
        type=pa.float32(),
        shape=(schema.CELL_CAPACITY, schema.FEATURE_CAPACITY[measurement]),
        platform_config=schema.counts_options(schema.ROW_TILE[measurement]),
        context=soma_context(),
    ).close()


def _create_measurement(uri: str, measurement: str) -> None:
    capacity = schema.FEATURE_CAPACITY[measurement]
    with tiledbsoma.Measurement.create(uri, context=soma_context()) as member:
        _add_table(member, "var", schema.VAR_SCHEMA, capacity)
        member.add_new_collection("X")
        member.add_new_sparse_ndarray(
            "feature_dataset_presence_matrix",
            type=pa.bool_(),
            shape=(schema.DATASET_CAPACITY, capacity),
            platform_config=schema.counts_options(),
        )


def table_uris(uri: str) -> list[str]:
    """Return the arrays of a lake that every commit writes to: all but the layers of X."""
    found = [records.join(uri, "census_info", name) for name in schema.INFO_SCHEMAS]
    for organism in sorted(members(records.join(uri, "census_data"))):
        experiment = records.join(uri, "census_data", organism)
        found += [records.join(experiment, name) for name in ("obs", "obs_measurement_presence")]
        for measurement in sorted(members(records.join(experiment, "ms"))):
            member = records.join(experiment, "ms", measurement)
            found += [records.join(member, name) for name in ("var", "feature_dataset_presence_matrix")]
    return found


def layer_uris(uri: str) -> list[str]:
    """Return all layers of X of a lake."""
    return [
        records.join(layers_uri, layer)
        for organism in sorted(members(records.join(uri, "census_data")))
        for ms_uri in [records.join(uri, "census_data", organism, "ms")]
        for measurement in sorted(members(ms_uri))
        for layers_uri in [records.join(ms_uri, measurement, "X")]
        for layer in sorted(members(layers_uri))
    ]


def open_lake(uri: str, commit: int | None = None) -> Lake:
    """Open the lake at ``uri`` as it was at commit number ``commit`` (none: the newest).

    Raises:
        MissingError: There is no lake, or no such commit, or a vacuum has removed what it needs.
        StorageError: The lake was made by another version of its format, or its store does not answer.
        UsageError: No lake can stand there.
    """
    uri = records.absolute(uri)
    refuse_place(uri)
    history = catalog.commits(uri)
    if not history:
        raise MissingError(f"{uri}: no lake here; make one with: python -m ingest run SOURCE --lake {uri}")
    if commit is None:
        return Lake(uri, history)
    if not 0 <= commit < len(history):
        raise MissingError(f"{uri}: no commit {commit}; the lake has commits 0 to {len(history) - 1}")
    if commit < (first := catalog.first_openable(uri)):
        raise MissingError(f"{uri}: commit {commit} was vacuumed; the oldest that can be opened is {first}")
    return Lake(uri, history[: commit + 1])


def _refuse_fractions(where: str, columns: pa.Schema) -> None:
    """Refuse a filter that compares whole numbers with a fraction: SOMA would cut it (``nnz >= 6.5`` took 6 too).

    What does not parse is left to SOMA to refuse.
    """
    try:
        compared = [node for node in ast.walk(ast.parse(where.strip(), mode="eval")) if isinstance(node, ast.Compare)]
    except (SyntaxError, ValueError):
        return
    whole = {column.name for column in columns if pa.types.is_integer(column.type)}
    for comparison in compared:
        inside = list(ast.walk(comparison))
        words = {n.id if isinstance(n, ast.Name) else n.value for n in inside if isinstance(n, ast.Name | ast.Constant)}
        names = sorted(word for word in words if isinstance(word, str) and word in whole)
        fractions = sorted(word for word in words if isinstance(word, float) and not word.is_integer())
        if names and fractions:
            raise UsageError(
                f"where = {where!r}: {names[0]} holds whole numbers, and SOMA would cut {fractions[0]:g} to one; say a "
                "whole number"
            )


Method = TypeVar("Method", bound=Callable[..., Any])


def _guarded(read: Method) -> Method:
    """Let a method of a Lake tell what its store raises as an error of ours that names what was read."""

    @wraps(read)
    def guarded(lake: Lake, *given: Any, **named: Any) -> Any:
        with reading(f"{lake.uri}: {read.__name__}"):
            return read(lake, *given, **named)

    return cast("Method", guarded)


class Lake:
    """One commit of a lake, opened for reading; later commits do not change what it answers.

    Attributes:
        history: All commits up to this one, oldest first.
        commit: This one.
        current: Those of them whose datasets are in the lake: a superseded version is not.
    """

    def __init__(self, uri: str, history: list[Commit]) -> None:
        self.uri = uri
        self.history = history
        self.commit = history[-1]
        self.current = catalog.current(history)
        self._n_features: dict[tuple[str, str], int] = {}

    def confirm(self) -> None:
        """Make sure that what was read up to now was all there: a vacuum may have let this commit go meanwhile.

        Raises:
            MissingError: It has.
        """
        first = catalog.first_openable(self.uri)
        if self.commit.number < first:
            raise MissingError(
                f"{self.uri}: commit {self.commit.number} was vacuumed while it was being read; the oldest that can be "
                f"opened is {first}: open the lake again"
            )

    def pending(self) -> list[catalog.Plan]:
        """Return plans that were begun and have no commit, as things are now: a driver works on them, or one died.

        A plan is given up when a later one of the same dataset has a commit: the file changed meanwhile.
        """
        done = [commit.dataset for commit in catalog.commits(self.uri) if commit.dataset]
        numbers = {dataset["number"] for dataset in done}
        newest: dict[tuple[str, str], int] = {}
        for dataset in done:
            name = (dataset["organism"], dataset["dataset_id"])
            newest[name] = max(dataset["number"], newest.get(name, -1))
        return [
            plan
            for plan in catalog.plans(self.uri)
            if plan.number not in numbers and plan.number > newest.get((plan.organism, plan.dataset_id), -1)
        ]

    @cached_property
    def root(self) -> Any:
        """The lake as a SOMA collection at the commit's timestamp (``cellxgene_census`` takes it as a census)."""
        return tiledbsoma.Collection.open(self.uri, context=soma_context(self.commit.timestamp_ms))

    @_guarded
    def experiment(self, organism: str) -> Any:
        """Return an organism's SOMA Experiment.

        Raises:
            UsageError: The lake has no cells of it.
        """
        if organism not in self.organisms:
            known = ", ".join(self.organisms) or "none yet"
            raise UsageError(f"{self.uri}: no cells of organism {organism!r}; organisms here: {known}")
        return self.root["census_data"][organism]

    @cached_property
    def organisms(self) -> list[str]:
        """Organisms with at least one committed dataset, in alphabetical order."""
        return sorted({commit.dataset["organism"] for commit in self.current})

    @_guarded
    def measurements(self, organism: str) -> list[str]:
        """Return the measurements that an organism has, RNA first."""
        ms = self.experiment(organism).ms
        return [name for name in schema.MEASUREMENTS if name in ms]

    def _ranges(self, organism: str) -> NDArray[np.int64]:
        """Committed joinid ranges, half-open, ascending: [datasets, 2]."""
        ranges = [
            (commit.dataset["obs_start"], commit.dataset["obs_start"] + commit.dataset["n_obs"])
            for commit in self.current
            if commit.dataset["organism"] == organism
        ]
        return np.array(sorted(ranges), dtype=np.int64).reshape(-1, 2)

    @_guarded
    def obs(
        self,
        organism: str,
        where: str | None = None,
        columns: list[str] | None = None,
        span: tuple[int, int] | None = None,
        coded: Sequence[str] = (),
    ) -> pa.Table:
        """Return the obs rows that ``where`` selects, in joinid order.

        Args:
            organism: One of ``organisms``.
            where: A SOMA value filter, such as ``"tissue == 'blood' and is_primary_data == True"``.
            columns: Columns wanted (none: all); ``soma_joinid`` is always among them.
            span: First and last joinid to look at (none: all).
            coded: Columns of text that come as dictionaries, one for all cells: a text of which there are few distinct
                ones then takes 4 bytes a cell.

        Raises:
            UsageError: Unknown organism, a column that obs does not have, or a filter that does not parse or compares
                a column of whole numbers with a fraction.
        """
        obs = self.experiment(organism).obs
        unknown = sorted(set(columns or ()) - set(obs.schema.names))
        if unknown:
            raise UsageError(f"obs has no column {unknown[0]!r}; columns: {', '.join(obs.schema.names)}")
        if where is not None:
            _refuse_fractions(where, obs.schema)
        wanted = None if columns is None else ["soma_joinid", *(name for name in columns if name != "soma_joinid")]
        ranges = self._ranges(organism)
        parts = [self._held(part, ranges, coded) for part in self._obs_parts(obs, where, wanted, span)]
        table = pa.concat_tables(parts).unify_dictionaries()
        in_order = bool(np.all(np.diff(table["soma_joinid"].to_numpy()) > 0))
        return table if in_order else table.sort_by("soma_joinid")

    def _obs_parts(
        self, obs: Any, where: str | None, wanted: list[str] | None, span: tuple[int, int] | None
    ) -> Iterator[pa.Table]:
        """Read obs a part at a time; what goes wrong in reading is told as what it is about."""
        rows = () if span is None else (slice(*span),)
        try:
            yield from obs.read(rows, value_filter=where, column_names=wanted)
        except (tiledbsoma.SOMAError, ValueError, SyntaxError, KeyError) as error:
            if is_of_store(error):
                raise StorageError(
                    f"{self.uri}: obs cannot be read: {reason_of(error)}; open the lake again: small "
                    "files may have been merged since; if that does not help, check the place and your rights to it"
                ) from None
            if where is None or "Query FAILED" in str(error) or "Checksum" in str(error):
                with reading(f"{self.uri}: obs"):
                    raise
            raise UsageError(
                f"where = {where!r}: {str(error).strip().splitlines()[0]}; columns: {', '.join(obs.schema.names)}"
            ) from None

    @staticmethod
    def _held(part: pa.Table, ranges: NDArray[np.int64], coded: Sequence[str]) -> pa.Table:
        """Return the rows that lie in one of these ranges of joinids, some columns as dictionaries."""
        joinids = part["soma_joinid"].to_numpy()
        slot = np.searchsorted(ranges[:, 0], joinids, side="right") - 1
        inside = (slot >= 0) & (joinids < ranges[np.maximum(slot, 0), 1])
        part = part if inside.all() else part.filter(pa.array(inside))
        for name in coded:
            part = part.set_column(part.schema.names.index(name), name, part[name].dictionary_encode())
        return part

    @_guarded
    def var(self, organism: str, measurement: str) -> pa.Table:
        """Return a measurement's features, in joinid order."""
        return self._var(organism, measurement).sort_by("soma_joinid")

    def _var(self, organism: str, measurement: str, columns: list[str] | None = None) -> pa.Table:
        member = self._measurement(organism, measurement)
        path = catalog.var_path(organism, measurement)
        since = catalog.last_whole(self.history, path)
        if since == 0:
            return member.var.read(column_names=columns).concat()
        parts = list(read_parts(records.join(self.uri, path), since, self.commit.timestamp_ms, columns))
        self.confirm()
        return pa.concat_tables(parts)

    @_guarded
    def datasets(self) -> pa.Table:
        """Return the Census's datasets table with our provenance columns, in joinid order."""
        return self.root["census_info"]["datasets"].read().concat().sort_by("soma_joinid")

    @_guarded
    def presence(self, organism: str, measurement: str) -> scipy.sparse.csr_matrix:
        """Return which dataset (row, dataset joinid) measures which feature (column, var joinid), as booleans."""
        matrix = self._measurement(organism, measurement)["feature_dataset_presence_matrix"]
        with reading(matrix.uri):
            found = matrix.read().tables().concat()
        rows, columns = found["soma_dim_0"].to_numpy(), found["soma_dim_1"].to_numpy()
        n_datasets = 1 + max((int(commit.dataset["dataset_joinid"]) for commit in self.current), default=-1)
        shape = (n_datasets, self.n_features(organism, measurement))
        return scipy.sparse.coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=shape).tocsr()

    @_guarded
    def measurement_presence(self, organism: str) -> pa.Table:
        """Return which ranges of cells have which measurement, and in which layer of its X."""
        return self.experiment(organism)["obs_measurement_presence"].read().concat().sort_by("soma_joinid")

    @_guarded
    def counts(
        self, organism: str, measurement: str, joinids: NDArray[np.int64], layer: str = "raw"
    ) -> scipy.sparse.csr_matrix:
        """Return counts_CG of a layer as float32, one row for each of ``joinids`` in the order asked.

        Column j is the feature with joinid j. A cell that was not measured is an empty row: ask obs which they are.
        Read contiguous joinids together: scattered ones are slow.

        Raises:
            UsageError: Unknown measurement or layer.
            MissingError: A vacuum let the commit go meanwhile.
        """
        joinids = np.asarray(joinids, dtype=np.int64)
        in_order = bool(np.all(joinids[1:] > joinids[:-1]))
        ascending = joinids if in_order else np.unique(joinids)
        shape = (len(ascending), self.n_features(organism, measurement))
        if len(joinids) == 0:
            nothing = np.empty(0, dtype=np.int64)
            return scipy.sparse.coo_matrix((nothing.astype(np.float32), (nothing, nothing)), shape=shape).tocsr()
        contiguous = int(ascending[-1] - ascending[0]) == len(ascending) - 1
        rows = slice(int(ascending[0]), int(ascending[-1])) if contiguous else pa.array(ascending)
        layers = self._measurement(organism, measurement).X
        if layer not in layers:
            known = ", ".join(layers)
            raise UsageError(f"{self.uri}: {organism} {measurement} has no layer {layer!r}; layers: {known}")
        try:
            with reading(layers[layer].uri):
                found = layers[layer].read((rows,)).tables().concat()
        finally:
            self.confirm()  # a read that failed may have failed for that
        row_of = found["soma_dim_0"].to_numpy()
        row_of = row_of - ascending[0] if contiguous else np.searchsorted(ascending, row_of)
        columns, values = found["soma_dim_1"].to_numpy(), found["soma_data"].to_numpy()
        by_joinid = scipy.sparse.coo_matrix((values, (row_of, columns)), shape=shape).tocsr()
        return by_joinid if in_order else by_joinid[np.searchsorted(ascending, joinids)]

    def _measurement(self, organism: str, measurement: str) -> Any:
        experiment = self.experiment(organism)
        if measurement not in experiment.ms:
            known = ", ".join(self.measurements(organism))
            raise UsageError(f"{self.uri}: {organism} has no measurement {measurement!r}; measurements: {known}")
        return experiment.ms[measurement]

    @_guarded
    def n_features(self, organism: str, measurement: str) -> int:
        """Return how many joinids the features of a measurement take: columns of its counts."""
        key = (organism, measurement)
        if key not in self._n_features:
            joinids = self._var(organism, measurement, ["soma_joinid"])["soma_joinid"].to_numpy()
            self._n_features[key] = 1 + int(joinids.max(initial=-1))
        return self._n_features[key]
