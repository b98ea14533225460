"""The instrumented run: an uncached one that measures what a real step of reuse does."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import sostenuto
import sostenuto.tuning.instrument as instrument_module
import sostenuto.tuning.lab as lab_module
from conftest import sample, sample_loop, sampler_of_lists
from sostenuto import CacheTable, EBCache, InputError, MethodError, compat
from sostenuto.calibrations.base import Settings, Tapped
from sostenuto.engine import attach
from sostenuto.step_state import StepState
from sostenuto.table import FILLS
from sostenuto.tuning.generate import generate
from sostenuto.tuning.instrument import Instrument
from sostenuto.tuning.lab import Lab
from sostenuto.tuning.measurement import NUDGES, Kind, Reach, reaches
from sostenuto.tuning.record import claim
from tunings import STEPS


def test_an_instrumented_run_is_the_uncached_one(model):
    wanted, _ = sample_loop(model, model.scheduler_for_test, STEPS)
    with attach(model, Tapped(FILLS), scheduler=model.scheduler_for_test) as handle:
        instrument = Instrument(handle, reaches(tuple(Kind), STEPS), STEPS)
        handle.driver = instrument
        made, _ = sample_loop(model, model.scheduler_for_test, STEPS)
    assert torch.equal(made, wanted)
    measured = instrument.result(2, 0.0)
    assert measured.macs["compute"] == 1.0
    assert 0 == measured.macs["sample"] < measured.macs["stack"] < measured.macs["mlp"] < 1


def test_the_measured_error_is_that_of_a_real_step_of_reuse(model):
    """Against a plan with one reuse: up to its step all is uncached, so its output differs by just the measured error."""
    _, fresh = sample_loop(model, model.scheduler_for_test, STEPS)
    with attach(model, Tapped(FILLS), scheduler=model.scheduler_for_test) as handle:
        instrument = handle.driver = Instrument(handle, reaches(tuple(Kind), STEPS), STEPS)
        sample_loop(model, model.scheduler_for_test, STEPS)
    measured = instrument.result(2, 0.0)
    c, b = StepState.COMPUTE, StepState.REUSE_BOTH
    for kind, fill in ((Kind.STACK, "stack"), (Kind.BRANCHES, "branches"), (Kind.SAMPLE, "sample")):
        plans = ((0, (c, c, b)), (1, (c, c, b)), (2, (c, c, c, b)))
        for order, actions in plans[: len(measured.reach[kind].gaps)]:
            step = len(actions) - 1
            table = CacheTable(actions + (c,) * (STEPS - step - 1), forecast_order=order, fill=fill)
            with sostenuto.enable(model, EBCache(table), scheduler=model.scheduler_for_test):
                _, outputs = sample_loop(model, model.scheduler_for_test, STEPS)
            error = (outputs[step] - fresh[step]).square().mean().item()
            at = measured.reach[kind].gap_index(order, 1)
            assert measured.runs[kind][order, at, step - 1, 0, 0] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("shapes", [[(8, 8), (8, 8)], [(8, 4), (8, 8)]], ids=["alike", "of two sizes"])
def test_of_latents_in_a_list_every_sample_counts(shapes):
    network, sample, scheduler = sampler_of_lists(*shapes)
    settings = Settings(network, sample, 4, 2, scheduler=scheduler)
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    instruments = []

    def measure(handle, tick, prober):
        if not instruments:
            instruments.append(Instrument(handle, reaches((Kind.BRANCHES,), 4), 4))
        output = instruments[0](tick, prober)
        seen.append((prober.call.latents, output.sample))
        return output

    def follow(handle, tick, prober):
        output = prober.follow()
        seen.append((prober.call.latents, output.sample))
        return output

    def mean_squares(samples):
        return [x.square().mean().item() for x in samples]

    run = generate(settings, 0, Tapped(("branches",)), measure)
    inputs, fresh = zip(*seen, strict=True)
    measured = instruments[0].result(run.rows, 0.0)
    assert len(run.latents[0]) == run.rows == 2
    assert run.latents[0].square().mean(1).tolist() == pytest.approx(mean_squares(inputs[-1]))
    for step, (x, output) in enumerate(zip(inputs, fresh, strict=True)):
        assert measured.power[step] == pytest.approx(np.mean(mean_squares(output)))
        kept = 1 - scheduler.sigmas[step]  # the network predicts x₀ − ε
        noise = [latents - kept * prediction for latents, prediction in zip(x, output, strict=True)]
        assert run.norms[step] == pytest.approx([np.mean(np.sqrt(mean_squares(noise)))])

    seen.clear()
    table = CacheTable((StepState.COMPUTE, StepState.COMPUTE, StepState.REUSE_BOTH, StepState.COMPUTE))
    generate(settings, 0, EBCache(table, eps_scale=1.0), follow)
    off = [reused - wanted for reused, wanted in zip(seen[2][1], fresh[2], strict=True)]
    assert measured.runs[Kind.BRANCHES][0, 0, 1, 0, 0] == pytest.approx(np.mean(mean_squares(off)), rel=1e-4)


def test_the_roughness_is_the_share_of_noise_in_the_error_of_reuse_one_step_later(model):
    """Features d·p + noise: reuse at lag l, also below 1, is off by d²l² + 2n²."""
    drift, noise = 1.0, 0.2
    with attach(model, Tapped(("stack",)), scheduler=model.scheduler_for_test) as handle:
        instrument = Instrument(handle, {Kind.STACK: Reach(1, ((0,),))}, STEPS)
    instrument._runs[Kind.STACK][...] = drift**2 + 2 * noise**2
    for place, lag in enumerate(NUDGES):
        instrument._nudge_errors[place, 1:] = drift**2 * lag**2 + 2 * noise**2
    roughness = instrument.result(2, 0.0).roughness
    assert np.isnan(roughness[0])
    np.testing.assert_allclose(
        roughness[1:], 2 * noise**2 / (drift**2 + 2 * noise**2)
    )  # 7 %, but 56 % at a quarter of a step


def test_a_pass_that_begins_late_is_measured_from_where_it_begins(model):
    """Guidance from the third step on, in calls of its own."""
    scheduler = model.scheduler_for_test

    @torch.no_grad()
    def guided_late(target, generator, num_inference_steps):
        latents = torch.randn(2, 2, 8, 8, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        for step, timestep in enumerate(scheduler.timesteps):
            noise = target(latents, timestep.expand(2), torch.tensor([1, 2])).sample
            if step >= 3:
                null = target(latents, timestep.expand(2), torch.tensor([10, 10])).sample
                noise = null + 2 * (noise - null)
            latents = scheduler.step(noise[:, :2], timestep, latents, generator=generator).prev_sample
        return latents

    settings = Settings(model, guided_late, STEPS, 4, None, None, None, scheduler)
    lab = Lab(settings, None, 2, lambda _: None)
    late = lab.measure((Kind.STACK,)).relative(Kind.STACK, 0, 0, 1)
    alone = replace(settings, sample=lambda *given, **named: guided_late(*given, **named))
    again = Lab(alone, None, 2, lambda _: None)
    assert (late[1:] > 0).all()
    assert again.response(Kind.STACK, 1, 3) > 0  # at the step where the second pass begins, which has nothing kept


def test_generations_count_alike_where_a_pass_begins_late(model):
    def measured(*seeds):
        with attach(model, Tapped(FILLS), scheduler=model.scheduler_for_test) as handle:
            instrument = handle.driver = Instrument(handle, reaches((Kind.BRANCHES,), STEPS), STEPS)
            for seed in seeds:
                sample_loop(model, model.scheduler_for_test, STEPS, seed, separate_guidance=range(STEPS // 2, STEPS))
        return instrument.result(2 * len(seeds), 0.0).runs[Kind.BRANCHES], instrument._nudge_errors

    each = [measured(seed) for seed in range(3)]
    for together, apart in zip(measured(0, 1, 2), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(together, np.mean(apart, axis=0), rtol=1e-6)


def test_only_what_may_be_reused_is_kept_while_measuring(model):
    kept = set()
    with attach(model, Tapped(("stack",)), scheduler=model.scheduler_for_test) as handle:
        instrument = Instrument(handle, reaches((Kind.STACK,), STEPS), STEPS)

        def driver(tick, prober):
            output = instrument(tick, prober)
            kept.update(handle.sites[i].id for i, slot in enumerate(prober.state.slots) if slot[0] is not None)
            return output

        handle.driver = driver
        sample_loop(model, model.scheduler_for_test, STEPS)
    assert kept == {"transformer_blocks.0-2"}


def measured_in(folder, model, calls):
    """The instrumented run of eight rows, two at a time; ``calls`` takes one note of each."""

    def noted(*given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*given, **named)

    settings = Settings(model, noted, STEPS, 8, None, None, None, model.scheduler_for_test)
    return Lab(settings, folder, 2, lambda _: None).measure(tuple(Kind))


def test_an_interrupted_run_goes_on_after_the_last_generation_that_was_done(model, tmp_path):
    whole = measured_in(None, model, [1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        measured_in(tmp_path, model, [])
    (begun,) = tmp_path.iterdir()
    calls = [1, 2, 3]
    again = measured_in(tmp_path, model, calls)
    assert len(calls) == 3 + 2  # of four
    assert again.num_samples == whole.num_samples == 8
    assert again.macs == whole.macs
    assert again.sites == whole.sites
    for name in ("power", "roughness"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    for kind in Kind:
        np.testing.assert_array_equal(again.runs[kind], whole.runs[kind])
    assert not begun.exists()


def test_a_damaged_file_of_a_begun_run_is_named(model, tmp_path):
    (tmp_path / "measuring-stack-sample-branches-attention-mlp.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match=r"measuring-stack.*delete it, or use another folder"):
        measured_in(tmp_path, model, [1, 2, 3])


def test_a_begun_run_of_another_setting_is_not_taken(model, tmp_path):
    claim(tmp_path, {"seed": 0})
    (tmp_path / "measuring-stack.pt").write_bytes(b"begun")
    with pytest.raises(InputError, match="another seed"):
        claim(tmp_path, {"seed": 1})


def test_a_part_of_the_measurement_is_what_it_is_within_the_whole():
    whole = reaches(tuple(Kind), STEPS)
    for kind in Kind:
        assert reaches((kind,), STEPS, tuple(Kind)) == {kind: whole[kind]}
    assert reaches((Kind.BRANCHES,), STEPS)[Kind.BRANCHES].num_slots > whole[Kind.BRANCHES].num_slots


def test_a_tried_reuse_that_overflows_is_left_out_and_the_rest_is_measured(model, monkeypatch):
    filled = instrument_module.filled_call

    def overflowing(prober, *which):
        output = filled(prober, *which)
        return compat.map_prediction(output, lambda values: values * math.inf) if prober.tick.step == 2 else output

    monkeypatch.setattr(instrument_module, "filled_call", overflowing)
    with attach(model, Tapped(("stack",)), scheduler=model.scheduler_for_test) as handle:
        instrument = handle.driver = Instrument(handle, reaches((Kind.STACK,), STEPS), STEPS)
        for _ in range(2):
            sample_loop(model, model.scheduler_for_test, STEPS)
    measured = instrument.result(4, 0.0)
    one_later = measured.runs[Kind.STACK][0, 0, :, 0, 0]  # by the step that was computed
    assert [bool(np.isfinite(error)) for error in one_later[:4]] == [True, False, True, True]
    assert 0 <= measured.noise_share <= 1


def test_latents_of_several_sizes_are_refused_with_a_reason(model):
    sizes = iter([8, 4])

    def varying(network, generator, num_inference_steps):
        size = next(sizes)
        return sample_loop(network, model.scheduler_for_test, num_inference_steps, size=size)

    with pytest.raises(MethodError, match="latents of several sizes"):
        generate(Settings(model, varying, 4, 4, scheduler=model.scheduler_for_test), 0, sostenuto.NoCache())


def test_a_step_at_which_nothing_can_be_reused_is_probed_beside(model, monkeypatch):
    lab = Lab(Settings(model, sample, STEPS, 4, scheduler=model.scheduler_for_test), None, 2, lambda _: None)
    perturbed, tried = lab_module._perturb_at, []

    def at(step, kind, order, caused):
        tried.append(step)
        return perturbed(step if step > 5 else 0, kind, order, caused)  # at the first step there is nothing to reuse

    monkeypatch.setattr(lab_module, "_perturb_at", at)
    assert lab.response(Kind.STACK, 0, 5) > 0
    assert tried == [5, 6]
    monkeypatch.setattr(lab_module, "_perturb_at", lambda step, *rest: perturbed(0, *rest))
    with pytest.raises(MethodError, match="nothing could be reused at the steps around 4"):
        lab.response(Kind.STACK, 0, 4)


def test_forecasts_are_timed_apart_from_last_values(model):
    times = measured_in(None, model, [1, 2, 3]).times
    assert {"compute", "stack", "stack 1", "stack 2", "branches 1", "sample 1", "attention 1", "mlp 1"} <= set(times)
    assert "mlp 2" not in times  # it isn't measured, and costs what its last value does
