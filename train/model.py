"""This module is the model: an encoder of packed cells, a decoder of whole cells, and one of single features.

The encoder reads, for each cell, a summary token, prompt tokens, and the visible features of each measurement behind
some bottleneck tokens. The summary begins as the mean of the features' vectors, weighed by their values. Every block
reads the whole cell; or attention is hybrid: blocks within a measurement, blocks between measurements through heads and
bottlenecks (Nagrani et al. 2021), and joint blocks at the end. From the summary and the prompts one decoder gives log
rates of every feature of every measurement; another corrects the rates of the features that it is asked for, reading
the encoder's tokens. Hidden values never enter (but in the sum of a cell's counts, its depth), they are only compared
with (after He et al. 2022; Hao et al. 2024). Projections are plain linear layers, so that adapters reach them.

Shape letters used in this module:
    C  cells      L  tokens      N  packed tokens      D  width      H  heads      G  features of a measurement
    M  measurements      F  fields      T  perturbation targets      Q  queries      P  tokens of a head
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.asked import Asked
from train.attention import Segments
from train.blocks import Block
from train.config import ModelConfig
from train.identity import Identity, Levels, Pathways, Prompts, SoftBins
from train.layout import Layout, lay_out
from train.likelihood import DISPERSED
from train.niche import Company, Niche
from train.prototypes import Prototypes
from train.tokens import Tokens, tally


@dataclass(frozen=True)
class Queries:
    """Features whose values are asked for.

    Attributes:
        feature_Q: Number of each among all features, from 1; cell by cell.
        cells: The queries cut between cells.
    """

    feature_Q: Tensor
    cells: Segments


class Answer(NamedTuple):
    """What the model says of cells.

    Attributes:
        embedding_CD: Their summaries.
        logits: Measurement to what its likelihood is told of each feature, [C, G].
        correction_Q: What is added to that of the features that were asked for.
        log_type_CY: Log probabilities of cell types, by their codes; None where the model tells none.
    """

    embedding_CD: Tensor
    logits: dict[str, Tensor]
    correction_Q: Tensor
    log_type_CY: Tensor | None


class Decoder(nn.Module):
    """What the likelihood of each feature is told, from a cell's summary, its prompts and its perturbation."""

    def __init__(self, n_features: int, width: int, *, dispersed: bool) -> None:
        super().__init__()
        self.features = nn.Linear(width, n_features)
        self.effects = nn.Linear(width, n_features, bias=False)
        self.log_dispersion = nn.Parameter(torch.ones(n_features)) if dispersed else None

    def forward(self, summary_CD: Tensor, perturbation_CD: Tensor) -> Tensor:
        """Return logits_CG; a perturbation adds a shift of its own to what the summary says."""
        logits: Tensor = self.features(summary_CD) + self.effects(perturbation_CD)
        return logits


