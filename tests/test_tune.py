"""What tuning finds: the frontier within its budget, of any sampler and any kind of passes; and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, PNDMScheduler

import sostenuto
from conftest import build_tiny, calm, quantised, sample, sample_loop, sample_of_every_call
from sostenuto import CacheTable, EBCache, InputError, MethodError, TuneOptions, tune
from sostenuto.anatomy import SiteKind
from sostenuto.step_state import StepState
from sostenuto.tuning.lab import Lab, key_of
from sostenuto.tuning.measurement import Kind
from sostenuto.tuning.tuner import _kinds
from tunings import QUICK, STEPS, error_of, speedup_of, tuned


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


def test_kinds_that_no_branch_belongs_to_are_not_measured(model, monkeypatch):
    fused = [replace(site, kind=SiteKind.FUSED) for site in sostenuto.inspect(model)]
    monkeypatch.setattr("sostenuto.tuning.tuner.inspect", lambda _: fused)
    assert _kinds(model, TuneOptions()) == (Kind.STACK, Kind.SAMPLE, Kind.BRANCHES)


class Judge:
    def too_few(self, n):
        return f"{n} are few" if n < 8 else None

    def __call__(self, images):
        return images.norm().item()

    def distance(self, images):
        return self(images)


def test_a_score_that_fails_on_the_models_own_images_ends_before_the_measurements(model, monkeypatch):
    def failing(images):
        raise InputError("no reference")

    monkeypatch.setattr(Lab, "measure", lambda *_: pytest.fail("the expensive part began"))
    with pytest.raises(InputError, match="no reference"):
        tuned(model, score=failing)


@pytest.mark.parametrize("score", [Judge(), Judge().distance])
def test_a_score_says_that_its_images_are_few(model, begun, score):
    def four(model, generator, num_inference_steps):
        return sample(model, generator, num_inference_steps, batch=4)

    with pytest.warns(UserWarning, match="4 are few"):
        found = tuned(model, replace(QUICK, refinements=0), folder=begun, score=score, score_sample=four)
    assert "4 are few" in found.notes


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


@pytest.mark.parametrize(
    "listing",
    [
        pytest.param(HeunDiscreteScheduler, marks=pytest.mark.slow),
        pytest.param(lambda: PNDMScheduler(skip_prk_steps=True), marks=pytest.mark.slow),
    ],
    ids=("heun", "pndm"),
)
def test_schedulers_that_list_more_calls_than_steps_are_tuned_with_published_plans_among_others(tiny, listing):
    scheduler = listing()
    every_call = sample_of_every_call(scheduler)
    options = replace(QUICK, published=("eb", "smoothcache"))
    found = tune(
        tiny, every_call, num_inference_steps=6, speedup=1.5, num_samples=8, scheduler=scheduler, options=options
    )
    scheduler.set_timesteps(6)
    assert found.point.table.num_inference_steps == len(scheduler.timesteps) > 6
