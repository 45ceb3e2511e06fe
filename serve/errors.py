"""This module is the part of the error tree that only a server needs.

::

    InputRefused
    ├── FieldRefused      names the field of the request that is wrong
    └── CoverageTooLow    too little of what was sent is known to the model
    ConflictError
    ├── Overloaded        the queue is full: come back after ``retry_after_s``
    ├── DeadlineExceeded  no answer within the time that was allowed
    ├── Unavailable       no model is ready to answer
    └── StaleModel        the request was decoded for a checkpoint that is no longer there
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from store.errors import ConflictError, InputRefused


def without_place(text: str, place: str, name: str) -> str:
    """Return a text with a name where a place of this machine was: replies say no places."""
    ways = sorted({place, str(Path(place)), os.path.abspath(place)} - {""}, key=len, reverse=True)
    pattern = "|".join(re.escape(way) for way in ways)
    return re.sub(rf"(?<![\w./-])(?:{pattern})(?=[/:,\s]|$)", lambda _: name, text) if ways else text


class FieldRefused(InputRefused):
    """One field of a request is wrong; ``field`` is its path, as in ``counts.RNA.indptr``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class CoverageTooLow(FieldRefused):
    """Too small a share of the counts belongs to features that the model knows."""


class Overloaded(ConflictError):
    """More work is waiting than the server allows; try again after ``retry_after_s`` seconds.

    ``full_s`` is in how many seconds room for one more of this size comes up, 0 where that is not known.
    """

    def __init__(self, message: str, retry_after_s: int, full_s: float = 0.0) -> None:
        super().__init__(message, retry_after_s, full_s)
        self.message = message
        self.retry_after_s = retry_after_s
        self.full_s = full_s

    def __str__(self) -> str:
        return self.message


class DeadlineExceeded(ConflictError, TimeoutError):
    """The answer was not ready within the time allowed; the work was dropped."""


class Unavailable(ConflictError):
    """No model is ready to answer: it is starting, stopping, or has failed."""


class StaleModel(ConflictError):
    """The request was decoded for a checkpoint that is no longer there, or not there yet."""
