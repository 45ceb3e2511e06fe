"""What a model has to beat on public data, and what ours reaches: floor, replicate, gate and score of every suite.

usage: make bench-floor BENCH='--data ../shared/data --seeds 3' for floor and replicate (docs/benchmarks/floor.md);
make bench-model for the model trained on each fold and the transition head, also where the truth is simulated
(docs/benchmarks/model.md). The last line of output is one JSON object. Each dataset's limits are said beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anndata
import mudata
import numpy as np
import pandas as pd
import scanpy
import torch
from scipy.sparse import csr_matrix, vstack
from sklearn.linear_model import LogisticRegression
from studies import donors, going_round, opened_together, switched_off

from ingest.simulate import SimulationSettings, simulate
from train.checkpoint import code_commit, json_values
from train.evaluation.calibration import CALIBRATION, calibration_suite
from train.evaluation.cellfloor import Annotator, annotation_floor, forecast_floor, translation_floor
from train.evaluation.embedding import EMBED, embed_suite, embedding_floor
from train.evaluation.floor import effect_floor
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.gated import Gate, GatedEffects, TargetVectors
from train.evaluation.gatedtime import GatedForecast
from train.evaluation.gatedtranslate import GatedTranslator
from train.evaluation.judge import by_seed
from train.evaluation.novelty import NOVELTY, NeighbourDistance, novelty_floor, novelty_suite
from train.evaluation.ours import ModelEmbedder, ModelTranslator
from train.evaluation.perturb import METRICS, perturb_suite
from train.evaluation.report import means
from train.evaluation.score import REPLICATE, Score, Value, score
from train.evaluation.scratch import ScratchSettings, train_on
from train.evaluation.study import Study, from_anndata
from train.evaluation.suites import ANNOTATE, FORECAST, TRANSLATE, annotate_suite, forecast_suite, translate_suite
from train.knowledge import read_sets
from train.predictor import Predictor

ROOT = Path(__file__).parents[2]
OURS = "ours"
SCRATCH = ScratchSettings(steps=200)
DEALT = FoldSettings(by="donor_id", calibrate=0.25)


@dataclass(frozen=True)
class Case:
    """One suite on one dataset.

    Attributes:
        name: Dataset and question.
        caveat: What the dataset cannot carry.
        run: Gives the values and which way is better, for some seeds.
    """

    name: str
    caveat: str
    run: Callable[[range], tuple[list[Value], dict[str, Any]]]


def papalexi(data: Path) -> Study:
    """21 knock-outs in THP-1 cells, 299 genes; three replicates are one context."""
    with mudata.set_options(pull_on_update=False):
        cells = mudata.read_h5mu(data / "derived/papalexi_dev.h5mu")["rna"]
    study = from_anndata({"RNA": cells}, {"perturbation": "target_gene", "donor_id": "bio_rep"}, {"cell_type": "THP-1"})
    label = study.obs["perturbation"].astype(str).replace({"non-targeting": "control", "NT": "control"})
    return Study(study.counts, study.features, study.obs.assign(perturbation=label))


def kang(data: Path) -> Study:
    """IFN-beta stimulation of blood cells: two patients, five types."""
    cells = anndata.read_h5ad(data / "derived/kang_ifnb_muscat_4samples.h5ad")
    labels = {"cell_type": "cluster_id", "donor_id": "sample_id", "perturbation": "group_id"}
    study = from_anndata({"RNA": cells}, labels)
    label = study.obs["perturbation"].astype(str).replace({"ctrl": "control", "stim": "IFNB"})
    donor = study.obs["donor_id"].astype(str).str.extract(r"(\d+)")[0]
    return Study(study.counts, study.features, study.obs.assign(perturbation=label, donor_id=donor))


def norman(data: Path) -> Study:
    """Doubles and their singles in K562 (CRISPRa)."""
    cells = anndata.read_h5ad(data / "perturb/perturbench_devel.h5ad")
    cells = cells[cells.obs["dataset"] == "norman19"].copy()
    rates_CG = np.expm1(cells.X.toarray().astype(np.float64))
    least_C1 = np.min(np.where(rates_CG > 0, rates_CG, np.inf), axis=1, keepdims=True)  # one count, but in two cells
    least_C1 /= np.round(least_C1 * cells.obs["ncounts"].to_numpy()[:, None] / 1e4)
    counts_CG = np.round(rates_CG / least_C1)
    if np.abs(rates_CG / least_C1 - counts_CG).max() > 0.05:
        raise SystemExit("perturbench_devel: values are no log1p of scaled counts")
    cells.X = counts_CG
    return from_anndata({"RNA": cells}, {"perturbation": "perturbation", "cell_type": "cell_type"})


def worm(data: Path) -> Study:
    """Embryos of C. elegans; embryo time was itself estimated from the transcriptome."""
    cells = anndata.read_h5ad(data / "derived/worm_embryo_dev.h5ad")
    column = next(name for name in cells.obs if re.search(r"embryo.?time.?bin", name))
    label = cells.obs[column].astype(str)
    cells.obs["middle"] = [np.mean([float(x) for x in re.findall(r"\d+", one)] or [math.nan]) for one in label]
    return from_anndata({"RNA": cells}, {"time": "middle"})


def reprogrammed(data: Path) -> Study:
    """Mouse cells on their way back to stem cells, three days; values are logs of scaled counts."""
    cells = anndata.read_h5ad(data / "time/moscot_temporal_tests_hist.h5ad")
    cells.X = np.expm1(np.asarray(cells.X.todense() if hasattr(cells.X, "todense") else cells.X))
    return from_anndata({"RNA": cells}, {"time": "day"})


def worm_l2(data: Path) -> Study:
    """Larvae of C. elegans, two plates, types of the source."""
    cells = anndata.read_h5ad(data / "derived/worm_l2.h5ad")
    known = cells.obs["cao_cell_type"].astype(str)
    cells = cells[~known.isin(["nan", "NA", ""])].copy()
    return from_anndata({"RNA": cells}, {"cell_type": "cao_cell_type", "donor_id": "plate"})


def citeseq(data: Path) -> Study:
    """200 blood cells with 14 antibodies, genes that every tenth cell has; cells are dealt to five folds."""
    cells = anndata.read_h5ad(data / "citeseq/pbmc_10k_protein_v3.h5ad")
    cells = cells[:, np.asarray((cells.X > 0).sum(axis=0)).ravel() >= cells.n_obs / 10].copy()
    found = cells.obsm["protein_expression"]
    names = list(found.columns) if isinstance(found, pd.DataFrame) else [f"p{n}" for n in range(found.shape[1])]
    protein = anndata.AnnData(np.asarray(found, dtype=np.float32), var=pd.DataFrame(index=names))
    study = from_anndata({"RNA": cells, "protein": protein}, None, {"cell_type": "PBMC"})
    return Study(study.counts, study.features, study.obs.assign(donor_id=[f"f{n % 5}" for n in range(study.n_cells)]))


def multiome(data: Path) -> Study:
    """1,000 blood cells with 45 genes and 174 peaks."""
    with mudata.set_options(pull_on_update=False):
        cells = mudata.read_h5mu(data / "multiome/muon_test_rna_atac.h5mu")
    parts = {"RNA": cells["rna"], "ATAC": cells["atac"]}
    study = from_anndata(parts, None, {"cell_type": "PBMC"})
    return Study(study.counts, study.features, study.obs.assign(donor_id=[f"f{n % 5}" for n in range(study.n_cells)]))


def pbmc68k(data: Path) -> Study:
    """700 blood cells with 765 genes; labels are of purified populations; cells are dealt to five folds."""
    cells = anndata.read_h5ad(data / "derived/pbmc68k_reduced_counts.h5ad")
    study = from_anndata({"RNA": cells}, {"cell_type": "bulk_labels"})
    return Study(study.counts, study.features, study.obs.assign(donor_id=[f"f{n % 5}" for n in range(study.n_cells)]))


class Fresh:
    """A method that trains a model on each fold's training cells first; one that was trained on them is taken."""

    name = OURS
    trained: ClassVar[dict[Any, Predictor]] = {}

    def __init__(self, make: Callable[[Predictor], Any], seed: int, settings: ScratchSettings = SCRATCH) -> None:
        self.make, self.seed, self.settings = make, seed, settings

    def fit(self, train: Study) -> Any:
        """Train, then fit what stands on the model."""
        key = (
            self.seed,
            self.settings.steps,
            *train.features,
            train.n_cells,
            train.counts["RNA"].data[:1000].tobytes(),
        )
        if key not in self.trained:
            self.trained[key] = train_on(train, self.settings, self.seed)
        return self.make(self.trained[key]).fit(train)


