import json

import pytest
import torch

import sostenuto
from conftest import calm, sample, sample_loop
from sostenuto import InputError, advise
from sostenuto.plan import Action


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


def test_a_few_step_sampler_is_advised_against(model):
    advice = advised(calm(model), steps=4)
    assert not advice.worth
    assert advice.method is None
    assert advice.expected_speedup == 1.0
    assert "not worth" in str(advice)
    assert "few-step" in str(advice)


def test_noisy_features_make_forecasts_hurt(model):
    for block in calm(model).transformer_blocks:
        block.attn1.to_out[0].register_forward_hook(lambda _m, _i, output: output + 0.3 * torch.sin(1e5 * output))
    advice = advised(model)
    assert advice.forecast_gain > 1
    assert not advice.forecasts
    assert "forecasts hurt" in str(advice)


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
