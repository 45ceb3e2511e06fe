"""Tokens: right values, nothing hidden in them, and chance that belongs to the cell and not to its company."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import on_gpu
import pytest
import torch
from made_cells import OF, OFFSETS, cells, whole

from train import kernels
from train.cells import PROMPTS, Cells
from train.tokens import CRUTCHES, SCALE, Tokens, TokenSettings, drawn, make_tokens, pack, units


def seen(tokens: Tokens, cell: int) -> dict[int, float]:
    valid = tokens.valid_CL[cell]
    return dict(zip(tokens.feature_CL[cell][valid].tolist(), tokens.value_CL[cell][valid].tolist(), strict=True))


def reference(batch: Cells, cell: int) -> dict[int, float]:
    """Values worked out one by one."""
    out = {}
    for name, offset in OFFSETS.items():
        part = batch.counts[name]
        mine = slice(part.indptr[cell], part.indptr[cell + 1])
        depth = sum(part.counts[mine].tolist())
        for feature, count in zip(part.features[mine].tolist(), part.counts[mine].tolist(), strict=True):
            out[offset + feature] = float(np.log1p(count / depth * SCALE))
    return out


def test_inference_sees_every_value_within_the_budget() -> None:
    batch = cells()
    tokens = make_tokens(batch, OFFSETS, TokenSettings(budget=100))
    for cell in range(batch.n_cells):
        assert seen(tokens, cell) == pytest.approx(reference(batch, cell), rel=1e-6)


def test_inference_fills_a_small_budget_with_the_strongest_values_and_no_chance() -> None:
    batch = cells()
    tokens = make_tokens(batch, OFFSETS, TokenSettings(budget=5))
    for cell in range(batch.n_cells):
        mine, everything = seen(tokens, cell), reference(batch, cell)
        assert len(mine) == min(5, len(everything))
        assert sorted(mine.values()) == pytest.approx(sorted(everything.values())[-len(mine) :], rel=1e-6)
    alone = make_tokens(batch.take(np.array([7])), OFFSETS, TokenSettings(budget=5))
    assert seen(alone, 0) == seen(tokens, 7)


def test_masks_belong_to_the_cell_and_the_step_not_to_the_batch() -> None:
    batch, settings = cells(), TokenSettings(budget=100)
    whole = make_tokens(batch, OFFSETS, settings, chance=(1, 5))
    part = make_tokens(batch.take(np.array([30, 2, 11])), OFFSETS, settings, chance=(1, 5))
    for position, cell in enumerate((30, 2, 11)):
        assert seen(part, position) == seen(whole, cell)
        assert part.prompt_CF[position].tolist() == whole.prompt_CF[cell].tolist()
    other = make_tokens(batch, OFFSETS, settings, chance=(1, 6))
    assert any(seen(other, cell) != seen(whole, cell) for cell in range(batch.n_cells))


def test_about_the_right_share_is_hidden_and_dropped() -> None:
    batch, settings = cells(3000), TokenSettings(budget=100)
    tokens = make_tokens(batch, OFFSETS, settings, chance=(0, 0))
    total = sum(part.indptr[-1] for part in batch.counts.values())
    shown = float(tokens.valid_CL.sum()) / total
    assert shown == pytest.approx(0.8 * 0.4, abs=0.02)  # 1 - mean hidden share .6, measurements kept .8
    dropped = (tokens.prompt_CF == 0).float().mean(0)
    expected = [0.5 if name in CRUTCHES else 0.15 for name in PROMPTS]
    assert dropped.tolist() == pytest.approx(expected, abs=0.03)
    assert float((tokens.perturbation_CT[:, 0] == 0).float().mean()) == pytest.approx(0.15, abs=0.03)
    assert float(tokens.measured_CM.float().mean()) == pytest.approx(0.8, abs=0.02)


def test_a_matched_cell_lends_its_counts_and_not_its_prompts() -> None:
    batch = cells()
    lender = batch.take(np.roll(np.arange(batch.n_cells), 1))
    tokens = make_tokens(batch, OFFSETS, TokenSettings(budget=100), seen=lender)
    assert seen(tokens, 5) == pytest.approx(reference(batch, 4), rel=1e-6)


def test_the_hash_is_uniform_and_independent_of_neighbouring_keys_and_salts() -> None:
    draws = units(drawn(np.arange(20000), np.array([[0], [1], [2**40]], np.uint64)))
    for line in draws:
        histogram = np.histogram(line, bins=20, range=(0, 1))[0]
        assert ((histogram - 1000) ** 2 / 1000).sum() < 60  # chi-squared, 19 degrees of freedom: p < 1e-5 beyond
        assert abs(np.corrcoef(line[:-1], line[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.03


@pytest.mark.parametrize(("largest", "dtype"), [(9, np.uint8), (3000, np.uint16)])
@pytest.mark.parametrize("budget", [1, 40, 90, 500])
@pytest.mark.parametrize("hide", [(0.0, 0.0), (0.2, 0.9), (1.0, 1.0)])
@pytest.mark.parametrize("chance", [None, (3, 17)])
def test_the_compiled_way_equals_torch(
    largest: int,
    dtype: type[np.generic],
    budget: int,
    hide: tuple[float, float],
    chance: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = whole(60, 1, largest, dtype)
    settings = TokenSettings(budget=budget, hide=hide)
    fast = make_tokens(batch, {"RNA": 5}, settings, chance=chance)
    monkeypatch.setattr("train.tokens.kernels", None)
    slow = make_tokens(batch, {"RNA": 5}, settings, chance=chance)
    assert torch.equal(fast.feature_CL, slow.feature_CL)
    assert torch.equal(fast.value_CL, slow.value_CL)
    for name in ("measured_CM", "prompt_CF", "perturbation_CT", "row_C", "valid_CL", "measurement_CL"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert torch.equal(fast.log_depth_CM, slow.log_depth_CM)
    torch.testing.assert_close(fast.number_CF, slow.number_CF, equal_nan=True)
    if chance is None or hide == (0.0, 0.0):
        kept = (fast.feature_CL > 0).sum(1).numpy()
        shown = fast.measured_CM[:, 0].numpy()
        assert (kept == np.where(shown, np.minimum(np.diff(batch.counts["RNA"].indptr), budget), 0)).all()


@pytest.mark.parametrize("spread", ["even", "tied", "narrow", "skewed", "equal"])
@pytest.mark.parametrize("even", [True, False])
def test_a_budget_keeps_the_greatest_draws_however_they_are_spread(spread: str, even: bool) -> None:
    rng = np.random.default_rng(0)
    hist = np.empty(256, np.int32)
    for n in (2, 9, 300, 2500):
        draws = {
            "even": rng.integers(0, 2**32, n),
            "tied": rng.integers(0, 4, n) * 2**30 + 5,
            "narrow": rng.integers(2**31, 2**31 + 400, n),
            "skewed": (rng.random(n) ** 9 * (2**32 - 1)).astype(np.int64),
            "equal": np.full(n, 2**32 - 1),
        }[spread].astype(np.uint32)
        for budget in {1, n // 3, n - 1} - {0}:
            for low in (0, int(np.quantile(draws, 0.4)), int(draws.max())):
                border, tied = kernels._lowest_kept(draws, n, np.uint32(low), draws.max(), budget, even, hist)
                reached = int((draws >= border).sum())
                if (draws >= low).sum() <= budget:
                    assert border == low
                    assert not tied
                elif tied:
                    assert reached > budget > (draws > border).sum()
                else:
                    assert reached == budget


def several(n_cells: int) -> Cells:
    """Cells of three measurements with whole counts of different types; no cell of the third was measured."""
    batch = whole(n_cells, 1, 3000, np.uint16)
    other = whole(n_cells, 2, 9, np.uint8)
    return replace(
        batch,
        counts={"RNA": batch.counts["RNA"], "protein": other.counts["RNA"], "ATAC": other.counts["RNA"]},
        measured={**batch.measured, "protein": np.arange(n_cells) % 5 != 0, "ATAC": np.zeros(n_cells, bool)},
    )


@pytest.mark.parametrize("values", ["log1p", "bins", "rank"])
@pytest.mark.parametrize("budget", [1, 40, 150, 900])
@pytest.mark.parametrize("chance", [None, (3, 17)])
@pytest.mark.parametrize("with_factors", [False, True])
def test_the_compiled_way_of_several_measurements_bins_and_ranks_equals_torch(
    values: str, budget: int, chance: tuple[int, int] | None, with_factors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = several(60)
    offsets = {"RNA": 1, "protein": 401, "ATAC": 801}
    settings = TokenSettings(budget=budget, values=values, bins=7, hide=(0.1, 0.8))  # type: ignore[arg-type]
    factors = torch.rand(1201, generator=torch.Generator().manual_seed(0)) + 0.5 if with_factors else None
    fast = make_tokens(batch, offsets, settings, chance=chance, factors=factors)
    monkeypatch.setattr("train.tokens.kernels", None)
    slow = make_tokens(batch, offsets, settings, chance=chance, factors=factors)
    assert torch.equal(fast.feature_CL, slow.feature_CL)
    assert torch.equal(fast.value_CL, slow.value_CL)
    assert fast.firsts == slow.firsts
    for name in ("measured_CM", "prompt_CF", "perturbation_CT", "row_C", "measurement_CL"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert torch.equal(fast.log_depth_CM, slow.log_depth_CM)


def test_tokens_move_to_another_device_whole() -> None:
    tokens = make_tokens(cells(), OFFSETS, TokenSettings(budget=20))
    moved = tokens.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.firsts == tokens.firsts
    assert torch.equal(tokens.to("cpu").feature_CL, tokens.feature_CL)


def test_each_token_of_a_deep_cell_is_chosen_as_often_as_any_other() -> None:
    one = replace(whole(5, 2, 9, np.uint8).take(np.array([1])), row=np.array([77]), measured={"RNA": np.ones(1, bool)})
    settings = TokenSettings(budget=50, hide=(0.0, 0.0), drop_measurement=0.0)
    chosen: Counter[int] = Counter()
    for step in range(2000):
        chosen.update(make_tokens(one, {"RNA": 1}, settings, chance=(0, step)).feature_CL[0].tolist())
    n_features = int(one.counts["RNA"].indptr[1])
    expected = 2000 * 50 / n_features
    assert len(chosen) == n_features
    spread = np.sqrt(expected * (1 - 50 / n_features))
    assert max(abs(times - expected) for times in chosen.values()) < 5 * spread


def counts_of(batch: Cells, cell: int) -> dict[int, float]:
    part = batch.counts["RNA"]
    mine = slice(part.indptr[cell], part.indptr[cell + 1])
    return dict(zip((part.features[mine].astype(int) + 1).tolist(), part.counts[mine].tolist(), strict=True))


def test_bins_are_the_quantiles_of_a_cells_own_counts() -> None:
    batch = whole(20, 4, 500, np.uint16)
    tokens = make_tokens(batch, {"RNA": 1}, TokenSettings(budget=400, values="bins", bins=10))
    for cell in np.flatnonzero(batch.measured["RNA"]):
        counts = counts_of(batch, cell)
        expected = {
            feature: 1 + 10 * sum(other < count for other in counts.values()) // len(counts)
            for feature, count in counts.items()
        }
        assert seen(tokens, cell) == expected


def test_ranks_go_from_the_highest_normalised_count_down() -> None:
    batch = whole(20, 5, 500, np.uint16)
    factors = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 4, 401)).float()
    settings = TokenSettings(budget=25, values="rank")
    tokens = make_tokens(batch, {"RNA": 1}, settings, factors=factors)
    for cell in np.flatnonzero(batch.measured["RNA"]):
        counts = counts_of(batch, cell)
        total = sum(counts.values())
        expected = sorted(counts, key=lambda feature: (-counts[feature] / total / float(factors[feature]), feature))
        valid = tokens.valid_CL[cell]
        assert tokens.feature_CL[cell][valid].tolist() == expected[:25]
        assert tokens.value_CL[cell][valid].tolist() == list(range(min(25, len(expected))))


def test_packing_leaves_out_the_padding_and_keeps_within_the_budget() -> None:
    tokens = make_tokens(whole(40, 6, 9, np.uint8), {"RNA": 1}, TokenSettings(budget=80))
    length = tokens.valid_CL.sum(1).tolist()
    (everything,) = pack(tokens)
    assert everything.cu_seqlens.tolist() == [0, *np.cumsum(length).tolist()]
    assert everything.longest == max(length)
    pieces = pack(tokens, budget=200)
    assert [cell for piece in pieces for cell in range(*piece.cells)] == list(range(40))
    assert all(len(piece.feature_N) <= 200 for piece in pieces)
    assert all(len(a.feature_N) + length[b.cells[0]] > 200 for a, b in pairwise(pieces))
    for piece in pieces:
        for number, cell in enumerate(range(*piece.cells)):
            mine = slice(*piece.cu_seqlens[number : number + 2].tolist())
            assert dict(zip(piece.feature_N[mine].tolist(), piece.value_N[mine].tolist(), strict=True)) == seen(
                tokens, cell
            )
    assert len(pack(tokens, budget=1)) == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("values", ["log1p", "bins", "rank"])
@pytest.mark.parametrize("chance", [None, (3, 17)])
@pytest.mark.parametrize("counts", OF)
def test_tokens_made_on_cuda_are_those_made_on_cpu(values: Any, chance: tuple[int, int] | None, counts: str) -> None:
    on_gpu.tokens(torch.device("cuda"), counts, values, chance)


@pytest.mark.parametrize(
    "asked",
    [{"budget": 0}, {"bins": 0}, {"hide": (0.9, 0.1)}, {"hide": (0.0, 1.5)}, {"drop_prompt": 2.0}, {"values": "bin"}],
)
def test_settings_that_make_no_tokens_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(asked))):
        TokenSettings(**asked)


def test_whole_tokens_hide_nothing() -> None:
    whole = TokenSettings.whole(7, values="bins")
    assert (whole.budget, whole.values, whole.hide) == (7, "bins", (0.0, 0.0))
    assert not whole.drop_measurement + whole.drop_prompt + whole.drop_cell_type
