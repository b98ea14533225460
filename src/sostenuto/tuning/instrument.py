"""The instrumented run: an uncached generation, at every step of which the network is also run with features kept before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from sostenuto import compat
from sostenuto.anatomy import SiteKind
from sostenuto.calibrations.base import Tapped
from sostenuto.clock import Tick
from sostenuto.cost import signature
from sostenuto.engine import Handle
from sostenuto.errors import MethodError
from sostenuto.features import Feature, mapped
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.sites import Site
from sostenuto.state import PassState
from sostenuto.table import FILLS
from sostenuto.tuning.measurement import NUDGES, Kind, Measurement, Reach, filled_name, nudged_steps, whole_of

_NUM_VALUES = 4096  # of a sample's output that errors are compared in, chosen at random where it has more


_WHOLE = {SiteKind.BLOCKS: Kind.STACK, SiteKind.OUTPUT: Kind.SAMPLE}
"""The kinds that have a site of their own."""


def ops_of(sites: Sequence[Site], kind: Kind, filled: Op) -> list[Op]:
    """The op of every site of a step of this kind, ``filled`` where something is reused."""
    wholes = {_WHOLE[site.kind]: site for site in sites if site.kind in _WHOLE}
    if kind in _WHOLE.values():
        whole = wholes.get(kind)
        return [filled if site is whole else Op.SKIP if whole and whole.covers(site) else Op.COMPUTE for site in sites]
    return [filled if site.kind not in _WHOLE and kind.state.skips(site) else Op.COMPUTE for site in sites]


def tapped_for(kinds: Sequence[Kind]) -> Tapped:
    """The method whose sites all these kinds have what they reuse at."""
    return Tapped(tuple(fill for fill in FILLS if Kind(fill) in kinds))


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


def macs_of(prober: Prober, kinds: Iterable[Kind]) -> dict[str, float]:
    """Multiply-accumulates of a step of each kind, ``"compute"`` being 1."""
    handle, whole = prober.handle, prober.cost().macs
    ops = {kind.value: ops_of(handle.sites, kind, Op.REUSE) for kind in kinds}
    return {"compute": 1.0} | {name: handle.count(prober.call.signature, row) / whole for name, row in ops.items()}


class Instrument:
    """Stands in for the plan of uncached generations and measures; what it measures is averaged over them.

    Args:
        handle: with the sites of a table, see :class:`~sostenuto.calibrations.base.Tapped`.
        reach: what to measure.
        num_steps: steps of a generation.
    """

    def __init__(self, handle: Handle, reach: dict[Kind, Reach], num_steps: int) -> None:
        self._handle, self._reach = handle, reach
        self._device = compat.execution_device(handle._denoiser)
        self._slots = [
            1 + max(r.num_slots * _is_read(site, kind) for kind, r in reach.items()) for site in handle.sites
        ]
        self._runs = {
            kind: np.full((len(r.gaps), max(map(len, r.gaps)), num_steps, r.max_run, r.max_run), np.nan)
            for kind, r in reach.items()
        }
        # Rows that each was measured on: a pass that begins late has nothing to reuse where another has.
        self._counts = {kind: np.zeros(values.shape[:-1]) for kind, values in self._runs.items()}
        self._power = np.zeros(num_steps)
        self._rows = np.zeros(num_steps)
        self._errors: dict[tuple[int, Kind, int, int, int], list[torch.Tensor]] = {}  # …, computed step → its run
        self._seconds: dict[str, list[float]] = {}
        self._chosen: dict[int, torch.Tensor] = {}
        self._whole = whole_of(reach)
        self._nudged = set(nudged_steps(num_steps) if self._whole in reach else ())
        self._nudge_errors = np.full((len(NUDGES), num_steps), np.nan)  # mean squares
        self._nudge_counts = np.zeros(num_steps)
        self._before: dict[int, Feature] = {}  # pass → latents of its last step
        self._passes: dict[int, PassState] = {}
        self._first: dict[int, int] = {}  # pass → the step at which it began, or began anew
        # What no measured kind reuses isn't kept: for a large network the branches are gigabytes.
        self._store = [Op.STORE if room > 1 else Op.COMPUTE for room in self._slots]
        self._macs: dict[str, float] = {}
        self._sites: dict[str, tuple[str, float]] = {}
        self._bytes: dict[str, int] = {}

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        """Make the call, uncached, and measure."""
        slots = prober.state.slots
        # Of a new generation, or one that was left out for a while.
        if self._passes.get(tick.pass_index) is not prober.state:
            self._passes[tick.pass_index], self._first[tick.pass_index] = prober.state, tick.step
            self._errors = {key: run for key, run in self._errors.items() if key[0] != tick.pass_index}
            self._before.pop(tick.pass_index, None)
            for kept, room in zip(slots, self._slots, strict=True):
                kept[:] = [None] * room
        output = self._timed("compute", prober, lambda: prober.run(self._store))
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
                        self._measure(tick, prober, fresh, (kind, order, at), gap)
        finally:
            for kept in slots:
                kept.insert(0, kept.pop())
        self._nudge(tick, prober, fresh)
        return output

    def _nudge(self, tick: Tick, prober: Prober, fresh: torch.Tensor) -> None:
        """The error of reusing everything from an input that is moved a little towards that of the step before."""
        latents, before = prober.call.latents, self._before.get(tick.pass_index)
        self._before[tick.pass_index] = mapped(torch.clone, latents)  # a sampler may write into its latents
        if tick.step not in self._nudged or before is None or signature(before) != signature(latents):
            return
        self._nudge_counts[tick.step] += prober.batch_size
        weight = prober.batch_size / self._nudge_counts[tick.step]
        slots = prober.state.slots
        kept, slots[:] = list(slots), [[None] for _ in slots]
        try:
            for place, share in enumerate(NUDGES):
                moved = mapped(lambda now, then, share=share: torch.lerp(now, then, share), latents, before)
                prober.with_latents(moved).run(self._store)
                error = self._values(prober, filled_call(prober, self._whole, [1])) - fresh
                known = self._nudge_errors[place, tick.step]
                self._nudge_errors[place, tick.step] = _averaged(known, _mean_product(error, error), weight)
        finally:
            slots[:] = kept

    def _measure(self, tick: Tick, prober: Prober, fresh: torch.Tensor, what: tuple[Kind, int, int], gap: int) -> None:
        kind, order, at = what
        known = tick.step - self._first[tick.pass_index]  # steps of this pass so far
        for lag in range(1, min(self._reach[kind].max_run, known - order * gap) + 1):
            lags = [lag + place * gap for place in range(order + 1)]
            output = self._timed(filled_name(kind, order), prober, lambda lags=lags: filled_call(prober, kind, lags))
            computed = tick.step - lag
            run = self._errors.setdefault((tick.pass_index, kind, order, at, computed), [])
            run.append(self._values(prober, output) - fresh)
            products, counts = self._runs[kind][order, at, computed], self._counts[kind][order, at, computed]
            counts[lag - 1] += prober.batch_size
            weight = prober.batch_size / counts[lag - 1]
            for place, earlier in enumerate(run):
                mean = _averaged(products[place, lag - 1], _mean_product(earlier, run[-1]), weight)
                products[place, lag - 1] = products[lag - 1, place] = mean
            if lag == self._reach[kind].max_run:
                del self._errors[tick.pass_index, kind, order, at, computed]

    def _values(self, prober: Prober, output: Any) -> torch.Tensor:
        """Some values of every row's prediction ``[rows, values]``, in float32."""
        values = prober.prediction(output).flatten(1)
        if values.shape[1] > _NUM_VALUES:
            width = values.shape[1]  # of another size other ones
            if width not in self._chosen:
                order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
                self._chosen[width] = order[:_NUM_VALUES].to(values.device)
            values = values[:, self._chosen[width]]
        return values.float()

    def _timed(self, name: str, prober: Prober, run: Callable[[], Any]) -> Any:
        compat.synchronize(self._device)
        began = time.perf_counter()
        output = run()
        compat.synchronize(self._device)
        self._seconds.setdefault(name, []).append(time.perf_counter() - began)
        return output

    def _note_cost(self, prober: Prober) -> None:
        sites, cost = self._handle.sites, prober.cost()
        self._macs = macs_of(prober, self._reach)
        for kind in self._reach:
            ops = ops_of(sites, kind, Op.REUSE)
            self._bytes[kind.value] = sum(size for size, op in zip(cost.output_bytes, ops, strict=True) if op.is_filled)
        kinds: dict[int, str] = {}
        for kind in (Kind.BRANCHES, Kind.ATTENTION, Kind.MLP):  # a branch belongs to the last that reuses it
            kinds |= {place: kind.value for place, site in enumerate(sites) if _is_read(site, kind)}
        for place, name in kinds.items():
            own = sum(cost.site_macs[other] for other, kind in kinds.items() if kind == name)
            self._sites[sites[place].id] = name, cost.site_macs[place] / own

    def state(self) -> dict[str, Any]:
        """What was measured in the generations so far, for an instrument that goes on; tensors and plain data."""
        arrays = {"power": self._power, "rows": self._rows, "nudges": self._nudge_errors, "nudged": self._nudge_counts}
        return {
            "arrays": {name: torch.from_numpy(values) for name, values in arrays.items()},
            "runs": {kind.value: torch.from_numpy(values) for kind, values in self._runs.items()},
            "counts": {kind.value: torch.from_numpy(values) for kind, values in self._counts.items()},
            "seconds": self._seconds,
            "macs": self._macs,
            "sites": self._sites,
            "bytes": self._bytes,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` gave, to average over those generations too."""
        arrays = {name: values.numpy() for name, values in state["arrays"].items()}
        self._power, self._rows = arrays["power"], arrays["rows"]
        self._nudge_errors, self._nudge_counts = arrays["nudges"], arrays["nudged"]
        self._runs = {kind: state["runs"][kind.value].numpy() for kind in self._runs}
        self._counts = {kind: state["counts"][kind.value].numpy() for kind in self._runs}
        self._seconds, self._macs, self._sites, self._bytes = (state[x] for x in ("seconds", "macs", "sites", "bytes"))

    def result(self, num_samples: int, pause: float) -> Measurement:
        """What was measured.

        Args:
            num_samples: rows that were generated.
            pause: seconds between one denoiser call and the next.

        Raises:
            MethodError: an output was not finite.
        """
        if not np.isfinite(self._power).all():
            raise MethodError("the network's output is not finite: run the model in a wider dtype")
        # A reuse that overflowed in the tryout counts as one that wasn't measured: no plan has it.
        runs = {kind: np.where(np.isfinite(values), values, np.nan) for kind, values in self._runs.items()}
        seconds = {name: float(np.median(times)) for name, times in self._seconds.items()}
        seconds["pause"] = pause
        little, more = np.where(np.isfinite(self._nudge_errors), self._nudge_errors, np.nan)
        # In proportion to the change the squared errors would be as 1 to 4; noise adds the same to both, and to a real reuse's.
        ratio = (NUDGES[1] / NUDGES[0]) ** 2
        noise = (ratio * little - more) / (ratio - 1)
        roughness = np.full(len(noise), np.nan)
        if self._whole in self._reach:
            next_step = runs[self._whole][0, 0, :-1, 0, 0]  # squared error of reuse one step after a computed one
            roughness[1:] = noise[1:] / np.maximum(next_step, 1e-30)
        return Measurement(
            self._reach,
            runs,
            self._power,
            self._macs,
            seconds,
            num_samples,
            self._bytes,
            sites=self._sites,
            roughness=np.clip(roughness, 0, 1),
        )


def _is_read(site: Site, kind: Kind) -> bool:
    return ops_of([site], kind, Op.REUSE)[0] is Op.REUSE


def _averaged(known: float, value: float, weight: float) -> float:
    """The mean with one more value of this weight; the first replaces what is not a number, what overflowed stays so."""
    if np.isinf(known) or not np.isfinite(value):
        return np.inf
    return value if np.isnan(known) else known + weight * (value - known)


def _mean_product(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).mean())
