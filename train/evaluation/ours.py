"""This module puts a checkpoint behind the interfaces of the baselines, so that one loop judges both.

A checkpoint is already trained: its ``fit`` learns nothing new of the model; the audit makes sure that what judges it
was not among what it was trained on.

Shape letters used in this module:
    C  cells      D  width      G, H  features of a measurement
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import gamma, poisson

from store.errors import InputRefused, SomaflowError
from store.snapshot import Snapshot, open_snapshot
from train.cells import NUMBERS, PROMPTS, Cells
from train.evaluation.floor import SameElsewhere
from train.evaluation.folds import UNPERTURBED
from train.evaluation.study import Study
from train.evaluation.suites import shuffled
from train.predictor import Predictor
from train.start import log_shares
from train.tokens import SCALE

NAME = "model"
MOST_CELLS = 1500
Matrix = NDArray[np.float64]


def cells_of(predictor: Predictor, study: Study, measurements: Sequence[str], fields: Sequence[str]) -> Cells:
    """Bring a study's cells into the model's form, features by their ids; what the model does not know is left out.

    A cell is shown what was measured of it: of the others it says nothing, not that nothing was found.

    Args:
        predictor: The model.
        study: The cells.
        measurements: Measurements that are shown.
        fields: Prompts that are said: of ``PROMPTS`` and ``NUMBERS``, and "perturbation"; a value that the model never
            saw is not said.

    Raises:
        InputRefused: No feature of a measurement is known to the model.
    """
    counts = {name: _aligned(predictor, study, name) for name in measurements}
    prompts: dict[str, list[str]] = {}
    for field in fields:
        if field not in study.obs:
            continue
        if field in PROMPTS:
            known = set(predictor.prompts[field])
            prompts[field] = [value if value in known else "" for value in study.label(field)]
        elif field == "perturbation":
            targets = set(predictor.prompts[field])
            said = ["control" if name in UNPERTURBED else name for name in study.label(field)]
            prompts[field] = [name if set(name.split("+")) <= targets else "" for name in said]
        elif field in NUMBERS:
            numbers = study.obs[field].to_numpy(dtype=np.float64)
            prompts[field] = ["" if np.isnan(value) else str(value) for value in numbers]
    return replace(predictor.cells(counts, prompts), measured={name: study.has(name) for name in measurements})


def _aligned(predictor: Predictor, study: Study, measurement: str) -> csr_matrix:
    """Return counts in the order of the model's vocabulary."""
    if measurement not in predictor.vocabulary:
        raise InputRefused(f"the model knows no {measurement}; it knows {', '.join(predictor.vocabulary)}")
    counts_CG = study.measured(measurement).tocoo()
    to_G = _places(predictor, study, measurement)
    kept_N = to_G[counts_CG.col] >= 0
    if not (to_G >= 0).any():
        raise InputRefused(f"no feature of {measurement} is in the model's vocabulary; features go by their ids")
    rows, columns = counts_CG.row[kept_N], to_G[counts_CG.col[kept_N]]
    return csr_matrix(
        (counts_CG.data[kept_N], (rows, columns)),
        shape=(study.n_cells, len(predictor.vocabulary[measurement].feature_id)),
    )


def _places(predictor: Predictor, study: Study, measurement: str) -> NDArray[np.int64]:
    """Return the place in the model's vocabulary of each of the study's features; -1 of those that it does not know."""
    place = {name: number for number, name in enumerate(predictor.vocabulary[measurement].feature_id)}
    return np.array([place.get(name, -1) for name in study.features[measurement]], dtype=np.int64)


def _back(predictor: Predictor, study: Study, measurement: str, share_CH: NDArray[Any]) -> Matrix:
    """Return shares in the order of the study's features; 0 for those that the model does not know."""
    to_H = _places(predictor, study, measurement)
    found = np.where(to_H >= 0, share_CH[..., to_H], 0.0)
    matrix: Matrix = found.astype(np.float64)
    return matrix


class ModelEffects:
    """Effects as the model predicts them; for a target that it never saw, what perturbations do on average."""

    name = NAME

    def __init__(self, predictor: Predictor, measurement: str, columns: Sequence[str] = ("cell_type",)) -> None:
        """Take a loaded model."""
        self.predictor, self.measurement = predictor, measurement
        self.fallback = SameElsewhere(measurement, columns)

    def fit(self, train: Study) -> Self:
        """Fit what answers for unseen targets."""
        self.fallback.fit(train)
        return self

    def predict(self, control: Study, perturbation: str, context: str) -> Matrix:
        """Return delta_G of the mean shares that are predicted without and with the perturbation."""
        known = set(self.predictor.prompts["perturbation"])
        if not set(perturbation.split("+")) <= known:
            return self.fallback.predict(control, perturbation, context)
        shown = [name for name in control.counts if name in self.predictor.vocabulary]
        said = [name for name in (*PROMPTS, *NUMBERS) if name != "perturbation_type"]
        cells = cells_of(self.predictor, control, shown, said)
        without, with_it = self.predictor.mean_shares(cells, perturbation)
        profiles = [
            np.log1p(SCALE * _back(self.predictor, control, self.measurement, one[self.measurement]))
            for one in (without, with_it)
        ]
        delta_G: Matrix = profiles[1] - profiles[0]
        return delta_G


