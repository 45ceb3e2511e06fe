"""Speed and memory of an ingestion against ``tiledbsoma.io.from_h5ad``, in one run on one machine.

    python tests/bench/bench_ingest.py [--cells 60000] [--scale 15000,60000,240000] [--folder build/bench]

Both take the same h5ad (made here once, see ``atlas_file``) to a new store on the same disk, each as a command of its
own, with all its start-up; they take turns, ``--repeat`` times, and medians are told. Memory is the peak of the summed
proportional set sizes (PSS) of the processes that touch the data: for us Ray's workers and their readers, for
``from_h5ad`` its one process. Then the two X are read in contiguous rows, in turns, and compared with the file.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import psutil
import pyarrow as pa
import tiledbsoma
from atlas_file import write_atlas

ROOT = Path(__file__).parent.parent.parent
WORKERS = 2
READ_ROWS = 4096


class Memory(threading.Thread):
    """Samples the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peak_mb, self.peak_all_mb = 0.0, 0.0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.2):
            data, everything = 0, 0
            for process in [self.root, *self._children()]:
                try:
                    used = process.memory_full_info().pss
                    words = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                everything += used
                if "ray::" in words or "ingest.sandbox" in words or "from_h5ad" in words:
                    data += used
            self.peak_mb = max(self.peak_mb, data / 2**20)
            self.peak_all_mb = max(self.peak_all_mb, everything / 2**20)

    def _children(self) -> list[psutil.Process]:
        try:
            return self.root.children(recursive=True)
        except psutil.Error:
            return []

    def stop(self) -> None:
        self._end.set()
        self.join()


def timed(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, the peak MiB of what touches data, and that of all its processes."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    memory = Memory(process.pid)
    memory.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - begin
    memory.stop()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return seconds, memory.peak_mb, memory.peak_all_mb


def ours(path: Path, store: Path) -> tuple[float, float, float]:
    """Ingest with two Ray workers."""
    shutil.rmtree(store, ignore_errors=True)
    return timed(
        [sys.executable, "-m", "ingest", "run", str(path), "--lake", str(store), "--workers", str(WORKERS), "--json"]
    )


def theirs(path: Path, store: Path) -> tuple[float, float, float]:
    """Ingest with ``tiledbsoma.io.from_h5ad``."""
    shutil.rmtree(store, ignore_errors=True)
    script = f"import tiledbsoma.io as io; io.from_h5ad({str(store)!r}, {str(path)!r}, measurement_name='RNA')"
    return timed([sys.executable, "-c", script])


def read_rows(x_uri: Path, starts: list[int]) -> float:
    """Read blocks of contiguous rows; return rows a second."""
    begin = time.perf_counter()
    with tiledbsoma.SparseNDArray.open(str(x_uri)) as layer:
        for start in starts:
            for _ in layer.read((slice(start, start + READ_ROWS - 1),)).tables():
                pass
    return len(starts) * READ_ROWS / (time.perf_counter() - begin)


def same_counts(path: Path, x_uri: Path, rows: list[int]) -> None:
    """Stop unless a store's rows are those of the file."""
    with h5py.File(path) as file, tiledbsoma.SparseNDArray.open(str(x_uri)) as layer:
        indptr = file["X/indptr"][:]
        for row in rows:
            here = slice(int(indptr[row]), int(indptr[row + 1]))
            found = layer.read((slice(row, row),)).tables().concat().sort_by("soma_dim_1")
            if not np.array_equal(found["soma_dim_1"], file["X/indices"][here]) or not np.array_equal(
                found["soma_data"], file["X/data"][here]
            ):
                sys.exit(f"{x_uri}: row {row} differs from the file")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--scale", default="15000,60000,240000", help="sizes to show that cost grows linearly")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args()

    def atlas(n_cells: int) -> Path:
        path = options.folder / f"atlas-{n_cells}.h5ad"
        if not path.exists():
            print(f"making {path}", flush=True)
            write_atlas(path.with_suffix(".part"), n_cells)
            path.with_suffix(".part").rename(path)
        return path

    path = atlas(options.cells)
    mine, other = options.folder / "ours", options.folder / "theirs"
    runs: dict[str, list[tuple[float, float, float]]] = {"ours": [], "from_h5ad": []}
    for number in range(options.repeat):
        for name, run, store in (("ours", ours, mine), ("from_h5ad", theirs, other)):
            runs[name].append(run(path, store))
            seconds, peak, whole = runs[name][-1]
            speed = options.cells / seconds
            print(
                f"{number} {name:10} {seconds:7.1f} s {speed:8,.0f} cells/s {peak:7,.0f} MiB ({whole:,.0f} in all)",
                flush=True,
            )
    x_mine, x_other = mine / "census_data/homo_sapiens/ms/RNA/X/raw", other / "ms/RNA/X/data"
    rng = np.random.default_rng(0)
    rows = sorted(rng.integers(0, options.cells, 20).tolist())
    same_counts(path, x_mine, rows)
    same_counts(path, x_other, rows)
    starts = [int(start) for start in rng.integers(0, options.cells - READ_ROWS, 6)]
    reads = [(read_rows(x_mine, starts), read_rows(x_other, starts)) for _ in range(5)]
    size = {
        name: sum(file.stat().st_size for file in at.rglob("*") if file.is_file())
        for name, at in (("ours", x_mine), ("from_h5ad", x_other))
    }
    scale = {}
    for n_cells in [int(text) for text in options.scale.split(",") if text]:
        seconds, peak, _ = ours(atlas(n_cells), options.folder / "scale")
        scale[n_cells] = {"seconds": round(seconds, 1), "cells_s": round(n_cells / seconds), "peak_mb": round(peak)}
        print(f"scale {n_cells:,}: {seconds:.1f} s, {n_cells / seconds:,.0f} cells/s, {peak:,.0f} MiB", flush=True)
    median = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    result = {
        "cells": options.cells,
        "cpus": os.cpu_count(),
        "workers": WORKERS,
        "ours_cells_s": round(options.cells / median["ours"][0]),
        "from_h5ad_cells_s": round(options.cells / median["from_h5ad"][0]),
        "ours_peak_mb": round(median["ours"][1]),
        "from_h5ad_peak_mb": round(median["from_h5ad"][1]),
        "ours_peak_all_processes_mb": round(median["ours"][2]),
        "speed_ratio": round(median["from_h5ad"][0] / median["ours"][0], 2),
        "memory_ratio": round(median["ours"][1] / median["from_h5ad"][1], 3),
        "read_ratio": round(statistics.median(a / b for a, b in reads), 2),
        "ours_read_cells_s": round(statistics.median(a for a, _ in reads)),
        "from_h5ad_read_cells_s": round(statistics.median(b for _, b in reads)),
        "x_bytes": size,
        "scale": scale,
        "tiledbsoma": tiledbsoma.__version__,
        "pyarrow": pa.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
