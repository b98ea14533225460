"""How some pipelines of diffusers call their networks or schedulers unlike all others."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import nn

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import FORA, ABCache, EpsilonScaling, MethodError
from sostenuto.arguments import Reader
from sostenuto.prediction import tells_clean_samples
from sostenuto.timesteps import called_timesteps
from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.sampling import flow_sampler

SAMPLE = ABCache(2, warmup=2, interval=2, extrapolates="sample")


def test_a_pipeline_without_a_scheduler_of_that_name_is_told_which_it_has(scheduler):
    pipe = SimpleNamespace(transformer=build_tiny(), components={"bb_ca_scheduler": scheduler})
    with pytest.raises(MethodError, match=r"has no scheduler by that name: .*scheduler=pipe\.bb_ca_scheduler"):
        sostenuto.enable(pipe, "fora")
    pipe.components = {}
    with pytest.raises(MethodError, match="its steps can't be told"):
        sostenuto.enable(pipe, "fora")


def test_a_network_for_references_is_cached_with_the_other(scheduler):
    pipe = SimpleNamespace(transformer=build_tiny(), transformer_ref=build_tiny(), scheduler=scheduler)
    with sostenuto.enable(pipe, FORA(2)) as handle:
        sample_loop(pipe.transformer_ref, scheduler, 6)
        assert handle.stats.actions["reuse"] > 0


def test_a_list_that_the_network_empties_is_whole_when_it_is_asked_again():
    tiny = build_tiny()

    class Popping(type(tiny)):
        def forward(self, hidden_states, timestep=None, class_labels=None, residuals=None, **rest):
            added = residuals.pop() + residuals.pop() if residuals else 0.0
            return super().forward(hidden_states + added, timestep, class_labels, **rest)

    tiny.__class__ = Popping
    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def sample(network, generator, num_inference_steps=4):
        scheduler.set_timesteps(num_inference_steps)
        latents, labels = torch.randn(2, 2, 8, 8, generator=generator), torch.tensor([1, 2])
        for timestep in scheduler.timesteps:
            residuals = [torch.full((1, 1, 1, 1), 0.1)] * 2
            output = network(latents, timestep=timestep.expand(2), class_labels=labels, residuals=residuals).sample
            latents = scheduler.step(output[:, :2], timestep, latents).prev_sample
        return latents

    sostenuto.register_anatomy(Popping, sostenuto.sites.known_anatomy(build_tiny()))
    assert sostenuto.verify(tiny, FORA(2), sample, scheduler=scheduler)["steps"] == 4


def test_a_last_timestep_to_which_a_sampler_only_goes_is_no_step():
    angles = SCMScheduler()
    angles.set_timesteps(4, intermediate_timesteps=None)
    assert len(called_timesteps(angles)) == len(angles.timesteps) - 1 == 4
    network = build_tiny()
    with torch.no_grad(), sostenuto.enable(network, FORA(2, anchor="start"), scheduler=angles) as handle:
        for timestep in angles.timesteps[:-1]:
            given = timestep.sin() / (timestep.cos() + timestep.sin())  # as Sana-Sprint's pipeline gives it
            network(torch.randn(1, 2, 8, 8), timestep=given[None], class_labels=torch.tensor([3]))
        assert handle.stats.num_steps == 4
        assert [row[0] for row in handle.stats.plan] == ["compute", "reuse", "compute", "reuse"]


def test_a_terminal_level_is_no_step_of_ltxs_ancestral_sampler():
    kind = pytest.importorskip("diffusers.schedulers.scheduling_ltx_euler_ancestral_rf").LTXEulerAncestralRFScheduler
    scheduler = kind()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.2, 0.0])
    assert len(called_timesteps(scheduler)) == 4
    assert tells_clean_samples(scheduler)
    scheduler.set_timesteps(5)
    assert len(called_timesteps(scheduler)) == 5


def test_of_conditions_and_latents_in_nested_lists_the_latents_are_read_and_replaced():
    class Nested(nn.Module):
        def forward(self, x, timestep, labels=None):
            return x

    reader = Reader(Nested())
    conditions, latents = torch.ones(1, 4, 4), [torch.zeros(2, 4, 4), torch.ones(2, 4, 4)]
    given = [[conditions, latents[0]], [latents[1]]]
    read = reader.read((given, 0.5), {})
    assert [torch.equal(a, b) for a, b in zip(read.latents, latents, strict=True)] == [True, True]
    args, _ = reader.with_latents((given, 0.5), {}, [latent + 1 for latent in latents])
    assert torch.equal(args[0][0][0], conditions)
    assert torch.equal(args[0][0][1], latents[0] + 1)
    assert torch.equal(args[0][1][0], latents[1] + 1)


@pytest.mark.parametrize("method", [EpsilonScaling(1.02), SAMPLE], ids=["scaled", "clean sample"])
def test_what_is_no_noise_for_the_scheduler_is_not_scaled_nor_turned_into_a_clean_sample(method):
    network, sample, scheduler = flow_sampler(TINY_MODELS["PRXTransformer2DModel"])
    with sostenuto.enable(network, method, scheduler=scheduler):
        sample(network, torch.Generator().manual_seed(0), 6)
    network.register_to_config(bottleneck_size=8)  # the variant in pixels
    with (
        sostenuto.enable(network, method, scheduler=scheduler),
        pytest.raises(MethodError, match="what its pipeline turns into something else"),
    ):
        sample(network, torch.Generator().manual_seed(0), 6)
    with sostenuto.enable(network, FORA(2), scheduler=scheduler):
        sample(network, torch.Generator().manual_seed(0), 6)


@pytest.fixture
def mean_velocity():
    """A network that predicts a mean velocity where it is told another timestep, ``timestep_r``."""
    tiny = build_tiny()

    class Mean(type(tiny)):
        def forward(self, hidden_states, timestep=None, class_labels=None, timestep_r=None, **rest):
            return super().forward(hidden_states, timestep, class_labels, **rest)

    tiny.__class__ = Mean
    anatomy = replace(sostenuto.sites.known_anatomy(build_tiny()), stepwise=("timestep_r",))
    sostenuto.register_anatomy(Mean, anatomy)
    return tiny


def test_a_mean_velocity_is_not_scaled(mean_velocity):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    latents, labels, timestep = torch.randn(1, 2, 8, 8), torch.tensor([1]), scheduler.timesteps[0][None]
    with torch.no_grad(), sostenuto.enable(mean_velocity, EpsilonScaling(1.02), scheduler=scheduler):
        mean_velocity(latents, timestep=timestep, class_labels=labels, timestep_r=timestep)
    with (
        torch.no_grad(),
        sostenuto.enable(mean_velocity, EpsilonScaling(1.02), scheduler=scheduler),
        pytest.raises(MethodError, match="a mean velocity"),
    ):
        mean_velocity(latents, timestep=timestep, class_labels=labels, timestep_r=scheduler.timesteps[1][None])


@pytest.mark.parametrize("mean", [False, True])
def test_the_clean_sample_is_not_advised_where_a_mean_velocity_is_predicted(mean_velocity, mean):
    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def turning(network, generator, num_inference_steps):
        scheduler.set_timesteps(num_inference_steps)
        until = [*scheduler.timesteps[1:], torch.tensor(0.0)]
        for timestep, last in zip(scheduler.timesteps, until, strict=True):
            latents = torch.randn(2, 2, 8, 8, generator=generator)  # forecasts of features that turn hurt
            arguments = {"timestep_r": last[None]} if mean else {}
            network(latents, timestep=timestep.expand(2), class_labels=torch.tensor([1, 2]), **arguments)
        return latents

    advice = sostenuto.advise(mean_velocity, turning, num_inference_steps=8, scheduler=scheduler)
    assert any("forecasts hurt" in note for note in advice.notes)
    assert any("forecast the clean sample" in note for note in advice.notes) is not mean
