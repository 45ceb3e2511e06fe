"""Who holds a lake is left alone while it lives, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from store import lock, records
from store.errors import ConflictError
from store.lock import WriterLock

NO_PROCESS = 2**22 + 1
"""More than Linux counts to."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 2.0)
    monkeypatch.setattr(lock, "BEAT_S", 0.1)


@pytest.fixture
def contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriterLock]:
    """A driver in a container that shares the host's name: its process has another number there, or none."""
    held = WriterLock(str(tmp_path / "lake"))
    with monkeypatch.context() as there:
        there.setattr(lock.os, "readlink", lambda path: "pid:[1]")
        there.setattr(lock.os, "getpid", lambda: NO_PROCESS)
        held.acquire()
    yield held
    held.release()


def test_a_living_driver_in_another_container_of_this_host_is_waited_for(contained: WriterLock) -> None:
    with pytest.raises(ConflictError, match="is being written by process"):
        WriterLock(contained.lake_uri).acquire()
    contained.check()


def test_a_silent_driver_in_another_container_of_this_host_is_passed_as_one_elsewhere(contained: WriterLock) -> None:
    contained._stop.set()
    assert contained._thread is not None
    contained._thread.join()
    here = WriterLock(contained.lake_uri)
    here.acquire()
    try:
        assert here.passed_elsewhere
        with pytest.raises(ConflictError, match="did not show any life"):
            contained.check()
    finally:
        here.release()


def test_the_lock_of_a_version_that_told_no_place_is_waited_for(tmp_path: Path) -> None:
    with_place = WriterLock(str(tmp_path / "lake"))
    with_place.acquire()
    try:
        record = with_place._record(with_place.number)
        values = records.read(record) or {}
        del values["space"]
        records.replace(record, {**values, "pid": NO_PROCESS})
        with pytest.raises(ConflictError, match="is being written by process"):
            WriterLock(str(tmp_path / "lake")).acquire()
    finally:
        with_place.release()


def test_a_driver_whose_process_the_system_hides_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = WriterLock(str(tmp_path / "lake"))
    held.acquire()
    try:
        monkeypatch.setattr(lock, "_born", lambda pid: lock.ALIVE)  # as where /proc is mounted with hidepid
        with pytest.raises(ConflictError, match="is being written by process"):
            WriterLock(str(tmp_path / "lake")).acquire()
    finally:
        held.release()
