"""The clean sample kept in place of the prediction: against networks that know it, and a naive loop with its own formulas."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

import gaussian
import oracle
import sostenuto
from conftest import build_tiny, sample_loop, sampler_of_lists
from scheduler_cases import cases, draw, given_to_network, levels, listed, prediction
from sostenuto import ABCache, CacheTable, EBCache, MethodError, TableError
from sostenuto.calibrations import EBCalibration
from sostenuto.calibrations.base import Settings, Tapped
from sostenuto.prediction import clean_conversions
from sostenuto.step_state import StepState
from sostenuto.tuning.measurement import Kind
from sostenuto.tuning.rehearsal import rehearse
from tunings import QUICK, STEPS, tuned

C, B, A = StepState.COMPUTE, StepState.REUSE_BOTH, StepState.REUSE_ATTENTION


def ids(value):
    return getattr(value, "id", value)


LEVELLESS = (
    "DDIMInverseScheduler",
    "DDPMWuerstchenScheduler",
)  # what they are given is the noise, at levels of their own


TOLD = [case for case in cases("yes") if case[0].name not in LEVELLESS]


@pytest.mark.parametrize(("row", "kind"), TOLD, ids=ids)
def test_the_clean_sample_is_found_in_what_every_scheduler_is_given(row, kind):
    scheduler = row.build(kind)
    alpha, sigma = levels(row, scheduler)[0]
    if kind == "epsilon" and alpha / math.hypot(alpha, sigma) < 0.999e-3:
        with pytest.raises(MethodError, match=r"at step 0 of this .* says nothing of it"):
            clean_conversions(scheduler, listed(scheduler))
        return
    steps = clean_conversions(scheduler, listed(scheduler))
    x, noise = draw(3), draw(4)
    for conversion, (alpha, sigma) in zip(steps, levels(row, scheduler), strict=True):
        if alpha / math.hypot(alpha, sigma) < 1e-3:
            continue  # next to nothing of it is in x
        given, output = given_to_network(row, x, alpha, sigma), prediction(row, kind, x, noise, alpha, sigma)
        clean = (x - sigma * noise) / alpha
        off = (conversion.read(output, given) - clean).abs().max() / clean.abs().max()
        assert off < 2e-3
        torch.testing.assert_close(
            conversion.write(conversion.read(output, given), given), output, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("kind", gaussian.SAMPLERS)
def test_of_a_network_that_knows_the_clean_sample_one_call_is_enough(kind):
    """Noise of the sampler's own included: the predictions made of the clean sample take it out again."""
    clean = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def images(method):
        scheduler = gaussian.SAMPLERS[kind]()
        model = gaussian.GaussianDenoiser(scheduler, clean)
        with sostenuto.enable(model, method, scheduler=scheduler) as handle:
            made = gaussian.sample(model, torch.Generator().manual_seed(2), 10, rows=4)
            return made, handle.stats.plan

    wanted, _ = images("none")
    once = ABCache(order=1, warmup=1, interval=100, extrapolates="sample")
    made, plan = images(once)
    assert [row for row in plan if row != ["reuse"]] == [["compute"]]
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)
    stale, _ = images(ABCache(order=1, warmup=1, interval=100))
    if kind.startswith("ddpm"):  # along the path of an ODE the noise doesn't change either
        assert (stale - wanted).square().mean() > 100 * (made - wanted).square().mean()


def test_holding_the_clean_sample_is_the_sampler_with_the_skipped_steps_left_out(tiny):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas[:-1]

    @torch.no_grad()
    def images():
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            velocity = tiny(x, timestep.expand(2), torch.tensor([1, 4])).sample
            x = scheduler.step(velocity, timestep, x).prev_sample
        return x

    with sostenuto.enable(tiny, ABCache(1, 1, 2, extrapolates="sample"), scheduler=scheduler):
        held = images()
    scheduler.set_timesteps(sigmas=sigmas[::2].numpy())
    torch.testing.assert_close(held, images(), rtol=1e-4, atol=1e-4)


SAMPLERS = {
    "ddpm": lambda: DDPMScheduler(beta_schedule="linear", clip_sample=False),
    "ddpm, v": lambda: DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
    "ddim, x0": lambda: DDIMScheduler(prediction_type="sample", clip_sample=False),
    "flow": FlowMatchEulerDiscreteScheduler,
    "edm": EDMEulerScheduler,
}


