"""This module holds out: which groups of cells a method is fitted on, calibrated on and judged by.

Shape letters used in this module:
    C  cells
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from store.errors import UsageError
from store.settings import Settings
from train.evaluation.study import Study

UNPERTURBED = ("", "control")
TARGET = "target"


class FoldSettings(Settings):
    """What is held out, in a TOML file that can be read aloud."""

    by: str
    """The obs column whose groups stay whole: ``donor_id``, ``dataset_id`` (a study), ``cell_type`` (a context),
    ``time``, ``perturbation``; or ``target``: a held-out target takes every combination that it is in with it."""
    held: tuple[str, ...] = ()
    """Groups to hold out; empty holds out every group, in turn."""
    folds: int = Field(default=0, ge=0)
    """The held groups are dealt to so many folds; 0 holds out each of them alone."""
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """obs column to values: only cells that have one of them are held out; the others of the group stay in training."""
    calibrate: float = Field(default=0.0, ge=0, lt=1)
    """Share of the groups that are not held out, drawn by the seed, which calibrates and does not train."""
    calibrate_on: tuple[str, ...] = ()
    """Groups that calibrate and do not train, in place of a share: ``["val"]`` of ``by = "split"``, say."""
    seed: int = Field(default=0, ge=0)
    """Decides which group falls where."""
    selection: str = "none"
    """Features were chosen: ``none``; ``train``: on training cells only; ``all``: on all cells, which is a leak."""
    knowledge_until: str = ""
    """The day (YYYY-MM-DD) up to which knowledge files may say what was published; empty does not ask."""
    days: dict[str, str] = Field(default_factory=dict)
    """Files of ``--sets``, as they are named there, to the day of their newest source; a checkpoint says its own."""

    @model_validator(mode="after")
    def _words_agree(self) -> FoldSettings:
        if set(self.held) & set(self.calibrate_on):
            raise ValueError(f"calibrate_on: {', '.join(set(self.held) & set(self.calibrate_on))} is held out")
        if self.calibrate and self.calibrate_on:
            raise ValueError("calibrate and calibrate_on: say one of them")
        for name, day in (("knowledge_until", self.knowledge_until), *self.days.items()):
            if day:
                try:
                    date.fromisoformat(day)
                except ValueError:
                    raise ValueError(f"{name} = {day!r} is no day; write it as 2024-12-31") from None
        if self.selection not in ("none", "train", "all"):
            raise ValueError(f"selection={self.selection!r}: say none, train or all")
        return self


@dataclass(frozen=True)
class Fold:
    """One way of holding out.

    Attributes:
        held: The held groups.
        train_C: Cells that methods are fitted on.
        test_C: Cells that they are judged by.
        calibrate_C: Cells that intervals and sets are calibrated on.
        group_C: All cells of the held groups, also those that ``where`` leaves in training.
    """

    held: tuple[str, ...]
    train_C: NDArray[np.bool_]
    test_C: NDArray[np.bool_]
    calibrate_C: NDArray[np.bool_]
    group_C: NDArray[np.bool_]

    @property
    def name(self) -> str:
        """The held groups in words."""
        return ", ".join(self.held)


def make_folds(study: Study, settings: FoldSettings) -> list[Fold]:
    """Return the folds; by perturbation or target, cells that nobody perturbed are never held out.

    Raises:
        UsageError: No such column, value or group, or nothing would be left to train on.
    """
    of = _membership(study, settings.by)
    groups = sorted(of)
    if not groups:
        raise UsageError(f"by = {settings.by!r}: no cell has any; hold out by another column")
    for field in ("held", "calibrate_on"):
        for name in getattr(settings, field):
            if name not in of:
                near = difflib.get_close_matches(name, groups, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(groups[:10])}"
                raise UsageError(f"{field}: no cell has {settings.by} {name!r}; {hint}")
    allowed_C = np.ones(study.n_cells, dtype=bool)
    for column, values in settings.where.items():
        found = np.isin(study.label(column), list(values))
        if not found.any():
            raise UsageError(f"where.{column}: no cell has {' or '.join(map(repr, values))}")
        allowed_C &= found
    held = sorted(settings.held or groups, key=lambda name: drawn_place(settings.seed, name))
    dealt = [[name] for name in held]
    if settings.folds:
        dealt = [held[number :: settings.folds] for number in range(min(settings.folds, len(held)))]
    return [_fold(study, settings, of, names, allowed_C) for names in dealt]


def _fold(
    study: Study,
    settings: FoldSettings,
    of: dict[str, NDArray[np.bool_]],
    names: list[str],
    allowed_C: NDArray[np.bool_],
) -> Fold:
    group_C: NDArray[np.bool_] = np.any([of[name] for name in names], axis=0)
    test_C = group_C & allowed_C
    others = sorted((name for name in of if name not in names), key=lambda name: drawn_place(settings.seed + 1, name))
    chosen = [name for name in settings.calibrate_on if name in others] or others[
        : round(settings.calibrate * len(others))
    ]
    if settings.calibrate and not chosen:
        both = len(others) > 1 or bool(settings.where)  # of which a part may stay in training
        raise UsageError(
            f"calibrate={settings.calibrate}: no whole group of the {len(others)} others; give a larger share"
            if both
            else f"calibrate={settings.calibrate}: with {settings.by} {'+'.join(names)} held out, {len(others)} other "
            "is left, which cannot calibrate and train; hold out fewer at once, or by a column of three groups or more"
        )
    calibrate_C = np.zeros(study.n_cells, dtype=bool)
    for name in chosen:
        calibrate_C |= of[name] & allowed_C & ~test_C
    train_C = ~test_C & ~calibrate_C
    if not test_C.any() or not train_C.any():
        what = "judge by" if not test_C.any() else "train on"
        beside = f", and {'+'.join(chosen)} to calibrate on," if chosen else ""
        raise UsageError(f"{settings.by} {'+'.join(names)} held out{beside} leaves no cell to {what}")
    return Fold(tuple(sorted(names)), train_C, test_C, calibrate_C, group_C)


def _membership(study: Study, by: str) -> dict[str, NDArray[np.bool_]]:
    """Return which cells are in each group."""
    value_C = study.label("perturbation" if by == TARGET else by)
    values, code_C = np.unique(value_C.astype(str), return_inverse=True)
    if by == "perturbation":
        return {name: code_C == code for code, name in enumerate(values) if name not in UNPERTURBED}
    if by != TARGET:
        return {name: code_C == code for code, name in enumerate(values) if name != "nan"}  # a number that nobody gave
    targets = sorted({target for name in values if name not in UNPERTURBED for target in name.split("+")})
    hits = {target: np.array([target in name.split("+") for name in values]) for target in targets}
    return {target: hits[target][code_C] for target in targets}


def drawn_place(seed: int, label: str) -> bytes:
    """Return what groups are sorted by to be dealt: a hash of seed and name, whatever other groups there are."""
    return hashlib.sha256(f"{seed}|{label}".encode()).digest()
