"""Time-Shift Sampler: tell the network the timestep whose noise level the latents really have (arXiv 2305.15583)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sostenuto.compat import config_of
from sostenuto.errors import MethodError
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_flag, check_number, check_whole
from sostenuto.schedulers import is_flow


@dataclass(frozen=True)
class TimeShift(Method):
    """Time-Shift Sampler (arXiv 2305.15583): the network is given ``t_s = argmin |σ²_{t'} − var(x)|`` near the nominal t.

    ``σ²_{t'} = 1 − ᾱ_{t'}``, the variance is that of a sample's own pixels and channels, and t' runs over the whole numbers of
    the training grid within the window. Only the timestep that the network sees is shifted: the scheduler's update and all
    decisions about caching keep the nominal step. The first step, where nothing has drifted yet, is not shifted.

    Attributes:
        window: full width of the window, w, 1 or more timesteps.
        cutoff: only timesteps above it are shifted, 0 or more.
        halve_window: search ``window // 2`` on each side (the paper, and the official PNDM and DPM-Solver code), or the full
            ``window`` on each side (the official DEIS code).
        data_variance: variance of the data itself, so that ``σ²_{t'} = 1 − ᾱ_{t'} + ᾱ_{t'} · data_variance``. The paper leaves
            it out (0); samples whose own variance is not small need it. At 1 all noise levels would look alike.
    """

    window: int = 10
    cutoff: int = 300
    halve_window: bool = True
    data_variance: float = 0.0

    name: ClassVar[str] = "time-shift"
    paper: ClassVar[str] = "arXiv 2305.15583"
    summary: ClassVar[str] = "gives the network the timestep that fits the latents' variance; no caching"
    denoisers: ClassVar[str] = "any"

    def __post_init__(self) -> None:
        check_whole("TimeShift's window", self.window, least=1)
        check_whole("TimeShift's cutoff", self.cutoff, least=0)
        check_flag("TimeShift's halve_window", self.halve_window)
        check_number("TimeShift's data_variance", self.data_variance, least=0)
        if self.data_variance == 1:
            raise MethodError("TimeShift can't tell noise levels apart where data_variance is 1: leave TimeShift out")

    @classmethod
    def f_pndm_cifar10(cls) -> TimeShift:
        """CIFAR-10, F-PNDM, 100 steps: published w = 5, cut-off 550."""
        return cls(window=5, cutoff=550)

    @classmethod
    def dpm_solver_cifar10(cls) -> TimeShift:
        """CIFAR-10, DPM-Solver, 5 steps: published w = 30, cut-off 300."""
        return cls(window=30, cutoff=300)

    @classmethod
    def deis_cifar10(cls) -> TimeShift:
        """CIFAR-10, DEIS, 5 steps: published w = 10, cut-off 900, the window not halved."""
        return cls(window=10, cutoff=900, halve_window=False)

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> TimeShift:
        """Refuse a scheduler without a training grid of noise levels."""
        if getattr(scheduler, "alphas_cumprod", None) is None or is_flow(scheduler):
            raise MethodError(
                f"TimeShift needs the noise levels of a training grid (alphas_cumprod), which {type(scheduler).__name__} "
                "has not: use it with variance-preserving diffusion"
            )
        if getattr(getattr(scheduler, "config", None), "timestep_type", "discrete") != "discrete":
            raise MethodError(
                f"TimeShift searches among the whole timesteps of the training grid, but this {type(scheduler).__name__} gives "
                f"the network others (timestep_type={scheduler.config.timestep_type!r}): use timestep_type='discrete'"
            )
        return self

    def time_shifter(self, facts: Facts) -> VarianceMatch:
        """The search, for this scheduler's noise levels."""
        alphas = facts.scheduler.alphas_cumprod.float()
        reach = self.window // 2 if self.halve_window else self.window
        first = facts.timesteps[facts.first_step]
        channels = config_of(facts.denoiser).get("out_channels")
        return VarianceMatch(1 - alphas + alphas * self.data_variance, reach, self.cutoff, first, channels)


class VarianceMatch:
    """Finds for each sample the timestep whose marginal variance is nearest to the sample's own.

    Args:
        variances: σ² of every timestep of the training grid.
        reach: how far to search on each side of the nominal timestep.
        cutoff: only timesteps above it are shifted.
        first: the nominal timestep of the first step, which is not shifted.
        channels: the most that an image ``[batch, channels, height, width]`` has of its own: behind them stand a mask, or an
            image to be edited.
    """

    def __init__(
        self, variances: torch.Tensor, reach: int, cutoff: int, first: float, channels: int | None = None
    ) -> None:
        self._variances, self._reach, self._cutoff, self._first = variances, reach, cutoff, first
        self._channels = channels

    def shift(self, timestep: float, latents: torch.Tensor) -> torch.Tensor | None:
        """One timestep per sample ``[batch]`` (int64), or ``None`` where the nominal one stays."""
        if timestep <= self._cutoff or timestep == self._first:
            return None
        nominal = round(timestep)
        lowest = max(0, nominal - self._reach)
        self._variances = self._variances.to(latents.device)
        candidates = self._variances[lowest : nominal + self._reach + 1]  # a slice ends with the grid
        if self._channels and latents.ndim == 4:
            latents = latents[:, : self._channels]
        own = latents.float().flatten(1).var(dim=1)
        return lowest + (candidates - own[:, None]).abs().argmin(dim=1)
