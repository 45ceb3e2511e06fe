"""A job's driver, without Ray: whatever happens to its lake, it ends, and never seems to work when it does not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serve import jobs, workers
from serve.bulk import CELLS
from serve.settings import JobSettings
from serve.workers import Driver
from store.errors import ConflictError, StorageError

LOST = OSError(28, "No space left on device")


class Work:
    """A bulk job that does what it is told, and the lake's record of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
        self.run, self.held = run, 0
        self.said: list[jobs.Record] = []
        self.error: Exception | None = None
        self.over = threading.Event()
        monkeypatch.setattr(workers, "Bulk", lambda asked: self)
        monkeypatch.setattr(jobs, "write", self._write)
        monkeypatch.setattr("ray.kill", lambda actor: self.over.set())
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(current_actor="this"))
        asked: Any = SimpleNamespace(lake="lake")
        self.driver = Driver(asked, JobSettings(), jobs.Record("1", "lake", "human", "b", "", "m"))

    def __enter__(self) -> Work:
        self.held += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.held -= 1

    def _write(self, lake: str, record: jobs.Record) -> None:
        if self.error is not None:
            raise self.error
        self.said.append(record)


@pytest.mark.parametrize("error", [LOST, StorageError("lake: cannot be written")])
def test_a_job_whose_last_word_cannot_be_written_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*_: Any) -> Any:
        work.error = error
        return SimpleNamespace(n_embedded=1, n_taken_over=0)

    work = Work(monkeypatch, run)
    assert work.driver.begin() is None
    assert work.over.wait(10)
    assert (work.driver.ended(), work.held) == (True, 0)
    again = work.driver.begin()
    assert isinstance(again, ConflictError), "nothing runs there any more"


def test_a_job_goes_on_where_its_progress_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(hire: Any, progress: Callable[[str, int, int], None], stop: Any) -> Any:
        for work.error in (None, LOST, StorageError("lake: cannot be written"), None):
            progress(CELLS, 8, 8)
        return SimpleNamespace(n_embedded=8, n_taken_over=0)

    work = Work(monkeypatch, run)
    assert work.driver.begin() is None
    assert work.over.wait(10)
    assert [(one.state, one.done) for one in work.said] == [("running", 0), ("running", 8), ("running", 8), ("done", 8)]


@pytest.mark.parametrize("error", [LOST, StorageError("lake: cannot be written")])
def test_a_job_that_cannot_write_its_record_is_not_begun(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    work = Work(monkeypatch, lambda *_: SimpleNamespace(n_embedded=1, n_taken_over=0))
    work.error = error
    assert isinstance(work.driver.begin(), StorageError)
    assert (work.held, work.over.is_set()) == (0, False)
    work.error = None
    assert work.driver.begin() is None, "asked again, it starts"
    assert work.over.wait(10)
    assert work.said[-1].state == "done"
