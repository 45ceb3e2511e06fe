"""Write the Grafana dashboards and Prometheus' alerts: ``python infra/monitoring/make.py``.

What is looked at stands in ``DASHBOARDS`` and ``ALERTS`` below, one dashboard for each who looks; the rest turns it
into the files of ``dashboards/``, ``alerts.yaml`` and, for Kubernetes, ``../kubernetes/base/alerts.yaml``.
``check.py`` proves that the files are what this makes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
WINDOW = "[$__rate_interval]"
HALF, THIRD = 12, 8
"""Widths of panels; Grafana's grid is 24 wide."""
HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: What is drawn.
        queries: Query to legend, as Grafana writes them.
        unit: One of Grafana's units.
        tells: What it says, and what to do about it.
        width: Of 24.
        most: Upper end of the axis, where there is one.
        stacked: Lines are parts of a whole.
    """

    title: str
    queries: dict[str, str]
    unit: str
    tells: str
    width: int = THIRD
    most: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """What one role looks at.

    Attributes:
        name: Of the file.
        title: Of the page.
        role: Who looks.
        choice: Label that can be chosen, "" for none, and the metric that has all its values.
        beside: Ray's own dashboards that say more: uid to title.
        panels: In reading order.
    """

    name: str
    title: str
    role: str
    choice: tuple[str, str]
    beside: dict[str, str]
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Alert:
    """One rule.

    Attributes:
        name: Its name.
        query: True as long as it gives anything.
        lasting: For how long, before anybody is told.
        severity: "page" wakes somebody, "ticket" can wait until the morning.
        summary: What is wrong, with Prometheus' templates.
        remedy: What to do.
    """

    name: str
    query: str
    lasting: str
    severity: str
    summary: str
    remedy: str


def _ingest(name: str, window: str = "") -> str:
    return f'ray_somaflow_ingest_{name}{{lake=~"$lake"}}{window}'


def _train(name: str, window: str = "", more: str = "") -> str:
    return f'ray_somaflow_train_{name}{{run=~"$run"{more}}}{window}'


def _steps(name: str) -> str:
    """A figure of a run, whatever process showed it."""
    return f"max by (run) ({_train(name)})"


def _share_of_time(parts: str) -> str:
    """Share of the steps' seconds that went to some parts."""
    some, whole = _train("seconds_total", WINDOW, f', part=~"{parts}"'), _train("seconds_total", WINDOW)
    return f"sum by (run) (rate({some})) / sum by (run) (rate({whole}))"


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate(somaflow_serve_request_seconds_bucket{WINDOW})))"


def _appeared(counter: str, window: str) -> str:
    """A counter that grew, or that came into being: Ray shows none before its first event."""
    return f"(increase({counter}[{window}]) > 0) or ({counter} unless {counter} offset {window})"


_CACHE, _FOUND = "cache_blocks_total", ', found="yes"'

