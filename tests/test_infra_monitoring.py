"""Dashboards and alerts ask for what is there: checked as files, and against what real runs show to Prometheus."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_predictor
import httpx
import pytest
import yaml
from fake_predictor import FakePredictor
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from ingest.job import JobSettings, SourceSettings
from serve.app import make_app
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings
from store.settings import parse_settings
from store.snapshot import SnapshotSettings, create_snapshot
from train.record import PARTS
from train.settings import RunSettings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "infra" / "monitoring"
SAID_BY_PROMETHEUS = {"up"}
Scraped = dict[str, dict[str, float]]
"""Series (name and labels) to value, by name."""


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    return importlib.import_module("infra.monitoring.check")


@pytest.fixture
def found(checker: ModuleType) -> Callable[[dict[str, str]], list[str]]:
    """Tell what is wrong with files, but that they are not what is made."""
    page = (ROOT / checker.PAGE).read_text()

    def look(files: dict[str, str]) -> list[str]:
        return [line for line in checker.check(files, page, checker.declared()) if "is not what make.py" not in line]

    return look


def queries(files: dict[str, str]) -> list[str]:
    pages = [json.loads(text) for name, text in files.items() if name.endswith(".json")]
    asked = [target["expr"] for page in pages for panel in page["panels"] for target in panel["targets"]]
    rules = yaml.safe_load(files["alerts.yaml"])
    return asked + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_dashboards_and_alerts_are_as_they_should_be(checker: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main() == 0, capsys.readouterr().out


def test_the_tables_that_are_read_are_those_that_the_code_uses(checker: ModuleType) -> None:
    from ingest.gauges import METRICS as INGEST
    from serve.door import METRICS as DOOR
    from serve.metrics import METRICS as SERVE
    from train.gauges import METRICS as TRAIN

    names = [f"ray_{name}" for name in (*INGEST, *TRAIN, *DOOR)] + list(SERVE)
    assert list(checker.declared()) == names


def first_panel(page: Any) -> Any:
    return page["panels"][0]


def query_of(page: Any, query: str) -> None:
    first_panel(page)["targets"][0]["expr"] = query


PLANTED: list[tuple[Callable[[Any], object], str]] = [
    (lambda page: query_of(page, "sum(rate(ray_somaflow_ingest_cels_total[1m]))"), "declares no metric"),
    (lambda page: query_of(page, "sum by (lakes) (ray_somaflow_ingest_cells_total)"), "has the label 'lakes'"),
    (lambda page: query_of(page, 'ray_somaflow_ingest_cells_total{run="a"}'), "has no label 'run'"),
    (lambda page: query_of(page, "rate(ray_somaflow_ingest_datasets_left[1m])"), "which is a gauge"),
    (lambda page: query_of(page, "rat(ray_somaflow_ingest_cells_total[1m])"), r"no function rat\(\)"),
    (lambda page: query_of(page, "sum(rate(ray_somaflow_ingest_cells_total[1m])"), "brackets do not close"),
    (lambda page: query_of(page, 'ray_somaflow_ingest_datasets_left{lake=~"$lakes"}'), r"no variable \$lakes"),
    (lambda page: first_panel(page)["targets"][0].update(legendFormat="{{lane}}"), "legend names 'lane'"),
    (lambda page: first_panel(page)["fieldConfig"]["defaults"].update(unit="cells"), "no unit 'cells'"),
    (lambda page: first_panel(page).update(description=""), "does not say what it tells"),
    (lambda page: first_panel(page).update(targets=[]), "asks nothing"),
    (lambda page: first_panel(page).update(title=page["panels"][1]["title"]), "two panels are called"),
    (lambda page: first_panel(page).update(id=2), "two panels have the id 2"),
    (lambda page: first_panel(page)["gridPos"].update(w=9), "overlap"),
    (lambda page: first_panel(page)["gridPos"].update(x=20), "has no place"),
    (lambda page: page.update(uid="somaflow-train"), "two dashboards have the uid"),
    (lambda page: page.update(title="somaflow: training"), "two dashboards have the title"),
    (lambda page: page.pop("templating"), "lacks templating"),
    (lambda page: page["templating"]["list"][1]["query"].update(query="label_values(up, lake)"), "up has no label"),
]


@pytest.mark.parametrize(("plant", "words"), PLANTED, ids=[words for _, words in PLANTED])
def test_an_error_planted_in_a_dashboard_is_found(
    checker: ModuleType, found: Callable[[dict[str, str]], list[str]], plant: Callable[[Any], object], words: str
) -> None:
    files = checker.read()
    page = json.loads(files["dashboards/ingest.json"])
    plant(page)
    files["dashboards/ingest.json"] = json.dumps(page)
    assert any(re.search(words, line) for line in found(files)), found(files)


ALERTS: list[tuple[Callable[[Any], object], str]] = [
    (lambda rules: rules[0].update(expr="somaflow_serve_redy == 0"), "declares no metric somaflow_serve_redy"),
    (lambda rules: rules[0].update(alert=rules[1]["alert"]), "two alerts are called"),
    (lambda rules: rules[0].update({"for": "soon"}), "'soon' is no time"),
    (lambda rules: rules[0]["labels"].update(severity="loud"), "severity is neither"),
    (lambda rules: rules[0]["annotations"].pop("description"), "no description"),
    (lambda rules: rules[0]["annotations"].update(summary="{{ $labels.run }}"), "does not keep"),
    (lambda rules: rules[0].update(expr='up{job="server"} == 0'), "has no job 'server'"),
]


@pytest.mark.parametrize(("plant", "words"), ALERTS, ids=[words for _, words in ALERTS])
def test_an_error_planted_in_an_alert_is_found(
    checker: ModuleType, found: Callable[[dict[str, str]], list[str]], plant: Callable[[Any], object], words: str
) -> None:
    files = checker.read()
    rules = yaml.safe_load(files["alerts.yaml"])
    plant(rules["groups"][0]["rules"])
    files["alerts.yaml"] = yaml.safe_dump(rules)
    assert any(words in line for line in found(files)), found(files)


def test_a_file_that_was_changed_by_hand_and_a_metric_that_is_not_explained_are_found(checker: ModuleType) -> None:
    files, metrics = checker.read(), checker.declared()
    page = (ROOT / checker.PAGE).read_text()
    files["dashboards/serve.json"] += "\n"
    name = "ray_somaflow_train_mfu"
    lines = list(checker.check(files, page.replace(name, f"{name}_of_old"), metrics))
    assert lines[0].startswith("dashboards/serve.json: is not what make.py makes")
    assert lines[1].startswith(f"{checker.PAGE}: lacks the line | `{name}`")
    assert lines[2:] == [f"{checker.PAGE}: explains {name}_of_old, which the code does not declare"]


def test_every_alert_has_a_case_in_which_it_fires(checker: ModuleType) -> None:
    cases = (FOLDER / "alerts_test.yaml").read_text()
    groups = yaml.safe_load(checker.read()["alerts.yaml"])["groups"]
    names = [rule["alert"] for group in groups for rule in group["rules"]]
    assert [name for name in names if f'alertname="{name}"' not in cases] == []


def test_promtool_finds_nothing_wrong_and_every_alert_fires_when_it_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it comes with Prometheus")
    subprocess.run([promtool, "check", "config", str(FOLDER / "prometheus.yml")], check=True)
    subprocess.run([promtool, "test", "rules", str(FOLDER / "alerts_test.yaml")], check=True)


# ------------------------------------------------------------------------------------------------------- real runs
def read(text: str, into: Scraped) -> None:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "somaflow" in sample.name:
                labels = {key: value for key, value in sample.labels.items() if not key[0].isupper()}
                kept = {key: value for key, value in labels.items() if not key.startswith("otel")}
                into.setdefault(sample.name, {})[json.dumps(kept, sort_keys=True)] = sample.value


def read_nodes(into: Scraped) -> None:
    import ray

    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        read(httpx.get(address, timeout=10).text, into)


def read_until(into: Scraped, enough: Callable[[], bool], within_s: float = 60) -> bool:
    """Ray's processes tell their figures once a second here, later where the machine is busy."""
    until = time.monotonic() + within_s
    while not enough() and time.monotonic() < until:
        read_nodes(into)
        time.sleep(0.3)
    return enough()


