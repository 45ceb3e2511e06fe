"""This module is ``python -m store``: look at a lake, prove it, make snapshots of it, take cells out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from store import command, snapshot, upkeep
from store.cluster import lazy_ray_tasks
from store.command import answer, console, write
from store.errors import StorageError, UsageError, VerificationError
from store.export import export as export_cells
from store.lake import Lake, open_lake
from store.settings import load_settings
from store.snapshot import SnapshotSettings
from store.validate import validate as validate_lake
from store.writer import LakeWriter

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Look at a lake, prove it, make snapshots of it, take cells out of it.",
    pretty_exceptions_enable=False,
)
snapshots = typer.Typer(no_args_is_help=True, help="Make, list, show, verify and delete snapshots.")
app.add_typer(snapshots, name="snapshot")

LakeOption = Annotated[str, typer.Option("--lake", help="The lake: a folder or an s3:// URI.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
CommitOption = Annotated[int | None, typer.Option("--commit", help="An earlier commit of the lake, by number.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=0, help="CPUs of the Ray cluster that is started; 0 builds in this process, without Ray."),
]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster; left out, one is started if needed.")]
SpillOption = Annotated[
    str | None, typer.Option(help="Folder that all workers see for what lies between the passes; in the lake if none.")
]
NameArgument = Annotated[str, typer.Argument(help="The snapshot's name.")]


@app.command()
def info(lake: LakeOption = "lake", commit: CommitOption = None, json: JsonOption = False) -> None:
    """Say what a lake holds: organisms, measurements, cells, datasets, snapshots.

    Example: python -m store info --lake ./lake
    """
    opened = open_lake(lake, commit)
    summary = _summary(opened)
    if json:
        answer("store-info/v1", **summary)
        return
    commit_of = f"at commit {opened.commit.number} ({opened.commit.created})"
    console.print(f"[bold]{escape(opened.uri)}[/] {commit_of}", soft_wrap=True)
    _print_table(
        ("dataset", "organism", "cells", "measurements", "source"),
        [
            (row["dataset_id"], row["organism"], f"{row['cells']:,}", row["measurements"], row["source_kind"])
            for row in summary["datasets"]
        ],
    )
    for organism, measurements in summary["organisms"].items():
        features = ", ".join(f"{count:,} {name}" for name, count in measurements.items())
        console.print(f"{organism}: {features} features", markup=False, soft_wrap=True)
    console.print(f"snapshots: {', '.join(summary['snapshots']) or 'none'}", markup=False, soft_wrap=True)
    _say_damaged(summary["damaged"])


def _summary(lake: Lake) -> dict[str, Any]:
    datasets = [
        {
            "dataset_id": row["dataset_id"],
            "organism": row["organism"],
            "cells": row["dataset_total_cell_count"],
            "measurements": row["measurements"],
            "source_kind": row["source_kind"],
            "source_uri": row["source_uri"],
        }
        for row in lake.datasets().to_pylist()
    ]
    manifests, damaged = snapshot.read_manifests(lake.uri)
    return {
        "lake": lake.uri,
        "commit": lake.commit.number,
        "commit_id": lake.commit.id,
        "lake_timestamp": lake.commit.timestamp_ms,
        "cells": sum(row["cells"] for row in datasets),
        "organisms": {
            name: {measurement: lake.var(name, measurement).num_rows for measurement in lake.measurements(name)}
            for name in lake.organisms
        },
        "datasets": datasets,
        "snapshots": sorted([*manifests, *damaged]),
        "damaged": damaged,
        "pending": [plan.dataset_id for plan in lake.pending()],
    }


@app.command()
def history(lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """List a lake's commits; each can be opened with --commit.

    Example: python -m store history --lake ./lake
    """
    commits = open_lake(lake).history
    added = {commit.dataset["number"]: commit for commit in commits if commit.dataset}
    rows = [
        {
            "commit": commit.number,
            "id": commit.id,
            "created": commit.created,
            "timestamp_ms": commit.timestamp_ms,
            "dataset_id": commit.dataset.get("dataset_id", ""),
            "cells": commit.dataset.get("n_obs", 0),
            "took_out": [
                {"dataset_id": gone.dataset["dataset_id"], "cells": gone.dataset["n_obs"], "commit": gone.number}
                for gone in (added[number] for number in commit.superseded)
            ],
        }
        for commit in commits
    ]
    if json:
        answer("store-history/v1", commits=rows)
        return
    _print_table(
        ("commit", "id", "created", "dataset", "cells", "took out"),
        [
            (
                *(row["commit"], row["id"][:12], row["created"], row["dataset_id"], f"{row['cells']:,}"),
                "; ".join(f"{one['dataset_id']} of commit {one['commit']}" for one in row["took_out"]),
            )
            for row in rows
        ],
    )


@app.command()
def validate(lake: LakeOption = "lake", commit: CommitOption = None, json: JsonOption = False) -> None:
    """Prove a lake: read everything again and compare with what was committed; exit code 8 when something differs.

    Exit code 5 when nothing is known to differ, and something could not be read because the store does not answer.

    Example: python -m store validate --lake ./lake
    """
    with console.status("reading") as status:
        checks = validate_lake(open_lake(lake, commit), lambda name: status.update(f"checking {name}"))
    problems = [check for check in checks if check.problem]
    if json:
        answer(
            "store-validate/v1",
            checks=len(checks),
            problems=[
                {"check": c.name, "subject": c.subject, "problem": c.problem, "unread": c.unread} for c in problems
            ],
        )
    for check in problems:
        console.print(f"[red]{check.name}[/] {escape(f'{check.subject}: {check.problem}')}", soft_wrap=True)
    failed = sum(not check.unread for check in problems)
    if failed:
        raise VerificationError(f"{lake}: {failed} of {len(checks)} checks failed; see the lines above")
    if problems:
        raise StorageError(
            f"{lake}: {len(problems)} of {len(checks)} checks could not be made, see the lines above; the others "
            "passed: run the same command again when the store answers"
        )
    console.print(f"[green]{len(checks)} checks passed[/]: layout, joinids, features, counts, snapshots")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Where to write: NAME.h5ad or NAME.h5mu.")],
    organism: Annotated[str, typer.Option(help="Census name of the organism.")] = "homo_sapiens",
    measurement: Annotated[
        list[str] | None, typer.Option(help="Measurement; several make an h5mu; RNA when left out.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Value filter on obs, as in SOMA.")] = None,
    lake: LakeOption = "lake",
    commit: CommitOption = None,
    json: JsonOption = False,
) -> None:
    """Write the cells that fit a filter to an h5ad or h5mu file, raw counts in X.

    Example: python -m store export blood.h5ad --where "tissue == 'blood'" --lake ./lake
    """
    n_cells = export_cells(open_lake(lake, commit), path, organism, measurement or ["RNA"], where)
    if json:
        answer("store-export/v1", path=str(path), cells=n_cells)
    console.print(f"wrote {n_cells:,} cells to {path}", markup=False, soft_wrap=True)


@app.command()
def remove(
    dataset: Annotated[str, typer.Argument(help="The dataset's name.")],
    lake: LakeOption = "lake",
    organism: Annotated[str | None, typer.Option(help="Which, when two organisms have one of the name.")] = None,
    json: JsonOption = False,
) -> None:
    """Take a dataset out of a lake; earlier commits still have it, until a vacuum.

    Example: python -m store remove pbmc3k --lake ./lake
    """
    with LakeWriter(lake, make=False) as writer:
        made = writer.remove(dataset, organism)
    if json:
        answer("store-remove/v1", dataset_id=dataset, commit=made.number)
        return
    console.print(f"{dataset} is not in commit {made.number} any more", markup=False)


@app.command("gc")
def collect_garbage(lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """Remove what dead drivers left: writes without a commit, fragments nobody reads, unfinished uploads, spill files.

    Example: python -m store gc --lake ./lake
    """
    left = upkeep.collect(lake)
    if json:
        answer("store-gc/v1", **asdict(left))
        return
    console.print(
        f"removed {left.writes} writes, {left.fragments} fragments, {left.uploads} unfinished uploads, "
        f"leavings of {left.builds} snapshots' building"
    )
    if left.note:
        console.print(f"[yellow]note[/] {escape(left.note)}", soft_wrap=True)


@app.command()
def vacuum(
    lake: LakeOption = "lake",
    keep_from: Annotated[int | None, typer.Option(help="Oldest commit to keep; the newest when left out.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it: commits before it cannot be opened any more.")] = False,
    json: JsonOption = False,
) -> None:
    """Let old commits go, with the counts that only they read (of superseded versions and removed datasets).

    Example: python -m store vacuum --lake ./lake --keep-from 7 --yes
    """
    if not yes:
        raise UsageError("vacuum: earlier commits cannot be opened afterwards; say --yes if that is meant")
    first, removed = upkeep.vacuum(lake, keep_from)
    if json:
        answer("store-vacuum/v1", first_openable=first, fragments=removed)
        return
    console.print(f"removed {removed} fragments; the oldest commit that can be opened is {first}")


@app.command()
def consolidate(lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """Merge a lake's many small files, so that opening it stays fast; every commit reads as before.

    Readers that are at work while it runs may have to open the lake again.

    Example: python -m store consolidate --lake ./lake
    """
    with console.status("merging") as shown:
        arrays = upkeep.consolidate(lake, lambda name: shown.update(f"merging {name}"))
    if json:
        answer("store-consolidate/v1", arrays=arrays)
        return
    console.print(f"merged the small files of {arrays} arrays")


@snapshots.command("create")
def snapshot_create(
    name: NameArgument,
    settings: Annotated[Path | None, typer.Option(help="TOML with the keys of --set.")] = None,
    where: Annotated[str | None, typer.Option(help="Value filter on obs, as in SOMA.")] = None,
    measurements: Annotated[
        str | None, typer.Option(help="Comma-separated, such as RNA,protein; all when left out.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=f"key=value; keys: {', '.join(SnapshotSettings.model_fields)}.",
        ),
    ] = None,
    lake: LakeOption = "lake",
    workers: WorkersOption = None,
    address: AddressOption = None,
    spill: SpillOption = None,
    json: JsonOption = False,
) -> None:
    """Copy the cells that fit a filter, shuffled, into a snapshot that training streams from.

    A build that was stopped goes on when the same command is given again.

    Example: python -m store snapshot create blood --where "tissue == 'blood'" --set split_by=donor_id
    """
    values = load_settings(SnapshotSettings, settings, overrides or ())
    if where is not None:
        values = values.model_copy(update={"where": where})
    if measurements is not None:
        values = values.model_copy(update={"measurements": tuple(map(str.strip, measurements.split(",")))})
    with _building(workers, address) as (show, tasks):
        made = snapshot.create_snapshot(lake, name, values, show, tasks=tasks, spill=spill)
    _say_made(made, json)


@snapshots.command("refresh")
def snapshot_refresh(
    old: Annotated[str, typer.Argument(help="The snapshot to bring up to date; it stays, and is needed.")],
    name: Annotated[str, typer.Argument(help="The new snapshot's name.")],
    lake: LakeOption = "lake",
    workers: WorkersOption = None,
    address: AddressOption = None,
    spill: SpillOption = None,
    json: JsonOption = False,
) -> None:
    """Make a snapshot of the same query as the lake is now, reading only the cells that are new.

    Example: python -m store snapshot refresh blood blood-2 --lake ./lake
    """
    with _building(workers, address) as (show, tasks):
        made = snapshot.refresh_snapshot(lake, old, name, show, tasks=tasks, spill=spill)
    _say_made(made, json)


@contextmanager
def _building(workers: int | None, address: str | None) -> Iterator[tuple[Any, Any]]:
    """Show progress bars, and hold a Ray cluster where one is wanted."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        tasks = None
        if workers != 0:
            tasks = stack.enter_context(lazy_ray_tasks(address, workers or os.cpu_count() or 1, ["store"]))
        bars = stack.enter_context(Progress(*columns, console=console))
        shown: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = bars.add_task(stage, total=total)
            bars.update(shown[stage], completed=done)

        yield show, tasks


