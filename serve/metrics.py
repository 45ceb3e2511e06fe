"""This module counts what an ingress does, and tells it to Prometheus at ``/metrics``, beside what its models say.

Names begin with ``somaflow_serve_``. An ingress counts for itself; of the copies of the model it tells what each said
when it last answered a scrape, so with several copies each is heard of every few scrapes. No label comes from a
client: routes are those of the app, other addresses are "other".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.batcher import Load
from serve.decode import Decoded

FORGOTTEN_S = 120
"""Seconds after which a copy of the model that no scrape hears of is told no more."""
_TOLD = {
    "waiting_tokens": ("queue_tokens", "Tokens that wait."),
    "waiting_jobs": ("queue_requests", "Requests that wait."),
    "tokens_per_s": ("tokens_per_second", "Speed of the last batches."),
    "batches": ("batches", "Batches since the copy began."),
    "fill": ("batch_fill", "Mean share of a batch's budget."),
    "swaps": ("swaps", "Checkpoints that took over."),
    "swaps_refused": ("swaps_refused", "Checkpoints that did not."),
}
"""What a copy of the model says of itself: field of ``Load`` to the metric's name and help."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


class Metrics:
    """The counters of one ingress."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "somaflow_serve_requests", "Requests by route and status.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "somaflow_serve_request_seconds",
            "From a request's first byte to its reply's last.",
            ("route",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.inside = Gauge("somaflow_serve_requests_inside", "Requests that wait for their answer.", registry=registry)
        self.cells = Counter("somaflow_serve_cells", "Cells that were read from requests.", registry=registry)
        self.coverage = Histogram(
            "somaflow_serve_coverage",
            "Share of a request's counts that the model knows.",
            ("measurement",),
            registry=registry,
            buckets=_SHARES,
        )
        self._gauges = {
            told: Gauge(f"somaflow_serve_{name}", what, ("replica",), registry=registry)
            for told, (name, what) in _TOLD.items()
        }
        self._heard: dict[str, float] = {}

    def read(self, decoded: Decoded) -> None:
        """Count cells that a request brought."""
        self.cells.inc(decoded.cells.n_cells)
        for name, part in decoded.coverage.items():
            self.coverage.labels(name).observe(part.share_of_counts)

    def hear(self, load: Load) -> None:
        """Take down what a copy of the model says of itself."""
        for told, gauge in self._gauges.items():
            gauge.labels(load.replica).set(getattr(load, told))
        now = time.monotonic()
        self._heard[load.replica] = now
        for replica in [name for name, when in self._heard.items() if now - when > FORGOTTEN_S]:
            del self._heard[replica]
            for gauge in self._gauges.values():
                gauge.remove(replica)

    def text(self) -> bytes:
        """Write all in Prometheus's text format."""
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
