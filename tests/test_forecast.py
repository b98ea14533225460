"""How gaps are filled: the weights against other formulas, and a forecaster put on another method's plan."""

import math
import random

import pytest
import torch

import oracle
import sostenuto
from conftest import sample_loop
from sostenuto import (
    FORA,
    Action,
    CacheTable,
    DBCache,
    EBCache,
    EpsilonScaling,
    Forecast,
    MethodError,
    NoCache,
    Plan,
    StepState,
    TaylorSeer,
    TeaCache,
    ToCa,
)
from sostenuto.forecast import binomial_weights, lagrange_weights, taylor_weights
from sostenuto.methods.base import Method
from sostenuto.tap import combine
from test_engine import run_oracle

C, A, M, B = StepState
STATES = (C, C, B, A, C, M, B, C, B)


def official_taylor(points, step, order):
    """The official recursion on values: factors at every computed step, differences over the newest gap, Taylor's formula."""
    factors, newest = [], None
    for at, value in points:  # oldest first
        updated = [value]
        for i in range(min(order, len(factors))):
            updated.append((updated[i] - factors[i]) / (at - newest))
        factors, newest = updated, at
    x = step - newest
    return sum(factor * x**i / math.factorial(i) for i, factor in enumerate(factors))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_binomial_weights_are_lagranges_on_a_uniform_grid_and_amplify_noise_by_2_to_the_k_minus_1(count):
    weights = binomial_weights(count)
    assert weights == pytest.approx(lagrange_weights([-1.0 - j for j in range(count)], 0.0))
    assert sum(weights) == 1
    assert sum(map(abs, weights)) == 2**count - 1
    for degree in range(count):
        assert sum(w * (7.0 - j) ** degree for j, w in enumerate(weights, 1)) == pytest.approx(7.0**degree)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_lagrange_weights_are_newtons_divided_differences_and_exact_on_any_grid(count):
    places = sorted(random.Random(count).sample(range(40), count), reverse=True)
    target = places[0] + 3
    weights = lagrange_weights(places, target)
    values = [torch.randn(5, dtype=torch.float64) for _ in places]
    expected = oracle.extrapolate(list(zip(places, values, strict=True)), target)
    torch.testing.assert_close(sum(w * v for w, v in zip(weights, values, strict=True)), expected)
    for degree in range(count):
        got = sum(w * (p / 10) ** degree for w, p in zip(weights, places, strict=True))
        assert got == pytest.approx((target / 10) ** degree)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_taylor_weights_are_the_official_recursion_for_any_spacing(order, seed):
    """On the last O + 1 outputs alone they equal the recursion over the whole history."""
    steps = sorted(random.Random(seed).sample(range(50), 8))
    values = [torch.randn(6, dtype=torch.float64) for _ in steps]
    target = steps[-1] + 1 + seed
    expected = official_taylor(list(zip(steps, values, strict=True)), target, order)
    read = steps[: -order - 2 : -1]
    weights = taylor_weights(read, target)
    assert len(weights) == order + 1
    torch.testing.assert_close(sum(w * v for w, v in zip(weights, values[::-1], strict=False)), expected)
    assert sum(weights) == pytest.approx(1)


def test_taylor_weights_are_exact_for_lines_and_not_beyond():
    read, target = [12, 9, 4], 14
    for order in (1, 2):
        weights = taylor_weights(read[: order + 1], target)
        line = sum(w * (3 - 0.5 * p) for w, p in zip(weights, read, strict=False))
        if order == 1:
            assert line == pytest.approx(3 - 0.5 * target)
            assert weights == pytest.approx(lagrange_weights(read[:2], target))
    uniform = taylor_weights([8, 4, 0], 10)  # f + x∇f/N + x²∇²f/(2N²), N = 4, x = 2
    assert uniform == pytest.approx([1 + 1 / 2 + 1 / 8, -1 / 2 - 1 / 4, 1 / 8])
    assert sum(w * p * p for w, p in zip(uniform, [8, 4, 0], strict=True)) != pytest.approx(100)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_forecasts_from_bfloat16_are_right_to_bfloat16_rounding(order):
    read = [24, 18, 12, 6, 4][: order + 1]
    weights = lagrange_weights(read, 26)
    generator = torch.Generator().manual_seed(order)
    values = [torch.randn(400, generator=generator) for _ in range(3)]
    slots = [(values[0] + values[1] * (p / 50) + values[2] * (p / 50) ** 2).bfloat16() for p in read]
    exact = sum(w * slot.double() for w, slot in zip(weights, slots, strict=True))
    dtype = torch.bfloat16 if order == 1 else torch.float32
    got = combine(list(slots), torch.tensor(weights, dtype=dtype))
    assert got.dtype == torch.bfloat16
    bound = 2**-8 * exact.abs() + 1e-4
    if order == 1:  # the weight of the difference is itself rounded
        bound += 2**-8 * weights[0] * (slots[0].double() - slots[1].double()).abs()
    assert bool(((got.double() - exact).abs() <= bound).all())


