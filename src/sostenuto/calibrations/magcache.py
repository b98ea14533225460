"""MagCache's calibration: how the size of the residual of all blocks changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn

from sostenuto.block_tap import BlocksTap
from sostenuto.calibrations.base import Calibration, Settings, measure_uncached
from sostenuto.clock import Tick
from sostenuto.engine import Prober
from sostenuto.errors import MethodError
from sostenuto.methods.base import Method
from sostenuto.methods.checks import check_finite, check_number
from sostenuto.methods.magcache import MagCache, MagCacheRatios
from sostenuto.plan import Op
from sostenuto.sites import Site
from sostenuto.tap import kept


@dataclass(frozen=True)
class MagCacheCalibration(Calibration):
    """MagCache's calibration (arXiv 2506.09045): ``γ_p = mean_tokens(‖r_p‖ / ‖r_{p−1}‖)`` on uncached generations.

    The norm is taken over the channels in float32, the mean over tokens (the image's, where blocks have two streams), rows,
    passes and generations. One sample suffices in the paper.

    Attributes:
        target_skipped: share of the steps to be skipped, 0 and more and below 1, for which δ and K are chosen: the least K that
            can skip so many, and with it the δ that comes nearest. ``None``: left to you.
        retention: MagCache's share of the steps that are computed at the beginning, 0 to 1, for that choice.
    """

    target_skipped: float | None = None
    retention: float = 0.2

    method: ClassVar[str] = MagCache.name

    def __post_init__(self) -> None:
        if self.target_skipped is not None:
            check_number("MagCacheCalibration's target_skipped", self.target_skipped, least=0, below=1)
        check_finite("MagCacheCalibration's retention", self.retention, 0, 1)

    @classmethod
    def at_cost(cls, fraction: float) -> MagCacheCalibration:
        """Skip as many steps as the cost leaves over; a skipped step costs next to nothing."""
        return cls(target_skipped=1 - fraction)

    def run(self, settings: Settings) -> MagCacheRatios:
        """Measure and average."""
        series, identity = measure_uncached(settings, _Residual(), _ratio, num_slots=2)
        steps = range(len(series[0]))
        ratios = [_mean(one[step] for one in series if step in one) for step in steps]
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
            raise MethodError(
                "the blocks of this model add nothing or what is not finite: MagCache has nothing to go by"
            )
        if self.target_skipped is not None:
            identity = {**identity, "calibration": {**identity["calibration"], **self._chosen(ratios)}}
        return MagCacheRatios(tuple(ratios), **identity)

    def _chosen(self, ratios: Sequence[float]) -> dict[str, Any]:
        assert self.target_skipped is not None
        target, steps = self.target_skipped, len(ratios)

        def skipped(threshold: float, most: int) -> float:
            return fmean(
                MagCache(threshold=threshold, max_consecutive=most, retention=self.retention).skipped(ratios, steps)
            )

        enough = next(
            (most for most in range(steps) if skipped(_ANY, most) >= target - 1e-9), None
        )  # 1 − cost is rounded
        if enough is None:
            raise MethodError(
                f"target_skipped is {target:g}, but of {steps} steps {skipped(_ANY, steps):.3g} can be skipped at most: ask "
                "for less, or for a lower retention"
            )
        thresholds = sorted({error for start in range(steps) for error in _errors(ratios[start:])})
        threshold = min((0.0, *thresholds), key=lambda value: abs(skipped(value, enough) - target))
        found = skipped(threshold, enough)
        return {
            "target_skipped": target,
            "retention": self.retention,
            "threshold": threshold,
            "max_consecutive": enough,
            "skipped": found,
        }


def _mean(ratios: Iterable[float | None]) -> float:
    """Of those that are known; 1 where none is, as at the first step."""
    known = [ratio for ratio in ratios if ratio is not None]
    return fmean(known) if known else 1.0


_ANY = 1e9  # as a threshold: no bound


def _errors(ratios: Sequence[float]) -> Iterator[float]:
    """Where the plan changes: the errors of skipping one step, two steps, … from here on."""
    product, error = 1.0, 0.0
    for ratio in ratios:
        product *= ratio
        error += abs(1 - product)
        yield error


class _Residual(Method):
    """Computes everything; its one site is the residual of all blocks."""

    def sites(self, denoiser: nn.Module) -> list[Site]:
        return MagCache().sites(denoiser)


def _ratio(tick: Tick, prober: Prober) -> tuple[Any, float | None]:
    output = prober.run([Op.STORE])
    newest, previous = prober.state.slots[0]
    if previous is None:
        return output, None
    (tap,) = prober.handle._mount.taps
    assert isinstance(tap, BlocksTap)
    residuals = (tap.sample_of(residual) for residual in (kept(newest), previous))
    sizes, before = (torch.linalg.vector_norm(r, dim=-1, dtype=torch.float32) for r in residuals)
    return output, (sizes / before).mean().item()
