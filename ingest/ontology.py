"""This module brings labels and ontology ids of obs together, with the terms of ``cellxgene-ontology-guide``.

The library carries the ontologies that the CELLxGENE schema pins; nothing is downloaded. Work is done on the distinct
values of a column, not on its cells.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ingest import distinct
from store.schema import UNKNOWN

ABSENT = {"unknown", "na", "nan", "none", ""}
SEPARATOR = re.compile(r" \|\| |(?<=\d),(?=[A-Z])")
"""Several terms in one value: `` || `` in the CELLxGENE schema since 6, a comma before."""
OF_SEVERAL = ("disease", "self_reported_ethnicity")
"""Columns that may hold several terms in one value."""
ONLY: dict[str, dict[str, tuple[str, ...]]] = {
    "sex": {"PATO": ("PATO:0000383", "PATO:0000384", "PATO:0001340")},
    "disease": {"PATO": ("PATO:0000461",)},
}
"""The terms of an ontology that a column may hold, where these are few."""
ASSAYS = ("EFO:0002772", "EFO:0010183")
"""EFO also has diseases and cell lines: an assay is one of these, or below one."""
KIND = re.compile(r" \((organoid|cell culture)\)$")
"""What a tissue is a model of stands behind its id in the CELLxGENE schema before 5, in ``tissue_type`` since."""

DEVELOPMENT = {
    "homo_sapiens": ("HsapDv",),
    "mus_musculus": ("MmusDv",),
    "caenorhabditis_elegans": ("WBls",),
    "drosophila_melanogaster": ("FBdv",),
    "danio_rerio": ("ZFA",),
}
ANATOMY = {
    "caenorhabditis_elegans": ("WBbt",),
    "drosophila_melanogaster": ("FBbt",),
    "danio_rerio": ("ZFA",),
}
SHORTHAND = {
    "sex": {"f": "PATO:0000383", "female": "PATO:0000383", "m": "PATO:0000384", "male": "PATO:0000384"},
    "disease": {"healthy": "PATO:0000461", "normal": "PATO:0000461", "control": "PATO:0000461", "none": "PATO:0000461"},
}
"""Words that everybody uses and no ontology has as a name in the right place."""
SHORT = {
    "cell_type": "breg cdc ilc2 ilc3 lsec mtec ctec ovum pbmc pdc pmn rbc tfh treg vlmc wbc",
    "disease": "als aml cll copd crc flu hcc t1d t1dm t2d t2dm zika",
    "tissue": "ca1 ca2 ca3 ca4 cns csf fat foot gums hair hand lens mpfc pbmc rbc skin svz",
    "assay": "",
}
"""Synonyms of fewer than five letters that are taken: most such abbreviations mean several things (``HF``, ``SP``)."""
TAKEN_FOR = {
    "cd4 t cell": "CL:0000624",
    "cd4-positive t cell": "CL:0000624",
    "cd8 t cell": "CL:0000625",
    "cd8-positive t cell": "CL:0000625",
    "nk": "CL:0000623",
}
"""Cell types by other words than their names; a note says so."""
MARKED = re.compile(r"((?:[A-Za-z0-9]+\+(?:\s*[/,]\s*|\s*))+)(.+)")
"""Markers that a cell has, then what it is: ``CD14+ Monocyte``, ``CD14+/CD16+ monocyte``."""
SEVERAL = re.compile(r"(?<=[A-Za-z]{3}[a-rt-z])s$")
"""The ending of many: of a word, not of an abbreviation, which may mean another thing without it."""
VAGUE = re.compile(
    r"(alpha|beta|gamma|delta|epsilon|[ac-su-z])( cell)?|cell|motile|cultured|circulating|contractile|diploid|somatic",
    re.IGNORECASE,
)
"""What may be several things, or is none: letters (but B and T), and words that any cell may have."""
ADJECTIVE = re.compile(r".*[A-Za-z][a-z]{3,}|.+ [BT]|.+ NK")
"""What ``cell`` may be missing behind: ``Dendritic``, ``Memory B``; ``EC`` may be several things."""
AGE = re.compile(r"(\d+)[\s_-]*(y|mo|w|d)(?:r|ear|nth|k|eek|ay)?s?(?:[\s_-]*old)?", re.IGNORECASE)
"""An age: ``45 years``, ``45 yr old``, ``8-week-old``."""
UNITS = {"y": "year", "mo": "month", "w": "week", "d": "day"}
OF_SOME = re.compile(r" \((Mmus|Hsap|Primate|Homo sapiens|Mus musculus|sensu [^()]+)\)$")
"""Endings of the names of terms that are some organisms' alone; their synonyms do not say so."""


