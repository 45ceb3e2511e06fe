"""This module keeps request bodies small: too large is answered 413 before it is held in memory, too slow 408.

Where nothing takes a body, none is read; HEAD is answered without one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware that lets a request through once its body is there, whole and within the limit.

    A body whose declared length is over the limit is not read at all; one that declares none is counted as it comes.

    Args:
        app: What gets the requests.
        max_bytes: Largest body.
        timeout_s: Longest time that a client may take to send it.
        problem: Writes the report for a status and a detail.
        takes: Whether a request is one whose body is read at all.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        timeout_s: float,
        problem: Callable[[int, str], Response],
        takes: Callable[[Scope], bool] = lambda _: True,
    ) -> None:
        self._app = app
        self._takes = takes
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._problem = problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._takes(scope):
            await self._app(scope, _without_body(receive), send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            said = f"Content-Encoding {encoding[:80]!r} is not read; send the body as it is"
            await self._refuse(415, said, scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal():
            await self._refuse(400, "Content-Length is not a number", scope, receive, send)
            return
        if len(declared) > 18 or int(declared) > self._max_bytes:
            await self._refuse(413, f"send at most {self._max_bytes:,} bytes in a request", scope, receive, send)
            return
        try:
            messages = await asyncio.wait_for(self._read(receive), self._timeout_s)
        except TimeoutError:
            await self._refuse(408, f"the body did not arrive within {self._timeout_s:g} s", scope, receive, send)
            return
        if messages is None:
            await self._refuse(413, f"send at most {self._max_bytes:,} bytes in a request", scope, receive, send)
            return

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> deque[Message] | None:
        """Read the body's messages; None when it grows beyond the limit."""
        messages: deque[Message] = deque()
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages

    async def _refuse(self, status: int, detail: str, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._problem(status, detail)
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


def _without_body(receive: Receive) -> Receive:
    """Return what says that a body is empty; what comes of it is not kept."""
    told = False

    async def empty() -> Message:
        nonlocal told
        while told:
            message = await receive()
            if message["type"] != "http.request":
                return message
        told = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return empty


class WithoutBody:
    """ASGI middleware that answers HEAD as GET is answered, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def bare(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, bare)
