"""This module lets the cells of a set read each other: a niche, or cells that share a perturbation.

Cells give each other their summaries and where they are. It begins as nothing: a model without company, and one whose
company has not been learned from, answer alike.

Shape letters used in this module:
    C  cells      D  width      X  x and y
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.attention import Segments
from train.blocks import Block
from train.config import ModelConfig
from train.fourier import FOURIER, fourier


@dataclass(frozen=True)
class Company:
    """Which cells belong together.

    Attributes:
        set_C: The number of each cell's set.
        place_CX: Where each cell is, in any unit; NaN is not known.
    """

    set_C: Tensor
    place_CX: Tensor

    @property
    def apart_CX(self) -> Tensor:  # noqa: N802
        """How far each cell is from the middle of its set, in the set's spread; NaN is not known."""
        _, number_C = torch.unique(self.set_C, return_inverse=True)
        known_CX = ~self.place_CX.isnan()
        shape = (int(number_C.max()) + 1 if len(number_C) else 0, 2)

        def mean(value_CX: Tensor) -> Tensor:
            total = self.place_CX.new_zeros(shape).index_add_(0, number_C, torch.where(known_CX, value_CX, 0.0))
            n_known = self.place_CX.new_zeros(shape).index_add_(0, number_C, known_CX.to(value_CX))
            return (total / n_known.clamp(min=1))[number_C]

        away_CX = self.place_CX - mean(self.place_CX)
        spread_C1 = mean(away_CX.square()).sum(1, keepdim=True).sqrt()
        return away_CX / spread_C1.clamp(min=1e-6)


class Niche(nn.Module):
    """A block over the summaries of each set's cells."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.place = nn.Linear(2 * (2 * FOURIER + 3), config.width)
        self.block = Block(config.width, config.heads)

    def begin(self) -> None:
        """Begin as nothing."""
        nn.init.zeros_(self.block.attention.o_proj.weight)
        nn.init.zeros_(self.block.down_proj.weight)

    def forward(self, summary_CD: Tensor, company: Company) -> Tensor:
        """Return the summaries, with what company adds to them."""
        order_C = torch.argsort(company.set_C, stable=True)
        _, size_S = torch.unique(company.set_C, return_counts=True)
        apart_CX = company.apart_CX.to(summary_CD.dtype)[order_C]
        place = torch.cat([fourier(apart_CX.abs()), torch.nan_to_num(apart_CX)], dim=1)
        x_CD = summary_CD[order_C]
        with_place_CD = x_CD + self.place(place)
        added_CD = self.block(with_place_CD, Segments.of(size_S)) - with_place_CD
        return torch.zeros_like(summary_CD).index_copy(0, order_C, x_CD + added_CD)
