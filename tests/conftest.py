"""Fixtures that several tests share: real data, one Ray cluster for all, a small lake that explains itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")  # seconds; ten are usual
os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")

import pytest
from encoded import add_dataset

from store.writer import LakeWriter

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal the tests to processes, where there are several: one takes all that have to do with Ray, others go by file.

    So at most one Ray runs at a time, as without processes; its tests wait more than they work, and begin first.
    """
    if not hasattr(config, "workerinput"):
        return
    clusters = {item.path for item in items if {"ray", "road"} & {mark.name for mark in item.iter_markers()}}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("clusters" if item.path in clusters else item.path.stem))
    items.sort(key=lambda item: item.path not in clusters)


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