def _say_made(made: snapshot.Snapshot, json: bool) -> None:
    if json:
        answer("store-snapshot/v1", uri=made.uri, **made.manifest)
    sizes = ", ".join(f"{entry['n_features']:,} {key}" for key, entry in made.manifest["measurements"].items())
    console.print(f"snapshot {made.name}: {made.n_cells:,} cells, {sizes} features, splits {made.splits}")
    if n_without := made.manifest.get("n_without"):
        console.print(
            f"[yellow]note[/] {n_without:,} of these cells have none of that (normalised values, or measurements that "
            "were not asked for): they are empty; leave them out with --where, such as measured_RNA == True"
        )
    for name, units in made.manifest.get("units", {}).items():
        if len(units) > 1:
            listed = ", ".join(f"{n_cells:,} cells in {unit!r}" for unit, n_cells in units.items())
            console.print(
                f"[yellow]note[/] {name} has several units ({escape(listed)}), and training takes the numbers as they "
                f"stand: choose the cells of one with --where, such as {name}_unit == {next(iter(units))!r}"
            )
    shares = made.manifest["settings"]["fractions"]
    for split in (name for name, n_cells in made.splits.items() if not n_cells and shares[name]):
        by = made.manifest["settings"]["split_by"]
        why = f"whole values of {by!r} are drawn, and few there are" if by else "few cells there are"
        console.print(
            f"[yellow]note[/] split {escape(repr(split))} has no cell, of {shares[split]:.0%} wanted: {why}; another "
            f"seed draws anew, assign.{escape(split)} names what belongs there"
        )


