"""This module brings a source's obs into the lake's columns, by their names and by what the source's settings say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ingest import distinct
from ingest.perturbations import (
    CONDITION,
    guide_target,
    named,
    of_guides,
    perturbation_kind,
    said_of_perturbations,
    written_as_gears,
)
from ingest.quantities import UNITS, quantity, said_of_bare, said_of_units, written
from store.errors import InputRefused
from store.schema import OBS_DEFAULTS, UNKNOWN

OBS_ALIASES = {
    "cell_type": ("celltype", "cell_types", "CellType", "cell.type", "cell_ontology_class", "bulk_labels"),
    "donor_id": ("donor", "individual", "patient", "patient_id", "ind"),
    "sample_id": ("sample", "orig.ident", "library_id"),
    "batch": ("bio_rep", "replicate", "batch_id"),
    "perturbation": ("target_gene", "perturbed_gene", "gene_target"),
    "perturbation_id": ("guide_max", "guide_id", "guide_identity"),
    "dose": ("dose_value",),
    "time": ("time_point", "timepoint"),
}
"""Customary names of columns, used where the source has no column of the lake's own name."""


PLACES = (("x_centroid", "y_centroid"), ("center_x", "center_y"))
"""What Xenium and MERSCOPE call places in space."""
NO_PLACES = "{0} and {1} stay in the side table; where they are places in space, say obs.x={0} and obs.y={1}"


@dataclass(frozen=True)
class MappedObs:
    """A source's obs in the lake's columns.

    Attributes:
        frame: The lake's columns.
        aside: The source's columns that have no place among them, or lost words on the way (for the side table).
        notes: What people should know.
        source: Column of the lake to the source's that it was taken from.
    """

    frame: pd.DataFrame
    aside: pd.DataFrame
    notes: list[str]
    source: dict[str, str]


def map_obs(obs: pd.DataFrame, given: Mapping[str, str], controls: Sequence[str] = ()) -> MappedObs:
    """Bring obs into the lake's columns.

    Args:
        obs: As the source has it, indexed by its names of the cells.
        given: Column of the lake to a column of the source or ``=text``; wins over what is recognised.
        controls: Words of perturbations that mean a control, beside the customary ones.

    Raises:
        InputRefused: ``given`` names a column that one of the two does not have, or values do not fit.
    """
    unknown = sorted(set(given) - set(OBS_DEFAULTS))
    if unknown:
        raise InputRefused(f"obs.{unknown[0]}: not a column of the lake; columns: {', '.join(OBS_DEFAULTS)}")
    names, notes = obs.index, list[str]()
    mapped: dict[str, Any] = {"cell_id": names.array if _in_arrow(names) else names.astype(str).to_numpy()}
    taken: dict[str, str] = {}
    for column, default in OBS_DEFAULTS.items():
        source = given.get(column) or _recognised(column, obs)
        if not source:
            continue
        if source.startswith("="):
            mapped[column] = distinct.same(source[1:], len(obs))
            continue
        if source not in obs:
            raise InputRefused(
                f"obs.{column} = {source!r}: the source has no such column; columns: {', '.join(obs.columns)}"
            )
        if isinstance(default, float):
            found, note = quantity(column, obs[source])
            if found is None and column not in given:
                notes.append(note)  # a column that only looks like it by name stays in the side table
                continue
            if found is not None:
                mapped[column] = found[0]
                notes += [note] if note else []
                unit = f"{column}_unit"
                if found[1] is not None and unit in OBS_DEFAULTS and unit not in given and unit not in obs:
                    mapped[unit] = found[1]
                    notes += [bare] if (bare := said_of_bare(column, found)) else []
                taken[column] = source
                continue
        mapped[column] = _compact(obs[source], column)
        taken[column] = source
    frame = pd.DataFrame(mapped)
    if "perturbation" not in frame and "perturbation_id" in frame:
        frame["perturbation"] = distinct.changed(frame["perturbation_id"], guide_target)
    given_words = {column: frame[column] for column in ("perturbation", "perturbation_type") if column in frame}
    notes += said_of_perturbations(frame, obs, controls)
    notes += _said_of_primary(frame)
    notes += [NO_PLACES.format(*pair) for pair in PLACES if "x" not in frame and set(pair) <= set(obs)]
    _normalise(frame, controls)
    notes += said_of_units(frame)
    changed = [column for column, words in given_words.items() if not _same_words(words, frame[column])]
    used = set(taken.values()) - {taken.get(column) for column in changed}
    return MappedObs(frame, obs[[column for column in obs if column not in used]], notes, taken)


