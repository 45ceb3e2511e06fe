"""This module is one dataset between source and lake: its names inspected, its rows checked, then read harmonised.

It runs in the process that parses foreign files (``ingest.sandbox``); nothing here writes to a lake.

Shape letters used in this module:
    C  cells of a block      G  features in the lake's names
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from ingest import check, harmonize, ontology
from ingest.harmonize import FeatureMap
from ingest.job import FILES, SourceSettings, Values
from ingest.obs import map_obs
from ingest.sources import kind_of, open_dataset
from ingest.sources.form import SourceDataset, content_digest, fingerprint, lasting, read_obs_table, tags
from store.errors import InputRefused
from store.records import absolute
from store.schema import DatasetPlan, measured_column

TRANSFORM_VERSION = 9
"""Raised when the same source and settings would be written differently."""

SPAN_CELLS = (2**12, 2**14)
SPANS = (8, 64)
"""A dataset is cut into 8 spans of at least 4,096 cells, more of at most 16,384, or 64 larger ones: enough to keep
workers busy, few enough that a lake of 100 M cells has some thousands of fragments."""

FEATURE_KIND = {
    "RNA": "gene",
    "protein": "protein",
    "ATAC": "peak",
    "guide": "guide",
    "peptide": "peptide",
    "metabolite": "metabolite",
    "methylation": "site",
    "methylation_coverage": "site",
    "miRNA": "miRNA",
}
MITOCHONDRIAL = ("mt-", "MT-")


@dataclass(frozen=True)
class Inspected:
    """What is known of a dataset before its values are read: the plan, cells ready for the lake, where to cut."""

    plan: DatasetPlan
    obs: pd.DataFrame = field(repr=False)
    sides: dict[str, pd.DataFrame] = field(repr=False)
    spans: list[tuple[int, int]]
    mapped: dict[str, float]
    problems: list[str]
    notes: list[str]
    fingerprint: str


@dataclass(frozen=True)
class Checked:
    """What the values of a span are.

    Attributes:
        problems: Why they are refused; empty when they are not.
        step: Rows that can be read at a time within the budget.
        nnz_C: Stored values of each cell.
        sum_C: Their sum.
        mito_C: The part of ``sum_C`` in mitochondrial genes.
        digest_C: Each cell's digest (``check.cell_digests``).
    """

    problems: list[str]
    step: int
    nnz_C: NDArray[np.int64] = field(repr=False)
    sum_C: NDArray[np.float64] = field(repr=False)
    mito_C: NDArray[np.float64] = field(repr=False)
    digest_C: NDArray[np.uint64] = field(repr=False)


def fingerprint_of(source: SourceSettings) -> str:
    """Return what changes when a source is written to; empty for what is no file."""
    return "" if kind_of(source) in ("census", "simulated") else fingerprint(source.uri)


class OpenDataset:
    """A source's dataset seen in the lake's names."""

    def __init__(self, source: SourceSettings, name: str) -> None:
        self.source = source
        self.opened_as = fingerprint_of(source)
        self.form: SourceDataset = open_dataset(source, name)

    @cached_property
    def maps(self) -> dict[str, FeatureMap]:
        """Measurement to where each of the source's columns goes."""
        source = self.source
        return {
            name: harmonize.map_genes(part.var, source.genes, source.hgnc, sums=self.counted(name))
            if name == "RNA" and self.form.organism != "synthetic_construct"
            else harmonize.map_plain(part.var, FEATURE_KIND.get(name, name), sums=self.counted(name))
            for name, part in self.form.parts.items()
        }

    def counted(self, measurement: str) -> bool:
        """Say whether a measurement's values come into the lake as counts."""
        return self.values(measurement) in ("counts", "log1p")

    def values(self, measurement: str) -> Values:
        """Return what the source says that a measurement's values are."""
        layer = self.form.parts[measurement].layer
        if layer:
            return "counts" if layer == "raw" else layer  # type: ignore[return-value]
        given = self.source.values
        if isinstance(given, dict):
            return given.get(measurement, "counts")
        applies = measurement == self.source.measurement or given in ("lognorm", "value")
        return given if applies else "counts"

    def seems_unchanged(self) -> bool:
        """Say whether the source's sizes, times and tags are those with which it was opened."""
        return not self.opened_as or self.opened_as.startswith(tags(self.source.uri))

    def block(self, measurement: str, start: int, stop: int) -> scipy.sparse.csr_matrix:
        """Read rows as counts_CG in the plan's order of features, not checked."""
        counts = self._rows(measurement, start, stop)
        return self.maps[measurement].apply(counts)

    def _rows(self, measurement: str, start: int, stop: int) -> scipy.sparse.csr_matrix:
        counts = self.form.parts[measurement].rows(start, stop)
        kind = self.values(measurement)
        if kind == "value" and np.isnan(counts.data).any():
            stored = counts.tocoo()
            there = ~np.isnan(stored.data)
            kept = (stored.data[there], (stored.row[there], stored.col[there]))
            return scipy.sparse.coo_matrix(kept, shape=counts.shape).tocsr()
        if kind != "value" and not counts.data.all():
            counts.eliminate_zeros()  # stored or not, a zero is the same: no feature was detected
        return check.counts_from_log1p(counts, start) if kind == "log1p" else counts

    def check(self, measurement: str, start: int, stop: int, budget_nnz: int) -> Checked:
        """Read a span's values once: what is wrong with them, and what they add up to."""
        part, mapped = self.form.parts[measurement], self.maps[measurement]
        judges = {"lognorm": check.lognorm_problems, "value": check.level_problems}
        judge = judges.get(self.values(measurement), check.problems)
        names = [str(name) for name in part.var.index]
        widest = max(1, 2**25 // max(1, len(names)))
        found: list[str] = []
        nnz_C, digest_C = np.zeros(stop - start, np.int64), np.zeros(stop - start, np.uint64)
        sum_C, mito_C = np.zeros(stop - start), np.zeros(stop - start)
        is_mito = np.array([str(name).startswith(MITOCHONDRIAL) for name in mapped.features.feature_name])
        row, step, densest = start, min(256, widest), 0.0
        while row < stop and not found:
            until = min(stop, row + step)
            counts = self._rows(measurement, row, until)
            found = judge(counts, names, row)
            if found:
                break
            counts = mapped.apply(counts)
            here = slice(row - start, until - start)
            nnz_C[here] = np.diff(counts.indptr)
            sum_C[here] = np.asarray(counts.sum(axis=1), dtype=float).ravel()
            if is_mito.any():
                mito_C[here] = counts @ is_mito.astype(np.float64)
            digest_C[here] = check.cell_digests(counts, self._feature_digests(measurement))
            densest = max(densest, counts.nnz / (until - row))
            step = min(widest, max(1, int(budget_nnz / 2 / max(1.0, densest))), 4 * step, 4096)
            row = until
        if found and self.form.matrices:
            found = [*found, f"other matrices here: {', '.join(f'layer={name}' for name in self.form.matrices)}"]
        at_a_time = max(1, min(widest, int(budget_nnz / max(1.0, densest))))
        return Checked(found, at_a_time, nnz_C, sum_C, mito_C, digest_C)

    def _feature_digests(self, measurement: str) -> NDArray[np.uint64]:
        if measurement not in self._digests:
            ids = self.maps[measurement].features.feature_id
            joined = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
            self._digests[measurement] = np.frombuffer(joined, np.uint64)
        return self._digests[measurement]

    @cached_property
    def _digests(self) -> dict[str, NDArray[np.uint64]]:
        return {}

    def inspect(self) -> Inspected:
        """Read everything but the values: names, cells, features; what is wrong is gathered in ``problems``.

        Raises:
            InputRefused: So much is wrong that no plan can be made; all that was found, in one message.
        """
        problems: list[str] = []
        notes = list(self.form.notes)
        obs, leftovers = pd.DataFrame(index=range(self.form.n_obs)), pd.DataFrame()
        try:
            notes += self._take_obs_table()
            found = map_obs(self.form.obs, self.source.obs, self.source.controls)
            obs, leftovers = found.frame, found.aside
            notes += found.notes
            resolved = ontology.resolve(obs, self.form.organism)
            obs = resolved.obs
            respelt = [found.source[column] for column in resolved.respelt if column in found.source]
            leftovers = leftovers.assign(**{column: self.form.obs[column] for column in respelt})
            problems += resolved.problems
            notes += resolved.notes
        except InputRefused as error:
            problems.append(str(error))
        if self.form.obs.index.has_duplicates:
            twice = self.form.obs.index[self.form.obs.index.duplicated()][0]
            problems.append(f"cell {twice!r} stands more than once")
        try:
            plan = self._plan()
            notes += [note for mapped in self.maps.values() for note in mapped.notes]
            if "RNA" in self.maps:
                said = self._says_organism()
                other = harmonize.other_organism(self.maps["RNA"].features, self.form.organism, said=said)
                (notes if said else problems).extend([other] if other else [])
        except InputRefused as error:
            raise InputRefused(f"{self.source.uri}: " + " | ".join([*problems, str(error)])) from error
        for measurement, part in self.form.parts.items():
            if part.measured_C is not None and self.counted(measurement):
                obs[measured_column(measurement)] = part.measured_C
        sides = {name: table() for name, table in self.form.sides.items()}
        if len(leftovers.columns):
            sides["obs"] = leftovers
            notes.append(f"obs columns kept in the side table: {', '.join(map(str, leftovers.columns))}")
        mapped = {name: float(found.mapped) for name, found in self.maps.items()}
        self.form.__dict__.pop("obs", None)  # values are read next, and need the room
        return Inspected(plan, obs, sides, self._spans(), mapped, problems, notes, self.opened_as)

    def _says_organism(self) -> bool:
        """Say whether somebody named the organism: then genes of another one may be its orthologs there."""
        return "organism" in self.source.model_fields_set or self.form.organism != "homo_sapiens"

    def _take_obs_table(self) -> list[str]:
        """Add the columns of ``obs_table`` that the source lacks to its obs; return what people should know."""
        table, obs = self.source.obs_table, self.form.obs
        if not table:
            return []
        more, notes = read_obs_table(table, table, obs.index)
        fresh = [str(column) for column in more if column not in obs]
        obs[fresh] = more[fresh]
        left = [str(column) for column in more if column not in fresh]
        return notes + ([f"{table}: not taken, for the source has them: {', '.join(left)}"] if left else [])

    def _plan(self) -> DatasetPlan:
        apart = {"uri", "kind", "title", "truth", "replaces", *FILES}
        settings = self.source.model_dump(mode="json", exclude=apart, exclude_defaults=True)
        tables = {key: content_digest(path) for key in FILES if (path := getattr(self.source, key))}
        identity = json.dumps([TRANSFORM_VERSION, self.form.dataset_id, self.form.digest, tables, settings])
        kind = kind_of(self.source)
        info = {**self.form.info, "source_uri": lasting(self.source.uri), "source_kind": kind}
        address = self.source.uri if kind in ("census", "simulated") else absolute(lasting(self.source.uri))
        layers = {name: self.values(name) for name in self.form.parts}
        return DatasetPlan(
            dataset_id=self.form.dataset_id,
            organism=self.form.organism,
            key=hashlib.sha256(identity.encode()).hexdigest(),
            n_obs=self.form.n_obs,
            features={name: mapped.features for name, mapped in self.maps.items()},
            info=info,
            layers={name: str(layer) for name, layer in layers.items() if layer in ("lognorm", "value")},
            origin=self.form.origin or address,
        )

    def _spans(self) -> list[tuple[int, int]]:
        n_obs = self.form.n_obs
        tiles = max(1, -(-n_obs // 1024))
        width = 1024 * max(
            -(-tiles // SPANS[1]), min(SPAN_CELLS[1] // 1024, max(SPAN_CELLS[0] // 1024, -(-tiles // SPANS[0])))
        )
        return [(start, min(start + width, n_obs)) for start in range(0, n_obs, width)]
