"""Files that lie: HDF5 that reaches outside itself or breaks readers, archives that write where they please."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

CANARY = b"THE-CANARY-SINGS-0123456789"


def honest(path: Path, cells: int = 40, genes: int = 30) -> Path:
    """A small, valid h5ad with raw counts."""
    counts = scipy.sparse.random(cells, genes, 0.3, "csr", random_state=1)
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    obs = pd.DataFrame({"cell_type": ["T cell"] * cells}, index=[f"c{number}" for number in range(cells)])
    var = pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(genes)])
    anndata.AnnData(counts, obs, var).write_h5ad(path)
    return path


def external_link(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["data"] = np.arange(5)
    file["obs/stolen"] = h5py.ExternalLink(str(folder / "other.h5"), "/data")


def external_storage(file: h5py.File, folder: Path) -> None:
    canary = folder / "canary.txt"
    canary.write_bytes(CANARY * 100)
    del file["X"]
    file.create_dataset("X", shape=(40, 30), dtype="u1", external=[(str(canary), 0, 1200)])


def virtual_dataset(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["data"] = np.ones((40, 30), "f4")
    layout = h5py.VirtualLayout((40, 30), "f4")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "data", (40, 30))
    del file["X"]
    file.create_virtual_dataset("X", layout)


def soft_loop(file: h5py.File, folder: Path) -> None:
    file["uns/loop"] = h5py.SoftLink("/uns/loop")


def soft_link(file: h5py.File, folder: Path) -> None:
    file["layers/copy"] = h5py.SoftLink("/X")


def hard_cycle(file: h5py.File, folder: Path) -> None:
    file["uns/self"] = file["uns"]


def deep_tree(file: h5py.File, folder: Path) -> None:
    file.create_group("uns" + "/d" * 200)


def shape_bomb(file: h5py.File, folder: Path) -> None:
    del file["X"]
    file.create_dataset("X", shape=(2**40, 30), dtype="f4", chunks=(1024, 30), fillvalue=1)


def zip_bomb(file: h5py.File, folder: Path) -> None:
    del file["X"]
    made = file.create_dataset("X", shape=(2**25, 40), dtype="f4", chunks=(2**16, 40), compression="gzip")
    made[: 2**16] = 1


def index_outside(file: h5py.File, folder: Path) -> None:
    file["X/indices"][3] = 2**30


def index_negative(file: h5py.File, folder: Path) -> None:
    file["X/indices"][3] = -7


def indptr_falls(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][5] = 300


def indptr_overflows(file: h5py.File, folder: Path) -> None:
    """It falls by more than 64 bits hold, so that the difference is a large positive number."""
    kept = file["X/indptr"][:].astype(np.int64)
    kept[5:7] = 2**63 - 1, -5
    del file["X/indptr"]
    file["X/indptr"] = kept


def indptr_unsigned(file: h5py.File, folder: Path) -> None:
    """It falls, in a type that has no negative differences."""
    kept = file["X/indptr"][:].astype(np.uint64)
    kept[5] = 300
    del file["X/indptr"]
    file["X/indptr"] = kept


def indptr_short(file: h5py.File, folder: Path) -> None:
    kept = file["X/indptr"][:20]
    del file["X/indptr"]
    file["X/indptr"] = kept


def indptr_begins_late(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][0] = 2


def indptr_ends_elsewhere(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][-1] = 10**6


def data_short(file: h5py.File, folder: Path) -> None:
    kept = file["X/data"][:-5]
    del file["X/data"]
    file["X/data"] = kept


def float_indices(file: h5py.File, folder: Path) -> None:
    kept = file["X/indices"][:].astype(float)
    del file["X/indices"]
    file["X/indices"] = kept


def no_shape(file: h5py.File, folder: Path) -> None:
    del file["X"].attrs["shape"]


def odd_shape(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["shape"] = [40, 30, 2]


def unknown_encoding(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["encoding-type"] = "awkward"


def references(file: h5py.File, folder: Path) -> None:
    made = file.create_dataset("uns/refs", shape=(10,), dtype=h5py.ref_dtype)
    made[0] = file["X"].ref


def giant_attribute(file: h5py.File, folder: Path) -> None:
    file.create_group("uns/wide").attrs["big"] = np.arange(2**18)


def bad_text(file: h5py.File, folder: Path) -> None:
    del file["obs/_index"]
    made = file.create_dataset("obs/_index", shape=(40,), dtype=h5py.string_dtype("utf-8", 4))
    made[:] = [b"\xff\xfe\xfd" + bytes([65 + number % 26]) for number in range(40)]
    made.attrs["encoding-type"] = "string-array"
    made.attrs["encoding-version"] = "0.2.0"


def obs_too_short(file: h5py.File, folder: Path) -> None:
    kept = file["obs/_index"][:5]
    attributes = dict(file["obs/_index"].attrs)
    del file["obs/_index"]
    file["obs/_index"] = kept
    file["obs/_index"].attrs.update(attributes)


def too_large(file: h5py.File, folder: Path) -> None:
    """Honest in form; obs alone needs more than a worker has."""
    del file["obs/_index"]
    made = file.create_dataset(
        "obs/_index", shape=(3 * 10**7,), dtype=h5py.string_dtype("utf-8", 30), chunks=(10**6,), compression="gzip"
    )
    made.attrs["encoding-type"] = "string-array"
    made.attrs["encoding-version"] = "0.2.0"


def not_finite(file: h5py.File, folder: Path) -> None:
    file["X/data"][4] = np.inf


def fractions(file: h5py.File, folder: Path) -> None:
    file["X/data"][4] = 0.5


def beyond_float32(file: h5py.File, folder: Path) -> None:
    file["X/data"][4] = 2.0**25


def twice_the_cell(file: h5py.File, folder: Path) -> None:
    file["obs/_index"][1] = file["obs/_index"][0]


CORRUPTIONS: dict[Callable[[h5py.File, Path], None], str] = {
    external_link: "external link",
    external_storage: "external storage",
    virtual_dataset: "virtual dataset",
    soft_loop: "soft link",
    soft_link: "soft link",
    hard_cycle: "second name",
    deep_tree: "levels",
    shape_bomb: "claims",
    zip_bomb: "claims",
    index_outside: "lies outside",
    index_negative: "lies outside",
    indptr_falls: "falls",
    indptr_overflows: "falls",
    indptr_unsigned: "falls",
    indptr_short: "entries",
    indptr_begins_late: "does not begin at 0",
    indptr_ends_elsewhere: "ends at",
    data_short: "values and indices",
    float_indices: "not whole numbers",
    no_shape: "shape",
    odd_shape: "shape",
    unknown_encoding: "unknown form of matrix|rows need",
    references: "references",
    giant_attribute: "attribute 'big' takes",
    bad_text: "cannot be read",
    obs_too_short: "do not fit|cannot be read|rows",
    too_large: "memory",
    not_finite: "not finite",
    fractions: "not a whole number",
    beyond_float32: "larger than",
    twice_the_cell: "more than once",
}


def corrupt(folder: Path, change: Callable[[h5py.File, Path], None]) -> Path:
    """An h5ad that was honest before ``change``."""
    path = honest(folder / f"{change.__name__}.h5ad")
    with h5py.File(path, "r+", libver="latest") as file:
        change(file, folder)
    return path


def hostile_archives(folder: Path) -> dict[Path, str]:
    """Archives and the reason each is to be refused for."""

    def packed(name: str, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
        path = folder / name
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            for info, content in members:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info, b""

    bomb = folder / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("matrix.mtx", b"0" * 2**26)
    up = folder / "up.zip"
    with zipfile.ZipFile(up, "w") as archive:
        archive.writestr("../evil", b"x")
    torn = folder / "torn.tar.gz"
    torn.write_bytes(gzip.compress(b"no tar at all" * 100)[:60])
    return {
        packed("up.tar", (tarfile.TarInfo("../evil"), b"x")): "outside",
        packed("absolute.tar", (tarfile.TarInfo("/tmp/evil"), b"x")): "outside",
        packed("inside.tar.gz", (tarfile.TarInfo("a/../../evil"), b"x")): "outside",
        packed("symlink.tar", special("matrix.mtx", tarfile.SYMTYPE, "/etc/passwd")): "link or a device",
        packed("hardlink.tar", special("matrix.mtx", tarfile.LNKTYPE, "/etc/passwd")): "link or a device",
        packed("device.tar", special("matrix.mtx", tarfile.CHRTYPE)): "link or a device",
        packed("fifo.tar", special("matrix.mtx", tarfile.FIFOTYPE)): "link or a device",
        packed("many.tar", *((tarfile.TarInfo(f"f{number}"), b"") for number in range(10_001))): "more than 10,000",
        packed("bomb.tar.gz", (tarfile.TarInfo("matrix.mtx"), b"0" * 2**26)): "unpacks to more",
        bomb: "unpacks to more",
        up: "outside",
        torn: "not a readable archive",
    }
