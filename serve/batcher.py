"""This module lets many requests share one model: it packs a batch at the moment the model is free, never by a timer.

While the model works, requests gather; when it is done, the next batch takes what is there, up to a budget of tokens.
So a lone request waits for nobody, and a busy server gets full batches. Requests are cut into pieces and take turns,
one piece each, so that a large one does not block those behind it. What waits is bounded in tokens.

One worker thread owns the model; the front is asyncio. Nothing here knows of Ray, HTTP or torch.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.errors import DeadlineExceeded, Overloaded, Unavailable

P = TypeVar("P")
R = TypeVar("R")

MAX_RETRY_AFTER_S = 30
SPEED_S = 5.0
"""Seconds of work by which the speed is told: what was before counts for e times less."""


@dataclass(frozen=True)
class Piece(Generic[P]):
    """A part of a request that runs as a whole: ``rows`` cells of at most ``longest`` tokens each."""

    payload: P
    rows: int
    longest: int

    @property
    def tokens(self) -> int:
        """What the piece costs alone, padding included; at least 1."""
        return max(1, self.rows * self.longest)


@dataclass(eq=False)
class _Job(Generic[P, R]):
    key: Hashable | None
    waiting: deque[tuple[int, Piece[P]]]
    results: dict[int, R]
    left: int
    future: Future[list[R]] = field(default_factory=Future)


@dataclass(frozen=True)
class Load:
    """What a batcher holds now and has done so far."""

    waiting_tokens: int
    waiting_jobs: int
    batches: int
    done_pieces: int
    tokens_per_s: float
    fill: float = 0.0
    """Padded tokens of a batch as a share of the budget, on average."""
    replica: str = ""
    swaps: int = 0
    swaps_refused: int = 0


def cut(tokens_C: NDArray[np.integer], piece_tokens: int) -> list[NDArray[np.int64]]:
    """Cut cells into pieces of at most ``piece_tokens`` tokens with padding, cells of similar length together.

    A cell longer than that makes a piece of its own. The pieces cover every cell once.
    """
    order = np.argsort(tokens_C, kind="stable")[::-1].astype(np.int64)
    pieces, start = [], 0
    while start < len(order):
        longest = max(1, int(tokens_C[order[start]]))
        stop = start + max(1, piece_tokens // longest)
        pieces.append(order[start:stop])
        start = stop
    return pieces


class Batcher(Generic[P, R]):
    """Runs pieces through ``run`` in batches of at most ``budget_tokens`` padded tokens.

    Args:
        run: Takes payloads of one key, gives one result each; called from the worker thread only.
        budget_tokens: Bound of a batch; a piece beyond it still runs, alone.
        queue_tokens: Bound of what waits; a job beyond it is refused unless nothing else waits.
        queue_s: Bound of the seconds until a job is done, at the speed of the last batches, with those that it waited
            before it came; as above. A batch that had room for twice as much and took all there was says nothing
            about the speed, unless it was fast, or a job was refused while it ran and no other had told.
        clock: Tells seconds.
    """

    def __init__(
        self,
        run: Callable[[list[P]], Sequence[R]],
        *,
        budget_tokens: int,
        queue_tokens: int,
        queue_s: float = math.inf,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._run = run
        self._budget_tokens = budget_tokens
        self._queue_tokens = queue_tokens
        self._queue_s, self._clock = queue_s, clock
        self._jobs: deque[_Job[P, R]] = deque()
        self._waiting_tokens = 0
        self._running_tokens, self._running_since = 0, 0.0
        self._batches = 0
        self._done_pieces = 0
        self._done_tokens = 0
        self._speed_tokens, self._speed_s, self._tokens_per_s = 0.0, 0.0, 0.0
        self._refused = False
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="model", daemon=True)
        self._worker.start()

    async def submit(
        self, pieces: Sequence[Piece[P]], *, key: Hashable | None, timeout_s: float, waited_s: float = 0.0
    ) -> list[R]:
        """Run all pieces of a request; return their results in the same order.

        Args:
            pieces: What to run; jobs of the same key may share a batch.
            key: None keeps every piece alone in its batch.
            timeout_s: After this the job is dropped.
            waited_s: How long it was on its way already.

        Raises:
            Overloaded: Too much is waiting.
            DeadlineExceeded: ``timeout_s`` went by.
            Unavailable: The batcher is closed.
        """
        job: _Job[P, R] = _Job(key, deque(enumerate(pieces)), {}, len(pieces))
        if not job.waiting:
            return []
        self._admit(job, waited_s)
        job.future.add_done_callback(lambda future: self._forget(job) if future.cancelled() else None)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(job.future)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s; send fewer cells or try again later") from None

    def load(self) -> Load:
        """Return the present state."""
        with self._changed:
            return Load(
                self._waiting_tokens,
                len(self._jobs),
                self._batches,
                self._done_pieces,
                round(self._tokens_per_s, 1),
                self._done_tokens / (self._budget_tokens * max(1, self._batches)),
            )

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted and the worker runs."""
        return self._worker.is_alive() and not self._closed

    def close(self, drain_s: float = 10.0) -> None:
        """Refuse new jobs, finish those that wait, and stop; after ``drain_s`` the rest is told that it is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join(drain_s)
        with self._changed:
            abandoned = list(self._jobs)
            self._jobs.clear()
            self._waiting_tokens = 0
        for job in abandoned:
            self._finish(job, Unavailable("the server is stopping; try again"))

    def _admit(self, job: _Job[P, R], waited_s: float) -> None:
        tokens = sum(piece.tokens for _, piece in job.waiting)
        with self._changed:
            if not self.alive:
                raise Unavailable("the server is stopping; try again")
            in_time = math.inf
            if self._tokens_per_s:
                gone_s = waited_s + max(0.0, self._free_at() - self._clock())
                in_time = max(0.0, (self._queue_s - gone_s) * self._tokens_per_s)
            allowed = min(self._queue_tokens, in_time)
            if self._waiting_tokens and self._waiting_tokens + tokens > allowed:
                self._refused = True
                raise Overloaded(
                    f"{self._waiting_tokens:,} tokens wait already and this request adds {tokens:,}, beyond the "
                    f"{int(allowed):,} allowed now; try again later",
                    self._retry_after_s(),
                    self._full_s(tokens),
                )
            self._jobs.append(job)
            self._waiting_tokens += tokens
            self._changed.notify_all()

    def _free_at(self) -> float:
        """Return when the batch that runs will be done, at the speed of the last ones."""
        return self._running_since + self._running_tokens / self._tokens_per_s

    def _full_s(self, tokens: int) -> float:
        """Return the seconds in which room for one more comes up; 0 where a refusal says little about others."""
        if not self._tokens_per_s:
            return 0.0
        room = min(self._queue_tokens, self._queue_s * self._tokens_per_s)
        return tokens / self._tokens_per_s if tokens <= room / 2 else 0.0

    def _retry_after_s(self) -> int:
        if self._tokens_per_s <= 0:
            return 1
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._waiting_tokens / self._tokens_per_s)))

    def _forget(self, job: _Job[P, R]) -> None:
        with self._changed:
            self._waiting_tokens -= sum(piece.tokens for _, piece in job.waiting)
            job.waiting.clear()
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self) -> None:
        while batch := self._next_batch():
            started, tokens = self._clock(), sum(piece.tokens for _, _, piece in batch)
            with self._changed:
                self._running_tokens, self._running_since = tokens, started
                all_there_was, self._refused = not self._jobs, False
            went_well = self._run_batch(batch)
            padded = sum(piece.rows for _, _, piece in batch) * max(piece.longest for _, _, piece in batch)
            took_s = max(1e-6, self._clock() - started)
            with self._changed:
                self._running_tokens = 0
                self._batches += 1
                self._done_pieces += len(batch)
                self._done_tokens += padded
                fast = 0 < self._tokens_per_s < tokens / took_s
                unknown = self._refused and not self._tokens_per_s
                little = all_there_was and 2 * padded < self._budget_tokens
                if went_well and (fast or unknown or not little):
                    self._note_speed(tokens, took_s)

    def _note_speed(self, tokens: int, took_s: float) -> None:
        """Reckon with a batch as long as it took: what it costs besides its tokens is most of a small one."""
        kept = math.exp(-took_s / SPEED_S)
        self._speed_tokens = kept * self._speed_tokens + tokens
        self._speed_s = kept * self._speed_s + took_s
        self._tokens_per_s = self._speed_tokens / self._speed_s

    def _next_batch(self) -> list[tuple[_Job[P, R], int, Piece[P]]]:
        """Wait for work and take the next batch; empty when closed and drained."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            return self._pack() if self._jobs else []

    def _pack(self) -> list[tuple[_Job[P, R], int, Piece[P]]]:
        """Take one piece of each job in turn while the padded batch fits; the job served last goes to the back."""
        key = self._jobs[0].key
        batch: list[tuple[_Job[P, R], int, Piece[P]]] = []
        rows = longest = 0
        passed: list[_Job[P, R]] = []
        while self._jobs:
            job = self._jobs.popleft()
            piece = job.waiting[0][1]
            grown = (rows + piece.rows) * max(longest, piece.longest)
            if batch and (key is None or job.key != key or grown > self._budget_tokens):
                passed.append(job)
                continue
            index, piece = job.waiting.popleft()
            rows, longest = rows + piece.rows, max(longest, piece.longest)
            batch.append((job, index, piece))
            self._waiting_tokens -= piece.tokens
            if job.waiting:
                self._jobs.append(job)
        self._jobs.extend(passed)
        return batch

    def _run_batch(self, batch: list[tuple[_Job[P, R], int, Piece[P]]]) -> bool:
        """Run pieces and hand out what comes of them; say whether all went well."""
        try:
            results = self._run([piece.payload for _, _, piece in batch])
        except Exception as error:  # noqa: BLE001 - it belongs to the callers, and the worker must live on
            if len(batch) == 1:
                self._forget(batch[0][0])
                self._finish(batch[0][0], error)
            else:  # one bad piece must not fail its neighbours
                for item in batch:
                    self._run_batch([item])
            return False
        for (job, index, _), result in zip(batch, results, strict=True):
            job.results[index] = result
            job.left -= 1
            if not job.left:
                self._finish(job, [job.results[position] for position in range(len(job.results))])
        return True

    def _finish(self, job: _Job[P, R], outcome: list[R] | Exception) -> None:
        with self._changed:  # the worker and who closes may both have something to say; the first is heard
            if job.future.done() or not job.future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
