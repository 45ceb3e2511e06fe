"""What each part of the model is worth: one thing changed at a time, held-out loss and a linear probe of types.

usage: make bench-ablation BENCH='--data ../shared/data --seeds 3 [--only WORD ...] [--again]'; writes
docs/benchmarks/ablations.md from what is kept in docs/benchmarks/cases/ablation.json: what was measured already is not
measured anew unless ``--again`` says so, so that an hour of it can be had in pieces.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_floor import ROOT, kang, knowledge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from train.checkpoint import code_commit
from train.evaluation.cellfloor import Annotator, PrincipalComponents
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.ours import ModelEmbedder
from train.evaluation.scratch import ScratchSettings, held_out_loss, train_on
from train.evaluation.study import Study
from train.tokens import TokenSettings

LABELS = (5, 20)


def variants(members: dict[str, list[str]]) -> dict[str, ScratchSettings]:
    """Return what is compared; the first is the default."""
    plain = ScratchSettings(steps=200)
    return {
        "as it ships": plain,
        "features begin at random": replace(plain, spectral=False),
        "values in bins": replace(plain, tokens=TokenSettings(values="bins")),
        "values as ranks": replace(plain, tokens=TokenSettings(values="rank")),
        "with gene sets (Hallmark, Reactome)": replace(plain, sets=members),
        "with gene sets, memberships permuted": replace(plain, sets=members, permute=True),
        "hybrid attention (4 blocks)": replace(plain, model={"attention": "hybrid", "layers": 4}),
        "joint attention (4 blocks)": replace(plain, model={"layers": 4}),
        "no query decoder to speak of (2 queries)": replace(plain, queries=2),
        "cell types are not told": replace(plain, types=False),
    }


def measured(train: Study, test: Study, settings: ScratchSettings, seed: int) -> dict[str, float]:
    """Return held-out loss, macro F1 and milliseconds a step."""
    begin = time.monotonic()
    model = train_on(train, settings, seed)
    step_ms = 1000 * (time.monotonic() - begin) / settings.steps
    probe = Annotator("ours", ModelEmbedder(model), LogisticRegression(max_iter=2000)).fit(train)
    true = test.label("cell_type").astype(str)
    macro = f1_score(true, probe.predict(test), labels=sorted(set(true)), average="macro")
    return {"loss": held_out_loss(model, test, settings), "macro_f1": float(macro), "step_ms": step_ms}


def few_labels(train: Study, test: Study, labels: int, seed: int) -> dict[str, float]:
    """Return macro F1 of a linear probe that is shown a few labels of each type, on embeddings of several origins."""
    random = np.random.default_rng([seed, labels])
    type_C = train.label("cell_type")
    rows = [random.permutation(np.flatnonzero(type_C == name))[:labels] for name in sorted(set(type_C))]
    shown, settings = train.take(np.concatenate(rows)), ScratchSettings(steps=200, types=False)
    embedders = {
        "pretrained: learned from all cells, no label": ModelEmbedder(train_on(train, settings, seed)),
        "scratch: learned from the labelled cells alone": ModelEmbedder(train_on(shown, settings, seed)),
        "principal components of all cells": PrincipalComponents("RNA", seed=seed).fit(train),
        "principal components of the labelled cells": PrincipalComponents("RNA", seed=seed).fit(shown),
    }
    true = test.label("cell_type").astype(str)
    found = {}
    for name, embedder in embedders.items():
        probe = LogisticRegression(max_iter=2000).fit(embedder.embed(shown), shown.label("cell_type").astype(str))
        told = probe.predict(embedder.embed(test))
        found[name] = float(f1_score(true, told, labels=sorted(set(true)), average="macro"))
    return found


class Kept:
    """What was measured, by what, seed and figure; written after each."""

    def __init__(self, path: Path, *, again: bool) -> None:
        self.path = path
        self.found = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not again else {}

    def measure(self, what: str, seed: int, work: Callable[[], dict[str, float]]) -> None:
        """Do the work unless it was done."""
        mine = self.found.setdefault(what, {})
        if str(seed) not in mine:
            mine[str(seed)] = work() | {"commit": code_commit()}
            self.path.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            print(what, seed, mine[str(seed)], flush=True)

    def lines(self, what: str, figures: Sequence[str], digits: str) -> list[str]:
        """Return the figures' means and ranges over seeds."""
        told = []
        for figure in figures:
            values = np.array([one[figure] for one in self.found[what].values()])
            told.append(f"{values.mean():{digits}} ({values.min():{digits}} to {values.max():{digits}})")
        return told


def page(kept: Kept, names: Sequence[str]) -> str:
    """Write what is kept."""
    lines = [(ROOT / "tests/bench/ablation_intro.md").read_text(encoding="utf-8").rstrip()]
    for name in names:
        if name in kept.found:
            ms = np.median([one["step_ms"] for one in kept.found[name].values()])
            loss, told = *kept.lines(name, ["loss"], ".4f"), *kept.lines(name, ["macro_f1"], ".3f")
            lines.append(f"| {name} | {len(kept.found[name])} | {loss} | {told} | {ms:.0f} |")
    lines += ["", "## Pretrained or from scratch: few labels of each type", ""]
    lines += ["| | labels of a type | seeds | macro F1 of types |", "|---|---|---|---|"]
    for labels in LABELS:
        rows = kept.found.get(few(labels), {})
        for name in [figure for figure in next(iter(rows.values()), {}) if figure != "commit"]:
            (told,) = kept.lines(few(labels), [name], ".3f")
            lines.append(f"| {name} | {labels} | {len(rows)} | {told} |")
    return "\n".join([*lines, ""])


def few(labels: int) -> str:
    """Name the comparison on so many labels of a type."""
    return f"few labels ({labels})"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="words of what is measured")
    parser.add_argument("--again", action="store_true", help="forget what was measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    study, every = kang(options.data), variants(knowledge(options.data))
    fold = make_folds(study, FoldSettings(by="donor_id"))[0]
    train, test = study.take(fold.train_C), study.take(np.flatnonzero(fold.test_C)[:1500])
    kept = Kept(ROOT / "docs/benchmarks/cases/ablation.json", again=options.again)
    jobs: dict[str, Callable[[int], dict[str, float]]] = {
        name: partial(measured, train, test, settings) for name, settings in every.items()
    }
    jobs |= {few(labels): partial(few_labels, train, test, labels) for labels in LABELS}
    for name, job in jobs.items():
        for seed in range(options.seeds):
            if any(word in name for word in options.only):
                kept.measure(name, seed, partial(job, seed))
                (ROOT / "docs/benchmarks/ablations.md").write_text(page(kept, list(every)), encoding="utf-8")


if __name__ == "__main__":
    main()
