"""The demo pipeline as a diffusers pipeline, and caching on the trained model."""

import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import sostenuto
from sostenuto import FORA
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline


@pytest.fixture(scope="module")
def shipped():
    return load_demo_pipeline()


@pytest.fixture
def pipe(shipped):
    """The shipped pipeline with a scheduler of its own."""
    return DemoPipeline(shipped.transformer, type(shipped.scheduler).from_config(shipped.scheduler.config))


def generate(pipe, labels=(1, 8), steps=4, seed=0, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    kwargs.setdefault("output_type", "pt")
    return pipe(list(labels), steps, generator=torch.Generator().manual_seed(seed), **kwargs).images


def test_output_types(pipe):
    tensor = generate(pipe)
    assert tensor.shape == (2, 1, 28, 28)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    array = generate(pipe, output_type="np")
    assert array.shape == (2, 28, 28, 1)
    np.testing.assert_array_equal(array[:, :, :, 0], tensor[:, 0].numpy())
    pictures = generate(pipe, output_type="pil")
    assert all(isinstance(p, PIL.Image.Image) and p.size == (28, 28) for p in pictures)
    assert isinstance(pipe([0], 1, return_dict=False), tuple)
    assert len(pipe(3, 1).images) == 1


def test_a_seed_decides_the_images(pipe):
    assert torch.equal(generate(pipe, seed=1), generate(pipe, seed=1))
    assert not torch.equal(generate(pipe, seed=1), generate(pipe, seed=2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": [10]}, "class label 10 is out of range"),
        ({"class_labels": [-1]}, "class label -1"),
        ({"class_labels": []}, "empty"),
        ({"class_labels": "12"}, "whole numbers"),
        ({"class_labels": [1.5]}, "whole numbers"),
        ({"class_labels": None}, "whole numbers"),
        ({"class_labels": [1], "num_inference_steps": 0}, "num_inference_steps"),
        ({"class_labels": [1], "output_type": "jpeg"}, "jpeg"),
        ({"class_labels": [1], "latents": torch.zeros(2, 1, 28, 28)}, "latents"),
        ({"class_labels": [1], "callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
    ],
)
def test_arguments_without_meaning_are_refused(pipe, arguments, words):
    with pytest.raises(sostenuto.InputError, match=words):
        pipe(**arguments)


def test_saving_and_loading_gives_the_same_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DemoPipeline.from_pretrained(tmp_path)
    assert torch.equal(generate(pipe), generate(again))


def test_the_callback_sees_every_step_and_may_change_the_latents(pipe):
    seen = []

    def callback(_, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = generate(pipe, callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(images, torch.full_like(images, 0.5))


def test_fused_guidance_equals_two_calls(pipe):
    guided = generate(pipe, guidance_scale=3.0, output_type="latent")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, 28, 28, generator=generator)
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            conditional = pipe.transformer(latents, t.expand(2), torch.tensor([1, 8])).sample
            unconditional = pipe.transformer(latents, t.expand(2), torch.tensor([10, 10])).sample
            noise = unconditional + 3.0 * (conditional - unconditional)
            latents = pipe.scheduler.step(noise, t, latents, generator=generator).prev_sample
    torch.testing.assert_close(guided, latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "solver",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        UniPCMultistepScheduler,
        HeunDiscreteScheduler,
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_every_scheduler_runs_and_computing_everything_changes_nothing(pipe, solver, guidance_scale):
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    stock = generate(pipe, guidance_scale=guidance_scale)
    with sostenuto.enable(pipe, "none") as handle:
        same = generate(pipe, guidance_scale=guidance_scale)
        assert handle.stats.num_steps == len(pipe.scheduler.timesteps)
        assert handle.stats.num_passes == 1
    assert torch.equal(stock, same)


def test_a_scheduler_swapped_while_enabled_is_followed(pipe):
    with sostenuto.enable(pipe, FORA(2)) as handle:
        generate(pipe, steps=6)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        swapped = generate(pipe, steps=4)
        assert handle.stats.num_steps == 4
    with sostenuto.enable(pipe, FORA(2)):
        assert torch.equal(swapped, generate(pipe, steps=4))


@pytest.mark.parametrize("name", ["demo-ddpm50-1.5x", "demo-ddpm50-2.5x"])
def test_the_shipped_tables_fit_the_shipped_model(pipe, name):
    from sostenuto.demo.compare import SHIPPED

    table = sostenuto.CacheTable.load(SHIPPED / f"{name}.json")
    table.check(pipe.transformer, pipe.scheduler)
    assert table.macs_fraction < 0.7


def test_eb_by_name_takes_the_shipped_table_of_this_model(pipe):
    with sostenuto.enable(pipe, "eb") as handle:
        generate(pipe, steps=50)
        assert handle.stats.ideal_speedup > 1.4


def test_verify_proves_the_shipped_model(pipe):
    def sample(pipeline, generator, num_inference_steps):
        return generate(pipeline, steps=num_inference_steps)

    proved = sostenuto.verify(pipe, FORA(2), sample)
    assert (proved["sites"], proved["steps"]) == (16, 4)


@pytest.mark.parametrize(("method", "steps"), [("eb", 50), ("ab", 12), ("none", 4)])
def test_verify_runs_as_many_steps_as_the_method_needs_to_show_what_it_does(pipe, method, steps, monkeypatch):
    monkeypatch.setattr(
        sys.modules["sostenuto.verify"], "_prove_call", lambda *_: {}
    )  # of the same sites for every method

    def sample(pipeline, generator, num_inference_steps):
        return generate(pipeline, steps=num_inference_steps)

    assert sostenuto.verify(pipe, method, sample)["steps"] == steps


@pytest.mark.slow
def test_generated_garments_are_recognized(pipe):
    labels = torch.arange(100) % 10
    with torch.autocast("cpu", torch.bfloat16):  # as good, and quick
        images = torch.cat([generate(pipe, part.tolist(), steps=50, seed=i) for i, part in enumerate(labels.split(50))])
    # The bar is 0.85 over many images; of 100 it may miss by a standard error of 0.036.
    assert Judge().judge(images, labels).class_accuracy >= 0.81
