"""What every method promises: one matrix, method by promise, on tiny networks with random weights."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import sample_loop
from promise_cases import CASES, Case, build, new_scheduler

STEPS = 6


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture
def model(case):
    return build(case)


def run(model, case, **kwargs):
    return sample_loop(model, new_scheduler(case), STEPS, **kwargs)[0]


def cached(model, case, method=None, **kwargs):
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, method or case.method(), scheduler=scheduler) as handle:
        return sample_loop(model, scheduler, STEPS, **kwargs)[0], handle


def test_disabled_is_bit_identical_and_leaves_no_trace(model, case):
    before = run(model, case)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    cached(model, case)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert torch.equal(run(model, case), before)


def test_all_computed_is_bit_identical(model, case):
    if case.neutral is None:
        pytest.skip("the method has no setting that computes everything")
    assert torch.equal(cached(model, case, case.neutral())[0], run(model, case))


@pytest.mark.parametrize("separate_guidance", [False, True])
def test_all_computed_agrees_with_guidance_fused_or_in_two_calls(model, case, separate_guidance):
    if case.neutral is None:
        pytest.skip("the method has no setting that computes everything")
    plain = run(model, case, separate_guidance=separate_guidance)
    assert torch.equal(cached(model, case, case.neutral(), separate_guidance=separate_guidance)[0], plain)


def test_two_generations_in_a_row_equal_two_fresh_ones(model, case):
    fresh = [cached(model, case, seed=seed)[0] for seed in (1, 2)]
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        rows = [sample_loop(model, scheduler, STEPS, seed=seed)[0] for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(fresh, rows, strict=True))


@pytest.mark.parametrize("stop_at", [1, 3, STEPS - 1])
def test_an_interrupted_generation_leaves_nothing_stale(model, case, stop_at):
    fresh = cached(model, case, seed=2)[0]
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, scheduler, STEPS, seed=1, stop_at=stop_at)
        assert torch.equal(sample_loop(model, scheduler, STEPS, seed=2)[0], fresh)


def test_an_exception_inside_a_block_leaves_nothing_stale(model, case):
    fresh = cached(model, case, seed=2)[0]
    scheduler = new_scheduler(case)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("inside a block")

    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        hook = case.inner_module(model).register_forward_pre_hook(fail)
        with contextlib.suppress(RuntimeError):  # a method that skips the block from then on never comes to fail
            sample_loop(model, scheduler, STEPS, seed=1)
        hook.remove()
        assert torch.equal(sample_loop(model, scheduler, STEPS, seed=2)[0], fresh)


def test_separate_passes_do_not_see_each_other(model, case):
    """With the same conditioning's value in both passes the two would mix unnoticed; here each equals its own run."""
    guided, _ = cached(model, case, separate_guidance=True)
    again, handle = cached(model, case, separate_guidance=True)
    assert torch.equal(guided, again)
    assert handle.stats.num_passes == 2


def test_the_batch_may_change_between_generations(model, case):
    fresh = {batch: cached(model, case, batch=batch)[0] for batch in (1, 2, 4)}
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        for batch in (2, 4, 1, 2):
            assert torch.equal(sample_loop(model, scheduler, STEPS, batch=batch)[0], fresh[batch])


def test_bfloat16_state(model, case):
    model.to(torch.bfloat16)
    latents, handle = cached(model, case, dtype=torch.bfloat16)
    assert latents.dtype == torch.bfloat16
    assert torch.isfinite(latents.float()).all()
    half = handle._record.bytes_peak
    model.float()
    assert 2 * half == cached(model, case)[1]._record.bytes_peak


def test_it_skips_something_and_its_statistics_equal_an_independent_count_of_what_ran(model, case):
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler) as handle:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            latents = sample_loop(model, scheduler, STEPS)[0]
        stats = handle.stats
    executed = counter.get_total_flops() // 2
    assert stats.macs == executed
    assert len(stats.plan) == stats.num_steps == STEPS
    assert torch.isfinite(latents).all()
    if case.skips:
        assert stats.ideal_speedup > 1.02
        assert not torch.equal(latents, run(model, case))


def test_copies_and_pickles_are_those_of_the_plain_network(model, case):
    stock = run(model, case)
    with sostenuto.enable(model, case.method(), scheduler=new_scheduler(case)):
        twin = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for plain in (*twin, pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        assert torch.equal(run(plain, case), stock)


# A compilation takes seconds; one of each way of filling a gap, and of being refused, is in every run (ToCa's and
# TaylorSeer's in their own files).
COMPILED_QUICKLY = (
    "none",
    "eb, stack",
    "ab",
    "fora",
    "teacache",
    "dbcache",
    "fora | epsilon-scaling",
)
COMPILED = [case if case.name in COMPILED_QUICKLY else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", COMPILED, indirect=True, ids=[case.name for case in CASES])
def test_a_compiled_denoiser_gives_the_same_or_is_refused(model, case):
    method = case.method()
    torch._dynamo.reset()
    eager = cached(model, case)[0]
    model.compile(backend="aot_eager", fullgraph=True)
    if not all(part.compiles and not part.observed(model) for part in sostenuto.methods.base.parts(method)):
        with pytest.raises(sostenuto.MethodError, match="compiled"):
            sostenuto.enable(model, method, scheduler=new_scheduler(case))
        assert not any("sostenuto" in name for module in model.modules() for name in vars(module))
        return
    torch.testing.assert_close(cached(model, case)[0], eager, rtol=1e-4, atol=1e-4)


def test_every_method_has_a_case():
    tested = {part.name for case in CASES for part in sostenuto.methods.base.parts(case.method())}
    assert tested == set(sostenuto.available_methods())
