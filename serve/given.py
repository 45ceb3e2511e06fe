"""This module reads the forms in which the client is given cells, and pairs their measurements by the cells' names.

Shape letters used in this module:
    C  cells      F  features of a measurement      M  measurements
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse, vstack

from serve.h5ad import ID_COLUMNS, split_by_type, storable
from store.errors import InputRefused
from store.schema import MEASUREMENT_OF_MODALITY

Measurements = dict[str, tuple[csr_matrix, list[str]]]
EXAMPLES = 3
STACK = 6
"""Calls from a warning here to who asked the client."""


@dataclass(frozen=True)
class Part:
    """One measurement as it was given; ``cells`` names its rows, where they have names."""

    counts_CF: csr_matrix
    features: list[str]
    cells: list[str] | None = None


@dataclass(frozen=True)
class Given:
    """Cells whose measurements list them in the same order.

    Attributes:
        n_cells: C.
        measurements: Measurement to counts_CF and the names of features; a cell that was not measured is an empty row.
        measured: Measurement to [C], of those that lack cells.
    """

    n_cells: int
    measurements: Measurements
    measured: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    def groups(self) -> Iterator[tuple[NDArray[np.int64], Measurements]]:
        """Yield cells of which the same was measured: their positions, ascending, and what was measured of them."""
        if not self.measured:
            yield np.arange(self.n_cells), self.measurements
            return
        everywhere_C = np.ones(self.n_cells, dtype=bool)
        there_CM = np.stack([self.measured.get(name, everywhere_C) for name in self.measurements], axis=1)
        patterns, which_C = np.unique(there_CM, axis=0, return_inverse=True)
        for number, there_M in enumerate(patterns):
            rows = np.flatnonzero(which_C.ravel() == number)
            named = zip(self.measurements.items(), there_M, strict=True)
            yield rows, {name: (counts_CF[rows], features) for (name, (counts_CF, features)), there in named if there}


class Model(Protocol):
    """What is told of the model that is to be asked."""

    @property
    def measurements(self) -> Collection[str]:
        """Those that it knows."""
        ...

    @property
    def levels(self) -> Collection[str]:
        """Those of them whose values are levels: a zero is a value, NaN is missing."""
        ...

    def known(self, measurement: str, names: Sequence[str]) -> int:
        """Count the names by which it knows a feature."""
        ...


def read_cells(cells: Any, model: Model) -> Given:
    """Read cells in any form that the client takes.

    Measurements whose cells have names are paired by these. Cells of MuData may lack measurements; elsewhere all
    measurements must have the same cells. AnnData whose ``var["feature_types"]`` names 10x's types holds several
    measurements; of these, what the model does not know is left out with a warning.

    Raises:
        InputRefused: The form is not known, or the measurements hold different cells.
    """
    parts = _parts(cells, model)
    if not parts:
        raise InputRefused("there are no measurements to send")
    given = _by_name(parts, [str(name) for name in cells.obs_names]) if _is_mudata(cells) else _paired(parts)
    if given.n_cells == 0:
        raise InputRefused("there are no cells to send")
    nameless = [name for name, (_, features) in given.measurements.items() if not features]
    if nameless:
        raise InputRefused(f"counts.{nameless[0]}: there are no features; give cells with some, or leave it out")
    return given


def _parts(cells: Any, model: Model) -> dict[str, Part]:
    if isinstance(cells, list):
        return {"RNA": _of_dicts(cells, "RNA", model)}
    if _is_mudata(cells):
        return _of_modalities(cells.mod, model)
    if isinstance(cells, Mapping):
        return {name: _of_part(part, name, model) for name, part in cells.items()}
    if hasattr(cells, "X") and hasattr(cells, "var_names"):
        return _by_type(cells, model)
    if _is_table(cells):
        return {"RNA": _of_table(cells, "RNA", model)}
    raise _unreadable(cells)


def listed(names: Any, where: str) -> list[str]:
    """Return names as texts; a text is one of them.

    Raises:
        InputRefused: It is no list.
    """
    if isinstance(names, str):
        return [names]
    if not isinstance(names, Iterable):
        raise InputRefused(f"{where}: cannot use {type(names).__name__} as names; give a list of texts")
    return [str(name) for name in names]


def _unreadable(cells: Any) -> InputRefused:
    kind = f"a list of {type(cells[0]).__name__}" if isinstance(cells, list) else type(cells).__name__
    return InputRefused(
        f"cannot read counts from {kind}; give AnnData, MuData, a DataFrame of cells x features, "
        "{measurement: (csr, features)} or a list of {feature: count}"
    )


def _is_mudata(cells: Any) -> bool:
    return isinstance(getattr(cells, "mod", None), Mapping)


def _is_table(cells: Any) -> bool:
    return hasattr(cells, "columns") and hasattr(cells, "index") and hasattr(cells, "to_numpy")


def _of_table(table: Any, measurement: str, model: Model) -> Part:
    """Read a DataFrame of cells x features."""
    values = _stored(table.to_numpy(), measurement, model)
    return Part(values, [str(name) for name in table.columns], [str(name) for name in table.index])


def _of_modalities(modalities: Mapping[str, Any], model: Model) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    named: dict[str, str] = {}
    for modality, part in modalities.items():
        name = MEASUREMENT_OF_MODALITY.get(modality.lower(), modality)
        if name in parts:
            raise InputRefused(
                f"the modalities {named[name]} and {modality} are {name} both; leave one out, or give "
                "{measurement: AnnData} with the names of measurements"
            )
        parts[name], named[name] = _of_anndata(part, name, model), modality
    return parts


def _of_part(part: Any, name: str, model: Model) -> Part:
    if hasattr(part, "var_names"):
        return _of_anndata(part, name, model)
    if isinstance(part, list):
        return _of_dicts(part, name, model)
    if _is_table(part):
        return _of_table(part, name, model)
    if not isinstance(part, tuple) or len(part) != 2:
        raise _unreadable(part)
    counts_CF, features = _stored(part[0], name, model), listed(part[1], f"counts.{name}")
    if len(features) != counts_CF.shape[1]:
        raise InputRefused(f"counts.{name}: {len(features):,} features for {counts_CF.shape[1]:,} columns; name each")
    return Part(counts_CF, features)


def _by_type(adata: Any, model: Model) -> dict[str, Part]:
    """Read AnnData that holds what its features' types say, RNA where they say nothing."""
    split = split_by_type(adata.var.get("feature_types", ()))
    kept = list(split)
    if len(split) > 1:
        kept = [name for name in split if name in model.measurements] or kept
    n_left = adata.shape[1] - sum(len(split[name]) for name in kept)
    if kept and n_left:
        warnings.warn(
            f"{n_left:,} features are left out, of types in var['feature_types'] that are not {', '.join(kept)}; the "
            f"model knows {', '.join(model.measurements)}",
            stacklevel=STACK,
        )
    return {name: _of_anndata(adata, name, model) for name in kept or ["RNA"]}


