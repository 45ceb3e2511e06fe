"""This module is the training objective: which cell is seen, which is predicted, and at what cost.

Shape letters used in this module:
    C  cells      D  datasets      G  features of a measurement
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.cells import Cells, Csr
from train.model import CellModel, Loss, reconstruction_loss
from train.tokens import TokenSettings, dense_counts, make_tokens


def seen_cells(cells: Cells) -> Cells:
    """Return what is seen in each cell's place: itself, or its first matched control where it came with one.

    So the model learns to predict perturbed counts from control counts and the prompt, which is what it is asked later.
    """
    if cells.controls is None:
        return cells
    others, place_C = cells.controls.cells, cells.controls.place_CS[:, 0]
    taken = np.where(place_C >= 0, cells.n_cells + place_C, np.arange(cells.n_cells))
    return replace(
        cells,
        counts={name: Csr.concatenate([part, others.counts[name]]).take(taken) for name, part in cells.counts.items()},
        measured={name: np.concatenate([part, others.measured[name]])[taken] for name, part in cells.measured.items()},
        controls=None,
    )


class Objective:
    """Gives the loss of a batch; holds the datasets' panels."""

    def __init__(
        self,
        panels_DG: dict[str, NDArray[np.bool_]],
        settings: TokenSettings,
        seed: int,
        device: torch.device,
    ) -> None:
        self.panels = {name: torch.from_numpy(panel).to(device) for name, panel in panels_DG.items()}
        self.settings = settings
        self.seed = seed
        self.device = device

    def __call__(
        self,
        model: torch.nn.Module,
        plain: CellModel,
        cells: Cells,
        step: int | None,
    ) -> tuple[Loss, int, int]:
        """Return the loss of one rank's share of a batch, its number of tokens and of cells.

        Args:
            model: The model as Accelerate wrapped it.
            plain: The same, unwrapped.
            cells: The rank's cells of the step, with the matched controls that stand in for some of them.
            step: The global step; None evaluates with the masks of step 0.
        """
        tokens = make_tokens(
            cells,
            plain.config.offsets,
            self.settings,
            chance=(self.seed, step or 0),
            seen=seen_cells(cells),
            device=self.device,
        )
        _, logits = model(tokens)
        counts, panels = self.targets(cells, plain)
        return reconstruction_loss(plain, logits, counts, panels), int(tokens.valid_CL.sum()), cells.n_cells

    def targets(self, cells: Cells, model: CellModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return counts_CG and panel_CG of every measurement; an unmeasured cell has an empty panel."""
        dataset_C = torch.from_numpy(cells.panel).to(self.device).long()
        counts, panels = {}, {}
        for name, n_features in model.config.n_features.items():
            measured_C1 = torch.from_numpy(cells.measured[name]).to(self.device)[:, None]
            counts[name] = dense_counts(cells.counts[name], n_features, self.device)
            panels[name] = self.panels[name][dataset_C] & measured_C1
        return counts, panels
