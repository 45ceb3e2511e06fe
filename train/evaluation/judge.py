"""This module evaluates: a snapshot's cells, folds, an audit, the floor, perhaps a checkpoint, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.linear_model import LogisticRegression

from store.errors import UsageError
from store.schema import UNKNOWN
from store.snapshot import open_snapshot
from train.evaluation.agnostic import AGNOSTIC, adjudicate, molecules_suite, shares_floor
from train.evaluation.audit import Finding, audit, refuse_leaks
from train.evaluation.calibration import CALIBRATION, calibration_suite
from train.evaluation.cellfloor import Annotator, Ensemble, annotation_floor, forecast_floor, translation_floor
from train.evaluation.embedding import EMBED, concordance, embed_suite, embedding_floor
from train.evaluation.floor import effect_floor
from train.evaluation.folds import Fold, FoldSettings, make_folds
from train.evaluation.gated import HEAD, Gate, GatedEffects, TargetVectors
from train.evaluation.gatedtime import GatedForecast
from train.evaluation.gatedtranslate import GatedTranslator
from train.evaluation.novelty import NOVELTY, NeighbourDistance, novelty_floor, novelty_suite
from train.evaluation.nulls import Nulled, dealt_members
from train.evaluation.ours import (
    NAME,
    ModelEffects,
    ModelEmbedder,
    ModelForecaster,
    ModelShares,
    ModelTranslator,
    chosen_by,
    identities,
    pretrained,
)
from train.evaluation.perturb import METRICS, perturb_suite
from train.evaluation.score import Score, Value, Way, score
from train.evaluation.scratch import adapt_on
from train.evaluation.study import Study, only_measured, read_study
from train.evaluation.suites import ANNOTATE, FORECAST, TRANSLATE, annotate_suite, forecast_suite, translate_suite
from train.knowledge import read_sets
from train.labels import NOT_SAID
from train.predictor import Predictor
from train.pretrained import from_pretrained


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        suite: One of ``SUITES``.
        lake, snapshot: Whose cells.
        folds: What is held out.
        measurement: What is predicted, or looked at to tell types; cells without it are left out, of translations also
            those without the source. Empty takes all cells, for an audit alone.
        source: The measurement that is translated from, or that decides disputes (agnostic).
        columns: What makes a context of perturbations; the first is the column of types.
        seeds: How many.
        sets: GMT files of gene sets: what baselines and the transition head know of targets.
        gated: Judge the best baseline plus g times what ours adds: the transition head, fitted on each fold's training
            cells, with or without a checkpoint (perturb, forecast), or a checkpoint's translations.
        members: Adapters that are trained beside the checkpoint on each fold's training cells, and asked together; 0
            asks the checkpoint itself (annotate, calibration).
        null: Judge the null arms too: ours with labels, prompts, pairs or memberships dealt at random.
        max_cells: Cells that are read at most.
    """

    suite: str
    lake: str
    snapshot: str
    folds: FoldSettings
    measurement: str = "RNA"
    source: str = "RNA"
    columns: tuple[str, ...] = ("cell_type",)
    seeds: int = 3
    sets: tuple[str, ...] = ()
    gated: bool = False
    members: int = 0
    null: bool = False
    max_cells: int = 100_000

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UsageError(f"--suite {self.suite}: one of {', '.join(SUITES)}")
        if not self.snapshot:
            raise UsageError("--snapshot is needed: whose cells judge?")
        if unknown := sorted(set(self.folds.days) - set(self.sets)):
            raise UsageError(f"days: {unknown[0]!r} is no file of --sets ({', '.join(self.sets) or 'none is named'})")
        if self.members and self.suite not in ("annotate", "calibration"):
            raise UsageError(f"--members goes with --suite annotate or calibration, not {self.suite}")
        if self.gated and self.suite not in ("perturb", "forecast", "translate"):
            raise UsageError(f"--gated goes with --suite perturb, forecast or translate, not {self.suite}")
        if self.suite == "translate" and self.source == self.measurement:
            raise UsageError(f"--suite translate tells {self.measurement} from itself; say --source and --measurement")
        if self.gated and self.suite == "translate" and not (self.folds.calibrate or self.folds.calibrate_on):
            raise UsageError("--gated needs groups to choose by: say --set calibrate=0.3, or calibrate_on")

    @property
    def looks_at(self) -> tuple[str, ...]:
        """Measurements that were made of every cell which judges or is learned from."""
        if not self.measurement:
            return ()
        return (self.source, self.measurement) if self.suite == "translate" else (self.measurement,)


