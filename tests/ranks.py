"""Several processes that train together without Ray, as under torchrun: for tests."""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from ports import free_port

from train.cells import Cells
from train.loop import Run
from train.settings import RunSettings


def recorded(run: Run) -> None:
    """Let a run write down which rows of the snapshot each of its steps gets, rank by rank."""
    steps = run.stream.steps

    def watched(first: int, stop: int, **which: int) -> Iterator[Cells]:
        with (run.folder / f"rows-{run.rank}.jsonl").open("a") as file:
            for step, cells in enumerate(steps(first, stop, **which), first):
                file.write(json.dumps({"step": step, "rows": cells.row.tolist()}) + "\n")
                file.flush()
                yield cells

    run.stream.steps = watched  # type: ignore[method-assign]


def rows_of(folder: Path) -> dict[int, Counter[int]]:
    """Return the multiset of rows of each step, over all ranks."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for path in folder.glob("rows-*.jsonl"):
        for line in path.read_text().splitlines():
            told = json.loads(line)
            found[told["step"]].update(told["rows"])
    return dict(found)


def work(rank: int, world: int, port: int, jobs: list[RunSettings], queue: Any) -> None:
    """Train the jobs one after the other as one of several processes."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        torch.distributed.init_process_group("gloo")
        for job in jobs:
            run = Run(job, world)
            recorded(run)
            run.train()
            if rank == 0:
                queue.put(run.resumed_from)
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put(traceback.format_exc())
        raise


def together(world: int, jobs: list[RunSettings]) -> list[int]:
    """Train jobs on so many processes; return where each went on."""
    port = free_port()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=work, args=(rank, world, port, jobs, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = []
    while not queue.empty():
        found.append(queue.get())
    assert all(process.exitcode == 0 for process in processes), found
    return found