def knowledge(data: Path) -> dict[str, list[str]]:
    """Return Reactome's and Hallmark's sets."""
    return read_sets([data / "ref/gmt/human_reactome_v2025.gmt", data / "ref/gmt/h.all.v7.0.symbols.gmt"])


def responsive(study: Study, fewest: int = 10) -> tuple[str, ...]:
    """Return the targets at least so many of whose features differ from control (Wilcoxon, FDR 5 %)."""
    cells = anndata.AnnData(study.logs("RNA"), obs=study.obs[["perturbation"]].astype("category"))
    scanpy.tl.rank_genes_groups(cells, "perturbation", reference="control", method="wilcoxon")
    adjusted = pd.DataFrame(cells.uns["rank_genes_groups"]["pvals_adj"])
    return tuple(sorted(name for name in adjusted if (adjusted[name] < 0.05).sum() >= fewest))


def effects_case(
    study: Study, settings: FoldSettings, members: dict[str, list[str]], ours: bool, by: str | None = None
) -> Any:
    """Return what runs the perturbation suite; the head chooses by groups of ``by``, or of what is held out."""
    folds, columns = make_folds(study, settings), ("cell_type",)
    methods: dict[str, Any] = by_seed(lambda seed: effect_floor("RNA", columns, members))
    if ours:
        methods[OURS] = lambda seed: GatedEffects(
            "RNA",
            columns,
            by or settings.by,
            TargetVectors(members),
            effect_floor("RNA", columns, members),
            seed=seed,
            found=say,
        )
    return lambda seeds: (perturb_suite(study, folds, methods, "RNA", columns, seeds), METRICS)


