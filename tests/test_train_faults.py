"""Runs that lose a worker, their driver or a node: the curve is that of an unbroken run, the weights bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ranks import together
from safetensors.torch import load_file
from test_train_loop import lake, losses, settings  # noqa: F401  (lake is a fixture)

from infra.nodes import SOON, Nodes, possible
from train.record import read_metrics
from train.state import valid_states

ROOT = Path(__file__).parent.parent
STEPS = 60
LIMIT_S = 300
RECOVERED_S = 400
"""Seconds that a run may take from a cut link to its end."""
CHAOS = {
    "RAY_testing_asio_delay_us": ",".join(
        f"{call}=0:20000"
        for call in ("NodeManagerService.grpc_server.RequestWorkerLease", "CoreWorkerService.grpc_server.PushTask")
    ),
    "RAY_testing_rpc_failure": json.dumps(
        {
            f"ray::rpc::NodeManagerService.grpc_client.{call}": {
                "num_failures": 3,
                "req_failure_prob": 30,
                "resp_failure_prob": 30,
            }
            for call in ("RequestWorkerLease", "PrepareBundleResources", "CommitBundleResources")
        }
    ),
}
"""Lets calls that place workers and ask them come up to 20 ms late, and some of them be lost, or their replies."""


@pytest.fixture(scope="module")
def whole(lake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Where a run of two workers lies that lost nothing."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    together(2, [settings(lake, output, steps=STEPS, workers=2, checkpoint_every=5, deterministic=True)])
    return output


def recipe(lake: str, output: Path) -> Path:  # noqa: F811
    """Write a run's settings as a file, as a user does."""
    told = settings(lake, output, steps=STEPS, workers=2, checkpoint_every=5, deterministic=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in told.model_dump(mode="json").items() if value is not None]
    plain = [line for line in lines if "= {" not in line]
    tables = [
        f"[{name}]\n" + _table(getattr(told, name).model_dump(mode="json")) for name in ("model", "data", "optim")
    ]
    path = output.with_suffix(".toml")
    path.write_text("\n".join([*plain, *tables]), encoding="utf-8")
    return path


