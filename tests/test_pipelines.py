"""Commands on any pipeline: prompts or labels as it takes them, its own arguments, on the device that is asked for."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import sostenuto
from sostenuto import FORA, EBCache, Forecast, InputError, MethodError, TaylorSeer
from sostenuto.cli import ModelChoice, main
from sostenuto.cli.common import SamplerChoice, device_of, read_prompts
from sostenuto.demo.judge import Judge
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline
from sostenuto.pipelines import call_arguments, first_output, image_sample, pictures, pipeline_sample, suited
from sostenuto.quality.distance import FrechetDistance
from unets import build_plain

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import tiny

IMAGE, VIDEO = ("height=32", "width=32"), ("height=32", "width=32", "num_frames=5")
TEXT = {"sd3": IMAGE, "flux": IMAGE, "z_image": IMAGE, "wan": VIDEO}
GUIDED_IN_ONE_BATCH = {"sd3", "z_image"}


@pytest.fixture(scope="module")
def built():
    """Tiny text pipelines by name, each built once."""
    known = {}

    def build(name):
        if name not in known:
            known[name] = getattr(tiny, name)()
            known[name].set_progress_bar_config(disable=True)
        return known[name]

    return build


@pytest.fixture
def command(monkeypatch, built):
    """Runs a command of six steps on a tiny pipeline with two prompts, and notes the calls of its transformer."""
    monkeypatch.setattr(SamplerChoice, "_load", lambda self: built(self.model))

    def run(name, what, *words, prompts=("--prompt", "a piano", "a cello")):
        few = ("--model", name, "--num-inference-steps", "6", "--pipe-arguments", *TEXT[name])
        return main([what, *few, *prompts, *words])

    return run


@pytest.mark.parametrize("name", TEXT)
def test_text_pipelines_are_calibrated_and_generate_with_what_was_found(name, command, tmp_path):
    fit, picture = tmp_path / "fit.json", tmp_path / "g.png"
    assert command(name, "calibrate", "--method", "teacache", "--num-samples", "2", "--output", str(fit)) == 0
    rows = json.loads(fit.read_text())["calibration"]["num_samples"]
    assert rows == (4 if name in GUIDED_IN_ONE_BATCH else 2)  # two prompts
    if name == "wan":
        assert command(name, "generate", "--method", "teacache", "--table", str(fit), "--output", str(picture)) == 0
        with Image.open(picture) as sheet:
            assert sheet.size == (64, 64)  # cached and uncached below each other


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_tune_samples_text_pipelines(name, command, built, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(
        sostenuto, "tune", lambda pipe, sample, **_: made.append(sample(pipe, torch.Generator(), 2)) or 1 / 0
    )
    assert command(name, "tune", "--output", str(tmp_path)) == 1
    latents = first_output(made[0])
    assert latents.shape == {"flux": (2, 64, 16), "wan": (2, 4, 2, 4, 4)}[name]  # what its arguments make, not decoded


def test_prompts_and_arguments_are_what_the_pipeline_is_called_with(built, monkeypatch, tmp_path):
    flux = built("flux")
    given = {}
    monkeypatch.setattr(type(flux), "encode_prompt", lambda self, prompt, **_: given.update(prompt=prompt) or 1 / 0)
    path = tmp_path / "prompts.txt"
    path.write_text("a piano\na cello\n")
    for choice in (ModelChoice(prompts=path), ModelChoice(prompt=("a piano", "a cello"))):
        with pytest.raises(ZeroDivisionError):
            choice.sample(flux)(flux, torch.Generator(), 2)
        assert given.pop("prompt") == ["a piano", "a cello"]
    choice = ModelChoice(
        prompt=("a piano",), pipe_arguments=("height=48", "max_sequence_length=8", "negative_prompt=rain")
    )
    arguments = choice.arguments(choice.conditions())
    assert arguments["arguments"] == {"height": 48, "max_sequence_length": 8, "negative_prompt": "rain"}
    assert arguments["guidance_scale"] is None  # FLUX has its own
    assert ModelChoice().arguments((0,))["guidance_scale"] == 1.0
    assert ModelChoice(guidance_scale=4.0).arguments(("a piano",))["guidance_scale"] == 4.0


def test_what_does_not_fit_is_told_in_a_sentence(command, capsys, tmp_path, built):
    refused = {
        "FluxPipeline takes prompts in place of class labels: give some (--prompt, --prompts)": ((), ()),
        "give one of them": (("--prompts", "p.txt", "--prompt", "a"), ()),
        "p.txt can't be read": (("--prompts", "p.txt"), ()),
        "FluxPipeline has no argument 'num_frames'; it takes prompt, ": (
            ("--prompt", "a"), ("--pipe-arguments", "num_frames=3")),
        "prompt is not for --pipe-arguments: use --prompt": (("--prompt", "a"), ("--pipe-arguments", "prompt=a")),
        "takes NAME=VALUE, such as height=512, not 'height'": (("--prompt", "a"), ("--pipe-arguments", "height")),
    }  # fmt: skip
    for words, (prompts, others) in refused.items():
        assert command("flux", "tune", *others, "--output", str(tmp_path / "none"), prompts=prompts) == 1
        error = capsys.readouterr().err.strip()
        assert words in error
        assert "\n" not in error
    assert not (tmp_path / "none").exists()
    demo = load_demo_pipeline()
    with pytest.raises(InputError, match="DemoPipeline takes no prompts"):
        pipeline_sample(demo, ["a piano"])
    with pytest.raises(InputError, match="DemoPipeline has no argument 'height'; it takes class_labels, "):
        pipeline_sample(demo, [1], arguments={"height": 3})


class Animator:
    """Takes a picture, and no words."""

    def __call__(self, image, num_inference_steps, generator, output_type="pil"):
        raise NotImplementedError


class Painter(Animator):
    """Takes words and a picture."""

    def __call__(self, prompt, image, num_inference_steps, generator, output_type="pil", **others):
        return prompt, image, others


def test_a_pipeline_that_needs_what_was_not_given_says_so():
    with pytest.raises(InputError, match=r"Animator takes neither .* pass a sample\(pipe, "):
        call_arguments(Animator(), [0])
    with pytest.raises(InputError, match=r"Painter needs image, too: in Python pass a sample\(pipe, "):
        call_arguments(Painter(), ["a piano"])
    given = pipeline_sample(Painter(), ["a piano"], guidance_scale=1.0, arguments={"image": 3, "size": 4})
    assert given(Painter(), None, 2) == ("a piano", 3, {"size": 4})  # no guidance is what one without it does


def test_an_unconditional_pipeline_makes_as_many_as_there_are_labels():
    pipe = DDPMPipeline(build_plain(1), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    made = pipeline_sample(pipe, suited(pipe, [0, 1, 2]), output_type="np")(pipe, torch.Generator().manual_seed(0), 2)
    assert len(made.images) == 3


def test_advise_needs_no_prompt_and_measures_latents_in_a_list(command, tmp_path):
    assert command("z_image", "advise", "--json", str(tmp_path / "a.json"), prompts=()) == 0
    assert json.loads((tmp_path / "a.json").read_text())["reuse_error"] > 0


def test_of_a_video_the_middle_frame_is_shown():
    frames = np.zeros((1, 3, 4, 6, 3))
    frames[0, 1] = 1.0
    for video in (frames, [[Image.fromarray((frame * 255).astype(np.uint8)) for frame in frames[0]]]):
        (picture,) = pictures((video,))
        assert picture.size == (6, 4)
        assert np.asarray(picture).min() == 255


def test_prompts_are_read_from_lines_or_a_list(tmp_path):
    (tmp_path / "p.json").write_text('["one\\nin two lines", "b"]')
    assert read_prompts(tmp_path / "p.json") == ["one\nin two lines", "b"]
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(InputError, match="a prompt in each line"):
        read_prompts(tmp_path / "e.json")


# --- scores ------------------------------------------------------------------------------------------------------


def test_a_score_by_reference_is_the_judges_on_the_images_that_are_asked_for():
    pipe = load_demo_pipeline()
    sample = image_sample(pipeline_sample(pipe, [1, 8, 3], output_type="pt"), 5)
    images = sample(pipe, torch.Generator().manual_seed(0), 2)
    assert images.shape == (5, 1, 28, 28)
    assert not torch.equal(images[0], images[3])  # another call of the same labels has other noise
    score = FrechetDistance("demo:train", "demo")
    assert score(images) == pytest.approx(Judge().distance(images), rel=1e-6)
    assert re.search(r"FID of 8 says little, it wants 128; 8 real images get [\d.]+", score.too_few(8))
    few = FrechetDistance(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), "demo", batch_size=2)
    assert few(torch.zeros(3, 1, 28, 28)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="two or more"):
        FrechetDistance(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), "demo")


def test_many_videos_are_refused_before_the_first(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sostenuto.enable", lambda *_, **__: pytest.fail("something was generated"))
    words = ["generate", "--model", "wan", "--prompt", "a fox", "--num-images", "2", "--output", str(tmp_path / "made")]
    assert main([*words, "--method", "fora"]) == 1
    assert "makes videos, and this writes images" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_tune_scores_by_a_reference(tmp_path, monkeypatch, capsys):
    class Other(DemoPipeline):
        """A pipeline of which the library knows nothing."""

    demo = load_demo_pipeline()
    other = Other(demo.transformer, demo.scheduler)
    other.set_progress_bar_config(disable=True)
    monkeypatch.setattr(SamplerChoice, "_load", lambda self: other)
    seen = {}
    monkeypatch.setattr(sostenuto, "tune", lambda *_, **given: seen.update(given) or 1 / 0)
    words = ["tune", "--reference", "demo:train", "--network", "demo", "--score-images", "4", "--labels", "2", "3"]
    assert main([*words, "--output", str(tmp_path)]) == 1
    images = seen["score_sample"](other, torch.Generator().manual_seed(0), 2)
    assert seen["score"](images) == pytest.approx(Judge().distance(images), rel=1e-6)
    assert len(images) == 4
    assert main([*words[:5], "--score-images", "0"]) == 1
    assert "without --reference" in capsys.readouterr().err
    seen.clear()
    assert main(["tune", "--output", str(tmp_path)]) == 1
    assert "score" not in seen


def test_calibrate_scores_by_a_reference_and_knows_the_demos_kind_by_its_pipeline(tmp_path, monkeypatch, capsys):
    class Other(DemoPipeline):
        """A pipeline of which the library knows nothing."""

    demo, seen = load_demo_pipeline(), {}
    monkeypatch.setattr(sostenuto, "calibrate", lambda *_, **given: seen.update(given) or 1 / 0)

    def asked(kind, *words, output="t.json"):
        pipe = kind(demo.transformer, demo.scheduler)
        pipe.set_progress_bar_config(disable=True)
        monkeypatch.setattr(SamplerChoice, "_load", lambda self: pipe)
        seen.clear()
        assert main(["calibrate", "--model", str(tmp_path), *words, "--output", str(tmp_path / output)]) == 1
        return pipe, capsys.readouterr().err

    pipe, _ = asked(
        Other, "--reference", "demo:train", "--network", "demo", "--search-images", "4", "--labels", "2", "3"
    )
    images = seen["score_sample"](pipe, torch.Generator().manual_seed(0), 2)
    assert len(images) == 4
    assert seen["score"](images) == pytest.approx(Judge().distance(images), rel=1e-6)
    asked(Other)
    assert "score" not in seen
    assert "give real ones with --reference" in asked(Other, "--eps-scale-grid", "0.98")[1]
    assert "--data is of the demo model" in asked(Other, "--method", "epsilon-scaling", "--data", "x")[1]
    assert "trains routers for the demo model" in asked(Other, "--method", "l2c", output="r.safetensors")[1]
    (tmp_path / "ema.safetensors").touch()  # one that a user trained
    pipe, _ = asked(DemoPipeline, "--search-images", "4", "--guidance-scale", "3")
    given = []
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *_, **arguments: given.append(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seen["score_sample"](pipe, torch.Generator(), 2)
    assert given[0]["guidance_scale"] == 3  # scored as it is calibrated


# --- devices -----------------------------------------------------------------------------------------------------


def test_the_pipeline_goes_to_the_device_that_is_asked_for(monkeypatch, capsys):
    assert device_of("auto") == torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert ModelChoice(device="meta").pipeline().device == torch.device("meta")
    assert ModelChoice(device="cpu").pipeline().device == torch.device("cpu")
    with pytest.raises(InputError, match="there is no device 'gpu': give cpu, cuda or auto"):
        ModelChoice(device="gpu").pipeline()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")
    assert main(["generate", "--device", "cuda"]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("cuda", "auto", "bfloat16"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "float16", "float16"),
    ],
)
def test_weights_are_loaded_as_they_run(device, dtype, expected, tmp_path, monkeypatch):
    load_demo_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(DemoPipeline, "to", lambda self, device: self)
    pipe = ModelChoice(str(tmp_path), device=device, dtype=dtype).pipeline()
    assert pipe.transformer.dtype is getattr(torch, expected)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_demo_model_is_float32_unless_asked(dtype):
    pipe = ModelChoice(dtype=dtype).pipeline()
    assert pipe.transformer.dtype is (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert pipe([1], num_inference_steps=2, output_type="pt").images.dtype is torch.float32


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_is_left_to_diffusers(how, monkeypatch):
    told = []
    monkeypatch.setattr(DemoPipeline, f"enable_{how}_cpu_offload", lambda self, device: told.append(device))
    assert ModelChoice(device="meta", offload=how).pipeline().device == torch.device(
        "cpu"
    )  # nothing moves the whole of it
    assert told == [torch.device("meta")]
    with pytest.raises(InputError, match=f"--offload {how} .* needs a GPU"):
        ModelChoice(device="cpu", offload=how).pipeline()


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("fora:interval=4", FORA(4)),
        ("taylorseer.flux_dev", TaylorSeer.flux_dev()),
        ("fora | forecast", FORA() | Forecast()),
    ],
)
def test_a_method_is_named_with_parameters_presets_and_others(words, method):
    assert ModelChoice(method=words).method_object() == method


def test_a_table_goes_with_a_method_with_parameters_but_no_combination(tmp_path):
    path = tmp_path / "table.json"
    assert ModelChoice(method="eb:eps_scale=0.98", table=path).method_object() == EBCache(path, eps_scale=0.98)
    with pytest.raises(MethodError, match="eb:table=FILE"):
        ModelChoice(method="fora|epsilon-scaling", table=path).method_object()
    with pytest.raises(MethodError, match="fora takes no table"):
        ModelChoice(method="fora:interval=3", table=path).method_object()


@pytest.mark.parametrize("command", ["tune", "calibrate", "generate", "verify", "advise"])
def test_every_command_with_a_model_moves_it(command, monkeypatch, tmp_path):
    moved = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DemoPipeline, "__call__", lambda self, class_labels, **_: 1 / 0)
    monkeypatch.setattr(DemoPipeline, "to", lambda self, device: moved.append(device) or 1 / 0)
    assert main([command, "--device", "meta"]) == 1
    assert moved == [torch.device("meta")]
