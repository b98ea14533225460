"""L2C's training: its error and gradient against independent computations, what learns, and that it can be resumed."""

import math
import struct
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file

import sostenuto
from conftest import build_tiny
from sostenuto import L2C, AlreadyEnabledError, L2CCalibration, MethodError, Router, TableError
from sostenuto.calibrations.base import Settings
from sostenuto.calibrations.l2c import _Training, gated
from sostenuto.cli import main
from sostenuto.router import cache_steps

SITES = tuple(f"transformer_blocks.{block}.{branch}" for block in range(3) for branch in ("attn1", "ff"))


def draw(generator, batch_size):
    clean = torch.randn(batch_size, 2, 8, 8, generator=generator).clamp(-1, 1)
    return clean, {"class_labels": torch.randint(11, (batch_size,), generator=generator)}


def batch(dtype=torch.float32, size=2):
    generator = torch.Generator().manual_seed(1)
    clean, arguments = draw(generator, size)
    return clean.to(dtype), torch.randn(clean.shape, generator=generator, dtype=dtype), arguments


def ddim(**options):
    return DDIMScheduler(beta_schedule="linear", **options)


def training_of(model, scheduler, options=None, steps=6):
    scheduler.set_timesteps(steps)
    with sostenuto.enable(model, "none", scheduler=scheduler) as handle:
        return _Training(options or L2CCalibration(draw), handle, Settings(model, None, steps, 1))


def calibrate(model, steps=4, seed=0, scheduler=None, **options):
    return sostenuto.calibrate(
        model,
        L2CCalibration(**{"data": draw, "batch_size": 2, "num_iterations": 4, **options}),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        scheduler=scheduler or ddim(),
    )


