"""Which plan and which noise scale are chosen, by nearness and by a score."""

import math
from dataclasses import replace

import pytest
import torch

import sostenuto
from conftest import sample, sample_loop
from sostenuto import CacheTable, EBCache, MethodError, TuneOptions
from sostenuto.step_state import StepState
from sostenuto.tuning.choice import merit
from sostenuto.tuning.lab import Lab, Trial
from tunings import QUICK, STEPS, error_of, speedup_of, tuned


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


PUBLISHED = TuneOptions(
    speedups=(1.5,),
    trial_samples=2,
    refinements=0,
    tilts=(0.0,),
    kinds=("stack",),
    published=("eb", "feb", "smoothcache"),
)


@pytest.mark.slow
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


@pytest.mark.parametrize(("better", "worse"), [(-2.0, -1.0), (-0.9, 0.3), (0.3, 0.4), (-1e-9, 1e-9), (0.0, 1e-300)])
def test_a_lower_score_is_better_on_both_sides_of_nothing(better, worse):
    def of(score):
        return merit(Trial(error=0.01, score=score, norms=(), work=1.0, seconds=1.0))

    assert of(better) < of(worse)


@pytest.mark.slow
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
