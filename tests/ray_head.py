"""A Ray head with its dashboard on loopback, with ports and a folder of its own: for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from ports import HOST, free_ports

BIN = Path(sys.executable).parent
START_S = 90
PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """Where a head is to be found."""

    address: str
    dashboard: str
    environment: dict[str, str]
    """For commands that a user types: nothing in it points at the cluster."""


@contextmanager
def ray_head(log: Path, *, cpus: int = 2) -> Iterator[Head]:
    """Start a head and wait until jobs can be submitted; end it, and all that it started, with the block."""
    port = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    gone = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in gone}
    environment |= {"PATH": path, "NO_COLOR": "1", "NO_PROXY": HOST, "no_proxy": HOST, "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="sf", ignore_cleanup_errors=True) as folder, log.open("wb") as file:
        environment["RAY_TMPDIR"] = folder  # "auto" must not find another's cluster, nor others ours
        words = [
            *("--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}", f"--node-ip-address={HOST}"),
            *("--include-dashboard=true", f"--dashboard-host={HOST}", f"--num-cpus={cpus}"),
            f"--object-store-memory={100 * 2**20}",
            *(f"--{name}={number}" for name, number in port.items()),
        ]
        head = subprocess.Popen(
            [str(BIN / "ray"), "start", *words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            dashboard = f"http://{HOST}:{port['dashboard-port']}"
            wait_for_jobs(dashboard, head, log)
            yield Head(f"{HOST}:{port['port']}", dashboard, environment)
        finally:
            end(head, folder)


def wait_for_jobs(dashboard: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the dashboard answers for jobs."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            if httpx.get(f"{dashboard}/api/jobs/", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return
        assert head.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    raise AssertionError(f"no dashboard after {START_S} s:\n{log.read_text()[-3000:]}")


def end(head: subprocess.Popen[bytes], folder: str) -> None:
    """Kill a head, its children and what works in its folder: asked to end, it takes a quarter of a minute."""
    left = []
    with suppress(psutil.NoSuchProcess):
        left = psutil.Process(head.pid).children(recursive=True)
    head.kill()
    head.wait(10)
    left += [one for one in psutil.process_iter() if belongs(one, folder)]
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=10)


def belongs(process: psutil.Process, folder: str) -> bool:
    """Say whether a process was started for the cluster that has this folder."""
    try:
        return process.environ().get("RAY_TMPDIR") == folder and process.pid != os.getpid()
    except psutil.Error:
        return False
