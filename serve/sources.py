"""This module reads cells from files and snapshots in a process of their own, with limits on memory and time.

Foreign files crash and deceive their readers, and reading holds the interpreter: neither may be felt by those who ask
the server meanwhile. The child (``python -m serve.sources``) writes an npz as ``serve.npz`` has it, which is read like
any request: nothing in it is believed. Sizes are compared with the limits before anything is allocated for them.

Shape letters used in this module:
    C  cells      G  features of a file      N  stored counts
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve import h5ad  # a form with a file is read by the same: one file says the same, whichever way it comes
from serve.errors import DeadlineExceeded, FieldRefused, without_place
from serve.messages import CsrCounts
from serve.npz import write_npz
from serve.payload import counts_of, read_npz
from serve.settings import Explore, Limits
from store.errors import InputRefused, MissingError, SomaflowError, StorageError, is_of_memory
from store.hdf5 import check_hdf5

NAMES = "cell"
"""The column of ``obs`` that holds the cells' names."""
COLUMNS, VALUES = 32, 256
"""Columns of ``obs`` that are read, and the most values of one of words."""
LONGEST = 256
"""Characters of a name or a value."""
_OBS, _MEASURED = "obs", "measured"


@dataclass(frozen=True)
class Read:
    """Cells as they were found.

    Attributes:
        counts: Measurement to counts, as requests have them.
        obs: What the source says of each cell; the column ``cell`` names it.
        notes: What a person should know of the reading.
        measured: Measurement to measured_C, which cells have it; of one that is not named here, all.
    """

    counts: dict[str, CsrCounts]
    obs: pd.DataFrame
    notes: list[str]
    measured: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def read_h5ad_cells(body: bytes, settings: Explore, limits: Limits) -> Read:
    """Read an h5ad file that somebody sent.

    Raises:
        InputRefused: It is no such file, or holds too much.
        DeadlineExceeded: It took too long.
    """
    with tempfile.NamedTemporaryFile(suffix=".h5ad") as file:
        file.write(body)
        file.flush()
        return _in_child(["h5ad", file.name, "the file"], settings, limits)


def read_h5ad_file(path: str, name: str, settings: Explore, limits: Limits) -> Read:
    """Read an h5ad file of this machine, which messages call by ``name``; errors as above."""
    return _in_child(["h5ad", path, name], settings, limits)


def read_snapshot_cells(lake: str, name: str, settings: Explore, limits: Limits) -> Read:
    """Read a snapshot of a lake, or so many of its cells, drawn at random, as may be looked at; errors as above."""
    return _in_child(["snapshot", lake, name], settings, limits)


def explored(limits: Limits, settings: Explore) -> Limits:
    """Return the limits of cells that are looked at together."""
    return limits.model_copy(
        update={
            "cells": settings.cells,
            "nonzeros": settings.nonzeros,
            "unpacked_bytes": 16 * settings.nonzeros + 2**20 * 64,
        }
    )


def _in_child(words: list[str], settings: Explore, limits: Limits) -> Read:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "SOMAFLOW_TILEDB_THREADS"), "1")
    kept = {name: os.environ[name] for name in os.environ if name.startswith(("PATH", "LANG", "LC_", "AWS_", "HOME"))}
    if words[0] == "h5ad":
        kept = {name: value for name, value in kept.items() if not name.startswith("AWS_")}
    limits = explored(limits, settings)
    with tempfile.TemporaryFile() as answer:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "serve.sources", *words, str(settings.memory_mb), limits.model_dump_json()],
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env={**kept, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                timeout=settings.read_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            said = f"{words[2]}: was not read within {settings.read_s:g} s; send fewer cells"
            raise DeadlineExceeded(said) from None
        answer.seek(0)
        body = answer.read()
    if done.returncode:
        raise InputRefused(
            f"{words[2]}: its reader ended without an answer (status {done.returncode}); the file is damaged, or needs "
            f"more than {settings.memory_mb:,} MB"
        )
    return _believed(body, words[1], words[2], limits)


def _believed(body: bytes, place: str, where: str, limits: Limits) -> Read:
    """Check what the child wrote, as if a stranger had sent it; errors say the name where the place was."""
    arrays = dict(read_npz(body, limits))
    try:
        said = json.loads(arrays.pop("said").tobytes())
        if "refused" in said:
            why = without_place(str(said["refused"]), place, where)
            raise {"missing": MissingError, "storage": StorageError}.get(said["kind"], InputRefused)(why)
        obs = {}
        for number, (name, values) in enumerate(said["columns"]):
            column = arrays.pop(f"{_OBS}{number}")
            obs[name] = column if values is None else pd.Categorical.from_codes(column, categories=values)
        measured = {name: arrays.pop(f"{_MEASURED}{number}") > 0 for number, name in enumerate(said["measured"])}
        counts = counts_of(arrays, limits)
        return Read(counts, pd.DataFrame(obs), [str(note) for note in said["notes"]], measured)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, SomaflowError):
            raise
        raise InputRefused(f"{where}: its reader gave an answer that cannot be used; the file is damaged") from None


