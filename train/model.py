"""This module is the model: one encoder over the visible tokens and prompts of a cell, one decoder of whole cells.

The encoder (pre-norm, RMSNorm, QK-norm, SwiGLU, plain linear projections) reads a summary token, prompt tokens and
the visible feature tokens. The decoder takes the summary and the prompts and gives log rates of every feature of every
measurement; hidden values never enter (but in the sum of a cell's counts, its depth), they are only compared with.
Likelihoods: negative binomial for RNA and protein, Poisson for the others; the mean is the cell's depth times a softmax
over the features that its dataset measures. Architecture after the reference of masked cell models (He et al. 2022;
Lopez et al. 2018 for the likelihood).

Shape letters used in this module:
    C  cells      L  tokens      D  width      H  heads      G  features of a measurement      M  measurements
    F  fields     T  perturbation targets
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.tokens import Tokens, first_numbers

OVERDISPERSED = ("RNA", "protein")
"""Measurements with a negative binomial likelihood; the others are Poisson."""

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
    """

    n_features: dict[str, int]
    n_prompts: dict[str, int]
    n_perturbations: int
    n_numbers: int = 2
    width: int = 64
    layers: int = 2
    heads: int = 4
    bins: int = 16

    @property
    def offsets(self) -> dict[str, int]:
        """Measurement to the number of its first feature among all; 0 is padding."""
        return first_numbers(self.n_features)


class Attention(nn.Module):
    """Self-attention with separate projections and normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)

    def forward(self, x_CLD: Tensor, valid_CL: Tensor) -> Tensor:
        """Attend from every token to the valid ones."""
        shape = (*x_CLD.shape[:2], self.heads, x_CLD.shape[2] // self.heads)  # spelt out: a share may hold no cell
        q = self.q_norm(self.q_proj(x_CLD).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x_CLD).view(shape)).transpose(1, 2)
        v = self.v_proj(x_CLD).view(shape).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=valid_CL[:, None, None, :])
        joined: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """One encoder block: attention, then a gated feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_norm = nn.RMSNorm(width)
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x_CLD: Tensor, valid_CL: Tensor) -> Tensor:
        """Return the tokens after the block."""
        x_CLD = x_CLD + self.attention(self.attention_norm(x_CLD), valid_CL)
        fed = self.feed_norm(x_CLD)
        out: Tensor = x_CLD + self.down_proj(functional.silu(self.gate_proj(fed)) * self.up_proj(fed))
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
        said.append(self.numbers(_fourier(tokens.number_CF)))
        measured = tokens.measured_CM.float()
        said.append(self.depth(torch.cat([tokens.log_depth_CM * measured / 10, measured], dim=1)))
        return torch.stack(said, dim=1)


