"""This module reads bodies whose readers crash and are deceived (Arrow, h5ad) in processes of their own, with limits.

A child (``python -m serve.foreign``) turns one body after the other into npz, which is then read as every other npz is:
nothing that a child says is believed. Children are started when the first such body comes and kept warm. One that
crashes, runs out of memory or does not answer in time costs its request a refusal; another takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from serve.arrow import ARROW
from serve.errors import DeadlineExceeded, FieldRefused, Overloaded, Unavailable
from serve.h5ad import FORM
from serve.npz import REQUEST, write_npz
from serve.settings import Limits

FOREIGN = (ARROW, FORM)
"""Content types that are read here."""
CHILDREN = 2
USES = 1_000
"""A child that has read so many bodies makes place for a new one, so that what leaks in it is given back."""
WAITING = 64
"""Bodies that may wait for a child; more are answered 429."""
HEADER = struct.Struct("<2q")
"""Sizes of what is said of a body, and of the body."""
START_S, GRACE_S = 60.0, 2.0
"""How long a child may take to start, and to answer after its time is up."""
READY = b"r"
KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "HOME")
"""What a child gets of the environment: no secrets."""


@dataclass(frozen=True)
class Read:
    """A body as npz, and which matrix of a file it comes from (empty: there was no choice)."""

    npz: bytes
    chosen: str = ""


class Child:
    """A process that reads foreign bodies, one at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_IO_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serve.foreign", str(theirs.fileno()), limits.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env={
                **{name: os.environ[name] for name in KEPT if name in os.environ},
                **threads,
                "ARROW_DEFAULT_MEMORY_POOL": "system",  # so that the limit holds, and what is free is given back
                "MALLOC_ARENA_MAX": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        theirs.close()
        self.uses = 0
        self._ready = False

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def read(self, kind: str, body: bytes, limits: Limits) -> Read:
        """Return a body of this Content-Type as npz, if it is within the limits of the question.

        Raises:
            FieldRefused: It cannot be used.
            EOFError: The child is gone; it says why.
            Unavailable: It did not start.
        """
        self._wait()
        self.uses += 1
        said = json.dumps({"kind": kind, "limits": limits.model_dump()}).encode()
        deadline = time.monotonic() + self._limits.reader_s + GRACE_S
        try:
            self._socket.settimeout(self._limits.reader_s + GRACE_S)
            self._socket.sendall(HEADER.pack(len(said), len(body)) + said)
            self._socket.sendall(body)
            n_said, n_body = HEADER.unpack(self._receive(HEADER.size, deadline))
            if not (0 <= n_said <= self._limits.reader_bytes and 0 <= n_body <= self._limits.reader_bytes):
                raise EOFError("it answered with more than it may")
            answer, npz = json.loads(self._receive(n_said, deadline)), self._receive(n_body, deadline)
        except OSError:
            raise EOFError(self._death()) from None
        if "field" in answer:
            raise FieldRefused(answer["field"], answer["message"])
        return Read(npz, answer["chosen"])

    def _wait(self) -> None:
        """Wait until it has started; the time for that is not the body's."""
        if self._ready:
            return
        self._socket.settimeout(START_S)
        with contextlib.suppress(OSError):
            self._ready = self._socket.recv(len(READY)) == READY
        if not self._ready:
            raise Unavailable("no process to read this body could be started; try again")

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _receive(self, size: int, deadline: float) -> bytes:
        buffer = bytearray(size)
        view, filled = memoryview(buffer), 0
        while filled < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            got = self._socket.recv_into(view[filled:])
            if got == 0:
                raise EOFError(self._death())
            filled += got
        return bytes(buffer)

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        code = self._process.poll()
        if code in (None, -signal.SIGALRM):
            return f"reading it took longer than {self._limits.reader_s:g} s"
        if code == -signal.SIGKILL:
            return "its reader was killed; it may need more memory than there is"
        return "its reader crashed on it: it is damaged, or needs more memory than a reader has"