def expected_error(model, scheduler, steps, step, beta, clean, noise, arguments):
    """By forward hooks, and with DDIM's step written out (arXiv 2010.02502, equation 12, η = 0)."""
    kept, mode = {}, {"keep": True}

    def hook(site):
        def after(_module, _inputs, output):
            if mode["keep"]:
                kept[site] = output
                return None
            return beta[SITES.index(site)] * output + (1 - beta[SITES.index(site)]) * kept[site]

        return after

    alphas = scheduler.alphas_cumprod.to(clean.dtype)
    t = 1000 // steps * (steps - step)  # of the full step before; the last step is at 0
    a, a_next = alphas[t], alphas[t - 1000 // steps]
    time = torch.full((len(clean),), t)
    hooks = [model.get_submodule(site).register_forward_hook(hook(site)) for site in SITES]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    epsilon = model(noisy, time, **arguments).sample[:, :2]
    for handle in hooks:
        handle.remove()
    origin = ((noisy - (1 - a).sqrt() * epsilon) / a.sqrt()).clamp(-1, 1)
    latents = a_next.sqrt() * origin + (1 - a_next).sqrt() * epsilon
    time = time - 1000 // steps
    full = model(latents, time, **arguments).sample
    mode["keep"] = False
    hooks = [model.get_submodule(site).register_forward_hook(hook(site)) for site in SITES]
    mixed = model(latents, time, **arguments).sample
    for handle in hooks:
        handle.remove()
    return (mixed - full).square().mean()


@pytest.mark.parametrize("out_channels", [2, 4])
@pytest.mark.parametrize(("steps", "step"), [(5, 2), (5, 4), (6, 1), (6, 5)])
def test_the_error_is_that_of_the_outputs_mixed_by_hand(steps, step, out_channels):
    model, scheduler = build_tiny(out_channels=out_channels).double(), ddim(clip_sample=True)
    training = training_of(model, scheduler, steps=steps)
    assert step in training.steps
    beta = torch.rand(len(SITES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with gated(model, SITES) as gates:
        error = training.error(gates, step, beta, *batch(torch.float64))
    expected = expected_error(model, scheduler, steps, step, beta, *batch(torch.float64))
    assert error.item() == pytest.approx(expected.item(), rel=1e-6)
    assert error > 0


def test_with_all_gates_open_the_output_is_that_of_a_full_call_bit_for_bit(tiny):
    clean, noise, arguments = batch()
    time = torch.tensor([300, 300])
    with gated(tiny, SITES) as gates:
        gates.keep = True
        tiny(noise, time, **arguments)
        gates.keep = False
        full = tiny(clean, time, **arguments).sample
        gates.beta = torch.ones(len(SITES))
        assert torch.equal(tiny(clean, time, **arguments).sample, full)
        gates.beta = torch.zeros(len(SITES))
        assert not torch.equal(tiny(clean, time, **arguments).sample, full)
    assert torch.equal(tiny(clean, time, **arguments).sample, full)


@pytest.mark.parametrize("hard", [(1, 0, 1, 1, 0, 1), (0, 0, 0, 0, 0, 0)])
def test_with_decided_gates_the_output_is_that_of_the_engine(tiny, hard):
    scheduler, (clean, noise, arguments) = ddim(), batch()
    scheduler.set_timesteps(2)
    before, now = (t.expand(2) for t in scheduler.timesteps)
    router = Router.from_mask([[True] * len(SITES), [bool(h) for h in hard]], SITES)
    with sostenuto.enable(tiny, L2C(router), scheduler=scheduler):
        tiny(noise, before, **arguments)
        reused = tiny(clean, now, **arguments).sample
    with gated(tiny, SITES) as gates:
        gates.keep = True
        tiny(noise, before, **arguments)
        gates.keep = False
        gates.beta = torch.tensor(hard, dtype=torch.float32)
        assert torch.equal(tiny(clean, now, **arguments).sample, reused)


def test_the_gradient_is_that_of_finite_differences():
    model = build_tiny().double()
    training = training_of(model, ddim())
    logits = torch.randn(len(SITES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, noise, arguments = batch(torch.float64)
    with gated(model, SITES) as gates:

        def error(w):
            return training.error(gates, 3, w.sigmoid(), clean, noise, arguments)

        assert torch.autograd.gradcheck(error, logits.requires_grad_(), eps=1e-5, atol=1e-9, rtol=1e-5)


def test_straight_through_uses_decided_gates_and_passes_gradients_as_if_soft():
    model, steps = build_tiny().double(), 4
    options = L2CCalibration(draw_double, straight_through=True, threshold=0.4, batch_size=2, penalty=0.0)
    training = training_of(model, ddim(), options, steps)
    training.logits = [torch.nn.Parameter(row.data.double()) for row in training.logits]
    before = [row.detach().clone() for row in training.logits]
    with gated(model, SITES) as gates:
        training.advance(gates)
        row = next(k for k, logits in enumerate(training.logits) if logits.grad is not None)
        generator = torch.Generator().manual_seed(1)
        assert int(torch.randint(2, (), generator=generator)) == row
        clean, arguments = draw_double(generator, 2)
        noise = torch.randn(clean.shape, generator=generator).double()
        hard = (before[row].sigmoid() > 0.4).double().requires_grad_()
        error = training.error(gates, cache_steps(steps)[row], hard, clean, noise, arguments)
        (slope,) = torch.autograd.grad(error, hard)
    soft = before[row].sigmoid()
    assert training.curve == [pytest.approx((error.item(), error.item()))]
    torch.testing.assert_close(training.logits[row].grad, slope * soft * (1 - soft))


def draw_double(generator, batch_size):
    clean, arguments = draw(generator, batch_size)
    return clean.double(), arguments


def test_only_the_drawn_step_learns_and_adam_first_moves_by_the_learning_rate(tiny):
    options = L2CCalibration(draw, penalty=1e6, learning_rate=0.25, batch_size=2)
    training = training_of(tiny, ddim(), options, steps=8)
    before = torch.stack(tuple(training.logits)).detach().clone()
    with gated(tiny, SITES) as gates:
        training.advance(gates)
    moved = torch.stack(tuple(training.logits)).detach() - before
    rows = moved.abs().sum(1).nonzero().flatten().tolist()
    assert len(rows) == 1
    torch.testing.assert_close(moved[rows[0]], torch.full((len(SITES),), -0.25))
    error, loss = training.curve[0]
    assert loss == pytest.approx(error + 1e6 * before[rows[0]].sigmoid().sum().item())


def test_logits_stay_within_5(tiny):
    router = calibrate(tiny, steps=2, penalty=1e6, learning_rate=3.0)
    assert router.logits == ((-5.0,) * len(SITES),)
    assert router.dropped() == 1.0


def test_gates_close_where_nothing_changes_and_open_where_much_does(tiny):
    with torch.no_grad():
        for block in (0, 1):  # their MLPs return nothing: reuse is exact
            tiny.transformer_blocks[block].ff.net[2].weight.zero_()
            tiny.transformer_blocks[block].ff.net[2].bias.zero_()
    router = calibrate(tiny, steps=2, penalty=1e-4, learning_rate=0.5, num_iterations=30)
    assert router.mask()[1] == (True, False, True, False, True, True)
    curve = router.training["curve"]
    assert [point[0] for point in curve] == list(range(1, 31))
    assert curve[-1][2] < curve[0][2]


def test_what_a_router_was_made_for_is_in_it_and_the_method_takes_it(tiny, tmp_path):
    scheduler = ddim()
    router = calibrate(tiny, steps=5, num_iterations=3, penalty=1e-3, scheduler=scheduler)
    router.save(tmp_path / "r.safetensors")
    with sostenuto.enable(tiny, L2C(tmp_path / "r.safetensors"), scheduler=scheduler) as handle:
        assert handle.method.router.training == router.training
    assert router.training["images"] == 6
    assert router.training["penalty"] == 1e-3
    assert router.scheduler["timesteps"] == [800, 600, 400, 200, 0]
    assert router.sites == SITES
    with pytest.raises(TableError, match="made for"):
        sostenuto.enable(build_tiny(num_layers=4), L2C(router), scheduler=scheduler)


def test_training_leaves_the_model_as_it_was():
    model = build_tiny().train().requires_grad_(True)
    model.proj_out_2.requires_grad_(False)
    model.transformer_blocks[1].eval()
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model)
    with pytest.raises(MethodError, match="loss is nan"):
        calibrate(
            model, data=lambda g, n: (torch.full((n, 2, 8, 8), math.nan), {"class_labels": torch.zeros(n).long()})
        )
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) or "_compiled_call_impl" in vars(m) for m in model.modules())


def test_a_resumed_training_ends_where_an_unbroken_one_does(tiny, tmp_path):
    path = tmp_path / "training"
    options = {"learning_rate": 0.1, "checkpoint_every": 2}
    unbroken = calibrate(tiny, num_iterations=7, **options)
    calibrate(tiny, num_iterations=3, checkpoint=path, **options)
    assert calibrate(tiny, num_iterations=7, checkpoint=path, **options) == unbroken
    assert calibrate(tiny, num_iterations=7, checkpoint=path, **options) == unbroken  # nothing is left to do
    assert calibrate(tiny, num_iterations=7, seed=2**62, **options) != unbroken
    with pytest.raises(MethodError, match="with other settings"):
        calibrate(tiny, seed=1, checkpoint=path, **options)
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != "curve"}, path)
    with pytest.raises(MethodError, match="with other settings"):
        calibrate(tiny, checkpoint=path, **options)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(TableError, match="can't be read as a checkpoint"):
        calibrate(tiny, checkpoint=path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, "λ must be 0 or more"),
        ({"penalty": math.nan}, "λ must be 0 or more"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"threshold": 1.0}, "below 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"num_iterations": 1.5}, "num_iterations must be"),
        ({"checkpoint_every": False}, "checkpoint_every must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MethodError, match=message):
        L2CCalibration(draw, **options)


def test_what_cannot_be_trained_is_refused(tiny):
    with pytest.raises(MethodError, match="clean latents"):
        sostenuto.calibrate(tiny, "l2c", scheduler=ddim())
    with pytest.raises(MethodError, match="not DDPMScheduler's"):
        calibrate(tiny, scheduler=DDPMScheduler())
    with sostenuto.enable(build_tiny(), "none", scheduler=ddim()) as handle, pytest.raises(AlreadyEnabledError):
        calibrate(handle._denoiser)
    tiny.compile()
    with pytest.raises(MethodError, match="before you compile"):
        calibrate(tiny)
    with pytest.raises(MethodError, match="needs sample"):
        sostenuto.calibrate(tiny, "eb", scheduler=ddim())


def test_published_settings_are_those_of_the_paper():
    settings = {steps: L2CCalibration.dit_xl_2(draw, steps) for steps in (50, 20, 10)}
    assert {steps: s.penalty for steps, s in settings.items()} == {50: 1e-6, 20: 5e-6, 10: 1e-6}
    assert all(s.learning_rate == 1e-3 and s.threshold == 0.1 and s.batch_size == 64 for s in settings.values())
    large = L2CCalibration.dit_xl_2(draw, 50, resolution=512)
    assert (large.penalty, large.threshold) == (5e-6, 0.9)
    assert (L2CCalibration.dit_l_2(draw, 20).penalty, L2CCalibration.dit_l_2(draw, 20).learning_rate) == (5e-6, 1e-2)
    with pytest.raises(MethodError, match="nothing for DiT-XL/2 at 512 with 20 steps"):
        L2CCalibration.dit_xl_2(draw, 20, resolution=512)


def test_a_published_penalty_is_refused_for_another_number_of_steps(tiny):
    with pytest.raises(MethodError, match="published for 50 steps, and you train for 20"):
        sostenuto.calibrate(
            tiny, L2CCalibration.dit_xl_2(draw), scheduler=ddim(), num_inference_steps=20, num_samples=1
        )


@pytest.fixture
def folder(tmp_path):
    """A training set of 24 random images and labels in IDX files."""
    images = torch.randint(256, (24, 28, 28), generator=torch.Generator().manual_seed(0)).byte().numpy()
    labels = bytes(n % 10 for n in range(24))
    for name, shape, data in (("images-idx3", images.shape, images.tobytes()), ("labels-idx1", (24,), labels)):
        header = b"\x00\x00\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + data)
    return tmp_path


def test_the_demos_batches_are_its_images_with_some_labels_dropped(folder):
    data = L2CCalibration.demo(20, folder).data
    images, arguments = data(torch.Generator().manual_seed(0), 400)
    labels = arguments["class_labels"]
    assert images.shape == (400, 1, 28, 28)
    assert images.abs().max() <= 1
    assert 0.05 < (labels == 10).double().mean().item() < 0.15
    assert set(labels.tolist()) == set(range(11))


def test_the_command_trains_and_generates_with_the_router(folder, tmp_path, capsys):
    few = ["--method", "l2c", "--num-inference-steps", "2"]
    router, numbers = tmp_path / "r.safetensors", tmp_path / "n.json"
    options = ["--data", str(folder), "--num-iterations", "2", "--penalty", "0.5", "--output", str(router)]
    assert main(["calibrate", *few, *options, "--json", str(numbers)]) == 0
    assert Router.load(router).training["penalty"] == 0.5
    assert not list(tmp_path.glob("*.checkpoint"))
    assert "reused at θ = 0.1" in capsys.readouterr().out
    arguments = [*few, "--labels", "1", "--no-compare", "--table", str(router), "--output", str(tmp_path / "g.png")]
    assert main(["generate", *arguments]) == 0
    assert main(["generate", *arguments, "--scheduler", "DDPMScheduler"]) == 1
    assert "made with DDIMScheduler" in capsys.readouterr().err
    assert main(["generate", *arguments, "--scheduler", "Nonsense"]) == 1
    assert "no scheduler 'Nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        ("l2c", ["--target-fraction", "0.6"], "set --penalty"),
        ("l2c", ["--theta", "0.1"], "the calibration of l2c has no --theta: leave it out"),
        ("l2c", ["--conditional-half", "first"], "the calibration of l2c has no --conditional-half: leave it out"),
        ("eb", ["--eps-scale-grid", "0.98", "--search-images", "0"], "--eps-scale-grid is searched by a distance"),
        ("smoothcache", ["--penalty", "0.1"], "the calibration of smoothcache has no --penalty: leave it out"),
        ("magcache", ["--target-fraction", "0.6", "--theta", "0.1"], "has no --theta: leave it out"),
        ("l2c", ["--num-samples", "4"], "the calibration of l2c has no --num-samples: leave it out"),
        ("l2c", ["--search-images", "4"], "the calibration of l2c has no --search-images: leave it out"),
        ("l2c", ["--caching", "fora"], "the calibration of l2c has no --caching: leave it out"),
        ("l2c", [], "a router is written as .safetensors, not made"),
        ("smoothcache", ["--search-images", "9"], "leave out --search-images and --reference"),
        ("l2c", ["--reference", "demo:train"], "leave out --reference"),
        ("eb", ["--search-images", "3"], "a distance needs 4 images at least, not 3"),
        ("eb", ["--weights", "inception=x"], "give them with --reference"),
        ("eb", ["--data", "somewhere"], "the calibration of eb has no --data: leave it out"),
        ("eb", ["--caching", "fora"], "the calibration of eb has no --caching: leave it out"),
        ("eb", ["--table", "t.json"], "--table is for running a method"),
        ("epsilon-scaling", ["--caching", "nonsense"], "'nonsense'"),
    ],
)
def test_options_that_a_calibration_has_not_are_refused_and_not_ignored(method, option, words, tmp_path, capsys):
    assert main(["calibrate", "--method", method, *option, "--output", str(tmp_path / "made")]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_by_name_the_demo_pipeline_gets_its_preset():
    class DemoPipeline:
        pass

    preset = L2CCalibration.default_for(Settings(DemoPipeline(), None, 20, 1))
    assert replace(preset, data=None) == replace(L2CCalibration.demo(20), data=None)
    assert preset.data is not None
    assert L2CCalibration.default_for(Settings(object(), None, 20, 1)) == L2CCalibration()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_trains_in_the_networks_dtype(dtype):
    router = calibrate(build_tiny().to(dtype))
    assert all(math.isfinite(logit) for row in router.logits for logit in row)


def test_float16_whose_gradients_vanish_is_refused():
    with pytest.raises(MethodError, match="too small for float16"):
        calibrate(build_tiny().half())
