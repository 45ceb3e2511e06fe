"""Fixtures that several tests share: real data, one Ray cluster for all, a small lake that explains itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # its workers would wait for tests of the other process
os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")  # seconds; ten are usual
os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")

import pytest
from encoded import add_dataset

from store.writer import LakeWriter

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal files to processes, where there are several; what cannot run side by side goes to the same one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _company(config.rootpath / nodeid.partition("::")[0])

    return ByCluster(config, log)


@cache
def _company(path: Path) -> str:
    """Name what a file of tests runs with: those that take the session's cluster share one, and nodes their network."""
    text = path.read_text(encoding="utf-8")
    if "from ray_head" in text or "from infra.nodes" in text:
        return "nodes"
    return "session" if re.search(r"mark\.(ray|road)\b", text) else path.stem


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data beside the checkout."""
    if not (SHARED / "MANIFEST.tsv").exists():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for the whole session."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
        runtime_env={
            "env_vars": {
                "PYTHONPATH": str(ROOT),
                "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.door.at_proxy",  # as where we start Ray
            }
        },
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two human datasets (one with proteins) and a mouse one; read-only, shared by all tests."""
    uri = tmp_path_factory.mktemp("lakes") / "tiny"
    with LakeWriter(str(uri)) as writer:
        add_dataset(writer, "first", 150, {"RNA": 40, "protein": 6})
        add_dataset(writer, "second", 90, {"RNA": 60})
        add_dataset(writer, "mouse", 70, {"RNA": 30}, organism="mus_musculus")
    return uri
