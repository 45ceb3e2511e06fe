"""This module is one copy of the model at work: checkpoints behind a batcher, the newest of which answers.

A new checkpoint is loaded and warmed up beside the old one, and takes its place between two batches. The old one stays
until everybody who was told of it has had an answer. A new one that cannot be used changes nothing but what is said of
it. Nothing here knows of Ray or HTTP: the same class answers in a test's process and inside a Ray Serve replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from serve.batcher import Batcher, Load, Piece
from serve.decode import Cells
from serve.errors import StaleModel, Unavailable, without_place
from serve.held import Held, Predictor, Task, load_predictor
from serve.model import (
    Annotate,
    Columns,
    Description,
    Embed,
    Forecast,
    Generate,
    Perturb,
    Question,
    Shift,
    Swap,
    Translate,
)
from serve.settings import ServeSettings
from store.errors import InputRefused, SomaflowError
from train.checkpoint import MANIFEST

log = logging.getLogger("somaflow.serve")

Loader = Callable[[ServeSettings], Predictor]


@dataclass(frozen=True)
class _Asked:
    """A task, and the checkpoint that is to answer it."""

    held: Held
    task: Task


class Replica:
    """A model that many requests share."""

    def __init__(self, settings: ServeSettings, load: Loader = load_predictor) -> None:
        """Load the checkpoint that the settings name.

        Args:
            settings: The server's.
            load: Gives a checkpoint's predictor.
        """
        torch.set_num_threads(settings.threads)
        self._settings, self._load = settings, load
        self._now = self._take(settings)
        self._held = {self._now.sha256: self._now}
        self._swap: Swap | None = None
        self._swaps = [0, 0]
        self._swapping, self._closed = threading.Lock(), threading.Event()
        self._batcher: Batcher[_Asked, Any] = Batcher(
            self._run,
            budget_tokens=settings.batching.budget_tokens,
            queue_tokens=settings.batching.queue_tokens,
            queue_s=settings.batching.queue_s,
        )
        if settings.watch_s:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    async def ready(self) -> str:
        """Return the model_sha256 of the checkpoint that answers; Unavailable when none does."""
        self.check()
        return self._now.sha256

    async def describe(self) -> Description:
        """Return what an ingress needs to know; megabytes for a large vocabulary, so ask when the model changed."""
        self.check()
        described = await asyncio.to_thread(self._now.described)
        return replace(described, swap=self._swap, checkpoint=self._settings.checkpoint)

    async def ask(self, cells: Cells, question: Question) -> Any:
        """Answer a question about cells; see :mod:`serve.model` for what each is answered with.

        Raises:
            InputRefused: The model cannot be asked this.
            StaleModel: The cells were decoded for a checkpoint that is not here.
            Overloaded: Too much is waiting.
            DeadlineExceeded: The time allowed went by.
            InputRefused: The answer would hold what is no finite number.
        """
        begin = time.monotonic()
        held = self._of(cells.model_sha256)
        if isinstance(question, Perturb) and question.head is not None:
            pieces, rows = held.whole(cells)
        else:
            pieces, rows = await asyncio.to_thread(held.cut, cells, self._settings.batching.piece_tokens)
        asked = [
            Piece(_Asked(held, replace(piece.payload, question=part)), piece.rows, piece.longest)
            for each in _apart(question, len(pieces))
            for piece, part in zip(pieces, each, strict=True)
        ]
        together = isinstance(question, Embed | Annotate | Translate)
        key = (
            (held.sha256, cells.adapter, question, *sorted(cells.counts), *sorted(cells.prompts)) if together else None
        )
        waited_s = cells.waited_s + time.monotonic() - begin
        parts = await self._batcher.submit(asked, key=key, timeout_s=self._settings.limits.timeout_s, waited_s=waited_s)
        if not isinstance(question, Perturb | Forecast):
            return _finite(_in_order(parts, rows), question)
        weights = np.array([len(where) for where in rows], dtype=np.float64) / cells.n_cells
        means = [_average(parts[start : start + len(rows)], weights) for start in range(0, len(parts), len(rows))]
        for shifts in means:
            for shift in shifts.values():
                _finite(np.concatenate([shift.control_G, shift.perturbed_G, shift.delta_G]), question)
        return means[0] if isinstance(question, Forecast) else means

    async def vectors(self, model_sha256: str, columns: Columns) -> dict[str, NDArray[np.float32]]:
        """Return what a checkpoint takes features for: measurement to vector_XD, in the order of ``columns``.

        Raises:
            StaleModel: The checkpoint is not here.
        """
        predictor = self._of(model_sha256).predictor
        return {name: await asyncio.to_thread(predictor.vectors, name, these) for name, these in columns.items()}

    def _of(self, model_sha256: str) -> Held:
        held = self._held.get(model_sha256)
        if held is None:
            raise StaleModel("the checkpoint was changed meanwhile; send the request again")
        return held

    def swap(self, checkpoint: str) -> Swap:
        """Let another checkpoint answer from now on; return what came of it, which :meth:`describe` tells too.

        It is verified, loaded and warmed up first. Where that fails, the present one goes on answering.
        """
        with self._swapping:
            begin = time.time()
            try:
                new = self._take(self._settings.model_copy(update={"checkpoint": checkpoint}))
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the old one answers
                why = str(error) if isinstance(error, SomaflowError) else type(error).__name__
                log.error("%s was not taken: %s", checkpoint, why)
                self._swap = Swap(begin, "", without_place(why, checkpoint, "the checkpoint"))
                self._swaps[1] += 1
                return self._swap
            old, self._now = self._now, new
            self._held[new.sha256] = new
            self._settings = self._settings.model_copy(update={"checkpoint": checkpoint})
            self._swap = Swap(begin, new.sha256, "")
            self._swaps[0] += 1
            if old.sha256 != new.sha256:
                leaving = threading.Timer(2 * self._settings.limits.timeout_s, self._forget, [old])
                leaving.daemon = True
                leaving.start()
            return self._swap

    async def load(self) -> Load:
        """Return what waits and what was done."""
        return replace(self._batcher.load(), swaps=self._swaps[0], swaps_refused=self._swaps[1])

    def check(self) -> None:
        """Raise Unavailable unless requests can be answered."""
        if not self._batcher.alive:
            raise Unavailable("the model is stopping or has stopped; try again")

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._closed.set()
        self._batcher.close()

    def _take(self, settings: ServeSettings) -> Held:
        return Held(self._load(settings), settings.adapters, settings.adapters_loaded, settings.heads)

    def _run(self, asked: list[_Asked]) -> list[Any]:
        return asked[0].held.run([one.task for one in asked])

    def _forget(self, old: Held) -> None:
        if self._held.get(old.sha256) is old and self._now is not old:
            del self._held[old.sha256]

    def _watch(self) -> None:
        """Take what is written where the checkpoint lies, once its files stand still; again only when they changed.

        The manifest may be copied before the files that it names: what was refused then is looked at again.
        """
        before, tried = None, None
        while not self._closed.wait(self._settings.watch_s):
            folder = Path(self._settings.checkpoint)
            try:  # the files themselves are compared with the manifest when they are loaded
                looks = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
                found = str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["model_sha256"])
            except (ValueError, KeyError, TypeError, OSError):
                before = None
                continue  # it is being written, or gone: the one in memory answers
            if looks == before and looks != tried and found != self._now.sha256:
                self.swap(str(folder))
                tried = looks
            before = looks


def _apart(question: Question, n_pieces: int) -> list[list[Question]]:
    """Return what each piece is asked, in one round or several."""
    if isinstance(question, Perturb):
        return [[Perturb((targets,), question.head)] * n_pieces for targets in question.perturbations]
    if isinstance(question, Generate):
        return [[replace(question, part=number) for number in range(n_pieces)]]
    return [[question] * n_pieces]


def _finite(answer: Any, question: Question) -> Any:
    """Return an answer whose numbers are finite; a p value of novelty may be unknown, and is NaN then."""
    values = answer.data if isinstance(answer, csr_matrix) else answer
    if isinstance(question, Annotate):
        values = values[:, 1:]
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(np.atleast_2d(values)).all(axis=1))
        where = f"cell {rows[0]}: " if values.ndim == 2 else ""
        raise InputRefused(f"{where}the model's answer is no finite number; are values far beyond those of its data?")
    return answer


def _in_order(parts: Sequence[Any], rows: Sequence[NDArray[np.int64]]) -> Any:
    """Put pieces of rows where they were in the request."""
    order = np.argsort(np.concatenate(rows), kind="stable")
    return csr_matrix(vstack(parts))[order] if isinstance(parts[0], csr_matrix) else np.concatenate(parts)[order]


def _average(parts: Sequence[Mapping[str, Shift]], weights: NDArray[np.float64]) -> dict[str, Shift]:
    if len(parts) == 1:
        return dict(parts[0])

    def mean(name: str, vector: str) -> NDArray[np.float32]:
        stacked = np.stack([getattr(part[name], vector) for part in parts])
        return np.average(stacked, axis=0, weights=weights).astype(np.float32)

    return {name: Shift(mean(name, "control_G"), mean(name, "perturbed_G"), mean(name, "delta_G")) for name in parts[0]}
