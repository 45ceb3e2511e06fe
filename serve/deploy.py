"""This module puts the app on Ray Serve: one ingress that speaks HTTP before one or more copies of the model.

::

    client ── HTTP ──> proxy ──> Ingress (limits, decode, encode) ──> ModelReplica (batcher, model) x replicas

``serve.deploy:build`` is the import path for Serve config files; its arguments are :class:`ServeSettings`.
"""

from __future__ import annotations

import asyncio
import io
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import ray.serve
import ray.serve.context
import ray.serve.exceptions
import ray.serve.schema
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve.access import read_tokens
from serve.app import make_app
from serve.atlas import Atlas
from serve.batcher import Load
from serve.decode import Cells
from serve.door import is_question, waited_s
from serve.errors import Unavailable
from serve.explore import Offer
from serve.held import load_predictor
from serve.lone import Lone, free_port
from serve.model import Columns, Description, Question
from serve.replica import Loader, Replica
from serve.settings import ServeSettings, gpus_of
from serve.workers import RayJobs
from store.cluster import cluster_address, not_joined, probe, runtime_env
from store.errors import ConflictError, InputRefused, MissingError, SomaflowError, UsageError
from store.settings import parse_settings

T = TypeVar("T")

APP = "somaflow"
MAX_ONGOING = 1_024
"""Requests inside at once; far above what the batcher's own bound (in tokens) lets in."""
READY_S = 4.0
"""Longest that a copy of the model that lives takes to say so."""
ASKED_S = 15.0
"""The same where a question is waiting for it."""
GRACE_S = 2.0
"""What a request may take longer than its limit before it is given up here."""
PROXY_S = 5.0
"""What it may take longer before Ray Serve gives it up, in a text of its own."""
GONE_S = 20.0
"""Longest until what a driver that died leaves is gone from a cluster, or a port that was let go is free."""


class ModelReplica:
    """A :class:`Replica` in a process of its own."""

    def __init__(self, settings: dict[str, Any], load: Loader) -> None:
        self._settings, self._load, self._checkpoint = settings, load, ""

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take the checkpoint that ``user_config`` names; another one later, without a new process.

        The first must be good. What came of a later one is said at ``/v1/models``: an error would take the copy out of
        service.
        """
        checkpoint = str(config["checkpoint"])
        if not hasattr(self, "_replica"):
            settings = ServeSettings(**self._settings, checkpoint=checkpoint)
            self._replica = await asyncio.to_thread(Replica, settings, self._load)
        elif checkpoint != self._checkpoint:
            await asyncio.to_thread(self._replica.swap, checkpoint)
        self._checkpoint = checkpoint

    async def ready(self) -> str | SomaflowError:
        """See :class:`Replica`."""
        return await _outcome(self._replica.ready())

    async def describe(self) -> Description | SomaflowError:
        """See :class:`Replica`."""
        return await _outcome(self._replica.describe())

    async def ask(self, cells: Cells, question: Question) -> Any:
        """See :class:`Replica`."""
        return await _outcome(self._replica.ask(cells, question))

    async def vectors(self, model_sha256: str, columns: Columns) -> Any:
        """See :class:`Replica`."""
        return await _outcome(self._replica.vectors(model_sha256, columns))

    async def load(self) -> Load:
        """See :class:`Replica`."""
        replica = ray.serve.get_replica_context().replica_id.unique_id
        return replace(await self._replica.load(), replica=replica)

    def check_health(self) -> None:
        """Tell Serve to replace this replica when its worker is gone."""
        self._replica.check()

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.close()


async def _outcome(answer: Awaitable[T]) -> T | SomaflowError:
    """Return an expected error as a value: Ray would log it and wrap it with a stack trace."""
    try:
        return await answer
    except SomaflowError as error:
        return error.with_traceback(None)


class RemoteModel:
    """A deployment handle that looks like a replica.

    A handle waits for as long as no copy is alive. Here whoever waits is told that none is ready: soon where a copy
    that lives answers at once, and before Ray Serve gives a request up where it may take its time.

    Args:
        handle: Of the copies.
        timeout_s: Longest time from acceptance to answer.
    """

    def __init__(self, handle: DeploymentHandle, timeout_s: float) -> None:
        self._handle, self._timeout_s = handle, timeout_s

    async def ready(self) -> str:
        """See :class:`Replica`; a question waits longer: a busy machine, or a copy that just died, is no outage."""
        within_s = min(ASKED_S, self._left_s()) if is_question() else READY_S
        return await _value(self._handle.ready.remote(), within_s)

    async def load(self) -> Load:
        """See :class:`Replica`."""
        return await _value(self._handle.load.remote(), READY_S)

    async def describe(self) -> Description:
        """See :class:`Replica`."""
        await self.ready()  # a description is large, and may take longer than to learn that there is nobody to give it
        return await _value(self._handle.describe.remote(), self._left_s())

    async def ask(self, cells: Cells, question: Question) -> Any:
        """See :class:`Replica`."""
        return await _value(self._handle.ask.remote(cells, question), self._left_s())

    async def vectors(self, model_sha256: str, columns: Columns) -> dict[str, NDArray[np.float32]]:
        """See :class:`Replica`."""
        return await _value(self._handle.vectors.remote(model_sha256, columns), self._left_s())

    def _left_s(self) -> float:
        """Return how long the request at hand may still wait: a little longer than a copy that lives lets it."""
        return max(READY_S, self._timeout_s + GRACE_S - waited_s())


async def _value(response: Any, within_s: float) -> Any:
    try:
        async with asyncio.timeout(within_s):
            outcome = await response
    except TimeoutError:
        response.cancel()  # else it stays in line for the next copy
        raise Unavailable("no copy of the model answers; try again") from None
    except (
        ray.exceptions.RayActorError,
        ray.serve.exceptions.DeploymentUnavailableError,
        ray.serve.exceptions.BackPressureError,
    ):
        raise Unavailable("the model's process is gone or not yet started; try again") from None
    if isinstance(outcome, SomaflowError):
        raise outcome
    return outcome


@ray.serve.ingress()
class Ingress:
    """The HTTP side; checks and decodes requests, so that the model's process only sees good ones."""

    def __init__(self, settings: dict[str, Any], model: DeploymentHandle) -> None:
        self._settings = ServeSettings(**settings, checkpoint="")
        self._model = model

    def __serve_build_asgi_app__(self) -> ASGIApp:
        settings = self._settings
        purses = read_tokens(settings.tokens_file) if settings.tokens_file else None
        jobs = RayJobs(settings.jobs) if settings.lakes else None
        model, atlas = RemoteModel(self._model, settings.limits.timeout_s), Atlas(settings.lakes)
        offer, hosts = Offer.of(settings), settings.names()
        return make_app(model, settings.limits, purses, atlas, jobs, offer, settings.origins, hosts)


