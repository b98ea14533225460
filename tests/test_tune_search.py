"""The search for a plan, on made-up errors: against every plan there is, and against errors added up by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sostenuto.errors import InputError
from sostenuto.plan import Action
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.tuning.lab import Lab
from sostenuto.tuning.measurement import Kind, Measurement, Reach
from sostenuto.tuning.search import (
    EMPTY,
    ErrorModel,
    Frontier,
    Segment,
    cost_of,
    cost_of_table,
    gap_after,
    neighbours,
    table_of,
    uniform,
)
from sostenuto.tuning.weights import Weights

KINDS = (Kind.STACK, Kind.ATTENTION)
COSTS = {"compute": 1.0, "stack": 0.0, "attention": 0.5, "mlp": 0.5, "branches": 0.0}


def made_up(num_steps, seed=0, kinds=KINDS, noisy=False):
    """Errors as of vectors: the products of a run's errors are those of random ones."""
    random = np.random.default_rng(seed)
    reach, runs = {}, {}
    for kind in kinds:
        reach[kind] = Reach(2, ((0,), (1, 2)))
        values = np.full((2, 2, num_steps, 2, 2), np.nan)
        for order, gap, step in itertools.product(range(2), range(2), range(num_steps - 1)):
            if order == 0 and gap:
                continue
            if order and step < gap + 1:
                continue  # nothing was kept so long ago
            length = min(2, num_steps - 1 - step)
            vectors = random.normal(size=(length, 3)) * (3.0 if noisy and order else 1.0)
            values[order, gap, step, :length, :length] = vectors @ vectors.T
        runs[kind] = values
    return Measurement(reach, runs, np.ones(num_steps), COSTS, {**COSTS, "pause": 0.1}, 4, {})


def weight(kind, order, step):
    return 1.0 + 0.3 * step + 0.1 * order


def every_schedule(num_steps, kinds, longest=2):
    """All schedules whose first and last step are computed, each run in one kind and order."""
    if num_steps == 0:
        yield ()
        return
    for length in range(min(longest, num_steps - 1) + 1):
        fillings = [(kind, order) for kind in kinds for order in (0, 1)] if length else [(Kind.STACK, 0)]
        for rest in every_schedule(num_steps - length - 1, kinds, longest):
            if length and not rest:
                continue  # the last step would not be computed
            for kind, order in fillings:
                yield (Segment(length, kind, order), *rest)


def added_up(measured, schedule):
    """The error of a schedule by the definition, step by step and independently of the model's code."""
    total, step, before = 0.0, 0, None
    for segment in schedule:
        if segment.length:
            # What the step before kept: attention alone leaves its own outputs stale, and the rest was computed since.
            partial = before and before.length and before.kind is Kind.ATTENTION
            gap = 0 if before is None else 1 if partial and segment.kind is Kind.STACK else before.length + 1
            if segment.order and not gap:
                return np.inf
            at = 0 if segment.order == 0 else min(gap, 2) - 1
            products = measured.runs[segment.kind][segment.order, at, step]
            for i, j in itertools.product(range(segment.length), repeat=2):
                both = (weight(segment.kind, segment.order, step + 1 + k) ** 0.5 for k in (i, j))
                total += products[i, j] * np.prod(list(both))
        step, before = step + segment.length + 1, segment
    return np.inf if np.isnan(total) else total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [1.0, 0.85, 0.7, 0.55, 0.5])
def test_no_plan_of_the_same_cost_has_less_error(seed, budget):
    assert_the_best_is_found(made_up(6, seed), COSTS, budget)


def assert_the_best_is_found(measured, costs, budget):
    found = Frontier(ErrorModel(measured, weight, KINDS), costs).schedule(budget)
    least = min(
        added_up(measured, schedule)
        for schedule in every_schedule(measured.num_steps, KINDS)
        if cost_of(schedule, costs) <= budget + 1e-9
    )
    assert cost_of(found, costs) <= budget + 1e-9
    assert added_up(measured, found) == pytest.approx(least)


