"""FEB-Cache and its calibration, against values worked out by hand and against the naive oracle."""

import json
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from conftest import sample, sample_loop
from oracle import naive_forward
from sostenuto import CacheTable, EBCache, EpsilonScaling, FEBCache, FEBCalibration, MethodError, StepState, TableError
from sostenuto.cli import main
from sostenuto.clock import normalized_times
from sostenuto.demo.pipeline import load_demo_pipeline
from sostenuto.methods.feb import noise_scale_curve

C, A, M, B = StepState
STATES = (C, M, B, M, C, A, B, C)
TABLE = CacheTable(STATES, method="feb")


def calibrate(model, options, steps=11, **kwargs):
    return sostenuto.calibrate(
        model, options, sample, num_inference_steps=steps, num_samples=2, scheduler=model.scheduler_for_test, **kwargs
    )


# --- the noise scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "denominator", "expected"),
    [
        (1.0, "as_reported", 1.0),
        (0.7, "as_reported", 0.98 + 0.02 * math.exp(-2.5)),
        (0.4, "as_reported", 0.98 + 0.02 * math.exp(-5)),
        (0.1, "as_reported", 0.96 + 0.02 * math.exp(-2.5)),
        (0.0, "as_reported", 0.9607135),  # 0.036 of the way from b_low to b_high
        (0.2, "symmetric", 0.96 + 0.02 * math.exp(-2.5)),
        (0.0, "symmetric", 0.96 + 0.02 * math.exp(-5)),
    ],
)
def test_the_noise_scale_is_the_papers_at_the_default_parameters(tau, denominator, expected):
    (b,) = noise_scale_curve([tau], denominator=denominator)
    assert b == pytest.approx(expected, abs=1e-7)


def test_the_noise_scale_falls_all_the_way_and_jumps_little_at_the_threshold():
    curve = noise_scale_curve(normalized_times(1001))
    assert all(later < earlier for earlier, later in pairwise(curve))
    before, after = noise_scale_curve([0.4, math.nextafter(0.4, 0)])
    assert before - after == pytest.approx(0.02 * math.exp(-5), rel=1e-6)


def test_normalized_times_run_evenly_from_one_to_zero():
    assert normalized_times(5) == (1, 0.75, 0.5, 0.25, 0)
    assert normalized_times(1) == (1,)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(b_high=0.0), "b_high must be a finite number above 0, not 0.0"),
        (dict(b_low=float("nan")), "b_low"),
        (dict(b_low="a"), "b_low"),
        (dict(tau_threshold=0), "tau_threshold must be a number above 0 and below 1, not 0"),
        (dict(tau_threshold=1.0), "tau_threshold"),
        (dict(denominator="other"), "'as_reported' or 'symmetric', not 'other'"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, words):
    for make in (FEBCache, FEBCalibration, lambda **kwargs: noise_scale_curve([0.5], **kwargs)):
        with pytest.raises(MethodError, match=words):
            make(**wrong)


def test_a_time_out_of_range_and_a_table_that_is_none_are_refused():
    with pytest.raises(MethodError, match="from 0"):
        noise_scale_curve([1.5])
    with pytest.raises(MethodError, match="FEBCache's table"):
        FEBCache(table=3)
    with pytest.raises(MethodError, match="eps_scale"):
        FEBCache(TABLE, eps_scale=0.0)


def run(model, method, steps=8, **kwargs):
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
        return sample_loop(model, model.scheduler_for_test, steps, **kwargs)[0], handle.stats


def test_the_predicted_noise_is_scaled_by_the_curve_unless_told_otherwise(model):
    own = noise_scale_curve(normalized_times(8), 0.99, 0.97, 0.3, "symmetric")
    got, _ = run(model, FEBCache(TABLE, b_high=0.99, b_low=0.97, tau_threshold=0.3, denominator="symmetric"))
    assert torch.equal(got, run(model, EBCache(TABLE, eps_scale=own))[0])
    overridden, _ = run(model, FEBCache(TABLE, eps_scale=0.9))
    assert torch.equal(overridden, run(model, EBCache(TABLE, eps_scale=0.9))[0])


def test_the_published_scale_is_a_preset_for_a_table_of_ones_own():
    published = dict(b_high=0.98, b_low=0.96, tau_threshold=0.4, denominator="as_reported")
    assert FEBCache.dit_xl_2(TABLE) == FEBCache(TABLE, **published)


@pytest.mark.slow
def test_a_multiplier_counts_where_febs_calibration_found_it(model):
    curve = noise_scale_curve(normalized_times(8))
    found = CacheTable(STATES, method="feb", calibration={"multiplier": 1.02})
    expected, _ = run(model, EBCache(TABLE, eps_scale=tuple(1.02 * b for b in curve)))
    assert torch.equal(run(model, FEBCache(found))[0], expected)
    of_eb = CacheTable(STATES, eps_scale=(0.9,) * 8, calibration={"multiplier": 0.9})
    assert torch.equal(run(model, FEBCache(of_eb))[0], run(model, EBCache(TABLE, eps_scale=curve))[0])
    with pytest.raises(TableError, match=r"calibration\.multiplier"):
        run(model, FEBCache(CacheTable(STATES, method="feb", calibration={"multiplier": "x"})))


