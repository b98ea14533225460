"""A whole sampling with a tiny network of the zoo: random weights, but latents that go their way from noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sostenuto import compat
from sostenuto.arguments import Reader
from sostenuto.errors import InputError
from sostenuto.prediction import without_variance
from sostenuto.zoo.tiny import TinyModel


def flow_sampler(tiny: TinyModel) -> tuple[nn.Module, Callable[..., torch.Tensor], Any]:
    """The network, a ``sample`` that takes its prediction for a flow, and the scheduler of that.

    Raises:
        DependencyError: the installed diffusers has no such class.
        InputError: the network's latents are not one tensor.
    """
    network = tiny.build().requires_grad_(False)
    scheduler = compat.diffusers_name("FlowMatchEulerDiscreteScheduler")()
    name = Reader(network).latents
    if not isinstance(tiny.inputs(900.0, torch.Generator().manual_seed(0))[name], torch.Tensor):
        raise InputError(f"the latents of {tiny.name} are not one tensor: its path can't be kept")

    @torch.no_grad()
    def sample(network: Any, generator: torch.Generator, num_inference_steps: int = 20) -> torch.Tensor:
        scheduler.set_timesteps(num_inference_steps)
        seed = int(torch.randint(2**31, (1,), generator=generator))

        def inputs(timestep: float) -> dict[str, Any]:  # the same conditioning at every step
            return tiny.inputs(timestep, torch.Generator().manual_seed(seed))

        latents = inputs(float(scheduler.timesteps[0]))[name]
        with torch.compiler.set_stance("force_eager"):
            for timestep in scheduler.timesteps:
                output = network(**{**inputs(float(timestep)), name: latents})
                prediction = without_variance(compat.first_tensor(output), latents)
                if prediction.shape == latents.shape:
                    moved = prediction
                else:  # an appended condition stays as it is
                    pad = [size - part for size, part in zip(latents.shape, prediction.shape, strict=True)]
                    moved = torch.nn.functional.pad(prediction, [n for size in reversed(pad) for n in (0, size)])
                latents = scheduler.step(moved, timestep, latents).prev_sample
        return latents

    return network, sample, scheduler
