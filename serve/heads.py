"""This module answers what perturbations do by transition heads: with intervals, also for targets that were never hit.

A head (``python -m train head``) is fitted on a screen, and stands beside the checkpoint: it predicts from its own
effects and the cells' counts. All heads are read when the checkpoint is.

Shape letters used in this module:
    C  cells      F  features of a head      G  features of a measurement
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from serve.decode import Vocabulary
from serve.errors import StaleModel, without_place
from serve.head_cards import HeadCard
from serve.model import HeadQuestion, Shift
from store.errors import InputRefused, SomaflowError
from train.checkpoint import MANIFEST, sha256
from train.evaluation.effects import profile
from train.evaluation.gated import GatedEffects
from train.evaluation.head import load_head
from train.evaluation.study import Study

log = logging.getLogger("somaflow.serve")


class Heads:
    """The heads that a server knows by name.

    Args:
        folders: Name to folder.
        vocabulary: The checkpoint's, in which cells come.
    """

    def __init__(self, folders: Mapping[str, str], vocabulary: Mapping[str, Vocabulary]) -> None:
        self._heads: dict[str, GatedEffects] = {}
        self.cards: dict[str, HeadCard] = {}
        self.refused: dict[str, str] = {}
        for name, folder in folders.items():
            try:
                head = load_head(folder)  # compares every file with its manifest
                self.cards[name] = _card(head, vocabulary, sha256(Path(folder) / MANIFEST))
                self._heads[name] = head
            except SomaflowError as error:
                self.refused[name] = without_place(str(error), folder, "the head")
                log.error("the head %s cannot be used: %s", name, error)

    def answer(
        self, question: HeadQuestion, counts: Mapping[str, csr_matrix], targets: Sequence[str]
    ) -> dict[str, Shift]:
        """Predict what hitting targets together does to cells, with an interval for each feature.

        Args:
            question: Which head, in which context, how sure.
            counts: Measurement to raw counts_CG of the cells.
            targets: Names that the head's card lists.

        Raises:
            StaleModel: The head is not here.
        """
        head, card = self._heads.get(question.head), self.cards.get(question.head)
        if head is None or card is None:
            raise StaleModel("the heads were changed meanwhile; send the request again")
        counts_CF = csr_matrix(counts[card.measurement][:, list(card.positions)])
        cells = Study(
            {card.measurement: counts_CF},
            {card.measurement: list(head.table.features)},
            pd.DataFrame(index=pd.RangeIndex(counts_CF.shape[0])),
        )
        delta_F = head.predict(cells, "+".join(sorted(targets)), question.context)
        half_F = head.half_width(question.level)
        control_F = profile(counts_CF)
        bounded = bool(np.isfinite(half_F).all())
        shift = Shift(
            control_F.astype(np.float32),
            (control_F + delta_F).astype(np.float32),
            delta_F.astype(np.float32),
            (delta_F - half_F).astype(np.float32) if bounded else None,
            (delta_F + half_F).astype(np.float32) if bounded else None,
            card.positions,
        )
        return {card.measurement: shift}


def _card(head: GatedEffects, vocabulary: Mapping[str, Vocabulary], digest: str) -> HeadCard:
    if head.measurement not in vocabulary:
        raise InputRefused(f"it predicts {head.measurement}, which the checkpoint does not know")
    known = vocabulary[head.measurement]
    place = {name: position for position, name in enumerate(known.feature_id)}
    missing = [name for name in head.table.features if name not in place]
    if missing:
        raise InputRefused(
            f"{len(missing):,} of its {len(head.table.features):,} features are none of the checkpoint's, such as "
            f"{missing[0]}; fit the head on a snapshot of the checkpoint's features"
        )
    hit = {target for name in head.table.perturbation for target in name.split("+")}
    told = {*hit, *head.targets.given, *head.targets.by_sets, *head.table.features, *known.feature_name}
    return HeadCard(
        sha256=digest,
        measurement=head.measurement,
        columns=head.columns,
        contexts=tuple(sorted(set(head.table.context))),
        by=head.by,
        hit=tuple(sorted(hit)),
        known=frozenset(told - {""}),
        positions=tuple(place[name] for name in head.table.features),
        baseline=head.gate.baseline,
        gate=head.gate.g,
    )
