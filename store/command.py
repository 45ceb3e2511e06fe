"""This module is what the command lines share: one-line errors, exit codes, ``--json`` answers, signals."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, TextIO

import typer
from rich.console import Console

from store.errors import InterruptedRun, SomaflowError, StorageError


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True
        _let_go(sys.stderr)
        sys.exit(UNREAD)


UNREAD = 128 + signal.SIGPIPE
"""The status that a shell gives a command which ends because nobody reads it any more."""
console = _Console(stderr=True, highlight=False)
"""People read this one (stderr); programs read :func:`answer` (stdout)."""
INTERRUPTED = 128 + signal.SIGINT
"""The status with which typer ends on a KeyboardInterrupt, which it keeps to itself; none of our commands has it."""


def run(app: typer.Typer, prog: str) -> None:
    """Run ``app`` as ``python -m prog``; an error of ours becomes one line on stderr and its exit code.

    A request to end (SIGTERM, as from Slurm or Kubernetes) is taken for Ctrl-C, so that the command leaves in order.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name=f"python -m {prog}")
    except SomaflowError as error:
        console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever nobody foresaw; 1 would say that some inputs were refused
        if _of_store(error):
            console.print("[bold red]StorageError:[/] ", end="")
            reason = f"a store failed, or refused: {error}".replace("\n", " ")
            console.print(f"{reason}; check the place and your rights to it", markup=False, soft_wrap=True)
            sys.exit(StorageError.exit_code)
        with suppress(OSError):  # stderr may be what failed
            traceback.print_exc()
        sys.exit(SomaflowError.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        console.print("stopped; the same command goes on, or begins again where nothing was kept")
        sys.exit(InterruptedRun.exit_code)
    finally:
        signal.signal(signal.SIGTERM, before)


CLIENTS = {
    "tiledb": ("TileDBError",),
    "tiledbsoma": ("SOMAError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
}
"""What the clients of stores raise, by the modules that must be there for it."""


def _of_store(error: Exception) -> bool:
    """Say whether a store's client raised it; none is imported for that."""
    there = [(sys.modules[module], names) for module, names in CLIENTS.items() if module in sys.modules]
    return isinstance(error, tuple(getattr(module, name) for module, names in there for name in names))


def answer(schema: str, **values: Any) -> None:
    """Print one JSON object on stdout, marked with the name and version of its form (``"ingest-run/v1"``)."""
    write(json.dumps({"schema": schema, **values}, default=str) + "\n")


def write(text: str) -> None:
    r"""Write on stdout, at once; a letter that its encoding lacks becomes its code, as ``\\xe9``.

    Raises:
        StorageError: It takes nothing more, as where a disk is full.
        SystemExit: Nobody reads it any more; the status is :data:`UNREAD`.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except OSError as error:
        _let_go(sys.stdout)
        if isinstance(error, BrokenPipeError):
            sys.exit(UNREAD)
        raise StorageError(f"stdout cannot be written: {error.strerror}; send it where there is room") from error


def _let_go(stream: TextIO) -> None:
    """Let a stream that cannot be written end in nothing: Python writes what is left of it when it ends."""
    with suppress(OSError):  # none of the system's
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
