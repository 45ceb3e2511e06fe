"""What a model has to beat on public data, and where it can be told: floor, replicate and gate of every suite.

usage: make bench-floor BENCH='--data ../shared/data --seeds 3'; the last line of output is one JSON object, and
docs/benchmarks/floor.md is written anew. Every line of it says what the dataset cannot carry.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd

from train.evaluation.cellfloor import annotation_floor, forecast_floor, translation_floor
from train.evaluation.floor import effect_floor
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.judge import by_seed
from train.evaluation.novelty import NOVELTY, novelty_floor, novelty_suite
from train.evaluation.perturb import METRICS, perturb_suite
from train.evaluation.score import Score, Value, score
from train.evaluation.study import Study, from_anndata
from train.evaluation.suites import ANNOTATE, FORECAST, TRANSLATE, annotate_suite, forecast_suite, translate_suite
from train.knowledge import read_sets

ROOT = Path(__file__).parents[2]


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


def worm_l2(data: Path) -> Study:
    """Larvae of C. elegans, two plates, types of the source."""
    cells = anndata.read_h5ad(data / "derived/worm_l2.h5ad")
    known = cells.obs["cao_cell_type"].astype(str)
    cells = cells[~known.isin(["nan", "NA", ""])].copy()
    return from_anndata({"RNA": cells}, {"cell_type": "cao_cell_type", "donor_id": "plate"})


def citeseq(data: Path) -> Study:
    """200 blood cells with 14 antibodies; types are clusters of the antibodies' source, or one."""
    cells = anndata.read_h5ad(data / "citeseq/pbmc_10k_protein_v3.h5ad")
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


def effects_case(study: Study, settings: FoldSettings, data: Path, columns: tuple[str, ...] = ("cell_type",)) -> Any:
    """Return what runs the perturbation suite."""
    folds = make_folds(study, settings)
    members = read_sets([data / "ref/gmt/human_reactome_v2025.gmt", data / "ref/gmt/h.all.v7.0.symbols.gmt"])
    methods = {one.name: (lambda seed, one=one: one) for one in effect_floor("RNA", columns, members)}
    return lambda seeds: (perturb_suite(study, folds, methods, "RNA", columns, seeds), METRICS)


def cases(data: Path) -> list[Case]:
    """Return everything that is run."""
    stimulated = {"perturbation": ("IFNB",)}
    kang_cells, embryo = kang(data), worm(data)
    inner = tuple(sorted({str(t) for t in embryo.obs["time"].dropna()}, key=float)[1:-1])
    cite, multi, larvae = citeseq(data), multiome(data), worm_l2(data)
    return [
        Case(
            "papalexi_dev, unseen targets",
            "few of the 21 targets respond",
            effects_case(papalexi(data), FoldSettings(by="target", folds=3), data),
        ),
        Case(
            "kang, IFN-β in unseen cell types",
            "one perturbation: there is nothing to tell apart",
            effects_case(kang_cells, FoldSettings(by="cell_type", where=stimulated), data),
        ),
        Case(
            "perturbench_devel, unseen doubles",
            "five doubles of 100 cells, and singles as noisy as they are",
            effects_case(
                norman_cells := norman(data),
                FoldSettings(by="perturbation", held=doubles(norman_cells), folds=1),
                data,
            ),
        ),
        Case(
            "kang, types of an unseen donor",
            "two donors, five types; units are donors",
            annotation_case(kang_cells, FoldSettings(by="donor_id")),
        ),
        Case(
            "worm_l2, types on an unseen plate",
            "types are clusters of the same RNA: optimistic for everybody",
            annotation_case(larvae, FoldSettings(by="donor_id", folds=3)),
        ),
        Case(
            "kang, each type as a new one",
            "five types, one of them far larger than the others",
            novelty_case(kang_cells),
        ),
        Case(
            "citeseq, RNA → protein",
            "200 cells, 14 antibodies, no types: a smoke test",
            translation_case(cite, "protein"),
        ),
        Case("multiome, RNA → ATAC", "45 genes, 174 peaks, no types: a smoke test", translation_case(multi, "ATAC")),
        Case(
            "worm embryo, unseen time",
            "times were estimated from the transcriptome, each is its own batch: plumbing, not evidence",
            lambda seeds: (
                forecast_suite(
                    embryo,
                    make_folds(embryo, FoldSettings(by="time", held=inner)),
                    by_seed(lambda seed: forecast_floor("RNA", seed=seed)),
                    seeds=seeds,
                ),
                FORECAST,
            ),
        ),
    ]


def doubles(study: Study) -> tuple[str, ...]:
    """Return the combinations both of whose targets were also hit alone."""
    names = set(study.label("perturbation"))
    return tuple(sorted(n for n in names if "+" in n and set(n.split("+")) <= names))


def annotation_case(study: Study, settings: FoldSettings) -> Any:
    """Return what runs the annotation suite."""
    folds, make = make_folds(study, settings), by_seed(lambda seed: annotation_floor("RNA", seed=seed))
    return lambda seeds: (annotate_suite(study, folds, make, seeds=seeds), ANNOTATE)


def novelty_case(study: Study) -> Any:
    """Return what runs the novelty suite: each type is held out in turn."""
    folds = make_folds(study, FoldSettings(by="cell_type"))
    make = by_seed(lambda seed: novelty_floor("RNA", seed=seed))
    return lambda seeds: (novelty_suite(study, folds, make, seeds=seeds), NOVELTY)


def translation_case(study: Study, target: str) -> Any:
    """Return what runs the translation suite from RNA; cells are dealt to five folds."""
    folds = make_folds(study, FoldSettings(by="donor_id"))
    make = by_seed(lambda seed: translation_floor("RNA", target, "", seed))
    return lambda seeds: (translate_suite(study, folds, make, "RNA", target, seeds=seeds), TRANSLATE)


def line(name: str, one: Score) -> str:
    """Write a score as a line of a table."""
    verdict = one.verdict if one.verdict != "floor only" else "informative"
    return (
        f"| {name} | {one.metric} ({one.better} is better) | {one.n_units} | {one.b:.3f} ({one.b_method}) | "
        f"{one.r:.3f} | {one.gate:.1f} | {verdict} |"
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/floor.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines, answer, caveats = [], {}, []
    for case in cases(options.data):
        values, better = case.run(range(options.seeds))
        scores = score(values, better)
        answer[case.name] = [asdict(one) for one in scores]
        caveats.append(f"- **{case.name}**: {case.caveat}.")
        for one in scores:
            lines.append(line(case.name, one))
            print(lines[-1], flush=True)
    head = [
        "| dataset and question | metric | units | strongest baseline | replicate | gate (SE) | |",
        "|" + "---|" * 7,
    ]
    intro = (ROOT / "tests/bench/floor_intro.md").read_text(encoding="utf-8")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join([intro, *head, *lines, "", "## What each dataset cannot carry", "", *caveats, ""]))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
