"""This module reads MuData files: several modalities, whose cells overlap wholly or in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray

from ingest.job import SourceSettings
from ingest.sources.form import Part, Rows, SourceDataset, are_levels, content_digest, dataset_name, fingerprint
from ingest.sources.h5ad import matrices, named_matrix, open_group, read_table
from ingest.turn import PART, Coordinates, turned
from store.errors import InputRefused
from store.schema import MEASUREMENT_OF_MODALITY


def names(source: SourceSettings) -> list[str]:
    """A file is one dataset."""
    return [dataset_name(source)]


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a file; its cells are all that any modality with a measurement has, in the order of the file's obs.

    Raises:
        InputRefused: Not a MuData file, no modality is known, or two measure the same.
    """
    notes = list[str]()
    file = open_group(source.uri, notes)
    if "mod" not in file:
        raise InputRefused(f"{source.uri}: has no modalities; is it a MuData file?")
    measurement_of = _measurements([str(key) for key in file["mod"]], source)
    cells_of = {key: read_table(file["mod"][key], "obs", f"{source.uri}: mod/{key}") for key in measurement_of}
    obs = read_table(file, "obs", source.uri)
    obs = obs[np.logical_or.reduce([obs.index.isin(own.index) for own in cells_of.values()])]
    layers = {key: matrices(file["mod"][key]) for key in measurement_of}
    known = dict.fromkeys(name for names in layers.values() for name in names)
    without = [key for key, names in layers.items() if source.layer in known and source.layer not in names]
    x_instead = f"layer={source.layer}: X is taken of {', '.join(without)}, which lacks it" if without else ""
    parts: dict[str, Part] = {}
    identity = [source.uri, fingerprint(source.uri)]
    for key, measurement in measurement_of.items():
        group, own, where = file["mod"][key], cells_of[key], f"{source.uri}: mod/{key}"
        if own.index.has_duplicates:
            twice = own.index[own.index.duplicated()][0]
            raise InputRefused(f"{where}: cell {twice!r} stands more than once; give each its own name")
        position = own.index.get_indexer(obs.index)
        layer = "" if key in without else source.layer
        var, rows_if = named_matrix(group, where, layer, identity)
        levels = are_levels(source, measurement)
        rows, there = rows_if(levels), position >= 0
        if np.any(np.diff(position[there]) < 0):
            shape = (len(obs), len(var))
            apart = [*identity, where, layer, f"{levels=}", *measurement_of]  # these say which cells come in
            rows = turned(apart, shape, partial(_moved, rows, position, shape[1]))
        else:
            rows = _placed(rows, position, len(var))
        parts[measurement] = Part(var, rows, there)
    obs, said = _joined(obs, cells_of, [str(key) for key in file["mod"]])
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: obs,
        n_obs=len(obs),
        parts=parts,
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
        notes=(*notes, *_left_out(file["mod"], measurement_of), *([x_instead] if x_instead else []), *said),
        matrices=tuple(name for name in known if name != source.layer),
    )


def _measurements(modalities: list[str], source: SourceSettings) -> dict[str, str]:
    """Say what each modality that comes in measures."""
    absent = sorted(set(source.modalities) - set(modalities))
    if absent:
        raise InputRefused(f"{source.uri}: has no modality {absent[0]!r}; it has {', '.join(modalities)}")
    named = {key: source.modalities.get(key, MEASUREMENT_OF_MODALITY.get(key.lower(), "")) for key in modalities}
    found = {key: measurement for key, measurement in named.items() if measurement}
    if not found:
        raise InputRefused(
            f"{source.uri}: unknown modality {modalities[0]!r}; known: {', '.join(MEASUREMENT_OF_MODALITY)}; "
            "or say what one measures: modalities.NAME=protein"
        )
    for measurement in found.values():
        several = [key for key, other in found.items() if other == measurement]
        if len(several) > 1:
            raise InputRefused(
                f"{source.uri}: modalities {' and '.join(several)} are {measurement} both; leave one out with "
                f"modalities.{several[1]}= or name another measurement there"
            )
    return found


