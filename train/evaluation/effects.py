"""This module is what perturbations do: mean profiles of perturbed cells beside those of their controls.

Shape letters used in this module:
    C  cells      E  effects: a perturbation in a context      G  features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from store.errors import InputRefused
from train.evaluation.context import context_of, values_of
from train.evaluation.folds import TARGET, UNPERTURBED
from train.evaluation.study import Study, places
from train.tokens import SCALE

MIN_CELLS = 8
"""Perturbed cells below which a mean profile says little: such effects are left out."""


@dataclass(frozen=True)
class Effects:
    """Effects of perturbations, one line each.

    Attributes:
        perturbation: E targets, joined by ``+`` where several are hit.
        context: E contexts: the values of the context's columns.
        control_EG: Profile of the context's controls: log1p of their summed counts per 10,000 of all their counts.
        treated_EG: The same of the perturbed cells.
        n_cells: E numbers of perturbed cells.
        noise_E: Sampling variance of ``treated_EG``, on average over features: a quarter of the mean squared difference
            between the profiles of every other perturbed cell and of the rest.
        control_noise_E: The same of ``control_EG``, which all effects of a context share.
        features: The names of G.
        called: What people call them, where that is something else.
    """

    perturbation: tuple[str, ...]
    context: tuple[str, ...]
    control_EG: NDArray[np.float64]
    treated_EG: NDArray[np.float64]
    n_cells: NDArray[np.int64]
    noise_E: NDArray[np.float64]
    control_noise_E: NDArray[np.float64]
    features: tuple[str, ...]
    called: tuple[str, ...] = ()

    @property
    def places(self) -> dict[str, int]:
        """Place of each feature by its name, and by what people call it."""
        return places(self.features, self.called)

    @property
    def delta_EG(self) -> NDArray[np.float64]:  # noqa: N802
        """What the perturbations add."""
        return self.treated_EG - self.control_EG

    @property
    def n_effects(self) -> int:
        """E."""
        return len(self.perturbation)

    def take(self, chosen_E: NDArray[np.bool_]) -> Effects:
        """Return some of the effects."""
        return Effects(
            tuple(np.array(self.perturbation, dtype=object)[chosen_E]),
            tuple(np.array(self.context, dtype=object)[chosen_E]),
            self.control_EG[chosen_E],
            self.treated_EG[chosen_E],
            self.n_cells[chosen_E],
            self.noise_E[chosen_E],
            self.control_noise_E[chosen_E],
            self.features,
            self.called,
        )

    def groups(self, by: str, columns: Sequence[str]) -> list[frozenset[str]]:
        """Return the groups that each effect is in, of those that can be held out: targets, perturbations, contexts.

        Args:
            by: "target", "perturbation" or one of the context's columns; of any other column effects know nothing, and
                they are grouped by perturbation.
            columns: The context's columns.
        """
        if by == TARGET:
            return [frozenset(name.split("+")) for name in self.perturbation]
        if by in columns:
            place = list(columns).index(by)
            return [frozenset([values_of(where)[place]]) for where in self.context]
        return [frozenset([name]) for name in self.perturbation]


class EffectMethod(Protocol):
    """Anything that learns from effects and predicts others: a baseline or the model."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def fit(self, train: Study) -> Self:
        """Learn from cells, perturbed and not; no other cell is looked at."""

    def predict(self, control: Study, perturbation: str, context: str) -> NDArray[np.float64]:
        """Return delta_G: what the perturbation adds to the profile of these control cells."""


def contexts(study: Study, columns: Sequence[str]) -> NDArray[np.object_]:
    """Return each cell's context: its values in some columns, joined."""
    if not columns:
        return np.full(study.n_cells, "", dtype=object)
    labels = [study.label(column) for column in columns]
    told = {values: context_of(values) for values in set(zip(*labels, strict=True))}
    return np.array([told[values] for values in zip(*labels, strict=True)], dtype=object)


def effects(study: Study, measurement: str, columns: Sequence[str] = ("cell_type",)) -> Effects:
    """Sum up the cells of each perturbation and context, beside the unperturbed cells of the same context.

    Contexts with fewer than ``MIN_CELLS`` controls, and effects with fewer such cells, are left out.

    Raises:
        InputRefused: No effect is left.
    """
    counts_CG = study.measured(measurement)
    perturbation_C, context_C = study.label("perturbation"), contexts(study, columns)
    unperturbed_C = np.isin(perturbation_C, UNPERTURBED)
    lines = []
    for context in sorted(set(context_C)):
        here_C = context_C == context
        plain = np.flatnonzero(here_C & unperturbed_C)
        if len(plain) < MIN_CELLS:
            continue
        control_G, control_noise = profile(counts_CG[plain]), _noise(counts_CG[plain])
        for name in sorted(set(perturbation_C[here_C & ~unperturbed_C])):
            chosen_C = here_C & (perturbation_C == name)
            if chosen_C.sum() >= MIN_CELLS:
                rows = np.flatnonzero(chosen_C)
                treated = counts_CG[rows]
                lines.append((name, context, control_G, profile(treated), len(rows), _noise(treated), control_noise))
    if not lines:
        raise InputRefused(
            f"of the {study.n_cells:,} cells to learn from no perturbation has {MIN_CELLS} with {measurement} "
            f"beside as many controls of the same {', '.join(columns) or 'study'}; hold out less, or say other "
            f"contexts; controls have the perturbation {' or '.join(map(repr, UNPERTURBED))}"
        )
    names, where, control, treated_G, n_cells, noises, control_noises = zip(*lines, strict=True)
    return Effects(
        names,
        where,
        np.stack(control),
        np.stack(treated_G),
        np.array(n_cells),
        np.array(noises),
        np.array(control_noises),
        tuple(study.features[measurement]),
        tuple(study.called.get(measurement, ())),
    )


def _noise(counts_CG: csr_matrix) -> float:
    """Return the sampling variance of a profile, on average over features."""
    return float(((profile(counts_CG[::2]) - profile(counts_CG[1::2])) ** 2).mean()) / 4


def profile(counts_CG: csr_matrix) -> NDArray[np.float64]:
    """Return profile_G of some cells: log1p of their summed counts per 10,000 of all their counts."""
    total_G = np.asarray(counts_CG.sum(axis=0), dtype=np.float64).ravel()
    logs_G: NDArray[np.float64] = np.log1p(SCALE * total_G / max(1.0, total_G.sum()))
    return logs_G


def halves(
    study: Study, columns: Sequence[str], seed: int, apart_C: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Split the cells of every perturbation and context, controls too, into two disjoint random halves.

    One half predicting the other is what a replicate of the experiment would reach: the ceiling.

    Args:
        study: The cells.
        columns: What makes a context.
        seed: Of the draw.
        apart_C: Cells that are halved apart from the others of their perturbation and context.
    """
    key_C = contexts(study, ["perturbation", *columns])
    draw_C = np.random.default_rng([seed, study.n_cells]).random(study.n_cells)
    _, code_C = np.unique(key_C.astype(str), return_inverse=True)
    if apart_C is not None:
        code_C = 2 * code_C + apart_C
    order = np.lexsort((draw_C, code_C))
    place_C = np.empty(study.n_cells, np.int64)
    starts = np.searchsorted(code_C[order], np.arange(code_C.max() + 1))
    place_C[order] = np.arange(study.n_cells) - starts[code_C[order]]
    return place_C % 2 == 0, place_C % 2 == 1