DASHBOARDS = (
    Dashboard(
        "ingest",
        "somaflow: ingestion",
        "For the data engineer: does the lake fill, how fast, and what did not come in?",
        ("lake", "ray_somaflow_ingest_last_task_unixtime"),
        {"rayDefaultDashboard": "Ray: tasks, memory, nodes"},
        (
            Panel(
                "Cells a second",
                {f"sum by (measurement) (rate({_ingest('cells_total', WINDOW)}))": "{{measurement}}"},
                "suffix: cells/s",
                "Speed of writing; 0 while datasets are only checked. Less than usual: do tasks wait for CPUs (Ray's "
                "dashboard), or is the source slow? More workers help as long as the source keeps up.",
            ),
            Panel(
                "Non-zeros a second",
                {f"sum by (measurement) (rate({_ingest('nonzeros_total', WINDOW)}))": "{{measurement}}"},
                "suffix: values/s",
                "The work itself: deep cells come slower, at the same values a second.",
            ),
            Panel(
                "Datasets left",
                {f"max by (lake) ({_ingest('datasets_left')})": "{{lake}}"},
                "none",
                "The backlog: what has not come to its end. It may rise when a source is opened and holds several.",
            ),
            Panel(
                "Datasets that ended, by how",
                {f"sum by (state) ({_ingest('datasets_total')})": "{{state}}"},
                "none",
                "Refused: their content is not what it claims; read the report below the lake's somaflow/reports. "
                "Failed: lake, worker or lock; the same command goes on.",
                HALF,
            ),
            Panel(
                "Time to go, as it went for ten minutes",
                {
                    f"max by (lake) ({_ingest('datasets_left')}) / "
                    f"sum by (lake) (rate({_ingest('datasets_total', '[10m]')}))": "{{lake}}"
                },
                "s",
                "Datasets left over datasets that end a second: rough where sizes differ, and too long at first.",
                HALF // 2,
            ),
            Panel(
                "Since a task ended",
                {f"time() - max by (lake) ({_ingest('last_task_unixtime')})": "{{lake}}"},
                "s",
                "Rises without end where nothing moves: a source that does not answer, or a cluster without CPUs.",
                HALF // 2,
            ),
        ),
    ),
    Dashboard(
        "train",
        "somaflow: training",
        "For the ML engineer: does the run learn, does it use what it has, and what is lost if it dies now?",
        ("run", "ray_somaflow_train_steps_wanted"),
        {"rayTrainDashboard": "Ray: training workers", "rayDefaultDashboard": "Ray: GPUs, memory, nodes"},
        (
            Panel(
                "Loss",
                {_steps("loss"): "{{run}}", _steps("loss_test"): "{{run}} held out"},
                "none",
                "Held out is measured every evaluate_every steps. It rises while the other falls: the run overfits.",
            ),
            Panel(
                "Steps done",
                {f"{_steps('step')} / {_steps('steps_wanted')}": "{{run}}"},
                "percentunit",
                "A step back is a restart: the run went on from its last state.",
                most=1,
            ),
            Panel(
                "Tokens a second",
                {f"sum by (run) (rate({_train('tokens_total', WINDOW)}))": "{{run}}"},
                "suffix: tokens/s",
                "Of all workers, steps that are taken again among them.",
            ),
            Panel(
                "Goodput",
                {_steps("goodput_ratio"): "{{run}}"},
                "percentunit",
                "Share of the time since the first step in which kept steps learned. Falls with waiting for data, "
                "saving, evaluation, and what restarts threw away.",
                most=1,
            ),
            Panel(
                "MFU",
                {_steps("mfu"): "{{run}}"},
                "percentunit",
                "Share of the GPUs' arithmetic that is used; nothing where their peak is not known, as on CPUs. Low: "
                "larger data.micro_batch, compile, bf16.",
                most=1,
            ),
            Panel(
                "Where the time goes",
                {
                    f"sum by (run, part) (rate({_train('seconds_total', WINDOW)})) / on (run) group_left () "
                    f"sum by (run) (rate({_train('seconds_total', WINDOW)}))": "{{run}} {{part}}"
                },
                "percentunit",
                "Parts of a step's seconds, as metrics.jsonl names them.",
                most=1,
                stacked=True,
            ),
            Panel(
                "Waiting for data",
                {_share_of_time("data_wait_s"): "{{run}}"},
                "percentunit",
                "Should be near 0. Else the stream is too slow: data.cache, more lanes, a store that is nearer.",
                most=1,
            ),
            Panel(
                "Blocks found in the local cache",
                {
                    f"(sum by (run) (rate({_train(_CACHE, WINDOW, _FOUND)})) or "
                    f"0 * sum by (run) (rate({_train(_CACHE, WINDOW)}))) / "
                    f"sum by (run) (rate({_train(_CACHE, WINDOW)}))": "{{run}}"
                },
                "percentunit",
                "0 in the first epoch, then 1; less where data.cache_gb is too small. Nothing without data.cache.",
                most=1,
            ),
            Panel(
                "Mixing",
                {_steps("entropy_ratio"): "{{run}}"},
                "percentunit",
                "Entropy of the datasets in a batch over what chance gives: 1 is an ideal shuffle. Low: larger "
                "data.window, smaller data.block.",
                most=1,
            ),
            Panel(
                "Steps since the last state",
                {
                    f"{_steps('step')} - {_steps('checkpoint_step')}": "{{run}}",
                    _steps("checkpoint_every_steps"): "{{run}} asked",
                },
                "none",
                "What is lost if the run dies now. Above what was asked: states are written slower than steps taken.",
                HALF // 2,
            ),
            Panel(
                "Since the last state, since the last step",
                {
                    f"time() - {_steps('checkpoint_unixtime')}": "{{run}} state",
                    f"time() - {_steps('last_step_unixtime')}": "{{run}} step",
                },
                "s",
                "Rises without end where a worker hangs.",
                HALF // 2,
            ),
            Panel(
                "Norm of the gradient",
                {_steps("grad_norm"): "{{run}}"},
                "none",
                "Before it is clipped. Where it jumps again and again: lower optim.lr.",
                HALF // 2,
            ),
            Panel(
                "Learning rate",
                {_steps("lr"): "{{run}}"},
                "none",
                "Warms up, then falls as optim.schedule says.",
                HALF // 2,
            ),
        ),
    ),
    Dashboard(
        "serve",
        "somaflow: serving",
        "For the owner of an application: do requests get answers, how soon, and from which checkpoint?",
        ("", ""),
        {"rayServeDashboard": "Ray: proxies and replicas", "rayDefaultDashboard": "Ray: GPUs, memory, nodes"},
        (
            Panel(
                "Requests a second, by status",
                {f"sum by (status) (rate(somaflow_serve_requests_total{WINDOW}))": "{{status}}"},
                "reqps",
                "4xx are the clients' (429: no room), 5xx the server's, 499 left before their answer.",
            ),
            Panel(
                "Seconds to answer",
                {_quantile(0.5): "half", _quantile(0.95): "95 %", _quantile(0.99): "99 %"},
                "s",
                "From the first byte of a request to the last of its reply. Rises with what waits.",
            ),
            Panel(
                "Refused for want of room",
                {
                    f'sum(rate(somaflow_serve_requests_total{{status="429"}}{WINDOW}))': "at the ingress",
                    f"sum(rate(ray_somaflow_serve_refused_at_proxy_total{WINDOW}))": "at a proxy",
                },
                "reqps",
                "Clients should wait and try again (serve.client does). Lasting: more copies (scaling.most).",
            ),
            Panel(
                "Tokens that wait",
                {"max by (replica) (somaflow_serve_queue_tokens)": "{{replica}}"},
                "none",
                "At batching.queue_tokens, or at batching.queue_s of them, requests are refused.",
            ),
            Panel(
                "Batch fill",
                {"max by (replica) (somaflow_serve_batch_fill)": "{{replica}}"},
                "percentunit",
                "Mean since the copy began. Low with a queue: batching.piece_tokens does not fit the requests.",
                most=1,
            ),
            Panel(
                "Tokens a second",
                {"max by (replica) (somaflow_serve_tokens_per_second)": "{{replica}}"},
                "suffix: tokens/s",
                "Speed of the last batches of each copy of the model.",
            ),
            Panel(
                "Copies that answer",
                {
                    "min(somaflow_serve_ready)": "ready",
                    "count(max by (replica) (somaflow_serve_queue_tokens))": "heard of",
                },
                "none",
                "Ready is 0 where no copy of the model answers. A scrape hears of one copy; one that none hears of is "
                "forgotten after two minutes.",
            ),
            Panel(
                "Checkpoints",
                {
                    "max by (replica) (somaflow_serve_swaps)": "{{replica}} took over",
                    "max by (replica) (somaflow_serve_swaps_refused)": "{{replica}} refused",
                },
                "none",
                "A refused one leaves the one before in place; the log of the copy says why.",
            ),
            Panel(
                "Coverage",
                {
                    f"sum by (measurement) (rate(somaflow_serve_coverage_sum{WINDOW})) / "
                    f"sum by (measurement) (rate(somaflow_serve_coverage_count{WINDOW}))": "{{measurement}}"
                },
                "percentunit",
                "Share of requests' counts that the model knows. Low: other identifiers, species or assay.",
                most=1,
            ),
            Panel(
                "Requests inside",
                {
                    "sum(somaflow_serve_requests_inside)": "inside",
                    "sum(max by (replica) (somaflow_serve_queue_requests))": "waiting for the model",
                },
                "none",
                "Many inside and few that wait for the model: reading or sending is slow.",
                HALF // 2,
            ),
            Panel(
                "Cells a second",
                {f"sum(rate(somaflow_serve_cells_total{WINDOW}))": "cells"},
                "suffix: cells/s",
                "Cells that requests brought.",
                HALF // 2,
            ),
            Panel(
                "Batches a second",
                {f"sum by (replica) (rate(somaflow_serve_batches{WINDOW}))": "{{replica}}"},
                "ops",
                "Forward passes. None, and tokens wait: the copy hangs.",
                HALF // 2,
            ),
            Panel(
                "Poorly covered requests",
                {
                    f'sum by (measurement) (rate(somaflow_serve_coverage_bucket{{le="0.5"}}{WINDOW})) / '
                    f"sum by (measurement) (rate(somaflow_serve_coverage_count{WINDOW}))": "{{measurement}}"
                },
                "percentunit",
                "Share of requests of whose counts the model knows half or less.",
                HALF // 2,
                most=1,
            ),
        ),
    ),
)

