"""This module is a head that tells cell types: each has a prototype, the sum of what its ontology terms are.

Types under one term share that term's vector, so that what a model learns of T cells helps for rare kinds of them; and
a cell whose label is coarse teaches first that it is one of the kinds.

Shape letters used in this module:
    C  cells      D  width      Y  types, by their codes      E  links of types to terms
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.config import ModelConfig


class Prototypes(nn.Module):
    """Log probabilities of types from cells' summaries; "not said" has none."""

    term_E: Tensor
    first_Y: Tensor
    covers_YY: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_types = config.n_prompts["cell_type"]
        self.terms = nn.EmbeddingBag(config.n_terms, config.width, mode="sum")
        self.read = nn.Linear(config.width, config.width)
        self.bias = nn.Parameter(torch.zeros(n_types))
        self.register_buffer("term_E", torch.zeros(config.n_term_links, dtype=torch.int64))
        self.register_buffer("first_Y", torch.zeros(n_types, dtype=torch.int64))
        self.register_buffer("covers_YY", torch.eye(n_types, dtype=torch.bool))

    def know(self, term_E: Tensor, first_Y: Tensor, covers_YY: Tensor) -> None:
        """Take which terms each type is, where each type's begin, and which types are kinds of which.

        Args:
            term_E: Terms of all types on end.
            first_Y: Where each type's begin; code 0 has none.
            covers_YY: Is the second type the first, or a kind of it?
        """
        with torch.no_grad():
            for mine, known in ((self.term_E, term_E), (self.first_Y, first_Y), (self.covers_YY, covers_YY)):
                mine.copy_(known)

    def forward(self, summary_CD: Tensor) -> Tensor:
        """Return log_probability_CY."""
        n_terms_Y = torch.diff(torch.cat([self.first_Y, self.first_Y.new_tensor([len(self.term_E)])]))
        weight_Y = n_terms_Y.clamp(min=1).to(summary_CD.dtype).rsqrt()
        weight_E = torch.repeat_interleave(weight_Y, n_terms_Y, output_size=len(self.term_E))
        prototype_YD = self.terms(self.term_E, self.first_Y, per_sample_weights=weight_E.to(self.terms.weight.dtype))
        logits_CY = self.read(summary_CD) @ prototype_YD.T + self.bias
        return functional.log_softmax(logits_CY.index_fill(1, self.first_Y.new_zeros(1), -torch.inf), dim=1)

    def cost(self, log_probability_CY: Tensor, code_C: Tensor) -> Tensor:
        """Return costs_C in nats: half for being of the label's type or a kind of it, half for just the type."""
        covered_CY = self.covers_YY[code_C]
        log_covered_C = torch.logsumexp(log_probability_CY.masked_fill(~covered_CY, -torch.inf), dim=1)
        return -(log_covered_C + log_probability_CY.gather(1, code_C[:, None])[:, 0]) / 2
