"""Rates of streaming the same cells: ours in several ways, and the peers that run in this environment.

usage: stream_rate.py KIND PLACES, where PLACES is a JSON object of paths and KIND one of ``KINDS``; then one line of
standard input for each pass, whose number of epochs it says; each is answered by one JSON line.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256
BUDGET = 2048


def _stream(places: dict[str, str], *, tokens: bool, values: Any = "log1p", **words: Any) -> Any:
    from store.snapshot import open_snapshot
    from train.stream import Stream
    from train.tokens import TokenSettings

    # every token of a cell up to the budget, by chance: what is hidden would be work that is not done
    settings = TokenSettings(budget=BUDGET, hide=(0.0, 0.0), drop_measurement=0.0, values=values)
    snapshot = open_snapshot(places["lake"], "bench")
    return Stream(snapshot, batch=BATCH, tokens=settings if tokens else None, **words)


def _ours(places: dict[str, str], *, tokens: bool = False, **words: Any) -> Callable[[int], Iterator[tuple[int, int]]]:
    stream = _stream(places, tokens=tokens, **words)
    epochs = count()

    def one_pass(n_epochs: int) -> Iterator[tuple[int, int]]:
        for epoch in islice(epochs, n_epochs):  # each begins anew, as in a training script
            for batch in stream.epoch(epoch, start=0):
                if tokens:
                    yield batch.feature_CL.shape[0], batch.feature_CL.numel()
                else:
                    yield batch.n_cells, 0

    return one_pass


def _sequential(places: dict[str, str]) -> Callable[[int], Iterator[tuple[int, int]]]:
    """Decode the snapshot's arrays from the first to the last row in two threads, and look at nothing."""
    from store.snapshot import open_snapshot

    part = open_snapshot(places["lake"], "bench").parts[0]
    indptr = part.indptr("RNA", 0, part.n_rows)
    room = int(np.diff(indptr[::1024]).max(initial=0)) * 2
    free = [[np.zeros(room, part.dtype("RNA", name)) for name in ("features", "counts")] for _ in range(2)]

    def read(start: int) -> tuple[int, int]:
        stop = min(start + 1024, part.n_rows)
        first, size = int(indptr[start]), int(indptr[stop] - indptr[start])
        room = free.pop()
        part.read_into("RNA", first, *(buffer[:size] for buffer in room))
        free.append(room)
        return stop - start, 0

    def one_pass(n_epochs: int) -> Iterator[tuple[int, int]]:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(n_epochs):
                yield from threads.map(read, range(0, part.n_rows, 1024))

    return one_pass


