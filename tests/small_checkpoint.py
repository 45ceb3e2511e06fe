"""This module writes a small checkpoint with random weights, for tests that need a real one but no training."""

from __future__ import annotations

from pathlib import Path

import torch

from train import checkpoint
from train.cells import PROMPTS
from train.checkpoint import Vocabulary
from train.config import ModelConfig
from train.model import CellModel
from train.ontology import type_terms
from train.start import tell_types
from train.tokens import TokenSettings

GENES = [f"ENSG{i:011d}" for i in range(40)]
PROTEINS = [f"P{i}" for i in range(5)]


def write_checkpoint(
    folder: Path,
    *,
    width: int = 16,
    tokens: int = 24,
    seed: int = 0,
    backwards: bool = False,
    n_genes: int = 40,
    levels: tuple[str, ...] = (),
) -> Path:
    """Write ``folder``: genes with symbols G0 .., 5 proteins, two tissues, perturbations of G1 and G2.

    ``levels`` are the measurements whose values are levels, not counts.
    ``backwards`` turns the order of the genes around: another vocabulary.
    """
    order = range(n_genes - 1, -1, -1) if backwards else range(n_genes)
    genes = [f"ENSG{i:011d}" for i in range(n_genes)]
    vocabulary = {
        "RNA": Vocabulary([genes[i] for i in order], [f"G{i}" for i in order], ["homo_sapiens"] * n_genes),
        "protein": Vocabulary(PROTEINS, [f"CD{i}" for i in range(5)], ["homo_sapiens"] * 5),
    }
    prompts = {name: [""] for name in PROMPTS} | {
        "organism": ["", "homo_sapiens"],
        "tissue": ["", "blood", "lung"],
        "cell_type": ["", "B cell", "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"],
        "perturbation": ["", "control", "G1", "G2"],
    }
    torch.manual_seed(seed)
    types = type_terms(prompts["cell_type"])
    model = CellModel(
        ModelConfig(
            n_features={name: len(part.feature_id) for name, part in vocabulary.items()},
            n_prompts={name: len(prompts[name]) for name in PROMPTS},
            n_perturbations=len(prompts["perturbation"]),
            width=width,
            levels=levels,
            n_terms=types.n_terms,
            n_term_links=len(types.term_E),
        )
    )
    tell_types(model, types)
    torch.nn.init.normal_(model.target.weight)
    provenance = {
        "snapshot": {"name": "small", "id": "c" * 64, "commit_id": "d" * 64, "lake_timestamp": 1},
        "global_step": 3,
        "measurements": list(vocabulary),
        "prompt_fields": list(PROMPTS),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    return checkpoint.export(
        folder, model, TokenSettings(budget=tokens, levels=levels), vocabulary, prompts, provenance, "# small\n"
    )
