"""This module runs several Ray nodes on one machine, each in a network namespace with an address of its own.

usage: sudo python infra/nodes.py [--nodes 3] [--cpus 1]

A bridge joins the nodes, whose links can be cut: what happens then is what happens between machines, where a partner
falls silent and no connection is closed. Node 1 is the head. Commands run on a node by ``ip netns exec``. Needs Linux,
iproute2 and root; the machine's own network is left alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
START_S = 90
"""Seconds that a node may take to start."""
ESTABLISHED = "01"
"""A connection's state in Linux's tables."""
STORE_BYTES = 100 * 2**20
SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
"""An environment that lets Ray miss a node after some 10 s in place of a minute."""
CLOSED_S = 10
"""Seconds that connections of killed processes may take to close."""


def possible() -> bool:
    """Say whether this machine lets us make namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"sf-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


class Nodes:
    """A bridge and the nodes on it; all of them end with the block."""

    def __init__(self, n_nodes: int, *, cpus: Sequence[int], environment: Mapping[str, str], logs: Path) -> None:
        """Say what to start.

        Args:
            n_nodes: Nodes to begin with.
            cpus: CPUs that each of them tells Ray to have, the head first.
            environment: Variables for Ray, such as ``RAY_health_check_period_ms``.
            logs: Folder for what ``ray start`` prints, a file for each node.
        """
        self.n_nodes, self.cpus, self.logs = n_nodes, cpus, logs
        self.environment = dict(environment)
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Nodes:
        """Make the bridge, then start the nodes."""
        self.folder = Path(tempfile.mkdtemp(prefix="sf"))  # short, for the sockets in it
        self.number = next(number for number in range(256) if _ip_ok("link", "add", f"sf{number}", "type", "bridge"))
        try:
            _ip("link", "set", self.bridge, "up")
            for node in range(1, self.n_nodes + 1):
                self.start(node)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the nodes, workers first, and take the bridge away."""
        for node in sorted(self.running, reverse=True):
            self.kill(node)
        _ip_ok("link", "del", self.bridge)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def bridge(self) -> str:
        """Name of the bridge; those of links and namespaces begin with it."""
        return f"sf{self.number}"

    @property
    def address(self) -> str:
        """Where the head is to be found."""
        return f"{self.host(1)}:{PORT}"

    def host(self, node: int) -> str:
        """Return a node's address."""
        return f"10.77.{self.number}.{node}"

    def name(self, node: int) -> str:
        """Return the name of a node's namespace."""
        return f"{self.bridge}-{node}"

    def on(self, node: int, *words: str) -> list[str]:
        """Return the words that run a command on a node."""
        return ["ip", "netns", "exec", self.name(node), *words]

    def start(self, node: int) -> None:
        """Start a node and wait until it has joined.

        Raises:
            RuntimeError: It does not start; what it printed is told.
        """
        space, link = self.name(node), f"{self.name(node)}v"
        _ip("netns", "add", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", self.bridge, "up")
        _ip("-n", space, "addr", "add", f"{self.host(node)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        cpus = self.cpus[min(node, len(self.cpus)) - 1]
        joins = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        words = [
            *(joins if node == 1 else [f"--address={self.address}"]),
            f"--node-ip-address={self.host(node)}",
            f"--num-cpus={cpus}",
            f"--object-store-memory={STORE_BYTES}",
            "--disable-usage-stats",
            "--block",
        ]
        log = self.logs / f"node-{node}.log"
        own = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "RAY_AUTH_MODE": "disabled"}
        own["RAY_TMPDIR"] = str(self.folder)  # a later ray.init() must not find this cluster
        with log.open("wb") as file:
            self.running[node] = subprocess.Popen(
                self.on(node, RAY, "start", *words),
                env=os.environ | own | self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while b"--block" not in log.read_bytes():  # it says so once the node has joined
            if self.running[node].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"node {node} does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)

    def cut(self, node: int) -> None:
        """Cut a node's link: packets are lost from now on, nobody is told."""
        _ip("link", "set", f"{self.name(node)}v", "down")

    def kill(self, node: int) -> None:
        """Kill everything that runs on a node, and take its namespace away once its partners have been told."""
        leader = self.running.pop(node)
        until = time.monotonic() + 30
        while (left := self.processes(node)) and time.monotonic() < until:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
        leader.wait(30)
        until = time.monotonic() + CLOSED_S
        while self._connected(node) and time.monotonic() < until:
            time.sleep(0.1)
        _ip_ok("netns", "del", self.name(node))
        _ip_ok("link", "del", f"{self.name(node)}v")

    def _connected(self, node: int) -> bool:
        """Say whether a node has a connection that nobody has closed."""
        words = self.on(node, "cat", "/proc/net/tcp", "/proc/net/tcp6")
        lines = subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()
        return any(line.split()[3] == ESTABLISHED for line in lines)

    def processes(self, node: int) -> list[int]:
        """Return what runs on a node."""
        told = subprocess.run(["ip", "netns", "pids", self.name(node)], capture_output=True, text=True, check=False)
        return [int(word) for word in told.stdout.split()]


def _ip(*words: str) -> None:
    """Run ``ip``.

    Raises:
        RuntimeError: It fails; what it printed is told.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}; this needs Linux, iproute2 and root")


def _ip_ok(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Start nodes and keep them until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1, help="that each node tells Ray to have")
    parser.add_argument("--logs", type=Path, default=Path("build/nodes"))
    options = parser.parse_args()
    if not possible():
        sys.exit("nodes: network namespaces need Linux, iproute2 (the command ip) and root")
    options.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"starting {options.nodes} nodes; their logs: {options.logs}", flush=True)
    with Nodes(options.nodes, cpus=[options.cpus], environment={}, logs=options.logs) as nodes:
        print(f"run a command on them:  {' '.join(nodes.on(1))} COMMAND ... --address {nodes.address}")
        print(f"cut node 2 off:         ip link set {nodes.name(2)}v down")
        print(f"mend it:                ip link set {nodes.name(2)}v up")
        print("end all of it:          Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
