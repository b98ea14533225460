"""The examples run, and with them the methods in the real diffusers pipelines: their guidance, packing and schedulers."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map

import sostenuto
from sostenuto.counting import MacCounter
from sostenuto.methods.base import Method

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import tiny  # noqa: E402

STEPS = {  # few, but enough for the method of each example to skip some
    "dit_xl_2": 8,
    "pixart_sigma": 8,
    "sd3": 6,
    "flux": 10,
    "qwen_image": 8,
    "z_image": 6,
    "wan": 10,
    "hunyuan_video": 16,
    "cogvideox": 8,
    "ltx_video": 30,
}
TWO_PASSES = {"qwen_image", "wan"}
FORA2 = sostenuto.FORA(2, anchor="start")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every example, run once by its command line."""
    known = {}

    def run(name):
        if name not in known:
            output = tmp_path_factory.mktemp(name) / "picture.png"
            argv = ["--tiny", "--steps", str(STEPS[name]), "--output", str(output)]
            known[name] = importlib.import_module(name).main(argv)
        return known[name]

    return run


@pytest.fixture(scope="module")
def stock(ran):
    """Of every example: the uncached latents and the multiply-accumulates of the whole pipeline."""
    known = {}

    def run(name):
        if name not in known:
            with MacCounter() as counter:
                known[name] = generate(ran, name, steps=STEPS[name])
            known[name] = known[name], counter.macs
        return known[name]

    return run


@pytest.fixture(scope="module")
def fresh(ran):
    """Of every example: the latents of its own method, just enabled."""
    known = {}

    def run(name):
        if name not in known:
            with sostenuto.enable(ran(name).pipe, ran(name).method):
                known[name] = generate(ran, name, steps=STEPS[name])
        return known[name]

    return run


def generate(ran, name, steps=4, seed=0, **changes):
    """What the example's own ``sample`` makes of other arguments: the latents, or the images where there are none."""
    done = ran(name)
    changes.setdefault("output_type", "np" if name == "dit_xl_2" else "latent")

    def pipe(prompt=None, **options):
        prompt = changes.pop("prompt", prompt)
        return done.pipe(*[prompt][: prompt is not None], **(options | changes))

    done.pipe.set_progress_bar_config(disable=True)
    pictures = done.sample(pipe, torch.Generator().manual_seed(seed), num_inference_steps=steps)
    return torch.as_tensor(pictures)


def stranger(name):
    """Other conditioning."""
    return dict(class_labels=[1, 2, 3, 4]) if name == "dit_xl_2" else dict(prompt="Something quite different")


every_example = pytest.mark.parametrize("name", STEPS)
QUICK = ("dit_xl_2", "pixart_sigma", "flux", "wan")
some_examples = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]
)


@every_example
def test_an_example_saves_both_pictures_and_runs_less(ran, name):
    done = ran(name)
    assert done.stats.ideal_speedup > 1
    assert done.stats.num_steps == STEPS[name]
    assert done.stats.num_passes == (2 if name in TWO_PASSES else 1)
    for file in done.files:
        with Image.open(file) as sheet:
            assert sheet.width >= 2 * sheet.height  # two pictures side by side, none of them upright


@some_examples
def test_what_ran_is_the_plan_and_the_work_that_was_counted(ran, stock, name):
    done = ran(name)
    with sostenuto.enable(done.pipe, done.method) as handle:
        with MacCounter() as counter:
            generate(ran, name, steps=STEPS[name])
        stats, plan = handle.stats, handle._plan
    # Text encoders and VAE run as before.
    assert stock(name)[1] - counter.macs == stats.macs_uncached - stats.macs > 0
    if plan is not None:  # else the method decides while the network runs
        assert stats.plan == [[action.value for action in row] for row in plan.actions]


def test_reuse_is_proved_in_a_pipeline_with_two_passes(ran):
    done = ran("wan")
    proved = sostenuto.verify(done.pipe, done.method, done.sample, num_inference_steps=STEPS["wan"])
    assert (proved["steps"], proved["passes"]) == (STEPS["wan"], 2)


