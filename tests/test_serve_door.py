"""The door: what is refused before it is read, for how long, and what is not."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
from fake_predictor import FakePredictor

from serve.app import make_app
from serve.batcher import Batcher, Piece
from serve.door import LONGEST_S, READ_AT_ONCE, Door
from serve.errors import Overloaded
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings

CELL = {"counts": {"RNA": [{"G0": 1}]}}


class Clock:
    """Stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_refusal_shuts_the_door_until_there_is_room() -> None:
    clock = Clock()
    door = Door(1_000, clock)
    door.shut(Overloaded("full", 7, 0.1))
    with pytest.raises(Overloaded, match="no room") as refused:
        door.enter(10)
    assert refused.value.retry_after_s == 7
    clock.now += 0.11
    door.enter(10)


def test_no_refusal_shuts_it_for_long_and_a_shorter_one_does_not_open_it() -> None:
    clock = Clock()
    door = Door(1_000, clock)
    door.shut(Overloaded("full", 30, 1_000))
    door.shut(Overloaded("full", 1, 0.01))
    clock.now += LONGEST_S - 0.01
    with pytest.raises(Overloaded):
        door.check()
    clock.now += 0.02
    door.check()


def test_bytes_inside_are_bounded_but_one_body_alone_comes_in() -> None:
    door = Door(1_000)
    door.enter(5_000)
    with pytest.raises(Overloaded, match="5,000 bytes are being answered"):
        door.enter(1)
    door.leave(5_000)
    door.enter(600)
    door.enter(400)


def test_who_waited_for_a_turn_is_not_read_once_the_door_is_shut() -> None:
    async def run() -> list[str]:
        door, told, go = Door(1_000), [], asyncio.Event()

        async def read() -> None:
            try:
                async with door.reading():
                    await go.wait()
                    told.append("read")
            except Overloaded:
                told.append("refused")

        tasks = [asyncio.create_task(read()) for _ in range(READ_AT_ONCE + 3)]
        await asyncio.sleep(0)
        door.shut(Overloaded("full", 1, 60))
        go.set()
        await asyncio.gather(*tasks)
        return told

    assert sorted(asyncio.run(run())) == ["read"] * READ_AT_ONCE + ["refused"] * 3


def test_only_a_request_for_little_says_that_there_is_no_room_for_others() -> None:
    hold = threading.Event()

    def work(payloads: list[int]) -> list[int]:
        if 0 in payloads:
            hold.wait(10)
        return payloads

    async def run() -> list[Overloaded]:
        batcher = Batcher[int, int](work, budget_tokens=10, queue_tokens=100)
        submit = batcher.submit
        await submit([Piece(1, 1, 10)], key="k", timeout_s=5)  # so that it knows its speed
        waiting = [asyncio.create_task(submit([Piece(0, 1, 10)], key="k", timeout_s=5)) for _ in range(10)]
        await asyncio.sleep(0.1)  # one is in the model, nine wait
        refused = []
        for tokens in (20, 80):
            with pytest.raises(Overloaded) as error:
                await submit([Piece(1, 1, tokens)], key="k", timeout_s=5)
            refused.append(error.value)
        hold.set()
        await asyncio.gather(*waiting)
        batcher.close()
        return refused

    small, large = asyncio.run(run())
    assert small.full_s > 0
    assert large.full_s == 0


def test_a_request_at_a_shut_door_is_answered_before_its_body_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.door.LONGEST_S", 60)
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    app = make_app(replica, Limits())

    async def never(*_: Any) -> Any:
        raise Overloaded("full", 3, 60)

    replica.ask = never  # type: ignore[method-assign, assignment]

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            first = await http.post("/v1/embed", json=CELL)
            read = 0

            async def body() -> Any:
                nonlocal read
                read += 1
                yield b"x"

            second = await http.post("/v1/embed", content=body(), headers={"Content-Length": "1000"})
            assert read == 0
            return [first, second, await http.get("/v1/health/live"), await http.get("/metrics")]

    first, second, live, metrics = asyncio.run(run())
    assert (first.status_code, second.status_code) == (429, 429)
    assert second.headers["retry-after"] == "3"
    assert "no room" in second.json()["detail"]
    assert live.status_code == 200
    assert 'somaflow_serve_requests_total{route="/v1/embed",status="429"} 2.0' in metrics.text
    replica.close()


def test_a_body_of_unknown_size_takes_the_room_of_the_largest() -> None:
    replica = Replica(ServeSettings(checkpoint="fake", batching=Batching()), lambda _: FakePredictor(0.3))
    app = make_app(replica, Limits(body_bytes=10_000, inside_bytes=10_500))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await http.post("/v1/embed", json=CELL)

            async def body() -> Any:
                yield b'{"counts": {"RNA": [{"G0": 1}]}}'

            long = {"counts": {"RNA": [{"G0": 1}] * 80}}
            headers = {"Content-Type": "application/json"}
            first = asyncio.create_task(http.post("/v1/embed", content=body(), headers=headers))
            await asyncio.sleep(0.1)
            second = await http.post("/v1/embed", json=long)
            statuses = [(await first).status_code, second.status_code]
            return [*statuses, (await http.post("/v1/embed", json=long)).status_code]

    assert asyncio.run(run()) == [200, 429, 200]
    replica.close()
