"""This module joins a Ray cluster or starts one for as long as a command runs; nothing else in ``store`` knows Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from store.errors import StorageError, UsageError

ROOT = Path(__file__).resolve().parent.parent
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job: what was submitted with it, as JSON."""
TOLD_EVERY_S = 5.0
ADDRESS = re.compile(r"[a-z]+://.+|\[[0-9a-fA-F:.]+\]:\d+|[^\s:/]+:\d+")
"""What may be a cluster's: HOST:PORT, or what Ray gives a scheme of its own."""


@contextmanager
def ray_cluster(
    address: str | None, *, cpus: int, packages: Sequence[str], threads: int = 1, object_store_bytes: int = 2**28
) -> Iterator[None]:
    """Hold a connection to Ray.

    Args:
        address: A running cluster, see :func:`cluster_address`; a new one on this machine ends with the block. A
            connection that the caller has already is used and left open.
        cpus: CPUs of a new cluster.
        packages: Our packages that workers need; they travel to a cluster that runs already.
        threads: OpenMP threads of a worker.
        object_store_bytes: Shared memory of a new cluster.

    Raises:
        StorageError: The cluster does not answer, or none could be started.
        UsageError: The address is a dashboard's, or none at all.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address, answers = cluster_address(address), False
    try:
        if address:
            probe(address)
            answers = True
            with _undisturbed():
                ray.init(address=address, log_to_driver=False, logging_level="error", runtime_env=runtime_env(packages))
        else:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            with _undisturbed():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=object_store_bytes,
                    log_to_driver=False,
                    logging_level="error",
                    runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}},
                )
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        here = f"Ray does not start on this machine: {_first_line(error)}"
        raise StorageError(not_joined(address, error, answers=answers) if address else here) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while Ray starts, which SIGTERM would end half-started, and keep the handlers.

    The second is no longer held: Ray may wait for minutes. Who has no handler of SIGTERM gets Ray's.
    """
    came: list[int] = []

    def hold(number: int, _frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    here = threading.current_thread() is threading.main_thread()
    held = {one: handler for one, handler in handlers.items() if here and callable(handler)}
    for one in held:
        signal.signal(one, hold)
    try:
        yield
    except SystemExit as ended:  # Ray's own handler of SIGTERM, which it has set meanwhile
        if ended.code != signal.SIGTERM or signal.SIGTERM not in held:
            raise
        came.append(signal.SIGTERM)
    finally:
        for one, handler in held.items():
            signal.signal(one, handler)
    if came:
        signal.raise_signal(came[0])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def not_joined(address: str, error: Exception, *, answers: bool) -> str:
    """Say that a driver here cannot join a cluster, and what to do; ``answers``: somebody listens at the address."""
    reason = _first_line(error)
    if not answers:
        return f"no Ray cluster answers at {address!r} ({reason}); check --address or RAY_ADDRESS"
    ways = ["from a machine that is no node of the cluster submit a job: python infra/jobs.py submit -- python -m ..."]
    if "RAY_AUTH_MODE" not in os.environ:
        ways.append("where the cluster asks for a token: export RAY_AUTH_MODE=token (docs/launcher.md)")
    return f"the Ray cluster at {address!r} answers, and cannot be joined ({reason}); {'; '.join(ways)}"


def cluster_address(address: str | None) -> str | None:
    """Return the cluster to join, or none where one is to be started.

    What is given counts first, then ``RAY_ADDRESS``. "auto" is ``RAY_ADDRESS``, or else the cluster that was started on
    this machine; "local" starts one whatever ``RAY_ADDRESS`` says.

    Raises:
        UsageError: It is a dashboard's, where jobs are submitted and no driver can join, or no address.
    """
    elsewhere = os.environ.get("RAY_ADDRESS") or None
    from_us = address and not (address == "auto" and elsewhere)
    chosen = address if from_us else elsewhere
    source = "--address" if from_us else "RAY_ADDRESS"
    if chosen and chosen.startswith(("http://", "https://")):
        raise UsageError(f"{source} is {_of_dashboard(chosen, chosen)}")
    if chosen and chosen not in ("auto", "local") and not ADDRESS.fullmatch(chosen):
        raise UsageError(f"{source} is {chosen!r}, which names no cluster: give HOST:6379, or auto, or local")
    return None if chosen == "local" else chosen


def _of_dashboard(address: str, url: str) -> str:
    return (
        f"{address!r}, a dashboard, where jobs are submitted; give HOST:6379 or auto here, or submit: "
        f"python infra/jobs.py submit --address {url} -- python -m ..."
    )


def refuse_fleeting(**places: str) -> None:
    """Refuse places, by name, that lie in the working directory of a submitted job: Ray deletes it.

    Raises:
        UsageError: Such a place; the message says what would do.
    """
    if "working_dir" not in _submitted():
        return
    for name, place in places.items():
        if "://" not in place and Path(place).absolute().is_relative_to(Path.cwd()):
            raise UsageError(
                f"{name}={place!r} lies in the job's working directory, which Ray deletes; give an absolute path of a "
                "disk that all nodes see (a lake may also be at an s3:// URI)"
            )


def _submitted() -> dict[str, Any]:
    """Return the runtime environment that this driver's job was submitted with; empty if it is none."""
    environment: dict[str, Any] = json.loads(os.environ.get(JOB) or "{}").get("runtime_env") or {}
    return environment


def runtime_env(packages: Sequence[str]) -> dict[str, Any]:
    """Return what workers of a running cluster are to be given; nothing where a submitted job has brought our packages.

    Ray refuses a job whose driver names modules beside its own.
    """
    job = _submitted()
    if "py_modules" in job or ("working_dir" in job and Path.cwd() == ROOT):
        return {}
    return {"py_modules": [str(ROOT / package) for package in packages]}


class RayMetrics:
    """Metrics of this process, which Prometheus finds at each node's metrics port, their names with ``ray_`` before.

    Ray forgets a gauge that was not set for some seconds, and with it what it says of something that hangs: a thread
    sets all of them again until :meth:`close`. A gauge that is no number is not told.
    """

    def __init__(self, table: Mapping[str, tuple[str, str, tuple[str, ...]]]) -> None:
        """Register them; Ray runs already.

        Args:
            table: Name to kind ("counter" or "gauge"), meaning and labels.
        """
        from ray.util.metrics import Counter, Gauge

        kinds = {"counter": Counter, "gauge": Gauge}
        self._metrics = {name: kinds[kind](name, text, tag_keys=labels) for name, (kind, text, labels) in table.items()}
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._tell_again, name="metrics", daemon=True).start()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        labels = _ascii(labels)
        self._told[name, tuple(labels.items())] = value
        self._metrics[name].set(value, labels)

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        """Add to a counter; nothing is added where there is nothing to add."""
        if number > 0:
            self._metrics[name].inc(number, _ascii(labels))

    def close(self) -> None:
        """Let Ray forget the gauges."""
        self._closed.set()

    def _tell_again(self) -> None:
        while not self._closed.wait(TOLD_EVERY_S):
            for (name, labels), value in list(self._told.items()):
                self._metrics[name].set(value, dict(labels))


