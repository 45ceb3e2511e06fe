"""Speed of the training loop against the barest loop and Hugging Face's Trainer, on the same batches, on one machine.

    python tests/bench/bench_train.py [--steps 100] [--turns 5] [--only ours,bare] [--folder build/bench-train]

All train the model of ``infra/runs/laptop.toml`` on CPU with one torch thread, from the same weights, on the same cells
in the same order with the same masks; tokens are counted and first losses compared, and the benchmark stops where they
differ. Ours reads its batches from the snapshot while it trains; the peers get them from memory, made before. Every
contender is a process of its own that stays; they take turns, ``--turns`` times, each turn a run of its own whose first
``WARM`` steps are not counted; medians are told. Cells are simulated. The Trainer is installed beside the folder, into
``build/peers-train``. Needs a machine with two quiet cores. The last line is one JSON object; a run of all contenders
with five turns or more writes ``docs/benchmarks/train.md`` and its chart, others write theirs into the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from bench_stream import ROOT, Contender

from ingest.simulate import SimulationSettings, simulate
from store.schema import DatasetPlan, Features
from store.settings import load_settings, parse_settings
from store.snapshot import SnapshotSettings, create_snapshot
from store.writer import LakeWriter, write_counts
from train.settings import RunSettings

CELLS, GENES, PROTEINS = 8000, 1000, 100
WARM = 10
"""Steps that no turn counts."""
CHECKPOINT_EVERY = 20
TRANSFORMERS = "5.23.0"
FULL_TURNS = 5
ENVIRONMENT = ("OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", "RAY_USAGE_STATS_ENABLED=0", "HF_HUB_OFFLINE=1")
PARTS = ("data_wait_s", "h2d_s", "forward_backward_s", "optimizer_s", "checkpoint_s")
"""What a step's seconds go to, in a run's own metrics."""
SAME = 1e-3
"""Relative difference between first losses that two processes and one may have: sums are taken in another order."""

Answer = dict[str, float]


def prepare(folder: Path) -> str:
    """Simulate cells with RNA and proteins and make lake and snapshot of them, unless they are there."""
    lake = folder / f"lake-{CELLS}-{GENES}-{PROTEINS}"
    done = lake.with_suffix(".done")
    if done.exists():
        return str(lake)
    shutil.rmtree(lake, ignore_errors=True)
    made = simulate(SimulationSettings(cells=CELLS, genes=GENES, proteins=PROTEINS, peaks=1))
    names = {"RNA": made.truth.genes, "protein": made.truth.proteins}
    features = {name: Features(ids, ids, ["x"] * len(ids), [0] * len(ids)) for name, ids in names.items()}
    with LakeWriter(str(lake)) as writer:
        reservation = writer.reserve(DatasetPlan("simulated", "synthetic_construct", "bench", CELLS, features))
        blocks = [write_counts(reservation, name, 0, made.counts[name]) for name in features]
        writer.commit(reservation, made.obs, blocks)
    create_snapshot(str(lake), "bench", SnapshotSettings(fractions={"train": 1.0}))
    done.touch()
    return str(lake)


def install_trainer(target: Path) -> None:
    """Install the Trainer beside, unless it is there; what it needs itself is in this environment."""
    if not (target / f"done-{TRANSFORMERS}").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(target), f"transformers=={TRANSFORMERS}"], check=True)
        (target / f"done-{TRANSFORMERS}").touch()


def run_settings(folder: Path, name: str, steps: int, **changes: Any) -> RunSettings:
    """Return the laptop recipe on the benchmark's cells, without evaluation and without saves on the way."""
    values = load_settings(RunSettings, ROOT / "infra/runs/laptop.toml").model_dump(mode="json")
    values["data"] |= {"test_split": ""}
    values |= {"lake": prepare(folder), "snapshot": "bench", "output": str(folder / "runs"), "name": name}
    values |= {"steps": WARM + steps, "workers": 1, "threads": 1, "checkpoint_every": WARM + steps}
    return parse_settings(RunSettings, values | changes, where="bench-train")


# ---------------------------------------------------------------------------------------------------- contenders
def ours(settings: RunSettings) -> Answer:
    """Train as a worker does, in this process."""
    from train.loop import Run

    run = Run(settings, world=1)
    run.train()
    return from_metrics(settings) | {"parameters": sum(part.numel() for part in run.plain.parameters())}


def workers(settings: RunSettings) -> Answer:
    """Train on Ray Train."""
    from train.launch import launch

    launch(settings)
    return from_metrics(settings)