class ModelEmbedder:
    """The model's embeddings; nothing is said of the cells but their organism, least of all their type."""

    name = NAME

    def __init__(self, predictor: Predictor) -> None:
        """Take a loaded model."""
        self.predictor = predictor

    def fit(self, train: Study) -> Self:
        """Learn nothing."""
        return self

    def embed(self, cells: Study) -> Matrix:
        """Return embedding_CD."""
        shown = [name for name in cells.counts if name in self.predictor.vocabulary]
        return self.predictor.embed(cells_of(self.predictor, cells, shown, ("organism",))).astype(np.float64)


class ModelTranslator:
    """One measurement from another, as the model decodes it; nothing is said of the cells but their organism."""

    name = NAME

    def __init__(self, predictor: Predictor, source: str, target: str) -> None:
        """Take a loaded model, and say from which measurement to which."""
        self.predictor, self.source, self.target = predictor, source, target

    def fit(self, train: Study) -> Self:
        """Learn how many counts of the target a cell usually has: the logs of few counts are not those of many."""
        depth_C = np.asarray(train.measured(self.target).sum(axis=1)).ravel()
        self.depth = float(np.median(depth_C[depth_C > 0])) if (depth_C > 0).any() else SCALE
        return self

    def predict(self, cells: Study) -> Matrix:
        """Return expected log shares_CH, of counts as the model's likelihood draws them."""
        share_CH = self.predictor.shares(cells_of(self.predictor, cells, [self.source], ("organism",)), self.target)
        if self.predictor.model.config.likelihood_of(self.target) == "bernoulli":
            return _back(self.predictor, cells, self.target, share_CH) * np.log1p(SCALE / self.depth)
        r_H = _inverse_dispersion(self.predictor, cells, self.target)
        return expected_logs(_back(self.predictor, cells, self.target, share_CH), self.depth, r_H)


class ModelForecaster:
    """Cells of a time, drawn from what the model expects of the training cells of the time before."""

    name = NAME

    def __init__(self, predictor: Predictor, measurement: str, seed: int = 0) -> None:
        """Take a loaded model."""
        self.predictor, self.measurement, self.seed = predictor, measurement, seed

    def fit(self, train: Study) -> Self:
        """Remember the training cells."""
        self.train = train
        return self

    def predict(self, time: float) -> csr_matrix:
        """Return logs_CG of cells that begin at the last time before, or where there is none, stay at the first after.

        What cells were before, the model does not tell.
        """
        time_C = self.train.obs["time"].to_numpy(dtype=np.float64)
        before = time_C[time_C < time]
        start = before.max() if len(before) else np.nanmin(time_C)
        cells = self.train.take(shuffled(np.flatnonzero(time_C == start), self.seed)[:MOST_CELLS])
        shown = [name for name in cells.counts if name in self.predictor.vocabulary]
        form = cells_of(self.predictor, cells, shown, ("organism", "time"))
        depth_C = np.asarray(cells.measured(self.measurement).sum(axis=1), dtype=np.float64).ravel()
        drawn = self.predictor.draw(form, self.measurement, depth_C, self.seed, elapsed=max(0.0, float(time - start)))
        return log_shares(csr_matrix(_back(self.predictor, cells, self.measurement, drawn.toarray()))).astype(
            np.float32
        )


class ModelShares:
    """What the model says of a cell's molecules; nothing is said of the cells but their organism."""

    name = NAME

    def __init__(self, predictor: Predictor, measurement: str) -> None:
        """Take a loaded model."""
        self.predictor, self.measurement = predictor, measurement

    def fit(self, train: Study) -> Self:
        """Learn nothing."""
        return self

    def shares(self, cells: Study) -> Matrix:
        """Return share_CH."""
        found = self.predictor.shares(
            cells_of(self.predictor, cells, [self.measurement], ("organism",)), self.measurement
        )
        return _back(self.predictor, cells, self.measurement, found)

    def dispersion(self, cells: Study) -> Matrix | None:
        """Return the inverse dispersion r_H of the model's likelihood."""
        return _inverse_dispersion(self.predictor, cells, self.measurement)


