"""This module is ``python -m train``: train a model on a snapshot, look for leaks, and judge what came of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from store import command
from store.command import answer, console
from store.settings import load_settings
from train.settings import RunSettings

if TYPE_CHECKING:
    from train.evaluation.folds import FoldSettings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SHOWN_EVERY_S = 10.0


@app.command("run")
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: lake, snapshot, steps, model, ...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the file's, such as optim.lr=1e-3 or steps=50.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster; RAY_ADDRESS if left out, and without that Ray is started here."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Train a model on a snapshot with Accelerate under Ray Train, and export a checkpoint that can be served.

    The run lives in <output>/<name>: metrics.jsonl, tensorboard/, state/ to go on from, checkpoint/ to serve.

    Stopped or killed, the same command goes on where it was, also with another number of workers. The word "run" may be
    left out.

    Example: python -m train infra/runs/laptop.toml --set snapshot=blood --set steps=500
    """
    settings = load_settings(RunSettings, recipe, overrides or ())
    if address is not None:
        settings = settings.model_copy(update={"address": address})
    if not console.is_terminal:
        console.print(f"run {settings.name}: {settings.steps:,} steps on {settings.workers} workers")
    from train.launch import as_json, launch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(f"{settings.name} on {settings.workers} workers", total=settings.steps, loss=float("nan"))
        lines = Lines(settings.steps)

        def progress(step: int, loss: float) -> None:
            bars.update(bar, completed=step, loss=loss)
            lines.tell(step, loss)

        summary = launch(settings, progress, lambda words: bars.console.print(f"waiting: {words}"))
    if json:
        answer("train-run/v1", **as_json(summary))
    table = Table("steps", "train loss", "test loss", "cells/s", "data wait", "weights")
    table.add_row(
        f"{summary.steps:,}",
        f"{summary.loss_first:.4f} → {summary.loss_last:.4f}",
        f"{summary.loss_test_first:.4f} → {summary.loss_test:.4f}",
        f"{summary.cells_per_s:,.0f}",
        f"{summary.data_wait_share:.1%}",
        f"{summary.parameters:,}",
    )
    console.print(table)
    console.print(f"checkpoint: {summary.checkpoint}", soft_wrap=True)


