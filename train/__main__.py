"""This module is ``python -m train``: train a model on a snapshot, on one machine or a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from store import command
from store.command import answer, console
from store.settings import load_settings
from train.settings import RunSettings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: lake, snapshot, steps, model, ...")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the file's, such as optim.lr=1e-3 or steps=50.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster; Ray is started here when left out.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Train a model on a snapshot with Accelerate under Ray Train, and export a checkpoint that can be served.

    The run lives in <output>/<name>: metrics.jsonl, tensorboard/, state/ to go on from, checkpoint/ to serve.

    Stopped or killed, the same command goes on where it was, also with another number of workers.

    Example: python -m train infra/runs/laptop.toml --set snapshot=blood --set steps=500
    """
    settings = load_settings(RunSettings, recipe, overrides or ())
    if address is not None:
        settings = settings.model_copy(update={"address": address})
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
        summary = launch(settings, lambda step, loss: bars.update(bar, completed=step, loss=loss))
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


def main() -> None:
    """Run the command line."""
    command.run(app, "train")


if __name__ == "__main__":
    main()