def _same_words(before: pd.Series, after: pd.Series) -> bool:
    (_, old), (_, new) = distinct.coded(before), distinct.coded(after)
    return {str(value) for value in old if value == value} <= {str(value) for value in new}


def _compact(values: pd.Series, column: str) -> Any:
    """Return a column's values, texts as a categorical; names of cells differ from each other and stay."""
    if isinstance(OBS_DEFAULTS[column], str):
        values = _without_fractions(values)
    text = isinstance(OBS_DEFAULTS[column], str) and column not in ("cell_id", "observation_joinid")
    if text and (isinstance(values.dtype, pd.CategoricalDtype) or values.dtype == object):
        return values.astype("category").array
    return values.array if _in_arrow(values) else values.to_numpy()


def _without_fractions(values: pd.Series) -> pd.Series:
    """Return numbers that stand for names as texts, ``1`` and not ``1.0``, which only says that others are missing."""
    kinds = values.cat.categories if isinstance(values.dtype, pd.CategoricalDtype) else values
    if not pd.api.types.is_numeric_dtype(kinds.dtype) or pd.api.types.is_bool_dtype(kinds.dtype):
        return values
    return pd.Series(distinct.changed(values, _number_text), index=values.index, name=values.name)


def _number_text(number: Any) -> Any:
    if pd.isna(number):
        return np.nan
    return str(int(number)) if float(number).is_integer() else str(number)


def _in_arrow(values: pd.Series | pd.Index) -> bool:
    """Say whether texts lie in Arrow's memory, where they stay: they take a third of Python's."""
    return isinstance(values.dtype, pd.ArrowDtype) and pa.types.is_large_string(values.dtype.pyarrow_dtype)


def _recognised(column: str, obs: pd.DataFrame) -> str | None:
    if column == "cell_id" and column in obs and obs[column].duplicated().any():
        return None  # its cells have better names
    known = next((name for name in (column, *OBS_ALIASES.get(column, ())) if name in obs), None)
    if column == "perturbation" and known is None and written_as_gears(obs):
        return CONDITION
    return known


def _normalise(frame: pd.DataFrame, controls: Sequence[str] = ()) -> None:
    for column in frame.columns.intersection(list(UNITS)):
        frame[column] = distinct.changed(frame[column], partial(written, units=UNITS[column]))
    for column, default in OBS_DEFAULTS.items():
        if column not in frame:
            continue
        if isinstance(default, float):
            try:
                frame[column] = pd.to_numeric(frame[column]).astype(float)
            except (ValueError, TypeError) as error:
                raise InputRefused(
                    f"obs.{column}: not numbers: {error}; map another column with obs.{column}=NAME"
                ) from None
        elif isinstance(default, bool):
            frame[column] = np.asarray(distinct.changed(frame[column], _truth), dtype=bool)
    if "perturbation" in frame:
        codes, words = distinct.coded(frame["perturbation"])
        frame["perturbation"] = distinct.spread(codes, named(words, controls, of_guides(frame)))
        if "perturbation_type" not in frame:
            kind_of = {"": "none", UNKNOWN: UNKNOWN}
            kinds = distinct.changed(frame["perturbation"], lambda name: kind_of.get(name, "genetic"))
            frame["perturbation_type"] = kinds
        else:
            frame["perturbation_type"] = distinct.changed(frame["perturbation_type"], perturbation_kind)


def _said_of_primary(frame: pd.DataFrame) -> list[str]:
    missing = int(frame["is_primary_data"].isna().sum()) if "is_primary_data" in frame else 0
    return [f"is_primary_data: not said of {missing:,} cells, which count as primary"] if missing else []


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        if value.lower() not in ("true", "false", "1", "0"):
            raise InputRefused(f"obs.is_primary_data holds {distinct.shown(value)}; it is true or false")
        return value.lower() in ("true", "1")
    return bool(OBS_DEFAULTS["is_primary_data"] if pd.isna(value) else value)
