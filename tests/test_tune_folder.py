"""The folder of a tuning: what was found there is taken once more, and never for what it is not."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

import sostenuto
from conftest import sample
from sostenuto import CacheTable, EBCache, InputError, tune
from sostenuto.calibrations import base as settings_of
from sostenuto.calibrations.base import Settings, Tapped
from sostenuto.calibrations.claims import same
from sostenuto.tuning import instrumented
from sostenuto.tuning.lab import Lab, key_of
from sostenuto.tuning.measurement import Kind, Measurement
from sostenuto.tuning.record import claim, rehearsed
from sostenuto.tuning.rehearsal import rehearse
from tunings import QUICK, STEPS, norm, speedup_of, tuned


def test_an_interrupted_tuning_goes_on_and_ends_the_same(model, tmp_path, monkeypatch):
    whole = tuned(model, folder=tmp_path / "whole")
    tried = Lab.trial
    left = [3]

    def failing(self, table):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return tried(self, table)

    monkeypatch.setattr(Lab, "trial", failing)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, folder=tmp_path / "cut")
    monkeypatch.setattr(Lab, "trial", tried)
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()  # nothing is left attached
    calls = []
    again = tuned(model, folder=tmp_path / "cut")
    assert [p.table.actions for p in again.frontier] == [p.table.actions for p in whole.frontier]
    assert [p.error for p in again.frontier] == [p.error for p in whole.frontier]

    def counting(pipe, generator, num_inference_steps):
        calls.append(1)
        return sample(pipe, generator, num_inference_steps)

    third = tune(
        model,
        counting,
        num_inference_steps=STEPS,
        num_samples=8,
        scheduler=model.scheduler_for_test,
        folder=tmp_path / "cut",
        options=QUICK,
    )
    assert len(calls) == 1  # the rehearsal: all else was found already
    assert [p.error for p in third.frontier] == [p.error for p in whole.frontier]
    assert third.work <= again.work


def test_what_is_saved_loads_and_runs(model, begun):
    found = tuned(model, folder=begun)
    content = json.loads((begun / "frontier.json").read_text())
    assert [row["ideal_speedup"] for row in content["frontier"]] == [p.ideal_speedup for p in found.frontier]
    assert set(found.answers) == {1.3, 2.0}
    for target, point in found.answers.items():
        table = CacheTable.load(begun / f"tuned-{target:g}x.json")
        assert table == point.table
        assert speedup_of(model, EBCache(table)) == pytest.approx(point.ideal_speedup)
        assert point.ideal_speedup >= target


def test_a_folder_of_another_tuning_is_refused(model, begun):
    tuned(model, folder=begun)
    with pytest.raises(InputError, match="another seed"):
        tuned(model, folder=begun, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.proj_out_2.weight.mul_(2)
    with pytest.raises(InputError, match="another weights"):
        tuned(model, folder=begun)


def guided(scale, labels=0, batch=2):
    """A sample with a guidance scale, which the network doesn't see."""

    @torch.no_grad()
    def sample(model, generator, num_inference_steps):
        scheduler = model.scheduler_for_test
        latents = torch.randn(batch, 2, 8, 8, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        both = torch.tensor([labels] * batch + [10] * batch)
        for timestep in scheduler.timesteps:
            given = torch.cat([latents, latents])
            wanted, plain = model(given, timestep.expand(2 * batch), both).sample[:, :2].chunk(2)
            latents = scheduler.step(
                plain + scale * (wanted - plain), timestep, latents, generator=generator
            ).prev_sample
        return latents

    return sample


def sketch_of(model, sample):
    settings = Settings(model, sample, STEPS, 1, scheduler=model.scheduler_for_test)
    return rehearse(settings, 0, Tapped(("stack",)), (Kind.STACK,)).sketch


def test_a_rehearsal_knows_a_sample_again_and_hardly_runs_the_network(model):
    calls = []
    model.proj_out_2.register_forward_hook(lambda *_: calls.append(1))
    known = sketch_of(model, guided(4.0))
    assert len(calls) <= 3  # one call, and the counting on tensors without data
    assert same(known, sketch_of(model, guided(4.0)))
    for other in (
        guided(4.2),
        guided(4.0, labels=3),
        guided(4.0, batch=3),
        lambda m, g, num_inference_steps: sample(m, g, STEPS),
    ):
        assert not same(known, sketch_of(model, other))
    with torch.no_grad():  # far more than another precision does
        for parameter in model.parameters():
            parameter.mul_(1.2)
    assert same(known, sketch_of(model, guided(4.0)))


def test_numbers_of_another_setting_are_not_taken(model, begun):
    more = {"batch": 4}
    with pytest.raises(InputError, match=r"another sample: its sizes.*another folder.*generator"):
        tune(
            model,
            lambda m, g, num_inference_steps: sample(m, g, num_inference_steps, **more),
            num_inference_steps=STEPS,
            num_samples=8,
            scheduler=model.scheduler_for_test,
            folder=begun,
            options=QUICK,
        )
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"another dtype \(float32, now float32, autocast to bfloat16 on cpu\)"),
    ):
        tuned(model, folder=begun)


