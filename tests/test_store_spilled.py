"""What the driver of a build keeps between the passes: right, and small however many chunks and buckets there are."""

from __future__ import annotations

import base64
import tracemalloc
from typing import Any

import numpy as np
import pytest

from store.part import CODED
from store.spilled import Spilled

N_FEATURES = 70


def record(chunk: int, n_buckets: int) -> dict[str, Any]:
    """A record as tasks of the first pass leave them; every third bucket has no cell of the chunk."""
    rng = np.random.default_rng(chunk)
    buckets = [bucket for bucket in range(n_buckets) if (bucket + chunk) % 3]
    size = rng.integers(1, 2**20, len(buckets))
    used = np.arange(N_FEATURES - chunk % 2) % 5 == chunk % 5
    return {
        "file": f"/spill/{chunk:08d}.arrows",
        "buckets": buckets,
        "where": np.stack([np.cumsum(size) - size, size, rng.integers(0, 2**32, len(buckets))], 1).tolist(),
        "nnz": {"RNA": rng.integers(1, 9, len(buckets)).tolist()} if chunk else {},
        "used": {"RNA": base64.b64encode(np.packbits(used).tobytes()).decode()} if chunk else {},
        "largest": {"RNA": float(chunk)} if chunk else {},
        "integral": {"RNA": chunk != 2} if chunk else {},
        "labels": {field: {f"v{chunk % 2}": {"train": 2, "test": chunk}} for field in CODED},
    }


def test_records_are_summed_up_and_every_bucket_finds_its_shares() -> None:
    records = [record(chunk, 7) for chunk in range(4)]
    spilled = Spilled(4, 7, {"RNA": N_FEATURES})
    for one in records:
        spilled.add(one)
    for bucket in range(7):
        assert spilled.shares(bucket) == [
            (one["file"], *where)
            for one in records
            for number, where in zip(one["buckets"], one["where"], strict=True)
            if number == bucket
        ]
        counted = [dict(zip(one["buckets"], one["nnz"].get("RNA", [0] * 7), strict=False)) for one in records]
        assert spilled.nnz_B["RNA"][bucket] == sum(of.get(bucket, 0) for of in counted)
    assert set(np.flatnonzero(spilled.used_F["RNA"]) % 5) == {1, 2, 3}
    assert (spilled.largest["RNA"], spilled.integral["RNA"]) == (3.0, False)
    assert spilled.labels["tissue"] == {"v0": {"train": 4, "test": 2}, "v1": {"train": 4, "test": 4}}


def test_a_share_takes_a_dozen_bytes() -> None:
    n_chunks, n_buckets = 300, 400
    tracemalloc.start()
    try:
        spilled = Spilled(n_chunks, n_buckets, {"RNA": N_FEATURES})
        for chunk in range(n_chunks):
            spilled.add(record(chunk, n_buckets))
        assert sum(len(spilled.shares(bucket)) for bucket in range(n_buckets)) == n_chunks * n_buckets * 2 // 3
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held == pytest.approx(12 * n_chunks * n_buckets, rel=0.1)
    assert peak < held + 2**20
