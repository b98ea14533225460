import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import sostenuto
from conftest import sample, sample_loop, sampler_of_lists
from sostenuto import EBCache, EBCalibration, InputError, MethodError, StepState, TableError
from sostenuto.calibrations.algorithm1 import Algorithm1
from sostenuto.calibrations.base import Tapped
from sostenuto.calibrations.eb import _vote
from sostenuto.engine import attach
from sostenuto.plan import Op
from sostenuto.seeds import noise_seed

C, A, M, B = StepState


def calibrate(model, options, steps=12, **kwargs):
    return sostenuto.calibrate(
        model, options, sample, num_inference_steps=steps, num_samples=4, scheduler=model.scheduler_for_test, **kwargs
    )


def longest_run(table, states):
    longest = run = 0
    for state in table.actions:
        run = run + 1 if state in states else 0
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("fill", ["branches", "stack"])
def test_the_table_costs_about_what_was_asked_and_its_macs_are_counted_right(model, fill):
    table = calibrate(model, EBCalibration(target_fraction=0.6, fill=fill))
    assert abs(table.macs_fraction - 0.6) < 0.08  # one step of 12 more or less
    with sostenuto.enable(model, EBCache(table), scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, 12)
        assert 1 / handle.stats.ideal_speedup == pytest.approx(table.macs_fraction, rel=1e-9)
    assert table.actions[0] is C
    assert table.actions[-1] is C


@pytest.mark.parametrize("criterion", ["vector_gap", "norm_gap"])
@pytest.mark.parametrize("aggregation", ["batch_mean", "vote"])
@pytest.mark.parametrize("bound", [1, 2])
def test_no_branch_is_reused_more_often_in_a_row_than_the_bound(model, criterion, aggregation, bound):
    options = EBCalibration((1e9, 0.0), None, criterion=criterion, aggregation=aggregation, max_consecutive_reuse=bound)
    table = calibrate(model, options)
    assert longest_run(table, (A, B)) == bound
    assert longest_run(table, (B,)) == bound


def test_the_threshold_is_intercept_plus_slope_times_a_time_that_falls_from_1_to_0(model):
    steps, slope = 6, 1e3

    def made(intercept, slope):
        options = EBCalibration((intercept, slope), None, candidates=(B,), max_consecutive_reuse=None)
        given = {"num_inference_steps": steps, "num_samples": 2, "scheduler": model.scheduler_for_test}
        return sostenuto.calibrate(model, options, sample, **given)

    refused = made(-1.0, 0.0)
    assert refused.actions == (C,) * steps
    gap, tau = refused.calibration["norms"][1]["reuse-both"], 1 - 1 / (steps - 1)
    for margin, second in ((0.999, C), (1.001, B)):  # the line goes just under or over the second step's gap
        assert made(margin * gap - slope * tau, slope).actions == (C, second, C, C, C, C)
    assert made(0.7e9, -1e9).actions == (C, C, B, B, B, C)  # τ is 0.8, 0.6, 0.4, 0.2 at the four in between


@pytest.mark.parametrize("fill", ["branches", "stack"])
@pytest.mark.parametrize("rule", ["fixed", "match_norm"])
def test_a_pass_that_begins_late_or_pauses_begins_by_computing(model, fill, rule):
    """While calibrating as with the table: guidance in calls of its own, at steps 2 and 3 and again from step 5 on."""
    outputs = []

    def guided(target, generator, num_inference_steps):
        seed = int(torch.randint(99, (1,), generator=generator))
        guided_at = (2, 3, 5, 6, 7)
        _, made = sample_loop(
            target, model.scheduler_for_test, num_inference_steps, seed=seed, separate_guidance=guided_at
        )
        outputs.append(torch.stack(made))

    options = EBCalibration((1e9, 0.0), None, fill=fill, max_consecutive_reuse=2, eps_scale_rule=rule)
    given = {"num_inference_steps": 8, "num_samples": 2, "scheduler": model.scheduler_for_test}
    table = sostenuto.calibrate(model, options, guided, **given)
    assert table.actions == (C, B, B, C, B, B, C, C)
    with sostenuto.enable(model, EBCache(table, eps_scale=1.0), scheduler=model.scheduler_for_test):
        guided(model, torch.Generator().manual_seed(0), 8)
    torch.testing.assert_close(outputs[-1], outputs[0])


