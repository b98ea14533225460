"""Latents are decoded as the pipeline decodes them: packed, scaled, shifted, frame by frame."""

import copy
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler

from sostenuto import InputError
from sostenuto.analysis import image_decoder, record
from sostenuto.analysis.decoding import _Handing, replaced
from sostenuto.cli import main
from sostenuto.engine import handle_of
from sostenuto.pipelines import as_images, first_output, pipeline_sample

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tiny as tiny_pipelines

SMALL = {"height": 32, "width": 32}
VIDEO = {"height": 16, "width": 16, "num_frames": 5}


def built(name, arguments, guidance_scale=1.0):
    """A tiny pipeline, its samples to latents and to images."""
    pipe = getattr(tiny_pipelines, name)()
    pipe.set_progress_bar_config(disable=True)
    conditions = [1, 2] if name == "dit_xl_2" else ["a fox", "a harbour"]
    samples = (
        pipeline_sample(pipe, conditions, guidance_scale=guidance_scale, arguments=arguments, output_type=kind)
        for kind in ("latent", "pt")
    )
    return pipe, *samples


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dit_xl_2", {}),
        ("flux", SMALL),
        ("qwen_image", SMALL),
        ("wan", VIDEO),
        ("sd3", SMALL),
        ("ltx_video", {"height": 64, "width": 64, "num_frames": 9}),
        ("hunyuan_video", VIDEO),
    ],
)
def test_the_end_of_a_path_is_decoded_to_what_the_pipeline_gives(name, arguments):
    pipe, to_latents, to_images = built(name, arguments)
    path = record(pipe, to_latents, num_inference_steps=4, num_samples=2)
    expected = as_images(first_output(to_images(pipe, torch.Generator().manual_seed(0), 4)))
    three = torch.cat([path.clean, path.clean[:1]])  # another number of rows than a call makes
    images = image_decoder(pipe, to_images)(three)
    assert len(images) == 3
    torch.testing.assert_close(images[2], images[0])
    frames = images[:2].transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images[:2]
    torch.testing.assert_close((frames / 2 + 0.5).clamp(0, 1), expected, atol=1e-4, rtol=0)


def test_nothing_stays_behind_and_the_network_runs_once(monkeypatch):
    pipe, to_latents, to_images = built("flux", SMALL)
    path = record(pipe, to_latents, num_inference_steps=4, num_samples=2)
    decode = image_decoder(pipe, to_images)
    calls = []
    for network in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        network.register_forward_hook(lambda *_: calls.append(1))
    decode(path.clean)
    once = len(calls)
    decode(path.latents[0])
    assert len(calls) == once
    with pytest.raises(InputError, match=r"latents of shape \[16, 64\] are not what .*: \[64, 16\]"):
        decode(path.clean.transpose(1, 2))
    assert "step" not in vars(pipe.scheduler)
    assert "decode" not in vars(pipe.vae)
    assert handle_of(pipe.transformer) is None


def test_a_guided_sample_or_one_to_latents_is_refused():
    pipe, to_latents, guided = built("dit_xl_2", {}, guidance_scale=4.0)
    path = record(pipe, to_latents, num_inference_steps=4, num_samples=2)
    with pytest.raises(InputError, match="decodes 2 of its 4 rows: sample to images, without guidance"):
        image_decoder(pipe, guided)(path.clean)


def test_without_a_vae_there_is_no_decoder():
    assert image_decoder(SimpleNamespace(vae=None), lambda *_: None) is None
    assert image_decoder(SimpleNamespace(), lambda *_: None) is None


@pytest.mark.slow
def test_the_command_looks_at_the_images_of_packed_latents(tmp_path):
    tiny_pipelines.flux().save_pretrained(tmp_path / "flux")
    words = ["analyze", "--model", str(tmp_path / "flux"), "--only", "error-images", "--num-samples", "2"]
    words += ["--num-inference-steps", "4", "--pipe-arguments", "height=32", "width=64", "--output", str(tmp_path)]
    assert main(words) == 0
    found = json.loads((tmp_path / "error-images.json").read_text())
    assert not found["error"]
    pictures = found["data"]["stages"]["final sample"]["pictures"]["uncached"]
    assert torch.tensor(pictures).shape == (2, 32, 64)


def test_a_scheduler_with_a_step_of_another_form_hands_its_latents_on():
    """Cogvideo's own DPM solver is given its last estimate before the timestep."""
    pipe, _, to_images = built("cogvideox", VIDEO)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    images = image_decoder(pipe, to_images)(latents)
    with torch.no_grad():
        expected = pipe.vae.decode(latents.transpose(1, 2) / pipe.vae_scaling_factor_image).sample
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-4)


def test_a_copied_scheduler_steps_as_it_does():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    given = torch.ones(1, 2)
    with replaced(scheduler, "step", _Handing(scheduler, given)):
        other = copy.deepcopy(scheduler)
        mine = scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.full((1, 2), 3.0)).prev_sample
        its = other.step(torch.zeros(1, 5), other.timesteps[0], torch.full((1, 5), 3.0)).prev_sample
    assert torch.equal(mine, given)
    assert torch.equal(its, torch.full((1, 5), 3.0))
    assert "generator" in inspect.signature(_Handing(scheduler, given)).parameters
