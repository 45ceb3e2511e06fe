"""Check dashboards and alerts without Grafana and Prometheus: ``python infra/monitoring/check.py``.

Every metric and label of every query is one that the code declares (the tables ``METRICS``, read from the source as
they stand, so that nothing is imported); functions, units, variables, places and names are as they should be; the files
are what ``make.py`` makes; ``docs/monitoring.md`` explains every metric. Whether the code shows what it declares is
proved by ``tests/test_infra_monitoring.py``, which runs it. Prints what is wrong, a line each, and ends with 1; or 0.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLES = {"ingest/gauges.py": "ray_", "train/gauges.py": "ray_", "serve/door.py": "ray_", "serve/metrics.py": ""}
"""Files with a table of metrics, and what is put before their names on the way to Prometheus."""
PAGE = "docs/monitoring.md"
UNITS = {"none", "s", "percentunit", "reqps", "ops"}
FUNCTIONS = {"rate", "increase", "sum", "min", "max", "count", "histogram_quantile", "last_over_time", "time"}
GROUPS = r"\b(by|on|group_left)\s*\(([^)]*)\)"
WORDS = {"and", "or", "unless", "offset", "by", "on", "group_left"}
SCRAPED = ("job", "instance")
"""Labels that Prometheus itself puts on what it reads."""
GROWS = "since the copy began"
"""Gauges that say so may be rated like counters: a copy of the model says them, and the ingress passes them on."""
WIDE = 24


@dataclass(frozen=True)
class Metric:
    """A metric as Prometheus knows it."""

    kind: str
    meaning: str
    labels: tuple[str, ...]


def table(path: Path) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Read the table ``METRICS`` of a module without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "METRICS":
            found: dict[str, tuple[str, str, tuple[str, ...]]] = ast.literal_eval(node.value)
            return found
    raise ValueError(f"{path}: has no table METRICS")


def declared() -> dict[str, Metric]:
    """Return what the code declares, by the names that Prometheus sees; a histogram as its family."""
    return {
        prefix + name: Metric(*told) for path, prefix in TABLES.items() for name, told in table(ROOT / path).items()
    }


def series(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the names that queries may use."""
    made = {"up": Metric("gauge", "Whether Prometheus could read a target.", ())}
    for name, metric in metrics.items():
        if metric.kind != "histogram":
            made[name] = metric
            continue
        for end in ("_bucket", "_sum", "_count"):
            more = ("le",) if end == "_bucket" else ()
            made[name + end] = Metric("counter", metric.meaning, (*metric.labels, *more))
    return made


def used(query: str) -> dict[str, set[str]]:
    """Return the metrics of a query, each with the labels that its selectors name."""
    found: dict[str, set[str]] = {}
    for name, inside in re.findall(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", query):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", _without_texts(inside)))
    for word, call in _words(query):
        if not call and word not in WORDS:
            found.setdefault(word, set())
    return found


def _without_texts(query: str) -> str:
    return re.sub(r"\"[^\"]*\"|'[^']*'", "", query)


