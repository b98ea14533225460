"""What is corrected: the predicted noise is scaled, the timestep that the denoiser is given is shifted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sostenuto.errors import MethodError


class TimeShifter(Protocol):
    """Changes the timestep that the denoiser is given; when features are skipped still goes by the nominal step."""

    def shift(self, timestep: float, latents: torch.Tensor) -> torch.Tensor | None:
        """The timesteps ``[batch]`` to give in place of the nominal one, or ``None`` to leave it.

        Args:
            timestep: the nominal timestep.
            latents: the denoiser's input ``[batch, channels, …]``.
        """
        ...


def check_noise_scale(scale: float | Sequence[float], num_steps: int | None = None) -> tuple[float, ...]:
    """One factor per step from a number or a sequence.

    Raises:
        MethodError: a factor is not finite or not above 0, or there are not ``num_steps`` of them.
    """
    entries = (scale,) * (num_steps or 1) if isinstance(scale, (int, float)) else scale
    try:
        if isinstance(scale, (bool, str)):
            raise TypeError
        values = tuple(float(entry) for entry in entries)
    except (TypeError, ValueError):
        raise MethodError(f"eps_scale must be a number or one number per step, not {scale!r}") from None
    if not values:
        raise MethodError("eps_scale is empty: give one number per step or one number")
    for step, value in enumerate(values):
        if not math.isfinite(value) or value <= 0:
            raise MethodError(
                f"eps_scale must be finite and above 0, but is {value} at step {step}; 1 means no scaling"
            )
    if num_steps is not None and len(values) != num_steps:
        raise MethodError(f"eps_scale has {len(values)} entries for {num_steps} steps: give one per step or one number")
    return values


def check_predicts_noise(scheduler: Any) -> None:
    """Refuse to scale what isn't noise.

    Raises:
        MethodError: the scheduler is told velocity, the clean sample or a flow instead of ε.
    """
    config = getattr(scheduler, "config", None)
    kind = getattr(config, "prediction_type", None)
    if kind is None and "FlowMatch" in type(scheduler).__name__:
        kind = "flow"
    if kind not in (None, "epsilon"):
        raise MethodError(
            f"the noise scale is for ε-prediction, this {type(scheduler).__name__} expects {kind}: use eps_scale=1"
        )


def scale_noise(prediction: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """Multiply the predicted noise by ``scale``; channels past the first ``channels`` (learned variance) are left alone.

    EB-Cache (arXiv 2503.07120) writes ``b·ε`` with b < 1, Epsilon Scaling (arXiv 2308.15321) ``ε/λ`` with λ > 1. Guidance is
    linear in the predictions, so scaling each of them equals scaling the guided one.

    Args:
        prediction: ε, ``[batch, channels or more, …]``.
        scale: the factor.
        channels: number of noise channels.
    """
    if scale == 1.0:
        return prediction  # bit-identical to no corrector at all
    if prediction.shape[1] == channels:
        return prediction * scale
    return torch.cat([prediction[:, :channels] * scale, prediction[:, channels:]], dim=1)
