"""What every method promises: one matrix, method by promise, on tiny networks with random weights."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import sample_loop
from promise_cases import CASES, Case, build, new_scheduler
from sostenuto.methods.base import Method, parts
from what_ran import Watched

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


def attributes(model):
    """The names of what each module has."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


def test_disabled_is_bit_identical_and_leaves_no_trace(model, case):
    before, names = run(model, case), attributes(model)
    cached(model, case)
    assert attributes(model) == names
    assert torch.equal(run(model, case), before)


@pytest.mark.parametrize("guidance", [None, "fused_guidance", "separate_guidance"])
def test_all_computed_is_bit_identical_however_guidance_calls(model, case, guidance):
    how = {guidance: True} if guidance else {}
    assert torch.equal(cached(model, case, case.neutral(), **how)[0], run(model, case, **how))


# What decides while the network runs decides for a batch as a whole, so that halves of a batch may skip other steps than
# two calls do.
PLANNED = [case for case in CASES if all(type(part).policy is Method.policy for part in parts(case.method()))]


@pytest.mark.parametrize("case", PLANNED, indirect=True, ids=lambda case: case.name)
def test_fused_and_separate_guidance_agree(model, case):
    fused, separate = (cached(model, case, **{how: True})[0] for how in ("fused_guidance", "separate_guidance"))
    torch.testing.assert_close(fused, separate, rtol=1e-3, atol=1e-3)
    assert not torch.equal(fused, cached(model, case)[0])


def test_generations_in_a_row_equal_fresh_ones(model, case):
    """Also where the last one leaves out the first step, so that what were left of the one before would be read at once."""
    generations = [{"seed": 1}, {"seed": 2}, {"seed": 3, "first_step": 1}]
    fresh = [cached(model, case, **generation)[0] for generation in generations]
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        rows = [sample_loop(model, scheduler, STEPS, **generation)[0] for generation in generations]
    assert all(map(torch.equal, fresh, rows))


def test_an_interrupted_generation_leaves_nothing_stale(model, case):
    """Neither to a generation from the first step on nor to one that begins where the other was given up."""
    fresh = [cached(model, case, seed=2, first_step=step)[0] for step in range(STEPS)]
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        for stop_at in range(1, STEPS):
            for first_step in (0, stop_at):
                with pytest.raises(KeyboardInterrupt):
                    sample_loop(model, scheduler, STEPS, seed=1, stop_at=stop_at)
                latents = sample_loop(model, scheduler, STEPS, seed=2, first_step=first_step)[0]
                assert torch.equal(latents, fresh[first_step])


def test_an_exception_inside_a_block_leaves_nothing_stale(model, case):
    """To a generation that begins at the step that failed."""
    fresh = [cached(model, case, seed=2, first_step=step)[0] for step in range(STEPS)]
    scheduler, block, steps, calls = new_scheduler(case), case.inner_module(model), [], []

    def network(*args):
        steps.append(args)
        return model(*args)

    def fails(last):
        def fail(*_):
            calls.append(None)
            if len(calls) == last:
                raise RuntimeError("inside a block")

        steps.clear()
        calls.clear()
        return block.register_forward_pre_hook(fail)

    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        with fails(last=None):
            sample_loop(model, scheduler, STEPS, seed=1)
        for call in range(2, len(calls) + 1):  # a method may skip the block at some steps
            with fails(last=call), pytest.raises(RuntimeError, match="inside a block"):
                sample_loop(network, scheduler, STEPS, seed=1)
            first_step = len(steps) - 1
            latents = sample_loop(model, scheduler, STEPS, seed=2, first_step=first_step)[0]
            assert torch.equal(latents, fresh[first_step])


def test_separate_passes_do_not_see_each_other(model, case):
    """Between two others of its step a pass puts out what it does alone.

    What passes share by design doesn't depend on them: the random tokens of ToCa and DuCa, drawn from the step alone.
    DiTFastAttn's sharing between conditional and unconditional is for the halves of one batch; no case here has it, as it is
    refused in separate calls.
    """

    def between(latents, timestep, labels):
        model(latents, timestep, (labels + 5) % 10)
        output = model(latents, timestep, labels)
        model(latents, timestep, torch.full_like(labels, 10))
        return output

    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler) as handle:
        alone = sample_loop(model, scheduler, STEPS)[1]
        amid = sample_loop(between, scheduler, STEPS)[1]
        assert handle._record.num_passes == 3
    assert all(map(torch.equal, amid, alone))