@dataclass(frozen=True)
class Judgement:
    """What came of it.

    Attributes:
        values: What every method reached on every unit.
        scores: What came of them.
        gates: Where the transition head was judged: what each fit of it found.
        nulls: Null arm to the scores of ours in it.
        n_cells: Cells that were held out or learned from.
        left_out: Cells that were read and left out, since what is asked was not measured of them.
    """

    values: list[Value]
    scores: list[Score]
    gates: list[Gate]
    nulls: dict[str, list[Score]]
    n_cells: int
    left_out: int


def look_for_leaks(question: Question, predictor: Predictor | None = None) -> tuple[Study, list[Fold], list[Finding]]:
    """Read the cells of which what is asked was measured, hold out, and audit.

    Raises:
        InputRefused: There is no such measurement, or no cell has it.
    """
    snapshot = open_snapshot(question.lake, question.snapshot)
    study = only_measured(read_study(snapshot, question.max_cells), question.looks_at)
    if question.suite == "perturb":
        study = study.take(study.label("perturbation") != UNKNOWN)
    if question.suite in OF_TYPES:
        study = _of_known_types(study, question.columns[0])
    folds = make_folds(study, question.folds)
    learned, seen_C, chosen_C = {}, None, None
    if predictor is not None:
        learned = predictor.manifest.get("knowledge", {})
        seen_C, chosen_C = pretrained(predictor, study, snapshot), chosen_by(predictor, study, snapshot)
    known = [(f"{path} (of the checkpoint)", entry["day"]) for path, entry in learned.items()]
    known += [(path, question.folds.days.get(path, "")) for path in question.sets]
    chosen = tuple(snapshot.manifest["settings"].get("features") or ())
    findings = audit(
        study, folds, question.folds, knowledge=known, pretrained_C=seen_C, chosen_by_C=chosen_C, chosen=chosen
    )
    return study, folds, findings


def _of_known_types(study: Study, column: str) -> Study:
    """Leave out the cells of which nobody says what type they are.

    Raises:
        UsageError: The others are not of two types at least.
    """
    label_C = study.label(column)
    said_C = ~np.isin(np.char.lower(label_C.astype(str)), list(NOT_SAID))
    types = sorted(set(label_C[said_C]))
    if len(types) < 2:
        have = f"all {int(said_C.sum()):,} cells that say one have {types[0]!r}" if types else "no cell says one"
        raise UsageError(f"{column}: {have}; it takes two types to tell apart; another column: --context NAME")
    return study.take(said_C)


def judge(
    question: Question,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    adapter: str | Path | None = None,
) -> Judgement:
    """Evaluate the floor, and a checkpoint or the transition head where one is asked for.

    Args:
        question: What is asked.
        checkpoint: Who answers, beside floor and replicate.
        device: Where the checkpoint, and adapters beside it, work.
        adapter: A saved adapter that the checkpoint answers with.

    Raises:
        VerificationError: The audit found a leak; no number is made.
        UsageError: A suite that checkpoints cannot do, a device that is not there, or an adapter without a checkpoint.
    """
    if adapter is not None and question.members:
        raise UsageError("--members trains adapters of its own beside a checkpoint; leave out --adapter")
    predictor = load(checkpoint, adapter, device)
    study, folds, findings = look_for_leaks(question, predictor)
    refuse_leaks(findings)
    gates: list[Gate] = []
    run, better = SUITES[question.suite]
    task = _Task(question, study, folds, predictor, gates)
    values = run(task)
    ours = NAME if predictor is not None else HEAD if question.gated else None
    others = [value for value in values if value.method != ours]
    nulls = {}
    for arm in task.arms if question.null and ours else ():
        again = [value for value in run(replace(task, arm=arm, gates=[])) if value.method == ours]
        nulls[arm] = score(others + again, better, ours)
    return Judgement(values, score(values, better, ours), gates, nulls, study.n_cells, study.left_out)


def load(checkpoint: str | Path | None, adapter: str | Path | None = None, device: str = "cpu") -> Predictor | None:
    """Load who is judged; nobody where no checkpoint is named.

    Raises:
        UsageError: An adapter without a checkpoint, or a device that is not there.
    """
    if checkpoint is None and adapter is not None:
        raise UsageError(f"--adapter {adapter}: name the checkpoint that it belongs to as well")
    return None if checkpoint is None else from_pretrained(checkpoint, adapter=adapter, device=device)


