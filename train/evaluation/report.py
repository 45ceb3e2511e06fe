"""This module writes what an evaluation came to: JSON for programs, and one HTML page with its pictures in it."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.checkpoint import json_values
from train.evaluation.score import REPLICATE, Score, Value

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.5rem; }
</style>
<h1>{{ title }}</h1>
<p>s = (u - b) / (r - b): 0 is the strongest baseline (chosen with hindsight, which favours it), 1 is a replicate of the
experiment. A metric whose replicate is not better than the strongest baseline by two standard errors over units says
nothing here, and gets no score. Intervals are 95 % (Fieller's, of the ratio of paired differences over units), p is
that of a paired t-test over units, Holm-adjusted.</p>
<table>
<tr><th>metric</th><th>units</th><th>u (ours)</th><th>b (strongest baseline)</th><th>r (replicate)</th>
<th>gate (SE)</th>
<th>s</th><th>p</th><th></th></tr>
{% for one in scores %}
<tr><td>{{ one.metric }} ({{ one.better }} is better)</td><td class="number">{{ one.n_units }}</td>
<td class="number">{{ number(one.u) }}</td><td class="number">{{ number(one.b) }} ({{ one.b_method }})</td>
<td class="number">{{ number(one.r) }}</td><td class="number">{{ number(one.gate) }}</td>
<td class="number">{{ number(one.s) }}
{% if one.s == one.s %} [{{ number(one.low) }}, {{ number(one.high) }}]{% endif %}</td>
<td class="number">{{ number(one.p) }}</td><td>{{ one.verdict }}</td></tr>
{% endfor %}
</table>
{% for metric, picture in pictures %}
<h2>{{ metric }}</h2>
<img alt="{{ metric }} of each method, one dot for each unit" src="data:image/png;base64,{{ picture }}">
{% endfor %}
{% if beside %}
<h2>Also measured</h2>
<p>Means over units and seeds; nothing is scored.</p>
<table>
<tr><th>method</th><th>figure</th><th>mean</th></tr>
{% for method, metric, mean in beside %}
<tr><td>{{ method }}</td><td>{{ metric }}</td><td class="number">{{ number(mean) }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for arm, found in nulls.items() %}
<h2>Null arm: {{ arm }} dealt at random</h2>
<table>
<tr><th>metric</th><th>u (ours, dealt)</th><th>b</th><th>s</th><th></th></tr>
{% for one in found %}
<tr><td>{{ one.metric }}</td><td class="number">{{ number(one.u) }}</td><td class="number">{{ number(one.b) }}</td>
<td class="number">{{ number(one.s) }}{% if one.s == one.s %} [{{ number(one.low) }}, {{ number(one.high) }}]{% endif %}
</td><td>{{ one.verdict }}</td></tr>
{% endfor %}
</table>
{% endfor %}
<h2>What was done</h2>
<dl>{% for name, value in about.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</html>
"""


def write_report(
    folder: Path,
    title: str,
    values: Sequence[Value],
    scores: Sequence[Score],
    about: dict[str, Any],
    nulls: Mapping[str, Sequence[Score]] | None = None,
) -> tuple[Path, Path]:
    """Write ``evaluation.json`` and ``evaluation.html``; return their paths.

    Args:
        folder: Where.
        title: The page's heading.
        values: What every method reached on every unit.
        scores: What came of it.
        about: What was done: suite, folds, checkpoint, ...
        nulls: Null arm to the scores of ours in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answer = {
        "about": about,
        "scores": [json_values(asdict(one)) for one in scores],
        "nulls": {arm: [json_values(asdict(one)) for one in found] for arm, found in (nulls or {}).items()},
        "values": [json_values(asdict(one)) for one in values],
    }
    as_json, as_html = folder / "evaluation.json", folder / "evaluation.html"
    as_json.write_text(json.dumps(answer, indent=1), encoding="utf-8")
    pictures = [(one.metric, _picture(values, one)) for one in scores]
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    scored = {one.metric for one in scores}
    html = page.render(
        title=title,
        scores=scores,
        pictures=pictures,
        beside=[row for row in means(values) if row[1] not in scored],
        about=about,
        nulls=nulls or {},
        number=_number,
    )
    as_html.write_text(html, encoding="utf-8")
    return as_json, as_html


def means(values: Sequence[Value]) -> list[tuple[str, str, float]]:
    """Return method, metric and mean over units and seeds, leaving out what is not defined."""
    table = pd.DataFrame([vars(value) for value in values])
    mean = table.groupby(["method", "metric"], sort=False)["value"].mean().dropna().reset_index()
    return [(str(row["method"]), str(row["metric"]), float(row["value"])) for _, row in mean.iterrows()]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _picture(values: Sequence[Value], one: Score) -> str:
    """Draw each method's units as dots and their mean as a bar; return a PNG in base64."""
    table = pd.DataFrame([vars(value) for value in values if value.metric == one.metric]).dropna()
    per_unit = table.groupby(["method", "unit"], sort=False)["value"].mean().reset_index()
    methods = [*[name for name in dict.fromkeys(per_unit["method"]) if name != REPLICATE], REPLICATE]
    figure = Figure(figsize=(9, 0.6 + 0.4 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, name in enumerate(methods):
        points = per_unit.loc[per_unit["method"] == name, "value"]
        colour = "#8a8a8a" if name == REPLICATE else "#c44e1c" if name == one.b_method else "#2a6f97"
        axes.scatter(points, [place] * len(points), s=14, alpha=0.5, color=colour)
        axes.scatter([points.mean()], [place], marker="|", s=400, color=colour)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(f"{one.metric} ({one.better} is better)")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
