"""A million cells the whole way on this machine: seconds, memory and disk of ingestion, snapshot, stream and refresh.

    python tests/bench/bench_scale.py [--files 5 --cells 200000 --genes 36000 --umis 3650] [--folder build/scale]
        [--page FILE]

Files of made-up cells with the shape of an atlas are ingested by one command into one lake, made into one snapshot, and
streamed as tokens for two epochs, each by the command a user would give, with two workers. Then one more file, of a
twentieth as many cells, is ingested and the snapshot refreshed, so that it shows what is read again. Beside each
command its tree of processes is looked at five times a second: memory is what a process has to itself (pages that no
file backs), of the driver, of the largest worker, and of all of them with the object store. It writes
docs/benchmarks/scale.md; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import psutil
from atlas_file import GENES, UMIS, write_atlas
from machine import machine

ROOT = Path(__file__).parent.parent.parent
PAGE = Path(__file__).parent / "scale_page.md"
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
WORKERS = 2
BEAT_S = 0.2


@dataclass
class Used:
    """What a command took: seconds, and the most memory and disk that was seen meanwhile, in MB of 10^6 bytes."""

    seconds: float = 0.0
    driver_mb: float = 0.0
    worker_mb: float = 0.0
    """Of the largest process that is not the driver nor Ray's own."""
    together_mb: float = 0.0
    spill_mb: float = 0.0
    workers: dict[str, float] = field(default_factory=dict)
    """The most of each kind of process."""


def private(process: psutil.Process) -> float:
    """Return the MB that a process has to itself; 0 where it has just ended."""
    try:
        memory = process.memory_info()
        return float(memory.rss - memory.shared) / 1e6
    except psutil.Error:
        return 0.0


def kind(process: psutil.Process) -> str:
    """Return what a process is, as Ray titles it: ``ray::fill``, ``raylet``; a child of a worker by its module."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    text = " ".join(words)
    for own in ("raylet/raylet", "gcs_server", "dashboard", "log_monitor", "runtime_env/agent", "default_worker"):
        if own in text:
            return f"ray's {own.rpartition('/')[2]}"
    return words[0].split("(")[0] if words and words[0].startswith("ray::") else "child" if words else ""


def bytes_of(path: Path) -> int:
    """Return the bytes of the files below a folder, which may change meanwhile."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def watch(pid: int, used: Used, spill: Path | None, ended: threading.Event) -> None:
    """Note the most memory of a tree of processes, and bytes of a folder, until told to end."""
    top = psutil.Process(pid)
    while not ended.wait(BEAT_S):
        try:
            below = top.children(recursive=True)
        except psutil.Error:
            return
        used.driver_mb = max(used.driver_mb, mine := private(top))
        sizes = [(kind(one), private(one)) for one in below]
        for name, size in sizes:
            used.workers[name] = max(used.workers.get(name, 0.0), size)
        ours = [size for name, size in sizes if not name.startswith("ray's")]
        used.worker_mb = max(used.worker_mb, *ours, 0.0)
        store = psutil.disk_usage("/dev/shm").used / 1e6
        used.together_mb = max(used.together_mb, mine + sum(size for _, size in sizes) + store)
        if spill is not None:
            used.spill_mb = max(used.spill_mb, bytes_of(spill) / 1e6)


def run(words: list[str], spill: Path | None = None, given: str = "") -> tuple[Used, str]:
    """Run a command of this Python and watch it; return what it took and what it said on stdout."""
    used, ended = Used(), threading.Event()
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watcher = threading.Thread(target=watch, args=(process.pid, used, spill, ended))
        watcher.start()
        said, complained = process.communicate(given)
        used.seconds = time.perf_counter() - begin
        ended.set()
        watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}:\n{(said + complained)[-3000:]}")
    print(f"{used.seconds:8.1f} s  {' '.join(words)}\n  {asdict(used)}", flush=True)
    return used, said


