"""This module trains a model on the cells of a study, in memory and in one process: for benchmarks and small questions.

Model, tokens and objective are those of ``python -m train``; what is left out is the lake, the stream and the workers.

Shape letters used in this module:
    C  cells      G  features of a measurement
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from store.schema import UNKNOWN
from train.adapter import AdapterSettings, adapted
from train.cells import NUMBERS, PROMPTS, Cells, with_absent
from train.checkpoint import Checkpoint, Vocabulary
from train.config import ModelConfig
from train.evaluation.folds import UNPERTURBED
from train.evaluation.ours import cells_of
from train.evaluation.study import Study
from train.knowledge import gather_knowledge
from train.model import CellModel
from train.objective import Objective
from train.ontology import type_terms
from train.predictor import Predictor
from train.start import begin, tell_types
from train.tokens import TokenSettings


@dataclass(frozen=True)
class ScratchSettings:
    """How a model is trained in memory.

    Attributes:
        steps: Optimizer steps.
        batch: Cells of a step.
        lr: Peak learning rate of AdamW; linear warm-up over a tenth of the steps, then a cosine to zero.
        weight_decay: Decoupled weight decay.
        tokens: How cells become tokens.
        model: Sizes, by their names in ``ModelConfig``.
        sets: Gene sets that features' identities add.
        permute: Deal memberships anew: the null arm.
        spectral: Let features' vectors begin at the principal axes of the training cells.
        queries: Features that are asked for, of each cell and measurement.
        types: Learn to tell cell types too.
    """

    steps: int = 400
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.01
    tokens: TokenSettings = field(default_factory=TokenSettings)
    model: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    permute: bool = False
    spectral: bool = True
    queries: int = 16
    types: bool = True


def train_on(study: Study, settings: ScratchSettings | None = None, seed: int = 0) -> Predictor:
    """Train a model on all cells of a study; what was never seen is told by the same errors as of a checkpoint.

    Args:
        study: The cells; every feature counts as measured in each cell that has the measurement.
        settings: How.
        seed: Of weights, order and masks.
    """
    settings = settings or ScratchSettings()
    words = _words(study)
    vocabulary = {
        name: Vocabulary(list(names), list(names), [""] * len(names)) for name, names in study.features.items()
    }
    known = gather_knowledge(
        [(name, name) for names in study.features.values() for name in names],
        settings.sets,
        {},
        None,
        seed if settings.permute else None,
    )
    terms = type_terms(words["cell_type"]) if settings.types and len(words["cell_type"]) > 2 else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CellModel(
            ModelConfig(
                n_features={name: len(names) for name, names in study.features.items()},
                n_prompts={name: len(words[name]) for name in PROMPTS},
                n_perturbations=len(words["perturbation"]),
                n_sets=len(known.sets),
                n_memberships=len(known.set_E),
                n_terms=0 if terms is None else terms.n_terms,
                n_term_links=0 if terms is None else len(terms.term_E),
                **settings.model,
            )
        )
    model.know(torch.from_numpy(known.feature_E), torch.from_numpy(known.set_E), {})
    if terms is not None:
        tell_types(model, terms)
    begin(model, study.counts, spectral=settings.spectral, seed=seed)
    manifest = {"measurements": list(study.counts), "prompt_fields": list(PROMPTS)}
    predictor = Predictor(Checkpoint(model, settings.tokens, vocabulary, words, manifest))
    _train(model, _cells(predictor, study), settings, seed)
    model.eval()
    return predictor


def adapt_on(
    predictor: Predictor,
    study: Study,
    settings: ScratchSettings | None = None,
    adapter: AdapterSettings | None = None,
    seed: int = 0,
) -> Predictor:
    """Train an adapter beside a model on all cells of a study; the model given stays as it is.

    Args:
        predictor: A model, from a checkpoint or from :func:`train_on`.
        study: The cells; features and values that the model does not know are left out.
        settings: How; sizes, sets and tokens are the model's own.
        adapter: Sizes of the adapter.
        seed: Of the adapter's first weights, order and masks.
    """
    settings = replace(settings or ScratchSettings(steps=100), tokens=predictor.tokens)
    model = adapted(predictor.model, adapter or AdapterSettings(), seed)
    _train(model, _cells(predictor, study), settings, seed)
    parts = (predictor.tokens, predictor.vocabulary, predictor.prompts, predictor.manifest)
    return Predictor(Checkpoint(model.eval(), *parts), str(predictor.device))


def objective_of(model: CellModel, settings: ScratchSettings, seed: int) -> Objective:
    """Return the training objective of a model whose cells measure every feature."""
    panels = {name: np.ones((1, size), dtype=bool) for name, size in model.config.n_features.items()}
    return Objective(panels, settings.tokens, seed, next(model.parameters()).device, settings.queries)


def held_out_loss(predictor: Predictor, study: Study, settings: ScratchSettings, seed: int = 0) -> float:
    """Return the mean loss of cells in nats per measured feature, with the masks of step 0 and the settings' tokens."""
    objective, cells = objective_of(predictor.model, settings, seed), _cells(predictor, study)
    total = pairs = 0.0
    with torch.no_grad():
        for first in range(0, cells.n_cells, settings.batch):
            part = cells.take(np.arange(first, min(first + settings.batch, cells.n_cells)))
            loss, *_ = objective(predictor.model, predictor.model, part, None)
            total, pairs = total + float(loss.rebuilt), pairs + float(loss.pairs)
    return total / max(1.0, pairs)


def _train(model: CellModel, cells: Cells, settings: ScratchSettings, seed: int) -> None:
    objective = objective_of(model, settings, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1, div_factor=25, final_div_factor=1e4
    )
    random = np.random.default_rng([seed, 10])
    order = np.zeros(0, np.int64)
    for step in range(settings.steps):
        while len(order) < settings.batch:
            order = np.concatenate([order, random.permutation(cells.n_cells)])
        batch, order = cells.take(order[: settings.batch]), order[settings.batch :]
        loss, *_ = objective(model, model, batch, step)
        torch.autograd.backward(loss.total / loss.pairs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _words(study: Study) -> dict[str, list[str]]:
    """Return the values of every prompt, "not said" first; of perturbations, then "control"."""
    words = {name: ["", *sorted(set(study.label(name)) - {""})] if name in study.obs else [""] for name in PROMPTS}
    targets = {one for name in set(study.label("perturbation")) - {*UNPERTURBED, UNKNOWN} for one in name.split("+")}
    return words | {"perturbation": ["", "control", *sorted(targets)]}


def _cells(predictor: Predictor, study: Study) -> Cells:
    """Return all that is known of a study's cells; values that the model never saw are not said.

    Of what the model knows and the study does not hold, nothing was measured.
    """
    names = [name for name in study.counts if name in predictor.vocabulary]
    cells = cells_of(predictor, study, names, (*PROMPTS, *NUMBERS, "perturbation"))
    known = replace(
        cells,
        panel=np.zeros(study.n_cells, np.int32),
        row=np.arange(study.n_cells, dtype=np.int64),
    )
    return with_absent(known, [name for name in predictor.vocabulary if name not in names])
