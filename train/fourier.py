"""This module writes numbers as waves, so that a linear layer can tell near from far at every scale.

Shape letters used in this module:
    C  cells      F  numbers
"""

from __future__ import annotations

import torch
from torch import Tensor

FOURIER = 6


def fourier(number_CF: Tensor) -> Tensor:
    """Write numbers as sines and cosines of their log, 2 * ``FOURIER`` + 2 values each; zeros where nothing is said.

    The log is that of one more than their size, with their sign: a dose may be a logarithm itself, a time before the
    perturbation.
    """
    said = ~number_CF.isnan()
    number_CF = torch.nan_to_num(number_CF)
    log = torch.log1p(number_CF.abs()).copysign(number_CF)
    frequency = 2.0 ** torch.arange(-2, FOURIER - 2, device=log.device)
    angle = log.unsqueeze(-1) * frequency
    features = torch.cat([angle.sin(), angle.cos(), log.unsqueeze(-1), torch.ones_like(log).unsqueeze(-1)], dim=-1)
    return (features * said.unsqueeze(-1)).flatten(1)
