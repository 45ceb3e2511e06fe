"""This module reads numbers that come with a unit: doses and times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ingest import distinct
from ingest.perturbations import CONTROL

QUANTITY = re.compile(
    r"^\s*(?P<word>[A-Za-z]*)(?P<gap>\s*)(?P<number>[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*"
    r"(?P<unit>[A-Za-zµμ%][A-Za-zµμ%/]*)?\s*$"
)
TIMES = {"e": "day", "d": "day", "day": "day", "days": "day", "h": "hour", "hr": "hour", "hrs": "hour", "hour": "hour"}
TIMES |= {"hours": "hour", "m": "minute", "min": "minute", "mins": "minute", "w": "week", "wk": "week", "weeks": "week"}
TIMES |= {"minute": "minute", "minutes": "minute", "week": "week", "p": "day", "mo": "month", "months": "month"}
TIMES |= {"month": "month", "y": "year", "yr": "year", "yrs": "year", "year": "year", "years": "year"}
"""Units of time in lower case, ``E`` and ``P`` of development among them; a capital ``M`` may be months."""
PARTS = {"p": "p", "n": "n", "u": "u", "\N{MICRO SIGN}": "u", "\N{GREEK SMALL LETTER MU}": "u", "m": "m"}
DOSES = {part + unit.lower(): PARTS[part] + unit for part in PARTS for unit in ("M", "g", "g/mL")}
"""Units of dose in lower case; the signs of micro become a ``u``."""
UNITS = {"time_unit": TIMES, "dose_unit": DOSES}


Quantities = tuple[NDArray[np.float64], NDArray[np.object_] | None]


def read_quantity(values: pd.Series, units: Mapping[str, str] = TIMES) -> Quantities | None:
    """Read numbers, with a unit before or behind them or without one: ``10``, ``50 uM``, ``6 HR``, ``d8``, ``E3.5``.

    A hyphen between a word and its number joins them where all words of the column have it (``day-0``, ``day-8``);
    where some have none (``D-7``, ``D0``, ``D7``) it is a sign, as it is behind a blank (``day -8``).

    Args:
        values: As the source has them.
        units: How units, in lower case, are written here; others stay as they are.

    Returns:
        The numbers (NaN where there is nothing), and their units where any has one; none when some value is neither.
    """
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values.to_numpy(np.float64), None
    codes, found = distinct.coded(values)
    read = _quantities(pd.Series(found, dtype=object), units)
    return read and (read[0][codes], None if read[1] is None else read[1][codes])


def _quantities(values: pd.Series, units: Mapping[str, str]) -> Quantities | None:
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    empty = values.isna() | values.astype(str).map(_no_number)
    if (numbers.notna() | empty).all():
        return np.asarray(numbers, dtype=np.float64), None
    found = values.astype(str).str.extract(QUANTITY)
    if not (found["number"].notna() | empty).all():
        return None
    unit = found["unit"].fillna(found["word"]).fillna("")
    units_of = unit.map(lambda word: written(word, units)).where(~empty, "")
    hyphen = _hyphened(found)
    joins = bool((hyphen | found["word"].fillna("").eq("")).all())
    number = found["number"].str.replace(",", "")
    read = number.str.lstrip("-").where(hyphen & joins, number)
    return read.where(~empty).to_numpy(np.float64), units_of.to_numpy(np.object_)


def _hyphened(found: pd.DataFrame) -> pd.Series:
    """Say which quantities are a word, a hyphen right behind it, and a number."""
    return found["word"].fillna("").ne("") & found["gap"].eq("") & found["number"].fillna("").str.startswith("-")


def written(unit: Any, units: Mapping[str, str]) -> Any:
    """Return a unit as it is written here; one that is not known, or missing, stays as it is."""
    plain = unit.strip() if isinstance(unit, str) else ""
    return units.get(plain if plain == "M" else plain.lower(), unit)


def _no_number(text: str) -> bool:
    """Say whether a text stands where a quantity is not said: of a control, or before the first time."""
    plain = text.strip().lower()
    return plain in ("", "nan", "na", "n/a", "none", "null", "unknown", "baseline") or bool(CONTROL.match(plain))


def quantity(column: str, values: pd.Series) -> tuple[Quantities | None, str]:
    """Return a column's quantities, and what people should know of them."""
    found = read_quantity(values, UNITS.get(f"{column}_unit", {}))
    if found is None:
        _, words = distinct.coded(values)
        odd = next(
            (distinct.shown(word) for word in words if not QUANTITY.match(str(word)) and not _no_number(str(word))), ""
        )
        return None, f"{column}: column {values.name!r} is left aside: {odd} is no quantity"
    return found, "" if found[1] is None else _said_of_hyphens(column, values, found[0])


def _said_of_hyphens(column: str, values: pd.Series, numbers: NDArray[np.float64]) -> str:
    codes, words = distinct.coded(values)
    hyphened = np.flatnonzero(_hyphened(pd.Series(words, dtype=object).astype(str).str.extract(QUANTITY)))
    if len(hyphened) == 0:
        return ""
    number = numbers[int(np.argmax(codes == hyphened[-1]))]
    told = f"{column}: {distinct.shown(words[hyphened[-1]])} is read as {number:g}"
    if number < 0:
        return f"{told}, for a hyphen behind a word is a sign where other words have none"
    return f"{told}, for every word has a hyphen; a negative number has a blank before its sign"


def said_of_bare(column: str, found: Quantities) -> str:
    """Say how many numbers of a column with units have none."""
    numbers, units = found
    if units is None:
        return ""
    bare = ~np.isnan(numbers) & (units == "")
    others = sorted(set(map(str, units[~bare])) - {""})
    if not bare.any() or not others:
        return ""
    return (
        f"{column}: {int(bare.sum()):,} cells have a number without a unit (such as {numbers[bare][0]:g}), others "
        f"{', '.join(others)}; if it is one for all, say obs.{column}_unit=={others[0]}"
    )


def said_of_units(frame: pd.DataFrame) -> list[str]:
    """Say which units of doses and times are not known here and stay as they are."""
    told = []
    for column, units in UNITS.items():
        words = [str(word) for word in distinct.coded(frame[column])[1]] if column in frame else []
        left = sorted(word for word in words if word not in units.values() and not _no_number(word))
        if left:
            of, known = column.removesuffix("_unit"), "day" if units is TIMES else "uM"
            told.append(f"{of}: units kept as they are: {', '.join(left)}; say obs.{column}=={known}, or what it is")
    return told
