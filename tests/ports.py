"""Ports for servers of tests that must be told one before they start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

HOST = "127.0.0.1"
GIVEN_TO_NOBODY = range(20_000, 32_000)
"""Below the ports that the system gives to whoever asks for any, above those that Ray gives its workers."""


def free_ports(n_ports: int) -> list[int]:
    """Return ports that nobody listens on, nor is given in the seconds until they are used."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.Random().sample(GIVEN_TO_NOBODY, len(GIVEN_TO_NOBODY)):
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            found.append(port)
            if len(found) == n_ports:
                break
    return found


def free_port() -> int:
    """Return one such port."""
    return free_ports(1)[0]
