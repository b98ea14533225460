"""A noise scale for computed and one for reused calls: measured, checked against theory, and applied to the right calls."""

import math

import pytest
import torch

import gaussian
import sostenuto
from conftest import sample as tiny_sample
from conftest import sample_loop
from sostenuto import (
    FORA,
    DBCache,
    EpsilonScaling,
    EpsilonScalingCalibration,
    InputError,
    MethodError,
    NoiseScales,
    TableError,
)
from sostenuto.analysis import Moments, noise_norm_curves, probe_chain, probe_variance
from sostenuto.correct import NoiseScale
from sostenuto.methods.base import Method
from sostenuto.schedulers import noise_levels

STEPS = 8


@pytest.fixture(params=gaussian.SAMPLERS)
def kind(request):
    return request.param


def denoiser(kind):
    return gaussian.GaussianDenoiser(gaussian.SAMPLERS[kind]())


def real(rows=64, seed=5):
    return gaussian.SPREAD * torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def levels_of(model, steps=STEPS):
    model.scheduler_for_test.set_timesteps(steps)
    return noise_levels(model.scheduler_for_test, model.scheduler_for_test.timesteps.tolist())


def probed(model, method="none"):
    return probe_variance(
        model, gaussian.sample, real(), method=method, num_inference_steps=STEPS, scheduler=model.scheduler_for_test
    )


# --- the variance of a step --------------------------------------------------------------------------------------


def test_the_response_and_the_lost_variance_of_a_step_are_those_of_theory(kind):
    model = denoiser(kind)
    levels, probe = levels_of(model), probed(denoiser(kind))
    for step in range(1, STEPS):  # x_T of a flow holds no data
        keep, response, drawn = gaussian.step_by_hand(kind, levels, step)
        following = gaussian.variance(levels[step + 1]) if step + 1 < STEPS else gaussian.SPREAD**2
        here, sigma = gaussian.variance(levels[step]), levels[step][1]
        lost = ((keep + response * sigma / here) ** 2 * here + drawn) / following - 1
        assert probe.computed[step].response == pytest.approx(response, rel=0.05, abs=0.01)
        assert probe.computed[step].excess() == pytest.approx(lost, abs=0.02)
        wanted = (math.sqrt((following - drawn) / here) - keep) * here / (response * sigma)
        assert probe.computed[step].excess(wanted) == pytest.approx(0, abs=0.02)
        if response < -0.1:  # below that the next input hardly depends on it
            assert probe.computed[step].factor == pytest.approx(wanted, rel=0.05)


def test_a_sampler_with_noise_of_its_own_wants_less_than_one_and_an_ode_solver_less_of_it_with_finer_steps():
    ancestral = [moments.factor for moments in probed(denoiser("ddpm")).computed]
    assert all(factor < 1 for factor in ancestral[1:])
    coarse, fine = (
        probe_variance(m, gaussian.sample, real(), num_inference_steps=n, scheduler=m.scheduler_for_test)
        for n, m in ((4, denoiser("flow")), (32, denoiser("flow")))
    )
    assert abs(fine.computed[16].factor - 1) < abs(coarse.computed[2].factor - 1)


def test_a_network_that_is_wrong_by_a_factor_is_given_the_inverse(kind):
    right, wrong = denoiser(kind), denoiser(kind)
    wrong.wrong = 1.05
    for one, other in zip(probed(right).computed[1:], probed(wrong).computed[1:], strict=True):
        assert other.factor * 1.05 == pytest.approx(one.factor, rel=1e-3)


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_a_reused_prediction_is_measured_as_theory_has_it(kind):
    model = denoiser(kind)
    levels, probe = levels_of(model), probed(model, FORA(2))
    assert [moments is not None for moments in probe.reused] == [
        p != 0 and (STEPS - 1 - p) % 2 == 1 for p in range(STEPS)
    ]
    for step in range(2, STEPS - 1):
        if probe.reused[step] is None:
            continue
        (alpha, sigma), (a, s), (a_next, s_next) = levels[step - 1], levels[step], levels[step + 1]
        stale = sigma / gaussian.variance((alpha, sigma))  # ε̂ = stale·(α₋·x₀ + σ₋·ε): of the step before
        response = s_next - a_next * s / a

        def next_variance(b, stale=stale, alpha=alpha, sigma=sigma, a=a_next, s=s_next, c=response):
            return (a + c * b * stale * alpha) ** 2 * gaussian.SPREAD**2 + (s + c * (b * stale * sigma - 1)) ** 2

        low, high = 0.2, 3.0
        for _ in range(60):  # it falls with b
            middle = (low + high) / 2
            low, high = (middle, high) if next_variance(middle) > gaussian.variance(levels[step + 1]) else (low, middle)
        assert probe.reused[step].factor == pytest.approx(low, rel=0.02)


