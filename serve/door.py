"""This module turns requests away before they are read, while the model has no room or too many bytes are held.

To read a request costs an ingress more than to refuse it, and what a refusal says comes late to those behind. So where
the model refuses, requests are let in no faster than it makes room for them, until it has refused none for a while.
Requests for more than half of what may wait say nothing about others.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import Overloaded
from serve.problems import briefly

QUESTIONS = frozenset(
    f"/v1/{what}" for what in ("embed", "annotate", "translate", "forecast", "perturb", "generate", "neighbors")
)
"""Where requests go that the model answers."""
FULL = "Somaflow-Full-S"
"""Header of a refusal: in how many seconds room for one more comes up."""
LONGEST_S = 0.25
"""Longest time that one refusal keeps others waiting."""
RECENT_S = 1.0
"""Seconds since the last refusal after which everybody is let in again."""
FASTER = 1.25
"""Requests let in for one that there is room for, so that the model never waits for the door."""
BURST = 8
"""Requests that an ingress lets in at once: those that several proxies let in one by one may come together."""
READ_AT_ONCE = 4
"""Requests that are read and decoded side by side; the others wait as bytes."""
METRICS = {
    "somaflow_serve_refused_at_proxy_total": (
        "counter",
        "Requests that a proxy refused while the model had no room; the ingress does not count them.",
        (),
    )
}
"""Name to kind, meaning and labels. ``infra/monitoring/check.py`` reads it as it stands here: plain values only."""


_came: ContextVar[float] = ContextVar("came")


def waited_s() -> float:
    """Return the seconds since the request that is being answered came to this process; 0 outside of one."""
    now = time.monotonic()
    return now - _came.get(now)


def is_question() -> bool:
    """Say whether what is being answered is a question to the model."""
    return _came.get(None) is not None


class Door:
    """What one ingress or proxy knows of whether requests can be let in."""

    def __init__(self, max_bytes: int, burst: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """Open it.

        Args:
            max_bytes: Most bytes of bodies inside; one alone may be larger.
            burst: Requests that may come in at once where none came for a while.
            clock: Tells seconds.
        """
        self._max_bytes, self._burst, self._clock = max_bytes, burst, clock
        self._bytes = 0
        self._full_s, self._retry_after_s, self._refused = 0.0, 1, -math.inf
        self._allowed, self._counted = 0.0, -math.inf
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    def hear(self, refusal: Headers) -> None:
        """Take note of the headers of a refusal that is on its way to a client."""
        with suppress(ValueError):
            full_s = min(float(refusal.get(FULL, "0")), LONGEST_S)
            if full_s > 0:
                now = self._clock()
                if now - self._refused > RECENT_S:
                    self._allowed, self._counted = 0.0, now
                self._full_s, self._refused = full_s, now
                self._retry_after_s = int(refusal.get("retry-after", "1"))

    def check(self) -> None:
        """Raise Overloaded where the model refused just now, and has made no room since."""
        if self._clock() < self._refused + self._full_s:
            raise self._overloaded()

    def enter(self, n_bytes: int, *, question: bool = True) -> None:
        """Let a request in; :meth:`leave` gives the room of its body back.

        Args:
            n_bytes: Of its body.
            question: Whether the model is to answer it, so that it may have to wait for its turn.

        Raises:
            Overloaded: It is not its turn, or too many bytes are inside.
        """
        if self._bytes and self._bytes + n_bytes > self._max_bytes:
            raise Overloaded(f"bodies of {self._bytes:,} bytes are being answered; try again later", 1)
        now = self._clock()
        if question and now - self._refused <= RECENT_S:
            earned = (now - self._counted) * FASTER / self._full_s
            self._allowed, self._counted = min(self._burst, self._allowed + earned), now
            if self._allowed < 1:
                raise self._overloaded()
            self._allowed -= 1
        self._bytes += n_bytes

    def leave(self, n_bytes: int) -> None:
        """Give the room of a body back."""
        self._bytes -= n_bytes

    def _overloaded(self) -> Overloaded:
        return Overloaded("the model has no room for requests; try again later", self._retry_after_s)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Wait for a turn to read a request; Overloaded where the door was shut meanwhile."""
        async with self._reading:
            self.check()
            yield


class Porter:
    """ASGI middleware: 429 before a body is read, where :class:`Door` says so; refusals of questions shut it.

    Bodies of all routes share the room for bytes; only questions have to wait for a turn.

    Args:
        app: What gets the requests.
        door: Whether they can be let in.
        undeclared: Bytes to make room for where a request does not declare them.
        count: Called for each that is turned away.
    """

    def __init__(
        self, app: ASGIApp, *, door: Door, undeclared: int = 0, count: Callable[[], None] = lambda: None
    ) -> None:
        self._app, self._door, self._undeclared, self._count = app, door, undeclared, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST":  # no other method has a body that is read
            await self._app(scope, receive, send)
            return
        question = path in QUESTIONS
        if question:
            _came.set(time.monotonic())
        declared = Headers(scope=scope).get("content-length", "")
        n_bytes = min(int(declared[:18]), self._undeclared) if declared.isdecimal() else self._undeclared
        try:
            self._door.enter(n_bytes, question=question)
        except Overloaded as error:
            self._count()
            await briefly(429, error.message, error.retry_after_s)(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if question and message["type"] == "http.response.start" and message["status"] == 429:
                self._door.hear(Headers(raw=message["headers"]))
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._door.leave(n_bytes)


def at_proxy() -> list[Middleware]:
    """Return what a proxy of Ray Serve asks before it passes a request on.

    Ray calls this in each proxy where the environment says
    ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.door.at_proxy``. To refuse there costs much less than
    to bring a request to an ingress. Ray's own metrics tell how many: ``ray_somaflow_serve_refused_at_proxy_total``.
    """
    from store.cluster import RayMetrics

    (name,), metrics = METRICS, RayMetrics(METRICS)
    return [Middleware(Porter, door=Door(sys.maxsize), count=partial(metrics.count, name))]
