"""This module judges predicted fold changes of those features that a perturbation changes, with metrics of cell-eval2.

Which features change is told by the true cells alone, so that every method answers for the same ones: Welch's t-test of
log shares between perturbed cells and controls, at a false discovery rate of 5 % (Benjamini and Hochberg). Fold changes
are of profiles (:func:`train.evaluation.effects.profile`): an effect over log 2.

Shape letters used in this module:
    C  cells      G  features
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import polars as pl
from cell_eval2.de import prepare_de, resolve_target_genes
from cell_eval2.metrics.de import de_direction_match, de_lfc_nmae
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import false_discovery_control, ttest_ind_from_stats
from sklearn.utils.sparsefuncs import mean_variance_axis

from train.evaluation.score import Way

FOLD_CHANGES, DIRECTIONS = "de_lfc_nmae", "de_direction_match"
METRICS: dict[str, Way] = {FOLD_CHANGES: "lower", DIRECTIONS: "higher"}
"""Mean error of log fold changes over their mean size (1 is what no change at all reaches), and the share of them whose
sign is right."""
FEWEST_CHANGED = 10
FALSE_DISCOVERIES = 0.05
Profile = NDArray[np.float64]


def chances(treated_CG: csr_matrix, control_CG: csr_matrix) -> Profile:
    """Return p_G, adjusted, that cells differ from controls as much by chance.

    Args:
        treated_CG: Log shares of perturbed cells; at least two.
        control_CG: Log shares of controls; at least two.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        p_G = ttest_ind_from_stats(*_moments(treated_CG), *_moments(control_CG), equal_var=False).pvalue
    p_G = np.where(np.isnan(p_G), 1.0, p_G)  # a feature that nobody has
    adjusted_G: Profile = false_discovery_control(p_G)
    return adjusted_G


def _moments(logs_CG: csr_matrix) -> tuple[Profile, Profile, int]:
    """Return the mean and the standard deviation of each feature, and the number of cells."""
    mean_G, variance_G = mean_variance_axis(logs_CG.astype(np.float64), axis=0)
    n = logs_CG.shape[0]
    return mean_G, np.sqrt(variance_G * n / (n - 1)), n


def compared(
    told: Mapping[str, Profile], true: Mapping[str, Profile], chance: Mapping[str, Profile]
) -> list[tuple[str, str, float]]:
    """Return metric, perturbation and value; NaN where fewer than ten features change.

    Args:
        told: Perturbation to the effect_G that is predicted.
        true: Perturbation to its true effect_G.
        chance: Perturbation to p_G of its features, as :func:`chances` gives them.
    """
    logging.getLogger("cell_eval2").setLevel(logging.ERROR)  # it tells what is left out, which NaN says
    real, given = _table(true, chance), _table(told, {})
    nobody = resolve_target_genes(real, sorted(true), target_gene_map={"*": None})  # left out already
    prepared = prepare_de(given, real, control="", p_adj_threshold=FALSE_DISCOVERIES, target_resolution=nobody)
    found = {
        FOLD_CHANGES: de_lfc_nmae(prepared, min_gate_size=FEWEST_CHANGED),
        DIRECTIONS: de_direction_match(prepared),
    }
    enough = {name: (chance[name] < FALSE_DISCOVERIES).sum() >= FEWEST_CHANGED for name in true}
    return [
        (metric, name, values.get(name, math.nan) if enough[name] else math.nan)
        for metric, values in found.items()
        for name in true
    ]


def _table(effects: Mapping[str, Profile], chance: Mapping[str, Profile]) -> pl.DataFrame:
    """Write effects as cell-eval2's table of differential expression; features go by their numbers."""
    return pl.concat(
        pl.DataFrame(
            {
                "target": [name] * len(effect_G),
                "feature": np.arange(len(effect_G)).astype(str),
                "log2_fold_change": effect_G / math.log(2),
                "p_adj": chance.get(name, np.ones(len(effect_G))),
            }
        )
        for name, effect_G in effects.items()
    )
