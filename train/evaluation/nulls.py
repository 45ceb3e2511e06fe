"""This module is the null arms: ours again, with what it should learn from dealt at random. What is left is no merit.

``labels``: it learns from training cells whose labels were dealt anew among them. ``prompts``: it is asked of another
perturbation than the one that answers. ``pairs``: it translates another cell than the one that is compared.
``memberships``: it knows gene sets that were dealt anew, each gene and each set keeping how many it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from train.evaluation.effects import contexts
from train.evaluation.folds import UNPERTURBED, drawn_place
from train.evaluation.study import Study

SALT = 19


def dealt_labels(study: Study, column: str, within: Sequence[str], seed: int) -> Study:
    """Return the cells with a column's values dealt anew among those that agree in other columns.

    Of perturbations, unperturbed cells stay so: they are what effects are measured against.
    """
    random = np.random.default_rng([seed, SALT])
    value_C = study.obs[column].to_numpy(copy=True)
    group_C = contexts(study, within)
    moves_C = ~np.isin(study.label(column), UNPERTURBED) if column == "perturbation" else np.ones(study.n_cells, bool)
    for group in sorted(set(group_C)):
        rows = np.flatnonzero((group_C == group) & moves_C)
        value_C[rows] = value_C[random.permutation(rows)]
    return replace(study, obs=study.obs.assign(**{column: value_C}))


def dealt_members(members: Mapping[str, Sequence[str]], seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Return sets of the same sizes whose memberships were dealt anew; a gene that meets a set twice is in it once."""
    everyone = np.array([one for inside in members.values() for one in inside], dtype=object)
    dealt = np.random.default_rng([seed, SALT]).permutation(everyone)
    ends = np.cumsum([0, *(len(inside) for inside in members.values())])
    return {
        name: tuple(dict.fromkeys(dealt[first:stop].tolist()))
        for name, first, stop in zip(members, ends[:-1], ends[1:], strict=True)
    }


class Nulled:
    """A method in a null arm; it answers whatever the method answers."""

    def __init__(self, method: Any, arm: str, column: str, within: Sequence[str], seed: int) -> None:
        """Say how.

        Args:
            method: Ours.
            arm: "labels", "prompts" or "pairs".
            column: The column whose labels are dealt.
            within: Columns in which cells agree among which they are.
            seed: Of the dealing.
        """
        self.method, self.arm, self.column, self.within, self.seed = method, arm, column, tuple(within), seed
        self.name = method.name

    def fit(self, train: Study) -> Self:
        """Fit the method."""
        if self.arm == "prompts":
            names = sorted({name for name in train.label("perturbation") if name not in UNPERTURBED})
            self.names = names or [""]
        if self.arm == "labels":
            train = dealt_labels(train, self.column, self.within, self.seed)
        self.method.fit(train)
        return self

    def calibrate(self, cells: Study) -> None:
        """Let the method choose, if it does."""
        if hasattr(self.method, "calibrate"):
            self.method.calibrate(cells)

    @property
    def types(self) -> NDArray[np.str_]:
        """Types that the method tells."""
        types: NDArray[np.str_] = self.method.types
        return types

    def predict_proba(self, cells: Study) -> NDArray[np.float64]:
        """Return the method's probability_CY."""
        probability: NDArray[np.float64] = self.method.predict_proba(cells)
        return probability

    def predict(self, first: Any, *rest: Any) -> Any:
        """Return what the method answers: of another perturbation (prompts), of other cells (pairs).

        Which perturbation is drawn for each question by itself, the same whenever it is asked.
        """
        if self.arm == "prompts":
            perturbation, *others = rest
            different = [name for name in self.names if name != perturbation] or [perturbation]
            asked = " | ".join(rest)
            dealt = min(different, key=lambda name: drawn_place(self.seed + SALT, f"{asked} | {name}"))
            return self.method.predict(first, dealt, *others)
        if self.arm == "pairs":
            random = np.random.default_rng([self.seed, SALT])
            return self.method.predict(first.take(random.permutation(first.n_cells)))
        return self.method.predict(first, *rest)
