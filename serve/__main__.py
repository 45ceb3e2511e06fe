"""``python -m serve``: answer questions about cells over HTTP with a trained checkpoint."""

from __future__ import annotations

import json
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serve.access import read_tokens
from serve.client import Client
from serve.lone import free_port
from serve.settings import LOOPBACK, ServeSettings
from store import command
from store.cluster import cluster_address, ray_cluster
from store.errors import MissingError
from store.lake import open_lake
from store.settings import load_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Answer questions about cells over HTTP with a trained checkpoint.",
)


@app.callback()
def main_options() -> None:
    """Answer questions about cells over HTTP with a trained checkpoint."""


@app.command()
def run(
    checkpoint: Annotated[str, typer.Argument(help="Directory of the checkpoint, as `python -m train` leaves it.")],
    port: Annotated[int, typer.Option(help="TCP port to listen on; 0 takes a free one.", min=0, max=65_535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; whoever reaches it can ask, but for --tokens.")] = (
        "127.0.0.1"
    ),
    replicas: Annotated[int, typer.Option(help="Copies of the model that answer side by side.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each copy.", min=1)] = 1,
    address: Annotated[
        str, typer.Option(help="A running Ray cluster; RAY_ADDRESS if left out, and without that Ray is started here.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="TOML file of who may ask; see docs/serve.md.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as in `--set limits.cells=500`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout when ready.")] = False,
) -> None:
    """Serve CHECKPOINT until Ctrl-C.

    Example: `python -m serve run demo/runs/demo/checkpoint --port 8000`

    Then ask `POST /v1/embed` and `POST /v1/perturb`; `GET /openapi.json` describes everything with examples,
    `GET /v1/models`, `/v1/features`, `/v1/perturbations` and `/v1/prompts` say what the model knows.
    """
    words = {"port": port, "host": host, "replicas": replicas, "threads": threads, "address": address}
    words["tokens_file"] = str(Path(tokens).resolve()) if tokens else ""
    asked = [f"checkpoint={checkpoint!r}", *(f"{key}={value!r}" for key, value in words.items())]
    settings = load_settings(ServeSettings, overrides=[*asked, *(overrides or [])])
    check_checkpoint(settings.checkpoint)
    settings = settings.model_copy(update=resolved(settings))
    token = _own_token(settings)
    settings = settings.model_copy(
        update={
            # on a cluster it may be that of the server that is taken over
            "port": settings.port if cluster_address(settings.address) else free_port(settings.host, settings.port),
            "checkpoint": str(Path(settings.checkpoint).resolve()),
            "lakes": {name: open_lake(uri).uri for name, uri in settings.lakes.items()},
            "heads": _absolute(settings.heads),
            "adapters": _absolute(settings.adapters),
        }
    )
    _serve(settings, token, as_json=as_json)


def resolved(settings: ServeSettings) -> dict[str, dict[str, str]]:
    """Return where the cells lie that the page offers, wherever the ingress runs from.

    Raises:
        MissingError: Some are not there.
    """
    if not settings.cells and not settings.snapshots:
        return {}
    from serve.sources import check_sources  # here, so that --help need not wait for pandas

    check_sources(settings.cells, settings.snapshots)
    lakes = {name: lake if "://" in lake else str(Path(lake).resolve()) for name, lake in settings.snapshots.items()}
    return {"cells": _absolute(settings.cells), "snapshots": lakes}


def _absolute(paths: Mapping[str, str]) -> dict[str, str]:
    return {name: str(Path(path).resolve()) for name, path in paths.items()}


@app.command("embed-lake")
def embed_lake(
    checkpoint: Annotated[str, typer.Argument(help="Directory of the checkpoint, on every machine with a worker.")],
    lake: Annotated[str, typer.Option(help="The lake: a folder or an s3:// URI.")] = "lake",
    where: Annotated[str, typer.Option(help="Value filter on obs, as in SOMA; all cells when left out.")] = "",
    organism: Annotated[str, typer.Option(help="Whose cells; may be left out where the lake holds one.")] = "",
    name: Annotated[str, typer.Option(help="Name of the embeddings; taken from the model when left out.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that embed.", min=1)] = 2,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Torch device of each worker.")] = "cpu",
    address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster; RAY_ADDRESS if left out, and without that Ray is started here."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name over from another model or filter.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Embed a lake's cells with CHECKPOINT, into its obsm, and index them for `/v1/neighbors`.

    Stopped or killed, the same command goes on; when the lake has grown, it embeds what came since.

    Example: `python -m serve embed-lake demo/runs/demo/checkpoint --organism homo_sapiens --where "tissue == 'blood'"`
    """
    from serve.bulk import Asked, Bulk  # here, so that --help need not wait for torch
    from serve.workers import ray_crew

    check_checkpoint(checkpoint)
    asked = Asked(str(Path(checkpoint).resolve()), lake, where, organism, name, replace, device)
    cluster = ray_cluster(address, cpus=workers, packages=("serve", "store", "train"))
    with Bulk(asked) as bulk, cluster, _progress() as progress:
        outcome = bulk.run(partial(ray_crew, workers=workers, cpus=1), progress)
    if as_json:
        command.answer("serve-embed-lake/v1", **asdict(outcome))
    command.console.print(
        f"[bold green]{outcome.n_cells:,} cells[/] of {outcome.organism} are embedded as [bold]{outcome.key}[/] "
        f"({outcome.n_embedded:,} by this run, {outcome.n_taken_over:,} taken over) and indexed\n"
        f"ask for neighbours: python -m serve run {checkpoint} --set lakes.NAME={lake}",
        soft_wrap=True,
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show what is being made and how much of it is done; yield what is told of it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=command.console, transient=True) as shown:
        task = shown.add_task("cells", total=None)
        yield lambda what, done, total: shown.update(task, description=what, completed=done, total=total)


def _own_token(settings: ServeSettings) -> str:
    """Return a token to greet the server with, so that a file that nobody can use is refused before anything starts."""
    if settings.tokens_file:
        read_tokens(settings.tokens_file)
        owners = tomllib.loads(Path(settings.tokens_file).read_text(encoding="utf-8")).values()
        free = max(owners, key=lambda owner: owner.get("requests_per_minute", 0) or float("inf"))
        return str(free["token"])
    if settings.host not in LOOPBACK:
        command.console.print(f"[yellow]whoever reaches {settings.host} can ask the model: give --tokens FILE[/]")
    return ""


def check_checkpoint(path: str) -> None:
    """Refuse a path that holds no finished checkpoint, before anything is started.

    Raises:
        MissingError: There is no such directory, or no manifest in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingError(f"{path}: no such checkpoint directory; train one with: python -m train RUN.toml")
    if not (folder / "manifest.json").is_file():
        found = next((str(manifest.parent) for manifest in folder.rglob("checkpoint/manifest.json")), "")
        remedy = f"did you mean {found}?" if found else "give the directory that holds manifest.json"
        raise MissingError(f"{path}: holds no finished checkpoint (no manifest.json); {remedy}")


def _serve(settings: ServeSettings, token: str, *, as_json: bool) -> None:
    """Start everything, wait for Ctrl-C or SIGTERM, stop everything."""
    from serve.deploy import serving  # here, so that --help and early refusals need not wait for Ray and torch
    from train.checkpoint import read_manifest

    read_manifest(settings.checkpoint)
    try:
        _listen_to_signals()
        with ExitStack() as stack:
            with command.console.status("starting Ray and loading the model ..."):
                # Ray's own handlers would end the process, however far it has come, three seconds after SIGTERM
                url = stack.enter_context(serving(settings, joined=_listen_to_signals, waits=command.console.print))
            _announce(url, token, as_json=as_json)
            threading.Event().wait()
    except KeyboardInterrupt:
        command.console.print("stopped")


def _listen_to_signals() -> None:
    """Let Ctrl-C and SIGTERM stop the server once; what comes while it is stopping is ignored."""

    def stop(*_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _announce(url: str, token: str, *, as_json: bool) -> None:
    with Client(url, token=token) as client:
        model = client.models()[0]
        measurement, features = client.features(at_most=2)
    known = ", ".join(f"{n:,} {name} features" for name, n in model["measurements"].items())
    said = " -H 'Authorization: Bearer TOKEN'" if token else ""
    command.console.print(
        f"[bold green]ready[/] at [bold]{url}[/] with model {model['id']} (knows {known})\n"
        f"look at cells: [bold]{url}/[/]; everything it can be asked: {url}/openapi.json; stop with Ctrl-C\n"
        f"try:\n  curl -s {url}/v1/embed -H 'Content-Type: application/json'{said} \\\n"
        f"    -d '{json.dumps({'counts': {measurement: [dict.fromkeys(features, 3)]}})}'",
        soft_wrap=True,
    )
    if as_json:
        command.answer("serve-ready/v1", url=url, model=model)
        sys.stdout.flush()


def main() -> None:
    """Run the command line."""
    command.run(app, "serve")


if __name__ == "__main__":
    main()
