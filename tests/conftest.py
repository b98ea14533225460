"""Tiny networks with random weights, and a plain sampling loop of their own."""

from __future__ import annotations

import gc
import re
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.check import Support, check

_TOO_OLD = re.compile(
    r"diffusers.* has no |No module named 'diffusers|cannot import name .* from '?diffusers|of diffusers .* is too old"
)


def pytest_addoption(parser):
    parser.addoption(
        "--oldest", action="store_true", help="skip tests of what the installed diffusers doesn't have yet"
    )


def pytest_collection_finish(session):
    """Full collections are for what tests make: what torch and they made at import would be looked at again each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except (ImportError, AttributeError) as error:
        if item.config.getoption("--oldest") and _TOO_OLD.search(str(error)):
            pytest.skip(f"this diffusers is older: {error}")
        raise


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_attention_backend():
    """``set_attention_backend`` of one model sets the default of all, and ``reset_attention_backend`` leaves it set."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before  # its setter came after the oldest diffusers that is supported


def supported(name: str) -> Support:
    """What ``sostenuto models --check`` finds out about a class; of one that an older diffusers lacks the test is skipped."""
    support = check(TINY_MODELS[name])
    if support.error:
        raise ImportError(support.error)
    return support


def build_tiny(num_layers: int = 3, out_channels: int = 2, seed: int = 0) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2,
        out_channels=out_channels,
        num_layers=num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    for parameter in model.parameters():  # large enough that every branch shows in the output
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def calm(model):
    """The network with small weights, so that features are as smooth as those of a trained one and errors stay small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "transformer_blocks" in name:
                parameter.mul_(0.1)
    return model


def quantised(model, bits=8):
    """The network with the outputs of its blocks' matrix products rounded to so many bits, with one step for a tensor."""

    def rounded(_module, _inputs, output):
        step = output.abs().amax() / (2 ** (bits - 1) - 1)
        return (output / step).round() * step

    for block in model.transformer_blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(rounded)
    return model


@pytest.fixture
def tiny() -> DiTTransformer2DModel:
    return build_tiny()


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


@pytest.fixture
def model(tiny, scheduler) -> DiTTransformer2DModel:
    """The tiny network, which knows the scheduler that it is sampled with."""
    tiny.scheduler_for_test = scheduler
    return tiny


@torch.no_grad()
def sample_loop(
    model,
    scheduler,
    num_steps=6,
    seed=0,
    batch=2,
    dtype=torch.float32,
    separate_guidance=False,
    stop_at=None,
    *,
    fused_guidance=False,
    conditional_first=True,
    size=8,
    first_step=0,
):
    """The user's own loop around a denoiser; returns the final latents and every model output.

    Guidance is in two calls of a step (``separate``: of every step, or of those that are listed), or in one with the batch
    doubled (``fused``), or there is none. With a ``first_step`` the noisiest steps are left out, as image-to-image does.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, size, size, generator=generator).to(dtype)
    labels = (torch.arange(batch) + seed) % 10
    null = torch.full_like(labels, 10)
    order = 1 if conditional_first else -1
    scheduler.set_timesteps(num_steps)
    outputs = []
    for step, timestep in enumerate(scheduler.timesteps[first_step:], first_step):
        if stop_at is not None and step == stop_at:
            raise KeyboardInterrupt
        if fused_guidance:
            halves = torch.cat([labels, null][::order])
            outputs.append(model(torch.cat([latents] * 2), timestep.expand(2 * batch), halves).sample)
            noise, unconditional = outputs[-1].chunk(2)[::order]
        else:
            noise = model(latents, timestep.expand(batch), labels).sample
            outputs.append(noise)
        separate = separate_guidance if isinstance(separate_guidance, bool) else step in separate_guidance
        if separate:
            unconditional = model(latents, timestep.expand(batch), null).sample
            outputs.append(unconditional)
        if fused_guidance or separate:
            noise = unconditional + 3.0 * (noise - unconditional)
        latents = scheduler.step(noise[:, :2], timestep, latents, generator=generator).prev_sample.to(dtype)
    return latents, outputs


def sample(model, generator, num_inference_steps, **kwargs):
    """One generation of the fixture ``model``, as calibrations are given it; the generator decides the seed."""
    seed = int(torch.randint(99, (1,), generator=generator))
    return sample_loop(model, model.scheduler_for_test, num_inference_steps, seed=seed, **kwargs)[0]


def sample_of_every_call(scheduler):
    """A sample that makes every call that a scheduler lists, of which some have more than steps."""

    @torch.no_grad()
    def every_call(model, generator, num_inference_steps):
        latents = torch.randn(2, 2, 8, 8, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        for timestep in scheduler.timesteps:
            given = scheduler.scale_model_input(latents, timestep)
            noise = model(given, timestep.expand(2), torch.tensor([1, 2])).sample
            latents = scheduler.step(noise[:, :2], timestep, latents).prev_sample
        return latents

    return every_call


def sampler_of_lists(*shapes):
    """Z-Image, whose latents are a list of two samples, here of these shapes: the network, a ``sample`` and the scheduler."""
    tiny, scheduler = TINY_MODELS["ZImageTransformer2DModel"], FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def sample(network, generator, num_inference_steps):
        scheduler.set_timesteps(num_inference_steps)
        latents = [torch.randn(4, 1, *shape, generator=generator) for shape in shapes or [(8, 8)] * 2]
        for timestep, (now, then) in zip(scheduler.timesteps, pairwise(scheduler.sigmas), strict=True):
            given = tiny.inputs(float(timestep), torch.Generator().manual_seed(0)) | {"x": latents}
            velocity = network(**given).sample
            latents = [x + (now - then) * v for x, v in zip(latents, velocity, strict=True)]
        return latents

    return tiny.build().requires_grad_(False), sample, scheduler


@pytest.fixture(scope="session")
def measured_before(tmp_path_factory):
    """The folder of a tuning: what it measured serves the tests that look at what comes after."""
    from tunings import tuned

    folder = tmp_path_factory.mktemp("measured")
    model = build_tiny()
    model.scheduler_for_test = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    tuned(model, folder=folder)
    return folder


@pytest.fixture
def begun(measured_before, tmp_path):
    """A folder in which the measurements of a tuning are done."""
    return shutil.copytree(measured_before, tmp_path / "begun")
