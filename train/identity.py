"""This module is what tokens begin as: who a feature is and its value, sets of features, and prompts.

Shape letters used in this module:
    C  cells      N  tokens      D  width      F  features, or fields      E  memberships      S  sets      P  pathways
    W  bases of a window      U  different features
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.asked import TASKS, Asked, ask
from train.attention import Segments
from train.blocks import Block
from train.config import ModelConfig
from train.fourier import FOURIER, fourier
from train.tokens import Tokens

MEGABASE = 1e6


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


class Levels(nn.Module):
    """Turns levels in a source's unit into standard deviations from the feature's mean; counts pass as they are.

    A level that is not found is taken to be below the least that was found of the feature in training.
    """

    logged_F: Tensor
    center_F: Tensor
    scale_F: Tensor
    limit_F: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_features = 1 + sum(config.n_features.values())
        self.register_buffer("logged_F", torch.zeros(n_features, dtype=torch.bool))
        self.register_buffer("center_F", torch.zeros(n_features))
        self.register_buffer("scale_F", torch.ones(n_features))
        self.register_buffer("limit_F", torch.zeros(n_features))

    def learn(self, first: int, logged: bool, center_G: Tensor, scale_G: Tensor, limit_G: Tensor) -> None:
        """Take what ``train.start.standards`` found of a measurement whose first feature has this number."""
        these = slice(first, first + len(center_G))
        self.logged_F[these] = logged
        for mine, found in ((self.center_F, center_G), (self.scale_F, scale_G), (self.limit_F, limit_G)):
            mine[these] = found

    def forward(self, value: Tensor, feature: Tensor) -> Tensor:
        """Return standardised values, of features by their numbers among all."""
        number = feature.long()
        value = torch.where(self.logged_F[number], torch.log1p(value.clamp(min=0)), value)
        return (value - self.center_F[number]) / self.scale_F[number]

    def back(self, value: Tensor, feature: Tensor) -> Tensor:
        """Return standardised values in the source's unit; where logs are taken, log1p of it."""
        number = feature.long()
        return value * self.scale_F[number] + self.center_F[number]


class Stem(nn.Module):
    """Reads a window of bases, both strands alike: short patterns, patterns of these, and whether they are there.

    The two strands go through the same filters and the stronger answer counts, so that a window and its reverse
    complement are the same.
    """

    def __init__(self, width: int, filters: int = 32) -> None:
        super().__init__()
        self.patterns = nn.Conv1d(4, filters, 15, padding=7)
        self.together = nn.Conv1d(filters, filters, 5, padding=4, dilation=2)
        self.out = nn.Linear(2 * filters, width)

    def forward(self, bases_FW: Tensor) -> Tensor:
        """Return a vector for each window of codes 1 to 4; 0 is unknown."""
        one_hot = torch.stack([bases_FW == code for code in range(1, 5)], dim=1).to(self.patterns.weight.dtype)
        forward, backward = (self._read(strand) for strand in (one_hot, one_hot.flip(1, 2)))
        read: Tensor = self.out(torch.maximum(forward, backward))
        return read * bases_FW.any(1, keepdim=True)

    def _read(self, one_hot: Tensor) -> Tensor:
        found = functional.max_pool1d(functional.gelu(self.patterns(one_hot)), 4, ceil_mode=True)
        found = found + functional.gelu(self.together(found))
        return torch.cat([found.mean(2), found.amax(2)], dim=1)


