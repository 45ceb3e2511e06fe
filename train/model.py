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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.attention import Segments, attend
from train.layout import Layout, lay_out
from train.likelihood import OVERDISPERSED
from train.tokens import Tokens, first_numbers

FOURIER = 6


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; together with the weights it is all that is needed to build one again.

    Attributes:
        n_features: Measurement to G, in the vocabulary's order.
        n_prompts: Prompt field to its number of codes.
        n_perturbations: Codes of perturbation targets.
        n_numbers: Numeric prompts.
        width: D.
        layers: Encoder blocks.
        heads: H; divides the width.
        bins: Soft bins of a value's embedding.
        bottlenecks: Tokens through which a measurement of a cell speaks with the others.
        query_layers: Blocks of the decoder of single features.
        attention: "full": every block is joint; or "hybrid".
        n_sets: Sets (pathways, processes) that features belong to.
        n_memberships: How often one does.
        hash_rows: Vectors that stand for features which nobody has trained on, by the hash of their id.
        frozen: Kind of vector that is known of features ("sequence", "text") to its width.
    """

    n_features: dict[str, int]
    n_prompts: dict[str, int]
    n_perturbations: int
    n_numbers: int = 2
    width: int = 64
    layers: int = 2
    heads: int = 4
    bins: int = 16
    bottlenecks: int = 4
    query_layers: int = 1
    attention: Literal["hybrid", "full"] = "full"
    n_sets: int = 0
    n_memberships: int = 0
    hash_rows: int = 64
    frozen: dict[str, int] = field(default_factory=dict)

    @property
    def offsets(self) -> dict[str, int]:
        """Measurement to the number of its first feature among all; 0 is padding."""
        return first_numbers(self.n_features)

    @property
    def kinds(self) -> list[str]:
        """What each encoder block reads: "within" a measurement, "between" them, or all of the cell ("joint")."""
        joint = self.layers if self.attention == "full" else max(1, self.layers // 3)
        mixed = ["within" if number % 2 == 0 else "between" for number in range(self.layers - joint)]
        return [*mixed, *["joint"] * joint]


@dataclass(frozen=True)
class Queries:
    """Features whose values are asked for.

    Attributes:
        feature_Q: Number of each among all features, from 1; cell by cell.
        cells: The queries cut between cells.
    """

    feature_Q: Tensor
    cells: Segments


class Attention(nn.Module):
    """Attention with separate projections and normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)

    def forward(self, x_ND: Tensor, read_ND: Tensor, cu_q: Segments, cu_k: Segments) -> Tensor:
        """Let each token of ``x`` read the tokens of ``read`` in its segment."""
        v = self.v_proj(read_ND).unflatten(1, (self.heads, -1))
        q = self.q_norm(self.q_proj(x_ND).unflatten(1, (self.heads, -1))).to(v.dtype)
        k = self.k_norm(self.k_proj(read_ND).unflatten(1, (self.heads, -1))).to(v.dtype)
        joined: Tensor = self.o_proj(attend(q, k, v, cu_q, cu_k).flatten(1))
        return joined


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
        own = self.attention_norm(x_ND)
        x_ND = x_ND + self.attention(own, own if read_ND is None else read_ND, cu_q, cu_k or cu_q)
        fed = self.feed_norm(x_ND)
        out: Tensor = x_ND + self.down_proj(functional.silu(self.gate_proj(fed)) * self.up_proj(fed))
        return out


