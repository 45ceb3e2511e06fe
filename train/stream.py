"""This module streams a snapshot's cells in the order of the sample plan; a thread reads ahead by one window.

Shape letters used in this module:
    C  cells      D  datasets      G  features of a measurement      T  targets of a perturbation
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from store.errors import UsageError
from store.schema import measured_column
from store.snapshot import Snapshot
from train.cells import NUMBERS, PROMPTS, Cells, Csr
from train.plan import SamplePlan


@dataclass(frozen=True)
class Labels:
    """Codes of what is said of every row of a snapshot, and the values behind the codes."""

    values: dict[str, list[str]]
    prompts: dict[str, NDArray[np.int32]]
    perturbation: NDArray[np.int32]
    numbers: dict[str, NDArray[np.float32]]
    measured: dict[str, NDArray[np.bool_]]
    panel: NDArray[np.int32]
    split: NDArray[np.object_]


NOT_SAID = {"", "unknown", "na", "nan"}


def read_labels(snapshot: Snapshot, learned: str | None = None) -> Labels:
    """Code the labels of a snapshot; values are numbered in alphabetical order after "" (not said).

    Args:
        snapshot: Whose labels.
        learned: The split that is trained on: a value that only other splits have gets no code and is "not said"
            there, so that a checkpoint never claims to know what it was not shown. None codes every value.
    """
    cells = snapshot.cells().to_pandas()
    mine = cells["split"].eq(learned) if learned is not None else pd.Series(True, index=cells.index)
    values, prompts = {}, {}
    for name in PROMPTS:
        said = cells[name].astype(str).where(~cells[name].isin(NOT_SAID), "")
        values[name] = ["", *sorted(set(said[mine]) - {""})]
        prompts[name] = np.maximum(_codes(said, values[name]), 0)
    split = cells["perturbation"].astype(str).str.split("+")
    names = sorted({name for parts in split[mine] for name in parts} - {"", "control"})
    values["perturbation"] = ["", "control", *names]
    n_targets = max(1, int(split.str.len().max()))
    columns = [split.str[number].fillna("") for number in range(n_targets)]
    targets = np.stack([_codes(column, values["perturbation"]) for column in columns], axis=1)
    targets[(targets < 0).any(axis=1)] = 0  # one unknown target makes the whole combination unknown
    return Labels(
        values=values,
        prompts=prompts,
        perturbation=targets,
        numbers={name: cells[name].to_numpy(np.float32) for name in NUMBERS},
        measured={name: cells[measured_column(name)].to_numpy(bool) for name in snapshot.measurements},
        panel=_codes(cells["dataset_id"], list(snapshot.datasets)),
        split=cells["split"].to_numpy(object),
    )


def _codes(column: pd.Series, values: list[str]) -> NDArray[np.int32]:
    return pd.Categorical(column, categories=values).codes.astype(np.int32)


class Stream:
    """One split of a snapshot as batches of cells.

    ``for cells in Stream(open_snapshot(lake, name), batch=64).epoch(0): ...`` is all that a plain script needs. The
    only state is the number of the step.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        batch: int,
        seed: int = 0,
        split: str = "train",
        block: int = 1024,
        window: int = 16,
        labels: Labels | None = None,
    ) -> None:
        self.snapshot = snapshot
        self.labels = labels or read_labels(snapshot)
        self.rows = np.flatnonzero(self.labels.split == split)
        if len(self.rows) == 0:
            known = ", ".join(sorted(set(self.labels.split)))
            raise UsageError(f"{snapshot.uri}: no cell is in split {split!r}; splits with cells: {known}")
        self.plan = SamplePlan(len(self.rows), batch, seed, block, window)

    def epoch(self, epoch: int, *, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[Cells]:
        """Yield one rank's share of every step of an epoch, from step ``start`` of it."""
        first = epoch * self.plan.steps_per_epoch
        yield from self.steps(first + start, first + self.plan.steps_per_epoch, rank=rank, world=world)

    def steps(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Cells]:
        """Yield one rank's share of global steps ``start`` to ``stop`` (exclusive), over epoch borders.

        A share may be empty when a last batch has fewer rows than there are ranks.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            held: dict[tuple[int, int], Future[_Window]] = {}

            def window(key: tuple[int, int]) -> Future[_Window]:
                if key not in held:
                    held[key] = reader.submit(self._read_window, *key)
                return held[key]

            for step in range(start, stop):
                needed = self._windows(step)
                for key in needed:
                    window(key)
                window(self._behind(needed[-1]))
                yield self._share([window(key).result() for key in needed], step, rank, world)
                for key in [key for key in held if key < needed[-1]]:
                    del held[key]

    def _windows(self, step: int) -> list[tuple[int, int]]:
        epoch, number = self.plan.epoch_of(step)
        first = number * self.plan.global_batch
        last = min(first + self.plan.global_batch, self.plan.n_rows) - 1
        return [(epoch, w) for w in range(first // self.plan.window_rows, last // self.plan.window_rows + 1)]

    def _behind(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, number = key
        return (epoch, number + 1) if number + 1 < self.plan.n_windows else (epoch + 1, 0)

    def _read_window(self, epoch: int, number: int) -> _Window:
        """Read the blocks of a window; neighbouring rows of the split that lie together come in one read."""
        positions = np.sort(self.plan.window_order(epoch, number))
        starts = np.arange(0, len(positions), self.plan.block)
        counts: dict[str, list[Csr]] = {name: [] for name in self.snapshot.measurements}
        for start in starts:
            rows = self.rows[positions[start : start + self.plan.block]]
            for name, parts in counts.items():
                parts.append(self._read_rows(name, rows))
        return _Window(positions, {name: Csr.concatenate(parts) for name, parts in counts.items()})

    def _read_rows(self, measurement: str, rows: NDArray[np.int64]) -> Csr:
        first, stop = int(rows[0]), int(rows[-1]) + 1
        block = self.snapshot.block(measurement, first, stop)
        return Csr(block.indptr, block.features, block.counts).take(rows - first)

    def _share(self, windows: list[_Window], step: int, rank: int, world: int) -> Cells:
        wanted = self.plan.share(step, rank, world)
        positions = np.concatenate([window.positions for window in windows])
        order = np.argsort(positions)
        place = order[np.searchsorted(positions, wanted, sorter=order)]
        names = self.snapshot.measurements
        merged = {name: [window.counts[name] for window in windows] for name in names}
        counts = {name: parts[0] if len(parts) == 1 else Csr.concatenate(parts) for name, parts in merged.items()}
        rows, labels = self.rows[wanted], self.labels
        return Cells(
            n_cells=len(wanted),
            counts={name: part.take(place) for name, part in counts.items()},
            measured={name: part[rows] for name, part in labels.measured.items()},
            panel=labels.panel[rows],
            prompts={name: part[rows] for name, part in labels.prompts.items()},
            perturbation=labels.perturbation[rows],
            numbers={name: part[rows] for name, part in labels.numbers.items()},
            row=rows,
        )


@dataclass(frozen=True)
class _Window:
    """Counts of one window, rows in ascending order of their position in the split."""

    positions: NDArray[np.int64]
    counts: dict[str, Csr]