def value(scraped: Scraped, name: str, **labels: str) -> float:
    """The series of this name with these labels among its own; there is one."""
    (one,) = [v for key, v in scraped[name].items() if labels.items() <= json.loads(key).items()]
    return one


def overload(seen: Callable[[], bool]) -> None:
    """Ask a server more than it lets wait, again and again until what is awaited was seen or time is up.

    Once is not enough where the machine is busy: requests may come so slowly that the proxy lets all of them pass.
    """
    import ray.cloudpickle

    from serve.deploy import serving

    ray.cloudpickle.register_pickle_by_value(fake_predictor)
    batching = Batching(queue_tokens=8)
    settings = ServeSettings(checkpoint="fake", port=free_port(), batching=batching)
    answers: set[int] = set()
    until = time.monotonic() + 120
    with serving(settings, lambda _: FakePredictor(delay_s=0.2)) as url, ThreadPoolExecutor(16) as pool:

        def ask(_: int) -> int:
            body = {"counts": {"RNA": [{"G0": 1}]}}
            return httpx.post(f"{url}/v1/embed", json=body, timeout=30, trust_env=False).status_code

        while True:
            answers |= set(pool.map(ask, range(200)))
            if seen() or time.monotonic() > until:
                break
    ray.cloudpickle.unregister_pickle_by_value(fake_predictor)
    assert answers == {httpx.codes.OK, httpx.codes.TOO_MANY_REQUESTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def scraped(ray_cluster: None, folder: Path) -> Scraped:
    """What Prometheus could read of an ingestion, a run that learns from it, and a server."""
    from ingest.run import run
    from train.gauges import Gauges
    from train.launch import launch

    pages, lake = Scraped(), str(folder / "lake")
    (folder / "broken.h5ad").write_bytes(b"no HDF5")
    sizes = {"genes": 60, "proteins": 4, "peaks": 20}
    given: list[dict[str, Any]] = [
        {"uri": "simulated:", "dataset_id": "first", "simulation": sizes | {"cells": 150}},
        {"uri": "simulated:", "dataset_id": "second", "simulation": sizes | {"cells": 90, "seed": 7}},
        {"uri": str(folder / "broken.h5ad")},
    ]
    outcomes = run(JobSettings(lake=lake, source=tuple(SourceSettings.model_validate(one) for one in given)))
    assert [one.state for one in outcomes] == ["committed", "committed", "refused"]
    left = json.dumps({"lake": lake})
    read_until(pages, lambda: pages.get("ray_somaflow_ingest_datasets_left", {}).get(left) == 0)
    create_snapshot(lake, "s", SnapshotSettings())
    values = {
        "lake": lake,
        "snapshot": "s",
        "output": str(folder / "runs"),
        "name": "watched",
        "steps": 300,
        "workers": 1,
        "checkpoint_every": 50,
        "evaluate_every": 100,
        "trackers": [],
        "model": {"width": 16, "layers": 1, "heads": 2},
        "data": {"global_batch": 24, "block": 64, "window": 2, "tokens": 32, "cache": str(folder / "cache")},
        "optim": {"warmup_steps": 2, "lr": 0.003},
    }
    settings = parse_settings(RunSettings, values, where="test")
    launch(settings, lambda step, loss: read_nodes(pages))
    # what a GPU says: shown from this process, through the same Ray
    row = dict.fromkeys((*PARTS, "cells", "tokens", "operations"), 1.0) | {"mfu": 0.4}
    name = "ray_somaflow_serve_refused_at_proxy_total"
    with Gauges(settings.model_copy(update={"name": "on a GPU"})) as gauges:
        gauges.show(row)
        overload(lambda: read_until(pages, lambda: name in pages, within_s=3))
    replica = Replica(ServeSettings(checkpoint="fake"), lambda _: FakePredictor())
    with TestClient(make_app(replica, Limits())) as client:
        assert client.post("/v1/embed", json={"counts": {"RNA": [{"G0": 1}]}}).status_code == 200
        read(client.get("/metrics").text, pages)
    replica.close()
    return pages


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # ray, at its imports and stop
class TestRealRuns:
    def test_every_metric_that_is_declared_or_asked_for_exists(self, checker: ModuleType, scraped: Scraped) -> None:
        asked = {name for query in queries(checker.read()) for name in checker.used(query)} - SAID_BY_PROMETHEUS
        assert asked - set(scraped) == set()
        assert set(checker.series(checker.declared())) - SAID_BY_PROMETHEUS - set(scraped) == set()

    def test_every_metric_has_the_labels_that_are_declared(self, checker: ModuleType, scraped: Scraped) -> None:
        for name, metric in checker.series(checker.declared()).items():
            if name not in SAID_BY_PROMETHEUS:
                labels = {frozenset(json.loads(key)) for key in scraped[name]}
                assert labels == {frozenset(metric.labels)}, name

    def test_no_metric_is_shown_that_is_not_declared(self, checker: ModuleType, scraped: Scraped) -> None:
        made = {name for name in scraped if not name.endswith("_created")}
        assert made - set(checker.series(checker.declared())) == set()

    def test_an_ingestion_counts_cells_values_and_how_datasets_ended(self, folder: Path, scraped: Scraped) -> None:
        def told(name: str, **labels: str) -> float:
            return value(scraped, f"ray_somaflow_ingest_{name}", lake=str(folder / "lake"), **labels)

        assert told("cells_total", measurement="RNA") == 240
        assert told("nonzeros_total", measurement="RNA") > 240
        assert told("datasets_total", state="committed") == 2
        assert told("datasets_total", state="refused") == 1
        assert told("datasets_left") == 0

    def test_a_run_tells_what_it_does(self, scraped: Scraped) -> None:
        def told(name: str, **labels: str) -> float:
            return value(scraped, f"ray_somaflow_train_{name}", run="watched", **labels)

        assert 0 < told("step") <= told("steps_wanted") == 300
        assert told("operations_total") > 0
        assert told("checkpoint_step") % told("checkpoint_every_steps") == 0
        assert told("checkpoint_unixtime") <= told("last_step_unixtime")
        assert 0 < told("goodput_ratio") < 1
        assert told("useful_seconds") > 0
        assert told("cache_blocks_total", found="yes") > told("cache_blocks_total", found="no") > 0
        shown = {json.loads(key)["part"] for key in scraped["ray_somaflow_train_seconds_total"]}
        assert {"forward_backward_s", "optimizer_s"} <= shown <= set(PARTS)

    def test_a_server_says_whether_a_copy_answers(self, scraped: Scraped) -> None:
        assert value(scraped, "somaflow_serve_ready") == 1
