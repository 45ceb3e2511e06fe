"""This module makes a rank's batches from decoded windows: it finds their cells, and what is said of them, and tokens.

Shape letters used in this module:
    C  cells of a batch that a rank gets      F  fields      R  rows of a window      S  controls of a cell
    X  coordinates of a place
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from store.part import NUMBERS as PART_NUMBERS
from store.schema import measured_column
from train.cells import CONTROL, NUMBERS, PROMPTS, Cells, Controls
from train.controls import ControlGroups, MatchedControls, find_controls, group_controls
from train.drawn import Draws
from train.held import Held, Key, Room, fair_share, gathered
from train.labels import Labels
from train.plan import Rows, SamplePlan
from train.reader import Window
from train.sources import Source
from train.tokens import TokenSettings, fast_tokens, make_tokens


@dataclass(frozen=True)
class BatchMaker:
    """What is made of the rows that a plan deals out.

    Attributes:
        plan: Which rows a step takes.
        sources: Where they lie.
        draws: Which row stands at which place.
        measurements: The measurements of a batch.
        fields: What is read of each cell, in the order of a window's codes.
        labels: What the codes say.
        offsets: The number of each measurement's first feature among all.
        tokens: How cells become tokens; without it batches are ragged.
        factors: What counts are divided by for ranks, by the number of the feature among all.
        controls: Unperturbed cells that perturbed ones come with.
        sets: What is dealt out are sets of cells.
        balance: Deal a batch out so that ranks get about equally many non-zeros.
    """

    plan: SamplePlan
    sources: Sequence[Source]
    draws: Draws
    measurements: tuple[str, ...]
    fields: tuple[str, ...]
    labels: Labels
    offsets: dict[str, int]
    tokens: TokenSettings | None
    factors: torch.Tensor | None
    controls: MatchedControls | None
    sets: bool
    balance: bool
    _room: Room = field(default_factory=Room, compare=False)

    def make(
        self, waiting: dict[Key, Future[Window]], steps: range, rank: int, world: int
    ) -> list[tuple[Any, NDArray[Any]]]:
        """Return a rank's batches of some steps, each with the datasets of its cells."""
        windows = {key: future.result() for key, future in waiting.items()}
        held, lengths = self._share(windows, steps, rank, world)
        cells = self._cells(held)
        ends = np.cumsum(lengths).tolist()
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        datasets = [cells.panel[part] for part in parts]
        if self.tokens:
            spans = {name: held.spans(name) for name in self.measurements}
            whole = all(part.counts.dtype.kind == "u" for some in spans.values() for part, _ in some)
            if whole and not self.tokens.levels:
                chance = (self.plan.seed, np.repeat(np.array(steps), lengths))
                words = {"ends": ends, "empty": self._room.take, "factors": self.factors}
                made = fast_tokens(spans, cells.measured, cells, self.offsets, self.tokens, chance, **words)
                return list(zip(made, datasets, strict=True))
        cells = self._with_counts(cells, held)
        if self.controls:
            cells = replace(cells, controls=self._find_controls(held, cells.row, (self.plan.seed, steps[0])))
        batches = [cells.take(part) for part in parts]
        if not self.tokens:
            return list(zip(batches, datasets, strict=True))
        return [
            (
                make_tokens(batch, self.offsets, self.tokens, chance=(self.plan.seed, step), factors=self.factors),
                which,
            )
            for step, batch, which in zip(steps, batches, datasets, strict=True)
        ]

    def _share(self, windows: dict[Key, Window], steps: range, rank: int, world: int) -> tuple[Held, list[int]]:
        """Find a rank's rows of some steps, one step's behind the other's, and how many they are of each step."""
        balance = self.balance and not self.sets and world > 1 and all(order.lanes == 1 for order in self.plan.orders)
        rows = [self.plan.batch(step) if balance else self.plan.share(step, rank, world) for step in steps]
        held = self._find(windows, Rows.concatenate(rows))
        if self.sets:  # one step; its sets have any number of cells
            return held, [held.n_cells]
        if balance:
            ends = np.cumsum([len(part) for part in rows])[:-1]
            chosen = [fair_share(sizes, rank, world) for sizes in np.split(held.sizes(), ends)]
            held = held.take(np.concatenate([mine + first for mine, first in zip(chosen, [0, *ends], strict=True)]))
            return held, [len(mine) for mine in chosen]
        return held, [len(part) for part in rows]

    def _find(self, windows: dict[Key, Window], rows: Rows) -> Held:
        """Find a batch's rows, or all rows of its sets, in the windows."""
        source, row, dealt, set_C = rows.source, np.empty(len(rows), np.int64), rows, None
        if self.sets:
            source, row, set_C = self._rows_of_sets(rows)
            dealt = rows.take(set_C)
        else:
            for number, epoch in dict.fromkeys((key[0], key[1][0]) for key in windows):
                mine = np.flatnonzero((source == number) & (rows.epoch == epoch))
                row[mine] = self.draws.rows(number, epoch, rows.row[mine])
        pieces = []
        n_found = 0
        for key, window in windows.items():  # a cell may lie in several: of two epochs, or, drawn twice, of two blocks
            number, (epoch, of_epoch) = key
            order = self.plan.orders[number]
            _, its = order.window_of(dealt.place)
            mine = np.flatnonzero((source == number) & (dealt.epoch == epoch) & (its == of_epoch))
            place = window.places(dealt.row[mine] // order.block, row[mine])
            n_found += int((place >= 0).sum())
            pieces.append((key, window, mine, place))
        if n_found < len(row):
            raise AssertionError(f"{len(row) - n_found} rows of a batch are in none of the windows {list(windows)}")
        return Held(len(row), source, row, pieces, set_C)

    def _rows_of_sets(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return source, row and number of the set of all cells of the sets of a batch."""
        sources, found, numbers = [], [], []
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(rows.source == number)
            row, place = source.rows_of_sets(rows.row[mine])
            sources.append(np.full(len(row), number))
            found.append(row)
            numbers.append(mine[place])
        order = np.argsort(np.concatenate(numbers), kind="stable")
        return np.concatenate(sources)[order], np.concatenate(found)[order], np.concatenate(numbers)[order]

    def _cells(self, held: Held) -> Cells:
        """Return rows with what is said of them, and no counts."""
        labels, n_cells = self.labels, held.n_cells
        codes = np.empty((n_cells, len(self.fields)), np.int32)
        numbers = np.empty((n_cells, len(PART_NUMBERS)), np.float32)
        for _, window, mine, place in held.pieces:
            codes[mine] = window.codes_RF.take(place, axis=0)
            numbers[mine] = window.numbers_RF.take(place, axis=0)
        of_field = dict(zip(self.fields, codes.T, strict=True))
        prompts = {name: np.empty(n_cells, np.int32) for name in PROMPTS}
        perturbation = np.empty((n_cells, labels.perturbation[0].shape[1]), np.int32)
        panel, row = np.empty(n_cells, np.int32), np.empty(n_cells, np.int64)
        measured = {name: of_field[measured_column(name)].astype(bool) for name in self.measurements}
        for number, source in enumerate(self.sources):
            its: Any = np.flatnonzero(held.source == number) if len(self.sources) > 1 else slice(None)
            which = source.number
            for name in PROMPTS:
                prompts[name][its] = labels.prompts[which][name][of_field[name][its]]
            perturbation[its] = labels.perturbation[which][of_field["perturbation"][its]]
            panel[its] = labels.panel[which][of_field["dataset_id"][its]]
            row[its] = source.first_row + held.row[its]
            for name in self.measurements:
                if name not in source.snapshot.measurements:  # the lake has it, this snapshot left it out
                    measured[name][its] = False
        return Cells(
            n_cells=n_cells,
            counts={},
            measured=measured,
            panel=panel,
            prompts=prompts,
            perturbation=perturbation,
            numbers={name: np.ascontiguousarray(numbers[:, PART_NUMBERS.index(name)]) for name in NUMBERS},
            row=row,
            set_C=held.set_C,
            place_CX=numbers[:, [PART_NUMBERS.index(name) for name in ("x", "y")]] if self.sets else None,
        )

    def _with_counts(self, cells: Cells, held: Held) -> Cells:
        counts = {name: gathered(held.spans(name), held.n_cells, self._room) for name in self.measurements}
        return replace(cells, counts=counts)

    def _find_controls(self, held: Held, row: NDArray[np.int64], chance: tuple[int, int]) -> Controls:
        """Return matched controls of a batch's cells, from the windows in which the cells lie."""
        assert self.controls is not None
        place_CS = np.full((held.n_cells, self.controls.size), -1, np.int64)
        sources, rows, pieces, n_controls = [], [], [], 0
        for key, window, mine, place in held.pieces:
            own, groups = self._control_groups(key, window)
            chosen = find_controls(self.controls, groups, place, row[mine], chance)
            there, position = np.unique(chosen, return_inverse=True)
            position = position.reshape(chosen.shape)
            if len(there) and there[0] < 0:
                there, position = there[1:], position - 1
            place_CS[mine] = np.where(position < 0, -1, n_controls + position)
            pieces.append((key, window, np.arange(n_controls, n_controls + len(there)), there))
            sources.append(np.full(len(there), key[0]))
            rows.append(own[there])
            n_controls += len(there)
        found = Held(n_controls, np.concatenate(sources), np.concatenate(rows), pieces)
        return Controls(self._with_counts(self._cells(found), found), place_CS)

    def _control_groups(self, key: Key, window: Window) -> tuple[NDArray[np.int64], ControlGroups]:
        """Return the part's row of each of a window's rows, and its controls; the window remembers both."""
        assert self.controls is not None
        if "controls" not in window.notes:
            source, own = self.sources[key[0]], window.rows()
            names = source.snapshot.label_values()["perturbation"]
            plain_V = np.array([value in ("", "control") for value in names])
            hit_V: NDArray[np.bool_] = np.any(self.labels.perturbation[source.number] > CONTROL, axis=1)
            code_R = window.codes_RF[:, self.fields.index("perturbation")]
            unperturbed_R = plain_V[code_R] & ~np.isin(own, source.snapshot.dead - source.part.first_row)
            lane_R = self._lanes(key, window)
            groups = group_controls(self.controls, self.fields, window, lane_R, unperturbed_R, hit_V[code_R])
            window.notes["controls"] = own, groups
        found: tuple[NDArray[np.int64], ControlGroups] = window.notes["controls"]
        return found

    def _lanes(self, key: Key, window: Window) -> NDArray[np.int64]:
        """Return the lane of each of a window's rows."""
        lanes = self.plan.orders[key[0]].lanes_of_blocks(key[1], window.numbers)
        return np.repeat(lanes, np.diff(window.offsets))
