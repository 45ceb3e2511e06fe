"""Small files of the tables are merged while commits go on: no commit reads otherwise, and each costs the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import cellxgene_census
import pandas as pd
import pytest
import tiledb
import tiledbsoma
from encoded import add_dataset

from store import fragments as store_fragments
from store import tables as store_tables
from store import writer as store_writer
from store.catalog import Commit
from store.context import soma_context
from store.errors import StorageError
from store.fragments import fragments
from store.lake import Lake, open_lake, table_uris
from store.records import newest
from store.upkeep import collect, consolidate, vacuum
from store.validate import validate
from store.writer import LakeWriter

EVERY = 3


def everything(lake: Lake) -> dict[str, pd.DataFrame]:
    """All tables of a commit, as our readers see them, and those that a Census client reads by itself."""
    tables = {"datasets": lake.datasets(), "obs": lake.obs("homo_sapiens")}
    tables["presence"] = lake.measurement_presence("homo_sapiens")
    info = lake.root["census_info"]
    for name in ("summary", "summary_cell_counts", "organisms"):
        tables[name] = info[name].read().concat().sort_by("soma_joinid")
    for measurement in lake.measurements("homo_sapiens"):
        ours = lake.var("homo_sapiens", measurement)
        theirs = lake.experiment("homo_sapiens").ms[measurement].var.read().concat().sort_by("soma_joinid")
        assert ours.equals(theirs.cast(ours.schema)), measurement
        tables[measurement] = ours
    return {name: table.to_pandas() for name, table in tables.items()}


def equal(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> bool:
    return one.keys() == other.keys() and all(one[name].equals(other[name]) for name in one)


def write(uri: str, *numbers: int) -> Iterator[int]:
    """Make a commit for each number: datasets of all kinds, new versions and a removal; yields what was made."""
    with LakeWriter(uri) as writer:
        for number in numbers:
            if number % 7 == 6:
                writer.remove(f"d{number - 6}")
            elif number % 7 == 4:  # a new version of the one before
                add_dataset(writer, f"d{number - 1}", 25, {"RNA": 20}, origin=f"o{number - 1}", version=1)
            else:
                sizes = {"RNA": 30 + number, "protein": 4} if number % 2 else {"RNA": 50 - number}
                add_dataset(writer, f"d{number}", 20 + number, sizes, origin=f"o{number}")
            yield number


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge often, and remove what was merged by the next time."""
    monkeypatch.setattr(store_writer, "MERGED_EVERY", EVERY)
    monkeypatch.setattr(store_fragments, "READERS_S", -1)