@snapshots.command("list")
def snapshot_list(lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """List a lake's snapshots."""
    manifests, damaged = snapshot.read_manifests(open_lake(lake).uri)
    found, begun = list(manifests.values()), snapshot.begun_snapshots(lake)
    if json:
        answer("store-snapshots/v1", snapshots=found, begun=begun, damaged=damaged)
        return
    _print_table(
        ("snapshot", "cells", "measurements", "commit", "created"),
        [
            (one["name"], f"{one['n_cells']:,}", ",".join(one["measurements"]), one["commit"], one["created"])
            for one in found
        ],
    )
    _say_damaged(damaged)
    for name in begun:
        console.print(f"{name}: half-made or half-deleted; give the same command again, or delete it", markup=False)


def _say_damaged(names: list[str]) -> None:
    for name in names:
        console.print(
            f"{name}: its snapshot.json is damaged; put it back from a copy, or delete the snapshot", markup=False
        )


@snapshots.command("show")
def snapshot_show(name: NameArgument, lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """Show a snapshot's manifest: query, commit, seed, splits, vocabulary hashes, checksums, versions."""
    manifest = snapshot.read_manifest(lake, name)
    if json:
        answer("store-snapshot/v1", **manifest)
    else:
        console.print_json(data=manifest)


@snapshots.command("card")
def snapshot_card(name: NameArgument, lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """Print a snapshot's dataset card, in Markdown: query, datasets, splits, what the cells are."""
    card = snapshot.read_card(lake, name)
    if json:
        answer("store-snapshot-card/v1", snapshot=name, card=card)
        return
    write(card)


@snapshots.command("verify")
def snapshot_verify(name: NameArgument, lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """Read a snapshot again and compare it with its checksums; exit code 8 when they differ."""
    snapshot.open_snapshot(lake, name).verify()
    if json:
        answer("store-snapshot-verify/v1", snapshot=name, ok=True)
        return
    console.print(f"[green]snapshot {name} is what was written[/]")


@snapshots.command("delete")
def snapshot_delete(name: NameArgument, lake: LakeOption = "lake", json: JsonOption = False) -> None:
    """Delete a snapshot, or what is there of a half-made or half-deleted one; the lake's cells stay."""
    snapshot.delete_snapshot(lake, name)
    if json:
        answer("store-snapshot-delete/v1", snapshot=name)
        return
    console.print(f"deleted snapshot {name}")


def _print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)


def main() -> None:
    """Run the command line."""
    command.run(app, "store")


if __name__ == "__main__":
    main()
