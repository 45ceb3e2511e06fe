"""What each part of the model is worth: one thing changed at a time, held-out loss and a linear probe of types.

usage: make bench-ablation BENCH='--data ../shared/data --seeds 3'; writes docs/benchmarks/ablations.md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_floor import ROOT, kang, knowledge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from train.evaluation.cellfloor import Annotator, PrincipalComponents
from train.evaluation.folds import FoldSettings, make_folds
from train.evaluation.ours import ModelEmbedder
from train.evaluation.scratch import ScratchSettings, held_out_loss, train_on
from train.evaluation.study import Study
from train.tokens import TokenSettings


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


def measured(train: Study, test: Study, settings: ScratchSettings, seed: int) -> tuple[float, float, float]:
    """Return held-out loss, macro F1 and milliseconds a step."""
    begin = time.monotonic()
    model = train_on(train, settings, seed)
    step_ms = 1000 * (time.monotonic() - begin) / settings.steps
    probe = Annotator("ours", ModelEmbedder(model), LogisticRegression(max_iter=2000)).fit(train)
    true = test.label("cell_type").astype(str)
    macro = f1_score(true, probe.predict(test), labels=sorted(set(true)), average="macro")
    return held_out_loss(model, test, settings), float(macro), step_ms


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


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    study = kang(options.data)
    fold = make_folds(study, FoldSettings(by="donor_id"))[0]
    train, test = study.take(fold.train_C), study.take(np.flatnonzero(fold.test_C)[:1500])
    lines = [(ROOT / "tests/bench/ablation_intro.md").read_text(encoding="utf-8").rstrip()]
    for name, settings in variants(knowledge(options.data)).items():
        rows = np.array([measured(train, test, settings, seed) for seed in range(options.seeds)])
        mean, low, high = rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0)
        loss, told = (f"{mean[k]:.4f} ({low[k]:.4f} to {high[k]:.4f})" for k in range(2))
        lines.append(f"| {name} | {options.seeds} | {loss} | {told} | {np.median(rows[:, 2]):.0f} |")
        print(lines[-1], flush=True)
        (ROOT / "docs/benchmarks/ablations.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    lines += [
        "",
        "## Pretrained or from scratch: few labels of each type",
        "",
        "| | labels of a type | macro F1 of types |",
        "|---|---|---|",
    ]
    for labels in (5, 20):
        many = [few_labels(train, test, labels, seed) for seed in range(options.seeds)]
        for name in many[0]:
            values = np.array([one[name] for one in many])
            lines.append(f"| {name} | {labels} | {values.mean():.3f} ({values.min():.3f} to {values.max():.3f}) |")
            print(lines[-1], flush=True)
        (ROOT / "docs/benchmarks/ablations.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
