"""This module finds what a snapshot takes of a commit: which cells, measurements and features, and how large they are.

Shape letters used in this module:
    C  chosen cells      D  datasets
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from store import schema
from store.catalog import Commit
from store.errors import UsageError
from store.lake import Lake
from store.snapshot import Snapshot
from store.splits import SnapshotSettings, coded

CELL_ELEMENTS = 32
"""Values that a cell's labels take as much memory as: some 2 KB, in which most texts stand three or four times."""


def chosen_cells(lake: Lake, settings: SnapshotSettings, *, refreshed: bool) -> pa.Table:
    """Return what places, splits, sizes and units need of each chosen cell, in lake order; texts as dictionaries."""
    organisms = settings.organisms or tuple(lake.organisms)
    there = [name for name in organisms if name in lake.organisms or not refreshed]  # the others had cells once
    measured = (schema.measured_column(name) for name in schema.MEASUREMENTS)
    sets = (*settings.set_by, "x", "y") if settings.set_size else ()
    units = ("time_unit", "dose_unit")
    wanted = list(dict.fromkeys(["soma_joinid", "nnz", *settings.split_columns, *sets, *measured, *units]))
    parts = []
    for organism in there:
        texts = [name for name in wanted if schema.OBS_SCHEMA.field(name).type == pa.large_string()]
        table = lake.obs(organism, settings.where, wanted, coded=texts)
        if table.num_rows:
            nought = pa.array(np.zeros(table.num_rows, np.int32))
            column = pa.DictionaryArray.from_arrays(nought, pa.array([organism]))
            parts.append(table.append_column("organism", column))
    if not parts:
        place = ", ".join(organisms) or "the lake"
        fits = (
            f"no cell fits where = {settings.where!r} in {place}"
            if settings.where
            else f"there are no cells in {place}"
        )
        raise UsageError(f"{lake.uri}: {fits}; see: python -m store info --lake {lake.uri}")
    return pa.concat_tables(parts).unify_dictionaries()


def n_of_each(cells: pa.Table, column: str) -> dict[str, int]:
    """Return the values of a column of texts, those of most cells first, to how many cells have each; "" is none."""
    values, number_C = coded(cells, column)
    counts = zip(values, np.bincount(number_C, minlength=len(values)).tolist(), strict=True)
    return dict(sorted(((value, n_cells) for value, n_cells in counts if value), key=lambda pair: (-pair[1], pair[0])))


def chosen_measurements(
    lake: Lake, cells: pa.Table, settings: SnapshotSettings, base: Snapshot | None
) -> tuple[list[str], list[str]]:
    """Return the measurements, and of which of them levels are taken.

    A measurement has the same layer in all cells; those that have it in another one count as not measured. What the
    base has stays as it is there. Its settings fitted the lake when it was made: what they name and no chosen cell has
    any more is passed over.

    Raises:
        UsageError: A named measurement that no chosen cell has, of the wanted kind; no measurement at all.
    """
    counted = {
        name for name in schema.MEASUREMENTS if pa.compute.any(cells[schema.measured_column(name)]).as_py() is True
    }
    leveled = _with_levels(lake, cells)
    for name in settings.levels:
        if name not in leveled and base is None:
            raise UsageError(
                f"levels: no chosen cell has levels of {name!r}; levels here: {', '.join(sorted(leveled))}"
            )
    levels = set(settings.levels) | (leveled - counted)
    if base:
        levels = set(base.levels) | (levels - set(base.measurements))
    present = [name for name in schema.MEASUREMENTS if name in counted | leveled]
    if not present:
        raise UsageError(
            f"{lake.uri}: none of the {cells.num_rows:,} chosen cells has counts or levels; normalised values "
            "(lognorm) are kept in the lake, but not made snapshots of: ingest the counts, or choose other cells"
        )
    chosen = [name for name in present if not settings.measurements or name in settings.measurements]
    absent = [name for name in (*settings.measurements, *settings.features) if name not in present]
    if absent and (base is None or not chosen):
        raise UsageError(f"no chosen cell has measurement {absent[0]!r}; measurements here: {', '.join(present)}")
    return chosen, [name for name in chosen if name in levels]


