"""The official DiT-XL/2 at 256 × 256: it builds, it is cached, and it costs what its paper says."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import sostenuto
from sostenuto import FORA, CacheTable, EBCache, StepState

PAPER_MACS = 118.6e9  # arXiv 2212.09748, table 4: "Gflops" of one image, which are multiply-accumulates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    """The published configuration. All weights are cut from one pool of random numbers: 50 MB in place of 3 GB."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(12_000_000, generator=generator).mul_(0.02)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            start = int(torch.randint(len(pool) - parameter.numel(), (1,), generator=generator))
            weights = pool[start : start + parameter.numel()].view(parameter.shape)
            setattr(module, name, torch.nn.Parameter(weights, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape))
    return model.eval()


@pytest.mark.parametrize(
    "method",
    [FORA(2, anchor="start"), EBCache(CacheTable((StepState.COMPUTE, StepState.REUSE_BOTH)))],
    ids=["fora", "eb"],
)
def test_dit_xl_2_runs_two_steps_and_costs_what_its_paper_says(model, method):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    labels = torch.tensor([207, 1000])  # an image and its unconditional twin in one batch
    with torch.no_grad(), sostenuto.enable(model, method, scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps:
            noise = model(latents, timestep.expand(2), labels).sample[:, :4]
            assert noise.isfinite().all()
            latents = scheduler.step(noise, timestep, latents).prev_sample
        stats = handle.stats
    assert len(handle.sites) == 2 * 28
    assert stats.plan == [["compute"] * 56, ["reuse"] * 56]
    rows, forwards = 2, 2
    assert stats.macs_uncached / (rows * forwards) == pytest.approx(PAPER_MACS, rel=0.01)
    assert 1.9 < stats.ideal_speedup < 2