def test_scales_that_were_calibrated_keep_the_variance_of_the_data_where_it_was_lost_as_by_hand():
    model = denoiser("ddpm")
    levels, chain = levels_of(model), 1.0
    for step in range(STEPS):
        keep, response, drawn = gaussian.step_by_hand("ddpm", levels, step)
        chain = (keep + response * levels[step][1] / gaussian.variance(levels[step])) ** 2 * chain + drawn
    scheduler = model.scheduler_for_test
    lossy = gaussian.sample(model, torch.Generator().manual_seed(1), STEPS).square().mean().item()
    assert lossy == pytest.approx(chain, rel=0.02)
    assert chain < 0.9 * gaussian.SPREAD**2
    scales = sostenuto.calibrate(
        model,
        EpsilonScalingCalibration(caching="none", real_latents=real(), window=1, limit=0.9),
        gaussian.sample,
        num_inference_steps=STEPS,
        num_samples=64,
        scheduler=scheduler,
    )
    assert scales.computed == scales.reused  # nothing was reused
    assert max(scales.computed[1:]) < 1
    with sostenuto.enable(model, EpsilonScaling(scales), scheduler=scheduler):
        kept = gaussian.sample(model, torch.Generator().manual_seed(1), STEPS).square().mean().item()
    assert kept == pytest.approx(gaussian.SPREAD**2, rel=0.02)


def test_moments_give_the_factor_that_brings_the_excess_to_zero():
    moments = Moments(-0.2, 90.0, 100.0, 88.0, 60.0, 62.0, 120.0)
    assert moments.excess(moments.factor) == pytest.approx(0, abs=1e-12)
    assert moments.excess(moments.factor + 0.01) < 0 < moments.excess(moments.factor - 0.01)
    assert moments.norm_ratio == pytest.approx(math.sqrt(0.9))
    hopeless = Moments(-2.0, 90.0, 100.0, 0.5, 1.0, -20.0, 120.0)  # whatever the factor, the error is too large
    assert hopeless.factor == hopeless.least_squares == pytest.approx(0.5 / 90)
    assert Moments(0.0, 90.0, 100.0, 88.0, 60.0, 62.0, 120.0).factor == pytest.approx(88 / 90)


# --- the variance of the chain -----------------------------------------------------------------------------------


def chained(kind, wrong=1.0, clean=None, method="none", steps=STEPS):
    model = gaussian.GaussianDenoiser(gaussian.SAMPLERS[kind](), clean)
    model.wrong = wrong
    scheduler = model.scheduler_for_test
    return probe_chain(
        model, gaussian.sample, real(), method=method, num_inference_steps=steps, scheduler=scheduler
    ), levels_of(model, steps)


def test_a_denoiser_that_knows_the_clean_samples_has_the_noise_of_training_all_along(kind):
    chain, levels = chained(kind, clean=real())
    assert chain.num_samples == 64
    assert chain.expected == pytest.approx([sigma**2 for _, sigma in levels])
    assert chain.variance == pytest.approx(chain.expected, rel=0.02)
    assert chain.delta == pytest.approx([0.0] * STEPS, abs=0.02)


