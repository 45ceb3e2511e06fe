"""This module shows an ingestion's figures to Prometheus through Ray's metrics; names there begin with ``ray_``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from store.cluster import ray_metrics
from store.writer import BlockStats

METRICS = {
    "somaflow_ingest_cells_total": (
        "counter",
        "Cells whose values of a measurement were written, those of datasets that fail later among them.",
        ("lake", "measurement"),
    ),
    "somaflow_ingest_nonzeros_total": (
        "counter",
        "Non-zero values that were written, likewise.",
        ("lake", "measurement"),
    ),
    "somaflow_ingest_datasets_total": (
        "counter",
        "Datasets that came to their end: committed, present (nothing to do), refused (their content) or failed.",
        ("lake", "state"),
    ),
    "somaflow_ingest_datasets_left": (
        "gauge",
        "Datasets that have not come to their end; a source that was not opened yet counts as one.",
        ("lake",),
    ),
    "somaflow_ingest_last_task_unixtime": ("gauge", "When a task last ended, well or not.", ("lake",)),
}
"""Name to kind, meaning and labels. ``infra/monitoring/check.py`` reads it as it stands here: plain values only."""


class Gauges:
    """What the driver of an ingestion shows: it counts what comes back to it, so tasks that run twice count once."""

    def __init__(self, lake: str) -> None:
        """Name the lake; every figure carries it. Ray must run."""
        self.tags = {"lake": lake}
        self.metrics = ray_metrics(METRICS)
        self.task_ended()

    def left(self, datasets: int) -> None:
        """Show how many datasets have not come to their end."""
        self.metrics["somaflow_ingest_datasets_left"].set(datasets, self.tags)

    def task_ended(self) -> None:
        """Show that something goes on."""
        self.metrics["somaflow_ingest_last_task_unixtime"].set(time.time(), self.tags)

    def wrote(self, blocks: Sequence[BlockStats]) -> None:
        """Count what was written."""
        for block in blocks:
            tags = self.tags | {"measurement": block.measurement}
            for name, number in (("cells", len(block.nnz_C)), ("nonzeros", int(block.nnz_C.sum()))):
                if number > 0:
                    self.metrics[f"somaflow_ingest_{name}_total"].inc(number, tags)

    def ended(self, state: str) -> None:
        """Count a dataset that came to its end."""
        self.metrics["somaflow_ingest_datasets_total"].inc(1, self.tags | {"state": state})