@every_example
def test_reuse_is_that_of_a_naive_cache_with_a_memory_for_every_conditioning(ran, name):
    done = ran(name)
    network = done.pipe.transformer
    with sostenuto.enable(done.pipe, FORA2):
        got = generate(ran, name)
    done.pipe.transformer = naive_cached(network)
    try:
        expected = generate(ran, name)
    finally:
        done.pipe.transformer = network
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def naive_cached(network):
    """A copy whose branches compute at every second step, and keep what they return by the call's conditioning."""
    network, call = copy.deepcopy(network), {"step": -1, "timestep": None}

    def note(_, args, kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if call["timestep"] is None or not torch.equal(timestep, call["timestep"]):
            call.update(step=call["step"] + 1, timestep=timestep)
        names = ("encoder_hidden_states", "class_labels")
        call["conditioning"] = tuple(kwargs[name].sum().item() for name in names if name in kwargs)

    network.register_forward_pre_hook(note, with_kwargs=True)
    for site in sostenuto.inspect(network):
        module = network.get_submodule(site.id)
        module.forward = _stale(module.forward, call)
    return network


def _stale(compute, call):
    memory = {}  # by conditioning: when it was last called, and the output

    def forward(*args, **kwargs):
        last, output = memory.get(call["conditioning"], (None, None))
        if call["step"] % 2 == 0 or last != call["step"] - 1:  # what stems from before a gap is too old
            output = tree_map(torch.clone, compute(*args, **kwargs))
        memory[call["conditioning"]] = call["step"], output
        return output

    return forward


@pytest.mark.parametrize(("before", "after"), [(4.0, 1.0), (1.0, 4.0)], ids=["ends", "begins"])
def test_guidance_in_a_part_of_the_steps_mixes_up_nothing(ran, before, after):
    done = ran("wan")
    network = done.pipe.transformer

    def switch(pipe, step, *_):
        pipe._guidance_scale = before if step < 2 else after
        return {}

    options = dict(steps=7, guidance_scale=4.0, callback_on_step_end=switch)
    with sostenuto.enable(done.pipe, FORA2) as handle:
        got = generate(ran, "wan", **options)
        assert handle.stats.num_passes == 2
    done.pipe.transformer = naive_cached(network)
    try:
        expected = generate(ran, "wan", **options)
    finally:
        done.pipe.transformer = network
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@some_examples
def test_one_generation_leaves_nothing_to_the_next(ran, fresh, name):
    done, expected = ran(name), fresh(name)
    with sostenuto.enable(done.pipe, done.method):
        other = generate(ran, name, steps=STEPS[name], seed=1, **stranger(name))
        assert torch.equal(generate(ran, name, steps=STEPS[name]), expected)
    assert not torch.equal(other, expected)


@some_examples
def test_an_interrupted_generation_leaves_nothing_to_the_next(ran, fresh, name, monkeypatch):
    done, expected = ran(name), fresh(name)
    with sostenuto.enable(done.pipe, done.method):
        for stop in (0, 3):
            stopping = interrupted(name, done.pipe, stop, monkeypatch)
            with pytest.raises(KeyboardInterrupt):
                generate(ran, name, steps=STEPS[name], seed=1, **stranger(name), **stopping)
            monkeypatch.undo()
        assert torch.equal(generate(ran, name, steps=STEPS[name]), expected)


def interrupted(name, pipe, stop, monkeypatch):
    """Options that raise after this step; the pipelines without a callback are interrupted in their scheduler."""
    if name not in ("dit_xl_2", "pixart_sigma"):

        def callback(_pipe, step, *_):
            if step == stop:
                raise KeyboardInterrupt
            return {}

        return dict(callback_on_step_end=callback)
    steps, step = iter(range(99)), pipe.scheduler.step

    def raising(*args, **kwargs):
        if next(steps) == stop:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", raising)
    return {}


LARGER = {
    "pixart_sigma": dict(height=288, width=240),  # in its nearest bin
    "sd3": dict(height=48, width=32),
    "flux": dict(height=48, width=32),
    "qwen_image": dict(height=48, width=32),
    "z_image": dict(height=48, width=32),
}


@pytest.mark.parametrize("name", [name for name in STEPS if name != "dit_xl_2"])
def test_another_size_is_a_generation_of_its_own(ran, name):
    done = ran(name)
    larger = LARGER.get(name, dict(height=64, width=96))
    with sostenuto.enable(done.pipe, FORA2):
        expected = generate(ran, name, **larger)
    with sostenuto.enable(done.pipe, FORA2):
        smaller = generate(ran, name)
        assert torch.equal(generate(ran, name, **larger), expected)
    assert smaller.shape != expected.shape


GUIDANCE_OFF = {
    "dit_xl_2": dict(guidance_scale=1.0),
    "pixart_sigma": dict(guidance_scale=1.0),
    "sd3": dict(guidance_scale=1.0),
    "qwen_image": dict(true_cfg_scale=1.0),
    "wan": dict(guidance_scale=1.0),
    "cogvideox": dict(guidance_scale=1.0),
    "ltx_video": dict(guidance_scale=1.0),
}
GUIDANCE_ON = {
    "flux": dict(true_cfg_scale=2.0, negative_prompt="rain"),
    "hunyuan_video": dict(true_cfg_scale=2.0, negative_prompt="rain"),
    "z_image": dict(guidance_scale=3.0, negative_prompt="rain"),
}


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        pair if pair[0] in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (*GUIDANCE_OFF.items(), *GUIDANCE_ON.items())
    ],
)
def test_guidance_may_be_switched_between_generations(ran, name, guidance):
    done = ran(name)
    with sostenuto.enable(done.pipe, FORA2):
        switched = generate(ran, name, **guidance)
    with sostenuto.enable(done.pipe, FORA2) as handle:
        first = generate(ran, name)
        work = handle.stats.macs
        assert torch.equal(generate(ran, name, **guidance), switched)
        assert (handle.stats.macs > work) == (name in GUIDANCE_ON)
        assert handle.stats.num_passes == (2 if name in GUIDANCE_ON and name != "z_image" else 1)
        assert torch.equal(generate(ran, name), first)


