"""This module answers questions with a checkpoint. No chance is in an answer, but in drawn cells, which say their seed.

A task is what is seen, said and asked of cells (``train.asked``): the model is the same for all.

Shape letters used in this module:
    C  cells      D  width      G  features of a measurement      X  features that are asked for
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse, vstack

from store.errors import InputRefused
from train import checkpoint
from train.asked import Asked, ask
from train.cells import CONTROL, NUMBERS, PROMPTS, Cells, Csr
from train.checkpoint import Vocabulary
from train.likelihood import COUNTS, log_rates
from train.niche import Company
from train.novelty import unsaid
from train.objective import company_of
from train.tokens import SCALE, Tokens, make_tokens

Asks = Callable[[Tokens], Asked]
BATCH_CELLS, BATCH_FEATURES = 256, 4_096
MOST_COUNTS = 1e12
"""Counts of a drawn cell at most: what is drawn is a whole number of 64 bits, also where it scatters widely."""


@dataclass(frozen=True)
class Effect:
    """Predicted means of one measurement over the cells, without and with a perturbation.

    Of log1p of counts per 10,000; of fractions and of open chromatin (Bernoulli), chances; of levels, in the source's
    unit, or log1p of it where the model works with logs.
    """

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
        self.reference = loaded.reference
        self.device = torch.device(device)
        self.levels = frozenset(self.model.config.levels)
        """Measurements whose values are levels, not counts."""
        self._code = {name: {value: code for code, value in enumerate(values)} for name, values in self.prompts.items()}
        self._organism_G = {name: np.array(part.organism, dtype=object) for name, part in self.vocabulary.items()}

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> Predictor:
        """Load a checkpoint directory.

        Raises:
            MissingError: No checkpoint there.
            InputRefused: A file differs from the manifest, or the format is another.
            UsageError: The device is not there.
        """
        return cls(checkpoint.load(path, device), device)

    def cells(
        self,
        counts: dict[str, csr_matrix],
        prompts: dict[str, list[str]] | None = None,
        sets: Sequence[int] | None = None,
        places: NDArray[np.float32] | None = None,
    ) -> Cells:
        """Bring cells into the model's form.

        Args:
            counts: Measurement to raw counts_CG, columns in the vocabulary's order; what is left out was not measured,
                and cells of which nothing was are known by their prompts alone.
                Of measurements that hold levels, the stored entries, zeros too, are those that were found.
            prompts: Field to one text per cell: the fields of ``prompts``, "time" and "dose" as numbers. "" is "not
                said"; an organism that is not said is taken from the features that have counts.
            sets: The number of each cell's set, ascending: the cells of a set read each other.
            places: Where each cell is, x and y, [C, 2]; NaN is not known.

        Raises:
            InputRefused: An unknown measurement, field or value, lengths that differ, columns that are not the
                vocabulary's, or counts that are negative, no numbers or no sparse matrix.
        """
        prompts = prompts or {}
        counts = {name: self._checked(name, part) for name, part in counts.items()}
        n_cells = _common_length(counts, prompts)
        fields = {*PROMPTS, *NUMBERS, "perturbation"}
        strange = sorted(set(prompts) - fields)
        if strange:
            raise InputRefused(f"prompts: no field {strange[0]!r}; fields: {', '.join(sorted(fields))}")
        codes = {name: self._codes(name, prompts.get(name, [""] * n_cells)) for name in PROMPTS}
        guessed = self._guess_organism(counts, n_cells)
        codes["organism"] = np.where(codes["organism"] > 0, codes["organism"], guessed).astype(np.int32)
        return Cells(
            n_cells=n_cells,
            counts={name: _csr(part, name in self.model.config.levels) for name, part in counts.items()},
            measured={name: np.ones(n_cells, dtype=bool) for name in counts},
            panel=np.full(n_cells, -1, dtype=np.int32),
            prompts=codes,
            perturbation=self._perturbations(prompts.get("perturbation", [""] * n_cells)),
            numbers={name: _numbers(name, prompts.get(name), n_cells) for name in NUMBERS},
            row=np.zeros(n_cells, dtype=np.int64),
            set_C=_sets(sets, n_cells, self.model.config.niche),
            place_CX=None if places is None else np.asarray(places, np.float32).reshape(n_cells, 2),
        )

    def _refuse_unknown(self, measurement: str) -> None:
        if measurement not in self.vocabulary:
            raise InputRefused(f"no measurement {measurement!r}; the model knows {', '.join(self.vocabulary)}")

    def _checked(self, name: str, counts: csr_matrix) -> csr_matrix:
        self._refuse_unknown(name)
        if not issparse(counts):  # which entries of another one were found, nobody says
            raise InputRefused(f"counts.{name} is a {type(counts).__name__}; give a scipy.sparse.csr_matrix")
        counts = counts.tocsr()
        n_features = len(self.vocabulary[name].feature_id)
        if counts.shape[1] != n_features:
            raise InputRefused(
                f"counts.{name} has {counts.shape[1]} columns and the model's vocabulary {n_features} features; bring "
                "the columns into the order of vocabulary.json"
            )
        least = -np.inf if name in self.model.config.levels else 0
        if not (np.isfinite(counts.data).all() and (counts.data >= least).all()):
            raise InputRefused(f"counts.{name} holds values that are negative or no numbers; send raw counts")
        return counts

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
        beside = 1 + config.prompt_tokens + config.pathways + config.bottlenecks * len(cells.counts)
        return np.minimum(nonzeros, self.tokens.budget) + beside

    def embed(self, cells: Cells) -> NDArray[np.float32]:
        """Return embeddings_CD."""
        with torch.inference_mode():
            parts = [
                self.model.embed(tokens, self._company(cells.take(rows)))[0].float().cpu().numpy()
                for rows, tokens in self._batches(cells)
            ]
        return np.concatenate(parts) if parts else np.zeros((0, self.model.config.width), dtype=np.float32)

    def vectors(self, measurement: str, columns: Sequence[int]) -> NDArray[np.float32]:
        """Return what the model takes features for, vector_XD: their identity, before any cell has a value of them.

        Args:
            measurement: Of the features.
            columns: Their positions in the vocabulary.

        Raises:
            InputRefused: The model does not know the measurement.
        """
        self._refuse_unknown(measurement)
        first = self.model.config.offsets[measurement]
        number_X = torch.tensor(columns, dtype=torch.int32, device=self.device) + first
        with torch.inference_mode():
            parts = [self.model.identity(part).float().cpu().numpy() for part in torch.split(number_X, BATCH_FEATURES)]
        return np.concatenate(parts) if len(columns) else np.zeros((0, self.model.config.width), np.float32)

    def novelty(self, cells: Cells) -> NDArray[np.float32]:
        """Return p_C: how likely a cell of a known kind is to be at least as far from what is known.

        What is said of the cells does not count. NaN where the checkpoint keeps no cells to compare with.
        """
        if self.reference is None:
            return np.full(cells.n_cells, np.nan, np.float32)
        return self.reference.p_values(torch.from_numpy(self.embed(unsaid(cells))))

    def annotate(self, cells: Cells) -> NDArray[np.float32]:
        """Return probability_CY of cell types, in the order of ``prompts["cell_type"]``; "" has none.

        Raises:
            InputRefused: The model was not trained to tell types.
        """
        if self.model.prototypes is None:
            raise InputRefused("this model was not trained to tell cell types: train it with model.types = true")
        parts = []
        with torch.inference_mode():
            for rows, tokens in self._batches(cells):
                company = self._company(cells.take(rows))
                log_type_CY = self.model(tokens, asked=ask(tokens, "annotate"), company=company).log_type_CY
                parts.append(log_type_CY.float().exp().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, len(self.prompts["cell_type"])), np.float32)

    def perturb(self, cells: Cells, perturbation: list[str]) -> dict[str, Effect]:
        """Predict what hitting these targets together does to the cells, on average; their order does not matter.

        Raises:
            InputRefused: A target that was never seen in training, or no cells.
        """
        named = sorted({target for targets in perturbation for target in targets.split("+")})
        if cells.n_cells == 0 or not named or "" in named:
            raise InputRefused(f"perturb needs at least one cell, and targets with names; got {perturbation!r}")
        without, with_it = self._both(cells, "+".join(named), logs=True)
        return {name: Effect(without[name], with_it[name], with_it[name] - without[name]) for name in self.vocabulary}

    def mean_shares(
        self, cells: Cells, perturbation: str
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """Return the cells' mean share_G of counts of every measurement, without and with a perturbation.

        Raises:
            InputRefused: A target that was never seen in training.
        """
        return self._both(cells, perturbation, logs=False)

    def _both(
        self, cells: Cells, perturbation: str, *, logs: bool
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        targets = self._perturbations([perturbation])
        kind_C = cells.prompts["perturbation_type"]
        silent = np.zeros_like(kind_C)
        kind_C = np.where(kind_C == self._code["perturbation_type"].get("none", 0), silent, kind_C)
        hit = replace(
            cells,
            perturbation=np.repeat(targets, cells.n_cells, axis=0),
            prompts=cells.prompts | {"perturbation_type": kind_C},
        )
        control = replace(
            cells,
            perturbation=np.full((cells.n_cells, 1), CONTROL, dtype=np.int32),
            prompts=cells.prompts | {"perturbation_type": silent},
            numbers=cells.numbers | {"dose": np.full(cells.n_cells, np.nan, np.float32)},  # it is the perturbation's
        )
        asked = partial(ask, task="perturb", elapsed=0.0)
        return self._mean(control, asked, logs=logs), self._mean(hit, asked, logs=logs)

    def forecast(self, cells: Cells, elapsed: float) -> dict[str, Effect]:
        """Predict what becomes of the cells after a while, on average; "control" is what they are now.

        Args:
            cells: The cells; where their time is said, it goes on.
            elapsed: How much later, in the units of ``time``.

        Raises:
            InputRefused: No cells, or a span that is no number above 0.
        """
        if cells.n_cells == 0 or not 0 < elapsed < np.inf:
            raise InputRefused(f"forecast needs at least one cell, and a span above 0; got {elapsed}")
        now = self._mean(cells, partial(ask, task="forecast", elapsed=0.0), logs=True)
        later = self._mean(_later(cells, elapsed), partial(ask, task="forecast", elapsed=elapsed), logs=True)
        return {name: Effect(now[name], later[name], later[name] - now[name]) for name in self.vocabulary}

    def draw(
        self,
        cells: Cells,
        measurement: str,
        depth: float | NDArray[np.float64],
        seed: int | Sequence[int] = 0,
        elapsed: float = 0.0,
    ) -> csr_matrix:
        """Draw counts_CG of cells like these, each from the likelihood that the model expects of it.

        Args:
            cells: The cells; one without counts is drawn from what is said of it alone.
            measurement: Of counts.
            depth: Counts of each cell, or of all; the draws have as many on average. The model is told the mean of all.
            seed: The same seed (or seeds together) draws the same.
            elapsed: How much later the drawn cells are.

        Raises:
            InputRefused: No cells, a span below 0, a depth that is no number of 0 or more for all cells or for each, a
                seed that is no whole number of 0 or more, or a measurement that is not of counts or that the model
                does not know.
        """
        if cells.n_cells == 0:
            raise InputRefused("there is no cell to draw")
        if not 0 <= elapsed < np.inf:
            raise InputRefused(f"draw goes on in time, by a span of 0 or more; got {elapsed}")
        if measurement not in self.vocabulary or self.model.config.likelihood_of(measurement) not in COUNTS:
            known = [name for name in self.vocabulary if self.model.config.likelihood_of(name) in COUNTS]
            those = f"of {', '.join(known)} they can" if known else "this model knows no measurement of counts"
            raise InputRefused(f"no counts of {measurement!r} can be drawn; {those}")
        number, task = list(self.vocabulary).index(measurement), "forecast" if elapsed else "reconstruct"
        depth_C, seeds = _depths(depth, cells.n_cells), _seeds(seed)
        asked = partial(
            ask,
            task=task if cells.counts else "generate",
            target=number,
            depth=float(depth_C.mean()),
            elapsed=elapsed,
        )
        random, start, drawn = np.random.default_rng([*seeds, 13]), 0, []
        log_r_G = self.model.log_dispersion(measurement)
        for _, share_CG in self._expected(_later(cells, elapsed), (measurement,), asked):
            rate_CG = share_CG.double().cpu().numpy() * depth_C[start : start + len(share_CG), None]
            if log_r_G is not None:
                r_G = torch.nn.functional.softplus(log_r_G.detach()).double().cpu().numpy() + 1e-4
                rate_CG = rate_CG * random.gamma(r_G, 1 / r_G, rate_CG.shape)
            drawn.append(csr_matrix(random.poisson(rate_CG).astype(np.float32)))
            start += len(share_CG)
        return csr_matrix(vstack(drawn))

    def _mean(self, cells: Cells, asked: Asks, *, logs: bool) -> dict[str, NDArray[np.float32]]:
        total = {name: np.zeros(len(part.feature_id)) for name, part in self.vocabulary.items()}
        for name, expected_CG in self._expected(cells, tuple(self.vocabulary), asked):
            if logs and self.model.config.likelihood_of(name) in COUNTS:
                expected_CG = torch.log1p(expected_CG * SCALE)
            total[name] += expected_CG.sum(0).double().cpu().numpy()
        return {name: (part / cells.n_cells).astype(np.float32) for name, part in total.items()}

    def shares(self, cells: Cells, measurement: str) -> NDArray[np.float32]:
        """Return each cell's predicted share_CG of the counts of a measurement, whether it was measured or not.

        Of other measurements, what is expected of each feature: a chance, a fraction, or a level (see ``Effect``).

        Raises:
            InputRefused: The model does not know the measurement.
        """
        self._refuse_unknown(measurement)
        task = "reconstruct" if measurement in cells.counts else "translate"
        asked = partial(ask, task=task, target=list(self.vocabulary).index(measurement))
        parts = [expected_CG.cpu().numpy() for _, expected_CG in self._expected(cells, (measurement,), asked)]
        return (
            np.concatenate(parts) if parts else np.zeros((0, len(self.vocabulary[measurement].feature_id)), np.float32)
        )

    def unit(self, measurement: str) -> str:
        """Say what the values are that :meth:`shares` returns."""
        likelihood = self.model.config.likelihood_of(measurement)
        if likelihood in COUNTS:
            return "share of the cell's counts"
        return {"gaussian": "level, in the source's unit", "bernoulli": "chance to be open"}.get(likelihood, "fraction")

    def _expected(self, cells: Cells, measurements: tuple[str, ...], asked: Asks) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield, batch by batch, what is expected of each measurement."""
        with torch.inference_mode():
            for rows, tokens in self._batches(cells):
                logits = self.model(tokens, asked=asked(tokens), company=self._company(cells.take(rows))).logits
                for name in measurements:
                    yield name, self._expectation(name, logits[name].float(), cells.take(rows))

    def _expectation(self, name: str, logits_CG: torch.Tensor, cells: Cells) -> torch.Tensor:
        likelihood = self.model.config.likelihood_of(name)
        if likelihood in COUNTS:
            return log_rates(logits_CG, self._panel(name, cells)).exp()
        if likelihood != "gaussian":
            return logits_CG.sigmoid()
        assert self.model.levels is not None
        first = self.model.config.offsets[name]
        return self.model.levels.back(logits_CG, torch.arange(first, first + logits_CG.shape[1], device=self.device))

    def _panel(self, name: str, cells: Cells) -> torch.Tensor:
        """Return panel_CG: the features of the cell's organism; all where nobody knows it or it has none."""
        names = np.array(self.prompts["organism"], dtype=object)[cells.prompts["organism"]]
        panel = self._organism_G[name][None, :] == names[:, None]
        panel[~panel.any(axis=1)] = True
        return torch.from_numpy(panel).to(self.device)

    def _company(self, cells: Cells) -> Company | None:
        return None if cells.set_C is None else company_of(cells, self.device)

    def _batches(self, cells: Cells) -> Iterator[tuple[NDArray[np.int64], Tokens]]:
        start = 0
        while start < cells.n_cells:
            stop = min(start + BATCH_CELLS, cells.n_cells)
            if cells.set_C is not None:  # a set stays whole
                stop = int(np.searchsorted(cells.set_C, cells.set_C[stop - 1], side="right"))
            rows = np.arange(start, stop, dtype=np.int64)
            start = stop
            yield rows, make_tokens(cells.take(rows), self.model.config.offsets, self.tokens, device=self.device)


