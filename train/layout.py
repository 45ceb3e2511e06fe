"""This module lays a batch of cells out in one packed buffer, where every kind of attention is a way of cutting it up.

A cell is its head (a summary and what is said of it), then for each measurement that is shown some bottleneck tokens
and the visible features. Attention within a measurement cuts at each of these pieces; attention between measurements
reads heads and bottlenecks only; joint attention cuts between cells. No token is padding.

Shape letters used in this module:
    C  cells      P  tokens of a head      M  measurements      B  bottlenecks      N  feature tokens      H  hub tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.attention import Segments
from train.tokens import Tokens, tally


@dataclass(frozen=True)
class Layout:
    """Where a batch's tokens lie in the packed buffer.

    Attributes:
        cells: The buffer cut between cells.
        pieces: The buffer cut into heads and measurements.
        hub_H: Places of heads and bottlenecks, cell by cell.
        hubs: The hub tokens cut between cells.
        head_CP: Places of each cell's head; the summary is the first.
        bottleneck_B: Places of the bottlenecks, measurement by measurement of each cell.
        bottleneck_measurement: The measurement of each group of bottlenecks.
        feature_N: Places of the features.
        source_N: Where each feature stands in the flat [C, L] tokens.
        cell_N: The cell of each feature.
    """

    cells: Segments
    pieces: Segments
    hub_H: Tensor
    hubs: Segments
    head_CP: Tensor
    bottleneck_B: Tensor
    bottleneck_measurement: Tensor
    feature_N: Tensor
    source_N: Tensor
    cell_N: Tensor

    @property
    def n_tokens(self) -> int:
        """The length of the buffer."""
        return self.pieces.total


def lay_out(tokens: Tokens, n_head: int, n_bottlenecks: int) -> Layout:
    """Lay tokens out; whatever their order in a cell, they come out measurement by measurement.

    Args:
        tokens: The batch.
        n_head: P, tokens of a head.
        n_bottlenecks: Bottleneck tokens of each measurement that is shown.
    """
    shown_CM = tokens.measured_CM
    n_cells, n_measurements = shown_CM.shape
    source_N = torch.nonzero(tokens.valid_CL.flatten()).squeeze(1)
    cell_N = source_N // tokens.feature_CL.shape[1]
    key_N = cell_N * n_measurements + tokens.measurement_CL.flatten()[source_N].long()
    order_N = torch.argsort(key_N, stable=True)
    source_N, cell_N, key_N = source_N[order_N], cell_N[order_N], key_N[order_N]
    count_K = tally(key_N, n_cells * n_measurements)
    room_CM = n_bottlenecks * shown_CM.long()
    lengths = torch.cat(
        [count_K.new_full((n_cells, 1), n_head), room_CM + count_K.view(n_cells, n_measurements)], dim=1
    )
    pieces, cells, hubs = Segments.each_of(lengths.flatten(), lengths.sum(1), n_head + room_CM.sum(1))
    start_CM = pieces.cu[:-1].long().view(n_cells, 1 + n_measurements)
    head_CP = start_CM[:, :1] + torch.arange(n_head, device=source_N.device)
    groups = torch.nonzero(shown_CM)
    first_G = start_CM[groups[:, 0], groups[:, 1] + 1]
    bottleneck_GB = first_G[:, None] + torch.arange(n_bottlenecks, device=source_N.device)
    within_N = torch.arange(len(key_N), device=key_N.device) - (torch.cumsum(count_K, 0) - count_K)[key_N]
    feature_N = (start_CM[:, 1:] + room_CM).flatten()[key_N] + within_N
    hub_H = torch.cat([head_CP.flatten(), bottleneck_GB.flatten()]).sort().values
    return Layout(
        cells=cells,
        pieces=pieces,
        hub_H=hub_H,
        hubs=hubs,
        head_CP=head_CP,
        bottleneck_B=bottleneck_GB.flatten(),
        bottleneck_measurement=groups[:, 1].repeat_interleave(n_bottlenecks),
        feature_N=feature_N,
        source_N=source_N,
        cell_N=cell_N,
    )
