"""This module lets a run end in order when it is asked to: its driver asks, its first worker hears.

They speak through a file in the run's folder, which both see. It is there only while steps are taken, by whom it will
be read: so whoever asks knows whether to wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOOKED_S = 0.5
"""Seconds between two looks at the file."""


class Ending:
    """What a run's driver and its first worker say to each other of its end.

    Args:
        folder: The run's.

    Attributes:
        asked: The run was asked to end, as this process knows.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ending"
        self.asked, self._looked = False, -math.inf

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take steps that may be asked to end; a file that cannot be written stops none, and nobody waits for them."""
        with suppress(OSError):
            self.path.write_text("", encoding="utf-8")
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Have nobody wait: no steps are taken."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def ask(self) -> bool:
        """Ask the run to end; return whether somebody takes steps, and will hear it."""
        try:
            with self.path.open("r+", encoding="utf-8") as file:
                file.write("end\n")
        except OSError:
            return False
        self.asked = True
        return True

    def heard(self) -> bool:
        """Say whether the run was asked to end, as it was known half a second ago."""
        now = time.monotonic()
        if not self.asked and now - self._looked >= LOOKED_S:
            self._looked = now
            with suppress(OSError):
                self.asked = bool(self.path.read_text(encoding="utf-8"))
        return self.asked
