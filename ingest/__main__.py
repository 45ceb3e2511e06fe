"""This module is ``python -m ingest``: bring cells into a lake, see what would come, see what came."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ingest import duplicates
from ingest.job import JobSettings, SourceSettings
from ingest.simulate import SimulationSettings, simulate, write_files
from store import command, records, upkeep
from store.command import answer, console
from store.errors import PARTIAL, InputRefused, StorageError, UsageError
from store.lake import open_lake
from store.settings import load_settings, parse_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Bring cells into a lake, see what would come, see what came.",
    pretty_exceptions_enable=False,
)

PAIRS_SHOWN = 40
"""Pairs of datasets with cells in common that are shown, those with most."""

What = Annotated[
    list[str] | None,
    typer.Argument(metavar="[JOB.toml | SOURCE ...]", help="A job file, or files, folders and Censuses to ingest."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help=f"key=value; keys for every SOURCE given here: {', '.join(SourceSettings.model_fields)}."
    ),
]
LakeOption = Annotated[
    str | None, typer.Option("--lake", help="The lake: a folder or s3:// URI; ./lake when left out.")
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Ray tasks at a time; 2 when left out.")]
AddressOption = Annotated[
    str | None,
    typer.Option(help="A running Ray cluster; RAY_ADDRESS if left out, and without that Ray is started here."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]


def _job(
    what: list[str] | None, lake: str | None, overrides: list[str] | None, workers: int | None, address: str | None
) -> JobSettings:
    what, overrides = what or [], overrides or []
    of_job = [item for item in overrides if re.split(r"[=.]", item)[0] in JobSettings.model_fields]
    of_source = [item for item in overrides if item not in of_job]
    if len(what) == 1 and what[0].endswith(".toml"):
        if of_source:
            raise UsageError(f"--set {of_source[0]}: is no key of the job; edit the [[source]] in {what[0]}")
        job = load_settings(JobSettings, what[0], of_job)
    else:
        common = load_settings(SourceSettings, None, ["uri=-", *of_source])
        given = common.model_dump(exclude_unset=True)
        found = [parse_settings(SourceSettings, {**given, "uri": uri}, where=uri) for uri in what]
        job = load_settings(JobSettings, None, of_job).model_copy(update={"source": tuple(found)})
    changes = {"lake": lake, "workers": workers, "address": address}
    return job.model_copy(update={key: value for key, value in changes.items() if value is not None})


@app.command()
def run(
    what: What = None,
    lake: LakeOption = None,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Ingest sources into a lake; what is there already is not added again.

    Killed, the same command goes on. Exit code 1: some sources were refused and the others are in; 4: all were refused.

    Example: python -m ingest run pbmc.h5ad filtered_feature_bc_matrix/ --lake ./lake --set organism=mus_musculus
    """
    from ingest.run import run as run_job

    job = _job(what, lake, overrides, workers, address)
    outcomes = run_job(job)
    if json:
        answer("ingest-run/v1", lake=job.lake, datasets=[asdict(outcome) for outcome in outcomes])
    _show(outcomes)
    _leave(outcomes)


@app.command()
def plan(
    what: What = None,
    lake: LakeOption = None,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    json: JsonOption = False,
) -> None:
    """Say what would come in, what the lake has already, and what is wrong; writes nothing.

    Example: python -m ingest plan pbmc.h5ad --set genes=genes_homo_sapiens.csv.gz
    """
    from ingest.run import plan as plan_job

    outcomes = plan_job(_job(what, lake, overrides, workers, address))
    if json:
        answer("ingest-plan/v1", datasets=[asdict(outcome) for outcome in outcomes])
    _show(outcomes)
    _leave(outcomes)


def _leave(outcomes: list) -> None:  # type: ignore[type-arg]
    refused = [outcome for outcome in outcomes if outcome.error]
    if refused:
        codes = {outcome.exit_code for outcome in refused}
        same = codes.pop() if len(codes) == 1 else InputRefused.exit_code
        sys.exit(PARTIAL if len(refused) < len(outcomes) else same)


@app.command()
def status(lake: LakeOption = None, json: JsonOption = False) -> None:
    """Say which datasets are in a lake, and which were begun and not committed.

    Example: python -m ingest status --lake ./lake
    """
    opened = open_lake(lake or "lake")
    committed = [commit.dataset | {"commit": commit.number} for commit in opened.current]
    pending = [asdict(begun) for begun in opened.pending()]
    running = records.read_all(records.join(opened.uri, records.FOLDER, "running"))
    if json:
        counts = {"commit": opened.commit.number, "committed": committed, "pending": pending, "running": running}
        answer("ingest-status/v1", lake=opened.uri, **counts)
        return
    table = Table("dataset", "organism", "cells", "state")
    for row in committed:
        table.add_row(escape(row["dataset_id"]), row["organism"], f"{row['n_obs']:,}", f"commit {row['commit']}")
    for row in pending:
        table.add_row(
            escape(row["dataset_id"]), row["organism"], f"{row['n_obs']:,}", "begun; the same ingest run completes it"
        )
    console.print(table)
    for driver in running:
        left = "" if driver["eta_s"] is None else f", {driver['eta_s']:,.0f} s to go"
        console.print(
            f"process {driver['pid']} on {driver['host']}: {driver['rows_done']:,} of {driver['rows_seen']:,} rows, "
            f"{driver['rows_per_s']:,.0f} rows/s{left}"
        )
        for row in driver["datasets"]:
            console.print(f"  {row['dataset']}: {row['state']}, {row['done']:,} of {row['rows']:,} rows", markup=False)


