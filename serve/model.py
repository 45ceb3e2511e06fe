"""This module says what a loaded model is to the HTTP side: three questions and the shape of their answers.

Shape letters used in this module:
    C  cells      D  size of an embedding      G  features of a measurement
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.decode import Cells, Features


@dataclass(frozen=True)
class Description:
    """What is needed of a loaded checkpoint to decode requests and to write replies."""

    manifest: dict[str, Any]
    vocabulary: dict[str, Features]
    prompts: dict[str, list[str]]
    embedding_size: int


@dataclass(frozen=True)
class Shift:
    """Predicted mean expression of one measurement without and with a perturbation, averaged over cells."""

    control_G: NDArray[np.float32]
    perturbed_G: NDArray[np.float32]
    delta_G: NDArray[np.float32]


class Model(Protocol):
    """A model in this process or elsewhere; each question may raise the errors of :mod:`serve.errors`."""

    async def ready(self) -> str:
        """Return the model_sha256 of the loaded checkpoint; Unavailable while there is none."""
        ...

    async def describe(self) -> Description:
        """Return the checkpoint's description; Unavailable while there is none."""
        ...

    async def embed(self, cells: Cells) -> NDArray[np.float32]:
        """Return embedding_CD."""
        ...

    async def perturb(self, cells: Cells, perturbations: Sequence[Sequence[str]]) -> list[dict[str, Shift]]:
        """Return, for each perturbation, measurement to shift; a perturbation is a list of targets hit together."""
        ...
