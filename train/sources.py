"""This module finds the rows that a stream reads: the sources of its plan are the parts of its snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.part import Part
from store.snapshot import Snapshot
from train.labels import NOT_SAID
from train.settings import DataSettings, RunSettings

SCANNED_ROWS = 2**20


@dataclass(frozen=True)
class Source:
    """The cells of a split in one part of a snapshot.

    Attributes:
        snapshot: The snapshot.
        number: Its position among the stream's.
        part: The part.
        first: The split's first row in it.
        gone: How many rows of the split, counted from ``first`` without them, come before each one that the lake no
            longer holds.
        n_rows: Its cells.
        share: Of every batch, relative to the other sources.
        first_row: The number of the part's first row among all rows of all snapshots.
        sets: Where its sets begin among the part's rows, and where the last one ends; empty where cells come singly.
    """

    snapshot: Snapshot
    number: int
    part: Part
    first: int
    gone: NDArray[np.int64]
    n_rows: int
    share: float
    first_row: int
    sets: NDArray[np.int64]

    @property
    def n_units(self) -> int:
        """What the plan deals out: sets, or cells."""
        return len(self.sets) - 1 if len(self.sets) else self.n_rows

    def rows_of_sets(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the part's rows of these sets, and which of the sets each belongs to, by its place among them."""
        starts = self.sets[positions]
        lengths = self.sets[positions + 1] - starts
        place = np.repeat(np.arange(len(positions)), lengths)
        rows = np.arange(int(lengths.sum())) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
        alive = ~np.isin(rows, self.dead)
        return rows[alive], place[alive]

    @property
    def dead(self) -> NDArray[np.int64]:
        """The part's rows of cells of the split that the lake no longer holds."""
        return self.first + self.gone + np.arange(len(self.gone))

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the part's rows at these positions among the source's cells."""
        if len(self.gone) == 0:
            return self.first + positions
        return self.first + positions + np.searchsorted(self.gone, positions, side="right")

    def label_weights(self, field: str, split: str) -> NDArray[np.float64]:
        """Return for each cell the inverse of how many cells of the snapshot's split have its value of a field.

        Those of which none is said weigh as much together as is their part of the split's cells.
        """
        values = self.snapshot.label_values()[field]
        counts = np.array([of.get(split, 0) for of in values.values()], dtype=np.float64)
        of_code = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
        said = np.array([value.lower() not in NOT_SAID for value in values])
        n_said = counts[said].sum()
        if n_said < counts.sum():
            of_code[~said] = (counts[said] > 0).sum() / n_said if n_said else 1.0
        weights = np.empty(self.n_rows)
        for start in range(0, self.n_rows, SCANNED_ROWS):
            rows = self.rows(np.arange(start, min(start + SCANNED_ROWS, self.n_rows)))
            codes = self.part.codes([field], int(rows[0]), int(rows[-1]) + 1)[0]
            weights[start : start + len(rows)] = of_code[codes[rows - rows[0]]]
        return weights


def find_sources(shares: Mapping[Snapshot, float], split: str, *, sets: bool = False) -> list[Source]:
    """Return the sources of a split, snapshot by snapshot and part by part; of sets if asked for.

    Raises:
        UsageError: A snapshot has no cell in the split, a share is not a positive number, or there are no sets.
    """
    sources: list[Source] = []
    first_row = 0
    for number, (snapshot, share) in enumerate(shares.items()):
        if not (isinstance(share, int | float | np.number) and np.isfinite(share) and share > 0):
            raise UsageError(f"{snapshot.uri}: its share is {share!r}; shares are positive numbers")
        n_cells = snapshot.splits.get(split, 0)
        if n_cells == 0:
            known = ", ".join(name for name, cells in sorted(snapshot.splits.items()) if cells)
            raise UsageError(f"{snapshot.uri}: no cell is in split {split!r}; splits with cells: {known}")
        for part in snapshot.parts:
            first, stop = part.split_rows.get(split, (0, 0))
            dead = snapshot.dead - part.first_row
            dead = dead[(dead >= first) & (dead < stop)]
            n_rows = stop - first - len(dead)
            if n_rows:
                gone = dead - first - np.arange(len(dead))
                mine = share * n_rows / n_cells
                row, starts = first_row + part.first_row, np.empty(0, np.int64)
                if sets:
                    starts = part.set_starts[(part.set_starts >= first) & (part.set_starts <= stop)]
                sources.append(Source(snapshot, number, part, first, gone, n_rows, mine, row, starts))
        first_row += snapshot.n_rows
    return sources


def refuse_empty_splits(settings: RunSettings, snapshot: Snapshot) -> None:
    """Refuse a run whose snapshot has no cell to train on, or none to evaluate on where that is asked for.

    The usual test split may be without cells: then no loss is reported on it.

    Raises:
        UsageError: Which split, by which setting, and which splits have cells.
    """
    data = settings.data
    known = ", ".join(sorted(name for name, n_cells in snapshot.splits.items() if n_cells))
    if not snapshot.splits.get(data.split):
        raise UsageError(f"{snapshot.uri}: no cell is in split {data.split!r} (data.split); splits with cells: {known}")
    if settings.evaluate_every and not snapshot.splits.get(data.test_split):
        raise UsageError(
            f"{snapshot.uri}: no cell is in split {data.test_split!r} (data.test_split), which "
            f"evaluate_every={settings.evaluate_every} asks for; splits with cells: {known}; name one of them, make a "
            "snapshot that holds cells out (fractions), or leave evaluate_every out"
        )
    usual = DataSettings.model_fields["test_split"].default
    if data.test_split not in ("", usual) and not snapshot.splits.get(data.test_split):
        raise UsageError(
            f"{snapshot.uri}: no cell is in split {data.test_split!r} (data.test_split); splits with cells: {known}; "
            "name one of them, or none (test_split = '')"
        )


def vocabulary_sizes(snapshots: Sequence[Snapshot]) -> dict[str, int]:
    """Return the features of each measurement over all snapshots.

    Raises:
        UsageError: Their vocabularies do not begin alike, so that one number would stand for two features.
    """
    sizes: dict[str, int] = {}
    if len(snapshots) == 1:
        (snapshot,) = snapshots
        return {name: snapshot.manifest["measurements"][name]["n_features"] for name in snapshot.measurements}
    longest: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for snapshot in snapshots:
        for name in snapshot.measurements:
            rows = [(feature, organism) for feature, _, organism, _ in snapshot.var_rows(name)]
            other, known = longest.get(name, ("", []))
            shared = min(len(rows), len(known))
            if rows[:shared] != known[:shared]:
                raise UsageError(
                    f"{snapshot.name!r} and {other!r} number {name} features differently and cannot be mixed; make one "
                    f"of them anew with the other's vocabulary: --set like={other}"
                )
            if len(rows) >= len(known):
                longest[name] = (snapshot.name, rows)
            sizes[name] = len(longest[name][1])
    return sizes


def refuse_mixed_layers(snapshots: Sequence[Snapshot], measurements: Sequence[str]) -> None:
    """Refuse a mixture in which a measurement is counts of one snapshot and levels of another.

    Raises:
        UsageError: Which, and of which snapshots.
    """
    for name in measurements:
        having = [one for one in snapshots if name in one.measurements]
        levels = {name in one.levels: one for one in having}
        if len(levels) > 1:
            raise UsageError(
                f"{name} is levels in {levels[True].name!r} and counts in {levels[False].name!r}, and cannot be mixed; "
                "leave it out (measurements), or one of them"
            )
