"""This module is the training objective: which cell is seen, which is predicted, and at what cost.

Shape letters used in this module:
    C  cells      D  datasets      G  features of a measurement
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.cells import Cells
from train.model import CellModel, Loss, reconstruction_loss
from train.tokens import TokenSettings, dense_counts, make_tokens

CONTROL = 1
"""Code of "control" among perturbations; 0 is "not said"."""


def matched_controls(cells: Cells, share: float, seed: int, step: int) -> NDArray[np.int64]:
    """Choose for each cell the cell that is seen in its place: itself, or for some perturbed cells a matched control.

    A control matches when it comes from the same dataset, has the same cell type and time, and was not perturbed. So
    the model learns to predict perturbed counts from control counts and the prompt, which is what it is asked later.
    """
    chosen = np.arange(cells.n_cells, dtype=np.int64)
    perturbed = cells.perturbation[:, 0] > CONTROL
    time = np.nan_to_num(cells.numbers["time"], nan=-1.0)
    keys = list(zip(cells.panel, cells.prompts["cell_type"], time, strict=True))
    controls: dict[tuple[int, int, float], list[int]] = {}
    for cell in np.flatnonzero(~perturbed):
        controls.setdefault(keys[cell], []).append(int(cell))
    for cell in np.flatnonzero(perturbed):
        draw = np.random.default_rng([seed, step, int(cells.row[cell])])
        if keys[cell] in controls and draw.random() < share:
            chosen[cell] = draw.choice(controls[keys[cell]])
    return chosen


class Objective:
    """Gives the loss of a batch; holds the datasets' panels."""

    def __init__(
        self,
        panels_DG: dict[str, NDArray[np.bool_]],
        settings: TokenSettings,
        share: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.panels = {name: torch.from_numpy(panel).to(device) for name, panel in panels_DG.items()}
        self.settings = settings
        self.share = share
        self.seed = seed
        self.device = device

    def __call__(
        self,
        model: torch.nn.Module,
        plain: CellModel,
        batch: Cells,
        step: int | None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> tuple[Loss, int, int]:
        """Return the loss of one rank's share of a batch, its number of tokens and of cells.

        Controls are sought in the whole batch, so that a step is the same at any number of ranks.

        Args:
            model: The model as Accelerate wrapped it.
            plain: The same, unwrapped.
            batch: All cells of the step.
            step: The global step; None evaluates with the masks of step 0 and without matched controls.
            rank: This process.
            world: All processes; a rank takes every ``world``-th cell.
        """
        chosen = matched_controls(batch, self.share if step is not None else 0.0, self.seed, step or 0)
        mine = np.arange(rank, batch.n_cells, world, dtype=np.int64)
        cells = batch.take(mine)
        tokens = make_tokens(
            cells,
            plain.config.offsets,
            self.settings,
            chance=(self.seed, step or 0),
            seen=batch.take(chosen[mine]),
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
