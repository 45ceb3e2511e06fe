"""Jobs on a running cluster: names, attempts, a driver that dies, exit statuses, addresses; by commands as typed."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest
from ports import free_ports
from ray.job_submission import JobDetails, JobSubmissionClient
from ray_head import Head, ray_head
from small_checkpoint import write_checkpoint

from infra import jobs as program
from infra.jobs import as_json, attempts_of, name_of
from store.cluster import JOB, cluster_address, refuse_fleeting, runtime_env
from store.errors import UsageError
from store.lake import open_lake
from store.snapshot import SnapshotSettings, create_snapshot
from train import launch
from train.folder import valid_states
from train.loop import Run
from train.record import read_metrics
from train.settings import RunSettings

ROOT = Path(__file__).parent.parent
PACKAGE_BYTES = 3 * 2**20
LIMIT_S = 200

DATASETS = ["first", "second"]
SOURCE = """
[[source]]
uri = "simulated:"
dataset_id = "{name}"
simulation = {{ cells = {cells}, genes = 60, peaks = 20, seed = 1 }}
"""

TRAIN = """\
lake = "{lake}"
snapshot = "s"
output = "{output}"
name = "tiny"
steps = 400
checkpoint_every = 20
workers = 1
deterministic = true
report = false
trackers = []
model = {{ width = 16, layers = 1, heads = 2 }}
data = {{ global_batch = 24, block = 64, window = 2, tokens = 32 }}
optim = {{ warmup_steps = 2, lr = 0.003 }}
"""


# ---------------------------------------------------------------------- without a cluster
def test_a_name_follows_from_the_command_and_the_content_of_the_files_it_names(tmp_path: Path) -> None:
    recipe = tmp_path / "RUN.toml"
    recipe.write_text("steps = 1")
    words = ["python", "-m", "train", "RUN.toml", "--set", "knowledge=sets.gmt"]
    name = name_of(words, tmp_path)
    assert name.startswith("train-run-")
    assert name_of(list(words), tmp_path) == name
    assert name_of([*words, "--set", "steps=2"], tmp_path) != name
    (tmp_path / "sets.gmt").write_text("A\tB")
    with_sets = name_of(words, tmp_path)
    assert with_sets != name
    recipe.write_text("steps = 3")
    assert name_of(words, tmp_path) not in (name, with_sets)
    recipe.write_text("steps = 1")
    assert name_of(words, tmp_path) == with_sets


def test_a_driver_joins_what_is_given_then_ray_address_and_else_starts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(None) is None
    assert cluster_address("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address(None) == "head:6379"
    assert cluster_address("auto") == "head:6379"
    assert cluster_address("other:6379") == "other:6379"
    assert cluster_address("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert cluster_address("other:6379") == "other:6379"
    for address in (None, "auto"):
        with pytest.raises(UsageError, match=r"RAY_ADDRESS is 'http://head:8265', a dashboard.* or submit: "):
            cluster_address(address)
    for address in ("nonsense", "127.0.0.1:port", ":6379", "head:6379/x"):
        with pytest.raises(UsageError, match=f"--address is '{address}', which names no cluster: give HOST:6379"):
            cluster_address(address)
    for address in ("[::1]:6379", "ray://head:10001"):
        assert cluster_address(address) == address


def test_a_job_does_not_write_where_ray_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_fleeting(lake="lake")
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    refuse_fleeting(lake="s3://bucket/lake", output="/shared/runs")
    with pytest.raises(UsageError, match=r"output='runs' lies in the job's working directory, which Ray deletes"):
        refuse_fleeting(lake="s3://bucket/lake", output="runs")


def test_packages_travel_with_a_driver_from_outside_and_not_twice_with_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = {"py_modules": [str(ROOT / "train"), str(ROOT / "store")]}
    monkeypatch.chdir(ROOT)
    assert runtime_env(["train", "store"]) == carried
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    assert runtime_env(["train", "store"]) == {}
    monkeypatch.chdir(tmp_path)
    assert runtime_env(["train", "store"]) == carried
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"py_modules": ["gcs://_ray_pkg_2.zip"]}}))
    assert runtime_env(["train", "store"]) == {}


def test_a_driver_without_gpus_trains_on_those_of_the_cluster_that_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = RunSettings(snapshot="s", address="head:6379")
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 8.0})
    assert launch.on_gpus(settings)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0})
    assert not launch.on_gpus(settings)
    assert launch.on_gpus(settings.model_copy(update={"device": "cuda"})), "their nodes are still to come"
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 8.0})
    assert not launch.on_gpus(settings.model_copy(update={"device": "cpu"}))


def test_gpus_that_a_machine_has_not_are_refused_before_ray_starts(
    tiny_lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(launch, "ray_cluster", None)
    lake = shutil.copytree(tiny_lake, tmp_path / "lake")
    create_snapshot(str(lake), "s", SnapshotSettings(measurements=("RNA",), organisms=("homo_sapiens",)))
    settings = RunSettings(lake=str(lake), snapshot="s", output=str(tmp_path), device="cuda", data={"test_split": ""})
    with pytest.raises(UsageError, match="torch sees no GPU on this machine"):
        launch.launch(settings)


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "words"),
    [
        ([2.0, 2.0], 4, 1, ""),
        ([4.0, 4.0], 2, 4, ""),
        ([2.0], 4, 1, "the cluster has 2 CPUs and the run needs 4: start more nodes, or let it go on with fewer"),
        ([3.0, 3.0, 2.0], 2, 4, "has 8 CPUs, 3 on its largest node, and the run needs 2 times 4 (threads)"),
    ],
)
def test_a_worker_books_a_cpu_of_one_node_for_each_thread(
    nodes: list[float], workers: int, threads: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    alive = [{"Alive": True, "Resources": {"CPU": number}} for number in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [gone, *alive])
    missing = launch._missing(RunSettings(snapshot="s", workers=workers, threads=threads), use_gpu=False)
    assert words in missing
    assert bool(missing) == bool(words)


def test_a_jobs_package_holds_the_code_and_little_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    logging.getLogger("ray").setLevel(logging.WARNING)
    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        names = package.namelist()
    assert {"ingest", "store", "train", "serve", "infra"} <= {name.split("/")[0] for name in names}
    assert not {"tests", "docs", ".git", ".ci", "build", "demo", "lake"} & {name.split("/")[0] for name in names}
    assert (tmp_path / "package.zip").stat().st_size < PACKAGE_BYTES


def test_following_a_log_as_json_is_refused_before_a_cluster_is_asked() -> None:
    line = "infra/jobs.py logs NAME --follow --json --address http://127.0.0.1:9"
    refused = subprocess.run(
        [sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("jobs: logs --follow shows text as it comes, --json is one object at the end; ")


# ---------------------------------------------------------------------- with a client that is none
class Cluster:
    """Answers as Ray's client does, from what a test says of it."""

    def __init__(self, *jobs: JobDetails, log: str = "line 1\nline 2\n", fails: str = "") -> None:
        self.jobs = {str(job.submission_id): job for job in jobs}
        self.log, self.fails = log, fails
        self.stopped: list[str] = []
        self.becomes = "SUCCEEDED"

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def get_job_info(self, submission: str) -> JobDetails:
        if submission not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission} does not exist.")
        job = self.jobs[submission]
        self.jobs[submission] = job.model_copy(update={"status": type(job.status)(self.becomes)})
        return job

    def submit_job(self, *, submission_id: str, entrypoint: str, metadata: dict[str, str], **_: Any) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.jobs[submission_id] = attempt_at(submission_id, entrypoint, "SUCCEEDED", **metadata)

    def stop_job(self, submission: str) -> bool:
        self.stopped.append(submission)
        return True

    def get_job_logs(self, _submission: str) -> str:
        if self.fails:
            raise RuntimeError(self.fails)
        return self.log

    async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
        if submission not in self.jobs:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        if not self.fails:
            yield self.log


