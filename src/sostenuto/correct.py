"""What is corrected: the predicted noise is scaled, whatever the network predicts; the timestep it is given is shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch

from sostenuto.errors import MethodError
from sostenuto.prediction import Conversion, shared_part


class TimeShifter(Protocol):
    """Changes the timestep that the denoiser is given; when features are skipped still goes by the nominal step."""

    def shift(self, timestep: float, latents: torch.Tensor) -> torch.Tensor | None:
        """The timesteps ``[batch]`` to give in place of the nominal one, or ``None`` to leave it.

        Args:
            timestep: the nominal timestep.
            latents: the denoiser's input ``[batch, channels, …]``.
        """
        ...


_LEAST_SCALE = 1e-30  # its reciprocal is the largest: both are numbers of float32


def check_noise_scale(scale: float | Sequence[float], num_steps: int | None = None) -> tuple[float, ...]:
    """One factor per step from a number or a sequence.

    Raises:
        MethodError: a factor is not finite or not above 0, or there are not ``num_steps`` of them.
    """
    # numpy has reals of its own
    entries = (scale,) * (num_steps or 1) if isinstance(scale, (int, float, Real)) else scale
    try:
        if isinstance(scale, (bool, str)):
            raise TypeError
        values = tuple(float(entry) for entry in entries)
    except (TypeError, ValueError, OverflowError):
        raise MethodError(f"eps_scale must be a number or one number per step, not {scale!r}") from None
    if not values:
        raise MethodError("eps_scale is empty: give one number per step or one number")
    for step, value in enumerate(values):
        if not _LEAST_SCALE <= value <= 1 / _LEAST_SCALE:
            raise MethodError(
                f"eps_scale must be finite and above 0 ({_LEAST_SCALE:g} to {1 / _LEAST_SCALE:g}), but is {value} at step "
                f"{step}; 1 means no scaling"
            )
    if num_steps is not None and len(values) != num_steps:
        raise MethodError(f"eps_scale has {len(values)} entries for {num_steps} steps: give one per step or one number")
    return values


@dataclass(frozen=True)
class NoiseScale:
    """Factors of the predicted noise, one per step in sampling order for each of two kinds of calls.

    The passes of a step share that of its first call, since guidance would amplify a difference. A stale prediction is too
    small where a fresh one is too large: one factor per step can't repair both.

    Attributes:
        computed: for calls that ran every site in full.
        reused: for calls that filled in anything: reused, forecast, or run in part.
    """

    computed: tuple[float, ...]
    reused: tuple[float, ...]

    @classmethod
    def of(cls, scale: NoiseScale | float | Sequence[float], num_steps: int) -> NoiseScale:
        """The same factors for both kinds, where they aren't given apart.

        Raises:
            MethodError: a factor is not finite or not above 0, or there are not ``num_steps`` of them.
        """
        if isinstance(scale, NoiseScale):
            return cls(check_noise_scale(scale.computed, num_steps), check_noise_scale(scale.reused, num_steps))
        factors = check_noise_scale(scale, num_steps)
        return cls(factors, factors)

    @property
    def is_idle(self) -> bool:
        """Whether all factors are 1."""
        return all(factor == 1 for factor in (*self.computed, *self.reused))

    def at(self, step: int, reused: bool) -> float:
        """The factor of one call."""
        return (self.reused if reused else self.computed)[step]


def scale_noise(
    prediction: torch.Tensor,
    scale: float,
    latents: torch.Tensor,
    conversion: Conversion | None = None,
    noisy_last: bool = False,
) -> torch.Tensor:
    """Multiply the predicted noise by ``scale``; what the prediction holds besides (a learned variance) is left alone.

    EB-Cache (arXiv 2503.07120) writes ``b·ε`` with b < 1, Epsilon Scaling (arXiv 2308.15321) ``ε/λ`` with λ > 1. For a given
    x_t this is an affine map of the prediction, and guidance is a sum of predictions whose weights add up to 1: scaling each
    of them equals scaling the guided one. Where a pipeline then brings the guided prediction to another norm, that is so of
    networks that predict noise alone.

    Args:
        prediction: what the denoiser returned, of the latents' shape except for a learned variance.
        scale: the factor.
        latents: x_t, what the denoiser was given.
        conversion: how the noise follows from the prediction; by default it is the noise.
        noisy_last: whether the noisy sample is what comes last in the one that holds more, not first.

    Raises:
        MethodError: the shapes differ in more than one dimension.
    """
    if scale == 1.0:
        return prediction  # bit-identical to no corrector at all
    shared = shared_part(prediction, latents, noisy_last)
    scaled = (conversion or Conversion()).scale(shared.of(prediction), shared.of(latents), scale)
    return shared.put(scaled, prediction)
