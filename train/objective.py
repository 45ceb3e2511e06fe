"""This module is the training objective: what of a cell is seen, what is asked for, and at what cost.

Shape letters used in this module:
    C  cells      D  datasets      G  features of a measurement      L  tokens      Q  queries
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.arithmetic import Seen, seen_in
from train.asked import TASKS, Asked
from train.attention import Segments
from train.cells import CONTROL, PROMPTS, Cells, Csr
from train.likelihood import COVERAGE, Targets, cost, mean_cost, outputs
from train.model import CellModel, Queries
from train.niche import Company
from train.tokens import (
    Tokens,
    TokenSettings,
    chance_salts,
    dense_counts,
    drawn,
    draws,
    keys,
    make_tokens,
    tally,
    units,
)

ASK, UNKNOWN, QUERY, ZEROS = 52, 59, 62, 63
"""What a cell's chances are for, beside those of its tokens."""
TYPES = 0.1
"""What a nat of a cell's type weighs, beside a nat of a feature."""
UNKNOWN_SHARE = 0.05
"""Share of features that a step takes for unknown."""


@dataclass(frozen=True)
class Loss:
    """Sums over (cell, measurement) pairs of mean negative log likelihoods per known feature, in nats.

    Attributes:
        total: What is minimised.
        rebuilt: Of whole cells: over all features that were measured.
        asked: Of the features that were asked for, half of them hidden and found, with the query decoder's correction.
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


@dataclass(frozen=True)
class Batch:
    """A rank's cells of a step, on the device.

    Attributes:
        tokens: What is seen.
        targets: Measurement to what predictions are compared with.
        chosen: Measurement to cell_Q and feature_Q of what is asked for, in the measurement's own order.
        queries: The same of all measurements, cell by cell.
        order_Q: Where each of the queries stands in the measurements' order.
        asked: What is asked of each cell.
        company: Which cells belong together.
        type_C: Codes of the cells' types.
        unknown_F: Which features are taken for unknown.
        seen: How much of them there is: tokens that are no padding, queries, pairs that read each other.
    """

    tokens: Tokens
    targets: dict[str, Targets]
    chosen: dict[str, tuple[Tensor, Tensor]]
    queries: Queries
    order_Q: Tensor
    asked: Asked
    company: Company | None
    type_C: Tensor
    unknown_F: Tensor | None
    seen: Seen


class Objective:
    """Gives the loss of a batch; holds the datasets' panels."""

    def __init__(
        self,
        panels_DG: dict[str, NDArray[np.bool_]],
        settings: TokenSettings,
        seed: int,
        device: torch.device,
        queries: int = 16,
        covered: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        """Say how.

        Args:
            panels_DG: Measurement to which dataset measures which feature.
            settings: How cells become tokens.
            seed: Decides what is hidden and asked for.
            device: Where to work.
            queries: Features of a cell and measurement that are asked for at most.
            covered: Measurement of fractions to the place_G of its features in the one that holds their coverage; -1
                where there is none, which counts as one read.
        """
        self.panels = {name: torch.from_numpy(panel).to(device) for name, panel in panels_DG.items()}
        self.settings = settings
        self.seed = seed
        self.device = device
        self.queries = queries
        self.covered = {name: torch.from_numpy(place_G).to(device) for name, place_G in (covered or {}).items()}

    def __call__(
        self,
        model: torch.nn.Module,
        plain: CellModel,
        cells: Cells,
        step: int | None,
    ) -> tuple[Loss, int, int]:
        """Return the loss of one rank's share of a batch, its number of tokens and of cells.

        Args:
            model: The model as it is wrapped for several processes.
            plain: The same, unwrapped.
            cells: The rank's cells of the step, with the matched controls that stand in for some of them.
            step: The global step; None evaluates with the masks of step 0.
        """
        batch = self.prepare(plain, cells, step)
        return self.loss(model, plain, batch), int(batch.seen.tokens), cells.n_cells

    def prepare(self, plain: CellModel, cells: Cells, step: int | None) -> Batch:
        """Bring a rank's cells of a step onto the device: tokens, what they are compared with, what is asked."""
        chance = (self.seed, step or 0)
        seen = seen_cells(cells)
        tokens = make_tokens(cells, plain.config.offsets, self.settings, chance=chance, seen=seen, device=self.device)
        targets = self.targets(cells, plain)
        itself_C = np.ones(cells.n_cells, bool) if cells.controls is None else cells.controls.place_CS[:, 0] < 0
        chosen = {name: self._ask(name, cells, itself_C, tokens, of, plain, chance) for name, of in targets.items()}
        queries, order_Q = _together(chosen, plain.config.offsets, cells.n_cells)
        return Batch(
            tokens,
            targets,
            chosen,
            queries,
            order_Q,
            self._asked(cells, itself_C, tokens, targets, chance),
            company_of(cells, self.device) if plain.niche is not None and cells.set_C is not None else None,
            torch.from_numpy(cells.prompts["cell_type"]).to(self.device).long(),
            None if step is None else self._unknown(plain, chance),
            seen_in(plain.config, tokens, queries),
        )

    def loss(self, model: torch.nn.Module, plain: CellModel, batch: Batch) -> Loss:
        """Return the loss of a batch that is on the device."""
        answer = model(batch.tokens, batch.queries, batch.unknown_F, batch.asked, batch.company)
        correction = torch.empty_like(answer.correction_Q).index_copy(0, batch.order_Q, answer.correction_Q)
        loss = self._loss(plain, answer.logits, correction, batch.targets, batch.chosen)
        if answer.log_type_CY is not None:
            loss = self._with_types(loss, plain, answer.log_type_CY, batch)
        return loss

    def _asked(
        self,
        cells: Cells,
        itself_C: NDArray[np.bool_],
        tokens: Tokens,
        targets: dict[str, Targets],
        chance: tuple[int, int],
    ) -> Asked:
        """Say what is asked of each cell: what it is that is hidden; each part is dropped as other prompts are."""
        itself = torch.from_numpy(itself_C).to(self.device)
        hit = torch.from_numpy((cells.perturbation > CONTROL).any(1)).to(self.device)
        has_CM = torch.stack([of.known.any(1) for of in targets.values()], dim=1)
        hidden_CM = has_CM & ~tokens.measured_CM
        code = {task: torch.tensor(number, device=self.device) for number, task in enumerate(TASKS)}
        whole = torch.where(hidden_CM.any(1), code["translate"], code["reconstruct"])
        own = torch.where(tokens.measured_CM.any(1), whole, code["generate"])
        typed = torch.from_numpy(cells.prompts["cell_type"] > 0).to(self.device)
        untold = typed & (tokens.prompt_CF[:, PROMPTS.index("cell_type")] == 0) & tokens.measured_CM.any(1)
        told_SC = drawn(cells.row, chance_salts(chance, (ASK + 4,)))
        own = torch.where(untold & torch.from_numpy(units(told_SC)[0] < 0.5).to(self.device), code["annotate"], own)
        task_C = torch.where(itself, own, torch.where(hit, code["perturb"], code["forecast"]))
        target_CM = torch.where((task_C == code["translate"])[:, None], hidden_CM, has_CM)
        depth_CM = torch.stack(
            [torch.where(of.log_depth[:, 0] > 0, of.log_depth[:, 0].exp(), 0) for of in targets.values()], 1
        )
        kept_SC = units(drawn(cells.row, chance_salts(chance, range(ASK, ASK + 4)))) >= self.settings.drop_prompt
        kept = torch.from_numpy(kept_SC).to(self.device)
        return Asked(
            task_C * kept[0],
            target_CM & kept[1][:, None],
            torch.log1p(depth_CM) * (target_CM & kept[2][:, None]),
            torch.where(kept[3], torch.from_numpy(_elapsed(cells)).to(self.device), torch.nan),
        )

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
        targets: Targets,
        model: CellModel,
        chance: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Choose features to ask for: of each cell, half hidden and found, half known not to be there.

        What is chosen is a hash of (seed, step, cell's row, feature), the same at every number of ranks; return cell_Q
        and feature_Q.
        """
        each, first, n_features = max(1, self.queries // 2), model.config.offsets[name], targets.known.shape[1]
        key_C, zero_key_C = torch.from_numpy(keys(drawn(cells.row, chance_salts(chance, (QUERY, ZEROS))))).to(
            self.device
        )
        number_CL = tokens.feature_CL.long() - first
        shown_CL = (number_CL >= 0) & (number_CL < n_features) & torch.from_numpy(itself_C).to(self.device)[:, None]
        hidden_CG = torch.ones(cells.n_cells, n_features + 1, dtype=torch.bool, device=self.device)
        hidden_CG.scatter_(1, torch.where(shown_CL, number_CL, n_features), False)
        cell_N, feature_N = torch.nonzero(targets.found & targets.known & hidden_CG[:, :-1], as_tuple=True)
        order_N = torch.argsort((cell_N << 32) | draws(feature_N + first, key_C[cell_N]))
        cell_N, feature_N = cell_N[order_N], feature_N[order_N]
        size_C = tally(cell_N, cells.n_cells)
        place_N = torch.arange(len(cell_N), device=self.device) - (torch.cumsum(size_C, 0) - size_C)[cell_N]
        kept_K = torch.nonzero(place_N < each).squeeze(1)
        turn = torch.arange(each, device=self.device)
        zero_CE = (draws(turn[None, :], zero_key_C[:, None]) * n_features) >> 32
        zero_C = torch.arange(cells.n_cells, device=self.device)[:, None].expand_as(zero_CE)
        empty_CE = targets.known[zero_C, zero_CE] & ~targets.found[zero_C, zero_CE]
        zero_K = torch.nonzero(empty_CE.flatten()).squeeze(1)
        return (
            torch.cat([cell_N[kept_K], zero_C.flatten()[zero_K]]),
            torch.cat([feature_N[kept_K], zero_CE.flatten()[zero_K]]),
        )

    def _loss(
        self,
        model: CellModel,
        logits: dict[str, Tensor],
        correction_Q: Tensor,
        targets: dict[str, Targets],
        asked: dict[str, tuple[Tensor, Tensor]],
    ) -> Loss:
        """Compare predictions with the cells' own values, in every measurement that a cell has.

        The correction learns on top of whole cells' rates, which it does not move.
        """
        rebuilt = asked_total = pairs = torch.zeros((), device=self.device)
        start = 0
        for name, of in targets.items():
            has_C = of.known.any(1)
            likelihood, dispersion_G = model.config.likelihood_of(name), model.log_dispersion(name)
            output_CG = outputs(likelihood, logits[name], of.known | ~has_C[:, None])
            nll_C = mean_cost(likelihood, of, output_CG, dispersion_G)
            rebuilt = rebuilt + nll_C.sum() + 0.0 * logits[name].sum()
            pairs = pairs + has_C.sum()
            cell_Q, feature_Q = asked[name]
            output_Q = output_CG.detach()[cell_Q, feature_Q] + correction_Q[start : start + len(cell_Q)]
            dispersion_Q = None if dispersion_G is None else dispersion_G.detach()[feature_Q]
            cost_Q = cost(likelihood, of.at(cell_Q, feature_Q), output_Q, dispersion_Q)
            size_C = tally(cell_Q, len(has_C)).clamp(min=1)
            asked_total = asked_total + (cost_Q / size_C[cell_Q]).sum()
            start += len(cell_Q)
        return Loss(rebuilt + asked_total, rebuilt, asked_total, pairs)

    def _with_types(self, loss: Loss, model: CellModel, log_type_CY: Tensor, batch: Batch) -> Loss:
        """Add the cost of telling types: of cells that are labelled, and to whose type no prompt gave away."""
        assert model.prototypes is not None
        untold_C = batch.tokens.prompt_CF[:, PROMPTS.index("cell_type")] == 0
        asked_K = torch.nonzero((batch.type_C > 0) & untold_C).squeeze(1)
        told = model.prototypes.cost(log_type_CY[asked_K], batch.type_C[asked_K]).sum()
        return replace(loss, total=loss.total + TYPES * (told + 0.0 * log_type_CY[:, 1:].sum()))

    def targets(self, cells: Cells, model: CellModel) -> dict[str, Targets]:
        """Return what each measurement's predictions are compared with; of an unmeasured cell nothing is known."""
        dataset_C = torch.from_numpy(cells.panel).to(self.device).long()
        found = {}
        for name, n_features in model.config.n_features.items():
            measured_C1 = torch.from_numpy(cells.measured[name]).to(self.device)[:, None]
            panel_CG = self.panels[name][dataset_C] & measured_C1
            values_CG = dense_counts(cells.counts[name], n_features, self.device)
            if name in model.config.levels:
                found[name] = self._levels(name, cells, values_CG, panel_CG, model)
            else:
                log_depth_C1 = torch.log(values_CG.sum(1, keepdim=True).clamp(min=1))
                found[name] = Targets(values_CG, panel_CG, values_CG > 0, log_depth_C1)
        return found

    def _levels(self, name: str, cells: Cells, values_CG: Tensor, panel_CG: Tensor, model: CellModel) -> Targets:
        """Return standardised levels; what a dataset looks for and a cell lacks is at the limit. Or fractions."""
        own = cells.counts[name]
        ones = Csr(own.indptr, own.features, np.ones(len(own.counts), np.uint8))
        found_CG = dense_counts(ones, values_CG.shape[1], self.device) > 0
        nought_C1 = torch.zeros_like(values_CG[:, :1])
        if model.config.likelihood_of(name) != "gaussian":
            coverage, covered_CG = COVERAGE.get(name, ""), None
            if coverage in cells.counts and name in self.covered:
                place_G = self.covered[name]
                reads_CH = dense_counts(cells.counts[coverage], self.panels[coverage].shape[1], self.device)
                covered_CG = torch.where(place_G >= 0, reads_CH[:, place_G.clamp(min=0)], 1.0).clamp(min=1.0)
            return Targets(values_CG, panel_CG & found_CG, found_CG, nought_C1, covered_CG)
        assert model.levels is not None
        first = model.config.offsets[name]
        number_G = torch.arange(first, first + values_CG.shape[1], device=self.device)
        values_CG = torch.where(found_CG, model.levels(values_CG, number_G), model.levels.limit_F[number_G])
        return Targets(values_CG, panel_CG, found_CG, nought_C1)


def company_of(cells: Cells, device: torch.device) -> Company:
    """Return which cells belong together, of cells that come in sets."""
    assert cells.set_C is not None
    nowhere_CX = np.full((cells.n_cells, 2), np.nan, np.float32)
    place_CX = nowhere_CX if cells.place_CX is None else cells.place_CX
    return Company(torch.from_numpy(cells.set_C).to(device), torch.from_numpy(place_CX).to(device))


def _elapsed(cells: Cells) -> NDArray[np.float32]:
    """Return how much later each cell is than what is seen in its place; NaN where a time is not said."""
    time_C = cells.numbers["time"]
    if cells.controls is None:
        return time_C - time_C
    place_C = cells.controls.place_CS[:, 0]
    seen_C = np.concatenate([cells.controls.cells.numbers["time"], [np.float32(0)]])[place_C]
    return np.where(place_C >= 0, time_C - seen_C, time_C - time_C).astype(np.float32)


def _together(asked: dict[str, tuple[Tensor, Tensor]], offsets: dict[str, int], n_cells: int) -> tuple[Queries, Tensor]:
    """Return the queries of all measurements cell by cell, and where each of them stood before."""
    cell_Q = torch.cat([cell for cell, _ in asked.values()])
    feature_Q = torch.cat([feature + offsets[name] for name, (_, feature) in asked.items()])
    order_Q = torch.argsort(cell_Q, stable=True)
    return Queries(feature_Q[order_Q], Segments.of(tally(cell_Q, n_cells))), order_Q
