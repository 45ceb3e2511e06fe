"""This module launches a run on Ray Train: workers, process group, restarts, progress."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import ray.train.v2.api.exceptions

from store.cluster import cluster_address, ray_cluster, refuse_fleeting
from store.errors import InterruptedRun, SomaflowError, StorageError, UsageError
from store.lock import WriterLock
from store.snapshot import open_snapshot
from train import checkpoint
from train.ending import Ending
from train.folder import (
    begun_otherwise,
    exported,
    fingerprint,
    knowledge_hashes,
    refuse_shorter,
    run_folder,
    valid_states,
)
from train.gauges import Gauges
from train.record import Summary, kept_metrics, read_summary
from train.settings import RunSettings
from train.sources import refuse_empty_splits

POLL_S = 0.5
RESIZE_S = 300.0
"""Seconds between looks for more workers; each change goes back to the last saved state."""
START_S = "60"
"""Seconds after which Ray Train gives up one attempt to start the workers, unless the environment says otherwise."""
STALLED_S = 60.0
"""Seconds without a step after which is said whether nodes are missing, and again after as many."""
ENDS_S = 20.0
"""Seconds that workers have to save their state when the run is to end: Kubernetes and Slurm give 30 for all."""
FULL = os.strerror(errno.ENOSPC)
"""What errors of a full disk say, whichever library tells of them."""
Progress = Callable[[int, float], None]
"""Called with the last finished step and its loss."""


def _worker(config: dict[str, Any]) -> None:
    """Run in each worker's process; the first one leaves the summary in the run's folder."""
    from train.loop import Run  # neither the driver nor Ray's controller waits for them

    settings = RunSettings.model_validate(config)
    context = ray.train.get_context()
    run = Run(settings, context.get_world_size())
    try:
        if context.get_world_rank() == 0:
            with Gauges(settings, kept_metrics(run.folder / "metrics.jsonl", run.step)) as gauges:
                summary = run.train(gauges.show, _leaving, Ending(run.folder))
        else:
            summary = run.train(warned=_leaving)
    except InterruptedRun:  # as the driver asked; an error would have it started again
        return
    ray.train.report({"loss": summary.loss_last})


def _leaving() -> bool:
    """Say whether a machine of this run will be taken away; all workers ask at the same step, and hear the same."""
    return ray.train.get_preemption_info() is not None


class _Trainer(ray.train.torch.TorchTrainer):
    """Ends in order on Ctrl-C: where steps are taken the workers save first, the second time or after a while not."""

    def __init__(self, ending: Ending, tell: Callable[[str], object], **words: Any) -> None:
        super().__init__(_worker, **words)
        self._ending, self._tell, self._timer = ending, tell, threading.Timer(ENDS_S, _interrupt)

    def fit(self) -> ray.train.Result:
        """Train; what was asked is not asked again later."""
        try:
            return super().fit()
        finally:
            self._timer.cancel()

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        at_once: Any = signal.getsignal(signal.SIGINT)

        def ask(number: int, frame: Any) -> None:
            if self._ending.asked or not self._ending.ask():
                at_once(number, frame)
                return
            self._timer.daemon = True
            self._timer.start()
            self._tell("for the workers to save their state; another Ctrl-C or SIGTERM ends them at once")

        signal.signal(signal.SIGINT, ask)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def launch(
    settings: RunSettings,
    progress: Progress = lambda step, loss: None,
    tell: Callable[[str], object] = lambda words: None,
) -> Summary:
    """Train on ``settings.workers`` workers and return what came of it; the same run again goes on or is done.

    Args:
        settings: The run's.
        progress: Told of steps.
        tell: Told, in words, when nothing goes on for want of nodes.

    Raises:
        StorageError: The cluster has no room for the workers, and had none for ``settings.patience_s``.
        MissingError: No lake, snapshot or file of knowledge.
        ConflictError: The run's folder belongs to other settings or was trained further, or another driver is
            training in it.
        UsageError: The snapshot has no cell in the split to train on, or in that to evaluate on now and then; the run
            would be deleted with its job; GPUs are asked for and there are none.
        InterruptedRun: Somebody ended it (SIGINT, SIGTERM).
        SomaflowError: What stopped the workers.
    """
    refuse_fleeting(lake=settings.lake, output=settings.output)
    base = settings.adapter.base
    settings = settings.model_copy(
        update={
            "output": str(Path(settings.output).absolute()),
            "lake": _absolute(settings.lake),
            "adapter": settings.adapter.model_copy(update={"base": str(Path(base).absolute()) if base else ""}),
        }
    )
    snapshot = open_snapshot(settings.lake, settings.snapshot)
    folder = run_folder(settings)
    wanted = fingerprint(settings, snapshot.id, knowledge_hashes(settings))
    refuse_empty_splits(settings, snapshot)  # else each worker would, after each restart
    if not cluster_address(settings.address):
        on_gpus(settings)  # refuses, before Ray is started, what cannot be here
    if _finished(folder, settings, wanted):
        summary = read_summary(folder)
        if settings.report and not (folder / "report.html").exists():  # it was stopped after its exports
            from train.report import write_report  # draws; not needed before

            write_report(folder)
        progress(summary.steps, summary.loss_last)
        return summary
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    done = threading.Event()

    def missing() -> None:
        if words := _missing(settings, on_gpus(settings)):
            tell(words)

    watcher = threading.Thread(target=_watch, args=(folder / "metrics.jsonl", done, progress, missing), daemon=True)
    start_s = float(os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_S))
    cpus = max(settings.workers * settings.threads, os.cpu_count() or 1)
    with alone(folder), ray_cluster(settings.address, cpus=cpus, packages=("train", "store"), threads=settings.threads):
        watcher.start()
        use_gpu = on_gpus(settings)
        if settings.device == "auto" and not use_gpu and cluster_address(settings.address):
            tell("the cluster has no GPU now: training on CPUs; device = 'cuda' would wait for nodes that have some")
        if settings.device == "cuda" and (words := _missing(settings, use_gpu)):
            tell(words)
        ending = Ending(folder)
        ending.forget()  # of a driver that was killed
        trainer = _Trainer(
            ending,
            tell,
            train_loop_config=settings.model_dump(mode="json"),
            torch_config=ray.train.torch.TorchConfig(
                backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=settings.collective_timeout_s
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(settings.workers_min, settings.workers) if settings.workers_min else settings.workers,
                use_gpu=use_gpu,
                resources_per_worker=None if use_gpu else {"CPU": settings.threads},
                elastic_resize_monitor_interval_s=RESIZE_S,
            ),
            run_config=ray.train.RunConfig(
                name=f"{settings.name}-{wanted[:12]}",
                storage_path=str(folder / "ray"),
                failure_config=ray.train.FailureConfig(
                    max_failures=settings.max_failures,
                    controller_failure_limit=math.ceil(settings.patience_s / start_s) - 1,
                ),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(settings.threads)}},
            ),
        )
        try:
            with _stoppable():
                trainer.fit()
            if ending.asked:
                raise SystemExit
        except SystemExit:
            raise InterruptedRun(f"{folder}: stopped; {_goes_on(folder)}") from None
        except ray.train.v2.api.exceptions.ControllerError as error:
            raise StorageError(
                f"the workers could not be started within {settings.patience_s:g} s: "
                f"{_missing(settings, use_gpu) or error.controller_failure}; the same command goes on with the run"
            ) from error
        except Exception as error:
            raise _cause(error, folder) from error
        finally:
            done.set()
            watcher.join(5)
    return read_summary(folder)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Take a request to end (SIGTERM, as from Slurm or Kubernetes) for Ctrl-C, on which Ray Train ends the workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _goes_on(folder: Path) -> str:
    """Say where the same run begins again."""
    states = valid_states(folder / "state")
    if not states:
        return "the same command goes on from its start"
    return f"the same command goes on from step {checkpoint.read_manifest(states[-1])['global_step']:,}, the last saved"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only driver that trains in a run's folder; one that was killed here is passed at once, elsewhere in 20 s.

    Workers hold nothing: Ray Train ends and starts them again as it must.

    Raises:
        ConflictError: A living driver trains there.
    """
    lock = WriterLock(str(folder), str(folder / "locks"), "the run")
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _missing(settings: RunSettings, use_gpu: bool) -> str:
    """Say what the cluster lacks; "" where it has enough. A worker's CPUs, one for each thread, are of one node."""
    kind, needed = "GPU" if use_gpu else "CPU", settings.workers_min or settings.workers
    each = 1 if use_gpu else settings.threads
    have = [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
    if sum(int(number // each) for number in have) >= needed:
        return ""
    remedy = (
        "start more nodes" if settings.workers_min else "start more nodes, or let it go on with fewer (workers_min)"
    )
    if each == 1:
        return f"the cluster has {sum(have):g} {kind}s and the run needs {needed}: {remedy}"
    largest = f"the cluster has {sum(have):g} CPUs, {max(have, default=0.0):g} on its largest node"
    return f"{largest}, and the run needs {needed} times {each} (threads): {remedy}, or take fewer threads"


def _finished(folder: Path, settings: RunSettings, wanted: str) -> bool:
    """Say whether the run was trained to its last step, exported and summed up, which comes last.

    Files are compared with their manifests.

    Raises:
        ConflictError: The run was begun with other settings, or trained further; said here, before any worker starts.
    """
    states = valid_states(folder / "state")
    try:
        state = checkpoint.read_manifest(states[-1]) if states else {}
        if state and state["fingerprint"] != wanted:
            raise begun_otherwise(folder, settings)
        refuse_shorter(folder, settings, int(state.get("global_step", 0)))
        result = checkpoint.read_manifest(folder / exported(settings))
        done = read_summary(folder).steps
    except (FileNotFoundError, KeyError, ValueError):  # not there, or damaged
        return False
    return bool(state) and done == result["global_step"] == state["global_step"] == settings.steps


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())


def on_gpus(settings: RunSettings) -> bool:
    """Say whether to train on GPUs, by the settings or where there are some: in the cluster that is joined, or here.

    A cluster's driver may see none.

    Raises:
        UsageError: They ask for GPUs, or for what only these can do, and this machine has none that torch sees.
    """
    if settings.device == "cpu":
        return False
    if cluster_address(settings.address):
        found = settings.device == "cuda" or bool(ray.cluster_resources().get("GPU"))
    else:
        import torch

        found = torch.cuda.device_count() > 0
        if settings.device == "cuda" and not found:
            raise UsageError(
                "device = 'cuda': torch sees no GPU on this machine; name a cluster (address), or take device = 'auto'"
            )
    if settings.precision == "fp16" and not found:
        raise UsageError(
            "precision = 'fp16' needs a GPU, and there is none; take 'bf16' or 'no', or name a cluster (address), for "
            "whose GPUs device = 'cuda' waits"
        )
    return found


def _cause(error: BaseException, folder: Path) -> BaseException:
    """Find the error of ours, or the first of a worker, in what Ray Train raises."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, StorageError):
            return type(cause)(f"{cause}; {_goes_on(folder)}")
        if isinstance(cause, SomaflowError):
            return cause
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if FULL in str(cause):
            return StorageError(f"{folder}: {cause}; free some space, the same command goes on with the run")
        if isinstance(cause, OSError):
            return StorageError(f"a worker could not read or write: {cause}; the same command goes on with the run")
        return SomaflowError(f"a worker failed: {failure}")
    return error


def _watch(path: Path, done: threading.Event, progress: Progress, stalled: Callable[[], None]) -> None:
    """Follow the metrics file and tell of the newest step; say so where none comes."""
    newest, since = -1, time.monotonic()
    while True:
        last = done.wait(POLL_S)
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 4096))
                lines = file.read().decode().splitlines()
            row = json.loads(lines[-1])
            step = int(row["step"])
            progress(step, float(row["loss"]))
        except (OSError, IndexError, ValueError, KeyError):
            step = newest
        if step != newest:
            newest, since = step, time.monotonic()
        if last:
            return
        if time.monotonic() - since > STALLED_S:
            stalled()
            since = time.monotonic()


def as_json(summary: Summary) -> dict[str, Any]:
    """Return a summary as plain values."""
    return checkpoint.json_values(asdict(summary))
