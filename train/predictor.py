"""This module answers questions with a checkpoint: embeddings and effects of perturbations. No chance is in an answer.

Shape letters used in this module:
    C  cells      D  width      G  features of a measurement
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from store.errors import InputRefused
from train import checkpoint
from train.cells import CONTROL, NUMBERS, PROMPTS, Cells, Csr
from train.checkpoint import Vocabulary
from train.likelihood import log_rates
from train.tokens import SCALE, Tokens, make_tokens

BATCH_CELLS = 256


@dataclass(frozen=True)
class Effect:
    """Predicted mean log1p of counts per 10,000 of one measurement, over the cells, without and with a perturbation."""

    control_G: NDArray[np.float32]
    perturbed_G: NDArray[np.float32]
    delta_G: NDArray[np.float32]


class Predictor:
    """A loaded checkpoint; the same cells get the same answer, within float rounding whatever they are batched with."""

    def __init__(self, loaded: checkpoint.Checkpoint, device: str = "cpu") -> None:
        self.model = loaded.model
        self.tokens = loaded.tokens
        self.vocabulary: dict[str, Vocabulary] = loaded.vocabulary
        self.prompts: dict[str, list[str]] = loaded.prompts
        self.manifest: dict[str, Any] = loaded.manifest
        self.device = torch.device(device)
        self._code = {name: {value: code for code, value in enumerate(values)} for name, values in self.prompts.items()}
        self._organism_G = {name: np.array(part.organism, dtype=object) for name, part in self.vocabulary.items()}

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> Predictor:
        """Load a checkpoint directory.

        Raises:
            MissingError: No checkpoint there.
            InputRefused: A file differs from the manifest, or the format is another.
        """
        return cls(checkpoint.load(path, device), device)

    def cells(self, counts: dict[str, csr_matrix], prompts: dict[str, list[str]] | None = None) -> Cells:
        """Bring cells into the model's form.

        Args:
            counts: Measurement to raw counts_CG, columns in the vocabulary's order; what is left out was not measured.
            prompts: Field to one text per cell: the fields of ``prompts``, "time" and "dose" as numbers. "" is "not
                said"; an organism that is not said is taken from the features that have counts.

        Raises:
            InputRefused: An unknown measurement, field or value, lengths that differ, columns that are not the
                vocabulary's, or counts that are negative or no numbers.
        """
        prompts = prompts or {}
        n_cells = _common_length(counts, prompts)
        for name, part in counts.items():
            self._check(name, part)
        fields = {*PROMPTS, *NUMBERS, "perturbation"}
        strange = sorted(set(prompts) - fields)
        if strange:
            raise InputRefused(f"prompts: no field {strange[0]!r}; fields: {', '.join(sorted(fields))}")
        codes = {name: self._codes(name, prompts.get(name, [""] * n_cells)) for name in PROMPTS}
        guessed = self._guess_organism(counts, n_cells)
        codes["organism"] = np.where(codes["organism"] > 0, codes["organism"], guessed).astype(np.int32)
        return Cells(
            n_cells=n_cells,
            counts={name: _csr(part) for name, part in counts.items()},
            measured={name: np.ones(n_cells, dtype=bool) for name in counts},
            panel=np.full(n_cells, -1, dtype=np.int32),
            prompts=codes,
            perturbation=self._perturbations(prompts.get("perturbation", [""] * n_cells)),
            numbers={name: _numbers(name, prompts.get(name), n_cells) for name in NUMBERS},
            row=np.zeros(n_cells, dtype=np.int64),
        )

    def _check(self, name: str, counts: csr_matrix) -> None:
        if name not in self.vocabulary:
            raise InputRefused(f"counts: no measurement {name!r}; the model knows {', '.join(self.vocabulary)}")
        n_features = len(self.vocabulary[name].feature_id)
        if counts.shape[1] != n_features:
            raise InputRefused(
                f"counts.{name} has {counts.shape[1]} columns and the model's vocabulary {n_features} features; bring "
                "the columns into the order of vocabulary.json"
            )
        if not (np.isfinite(counts.data).all() and (counts.data >= 0).all()):
            raise InputRefused(f"counts.{name} holds values that are negative or no numbers; send raw counts")

    def _codes(self, field: str, values: list[str]) -> NDArray[np.int32]:
        known = self._code[field]
        for value in set(values) - set(known):
            near = difflib.get_close_matches(value, list(known), n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the model knows {len(known) - 1}"
            raise InputRefused(f"{field} {value!r} was never seen in training; {hint}")
        return np.array([known[value] for value in values], dtype=np.int32)

    def _perturbations(self, values: list[str]) -> NDArray[np.int32]:
        split = [value.split("+") for value in values]
        width = max([1, *(len(parts) for parts in split)])
        return np.stack(
            [
                self._codes("perturbation", [parts[i] if i < len(parts) else "" for parts in split])
                for i in range(width)
            ],
            axis=1,
        )

    def _guess_organism(self, counts: dict[str, csr_matrix], n_cells: int) -> NDArray[np.int32]:
        names = self.prompts["organism"]
        seen = np.zeros((n_cells, len(names)))
        for name, part in counts.items():
            for code, organism in enumerate(names[1:], start=1):
                seen[:, code] += np.asarray((part[:, self._organism_G[name] == organism] > 0).sum(axis=1)).ravel()
        return np.where(seen.any(axis=1), seen.argmax(axis=1), 0).astype(np.int32)

    def n_tokens(self, cells: Cells) -> NDArray[np.int64]:
        """Return how many tokens each cell takes in the encoder."""
        nonzeros = sum((np.diff(part.indptr) for part in cells.counts.values()), np.zeros(cells.n_cells, np.int64))
        config = self.model.config
        beside = 1 + len(PROMPTS) + 3 + config.pathways + config.bottlenecks * len(cells.counts)
        return np.minimum(nonzeros, self.tokens.budget) + beside

    def embed(self, cells: Cells) -> NDArray[np.float32]:
        """Return embeddings_CD."""
        with torch.inference_mode():
            parts = [self.model.embed(tokens)[0].float().cpu().numpy() for _, tokens in self._batches(cells)]
        return np.concatenate(parts) if parts else np.zeros((0, self.model.config.width), dtype=np.float32)

    def perturb(self, cells: Cells, perturbation: list[str]) -> dict[str, Effect]:
        """Predict what hitting these targets together does to the cells, on average; their order does not matter.

        Raises:
            InputRefused: A target that was never seen in training, or no cells.
        """
        named = sorted({target for targets in perturbation for target in targets.split("+")})
        if cells.n_cells == 0 or not named or "" in named:
            raise InputRefused(f"perturb needs at least one cell, and targets with names; got {perturbation!r}")
        without, with_it = self._both(cells, "+".join(named), lambda share_CG: torch.log1p(share_CG * SCALE))
        return {name: Effect(without[name], with_it[name], with_it[name] - without[name]) for name in self.vocabulary}

    def mean_shares(
        self, cells: Cells, perturbation: str
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """Return the cells' mean share_G of counts of every measurement, without and with a perturbation.

        Raises:
            InputRefused: A target that was never seen in training.
        """
        return self._both(cells, perturbation, lambda share_CG: share_CG)

    def _both(
        self, cells: Cells, perturbation: str, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        targets = self._perturbations([perturbation])
        hit = replace(cells, perturbation=np.repeat(targets, cells.n_cells, axis=0))
        control = replace(cells, perturbation=np.full((cells.n_cells, 1), CONTROL, dtype=np.int32))
        return self._mean(control, change), self._mean(hit, change)

    def _mean(self, cells: Cells, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, NDArray[np.float32]]:
        total = {name: np.zeros(len(part.feature_id)) for name, part in self.vocabulary.items()}
        for name, share_CG in self._shares(cells, tuple(self.vocabulary)):
            total[name] += change(share_CG).sum(0).double().cpu().numpy()
        return {name: (part / cells.n_cells).astype(np.float32) for name, part in total.items()}

    def shares(self, cells: Cells, measurement: str) -> NDArray[np.float32]:
        """Return each cell's predicted share_CG of the counts of a measurement, whether it was measured or not."""
        parts = [share_CG.cpu().numpy() for _, share_CG in self._shares(cells, (measurement,))]
        return (
            np.concatenate(parts) if parts else np.zeros((0, len(self.vocabulary[measurement].feature_id)), np.float32)
        )

    def _shares(self, cells: Cells, measurements: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield, batch by batch, the share_CG of counts of each measurement."""
        with torch.inference_mode():
            for rows, tokens in self._batches(cells):
                _, logits, _ = self.model(tokens)
                for name in measurements:
                    yield name, log_rates(logits[name].float(), self._panel(name, cells.take(rows))).exp()

    def _panel(self, name: str, cells: Cells) -> torch.Tensor:
        """Return panel_CG: the features of the cell's organism; all where nobody knows it or it has none."""
        names = np.array(self.prompts["organism"], dtype=object)[cells.prompts["organism"]]
        panel = self._organism_G[name][None, :] == names[:, None]
        panel[~panel.any(axis=1)] = True
        return torch.from_numpy(panel).to(self.device)

    def _batches(self, cells: Cells) -> Iterator[tuple[NDArray[np.int64], Tokens]]:
        for start in range(0, cells.n_cells, BATCH_CELLS):
            rows = np.arange(start, min(start + BATCH_CELLS, cells.n_cells), dtype=np.int64)
            yield rows, make_tokens(cells.take(rows), self.model.config.offsets, self.tokens, device=self.device)


def _csr(counts: csr_matrix) -> Csr:
    counts = csr_matrix(counts, dtype=np.float32, copy=True)  # the caller's matrix stays as it is
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return Csr(counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data)


def _common_length(counts: dict[str, csr_matrix], prompts: dict[str, list[str]]) -> int:
    lengths = {name: part.shape[0] for name, part in counts.items()} | {name: len(p) for name, p in prompts.items()}
    if not counts or len(set(lengths.values())) != 1:
        raise InputRefused(f"counts and prompts say different numbers of cells: {lengths or 'none'}")
    return next(iter(lengths.values()))


def _numbers(name: str, values: list[str] | None, n_cells: int) -> NDArray[np.float32]:
    try:
        return np.array([float(value) if value != "" else np.nan for value in values or [""] * n_cells], np.float32)
    except ValueError as error:
        raise InputRefused(f"prompts.{name}: {error}; give numbers") from None
