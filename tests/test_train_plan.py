"""The sample plan: every row once per epoch, the same order for any number of ranks, one integer of state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.plan import RowOrder, SamplePlan

plans = st.builds(
    lambda part, lanes, **words: SamplePlan.of(window=part * lanes, lanes=lanes, **words),
    n_rows=st.integers(1, 400),
    global_batch=st.integers(1, 70),
    seed=st.integers(0, 5),
    block=st.integers(1, 50),
    part=st.integers(1, 3),
    lanes=st.integers(1, 4),
)


def epoch_rows(plan: SamplePlan, epoch: int, rank: int = 0, world: int = 1) -> list[int]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [int(row) for step in steps for row in plan.share(step, rank, world).row]


@settings(deadline=None)
@given(plan=plans, epoch=st.integers(0, 3), world=st.integers(1, 8))
def test_every_row_comes_exactly_once_per_epoch_over_all_ranks(plan: SamplePlan, epoch: int, world: int) -> None:
    rows = [row for rank in range(world) for row in epoch_rows(plan, epoch, rank, world)]
    assert sorted(rows) == list(range(plan.n_rows))


@settings(deadline=None)
@given(plan=plans, step=st.integers(0, 60), world=st.integers(1, 8))
def test_a_step_holds_the_same_rows_at_any_number_of_ranks_that_differ_by_one_row_at_most(
    plan: SamplePlan, step: int, world: int
) -> None:
    shares = [plan.share(step, rank, world) for rank in range(world)]
    assert Counter(np.concatenate([share.row for share in shares]).tolist()) == Counter(plan.batch(step).row.tolist())
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@settings(deadline=None)
@given(plan=plans, step=st.integers(0, 60))
def test_a_batch_mixes_no_more_than_a_window_and_is_full_but_at_the_end(plan: SamplePlan, step: int) -> None:
    epoch, number = plan.epoch_of(step)
    expected = min(plan.global_batch, plan.n_rows - number * plan.global_batch)
    assert len(plan.batch(step)) == expected
    order = plan.orders[0]
    assert sum(len(order.window_order((epoch, w))) for w in range(order.n_windows)) == plan.n_rows


def test_epochs_have_orders_of_their_own_and_a_seed_repeats_them() -> None:
    plan = SamplePlan.of(5000, 64, seed=3, block=50, window=10)
    first, second = np.array(epoch_rows(plan, 0)), np.array(epoch_rows(plan, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(5000))[0, 1]) < 0.15
    assert epoch_rows(SamplePlan.of(5000, 64, seed=3, block=50, window=10), 0) == first.tolist()
    assert epoch_rows(SamplePlan.of(5000, 64, seed=4, block=50, window=10), 0) != first.tolist()


def test_the_order_is_written_down_for_one_small_plan() -> None:
    """A changed order would make old runs unrepeatable: this is the order of version 1."""
    plan = SamplePlan.of(10, 4, seed=1, block=3, window=2)
    assert [plan.batch(step).row.tolist() for step in range(3)] == [[2, 4, 5, 0], [1, 3, 7, 9], [8, 6]]


def blocks(plan: SamplePlan, epoch: int, number: int, rank: int, world: int, source: int = 0) -> list[int]:
    order, window = plan.orders[source], (epoch, number)
    return order.blocks(window, plan.lanes_of(source, window, rank, world)).tolist()


@settings(deadline=None)
@given(plan=plans, epoch=st.integers(0, 2), world=st.integers(1, 8))
def test_a_rank_is_told_every_block_that_it_needs(plan: SamplePlan, epoch: int, world: int) -> None:
    order = plan.orders[0]
    for rank in range(world):
        told = [block for number in range(order.n_windows) for block in blocks(plan, epoch, number, rank, world)]
        assert len(told) == len(set(told))
        assert {row // order.block for row in epoch_rows(plan, epoch, rank, world)} <= set(told)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_with_lanes_a_rank_reads_its_part_and_no_more(world: int) -> None:
    plan = SamplePlan.of(64 * 100, 64, seed=2, block=100, window=16, lanes=8)
    windows = range(plan.orders[0].n_windows)
    read = [sum(len(blocks(plan, 0, number, rank, world)) for number in windows) for rank in range(world)]
    assert read == [64 // world] * world


def test_lanes_mix_a_batch_as_well_and_must_divide_the_window() -> None:
    label = np.arange(6400) // 100 % 16  # each block has one label
    plan = SamplePlan.of(6400, 64, seed=2, block=100, window=16, lanes=8)
    kinds = [len(set(label[plan.batch(step).row].tolist())) for step in range(plan.steps_per_epoch)]
    assert np.mean(kinds) > 9
    with pytest.raises(ValueError, match="lanes=3 does not divide window=16"):
        SamplePlan.of(10, 4, window=16, lanes=3)


several = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 20), st.integers(1, 3)), min_size=2, max_size=4)


def mixed(sizes: list[tuple[int, int, int]], batch: int, shares: tuple[int, ...] = (), lanes: int = 1) -> SamplePlan:
    orders = (RowOrder(n, 3, block, part * lanes, lanes, k) for k, (n, block, part) in enumerate(sizes))
    return SamplePlan(tuple(orders), batch, 3, shares)


@settings(deadline=None)
@given(
    sizes=several, batch=st.integers(1, 40), lanes=st.integers(1, 3), epoch=st.integers(0, 2), world=st.integers(1, 5)
)
def test_parts_by_their_rows_come_once_each_in_every_epoch_and_every_batch_has_its_share_of_each(
    sizes: list[tuple[int, int, int]], batch: int, lanes: int, epoch: int, world: int
) -> None:
    plan = mixed(sizes, batch, lanes=lanes)
    found: Counter[tuple[int, int]] = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        shares = [plan.share(step, rank, world) for rank in range(world)]
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        for share in shares:
            found.update(zip(share.source.tolist(), share.row.tolist(), strict=True))
        for source, (n, *_) in enumerate(sizes):
            there = sum(int((share.source == source).sum()) for share in shares)
            assert abs(there - sum(lengths) * n / plan.n_rows) < len(sizes)
    assert found == Counter({(source, row): 1 for source, (n, *_) in enumerate(sizes) for row in range(n)})


@settings(deadline=None)
@given(sizes=several, batch=st.integers(1, 40), shares=st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_shares_hold_over_any_stretch_and_each_source_goes_round_by_itself(
    sizes: list[tuple[int, int, int]], batch: int, shares: list[int]
) -> None:
    mine = tuple(shares[: len(sizes)])
    plan = mixed(sizes, batch, mine)
    rows = [plan.batch(step) for step in range(30)]
    source = np.concatenate([part.source for part in rows])
    for number, (n, *_) in enumerate(sizes):
        place = np.sort(np.concatenate([part.place[part.source == number] for part in rows]))
        assert place.tolist() == list(range(len(place)))
        assert abs(len(place) - len(source) * mine[number] / sum(mine)) < len(sizes)
        counts = Counter(np.concatenate([part.row[part.source == number] for part in rows]).tolist())
        assert len(place) < n or max(counts.values()) - min(counts[row] for row in range(n)) <= 1


@settings(deadline=None)
@given(sizes=several, batch=st.integers(1, 40), lanes=st.integers(1, 3), world=st.integers(1, 5))
def test_of_several_sources_too_a_rank_is_told_every_block_that_it_needs(
    sizes: list[tuple[int, int, int]], batch: int, lanes: int, world: int
) -> None:
    plan = mixed(sizes, batch, lanes=lanes)
    for rank in range(world):
        mine = [plan.share(step, rank, world) for step in range(plan.steps_per_epoch)]
        for source, order in enumerate(plan.orders):
            told = {b for number in range(order.n_windows) for b in blocks(plan, 0, number, rank, world, source)}
            needed = {row // order.block for part in mine for row in part.row[part.source == source].tolist()}
            assert needed <= told


@settings(deadline=None)
@given(n_rows=st.integers(1, 60), block=st.integers(1, 9), window=st.integers(1, 5), n_places=st.integers(0, 130))
def test_so_many_places_lie_in_at_most_so_many_windows_and_somewhere_in_as_many(
    n_rows: int, block: int, window: int, n_places: int
) -> None:
    order = RowOrder(n_rows, block=block, window=window)
    passed = [len(order.pieces(first, first + n_places)) for first in range(2 * n_rows)]
    assert max(passed) == order.most_windows(n_places)


sources = st.lists(
    st.tuples(st.integers(1, 120), st.integers(1, 9), st.integers(0, 2**30)), min_size=1, max_size=5
)  # rows, block, share


@settings(deadline=None, max_examples=300)
@given(made=sources, by_rows=st.booleans(), window=st.integers(1, 4), batch=st.integers(1, 90), steps=st.integers(1, 9))
def test_steps_that_are_made_together_need_no_more_windows_of_a_source_than_there_is_room_for(
    made: list[tuple[int, int, int]], by_rows: bool, window: int, batch: int, steps: int
) -> None:
    orders = tuple(RowOrder(n_rows, 0, block, window, 1, number) for number, (n_rows, block, _) in enumerate(made))
    shares = tuple(share for *_, share in made)
    plan = SamplePlan(orders, batch, 0, shares if sum(shares) and not by_rows else ())
    for first in range(3 * plan.steps_per_epoch):
        begun, ended = plan.spans(first), plan.spans(first + steps - 1)
        for number, order in enumerate(orders):
            room = order.most_windows(plan.most_rows(number, steps))
            assert len(order.pieces(begun[number][0], ended[number][1])) <= room


@pytest.mark.parametrize("shares", [(), (1, 3)])
def test_a_batch_of_more_rows_than_there_are_needs_no_more_room_than_one_of_all(shares: tuple[int, ...]) -> None:
    orders = (RowOrder(40, 0, 8, 1), RowOrder(60, 0, 8, 1, 1, 1))
    one, many = (SamplePlan(orders, batch, 0, shares) for batch in (100, 10**6))
    assert [many.most_rows(n, steps) for n in (0, 1) for steps in (1, 2)] == [
        one.most_rows(n, steps) for n in (0, 1) for steps in (1, 2)
    ]
