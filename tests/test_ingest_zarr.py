"""Zarr groups: what lacks a chunk or lies about its matrices is refused, and what writers leave out is not."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import fsspec
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr

from ingest.dataset import OpenDataset
from ingest.harmonize import map_plain
from ingest.job import SourceSettings
from ingest.sandbox import Reader
from ingest.sources.h5ad import open_group
from store.errors import InputRefused

pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")  # of what is not in the standard
FORMATS = ("2", "3", "3 sharded")
CELLS, GENES = 64, 30
COUNTS = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(1, (CELLS, GENES)).astype(np.float32))


def named() -> anndata.AnnData:
    """Cells of three donors in turn, with a count in nearly every other gene."""
    obs = pd.DataFrame(
        {"donor_id": pd.Categorical([f"d{cell % 3}" for cell in range(CELLS)])},
        index=[f"c{cell}" for cell in range(CELLS)],
    )
    return anndata.AnnData(COUNTS.copy(), obs, pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(GENES)]))


def empty_in_part() -> anndata.AnnData:
    """What writers store nothing of: columns that are empty, false or 0, one category, tables and layers of zeros."""
    made = named()
    made.obs["one"] = pd.Categorical(["only"] * CELLS)
    made.obs["blank"] = ""
    made.obs["zero"] = 0.0
    made.obs["false"] = False
    made.obs["none"] = pd.array([None] * CELLS, dtype="Int64")
    made.obs["group"] = pd.Categorical([0] * CELLS)
    made.layers["zeros"] = np.zeros((CELLS, GENES), np.float32)
    made.layers["nothing"] = scipy.sparse.csr_matrix((CELLS, GENES), dtype=np.float32)
    made.layers["by_gene"] = COUNTS.tocsc()
    made.obsm["one_column"] = scipy.sparse.csr_matrix(np.ones((CELLS, 1), np.float32))
    made.obsm["X_zeros"] = np.zeros((CELLS, 2))
    made.obsp["same"] = scipy.sparse.csr_matrix((np.zeros(CELLS), (range(CELLS), [0] * CELLS)), shape=(CELLS, CELLS))
    made.uns["nothing"] = np.zeros(9)
    return made


def written(data: anndata.AnnData, path: Path, zarr_format: str) -> Path:
    """Write as anndata does by itself; ``NAME.zarr.zip`` is packed."""
    folder = path.with_name(path.name.removesuffix(".zip"))
    sharded = zarr_format == "3 sharded"
    with (
        anndata.settings.override(zarr_write_format=int(zarr_format[0]), auto_shard_zarr_v3=sharded),
        warnings.catch_warnings(action="ignore"),
    ):
        data.write_zarr(folder)
    if path != folder:
        shutil.make_archive(str(folder), "zip", folder)
    return path


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is empty in part, in each format."""
    return written(empty_in_part(), tmp_path_factory.mktemp("whole") / "a.zarr", request.param)


def chunk(folder: Path, array: str) -> Path:
    """The first chunk of an array, of either format."""
    files = (path for path in sorted((folder / array).rglob("*")) if path.is_file())
    return next(path for path in files if path.name not in (".zarray", ".zattrs", "zarr.json"))


def opened(path: Path | str) -> OpenDataset:
    return OpenDataset(SourceSettings(uri=str(path)), "x")


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
def test_what_anndata_leaves_out_is_not_missed_but_told(tmp_path: Path, zarr_format: str, name: str) -> None:
    path = written(empty_in_part(), tmp_path / name, zarr_format)
    dataset = opened(path)
    found = dataset.inspect()
    assert not found.problems
    assert (dataset.block("RNA", 0, CELLS) != COUNTS).nnz == 0
    (told,) = [note for note in found.notes if note.startswith("not stored")]
    assert "obs/zero (1 of 1 chunks)" in told
    assert "obs/one/" not in told, "they can be nothing else"
    assert not re.search("uns|obsp|one_column|nothing", told)
    assert not opened(written(named(), tmp_path / f"b{name[1:]}", zarr_format)).inspect().notes


def rewritten(path: Path, key: str, value: object, **kept: object) -> None:
    with warnings.catch_warnings(action="ignore"):
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        anndata.io.write_elem(group, key, value, dataset_kwargs=kept)


def notes_of(path: Path | str) -> list[str]:
    notes = list[str]()
    open_group(str(path), notes)
    return notes


def test_shards_may_lack_chunks_and_are_missed_themselves(tmp_path: Path) -> None:
    path = written(named(), tmp_path / "a.zarr", "3")
    dense = COUNTS.toarray()
    dense[:20] = 0
    rewritten(path, "layers/dense", dense, chunks=(4, 10), shards=(16, 30))
    assert (open_group(str(path))["layers/dense"][:] == dense).all()
    assert "layers/dense (1 of 4 chunks)" in notes_of(path)[0], "rows 0 to 15 are all 0"
    dense[0, 0] = 1
    rewritten(path, "layers/dense", dense, chunks=(4, 10), shards=(16, 30))
    assert notes_of(path) == []


