"""Another checkpoint takes the place of the one that answers: no wrong answer, no lost request, errors are said."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from small_checkpoint import write_checkpoint
from starlette.testclient import TestClient

from serve import desk
from serve.app import make_app
from serve.client import Client
from serve.decode import Decoder
from serve.errors import StaleModel
from serve.model import Embed
from serve.replica import Replica
from serve.settings import Limits, ServeSettings
from train.predictor import Predictor

COUNTS = {"RNA": [{"G0": 3, "G7": 1, "G21": 5}, {"G1": 2, "G39": 9}]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {
        "first": write_checkpoint(root / "first"),
        "second": write_checkpoint(root / "second", seed=1),
        "other genes": write_checkpoint(root / "other", seed=2, backwards=True),
        "damaged": write_checkpoint(root / "damaged", seed=3),
    }
    weights = bytearray((made["damaged"] / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (made["damaged"] / "model.safetensors").write_bytes(weights)
    return made


def expected(folder: Path) -> tuple[str, np.ndarray]:
    """Return a checkpoint's digest, and what it says of the cells."""
    predictor = Predictor.load(folder)
    sha256 = predictor.manifest["model_sha256"]
    cells = Decoder(predictor.vocabulary, predictor.prompts, sha256, Limits()).decode(COUNTS, {}).cells
    return sha256, predictor.embed(predictor.cells(cells.counts, cells.prompts))


@pytest.fixture
def replica(checkpoints: dict[str, Path]) -> Iterator[Replica]:
    replica = Replica(ServeSettings(checkpoint=str(checkpoints["first"])))
    yield replica
    replica.close()


