"""A real Ray Serve deployment, asked over loopback HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import fake_predictor
import httpx
import numpy as np
import pytest
from fake_predictor import FakePredictor
from ports import free_port
from pydantic import ValidationError

from serve.client import Client
from serve.settings import Limits, ServeSettings
from store.errors import InputRefused, UsageError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # ray.serve.config, on import
]


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    import ray.cloudpickle

    from serve.deploy import serving

    ray.cloudpickle.register_pickle_by_value(fake_predictor)
    settings = ServeSettings(checkpoint="fake", port=free_port(), limits=Limits(body_bytes=100_000))
    with serving(settings, lambda _: FakePredictor(delay_s=0.01)) as url:
        yield url
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", settings.port)) != 0, "the port must be free again"
    ray.cloudpickle.unregister_pickle_by_value(fake_predictor)


def test_the_client_gets_embeddings_and_effects(url: str) -> None:
    with Client(url) as client:
        assert client.ready()
        answer = client.embed([{"G0": 1, "G1": 4}, {"G2": 2}], prompts={"tissue": ["", "lung"]})
        assert answer.values.tolist() == [[5, 0, 0, 1], [2, 0, 2, 0]]
        assert answer.provenance["snapshot_name"] == "tiny"
        arrow = client.embed([{"G0": 1, "G1": 4}], encoding="arrow", features={"RNA": ["G3"]})  # a reader of its own
        assert arrow.values.tolist() == [[5, 0, 0, 1]]
        assert arrow.features["RNA"][1].tolist() == [[3, 3, 3, 4]]
        (effect,) = client.perturb([{"G0": 1, "G1": 4}], ["G1"])
        assert effect.delta[1] == -4
        assert client.perturbations() == ["G1", "G2"]


def test_many_clients_at_once_each_get_their_own_answer(url: str) -> None:
    def ask(number: int) -> float:
        with Client(url) as client:
            return float(client.embed([{"G0": number + 1}]).values[0, 0])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == [number + 1 for number in range(64)]


def test_errors_come_through_the_whole_way_as_problems(url: str) -> None:
    with Client(url) as client, pytest.raises(InputRefused, match=r"perturbations.0: .*did you mean 'G1'"):
        client.perturb([{"G0": 1}], ["G11"])
    response = httpx.post(f"{url}/v1/embed", json={"counts": {"RNA": [{"G1": -1}]}})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["errors"][0]["field"] == "counts.RNA.0.G1"


def test_a_large_body_is_answered_413_while_it_is_still_being_sent(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1_000):
            yield b"x" * 10_000

    declared = httpx.post(f"{url}/v1/embed", content=b"x" * 200_000, headers={"Content-Type": "application/json"})
    assert declared.status_code == 413
    try:
        streamed = httpx.post(f"{url}/v1/embed", content=endless(), headers={"Content-Type": "application/json"})
        assert streamed.status_code == 413
    except httpx.TransportError:
        pass  # the server closed the connection before everything was sent
    assert httpx.get(f"{url}/v1/health/live").status_code == 200


def test_work_of_a_client_that_left_is_dropped(url: str) -> None:
    import ray.serve

    model = ray.serve.get_deployment_handle("ModelReplica", app_name="somaflow")
    before = model.load.remote().result()

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/perturb",
                json={"counts": {"RNA": [{"G0": 1}]}, "perturbations": ["G1", "G2"] * 32},
                timeout=0.2,
            )

    leavers = [threading.Thread(target=leave) for _ in range(4)]
    for leaver in leavers:
        leaver.start()
    for leaver in leavers:
        leaver.join()
    time.sleep(0.5)
    after = model.load.remote().result()
    assert after.waiting_tokens == 0
    assert after.done_pieces - before.done_pieces < 4 * 64 / 2
    with Client(url) as client:
        np.testing.assert_array_equal(client.embed([{"G0": 3}]).values[0], [3, 0, 0, 3])


def test_copies_that_need_more_than_there_is_are_told_of(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from serve import deploy

    assert not deploy._lacking(ServeSettings(checkpoint="c", threads=2))
    settings = ServeSettings(checkpoint="c", replicas=3, device="cuda", address="head:6379")
    assert deploy._lacking(settings) == "2 CPUs of 3 and 0 GPUs of 3"
    told: list[str] = []
    for name in ("_start_ray", "_start_serve", "_stop_serve"):
        monkeypatch.setattr(deploy, name, lambda *_, **__: None)
    monkeypatch.setattr(deploy, "_alone_there", nullcontext)
    monkeypatch.setattr(deploy, "_port", lambda *_, **__: 8000)
    with monkeypatch.context() as patch:
        for name in ("shutdown", "is_initialized"):
            patch.setattr(ray, name, lambda: False)
        with deploy.serving(settings, waits=told.append):
            assert told == ["waiting for nodes: the cluster has 2 CPUs of 3 and 0 GPUs of 3 that the copies need"]
        here = settings.model_copy(update={"address": ""})
        with pytest.raises(UsageError, match=r"this machine has .* 0 GPUs of 3 that the copies need"):
            deploy.serving(here).__enter__()
    with pytest.raises(ValidationError, match="device"):
        ServeSettings(checkpoint="c", device="gpu")
