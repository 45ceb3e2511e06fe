"""This module lets in who has a token, as often as the token's owner may ask.

The file that holds them is TOML, a table for each owner::

    [atlas-team]
    token = "at least 24 characters, such as those of: openssl rand -hex 24"
    requests_per_minute = 600

Tokens are compared in constant time, as digests, and every one of them each time, so that the time tells nothing.
Health and metrics are open, for those who watch the server; so is the page at ``/``, which knows nothing by itself.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from store.errors import MissingError, SettingsError
from store.settings import Settings, parse_settings

SHORTEST = 24
"""Characters of a token."""
OPEN = ("/v1/health/", "/metrics", "/page/")
"""Paths that need no token begin so."""
HOME = "/"
"""Needs none either: the page, on which a person types one."""


class Owner(Settings):
    """What the file says of a token's owner, beside the token, which no error may show."""

    requests_per_minute: int = Field(default=0, ge=0)
    """How often the owner may ask, of each ingress; 0 knows no bound. A minute's worth may come at once."""


@dataclass
class Purse:
    """What an owner may still ask: it fills with time, up to a minute's worth."""

    digest: bytes
    per_minute: int
    left: float = field(init=False)
    seen: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = float(self.per_minute)

    def take(self, now: float) -> float:
        """Take one request; return the seconds to wait until there is one, 0 when it was taken."""
        if not self.per_minute:
            return 0.0
        self.left = min(self.per_minute, self.left + (now - self.seen) * self.per_minute / 60)
        self.seen = now
        if self.left < 1:
            return (1 - self.left) * 60 / self.per_minute
        self.left -= 1
        return 0.0


def read_tokens(path: str) -> dict[str, Purse]:
    """Read the owners of tokens.

    Raises:
        MissingError: There is no such file.
        SettingsError: It is not TOML, says something else, holds nobody, gives two owners one token, or one that no
            header can carry.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(f"{path}: the file of tokens cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise SettingsError(f'{path}: not TOML; write [OWNER] and token = "..." for each owner') from None
    purses = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f'{path}: {name}: write [OWNER] above token = "..."')
        token = table.pop("token", None)
        if not isinstance(token, str) or len(token) < SHORTEST:
            raise SettingsError(f"{path}: {name}: token: a text of at least {SHORTEST} characters is needed")
        if not all("!" <= character <= "~" for character in token):  # what a header carries unchanged
            said = "only letters, digits and signs of ASCII, without spaces, can be sent in a header"
            raise SettingsError(f"{path}: {name}: token: {said}; make one with: openssl rand -hex 24")
        owner = parse_settings(Owner, table, where=f"{path}: {name}")
        purses[name] = Purse(_digest(token), owner.requests_per_minute)
    if not purses:
        raise SettingsError(f"{path}: holds no token, so nobody could ask")
    if len({purse.digest for purse in purses.values()}) < len(purses):
        raise SettingsError(f"{path}: two owners have the same token; give each their own")
    return purses


class Gate:
    """ASGI middleware: 401 without a known token, 429 to who asks too often.

    Args:
        app: What gets the requests.
        purses: Owner to what they may ask.
        problem: Writes the report for a status, a detail and seconds to wait.
    """

    def __init__(
        self, app: ASGIApp, *, purses: dict[str, Purse], problem: Callable[[int, str, int | None], Response]
    ) -> None:
        self._app, self._purses, self._problem = app, purses, problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        owner = self._owner(token.strip()) if kind.lower() == "bearer" else None
        if owner is None:
            said = "send a known token: Authorization: Bearer TOKEN"
            response = self._problem(401, said, None)
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        wait_s = self._purses[owner].take(time.monotonic())
        if wait_s:
            per_minute = self._purses[owner].per_minute
            said = f"{owner} may ask {per_minute:,} times a minute; try again later"
            await self._problem(429, said, int(wait_s) + 1)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _owner(self, token: str) -> str | None:
        digest, found = _digest(token), None
        for name, purse in self._purses.items():
            if hmac.compare_digest(purse.digest, digest):
                found = name
        return found


class Misdirected:
    """ASGI middleware: 421 to who asks under a name that is not this machine's.

    A page on the web may let its own name lead to 127.0.0.1 (DNS rebinding): to the browser, what answers there is that
    page's, and its scripts may read it. A server that knows no tokens tells such requests by the name that they ask
    for. Addresses are no names: none leads elsewhere.

    Args:
        app: What gets the requests.
        hosts: Names that may be asked for beside ``localhost`` and those below it; ``*`` is every name.
        problem: Writes the report for a status, a detail and seconds to wait.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], problem: Callable[[int, str, int | None], Response]
    ) -> None:
        self._app, self._hosts, self._problem = app, frozenset(hosts), problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if not host or "*" in self._hosts or self._is_ours(name_of(host)):
            await self._app(scope, receive, send)
            return
        said = f"this server answers to this machine alone, not as {host[:100]!r}: ask 127.0.0.1, or start it with "
        said += """--set 'hosts=["NAME"]', or with --tokens FILE"""
        await self._problem(421, said, None)(scope, receive, send)

    def _is_ours(self, name: str) -> bool:
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return name in self._hosts or name == "localhost" or name.endswith(".localhost")


def name_of(host: str) -> str:
    """Return the name or address in a ``Host`` header, in small letters, without the port."""
    return re.sub(r":\d*$", "", host.strip().lower()).rstrip(".")


def is_open(path: str) -> bool:
    """Say whether a path answers without a token."""
    return path == HOME or path.startswith(OPEN)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
