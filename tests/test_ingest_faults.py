"""Ingestion under fire: workers, readers and drivers killed at random moments, full disks, failing storage.

``SOMAFLOW_FAULTS=300 python -m pytest tests/test_ingest_faults.py`` (``make faults``) takes many more moments than the
default, which is meant for every run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import psutil
import pytest
from encoded import add_dataset, encoded_counts, numbered

from ingest.job import JobSettings, SourceSettings
from ingest.run import run
from store import catalog, records
from store.catalog import Commit
from store.errors import MissingError, StorageError
from store.lake import Lake, open_lake
from store.upkeep import collect, recover
from store.validate import validate
from store.writer import LakeWriter

ROOT = Path(__file__).parent.parent
MOMENTS = int(os.environ.get("SOMAFLOW_FAULTS", "10"))
pytestmark = [pytest.mark.ray, pytest.mark.timeout(60 + 30 * MOMENTS)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceSettings, ...]:
    """Three files whose counts encode their coordinates; the first is cut into three spans."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"large": (9000, 40), "small": (700, 60), "last": (300, 25)}
    for name, (n_cells, n_genes) in sizes.items():
        cells = [f"{name}-{number}" for number in range(n_cells)]
        features = numbered("RNA", n_genes)
        obs = pd.DataFrame({"cell_type": np.resize(["B cell", "T cell"], n_cells)}, index=cells)
        made = anndata.AnnData(encoded_counts(0, n_cells, n_genes), obs, pd.DataFrame(index=features.feature_id))
        made.write_h5ad(folder / f"{name}.h5ad")
    return tuple(SourceSettings(uri=str(folder / f"{name}.h5ad")) for name in sizes)


def state(lake: Lake) -> dict[str, object]:
    """All that a reader can see of a lake, without names of fragments and times of day."""
    return {
        "content": [
            (commit.dataset["dataset_id"], commit.dataset["obs_start"], commit.content) for commit in lake.current
        ],
        "obs": lake.obs("homo_sapiens").to_pandas().to_csv(),
        "var": lake.var("homo_sapiens", "RNA").to_pandas().to_csv(),
        "presence": lake.presence("homo_sapiens", "RNA").toarray().tolist(),
    }


