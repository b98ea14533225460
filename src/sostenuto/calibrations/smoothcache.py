"""SmoothCache's calibration: the error of reuse at every site, step and lag, measured in uncached runs (arXiv 2411.10510)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sostenuto.calibrations.base import Calibration, Settings, made_for
from sostenuto.clock import Tick
from sostenuto.cost import Cost
from sostenuto.engine import Handle, attach
from sostenuto.errors import MethodError
from sostenuto.methods import NoCache, SmoothCache
from sostenuto.methods.smoothcache import GroupBy, ReuseErrors, check_options
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.progress import progress
from sostenuto.table import CacheTable, StepState


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
        """The α published for DiT-XL/2 256² with DDIM: 0.18 for 50 steps (also 0.08), 0.35 for 30."""
        published = {50: 0.18, 30: 0.35}
        if num_inference_steps not in published:
            raise MethodError(
                f"alpha is published for 50 and 30 steps, not {num_inference_steps!r}: choose one yourself"
            )
        return cls(alpha=published[num_inference_steps])

    def run(self, settings: Settings) -> CacheTable:
        """Measure over as many runs as the samples need, then make the schedule."""
        noise = settings.fresh_generator()
        with (
            attach(settings.target, NoCache(), scheduler=settings.scheduler) as handle,
            progress(settings.num_samples, "calibrate", settings.show_progress) as bar,
        ):
            meter = ErrorMeter(handle, self.max_lag)
            handle.driver, handle.driver_slots = meter, self.max_lag + 1
            while meter.num_samples < settings.num_samples:
                meter.steps = []
                settings.generate(noise)
                settings.check_steps(len(meter.steps), meter.num_steps)
                meter.num_samples += meter.batch_size
                bar.update(meter.batch_size)
            identity = made_for(handle)
        measured = CacheTable(
            actions=(StepState.COMPUTE,) * meter.num_steps,
            method=self.method,
            model=identity["model"],
            scheduler=identity["scheduler"],
            calibration={"num_samples": meter.num_samples, "seed": settings.seed, **meter.errors().as_dict()},
        )
        method = SmoothCache.from_errors(
            measured,
            self.alpha,
            max_lag=min(self.max_lag, meter.num_steps - 1),
            group_by=self.group_by,
            target_fraction=self.target_fraction,
        )
        assert isinstance(method.table, CacheTable)
        return method.table


class ErrorMeter:
    """Stands in for the plan: computes everything and compares each output with those of the last ``max_lag`` steps."""

    def __init__(self, handle: Handle, max_lag: int) -> None:
        self.handle, self.max_lag = handle, max_lag
        self.num_samples = self.num_steps = self.batch_size = 0
        self.steps: list[int] = []
        self._cost: Cost | None = None
        self._totals: dict[tuple[int, int, int], float] = {}  # (site, lag, p) → sum over rows and passes
        self._rows: dict[tuple[int, int], int] = {}  # (lag, p) → how many

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        """Carry out one denoiser call of the calibration and measure."""
        output = prober.run([Op.STORE] * len(self.handle.sites))
        self.num_steps, self.batch_size = tick.num_steps, prober.batch_size
        if tick.pass_index == 0:
            self.steps.append(tick.step)
        self._cost = self._cost or prober.cost()
        lags = 0
        for site, slots in enumerate(prober.state.slots):
            fresh, *earlier = (slot for slot in slots if slot is not None)  # newest first
            lags = len(earlier)
            if not earlier:
                continue
            errors = torch.stack([relative_l1(stale, fresh) for stale in earlier]).tolist()
            for lag, error in enumerate(errors, 1):
                key = (site, lag, tick.step - lag)
                self._totals[key] = self._totals.get(key, 0.0) + error * prober.batch_size
        for lag in range(1, lags + 1):
            key = (lag, tick.step - lag)
            self._rows[key] = self._rows.get(key, 0) + prober.batch_size
        return output

    def errors(self) -> ReuseErrors:
        """The mean errors.

        Raises:
            MethodError: an output was not finite.
        """
        assert self._cost is not None
        sites, cost = self.handle.sites, self._cost
        errors: dict[str, list[list[float]]] = {}
        for index, site in enumerate(sites):
            errors[site.id] = [
                [_rounded(self._totals[index, lag, p] / self._rows[lag, p]) for p in range(self.num_steps - lag)]
                for lag in range(1, min(self.max_lag, self.num_steps - 1) + 1)
            ]
            if not all(math.isfinite(error) for row in errors[site.id] for error in row):
                raise MethodError(f"the output of {site.id} is not finite: run the model in a wider dtype")
        return ReuseErrors(
            errors,
            {site.id: site.kind.value for site in sites},
            {site.id: macs / cost.macs for site, macs in zip(sites, cost.site_macs, strict=True)},
        )


def relative_l1(stale: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """``‖stale − fresh‖₁ / ‖fresh‖₁``, the mean over the rows of ``[rows, …]``; 0 where both are all zeros."""
    stale, fresh = stale.flatten(1).float(), fresh.flatten(1).float()
    return ((stale - fresh).abs().sum(1) / fresh.abs().sum(1).clamp_min(1e-30)).mean()


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # the table stays readable
