"""The noise and the clean sample in a prediction, whatever the network predicts; scaling the one, keeping the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch

from sostenuto.errors import MethodError
from sostenuto.schedulers import FLOWS, is_preconditioned, noise_levels, preconditioning, predicts

_MOST_AMPLIFIED = 1e6  # between a prediction and the clean sample
_PURE_NOISE = 1e-3  # share of x₀ in x_t below which x_t itself is the noise


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

    A stale prediction is too small where a fresh one is too large: one factor per step can't repair both.

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


# --- what the network predicts -----------------------------------------------------------------------------------


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
        """The prediction that says the noise is this; where x_t holds no clean sample there is none, and it divides by 0."""
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
    if is_preconditioned(scheduler):
        known = [(c_in, *preconditioning(scheduler, sigma / c_in)[1:]) for c_in, sigma in levels]
        steps = [Conversion(c_out, c_skip / c_in) for c_in, c_skip, c_out in known]
    else:
        # The floor keeps a step of pure noise finite; it is refused below.
        steps = [Conversion.clean_of(kind, max(alpha, _LEAST_SCALE), sigma) for alpha, sigma in levels]
    for step, conversion in enumerate(steps):
        if not 1 / _MOST_AMPLIFIED <= abs(conversion.weight) <= _MOST_AMPLIFIED:
            raise MethodError(
                f"at step {step} of this {type(scheduler).__name__} the clean sample doesn't follow from the {kind}, or says "
                "nothing of it: forecast what the network predicts"
            )
    return _as_returned(steps, negated)


def tells_clean_samples(scheduler: Any) -> bool:
    """Whether the clean sample follows from what a scheduler is given, at the timesteps that it lists now."""
    try:
        clean_conversions(scheduler, [float(t) for t in scheduler.timesteps])
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
        noisy_last: see :func:`scale_noise`.

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
    shared = _shared(values, latents, noisy_last)
    exact = torch.promote_types(values.dtype, torch.float32)
    mapped = function(shared.of(values).to(exact), shared.of(latents).to(exact))
    return shared.put(mapped.to(values.dtype), values)


# --- scaling -----------------------------------------------------------------------------------------------------


def without_variance(prediction: torch.Tensor, latents: torch.Tensor, noisy_last: bool = False) -> torch.Tensor:
    """The part of a prediction that has the latents' shape: without a learned variance.

    Args:
        prediction: what the denoiser returned.
        latents: what it was given.
        noisy_last: see :func:`scale_noise`.

    Raises:
        MethodError: the shapes differ in more than one dimension.
    """
    return _shared(prediction, latents, noisy_last).of(prediction)


def predicted_noise(
    prediction: torch.Tensor, latents: torch.Tensor, conversion: Conversion, noisy_last: bool = False
) -> torch.Tensor:
    """The noise ε in a prediction, without a learned variance.

    Args:
        prediction: what the denoiser returned.
        latents: what it was given.
        conversion: how the noise follows from the prediction.
        noisy_last: see :func:`scale_noise`.

    Raises:
        MethodError: the shapes differ in more than one dimension.
    """
    shared = _shared(prediction, latents, noisy_last)
    return conversion.read(shared.of(prediction), shared.of(latents))


def keep_variance(
    prediction: torch.Tensor, computed: torch.Tensor, latents: torch.Tensor, noisy_last: bool = False
) -> torch.Tensor:
    """A forecast with the learned variance, where there is one, of an output that was computed."""
    shared = _shared(computed, latents, noisy_last)
    return shared.put(shared.of(prediction), computed)


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
    of them equals scaling the guided one.

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
    shared = _shared(prediction, latents, noisy_last)
    scaled = (conversion or Conversion()).scale(shared.of(prediction), shared.of(latents), scale)
    return shared.put(scaled, prediction)


class _Shared(NamedTuple):
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


def _shared(prediction: torch.Tensor, latents: torch.Tensor, noisy_last: bool) -> _Shared:
    """What both hold; they may differ in one dimension."""
    pairs = enumerate(zip(prediction.shape, latents.shape, strict=False))
    differing = [dim for dim, (ours, theirs) in pairs if ours != theirs] or [1]
    if prediction.ndim != latents.ndim or len(differing) > 1:
        raise MethodError(
            f"a prediction of shape {tuple(prediction.shape)} for latents of shape {tuple(latents.shape)} can't be scaled: "
            "use eps_scale=1 (no scaling)"
        )
    dim = differing[0]
    return _Shared(dim, min(prediction.shape[dim], latents.shape[dim]), noisy_last)
