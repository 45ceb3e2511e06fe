"""This module finds matched controls: unperturbed cells of the same window that are like a perturbed cell, or earlier.

Controls come from the same lane of the same window, which is in memory anyway: finding them reads nothing more, and
they are the same at any number of ranks.

Shape letters used in this module:
    F  fields to match      R  rows of a window      C  cells      S  controls of a cell
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.part import CODED
from store.part import NUMBERS as MEASURED_NUMBERS
from train.reader import Window
from train.tokens import chance_salts, drawn, units

CHANGING = ("time", "cell_type")
"""In what a cell may differ from earlier ones."""
SEED = 2**20
"""Added to the seed, so that chance here has nothing to do with that of tokens."""


@dataclass(frozen=True)
class MatchedControls:
    """Which controls a perturbed cell comes with.

    A cell comes with none if its perturbation has no code: nobody could say what became of the controls.

    Attributes:
        size: So many, drawn with replacement; a cell that matches none has none.
        share: Chance that a perturbed cell gets its controls at all.
        match: Fields in which a control is the same: coded labels, "time" and "dose".
        earlier: Chance that an unperturbed cell comes with unperturbed cells of earlier times, which are the same in
            ``match`` but for time and cell type: what is learned from is what became of them. A cell whose time nobody
            knows has none.
    """

    size: int = 1
    share: float = 1.0
    match: tuple[str, ...] = ("dataset_id", "cell_type", "time")
    earlier: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.match if name not in (*CODED, *MEASURED_NUMBERS)]
        if (
            unknown
            or not 1 <= self.size <= 63
            or not 0 <= min(self.share, self.earlier) <= max(self.share, self.earlier) <= 1
        ):
            known = ", ".join((*CODED, *MEASURED_NUMBERS))
            raise UsageError(
                f"controls: size is 1 to 63, share and earlier from 0 to 1, match some of {known}; got {self}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of codes that must be read for it."""
        return (*(name for name in self.match if name in CODED), "perturbation")


@dataclass(frozen=True)
class ControlGroups:
    """The controls of a window, found out once for all batches from it.

    Attributes:
        key_R: What a row's controls have in common with it.
        unperturbed_R: Which rows are controls themselves.
        perturbed_R: Which rows were hit by what has a code.
        places: Key to the places of its controls among the window's rows, ascending.
        course_R: What a row's earlier cells have in common with it.
        time_R: The rows' times; NaN is not said.
        courses: That to the places of the unperturbed cells whose time is known, by time.
    """

    key_R: list[bytes]
    unperturbed_R: NDArray[np.bool_]
    perturbed_R: NDArray[np.bool_]
    places: dict[bytes, NDArray[np.int64]]
    course_R: list[bytes]
    time_R: NDArray[np.float32]
    courses: dict[bytes, NDArray[np.int64]]


def group_controls(
    controls: MatchedControls,
    fields: tuple[str, ...],
    window: Window,
    lane_R: NDArray[np.int64],
    unperturbed_R: NDArray[np.bool_],
    perturbed_R: NDArray[np.bool_],
) -> ControlGroups:
    """Sort the rows of a window that can be controls by what must be the same.

    Args:
        controls: What is wanted.
        fields: The fields of the window's codes.
        window: The window.
        lane_R: The rows' lanes: a control is of the same.
        unperturbed_R: Which rows can be controls.
        perturbed_R: Which rows can have some.
    """
    lines = {
        name: window.codes_RF[:, fields.index(name)]
        if name in CODED
        else window.numbers_RF.view(np.int32)[:, MEASURED_NUMBERS.index(name)]
        for name in controls.match
    }
    key_R = _keys([*lines.values(), lane_R])
    course_R = _keys([*(line for name, line in lines.items() if name not in CHANGING), lane_R])
    time_R = window.numbers_RF[:, MEASURED_NUMBERS.index("time")]
    timed_R = unperturbed_R & ~np.isnan(time_R) if controls.earlier else np.zeros(len(time_R), dtype=bool)
    controls_of, courses = _places(key_R, unperturbed_R), _places(course_R, timed_R, time_R)
    return ControlGroups(key_R, unperturbed_R, perturbed_R, controls_of, course_R, time_R, courses)


def _keys(lines: list[NDArray[Any]]) -> list[bytes]:
    key_RF = np.stack([line.astype(np.int32, copy=False) for line in lines], axis=1)
    return [line.tobytes() for line in key_RF]


def _places(
    key_R: list[bytes], chosen_R: NDArray[np.bool_], order_R: NDArray[np.float32] | None = None
) -> dict[bytes, NDArray[np.int64]]:
    """Return key to the places of the chosen rows that have it, ascending or in the order of something."""
    rows = np.flatnonzero(chosen_R)
    if order_R is not None:
        rows = rows[np.argsort(order_R[rows], kind="stable")]
    found: dict[bytes, list[int]] = {}
    for place in rows.tolist():
        found.setdefault(key_R[place], []).append(place)
    return {key: np.array(places) for key, places in found.items()}


def find_controls(
    controls: MatchedControls,
    groups: ControlGroups,
    place_C: NDArray[np.int64],
    row_C: NDArray[np.int64],
    chance: tuple[int, int],
) -> NDArray[np.int64]:
    """Return place_CS among a window's rows of the controls of some of its cells; -1 where there is none.

    Args:
        controls: What is wanted.
        groups: The window's controls.
        place_C: The cells' places among the window's rows.
        row_C: The numbers that stay with the cells.
        chance: (seed, step).
    """
    salts = chance_salts((chance[0] + SEED, chance[1]), range(controls.size + 1))
    drawn_SC = units(drawn(row_C, salts))
    place_CS = np.full((len(place_C), controls.size), -1, np.int64)
    for cell, place in enumerate(place_C.tolist()):
        itself = bool(groups.unperturbed_R[place])
        if drawn_SC[0, cell] >= (controls.earlier if itself else controls.share):
            continue
        if itself and not np.isnan(groups.time_R[place]):
            candidates = groups.courses.get(groups.course_R[place], np.empty(0, np.int64))
            candidates = candidates[: np.searchsorted(groups.time_R[candidates], groups.time_R[place])]
        elif groups.perturbed_R[place]:
            candidates = groups.places.get(groups.key_R[place], np.empty(0, np.int64))
        else:
            continue
        if len(candidates):
            place_CS[cell] = candidates[(drawn_SC[1:, cell] * len(candidates)).astype(np.int64)]
    return place_CS
