"""This module turns ragged counts into padded tokens, on CPU or GPU alike, and decides what the model may see.

Chance is a hash of (seed, step, cell's row, feature), not the state of a generator: the same cell at the same step is
masked the same way on every machine and at every number of ranks. Imports only torch, numpy and the cells' form.

Shape letters used in this module:
    C  cells      L  tokens of a cell, padded      N  non-zeros of all cells      M  measurements      T  targets
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.cells import NUMBERS, PROMPTS, Cells, Csr

SCALE = 1e4
"""Values are log1p of counts per this many of the cell's counts in the measurement."""


@dataclass(frozen=True)
class TokenSettings:
    """How cells become tokens.

    Attributes:
        budget: Tokens of a cell at most, over all measurements.
        hide: Range of the share of non-zeros that is hidden in training, drawn per cell and measurement.
        drop_measurement: Chance that a whole measurement of a cell is hidden in training.
        drop_prompt: Chance that a prompt is not said in training.
        drop_cell_type: The same for the cell type, which must not become a crutch.
    """

    budget: int = 128
    hide: tuple[float, float] = (0.3, 0.9)
    drop_measurement: float = 0.2
    drop_prompt: float = 0.15
    drop_cell_type: float = 0.5


@dataclass(frozen=True)
class Tokens:
    """What the encoder sees of a batch of cells; nothing that is hidden is in it."""

    feature_CL: Tensor  # number over all measurements; 0 where padded
    measurement_CL: Tensor
    value_CL: Tensor
    valid_CL: Tensor
    log_depth_CM: Tensor
    measured_CM: Tensor
    prompt_CF: Tensor  # in the order of PROMPTS
    perturbation_CT: Tensor
    number_CF: Tensor  # in the order of NUMBERS; NaN is "not said"


