"""This module reads bodies that are forms with an h5ad file: its counts, and a message that asks about its cells.

A form (``multipart/form-data``) has the part ``file``, an h5ad of AnnData, ``request``, the message without its counts
as JSON (left out: an empty one), and where need be ``layer``, which names the matrix that holds the counts.

Foreign files crash readers and claim what they are not: :func:`read` runs in a process of its own (``serve.foreign``).

Shape letters used in this module:
    C  cells      G  features of the file      N  stored counts
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import FieldRefused
from serve.npz import LONGEST_NAME, OTHERS
from serve.settings import Limits
from store.hdf5 import check_hdf5

if TYPE_CHECKING:  # slow, and what reads streams only needs none
    import pandas as pd
    import scipy.sparse

FORM = "multipart/form-data"
PARTS = ("file", "request", "layer")
MOST_HEADER_BYTES = 2**12
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}")
ID_COLUMNS = ("feature_id", "gene_ids", "gene_id", "ensembl_id", "ensembl_gene_id")
"""Columns of var in which ids stand by custom, where they are not its index."""
MEASUREMENT_OF = {"gene expression": "RNA", "antibody capture": "protein", "peaks": "ATAC"}
"""10x's types of features, in ``var["feature_types"]``."""
PLACES = ("layers/counts", "layers/raw_counts", "raw/X", "X")
"""Where raw counts lie, whichever way a file comes: what is called so first."""
SEEN = 2**20
"""Values by which a matrix is judged to hold whole numbers."""
SLAB = 2**22


def read(kind: str, body: bytes, limits: Limits) -> tuple[bytes, dict[str, NDArray[Any]], str]:
    """Return the message of a request, as JSON, the arrays that an npz would have, and which matrix they come from.

    Args:
        kind: The request's Content-Type, with the boundary.
        body: The form.
        limits: What a request may hold.

    Raises:
        FieldRefused: The form or the file in it cannot be used.
        InputRefused: The file reaches outside itself, or lies.
    """
    parts = read_form(kind, body)
    if "file" not in parts:
        raise FieldRefused("file", "is missing; send an h5ad file in a part of this name")
    layer = parts.get("layer", b"").decode("utf-8", "replace")
    arrays, chosen = _read_file(parts["file"], layer, limits)
    return parts.get("request", b"{}"), arrays, chosen


