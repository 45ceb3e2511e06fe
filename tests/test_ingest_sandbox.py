"""Reading foreign files: what lies is refused with its reason, in a child that cannot harm anything else."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from encoded import add_dataset
from hostile_files import CANARY, CORRUPTIONS, corrupt, honest, hostile_archives

from ingest import turn
from ingest.job import JobSettings, SourceSettings
from ingest.preflight import members
from ingest.run import run
from ingest.sandbox import PART_ROWS, Reader
from ingest.sources import census
from ingest.turn import made_once, scratch_of, turned
from store.errors import InputRefused, StorageError, is_of_memory
from store.hdf5 import check_hdf5
from store.lake import open_lake
from store.writer import LakeWriter


def reader(path: Path, **limits: float) -> Reader:
    memory_mb, timeout_s = int(limits.get("memory_mb", 1024)), limits.get("timeout_s", 60.0)
    return Reader(SourceSettings(uri=str(path)), "x", memory_mb=memory_mb, timeout_s=timeout_s)


def take(path: Path) -> None:
    """Do with a file what an ingestion does, up to the first problem."""
    with reader(path) as opened:
        values, plan, _ = opened.inspect()
        problems = list(values["problems"])
        for measurement in plan.features:
            problems += opened.check(measurement, (0, plan.n_obs), 2**20, values["fingerprint"])["problems"]
            if not problems:
                opened.rows(measurement, 0, plan.n_obs, len(plan.features[measurement]), values["fingerprint"])
    if problems:
        raise InputRefused(f"{path}: {problems}")


@pytest.mark.parametrize("change", CORRUPTIONS, ids=lambda change: change.__name__)
def test_a_hostile_file_is_refused_with_its_reason_and_harms_nobody(tmp_path: Path, change: object) -> None:
    path = corrupt(tmp_path, change)  # type: ignore[arg-type]
    begin = time.monotonic()
    with pytest.raises(InputRefused) as caught:
        take(path)
    assert re.search(CORRUPTIONS[change], str(caught.value)), caught.value  # type: ignore[index]
    assert str(path) in str(caught.value)
    assert CANARY.decode()[:10] not in str(caught.value)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("indptr", [[0, 3, 1, 4], [0, 2**63 - 1, -5, 4]])
def test_rows_that_a_child_made_up_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indptr: list[int]
) -> None:
    sent = {
        "values": pa.table({"data": [1.0] * 4, "indices": [0, 1, 2, 0]}),
        "ends": pa.table({"indptr": pa.array(indptr, pa.int64())}),
    }
    with reader(honest(tmp_path / "a.h5ad")) as opened:
        monkeypatch.setattr(opened, "_ask", lambda *_, **__: ({}, sent))
        with pytest.raises(InputRefused, match="sent rows that are no matrix"):
            opened.rows("RNA", 0, 3, 3, "")


@pytest.mark.parametrize("cut", [0, 1, 700, 5000])
def test_torn_and_empty_files_are_refused(tmp_path: Path, cut: int) -> None:
    path = honest(tmp_path / "torn.h5ad")
    path.write_bytes(path.read_bytes()[:cut])
    with reader(path) as opened, pytest.raises(InputRefused, match="not a readable HDF5 file"):
        opened.inspect()


def test_flipped_bytes_never_crash_the_caller(tmp_path: Path) -> None:
    path = honest(tmp_path / "a.h5ad")
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(6):
        damaged = bytearray(good)
        for at in rng.integers(0, len(good), 40):
            damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with reader(path) as opened:
            try:
                values, plan, _ = opened.inspect()
                opened.check("RNA", (0, plan.n_obs), 2**20, values["fingerprint"])
            except InputRefused as error:
                assert str(path) in str(error), number  # noqa: PT017


def test_all_published_files_pass_the_preflight(shared_data: Path) -> None:
    seen = 0
    for path in sorted(shared_data.rglob("*")):
        if path.suffix in (".h5ad", ".h5", ".h5mu", ".loom"):
            with h5py.File(path, "r") as file:
                check_hdf5(file, path.name)
            seen += 1
    assert seen > 40


def test_a_crash_a_stall_and_a_kill_are_told_apart_and_refuse_only_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = honest(tmp_path / "a.h5ad")
    with reader(path) as opened:
        os.kill(opened.pid, signal.SIGSEGV)
        assert opened.inspect()[1].n_obs == 40  # one crash is a library's, two are the file's
    start = Reader._start

    def start_and_crash(self: Reader) -> None:
        start(self)
        os.kill(self.pid, signal.SIGSEGV)

    with monkeypatch.context() as patched:
        patched.setattr(Reader, "_start", start_and_crash)
        with reader(path) as opened, pytest.raises(InputRefused, match=r"crashed \(SIGSEGV\): the file is damaged"):
            opened.inspect()
    with reader(path) as opened:
        os.kill(opened.pid, signal.SIGKILL)
        with pytest.raises(InputRefused, match="was killed; was the machine out of memory"):
            opened.inspect()
    with reader(path, timeout_s=1.0) as opened:
        os.kill(opened.pid, signal.SIGSTOP)
        with pytest.raises(InputRefused, match="took longer than 1 s and was stopped"):
            opened.inspect()
    with reader(path) as opened:
        assert opened.inspect()[1].n_obs == 40


def test_a_child_that_leaves_just_as_it_is_asked_is_followed_by_another(tmp_path: Path) -> None:
    with reader(honest(tmp_path / "honest.h5ad")) as opened:
        opened._stop()  # in its place one that has closed its pipes and is about to end, as after a long idle time
        request_read, opened._request = os.pipe()
        opened._answer, answer_write = os.pipe()
        opened._child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
        os.close(request_read)
        os.close(answer_write)
        assert opened._child.poll() is None
        assert opened.inspect()[1].n_obs > 0


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = honest(tmp_path / "a.h5ad")
    with reader(path) as opened:
        values, _, _ = opened.inspect()
        assert opened.rows("RNA", 0, 10, 30, values["fingerprint"]).shape == (10, 30)
    honest(path, cells=41)
    with reader(path) as opened, pytest.raises(InputRefused, match="changed while it was being read"):
        opened.rows("RNA", 0, 10, 30, values["fingerprint"])


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    opened = reader(honest(tmp_path / "a.h5ad"))
    opened.inspect()
    os.close(opened._request)
    opened._request = os.open(os.devnull, os.O_WRONLY)
    assert opened._child.wait(timeout=10) == 0
    opened.close()


def test_hostile_archives_write_nothing_anywhere(tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    for path, reason in hostile_archives(tmp_path / "archives").items():
        into = tmp_path / "into" / path.name
        into.mkdir(parents=True)
        with pytest.raises(InputRefused, match=reason):
            members(path, into)
        assert list(into.iterdir()) == []
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "into/evil").exists()


@pytest.mark.ray
def test_hostile_files_beside_honest_ones_take_nothing_into_the_lake(tmp_path: Path, ray_cluster: None) -> None:
    bad = [corrupt(tmp_path, change) for change in list(CORRUPTIONS)[:3]]
    good = honest(tmp_path / "good.h5ad")
    done = run(
        JobSettings(lake=str(tmp_path / "lake"), source=tuple(SourceSettings(uri=str(path)) for path in [*bad, good]))
    )
    assert [outcome.state for outcome in done] == ["refused", "refused", "refused", "committed"]
    assert open_lake(str(tmp_path / "lake")).obs("homo_sapiens").num_rows == 40
    for path in (tmp_path / "lake").rglob("*"):
        if path.is_file():
            assert CANARY not in path.read_bytes()


def test_a_matrix_in_any_order_is_turned_to_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    expected = scipy.sparse.random(300, 70, 0.2, "csc", random_state=3, dtype=np.float32).tocoo()
    order = np.random.default_rng(0).permutation(expected.nnz)

    def parts() -> object:
        for start in range(0, len(order), 97):
            here = order[start : start + 97]
            yield expected.row[here], expected.col[here], expected.data[here]
        yield np.array([5, 5]), np.array([9, 9]), np.array([1.0, 2.0])

    rows = turned(["a"], (300, 70), parts)  # type: ignore[arg-type]
    whole = expected.toarray()
    whole[5, 9] += 3
    for start, stop in ((0, 300), (0, 0), (17, 18), (5, 200)):
        assert rows(start, stop).shape == (stop - start, 70)
        assert np.allclose(rows(start, stop).toarray(), whole[start:stop])
    again = turned(["a"], (300, 70), lambda: iter([]))
    assert (again(0, 300) != rows(0, 300)).nnz == 0
    with pytest.raises(InputRefused, match="outside the matrix: rows 3 to 300 of 300"):
        turned(["b"], (300, 70), lambda: iter([(np.array([3, 300]), np.array([0, 0]), np.array([1.0, 1.0]))]))
    monkeypatch.setenv("SOMAFLOW_SCRATCH", "/proc/none")
    with pytest.raises(StorageError, match="SOMAFLOW_SCRATCH=FOLDER"):
        turned(["a"], (300, 70), lambda: iter([]))


def large(path: Path, cells: int) -> Path:
    """A file of many cells, each with one count."""
    counts = scipy.sparse.csr_matrix((np.ones(cells, "f4"), np.arange(cells) % 30, np.arange(cells + 1)), (cells, 30))
    types = pd.Categorical.from_codes(np.arange(cells) % 3, categories=["T cell", "B cell", "monocyte"])
    obs = pd.DataFrame({"cell_type": types}, index=np.char.add("cell-", np.arange(cells).astype(str)))
    anndata.AnnData(counts, obs, pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(30)])).write_h5ad(path)
    return path


def test_obs_comes_in_parts_and_is_whole(tmp_path: Path) -> None:
    cells = 2 * PART_ROWS + 5
    with reader(large(tmp_path / "large.h5ad", cells)) as opened:
        _, plan, tables = opened.inspect()
    obs = tables["obs"]
    assert plan.n_obs == len(obs) == cells
    assert obs["cell_id"].num_chunks == 3
    assert obs["cell_id"][cells - 1].as_py() == f"cell-{cells - 1}"
    assert obs["cell_type_ontology_term_id"].type.index_type.bit_width == 8  # a byte for each cell
    assert (
        obs["cell_type_ontology_term_id"][PART_ROWS * 2].as_py()
        == ["CL:0000084", "CL:0000236", "CL:0000576"][PART_ROWS * 2 % 3]
    )


def test_a_dataset_that_needs_more_memory_than_there_is_says_so(tmp_path: Path) -> None:
    with (
        reader(large(tmp_path / "large.h5ad", 1_500_000), memory_mb=512) as opened,
        pytest.raises(InputRefused, match="worker_memory_mb = 512; raise worker_memory_mb"),
    ):
        opened.inspect()


def test_a_lake_of_ours_is_read_as_a_census(tiny_lake: Path) -> None:
    source = SourceSettings(uri=str(tiny_lake), kind="census", where="cell_type == 'even'")
    with Reader(source, "homo_sapiens/second", memory_mb=1024, timeout_s=60) as opened:
        values, plan, tables = opened.inspect()
        assert values["problems"] == []
        assert plan.n_obs == 45
        assert tables["obs"]["cell_id"].to_pylist() == [f"second-{cell}" for cell in range(0, 90, 2)]
        rows = opened.rows("RNA", 3, 5, len(plan.features["RNA"]), values["fingerprint"])
    lake = open_lake(str(tiny_lake))
    assert (rows != lake.counts("homo_sapiens", "RNA", 150 + np.array([6, 8]))[:, : rows.shape[1]]).nnz == 0


def test_intermediate_files_go_after_a_week_or_where_the_disk_gets_full_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    scratch = scratch_of().parent
    free = [50, 50, 50, 5, 5, 50]

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(total=100, free=free.pop(0))

    def left(name: str) -> set[str]:
        made_once(scratch_of(name), lambda: None)
        there = {path.name for path in scratch.iterdir() if path.is_dir()}
        return {known for known in ("week", "day", "hours", "new", "other", "third") if scratch_of(known).name in there}

    monkeypatch.setattr("ingest.turn.shutil.disk_usage", usage)
    for name, hours in (("week", 24 * 8), ("day", 24), ("hours", 2)):
        scratch_of(name).mkdir(parents=True)
        os.utime(scratch_of(name), (time.time() - hours * 3600,) * 2)
    assert left("new") == {"day", "hours", "new"}
    assert left("other") == {"new", "other"}
    monkeypatch.setattr("ingest.turn.shutil.disk_usage", lambda path: SimpleNamespace(total=100, free=5))
    assert left("third") == {"new", "other", "third"}, "these are in use"
    assert turn._opened(tmp_path / "removed by another process") > time.time() - 60


def test_what_others_keep_in_a_scratch_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    made_once(scratch_of("old"), lambda: None)
    theirs = [tmp_path / "thesis", tmp_path / scratch_of("x").name, scratch_of().parent / "notes"]
    for folder in theirs:
        folder.mkdir()
    for folder in (*theirs, scratch_of("old")):
        os.utime(folder, (time.time() - 24 * 365 * 3600,) * 2)
    made_once(scratch_of("new"), lambda: None)
    assert not scratch_of("old").exists()
    assert all(folder.is_dir() for folder in theirs)


def test_a_scratch_folder_that_another_user_made_or_may_write_to_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path))
    planted, made = scratch_of("a"), list[str]()
    planted.mkdir(parents=True)
    (planted / "done").touch()
    planted.parent.chmod(0o777)
    with pytest.raises(StorageError, match=r"but drwxrwxrwx of user .*remove it, or set SOMAFLOW_SCRATCH=FOLDER"):
        made_once(planted, lambda: made.append("open to all"))
    planted.parent.chmod(0o755)
    made_once(planted, lambda: made.append("done before"))
    assert planted.parent.stat().st_mode & 0o777 == 0o700
    elsewhere = tmp_path / "elsewhere"
    planted.parent.rename(elsewhere)
    planted.parent.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="but lrwxrwxrwx of user"):
        made_once(planted, lambda: made.append("a link"))
    planted.parent.unlink()
    elsewhere.rename(planted.parent)
    me = os.getuid()
    monkeypatch.setattr("ingest.turn.os.getuid", lambda: me + 1)
    with pytest.raises(StorageError, match=f"of user {me},"):
        made_once(planted, lambda: made.append("another user's"))
    assert made == []


def test_all_cells_of_a_census_are_looked_at_once_on_a_machine_for_each_state_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))
    scans, read = [], census._parts

    def counted(source: SourceSettings, obs: Any, columns: list[str], *words: Any) -> Any:
        scans.append(source.where) if not words else None
        return read(source, obs, columns, *words)

    monkeypatch.setattr(census, "_parts", counted)
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 50, {"RNA": 40})
        add_dataset(writer, "second", 30, {"RNA": 40})
    whole, even = SourceSettings(uri=uri, kind="census"), SourceSettings(uri=uri, where="cell_type == 'even'")
    assert census.names(whole) == ["homo_sapiens/first", "homo_sapiens/second"]
    assert census.open_dataset(whole, "homo_sapiens/second").n_obs == 30
    assert scans == [None]
    assert census.open_dataset(even, "homo_sapiens/second").n_obs == 15
    assert census.open_dataset(even, "homo_sapiens/first").n_obs == 25
    assert scans == [None, even.where]
    with LakeWriter(uri) as writer:
        add_dataset(writer, "third", 20, {"RNA": 40})
    census._open.cache_clear()
    assert census.names(whole) == ["homo_sapiens/first", "homo_sapiens/second", "homo_sapiens/third"]
    assert census.open_dataset(whole, "homo_sapiens/third").n_obs == 20
    assert scans == [None, even.where, None]


def test_a_census_whose_cells_change_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMAFLOW_SCRATCH", str(tmp_path / "scratch"))
    uri, read = str(tmp_path / "lake"), census._parts
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 50, {"RNA": 40})
    source = SourceSettings(uri=uri, kind="census")

    def overtaken(*words: Any) -> Any:
        yield from read(*words)
        with LakeWriter(uri) as writer:
            add_dataset(writer, "second", 30, {"RNA": 40})

    with monkeypatch.context() as patch:
        patch.setattr(census, "_parts", overtaken)
        with pytest.raises(InputRefused, match="changed while it was being read; run the same command again"):
            census.names(source)
    assert census.names(source) == ["homo_sapiens/first", "homo_sapiens/second"]
    with pytest.raises(InputRefused, match="changed while it was being read"):  # this process opened it before
        census.open_dataset(source, "homo_sapiens/second")
    with pytest.raises(InputRefused, match="changed while it was being read"):
        census.open_dataset(source, "homo_sapiens/none")
    monkeypatch.setenv("SOMAFLOW_SCRATCH", "/proc/none")
    with pytest.raises(StorageError, match="SOMAFLOW_SCRATCH=FOLDER"):
        census.names(source)


@pytest.mark.parametrize(
    ("error", "of_memory"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError("Can't synchronously read data (memory allocation failed for chunk)"), True),
        (RuntimeError("TileDB internal: std::bad_alloc"), True),
        (OSError("Can't synchronously read data (inflate() failed)"), False),
        (ValueError("x"), False),
    ],
)
def test_libraries_say_in_many_words_that_no_memory_is_left(error: Exception, of_memory: bool) -> None:
    assert is_of_memory(error) == of_memory
