"""What ``infra/size.py`` says against what two sizes take here: ingestion, snapshot, stream, training, serving, bytes.

    python tests/bench/bench_size.py [--sizes 20000:8000:48,80000:36000:96] [--folder build/size] [--page FILE]

Sizes are cells, genes and a model's width; none is one that ``infra/costs.toml`` was measured at, and fewer genes give
fewer non-zeros a cell, so that it shows whether cost follows them. Each command runs as a user would run it; ingestion
and snapshot with all their start-up, on two cores; the stream takes several epochs after one that warms up. Training is
the median step of one worker with two threads, serving is eight clients that ask for 16 cells at a time of a copy with
one thread; both models read what ``python -m train plan`` counts. Predictions are of one node of two cores that is used
as well as where the costs were measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata
import h5py
from atlas_file import write_atlas
from bench_scale import ENVIRONMENT, ROOT, bytes_of
from bench_serve import CELLS, closed
from machine import machine
from scipy.sparse import csr_matrix

from serve.npz import REQUEST, write_npz
from train.record import USEFUL, read_metrics

CORES = 2
TRAIN = """\
lake = "{lake}"
snapshot = "bench"
output = "{output}"
name = "{width}"
steps = 40
workers = 1
threads = 2
report = false
trackers = []
model = {{ width = {width}, layers = 2 }}
data = {{ global_batch = 64, tokens = 256 }}
"""
STEPS_BEFORE = 10
"""Steps that do not count."""
CLIENTS, SERVED_S = 8, 8.0
EPOCH_CELLS = 240_000
"""Cells that a pass of the stream takes, in whole epochs."""
PAGE = Path(__file__).parent / "size_page.md"


def load_size() -> ModuleType:
    """Load the calculator, which is a script."""
    spec = importlib.util.spec_from_file_location("infra_size", ROOT / "infra" / "size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def said_by(words: list[str]) -> str:
    """Run one of our commands; return what it says on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def seconds_of(words: list[str]) -> float:
    """Run one of our commands; return its seconds."""
    begin = time.perf_counter()
    said_by(words)
    return time.perf_counter() - begin


