"""This module turns ragged counts into padded tokens, on CPU or GPU alike, and decides what the model may see.

Chance is a hash of (seed, step, cell's row, feature), not the state of a generator: the same cell at the same step is
masked the same way on every machine and at every number of ranks. Imports only torch, numpy and the cells' form; where
numba is installed, ``train.kernels`` does the same faster for cells of one measurement on CPU.

Shape letters used in this module:
    C  cells      L  tokens of a cell, padded      N  non-zeros of all cells      M  measurements      T  targets
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.cells import NUMBERS, PROMPTS, Cells, Csr, Spans

try:
    from train import kernels
except ImportError:  # torch and numpy are enough
    kernels = None  # type: ignore[assignment]

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
    """What the encoder sees of a batch of cells; nothing that is hidden is in it.

    Attributes:
        feature_CL: int32, number over all measurements, in ascending order; 0 where padded.
        value_CL: float32, log1p of counts per ``SCALE``; 0 where padded.
        firsts: Number of each measurement's first feature, in ascending order.
        log_depth_CM: log1p of the cell's counts in a measurement; 0 where it is not shown.
        measured_CM: Is the measurement shown?
        prompt_CF: Codes in the order of ``PROMPTS``; 0 is "not said".
        perturbation_CT: Codes of the targets hit together; 0 fills up.
        number_CF: In the order of ``NUMBERS``; NaN is "not said".
        row_C: The number that stays with the cell.
    """

    feature_CL: Tensor
    value_CL: Tensor
    firsts: tuple[int, ...]
    log_depth_CM: Tensor
    measured_CM: Tensor
    prompt_CF: Tensor
    perturbation_CT: Tensor
    number_CF: Tensor
    row_C: Tensor

    @property
    def valid_CL(self) -> Tensor:  # noqa: N802
        """Which tokens are there."""
        return self.feature_CL > 0

    @property
    def measurement_CL(self) -> Tensor:  # noqa: N802
        """The measurement of each token, by its number; 0 where padded."""
        if len(self.firsts) == 1:
            return torch.zeros_like(self.feature_CL)
        borders = torch.tensor(self.firsts[1:], dtype=self.feature_CL.dtype, device=self.feature_CL.device)
        return torch.bucketize(self.feature_CL, borders, right=True, out_int32=True)


def _mixed(key: Tensor, salts: Sequence[int]) -> Tensor:
    """Hash integers [C] with each salt to 64 bits [S, C]."""
    offsets = [(salt * 0xC2B2AE3D27D4EB4F + 2**63) % 2**64 - 2**63 for salt in salts]
    mixed = key * -7046029254386353131 + torch.tensor(offsets, device=key.device)[:, None]
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def uniform(key: Tensor, *salts: int) -> Tensor:
    """Hash integers [C] with each salt to numbers in [0, 1), [S, C]: the same on every device.

    The finaliser is that of SplitMix (Steele, Lea and Flood 2014).
    """
    return _unit(_mixed(key, salts))


def _unit(mixed: Tensor) -> Tensor:
    return ((mixed >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


def _high(mixed: Tensor) -> Tensor:
    return (mixed >> 32) & 0xFFFFFFFF


def draws(feature_N: Tensor, key_N: Tensor) -> Tensor:
    """Hash features' numbers with their cells' keys to integers below 2**32 (Wellons 2018, lowbias32)."""
    low = 0xFFFFFFFF
    x = ((feature_N * 0x9E3779B1) & low) ^ key_N
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


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
    count_N = torch.from_numpy(part.counts).to(device).float()
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
    if kernels is not None and device.type == "cpu" and len(seen.counts) == 1 and len(offsets) == 1:
        ((name, part),) = seen.counts.items()
        if part.counts.dtype.kind == "u":
            everything = np.arange(cells.n_cells)
            return fast_tokens([(part.spans, everything)], seen.measured[name], cells, offsets[name], settings, chance)
    row_C = torch.from_numpy(cells.row).to(device)
    parts, depths, measured = [], [], []
    for number, name in enumerate(offsets):
        if name not in seen.counts:
            depths.append(torch.zeros(cells.n_cells, device=device))
            measured.append(torch.zeros(cells.n_cells, dtype=torch.bool, device=device))
            continue
        found = _nonzeros(seen.counts[name], device)
        shown_C = torch.from_numpy(seen.measured[name]).to(device)
        feature_N = found.feature_N + offsets[name]
        # log1p(count * (scale / depth)), in single precision, step by step as the kernel does it
        share_N = found.count_N * (SCALE / found.depth_C.clamp(min=1))[found.cell_N]
        visible_N, priority_N = torch.ones_like(share_N, dtype=torch.bool), share_N.double()
        if chance is not None:
            mixed = _mixed(row_C, _salts(chance, (2 * number, 2 * number + 1, KEY)))
            shown_C = shown_C & (_unit(mixed[0]) >= settings.drop_measurement)
            draw_N = draws(feature_N, _high(mixed[2])[found.cell_N])
            hidden_C = _hidden(_unit(mixed[1]), settings)
            visible_N = draw_N >= hidden_C.long()[found.cell_N]
            priority_N = draw_N.double()
        keep = torch.nonzero(visible_N & shown_C[found.cell_N]).squeeze(1)
        parts.append((found.cell_N[keep], feature_N[keep], torch.log1p(share_N[keep]), priority_N[keep]))
        depths.append(torch.where(shown_C, torch.log1p(found.depth_C), 0.0))
        measured.append(shown_C)
    return Tokens(
        *_padded(parts, cells.n_cells, settings.budget, device),
        tuple(offsets.values()),
        torch.stack(depths, dim=1),
        torch.stack(measured, dim=1),
        *_prompts(cells, row_C, chance, settings, device),
        row_C=row_C,
    )


KEY, PROMPT, PERTURBATION, NUMBER = 32, 40, 60, 61
"""What a cell's chances are for; below 32, two for each measurement: shown at all, share hidden."""