def _inverse_dispersion(predictor: Predictor, cells: Study, measurement: str) -> Matrix | None:
    """Return r_H of the study's features; None where the likelihood has none."""
    if predictor.model.config.likelihood_of(measurement) != "negative binomial":
        return None
    log_r_G = predictor.model.log_dispersion(measurement)
    assert log_r_G is not None
    r_G = torch.nn.functional.softplus(log_r_G.detach()).cpu().numpy() + 1e-4
    return _back(predictor, cells, measurement, r_G).clip(1e-2)


def expected_logs(share_CH: Matrix, depth: float, r_H: Matrix | None) -> Matrix:
    """Return the mean of log1p(count / depth * ``SCALE``), which is below the log of the mean where counts are few.

    Args:
        share_CH: Expected shares of counts.
        depth: Counts of a cell.
        r_H: Inverse dispersion of a negative binomial; None is Poisson.
    """
    mean_K = np.geomspace(1e-6, 200, 400)
    count_N = np.arange(400)
    plain_K = poisson.pmf(count_N[None, :], mean_K[:, None]) @ np.log1p(SCALE * count_N / depth)
    levels = (np.arange(32) + 0.5) / 32
    factor_HU = (
        np.ones((share_CH.shape[1], 1)) if r_H is None else gamma.ppf(levels[None, :], r_H[:, None]) / r_H[:, None]
    )
    total_CH = np.zeros_like(share_CH)
    for factor_H in factor_HU.T:
        mean_CH = depth * share_CH * factor_H
        few_CH = np.interp(mean_CH, mean_K, plain_K)
        total_CH += np.where(mean_CH < mean_K[-1], few_CH, np.log1p(SCALE * mean_CH / depth))
    logs_CH: Matrix = total_CH / factor_HU.shape[1]
    return logs_CH


def identities(predictor: Predictor, measurement: str) -> dict[str, NDArray[np.float64]]:
    """Return what the model knows of each feature of a measurement, by its id and by its name."""
    part = predictor.vocabulary[measurement]
    first = predictor.model.config.offsets[measurement]
    with torch.inference_mode():
        numbers = torch.arange(first, first + len(part.feature_id), device=predictor.device)
        vectors = predictor.model.identity(numbers).double().cpu().numpy()
    return dict(zip(part.feature_name, vectors, strict=True)) | dict(zip(part.feature_id, vectors, strict=True))


def chosen_by(predictor: Predictor, study: Study, snapshot: Snapshot) -> NDArray[np.bool_] | None:
    """Return which cells of a study, read from a snapshot, chose the checkpoint among others; None where none did.

    Raises:
        InputRefused: As :func:`pretrained`.
    """
    parts = [
        _of_split(said, study, snapshot, said["chosen"]["split"]) for said in _learned(predictor) if said.get("chosen")
    ]
    return np.any(parts, axis=0) if parts else None


def pretrained(predictor: Predictor, study: Study, snapshot: Snapshot) -> NDArray[np.bool_]:
    """Return which cells of a study, read from a snapshot, the checkpoint or its adapter was trained on.

    Raises:
        InputRefused: The snapshot that it was trained on is not at hand, so nobody can tell.
    """
    parts = [_of_split(said, study, snapshot, said["settings"]["data"]["split"]) for said in _learned(predictor)]
    found_C: NDArray[np.bool_] = np.any(parts, axis=0)
    return found_C


def _learned(predictor: Predictor) -> list[dict[str, Any]]:
    """Return what is said of the cells that the checkpoint was trained on, and of those of its adapters."""
    parts = [predictor.manifest, *predictor.manifest.get("adapted", [])]
    for said, what in zip(parts, ["checkpoint", *["adapter"] * len(parts[1:])], strict=True):
        if not {"snapshot", "settings"} <= set(said):
            raise InputRefused(
                f"the {what} does not say what it learned from, as a run's do: nobody can tell which cells it saw"
            )
    return parts


def _of_split(by: dict[str, Any], study: Study, snapshot: Snapshot, split: str) -> NDArray[np.bool_]:
    """Return which cells of a study are in a split of the snapshot that a manifest names."""
    said = by["snapshot"]
    if said["id"] == snapshot.id:
        return study.label("split") == split
    try:
        other = open_snapshot(snapshot.lake_uri, said["name"])
    except SomaflowError as error:
        raise InputRefused(
            f"the checkpoint was trained on snapshot {said['name']!r}, which is not in this lake: nobody can tell "
            "which cells it saw; evaluate where that snapshot is"
        ) from error
    if other.id != said["id"]:
        raise InputRefused(f"snapshot {said['name']!r} is not the one that the checkpoint was trained on (another id)")
    number = list(other.splits).index(split)
    organism_C, joinid_C = study.label("organism"), study.obs["soma_joinid"].to_numpy()
    seen_C = np.zeros(len(joinid_C), dtype=bool)
    for organism, joinids, _, splits in other.identities():
        mine = organism_C == organism
        seen_C[mine] |= np.isin(joinid_C[mine], joinids[splits == number])
    return seen_C