def _left_out(modalities: Any, taken: Mapping[str, str]) -> tuple[str, ...]:
    left = [str(key) for key in modalities if key not in taken]
    if not left:
        return ()
    return (f"modalities left out: {', '.join(left)}; one that measures proteins comes with modalities.NAME=protein",)


def _joined(
    obs: pd.DataFrame, cells_of: Mapping[str, pd.DataFrame], modalities: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Join the file's obs with the modalities' own; columns of one name (``rna:donor`` is ``donor``) become one.

    The first that has a column says what it holds, and others fill in cells of which it says nothing, unless they speak
    of another thing: most of what both say differs. What says otherwise of a cell also stays, as ``rna:donor``.

    Returns:
        One row for each of the file's cells, and what people should know.
    """
    found: dict[str, list[tuple[str, pd.Series]]] = {}
    for column in map(str, obs.columns):
        modality, colon, rest = column.partition(":")
        owner, plain = (modality, rest) if colon and modality in modalities else ("", column)
        found.setdefault(plain, []).append((owner, obs[column]))
    for key, own in cells_of.items():
        for label in own:
            found.setdefault(str(label), []).append((key, own[label].reindex(obs.index)))
    joined: dict[str, pd.Series] = {}
    otherwise: dict[str, int] = {}
    for name, several in found.items():
        first = joined[name] = max(several, key=lambda one: one[0] == "")[1]  # the file's own speaks first
        for owner, values in several:
            if values is first:
                continue
            both = (joined[name].notna() & values.notna()).to_numpy()
            told, other = (column.astype(object).to_numpy() for column in (joined[name], values))
            differ = int((told[both] != other[both]).sum())
            if 2 * differ <= both.sum() and (joined[name].isna() & values.notna()).any():
                filled = pd.Series(np.where(joined[name].isna(), other, told), index=obs.index)
                joined[name] = filled.astype("category") if values.dtype == "category" else filled.infer_objects()
            if differ:
                joined[f"{owner}:{name}"] = values
                otherwise[f"{owner}:{name}"] = differ
    shown = ", ".join(f"{column} ({many:,} cells)" for column, many in otherwise.items())
    notes = [f"columns that say otherwise than another modality, kept apart: {shown}"] if otherwise else []
    return pd.DataFrame(joined, index=obs.index), notes


def _moved(rows: Rows, position: NDArray[np.intp], n_features: int) -> Iterator[Coordinates]:
    """Read a modality once, in its own order, and say where each value is in that of the file's obs.

    Cells that lie together there may lie anywhere here: block by block, all of the modality would be read for each.
    """
    there = np.flatnonzero(position >= 0)
    place = np.full(int(position.max()) + 1, -1)
    place[position[there]] = there
    step = max(1, min(4096, PART * 8 // max(1, n_features)))
    for start in range(0, len(place), step):
        stop = min(start + step, len(place))
        found = rows(start, stop).tocoo()
        row = place[start:stop][found.row]
        wanted = row >= 0
        yield row[wanted], found.col[wanted], found.data[wanted]


def _placed(rows: Rows, position: NDArray[np.intp], n_features: int) -> Rows:
    """Return rows in the order of the file's obs, which is the modality's; a cell that it lacks is an empty row."""

    def read(start: int, stop: int) -> scipy.sparse.csr_matrix:
        wanted = position[start:stop]
        there = wanted[wanted >= 0]
        if len(there) == 0:
            return scipy.sparse.csr_matrix(np.zeros((stop - start, n_features), dtype=np.float32))
        first, last = int(there.min()), int(there.max()) + 1
        found = rows(first, last)
        if len(there) == last - first == stop - start and bool(np.all(np.diff(there) == 1)):
            return found
        chosen = found[there - first]  # a product of matrices would drop zeros, and those of levels are stored
        nnz_C = np.zeros(stop - start, np.int64)
        nnz_C[wanted >= 0] = np.diff(chosen.indptr)
        parts = (chosen.data, chosen.indices, np.concatenate([[0], np.cumsum(nnz_C)]))
        return scipy.sparse.csr_matrix(parts, shape=(stop - start, n_features))

    return read
