"""Real Ray Serve under load: a copy of the model is killed, checkpoints change, copies come and go with the work."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fake_predictor
import httpx
import numpy as np
import psutil
import pytest
from fake_predictor import FakePredictor
from ports import free_port
from small_checkpoint import write_checkpoint
from test_serve_swap import COUNTS, expected

from serve.settings import Scaling, ServeSettings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # ray.serve.config, on import
    pytest.mark.timeout(600),
]
ASKERS = 6


@contextmanager
def asked(url: str, body: dict[str, Any]) -> Iterator[list[httpx.Response]]:
    """Let askers ask all the time while the block runs; yield the answers, which grow."""
    answers: list[httpx.Response] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not over.is_set():
                answers.append(http.post(f"{url}/v1/embed", json=body))
                if answers[-1].status_code == 503:
                    time.sleep(0.2)

    askers = [threading.Thread(target=ask) for _ in range(ASKERS)]
    for asker in askers:
        asker.start()
    try:
        yield answers
    finally:
        over.set()
        for asker in askers:
            asker.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def copies() -> list[int]:
    """Return the process of each copy of the model."""
    driver = psutil.Process()
    return [
        process.pid
        for process in driver.children(recursive=True)
        if "ServeReplica:somaflow:ModelReplica" in " ".join(process.cmdline()[:1])
    ]


def running() -> int:
    """Return how many copies Serve counts as running."""
    import ray.serve

    found = ray.serve.status().applications.get("somaflow")
    deployment = found.deployments.get("ModelReplica") if found else None
    return int(deployment.replica_states.get("RUNNING", 0)) if deployment else 0


def test_a_killed_copy_and_changed_checkpoints_give_no_wrong_answer(ray_cluster: None, tmp_path: Path) -> None:
    import ray.serve
    import ray.serve.schema

    from serve.deploy import APP

    made = {
        "first": write_checkpoint(tmp_path / "first"),
        "second": write_checkpoint(tmp_path / "second", seed=1),
        "damaged": write_checkpoint(tmp_path / "damaged", seed=3),
        "other genes": write_checkpoint(tmp_path / "other", seed=2, backwards=True),
    }
    right = {name: expected(made[name]) for name in ("first", "second", "other genes")}
    known, shas = dict(right.values()), {name: sha256 for name, (sha256, _) in right.items()}
    weights = made["damaged"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})

    def deploy(name: str) -> None:
        model = {"name": "ModelReplica", "health_check_period_s": 1, "user_config": {"checkpoint": str(made[name])}}
        application = {
            "name": APP,
            "import_path": "serve.deploy:build",
            "args": {"checkpoint": str(made["first"]), "replicas": 2},
            "deployments": [model],
        }
        schema = ray.serve.schema.ServeDeploySchema(applications=[application])
        ray.serve.context._get_global_client().deploy_apps(schema, _blocking=False)

    def taken(name: str) -> bool:
        """Say whether both copies have come to an end with a checkpoint, whatever the end."""
        load = ray.serve.get_deployment_handle("ModelReplica", app_name=APP).load
        loads = [load.remote().result() for _ in range(8)]
        done = {one.replica: one.swaps + one.swaps_refused for one in loads}
        return len(done) == 2 and min(done.values()) >= 1 + list(made)[1:].index(name)

    def answered(name: str, since: int) -> bool:
        """Say whether a checkpoint answers, some answers later."""
        last = [answer.json()["provenance"]["model_sha256"] for answer in answers[-5:] if answer.status_code == 200]
        return len(answers) > since + 20 and set(last) == {shas[name]}

    try:
        deploy("first")
        wait_for(lambda: running() == 2, 240)
        with asked(f"http://127.0.0.1:{port}", {"counts": COUNTS}) as answers:
            wait_for(lambda: len(answers) > 20)
            psutil.Process(copies()[0]).send_signal(signal.SIGKILL)
            begin = len(answers)
            wait_for(lambda: len(answers) > begin + 60)
            wait_for(lambda: running() == 1)  # Serve has noticed
            wait_for(lambda: running() == 2, 120)
            for name, answering in (("second", "second"), ("damaged", "second"), ("other genes", "other genes")):
                deploy(name)
                wait_for(partial(taken, name), 120)
                wait_for(partial(answered, answering, len(answers)))
    finally:
        ray.serve.shutdown()
    statuses = Counter(answer.status_code for answer in answers)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[503] <= 3 * ASKERS, statuses  # those inside, and those sent before it was known to be gone
    assert all("Retry-After" in answer.headers for answer in refused)
    named = [answer.json()["provenance"]["model_sha256"] for answer in answers if answer.status_code == 200]
    assert set(named) == set(known)
    for answer in answers:
        if answer.status_code == 200:
            reply = answer.json()
            embedding_CD = known[reply["provenance"]["model_sha256"]]
            np.testing.assert_allclose(reply["embeddings"], embedding_CD, rtol=0, atol=1e-5)


def test_copies_come_and_go_with_the_work(ray_cluster: None) -> None:
    import ray.cloudpickle

    from serve.deploy import serving

    ray.cloudpickle.register_pickle_by_value(fake_predictor)
    settings = ServeSettings(
        checkpoint="fake",
        port=free_port(),
        scaling=Scaling(most=2, requests=1, up_s=0.2, down_s=0.5),
    )
    try:
        with serving(settings, lambda _: FakePredictor(delay_s=0.05)) as url:
            assert running() == 1
            with asked(url, {"counts": {"RNA": [{"G0": 3}]}}) as answers:
                wait_for(lambda: running() == 2)
            assert {answer.status_code for answer in answers} == {200}
            wait_for(lambda: running() == 1)
            assert httpx.get(f"{url}/v1/health/ready").status_code == 200
    finally:
        ray.cloudpickle.unregister_pickle_by_value(fake_predictor)


def test_a_question_at_work_is_answered_when_the_server_ends(ray_cluster: None) -> None:
    import ray.cloudpickle
    import ray.serve

    from serve.deploy import APP, serving

    ray.cloudpickle.register_pickle_by_value(fake_predictor)
    settings = ServeSettings(checkpoint="fake", port=free_port())
    try:
        with ThreadPoolExecutor(2) as askers:
            with serving(settings, lambda _: FakePredictor(delay_s=6)) as url:
                load = ray.serve.get_deployment_handle("ModelReplica", app_name=APP).load
                load.remote().result()  # to find the copy takes a while the first time
                asked = [
                    askers.submit(httpx.post, f"{url}/v1/embed", json={"counts": COUNTS}, timeout=60) for _ in "ab"
                ]
                wait_for(lambda: load.remote().result().waiting_jobs == 1)  # the model has the other
            assert [one.result().status_code for one in asked] == [200, 200]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(fake_predictor)