@dataclass(frozen=True)
class Resolved:
    """obs with labels and ids filled in, why it is refused, what people should know, and whose labels changed."""

    obs: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    respelt: list[str] = field(default_factory=list)


def allowed(column: str, organism: str) -> tuple[str, ...]:
    """Return the prefixes of the ontologies whose terms a column may hold, as the CELLxGENE schema has it."""
    return {
        "assay": ("EFO",),
        "cell_type": ("CL", *ANATOMY.get(organism, ())),
        "development_stage": DEVELOPMENT.get(organism, ("UBERON",)),
        "disease": ("MONDO", "PATO"),
        "self_reported_ethnicity": ("HANCESTRO", "AfPO"),
        "sex": ("PATO",),
        "tissue": ("UBERON", "CL", "CVCL", *ANATOMY.get(organism, ())),
    }[column]


COLUMNS = ("assay", "cell_type", "development_stage", "disease", "self_reported_ethnicity", "sex", "tissue")


def resolve(obs: pd.DataFrame, organism: str) -> Resolved:
    """Fill in the ids of labels and the labels of ids, and look whether ids are what they should be.

    A wrong, unknown or obsolete id is a problem; a label that no ontology knows is a note, with the nearest term.

    Args:
        obs: Any of the lake's columns; not changed.
        organism: A key of ``ORGANISMS``; it decides which ontology stages and anatomy come from.
    """
    made = Resolved(obs.copy(deep=False))
    _take_kinds(made)
    lines = _of_lines(made.obs)
    for column in COLUMNS:
        if column in obs or f"{column}_ontology_term_id" in obs:
            _resolve_column(made, column, organism, lines)
    _tissue_general(made.obs)
    return made


def _take_kinds(made: Resolved) -> None:
    """Take the kinds of tissues from behind their ids and labels to ``tissue_type``, where that is not said."""
    obs, id_column = made.obs, "tissue_ontology_term_id"
    codes, terms = _texts(obs, id_column)
    kinds = [found[1] if (found := KIND.search(term)) else "" for term in terms]
    if not any(kinds):
        return
    obs[id_column] = distinct.spread(codes, [KIND.sub("", term) for term in terms])
    if "tissue" in obs:
        obs["tissue"] = distinct.changed(obs["tissue"], lambda label: KIND.sub("", str(label)))
        made.respelt.append("tissue")
    if "tissue_type" not in obs:
        obs["tissue_type"] = distinct.spread(codes, [kind or "tissue" for kind in kinds])
    shown = ", ".join(sorted({kind for kind in kinds if kind}))
    made.notes.append(f"tissue: {shown} behind an id, as schemas before 5 have it, is read as tissue_type")


def _of_lines(obs: pd.DataFrame) -> set[str]:
    """Return the labels of tissue that stand for cell lines alone, as ``tissue_type`` says."""
    if not {"tissue", "tissue_type"} <= set(obs.columns):
        return set()
    pairs = obs[["tissue", "tissue_type"]].drop_duplicates().astype(str)
    of_line = pairs["tissue_type"].str.casefold() == "cell line"
    return set(pairs["tissue"][of_line]) - set(pairs["tissue"][~of_line])


