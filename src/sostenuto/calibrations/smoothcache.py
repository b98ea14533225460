"""SmoothCache's calibration: the error of reuse at every site, step and lag, measured in uncached runs (arXiv 2411.10510)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

import torch

from sostenuto.calibrations.base import Calibration, Settings, made_for
from sostenuto.clock import Tick
from sostenuto.cost import Cost
from sostenuto.distributed.world import until
from sostenuto.engine import Handle, attach
from sostenuto.errors import MethodError
from sostenuto.features import Feature, leaves
from sostenuto.methods import NoCache, SmoothCache
from sostenuto.methods.smoothcache import GroupBy, ReuseErrors, check_options
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.progress import progress
from sostenuto.sites import Site
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable


@dataclass(frozen=True)
class SmoothCacheCalibration(Calibration):
    """SmoothCache's calibration (arXiv 2411.10510, section 3): uncached runs, then a greedy schedule for each type.

    The table keeps the errors, so that :meth:`SmoothCache.from_errors` tries other options without a new run.

    Attributes:
        alpha: the paper's α, the largest relative L1 error that is accepted, 0 or more.
        max_lag: the longest stretch of reuse, 1 or more; ``max_lag + 1`` outputs per site are held while measuring.
        group_by: one schedule for each ``"type"`` of component, as in the paper, or for each ``"site"``.
        target_fraction: find α such that a generation costs this share of the uncached multiply-accumulates, above 0 and at
            most 1; ``None`` takes ``alpha``.
    """

    alpha: float = 0.18
    max_lag: int = 3
    group_by: GroupBy = "type"
    target_fraction: float | None = None

    method: ClassVar[str] = "smoothcache"

    def __post_init__(self) -> None:
        check_options(self.alpha, self.max_lag, self.group_by, self.target_fraction)

    @classmethod
    def dit_xl_2(cls, num_inference_steps: int = 50) -> SmoothCacheCalibration:
        """The α published for DiT-XL/2 256² with DDIM: 0.18 for 50 steps (also 0.08), 0.35 for 30, 0.08 for 70."""
        published = {50: 0.18, 30: 0.35, 70: 0.08}
        if num_inference_steps not in published:
            known = ", ".join(map(str, published))
            raise MethodError(f"alpha is published for {known} steps, not {num_inference_steps!r}: choose one yourself")
        return cls(alpha=published[num_inference_steps])

    def run(self, settings: Settings) -> CacheTable:
        """Measure over as many runs as the samples need, then make the schedule."""
        with (
            attach(settings.target, NoCache(), scheduler=settings.scheduler) as handle,
            progress(settings.num_samples, "calibrate", settings.show_progress) as bar,
        ):
            handle.driver_slots = self.max_lag + 1

            def generation(call: int) -> Measured:
                meter = handle.driver = ErrorMeter(handle, self.max_lag)
                settings.generate(settings.generator_of(call))
                settings.check_steps(len(meter.steps), meter.found.num_steps)
                bar.update(meter.found.num_samples)
                return meter.found

            found = merged(until(settings.enough(lambda one: one.num_samples), generation))
            errors = found.errors(handle.sites)
            identity = made_for(handle)
        measured = CacheTable(
            actions=(StepState.COMPUTE,) * found.num_steps,
            method=self.method,
            model=identity["model"],
            scheduler=identity["scheduler"],
            calibration={"num_samples": found.num_samples, "seed": settings.seed, **errors.as_dict()},
        )
        method = SmoothCache.from_errors(
            measured,
            self.alpha,
            max_lag=min(self.max_lag, found.num_steps - 1),
            group_by=self.group_by,
            target_fraction=self.target_fraction,
        )
        assert isinstance(method.table, CacheTable)
        return method.table


@dataclass
class Measured:
    """What one generation measured, or several together.

    Attributes:
        num_samples: rows of the denoiser's batch.
        num_steps: steps of a generation.
        cost: of a call.
        totals: by site, lag and step, the sum of the errors over rows and passes.
        rows: over how many; of a site that a pass leaves out those of the others.
    """

    num_samples: int = 0
    num_steps: int = 0
    cost: Cost | None = None
    totals: dict[tuple[int, int, int], float] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def errors(self, sites: Sequence[Site]) -> ReuseErrors:
        """The mean errors.

        Raises:
            MethodError: an output was not finite.
        """
        assert self.cost is not None
        cost, max_lag = self.cost, max(lag for _, lag, _ in self.rows)
        means = {key: _rounded(total / self.rows[key]) for key, total in self.totals.items()}

        def error(site: Site, index: int, lag: int, step: int) -> float:
            if (index, lag, step) in means:
                return means[index, lag, step]
            # No pass runs it here: its kind's mean leaves the kind's schedule as it is.
            own = [(other, lag, step) for other, one in enumerate(sites) if one.kind is site.kind]
            return _rounded(fmean([means[key] for key in own if key in means] or [0.0]))

        errors: dict[str, list[list[float]]] = {}
        for index, site in enumerate(sites):
            errors[site.id] = [
                [error(site, index, lag, p) for p in range(self.num_steps - lag)] for lag in range(1, max_lag + 1)
            ]
            if not all(math.isfinite(error) for row in errors[site.id] for error in row):
                raise MethodError(f"the output of {site.id} is not finite: run the model in a wider dtype")
        return ReuseErrors(
            errors,
            {site.id: site.kind.value for site in sites},
            {site.id: macs / cost.macs for site, macs in zip(sites, cost.site_macs, strict=True)},
        )


def merged(parts: Sequence[Measured]) -> Measured:
    """Several generations together."""
    whole = Measured(num_steps=parts[0].num_steps, cost=parts[0].cost)
    for part in parts:
        whole.num_samples += part.num_samples
        for key, total in part.totals.items():
            whole.totals[key] = whole.totals.get(key, 0.0) + total
        for key, rows in part.rows.items():
            whole.rows[key] = whole.rows.get(key, 0) + rows
    return whole


class ErrorMeter:
    """Stands in for the plan: computes everything and compares each output with those of the last ``max_lag`` steps."""

    def __init__(self, handle: Handle, max_lag: int) -> None:
        self.handle, self.max_lag = handle, max_lag
        self.found = Measured()
        self.steps: list[int] = []

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        """Carry out one denoiser call of the calibration and measure."""
        output = prober.run([Op.STORE] * len(self.handle.sites))
        found = self.found
        found.num_steps, found.num_samples = tick.num_steps, prober.batch_size
        found.cost = found.cost or prober.cost()
        if tick.pass_index == 0:
            self.steps.append(tick.step)
        for site, slots in enumerate(prober.state.slots):
            known = [slot for slot in slots if slot is not None]  # newest first
            if len(known) < 2:  # the pass begins, or leaves the site out
                continue
            fresh, *earlier = known
            errors = torch.stack([relative_l1(stale, fresh) for stale in earlier]).tolist()
            for lag, error in enumerate(errors, 1):
                key = (site, lag, tick.step - lag)
                found.totals[key] = found.totals.get(key, 0.0) + error * prober.batch_size
                found.rows[key] = found.rows.get(key, 0) + prober.batch_size
        return output


def relative_l1(stale: Feature, fresh: Feature) -> torch.Tensor:
    """``‖stale − fresh‖₁ / ‖fresh‖₁``, the mean over the rows of ``[rows, …]``; 0 where both are all zeros.

    Of joint attention all streams together.
    """
    stale, fresh = (torch.cat([part.flatten(1).float() for part in leaves(value)], dim=1) for value in (stale, fresh))
    return ((stale - fresh).abs().sum(1) / fresh.abs().sum(1).clamp_min(1e-30)).mean()


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # the table stays readable
