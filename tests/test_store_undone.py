"""A commit that fails while its driver lives on: the commits after it show nothing of it, and nothing merges it in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cellxgene_census
import pytest
import tiledbsoma
from encoded import add_dataset

import store.writer
from store import catalog, tables
from store.catalog import Commit
from store.errors import ConflictError, StorageError
from store.lake import open_lake
from store.validate import validate
from store.writer import LakeWriter

CHANGES: dict[str, Callable[[LakeWriter], Any]] = {
    "a dataset": lambda writer: add_dataset(writer, "new", 50, {"RNA": 70, "protein": 6}),
    "a version": lambda writer: add_dataset(writer, "a", 50, {"RNA": 30}, version=1, origin="a"),
    "a removal": lambda writer: writer.remove("a"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake of 40 cells of ``a`` and 30 of ``b``."""
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "a", 40, {"RNA": 40}, origin="a")
        add_dataset(writer, "b", 30, {"RNA": 20, "protein": 6})
    return uri


@pytest.fixture
def uri(made: str, tmp_path: Path) -> str:
    """A copy of it."""
    return str(shutil.copytree(made, tmp_path / "lake"))


def cells_of(uri: str) -> dict[str, int]:
    """Cells of each dataset as any SOMA client finds them now."""
    with tiledbsoma.DataFrame.open(f"{uri}/census_data/homo_sapiens/obs") as obs:
        found = obs.read(column_names=["dataset_id"]).concat()["dataset_id"].to_pylist()
    return {name: found.count(name) for name in sorted(set(found))}


def problems(uri: str) -> list[tuple[str, str]]:
    return [(check.name, check.problem) for check in validate(open_lake(uri)) if check.problem]


