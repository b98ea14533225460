"""The processes of one launch (``torchrun``, ``accelerate launch``): which is this one, and how do they share work?

Work is shared within :func:`joined` alone, which the command line enters: a library call in a process that something else
launched (a training script, a server) stays by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sostenuto.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

# A dead process is noticed by the launcher, which ends the others; one that is merely slow is waited for.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among those of its launch.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether it is the one that speaks, and writes what is written once."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Its device: the GPU of its local rank where there are any, else the CPU.

        Raises:
            InputError: there are fewer GPUs than processes on this machine.
        """
        if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise InputError(
                f"process {self.local_rank} of this machine has no GPU, there are {count}: launch {count} processes, or "
                "set ACCELERATE_USE_CPU=true"
            )
        return torch.device("cuda", self.local_rank)


_JOINED: ContextVar[World | None] = ContextVar("joined", default=None)


def world() -> World:
    """The launch that was :func:`joined`; outside of it this process alone."""
    return _JOINED.get() or World()


@contextmanager
def joined() -> Iterator[World]:
    """Share work with the other processes of the launch, told by the variables that ``torchrun`` sets.

    The process group (gloo on CPUs, nccl on GPUs) is made when something is first gathered, by all processes. Without a
    launch this changes nothing.

    Raises:
        InputError: the variables contradict each other.
    """
    token, begun = _JOINED.set(_launched()), dist.is_available() and dist.is_initialized()
    try:
        yield world()
    finally:
        _JOINED.reset(token)
        if dist.is_available() and dist.is_initialized() and not begun:
            dist.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """Share nothing of what is called within, which a process does by itself."""
    token = _JOINED.set(None)
    try:
        yield
    finally:
        _JOINED.reset(token)


def _launched() -> World:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return World()
    try:
        rank, size, local = (int(given.get(name, "0")) for name in names)
    except ValueError:
        rank, size, local = -1, 0, 0
    if not (0 <= rank < size and local >= 0):
        words = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(f"{words} describe no launch of processes: use torchrun or accelerate launch, or unset them")
    return World(rank, size, local)


def share(items: Sequence[T]) -> list[T]:
    """This process's part of the items: every size-th, from its rank on."""
    return list(items[world().rank :: world().size])


def gather(value: T) -> list[T]:
    """The values of all processes in the order of their ranks, on every process; all must call it.

    Args:
        value: plain data, or tensors on the CPU.
    """
    if world().size == 1:
        return [value]
    if not dist.is_initialized():
        if world().device.type == "cuda":
            torch.cuda.set_device(world().device)
        dist.init_process_group(timeout=_PATIENCE)  # gloo for what is on CPUs, nccl for what is on GPUs
    found: list[Any] = [None] * world().size
    dist.all_gather_object(found, value)
    return found


def spread(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``[function(item) for item in items]`` on every process, each of which calls it for its share alone.

    The results are those of one process, in the order of the items, so that whatever is made of them is the same for any
    number of processes.
    """
    parts = gather([function(item) for item in share(items)])
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(items))]


def until(enough: Callable[[list[R]], bool], call: Callable[[int], R]) -> list[R]:
    """``[call(0), call(1), …]`` on every process, as short as is ``enough``; each process makes one call of every round.

    What the last round made too much of is dropped: the results are those of one process.
    """
    results: list[R] = []
    while not enough(results):
        for result in gather(call(len(results) + world().rank)):
            if not enough(results):
                results.append(result)
    return results


def on_main(function: Callable[[], R]) -> R:
    """What the main process's call returns, on every process; the others wait for it."""
    return gather(function() if world().is_main else None)[0]  # type: ignore[return-value]
