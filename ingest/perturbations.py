"""This module brings what was done to cells into the lake's words: controls, targets, kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ingest import distinct
from store.schema import UNKNOWN

CONTROL = re.compile(
    r"^(\d+(\.\d+)? ?% )?"
    r"(((sg|g|si|sh)[-_ ]?)?(ntc?|non[-_ ]?target(ing)?|control|ctrl|neg(ative)?[-_ ]?c(on)?tr(o)?l|"
    r"safe[-_ ]?(targeting|harbou?r)|scrambled?)|"
    r"intergenic|mock|un(treated|stimulated|stim)|no[-_ ]?treatment|vehicle|dmso|dimethyl[-_ ]?sulfoxide|pbs|medium|"
    r"wild[-_ ]?type|wt(?![-_ ]?\d))"
    r"([-_ ](control|ctrl|human|mouse|guide|s?g?rna|s[ih]rna|tf))*([-_ ]?g?\d+)*([-_ ]?\d+(\.\d+)? ?%)?$",
    re.IGNORECASE,
)
"""Names of controls, numbered or not: ``NT``, ``NTg4``, ``non-targeting_2``, ``sgNTC``, ``DMSO 0.1%``, ``untreated``;
``NTRK1`` and ``WT1`` are genes."""
NEUROTROPHIN = re.compile(r"NT[-_ ]?[3-7]$", re.IGNORECASE)
"""``NT-3``, ``NT4``: non-targeting guides or, where cells were stimulated, growth factors of nerves."""
UNASSIGNED = re.compile(
    r"^(un(assigned|assignable|mapped|detected|known|identified)|not[-_ ]?(assigned|detected)|ambiguous|negative|"
    r"(doublet|multiplet|multiple)s?|no[-_ ]?(s?grna|guide|assignment|call)s?|n/?a|\?)$",
    re.IGNORECASE,
)
"""Words for cells that were perturbed or not, nobody knows how: calls of guides or hashtags end in them."""
SAYS_WHAT_WAS_DONE = (
    "condition",
    "perturb",
    "gene",
    "guide",
    "compound",
    "drug",
    "treatment",
    "stim",
    "stimulation",
    "cytokine",
)
"""Columns that may hold perturbations, or other things: nobody is asked to guess, but told."""

PERTURBATION_KINDS = (
    (r"crispr[-_ ]?a(ct.*)?$|over[-_ ]?express|^oe$|^orf$", "activation"),
    (r"crispr|cas9|knock|sirna|shrna|genetic|^ko$", "genetic"),
    (r"drug|compound|chemical|small.?molecule", "drug"),
    (r"stimul|cytokine|ligand|growth.?factor|infect", "stimulation"),
)


def perturbation_kind(value: Any) -> str:
    """Bring a kind of perturbation to the lake's words, where it is one of the customary ones."""
    text = "none" if value is None or value != value else str(value)
    if text.strip().lower() in ("", "nan", "none", "na", "unknown"):
        return "none"
    return next((kind for pattern, kind in PERTURBATION_KINDS if re.search(pattern, text, re.IGNORECASE)), text)


SAYS_NOTHING = ("", "nan", "none", "unperturbed")
CONTROL_NAME = "control"

NAME = re.compile(r"[A-Za-z][^,\s'-]{1,}")
"""How a name begins that stands alone: ``KLF1``; locants of a compound (``2``, ``N``, ``3'``) do not."""
ROTATION = re.compile(r"\((\+/?[-\u2212]|[-\u2212]/?\+|\+)\)")
"""Which way a compound turns light, or that it is both: ``(+)-JQ1``, ``(+/-)-verapamil``."""


def _rotation(found: re.Match[str]) -> str:
    return "(plus)" if found[1] == "+" else "(±)"


def _names(text: str) -> list[str]:
    """Return the names between commas; the whole where commas belong to one name, as in ``N,N-dimethyltryptamine``."""
    parts = [part.strip() for part in text.split(",")]
    if re.search(r",\s+[a-z]", text):  # a salt, a form: ``Hydroxyzine, dihydrochloride``, ``TNF, alpha``
        return [text.strip()]
    apart = any(CONTROL.match(part) for part in parts) or all(NAME.match(part) for part in parts if part)
    return parts if apart else [text.strip()]