@dataclass(frozen=True)
class _Task:
    """What a suite is run with."""

    question: Question
    study: Study
    folds: Sequence[Fold]
    predictor: Predictor | None
    gates: list[Gate]
    arm: str = ""

    @property
    def seeds(self) -> range:
        return range(self.question.seeds)

    @property
    def arms(self) -> tuple[str, ...]:
        """The null arms that say something of the suite."""
        asked = self.question
        if asked.suite == "perturb":
            return ("labels", *(["memberships"] if asked.sets else [])) if asked.gated else ("prompts",)
        found = {"annotate": ("labels",), "calibration": ("labels",), "translate": ("pairs",)}.get(asked.suite, ())
        return ("labels",) if asked.suite == "forecast" and asked.gated else found

    def methods(
        self, floor: dict[str, Callable[[int], Any]], name: str, ours: Callable[[int], Any] | None
    ) -> dict[str, Callable[[int], Any]]:
        """Return what is judged: baselines and ours; in a null arm ours alone, as that has it."""
        if ours is None:
            return floor
        if self.arm in ("", "memberships"):
            return ({} if self.arm else floor) | {name: ours}
        columns = self.question.columns
        column, within = {
            "perturb": ("perturbation", columns),
            "forecast": ("time", ()),
        }.get(self.question.suite, (columns[0], ("donor_id",)))
        return {name: lambda seed: Nulled(ours(seed), self.arm, column, within, seed)}


def _perturb(task: _Task) -> list[Value]:
    asked, predictor = task.question, task.predictor
    members = read_sets(asked.sets)
    if task.arm == "memberships":
        members = dealt_members(members)
    floor = by_seed(lambda seed: effect_floor(asked.measurement, asked.columns, members))
    ours: Callable[[int], Any] | None = None
    if asked.gated:
        ours = partial(_gated_effects, task, members)
    elif predictor is not None:
        ours = partial(_no_chance, partial(ModelEffects, predictor, asked.measurement, asked.columns))
    methods = task.methods(floor, HEAD if predictor is None else NAME, ours)
    return perturb_suite(task.study, task.folds, methods, asked.measurement, asked.columns, task.seeds)


def _tell(suite: Callable[..., list[Value]], task: _Task) -> list[Value]:
    """Run a suite of annotators: baselines, and a linear probe of the model."""
    measurement, column = task.question.measurement, task.question.columns[0]
    floor = by_seed(lambda seed: annotation_floor(measurement, column, seed))
    ours: Callable[[int], Any] | None = None
    if task.predictor is not None and task.question.members:
        ours = partial(_ensemble, task.predictor, column, task.question.members)
    elif task.predictor is not None:
        ours = partial(_probe, task.predictor, column)
    methods = task.methods(floor, NAME, ours)
    return suite(task.study, task.folds, methods, measurement, column, task.seeds)


def _translate(task: _Task) -> list[Value]:
    source, target, column = task.question.source, task.question.measurement, task.question.columns[0]
    predictor = task.predictor
    floor = by_seed(lambda seed: translation_floor(source, target, column, seed))
    ours: Callable[[int], Any] | None = None
    if predictor is not None and task.question.gated:
        ours = partial(_gated_translator, task, predictor)
    elif predictor is not None:
        ours = partial(_no_chance, partial(ModelTranslator, predictor, source, target))
    methods = task.methods(floor, NAME, ours)
    return translate_suite(task.study, task.folds, methods, source, target, column, task.seeds)


def _novelty(task: _Task) -> list[Value]:
    measurement, column, predictor = task.question.measurement, task.question.columns[0], task.predictor
    methods = by_seed(lambda seed: novelty_floor(measurement, column, seed))
    if predictor is not None:
        methods[NAME] = lambda seed: NeighbourDistance(NAME, ModelEmbedder(predictor))
    return novelty_suite(task.study, task.folds, methods, measurement, column, task.seeds)


def _embed(task: _Task) -> list[Value]:
    measurement, column = task.question.measurement, task.question.columns[0]
    return embed_suite(task.study, task.folds, _embedders(task), measurement, column, task.seeds)


def _embedders(task: _Task) -> dict[str, Callable[[int], Any]]:
    predictor = task.predictor
    methods = by_seed(lambda seed: embedding_floor(task.question.measurement, seed))
    if predictor is not None:
        methods[NAME] = lambda seed: ModelEmbedder(predictor)
    return methods