def read_form(kind: str, body: bytes) -> dict[str, bytes]:
    """Return the parts of a form by their names.

    Raises:
        FieldRefused: It is damaged, or has parts that are not asked for.
    """
    boundary = parse_options_header(kind)[1].get(b"boundary", b"")
    parts: dict[str, bytes] = {}
    pieces: list[bytes] = []
    header: dict[str, bytes] = {"field": b"", "value": b"", "said": b""}

    def hear(which: str, data: bytes, start: int, end: int) -> None:
        header[which] += data[start:end]

    def end_header() -> None:
        if header["field"].lower() == b"content-disposition":
            header["said"] = header["value"]
        header.update(field=b"", value=b"")

    def end_part() -> None:
        name = parse_options_header(header["said"])[1].get(b"name", b"").decode("utf-8", "replace")
        if name not in PARTS or name in parts:
            raise FieldRefused("body", f"part {name[:80]!r}: send each of {', '.join(PARTS)} once, and no other")
        parts[name] = b"".join(pieces)
        pieces.clear()
        header["said"] = b""

    parser = MultipartParser(
        boundary,
        {
            "on_header_field": lambda data, start, end: hear("field", data, start, end),
            "on_header_value": lambda data, start, end: hear("value", data, start, end),
            "on_header_end": end_header,
            "on_part_data": lambda data, start, end: pieces.append(data[start:end]),
            "on_part_end": end_part,
        },
        max_header_size=MOST_HEADER_BYTES,
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise FieldRefused("body", f"no form: {str(error)[:200]}") from None
    return parts


def _read_file(content: bytes, layer: str, limits: Limits) -> tuple[dict[str, NDArray[Any]], str]:
    import h5py

    try:
        file = h5py.File(io.BytesIO(content), "r")
    except OSError:
        raise FieldRefused("file", "not a readable HDF5 file; send an h5ad as AnnData writes it") from None
    with file:
        check_hdf5(file, "file", budget_bytes=limits.unpacked_bytes)
        if "mod" in file:
            raise FieldRefused("file", "is MuData; send each modality as arrays, as serve.client does, or one as h5ad")
        key = _key(layer)
        if layer and key not in file:
            raise FieldRefused("file", f"has no matrix {key}; it has {_known(file)}: name one in the part 'layer'")
        found = (_matrix(file[key], key, limits, named=True), key) if layer else find_counts(file, limits)
        if found is None:
            wanted, there = ", ".join(places(file)), _known(file)
            raise FieldRefused("file", f"no whole numbers in {wanted}; it has {there}: name one in the part 'layer'")
        counts_CG, key = found
        return by_measurement(counts_CG, read_features(file, key, limits)), key


def _key(layer: str) -> str:
    """Return where the matrix lies that is named so, by its own name or as errors list it."""
    return {"X": "X", "raw": "raw/X", "raw/X": "raw/X"}.get(layer, f"layers/{layer.removeprefix('layers/')}")


def places(file: Any) -> tuple[str, ...]:
    """Return where raw counts may lie, likeliest first; a file of CELLxGENE Discover has them in raw, else in X."""
    return PLACES[-2:] if "uns/schema_version" in file else PLACES


def find_counts(file: Any, limits: Limits) -> tuple[scipy.sparse.csr_matrix, str] | None:
    """Return the first matrix of whole numbers of a file that was checked, and where it lies; None where none is."""
    for key in places(file):
        if key in file:
            counts_CG = _matrix(file[key], key, limits, named=False)
            if _whole(counts_CG.data):
                return counts_CG, key
    return None


def _known(file: Any) -> str:
    layers = [f"layers/{name}" for name in file["layers"]] if "layers" in file else []
    return ", ".join([*(key for key in ("X", "raw/X") if key in file), *layers][:10]) or "none"


def _whole(data_N: NDArray[Any]) -> bool:
    some = data_N[:: max(1, len(data_N) // SEEN)]
    return bool(np.all(np.isfinite(some) & (some >= 0) & (some == np.floor(some))))


def _matrix(element: Any, key: str, limits: Limits, *, named: bool) -> scipy.sparse.csr_matrix:
    """Read a matrix; its size is compared with the limits before anything is allocated for it.

    A table that somebody named and whose values are no counts may be one of levels: its zeros are values then.
    """
    import scipy.sparse

    if hasattr(element, "keys"):
        form = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "")))
        shape = tuple(int(size) for size in element.attrs.get("shape", element.attrs.get("h5sparse_shape", ())))
        if not {"data", "indices", "indptr"} <= set(element) or not form.startswith(("csr", "csc")) or len(shape) != 2:
            raise FieldRefused("file", f"{key}: unknown form of matrix {form[:80]!r}; csr, csc and dense are known")
        stored = int(element["data"].shape[0])
    else:
        form, shape, stored = "dense", element.shape, 0
        if len(shape) != 2 or element.dtype.kind not in "iufb":
            raise FieldRefused("file", f"{key}: is not a matrix of numbers")
        if shape[0] * shape[1] * element.dtype.itemsize > limits.unpacked_bytes:
            raise FieldRefused("file", f"{key}: takes more than {limits.unpacked_bytes:,} bytes; store it sparse (csr)")
    if shape[0] > limits.cells or shape[1] > limits.features or stored > limits.nonzeros:
        raise FieldRefused(
            "file",
            f"{key}: {shape[0]:,} cells, {shape[1]:,} features, {stored:,} counts; send at most {limits.cells:,}, "
            f"{limits.features:,} and {limits.nonzeros:,}",
        )
    if form == "dense":
        return _of_dense(element, key, limits, maybe_levels=named)
    parts = (element["data"][()], element["indices"][()], element["indptr"][()])
    kind = scipy.sparse.csr_matrix if form.startswith("csr") else scipy.sparse.csc_matrix
    if parts[0].dtype.kind not in "iufb":
        raise FieldRefused("file", f"{key}: holds {parts[0].dtype}, not numbers")
    return scipy.sparse.csr_matrix(kind((storable(parts[0]), *parts[1:]), shape=shape))


def storable(values: Any) -> Any:
    """Return numbers, a table or a sparse matrix, as libraries can store them sparse: halves are float32 then."""
    kind = np.dtype(np.float32) if values.dtype == np.float16 else values.dtype.newbyteorder("=")
    return values if values.dtype == kind else values.astype(kind)