def test_it_combines_with_another_scale_only_when_its_own_is_one():
    with pytest.raises(MethodError, match="scales the noise"):
        FEBCache(TABLE) | EpsilonScaling(1.01)
    FEBCache(TABLE, eps_scale=1.0) | EpsilonScaling(1.01)


# --- the states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_the_four_states_give_what_the_naive_oracle_gives_and_what_ran_is_the_plan(model, order):
    features, scheduler = {}, model.scheduler_for_test

    def skip(site, step):
        return STATES[step] is B or STATES[step] is (A if "attn" in site else M)

    class Naive:
        def __call__(self, latents, timestep, labels):
            step = [float(t) for t in scheduler.timesteps].index(float(timestep[0]))
            output = naive_forward(model, latents, timestep, labels, skip, features, step, order)
            return type("Out", (), {"sample": output})

    expected, _ = sample_loop(Naive(), scheduler, len(STATES))
    got, stats = run(model, FEBCache(TABLE, eps_scale=1.0, forecast_order=order))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for state, carried in zip(STATES, stats.plan, strict=True):
        assert [action != "compute" for action in carried] == [state in (A, B), state in (M, B)] * 3


def test_counted_macs_fall_by_the_branches_that_are_skipped(model):
    parts = {state: run(model, FEBCache(CacheTable((C, state, C), method="feb")), 3)[1].macs for state in (C, A, M, B)}
    assert parts[C] - parts[B] == (parts[C] - parts[A]) + (parts[C] - parts[M])
    assert parts[B] < parts[M] < parts[A] < parts[C]  # the MLP is the dearer branch


def test_computing_everything_unscaled_is_bit_identical_to_the_stock_model(model):
    stock, _ = sample_loop(model, model.scheduler_for_test, 5)
    got, _ = run(model, FEBCache(CacheTable((C,) * 5, method="feb"), eps_scale=1.0), 5)
    assert torch.equal(got, stock)


def test_an_interrupted_generation_leaves_nothing_for_the_next(model):
    expected, _ = run(model, FEBCache(TABLE), seed=5)
    with sostenuto.enable(model, FEBCache(TABLE), scheduler=model.scheduler_for_test):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, model.scheduler_for_test, 8, seed=1, stop_at=3)
        got, _ = sample_loop(model, model.scheduler_for_test, 8, seed=5)
    assert torch.equal(got, expected)


# --- calibration -------------------------------------------------------------------------------------------------


def test_each_stage_tries_its_own_single_branch(model):
    options = FEBCalibration((1e9, 0.0), None, candidates=(M, A), max_consecutive_reuse=1)
    table = calibrate(model, options)
    assert table.method == "feb"
    # τ = 1, 0.9 … 0: above 0.4 are the steps 0 to 5; each branch is reused once in a row, the last step computes
    assert table.actions == (C, M, C, M, C, M, A, C, A, C, C)
    deep = calibrate(model, FEBCalibration((1e9, 0.0), None, max_consecutive_reuse=None))
    assert deep.actions == (C, *(B,) * 9, C)


def test_norms_compare_the_unscaled_uncached_with_the_scaled_cached_prediction_on_the_scaled_trajectory(model):
    """With a threshold of nothing every step computes, so each candidate reuses the step before, and ε ← b(τ)·ε."""
    options = FEBCalibration(
        (0.0, 0.0), None, criterion="norm_gap", forecast_order=0, candidates=(B, M, A), last_computed=1
    )
    scheduler, steps = model.scheduler_for_test, 11
    table = calibrate(model, options, steps)
    start = int(torch.randint(99, (1,), generator=torch.Generator().manual_seed(0)))
    curve = noise_scale_curve(normalized_times(steps))

    generator = torch.Generator().manual_seed(start)
    latents = torch.randn(2, 2, 8, 8, generator=generator)
    labels = (torch.arange(2) + start) % 10
    scheduler.set_timesteps(steps)
    before = {}
    for step, t in enumerate(scheduler.timesteps):

        def forward(kinds, features, latents=latents, t=t, step=step):
            def skip(site, _):
                return any(kind in site for kind in kinds)

            past = {site: list(outputs) for site, outputs in features.items()}
            return naive_forward(model, latents, t.expand(2), labels, skip, past, step, 0), past

        def rms(noise):
            return noise.flatten(1).square().mean(1).sqrt()

        fresh, computed = forward((), {})
        if 0 < step < steps - 1:
            single = ("mlp", ("ff",)) if step < 6 else ("attn", ("attn1",))
            for name, kinds in (("both", ("ff", "attn1")), single):
                cached, _ = forward(kinds, before)
                gap = abs((rms(fresh) - curve[step] * rms(cached)).mean().item())
                assert table.calibration["norms"][step][f"reuse-{name}"] == pytest.approx(gap, rel=1e-3, abs=1e-5)
            assert len(table.calibration["norms"][step]) == 2
        before = computed
        latents = scheduler.step(curve[step] * fresh, t, latents, generator=generator).prev_sample


