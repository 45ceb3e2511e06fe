"""Rates of annbatch over an h5ad, for ``bench_stream``; runs in an environment of its own (it needs Python >= 3.12).

usage: annbatch_rate.py H5AD FOLDER, then one line of standard input for each pass: CHUNK PRELOAD EPOCHS; each is
answered by one JSON line. The pre-shuffled copy is made in FOLDER once, with annbatch's defaults.
"""

import json
import re
import sys
import time
from functools import cache
from pathlib import Path

import annbatch
import zarr

zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 2})


def copy(h5ad: str, folder: Path) -> float:
    """Make the pre-shuffled copy unless it is there; return the seconds it took, 0 when it was there."""
    done = folder / "done"
    if done.exists():
        return 0.0
    begin = time.perf_counter()
    annbatch.DatasetCollection(zarr.open_group(str(folder / "collection.zarr"), mode="w")).add_adatas([h5ad])
    done.touch()
    return time.perf_counter() - begin


@cache
def opened(folder: Path, chunk: int, preload: int) -> annbatch.Loader:
    """Return a loader with these settings, the same for all passes."""
    loader = annbatch.Loader(chunk_size=chunk, preload_nchunks=preload, batch_size=256, shuffle=True, to=None)
    return loader.use_collection(annbatch.DatasetCollection(zarr.open_group(str(folder / "collection.zarr"))))


def one_pass(folder: Path, chunk: int, preload: int, epochs: int) -> dict[str, float]:
    """Read every cell so many times, shuffled, in batches of 256."""
    loader = opened(folder, chunk, preload)
    begin = time.perf_counter()
    first, cells = 0.0, 0
    for _ in range(epochs):
        for batch in loader:
            first = first or time.perf_counter() - begin
            cells += batch["X"].shape[0]
    seconds = time.perf_counter() - begin
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return {"cells": cells, "cells_s": cells / seconds, "first_batch_s": first, "rss_mb": peak}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"copy_s": copy(sys.argv[1], target)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(one_pass(target, *map(int, line.split()))), flush=True)
