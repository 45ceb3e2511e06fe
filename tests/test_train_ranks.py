"""Ranks by what is unusual of a cell: factors are medians, and a stream divides by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from encoded import add_dataset

from store.errors import UsageError
from store.snapshot import Snapshot, SnapshotSettings, create_snapshot
from store.writer import LakeWriter
from train.ranks import rank_factors
from train.stream import Stream
from train.tokens import SCALE, TokenSettings, make_tokens

RANKED = TokenSettings(budget=12, values="rank", hide=(0.1, 0.4))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    uri = str(tmp_path_factory.mktemp("lakes") / "lake")
    with LakeWriter(uri) as writer:
        add_dataset(writer, "first", 200, {"RNA": 40, "protein": 6})
        add_dataset(writer, "second", 90, {"RNA": 50})
    return create_snapshot(uri, "s", SnapshotSettings(seed=3))


def test_factors_are_the_medians_of_the_cells_that_have_a_feature(snapshot: Snapshot) -> None:
    found = rank_factors(snapshot)
    shares: dict[str, dict[int, list[float]]] = {"RNA": {}, "protein": {}}
    splits = snapshot.cells(["split"])["split"].to_pylist()
    for name, of in shares.items():
        block = snapshot.block(name, 0, snapshot.n_rows)
        for row in np.flatnonzero(np.array(splits) == "train"):
            mine = slice(block.indptr[row], block.indptr[row + 1])
            depth = float(block.counts[mine].sum())
            for feature, count in zip(block.features[mine].tolist(), block.counts[mine].tolist(), strict=True):
                of.setdefault(feature, []).append(count * SCALE / depth)
    for name, of in shares.items():
        expected = [median(of[feature]) if feature in of else 1.0 for feature in range(len(found[name]))]
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    with pytest.raises(UsageError, match="allow more"):
        rank_factors(snapshot, memory_bytes=100)
    some = rank_factors(snapshot, measurements=["RNA"], n_cells=50, block=16, window=64)
    assert list(some) == ["RNA"]
    assert (some["RNA"] > 0).all()


@pytest.mark.parametrize("measurements", [["RNA"], None])
@pytest.mark.parametrize("divided", [False, True])
def test_a_stream_ranks_as_its_cells_are_ranked_one_by_one(
    snapshot: Snapshot, measurements: list[str] | None, divided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = rank_factors(snapshot, measurements=measurements) if divided else None
    words: dict[str, Any] = {"batch": 30, "seed": 5, "block": 20, "window": 3, "measurements": measurements}
    made = list(Stream(snapshot, tokens=RANKED, factors=factors, **words).epoch(0))
    ragged = list(Stream(snapshot, **words).epoch(0))
    names = measurements or ["RNA", "protein"]
    sizes = {name: len(snapshot.vocabulary(name)) for name in names}
    offsets = {"RNA": 1, "protein": 1 + sizes["RNA"]} if len(names) == 2 else {"RNA": 1}
    divisors = None if factors is None else torch.from_numpy(np.concatenate([np.ones(1), *(factors[n] for n in names)]))
    divisors = None if divisors is None else divisors.float()
    monkeypatch.setattr("train.tokens.kernels", None)
    assert len(made) == len(ragged)
    for step, (tokens, cells) in enumerate(zip(made, ragged, strict=True)):
        slow = make_tokens(cells, offsets, RANKED, chance=(5, step), factors=divisors)
        assert torch.equal(tokens.feature_CL, slow.feature_CL)
        assert torch.equal(tokens.value_CL, slow.value_CL)


def test_factors_that_are_not_those_of_the_features_are_refused(snapshot: Snapshot) -> None:
    factors = rank_factors(snapshot)

    def refused(given: dict[str, Any], said: str, **words: Any) -> None:
        with pytest.raises(UsageError, match=said):
            Stream(snapshot, batch=30, factors=given, **({"tokens": RANKED} | words))

    refused(factors, "factors are for ranks", tokens=replace(RANKED, values="bins"))
    refused(factors, "factors are for ranks", tokens=None)
    refused(factors, "no measurement 'protein' is streamed; RNA are", measurements=["RNA"])
    refused({"RNA": factors["RNA"][1:]}, r"\(49,\) of RNA, which has 50 features")
    refused({"RNA": factors["RNA"] * 0}, "some of RNA are not finite numbers above 0")


def test_counts_of_all_sizes_are_ranked_in_one_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from made_cells import whole

    for largest, dtype in ((9, np.uint8), (60_000, np.uint16), (2**24, np.uint32)):
        batch = whole(60, 1, largest, dtype)
        assert batch.counts["RNA"].counts.max() == largest
        settings = TokenSettings(budget=70, values="rank")
        fast = make_tokens(batch, {"RNA": 5}, settings, chance=(1, 2))
        with monkeypatch.context() as patch:
            patch.setattr("train.tokens.kernels", None)
            slow = make_tokens(batch, {"RNA": 5}, settings, chance=(1, 2))
        assert torch.equal(fast.feature_CL, slow.feature_CL), dtype
