"""This module is a training run's report: what its rows come to, one HTML page with its pictures in it, a loss curve.

It reads a run's folder as the loop leaves it, also while the run goes on and after it was killed.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from store.errors import InputRefused, MissingError
from store.lake import utc_now
from train.checkpoint import MANIFEST
from train.figures import PARTS, SAID, Figures, Row, ratio, seconds_of, summed, table_of
from train.pictures import COLOURS, loss_picture, mixing_picture, rate_picture, time_picture, token_picture
from train.record import iter_rows
from train.settings import RunSettings

LAST_STEPS = 20
NOT_YET = "not yet"
NO_SPLIT = "no split"

TIME = "Where a step's time goes"


@dataclass(frozen=True)
class Report:
    """What was written: the page, and the loss curve where a step has ended."""

    page: Path
    picture: Path | None
    finished: bool
    state: str
    figures: Figures


@dataclass(frozen=True)
class _Folder:
    """What a run's folder holds; None for what is not there yet, or is of an earlier, shorter run."""

    path: Path
    settings: dict[str, Any]
    table: pd.DataFrame
    start: dict[str, Any] | None
    summary: dict[str, Any] | None
    manifest: dict[str, Any] | None
    saved: dict[str, Any] | None


def write_report(folder: Path) -> Report:
    """Write ``report.html`` and ``loss.png`` into a run's folder, each whole, over what stands there.

    Args:
        folder: The run's, ``<output>/<name>``; the run may go on meanwhile, or have died.

    Raises:
        MissingError: No run began there.
        InputRefused: A file of the run is damaged.
    """
    run = _read(folder)
    table, found, flat = run.table, summed(run.table), _flat(run.settings)
    state = _state(run)
    pictures: list[tuple[str, str, bytes]] = []
    if len(table):
        pictures = [
            (
                "Loss",
                _about_loss(run),
                loss_picture(table, _title(run), _split(run), _tests(run)),
            ),
            (
                "Learning rate and gradient norm",
                "The norm is that of all gradients together before it is clipped.",
                rate_picture(table, flat),
            ),
            (TIME, "Each stretch of steps is split by what its seconds went to.", time_picture(table)),
            ("Tokens a second", _about_goodput(table, found), token_picture(table)),
            ("Mixing", *mixing_picture(table)),
        ]
    shown = [(heading, words, base64.b64encode(png).decode()) for heading, words, png in pictures]
    html = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    page = html.render(
        title=f"Run {run.settings['name']}",
        TIME=TIME,
        finished=run.summary is not None,
        state=state,
        key=_key_figures(run, table, found),
        pictures=shown,
        parts=_parts(table, found),
        whole=_whole(table),
        unmeasured=[PARTS[part] for part in PARTS if part not in found.medians],
        about=_about(run),
        settings=_changed(flat),
    )
    as_page, as_picture = folder / "report.html", folder / "loss.png"
    if pictures:
        _publish(as_picture, pictures[0][2])
    _publish(as_page, page.encode())
    return Report(as_page, as_picture if pictures else None, run.summary is not None, state, found)


# --------------------------------------------------------------------------------------------------------- reading
def _read(folder: Path) -> _Folder:
    settings = _json(folder / "settings.json") or {}
    if not {"name", "steps", "seed", "snapshot"} <= set(settings):
        raise MissingError(
            f"{folder}: no training run here (no settings.json of one); a run's folder is <output>/<name>, "
            "such as runs/laptop"
        )
    summary = _json(folder / "summary.json")
    if summary is not None and summary["steps"] < settings["steps"]:
        summary = None  # the run goes on beyond what it was summed up at
    saved = sorted((folder / "state").glob(f"step_*/{MANIFEST}"))
    return _Folder(
        path=folder,
        settings=settings,
        table=table_of(_rows(folder / "metrics.jsonl")),
        start=_json(folder / "start.json"),
        summary=summary,
        manifest=_json(folder / "checkpoint" / MANIFEST) if summary is not None else None,
        saved=_json(saved[-1]) if saved else None,
    )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputRefused(f"{path}: damaged: {error}; copy the run's folder again") from None
    if not isinstance(values, dict):
        raise InputRefused(f"{path}: holds {type(values).__name__}, not an object; copy the run's folder again")
    return values


def _rows(path: Path) -> Iterator[Row]:
    """Read the rows by the loop's own rule; none where no step has ended."""
    return (row for row, _ in iter_rows(path, _told)) if path.exists() else iter(())


def _told(row: dict[str, Any]) -> Row:
    place = {"step": int(row["step"]), "time": float(row["time"])}
    return {key: float(row[key]) for key in (*SAID, *PARTS) if row.get(key) is not None} | place