def _salts(chance: tuple[int, int], numbers: Sequence[int]) -> list[int]:
    return [(chance[0] * 1_000_003 + chance[1]) * 64 + number for number in numbers]


def _hidden(drawn: Any, settings: TokenSettings) -> Any:
    """Return the draw below which features are hidden, of cells with these uniform numbers."""
    low, high = settings.hide
    return ((low + (high - low) * drawn) * 2.0**32).clip(max=0xFFFFFFFF)


def fast_tokens(
    parts: Sequence[tuple[Spans, NDArray[np.int64]]],
    measured_C: NDArray[np.bool_],
    cells: Cells,
    offset: int,
    settings: TokenSettings,
    chance: tuple[int, int] | None,
    empty: Callable[[int, type[np.generic]], NDArray[Any]] = np.empty,
) -> Tokens:
    """Write cells of one measurement of whole counts as tokens on CPU; equal to :func:`make_tokens`.

    Args:
        parts: The cells' counts, in one or several buffers, and each cell's place in the batch.
        measured_C: Was the cell measured at all?
        cells: What is said of the cells; their ``counts`` are not looked at.
        offset: Number of the measurement's first feature.
        settings: Budget and chances.
        chance: As for :func:`make_tokens`.
        empty: Gives room for a number of values of a type.
    """
    row_C = torch.from_numpy(cells.row)
    shown_C, key_C = measured_C, np.zeros(cells.n_cells, np.uint32)
    hidden_C = key_C
    if chance is not None:
        mixed = _mixed(row_C, _salts(chance, (0, 1, KEY)))
        shown_C = shown_C & (_unit(mixed[0]).numpy() >= settings.drop_measurement)
        hidden_C = _hidden(_unit(mixed[1]).numpy(), settings).astype(np.uint32)
        key_C = _high(mixed[2]).numpy().astype(np.uint32)
    longest = max((int(spans.lengths.max(initial=0)) for spans, _ in parts), default=0)
    width = max(1, min(settings.budget, longest))
    feature_CL = empty(cells.n_cells * width, np.int32).reshape(cells.n_cells, width)
    value_CL = empty(cells.n_cells * width, np.float32).reshape(cells.n_cells, width)
    width_C, depth_C = np.zeros(cells.n_cells, np.int32), np.zeros(cells.n_cells, np.float32)
    for spans, place_C in parts:
        kernels.tokens_of_one(
            spans.starts,
            np.where(shown_C[place_C], spans.lengths, 0),
            spans.features,
            spans.counts,
            key_C[place_C],
            hidden_C[place_C],
            chance is not None,
            offset,
            SCALE,
            place_C,
            feature_CL,
            value_CL,
            width_C,
            depth_C,
        )
    widest = max(1, int(width_C.max(initial=0)))
    return Tokens(
        torch.from_numpy(feature_CL)[:, :widest],
        torch.from_numpy(value_CL)[:, :widest],
        (offset,),
        torch.from_numpy(np.log1p(depth_C))[:, None],
        torch.from_numpy(shown_C)[:, None],
        *_prompts(cells, row_C, chance, settings, torch.device("cpu")),
        row_C=row_C,
    )


def _padded(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], n_cells: int, budget: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keep each cell's ``budget`` tokens of highest priority, ties to the earlier feature; in the order of features."""
    cell, feature, value, priority = (torch.cat([part[number] for part in parts]) for number in range(4))
    order = torch.argsort(feature, stable=True)
    order = order[torch.argsort(priority[order], descending=True, stable=True)]
    order = order[torch.argsort(cell[order], stable=True)]
    length = torch.bincount(cell, minlength=n_cells)
    start = torch.cumsum(length, 0) - length
    place = torch.arange(len(order), device=device) - torch.repeat_interleave(start, length)
    order = order[place < budget]
    order = order[torch.argsort(feature[order], stable=True)]
    order = order[torch.argsort(cell[order], stable=True)]
    kept = length.clamp(max=budget)
    start = torch.cumsum(kept, 0) - kept
    place = torch.arange(len(order), device=device) - torch.repeat_interleave(start, kept)
    shape = (n_cells, max(1, int(kept.max()) if n_cells else 1))
    features = torch.zeros(shape, dtype=torch.int32, device=device)
    values = torch.zeros(shape, device=device)
    features[cell[order], place] = feature[order].to(torch.int32)
    values[cell[order], place] = value[order]
    return features, values


def _prompts(
    cells: Cells, row_C: Tensor, chance: tuple[int, int] | None, settings: TokenSettings, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.from_numpy(np.stack([cells.prompts[name] for name in PROMPTS], axis=1)).to(device)
    targets = torch.from_numpy(cells.perturbation).to(device)
    numbers = torch.from_numpy(np.stack([cells.numbers[name] for name in NUMBERS], axis=1)).to(device)
    if chance is None:
        return codes, targets, numbers
    salts = (*range(PROMPT, PROMPT + len(PROMPTS)), PERTURBATION, NUMBER)
    drawn_SC = uniform(row_C, *_salts(chance, salts))
    rates = [settings.drop_cell_type if name == "cell_type" else settings.drop_prompt for name in PROMPTS]
    kept_SC = drawn_SC >= torch.tensor([*rates, settings.drop_prompt, settings.drop_prompt], device=device)[:, None]
    numbers = torch.where(kept_SC[-1, :, None], numbers, torch.nan)
    return codes * kept_SC[: len(PROMPTS)].T, targets * kept_SC[-2, :, None], numbers