def _is_control(word: str, guides: bool) -> bool:
    return bool(CONTROL.match(word)) and (guides or not NEUROTROPHIN.match(word))


def perturbation_name(value: Any, controls: Sequence[str] = (), guides: bool = True) -> str:
    """Write a perturbation the lake's way: ``""``, ``control``, or targets sorted and joined by ``+``.

    Non-targeting guides and vehicles come under many names; each is ``control``. ``A+ctrl`` is ``A``. A comma stands
    between targets where each side is a name (``CEBPA,KLF1``), and within one elsewhere (``2,4-dinitrophenol``). As a
    plus is between targets, ``(+)-JQ1`` is written ``(plus)-JQ1``, and ``(+/-)-verapamil`` ``(±)-verapamil``.

    Args:
        value: As the source has it.
        controls: Words that mean a control here, beside the customary ones.
        guides: Genes were perturbed: ``NT-3`` is a guide without a target, no neurotrophin.

    Returns:
        ``unknown`` where the source says that it does not know; nothing where it says nothing, or that there is none.
    """
    if value is None or value != value or str(value).strip().lower() in SAYS_NOTHING:
        return ""
    if str(value).strip() in controls:
        return "control"
    if any(UNASSIGNED.match(part.strip()) for part in re.split(r"[+|]", str(value))):
        return UNKNOWN
    text = ROTATION.sub(_rotation, PLACE.sub("", str(value)))
    parts = [name for part in re.split(r"[+|]", text) for name in _names(part) if name]
    targets = sorted({part for part in parts if not _is_control(part, guides) and part not in controls})
    return "+".join(targets) or "control"


def named(words: Sequence[Any], controls: Sequence[str] = (), guides: bool = True) -> list[str]:
    """Write a dataset's words for perturbations the lake's way.

    Where some cells have targets, those of which nothing is said are ``unknown``: pooled screens leave the cells so
    whose guide was not found. They are no controls.

    Args:
        words: Distinct values of the column.
        controls: As for :func:`perturbation_name`; ``nan`` there means the cells of which nothing is said.
        guides: As for :func:`perturbation_name`.
    """
    found = [perturbation_name(word, controls, guides) for word in words]
    if all(name in ("", CONTROL_NAME, UNKNOWN) for name in found):
        return ["" if name == UNKNOWN else name for name in found]
    missing = CONTROL_NAME if "nan" in controls else UNKNOWN
    return [missing if _is_missing(word) else name for word, name in zip(words, found, strict=True)]


def of_guides(frame: pd.DataFrame) -> bool:
    """Say whether genes were perturbed: of no cell is another kind of perturbation said, or of some this one."""
    words = distinct.coded(frame["perturbation_type"])[1] if "perturbation_type" in frame else []
    kinds = {perturbation_kind(word) for word in words} - {"none"}
    return not kinds or bool(kinds & {"genetic", "activation"})


def _is_missing(word: Any) -> bool:
    return bool(word is None or word != word or str(word).strip().lower() in ("", "nan"))


def guide_target(value: Any) -> str:
    """Name the targets of a guide or of several (``a+b``): ``ATF2g1``, ``STAT1_sg2`` and ``ATF2_1`` name genes.

    Genes' own names end in digits too (``CD4``, ``NKX2-1``): only a mark (``g``, ``sg``, ``guide``, ``grna``), an
    underscore or a full stop before the number makes it a guide's. Right behind a name with small letters ``g`` and
    ``sg`` are its own (``Ing1``, ``Eif4g1``, ``Tsg101``), as is the number in ``NKX2.1``, which R writes so. A place in
    the genome goes (``TP53_+_7676520.23-P1P2``), and so does ``sg`` before a name.
    """
    parts = [part.strip() for part in re.split(r"[+,|;]", PLACE.sub("", str(value))) if part.strip()]
    pairs = [part.split("_") for part in parts]  # KLF1_NegCtrl0: one of two guides is a control
    parts = [one for part, pair in zip(parts, pairs, strict=True) for one in (pair if _with_control(pair) else [part])]
    return "+".join(part if CONTROL.match(part) else _target(part) for part in parts)


