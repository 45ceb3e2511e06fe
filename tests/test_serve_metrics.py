"""What Prometheus is told: requests with their statuses, cells, coverage, and what the model says of itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_predictor import FakePredictor
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from serve import metrics as metrics_module
from serve.access import Purse, _digest
from serve.app import make_app
from serve.batcher import Load
from serve.errors import Unavailable
from serve.metrics import Metrics
from serve.replica import Replica
from serve.settings import Batching, Limits, ServeSettings

CELLS = {"RNA": [{"G0": 1, "G1": 3}, {"G2": 2, "NOPE": 2}]}


@pytest.fixture
def replica() -> Iterator[Replica]:
    replica = Replica(ServeSettings(checkpoint="fake", batching=Batching(budget_tokens=64)), lambda _: FakePredictor())
    yield replica
    replica.close()


def told(text: str) -> dict[tuple[str, ...], float]:
    """Read the text; name and labels' values to value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_cells_coverage_and_batches_are_told(replica: Replica) -> None:
    with TestClient(make_app(replica, Limits())) as client:
        for _ in range(3):
            assert client.post("/v1/embed", json={"counts": CELLS}).status_code == 200
        assert client.post("/v1/embed", json={"counts": {"RNA": [{"G0": -1}]}}).status_code == 422
        assert client.get("/v1/nothing/<script>").status_code == 404
        found = told(client.get("/metrics").text)
    assert found["somaflow_serve_requests_total", "/v1/embed", "200"] == 3
    assert found["somaflow_serve_requests_total", "/v1/embed", "422"] == 1
    assert found["somaflow_serve_requests_total", "other", "404"] == 1
    assert found["somaflow_serve_request_seconds_count", "/v1/embed"] == 4
    assert found["somaflow_serve_cells_total",] == 6
    assert found["somaflow_serve_coverage_count", "RNA"] == 3
    assert found["somaflow_serve_coverage_sum", "RNA"] == pytest.approx(3 * 6 / 8)
    assert found["somaflow_serve_batches", ""] == 3
    assert 0 < found["somaflow_serve_batch_fill", ""] <= 1
    assert found["somaflow_serve_queue_tokens", ""] == 0
    assert found["somaflow_serve_requests_inside",] == 1, "the scrape itself"


def test_a_stranger_may_scrape_but_not_ask_and_is_counted(replica: Replica) -> None:
    purses = {"team": Purse(_digest("x" * 24), 0)}
    with TestClient(make_app(replica, Limits(), purses)) as client:
        assert client.post("/v1/embed", json={"counts": CELLS}).status_code == 401
        found = told(client.get("/metrics").text)
    assert found["somaflow_serve_requests_total", "/v1/embed", "401"] == 1


def test_swaps_are_counted_and_a_model_that_is_gone_hides_nothing_else(replica: Replica) -> None:
    replica.swap("fake")
    with TestClient(make_app(replica, Limits())) as client:
        found = told(client.get("/metrics").text)
        assert (found["somaflow_serve_swaps", ""], found["somaflow_serve_ready",]) == (1, 1)
        replica.close()
        assert client.get("/metrics").status_code == 200


def test_a_model_that_does_not_answer_is_not_ready_and_its_figures_stay(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone() -> Load:
        raise Unavailable("no copy of the model answers")

    with TestClient(make_app(replica, Limits())) as client:
        assert told(client.get("/metrics").text)["somaflow_serve_ready",] == 1
        with monkeypatch.context() as patched:
            patched.setattr(replica, "load", gone)
            found = told(client.get("/metrics").text)
        assert (found["somaflow_serve_ready",], found["somaflow_serve_swaps", ""]) == (0, 0)
        assert told(client.get("/metrics").text)["somaflow_serve_ready",] == 1


def test_copies_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    metrics.hear(Load(1, 1, 1, 1, 1.0, replica="a"))
    metrics.hear(Load(2, 1, 1, 1, 1.0, replica="b"))
    assert told(metrics.text().decode())["somaflow_serve_queue_tokens", "a"] == 1
    monkeypatch.setattr(metrics_module, "FORGOTTEN_S", -1)
    metrics.hear(Load(3, 1, 1, 1, 1.0, replica="b"))
    found = told(metrics.text().decode())
    assert ("somaflow_serve_queue_tokens", "a") not in found