def fail_once(patch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    """Let the next commit fail with an error: half-way through the tables, after them, or in place of its record."""
    module, name = (catalog, "create_commit") if where == "record" else (tables, where)
    real = getattr(module, name)

    def fail(*given: Any, **named: Any) -> Any:
        patch.setattr(module, name, real)
        raise error

    patch.setattr(module, name, fail)


@pytest.mark.parametrize(
    ("name", "where", "error"),
    [
        ("a dataset", "_info_tables", OSError("No space left on device")),
        ("a dataset", "record", KeyboardInterrupt()),
        ("a version", "record", StorageError("SlowDown")),
        ("a version", "_info_tables", RuntimeError("a bug")),
        ("a removal", "record", StorageError("SlowDown")),
    ],
)
def test_what_failed_is_in_no_later_commit(
    uri: str, name: str, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = CHANGES[name]
    with LakeWriter(uri) as writer:
        fail_once(monkeypatch, where, error)
        with pytest.raises((type(error), StorageError)):
            change(writer)
        add_dataset(writer, "next", 10, {"RNA": 25})
        assert cells_of(uri) == {"a": 40, "b": 30, "next": 10}
        assert problems(uri) == []
        change(writer)
    changed: dict[str, dict[str, int]] = {"a dataset": {"a": 40, "new": 50}, "a version": {"a": 50}, "a removal": {}}
    assert cells_of(uri) == {"b": 30, "next": 10} | changed[name]
    assert problems(uri) == []


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_commit_whose_record_is_there_is_made_whatever_was_answered(
    uri: str, change: Callable[[LakeWriter], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = catalog.create_commit

    def unanswered(uri: str, commit: Commit) -> None:
        monkeypatch.setattr(catalog, "create_commit", real)
        real(uri, commit)
        raise StorageError("the connection was closed")

    with LakeWriter(uri) as writer:
        monkeypatch.setattr(catalog, "create_commit", unanswered)
        change(writer)
        assert problems(uri) == []
        add_dataset(writer, "next", 10, {"RNA": 25})
    lake = open_lake(uri)
    assert cells_of(uri) == {commit.dataset["dataset_id"]: commit.dataset["n_obs"] for commit in lake.current}
    assert sum(commit.dataset != {} or commit.superseded != () for commit in lake.history) == 4, "each change once"
    assert problems(uri) == []


def test_a_record_that_arrives_when_its_cells_were_taken_back_is_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, late = catalog.create_commit, list[Commit]()

    def delayed(uri: str, commit: Commit) -> None:
        monkeypatch.setattr(catalog, "create_commit", real)
        late.append(commit)
        raise StorageError("no answer came")

    with LakeWriter(uri) as writer:
        monkeypatch.setattr(catalog, "create_commit", delayed)
        with pytest.raises(StorageError, match="no answer came"):
            add_dataset(writer, "late", 50, {"RNA": 70})
        with pytest.raises(ConflictError):
            real(uri, late[0])
    assert cells_of(uri) == {"a": 40, "b": 30}
    assert problems(uri) == []


def refuse(uri: str, unwanted: object) -> int:
    raise StorageError(f"{uri}: the store is still away")


def test_nothing_is_committed_or_merged_before_what_failed_could_be_taken_back(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change = CHANGES["a version"]
    monkeypatch.setattr(store.writer, "MERGED_EVERY", 1)
    merged: list[str] = []
    monkeypatch.setattr(store.writer, "merge_small", lambda uri, before_ms: merged.append(uri))
    with LakeWriter(uri) as writer:
        with monkeypatch.context() as away:
            fail_once(away, "record", StorageError("SlowDown"))
            away.setattr(store.writer, "take_back", refuse)
            with pytest.raises(StorageError, match="SlowDown"):
                change(writer)
            assert "is not taken back yet" in caplog.text
            for other in CHANGES.values():
                with pytest.raises(StorageError, match="the store is still away"):
                    other(writer)
        add_dataset(writer, "next", 10, {"RNA": 25})
        assert cells_of(uri) == {"a": 40, "b": 30, "next": 10}
    assert problems(uri) == []
    assert merged
    merged.clear()
    with monkeypatch.context() as away, LakeWriter(uri) as writer:
        fail_once(away, "record", StorageError("SlowDown"))
        away.setattr(store.writer, "take_back", refuse)
        with pytest.raises(StorageError, match="SlowDown"):
            change(writer)
        writer._merged = -1  # it is time to merge
        writer.__exit__(None, None, None)
        assert merged == []
    monkeypatch.undo()
    with LakeWriter(uri) as writer:
        assert writer.undone > 0
    assert cells_of(uri) == {"a": 40, "b": 30, "next": 10}
    assert problems(uri) == []


def test_a_commit_asked_for_again_is_made_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = LakeWriter.commit, list[tuple[Any, ...]]()
    monkeypatch.setattr(LakeWriter, "commit", lambda *given: (asked.append(given), real(*given))[1])
    with LakeWriter(uri) as writer:
        with monkeypatch.context() as away:
            create = catalog.create_commit

            def unanswered(uri: str, commit: Commit) -> None:
                create(uri, commit)
                away.setattr(store.writer.catalog, "commits", lambda uri: refuse(uri, None))
                raise StorageError("no answer came")

            away.setattr(catalog, "create_commit", unanswered)
            with pytest.raises(StorageError, match="no answer came"):
                add_dataset(writer, "new", 50, {"RNA": 70})
        assert real(*asked[0]).dataset["dataset_id"] == "new"
    assert cells_of(uri) == {"a": 40, "b": 30, "new": 50}
    assert problems(uri) == []


def test_a_census_client_at_a_commits_timestamp_sees_what_was_committed_alone(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LakeWriter(uri) as writer:
        fail_once(monkeypatch, "record", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            add_dataset(writer, "new", 50, {"RNA": 70})
        assert cells_of(uri) == {"a": 40, "b": 30, "new": 50}, "until the next driver, or the next commit of this one"
        at = tiledbsoma.SOMATileDBContext(timestamp=open_lake(uri).commit.timestamp_ms)
        with cellxgene_census.open_soma(uri=uri, context=at) as census:
            assert len(cellxgene_census.get_obs(census, "homo_sapiens")) == 70
            assert census["census_info"]["datasets"].read().concat().num_rows == 2
