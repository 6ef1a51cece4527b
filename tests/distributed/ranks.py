"""`finetune` in several processes, with the environment that torchrun gives each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from typing import Any

import torch

from lemo.config import RunConfig
from lemo.training import finetune


def finetune_in_ranks(config: RunConfig, processes: int, *, resume: bool = False) -> None:
    """Runs all ranks and asserts that each ended well."""
    # Forks from a server that has imported torch but used none of it: seconds faster than torchrun.
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lemo.training.job"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(config, rank, processes, port, resume)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
    try:
        assert [process.exitcode for process in ranks] == [0] * processes
    finally:
        for process in ranks:
            process.kill()


def _rank(config: RunConfig, rank: int, processes: int, port: int, resume: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    finetune(config, resume=resume)
