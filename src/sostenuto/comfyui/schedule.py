"""A ComfyUI sampler's noise levels as the scheduler that the engine asks for steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

# What a network predicts, by the class that ComfyUI mixes into its ``model_sampling``; the nearest one counts.
_PREDICTIONS = {
    "CONST": "flow_prediction",
    "V_PREDICTION": "v_prediction",
    "EPS": "epsilon",
    "X0": "sample",
    "EDM": "EDM's preconditioned prediction",
}


class SigmaSchedule:
    """The steps of one sampling.

    Attributes:
        timesteps: what the network is given at each step, in sampling order.
        sigmas: the noise level of each step, and the one that the last step leads to.
        config: what the network predicts, in diffusers' words.

    Args:
        sigmas: the sampler's noise levels, one more than steps.
        model_sampling: ComfyUI's object of the model that turns noise levels into timesteps.
    """

    def __init__(self, sigmas: torch.Tensor, model_sampling: Any) -> None:
        self.sigmas = sigmas.detach().float()
        self.timesteps = torch.as_tensor(model_sampling.timestep(self.sigmas[:-1])).detach().float().clone()
        names = [base.__name__ for base in type(model_sampling).__mro__]
        kind = next((_PREDICTIONS[name] for name in names if name in _PREDICTIONS), "something of its own")
        self.config = SimpleNamespace(prediction_type=kind)
