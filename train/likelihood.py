"""This module is the likelihoods of counts: what a prediction costs.

Negative binomial for RNA and protein, Poisson for the others; the mean is the cell's depth times its share among the
features that its dataset measures (Lopez et al. 2018 for the likelihood).

Shape letters used in this module:
    C  cells      G  features of a measurement      Q  queries
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

OVERDISPERSED = ("RNA", "protein")
"""Measurements with a negative binomial likelihood; the others are Poisson."""


def log_rates(logits_CG: Tensor, panel_CG: Tensor) -> Tensor:
    """Return the log share of each measured feature; a feature that was not measured has none (-inf)."""
    return functional.log_softmax(logits_CG.masked_fill(~panel_CG, -torch.inf), dim=1)


def count_cost(counts: Tensor, log_mean: Tensor, log_dispersion: Tensor | None) -> Tensor:
    """Return -log p(counts) of each, in nats.

    Args:
        counts: Raw counts, of any shape.
        log_mean: Log of the expected counts.
        log_dispersion: Log inverse dispersion of the negative binomial, before the softplus; None is Poisson.
    """
    if log_dispersion is None:
        return log_mean.exp() - counts * log_mean + torch.lgamma(counts + 1)
    r = functional.softplus(log_dispersion) + 1e-4
    log_r_plus_mean = torch.logaddexp(r.log(), log_mean)
    return (
        torch.lgamma(r)
        + torch.lgamma(counts + 1)
        - torch.lgamma(counts + r)
        - r * (r.log() - log_r_plus_mean)
        - counts * (log_mean - log_r_plus_mean)
    )


def negative_log_likelihood(
    counts_CG: Tensor, log_share_CG: Tensor, panel_CG: Tensor, log_dispersion_G: Tensor | None
) -> Tensor:
    """Return each cell's mean over its measured features of -log p(counts), in nats.

    Args:
        counts_CG: Raw counts.
        log_share_CG: From ``log_rates``.
        panel_CG: Which features were measured.
        log_dispersion_G: As for :func:`count_cost`.
    """
    depth_C1 = counts_CG.sum(1, keepdim=True).clamp(min=1)
    log_mean = torch.log(depth_C1) + log_share_CG.masked_fill(~panel_CG, 0.0)
    cost = count_cost(counts_CG, log_mean, log_dispersion_G)
    return (cost * panel_CG).sum(1) / panel_CG.sum(1).clamp(min=1)