def _fourier(number_CF: Tensor) -> Tensor:
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
        self.identity = nn.Embedding(1 + sum(config.n_features.values()), width, padding_idx=0)
        self.measurement = nn.Embedding(len(config.n_features), width)
        self.value = SoftBins(width, config.bins)
        self.prompts = Prompts(config)
        self.summary = nn.Parameter(torch.zeros(width))
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
        self.apply(_initialise)
        nn.init.zeros_(self.target.weight)
        nn.init.normal_(self.summary, std=0.02)

    def embed(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the cells' embeddings_CD and the mean of their prompts_CD."""
        prompts = self.prompts(tokens)
        features = (
            self.identity(tokens.feature_CL) + self.measurement(tokens.measurement_CL) + self.value(tokens.value_CL)
        )
        x = torch.cat([self.summary.expand(len(features), 1, -1), prompts, features], dim=1)
        always = torch.ones(x.shape[0], 1 + prompts.shape[1], dtype=torch.bool, device=x.device)
        valid = torch.cat([always, tokens.valid_CL], dim=1)
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x[:, 0]), prompts.mean(1)

    def decode(self, embedding_CD: Tensor, prompts_CD: Tensor, perturbation_CT: Tensor) -> dict[str, Tensor]:
        """Return logits_CG of every measurement."""
        summary = self.mix(torch.cat([embedding_CD, prompts_CD], dim=1)) + embedding_CD
        perturbation = self.target(perturbation_CT).sum(1)
        return {name: decoder(summary, perturbation) for name, decoder in self.decoders.items()}

    def forward(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Return embeddings_CD and logits_CG of every measurement."""
        embedding, prompts = self.embed(tokens)
        return embedding, self.decode(embedding, prompts, tokens.perturbation_CT)

    def set_baseline(self, share: dict[str, Tensor]) -> None:
        """Let the decoders begin at the training cells' mean share_G of counts: learning begins at the floor."""
        with torch.no_grad():
            for name, share_G in share.items():
                decoder = self.decoders[name]
                assert isinstance(decoder, Decoder)
                decoder.features.bias.copy_(torch.log(share_G.clamp(min=1e-8)))

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
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02 if module.bias is None else 1 / math.sqrt(module.in_features) / 2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Loss:
    """A sum of mean negative log likelihoods, and the number of (cell, measurement) pairs that it sums over."""

    total: Tensor
    pairs: Tensor
    per_measurement: dict[str, Tensor] = field(default_factory=dict)


def log_rates(logits_CG: Tensor, panel_CG: Tensor) -> Tensor:
    """Return the log share of each measured feature; a feature that was not measured has none (-inf)."""
    return functional.log_softmax(logits_CG.masked_fill(~panel_CG, -torch.inf), dim=1)


def negative_log_likelihood(
    counts_CG: Tensor, log_share_CG: Tensor, panel_CG: Tensor, log_dispersion_G: Tensor | None
) -> Tensor:
    """Return each cell's mean over its measured features of -log p(counts), in nats.

    Args:
        counts_CG: Raw counts.
        log_share_CG: From ``log_rates``.
        panel_CG: Which features were measured.
        log_dispersion_G: Log inverse dispersion of the negative binomial; None is Poisson.
    """
    depth_C1 = counts_CG.sum(1, keepdim=True).clamp(min=1)
    log_mean = torch.log(depth_C1) + log_share_CG.masked_fill(~panel_CG, 0.0)
    if log_dispersion_G is None:
        nll = log_mean.exp() - counts_CG * log_mean + torch.lgamma(counts_CG + 1)
    else:
        r_G = functional.softplus(log_dispersion_G) + 1e-4
        log_r_plus_mean = torch.logaddexp(r_G.log(), log_mean)
        nll = (
            torch.lgamma(r_G)
            + torch.lgamma(counts_CG + 1)
            - torch.lgamma(counts_CG + r_G)
            - r_G * (r_G.log() - log_r_plus_mean)
            - counts_CG * (log_mean - log_r_plus_mean)
        )
    return (nll * panel_CG).sum(1) / panel_CG.sum(1).clamp(min=1)


def reconstruction_loss(
    model: CellModel, logits: dict[str, Tensor], counts: dict[str, Tensor], panels: dict[str, Tensor]
) -> Loss:
    """Compare predicted rates with the cells' own counts, in every measurement that the cell has.

    Args:
        model: Gives the dispersions.
        logits: Measurement to logits_CG.
        counts: Measurement to counts_CG.
        panels: Measurement to panel_CG: features measured in the cell; a row of False is a cell without it.
    """
    device = next(iter(logits.values())).device
    total, pairs = torch.zeros((), device=device), torch.zeros((), device=device)
    per_measurement = {}
    for name, panel_CG in panels.items():
        has_C = panel_CG.any(1)
        shares = log_rates(logits[name][has_C], panel_CG[has_C])
        nll_C = negative_log_likelihood(counts[name][has_C], shares, panel_CG[has_C], model.log_dispersion(name))
        total = total + nll_C.sum() + 0.0 * logits[name].sum()
        pairs = pairs + has_C.sum()
        per_measurement[name] = nll_C.detach().sum()
    return Loss(total, pairs, per_measurement)
