"""Sources on Google Cloud Storage and behind web addresses, from servers on loopback; S3 has its own module."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata
import fsspec
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
from local_server import local_server

import ingest.run
from ingest.dataset import OpenDataset
from ingest.expand import expand
from ingest.job import JobSettings, SourceSettings
from ingest.run import run
from ingest.sources.form import lasting
from store.errors import MissingError
from store.lake import open_lake

CHANGED = "changed while it was being read; run the same command again"
BUCKET = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", "--default-bucket=atlas"]
WEB = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles
app = Starlette()
app.mount("/", StaticFiles(directory=sys.argv[1]))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]))
"""
FEW_TAGS = """
import email.utils, gzip, http.server, os, re, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = sys.argv[1] + self.path.split("?")[0]
        if not os.path.isfile(path):
            return self.send_error(404)
        with open(path, "rb") as file:
            content = file.read()
        whole = sys.argv[3] == "packed"
        wanted = None if whole else re.match(r"bytes=(\\d+)-(\\d+)", self.headers.get("Range") or "")
        content = gzip.compress(content) if whole else content
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(content)}")
        if whole:
            self.send_header("Content-Encoding", "gzip")
        if sys.argv[3] != "bare":
            self.send_header("Last-Modified", email.utils.formatdate(os.stat(path).st_mtime, usegmt=True))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else part)
    do_HEAD = do_GET
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
"""Sends a file's content and length, and of what tells one version from another at most its date."""
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


def _by_column(path: Path, count: int, second: int) -> None:
    """Write a file of one length, whatever the count, whose matrix is turned before it is read."""
    counts = scipy.sparse.csc_matrix(np.array([[count, 0, 2], [3, 4, 0], [0, 5, 6]], np.float32))
    var = pd.DataFrame(index=["TP53", "CD4", "GAPDH"])
    anndata.AnnData(counts, obs=pd.DataFrame(index=["a", "b", "c"]), var=var).write_h5ad(path)
    os.utime(path, (second, second))


@pytest.mark.parametrize("sent", ["dated", "bare"])
def test_a_changed_file_of_the_same_length_has_its_new_counts_whatever_tags_a_server_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    path = tmp_path / "cells.h5ad"
    with local_server(lambda port: [sys.executable, "-c", FEW_TAGS, str(tmp_path), port, sent]) as url:
        source, lengths, keys = SourceSettings(uri=f"{url}/cells.h5ad"), set(), set()
        for second, count in enumerate((1, 9), 1_700_000_000):
            _by_column(path, count, second)
            opened = OpenDataset(source, "x")
            assert opened.block("RNA", 0, 3).toarray().tolist() == [[count, 0, 2], [3, 4, 0], [0, 5, 6]]
            lengths.add(path.stat().st_size)
            keys.add(opened.inspect().plan.key)
        assert (len(lengths), len(keys)) == (1, 2)


@pytest.mark.parametrize("sent", ["dated", "bare"])
@pytest.mark.ray
def test_a_file_on_the_web_that_changes_while_it_is_read_is_refused_whatever_tags_a_server_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None, sent: str
) -> None:
    path, second, written = tmp_path / "cells.h5ad", 1_700_000_000, ingest.run._write_spans
    _by_column(path, 1, second)

    def changed_before(*given: Any) -> Any:
        _by_column(path, 9, second + 1)
        return written(*given)

    def changed_after(*given: Any) -> Any:
        blocks = written(*given)
        _by_column(path, 9, second + 1)
        return blocks

    with local_server(lambda port: [sys.executable, "-c", FEW_TAGS, str(tmp_path), port, sent]) as url:
        given = (SourceSettings(uri=f"{url}/cells.h5ad"),)
        job = JobSettings(lake=str(tmp_path / "lake"), schemes=("http",), source=given)
        with monkeypatch.context() as context:
            context.setattr(ingest.run, "_write_spans", changed_before if sent == "dated" else changed_after)
            (outcome,) = run(job)
        assert (outcome.state, outcome.error) == ("refused", f"{url}/cells.h5ad: {CHANGED}")
        (outcome,) = run(job)
        assert (outcome.state, outcome.nnz) == ("committed", {"RNA": 6})
        lake = open_lake(job.lake)
        cells = lake.obs("homo_sapiens", columns=["soma_joinid"])["soma_joinid"].to_numpy()
        assert lake.counts("homo_sapiens", "RNA", cells).sum() == 9 + 2 + 3 + 4 + 5 + 6


def test_a_file_that_a_server_sends_packed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    _by_column(tmp_path / "cells.h5ad", 1, 1_700_000_000)
    with local_server(lambda port: [sys.executable, "-c", FEW_TAGS, str(tmp_path), port, "packed"]) as url:
        there = OpenDataset(SourceSettings(uri=f"{url}/cells.h5ad"), "x")
        assert there.block("RNA", 0, 3).toarray().tolist() == [[1, 0, 2], [3, 4, 0], [0, 5, 6]]
        assert there.form.digest == OpenDataset(SourceSettings(uri=str(tmp_path / "cells.h5ad")), "x").form.digest


def _packed(folder: Path) -> None:
    """Write the same three cells as a zipped zarr and as an archive of 10x."""
    counts = scipy.sparse.csr_matrix(np.array([[1, 0, 2], [3, 4, 0], [0, 5, 6]], np.float32))
    genes, cells = ["TP53", "CD4", "GAPDH"], ["a", "b", "c"]
    anndata.AnnData(counts, pd.DataFrame(index=cells), pd.DataFrame(index=genes)).write_zarr(folder / "unpacked.zarr")
    shutil.make_archive(str(folder / "a.zarr"), "zip", folder / "unpacked.zarr")
    (folder / "10x").mkdir()
    scipy.io.mmwrite(folder / "10x/matrix.mtx", counts.T, field="integer")
    for name, lines in (("genes.tsv", genes), ("barcodes.tsv", cells)):
        (folder / "10x" / name).write_text("\n".join(lines))
    shutil.make_archive(str(folder / "a"), "gztar", folder / "10x")


@pytest.mark.filterwarnings("ignore:.*zarr v2:UserWarning")  # anndata, on the format it writes by itself
@pytest.mark.parametrize("name", ["a.zarr.zip", "a.tar.gz"])
def test_what_is_downloaded_lies_in_the_scratch_folder_once_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    served, scratch, temporary = (tmp_path / part for part in ("served", "scratch", "temporary"))
    for folder in (served, scratch, temporary):
        folder.mkdir()
    _packed(served)
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with local_server(lambda port: [sys.executable, "-c", FEW_TAGS, str(served), port, "dated"]) as url:
        for _ in range(2):
            opened = OpenDataset(SourceSettings(uri=f"{url}/{name}"), "x")
            assert opened.block("RNA", 0, 3).toarray().tolist() == [[1, 0, 2], [3, 4, 0], [0, 5, 6]]
    assert list(temporary.rglob("*")) == []
    (copy,) = scratch.rglob(name)
    assert copy.read_bytes() == (served / name).read_bytes()
