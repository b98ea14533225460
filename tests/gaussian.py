"""Gaussian data N(0, s²·I), for which the optimal denoiser is linear and every step of a sampler can be computed by hand."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import sostenuto
from sostenuto.anatomy import Anatomy, BlockList, Branch, SiteKind
from sostenuto.schedulers import noise_levels

SPREAD = 0.5
SAMPLERS = {
    "ddpm": lambda: DDPMScheduler(beta_schedule="linear", clip_sample=False),
    "ddpm-v": lambda: DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False),
    "ddim": lambda: DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True),
    "flow": FlowMatchEulerDiscreteScheduler,
}


class Optimal(nn.Module):
    """``E[ε | x] = σ·x / v`` with ``v = α²s² + σ²``, times what is wrong with it."""

    def forward(self, x: torch.Tensor, level: tuple[float, float]) -> torch.Tensor:
        alpha, sigma = level
        return sigma * x / (alpha**2 * SPREAD**2 + sigma**2)


class Knowing(nn.Module):
    """The noise that is there, of one who knows the clean samples."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean = clean

    def forward(self, x: torch.Tensor, level: tuple[float, float]) -> torch.Tensor:
        alpha, sigma = level
        return (x - alpha * self.clean) / sigma


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Optimal()

    def forward(self, hidden_states: torch.Tensor, level: tuple[float, float]) -> torch.Tensor:
        return self.branch(hidden_states, level)


class GaussianDenoiser(nn.Module):
    """One block whose branch is the predicted noise: reused, it is that of an earlier step, exactly."""

    def __init__(self, scheduler, clean: torch.Tensor | None = None) -> None:
        super().__init__()
        self.scheduler_for_test = scheduler
        self.blocks = nn.ModuleList([Block()])
        self.clean = clean
        if clean is not None:
            self.blocks[0].branch = Knowing(clean)
        self.wrong = 1.0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scheduler = self.scheduler_for_test
        timesteps = scheduler.timesteps.tolist()
        level = dict(zip(timesteps, noise_levels(scheduler, timesteps), strict=True))[timestep.flatten()[0].item()]
        alpha, sigma = level
        noise = self.wrong * self.blocks[0](sample, level)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            if not alpha:  # the sample is the noise, whatever is wrong
                return sample if self.clean is None else sample - self.clean
            return noise - (sample - sigma * noise) / alpha
        if scheduler.config.prediction_type == "v_prediction":
            return alpha * noise - sigma * (sample - sigma * noise) / alpha
        return noise


sostenuto.register_anatomy(
    GaussianDenoiser,
    Anatomy((BlockList("blocks", (Branch(SiteKind.MLP, "branch"),), streams=("hidden_states",)),)),
)


@torch.no_grad()
def sample(model, generator, num_inference_steps, rows=64):
    """One generation; returns the final samples ``[rows, 4, 16, 16]``."""
    scheduler = model.scheduler_for_test
    scheduler.set_timesteps(num_inference_steps)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    extra = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else {"generator": generator}
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep.expand(rows)), timestep, x, **extra).prev_sample
    return x


def step_by_hand(kind, levels, step, share=None):
    """A, c and the variance of the noise it draws, of ``x′ = A·x + c·ε + z``, by the papers' formulas."""
    alpha, sigma = levels[step]
    alpha_next, sigma_next = levels[step + 1] if step + 1 < len(levels) else (1.0, 0.0)
    if not kind.startswith("ddpm"):
        return alpha_next / alpha, sigma_next - alpha_next * sigma / alpha, 0.0
    ratio = (alpha / alpha_next) ** 2  # α_t of this step, ᾱ_t / ᾱ_{t−1}
    to_clean = alpha_next * (1 - ratio) / sigma**2
    to_latents = ratio**0.5 * sigma_next**2 / sigma**2
    return to_clean / alpha + to_latents, -to_clean * sigma / alpha, (1 - ratio) * sigma_next**2 / sigma**2


def variance(level):
    """Of x at a noise level, with the data's own."""
    return level[0] ** 2 * SPREAD**2 + level[1] ** 2