@pytest.fixture(scope="module")
def unbroken(
    sources: tuple[SourceSettings, ...], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> dict[str, object]:
    uri = str(tmp_path_factory.mktemp("lakes") / "unbroken")
    assert [outcome.state for outcome in run(JobSettings(lake=uri, source=sources))] == ["committed"] * 3
    return state(open_lake(uri))


def whole_commits_only(uri: str) -> None:
    """Whoever opens the lake now finds whole datasets."""
    try:
        lake = open_lake(uri)
    except MissingError:
        return
    promised = sum(commit.dataset["n_obs"] for commit in lake.current)
    seen = lake.obs("homo_sapiens", columns=["dataset_id"]).num_rows if lake.organisms else 0
    assert seen == promised
    assert [check for check in validate(lake) if check.problem] == []


def as_in_the_file(lake: Lake, path: Path) -> None:
    """The lake holds each cell of a source under its name, with its counts."""
    expected = anndata.read_h5ad(path)
    obs = lake.obs("homo_sapiens", f"dataset_id == {path.stem!r}", ["cell_id"]).to_pandas()
    assert obs["cell_id"].tolist() == expected.obs_names.tolist()
    ids = lake.var("homo_sapiens", "RNA").to_pandas().set_index("feature_id")["soma_joinid"]
    counts = lake.counts("homo_sapiens", "RNA", obs["soma_joinid"].to_numpy())
    assert counts.sum() == expected.X.sum()
    assert (counts[:, ids.loc[expected.var_names].to_numpy()] != expected.X).nnz == 0


WORKER = re.compile(r"ray::(IDLE|names|inspect|check|write)\b")
"""Ray's workers that do an ingestion's tasks, or none. With Ray's own agents the node dies, and an actor that Ray Train
left running keeps a CPU for good when it is started again."""


def workers(what: str) -> list[psutil.Process]:
    """Processes below this one that do an ingestion's work."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and (WORKER.match(words[0]) if what == "ray::" else what in words):
            found.append(process)
    return found


class Shooting(threading.Thread):
    """Kills one process of a kind after ``delay_s``, while something else runs, and looks at the lake all the time.

    ``seen`` holds what it saw: cells in obs, cells that the commits promise.
    """

    def __init__(self, uri: str, what: str, delay_s: float, pick: int) -> None:
        super().__init__(daemon=True)
        self.uri, self.what, self.delay_s, self.pick = uri, what, delay_s, pick
        self.killed = ""
        self.seen: list[tuple[int, int]] = []
        self.over = threading.Event()

    def run(self) -> None:
        begin = time.monotonic()
        while not self.over.is_set():
            if not self.killed and time.monotonic() - begin > self.delay_s:
                targets = workers(self.what)
                if targets:
                    target = targets[self.pick % len(targets)]
                    self.killed = " ".join(target.cmdline())[:60] or "?"
                    os.kill(target.pid, signal.SIGKILL)
            if Path(self.uri, "somaflow/lake.json").exists():
                lake = open_lake(self.uri)
                promised = sum(commit.dataset["n_obs"] for commit in lake.current)
                rows = lake.obs("homo_sapiens", columns=["dataset_id"]).num_rows if lake.organisms else 0
                self.seen.append((rows, promised))
            time.sleep(0.02)


def shots(what: str, share: float, seed: int) -> Iterator[tuple[str, float, int]]:
    rng = np.random.default_rng(seed)
    for _ in range(max(1, round(MOMENTS * share))):
        yield what, float(rng.uniform(0.0, 1.8)), int(rng.integers(100))


@pytest.mark.parametrize(("what", "share", "seed"), [("ray::", 0.4, 1), ("ingest.sandbox", 0.3, 2)])
def test_killed_workers_and_readers_change_nothing_in_the_end(
    tmp_path: Path, sources: tuple[SourceSettings, ...], unbroken: dict[str, object], what: str, share: float, seed: int
) -> None:
    hits = 0
    for number, (kind, delay_s, pick) in enumerate(shots(what, share, seed)):
        uri = str(tmp_path / f"lake{number}")
        shooting = Shooting(uri, kind, delay_s, pick)
        shooting.start()
        first = run(JobSettings(lake=uri, source=sources))
        shooting.over.set()
        shooting.join()
        hits += bool(shooting.killed)
        assert shooting.seen
        assert all(rows == promised for rows, promised in shooting.seen), shooting.seen
        whole_commits_only(uri)
        if what == "ray::":
            assert [outcome.state for outcome in first] == ["committed"] * 3, (shooting.killed, first)
        else:
            assert all(outcome.state == "committed" or "was killed" in outcome.error for outcome in first), first
        second = [] if what == "ray::" else run(JobSettings(lake=uri, source=sources))
        assert {outcome.state for outcome in second} <= {"committed", "present"}, second
        for source in sources:
            as_in_the_file(open_lake(uri), Path(source.uri))
        if all(outcome.state == "committed" for outcome in first):
            assert state(open_lake(uri)) == unbroken
    assert hits >= MOMENTS * share / 2


def raylets(mark: str) -> list[psutil.Process]:
    """Return the raylets of drivers that got a mark; those of others on this machine are let alone."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if "raylet" in (process.info["name"] or "") and process.environ().get("SOMAFLOW_MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile, or is of another user
    return found


def test_killed_drivers_change_nothing_in_the_end(
    tmp_path: Path, sources: tuple[SourceSettings, ...], unbroken: dict[str, object]
) -> None:
    rng = np.random.default_rng(3)
    mark = str(tmp_path)
    seen: list[int] = []
    whole_s = 0.0  # from start-up to the end of the first driver, which nobody kills
    for number in range(-1, max(1, round(MOMENTS * 0.3))):
        uri = str(tmp_path / f"lake{number}")
        command = [sys.executable, "-m", "ingest", "run", *(source.uri for source in sources), "--lake", uri]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SOMAFLOW_MARK": mark}
        driver = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # start-up takes some seconds; moments lie behind it
        patience = float(rng.uniform(0.0, whole_s))
        started = time.monotonic()
        while not Path(uri, "somaflow/running").exists() and time.monotonic() - started < 20 and driver.poll() is None:
            time.sleep(0.02)
        if number < 0:
            begin, marked = time.monotonic(), False
            while driver.poll() is None and time.monotonic() - begin < 200:
                marked = marked or bool(raylets(mark))
                time.sleep(0.1)
            assert driver.wait(1) == 0
            whole_s = time.monotonic() - begin
            assert marked, "its raylet was not found, so none would be missed below"
            continue
        try:
            driver.wait(patience)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
        whole_commits_only(uri)
        recover(uri)
        seen.append(open_lake(uri).commit.number)
        run(JobSettings(lake=uri, source=sources))
        assert collect(uri).writes == 0
        whole_commits_only(uri)
        assert state(open_lake(uri)) == unbroken
    assert len(set(seen)) > 1 or len(seen) < 8, "every driver was killed at the same commit"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = raylets(mark)
        if not left:
            return
        time.sleep(0.5)
    for process in left:
        process.kill()
    pytest.fail("Ray's processes outlived their killed driver")


def test_a_changed_file_becomes_a_new_version_and_the_same_adds_nothing(tmp_path: Path, ray_cluster: None) -> None:
    path, uri = tmp_path / "a.h5ad", str(tmp_path / "lake")

    def ingest(n_cells: int) -> tuple[str, int | None]:
        features = pd.DataFrame(index=numbered("RNA", 20).feature_id)
        obs = pd.DataFrame(index=[f"c{number}" for number in range(n_cells)])
        anndata.AnnData(encoded_counts(0, n_cells, 20), obs, features).write_h5ad(path)
        (outcome,) = run(JobSettings(lake=uri, source=(SourceSettings(uri=str(path)),)))
        return outcome.error or outcome.state, outcome.commit

    assert ingest(60) == ("committed", 1)
    assert ingest(60) == ("present", None)
    assert ingest(50) == ("committed", 2)
    assert open_lake(uri).obs("homo_sapiens").num_rows == 50
    assert open_lake(uri, 1).obs("homo_sapiens").num_rows == 60
    whole_commits_only(uri)


def test_a_job_ends_where_a_failed_commit_cannot_be_taken_back_and_goes_on_when_the_store_is_there_again(
    tmp_path: Path, sources: tuple[SourceSettings, ...], unbroken: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "lake")
    with LakeWriter(uri):
        pass
    with monkeypatch.context() as away:

        def shut(uri: str, commit: Commit) -> None:
            raise StorageError(f"{uri}: the store is away")

        away.setattr(catalog, "create_commit", shut)
        with pytest.raises(StorageError, match="the store is away"):
            run(JobSettings(lake=uri, source=sources))
    (report,) = records.read_all(f"{uri}/somaflow/reports")
    assert report["datasets"][0]["state"] == "refused"
    assert [outcome.state for outcome in run(JobSettings(lake=uri, source=sources))] == ["committed"] * 3
    assert state(open_lake(uri)) == unbroken


def test_of_two_drivers_one_is_told_to_wait(
    tmp_path: Path, sources: tuple[SourceSettings, ...], ray_cluster: None
) -> None:
    from store.writer import LakeWriter

    uri = str(tmp_path / "lake")
    with LakeWriter(uri):
        command = [sys.executable, "-m", "ingest", "run", sources[2].uri, "--lake", uri]
        told = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
        )
    assert told.returncode == 6
    assert f"the lake is being written by process {os.getpid()}" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from encoded import add_dataset
from store.errors import StorageError
from store.writer import LakeWriter
try:
    with LakeWriter({uri!r}) as writer:
        add_dataset(writer, "second", 3000, {{"RNA": 60, "protein": 5}})
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("limit", [1_500, 5_000, 9_000, 30_000])
def test_a_full_disk_is_said_and_leaves_the_lake_as_it_was(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands for a full disk: writes fail in the middle."""
    uri = str(tmp_path / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 70, {"RNA": 40})
    script = textwrap.dedent(FULL.format(tests=str(ROOT / "tests"), uri=uri, limit=limit))
    for _ in range(4):
        failed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
        whole_commits_only(uri)
        if failed.returncode != -signal.SIGABRT:  # TileDB was seen to abort in a failed write
            break
    assert failed.returncode == 5, failed.stderr[-2000:]
    assert uri in failed.stdout
    assert "free some space" in failed.stdout
    whole_commits_only(uri)
    assert open_lake(uri).obs("homo_sapiens").num_rows == 70
    with LakeWriter(uri) as writer:
        add_dataset(writer, "second", 3000, {"RNA": 60, "protein": 5})
    whole_commits_only(uri)
    assert open_lake(uri).obs("homo_sapiens").num_rows == 3070