def attempt_at(submission: str, command: str, status: str, **metadata: str) -> JobDetails:
    return JobDetails(
        type="SUBMISSION",
        submission_id=submission,
        entrypoint=command,
        status=status,
        message=f"it is {status}",
        driver_exit_code=0 if status == "SUCCEEDED" else None,
        metadata={"name": submission.rpartition("-")[0], "attempt": submission.rpartition("-")[2]} | metadata,
    )


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run the command line in a folder of its own, and return its status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda _: None)

    def run(cluster: Cluster, *words: str) -> int:
        monkeypatch.setattr(program, "connect", lambda _: cluster)
        monkeypatch.setattr("sys.argv", ["jobs.py", *words])
        with pytest.raises(SystemExit) as ended:
            program.main()
        return int(ended.value.code or 0)

    yield run
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("verb", [["submit", "--name", "a", "--wait", "--", "one"], ["logs", "a", "--follow"]], ids=str)
@pytest.mark.parametrize(("gone", "status"), [("closed", 141), ("full", 5)])
def test_a_log_that_cannot_be_shown_is_no_longer_waited_for(
    ask: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: list[str],
    gone: str,
    status: int,
) -> None:
    read, closed = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, open(closed, "w") as pipe:
        monkeypatch.setattr("sys.stdout", {"closed": pipe, "full": full}[gone])
        assert ask(Cluster(attempt_at("a-1", "one", "RUNNING")), *verb) == status
        assert "job a-1 goes on" in capsys.readouterr().err