def application(settings: ServeSettings, load: Loader = load_predictor) -> ray.serve.Application:
    """Put the two deployments together; ``load`` gives each copy its model."""
    values = settings.model_dump(exclude={"checkpoint"})
    deployment = partial(
        ray.serve.deployment,
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.2,
    )
    scaling = settings.scaling
    copies: dict[str, Any] = {"num_replicas": settings.replicas}
    if scaling.most > settings.replicas:
        copies = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": scaling.most,
                "target_ongoing_requests": scaling.requests,
                "upscale_delay_s": scaling.up_s,
                "downscale_delay_s": scaling.down_s,
            }
        }
    model = deployment(
        ModelReplica,
        **copies,
        user_config={"checkpoint": settings.checkpoint},
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": gpus_of(settings.device)},
    )
    ingress = deployment(Ingress, ray_actor_options={"num_cpus": 0})
    return ingress.bind(values, model.bind(values, load))


def _lacking(settings: ServeSettings) -> str:
    """Say what the cluster has too little of for the copies that are there from the start; nothing if it has enough."""
    there, copies = ray.cluster_resources(), settings.replicas
    needed = {"CPU": copies * settings.threads, "GPU": copies * gpus_of(settings.device)}
    lacks = [f"{there.get(name, 0):g} {name}s of {n}" for name, n in needed.items() if there.get(name, 0) < n]
    return " and ".join(lacks)


def build(args: dict[str, Any]) -> ray.serve.Application:
    """Build the application from a Serve config's ``args``; an unknown key is an error."""
    return application(parse_settings(ServeSettings, args, where="args"))


