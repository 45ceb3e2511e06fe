"""This module looks at foreign zarr groups before anything reads them.

A chunk that is not there reads as its array's fill value, and writers leave out chunks that hold nothing else. So a
file that was lost on the way makes other counts and other labels without a word. What cannot have been left out is
refused here; of what may have been, people are told.
"""

from __future__ import annotations

import math
import posixpath
import re
import zipfile
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import fsspec
import numpy as np

from store.hdf5 import DEFLATE_LIMIT, SHOWN, matrix_problems, refuse

NODES = (".zarray", ".zgroup", "zarr.json")
UNREAD = {"obsp", "varp", "varm"}
"""What nothing of a lake is taken from; nor is anything from deep in uns."""
REMEDY = "copy it again, or write it with zarr's array.write_empty_chunks if nothing is lost"


@dataclass(frozen=True)
class Gap:
    """Chunks of an array that are not stored.

    Attributes:
        first: Name of the first of them.
        n_absent: How many there are.
        n_chunks: How many chunks the array has.
    """

    first: str
    n_absent: int
    n_chunks: int


def check_zarr(root: Any, stored: dict[str, int], where: str, *, budget_bytes: int = 2**30) -> list[str]:
    """Refuse a group that lacks chunks, or whose matrices are not what their form promises.

    Args:
        root: The group at the top of its store.
        stored: Name of each file of the store to its size in bytes (``stored_files``).
        where: What messages call it.
        budget_bytes: An array may be this large without being stored in full.

    Returns:
        What people should know: which chunks are not stored, and may have been left out.

    Raises:
        InputRefused: All that is wrong, in one message.
    """
    if not stored.keys() & set(NODES):
        refuse(where, ["its place does not list all that it holds, so nobody can say what is lost; copy it here first"])
    groups, arrays = _members(root, stored)
    names, found, gaps = sorted(stored), list[str](), dict[str, Gap]()
    for path, array in arrays.items():
        inside = names[bisect_left(names, f"{path}/") : bisect_left(names, f"{path}0")]  # 0 comes after /
        wrong = _size_problems(path, array, sum(stored[name] for name in inside), budget_bytes)
        found += wrong
        if not wrong and (gap := _gap(array, inside)):
            gaps[path] = gap
    found += [f"{path}: {_lost(gaps[path])}" for path in _needed(groups, arrays) if path in gaps]
    refuse(where, found)
    for path, group in groups.items():
        if f"{path}/indptr" in arrays or "encoding-type" in group.attrs:
            found += matrix_problems(path, group)
    doubtful = {path: gap for path, gap in gaps.items() if _is_doubtful(path, arrays)}
    for path, gap in doubtful.items():
        found += _code_problems(path, arrays, gap)
    refuse(where, found)
    return _note({path: gap for path, gap in doubtful.items() if not _is_alone(path, arrays)})


def stored_files(uri: str, archive: str = "") -> dict[str, int]:
    """Return the name of each file below an address, or in the zip at ``archive``, and its size in bytes."""
    if archive:
        with zipfile.ZipFile(archive) as zipped:
            return {info.filename: info.file_size for info in zipped.infolist() if not info.is_dir()}
    filesystem, path = fsspec.core.url_to_fs(uri)
    above = f"{path.rstrip('/')}/"
    found = filesystem.find(path, detail=True)
    # a server on the web may not tell a size: then nothing is too small
    sizes = {name: info.get("size") for name, info in found.items()}
    return {name.removeprefix(above): 2**40 if size is None else int(size) for name, size in sizes.items()}