def _words(query: str) -> list[tuple[str, str]]:
    """Return words outside texts, selectors, ranges and groups, and whether a bracket follows."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", _without_texts(query))
    bare = re.sub(GROUPS, " ", bare)
    bare = re.sub(r"\boffset\s+\w+", " ", bare)
    return re.findall(r"(?<![\w.$])([a-zA-Z_:][\w:]*)\s*(\(?)", bare)


def grouped(query: str) -> set[str]:
    """Return the labels that a query groups by."""
    inside = [labels for _, labels in re.findall(GROUPS, _without_texts(query))]
    return {label.strip() for labels in inside for label in labels.split(",") if label.strip()}


def wrong_in_query(query: str, known: Mapping[str, Metric]) -> Iterator[str]:
    """Tell what is wrong with a query."""
    if query.count("(") != query.count(")"):
        yield "brackets do not close"
    yield from (
        f"there is no function {word}()" for word, call in _words(query) if call and word not in FUNCTIONS | WORDS
    )
    there = set(SCRAPED)
    for name, selected in used(query).items():
        if name not in known:
            yield f"the code declares no metric {name}"
            continue
        there |= set(known[name].labels)
        for label in sorted(selected - set(known[name].labels) - set(SCRAPED)):
            yield f"{name} has no label {label!r}"
        rated = re.search(rf"\b(rate|increase)\(\s*{name}\b", query)
        if rated and known[name].kind != "counter" and GROWS not in known[name].meaning:
            yield f"{rated[1]}() of {name}, which is a {known[name].kind}"
    if all(name in known for name in used(query)):
        yield from (f"no metric in it has the label {label!r}" for label in sorted(grouped(query) - there))


def wrong_in_dashboard(page: Mapping[str, Any], known: Mapping[str, Metric]) -> Iterator[str]:
    """Tell what is wrong with a dashboard."""
    missing = {"uid", "title", "schemaVersion", "panels", "templating", "time"} - set(page)
    if missing:
        yield f"lacks {', '.join(sorted(missing))}"
        return
    variables = page["templating"]["list"]
    for one in variables:
        for metric, label in re.findall(r"label_values\((\w+), (\w+)\)", str(one["query"])):
            if label not in known.get(metric, Metric("", "", ())).labels:
                yield f"variable {one['name']}: {metric} has no label {label!r}"
    may = {one["name"] for one in variables} | {"__rate_interval"}
    yield from (f"two panels are called {title!r}" for title in _twice(one.get("title") for one in page["panels"]))
    yield from (f"two panels have the id {number}" for number in _twice(one.get("id") for one in page["panels"]))
    yield from _wrong_places(page["panels"])
    for panel in page["panels"]:
        yield from (f"panel {panel.get('title')!r}: {what}" for what in _wrong_in_panel(panel, known, may))


def _wrong_in_panel(panel: Mapping[str, Any], known: Mapping[str, Metric], may: set[str]) -> Iterator[str]:
    if not panel.get("description"):
        yield "does not say what it tells"
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    if unit not in UNITS and not unit.startswith("suffix: "):
        yield f"Grafana has no unit {unit!r} that is used here"
    if not panel.get("targets"):
        yield "asks nothing"
    yield from (f"two queries are {letter}" for letter in _twice(one["refId"] for one in panel.get("targets", [])))
    for target in panel.get("targets", []):
        query = target["expr"]
        yield from (f"{what} ({query})" for what in wrong_in_query(query, known))
        yield from (f"there is no variable ${name}" for name in re.findall(r"\$(\w+)", query) if name not in may)
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        yield from (f"its legend names {label!r}, by which nothing is grouped" for label in shown - grouped(query))


def _wrong_places(panels: list[dict[str, Any]]) -> Iterator[str]:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel.get("gridPos", {})
        if not {"x", "y", "w", "h"} <= set(place) or place["x"] + place["w"] > WIDE:
            yield f"panel {panel.get('title')!r} has no place within {WIDE} columns"
            continue
        cells = [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        yield from {f"panels {panel['title']!r} and {taken[cell]!r} overlap" for cell in cells if cell in taken}
        taken |= dict.fromkeys(cells, panel["title"])


def wrong_in_alerts(rules: Mapping[str, Any], jobs: set[str], known: Mapping[str, Metric]) -> Iterator[str]:
    """Tell what is wrong with a rule file."""
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    yield from (f"two groups are called {name}" for name in _twice(group["name"] for group in rules["groups"]))
    yield from (f"two alerts are called {name}" for name in _twice(rule["alert"] for rule in alerts))
    for rule in alerts:
        where, notes = rule["alert"], rule.get("annotations", {})
        yield from (f"{where}: {what}" for what in wrong_in_query(rule["expr"], known))
        if not re.fullmatch(r"\d+[smh]", str(rule.get("for", ""))):
            yield f"{where}: for: {rule.get('for')!r} is no time"
        if rule.get("labels", {}).get("severity") not in ("page", "ticket"):
            yield f"{where}: severity is neither page nor ticket"
        yield from (f"{where}: no {note}" for note in ("summary", "description") if not notes.get(note))
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(notes.values())))
        for label in sorted(named - grouped(rule["expr"]) - set(SCRAPED)):
            yield f"{where}: speaks of the label {label!r}, which its query does not keep"
        asked = set(re.findall(r"job=\"([^\"]+)\"", rule["expr"]))
        yield from (f"{where}: prometheus.yml has no job {job!r}" for job in sorted(asked - jobs))


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, times in Counter(values).items() if times > 1]


def line_of(name: str, metric: Metric) -> str:
    """Return the line that explains a metric on the page."""
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "none"
    return f"| `{name}` | {metric.kind} | {labels} | {metric.meaning} |"


def check(files: Mapping[str, str], page: str, metrics: Mapping[str, Metric]) -> Iterator[str]:
    """Tell what is wrong with these files (path below this folder to text) and with the page about them."""
    known = series(metrics)
    made: dict[str, str] = runpy.run_path(str(HERE / "make.py"))["files"]()
    for name in sorted(made.keys() | {name for name in files if name != "prometheus.yml"}):
        if files.get(name) != made.get(name):
            yield f"{name}: is not what make.py makes; run it, or change it there"
    pages = {name: json.loads(text) for name, text in files.items() if name.startswith("dashboards/")}
    for key in ("uid", "title"):
        yield from (f"two dashboards have the {key} {value!r}" for value in _twice(p.get(key) for p in pages.values()))
    for name, one in pages.items():
        yield from (f"{name}: {what}" for what in wrong_in_dashboard(one, known))
    prometheus = yaml.safe_load(files["prometheus.yml"])
    jobs = {job["job_name"] for job in prometheus["scrape_configs"]}
    if prometheus.get("rule_files") != ["alerts.yaml"]:
        yield "prometheus.yml: does not read alerts.yaml"
    yield from (f"alerts.yaml: {what}" for what in wrong_in_alerts(yaml.safe_load(files["alerts.yaml"]), jobs, known))
    for name, metric in metrics.items():
        if line_of(name, metric) not in page:
            yield f"{PAGE}: lacks the line {line_of(name, metric)}"
    yield from (f"{PAGE}: explains {name}, which the code does not declare" for name in _explained(page) - set(metrics))


def _explained(page: str) -> set[str]:
    return set(re.findall(r"(?m)^\| `((?:ray_)?somaflow_\w+)`", page))


def read() -> dict[str, str]:
    """Read the files of this folder that Grafana and Prometheus read."""
    beside = HERE.parent / "kubernetes" / "base" / "alerts.yaml"
    found = [*HERE.glob("dashboards/*"), HERE / "alerts.yaml", HERE / "prometheus.yml", beside]
    return {os.path.relpath(path, HERE): path.read_text(encoding="utf-8") for path in sorted(found)}


def main() -> int:
    """Check all; return the status to end with."""
    files, metrics = read(), declared()
    wrong = list(check(files, (ROOT / PAGE).read_text(encoding="utf-8"), metrics))
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{len(metrics)} metrics and {len(files)} files of dashboards and alerts are as they should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