def _memmap(places: dict[str, str]) -> Callable[[int], Iterator[tuple[int, int]]]:
    """Gather shuffled batches from decoded arrays that are mapped from a file, in two threads: the machine's limit."""
    from store.snapshot import open_snapshot
    from train import kernels

    snapshot, folder = open_snapshot(places["lake"], "bench"), Path(places["memmap"])
    indptr = snapshot.parts[0].indptr("RNA", 0, snapshot.n_cells)
    if not folder.exists():
        folder.mkdir(parents=True)
        block = snapshot.block("RNA", 0, snapshot.n_cells)
        block.features.tofile(folder / "features")
        block.counts.tofile(folder / "counts")
        del block
    mapped = [np.memmap(folder / name, snapshot.parts[0].dtype("RNA", name), "r") for name in ("features", "counts")]
    rng = np.random.default_rng(0)
    room = int(np.diff(indptr).max()) * BATCH
    free = [[np.zeros(room, part.dtype) for part in mapped] for _ in range(2)]

    def gather(rows: Any) -> tuple[int, int]:
        lengths = np.diff(indptr)[rows]
        out = free.pop()
        kernels.gather(indptr[rows], lengths, *mapped, np.cumsum(lengths) - lengths, *out)
        free.append(out)
        return len(rows), 0

    def one_pass(n_epochs: int) -> Iterator[tuple[int, int]]:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(n_epochs):
                order = rng.permutation(snapshot.n_cells)
                yield from threads.map(gather, np.array_split(order, -(-len(order) // BATCH)))

    return one_pass


def _tiledbsoma_ml(places: dict[str, str], fetched: int) -> Callable[[int], Iterator[tuple[int, int]]]:
    """tiledbsoma-ml from the lake's X, shuffled, sparse, so many rows a fetch (65,536 is its default)."""
    import tiledbsoma
    import tiledbsoma_ml

    def one_pass(n_epochs: int) -> Iterator[tuple[int, int]]:
        for _ in range(n_epochs):
            with tiledbsoma.Experiment.open(f"{places['lake']}/census_data/homo_sapiens") as experiment:
                query = experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery())
                data = tiledbsoma_ml.ExperimentDataset(
                    query, layer_name="raw", batch_size=BATCH, io_batch_size=fetched, shuffle=True, return_sparse_X=True
                )
                for x, _ in tiledbsoma_ml.experiment_dataloader(data):
                    yield x.shape[0], 0

    return one_pass


def _scdataset(places: dict[str, str], block: int, fetched: int) -> Callable[[int], Iterator[tuple[int, int]]]:
    """scDataset from the uncompressed h5ad, in blocks of so many rows, so many batches a fetch."""
    import anndata
    import h5py
    from scdataset import BlockShuffling, scDataset

    class Rows:
        """The h5ad's X as a collection that has a length."""

        def __init__(self) -> None:
            self.matrix = anndata.io.sparse_dataset(h5py.File(places["h5ad"])["X"])

        def __len__(self) -> int:
            return int(self.matrix.shape[0])

    data = scDataset(
        Rows(),
        BlockShuffling(block_size=block),
        batch_size=BATCH,
        fetch_factor=fetched,
        fetch_callback=lambda rows, indices: rows.matrix[np.asarray(indices)],
    )

    def one_pass(n_epochs: int) -> Iterator[tuple[int, int]]:
        for x in chain.from_iterable(data for _ in range(n_epochs)):
            yield x.shape[0], 0

    return one_pass


KINDS: dict[str, Callable[[dict[str, str]], Callable[[int], Iterator[tuple[int, int]]]]] = {
    "tokenized": lambda places: _ours(places, tokens=True),
    "ragged": _ours,
    "ranked": lambda places: _ours(places, tokens=True, values="rank"),
    "ragged, one thread": lambda places: _ours(places, threads=1),
    "tokenized, one thread": lambda places: _ours(places, tokens=True, threads=1),
    "warm": lambda places: _ours(places, cache=places["cache"]),
    "warm tokenized": lambda places: _ours(places, tokens=True, cache=places["cache"]),
    "sequential_decode": _sequential,
    "memmap": _memmap,
    "tiledbsoma_ml 16384": partial(_tiledbsoma_ml, fetched=16_384),
    "tiledbsoma_ml 65536": partial(_tiledbsoma_ml, fetched=65_536),
    "scdataset 64 64": partial(_scdataset, block=64, fetched=64),
    "scdataset 256 32": partial(_scdataset, block=256, fetched=32),
}


def peak_mb() -> float:
    """Return the most memory this process ever had; ``ru_maxrss`` would count what it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def timed(batches: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Take all batches and say how fast they came and how long was waited for them."""
    begin = time.perf_counter()
    first, waited, cells, tokens = 0.0, 0.0, 0, 0
    asked = begin
    for n_cells, n_tokens in batches:
        now = time.perf_counter()
        waited += now - asked
        first = first or now - begin
        cells += n_cells
        tokens += n_tokens
        asked = time.perf_counter()
    seconds = time.perf_counter() - begin
    return {
        "cells": cells,
        "cells_s": cells / seconds,
        "tokens_s": tokens / seconds,
        "first_batch_s": first,
        "waited": waited / seconds,
        "rss_mb": peak_mb(),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    import torch

    torch.set_num_threads(1)
    begin = time.perf_counter()
    one_pass = KINDS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({"opened_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(one_pass(int(line)))), flush=True)
