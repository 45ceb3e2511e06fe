"""Speed of a server against the bare model, one-by-one answers and ``@serve.batch``, under rising load and beyond.

    python tests/bench/bench_serve.py [--seconds 8] [--turns 3] [--folder build/bench-serve]

One checkpoint (the sizes of ``infra/runs/laptop.toml``, random weights, 2,000 genes) answers ``/v1/embed`` over
loopback HTTP behind the same ingress three times: with our batcher; with Ray Serve's own ``@serve.batch`` of as many
requests as fill our batches; one request at a time. The bare model embeds the same cells in one process, in batches of
the same size. Clients are coroutines of this process that each ask again when they were answered; the contenders take
turns at every number of clients, and again with one cell a request. Then come five times as many requests a second as
were answered at most (an open loop: they come whether or not others were answered), for ``--overload`` seconds. The
last line is one JSON object; a run of three turns or more writes ``docs/benchmarks/serve.md`` and its chart, others
write theirs into the folder. Needs two quiet cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import ray
import ray.serve
from scipy.sparse import csr_matrix
from small_checkpoint import write_checkpoint

from serve.__main__ import free_port
from serve.app import make_app
from serve.batcher import Load
from serve.decode import Cells
from serve.deploy import MAX_ONGOING, RemoteModel, serving
from serve.held import Held, Task, load_predictor
from serve.model import Description, Question
from serve.npz import NPZ, REQUEST, write_npz
from serve.settings import Batching, Limits, ServeSettings

ROOT = Path(__file__).parents[2]
GENES, EXPRESSED, CELLS = 2_000, 300, 16
"""Genes that the model knows, genes that a cell expresses on average, cells in a request."""
CLIENTS = (1, 2, 4, 8, 16, 32)
SMALL_CLIENTS = (1, 8, 32)
"""Clients that ask for one cell at a time."""
BODIES = 64
"""Different requests, which clients send in turn."""
OVERLOAD = 5
FULL_TURNS = 3
QUEUE_S = 1.0
"""Longest wait that a request is let in for, here."""
CONTENDERS = {"ours": "ours", "batch": "`@serve.batch`", "single": "one request at a time"}


def requests(cells: int, seed: int = 0) -> tuple[list[bytes], list[csr_matrix]]:
    """Make bodies of requests for so many cells, and the counts_CG in them."""
    rng, bodies, counts = np.random.default_rng(seed), [], []
    names = np.array([f"ENSG{i:011d}".encode() for i in range(GENES)])
    for _ in range(BODIES):
        matrix = csr_matrix(rng.poisson(0.2 * rng.gamma(0.5, 2, (1, GENES)), (cells, GENES)).astype(np.float32))
        arrays = {
            REQUEST: json.dumps({"options": {}}).encode(),
            "RNA/features": names,
            "RNA/indptr": matrix.indptr,
            "RNA/indices": matrix.indices,
            "RNA/data": matrix.data,
        }
        bodies.append(write_npz(arrays))
        counts.append(matrix)
    return bodies, counts


class Peer:
    """The model behind ``@serve.batch``, or behind a lock."""

    def __init__(self, checkpoint: str, size: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._held = Held(load_predictor(ServeSettings(checkpoint=checkpoint)))
        self._lock = asyncio.Lock()
        self._many.set_max_batch_size(size)

    async def ready(self) -> str:
        """See :class:`serve.model.Model`."""
        return self._held.sha256

    async def describe(self) -> Description:
        """See :class:`serve.model.Model`."""
        return self._held.description

    async def load(self) -> Load:
        """See :class:`serve.model.Model`."""
        return Load(0, 0, 0, 0, 0.0)

    async def ask(self, cells: Cells, question: Question) -> Any:
        """See :class:`serve.model.Model`."""
        return await self._many(cells, question)

    @ray.serve.batch(max_batch_size=1, batch_wait_timeout_s=0.01)
    async def _many(self, cells: list[Cells], questions: list[Question]) -> list[Any]:
        tasks = [
            Task(one.counts, one.prompts, one.n_cells, self._held.predictor, question)
            for one, question in zip(cells, questions, strict=True)
        ]
        async with self._lock:
            return await asyncio.to_thread(self._held.run, tasks)


@ray.serve.ingress()
class PeerIngress:
    """Our HTTP side over a peer."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(RemoteModel(self._model, Limits().timeout_s), Limits())


