"""This module scores: ours, between the strongest baseline and a replicate of the experiment, or not at all.

Each metric is reported as u (ours), b (the strongest baseline), r (the replicate) and s = (u - b) / (r - b): 0 is the
floor, 1 what repeating the experiment reaches. A metric whose replicate does not beat the strongest baseline by two
standard errors says nothing on the dataset and gets no score there.

How far chance reaches is told by the differences of units, from the baseline to ours and to the replicate: by Student's
t of their means, and for s, a ratio of two means, by Fieller's interval. Both are exact for three units as for many, if
differences are normal; a bootstrap of few units is far too sure of itself.

Shape letters used in this module:
    U  units (perturbations, donors, ...): what varies by chance, never cells
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student

from store.errors import InputRefused

REPLICATE = "replicate"
ERRORS = 2.0
LEVEL = 0.95
FEWEST_UNITS = 3

Way = Literal["higher", "lower"]
"""Which way of a metric is better."""
Verdict = Literal["above", "not told apart", "below", "not informative", "too few units", "no answer", "floor only"]


@dataclass(frozen=True)
class Value:
    """What one method reached on one unit.

    Attributes:
        method: Its name; ``REPLICATE`` is the ceiling.
        metric: The metric's name.
        unit: A perturbation, a donor, ...
        seed: Of the method or of the split; seeds are averaged.
        value: What was measured; NaN where it is not defined.
    """

    method: str
    metric: str
    unit: str
    seed: int
    value: float


@dataclass(frozen=True)
class Score:
    """One metric on one dataset.

    Attributes:
        metric: Its name.
        better: "higher" or "lower".
        n_units: U.
        b: The strongest baseline's mean.
        b_method: Its name.
        r: The replicate's mean.
        gate: How many standard errors the replicate is better than the strongest baseline.
        u: Ours; NaN where there is none.
        s: (u - b) / (r - b); NaN where the gate is shut or there is no u.
        low, high: Fieller's 95 % interval of s; without end where the replicate's lead may be nothing.
        p: Two-sided, of u = b, by a paired t-test over units, after Holm over the metrics that are informative.
        verdict: In words; "no answer" where ours is defined on no unit.
    """

    metric: str
    better: str
    n_units: int
    b: float
    b_method: str
    r: float
    gate: float
    u: float = math.nan
    s: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    verdict: Verdict = "floor only"


def score(values: Iterable[Value], better: Mapping[str, Way], ours: str | None = None) -> list[Score]:
    """Score every metric.

    A metric that is defined on no unit is left out. The strongest baseline is the one with the best mean over the same
    units, chosen with these very units: that favours the baseline. Units that any method lacks are left out for all.

    Args:
        values: What the methods reached; the replicate is one of them.
        better: Metric to which way is better.
        ours: The method that is scored; None reports floor and ceiling only.

    Raises:
        InputRefused: A metric has no replicate, no baseline, or no unit that all methods have.
    """
    table = pd.DataFrame([vars(value) for value in values])
    scores, raised = [], []
    for metric, way in better.items():
        chosen = table[table["metric"] == metric] if len(table) else table
        per_unit = (
            chosen.pivot_table(index="unit", columns="method", values="value", aggfunc="mean")
            if len(chosen)
            else chosen
        )
        per_unit = per_unit.dropna()
        baselines = [
            name for name in dict.fromkeys(table["method"]) if name in per_unit and name not in (REPLICATE, ours)
        ]
        if len(chosen) and chosen["value"].isna().all():
            continue  # not defined on this dataset
        if REPLICATE not in per_unit.columns or not baselines or per_unit.empty:
            raise InputRefused(f"{metric}: needs a replicate, a baseline and a unit that all methods have")
        one, p = _score(metric, way, per_unit, baselines, ours)
        scores.append(one)
        raised.append(p)
    adjusted = holm(raised)
    return [_judged(one, p) for one, p in zip(scores, adjusted, strict=True)]


def _score(
    metric: str, way: str, per_unit: pd.DataFrame, baselines: list[str], ours: str | None
) -> tuple[Score, float]:
    sign = 1.0 if way == "higher" else -1.0
    means = {name: sign * per_unit[name].mean() for name in baselines}
    b_method = max(means, key=lambda name: means[name])  # of equals, the one that was named first
    b_U, r_U = per_unit[b_method].to_numpy(float), per_unit[REPLICATE].to_numpy(float)
    lead_U = sign * (r_U - b_U)
    found = Score(metric, way, len(per_unit), b_U.mean(), b_method, r_U.mean(), standard_errors(lead_U))
    if ours is None:
        return found, math.nan
    if ours not in per_unit:
        return replace(found, verdict="no answer"), math.nan
    u_U = per_unit[ours].to_numpy(float)
    found = replace(found, u=u_U.mean())
    if found.gate < ERRORS:
        return found, math.nan
    gain_U = sign * (u_U - b_U)
    low, high = fieller(gain_U, lead_U)
    p = float(2 * student.sf(abs(standard_errors(gain_U)), len(gain_U) - 1))
    return replace(found, s=float(gain_U.mean() / lead_U.mean()), low=low, high=high), p


def _judged(one: Score, p: float) -> Score:
    if one.verdict == "no answer":
        return one
    if one.n_units < FEWEST_UNITS:
        return replace(one, verdict="too few units")
    if one.gate < ERRORS:
        return replace(one, verdict="not informative")
    if math.isnan(one.s):
        return one
    verdict: Verdict = "not told apart" if p >= 1 - LEVEL else "above" if one.s > 0 else "below"
    return replace(one, p=p, verdict=verdict)


def fieller(gain_U: NDArray[np.float64], lead_U: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of the ratio of two paired means (Fieller 1954).

    It holds each s for which the mean of ``gain - s * lead`` may be 0 by a t-test. Where that of the lead may be 0 too,
    no end is known, but on the side of 0 if the gain is told apart from it; a lead below 0 is not considered.

    Args:
        gain_U: Numerator of each unit; two at least.
        lead_U: Denominator of each unit; its mean is above 0.
        level: How often it holds the truth.
    """
    n_units, gain, lead = len(gain_U), gain_U.mean(), lead_U.mean()
    covariance = np.cov(gain_U, lead_U) * student.ppf((1 + level) / 2, n_units - 1) ** 2 / n_units
    square, half, rest = lead**2 - covariance[1, 1], gain * lead - covariance[0, 1], gain**2 - covariance[0, 0]
    root = math.sqrt(max(0.0, half**2 - square * rest))  # of square s² - 2 half s + rest <= 0
    if square > 0:
        return float((half - root) / square), float((half + root) / square)
    if rest <= 0:
        return -math.inf, math.inf
    if gain > 0:
        return float(rest / (half + root)), math.inf
    return -math.inf, float(rest / (half - root))


def standard_errors(lead_U: NDArray[np.float64]) -> float:
    """Return how many standard errors a mean over units is above 0; NaN-free: too few units are 0."""
    if len(lead_U) < FEWEST_UNITS:
        return 0.0
    error = lead_U.std(ddof=1) / math.sqrt(len(lead_U))
    if error == 0:
        return math.copysign(math.inf, lead_U.mean()) if lead_U.mean() else 0.0
    return float(lead_U.mean() / error)


def holm(p: list[float]) -> list[float]:
    """Adjust p values for being several (Holm 1979); NaN stays and does not count."""
    known = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = list(p), 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted
