"""This module embeds lakes on Ray: workers in processes of low priority, and jobs that outlive who asked for them.

::

    embed-lake ─────────────────────┐
    POST /v1/jobs ──> Driver, a detached actor without a CPU ──> Worker x workers, ``cpus`` each, nice 10

A job's record lies in its lake (``<lake>/somaflow/jobs/<id>.json``), so that it is known after a restart; whether
somebody works on it is asked of Ray.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from serve import jobs
from serve.bulk import CELLS, Asked, Bulk, Common, Crew, Done, Hire, Task, Worker
from serve.settings import JobSettings, gpus_of
from store.context import THREADS
from store.errors import ConflictError, InterruptedRun, SomaflowError, StorageError

NAMESPACE = "somaflow"
NICENESS = 10
"""A worker gets what the model's process leaves; only where that is busy does it make a difference."""
RECORD_S = 1.0
"""A job's record is written so often at most."""
PATIENCE_S = 0.5
"""So often it is looked whether to stop while no block ends."""
TRIES = 4
TOGETHER = 2
"""Tasks that a worker has at a time: the model need not wait while the next block is read and the last is written."""


class LowPriority:
    """A :class:`Worker` in a process of its own that makes room for others."""

    def __init__(self, common: Common) -> None:
        self._niceness = os.nice(NICENESS)
        os.environ.setdefault(THREADS, str(common.threads))
        torch.set_num_threads(common.threads)
        self._common = common
        self._worker: Worker | None = None
        self._beginning = threading.Lock()

    def do(self, task: Task) -> Done:
        """See :class:`Worker`."""
        os.setpriority(os.PRIO_PROCESS, 0, self._niceness)  # Linux keeps it for each thread
        with self._beginning:  # here and not at once: what it raises is then the task's own error
            self._worker = self._worker or Worker(self._common)
        return self._worker.do(task)

    def pid(self) -> int:
        """Return the process's number."""
        return os.getpid()


@dataclass
class RayCrew:
    """Workers that are Ray actors; one that dies is started again, three times, and does its task again."""

    actors: list[Any]

    def do(self, tasks: Sequence[Task]) -> Iterator[Done | None]:
        """See :class:`Crew`."""
        import ray

        waiting = list(reversed(tasks))
        busy: dict[Any, Any] = {}
        idle = self.actors * TOGETHER
        while waiting or busy:
            while idle and waiting:
                actor = idle.pop()
                busy[actor.do.remote(waiting.pop())] = actor
            ended, _ = ray.wait(list(busy), num_returns=1, timeout=PATIENCE_S)
            if not ended:
                yield None
                continue
            idle.append(busy.pop(ended[0]))
            yield _outcome(ended[0])


