"""Addresses of sources: what is no address of one place is refused before anything is asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingest.expand import expand
from ingest.job import JobSettings, SourceSettings
from store.errors import UsageError

CHAIN = "'::' is read as a chain of places, which is not allowed; rename a file or folder"


@pytest.mark.parametrize(
    "uri",
    [
        "reference::https://host/refs.zarr",
        "simplecache::http://169.254.169.254/a.h5ad",
        "https://host/a.h5ad?at=x::file",
        "file://a.h5ad::reference",
        "{folder}/a::b.h5ad",
        "{folder}/a::b*",
        "{folder}",
        "{folder}/*.h5ad",
        "{folder}/list.tsv",
    ],
)
@pytest.mark.parametrize("schemes", [JobSettings().schemes, ("file", "http", "https")])
def test_chains_of_addresses_are_refused_whoever_names_them(tmp_path: Path, uri: str, schemes: tuple[str, ...]) -> None:
    (tmp_path / "a::b.h5ad").touch()
    (tmp_path / "list.tsv").write_text("uri\nsimplecache::https://host/a.h5ad\n")
    with pytest.raises(UsageError, match=CHAIN):
        expand(SourceSettings(uri=uri.format(folder=tmp_path)), schemes)


def test_files_beside_a_source_and_the_folder_around_it_are_no_chains_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.h5ad").touch()
    (tmp_path / "x::y").mkdir()
    (tmp_path / "x::y/a.h5ad").touch()
    for key in ("genes", "hgnc", "obs_table", "peaks", "barcodes"):
        given = {"uri": str(tmp_path / "a.h5ad"), key: "reference::https://me:secret@host/t.csv"}
        with pytest.raises(UsageError, match=CHAIN) as caught:
            expand(SourceSettings(**given), JobSettings().schemes)  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)
    monkeypatch.chdir(tmp_path / "x::y")
    with pytest.raises(UsageError, match=f"{tmp_path}/x::y/a.h5ad: {CHAIN}"):
        expand(SourceSettings(uri="a.h5ad"), JobSettings().schemes)
