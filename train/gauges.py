"""This module shows a run's figures to Prometheus through Ray's metrics; names there begin with ``ray_``."""

from __future__ import annotations

import time
from collections.abc import Iterable

from store.cluster import RayMetrics
from train.record import PARTS, USEFUL
from train.settings import RunSettings

METRICS = {
    "somaflow_train_loss": ("gauge", "Mean loss of the last step, nats per known feature.", ("run",)),
    "somaflow_train_loss_test": ("gauge", "Held-out loss, where it was measured.", ("run",)),
    "somaflow_train_lr": ("gauge", "Learning rate.", ("run",)),
    "somaflow_train_grad_norm": ("gauge", "Norm of the gradient before clipping.", ("run",)),
    "somaflow_train_step": ("gauge", "Last finished step.", ("run",)),
    "somaflow_train_steps_wanted": ("gauge", "Step that the run ends with.", ("run",)),
    "somaflow_train_last_step_unixtime": (
        "gauge",
        "When the last step ended; before one, when the workers began.",
        ("run",),
    ),
    "somaflow_train_mfu": (
        "gauge",
        "Share of the GPUs' arithmetic that the last step used; where a device's peak is known.",
        ("run",),
    ),
    "somaflow_train_goodput_ratio": (
        "gauge",
        "Share of the time since the run's first step in which a step that was kept learned.",
        ("run",),
    ),
    "somaflow_train_useful_seconds": (
        "gauge",
        "Seconds in which steps that were kept learned, since the run's first; less after a restart that lost some.",
        ("run",),
    ),
    "somaflow_train_entropy_ratio": ("gauge", "How well batches are mixed: 1 is an ideal shuffle.", ("run",)),
    "somaflow_train_checkpoint_step": ("gauge", "Step of the newest state that is whole; 0 before one.", ("run",)),
    "somaflow_train_checkpoint_unixtime": (
        "gauge",
        "When that state was first seen; before one, when the workers began.",
        ("run",),
    ),
    "somaflow_train_checkpoint_every_steps": ("gauge", "Steps between saves, as the run was told.", ("run",)),
    "somaflow_train_tokens_per_second": ("gauge", "Tokens a second of the last step.", ("run",)),
    "somaflow_train_cells_total": ("counter", "Cells trained on.", ("run",)),
    "somaflow_train_tokens_total": ("counter", "Tokens trained on.", ("run",)),
    "somaflow_train_operations_total": (
        "counter",
        "Floating point operations of training, forward and backward.",
        ("run",),
    ),
    "somaflow_train_seconds_total": ("counter", "Seconds of steps, by what they went to.", ("run", "part")),
    "somaflow_train_cache_blocks_total": (
        "counter",
        "Blocks that the first worker looked for in its local cache, by whether they were there (yes, no).",
        ("run", "found"),
    ),
}
"""Name to kind, meaning and labels. ``infra/monitoring/check.py`` reads it as it stands here: plain values only."""
SHOWN = ("loss", "loss_test", "lr", "grad_norm", "step", "mfu", "entropy_ratio", "checkpoint_step")
COUNTED = ("cells", "tokens", "operations")


class Gauges:
    """What the first worker of a run shows."""

    def __init__(self, settings: RunSettings, kept: Iterable[dict[str, float]] = ()) -> None:
        """Begin; every figure carries the run's name. Ray must run.

        Args:
            settings: The run's.
            kept: Figures of the steps that the run goes on from, for the goodput.
        """
        self.run, self.metrics = settings.name, RayMetrics(METRICS)
        self.useful_s, self.begun, last = 0.0, None, 0.0
        for row in kept:
            self.useful_s += _useful(row)
            self.begun = row["time"] - _whole(row) if self.begun is None else self.begun
            last = row["step"]
        self.committed, self.committed_at = -1.0, time.time()
        self._set("step", last)
        self._set("last_step_unixtime", time.time())
        self._set("steps_wanted", settings.steps)
        self._set("checkpoint_every_steps", settings.checkpoint_every)

    def __enter__(self) -> Gauges:
        return self

    def __exit__(self, *error: object) -> None:
        self.metrics.close()

    def show(self, row: dict[str, float]) -> None:
        """Show a step's figures."""
        for key in SHOWN:
            if key in row:
                self._set(key, row[key])
        for key in COUNTED:
            self._count(key, row[key])
        for part in PARTS:
            self._count("seconds", row[part], part=part)
        for found, key in (("yes", "cache_hits"), ("no", "cache_misses")):
            self._count("cache_blocks", row.get(key, 0.0), found=found)
        now = row.get("time", time.time())
        self._set("tokens_per_second", row["tokens"] / max(1e-9, _whole(row)))
        self._set("last_step_unixtime", now)
        self._show_goodput(row, now)
        self._show_lag(row.get("checkpoint_step", 0.0), now)

    def _show_goodput(self, row: dict[str, float], now: float) -> None:
        if self.begun is None:
            self.begun = now - _whole(row)
        self.useful_s += _useful(row)
        self._set("useful_seconds", self.useful_s)
        self._set("goodput_ratio", self.useful_s / max(1e-9, now - self.begun))

    def _show_lag(self, committed: float, now: float) -> None:
        if committed != self.committed:
            if self.committed >= 0:
                self.committed_at = now
            self.committed = committed
        self._set("checkpoint_unixtime", self.committed_at)

    def _set(self, key: str, value: float) -> None:
        self.metrics.set(f"somaflow_train_{key}", value, run=self.run)

    def _count(self, key: str, number: float, **labels: str) -> None:
        self.metrics.count(f"somaflow_train_{key}_total", number, run=self.run, **labels)


def _whole(row: dict[str, float]) -> float:
    return sum(row.get(part, 0.0) for part in PARTS)


def _useful(row: dict[str, float]) -> float:
    return sum(row.get(part, 0.0) for part in USEFUL)