def cases(data: Path, ours: bool) -> list[Case]:
    """Return everything that is run."""
    members = knowledge(data)
    stimulated = {"perturbation": ("IFNB",)}
    kang_cells, embryo = kang(data), worm(data)
    inner = tuple(sorted({str(t) for t in embryo.obs["time"].dropna()}, key=float)[1:-1])
    cite, multi, larvae = citeseq(data), multiome(data), worm_l2(data)
    screen = papalexi(data)
    strong = responsive(screen)
    weak = tuple(sorted(set(screen.label("perturbation")) - {"control", *strong}))
    plates = FoldSettings(by="donor_id", folds=3, calibrate=0.3)
    return [
        Case(
            "papalexi_dev, unseen targets",
            f"of the 21 targets {len(strong)} respond ({', '.join(strong)})",
            effects_case(screen, FoldSettings(by="target", folds=3), members, ours),
        ),
        Case(
            "papalexi_dev, the targets that respond, learned from those that do not",
            "nothing in training does what they do",
            effects_case(screen, FoldSettings(by="target", held=strong, folds=1), members, ours),
        ),
        Case(
            "papalexi_dev, targets that do nothing",
            "there is no effect to tell apart: what counts is that none is told",
            effects_case(screen, FoldSettings(by="target", held=weak, folds=3), members, ours),
        ),
        Case(
            "kang, IFN-β in unseen cell types",
            "one perturbation: there is nothing to tell apart",
            effects_case(kang_cells, FoldSettings(by="cell_type", where=stimulated), members, ours),
        ),
        Case(
            "kang, IFN-β in an unseen donor",
            "two donors, one perturbation; units are types of them",
            effects_case(kang_cells, FoldSettings(by="donor_id", where=stimulated), members, ours, by="cell_type"),
        ),
        Case(
            "perturbench_devel, unseen doubles",
            "five doubles of 100 cells, and singles as noisy as they are",
            effects_case(
                norman_cells := norman(data),
                FoldSettings(by="perturbation", held=doubles(norman_cells), folds=1),
                members,
                ours,
            ),
        ),
        Case(
            "kang, types of an unseen donor",
            "two donors, five types; units are donors",
            annotation_case(kang_cells, FoldSettings(by="donor_id"), ours),
        ),
        Case(
            "worm_l2, types on an unseen plate",
            "types are clusters of the same RNA: optimistic for everybody",
            annotation_case(larvae, plates, ours),
        ),
        Case(
            "worm_l2, label sets on an unseen plate",
            "too few plates to promise 90 %: coverage is a hope there",
            calibration_case(larvae, plates, ours),
        ),
        Case(
            "worm_l2, embedding of unseen plates",
            "types are clusters of the same RNA; three folds are few units",
            embedding_case(larvae, plates, ours),
        ),
        Case(
            "pbmc68k, types of unseen cells",
            "one donor: nothing shifts between folds, which are dealt cell by cell",
            annotation_case(pbmc68k(data), FoldSettings(by="donor_id"), ours),
        ),
        Case(
            "kang, each type as a new one",
            "five types, one of them far larger than the others",
            novelty_case(kang_cells, ours),
        ),
        Case(
            "citeseq, RNA → protein",
            "200 cells, 14 antibodies, no types: a smoke test",
            translation_case(cite, "protein", ours, unit="cell"),
        ),
        Case(
            "multiome, RNA → ATAC",
            "45 genes, 174 peaks, no types: a smoke test",
            translation_case(multi, "ATAC", ours, unit="cell"),
        ),
        Case(
            "worm embryo, unseen time",
            "times were estimated from the transcriptome, each is its own batch: plumbing, not evidence",
            forecast_case(embryo, inner, ours),
        ),
        Case(
            "reprogrammed mouse cells, day 10.5 from 10 and 11",
            "one unseen time is no unit to judge by; values were logs already",
            forecast_case(reprogrammed(data), ("10.5",), ours),
        ),
        *(simulated() if ours else []),
    ]


