"""TeaCache: skip all blocks while the estimated change of the output, accumulated, stays small (arXiv 2411.19108)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sostenuto.block_tap import BlocksTap
from sostenuto.errors import MethodError, TableError
from sostenuto.measured import Measured, check_numbers, check_timesteps
from sostenuto.methods import published
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_finite, check_flag, check_whole
from sostenuto.signals import relative_l1
from sostenuto.sites import Site, stack

# From the authors' code, highest power first.
_FLUX_DEV = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_HUNYUAN_VIDEO = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
_COGVIDEOX_5B = (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)
_COGVIDEOX_2B = (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434)
_OPEN_SORA = (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624)
_OPEN_SORA_PLAN = (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469)
_LATTE = (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402)
_MOCHI = (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719)
_LTX_VIDEO = (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)
_HIDREAM = (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901)
_LUMINA_2 = (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)

_THRESHOLD = 0.1


@dataclass(frozen=True)
class TeaCacheFit(Measured):
    """The polynomial fitted on a model and sampler, and a threshold that goes with it.

    Attributes:
        coefficients: highest power first.
        threshold: δ, or ``None`` where none was chosen.
    """

    coefficients: tuple[float, ...]
    threshold: float | None = None

    format: ClassVar[str] = "sostenuto-teacache"
    what: ClassVar[str] = "TeaCache polynomial"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "coefficients", check_numbers("coefficients", self.coefficients))
        if self.threshold is not None and check_numbers("threshold", [self.threshold])[0] < 0:
            raise TableError(f"threshold must be 0 or more, not {self.threshold!r}")


MODULATED_INPUT = "modulated-input"


@dataclass(frozen=True)
class TeaCache(Method):
    """TeaCache (arXiv 2411.19108): a step is skipped until the estimated change of the output adds up to δ.

    The signal is the input of the first attention, normalised and modulated by the timestep, or for some models the embedding
    of the timestep. From one step to the next it
    changes by ``d = mean|m − m_prev| / mean|m_prev|`` (taken in float32); a polynomial turns d into an estimate of the
    output's relative change: ``acc ← acc + poly(d)``. While ``acc < δ`` all blocks are skipped, ``x_out = x_in + R``;
    otherwise ``acc ← 0``, the blocks run and their residual R is kept. Each pass of a step decides for itself.

    Attributes:
        coefficients: of the polynomial, highest power first, or the measured :class:`TeaCacheFit`, or its file. They belong to
            one model, sampler and resolution: those of the presets are refused on another network. By default the identity: the
            output is taken to change as the signal does.
        threshold: the paper's δ, 0 or more; by default the fit's, else 0.1.
        clamp_negative: take a negative estimate as 0. Published polynomials have negative values in places and, as in the
            authors' code, those lower the sum.
        signal: what is watched: ``"modulated-input"``, or the path of a module in front of the blocks whose output it is, as
            ``"time_embedding"``; by default what the fit was made on. A polynomial belongs to its signal.
        first_steps: how many steps at the beginning are computed, 1 or more.
        last_steps: how many steps at the end are computed, 0 or more. The authors: 1 and 1; for Wan also 5 and 0.
    """

    coefficients: tuple[float, ...] | TeaCacheFit | str | Path = (1.0, 0.0)
    threshold: float | None = None
    clamp_negative: bool = False
    first_steps: int = 1
    last_steps: int = 1
    signal: str | None = None

    name: ClassVar[str] = "teacache"
    paper: ClassVar[str] = "arXiv 2411.19108"
    summary: ClassVar[str] = "skips all blocks until the estimated change of the output adds up"
    calibrated: ClassVar[bool] = True
    compiles: ClassVar[bool] = False
    state: ClassVar[str] = "one residual of all blocks, one input of the first attention"
    bytes_per_token: ClassVar[str] = "2 × b × d"

    def __post_init__(self) -> None:
        if isinstance(self.coefficients, (list, tuple)):
            try:
                object.__setattr__(self, "coefficients", check_numbers("coefficients", self.coefficients))
            except TableError as error:
                raise MethodError(f"TeaCache's {error}") from None
        elif not isinstance(self.coefficients, (TeaCacheFit, str, Path)):
            raise MethodError(
                f"TeaCache's coefficients are numbers, a TeaCacheFit or its file, not {self.coefficients!r}"
            )
        if self.threshold is not None:
            check_finite("TeaCache's threshold", self.threshold, 0)
        check_flag("TeaCache's clamp_negative", self.clamp_negative)
        check_whole("TeaCache's first_steps", self.first_steps, least=1)
        check_whole("TeaCache's last_steps", self.last_steps, least=0)
        if self.signal is not None and not (isinstance(self.signal, str) and self.signal):
            raise MethodError(f"TeaCache's signal is 'modulated-input' or the path of a module, not {self.signal!r}")

    @classmethod
    def flux_dev(cls, threshold: float = 0.25) -> TeaCache:
        """FLUX.1-dev: δ = 0.25, 0.4, 0.6, 0.8 for 1.5×, 1.8×, 2.0×, 2.25×."""
        return cls(TeaCacheFit(_FLUX_DEV, model=published.FLUX_DEV), threshold)

    @classmethod
    def hunyuan_video(cls, threshold: float = 0.1) -> TeaCache:
        """HunyuanVideo: δ = 0.1, 0.15 for 1.6×, 2.1×."""
        return cls(TeaCacheFit(_HUNYUAN_VIDEO, model=published.HUNYUAN_VIDEO), threshold)

    @classmethod
    def cogvideox_5b(cls, threshold: float = 0.1) -> TeaCache:
        """CogVideoX-5B: δ from 0.1 to 0.3; the signal is the embedding of the timestep, as in the authors' code."""
        return cls(TeaCacheFit(_COGVIDEOX_5B, model=published.COGVIDEOX_5B), threshold, signal="time_embedding")

    @classmethod
    def consisid(cls, threshold: float = 0.1) -> TeaCache:
        """ConsisID, with the polynomial of CogVideoX-5B: δ from 0.1 to 0.3."""
        return cls(TeaCacheFit(_COGVIDEOX_5B, model=published.CONSISID), threshold, signal="time_embedding")

    @classmethod
    def cogvideox_2b(cls, threshold: float) -> TeaCache:
        """CogVideoX-2B; no δ is at hand."""
        return cls(TeaCacheFit(_COGVIDEOX_2B, model=published.COGVIDEOX_2B), threshold, signal="time_embedding")

    @classmethod
    def open_sora(cls, threshold: float = 0.1) -> TeaCache:
        """Open-Sora 1.2: δ = 0.1 (1.55×), 0.2 (2.25×)."""
        return cls(TeaCacheFit(_OPEN_SORA, model=published.OPEN_SORA), threshold)

    @classmethod
    def open_sora_plan(cls, threshold: float = 0.1) -> TeaCache:
        """Open-Sora-Plan 1.1: δ = 0.1 (4.41×), 0.2 (6.83×)."""
        return cls(TeaCacheFit(_OPEN_SORA_PLAN, model=published.OPEN_SORA_PLAN), threshold)

    @classmethod
    def latte(cls, threshold: float = 0.1) -> TeaCache:
        """Latte: δ = 0.1 (1.86×), 0.2 (3.28×)."""
        return cls(TeaCacheFit(_LATTE, model=published.LATTE), threshold)

    @classmethod
    def mochi(cls, threshold: float = 0.06) -> TeaCache:
        """Mochi: δ = 0.06, 0.09, not confirmed."""
        return cls(TeaCacheFit(_MOCHI, model=published.MOCHI), threshold)

    @classmethod
    def ltx_video(cls, threshold: float = 0.03) -> TeaCache:
        """LTX-Video: δ = 0.03, 0.05, not confirmed."""
        return cls(TeaCacheFit(_LTX_VIDEO, model=published.LTX_VIDEO), threshold)

    @classmethod
    def hidream(cls, threshold: float) -> TeaCache:
        """HiDream-I1 Full, 50 steps: δ = 0.17, 0.25, 0.3, 0.45 for 1.5×, 1.7×, 2.0×, 2.6×.

        As in the authors' code the signal is the embedding of the timestep, and the first tenth of the steps is computed.
        """
        fit = TeaCacheFit(_HIDREAM, model=published.HIDREAM)
        return cls(fit, threshold, first_steps=5, last_steps=0, signal="t_embedder")

    @classmethod
    def lumina_2(cls, threshold: float) -> TeaCache:
        """Lumina-2: δ = 0.2, 0.3, 0.4, 0.5 for 1.25×, 1.56×, 2.08×, 2.5×."""
        return cls(TeaCacheFit(_LUMINA_2, model=published.LUMINA_2), threshold)

    @classmethod
    def lumina_t2x(cls, threshold: float) -> TeaCache:
        """Lumina-T2X, with the polynomial of Lumina-2; no δ is at hand."""
        return cls(TeaCacheFit(_LUMINA_2, model=published.LUMINA_T2X), threshold)

    @property
    def num_inference_steps(self) -> int | None:
        """That of the timesteps that the fit was made on."""
        fit = self.coefficients
        return (
            len(fit.scheduler["timesteps"]) if isinstance(fit, TeaCacheFit) and "timesteps" in fit.scheduler else None
        )

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> TeaCache:
        """Load the fit and refuse one that was made on something else."""
        fit = self.coefficients
        if isinstance(fit, (str, Path)):
            fit = TeaCacheFit.load(fit)
        if isinstance(fit, TeaCacheFit):
            fit.check(denoiser, scheduler)
        made_on = fit.calibration.get("signal") if isinstance(fit, TeaCacheFit) else None
        signal = self.signal or (made_on if isinstance(made_on, str) else MODULATED_INPUT)
        if signal != MODULATED_INPUT and signal not in dict(denoiser.named_modules(remove_duplicate=False)):
            raise MethodError(
                f"TeaCache watches {signal!r}, and this {type(denoiser).__name__} has no such module: name one in front of its "
                f"blocks, or {MODULATED_INPUT!r}"
            )
        return replace(self, coefficients=fit, signal=signal)

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The residual of all blocks."""
        return [stack(denoiser)]

    def tap(self, site: Site, denoiser: nn.Module) -> BlocksTap:
        """Watches what the first attention is given, or another module makes."""
        return BlocksTap(site, denoiser, watch=self.signal or MODULATED_INPUT)

    def policy(self, facts: Facts) -> _Policy:
        """Accumulate the estimated change."""
        if isinstance(self.coefficients, TeaCacheFit) and "timesteps" in self.coefficients.scheduler:
            check_timesteps(TeaCacheFit.what, self.coefficients.scheduler["timesteps"], facts.timesteps)
        return _Policy(_Accumulator(self, facts.first_step))

    def replay(self, distances: Sequence[float]) -> list[bool]:
        """Which steps are skipped when the signal changes by these distances, the first one being that of step 1."""
        accumulator = _Accumulator(self)
        num_steps = len(distances) + 1
        return [accumulator.skips(p, num_steps, d) for p, d in enumerate((math.nan, *distances))]


class _Accumulator:
    """The sum of estimated changes since the last computed step."""

    def __init__(self, method: TeaCache, first_step: int = 0) -> None:
        self._warm_from = first_step + method.first_steps
        fit, threshold = method.coefficients, method.threshold
        if isinstance(fit, TeaCacheFit):
            fit, threshold = fit.coefficients, fit.threshold if threshold is None else threshold
        assert isinstance(fit, tuple)
        self._method, self._coefficients = method, fit
        self._threshold = _THRESHOLD if threshold is None else threshold
        self._sum = 0.0

    def skips(self, step: int, num_steps: int, distance: float) -> bool:
        """Add the estimate for this distance (not finite: unknown); whether the step is skipped."""
        may_skip = self._warm_from <= step < num_steps - self._method.last_steps
        if may_skip and math.isfinite(distance):
            change = polynomial(self._coefficients, distance)
            self._sum += max(0.0, change) if self._method.clamp_negative else change
            if self._sum < self._threshold:
                return True
        self._sum = 0.0
        return False


class _Policy:
    forecast_order = 0

    def __init__(self, accumulator: _Accumulator) -> None:
        self._accumulator = accumulator
        self._previous: torch.Tensor | None = None

    def skips(self, step: int, num_steps: int, signal: torch.Tensor, computed: Sequence[int]) -> bool:
        """Whether the sum stays below the threshold."""
        previous, self._previous = self._previous, signal.detach()  # at every step, not only at computed ones
        distance = math.nan if previous is None else relative_l1(signal, previous)
        return self._accumulator.skips(step, num_steps, distance)

    @property
    def num_bytes(self) -> int:
        """Of the last signal."""
        return 0 if self._previous is None else self._previous.nbytes


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """The polynomial's value by Horner's rule; coefficients highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