def test_every_commit_reads_as_it_did_whatever_was_merged_since(often: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    seen = {number + 1: everything(open_lake(uri)) for number in write(uri, *range(14))}
    assert len(seen) == 14
    for number, before in seen.items():
        assert equal(everything(open_lake(uri, number)), before), number
        assert [check for check in validate(open_lake(uri, number)) if check.problem] == []
    merged = [item for name in table_uris(uri) for item in fragments(name) if item.first_ms < item.last_ms]
    assert len(merged) > len(table_uris(uri)) // 2
    collect(uri)
    consolidate(uri)
    seen |= {number + 1: everything(open_lake(uri)) for number in write(uri, *range(14, 18))}
    for number, before in seen.items():
        assert equal(everything(open_lake(uri, number)), before), number
    vacuum(uri, keep_from=16)
    assert all(equal(everything(open_lake(uri, number)), seen[number]) for number in (16, 17, 18))


def test_consolidation_goes_on_after_new_versions_and_removals(tmp_path: Path) -> None:
    uri, seen = str(tmp_path / "lake"), {}
    for numbers in (range(5), range(5, 7), range(7, 9)):
        seen |= {number + 1: everything(open_lake(uri)) for number in write(uri, *numbers)}
        consolidate(uri)
        assert all(len(fragments(name)) == 1 for name in table_uris(uri))
    for number, before in seen.items():
        assert equal(everything(open_lake(uri, number)), before), number
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_lake_whose_commit_files_were_packed_is_merged_as_any(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    seen = {number + 1: everything(open_lake(uri)) for number in write(uri, *range(5))}
    for name in table_uris(uri):
        store_fragments.consolidate(name, ("commits", "fragments"))
    seen |= {number + 1: everything(open_lake(uri)) for number in write(uri, 5, 6)}
    with pytest.raises(tiledb.TileDBError, match="Cannot get file size"):
        store_fragments.consolidate(f"{uri}/census_info/datasets", ("commits",))
    consolidate(uri)
    assert all(len(fragments(name)) == 1 for name in table_uris(uri))
    assert all(equal(everything(open_lake(uri, number)), before) for number, before in seen.items())
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_table_never_has_many_fragments_to_open(often: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    for _ in write(uri, *range(20)):
        pass
    for name in table_uris(uri):
        assert len(tiledb.array_fragments(name)) <= 2 * EVERY, name


def test_a_reader_goes_on_with_what_was_merged_until_it_had_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "MERGED_EVERY", EVERY)  # when a driver leaves: there is no time before
    uri = str(tmp_path / "lake")
    for _ in write(uri, 0, 1):
        pass
    reader = open_lake(uri)
    obs = reader.experiment("homo_sapiens").obs  # open: it knows the fragments of now
    for number in range(2, 8):
        list(write(uri, number))
    assert any((tmp_path / "lake").rglob("obs/__commits/*.vac"))
    assert len(obs.read().concat()) == 41
    assert reader.obs("homo_sapiens").num_rows == 41
    table = str(tmp_path / "lake/census_data/homo_sapiens/obs")
    n_there = len(fragments(table))
    monkeypatch.setattr(store_fragments, "READERS_S", -1)
    for _ in write(uri, *range(8, 12)):
        pass
    assert len(fragments(table)) < n_there
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_merge_that_dies_before_it_names_what_it_replaced_is_harmless(often: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    seen = {number + 1: everything(open_lake(uri)) for number in write(uri, *range(8))}
    replaced = list((tmp_path / "lake").rglob("*.vac"))
    assert replaced
    for path in replaced:
        path.unlink()
    assert all(equal(everything(open_lake(uri, number)), before) for number, before in seen.items())
    for _ in write(uri, 8, 9, 10, 11):
        pass
    assert all(equal(everything(open_lake(uri, number)), before) for number, before in seen.items())
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_merge_that_fails_is_told_and_the_commit_stands(
    often: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(uri: str, before_ms: int) -> None:
        raise tiledb.TileDBError("no space left")

    monkeypatch.setattr(store_writer, "merge_small", full)
    uri = str(tmp_path / "lake")
    with caplog.at_level(logging.WARNING, logger="somaflow.store"):
        assert len(list(write(uri, 0, 1, 2))) == 3
    assert "census_info/summary: small files were not merged, opening it gets slower: no space left" in caplog.text
    assert open_lake(uri).commit.number == 3


def test_a_lake_from_before_tables_were_written_whole_reads_and_grows_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "lake")
    with monkeypatch.context() as before:
        before.setattr(store_tables, "WHOLE_ROWS", -1)
        for _ in write(uri, 0, 1, 2):
            pass
    expected, empty = everything(open_lake(uri)), open_lake(uri, 0).commit.id
    assert set(expected["RNA"]["n_measured_obs"]) == {63, 42, 20}, "the last write does not tell of all features"
    for path in sorted((tmp_path / "lake/somaflow/commits").glob("*.json")):
        values = json.loads(path.read_text())
        del values["whole"]
        path.write_text(json.dumps(values))
    old = open_lake(uri)
    assert not any(commit.whole for commit in old.history)
    assert old.var("homo_sapiens", "RNA").num_rows == 50
    assert old.history[0].id == empty  # there was nothing to say of the empty lake
    assert equal(everything(old), expected)
    for _ in write(uri, 3, 4):
        pass
    assert equal(everything(open_lake(uri, 3)), expected)
    assert [check for check in validate(open_lake(uri)) if check.problem] == []


def test_a_record_from_before_keeps_its_id() -> None:
    commit = Commit(number=3, timestamp_ms=7, parent="p", created="2026-01-01T00:00:00+00:00")
    assert commit.id == "562a448c8ce2d140e1b26bbf8b4b2b1b6fbc44293c5b6684a37f763b264aa7a8"


def test_a_large_var_is_written_whole_now_and_then(
    often: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_tables, "WHOLE_ROWS", -1)
    monkeypatch.setattr(store_tables, "WHOLE_EVERY", 3)
    uri = str(tmp_path / "lake")
    seen = {number + 1: everything(open_lake(uri)) for number in write(uri, *range(14))}
    whole = ["census_data/homo_sapiens/ms/RNA/var" in commit.whole for commit in open_lake(uri).history]
    assert 3 <= sum(whole) <= 6
    for number, before in seen.items():
        lake = open_lake(uri, number)
        assert equal(everything(lake), before), number
        assert [check for check in validate(lake) if check.problem] == []


def test_a_record_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    list(write(uri, 0))
    (path,) = (tmp_path / "lake/somaflow/commits").glob("*1.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    with pytest.raises(StorageError, match="commit 1 tells 'later': a newer version of somaflow made it"):
        open_lake(uri)


def test_a_reader_whose_files_went_away_is_told_to_open_the_lake_again(often: None, tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    list(write(uri, 0, 1))
    reader = open_lake(uri)
    assert reader.experiment("homo_sapiens").obs.exists(f"{uri}/census_data/homo_sapiens/obs")  # it is open now
    for number in range(2, 10):
        list(write(uri, number))
    with pytest.raises(StorageError, match="open the lake again"):
        reader.obs("homo_sapiens")
    assert open_lake(uri, 2).obs("homo_sapiens").num_rows == 41


def test_a_vacuum_leaves_the_features_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "lake")
    for _ in write(uri, *range(9)):
        pass
    expected = {number: everything(open_lake(uri, number)) for number in (8, 9)}
    vacuum(uri, keep_from=8)
    assert all(equal(everything(open_lake(uri, number)), before) for number, before in expected.items())
    member = tmp_path / "lake/census_data/homo_sapiens/ms"
    assert len(fragments(str(member / "RNA/var"))) == 2  # of commits 8 and 9
    assert len(fragments(str(member / "protein/var"))) == 1  # of commit 8, the last that has proteins
    with tiledbsoma.open(uri, context=soma_context()) as census:
        var = cellxgene_census.get_var(census, "homo_sapiens")
    assert var["nnz"].tolist() == expected[9]["RNA"]["nnz"].tolist()


def test_the_newest_file_of_a_folder_is_found(tmp_path: Path) -> None:
    assert newest(str(tmp_path / "none")) is None
    (tmp_path / "a.vac").touch()
    assert newest(str(tmp_path), ".wrt") is None
    found = newest(str(tmp_path), ".vac")
    assert found
    assert found.tzinfo