_LEFT, _ENDED = "ray_somaflow_ingest_datasets_left", 'ray_somaflow_ingest_datasets_total{{state="{0}"}}'
_STEP, _WANTED = "ray_somaflow_train_step", "ray_somaflow_train_steps_wanted"
_USEFUL, _UP = "ray_somaflow_train_useful_seconds", 'up{job="somaflow-serve"}'
_STATUS = "sum(rate(somaflow_serve_requests_total{{status=~'{0}'}}[5m])) / sum(rate(somaflow_serve_requests_total[5m]))"

ALERTS = {
    "ingest": (
        Alert(
            "IngestStuck",
            f"(time() - max by (lake) (ray_somaflow_ingest_last_task_unixtime) > 1800) and max by (lake) ({_LEFT}) > 0",
            "5m",
            "ticket",
            "{{ $labels.lake }}: no task has ended for {{ $value | humanizeDuration }}",
            "Look at Ray's dashboard: tasks that wait for CPUs, or one that reads a source which does not answer.",
        ),
        Alert(
            "IngestEndedEarly",
            f"min by (lake) (last_over_time({_LEFT}[15m])) > 0 unless max by (lake) ({_LEFT})",
            "1m",
            "ticket",
            "{{ $labels.lake }}: the ingestion is gone and {{ $value }} datasets were left",
            "Start the same command again: it goes on where it stopped.",
        ),
        Alert(
            "IngestFailing",
            f"sum by (lake) ({_appeared(_ENDED.format('failed'), '30m')}) > 0",
            "0m",
            "ticket",
            "{{ $labels.lake }}: a dataset could not be written",
            "The report below somaflow/reports says why: storage, a lock, memory. Then run it again.",
        ),
        Alert(
            "IngestRefusing",
            f"sum by (lake) ({_appeared(_ENDED.format('refused'), '30m')}) > 0",
            "0m",
            "ticket",
            "{{ $labels.lake }}: a dataset was refused for what it holds",
            "The report below somaflow/reports names all of its problems and what would do.",
        ),
    ),
    "train": (
        Alert(
            "TrainNoCheckpoint",
            f"(max by (run) ({_STEP}) - max by (run) (ray_somaflow_train_checkpoint_step)) / "
            "max by (run) (ray_somaflow_train_checkpoint_every_steps) > 3",
            "5m",
            "page",
            "{{ $labels.run }}: no state for {{ $value | humanize }} times the steps that should lie between two",
            "Is the run's folder writable and not full? Else states are written slower than steps are taken: raise "
            "checkpoint_every.",
        ),
        Alert(
            "TrainStalled",
            f"(time() - max by (run) (ray_somaflow_train_last_step_unixtime) > 900) and "
            f"max by (run) ({_STEP}) < max by (run) ({_WANTED})",
            "1m",
            "page",
            "{{ $labels.run }}: no step has ended for {{ $value | humanizeDuration }}",
            "A worker hangs or a link is cut: collective_timeout_s ends it and the run goes on from its last state.",
        ),
        Alert(
            "TrainEndedEarly",
            f"(max by (run) (last_over_time({_WANTED}[15m])) - max by (run) (last_over_time({_STEP}[15m])) > 0) "
            f"unless max by (run) ({_STEP})",
            "5m",
            "page",
            "{{ $labels.run }}: nothing trains and {{ $value }} steps are left",
            "Start the same command again: it goes on from its last state.",
        ),
        Alert(
            "TrainWaitsForData",
            'sum by (run) (rate(ray_somaflow_train_seconds_total{part="data_wait_s"}[10m])) / '
            "sum by (run) (rate(ray_somaflow_train_seconds_total[10m])) > 0.2",
            "15m",
            "ticket",
            "{{ $labels.run }}: {{ $value | humanizePercentage }} of the time waits for data",
            "data.cache on a local disk, more data.lanes, a store that is nearer.",
        ),
        Alert(
            "TrainGoodputLow",
            f"(max by (run) (last_over_time({_USEFUL}[15m])) - "
            f"max by (run) (last_over_time({_USEFUL}[15m] offset 30m))) / 1800 < 0.7",
            "1h",
            "ticket",
            "{{ $labels.run }}: only {{ $value | humanizePercentage }} of the last half hour made the model better",
            "Where does the time go? Where it is no part of a step, restarts threw steps away: lower checkpoint_every.",
        ),
        Alert(
            "TrainBadlyMixed",
            "max by (run) (ray_somaflow_train_entropy_ratio) < 0.9",
            "30m",
            "ticket",
            "{{ $labels.run }}: batches have {{ $value | humanizePercentage }} of the entropy of well mixed ones",
            "A larger data.window or a smaller data.block; this is another run.",
        ),
    ),
    "serve": (
        Alert(
            "ServeDown",
            f"max by (job) ({_UP}) == 0 or (max by (job) (last_over_time({_UP}[30m])) unless max by (job) ({_UP}))",
            "1m",
            "page",
            "{{ $labels.job }}: no server answers, or none is there any more",
            "Look at the server's log and at Ray Serve's dashboard. It is said for half an hour after the last server "
            "has gone, also where it was taken down on purpose: silence it then.",
        ),
        Alert(
            "ServeNoCopyReady",
            "max by (job) (somaflow_serve_ready) == 0",
            "2m",
            "page",
            "{{ $labels.job }}: no copy of the model answers",
            "It loads still, or its checkpoint is refused: the copy's log says why. Requests are answered 503.",
        ),
        Alert(
            "ServeFailing",
            f"{_STATUS.format('5..')} > 0.01",
            "5m",
            "page",
            "{{ $value | humanizePercentage }} of requests are answered 5xx",
            "Look at the server's log.",
        ),
        Alert(
            "ServeRefusing",
            f"{_STATUS.format('429')} > 0.05",
            "10m",
            "ticket",
            "{{ $value | humanizePercentage }} of requests are refused for want of room",
            "More copies (scaling.most) or GPUs; a client that does not wait as Retry-After says.",
        ),
        Alert(
            "ServeRefusingAtProxy",
            "sum(rate(ray_somaflow_serve_refused_at_proxy_total[5m])) > 1",
            "10m",
            "ticket",
            "Proxies turn away {{ $value | humanize }} requests a second",
            "As for ServeRefusing.",
        ),
        Alert(
            "ServeSlow",
            "histogram_quantile(0.95, sum by (le) (rate(somaflow_serve_request_seconds_bucket[5m]))) > 10",
            "10m",
            "ticket",
            "One request of 20 takes more than {{ $value | humanizeDuration }}",
            "Look at tokens that wait and at batch fill; lower batching.queue_s refuses sooner in place of waiting.",
        ),
        Alert(
            "ServeReloadRefused",
            "max by (replica) (increase(somaflow_serve_swaps_refused[15m])) > 0",
            "0m",
            "page",
            "{{ $labels.replica }}: a checkpoint was refused, the one before still answers",
            "The copy's log says why; mend the checkpoint and give it again.",
        ),
        Alert(
            "ServeCoverageLow",
            "sum by (measurement) (rate(somaflow_serve_coverage_sum[30m])) / "
            "sum by (measurement) (rate(somaflow_serve_coverage_count[30m])) < 0.5",
            "30m",
            "ticket",
            "{{ $labels.measurement }}: the model knows only {{ $value | humanizePercentage }} of requests' counts",
            "Clients send other identifiers, another species or another assay than the model was trained on.",
        ),
    ),
    "ray": (
        Alert(
            "RayNodeSilent",
            'up{job="ray"} == 0',
            "5m",
            "ticket",
            "{{ $labels.instance }}: this node's metrics cannot be read",
            "Is the node there still? What runs on it cannot be seen.",
        ),
    ),
}
"""Group to rules."""


