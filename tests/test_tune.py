import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, PNDMScheduler

import sostenuto
from conftest import build_tiny, calm, quantised, sample, sample_loop
from sostenuto import CacheTable, EBCache, InputError, MethodError, TuneOptions, tune
from sostenuto.calibrations.base import Settings, Tapped
from sostenuto.engine import Handle
from sostenuto.table import StepState
from sostenuto.tuning.choice import merit
from sostenuto.tuning.lab import Lab, Trial, key_of
from sostenuto.tuning.measurement import Kind, instrumented_share, reaches
from sostenuto.tuning.published import calibrated, calibrations, work_of
from sostenuto.tuning.record import claim, rehearsed
from sostenuto.tuning.rehearsal import rehearse, same

STEPS = 10
QUICK = TuneOptions(speedups=(1.3, 2.0), trial_samples=2, refinements=1, tilts=(0.0,), kinds=("stack",), published=())


@pytest.fixture(scope="session")
def measured_before(tmp_path_factory):
    """The folder of a tuning: what it measured serves the tests that look at what comes after."""
    folder = tmp_path_factory.mktemp("measured")
    model = build_tiny()
    model.scheduler_for_test = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    tuned(model, folder=folder)
    return folder


@pytest.fixture
def begun(measured_before, tmp_path):
    """A folder in which the measurements are done."""
    return shutil.copytree(measured_before, tmp_path / "begun")


def tuned(model, options=QUICK, **kwargs):
    given = dict(num_inference_steps=STEPS, speedup=2.0, num_samples=8, scheduler=model.scheduler_for_test)
    return tune(model, sample, options=options, **(given | kwargs))


def speedup_of(model, method):
    with sostenuto.enable(model, method, scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, STEPS)
        return handle.stats.ideal_speedup


def error_of(model, table, seed=7):
    wanted, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=seed)
    with sostenuto.enable(model, EBCache(table, eps_scale=1.0), scheduler=model.scheduler_for_test):
        made, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=seed)
    return (made - wanted).square().mean().item()


@pytest.fixture(scope="module")
def whole():
    """One tuning with every kind of reuse."""
    torch.set_num_threads(1)
    model = build_tiny()
    model.scheduler_for_test = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    published = ("smoothcache", "smoothcache-site")
    options = TuneOptions(
        speedups=(1.3, 1.6, 2.5), trial_samples=2, refinements=1, tilts=(0.0, 2.0), published=published
    )
    return model, tuned(model, options)


def test_every_point_has_the_speed_that_the_engine_counts(whole):
    model, found = whole
    assert found.frontier
    for point in found.frontier:
        assert point.ideal_speedup == pytest.approx(speedup_of(model, point.method), rel=1e-6)
        assert point.ideal_speedup == pytest.approx(1 / point.table.macs_fraction)


def test_every_point_keeps_its_budget_and_the_answer_is_the_one_asked_for(whole):
    _, found = whole
    assert all(point.speedup >= point.target * (1 - 1e-9) for point in found.frontier)
    assert found.point.speedup >= 2.0
    assert found.method == found.point.method


def test_the_frontier_is_one(whole):
    _, found = whole
    speeds, errors = ([getattr(point, name) for point in found.frontier] for name in ("speedup", "error"))
    assert speeds == sorted(speeds)
    assert errors == sorted(errors)


def test_the_plan_is_nearer_to_the_uncached_images_than_a_uniform_one_of_its_cost(whole):
    model, found = whole
    point = next(point for point in found.frontier if point.target == 1.6)
    c, b = StepState.COMPUTE, StepState.REUSE_BOTH
    uniform = CacheTable((c, b, c, b, c, b, c, b, c, c), fill="stack")  # 1.64 times
    assert speedup_of(model, EBCache(uniform)) <= point.ideal_speedup * 1.1
    assert sum(error_of(model, point.table, s) for s in (7, 8)) < sum(error_of(model, uniform, s) for s in (7, 8))


def test_the_work_is_bounded_and_what_it_left_out_is_said(model, begun):
    options = replace(QUICK, refinements=0)
    least = tuned(model, options, folder=begun).work
    found = tuned(model, replace(options, refinements=50, max_work=least + 5), folder=begun)
    assert least < found.work <= least + 5
    assert any("used up" in note for note in found.notes)


def ten_rows(model, generator, num_inference_steps):
    return sample(model, generator, num_inference_steps, batch=10)


def norm(images):
    return images.norm().item()