def _agnostic(task: _Task) -> list[Value]:
    """Judge by molecules, and by another measurement, where one is named and disputes can be decided."""
    measurement, predictor, asked = task.question.measurement, task.predictor, task.question
    methods = by_seed(lambda seed: shares_floor(measurement, seed))
    if predictor is not None:
        methods[NAME] = lambda seed: ModelShares(predictor, measurement)
    values = molecules_suite(task.study, task.folds, methods, measurement, task.seeds)
    values += concordance(task.study, task.folds, _embedders(task), measurement, task.seeds)
    if asked.source == measurement:
        return values
    tells = by_seed(lambda seed: annotation_floor(measurement, asked.columns[0], seed)[1:])
    if predictor is not None:
        tells[NAME] = partial(_probe, predictor, asked.columns[0])
    return values + adjudicate(task.study, task.folds, tells, asked.source, measurement, asked.columns[0], task.seeds)


def _forecast(task: _Task) -> list[Value]:
    measurement = task.question.measurement
    predictor = task.predictor
    floor = by_seed(lambda seed: forecast_floor(measurement, seed))
    ours: Callable[[int], Any] | None = None
    if task.question.gated:
        ours = partial(_gated_forecast, task)
    elif predictor is not None:
        ours = partial(ModelForecaster, predictor, measurement)
    methods = task.methods(floor, HEAD if predictor is None else NAME, ours)
    return forecast_suite(task.study, task.folds, methods, measurement, task.seeds)


SUITES: dict[str, tuple[Callable[[_Task], list[Value]], dict[str, Way]]] = {
    "perturb": (_perturb, METRICS),
    "annotate": (partial(_tell, annotate_suite), ANNOTATE),
    "embed": (_embed, EMBED),
    "calibration": (partial(_tell, calibration_suite), CALIBRATION),
    "translate": (_translate, TRANSLATE),
    "forecast": (_forecast, FORECAST),
    "novelty": (_novelty, NOVELTY),
    "agnostic": (_agnostic, AGNOSTIC),
}
"""Suite to what runs it, and which way of its metrics is better."""
OF_TYPES = ("annotate", "embed", "calibration", "novelty")
"""Suites that judge by the types of cells: a cell of which none is said says nothing there."""


def _gated_effects(task: _Task, members: dict[str, tuple[str, ...]], seed: int) -> GatedEffects:
    asked, predictor = task.question, task.predictor
    known = TargetVectors(members, None if predictor is None else identities(predictor, asked.measurement))
    candidates = effect_floor(asked.measurement, asked.columns, members)
    return GatedEffects(
        asked.measurement, asked.columns, asked.folds.by, known, candidates, seed=seed, found=task.gates.append
    )


def _gated_translator(task: _Task, predictor: Predictor, seed: int) -> GatedTranslator:
    source, target, column = task.question.source, task.question.measurement, task.question.columns[0]
    floor = translation_floor(source, target, column, seed)
    return GatedTranslator(ModelTranslator(predictor, source, target), floor, target, found=task.gates.append)


def _gated_forecast(task: _Task, seed: int) -> GatedForecast:
    return GatedForecast(task.question.measurement, seed=seed, found=task.gates.append)


def _no_chance(make: Callable[[], Any], seed: int) -> Any:
    return make()


def _probe(predictor: Predictor, column: str, seed: int) -> Annotator:
    """Return a linear probe of the model's embeddings: what of a type can be read off them."""
    return Annotator(NAME, ModelEmbedder(predictor), LogisticRegression(max_iter=2000, random_state=seed), column)


class _Adapted(ModelEmbedder):
    """The model's embeddings after an adapter was trained on the training cells."""

    def __init__(self, predictor: Predictor, seed: int) -> None:
        super().__init__(predictor)
        self.trunk, self.seed = predictor, seed

    def fit(self, train: Study) -> Self:
        self.predictor = adapt_on(self.trunk, train, seed=self.seed)
        return self


def _ensemble(predictor: Predictor, column: str, members: int, seed: int) -> Ensemble:
    """Return probes of the model with as many adapters, each trained from another start on the training cells."""
    seeds = range(seed * members, (seed + 1) * members)
    return Ensemble(
        NAME,
        [Annotator(NAME, _Adapted(predictor, one), LogisticRegression(max_iter=2000), column) for one in seeds],
    )


def by_seed(make: Callable[[int], Sequence[Any]]) -> dict[str, Callable[[int], Any]]:
    """Return name to what makes the method of a seed."""
    return {one.name: partial(_made, make, place) for place, one in enumerate(make(0))}


def _made(make: Callable[[int], Sequence[Any]], place: int, seed: int) -> Any:
    return make(seed)[place]