class Readers:
    """A few children that read foreign bodies for one server."""

    def __init__(self, limits: Limits, children: int = CHILDREN) -> None:
        self._limits = limits
        self._free: deque[Child] = deque()
        self._children = children
        self._threads = self._pool()
        self._waiting = 0
        self.crashes = 0

    async def read(self, kind: str, body: bytes, limits: Limits | None = None) -> Read:
        """Return a body of this Content-Type as npz, if it is within these limits (none: the server's).

        Raises:
            FieldRefused: It cannot be used, or broke its reader.
            Overloaded: Too many wait for a reader.
            DeadlineExceeded: None was free in time.
            Unavailable: None could be started.
        """
        if self._waiting >= WAITING:
            raise Overloaded("too many Arrow and h5ad bodies are waiting to be read; send the request again later", 1)
        self._waiting += 1
        try:
            reading = asyncio.get_running_loop().run_in_executor(
                self._threads, self._read, kind, body, limits or self._limits
            )
            return await asyncio.wait_for(reading, self._limits.timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"no reader was free within {self._limits.timeout_s:g} s; send it again") from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the children; who asks afterwards gets new ones, as an app that is started again."""
        self._threads.shutdown(cancel_futures=True)
        self._threads = self._pool()
        while self._free:
            self._free.pop().close()

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._children, thread_name_prefix="foreign")

    @property
    def pids(self) -> list[int]:
        """Process numbers of the children that wait."""
        return [child.pid for child in self._free]

    def _read(self, kind: str, body: bytes, limits: Limits) -> Read:
        """Runs in one of as many threads as there may be children."""
        try:
            child = self._free.pop()
        except IndexError:  # none is free; to look first would let another thread take the last one between
            child = Child(self._limits)
        if not child.alive:  # it ended while nobody asked
            child.close()
            child = Child(self._limits)
        try:
            read = child.read(kind, body, limits)
        except FieldRefused:
            self._back(child)
            raise
        except Unavailable:
            child.close()
            raise
        except Exception as error:  # noqa: BLE001 - whatever came of it, this child is not asked again
            child.close()
            self.crashes += 1
            self._free.append(Child(self._limits))  # it starts while nobody waits
            why = str(error) if isinstance(error, EOFError) else "its reader answered nonsense"
            raise FieldRefused("body", f"could not be read: {why}") from None
        self._back(child)
        return read

    def _back(self, child: Child) -> None:
        if child.uses >= USES:
            child.close()
            child = Child(self._limits)
        self._free.append(child)


def translate(kind: str, body: bytes, limits: Limits) -> Read:
    """Turn a body into npz; runs in a child.

    Raises:
        FieldRefused: It cannot be used.
    """
    from serve import arrow, h5ad
    from store.errors import InputRefused, is_of_memory

    chosen = ""
    try:
        if kind.lower().startswith(ARROW):
            message, arrays = arrow.read(body, limits)
        else:
            message, arrays, chosen = h5ad.read(kind, body, limits)
        return Read(write_npz({REQUEST: message, **arrays}), chosen)
    except FieldRefused:
        raise
    except InputRefused as error:
        raise FieldRefused("file", str(error)[:500]) from None
    except Exception as error:  # noqa: BLE001 - foreign bytes make parsers raise anything
        if is_of_memory(error):
            raise FieldRefused("body", "needs more memory than a reader has; send fewer cells at a time") from None
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FieldRefused("body", f"cannot be read: {type(error).__name__}: {reason[:200]}") from None


def _serve(connection: socket.socket, limits: Limits) -> None:
    with connection, connection.makefile("rb") as incoming:
        connection.sendall(READY)
        while len(header := incoming.read(HEADER.size)) == HEADER.size:
            n_said, n_body = HEADER.unpack(header)
            said, body = json.loads(incoming.read(n_said)), incoming.read(n_body)
            if len(body) < n_body:
                return
            answer: dict[str, Any]
            signal.setitimer(signal.ITIMER_REAL, limits.reader_s)  # its default action ends this process
            try:
                read = translate(said["kind"], body, Limits.model_validate(said["limits"]))
                answer, npz = {"chosen": read.chosen}, read.npz
            except FieldRefused as error:
                answer, npz = {"field": error.field, "message": error.message}, b""
            signal.setitimer(signal.ITIMER_REAL, 0)
            written = json.dumps(answer).encode()
            connection.sendall(HEADER.pack(len(written), len(npz)) + written)
            connection.sendall(npz)
            del body, npz


def _confine(limits: Limits) -> None:
    """Bound this process: memory, no core, no file written."""
    resource.setrlimit(resource.RLIMIT_DATA, (limits.reader_bytes, limits.reader_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; this one ends with its connection


if __name__ == "__main__":
    _limits = Limits.model_validate_json(sys.argv[2])
    _confine(_limits)
    _serve(socket.socket(fileno=int(sys.argv[1])), _limits)
