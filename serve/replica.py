"""This module is one copy of the model at work: a predictor behind a batcher, warmed up before it is ready.

Nothing here knows of Ray or HTTP: the same class answers in a test's process and inside a Ray Serve replica.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement      Y  cell types
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
from serve.model import Annotate, Description, Embed, Forecast, Generate, Perturb, Question, Shift, Translate
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
    def annotate(self, cells: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def shares(self, cells: Any, measurement: str) -> NDArray[np.float32]: ...  # noqa: D102
    def forecast(self, cells: Any, elapsed: float) -> Any: ...  # noqa: D102
    def draw(self, cells: Any, measurement: str, depth: float, seed: Sequence[int]) -> csr_matrix: ...  # noqa: D102
    def unit(self, measurement: str) -> str: ...  # noqa: D102
    def n_tokens(self, cells: Any) -> NDArray[np.integer]: ...  # noqa: D102


@dataclass(frozen=True)
class _Task:
    counts: dict[str, csr_matrix]
    prompts: dict[str, list[str]]
    n_cells: int
    question: Question = Embed()  # noqa: RUF009 - frozen, and equal to any other


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
            units={name: predictor.unit(name) for name in predictor.vocabulary},
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

    async def ask(self, cells: Cells, question: Question) -> Any:
        """Answer a question about cells; see :mod:`serve.model` for what each is answered with.

        Raises:
            InputRefused: The model cannot be asked this.
            StaleVocabulary: The columns of ``cells`` follow another vocabulary.
            Overloaded: Too much is waiting.
            DeadlineExceeded: The time allowed went by.
        """
        if cells.vocabulary_hash != self._vocabulary_hash:
            raise StaleVocabulary("the checkpoint was changed meanwhile; send the request again")
        pieces, rows = await asyncio.to_thread(self._cut, cells)
        asked = [
            replace(piece, payload=replace(piece.payload, question=part))
            for each in _apart(question, len(pieces))
            for piece, part in zip(pieces, each, strict=True)
        ]
        together = isinstance(question, Embed | Annotate | Translate)
        key = (question, *sorted(cells.counts), *sorted(cells.prompts)) if together else None
        parts = await self._batcher.submit(asked, key=key, timeout_s=self._settings.limits.timeout_s)
        if not isinstance(question, Perturb | Forecast):
            return _in_order(parts, rows)
        weights = np.array([len(where) for where in rows], dtype=np.float64) / cells.n_cells
        means = [_average(parts[start : start + len(rows)], weights) for start in range(0, len(parts), len(rows))]
        return means[0] if isinstance(question, Forecast) else means

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

    def _run(self, tasks: list[_Task]) -> list[Any]:
        """One forward pass, in the batcher's thread: tasks of the same question, or one of any."""
        counts = {name: vstack([task.counts[name] for task in tasks], format="csr") for name in tasks[0].counts}
        prompts = {name: [x for task in tasks for x in task.prompts[name]] for name in tasks[0].prompts}
        cells, predictor = self._predictor.cells(counts, prompts), self._predictor
        match tasks[0].question:
            case Perturb(((*targets,),)):
                return [_shifts(predictor.perturb(cells, targets))]
            case Forecast(elapsed):
                return [_shifts(predictor.forecast(cells, elapsed))]
            case Generate(measurement, depth, seed, part):
                return [predictor.draw(cells, measurement, depth, (seed, part))]
            case Translate(measurement, columns):
                found_CX = predictor.shares(cells, measurement)
                found_CX = found_CX if columns is None else found_CX[:, list(columns)]
            case Annotate():
                found_CX = predictor.annotate(cells)
            case _:
                found_CX = predictor.embed(cells)
        return np.split(found_CX, np.cumsum([task.n_cells for task in tasks])[:-1])

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


def _apart(question: Question, n_pieces: int) -> list[list[Question]]:
    """Return what each piece is asked, in one round or several."""
    if isinstance(question, Perturb):
        return [[Perturb((targets,))] * n_pieces for targets in question.perturbations]
    if isinstance(question, Generate):
        return [[replace(question, part=number) for number in range(n_pieces)]]
    return [[question] * n_pieces]


def _in_order(parts: Sequence[Any], rows: Sequence[NDArray[np.int64]]) -> Any:
    """Put pieces of rows where they were in the request."""
    order = np.argsort(np.concatenate(rows), kind="stable")
    return csr_matrix(vstack(parts))[order] if isinstance(parts[0], csr_matrix) else np.concatenate(parts)[order]


def _shifts(effect: Any) -> dict[str, Shift]:
    return {name: Shift(part.control_G, part.perturbed_G, part.delta_G) for name, part in effect.items()}


def _average(parts: Sequence[Mapping[str, Shift]], weights: NDArray[np.float64]) -> dict[str, Shift]:
    def mean(name: str, vector: str) -> NDArray[np.float32]:
        stacked = np.stack([getattr(part[name], vector) for part in parts])
        return np.average(stacked, axis=0, weights=weights).astype(np.float32)

    return {name: Shift(mean(name, "control_G"), mean(name, "perturbed_G"), mean(name, "delta_G")) for name in parts[0]}
