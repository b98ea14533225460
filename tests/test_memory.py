"""Memory: nothing grows, the peak is what the statistics say, errors free the state, and what doesn't fit is left uncached."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import memory_checks
import sostenuto
from conftest import build_tiny, sample_loop
from memory_checks import METHODS, STEPS, build_wide, generate, growth, live_tensors
from sostenuto import (
    FORA,
    PAB,
    Anatomy,
    BlockList,
    Branch,
    CacheTable,
    DBCache,
    DeltaDiT,
    DuCa,
    EBCache,
    MagCache,
    SiteKind,
    StepState,
    TaylorSeer,
    TeaCache,
    ToCa,
)
from sostenuto.families import ANATOMIES

LIMITED_QUICKLY = ("branches, forecast", "stack", "partial", "run-time decision")


@pytest.mark.parametrize("generations", [30, pytest.param(1_000, marks=pytest.mark.slow)])
def test_many_generations_leave_no_object_and_no_tensor_more(generations):
    row = growth(generations, only=("branches",), steps=2)["branches"]
    assert row["tensors_grown"] == row["bytes_grown"] == 0
    assert row["objects_grown"] <= 20  # caches of Python itself; one a generation would be more


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
def test_the_peak_counted_over_live_tensors_is_that_of_the_statistics_and_of_the_prediction(separate):
    for name, row in memory_checks.peaks(separate).items():
        assert row["ratio"] == pytest.approx(1, abs=0.05), name
        assert row["stated"] <= row["predicted"] <= row["stated"] * (1.5 if separate else 1), name


def test_passes_of_different_batches_are_predicted_each_by_its_own_size(scheduler):
    """Guidance begins at the second step, in one batch with the conditional half."""
    network, latents = build_tiny(), torch.randn(1, 2, 8, 8)
    with torch.no_grad(), sostenuto.enable(network, FORA(4, anchor="start"), scheduler=scheduler) as handle:
        scheduler.set_timesteps(4)
        for step, timestep in enumerate(scheduler.timesteps):
            rows = 1 if step == 0 else 2
            labels = torch.tensor([3, 10][:rows])
            network(latents.repeat(rows, 1, 1, 1), timestep.expand(rows), labels)
        one = 6 * 16 * 32 * 4
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes == 3 * one  # at that step one and a half


@pytest.mark.parametrize("name", ["branches, forecast", "stack", "output", "partial", "run-time decision, forecast"])
@pytest.mark.parametrize("how", ["disabled", "error", pytest.param("dropped", marks=pytest.mark.slow)])
def test_the_state_is_freed(name, how, scheduler):
    network = build_wide()
    gc.collect()
    gc.freeze()  # what there is already is left out of the count
    _check_freed(network, name, how, scheduler)


def _check_freed(network, name, how, scheduler):
    handle = sostenuto.enable(network, METHODS[name](), scheduler=scheduler)
    with pytest.raises(KeyboardInterrupt) if how == "disabled" else pytest.raises(RuntimeError):
        hook = network.proj_out_2.register_forward_pre_hook(_Interrupt(how))
        generate(network, scheduler)
    hook.remove()
    if how == "disabled":
        handle.disable()
    elif how == "dropped":
        handle.disable()
        reference = weakref.ref(handle)
        del handle
        gc.collect()
        assert reference() is None
    gc.collect()
    # The clock's copies of the last call's inputs where it is still enabled.
    assert sum(1 for tensor in live_tensors() if tensor is not scheduler.timesteps) <= 3
    sostenuto.disable(network)


class _Interrupt:
    """Stops a generation in its fourth computed call."""

    def __init__(self, how):
        self.error, self.calls = KeyboardInterrupt if how == "disabled" else RuntimeError, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == 2:
            raise self.error("in the middle")


class _Net(nn.Module):
    """Is given its timestep as a number, so that every call has another signature."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(_Stage() for _ in range(2))

    def forward(self, x, timestep, cond=None):
        for stage in self.stages:
            x = stage(x)
        return x


class _Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.feed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        tokens = tokens + self.mix(tokens)
        return tokens + self.feed(tokens)