def test_max_work_is_a_bound_on_scores_too_and_too_little_is_refused_with_the_numbers(model, begun):
    given = dict(folder=begun, score=norm, score_sample=ten_rows)
    with pytest.raises(
        InputError, match=r"at least \((\d+) to measure, 24 to try.*max_work = 75.*score_sample"
    ) as refused:
        tuned(model, replace(QUICK, max_work=75), **given)
    least = int(re.search(r"needs about (\d+)", str(refused.value))[1])
    works = []
    for more in (1, 10, 45):
        found = tuned(model, replace(QUICK, refinements=30, max_work=least + more), **given)
        assert found.point.score is not None
        assert found.uncached_score is not None
        assert len(found.frontier) == 2  # refinements leave something for the other target
        works.append(found.work)
        assert found.work <= least + more
    assert works == sorted(set(works))


@pytest.fixture
def small(scheduler):
    model = build_tiny(num_layers=1)
    model.scheduler_for_test = scheduler
    return model


@pytest.fixture
def executed(monkeypatch):
    """Rows of denoiser calls by their share of the multiply-accumulates, as they are carried out."""
    done, execute = [0.0], Handle._execute

    def counted(handle, tick, state, call, row):
        done[0] += (
            call.latents.shape[0] * handle.count(call.signature, row.ops) / handle._dry_runs.cost(call.signature).macs
        )
        return execute(handle, tick, state, call, row)

    monkeypatch.setattr(Handle, "_execute", counted)
    return done


@pytest.mark.parametrize("name", [pytest.param("feb", marks=pytest.mark.slow), "smoothcache"])
def test_a_calibration_costs_no_more_than_is_said_before(small, name, executed):
    settings = Settings(small, sample, STEPS, 8, scheduler=small.scheduler_for_test)
    kinds = (Kind.BRANCHES, Kind.ATTENTION, Kind.MLP)
    rehearsal = rehearse(settings, 0, Tapped("branches"), kinds)
    executed[0] = 0.0

    def rows(samples):
        return samples + samples % 2  # two at a time

    calibration = calibrations([name], 0.7, kinds)[name]
    table = calibrated(calibration, settings, None)
    spent, done = work_of(calibration, rehearsal.macs, rows, table), executed[0] / STEPS
    assert 0.5 * spent < done <= spent <= work_of(calibration, rehearsal.macs, rows)


def test_an_instrumented_run_costs_what_is_said_before(small, executed):
    settings = Settings(small, sample, STEPS, 8, scheduler=small.scheduler_for_test)
    lab = Lab(settings, None, 2, lambda _: None)
    lab.rehearse(tuple(Kind))
    executed[0] = 0.0
    measured = lab.measure(tuple(Kind))
    assert measured.work == pytest.approx(executed[0] / STEPS)
    said = instrumented_share(reaches(tuple(Kind), STEPS), lab.rehearsals["paired"].macs, STEPS)
    assert measured.work == pytest.approx(lab.rows(8) * said)


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
    return rehearse(settings, 0, Tapped("stack"), (Kind.STACK,)).sketch


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


def test_a_solver_made_anew_from_its_configuration_goes_on_in_the_folder(model, begun):
    """diffusers notes which values are defaults, in an order that is another in every process."""
    config = dict(model.scheduler_for_test.config)
    model.scheduler_for_test = DDPMScheduler.from_config(config)
    model.scheduler_for_test.register_to_config(_use_default_values=["trained_betas"])
    assert tuned(model, folder=begun).frontier


def test_out_of_reach_the_limit_is_said_and_the_frontier_returned(model, begun):
    with pytest.warns(UserWarning, match="a speed-up of 50 is out of reach.*at most") as caught:
        found = tuned(model, speedup=50, folder=begun)
    assert f"{found.limit:.2f}" in str(caught[0].message)
    assert found.point is found.frontier[-1]
    assert found.point.speedup == pytest.approx(found.limit)
    assert len(found.frontier) > 1


@pytest.mark.parametrize("speedup", [1, 0.5, 0, -2, float("nan"), float("inf"), "2", True])
def test_a_speedup_that_is_none_is_refused(model, speedup):
    with pytest.raises(InputError, match="above 1"):
        tuned(model, speedup=speedup)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(speedups=(1.0,)),
        dict(budget="money"),
        dict(prefer="taste"),
        dict(trial_samples=0),
        dict(tilts=()),
        dict(kinds=("attention",)),
        dict(kinds=("heads",)),
        dict(eps_scale_grid=(0.0,)),
        dict(trial_samples=2.5),
        dict(refinements=1.5),
        dict(tilts=(float("nan"),)),
        dict(max_work=float("nan")),
        dict(max_work=-1),
        dict(max_work=0),
        dict(max_work=float("inf")),
    ],
)
def test_options_without_meaning_are_refused(wrong):
    with pytest.raises(sostenuto.SostenutoError):
        TuneOptions(**wrong)


