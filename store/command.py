"""This module is what the four command lines share: one-line errors, exit codes, ``--json`` answers."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import typer
from rich.console import Console

from store.errors import SomaflowError

console = Console(stderr=True, highlight=False)
"""People read this one (stderr); programs read :func:`answer` (stdout)."""


def run(app: typer.Typer, prog: str) -> None:
    """Run ``app`` as ``python -m prog``; an error of ours becomes one line on stderr and its exit code."""
    try:
        app(prog_name=f"python -m {prog}")
    except SomaflowError as error:
        console.print(f"[bold red]{type(error).__name__}:[/] ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001 - whatever nobody foresaw; 1 would say that some inputs were refused
        traceback.print_exc()
        sys.exit(SomaflowError.exit_code)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        sys.exit(7)


def answer(schema: str, **values: Any) -> None:
    """Print one JSON object on stdout, marked with the name and version of its form (``"ingest-run/v1"``)."""
    print(json.dumps({"schema": schema, **values}, default=str))