def from_metrics(settings: RunSettings) -> Answer:
    """Return what a run's own metrics say of the steps after warm-up, and the wall clock between their lines."""
    from train.folder import run_folder
    from train.record import read_metrics

    rows = read_metrics(run_folder(settings) / "metrics.jsonl")
    sums = {key: sum(row[key] for row in rows[WARM:]) for key in (*PARTS, "tokens")}
    return {
        "seconds": rows[-1]["time"] - rows[WARM - 1]["time"],
        "told_s": sum(sums[key] for key in PARTS),
        "data_wait_s": sums["data_wait_s"],
        "checkpoint_s": sums["checkpoint_s"],
        "tokens": sums["tokens"],
        "loss_first": rows[0]["loss"],
    }


class Batches:
    """A run's weights and objective, and the batches of all its steps in memory."""

    def __init__(self, settings: RunSettings) -> None:
        from train.loop import Run

        run = Run(settings, world=1)
        self.settings, self.model, self.objective = settings, run.plain, run.objective
        self.cells = list(run.stream.steps(0, settings.steps))
        self.tokens: list[int] = []
        self.ends: list[float] = []
        self.loss_first = 0.0

    def loss(self, cells: Any, step: int) -> Any:
        """Return the loss of a batch as our loop minimises it, and count its tokens."""
        loss, n_tokens, _ = self.objective(self.model, self.model, cells, step)
        self.tokens.append(n_tokens)
        if step == 0:
            self.loss_first = float(loss.rebuilt.detach() / loss.pairs)
        return loss.total / loss.pairs

    def answer(self) -> Answer:
        """Return the figures of the steps after warm-up; ``ends`` holds when each step ended."""
        if len(self.ends) != self.settings.steps:
            raise RuntimeError(f"{len(self.ends)} steps were taken, not {self.settings.steps}")
        seconds = self.ends[-1] - self.ends[WARM - 1]
        return {"seconds": seconds, "tokens": sum(self.tokens[WARM:]), "loss_first": self.loss_first}


def bare(settings: RunSettings, *, fused: bool = False) -> Answer:
    """Train in the barest loop there is."""
    import torch

    batches, optim = Batches(settings), settings.optim
    optimizer = torch.optim.AdamW(
        batches.model.parameters(), optim.lr, betas=(0.9, 0.98), weight_decay=optim.weight_decay, fused=fused
    )
    for step, cells in enumerate(batches.cells):
        batches.loss(cells, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.ends.append(time.perf_counter())
    return batches.answer()


def bare_fused(settings: RunSettings) -> Answer:
    """Train in the barest loop with the optimizer that the Trainer takes by default."""
    return bare(settings, fused=True)


def hf_trainer(settings: RunSettings) -> Answer:
    """Train with Hugging Face's Trainer as it comes, without evaluation, saves and reports."""
    import torch
    import transformers

    if transformers.__version__ != TRANSFORMERS:
        raise RuntimeError(f"{transformers.__file__} is version {transformers.__version__}, not {TRANSFORMERS}")
    batches, optim = Batches(settings), settings.optim

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = batches.model

        def forward(self, cells: Any, step: int) -> dict[str, Any]:
            return {"loss": batches.loss(cells, step)}

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            batches.ends.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(Path(settings.output) / settings.name),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=optim.lr,
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip_norm,
        lr_scheduler_type="cosine",
        warmup_steps=optim.warmup_steps,
        use_cpu=True,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        WithLoss(),
        arguments,
        data_collator=lambda items: items[0],
        train_dataset=[{"cells": cells, "step": step} for step, cells in enumerate(batches.cells)],
        callbacks=[Clock()],
    )
    trainer.train()
    return batches.answer()


CONTENDERS: dict[str, tuple[str, Callable[[RunSettings], Answer], dict[str, Any]]] = {
    "ours": ("ours, one process", ours, {}),
    "saving": (f"ours, a checkpoint every {CHECKPOINT_EVERY} steps", ours, {"checkpoint_every": CHECKPOINT_EVERY}),
    "bare": ("barest PyTorch loop", bare, {}),
    "bare_fused": ("barest PyTorch loop, fused optimizer", bare_fused, {}),
    "hf_trainer": ("Hugging Face Trainer (fused optimizer)", hf_trainer, {}),
    "one_worker": ("ours, Ray Train, one worker", workers, {"workers": 1}),
    "two_workers": ("ours, Ray Train, two workers", workers, {"workers": 2}),
}
"""Name to what it is, what it does, and how its settings differ."""