@pytest.fixture
def client(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(desk, "FRESH_S", 0.02)
    with TestClient(make_app(replica, Limits())) as client:
        yield client


def told(client: Any) -> tuple[str, np.ndarray]:
    reply = client.post("/v1/embed", json={"counts": COUNTS})
    assert reply.status_code == 200, reply.text
    return reply.json()["provenance"]["model_sha256"], np.array(reply.json()["embeddings"], np.float32)


def test_every_answer_is_that_of_the_checkpoint_that_it_names_while_checkpoints_change(
    replica: Replica, client: TestClient, checkpoints: dict[str, Path]
) -> None:
    known = dict(expected(checkpoints[name]) for name in ("first", "second", "other genes"))
    answers: list[tuple[str, np.ndarray]] = []
    failures: list[Exception] = []
    over = threading.Event()

    def ask() -> None:
        try:
            while not over.is_set():
                answers.append(told(client))
        except Exception as error:  # noqa: BLE001 - shown below
            failures.append(error)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for name in ("second", "other genes", "damaged", "first"):
        time.sleep(0.3)
        replica.swap(str(checkpoints[name]))
    time.sleep(0.3)
    over.set()
    for asker in askers:
        asker.join()
    assert not failures
    assert {sha256 for sha256, _ in answers} == set(known)
    for sha256, embedding in answers:
        np.testing.assert_allclose(embedding, known[sha256], rtol=0, atol=1e-5)


def test_a_damaged_checkpoint_changes_nothing_and_is_said(
    replica: Replica, client: TestClient, checkpoints: dict[str, Path]
) -> None:
    before = told(client)
    assert (
        "swap" not in client.get("/v1/models").json()["models"][0]
        or not client.get("/v1/models").json()["models"][0]["swap"]
    )
    for path in (checkpoints["damaged"], checkpoints["first"].parent / "nowhere"):
        replica.swap(str(path))
        model = client.get("/v1/models").json()["models"][0]
        assert model["provenance"]["model_sha256"] == before[0]
        assert model["swap"]["model_sha256"] == ""
        assert model["swap"]["error"].startswith("the checkpoint")
        assert str(path.parent) not in client.get("/v1/models").text
    np.testing.assert_array_equal(told(client)[1], before[1])
    replica.swap(str(checkpoints["second"]))
    model = client.get("/v1/models").json()["models"][0]
    assert model["swap"]["model_sha256"] == model["provenance"]["model_sha256"] == expected(checkpoints["second"])[0]
    assert model["swap"]["error"] == ""


def test_the_old_checkpoint_leaves_once_nobody_can_wait_for_it(checkpoints: dict[str, Path]) -> None:
    import asyncio

    replica = Replica(ServeSettings(checkpoint=str(checkpoints["first"]), limits=Limits(timeout_s=0.2)))
    predictor = Predictor.load(checkpoints["first"])
    decoder = Decoder(predictor.vocabulary, predictor.prompts, predictor.manifest["model_sha256"], Limits())
    cells = decoder.decode(COUNTS, {}).cells
    replica.swap(str(checkpoints["second"]))
    asyncio.run(replica.ask(cells, Embed()))
    time.sleep(1)
    with pytest.raises(StaleModel):
        asyncio.run(replica.ask(cells, Embed()))
    replica.close()


def test_what_is_written_over_the_checkpoint_answers_soon(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["first"], folder)
    replica = Replica(ServeSettings(checkpoint=str(folder), watch_s=0.05))
    with TestClient(make_app(replica, Limits())) as client:
        assert told(client)[0] == expected(checkpoints["first"])[0]
        (folder / "manifest.json").unlink()  # as an export does: the manifest comes last
        for path in sorted(checkpoints["second"].iterdir(), key=lambda path: path.name == "manifest.json"):
            shutil.copy(path, folder / path.name)
        until = time.monotonic() + 30
        while client.get("/v1/models").json()["models"][0]["swap"] is None and time.monotonic() < until:
            time.sleep(0.05)
        assert told(client)[0] == expected(checkpoints["second"])[0]
    replica.close()


def test_a_checkpoint_whose_manifest_is_copied_first_answers_once_it_is_whole(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["first"], folder)
    replica = Replica(ServeSettings(checkpoint=str(folder), watch_s=0.05))
    swaps: list[str] = []
    swap = replica.swap

    def counted(checkpoint: str) -> Any:
        swaps.append(checkpoint)
        return swap(checkpoint)

    replica.swap = counted  # type: ignore[method-assign]

    def wait_for(n_swaps: int) -> None:
        until = time.monotonic() + 30
        while len(swaps) < n_swaps:
            assert time.monotonic() < until
            time.sleep(0.02)

    with TestClient(make_app(replica, Limits())) as client:
        shutil.copy(checkpoints["second"] / "manifest.json", folder / "manifest.json")
        wait_for(1)
        time.sleep(0.4)
        assert len(swaps) == 1, "files that were refused and did not change are not read again"
        assert told(client)[0] == expected(checkpoints["first"])[0]
        for path in checkpoints["second"].iterdir():
            shutil.copy(path, folder / path.name)
        until = time.monotonic() + 30
        while replica._now.sha256 != expected(checkpoints["second"])[0] and time.monotonic() < until:
            time.sleep(0.05)
        assert replica._now.sha256 == expected(checkpoints["second"])[0]
    replica.close()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # ray.serve.config, on import
def test_a_changed_user_config_swaps_without_a_new_process(checkpoints: dict[str, Path]) -> None:
    import ray.serve
    import ray.serve.schema

    from serve.deploy import APP

    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})

    def deploy(name: str) -> None:
        application = {
            "name": APP,
            "import_path": "serve.deploy:build",
            "args": {"checkpoint": str(checkpoints["first"])},
            "deployments": [{"name": "ModelReplica", "user_config": {"checkpoint": str(checkpoints[name])}}],
        }
        client = ray.serve.context._get_global_client()
        client.deploy_apps(ray.serve.schema.ServeDeploySchema(applications=[application]), _blocking=True)

    try:
        deploy("first")
        with Client(f"http://127.0.0.1:{port}") as client:
            for name in ("first", "second", "damaged"):
                deploy(name)
                answers = "second" if name == "damaged" else name
                until = time.monotonic() + 60
                while client.models()[0]["provenance"]["model_sha256"] != expected(checkpoints[answers])[0]:
                    assert time.monotonic() < until, name
                    time.sleep(0.2)
                np.testing.assert_allclose(
                    client.embed(COUNTS["RNA"]).values, expected(checkpoints[answers])[1], atol=1e-5
                )
            until = time.monotonic() + 60
            while not client.models()[0]["swap"]["error"]:
                assert time.monotonic() < until
                time.sleep(0.2)
        load = ray.serve.get_deployment_handle("ModelReplica", app_name=APP).load.remote().result()
        assert load.done_pieces >= 3, "a new process would have counted anew"
    finally:
        ray.serve.shutdown()