def test_a_folder_takes_a_score_and_then_no_other(model, tmp_path):
    def record(score, batch=2, scale=1.0):
        settings = Settings(
            model, guided(1.0), STEPS, 8, None, score, guided(scale, batch=batch), model.scheduler_for_test
        )
        lab = Lab(settings, None, 2, lambda _: None)
        lab.rehearse((Kind.STACK,))
        return rehearsed(settings, lab.rehearsals["paired"], lab.rehearsals.get("scored"))

    claim(tmp_path, {"seed": 0})
    for score in (None, norm, norm, None):
        claim(tmp_path, record(score), begun=True)

    def other_norm(images):
        return 1.1 * images.norm().item()

    other_norm.__module__, other_norm.__qualname__ = norm.__module__, norm.__qualname__
    with pytest.raises(InputError, match=r"another score of noise \(([\d.]+), now ([\d.]+)\)"):
        claim(tmp_path, record(other_norm), begun=True)
    with pytest.raises(InputError, match=r"another score \(.*norm, now .*speedup_of\)"):
        claim(tmp_path, record(speedup_of), begun=True)
    with pytest.raises(InputError, match=r"another scored rows \(4, now 12\)"):
        claim(tmp_path, record(norm, batch=6), begun=True)
    with pytest.raises(InputError, match="another score_sample"):
        claim(tmp_path, record(norm, scale=2.0), begun=True)
    claim(tmp_path, {"seed": 1})  # of a call that was refused before it found anything
    (tmp_path / "trials.json").write_text("{}")
    with pytest.raises(InputError, match=r"another dtype \(None, now float32\)"):
        claim(tmp_path, {"dtype": "float32"})  # as of a folder from before it was noted
    with pytest.raises(InputError, match=r"another seed \(1, now 2\)"):
        claim(tmp_path, {"seed": 2})


def test_times_of_another_machine_are_none(model, begun, monkeypatch):
    """A plan by multiply-accumulates goes on there; times are not compared across machines, and none decide."""
    by_time = replace(QUICK, budget="time", speedups=(1.3,), refinements=0)
    tuned(model, by_time, speedup=1.3, folder=begun)
    monkeypatch.setattr(settings_of, "where", lambda device: "another")
    with pytest.raises(InputError, match=r"another machine \(.*, now another\)"):
        tuned(model, by_time, speedup=1.3, folder=begun)
    found = tuned(model, replace(QUICK, refinements=3), folder=begun)
    trials = json.loads((begun / "trials.json").read_text())
    assert {trial["machine"] for trial in trials.values()} >= {"another"}
    for point in found.frontier:
        trial = trials[f"paired {key_of(point.table)}"]
        assert (point.measured_speedup is None) == (trial["machine"] == "another")
    with pytest.raises(InputError, match="another machine"):  # the folder's times are still the first one's
        tuned(model, by_time, speedup=1.3, folder=begun)


def test_an_instrumented_run_knows_where_it_was_timed(model, tmp_path, monkeypatch):
    """By multiply-accumulates another machine may begin a folder, or go on with it; its times are not this one's."""
    settings = Settings(model, sample, STEPS, 4, scheduler=model.scheduler_for_test)
    monkeypatch.setattr(settings_of, "where", lambda device: "another")
    calls: list[int] = []

    def stopped(model, generator, num_inference_steps):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(model, generator, num_inference_steps)

    with pytest.raises(KeyboardInterrupt):
        instrumented.instrumented_run(replace(settings, sample=stopped), tmp_path, (Kind.STACK,), (Kind.STACK,), print)
    elsewhere = instrumented.instrumented_run(settings, None, (Kind.STACK,), (Kind.STACK,), print)
    assert elsewhere.machine == "another"
    monkeypatch.setattr(settings_of, "where", lambda device: "this one")
    assert instrumented.instrumented_run(settings, None, (Kind.STACK,), (Kind.STACK,), print).machine == "this one"
    mixed = instrumented.instrumented_run(settings, tmp_path, (Kind.STACK,), (Kind.STACK,), print)
    mixed.save(tmp_path / "measurement.npz")
    assert Measurement.load(tmp_path / "measurement.npz").machine == "several machines"
    monkeypatch.setattr(Lab, "measure", lambda *_, **__: mixed)
    with pytest.raises(InputError, match=r"times of another machine \(several machines, this is "):
        tuned(model, replace(QUICK, budget="time", speedups=(1.3,)), speedup=1.3)


def test_folders_from_before_machines_were_noted_go_on(model, tmp_path):
    tuned(model, folder=tmp_path)
    for name in ("run.json", "trials.json"):
        content = json.loads((tmp_path / name).read_text())
        for entry in (content, *content.values()) if name == "trials.json" else (content,):
            entry.pop("machine", None)
        (tmp_path / name).write_text(json.dumps(content))
    assert tuned(model, folder=tmp_path).point.measured_speedup is not None


def test_what_was_found_is_not_taken_without_its_record(tmp_path):
    claim(tmp_path, {"seed": 0})
    (tmp_path / "trials.json").write_text("{}")
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match=r"without its record run\.json: delete it"):
        claim(tmp_path, {"seed": 0})


def test_a_solver_made_anew_from_its_configuration_goes_on_in_the_folder(model, begun):
    """diffusers notes which values are defaults, in an order that is another in every process."""
    config = dict(model.scheduler_for_test.config)
    model.scheduler_for_test = DDPMScheduler.from_config(config)
    model.scheduler_for_test.register_to_config(_use_default_values=["trained_betas"])
    assert tuned(model, folder=begun).frontier