def dashboard(made: Dashboard) -> dict[str, Any]:
    """Return a dashboard as Grafana's JSON."""
    label, metric = made.choice
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}
    ]
    if label:
        query = {"query": f"label_values({metric}, {label})", "refId": "choice"}
        chosen = {"includeAll": True, "multi": True, "allValue": ".+", "refresh": 2, "sort": 1}
        everything = {"text": ["All"], "value": ["$__all"], "selected": True}
        variables.append(
            {
                "name": label,
                "label": label,
                "type": "query",
                "datasource": source,
                "query": query,
                "current": everything,
            }
            | chosen
        )
    return {
        "uid": f"somaflow-{made.name}",
        "title": made.title,
        "description": made.role,
        "tags": ["somaflow"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [
            {"title": title, "type": "link", "url": f"/d/{uid}", "keepTime": True, "targetBlank": True}
            for uid, title in made.beside.items()
        ],
        "templating": {"list": variables},
        "panels": _laid_out(made.panels, source),
    }


def _laid_out(panels: tuple[Panel, ...], source: dict[str, str]) -> list[dict[str, Any]]:
    """Place panels side by side, row after row."""
    x = y = 0
    made = []
    for number, panel in enumerate(panels, 1):
        if x + panel.width > 2 * HALF:
            x, y = 0, y + HEIGHT
        place = {"x": x, "y": y, "w": panel.width, "h": HEIGHT}
        made.append({"id": number, "gridPos": place, "datasource": source} | _picture(panel, source))
        x += panel.width
    return made


def _picture(panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    drawn = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 5, "showPoints": "never", "spanNulls": False}
    drawn["stacking"] = {"mode": "normal" if panel.stacked else "none"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": drawn}
    if panel.title in ("Loss", "Checkpoints"):
        del defaults["min"]
    if panel.most is not None:
        defaults["max"] = panel.most
    targets = [
        {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "datasource": source}
        for number, (query, legend) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.tells,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def rules() -> dict[str, Any]:
    """Return all alerts as a rule file of Prometheus."""
    return {
        "groups": [
            {
                "name": f"somaflow-{group}",
                "rules": [
                    {
                        "alert": f"Somaflow{alert.name}",
                        "expr": alert.query,
                        "for": alert.lasting,
                        "labels": {"severity": alert.severity, "role": group},
                        "annotations": {"summary": alert.summary, "description": alert.remedy},
                    }
                    for alert in alerts
                ],
            }
            for group, alerts in ALERTS.items()
        ]
    }


FOR_OPERATOR = "../kubernetes/base/alerts.yaml"
"""The same alerts, for the Prometheus operator on Kubernetes."""


def files() -> dict[str, str]:
    """Return what is made: path below this folder to text."""
    made = {f"dashboards/{one.name}.json": json.dumps(dashboard(one), indent=1) + "\n" for one in DASHBOARDS}
    head = "# Made by infra/monitoring/make.py: change it there.\n"
    alerts = rules()
    rule = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "somaflow"}}
    for name, values in (("alerts.yaml", alerts), (FOR_OPERATOR, rule | {"spec": alerts})):
        made[name] = head + yaml.safe_dump(values, sort_keys=False, width=120, allow_unicode=True)
    return made


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text, encoding="utf-8")
        print(HERE / name)