def _resolve_column(made: Resolved, column: str, organism: str, lines: set[str]) -> None:
    obs, id_column = made.obs, f"{column}_ontology_term_id"
    label_codes, labels = _texts(obs, column)
    id_codes, ids = _texts(obs, id_column)
    pair_codes, present = pd.factorize(label_codes.astype(np.int64) * len(ids) + id_codes)
    pairs = [(labels[pair // len(ids)], ids[pair % len(ids)]) for pair in present]
    cells = np.bincount(pair_codes, minlength=len(pairs))
    answers: dict[tuple[str, str], tuple[str, str]] = {}
    unmatched: list[tuple[int, str]] = []
    renamed: list[str] = []
    respelt: list[str] = []
    for at in np.argsort(-cells, kind="stable"):
        (label, term), n_cells = pairs[at], int(cells[at])
        has_label, has_id = label.lower() not in ABSENT, term.lower() not in ABSENT
        if has_id:
            problem = _id_problem(term, label if has_label else "", column, organism)
            if problem:
                made.problems.append(f"{id_column}: {distinct.shown(term)} ({n_cells:,} cells) {problem}")
                continue
            name = " || ".join(_term_label(part) for part in SEPARATOR.split(term))
            if has_label and label != name and label.casefold() not in _names_of(term):
                renamed.append(f"{distinct.shown(label)} for {term} ({name})")
            answers[label, term] = (label if has_label else name, term)
        elif has_label:
            found = _id_of(label, column, organism, of_line=label in lines)
            found = found or _id_of_spelling(label, column, organism)
            if found and not _named(found, label) and label.strip().casefold() not in SHORTHAND.get(column, {}):
                respelt.append(f"{distinct.shown(label)} is {_term_label(found)!r}")
            answers[label, term] = (_term_label(found) if found else label, found or UNKNOWN)
            if not found:
                unmatched.append((n_cells, label))
        else:
            answers[label, term] = (UNKNOWN, UNKNOWN)
    if renamed:
        made.notes.append(f"{column}: labels kept that are not their term's name: {', '.join(renamed[:3])}")
    if column not in made.respelt and any(
        answer[0] != pair[0] for pair, answer in answers.items() if pair[0].lower() not in ABSENT
    ):
        made.respelt.append(column)
    if respelt:
        shown = f"{', '.join(respelt[:10])}{_more(len(respelt), 10)}"
        made.notes.append(f"{column}: labels written as their terms are: {shown}")
    if unmatched:
        made.notes.append(_unmatched_note(column, unmatched, organism))
    resolved = [answers.get(pair, pair) for pair in pairs]
    obs[column] = distinct.spread(pair_codes, [label for label, _ in resolved])
    obs[id_column] = distinct.spread(pair_codes, [term for _, term in resolved])


def _texts(obs: pd.DataFrame, column: str) -> tuple[NDArray[np.integer], list[str]]:
    if column not in obs:
        return np.zeros(len(obs), np.int8), [UNKNOWN]
    codes, values = distinct.coded(obs[column])
    return codes, [str(value) for value in values]


def _id_problem(terms: str, label: str, column: str, organism: str) -> str:
    """Say what is wrong with an id (or several, joined); empty when nothing is."""
    several = SEPARATOR.split(terms)
    if len(several) > 1 and column not in OF_SEVERAL:
        return f"is {len(several)} terms, and {column} is one; only {' and '.join(OF_SEVERAL)} may be several"
    for term in several:
        prefix = term.split(":")[0].split("_")[0]
        known = allowed(column, organism)
        if prefix not in known:
            return f"is not of {' or '.join(known)}{_suggestion(label, column, organism)}"
        entry = _terms(prefix).get(term)
        if entry is None:
            return f"is no term of {prefix}{_suggestion(label, column, organism)}"
        if entry.get("deprecated"):
            better = str(entry.get("replaced_by") or next(iter(entry.get("consider", ())), ""))
            better = better.removeprefix("obo.").replace("_", ":")
            return f"is obsolete{f'; use {better} ({_term_label(better)})' if better else ''}"
        if not _fits(term, column):
            few = ASSAYS if column == "assay" else ONLY[column][prefix]
            choice = " or ".join(f"{one} ({_term_label(one)})" for one in few)
            below = " or below" if column == "assay" else ""
            return f"is {_term_label(term)!r}, not {choice}{below}{_suggestion(label, column, organism)}"
    return ""


def _fits(term: str, column: str) -> bool:
    """Say whether a living term of one of a column's ontologies is one that the column may hold."""
    if column == "assay":
        return bool(_ancestors(term) & set(ASSAYS))
    few = ONLY.get(column, {}).get(term.split(":")[0])
    return few is None or term in few


@cache
def _ancestors(term: str) -> set[str]:
    return set(_parser().get_term_ancestors(term, include_self=True))


def _suggestion(label: str, column: str, organism: str) -> str:
    found = _id_of(label, column, organism) or _id_of_spelling(label, column, organism) if label else ""
    return f"; {label!r} is {found}" if found else ""


def _unmatched_note(column: str, unmatched: list[tuple[int, str]], organism: str) -> str:
    said = []
    for n_cells, label in sorted(unmatched, reverse=True)[:3]:
        near = _near(label, column, organism)
        said.append(f"{distinct.shown(label)} ({n_cells:,} cells{f', did you mean {near!r}?' if near else ''})")
    line = column == "tissue" and any(
        len(_index("CVCL").get(label.strip().casefold(), ())) == 1 for _, label in unmatched
    )
    way = "; where they are names of cell lines, say obs.tissue_type==cell line" if line else ""
    return f"{column}: no ontology term for {', '.join(said)}{_more(len(unmatched))}; the labels are kept{way}"


def _more(n: int, shown: int = 3) -> str:
    """Say how many there are beyond those that are shown."""
    return f" and {n - shown:,} more" if n > shown else ""


def _near(label: str, column: str, organism: str) -> str:
    if not re.search(r"[^\W\d_]{3}", label):  # a cluster's number is near to anything
        return ""
    pool: dict[str, str] = {}
    for prefix in allowed(column, organism):
        if prefix != "CVCL":  # 167,000 names of cell lines are near to anything
            pool |= {
                name: term
                for name, (term, *_) in _index(prefix).items()
                if not OF_SOME.search(_term_label(term)) and (column == "assay" or _fits(term, column))
            }
    found = difflib.get_close_matches(label[:200].casefold(), list(pool), n=5, cutoff=0.8)
    numbers = set(re.findall(r"\d+", label))  # CD4 is not CD8
    same = (pool[name] for name in found if numbers == set(re.findall(r"\d+", name)))
    return next((_term_label(term) for term in same if _fits(term, column)), "")


@cache
def _parser() -> Any:
    from cellxgene_ontology_guide.ontology_parser import OntologyParser

    return OntologyParser()


@cache
def _terms(prefix: str) -> dict[str, dict[str, Any]]:
    known = _parser().cxg_schema
    if prefix == "AfPO":  # its terms travel with HANCESTRO
        prefix = "HANCESTRO"
    return dict(known.ontology(prefix)) if prefix in known.supported_ontologies else {}


def _term_label(term: str) -> str:
    return str(_terms(term.split(":")[0].split("_")[0]).get(term, {}).get("label", term))


def _names_of(term: str) -> set[str]:
    entry = _terms(term.split(":")[0].split("_")[0]).get(term, {})
    return {str(name).casefold() for name in (entry.get("label", ""), *entry.get("synonyms", ()))}


@cache
def _index(prefix: str) -> dict[str, list[str]]:
    """Map case-folded names to living terms; where a term has a name, others' synonyms do not count."""
    names: dict[str, list[str]] = {}
    synonyms: dict[str, list[str]] = {}
    for term, entry in _terms(prefix).items():
        if entry.get("deprecated") or not term.startswith(prefix):
            continue
        names.setdefault(str(entry.get("label", "")).casefold(), []).append(term)
        for synonym in entry.get("synonyms", ()):
            synonyms.setdefault(str(synonym).casefold(), []).append(term)
    return synonyms | names


def _id_of(label: str, column: str, organism: str, *, of_line: bool = False) -> str:
    """Return the one term that a label names; empty when there is none, or several.

    Short synonyms are abbreviations, and count where they are known to mean one thing; names of cell lines
    (``PFC`` is one) count where the label is said to be ``of_line``.
    """
    plain = label.strip().casefold()
    short = SHORTHAND.get(column, {}).get(plain)
    if short:
        return short
    own = ANATOMY.get(organism, ()) if column == "cell_type" else ()
    letters = re.findall(r"[^\W\d_]", plain)
    vague = column in SHORT and not of_line and len(letters) < 5 and plain not in SHORT[column].split()
    for prefix in dict.fromkeys((*(("CVCL",) if of_line else ()), *own, *allowed(column, organism))):
        if prefix == "CVCL" and column == "tissue" and not of_line:
            continue
        found = [
            term
            for term in _index(prefix).get(plain, ())
            if _named(term, plain) or not (vague or OF_SOME.search(_term_label(term)))
            if _fits(term, column)
        ]
        if len(found) == 1:
            return found[0]
    return ""


def _named(term: str, name: str) -> bool:
    """Say whether this is the term's own name, not a synonym."""
    return _term_label(term).casefold() == name.strip().casefold()


def _id_of_spelling(label: str, column: str, organism: str) -> str:
    """Return the one term of a cell type or an age that a label names in another spelling than ontologies have."""
    spellings = {"cell_type": _cell_types, "development_stage": _stages}.get(column)
    if spellings is None:
        return ""
    for spelling, only_names in spellings(label):
        if spelling.casefold() in TAKEN_FOR:
            return TAKEN_FOR[spelling.casefold()]
        found = _id_of(spelling, column, organism)
        if found and (_named(found, spelling) or not (only_names or (column == "cell_type" and organism in ANATOMY))):
            return found
    return ""


Spellings = Iterator[tuple[str, bool]]
"""Spellings, and whether each may be a term's own name only: synonyms say too much of what was only completed."""


def _stages(label: str) -> Spellings:
    """Spell an age or a stage as ontologies do: ``45 years`` is ``45-year-old stage``, ``adult`` is ``adult stage``."""
    age = AGE.fullmatch(label.strip())
    yield (f"{age[1]}-{UNITS[age[2].lower()]}-old stage" if age else f"{label.strip()} stage"), False


def _cell_types(label: str) -> Spellings:
    """Spell a cell type's label as ontologies do: one cell, markers in words, ``cell`` said; nothing else changes.

    ``CD14+ Monocytes`` is ``CD14-positive Monocyte``, ``Dendritic`` is ``Dendritic cell``.
    """
    plain = SEVERAL.sub("", re.sub(r"[\s_]+", " ", label.strip()))
    if VAGUE.fullmatch(plain):
        return
    yield plain, False
    marked = MARKED.fullmatch(plain)
    if marked:
        markers = [f"{marker}-positive" for marker in re.findall(r"[A-Za-z0-9]+", marked[1])]
        plain = f"{', '.join(markers)} {marked[2]}"
        yield plain, False
    of_anatomy = plain.casefold() in _index("UBERON")  # an organ's cells are of many types
    if ADJECTIVE.fullmatch(plain) and not of_anatomy and not plain.casefold().endswith("cell"):
        yield f"{plain} cell", marked is None


def _tissue_general(obs: pd.DataFrame) -> None:
    """Fill in the organ or system of tissues, from the curated list that the Census uses."""
    if "tissue_ontology_term_id" not in obs or "tissue_general" in obs:
        return
    codes, terms = distinct.coded(obs["tissue_ontology_term_id"])
    known = _terms("UBERON")  # one that is not known is a problem already
    general = [_general(str(term)) if str(term) in known else UNKNOWN for term in terms]
    if set(general) == {UNKNOWN}:
        return
    obs["tissue_general_ontology_term_id"] = distinct.spread(codes, general)
    obs["tissue_general"] = distinct.spread(codes, [_term_label(term) for term in general])


@cache
def _general(term: str) -> str:
    from cellxgene_ontology_guide.curated_ontology_term_lists import get_curated_ontology_term_list
    from cellxgene_ontology_guide.entities import CuratedOntologyTermList

    general = get_curated_ontology_term_list(CuratedOntologyTermList.TISSUE_GENERAL)
    if term in general:
        return term
    return str(_parser().get_highest_level_term(term, general) or term)
