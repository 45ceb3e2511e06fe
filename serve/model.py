"""This module says what a loaded model is to the HTTP side: the questions that it takes and the shape of its answers.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement      Y  cell types
    X  features that are asked for
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.batcher import Load
from serve.decode import Cells, Features
from serve.head_cards import HeadCard


@dataclass(frozen=True)
class Swap:
    """What came of the last time that a checkpoint was to take another's place.

    Attributes:
        when: Unix time.
        model_sha256: The one that answers since; empty where nothing changed.
        error: Why not.
    """

    when: float
    model_sha256: str
    error: str


@dataclass(frozen=True)
class Description:
    """What is needed of a loaded checkpoint to decode requests and to write replies."""

    manifest: dict[str, Any]
    vocabulary: dict[str, Features]
    prompts: dict[str, list[str]]
    embedding_size: int
    units: dict[str, str]
    """Measurement to what its expected values are."""
    levels: frozenset[str] = frozenset()
    """Measurements whose values are levels, not counts."""
    swap: Swap | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    """Adapter to the SHA-256 of its weights."""
    adapters_refused: dict[str, str] = field(default_factory=dict)
    """Adapter to why it cannot be used."""
    heads: dict[str, HeadCard] = field(default_factory=dict)
    heads_refused: dict[str, str] = field(default_factory=dict)
    """Head to why it cannot be used."""
    adapter: str = ""
    """The one with which a reply was made; empty is none."""
    checkpoint: str = ""
    """Where it was loaded from, for jobs that load it elsewhere; no reply says it."""


@dataclass(frozen=True)
class Shift:
    """Predicted mean expression of one measurement without and with a perturbation, averaged over cells.

    Attributes:
        control_G, perturbed_G, delta_G: Without, with, and what it adds.
        low_G, high_G: The interval of ``delta_G``; None where none is known.
        positions: Where the G features are among those of the measurement; None is all of them.
    """

    control_G: NDArray[np.float32]
    perturbed_G: NDArray[np.float32]
    delta_G: NDArray[np.float32]
    low_G: NDArray[np.float32] | None = None
    high_G: NDArray[np.float32] | None = None
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Embed:
    """Where are the cells in the model's space? Answered with embedding_CD."""


@dataclass(frozen=True)
class Annotate:
    """Of which types are they? Answered with [C, 1 + Y].

    First the p value of being of a known kind, NaN where the checkpoint cannot tell, then the probabilities of types in
    the order of the prompts' cell types.
    """


@dataclass(frozen=True)
class Translate:
    """What would a measurement have shown? Answered with expected_CG.

    Attributes:
        measurement: Which.
        columns: Positions of its features that are wanted; None wants all.
    """

    measurement: str
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HeadQuestion:
    """Which head is to answer, in which context, with intervals of which level."""

    head: str
    context: str
    level: float


@dataclass(frozen=True)
class Perturb:
    """What does hitting targets together do to them? Answered, for each group of targets, with shifts.

    Attributes:
        perturbations: The groups.
        head: Who answers; None is the model itself.
    """

    perturbations: tuple[tuple[str, ...], ...]
    head: HeadQuestion | None = None


@dataclass(frozen=True)
class Forecast:
    """What becomes of them after a while? Answered with shifts."""

    elapsed: float


@dataclass(frozen=True)
class Generate:
    """Draw cells like these. Answered with counts_CG, the same for the same seed.

    Attributes:
        measurement: Of counts.
        depth: Counts of a cell, on average.
        seed: Of chance.
        part: Which part of the request's cells these are.
    """

    measurement: str
    depth: float
    seed: int
    part: int = 0


Question = Embed | Annotate | Translate | Perturb | Forecast | Generate
Columns = dict[str, tuple[int, ...]]
"""Measurement to positions of some of its features."""
Shifts = dict[str, Shift]
"""Measurement to shift."""


class Model(Protocol):
    """A model in this process or elsewhere; each question may raise the errors of :mod:`serve.errors`."""

    async def ready(self) -> str:
        """Return the model_sha256 of the loaded checkpoint; Unavailable while there is none."""
        ...

    async def load(self) -> Load:
        """Return what waits for the model, and what it did; Unavailable while there is none."""
        ...

    async def describe(self) -> Description:
        """Return the checkpoint's description; Unavailable while there is none."""
        ...

    async def ask(self, cells: Cells, question: Question) -> Any:
        """Return what the question says that it is answered with."""
        ...

    async def vectors(self, model_sha256: str, columns: Columns) -> dict[str, NDArray[np.float32]]:
        """Return what a checkpoint takes features for: measurement to vector_XD."""
        ...