def _with_control(pair: list[str]) -> bool:
    return len(pair) == 2 and any(re.fullmatch(r"(?i)neg(ative)?c(on)?tr(o)?l\d*|ctrl\d*", one) for one in pair)


GUIDE = re.compile(
    r"(.+?)(?:[-_.](?:sg|g)[-_]?\d+|[-_.]?(?:guide|s?grna)[-_]?\d+|[_.]\d+)"
    r"|((?:[A-Z0-9.-]|orf){2,}?)s?g[-_]?\d+"
)
PLACE = re.compile(r"_[+-]_\d+\.\d+[^+,|;]*")
"""Strand and place in the genome behind a target, as CRISPRi libraries of hCRISPRi-v2's kind call their guides."""
NUMBERED_NAME = re.compile(
    r"(NKX\d|KRTAP\d+|MIR\d+[A-Z]*|RNU\d+|IG[HKL]V\d+|TR[ABDG]V\d+|A[CDFJLP]\d{6}|(RP|CT[ABCD])\d*-\w+)\.\d+",
    re.IGNORECASE,
)
"""Names whose number belongs to them: genes of a family (``NKX2-1``), clones (``AC012345.1``)."""


def _target(guide: str) -> str:
    name = re.sub(r"^sg[-_]?(?=[A-Z])", "", guide)
    found = None if NUMBERED_NAME.fullmatch(name) else GUIDE.fullmatch(name)
    return (found[1] or found[2]) if found else name


CONDITION = "condition"


def written_as_gears(obs: pd.DataFrame) -> bool:
    """Say whether the column ``condition`` holds perturbations as GEARS writes them: ``ctrl``, ``A+ctrl``, ``A+B``."""
    if CONDITION not in obs:
        return False
    words = {str(word) for word in distinct.coded(obs[CONDITION])[1]}
    return "ctrl" in words and len(words) > 1 and all("+" in word for word in words - {"ctrl"})


def said_of_perturbations(frame: pd.DataFrame, obs: pd.DataFrame, controls: Sequence[str]) -> list[str]:
    """Say what is taken for a control, that nothing is, or that nothing is a perturbation; ask whether it is drugs.

    Args:
        frame: The lake's columns, not yet in the lake's words.
        obs: The source's columns.
        controls: As for :func:`perturbation_name`.
    """
    if "perturbation" not in frame:
        likely = [str(name) for name in obs if str(name).lower() in SAYS_WHAT_WAS_DONE and obs[name].nunique() > 1]
        hint = "perturbation: none is known; if column {0!r} holds them, say obs.perturbation={0}"
        return [hint.format(name) for name in likely[:1]]
    told = []
    if (
        "perturbation_type" not in frame
        and "dose" in frame
        and pd.to_numeric(frame["dose"], errors="coerce").notna().any()
    ):
        told.append("perturbation_type: genetic, and cells have doses: if it is drugs, say obs.perturbation_type==drug")
    codes, words = distinct.coded(frame["perturbation"])
    names = named(words, controls, of_guides(frame))
    name_of = {str(word): name for word, name in zip(words, names, strict=True)}
    taken = sorted(word for word, name in name_of.items() if name == CONTROL_NAME and word != CONTROL_NAME)
    others = sorted(word for word, name in name_of.items() if name not in ("", CONTROL_NAME, UNKNOWN))
    lost = sorted(word for word, name in name_of.items() if name == UNKNOWN)
    if lost:
        n_cells = int(np.isin(codes, [code for code, name in enumerate(names) if name == UNKNOWN]).sum())
        told.append(
            f"perturbation: not known of {n_cells:,} cells ({_some(lost)}); where that means a control, say "
            f'controls=["{lost[0]}"]'
        )
    if others and CONTROL_NAME not in name_of.values():
        return [*told, f'perturbation: none of {_some(others)} is a control; if one is, say controls=["WORD"]']
    if taken:
        told.append(f"perturbation: taken for controls: {_some(taken)}")
        if nerve := [word for word in taken if NEUROTROPHIN.match(word) and "perturbation_type" not in frame]:
            told[-1] += f"; if {_some(nerve)} is a neurotrophin, say obs.perturbation_type==stimulation"
    return told


def _some(words: Sequence[str]) -> str:
    return ", ".join(map(distinct.shown, words[:4])) + (" ..." if len(words) > 4 else "")
