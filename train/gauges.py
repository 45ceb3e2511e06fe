"""This module shows a run's figures to Prometheus through Ray's metrics; names begin with ``ray_somaflow_train_``."""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

from train.record import PARTS

SHOWN = {
    "loss": "Mean loss of the last step, nats per known feature.",
    "loss_test": "Held-out loss, where it was measured.",
    "lr": "Learning rate.",
    "grad_norm": "Norm of the gradient before clipping.",
    "step": "Last finished step.",
    "mfu": "Share of the GPUs' arithmetic that the last step used.",
    "entropy_ratio": "How well batches are mixed: 1 is an ideal shuffle.",
}
COUNTED = {
    "cells": "Cells trained on.",
    "tokens": "Tokens trained on.",
    "operations": "Floating point operations of training, forward and backward.",
}


class Gauges:
    """What the first worker of a run shows."""

    def __init__(self, run: str) -> None:
        """Name the run; every figure carries the name."""
        self.tags = {"run": run}
        self.gauges = {key: Gauge(f"somaflow_train_{key}", text, tag_keys=("run",)) for key, text in SHOWN.items()}
        self.counters = {
            key: Counter(f"somaflow_train_{key}_total", text, tag_keys=("run",)) for key, text in COUNTED.items()
        }
        self.seconds = Counter(
            "somaflow_train_seconds_total", "Seconds of steps, by what they went to.", tag_keys=("run", "part")
        )
        self.rate = Gauge("somaflow_train_tokens_per_second", "Tokens a second of the last step.", tag_keys=("run",))
        self.ended = Gauge("somaflow_train_last_step_unixtime", "When the last step ended.", tag_keys=("run",))

    def show(self, row: dict[str, float]) -> None:
        """Show a step's figures."""
        for key, gauge in self.gauges.items():
            if key in row:
                gauge.set(row[key], self.tags)
        for key, counter in self.counters.items():
            if row[key] > 0:
                counter.inc(row[key], self.tags)
        taken = {part: row[part] for part in PARTS}
        for part, seconds in taken.items():
            if seconds > 0:
                self.seconds.inc(seconds, self.tags | {"part": part})
        self.rate.set(row["tokens"] / max(1e-9, sum(taken.values())), self.tags)
        self.ended.set(row.get("time", time.time()), self.tags)
