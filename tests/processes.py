"""Several processes of one launch, forked from the test's: what ``torchrun`` would start, without its seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket

_FORK = multiprocessing.get_context("fork")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(function, size, *args):
    """``function(*args)`` in as many processes, each with the variables of its rank."""
    port = str(free_port())

    def run(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=port
        )
        function(*args)

    processes = [_FORK.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def run(function, size, *args):
    """The same, to the end; every process must succeed."""
    processes = start(function, size, *args)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * size
