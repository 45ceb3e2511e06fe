"""This module counts the arithmetic of a step, and knows how much of it a GPU can do.

Counted are 6 floating point operations for each weight of a linear layer and each token that goes through it (forward
and backward; 4 where the weight does not learn), and 12 for each pair of tokens that read each other and each unit of
width; what is made again in the backward pass (``recompute``) is not counted, as is the custom for MFU.

Shape letters used in this module:
    C  cells      M  measurements
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.blocks import Block
from train.config import ModelConfig
from train.model import CellModel, Queries
from train.tokens import Tokens, tally


@dataclass(frozen=True)
class Device:
    """A GPU, as its maker's data sheet has it: dense operations a second, and memory in bytes."""

    half: float
    single: float
    memory: float


DEVICES = {
    "h100": Device(989e12, 67e12, 80e9),
    "h200": Device(989e12, 67e12, 141e9),
    "a100": Device(312e12, 19.5e12, 80e9),
}


def peak_of(name: str, *, half: bool) -> float | None:
    """Return the dense operations a second of a device, by the name that torch gives it; None where nobody knows."""
    found = next((device for key, device in DEVICES.items() if key in name.lower()), None)
    return None if found is None else found.half if half else found.single


@dataclass(frozen=True)
class Seen:
    """What a step reads, of all its cells together or of one on average.

    Attributes:
        cells: How many these are.
        tokens: Features that are visible.
        places: These, heads and bottlenecks: the packed buffer.
        hubs: Heads and bottlenecks.
        joint: Pairs of places of the same cell.
        within: Pairs of places of the same head or measurement.
        between: Pairs of hubs.
        queries: Features that are asked for.
        read: Pairs of a query and a place that it reads.
    """

    cells: float
    tokens: float
    places: float
    hubs: float
    joint: float
    within: float
    between: float
    queries: float
    read: float


def seen_in(config: ModelConfig, tokens: Tokens, queries: Queries) -> Seen:
    """Count what a batch reads; one value waits for the device."""
    n_cells, n_measurements = tokens.measured_CM.shape
    valid_CL = tokens.valid_CL
    first_C = torch.arange(n_cells, device=valid_CL.device)[:, None] * n_measurements
    padding = n_cells * n_measurements
    key_CL = torch.where(valid_CL, first_C + tokens.measurement_CL, padding)
    visible_CM = tally(key_CL.flatten(), padding + 1)[:-1].view(n_cells, n_measurements).double()
    head = 1 + config.prompt_tokens + config.pathways
    room_CM = config.bottlenecks * tokens.measured_CM.double()
    piece_CM = room_CM + visible_CM
    place_C, hub_C, query_C = head + piece_CM.sum(1), head + room_CM.sum(1), queries.cells.lengths.double()
    sums: list[Tensor] = [
        visible_CM.sum(),
        place_C.sum(),
        hub_C.sum(),
        place_C.square().sum(),
        head**2 * n_cells + piece_CM.square().sum(),
        hub_C.square().sum(),
        query_C.sum(),
        (query_C * place_C).sum(),
    ]
    return Seen(n_cells, *torch.stack(sums).tolist())


def operations(model: CellModel, seen: Seen) -> float:
    """Return the floating point operations of a step over what is seen, forward and backward."""
    config, each = model.config, work([model.blocks[0]])
    total = sum(each * n + 12.0 * config.width * pairs for n, pairs in rounds(config, seen))
    for block in model.query_blocks:
        assert isinstance(block, Block)
        reading = work([block.attention.k_proj, block.attention.v_proj])
        total += (work([block]) - reading) * seen.queries + reading * seen.places
        total += 12.0 * config.width * seen.read
    return total + work([model.decoders]) * seen.cells


def rounds(config: ModelConfig, seen: Seen) -> list[tuple[float, float]]:
    """Return how many tokens go through each of the encoder's blocks, and how many pairs of them read each other."""
    of_kind = {
        "joint": (seen.places, seen.joint),
        "within": (seen.places, seen.within),
        "between": (seen.hubs, seen.between),
    }
    return [of_kind[kind] for kind in config.kinds]


def linear(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the weights of linear layers."""
    return [part.weight for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


def work(modules: Sequence[nn.Module]) -> float:
    """Return the operations of a token that goes through all linear layers of modules, forward and backward."""
    return float(sum((6 if weight.requires_grad else 4) * weight.numel() for weight in linear(modules)))