def test_the_table_keeps_the_curve_and_costs_what_was_asked(model):
    table = calibrate(model, FEBCalibration(target_fraction=0.7))
    assert table.eps_scale == noise_scale_curve(normalized_times(11))
    assert abs(table.macs_fraction - 0.7) < 0.08
    assert table.calibration["options"]["tau_threshold"] == 0.4
    assert 1 / run(model, FEBCache(table), 11)[1].ideal_speedup == pytest.approx(table.macs_fraction)


def test_a_score_chooses_the_multiplier_of_the_curve_and_the_method_follows_it(model, tmp_path):
    options = FEBCalibration((1e9, 0.0), None, eps_scale_grid=(0.98, 1.0, 1.03))
    best = tuple(1.03 * b for b in noise_scale_curve(normalized_times(6)))
    states = (C, B, B, B, C, C)  # any candidate is taken, three times in a row at most
    with sostenuto.enable(
        model, EBCache(CacheTable(states, forecast_order=1), best), scheduler=model.scheduler_for_test
    ):
        wanted = sample(model, torch.Generator().manual_seed(0), 6)
    table = calibrate(model, options, 6, score=lambda images: (images - wanted).norm().item())
    assert table.actions == states
    assert table.calibration["multiplier"] == 1.03
    assert table.eps_scale == best
    table.save(tmp_path / "t.json")
    got, _ = run(model, FEBCache(tmp_path / "t.json"), 6)
    assert torch.equal(got, run(model, EBCache(table), 6)[0])


def test_a_velocity_model_is_calibrated_on_its_noise(model):
    model.scheduler_for_test = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    table = calibrate(model, FEBCalibration(target_fraction=0.7, criterion="norm_gap"), steps=6)
    assert run(model, FEBCache(table), 6)[1].num_steps == 6


def test_matching_norms_is_refused_since_it_is_no_multiple_of_the_curve():
    with pytest.raises(MethodError, match="match_norm"):
        FEBCalibration(eps_scale_rule="match_norm")


# --- the command line and the demo -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_calibrates_and_verifies_feb(tmp_path, capsys):
    table, numbers = str(tmp_path / "t.json"), tmp_path / "n.json"
    few = ["--method", "feb", "--num-inference-steps", "4", "--labels", "1"]
    more = [
        "--num-samples",
        "1",
        "--target-fraction",
        "1.0",
        "--search-images",
        "0",
        "--output",
        table,
        "--json",
        str(numbers),
    ]
    assert main(["calibrate", *few, *more]) == 0
    assert CacheTable.load(table).method == "feb"
    scales = json.loads(numbers.read_text())["eps_scale"]
    assert scales[0] == 1.0
    assert len(scales) == 4
    assert main(["verify", *few, "--table", table]) == 0
    assert "4 steps" in capsys.readouterr().out


def test_a_method_without_calibration_or_table_is_refused_on_the_command_line(tmp_path, capsys):
    assert main(["calibrate", "--method", "fora"]) == 1
    assert "'fora' has no calibration; " in capsys.readouterr().err
    assert main(["verify", "--method", "fora", "--table", "t.json"]) == 1
    assert "fora takes no table" in capsys.readouterr().err


def test_each_method_takes_the_table_that_ships_for_it():
    pipe = load_demo_pipeline()
    for method in (FEBCache(), EBCache()):
        table = method.prepare(pipe.transformer, pipe.scheduler).table
        assert table.method == method.name
        assert table.num_inference_steps == 50
        assert table.macs_fraction < 0.7
    taus = normalized_times(50)
    shipped = FEBCache().prepare(pipe.transformer, pipe.scheduler).table
    assert shipped.eps_scale == pytest.approx([shipped.calibration["multiplier"] * b for b in noise_scale_curve(taus)])


def test_a_table_runs_with_the_curve_that_it_was_calibrated_with(model, tmp_path):
    other = dict(b_high=0.99, b_low=0.9, tau_threshold=0.2, denominator="symmetric")
    table = calibrate(model, FEBCalibration(target_fraction=0.7, **other), steps=6)
    curve = noise_scale_curve(normalized_times(6), **other)
    assert table.eps_scale == curve
    table.save(tmp_path / "t.json")
    expected, _ = run(model, EBCache(table), 6)
    assert torch.equal(run(model, FEBCache(tmp_path / "t.json"), 6)[0], expected)
    published = {"b_high": 0.98, "b_low": 0.96, "tau_threshold": 0.4, "denominator": "as_reported"}
    own, _ = run(model, FEBCache(table, **published), 6)
    assert torch.equal(own, run(model, EBCache(table, noise_scale_curve(normalized_times(6))), 6)[0])
    with pytest.raises(TableError, match=r"calibration\.options: b_low must be a finite number above 0, not 'low'"):
        run(model, FEBCache(CacheTable(STATES, method="feb", calibration={"options": {"b_low": "low"}})))
