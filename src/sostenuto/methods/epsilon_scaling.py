"""Epsilon Scaling: divide the predicted noise by a factor slightly above 1 (arXiv 2308.15321)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from sostenuto.clock import normalized_times
from sostenuto.correct import NoiseScale, check_noise_scale
from sostenuto.errors import MethodError, TableError
from sostenuto.measured import Measured, check_numbers, check_timesteps
from sostenuto.methods.base import Facts, Method
from sostenuto.methods.checks import check_choice, is_whole
from sostenuto.schedulers import direction_shares

if TYPE_CHECKING:
    from sostenuto.analysis import NormCurves


@dataclass(frozen=True)
class NoiseScales(Measured):
    """Calibrated factors b by which the predicted noise is multiplied, per step in sampling order, for two kinds of calls.

    Attributes:
        computed: b where a call runs every site in full; above 0.
        reused: b where a call fills anything in; as many.
    """

    computed: tuple[float, ...]
    reused: tuple[float, ...]

    format: ClassVar[str] = "sostenuto-noise-scales"
    what: ClassVar[str] = "noise scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("computed", "reused"):
            object.__setattr__(self, name, check_numbers(name, getattr(self, name)))
            if min(getattr(self, name)) <= 0:
                raise TableError(f"{name} must be numbers above 0, not {min(getattr(self, name))}; 1 means no scaling")
        if len(self.computed) != len(self.reused):
            raise TableError(
                f"computed has {len(self.computed)} entries and reused {len(self.reused)}: give one per step"
            )

    def check_steps(self, timesteps: Sequence[float]) -> None:
        """Refuse a generation of another length or with other timesteps.

        Raises:
            TableError: with both numbers and the remedy.
        """
        check_timesteps(self.what, self.scheduler.get("timesteps", [*timesteps][: len(self.computed)]), timesteps)


@dataclass(frozen=True)
class EpsilonScaling(Method):
    """Epsilon Scaling (arXiv 2308.15321, equation 14): ``ε ← ε / λ``, against the over-prediction of noise while sampling.

    Applied to the denoiser's output, hence to all of the update (x₀ and direction), after the guidance in effect. A network
    that predicts velocity, x₀ or a flow has its noise scaled and its x₀ rebuilt from that.

    ``apply_to="x0_only"`` scales the noise where x₀ is computed and leaves the direction alone, as the authors' code for LDM
    does: ``x_{t'} = α'·x₀(ε/λ) + σ'·ε``. For DDIM with η = 0 and Euler's method that equals a factor b' of all the noise, with
    ``b' = (1/λ − r) / (1 − r)`` and ``r = (σ'/α') / (σ/α)``; for DDPM, which reads nothing but x₀, ``b' = 1/λ``.

    Attributes:
        scale: λ, one number or one per step in sampling order; above 1 takes noise away less strongly. EB-Cache's b is 1/λ.
            Or calibrated :class:`NoiseScales` (or their file), whose factors b differ where a call was computed or reused.
        end: λ at the last step, towards which ``scale`` then goes linearly from the first; ``None``: λ as given.
        apply_to: ``"all"`` of the update, or ``"x0_only"``, which other samplers than those above, samplers that clip x₀, and
            calibrated scales (measured with all of the update) are refused.
    """

    scale: float | tuple[float, ...] | NoiseScales | str | Path = 1.005
    end: float | None = None
    apply_to: Literal["all", "x0_only"] = "all"

    name: ClassVar[str] = "epsilon-scaling"
    paper: ClassVar[str] = "arXiv 2308.15321"
    summary: ClassVar[str] = "divides the predicted noise by λ; no caching"
    denoisers: ClassVar[str] = "any"

    def __post_init__(self) -> None:
        check_choice("apply_to", self.apply_to, ("all", "x0_only"))
        if isinstance(self.scale, (NoiseScales, Path)) or (
            isinstance(self.scale, str) and self.scale.endswith(".json")
        ):
            if self.apply_to == "x0_only":
                raise MethodError(
                    "EpsilonScaling's calibrated scales were measured on all of the update: leave out apply_to"
                )
            if self.end is not None:
                raise MethodError("EpsilonScaling's calibrated scales say b of every step: leave out end")
            return
        check_noise_scale(self.scale)  # type: ignore[arg-type]
        if self.end is not None:
            check_noise_scale((self.end,))
            if not isinstance(self.scale, (int, float)):
                raise MethodError(
                    "EpsilonScaling goes from one number to end: give one scale, or one per step and no end"
                )

    @property
    def num_inference_steps(self) -> int | None:
        """That of the scales, where there is one per step."""
        scales = self.scale.computed if isinstance(self.scale, NoiseScales) else self.scale
        return len(scales) if isinstance(scales, tuple) else None

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> EpsilonScaling:
        """Load calibrated scales and refuse those that were measured on something else."""
        if isinstance(self.scale, (str, Path)):
            return replace(self, scale=NoiseScales.load(self.scale)).prepare(denoiser, scheduler)
        if isinstance(self.scale, NoiseScales):
            self.scale.check(denoiser, scheduler)
        if self.apply_to == "x0_only":
            direction_shares(scheduler, ())  # refuses a sampler without this meaning
        return self

    def noise_scale(self, facts: Facts) -> Sequence[float] | NoiseScale:
        """1/λ for every step, or the calibrated b."""
        assert not isinstance(self.scale, (str, Path))
        if isinstance(self.scale, NoiseScales):
            self.scale.check_steps(facts.timesteps)
            return NoiseScale(self.scale.computed, self.scale.reused)
        if self.end is None:
            scales = check_noise_scale(self.scale, facts.num_steps)
        else:
            assert isinstance(self.scale, (int, float))
            scales = tuple(tau * self.scale + (1 - tau) * self.end for tau in normalized_times(facts.num_steps))
        if self.apply_to == "all":
            return [1 / scale for scale in scales]
        shares = direction_shares(facts.scheduler, facts.timesteps)
        return [_of_x0_only(step, *pair) for step, pair in enumerate(zip(scales, shares, strict=True))]

    # --- schedules -----------------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, start: float, end: float) -> EpsilonScaling:
        """The paper's ``λ(t) = k·t + b``, for any number of steps: from ``start`` (noisiest) to ``end`` (last step).

        Over the descending index t = S−1 … 0, ``start = k·(S − 1) + b`` and ``end = b``. The authors' code gives the mean
        λ̄ instead: ``start, end = λ̄ ± k·(S − 1)/2``.
        """
        return cls(start, end)

    @classmethod
    def measured(
        cls,
        curves: NormCurves,
        kind: Literal["per_step", "cumulative"] = "per_step",
        window: int = 5,
    ) -> EpsilonScaling:
        """λ(t) from measured norms of the noise, for the number of steps they were measured with.

        The ratio of the norms, sampling chain over noised real data, is what all steps so far have done together. Its
        logarithm is smoothed by a running mean, in a window that is symmetric and therefore shrinks at the ends.

        Args:
            curves: what :func:`sostenuto.analysis.noise_norm_curves` returns.
            kind: ``"per_step"``, as in the paper, takes the factor by which the ratio grows at each step, so that the
                product up to a step is its ratio; ``"cumulative"`` takes the ratio itself, which brings every single
                prediction to the norm that it has on real data.
            window: steps in a running mean, odd, 1 for no smoothing.

        Raises:
            MethodError: an option makes no sense, or a ratio is not a finite number above 0.
        """
        check_choice("kind", kind, ("per_step", "cumulative"))
        if not is_whole(window, least=1) or window % 2 == 0:
            raise MethodError(f"window must be an odd whole number of 1 or more, not {window!r}")
        for step, ratio in enumerate(curves.ratios):
            if not (math.isfinite(ratio) and ratio > 0):
                raise MethodError(
                    f"the ratio of the norms is {ratio} at step {step}: measure on a model whose noise is finite"
                )
        ratios = smoothed([math.log(ratio) for ratio in curves.ratios], window // 2)
        if kind == "per_step":
            ratios = [ratio - before for ratio, before in zip(ratios, [0.0, *ratios], strict=False)]
        return cls(tuple(math.exp(ratio) for ratio in ratios))

    # --- published values, arXiv 2308.15321 and its code ---------------------------------------------------------

    @classmethod
    def cifar10(cls) -> EpsilonScaling:
        """ADM on CIFAR-10, unconditional, 100 steps: λ = 1.017."""
        return cls(1.017)

    @classmethod
    def lsun_tower(cls) -> EpsilonScaling:
        """ADM on LSUN tower 64², 100 steps: λ = 1.006."""
        return cls(1.006)

    @classmethod
    def ffhq_128(cls) -> EpsilonScaling:
        """ADM on FFHQ 128², 100 steps: λ = 1.005."""
        return cls(1.005)

    @classmethod
    def imagenet_64(cls) -> EpsilonScaling:
        """ADM on ImageNet 64², class-conditional, 100 steps: λ = 1.006."""
        return cls(1.006)

    @classmethod
    def imagenet_128(cls) -> EpsilonScaling:
        """ADM on ImageNet 128² with classifier guidance, 100 steps: λ = 1.004."""
        return cls(1.004)

    @classmethod
    def celeba_ddim(cls) -> EpsilonScaling:
        """DDIM on CelebA: λ = 1.0012."""
        return cls(1.0012)

    @classmethod
    def edm_cifar10_conditional(cls) -> EpsilonScaling:
        """EDM on CIFAR-10, conditional, 35 network calls: λ = 1.0006."""
        return cls(1.0006)

    @classmethod
    def edm_cifar10_unconditional(cls) -> EpsilonScaling:
        """EDM on CIFAR-10, unconditional, 13 network calls: λ = 1.0048."""
        return cls(1.0048)


def _of_x0_only(step: int, scale: float, share: float) -> float:
    """The factor of all the noise that does what 1/λ in x₀ alone does."""
    if scale == 1:
        return 1.0
    if share >= 1 or 1 / scale <= share:
        raise MethodError(
            f"in x₀ alone, λ = {scale:g} moves step {step} further than the step itself goes (to λ = {1 / share:.4g} at most): "
            "use a λ nearer to 1, fewer steps, or apply_to='all'"
        )
    return (1 / scale - share) / (1 - share)


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """The running mean of values, in a window that is symmetric and therefore shrinks at the ends."""
    last = len(values) - 1
    windows = [min(reach, p, last - p) for p in range(len(values))]
    return [sum(values[p - w : p + w + 1]) / (2 * w + 1) for p, w in enumerate(windows)]
