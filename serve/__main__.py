"""``python -m serve``: answer questions about cells over HTTP with a trained checkpoint."""

from __future__ import annotations

import errno
import json
import signal
import socket
import sys
import threading
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.access import read_tokens
from serve.client import Client
from serve.settings import ServeSettings
from store import command
from store.errors import ConflictError, MissingError, UsageError
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
    address: Annotated[str, typer.Option(help="Ray cluster to join; empty starts one on this machine.")] = "",
    tokens: Annotated[str, typer.Option(help="TOML file of who may ask; see docs/serve.md.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as in `--set limits.cells=500`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout when ready.")] = False,
) -> None:
    """Serve CHECKPOINT until Ctrl-C.

    Example: `python -m serve run runs/demo/checkpoint --port 8000`

    Then ask `POST /v1/embed` and `POST /v1/perturb`; `GET /openapi.json` describes everything with examples,
    `GET /v1/models`, `/v1/features`, `/v1/perturbations` and `/v1/prompts` say what the model knows.
    """
    words = {"port": port, "host": host, "replicas": replicas, "threads": threads, "address": address}
    words["tokens_file"] = str(Path(tokens).resolve()) if tokens else ""
    asked = [f"checkpoint={checkpoint!r}", *(f"{key}={value!r}" for key, value in words.items())]
    settings = load_settings(ServeSettings, overrides=[*asked, *(overrides or [])])
    check_checkpoint(settings.checkpoint)
    token = _own_token(settings)
    settings = settings.model_copy(
        update={
            "port": free_port(settings.host, settings.port),
            "checkpoint": str(Path(settings.checkpoint).resolve()),
            "adapters": {name: str(Path(folder).resolve()) for name, folder in settings.adapters.items()},
        }
    )
    _serve(settings, token, as_json=as_json)


def _own_token(settings: ServeSettings) -> str:
    """Return a token to greet the server with, so that a file that nobody can use is refused before anything starts."""
    if settings.tokens_file:
        read_tokens(settings.tokens_file)
        owners = tomllib.loads(Path(settings.tokens_file).read_text(encoding="utf-8")).values()
        free = max(owners, key=lambda owner: owner.get("requests_per_minute", 0) or float("inf"))
        return str(free["token"])
    if settings.host not in ("127.0.0.1", "::1", "localhost"):
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


def free_port(host: str, port: int) -> int:
    """Return ``port`` when nobody listens on it; for 0, one that is free now.

    Raises:
        ConflictError: Somebody listens there.
        UsageError: This machine cannot listen on ``host``.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except PermissionError:
        raise UsageError(f"port {port} needs rights that you do not have; choose one above 1023 with --port") from None
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConflictError(f"port {port} on {host} is in use; choose another with --port, or --port 0") from None
        raise UsageError(f"cannot listen on {host}:{port} ({error}); check --host and --port") from None


def _serve(settings: ServeSettings, token: str, *, as_json: bool) -> None:
    """Start everything, wait for Ctrl-C or SIGTERM, stop everything."""
    from serve.deploy import serving  # here, so that --help and early refusals need not wait for Ray and torch
    from train.checkpoint import read_manifest

    read_manifest(settings.checkpoint)
    try:
        _listen_to_signals()
        with ExitStack() as stack:
            with command.console.status("starting Ray and loading the model ..."):
                url = stack.enter_context(serving(settings))
            _listen_to_signals()  # Ray has put its own handler there meanwhile
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
        f"stop with Ctrl-C; everything it can be asked: {url}/openapi.json\n"
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
