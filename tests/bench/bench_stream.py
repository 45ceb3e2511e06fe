"""Speed of the stream against its peers, on the same cells, in one run on one machine.

    python tests/bench/bench_stream.py [--repeat 5] [--cells 60000] [--folder build/bench] [--peers-python ...]

The cells are made up with the shape of a real atlas (``atlas_file``), ingested, and copied into a snapshot; peers get
what they read best: annbatch its pre-shuffled zarr, scDataset the uncompressed h5ad, tiledbsoma-ml the lake's X.
Every contender is a process of its own that stays; passes are taken in turns, ``--repeat`` times; medians are told.
The first pass of each (start-up, compiling, filling of caches) is told apart and not counted. annbatch needs Python
3.12 or newer: ``--peers-python`` is a command that starts one (default: the newest python3.1x found); scDataset
and annbatch are installed beside, into the folder. The last line is one JSON object; charts go to ``docs/images``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from atlas_file import write_atlas

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from store.snapshot import (  # noqa: E402
    Snapshot,
    SnapshotSettings,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
    open_snapshot,
)
from train.plan import SamplePlan  # noqa: E402

EPOCHS = {"tiledbsoma_ml": 1, "scdataset": 2, "annbatch": 4, "warm": 10, "warm tokenized": 6, "memmap": 10}
"""Of a pass; 4 where nothing is said. Every epoch begins anew; what is opened stays open."""
SETTINGS = ("256 16", "1024 16", "512 32", "64 64")
"""annbatch's rows of a chunk and chunks of a buffer; of every peer the best setting is told."""
PEERS = ("annbatch", "scdataset", "tiledbsoma_ml")
ATLAS_PEER = "tiledbsoma_ml 65536"
"""Also measured with the most cells, at what it does when nothing is said."""
LIMITS = dict.fromkeys(("memmap", "sequential_decode"), "#a9cce3")
"""What the same arrays give without plan, order or tokens; drawn in their own colour."""
LATENCIES = (0, 20, 50, 100)
"""Milliseconds that each answer of the S3 server takes; it shares the machine's cores."""
APART_MS = 50
"""Latency with which the server gets a core of its own, and the reader another: nobody's S3 runs on the reader's."""
PLATES = 14


class Contender:
    """A process that takes passes when told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        self.opened = self._answer()

    def one_pass(self, words: str) -> dict[str, float]:
        """Have it take a pass."""
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def prepare(folder: Path, cells: int) -> dict[str, str]:
    """Make h5ad, lake and snapshot unless they are there."""
    h5ad, lake = folder / f"atlas-{cells}.h5ad", folder / f"stream-{cells}"
    if not h5ad.exists():
        write_atlas(h5ad, cells)
    places, built = {"h5ad": str(h5ad), "lake": str(lake)}, folder / f"build-{cells}.json"
    if not built.exists():
        command = [sys.executable, "-m", "ingest", "run", str(h5ad), "--lake", str(lake), "--json"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if "bench" in list_snapshots(str(lake)):
            delete_snapshot(str(lake), "bench")
        begin = time.perf_counter()
        create_snapshot(str(lake), "bench", SnapshotSettings(fractions={"train": 1.0}))
        built.write_text(json.dumps({"cells_s": cells / (time.perf_counter() - begin)}))
    return places


def size_mb(path: Path) -> float:
    """Return the bytes of a file or of all files in a folder, in 10**6."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def peers_environment(folder: Path, python: str | None) -> list[str] | None:
    """Return a command that starts a Python with annbatch; None where there is no Python that it runs on."""
    prefix = shlex.split(python) if python else []
    if not prefix:
        found = [path for minor in (14, 13, 12) if (path := shutil.which(f"python3.{minor}"))]
        prefix = [next((path for path in found if not subprocess.run([path, "-c", ""], check=False).returncode), "")]
    if not prefix[0]:
        return None
    target = folder / "annbatch"
    if not (target / "done").exists():
        pip = [*prefix, "-m", "pip", "install", "-q", "--target", str(target), "annbatch==0.3.1", "zarrs==0.2.3"]
        if subprocess.run(pip, check=False).returncode:
            return None
        (target / "done").touch()
    return [*prefix[:-1], "env", f"PYTHONPATH={target}", prefix[-1]]