@every_example
def test_an_enabled_pipeline_that_computes_everything_is_the_stock_one(ran, stock, name):
    with sostenuto.enable(ran(name).pipe, "none"):
        assert torch.equal(generate(ran, name, steps=STEPS[name]), stock(name)[0])


def test_a_plain_network_is_taught_and_proved(capsys):
    done = importlib.import_module("any_pytorch_network").main()
    assert done["sites"] == 2 * 4  # two branches in each of four blocks
    assert done["speedup"] > 2
    assert 0 < done["error"] < 0.05
    assert "proved on 8 sites" in capsys.readouterr().out


def test_methods_and_presets_are_named_on_the_command_line(capsys):
    options = dict(model="a/b", method=None, steps=1)
    compare = importlib.import_module("compare")
    assert compare.arguments("", ["--method", "fora.flux_dev"], **options).method == sostenuto.FORA.flux_dev()
    assert isinstance(compare.arguments("", ["--method", "dbcache"], **options).method, Method)
    with pytest.raises(SystemExit):
        compare.arguments("", ["--method", "fora.nonsense"], **options)
    assert "no method or preset 'fora.nonsense'" in capsys.readouterr().err


def test_every_example_is_listed():
    readme = (EXAMPLES / "README.md").read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"tiny.py", "compare.py"}
    assert {f"{name}.py" for name in STEPS} | {"any_pytorch_network.py"} == scripts
    assert all(f"[`{script}`]({script})" in readme for script in scripts)
    assert all(hasattr(tiny, name) for name in STEPS)
