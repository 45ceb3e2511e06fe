"""This module is one copy of the model at work: a predictor behind a batcher, warmed up before it is ready.

Nothing here knows of Ray or HTTP: the same class answers in a test's process and inside a Ray Serve replica.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement      L  tokens per cell
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

import train.predictor
from serve.batcher import Batcher, Load, Piece, cut
from serve.decode import Cells, Features, Vocabulary
from serve.errors import StaleVocabulary, Unavailable
from serve.model import Description, Shift
from serve.settings import ServeSettings

WARM_UP_FEATURES = (1, 64, 1_024)
"""Features per cell in the passes that warm the model up."""


class Predictor(Protocol):
    """What a replica asks of a loaded checkpoint; ``train.predictor.Predictor`` gives it."""

    manifest: dict[str, Any]
    prompts: dict[str, list[str]]

    @property
    def vocabulary(self) -> Mapping[str, Vocabulary]: ...  # noqa: D102
    def cells(self, counts: dict[str, csr_matrix], prompts: dict[str, list[str]] | None) -> Any: ...  # noqa: D102
    def embed(self, cells: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def perturb(self, cells: Any, perturbation: list[str]) -> Any: ...  # noqa: D102
    def n_tokens(self, cells: Any) -> NDArray[np.integer]: ...  # noqa: D102


@dataclass(frozen=True)
class _Task:
    counts: dict[str, csr_matrix]
    prompts: dict[str, list[str]]
    n_cells: int
    targets: tuple[str, ...] = ()


def load_predictor(settings: ServeSettings) -> Predictor:
    """Load the checkpoint that ``settings`` name, every file checked against its manifest."""
    return train.predictor.Predictor.load(settings.checkpoint, device=settings.device)


class Replica:
    """A model that many requests share."""

    def __init__(self, predictor: Predictor, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._predictor = predictor
        self._settings = settings
        self._vocabulary_hash = str(predictor.manifest["vocabulary_hash"])
        embedding_size = self._warm_up()
        self.description = Description(
            manifest=dict(predictor.manifest),
            vocabulary={name: Features.of(part) for name, part in predictor.vocabulary.items()},
            prompts={name: list(values) for name, values in predictor.prompts.items()},
            embedding_size=embedding_size,
        )
        self._batcher: Batcher[_Task, Any] = Batcher(
            self._run, budget_tokens=settings.batching.budget_tokens, queue_tokens=settings.batching.queue_tokens
        )

    async def ready(self) -> str:
        """Return the model_sha256 of the checkpoint that answers; Unavailable when none does."""
        self.check()
        return str(self._predictor.manifest["model_sha256"])

    async def describe(self) -> Description:
        """Return what an ingress needs to know; megabytes for a large vocabulary, so ask once."""
        self.check()
        return self.description

    async def embed(self, cells: Cells) -> NDArray[np.float32]:
        """Embed cells.

        Returns:
            embedding_CD in the order of ``cells``.

        Raises:
            StaleVocabulary: The columns of ``cells`` follow another vocabulary.
            Overloaded: Too much is waiting.
            DeadlineExceeded: The time allowed went by.
        """
        tasks, rows = await self._tasks(cells)
        parts = await self._submit(tasks, key=(*sorted(cells.counts), *sorted(cells.prompts)))
        embedding_CD = np.empty((cells.n_cells, parts[0].shape[1]), dtype=np.float32)
        for part, where in zip(parts, rows, strict=True):
            embedding_CD[where] = part
        return embedding_CD

    async def perturb(self, cells: Cells, perturbations: Sequence[Sequence[str]]) -> list[dict[str, Shift]]:
        """Predict what each perturbation does to ``cells``; a perturbation is a list of targets hit together.

        Returns:
            For each perturbation, measurement to its mean shift.

        Raises:
            StaleVocabulary, Overloaded, DeadlineExceeded: As for :meth:`embed`.
        """
        tasks, rows = await self._tasks(cells)
        weights = np.array([len(where) for where in rows], dtype=np.float64) / cells.n_cells
        asked = [
            replace(piece, payload=replace(piece.payload, targets=tuple(targets)))
            for targets in perturbations
            for piece in tasks
        ]
        parts = await self._submit(asked, key=None)
        groups = [parts[start : start + len(tasks)] for start in range(0, len(parts), len(tasks))]
        return [_average(group, weights) for group in groups]

    def load(self) -> Load:
        """Return what waits and what was done."""
        return self._batcher.load()

    def check(self) -> None:
        """Raise Unavailable unless requests can be answered."""
        if not self._batcher.alive:
            raise Unavailable("the model is stopping or has stopped; try again")

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._batcher.close()

    async def _tasks(self, cells: Cells) -> tuple[list[Piece[_Task]], list[NDArray[np.int64]]]:
        if cells.vocabulary_hash != self._vocabulary_hash:
            raise StaleVocabulary("the checkpoint was changed meanwhile; send the request again")
        return await asyncio.to_thread(self._cut, cells)

    def _cut(self, cells: Cells) -> tuple[list[Piece[_Task]], list[NDArray[np.int64]]]:
        """Cut a request into pieces; also say which cells each piece holds."""
        tokens_C = np.asarray(self._predictor.n_tokens(self._predictor.cells(cells.counts, cells.prompts)))
        rows = cut(tokens_C, self._settings.batching.piece_tokens)
        pieces = [
            Piece(
                _Task(
                    {name: counts_CG[where] for name, counts_CG in cells.counts.items()},
                    {name: [values[cell] for cell in where] for name, values in cells.prompts.items()},
                    len(where),
                ),
                rows=len(where),
                longest=int(tokens_C[where].max()),
            )
            for where in rows
        ]
        return pieces, rows

    async def _submit(self, pieces: list[Piece[_Task]], key: tuple[str, ...] | None) -> list[Any]:
        return await self._batcher.submit(pieces, key=key, timeout_s=self._settings.limits.timeout_s)

    def _run(self, tasks: list[_Task]) -> list[Any]:
        """One forward pass, in the batcher's thread: tasks to embed with equal measurements, or one perturbation."""
        counts = {name: vstack([task.counts[name] for task in tasks], format="csr") for name in tasks[0].counts}
        prompts = {name: [x for task in tasks for x in task.prompts[name]] for name in tasks[0].prompts}
        cells = self._predictor.cells(counts, prompts)
        if tasks[0].targets:
            return [_shifts(self._predictor.perturb(cells, list(tasks[0].targets)))]
        embedding_CD = self._predictor.embed(cells)
        return np.split(embedding_CD, np.cumsum([task.n_cells for task in tasks])[:-1])

    def _warm_up(self) -> int:
        """Run the model on cells of several lengths; return the size of an embedding."""
        size = 0
        for per_cell in WARM_UP_FEATURES:
            counts = {}
            for name, vocabulary in self._predictor.vocabulary.items():
                n_features = len(vocabulary.feature_id)
                columns = np.arange(min(per_cell, n_features))
                ones = np.ones(len(columns), dtype=np.float32)
                counts[name] = csr_matrix((ones, columns, [0, len(columns)]), shape=(1, n_features))
            size = self._run([_Task(counts, {}, 1)])[0].shape[1]
        return size


def _shifts(effect: Any) -> dict[str, Shift]:
    return {name: Shift(part.control_G, part.perturbed_G, part.delta_G) for name, part in effect.items()}


def _average(parts: Sequence[Mapping[str, Shift]], weights: NDArray[np.float64]) -> dict[str, Shift]:
    def mean(name: str, vector: str) -> NDArray[np.float32]:
        stacked = np.stack([getattr(part[name], vector) for part in parts])
        return np.average(stacked, axis=0, weights=weights).astype(np.float32)

    return {name: Shift(mean(name, "control_G"), mean(name, "perturbed_G"), mean(name, "delta_G")) for name in parts[0]}
