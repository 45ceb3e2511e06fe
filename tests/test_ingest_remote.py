"""Sources on Google Cloud Storage and behind web addresses, from servers on loopback; S3 has its own module."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
from local_server import local_server

from ingest.dataset import OpenDataset
from ingest.expand import expand
from ingest.job import SourceSettings
from ingest.sources.form import lasting
from store.errors import MissingError

BUCKET = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", "--default-bucket=atlas"]
WEB = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles
app = Starlette()
app.mount("/", StaticFiles(directory=sys.argv[1]))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]))
"""
pytestmark = [
    pytest.mark.s3,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # aiohttp, sockets left at exit
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),  # anndata, on 10x symbols; we use the ids
]


def _same(path: Path, address: str) -> None:
    """The dataset behind the address is that of the local file."""
    here = OpenDataset(SourceSettings(uri=str(path)), "x")
    there = OpenDataset(SourceSettings(uri=address), "x")
    assert there.form.digest == here.form.digest
    assert there.form.obs.index.equals(here.form.obs.index)
    assert (there.block("RNA", 5, 60) != here.block("RNA", 5, 60)).nnz == 0


def test_a_google_bucket_is_listed_and_read(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_server(lambda port: [*BUCKET, "--in-memory", f"--port={port}"]) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        filesystem = fsspec.filesystem("gs")
        path = shared_data / "derived/pbmc68k_reduced_counts.h5ad"
        filesystem.put_file(str(path), "atlas/2026/blood.h5ad")
        filesystem.pipe("atlas/2026/notes.txt", b"not a dataset")
        expanded = expand(SourceSettings(uri="gs://atlas/2026"), ("gs",))
        (source,) = expanded.sources
        assert expanded.passed == ["gs://atlas/2026/notes.txt"]
        assert source.uri == "gs://atlas/2026/blood.h5ad"
        _same(path, source.uri)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://a.org/x.h5ad?acc=GSE1&file=x.h5ad", "https://a.org/x.h5ad?acc=GSE1&file=x.h5ad"),
        ("https://a.org/x.h5ad?v=1&X-Amz-Expires=60&X-Amz-Signature=0f", "https://a.org/x.h5ad"),
        ("https://b.net/x.h5ad?sv=2024&sig=abc%3D", "https://b.net/x.h5ad"),
        ("https://me:secret@a.org:8080/x.h5ad?access_token=1", "https://a.org:8080/x.h5ad"),
        ("s3://atlas/me@home?sig=1", "s3://atlas/me@home?sig=1"),
    ],
)
def test_a_lake_keeps_no_signature_of_an_address(address: str, kept: str) -> None:
    assert lasting(address) == kept


def test_a_web_address_is_read(shared_data: Path) -> None:
    path = shared_data / "derived/pbmc68k_reduced_counts.h5ad"
    with local_server(lambda port: [sys.executable, "-c", WEB, str(path.parent), port]) as url:
        (source,) = expand(SourceSettings(uri=f"{url}/{path.name}"), ("http",)).sources
        _same(path, source.uri)
        for signature in ("a1", "b2"):
            plan = OpenDataset(SourceSettings(uri=f"{source.uri}?X-Amz-Signature={signature}"), "x").inspect().plan
            assert [plan.info["source_uri"], plan.origin] == [source.uri] * 2
        with pytest.raises(MissingError, match="no such file"):
            OpenDataset(SourceSettings(uri=f"{url}/missing.h5ad"), "x")