def simulated() -> list[Case]:
    """Return questions whose answer is known, and that baselines cannot answer whole."""
    screen, programs = switched_off()
    round_way = going_round()
    times = sorted(set(round_way.obs["time"]))
    cells = linked()
    known, shifted = donors(n_donors=90, n_cells=50), donors(n_donors=90, n_cells=50, blur=1.6)
    number = np.array([int(name[1:]) for name in known.label("donor_id")])
    fresh = tuple(f"d{one:02d}" for one in range(0, 90, 3))
    return [
        Case(
            "simulated: knock-outs switch off what is on, unseen targets",
            "made for the purpose: the truth is a product of target and context",
            effects_case(screen, FoldSettings(by="target", folds=3), programs, ours=True),
        ),
        Case(
            "simulated: cells on a round way, unseen time",
            "made for the purpose: a straight line between two times passes inside",
            forecast_case(round_way, tuple(str(time) for time in times[2:-1:3]), ours=True),
        ),
        Case(
            "simulated: label sets of fresh donors",
            "30 donors calibrate, 30 are judged",
            calibration_case(known, FoldSettings(by="donor_id", held=fresh, folds=1, calibrate=0.5), True),
        ),
        Case(
            "simulated: label sets of fresh donors whose types are less distinct",
            "the shift breaks what was promised, and it shows",
            calibration_case(
                spliced(known, shifted, number % 3 == 0),
                FoldSettings(by="donor_id", held=fresh, folds=1, calibrate=0.5),
                True,
            ),
        ),
        Case(
            "simulated: RNA → ATAC, peaks that open where two programs meet",
            "made for the purpose: a product of programs, ten of them",
            translation_case(
                opened_together(),
                "ATAC",
                True,
                FoldSettings(by="donor_id", folds=3, calibrate=0.25),
                replace(SCRATCH, steps=600),
                unit="cell",
            ),
        ),
        Case(
            "simulated: RNA → protein within types",
            "proteins follow their genes",
            translation_case(cells, "protein", True),
        ),
        Case(
            "simulated: RNA → ATAC within types",
            "peaks follow their genes' programs",
            translation_case(cells, "ATAC", True),
        ),
    ]


def linked() -> Study:
    """Return the simulator's cells, unperturbed: links between modalities are known and hold within types."""
    made = simulate(SimulationSettings(cells=1500, perturbed=0))
    features = {"RNA": made.truth.genes, "protein": made.truth.proteins, "ATAC": made.truth.peaks}
    return Study(dict(made.counts), features, made.obs.reset_index(drop=True))


def spliced(study: Study, other: Study, other_C: np.ndarray) -> Study:
    """Return a study with the cells of another in some places."""
    rows = np.where(other_C, study.n_cells + np.arange(study.n_cells), np.arange(study.n_cells))
    counts = {name: csr_matrix(vstack([part, other.counts[name]])[rows]) for name, part in study.counts.items()}
    return Study(counts, study.features, pd.concat([study.obs, other.obs]).iloc[rows].reset_index(drop=True))