def test_few_samples_are_warned_of(model):
    with pytest.warns(UserWarning, match="2 samples are few"):
        tuned(model, num_samples=2)


def test_a_sample_that_ignores_the_steps_is_refused_and_leaves_nothing_attached(model):
    with pytest.raises(MethodError, match="5 steps instead of 10"):
        tune(
            model,
            lambda m, g, num_inference_steps: sample(m, g, 5),
            num_inference_steps=STEPS,
            scheduler=model.scheduler_for_test,
        )
    sostenuto.enable(model, "none", scheduler=model.scheduler_for_test).disable()


def test_more_measuring_than_the_work_allows_is_refused_before_anything_runs(model):
    def never(*_, **__):
        raise AssertionError

    with pytest.raises(InputError, match="fewer num_samples"):
        tune(model, never, num_samples=900, scheduler=model.scheduler_for_test)


@pytest.mark.parametrize("best", [0.98, 1.01])
def test_the_score_chooses_b_on_either_side_of_one(model, begun, best):
    options = replace(QUICK, speedups=(1.5,), refinements=0)
    plain = tuned(model, options, speedup=1.5, folder=begun).point.table
    with sostenuto.enable(model, EBCache(plain, eps_scale=best), scheduler=model.scheduler_for_test):
        wanted = sample(model, torch.Generator().manual_seed(2), STEPS)  # the noise of scored generations

    def score(images):
        return (images - wanted).norm().item() - 1000  # of any sign

    found = tuned(model, options, speedup=1.5, folder=begun, score=score)
    assert set(found.point.table.eps_scale) == {best}
    assert found.point.score == pytest.approx(-1000, abs=1e-5)
    assert found.uncached_score > -1000


def test_the_score_chooses_a_factor_for_computed_steps_and_one_for_the_others(model, begun):
    options = replace(QUICK, speedups=(1.5,), refinements=0)
    plain = tuned(model, options, speedup=1.5, folder=begun).point.table
    factors = tuple(0.99 if state is StepState.COMPUTE else 1.02 for state in plain.actions)
    with sostenuto.enable(model, EBCache(plain, eps_scale=factors), scheduler=model.scheduler_for_test):
        wanted = sample(model, torch.Generator().manual_seed(2), STEPS)  # the noise of scored generations
    options = replace(options, eps_scale_grid=(0.99, 1.02))

    def score(images):
        return (images - wanted).norm().item() - 1000

    point = tuned(model, options, speedup=1.5, folder=begun, score=score).point
    assert point.table.actions == plain.actions
    assert point.origin.endswith("computed 0.99, reused 1.02")
    assert point.table.eps_scale == factors
    assert point.score == pytest.approx(-1000, abs=1e-5)


def test_without_a_score_the_norm_of_the_noise_is_matched_only_where_that_is_nearer(model, begun):
    point = tuned(model, folder=begun).point
    plain = error_of(model, point.table)
    with sostenuto.enable(model, point.method, scheduler=model.scheduler_for_test):
        made, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=7)
    wanted, _ = sample_loop(model, model.scheduler_for_test, STEPS, seed=7)
    assert (made - wanted).square().mean().item() <= plain * 1.05


def test_where_features_are_noisy_they_are_filled_with_their_last_value(model):
    """As quantised activations are: a forecast doubles what is random in them."""
    calm(model)
    for block in model.transformer_blocks:
        block.attn1.to_out[0].register_forward_hook(lambda _m, _i, output: output + 0.3 * torch.sin(1e5 * output))
    found = tuned(model, replace(QUICK, refinements=0))
    assert any("forecasts hurt" in note for note in found.notes)
    assert any("noise floor" in note for note in found.notes)
    orders = [
        order
        for point in found.frontier
        for state, order in zip(point.table.actions, point.table.forecast_orders, strict=True)
        if state is not StepState.COMPUTE
    ]
    assert orders.count(0) >= 0.75 * len(orders)  # the samples are few: chance may choose one


@pytest.mark.parametrize("noisy", [True, False])
def test_noise_of_the_features_is_found_in_five_steps(model, noisy):
    model.scheduler_for_test = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    quantised(calm(model)) if noisy else calm(model)
    found = tuned(model, replace(QUICK, refinements=0), num_inference_steps=5, speedup=1.5)
    assert any("noise floor" in note for note in found.notes) is noisy