def entropy_of(plan: SamplePlan, plate_of_row: Any, world: int, steps: int = 400) -> float:
    """Return the mean entropy of plates in a rank's share of a batch, over that of an ideal permutation's."""
    rng = np.random.default_rng(1)
    ideal_order = rng.permutation(plan.n_rows)
    found, ideal = [], []
    for step in range(min(steps, plan.steps_per_epoch - 1)):
        found.extend(_entropy(plate_of_row[plan.share(step, rank, world).row]) for rank in range(world))
        rows = ideal_order[step * plan.global_batch : (step + 1) * plan.global_batch]
        ideal.extend(_entropy(plate_of_row[rows[rank::world]]) for rank in range(world))
    return float(np.mean(found) / np.mean(ideal))


def _entropy(labels: Any) -> float:
    share = np.bincount(labels, minlength=PLATES) / len(labels)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def shuffle_quality(snapshot: Snapshot) -> dict[str, float]:
    """Measure how well cells are mixed that lie in the lake sorted by plate."""
    joinid = snapshot.cells(["soma_joinid"])["soma_joinid"].to_numpy()
    plate = (joinid * PLATES // len(joinid)).astype(np.int64)
    plan = SamplePlan.of(len(joinid), 256, 0, 2048, 4)
    steps = plan.steps_per_epoch
    orders = [np.concatenate([plan.batch(epoch * steps + step).row for step in range(steps)]) for epoch in range(21)]
    places = [np.argsort(order) for order in orders]
    alike = [np.corrcoef(one, other)[0, 1] for one, other in pairwise(places)]
    return {
        "entropy_ratio": entropy_of(plan, plate, 1),
        "entropy_ratio_of_8_ranks": entropy_of(plan, plate, 8),
        "epoch_correlation": float(np.mean(alike)),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--scale", default="15000,240000", help="other sizes to stream; empty for none")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench")
    parser.add_argument("--peers-python")
    parser.add_argument("--charts", type=Path, default=ROOT / "docs/images")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    places = prepare(folder, options.cells) | {
        name: str(folder / f"{name}-{options.cells}") for name in ("cache", "memmap")
    }
    warm_up = our_contender("tokenized", places)  # compiles the loops, once on a machine
    warm_up.one_pass("1")
    warm_up.close()
    stores = {latency: SlowStore(folder, latency) for latency in LATENCIES}
    remote = {"lake": f"s3://{folder.name}/{Path(places['lake']).name}"}
    found = contenders(folder, places, options.peers_python)
    for latency, store in stores.items():
        found.append((f"s3, {latency} ms", our_contender("tokenized", remote, environment=store.words), "4"))
    rates = run_all(found, options.repeat)
    for store in stores.values():
        store.close()
    apart = SlowStore(folder, APART_MS, core=1)
    rates |= run_all(on_one_core(places, remote, apart), options.repeat)
    apart.close()
    sizes = sorted({options.cells, *(int(word) for word in options.scale.split(",") if word)})
    large = run_all(by_size(folder, sizes), options.repeat)
    scale = {size: large[of_size("tokenized", size)]["cells_s"] for size in sizes}
    answer = summary(folder, places, options.cells, rates, scale)
    atlas_peer = large[of_size(ATLAS_PEER, sizes[-1])]["cells_s"]
    answer |= {
        "tiledbsoma_ml_of_most_cells": round(atlas_peer),
        "tokenized_over_tiledbsoma_ml_of_most_cells": round(scale[sizes[-1]] / atlas_peer, 1),
    }
    draw(options.charts, rates, scale)
    print(json.dumps(answer))


class SlowStore:
    """A server that hands out the benchmark's folder as S3, each answer after a while."""

    def __init__(self, folder: Path, milliseconds: int, core: int | None = None) -> None:
        self.process = subprocess.Popen(
            [*on_core(core), sys.executable, str(HERE / "slow_s3.py"), str(folder.parent), str(milliseconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.words = [
            f"AWS_ENDPOINT_URL=http://127.0.0.1:{self.process.stdout.readline().strip()}",
            *("AWS_ACCESS_KEY_ID=bench", "AWS_SECRET_ACCESS_KEY=bench", "AWS_DEFAULT_REGION=us-east-1"),
        ]

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def on_core(core: int | None) -> list[str]:
    """Return what to put before a command that is to run on one core alone."""
    return [] if core is None else ["taskset", "-c", str(core)]


def our_contender(
    name: str,
    places: dict[str, str],
    python_path: str = "",
    environment: Sequence[str] = (),
    core: int | None = None,
) -> Contender:
    """Start a contender of this environment."""
    command = [
        *on_core(core),
        "env",
        f"PYTHONPATH={python_path}",
        *environment,
        sys.executable,
        str(HERE / "stream_rate.py"),
        name,
        json.dumps(places),
    ]
    return Contender(name, command)


def on_one_core(places: dict[str, str], remote: dict[str, str], store: SlowStore) -> list[tuple[str, Contender, str]]:
    """Start readers of the local disk and of S3 that have one core."""
    far = our_contender("tokenized", remote, environment=store.words, core=0)
    return [
        ("one core", our_contender("tokenized", places, core=0), "4"),
        ("one core, ragged", our_contender("ragged", places, core=0), "4"),
        (f"one core, s3, {APART_MS} ms", far, "4"),
    ]


def contenders(folder: Path, places: dict[str, str], peers_python: str | None) -> list[tuple[str, Contender, str]]:
    """Start all: name, process, and what a pass of it is told."""
    beside = folder / "scdataset"
    if not beside.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(beside), "scdataset==0.3.0"]
        subprocess.run(pip, check=True)
    names = ["tokenized", "ragged", "warm", "warm tokenized", "ragged, one thread", "tokenized, one thread"]
    names += ["ranked"]
    names += ["sequential_decode", "memmap"]
    names += ["tiledbsoma_ml 16384", "tiledbsoma_ml 65536", "scdataset 64 64", "scdataset 256 32"]
    found = [
        (name, our_contender(name, places, str(beside)), str(EPOCHS.get(name, EPOCHS.get(name.split(" ")[0], 4))))
        for name in names
    ]
    peers = peers_environment(folder, peers_python)
    if peers is None:
        print("annbatch is left out: it needs a Python >= 3.12, see --peers-python", flush=True)
        return found
    words = [str(HERE / "annbatch_rate.py"), places["h5ad"], str(folder / f"annbatch-{Path(places['h5ad']).stem}")]
    other = Contender("annbatch", [*peers, *words])
    return [*found, *((f"annbatch {setting}", other, f"{setting} {EPOCHS['annbatch']}") for setting in SETTINGS)]


def by_size(folder: Path, sizes: Sequence[int]) -> list[tuple[str, Contender, str]]:
    """Start our stream of each number of cells, and of the most also the peer that reads the same lake.

    A fetch of that peer is rows from everywhere: how many cells there are beside those of a fetch decides what it
    decodes for nothing, so that its speed with few cells is not the one with many.
    """
    found = [
        (of_size("tokenized", size), our_contender("tokenized", prepare(folder, size)), str(max(1, sizes[-1] // size)))
        for size in sizes
    ]
    peer = our_contender(ATLAS_PEER, prepare(folder, sizes[-1]))
    return [*found, (of_size(ATLAS_PEER, sizes[-1]), peer, "1")]


def of_size(name: str, cells: int) -> str:
    """Name a contender that has so many cells."""
    return f"{name}, {cells:,} cells"


def run_all(found: list[tuple[str, Contender, str]], repeat: int) -> dict[str, dict[str, float]]:
    """Take turns; return the medians of what each pass said."""
    firsts: dict[str, dict[str, float]] = {}
    passes: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(repeat + 1):
        for name, contender, words in found:
            if turn == 0:
                firsts[name] = contender.one_pass(words)
            else:
                passes[name].append(contender.one_pass(words))
    for _, contender, _ in found:
        if contender.process.poll() is None:
            contender.close()
    rates = {}
    for name, taken in passes.items():
        median = {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        spread = [min(one["cells_s"] for one in taken), max(one["cells_s"] for one in taken)]
        rates[name] = median | {"low": spread[0], "high": spread[1], "rss_mb": max(one["rss_mb"] for one in taken)}
        rates[name]["first_batch_s"] = firsts[name]["first_batch_s"]
        print(
            f"{name:>34}: {median['cells_s']:>10,.0f} cells/s ({spread[0]:,.0f} to {spread[1]:,.0f}), "
            f"{rates[name]['rss_mb']:,.0f} MiB, first batch after {rates[name]['first_batch_s']:.2f} s",
            flush=True,
        )
    return rates


def summary(
    folder: Path, places: dict[str, str], cells: int, rates: dict[str, dict[str, float]], scale: dict[int, float]
) -> dict[str, Any]:
    """Put the figures together."""
    speed = {name: rate["cells_s"] for name, rate in rates.items()}
    settings = {}
    for peer in PEERS:
        tried = [(value, name) for name, value in speed.items() if name.startswith(peer)]
        speed[peer], settings[peer] = max(tried) if tried else (0.0, None)
    best = speed["annbatch"]
    lake = Path(places["lake"])
    snapshot = open_snapshot(places["lake"], "bench")
    names = (
        "tokenized",
        "ragged",
        "warm",
        "warm tokenized",
        "tiledbsoma_ml",
        "scdataset",
        "sequential_decode",
        "memmap",
    )
    answer: dict[str, Any] = {name.replace(" ", "_"): round(speed[name]) for name in names}
    answer |= {
        "annbatch": round(best) or None,
        "best_settings": settings,
        "tokenized_over_annbatch": round(speed["tokenized"] / best, 2) if best else None,
        "ragged_over_annbatch": round(speed["ragged"] / best, 2) if best else None,
        "warm_over_annbatch": round(speed["warm"] / best, 2) if best else None,
        "tokenized_over_tiledbsoma_ml": round(speed["tokenized"] / speed["tiledbsoma_ml"], 1),
        "tokenized_over_scdataset": round(speed["tokenized"] / speed["scdataset"], 2),
        "ragged_over_sequential_decode": round(speed["ragged"] / speed["sequential_decode"], 2),
        "warm_over_memmap": round(speed["warm"] / speed["memmap"], 2),
        "tokens_s": round(rates["tokenized"]["tokens_s"]),
        "first_batch_s": round(rates["tokenized"]["first_batch_s"], 2),
        "rss_mb": round(rates["tokenized"]["rss_mb"]),
        "consumer_waits": round(rates["tokenized"]["waited"], 3),
        "s3": {str(latency): round(speed[f"s3, {latency} ms"]) for latency in LATENCIES},
        "s3_50_ms_over_local": round(speed["s3, 50 ms"] / speed["tokenized"], 2),
        "s3_50_ms_over_s3_without_latency": round(speed["s3, 50 ms"] / speed["s3, 0 ms"], 2),
        "s3_50_ms_over_local_on_one_core": round(speed["one core, s3, 50 ms"] / speed["one core"], 2),
        "s3_50_ms_first_batch_s": round(rates["s3, 50 ms"]["first_batch_s"], 2),
        "ranks": round(speed["ranked"]),
        "one_core": {"ragged": round(speed["one core, ragged"]), "tokenized": round(speed["one core"])},
        "one_thread": {name: round(speed[f"{name}, one thread"]) for name in ("ragged", "tokenized")},
        "scale": {str(size): round(rate) for size, rate in sorted(scale.items())},
        "size_mb": {
            "h5ad": round(size_mb(Path(places["h5ad"]))),
            "X": round(size_mb(lake / "census_data/homo_sapiens/ms/RNA/X")),
            "snapshot": round(size_mb(lake / "snapshots/bench")),
        },
        "build_cells_s": round(json.loads((folder / f"build-{cells}.json").read_text())["cells_s"]),
    }
    return answer | {name: round(value, 4) for name, value in shuffle_quality(snapshot).items()}


def draw(folder: Path, rates: dict[str, dict[str, float]], scale: dict[int, float]) -> None:
    """Draw the charts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    shown = sorted(
        (rate["cells_s"] / 1000, name, rate["low"] / 1000, rate["high"] / 1000) for name, rate in rates.items()
    )
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(shown) + 1.2), layout="constrained")
    colours = ["#b0b0b0" if name.startswith(PEERS) else LIMITS.get(name, "#2a6f97") for _, name, _, _ in shown]
    error = [[speed - low for speed, _, low, _ in shown], [high - speed for speed, _, _, high in shown]]
    bars = axes.barh([name for _, name, _, _ in shown], [speed for speed, *_ in shown], xerr=error, color=colours)
    axes.bar_label(bars, [f"{speed:,.1f}" for speed, *_ in shown], padding=8, fontsize=9)
    axes.set_xlabel("thousand cells/s, tokens are 2,048 a cell (median of the passes; lines: lowest and highest)")
    axes.set_title("Streaming the same cells: ours (blue), our arrays read plainly (light), peers (grey)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(folder / "stream.png", dpi=110)
    plt.close(figure)
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    sizes = sorted(scale)
    axes.plot(sizes, [scale[size] / 1000 for size in sizes], "o-", color="#2a6f97")
    axes.set(xscale="log", ylim=(0, 1.15 * max(scale.values()) / 1000))
    axes.set(xlabel="cells in the snapshot", ylabel="tokenized cells/s, thousands")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "stream-scale.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
