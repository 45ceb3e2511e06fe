"""Folders that somebody else made name no files outside themselves: links out of them are refused, and not followed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from ingest.dataset import OpenDataset
from ingest.job import SourceSettings
from store.errors import InputRefused


def zarr_folder(folder: Path) -> Path:
    obs = pd.DataFrame({"age": [1.0, 2, 3]}, index=["A", "B", "C"])
    var = pd.DataFrame(index=["ENSG00000000001", "ENSG00000000002"])
    data = anndata.AnnData(np.ones((3, 2), np.float32), obs, var)
    with warnings.catch_warnings(action="ignore"):
        data.write_zarr(folder.with_suffix(".zarr"))
    return folder.with_suffix(".zarr")


def mtx_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n2 3 1\n1 1 5\n")
    (folder / "features.tsv").write_text("ENSG00000000001\ta\nENSG00000000002\tb\n")
    (folder / "barcodes.tsv").write_text("A\nB\nC\n")
    (folder / "metadata.tsv").write_text("cell\tdonor_id\nA\td1\nB\td2\nC\td3\n")
    return folder


def visium_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "spatial").mkdir()
    (folder / "spatial/tissue_positions_list.csv").write_text("".join(f"{code},1,0,0,5,6\n" for code in "ABC"))
    (folder / "spatial/scalefactors_json.json").write_text("{}")
    mtx_folder(folder / "filtered_feature_bc_matrix")
    return folder


def study(folder: Path) -> Path:
    folder.mkdir()
    (folder / "i_x.txt").touch()
    (folder / "a_x.txt").write_text("Sample Name\tMetabolite Assignment File\nA\tm_x.tsv\n")
    (folder / "s_x.txt").write_text("Sample Name\tCharacteristics[age]\nA\t5\n")
    (folder / "m_x.tsv").write_text("database_identifier\tmetabolite_identification\tA\nCHEBI:1\tx\t1.5\n")
    return folder


FOLDERS = {
    zarr_folder: ("obs/age/.zarray", "obs/age/0", "obs/age", "X"),
    mtx_folder: ("matrix.mtx", "features.tsv", "barcodes.tsv", "metadata.tsv"),
    visium_folder: (
        "spatial",
        "spatial/tissue_positions_list.csv",
        "spatial/scalefactors_json.json",
        "filtered_feature_bc_matrix",
        "filtered_feature_bc_matrix/barcodes.tsv",
    ),
    study: ("a_x.txt", "s_x.txt", "m_x.tsv"),
}


def taken(path: Path) -> None:
    kind = "zarr" if path.suffix == ".zarr" else None
    OpenDataset(SourceSettings(uri=str(path), kind=kind), "x-x").inspect()


@pytest.mark.parametrize(("made", "place"), [(made, place) for made, places in FOLDERS.items() for place in places])
def test_a_link_out_of_a_folder_is_refused_even_to_what_would_do(tmp_path: Path, made: object, place: str) -> None:
    folder = made(tmp_path / "theirs")  # type: ignore[operator]
    taken(folder)
    mine = tmp_path / "mine"
    (folder / place).rename(mine)
    for target in (str(mine), os.path.relpath(mine, (folder / place).parent)):
        (folder / place).unlink(missing_ok=True)
        (folder / place).symlink_to(target)
        with pytest.raises(InputRefused, match=f"{folder}/{place}.*: is a link out of .*put the file itself there"):
            taken(folder)


@pytest.mark.parametrize(("made", "place"), [(made, places[1]) for made, places in FOLDERS.items()])
def test_links_to_a_folder_and_within_it_are_followed(tmp_path: Path, made: object, place: str) -> None:
    folder = made(tmp_path / "theirs")  # type: ignore[operator]
    (folder / place).rename(folder / "elsewhere")
    (folder / place).symlink_to(folder / "elsewhere")
    reached = tmp_path / f"reached{folder.suffix}"
    reached.symlink_to(folder)
    taken(folder)
    taken(reached)
