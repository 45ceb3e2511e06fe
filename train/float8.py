"""This module lets the linear layers of blocks multiply in 8 bits, through torchao; weights stay single precision.

Inputs, weights and gradients are cast at each step, with a scale for each tensor ("dynamic tensorwise scaling"). Where
the device has no such arithmetic (before Ada and Hopper, and on CPU) it is emulated: the same rounding, no gain.
Importing it needs torchao.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_linear_utils import swap_linear_layers

from store.errors import UsageError
from train.blocks import Block
from train.model import CellModel

CAPABLE = (8, 9)
"""Compute capability of the first GPUs that multiply in 8 bits (Ada)."""
MULTIPLE = 16
"""What a layer's sizes must be multiples of."""


class Linear8(Float8Linear):
    """A linear layer in 8 bits that takes empty inputs too: a share of a batch may ask for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        out: Tensor = super().forward(x) if x.numel() else functional.linear(x, self.weight, self.bias)
        return out


def emulated(device: torch.device) -> bool:
    """Say whether the device would only act as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABLE


def in_float8(model: CellModel, device: torch.device) -> int:
    """Let the linear layers of a model's blocks multiply in 8 bits; return how many do.

    The names and values of weights stay as they are. A layer whose sizes are no multiples of ``MULTIPLE`` stays too.

    Raises:
        UsageError: No layer could be changed.
    """
    told = Float8LinearConfig(emulate=emulated(device), pad_inner_dim=True)  # packed buffers have any length

    def fits(part: nn.Module, name: str) -> bool:
        return isinstance(part, nn.Linear) and not (part.in_features % MULTIPLE or part.out_features % MULTIPLE)

    for block in (part for part in model.modules() if isinstance(part, Block)):
        swap_linear_layers(block, lambda part: Linear8.from_float(part, config=told), module_filter_fn=fits)
    n_changed = sum(isinstance(part, Linear8) for part in model.modules())
    if n_changed == 0:
        raise UsageError(
            f"precision = 'fp8': no layer's sizes are multiples of {MULTIPLE} (model.width={model.config.width}); "
            "take another width, or precision = 'bf16'"
        )
    return n_changed