def _sets(sets: Sequence[int] | None, n_cells: int, niche: bool) -> NDArray[np.int64] | None:
    if sets is None:
        return None
    set_C = np.asarray(sets, dtype=np.int64)
    if not niche:
        raise InputRefused(
            "this model takes cells singly: train it with data.sets = true for cells that read each other"
        )
    if set_C.shape != (n_cells,) or (set_C[1:] < set_C[:-1]).any():
        raise InputRefused(f"sets: one number for each of the {n_cells} cells is needed, ascending")
    return set_C


def _later(cells: Cells, elapsed: float) -> Cells:
    return replace(cells, numbers=cells.numbers | {"time": cells.numbers["time"] + np.float32(elapsed)})


def _csr(counts: csr_matrix, zeros: bool) -> Csr:
    counts = csr_matrix(counts, dtype=np.float32, copy=True)  # the caller's matrix stays as it is
    counts.sum_duplicates()
    if not zeros:
        counts.eliminate_zeros()
    return Csr(counts.indptr.astype(np.int64), counts.indices.astype(np.int32), counts.data)


def _common_length(counts: dict[str, csr_matrix], prompts: dict[str, list[str]]) -> int:
    lengths = {name: part.shape[0] for name, part in counts.items()} | {name: len(p) for name, p in prompts.items()}
    if len(set(lengths.values())) != 1:
        raise InputRefused(f"counts and prompts say different numbers of cells: {lengths or 'none'}")
    return next(iter(lengths.values()))