def contend(name: str, folder: Path, steps: int) -> None:
    """Take a turn for each line of standard input; what others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(2, 1)
    _, train, changes = CONTENDERS[name]
    print(json.dumps({"ready": 1}), file=answers, flush=True)
    for turn in sys.stdin:
        answer = train(run_settings(folder, f"{name}-{int(turn)}", steps, **changes))
        print(json.dumps(answer), file=answers, flush=True)


# --------------------------------------------------------------------------------------------------------- figures
def take_turns(names: list[str], folder: Path, steps: int, turns: int) -> dict[str, list[Answer]]:
    """Have all contenders train in turns; return what each turn of each said."""
    beside = folder.parent / "peers-train"
    if "hf_trainer" in names:
        install_trainer(beside)
    found = []
    for name in names:
        path = [f"PYTHONPATH={os.pathsep.join([str(beside), str(ROOT)] if name == 'hf_trainer' else [str(ROOT)])}"]
        words = ["--as", name, "--steps", str(steps), "--folder", str(folder)]
        found.append(Contender(name, ["env", *ENVIRONMENT, *path, sys.executable, __file__, *words]))
    taken: dict[str, list[Answer]] = defaultdict(list)
    for turn in range(turns):
        for one in found:
            answer = one.one_pass(str(turn))
            taken[one.name].append(answer)
            check_alike(taken, one.name)
            speed, step_ms = answer["tokens"] / answer["seconds"], 1000 * answer["seconds"] / steps
            print(f"{turn} {one.name:>12}: {speed:>9,.0f} tokens/s, {step_ms:,.1f} ms a step", flush=True)
    for one in found:
        one.close()
    return taken


def check_alike(taken: dict[str, list[Answer]], name: str) -> None:
    """Stop unless the newest turn trained on as many tokens as the very first, from the same loss."""
    first, newest = next(iter(taken.values()))[0], taken[name][-1]
    if newest["tokens"] != first["tokens"] or abs(newest["loss_first"] / first["loss_first"] - 1) > SAME:
        told = [f"{one['tokens']:,.0f} tokens from a loss of {one['loss_first']:.6f}" for one in (newest, first)]
        sys.exit(f"{name} trained on {told[0]}, {next(iter(taken))} on {told[1]}: this is not the same work")


def speeds(answers: list[Answer]) -> list[float]:
    """Return tokens a second of each turn."""
    return [one["tokens"] / one["seconds"] for one in answers]


def share(answers: list[Answer] | None, key: str) -> float | None:
    """Return the median share of a turn's seconds that something takes."""
    return None if not answers else round(statistics.median(one[key] / one["seconds"] for one in answers), 4)


def summary(taken: dict[str, list[Answer]], options: argparse.Namespace, load: float) -> dict[str, Any]:
    """Put the figures together; what was left out is null."""
    speed = {name: statistics.median(speeds(answers)) for name, answers in taken.items()}

    def ratio(one: str, other: str) -> float | None:
        return round(speed[one] / speed[other], 3) if one in speed and other in speed else None

    mine, saving = taken.get("ours"), taken.get("saving")
    saves = options.steps / CHECKPOINT_EVERY
    answer: dict[str, Any] = {f"{name}_tokens_s": round(speed[name]) if name in speed else None for name in CONTENDERS}
    return answer | {
        "ours_by_its_metrics_tokens_s": mine
        and round(statistics.median(one["tokens"] / one["told_s"] for one in mine)),
        "ours_over_bare": ratio("ours", "bare"),
        "ours_over_hf_trainer": ratio("ours", "hf_trainer"),
        "data_wait_share": share(mine, "data_wait_s"),
        "checkpoint_every": CHECKPOINT_EVERY,
        "checkpoint_block_share": share(saving, "checkpoint_s"),
        "checkpoint_block_s": saving and round(statistics.median(one["checkpoint_s"] for one in saving) / saves, 4),
        "saving_over_ours": ratio("saving", "ours"),
        "scaling_1_to_2": ratio("two_workers", "one_worker"),
        "two_workers_data_wait_share": share(taken.get("two_workers"), "data_wait_s"),
        "spread_tokens_s": {
            name: [round(min(speeds(answers))), round(max(speeds(answers)))] for name, answers in taken.items()
        },
        "step_ms": {
            name: round(1000 * statistics.median(one["seconds"] for one in answers) / options.steps, 1)
            for name, answers in taken.items()
        },
        "tokens_of_a_step": round(next(iter(taken.values()))[0]["tokens"] / options.steps),
        "parameters": mine and round(mine[0]["parameters"]),
        "cells": CELLS,
        "features": {"RNA": GENES, "protein": PROTEINS},
        "steps": options.steps,
        "turns": options.turns,
        "hardware": hardware() | {"load_before": round(load, 2)},
        "versions": {name: version(name) for name in ("torch", "accelerate", "ray", "numpy", "tiledbsoma")}
        | {"transformers": TRANSFORMERS, "python": platform.python_version()},
    }