def test_algorithm_1_taken_literally_may_reuse_without_bound(model):
    options = EBCalibration((1e9, 0.0), None, criterion="norm_gap", max_consecutive_reuse=None, forecast_order=0)
    assert longest_run(calibrate(model, options), (A, B)) == 10


def test_a_threshold_of_nothing_computes_everything(model):
    table = calibrate(model, EBCalibration((0.0, 0.0), None))
    assert set(table.actions) == {C}
    assert table.macs_fraction == 1.0


@pytest.mark.parametrize("advance", ["selected", pytest.param("no_cache", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["rms", pytest.param("mean_abs", marks=pytest.mark.slow), "raw"])
def test_every_option_makes_a_table_and_is_recorded(model, advance, norm):
    table = calibrate(model, EBCalibration(target_fraction=0.7, norm=norm, advance=advance), steps=8)
    assert table.calibration["norm"] == norm
    assert table.calibration["options"]["advance"] == advance
    assert table.calibration["num_samples"] == 4
    assert len(table.calibration["norms"]) == 8


def test_the_uncached_trajectory_is_followed_when_asked(model):
    seen = []

    def keeping(target, generator, num_inference_steps):
        seen.append(sample(target, generator, num_inference_steps))

    options = EBCalibration((1e9, 0.0), None, advance="no_cache")
    sostenuto.calibrate(
        model, options, keeping, num_inference_steps=6, num_samples=2, scheduler=model.scheduler_for_test
    )
    assert torch.equal(seen[0], sample(model, torch.Generator().manual_seed(0), 6))


@pytest.mark.parametrize("best", [0.98, pytest.param(1.02, marks=pytest.mark.slow)])
def test_b_is_chosen_by_the_score_on_either_side_of_one(model, best):
    # A score that knows the norm of the images wanted: that of the run with the best b.
    options = EBCalibration(target_fraction=0.7, eps_scale_grid=(0.98, 1.0, 1.02), max_rounds=2)
    base = calibrate(model, options, steps=8)
    with sostenuto.enable(model, EBCache(base, eps_scale=best), scheduler=model.scheduler_for_test):
        wanted = sample(model, torch.Generator().manual_seed(0), 8)
    table = calibrate(model, options, steps=8, score=lambda images: (images - wanted).norm().item())
    assert set(table.eps_scale) == {best}
    assert set(table.calibration["scores"]) == {"0.98", "1", "1.02"}


def test_a_score_that_is_not_finite_is_the_worst(model, tmp_path):
    options = EBCalibration(target_fraction=0.7, eps_scale_grid=(0.98, 1.0, 1.02), max_rounds=1)
    said = iter([math.nan, 3.0, math.inf])
    table = calibrate(model, options, steps=6, score=lambda _: next(said))
    assert set(table.eps_scale) == {1.0}
    assert table.calibration["scores"] == {"0.98": None, "1": 3.0, "1.02": None}
    table.save(tmp_path / "table.json")
    with pytest.raises(MethodError, match="not finite with any noise scale"):
        calibrate(model, options, steps=6, score=lambda _: math.nan)


def test_calls_vote_and_ties_go_to_less_reuse():
    assert _vote([[C, B, A], [C, A, B]], None) == [C, A, A]
    assert _vote([[C, B], [C, B], [C, C]], None) == [C, B]
    assert _vote([[C, B, B, B]], 2) == [C, B, B, C]


def test_the_model_is_free_after_calibration_also_after_a_failure(model):
    def failing(*_, **__):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        sostenuto.calibrate(model, "eb", failing, scheduler=model.scheduler_for_test)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def test_a_sample_that_ignores_the_steps_is_refused(model):
    with pytest.raises(MethodError, match="5 steps instead of 8"):
        sostenuto.calibrate(
            model,
            "eb",
            lambda m, g, num_inference_steps: sample(m, g, 5),
            num_inference_steps=8,
            scheduler=model.scheduler_for_test,
        )


def test_the_table_is_refused_with_another_solver(model):
    table = calibrate(model, EBCalibration(target_fraction=0.7), steps=8)
    other = DPMSolverMultistepScheduler.from_config(model.scheduler_for_test.config)
    with pytest.raises(TableError, match="DDPMScheduler"):
        sostenuto.enable(model, EBCache(table), scheduler=other)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(target_fraction=0.0),
        dict(target_fraction=1.5),
        dict(max_consecutive_reuse=0),
        dict(norm="l7"),
        dict(criterion="taste"),
        dict(last_computed=0),
        dict(target_fraction="a"),
        dict(delta=0.1),
        dict(delta=(1.0, float("nan"))),
        dict(kappa_start=0),
        dict(forecast_order=-1),
        dict(eps_scale=(1.0, 2.0)),
        dict(eps_scale_grid=()),
        dict(candidates=("reuse-attn",)),
        dict(candidates=(C,)),
        dict(include_cross=None),
        dict(include_cross=False, fill="stack"),
    ],
)
def test_options_without_meaning_are_refused(wrong):
    with pytest.raises(MethodError):
        EBCalibration(**wrong)