@pytest.mark.parametrize("wrong", [0.97, 1.03])
def test_errors_of_the_noise_add_up_over_the_chain_with_their_sign_as_by_hand(kind, wrong):
    chain, levels = chained(kind, wrong, clean=real(), steps=24)
    variance, alone = chain.variance[1], []  # x_T of a flow holds no data
    for step in range(1, 23):
        keep, response, drawn = gaussian.step_by_hand(kind, levels, step)
        factor = (keep + response * wrong / levels[step][1]) ** 2
        variance = factor * variance + drawn
        assert chain.variance[step + 1] == pytest.approx(variance, rel=0.02)
        alone.append(factor * chain.expected[step] + drawn - chain.expected[step + 1])  # from noise as in training
    assert all(delta * (1 - wrong) > 0 for delta in chain.delta[2:-1])  # too much noise predicted, too little left
    renewed = kind.startswith("ddpm")  # noise that is drawn at each step has no errors
    assert abs(chain.delta[12]) > (1.3 if renewed else 6) * abs(alone[10])


def test_a_denoiser_that_does_not_know_them_ends_at_other_samples(kind):
    chain, levels = chained(kind)
    own = 1.0
    for step in range(1, STEPS):
        if step > 1 or levels[0][0]:
            keep, response, drawn = gaussian.step_by_hand(kind, levels, step - 1)
            own = (keep + response * levels[step - 1][1] / gaussian.variance(levels[step - 1])) ** 2 * own + drawn
        else:  # a flow's first step goes straight from the noise
            own = levels[1][1] ** 2
        alpha, sigma = levels[step]
        assert chain.delta[step] == pytest.approx(own + (alpha * gaussian.SPREAD) ** 2 - sigma**2, abs=0.02)


def test_the_chain_is_that_of_the_method_with_its_scale(kind):
    repaired, _ = chained(kind, 1.05, clean=real(), method=EpsilonScaling(1.05))
    assert repaired.delta == pytest.approx(chained(kind, clean=real())[0].delta, abs=1e-4)


def test_pairs_that_do_not_fit_the_chain_are_refused(model):
    given = {"scheduler": model.scheduler_for_test, "num_inference_steps": 4}
    with pytest.raises(InputError, match="one row for each row"):
        probe_chain(model, tiny_sample, torch.zeros(3, 2, 8, 8), **given)
    with pytest.raises(InputError, match="at least one batch"):
        probe_chain(model, tiny_sample, [], **given)
    two = [torch.zeros(2, 2, 8, 8)] * 2
    assert probe_chain(model, tiny_sample, two, **given).num_samples == 4


# --- which call gets which factor ---------------------------------------------------------------------------------


class Apart(Method):
    """A factor of its own for what is reused."""

    def noise_scale(self, facts):
        return NoiseScale((1.0,) * facts.num_steps, (0.5,) * facts.num_steps)


def test_the_passes_of_a_step_share_their_factor_where_one_of_them_reuses_and_the_other_computes(model):
    """Guidance would amplify a difference. A pass that begins at a step that the plan reuses is computed there."""

    def run(method):
        with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
            outputs = sample_loop(model, model.scheduler_for_test, 6, separate_guidance=(2, 3, 4, 5))[1]
            reused.append([set(row) == {"reuse"} for row in handle.stats.plan])
            return outputs

    reused = []
    plain, scaled = run(FORA(2)), run(FORA(2) | Apart())
    assert reused == [[False, False, True, False, True, False]] * 2
    for call, factor in enumerate((1, 1, 0.5, 0.5)):  # two steps of one pass, then both passes of the third
        torch.testing.assert_close(scaled[call], factor * plain[call])


# --- calibration -------------------------------------------------------------------------------------------------


def calibrated(model, num_samples=2, **options):
    return sostenuto.calibrate(
        model,
        EpsilonScalingCalibration(**options),
        tiny_sample,
        num_inference_steps=6,
        num_samples=num_samples,
        scheduler=model.scheduler_for_test,
    )


