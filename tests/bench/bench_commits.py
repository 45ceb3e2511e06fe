"""What a commit costs, and opening the lake, while the number of datasets grows: seconds on disk, requests on S3.

    python tests/bench/bench_commits.py [--datasets 1000 --features 36000] [--s3-datasets 40 --s3-features 2000]
        [--folder build/commits] [--page FILE]

Datasets of 20 cells with the features of an atlas are written one after the other by one process, as the driver of an
ingestion does: what their counts cost is next to nothing, what is left is what each dataset costs whatever its size.
On S3 (moto's server on loopback, behind a proxy that counts) it is requests that are counted, not seconds: how long one
takes is the store's affair. It writes docs/benchmarks/commits.md; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import cellxgene_census
import httpx
import numpy as np
import pandas as pd
import psutil
import scipy.sparse
from encoded import numbered
from fault_proxy import fault_proxy
from local_s3 import forget_endpoint, local_s3
from machine import machine

from store.lake import open_lake
from store.schema import DatasetPlan
from store.writer import LakeWriter, write_counts

ROOT = Path(__file__).parent.parent.parent
PAGE = Path(__file__).parent / "commits_page.md"
CELLS, NONZEROS = 20, 200
ORGANISM = "homo_sapiens"


def write(uri: str, n_datasets: int, n_features: int, requests: Callable[[], int]) -> list[dict[str, float]]:
    """Commit datasets; return seconds and requests of each."""
    features, random = numbered("G", n_features), np.random.default_rng(0)
    took = []
    with LakeWriter(uri) as writer:
        for number in range(n_datasets):
            begin, before = time.perf_counter(), requests()
            plan = DatasetPlan(f"d{number}", ORGANISM, f"key-{number}", CELLS, {"RNA": features})
            reservation = writer.reserve(plan)
            counts = scipy.sparse.random(CELLS, n_features, NONZEROS / n_features, "csr", np.float32, random)
            counts.data[:] = 1 + np.arange(counts.nnz) % 9
            names = [f"d{number}-{cell}" for cell in range(CELLS)]
            obs = pd.DataFrame({"cell_id": names, "cell_type": "T cell", "tissue": "blood", "is_primary_data": True})
            writer.commit(reservation, obs, [write_counts(reservation, "RNA", 0, counts)])
            took.append({"seconds": time.perf_counter() - begin, "requests": requests() - before})
    return took


def read(uri: str, requests: Callable[[], int]) -> dict[str, dict[str, float]]:
    """Open the lake and read parts of it, each for the first time; return seconds and requests of each."""

    def foreign() -> None:
        with cellxgene_census.open_soma(uri=uri) as census:
            cellxgene_census.get_var(census, ORGANISM, column_names=["soma_joinid", "feature_id"])

    lake = open_lake(uri)
    asked: dict[str, Callable[[], Any]] = {
        "var": lambda: lake.var(ORGANISM, "RNA"),
        "obs": lambda: lake.obs(ORGANISM),
        "counts": lambda: lake.counts(ORGANISM, "RNA", np.arange(100)),
    }
    if not uri.startswith("s3://"):
        asked["foreign"] = foreign
    found = {}
    for name, ask in asked.items():
        begin, before = time.perf_counter(), requests()
        ask()
        found[name] = {"seconds": time.perf_counter() - begin, "requests": requests() - before}
    return found


def spans(took: list[dict[str, float]], key: str) -> dict[str, float]:
    """Return the mean of the first, middle and last commits, a tenth of them each."""
    n = max(1, len(took) // 10)
    starts = {"first": 0, "middle": (len(took) - n) // 2, "last": len(took) - n}
    return {name: float(np.mean([one[key] for one in took[start : start + n]])) for name, start in starts.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write and read a lake on disk, then one on S3."""
    shutil.rmtree(options.folder, ignore_errors=True)
    uri = str(options.folder.absolute() / "lake")
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    begin = time.perf_counter()
    took = write(uri, options.datasets, options.features, lambda: 0)
    found |= {"whole_s": time.perf_counter() - begin, "seconds": spans(took, "seconds")}
    found |= {"reading": read(uri, lambda: 0), "peak_mb": psutil.Process().memory_info().rss / 1e6}
    print(f"{options.datasets} datasets on disk: {found}", flush=True)
    with local_s3() as variables, fault_proxy(variables["AWS_ENDPOINT_URL"], 0.0) as proxy:
        os.environ.update({**variables, "AWS_ENDPOINT_URL": proxy})
        forget_endpoint()
        boto3.client("s3").create_bucket(Bucket="lakes")

        def requests() -> int:
            return int(httpx.get(f"{proxy}/requests").json())

        took = write("s3://lakes/lake", options.s3_datasets, options.s3_features, requests)
        found |= {"requests": spans(took, "requests"), "reading_s3": read("s3://lakes/lake", requests)}
    return found


def page(found: dict[str, Any], options: argparse.Namespace) -> str:
    """Write the page."""
    ends = ("first", "middle", "last")
    what = {
        "var": "var (the features)",
        "obs": "all of obs",
        "counts": "the counts of 100 cells",
        "foreign": "`cellxgene_census.get_var`, two columns",
    }
    rows = []
    for name, title in what.items():
        there = found["reading_s3"].get(name)
        requests = "" if there is None else f"{there['requests']:,.0f}"
        rows.append(f"| {title} | {found['reading'][name]['seconds']:.2f} | {requests} |")
    return PAGE.read_text(encoding="utf-8").format(
        cells=CELLS,
        datasets=f"{options.datasets:,}",
        features=f"{options.features:,}",
        s3_datasets=options.s3_datasets,
        s3_features=f"{options.s3_features:,}",
        seconds=" | ".join(f"{found['seconds'][end]:.2f}" for end in ends),
        requests=" | ".join(f"{found['requests'][end]:,.0f}" for end in ends),
        whole=f"{found['whole_s']:,.0f}",
        peak=f"{found['peak_mb']:,.0f}",
        rows="\n".join(rows),
        load=f"{found['load']:.1f}",
        **machine(),
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--features", type=int, default=36_000)
    parser.add_argument("--s3-datasets", type=int, default=40)
    parser.add_argument("--s3-features", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "commits")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks" / "commits.md")
    options = parser.parse_args()
    found = measure(options)
    options.page.write_text(page(found, options), encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
