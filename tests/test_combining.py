"""Methods that skip different branches, put together: each does what it does alone; what overlaps is refused in words."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import (
    FORA,
    PAB,
    ABCache,
    Action,
    CacheTable,
    DBCache,
    DeepCache,
    DiTFastAttn,
    EBCache,
    EpsilonScaling,
    Forecast,
    MethodError,
    StepState,
    TaylorSeer,
    TeaCache,
    TimeShift,
    ToCa,
)
from sostenuto.methods.base import Combination, Facts
from sostenuto.plan import Plan
from tiny_pixart import build_pixart, naive_cached, sample_pixart
from unets import build_plain

STEPS = 6
C, A, M, B = StepState
SELF = [f"transformer_blocks.{block}.attn1" for block in range(3)]
CROSS = PAB(None, None, 3, (-1, 1001))  # cross-attention at every third step
MLP = EBCache(CacheTable((C, C, M, M, C, M)))


def windows(letters="CWRWCR"):
    """Self-attention over a window, or reused, in all blocks together."""
    actions = {"C": Action.COMPUTE, "R": Action.REUSE, "W": Action.WINDOW}
    return DiTFastAttn(CacheTable(tuple(dict.fromkeys(SELF, actions[letter]) for letter in letters)), 3)


@pytest.fixture
def pixart():
    return build_pixart()


@pytest.fixture
def scheduler():
    return DDIMScheduler(num_train_timesteps=1000)


def run(model, method, scheduler, **limits):
    """The images, and the handle after the generation."""
    with sostenuto.enable(model, method, scheduler=scheduler, **limits) as handle:
        return sample_pixart(model, scheduler, STEPS), handle


def by_hand(model, scheduler):
    """All three by three means: a naive cache of cross-attention, one of the MLP, and the engine for the windows alone."""
    reused = {"attn1": (), "attn2": (1, 2, 4, 5), "ff": (2, 3, 5)}
    return run(naive_cached(model, lambda block, branch, call: call in reused[branch]), windows(), scheduler)[0]


def test_each_does_at_its_branches_what_it_does_alone_in_any_order(pixart, scheduler):
    expected, handles = by_hand(pixart, scheduler), []
    for methods in itertools.permutations((CROSS, windows(), MLP)):
        got, handle = run(pixart, methods[0] | methods[1] | methods[2], scheduler)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        handles.append(handle)
    assert [site.id for site in handles[0].sites] == [site.id for site in sostenuto.inspect(pixart)]
    assert all(handle.plan == handles[0].plan and handle.sites == handles[0].sites for handle in handles)
    assert not torch.allclose(expected, sample_pixart(pixart, scheduler, STEPS))


def test_what_they_save_and_keep_adds_up(pixart, scheduler):
    alone = [run(pixart, method, scheduler)[1] for method in (CROSS, windows(), MLP)]
    _, both = run(pixart, CROSS | windows() | MLP, scheduler)
    uncached = both.stats.macs_uncached
    assert uncached - both.stats.macs == sum(uncached - handle.stats.macs for handle in alone) > 0
    for action in ("reuse", "window"):
        assert both.stats.actions.get(action, 0) == sum(handle.stats.actions.get(action, 0) for handle in alone)
    # All three keep their outputs from step 1 to step 2.
    kept = sum(handle.stats.cache_bytes_peak for handle in alone)
    assert both.predicted_cache_bytes == both.stats.cache_bytes_peak == kept


def test_a_bound_on_bytes_holds_for_all_together(pixart, scheduler):
    _, free = run(pixart, CROSS | windows("CCRRCR") | MLP, scheduler)
    most = free.stats.cache_bytes_peak // 2
    _, bound = run(pixart, CROSS | windows("CCRRCR") | MLP, scheduler, max_cache_bytes=most)
    assert 0 < bound.stats.cache_bytes_peak <= most
    assert bound.predicted_cache_bytes == bound.stats.cache_bytes_peak
    assert {"reuse"} <= set(bound.stats.plan[2][:3])
    assert set(bound.stats.plan[2][-3:]) == {"compute"}  # the last sites are given up


def test_a_forecaster_and_a_noise_scale_are_for_all_of_them(pixart, scheduler):
    """As one table that lists the same gaps, with its own forecast and scale."""
    methods = (CROSS, EBCache(CacheTable((C, C, M, M, C, M))))
    gaps = {"attn1": (), "attn2": (1, 2, 4, 5), "ff": (2, 3, 5)}
    rows = tuple(
        {
            site.id: Action.FORECAST if step in gaps[site.id.rpartition(".")[2]] else Action.COMPUTE
            for site in sostenuto.inspect(pixart)
        }
        for step in range(STEPS)
    )
    expected, one = run(pixart, EBCache(CacheTable(rows, forecast_order=2), eps_scale=1.02), scheduler)
    got, handle = run(pixart, methods[0] | Forecast(2) | EpsilonScaling(1 / 1.02) | methods[1], scheduler)
    torch.testing.assert_close(got, expected)
    assert handle.stats.plan == one.stats.plan
    assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes == one.stats.cache_bytes_peak


def test_forecasts_by_different_rules_need_one_for_all(pixart, scheduler):
    linear = EBCache(CacheTable((C, C, M, M, C, M), forecast_order=1))
    parabolic = EBCache(CacheTable((C, C, C, A, A, C), forecast_order=2))
    with pytest.raises(
        MethodError, match=r"EBCache \| EBCache can't be combined: .* different forecasts; add Forecast"
    ):
        run(pixart, linear | parabolic, scheduler)
    _, handle = run(pixart, linear | parabolic | Forecast(1), scheduler)
    assert handle.stats.actions["forecast"] == 3 * (3 + 2 * 2)
    _, handle = run(pixart, linear | CROSS, scheduler)  # what reuses is content with any rule
    assert (handle.stats.actions["forecast"], handle.stats.actions["reuse"]) == (3 * 3, 3 * 4)


@pytest.mark.parametrize(
    ("combined", "words"),
    [
        (lambda: MLP | FORA(2), r"EBCache \| FORA can't be combined: FORA skips branches of every kind"),
        (
            lambda: CROSS | PAB(),
            r"PAB \| PAB can't be combined: both skip transformer_blocks.0.attn2 \(cross-attention\)",
        ),
        (lambda: CROSS | windows() | PAB(2, None, None), r"DiTFastAttn \| PAB .* both skip transformer_blocks.0.attn1"),
        (lambda: windows() | windows("CRCRCR"), "each has a way of its own to run transformer_blocks.0.attn1"),
        (
            lambda: CROSS | ABCache(),
            r"PAB \| ABCache can't be combined: ABCache skips branches of every kind",
        ),
        (
            lambda: TaylorSeer(3, lite=True) | CROSS,
            "TaylorSeer skips branches of every kind",
        ),
        (
            lambda: CROSS | EBCache(CacheTable((C, B, C, M, M, C), fill="stack")),
            "EBCache skips branches of every kind",
        ),
        (lambda: CROSS | TeaCache(), r"PAB \| TeaCache can't be combined: TeaCache decides while the network runs"),
        (lambda: DBCache(1, 1) | FORA(2), "DBCache decides while the network runs what is skipped; keep one of them"),
        (lambda: ToCa() | CROSS, "ToCa decides while the network runs what is skipped"),
    ],
)
def test_what_does_not_go_together_is_refused_and_leaves_the_model_as_it_was(pixart, scheduler, combined, words):
    stock = sample_pixart(pixart, scheduler, STEPS)
    ran = []
    hook = pixart.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(MethodError, match=words):
        run(pixart, combined(), scheduler)
    hook.remove()
    assert not ran
    assert not any("forward" in vars(module) for module in pixart.modules())
    assert torch.equal(sample_pixart(pixart, scheduler, STEPS), stock)


def test_one_that_says_it_leaves_something_but_skips_more_than_branches_is_refused(scheduler):
    class Part(DeepCache):
        skips_every_kind = False

    with pytest.raises(MethodError, match=r"Part \| Part can't be combined: Part skips 'up_blocks"):
        sostenuto.enable(build_plain(1, num_class_embeds=11), Part(2) | Part(3), scheduler=scheduler)


def test_a_plan_of_another_length_is_refused_beside_others_too(scheduler):
    class Every(FORA):
        skips_every_kind = False

    class Short(Every):
        def plan(self, facts: Facts) -> Plan:
            return Plan(super().plan(facts).actions[1:])

    model = build_tiny()
    for method in (Short(1), Short(1) | Every(1)):
        with (
            sostenuto.enable(model, method, scheduler=scheduler),
            pytest.raises(MethodError, match="the plan has 5 steps, the sampler runs 6"),
        ):
            sample_loop(model, scheduler)


def test_a_combination_within_one_shifts_the_time_only_where_a_part_does():
    inner = Combination((FORA(2), EpsilonScaling(1.01)))
    assert not inner.shifts_time
    assert Combination((inner, TimeShift())).shifts_time