def _of_anndata(adata: Any, measurement: str, model: Model) -> Part:
    """Read one measurement; features of other types of 10x's, where there are some of its own, are not of it."""
    if getattr(adata, "isbacked", False):
        raise InputRefused(
            "AnnData that is backed by a file is not read here; give adata[rows].to_memory(), some cells at a time, or "
            "the path of the file, which is sent whole"
        )
    if adata.X is None:
        layers = ", ".join(map(str, getattr(adata, "layers", ()))) or "none"
        raise InputRefused(f"AnnData has no X; it has the layers {layers}: put the raw counts there, adata.X = ...")
    counts_CF = _stored(adata.X, measurement, model)
    columns = split_by_type(adata.var.get("feature_types", ())).get(measurement, np.arange(counts_CF.shape[1]))
    if len(columns) < counts_CF.shape[1]:
        counts_CF = csr_matrix(counts_CF[:, columns])
    return Part(counts_CF, _names(adata, columns, measurement, model), [str(name) for name in adata.obs_names])


def _names(adata: Any, columns: NDArray[np.int64], measurement: str, model: Model) -> list[str]:
    """Return the features' names in that column of var, or its index, by which the model knows most of them."""
    table = {name: adata.var[name] for name in ID_COLUMNS if name in adata.var}
    first, index = table.pop("feature_id", None), adata.var_names
    found: list[list[str]] = []
    for column in (first, index, *table.values()):
        names = [] if column is None else [str(name) for name in np.asarray(column, dtype=object)[columns]]
        if names and names not in found:
            found.append(names)
    return max(found, key=lambda names: model.known(measurement, names)) if len(found) > 1 else [*found, []][0]


def _of_dicts(cells: list[dict[str, float]], measurement: str, model: Model) -> Part:
    strange = next((cell for cell in cells if not isinstance(cell, Mapping)), None)
    if strange is not None:
        raise _unreadable([strange])
    column = {name: position for position, name in enumerate(dict.fromkeys(name for cell in cells for name in cell))}
    indptr = np.cumsum([0, *(len(cell) for cell in cells)])
    indices = [column[name] for cell in cells for name in cell]
    try:
        data = [float(count) for cell in cells for count in cell.values()]
    except (TypeError, ValueError) as error:
        raise InputRefused(f"counts.{measurement}: {error}; give {{feature: count}} with numbers") from None
    counts_CF = csr_matrix((data, indices, indptr), shape=(len(cells), len(column)))
    return Part(_stored(counts_CF, measurement, model), [str(name) for name in column])


def _numbers(values: Any, measurement: str) -> NDArray[Any]:
    """Return a table of numbers."""
    table = np.asarray(values)
    if table.dtype == object:
        with suppress(TypeError, ValueError):
            table = table.astype(np.float64)
    if table.ndim != 2 or table.dtype.kind not in "iufb":
        raise InputRefused(
            f"counts.{measurement}: cannot use values of type {table.dtype} in {table.ndim} dimensions; give a "
            "matrix of numbers, cells x features"
        )
    return table