def test_calls_of_ever_other_shapes_are_forgotten(scheduler):
    branches = (Branch(SiteKind.SELF_ATTENTION, "mix"), Branch(SiteKind.MLP, "feed"))
    sostenuto.register_anatomy(_Net, Anatomy((BlockList("stages", branches, ("tokens",)),)))
    network = _Net().eval()
    try:
        with torch.no_grad(), sostenuto.enable(network, FORA(2), scheduler=scheduler) as handle:
            for tokens in range(1, 151):
                scheduler.set_timesteps(3)
                for timestep in scheduler.timesteps.tolist():
                    network(torch.randn(1, tokens, 4), timestep)
                if tokens % 50 == 0:  # those of this generation are there
                    assert handle.stats.macs > 0
            assert len(handle._dry_runs) <= 70
    finally:
        ANATOMIES.pop("_Net")


# --- a limit --------------------------------------------------------------------------------------------------------


def limited(network, method, scheduler, most, **kwargs):
    with sostenuto.enable(network, method, scheduler=scheduler, max_cache_bytes=most) as handle:
        latents, _ = sample_loop(network, scheduler, STEPS, **kwargs)
        stats, predicted = handle.stats, handle.predicted_cache_bytes
    assert stats.cache_bytes_peak <= predicted
    assert stats.cache_bytes_peak <= most * stats.num_passes
    return latents, stats