def test_a_table_with_another_forecaster_gives_what_the_naive_oracle_gives(tiny, scheduler):
    def skip(site, step):
        return STATES[step] is B or STATES[step] is (A if "attn" in site else M)

    table = EBCache(CacheTable(STATES))
    for order in (1, 2):
        expected, _ = run_oracle(tiny, scheduler, skip, len(STATES), order)
        with sostenuto.enable(tiny, table | Forecast(order), scheduler=scheduler) as handle:
            got, _ = sample_loop(tiny, scheduler, len(STATES))
            carried = handle.stats.plan
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for step, state in enumerate(STATES):
            assert [action != "compute" for action in carried[step]] == [state.skips(site) for site in handle.sites]


@pytest.mark.parametrize("rule", ["lagrange", "taylor"])
def test_a_forecaster_on_fora_is_taylorseer_with_the_same_steps(tiny, scheduler, rule):
    differences = "divided" if rule == "lagrange" else "last-gap"
    with sostenuto.enable(tiny, Forecast(2, rule) | FORA(3, anchor="start"), scheduler=scheduler):
        one, _ = sample_loop(tiny, scheduler, 9)
    method = TaylorSeer(interval=3, order=2, first_enhance=1, differences=differences)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        other, _ = sample_loop(tiny, scheduler, 9)
    assert torch.equal(one, other)


def test_the_rule_last_undoes_a_forecast(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(3, forecast_order=2) | Forecast(2, "last"), scheduler=scheduler):
        one, _ = sample_loop(tiny, scheduler, 7)
    with sostenuto.enable(tiny, FORA(3), scheduler=scheduler) as handle:
        other, _ = sample_loop(tiny, scheduler, 7)
        assert handle.stats.actions["forecast"] == 0
    assert torch.equal(one, other)


def test_a_forecaster_computes_as_much_as_the_method_it_is_put_on(tiny, scheduler):
    macs = []
    for method in (FORA(3), FORA(3) | Forecast(order=1) | EpsilonScaling(1.01)):
        with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
            sample_loop(tiny, scheduler, 7)
            macs.append(handle.stats.macs)
    assert macs[0] == macs[1]


def test_a_forecaster_alone_or_beside_what_never_skips_is_refused(tiny, scheduler):
    for method in (Forecast(), Forecast() | EpsilonScaling(1.1), NoCache() | Forecast(), "forecast"):
        with pytest.raises(MethodError, match=r"combine it with one that skips"):
            sostenuto.enable(tiny, method, scheduler=scheduler)


def test_two_forecasters_are_refused():
    with pytest.raises(MethodError, match="says how gaps are filled"):
        FORA(2) | Forecast(1) | Forecast(2)


def test_a_forecaster_of_partial_tokens_or_of_a_run_time_decision_is_refused():
    with pytest.raises(MethodError, match="some tokens only"):
        Forecast().refine(Plan(((Action.COMPUTE,), (Action.PARTIAL,)), ratios=((0.0,), (0.5,))))

    class Deciding(Method):
        def policy(self, facts):
            return object()

    for method in (Deciding(), ToCa(), TeaCache(), DBCache()):
        for combined in (lambda m=method: m | Forecast(), lambda m=method: Forecast() | m):
            with pytest.raises(MethodError, match=f"{type(method).__name__} decides while the network runs"):
                combined()


@pytest.mark.parametrize("wrong", [dict(order=5), dict(order=-1), dict(order=1.0), dict(rule="newton")])
def test_a_forecaster_out_of_range_is_refused(wrong):
    with pytest.raises(MethodError, match=f"Forecast's {next(iter(wrong))} must be"):
        Forecast(**wrong)
