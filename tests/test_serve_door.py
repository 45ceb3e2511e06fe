"""The door: what is refused before it is read, for how long, and what is not."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
from fake_predictor import FakePredictor
from starlette.datastructures import Headers

from serve.app import make_app
from serve.batcher import Batcher, Piece
from serve.door import FASTER, FULL, LONGEST_S, READ_AT_ONCE, RECENT_S, Door, Porter, at_proxy
from serve.errors import Overloaded
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings

CELL = {"counts": {"RNA": [{"G0": 1}]}}


class Clock:
    """Stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(full_s: float, retry_after_s: int = 1) -> Headers:
    return Headers({FULL: str(full_s), "Retry-After": str(retry_after_s)})


def let_in(door: Door, clock: Clock, seconds: float, every_s: float = 0.01) -> int:
    """Count who gets in of those that come every so often."""
    n = 0
    for _ in range(round(seconds / every_s)):
        clock.now += every_s
        try:
            door.enter(1)
        except Overloaded:
            continue
        n += 1
        door.leave(1)
    return n


def test_after_a_refusal_requests_come_in_as_room_comes_up() -> None:
    clock = Clock()
    door = Door(1_000, 1, clock)
    assert let_in(door, clock, 1) == 100
    door.hear(refusal(0.1, 7))
    with pytest.raises(Overloaded, match="no room") as refused:
        door.enter(10)
    assert refused.value.retry_after_s == 7
    assert let_in(door, clock, 0.8) == pytest.approx(0.8 / 0.1 * FASTER, abs=2)
    door.hear(refusal(0.2))
    assert let_in(door, clock, 0.8) == pytest.approx(0.8 / 0.2 * FASTER, abs=2)


def test_no_refusal_counts_for_long() -> None:
    clock = Clock()
    door = Door(1_000, 1, clock)
    door.hear(refusal(1_000))
    assert let_in(door, clock, RECENT_S - 0.1) == pytest.approx(0.9 / LONGEST_S * FASTER, abs=1)
    clock.now += 0.2
    assert let_in(door, clock, 1) == 100


@pytest.mark.parametrize("said", [{}, {FULL: "0"}, {FULL: "-1"}, {FULL: "soon"}, {FULL: "nan"}])
def test_a_refusal_that_says_nothing_of_others_keeps_nobody_out(said: dict[str, str]) -> None:
    clock = Clock()
    door = Door(1_000, 1, clock)
    door.hear(Headers(said))
    assert let_in(door, clock, 1) == 100


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
        door.hear(refusal(60))
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
    monkeypatch.setattr("serve.door.RECENT_S", 60)
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


def test_a_proxy_refuses_by_itself_what_the_app_behind_it_just_refused() -> None:
    (middleware,) = at_proxy()
    assert middleware.cls is Porter
    asked: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        headers = [(FULL.lower().encode(), b"0.2"), (b"retry-after", b"4")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    refused = []
    proxy = Porter(app, door=middleware.kwargs["door"], count=lambda: refused.append(1))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(proxy)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            paths = ["/v1/embed", "/v1/embed", "/v1/models", "/v1/annotate", "/v1/jobs"]
            return [(await http.post(path, content=b"x")).status_code for path in paths]

    assert asyncio.run(run()) == [429] * 5
    assert (asked, len(refused)) == (["/v1/embed", "/v1/models", "/v1/jobs"], 2)


def test_bodies_of_all_routes_share_the_room_for_bytes() -> None:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    app = make_app(replica, Limits(body_bytes=10_000, inside_bytes=10_500))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            wait = asyncio.Event()

            async def slow() -> Any:
                await wait.wait()
                yield b"x" * 8_000

            sent = {"Content-Type": "application/x-hdf5", "Content-Length": "8000"}
            first = asyncio.create_task(http.post("/v1/explore/h5ad", content=slow(), headers=sent))
            await asyncio.sleep(0.1)
            others = [await http.post(path, content=b"x" * 3_000) for path in ("/v1/explore", "/v1/jobs", "/v1/embed")]
            wait.set()
            await first
            return [response.status_code for response in others]

    assert asyncio.run(run()) == [429] * 3
    replica.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/health/live", 200),
        ("GET", "/metrics", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/", 200),
        ("POST", "/metrics", 405),
        ("POST", "/", 405),
        ("POST", "/page/none.js", 405),
        ("PUT", "/v1/health/ready", 405),
        ("DELETE", "/v1/explore/none", 204),
        ("POST", "/v1/none", 404),
    ],
)
def test_a_body_that_nothing_takes_is_not_read(method: str, path: str, status: int) -> None:
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    app = make_app(replica, Limits())
    read = 0

    async def run() -> int:
        nonlocal read
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            async def body() -> Any:
                nonlocal read
                read += 1
                yield b"x"

            headers = {"Content-Length": "30000000"}
            return (await http.request(method, path, content=body(), headers=headers)).status_code

    assert (asyncio.run(run()), read) == (status, 0)
    replica.close()