class Identity(nn.Module):
    """What a feature is: a vector of its own, what its sets have in common, and what is known of it from elsewhere.

    Known of it may be vectors that were learned elsewhere, its chromosome and its place there, and the bases around it.

    In training some features are taken for unknown: one of a few shared vectors stands for their own, so that features
    which come later (``train.grow``) find vectors that the model has learned to do with. The sum over sets is divided
    by the root of how many there are, so that features of many sets are not louder.
    """

    set_E: Tensor
    border_F: Tensor
    chromosome_F: Tensor
    base_F: Tensor
    bases_FW: Tensor

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

        self.chromosome: nn.Embedding | None = None
        if config.n_chromosomes:
            self.chromosome = nn.Embedding(1 + config.n_chromosomes, config.width, padding_idx=0)
            self.base = nn.Linear(2 * FOURIER + 2, config.width, bias=False)
            self.register_buffer("chromosome_F", torch.zeros(n_features, dtype=torch.int64))
            self.register_buffer("base_F", torch.full((n_features,), torch.nan))
        self.stem: Stem | None = None
        if config.window:
            self.stem = Stem(config.width)
            self.register_buffer("bases_FW", torch.zeros(n_features, config.window, dtype=torch.uint8))

    def forward(self, feature: Tensor, unknown_F: Tensor | None = None) -> Tensor:
        """Return the vectors of features, by their numbers among all; shared ones for those taken for unknown."""
        embedded: Tensor = self.own(feature)
        if unknown_F is not None:
            numbers = feature.long()
            shared = self.shared(numbers % self.shared.num_embeddings)
            embedded = torch.where(unknown_F[numbers].unsqueeze(-1), shared, embedded)
        shared = [part for part in (self.sets, self.stem) if part is not None]
        if shared and len(feature) == 0:
            embedded = embedded + 0.0 * sum(weight.sum() for part in shared for weight in part.parameters())
        elif shared:
            different_U, where = torch.unique(feature.long(), return_inverse=True)
            embedded = embedded + self._in_common(different_U, embedded.dtype)[where]
        if self.chromosome is not None:
            place = fourier(self.base_F[feature.long()].unsqueeze(-1) / MEGABASE)
            embedded = embedded + self.chromosome(self.chromosome_F[feature.long()]) + self.base(place)
        for kind, adapter in self.adapters.items():
            embedded = embedded + adapter(self.get_buffer(f"frozen_{kind}")[feature.long()])
        return embedded

    def _in_common(self, different_U: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what some features are by their sets and their bases."""
        known = torch.zeros(len(different_U), self.own.embedding_dim, dtype=dtype, device=different_U.device)
        if self.sets is not None:
            set_E, degree_U = self.memberships(different_U)
            weight_E = torch.repeat_interleave(degree_U.clamp(min=1).to(dtype).rsqrt(), degree_U)
            first_U = torch.cumsum(degree_U, 0) - degree_U
            known = known + self.sets(set_E, first_U, per_sample_weights=weight_E)
        if self.stem is not None:
            known = known + self.stem(self.bases_FW[different_U])
        return known

    def memberships(self, feature_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sets that features are in, on end, and in how many each of them is."""
        degree_N = self.border_F[feature_N + 1] - self.border_F[feature_N]
        first_N = torch.cumsum(degree_N, 0) - degree_N
        place_E = torch.repeat_interleave(self.border_F[feature_N] - first_N, degree_N)
        return self.set_E[place_E + torch.arange(len(place_E), device=place_E.device)], degree_N

    def lie(self, chromosome_F: Tensor, base_F: Tensor, bases_FW: Tensor) -> None:
        """Take where features lie, [1 + F], and the bases of their windows, [1 + F, W]; what was not built is left."""
        with torch.no_grad():
            if self.chromosome is not None:
                self.chromosome_F.copy_(chromosome_F)
                self.base_F.copy_(base_F)
            if self.stem is not None:
                self.bases_FW.copy_(bases_FW)

    def know(self, feature_E: Tensor, set_E: Tensor, vectors: dict[str, Tensor]) -> None:
        """Take memberships, in ascending order of features, and frozen vectors [1 + F, K]."""
        with torch.no_grad():
            self.set_E.copy_(set_E)
            count_F = torch.bincount(feature_E, minlength=len(self.border_F) - 1)
            self.border_F[1:] = torch.cumsum(count_F, 0)
            for kind, values in vectors.items():
                self.get_buffer(f"frozen_{kind}").copy_(values)


class Pathways(nn.Module):
    """A token for each of the largest sets, which reads the visible members of its set and nothing else of the cell.

    A set without a visible member is what its token is by itself: nothing was seen, which is not the same as zero.
    """

    chosen_S: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.own = nn.Embedding(config.pathways, config.width)
        self.block = Block(config.width, config.heads)
        self.register_buffer("chosen_S", torch.full((config.n_sets,), -1, dtype=torch.int64))

    def choose(self, set_E: Tensor) -> None:
        """Let tokens stand for the sets with most members; of equals, the first."""
        size_S = torch.bincount(set_E, minlength=len(self.chosen_S))
        largest = torch.argsort(size_S, descending=True, stable=True)[: self.own.num_embeddings].sort().values
        self.chosen_S.fill_(-1)
        self.chosen_S[largest] = torch.arange(len(largest), device=largest.device)

    def forward(
        self, features_ND: Tensor, feature_N: Tensor, cell_N: Tensor, n_cells: int, identity: Identity
    ) -> Tensor:
        """Return tokens_CPD.

        Args:
            features_ND: What is known of each visible feature.
            feature_N: Its number among all.
            cell_N: Its cell.
            n_cells: C.
            identity: Knows who is in which set.
        """
        n_pathways = self.own.num_embeddings
        set_E, degree_N = identity.memberships(feature_N.long())
        pathway_E = self.chosen_S[set_E]
        token_E = torch.repeat_interleave(torch.arange(len(feature_N), device=set_E.device), degree_N)[pathway_E >= 0]
        pathway_E = pathway_E[pathway_E >= 0]
        segment_E, order_E = torch.sort(cell_N[token_E] * n_pathways + pathway_E, stable=True)
        read = Segments.of(torch.bincount(segment_E, minlength=n_cells * n_pathways))
        each = Segments.of(torch.ones(n_cells * n_pathways, dtype=torch.int64, device=set_E.device))
        x = self.own.weight.repeat(n_cells, 1)
        return self.block(x, each, features_ND[token_E[order_E]], read).view(n_cells, n_pathways, -1)


class Prompts(nn.Module):
    """Embed what is said and asked of a cell.

    Said: codes, perturbation targets (summed), numbers (Fourier), depths. Asked: the task, which measurements at what
    depth, and how much later (Fourier).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(size, config.width) for size in config.n_prompts.values())
        self.perturbation = nn.Embedding(config.n_perturbations, config.width, padding_idx=0)
        self.numbers = nn.Linear(config.n_numbers * (2 * FOURIER + 2), config.width)
        self.depth = nn.Linear(2 * len(config.n_features), config.width)
        self.task = nn.Embedding(len(TASKS), config.width)
        self.target = nn.Linear(2 * len(config.n_features), config.width)
        self.elapsed = nn.Linear(2 * FOURIER + 2, config.width)

    def forward(self, tokens: Tokens, asked: Asked | None = None) -> Tensor:
        """Return prompts_CPD, ``ModelConfig.prompt_tokens`` of each cell; nothing is asked where nobody says it."""
        asked = asked or ask(tokens)
        said = [embed(tokens.prompt_CF[:, number]) for number, embed in enumerate(self.fields)]
        said.append(self.perturbation(tokens.perturbation_CT).sum(1))
        said.append(self.numbers(fourier(tokens.number_CF)))
        measured = tokens.measured_CM.float()
        said.append(self.depth(torch.cat([tokens.log_depth_CM * measured / 10, measured], dim=1)))
        said.append(self.task(asked.task_C))
        said.append(self.target(torch.cat([asked.log_depth_CM / 10, asked.target_CM.float()], dim=1)))
        said.append(self.elapsed(fourier(asked.elapsed_C[:, None])))
        return torch.stack(said, dim=1)