def _ascii(labels: Mapping[str, str]) -> dict[str, str]:
    """Write labels in the signs that Ray takes in a metric: another one becomes its code."""
    return {key: value.encode("ascii", "backslashreplace").decode() for key, value in labels.items()}


Tasks = Callable[[Callable[[Any, Any], None], Any, Sequence[Any]], Iterator[None]]
"""Runs function(common, item) for all items, in any order and place, and yields as each one ends."""


def in_this_process(function: Callable[[Any, Any], None], common: Any, items: Sequence[Any]) -> Iterator[None]:
    """Run tasks one after the other, here."""
    for item in items:
        function(common, item)
        yield


@contextmanager
def lazy_ray_tasks(address: str | None, cpus: int, packages: Sequence[str]) -> Iterator[Tasks]:
    """Hold a function as :func:`ray_tasks` that joins or starts a cluster when there is more than one task to run."""
    with ExitStack() as stack:

        def tasks(function: Callable[[Any, Any], None], common: Any, items: Sequence[Any]) -> Iterator[None]:
            if len(items) < 2 and not address:
                return in_this_process(function, common, items)
            stack.enter_context(ray_cluster(address, cpus=cpus, packages=packages))
            return ray_tasks(function, common, items)

        yield tasks


def ray_tasks(function: Callable[[Any, Any], None], common: Any, items: Sequence[Any]) -> Iterator[None]:
    """Run function(common, item) for all items as Ray tasks, and yield as each one ends.

    As many are in flight as keep all CPUs busy. A task whose worker dies is run again, three times at most.

    Raises:
        StorageError: A task's worker died again and again; what the function raises is raised as it is.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(function)
    shared = ray.put(common)
    room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    try:
        for item in items:
            waiting.append(task.remote(shared, item))
            if len(waiting) >= room:
                _wait_for_one(waiting)
                yield
        while waiting:
            _wait_for_one(waiting)
            yield
    finally:
        for reference in waiting:
            ray.cancel(reference, force=False)


def _wait_for_one(waiting: list[Any]) -> None:
    """Wait for one task and take it off the list."""
    import ray

    (done, *_), left = ray.wait(waiting, num_returns=1)
    waiting[:] = left
    try:
        ray.get(done)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise StorageError(
            "a worker died again and again, most likely for want of memory; run the same command again with fewer "
            "workers: what was done stays done"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise error.cause if error.cause else error from None


def probe(address: str) -> None:
    """Fail at once when nobody listens at HOST:PORT, or a dashboard: Ray itself would go on trying for minutes.

    Raises:
        OSError: Nobody does.
        UsageError: A dashboard does, where no driver can join.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as asked:
            speaks_http = _speaks_http(asked)
    except OverflowError as error:
        raise OSError(str(error)) from None
    if speaks_http:
        raise UsageError(f"the address is {_of_dashboard(address, f'http://{host}:{port}')}")


def _speaks_http(asked: socket.socket) -> bool:
    """Say whether who listens answers a request as web servers do; a cluster's head speaks otherwise."""
    try:
        asked.sendall(b"GET / HTTP/1.1\r\nHost: ray\r\nConnection: close\r\n\r\n")
        return asked.recv(5) == b"HTTP/"
    except OSError:  # it has hung up, or waits for other words
        return False
