"""Which step and pass a call is, and that no generation or pass ever reads another one's features."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import FORA, ClockError, EpsilonScaling


def test_interrupted_generation_leaves_no_stale_features(tiny, scheduler):
    expected = None
    with sostenuto.enable(tiny, FORA(3), scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 7, seed=5)
    for stop in (1, 2, 4):
        with sostenuto.enable(tiny, FORA(3), scheduler=scheduler):
            with pytest.raises(KeyboardInterrupt):
                sample_loop(tiny, scheduler, 7, seed=1, stop_at=stop)
            got, _ = sample_loop(tiny, scheduler, 7, seed=5)
        assert torch.equal(expected, got)


def test_a_loop_that_restarts_without_setting_timesteps_again_is_a_new_generation(tiny, scheduler):
    scheduler.set_timesteps(4)
    labels = torch.tensor([1])
    latents = torch.randn(1, 2, 8, 8)

    def outputs(x, upto):
        return [tiny(x, t[None], labels).sample for t in scheduler.timesteps[:upto]]

    with torch.no_grad(), sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
        first = outputs(latents, 1)  # stopped after the first step: the next call has the very same timestep
        second = outputs(latents + 1, 2)
        assert not torch.equal(first[0], second[0])
        fresh = sostenuto.engine.handle_of(tiny)
        fresh._drop_state()
        assert torch.equal(second[1], outputs(latents + 1, 2)[1])


@pytest.mark.parametrize("change", [dict(batch=3), dict(dtype=torch.bfloat16), dict(seed=9), dict(num_steps=5)])
def test_a_changed_next_call_never_reads_features_of_the_last(scheduler, change):
    model = build_tiny()
    dtype = change.get("dtype", torch.float32)
    with sostenuto.enable(model.to(dtype), FORA(2), scheduler=scheduler):
        expected, _ = sample_loop(model, scheduler, **change)
    with sostenuto.enable(model.float(), FORA(2), scheduler=scheduler):
        sample_loop(model, scheduler)
        model.to(dtype)
        got, _ = sample_loop(model, scheduler, **change)
    assert torch.equal(expected, got)


def test_conditional_and_unconditional_pass_never_share_state(tiny, scheduler):
    """With separate calls every pass must see its own features: a call alone gives the same outputs as beside the other."""
    scheduler.set_timesteps(4)
    latents, cond, null = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.tensor([10])

    def run(*conditions):
        return [[tiny(latents, t[None], c).sample for c in conditions] for t in scheduler.timesteps]

    with torch.no_grad():
        with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler) as handle:
            both = run(cond, null)
            assert handle.stats.num_passes == 2
        for index, condition in enumerate((cond, null)):
            with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
                alone = run(condition)
            assert all(torch.equal(a[0], b[index]) for a, b in zip(alone, both, strict=True))


def test_a_guidance_free_step_does_not_swap_the_passes(tiny, scheduler):
    scheduler.set_timesteps(6)
    latents, cond, null = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.tensor([10])

    def run(passes):
        return [[tiny(latents, t[None], c).sample for c in passes(p)] for p, t in enumerate(scheduler.timesteps)]

    with torch.no_grad():
        with sostenuto.enable(tiny, FORA(6, anchor="start"), scheduler=scheduler):
            skipping = run(lambda p: [null] if p == 2 else [cond, null])
        with sostenuto.enable(tiny, FORA(6, anchor="start"), scheduler=scheduler):
            null_alone = run(lambda p: [null])
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(skipping, null_alone, strict=True))


def test_a_pass_that_pauses_recomputes_when_it_comes_back(tiny, scheduler):
    scheduler.set_timesteps(6)
    latents, cond, null = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.tensor([10])
    with torch.no_grad():
        stock = tiny(latents, scheduler.timesteps[4][None], null).sample
        with sostenuto.enable(tiny, FORA(6, anchor="start"), scheduler=scheduler):
            for p, t in enumerate(scheduler.timesteps):
                tiny(latents, t[None], cond)
                if p in (0, 1, 4):
                    last = tiny(latents, t[None], null).sample
                    if p == 4:
                        assert torch.equal(last, stock)


def test_a_pass_first_seen_later_never_reads_the_other_ones_features(tiny, scheduler):
    scheduler.set_timesteps(4)
    latents, cond, null = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.tensor([10])
    with torch.no_grad():
        stock = tiny(latents, scheduler.timesteps[1][None], null).sample
        with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
            tiny(latents, scheduler.timesteps[0][None], cond)
            assert torch.equal(tiny(latents, scheduler.timesteps[1][None], null).sample, stock)
            assert not torch.equal(tiny(latents, scheduler.timesteps[1][None], cond).sample, stock)


def test_one_label_buffer_filled_in_turn_does_not_cross_the_passes(tiny, scheduler):
    scheduler.set_timesteps(4)
    latents, buffer = torch.randn(1, 2, 8, 8), torch.tensor([3])

    def run(labels):
        outputs = []
        for t in scheduler.timesteps:
            for label in labels:
                outputs.append(tiny(latents, t[None], buffer.fill_(label)).sample)
        return outputs

    with torch.no_grad():
        with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
            both = run((3, 10))
        with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
            null_alone = run((10,))
    assert all(torch.equal(a, b) for a, b in zip(both[1::2], null_alone, strict=True))


def test_two_batches_in_lockstep_are_refused(tiny, scheduler):
    scheduler.set_timesteps(4)
    first, second = torch.randn(2, 1, 2, 8, 8)
    with torch.no_grad(), sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        for latents, step in ((first, 0), (second, 0), (first, 1)):
            tiny(latents, scheduler.timesteps[step][None], torch.tensor([1]))
        with pytest.raises(sostenuto.ClockError, match="other latents"):
            tiny(second, scheduler.timesteps[1][None], torch.tensor([1]))


def test_a_batch_that_shrinks_in_the_middle_computes_anew(tiny, scheduler):
    """Dynamic guidance drops the unconditional half of the batch."""
    scheduler.set_timesteps(4)
    latents, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 10])
    with torch.no_grad():
        stock = tiny(latents[:1], scheduler.timesteps[1][None], labels[:1]).sample
        with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
            tiny(latents, scheduler.timesteps[0].expand(2), labels)
            assert torch.equal(tiny(latents[:1], scheduler.timesteps[1][None], labels[:1]).sample, stock)


@pytest.mark.parametrize("timestep", [None, "soon", torch.tensor([])])
def test_what_is_no_single_timestep_is_refused(tiny, scheduler, timestep):
    scheduler.set_timesteps(4)
    with torch.no_grad(), sostenuto.enable(tiny, FORA(2), scheduler=scheduler), pytest.raises(sostenuto.ClockError):
        tiny(torch.randn(2, 2, 8, 8), timestep, torch.tensor([1, 2]))


def test_unknown_conditioning_in_a_separate_pass_is_refused(tiny, scheduler):
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 2, 8, 8)
    with torch.no_grad(), sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        for label in (3, 10):
            tiny(latents, scheduler.timesteps[0][None], torch.tensor([label]))
        for label in (5, 6):
            tiny(latents, scheduler.timesteps[1][None], torch.tensor([label]))
        with pytest.raises(sostenuto.ClockError, match="matches none"):
            tiny(latents, scheduler.timesteps[1][None], torch.tensor([7]))


def test_a_foreign_timestep_is_refused(tiny, scheduler):
    scheduler.set_timesteps(4)
    with (
        torch.no_grad(),
        sostenuto.enable(tiny, "none", scheduler=scheduler),
        pytest.raises(sostenuto.ClockError, match="123"),
    ):
        tiny(torch.randn(1, 2, 8, 8), torch.tensor([123]), torch.tensor([1]))


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_tell_the_step_too(tiny, scheduler, solver):
    other = solver.from_config(scheduler.config)
    with sostenuto.enable(tiny, FORA(2), scheduler=other) as handle:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 2, 8, 8, generator=generator)
        other.set_timesteps(6)
        with torch.no_grad():
            for t in other.timesteps:
                latents = other.step(tiny(latents, t.expand(2), torch.tensor([1, 2])).sample, t, latents).prev_sample
        assert handle.stats.num_steps == 6
        assert handle.stats.num_passes == 1


@torch.no_grad()
def test_a_generation_of_the_last_step_alone_is_known_by_its_timestep_zero(tiny, scheduler):
    """As a whole number 0 is no t / 1000, which would be 0 at every step."""
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[-1] == 0
    with sostenuto.enable(tiny, EpsilonScaling((1.0, 1.0, 1.0, 1.0, 2.0)), scheduler=scheduler) as handle:
        latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([3])
        scaled = tiny(latents, scheduler.timesteps[-1:], labels).sample
        assert handle.stats.steps == [4]
    assert torch.equal(2 * scaled, tiny(latents, scheduler.timesteps[-1:], labels).sample)


@pytest.mark.parametrize("separate", [False, True])
@torch.no_grad()
def test_a_network_whose_timestep_runs_backwards_is_refused_and_told_what_to_declare(tiny, separate):
    """Given 1 − t on a symmetric schedule every timestep is in the list, in the wrong order: each call began a generation."""
    flow = SimpleNamespace(timesteps=torch.linspace(0.0, 1.0, 9).flip(0))
    latents, prompts = torch.randn(1, 2, 8, 8), (torch.tensor([3]), torch.tensor([10]))[: 1 + separate]
    with sostenuto.enable(tiny, FORA(2), scheduler=flow) as handle:
        for step in range(9):
            with pytest.raises(ClockError, match="reversed_timestep=True") if step == 3 else contextlib.nullcontext():
                for labels in prompts:
                    tiny(latents + step, (1 - flow.timesteps[step])[None], labels)
            if step == 3:
                break
        assert not handle._passes


@torch.no_grad()
def test_generations_that_begin_anew_in_any_order_are_not_taken_for_a_reversed_timestep(tiny, scheduler):
    """Given up after their first step, or two steps long from earlier and earlier on, as in image to image."""
    labels = torch.tensor([3])
    scheduler.set_timesteps(8)
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        for begin in (0, 0, 0, 0, 0, 6, 5, 4, 3, 2, 1, 0):
            for step in range(begin, min(begin + (2 if begin else 1), 8)):
                tiny(torch.randn(1, 2, 8, 8), scheduler.timesteps[step][None], labels)