def _found(table_CF: NDArray[Any]) -> csr_matrix:
    """Store all levels of a table that are not missing, zeros too."""
    row, column = np.nonzero(~np.isnan(table_CF))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(table_CF)))])
    return csr_matrix((table_CF[row, column], column, indptr), shape=table_CF.shape)


def _stored(values: Any, measurement: str, model: Model) -> csr_matrix:
    """Return the values to send: all that a sparse matrix stores; of a table, counts that are not zero, or all levels.

    Raises:
        InputRefused: Some are no numbers or not finite; of levels NaN may be, which is missing.
    """
    sparse = bool(issparse(values))
    if sparse:
        counts_CF = csr_matrix(storable(values))
    else:
        table_CF = storable(_numbers(values, measurement))
        counts_CF = _found(table_CF) if measurement in model.levels else csr_matrix(table_CF)
    if counts_CF.dtype.kind == "b":
        counts_CF = counts_CF.astype(np.uint8)
    missing = np.isnan(counts_CF.data)
    if missing.any() and measurement in model.levels:
        indptr = np.concatenate([[0], np.cumsum(~missing)])[counts_CF.indptr]
        counts_CF = csr_matrix((counts_CF.data[~missing], counts_CF.indices[~missing], indptr), shape=counts_CF.shape)
    if not np.isfinite(counts_CF.data).all():
        raise InputRefused(f"counts.{measurement}: holds values that are not finite; send raw counts")
    return counts_CF


def _paired(parts: dict[str, Part]) -> Given:
    """Pair measurements that must have the same cells."""
    sizes = {name: part.counts_CF.shape[0] for name, part in parts.items()}
    if len(set(sizes.values())) != 1:
        raise InputRefused(f"the measurements must list the same cells; they hold {sizes}")
    named = {name: part.cells for name, part in parts.items() if part.cells is not None}
    first, order = next(iter(named.items()), ("", None))
    unlike = [name for name, own in named.items() if own != order]
    if order is None or not unlike:
        kept = {name: (part.counts_CF, part.features) for name, part in parts.items()}
        return Given(next(iter(sizes.values())), kept)
    for name in unlike:
        _check_same(first, order, name, named[name])
    nameless = [name for name in parts if name not in named]
    if nameless:
        raise InputRefused(
            f"{first} and {unlike[0]} list their cells in different orders, so that nobody knows in which "
            f"{nameless[0]} lists its own; bring all into one order, or give {nameless[0]} as AnnData with names too"
        )
    return _by_name(parts, order)


def _check_same(first: str, order: list[str], name: str, own: list[str]) -> None:
    """Refuse measurements of different cells, and say which."""
    lacking, more = sorted(set(order) - set(own)), sorted(set(own) - set(order))
    if not lacking and not more:
        return
    told = [
        f"{len(rest):,} only in {where} ({_some(rest)})" for where, rest in ((first, lacking), (name, more)) if rest
    ]
    raise InputRefused(
        f"{first} and {name} hold different cells, by obs_names: {', '.join(told)}; name the same cells alike, or give "
        "MuData, whose cells may lack measurements"
    )


def _by_name(parts: dict[str, Part], order: list[str]) -> Given:
    """Bring measurements into an order of cells; those that one lacks were not measured there."""
    measurements: Measurements = {}
    measured: dict[str, NDArray[np.bool_]] = {}
    for name, part in parts.items():
        counts_CF, own = part.counts_CF, part.cells or []
        if own != order:
            position = _positions(name, own, order)
            there = position >= 0
            if not there.all():
                measured[name] = there
                counts_CF = csr_matrix(vstack([counts_CF, csr_matrix((1, counts_CF.shape[1]), dtype=counts_CF.dtype)]))
            counts_CF = counts_CF[np.where(there, position, len(own))]
        measurements[name] = counts_CF, part.features
    if len(measured) == len(parts):
        nowhere = ~np.logical_or.reduce(list(measured.values()))
        if nowhere.any():
            names = [order[row] for row in np.flatnonzero(nowhere)]
            raise InputRefused(f"{len(names):,} cells are in no modality ({_some(names)}); call update() of the MuData")
    return Given(len(order), measurements, measured)


def _positions(name: str, own: list[str], order: list[str]) -> NDArray[np.int64]:
    """Return where each cell is among a measurement's own, -1 for one that it lacks."""
    place = {cell: position for position, cell in enumerate(own)}
    for where, cells in ((name, own), ("the whole", order)):
        if len(set(cells)) < len(cells):
            twice, _ = Counter(cells).most_common(1)[0]
            raise InputRefused(f"{where} names several cells {twice!r}, so that measurements cannot be paired by names")
    strange = sorted(set(own) - set(order))
    if strange:
        raise InputRefused(f"{name} has cells that the whole lacks ({_some(strange)}); call update() of the MuData")
    return np.fromiter((place.get(cell, -1) for cell in order), dtype=np.int64, count=len(order))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:EXAMPLES])) + (", ..." if len(names) > EXAMPLES else "")
