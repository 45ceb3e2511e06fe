"""This module keeps sets of cells that people look at: read, embedded, annotated and laid out once, then asked about.

A set lies in the memory of the ingress that read it, under an id that cannot be guessed, until nobody has asked for it
for a while, or others need the room.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features      S  selected cells      Y  cell types
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from serve.decode import Cells, Decoded, Decoder
from serve.errors import FieldRefused, Overloaded, StaleModel
from serve.messages import Coverage, Prompts
from serve.model import Annotate, Description, Embed, Model, Question
from serve.projection import FEWEST, Projector, principal
from serve.settings import Explore, Limits
from serve.sources import NAMES, Read, explored
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError

ASKED_CELLS = 256
"""Cells of which the model is asked at a time: others find room between."""
PATIENCE = 20
"""How often a busy model is asked again."""

Reader = Callable[[], Read]


class Checkpoints(Protocol):
    """Knows the checkpoint that answers; ``serve.desk.Desk`` is one."""

    model: Model
    limits: Limits

    async def fresh(self) -> Any:
        """Return what holds the present checkpoint's ``description``."""
        ...


@dataclass
class Session:
    """A set of cells.

    Attributes:
        measured: Measurement to measured_C, which cells have it; of one that is not named here, all.
        told: [C, 1 + Y], as ``serve.model.Annotate`` is answered; None where the model does not tell types.
        error: Why it will never be ready.
    """

    id: str
    name: str
    state: str = "reading"
    share: float = 0.0
    error: SomaflowError | None = None
    notes: list[str] = field(default_factory=list)
    cells: Cells | None = None
    obs: pd.DataFrame = field(default_factory=pd.DataFrame)
    coverage: dict[str, Coverage] = field(default_factory=dict)
    measured: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    description: Description | None = None
    told: NDArray[np.float32] | None = None
    position_C2: NDArray[np.float32] | None = None
    fitted: int = 0
    used: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    thread: asyncio.Future[Any] | None = None

    @property
    def n_cells(self) -> int:
        """How many cells it has, 0 until they are read."""
        return self.cells.n_cells if self.cells else 0

    def n_bytes(self) -> int:
        """Return the memory that it takes, roughly."""
        matrices = self.cells.counts.values() if self.cells else ()
        counts = sum(part.data.nbytes + part.indices.nbytes + part.indptr.nbytes for part in matrices)
        arrays = sum(part.nbytes for part in (self.told, self.position_C2) if part is not None)
        return int(counts + arrays + self.obs.memory_usage(deep=False).sum())

    def ready(self) -> tuple[Cells, Description]:
        """Return the cells and the checkpoint that they were read for.

        Raises:
            ConflictError: They are not ready yet.
            SomaflowError: They never will be; the error says why.
        """
        if self.error is not None:
            raise self.error
        if self.state != "ready" or self.cells is None or self.description is None:
            raise ConflictError(f"these cells are not ready yet ({self.state}); see GET /v1/explore/SESSION")
        return self.cells, self.description

    def chosen(self, positions: list[int] | None) -> NDArray[np.int64]:
        """Return rows_S of a selection, each once.

        Raises:
            FieldRefused: There is no such cell.
        """
        if positions is None:
            return np.arange(self.n_cells)
        try:
            rows_S = np.array(positions, dtype=np.int64)
        except OverflowError:
            raise FieldRefused("cells", "holds a number beyond 64 bits") from None
        outside = (rows_S < 0) | (rows_S >= self.n_cells)
        if outside.any():
            first = int(outside.argmax())
            raise FieldRefused(f"cells.{first}", f"{rows_S[first]} is no position among {self.n_cells:,} cells")
        return np.unique(rows_S)

    def alike(self, rows_S: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Cells]]:
        """Yield some cells in groups that have the same measurements: where they stand in ``rows_S``, and the cells.

        What was not measured in a group is not in it: to the model, that is something else than no counts.
        """
        assert self.cells is not None
        kind_S = np.zeros(len(rows_S), np.uint16)
        everything = np.ones(self.n_cells, bool)
        for bit, name in enumerate(self.cells.counts):
            kind_S |= self.measured.get(name, everything)[rows_S].astype(np.uint16) << np.uint16(bit)
        for kind in np.unique(kind_S):
            places = np.flatnonzero(kind_S == kind)
            part = take(self.cells, rows_S[places])
            has = {name: counts for bit, (name, counts) in enumerate(part.counts.items()) if kind & 1 << bit}
            yield places, replace(part, counts=has or part.counts)

    def names(self) -> pd.Series[str]:
        """Return the cells' names; their positions where they have none."""
        if NAMES in self.obs:
            return self.obs[NAMES].astype(str)
        return pd.Series([str(position) for position in range(self.n_cells)])


