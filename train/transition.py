"""This module is the transition head's network: how a set's cells move from where a baseline leaves them.

It is a velocity field for flow matching (Lipman et al. 2023; Tong et al. 2024): given cells somewhere on their way, how
far along they are, and what is done to them, it says where to they go on. Cells of a set read each other, so that what
happens to a cell may depend on which cells are there. Its last layer is zero at the start: nothing moves.

Shape letters used in this module:
    C  cells      S  sets of cells      K  latent dimensions      P  dimensions of a condition      D  width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.attention import Segments
from train.blocks import Block
from train.fourier import fourier

STEPS = 8


@dataclass(frozen=True)
class TransitionConfig:
    """Sizes of a head.

    Attributes:
        n_latent: K.
        n_condition: P; 0 where nothing is said but numbers.
        n_numbers: Numbers that are said beside: time spans, doses.
        width: D.
        layers: Blocks in which the cells of a set read each other.
        heads: Heads of attention; divides the width.
    """

    n_latent: int
    n_condition: int
    n_numbers: int = 0
    width: int = 64
    layers: int = 2
    heads: int = 4


class Transition(nn.Module):
    """A velocity field over sets of cells."""

    def __init__(self, config: TransitionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.place = nn.Linear(config.n_latent, width)
        self.start = nn.Linear(config.n_latent, width, bias=False)
        self.condition = nn.Linear(config.n_condition, width) if config.n_condition else None
        self.numbers = nn.Linear(fourier(torch.zeros(1, 1 + config.n_numbers)).shape[1], width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width)
        self.out = nn.Linear(width, config.n_latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x_CK: Tensor, start_CK: Tensor, along_S: Tensor, condition_SP: Tensor, number_SF: Tensor, sets: Segments
    ) -> Tensor:
        """Return velocity_CK.

        Args:
            x_CK: Where the cells are, set by set.
            start_CK: Where they started.
            along_S: How far along they are, in [0, 1].
            condition_SP: What is done to each set.
            number_SF: Time spans, doses; NaN is not said.
            sets: The cells cut between sets; no set is empty.
        """
        said = self.numbers(fourier(torch.cat([along_S[:, None], number_SF], dim=1)))
        if self.condition is not None:
            said = said + self.condition(condition_SP)
        set_C = sets.segment_N
        x = self.place(x_CK) + self.start(start_CK) + said[set_C]
        for block in self.blocks:
            x = block(x, sets)
        velocity: Tensor = self.out(self.norm(x))
        return velocity

    @torch.no_grad()
    def move(self, start_CK: Tensor, condition_SP: Tensor, number_SF: Tensor, sets: Segments) -> Tensor:
        """Return how far the cells come, shift_CK, in ``STEPS`` steps of the midpoint rule."""
        x, step = start_CK, 1 / STEPS
        for number in range(STEPS):
            along = torch.full((sets.n_segments,), number * step, device=x.device)
            half = x + 0.5 * step * self(x, start_CK, along, condition_SP, number_SF, sets)
            x = x + step * self(half, start_CK, along + 0.5 * step, condition_SP, number_SF, sets)
        return x - start_CK
