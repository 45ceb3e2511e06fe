"""This module shows an ingestion's figures to Prometheus through Ray's metrics; names there begin with ``ray_``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from store.cluster import RayMetrics
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
        self.lake, self.metrics = lake, RayMetrics(METRICS)
        self.task_ended()

    def __enter__(self) -> Gauges:
        return self

    def __exit__(self, *error: object) -> None:
        self.metrics.close()

    def left(self, datasets: int) -> None:
        """Show how many datasets have not come to their end."""
        self.metrics.set("somaflow_ingest_datasets_left", datasets, lake=self.lake)

    def task_ended(self) -> None:
        """Show that something goes on."""
        self.metrics.set("somaflow_ingest_last_task_unixtime", time.time(), lake=self.lake)

    def wrote(self, blocks: Sequence[BlockStats]) -> None:
        """Count what was written."""
        for block in blocks:
            labels = {"lake": self.lake, "measurement": block.measurement}
            self.metrics.count("somaflow_ingest_cells_total", len(block.nnz_C), **labels)
            self.metrics.count("somaflow_ingest_nonzeros_total", int(block.nnz_C.sum()), **labels)

    def ended(self, state: str) -> None:
        """Count a dataset that came to its end."""
        self.metrics.count("somaflow_ingest_datasets_total", lake=self.lake, state=state)
