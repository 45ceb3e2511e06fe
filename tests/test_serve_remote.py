"""What a client is told while no copy of the model is alive: the handle of Ray Serve never answers then."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from fake_predictor import FakePredictor

from serve.app import make_app
from serve.errors import Unavailable
from serve.replica import Replica
from serve.settings import Limits, ServeSettings

CELL = {"counts": {"RNA": [{"G0": 1}]}}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using extra keyword arguments on `Field`"
)  # ray.serve.config, on import


class Response:
    """What a handle gives."""

    def __init__(self, handle: Handle, answer: Any) -> None:
        self._handle, self._answer = handle, answer

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if self._handle.dead:
            await asyncio.Event().wait()
        return await self._answer

    def cancel(self) -> None:
        self._handle.cancelled += 1


class Handle:
    """A handle of Ray Serve over a replica in this process; while it is dead nothing is answered."""

    def __init__(self, replica: Replica) -> None:
        self._replica, self.dead, self.cancelled = replica, True, 0

    def __getattr__(self, name: str) -> Any:
        handle = self

        class Method:
            def remote(self, *words: Any) -> Response:
                return Response(handle, handle.answer(name, *words))

        return Method()

    async def answer(self, name: str, *words: Any) -> Any:
        return await getattr(self._replica, name)(*words)


@pytest.fixture
def handle() -> Any:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    yield Handle(replica)
    replica.close()


@pytest.mark.filterwarnings("ignore:coroutine 'Handle.answer' was never awaited")
def test_where_no_copy_answers_everything_is_answered_soon(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import deploy

    monkeypatch.setattr(deploy, "READY_S", 0.2)
    monkeypatch.setattr(deploy, "GRACE_S", 0.1)
    app = make_app(deploy.RemoteModel(handle, 0.3), Limits(timeout_s=0.3))  # type: ignore[arg-type]
    now = time.monotonic()

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            async def refused() -> None:
                for path in ("/v1/health/ready", "/v1/models"):
                    assert (await http.get(path)).status_code == 503, path
                question = await http.post("/v1/embed", json=CELL)
                assert (question.status_code, question.headers["content-type"]) == (503, "application/problem+json")
                metrics = await http.get("/metrics")
                assert (metrics.status_code, "somaflow_serve_ready 0.0" in metrics.text) == (200, True)

            await refused()  # before anything was ever asked
            handle.dead = False
            assert (await http.get("/v1/health/ready")).status_code == 200
            assert (await http.post("/v1/embed", json=CELL)).status_code == 200
            handle.dead = True
            await refused()  # with the checkpoint known, so that the question goes to the copy that died
            monkeypatch.setattr("serve.desk.FRESH_S", 0)
            await refused()

    asyncio.run(run())
    assert time.monotonic() - now < 10
    assert handle.cancelled >= 10


def test_a_question_ends_before_ray_serve_gives_it_up() -> None:
    from serve import deploy

    assert 0 < deploy.GRACE_S < deploy.PROXY_S


def test_a_refused_look_is_looked_again_by_the_next(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.desk import Desk

    handle.dead = False
    desk = Desk(handle._replica, Limits())
    asked: list[int] = []

    async def gone() -> str:
        asked.append(1)
        raise Unavailable("gone")

    async def run() -> None:
        await desk.fresh()
        monkeypatch.setattr("serve.desk.FRESH_S", 0)
        monkeypatch.setattr(handle._replica, "ready", gone)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await desk.fresh()

    asyncio.run(run())
    assert len(asked) == 2
