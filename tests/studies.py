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


def switched_off(
    n_targets: int = 24, n_contexts: int = 4, n_cells: int = 40, seed: int = 0
) -> tuple[Study, dict[str, list[str]]]:
    """Cells whose targets switch off what is on: a target removes the activity of its two programs in its context.

    What a program does is in its genes, which programs a target is in is known, and how active they are can be seen in
    the control cells. So the truth is a product of context and target, which no sum of means is.

    Returns:
        The cells, and program to its members: its targets.
    """
    rng = np.random.default_rng(seed)
    n_programs, names = 6, [f"t{number}" for number in range(n_targets)]
    member = np.stack([rng.permutation(len(FEATURES)) < 10 for _ in range(n_programs)]).astype(float)
    active = rng.uniform(0, 2.0, (n_contexts, n_programs))
    programs = [rng.choice(n_programs, 2, replace=False) for _ in names]
    base = rng.uniform(3, 8, len(FEATURES))
    lines, rates = [], []
    for context in range(n_contexts):
        for target, hit in zip(["control", *names], [[], *programs], strict=True):
            for _ in range(n_cells * (4 if target == "control" else 1)):
                level = active[context] * rng.gamma(20, 1 / 20, n_programs)
                level[list(hit)] = 0
                lines.append({"perturbation": target, "cell_type": f"c{context}", "donor_id": "d"})
                rates.append(base * np.exp(level @ member) * rng.gamma(20, 1 / 20))
    sets = {
        f"p{number}": [name for name, hit in zip(names, programs, strict=True) if number in hit]
        for number in range(n_programs)
    }
    return study(pd.DataFrame(lines), np.array(rates), seed), sets


def going_round(n_times: int = 15, n_cells: int = 60, turns: float = 1.25, seed: int = 0) -> Study:
    """Cells on a round way, as of a cycle: the straight line between two times always passes inside of it."""
    rng = np.random.default_rng(seed)
    member = np.stack([rng.permutation(len(FEATURES)) < 20 for _ in range(2)]).astype(float)
    base = rng.uniform(5, 9, len(FEATURES))
    lines, rates = [], []
    for hours in np.linspace(0, 48, n_times):
        for _ in range(n_cells):
            angle = 2 * np.pi * turns * hours / 48 + rng.normal(0, 0.1)
            level = 1.2 * np.array([np.cos(angle), np.sin(angle)]) + rng.normal(0, 0.05, 2)
            lines.append({"time": round(float(hours), 3), "cell_type": "c", "donor_id": "d"})
            rates.append(3 * base * np.exp(level @ member))
    return study(pd.DataFrame(lines), np.array(rates), seed)


def opened_together(n_cells: int = 2000, n_programs: int = 10, n_peaks: int = 40, seed: int = 0) -> Study:
    """Cells whose peaks open where two programs are active at once: a product, which no sum of programs is.

    Programs are on or off, each by itself, and show in the RNA; every peak belongs to two of them. Cells are dealt to
    15 donors that do not differ. The programs are too many for neighbours to share all that matters.
    """
    rng = np.random.default_rng(seed)
    member = np.stack([rng.permutation(len(FEATURES)) < 10 for _ in range(n_programs)]).astype(float)
    pair = np.stack([rng.choice(n_programs, 2, replace=False) for _ in range(n_peaks)])
    base_G, base_P = rng.uniform(3, 8, len(FEATURES)), rng.uniform(25, 50, n_peaks)
    level = (rng.random((n_cells, n_programs)) < 0.5) * rng.gamma(20, 1 / 20, (n_cells, n_programs))
    together = level[:, pair[:, 0]] * level[:, pair[:, 1]]
    obs = pd.DataFrame({"cell_type": "c", "donor_id": [f"d{number % 15}" for number in range(n_cells)]})
    rna = study(obs, base_G * np.exp(1.2 * level @ member), seed)
    peaks = rng.poisson(base_P * np.exp(2.0 * together)).astype(np.float32)
    names = {"RNA": rna.features["RNA"], "ATAC": [f"peak{number}" for number in range(n_peaks)]}
    return Study({"RNA": rna.counts["RNA"], "ATAC": csr_matrix(peaks)}, names, rna.obs)


def donors(n_donors: int = 30, n_cells: int = 40, blur: float = 1.0, seed: int = 0) -> Study:
    """Cells of three types that are not quite told apart, from donors that differ."""
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(7).normal(0, 0.16, (3, len(FEATURES)))
    lines, rates = [], []
    for donor in range(n_donors):
        own = rng.normal(0, 0.05, len(FEATURES))
        for _ in range(n_cells):
            kind = rng.integers(3)
            lines.append({"cell_type": f"t{kind}", "donor_id": f"d{donor:02d}"})
            rates.append(2 * np.exp(centre[kind] / blur + own))
    return study(pd.DataFrame(lines), np.array(rates), seed)
