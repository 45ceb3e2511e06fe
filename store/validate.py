"""This module proves a lake: it reads everything again and compares with what the commits promised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from store import schema, snapshot
from store.catalog import Commit
from store.context import reading
from store.errors import SomaflowError, StorageError
from store.lake import Lake
from store.writer import content_digest

READ_CELLS = 65536
LOST = ("No such file", "Response Code: 404")
"""What TileDB says of a file that is gone, on a disk and on S3."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was wrong with it (empty: nothing).

    Attributes:
        unread: It could not be looked at: the store does not answer, or refuses. Nothing is said of what it holds.
    """

    name: str
    subject: str
    problem: str = ""
    unread: bool = False


def _unreadable(name: str, subject: str, error: Exception) -> Check:
    lost = any(words in str(error) for words in LOST)
    told = str(error) if isinstance(error, SomaflowError) else f"cannot be read: {type(error).__name__}: {error}"
    return Check(name, subject, told, unread=isinstance(error, StorageError) and not lost)


def validate(lake: Lake, progress: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Check a lake's layout, joinids, counts, totals and snapshots; read-only, reads every count once."""
    checks: list[Check] = []
    for step in (_layout, _obs, _var, _presence, _counts, _snapshots):
        name = step.__name__.strip("_")
        progress(name)
        try:
            with reading(lake.uri):
                checks.extend(step(lake))
        except Exception as error:  # noqa: BLE001  whatever the storage raises is the finding
            checks.append(_unreadable(name, lake.uri, error))
    return checks


def _layout(lake: Lake) -> Iterator[Check]:
    info = lake.root["census_info"]
    for name, columns in schema.INFO_SCHEMAS.items():
        found = set(info[name].schema.names) if name in info else set()
        missing = sorted(set(columns.names) - found)
        yield Check("layout", f"census_info/{name}", f"lacks {', '.join(missing)}" if missing else "")
    for organism in lake.organisms:
        experiment = lake.experiment(organism)
        for measurement in lake.measurements(organism):
            members = set(experiment.ms[measurement].keys())
            missing = sorted({"var", "X", "feature_dataset_presence_matrix"} - members)
            yield Check("layout", f"{organism}/{measurement}", f"lacks {', '.join(missing)}" if missing else "")


def _datasets(lake: Lake, organism: str) -> list[Commit]:
    return [commit for commit in lake.current if commit.dataset["organism"] == organism]


def _obs(lake: Lake) -> Iterator[Check]:
    for organism in lake.organisms:
        commits = _datasets(lake, organism)
        commits.sort(key=lambda commit: int(commit.dataset["obs_start"]))
        starts, n_obs = (np.array([commit.dataset[key] for commit in commits]) for key in ("obs_start", "n_obs"))
        names = [commit.dataset["dataset_id"] for commit in commits]
        seen = np.zeros(starts[-1] + n_obs[-1], dtype=bool)
        mine, n_rows, n_twice = np.zeros(len(commits), np.int64), 0, 0
        for part in lake.experiment(organism).obs.read(column_names=["soma_joinid", "dataset_id"]):
            joinids = part["soma_joinid"].to_numpy()
            of = pa.compute.index_in(part["dataset_id"], pa.array(names, pa.large_string())).fill_null(-1).to_numpy()
            slot = np.searchsorted(starts, joinids, side="right") - 1
            right = (slot >= 0) & (of == slot) & (joinids < starts[slot] + n_obs[slot])
            mine += np.bincount(slot[right], minlength=len(commits))
            n_rows += len(joinids)
            known = joinids[joinids < len(seen)]
            n_twice += len(known) - int(np.count_nonzero(~seen[np.unique(known)]))
            seen[known] = True
        yield Check("obs joinids unique", organism, f"{n_twice} joinids stand twice" if n_twice else "")
        strays = n_rows - int(n_obs.sum())
        problem = f"{strays:+} cells beside the {n_obs.sum()} of committed datasets" if strays else ""
        yield Check("obs rows", organism, problem)
        for name, has, promised in zip(names, mine, n_obs, strict=True):
            yield Check("obs of dataset", name, "" if has == promised else "cells lack or are another's")