class CellModel(nn.Module):
    """Cells in, embeddings and rates out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Keep no activations of blocks for the backward pass, but make them again: less memory, a third more time."""
        width = config.width
        self.identity = Identity(config)
        self.measurement = nn.Embedding(len(config.n_features), width)
        self.value = SoftBins(width, config.bins)
        self.levels = Levels(config) if config.levels else None
        self.pathways = Pathways(config) if config.pathways else None
        self.prompts = Prompts(config)
        self.summary = nn.Parameter(torch.zeros(width))
        self.pool = nn.Linear(width, width, bias=False)
        self.bottlenecks = nn.Parameter(torch.zeros(len(config.n_features), config.bottlenecks, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width)
        self.mix = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.target = nn.Embedding(config.n_perturbations, width, padding_idx=0)
        self.decoders = nn.ModuleDict(
            {
                name: Decoder(size, width, dispersed=config.likelihood_of(name) in DISPERSED)
                for name, size in config.n_features.items()
            }
        )
        self.niche = Niche(config) if config.niche else None
        self.prototypes = Prototypes(config) if config.n_terms else None
        self.asked = nn.Parameter(torch.zeros(width))
        self.query_blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.query_layers))
        self.query_norm = nn.RMSNorm(width)
        self.correction = nn.Linear(width, 1)
        self.apply(_initialise)
        nn.init.zeros_(self.target.weight)
        nn.init.eye_(self.pool.weight)
        if self.niche is not None:
            self.niche.begin()
        for parameter in (self.summary, self.bottlenecks, self.asked):
            nn.init.normal_(parameter, std=0.02)

    def encode(
        self, tokens: Tokens, unknown_F: Tensor | None = None, asked: Asked | None = None
    ) -> tuple[Tensor, Layout, Tensor]:
        """Return the encoder's tokens_ND, where they lie, and the mean of the cells' prompts_CD."""
        prompts = self.prompts(tokens, asked)
        head_CPD = torch.cat([self.summary.expand(len(prompts), 1, -1), prompts], dim=1)
        layout = lay_out(tokens, head_CPD.shape[1] + self.config.pathways, self.config.bottlenecks)
        feature_N = tokens.feature_CL.flatten()[layout.source_N]
        value_N, identity = tokens.value_CL.flatten()[layout.source_N], self.identity(feature_N, unknown_F)
        if self.levels is not None:
            value_N = self.levels(value_N, feature_N)
        features = identity + self.measurement(tokens.measurement_CL.flatten()[layout.source_N]) + self.value(value_N)
        summed_CD = torch.zeros_like(prompts[:, 0]).index_add_(
            0, layout.cell_N, (identity * value_N[:, None]).to(prompts.dtype)
        )
        n_features_C = tally(layout.cell_N, len(prompts)).clamp(min=1)
        pooled_CD = self.pool(summed_CD / n_features_C[:, None])
        head_CPD = torch.cat([head_CPD[:, :1] + pooled_CD[:, None], head_CPD[:, 1:]], dim=1)
        if self.pathways is not None:
            read_CPD = self.pathways(features, feature_N, layout.cell_N, len(prompts), self.identity)
            head_CPD = torch.cat([head_CPD, read_CPD], dim=1)
        own = self.bottlenecks.flatten(0, 1)
        number_B = torch.arange(len(layout.bottleneck_B), device=own.device) % max(1, self.config.bottlenecks)
        bottlenecks = own[layout.bottleneck_measurement * self.config.bottlenecks + number_B]
        x = torch.cat([head_CPD.flatten(0, 1), bottlenecks, features])
        place = torch.cat([layout.head_CP.flatten(), layout.bottleneck_B, layout.feature_N])
        x = torch.zeros_like(x).index_copy(0, place, x)
        for kind, block in zip(self.config.kinds, self.blocks, strict=True):
            if kind == "between":
                x = x.index_copy(0, layout.hub_H, self._through(block, x[layout.hub_H], layout.hubs))
            else:
                x = self._through(block, x, layout.cells if kind == "joint" else layout.pieces)
        return self.norm(x), layout, prompts.mean(1)

    def _through(self, block: nn.Module, x_ND: Tensor, segments: Segments) -> Tensor:
        out: Tensor
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(block, x_ND, segments, use_reentrant=False)
        else:
            out = block(x_ND, segments)
        return out

    def embed(self, tokens: Tokens, company: Company | None = None) -> tuple[Tensor, Tensor]:
        """Return the cells' embeddings_CD and the mean of their prompts_CD."""
        x, layout, prompts = self.encode(tokens)
        return self._in_company(x[layout.head_CP[:, 0]], company), prompts

    def _in_company(self, summary_CD: Tensor, company: Company | None) -> Tensor:
        return summary_CD if self.niche is None or company is None else self.niche(summary_CD, company)

    def decode(self, embedding_CD: Tensor, prompts_CD: Tensor, perturbation_CT: Tensor) -> dict[str, Tensor]:
        """Return logits_CG of every measurement."""
        summary = self.mix(torch.cat([embedding_CD, prompts_CD], dim=1)) + embedding_CD
        perturbation = self.target(perturbation_CT).sum(1)
        return {name: decoder(summary, perturbation) for name, decoder in self.decoders.items()}

    def correct(self, x_ND: Tensor, layout: Layout, queries: Queries, unknown_F: Tensor | None = None) -> Tensor:
        """Return what is added to the log rate of each feature that is asked for, from all that the encoder knows."""
        borders = torch.tensor(list(self.config.offsets.values())[1:], dtype=torch.int64, device=x_ND.device)
        measurement_Q = torch.bucketize(queries.feature_Q.long(), borders, right=True)
        q = self.identity(queries.feature_Q, unknown_F) + self.measurement(measurement_Q) + self.asked
        for block in self.query_blocks:
            q = block(q, queries.cells, x_ND, layout.cells)
        correction: Tensor = self.correction(self.query_norm(q)).sum(1)  # one column; no view, which FSDP2 warns of
        return correction

    def forward(
        self,
        tokens: Tokens,
        queries: Queries | None = None,
        unknown_F: Tensor | None = None,
        asked: Asked | None = None,
        company: Company | None = None,
    ) -> Answer:
        """Say of cells what they are, what their features are expected to be, and of which type they are.

        Args:
            tokens: The cells.
            queries: Features whose values are asked for.
            unknown_F: Which features, by their numbers among all, are taken for unknown.
            asked: What is asked of the cells.
            company: Which of them belong together; a cell without company is alone.
        """
        x, layout, prompts = self.encode(tokens, unknown_F, asked)
        embedding = self._in_company(x[layout.head_CP[:, 0]], company)
        logits = self.decode(embedding, prompts, tokens.perturbation_CT)
        correction = x.new_zeros(0) if queries is None else self.correct(x, layout, queries, unknown_F)
        log_type_CY = None if self.prototypes is None else self.prototypes(embedding)
        return Answer(embedding, logits, correction, log_type_CY)

    def know(self, feature_E: Tensor, set_E: Tensor, vectors: dict[str, Tensor]) -> None:
        """Take memberships, in ascending order of features, and frozen vectors [1 + F, K]."""
        self.identity.know(feature_E, set_E, vectors)
        if self.pathways is not None:
            self.pathways.choose(set_E)

    def set_baseline(self, output: dict[str, Tensor]) -> None:
        """Let the decoders begin at what fits the training cells on average, output_G: learning begins at the floor."""
        with torch.no_grad():
            for name, output_G in output.items():
                decoder = self.decoders[name]
                assert isinstance(decoder, Decoder)
                decoder.features.bias.copy_(output_G)

    def set_axes(self, axes: dict[str, Tensor]) -> None:
        """Let features' vectors begin at axes of every measurement, [G, width or less]; ``train.start`` finds some."""
        with torch.no_grad():
            for name, axes_GD in axes.items():
                first = self.config.offsets[name]
                self.identity.own.weight[first : first + len(axes_GD), : axes_GD.shape[1]] = axes_GD

    def log_dispersion(self, name: str) -> Tensor | None:
        """Return the second parameter_G of a measurement's likelihood, None where it has but one."""
        decoder = self.decoders[name]
        assert isinstance(decoder, Decoder)
        return decoder.log_dispersion


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, nn.EmbeddingBag):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02 if module.bias is None else 1 / math.sqrt(module.in_features) / 2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
