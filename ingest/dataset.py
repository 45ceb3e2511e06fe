"""This module is one dataset between source and lake: inspected whole, then read as harmonised, checked blocks.

Shape letters used in this module:
    C  cells of a block      G  features in the lake's names
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse

from ingest import check, harmonize
from ingest.harmonize import FeatureMap
from ingest.job import SourceSettings
from ingest.sources import kind_of, open_dataset
from ingest.sources.form import SourceDataset
from store.errors import InputRefused
from store.schema import DatasetPlan, measured_column

TRANSFORM_VERSION = 1
"""Raised when the same source and settings would be written differently."""

BLOCK_NNZ = 2**22
BLOCK_CELLS = 16384
FEATURE_KIND = {"RNA": "gene", "protein": "protein", "ATAC": "peak", "guide": "guide"}


@dataclass(frozen=True)
class Inspected:
    """What an inspection found: the plan, cells ready for the lake, and where to cut the work."""

    plan: DatasetPlan
    obs: pd.DataFrame = field(repr=False)
    leftovers: pd.DataFrame = field(repr=False)
    spans: dict[str, list[tuple[int, int]]]
    nnz: dict[str, int]
    notes: list[str]


class OpenDataset:
    """A source's dataset seen in the lake's names."""

    def __init__(self, source: SourceSettings, name: str) -> None:
        self.source = source
        self.form: SourceDataset = open_dataset(source, name)

    @cached_property
    def maps(self) -> dict[str, FeatureMap]:
        """Measurement to where each of the source's columns goes."""
        genes = self.source.genes
        return {
            name: harmonize.map_genes(part.var, genes)
            if name == "RNA" and self.form.organism != "synthetic_construct"
            else harmonize.map_plain(part.var, FEATURE_KIND.get(name, name))
            for name, part in self.form.parts.items()
        }

    def block(self, measurement: str, start: int, stop: int) -> scipy.sparse.csr_matrix:
        """Read rows as counts_CG in the plan's order of features.

        Raises:
            InputRefused: The values are not counts; the message gives the evidence.
        """
        part = self.form.parts[measurement]
        counts = part.rows(start, stop)
        if self.source.values == "log1p" and measurement == self.source.measurement:
            counts = check.counts_from_log1p(counts, start)
        found = check.problems(counts, [str(name) for name in part.var.index], start)
        if found:
            raise InputRefused(
                f"{measurement}: {'; '.join(found)}. Counts are wanted: name their layer with layer=raw or layer=NAME, "
                "or say values=log1p for log1p of scaled counts"
            )
        return self.maps[measurement].apply(counts)

    def inspect(self) -> Inspected:
        """Read everything once: every problem is found before anything is written.

        Raises:
            InputRefused: All problems of the dataset, in one message.
        """
        problems: list[str] = []
        obs, leftovers = pd.DataFrame(), pd.DataFrame()
        try:
            obs, leftovers = harmonize.map_obs(self.form.obs, self._obs_given())
        except InputRefused as error:
            problems.append(str(error))
        if self.form.obs.index.has_duplicates:
            twice = self.form.obs.index[self.form.obs.index.duplicated()][0]
            problems.append(f"cell {twice!r} stands more than once")
        spans, nnz = {}, {}
        for measurement in self.form.parts:
            try:
                spans[measurement], nnz[measurement] = self._spans(measurement)
            except InputRefused as error:
                problems.append(str(error))
        if self.form.n_obs == 0:
            problems.append("it has no cells")
        if problems:
            raise InputRefused(f"{self.source.uri}: " + " | ".join(problems))
        for measurement, part in self.form.parts.items():
            if part.measured_C is not None:
                obs[measured_column(measurement)] = part.measured_C
        notes = [note for mapped in self.maps.values() for note in mapped.notes]
        if len(leftovers.columns):
            notes.append(f"obs columns kept in the side table: {', '.join(map(str, leftovers.columns))}")
        return Inspected(self._plan(), obs, leftovers, spans, nnz, notes)

    def _obs_given(self) -> dict[str, str]:
        table = self.source.obs_table
        if table:
            more = pd.read_csv(table, sep="\t", index_col=0)
            more.index = more.index.astype(str)
            fresh = [str(column) for column in more if column not in self.form.obs]
            self.form.obs[fresh] = more[fresh].reindex(self.form.obs.index)
        return self.source.obs

    def _plan(self) -> DatasetPlan:
        settings = self.source.model_dump(mode="json", exclude={"uri", "kind", "title", "truth"})
        identity = json.dumps([TRANSFORM_VERSION, self.form.dataset_id, self.form.digest, settings], sort_keys=True)
        info = {**self.form.info, "source_uri": self.source.uri, "source_kind": kind_of(self.source)}
        return DatasetPlan(
            dataset_id=self.form.dataset_id,
            organism=self.form.organism,
            key=hashlib.sha256(identity.encode()).hexdigest(),
            n_obs=self.form.n_obs,
            features={name: mapped.features for name, mapped in self.maps.items()},
            info=info,
        )

    def _spans(self, measurement: str) -> tuple[list[tuple[int, int]], int]:
        """Check all rows and cut them where a block is full; return the cuts and the non-zeros."""
        spans, total, start, held = [], 0, 0, 0
        for first, counts in self._probes(measurement):
            nnz_C = np.diff(counts.indptr)
            total += int(nnz_C.sum())
            for offset, nnz in enumerate(nnz_C):
                row = first + offset
                if row > start and (held + nnz > BLOCK_NNZ or row - start >= BLOCK_CELLS):
                    spans.append((start, row))
                    start, held = row, 0
                held += int(nnz)
        spans.append((start, self.form.n_obs))
        return spans, total

    def _probes(self, measurement: str) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
        width = max(1, len(self.form.parts[measurement].var))
        step = max(1, min(4096, 2**25 // width))
        for start in range(0, self.form.n_obs, step):
            yield start, self.block(measurement, start, min(start + step, self.form.n_obs))
