"""A tiny PixArt with random weights, a sampling loop around it, and a naive cache that knows nothing of the engine."""

from __future__ import annotations

import copy

import torch
from diffusers import PixArtTransformer2DModel

BRANCHES = ("attn1", "attn2", "ff")


def build_pixart(num_layers=3, seed=0):
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=num_layers,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample_pixart(model, scheduler, num_steps=6, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, 8, 8, generator=generator)
    text = torch.randn(batch, 5, 12, generator=generator)
    mask = torch.ones(batch, 5)
    mask[0, 3:] = 0
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        output = model(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timestep.expand(batch),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        latents = scheduler.step(output[:, :2], timestep, latents, generator=generator).prev_sample
    return latents


def naive_cached(model, skip):
    """A copy whose branches return what they returned last where ``skip(block, branch, call)``, the number of the call."""
    model = copy.deepcopy(model)
    for index, block in enumerate(model.transformer_blocks):
        for branch in BRANCHES:
            module = getattr(block, branch)
            module.forward = _stale(module.forward, lambda call, i=index, b=branch: skip(i, b, call))
    return model


def _stale(compute, skips):
    memory = {"calls": 0, "output": None}

    def forward(*args, **kwargs):
        if not skips(memory["calls"]):
            memory["output"] = compute(*args, **kwargs).clone()
        memory["calls"] += 1
        return memory["output"]

    return forward
