"""This module is the lake's catalog: what has been planned, named and committed, as append-only records.

::

    <lake>/somaflow/lake.json                        made last when the lake is made: without it there is no lake
    <lake>/somaflow/plans/000000000007.json          ranges handed out, before anything is written
    <lake>/somaflow/features/<organism>/<measurement>/000000000000.json   names of features, in joinid order
    <lake>/somaflow/commits/000000000007.json        what exists: the newest one decides what a reader sees
    <lake>/somaflow/vacuumed/000000000005.json       commits before this one can no longer be opened
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import records
from store.errors import ConflictError, StorageError
from store.schema import FEATURE_CAPACITY, DatasetPlan, Features

FORMAT = 3


@dataclass(frozen=True)
class Content:
    """What one measurement of a dataset holds: enough to recognise it when it is read again.

    Attributes:
        nnz: Stored values.
        total: Their sum.
        digest: Sum of the values' digests, in hex.
        layer: Where they stand: ``X[layer]``.
        fragments: Names of the TileDB fragments that hold them, ascending.
    """

    nnz: int
    total: float
    digest: str
    layer: str = "raw"
    fragments: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Commit:
    """One state of a lake that readers can open.

    Attributes:
        number: Position in the lake's history; 0 is the empty lake.
        timestamp_ms: Readers open every array at this TileDB timestamp.
        parent: The id of the commit before.
        dataset: Plan number, dataset id, organism, key and ranges of the dataset that it added; empty for number 0.
        content: Measurement to what was written and read back.
        superseded: Plan numbers of datasets that this commit took out of the lake.
        whole: Tables, by their path in the lake, that it wrote whole: earlier writes to them need not be read.
    """

    number: int
    timestamp_ms: int
    parent: str
    created: str
    dataset: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Content] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    superseded: tuple[int, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A digest of the whole record: two lakes with the same id went through the same history."""
        values = asdict(self)
        if not self.whole:  # records from before there was such a field keep their id
            del values["whole"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _numbered(number: int) -> str:
    return f"{number:012d}.json"


def commits(lake_uri: str) -> list[Commit]:
    """Read all commits, oldest first; empty where there is no lake.

    Raises:
        StorageError: One is missing between others, or a newer version of somaflow made one.
    """
    folder = records.join(lake_uri, records.FOLDER, "commits")
    found = [_commit(values) for values in records.read_all(folder)]
    for position, commit in enumerate(found):
        if commit.number != position:
            raise StorageError(
                f"{records.join(folder, _numbered(position))}: is lost, and later commits are there; bring it back "
                "from a copy of the lake: without it nobody knows which cells are in it"
            )
    return found


def _commit(values: dict[str, Any]) -> Commit:
    what = f"commit {values.get('number')}"
    content = {
        name: records.typed(Content, {**part, "fragments": tuple(part["fragments"])}, what)
        for name, part in values["content"].items()
    }
    several: dict[str, Any] = {name: tuple(values[name]) for name in ("superseded", "whole") if name in values}
    return records.typed(Commit, {**values, **several, "content": content}, what)


def current(history: Sequence[Commit]) -> list[Commit]:
    """Return the commits whose datasets are in the lake after ``history``: added, and not superseded since."""
    gone = {number for commit in history for number in commit.superseded}
    return [commit for commit in history if commit.dataset and commit.dataset["number"] not in gone]


def refusal(plan: DatasetPlan, held: Mapping[str, Any], by: str, *, replaces: bool) -> str:
    """Say why a dataset cannot take the name that another one has; nothing where it may, as a new version of it.

    Args:
        plan: Of the one that comes.
        held: ``organism`` and ``origin`` of the one that is there.
        by: What brought that one in.
        replaces: Whether the one that comes is a new version although it comes from elsewhere.
    """
    name = plan.dataset_id
    if held["organism"] != plan.organism:  # labels, presence and provenance go by the name alone
        return (
            f"dataset {name!r} is there already, of {held['organism']}; give this one another name with --set "
            f"dataset_id=NAME, or take that one out first: store remove {name} --organism {held['organism']}"
        )
    if held["origin"] != plan.origin and not replaces:
        return (
            f"dataset {name!r} is there already and comes from {held['origin']} ({by}); give this one another name "
            "with --set dataset_id=NAME, or, if it is a new version of that one, say --set replaces=true"
        )
    return ""


def last_whole(history: Sequence[Commit], table: str) -> int:
    """Return the timestamp from which on a table has to be read: 0 if all writes are needed.

    Args:
        history: Commits up to the one that is read, oldest first.
        table: Its path in the lake.
    """
    return next((commit.timestamp_ms for commit in reversed(history) if table in commit.whole), 0)


def var_path(organism: str, measurement: str) -> str:
    """Return the path of a var in the lake."""
    return f"census_data/{organism}/ms/{measurement}/var"


def first_openable(lake_uri: str) -> int:
    """Return the oldest commit that can still be opened: a vacuum removes what older ones need."""
    found = records.read_all(records.join(lake_uri, records.FOLDER, "vacuumed"))
    return max((record["first_openable"] for record in found), default=0)


def create_vacuumed(lake_uri: str, first: int) -> None:
    """Record that commits before ``first`` cannot be opened any more."""
    records.create(records.join(lake_uri, records.FOLDER, "vacuumed", _numbered(first)), {"first_openable": first})


def create_commit(lake_uri: str, commit: Commit) -> None:
    """Write a commit record.

    Raises:
        ConflictError: Another driver has meanwhile made a commit of this number.
    """
    if not records.create(records.join(lake_uri, records.FOLDER, "commits", _numbered(commit.number)), asdict(commit)):
        raise ConflictError(
            f"{lake_uri}: commit {commit.number} was made by another driver meanwhile; run the same command again"
        )


@dataclass(frozen=True)
class Plan:
    """Ranges handed to one dataset: soma_joinids ``obs_start`` to ``obs_start + n_obs``, one dataset joinid.

    ``origin`` says whose next version would replace this one: a file's address, or a name that its publisher gave.
    """

    number: int
    key: str
    dataset_id: str
    organism: str
    dataset_joinid: int
    obs_start: int
    n_obs: int
    origin: str = ""


def plans(lake_uri: str) -> list[Plan]:
    """Read all plans, oldest first.

    Raises:
        StorageError: A newer version of somaflow made one.
    """
    found = records.read_all(records.join(lake_uri, records.FOLDER, "plans"))
    return [records.typed(Plan, values, f"{lake_uri}: plan {values.get('number')}") for values in found]


def create_plan(
    lake_uri: str, known: Sequence[Plan], *, key: str, dataset_id: str, organism: str, n_obs: int, origin: str = ""
) -> Plan:
    """Hand out ranges behind all that were ever handed out; a range is never given twice.

    Raises:
        ConflictError: Another driver took the number first.
    """
    same_organism = [plan for plan in known if plan.organism == organism]
    same_name = next((plan.dataset_joinid for plan in same_organism if plan.dataset_id == dataset_id), None)
    fresh = 1 + max((plan.dataset_joinid for plan in known), default=-1)
    plan = Plan(
        number=1 + max((plan.number for plan in known), default=-1),
        key=key,
        dataset_id=dataset_id,
        organism=organism,
        dataset_joinid=fresh if same_name is None else same_name,
        obs_start=max((plan.obs_start + plan.n_obs for plan in same_organism), default=0),
        n_obs=n_obs,
        origin=origin,
    )
    if not records.create(records.join(lake_uri, records.FOLDER, "plans", _numbered(plan.number)), asdict(plan)):
        raise ConflictError(f"{lake_uri}: plan {plan.number} was made by another driver; run the same command again")
    return plan


class FeatureNames:
    """The features that one measurement of one organism ever had, in the order of their joinids."""

    def __init__(self, lake_uri: str, organism: str, measurement: str) -> None:
        self.folder = records.join(lake_uri, records.FOLDER, "features", organism, measurement)
        self.measurement = measurement
        self.rows: list[tuple[str, str, str, int]] = []
        self.joinid: dict[str, int] = {}
        self._n_records = 0
        for record in records.read_all(self.folder):
            self._extend(record["rows"])

    def _extend(self, rows: list[list[Any]]) -> None:
        for feature_id, name, kind, length in rows:
            self.joinid[feature_id] = len(self.rows)
            self.rows.append((feature_id, name, kind, length))
        self._n_records += 1

    def joinids(self, features: Features) -> NDArray[np.int64]:
        """Return each feature's joinid, naming in one new record those that have none yet.

        Raises:
            ConflictError: The measurement is full, or another driver named features meanwhile.
        """
        columns = zip(
            features.feature_id, features.feature_name, features.feature_type, features.feature_length, strict=True
        )
        fresh = [list(row) for row in columns if row[0] not in self.joinid]
        if len(self.rows) + len(fresh) > FEATURE_CAPACITY[self.measurement]:
            raise ConflictError(
                f"{self.folder}: {len(fresh):,} new features do not fit beside {len(self.rows):,} of at most "
                f"{FEATURE_CAPACITY[self.measurement]:,} {self.measurement} features; map them to a common vocabulary"
            )
        if fresh:
            if not records.create(records.join(self.folder, _numbered(self._n_records)), {"rows": fresh}):
                raise ConflictError(f"{self.folder}: another driver named features; run the same command again")
            self._extend(fresh)
        return np.array([self.joinid[name] for name in features.feature_id], dtype=np.int64)
