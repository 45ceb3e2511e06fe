"""This module looks at foreign HDF5 files before anything parses them.

HDF5 lets a file name other files (external links, external storage, virtual datasets) and readers follow; sparse
matrices whose indices lie crash them. None of that gets past here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from store.errors import InputRefused

DEEPEST, MOST_OBJECTS, SHOWN = 64, 100_000, 10
LARGEST_ATTRIBUTE = 2**20
SLICE = 2**20
DEFLATE_LIMIT = 1100
"""No filter of HDF5 that honest files use makes data smaller than by this factor (deflate's limit is 1,032)."""


def check_hdf5(file: h5py.File, where: str, *, budget_bytes: int = 2**30) -> None:
    """Refuse a file that reaches outside itself, or whose matrices are not what their form promises.

    Links are looked at, never followed.

    Args:
        file: The file, open for reading.
        where: Its name in messages.
        budget_bytes: A dataset may be this large without being stored in full.

    Raises:
        InputRefused: All that is wrong, in one message.
    """
    found: list[str] = []
    groups = []
    for path, element in _walk(file, found):
        if isinstance(element, h5py.Dataset):
            found += _dataset_problems(path, element, budget_bytes)
        else:
            groups.append((path, element))
        found += _attribute_problems(path, element)
    if not found:
        for path, group in groups:
            found += matrix_problems(path, group)
    refuse(where, found)


def refuse(where: str, found: list[str]) -> None:
    """Refuse a file for what was found, if anything was.

    Raises:
        InputRefused: The first of it, and how much more there is.
    """
    if found:
        more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        raise InputRefused(f"{where}: {'; '.join(found[:SHOWN])}{more}")


def _walk(file: h5py.File, found: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield each object once, through hard links only; whatever else there is goes to ``found``."""
    waiting: list[tuple[str, Any, int]] = [("", file, 0)]
    seen = {h5py.h5o.get_info(file.id).addr}
    while waiting:
        path, group, depth = waiting.pop()
        yield path or "/", group
        if depth > DEEPEST or len(seen) > MOST_OBJECTS:
            found.append(f"{path}: more than {DEEPEST} levels or {MOST_OBJECTS:,} objects")
            return
        for name in group:
            here = f"{path}/{name}"
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                kind = "external link" if isinstance(link, h5py.ExternalLink) else "soft link"
                found.append(f"{here}: is a {kind}; a file must hold its data itself")
                continue
            element = group[name]
            address = h5py.h5o.get_info(element.id).addr
            if address in seen:
                found.append(f"{here}: stands under a second name; links in circles are refused")
                continue
            seen.add(address)
            if isinstance(element, h5py.Group):
                waiting.append((here, element, depth + 1))
            elif isinstance(element, h5py.Dataset):
                yield here, element


def _dataset_problems(path: str, element: h5py.Dataset, budget_bytes: int) -> list[str]:
    found = []
    creation = element.id.get_create_plist()
    if creation.get_external_count():
        found.append(f"{path}: its data lies in another file (external storage)")
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        found.append(f"{path}: is a virtual dataset, made of other files")
    if found:
        return found
    size = int(np.prod(element.shape, dtype=object)) * element.dtype.itemsize if element.shape else 0
    stored = element.id.get_storage_size()
    if size > budget_bytes and size > DEFLATE_LIMIT * max(stored, 1):
        found.append(f"{path}: claims {size:,} bytes (shape {element.shape}) and stores {stored:,}")
    if element.chunks and int(np.prod(element.chunks, dtype=object)) * element.dtype.itemsize > budget_bytes:
        found.append(f"{path}: has chunks of shape {element.chunks}, too large to read")
    if h5py.check_ref_dtype(element.dtype) is not None:
        found.append(f"{path}: holds references, which no reader of matrices needs")
    for number in range(creation.get_nfilters()):
        code = creation.get_filter(number)[0]
        if not h5py.h5z.filter_avail(code):
            found.append(f"{path}: is packed with filter {code}, which is not at hand; pack it with gzip")
    return found


def _attribute_problems(path: str, element: Any) -> list[str]:
    found = []
    for name in element.attrs:
        attribute = h5py.h5a.open(element.id, name.encode())
        size = int(np.prod(attribute.shape or (1,), dtype=object)) * attribute.dtype.itemsize
        if size > LARGEST_ATTRIBUTE:
            found.append(f"{path}: attribute {name!r} takes {size:,} bytes")
    return found


def matrix_problems(path: str, group: Any) -> list[str]:
    """Check a compressed sparse matrix, in HDF5 or zarr: of AnnData by its mark, of 10x by its members."""
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", ""))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    members = ("data", "indices", "indptr")
    lacking = [name for name in members if name not in group]
    if lacking:
        return [f"{path}: lacks {', '.join(lacking)}"] if kind in ("csr_matrix", "csc_matrix") else []
    if not all(getattr(group[name], "ndim", 0) == 1 for name in members):
        return [f"{path}: data, indices and indptr are not all one-dimensional"]
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    if shape is None and "shape" in group:
        shape = group["shape"][()]  # of 10x: features x barcodes, by column
        kind = kind or "csc"
    try:
        n_rows, n_columns = (int(size) for size in shape)
    except (TypeError, ValueError):
        return [f"{path}: its shape is {shape!r}, not two numbers"]
    major, minor = (n_rows, n_columns) if "csr" in kind else (n_columns, n_rows)
    return [f"{path}: {problem}" for problem in _compressed_problems(group, major, minor)]


def _compressed_problems(group: Any, major: int, minor: int) -> Iterator[str]:
    indptr, indices, data = group["indptr"], group["indices"], group["data"]
    for name, element in (("indptr", indptr), ("indices", indices)):
        if element.dtype.kind not in "iu":
            yield f"{name} holds {element.dtype}, not whole numbers"
            return
    if indptr.shape[0] != major + 1:
        yield f"indptr has {indptr.shape[0]:,} entries; {major:,} rows need {major + 1:,}"
        return
    if indices.shape != data.shape:
        yield f"data has {data.shape[0]:,} values and indices {indices.shape[0]:,}"
        return
    last, step = 0, _step(indptr)
    for start in range(0, major + 1, step):
        part = indptr[start : start + step].astype(np.int64)
        falls = part < np.concatenate([[last], part[:-1]])  # a difference of two may be beyond 64 bits
        if (start == 0 and part[0] != 0) or falls.any():
            yield f"indptr falls or does not begin at 0 (entry {start + int(np.argmax(falls)):,})"
            return
        last = int(part[-1])
    if last != indices.shape[0]:
        yield f"indptr ends at {last:,} and there are {indices.shape[0]:,} values"
        return
    step = _step(indices)
    for start in range(0, indices.shape[0], step):
        part = indices[start : start + step]
        wrong = (part < 0) | (part >= minor)
        if wrong.any():
            at = int(np.argmax(wrong))
            yield f"index {part[at]} (value {start + at:,}) lies outside 0 to {minor - 1:,}"
            return


def _step(element: Any) -> int:
    """Return how many values to look at a time: whole chunks, so that none is unpacked twice."""
    chunk = max(1, int(element.chunks[0])) if element.chunks else 1
    return chunk * max(1, SLICE // chunk)
