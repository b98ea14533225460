"""TeaCache: its polynomial and accumulation by hand, what it computes against an independent forward, its calibration."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import block_oracle as oracle
import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import MethodError, TableError, TeaCache, TeaCacheCalibration, TeaCacheFit
from sostenuto.cli import main
from sostenuto.methods.base import Facts
from sostenuto.methods.teacache import polynomial
from sostenuto.seeds import noise_seed
from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.sampling import flow_sampler

NAN = float("nan")
BENT = (2.0, 1.0, 0.0)  # 2d² + d


@pytest.fixture
def two():
    return build_tiny(2)


def decisions(method, levels):
    """What the policy decides on signals that are constant, of these levels: d is their relative change."""
    policy = method.policy(Facts((), tuple(range(len(levels))), None, None))
    computed, skipped = [], []
    for step, level in enumerate(levels):
        signal = torch.full((1, 2, 3), float(level))
        skipped.append(policy.skips(step, len(levels), signal, tuple(computed)))
        if not skipped[-1]:
            computed.insert(0, step)
    assert policy.num_bytes == 6 * 4
    return "".join("s" if skip else "c" for skip in skipped)


@pytest.mark.parametrize(
    ("method", "levels", "expected"),
    [
        # d: –, .25, .2, .25, .2, .25; the sum of d from the last computed step on stays below .5 for two of them
        (TeaCache(threshold=0.5), (4, 5, 4, 5, 4, 5), "csscsc"),
        (TeaCache(threshold=0.5, last_steps=0), (4, 5, 4, 5, 4, 5), "csscss"),
        (TeaCache(threshold=0.5, first_steps=3), (4, 5, 4, 5, 4, 5), "cccssc"),
        (TeaCache(threshold=0), (4, 4, 4, 4), "cccc"),
        (TeaCache(threshold=9), (4, 1, 4, 1), "cssc"),
        # 2d² + d: .375 at .25, .28 at .2
        (TeaCache(BENT, 0.65), (4, 5, 4, 5, 4, 5), "cscscc"),
        (TeaCache(BENT, 0.66), (4, 5, 4, 5, 4, 5), "csscsc"),
        # a constant: the sum grows also when nothing changes
        (TeaCache((0.25,), 0.6), (1, 1, 1, 1, 1, 1, 1), "csscssc"),
        # d − .225: .025 and −.025; the negative ones lower the sum, or count as 0
        (TeaCache((1.0, -0.225), 0.04), (4, 5, 4, 5, 4, 5, 4), "csssssc"),
        (TeaCache((1.0, -0.225), 0.04, clamp_negative=True), (4, 5, 4, 5, 4, 5, 4), "csscssc"),
        # a change that can't be told is computed, whatever the polynomial makes of it
        (TeaCache((-1.0, 0.0), 9), (0, 1, 1, 1), "ccsc"),
        (TeaCache((-1.0, 0.0), 9), (1, NAN, 1, 1, 1), "cccsc"),
    ],
)
def test_a_step_is_skipped_until_the_estimated_changes_add_up(method, levels, expected):
    assert decisions(method, levels) == expected
    distances = [abs(b - a) / a if a else NAN for a, b in pairwise(levels)]
    assert "".join("s" if skip else "c" for skip in method.replay(distances)) == expected


def test_the_signal_is_compared_in_float32():
    policy = TeaCache((1.0, 0.0), 0.004, last_steps=0).policy(Facts((), (2.0, 1.0), None, None))
    signals = [torch.full((4096,), value, dtype=torch.bfloat16) for value in (256.0, 258.0)]
    assert not policy.skips(0, 2, signals[0], ())
    assert not policy.skips(1, 2, signals[1], (0,))  # 2/256 = 0.0078
    assert TeaCache((1.0, 0.0), 0.0079).replay([2 / 256, 0.0]) == [False, True, False]


def test_published_polynomials():
    presets = [
        TeaCache.flux_dev(), TeaCache.hunyuan_video(), TeaCache.cogvideox_5b(), TeaCache.cogvideox_2b(0.1),
        TeaCache.open_sora(), TeaCache.open_sora_plan(), TeaCache.latte(), TeaCache.mochi(), TeaCache.ltx_video(),
        TeaCache.hidream(0.1), TeaCache.lumina_2(0.1),
    ]  # fmt: skip
    assert len({preset.coefficients.coefficients for preset in presets}) == 11
    assert all(len(preset.coefficients.coefficients) == 5 for preset in presets)
    flux = TeaCache.flux_dev()
    assert flux.threshold == 0.25
    coefficients = flux.coefficients.coefficients
    assert polynomial(coefficients, 0.0) == 0.264230861  # not 0: the sum grows though nothing changes
    # by powers, not by Horner's rule
    by_powers = 498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861
    assert polynomial(coefficients, 0.1) == pytest.approx(by_powers, rel=1e-12)
    for same in (TeaCache.consisid(), TeaCache.lumina_t2x(0.1)):  # as of CogVideoX-5B and Lumina-2
        assert any(same.coefficients.coefficients == preset.coefficients.coefficients for preset in presets)


def teacache(coefficients, threshold, num_steps, log=None):
    def through(state, step, x, blocks, modulated):
        if "m" in state:
            d = ((modulated - state["m"]).abs().sum() / state["m"].abs().sum()).item()
            state["sum"] += float(np.polyval(coefficients, d))
            if log is not None:
                log.append(d)
        state["m"] = modulated
        if "r" in state and step < num_steps - 1 and state["sum"] < threshold:
            return x + state["r"]
        state["sum"], start = 0.0, x
        for block in blocks:
            x = block(x)
        state["r"] = x - start
        return x

    return through


@pytest.mark.parametrize("separate", [False, True])
def test_it_computes_what_the_independent_forward_computes(two, scheduler, separate):
    expected = oracle.oracle_loop(two, scheduler, teacache(BENT, 4.0, 10), 10, separate)
    with sostenuto.enable(two, TeaCache(BENT, 4.0), scheduler=scheduler) as handle:
        got, _ = sample_loop(two, scheduler, 10, separate_guidance=separate)
        assert {"c", "r"} == set(oracle.rows(handle))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "preset", "module"),
    [
        ("CogVideoXTransformer3DModel", TeaCache.cogvideox_5b(), "time_embedding"),
        ("ConsisIDTransformer3DModel", TeaCache.consisid(), "time_embedding"),
        ("HiDreamImageTransformer2DModel", TeaCache.hidream(0.17), "t_embedder"),
    ],
)
def test_where_the_polynomial_is_of_the_timesteps_embedding_that_is_watched(name, preset, module):
    network, sample, scheduler = flow_sampler(TINY_MODELS[name])
    made = []
    hook = network.get_submodule(module).register_forward_hook(lambda *_: made.append(_[-1].detach().float()))
    sample(network, torch.Generator().manual_seed(0), 12)
    hook.remove()
    distances = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(made)]
    method = TeaCache((1.0, 0.0), 2.5 * sorted(distances)[5], signal=preset.signal)
    with sostenuto.enable(network, method, scheduler=scheduler) as handle:
        sample(network, torch.Generator().manual_seed(0), 12)
        ran = ["s" if "reuse" in row else "c" for row in handle.stats.plan]
    assert ["s" if skip else "c" for skip in method.replay(distances)] == ran
    assert set(ran) == {"s", "c"}


def test_a_fit_remembers_what_it_was_made_on(two, scheduler, tmp_path):
    watched = TeaCacheCalibration(1, 0.5, TeaCache(signal="pos_embed"))
    fit = calibrate(two, scheduler, watched, num_samples=2)
    fit.save(tmp_path / "fit.json")
    for method, signal in ((TeaCache(tmp_path / "fit.json"), "pos_embed"), (TeaCache(), "modulated-input")):
        with sostenuto.enable(two, method, scheduler=scheduler) as handle:
            assert handle.method.signal == signal
    with pytest.raises(MethodError, match="has no such module: name one in front of its blocks"):
        sostenuto.enable(two, TeaCache(signal="nowhere"), scheduler=scheduler)
    with pytest.raises(MethodError, match="the path of a module, not 3"):
        TeaCache(signal=3)


def test_every_pass_decides_for_itself(two, scheduler):
    alone = []
    for label in (3, 10):
        with torch.no_grad(), sostenuto.enable(two, TeaCache(BENT, 3.0), scheduler=scheduler) as handle:
            scheduler.set_timesteps(10)
            for index, t in enumerate(scheduler.timesteps):
                two(latents_of(index), t[None], torch.tensor([label]))
            alone.append(oracle.rows(handle))
    with torch.no_grad(), sostenuto.enable(two, TeaCache(BENT, 3.0), scheduler=scheduler) as handle:
        scheduler.set_timesteps(10)
        together = {0: [], 1: []}
        for index, t in enumerate(scheduler.timesteps):
            for label in (3, 10):
                two(latents_of(index), t[None], torch.tensor([label]))
        for _, pass_index, _, carried in handle._record.calls:
            together[pass_index].append("r" if carried.ops[0].is_filled else "c")
    assert list(together.values()) == alone
    assert alone[0] != alone[1]


def latents_of(index):
    return torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(index // 2))


def test_counted_macs_hold_the_cost_of_the_signal(two, scheduler):
    stats = oracle.check_macs(two, scheduler, TeaCache(BENT, 4.0), 10, separate=True)
    assert stats.ideal_speedup > 1.2
    assert stats.cache_bytes_peak == 2 * 2 * (2 * 16 * 32 * 4)  # two passes, a residual and a signal each
    computed = oracle.check_macs(two, scheduler, TeaCache(threshold=0), 3)
    assert computed.macs > computed.macs_uncached  # the first norm ran twice


def test_promises_shared_by_all_methods(two, scheduler):
    oracle.check_identical_when_all_is_computed(two, scheduler, TeaCache(threshold=0))
    oracle.check_interruption_leaves_nothing(two, scheduler, TeaCache(threshold=1.0))
    oracle.check_refused_when_compiled(two, scheduler, TeaCache())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(coefficients=()), "coefficients"),
        (dict(coefficients=(1.0, NAN)), "entry 1 is nan"),
        (dict(coefficients=3), "numbers, a TeaCacheFit or its file, not 3"),
        (dict(threshold=-0.1), "threshold must be a finite number from 0, not -0.1"),
        (dict(threshold="a"), "threshold"),
        (dict(clamp_negative=1), "clamp_negative"),
        (dict(first_steps=0), "first_steps must be a whole number of 1 or more"),
        (dict(last_steps=-1), "last_steps"),
    ],
)
def test_parameters_without_meaning_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        TeaCache(**wrong)


# --- calibration ------------------------------------------------------------------------------------------------------


def sample_with(scheduler):
    def sample(model, generator, num_inference_steps):
        return sample_loop(
            model, scheduler, num_inference_steps, seed=int(torch.randint(99, (1,), generator=generator))
        )

    return sample


def calibrate(model, scheduler, calibration, steps=8, num_samples=4):
    return sostenuto.calibrate(
        model,
        calibration,
        sample_with(scheduler),
        num_inference_steps=steps,
        num_samples=num_samples,
        scheduler=scheduler,
    )


def test_the_series_are_those_of_uncached_runs_and_the_polynomial_is_their_least_squares(two, scheduler):
    fit = calibrate(two, scheduler, TeaCacheCalibration(degree=2, target_skipped=None))
    inputs, outputs = [], []
    for call in (0, noise_seed(0, 1)):  # two calls of two rows
        log = []
        seed = int(torch.randint(99, (1,), generator=torch.Generator().manual_seed(call)))
        oracle.oracle_loop(two, scheduler, teacache((1.0, 0.0), -1.0, 8, log), 8, seed=seed)
        inputs.append(log)
        predicted = sample_loop(two, scheduler, 8, seed=seed)[1]
        outputs.append([((b - a).abs().sum() / a.abs().sum()).item() for a, b in pairwise(predicted)])
    np.testing.assert_allclose(fit.calibration["modulated_input"], inputs, rtol=1e-4)
    np.testing.assert_allclose(fit.calibration["output"], outputs, rtol=1e-4)
    # Least squares: what is left over is orthogonal to every power.
    x, y = np.ravel(inputs), np.ravel(outputs)
    left = np.polyval(fit.coefficients, x) - y
    assert np.abs([(left * x**k).sum() for k in range(3)]).max() < 1e-3 * np.abs(y).sum()
    assert fit.threshold is None
    assert fit.calibration["num_samples"] == 4


def test_a_learned_variance_is_no_part_of_the_output(scheduler):
    model = build_tiny(1, out_channels=4)
    fit = calibrate(model, scheduler, TeaCacheCalibration(1, None), num_samples=1)
    seed = int(torch.randint(99, (1,), generator=torch.Generator().manual_seed(0)))
    noise = [output[:, :2] for output in sample_loop(model, scheduler, 8, seed=seed)[1]]
    changes = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in pairwise(noise)]
    np.testing.assert_allclose(fit.calibration["output"], [changes], rtol=1e-4)


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.75])
def test_the_threshold_skips_the_share_that_was_asked_for(two, scheduler, target):
    fit = calibrate(two, scheduler, TeaCacheCalibration(1, target), num_samples=2)
    assert fit.calibration["skipped"] == pytest.approx(target, abs=1 / 8)
    replayed = TeaCache(fit).replay(fit.calibration["modulated_input"][0])
    assert sum(replayed) / 8 == fit.calibration["skipped"]


def test_passes_of_unequal_length_bound_what_can_be_skipped_together():
    calibration = TeaCacheCalibration(1, 0.8)
    with pytest.raises(MethodError, match=r"0\.7 can be skipped at most"):
        calibration._choose((1.0, 0.0), [[0.1] * 19, [0.1] * 3], 0.8)


def test_more_than_can_be_skipped_is_refused(two, scheduler):
    with pytest.raises(MethodError, match=r"of 8 steps 0\.75 can be skipped at most"):
        calibrate(two, scheduler, TeaCacheCalibration(1, 0.8))
    with pytest.raises(MethodError, match="degree 4 needs 5 changes"):
        calibrate(two, scheduler, TeaCacheCalibration(4), steps=4, num_samples=1)
    with pytest.raises(MethodError, match="2 steps instead of 4"):
        sostenuto.calibrate(
            two, "teacache", lambda m, g, num_inference_steps: sample_loop(m, scheduler, 2), num_inference_steps=4,
            scheduler=scheduler,
        )  # fmt: skip
    sostenuto.enable(two, "teacache", scheduler=scheduler).disable()


def test_a_saved_fit_loads_equal_and_is_refused_elsewhere(two, scheduler, tmp_path):
    path = tmp_path / "fit.json"
    fit = calibrate(two, scheduler, TeaCacheCalibration(2, 0.5))
    fit.save(path)
    assert TeaCacheFit.load(path) == fit
    assert TeaCacheFit(list(fit.coefficients), fit.threshold).coefficients == fit.coefficients
    with sostenuto.enable(two, TeaCache(path), scheduler=scheduler) as handle:
        sample_loop(two, scheduler, 8)
        assert handle.stats.actions["reuse"] > 0
        with pytest.raises(TableError, match=r"TeaCache polynomial was made for 8 steps, the sampler runs 6"):
            sample_loop(two, scheduler, 6)
    with pytest.raises(TableError, match=r"TeaCache polynomial was made for DiTTransformer2DModel"):
        sostenuto.enable(build_tiny(1), TeaCache(path), scheduler=scheduler)
    with pytest.raises(TableError, match="made with DDPMScheduler, this is DDIMScheduler"):
        sostenuto.enable(two, TeaCache(fit), scheduler=DDIMScheduler())
    # Coefficients without where they come from fit anything.
    with sostenuto.enable(two, TeaCache(fit.coefficients, 0.5), scheduler=scheduler):
        sample_loop(two, scheduler, 6)


GOOD = TeaCacheFit((1.0, 0.5), 0.1, model={"class": "X", "fingerprint": "ab"}, calibration={"seed": 0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "sostenuto-cache-table"}, "format"),
        ({"version": 2}, "version 2"),
        ({"order": "timestep_index"}, "order 'timestep_index'"),
        ({"coefficients": []}, "coefficients"),
        ({"coefficients": [1, None]}, "entry 1 is None"),
        ({"coefficients": [NAN]}, "NaN is no finite number"),
        ({"threshold": -1}, "threshold"),
        ({"threshold": "0.1"}, "threshold"),
        ({"model": []}, "model"),
        ({"model": {"fingerprint": 3}}, "fingerprint"),
        ({"scheduler": {"timesteps": [1, None]}}, "timesteps"),
        ({"extra": 1}, "'extra' is unknown"),
    ],
)
def test_a_malformed_file_is_refused_with_the_field_and_value(tmp_path, change, words):
    path = tmp_path / "fit.json"
    GOOD.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TableError, match=words) as caught:
        TeaCacheFit.load(path)
    assert "fit.json" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    GOOD.save(tmp_path / "fit.json")
    text = (tmp_path / "fit.json").read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    for name in ("cut.json", "missing.json"):
        with pytest.raises(TableError, match="can't be read as a TeaCache polynomial"):
            TeaCacheFit.load(tmp_path / name)
    without = json.loads(text)
    del without["threshold"]
    (tmp_path / "without.json").write_text(json.dumps(without))
    with pytest.raises(TableError, match="'threshold' is missing"):
        TeaCacheFit.load(tmp_path / "without.json")


@pytest.mark.parametrize("wrong", [dict(degree=-1), dict(target_skipped=1.5), dict(policy=3)])
def test_calibration_options_without_meaning_are_refused(wrong):
    with pytest.raises(MethodError, match=next(iter(wrong))):
        TeaCacheCalibration(**wrong)


def test_the_command_line_calibrates_and_generates_with_the_file(tmp_path, capsys):
    path, numbers = tmp_path / "fit.json", tmp_path / "n.json"
    few = ["--method", "teacache", "--num-inference-steps", "8", "--labels", "1"]
    options = ["--target-fraction", "0.5", "--num-samples", "1", "--output", str(path), "--json", str(numbers)]
    assert main(["calibrate", *few, *options]) == 0
    assert json.loads(numbers.read_text()) == {"coefficients": [*TeaCacheFit.load(path).coefficients],
                                               "threshold": TeaCacheFit.load(path).threshold}  # fmt: skip
    stats = ["--no-compare", "--output", str(tmp_path / "g.png"), "--json", str(numbers)]
    assert main(["generate", *few, "--table", str(path), *stats]) == 0
    assert json.loads(numbers.read_text())["actions"]["reuse"] > 0
    assert main(["generate", "--method", "fora", "--table", str(path)]) == 1
    assert "fora takes no table" in capsys.readouterr().err