@pytest.mark.parametrize("separate", [False, True])
def test_norm_matching_restores_the_uncached_norm_of_the_first_pass_at_every_step(model, separate):
    def guided(model, generator, num_inference_steps):
        return sample(model, generator, num_inference_steps, separate_guidance=separate)

    options = EBCalibration(target_fraction=0.6, eps_scale_rule="match_norm")
    given = {"num_inference_steps": 8, "num_samples": 2, "scheduler": model.scheduler_for_test}
    table = sostenuto.calibrate(model, options, guided, **given)

    def norms(method):
        # the calibration's own noise: its generator starts from seed 0
        start = int(torch.randint(99, (1,), generator=torch.Generator().manual_seed(0)))
        with sostenuto.enable(model, method, scheduler=model.scheduler_for_test):
            _, outputs = sample_loop(model, model.scheduler_for_test, 8, seed=start, separate_guidance=separate)
        return [output.flatten(1).square().mean(1).sqrt().mean().item() for output in outputs[:: 1 + separate]]

    assert norms(EBCache(table)) == pytest.approx(norms(sostenuto.NoCache()), rel=1e-4)
    assert norms(EBCache(table, eps_scale=1.0)) != pytest.approx(norms(sostenuto.NoCache()), rel=1e-4)
    assert len(set(table.eps_scale)) > 1


def test_matched_norms_are_those_of_all_generations(model):
    options = EBCalibration((1e9, 0.0), None, eps_scale_rule="match_norm")  # the same states whatever the noise

    def scales(num_samples, seed):
        noise = torch.Generator().manual_seed(seed)
        given = {"num_inference_steps": 6, "num_samples": num_samples, "generator": noise}
        return sostenuto.calibrate(model, options, sample, scheduler=model.scheduler_for_test, **given).eps_scale

    first, second = scales(2, 0), scales(2, noise_seed(0, 1))
    assert first != second
    assert scales(4, 0) == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("half", [None, "first", "second"])
def test_with_a_guidance_scale_the_guided_predictions_of_the_images_are_compared(tiny, half):
    latents, fresh, cached = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    tick = SimpleNamespace(tau=0.5)

    def gap(batch, scale, **options):
        prober = SimpleNamespace(
            call=SimpleNamespace(latents=batch), prediction=lambda output: output, noise=lambda output: output
        )
        made = EBCalibration(eps_scale=0.9, guidance_scale=scale, conditional_half=half, **options)
        return Algorithm1(SimpleNamespace(_denoiser=tiny), made, 1.0)._gap(tick, fresh, cached, prober)

    def guided(rows):
        conditional, other = (rows[2:], rows[:2]) if half == "second" else (rows[:2], rows[2:])
        return 2.5 * conditional - 1.5 * other

    def rms(rows):
        return rows.flatten(1).square().mean(1).sqrt()

    both = torch.cat([latents[:2], latents[:2]])
    torch.testing.assert_close(gap(both, 2.5), rms(guided(fresh) - guided(cached)))
    norms = gap(both, 2.5, criterion="norm_gap")
    torch.testing.assert_close(norms, rms(guided(fresh)) - 0.9 * rms(guided(cached)))
    torch.testing.assert_close(gap(both, None), rms(fresh - cached))
    torch.testing.assert_close(gap(latents, 2.5), rms(fresh - cached))  # no two passes in one batch


