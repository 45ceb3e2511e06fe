"""This module is what an ingress knows of transition heads (:mod:`serve.heads`): enough to check a question."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from serve.errors import FieldRefused
from serve.messages import HeadReport
from train.evaluation.context import context_of, values_of

SHOWN = 10


@dataclass(frozen=True)
class HeadCard:
    """What is known of a head.

    Attributes:
        sha256: Of its manifest, which names the digests of its files.
        measurement: What it predicts.
        columns: What makes a context.
        contexts: Those that it learned from: their columns' values, joined by ``train.evaluation.context``.
        by: What was held out to calibrate its intervals.
        hit: Targets of the perturbations that it learned from.
        known: Targets that can be asked of: hit ones, features, members of its gene sets.
        positions: Where its features are among those of the measurement.
        baseline, gate: What it stands on, and the weight of what it adds.
    """

    sha256: str
    measurement: str
    columns: tuple[str, ...]
    contexts: tuple[str, ...]
    by: str
    hit: tuple[str, ...]
    known: frozenset[str]
    positions: tuple[int, ...]
    baseline: str
    gate: float

    def context(self, said: Mapping[str, str]) -> str:
        """Return the context that a request names; a column of which the head knows one value need not be said.

        Raises:
            FieldRefused: A column is no column of the head's contexts, or is missing.
        """
        for name in said:
            if name not in self.columns:
                columns = ", ".join(self.columns) or "no column"
                raise FieldRefused(f"context.{name}", f"this head tells contexts by {columns}")
        parts, values = [values_of(context) for context in self.contexts], []
        for place, column in enumerate(self.columns):
            known = sorted({part[place] for part in parts})
            if column not in said and len(known) > 1:
                raise FieldRefused(f"context.{column}", f"say it; this head learned from {', '.join(known[:SHOWN])}")
            values.append(said.get(column, known[0]))
        return context_of(values)

    def check(self, target: str, where: str) -> None:
        """Refuse a target that neither was hit nor is in the head's gene sets nor is a feature.

        Raises:
            FieldRefused: The message holds the nearest known names.
        """
        if target not in self.known:
            near = difflib.get_close_matches(target, self.hit, n=3)
            remedy = f"did you mean {', '.join(map(repr, near))}?" if near else "it is no feature or member of a set"
            raise FieldRefused(where, f"this head knows nothing of {target!r}; {remedy}")

    def doubts(self, context: str, level: float, *, bounded: bool) -> list[str]:
        """Return what the reader of an answer has to be told."""
        told = []
        if context not in self.contexts:
            told.append(f"the head saw no cells of {context!r}; its intervals hold for contexts that it saw")
        if not bounded:
            told.append(f"the head held out too few groups to give an interval of level {level:g}")
        return told

    def unread(self, prompts: Iterable[str], counts: Mapping[str, csr_matrix], least: float) -> list[str]:
        """Return what of a question the head does not look at, beside what it needs of it.

        Args:
            prompts: Names of what is said of the cells.
            counts: Measurement to counts_CG.
            least: Share of the cells' counts in the head's features below which that is told.

        Raises:
            FieldRefused: None of its features has a count.
        """
        counts_CG = counts[self.measurement]
        mine_G = np.zeros(counts_CG.shape[1], dtype=bool)
        mine_G[list(self.positions)] = True
        share = float(counts_CG.data[mine_G[counts_CG.indices]].sum()) / max(1.0, float(counts_CG.data.sum()))
        if not share:
            raise FieldRefused(f"counts.{self.measurement}", "none of the head's features has a count in these cells")
        unused = sorted({*prompts} - {"organism"}) + sorted({*counts} - {self.measurement})
        told = (
            [f"not used here: {', '.join(unused)}; the head looks at {self.measurement} and 'context'"]
            if unused
            else []
        )
        if share < least:
            told.append(f"{share:.0%} of the counts of {self.measurement} are of features that the head knows")
        return told

    def report(self) -> HeadReport:
        """Return what GET /v1/models says of it."""
        return HeadReport(
            sha256=self.sha256,
            measurement=self.measurement,
            context=list(self.columns),
            contexts=list(self.contexts),
            held_out=self.by,
            perturbed=len(self.hit),
            baseline=self.baseline,
            gate=self.gate,
        )