def test_the_models_total_is_the_sum_by_definition():
    measured = made_up(7)
    model = ErrorModel(measured, weight, KINDS)
    for schedule in itertools.islice(every_schedule(7, KINDS), 0, None, 5):
        assert model.total(schedule) == pytest.approx(added_up(measured, schedule))


def test_a_reuse_that_takes_longer_than_computing_is_left_alone():
    model = ErrorModel(made_up(4), weight, (Kind.STACK,))
    frontier = Frontier(model, COSTS | {"stack": 9.0})
    assert frontier.schedule(1.0) == (EMPTY,) * 4
    assert frontier.least_cost == 1.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [0.85, 0.7, 0.6, 0.5])
def test_a_forecast_that_takes_longer_competes_at_its_own_cost(seed, budget):
    assert_the_best_is_found(made_up(6, seed), COSTS | {"stack 1": 0.2, "attention 1": 0.6}, budget)


def test_times_tell_forecasts_from_last_values():
    seconds = {"compute": 1.0, "stack": 0.1, "stack 1": 0.3, "pause": 0.1}
    measured = replace(made_up(6), seconds=seconds)
    assert measured.times == pytest.approx(
        {"compute": 1.1, "stack": 0.2, "stack 1": 0.4, "attention": 1.1, "mlp": 1.1, "branches": 1.1}
    )
    last = CacheTable((StepState.COMPUTE, StepState.REUSE_BOTH) * 2, fill="stack")
    assert cost_of_table(last, measured.times) == pytest.approx((1.1 + 0.2) / 2.2)
    assert cost_of_table(last.filled(1), measured.times) == pytest.approx((1.1 + 0.4) / 2.2)


@settings(max_examples=15, deadline=None)
@given(st.integers(6, 14), st.integers(0, 100), st.floats(0.35, 1.0))
def test_the_budget_is_kept_and_more_of_it_never_makes_it_worse(num_steps, seed, budget):
    measured = made_up(num_steps, seed)
    model = ErrorModel(measured, weight, KINDS)
    frontier = Frontier(model, COSTS)
    least = frontier.least_cost
    assert frontier.schedule(least * 0.99) is None
    errors = []
    for share in (least, max(least, budget * 0.8), max(least, budget), 1.0):
        found = frontier.schedule(share)
        assert cost_of(found, COSTS) <= share + 1e-9
        assert sum(segment.length + 1 for segment in found) == num_steps
        assert found[-1].length == 0  # the last step is computed
        errors.append(model.total(found))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_noisy_forecasts_are_not_chosen_and_smooth_ones_are():
    noisy, smooth = made_up(8, noisy=True), made_up(8)
    smooth.runs[Kind.STACK][1] *= 1e-3
    smooth.runs[Kind.ATTENTION][1] *= 1e-3

    def orders(measured):
        schedule = Frontier(ErrorModel(measured, lambda *_: 1.0, KINDS), COSTS).schedule(0.6)
        return [segment.order for segment in schedule[1:] if segment.length]

    assert set(orders(noisy)) == {0}
    assert set(orders(smooth)) == {1}


def test_late_errors_count_more_when_they_are_made_to():
    flat = {(Kind.STACK, 0): {2: 1.0, 6: 1.0}}
    assert Weights(flat, 9)(Kind.STACK, 0, 8) == pytest.approx(1.0)
    tilted = Weights(flat, 9, tilt=2.0)
    assert tilted(Kind.STACK, 0, 8) / tilted(Kind.STACK, 0, 0) == pytest.approx(np.exp(2.0))


def test_weights_between_probed_steps_are_geometric_means_and_the_kind_decides_before_the_order():
    weights = Weights({(Kind.STACK, 0): {2: 1.0, 4: 4.0}, (Kind.BRANCHES, 2): {2: 9.0}}, 8)
    assert weights(Kind.STACK, 2, 3) == pytest.approx(2.0)
    assert weights(Kind.STACK, 0, 7) == pytest.approx(4.0)
    assert weights(Kind.BRANCHES, 0, 5) == pytest.approx(9.0)


