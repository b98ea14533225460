import json

import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from conftest import calm, quantised, sample, sample_loop
from sostenuto import InputError, advise
from sostenuto.plan import Action
from unets import build_plain


def advised(model, steps=12, **kwargs):
    return advise(model, sample, num_inference_steps=steps, scheduler=model.scheduler_for_test, **kwargs)


def test_the_advice_says_what_the_method_then_does(model):
    advice = advised(calm(model))
    assert advice.worth
    assert advice.expected_speedup >= 1.15
    with sostenuto.enable(model, advice.method, scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, 12)
        assert handle.stats.ideal_speedup == pytest.approx(advice.expected_speedup)
        assert handle.predicted_cache_bytes == advice.cache_bytes > 0
        reused = sum(handle.stats.actions[a.value] for a in (Action.REUSE, Action.FORECAST))
        assert reused
    text = str(advice)
    assert f"{advice.expected_speedup:.2f}×" in text
    assert "12 steps" in text


def test_few_steps_are_advised_against_where_neighbouring_steps_differ_and_not_for_their_number(model):
    advice = advised(model, steps=4)
    assert advice.reuse_error > 0.5
    assert not advice.worth
    assert advice.method is None
    assert advice.expected_speedup == 1.0
    assert "not worth" in str(advice)
    assert "few-step" in str(advice)
    advice = advised(calm(model), steps=4)
    assert advice.reuse_error < 0.01
    assert advice.worth


@pytest.mark.parametrize("steps", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_quantised_features_are_noisy_and_smooth_ones_are_not_with_few_steps_too(model, steps):
    model.scheduler_for_test = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    smooth = advised(calm(model), steps, num_samples=8)
    assert smooth.noise_share < 0.002
    assert "noise floor" not in str(smooth)
    noisy = advised(quantised(model), steps, num_samples=8)
    assert noisy.noise_share > 0.05
    assert noisy.forecast_gain > 1
    assert not noisy.forecasts
    assert "noise floor" in str(noisy)
    assert "reuse, don't forecast" in str(noisy)


def test_a_smooth_path_that_turns_is_not_taken_for_noise(model):
    """The untamed network of six deterministic steps: forecasts hurt, and nothing in it is random."""
    model.scheduler_for_test = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    advice = advised(model, steps=6, num_samples=8)
    assert advice.forecast_gain > 1
    assert advice.noise_share < 0.002
    assert "turn from step to step" in str(advice)


def test_two_steps_leave_nothing_to_forecast_from(model):
    advice = advised(calm(model), steps=2)
    assert advice.forecast_gain is None
    assert "nothing to forecast from" in str(advice)


@pytest.mark.parametrize("worth", [True, False])
def test_a_unet_is_worth_it_where_its_output_hears_little_of_a_stale_deep_part(worth):
    net, scheduler = build_plain(), DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    if worth:
        net.conv_out.weight.mul_(1e-3)
        net.conv_out.bias.fill_(1.0)

    def sample(pipe, generator, num_inference_steps):
        latents = torch.randn(2, 2, 8, 8, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                latents = scheduler.step(pipe(latents, timestep).sample, timestep, latents).prev_sample

    advice = advise(net, sample, num_inference_steps=8, scheduler=scheduler)
    assert advice.worth is worth
    assert (advice.reuse_error <= 0.1) is worth
    assert (advice.method is not None) is worth


def test_noisy_features_make_forecasts_hurt(model):
    for block in calm(model).transformer_blocks:
        block.attn1.to_out[0].register_forward_hook(lambda _m, _i, output: output + 0.3 * torch.sin(1e5 * output))
    advice = advised(model)
    assert advice.forecast_gain > 1
    assert not advice.forecasts
    assert "forecasts hurt" in str(advice)
    assert advice.noise_share > 0.5
    assert "because features are noisy" in str(advice)


def test_the_advice_is_plain_data_too(model):
    content = advised(calm(model)).as_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["method"] == "eb"
    assert len(content["plan"]) == 12


def test_nothing_is_left_attached(model):
    advised(model)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def test_a_bare_network_needs_a_sample(model):
    with pytest.raises(InputError, match=r"pass sample\("):
        advise(model, scheduler=model.scheduler_for_test)


def test_a_pipeline_is_called_with_what_it_takes():
    from diffusers import DiTPipeline

    from sostenuto.tuning.advice import default_sample

    given = {}

    class Recording(DiTPipeline):
        def __init__(self):
            pass

        def __call__(self, class_labels, num_inference_steps, generator, output_type):
            given.update(class_labels=class_labels, output_type=output_type)

    pipe = Recording()
    default_sample(pipe)(pipe, torch.Generator(), 3)
    assert given["class_labels"]
    assert given["output_type"] == "latent"
