"""The instrumented run: an uncached generation, at every step of which the network is also run with features kept before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sostenuto.anatomy import SiteKind
from sostenuto.clock import Tick
from sostenuto.engine import Handle
from sostenuto.errors import MethodError
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.sites import Site
from sostenuto.tuning.measurement import Kind, Measurement, Reach

_NUM_VALUES = 4096  # of a sample's output that errors are compared in, chosen at random where it has more


def ops_of(sites: Sequence[Site], kind: Kind, filled: Op) -> list[Op]:
    """The op of every site of a step of this kind, ``filled`` where something is reused."""
    whole = next((site for site in sites if site.kind is SiteKind.BLOCKS), None)
    if kind is Kind.STACK:
        return [filled if site is whole else Op.SKIP if whole and whole.covers(site) else Op.COMPUTE for site in sites]
    return [filled if site is not whole and kind.state.skips(site) else Op.COMPUTE for site in sites]


def filled_call(prober: Prober, kind: Kind, lags: Sequence[int]) -> Any:
    """The denoiser's output with what is reused filled from the outputs kept ``lags`` steps ago, newest first.

    The n-th slot of a site must hold its output of n steps ago, counted from 1. One lag gives the last value, several the
    polynomial through them.
    """
    slots = prober.state.slots
    ops = ops_of(prober.handle.sites, kind, Op.REUSE if len(lags) == 1 else Op.FORECAST)
    steps = tuple(prober.tick.step - lag for lag in lags)
    history = [steps if op.is_filled else () for op in ops]
    before = {index: slots[index] for index, op in enumerate(ops) if op.is_filled}
    try:
        for index, kept in before.items():
            slots[index] = [kept[lag - 1] for lag in lags]
        return prober.run(ops, history)
    finally:
        for index, kept in before.items():
            slots[index] = kept


class Instrument:
    """Stands in for the plan of uncached generations and measures; what it measures is averaged over them.

    Args:
        handle: with the sites of a table, see :class:`~sostenuto.calibrations.base.Tapped`.
        reach: what to measure.
        num_steps: steps of a generation.
    """

    def __init__(self, handle: Handle, reach: dict[Kind, Reach], num_steps: int) -> None:
        self._handle, self._reach = handle, reach
        self._slots = [
            1 + max(r.num_slots * _is_read(site, kind) for kind, r in reach.items()) for site in handle.sites
        ]
        self._runs = {
            kind: np.full((len(r.gaps), max(map(len, r.gaps)), num_steps, r.max_run, r.max_run), np.nan)
            for kind, r in reach.items()
        }
        self._power = np.zeros(num_steps)
        self._rows = np.zeros(num_steps)
        self._errors: dict[tuple[int, Kind, int, int, int], list[torch.Tensor]] = {}  # …, computed step → its run
        self._seconds: dict[str, list[float]] = {}
        self._chosen: torch.Tensor | None = None
        self._macs: dict[str, float] = {}
        self._bytes: dict[str, int] = {}

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        """Make the call, uncached, and measure."""
        slots = prober.state.slots
        if tick.step == 0:
            self._errors = {key: run for key, run in self._errors.items() if key[0] != tick.pass_index}
            for kept, room in zip(slots, self._slots, strict=True):
                kept[:] = [None] * room
        output = self._timed("compute", prober, lambda: prober.run([Op.STORE] * len(slots)))
        fresh = self._values(prober, output)
        self._rows[tick.step] += prober.batch_size
        weight = prober.batch_size / self._rows[tick.step]
        self._power[tick.step] += weight * (_mean_product(fresh, fresh) - self._power[tick.step])
        if not self._macs:
            self._note_cost(prober)
        for kept in slots:  # what was stored a moment ago is of this step: a measurement sees what was kept before it
            kept.append(kept.pop(0))
        try:
            for kind, reach in self._reach.items():
                for order, gaps in enumerate(reach.gaps):
                    for at, gap in enumerate(gaps):
                        self._measure(tick, prober, fresh, weight, (kind, order, at), gap)
        finally:
            for kept in slots:
                kept.insert(0, kept.pop())
        return output

    def _measure(
        self, tick: Tick, prober: Prober, fresh: torch.Tensor, weight: float, what: tuple[Kind, int, int], gap: int
    ) -> None:
        kind, order, at = what
        for lag in range(1, min(self._reach[kind].max_run, tick.step - order * gap) + 1):
            lags = [lag + place * gap for place in range(order + 1)]
            output = self._timed(kind.value, prober, lambda lags=lags: filled_call(prober, kind, lags))
            computed = tick.step - lag
            run = self._errors.setdefault((tick.pass_index, kind, order, at, computed), [])
            run.append(self._values(prober, output) - fresh)
            products = self._runs[kind][order, at, computed]
            for place, earlier in enumerate(run):
                product, known = _mean_product(earlier, run[-1]), products[place, lag - 1]
                mean = product if np.isnan(known) else known + weight * (product - known)
                products[place, lag - 1] = products[lag - 1, place] = mean
            if lag == self._reach[kind].max_run:
                del self._errors[tick.pass_index, kind, order, at, computed]

    def _values(self, prober: Prober, output: Any) -> torch.Tensor:
        """Some values of every row's prediction ``[rows, values]``, in float32."""
        values = prober.prediction(output).flatten(1)
        if values.shape[1] > _NUM_VALUES:
            if self._chosen is None:
                order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0))
                self._chosen = order[:_NUM_VALUES].to(values.device)
            values = values[:, self._chosen]
        return values.float()

    def _timed(self, name: str, prober: Prober, run: Callable[[], Any]) -> Any:
        device = next(self._handle._denoiser.parameters()).device
        _wait(device)
        began = time.perf_counter()
        output = run()
        _wait(device)
        self._seconds.setdefault(name, []).append(time.perf_counter() - began)
        return output

    def _note_cost(self, prober: Prober) -> None:
        sites, cost = self._handle.sites, prober.cost()
        self._macs["compute"] = 1.0
        for kind in self._reach:
            ops = ops_of(sites, kind, Op.REUSE)
            self._macs[kind.value] = self._handle.count(prober.call.signature, ops) / cost.macs
            self._bytes[kind.value] = sum(size for size, op in zip(cost.output_bytes, ops, strict=True) if op.is_filled)

    @property
    def share(self) -> float:
        """Multiply-accumulates of what was run, of the uncached generations in it."""
        counted = sum(len(times) * self._macs[name] for name, times in self._seconds.items())
        return counted / len(self._seconds["compute"])

    def result(self, num_samples: int, pause: float) -> Measurement:
        """What was measured.

        Args:
            num_samples: rows that were generated.
            pause: seconds between one denoiser call and the next.

        Raises:
            MethodError: an output was not finite.
        """
        if not np.isfinite(self._power).all() or any(np.isinf(values).any() for values in self._runs.values()):
            raise MethodError("the network's output is not finite: run the model in a wider dtype")
        seconds = {name: float(np.median(times)) for name, times in self._seconds.items()}
        seconds["pause"] = pause
        return Measurement(self._reach, self._runs, self._power, self._macs, seconds, num_samples, self._bytes)


def _is_read(site: Site, kind: Kind) -> bool:
    return ops_of([site], kind, Op.REUSE)[0] is Op.REUSE


def _mean_product(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
