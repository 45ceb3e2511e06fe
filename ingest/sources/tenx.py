"""This module reads 10x feature-barcode matrices: .h5 of Cell Ranger 2 and 3, folders and archives with matrix.mtx."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from ingest.job import SourceSettings
from ingest.preflight import members, refuse_links_out
from ingest.sources.form import (
    Part,
    Rows,
    SourceDataset,
    chosen_columns,
    content_digest,
    dataset_name,
    feature_types_to_measurements,
    fingerprint,
    has_ending,
    read_names,
    read_obs_table,
    types_left_out,
)
from ingest.sources.h5ad import compressed_rows, open_group
from ingest.turn import Coordinates, downloaded, made_once, scratch_of, turned
from store.errors import InputRefused

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
ROLES = {
    "matrix": ("matrix.mtx.gz", "matrix.mtx"),
    "features": ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"),
    "barcodes": ("barcodes.tsv.gz", "barcodes.tsv"),
    "metadata": ("metadata.tsv", "metadata.tsv.gz"),
}


def names(source: SourceSettings) -> list[str]:
    """A matrix is one dataset."""
    return [dataset_name(source)]


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a matrix; its features go to RNA, protein, ATAC and guide by their type.

    A ``metadata.tsv`` in a folder, whose first column names the cells, becomes obs.

    Raises:
        InputRefused: Not a 10x matrix, or one of several genomes is wanted.
    """
    if has_ending(source.uri, ".h5"):
        features, barcodes, rows = _open_h5(source)
        obs, notes = pd.DataFrame(index=pd.Index(barcodes)), list[str]()
    else:
        features, obs, rows, notes = _open_folder(source)
    parts = split_features(features, rows)
    if not parts:
        raise InputRefused(
            f"{source.uri}: none of its feature types is known: {sorted(set(features['feature_types']))}"
        )
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: obs,
        n_obs=len(obs),
        parts=parts,
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
        notes=(*types_left_out(features["feature_types"]), *notes),
    )


def split_features(features: pd.DataFrame, rows: Rows) -> dict[str, Part]:
    """Split a matrix by the types of its features."""
    split = feature_types_to_measurements(features["feature_types"])
    return {
        measurement: Part(features.iloc[columns], chosen_columns(rows, columns, len(features)))
        for measurement, columns in split.items()
    }


def _features(ids: list[str], symbols: list[str], types: list[str] | None) -> pd.DataFrame:
    kinds = types if types is not None else ["Gene Expression"] * len(ids)
    return pd.DataFrame({"gene_symbols": symbols, "feature_types": kinds}, index=pd.Index(ids, name="gene_ids"))


def _open_h5(source: SourceSettings) -> tuple[pd.DataFrame, list[str], Rows]:
    file = open_group(source.uri)
    if "matrix" in file:
        group = file["matrix"]
        table = group["features"]
        symbols = _texts(table["name"]) if "name" in table else _texts(table["id"])
        ids = _texts(table["id"]) if "id" in table else symbols
        types = _texts(table["feature_type"]) if "feature_type" in table else None
        features = _features(ids, symbols, types)
    else:
        genomes = [key for key in file if hasattr(file[key], "keys") and "indptr" in file[key]]
        if not genomes:
            raise InputRefused(f"{source.uri}: not a readable 10x matrix: it has neither 'matrix' nor a genome's group")
        if source.genome not in genomes and (source.genome or len(genomes) > 1):
            raise InputRefused(f"{source.uri}: holds genomes {', '.join(genomes)}; choose one with genome=NAME")
        group = file[source.genome or genomes[0]]
        features = _features(_texts(group["genes"]), _texts(group["gene_names"]), None)
    # features x barcodes by column is barcodes x features by row
    return features, _texts(group["barcodes"]), compressed_rows(group, len(features))


def _texts(element: Any) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in element[:]]