def _var(lake: Lake) -> Iterator[Check]:
    for organism in lake.organisms:
        for measurement in lake.measurements(organism):
            var = lake.var(organism, measurement)
            ids, joinids = var["feature_id"].to_pylist(), var["soma_joinid"].to_numpy()
            subject = f"{organism}/{measurement}"
            problem = (
                "" if len(set(ids)) == len(ids) and len(set(joinids)) == len(joinids) else "a feature stands twice"
            )
            yield Check("features unique", subject, problem)
            promised = sum(c.content[measurement].nnz for c in _datasets(lake, organism) if measurement in c.content)
            found = int(var["nnz"].to_numpy().sum())
            problem = "" if found == promised else f"var counts {found} non-zeros, the commits {promised}"
            yield Check("feature totals", subject, problem)


def _presence(lake: Lake) -> Iterator[Check]:
    """Which dataset measures what: once per dataset and measurement, and once per dataset and feature."""
    for organism in lake.organisms:
        commits = _datasets(lake, organism)
        rows = lake.measurement_presence(organism).to_pylist()
        said = {
            (row["dataset_id"], row["measurement"], row["layer"], row["obs_start"], row["obs_stop"]) for row in rows
        }
        promised = {
            (one["dataset_id"], measurement, content.layer, one["obs_start"], one["obs_start"] + one["n_obs"])
            for commit in commits
            for one in [commit.dataset]
            for measurement, content in commit.content.items()
        }
        problem = "" if said == promised else f"{len(said ^ promised)} rows differ from the commits"
        yield Check("presence of measurements", organism, problem)
        for measurement in lake.measurements(organism):
            measuring = {commit.dataset["dataset_joinid"] for commit in commits if measurement in commit.content}
            found = set(np.flatnonzero(np.diff(lake.presence(organism, measurement).indptr)).tolist())
            problem = "" if found == measuring else f"{len(found ^ measuring)} datasets differ from the commits"
            yield Check("presence of features", f"{organism}/{measurement}", problem)


def _counts(lake: Lake) -> Iterator[Check]:
    for organism in lake.organisms:
        for commit in _datasets(lake, organism):
            for measurement, content in commit.content.items():
                subject = f"{commit.dataset['dataset_id']}/{measurement}"
                try:
                    with reading(subject):
                        nnz, digest = _read_content(lake, organism, measurement, content.layer, commit.dataset)
                except Exception as error:  # noqa: BLE001  whatever the storage raises is the finding
                    yield _unreadable("counts", subject, error)
                    continue
                same = nnz == content.nnz and f"{digest:016x}" == content.digest
                yield Check(
                    "counts", subject, "" if same else f"{nnz} non-zeros differ from the {content.nnz} committed"
                )


def _read_content(lake: Lake, organism: str, measurement: str, layer: str, dataset: dict[str, Any]) -> tuple[int, int]:
    nnz, digest = 0, 0
    stop = dataset["obs_start"] + dataset["n_obs"]
    matrix = lake.experiment(organism).ms[measurement].X[layer]
    for first in range(dataset["obs_start"], stop, READ_CELLS):
        for part in matrix.read((slice(first, min(first + READ_CELLS, stop) - 1),)).tables():
            nnz += part.num_rows
            columns = (part[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            digest += content_digest(*columns)
    return nnz, digest % 2**64


def _snapshots(lake: Lake) -> Iterator[Check]:
    for name in snapshot.list_snapshots(lake.uri):
        try:
            snapshot.open_snapshot(lake.uri, name).verify()
        except Exception as error:  # noqa: BLE001  whatever the storage raises is the finding
            yield _unreadable("snapshot", name, error)
        else:
            yield Check("snapshot", name)
