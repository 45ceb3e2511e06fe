"""A server of its own process on loopback, for as long as a test needs it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from ports import HOST, free_port


@contextmanager
def local_server(command: Callable[[str], list[str]]) -> Iterator[str]:
    """Run ``command(port)`` and yield the address once it answers; the process is gone afterwards."""
    port = str(free_port())
    url = f"http://{HOST}:{port}"
    server = subprocess.Popen(command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(20)
