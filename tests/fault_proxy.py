"""A proxy in front of an S3 server that fails now and then, as real networks and stores do.

It is a process of its own: TileDB holds the interpreter's lock while it waits for an answer.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

KINDS = ("500", "503", "reset", "lost reply", "half body")
CODES = {"403": "AccessDenied", "409": "ConditionalRequestConflict", "500": "InternalError", "503": "SlowDown"}
"""Kinds of a reply that is an error, and what S3 calls it."""
LATE_S = {"slow": 0.2, "stalled": 3.0}
"""Kinds of a reply that comes late, and how late."""
SHORT = "short body"
"""A kind that no client of S3 notices: half of what was asked for, which calls itself the whole."""


class FaultProxy(ThreadingHTTPServer):
    """Forwards to ``target``; of ``share`` of the requests one of ``kinds`` goes wrong, the same for the same seed.

    Only those go wrong in whose ``METHOD /path?query`` the pattern ``only`` is found, and at most ``most`` of them.
    """

    daemon_threads = True

    def __init__(
        self,
        target: str,
        share: float,
        kinds: tuple[str, ...] = KINDS,
        seed: int = 0,
        only: str = "",
        most: int = 10**9,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.share, self.kinds = target, share, kinds
        self.only, self.most = only, most
        self.random = random.Random(seed)
        self.client = httpx.Client(timeout=30)
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, request: str) -> str:
        with self.lock:
            self.requests += 1
            if not re.search(self.only, request) or self.faults.total() >= self.most:
                return ""
            kind = self.random.choice(self.kinds) if self.random.random() < self.share else ""
            if kind:
                self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, *words: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _any(self) -> None:
        body = self._body()
        if self.path == "/faults":
            self._answer(200, {}, json.dumps(self.server.faults).encode())
            return
        if self.path == "/requests":
            self._answer(200, {}, str(self.server.requests).encode())
            return
        kind = self.server.fault(f"{self.command} {self.path}")
        time.sleep(LATE_S.get(kind, 0))
        if code := CODES.get(kind):
            self._answer(int(kind), {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        if kind == "reset":
            self.close_connection = True
            return
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("connection", "expect")}
        reply = self.server.client.request(self.command, self.server.target + self.path, headers=headers, content=body)
        if kind == "lost reply":
            self.close_connection = True
            return
        kept = {key: value for key, value in reply.headers.items() if key.lower() not in SKIPPED}
        if kind == SHORT:
            self._answer(reply.status_code, kept, reply.content[: len(reply.content) // 2])
            return
        self._answer(
            reply.status_code, kept, reply.content, cut=kind == "half body", size=reply.headers.get("content-length")
        )

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["transfer-encoding"]
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False, size: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", size or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


SKIPPED = ("connection", "transfer-encoding", "content-length", "server", "date", "content-encoding")


@contextmanager
def fault_proxy(
    target: str, share: float, kinds: tuple[str, ...] = KINDS, seed: int = 0, only: str = "", most: int = 10**9
) -> Iterator[str]:
    """Run a proxy for as long as the block; yields its address.

    There, ``/faults`` tells what went wrong so far, and ``/requests`` how many requests came.
    """
    command = [sys.executable, __file__, target, str(share), ",".join(kinds), str(seed), only, str(most)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


if __name__ == "__main__":
    made = FaultProxy(
        sys.argv[1], float(sys.argv[2]), tuple(sys.argv[3].split(",")), int(sys.argv[4]), sys.argv[5], int(sys.argv[6])
    )
    print(made.url, flush=True)
    made.serve_forever()
