"""This module draws the splits of a snapshot's cells: by cell or by whole groups, as assigned, with no leak.

Shape letters used in this module:
    C  cells      V  values of a column
"""

from __future__ import annotations

import difflib
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, field_validator, model_validator

from store.errors import UsageError
from store.hashes import hashed
from store.part import LABELS
from store.settings import Settings


class SnapshotSettings(Settings):
    """What a snapshot holds and how it is split."""

    where: str | None = None
    """A SOMA value filter on obs; none takes every cell."""
    organisms: tuple[str, ...] = ()
    """Organisms, by their Census key; empty takes all of the lake's."""
    measurements: tuple[str, ...] = ()
    """Measurements; empty takes all that any chosen cell has."""
    levels: tuple[str, ...] = ()
    """Measurements of which levels (layer ``value``) are taken, not counts; those that have no counts need no word."""
    features: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Measurement to the feature_ids that are kept; what is not listed keeps all."""
    like: str = ""
    """A snapshot of the same lake whose vocabulary comes first here, so that both stream into one model."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of rows and the splits."""
    split_by: str = ""
    """An obs column whose groups (donors, perturbations, ...) stay whole in one split; empty splits cell by cell."""
    fractions: dict[str, FiniteFloat] = Field(default_factory=lambda: {"train": 0.9, "test": 0.1})
    """Split to its expected share of cells (or of groups); the shares sum to 1."""

    assign: dict[str, dict[str, tuple[str, ...]]] = Field(default_factory=dict)
    """Split to obs column to values: cells that have one of them go to this split, whatever was drawn."""
    set_size: int = Field(default=0, ge=0)
    """Cells of a set: sets are shuffled, and the cells of one lie together; 0 shuffles cell by cell."""
    set_by: tuple[str, ...] = ("dataset_id", "sample_id")
    """obs columns in which the cells of a set agree. Those that have a position (x, y) are neighbours: a niche."""
    apart: tuple[str, ...] = ()
    """obs columns of which no value may be in two splits, beside ``split_by``; the snapshot is refused if one is."""

    @model_validator(mode="after")
    def _columns_and_splits_exist(self) -> SnapshotSettings:
        for name in (*self.split_columns, *self.set_by):
            if name not in LABELS:
                known = ", ".join(LABELS)
                raise ValueError(f"{name!r} is none of the obs columns that splits and sets may look at: {known}")
        for split in self.assign:
            if split not in self.fractions:
                raise ValueError(f"assign.{split}: fractions names no such split; 0 is a fraction too")
        return self

    @field_validator("organisms", "measurements", "levels", "set_by", "apart")
    @classmethod
    def _once_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(map(repr, twice))} stands there more than once; name each once")
        return value

    @field_validator("features")
    @classmethod
    def _some_of_each(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if none := sorted(name for name, features in value.items() if not features):
            raise ValueError(
                f"no feature of {', '.join(map(repr, none))} is named; name some, leave the key out to keep all, or "
                "choose measurements without it"
            )
        return value

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or min(value.values()) < 0 or abs(sum(value.values()) - 1) > 1e-9:
            raise ValueError("the shares are not negative and sum to 1")
        return value

    @property
    def split_columns(self) -> list[str]:
        """The obs columns that decide or constrain splits."""
        assigned = (name for by in self.assign.values() for name in by)
        return list(dict.fromkeys([*filter(None, [self.split_by]), *self.apart, *assigned]))


def draw_splits(cells: pa.Table, settings: SnapshotSettings, *, refreshed: bool = False) -> NDArray[np.int8]:
    """Choose each cell's split (its number among the settings').

    A draw is a hash of the seed and the group, or of the seed, organism and soma_joinid: a cell falls into the same
    split of every snapshot with the same seed, fractions and assignments, however many cells there are beside it.
    Where a snapshot is ``refreshed``, assigned values that no cell has any more are passed over.

    Raises:
        UsageError: An assigned value does not occur, a cell is assigned to two splits, or a group is in two splits.
    """
    by_name = {name: coded(cells, name) for name in settings.split_columns}
    edges = np.cumsum(list(settings.fractions.values()))
    if settings.split_by:
        values, code_C = by_name[settings.split_by]
        draw_C = np.array([_draw(settings.seed, value) for value in values])[code_C]
    else:
        draw_C = _cell_draws(cells, settings.seed)
    split_C = np.minimum(np.searchsorted(edges, draw_C, side="right"), len(edges) - 1).astype(np.int8)
    assigned_C = _assigned(by_name, settings, cells.num_rows, refreshed=refreshed)
    split_C = np.where(assigned_C >= 0, assigned_C, split_C)
    for column in dict.fromkeys([*filter(None, [settings.split_by]), *settings.apart]):
        _refuse_leaks(column, *by_name[column], split_C, list(settings.fractions))
    return split_C


def coded(cells: pa.Table, column: str) -> tuple[list[str], NDArray[np.int32]]:
    """Return a column's distinct values, as text, in the order in which cells have them, and the number of each."""
    found = cells[column].combine_chunks().dictionary_encode()
    present = pa.compute.unique(found.indices)
    number = np.empty(len(found.dictionary), np.int32)
    number[present.to_numpy(zero_copy_only=False)] = np.arange(len(present), dtype=np.int32)
    values = [str(value) for value in found.dictionary.take(present).to_pylist()]
    return values, number[found.indices.to_numpy(zero_copy_only=False)]


def _draw(seed: int, label: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}|{label}".encode()).digest()[:8], "big") / 2**64


def _cell_draws(cells: pa.Table, seed: int) -> NDArray[np.float64]:
    """Hash joinids, salted by seed and organism, to [0, 1)."""
    organisms, code_C = coded(cells, "organism")
    salts = [int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "big") for name in organisms]
    mixed = cells["soma_joinid"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.array(salts, np.uint64)[code_C]
    return (hashed(mixed) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _assigned(
    by_name: dict[str, tuple[list[str], NDArray[np.int32]]],
    settings: SnapshotSettings,
    n_cells: int,
    *,
    refreshed: bool,
) -> NDArray[np.int8]:
    """Return the number of the split that each cell is assigned to; -1 for those that are not."""
    names = list(settings.fractions)
    assigned_C = np.full(n_cells, -1, dtype=np.int8)
    wanted = [(name, *item) for name, columns in settings.assign.items() for item in columns.items()]
    for name, column, values in wanted:
        number, (known, code_C) = names.index(name), by_name[column]
        code_of = {value: code for code, value in enumerate(known)}
        chosen_V = np.zeros(len(known), dtype=bool)
        absent = [value for value in values if value not in code_of]
        if absent and not refreshed:
            near = difflib.get_close_matches(absent[0], sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"assign.{name}.{column}: no chosen cell has {absent[0]!r}{hint}")
        chosen_V[[code_of[value] for value in values if value in code_of]] = True
        found_C = chosen_V[code_C]
        twice = np.flatnonzero(found_C & (assigned_C >= 0) & (assigned_C != number))
        if len(twice):
            value = min((known[code] for code in np.unique(code_C[twice])), key=values.index)
            other = assigned_C[twice][code_C[twice] == code_of[value]]
            raise UsageError(
                f"assign.{name}.{column} = {value!r}: {len(other):,} of its cells are also assigned to "
                f"{names[other[0]]!r}"
            )
        assigned_C[found_C] = number
    return assigned_C


def _refuse_leaks(
    column: str, values: list[str], code_C: NDArray[np.int32], split_C: NDArray[np.int8], names: list[str]
) -> None:
    holds = np.zeros((len(values), len(names)), dtype=bool)
    holds[code_C, split_C] = True
    leaking = np.flatnonzero(holds.sum(axis=1) > 1)
    if len(leaking):
        first = min(leaking, key=lambda number: values[number])
        where = " and ".join(names[number] for number in np.flatnonzero(holds[first]))
        raise UsageError(
            f"{len(leaking)} of {len(values)} values of {column} are in several splits, such as {values[first]!r} in "
            f"{where}; split by {column}, assign it whole, or narrow the cells with where"
        )
