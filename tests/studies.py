"""Made-up studies whose truth is known, for tests of what judges methods."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from store.schema import OBS_DEFAULTS
from train.evaluation.study import Study

FEATURES = [f"g{number}" for number in range(60)]


def study(obs: pd.DataFrame, rate_CG: np.ndarray, seed: int = 0, features: list[str] | None = None) -> Study:
    """Draw Poisson counts; what obs does not say is the lake's default."""
    obs = obs.reset_index(drop=True)
    for name, value in OBS_DEFAULTS.items():
        if name not in obs:
            obs[name] = value
    counts = np.random.default_rng(seed).poisson(rate_CG).astype(np.float32)
    return Study({"RNA": csr_matrix(counts)}, {"RNA": list(features or FEATURES[: counts.shape[1]])}, obs)


def perturbed(
    targets: list[str], contexts: tuple[str, ...] = ("a", "b"), n_cells: int = 60, strength: float = 1.2, seed: int = 0
) -> Study:
    """Cells of every target (and of control) in every context; a target moves ten features, a pair moves the sum."""
    rng = np.random.default_rng(seed)
    base = {context: rng.uniform(2, 12, len(FEATURES)) for context in contexts}
    singles = sorted({one for target in targets for one in target.split("+")})
    shift = {}
    for single in singles:
        shift[single] = np.zeros(len(FEATURES))
        shift[single][rng.choice(len(FEATURES), 10, replace=False)] = rng.choice([-strength, strength], 10)
    lines, rates = [], []
    for context in contexts:
        for target in ["control", *targets]:
            moved = sum((shift[one] for one in target.split("+") if one in shift), np.zeros(len(FEATURES)))
            for _ in range(n_cells):
                lines.append({"perturbation": target, "cell_type": context, "donor_id": f"d{rng.integers(4)}"})
                rates.append(base[context] * np.exp(moved) * rng.gamma(20, 1 / 20))
    return study(pd.DataFrame(lines), np.array(rates), seed)
