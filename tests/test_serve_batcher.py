"""The batcher against a model that only sleeps and counts."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batcher import Batcher, Piece, _Job, cut
from serve.errors import DeadlineExceeded, Overloaded, Unavailable


class Recorder:
    """A model that doubles numbers, remembers its batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, payloads: list[int]) -> list[int]:
        self.batches.append(payloads)
        self.started.set()
        assert self.go.wait(10)
        if any(payload < 0 for payload in payloads):
            raise ValueError("negative")
        return [2 * payload for payload in payloads]

    def hold(self) -> None:
        self.started.clear()
        self.go.clear()


class Clock:
    """Tells the seconds that it is told."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@contextmanager
def running(
    model: Callable[[list[int]], list[int]],
    budget: int = 100,
    queue: int = 1_000,
    queue_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Batcher]:
    batcher: Batcher[int, int] = Batcher(model, budget_tokens=budget, queue_tokens=queue, queue_s=queue_s, clock=clock)
    try:
        yield batcher
    finally:
        batcher.close(5)


def ask(
    batcher: Batcher,
    *payloads: int,
    rows: int = 1,
    longest: int = 10,
    key: str | None = "embed",
    timeout_s: float = 5.0,
    waited_s: float = 0.0,
):
    pieces = [Piece(payload, rows, longest) for payload in payloads]
    return asyncio.ensure_future(batcher.submit(pieces, key=key, timeout_s=timeout_s, waited_s=waited_s))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def held(batcher: Batcher, model: Recorder) -> asyncio.Future:
    """Occupy the model with one job, so that what follows has to wait."""
    model.hold()
    first = ask(batcher, 0)
    await until(model.started.is_set)
    return first


def test_results_come_in_the_order_of_the_pieces() -> None:
    async def scenario() -> None:
        with running(Recorder(), budget=20) as batcher:
            assert await ask(batcher, *range(50)) == [2 * number for number in range(50)]

    asyncio.run(scenario())


def test_a_lone_request_runs_at_once_and_requests_that_gather_share_a_batch() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model) as batcher:
            first = await held(batcher, model)
            others = [ask(batcher, number) for number in (1, 2, 3)]
            await until(lambda: batcher.load().waiting_jobs == 3)
            model.go.set()
            assert await asyncio.gather(first, *others) == [[0], [2], [4], [6]]
        assert model.batches == [[0], [1, 2, 3]]

    asyncio.run(scenario())


def test_a_batch_never_exceeds_the_budget_with_its_padding() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model, budget=60) as batcher:
            first = await held(batcher, model)
            jobs = [ask(batcher, 1, longest=10), ask(batcher, 2, longest=30), ask(batcher, 3, longest=10)]
            await until(lambda: batcher.load().waiting_jobs == 3)
            model.go.set()
            await asyncio.gather(first, *jobs)
        assert model.batches == [[0], [1, 2], [3]]  # 3 cells padded to 30 tokens would cost 90

    asyncio.run(scenario())


def test_a_piece_larger_than_the_budget_runs_alone() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model, budget=20) as batcher:
            first = await held(batcher, model)
            jobs = [ask(batcher, 1, longest=500), ask(batcher, 2)]
            await until(lambda: batcher.load().waiting_jobs == 2)
            model.go.set()
            assert await asyncio.gather(first, *jobs) == [[0], [2], [4]]
        assert model.batches == [[0], [1], [2]]

    asyncio.run(scenario())


def test_a_large_request_does_not_block_a_small_one() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model, budget=20) as batcher:
            first = await held(batcher, model)
            large = ask(batcher, *range(100, 120))
            await until(lambda: batcher.load().waiting_jobs == 1)
            small = ask(batcher, 1)
            await until(lambda: batcher.load().waiting_jobs == 2)
            model.go.set()
            await asyncio.gather(first, large, small)
        assert 1 in model.batches[1]

    asyncio.run(scenario())


def test_no_request_starves_while_others_keep_coming() -> None:
    async def scenario() -> None:
        with running(Recorder(), budget=20) as batcher:
            large = ask(batcher, *range(20), longest=20)
            rounds = 0
            while not large.done():
                await ask(batcher, 1, longest=1)
                rounds += 1
            assert rounds < 100

    asyncio.run(scenario())


def test_jobs_of_different_keys_never_share_a_batch_and_no_key_means_alone() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model) as batcher:
            first = await held(batcher, model)
            jobs = [ask(batcher, 1, key="a"), ask(batcher, 2, key="b"), ask(batcher, 3, key="a")]
            jobs.append(ask(batcher, 4, 5, key=None))
            await until(lambda: batcher.load().waiting_jobs == 4)
            model.go.set()
            await asyncio.gather(first, *jobs)
        assert sorted(model.batches) == [[0], [1, 3], [2], [4], [5]]

    asyncio.run(scenario())


def test_what_waits_is_bounded_in_tokens_and_the_refusal_says_when_to_come_back() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model, queue=50) as batcher:
            first = await held(batcher, model)
            accepted = ask(batcher, 1, 2, 3, 4, 5)
            await until(lambda: batcher.load().waiting_tokens == 50)
            with pytest.raises(Overloaded, match="50 tokens wait already") as refused:
                await ask(batcher, 6)
            assert 1 <= refused.value.retry_after_s <= 30
            model.go.set()
            await asyncio.gather(first, accepted)
            assert await ask(batcher, 6) == [12]

    asyncio.run(scenario())


def test_the_bound_in_seconds_counts_the_batch_that_runs_and_the_way_here() -> None:
    async def scenario() -> None:
        model, now = Recorder(), Clock()
        batcher: Batcher[int, int] = Batcher(model, budget_tokens=40, queue_tokens=10_000, queue_s=10, clock=now)
        try:
            model.hold()
            first = ask(batcher, 1, longest=40)
            await until(model.started.is_set)
            now.seconds = 4  # so that the speed is 10 tokens a second
            model.go.set()
            assert await first == [2]
            model.hold()
            running = ask(batcher, 1, longest=40)  # 4 s
            await until(model.started.is_set)
            waiting = [ask(batcher, 1), ask(batcher, 2, longest=40)]  # 5 s: the last is done after 9
            with pytest.raises(Overloaded, match="this request adds 20, beyond the 60 allowed now"):
                await ask(batcher, 3, longest=20)
            waiting.append(ask(batcher, 4))  # 10 s
            await asyncio.sleep(0)
            now.seconds += 2
            with pytest.raises(Overloaded) as refused:
                await ask(batcher, 5, waited_s=2)  # it would be done 12 s after it came
            assert refused.value.full_s == 1
            waiting.append(ask(batcher, 5, waited_s=1))
            model.go.set()
            assert await asyncio.gather(running, *waiting) == [[2], [2], [4], [8], [10]]
        finally:
            model.go.set()
            batcher.close(5)

    asyncio.run(scenario())


@pytest.mark.parametrize("full_first", [False, True])
def test_questions_of_one_cell_do_not_make_the_model_look_slow(full_first: bool) -> None:
    """Each pass takes a second besides 10 ms a token."""

    def model(payloads: list[int]) -> list[int]:
        began.set()
        assert go.wait(10)
        now.seconds += 1 + 0.01 * sum(payloads)
        return payloads

    async def scenario() -> None:
        with running(model, budget=100, queue_s=10, clock=now) as batcher:
            if full_first:
                await ask(batcher, *[10] * 10, longest=10)
            for _ in range(30):
                await ask(batcher, 1, longest=1)
            assert batcher.load().tokens_per_s == (50 if full_first else 0)  # 100 tokens take 2 s
            began.clear()
            go.clear()
            running_one = ask(batcher, 1, longest=1)
            await until(began.is_set)
            waiting = [ask(batcher, 1, longest=1), ask(batcher, *[10] * 30, longest=10)]  # 1 s and 7 s
            await until(lambda: batcher.load().waiting_tokens == 301)
            if full_first:
                with pytest.raises(Overloaded):
                    await ask(batcher, *[10] * 30, longest=10)
            go.set()
            await asyncio.gather(running_one, *waiting)

    now, began, go = Clock(), threading.Event(), threading.Event()
    go.set()
    asyncio.run(scenario())


def test_a_refusal_says_when_there_is_room_also_where_all_that_may_wait_is_little() -> None:
    async def scenario() -> None:
        model, now = Recorder(), Clock()
        with running(model, budget=1_000, queue=50, clock=now) as batcher:
            for known in (False, True):
                first = await held(batcher, model)
                waiting = [ask(batcher, number) for number in range(1, 6)]
                await until(lambda: batcher.load().waiting_tokens == 50)
                with pytest.raises(Overloaded) as refused:
                    await ask(batcher, 6)
                assert (refused.value.full_s > 0) == known
                now.seconds += 2  # 10 tokens
                model.go.set()
                await asyncio.gather(first, *waiting)

    asyncio.run(scenario())


def test_small_questions_between_the_pieces_of_a_large_one_count_by_their_time() -> None:
    def model(payloads: list[int]) -> list[int]:
        began.set()
        assert go.wait(10)
        now.seconds += 0.1 if payloads[0] < 0 else 2
        return payloads

    async def scenario() -> None:
        with running(model, budget=100, queue=10_000, clock=now) as batcher:
            large = ask(batcher, *range(3), longest=100)
            await until(began.is_set)
            small = [ask(batcher, -1, longest=1, key=None) for _ in range(10)]
            await until(lambda: batcher.load().waiting_jobs == 11)
            go.set()
            await asyncio.gather(large, *small)
            await until(lambda: batcher.load().batches == 13)
            assert 40 < batcher.load().tokens_per_s <= 50  # 310 tokens took 7 s

    now, began, go = Clock(), threading.Event(), threading.Event()
    asyncio.run(scenario())


def test_the_bound_in_seconds_holds_where_small_questions_never_share_a_batch() -> None:
    def model(payloads: list[int]) -> list[int]:
        began.set()
        assert go.wait(10)
        now.seconds += 1
        return payloads

    async def scenario() -> None:
        with running(model, budget=100, queue_s=10, clock=now) as batcher:
            go.clear()
            jobs = [ask(batcher, number, longest=1, key=None) for number in range(3)]
            await until(lambda: batcher.load().waiting_jobs == 2)
            go.set()
            await asyncio.gather(*jobs)
            began.clear()
            go.clear()
            jobs = [ask(batcher, 0, longest=1, key=None)]
            await until(began.is_set)  # it takes 1 s
            jobs += [ask(batcher, number, longest=1, key=None) for number in range(9)]
            await until(lambda: batcher.load().waiting_jobs == 9)
            with pytest.raises(Overloaded):
                await ask(batcher, 9, longest=1, key=None)
            go.set()
            await asyncio.gather(*jobs)

    now, began, go = Clock(), threading.Event(), threading.Event()
    asyncio.run(scenario())


def test_a_batch_that_fails_at_once_is_no_speed() -> None:
    def model(payloads: list[int]) -> list[int]:
        if min(payloads) < 0:
            raise ValueError("negative")
        now.seconds += 4
        return payloads

    async def scenario() -> None:
        with running(model, budget=40, clock=now) as batcher:
            await ask(batcher, 1, longest=40)
            for _ in range(3):
                with pytest.raises(ValueError, match="negative"):
                    await ask(batcher, -1, longest=40)
            await until(lambda: batcher.load().batches == 4)
            assert batcher.load().tokens_per_s == 10

    now = Clock()
    asyncio.run(scenario())


def test_a_job_that_ends_while_the_batcher_closes_is_told_one_thing() -> None:
    """Whoever comes second finds the first in the middle of telling."""
    errors: list[BaseException] = []

    def closing() -> None:
        try:
            batcher._finish(job, Unavailable("closed"))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    other = threading.Thread(target=closing)

    class Told(Future[list[int]]):
        def set_running_or_notify_cancel(self) -> bool:
            going_on = super().set_running_or_notify_cancel()
            if not other.ident:
                other.start()
                other.join(0.3)  # as long as the other is kept out
            return going_on

    with running(Recorder()) as batcher:
        job = _Job(None, deque(), {}, 1, Told())
        batcher._finish(job, [7])
        other.join(5)
    assert (errors, job.future.result(0)) == ([], [7])


def test_a_job_larger_than_the_whole_queue_is_taken_when_nothing_waits() -> None:
    async def scenario() -> None:
        with running(Recorder(), queue=50) as batcher:
            assert len(await ask(batcher, *range(20))) == 20

    asyncio.run(scenario())


def test_cancelled_requests_are_dropped_and_give_back_their_room() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model) as batcher:
            first = await held(batcher, model)
            gone = ask(batcher, 1, 2)
            await until(lambda: batcher.load().waiting_tokens == 20)
            gone.cancel()
            await until(lambda: batcher.load().waiting_tokens == 0)
            model.go.set()
            assert await first == [0]
            assert await ask(batcher, 3) == [6]
        assert model.batches == [[0], [3]]

    asyncio.run(scenario())


def test_a_request_past_its_deadline_is_dropped() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model) as batcher:
            first = await held(batcher, model)
            with pytest.raises(DeadlineExceeded, match=r"within 0.05 s"):
                await ask(batcher, 1, timeout_s=0.05)
            model.go.set()
            await first
            assert await ask(batcher, 2) == [4]
        assert [1] not in model.batches

    asyncio.run(scenario())


def test_a_failing_request_fails_alone() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model) as batcher:
            first = await held(batcher, model)
            jobs = [ask(batcher, 1), ask(batcher, -1, 4), ask(batcher, 2)]
            await until(lambda: batcher.load().waiting_jobs == 3)
            model.go.set()
            await first
            assert await jobs[0] == [2]
            with pytest.raises(ValueError, match="negative"):
                await jobs[1]
            assert await jobs[2] == [4]
            assert batcher.load().waiting_tokens == 0

    asyncio.run(scenario())


def test_closing_finishes_what_waits_and_refuses_what_comes() -> None:
    async def scenario() -> None:
        model = Recorder()
        with running(model) as batcher:
            jobs = [ask(batcher, number) for number in range(5)]
            await until(lambda: bool(model.batches))
            await asyncio.to_thread(batcher.close, 5)
            assert await asyncio.gather(*jobs) == [[0], [2], [4], [6], [8]]
            with pytest.raises(Unavailable):
                await ask(batcher, 6)

    asyncio.run(scenario())


def test_one_thread_owns_the_model() -> None:
    names = set()

    def model(payloads: list[int]) -> list[int]:
        names.add(threading.current_thread().name)
        return payloads

    async def scenario() -> None:
        with running(model, budget=10) as batcher:
            await asyncio.gather(*(ask(batcher, number) for number in range(30)))

    asyncio.run(scenario())
    assert names == {"model"}


def test_under_load_batches_fill_while_the_model_works() -> None:
    sizes = []

    def model(payloads: list[int]) -> list[int]:
        sizes.append(len(payloads))
        time.sleep(0.02)
        return payloads

    async def scenario() -> None:
        with running(model, budget=1_000, queue=100_000) as batcher:
            await asyncio.gather(*(ask(batcher, number) for number in range(200)))

    asyncio.run(scenario())
    assert len(sizes) <= 5


@given(tokens=st.lists(st.integers(0, 300), min_size=1, max_size=200), budget=st.integers(1, 500))
@settings(max_examples=50, deadline=None)
def test_pieces_cover_every_cell_once_and_stay_within_their_size(tokens: list[int], budget: int) -> None:
    tokens_C = np.array(tokens)
    pieces = cut(tokens_C, budget)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(tokens)))
    for piece in pieces:
        assert len(piece) == 1 or len(piece) * max(1, tokens_C[piece].max()) <= budget