@pytest.mark.parametrize("criterion", ["vector_gap", "norm_gap"])
def test_of_latents_in_a_list_every_sample_has_a_gap(criterion):
    network, sample, scheduler = sampler_of_lists((8, 4), (8, 8))
    outputs, gaps = [], []

    def drive(tick, prober):
        outputs.append(prober.run([Op.COMPUTE] * len(handle.sites)))
        if tick.step == 1:
            gaps.append(Algorithm1(handle, EBCalibration(criterion=criterion), 1.0)._gap(tick, *outputs, prober))
            kept = (1 - scheduler.sigmas[1]).item()  # the network predicts x₀ − ε
            inputs.extend((x, kept) for x in prober.call.latents)
        return outputs[-1]

    def rms(values):
        return values.square().mean().sqrt().item()

    inputs = []
    with attach(network, Tapped(("branches",)), scheduler=scheduler) as handle:
        handle.driver = drive
        sample(network, torch.Generator().manual_seed(0), 2)
    pairs = list(zip(*(output.sample for output in outputs), strict=True))
    if criterion == "vector_gap":
        wanted = [rms(a - b) for a, b in pairs]
    else:
        wanted = [rms(x - kept * a) - rms(x - kept * b) for (x, kept), (a, b) in zip(inputs, pairs, strict=True)]
    assert gaps[0].tolist() == pytest.approx(wanted, rel=1e-4)


def test_the_mean_of_the_norms_is_compared_and_not_that_of_their_distances(model):
    """A batch of which one half's norm rises as much as the other's falls is no reason to compute."""
    options = EBCalibration((0.1, 0.0), None, criterion="norm_gap", candidates=(B,))
    algorithm = Algorithm1(SimpleNamespace(sites=()), options, 1.0)
    algorithm._run = lambda *args, **kwargs: torch.zeros(2, 1)
    algorithm._gap = lambda *args: torch.tensor([0.5, -0.5])
    tick = SimpleNamespace(step=1, num_steps=4, tau=0.5, pass_index=0)
    prober = SimpleNamespace(state=SimpleNamespace(begins=False))
    state, _ = algorithm._choose(tick, prober)
    assert state is B
    voting = Algorithm1(SimpleNamespace(sites=()), replace(options, aggregation="vote"), 1.0)
    voting._run, voting._gap = algorithm._run, algorithm._gap
    assert voting._choose(tick, prober)[0] is C


def test_an_interrupted_calibration_goes_on_with_what_its_folder_holds(model, tmp_path):
    scored = []

    def score(latents, stop_at=None):
        if len(scored) == stop_at:
            raise KeyboardInterrupt
        scored.append(1)
        return latents.square().mean().item()

    def made(folder, stop_at=None, target=0.6):
        options = EBCalibration(target_fraction=target, eps_scale_grid=(0.97, 0.98, 1.01), max_rounds=2)
        return calibrate(model, options, steps=5, score=partial(score, stop_at=stop_at), folder=folder)

    whole = made(None)
    scored.clear()
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "kept", stop_at=2)
    searched = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert [name for name in searched if name.startswith("b-")] == ["b-0.97.json", "b-0.98.json"]
    assert sum(name.startswith("kappa-") for name in searched) == whole.calibration["rounds"]
    again = made(tmp_path / "kept")
    assert len(scored) == 3  # one score was missing
    again.save(tmp_path / "a")
    whole.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(InputError, match="holds a calibration with another calibration"):
        made(tmp_path / "kept", target=0.7)
    (tmp_path / "kept" / "run.json").touch()  # of a tuning: each has a record of its own
    assert made(tmp_path / "kept").actions == whole.actions
    (tmp_path / "kept" / "b-0.97.json").write_text('"much"')
    with pytest.raises(InputError, match=r"b-0\.97\.json holds no score: delete it"):
        made(tmp_path / "kept")
