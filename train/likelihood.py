"""This module is how values are compared with predictions: the likelihood of each kind of measurement.

Counts are negative binomial where they are overdispersed, else Poisson; their mean is the cell's depth times the
feature's share among those that its dataset measures (Lopez et al. 2018). Open or closed chromatin may be a Bernoulli
(switched on by ``likelihood``). Methylated reads are beta-binomial given the reads that cover a site (Kapourani et al.
2021). Levels (log intensities of metabolites and of proteins by mass spectrometry) are Gaussian, and what was looked
for and not found is below the detection limit (Tobin 1958).

Shape letters used in this module:
    C  cells      G  features of a measurement      Q  queries
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Likelihood = Literal["negative binomial", "poisson", "bernoulli", "beta-binomial", "gaussian"]
COUNTS = ("negative binomial", "poisson")
DISPERSED = ("negative binomial", "beta-binomial", "gaussian")
"""Likelihoods with a second parameter of each feature."""
OVERDISPERSED = ("RNA", "protein", "miRNA")
COVERAGE = {"methylation": "methylation_coverage"}
"""Measurement of fractions to the one that holds, for the same features, of how many reads they are."""


def usual_likelihood(measurement: str, *, levels: bool = False) -> Likelihood:
    """Return the likelihood that suits a measurement, of raw counts or of levels."""
    if levels:
        return "beta-binomial" if measurement in COVERAGE else "gaussian"
    return "negative binomial" if measurement in OVERDISPERSED else "poisson"


@dataclass(frozen=True)
class Targets:
    """What is compared with predictions, for every feature of each cell or for those that are asked for.

    Attributes:
        values: Counts; standardised levels, the detection limit where nothing was found; or fractions.
        known: Which of them count.
        found: Which of them were found: counts above zero, levels and fractions that somebody measured.
        log_depth: Log of the cell's counts, at least 0.
        covered: Reads behind a fraction; ones where nobody says.
    """

    values: Tensor
    known: Tensor
    found: Tensor
    log_depth: Tensor
    covered: Tensor | None = None

    def at(self, cell_Q: Tensor, feature_Q: Tensor) -> Targets:
        """Return what is asked for."""
        where = (cell_Q, feature_Q)
        covered = None if self.covered is None else self.covered[where]
        return Targets(self.values[where], self.known[where], self.found[where], self.log_depth[cell_Q, 0], covered)


def log_rates(logits_CG: Tensor, panel_CG: Tensor) -> Tensor:
    """Return the log share of each measured feature; a feature that was not measured has none (-inf)."""
    return functional.log_softmax(logits_CG.masked_fill(~panel_CG, -torch.inf), dim=1)


def outputs(likelihood: Likelihood, logits_CG: Tensor, panel_CG: Tensor) -> Tensor:
    """Return what a likelihood is told of each feature: log shares of counts, else the logits as they are."""
    return log_rates(logits_CG, panel_CG) if likelihood in COUNTS else logits_CG


def cost(likelihood: Likelihood, targets: Targets, output: Tensor, dispersion: Tensor | None) -> Tensor:
    """Return -log p of each value, in nats; 0 where nothing is known.

    Args:
        likelihood: Of the measurement.
        targets: What is compared with.
        output: From :func:`outputs`, of the targets' shape.
        dispersion: Log inverse dispersion, log concentration or log standard deviation of each feature.
    """
    output = output.masked_fill(~targets.known, 0.0)
    if likelihood in COUNTS:
        found = count_cost(targets.values, targets.log_depth + output, dispersion)
    elif likelihood == "bernoulli":
        found = functional.binary_cross_entropy_with_logits(output, (targets.values > 0).to(output), reduction="none")
    elif likelihood == "beta-binomial":
        assert dispersion is not None
        covered = torch.ones_like(targets.values) if targets.covered is None else targets.covered
        found = beta_binomial_cost(targets.values * covered, covered, output, dispersion)
    else:
        assert dispersion is not None
        found = gaussian_cost(targets.values, output, dispersion, ~targets.found)
    return found * targets.known


def mean_cost(likelihood: Likelihood, targets: Targets, output_CG: Tensor, dispersion_G: Tensor | None) -> Tensor:
    """Return each cell's mean of :func:`cost` over what is known of it."""
    return cost(likelihood, targets, output_CG, dispersion_G).sum(1) / targets.known.sum(1).clamp(min=1)


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


def beta_binomial_cost(methylated: Tensor, covered: Tensor, logit: Tensor, log_concentration: Tensor) -> Tensor:
    """Return -log p(methylated of covered reads) of each, in nats; of one read, it is a Bernoulli's.

    Args:
        methylated: Methylated reads, of any shape.
        covered: All reads of the site.
        logit: Log odds of the expected fraction.
        log_concentration: Of the beta distribution that fractions are drawn from, before the softplus: the higher, the
            closer to a binomial.
    """
    concentration = functional.softplus(log_concentration) + 1e-2
    a, b = torch.sigmoid(logit) * concentration + 1e-6, torch.sigmoid(-logit) * concentration + 1e-6
    rest = covered - methylated
    chosen = torch.lgamma(covered + 1) - torch.lgamma(methylated + 1) - torch.lgamma(rest + 1)
    drawn = torch.lgamma(methylated + a) + torch.lgamma(rest + b) - torch.lgamma(covered + a + b)
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b) - drawn - chosen


def gaussian_cost(levels: Tensor, mean: Tensor, log_sd: Tensor, below: Tensor) -> Tensor:
    """Return -log density of each level, in nats; where it is below the limit, -log of the chance of that.

    Args:
        levels: Levels, of any shape; the detection limit where nothing was found.
        mean: Expected levels.
        log_sd: Log standard deviation.
        below: Where nothing was found.
    """
    log_sd = log_sd.clamp(min=-4.0)
    z = (levels - mean) * (-log_sd).exp()
    seen = 0.5 * z.square() + log_sd + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return torch.where(below, -torch.special.log_ndtr(z), seen)
