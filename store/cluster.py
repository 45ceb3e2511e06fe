"""This module joins a Ray cluster or starts one for as long as a command runs; nothing else in ``store`` knows Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from store.errors import StorageError

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def ray_cluster(
    address: str | None, *, cpus: int, packages: Sequence[str], threads: int = 1, object_store_bytes: int = 2**28
) -> Iterator[None]:
    """Hold a connection to Ray.

    Args:
        address: A running cluster; none means ``RAY_ADDRESS``, and without that a new one on this machine, which ends
            with the block. A connection that the caller has already is used and left open.
        cpus: CPUs of a new cluster.
        packages: Our packages that workers need; they travel to a cluster that runs already.
        threads: OpenMP threads of a worker.
        object_store_bytes: Shared memory of a new cluster.

    Raises:
        StorageError: The cluster does not answer, or none could be started.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _probe(address)
            modules = [str(ROOT / package) for package in packages]
            ray.init(address=address, log_to_driver=False, logging_level="error", runtime_env={"py_modules": modules})
        else:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}},
            )
    except (OSError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster answers at {address!r}" if address else "Ray does not start on this machine"
        raise StorageError(f"{where}: {str(error).splitlines()[0]}; check --address or RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Fail at once when nobody listens: Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=5):
            pass
