"""This module draws one HTML page of a lake's quality: a table of all datasets and plots, with nothing to download."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ingest import quality
from ingest.duplicates import Shared
from store.lake import Lake

mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["text.parse_math"] = False  # a name may hold dollars

MOST_BARS = 40
COLOURS = ("#3b6ea5", "#c0653b", "#6a994e", "#8a5a9e")

TEMPLATE = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("page.html").read_text("utf-8"))


def table(lake: Lake) -> list[dict[str, Any]]:
    """Return one row for each dataset and measurement of a lake, as ``ingest.quality.summary`` has it."""
    rows = []
    datasets = [commit.dataset for commit in lake.current]
    found = quality.read(lake.uri, [dataset["number"] for dataset in datasets])
    for dataset, measured in zip(datasets, found, strict=True):
        for measurement, figures in measured.items():
            about = {"dataset": dataset["dataset_id"], "organism": dataset["organism"], "measurement": measurement}
            rows.append({**about, **figures})
    return rows


def page(lake: Lake, shared: list[Shared]) -> str:
    """Return the page as HTML."""
    rows = table(lake)
    counted = [row for row in rows if row["measurement"] == "RNA" and row["layer"] == "raw" and row["sum"]]
    limit = _limit(len(counted))
    counted = sorted(counted, key=lambda row: -row["cells"])[:MOST_BARS]
    plots = []
    if counted:
        plots.append(("Depth", f"counts of a cell (RNA): 5, 25, 50, 75 and 95 %{limit}", _boxes(counted, "sum")))
        plots.append(("Genes", f"genes detected in a cell: 5, 25, 50, 75 and 95 %{limit}", _boxes(counted, "detected")))
    if rows:
        limit = _limit(len({row["dataset"] for row in rows}))
        plots.append(("What was measured", f"cells of each dataset with a measurement{limit}", _measured(rows)))
    return TEMPLATE.render(
        lake=lake.uri.rstrip("/").rsplit("/", 1)[-1],
        commit=lake.commit.number,
        created=lake.commit.created,
        cells=sum(commit.dataset["n_obs"] for commit in lake.current),
        rows=rows,
        plots=plots,
        shared=shared,
    )


def _limit(n_datasets: int) -> str:
    return f"; the {MOST_BARS} largest of {n_datasets:,} datasets" if n_datasets > MOST_BARS else ""


def _boxes(rows: list[dict[str, Any]], key: str) -> str:
    names = [_short(row["dataset"]) for row in rows]
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    columns = {"whislo": "q05", "q1": "q25", "med": "q50", "q3": "q75", "whishi": "q95"}
    boxes = [{part: max(1.0, row[key][name]) for part, name in columns.items()} for row in rows]
    axes.bxp(
        boxes,
        orientation="horizontal",
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#dbe6f1", "edgecolor": COLOURS[0]},
        medianprops={"color": COLOURS[1], "linewidth": 2},
    )
    axes.set_yticks(range(1, len(rows) + 1), names)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e5e5e5")
    return _svg(figure)


def _measured(rows: list[dict[str, Any]]) -> str:
    size = Counter[str]()
    for row in rows:
        size[row["dataset"]] += row["cells"]
    datasets = [name for name, _ in size.most_common(MOST_BARS)]
    measurements = list(dict.fromkeys(row["measurement"] for row in rows))
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(datasets)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(datasets))
    for number, measurement in enumerate(measurements):
        of = {row["dataset"]: row["cells"] for row in rows if row["measurement"] == measurement}
        cells = np.array([of.get(name, 0) for name in datasets], float)
        axes.barh(range(len(datasets)), cells, left=left, label=measurement, color=COLOURS[number % 4])
        left += cells
    axes.set_yticks(range(len(datasets)), [_short(name) for name in datasets])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("cells x measurements")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    return _svg(figure)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:15]}…{name[-15:]}"  # what tells files apart is often at the end


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return re.sub(r"(?s)^.*?(?=<svg)", "", sink.getvalue())
