"""A ComfyUI sampler's calls of the model as the scheduler that the engine asks for steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

# What a network predicts, by the class that ComfyUI mixes into its ``model_sampling``; the nearest one counts.
_PREDICTIONS = {
    "CONST": "flow_prediction",
    "V_PREDICTION": "v_prediction",
    "EPS": "epsilon",
    "X0": "sample",
    "EDM": "EDM's preconditioned prediction",
}

# Samplers that work with the half-logarithm of the signal-to-noise ratio, which a flow's first noise level of 1 has not.
_BY_SNR = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
_FIRST_PERCENT = 1e-4  # where they begin instead
_SNAP = 1e-4  # relative


class SigmaSchedule:
    """The calls of one sampling: a sampler of second order calls the model twice a step, and each call is a step here.

    Attributes:
        timesteps: what the network is given at each call, in sampling order.
        sigmas: the noise level of each call, and the one that the last leads to.
        config: what the network predicts, in diffusers' words.

    Args:
        sigmas: the sampler's noise levels, one more than its steps.
        model_sampling: ComfyUI's object of the model that turns noise levels into timesteps.
        sampler: ComfyUI's sampler, told by the name of its function; any other calls the model once for each noise level.
    """

    def __init__(self, sigmas: torch.Tensor, model_sampling: Any, sampler: Any = None) -> None:
        names = [base.__name__ for base in type(model_sampling).__mro__]
        kind = next((_PREDICTIONS[name] for name in names if name in _PREDICTIONS), "something of its own")
        self.config = SimpleNamespace(prediction_type=kind)
        self.sigmas = _levels_called(sigmas.detach().float(), sampler, model_sampling, kind == "flow_prediction")
        self.timesteps = torch.as_tensor(model_sampling.timestep(self.sigmas[:-1])).detach().float().clone()


class _Step(NamedTuple):
    """A step of a sampler from one noise level to the next, which is above 0."""

    begin: torch.Tensor
    end: torch.Tensor
    eta: float
    ratio: float
    is_flow: bool


def sampler_name(sampler: Any) -> str:
    """The name of a sampler as ComfyUI's menu has it, without the device that its noise is from; empty where it has none."""
    function = getattr(sampler, "sampler_function", sampler)
    return getattr(function, "__name__", "").removeprefix("sample_").removesuffix("_gpu")


def _levels_called(sigmas: torch.Tensor, sampler: Any, model_sampling: Any, is_flow: bool) -> torch.Tensor:
    """The noise levels at which the sampler calls the model, and the last one."""
    name, options = sampler_name(sampler), getattr(sampler, "extra_options", {})
    if name in _BY_SNR and is_flow and sigmas[0] >= 1:
        sigmas = sigmas.clone()
        sigmas[0] = model_sampling.percent_to_sigma(_FIRST_PERCENT)
    if name not in _SECOND_CALLS:
        return sigmas
    called = [sigmas[0]]
    for begin, end in pairwise(sigmas):
        if end > 0:  # the last step is one of Euler's
            step = _Step(begin, end, float(options.get("eta", 1.0)), float(options.get("r", 0.5)), is_flow)
            between = _SECOND_CALLS[name](step)
            # What is the next level but for rounding is listed as that, so that either call fits both places.
            called.append(end if (between - end).abs() <= _SNAP * end else between)
        called.append(end)
    return torch.stack(called)


def _middle(begin: torch.Tensor, end: torch.Tensor, ratio: float = 0.5) -> torch.Tensor:
    """The noise level between two, on a logarithmic scale."""
    return begin.log().lerp(end.log(), ratio).exp()


def _middle_of_flow(begin: torch.Tensor, end: torch.Tensor, ratio: float = 0.5) -> torch.Tensor:
    """The same in the half-logarithm of a flow's signal-to-noise ratio, ``log((1 − σ) / σ)``."""
    return begin.logit().lerp(end.logit(), ratio).sigmoid()


def _down(step: _Step) -> torch.Tensor:
    """The level that an ancestral step goes down to before it adds noise again."""
    if step.is_flow:
        return step.end * (1 + (step.end / step.begin - 1) * step.eta)
    up = step.eta * (step.end**2 * (step.begin**2 - step.end**2) / step.begin**2).sqrt()
    return (step.end**2 - torch.minimum(step.end, up) ** 2).sqrt()


def _dpm_2s_ancestral(step: _Step) -> torch.Tensor:
    if not step.is_flow:
        return _middle(step.begin, _down(step))
    if step.begin == 1:  # ComfyUI's own choice where the ratio is 0
        return torch.full_like(step.begin, 0.9999)
    return _middle_of_flow(step.begin, _down(step))


def _dpm_sde(step: _Step) -> torch.Tensor:
    return (_middle_of_flow if step.is_flow else _middle)(step.begin, step.end, step.ratio)


# The noise level of the second call of a step, by the sampler's name (ComfyUI's comfy/k_diffusion/sampling.py).
_SECOND_CALLS: dict[str, Callable[[_Step], torch.Tensor]] = {
    "heun": lambda step: step.end,
    "dpm_2": lambda step: _middle(step.begin, step.end),
    "dpm_2_ancestral": lambda step: _middle(step.begin, _down(step)),
    "dpmpp_2s_ancestral": _dpm_2s_ancestral,
    "dpmpp_sde": _dpm_sde,
}