def write(path: Path, cells: int, genes: int, umis: int, seed: int) -> int:
    """Write a file unless it is there; return its non-zeros."""
    if not path.exists():
        part = path.with_suffix(".part")
        write_atlas(part, cells, genes, seed, umis=umis)
        part.rename(path)
    with h5py.File(path) as file:
        return int(file["X/data"].shape[0])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Take the cells the whole way."""
    folder: Path = options.folder.absolute()
    lake, spill = folder / "lake", folder / "spill"
    for old in (lake, spill):
        shutil.rmtree(old, ignore_errors=True)
    seeds = range(options.files + 1)
    cells = [options.cells] * options.files + [options.files * options.cells // 20]
    files = [folder / f"atlas-{count}-{options.genes}-{options.umis}-{seed}.h5ad" for seed, count in enumerate(cells)]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        several = [[value] * len(files) for value in (options.genes, options.umis)]
        nonzeros = list(pool.map(write, files, cells, *several, seeds))
    given = " ".join(sys.argv[1:])
    command = "make bench-scale" + (f" BENCH='{given}'" if given else "")
    found: dict[str, Any] = {
        "command": command,
        "files": options.files,
        "cells": sum(cells[:-1]),
        "nonzeros": sum(nonzeros[:-1]),
    }
    found |= {"more_cells": cells[-1], "load": os.getloadavg()[0]}
    where = ["--lake", str(lake)]
    ingest = ["-m", "ingest", "run", *where, "--workers", str(WORKERS), "--json"]
    snapshot = ["-m", "store", "snapshot"]
    spilled = ["--workers", str(WORKERS), "--spill", str(spill)]
    found["ingest"], _ = run([*ingest, *map(str, files[:-1])])
    found["lake_mb"] = bytes_of(lake) / 1e6
    found["create"], _ = run([*snapshot, "create", "bench", *where, *spilled, "--set", "fractions.train=1.0"], spill)
    found["snapshot_mb"] = bytes_of(lake / "snapshots") / 1e6
    found["verify"], _ = run([*snapshot, "verify", "bench", *where])
    rate = [str(ROOT / "tests/bench/stream_rate.py"), "tokenized", json.dumps({"lake": str(lake)})]
    found["stream"], said = run(rate, given="1\n1\n")
    found["opened_s"], *found["epochs"] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    found["ingest_more"], _ = run([*ingest, str(files[-1])])
    found["refresh"], _ = run([*snapshot, "refresh", "bench", "bench-2", *where, *spilled], spill)
    found["load_after"] = os.getloadavg()[0]
    return found


def page(found: dict[str, Any]) -> str:
    """Write the page."""
    cells, more = found["cells"], found["more_cells"]
    steps = [
        ("ingest", "`python -m ingest run`", cells),
        ("create", "`python -m store snapshot create`", cells),
        ("verify", "`python -m store snapshot verify`", cells),
        ("stream", "a new process that streams two epochs, tokenized", 2 * cells),
        ("ingest_more", f"`python -m ingest run`, {more:,} more cells", more),
        ("refresh", "`python -m store snapshot refresh`", cells + more),
    ]
    rows = []
    for name, what, n_cells in steps:
        used = found[name]
        memory = f"{used.driver_mb:,.0f} | {used.worker_mb:,.0f} | {used.together_mb:,.0f}"
        rows.append(f"| {what} | {used.seconds:,.0f} | {n_cells / used.seconds:,.0f} | {memory} |")
    return PAGE.read_text(encoding="utf-8").format(
        command=found["command"],
        files=found["files"],
        each=f"{cells // found['files']:,}",
        cells=f"{cells:,}",
        nonzeros=f"{found['nonzeros'] / 1e9:.2f}",
        of_each=f"{found['nonzeros'] / cells:,.0f}",
        loads=f"{found['load']:.1f} and {found['load_after']:.1f}",
        rows="\n".join(rows),
        lake=f"{found['lake_mb'] / 1e3:.1f}",
        snapshot=f"{found['snapshot_mb'] / 1e3:.1f}",
        spill=f"{found['create'].spill_mb / 1e3:.1f}",
        epochs=" and ".join(f"{epoch['cells_s']:,.0f}" for epoch in found["epochs"]),
        tokens=f"{max(epoch['tokens_s'] for epoch in found['epochs']) / 1e6:,.0f}",
        first=f"{found['epochs'][0]['first_batch_s']:.2f}",
        streaming=f"{max(epoch['rss_mb'] for epoch in found['epochs']):,.0f}",
        **machine(),
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5)
    parser.add_argument("--cells", type=int, default=200_000, help="of each file")
    parser.add_argument("--genes", type=int, default=GENES)
    parser.add_argument("--umis", type=int, default=UMIS, help="of a median cell")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "scale")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks" / "scale.md")
    options = parser.parse_args()
    found = measure(options)
    options.page.write_text(page(found), encoding="utf-8")
    print(json.dumps({name: asdict(value) if isinstance(value, Used) else value for name, value in found.items()}))


if __name__ == "__main__":
    main()