def test_separate_passes_are_measured_and_cached_too(model):
    def guided(pipe, generator, num_inference_steps):
        return sample(pipe, generator, num_inference_steps, separate_guidance=True)

    found = tune(
        model,
        guided,
        num_inference_steps=8,
        speedup=1.5,
        num_samples=8,
        scheduler=model.scheduler_for_test,
        options=QUICK,
    )
    with sostenuto.enable(model, found.method, scheduler=model.scheduler_for_test) as handle:
        sample_loop(model, model.scheduler_for_test, 8, separate_guidance=True)
        assert handle.stats.ideal_speedup >= 1.5
        assert handle.stats.num_passes == 2


def test_the_budget_may_be_time(model, begun):
    options = TuneOptions(
        speedups=(1.5,), budget="time", trial_samples=2, refinements=0, tilts=(0.0,), kinds=("stack",)
    )
    found = tuned(model, options, speedup=1.5, folder=begun)
    assert found.point.speedup == found.point.time_speedup >= 1.5
    assert found.budget == "time"
    seconds = {key: trial["seconds"] for key, trial in json.loads((begun / "trials.json").read_text()).items()}
    assert found.point.measured_speedup == seconds["paired uncached"] / seconds[f"paired {key_of(found.point.table)}"]


def test_an_instrumented_run_is_the_uncached_one(model):
    from sostenuto.calibrations.base import Tapped
    from sostenuto.engine import attach
    from sostenuto.tuning.instrument import Instrument
    from sostenuto.tuning.measurement import Kind, reaches

    wanted, _ = sample_loop(model, model.scheduler_for_test, STEPS)
    with attach(model, Tapped("stack"), scheduler=model.scheduler_for_test) as handle:
        instrument = Instrument(handle, reaches(tuple(Kind), STEPS), STEPS)
        handle.driver = instrument
        made, _ = sample_loop(model, model.scheduler_for_test, STEPS)
    assert torch.equal(made, wanted)
    measured = instrument.result(2, 0.0)
    assert measured.macs["compute"] == 1.0
    assert measured.macs["stack"] < measured.macs["mlp"] < 1


def test_the_measured_error_is_that_of_a_real_step_of_reuse(model):
    """Against a plan with one reuse: up to its step all is uncached, so its output differs by just the measured error."""
    from sostenuto.calibrations.base import Tapped
    from sostenuto.engine import attach
    from sostenuto.tuning.instrument import Instrument
    from sostenuto.tuning.measurement import Kind, reaches

    _, fresh = sample_loop(model, model.scheduler_for_test, STEPS)
    with attach(model, Tapped("stack"), scheduler=model.scheduler_for_test) as handle:
        instrument = handle.driver = Instrument(handle, reaches(tuple(Kind), STEPS), STEPS)
        sample_loop(model, model.scheduler_for_test, STEPS)
    measured = instrument.result(2, 0.0)
    c, b = StepState.COMPUTE, StepState.REUSE_BOTH
    for kind, fill in ((Kind.STACK, "stack"), (Kind.BRANCHES, "branches")):
        for order, actions in ((0, (c, c, b)), (1, (c, c, b)), (2, (c, c, c, b))):
            step = len(actions) - 1
            table = CacheTable(actions + (c,) * (STEPS - step - 1), forecast_order=order, fill=fill)
            with sostenuto.enable(model, EBCache(table), scheduler=model.scheduler_for_test):
                _, outputs = sample_loop(model, model.scheduler_for_test, STEPS)
            error = (outputs[step] - fresh[step]).square().mean().item()
            at = measured.reach[kind].gap_index(order, 1)
            assert measured.runs[kind][order, at, step - 1, 0, 0] == pytest.approx(error, rel=1e-4)


PUBLISHED = TuneOptions(
    speedups=(1.5,),
    trial_samples=2,
    refinements=0,
    tilts=(0.0,),
    kinds=("stack",),
    published=("eb", "feb", "smoothcache"),
)


def test_a_published_calibration_competes_within_the_cost(model, begun):
    found = tuned(model, PUBLISHED, speedup=1.5, folder=begun)
    assert not (begun / "published-feb-1.5x.json").exists()  # it needs the branches
    plan = CacheTable.load(begun / "published-eb-1.5x.json")
    assert speedup_of(model, EBCache(plan)) >= 1.5
    assert set(plan.eps_scale) == {1.0}
    before = (begun / "published-eb-1.5x.json").read_bytes()
    tuned(model, replace(PUBLISHED, published=("eb",), budget="time"), speedup=1.5, folder=begun)
    assert (begun / "published-eb-1.5x-time.json").exists()  # of another share of the multiply-accumulates
    assert (begun / "published-eb-1.5x.json").read_bytes() == before
    assert error_of(model, found.point.table) <= error_of(model, plan) * 1.05