def _members(root: Any, stored: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open the groups and arrays that may be read; what zarr does not know is none of them."""
    groups, arrays = dict[str, Any](), dict[str, Any]()
    for path in sorted({posixpath.dirname(name) for name in stored if posixpath.basename(name) in NODES}):
        if UNREAD & set(path.split("/")) or "uns" in path.split("/")[:-2]:
            continue
        try:
            element = root[path] if path else root
        except (KeyError, TypeError, ValueError):
            continue
        (arrays if hasattr(element, "shape") else groups)[path] = element
    return groups, arrays


def _size_problems(path: str, array: Any, stored: int, budget_bytes: int) -> list[str]:
    size = math.prod(array.shape) * array.dtype.itemsize
    if size > budget_bytes and size > DEFLATE_LIMIT * max(stored, 1):
        return [f"{path}: claims {size:,} bytes (shape {array.shape}) and stores {stored:,}"]
    if math.prod(array.chunks) * array.dtype.itemsize > budget_bytes and size > budget_bytes:
        return [f"{path}: has chunks of shape {array.chunks}, too large to read"]
    return []


def _gap(array: Any, inside: list[str]) -> Gap | None:
    """Compare the chunks that an array should have with the files below it."""
    encode, above = array.metadata.encode_chunk_key, len(array.path) + 1
    grid = [-(-size // max(1, chunk)) for size, chunk in zip(array.shape, array.shards or array.chunks, strict=True)]
    there = set()
    for name in inside:
        key = name[above:]
        place = tuple(int(number) for number in re.findall(r"\d+", key))[: array.ndim]
        if len(place) == array.ndim and encode(place) == key and all(map(int.__lt__, place, grid)):
            there.add(place)
    n_chunks = math.prod(grid)
    if len(there) == n_chunks:
        return None
    first = next(place for place in product(*map(range, grid)) if place not in there)
    return Gap(encode(first), n_chunks - len(there), n_chunks)


def _needed(groups: dict[str, Any], arrays: dict[str, Any]) -> Iterator[str]:
    """Name the arrays of which no writer leaves out a chunk, for none can hold fill values alone."""
    for path, group in groups.items():
        index = group.attrs.get("_index")
        yield from (name for name in (f"{path}/{index}", f"{path}/{index}/values") if name in arrays)
        if f"{path}/indptr" in arrays:
            yield from _needed_of_matrix(path, group, arrays)
    for path, array in arrays.items():
        *_, above, name = ["", *path.split("/")]
        distinct = name in ("categories", "protein_names") or name.endswith("_categories") or above == "__categories"
        if name in ("obs", "var", "raw.var") or (distinct and math.prod(array.shape) > 1):
            yield path


def _needed_of_matrix(path: str, group: Any, arrays: dict[str, Any]) -> Iterator[str]:
    """Name the arrays of a sparse matrix that hold more than zeros: all but of one without values or one column."""
    shape = tuple(group.attrs.get("shape", group.attrs.get("h5sparse_shape", ())))
    yield f"{path}/data"
    if f"{path}/data" in arrays and math.prod(arrays[f"{path}/data"].shape):
        yield f"{path}/indptr"
    kind = str(group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "")))
    if len(shape) != 2 or shape[0 if "csc" in kind else 1] != 1:
        yield f"{path}/indices"


def _lost(gap: Gap) -> str:
    return (
        f"chunk {gap.first} is not stored ({gap.n_absent:,} of {gap.n_chunks:,} are not), so its values would be read "
        f"as zero or empty; {REMEDY}"
    )


def _is_doubtful(path: str, arrays: dict[str, Any]) -> bool:
    """Say whether an array's values come into the lake, and may all be empty or not."""
    in_matrix = f"{posixpath.dirname(path)}/indptr" in arrays
    return arrays[path].ndim > 0 and "uns" not in path.split("/") and not in_matrix


def _categories(path: str, arrays: dict[str, Any]) -> Any:
    """Return what an array's values number, if they are codes; else nothing."""
    above, _, name = path.rpartition("/")
    return arrays.get(f"{above}/categories" if name == "codes" else f"{above}/__categories/{name}")


def _is_alone(path: str, arrays: dict[str, Any]) -> bool:
    """Say whether codes can be nothing but 0: there is one category."""
    categories = _categories(path, arrays)
    return categories is not None and categories.shape == (1,)


def _code_problems(path: str, arrays: dict[str, Any], gap: Gap) -> list[str]:
    """Refuse codes that lack a chunk where a category lacks cells: those may be what is lost."""
    categories = _categories(path, arrays)
    if categories is None or categories.ndim != 1:
        return []
    empty = sorted(set(range(categories.shape[0])) - _codes(arrays[path]))
    if not empty:
        return []
    name = str(categories[empty[0]])
    return [f"{path}: {_lost(gap)} (no cell has category {name!r}: was it lost, or is it to be removed?)"]


def _codes(array: Any) -> set[int]:
    step = max(1, int(array.chunks[0]))
    parts = (np.unique(array[start : start + step]) for start in range(0, array.shape[0], step))
    return {int(code) for part in parts for code in part}


def _note(told: dict[str, Gap]) -> list[str]:
    if not told:
        return []
    named = [f"{path} ({gap.n_absent:,} of {gap.n_chunks:,} chunks)" for path, gap in list(told.items())[:SHOWN]]
    more = f" and {len(told) - SHOWN:,} more" if len(told) > SHOWN else ""
    return [
        f"not stored, so read as zero or empty: {', '.join(named)}{more}; writers leave such chunks out, but a lost "
        "one looks the same"
    ]
