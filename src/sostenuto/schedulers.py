"""What a scheduler means at each of its steps: what the network predicts, and how noisy is what the network is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from sostenuto.errors import MethodError

FLOWS = ("flow", "reverse-flow")
_KINDS = ("epsilon", "v_prediction", "sample", *FLOWS)

_NAMES = {"flow_prediction": "flow", "original_sample": "sample"}  # diffusers' names of one thing

# Of classes without ``config.prediction_type``, from their formulas.
_UNNAMED = {
    "DDPMWuerstchenScheduler": "epsilon",
    "RePaintScheduler": "epsilon",
    "IPNDMScheduler": "v_prediction",
    "LTXEulerAncestralRFScheduler": "flow",
    "MiniMaxH3Scheduler": "reverse-flow",
}

# Classes whose lists don't tell how noisy the sample is: it is a step ahead of its timestep (inversion), each stage of the
# sampling has a scale of its own, the pipeline decides, or the second half of a step does as it goes.
_OWN_LEVELS = ("DDIMInverseScheduler", "DPMSolverSDEScheduler", "HeliosScheduler", "HeliosDMDScheduler")

# They take clip_sample and never look at it.
_UNCLIPPED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "TCDScheduler")

_FLOW_TOLERANCE = 1e-6


def predicts(scheduler: Any) -> str:
    """What the scheduler is given: ``"epsilon"``, ``"v_prediction"``, ``"sample"``, ``"flow"`` (ε − x₀), ``"reverse-flow"``
    (x₀ − ε), or its own name for something else.

    A scheduler without a configuration is taken to want the noise.
    """
    config = getattr(scheduler, "config", None)
    names = _class_names(scheduler)
    kind = next((_UNNAMED[name] for name in names if name in _UNNAMED), None)
    if kind is None and any("FlowMatch" in name for name in names):
        kind = "reverse-flow" if getattr(config, "invert_sigmas", False) else "flow"
    if kind is None:
        kind = "epsilon" if config is None else str(getattr(config, "prediction_type", "something of its own"))
    return _NAMES.get(kind, kind)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's noise levels are those of flow matching, ``x = (1 − σ) x₀ + σ ε``."""
    return predicts(scheduler) in FLOWS or bool(getattr(getattr(scheduler, "config", None), "use_flow_sigmas", False))


def noise_levels(
    scheduler: Any, timesteps: Sequence[float], instead: str = "eps_scale=1 (no scaling)"
) -> tuple[tuple[float, float], ...]:
    """α and σ of every step in ``x_t = α·x₀ + σ·ε``, where x_t is what the denoiser is given.

    Schedulers that keep ``x₀ + σ·ε`` (such as Euler) scale it before the denoiser sees it: to unit variance, or, in EDM's
    preconditioning, to that of data with a variance of their own.

    Raises:
        MethodError: the scheduler's noise levels are not known.
    """
    levels = _levels(scheduler, timesteps)
    if levels is None:
        raise MethodError(
            f"the noise levels of a {type(scheduler).__name__} set up like this are not known: use another scheduler, or "
            f"{instead}"
        )
    return levels


