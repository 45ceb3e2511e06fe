"""This module is the training objective: what of a cell is seen, what is asked for, and at what cost.

Shape letters used in this module:
    C  cells      D  datasets      G  features of a measurement      L  tokens      Q  queries
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.attention import Segments
from train.cells import Cells, Csr
from train.likelihood import count_cost, log_rates, negative_log_likelihood
from train.model import CellModel, Queries
from train.tokens import Tokens, TokenSettings, chance_salts, dense_counts, drawn, draws, keys, make_tokens

UNKNOWN, QUERY, ZEROS = 59, 62, 63
"""What a cell's chances are for, beside those of its tokens."""
UNKNOWN_SHARE = 0.05
"""Share of features that a step takes for unknown."""


@dataclass(frozen=True)
class Loss:
    """Sums over (cell, measurement) pairs of mean negative log likelihoods per feature, in nats.

    Attributes:
        total: What is minimised.
        rebuilt: Of whole cells: over all features that were measured.
        asked: Of the features that were asked for, half of them hidden non-zeros, with the query decoder's correction.
        pairs: How many pairs they sum over.
    """

    total: Tensor
    rebuilt: Tensor
    asked: Tensor
    pairs: Tensor


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
        queries: int = 16,
    ) -> None:
        """Say how.

        Args:
            panels_DG: Measurement to which dataset measures which feature.
            settings: How cells become tokens.
            seed: Decides what is hidden and asked for.
            device: Where to work.
            queries: Features of a cell and measurement that are asked for at most.
        """
        self.panels = {name: torch.from_numpy(panel).to(device) for name, panel in panels_DG.items()}
        self.settings = settings
        self.seed = seed
        self.device = device
        self.queries = queries

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
        chance = (self.seed, step or 0)
        seen = seen_cells(cells)
        tokens = make_tokens(cells, plain.config.offsets, self.settings, chance=chance, seen=seen, device=self.device)
        counts, panels = self.targets(cells, plain)
        itself_C = np.ones(cells.n_cells, bool) if cells.controls is None else cells.controls.place_CS[:, 0] < 0
        asked = {
            name: self._ask(name, cells, itself_C, tokens, counts[name], panels[name], plain, chance) for name in panels
        }
        queries, order_Q = _together(asked, plain.config.offsets, cells.n_cells)
        _, logits, correction_Q = model(tokens, queries, None if step is None else self._unknown(plain, chance))
        correction = torch.empty_like(correction_Q).index_copy(0, order_Q, correction_Q)
        loss = self._loss(plain, logits, correction, counts, panels, asked)
        return loss, int(tokens.valid_CL.sum()), cells.n_cells

    def _unknown(self, model: CellModel, chance: tuple[int, int]) -> Tensor:
        """Return which features this step takes for unknown: a hash of (seed, step, feature), as on every rank."""
        numbers_F = torch.arange(1 + sum(model.config.n_features.values()), device=self.device)
        key = int(keys(drawn(np.zeros(1, np.int64), chance_salts(chance, (UNKNOWN,))))[0, 0])
        return draws(numbers_F, torch.full_like(numbers_F, key)) < UNKNOWN_SHARE * 2**32

    def _ask(
        self,
        name: str,
        cells: Cells,
        itself_C: NDArray[np.bool_],
        tokens: Tokens,
        counts_CG: Tensor,
        panel_CG: Tensor,
        model: CellModel,
        chance: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Choose features to ask for: of each cell, half hidden non-zeros, half zeros; return cell_Q and feature_Q.

        What is chosen is a hash of (seed, step, cell's row, feature): the same at every number of ranks.
        """
        each, first, n_features = max(1, self.queries // 2), model.config.offsets[name], counts_CG.shape[1]
        key_C, zero_key_C = torch.from_numpy(keys(drawn(cells.row, chance_salts(chance, (QUERY, ZEROS))))).to(
            self.device
        )
        number_CL = tokens.feature_CL.long() - first
        shown_CL = (number_CL >= 0) & (number_CL < n_features) & torch.from_numpy(itself_C).to(self.device)[:, None]
        visible_CG = torch.zeros_like(panel_CG)
        visible_CG[torch.nonzero(shown_CL)[:, 0], number_CL[shown_CL]] = True
        cell_N, feature_N = torch.nonzero((counts_CG > 0) & panel_CG & ~visible_CG, as_tuple=True)
        order_N = torch.argsort((cell_N << 32) | draws(feature_N + first, key_C[cell_N]))
        cell_N, feature_N = cell_N[order_N], feature_N[order_N]
        size_C = torch.bincount(cell_N, minlength=cells.n_cells)
        kept_N = torch.arange(len(cell_N), device=self.device) - (torch.cumsum(size_C, 0) - size_C)[cell_N] < each
        turn = torch.arange(each, device=self.device)
        zero_CE = (draws(turn[None, :], zero_key_C[:, None]) * n_features) >> 32
        zero_C = torch.arange(cells.n_cells, device=self.device)[:, None].expand_as(zero_CE)
        empty_CE = (counts_CG[zero_C, zero_CE] == 0) & panel_CG[zero_C, zero_CE]
        return (
            torch.cat([cell_N[kept_N], zero_C[empty_CE]]),
            torch.cat([feature_N[kept_N], zero_CE[empty_CE]]),
        )

    def _loss(
        self,
        model: CellModel,
        logits: dict[str, Tensor],
        correction_Q: Tensor,
        counts: dict[str, Tensor],
        panels: dict[str, Tensor],
        asked: dict[str, tuple[Tensor, Tensor]],
    ) -> Loss:
        """Compare predictions with the cells' own counts, in every measurement that a cell has.

        The correction learns on top of whole cells' rates, which it does not move.
        """
        rebuilt = asked_total = pairs = torch.zeros((), device=self.device)
        start = 0
        for name, panel_CG in panels.items():
            has_C = panel_CG.any(1)
            dispersion_G = model.log_dispersion(name)
            share_CG = log_rates(logits[name], panel_CG | ~has_C[:, None])
            nll_C = negative_log_likelihood(counts[name], share_CG, panel_CG, dispersion_G)
            rebuilt = rebuilt + nll_C[has_C].sum() + 0.0 * logits[name].sum()
            pairs = pairs + has_C.sum()
            cell_Q, feature_Q = asked[name]
            depth_C = counts[name].sum(1).clamp(min=1)
            correction = correction_Q[start : start + len(cell_Q)]
            log_mean_Q = torch.log(depth_C)[cell_Q] + share_CG.detach()[cell_Q, feature_Q] + correction
            dispersion_Q = None if dispersion_G is None else dispersion_G.detach()[feature_Q]
            cost_Q = count_cost(counts[name][cell_Q, feature_Q], log_mean_Q, dispersion_Q)
            size_C = torch.bincount(cell_Q, minlength=len(has_C)).clamp(min=1)
            asked_total = asked_total + (cost_Q / size_C[cell_Q]).sum()
            start += len(cell_Q)
        return Loss(rebuilt + asked_total, rebuilt, asked_total, pairs)

    def targets(self, cells: Cells, model: CellModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return counts_CG and panel_CG of every measurement; an unmeasured cell has an empty panel."""
        dataset_C = torch.from_numpy(cells.panel).to(self.device).long()
        counts, panels = {}, {}
        for name, n_features in model.config.n_features.items():
            measured_C1 = torch.from_numpy(cells.measured[name]).to(self.device)[:, None]
            counts[name] = dense_counts(cells.counts[name], n_features, self.device)
            panels[name] = self.panels[name][dataset_C] & measured_C1
        return counts, panels


def _together(asked: dict[str, tuple[Tensor, Tensor]], offsets: dict[str, int], n_cells: int) -> tuple[Queries, Tensor]:
    """Return the queries of all measurements cell by cell, and where each of them stood before."""
    cell_Q = torch.cat([cell for cell, _ in asked.values()])
    feature_Q = torch.cat([feature + offsets[name] for name, (_, feature) in asked.items()])
    order_Q = torch.argsort(cell_Q, stable=True)
    return Queries(feature_Q[order_Q], Segments.of(torch.bincount(cell_Q, minlength=n_cells))), order_Q