CHANGES = {
    "batch": (2, 4, 1, 2),
    "size": (8, 12, 8),
    "dtype": (torch.float32, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("what", CHANGES)
def test_batch_resolution_and_dtype_may_change_between_generations(model, case, what):
    """Each begins where one of another kind was given up."""
    model.bfloat16().float()  # weights that are the same in both
    scheduler = new_scheduler(case)

    def generate(value, **kwargs):
        model.to(value if what == "dtype" else torch.float32)
        return sample_loop(model, scheduler, STEPS, **{what: value}, **kwargs)[0]

    def fresh(value):
        with sostenuto.enable(model, case.method(), scheduler=scheduler):
            return generate(value, first_step=1)

    expected = {value: fresh(value) for value in dict.fromkeys(CHANGES[what])}
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        for before, value in pairwise(CHANGES[what]):
            with pytest.raises(KeyboardInterrupt):
                generate(before, stop_at=1)
            assert torch.equal(generate(value, first_step=1), expected[value])


def test_bfloat16_state(model, case):
    model.to(torch.bfloat16)
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler) as handle:
        outputs = sample_loop(model, scheduler, STEPS, dtype=torch.bfloat16)[1]
    assert all(output.dtype == torch.bfloat16 and output.isfinite().all() for output in outputs)
    half = handle._record.bytes_peak
    assert (half > 0) == case.skips
    model.float()
    assert 2 * half == cached(model, case)[1]._record.bytes_peak


def test_it_skips_something_and_its_statistics_equal_an_independent_count_of_what_ran(model, case):
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler) as handle:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, Watched(model) as watched:
            latents = sample_loop(watched, scheduler, STEPS, separate_guidance=True)[0]
        stats = handle.stats
    assert stats.macs == counter.get_total_flops() // 2
    assert len(stats.plan) == stats.num_steps == STEPS
    ran = watched.plan(stats.plan, stats.sites, num_passes=2)
    assert ran[::2] == stats.plan
    assert Counter(action for row in ran for action in row) == Counter(stats.actions)
    assert torch.isfinite(latents).all()
    if case.skips:
        assert stats.ideal_speedup > 1.02
        assert not torch.equal(latents, run(model, case, separate_guidance=True))


def test_copies_and_pickles_are_those_of_the_plain_network(model, case):
    stock, names, fresh = run(model, case), attributes(model), cached(model, case)[0]
    scheduler = new_scheduler(case)
    with sostenuto.enable(model, case.method(), scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, scheduler, STEPS, stop_at=STEPS - 1)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for twin in twins:
            assert attributes(twin) == names
            assert torch.equal(run(twin, case), stock)
        assert torch.equal(sample_loop(model, scheduler, STEPS)[0], fresh)


# A compilation takes seconds; one of each way of filling a gap (TaylorSeer's and that of random tokens in their own files),
# and whatever is refused, is in every run.
COMPILED_QUICKLY = (
    "none",
    "ab",
    "toca",
    "teacache",
    "dbcache",
)
COMPILED = [case if case.name in COMPILED_QUICKLY else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", COMPILED, indirect=True, ids=[case.name for case in CASES])
def test_a_compiled_denoiser_gives_the_same_or_is_refused(model, case):
    method = case.method()
    torch._dynamo.reset()
    counters.clear()
    eager = cached(model, case)[0]
    model.compile(backend="aot_eager", fullgraph=True)
    if not all(part.compiles and not part.observed(model) for part in parts(method)):
        with pytest.raises(sostenuto.MethodError, match="compiled"):
            sostenuto.enable(model, method, scheduler=new_scheduler(case))
        assert not any("sostenuto" in name for module in model.modules() for name in vars(module))
        return
    torch.testing.assert_close(cached(model, case)[0], eager, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0


def test_every_method_has_a_case():
    tested = {part.name for case in CASES for part in parts(case.method())}
    assert tested == set(sostenuto.available_methods())
