"""This module records what a run does and came to: a line for each step, a summary, whole files only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from store.errors import InputRefused, MissingError
from train.checkpoint import json_values

T = TypeVar("T")
"""What is taken of a row."""

PARTS = ("data_wait_s", "h2d_s", "forward_backward_s", "optimizer_s", "checkpoint_s")
"""Where the time of a step goes."""
SUMMED = ("step", "loss", "cells", "data_wait_s")
"""What every row has, of which a run's figures are made."""
USEFUL = ("h2d_s", "forward_backward_s", "optimizer_s")
"""Parts in which a step learns; ``h2d_s`` is among them, for it lies within the next part where it is not measured."""


@dataclass(frozen=True)
class Summary:
    """What a run came to."""

    steps: int
    loss_first: float
    loss_last: float
    loss_test: float
    loss_test_first: float
    cells_per_s: float
    data_wait_share: float
    parameters: int
    checkpoint: str
    resumed_from: int


def iter_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Read a run's metrics, one dictionary for each finished step; a last line that was cut off is not there.

    Raises:
        InputRefused: A line is damaged.
    """
    return (row for row, _ in iter_rows(path, _summed))


def _summed(row: dict[str, Any]) -> dict[str, float]:
    for key in SUMMED:
        float(row[key])
    return row


def iter_rows(path: Path, take: Callable[[dict[str, Any]], T]) -> Iterator[tuple[T, int]]:
    """Yield what is taken of each whole line's row, and how many bytes the line has; a last one may be cut off.

    Args:
        path: A run's metrics.
        take: Raises KeyError, TypeError, ValueError or OverflowError where it is no row.

    Raises:
        InputRefused: A line is damaged.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                taken = take(json.loads(line))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise InputRefused(f"{path}: line {number} is not a step's row: {error}; remove the line") from None
            yield taken, len(line)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read all of a run's metrics into memory: some 2 KB for each step."""
    return list(iter_metrics(path))


def kept_metrics(path: Path, step: int) -> Iterator[dict[str, float]]:
    """Read the metrics of the steps up to this one; none where a run begins."""
    return takewhile(lambda row: row["step"] <= step, iter_metrics(path)) if path.exists() else iter(())


def _end_of(path: Path, step: int) -> int:
    """Return where the whole lines of the steps up to this one end, in bytes."""
    return sum(size for _, size in takewhile(lambda line: line[0]["step"] <= step, iter_rows(path, _summed)))


def read_summary(folder: Path) -> Summary:
    """Read what a finished run came to.

    Raises:
        MissingError: It is not finished.
        InputRefused: What is there is damaged, or of another version.
    """
    path = folder / "summary.json"
    name = next((name for name in ("checkpoint", "adapter") if (folder / name).exists()), "checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        figures: dict[str, Any] = {name: number_or_nan(value) for name, value in values.items()}
        return Summary(**figures, checkpoint=str(folder / name))
    except FileNotFoundError:
        raise MissingError(f"{path}: not there; a run leaves it when it is finished") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputRefused(f"{path}: no summary of this version: {error}; start the run again") from None


def number_or_nan(value: float | None) -> float:
    """Return NaN for what JSON has as null."""
    return math.nan if value is None else value


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as a whole file; what is no number is null."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(json_values(values), indent=1, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)


class Metrics:
    """One JSON line for each step; lines after the step that a run resumes from are dropped, they come again."""

    def __init__(self, path: Path, rank: int, step: int) -> None:
        self.path = path
        self.rank = rank
        self.step = step

    def __enter__(self) -> Metrics:
        if self.rank == 0:
            if self.path.exists():
                os.truncate(self.path, _end_of(self.path, self.step))
            self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if self.rank == 0:
            self.file.close()

    def write(self, row: dict[str, float]) -> None:
        """Append a row."""
        self.file.write(json.dumps(json_values(row), allow_nan=False) + "\n")
        self.file.flush()