# ---------------------------------------------------------------------------------------------- in the child
def main(words: list[str]) -> None:
    """Read what the words name; write it to stdout as npz, or why it is refused."""
    form, place, name, memory_mb, said = words
    _limit(int(memory_mb) * 2**20 if form == "h5ad" else resource.RLIM_INFINITY)  # a lake is no stranger
    limits = Limits.model_validate_json(said)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        arrays = (_read_h5ad if form == "h5ad" else _read_snapshot)(place, name, limits)
    except MissingError as error:
        arrays = _refusal(str(error), "missing")
    except StorageError as error:
        arrays = _refusal(str(error), "storage")
    except SomaflowError as error:
        arrays = _refusal(str(error), "input")
    except Exception as error:  # noqa: BLE001 - whatever a library finds wrong with a foreign file, it is refused
        why = f"cannot be read as {form} ({type(error).__name__}); is it damaged?"
        if is_of_memory(error) or isinstance(error, ImportError):  # there was no memory to load a library in
            why = f"needs more than {memory_mb} MB of memory"
        arrays = _refusal(f"{name}: {why}", "input")
    out.write(write_npz(arrays))
    out.close()


def _limit(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server


def _refusal(text: str, kind: str) -> dict[str, NDArray[Any] | bytes]:
    return {"said": json.dumps({"refused": text, "kind": kind}).encode()}


def _answer(
    counts: Mapping[str, tuple[csr_matrix, list[str]]],
    obs: pd.DataFrame,
    notes: list[str],
    measured: Mapping[str, NDArray[np.bool_]] | None = None,
) -> dict[str, NDArray[Any] | bytes]:
    arrays: dict[str, NDArray[Any] | bytes] = {}
    columns: list[tuple[str, list[str] | None]] = []
    for number, name in enumerate(obs):
        column = obs[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            columns.append((str(name), [str(value) for value in column.cat.categories]))
            arrays[f"{_OBS}{number}"] = column.cat.codes.to_numpy(np.int32)
        else:
            columns.append((str(name), None))
            arrays[f"{_OBS}{number}"] = column.to_numpy(np.float32)
    for name, (counts_CG, features) in counts.items():
        arrays[f"{name}/indptr"] = counts_CG.indptr.astype(np.int64)
        arrays[f"{name}/indices"] = counts_CG.indices.astype(np.int32)
        arrays[f"{name}/data"] = counts_CG.data.astype(np.float32)
        arrays[f"{name}/features"] = np.array([feature.encode()[:LONGEST] for feature in features])
    for number, measured_C in enumerate((measured or {}).values()):
        arrays[f"{_MEASURED}{number}"] = measured_C.astype(np.uint8)
    said = {"columns": columns, "notes": notes, "measured": list(measured or {})}
    return arrays | {"said": json.dumps(said).encode()}


def _labels(obs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Choose the columns that a person can look at: numbers, and words of which there are not too many."""
    found: dict[str, Any] = {NAMES: pd.Categorical([name[:LONGEST] for name in names])}
    for name in obs.columns:
        if len(found) > COLUMNS:
            break
        column, key = obs[name], str(name)[:LONGEST]
        if key == NAMES:
            continue
        if pd.api.types.is_bool_dtype(column.dtype):
            column = column.astype(str)
        if pd.api.types.is_numeric_dtype(column.dtype):
            found[key] = column.to_numpy(np.float64, na_value=np.nan).astype(np.float32)
            continue
        words = column.astype("string").str.slice(0, LONGEST)
        if words.nunique() <= VALUES:
            found[key] = pd.Categorical(words)
    return pd.DataFrame(found)


def _read_h5ad(path: str, where: str, limits: Limits) -> dict[str, NDArray[Any] | bytes]:
    try:
        import h5py
        from anndata.io import read_elem
    except Exception as error:  # libraries that find no memory cannot be loaded, and say so in many ways
        raise MemoryError from error
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise MissingError(f"{where}: the file is not there any more") from None
    except OSError:
        raise InputRefused(f"{where}: is no HDF5 file; send cells as AnnData writes them (.h5ad)") from None
    with file:
        check_hdf5(file, where, budget_bytes=limits.unpacked_bytes)
        missing = [name for name in ("obs", "var") if name not in file]
        if missing or not {"X", "raw", "layers"} & set(file):
            raise InputRefused(f"{where}: holds no {', '.join(missing) or 'X'}; send cells as AnnData writes them")
        n_cells = _length(file["obs"], where)
        if not 0 < n_cells <= limits.cells:
            raise InputRefused(f"{where}: holds {n_cells:,} cells; 1 to {limits.cells:,} can be looked at together")
        try:
            found = h5ad.find_counts(file, limits)
            if found is None:
                wanted = ", ".join(h5ad.places(file))
                raise InputRefused(f"{where}: holds no raw counts (whole numbers) in {wanted}; the model needs them")
            counts_CG, key = found
            if counts_CG.shape[0] != n_cells:
                raise InputRefused(f"{where}: {key} has {counts_CG.shape[0]:,} rows and obs {n_cells:,}")
            arrays = h5ad.by_measurement(counts_CG, h5ad.read_features(file, key, limits))
        except FieldRefused as error:
            raise InputRefused(f"{where}: {error.message}") from None
        obs = read_elem(file["obs"])
    return arrays | _answer({}, _labels(obs, [str(name) for name in obs.index]), [f"counts are those of {key}"])


def _length(frame: Any, where: str) -> int:
    index = frame.attrs.get("_index", "_index")
    if index not in frame:
        raise InputRefused(f"{where}: {frame.name} has no index; send cells as AnnData writes them")
    return int(frame[index].shape[0])


def _read_snapshot(lake: str, name: str, limits: Limits) -> dict[str, NDArray[Any] | bytes]:
    from store.schema import measured_column
    from store.snapshot import open_snapshot

    snapshot = open_snapshot(lake, name)
    spans, rows = _spans(snapshot, limits.cells)
    counts = {}
    for measurement in snapshot.measurements:
        vocabulary = snapshot.vocabulary(measurement)["feature_id"].to_pylist()
        parts = list(_blocks(snapshot, measurement, spans, limits.nonzeros))
        data, indices, indptr = (np.concatenate([part[which] for part in parts]) for which in range(3))
        ends = np.concatenate([[0], np.cumsum(indptr)])
        counts[measurement] = (csr_matrix((data, indices, ends), shape=(len(rows), len(vocabulary))), vocabulary)
    alive = ~np.isin(rows, snapshot.dead)
    table = snapshot.cells(spans=spans).to_pandas()[alive].reset_index(drop=True)
    names = [str(value) for value in table.pop("cell_id")] if "cell_id" in table else [str(row) for row in rows[alive]]
    obs = table.drop(columns=[column for column in table if column in ("row", "soma_joinid")])
    whole = int(alive.sum()) == snapshot.n_cells
    notes = [] if whole else [f"{int(alive.sum()):,} of {snapshot.n_cells:,} cells, drawn at random from every split"]
    kept = {key: (counts_CG[alive], features) for key, (counts_CG, features) in counts.items() if counts_CG.nnz}
    measured = {key: table[measured_column(key)].to_numpy(bool) for key in kept if measured_column(key) in table}
    return _answer(kept, _labels(obs.loc[:, obs.nunique() > 1], names), notes, measured)


def _spans(snapshot: Any, most_cells: int) -> tuple[list[tuple[int, int]], NDArray[np.int64]]:
    """Choose the first rows of each part's splits, in proportion: their order is random already."""
    share = min(1.0, most_cells / max(snapshot.n_rows, 1))
    spans = []
    for part in snapshot.parts:
        for first, stop in part.split_rows.values():
            wanted = int((stop - first) * share)
            if wanted:
                spans.append((part.first_row + first, part.first_row + first + wanted))
    if not spans:
        raise InputRefused(f"{snapshot.name}: has no cells")
    return spans, np.concatenate([np.arange(*span) for span in spans])


def _blocks(
    snapshot: Any, measurement: str, spans: list[tuple[int, int]], most_counts: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]]:
    """Read spans in pieces as (counts, features, number of counts of each cell)."""
    total = 0
    for first, stop in spans:
        for start in range(first, stop, 4_096):
            block = snapshot.block(measurement, start, min(start + 4_096, stop))
            total += len(block.counts)
            if total > most_counts:
                raise FieldRefused(
                    "explore.nonzeros", f"{snapshot.name} has more than {most_counts:,} counts; set explore.cells lower"
                )
            yield block.counts.astype(np.float32), block.features.astype(np.int32), np.diff(block.indptr)


def check_sources(cells: Mapping[str, str], snapshots: Mapping[str, str]) -> None:
    """Refuse names of cells that cannot be offered, before anything is started.

    Raises:
        MissingError: A file is not there, or a lake has no such snapshot.
    """
    for name, path in cells.items():
        if not Path(path).is_file():
            raise MissingError(f"cells.{name}: {path}: no such file")
    if snapshots:
        from store.snapshot import list_snapshots

        for name, lake in snapshots.items():
            if name not in list_snapshots(lake):
                raise MissingError(f"snapshots.{name}: {lake}: holds no snapshot of that name")


if __name__ == "__main__":
    main(sys.argv[1:])
