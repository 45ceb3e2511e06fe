"""This module judges predicted effects of perturbations, with the metrics of cell-eval2.

What judges are a fold's held-out perturbed cells, and the controls of its held groups in the same context: of a donor
his own. Where these are too few (by target no control is held out), they are all controls of the context. Half of each
are the truth; the other half is the replicate, and gives the control cells that methods start from. Methods and
replicate are compared with the same half, of which no cell was learned from: where controls are learned from and judge,
it is those of the other half that are learned from.

Shape letters used in this module:
    C  cells      G  features
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from store.errors import InputRefused
from train.evaluation import differential
from train.evaluation.effects import MIN_CELLS, EffectMethod, contexts, halves, profile
from train.evaluation.folds import UNPERTURBED, Fold
from train.evaluation.score import REPLICATE, Value, Way
from train.evaluation.study import Study
from train.start import log_shares

CONTROL = "non-targeting"
TOLD_APART, CAPPED, UNCAPPED = "pds_cosine", "expr_mse_unbiased_capped", "expr_mse_unbiased"
METRICS: dict[str, Way] = {TOLD_APART: "higher", CAPPED: "lower", **differential.METRICS}
"""Discrimination (is the predicted effect nearer to its own truth than to others'?), the squared error, corrected for
sampling noise, and fold changes of the features that truly change. Metrics that ask which features a prediction calls
changed need predicted cells, not profiles."""

LEVEL = 0.9
SIZE = "size of effects"
"""Root mean square over features; of the replicate as measured, its noise included. It is told, not scored."""
Profile = NDArray[np.float64]
Question = tuple[str, str]
"""A perturbation in a context."""


@runtime_checkable
class WithIntervals(Protocol):
    """A method that says how sure it is."""

    def interval(self, control: Study, perturbation: str, context: str, level: float) -> tuple[Profile, Profile]:
        """Return low_G and high_G of an effect."""


def perturb_suite(
    study: Study,
    folds: Sequence[Fold],
    methods: Mapping[str, Callable[[int], EffectMethod]],
    measurement: str = "RNA",
    columns: Sequence[str] = ("cell_type",),
    seeds: Iterable[int] = range(3),
) -> list[Value]:
    """Fit methods on each fold's training cells, ask for its held-out effects, and measure the answers.

    An effect of which folds hold out different cells, as of several donors, is a unit in each of them. A fold's effects
    are told apart among themselves only, so that one training set (and one training mean) answers for all that
    is compared: means that leave out what they are scored on anticorrelate with it.

    Args:
        study: The cells.
        folds: What is held out.
        methods: Name to what makes a method of a seed.
        measurement: What is predicted.
        columns: What makes a context.
        seeds: Of methods and of the halves.

    Returns:
        One value for each method (and the replicate), metric, effect and seed, and the size of each effect; of methods
        that say how sure they are, also the coverage of their intervals, of effects as all held-out cells show them.

    Raises:
        InputRefused: No held-out effect has enough cells, or none has a control in its context.
    """
    values: list[Value] = []
    several = _in_several(study, folds, columns)
    for seed in seeds:
        for fold in folds:
            judging = _judged(study, fold, columns, seed)
            if not judging.hit:
                continue
            answers: dict[str, dict[Question, Profile]] = {name: {} for name in (*methods, REPLICATE)}
            train = study.take(fold.train_C & ~judging.true_controls())
            fitted = {name: make(seed).fit(train) for name, make in methods.items()}
            units = {
                question: " | ".join(filter(None, (*question, fold.name if question in several else "")))
                for question in judging.hit
            }
            for question, unit in units.items():
                control = study.take(judging.control[question[1]] & judging.other_C)
                truth_G = _effect(study, question, judging, measurement)
                values.append(Value(REPLICATE, SIZE, unit, seed, _size(truth_G)))
                for name, method in fitted.items():
                    delta_G = method.predict(control, *question)
                    values.append(Value(name, SIZE, unit, seed, _size(delta_G)))
                    answers[name][question] = profile(control.measured(measurement)) + delta_G
                    if isinstance(method, WithIntervals):
                        low_G, high_G = method.interval(control, *question, level=LEVEL)
                        seen_G = np.asarray(study.measured(measurement).sum(axis=0)).ravel() > 0
                        inside = float(((low_G <= truth_G) & (truth_G <= high_G))[seen_G].mean())
                        values.append(Value(name, f"coverage of {LEVEL:.0%} intervals", unit, seed, inside))
                        width = float(np.median((high_G - low_G)[seen_G]))
                        values.append(Value(name, f"width of {LEVEL:.0%} intervals", unit, seed, width))
            for context in sorted({where for _, where in judging.hit}):
                values += [
                    Value(method, metric, units[name, context], seed, value)
                    for method, metric, name, value in _measured(study, answers, context, judging, measurement)
                ]
    if not values:
        raise InputRefused(
            f"no held-out perturbation has {2 * MIN_CELLS} cells beside controls of the same context; hold out others"
        )
    return values


def _in_several(study: Study, folds: Sequence[Fold], columns: Sequence[str]) -> set[Question]:
    """Return the effects of which folds hold out different cells; the same ones come again with another target."""
    question_C = list(zip(study.label("perturbation"), contexts(study, columns), strict=True))
    first: dict[Question, set[int]] = {}
    for fold in folds:
        rows = np.flatnonzero(fold.test_C).tolist()
        for question, row in {question_C[row]: row for row in reversed(rows)}.items():
            first.setdefault(question, set()).add(row)
    return {question for question, rows in first.items() if len(rows) > 1}


@dataclass(frozen=True)
class _Judging:
    """What judges in a fold.

    Attributes:
        hit: Held-out effects with enough cells in both halves, to their cells.
        control: Context to the controls that they are measured against.
        truth_C, other_C: The halves of all cells.
    """

    hit: dict[Question, NDArray[np.bool_]]
    control: dict[str, NDArray[np.bool_]]
    truth_C: NDArray[np.bool_]
    other_C: NDArray[np.bool_]

    def true_controls(self) -> NDArray[np.bool_]:
        """Return which controls are of the half that is the truth: no method learns from them."""
        judging_C: NDArray[np.bool_] = np.any([self.control[where] for _, where in self.hit], axis=0)
        return judging_C & self.truth_C


def _judged(study: Study, fold: Fold, columns: Sequence[str], seed: int) -> _Judging:
    """Choose the cells that judge in a fold, and halve them."""
    perturbation_C, context_C = study.label("perturbation"), contexts(study, columns)
    unperturbed_C = np.isin(perturbation_C, UNPERTURBED)
    held_C = fold.test_C & ~unperturbed_C
    truth_C, other_C = halves(study, columns, seed, np.where(unperturbed_C, fold.group_C, fold.test_C))

    def enough(chosen_C: NDArray[np.bool_]) -> bool:
        return all((chosen_C & half_C).sum() >= MIN_CELLS for half_C in (truth_C, other_C))

    control = {}
    for context in set(context_C[held_C]):
        here_C = unperturbed_C & (context_C == context)
        own_C = here_C & fold.group_C
        control[context] = own_C if enough(own_C) else here_C
    hit = {
        (name, context): held_C & (perturbation_C == name) & (context_C == context)
        for name, context in sorted(set(zip(perturbation_C[held_C], context_C[held_C], strict=True)))
    }
    asked = {question: hit_C for question, hit_C in hit.items() if enough(hit_C) and enough(control[question[1]])}
    return _Judging(asked, control, truth_C, other_C)


def _size(delta_G: Profile) -> float:
    return float(np.sqrt((delta_G**2).mean()))


def _effect(study: Study, question: Question, judging: _Judging, measurement: str) -> Profile:
    """Return the effect as all of its held-out cells show it, beside controls that nobody learned from."""
    counts_CG = study.measured(measurement)
    true_control_C = judging.control[question[1]] & judging.truth_C
    return profile(counts_CG[judging.hit[question]]) - profile(counts_CG[true_control_C])


def _measured(
    study: Study,
    answers: Mapping[str, Mapping[Question, Profile]],
    context: str,
    judging: _Judging,
    measurement: str,
) -> list[tuple[str, str, str, float]]:
    """Return method, metric, perturbation and value: how the answers in one context compare with the truth.

    Features that any of its perturbations hits do not count.
    """
    hit = {name: hit_C for (name, where), hit_C in judging.hit.items() if where == context}
    names, plain_C, truth_C, other_C = sorted(hit), judging.control[context], judging.truth_C, judging.other_C
    asked_C = np.any(list(hit.values()), axis=0)
    features = study.features[measurement]
    places, kept = study.places(measurement), np.ones(len(features), dtype=bool)
    kept[[places[target] for name in names for target in name.split("+") if target in places]] = False
    truth = _cells(study, (plain_C | asked_C) & truth_C, measurement)
    control = _cells(study, plain_C & other_C, measurement)
    depth = float(np.median(np.asarray(truth.X.sum(axis=1))))
    values = []
    for method, given in answers.items():
        if method == REPLICATE:
            predicted = _cells(study, (plain_C | asked_C) & other_C, measurement)
        else:
            profiles = np.stack([np.expm1(given[name, context]).clip(0) for name in names])
            shares = profiles / profiles.sum(axis=1, keepdims=True)
            told = _anndata(csr_matrix(np.repeat(shares * depth, 2, axis=0)), np.repeat(names, 2), features)
            predicted = anndata.concat([control, told], index_unique="-", keys=["control", "told"])
        alone = len(names) == 1  # nothing to be told apart from
        for metric, name, value in _compared(predicted[:, kept], truth[:, kept], alone=alone):
            undefined = alone and metric == TOLD_APART
            values.append((method, metric, name, math.nan if undefined else value))
    told = {
        method: {name: one[name, context] for name in names} for method, one in answers.items() if method != REPLICATE
    }
    return values + _changed(study.measured(measurement), told, hit, plain_C, truth_C, other_C, kept)


def _changed(
    counts_CG: csr_matrix,
    told: Mapping[str, Mapping[str, Profile]],
    hit: Mapping[str, NDArray[np.bool_]],
    plain_C: NDArray[np.bool_],
    truth_C: NDArray[np.bool_],
    other_C: NDArray[np.bool_],
    kept: NDArray[np.bool_],
) -> list[tuple[str, str, str, float]]:
    """Return method, metric, perturbation and value: what is told of the features that change in the true cells."""
    plain = {half: counts_CG[plain_C & of_C] for half, of_C in (("truth", truth_C), ("other", other_C))}
    before = {half: profile(part) for half, part in plain.items()}
    true, again, chance = {}, {}, {}
    plain_logs = log_shares(plain["truth"])[:, kept]
    for name, hit_C in hit.items():
        treated = counts_CG[hit_C & truth_C]
        true[name] = (profile(treated) - before["truth"])[kept]
        again[name] = (profile(counts_CG[hit_C & other_C]) - before["other"])[kept]
        chance[name] = differential.chances(log_shares(treated)[:, kept], plain_logs)
    effects = {method: {name: (one[name] - before["other"])[kept] for name in hit} for method, one in told.items()}
    return [
        (method, *value)
        for method, effect in {**effects, REPLICATE: again}.items()
        for value in differential.compared(effect, true, chance)
    ]


def _compared(predicted: Any, truth: Any, *, alone: bool) -> list[tuple[str, str, float]]:
    """Return metric, perturbation and value, from cell-eval2.

    What it takes off the error for the sampling noise of predicted cells is capped by how far predictions lie apart. Of
    one perturbation ``alone`` that is nothing, and all noise of the replicate would count: there is no cap then.
    """
    error = UNCAPPED if alone else CAPPED
    from cell_eval2 import EvalConfig, compute_metrics

    logging.getLogger("cell_eval2").setLevel(logging.ERROR)  # it warns of fractional counts, which profiles are
    config = EvalConfig(
        metrics=[TOLD_APART, error],
        pert_col="target",
        control=CONTROL,
        allow_fractional_counts=True,
        device="cpu",
        num_threads=1,
        target_gene_map={"*": None},  # left out already, also those of combinations
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same, once more
        table = compute_metrics(predicted, truth, config=config)
    rows = zip(*(table[column].to_list() for column in ("metric", "perturbation", "value")), strict=True)
    return [
        (CAPPED if metric == error else metric, unit, float("nan") if value is None else float(value))
        for metric, unit, value in rows
        if metric in (TOLD_APART, error)
    ]


def _cells(study: Study, chosen_C: NDArray[np.bool_], measurement: str) -> Any:
    label = np.where(np.isin(study.label("perturbation"), UNPERTURBED), CONTROL, study.label("perturbation"))
    return _anndata(study.measured(measurement)[chosen_C], label[chosen_C], study.features[measurement])


def _anndata(counts_CG: Any, label_C: Any, features: list[str]) -> Any:
    obs = pd.DataFrame({"target": np.asarray(label_C, dtype=str)}, index=np.arange(len(label_C)).astype(str))
    return anndata.AnnData(counts_CG, obs=obs, var=pd.DataFrame(index=pd.Index(features, dtype=str)))