def _table(values: dict[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if not isinstance(value, dict))


@contextmanager
def command(path: Path, log: Path, *words: str, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``python -m train`` in a session of its own; whatever is left of it at the end is ended."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as file:
        driver = subprocess.Popen(
            [*before, sys.executable, "-m", "train", str(path), *words],
            cwd=path.parent,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield driver
    finally:
        end_session(driver.pid)
        driver.wait()


def end_session(leader: int) -> None:
    """Kill a driver and every process that it or its cluster started."""
    mine = [one for one in psutil.process_iter() if _session(one) == leader]
    for process in mine:
        for one in [process, *_children(process)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def wait_for_step(output: Path, step: int, driver: subprocess.Popen[bytes], log: Path, *, saved: bool = False) -> None:
    """Wait until a step is finished, and, if asked for, until a state is whole from which the run can go on."""
    path, until = output / "run/metrics.jsonl", time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        if driver.poll() is not None:
            raise AssertionError(f"the run ended before step {step}:\n{log.read_text()[-3000:]}")
        if path.exists() and len(read_metrics(path)) >= step and (not saved or valid_states(output / "run/state")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {LIMIT_S} s:\n{log.read_text()[-3000:]}")


def workers_of(driver: int) -> list[psutil.Process]:
    """Return the training processes of a driver's cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()) and _session_of_cluster(process) == driver:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _session_of_cluster(process: psutil.Process) -> int:
    """Return the session of the process, or of the nearest ancestor that is a driver of ours."""
    for one in [process, *process.parents()]:
        if "-m train" in " ".join(one.cmdline()):
            return one.pid
    return -1


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_driver_change_nothing(
    lake: str,  # noqa: F811
    whole: Path,
    tmp_path: Path,
) -> None:
    random, broken = np.random.default_rng(), tmp_path / "broken"
    path, log = recipe(lake, broken), tmp_path / "log"
    first, second = sorted(random.integers(8, STEPS - 8, 2).tolist())
    with command(path, log) as driver:
        wait_for_step(broken, first, driver, log, saved=True)
        hit = workers_of(driver.pid)
        assert hit, "no training process was found"
        random.choice(np.array(hit, dtype=object)).send_signal(signal.SIGKILL)
        wait_for_step(broken, second + 1, driver, log)
        driver.send_signal(signal.SIGKILL)
    at = len(read_metrics(broken / "run/metrics.jsonl"))
    assert at < STEPS, "it was killed too late to tell"
    kept = valid_states(broken / "run/state")
    assert kept
    with command(path, log) as driver:
        assert driver.wait(LIMIT_S) == 0, log.read_text()[-3000:]
    told = f"killed after steps {first} and {second}"
    assert losses(broken) == losses(whole), told
    one, other = (load_file(folder / "run/checkpoint/model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one), told


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ctrl_c_in_a_terminal_loses_no_step_that_was_taken(lake: str, tmp_path: Path) -> None:  # noqa: F811
    path, log = recipe(lake, tmp_path / "ended"), tmp_path / "log"
    words = ("--set", "steps=1000000", "--set", "checkpoint_every=1000000")
    with command(path, log, *words) as driver:
        wait_for_step(tmp_path / "ended", 8, driver, log)
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(LIMIT_S) == 7, log.read_text()[-3000:]
    rows = read_metrics(tmp_path / "ended/run/metrics.jsonl")
    (state,) = valid_states(tmp_path / "ended/run/state")
    assert json.loads((state / "manifest.json").read_text())["global_step"] == rows[-1]["step"] >= 8
    said = " ".join(log.read_text().split())
    assert "waiting: for the workers to save their state" in said
    assert f"goes on from step {rows[-1]['step']:,}, the last saved" in said


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # ray, of its own sockets and processes
def test_two_nodes_whose_calls_are_late_and_fail_train_together_and_one_that_dies_is_replaced(
    lake: str,  # noqa: F811
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.cluster_utils import Cluster

    for key, value in CHAOS.items():
        monkeypatch.setenv(key, value)

    broken = tmp_path / "broken"
    path, log = recipe(lake, broken), tmp_path / "log"
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    try:
        first, _ = cluster.add_node(**small), cluster.add_node(**small)
        with command(path, log, "--set", f"address={cluster.address}") as driver:
            wait_for_step(broken, 8, driver, log, saved=True)
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(**small)
            assert driver.wait(LIMIT_S) == 0, log.read_text()[-3000:]
    finally:
        cluster.shutdown()
    assert json.loads((broken / "run/summary.json").read_text())["resumed_from"] > 0, "the node was not missed"
    assert losses(broken) == losses(whole)
    one, other = (load_file(folder / "run/checkpoint/model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # ray, of its own sockets and processes
@pytest.mark.skipif(not possible(), reason="needs network namespaces: Linux, iproute2, root")
def test_an_elastic_run_goes_on_with_the_workers_that_a_cut_link_leaves(
    lake: str,  # noqa: F811
    whole: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    path, log = recipe(lake, broken), tmp_path / "log"
    with Nodes(3, cpus=[0, 1, 1], environment=SOON, logs=tmp_path) as nodes:
        told = [f"address={nodes.address}", "workers_min=1"]
        words = [word for one in told for word in ("--set", one)]
        with command(path, log, *words, before=nodes.on(1)) as driver:
            wait_for_step(broken, 8, driver, log, saved=True)
            nodes.cut(3)
            begin, at = time.monotonic(), len(read_metrics(broken / "run/metrics.jsonl"))
            assert driver.wait(RECOVERED_S) == 0, log.read_text()[-3000:]
            took = time.monotonic() - begin
    last = valid_states(broken / "run/state")[-1]
    assert json.loads((last / "manifest.json").read_text())["world"] == 1
    assert at < STEPS
    assert took < RECOVERED_S
    np.testing.assert_allclose(losses(broken), losses(whole), rtol=1e-3)
