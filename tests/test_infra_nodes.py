"""Three nodes with addresses of their own: ingestion and serving across them, and what a lost node does to both.

Training across nodes is in ``test_train_faults``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from encoded import encoded_counts, numbered
from small_checkpoint import write_checkpoint
from test_ingest_faults import state
from test_serve_swap import COUNTS, expected

from infra.nodes import SOON, Nodes, possible
from ingest.job import JobSettings, SourceSettings
from ingest.run import run
from store.lake import open_lake
from store.validate import validate

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # ray, of its own sockets and processes
    pytest.mark.skipif(not possible(), reason="needs network namespaces: Linux, iproute2, root"),
]
ASK = """
import json, sys, time
import httpx
url, body = sys.argv[1], json.loads(sys.argv[2])
with httpx.Client(trust_env=False, timeout=60) as http:
    while True:
        begin = time.monotonic()
        try:
            answer = http.post(url + "/v1/embed", json=body)
            told = [answer.status_code, answer.json() if answer.status_code == 200 else answer.text[:200]]
        except httpx.TransportError as error:
            told = [0, repr(error)]
        print(json.dumps([*told, time.monotonic() - begin]), flush=True)
        time.sleep(0.1)
"""
WORK = """
import sys, time
from pathlib import Path
import ingest.run  # which imports ray, as drivers do
from store.cluster import ray_cluster, ray_tasks

def work(folder, number):
    import ray
    (folder / f"{number} {ray.util.get_node_ip_address()}").touch()
    time.sleep(8)
    (folder / f"{number} done").touch()

with ray_cluster(sys.argv[1], cpus=1, packages=("ingest", "store")):
    print(sum(1 for _ in ray_tasks(work, Path(sys.argv[2]), range(4))))
"""
LOOK = """
import json, sys
import ray.serve
ray.init(sys.argv[1], log_to_driver=False)
found = ray.serve.status().applications.get("somaflow")
copies = found.deployments["ModelReplica"].replica_states
print(json.dumps({getattr(state, "value", state): n for state, n in copies.items()}))
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(3, cpus=[0, 1, 1], environment=SOON, logs=tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


@contextmanager
def command(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run something; it is ended with the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)


def write_sources(folder: Path) -> list[Path]:
    """Write three files whose counts encode their coordinates."""
    paths, n_cells, n_genes = [], 6_000, 40
    for number in range(3):
        names = numbered("RNA", n_genes).feature_id
        obs = pd.DataFrame({"cell_type": np.resize(["B cell", "T cell"], n_cells)})
        obs.index = pd.Index([f"{number}-{cell}" for cell in range(n_cells)])
        made = anndata.AnnData(encoded_counts(number, n_cells, n_genes), obs, pd.DataFrame(index=names))
        made.write_h5ad(folder / f"source{number}.h5ad")
        paths.append(folder / f"source{number}.h5ad")
    return paths


def test_a_node_that_dies_while_it_ingests_changes_nothing_in_the_lake(
    nodes: Nodes, tmp_path: Path, ray_cluster: None
) -> None:
    paths = write_sources(tmp_path)
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log"
    run(JobSettings(lake=str(alone), source=tuple(SourceSettings(uri=str(path)) for path in paths)))
    words = ["run", *map(str, paths), "--lake", str(together), "--address", nodes.address, "--json"]
    with command(nodes.on(1, sys.executable, "-m", "ingest", *words), log) as driver:

        def some() -> bool:
            return (together / "somaflow/lake.json").exists() and len(open_lake(str(together)).current) >= 1

        wait_for(some, driver, log)
        nodes.kill(3)
        try:
            assert driver.poll() is None, "it was done before the node died"
            assert driver.wait(200) == 0, log.read_text()[-3000:]
        finally:
            nodes.start(3)
    lake = open_lake(str(together))
    assert len(lake.current) == 3
    assert [check for check in validate(lake) if check.problem] == []
    assert state(lake) == state(open_lake(str(alone)))


def test_tasks_of_a_node_that_falls_silent_are_run_elsewhere(nodes: Nodes, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "begun"
    folder.mkdir()
    with command(nodes.on(1, sys.executable, "-c", WORK, nodes.address, str(folder)), log) as driver:
        wait_for(lambda: any(folder.glob(f"* {nodes.host(3)}")), driver, log)
        nodes.cut(3)  # its tasks go on, and nobody hears of them: no connection is closed, Ray asks after 90 s
        try:
            assert driver.wait(300) == 0, log.read_text()[-3000:]
        finally:
            nodes.kill(3)
            nodes.start(3)
    assert log.read_text().split()[-1] == "4"
    told = [path.name.split() for path in folder.iterdir()]
    of_node = {host: {number for number, where in told if where == host} for host in (nodes.host(2), nodes.host(3))}
    assert of_node[nodes.host(2)] == {"0", "1", "2", "3"}
    assert of_node[nodes.host(3)]


def copies(nodes: Nodes) -> dict[str, int]:
    """Return how many copies of the model are in which state."""
    told = subprocess.run(
        nodes.on(1, sys.executable, "-W", "ignore", "-c", LOOK, nodes.address),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return dict(json.loads(told.stdout.splitlines()[-1]))


def test_a_server_across_nodes_goes_on_when_one_is_cut_off_and_grows_again(nodes: Nodes, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    sha256, embedding_CD = expected(checkpoint)
    log, answers = tmp_path / "log", tmp_path / "answers"
    words = ["run", str(checkpoint), "--replicas", "2", "--address", nodes.address, "--port", "8123"]
    ask = nodes.on(1, sys.executable, "-c", ASK, "http://127.0.0.1:8123", json.dumps({"counts": COUNTS}))

    def told() -> list[list[object]]:
        lines = answers.read_text().splitlines() if answers.exists() else []
        return [json.loads(line) for line in lines]

    def good(since: int) -> int:
        return sum(status == 200 for status, *_ in told()[since:])

    with command(nodes.on(1, sys.executable, "-m", "serve", *words), log) as server:
        wait_for(lambda: "8123" in log.read_text(), server, log)
        assert copies(nodes) == {"RUNNING": 2}
        with command(ask, answers) as client:
            wait_for(lambda: good(0) >= 20, client, answers)
            assert {status for status, *_ in told()} == {200}
            nodes.cut(3)
            cut = len(told())
            wait_for(lambda: good(cut) >= 30 and all(status == 200 for status, *_ in told()[-30:]), client, answers)
            recovered = len(told())
            nodes.kill(3)
            nodes.start(3)
            wait_for(lambda: copies(nodes).get("RUNNING") == 2, server, log)
            last = len(told())
            wait_for(lambda: good(last) >= 20, client, answers)
    statuses = Counter(status for status, *_ in told()[cut:recovered])
    assert set(statuses) <= {200, 503}, [one for one in told() if one[0] not in (200, 503)]
    assert {status for status, *_ in told()[last:]} == {200}
    for status, reply, _ in told():
        if status == 200:
            assert reply["provenance"]["model_sha256"] == sha256
            np.testing.assert_allclose(reply["embeddings"], embedding_CD, rtol=0, atol=1e-5)
