"""This module sums up what a training run's rows come to: seconds by part, rates, goodput.

A table has a column for all that a row may say, NaN where it does not, and a row for each step.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from train.record import USEFUL

PARTS = {
    "data_wait_s": "waiting for data",
    "h2d_s": "host to device",
    "forward_backward_s": "forward and backward",
    "optimizer_s": "optimizer",
    "checkpoint_s": "saving the state",
}
"""What a row says of its step's seconds; a part that no row names was not measured apart."""
LOSSES = ("loss", "loss_asked", "loss_test")
SAID = ("step", "time", *LOSSES, "lr", "grad_norm", "cells", "tokens", "operations", "mfu", "entropy_ratio")
"""What else of a row is read; ``loss_test`` is there where the run was evaluated after the step."""

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Figures:
    """What a run's rows come to; NaN where there is no row.

    Attributes:
        steps: Rows.
        cells_s: Cells over the seconds of all steps; what lies between steps does not count.
        tokens_s: Tokens, likewise.
        operations_s: Floating point operations, likewise; NaN where the run did not count them.
        mfu: These over what its devices can do; NaN where nobody knows what they can.
        wall_s: From the first step's begin to the last one's end, with all restarts between them.
        goodput: Share of ``wall_s`` in which a step that was kept learned: neither waited for data nor saved. Steps
            that a restart took again are no rows, so that their seconds count as lost.
        medians: Part of a step (see ``PARTS``) to its median seconds, over the steps that had it.
        p95: Part to its 95th percentile, likewise.
        shares: Part to its share of the seconds of all steps; they add up to 1.
    """

    steps: int
    cells_s: float
    tokens_s: float
    operations_s: float
    mfu: float
    wall_s: float
    goodput: float
    medians: dict[str, float]
    p95: dict[str, float]
    shares: dict[str, float]


def figures(rows: Iterable[Row]) -> Figures:
    """Sum up a run's rows (see ``train.record.read_metrics``)."""
    return summed(table_of(rows))


def summed(table: pd.DataFrame) -> Figures:
    """Sum up a table of rows."""
    seconds = seconds_of(table)
    parts = {part: table[part].dropna() for part in PARTS if table[part].notna().any()}
    total = float(seconds.sum())
    wall_s = float(table["time"].iloc[-1] - table["time"].iloc[0] + seconds.iloc[0]) if len(table) else 0.0
    return Figures(
        steps=len(table),
        cells_s=ratio(table["cells"].sum(), total),
        tokens_s=ratio(table["tokens"].sum(), total),
        operations_s=ratio(table["operations"].sum(min_count=1), float(seconds[table["operations"].notna()].sum())),
        mfu=ratio((table["mfu"] * seconds).sum(min_count=1), float(seconds[table["mfu"].notna()].sum())),
        wall_s=wall_s,
        goodput=ratio(table[list(USEFUL)].sum().sum(), wall_s),
        medians={part: float(values.median()) for part, values in parts.items()},
        p95={part: float(values.quantile(0.95)) for part, values in parts.items()},
        shares={part: ratio(values.sum(), total) for part, values in parts.items()},
    )


def table_of(rows: Iterable[Row]) -> pd.DataFrame:
    """Return a column for all that a row may say, NaN where it does not; to save nothing takes no time, not 0 s.

    Rows go into the columns one by one: a million steps are 160 MB and twice that while they are read; as dictionaries
    they would be 2 GB.
    """
    columns = {name: array("d") for name in (*SAID, *PARTS)}
    for row in rows:
        for name, values in columns.items():
            value = row.get(name)
            values.append(math.nan if value is None else value)
    table = pd.DataFrame({name: np.frombuffer(values) for name, values in columns.items()})
    table["checkpoint_s"] = table["checkpoint_s"].replace(0.0, np.nan)
    return table


def seconds_of(table: pd.DataFrame) -> pd.Series[float]:
    """Return the seconds of each step, all its parts together."""
    return table[list(PARTS)].sum(axis=1)


def ratio(part: Any, whole: float) -> float:
    """Return a part of a whole; NaN of nothing."""
    return float(part) / whole if whole > 0 else math.nan
