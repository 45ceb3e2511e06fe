"""This module numbers what is said of cells, for training: small tables that turn a snapshot's codes into a model's.

Shape letters used in this module:
    V  values of a field      T  targets of a perturbation
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.schema import UNKNOWN
from store.snapshot import Snapshot
from train.cells import PROMPTS

FIELDS = (*PROMPTS, "perturbation", "dataset_id")
"""Fields of a snapshot's codes that every batch needs."""
NOT_SAID = {"", "unknown", "na", "nan"}


@dataclass(frozen=True)
class Labels:
    """Values behind the codes of a batch, and how a snapshot's own codes become these.

    Attributes:
        values: Field to values; a value's position is its code, "" (not said) is the first.
        datasets: Datasets, numbered.
        prompts: For each snapshot: field of ``PROMPTS`` to code_V of each of the snapshot's codes.
        perturbation: For each snapshot: code_VT of the targets of each of its perturbations; 0 fills up.
        panel: For each snapshot: the number of each of its datasets.
    """

    values: dict[str, list[str]]
    datasets: list[str]
    prompts: tuple[dict[str, NDArray[np.int32]], ...]
    perturbation: tuple[NDArray[np.int32], ...]
    panel: tuple[NDArray[np.int32], ...]


def read_labels(
    snapshots: Snapshot | Sequence[Snapshot], learned: str | None = None, words: Mapping[str, list[str]] | None = None
) -> Labels:
    """Number the labels of snapshots; values are in alphabetical order after "" (not said).

    Args:
        snapshots: Whose labels; of several, a value that they share has one code.
        learned: The split that is trained on: a value that only other splits have gets no code and is "not said"
            there, so that a checkpoint never claims to know what it was not shown. None codes every value.
        words: A checkpoint's values by field, whose codes are kept; a value that it does not have is "not said".
    """
    several = (snapshots,) if isinstance(snapshots, Snapshot) else tuple(snapshots)
    known = [snapshot.label_values() for snapshot in several]

    def shown(field: str) -> set[str]:
        return {
            value
            for one in known
            for value, of in one[field].items()
            if (of.get(learned, 0) if learned is not None else sum(of.values()))
        }

    values = {name: ["", *sorted(shown(name) - NOT_SAID)] for name in PROMPTS}
    targets = {target for value in shown("perturbation") for target in value.split("+")}
    values["perturbation"] = ["", "control", *sorted(targets - {"", "control", UNKNOWN})]
    if words is not None:
        values = {name: list(words[name]) for name in values}
    datasets = list(dict.fromkeys(dataset for snapshot in several for dataset in snapshot.datasets))
    combined = [[value.split("+") for value in one["perturbation"]] for one in known]
    n_targets = max((len(names) for names_V in combined for names in names_V), default=1)
    return Labels(
        values=values,
        datasets=datasets,
        prompts=tuple({name: _codes(one[name], values[name]) for name in PROMPTS} for one in known),
        perturbation=tuple(_targets(names, values["perturbation"], n_targets) for names in combined),
        panel=tuple(_codes(one["dataset_id"], datasets) for one in known),
    )


def _codes(names: Iterable[str], values: list[str]) -> NDArray[np.int32]:
    position = {value: code for code, value in enumerate(values)}
    return np.array([position.get(name, 0) for name in names], dtype=np.int32)


def _targets(names_V: list[list[str]], values: list[str], n_targets: int) -> NDArray[np.int32]:
    position = {value: code for code, value in enumerate(values)}
    codes_VT = np.zeros((len(names_V), n_targets), dtype=np.int32)
    for number, names in enumerate(names_V):
        if all(name in position for name in names):  # one unknown target makes the whole combination unknown
            codes_VT[number, : len(names)] = [position[name] for name in names]
    return codes_VT