def direction_shares(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """How much of each step's noise its update takes over besides x₀: r in ``x_{t'}/α' = x₀ + r·(σ/α)·ε``.

    ``r = (σ'/α') / (σ/α)`` for DDIM without noise of its own (η = 0) and Euler's method; 0 for DDPM, whose update reads x₀ and
    x_t alone.

    Raises:
        MethodError: the update is not of this form, or clips x₀.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    if kind == "DDPMScheduler":
        return (0.0,) * len(timesteps)
    if kind not in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler") or getattr(
        config, "stochastic_sampling", False
    ):
        raise MethodError(
            f"the update of this {kind} can't be split into x₀ and direction from outside: use DDPMScheduler, DDIMScheduler, "
            "EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler (without stochastic_sampling), or apply_to='all'"
        )
    if kind != "DDIMScheduler":
        levels = noise_levels(scheduler, (*timesteps, 0.0))  # the list of σ goes one further
        following = levels[1:]
    else:
        if scheduler.config.clip_sample or scheduler.config.thresholding:
            raise MethodError(
                "this DDIMScheduler clips x₀, so scaling x₀ alone is no scaling of the network's output: set "
                "clip_sample=False and thresholding=False, or use apply_to='all'"
            )
        levels = noise_levels(scheduler, timesteps)
        stride = scheduler.config.num_train_timesteps // (scheduler.num_inference_steps or 1)
        shares = [
            float(scheduler.alphas_cumprod[int(t) - stride] if t >= stride else scheduler.final_alpha_cumprod)
            for t in timesteps
        ]
        following = tuple((math.sqrt(share), math.sqrt(1 - share)) for share in shares)
    pairs = zip(levels, following, strict=False)
    return tuple(alpha * next_sigma / (sigma * next_alpha) for (alpha, sigma), (next_alpha, next_sigma) in pairs)


def clipped_to(scheduler: Any) -> float:
    """The largest value of a clean sample that the scheduler goes by; infinite where it clips none.

    A configuration may hold what another class was set up with: that a scheduler has the argument tells that it clips. With
    dynamic thresholds it goes by those.
    """
    config: Any = getattr(scheduler, "config", None)
    takes = (
        "clip_sample" in signature(type(scheduler).__init__).parameters and type(scheduler).__name__ not in _UNCLIPPED
    )
    if takes and getattr(config, "clip_sample", False) and not getattr(config, "thresholding", False):
        return float(getattr(config, "clip_sample_range", 1.0))
    return math.inf


def preconditioning(scheduler: Any, sigma: float) -> tuple[float, float, float]:
    """EDM's c_in, c_skip and c_out (arXiv 2206.00364, table 1) at a noise level, as the scheduler itself applies them.

    The network is given ``c_in·x``, and the clean sample is ``c_skip·x + c_out·y`` for its prediction y.

    Raises:
        MethodError: the scheduler takes no such prediction.
    """
    try:
        return (
            float(scheduler.precondition_inputs(1.0, sigma)),
            float(scheduler.precondition_outputs(1.0, 0.0, sigma)),
            float(scheduler.precondition_outputs(0.0, 1.0, sigma)),
        )
    except ValueError as error:
        raise MethodError(f"{type(scheduler).__name__} can't be used with what this model predicts: {error}") from None


def is_preconditioned(scheduler: Any) -> bool:
    """Whether a scheduler scales what goes into the network and what comes out of it, as EDM does."""
    return hasattr(scheduler, "precondition_inputs") and hasattr(scheduler, "precondition_outputs")


def _class_names(scheduler: Any) -> list[str]:
    return [kind.__name__ for kind in type(scheduler).__mro__]


def _levels(scheduler: Any, timesteps: Sequence[float]) -> tuple[tuple[float, float], ...] | None:
    names = _class_names(scheduler)
    if predicts(scheduler) not in _KINDS or any(name in _OWN_LEVELS for name in names):
        return None
    sigmas = _listed(scheduler, "sigmas", timesteps)
    if is_flow(scheduler) or is_preconditioned(scheduler):
        if sigmas is None:
            return None
        if is_flow(scheduler):
            return _flow_levels(scheduler, sigmas)
        return tuple((c_in := preconditioning(scheduler, sigma)[0], c_in * sigma) for sigma in sigmas)
    if sigmas is not None:
        between = _listed(scheduler, "sigmas_interpol", timesteps)
        if between is not None:  # every second call is between two of the listed levels
            lag = 1 if hasattr(scheduler, "sigmas_up") else 0  # the ancestral form lists them a place earlier
            sigmas = [between[place - lag] if place % 2 else sigma for place, sigma in enumerate(sigmas)]
        return tuple((1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)) for ratio in sigmas)
    if "IPNDMScheduler" in names:  # its betas are the σ of its steps, not a training grid's
        alphas, betas = (_listed(scheduler, name, timesteps) for name in ("alphas", "betas"))
        return None if alphas is None or betas is None else tuple(zip(alphas, betas, strict=True))
    shares = getattr(scheduler, "alphas_cumprod", None)
    if shares is None:
        return None
    shares = torch.as_tensor(shares).tolist()
    return tuple((math.sqrt(shares[int(t)]), math.sqrt(1 - shares[int(t)])) for t in timesteps)


def _listed(scheduler: Any, name: str, timesteps: Sequence[float]) -> list[float] | None:
    """What the scheduler lists under that name, one value per step; nothing where it lists fewer."""
    values = getattr(scheduler, name, None)
    if values is None or len(values) < len(timesteps):
        return None
    return torch.as_tensor(values).tolist()[: len(timesteps)]


def _flow_levels(scheduler: Any, sigmas: Sequence[float]) -> tuple[tuple[float, float], ...] | None:
    config = getattr(scheduler, "config", None)
    kind = predicts(scheduler)
    # Flow predictions and velocities are each defined on levels of their own; the other kinds on any.
    wrong = kind == "v_prediction" or (kind == "flow" and not getattr(config, "use_flow_sigmas", True))
    if getattr(config, "invert_sigmas", False):  # diffusers' other samplers take a rising level for a falling one
        euler = "FlowMatchEulerDiscreteScheduler" in _class_names(scheduler)
        wrong = wrong or not euler or bool(getattr(config, "stochastic_sampling", False))
    if wrong or any(not -_FLOW_TOLERANCE <= sigma <= 1 + _FLOW_TOLERANCE for sigma in sigmas):
        return None
    if getattr(config, "invert_sigmas", False):  # Mochi and LongCat-Audio count the share of data, which rises
        return tuple((share, 1 - share) for share in sigmas)
    return tuple((1 - sigma, sigma) for sigma in sigmas)
