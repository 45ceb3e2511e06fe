"""This module asks the Cell Ontology: which type covers several, and which terms types have in common.

Shape letters used in this module:
    Y  types      E  links of types to terms
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


@cache
def type_id(label: str) -> str:
    """Return the Cell Ontology's id of a label; "" where it is not one of the ontology's."""
    return str(_parser().get_term_id_by_label(label, "CL") or "") if label else ""


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


@dataclass(frozen=True)
class TypeTerms:
    """How cell types hang together, by their codes.

    Attributes:
        n_terms: Terms of the ontology that a type is, or is a kind of; a type that is none of the ontology's is one.
        term_E: Terms of all types on end.
        first_Y: Where each type's begin.
        covers_YY: Is the second type the first, or a kind of it?
    """

    n_terms: int
    term_E: NDArray[np.int64]
    first_Y: NDArray[np.int64]
    covers_YY: NDArray[np.bool_]


def type_terms(names: Sequence[str]) -> TypeTerms:
    """Find the terms of cell types, the first of which is "" (not said)."""
    above = [set(_above(name)) or {name} if name else set() for name in names]
    own = [next((term for term, steps in _above(name).items() if steps == 0), name) for name in names]
    number = {term: place for place, term in enumerate(sorted(set().union(*above)))}
    covers_YY = np.array([[bool(term) and term in terms for terms in above] for term in own], dtype=bool)
    ends = np.cumsum([0, *(len(terms) for terms in above)])
    term_E = np.array([number[term] for terms in above for term in sorted(terms)], dtype=np.int64)
    return TypeTerms(len(number), term_E, ends[:-1].astype(np.int64), covers_YY)