def forecast_case(study: Study, held: tuple[str, ...], ours: bool) -> Any:
    """Return what runs the forecasting suite."""
    folds = make_folds(study, FoldSettings(by="time", held=held))
    methods: dict[str, Any] = by_seed(lambda seed: forecast_floor("RNA", seed=seed))
    if ours:
        methods[OURS] = lambda seed: GatedForecast("RNA", seed=seed)
    return lambda seeds: (forecast_suite(study, folds, methods, seeds=seeds), FORECAST)


def doubles(study: Study) -> tuple[str, ...]:
    """Return the combinations both of whose targets were also hit alone."""
    names = set(study.label("perturbation"))
    return tuple(sorted(n for n in names if "+" in n and set(n.split("+")) <= names))


def annotation_case(study: Study, settings: FoldSettings, ours: bool) -> Any:
    """Return what runs the annotation suite."""
    folds, make = make_folds(study, settings), by_seed(lambda seed: annotation_floor("RNA", seed=seed))
    if ours:
        make[OURS] = lambda seed: Fresh(partial(probe, seed), seed)
    return lambda seeds: (annotate_suite(study, folds, make, seeds=seeds), ANNOTATE)


def embedding_case(study: Study, settings: FoldSettings, ours: bool) -> Any:
    """Return what runs the embedding suite."""
    folds, make = make_folds(study, settings), by_seed(lambda seed: embedding_floor("RNA", seed))
    if ours:
        make[OURS] = lambda seed: Fresh(ModelEmbedder, seed)
    return lambda seeds: (embed_suite(study, folds, make, seeds=seeds), EMBED)


def novelty_case(study: Study, ours: bool) -> Any:
    """Return what runs the novelty suite: each type is held out in turn."""
    folds = make_folds(study, FoldSettings(by="cell_type"))
    make = by_seed(lambda seed: novelty_floor("RNA", seed=seed))
    if ours:
        make[OURS] = lambda seed: Fresh(lambda model: NeighbourDistance(OURS, ModelEmbedder(model)), seed)
    return lambda seeds: (novelty_suite(study, folds, make, seeds=seeds), NOVELTY)


def calibration_case(study: Study, settings: FoldSettings, ours: bool) -> Any:
    """Return what runs the calibration suite."""
    folds, make = make_folds(study, settings), by_seed(lambda seed: annotation_floor("RNA", seed=seed))
    if ours:
        make[OURS] = lambda seed: Fresh(partial(probe, seed), seed)
    return lambda seeds: (calibration_suite(study, folds, make, seeds=seeds), CALIBRATION)


def probe(seed: int, model: Predictor) -> Annotator:
    """Return a linear probe of a model's embeddings."""
    return Annotator(OURS, ModelEmbedder(model), LogisticRegression(max_iter=2000, random_state=seed))


def translation_case(
    study: Study,
    target: str,
    ours: bool,
    settings: FoldSettings = DEALT,
    scratch: ScratchSettings = SCRATCH,
    unit: str = "donor_id",
) -> Any:
    """Return what runs the translation suite from RNA; donors (or cells dealt to five folds) are held out.

    Ours is the best baseline plus g times what the model would change of it; another donor chooses both. Where cells
    were dealt to donors that do not differ, each of them is a unit ("cell").
    """
    study = replace(study, obs=study.obs.assign(cell=np.arange(study.n_cells)))
    folds = make_folds(study, settings)
    column = "cell_type" if len(set(study.label("cell_type"))) > 1 else ""
    make = by_seed(lambda seed: translation_floor("RNA", target, column, seed))
    if ours:
        make[OURS] = lambda seed: Fresh(partial(gated, target, column, unit, seed), seed, scratch)
    return lambda seeds: (translate_suite(study, folds, make, "RNA", target, seeds=seeds), TRANSLATE)


def gated(target: str, column: str, unit: str, seed: int, model: Predictor) -> GatedTranslator:
    """Return a model's translations behind the gate."""
    floor, ours = translation_floor("RNA", target, column, seed), ModelTranslator(model, "RNA", target)
    return GatedTranslator(ours, floor, target, unit, found=say)


def say(gate: Gate) -> None:
    """Print what a gate found."""
    print(f"    {gate.baseline} + {gate.g:.2f} f, gain {gate.gain:.1f} SE", flush=True)


