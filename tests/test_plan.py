import pytest

from sostenuto import MethodError
from sostenuto.forecast import lagrange_weights
from sostenuto.plan import Action, Op, Plan, fit, lower, peak_bytes

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST


def column(actions, order=1):
    return Plan(tuple((a,) for a in actions), forecast_order=order)


def ops(actions, start=0, order=1):
    return [row[0] for row in lower(column(actions, order), start).ops[start:]]


def test_only_what_a_later_step_reads_is_stored():
    assert ops([C, C, R, C, C]) == [Op.COMPUTE, Op.STORE, Op.REUSE, Op.COMPUTE, Op.COMPUTE]


def test_a_forecast_stores_both_of_the_outputs_it_reads():
    program = lower(column([C, C, C, F, F]))
    assert [row[0] for row in program.ops] == [Op.COMPUTE, Op.STORE, Op.STORE, Op.FORECAST, Op.FORECAST]
    assert program.history[4][0] == (2, 1)
    assert program.last_reader == (4,)


def test_a_forecast_with_one_computed_step_behind_it_is_a_reuse():
    assert ops([C, F, C, F]) == [Op.STORE, Op.REUSE, Op.STORE, Op.FORECAST]


def test_a_generation_that_begins_in_the_middle_computes_first():
    assert ops([C, R, R, R, C], start=2) == [Op.STORE, Op.REUSE, Op.COMPUTE]


def test_peak_bytes_counts_what_lives_at_the_same_time():
    plan = Plan(((C, C), (R, C), (C, C), (C, R)))
    assert peak_bytes(lower(plan), plan.num_slots, [100, 10]) == 100  # the first site is free before the second stores
    forecast = column([C, C, F, C])
    assert peak_bytes(lower(forecast), forecast.num_slots, [8]) == 16


def test_fit_gives_up_the_last_sites_until_the_budget_holds():
    plan = Plan(((C, C, C), (R, R, R)))
    fitted = fit(plan, [10, 10, 10], 25)
    assert fitted.actions[1] == (R, R, C)
    assert fit(plan, [10, 10, 10], 0).actions[1] == (C, C, C)
    assert fit(plan, [10, 10, 10], 30) == plan


def test_rows_of_different_length_are_refused():
    with pytest.raises(MethodError, match="same sites"):
        Plan(((C,), (C, C)))


@pytest.mark.parametrize(
    ("k", "weights"), [(1, [1]), (2, [2, -1]), (3, [3, -3, 1]), (4, [4, -6, 4, -1]), (5, [5, -10, 10, -5, 1])]
)
def test_weights_on_a_uniform_grid_are_the_backward_differences_of_ab_cache(k, weights):
    assert lagrange_weights([-1.0 - j for j in range(k)], 0.0) == pytest.approx(weights)


def test_weights_are_exact_for_polynomials_on_any_grid():
    abscissae, target = [7.0, 4.0, 3.5], 9.0
    polynomial = lambda x: 2 - 3 * x + 0.5 * x * x  # noqa: E731
    weights = lagrange_weights(abscissae, target)
    assert sum(w * polynomial(x) for w, x in zip(weights, abscissae, strict=True)) == pytest.approx(polynomial(target))
    assert sum(weights) == pytest.approx(1)


def test_equal_abscissae_are_refused():
    with pytest.raises(ValueError, match="differ"):
        lagrange_weights([1.0, 1.0], 2.0)
