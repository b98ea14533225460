"""What is measured on uncached generations whose calls aren't one of each pass a step."""

import math

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler

import sostenuto
from conftest import sample, sample_of_every_call
from sostenuto import MagCache, MagCacheCalibration, TeaCache, TeaCacheCalibration

STEPS = 6
CALIBRATIONS = {
    "magcache": (MagCacheCalibration(), lambda made: MagCache(made, threshold=1.0)),
    "teacache": (TeaCacheCalibration(degree=1, target_skipped=0.3), TeaCache),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
@pytest.mark.parametrize(
    ("scheduler", "listed"),
    [(HeunDiscreteScheduler(), 2 * STEPS - 1), (PNDMScheduler(skip_prk_steps=True), STEPS + 1)],
    ids=("heun", "pndm"),
)
def test_a_scheduler_that_lists_more_calls_than_steps_is_measured_call_by_call(tiny, name, scheduler, listed):
    calibration, method = CALIBRATIONS[name]
    every_call = sample_of_every_call(scheduler)
    made = sostenuto.calibrate(
        tiny, calibration, every_call, num_inference_steps=STEPS, num_samples=2, scheduler=scheduler
    )
    measured = made.ratios if name == "magcache" else made.calibration["output"][0]
    assert len(measured) == (listed if name == "magcache" else listed - 1)
    with sostenuto.enable(tiny, method(made), scheduler=scheduler) as handle:
        every_call(tiny, torch.Generator().manual_seed(3), STEPS)
    assert handle.stats.num_steps == listed


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_pass_that_ends_early_counts_where_it_ran(tiny, scheduler, name):
    """Guidance in an interval: the second pass is left out at the last steps."""
    calibration, _ = CALIBRATIONS[name]

    @torch.no_grad()
    def guided_early(model, generator, num_inference_steps):
        latents = torch.randn(2, 2, 8, 8, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        for step, timestep in enumerate(scheduler.timesteps):
            noise = model(latents, timestep.expand(2), torch.tensor([1, 2])).sample
            if step < 4:
                model(latents, timestep.expand(2), torch.tensor([10, 10]))
            latents = scheduler.step(noise[:, :2], timestep, latents).prev_sample

    made = sostenuto.calibrate(
        tiny, calibration, guided_early, num_inference_steps=STEPS, num_samples=2, scheduler=scheduler
    )
    if name == "magcache":
        ratios = made.ratios
        assert len(ratios) == STEPS
    else:
        assert [len(of_pass) for of_pass in made.calibration["output"]] == [STEPS - 1, 3]
        ratios = made.coefficients
    assert all(map(math.isfinite, ratios))


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_sample_that_runs_other_steps_is_refused(model, name):
    calibration, _ = CALIBRATIONS[name]

    def other(model, generator, num_inference_steps):
        return sample(model, generator, num_inference_steps - 1)

    with pytest.raises(sostenuto.MethodError, match="ran 5 steps instead of 6"):
        sostenuto.calibrate(
            model, calibration, other, num_inference_steps=STEPS, num_samples=2, scheduler=model.scheduler_for_test
        )
