"""This module knows the lakes that may be asked about, by name, and the indexes of their cells.

Requests say names; where a lake lies is said by the settings alone, and by no reply.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.errors import FieldRefused, Unavailable
from serve.index import Known, VectorIndex, list_indexes
from store import records
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, StorageError, UsageError

log = logging.getLogger("somaflow.serve")
FRESH_S = 2.0
"""Seconds for which nobody looks whether there are other indexes."""
NEVER = -math.inf
_HOLDER = re.compile(r" by process \d+ on \S+")
"""How a lock says who holds it: for those who run commands on these machines."""
_COMMANDS = {"run the same command again": "ask again", "--replace": '"replace": true'}
"""What messages advise who runs a command, and what who asks over HTTP does instead."""
_SHOWN: tuple[type[SomaflowError], ...] = (MissingError, ConflictError, InputRefused, StorageError)


@dataclass(frozen=True)
class Named:
    """An index of a lake that has a name here."""

    lake: str
    known: Known

    @property
    def path(self) -> tuple[str, str, str]:
        """Lake, organism and key."""
        return (self.lake, self.known.generation.organism, self.known.generation.key)

    @property
    def name(self) -> str:
        """What a request may call it."""
        return "/".join(self.path)

    @property
    def model_sha256(self) -> str:
        """The model that made it."""
        return str(self.known.manifest["model_sha256"])


class Atlas:
    """The lakes of a server."""

    def __init__(self, lakes: Mapping[str, str]) -> None:
        self.lakes = {name: records.absolute(uri) for name, uri in lakes.items()}
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._listed: list[Named] = []
        self._looked = NEVER
        self._open: dict[tuple[str, str, str, int], VectorIndex] = {}
        self._opening: set[tuple[str, str, str, int]] = set()
        self.searcher = ThreadPoolExecutor(1, "neighbors")
        """Searches take turns here, so that those that wait take no thread from the decoding of other requests."""

    def uri(self, name: str) -> str:
        """Return where a lake lies.

        Raises:
            MissingError: The server knows no lake of this name.
        """
        if name not in self.lakes:
            known = ", ".join(self.lakes) or "none; start the server with --set lakes.NAME=LAKE"
            raise MissingError(f"no lake {name!r} here; lakes: {known}")
        return self.lakes[name]

    def indexes(self) -> list[Named]:
        """Return the indexes of all lakes, as they were ``FRESH_S`` ago at most.

        One request looks when it is time; while it does, which takes long where a lake lies afar, others take what is
        known, and wait only where nothing is.
        """
        if self._due() and self._looking.acquire(blocking=self._looked == NEVER):
            try:
                if self._due():
                    now = time.monotonic()
                    listed = [Named(name, one) for name, uri in self.lakes.items() for one in list_indexes(uri)]
                    alive = {one.known.id for one in listed}
                    with self._lock:
                        self._open = {key: index for key, index in self._open.items() if key in alive}
                    self._listed, self._looked = listed, now
            finally:
                self._looking.release()
        return self._listed

    def _due(self) -> bool:
        return time.monotonic() - self._looked >= FRESH_S

    def find(self, wanted: str, model_sha256: str) -> tuple[Named, VectorIndex]:
        """Return the index that is meant, opened.

        Args:
            wanted: ``LAKE/ORGANISM/KEY``, or the beginning of it, or nothing, where that leaves one of the model's.
            model_sha256: The model that answers now.

        Raises:
            MissingError: There is none.
            ConflictError: Another model made it.
            FieldRefused: Several fit.
            Unavailable: Somebody else's request is opening it.
        """
        parts = tuple(wanted.split("/")) if wanted else ()
        if parts:
            self.uri(parts[0])
        there = self.indexes()
        fitting = [one for one in there if one.path[: len(parts)] == parts]
        if not fitting:
            known = ", ".join(one.name for one in there) or "none"
            raise MissingError(
                f"no index {wanted!r} here; indexes: {known}; POST /v1/jobs makes one of a lake, and so does "
                "python -m serve embed-lake CHECKPOINT --lake LAKE"
            )
        of_model = [one for one in fitting if one.model_sha256 == model_sha256]
        if not of_model:
            raise ConflictError(
                f"index {fitting[0].name} was made by model {fitting[0].model_sha256[:12]}, and {model_sha256[:12]} "
                "answers now; embed the lake with the new one, to the end of its index: POST /v1/jobs, or python -m "
                "serve embed-lake CHECKPOINT --lake LAKE"
            )
        if len(of_model) > 1:
            raise FieldRefused("index", f"several fit; say which: {', '.join(one.name for one in of_model)}")
        return of_model[0], self._opened(of_model[0].known)

    def _opened(self, known: Known) -> VectorIndex:
        """Return an index; the first to ask reads all of it, others are told to come again."""
        with self._lock:
            if known.id in self._open:
                return self._open[known.id]
            if known.id in self._opening:
                raise Unavailable("the index is being read for the first time; try again")
            self._opening.add(known.id)
        try:
            index = VectorIndex(known)
            with self._lock:
                self._open[known.id] = index
            return index
        finally:
            self._opening.discard(known.id)

    def told(self, error: SomaflowError) -> SomaflowError:
        """Return an error as a client may read it: with names where places were."""
        text = self.plain(str(error))
        if text != str(error):
            log.warning("%s", error)
        if isinstance(error, UsageError):
            return InputRefused(text)
        kind = next((kind for kind in _SHOWN if type(error) is kind), None)
        return error if kind is None else kind(text)

    def plain(self, text: str) -> str:
        """Return a text with lakes' names where their places were, without processes, for those who ask over HTTP."""
        for name, uri in sorted(self.lakes.items(), key=lambda item: -len(item[1])):
            text = text.replace(uri, f"lake {name}")
        for words, said in _COMMANDS.items():
            text = text.replace(words, said)
        return _HOLDER.sub("", text)
