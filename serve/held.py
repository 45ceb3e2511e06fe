"""This module is a checkpoint in memory that answers: loaded, warmed up, described.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement      Y  cell types
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

import train.predictor
from serve.adapters import Adapters
from serve.batcher import Piece, cut
from serve.decode import Cells, Features, Vocabulary
from serve.errors import StaleModel
from serve.model import Annotate, Description, Embed, Forecast, Generate, Perturb, Question, Shift, Translate
from serve.settings import ServeSettings

WARM_UP_FEATURES = (1, 64, 1_024)
"""Features per cell in the passes that warm the model up."""


class Predictor(Protocol):
    """What a replica asks of a loaded checkpoint; ``train.predictor.Predictor`` gives it."""

    manifest: dict[str, Any]
    prompts: dict[str, list[str]]
    levels: frozenset[str]

    @property
    def vocabulary(self) -> Mapping[str, Vocabulary]: ...  # noqa: D102
    def cells(self, counts: dict[str, csr_matrix], prompts: dict[str, list[str]] | None) -> Any: ...  # noqa: D102
    def embed(self, cells: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def perturb(self, cells: Any, perturbation: list[str]) -> Any: ...  # noqa: D102
    def annotate(self, cells: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def vectors(self, measurement: str, columns: Sequence[int]) -> NDArray[np.float32]: ...  # noqa: D102
    def novelty(self, cells: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def shares(self, cells: Any, measurement: str) -> NDArray[np.float32]: ...  # noqa: D102
    def forecast(self, cells: Any, elapsed: float) -> Any: ...  # noqa: D102
    def draw(self, cells: Any, measurement: str, depth: float, seed: Sequence[int]) -> csr_matrix: ...  # noqa: D102
    def unit(self, measurement: str) -> str: ...  # noqa: D102
    def n_tokens(self, cells: Any) -> NDArray[np.integer]: ...  # noqa: D102


@dataclass(frozen=True)
class Task:
    """A piece of a request: its cells, and what is asked of them."""

    counts: dict[str, csr_matrix]
    prompts: dict[str, list[str]]
    n_cells: int
    predictor: Predictor
    question: Question = Embed()  # noqa: RUF009 - frozen, and equal to any other


def load_predictor(settings: ServeSettings) -> Predictor:
    """Load the checkpoint that ``settings`` name, every file checked against its manifest."""
    return train.predictor.Predictor.load(settings.checkpoint, device=settings.device)


class Held:
    """A checkpoint that is ready to answer."""

    def __init__(
        self,
        predictor: Predictor,
        adapters: Mapping[str, str] | None = None,
        at_most: int = 1,
        heads: Mapping[str, str] | None = None,
    ) -> None:
        """Warm it up: what goes wrong here goes wrong before anybody is answered.

        Args:
            predictor: The loaded checkpoint.
            adapters: Name to folder.
            at_most: How many of them stay in memory.
            heads: Name to folder of transition heads.
        """
        self.predictor = predictor
        self._adapters = None
        if adapters and isinstance(predictor, train.predictor.Predictor):
            self._adapters = Adapters(predictor, adapters, at_most)
        self._heads = None
        if heads:
            from serve.heads import Heads  # brings scikit-learn

            self._heads = Heads(heads, predictor.vocabulary)
        embedding_size = self._warm_up()
        self.description = Description(
            manifest=dict(predictor.manifest),
            vocabulary={name: Features.of(part) for name, part in predictor.vocabulary.items()},
            prompts={name: list(values) for name, values in predictor.prompts.items()},
            embedding_size=embedding_size,
            levels=predictor.levels,
            units={name: predictor.unit(name) for name in predictor.vocabulary},
            heads=self._heads.cards if self._heads else {},
            heads_refused=self._heads.refused if self._heads else {},
        )

    def described(self) -> Description:
        """Return the description, with the adapters that lie there now."""
        found, refused = ({}, {}) if self._adapters is None else self._adapters.digests()
        return replace(self.description, adapters=found, adapters_refused=refused)

    def under(self, adapter: tuple[str, str]) -> Predictor:
        """Return what answers with an adapter, by name and SHA-256; read from disk unless it is in memory.

        Raises:
            StaleModel: It is not there, or no longer.
            FieldRefused: It cannot be used.
        """
        if not adapter[0]:
            return self.predictor
        if self._adapters is None:
            raise StaleModel("the adapters were changed meanwhile; send the request again")
        return self._adapters.get(*adapter)

    @property
    def sha256(self) -> str:
        """The digest of its weights, by which requests name it."""
        return str(self.predictor.manifest["model_sha256"])

    def cut(self, cells: Cells, piece_tokens: int) -> tuple[list[Piece[Task]], list[NDArray[np.int64]]]:
        """Cut a request into pieces; also say which cells each piece holds."""
        predictor = self.under(cells.adapter)
        tokens_C = np.asarray(predictor.n_tokens(predictor.cells(cells.counts, cells.prompts)))
        rows = cut(tokens_C, piece_tokens)
        pieces = [
            Piece(
                Task(
                    {name: counts_CG[where] for name, counts_CG in cells.counts.items()},
                    {name: [values[cell] for cell in where] for name, values in cells.prompts.items()},
                    len(where),
                    predictor,
                ),
                rows=len(where),
                longest=int(tokens_C[where].max()),
            )
            for where in rows
        ]
        return pieces, rows

    def whole(self, cells: Cells) -> tuple[list[Piece[Task]], list[NDArray[np.int64]]]:
        """As :meth:`cut`, in one piece: for a head, which answers for all cells together and is cheap."""
        task = Task(cells.counts, cells.prompts, cells.n_cells, self.predictor)
        return [Piece(task, rows=cells.n_cells, longest=1)], [np.arange(cells.n_cells)]

    def run(self, tasks: list[Task]) -> list[Any]:
        """One forward pass, in the batcher's thread: tasks of the same question and adapter, or one of any."""
        counts = {name: vstack([task.counts[name] for task in tasks], format="csr") for name in tasks[0].counts}
        prompts = {name: [x for task in tasks for x in task.prompts[name]] for name in tasks[0].prompts}
        predictor = tasks[0].predictor
        match tasks[0].question:
            case Perturb(((*targets,),), head) if head is not None:
                if self._heads is None:
                    raise StaleModel("the heads were changed meanwhile; send the request again")
                return [self._heads.answer(head, counts, targets)]
        cells = predictor.cells(counts, prompts)
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
                found_CX = np.column_stack([predictor.novelty(cells), predictor.annotate(cells)])
            case _:
                found_CX = predictor.embed(cells)
        return np.split(found_CX, np.cumsum([task.n_cells for task in tasks])[:-1])

    def _warm_up(self) -> int:
        """Run the model on cells of several lengths; return the size of an embedding."""
        size = 0
        for per_cell in WARM_UP_FEATURES:
            counts = {}
            for name, vocabulary in self.predictor.vocabulary.items():
                n_features = len(vocabulary.feature_id)
                columns = np.arange(min(per_cell, n_features))
                ones = np.ones(len(columns), dtype=np.float32)
                counts[name] = csr_matrix((ones, columns, [0, len(columns)]), shape=(1, n_features))
            size = self.run([Task(counts, {}, 1, self.predictor)])[0].shape[1]
        return size


def _shifts(effect: Any) -> dict[str, Shift]:
    return {name: Shift(part.control_G, part.perturbed_G, part.delta_G) for name, part in effect.items()}
