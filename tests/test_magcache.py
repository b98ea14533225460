"""MagCache: its plan by hand, what it computes against an independent forward, its calibration against plain hooks."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import block_oracle as oracle
import sostenuto
from conftest import build_tiny, sample, sample_loop
from sostenuto import MagCache, MagCacheCalibration, MagCacheRatios, MethodError, TableError
from sostenuto.cli import main
from sostenuto.methods.base import Facts
from sostenuto.methods.magcache import nearest_indices
from sostenuto.seeds import noise_seed

NAN = float("nan")


@pytest.fixture
def two():
    return build_tiny(2)


def plan_of(method, num_steps):
    model = build_tiny(1)
    facts = Facts(method.sites(model), tuple(range(num_steps, 0, -1)), model, None)
    return "".join(row[0].value[0] for row in method.plan(facts).actions)


TABLE = (1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.0, 1.0)
# From step 1 on, products: 1.1, .99, 1.188, 1.188; deviations: .1, .01, .188, .188; sums: .1, .11, .298, .486


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(threshold=0.09), "ccccrcrr"),  # 1: .1 no; 2: .1 no; 3: .2 no; 4: 0; 5: .2 no; 6, 7: 0
        (dict(threshold=0.12), "crrcrcrr"),  # 1, 2: .11; 3: .298 no; 4: 0; 5: .2 no; 6, 7: 0
        (dict(threshold=0.3), "crrrcrcr"),  # 1, 2, 3: .298; 4: .486 no; 5: .2; 6: .4 no; 7: 0
        (dict(threshold=9.0), "crrrrrrr"),
        (dict(threshold=9.0, max_consecutive=3), "crrrcrrr"),
        (dict(threshold=9.0, max_consecutive=0), "cccccccc"),
        (dict(threshold=9.0, retention=0.4), "cccrrrrr"),  # 3.2 → 3
        (dict(threshold=9.0, retention=0.45), "ccccrrrr"),  # 3.6 → 4
        (dict(threshold=9.0, retention=1.0), "cccccccc"),
        (dict(threshold=9.0, always_computed=(2, 5)), "crcrrcrr"),
        (dict(threshold=0.0), "ccccrcrr"),
    ],
)
def test_steps_are_skipped_while_the_product_stays_near_1(options, expected):
    assert plan_of(MagCache(TABLE, **{"max_consecutive": 99, "retention": 0.0, **options}), 8) == expected


def test_a_table_of_another_length_is_read_at_the_nearest_index():
    assert nearest_indices(5, 9) == [0, 0, 1, 2, 2, 2, 3, 4, 4]  # 0, .5, 1, 1.5, … with halves to even
    assert nearest_indices(28, 50)[-1] == 27
    assert nearest_indices(8, 1) == [0]
    # Three of five: 1.0, 1.5, 1.0
    assert plan_of(MagCache((1.0, 9.0, 1.5, 9.0, 1.0), 0.2, 99, 0.0), 3) == "ccr"


def test_the_published_table_and_settings():
    flux = MagCache.flux_dev()
    assert (flux.threshold, flux.max_consecutive, flux.retention, flux.always_computed) == (0.24, 5, 0.1, (11,))
    ratios = flux.ratios.ratios
    assert len(ratios) == 28
    assert (ratios[0], ratios[1], ratios[12], ratios[27]) == (1.0, 1.21094, 1.01562, 0.89062)
    # 3 kept. 3: .07812; 4: 1.14550 → .22362; 5: 1.19025 → .41387 computed.
    # 6: .03125; 7: 1.07153 → .10278; 8: 1.09665 → .19943; 9: 1.13092 → .33035 computed.
    # 10: .02344; 11 never skipped. 12: .01562; 13: 1.02355 → .03917; 14 → .06272; 15: 1.03155 → .09427;
    # 16 → .12582; 17 would be the sixth in a row. 18, 19: 0; 20: .00391; 21: .99220 → .01171; 22: .97284 → .03887; 23: sixth.
    # 24: .03516; 25: .92335 → .11181; 26: .86204 → .24977 computed. 27: .10938.
    assert plan_of(flux, 28) == "cccrrcrrrcrcrrrrrcrrrrrcrrcr"
    assert MagCache.hunyuan_video(TABLE) == MagCache(TABLE, 0.24, 6, 0.2)
    assert MagCache.wan_1_3b(TABLE) == MagCache(TABLE, 0.12, 4, 0.2)
    assert MagCache.wan_14b(TABLE) == MagCache(TABLE, 0.24, 6, 0.2)
    assert MagCache.qwen_image(TABLE) == MagCache(TABLE, 0.06, 2, 0.2)
    ratios = [1.0, 1.3, 0.8, 1.02, 1.01] * 6  # diffusers' defaults
    assert MagCache().skipped(ratios, 30) == MagCache(None, 0.06, 3, 0.2).skipped(ratios, 30)


@pytest.mark.parametrize("separate", [False, True])
def test_it_computes_what_the_independent_forward_computes(two, scheduler, separate):
    method = MagCache(TABLE, 0.3, 99, 0.0)
    skipped = [letter == "r" for letter in plan_of(method, 8)]

    def through(state, step, x, blocks, modulated):
        if skipped[step]:
            return x + state["r"]
        start = x
        for block in blocks:
            x = block(x)
        state["r"] = x - start
        return x

    expected = oracle.oracle_loop(two, scheduler, through, 8, separate)
    with sostenuto.enable(two, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(two, scheduler, 8, separate_guidance=separate)
        assert oracle.rows(handle) == list(plan_of(method, 8))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_promises_shared_by_all_methods(two, scheduler):
    method = MagCache(TABLE, 0.3, 99, 0.0)
    oracle.check_identical_when_all_is_computed(two, scheduler, MagCache(TABLE, retention=1.0))
    oracle.check_interruption_leaves_nothing(two, scheduler, method)
    stats = oracle.check_macs(two, scheduler, method, 8, separate=True)
    assert stats.cache_bytes_peak == 2 * (2 * 16 * 32 * 4)
    assert stats.ideal_speedup > 1.5


def test_it_compiles_without_a_break(scheduler):
    oracle.check_compiles(build_tiny(1), scheduler, MagCache(TABLE, 0.3, 99, 0.0), 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(ratios=()), "ratios must be one or more numbers"),
        (dict(ratios=(1.0, 0.0)), "above 0, but the one of step 1 is 0"),
        (dict(ratios=(1.0, NAN)), "entry 1 is nan"),
        (dict(ratios=3), "numbers, a MagCacheRatios or its file, not 3"),
        (dict(threshold=-1), "threshold must be a finite number from 0, not -1"),
        (dict(max_consecutive=-1), "max_consecutive"),
        (dict(retention=1.1), "retention must be a finite number from 0 to 1"),
        (dict(always_computed=(-1,)), "always_computed"),
        (dict(always_computed=11), "always_computed lists indices, not 11"),
    ],
)
def test_parameters_without_meaning_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        MagCache(**wrong)


def test_a_step_beyond_the_ratios_is_refused(two, scheduler):
    with pytest.raises(MethodError, match="always_computed names entry 8, but there are 8 ratios"):
        sostenuto.enable(two, MagCache(TABLE, always_computed=(7, 8)), scheduler=scheduler)


def test_without_ratios_it_is_refused_with_the_remedy(two, scheduler):
    with pytest.raises(MethodError, match=r"sostenuto\.calibrate"):
        sostenuto.enable(two, "magcache", scheduler=scheduler)


# --- calibration ------------------------------------------------------------------------------------------------------


def sample_with(scheduler, separate=False):
    def sample(model, generator, num_inference_steps):
        seed = int(torch.randint(99, (1,), generator=generator))
        return sample_loop(model, scheduler, num_inference_steps, seed=seed, separate_guidance=separate)

    return sample


def calibrate(model, scheduler, separate=False, num_samples=4):
    return sostenuto.calibrate(
        model, MagCacheCalibration(), sample_with(scheduler, separate), num_inference_steps=6, num_samples=num_samples,
        scheduler=scheduler,
    )  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
def test_ratios_are_those_that_plain_hooks_see(two, scheduler, separate):
    found = calibrate(two, scheduler, separate)
    passes = 1 + separate
    entry, residuals = [], []
    hooks = [
        two.transformer_blocks[0].register_forward_pre_hook(lambda _, args: entry.append(args[0])),
        two.transformer_blocks[1].register_forward_hook(lambda _, args, out: residuals.append(out - entry[-1])),
    ]
    ratios = []
    for seed in (0, noise_seed(0, 1)):
        residuals.clear()
        sample_with(scheduler, separate)(two, torch.Generator().manual_seed(seed), 6)
        for which in range(passes):
            sizes = [r.square().sum(-1).sqrt() for r in residuals[which::passes]]
            ratios.append([1.0] + [(sizes[p] / sizes[p - 1]).mean().item() for p in range(1, 6)])
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(found.ratios, np.mean(ratios, axis=0), rtol=1e-4)
    assert found.calibration == {"num_samples": 4, "seed": 0}
    assert found.model["num_blocks"] == 2


def test_saved_ratios_load_equal_and_are_refused_elsewhere(two, scheduler, tmp_path):
    path = tmp_path / "ratios.json"
    found = calibrate(two, scheduler, num_samples=1)
    found.save(path)
    assert MagCacheRatios.load(path) == found
    for ratios in (found, path, str(path)):
        with sostenuto.enable(two, MagCache(ratios, 9.0), scheduler=scheduler) as handle:
            sample_loop(two, scheduler, 12)  # another number of steps: resampled
            assert "".join(oracle.rows(handle)) == "ccrrrcrrrcrr"
    with pytest.raises(TableError, match=r"ratio table was made for DiTTransformer2DModel"):
        sostenuto.enable(build_tiny(1), MagCache(path), scheduler=scheduler)
    with pytest.raises(TableError, match="made with DDPMScheduler, this is DDIMScheduler"):
        sostenuto.enable(two, MagCache(path), scheduler=DDIMScheduler())
    content = json.loads(path.read_text())
    for change, words in (({"ratios": [1, -1]}, "step 1 is -1"), ({"format": "sostenuto-teacache"}, "format")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(TableError, match=words):
            MagCacheRatios.load(path)


def test_a_model_whose_blocks_add_nothing_is_refused(two, scheduler):
    for block in two.transformer_blocks:
        block.norm1.linear.weight.zero_()
        block.norm1.linear.bias.zero_()
    with pytest.raises(MethodError, match="nothing to go by"):
        calibrate(two, scheduler, num_samples=1)


def test_the_command_line_calibrates_and_generates_with_the_file(tmp_path, capsys):
    path, numbers = str(tmp_path / "ratios.json"), tmp_path / "n.json"
    few = ["--method", "magcache", "--num-inference-steps", "6", "--labels", "1"]
    assert main(["calibrate", *few, "--num-samples", "1", "--output", path]) == 0
    assert "ratios = (1.0" in capsys.readouterr().out
    stats = ["--no-compare", "--output", str(tmp_path / "g.png"), "--json", str(numbers)]
    assert main(["generate", *few, "--table", path, *stats]) == 0
    assert json.loads(numbers.read_text())["num_steps"] == 6


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_a_cost_chooses_threshold_and_the_fewest_skips_in_a_row(model, fraction):
    steps = 20
    measured = sostenuto.calibrate(
        model,
        MagCacheCalibration.at_cost(fraction),
        sample,
        num_inference_steps=steps,
        num_samples=2,
        scheduler=model.scheduler_for_test,
    )
    chosen = measured.calibration
    with sostenuto.enable(model, MagCache(measured), scheduler=model.scheduler_for_test) as handle:
        sample(model, torch.Generator().manual_seed(0), steps)
        ran = sum(row == ["reuse"] for row in handle.stats.plan) / steps
    assert ran == pytest.approx(chosen["skipped"])
    assert abs(ran - (1 - fraction)) <= 0.1
    fewer = MagCache(measured.ratios, 1e9, chosen["max_consecutive"] - 1)
    assert sum(fewer.skipped(measured.ratios, steps)) / steps < 1 - fraction
    with pytest.raises(MethodError, match="no cost to choose"):
        sostenuto.EpsilonScalingCalibration.at_cost(0.5)


def test_a_cost_below_what_can_be_skipped_is_refused(model):
    with pytest.raises(MethodError, match="can be skipped at most"):
        sostenuto.calibrate(
            model,
            MagCacheCalibration(0.9),
            sample,
            num_inference_steps=10,
            num_samples=2,
            scheduler=model.scheduler_for_test,
        )


def test_the_users_own_bounds_come_before_the_calibrations(scheduler):
    measured = MagCacheRatios(TABLE, calibration={"threshold": 0.5, "max_consecutive": 7, "retention": 0.0})
    assert MagCache(measured).prepare(build_tiny(1), scheduler).threshold == 0.5
    mine = MagCache(measured, threshold=0.1, max_consecutive=1).prepare(build_tiny(1), scheduler)
    assert (mine.threshold, mine.max_consecutive, mine.retention) == (0.1, 1, 0.0)
    wrong = MagCacheRatios(TABLE, calibration={"threshold": "a"})
    with pytest.raises(MethodError, match="threshold"):
        MagCache(wrong).prepare(build_tiny(1), scheduler)
