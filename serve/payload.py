"""This module reads requests as npz: the same messages, with counts as arrays in place of text (``serve.npz``).

Nothing in a request is believed: sizes are compared with limits and with each other before anything is allocated, and
nothing is unpickled.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import IO, Any, TypeVar

import numpy as np
from fastapi.exceptions import RequestValidationError
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from serve.errors import FieldRefused
from serve.h5ad import ID_COLUMNS
from serve.messages import CsrCounts
from serve.npz import LONGEST_NAME, MEASUREMENTS, OTHERS, REQUEST
from serve.settings import Limits

PARTS = {"indptr": "iu", "indices": "iu", "data": "iuf", "features": "US"}
"""What a measurement's counts are made of, and which kinds of numpy's types each may be."""
_PLACEHOLDER: dict[str, Any] = {"RNA": [{}]}
M = TypeVar("M", bound=BaseModel)


def read_request(body: bytes, message: type[M], limits: Limits, where: str = "") -> M:
    """Return the message that an npz body holds; its counts hold arrays where JSON has lists.

    Args:
        body: The npz.
        message: What it is.
        limits: What it may hold.
        where: How whoever sent it wrote the message, for errors; the npz may have been made of another form.

    Raises:
        FieldRefused: The body is no such npz, or claims more than it is.
        RequestValidationError: The message in it is wrong.
    """
    arrays = read_npz(body, limits)
    said = arrays.pop(REQUEST, None)
    try:
        values = json.loads(said.tobytes()) if said is not None else None
    except (ValueError, RecursionError):  # the latter of lists in lists
        values = None
    if not isinstance(values, dict) or "counts" in values:
        raise FieldRefused(REQUEST, f"must hold the message without its counts, a JSON object{where}")
    counts = counts_of(arrays, limits)
    try:
        plain = message.model_validate(values | {"counts": _PLACEHOLDER})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return plain.model_copy(update={"counts": counts})


def read_npz(body: bytes, limits: Limits) -> dict[str, NDArray[Any]]:
    """Return the arrays of an npz, all of one dimension.

    Raises:
        FieldRefused: It is damaged, holds something else, or is larger than it may be once it is unpacked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            if len(members) > MEASUREMENTS * (len(PARTS) + 1) + 1:
                raise FieldRefused("body", f"{len(members):,} members; an npz of {MEASUREMENTS} measurements has fewer")
            if sum(member.file_size for member in members) > limits.unpacked_bytes:
                raise FieldRefused("body", f"more than {limits.unpacked_bytes:,} bytes once unpacked; send fewer cells")
            found: dict[str, NDArray[Any]] = {}
            n_counts = 0
            for member in members:
                name = member.filename.removesuffix(".npy")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise FieldRefused("body", "send an npz as numpy.savez or numpy.savez_compressed writes it")
                if name in found or name == member.filename:
                    raise FieldRefused("body", f"member {member.filename[:80]!r}: send each array once, as NAME.npy")
                part = name.rpartition("/")[2]
                most = limits.nonzeros - n_counts if part == "data" else _most(part, limits)
                with archive.open(member) as file:
                    found[name] = _array(file, member.file_size, name, most)
                n_counts += len(found[name]) if part == "data" else 0
            return found
    except FieldRefused:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise FieldRefused("body", f"no npz: {str(error)[:200]}") from None
    except (zipfile.zlib.error, ValueError) as error:  # type: ignore[attr-defined]
        raise FieldRefused("body", f"damaged: {str(error)[:200]}") from None


def _most(part: str, limits: Limits) -> int:
    """Return how many values an array may have, as its name ends; of others, the bytes alone are bounded."""
    known = {"indptr": limits.cells + 1, "indices": limits.nonzeros, "features": limits.features}
    return known.get(part, limits.unpacked_bytes)


def _array(file: IO[bytes], size: int, name: str, most: int) -> NDArray[Any]:
    """Read a ``.npy``; its header is compared with what there is and what there may be before the rest is unpacked."""
    try:
        major = npy.read_magic(file)[0]
        read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception as error:  # noqa: BLE001 - numpy's parser of headers raises what Python's parser does
        raise FieldRefused(name[:80], f"no .npy array: {str(error)[:200]}") from None
    left = size - file.tell()
    if dtype.hasobject or dtype.fields is not None or len(shape) != 1:
        raise FieldRefused(name[:80], "send one dimension of numbers or texts")
    if dtype.itemsize == 0 or shape[0] * dtype.itemsize != left:
        raise FieldRefused(name[:80], f"its header says {shape[0]:,} values of {dtype}, and {left:,} bytes follow")
    if shape[0] > most:
        raise FieldRefused(name[:80], f"{shape[0]:,} values, where at most {most:,} fit; send fewer cells at a time")
    data = file.read(left + 1)  # to the end, where its checksum is compared
    if len(data) != left:
        raise FieldRefused(name[:80], "is shorter than it says")
    return np.frombuffer(data, dtype)


def counts_of(arrays: Mapping[str, NDArray[Any]], limits: Limits) -> dict[str, CsrCounts]:
    """Put the arrays of each measurement together.

    Raises:
        FieldRefused: One is missing, is of another kind, or there are too many.
    """
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for name, values in arrays.items():
        measurement, _, part = name.rpartition("/")
        if not measurement or part not in (*PARTS, OTHERS) or len(measurement) > LONGEST_NAME:
            raise FieldRefused(name[:80], f"no part of counts; send MEASUREMENT/{{{', '.join(PARTS)}}}")
        if values.dtype.kind not in PARTS.get(part, PARTS["features"]):
            raise FieldRefused(f"counts.{name.replace('/', '.')}", f"holds {values.dtype}; it cannot be used here")
        parts.setdefault(measurement, {})[part] = values
    if not parts or len(parts) > MEASUREMENTS:
        raise FieldRefused("counts", f"send 1 to {MEASUREMENTS} measurements")
    found = {}
    for measurement, own in parts.items():
        where = f"counts.{measurement}"
        lacking = [name for name in PARTS if name not in own]
        if lacking:
            raise FieldRefused(f"{where}.{lacking[0]}", "is missing")
        if own["indptr"].dtype == np.uint64 or own["indices"].dtype == np.uint64:
            raise FieldRefused(where, "send indptr and indices as int64 or smaller")
        features = _names(own["features"], f"{where}.features", limits)
        counts = CsrCounts.model_construct(
            features=features, indptr=own["indptr"], indices=own["indices"], data=own["data"]
        )
        if OTHERS in own:
            counts.others.extend(_others(own[OTHERS], len(features), f"{where}.{OTHERS}", limits))
        found[measurement] = counts
    return found


def _others(values: NDArray[Any], n_features: int, where: str, limits: Limits) -> list[list[str]]:
    """Return further names of the same features, of each column that a file has them in."""
    if not values.size or len(values) % n_features or len(values) > len(ID_COLUMNS) * n_features:
        raise FieldRefused(where, f"{len(values):,} names for {n_features:,} features; send columns of as many")
    return [_names(part, where, limits) for part in np.split(values, len(values) // n_features)]


def _names(values: NDArray[Any], where: str, limits: Limits) -> list[str]:
    width = values.dtype.itemsize // (4 if values.dtype.kind == "U" else 1)
    if not 0 < len(values) <= limits.features or width > LONGEST_NAME:
        raise FieldRefused(where, f"send 1 to {limits.features:,} names of at most {LONGEST_NAME} characters")
    try:
        return [(name if isinstance(name, bytes) else name.encode()).decode() for name in values.tolist()]
    except ValueError:  # halves of characters (surrogates), too
        raise FieldRefused(where, "holds what is no text") from None