def by_hand(name, scheduler, step, y, x):
    """x₀ of a prediction, and the prediction of an x₀, by the schedulers' own formulas."""
    if name == "flow":
        sigma = scheduler.sigmas[step]
        return x - sigma * y, lambda x0: (x - x0) / sigma
    if name == "edm":
        sigma, data = scheduler.sigmas[step], scheduler.config.sigma_data
        total = (sigma**2 + data**2).sqrt()
        sample = x * total  # the network is given it over this
        return sample * (
            data / total
        ) ** 2 + y * sigma * data / total, lambda x0: (x0 - sample * (data / total) ** 2) * total / (sigma * data)
    share = scheduler.alphas_cumprod[int(scheduler.timesteps[step])]
    alpha, sigma = share.sqrt(), (1 - share).sqrt()
    if name == "ddpm":
        return (x - sigma * y) / alpha, lambda x0: (x - alpha * x0) / sigma
    if name == "ddpm, v":
        return alpha * x - sigma * y, lambda x0: (alpha * x - x0) / sigma
    return y, lambda x0: x0


@torch.no_grad()
def run(name, scheduler, model, num_steps):
    """The inputs and outputs of a sampler's own loop."""
    generator, labels = torch.Generator().manual_seed(0), torch.tensor([1, 4])
    scheduler.set_timesteps(num_steps)
    x = torch.randn(2, 2, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {"generator": generator} if name.startswith("ddpm") else {}
    given, outputs = [], []
    for timestep in scheduler.timesteps:
        latents = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = model(latents, timestep.expand(2), labels).sample
        given.append(latents)
        outputs.append(output)
        x = scheduler.step(output[:, :2], timestep, x, **extra).prev_sample
    return given, outputs


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_skipped_prediction_is_made_of_the_forecast_clean_sample(tiny, name, order):
    scheduler = SAMPLERS[name]()
    method = ABCache(order, warmup=2, interval=3, abscissa="step", extrapolates="sample")
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        given, outputs = run(name, scheduler, tiny, 9)
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes
    stock, past = build_tiny(), []
    for step, (x, output) in enumerate(zip(given, outputs, strict=True)):
        if step < 2 or step % 3 == 0:
            with torch.no_grad():
                wanted = stock(x, scheduler.timesteps[step].expand(2), torch.tensor([1, 4])).sample
            past.insert(0, (step, by_hand(name, scheduler, step, wanted, x)[0]))
        else:
            clean = oracle.extrapolate(past[:order], step)
            wanted = by_hand(name, scheduler, step, output, x)[1](clean)
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=5e-3)  # α / σ is up to 100


def test_a_learned_variance_is_not_forecast():
    model, scheduler = build_tiny(out_channels=4), DDPMScheduler()
    with sostenuto.enable(model, ABCache(2, warmup=2, interval=4, extrapolates="sample"), scheduler=scheduler):
        _, outputs = run("ddpm", scheduler, model, 4)
    for step in (2, 3):
        torch.testing.assert_close(outputs[step][:, 2:], outputs[1][:, 2:])
        assert not torch.allclose(outputs[step][:, :2], outputs[1][:, :2])


def test_latents_in_a_list_are_converted_one_by_one():
    network, sample, scheduler = sampler_of_lists((8, 4), (8, 8))
    outputs = []

    def noted(**kwargs):
        output = network(**kwargs)
        outputs.append(([x.clone() for x in kwargs["x"]], output))
        return output

    method = ABCache(order=1, warmup=2, interval=9, extrapolates="sample")
    with sostenuto.enable(network, method, scheduler=scheduler):
        sample(noted, torch.Generator().manual_seed(0), 4)
    sigmas = scheduler.sigmas.tolist()
    cleans = [
        [x + sigma * v for x, v in zip(given, output.sample, strict=True)]  # it returns x₀ − ε
        for (given, output), sigma in zip(outputs, sigmas, strict=False)
    ]
    for now, kept in zip(cleans[2] + cleans[3], cleans[1] * 2, strict=True):
        torch.testing.assert_close(now, kept, rtol=1e-4, atol=1e-4)


