"""This module reads sources in a process of their own, with limits, because foreign files crash and deceive readers.

The child (``python -m ingest.sandbox``) opens one dataset and answers requests; what it sends back is JSON and Arrow,
validated here before use, never pickles. When it crashes, runs out of memory or does not answer in time, that dataset
is refused and nothing else is harmed.

Shape letters used in this module:
    C  cells of a block      G  features in the lake's names
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse

from ingest.job import SourceSettings
from ingest.sources import kind_of
from ingest.sources.form import changed
from store import errors
from store.errors import InputRefused, SomaflowError
from store.schema import DatasetPlan, Features

SHARE = 0.6
"""The child's part of a worker's memory; the rest is for the process that writes."""

IDLE_S = 10.0
"""A child that nobody asks for so long ends, and gives back its memory; the next question starts another."""

PART_ROWS = 2**17
"""Rows of a table of cells that are sent at a time, so that no second copy of the whole is made."""

LEFT = 0
FULL = 3
"""How a child ends that has no memory left, not even to say so."""
CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS}
"""Ends after which a question is asked once more: libraries crash on sound files now and then, bad files always do."""

SIZE = struct.Struct("<q")


class Reader:
    """A child that has one dataset open; a context manager.

    Args:
        source: The source.
        name: The dataset, of those that the source holds.
        memory_mb: Memory of a worker; the child may use ``SHARE`` of it.
        timeout_s: Longest wait for an answer.
    """

    def __init__(self, source: SourceSettings, name: str, *, memory_mb: int, timeout_s: float) -> None:
        self.source, self.name = source, name
        self.memory_mb, self.timeout_s = memory_mb, timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._start()

    def _start(self) -> None:
        self._opened_as: str | None = None
        request_read, self._request = os.pipe()
        self._answer, answer_write = os.pipe()
        words = [str(request_read), str(answer_write), str(int(self.memory_mb * SHARE)), str(os.getpid())]
        settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "SOMAFLOW_TILEDB_THREADS"), "1")
        settings["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve more than the limit allows
        if kind_of(self.source) == "census":  # its texts are read and let go of: not to lie between what is kept
            settings["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ingest.sandbox", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(request_read, answer_write),
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.close(request_read)
        os.close(answer_write)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The child's process number."""
        return self._child.pid

    def close(self) -> None:
        """End the child."""
        self._stop()
        self._errors.close()

    def _stop(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for descriptor in (self._request, self._answer):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def names(self) -> list[str]:
        """Name the datasets in the source."""
        values, _ = self._ask("names")
        return [str(name) for name in values["names"]]

    def fingerprint(self) -> str:
        """Return what changes when the source is written to, as it is now."""
        values, _ = self._ask("fingerprint")
        return str(values["fingerprint"])

    def inspect(self) -> tuple[dict[str, Any], DatasetPlan, dict[str, pa.Table]]:
        """Return what is known of a dataset before its values are read.

        Returns:
            ``spans``, ``mapped``, ``problems``, ``notes``, ``fingerprint``; the plan; ``obs`` and side tables by name,
            texts that cells share as dictionaries.
        """
        values, tables = self._ask("inspect")
        plan = values.pop("plan")
        self._opened_as = values["fingerprint"]
        features = {}
        for name in plan.pop("features"):
            table = tables.pop(f"features {name}")
            features[name] = Features(*(column.to_pylist() for column in table.columns))
        return values, DatasetPlan(**plan, features=features), tables

    def check(self, measurement: str, span: tuple[int, int], budget_nnz: int, fingerprint: str) -> dict[str, Any]:
        """Return ``ingest.dataset.Checked`` of a span as a dictionary.

        Raises:
            InputRefused: The source has changed since ``fingerprint`` was taken, or cannot be read.
        """
        words = {"measurement": measurement, "start": span[0], "stop": span[1], "budget_nnz": budget_nnz}
        values, tables = self._ask("check", fingerprint=fingerprint, **words)
        cells = tables["cells"]
        return values | {name: cells[name].to_numpy() for name in cells.column_names}

    def rows(
        self, measurement: str, start: int, stop: int, n_features: int, fingerprint: str
    ) -> scipy.sparse.csr_matrix:
        """Read rows as counts_CG in the plan's order of features.

        Raises:
            InputRefused: The source has changed since ``fingerprint`` was taken, or cannot be read.
        """
        _, tables = self._ask("rows", measurement=measurement, start=start, stop=stop, fingerprint=fingerprint)
        data, indices = (tables["values"][name].to_numpy() for name in ("data", "indices"))
        indptr = tables["ends"]["indptr"].to_numpy()
        whole = len(indptr) == stop - start + 1 and indptr[0] == 0 and indptr[-1] == len(data) == len(indices)
        if (
            not whole
            or np.any(indptr[1:] < indptr[:-1])  # a difference of two may be beyond 64 bits
            or (len(indices) and not 0 <= indices.min() <= indices.max() < n_features)
        ):
            raise InputRefused(f"{self.source.uri}: {measurement}: its reader sent rows that are no matrix")
        return scipy.sparse.csr_matrix((data, indices, indptr), shape=(stop - start, n_features))

    def _ask(self, what: str, **words: Any) -> tuple[dict[str, Any], dict[str, pa.Table]]:
        source = self.source.model_dump(mode="json", exclude_unset=True)
        request = json.dumps({"do": what, "source": source, "name": self.name, **words}).encode()
        deadline = time.monotonic() + self.timeout_s
        # a child sees the file as it was when it opened it, so each version of a file gets a child of its own
        another = self._opened_as not in (None, words.get("fingerprint"))
        if another or self._child.poll() == LEFT:  # or nobody asked for a while, so it left
            self._stop()
            self._start()
        self._opened_as = words.get("fingerprint", "")
        for last_try in (False, True):
            try:
                os.write(self._request, SIZE.pack(len(request)) + request)
                header = json.loads(self._receive(deadline))
                tables = {
                    name: pa.concat_tables([self._table(deadline) for _ in range(parts)])
                    for name, parts in header["tables"].items()
                }
                break
            except (BrokenPipeError, EOFError):
                if last_try or self._child.wait() not in {LEFT, *CRASHES}:  # it may leave just as it is asked
                    raise InputRefused(f"{self.source.uri}: {self._death()}") from None
                self._stop()
                self._start()
                self._opened_as = words.get("fingerprint", "")
        if "error" in header:
            kind = getattr(errors, header["error"], InputRefused)
            known = isinstance(kind, type) and issubclass(kind, SomaflowError)
            raise (kind if known else InputRefused)(header["message"])
        return header["values"], tables

    def _table(self, deadline: float) -> pa.Table:
        try:
            table = pa.ipc.open_stream(pa.py_buffer(self._receive(deadline))).read_all()
            table.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputRefused(f"{self.source.uri}: its reader sent a table that is none: {error}") from error
        return table

    def _receive(self, deadline: float) -> bytes:
        (size,) = SIZE.unpack(self._bytes(SIZE.size, deadline))
        if not 0 <= size <= self.memory_mb * 2**20:
            raise InputRefused(f"{self.source.uri}: its reader sent {size:,} bytes; raise worker_memory_mb")
        return bytes(self._bytes(size, deadline))

    def _bytes(self, size: int, deadline: float) -> bytearray:
        buffer = bytearray(size)
        view, filled = memoryview(buffer), 0
        while filled < size:
            ready, _, _ = select.select([self._answer], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise InputRefused(
                    f"{self.source.uri}: reading it took longer than {self.timeout_s:g} s and was stopped; "
                    "raise timeout_s if the source is that slow"
                )
            got = os.readv(self._answer, [view[filled : filled + 2**20]])
            if got == 0:
                raise EOFError
            filled += got
        return buffer

    def _too_large(self) -> str:
        return (
            f"needs more memory than a reader has, {SHARE:.0%} of worker_memory_mb = {self.memory_mb:,}; raise "
            "worker_memory_mb"
        )

    def _death(self) -> str:
        """Say how the child ended; its own words stay out, for they may quote the file."""
        code = self._child.wait()
        self._errors.seek(0)
        if code == FULL or (code == -signal.SIGABRT and b"bad_alloc" in self._errors.read()):
            return self._too_large()
        if code == -signal.SIGKILL:
            return "its reader was killed; was the machine out of memory?"
        if code < 0:
            return (
                f"its reader crashed ({signal.Signals(-code).name}): the file is damaged or hostile; nothing was taken"
            )
        return f"its reader ended with status {code}; nothing was taken"


def _serve(request: int, answer: int) -> None:
    from ingest.dataset import OpenDataset, fingerprint_of  # slow, and only the child needs it

    opened: OpenDataset | None = None
    with os.fdopen(request, "rb", 0) as incoming, os.fdopen(answer, "wb") as outgoing:
        while select.select([incoming], [], [], IDLE_S)[0] and (size := incoming.read(SIZE.size)):
            words = json.loads(_exactly(incoming, SIZE.unpack(size)[0]))
            source = SourceSettings.model_validate(words["source"])
            try:
                if words["do"] == "names":
                    values, tables = _names(source)
                elif words["do"] == "fingerprint":
                    values, tables = {"fingerprint": fingerprint_of(source)}, {}
                else:
                    opened = opened or OpenDataset(source, words["name"])
                    values, tables = ANSWERS[words["do"]](opened, words)
                header: dict[str, Any] = {"values": values}
            except Exception as error:  # noqa: BLE001  every error is an answer
                if errors.is_of_memory(error):
                    sys.exit(FULL)
                tables, header = {}, _error(error, source.uri)
            parts = {name: _parts(table, words["do"]) for name, table in tables.items()}
            told = {name: len(several) for name, several in parts.items()}
            _send(outgoing, json.dumps({**header, "tables": told}).encode())
            for part in (part for several in parts.values() for part in several):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as stream:
                    stream.write_table(part)
                _send(outgoing, sink.getvalue())
            outgoing.flush()


def _exactly(incoming: Any, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = incoming.read(size - len(content))
        if not part:
            sys.exit(0)
        content += part
    return content


def _parts(table: pa.Table, what: str) -> list[pa.Table]:
    """Cut a table of cells; values, of which the budget is kept already, stay together and need no copy over there."""
    if what != "inspect":
        return [table]
    return [table.slice(start, PART_ROWS) for start in range(0, max(1, table.num_rows), PART_ROWS)]


def _send(outgoing: Any, content: Any) -> None:
    outgoing.write(SIZE.pack(len(content)))
    outgoing.write(content)


def _error(error: Exception, where: str = "") -> dict[str, str]:
    if isinstance(error, SomaflowError):
        return {"error": type(error).__name__, "message": str(error)}
    reason = str(error).strip().splitlines() or [""]
    return {"error": "InputRefused", "message": f"{where}: cannot be read: {type(error).__name__}: {reason[0][:300]}"}


def _names(source: SourceSettings) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    from ingest import sources

    return {"names": sources.names(source)}, {}


def _inspect(opened: Any, words: dict[str, Any]) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    found = opened.inspect()
    plan = {**asdict(found.plan), "features": list(found.plan.features)}
    tables = {"obs": _frame(found.obs), **{f"side {name}": _frame(frame) for name, frame in found.sides.items()}}
    for name, features in found.plan.features.items():
        tables[f"features {name}"] = pa.table(asdict(features))
    values = {name: getattr(found, name) for name in ("spans", "mapped", "problems", "notes", "fingerprint")}
    return {**values, "plan": plan}, tables


def _frame(frame: pd.DataFrame) -> pa.Table:
    """Return a table of what a source gave; a categorical becomes a dictionary, a column of mixed kinds text."""
    return pa.table({str(name): _column(frame[name]) for name in frame.columns})


def _column(column: pd.Series) -> pa.Array:
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = column.cat.codes.to_numpy()
        values = _objects(pd.Series(column.cat.categories, dtype=object))
        numbered = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), values)
        return numbered if pa.types.is_large_string(values.type) else numbered.dictionary_decode()
    return _objects(column) if column.dtype == object else pa.array(column)


def _objects(column: pd.Series) -> pa.Array:
    column = column.where(column.notna(), None)
    kinds = {type(value) for value in column if value is not None}
    plain = kinds <= {bool} or kinds <= {str}
    return pa.array(column if plain else column.map(_text), pa.bool_() if kinds == {bool} else pa.large_string())


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _unchanged(opened: Any, fingerprint: str) -> None:
    if fingerprint != opened.opened_as or not opened.seems_unchanged():
        raise changed(opened.source.uri)


def _check(opened: Any, words: dict[str, Any]) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    _unchanged(opened, words["fingerprint"])
    found = opened.check(words["measurement"], words["start"], words["stop"], words["budget_nnz"])
    cells = {name: getattr(found, name) for name in ("nnz_C", "sum_C", "mito_C", "digest_C")}
    return {"problems": found.problems, "step": found.step}, {"cells": pa.table(cells)}


def _rows(opened: Any, words: dict[str, Any]) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    _unchanged(opened, words["fingerprint"])
    counts = opened.block(words["measurement"], words["start"], words["stop"])
    stored = {
        "data": counts.data.astype(np.float32, copy=False),
        "indices": counts.indices.astype(np.int32, copy=False),
    }
    return {}, {"values": pa.table(stored), "ends": pa.table({"indptr": counts.indptr.astype(np.int64, copy=False)})}


ANSWERS = {"inspect": _inspect, "check": _check, "rows": _rows}


def _limit(memory_mb: int, parent: int) -> None:
    """Bound this process, and end it with its parent."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb * 2**20, memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)


if __name__ == "__main__":
    _limit(int(sys.argv[3]), int(sys.argv[4]))
    try:
        _serve(int(sys.argv[1]), int(sys.argv[2]))
    except MemoryError:
        sys.exit(FULL)
