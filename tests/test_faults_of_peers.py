"""Faults that were reproduced in other caching libraries, each as a test that this one doesn't have it."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import sostenuto
from calling_oracle import inputs, prediction, schedule, tiny
from conftest import sample_loop, supported
from promise_cases import CASES, build, new_scheduler
from sostenuto import FORA, PAB, DBCache, MagCache, TaylorSeer, TeaCache
from sostenuto.attachment import Attachment
from sostenuto.counting import MacCounter

SEPARATE = (
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "CogView4Transformer2DModel",
)
STEPS = 6
EVERYWHERE = (0, 999)  # the window of timesteps in which attention is broadcast
BRANCHES = [case for case in CASES if case.skips]


@torch.no_grad()
def calls(network, script, timesteps):
    """The predictions of calls of ``(step, prompt)``; the latents of a step are the same for every prompt."""
    outputs = []
    for step, prompt in script:
        arguments = inputs(type(network).__name__, step, timesteps, seed=prompt)
        arguments["hidden_states"] = inputs(type(network).__name__, step, timesteps)["hidden_states"]
        outputs.append(prediction(network(**arguments)))
    return outputs


@pytest.mark.parametrize("name", SEPARATE)
def test_guidance_in_two_passes_does_not_become_a_no_op(name):
    """PAB elsewhere keeps one state per module: every unconditional pass gets the conditional one's attention."""
    scheduler, timesteps = schedule(STEPS)
    network, alone = tiny(name), {}
    for prompt in (1, 2):
        with sostenuto.enable(network, PAB(2, 2, 2, EVERYWHERE), scheduler=scheduler) as handle:
            alone[prompt] = calls(network, [(step, prompt) for step in range(STEPS)], timesteps)
            assert handle.stats.actions["reuse"] > 0
        scheduler.timesteps = scheduler.timesteps.clone()
    with sostenuto.enable(network, PAB(2, 2, 2, EVERYWHERE), scheduler=scheduler):
        both = calls(network, [(step, prompt) for step in range(STEPS) for prompt in (1, 2)], timesteps)
    assert all(map(torch.equal, both[::2], alone[1]))
    assert all(map(torch.equal, both[1::2], alone[2]))
    assert not torch.equal(both[1], both[0])


@pytest.mark.parametrize("name", [*SEPARATE, "PixArtTransformer2DModel", "SanaTransformer2DModel"])
@pytest.mark.parametrize("method", [TaylorSeer, *(pytest.param(m, marks=pytest.mark.slow) for m in (FORA, TeaCache))])
def test_a_default_configuration_taps_something_and_skips_something(name, method):
    """TaylorSeer's default elsewhere hooks nothing on Wan and says that it is enabled."""
    scheduler, timesteps = schedule(STEPS)
    network = tiny(name)
    made = method() if method is not TeaCache else TeaCache(threshold=10.0)
    with sostenuto.enable(network, made, scheduler=scheduler) as handle:
        assert handle.sites
        calls(network, [(step, 1) for step in range(STEPS)], timesteps)
        assert any(action != "compute" for row in handle.stats.plan for action in row)


