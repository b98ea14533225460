"""One generation: how long it took, step by step, and the multiply-accumulates that it executed."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from sostenuto.bench.machine import attention_backend
from sostenuto.bench.subjects import Subject
from sostenuto.compat import after_calls
from sostenuto.counting import MacCounter


@dataclass(frozen=True)
class Timed:
    """Seconds of a generation and of each of its steps, what it made, and the most bytes that torch held on a GPU."""

    wall_s: float
    step_s: list[float]
    output: torch.Tensor
    device_bytes_peak: int | None


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates that a generation executed, in all and in each of its steps."""

    macs: int
    step_macs: list[int]


def generator_of(seed: int) -> torch.Generator:
    """The source of noise: on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(seed)


def timed(subject: Subject, seed: int, num_inference_steps: int) -> Timed:
    """Run one generation and time it; on a GPU by its own events."""
    on_gpu = subject.device.type == "cuda"
    clock: _Clock = _DeviceClock() if on_gpu else _Clock()
    generator = generator_of(seed)
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begins: list[int] = []
    gc.disable()  # a collection in the middle of one side would be counted against it
    try:
        clock.mark()
        with after_calls(subject.owner.scheduler, set_timesteps=lambda: begins.append(clock.mark()), step=clock.mark):
            output = subject.sample(generator, num_inference_steps)
        clock.mark()
    finally:
        gc.enable()
    seconds = clock.seconds()
    first = begins[-1] if begins else 0
    return Timed(
        wall_s=sum(seconds),
        step_s=seconds[first:-1],
        output=output.float().cpu(),
        device_bytes_peak=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def counted(subject: Subject, seed: int, num_inference_steps: int) -> Counted:
    """Run one generation and count it, all of it: attention by the math backend, of which torch's formulas see everything."""
    counter = MacCounter()
    marks: list[int] = []
    with attention_backend("math"), counter:

        def begin() -> None:
            marks[:] = [counter.macs]

        with after_calls(subject.owner.scheduler, set_timesteps=begin, step=lambda: marks.append(counter.macs)):
            subject.sample(generator_of(seed), num_inference_steps)
        total = counter.macs
    return Counted(total, [after - before for before, after in pairwise(marks)])


@contextmanager
def few_collections() -> Iterator[None]:
    """Within it collections look only at what was made since: a full one takes longer than many a generation."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Clock:
    """Marks points in time."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> int:
        """Note the time; returns the number of the mark."""
        self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def seconds(self) -> list[float]:
        """The time between each two marks."""
        return [after - before for before, after in pairwise(self._marks)]


class _DeviceClock(_Clock):
    """The same by events on the GPU, so that nothing waits for it while it works."""

    def mark(self) -> int:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
        return len(self._marks) - 1

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._marks)]


def medians(runs: Sequence[Sequence[float]]) -> list[float]:
    """The median over runs of each step; empty where they differ in length."""
    if len({len(run) for run in runs}) != 1:
        return []
    return [median(step) for step in zip(*runs, strict=True)]
