"""This module assembles the model of a run: what its snapshot measures, what is known of features, how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from store.errors import UsageError
from store.snapshot import Snapshot
from train.adapter import AdapterSettings, adapted
from train.cells import PROMPTS
from train.checkpoint import Checkpoint, Vocabulary
from train.config import ModelConfig
from train.genome import locate, motif_sets, neighbours, read_motifs, read_regions, read_windows
from train.knowledge import Knowledge, gather_knowledge, read_aliases, read_sets, read_vectors
from train.labels import Labels
from train.likelihood import COVERAGE
from train.model import CellModel
from train.ontology import TypeTerms, type_terms
from train.settings import DataSettings, KnowledgeSettings, RunSettings
from train.start import tell_types
from train.tokens import TokenSettings


@dataclass(frozen=True)
class Parts:
    """What a run's model is made from.

    Attributes:
        vocabulary: Measurement to its features.
        known: What is known of them.
        types: How the types that it tells hang together; None where it tells none.
        config: Its sizes.
    """

    vocabulary: dict[str, Vocabulary]
    known: Knowledge
    types: TypeTerms | None
    config: ModelConfig

    def build(self) -> CellModel:
        """Return a new model that knows all this; its weights are drawn with torch's generator as it stands."""
        model = CellModel(self.config)
        if self.types is not None:
            tell_types(model, self.types)
        model.know(
            torch.from_numpy(self.known.feature_E),
            torch.from_numpy(self.known.set_E),
            {kind: torch.from_numpy(table) for kind, table in self.known.vectors.items()},
        )
        places = (self.known.chromosome_F, self.known.base_F, self.known.bases_FW)
        model.identity.lie(*(torch.from_numpy(part) for part in places))
        return model

    def skeleton(self) -> CellModel:
        """Return the model's shapes, without memory for what is in them."""
        with torch.device("meta"):
            return CellModel(self.config)

    def tokens(self, settings: RunSettings) -> TokenSettings:
        """Return how cells become tokens."""
        return TokenSettings(budget=settings.data.tokens, levels=self.config.levels)


@dataclass(frozen=True)
class AdaptedParts:
    """What the model of a run that adapts a checkpoint is made from.

    Attributes:
        base: The checkpoint.
        settings: Sizes of the adapter.
        seed: Of its first weights.
        unseen: Measurement to how many features of the snapshot come after the base's, which knows none of them.
    """

    base: Checkpoint
    settings: AdapterSettings
    seed: int
    unseen: dict[str, int]

    @property
    def vocabulary(self) -> dict[str, Vocabulary]:
        """The base's."""
        return self.base.vocabulary

    @property
    def config(self) -> ModelConfig:
        """The base's."""
        return self.base.model.config

    def build(self) -> CellModel:
        """Return the base's model with an adapter that changes nothing yet."""
        return adapted(self.base.model, self.settings, self.seed).train()

    def tokens(self, _: RunSettings) -> TokenSettings:
        """Return how cells become tokens: as they will when the adapter answers."""
        return self.base.tokens

    def skeleton(self) -> CellModel:
        """Return the same."""
        return self.build()


def adapted_parts(settings: RunSettings, snapshot: Snapshot, base: Checkpoint) -> AdaptedParts:
    """Return what the model of a run that adapts a checkpoint is made from.

    Raises:
        UsageError: The snapshot's features do not begin with the base's (it may lack measurements), or another number
            of tokens is asked for than the base's.
    """
    budget, usual = base.tokens.budget, DataSettings.model_fields["tokens"].default
    if settings.data.tokens not in (budget, usual):
        raise UsageError(
            f"data.tokens = {settings.data.tokens}: an adapter learns with the tokens with which it answers, up to "
            f"{budget} of a cell as {settings.adapter.base} has them; leave it out"
        )
    own = {name: _identities(part) for name, part in vocabulary_of(snapshot).items()}
    known = {name: _identities(part) for name, part in base.vocabulary.items()}
    differs = next((name for name in own if name not in known or own[name][: len(known[name])] != known[name]), None)
    if differs is not None:
        trained_on = base.manifest["snapshot"].get("name", "NAME")
        raise UsageError(
            f"{snapshot.uri}: its {differs} features are not those of {settings.adapter.base}; make the snapshot with "
            f"--set like={trained_on}, which that checkpoint was trained on"
        )
    unseen = {name: len(own[name]) - len(known[name]) for name in own if len(own[name]) > len(known[name])}
    return AdaptedParts(base, AdapterSettings(settings.adapter.rank, settings.adapter.alpha), settings.seed, unseen)


