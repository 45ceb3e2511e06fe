"""This module simulates cells of which everything is known: programs, types, times, knock-outs, three modalities.

The model: a cell has a type, a time point and a donor, and runs some gene programs. Log expression of a gene is its
baseline plus the sum of its programs' activities plus the effect of the cell's knock-out. Counts are negative binomial
around it (RNA, protein) or Poisson (ATAC). Proteins follow the RNA of their gene, peaks follow the program of theirs.

Shape letters used in this module:
    C  cells      G  genes      A  proteins (antibodies)      P  peaks      K  programs      T  knock-out targets
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd
import scipy.sparse
from numpy.typing import NDArray
from pydantic import Field

from store.settings import Settings

CELL_TYPES = ("alpha", "beta", "gamma", "delta")
TIMES = (0.0, 24.0, 72.0)
N_PROGRAMS = 12
N_DONORS = 4


class SimulationSettings(Settings):
    """Sizes of a simulation; the same settings give the same cells on every machine."""

    cells: int = Field(default=3000, ge=20)
    """Cells."""
    genes: int = Field(default=300, ge=60)
    """Genes."""
    proteins: int = Field(default=30, ge=1)
    """Antibodies, each against the product of one gene."""
    peaks: int = Field(default=200, ge=1)
    """Chromatin peaks, each near one gene."""
    targets: int = Field(default=8, ge=1, le=20)
    """Genes that are knocked out."""
    null_targets: int = Field(default=2, ge=0)
    """Of the targets, those whose loss changes nothing."""
    perturbed: float = Field(default=0.6, ge=0, le=1)
    """Share of cells with a knock-out; the others carry a non-targeting guide."""
    truth_seed: int = Field(default=0, ge=0)
    """Decides programs, effects and links: simulations of one truth can be mixed."""
    seed: int = Field(default=0, ge=0)
    """Decides the cells."""


@dataclass(frozen=True)
class Truth:
    """What the simulator knows: baselines, program memberships, links, and each knock-out's log fold changes."""

    genes: list[str]
    proteins: list[str]
    peaks: list[str]
    targets: list[str]
    null_targets: list[str]
    membership_KG: NDArray[np.float64]
    type_activity: NDArray[np.float64]  # [cell types, K]
    time_activity: NDArray[np.float64]  # [K] per unit of log2(1 + days)
    effect_TG: NDArray[np.float64]
    gene_of_protein: NDArray[np.int64]
    gene_of_peak: NDArray[np.int64]
    baseline_G: NDArray[np.float64]

    def as_json(self) -> dict[str, Any]:
        """Return the truth as JSON values; ``log_fold_change`` is natural log, one list over ``genes`` per target."""
        return {
            "genes": self.genes,
            "proteins": self.proteins,
            "peaks": self.peaks,
            "null_targets": self.null_targets,
            "log_fold_change": {
                name: row.round(6).tolist() for name, row in zip(self.targets, self.effect_TG, strict=True)
            },
            "program_genes": [[self.genes[g] for g in np.flatnonzero(row)] for row in self.membership_KG],
            "program_activity_of_cell_type": dict(zip(CELL_TYPES, self.type_activity.round(6).tolist(), strict=True)),
            "program_activity_of_time": self.time_activity.round(6).tolist(),
            "gene_of_protein": {self.proteins[a]: self.genes[g] for a, g in enumerate(self.gene_of_protein)},
            "gene_of_peak": {self.peaks[p]: self.genes[g] for p, g in enumerate(self.gene_of_peak)},
        }


@dataclass(frozen=True)
class Simulation:
    """Simulated cells: obs in the lake's columns, counts per measurement, and the truth."""

    obs: pd.DataFrame
    counts: dict[str, scipy.sparse.csr_matrix]
    truth: Truth