def line(name: str, one: Score, ours: bool) -> str:
    """Write a score as a line of a table."""
    verdict = one.verdict if one.verdict != "floor only" else "informative"
    if not ours:
        told = f"{one.b:.3f} ({one.b_method}) | {one.r:.3f} | {one.gate:.1f}"
    else:
        scored = "-" if math.isnan(one.s) else f"{one.s:.2f} [{one.low:.2f}, {one.high:.2f}]"
        told = f"{one.u:.3f} | {one.b:.3f} ({one.b_method}) | {one.r:.3f} | {one.gate:.1f} | {scored}"
    return f"| {name} | {one.metric} ({one.better} is better) | {one.n_units} | {told} | {verdict} |"


def judged(case: Case, seeds: range, ours: bool) -> dict[str, Any]:
    """Run a case; return its scores, its lines of the table, and what else was measured."""
    begin = time.monotonic()
    values, better = case.run(seeds)
    scores = score(values, better, OURS if ours else None)
    seconds = time.monotonic() - begin
    lines = [line(case.name, one, ours) for one in scores]
    beside: dict[str, dict[str, float]] = {}
    for method, metric, mean in means(values):
        if method in (OURS, REPLICATE) and metric not in better:
            beside.setdefault(metric, {})[method] = mean
    print(f"    {seconds:.0f} s", *lines, sep="\n", flush=True)
    also = [
        f"- **{case.name}**: {metric} {of[OURS]:.3f}" + (f" (replicate {of[REPLICATE]:.3f})" if REPLICATE in of else "")
        for metric, of in beside.items()
        if OURS in of
    ]
    about = {"seeds": len(seeds), "code_commit": code_commit()}
    return {"scores": [json_values(asdict(one)) for one in scores], "lines": lines, "also": also, **about}


def ages(commits: dict[str, str]) -> list[str]:
    """Say of which commit, and of which day, each case is, the newest first."""
    days = {}
    for commit in set(commits.values()):
        words = ["git", "-C", str(ROOT), "log", "-1", "--format=%cI", commit]
        days[commit] = subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()
    return [
        f"- {commit[:8]}, {days[commit][:10]}: {'; '.join(name for name, one in commits.items() if one == commit)}."
        for commit in sorted(days, key=days.__getitem__, reverse=True)
    ]


def write_page(kind: str, files: dict[str, Path], every: list[Case]) -> None:
    """Write the page of all cases that were run so far, now or before."""
    finished = {name: file for name, file in files.items() if file.exists()}
    made = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in finished.items()}
    columns = ["strongest baseline (b)", "replicate (r)", "gate (SE)"]
    if kind == "model":
        columns = ["ours (u)", *columns, "s = (u - b) / (r - b)"]
    rows = [f"| dataset and question | metric | units | {' | '.join(columns)} | |", "|" + "---|" * (4 + len(columns))]
    rows += [line for case in every for line in made.get(case.name, {}).get("lines", [])]
    also = [line for case in every for line in made.get(case.name, {}).get("also", [])]
    caveats = [f"- **{case.name}**: {case.caveat}." for case in every if case.name in made]
    missing = [case.name for case in every if case.name not in made]
    page = [(ROOT / f"tests/bench/{kind}_intro.md").read_text(encoding="utf-8"), *rows]
    page += ["", "## Also measured of ours", "", *also] if also else []
    page += ["", "## What each dataset cannot carry", "", *caveats]
    page += ["", f"Not run for this page: {'; '.join(missing)}."] if missing else []
    page += ["", "## Of which code", "", *ages({name: one["code_commit"] for name, one in made.items()})]
    (ROOT / f"docs/benchmarks/{kind}.md").write_text("\n".join([*page, ""]), encoding="utf-8")


def main() -> None:
    """Run it: what a case came to is kept beside the page, so that cases can be run one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", action="store_true", help="train and judge ours too")
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name has one of these; none: the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind = "model" if options.model else "floor"
    kept = ROOT / f"docs/benchmarks/cases/{kind}"
    kept.mkdir(parents=True, exist_ok=True)
    every = cases(options.data, options.model)
    files = {case.name: kept / (re.sub(r"[^a-z0-9]+", "-", case.name.lower()) + ".json") for case in every}
    answer = {}
    for case in every:
        if any(words in case.name for words in options.only):
            print(case.name, flush=True)
            found = judged(case, range(options.seeds), options.model)
            files[case.name].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            answer[case.name] = found["scores"]
            write_page(kind, files, every)
    write_page(kind, files, every)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