def hardware() -> dict[str, Any]:
    """Say what the machine is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


# ------------------------------------------------------------------------------------------------------------ page
def page(answer: dict[str, Any], steps: int) -> str:
    """Write the page of a run of all contenders."""
    machine, speed = answer["hardware"], answer["bare_tokens_s"]
    lines = [
        "# The training loop",
        "",
        f"Written by `make bench-train`. The model of `infra/runs/laptop.toml` ({answer['parameters']:,} weights) on "
        f"{CELLS:,} simulated cells with {GENES:,} genes and {PROTEINS} proteins, "
        f"{answer['tokens_of_a_step']:,} visible tokens a step; CPU, one torch thread a process. All train from the "
        "same weights on the same cells in the same order with the same masks: the benchmark compares tokens and first "
        "losses, and stops where they differ. Ours reads its batches from the snapshot while it trains; the peers get "
        f"them from memory, made before. Medians of {answer['turns']} turns of {steps} steps, wall clock, after {WARM} "
        "steps of warm-up, contenders in turns.",
        "",
        "| | tokens/s | lowest to highest | ms a step | over the barest loop |",
        "|---|---|---|---|---|",
    ]
    for name, (what, *_) in CONTENDERS.items():
        low, high = answer["spread_tokens_s"][name]
        rate = answer[f"{name}_tokens_s"]
        lines.append(
            f"| {what} | {rate:,} | {low:,} to {high:,} | {answer['step_ms'][name]:.1f} | {rate / speed:.2f} |"
        )
    lines += [
        "",
        "![Tokens a second of each contender](../images/train.png)",
        "",
        "The barest loop has no clipping, no schedule, no metrics and no check that the loss is a number. The default "
        "optimizer of the Trainer is the fused AdamW, as ours is; the first bare loop takes PyTorch's default.",
        "",
        f"- Waiting for data: {answer['data_wait_share']:.2%} of our step ({answer['two_workers_data_wait_share']:.2%} "
        "with two workers on two cores, each of which also decodes).",
        f"- Saving every {CHECKPOINT_EVERY} steps: a step waits {answer['checkpoint_block_s']:.3f} s for a save, "
        f"{answer['checkpoint_block_share']:.2%} of all time; with saves there are {answer['saving_over_ours']:.2f} "
        "times the tokens a second of a run without.",
        f"- From one worker to two, same global batch: {answer['scaling_1_to_2']:.2f} times the tokens a second.",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; load before the start "
        f"{machine['load_before']}. " + ", ".join(f"{name} {one}" for name, one in answer["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def draw(path: Path, answer: dict[str, Any]) -> None:
    """Draw the chart."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in reversed(CONTENDERS) if name in answer["spread_tokens_s"]]
    rates = [answer[f"{name}_tokens_s"] for name in names]
    spread = [answer["spread_tokens_s"][name] for name in names]
    error = [[rate - low for rate, (low, _) in zip(rates, spread, strict=True)]]
    error += [[high - rate for rate, (_, high) in zip(rates, spread, strict=True)]]
    colours = ["#2a6f97" if CONTENDERS[name][0].startswith("ours") else "#b0b0b0" for name in names]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(names) + 1.2), layout="constrained")
    bars = axes.barh([CONTENDERS[name][0] for name in names], rates, xerr=error, color=colours)
    axes.bar_label(bars, [f"{rate / 1000:,.1f} k" for rate in rates], padding=8, fontsize=9)
    axes.set_xlabel("tokens per second (median of the turns; lines: lowest and highest)")
    axes.set_title("Training the same model on the same batches; ours in blue")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help=f"counted steps of a turn, times {CHECKPOINT_EVERY}")
    parser.add_argument("--turns", type=int, default=FULL_TURNS)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench-train")
    parser.add_argument("--as", dest="contender", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    if options.contender:
        contend(options.contender, folder, options.steps)
        return
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(CONTENDERS)):
        parser.error(f"--only {unknown[0]}: contenders are {', '.join(CONTENDERS)}")
    if options.steps < 1 or options.steps % CHECKPOINT_EVERY or options.turns < 1:
        parser.error(f"--steps is a multiple of {CHECKPOINT_EVERY}, --turns is 1 or more")
    load = os.getloadavg()[0]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    prepare(folder)
    try:
        taken = take_turns(names, folder, options.steps, options.turns)
    except RuntimeError as error:
        sys.exit(f"{error}; what it said is in {folder / str(error).split()[0]}.log")
    answer = summary(taken, options, load)
    everyone = set(names) == set(CONTENDERS)
    docs = ROOT / "docs" if everyone and options.turns >= FULL_TURNS else folder
    draw(docs / "images/train.png", answer)
    if everyone:
        (docs / "benchmarks").mkdir(exist_ok=True)
        (docs / "benchmarks/train.md").write_text(page(answer, options.steps), encoding="utf-8")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