def _numbers(name: str, values: list[str] | None, n_cells: int) -> NDArray[np.float32]:
    try:
        number_C = np.array([float(value) if value != "" else np.nan for value in values or [""] * n_cells])
    except ValueError as error:
        raise InputRefused(f"prompts.{name}: {error}; give numbers") from None
    if (np.abs(number_C) > np.finfo(np.float32).max).any():
        raise InputRefused(f"prompts.{name}: a number is without end, or too large for 32 bits; give finite numbers")
    return number_C.astype(np.float32)


def _depths(depth: float | NDArray[np.float64], n_cells: int) -> NDArray[np.float64]:
    told = np.asarray(depth, dtype=np.float64)
    if told.shape not in ((), (n_cells,)):
        raise InputRefused(f"depth: one number for all {n_cells} cells, or one for each; got {told.shape}")
    if not ((told >= 0) & (told <= MOST_COUNTS)).all():
        raise InputRefused(f"depth: counts of a cell are from 0 to {MOST_COUNTS:g}; got {depth}")
    return np.broadcast_to(told, n_cells)


def _seeds(seed: int | Sequence[int]) -> list[int]:
    seeds: list[Any] = list(np.atleast_1d(np.asarray(seed, dtype=object)))
    if not seeds or not all(isinstance(one, int | np.integer) and one >= 0 for one in seeds):
        raise InputRefused(f"seed = {seed!r}: say a whole number of 0 or more, or several")
    return [int(one) for one in seeds]
