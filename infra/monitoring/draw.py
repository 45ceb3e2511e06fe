"""Draw a dashboard without Grafana: ``python infra/monitoring/draw.py train train.png --url http://127.0.0.1:9090``.

Asks a Prometheus what the panels ask, over a range of time, and draws the answers in the panels' places.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

HERE = Path(__file__).parent
POINTS = 240
WIDE = 24


def ask(url: str, query: str, begin: float, end: float, chosen: str = ".+") -> list[dict[str, Any]]:
    """Return a query's series over a range, of the runs or lakes that are chosen."""
    step = max(1.0, (end - begin) / POINTS)
    plain = re.sub(r"=~\"\$\w+\"", f'=~"{chosen}"', query).replace("$__rate_interval", f"{max(20, round(4 * step))}s")
    words = urllib.parse.urlencode({"query": plain, "start": begin, "end": end, "step": step})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{words}", timeout=30) as answer:  # noqa: S310 - the caller's
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def legend_of(pattern: str, labels: dict[str, str]) -> str:
    """Write a legend as Grafana does."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], "") or "-", pattern)


def draw(page: dict[str, Any], url: str, begin: float, end: float, chosen: str) -> Figure:
    """Draw all panels of a dashboard."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in page["panels"])
    figure = Figure(figsize=(16, 0.42 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(page["title"], fontsize=13)
    grid = figure.add_gridspec(rows, WIDE)
    for panel in page["panels"]:
        place = panel["gridPos"]
        axes = figure.add_subplot(
            grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]], title=panel["title"]
        )
        series = [
            (legend_of(target["legendFormat"], one["metric"]), np.array(one["values"], dtype=float).T)
            for target in panel["targets"]
            for one in ask(url, target["expr"], begin, end, chosen)
        ]
        _lines(axes, panel, [(name, (times - begin) / 60, values) for name, (times, values) in series])
        axes.set_xlim(0, (end - begin) / 60)
    return figure


def _lines(axes: Any, panel: dict[str, Any], series: list[tuple[str, Any, Any]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.tick_params(labelsize=7)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    if not series:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="grey")
        return
    if defaults["custom"]["stacking"]["mode"] == "normal":
        times = np.unique(np.concatenate([one for _, one, _ in series]))
        axes.stackplot(
            times, [np.interp(times, x, np.nan_to_num(y)) for _, x, y in series], labels=[n for n, *_ in series]
        )
    else:
        for name, x, y in series:
            axes.plot(x, y, label=name, linewidth=1)
    if defaults["unit"] == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if "min" in defaults:
        axes.set_ylim(bottom=0)
    unit = defaults["unit"].removeprefix("suffix: ")
    axes.set_ylabel("" if unit in ("none", "percentunit") else unit, fontsize=7)
    axes.legend(fontsize=6, loc="best")


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dashboard", choices=sorted(path.stem for path in HERE.glob("dashboards/*.json")))
    parser.add_argument("picture", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of a Prometheus")
    parser.add_argument("--end", type=float, default=time.time(), help="unix time; now when left out")
    parser.add_argument("--minutes", type=float, default=60, help="before it")
    parser.add_argument("--chosen", default=".+", help="runs or lakes, as a regular expression")
    told = parser.parse_args()
    page = json.loads((HERE / "dashboards" / f"{told.dashboard}.json").read_text(encoding="utf-8"))
    begin = told.end - 60 * told.minutes
    draw(page, told.url, begin, told.end, told.chosen).savefig(told.picture, dpi=75)


if __name__ == "__main__":
    main()