def stream_rate(lake: Path, cells: int) -> float:
    """Return tokenized cells a second, in a process of its own."""
    command = [sys.executable, str(ROOT / "tests/bench/stream_rate.py"), "tokenized", json.dumps({"lake": str(lake)})]
    epochs = max(1, EPOCH_CELLS // cells)
    done = subprocess.run(
        command,
        input=f"{epochs}\n" * 3,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"stream_rate.py ended with {done.returncode}:\n{done.stderr[-3000:]}")
    passes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return max(one["cells_s"] for one in passes[-2:])


def train_rate(run: Path) -> float:
    """Train; return the cells a second of a median step, without what waits for data."""
    said_by(["train", str(run.with_suffix(".toml"))])
    rows = read_metrics(run / "metrics.jsonl")[STEPS_BEFORE:]
    return statistics.median(row["cells"] / sum(row[part] for part in USEFUL) for row in rows)


def serve_rate(checkpoint: Path, h5ad: Path) -> float:
    """Serve; return the cells a second that clients get."""
    atlas = anndata.read_h5ad(h5ad, backed="r")
    counts = csr_matrix(atlas[: 64 * CELLS].X)
    names = atlas.var_names.to_numpy().astype("S")
    words = [sys.executable, "-m", "serve", "run", str(checkpoint), "--port", "0", "--json"]
    with subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            bodies = [_body(names, counts[at : at + CELLS]) for at in range(0, counts.shape[0], CELLS)]
            return float(asyncio.run(closed(url, bodies, CLIENTS, SERVED_S))["requests_s"] * CELLS)
        finally:
            server.terminate()


def _body(names: Any, counts: csr_matrix) -> bytes:
    arrays = {"RNA/indptr": counts.indptr, "RNA/indices": counts.indices, "RNA/data": counts.data}
    return write_npz({REQUEST: json.dumps({"options": {}}).encode(), "RNA/features": names, **arrays})


def measure(folder: Path, cells: int, genes: int, width: int) -> dict[str, Any]:
    """Take cells the whole way; return what it took."""
    h5ad, lake = folder / f"atlas-{cells}-{genes}.h5ad", folder / f"lake-{cells}"
    if not h5ad.exists():
        write_atlas(h5ad.with_suffix(".part"), cells, genes)
        h5ad.with_suffix(".part").rename(h5ad)
    with h5py.File(h5ad) as file:
        nonzeros = file["X/data"].shape[0] / cells
    shutil.rmtree(lake, ignore_errors=True)
    found: dict[str, Any] = {"cells": cells, "nonzeros": nonzeros, "genes": genes, "width": width}
    found["load"] = os.getloadavg()[0]
    found["ingest_s"] = seconds_of(["ingest", "run", str(h5ad), "--lake", str(lake), "--workers", str(CORES), "--json"])
    found["snapshot_s"] = seconds_of(
        ["store", "snapshot", "create", "bench", "--lake", str(lake), "--workers", "0", "--set", "fractions.train=1.0"]
    )
    found["stream_cells_s"] = stream_rate(lake, cells)
    found["lake_bytes"] = bytes_of(lake / "census_data/homo_sapiens/ms/RNA/X")
    found["obs_bytes"] = bytes_of(lake) - bytes_of(lake / "snapshots") - found["lake_bytes"]
    found["snapshot_bytes"] = bytes_of(lake / "snapshots")
    run = folder / f"runs-{cells}" / str(width)
    shutil.rmtree(run.parent, ignore_errors=True)
    run.parent.mkdir()
    run.with_suffix(".toml").write_text(TRAIN.format(lake=lake, output=run.parent, width=width), encoding="utf-8")
    found["plan"] = run.with_suffix(".json")
    found["plan"].write_text(said_by(["train", "plan", str(run.with_suffix(".toml")), "--json"]), encoding="utf-8")
    found["train_cells_s"] = train_rate(run)
    found["serve_cells_s"] = serve_rate(run / "checkpoint", h5ad)
    found["load_after"] = os.getloadavg()[0]
    return found


def predict(size: ModuleType, values: dict[str, float], measured: dict[str, Any]) -> dict[str, float]:
    """Return the same from the costs."""
    ask = size.Ask(
        cells=int(measured["cells"]), nonzeros=measured["nonzeros"], genes=int(measured["genes"]), datasets=1
    )
    node = values | {"node.cores": CORES, "node.efficiency": 1.0}
    found = size.size(ask, node)
    model = size.size(replace(ask, **size.of_plan(measured["plan"])), node)
    return {
        "ingest_s": 3600 * found.ingest.hours,
        "snapshot_s": 3600 * found.snapshot.hours,
        "stream_cells_s": CORES * found.stream_cells_s,
        "train_cells_s": CORES * ask.cells / (3600 * model.train_core_hours),
        "serve_cells_s": model.copy_cells_s,
        "lake_bytes": found.lake_bytes,
        "snapshot_bytes": found.snapshot_bytes,
    }


NAMES = {
    "ingest_s": ("`python -m ingest run`, s", 1.0, False),
    "snapshot_s": ("`python -m store snapshot create`, s", 1.0, False),
    "stream_cells_s": ("stream, tokenized cells/s", 1.0, True),
    "train_cells_s": ("training, cells/s", 1.0, True),
    "serve_cells_s": ("a served copy, cells/s", 1.0, True),
    "lake_bytes": ("X in the lake, MB", 1e6, False),
    "snapshot_bytes": ("snapshot, MB", 1e6, False),
}
"""What each figure is, its unit, and is more of it better?"""


def compared(found: list[tuple[dict[str, Any], dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a line for each size and figure; ratios are above 1 where it took more than was said."""
    lines = []
    for measured, said in found:
        for name, (what, unit, more) in NAMES.items():
            ratio = said[name] / measured[name] if more else measured[name] / said[name]
            lines.append(
                {"cells": measured["cells"], "nonzeros": round(measured["nonzeros"]), "what": what}
                | {"said": said[name] / unit, "measured": measured[name] / unit, "ratio": ratio}
            )
    return lines


def page(found: list[tuple[dict[str, Any], dict[str, float]]], lines: list[dict[str, Any]]) -> str:
    """Write the page."""
    rows = []
    for one in lines:
        figures = f"{one['said']:,.1f} | {one['measured']:,.1f} | {one['ratio']:.2f}"
        rows.append(f"| {one['cells']:,} | {one['nonzeros']:,} | {one['what']} | {figures} |")
    times = [one["ratio"] for one in lines if "MB" not in one["what"]]
    sizes = [one["ratio"] for one in lines if "MB" in one["what"]]
    beside = [f"{one['obs_bytes'] / one['cells']:,.0f} bytes a cell ({one['cells']:,} cells)" for one, _ in found]
    verdict = [
        f"- Times and rates: {min(times):.2f} to {max(times):.2f} of what was said; bytes: {min(sizes):.2f} to "
        f"{max(sizes):.2f}.",
        f"- In the lake beside X (obs, presence, catalog), which the calculator does not count: {', '.join(beside)}.",
    ]
    return PAGE.read_text(encoding="utf-8").format(
        rows="\n".join(rows),
        widths=", ".join(f"{one['width']} ({one['cells']:,} cells)" for one, _ in found),
        loads=", ".join(f"{one['load']:.1f} to {one['load_after']:.1f}" for one, _ in found),
        verdict="\n".join(verdict),
        **machine(),
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="20000:8000:48,80000:36000:96")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "size")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks" / "size.md")
    options = parser.parse_args()
    size = load_size()
    values = size.values_of(size.read_costs())
    found = []
    for words in options.sizes.split(","):
        measured = measure(options.folder.absolute(), *map(int, words.split(":")))
        found.append((measured, predict(size, values, measured)))
        for one in compared(found[-1:]):
            print(
                f"{one['cells']:>9,} {one['what']:>40}: said {one['said']:,.1f}, measured {one['measured']:,.1f}, "
                f"ratio {one['ratio']:.2f}",
                flush=True,
            )
    lines = compared(found)
    options.page.write_text(page(found, lines), encoding="utf-8")
    print(json.dumps({"lines": lines, "loads": [one["load"] for one, _ in found]}))


if __name__ == "__main__":
    main()
