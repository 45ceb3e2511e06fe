"""This module rolls several cell types up to the nearest one in the Cell Ontology that is all of them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any


def covering_type(labels: Collection[str]) -> str:
    """Return the label of the nearest term of the Cell Ontology that every label is, or is a kind of.

    Nearest is the term from which the farthest of them is fewest steps away; of equals the one nearest to all together,
    then the first by its id. "" where a label is not one of the ontology's, or there are no labels.
    """
    above = [_above(label) for label in labels]
    if not above or not all(above):
        return ""
    shared = set.intersection(*(set(one) for one in above))
    steps = {term: [one[term] for one in above] for term in shared}
    nearest = min(shared, key=lambda term: (max(steps[term]), sum(steps[term]), term))
    return str(_parser().get_term_label(nearest))


@cache
def _above(label: str) -> dict[str, int]:
    """Return the term of a label and those above it, with the steps up to each."""
    term = _parser().get_term_id_by_label(label, "CL")
    return dict(_parser().get_term_ancestors_with_distances(term, include_self=True)) if term else {}


@cache
def _parser() -> Any:
    from cellxgene_ontology_guide.ontology_parser import OntologyParser

    return OntologyParser()
