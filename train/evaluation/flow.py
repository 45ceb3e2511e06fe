"""This module teaches the transition head: flow matching between sets of cells, paired by optimal transport.

Shape letters used in this module:
    C  cells of a set      K  latent dimensions      P  dimensions of a condition      F  numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.attention import Segments
from train.transition import Transition, TransitionConfig

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class FlowSettings:
    """How a head learns.

    Attributes:
        steps: Optimizer steps.
        sets: Sets of a step.
        cells: Cells of a set in a step.
        lr: Peak learning rate of AdamW; a cosine to zero follows.
        weight_decay: Decoupled weight decay.
        width, layers: Sizes of the network.
    """

    steps: int = 300
    sets: int = 8
    cells: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    width: int = 64
    layers: int = 2


@dataclass(frozen=True)
class Passage:
    """A set of cells where a baseline leaves it, what was done to it, and where cells were found.

    Attributes:
        start_CK: Cells as the baseline has them.
        truth_CK: Cells as they were measured; others, and another number of them.
        condition_P: What was done.
        number_F: Time spans, doses; NaN is not said.
    """

    start_CK: Matrix
    truth_CK: Matrix
    condition_P: Vector
    number_F: Vector


@dataclass(frozen=True)
class Flow:
    """A head that has learned, and the scales that it works in."""

    network: Transition
    scale: float
    mean_P: Vector
    spread_P: Vector

    def move(self, start_CK: Matrix, condition_P: Vector, number_F: Vector) -> Matrix:
        """Return how far the cells of one set come, shift_CK."""
        sets = Segments.of(torch.tensor([len(start_CK)]))
        shift = self.network.move(
            _tensor(start_CK / self.scale), self.said(condition_P)[None], _tensor(number_F)[None], sets
        )
        moved: Matrix = shift.numpy().astype(np.float64) * self.scale
        return moved

    def said(self, condition_P: Vector) -> Tensor:
        """Return a condition in the head's scale."""
        return _tensor((condition_P - self.mean_P) / self.spread_P)


def fit_flow(passages: Sequence[Passage], settings: FlowSettings, seed: int) -> Flow:
    """Learn to move sets from start to truth; the same seed gives the same head on one machine.

    In each step some cells of some sets are paired with measured cells by an exact optimal transport plan, and the
    network learns the straight way between them; beside each cell's way, the mean way of the set.
    """
    random = np.random.default_rng([seed, 7])
    spread = float(np.mean([one.truth_CK.std(axis=0).mean() for one in passages]))
    condition = np.stack([one.condition_P for one in passages])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = TransitionConfig(
            passages[0].start_CK.shape[1],
            condition.shape[1],
            len(passages[0].number_F),
            settings.width,
            settings.layers,
        )
        network = Transition(sizes)
    flow = Flow(network, max(spread, 1e-6), condition.mean(axis=0), np.maximum(condition.std(axis=0), 1e-3))
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    sets = Segments.of(torch.full((settings.sets,), settings.cells))
    said = torch.stack([flow.said(one.condition_P) for one in passages])
    number = torch.stack([_tensor(one.number_F) for one in passages])
    for _ in range(settings.steps):
        chosen = random.integers(len(passages), size=settings.sets)
        pairs = [_pair(passages[place], settings.cells, random) for place in chosen]
        start = _tensor(np.concatenate([one for one, _ in pairs]) / flow.scale)
        way = _tensor(np.concatenate([other for _, other in pairs]) / flow.scale) - start
        along = _tensor(random.random(settings.sets))
        x = start + along[sets.segment_N][:, None] * way
        error = network(x, start, along, said[chosen], number[chosen], sets) - way
        mean = error.view(settings.sets, settings.cells, -1).mean(1)
        loss = error.square().mean() + settings.cells * mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    return flow


def _pair(passage: Passage, n_cells: int, random: np.random.Generator) -> tuple[Matrix, Matrix]:
    """Draw cells of both sides and pair them so that they move least."""
    start, truth = (
        side[random.choice(len(side), n_cells, replace=len(side) < n_cells)]
        for side in (passage.start_CK, passage.truth_CK)
    )
    weight = np.full(n_cells, 1 / n_cells)
    plan = ot.emd(weight, weight, ot.dist(start, truth))
    return start, truth[plan.argmax(axis=1)]


def _tensor(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
