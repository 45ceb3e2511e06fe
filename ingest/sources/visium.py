"""This module reads Visium and Visium HD folders as Space Ranger leaves them: counts, positions, scale factors.

For Visium HD name the folder of one bin size (``binned_outputs/square_008um``). Images are not copied: the side table
``spatial`` says where they are and how their pixels scale.
"""

from __future__ import annotations

import json
from typing import Any

import fsspec
import pandas as pd

from ingest.job import SourceSettings
from ingest.preflight import refuse_links_out
from ingest.sources import tenx
from ingest.sources.form import SourceDataset, content_digest
from store.errors import InputRefused

COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
SCALES = "scalefactors_json.json"
MATRICES = ("filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5", "filtered_feature_bc_matrix")


def open_dataset(source: SourceSettings, name: str) -> SourceDataset:
    """Open a folder; ``x`` and ``y`` of obs are full-resolution pixels, ``sample_id`` is the dataset's name.

    Raises:
        InputRefused: The folder lacks its counts or positions, or they name different spots.
    """
    filesystem, path = fsspec.core.url_to_fs(source.uri)
    there = {item.rstrip("/").rsplit("/", 1)[-1]: item for item in filesystem.ls(path, detail=False)}
    matrix = next((there[item] for item in MATRICES if item in there), None)
    if matrix is None:
        raise InputRefused(f"{source.uri}: has none of {', '.join(MATRICES)}")
    spatial = {item.rsplit("/", 1)[-1]: item for item in filesystem.ls(f"{path.rstrip('/')}/spatial", detail=False)}
    refuse_links_out(source.uri, [matrix, *(spatial[item] for item in (*POSITIONS, SCALES) if item in spatial)])
    counts = tenx.open_dataset(source.model_copy(update={"uri": filesystem.unstrip_protocol(matrix)}), name)
    places = _positions(filesystem, spatial, source.uri)
    missing = counts.obs.index.difference(places.index)
    if len(missing):
        raise InputRefused(f"{source.uri}: {len(missing):,} spots have no position, such as {missing[0]!r}")
    obs = counts.obs.join(places)
    obs["x"], obs["y"] = obs["pxl_col_in_fullres"].astype(float), obs["pxl_row_in_fullres"].astype(float)
    obs["sample_id"] = name
    return SourceDataset(
        dataset_id=name,
        organism=source.organism,
        read_obs=lambda: obs,
        n_obs=len(obs),
        parts=counts.parts,
        content=lambda: content_digest(source.uri),
        info={"dataset_title": source.title},
        notes=counts.notes,
        sides={"spatial": lambda: _scales(filesystem, spatial)},
    )


def _positions(filesystem: Any, spatial: dict[str, str], where: str) -> pd.DataFrame:
    name = next((item for item in POSITIONS if item in spatial), None)
    if name is None:
        raise InputRefused(f"{where}: spatial/ has none of {', '.join(POSITIONS)}")
    with filesystem.open(spatial[name], "rb") as file:
        if name.endswith(".parquet"):
            table = pd.read_parquet(file)
        else:
            # Space Ranger 1 wrote no header
            table = pd.read_csv(file, header=None if "list" in name else 0)
    if table.shape[1] != len(COLUMNS):
        raise InputRefused(f"{where}: {name} has {table.shape[1]} columns, not {len(COLUMNS)}")
    table.columns = pd.Index(COLUMNS)
    table["barcode"] = table["barcode"].astype(str)
    return table.set_index("barcode")


def _scales(filesystem: Any, spatial: dict[str, str]) -> pd.DataFrame:
    rows: list[tuple[str, str]] = []
    if SCALES in spatial:
        with filesystem.open(spatial[SCALES], "rb") as file:
            rows += [(key, str(value)) for key, value in json.load(file).items()]
    images = (".png", ".tif", ".tiff", ".jpg")
    rows += [(name, filesystem.unstrip_protocol(at)) for name, at in sorted(spatial.items()) if name.endswith(images)]
    return pd.DataFrame(rows, columns=["name", "value"])
