"""Adapters by name over one checkpoint: each answers as it does alone, and the base as if there were none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import write_checkpoint
from starlette.testclient import TestClient
from test_serve_client import InProcess

from serve.adapters import Adapters
from serve.app import make_app
from serve.client import Client
from serve.errors import FieldRefused, StaleModel
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings
from store.errors import InputRefused, UsageError
from train.adapter import AdapterSettings, adapted, adapter_weights, save_adapter
from train.predictor import Predictor

CELLS = [{"G0": 1, "G1": 4}, {"G2": 2, "G3": 9, "G30": 1}]


def write_adapter(folder: Path, checkpoint: Path, seed: int) -> Path:
    """Write an adapter with random weights that changes answers."""
    base, settings = Predictor.load(checkpoint), AdapterSettings(rank=2, alpha=8)
    model = adapted(base.model, settings, seed)
    torch.manual_seed(seed)
    for weight in adapter_weights(model).values():
        torch.nn.init.normal_(weight, std=0.3)
    return save_adapter(folder, model, settings, base.manifest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_checkpoint(folder / "base")
    write_checkpoint(folder / "other", seed=1)
    for seed, name in enumerate(("lung", "blood", "gut")):
        write_adapter(folder / name, folder / "base", seed)
    write_adapter(folder / "foreign", folder / "other", 0)
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    names = ("lung", "blood", "gut", "foreign", "gone")
    settings = ServeSettings(
        checkpoint=str(folder / "base"),
        adapters={name: str(folder / name) for name in names},
        adapters_loaded=2,
        batching=Batching(budget_tokens=512, piece_tokens=128),
    )
    replica = Replica(settings)
    with TestClient(make_app(replica, Limits()), raise_server_exceptions=False) as client:
        yield client
    replica.close()


def embedded(client: TestClient, adapter: str = "") -> dict[str, Any]:
    reply = client.post("/v1/embed", json={"counts": {"RNA": CELLS}, "adapter": adapter})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def own(folder: Path, adapter: str = "") -> np.ndarray:
    """Return what the predictor answers outside any server."""
    plain = Predictor.load(folder / "base")
    names = plain.vocabulary["RNA"].feature_name
    counts = np.array([[cell.get(name, 0) for name in names] for cell in CELLS], np.float32)
    if adapter:
        kept = Adapters(plain, {adapter: str(folder / adapter)}, 1)
        plain = kept.get(adapter, kept.digests()[0][adapter])
    from scipy.sparse import csr_matrix

    return plain.embed(plain.cells({"RNA": csr_matrix(counts)}, {}))


def test_each_name_gets_its_own_answer_and_the_reply_says_whose(client: TestClient, folder: Path) -> None:
    plain = embedded(client)
    assert "adapter" not in plain["provenance"]
    np.testing.assert_allclose(plain["embeddings"], own(folder), atol=1e-5)
    seen = [np.array(plain["embeddings"])]
    for name in ("lung", "blood", "gut", "lung"):  # more than stay in memory
        reply = embedded(client, name)
        np.testing.assert_allclose(reply["embeddings"], own(folder, name), atol=1e-5)
        assert reply["provenance"]["adapter"] == name
        assert reply["provenance"]["adapter_sha256"] == client.get("/v1/models").json()["models"][0]["adapters"][name]
        seen.append(np.array(reply["embeddings"]))
    assert min(np.abs(a - b).max() for i, a in enumerate(seen[:4]) for b in seen[:i]) > 1e-3
    np.testing.assert_array_equal(seen[1], seen[4])
    assert embedded(client)["embeddings"] == plain["embeddings"]


def test_all_at_once_and_mixed_they_do_not_touch_each_other(folder: Path) -> None:
    names = ["", "lung", "blood", "gut"]
    settings = ServeSettings(
        checkpoint=str(folder / "base"), adapters={name: str(folder / name) for name in names[1:]}, adapters_loaded=1
    )
    replica = Replica(settings)
    app = make_app(replica, Limits())

    async def all_at_once() -> list[Any]:
        import httpx

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
            bodies = [{"counts": {"RNA": CELLS}, "adapter": names[i % 4]} for i in range(40)]
            return await asyncio.gather(*(http.post("/v1/embed", json=body) for body in bodies))

    replies = asyncio.run(all_at_once())
    replica.close()
    expected = {name: own(folder, name) for name in names}
    for number, reply in enumerate(replies):
        np.testing.assert_allclose(reply.json()["embeddings"], expected[names[number % 4]], atol=1e-5)


def test_every_question_takes_an_adapter(client: TestClient) -> None:
    asked: dict[str, dict[str, Any]] = {
        "annotate": {},
        "translate": {"measurement": "protein"},
        "perturb": {"perturbations": ["G1"], "options": {"vectors": True}},
        "forecast": {"elapsed": 2.0, "options": {"vectors": True}},
    }
    for path, more in asked.items():
        body = {"counts": {"RNA": CELLS}, **more}
        plain, other = (client.post(f"/v1/{path}", json=body | {"adapter": name}).json() for name in ("", "lung"))
        assert other.pop("provenance")["adapter"] == "lung", path
        del plain["provenance"]
        assert plain != other, path
    drawn = {"cells": 2, "seed": 3, "adapter": "lung"}
    assert client.post("/v1/generate", json=drawn).json()["provenance"]["adapter"] == "lung"
    assert (
        "novelty_p"
        not in client.post("/v1/annotate", json={"counts": {"RNA": CELLS}, "adapter": "lung"}).json()["cells"][0]
    )


def test_one_that_cannot_be_used_is_said_and_refused(client: TestClient) -> None:
    card = client.get("/v1/models").json()["models"][0]
    assert sorted(card["adapters"]) == ["blood", "gut", "lung"]
    assert "made for the checkpoint" in card["adapters_refused"]["foreign"]
    for name, said in (("foreign", "made for"), ("nobody", "blood, gut, lung")):
        reply = client.post("/v1/embed", json={"counts": {"RNA": CELLS}, "adapter": name})
        assert reply.status_code == 422
        assert reply.json()["errors"][0]["field"] == "adapter"
        assert said in reply.json()["detail"]
    with (
        Client("http://here", adapter="nobody", transport=InProcess(client)) as asking,
        pytest.raises(InputRefused, match="adapter: this server knows"),
    ):
        asking.embed(CELLS)


def test_what_goes_by_the_checkpoint_alone_is_said(client: TestClient) -> None:
    asked = {"counts": {"RNA": CELLS}, "adapter": "lung", "options": {"min_novelty_p": 0.05}}
    assert "min_novelty_p has no effect" in client.post("/v1/annotate", json=asked).json()["warnings"][0]
    with (
        Client("http://here", adapter="lung", transport=InProcess(client)) as asking,
        pytest.raises(UsageError, match="ask with a client without adapter"),
    ):
        asking.neighbors(CELLS)


def test_one_that_is_written_anew_answers_from_then_on(folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine", folder / "base", 5)
    settings = ServeSettings(checkpoint=str(folder / "base"), adapters={"mine": str(tmp_path / "mine")})
    replica = Replica(settings)
    with TestClient(make_app(replica, Limits())) as client:
        before = embedded(client, "mine")
        write_adapter(tmp_path / "mine", folder / "base", 6)
        client.get("/v1/models")  # asks what lies there
        after = embedded(client, "mine")
    replica.close()
    assert before["provenance"]["adapter_sha256"] != after["provenance"]["adapter_sha256"]
    assert np.abs(np.array(before["embeddings"]) - after["embeddings"]).max() > 1e-3


def test_what_was_meant_is_what_answers(folder: Path) -> None:
    base = Predictor.load(folder / "base")
    kept = Adapters(base, {"lung": str(folder / "lung"), "foreign": str(folder / "foreign")}, 1)
    with pytest.raises(StaleModel):
        kept.get("lung", "0" * 64)
    with pytest.raises(FieldRefused, match="adapter: foreign cannot be used"):
        kept.get("foreign", "0" * 64)