def take(cells: Cells, rows: NDArray[np.int64] | slice) -> Cells:
    """Return some of the cells."""
    counts = {name: csr_matrix(counts_CG[rows]) for name, counts_CG in cells.counts.items()}
    chosen = np.arange(cells.n_cells)[rows]
    prompts = {name: [values[row] for row in chosen] for name, values in cells.prompts.items()}
    return Cells(counts, prompts, len(chosen), cells.model_sha256)


class Sessions:
    """The sets of cells that are kept; the one that was longest not asked for goes first."""

    def __init__(self, desk: Checkpoints, settings: Explore) -> None:
        self._desk, self._settings = desk, settings
        self._kept: dict[str, Session] = {}
        self._projector = Projector(settings.fitted_cells, settings.idle_s)
        self._unpacking = 0
        self._tasks: set[asyncio.Task[None]] = set()  # also of sets that were let go, until their threads have ended

    def warm(self) -> None:
        """Expect that cells will be laid out soon."""
        self._projector.warm()

    def close(self) -> None:
        """Let everything go."""
        for number in list(self._kept):
            self.drop(number)
        self._projector.close()

    @contextmanager
    def permit(self) -> Iterator[None]:
        """Count a request whose cells are being unpacked among the sets that are prepared.

        Raises:
            Overloaded: There are enough of them.
        """
        self._check_room(self._unpacking)
        self._unpacking += 1
        try:
            yield
        finally:
            self._unpacking -= 1

    def begin(self, name: str, read: Reader, prompts: Prompts | None = None) -> Session:
        """Start to read a set of cells; ask for it until it is ready.

        Raises:
            Overloaded: Too many are being read.
        """
        self._let_go_idle()
        self._check_room()
        self._trim(coming=1)
        session = Session(secrets.token_urlsafe(18), name)
        self._kept[session.id] = session
        self.warm()
        session.task = asyncio.get_running_loop().create_task(self._guarded(session, read, prompts or {}))
        self._tasks.add(session.task)
        session.task.add_done_callback(self._tasks.discard)
        return session

    def _check_room(self, besides: int = 0) -> None:
        preparing = besides + len(self._tasks)
        if preparing >= self._settings.preparing:
            raise Overloaded(f"{preparing} sets of cells are being prepared; try again soon", 5)

    def get(self, number: str) -> Session:
        """Return a set of cells, which was asked for just now.

        Raises:
            MissingError: It was let go, or never was.
        """
        self._let_go_idle()
        session = self._kept.get(number)
        if session is None:
            raise MissingError("these cells are no longer kept here; open them again")
        session.used = time.monotonic()
        self._trim()
        return session

    def drop(self, number: str) -> None:
        """Let a set of cells go; one that is not there is none the less gone."""
        session = self._kept.pop(number, None)
        if session is not None and session.task is not None:
            session.task.cancel()

    async def ask(self, cells: Cells, question: Question) -> Any:
        """Ask the model about cells of a set.

        Raises:
            ConflictError: Another checkpoint answers now, which has not read them.
        """
        try:
            return await self._desk.model.ask(cells, question)
        except StaleModel:
            raise _other_model() from None

    async def check_model(self, cells: Cells) -> None:
        """Refuse to ask about cells that another checkpoint than the one that answers has read.

        Raises:
            ConflictError: As above.
        """
        if (await self._desk.fresh()).sha256 != cells.model_sha256:
            raise _other_model()

    def _let_go_idle(self) -> None:
        now = time.monotonic()
        for session in [one for one in self._kept.values() if now - one.used > self._settings.idle_s]:
            self.drop(session.id)

    def _trim(self, coming: int = 0) -> None:
        """Let go what was longest not asked for, until there is room for what comes; the last to be asked for stays."""
        oldest = sorted(self._kept.values(), key=lambda session: session.used)
        size = sum(session.n_bytes() for session in oldest)
        for session in oldest if coming else oldest[:-1]:
            if len(self._kept) + coming <= self._settings.sessions and size <= self._settings.memory_mb * 2**20:
                break
            size -= session.n_bytes()
            self.drop(session.id)

    async def _guarded(self, session: Session, read: Reader, prompts: Prompts) -> None:
        """Prepare a set; what goes wrong is told to those who ask for it."""
        try:
            async with asyncio.timeout(self._settings.prepare_s):
                await self._prepare(session, read, prompts)
        except SomaflowError as error:
            session.error = error.with_traceback(None)
        except TimeoutError:
            session.error = ConflictError(
                f"these cells were not ready within {self._settings.prepare_s:g} s; open fewer at a time"
            )
        except Exception as error:  # noqa: BLE001 - a task that nobody awaits: the error would be lost
            session.error = SomaflowError(type(error).__name__)
        finally:
            if session.error is not None:
                session.cells = None
            if session.thread is not None:  # it cannot be ended: as long as it works, the set counts
                await asyncio.wait([session.thread])

    async def _prepare(self, session: Session, read: Reader, prompts: Prompts) -> None:
        loaded = await self._desk.fresh()
        description: Description = loaded.description
        found: Read = await _in_thread(session, read)
        if not set(found.counts) & set(description.vocabulary):
            there, here = ", ".join(found.counts), ", ".join(description.vocabulary)
            raise InputRefused(f"these cells have {there or 'no counts'}; the model knows {here}")
        decoder = Decoder(
            description.vocabulary,
            description.prompts,
            str(description.manifest["model_sha256"]),
            explored(self._desk.limits, self._settings),
            description.levels,
        )
        decode = partial(decoder.decode, found.counts, prompts, measured=found.measured)
        decoded: Decoded = await _in_thread(session, decode)
        session.description, session.cells, session.obs = description, decoded.cells, found.obs
        session.coverage, session.measured = decoded.coverage, found.measured
        session.notes += [*found.notes, *decoded.warnings]
        session.state = "embedding"
        embedding_CD = await self._embed(session, decoded.cells)
        session.state, session.share = "placing", 0.0
        if decoded.cells.n_cells < FEWEST:
            session.position_C2 = principal(embedding_CD, 2)
            session.fitted = decoded.cells.n_cells
        else:
            place = partial(self._projector.place, embedding_CD, self._settings.prepare_s)
            session.position_C2 = await _in_thread(session, place)
            session.fitted = min(decoded.cells.n_cells, self._settings.fitted_cells)
        session.state, session.share = "ready", 1.0

    async def _embed(self, session: Session, cells: Cells) -> NDArray[np.float32]:
        """Embed and annotate the cells, some at a time."""
        embedding_CD, told, n_done = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), 0
        tells = True
        for rows, alike in session.alike(np.arange(cells.n_cells)):
            for start in range(0, len(rows), ASKED_CELLS):
                some = slice(start, start + ASKED_CELLS)
                part = take(alike, some)
                embedding_CD = _placed(embedding_CD, rows[some], await self._ask_patiently(part, Embed()), cells)
                if tells:
                    try:
                        told = _placed(told, rows[some], await self._ask_patiently(part, Annotate()), cells)
                    except InputRefused as error:
                        tells = False
                        session.notes.append(str(error))
                n_done += part.n_cells
                session.share = n_done / cells.n_cells
        session.told = told if tells else None
        return embedding_CD

    async def _ask_patiently(self, cells: Cells, question: Question) -> Any:
        for _ in range(PATIENCE):
            try:
                return await self.ask(cells, question)
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s)
        return await self.ask(cells, question)


async def _in_thread(session: Session, work: Callable[[], Any]) -> Any:
    """Return what some work gives that is done in a thread, which goes on also where nobody waits for it any more."""
    session.thread = asyncio.ensure_future(asyncio.to_thread(work))
    session.thread.add_done_callback(lambda thread: thread.cancelled() or thread.exception())
    return await asyncio.shield(session.thread)


def _other_model() -> ConflictError:
    return ConflictError("another checkpoint answers since these cells were read; open them again")


def _placed(
    whole_CD: NDArray[np.float32], rows: NDArray[np.int64], values: NDArray[np.float32], cells: Cells
) -> NDArray[np.float32]:
    """Write some cells' values where they belong; there is room for all from the first on."""
    if len(whole_CD) == 0:
        whole_CD = np.zeros((cells.n_cells, values.shape[1]), values.dtype)
    whole_CD[rows] = values
    return whole_CD
