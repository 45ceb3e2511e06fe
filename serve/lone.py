"""This module is what a server has to itself: its port, and on a cluster its place. It loads nothing large."""

from __future__ import annotations

import errno
import socket

from store.errors import ConflictError, UsageError


class Lone:
    """An actor that ends with the driver that made it: while its name is taken, another server's driver lives."""


def free_port(host: str, port: int) -> int:
    """Return ``port`` when nobody listens on it; for 0, one that is free now.

    Raises:
        ConflictError: Somebody listens there.
        UsageError: This machine cannot listen on ``host``.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except PermissionError:
        raise UsageError(f"port {port} needs rights that you do not have; choose one above 1023 with --port") from None
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConflictError(f"port {port} on {host} is in use; choose another with --port, or --port 0") from None
        raise UsageError(f"cannot listen on {host}:{port} ({error}); check --host and --port") from None