def uniform(key: Tensor, salt: int) -> Tensor:
    """Hash integers to numbers in [0, 1): the same on every device."""
    offset = (salt * 0xC2B2AE3D27D4EB4F + 2**63) % 2**64 - 2**63
    mixed = key * -7046029254386353131 + offset
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return ((mixed >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


@dataclass(frozen=True)
class _Nonzeros:
    """The non-zeros of one measurement of all cells, one line each."""

    cell_N: Tensor
    feature_N: Tensor
    count_N: Tensor
    depth_C: Tensor


def _nonzeros(part: Csr, device: torch.device) -> _Nonzeros:
    length = torch.from_numpy(np.diff(part.indptr)).to(device)
    cell_N = torch.repeat_interleave(torch.arange(len(length), device=device), length)
    count_N = torch.from_numpy(part.counts).to(device)
    depth_C = torch.zeros(len(length), device=device).index_add_(0, cell_N, count_N)
    return _Nonzeros(cell_N, torch.from_numpy(part.features).to(device).long(), count_N, depth_C)


def dense_counts(part: Csr, n_features: int, device: torch.device) -> Tensor:
    """Return counts_CG of one measurement."""
    found = _nonzeros(part, device)
    counts = torch.zeros(len(found.depth_C), n_features, device=device)
    counts[found.cell_N, found.feature_N] = found.count_N
    return counts


def make_tokens(
    cells: Cells,
    offsets: dict[str, int],
    settings: TokenSettings,
    *,
    chance: tuple[int, int] | None = None,
    seen: Cells | None = None,
    device: torch.device | None = None,
) -> Tokens:
    """Write cells as tokens.

    Args:
        cells: The cells; what is said of them (prompts) comes from here.
        offsets: Measurement to the number of its first feature among all features (from 1; 0 is padding).
        settings: Budget and chances.
        chance: (seed, step) of training: features are hidden, measurements and prompts dropped, and the budget is
            filled at random. None is inference: nothing is hidden, the strongest values fill the budget, and no chance
            is in the answer.
        seen: Cells whose counts are seen in place of ``cells``' own (matched controls), in the same order.
        device: Where to work; CPU when left out.
    """
    device = device or torch.device("cpu")
    seen = seen or cells
    row_C = torch.from_numpy(cells.row).to(device)
    salt = 0 if chance is None else (chance[0] * 1_000_003 + chance[1]) * 64
    parts, depths, measured = [], [], []
    for number, name in enumerate(offsets):
        if name not in seen.counts:
            depths.append(torch.zeros(cells.n_cells, device=device))
            measured.append(torch.zeros(cells.n_cells, dtype=torch.bool, device=device))
            continue
        found = _nonzeros(seen.counts[name], device)
        shown_C = torch.from_numpy(seen.measured[name]).to(device)
        visible_N = torch.ones(len(found.cell_N), dtype=torch.bool, device=device)
        value_N = torch.log1p(found.count_N * (SCALE / found.depth_C.clamp(min=1))[found.cell_N])
        priority_N = value_N.double()
        if chance is not None:
            shown_C = shown_C & (uniform(row_C, salt + 2 * number) >= settings.drop_measurement)
            low, high = settings.hide
            rate_C = low + (high - low) * uniform(row_C, salt + 2 * number + 1)
            draw_N = uniform(row_C[found.cell_N] * 2_097_143 + found.feature_N + offsets[name], salt + 32)
            visible_N = draw_N >= rate_C[found.cell_N]
            priority_N = draw_N
        keep = torch.nonzero(visible_N & shown_C[found.cell_N]).squeeze(1)
        parts.append((found.cell_N, found.feature_N + offsets[name], number, value_N, priority_N, keep))
        depths.append(torch.where(shown_C, torch.log1p(found.depth_C), 0.0))
        measured.append(shown_C)
    prompts_CF, targets_CT, numbers_CF = _prompts(cells, row_C, salt if chance else None, settings, device)
    return Tokens(
        *_padded(parts, cells.n_cells, settings.budget, device),
        log_depth_CM=torch.stack(depths, dim=1),
        measured_CM=torch.stack(measured, dim=1),
        prompt_CF=prompts_CF,
        perturbation_CT=targets_CT,
        number_CF=numbers_CF,
    )


def _padded(
    parts: list[tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor]], n_cells: int, budget: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep each cell's ``budget`` tokens of highest priority; ties go to the earlier feature."""
    cell = torch.cat([part[0][part[5]] for part in parts])
    feature = torch.cat([part[1][part[5]] for part in parts])
    measurement = torch.cat([torch.full((len(part[5]),), part[2], device=device) for part in parts])
    value = torch.cat([part[3][part[5]] for part in parts])
    priority = torch.cat([part[4][part[5]] for part in parts])
    order = torch.argsort(feature, stable=True)
    order = order[torch.argsort(priority[order], descending=True, stable=True)]
    order = order[torch.argsort(cell[order], stable=True)]
    length = torch.bincount(cell, minlength=n_cells)
    start = torch.cumsum(length, 0) - length
    place = torch.arange(len(order), device=device) - torch.repeat_interleave(start, length)
    order = order[place < budget]
    place = place[place < budget]
    width = max(1, int(length.clamp(max=budget).max()) if n_cells else 1)
    shape = (n_cells, width)
    out = (
        torch.zeros(shape, dtype=torch.long, device=device),
        torch.zeros(shape, dtype=torch.long, device=device),
        torch.zeros(shape, device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
    )
    for table, values in zip(out, (feature, measurement, value, torch.ones_like(cell, dtype=torch.bool)), strict=True):
        table[cell[order], place] = values[order]
    return out


def _prompts(
    cells: Cells, row_C: Tensor, salt: int | None, settings: TokenSettings, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.stack([torch.from_numpy(cells.prompts[name]).to(device).long() for name in PROMPTS], dim=1)
    targets = torch.from_numpy(cells.perturbation).to(device).long()
    numbers = torch.stack([torch.from_numpy(cells.numbers[name]).to(device) for name in NUMBERS], dim=1)
    if salt is None:
        return codes, targets, numbers
    for field, name in enumerate(PROMPTS):
        rate = settings.drop_cell_type if name == "cell_type" else settings.drop_prompt
        codes[:, field] *= uniform(row_C, salt + 40 + field) >= rate
    targets = targets * (uniform(row_C, salt + 60) >= settings.drop_prompt)[:, None]
    numbers = torch.where((uniform(row_C, salt + 61) >= settings.drop_prompt)[:, None], numbers, torch.nan)
    return codes, targets, numbers
