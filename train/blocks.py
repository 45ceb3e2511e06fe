"""This module is what encoder, decoder and transition head are built of: attention, then a gated feed-forward layer.

Projections are plain linear layers, so that adapters reach them.

Shape letters used in this module:
    N  packed tokens      D  width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.attention import Segments, attend


class Attention(nn.Module):
    """The projections of attention, separate ones, with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)

    def project(self, x_ND: Tensor, read_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of ``x``, keys and values of ``read``, head by head."""
        v = self.v_proj(read_ND).unflatten(1, (self.heads, -1))
        q = self.q_norm(self.q_proj(x_ND).unflatten(1, (self.heads, -1))).to(v.dtype)
        k = self.k_norm(self.k_proj(read_ND).unflatten(1, (self.heads, -1))).to(v.dtype)
        return q, k, v


class Block(nn.Module):
    """Attention, then a gated feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_norm = nn.RMSNorm(width)
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(
        self, x_ND: Tensor, cu_q: Segments, read_ND: Tensor | None = None, cu_k: Segments | None = None
    ) -> Tensor:
        """Return the tokens after the block; they read each other, or what they are given."""
        q, k, v = self.before(x_ND, read_ND)
        return self.after(x_ND, attend(q, k, v, cu_q, cu_k or cu_q))

    def compile_dense(self) -> None:
        """Compile what lies before and after attention, once for all lengths; attention is a kernel of its own."""
        self.before = torch.compile(self.before, dynamic=True)  # type: ignore[method-assign]
        self.after = torch.compile(self.after, dynamic=True)  # type: ignore[method-assign]

    def before(self, x_ND: Tensor, read_ND: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, head by head."""
        own = self.attention_norm(x_ND)
        return self.attention.project(own, own if read_ND is None else read_ND)

    def after(self, x_ND: Tensor, attended_NHD: Tensor) -> Tensor:
        """Add what was read, and go through the gated layer."""
        x_ND = x_ND + self.attention.o_proj(attended_NHD.flatten(1))
        fed = self.feed_norm(x_ND)
        out: Tensor = x_ND + self.down_proj(functional.silu(self.gate_proj(fed)) * self.up_proj(fed))
        return out