def test_a_name_is_not_taken_for_that_of_another_command(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for state, again, ways in (("SUCCEEDED", "was", "--again"), ("RUNNING", "is", "stop it first")):
        cluster = Cluster(attempt_at("a-1", "echo one", state))
        assert ask(cluster, "submit", "--name", "a", "--", "echo", "two") == 2
        said = capsys.readouterr().err
        assert said == f"jobs: job a-1 {again} `echo one`, another command: give another --name, or {ways}\n"
        assert list(cluster.jobs) == ["a-1"]
    cluster = Cluster(attempt_at("a-1", "echo one", "SUCCEEDED"), attempt_at("b-1", "echo one", "FAILED"))
    assert ask(cluster, "submit", "--name", "a", "--again", "--", "echo", "two") == 0
    assert ask(cluster, "submit", "--name", "b", "--", "echo", "two") == 0, "a command that failed is corrected"
    assert {"a-2", "b-2"} <= set(cluster.jobs)


def test_a_job_that_asks_for_too_much_says_so_and_gives_way_to_one_that_asks_for_less(
    ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(attempt_at("a-1", "one", "PENDING", resources='{"CPU": 100.0}'))
    cluster.becomes = "PENDING"
    told = 'a-1: it is PENDING (its driver asks for {"CPU": 100.0})\n'
    assert ask(cluster, "status") == 0
    assert told in capsys.readouterr().err
    monkeypatch.setattr(program, "STOP_S", -1)
    assert ask(cluster, "stop", "a") == 1
    assert told + "jobs: job a-1 has not started; it is told to stop" in capsys.readouterr().err
    assert ask(cluster, "submit", "--name", "a", "--cpus", "100", "--", "one") == 0
    assert "job a-1 is pending already: nothing is started" in capsys.readouterr().err
    assert cluster.stopped == ["a-1"]
    assert ask(cluster, "submit", "--name", "a", "--cpus", "1", "--", "one") == 0
    assert "job a-1 has not started, and ends when it does" in capsys.readouterr().err
    assert (cluster.stopped, list(cluster.jobs)) == (["a-1", "a-1"], ["a-1", "a-2"])

    monkeypatch.setattr(program, "PENDING_S", -1)
    waiting = Cluster(attempt_at("a-1", "one", "PENDING", resources='{"CPU": 100.0}'))
    assert ask(waiting, "logs", "a", "--follow") == 0
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpus", "-1"], "'-1' is no amount: a number from 0 on is needed"),
        (["--gpus", "nan"], "'nan' is no amount"),
        (["--resources", '{"big": -1}'], "is not a JSON object of numbers from 0 on"),
        (["--resources", '{"big": null}'], "is not a JSON object of numbers from 0 on"),
        (["--resources", '{"GPU": 2}'], "GPU is no resource of your own: say --gpus 2"),
    ],
    ids=str,
)
def test_amounts_that_no_cluster_has_are_refused(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert ask(Cluster(), "submit", *words, "--", "one") == 2
    assert said in capsys.readouterr().err


def test_a_job_of_somebody_else_with_another_idea_of_attempts_is_shown_beside_ours(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(attempt_at("a-1", "one", "SUCCEEDED"), attempt_at("foreign-1", "x", "SUCCEEDED", attempt="first"))
    assert ask(cluster, "status", "--json") == 0
    told = json.loads(capsys.readouterr().out)["jobs"]
    assert {job["name"]: job["attempt"] for job in told} == {"a": 1, "foreign": 1}
    assert ask(cluster, "logs", "a") == 0
    assert capsys.readouterr().out == cluster.log


def test_a_job_that_the_cluster_no_longer_knows_is_no_longer_waited_for(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(attempt_at("a-1", "one", "RUNNING"))
    with pytest.raises(program.Refused, match=r"no longer knows job b-1 \(its head was restarted\): submit it again"):
        program.wait(cluster, "b-1", print)  # type: ignore[arg-type]


def test_a_log_that_the_cluster_cannot_read_is_missed(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    fails = "Request failed with status code 500: Traceback (most recent call last):\n  at x\nUnicodeError: 0xff\n."
    cluster = Cluster(attempt_at("a-1", "one", "RUNNING"), fails=fails)
    reason = "Request failed with status code 500: UnicodeError: 0xff\n"
    assert ask(cluster, "submit", "--name", "a", "--wait", "--", "one") == 0
    assert capsys.readouterr().err.endswith(f"the log of job a-1 cannot be shown: {reason}")
    assert ask(cluster, "logs", "a") == 5
    assert capsys.readouterr().err == f"jobs: the cluster's answer is of no use: {reason}"


def test_a_folder_that_cannot_travel_is_named(
    ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    large = Cluster(fails="Request failed with status code 413: Maximum request body size 104857600 exceeded.")
    assert ask(large, "submit", "--", "one") == 2
    pipe, refused = capsys.readouterr().err.splitlines()
    assert pipe.startswith(f"{tmp_path}/pipe is a pipe, and packing the folder waits for whoever writes to it")
    assert refused.startswith(f"jobs: the folder {tmp_path} travels with the job, and is larger than the cluster takes")


def test_a_cluster_for_one_command_takes_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(program.Refused, match="RAY_ADDRESS is 'local', a cluster for one command") as refused:
        program.connect(None)
    assert refused.value.status == 2


def test_a_checkout_without_a_commit_names_none(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert program._commit(tmp_path) == {}


# ---------------------------------------------------------------------- on a cluster
@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head") / "log", cpus=4) as running:
        yield running


@pytest.fixture(scope="module")
def training(
    head: Head, tiny_lake: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Future[str]]]:
    """A run that loses its driver and goes on beside other tests: it mostly waits for one process after the other."""
    folder = tmp_path_factory.mktemp("training")
    lake = shutil.copytree(tiny_lake, folder / "lake")
    create_snapshot(str(lake), "s", SnapshotSettings(seed=2, measurements=("RNA",), organisms=("homo_sapiens",)))
    recipe = folder / "run.toml"
    recipe.write_text(TRAIN.format(lake=lake, output=folder / "job"))
    line = printed("python infra/jobs.py submit", "train", head, RUN_toml=recipe)
    with ThreadPoolExecutor(1) as pool:
        yield folder, pool.submit(_kill_a_run_and_submit_it_again, head, line, recipe)


def _kill_a_run_and_submit_it_again(head: Head, line: str, recipe: Path) -> str:
    folder = recipe.parent / "job/tiny"
    with begun(head, line) as waiting:
        wait_until(lambda: len(valid_states(folder / "state")) > 0, "no state")
        kill_drivers(str(recipe))
        said, _ = waiting.communicate(timeout=LIMIT_S)
    assert waiting.returncode == 128 + signal.SIGKILL, said[-3000:]
    assert len(read_metrics(folder / "metrics.jsonl")) < 400, "it was killed too late to tell"
    again = typed(head, line)
    assert again.returncode == 0, again.stdout[-3000:]
    return again.stdout


def typed(head: Head, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line as a user types it into a shell in the checkout, with this Python first in the path."""
    done = subprocess.run(
        shlex.split(line),
        cwd=ROOT,
        env=head.environment | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@contextmanager
def begun(head: Head, line: str) -> Iterator[subprocess.Popen[str]]:
    """Start a line as a user types it; kill it at the end if it goes on."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(shlex.split(line), cwd=ROOT, env=head.environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def jobs(head: Head, line: str) -> subprocess.CompletedProcess[str]:
    verb, _, rest = line.partition(" ")
    return typed(head, f"python infra/jobs.py {verb} --address {head.dashboard} {rest}")


def printed(start: str, package: str, head: Head, **names: Any) -> str:
    """Return the command of infra/README.md that starts so, with its names replaced."""
    lines = (ROOT / "infra/README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(start) and package in line]
    line = line.replace("http://HOST:8265", head.dashboard)
    for name, value in names.items():
        line = line.replace(name.replace("_", "."), str(value))
    return line


def state(head: Head, name: str) -> list[dict[str, Any]]:
    client = JobSubmissionClient(head.dashboard)
    return [as_json(job) for job in attempts_of(client, name)]


def in_the_lake(lake: Path) -> list[str]:
    with suppress(Exception):  # there is no lake yet
        return [commit.dataset["dataset_id"] for commit in open_lake(str(lake)).current]
    return []


def drivers(word: str) -> list[psutil.Process]:
    """Return the drivers of ours whose command holds a word."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if word in " ".join(words) and words[1:2] == ["-m"]:
                found.append(process)
    return found


def kill_drivers(word: str) -> None:
    killed = drivers(word)
    assert killed
    for driver in killed:
        driver.send_signal(signal.SIGKILL)


def wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < until, f"{otherwise} after {LIMIT_S} s"
        time.sleep(0.05)


def content(lake: Path) -> tuple[pd.DataFrame, Any]:
    """Return the cells of a lake in order, and their counts."""
    opened = open_lake(str(lake))
    obs = opened.obs("synthetic_construct")
    return obs.to_pandas(), opened.counts("synthetic_construct", "RNA", obs["soma_joinid"].to_numpy())


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_job_whose_driver_is_killed_goes_on_as_its_second_attempt_and_ends_as_if_nothing_had_been(
    head: Head, training: Any, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for lake in (whole, broken):
        sources = [SOURCE.format(name=name, cells=100 + 20 * place) for place, name in enumerate(DATASETS)]
        lake.with_suffix(".toml").write_text("\n".join([f'lake = "{lake}"', *sources]))
    ray_itself = printed("ray job submit", "ingest", head, JOB_toml=f"{whole}.toml")
    with begun(head, ray_itself) as undisturbed:
        _kill_and_submit_again(head, broken)
        said, _ = undisturbed.communicate(timeout=LIMIT_S)
    assert undisturbed.returncode == 0, said[-3000:]
    ran = [job for job in JobSubmissionClient(head.dashboard).list_jobs() if "ingest" in job.entrypoint]
    assert [bool(job.driver_info) for job in ran] == [True] * 3, "a driver without --address started its own Ray"
    cells, counts = content(broken)
    expected, expected_counts = content(whole)
    pd.testing.assert_frame_equal(cells, expected)
    assert (counts != expected_counts).nnz == 0


def _kill_and_submit_again(head: Head, broken: Path) -> None:
    line = f"-- python -m ingest run {broken}.toml"
    first = json.loads(jobs(head, f"submit --json {line}").stdout)
    name = first["job"]["name"]
    assert (first["how"], first["job"]["submission_id"]) == ("submitted", f"{name}-1")
    attached = json.loads(jobs(head, f"submit --json {line}").stdout)
    assert (attached["how"], attached["job"]["submission_id"]) == ("attached", f"{name}-1")
    wait_until(lambda: bool(in_the_lake(broken)), "nothing is in the lake")
    kill_drivers(f"{broken}.toml")
    assert len(in_the_lake(broken)) < len(DATASETS), "it was killed too late to tell"

    wait_until(lambda: state(head, name)[-1]["state"] == "FAILED", "nobody missed the driver")
    again = jobs(head, f"submit --wait {line}")
    assert again.returncode == 0, again.stdout[-3000:]
    assert "in the lake already" in again.stdout
    status = typed(head, f"python infra/jobs.py status --json {name} --address {head.address}")
    told = json.loads(status.stdout)["jobs"]
    assert [(job["attempt"], job["state"], job["exit_status"]) for job in told] == [
        (1, "FAILED", 137),
        (2, "SUCCEEDED", 0),
    ]
    third = json.loads(jobs(head, f"submit --wait --json {line}").stdout)
    assert (third["how"], third["job"]["attempt"]) == ("done", 2)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_run_whose_driver_is_killed_as_a_job_goes_on_from_its_last_state_and_gets_the_losses_of_the_same_run_here(
    training: tuple[Path, Future[str]],
) -> None:
    folder, again = training
    steps = re.findall(r"^step (\d+) of 400, loss ", again.result(LIMIT_S), re.MULTILINE)
    assert int(steps[0]) > 20, "it did not go on from a state"
    here = tomllib.loads(TRAIN.format(lake=folder / "lake", output=folder / "here"))
    Run(RunSettings.model_validate(here), 1).train()
    losses = [[row["loss"] for row in read_metrics(folder / of / "tiny/metrics.jsonl")] for of in ("job", "here")]
    assert len(losses[0]) == 400
    assert losses[0] == losses[1]


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_waiting_ends_as_the_job_does_and_ctrl_c_leaves_it_running(head: Head) -> None:
    failed = jobs(head, "submit --name fails --cpus 1 --wait -- python -c 'print(\"so far\"); raise SystemExit(3)'")
    assert failed.returncode == 3
    assert "so far" in failed.stdout
    followed = jobs(head, "logs fails --follow")
    assert (followed.returncode, "so far" in followed.stdout) == (3, True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell ignores it, its children do too
    line = f"python infra/jobs.py submit --address {head.dashboard} --name stays --wait -- python -c "
    with begun(head, line + shlex.quote("import time; print('begun'); time.sleep(600)")) as waiting:
        signal.signal(signal.SIGINT, before)
        assert waiting.stdout is not None
        assert any(line == "begun\n" for line in iter(waiting.stdout.readline, ""))
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert f"follow it: python infra/jobs.py logs stays --follow --address {head.dashboard}" in told
    assert [job["state"] for job in state(head, "stays")] == ["RUNNING"]
    assert "begun" in jobs(head, "logs stays").stdout
    stopped = typed(head, printed("python infra/jobs.py stop", "", head, NAME="stays"), RAY_ADDRESS=head.dashboard)
    assert "is stopped" in stopped.stderr
    assert [(job["state"], job["exit_status"]) for job in state(head, "stays")] == [("STOPPED", 7)]


def answers(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/v1/health/ready", trust_env=False).status_code == httpx.codes.OK
    return False


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_server_as_a_job_answers_until_it_is_stopped_and_starts_again_whatever_became_of_its_driver(
    head: Head, tmp_path: Path
) -> None:
    checkpoint, (port, other) = (
        write_checkpoint(tmp_path / "checkpoint", width=16, tokens=32, n_genes=40),
        free_ports(2),
    )

    def submit(name: str, at: int) -> None:
        jobs(head, f"submit --name {name} -- python -m serve run {checkpoint} --port {at}")

    submit("srv", port)
    wait_until(lambda: answers(port), "it does not answer")
    counts = {"counts": {"RNA": [{"ENSG00000000003": 3}]}}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/embed", json=counts, trust_env=False)
    assert (answer.status_code, len(answer.json()["embeddings"])) == (httpx.codes.OK, 1), answer.text

    second = jobs(head, f"submit --wait --name second -- python -m serve run {checkpoint} --port {port}")
    assert second.returncode == 6, second.stderr
    assert "this cluster has a server, and a cluster has one" in second.stdout + second.stderr
    assert answers(port)

    for driver in psutil.process_iter(["cmdline"]):
        words = driver.info["cmdline"] or []
        if words[1:4] == ["-m", "serve", "run"] and str(port) in words:
            driver.kill()
    wait_until(lambda: state(head, "srv")[-1]["state"] == "FAILED", "nobody saw that its driver died")
    assert answers(port), "what a driver leaves answers on"
    elsewhere = jobs(head, f"submit --wait --name elsewhere -- python -m serve run {checkpoint} --port {other}")
    assert f"say --host 127.0.0.1 --port {port}" in elsewhere.stdout + elsewhere.stderr
    submit("srv", port)
    wait_until(
        lambda: len(state(head, "srv")) == 2 and "ready" in jobs(head, "logs srv").stdout, "it is not taken over"
    )
    assert "is stopped" in jobs(head, "stop srv").stderr
    wait_until(lambda: not answers(port), "it still answers")

    submit("moved", other)
    wait_until(lambda: answers(other), "it does not answer at another port")
    assert "is stopped" in jobs(head, "stop moved").stderr
    wait_until(lambda: not answers(other), "it still answers")


@pytest.mark.ray
def test_a_wrong_address_and_a_wrong_name_end_with_one_line(head: Head) -> None:
    nowhere = typed(head, "python infra/jobs.py status --address http://127.0.0.1:9")
    assert nowhere.returncode == 5
    assert nowhere.stderr.startswith("jobs: no Ray dashboard answers at 'http://127.0.0.1:9' (")
    assert len(nowhere.stderr.splitlines()) == 1
    other = typed(head, "python infra/jobs.py status", RAY_ADDRESS=f"http://{head.address}")
    assert (other.returncode, len(other.stderr.splitlines())) == (5, 1)
    assert "this one is from RAY_ADDRESS" in other.stderr
    unknown = jobs(head, "logs never")
    assert unknown.returncode == 5
    assert "no job 'never' is on this cluster" in unknown.stderr
    driver = typed(head, "python -m ingest run simulated:", RAY_ADDRESS=head.dashboard)
    assert driver.returncode == 2
    assert "a dashboard, where jobs are submitted" in driver.stderr