def test_a_schedule_becomes_a_table_with_its_orders():
    schedule = (
        Segment(1, Kind.STACK, 0),
        Segment(2, Kind.STACK, 2),
        Segment(1, Kind.ATTENTION, 1),
        Segment(0, Kind.STACK, 0),
    )
    table = table_of(schedule)
    c, a, _, b = StepState
    assert table.actions == (c, b, c, b, b, c, a, c)
    assert table.forecast_orders == (0, 0, 0, 2, 2, 0, 1, 0)
    assert table.fill == "stack"
    assert table_of((Segment(1, Kind.BRANCHES, 1), Segment(0, Kind.STACK, 0))).fill == "branches"
    assert cost_of(schedule, COSTS) == pytest.approx(4.5 / 8)


def test_the_published_schedules_are_uniform_within_the_budget_and_compute_both_ends():
    model = ErrorModel(made_up(11), weight, KINDS)
    found = uniform(model, COSTS, 0.6)
    lengths = [segment.length for segment in found]
    assert lengths[-1] == 0
    assert lengths[0] == 0
    assert sum(lengths) + len(lengths) == 11
    assert len({length for length in lengths[2:-2] if length}) == 1
    assert cost_of(found, COSTS) <= 0.6
    assert uniform(model, COSTS, 0.2) is None


def test_neighbours_cost_the_same_and_differ():
    schedule = (
        Segment(1, Kind.STACK, 0),
        Segment(2, Kind.STACK, 1),
        Segment(1, Kind.ATTENTION, 1),
        Segment(0, Kind.STACK, 0),
    )
    found = list(neighbours(schedule))
    assert found
    for other in found:
        assert other != schedule
        assert cost_of(other, COSTS) == pytest.approx(cost_of(schedule, COSTS))
        assert sum(segment.length + 1 for segment in other) == 8
    assert all(other[-1].length == 0 for other in found)


def test_a_partial_step_computes_all_but_what_it_reuses():
    assert gap_after(None, Kind.STACK) == 0
    assert gap_after((Kind.MLP, 0), Kind.MLP) == 1
    assert {gap_after((Kind.STACK, 3), kind) for kind in Kind} == {4}
    gaps = {kind: gap_after((Kind.MLP, 3), kind) for kind in Kind}
    assert gaps == {Kind.STACK: 1, Kind.SAMPLE: 1, Kind.ATTENTION: 1, Kind.MLP: 4, Kind.BRANCHES: 4}


def test_a_measurement_survives_its_file(tmp_path):
    measured = replace(made_up(5), sites={"0.attn": ("attention", 0.75)}, roughness=np.array([np.nan, 0.5, 0, 0, 1]))
    measured.save(tmp_path / "m.npz")
    again = Measurement.load(tmp_path / "m.npz")
    assert again.reach == measured.reach
    assert again.macs == measured.macs
    assert again.sites == measured.sites
    assert again.work == measured.work
    np.testing.assert_array_equal(again.roughness, measured.roughness)
    for kind in KINDS:
        np.testing.assert_array_equal(again.runs[kind], measured.runs[kind])


