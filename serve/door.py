"""This module turns requests away before they are read, while the model has no room or too many bytes are held.

To read a request costs an ingress more than to refuse it. So a refusal of the model's counts for those that come right
after it too: the door is shut until there would have been room for the refused one, a quarter of a second at most.
Then the next one tries again. Requests for more than half of what may wait do not shut it: there may be room for
others.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import Overloaded

LONGEST_S = 0.25
"""Longest time that one refusal keeps the door shut."""
READ_AT_ONCE = 4
"""Requests that are read and decoded side by side; the others wait as bytes."""


class Door:
    """What one ingress knows of whether requests can be let in."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Open it.

        Args:
            max_bytes: Most bytes of bodies inside; one alone may be larger.
            clock: Tells seconds.
        """
        self._max_bytes, self._clock = max_bytes, clock
        self._bytes = 0
        self._shut_until, self._why = -math.inf, Overloaded("", 1)
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    def shut(self, refusal: Overloaded) -> None:
        """Take note that the model refused a request."""
        until = self._clock() + min(refusal.full_s, LONGEST_S)
        if until > self._shut_until:
            self._shut_until, self._why = until, refusal

    def check(self) -> None:
        """Raise Overloaded while the door is shut."""
        if self._clock() < self._shut_until:
            raise Overloaded("the model has no room for requests; try again later", self._why.retry_after_s)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Wait for a turn to read a request; Overloaded where the door was shut meanwhile."""
        async with self._reading:
            self.check()
            yield

    def enter(self, n_bytes: int) -> None:
        """Make room for a body; :meth:`leave` gives it back.

        Raises:
            Overloaded: The door is shut, or too many bytes are inside.
        """
        self.check()
        if self._bytes and self._bytes + n_bytes > self._max_bytes:
            raise Overloaded(f"bodies of {self._bytes:,} bytes are being answered; try again later", 1)
        self._bytes += n_bytes

    def leave(self, n_bytes: int) -> None:
        """Give the room of a body back."""
        self._bytes -= n_bytes


class Porter:
    """ASGI middleware: 429 before a body is read, where :class:`Door` says so.

    Args:
        app: What gets the requests.
        door: Whether they can be let in.
        paths: Where requests go that need the model; others pass.
        undeclared: Bytes to make room for where a request does not declare them.
        problem: Writes the report for a status, a detail and seconds to wait.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        door: Door,
        paths: Collection[str],
        undeclared: int,
        problem: Callable[[int, str, int | None], Response],
    ) -> None:
        self._app, self._door, self._paths = app, door, paths
        self._undeclared, self._problem = undeclared, problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in self._paths:
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        n_bytes = min(int(declared[:18]), self._undeclared) if declared.isdecimal() else self._undeclared
        try:
            self._door.enter(n_bytes)
        except Overloaded as error:
            await self._problem(429, error.message, error.retry_after_s)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.leave(n_bytes)