def make_truth(settings: SimulationSettings) -> Truth:
    """Draw programs, effects and links."""
    rng = np.random.default_rng([settings.truth_seed, 1])
    n_genes, n_targets = settings.genes, settings.targets
    membership = np.zeros((N_PROGRAMS, n_genes))
    for program in range(N_PROGRAMS):
        members = rng.choice(n_genes, size=n_genes // 12, replace=False)
        membership[program, members] = rng.uniform(0.5, 1.0, size=len(members))
    targets = rng.choice(n_genes, size=n_targets, replace=False)
    effect = np.zeros((n_targets, n_genes))
    for row, target in enumerate(targets[: n_targets - min(settings.null_targets, n_targets)]):
        programs = rng.choice(N_PROGRAMS, size=2, replace=False)
        effect[row] = membership[programs].T @ (rng.choice([-1.0, 1.0], size=2) * rng.uniform(1.0, 1.6, size=2))
        effect[row, target] = -2.5
    varying = np.flatnonzero(membership.any(axis=0))
    genes = [f"SYNG{number:05d}" for number in range(n_genes)]
    return Truth(
        genes=genes,
        proteins=[f"SYNP{number:05d}" for number in range(settings.proteins)],
        peaks=[f"chrS:{1000 * number}-{1000 * number + 500}" for number in range(settings.peaks)],
        targets=[genes[target] for target in targets],
        null_targets=[genes[target] for target, row in zip(targets, effect, strict=True) if not row.any()],
        membership_KG=membership,
        type_activity=rng.gamma(0.5, 1.6, size=(len(CELL_TYPES), N_PROGRAMS)),
        time_activity=np.where(rng.random(N_PROGRAMS) < 0.3, rng.normal(0, 0.6, N_PROGRAMS), 0.0),
        effect_TG=effect,
        gene_of_protein=rng.choice(varying, size=settings.proteins, replace=settings.proteins > len(varying)),
        gene_of_peak=rng.choice(varying, size=settings.peaks, replace=settings.peaks > len(varying)),
        baseline_G=rng.normal(0.0, 0.9, n_genes),
    )


def simulate(settings: SimulationSettings) -> Simulation:
    """Draw cells; each has RNA, protein and ATAC counts."""
    truth = make_truth(settings)
    rng = np.random.default_rng([settings.truth_seed, 2, settings.seed])
    n_cells = settings.cells
    cell_type = rng.integers(len(CELL_TYPES), size=n_cells)
    time = np.array(TIMES)[rng.integers(len(TIMES), size=n_cells)]
    donor = rng.integers(N_DONORS, size=n_cells)
    target = np.where(rng.random(n_cells) < settings.perturbed, rng.integers(len(truth.targets), size=n_cells), -1)
    activity = truth.type_activity[cell_type] * rng.gamma(8.0, 1 / 8.0, size=(n_cells, N_PROGRAMS))
    activity += np.log2(1 + time / 24)[:, None] * truth.time_activity
    effect = np.where(target[:, None] >= 0, truth.effect_TG[target], 0.0)
    log_rate = truth.baseline_G + activity @ truth.membership_KG + effect + rng.normal(0, 0.1, (N_DONORS, 1))[donor]
    share = np.exp(log_rate - log_rate.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    depth = np.exp(rng.normal(np.log(4.0 * settings.genes), 0.3, n_cells))
    protein_rate = 4.5 * (share[:, truth.gene_of_protein] * settings.genes) ** 0.8
    peak_rate = np.exp(0.6 * (log_rate - truth.baseline_G)[:, truth.gene_of_peak] - 1.2)
    counts = {
        "RNA": _negative_binomial(rng, depth[:, None] * share, 4.0),
        "protein": _negative_binomial(rng, protein_rate, 6.0),
        "ATAC": rng.poisson(peak_rate),
    }
    names = np.array([*truth.targets, "control"], dtype=object)
    obs = pd.DataFrame(
        {
            "cell_id": [f"syn{settings.seed}-{cell:06d}" for cell in range(n_cells)],
            "cell_type": np.array(CELL_TYPES, dtype=object)[cell_type],
            "donor_id": [f"donor{number}" for number in donor],
            "assay": "simulation",
            "tissue": "simulated",
            "disease": "normal",
            "time": time,
            "time_unit": "h",
            "perturbation_type": "genetic",
            "perturbation": names[target],
        }
    )
    return Simulation(
        obs, {name: scipy.sparse.csr_matrix(dense.astype(np.float32)) for name, dense in counts.items()}, truth
    )


def _negative_binomial(rng: np.random.Generator, mean: NDArray[np.float64], shape: float) -> NDArray[np.int64]:
    return rng.poisson(rng.gamma(shape, mean / shape))


def write_truth(folder: str | Path, truth: Truth) -> None:
    """Write ``truth.json`` into ``folder``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "truth.json").write_text(json.dumps(truth.as_json()), encoding="utf-8")


def write_files(folder: str | Path, simulation: Simulation) -> list[Path]:
    """Write a simulation as other tools would leave it: a 10x folder, an h5mu, and the truth.

    Returns:
        ``<folder>/10x`` (RNA and antibodies as a feature-barcode matrix, obs as ``metadata.tsv``),
        ``<folder>/cells.h5mu`` (RNA, proteins, ATAC) and ``<folder>/truth.json``.
    """
    folder = Path(folder)
    write_truth(folder, simulation.truth)
    _write_10x(folder / "10x", simulation)
    _write_h5mu(folder / "cells.h5mu", simulation)
    return [folder / "10x", folder / "cells.h5mu", folder / "truth.json"]


def _write_10x(folder: Path, simulation: Simulation) -> None:
    import gzip

    import scipy.io

    folder.mkdir(parents=True, exist_ok=True)
    truth = simulation.truth
    rows = [(name, name.replace("SYNG", "syn"), "Gene Expression") for name in truth.genes]
    rows += [(name, name.replace("SYNP", "ab"), "Antibody Capture") for name in truth.proteins]
    matrix = scipy.sparse.hstack([simulation.counts["RNA"], simulation.counts["protein"]]).T.tocoo()
    with gzip.GzipFile(
        folder / "matrix.mtx.gz", "wb", mtime=0
    ) as file:  # no time of day: the same seed, the same bytes
        scipy.io.mmwrite(cast(IO[bytes], file), matrix.astype(np.int64), field="integer")
    lines = {"features": ["\t".join(row) for row in rows], "barcodes": list(simulation.obs["cell_id"])}
    for name, content in lines.items():
        with gzip.GzipFile(folder / f"{name}.tsv.gz", "wb", mtime=0) as file:
            file.write("".join(line + "\n" for line in content).encode())
    simulation.obs.to_csv(folder / "metadata.tsv", sep="\t", index=False)


def _write_h5mu(path: Path, simulation: Simulation) -> None:
    import anndata
    import mudata

    truth = simulation.truth
    obs = simulation.obs.set_index("cell_id")
    names = {"rna": ("RNA", truth.genes), "prot": ("protein", truth.proteins), "atac": ("ATAC", truth.peaks)}
    parts = {
        modality: anndata.AnnData(simulation.counts[measurement], obs=obs.copy(), var=pd.DataFrame(index=features))
        for modality, (measurement, features) in names.items()
    }
    with mudata.set_options(pull_on_update=False):
        mudata.MuData(parts).write_h5mu(path)
