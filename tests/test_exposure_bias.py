"""The instruments of exposure bias, and the schedules of Epsilon Scaling that they and the paper give."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import sostenuto
from conftest import sample_loop
from sostenuto import FORA, EpsilonScaling, InputError, MethodError
from sostenuto.analysis import NormCurves, error_variance_growth, noise_norm_curves
from sostenuto.methods.base import Facts

# --- errors that add up ------------------------------------------------------------------------------------------


def test_errors_of_five_reuses_correlated_by_0_8_add_up_to_18_107():
    assert error_variance_growth(5, 0.8) == pytest.approx(18.107, abs=5e-4)
    assert error_variance_growth(5, 0.8) / 5 == pytest.approx(3.62, abs=5e-3)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_independent_errors_add_up_linearly_and_equal_ones_quadratically(n):
    assert error_variance_growth(n, 0.0) == n
    assert error_variance_growth(n, 1.0) == n**2


@pytest.mark.parametrize("rho", [-0.7, 0.3, 0.95])
def test_it_is_the_variance_of_the_sum_by_the_covariance_matrix(rho):
    n = 6
    covariance = [[rho ** abs(i - j) for j in range(n)] for i in range(n)]
    assert error_variance_growth(n, rho) == pytest.approx(sum(map(sum, covariance)))


@pytest.mark.parametrize(("n", "rho"), [(0, 0.5), (1.5, 0.5), (True, 0.5), (3, 1.1), (3, "a"), (3, float("nan"))])
def test_arguments_out_of_range_are_refused(n, rho):
    with pytest.raises(InputError, match="must be"):
        error_variance_growth(n, rho)


# --- norms of the noise ------------------------------------------------------------------------------------------


def sample(model, generator, num_inference_steps):
    sample.ran = sample_loop(model, model.scheduler_for_test, num_inference_steps, seed=3)
    return sample.ran[0]


def curves_of(model, real, **kwargs):
    return noise_norm_curves(model, sample, real, scheduler=model.scheduler_for_test, num_inference_steps=5, **kwargs)


def mean_norm(noise):
    return sum(math.sqrt(sum(x * x for x in row.flatten().tolist())) for row in noise) / len(noise)


def test_the_curves_are_the_mean_norms_on_the_chain_and_on_noised_real_latents(model):
    scheduler = model.scheduler_for_test
    _, outputs = sample_loop(model, scheduler, 5, seed=3)
    real = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(9))
    curves = curves_of(model, real, generator=torch.Generator().manual_seed(4))
    assert curves.timesteps == tuple(scheduler.timesteps.tolist())
    assert curves.num_samples == 2
    assert curves.chain == pytest.approx([mean_norm(output) for output in outputs], rel=1e-5)
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    for step, t in enumerate(scheduler.timesteps):
        noised = scheduler.add_noise(real, noise, t)  # diffusers' own
        with torch.no_grad():
            expected = mean_norm(model(noised, t.expand(2), torch.tensor([3, 4])).sample)
        assert curves.real[step] == pytest.approx(expected, rel=1e-5)
        assert curves.ratios[step] == pytest.approx(curves.chain[step] / expected, rel=1e-5)


def test_the_chain_is_that_of_the_given_method_and_measuring_does_not_change_it(model):
    real = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(9))
    method = FORA(2) | EpsilonScaling(1.05)
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test):
        expected = sample_loop(model, model.scheduler_for_test, 5, seed=3)[0]
    curves = curves_of(model, real, method=method)
    assert torch.equal(sample.ran[0], expected)
    # what the loop saw is scaled by 1/1.05, what is measured is not
    assert curves.chain == pytest.approx([1.05 * mean_norm(output) for output in sample.ran[1]], rel=1e-4)
    assert curves.real == pytest.approx(curves_of(model, real).real, rel=1e-5)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def test_several_batches_are_averaged_and_a_solver_that_scales_its_input_is_understood(model):
    one, two = (torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    model.scheduler_for_test = scheduler = EulerDiscreteScheduler()

    def euler(model, generator, num_inference_steps):
        scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(2, 2, 8, 8, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latents = scheduler.scale_model_input(x, t)
            x = scheduler.step(model(latents, t.expand(2), torch.tensor([1, 2])).sample, t, x).prev_sample

    generator = torch.Generator().manual_seed(0)
    curves = noise_norm_curves(
        model, euler, [one, two], scheduler=scheduler, num_inference_steps=3, generator=generator
    )
    assert curves.num_samples == 4
    generator.manual_seed(0)
    rows = []
    for real in (one, two):
        noise = torch.randn(2, 2, 8, 8, generator=generator)
        euler(model, generator, 3)
        sigma, t = scheduler.sigmas[1], scheduler.timesteps[1]
        noised = (real + sigma * noise) / (sigma**2 + 1).sqrt()
        with torch.no_grad():
            rows.append(mean_norm(model(noised, t.expand(2), torch.tensor([1, 2])).sample))
    assert curves.real[1] == pytest.approx(sum(rows) / 2, rel=1e-4)


def test_norms_of_a_velocity_model_are_those_of_its_noise(model):
    model.scheduler_for_test = scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    real = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(9))

    def ddim(model, generator, num_inference_steps):
        scheduler.set_timesteps(num_inference_steps)
        x = torch.zeros(2, 2, 8, 8)
        for t in scheduler.timesteps:
            velocity = model(x, t.expand(2), torch.tensor([1, 2])).sample
            share = scheduler.alphas_cumprod[t]
            ddim.norms.append(mean_norm(share.sqrt() * velocity + (1 - share).sqrt() * x))
            x = scheduler.step(velocity, t, x).prev_sample

    ddim.norms = []
    curves = noise_norm_curves(model, ddim, real, scheduler=scheduler, num_inference_steps=3)
    assert curves.chain == pytest.approx(ddim.norms, rel=1e-4)


def test_rows_that_do_not_fit_and_generations_cut_short_are_refused(model):
    with pytest.raises(InputError, match="one row for each row"):
        curves_of(model, torch.zeros(3, 2, 8, 8))
    with pytest.raises(InputError, match="all steps"):
        noise_norm_curves(model, lambda *_, **__: None, torch.zeros(2, 2, 8, 8), scheduler=model.scheduler_for_test)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


# --- schedules of Epsilon Scaling --------------------------------------------------------------------------------


def factors(method, scheduler, steps):
    return list(method.noise_scale(Facts([], tuple(range(steps, 0, -1)), torch.nn.Identity(), scheduler)))


def test_a_linear_schedule_is_the_papers_line_over_the_descending_index(scheduler):
    k, b, steps = 0.001, 1.003, 6
    method = EpsilonScaling.linear(start=b + k * (steps - 1), end=b)
    assert factors(method, scheduler, steps) == pytest.approx([1 / (k * t + b) for t in (5, 4, 3, 2, 1, 0)])
    assert factors(EpsilonScaling.linear(1.02, 1.0), scheduler, 1) == pytest.approx([1 / 1.02])


def test_a_constant_scale_is_what_it_was(scheduler):
    assert factors(EpsilonScaling(1.005), scheduler, 3) == [1 / 1.005] * 3
    assert EpsilonScaling() == EpsilonScaling(1.005)


@pytest.mark.parametrize(
    ("preset", "value"),
    [
        ("cifar10", 1.017),
        ("lsun_tower", 1.006),
        ("ffhq_128", 1.005),
        ("imagenet_64", 1.006),
        ("imagenet_128", 1.004),
        ("celeba_ddim", 1.0012),
        ("edm_cifar10_conditional", 1.0006),
        ("edm_cifar10_unconditional", 1.0048),
    ],
)
def test_presets_are_the_published_values(preset, value):
    assert getattr(EpsilonScaling, preset)() == EpsilonScaling(value)


def curves(*ratios):
    return NormCurves(tuple(range(len(ratios))), tuple(3 * r for r in ratios), (3.0,) * len(ratios), 1)


def test_measured_factors_multiply_up_to_the_ratio_of_the_norms():
    ratios = (1.0, 1.01, 1.03, 1.02, 1.06)
    scale = EpsilonScaling.measured(curves(*ratios), window=1).scale
    assert [math.prod(scale[: p + 1]) for p in range(5)] == pytest.approx(ratios)
    assert EpsilonScaling.measured(curves(*ratios), kind="cumulative", window=1).scale == pytest.approx(ratios)


@pytest.mark.parametrize("window", [3, 5, 99])
def test_smoothing_leaves_a_steady_growth_alone(window):
    steady = EpsilonScaling.measured(curves(*(1.002 * 1.004**p for p in range(9))), window=window)
    assert steady.scale == pytest.approx((1.002, *(1.004,) * 8))


def test_smoothing_is_a_running_mean_of_the_logarithm():
    scale = EpsilonScaling.measured(curves(1, math.e, 1, math.e, 1), kind="cumulative", window=3).scale
    assert [math.log(s) for s in scale] == pytest.approx([0, 1 / 3, 2 / 3, 1 / 3, 0])


def test_measured_factors_run_on_the_sampler_they_were_measured_with(model):
    real = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(9))
    method = EpsilonScaling.measured(curves_of(model, real), kind="cumulative", window=1)
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test):
        _, outputs = sample_loop(model, model.scheduler_for_test, 5, seed=3)
    plain = sample_loop(model, model.scheduler_for_test, 5, seed=3)[1]
    torch.testing.assert_close(outputs[0], plain[0] / method.scale[0])
    with (
        sostenuto.enable(model, method, scheduler=model.scheduler_for_test),
        pytest.raises(MethodError, match="5 entries for 4 steps"),
    ):
        sample_loop(model, model.scheduler_for_test, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EpsilonScaling.linear(1.0, 0.0),
        lambda: EpsilonScaling.linear(float("inf"), 1.0),
        lambda: EpsilonScaling((1.0, 1.1), end=1.0),
        lambda: EpsilonScaling.measured(curves(1.0), kind="other"),
        lambda: EpsilonScaling.measured(curves(1.0), window=2),
        lambda: EpsilonScaling.measured(curves(1.0, float("nan"))),
    ],
)
def test_schedules_without_meaning_are_refused(make):
    with pytest.raises(MethodError):
        make()
