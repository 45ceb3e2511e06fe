"""This module reads simulated cells: ``simulated:`` with the sizes of the source's ``simulation`` section."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import pandas as pd

from ingest import simulate
from ingest.job import SourceSettings
from ingest.sources.form import Part, SourceDataset, memory_rows


def names(source: SourceSettings) -> list[str]:
    """Name the simulation after its seed."""
    return [source.dataset_id or f"simulated-{source.simulation.seed}"]


@lru_cache(maxsize=1)
def _simulation(settings: simulate.SimulationSettings) -> simulate.Simulation:
    return simulate.simulate(settings)


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Simulate; writes the truth when the source names a folder for it."""
    made = _simulation(source.simulation)
    if source.truth:
        simulate.write_truth(source.truth, made.truth)
    features = {"RNA": made.truth.genes, "protein": made.truth.proteins, "ATAC": made.truth.peaks}
    return SourceDataset(
        dataset_id=name,
        organism="synthetic_construct",
        read_obs=lambda: made.obs.set_index("cell_id", drop=False),
        n_obs=len(made.obs),
        parts={
            measurement: Part(pd.DataFrame(index=ids), memory_rows(made.counts[measurement]))
            for measurement, ids in features.items()
        },
        content=lambda: hashlib.sha256(source.simulation.model_dump_json().encode()).hexdigest(),
        info={"dataset_title": source.title or "simulated cells of known truth"},
    )
