"""MagCache's calibration: how the size of the residual of all blocks changes from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn

from sostenuto.calibrations.base import Calibration, Settings, measure_uncached
from sostenuto.clock import Tick
from sostenuto.engine import Prober
from sostenuto.errors import MethodError
from sostenuto.methods.base import Method
from sostenuto.methods.magcache import MagCache, MagCacheRatios
from sostenuto.plan import Op
from sostenuto.sites import Site
from sostenuto.tap import kept


@dataclass(frozen=True)
class MagCacheCalibration(Calibration):
    """MagCache's calibration (arXiv 2506.09045): ``γ_p = mean_tokens(‖r_p‖ / ‖r_{p−1}‖)`` on uncached generations.

    The norm is taken over the channels in float32, the mean over tokens, rows, passes and generations. One sample suffices
    in the paper. There is nothing to choose.
    """

    method: ClassVar[str] = MagCache.name

    def run(self, settings: Settings) -> MagCacheRatios:
        """Measure and average."""
        series, identity = measure_uncached(settings, _Residual(), _ratio, num_slots=2)
        ratios = [fmean(at_step) for at_step in zip(*series, strict=True)]
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
            raise MethodError(
                "the blocks of this model add nothing or what is not finite: MagCache has nothing to go by"
            )
        return MagCacheRatios(tuple(ratios), **identity)


class _Residual(Method):
    """Computes everything; its one site is the residual of all blocks."""

    def sites(self, denoiser: nn.Module) -> list[Site]:
        return MagCache().sites(denoiser)


def _ratio(tick: Tick, prober: Prober) -> tuple[Any, float]:
    output = prober.run([Op.STORE])
    newest, previous = prober.state.slots[0]
    if previous is None:
        return output, 1.0
    sizes, before = (torch.linalg.vector_norm(r, dim=-1, dtype=torch.float32) for r in (kept(newest), previous))
    return output, (sizes / before).mean().item()