def start_peer(name: str, checkpoint: Path, size: int) -> None:
    """Deploy a peer beside our application."""
    model = ray.serve.deployment(Peer, max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    ingress = ray.serve.deployment(PeerIngress, max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    logs = ray.serve.schema.LoggingConfig(log_level="WARNING", enable_access_log=False)
    app = ingress.bind(model.bind(str(checkpoint), size))
    ray.serve.run(app, name=name, route_prefix=f"/{name}", logging_config=logs)


async def ask(http: aiohttp.ClientSession, url: str, body: bytes) -> tuple[int, float]:
    """Send one request; return its status and its seconds."""
    begin = time.perf_counter()
    async with http.post(f"{url}/v1/embed", data=body, headers={"Content-Type": NPZ, "Accept": NPZ}) as response:
        await response.read()
        return response.status, time.perf_counter() - begin


async def closed(url: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Let clients ask one request after the other; what began before the warm-up's end is not counted."""
    taken: list[float] = []
    begin = time.perf_counter() + min(2.0, seconds / 4)
    end = begin + seconds

    async def client(number: int) -> None:
        position = number
        while time.perf_counter() < end:
            status, took = await ask(http, url, bodies[position % len(bodies)])
            if status != 200:
                raise RuntimeError(f"{url} answered {status}")
            if begin <= time.perf_counter() < end:
                taken.append(took)
            position += clients

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(client(number) for number in range(clients)))
    return {"requests_s": len(taken) / seconds, "taken": taken}


async def overload(url: str, bodies: list[bytes], rate: float, seconds: float, watched: list[int]) -> dict[str, Any]:
    """Send ``rate`` requests a second whatever comes of them; watch the memory of processes meanwhile."""
    statuses: Counter[int] = Counter()
    accepted: list[float] = []
    refused: list[float] = []
    resident = [memory(watched)]

    async def one(number: int) -> None:
        status, took = await ask(http, url, bodies[number % len(bodies)])
        statuses[status] += 1
        (accepted if status == 200 else refused).append(took)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        begin, pending, number = time.perf_counter(), set(), 0
        while (now := time.perf_counter() - begin) < seconds:
            while number < now * rate:
                task = asyncio.create_task(one(number))
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
            if len(resident) <= now:
                resident.append(memory(watched))
            await asyncio.sleep(0.002)
        await asyncio.gather(*pending)
        begin = time.perf_counter()
        while (await ask(http, url, bodies[0]))[0] != 200:  # how soon a request is answered again
            await asyncio.sleep(0.05)
    resident.append(memory(watched))
    return {
        "sent": number,
        "statuses": dict(statuses),
        "accepted": accepted,
        "refused": refused,
        "recovery_s": time.perf_counter() - begin,
        "rss_growth_mb": (max(resident[1:]) - resident[1]) / 1e6,
        "rss_end_growth_mb": (resident[-1] - resident[1]) / 1e6,
    }


def memory(pids: list[int]) -> int:
    """Return the resident bytes of processes."""
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def servers() -> list[int]:
    """Find the processes of our application and of the proxy."""
    words = ("ServeReplica:somaflow", "ProxyActor")
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any(word in " ".join(process.cmdline()) for word in words)
    ]


def bare(checkpoint: Path, counts: list[csr_matrix], size: int, seconds: float) -> float:
    """Return the cells a second of the model alone, in batches of ``size`` requests."""
    from scipy.sparse import vstack

    predictor = load_predictor(ServeSettings(checkpoint=str(checkpoint)))
    n_features = {name: len(part.feature_id) for name, part in predictor.vocabulary.items()}
    shape = (size * CELLS, n_features["RNA"])
    batches = [
        csr_matrix(vstack([counts[(start + i) % len(counts)] for i in range(size)]), shape=shape)
        for start in range(0, len(counts), size)
    ]
    done, position, begin = 0, 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        cells = predictor.cells({"RNA": batches[position % len(batches)]}, {})
        predictor.embed(cells)
        done += size * CELLS
        position += 1
    return done / (time.perf_counter() - begin)


def p(values: list[float], share: float) -> float:
    """Return a quantile in milliseconds."""
    return float(np.quantile(values, share) * 1e3) if values else float("nan")


def by_clients(taken: dict[str, dict[int, list[float]]], share: float) -> dict[str, dict[str, float]]:
    """Return a quantile in milliseconds for each contender and number of clients."""
    return {name: {str(n): round(p(values, share), 1) for n, values in by.items()} for name, by in taken.items()}


def table(answer: dict[str, Any], what: str, rate: str, p50: str, p99: str) -> list[str]:
    """Write a row for each number of clients: ``what`` a second, p50 and p99, under these keys of the answer."""
    lines = [
        "| clients | " + " | ".join(f"{name}: {what}, p50, p99 (ms)" for name in CONTENDERS.values()) + " |",
        "|---|" + "---|" * len(CONTENDERS),
    ]
    for n in answer[rate]["ours"]:
        row = [", ".join(f"{answer[key][name][n]:,.0f}" for key in (rate, p50, p99)) for name in CONTENDERS]
        lines.append(f"| {n} | " + " | ".join(row) + " |")
    return lines


def measure(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Run everything."""
    import torch

    torch.set_num_threads(1)
    bodies, counts = requests(CELLS)
    small, _ = requests(1)
    predictor = load_predictor(ServeSettings(checkpoint=str(checkpoint)))
    tokens = int(predictor.n_tokens(predictor.cells({"RNA": counts[0]}, {})).max()) * CELLS
    size = max(1, Batching().budget_tokens // tokens)
    settings = ServeSettings(checkpoint=str(checkpoint), port=free_port("127.0.0.1", 0))
    rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in CLIENTS} for name in CONTENDERS}
    taken: dict[str, dict[int, list[float]]] = {name: {n: [] for n in CLIENTS} for name in CONTENDERS}
    small_rates: dict[str, dict[int, list[float]]] = {name: {n: [] for n in SMALL_CLIENTS} for name in CONTENDERS}
    small_taken: dict[str, dict[int, list[float]]] = {name: {n: [] for n in SMALL_CLIENTS} for name in CONTENDERS}
    alone: list[float] = []
    with serving(settings) as url:
        start_peer("batch", checkpoint, size)
        start_peer("single", checkpoint, 1)
        urls = {"ours": url, "batch": f"{url}/batch", "single": f"{url}/single"}
        for turn in range(options.turns):
            for clients in CLIENTS:
                for name in CONTENDERS:
                    found = asyncio.run(closed(urls[name], bodies, clients, options.seconds))
                    rates[name][clients].append(found["requests_s"] * CELLS)
                    taken[name][clients] += found["taken"]
                    print(f"{turn} {clients:3} {name:6} {rates[name][clients][-1]:8.1f} cells/s", flush=True)
            for clients in SMALL_CLIENTS:
                for name in CONTENDERS:
                    found = asyncio.run(closed(urls[name], small, clients, options.seconds))
                    small_rates[name][clients].append(found["requests_s"])
                    small_taken[name][clients] += found["taken"]
                    print(f"{turn} {clients:3} {name:6} {found['requests_s']:8.1f} cells/s, one a request", flush=True)
            alone.append(bare(checkpoint, counts, size, options.seconds))
            print(f"{turn}     bare   {alone[-1]:8.1f} cells/s", flush=True)
        best = max(statistics.median(values) for values in rates["ours"].values())
    impatient = settings.model_copy(update={"port": free_port("127.0.0.1", 0), "batching": Batching(queue_s=QUEUE_S)})
    with serving(impatient) as url:
        asyncio.run(closed(url, bodies, 4, options.seconds))  # so that it knows its speed
        beyond = asyncio.run(overload(url, bodies, OVERLOAD * best / CELLS, options.overload, servers()))
    found = {"rates": rates, "taken": taken, "bare": alone, "overload": beyond}
    return found | {"small_rates": small_rates, "small_taken": small_taken, "size": size, "tokens": tokens}


def summary(found: dict[str, Any], options: argparse.Namespace, load: float) -> dict[str, Any]:
    """Return what the last line says."""
    rates = {name: {n: statistics.median(values) for n, values in by.items()} for name, by in found["rates"].items()}
    saturated = {name: max(by.values()) for name, by in rates.items()}
    beyond = found["overload"]
    bare_cells_s = statistics.median(found["bare"])
    return {
        "ours_cells_s": round(saturated["ours"], 1),
        "bare_cells_s": round(bare_cells_s, 1),
        "serve_batch_cells_s": round(saturated["batch"], 1),
        "one_by_one_cells_s": round(saturated["single"], 1),
        "ours_over_bare": round(saturated["ours"] / bare_cells_s, 3),
        "p50_ms": round(p(found["taken"]["ours"][1], 0.5), 1),
        "p99_ms": round(p(found["taken"]["ours"][1], 0.99), 1),
        "overload_p50_ms": round(p(beyond["accepted"], 0.5), 1),
        "overload_p99_ms": round(p(beyond["accepted"], 0.99), 1),
        "overload_429_share": round(beyond["statuses"].get(429, 0) / max(1, sum(beyond["statuses"].values())), 3),
        "overload_statuses": {str(status): n for status, n in sorted(beyond["statuses"].items())},
        "overload_429_p99_ms": round(p(beyond["refused"], 0.99), 1),
        "overload_accepted_cells_s": round(len(beyond["accepted"]) * CELLS / options.overload, 1),
        "recovery_s": round(beyond["recovery_s"], 2),
        "rss_growth_mb": round(beyond["rss_growth_mb"], 1),
        "rss_end_growth_mb": round(beyond["rss_end_growth_mb"], 1),
        "cells_s": {name: {str(n): round(rate, 1) for n, rate in by.items()} for name, by in rates.items()},
        "p50_by_clients_ms": by_clients(found["taken"], 0.5),
        "p99_by_clients_ms": by_clients(found["taken"], 0.99),
        "small_requests_s": {
            name: {str(n): round(statistics.median(v), 1) for n, v in by.items()}
            for name, by in found["small_rates"].items()
        },
        "small_p50_ms": by_clients(found["small_taken"], 0.5),
        "small_p99_ms": by_clients(found["small_taken"], 0.99),
        "queue_s": QUEUE_S,
        "tokens_of_a_request": found["tokens"],
        "requests_of_a_batch": found["size"],
        "turns": options.turns,
        "seconds": options.seconds,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_before": round(load, 1),
        },
        "versions": {name: version(name) for name in ("ray", "torch", "fastapi")},
    }


def page(answer: dict[str, Any], seconds: float) -> str:
    """Write the page."""
    statuses = ", ".join(f"{n:,} times {status}" for status, n in answer["overload_statuses"].items())
    over_batch, over_single = (
        answer["ours_cells_s"] / answer[f"{name}_cells_s"] for name in ("serve_batch", "one_by_one")
    )
    machine, versions = answer["machine"], ", ".join(f"{name} {one}" for name, one in answer["versions"].items())
    lines = [
        "# Serving",
        "",
        f"Written by `make bench-serve`. `/v1/embed` over loopback HTTP, {CELLS} cells a request as npz; each "
        f"expresses some {EXPRESSED} of {GENES:,} genes ({answer['tokens_of_a_request']:,} tokens a request); the "
        "model of `infra/runs/laptop.toml` with random weights on one CPU thread; clients run on the same two "
        "cores. "
        f"`@serve.batch` waits 10 ms for up to {answer['requests_of_a_batch']} requests, as many as fill our batches. "
        f"Clients ask again when they are answered. Medians of {answer['turns']} turns of {seconds:g} s, contenders in "
        "turns; p50 and p99 over all turns.",
        "",
        *table(answer, "cells/s", "cells_s", "p50_by_clients_ms", "p99_by_clients_ms"),
        "",
        "One cell a request, where the way to the model costs more than the model:",
        "",
        *table(answer, "requests/s", "small_requests_s", "small_p50_ms", "small_p99_ms"),
        "",
        "![Cells a second and p99 by clients](../images/serve.png)",
        "",
        f"- The bare model embeds {answer['bare_cells_s']:,.0f} cells/s in one process; at saturation the whole way "
        f"over HTTP gives {answer['ours_over_bare']:.2f} of it.",
        f"- At their best numbers of clients {over_batch:.2f} times the cells/s of `@serve.batch`, "
        f"{over_single:.2f} times those of one request at a time.",
        f"- {OVERLOAD} times as many requests as can be answered, `batching.queue_s` = {answer['queue_s']:g}: "
        f"{statuses}. Accepted ones take {answer['overload_p50_ms']:,.0f} ms (p50) and "
        f"{answer['overload_p99_ms']:,.0f} ms (p99; {answer['p99_ms']:,.0f} ms for a client alone), refused ones "
        f"{answer['overload_429_p99_ms']:,.0f} ms (p99); {answer['overload_accepted_cells_s']:,.0f} cells/s are "
        f"answered meanwhile. Memory of proxy, ingress and model grows by {answer['rss_growth_mb']:.0f} MB at most "
        f"after the first second, {answer['rss_end_growth_mb']:.0f} MB at the end; "
        f"{answer['recovery_s']:.2f} s later a request is answered again.",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores; load before the start {machine['load_before']}. "
        f"{versions}.",
        "",
    ]
    return "\n".join(lines)


def draw(path: Path, answer: dict[str, Any]) -> None:
    """Draw cells a second and p99 over clients."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, what), color, marker in zip(CONTENDERS.items(), ("#0072B2", "#D55E00", "#009E73"), "osD", strict=True):
        label = what.replace("`", "")
        for axis, values in zip(axes, (answer["cells_s"], answer["p99_by_clients_ms"]), strict=True):
            axis.plot(CLIENTS, [values[name][str(n)] for n in CLIENTS], color=color, marker=marker, ms=4, label=label)
    axes[0].axhline(answer["bare_cells_s"], color="#555555", ls="--", lw=1, label="the bare model")
    for axis, what in zip(axes, ("cells a second", "p99 of an answer (ms)"), strict=True):
        axis.set(xscale="log", xlabel="clients", ylabel=what, ylim=(0, None))
        axis.set_xticks(CLIENTS, [str(n) for n in CLIENTS], minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="counted seconds at each number of clients")
    parser.add_argument("--turns", type=int, default=FULL_TURNS)
    parser.add_argument("--overload", type=float, default=60, help="seconds of it")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench-serve")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    folder: Path = options.folder.absolute()
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "manifest.json").exists():
        write_checkpoint(checkpoint, width=64, tokens=128, n_genes=GENES)
    answer = summary(measure(options, checkpoint), options, load)
    docs = ROOT / "docs" if options.turns >= FULL_TURNS else folder
    draw(docs / "images/serve.png", answer)
    (docs / "benchmarks").mkdir(exist_ok=True)
    (docs / "benchmarks/serve.md").write_text(page(answer, options.seconds), encoding="utf-8")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