def _publish(path: Path, data: bytes) -> None:
    """Write a file whole, over what stands there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- words
def _tests(run: _Folder) -> list[tuple[float, float]]:
    """Return steps and losses on the test split: before the first step, on the way, after the last one."""
    table = run.table
    on_the_way = table.loc[table["loss_test"].notna(), ["step", "loss_test"]].itertuples(index=False, name=None)
    ends = [
        (step, values["loss_test"])
        for step, values in ((0, run.start), (table["step"].iloc[-1], run.summary))
        if values is not None and values["loss_test"] is not None
    ]
    return sorted({**dict(on_the_way), **dict(ends)}.items())


def _state(run: _Folder) -> str:
    if run.summary is not None:
        resumed = run.summary["resumed_from"]
        return f"Finished: {run.summary['steps']:,} steps." + (f" It went on from step {resumed:,}." if resumed else "")
    saved = f"from step {run.saved['global_step']:,}, its newest saved state" if run.saved else "from its start"
    when = f", which ended at {_day(run.table['time'].iloc[-1])}" if len(run.table) else ""
    return (
        f"Not finished: stands at step {_reached(run)}{when}. It still trains, or was stopped or killed; then the same "
        f"command goes on {saved}."
    )


def _title(run: _Folder) -> str:
    return f"{run.settings['name']}, step {_reached(run)}"


def _reached(run: _Folder) -> str:
    step = int(run.table["step"].iloc[-1]) if len(run.table) else 0
    return f"{step:,} of {run.settings['steps']:,}"


def _day(seconds: float) -> str:
    """Return a Unix time as one that people read."""
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _key_figures(run: _Folder, table: pd.DataFrame, found: Figures) -> dict[str, str]:
    first, last = table["loss"].iloc[:1], table["loss"].iloc[-LAST_STEPS:]
    on_the_way = table["loss_test"].dropna()
    before, after, when = _tested(run.start), _tested(run.summary), "after"
    if run.summary is None and len(on_the_way):
        after, when = f"{on_the_way.iloc[-1]:.4f}", "so far"
    trained = f"{first.mean():.4f} → {last.mean():.4f}" if len(table) else NOT_YET
    return {
        f"loss on {_split(run)}, before → {when}": f"{before} → {after}",
        f"training loss, first → last {len(last)}": trained,
        "steps": _reached(run),
        "parameters": f"{run.summary['parameters']:,}" if run.summary else "known at the end",
        "cells a second": _number(found.cells_s),
        "tokens a second": _number(found.tokens_s),
        "operations a second": _number(found.operations_s / 1e9) + " GFLOP/s",
        "MFU": "not known of this device" if math.isnan(found.mfu) else _percent(found.mfu),
        "goodput": _percent(found.goodput),
        "first to last step": _span(found.wall_s),
    }


def _tested(values: dict[str, Any] | None) -> str:
    """Return a loss as text: there may be no file yet, or no test split to measure it on."""
    if values is None:
        return NOT_YET
    return "not measured" if values["loss_test"] is None else f"{values['loss_test']:.4f}"


def _split(run: _Folder) -> str:
    return str(run.settings.get("data", {}).get("test_split") or NO_SPLIT)


def _about_loss(run: _Folder) -> str:
    words = (
        "Mean negative log likelihood per measured feature, in nats. Below: of the features that were asked for, half "
        "of them hidden."
    )
    return words if _split(run) == NO_SPLIT else f"{words} Diamonds: on {_split(run)}, which no step learns from."


def _about_goodput(table: pd.DataFrame, found: Figures) -> str:
    waited, saved = (ratio(table[part].sum(), found.wall_s) for part in ("data_wait_s", "checkpoint_s"))
    rest = 1 - found.goodput - waited - saved
    return (
        f"Goodput {_percent(found.goodput)}: of the {_span(found.wall_s)} from the first step to the end of the last "
        f"one, {_percent(found.goodput)} went to learning, {_percent(waited)} to waiting for data, {_percent(saved)} "
        f"to saving the state, and {_percent(rest)} passed between steps (evaluation, restarts, steps taken again, "
        "what was not measured; shaded where it is long). Rates are those of steps alone."
    )


def _parts(table: pd.DataFrame, found: Figures) -> list[dict[str, str]]:
    return [
        {
            "name": PARTS[part],
            "colour": COLOURS[part],
            "median": _short(found.medians[part]),
            "p95": _short(found.p95[part]),
            "share": _percent(found.shares[part]),
            "steps": f"{int(table[part].count()):,}",
        }
        for part in found.medians
    ]


def _whole(table: pd.DataFrame) -> dict[str, str]:
    seconds = seconds_of(table)
    return {
        "median": _short(float(seconds.median())),
        "p95": _short(float(seconds.quantile(0.95))),
        "steps": f"{len(table):,}",
    }


def _about(run: _Folder) -> dict[str, str]:
    manifest = run.manifest or run.saved or {}
    snapshot = manifest.get("snapshot", {})
    stamp = snapshot.get("lake_timestamp")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    unsaved = "known with the first saved state"
    return {
        "snapshot": str(run.settings["snapshot"]),
        "snapshot id": snapshot.get("id", unsaved),
        "cells in the snapshot": f"{snapshot['n_cells']:,}" if "n_cells" in snapshot else unsaved,
        "lake timestamp": unsaved if stamp is None else f"{stamp} ms ({_day(stamp / 1000)})",
        "lake commit": snapshot.get("commit_id", unsaved),
        "seed": str(run.settings["seed"]),
        "versions": versions or unsaved,
        "code commit": manifest.get("code_commit") or ("known at the end" if run.manifest is None else "no checkout"),
        "folder": str(run.path.absolute()),
        "this page": f"written at {utc_now()}",
    }


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings as ``section.key`` to value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
    return flat


def _changed(flat: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the settings that have no default, or another value than it, as they would be written in a recipe."""
    defaults = _flat(RunSettings(snapshot="").model_dump(mode="json", exclude={"snapshot"}))
    return [
        (name, json.dumps(value, ensure_ascii=False), json.dumps(defaults[name]) if name in defaults else "none")
        for name, value in flat.items()
        if name not in defaults or defaults[name] != value
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _short(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"
