"""This module holds a predictor whose answers can be worked out by hand, for tests of what stands around the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class FakeVocabulary:
    feature_id: list[str]
    feature_name: list[str]
    organism: list[str]


@dataclass(frozen=True)
class FakeEffect:
    control_G: np.ndarray
    perturbed_G: np.ndarray
    delta_G: np.ndarray


@dataclass(frozen=True)
class FakeCells:
    counts: dict[str, csr_matrix]
    tissue: list[int]


class FakePredictor:
    """Embedding of a cell: [counts of RNA, counts of protein, code of its tissue, first RNA feature's count].

    Vocabulary: RNA features G0 .. G7 with ids ENSG0 .. ENSG7, and two features that share the symbol TWIN, one of them
    of the mouse; proteins P0 .. P2. A perturbation sets its target's mean to zero and leaves the others.
    A cell is a B cell with certainty when G0 is its only gene, else one of two kinds of T cell. A measurement's
    expected value is the cell's count of G0 at feature 0, 1 at feature 1, and so on; time adds to the mean. Drawn
    counts are depth and seed at G1 and the tissue's code at G2.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        human = [f"ENSG{i:011d}" for i in range(8)]
        self.vocabulary = {
            "RNA": FakeVocabulary(
                [*human, "ENSG00000000099", "ENSMUSG00000000099"],
                [*(f"G{i}" for i in range(8)), "TWIN", "TWIN"],
                [*["homo_sapiens"] * 9, "mus_musculus"],
            ),
            "protein": FakeVocabulary(["P0", "P1", "P2"], ["CD3", "CD4", "CD8"], ["homo_sapiens"] * 3),
        }
        self.prompts = {
            "organism": ["", "homo_sapiens", "mus_musculus"],
            "tissue": ["", "blood", "lung"],
            "cell_type": ["", "B cell", "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"],
            "perturbation": ["", "control", "G1", "G2"],
        }
        self.levels: frozenset[str] = frozenset()
        self.manifest: dict[str, Any] = {
            "model_sha256": "a" * 64,
            "vocabulary_hash": "b" * 64,
            "global_step": 7,
            "created": "2026-01-01T00:00:00Z",
            "snapshot": {"name": "tiny", "id": "c" * 64, "commit_id": "d" * 64, "lake_timestamp": 1},
        }
        self.delay_s = delay_s
        self.threads: set[str] = set()
        self.batches: list[int] = []

    def cells(self, counts: dict[str, csr_matrix], prompts: dict[str, list[str]] | None) -> FakeCells:
        n_cells = len(next(iter((prompts or {}).values()), [])) or next(iter(counts.values())).shape[0]
        said = (prompts or {}).get("tissue", [""] * n_cells)
        return FakeCells(counts, [self.prompts["tissue"].index(value) for value in said])

    def n_tokens(self, cells: FakeCells) -> np.ndarray:
        return sum((np.diff(part.indptr) for part in cells.counts.values()), np.zeros(len(cells.tissue), np.int64))

    def embed(self, cells: FakeCells) -> np.ndarray:
        time.sleep(self.delay_s)
        self.threads.add(threading.current_thread().name)
        self.batches.append(len(cells.tissue))
        total = {name: np.asarray(part.sum(axis=1)).ravel() for name, part in cells.counts.items()}
        zeros = np.zeros(len(cells.tissue))
        first = cells.counts["RNA"][:, [0]].toarray().ravel() if "RNA" in cells.counts else zeros
        columns = [total.get("RNA", zeros), total.get("protein", zeros), cells.tissue, first]
        return np.stack(columns, axis=1).astype(np.float32)

    def vectors(self, measurement: str, columns: Sequence[int]) -> np.ndarray:
        return np.array([[column, len(measurement), 3, 4] for column in columns], np.float32).reshape(-1, 4)

    def perturb(self, cells: FakeCells, perturbation: list[str]) -> dict[str, FakeEffect]:
        time.sleep(self.delay_s)
        effects = {}
        for name, part in cells.counts.items():
            control = np.asarray(part.mean(axis=0)).ravel().astype(np.float32)
            perturbed = control.copy()
            for target in perturbation:
                names = self.vocabulary[name].feature_name
                if target in names:
                    perturbed[names.index(target)] = 0
            effects[name] = FakeEffect(control, perturbed, perturbed - control)
        return effects

    def annotate(self, cells: FakeCells) -> np.ndarray:
        counts = cells.counts["RNA"].toarray()
        only = (counts[:, 0] > 0) & (counts[:, 1:].sum(1) == 0)
        return np.where(only[:, None], [[0, 1.0, 0, 0]], [[0, 0.1, 0.3, 0.6]]).astype(np.float32)

    def novelty(self, cells: FakeCells) -> np.ndarray:
        depth = np.asarray(cells.counts["RNA"].sum(axis=1)).ravel()
        return np.where(depth > 100, 0.001, 0.5).astype(np.float32)

    def shares(self, cells: FakeCells, measurement: str) -> np.ndarray:
        first = cells.counts["RNA"][:, [0]].toarray()
        values = np.arange(len(self.vocabulary[measurement].feature_id))[None, :] + np.zeros_like(first)
        values[:, 0] = first[:, 0]
        return values.astype(np.float32)

    def unit(self, measurement: str) -> str:
        return "count"

    def forecast(self, cells: FakeCells, elapsed: float) -> dict[str, FakeEffect]:
        effects = {}
        for name, part in cells.counts.items():
            now = np.asarray(part.mean(axis=0)).ravel().astype(np.float32)
            effects[name] = FakeEffect(now, now + np.float32(elapsed), np.full_like(now, elapsed))
        return effects

    def draw(self, cells: FakeCells, measurement: str, depth: float, seed: Sequence[int]) -> csr_matrix:
        drawn = np.zeros((len(cells.tissue), len(self.vocabulary[measurement].feature_id)), np.float32)
        drawn[:, 1] = depth + seed[0]
        drawn[:, 2] = cells.tissue
        return csr_matrix(drawn)
