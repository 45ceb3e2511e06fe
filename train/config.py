"""This module is the sizes of a model: with the weights, all that is needed to build one again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.likelihood import Likelihood, usual_likelihood
from train.tokens import first_numbers


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; together with the weights it is all that is needed to build one again.

    Attributes:
        n_features: Measurement to G, in the vocabulary's order.
        n_prompts: Prompt field to its number of codes.
        n_perturbations: Codes of perturbation targets.
        n_numbers: Numeric prompts.
        width: D.
        layers: Encoder blocks.
        heads: H; divides the width.
        bins: Soft bins of a value's embedding.
        bottlenecks: Tokens through which a measurement of a cell speaks with the others.
        query_layers: Blocks of the decoder of single features.
        attention: "full": every block is joint; or "hybrid".
        n_sets: Sets (pathways, processes) that features belong to.
        n_memberships: How often one does.
        pathways: Tokens that stand for the largest sets and read their visible members only.
        niche: Do the cells of a set read each other?
        hash_rows: Vectors that stand for features which nobody has trained on, by the hash of their id.
        frozen: Kind of vector that is known of features ("sequence", "text") to its width.
        n_terms: Terms of the Cell Ontology that types are told by; 0 tells no types.
        n_term_links: How often a type is one of them.
        n_chromosomes: Chromosomes that features lie on; 0 gives features no place.
        window: Bases around a feature that are read; 0 reads none.
        levels: Measurements whose values are levels (intensities, fractions), not counts.
        likelihood: Measurement to its likelihood, where it is not the usual one.
    """

    n_features: dict[str, int]
    n_prompts: dict[str, int]
    n_perturbations: int
    n_numbers: int = 2
    width: int = 64
    layers: int = 2
    heads: int = 4
    bins: int = 16
    bottlenecks: int = 4
    query_layers: int = 1
    attention: Literal["hybrid", "full"] = "full"
    n_sets: int = 0
    n_memberships: int = 0
    pathways: int = 0
    niche: bool = False
    hash_rows: int = 64
    frozen: dict[str, int] = field(default_factory=dict)
    n_terms: int = 0
    n_term_links: int = 0
    n_chromosomes: int = 0
    window: int = 0
    levels: tuple[str, ...] = ()
    likelihood: dict[str, Likelihood] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, one in self.likelihood.items():
            if name not in self.n_features:
                raise ValueError(
                    f"likelihood.{name}: there is no such measurement; there is {', '.join(self.n_features)}"
                )
            if (one in ("gaussian", "beta-binomial")) != (name in self.levels):
                kind = "levels" if name in self.levels else "counts"
                raise ValueError(f"likelihood.{name} = {one!r} does not go with {kind}, which {name} holds here")

    def likelihood_of(self, name: str) -> Likelihood:
        """Return the likelihood of a measurement."""
        return self.likelihood.get(name) or usual_likelihood(name, levels=name in self.levels)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of what is said and asked of a cell: one for each field, perturbations, numbers, depths, and 3."""
        return len(self.n_prompts) + 6

    @property
    def offsets(self) -> dict[str, int]:
        """Measurement to the number of its first feature among all; 0 is padding."""
        return first_numbers(self.n_features)

    @property
    def kinds(self) -> list[str]:
        """What each encoder block reads: "within" a measurement, "between" them, or all of the cell ("joint")."""
        joint = self.layers if self.attention == "full" else max(1, self.layers // 3)
        mixed = ["within" if number % 2 == 0 else "between" for number in range(self.layers - joint)]
        return [*mixed, *["joint"] * joint]
