"""This module lets one driver at a time write to a lake, and lets the next one in when that one has died.

Locks are numbered records, each created once: the newest number holds the lake unless it was given back. So a dead
holder is passed by creating the next number, which exactly one of any number of contenders can do. Of a holder in the
same place, which is a machine and on Linux the namespace in which process ids count, the system says at once whether it
lives. One elsewhere, as in another container, shows it by a beat that it writes every few seconds; a contender watches
whether the beat changes, so no two clocks are ever compared.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from store import records
from store.errors import ConflictError, StorageError

log = logging.getLogger("somaflow.store")

BEAT_S = 5.0
PATIENCE_S = 20.0
"""A holder elsewhere whose beat stands still for so long is taken for dead."""
ALIVE = "alive"
"""What is known of a process where the system hides when it began."""


class WriterLock:
    """One driver's claim to write to a lake, or to something else in it that has a folder for its locks.

    Attributes:
        number: Of the record that holds it; -1 before.
        passed_elsewhere: The holder before was in another place and did not give the lock back: it was taken for
            dead, and a request of its may still be on its way.
    """

    def __init__(self, lake_uri: str, folder: str | None = None, what: str = "the lake") -> None:
        self.lake_uri, self.what = lake_uri, what
        self.folder = folder or records.join(lake_uri, records.FOLDER, "locks")
        self.number = -1
        self.passed_elsewhere = False
        self._beats, self._beating = 0, threading.Lock()
        self._lived = -math.inf
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ConflictError: A living process holds it.
        """
        number, holder = self._newest()
        left = bool(holder) and not self._given_back(number)
        if left and self._alive(number, holder):
            raise ConflictError(
                f"{self.lake_uri}: {self.what} is being written by process {holder['pid']} on {holder['host']} since "
                f"{holder['since']}; wait until it has finished and run the same command again"
            )
        mine = {**_place(), "pid": os.getpid(), "born": _born(os.getpid()), "since": _now()}
        if not records.create(self._record(number + 1), mine):
            raise ConflictError(f"{self.lake_uri}: another driver was first; wait and run the same command again")
        self.number = number + 1
        self.passed_elsewhere = left and not _is_here(holder)
        with suppress(StorageError):  # as where one may write and not remove
            for name in records.names(self.folder):
                if (old := name.partition(".")[0]).isdigit() and int(old) < self.number:
                    records.remove(records.join(self.folder, name))
        self._thread = threading.Thread(target=self._beat, daemon=True, name="writer-lock")
        self._thread.start()

    def check(self) -> None:
        """Show life, and make sure that the lake is still ours.

        Raises:
            ConflictError: Another driver took us for dead and holds the lake now.
        """
        if time.monotonic() - self._lived > BEAT_S:
            self._show_life()
        if self._newest()[0] != self.number:
            raise ConflictError(
                f"{self.lake_uri}: another driver holds {self.what} now, because this one did not show any life for "
                f"{PATIENCE_S:g} s; nothing more is written here; run the same command again when it has finished"
            )

    def renew(self) -> None:
        """Do as :meth:`check` does where the last sign of life is old; before, nobody can have taken over.

        Raises:
            ConflictError: Another driver took us for dead and holds the lake now.
        """
        if time.monotonic() - self._lived > PATIENCE_S / 2:
            self.check()

    def release(self) -> None:
        """Give the lock back; where that fails while an error is under way, it is told and the error goes on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.number < 0:
            return
        under_way = sys.exc_info()[1]
        try:
            records.create(self._record(self.number, "released"), {})
        except Exception as error:
            if under_way is None:
                raise
            log.warning("%s: %s could not be given back: %s", self.lake_uri, self.what, error)

    def _record(self, number: int, kind: str = "json") -> str:
        return records.join(self.folder, f"{number:012d}.{kind}")

    def _newest(self) -> tuple[int, dict[str, Any]]:
        found = [name for name in records.names(self.folder) if name.endswith(".json")]
        if not found:
            return -1, {}
        return int(found[-1].removesuffix(".json")), records.read(records.join(self.folder, found[-1])) or {}

    def _given_back(self, number: int) -> bool:
        return records.read(self._record(number, "released")) is not None

    def _alive(self, number: int, holder: dict[str, Any]) -> bool:
        if _is_here(holder):
            born = _born(int(holder["pid"]))
            if born != ALIVE or holder["born"] == ALIVE:
                return bool(born == holder["born"] != "")
        first = records.read(self._record(number, "beat"))
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE_S / 4))
            if self._given_back(number):
                return False
            if records.read(self._record(number, "beat")) != first:
                return True
        return False

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S if self._beats else 0):
            self._show_life()

    def _show_life(self) -> None:
        """Write a beat; one that fails is told, and the next is due as ever."""
        with self._beating:
            self._beats += 1
            begun = time.monotonic()
            try:
                records.replace(self._record(self.number, "beat"), {"beat": self._beats})
                self._lived = begun
            except Exception as error:  # noqa: BLE001 - whatever a store's client may raise
                log.warning("%s: no sign of life could be written, it is tried again: %s", self.lake_uri, error)


def _place() -> dict[str, str]:
    """Return where this process is: containers that share a host's name have process ids of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: there are no such namespaces
        space = ""
    return {"host": socket.gethostname(), "space": space}


def _is_here(holder: dict[str, Any]) -> bool:
    return all(holder.get(name) == value for name, value in _place().items())


def _born(pid: int) -> str:
    """Return what tells a process from a later one of the same number; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return ALIVE
    return ALIVE


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