def test_by_norm_the_factors_are_the_inverse_ratios_of_the_norms_of_each_kind(model):
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    curves = noise_norm_curves(
        model, tiny_sample, latents, method=FORA(3), num_inference_steps=6, scheduler=model.scheduler_for_test
    )
    scales = calibrated(model, caching=FORA(3), real_latents=latents, match="norm", window=1, limit=0.9)
    limited = [min(max(1 / ratio, 0.1), 1.9) for ratio in curves.ratios]
    assert curves.reused == (False, True, False, True, True, False)
    for step, stale in enumerate(curves.reused):
        own = scales.reused if stale else scales.computed
        assert own[step] == pytest.approx(limited[step])
    assert scales.computed[1] == pytest.approx(math.sqrt(limited[0] * limited[2]))  # halfway, in the logarithm
    assert scales.reused[0] == scales.reused[1]
    assert scales.calibration["measured"]["computed"][1] is None


def test_what_a_method_reuses_by_a_decision_at_run_time_is_measured_as_reused(model):
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    method = DBCache(1, 0, threshold=1e9, warmup=2, max_consecutive=1)
    scales = calibrated(model, caching=method, real_latents=latents, match="norm", window=1, limit=0.9)
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
        tiny_sample(model, torch.Generator().manual_seed(0), num_inference_steps=6)
        computed = [len(set(row)) == 1 and row[0] == "compute" for row in handle.stats.plan]
    assert not all(computed)
    assert [value is not None for value in scales.calibration["measured"]["computed"]] == computed
    assert [value is None for value in scales.calibration["measured"]["reused"]] == computed


def test_factors_stay_within_the_limit_and_the_models_own_samples_serve_where_no_real_ones_are_given(model):
    scales = calibrated(model, caching=FORA(2), limit=0.02)
    assert scales.calibration["real_latents"] == "generated"
    assert all(0.98 - 1e-9 <= factor <= 1.02 + 1e-9 for factor in (*scales.computed, *scales.reused))
    assert (
        sostenuto.calibrate(
            model,
            "epsilon-scaling",
            tiny_sample,
            num_inference_steps=6,
            num_samples=2,
            scheduler=model.scheduler_for_test,
        ).check_steps(model.scheduler_for_test.timesteps.tolist())
        is None
    )
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