@app.command()
def recover(lake: LakeOption = None, json: JsonOption = False) -> None:
    """Bring a lake back to its newest commit after a driver died; every ingest does so before it begins.

    Example: python -m ingest recover --lake ./lake
    """
    left = upkeep.recover(lake or "lake")
    if json:
        answer("ingest-recover/v1", **asdict(left))
        return
    console.print(f"undone: {left.writes} writes without a commit")
    for name in left.plans:
        console.print(f"begun and not in the lake: {name}; the same ingest run completes it", markup=False)


@app.command("quality")
def show_quality(
    lake: LakeOption = None,
    html: Annotated[Path | None, typer.Option(help="Write the table and plots as one page of HTML.")] = None,
    json: JsonOption = False,
) -> None:
    """Show the quality of a lake's datasets: cells, features, depth, share mitochondrial, share mapped.

    Example: python -m ingest quality --lake ./lake --html lake.html
    """
    from ingest import page

    opened = open_lake(lake or "lake")
    rows = page.table(opened)
    if html:
        written = page.page(opened, duplicates.find(opened))
        try:
            html.write_text(written, encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"{html}: cannot be written: {error.strerror}; name a file in a folder that is there"
            ) from error
        console.print(f"wrote {html}", markup=False, soft_wrap=True)
    if json:
        answer("ingest-quality/v1", lake=opened.uri, commit=opened.commit.number, rows=rows)
        return
    table = Table(box=None)
    table.add_column("dataset", overflow="fold", min_width=18)
    for column in ("", "cells", "features", "total", "detected", "mito %", "mapped %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row["dataset"]),
            row["measurement"],
            f"{row['cells']:,}",
            f"{row['features']:,}",
            f"{row['sum'].get('q50', 0):,.0f}",
            f"{row['detected'].get('q50', 0):,.0f}",
            "-" if row["mito"] is None else f"{100 * row['mito']:.1f}",
            f"{100 * row['mapped']:.1f}",
        )
    console.print(table)


@app.command("duplicates")
def show_duplicates(lake: LakeOption = None, json: JsonOption = False) -> None:
    """Find cells that stand in a lake more than once, by their counts.

    Example: python -m ingest duplicates --lake ./lake
    """
    opened = open_lake(lake or "lake")
    found = duplicates.find(opened)
    if json:
        answer("ingest-duplicates/v1", lake=opened.uri, pairs=[asdict(pair) for pair in found])
        return
    table = Table("dataset", "and", "cells in common", "of the smaller", "primary in both")
    for pair in found[:PAIRS_SHOWN]:
        other = "itself" if pair.first == pair.second else pair.second
        table.add_row(
            escape(pair.first), escape(other), f"{pair.cells:,}", f"{100 * pair.share:.1f} %", f"{pair.both_primary:,}"
        )
    console.print(table if found else "no two cells with at least 50 features have the same counts")
    if len(found) > PAIRS_SHOWN:
        console.print(f"and {len(found) - PAIRS_SHOWN:,} pairs with fewer; --json has them all")


@app.command("simulate")
def simulate_files(
    folder: Annotated[Path, typer.Argument(help="Where to write: 10x/, cells.h5mu, truth.json.")],
    cells: Annotated[int, typer.Option(help="Cells.")] = 3000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same cells.")] = 0,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="genes, proteins, peaks, targets, ...")] = None,
    json: JsonOption = False,
) -> None:
    """Make simulated cells of known truth, in files as other tools leave them.

    Example: python -m ingest simulate demo/source --cells 900 --seed 7
    """
    settings = load_settings(SimulationSettings, None, [f"cells={cells}", f"seed={seed}", *(overrides or ())])
    written = write_files(folder, simulate(settings))
    if json:
        answer("ingest-simulate/v1", files=[str(path) for path in written])
        return
    for path in written:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)


def _show(outcomes: list) -> None:  # type: ignore[type-arg]
    table = Table("dataset", "cells", "features", "state")
    for outcome in outcomes:
        features = ", ".join(f"{count:,} {name}" for name, count in outcome.measurements.items())
        state = {"committed": f"in the lake, commit {outcome.commit}", "present": "in the lake already"}.get(
            outcome.state, outcome.state
        )
        table.add_row(escape(outcome.dataset_id or outcome.source), f"{outcome.cells:,}", features, state)
    console.print(table)
    for outcome in outcomes:
        for note in outcome.notes if outcome.state != "present" else ():  # they were told when it came in
            console.print(f"[yellow]note[/] {escape(f'{outcome.dataset_id}: {note}')}", soft_wrap=True)
        if outcome.error:
            named = f"{outcome.dataset_id or outcome.source}: {outcome.error}"
            console.print(f"[red]refused[/] {escape(named)}", soft_wrap=True)


def main() -> None:
    """Run the command line."""
    command.run(app, "ingest")


if __name__ == "__main__":
    main()