class Lines:
    """Where no terminal can draw a bar, as in a job's log: a line for the first step, and one every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._told, self._next_s = 0, 0.0

    def tell(self, step: int, loss: float) -> None:
        """A step is finished."""
        now = time.monotonic()
        if not console.is_terminal and step > self._told and now >= self._next_s:
            self._told, self._next_s = step, now + SHOWN_EVERY_S
            console.print(f"step {step:,} of {self.total:,}, loss {loss:.4f}")


Lake = Annotated[str, typer.Option(help="The lake that holds the snapshot.")]
Name = Annotated[str, typer.Option(help="The snapshot whose cells are held out and judged by.")]
Folds = Annotated[
    Path | None,
    typer.Option(help="What is held out, as TOML: by, held, folds, where, ...; the test split if left out."),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value over the folds' file's.")]
Adapter = Annotated[Path | None, typer.Option(help="A saved adapter that the checkpoint answers with.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="The checkpoint; left out: floor and replicate only.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="perturb, annotate, embed, calibration, translate, forecast, novelty or agnostic.")
    ] = "annotate",
    snapshot: Name = "",
    lake: Lake = "lake",
    folds: Folds = None,
    overrides: Overrides = None,
    measurement: Annotated[str, typer.Option(help="What is predicted, or looked at to tell types.")] = "RNA",
    source: Annotated[str, typer.Option(help="What is translated from, or decides disputes (agnostic).")] = "RNA",
    columns: Annotated[
        list[str] | None, typer.Option("--context", help="Columns that make a context, or hold the types.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option(help="GMT files of gene sets, for the baseline that knows them (perturb).")
    ] = None,
    gated: Annotated[
        bool, typer.Option("--gated", help="Judge the best baseline + g times ours (perturb, forecast, translate).")
    ] = False,
    members: Annotated[
        int, typer.Option(min=0, help="Adapters beside the checkpoint, asked together (annotate, calibration).")
    ] = 0,
    null: Annotated[
        bool,
        typer.Option("--null", help="Judge null arms too: ours with labels, prompts, pairs or gene sets dealt anew."),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of methods and of splits in halves.")] = 3,
    adapter: Adapter = None,
    device: Annotated[str, typer.Option(help="Torch device of the checkpoint, as in cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder of evaluation.json and evaluation.html.")] = Path("evaluation"),
    json: Json = False,
) -> None:
    """Judge a checkpoint between the strongest baseline and a replicate of the experiment, after an audit for leaks.

    Every metric becomes s = (u - b) / (r - b); one whose replicate does not beat the floor gets no score.

    Example: python -m train eval runs/laptop/checkpoint --suite perturb --snapshot blood --set by=target --set folds=3
    """
    from train.checkpoint import json_values
    from train.evaluation.gated import HEAD
    from train.evaluation.judge import Question, judge
    from train.evaluation.ours import NAME
    from train.evaluation.report import means, write_report

    question = Question(
        suite,
        lake,
        snapshot,
        _held_out(folds, overrides),
        measurement,
        source,
        tuple(columns or ["cell_type"]),
        seeds,
        tuple(sets or ()),
        gated,
        members,
        null,
    )
    judged = judge(question, checkpoint, device, adapter)
    scores = judged.scores
    about = {
        "suite": suite,
        "lake": lake,
        "snapshot": snapshot,
        "checkpoint": str(checkpoint or ""),
        **({"adapter": str(adapter)} if adapter else {}),
        "folds": question.folds.model_dump(mode="json"),
        "seeds": seeds,
        "cells": f"{judged.n_cells:,}",
    }
    if judged.left_out:
        missing = f"{judged.left_out:,} cells are left out: {' or '.join(question.looks_at)} was not measured of them"
        about["left out"] = missing
    if judged.gates:
        about["gated"] = [f"{one.baseline} + {one.g:.2f} f, gain {one.gain:.1f} SE" for one in judged.gates]
    who = f"{checkpoint} with {adapter}" if adapter else checkpoint
    what = f"{suite}: {who or ('the transition head' if gated else 'the floor')} on {snapshot}"
    as_json, as_html = write_report(output, what, judged.values, scores, about, judged.nulls)
    if json:
        answer(
            "train-eval/v1", report=str(as_html), data=str(as_json), scores=[json_values(vars(one)) for one in scores]
        )
        return
    table = Table("metric", "units", "u", "b", "r", "gate", "s", "")
    for one in scores:
        spread = "" if one.s != one.s else f"{one.s:.2f} [{one.low:.2f}, {one.high:.2f}]"
        table.add_row(
            f"{one.metric} ({'↑' if one.better == 'higher' else '↓'})",
            str(one.n_units),
            "" if one.u != one.u else f"{one.u:.3f}",
            f"{one.b:.3f}, {one.b_method}",
            f"{one.r:.3f}",
            f"{one.gate:.1f}",
            spread,
            one.verdict,
        )
    console.print(table)
    for arm, found in judged.nulls.items():
        for one in found:
            console.print(f"null arm, {arm} dealt at random: {one.metric} {one.u:.3f} (b {one.b:.3f}), {one.verdict}")
    scored = {one.metric for one in scores}
    for method, metric, mean in means(judged.values):
        if metric not in scored and method in (NAME, HEAD):
            console.print(f"{method}: {metric} {mean:.3f}")
    if judged.left_out:
        console.print(about["left out"])
    console.print("u: the model; b: the strongest baseline; r: a replicate; s = (u - b) / (r - b)")
    console.print(f"report: {as_html}", soft_wrap=True)


@app.command("head")
def fit_transition(
    out: Annotated[Path, typer.Argument(help="The folder that is written.")],
    snapshot: Annotated[str, typer.Option(help="The snapshot whose training cells are learned from.")],
    lake: Lake = "lake",
    split: Annotated[str, typer.Option(help="The split that is learned from.")] = "train",
    by: Annotated[
        str, typer.Option(help="What will be asked for the first time: target, perturbation, or a context's column.")
    ] = "target",
    measurement: Annotated[str, typer.Option(help="What is predicted.")] = "RNA",
    columns: Annotated[
        list[str] | None, typer.Option("--context", help="Columns that make a context; cell_type if left out.")
    ] = None,
    sets: Annotated[list[Path] | None, typer.Option(help="GMT files of gene sets: what is known of targets.")] = None,
    json: Json = False,
) -> None:
    """Fit a transition head (best baseline + g x flow) on a screen, and keep it.

    Serve it: python -m serve run CHECKPOINT --set heads.NAME=OUT. Ask it from Python:
    train.evaluation.head.load_head(OUT).predict(control_cells, "TARGET", "context"), and .interval.

    Example: python -m train head heads/screen --snapshot screen --sets reactome.gmt
    """
    from train.evaluation.head import HeadSettings, fit_head

    words = tuple(columns or ("cell_type",))
    paths = tuple(str(path) for path in sets or ())
    head = fit_head(HeadSettings(lake, snapshot, split, measurement, words, by, paths), out)
    if json:
        answer("train-head/v1", folder=str(out), effects=head.table.n_effects, gate=vars(head.gate))
        return
    found = head.gate
    table = Table("baseline", "error on held-out groups")
    for name, error in sorted(found.errors.items(), key=lambda one: one[1]):
        table.add_row(f"{name} *" if name == found.baseline else name, f"{error:.4f}")
    console.print(table)
    opened = f"open at {found.g:.2f}" if found.g else "shut: the answer is the baseline's"
    console.print(
        f"learned from {head.table.n_effects:,} effects; * is chosen; the gate is {opened} (gain {found.gain:.1f} SE)"
    )
    console.print(f"head: {out}", soft_wrap=True)


@app.command("audit")
def look(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint whose training cells may not be judged by.")
    ] = None,
    snapshot: Name = "",
    lake: Lake = "lake",
    folds: Folds = None,
    overrides: Overrides = None,
    sets: Annotated[list[str] | None, typer.Option(help="GMT files of gene sets that will be used.")] = None,
    adapter: Adapter = None,
    json: Json = False,
) -> None:
    """Look for leaks between what is learned from and what judges it; ends with status 8 where there is one.

    Groups on both sides, copies and near-copies of cells, cells that are not primary data, features chosen on all
    cells, knowledge from after a day, and cells that a checkpoint was trained on. What cannot be checked is a finding.

    Example: python -m train audit --snapshot blood --set by=donor_id --set folds=5
    """
    from train.evaluation.audit import refuse_leaks
    from train.evaluation.judge import Question, load, look_for_leaks

    question = Question("annotate", lake, snapshot, _held_out(folds, overrides), measurement="", sets=tuple(sets or ()))
    study, made, findings = look_for_leaks(question, load(checkpoint, adapter))
    if json:
        answer("train-audit/v1", cells=study.n_cells, folds=len(made), findings=[vars(one) for one in findings])
    refuse_leaks(findings)
    if not json:
        console.print(f"no leak found in {len(made)} folds of {study.n_cells:,} cells")


@app.command("report")
def show(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, <output>/<name>.")],
    json: Json = False,
) -> None:
    """Write a run's report.html and loss.png into its folder, also while it trains and after it was killed.

    Losses, where the time of steps goes, cells and tokens a second, goodput, mixing, settings; one page, no other file.

    Example: python -m train report runs/laptop
    """
    from train.checkpoint import json_values
    from train.report import write_report

    made = write_report(folder)
    if json:
        answer(
            "train-report/v1",
            page=made.page,
            picture=made.picture,
            finished=made.finished,
            state=made.state,
            figures=json_values(vars(made.figures)),
        )
        return
    console.print(made.state)
    console.print(f"report: {made.page}", soft_wrap=True)
    if made.picture is not None:
        console.print(f"loss curve: {made.picture}", soft_wrap=True)


@app.command("plan")
def foresee(
    recipe: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: lake, snapshot, steps, model, ...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the file's, such as model.width=512.")
    ] = None,
    device: Annotated[str, typer.Option(help="What it will run on: h100, h200, a100 or cpu.")] = "h100",
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of a GPU's arithmetic that is used; 0.35 if left out.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time some steps on this machine, as for cpu, and go by them.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a run will take before it is started: weights, memory, tokens, operations, hours and disk.

    Nothing is written and nothing started. What is taken for granted is said with it, and what will not work.

    Example: python -m train plan infra/runs/laptop.toml --set model.width=512 --device h200
    """
    from train.estimate import as_json, lines, plan

    found = plan(load_settings(RunSettings, recipe, overrides or ()), device, mfu=mfu, measure=measure)
    if json:
        answer("train-plan/v1", **as_json(found))
        return
    table = Table("what", "how much")
    for what, value in lines(found):
        table.add_row(what, value)
    console.print(table)
    for sentence in found.assumptions:
        console.print(f"assumed: {sentence}", markup=False, soft_wrap=True)
    for sentence in found.warnings:
        console.print("[bold yellow]warning:[/] ", end="")
        console.print(sentence, markup=False, soft_wrap=True)


def _held_out(folds: Path | None, overrides: list[str] | None) -> FoldSettings:
    """Return what is held out: the test split where nothing else is said."""
    from train.evaluation.folds import FoldSettings

    said = overrides or []
    if folds is None and not any(word.startswith("by=") for word in said):
        said = ["by=split", 'held=["test"]', *said]
    return load_settings(FoldSettings, folds, said)


def main() -> None:
    """Run the command line; ``run`` may be left out."""
    words = sys.argv[1:]
    if words and words[0] not in ("run", "eval", "head", "audit", "report", "plan", "--help"):
        sys.argv.insert(1, "run")
    command.run(app, "train")


if __name__ == "__main__":
    main()
