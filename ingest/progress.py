"""This module shows how far an ingestion is: in the terminal, in the lake for ``ingest status`` to read, to Prometheus.

On a terminal there is a bar for each dataset; elsewhere one line every ten seconds.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import progress as rich_progress

from ingest.gauges import Gauges
from store import records
from store.command import console
from store.writer import BlockStats

SHOWN_EVERY_S = 10.0
KEPT_EVERY_S = 2.0
ENDED_SHOWN = 10
"""Bars of datasets that have ended which stay in sight: all are drawn anew ten times a second."""


class Progress:
    """A context manager that is told what happens and shows it.

    Args:
        lake_uri: The lake that keeps it for others to read; none keeps nothing.
        gauges: What Prometheus reads; none shows it nothing.
    """

    def __init__(self, lake_uri: str | None, gauges: Gauges | None = None) -> None:
        self.gauges = gauges
        self._coming = self._in_sight = 0
        name = f"{socket.gethostname()}-{os.getpid()}.json"
        self.uri = None if lake_uri is None else records.join(lake_uri, records.FOLDER, "running", name)
        self.rows: dict[str, dict[str, Any]] = {}
        self._begun = self._shown = self._kept = time.monotonic()
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[speed]}"),
            rich_progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._ended: deque[rich_progress.TaskID] = deque()

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self.uri:
            records.remove(self.uri)

    def coming(self, datasets: int) -> None:
        """So many are not in sight yet, as far as one can tell."""
        self._coming = datasets
        self._show_left()

    def add(self, name: str) -> None:
        """A dataset has come into sight."""
        self.rows[name] = {"state": "checking", "rows": 0, "done": 0}
        self._in_sight += 1
        self._show_left()

    def task_ended(self) -> None:
        """A task came back."""
        if self.gauges:
            self.gauges.task_ended()

    def size(self, name: str, rows: int) -> None:
        """A dataset's rows (cells x measurements) are known."""
        self.rows[name]["rows"] = rows
        self._tasks[name] = self._bars.add_task(name, total=rows, speed="checking")

    def advance(self, name: str, rows: int) -> None:
        """Rows of a dataset are in the lake."""
        row = self.rows[name]
        row["state"] = "writing"
        row.setdefault("since", time.monotonic())
        row["done"] += rows
        if name in self._tasks:
            self._bars.update(self._tasks[name], advance=rows, speed=f"{self._speed():,.0f} rows/s")
        self.tick()

    def wrote(self, name: str, blocks: Sequence[BlockStats]) -> None:
        """Blocks of a dataset are in the lake."""
        if self.gauges:
            self.gauges.wrote(blocks)
        self.advance(name, sum(len(block.nnz_C) for block in blocks))

    def done(self, name: str, state: str, failed: bool = False) -> None:
        """A dataset has come to its end; ``failed``: not for what it holds."""
        if name in self.rows:
            self.rows[name]["state"] = state
        if self.gauges:
            self.gauges.ended("failed" if failed else state)
        self._in_sight -= 1
        self._show_left()
        if name in self._tasks:
            self._ended.append(self._tasks.pop(name))
            self._bars.update(self._ended[-1], speed=state)
            if len(self._ended) > ENDED_SHOWN:
                self._bars.remove_task(self._ended.popleft())
        self.tick(force=True)

    def tick(self, force: bool = False) -> None:
        """Show and keep where things stand, if it is time."""
        now = time.monotonic()
        if self.uri and (force or now - self._kept > KEPT_EVERY_S):
            self._kept = now
            records.replace(self.uri, self.status())
        if not console.is_terminal and now - self._shown > SHOWN_EVERY_S:
            self._shown = now
            status = self.status()
            done, rows, eta = status["rows_done"], status["rows_seen"], status["eta_s"]
            left = f", {eta:,.0f} s to go" if eta is not None else ""
            if rows:  # a cell has a row in each measurement
                speed = status["rows_per_s"]
                console.print(f"{done:,} of {rows:,} rows of all measurements, {speed:,.0f} rows/s{left}")

    def status(self) -> dict[str, Any]:
        """Return states, rows, speed, and seconds to go for what is in sight."""
        left_out = ("present", "refused", "planned")
        coming = [row for row in self.rows.values() if row["state"] not in left_out]
        done, seen = (sum(row[key] for row in coming) for key in ("done", "rows"))
        speed = self._speed()
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "running_s": round(time.monotonic() - self._begun, 1),
            "rows_done": done,
            "rows_seen": seen,
            "rows_per_s": round(speed, 1),
            "eta_s": round((seen - done) / speed, 1) if speed else None,
            "datasets": [
                {"dataset": name, **{key: row[key] for key in ("state", "rows", "done")}}
                for name, row in self.rows.items()
            ],
        }

    def _show_left(self) -> None:
        if self.gauges:
            self.gauges.left(self._coming + self._in_sight)

    def _speed(self) -> float:
        since = min((row["since"] for row in self.rows.values() if "since" in row), default=None)
        done = sum(row["done"] for row in self.rows.values())
        return done / max(1e-3, time.monotonic() - self._begun) if since is not None else 0.0
