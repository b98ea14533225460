"""What the calls of a denoiser cost, by their shapes: one dry run for each, made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from sostenuto.cost import Carried, Cost, DryRun, autocast_state, signature
from sostenuto.mount import Mount
from sostenuto.plan import Op
from sostenuto.stats import Record, Statistics

_MOST = 64  # of calls of different shapes that are remembered from generation to generation


class DryRuns:
    """The dry runs of one handle's calls; a call's number stands for all calls that cost the same.

    Args:
        denoiser: the network.
        mount: the taps, which are in place in a dry run.
        in_place: a context in which they are.
    """

    def __init__(self, denoiser: nn.Module, mount: Mount, in_place: Callable[[], AbstractContextManager[None]]) -> None:
        self._denoiser, self._mount, self._in_place = denoiser, mount, in_place
        self.forget()

    def forget(self) -> None:
        """Forget all: the network or what is on it is another one, or it is too much."""
        self._runs: list[DryRun] = []
        self._numbers: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, number: int) -> DryRun:
        return self._runs[number]

    @property
    def too_many(self) -> bool:
        """Whether more are remembered than is worth while."""
        return len(self._runs) > _MOST

    def number(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The number of calls with such arguments."""
        key = signature(args), signature(kwargs), autocast_state()
        number = self._numbers.setdefault(key, len(self._runs))
        if number == len(self._runs):
            self._runs.append(DryRun(self._denoiser, self._mount.taps, args, kwargs))
        self._runs[number].offer(args, kwargs)
        return number

    def let_go(self) -> None:
        """Let go of the arguments of all calls: those of the generation that begins will be offered."""
        for run in self._runs:
            run.forget_arguments()

    def cost(self, number: int) -> Cost:
        """What such a call costs when everything is computed."""
        with self._in_place():
            return self._runs[number].cost

    def macs(self, number: int, ops: Sequence[Op]) -> int:
        """Multiply-accumulates of such a call with these ops."""
        with self._in_place():
            return self._runs[number].macs(Carried(tuple(ops)))

    def statistics(self, record: Record) -> Statistics:
        """What a generation did, with what it cost."""
        with self._in_place():
            return record.statistics(self._runs, self._mount.sites)
