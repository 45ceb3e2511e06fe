"""An S3 that fails or refuses while a lake is read or tidied: that is what is said, and nothing is called damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from encoded import add_dataset
from fault_proxy import SHORT
from local_s3 import failing, s3_bucket
from tiledbsoma import SOMAError

import store.__main__ as commands
from store import command, records
from store.cluster import in_this_process
from store.errors import InterruptedRun, StorageError
from store.lake import open_lake
from store.snapshot import SnapshotSettings, create_snapshot, delete_snapshot, open_snapshot
from store.tables import _read_at
from store.upkeep import collect
from store.validate import validate
from store.writer import LakeWriter
from train.stream import Stream

pytestmark = [
    pytest.mark.s3,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # aiobotocore, sockets left at exit
]
CELLS = "/census_data/homo_sapiens"


@pytest.fixture(scope="module")
def lake_uri() -> Iterator[str]:
    """A lake of two datasets, one of which took another's place, and a snapshot of it."""
    with s3_bucket() as bucket:
        uri = f"{bucket}/lake"
        with LakeWriter(uri) as writer:
            for version in (0, 1):
                add_dataset(writer, "first", 70, {"RNA": 40}, version=version, origin="a")
        create_snapshot(uri, "s", SnapshotSettings(seed=1))
        yield uri


def test_arrays_that_a_store_does_not_give_are_not_called_damaged(lake_uri: str) -> None:
    lake, made = open_lake(lake_uri), open_snapshot(lake_uri, "s")
    with failing("403", rf"GET .*({CELLS}|/snapshots/s/.*tdb)"):
        for read in (
            lambda: open_lake(lake_uri).obs("homo_sapiens"),
            lambda: open_lake(lake_uri).obs("homo_sapiens", "cell_type == 'odd'"),
            lambda: open_lake(lake_uri).var("homo_sapiens", "RNA"),
            lambda: made.verify(),
            lambda: next(Stream(open_snapshot(lake_uri, "s"), batch=16).epoch(0)),
        ):
            with pytest.raises(StorageError, match=r"cannot be read: .*S3: ") as caught:
                read()
            assert "damaged" not in str(caught.value)
            assert "Remote IP" not in str(caught.value)
    with failing("403", rf"GET .*{CELLS}/ms/RNA/X/raw/__fragments"), pytest.raises(StorageError, match="Code: 403"):
        lake.counts("homo_sapiens", "RNA", range(70, 80))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["403", SHORT])
@pytest.mark.parametrize("array", ["RNA/counts", "RNA/indptr", "codes", "RNA/var"])
def test_a_snapshots_values_that_a_store_does_not_give_are_not_called_damaged(
    lake_uri: str, kind: str, array: str
) -> None:
    whole = rf"s/{array}: cannot be read: .*(403|correct number of bytes).*; check the place .* same command again$"
    files = "d0" if array == "RNA/var" else "a0"
    with failing(kind, rf"GET .*/snapshots/s/{array}/.*{files}.tdb"):
        made = open_snapshot(lake_uri, "s")
        reads: list[Callable[[], object]] = [made.verify]
        if array != "RNA/var":
            reads.append(lambda: next(Stream(made, batch=16).epoch(0)))
        for read in reads:
            with pytest.raises(StorageError, match=whole) as caught:
                read()
            assert "damaged" not in str(caught.value)
            assert "Remote IP" not in str(caught.value)


@pytest.mark.parametrize("file", ["a0", "__fragment_metadata"])
def test_a_short_answer_is_asked_for_again(lake_uri: str, file: str) -> None:
    whole = open_snapshot(lake_uri, "s").block("RNA", 0, 70)
    with failing(SHORT, rf"GET .*/snapshots/s/RNA/counts/.*{file}.tdb", most=1) as proxy:
        again = open_snapshot(lake_uri, "s").block("RNA", 0, 70)
        assert httpx.get(f"{proxy}/faults").json() == {SHORT: 1}
    assert np.array_equal(whole.counts, again.counts)