def _outcome(reference: Any) -> Done:
    import ray

    try:
        return dict(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayActorError as error:
        raise StorageError(
            "a worker died again and again, most likely for want of memory; run the same command again with fewer "
            "workers: what was done stays done"
        ) from error


@contextmanager
def ray_crew(common: Common, *, workers: int, cpus: float) -> Iterator[Crew]:
    """Hold workers on the cluster that this process is connected to; on GPUs, no more than it has.

    Raises:
        StorageError: The cluster has no room for one of them, ever.
    """
    import ray

    n_gpus = gpus_of(common.device)
    there = ray.cluster_resources()
    for name, needed in (("CPU", cpus), ("GPU", n_gpus)):
        if there.get(name, 0) < needed:
            raise StorageError(f"the Ray cluster has {there.get(name, 0):g} {name}; a worker needs {needed:g}")
    if n_gpus:  # one that waits for a GPU would keep the piece that it is given
        workers = min(workers, int(there["GPU"]))
    actor = ray.remote(
        num_cpus=cpus,
        num_gpus=n_gpus,
        max_concurrency=TOGETHER + 1,  # and one question how it is
        max_restarts=3,
        max_task_retries=3,
    )(LowPriority)
    shared = Common(common.checkpoint, common.device, common.generation, max(1, int(cpus)))
    actors = [actor.remote(shared) for _ in range(workers)]
    try:
        yield RayCrew(actors)
    finally:
        for one in actors:
            ray.kill(one)


class Driver:
    """A job at work: an actor that nobody owns, and that ends when the job has ended."""

    def __init__(self, asked: Asked, settings: JobSettings, record: jobs.Record) -> None:
        self._asked, self._settings, self._record = asked, settings, record
        self._stop = threading.Event()
        self._bulk: Bulk | None = None
        self._held = ExitStack()
        self._starting = threading.Lock()
        self._written = 0.0

    def begin(self) -> SomaflowError | None:
        """Check everything, take the lake's lock and say so in the lake; return an expected error as a value."""
        with self._starting:
            if self.ended():
                return ConflictError("the job is just ending; ask again")
            if self._bulk is not None:
                return None
            try:
                with ExitStack() as held:
                    bulk = held.enter_context(Bulk(self._asked))
                    self._say(message="waiting for a worker")
                    self._held = held.pop_all()
            except SomaflowError as error:
                return error.with_traceback(None)
            except OSError as error:
                return StorageError(f"{self._asked.lake}: the job's record cannot be written: {error}")
            self._bulk = bulk
            threading.Thread(target=self._run, args=(bulk,), name="job", daemon=True).start()
            return None

    def cancel(self) -> None:
        """End the job after the block at hand; what is done stays done."""
        self._stop.set()
        if not self.ended():
            with suppress(StorageError, OSError):
                self._say(message=jobs.ENDING)

    def ended(self) -> bool:
        """Say whether nothing is left to do here."""
        return self._record.state != "running"

    def _run(self, bulk: Bulk) -> None:
        """Do the work, say what came of it, and end this process."""
        import ray

        try:
            state, message = self._work(bulk)
            with suppress(StorageError, OSError):  # who then finds nobody here calls the job interrupted
                self._say(state=state, message=message)
        finally:
            ray.kill(ray.get_runtime_context().current_actor)

    def _work(self, bulk: Bulk) -> tuple[jobs.State, str]:
        hire: Hire = partial(ray_crew, workers=self._settings.workers, cpus=self._settings.cpus)
        try:
            with self._held:
                outcome = bulk.run(hire, self._progress, self._stop.is_set)
        except InterruptedRun:
            return "cancelled", "ask for the same again to go on from here"
        except SomaflowError as error:
            return "failed", str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, who asks for the job must not take it for running
            return "failed", f"{type(error).__name__}; the server's log may say more"
        return "done", f"{outcome.n_embedded:,} embedded, {outcome.n_taken_over:,} taken over"

    def _progress(self, what: str, done: int, total: int) -> None:
        """Say how far the job is; where that cannot be written the work goes on, and the next time may be better."""
        if time.monotonic() - self._written > RECORD_S or done in (0, total):
            self._written = time.monotonic()
            with suppress(StorageError, OSError):
                ending = jobs.ENDING if self._stop.is_set() else ""
                if what == CELLS:
                    self._say(done=done, total=total, message=ending or ("" if done else "waiting for a worker"))
                else:
                    self._say(message=ending or f"{done:,} of {total:,} {what}")

    def _say(self, **values: Any) -> None:
        self._record = self._record.now(**values)
        jobs.write(self._asked.lake, self._record)


class RayJobs:
    """Starts, finds and cancels drivers on the cluster that this process is connected to."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings

    async def start(self, asked: Asked, record: jobs.Record) -> None:
        """See :class:`serve.jobs.Jobs`."""
        import ray

        if await self.alive(record.id):
            return
        actor = ray.remote(num_cpus=0, max_concurrency=4, max_restarts=0)(Driver)
        options = {"name": _name(record.id), "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        for _ in range(TRIES):  # one that is just ending may still have the name
            driver = await asyncio.to_thread(actor.options(**options).remote, asked, self._settings, record)
            try:
                error = await driver.begin.remote()
            except ray.exceptions.RayActorError:
                await asyncio.sleep(PATIENCE_S)
                continue
            if error is not None:
                ray.kill(driver)
                raise error
            return
        raise ConflictError("the job's process did not start; ask again")

    async def alive(self, job: str) -> bool:
        """See :class:`serve.jobs.Jobs`."""
        import ray

        driver = await self._find(job)
        try:
            return driver is not None and not await driver.ended.remote()
        except ray.exceptions.RayActorError:
            return False

    async def cancel(self, job: str) -> None:
        """See :class:`serve.jobs.Jobs`."""
        import ray

        driver = await self._find(job)
        if driver is not None:
            with suppress(ray.exceptions.RayActorError):
                await driver.cancel.remote()

    async def _find(self, job: str) -> Any:
        import ray

        try:
            return await asyncio.to_thread(ray.get_actor, _name(job), NAMESPACE)
        except ValueError:
            return None


def _name(job: str) -> str:
    return f"somaflow-job-{job}"