@pytest.mark.parametrize(
    "array",
    [
        "X/data",
        "X/indices",
        "X/indptr",
        "obs/_index",
        "var/_index",
        "obs/donor_id/codes",
        "obs/donor_id/categories",
        "layers/by_gene/indices",
    ],
)
def test_a_lost_chunk_is_refused_by_name(tmp_path: Path, whole: Path, array: str) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    lost = chunk(path, array)
    lost.unlink()
    (lost.parent / ".DS_Store").touch()
    shutil.make_archive(str(path), "zip", path)
    said = rf"{array}: chunk (c/)?0 is not stored \(1 of 1 are not\)"
    for uri in (path, f"{path}.zip"):
        with pytest.raises(InputRefused, match=said):
            opened(uri)


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_chunks_that_may_be_lost_or_empty_are_told_with_their_number(tmp_path: Path, zarr_format: str) -> None:
    data = named()
    data.X = COUNTS.toarray()
    path = written(data, tmp_path / "a.zarr", zarr_format)
    rewritten(path, "X", data.X, chunks=(16, 10))
    rewritten(path, "obs", data.obs, chunks=(16,))
    assert notes_of(path) == []
    chunk(path, "X").unlink()
    chunk(path, "obs/donor_id/codes").unlink()
    assert "X (1 of 12 chunks), obs/donor_id/codes (1 of 4 chunks); writers leave such chunks" in notes_of(path)[0]


def change(array: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        group = zarr.open_group(path, mode="r+", use_consolidated=False)
        values = group[array][:]
        change(values)
        group[array][:] = values

    return made


def put(index: int, value: int) -> Callable[[Any], None]:
    return lambda values: values.__setitem__(index, value)


def claims(array: str, shape: list[int]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        (file,) = (file for file in ((path / array / ".zarray"), (path / array / "zarr.json")) if file.exists())
        file.write_text(json.dumps({**json.loads(file.read_text()), "shape": shape}))

    return made


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change("X/indices", put(3, -5)), r"X: index -5 \(value 3\) lies outside 0 to 29"),
        (change("X/indices", put(3, 10_000)), r"X: index 10000 \(value 3\) lies outside 0 to 29"),
        (change("X/indptr", put(0, 7)), "X: indptr falls or does not begin at 0"),
        (change("X/indptr", put(3, 10**6)), "X: indptr falls"),
        (change("X/indptr", put(2, 0)), "X: indptr falls"),
        (change("X/indptr", put(CELLS, 0)), "X: indptr falls"),
        (change("layers/by_gene/indices", put(0, CELLS)), "layers/by_gene: index 64"),
        (claims("X/data", [1200]), "X: data has 1,200 values and indices"),
        (claims("X/indptr", [40]), "X: indptr has 40 entries; 64 rows need 65"),
        (claims("layers/zeros", [2**40, GENES]), "layers/zeros: claims .* and stores"),
        (claims("obs/zero", [2**40]), "obs/zero: claims 8,796,093,022,208 bytes"),
    ],
)
def test_matrices_that_are_none_are_refused_as_in_an_h5ad(
    tmp_path: Path, whole: Path, damage: Callable[[Path], None], said: str
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "a.zarr"))
    damage(path)
    with pytest.raises(InputRefused, match=f"{path}: .*{said}"):
        opened(path)


def test_a_matrix_that_crashed_its_reader_is_refused_by_name(tmp_path: Path) -> None:
    path = written(named(), tmp_path / "a.zarr", "2")
    change("X/indptr", put(3, 10**6))(path)
    with (
        Reader(SourceSettings(uri=str(path)), "x", memory_mb=1024, timeout_s=60) as reader,
        pytest.raises(InputRefused, match="X: indptr falls"),
    ):
        reader.inspect()


def test_a_group_behind_a_store_is_looked_at_too(tmp_path: Path) -> None:
    path = written(empty_in_part(), tmp_path / "a.zarr", "3")
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/zarrs/a.zarr", recursive=True)
    try:
        assert "obs/zero (1 of 1 chunks)" in notes_of("memory://zarrs/a.zarr")[0]
        memory.rm("/zarrs/a.zarr/X/indices/c/0")
        with pytest.raises(InputRefused, match=r"memory://zarrs/a\.zarr: X/indices: chunk c/0 is not stored"):
            open_group("memory://zarrs/a.zarr")
    finally:
        memory.store.clear()


@pytest.mark.parametrize("column", [-1, 3])
def test_a_value_in_no_column_is_in_no_feature(column: int) -> None:
    counts = scipy.sparse.csr_matrix((np.ones(1), np.array([0]), np.array([0, 1])), shape=(1, 3))
    counts.indices[0] = column
    with pytest.raises(ValueError, match=f"columns {column} to {column}, and the source's are 0 to 2"):
        map_plain(pd.DataFrame(index=["a", "b", "c"]), "gene").apply(counts)