def parts_of(
    settings: RunSettings, snapshot: Snapshot, labels: Labels, base: Checkpoint | None
) -> Parts | AdaptedParts:
    """Return what a run's model is made from, whether it adapts a checkpoint or begins anew.

    Raises:
        UsageError: As :func:`gather_parts` and :func:`adapted_parts`.
    """
    return gather_parts(settings, snapshot, labels) if base is None else adapted_parts(settings, snapshot, base)


def gather_parts(settings: RunSettings, snapshot: Snapshot, labels: Labels) -> Parts:
    """Read what a run's model is made from.

    Raises:
        UsageError: Sizes that do not go together.
    """
    vocabulary = vocabulary_of(snapshot)
    known = read_knowledge(settings.knowledge, vocabulary, settings.seed)
    words = labels.values["cell_type"]
    types = type_terms(words) if settings.model.types and len(words) > 2 else None
    told = settings.model.model_dump(exclude={"types"})
    sizes: dict[str, Any] = {
        "n_sets": len(known.sets),
        "n_memberships": len(known.set_E),
        "frozen": {kind: table.shape[1] for kind, table in known.vectors.items()},
        "n_features": {name: len(part.feature_id) for name, part in vocabulary.items()},
        "n_prompts": {name: len(labels.values[name]) for name in PROMPTS},
        "n_perturbations": len(labels.values["perturbation"]),
        "n_terms": 0 if types is None else types.n_terms,
        "n_term_links": 0 if types is None else len(types.term_E),
        "niche": settings.data.sets,
        "n_chromosomes": len(known.chromosomes),
        "window": known.bases_FW.shape[1],
        "levels": tuple(name for name in vocabulary if name in snapshot.levels),
    }
    try:
        config = ModelConfig(**sizes, **told)
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
    return Parts(vocabulary, known, types, config)


def read_knowledge(told: KnowledgeSettings, vocabulary: dict[str, Vocabulary], seed: int) -> Knowledge:
    """Read what is known of the features, and match it with them."""
    names = [pair for part in vocabulary.values() for pair in zip(part.feature_id, part.feature_name, strict=True)]
    genes = read_regions(told.positions) if told.positions else {}
    places = locate(names, genes)
    bases_FW = read_windows(names, places, told.genome, told.window) if told.genome else None
    sets = read_sets(told.sets, told.smallest, told.largest)
    if told.motifs and bases_FW is not None:
        sets |= motif_sets(names, bases_FW, read_motifs(told.motifs))
    aliases = neighbours(names, genes) | (read_aliases(told.aliases) if told.aliases else {})
    vectors = {kind: getattr(told, kind) for kind in ("sequence", "text") if getattr(told, kind)}
    known = gather_knowledge(
        names,
        sets,
        {kind: read_vectors(path) for kind, path in vectors.items()},
        aliases,
        seed if told.permute else None,
    )
    return known.placed(places, bases_FW) if told.positions or told.genome else known


def vocabulary_of(snapshot: Snapshot) -> dict[str, Vocabulary]:
    """Return the features of a snapshot's measurements; coverage is no measurement of its own."""
    tables = {name: snapshot.vocabulary(name) for name in snapshot.measurements if name not in COVERAGE.values()}
    columns = ("feature_id", "feature_name", "organism")
    return {name: Vocabulary(*(table[column].to_pylist() for column in columns)) for name, table in tables.items()}


def coverage_of(snapshot: Snapshot, vocabulary: dict[str, Vocabulary]) -> dict[str, NDArray[np.int64]]:
    """Return where the coverage of each feature of a measurement of fractions stands; -1 where it stands nowhere."""
    found = {}
    for name, coverage in COVERAGE.items():
        if name in vocabulary and coverage in snapshot.measurements:
            table = snapshot.vocabulary(coverage)
            ones = zip(table["feature_id"].to_pylist(), table["organism"].to_pylist(), strict=True)
            place = {one: number for number, one in enumerate(ones)}
            found[name] = np.array([place.get(one, -1) for one in _identities(vocabulary[name])], np.int64)
    return found


def _identities(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return what makes each feature itself: two organisms may share an id."""
    return list(zip(vocabulary.feature_id, vocabulary.organism, strict=True))