@contextmanager
def serving(
    settings: ServeSettings,
    load: Loader = load_predictor,
    *,
    joined: Callable[[], None] = lambda: None,
    waits: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Serve a checkpoint while the block runs; yield the URL.

    Where no cluster is told of (:func:`store.cluster.cluster_address`) one is started on this machine and ended with
    the block. In one that runs already our application is removed at the end, and Ray Serve with it where it serves
    nothing else. A server that lost its driver answers on there, and is taken over by the next one.

    Args:
        settings: What to serve, where and how.
        load: Loads the model in a copy.
        joined: Called as soon as Ray runs here, before anything is served: joining it has replaced handlers of signals.
        waits: Told what a running cluster has too little of: copies wait for nodes that may join it.

    Raises:
        MissingError: No Ray cluster can be joined at the address.
        UsageError: The address is a dashboard's, or this machine has fewer GPUs than copies that need one.
        ConflictError: The port is in use, or the cluster has a server, or Ray Serve at another port.
        InputRefused: The model did not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    address = settings.address or None
    started = not ray.is_initialized()
    if started:
        address = cluster_address(address)
        _start_ray(settings, address)
    try:
        joined()
        if lacking := _lacking(settings):
            if started and not address:
                raise UsageError(f"this machine has {lacking} that the copies need: say fewer, or --set device=cpu")
            waits(f"waiting for nodes: the cluster has {lacking} that the copies need")
        with _alone_there() if address else nullcontext():
            settings = settings.model_copy(update={"port": _port(settings, shared=bool(address))})
            try:
                _start_serve(settings, load)
                yield f"http://{_host_in_url(settings.host)}:{settings.port}"
            finally:
                _stop_serve(shared=bool(address))
    finally:
        if started:
            with redirect_stdout(io.StringIO()):
                ray.shutdown()


@contextmanager
def _alone_there() -> Iterator[None]:
    """Be the only driver of a server on a cluster that others use too.

    Raises:
        ConflictError: Another one lives.
    """
    until = time.monotonic() + GONE_S
    while True:
        try:
            mine = ray.remote(Lone).options(name=APP, namespace=APP, num_cpus=0).remote()
            break
        except ValueError:  # the name is taken; that of a driver that died is free again soon
            if time.monotonic() > until:
                raise ConflictError(
                    "this cluster has a server, and a cluster has one: end it where it was started (Ctrl-C, or python "
                    "infra/jobs.py stop NAME), or swap its checkpoint"
                ) from None
            time.sleep(0.5)
    try:
        yield
    finally:
        ray.kill(mine)


def _port(settings: ServeSettings, *, shared: bool) -> int:
    """Return the port to listen on: one that is free, or that of the cluster's Ray Serve.

    Ray Serve keeps its address for as long as it runs; where it serves nothing any more it is ended first.

    Raises:
        ConflictError: Another program listens there, or Ray Serve has another address.
        UsageError: This machine cannot listen there.
    """
    client = ray.serve.context._get_global_client(raise_if_no_controller_running=False) if shared else None
    until = time.monotonic()
    if client is not None and not ray.serve.status().applications:
        _stop_serve(shared=False)
        client, until = None, until + GONE_S
    while client is None:
        try:
            return free_port(settings.host, settings.port)
        except ConflictError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
    host, port = client.http_config.host, client.http_config.port
    if (settings.host, settings.port or port) != (host, port):
        raise ConflictError(
            f"Ray Serve runs on this cluster at {host}:{port}, and its address is one for all that it serves: say "
            f"--host {host} --port {port}, or end what it serves"
        )
    return int(port)


def _stop_serve(*, shared: bool) -> None:
    """Remove our application once what it answers is answered, and end Ray Serve unless it serves others."""
    with redirect_stdout(io.StringIO()):  # Ray tells stdout that the controller, which ends itself, has died
        if APP in ray.serve.status().applications:  # Serve itself ends its proxy first, and cuts off who waits
            ray.serve.delete(APP)
        if not shared or not ray.serve.status().applications:
            ray.serve.shutdown()


def _start_ray(settings: ServeSettings, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        copies = max(settings.replicas, settings.scaling.most)
        n_cpus = max(os.cpu_count() or 1, copies * settings.threads + _for_jobs(settings))
        os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.door.at_proxy")
        ray.init("local", num_cpus=n_cpus, include_dashboard=False, **quiet)
        return
    try:
        probe(address)
    except OSError as error:
        raise MissingError(not_joined(address, error, answers=False)) from None
    try:
        ray.init(address, runtime_env=runtime_env(("serve", "store", "train")), **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingError(not_joined(address, error, answers=True)) from None


def _for_jobs(settings: ServeSettings) -> int:
    """Return the CPUs that Ray is told of for a bulk job: of low priority, so that it may share the model's."""
    return math.ceil(settings.jobs.workers * settings.jobs.cpus) if settings.lakes else 0


def _start_serve(settings: ServeSettings, load: Loader) -> None:
    logs = ray.serve.schema.LoggingConfig(log_level="WARNING", enable_access_log=False)
    http = {"host": settings.host, "port": settings.port, "request_timeout_s": settings.limits.timeout_s + PROXY_S}
    ray.serve.start(http_options=http, logging_config=logs)
    try:
        ray.serve.run(application(settings, load), name=APP, route_prefix="/", logging_config=logs)
    except RuntimeError:
        raise InputRefused(f"{settings.checkpoint}: the model did not start: {_reason()}") from None


def _reason() -> str:
    """Find in Serve's status the line that says why a deployment failed."""
    found = ray.serve.status().applications.get(APP)
    messages = [part.message for part in found.deployments.values()] if found else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Refused"))]
    return (errors or lines or ["no reason given"])[-1]


def _host_in_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