@pytest.mark.parametrize(
    "options",
    [
        {"match": "both"},
        {"limit": 1.0},
        {"window": 2},
        {"caching": 3},
        {"real_latents": [1.0]},
        {"caching": FORA(2) | EpsilonScaling(1.1)},
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(model, options):
    with pytest.raises(MethodError):
        calibrated(model, **options)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


@pytest.mark.parametrize(("rows", "asked", "measured"), [(6, 3, 4), (6, 5, 6), (5, 5, 4), (6, 1, 2)])
def test_as_many_real_latents_as_asked_for_are_measured_and_whole_generations_of_them(model, rows, asked, measured):
    latents = torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    scales = calibrated(model, asked, real_latents=latents, match="norm")
    assert scales.calibration["num_samples"] == measured  # two rows at a time


def test_too_few_real_latents_are_refused(model):
    with pytest.raises(InputError, match="1 rows, a generation 2"):
        calibrated(model, real_latents=torch.zeros(1, 2, 8, 8))


# --- applied -----------------------------------------------------------------------------------------------------

SCALES = NoiseScales(tuple(1 + 0.01 * p for p in range(6)), tuple(1 - 0.02 * p for p in range(6)))


def test_each_call_is_scaled_by_what_it_did(model):
    scheduler = model.scheduler_for_test
    seen = []
    with sostenuto.enable(model, FORA(2) | EpsilonScaling(SCALES), scheduler=scheduler) as handle:
        network = model.proj_out_2.register_forward_hook(lambda *a: seen.append(a[-1]))
        _, outputs = sample_loop(model, scheduler)
        network.remove()
        reused = ["reuse" in row for row in handle.stats.plan]
    assert reused == [False, False, True, False, True, False]
    for step, (output, raw) in enumerate(zip(outputs, seen, strict=True)):
        factor = (SCALES.reused if reused[step] else SCALES.computed)[step]
        assert output.norm().item() == pytest.approx(factor * raw.norm().item(), rel=1e-4)


def test_a_run_time_decision_is_scaled_by_what_was_decided(model):
    scheduler = model.scheduler_for_test
    method = sostenuto.DBCache(1, 0, 10.0, warmup=1)  # skips whenever it may
    with sostenuto.enable(
        model, method | EpsilonScaling(NoiseScales((1.0,) * 6, (2.0,) * 6)), scheduler=scheduler
    ) as handle:
        _, outputs = sample_loop(model, scheduler)
        plan = handle.stats.plan
    with sostenuto.enable(model, method, scheduler=scheduler):
        _, plain = sample_loop(model, scheduler)
    first = next(step for step, row in enumerate(plan) if row != ["compute"])
    for step in range(first):
        assert torch.equal(outputs[step], plain[step])
    torch.testing.assert_close(outputs[first], 2 * plain[first])


def test_scales_are_saved_and_loaded_and_refused_elsewhere(model, tmp_path):
    scales = calibrated(model, caching=FORA(2))
    path = tmp_path / "scales.json"
    scales.save(path)
    assert NoiseScales.load(path) == scales
    scheduler = model.scheduler_for_test
    with sostenuto.enable(model, FORA(2) | EpsilonScaling(path), scheduler=scheduler):
        sample_loop(model, scheduler)
        with pytest.raises(TableError, match="6 steps, the sampler runs 5"):
            sample_loop(model, scheduler, 5)
    from conftest import build_tiny

    with pytest.raises(TableError, match="noise scale was made for"):
        sostenuto.enable(build_tiny(2), EpsilonScaling(scales), scheduler=scheduler)


@pytest.mark.parametrize(
    ("computed", "reused"), [((), ()), ((1.0,), (1.0, 1.0)), ((0.0,), (1.0,)), ((1.0,), (float("nan"),)), ("a", "b")]
)
def test_scales_without_meaning_are_refused(computed, reused):
    with pytest.raises(TableError):
        NoiseScales(computed, reused)
    with pytest.raises(MethodError, match="leave out end"):
        EpsilonScaling(SCALES, end=1.0)


def test_the_command_calibrates_and_what_it_saved_is_run(tmp_path):
    from sostenuto.cli import main
    from sostenuto.cli.common import ModelChoice

    path = tmp_path / "scales.json"
    words = ["--method", "epsilon-scaling", "--num-inference-steps", "3", "--labels", "0", "1", "--num-samples", "2"]
    assert main(["calibrate", *words, "--output", str(path)]) == 0
    method = ModelChoice(method="epsilon-scaling", table=path).method_object()
    assert isinstance(method, EpsilonScaling)
    assert len(NoiseScales.load(path).computed) == 3
    words += ["--caching", "taylorseer:interval=2,order=1", "--match", "norm", "--window", "1"]
    assert main(["calibrate", *words, "--output", str(path)]) == 0
    how = NoiseScales.load(path).calibration
    assert how["caching"] == repr(sostenuto.TaylorSeer(2, 1))
    assert (how["match"], how["window"]) == ("norm", 1)


@pytest.mark.parametrize("kind", ["ddim", "flow"])
@pytest.mark.parametrize("match", ["variance", "norm"])
def test_samples_of_the_models_own_are_paired_with_other_noise_than_made_them(kind, match):
    """So that they ask for what others ask for that are made in the same way."""
    model = denoiser(kind)

    def measured(latents):
        options = EpsilonScalingCalibration(match=match, window=1, limit=0.5, real_latents=latents, caching="none")
        made = sostenuto.calibrate(
            model, options, gaussian.sample, num_inference_steps=24, num_samples=64, scheduler=model.scheduler_for_test
        )
        return made.calibration["measured"]["computed"][1:-3]

    others = gaussian.sample(model, torch.Generator().manual_seed(123), 24)
    assert measured(None) == pytest.approx(measured(others), abs=0.03)


@pytest.mark.parametrize("guidance", ["fused_guidance", "separate_guidance"])
def test_a_guided_sample_is_refused(model, guidance):
    def guided(model, generator, num_inference_steps):
        return tiny_sample(model, generator, num_inference_steps, **{guidance: True})

    with pytest.raises(MethodError, match="let sample leave guidance out"):
        sostenuto.calibrate(
            model,
            EpsilonScalingCalibration(),
            guided,
            num_inference_steps=STEPS,
            num_samples=2,
            scheduler=model.scheduler_for_test,
        )