def without(lake: Lake, cells: pa.Table, layers: dict[str, str]) -> int:
    """Count the cells of which nothing that the snapshot holds was measured: their values are in another layer."""
    has_C = np.zeros(cells.num_rows, dtype=bool)
    for name, layer in layers.items():
        if layer == "raw":
            has_C |= cells[schema.measured_column(name)].to_numpy()
    for row, positions in _of_levels(lake, cells):
        if layers.get(row["measurement"]) == "value":
            has_C[positions] = True
    return int(np.count_nonzero(~has_C))


def _with_levels(lake: Lake, cells: pa.Table) -> set[str]:
    """Return the measurements of which some chosen cells have levels."""
    return {
        row["measurement"] for row, positions in _of_levels(lake, cells) if row["n_measured_obs"] and len(positions)
    }


def _of_levels(lake: Lake, cells: pa.Table) -> Iterator[tuple[dict[str, Any], NDArray[np.int64]]]:
    """Yield what is said of each dataset's levels of a measurement, and the places of its cells among the chosen."""
    organisms, organism_C = coded(cells, "organism")
    joinid_C = cells["soma_joinid"].to_numpy()
    for number, organism in enumerate(organisms):
        mine = np.flatnonzero(organism_C == number)
        for row in lake.measurement_presence(organism).to_pylist():
            if row["layer"] == "value":
                first, stop = np.searchsorted(joinid_C[mine], [row["obs_start"], row["obs_stop"]])
                yield row, mine[first:stop]


def kept_features(
    lake: Lake, settings: SnapshotSettings, organisms: list[str], measurements: list[str], *, refreshed: bool
) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Return measurement to organism to which joinids are kept, for measurements of which only some are.

    Raises:
        UsageError: A feature that no organism has; in a refresh, one had it and has gone.
    """
    kept: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for name in measurements:
        if name not in settings.features:
            continue
        wanted, found = set(settings.features[name]), set()
        kept[name] = {}
        for organism in organisms:
            if name in lake.measurements(organism):
                var = lake.var(organism, name)
                ids = var["feature_id"].to_pylist()
                kept[name][organism] = np.zeros(lake.n_features(organism, name), dtype=bool)
                mine = np.array([feature in wanted for feature in ids])
                kept[name][organism][var["soma_joinid"].to_numpy()[mine]] = True
                found |= wanted & set(ids)
        if (missing := sorted(wanted - found)) and not refreshed:
            raise UsageError(
                f"features.{name}: {len(missing)} of {len(wanted)} are in no chosen organism, such as {missing[0]!r}; "
                "features are named by feature_id, as python -m store info --lake tells"
            )
    return kept


def organisms_with(lake: Lake, measurement: str, layer: str, organisms: list[str]) -> list[str]:
    """Return those of the organisms of which some dataset has the measurement in this layer."""
    found = {
        commit.dataset["organism"]
        for commit in lake.current
        if measurement in commit.content and commit.content[measurement].layer == layer
    }
    return [organism for organism in organisms if organism in found]


def offsets(lake: Lake, measurement: str, organisms: list[str]) -> dict[str, int]:
    """Return where each organism's features of a measurement begin, where they stand one after another."""
    ends = np.cumsum([0, *(lake.n_features(organism, measurement) for organism in organisms)]).tolist()
    return dict(zip(organisms, ends, strict=False))


