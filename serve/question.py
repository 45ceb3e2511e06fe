"""This module writes what a client asks: cells cut into pieces, what is said of them, in the form that travels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve.arrow import ARROW, write_request
from serve.given import EXAMPLES, Given, Measurements, Model, read_cells
from serve.h5ad import FORM
from serve.npz import NPZ, REQUEST, write_npz
from store.errors import InputRefused, MissingError

Said = str | float | np.generic | Sequence[str] | Sequence[float] | NDArray[Any]
ONE = (str, int, float, np.generic)
"""One value of a prompt, for all cells."""

NAMED = 10_000
"""Most features that are named of cells that have no counts of any: the server looks whether it knows some."""


@dataclass(frozen=True)
class Body:
    """A body that is no JSON, and its content type; of a form, its other part."""

    media: str
    content: bytes
    request: str = ""


@dataclass(frozen=True)
class Piece:
    """Some of the cells, of which the same was measured, and where they are among all."""

    rows: NDArray[np.int64]
    measurements: Measurements

    @property
    def n_counts(self) -> int:
        """Stored counts of all measurements."""
        return sum(int(counts_CF.indptr[-1]) for counts_CF, _ in self.measurements.values())

    def dealt(self, n: int) -> Iterator[Piece]:
        """Deal the cells to ``n`` pieces like cards, so that each is like all of them, however they are sorted.

        The server judges how much it understands of a request as a whole.
        """
        for first in range(n):
            parts = {name: (counts_CF[first::n], features) for name, (counts_CF, features) in self.measurements.items()}
            yield Piece(self.rows[first::n], parts)

    def cut(self, most_cells: int, most_counts: int) -> Iterator[Piece]:
        """Deal the cells to pieces of so many cells and counts at most; a single cell may have more."""
        n_cells = len(self.rows)
        n = min(n_cells, max(-(-n_cells // most_cells), -(-self.n_counts // most_counts)))
        if n <= 1:
            yield self
            return
        for piece in self.dealt(n):
            yield from piece.cut(most_cells, most_counts)

    def named(self) -> str:
        """Say which cells these are."""
        first = ", ".join(f"{row:,}" for row in self.rows[:EXAMPLES])
        return f"{len(self.rows):,} cells at positions {first}{', ...' if len(self.rows) > EXAMPLES else ''}"


def as_request(body: dict[str, Any] | Body | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the headers of a request and what httpx is told to send."""
    if body is None:
        return {}, {}
    if not isinstance(body, Body):
        return {"Content-Type": "application/json"}, {"content": as_json(body)}
    if body.media == FORM:
        parts = {"file": ("cells.h5ad", body.content, "application/x-hdf5"), "request": (None, body.request)}
        return {"Accept": f"{NPZ}, application/json"}, {"files": parts}
    return {"Content-Type": body.media, "Accept": f"{body.media}, application/json"}, {"content": body.content}


def as_json(message: Mapping[str, Any]) -> bytes:
    """Write a message, which may hold what numpy has."""
    return json.dumps(message, default=_plain).encode()


def _plain(value: Any) -> Any:
    """Return what numpy has as JSON has it.

    Raises:
        InputRefused: JSON has nothing like it.
    """
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise InputRefused(f"a request holds texts, numbers and lists, not {type(value).__name__}")


def whole_body(cells: Any, prompts: Mapping[str, Said] | None, asked: Mapping[str, Any], model: Model) -> Body:
    """Write all cells and what is asked of them."""
    if isinstance(cells, str | os.PathLike):
        return file_of(cells, prompts, asked)
    given = read_cells(cells, model)
    if given.measured:
        partly = ", ".join(given.measured)
        raise InputRefused(
            f"{partly} was not measured in all cells, whose mean is asked; give cells with all, or leave it out"
        )
    check_said(prompts, given.n_cells)
    return body_of(Piece(np.arange(given.n_cells), given.measurements), prompts, asked)


def cut_into_pieces(given: Given, most_cells: int, most_counts: int) -> Iterator[Piece]:
    """Cut cells into pieces of which the same was measured."""
    for rows, measurements in given.groups():
        yield from Piece(rows, measurements).cut(most_cells, most_counts)


def body_of(piece: Piece, prompts: Mapping[str, Said] | None, asked: Mapping[str, Any], media: str = NPZ) -> Body:
    """Write some cells and what is asked of them."""
    message = as_json({"prompts": said_of(prompts, piece.rows), **asked})
    parts: Measurements = {}
    arrays: dict[str, NDArray[Any] | bytes] = {REQUEST: message}
    for name, (part, features) in piece.measurements.items():
        used, indices = np.unique(part.indices, return_inverse=True)
        names = [features[column] for column in used] or features[:NAMED]
        parts[name] = csr_matrix((part.data, indices, part.indptr), shape=(part.shape[0], len(names))), names
        arrays |= {
            f"{name}/features": np.array([one.encode() for one in names]),
            f"{name}/indptr": part.indptr,
            f"{name}/indices": indices.astype(np.int32),
            f"{name}/data": part.data,
        }
    return Body(media, write_request(message, parts) if media == ARROW else write_npz(arrays))


def file_of(path: str | os.PathLike[str], prompts: Mapping[str, Said] | None, asked: Mapping[str, Any]) -> Body:
    """Write what is asked of an h5ad file's cells, beside the file."""
    check_said(prompts)
    message = {"prompts": said_of(prompts), **asked}
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise MissingError(f"{path}: cannot be read: {error.strerror}; give the path of an h5ad file") from None
    return Body(FORM, content, as_json(message).decode())


def check_said(prompts: Mapping[str, Said] | None, n_cells: int | None = None) -> None:
    """Refuse prompts that say nothing, of some cells either, or are said of more or fewer cells than there are."""
    for name, value in (prompts or {}).items():
        if isinstance(value, ONE):
            continue
        if not hasattr(value, "__len__") or isinstance(value, Mapping):
            raise InputRefused(
                f"prompts.{name}: cannot use {type(value).__name__}; say a text or a number, one per cell, or nothing"
            )
        if n_cells is not None and len(value) != n_cells:
            raise InputRefused(f"prompts.{name}: {len(value):,} values for {n_cells:,} cells; say one, or one per cell")
        missing = next((cell for cell, one in enumerate(value) if _is_missing(one)), None)
        if missing is not None:
            raise InputRefused(
                f"prompts.{name}: cell {missing:,} has no value; say '' for a text that is not known, and ask apart "
                "about cells of which a number is not"
            )


def _is_missing(value: Any) -> bool:
    """Say whether a value is one that tables hold where there is none: None, NaN or the NA of pandas."""
    if isinstance(value, float | np.floating):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ == "NAType"


def said_of(prompts: Mapping[str, Said] | None, rows: NDArray[np.int64] | None = None) -> dict[str, Any]:
    """Return what is said of some of the cells, or of all."""
    message: dict[str, Any] = {}
    for name, value in (prompts or {}).items():
        if isinstance(value, ONE):
            message[name] = value
        else:
            values = list(value)
            message[name] = values if rows is None else [values[row] for row in rows]
    return message
