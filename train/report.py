"""This module is a training run's report: what its rows come to, one HTML page with its pictures in it, a loss curve.

It reads a run's folder as the loop leaves it, also while the run goes on and after it was killed.
"""

from __future__ import annotations

import base64
import datetime as dt
import io
import json
import math
import os
import secrets
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from store.errors import InputRefused, MissingError
from store.lake import utc_now
from train.checkpoint import MANIFEST
from train.record import USEFUL
from train.settings import RunSettings

PARTS = {
    "data_wait_s": "waiting for data",
    "h2d_s": "host to device",
    "forward_backward_s": "forward and backward",
    "optimizer_s": "optimizer",
    "checkpoint_s": "saving the state",
}
"""What a row says of its step's seconds; a part that no row names was not measured apart."""
LOSSES = ("loss", "loss_asked", "loss_test")
SAID = ("step", "time", *LOSSES, "lr", "grad_norm", "cells", "tokens", "operations", "mfu", "entropy_ratio")
"""What else of a row is read; ``loss_test`` is there where the run was evaluated after the step."""
COLOURS = dict(zip(PARTS, ("#c44e1c", "#e3b34c", "#2a6f97", "#7fb7d3", "#8a8a8a"), strict=True))
OURS, OTHER, GREY = "#2a6f97", "#c44e1c", "#8a8a8a"
LAST_STEPS = 20
DRAWN = 800
STRETCHES = 60
NOT_YET = "not yet"
NO_SPLIT = "no split"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: left; overflow-wrap: anywhere; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.sum td { font-weight: 600; border-top: 1px solid #888; }
img { max-width: 100%; }
h2 { margin: 2.2rem 0 .5rem; }
.state { padding: .5rem .8rem; border-left: 5px solid {{ "#3a8a4f" if finished else "#d08a1d" }}; background: #f4f4f2; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.figures div { border: 1px solid #ddd; border-radius: 4px; padding: .5rem .8rem; }
.figures dt { color: #555; font-size: 13px; }
.figures dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.patch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="state">{{ state }}</p>
<dl class="figures">
{% for name, value in key.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% if not pictures %}
<p>No step has ended yet: there is nothing to draw.</p>
{% endif %}
{% for heading, words, picture in pictures %}
<h2>{{ heading }}</h2>
<p>{{ words }}</p>
{% if picture %}
<img alt="{{ heading }}" src="data:image/png;base64,{{ picture }}">
{% endif %}
{% if heading == TIME %}
<table>
<tr><th>part of a step</th><th class="number">median</th><th class="number">95th percentile</th>
<th class="number">share of all seconds</th><th class="number">steps</th></tr>
{% for one in parts %}
<tr><td><span class="patch" style="background: {{ one.colour }}"></span>{{ one.name }}</td>
<td class="number">{{ one.median }}</td><td class="number">{{ one.p95 }}</td><td class="number">{{ one.share }}</td>
<td class="number">{{ one.steps }}</td></tr>
{% endfor %}
<tr class="sum"><td>whole step</td><td class="number">{{ whole.median }}</td><td class="number">{{ whole.p95 }}</td>
<td></td><td class="number">{{ whole.steps }}</td></tr>
</table>
{% if unmeasured %}<p>Not measured apart in this run: {{ unmeasured | join(", ") }}.</p>{% endif %}
{% endif %}
{% endfor %}
<h2>Where it comes from</h2>
<table>
{% for name, value in about.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
<h2>Settings that differ from the defaults</h2>
<table>
<tr><th>setting</th><th>here</th><th>default</th></tr>
{% for name, here, default in settings %}
<tr><td>{{ name }}</td><td>{{ here }}</td><td>{{ default }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""
TIME = "Where a step's time goes"

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Figures:
    """What a run's rows come to; NaN where there is no row.

    Attributes:
        steps: Rows.
        cells_s: Cells over the seconds of all steps; what lies between steps does not count.
        tokens_s: Tokens, likewise.
        operations_s: Floating point operations, likewise; NaN where the run did not count them.
        mfu: These over what its devices can do; NaN where nobody knows what they can.
        wall_s: From the first step's begin to the last one's end, with all restarts between them.
        goodput: Share of ``wall_s`` in which a step that was kept learned: neither waited for data nor saved. Steps
            that a restart took again are no rows, so that their seconds count as lost.
        medians: Part of a step (see ``PARTS``) to its median seconds, over the steps that had it.
        p95: Part to its 95th percentile, likewise.
        shares: Part to its share of the seconds of all steps; they add up to 1.
    """

    steps: int
    cells_s: float
    tokens_s: float
    operations_s: float
    mfu: float
    wall_s: float
    goodput: float
    medians: dict[str, float]
    p95: dict[str, float]
    shares: dict[str, float]


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


def figures(rows: Iterable[Row]) -> Figures:
    """Sum up a run's rows (see ``train.record.read_metrics``)."""
    return _figures(_table(rows))


def _figures(table: pd.DataFrame) -> Figures:
    seconds = _seconds(table)
    parts = {part: table[part].dropna() for part in PARTS if table[part].notna().any()}
    total = float(seconds.sum())
    wall_s = float(table["time"].iloc[-1] - table["time"].iloc[0] + seconds.iloc[0]) if len(table) else 0.0
    return Figures(
        steps=len(table),
        cells_s=_ratio(table["cells"].sum(), total),
        tokens_s=_ratio(table["tokens"].sum(), total),
        operations_s=_ratio(table["operations"].sum(min_count=1), float(seconds[table["operations"].notna()].sum())),
        mfu=_ratio((table["mfu"] * seconds).sum(min_count=1), float(seconds[table["mfu"].notna()].sum())),
        wall_s=wall_s,
        goodput=_ratio(table[list(USEFUL)].sum().sum(), wall_s),
        medians={part: float(values.median()) for part, values in parts.items()},
        p95={part: float(values.quantile(0.95)) for part, values in parts.items()},
        shares={part: _ratio(values.sum(), total) for part, values in parts.items()},
    )


def write_report(folder: Path) -> Report:
    """Write ``report.html`` and ``loss.png`` into a run's folder, each whole, over what stands there.

    Args:
        folder: The run's, ``<output>/<name>``; the run may go on meanwhile, or have died.

    Raises:
        MissingError: No run began there.
        InputRefused: A file of the run is damaged.
    """
    run = _read(folder)
    table, found, flat = run.table, _figures(run.table), _flat(run.settings)
    state = _state(run)
    pictures: list[tuple[str, str, bytes]] = []
    if len(table):
        pictures = [
            ("Loss", _about_loss(run), _loss_picture(table, run)),
            (
                "Learning rate and gradient norm",
                "The norm is that of all gradients together before it is clipped.",
                _rate_picture(table, flat),
            ),
            (TIME, "Each stretch of steps is split by what its seconds went to.", _time_picture(table)),
            ("Tokens a second", _about_goodput(table, found), _token_picture(table)),
            ("Mixing", *_mixing(table)),
        ]
    shown = [(heading, words, base64.b64encode(png).decode()) for heading, words, png in pictures]
    html = jinja2.Environment(autoescape=True).from_string(PAGE)
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
        table=_table(_rows(folder / "metrics.jsonl")),
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
    """Read the rows by the loop's own rule: a last line that was cut off is not there."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                told = {key: float(row[key]) for key in (*SAID, *PARTS) if row.get(key) is not None}
                yield told | {"step": int(row["step"]), "time": float(row["time"])}
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise InputRefused(f"{path}: line {number} is not a step's row: {error}; remove the line") from None


def _table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return a column for all that a row may say, NaN where it does not; to save nothing takes no time, not 0 s.

    Rows go into the columns one by one: a million steps are 160 MB and twice that while they are read; as dictionaries
    they would be 2 GB.
    """
    columns = {name: array("d") for name in (*SAID, *PARTS)}
    for row in rows:
        for name, values in columns.items():
            value = row.get(name)
            values.append(math.nan if value is None else value)
    table = pd.DataFrame({name: np.frombuffer(values) for name, values in columns.items()})
    table["checkpoint_s"] = table["checkpoint_s"].replace(0.0, np.nan)
    return table


def _seconds(table: pd.DataFrame) -> pd.Series[float]:
    """Return the seconds of each step, all its parts together."""
    return table[list(PARTS)].sum(axis=1)


def _ratio(part: Any, whole: float) -> float:
    return float(part) / whole if whole > 0 else math.nan


def _publish(path: Path, data: bytes) -> None:
    """Write a file whole, over what stands there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- words
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
    waited, saved = (_ratio(table[part].sum(), found.wall_s) for part in ("data_wait_s", "checkpoint_s"))
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
    seconds = _seconds(table)
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


# -------------------------------------------------------------------------------------------------------- pictures
def _loss_picture(table: pd.DataFrame, run: _Folder) -> bytes:
    asked = bool(table["loss_asked"].notna().any())
    figure, axes = _axes(5.2 if asked else 3.8, [2, 1] if asked else [1])
    step = table["step"].to_numpy()
    _curve(axes[0], step, table["loss"], OURS)
    tested = _tests(table, run)
    if tested:
        split = f"on {_split(run)}: " + " → ".join(
            f"{loss:.4f}" for loss in (tested[0][1], tested[-1][1])[: len(tested)]
        )
        axes[0].plot(*zip(*tested, strict=True), "D", color="#1b1b1b", markersize=6, label=split, zorder=5)
    _keep_spikes_out(axes[0], table["loss"])
    axes[0].set_title(f"{run.settings['name']}, step {_reached(run)}", loc="left", parse_math=False)
    axes[0].set_ylabel("loss, nats")
    axes[0].legend(frameon=False, loc="upper right")
    if asked:
        _curve(axes[1], step, table["loss_asked"], OTHER)
        _keep_spikes_out(axes[1], table["loss_asked"])
        axes[1].set_ylabel("of what was\nasked, nats")
    _by_step(axes[-1])
    return _png(figure)


def _tests(table: pd.DataFrame, run: _Folder) -> list[tuple[float, float]]:
    """Return steps and losses on the test split: before the first step, on the way, after the last one."""
    on_the_way = table.loc[table["loss_test"].notna(), ["step", "loss_test"]].itertuples(index=False, name=None)
    ends = [
        (step, values["loss_test"])
        for step, values in ((0, run.start), (table["step"].iloc[-1], run.summary))
        if values is not None and values["loss_test"] is not None
    ]
    return sorted({**dict(on_the_way), **dict(ends)}.items())


def _rate_picture(table: pd.DataFrame, flat: dict[str, Any]) -> bytes:
    figure, axes = _axes(4.2, [1, 1])
    step = table["step"].to_numpy()
    axes[0].plot(*thin(step, table["lr"].to_numpy()), color=OURS, linewidth=2)
    axes[0].set_ylabel("learning rate")
    axes[0].set_ylim(bottom=0)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _curve(axes[1], step, table["grad_norm"].where(table["grad_norm"] > 0), OURS)
    if "optim.clip_norm" in flat:
        clip = flat["optim.clip_norm"]
        axes[1].axhline(clip, color=OTHER, linewidth=1, linestyle="--", label=f"clipped above {clip:g}")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("gradient norm")
    _legend(axes[1])
    _by_step(axes[1])
    return _png(figure)


def _time_picture(table: pd.DataFrame) -> bytes:
    figure, (axes,) = _axes(3.2, [1])
    parts = [part for part in PARTS if table[part].notna().any()]
    stretches = np.array_split(np.arange(len(table)), min(len(table), STRETCHES))
    sums = np.array([table[parts].iloc[rows].sum().to_numpy() for rows in stretches])
    shares = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12)
    step = table["step"].to_numpy()
    edges = [*(step[rows[0]] - 1 for rows in stretches), step[-1]]
    stacked = np.vstack([shares, shares[-1:]]).T
    axes.stackplot(
        edges, stacked, step="post", labels=[PARTS[part] for part in parts], colors=[COLOURS[part] for part in parts]
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylabel("share of seconds")
    _by_step(axes)
    _legend(axes)
    return _png(figure)


def _token_picture(table: pd.DataFrame) -> bytes:
    figure, (axes,) = _axes(3.2, [1])
    time, seconds = table["time"].to_numpy(), _seconds(table)
    passed = time - time[0] + seconds.iloc[0]
    units = ((300, 1, "seconds"), (10800, 60, "minutes"), (math.inf, 3600, "hours"))
    unit, name = next((size, name) for most, size, name in units if passed[-1] < most)
    between = np.diff(time) - seconds.to_numpy()[1:]
    gaps = np.flatnonzero(between > max(0.01 * passed[-1], 5 * float(seconds.median())))
    rate = table["tokens"] / seconds.where(seconds > 0)
    for number, rows in enumerate(np.split(np.arange(len(table)), gaps + 1)):
        _curve(axes, passed[rows] / unit, rate.iloc[rows], OURS, window=_window(len(table)), named=number == 0)
    for number, row in enumerate(gaps):
        label = "between steps" if number == 0 else None
        begin = passed[row] / unit
        axes.axvspan(begin, begin + between[row] / unit, color=GREY, alpha=0.25, linewidth=0, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
    axes.set_ylabel("tokens/s")
    axes.set_xlabel(f"{name} since the first step began")
    _legend(axes)
    return _png(figure)


def _mixing(table: pd.DataFrame) -> tuple[str, bytes]:
    """Return what is said of the mixing, and its picture where there is something to mix."""
    ratio = table["entropy_ratio"].to_numpy()
    if not np.isfinite(ratio).any():
        return "There is one dataset only, or its cells are drawn by weight: nothing was measured.", b""
    figure, (axes,) = _axes(2.6, [1])
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--", label="random batches")
    axes.plot(*thin(table["step"].to_numpy(), ratio), color=OURS, linewidth=2, label="this run, all batches so far")
    low, high = float(np.nanmin(ratio)), float(np.nanmax(ratio))
    axes.set_ylim(min(0.95, low - 0.01), max(1.05, high + 0.01))
    axes.set_ylabel("entropy ratio")
    _by_step(axes)
    _legend(axes)
    words = (
        "Entropy of the datasets in a batch over what random batches of its size would have: 1 is an ideal shuffle. "
        f"It ends at {ratio[np.isfinite(ratio)][-1]:.3f}."
    )
    return words, _png(figure)


def _axes(height: float, ratios: list[int]) -> tuple[Figure, list[Any]]:
    """Return a figure with panels one above another, that share their steps."""
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(ratios), sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes in grid[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, list(grid[:, 0])


def _by_step(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("step")


def _legend(axes: Any) -> None:
    """Put the legend above the panel, where it hides nothing."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=len(PARTS), borderaxespad=0.2)


def _window(n_steps: int) -> int:
    """Return how many steps a smoothed value is the median of: an odd number, itself in their middle."""
    return max(7, n_steps // 40) | 1


def _curve(
    axes: Any, x: NDArray[np.float64], values: pd.Series[float], colour: str, *, window: int = 0, named: bool = True
) -> None:
    """Draw values thin, and their medians over neighbouring steps thick: one spike does not lift them."""
    window = window or _window(len(values))
    smooth = values.rolling(window, center=True, min_periods=1).median()
    words = ("each step", f"median of {window:,} steps") if named else (None, None)
    axes.plot(*thin(x, values.to_numpy()), color=colour, linewidth=0.7, alpha=0.5, label=words[0])
    axes.plot(*thin(x, smooth.to_numpy()), color=colour, linewidth=2, label=words[1])


def thin(x: NDArray[np.float64], y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep the lowest and highest value of each stretch of a long run: it is drawn soon, and no spike is lost."""
    kept = np.flatnonzero(np.isfinite(y))
    if len(kept) > 2 * DRAWN:
        parts = np.array_split(kept, DRAWN)
        kept = np.unique([part[place] for part in parts for place in (y[part].argmin(), y[part].argmax())])
    return x[kept], y[kept]


def _keep_spikes_out(axes: Any, values: pd.Series[float]) -> None:
    """End the axis below single values that would press all others flat, and say how many there are."""
    low, high, top = (float(one) for one in (values.min(), values.quantile(0.99), values.max()))
    if top - low > 3 * (high - low) > 0:
        limit = high + 0.3 * (high - low)
        axes.set_ylim(low - 0.1 * (high - low), limit)
        n_above = int((values > limit).sum())
        axes.set_title(f"{n_above} above, up to {top:.3g}", loc="center", fontsize=9, color=GREY)


def _png(figure: Figure) -> bytes:
    figure.align_ylabels()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