def test_the_noise_floor_and_the_gain_of_forecasts_are_those_of_features_with_known_noise():
    """Features d·p + noise: reuse at lag l is off by d²l² + 2n², a linear forecast of neighbours by 6n²."""
    drift, noise = 0.3, 0.5
    reach = {Kind.STACK: Reach(2, ((0,), (1,)))}
    values = np.full((2, 1, 10, 2, 2), np.nan)
    for step in range(10):
        values[0, 0, step, 0, 0] = drift**2 + 2 * noise**2
        values[0, 0, step, 1, 1] = 4 * drift**2 + 2 * noise**2
        values[1, 0, step, 0, 0] = 6 * noise**2
    roughness = np.array([np.nan, *[2 * noise**2 / (drift**2 + 2 * noise**2)] * 9])
    measured = Measurement(reach, {Kind.STACK: values}, np.ones(10), COSTS, COSTS, 4, {}, roughness=roughness)
    assert measured.noise_share == pytest.approx(2 * noise**2 / (drift**2 + 2 * noise**2))
    assert measured.forecast_gain == pytest.approx((6 * noise**2 / (drift**2 + 2 * noise**2)) ** 0.5)
    assert replace(measured, roughness=np.zeros(10)).noise_share == 0  # the path turns, and nothing of it is noise


def test_a_table_costs_what_its_steps_do_and_its_sites_a_share_of_what_their_kind_spares():
    c, a, m, b = StepState.COMPUTE, StepState.REUSE_ATTENTION, StepState.REUSE_MLP, StepState.REUSE_BOTH
    costs = {"compute": 2.0, "stack": 0.2, "branches": 0.4, "attention": 1.2, "mlp": 1.0}
    assert cost_of_table(CacheTable((c, b, a, m)), costs) == pytest.approx((2 + 0.4 + 1.2 + 1) / 8)
    assert cost_of_table(CacheTable((c, b, b, c), fill="stack"), costs) == pytest.approx((2 + 0.2 + 0.2 + 2) / 8)
    sites = {"0.attn": ("attention", 0.75), "1.attn": ("attention", 0.25), "0.ff": ("mlp", 1.0), "2": ("branches", 1.0)}
    computed = dict.fromkeys(sites, Action.COMPUTE)

    def step(*reused):
        listed = CacheTable((c, computed | dict.fromkeys(reused, Action.FORECAST)), macs_fraction=0.9)
        return 2 * cost_of_table(listed, costs | {"branches": 0.1}, sites) - 1

    # Of 2.0 attention spares 0.8, the MLP 1.0, and what is neither the other 0.1 of 1.9.
    assert step() == pytest.approx(1)
    assert step("1.attn") == pytest.approx(1 - 0.2 / 2)
    assert step("0.attn", "0.ff") == pytest.approx(1 - 1.6 / 2)
    assert step(*sites) == pytest.approx(0.1 / 2)
    for schedule in every_schedule(4, KINDS):
        assert cost_of_table(table_of(schedule), COSTS) == pytest.approx(cost_of(schedule, COSTS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trials.json", b"[1]"),
        ("trials.json", b'{"a": {"error": 1}}'),
        ("trials.json", b'{"a": {"error": "x", "score": null, "norms": [], "work": 1, "seconds": 1}}'),
        ("trials.json", b'{"a": {"error": NaN, "score": null, "norms": [], "work": 1, "seconds": 1}}'),
        ("response.json", b'{"stack 0 1": {"left": null, "work": 1}}'),
        ("response.json", b'{"stack 0 1": 3}'),
        ("response.json", b'{"stack'),
    ],
)
def test_a_damaged_file_of_a_tuning_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} can't be read .*delete it"):
        Lab(None, tmp_path, 1, print)


@pytest.mark.parametrize("end", [0, 5, 300, -30])
def test_a_measurement_that_was_cut_off_is_refused(tmp_path, end):
    whole = tmp_path / "whole.npz"
    made_up(5).save(whole)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:end])
    with pytest.raises(InputError, match=r"cut\.npz can't be read"):
        Measurement.load(cut)


def test_a_model_of_forecasts_alone_plans_nothing_else():
    measured = made_up(8)
    model = ErrorModel(measured, weight, KINDS, (1,))
    found = [Frontier(model, COSTS).schedule(0.7), uniform(model, COSTS, 0.8)]
    found += neighbours(found[0], model.orders)
    for schedule in found:
        assert {segment.order for segment in schedule if segment.length} == {1}
    assert len(found) > 2
