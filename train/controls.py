"""This module finds matched controls: unperturbed cells of the same window that are like a perturbed cell.

Controls come from the same lane of the same window, which is in memory anyway: finding them reads nothing more, and
they are the same at any number of ranks.

Shape letters used in this module:
    F  fields to match      R  rows of a window      C  cells      S  controls of a cell
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from store.errors import UsageError
from store.part import CODED
from store.part import NUMBERS as MEASURED_NUMBERS
from train.reader import Window
from train.tokens import chance_salts, uniform

SEED = 2**20
"""Added to the seed, so that chance here has nothing to do with that of tokens."""


@dataclass(frozen=True)
class MatchedControls:
    """Which controls a perturbed cell comes with.

    Attributes:
        size: So many, drawn with replacement; a cell that matches none has none.
        share: Chance that a perturbed cell gets its controls at all.
        match: Fields in which a control is the same: coded labels, "time" and "dose".
    """

    size: int = 1
    share: float = 1.0
    match: tuple[str, ...] = ("dataset_id", "cell_type", "time")

    def __post_init__(self) -> None:
        unknown = [name for name in self.match if name not in (*CODED, *MEASURED_NUMBERS)]
        if unknown or not 1 <= self.size <= 63 or not 0 <= self.share <= 1:
            known = ", ".join((*CODED, *MEASURED_NUMBERS))
            raise UsageError(f"controls: size is 1 to 63, share from 0 to 1, match some of {known}; got {self}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of codes that must be read for it."""
        return (*(name for name in self.match if name in CODED), "perturbation")


def match_keys(controls: MatchedControls, fields: tuple[str, ...], window: Window) -> NDArray[np.int32]:
    """Return key_RF of the rows of a window: what must be the same."""
    lines = [
        window.codes_RF[:, fields.index(name)]
        if name in CODED
        else window.numbers_RF.view(np.int32)[:, MEASURED_NUMBERS.index(name)]
        for name in controls.match
    ]
    return np.stack(lines, axis=1) if lines else np.zeros((len(window.codes_RF), 0), np.int32)


def find_controls(
    controls: MatchedControls,
    window: Window,
    key_RF: NDArray[np.int32],
    lane_R: NDArray[np.int64],
    unperturbed_R: NDArray[np.bool_],
    place_C: NDArray[np.int64],
    row_C: NDArray[np.int64],
    chance: tuple[int, int],
) -> NDArray[np.int64]:
    """Return place_CS among the window's rows of the controls of some of its cells; -1 where there is none.

    Args:
        controls: What is wanted.
        window: The window; remembers which of its rows are controls of what.
        key_RF: What must be the same.
        lane_R: The rows' lanes.
        unperturbed_R: Which rows can be controls.
        place_C: The cells' places among the window's rows.
        row_C: The numbers that stay with the cells.
        chance: (seed, step).
    """
    full_RF = np.ascontiguousarray(np.concatenate([key_RF, lane_R[:, None].astype(np.int32)], axis=1))
    groups: dict[bytes, NDArray[np.int64]] | None = window.notes.get("controls")
    if groups is None:
        found: dict[bytes, list[int]] = {}
        for place in np.flatnonzero(unperturbed_R).tolist():
            found.setdefault(full_RF[place].tobytes(), []).append(place)
        groups = {key: np.array(places) for key, places in found.items()}
        window.notes["controls"] = groups
    salts = chance_salts((chance[0] + SEED, chance[1]), range(controls.size + 1))
    drawn_SC = uniform(torch.from_numpy(row_C), *salts).numpy()
    place_CS = np.full((len(place_C), controls.size), -1, np.int64)
    for cell, place in enumerate(place_C.tolist()):
        if unperturbed_R[place] or drawn_SC[0, cell] >= controls.share:
            continue
        candidates = groups.get(full_RF[place].tobytes())
        if candidates is not None:
            place_CS[cell] = candidates[(drawn_SC[1:, cell] * len(candidates)).astype(np.int64)]
    return place_CS