def _open_folder(source: SourceSettings) -> tuple[pd.DataFrame, pd.DataFrame, Rows, list[str]]:
    paths = _archive(source.uri) if has_ending(source.uri, *ARCHIVES) else _folder(source.uri)
    missing = [role for role in ("matrix", "features", "barcodes") if role not in paths]
    if missing:
        raise InputRefused(
            f"{source.uri}: not a 10x matrix: lacks {', '.join(ROLES[role][-1] for role in missing)} (.gz or not)"
        )
    table = pd.read_csv(
        _open(paths["features"]), sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
    )
    if table.shape[1] == 1:
        table[1] = table[0]
    types = table[2].tolist() if table.shape[1] > 2 else None
    features = _features(table[0].tolist(), table[1].tolist(), types)
    barcodes = read_names(_open(paths["barcodes"]))
    obs, notes = pd.DataFrame(index=pd.Index(barcodes)), list[str]()
    if "metadata" in paths:
        obs, notes = read_obs_table(_open(paths["metadata"]), f"{source.uri}: metadata.tsv", obs.index)
    shape = (len(barcodes), len(features))
    rows = turned(
        [source.uri, fingerprint(source.uri)], shape, lambda: _coordinates(paths["matrix"], shape, source.uri)
    )
    return features, obs, rows, notes


def _folder(uri: str) -> dict[str, str]:
    filesystem, path = fsspec.core.url_to_fs(uri)
    there = {name.rsplit("/", 1)[-1]: name for name in filesystem.ls(path, detail=False)}
    found = {}
    for role, known in ROLES.items():
        name = next((name for name in known if name in there), None)
        if name:
            refuse_links_out(uri, [there[name]])
            found[role] = filesystem.unstrip_protocol(there[name])
    return found


def _archive(uri: str) -> dict[str, str]:
    """Unpack an archive's regular members, once on this machine."""
    folder = scratch_of(uri, fingerprint(uri), "archive")
    found = folder / "found.json"
    made_once(folder, lambda: found.write_text(json.dumps(_unpacked(uri, folder / "members")), encoding="utf-8"))
    return dict(json.loads(found.read_text(encoding="utf-8")))


def _unpacked(uri: str, folder: Path) -> dict[str, str]:
    folder.mkdir()
    found: dict[str, str] = {}
    for member, placed in members(downloaded(uri), folder):
        for role, known in ROLES.items():
            if member.rsplit("/", 1)[-1] in known:
                if role in found:
                    raise InputRefused(f"{uri}: holds several matrices ({member} is the second); unpack it first")
                found[role] = str(placed)
    return found


def _open(uri: str) -> BinaryIO:
    opened = fsspec.open(uri, "rb").open()
    return gzip.open(opened) if has_ending(uri, ".gz") else opened  # type: ignore[return-value]


def _coordinates(uri: str, shape: tuple[int, int], where: str) -> Iterator[Coordinates]:
    """Read a MatrixMarket text of features x barcodes, part by part."""
    with _open(uri) as file:
        head = file.readline().decode(errors="replace").lower()
        if not head.startswith("%%matrixmarket matrix coordinate"):
            raise InputRefused(f"{where}: matrix.mtx does not begin with '%%MatrixMarket matrix coordinate'")
        symmetry = (head.split()[4:5] or ["general"])[0]
        if symmetry not in ("general", "symmetric"):
            raise InputRefused(f"{where}: matrix.mtx says that it is {symmetry}; write all of its values, as 'general'")
        line = file.readline()
        while line.startswith(b"%"):
            line = file.readline()
        n_features, n_cells, nnz = (int(size) for size in line.split())
        if (n_cells, n_features) != shape:
            raise InputRefused(
                f"{where}: matrix.mtx is {n_features} x {n_cells} beside {shape[1]} features and {shape[0]} barcodes"
            )
        types = {"row": pa.int64(), "column": pa.int64(), "value": pa.float64()}
        if head.split()[3:4] == ["pattern"]:  # ones alone, which are not written
            del types["value"]
        read = 0
        try:
            batches = pyarrow.csv.open_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(column_names=list(types), block_size=2**23, use_threads=False),
                parse_options=pyarrow.csv.ParseOptions(delimiter=" "),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types),
            )
            for batch in batches:
                read += batch.num_rows
                columns, rows, *given = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
                values = given[0] if given else np.ones(len(rows))
                yield rows - 1, columns - 1, values
                if symmetry == "symmetric":  # the other half is not written
                    mirrored = rows != columns
                    yield columns[mirrored] - 1, rows[mirrored] - 1, values[mirrored]
        except pa.ArrowInvalid as error:
            if nnz == 0 and "Empty" in str(error):
                return
            said = str(error).splitlines()[0].removeprefix("CSV parse error: ")
            raise InputRefused(
                f"{where}: matrix.mtx: not all lines are {len(types)} numbers with one blank between them: {said}"
            ) from error
        if read != nnz:
            raise InputRefused(f"{where}: matrix.mtx promises {nnz:,} values and holds {read:,}; is it torn?")
