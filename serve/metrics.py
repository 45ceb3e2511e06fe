"""This module counts what an ingress does, and tells it to Prometheus at ``/metrics``, beside what its models say.

Names begin with ``somaflow_serve_``. An ingress counts for itself; of the copies of the model it tells what each said
when it last answered a scrape, so with several copies each is heard of every few scrapes. No label comes from a
client: routes are those of the app, other addresses are "other".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.batcher import Load
from serve.decode import Decoded

T = TypeVar("T")
FORGOTTEN_S = 120
"""Seconds after which a copy of the model that no scrape hears of is told no more."""
METRICS = {
    "somaflow_serve_requests_total": ("counter", "Requests by route and status.", ("route", "status")),
    "somaflow_serve_request_seconds": ("histogram", "From a request's first byte to its reply's last.", ("route",)),
    "somaflow_serve_requests_inside": ("gauge", "Requests that wait for their answer.", ()),
    "somaflow_serve_cells_total": ("counter", "Cells that were read from requests.", ()),
    "somaflow_serve_coverage": ("histogram", "Share of a request's counts that the model knows.", ("measurement",)),
    "somaflow_serve_ready": ("gauge", "1 where a copy of the model answered this scrape, else 0.", ()),
    "somaflow_serve_queue_tokens": ("gauge", "Tokens that wait.", ("replica",)),
    "somaflow_serve_queue_requests": ("gauge", "Requests that wait.", ("replica",)),
    "somaflow_serve_tokens_per_second": ("gauge", "Speed of the last batches.", ("replica",)),
    "somaflow_serve_batches": ("gauge", "Batches since the copy began.", ("replica",)),
    "somaflow_serve_batch_fill": ("gauge", "Mean share of a batch's budget.", ("replica",)),
    "somaflow_serve_swaps": ("gauge", "Checkpoints that took over, since the copy began.", ("replica",)),
    "somaflow_serve_swaps_refused": ("gauge", "Checkpoints that did not, since the copy began.", ("replica",)),
}
"""Name to kind, meaning and labels. ``infra/monitoring/check.py`` reads it as it stands here: plain values only."""
_TOLD = {
    "waiting_tokens": "queue_tokens",
    "waiting_jobs": "queue_requests",
    "tokens_per_s": "tokens_per_second",
    "batches": "batches",
    "fill": "batch_fill",
    "swaps": "swaps",
    "swaps_refused": "swaps_refused",
}
"""What a copy of the model says of itself: field of ``Load`` to the metric's name."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


class Metrics:
    """The counters of one ingress."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def made(kind: Callable[..., T], name: str, **more: Any) -> T:
            _, meaning, labels = METRICS[f"somaflow_serve_{name}"]
            return kind(f"somaflow_serve_{name}", meaning, labels, registry=registry, **more)

        self.requests = made(Counter, "requests_total")
        self.seconds = made(Histogram, "request_seconds", buckets=_SECONDS)
        self.inside = made(Gauge, "requests_inside")
        self.cells = made(Counter, "cells_total")
        self.coverage = made(Histogram, "coverage", buckets=_SHARES)
        self.ready = made(Gauge, "ready")
        self._gauges = {told: made(Gauge, name) for told, name in _TOLD.items()}
        self._heard: dict[str, float] = {}
        self._answered = False

    def read(self, decoded: Decoded) -> None:
        """Count cells that a request brought."""
        self.cells.inc(decoded.cells.n_cells)
        for name, part in decoded.coverage.items():
            self.coverage.labels(name).observe(part.share_of_counts)

    def hear(self, load: Load) -> None:
        """Take down what a copy of the model says of itself."""
        for told, gauge in self._gauges.items():
            gauge.labels(load.replica).set(getattr(load, told))
        self._answered = True
        now = time.monotonic()
        self._heard[load.replica] = now
        for replica in [name for name, when in self._heard.items() if now - when > FORGOTTEN_S]:
            del self._heard[replica]
            for gauge in self._gauges.values():
                gauge.remove(replica)

    def text(self) -> bytes:
        """Write all in Prometheus's text format; a copy that was heard of since the text before makes it ready."""
        self.ready.set(self._answered)
        self._answered = False
        return generate_latest(self._registry)


class Metered:
    """ASGI middleware that counts each request with its status and time.

    Args:
        app: What gets the requests.
        metrics: What counts.
        known: Paths that are told by name also where a request is refused on its way to them.
        clock: Tells seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        known: Collection[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app, self._metrics, self._known, self._clock = app, metrics, known, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begin = 499, self._clock()  # the client left before it was answered

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.inside.inc()
        try:
            await self._app(scope, receive, counted)
        finally:
            self._metrics.inside.dec()
            route = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in self._known else "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(self._clock() - begin)