def difference(
    base: Snapshot,
    organisms: list[str],
    splits: tuple[str, ...],
    organism_C: NDArray[np.int32],
    joinid_C: NDArray[np.int64],
    split_C: NDArray[np.int8],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which chosen cells ``base`` does not hold, and the rows of ``base`` that are not chosen any more.

    Raises:
        UsageError: A cell would change its split.
    """
    fresh = np.ones(len(joinid_C), dtype=bool)
    alive = np.zeros(base.n_rows, dtype=bool)
    # an organism's cells lie together, in the order of their joinids
    begins = np.searchsorted(organism_C, np.arange(len(organisms) + 1))
    mine = {name: slice(*ends) for name, ends in zip(organisms, pairwise(begins.tolist()), strict=True)}
    n_moved, such = 0, ""
    for organism, joinids, rows, split in base.identities():
        there = mine.get(organism, slice(0, 0))
        order = np.argsort(joinids)  # looked up in their order, neighbours are found in the same pages
        here = there.start + np.searchsorted(joinid_C[there], joinids[order])
        inside = here < there.stop
        found = np.flatnonzero(inside)[joinid_C[here[inside]] == joinids[order[inside]]]
        here, known = here[found], order[found]
        fresh[here] = False
        alive[rows[known]] = True
        moved = np.flatnonzero(split_C[here] != split[known])
        if len(moved) and not n_moved:
            before, now = splits[split[known[moved[0]]]], splits[split_C[here[moved[0]]]]
            such = f"{organism} {joinids[known[moved[0]]]} from {before!r} to {now!r}"
        n_moved += len(moved)
    if n_moved:
        raise UsageError(
            f"{base.uri}: {n_moved:,} cells would change their split, such as {such}; make a new snapshot instead"
        )
    return np.flatnonzero(fresh), np.flatnonzero(~alive).astype(np.int64)


def sizes(
    lake: Lake,
    organisms: list[str],
    layers: dict[str, str],
    cells: pa.Table,
    organism_C: NDArray[np.int32],
) -> tuple[NDArray[np.float32], dict[tuple[str, str], float]]:
    """Return the size of each cell in values, about, its labels counted; and the most that a dataset's cells have.

    RNA counts of a cell are known. Of all else a cell that was measured has the mean of those of its dataset.
    """
    size_C = np.full(cells.num_rows, CELL_ELEMENTS, np.float32)
    per_cell = {}
    for number, organism in enumerate(organisms):
        mine = slice(*np.searchsorted(organism_C, [number, number + 1]))  # an organism's cells lie together
        here = cells.slice(mine.start, mine.stop - mine.start)
        commits = [commit for commit in lake.current if commit.dataset["organism"] == organism]
        commits.sort(key=lambda commit: commit.dataset["obs_start"])
        starts = np.array([commit.dataset["obs_start"] for commit in commits])
        of = np.searchsorted(starts, here["soma_joinid"].to_numpy(), side="right") - 1
        n_cells_D = np.maximum(np.bincount(of, minlength=len(commits)), 1)
        means = _means(lake, organism, commits)
        for name, layer in layers.items():
            if (name, layer) == ("RNA", "raw"):
                value_C = here["nnz"].to_numpy()
            else:
                value_C = means[name, layer][of]
                if layer == "raw":
                    value_C = value_C * here[schema.measured_column(name)].to_numpy()
            size_C[mine] += value_C.astype(np.float32)
            per_cell[organism, name] = float((np.bincount(of, value_C, len(commits)) / n_cells_D).max(initial=0))
    return size_C, per_cell


def _means(lake: Lake, organism: str, commits: Sequence[Commit]) -> defaultdict[tuple[str, str], NDArray[np.float64]]:
    """Return, for a measurement and a layer, the mean number of values of each dataset's measured cells."""
    position = {commit.dataset["dataset_id"]: number for number, commit in enumerate(commits)}
    found: defaultdict[tuple[str, str], NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(commits)))
    for row in lake.measurement_presence(organism).to_pylist():
        number, name = position[row["dataset_id"]], row["measurement"]
        found[name, row["layer"]][number] = commits[number].content[name].nnz / max(1, row["n_measured_obs"])
    return found