def test_a_scheduler_that_does_not_tell_is_refused_before_anything_runs(tiny):
    scheduler = DDIMInverseScheduler()
    scheduler.set_timesteps(4)
    words = "not known: use another scheduler, or forecast what the network predicts"
    with (
        sostenuto.enable(tiny, ABCache(extrapolates="sample"), scheduler=scheduler),
        pytest.raises(MethodError, match=words),
    ):
        tiny(torch.randn(1, 2, 8, 8), scheduler.timesteps[:1], torch.tensor([1]))
    with pytest.raises(MethodError, match="extrapolates must be one of prediction, sample, not 'noise'"):
        ABCache(extrapolates="noise")


def test_only_a_scheduler_that_clips_itself_has_its_clean_samples_clipped():
    """diffusers keeps what one class was set up with in the configuration of the next."""
    clipping = DDIMScheduler(clip_sample=True, clip_sample_range=2.0)
    solver = DPMSolverMultistepScheduler.from_config(clipping.config)
    bounds = []
    video = CogVideoXDDIMScheduler(clip_sample=True)  # takes the argument, and its step never looks at it
    for scheduler in (clipping, solver, video, DDIMScheduler(clip_sample=True, thresholding=True)):
        scheduler.set_timesteps(3)
        bounds.append({step.bound for step in clean_conversions(scheduler, scheduler.timesteps.tolist())})
    assert bounds == [{2.0}, {math.inf}, {math.inf}, {math.inf}]


def test_a_step_without_noise_says_nothing_of_a_prediction():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    scheduler.sigmas[1] = 0.0
    with pytest.raises(MethodError, match=r"at step 1 .* forecast what the network predicts"):
        clean_conversions(scheduler, scheduler.timesteps.tolist())


# --- tables ------------------------------------------------------------------------------------------------------


def test_a_table_of_whole_samples_is_ab_cache_of_the_same_steps(tiny, scheduler):
    table = CacheTable((C, C, B, C, B, B, C), forecast_order=1, fill="sample")
    assert [site.id for site in table.sites(tiny)] == ["output:sample"]
    with sostenuto.enable(tiny, EBCache(table), scheduler=scheduler) as handle:
        got, _ = sample_loop(tiny, scheduler, 7)
        assert handle.stats.macs * 7 == handle.stats.macs_uncached * 4
    method = ABCache(2, warmup=2, interval=3, abscissa="step", extrapolates="sample")
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 7)
    assert torch.equal(got, expected)


def test_a_step_that_lists_its_sites_stands_beside_those_that_reuse_the_sample(tiny, scheduler):
    listed = {site.id: sostenuto.Action.COMPUTE for site in sostenuto.inspect(tiny)}
    table = CacheTable((C, {**listed, next(iter(listed)): sostenuto.Action.REUSE}, B, C), fill="sample")
    with sostenuto.enable(tiny, EBCache(table), scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, 4)
        assert [row.count("reuse") for row in handle.stats.plan] == [0, 1, 1, 0]


def test_what_a_scheduler_clips_is_clipped_before_it_is_held(tiny):
    """DDIM clips by default: holding what it doesn't go by would drift; held as it is, the images are those of fewer steps."""

    @torch.no_grad()
    def images(scheduler, timesteps):
        x = 3 * torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        scheduler.set_timesteps(10)
        scheduler.timesteps = torch.tensor(timesteps)
        for now, then in itertools.zip_longest(timesteps, timesteps[1:], fillvalue=-1):
            noise = tiny(x, torch.tensor([now, now]), torch.tensor([1, 4])).sample
            share, after = (
                scheduler.alphas_cumprod[now],
                scheduler.alphas_cumprod[then] if then >= 0 else torch.tensor(1.0),
            )
            clean = ((x - (1 - share).sqrt() * noise) / share.sqrt()).clamp(-1, 1)
            x = after.sqrt() * clean + (1 - after).sqrt() * noise  # DDIM's step, with any stride
        return x

    scheduler = DDIMScheduler(clip_sample=True)
    times = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    with sostenuto.enable(tiny, ABCache(1, 1, 2, extrapolates="sample"), scheduler=scheduler):
        held = images(scheduler, times)
    torch.testing.assert_close(held, images(scheduler, times[::2]), rtol=1e-3, atol=1e-3)


def test_steps_that_reuse_attention_stand_beside_those_that_reuse_the_sample(tiny, scheduler):
    table = CacheTable((C, C, A, B, C), fill="sample")
    with sostenuto.enable(tiny, EBCache(table), scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, 5)
        plan = handle.stats.plan
    assert plan[2][-1] == "compute"  # whose sample is the one that the next step reuses
    assert plan[3] == ["skip"] * (len(plan[3]) - 1) + ["reuse"]


