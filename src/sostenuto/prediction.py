"""The noise and the clean sample in a network's prediction, whatever it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from sostenuto.errors import MethodError
from sostenuto.schedulers import FLOWS, clipped_to, is_preconditioned, noise_levels, preconditioning, predicts
from sostenuto.timesteps import called_timesteps

_LEAST = 1e-30  # its reciprocal is a number of float32 too
_PURE_NOISE = 1e-3  # share of x₀ in x_t below which x_t itself is the noise
_LEAST_NOISE = 1e-6  # share of the noise below which no prediction follows from the clean sample


@dataclass(frozen=True)
class Conversion:
    """How the noise, or the clean sample, follows from a network's prediction y at one step: ``weight·y + latent_weight·x_t``.

    With ``x_t = α·x₀ + σ·ε``, and ``α² + σ² = 1`` for diffusion, ``α + σ = 1`` for flow matching:

    ============  ==============  ==============  ===================  ===============  ====================
    prediction    y               weight (of ε)   latent_weight (ε)    weight (of x₀)   latent_weight (x₀)
    ============  ==============  ==============  ===================  ===============  ====================
    epsilon       ε               1               0                    −σ / α           1 / α
    v_prediction  α·ε − σ·x₀      α               σ                    −σ               α
    sample        x₀              −α / σ          1 / σ                1                0
    flow          ε − x₀          α               1                    −σ               1
    reverse-flow  x₀ − ε          −α              1                    σ                1
    ============  ==============  ==============  ===================  ===============  ====================
    """

    weight: float = 1.0
    latent_weight: float = 0.0
    bound: float = math.inf
    """What is written lies within ± this: where a scheduler clips the clean sample, what is kept of it is what it goes by."""

    @classmethod
    def of(cls, prediction: str, alpha: float, sigma: float) -> Conversion:
        """The conversion of a kind of prediction (a row of the table) to noise, at one noise level."""
        if prediction == "v_prediction":
            return cls(alpha, sigma)
        if prediction == "sample":
            return cls(-alpha / sigma, 1 / sigma)
        if prediction in FLOWS:
            return cls(alpha if prediction == "flow" else -alpha, 1.0)
        return cls()

    @classmethod
    def clean_of(cls, prediction: str, alpha: float, sigma: float) -> Conversion:
        """The conversion of a kind of prediction to the clean sample, at one noise level."""
        if prediction == "v_prediction":
            return cls(-sigma, alpha)
        if prediction in FLOWS:
            return cls(-sigma if prediction == "flow" else sigma, 1.0)
        return cls() if prediction == "sample" else cls(-sigma / alpha, 1 / alpha)

    @classmethod
    def preconditioned(cls, sigma: float, c_in: float, c_skip: float, c_out: float) -> Conversion:
        """The conversion to noise for EDM's preconditioning, where the network is given ``c_in·x`` for ``x = x₀ + σ·ε``.

        ``ε = (x − x₀) / σ`` with ``x₀ = c_skip·x + c_out·y``.
        """
        return cls(-c_out / sigma, (1 - c_skip) / (c_in * sigma))

    def read(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The noise (the clean sample) in a prediction; ``latents`` is x_t."""
        if self.latent_weight == 0:
            return prediction if self.weight == 1 else self.weight * prediction
        return self.weight * prediction + self.latent_weight * latents

    def write(self, value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The prediction that says so; where x_t holds nothing but noise, or none, there may be none, and it divides by 0."""
        if self.bound < math.inf:
            value = value.clamp(-self.bound, self.bound)
        if self.latent_weight == 0:
            return value if self.weight == 1 else value / self.weight
        return (value - self.latent_weight * latents) / self.weight

    def scale(self, prediction: torch.Tensor, latents: torch.Tensor, factor: float) -> torch.Tensor:
        """The prediction with its noise multiplied by ``factor`` and its x₀ rebuilt from that.

        ``write(factor · read(y))`` in one: ``b·y − (1 − b)·(latent_weight / weight)·x_t``. Where x_t is nothing but
        noise, as at the first step of a flow, ε is x_t whatever the network says: the prediction is left as it is.
        """
        if self.latent_weight == 0:
            return prediction * factor
        if abs(self.weight) < _PURE_NOISE:
            return prediction
        shift = (factor - 1) * self.latent_weight / self.weight
        exact = torch.promote_types(
            prediction.dtype, torch.float32
        )  # one rounding: a factor may be as near to 1 as that
        return (prediction.to(exact) * factor + latents.to(exact) * shift).to(prediction.dtype)


def conversions(scheduler: Any, timesteps: Sequence[float], negated: bool = False) -> tuple[Conversion, ...]:
    """One conversion per step.

    Args:
        scheduler: the scheduler.
        timesteps: its timesteps in sampling order.
        negated: whether the scheduler is given the negative of the prediction.

    Raises:
        MethodError: the scheduler is given something whose noise is not known.
    """
    kind = predicts(scheduler)
    if is_preconditioned(scheduler):
        sigmas = (sigma / alpha for alpha, sigma in noise_levels(scheduler, timesteps))
        steps = [Conversion.preconditioned(sigma, *preconditioning(scheduler, sigma)) for sigma in sigmas]
    elif kind == "epsilon":
        steps = [Conversion()] * len(timesteps)
    elif kind in ("v_prediction", "sample", *FLOWS):
        steps = [Conversion.of(kind, alpha, sigma) for alpha, sigma in noise_levels(scheduler, timesteps)]
    else:
        raise MethodError(
            f"this {type(scheduler).__name__} expects {kind}, whose noise is not known: use eps_scale=1 (no scaling)"
        )
    return _as_returned(steps, negated)


def clean_conversions(scheduler: Any, timesteps: Sequence[float], negated: bool = False) -> tuple[Conversion, ...]:
    """As :func:`conversions`, to the clean sample.

    Raises:
        MethodError: the noise levels are not known, or a step has no noise to tell a prediction from.
    """
    kind, levels = predicts(scheduler), noise_levels(scheduler, timesteps, instead="forecast what the network predicts")
    bound = clipped_to(scheduler)
    if is_preconditioned(scheduler):
        known = [(c_in, *preconditioning(scheduler, sigma / c_in)[1:]) for c_in, sigma in levels]
        steps = [Conversion(c_out, c_skip / c_in) for c_in, c_skip, c_out in known]
    else:
        # The floor keeps a step of pure noise finite; it is refused below.
        steps = [Conversion.clean_of(kind, max(alpha, _LEAST), sigma) for alpha, sigma in levels]
    for step, conversion in enumerate(steps):
        if not _LEAST_NOISE <= abs(conversion.weight) <= 1 / _PURE_NOISE:
            raise MethodError(
                f"at step {step} of this {type(scheduler).__name__} the clean sample doesn't follow from the {kind}, or says "
                "nothing of it: forecast what the network predicts"
            )
    return _as_returned([replace(step, bound=bound) for step in steps], negated)


def check_prediction(denoiser: nn.Module, converted: bool, timestep: Any, until: Any) -> None:
    """What a network predicts must be what its scheduler takes, for its noise or its clean sample to be told.

    Raises:
        MethodError: pipelines convert it, or it is a mean over the steps to another timestep.
    """
    if converted or (until is not None and not bool((torch.as_tensor(timestep) == torch.as_tensor(until)).all())):
        what = "what its pipeline turns into something else" if converted else "a mean velocity, up to another timestep"
        raise MethodError(
            f"this {type(denoiser).__name__} predicts {what}: neither its noise nor its clean sample follows from that; use "
            "eps_scale=1 (no scaling), and forecasts of features or of the prediction itself"
        )


def tells_clean_samples(scheduler: Any) -> bool:
    """Whether the clean sample follows from what a scheduler is given, at the timesteps that it was set up for."""
    try:
        clean_conversions(scheduler, called_timesteps(scheduler).tolist())
    except (MethodError, AttributeError, TypeError):
        return False
    return True


def _as_returned(steps: Sequence[Conversion], negated: bool) -> tuple[Conversion, ...]:
    return tuple(replace(step, weight=-step.weight) for step in steps) if negated else tuple(steps)


# --- the clean sample --------------------------------------------------------------------------------------------


def to_clean(
    prediction: torch.Tensor, latents: torch.Tensor, conversion: Conversion, noisy_last: bool = False
) -> torch.Tensor:
    """A prediction with the clean sample in its place; what it holds besides (a learned variance) is left alone.

    Args:
        prediction: what the denoiser returned.
        latents: what it was given.
        conversion: to the clean sample.
        noisy_last: see :class:`SharedPart`.

    Raises:
        MethodError: the shapes differ in more than one dimension.
    """
    return _mapped(prediction, latents, conversion.read, noisy_last)


def from_clean(
    clean: torch.Tensor, latents: torch.Tensor, conversion: Conversion, noisy_last: bool = False
) -> torch.Tensor:
    """What :func:`to_clean` makes such a clean sample of, for these latents: they say how much of them is noise."""
    return _mapped(clean, latents, conversion.write, noisy_last)


def _mapped(
    values: torch.Tensor,
    latents: torch.Tensor,
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noisy_last: bool,
) -> torch.Tensor:
    """The part that both share, mapped in float32 at least: near its end sampling subtracts almost equal numbers."""
    shared = shared_part(values, latents, noisy_last)
    exact = torch.promote_types(values.dtype, torch.float32)
    mapped = function(shared.of(values).to(exact), shared.of(latents).to(exact))
    return shared.put(mapped.to(values.dtype), values)


# --- what is noise, and what is a learned variance or a condition ------------------------------------------------


def without_variance(prediction: torch.Tensor, latents: torch.Tensor, noisy_last: bool = False) -> torch.Tensor:
    """The part of a prediction that has the latents' shape: without a learned variance.

    Args:
        prediction: what the denoiser returned.
        latents: what it was given.
        noisy_last: see :class:`SharedPart`.

    Raises:
        MethodError: the shapes differ in more than one dimension.
    """
    return shared_part(prediction, latents, noisy_last).of(prediction)


def predicted_noise(
    prediction: torch.Tensor, latents: torch.Tensor, conversion: Conversion, noisy_last: bool = False
) -> torch.Tensor:
    """The noise ε in a prediction, without a learned variance.

    Args:
        prediction: what the denoiser returned.
        latents: what it was given.
        conversion: how the noise follows from the prediction.
        noisy_last: see :class:`SharedPart`.

    Raises:
        MethodError: the shapes differ in more than one dimension.
    """
    shared = shared_part(prediction, latents, noisy_last)
    exact = torch.promote_types(prediction.dtype, torch.float32)  # see _mapped
    return conversion.read(shared.of(prediction).to(exact), shared.of(latents).to(exact))


def keep_variance(
    prediction: torch.Tensor, computed: torch.Tensor, latents: torch.Tensor, noisy_last: bool = False
) -> torch.Tensor:
    """A forecast with the learned variance, where there is one, of an output that was computed."""
    shared = shared_part(computed, latents, noisy_last)
    return shared.put(shared.of(prediction), computed)


class SharedPart(NamedTuple):
    """What a prediction and its latents both hold.

    Attributes:
        dim: the dimension in which one of them may hold more (a learned variance; a condition).
        size: how much both hold there.
        last: whether that comes last, not first.
    """

    dim: int
    size: int
    last: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The shared part."""
        return tensor.narrow(self.dim, self._start(tensor), self.size)

    def put(self, part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with another shared part."""
        start, rest = self._start(tensor), tensor.shape[self.dim] - self.size
        if rest == 0:
            return part
        if self.last:
            return torch.cat([tensor.narrow(self.dim, 0, start), part], dim=self.dim)
        return torch.cat([part, tensor.narrow(self.dim, self.size, rest)], dim=self.dim)

    def _start(self, tensor: torch.Tensor) -> int:
        return tensor.shape[self.dim] - self.size if self.last else 0


def shared_part(prediction: torch.Tensor, latents: torch.Tensor, noisy_last: bool) -> SharedPart:
    """What both hold; they may differ in one dimension."""
    pairs = enumerate(zip(prediction.shape, latents.shape, strict=False))
    differing = [dim for dim, (ours, theirs) in pairs if ours != theirs] or [1]
    if prediction.ndim != latents.ndim or len(differing) > 1:
        raise MethodError(
            f"a prediction of shape {tuple(prediction.shape)} for latents of shape {tuple(latents.shape)} can "
            "neither be scaled nor told its clean sample: use eps_scale=1 (no scaling), and forecasts of the prediction itself"
        )
    dim = differing[0]
    return SharedPart(dim, min(prediction.shape[dim], latents.shape[dim]), noisy_last)