class SoftBins(nn.Module):
    """Embed a value as a softly chosen mix of learned bins: smooth, bounded, robust to outliers."""

    def __init__(self, width: int, bins: int) -> None:
        super().__init__()
        self.choose = nn.Sequential(nn.Linear(1, bins), nn.SiLU(), nn.Linear(bins, bins))
        self.bins = nn.Linear(bins, width, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        """Return an embedding for each value."""
        embedded: Tensor = self.bins(self.choose(value.unsqueeze(-1)).softmax(-1))
        return embedded


class Identity(nn.Module):
    """What a feature is: a vector of its own, what its sets have in common, and what is known of it from elsewhere.

    In training some features are taken for unknown: one of a few shared vectors stands for their own, so that features
    which come later (``train.grow``) find vectors that the model has learned to do with. The sum over sets is divided
    by the root of how many there are, so that features of many sets are not louder.
    """

    set_E: Tensor
    border_F: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_features = 1 + sum(config.n_features.values())
        self.own = nn.Embedding(n_features, config.width, padding_idx=0)
        self.shared = nn.Embedding(config.hash_rows, config.width)
        self.sets = nn.EmbeddingBag(config.n_sets, config.width, mode="sum") if config.n_sets else None
        self.register_buffer("set_E", torch.zeros(config.n_memberships, dtype=torch.int64))
        self.register_buffer("border_F", torch.zeros(n_features + 1, dtype=torch.int64))
        for kind, wide in config.frozen.items():
            self.register_buffer(f"frozen_{kind}", torch.zeros(n_features, wide))
        self.adapters = nn.ModuleDict(
            {kind: nn.Linear(wide, config.width, bias=False) for kind, wide in config.frozen.items()}
        )

    def forward(self, feature: Tensor, unknown_F: Tensor | None = None) -> Tensor:
        """Return the vectors of features, by their numbers among all; shared ones for those taken for unknown."""
        embedded: Tensor = self.own(feature)
        if unknown_F is not None:
            numbers = feature.long()
            shared = self.shared(numbers % self.shared.num_embeddings)
            embedded = torch.where(unknown_F[numbers].unsqueeze(-1), shared, embedded)
        if self.sets is not None and len(feature) == 0:
            embedded = embedded + 0.0 * self.sets.weight.sum()
        elif self.sets is not None:
            different_U, where = torch.unique(feature.long(), return_inverse=True)
            degree_U = self.border_F[different_U + 1] - self.border_F[different_U]
            first_U = torch.cumsum(degree_U, 0) - degree_U
            place_E = torch.repeat_interleave(self.border_F[different_U] - first_U, degree_U)
            place_E = place_E + torch.arange(len(place_E), device=place_E.device)
            weight_E = torch.repeat_interleave(degree_U.clamp(min=1).to(embedded.dtype).rsqrt(), degree_U)
            summed_UD = self.sets(self.set_E[place_E], first_U, per_sample_weights=weight_E)
            embedded = embedded + summed_UD[where]
        for kind, adapter in self.adapters.items():
            embedded = embedded + adapter(self.get_buffer(f"frozen_{kind}")[feature.long()])
        return embedded

    def know(self, feature_E: Tensor, set_E: Tensor, vectors: dict[str, Tensor]) -> None:
        """Take memberships, in ascending order of features, and frozen vectors [1 + F, K]."""
        with torch.no_grad():
            self.set_E.copy_(set_E)
            count_F = torch.bincount(feature_E, minlength=len(self.border_F) - 1)
            self.border_F[1:] = torch.cumsum(count_F, 0)
            for kind, values in vectors.items():
                self.get_buffer(f"frozen_{kind}").copy_(values)


class Prompts(nn.Module):
    """Embed what is said of a cell: codes, perturbation targets (summed), numbers (Fourier), depths."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(size, config.width) for size in config.n_prompts.values())
        self.perturbation = nn.Embedding(config.n_perturbations, config.width, padding_idx=0)
        self.numbers = nn.Linear(config.n_numbers * (2 * FOURIER + 2), config.width)
        self.depth = nn.Linear(2 * len(config.n_features), config.width)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return one token for each field, one for the perturbation, one for numbers, one for depths."""
        said = [embed(tokens.prompt_CF[:, number]) for number, embed in enumerate(self.fields)]
        said.append(self.perturbation(tokens.perturbation_CT).sum(1))
        said.append(self.numbers(fourier(tokens.number_CF)))
        measured = tokens.measured_CM.float()
        said.append(self.depth(torch.cat([tokens.log_depth_CM * measured / 10, measured], dim=1)))
        return torch.stack(said, dim=1)


def fourier(number_CF: Tensor) -> Tensor:
    """Write numbers as sines and cosines of their log; a number that is not said is all zeros."""
    said = ~number_CF.isnan()
    log = torch.log1p(torch.nan_to_num(number_CF).abs())
    frequency = 2.0 ** torch.arange(-2, FOURIER - 2, device=log.device)
    angle = log.unsqueeze(-1) * frequency
    features = torch.cat([angle.sin(), angle.cos(), log.unsqueeze(-1), torch.ones_like(log).unsqueeze(-1)], dim=-1)
    return (features * said.unsqueeze(-1)).flatten(1)


class Decoder(nn.Module):
    """Log rates of one measurement's features from a cell's summary, its prompts and its perturbation."""

    def __init__(self, n_features: int, width: int, *, overdispersed: bool) -> None:
        super().__init__()
        self.features = nn.Linear(width, n_features)
        self.effects = nn.Linear(width, n_features, bias=False)
        self.log_dispersion = nn.Parameter(torch.ones(n_features)) if overdispersed else None

    def forward(self, summary_CD: Tensor, perturbation_CD: Tensor) -> Tensor:
        """Return logits_CG; a perturbation adds a shift of its own to what the summary says."""
        logits: Tensor = self.features(summary_CD) + self.effects(perturbation_CD)
        return logits


class CellModel(nn.Module):
    """Cells in, embeddings and rates out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.identity = Identity(config)
        self.measurement = nn.Embedding(len(config.n_features), width)
        self.value = SoftBins(width, config.bins)
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
                name: Decoder(size, width, overdispersed=name in OVERDISPERSED)
                for name, size in config.n_features.items()
            }
        )
        self.asked = nn.Parameter(torch.zeros(width))
        self.query_blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.query_layers))
        self.query_norm = nn.RMSNorm(width)
        self.correction = nn.Linear(width, 1)
        self.apply(_initialise)
        nn.init.zeros_(self.target.weight)
        nn.init.eye_(self.pool.weight)
        for parameter in (self.summary, self.bottlenecks, self.asked):
            nn.init.normal_(parameter, std=0.02)

    def encode(self, tokens: Tokens, unknown_F: Tensor | None = None) -> tuple[Tensor, Layout, Tensor]:
        """Return the encoder's tokens_ND, where they lie, and the mean of the cells' prompts_CD."""
        prompts = self.prompts(tokens)
        head_CPD = torch.cat([self.summary.expand(len(prompts), 1, -1), prompts], dim=1)
        layout = lay_out(tokens, head_CPD.shape[1], self.config.bottlenecks)
        feature_N = tokens.feature_CL.flatten()[layout.source_N]
        value_N, identity = tokens.value_CL.flatten()[layout.source_N], self.identity(feature_N, unknown_F)
        features = identity + self.measurement(tokens.measurement_CL.flatten()[layout.source_N]) + self.value(value_N)
        summed_CD = torch.zeros_like(prompts[:, 0]).index_add_(
            0, layout.cell_N, (identity * value_N[:, None]).to(prompts.dtype)
        )
        n_features_C = torch.bincount(layout.cell_N, minlength=len(prompts)).clamp(min=1)
        pooled_CD = self.pool(summed_CD / n_features_C[:, None])
        head_CPD = torch.cat([head_CPD[:, :1] + pooled_CD[:, None], head_CPD[:, 1:]], dim=1)
        own = self.bottlenecks.flatten(0, 1)
        number_B = torch.arange(len(layout.bottleneck_B), device=own.device) % max(1, self.config.bottlenecks)
        bottlenecks = own[layout.bottleneck_measurement * self.config.bottlenecks + number_B]
        x = torch.cat([head_CPD.flatten(0, 1), bottlenecks, features])
        place = torch.cat([layout.head_CP.flatten(), layout.bottleneck_B, layout.feature_N])
        x = torch.zeros_like(x).index_copy(0, place, x)
        for kind, block in zip(self.config.kinds, self.blocks, strict=True):
            if kind == "between":
                x = x.index_copy(0, layout.hub_H, block(x[layout.hub_H], layout.hubs))
            else:
                x = block(x, layout.cells if kind == "joint" else layout.pieces)
        return self.norm(x), layout, prompts.mean(1)

    def embed(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the cells' embeddings_CD and the mean of their prompts_CD."""
        x, layout, prompts = self.encode(tokens)
        return x[layout.head_CP[:, 0]], prompts

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
        correction: Tensor = self.correction(self.query_norm(q)).squeeze(1)
        return correction

    def forward(
        self, tokens: Tokens, queries: Queries | None = None, unknown_F: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return embeddings_CD, logits_CG of every measurement, and the correction_Q of what is asked for.

        Args:
            tokens: The cells.
            queries: Features whose values are asked for.
            unknown_F: Which features, by their numbers among all, are taken for unknown.
        """
        x, layout, prompts = self.encode(tokens, unknown_F)
        embedding = x[layout.head_CP[:, 0]]
        logits = self.decode(embedding, prompts, tokens.perturbation_CT)
        correction = x.new_zeros(0) if queries is None else self.correct(x, layout, queries, unknown_F)
        return embedding, logits, correction

    def set_baseline(self, share: dict[str, Tensor]) -> None:
        """Let the decoders begin at the training cells' mean share_G of counts: learning begins at the floor."""
        with torch.no_grad():
            for name, share_G in share.items():
                decoder = self.decoders[name]
                assert isinstance(decoder, Decoder)
                decoder.features.bias.copy_(torch.log(share_G.clamp(min=1e-8)))

    def set_axes(self, axes: dict[str, Tensor]) -> None:
        """Let features' vectors begin at axes of every measurement, [G, width or less]; ``train.start`` finds some."""
        with torch.no_grad():
            for name, axes_GD in axes.items():
                first = self.config.offsets[name]
                self.identity.own.weight[first : first + len(axes_GD), : axes_GD.shape[1]] = axes_GD

    def log_dispersion(self, name: str) -> Tensor | None:
        """Return the log inverse dispersion_G of an overdispersed measurement, None of another."""
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