def test_a_table_of_samples_survives_its_file_and_refuses_what_it_cannot_do(tmp_path):
    table = CacheTable((C, B), fill="sample")
    table.save(tmp_path / "table.json")
    assert CacheTable.load(tmp_path / "table.json") == table
    assert json.loads((tmp_path / "table.json").read_text())["fill"] == "sample"
    with pytest.raises(TableError, match="fill must be 'branches', 'stack' or 'sample', not 'output'"):
        CacheTable((C, B), fill="output")
    with pytest.raises(TableError, match="fill='sample' skips it with its block"):
        CacheTable((C, B), fill="sample", include_cross=False)


def test_eb_caches_calibration_makes_such_a_table(model):
    table = sostenuto.calibrate(
        model,
        EBCalibration(target_fraction=0.6, fill="sample", forecast_order=1),
        gaussian_sample,
        num_inference_steps=STEPS,
        num_samples=2,
        scheduler=model.scheduler_for_test,
    )
    assert table.fill == "sample"
    with sostenuto.enable(model, EBCache(table), scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        assert handle.stats.macs / handle.stats.macs_uncached == pytest.approx(table.macs_fraction)


def gaussian_sample(target, generator, num_inference_steps):
    return sample_loop(target, target.scheduler_for_test, num_inference_steps, seed=int(generator.initial_seed()))[0]


# --- tuning ------------------------------------------------------------------------------------------------------


def test_a_plan_of_clean_samples_alone_is_tuned_and_runs(model):
    options = sostenuto.TuneOptions(**{**vars(QUICK), "kinds": ("sample",), "published": ("eb", "feb")})
    found = tuned(model, options=options, speedup=2.0)
    table = found.point.table
    assert table.fill == "sample"
    assert found.point.ideal_speedup >= 2
    with sostenuto.enable(model, found.method, scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        assert handle.stats.ideal_speedup == pytest.approx(found.point.ideal_speedup)
    assert np.isfinite(found.point.error)


def test_the_scheduler_is_asked_once_it_is_set_up(model):
    """Cosmos' is a flow up to σ = 80, which none of its fresh lists says; PNDM lists nothing before."""
    from sostenuto.tuning.tuner import _told

    def rehearsed(scheduler):
        model.scheduler_for_test = scheduler
        settings = Settings(model, plain_sample, STEPS, 2, scheduler=scheduler)
        return rehearse(settings, 0, Tapped(("stack",)), (Kind.STACK,))

    kinds = (Kind.STACK, Kind.SAMPLE)
    assert _told(kinds, rehearsed(PNDMScheduler(skip_prk_steps=True))) == kinds
    wide = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    wide.register_to_config(sigma_max=80.0, sigma_min=0.002)
    wide.sigma_max, wide.sigma_min = 80.0, 0.002
    silent = rehearsed(wide)
    assert _told(kinds, silent) == (Kind.STACK,)
    with pytest.raises(sostenuto.InputError, match="don't tell the clean sample: let kinds hold 'branches'"):
        _told((Kind.SAMPLE,), silent)


@torch.no_grad()
def plain_sample(target, generator, num_inference_steps):
    scheduler = target.scheduler_for_test
    scheduler.set_timesteps(num_inference_steps)
    x = torch.randn(2, 2, 8, 8, generator=generator)
    for timestep in scheduler.timesteps:
        x = scheduler.step(target(x, timestep.expand(2), torch.tensor([1, 4])).sample, timestep, x).prev_sample
    return x


def test_a_score_may_choose_a_faster_plan_of_every_nth_step(model):
    """One that likes images the better the farther they are from the uncached ones, as no distance to them would."""
    uncached, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=0)

    def far(images):
        return 1 / (1e-6 + float((images - uncached).square().mean()))

    options = sostenuto.TuneOptions(**{**vars(QUICK), "kinds": ("sample",), "speedups": (2.0,)})
    found = tuned(model, options=options, score=far, score_sample=from_the_start).point
    assert found.origin.startswith("sample every ")
    assert found.ideal_speedup > 2.5
    assert found.table.actions[:2] == (C, C)
    assert found.table.forecast_order == 1


def from_the_start(target, generator, num_inference_steps):
    return sample_loop(target, target.scheduler_for_test, num_inference_steps, seed=0)[0]