def _of_dense(element: Any, key: str, limits: Limits, *, maybe_levels: bool) -> scipy.sparse.csr_matrix:
    import scipy.sparse

    step = max(1, SLAB // max(1, element.shape[1]))
    starts = range(0, element.shape[0], step)
    levels = maybe_levels and not all(_whole(element[start : start + step].ravel()) for start in starts)
    slabs, stored = [], 0
    for start in starts:
        table = storable(element[start : start + step])
        slabs.append(_all_of(table) if levels else scipy.sparse.csr_matrix(table))
        stored += slabs[-1].nnz
        if stored > limits.nonzeros:
            raise FieldRefused("file", f"{key}: more than {limits.nonzeros:,} counts; send fewer cells at a time")
    return scipy.sparse.csr_matrix(scipy.sparse.vstack(slabs) if slabs else element.shape)


def _all_of(table: NDArray[Any]) -> scipy.sparse.csr_matrix:
    """Store all values of a table, zeros too."""
    import scipy.sparse

    n_rows, n_columns = table.shape
    columns = np.tile(np.arange(n_columns), n_rows)
    return scipy.sparse.csr_matrix((table.ravel(), columns, np.arange(n_rows + 1) * n_columns), shape=table.shape)


def read_features(file: Any, key: str, limits: Limits) -> pd.DataFrame:
    """Read the table of features that belongs to a matrix, only what is needed of it."""
    import pandas as pd
    from anndata.io import read_elem

    where = "raw/var" if key == "raw/X" else "var"
    table = file.get(where)
    if not hasattr(table, "keys"):
        raise FieldRefused("file", f"has no {where} as AnnData 0.7 and later write it; write the file anew")
    index = table.attrs.get("_index", "_index")
    wanted = ["index", *ID_COLUMNS, "feature_types"]
    found = {}
    for name in wanted:
        column = index if name == "index" else name
        if column not in table:
            continue
        element = table[column]
        codes = element.get("codes") if hasattr(element, "keys") else element
        if len(getattr(codes, "shape", None) or ()) != 1 or codes.shape[0] > limits.features:
            continue
        found[name] = pd.Series(np.asarray(read_elem(element), dtype=object)).astype(str)
    if "index" not in found:
        raise FieldRefused("file", f"{where} has no index of at most {limits.features:,} names")
    size = len(found["index"])
    return pd.DataFrame({name: column for name, column in found.items() if len(column) == size})


def by_measurement(counts_CG: scipy.sparse.csr_matrix, table: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """Return counts as arrays of a request, split into measurements where the table of features names 10x's types."""
    if len(table) != counts_CG.shape[1]:
        raise FieldRefused("file", f"var has {len(table):,} features and the matrix {counts_CG.shape[1]:,} columns")
    kinds = split_by_type(table["feature_types"]) if "feature_types" in table else {}
    kinds = kinds or {"RNA": np.arange(len(table))}
    arrays: dict[str, NDArray[Any]] = {}
    for name, columns in kinds.items():
        names, *others = _names(table.iloc[columns])
        part = counts_CG if len(columns) == counts_CG.shape[1] else counts_CG[:, columns]
        arrays |= {
            f"{name}/features": _encoded(names),
            **({f"{name}/{OTHERS}": _encoded([one for column in others for one in column])} if others else {}),
            f"{name}/indptr": part.indptr.astype(np.int64),
            f"{name}/indices": part.indices.astype(np.int64),
            f"{name}/data": part.data.astype(np.float32 if part.dtype.kind in "fb" else np.int64),
        }
    return arrays


def split_by_type(types: Iterable[object]) -> dict[str, NDArray[np.int64]]:
    """Split features by 10x's types: measurement to positions; types that measure nothing here are in none."""
    said = [MEASUREMENT_OF.get(str(kind).lower(), "") for kind in types]
    split = {name: np.flatnonzero([one == name for one in said]) for name in MEASUREMENT_OF.values()}
    return {name: columns for name, columns in split.items() if len(columns)}


def _encoded(names: list[str]) -> NDArray[np.bytes_]:
    return np.array([one.encode() for one in names])


def _names(table: pd.DataFrame) -> list[list[str]]:
    """Return the names of features in each column that has some, Ensembl ids first; the model says which are taken."""
    order = [name for name in ("feature_id", "index", *ID_COLUMNS) if name in table]
    columns = [list(table[name]) for name in dict.fromkeys(order)]
    short = [names for names in columns if names and max(len(name.encode()) for name in names) <= LONGEST_NAME]
    if not short:
        raise FieldRefused("file", f"var must have features, with names of at most {LONGEST_NAME} bytes")
    short.sort(key=lambda names: not _ids(names))
    return [names for position, names in enumerate(short) if names not in short[:position]]


def _ids(names: list[str]) -> bool:
    """Say whether most names are Ensembl ids."""
    return sum(ENSEMBL.match(name) is not None for name in names) >= 0.5 * len(names)