def test_a_table_that_a_store_does_not_give_once_is_not_taken_for_one_that_was_made_later(lake_uri: str) -> None:
    lake, path = open_lake(lake_uri), f"{CELLS}/obs_measurement_presence".removeprefix("/")
    assert len(_read_at(path, lake)) > 0
    with failing(SHORT, rf"GET .*{path}/.*__fragment_metadata.tdb", most=1), pytest.raises(SOMAError, match="of bytes"):
        _read_at(path, lake)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run ``python -m store``; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["store", *words])
    with pytest.raises(SystemExit) as ended:
        command.run(commands.app, "store")
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_commands_tell_an_outage_by_exit_code_5_in_a_line(
    lake_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    h5ad = str(tmp_path / "x.h5ad")
    with failing("403", rf"GET .*({CELLS}/ms/RNA/X/raw/__fragments|/snapshots/s/.*tdb)"):
        for words in (("export", h5ad), ("snapshot", "verify", "s"), ("snapshot", "create", "t", "--workers", "0")):
            code, _, err = run(monkeypatch, capsys, *words, "--lake", lake_uri)
            assert code == 5, (words, err)
            assert "Code: 403" in err
            assert "Traceback" not in err
            assert "damaged" not in err
        code, out, err = run(monkeypatch, capsys, "validate", "--json", "--lake", lake_uri)
    assert code == 5, err
    assert "could not be made" in err
    problems = json.loads(out)["problems"]
    assert {problem["check"] for problem in problems} == {"counts", "snapshot"}
    assert all(problem["unread"] for problem in problems)
    assert [check for check in validate(open_lake(lake_uri)) if check.problem] == []


def none_is_gathered(function: Any, common: Any, items: Any) -> Iterator[None]:
    """Run tasks here, and stop before the second pass."""
    if function.__name__ == "gather":
        raise InterruptedRun("killed")
    yield from in_this_process(function, common, items)


def test_who_may_write_and_not_remove_makes_snapshots_also_after_a_stop(lake_uri: str) -> None:
    with failing("403", r"(DELETE .*|POST .*\?delete)") as proxy:
        with pytest.raises(InterruptedRun):
            create_snapshot(lake_uri, "t", SnapshotSettings(), tasks=none_is_gathered)
        create_snapshot(lake_uri, "t", SnapshotSettings()).verify()
        assert httpx.get(f"{proxy}/faults").json()["403"] > 1
        with pytest.raises(StorageError, match="cannot be removed: "):
            delete_snapshot(lake_uri, "t")
    assert collect(lake_uri).builds == 1
    delete_snapshot(lake_uri, "t")
    assert records.names(f"{lake_uri}/somaflow/building") == []


def test_a_spill_file_that_a_store_does_not_give_drops_nothing_that_was_done(lake_uri: str) -> None:
    with pytest.raises(InterruptedRun):
        create_snapshot(lake_uri, "t", SnapshotSettings(), tasks=none_is_gathered)
    with failing("403", r"GET .*/spill/"), pytest.raises(StorageError, match=r"arrows: .* read: HTTP 403 ") as ill:
        create_snapshot(lake_uri, "t", SnapshotSettings())
    assert str(ill.value).endswith("run the same command again: what was done stays done")
    create_snapshot(lake_uri, "t", SnapshotSettings()).verify()
    delete_snapshot(lake_uri, "t")
    with pytest.raises(InterruptedRun):
        create_snapshot(lake_uri, "t", SnapshotSettings(), tasks=none_is_gathered)
    records.remove(f"{lake_uri}/somaflow/building/t/spill")
    with pytest.raises(StorageError, match="arrows: is gone; delete the half-made snapshot and make it again"):
        create_snapshot(lake_uri, "t", SnapshotSettings())
    delete_snapshot(lake_uri, "t")


def test_garbage_goes_though_the_store_does_not_list_unfinished_uploads(lake_uri: str) -> None:
    with failing("403", r"GET .*\?.*uploads"):
        left = collect(lake_uri)
    assert left.uploads == 0
    assert left.note.startswith("unfinished uploads stay, the store refuses")
    assert collect(lake_uri).note == ""


def test_a_vacuum_that_the_store_refuses_is_said_and_goes_on_later(
    lake_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing("403", rf"DELETE .*{CELLS}/ms/RNA/var"):
        code, _, err = run(monkeypatch, capsys, "vacuum", "--yes", "--lake", lake_uri)
    assert code == 5, err
    assert "every commit that can be opened is whole" in err
    assert "Traceback" not in err
    assert [check for check in validate(open_lake(lake_uri)) if check.problem] == []
