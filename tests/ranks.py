"""Several processes that train together without Ray, as under torchrun: for tests."""

from __future__ import annotations

import os
import socket
import traceback
from typing import Any

import torch
import torch.multiprocessing as mp

from train.loop import Run
from train.settings import RunSettings


def work(rank: int, world: int, port: int, jobs: list[RunSettings], queue: Any) -> None:
    """Train the jobs one after the other as one of several processes."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        torch.distributed.init_process_group("gloo")
        for job in jobs:
            run = Run(job, world)
            run.train()
            if rank == 0:
                queue.put(run.resumed_from)
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put(traceback.format_exc())
        raise


def together(world: int, jobs: list[RunSettings]) -> list[int]:
    """Train jobs on so many processes; return where each went on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