@pytest.mark.parametrize("case", BRANCHES, ids=lambda case: case.name)
def test_after_an_interrupted_call_the_next_prompt_begins_with_its_own_features(case):
    """First Block Cache elsewhere serves the next prompt's first step from the old prompt's features."""
    network, scheduler = build(case), new_scheduler(case)
    stock = sample_loop(network, scheduler, STEPS, seed=7)[1][0]
    if case.method().shifts_time or case.method().scales_noise:
        with sostenuto.enable(network, case.method(), scheduler=scheduler):
            stock = sample_loop(network, scheduler, STEPS, seed=7)[1][0]
    with sostenuto.enable(network, case.method(), scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(network, scheduler, STEPS, seed=1, stop_at=4)
        assert torch.equal(sample_loop(network, scheduler, STEPS, seed=7)[1][0], stock)


@pytest.mark.parametrize("method", [lambda: DBCache(1, 1, 1.0, warmup=1), lambda: FORA(STEPS, anchor="start")])
def test_a_step_without_guidance_does_not_swap_the_branches(method):
    """cache-dit tells the passes apart by parity: one unconditional call left out, and both are wrong from then on."""
    network, (scheduler, timesteps) = tiny("WanTransformer3DModel"), schedule(STEPS)
    with sostenuto.enable(network, method(), scheduler=scheduler):
        alone = calls(network, [(step, 1) for step in range(STEPS)], timesteps)
    scheduler.timesteps = scheduler.timesteps.clone()
    script = [(step, prompt) for step in range(STEPS) for prompt in (1, 2) if (step, prompt) != (2, 2)]
    with sostenuto.enable(network, method(), scheduler=scheduler):
        both = calls(network, script, timesteps)
    guided = [output for (_, prompt), output in zip(script, both, strict=True) if prompt == 1]
    assert all(map(torch.equal, guided, alone))


@pytest.mark.parametrize("case", BRANCHES, ids=lambda case: case.name)
@pytest.mark.parametrize("first", [1, 3, STEPS - 1])
@torch.no_grad()
def test_a_generation_may_begin_where_the_method_would_skip(case, first):
    """FasterCache elsewhere crashes on a guidance-distilled model when the first step lies inside the range it skips."""
    network, scheduler = build(case), new_scheduler(case)
    scheduler.set_timesteps(STEPS)
    latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([3])
    with sostenuto.enable(network, case.method(), scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps[first:]:
            network(latents, timestep[None], labels)
        step, _, _, carried = handle._record.calls[
            0
        ]  # the statistics would count multiply-accumulates too, which takes long
        assert step == first
        assert {op.action.value for op in carried.ops} == {"compute"}


@pytest.mark.parametrize("case", BRANCHES, ids=lambda case: case.name)
def test_an_enable_that_fails_in_the_middle_leaves_nothing_behind(case, monkeypatch):
    """First Block Cache elsewhere raises on Bria and leaves a hook on its first block."""
    network = build(case)
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    attach, left = Attachment.attach, [0]

    def failing(self):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("in the middle of attaching")
        attach(self)

    monkeypatch.setattr(Attachment, "attach", failing)
    for place in range(3):
        left[0] = place
        with contextlib.suppress(RuntimeError):
            sostenuto.enable(network, case.method(), scheduler=new_scheduler(case)).disable()
        assert {name: dict(vars(module)) for name, module in network.named_modules()} == before


@pytest.mark.parametrize("name", ["BriaTransformer2DModel", "WanVACETransformer3DModel", "ConsisIDTransformer3DModel"])
def test_what_is_injected_between_the_blocks_is_not_lost_and_not_added_twice(name):
    """With identical inputs First Block Cache and cache-dit elsewhere are off by 0.87 on WanVACE, 0.53 on ConsisID."""
    assert "branches" in supported(name).macs


@pytest.mark.parametrize(
    "method",
    [
        lambda: DBCache(1, 1, 1.0),
        *(pytest.param(m, marks=pytest.mark.slow) for m in (lambda: MagCache((1.0,) * STEPS), lambda: TeaCache())),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "WanVACETransformer3DModel",
        pytest.param("BriaTransformer2DModel", marks=pytest.mark.slow),
        pytest.param("ConsisIDTransformer3DModel", marks=pytest.mark.slow),
    ],
)
def test_a_range_method_works_there_or_is_refused_without_a_trace(name, method):
    network, (scheduler, timesteps) = tiny(name), schedule(STEPS)
    before = {path: dict(vars(module)) for path, module in network.named_modules()}
    try:
        with sostenuto.enable(network, method(), scheduler=scheduler) as handle:
            calls(network, [(step, 1) for step in range(STEPS)], timesteps)
            assert set(handle.stats.plan[0]) == {"compute"}
    except sostenuto.SostenutoError as refused:
        assert str(refused)  # noqa: PT017
    assert {path: dict(vars(module)) for path, module in network.named_modules()} == before


def test_attention_counts():
    """torch's own counter reports 0 for the fused attention of CPUs."""
    batch, heads, tokens, channels = 2, 3, 5, 7
    q = torch.randn(batch, heads, tokens, channels)
    with MacCounter() as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.macs == 2 * batch * heads * tokens * tokens * channels


def test_a_copy_shares_no_state_and_a_pickle_holds_none(tiny, scheduler):
    """Deep copies elsewhere share their state with the original, and hooked networks can't be pickled."""
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        twins = copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))
        assert handle.enabled
        expected = sample_loop(tiny, scheduler, STEPS)[0]
    for twin in (*twins, copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        with (
            sostenuto.enable(tiny, FORA(3), scheduler=scheduler),
            sostenuto.enable(twin, FORA(2), scheduler=type(scheduler).from_config(scheduler.config)) as handle,
        ):
            own = handle._scheduler()
            sample_loop(tiny, scheduler, STEPS, seed=3)
            assert torch.equal(sample_loop(twin, own, STEPS)[0], expected)


def test_a_network_that_is_only_a_shell_is_refused_rather_than_enabled():
    """Nothing to tap is an error, never an enabled no-op."""

    class Shell(torch.nn.Module):
        def forward(self, x, timestep):
            return x

    with pytest.raises(sostenuto.AnatomyError):
        sostenuto.enable(Shell(), FORA(2), scheduler=schedule()[0])