@pytest.mark.parametrize(
    "name", [name if name in LIMITED_QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_method_keeps_to_a_limit_and_with_none_allowed_computes_everything(name, separate, scheduler):
    network = build_tiny()
    plain, _ = sample_loop(network, scheduler, STEPS, separate_guidance=separate)
    with sostenuto.enable(network, METHODS[name](), scheduler=scheduler) as handle:
        sample_loop(network, scheduler, STEPS, separate_guidance=separate)
        whole = math.ceil(handle.predicted_cache_bytes / handle.stats.num_passes)
    for most in (whole, whole // 2):
        _, stats = limited(network, METHODS[name](), scheduler, most, separate_guidance=separate)
        assert any(action != "compute" for row in stats.plan for action in row) or most < whole
    scale = getattr(METHODS[name](), "eps_scale", None)
    latents, stats = limited(network, METHODS[name](), scheduler, 0, separate_guidance=separate)
    assert stats.cache_bytes_peak == 0
    assert {action for row in stats.plan for action in row} == {"compute"}
    assert scale is not None or torch.equal(latents, plain)


@pytest.mark.parametrize("method", [lambda: TeaCache(threshold=1.0), lambda: DBCache(1, 1, 1.0, warmup=1)])
def test_a_run_time_decision_that_does_not_fit_is_left_out_as_a_whole(method, scheduler):
    """One output and one signal: there is nothing between all and nothing."""
    one = 2 * 16 * 32 * 4
    assert limited(build_tiny(), method(), scheduler, 2 * one)[1].ideal_speedup > 1
    assert limited(build_tiny(), method(), scheduler, 2 * one - 1)[1].ideal_speedup == 1


def test_partial_sites_are_given_up_from_the_last_on(scheduler):
    one = 2 * 16 * 32 * 4
    method = ToCa(interval=3, fresh_ratio=0.25, middle_interval=None, selection="random")
    with sostenuto.enable(build_tiny(), method, scheduler=scheduler) as handle:
        sample_loop(handle._denoiser, scheduler, STEPS)
        whole = _skipped(handle.stats)
    kept = _skipped(limited(build_tiny(), method, scheduler, 2 * one)[1])
    assert len(whole) > 2
    assert kept == whole[:2]


def _skipped(stats):
    """The sites that don't compute at every step."""
    return [site for site in range(len(stats.sites)) if any(row[site] != "compute" for row in stats.plan)]


def test_a_stack_that_does_not_fit_is_given_up_with_the_branches_within_it(scheduler):
    method = METHODS["stack"]()
    assert isinstance(method, EBCache)
    _, stats = limited(build_tiny(), method, scheduler, 1)
    assert {action for row in stats.plan for action in row} == {"compute"}


def test_a_larger_pass_of_a_generation_keeps_to_the_limit_too(scheduler):
    network, latents, one = build_tiny(), torch.randn(1, 2, 8, 8), 16 * 32 * 4
    method = FORA(4, anchor="start")
    with torch.no_grad(), sostenuto.enable(network, method, scheduler=scheduler, max_cache_bytes=6 * one) as handle:
        scheduler.set_timesteps(4)
        for step, timestep in enumerate(scheduler.timesteps):
            rows = 1 if step < 2 else 2
            network(latents.repeat(rows, 1, 1, 1), timestep.expand(rows), torch.tensor([3, 10][:rows]))
        sizes = {index: state.num_bytes for index, state in handle._passes.items()}
        plan = handle._record.calls
        assert max(sizes.values()) <= 6 * one
        assert [op.action.value for op in plan[1][3].ops] == ["reuse"] * 6
        assert [op.action.value for op in plan[3][3].ops] == ["reuse"] * 3 + ["compute"] * 3


# --- one tensor where one is read, no longer than it is read ----------------------------------------------------------

C, A, M, B = StepState
ONE_OUTPUT = {
    "FORA": lambda: FORA(3),
    "FORA, from the first step on": lambda: FORA(3, anchor="start"),
    "PAB": lambda: PAB(spatial_range=2),
    "EB-Cache": lambda: EBCache(CacheTable((C, B, A, C, M, B, C, C))),
    "EB-Cache, one residual": lambda: EBCache(CacheTable((C, B, B, A, C, C, B, C), fill="stack")),
    "Δ-DiT": lambda: DeltaDiT(2, 3, 2),
    "ToCa": lambda: ToCa(interval=3, fresh_ratio=0.25, middle_interval=None, selection="random"),
    "DuCa": lambda: DuCa(interval=3, fresh_ratio=0.25, selection="random"),
    "MagCache": lambda: MagCache(ratios=(1.0,) * 8, threshold=0.2, max_consecutive=2),
}


def _watched(network, method, scheduler, steps):
    """After every step the addresses of each site's kept outputs; and the statistics."""
    after: list[list[list[int]]] = []
    with torch.no_grad(), sostenuto.enable(network, method, scheduler=scheduler) as handle:
        scheduler.set_timesteps(steps)
        for index, timestep in enumerate(scheduler.timesteps):
            network(torch.randn(2, 2, 8, 8), timestep.expand(2), torch.tensor([0, 1]))
            (state,) = handle._passes.values()
            after.append([[slot.data_ptr() for slot in slots if slot is not None] for slots in state.slots])
            assert index + 1 == len(after)
        return after, handle.stats


@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_a_site_keeps_one_output_from_the_first_that_is_read_to_the_last_that_reads(name, scheduler):
    steps = 8
    after, stats = _watched(build_tiny(), ONE_OUTPUT[name](), scheduler, steps)
    assert any(action in ("reuse", "partial") for row in stats.plan for action in row)
    for site in range(len(stats.sites)):
        column = [row[site] for row in stats.plan]
        reads = [step for step, action in enumerate(column) if action in ("reuse", "partial")]
        first = max((step for step in range(reads[0]) if column[step] == "compute"), default=0) if reads else steps
        for step in range(steps):
            is_kept = first <= step < max(reads, default=0)
            assert len(after[step][site]) == is_kept, (stats.sites[site], step)
        for step in range(1, steps):  # refreshed in place
            if after[step][site] and after[step - 1][site]:
                assert after[step][site] == after[step - 1][site]


@pytest.mark.parametrize("order", [1, 2])
def test_a_forecast_keeps_order_plus_one_outputs_and_none_after_the_last_one(order, scheduler):
    steps, first = 8, 3
    after, stats = _watched(build_tiny(), TaylorSeer(2, order, first), scheduler, steps)
    for site in range(len(stats.sites)):
        column = [row[site] for row in stats.plan]
        last = max(step for step, action in enumerate(column) if action == "forecast")
        assert max(len(kept[site]) for kept in after) == order + 1
        assert all(not kept[site] for kept in after[last:])
        memory = {address for kept in after for address in kept[site]}
        assert len(memory) == order + 1  # written over in turn
