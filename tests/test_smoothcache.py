"""SmoothCache: errors measured against plain hooks, schedules by hand, tables end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from conftest import build_tiny, sample, sample_loop
from sostenuto import (
    CacheTable,
    EBCache,
    EpsilonScaling,
    MethodError,
    SmoothCache,
    SmoothCacheCalibration,
    StepState,
    TableError,
)
from sostenuto.anatomy import SiteKind
from sostenuto.calibrations.smoothcache import Measured, relative_l1
from sostenuto.cli import main
from sostenuto.cost import Cost
from sostenuto.engine import handle_of
from sostenuto.methods.smoothcache import greedy_schedule
from sostenuto.plan import Action
from sostenuto.seeds import noise_seed
from sostenuto.sites import Site
from tiny_pixart import build_pixart, sample_pixart

STEPS = 10


def calibrate(model, options=None, sample=sample, steps=STEPS, num_samples=4):
    return sostenuto.calibrate(
        model,
        options or SmoothCacheCalibration(),
        sample,
        num_inference_steps=steps,
        num_samples=num_samples,
        scheduler=model.scheduler_for_test,
    )


def strip(skipped):
    return "".join("0" if skip else "1" for skip in skipped)


def schedules(table, sites):
    plan = table.plan(sites)
    return {site.id: strip(row[i] is not Action.COMPUTE for row in plan.actions) for i, site in enumerate(sites)}


def measured_by_hooks(model, run, num_steps, max_lag, passes=1):
    """Every output of every branch in a plain run, and the errors from them in float64."""
    sites = sostenuto.inspect(model)
    outputs = {site.id: [] for site in sites}
    hooks = [
        model.get_submodule(site.id).register_forward_hook(
            lambda _module, _inputs, output, kept=outputs[site.id]: kept.append(output.double().numpy())
        )
        for site in sites
    ]
    run()
    for hook in hooks:
        hook.remove()
    errors = {}
    for site, kept in outputs.items():
        generations = len(kept) // (num_steps * passes)
        kept = np.stack(kept).reshape(generations, num_steps, passes, *kept[0].shape)
        errors[site] = []
        for lag in range(1, max_lag + 1):
            stale, fresh = kept[:, :-lag], kept[:, lag:]
            axes = tuple(range(4, kept.ndim))
            each = np.abs(stale - fresh).sum(axes) / np.abs(fresh).sum(axes)  # [generation, step, pass, row]
            errors[site].append(each.mean((0, 2, 3)))
    return errors


def test_the_longest_stretch_below_alpha_is_skipped():
    errors = [
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.2, 0.9, 0.9, 0.9, 0.2, 0.2],
        [0.3, 0.9, 0.9, 0.9, 0.9],
    ]
    assert strip(greedy_schedule(errors, 0.30)) == "10001001"
    assert (
        strip(greedy_schedule(errors, 0.25)) == "10010101"
    )  # step 3 reaches one step, step 5 would reach the last two
    assert strip(greedy_schedule(errors, 0.15)) == "10101011"  # the last step is computed, though it would be in reach
    assert strip(greedy_schedule(errors, 0.05)) == "11111111"


def test_a_branch_that_no_pass_ran_has_the_error_of_its_kind():
    attention, mlp = SiteKind.SELF_ATTENTION, SiteKind.MLP
    sites = [Site(name, kind, 0, 0) for name, kind in zip("abcd", [attention] * 3 + [mlp], strict=True)]
    totals = {(index, 1, step): 2.0 * (index + step + 1) for index in (0, 1) for step in (0, 1)}
    cost = Cost(4, (2, 2, 0, 0), (), ())
    found = Measured(2, 3, cost, totals, dict.fromkeys(totals, 2)).errors(sites)
    assert found.errors == {"a": [[1.0, 2.0]], "b": [[2.0, 3.0]], "c": [[1.5, 2.5]], "d": [[0.0, 0.0]]}


def test_a_longer_stretch_counts_where_a_shorter_one_has_the_larger_error():
    assert strip(greedy_schedule([[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.9], [0.9, 0.9]], 0.2)) == "10011"


def test_relative_l1_by_hand():
    stale, fresh = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[2.0, -2.0], [1.0, 1.0]])
    assert relative_l1(stale, fresh).item() == pytest.approx((1 / 4 + 3 / 2) / 2)
    assert relative_l1(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


def test_the_error_of_several_streams_is_that_of_all_of_them():
    image, text = torch.tensor([[1.0, 2.0]]), torch.tensor([[[5.0], [0.0]]])
    assert relative_l1((image, text), (image + 1, text + 2)).item() == pytest.approx((2 + 4) / (5 + 9))


def test_a_branch_that_is_attention_and_mlp_in_one_is_reused_when_its_own_error_allows():
    errors = {"double.attn": [[9.0] * 3], "double.ff": [[9.0] * 3], "single": [[0.01] * 3]}
    kinds = {"double.attn": "joint-attention", "double.ff": "mlp", "single": "fused"}
    calibration = {"errors": errors, "kinds": kinds, "macs_share": dict.fromkeys(errors, 0.3)}
    steps = (StepState.COMPUTE,) * 4
    some = SmoothCache.from_errors(CacheTable(steps, calibration=calibration), 0.1).table
    assert some.actions[1] == {"double.attn": Action.COMPUTE, "double.ff": Action.COMPUTE, "single": Action.REUSE}
    alone = {name: {"single": values["single"]} for name, values in calibration.items()}
    assert SmoothCache.from_errors(CacheTable(steps, calibration=alone), 0.1).table.actions[1] is StepState.REUSE_BOTH


@pytest.mark.parametrize("separate", [False, True])
def test_the_errors_are_those_of_a_plain_run(model, separate):
    def guided(model, generator, num_inference_steps):
        return sample(model, generator, num_inference_steps, separate_guidance=separate)

    table = calibrate(model, sample=guided)
    assert table.calibration["num_samples"] == 4

    def run():
        for seed in (0, noise_seed(0, 1)):
            guided(model, torch.Generator().manual_seed(seed), STEPS)

    expected = measured_by_hooks(model, run, STEPS, 3, passes=1 + separate)
    assert set(table.calibration["errors"]) == set(expected)
    for site, rows in expected.items():
        for row, got in zip(rows, table.calibration["errors"][site], strict=True):
            np.testing.assert_allclose(got, row, rtol=1e-4)


def test_the_calibration_follows_the_uncached_trajectory_and_keeps_few_outputs(model):
    seen = []

    def watching(model, generator, num_inference_steps):
        seen.append(sample(model, generator, num_inference_steps))
        seen.append(handle_of(model).stats.cache_bytes_peak)

    calibrate(model, SmoothCacheCalibration(max_lag=2), watching, num_samples=2)
    assert torch.equal(seen[0], sample(model, torch.Generator().manual_seed(0), STEPS))
    assert seen[1] == 3 * 6 * (2 * 16 * 32 * 4)  # max_lag + 1 outputs of six sites


def test_each_type_has_the_schedule_of_its_mean_error(model):
    table = calibrate(model, SmoothCacheCalibration(alpha=0.5))
    errors = table.calibration["errors"]
    for branch in ("attn1", "ff"):
        blocks = [errors[f"transformer_blocks.{block}.{branch}"] for block in range(3)]
        expected = greedy_schedule([np.mean([rows[lag] for rows in blocks], axis=0).tolist() for lag in range(3)], 0.5)
        got = {line for site, line in schedules(table, sostenuto.inspect(model)).items() if branch in site}
        assert got == {strip(expected)}
    assert all(isinstance(state, StepState) for state in table.actions)


def test_a_table_runs_as_planned_and_costs_what_it_says(model):
    table = calibrate(model, SmoothCacheCalibration(target_fraction=0.6))
    with sostenuto.enable(model, SmoothCache(table), scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        carried = handle.stats.plan
        assert 1 / handle.stats.ideal_speedup == pytest.approx(table.macs_fraction, rel=1e-9)
    assert carried == [[action.value for action in row] for row in table.plan(handle.sites).actions]
    assert set(carried[0]) == set(carried[-1]) == {"compute"}
    assert any("reuse" in row for row in carried)


def test_alpha_zero_is_bit_identical_and_a_huge_one_reuses_as_long_as_was_measured(model):
    table = calibrate(model, SmoothCacheCalibration(alpha=0))
    stock, _ = sample_loop(model, model.scheduler_for_test, STEPS)
    with sostenuto.enable(model, SmoothCache(table), scheduler=model.scheduler_for_test):
        assert torch.equal(stock, sample_loop(model, model.scheduler_for_test, STEPS)[0])
    assert table.macs_fraction == 1
    assert set(schedules(SmoothCache.from_errors(table, 1e9).table, sostenuto.inspect(model)).values()) == {
        "1000100011"
    }
    shorter = SmoothCache.from_errors(table, 1e9, max_lag=1).table
    assert set(schedules(shorter, sostenuto.inspect(model)).values()) == {"1010101011"}


@pytest.mark.parametrize("group_by", ["type", "site"])
def test_another_alpha_on_the_kept_errors_is_what_a_new_calibration_gives(model, group_by, tmp_path):
    calibrate(model, SmoothCacheCalibration(alpha=0.1)).save(tmp_path / "table.json")
    for alpha in (0.4, 0.8):
        again = SmoothCache.from_errors(tmp_path / "table.json", alpha, group_by=group_by).table
        assert again == calibrate(model, SmoothCacheCalibration(alpha=alpha, group_by=group_by))
        assert again.calibration["alpha"] == alpha


def test_alpha_is_found_for_a_given_cost(model):
    table = calibrate(model, steps=20)
    for target in (1.0, 0.8, 0.6, 0.45):
        method = SmoothCache.from_errors(table, target_fraction=target)
        assert abs(method.table.macs_fraction - target) < 0.05  # a step of one type is about 0.03
        with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
            sample_loop(model, model.scheduler_for_test, 20)
            assert handle.stats.macs / handle.stats.macs_uncached == pytest.approx(method.table.macs_fraction)
        same = SmoothCache.from_errors(table, method.table.calibration["alpha"]).table
        assert same.actions == method.table.actions
    with pytest.warns(UserWarning, match="max_lag"):
        SmoothCache.from_errors(table, target_fraction=0.1)


def test_schedules_of_sites_may_differ_within_a_type(model, tmp_path):
    table = calibrate(model, SmoothCacheCalibration(alpha=0.6, group_by="site"))
    errors = table.calibration["errors"]
    expected = {site: strip(greedy_schedule(rows, 0.6)) for site, rows in errors.items()}
    assert len(set(expected.values())) > 2
    assert schedules(table, sostenuto.inspect(model)) == expected
    table.save(tmp_path / "table.json")
    assert CacheTable.load(tmp_path / "table.json") == table
    with sostenuto.enable(model, SmoothCache(tmp_path / "table.json"), scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        carried = handle.stats.plan
    assert {site: strip(row[i] != "compute" for row in carried) for i, site in enumerate(expected)} == expected


def test_on_pixart_self_and_cross_attention_have_schedules_of_their_own():
    model = build_pixart()
    model.scheduler_for_test = DDIMScheduler()

    def sample(model, generator, num_inference_steps):
        return sample_pixart(model, model.scheduler_for_test, num_inference_steps)

    table = calibrate(model, SmoothCacheCalibration(alpha=0.5), sample, num_samples=2)
    expected = measured_by_hooks(model, lambda: sample(model, None, STEPS), STEPS, 3)
    got = schedules(table, sostenuto.inspect(model))
    for branch in ("attn1", "attn2", "ff"):
        rows = [
            np.mean([lags[lag] for site, lags in expected.items() if site.endswith(branch)], axis=0) for lag in range(3)
        ]
        line = strip(greedy_schedule(rows, 0.5))
        assert {schedule for site, schedule in got.items() if site.endswith(branch)} == {line}
    assert got["transformer_blocks.0.attn1"] != got["transformer_blocks.0.attn2"]
    proved = sostenuto.verify(
        model, SmoothCache(table), sample, scheduler=model.scheduler_for_test, num_inference_steps=STEPS
    )
    assert proved["sites"] == 9


def test_a_forecast_fills_the_gaps_of_site_maps_as_of_states(model):
    by_site = calibrate(model, SmoothCacheCalibration(alpha=0.6, group_by="site"))
    method = SmoothCache(by_site, forecast_order=1)
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        assert handle.stats.actions["forecast"] > 0
    sites = sostenuto.inspect(model)
    assert by_site.filled(1).filled(0).plan(sites) == by_site.plan(sites)


def test_the_published_schedules(model):
    attention_and_mlp = SmoothCache.dit_xl_2().table.strip()
    assert attention_and_mlp == "·BBB·BB·BB" + "·B" * 19 + "··"
    assert SmoothCache.dit_xl_2(alpha=0.08).table.strip() == "·BB·B·B" + "·" * 43
    # from the authors' files 30-N-3-threshold-0.35.json and 70-N-3-threshold-0.08.json
    assert SmoothCache.dit_xl_2(0.35, 30).table.strip() == "·BB·B·B·B·B·B·B·B·B·B·B·B·B···"
    assert SmoothCache.dit_xl_2(0.08, 70).table.strip() == "·BBB·BB·BB" + "·B" * 29 + "··"
    assert [SmoothCacheCalibration.dit_xl_2(steps).alpha for steps in (50, 30, 70)] == [0.18, 0.35, 0.08]
    anywhere = SmoothCache(replace(SmoothCache.dit_xl_2().table, model={}))
    with sostenuto.enable(model, anywhere, scheduler=DDIMScheduler()) as handle:
        sample_loop(model, handle._scheduler(), 50)
        assert handle.stats.actions["reuse"] == 26 * 6
    wrong_ones = (SmoothCache.dit_xl_2, 0.2), (SmoothCache.dit_xl_2, 0.18, 30), (SmoothCacheCalibration.dit_xl_2, 20)
    for preset, *arguments in wrong_ones:
        with pytest.raises(MethodError, match="published for"):
            preset(*arguments)


def test_the_noise_may_be_scaled_besides(model):
    table = calibrate(model)
    with sostenuto.enable(
        model, SmoothCache(table) | EpsilonScaling(1.01), scheduler=model.scheduler_for_test
    ) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        assert handle._noise_scale.computed[0] == pytest.approx(1 / 1.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": -0.1}, "alpha must be a number of 0 or more, not -0.1"),
        ({"alpha": float("nan")}, "alpha"),
        ({"max_lag": 0}, "max_lag must be a whole number of 1 or more, not 0"),
        ({"group_by": "block"}, "group_by must be 'type' or 'site'"),
        ({"target_fraction": 0}, "target_fraction must be"),
    ],
)
def test_options_without_meaning_are_refused(arguments, words):
    with pytest.raises(MethodError, match=words):
        SmoothCacheCalibration(**arguments)


def test_a_table_without_fitting_errors_is_refused(model):
    table = calibrate(model)
    with pytest.raises(TableError, match="holds no errors"):
        SmoothCache.from_errors(CacheTable((StepState.COMPUTE,) * STEPS))
    with pytest.raises(TableError, match="not those of 5 steps"):
        SmoothCache.from_errors(table.resample(5))
    site = "transformer_blocks.0.ff"
    damaged = {**table.calibration["errors"], site: [["x"] * 9]}
    with pytest.raises(TableError, match=site):
        SmoothCache.from_errors(replace(table, calibration={**table.calibration, "errors": damaged}))
    with pytest.raises(TableError, match="damaged"):
        SmoothCache.from_errors(replace(table, calibration={**table.calibration, "kinds": dict.fromkeys(damaged, 3)}))
    with pytest.raises(MethodError, match="up to lag 3, not 4"):
        SmoothCache.from_errors(table, max_lag=4)


def test_a_method_without_table_or_with_a_wrong_one_is_refused(model, scheduler):
    with pytest.raises(MethodError, match="no smoothcache table ships"):
        sostenuto.enable(model, "smoothcache", scheduler=scheduler)
    with pytest.raises(MethodError, match="SmoothCache's table"):
        SmoothCache(3)
    with pytest.raises(MethodError, match="EBCache's table"):
        EBCache(3)
    other = build_tiny(num_layers=2)
    with pytest.raises(TableError, match="calibrate one"):
        sostenuto.enable(other, SmoothCache(calibrate(model)), scheduler=scheduler)


def test_a_sample_that_ignores_the_steps_or_breaks_is_refused_and_the_model_is_free(model):
    with pytest.raises(MethodError, match="5 steps instead of 10"):
        calibrate(model, sample=lambda m, g, num_inference_steps: sample(m, g, 5))
    model.transformer_blocks[1].ff.net[2].bias.fill_(float("inf"))
    with pytest.raises(MethodError, match="is not finite"):
        calibrate(model)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def test_a_second_generation_after_an_interrupted_one_equals_a_fresh_one(model):
    table = SmoothCache.from_errors(calibrate(model), target_fraction=0.5).table
    scheduler = model.scheduler_for_test
    with sostenuto.enable(model, SmoothCache(table), scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, STEPS, seed=5)
    with sostenuto.enable(model, SmoothCache(table), scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, scheduler, STEPS, seed=1, stop_at=4)
        assert torch.equal(expected, sample_loop(model, scheduler, STEPS, seed=5)[0])


def test_on_the_command_line(tmp_path, capsys):
    table = str(tmp_path / "table.json")
    few = ["--method", "smoothcache", "--num-inference-steps", "6", "--labels", "1", "8"]
    assert main(["calibrate", *few, "--num-samples", "2", "--target-fraction", "0.7", "--output", table]) == 0
    assert abs(CacheTable.load(table).macs_fraction - 0.7) < 0.05
    picture, numbers = str(tmp_path / "g.png"), tmp_path / "g.json"
    assert main(["generate", *few, "--table", table, "--output", picture, "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["ideal_speedup"] > 1.3
    assert main(["calibrate", "--method", "fora"]) == 1
    assert "'fora' has no calibration" in capsys.readouterr().err
    assert main(["generate", "--method", "fora", "--table", table]) == 1
    assert "--table" in capsys.readouterr().err


def test_a_table_that_scales_the_noise_is_refused_with_what_runs_it(model):
    table = CacheTable((StepState.COMPUTE, StepState.REUSE_BOTH), eps_scale=(1.0, 0.98))
    with pytest.raises(MethodError, match=r"which SmoothCache does not: run it with EBCache\(table\)"):
        sostenuto.enable(model, SmoothCache(table), scheduler=model.scheduler_for_test)