def test_a_published_plan_that_scores_better_is_taken(model, begun, monkeypatch):
    c, b = StepState.COMPUTE, StepState.REUSE_BOTH
    odd = CacheTable((c, c, c, c, c, b, b, b, c, b), fill="stack", macs_fraction=0.65)
    monkeypatch.setattr("sostenuto.tuning.tuner.calibrated", lambda *_: odd)
    with sostenuto.enable(model, EBCache(odd), scheduler=model.scheduler_for_test):
        wanted = sample(model, torch.Generator().manual_seed(2), STEPS)  # the noise of scored generations

    def score(images):
        return (images - wanted).norm().item() - 1000

    found = tuned(model, PUBLISHED, speedup=1.5, folder=begun, score=score)
    assert found.point.table.actions == odd.actions
    assert found.point.table.calibration["plan"] == "eb"
    assert found.point.score == pytest.approx(-1000, abs=1e-5)
    by_nearness = tuned(model, replace(PUBLISHED, prefer="nearness"), speedup=1.5, folder=begun, score=score)
    assert by_nearness.point.table.actions != odd.actions


def test_plans_with_forecasts_alone_are_scored_though_they_are_farther_off(model, begun, monkeypatch):
    """Where features are noise the nearest plans take last values: a score still hears the others."""
    scored, heard = Lab.scored, []

    def listening(self, table):
        heard.extend([] if table is None else [table])
        return scored(self, table)

    monkeypatch.setattr(Lab, "scored", listening)
    tuned(model, speedup=1.5, folder=begun, score=lambda images: images.norm().item())

    def orders(table):
        pairs = zip(table.actions, table.forecast_orders, strict=True)
        return {order for state, order in pairs if state is not StepState.COMPUTE}

    assert {1} in [orders(table) for table in heard]
    assert any(0 in orders(table) for table in heard)


@pytest.mark.parametrize(
    "listing",
    [HeunDiscreteScheduler, pytest.param(lambda: PNDMScheduler(skip_prk_steps=True), marks=pytest.mark.slow)],
    ids=("heun", "pndm"),
)
def test_schedulers_that_list_more_calls_than_steps_are_tuned_with_published_plans_among_others(tiny, listing):
    scheduler = listing()

    @torch.no_grad()
    def every_call(model, generator, num_inference_steps):
        latents = torch.randn(2, 2, 8, 8, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        for timestep in scheduler.timesteps:
            given = scheduler.scale_model_input(latents, timestep)
            noise = model(given, timestep.expand(2), torch.tensor([1, 2])).sample
            latents = scheduler.step(noise[:, :2], timestep, latents).prev_sample
        return latents

    options = replace(QUICK, published=("eb", "smoothcache"))
    found = tune(
        tiny, every_call, num_inference_steps=6, speedup=1.5, num_samples=8, scheduler=scheduler, options=options
    )
    scheduler.set_timesteps(6)
    assert found.point.table.num_inference_steps == len(scheduler.timesteps) > 6


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


def test_only_what_may_be_reused_is_kept_while_measuring(model):
    from sostenuto.engine import attach
    from sostenuto.tuning.instrument import Instrument

    kept = set()
    with attach(model, Tapped("stack"), scheduler=model.scheduler_for_test) as handle:
        instrument = Instrument(handle, reaches((Kind.STACK,), STEPS), STEPS)

        def driver(tick, prober):
            output = instrument(tick, prober)
            kept.update(handle.sites[i].id for i, slot in enumerate(prober.state.slots) if slot[0] is not None)
            return output

        handle.driver = driver
        sample_loop(model, model.scheduler_for_test, STEPS)
    assert kept == {"transformer_blocks.0-2"}


@pytest.mark.parametrize(("better", "worse"), [(-2.0, -1.0), (-0.9, 0.3), (0.3, 0.4), (-1e-9, 1e-9), (0.0, 1e-300)])
def test_a_lower_score_is_better_on_both_sides_of_nothing(better, worse):
    def of(score):
        return merit(Trial(error=0.01, score=score, norms=(), work=1.0, seconds=1.0))

    assert of(better) < of(worse)


def test_a_plan_that_breaks_the_score_is_worse_than_any_and_an_uncached_one_is_said(model, tmp_path):
    heard = []

    def fragile(latents):
        heard.append(latents)
        return float("nan") if len(heard) == 4 else latents.norm().item()

    found = tuned(model, score=fragile, folder=tmp_path)
    assert len(heard) > 4
    assert math.isfinite(found.point.score)
    assert found.point.score < 1e28
    with pytest.raises(MethodError, match="the uncached sampler's score is nan"):
        tuned(model, score=lambda latents: float("nan"))
