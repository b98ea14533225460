"""What tuning costs: what is said before is what is done, and ``max_work`` is a bound."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import sostenuto
from conftest import build_tiny, sample
from sostenuto import CacheTable, EBCache, InputError, StepState, tune
from sostenuto.calibrations.base import Settings, Tapped
from sostenuto.engine import Handle
from sostenuto.tuning.lab import CLOSER, Lab
from sostenuto.tuning.measurement import Kind, instrumented_share, reaches
from sostenuto.tuning.published import calibrated, calibrations, work_of
from sostenuto.tuning.rehearsal import rehearse
from tunings import QUICK, STEPS, norm, tuned


def test_the_work_is_bounded_and_what_it_left_out_is_said(model, begun):
    options = replace(QUICK, refinements=0)
    least = tuned(model, options, folder=begun).work
    found = tuned(model, replace(options, refinements=50, max_work=least + 5), folder=begun)
    assert least < found.work <= least + 5
    assert any("used up" in note for note in found.notes)


def ten_rows(model, generator, num_inference_steps):
    return sample(model, generator, num_inference_steps, batch=10)


def test_max_work_is_a_bound_on_scores_too_and_too_little_is_refused_with_the_numbers(model, begun):
    given = dict(folder=begun, score=norm, score_sample=ten_rows)
    with pytest.raises(
        InputError, match=r"at least \((\d+) to measure, 24 to try.*max_work = 60.*score_sample"
    ) as refused:
        tuned(model, replace(QUICK, max_work=60), **given)
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
    rehearsal = rehearse(settings, 0, Tapped(("branches",)), kinds)
    executed[0] = 0.0

    def rows(samples):
        return samples + samples % 2  # two at a time

    calibration = calibrations([name], 0.7, kinds)[name]
    table = calibrated(calibration, settings, None)
    spent, done = work_of(calibration, rehearsal.macs, rows, table), executed[0] / STEPS
    assert 0.5 * spent < done <= spent <= work_of(calibration, rehearsal.macs, rows)


def test_an_interrupted_search_of_a_published_calibration_goes_on_after_its_last_round(small, tmp_path):
    generated: list[int] = []

    def counted(model, generator, num_inference_steps, stop_at=None):
        if len(generated) == stop_at:
            raise KeyboardInterrupt
        generated.append(1)
        return sample(model, generator, num_inference_steps)

    settings = Settings(small, counted, STEPS, 8, scheduler=small.scheduler_for_test)
    calibration = calibrations(["eb"], 0.55, [Kind.BRANCHES])["eb"]
    whole, path = tmp_path / "whole.json", tmp_path / "interrupted.json"
    rounds = calibrated(calibration, settings, whole).calibration["rounds"]
    assert rounds == len(generated) // 4 >= 3  # 8 samples, two at a time
    generated.clear()
    with pytest.raises(KeyboardInterrupt):
        calibrated(calibration, replace(settings, sample=partial(counted, stop_at=6)), path)
    calibrated(calibration, settings, path)
    assert len(generated) == 4 * rounds + 2  # of the second round two had been made
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, whole]


def test_an_instrumented_run_costs_what_is_said_before(small, executed):
    settings = Settings(small, sample, STEPS, 8, scheduler=small.scheduler_for_test)
    lab = Lab(settings, None, 2, lambda _: None)
    lab.rehearse(tuple(Kind))
    executed[0] = 0.0
    measured = lab.measure(tuple(Kind))
    assert measured.work == pytest.approx(executed[0] / STEPS)
    said = instrumented_share(reaches(tuple(Kind), STEPS), lab.rehearsals["paired"].macs, STEPS)
    assert measured.work == pytest.approx(lab.rows(8) * said)


@pytest.mark.parametrize("bench", ["paired", CLOSER])
def test_trials_beside_an_uncached_one_cost_what_is_counted(small, executed, bench):
    lab = Lab(Settings(small, sample, STEPS, 8, scheduler=small.scheduler_for_test), None, 2, lambda _: None)
    lab.rehearse((Kind.STACK,))
    C, B = StepState.COMPUTE, StepState.REUSE_BOTH
    half = CacheTable((C, B) * (STEPS // 2), fill="stack")
    with sostenuto.enable(small, EBCache(half), scheduler=small.scheduler_for_test) as handle:
        sample(small, torch.Generator().manual_seed(0), STEPS)
        half = replace(half, macs_fraction=1 / handle.stats.ideal_speedup)
    executed[0] = 0.0
    before = lab.work
    lab.prepare(bench, [None, half])
    for table in (None, half):
        lab._try(bench, table)
    assert executed[0] / STEPS == pytest.approx(lab.work - before)


@pytest.mark.parametrize("share", [(Kind.BRANCHES,), (Kind.MLP,)])
def test_one_process_shows_the_work_of_its_share_of_the_kinds(small, executed, share):
    settings = Settings(small, sample, STEPS, 4, scheduler=small.scheduler_for_test)
    shown: list[float] = []
    lab = Lab(settings, None, 2, shown.append)
    kinds = (Kind.BRANCHES, Kind.ATTENTION, Kind.MLP)
    lab.rehearse(kinds)
    executed[0] = 0.0
    shown.clear()
    measured = lab._measured(share, kinds)
    assert measured.work == pytest.approx(executed[0] / STEPS)
    assert sum(shown) == pytest.approx(measured.work / 2)  # of two generations the last is counted with the result


def test_more_measuring_than_the_work_allows_is_refused_before_anything_runs(model):
    def never(*_, **__):
        raise AssertionError

    with pytest.raises(InputError, match="fewer num_samples"):
        tune(model, never, num_samples=900, scheduler=model.scheduler_for_test)
