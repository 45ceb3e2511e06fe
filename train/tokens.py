"""This module turns ragged counts into padded tokens, on CPU or GPU alike, and decides what the model may see.

Chance is a hash of (seed, step, cell's row, feature), not the state of a generator: the same cell at the same step is
masked the same way on every machine and at every number of ranks. Imports only torch, numpy and the cells' form; where
numba is installed, ``train.kernels`` does the same faster for whole counts on CPU.

Shape letters used in this module:
    C  cells      L  tokens of a cell, padded      N  non-zeros of all cells      M  measurements      T  targets
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.cells import NUMBERS, PROMPTS, Cells, Csr, Spans

try:
    from train import kernels
    from train.lanes import LANES
except ImportError:  # torch and numpy are enough
    kernels = None  # type: ignore[assignment]

CRUTCHES = ("cell_type", "perturbation_type")
Chance = tuple[int, int | NDArray[np.int64]]
"""Seed and step; a step for each cell where cells of several steps are together."""
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
        drop_cell_type: The same for the cell type and the kind of perturbation, which must not become crutches.
        values: "log1p": of counts per ``SCALE``. "bins": the quantile of a count among the cell's own counts, 1 to
            ``bins`` (after scGPT, Cui et al. 2024; ties share a bin). "rank": tokens from the highest to the lowest
            count, each divided by its feature's factor, and the value is the place, from 0; a budget keeps the highest
            (after Geneformer, Theodoris et al. 2023).
        bins: Bins of a cell.
        levels: Measurements whose values are levels, not counts: written as they are, zeros too. Where a budget chooses
            the strongest values, levels come first, and a hash decides among them.
    """

    budget: int = 128
    hide: tuple[float, float] = (0.3, 0.9)
    drop_measurement: float = 0.2
    drop_prompt: float = 0.15
    drop_cell_type: float = 0.5
    values: Literal["log1p", "bins", "rank"] = "log1p"
    bins: int = 51
    levels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.levels and self.values != "log1p":
            raise ValueError(f"values={self.values!r} are for counts; {', '.join(self.levels)} holds levels")
        if self.values not in ("log1p", "bins", "rank"):
            raise ValueError(f"values={self.values!r}: say log1p, bins or rank")
        if self.budget < 1 or self.bins < 1:
            raise ValueError(f"budget={self.budget}, bins={self.bins}: both are at least 1")
        least, most = self.hide
        if not 0 <= least <= most <= 1:
            raise ValueError(f"hide={self.hide}: the least and the greatest share, both from 0 to 1")
        for name in ("drop_measurement", "drop_prompt", "drop_cell_type"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a chance is from 0 to 1")

    @classmethod
    def whole(cls, budget: int = 128, **others: Any) -> TokenSettings:
        """Return settings that hide nothing and leave out nothing but what the budget does."""
        kept: dict[str, Any] = dict.fromkeys(("drop_measurement", "drop_prompt", "drop_cell_type"), 0.0)
        return cls(budget, **{"hide": (0.0, 0.0)} | kept | others)


@dataclass(frozen=True)
class Tokens:
    """What the encoder sees of a batch of cells; nothing that is hidden is in it.

    Attributes:
        feature_CL: int32, number over all measurements, in ascending order (ranked: by rank); 0 where padded.
        value_CL: float32, as the settings say, log1p of counts per ``SCALE`` by default; 0 where padded.
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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Tokens:
        """Return these tokens on a device; from pinned memory, without waiting, if ``non_blocking``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Tokens:
        """Return these tokens in memory from which a GPU copies by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def part(self, first: int, stop: int, width: int) -> Tokens:
        """Return cells ``first`` to ``stop`` (exclusive) with so many tokens each; nothing is copied."""
        some = self._each(lambda tensor: tensor[first:stop])
        return replace(some, feature_CL=some.feature_CL[:, :width], value_CL=some.value_CL[:, :width])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

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
        return torch.bucketize(self.feature_CL.contiguous(), borders, right=True, out_int32=True)


def drawn(key_C: NDArray[np.int64], salts: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash integers with each salt to 64 bits, [S, C] (the finaliser of SplitMix; Steele, Lea and Flood 2014).

    Salts are [S, 1], or [S, C] where cells have their own. It is done on the host, whatever the device: cells are few
    beside their counts, and so the draws are the same. ``store.hashes`` has the rounds too, and is not imported here.
    """
    mixed_SC = key_C.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salts * np.uint64(0xC2B2AE3D27D4EB4F)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_SC = (mixed_SC ^ (mixed_SC >> np.uint64(shift))) * np.uint64(factor)
    return mixed_SC ^ (mixed_SC >> np.uint64(31))


def units(mixed: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return hashes as numbers in [0, 1)."""
    numbers: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))
    return numbers


def keys(mixed: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return hashes as integers below 2**32: keys of :func:`draws`."""
    return (mixed >> np.uint64(32)).astype(np.int64)


def draws(feature_N: Tensor, key_N: Tensor) -> Tensor:
    """Hash features' numbers with their cells' keys to integers below 2**32 (Wellons 2018, lowbias32)."""
    low = 0xFFFFFFFF
    x = ((feature_N * 0x9E3779B1) & low) ^ key_N
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)


def tally(number_N: Tensor, n: int) -> Tensor:
    """Return how often each number below ``n`` occurs; unlike ``bincount``, a GPU need not be waited for."""
    return torch.zeros(n, dtype=torch.int64, device=number_N.device).index_add_(0, number_N, torch.ones_like(number_N))


def log1p(number: Tensor) -> Tensor:
    """Return log1p as float32, by way of double precision: in single, devices and libraries differ in the last bit."""
    return torch.log1p(number.double()).float()


@dataclass(frozen=True)
class _Nonzeros:
    """The non-zeros of one measurement of all cells, one line each."""

    cell_N: Tensor
    feature_N: Tensor
    count_N: Tensor
    depth_C: Tensor

    @property
    def share_N(self) -> Tensor:  # noqa: N802
        """Counts per ``SCALE`` of the cell's, step by step as the kernels do it."""
        # a number over a tensor would be its reciprocal, rounded once more
        return self.count_N * (torch.full_like(self.depth_C, SCALE) / self.depth_C.clamp(min=1))[self.cell_N]


def _nonzeros(part: Csr, device: torch.device) -> _Nonzeros:
    length = torch.from_numpy(np.diff(part.indptr)).to(device)
    cell_N = torch.repeat_interleave(torch.arange(len(length), device=device), length, output_size=len(part.counts))
    count_N = torch.from_numpy(part.counts).to(device).double()
    depth_C = torch.zeros(len(length), dtype=torch.float64, device=device).index_add_(0, cell_N, count_N)
    return _Nonzeros(cell_N, torch.from_numpy(part.features).to(device).long(), count_N.float(), depth_C.float())


def shares(part: Csr) -> Tensor:
    """Return counts per ``SCALE`` of each cell's counts in the measurement, share_N, float32."""
    return _nonzeros(part, torch.device("cpu")).share_N


def dense_counts(part: Csr, n_features: int, device: torch.device) -> Tensor:
    """Return counts_CG of one measurement."""
    found = _nonzeros(part, device)
    counts = torch.zeros(len(found.depth_C), n_features, device=device)
    counts[found.cell_N, found.feature_N] = found.count_N
    return counts


def first_numbers(n_features: dict[str, int]) -> dict[str, int]:
    """Number the features of all measurements on end, from 1 (0 is padding); return each measurement's first number."""
    ends = np.cumsum([1, *n_features.values()]).tolist()
    return dict(zip(n_features, ends, strict=False))


def make_tokens(
    cells: Cells,
    offsets: dict[str, int],
    settings: TokenSettings,
    *,
    chance: Chance | None = None,
    seen: Cells | None = None,
    device: torch.device | None = None,
    factors: Tensor | None = None,
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
        factors: For ranks: what each feature's counts are divided by, by its number (0 is padding), on the device; a
            feature's median count per ``SCALE``, say. Ones when left out.
    """
    device = device or torch.device("cpu")
    seen = seen or cells
    plain = settings.values == "log1p"
    whole = all(part.counts.dtype.kind == "u" for part in seen.counts.values())
    if kernels is not None and device.type == "cpu" and whole and not settings.levels:
        everything = np.arange(cells.n_cells)
        spans = {name: [(part.spans, everything)] for name, part in seen.counts.items()}
        return fast_tokens(spans, seen.measured, cells, offsets, settings, chance, factors=factors)[0]
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
        share_N = found.share_N
        visible_N, priority_N = torch.ones_like(share_N, dtype=torch.bool), share_N.double()
        if chance is not None:
            mixed = drawn(cells.row, chance_salts(chance, (2 * number, 2 * number + 1, KEY)))
            shown_C = shown_C & torch.from_numpy(units(mixed[0]) >= settings.drop_measurement).to(device)
            draw_N = draws(feature_N, torch.from_numpy(keys(mixed[2])).to(device)[found.cell_N])
            visible_N = draw_N >= torch.from_numpy(_hidden(units(mixed[1]), settings)).to(device)[found.cell_N]
            priority_N = draw_N.double()
        value_N = log1p(share_N) if plain else share_N
        if name in settings.levels:
            value_N, depth_C = found.count_N, torch.zeros_like(found.depth_C)
            priority_N = priority_N if chance is not None else 2.0**32 + draws(feature_N, feature_N).double()
        else:
            depth_C = log1p(found.depth_C)
        if settings.values == "bins":
            value_N = _bins(found, settings.bins)
        elif settings.values == "rank":
            priority_N = (share_N if factors is None else share_N / factors[feature_N]).double()
        keep = torch.nonzero(visible_N & shown_C[found.cell_N]).squeeze(1)
        parts.append((found.cell_N[keep], feature_N[keep], value_N[keep], priority_N[keep]))
        depths.append(torch.where(shown_C, depth_C, 0.0))
        measured.append(shown_C)
    return Tokens(
        *_padded(parts, cells.n_cells, settings, device),
        tuple(offsets.values()),
        torch.stack(depths, dim=1),
        torch.stack(measured, dim=1),
        *_prompts(cells, chance, settings, device),
        row_C=row_C,
    )


KEY, PROMPT, PERTURBATION, NUMBER = 32, 40, 60, 61
"""What a cell's chances are for; below 32, two for each measurement: shown at all, share hidden."""


def chance_salts(chance: Chance, numbers: Sequence[int]) -> NDArray[np.uint64]:
    """Return the salts of (seed, step) for some of the 64 kinds of chance that a step has, [S, 1] or [S, C]."""
    seed, step = chance
    mixed = np.uint64(seed * 1_000_003 % 2**64) + np.atleast_1d(step).astype(np.uint64)
    return mixed * np.uint64(64) + np.array(numbers, np.uint64)[:, None]


def _hidden(number_C: NDArray[np.float64], settings: TokenSettings) -> NDArray[np.int64]:
    """Return the draw below which features are hidden, of cells with these uniform numbers."""
    low, high = settings.hide
    return ((low + (high - low) * number_C) * 2.0**32).clip(max=0xFFFFFFFF).astype(np.int64)


def fast_tokens(
    parts: dict[str, list[tuple[Spans, NDArray[np.int64]]]],
    measured: dict[str, NDArray[np.bool_]],
    cells: Cells,
    offsets: dict[str, int],
    settings: TokenSettings,
    chance: Chance | None,
    *,
    ends: Sequence[int] = (),
    empty: Callable[[int, type[np.generic]], NDArray[Any]] = np.empty,
    factors: Tensor | None = None,
) -> list[Tokens]:
    """Write cells of whole counts as tokens on CPU, batch by batch; equal to :func:`make_tokens` of each batch.

    Args:
        parts: Measurement to the cells' counts, in one or several buffers, and each cell's place among all.
        measured: Measurement to which cells were measured at all.
        cells: What is said of the cells; their ``counts`` are not looked at.
        offsets: Measurement to the number of its first feature.
        settings: Budget and chances.
        chance: As for :func:`make_tokens`.
        ends: Where each batch ends among the cells; one batch when left out.
        empty: Gives room for a number of values of a type.
        factors: As for :func:`make_tokens`.
    """
    shown: dict[str, NDArray[np.bool_]] = {}
    hidden: dict[str, NDArray[np.uint32]] = {}
    key_C = np.zeros(cells.n_cells, np.uint32)
    for number, name in enumerate(offsets):
        shown[name] = measured[name] if name in parts else np.zeros(cells.n_cells, bool)
        hidden[name] = np.zeros(cells.n_cells, np.uint32)
        if chance is not None:
            mixed = drawn(cells.row, chance_salts(chance, (2 * number, 2 * number + 1, KEY)))
            shown[name] = shown[name] & (units(mixed[0]) >= settings.drop_measurement)
            hidden[name] = _hidden(units(mixed[1]), settings).astype(np.uint32)
            key_C = keys(mixed[2]).astype(np.uint32)
    lengths_C = np.zeros(cells.n_cells, np.int64)
    for name in parts:
        for spans, place_C in parts[name]:
            lengths_C[place_C] += spans.lengths * shown[name][place_C]
    # whole lines of memory, if that is no more than the budget
    width = max(1, min(settings.budget, -(-int(lengths_C.max(initial=0)) // LANES) * LANES))
    feature_CL = empty(cells.n_cells * width, np.int32).reshape(cells.n_cells, width)
    value_CL = empty(cells.n_cells * width, np.float32).reshape(cells.n_cells, width)
    if not parts:
        feature_CL[:], value_CL[:] = 0, 0
    width_C = np.zeros(cells.n_cells, np.int32)
    depths = {name: np.zeros(cells.n_cells, np.float32) for name in offsets}
    one = len(offsets) == 1 and settings.values == "log1p"
    first_C = np.cumsum(lengths_C) - lengths_C
    room = 0 if one else int(lengths_C.sum()) + 1
    fill_C, found = first_C.copy(), [empty(room, kind) for kind in (np.int32, np.float32, np.uint32)]
    divisors = np.empty(0, np.float32) if factors is None else factors.numpy().astype(np.float32)
    kind = {"log1p": kernels.LOG1P, "bins": kernels.BINS, "rank": kernels.RANK}[settings.values]
    small = all(spans.counts.itemsize < 4 for some in parts.values() for spans, _ in some)  # larger ones may tie
    if settings.values == "rank" and factors is None and len(parts) == 1 and small:
        kind = kernels.COUNT
    for name, offset in offsets.items():
        for spans, place_C in parts.get(name, ()):
            these = (
                spans.starts,
                np.where(shown[name][place_C], spans.lengths, 0),
                spans.features,
                spans.counts,
                key_C[place_C],
                hidden[name][place_C],
                chance is not None,
                offset,
                SCALE,
            )
            if one:
                kernels.tokens_of_one(*these, place_C, feature_CL, value_CL, width_C, depths[name])
            else:
                kernels.candidates(*these, kind, settings.bins, divisors, place_C, fill_C, *found, depths[name])
    if not one:
        ranked = settings.values == "rank"
        kernels.choose_tokens(first_C, fill_C, *found, chance is not None, ranked, (feature_CL, value_CL, width_C))
    made = Tokens(
        torch.from_numpy(feature_CL),
        torch.from_numpy(value_CL),
        tuple(offsets.values()),
        log1p(torch.from_numpy(np.stack(list(depths.values()), axis=1))),
        torch.from_numpy(np.stack(list(shown.values()), axis=1)),
        *_prompts(cells, chance, settings, torch.device("cpu")),
        row_C=torch.from_numpy(cells.row),
    )
    borders = [0, *(ends or (cells.n_cells,))]
    return [
        made.part(first, stop, max(1, int(width_C[first:stop].max(initial=0)))) for first, stop in pairwise(borders)
    ]


def _padded(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], n_cells: int, settings: TokenSettings, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keep each cell's tokens of highest priority, ties to the earlier feature; in the order of features or ranks."""
    budget = settings.budget
    cell, feature, value, priority = (torch.cat([part[number] for part in parts]) for number in range(4))
    order = torch.argsort(feature, stable=True)
    order = order[torch.argsort(priority[order], descending=True, stable=True)]
    order = order[torch.argsort(cell[order], stable=True)]
    length = tally(cell, n_cells)
    start = torch.cumsum(length, 0) - length
    place = torch.arange(len(order), device=device) - start[cell[order]]
    order = order[place < budget]
    if settings.values != "rank":
        order = order[torch.argsort(feature[order], stable=True)]
        order = order[torch.argsort(cell[order], stable=True)]
    kept = length.clamp(max=budget)
    start = torch.cumsum(kept, 0) - kept
    place = torch.arange(len(order), device=device) - start[cell[order]]
    shape = (n_cells, max(1, int(kept.max()) if n_cells else 1))
    features = torch.zeros(shape, dtype=torch.int32, device=device)
    values = torch.zeros(shape, device=device)
    features[cell[order], place] = feature[order].to(torch.int32)
    values[cell[order], place] = place.float() if settings.values == "rank" else value[order]
    return features, values


def _bins(found: _Nonzeros, bins: int) -> Tensor:
    """Return 1 + floor(bins * share of the cell's counts that are smaller) of each count."""
    order = torch.argsort(found.count_N, stable=True)
    order = order[torch.argsort(found.cell_N[order], stable=True)]
    cell, count = found.cell_N[order], found.count_N[order]
    length = tally(cell, len(found.depth_C))
    start = torch.cumsum(length, 0) - length
    place = torch.arange(len(order), device=order.device)
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = (cell[1:] != cell[:-1]) | (count[1:] != count[:-1])
    smaller = torch.cummax(torch.where(first, place, 0), 0).values - start[cell]
    binned = torch.empty_like(found.count_N)
    binned[order] = (1 + bins * smaller // length[cell]).float()
    return binned


@dataclass(frozen=True)
class Packed:
    """Tokens of some cells on end, without padding, as attention over ragged sequences takes them.

    Attributes:
        feature_N: int32.
        value_N: float32.
        cu_seqlens: int32, one longer than there are cells: where each cell begins, and the end.
        longest: Most tokens of a cell.
        cells: The cells' places in the batch that was packed, first and behind the last.
    """

    feature_N: Tensor
    value_N: Tensor
    cu_seqlens: Tensor
    longest: int
    cells: tuple[int, int]


def pack(tokens: Tokens, budget: int | None = None) -> list[Packed]:
    """Leave the padding out; with a budget, in as many pieces as keep each within so many tokens.

    Pieces hold whole cells, in their order; a cell that is longer than the budget is a piece of its own.
    """
    valid_CL = tokens.valid_CL
    ends = [0, *torch.cumsum(valid_CL.sum(1), 0).tolist()]
    feature_N, value_N = tokens.feature_CL[valid_CL], tokens.value_CL[valid_CL]
    pieces, first, n_cells = [], 0, len(ends) - 1
    while first < n_cells:
        stop = first + 1
        while stop < n_cells and (budget is None or ends[stop + 1] - ends[first] <= budget):
            stop += 1
        borders = torch.tensor(ends[first : stop + 1], dtype=torch.int32, device=feature_N.device) - ends[first]
        where = slice(ends[first], ends[stop])
        longest = max((b - a for a, b in pairwise(ends[first : stop + 1])), default=0)
        pieces.append(Packed(feature_N[where], value_N[where], borders, longest, (first, stop)))
        first = stop
    return pieces


def _prompts(
    cells: Cells, chance: Chance | None, settings: TokenSettings, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    codes_CF = np.stack([cells.prompts[name] for name in PROMPTS], axis=1)
    target_CT = cells.perturbation
    number_CF = np.stack([cells.numbers[name] for name in NUMBERS], axis=1)
    if chance is not None:
        salts = (*range(PROMPT, PROMPT + len(PROMPTS)), PERTURBATION, NUMBER)
        rates = [settings.drop_cell_type if name in CRUTCHES else settings.drop_prompt for name in PROMPTS]
        rates += [settings.drop_prompt, settings.drop_prompt]
        kept_SC = units(drawn(cells.row, chance_salts(chance, salts))) >= np.array(rates)[:, None]
        codes_CF = codes_CF * kept_SC[: len(PROMPTS)].T
        target_CT = target_CT * kept_SC[-2][:, None]
        number_CF = np.where(kept_SC[-1][:, None], number_CF, np.float32(np.nan))
    return tuple(torch.from_numpy(part).to(device) for part in (codes_CF, target_CT, number_CF))  # type: ignore[return-value]
