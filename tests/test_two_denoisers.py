"""Pipelines with several networks, networks with several pipelines, and threads."""

import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline

import sostenuto
from calling_oracle import STEPS, inputs, prediction, schedule
from conftest import build_tiny, sample_loop
from sostenuto import FORA, ABCache, AlreadyEnabledError, AnatomyError, ClockError, EngineError, MagCache, MethodError
from sostenuto.counting import MacCounter
from sostenuto.zoo import TINY_MODELS

METHODS = {
    "branches": lambda: FORA(2, anchor="start"),
    "stack": lambda: MagCache((1.0,) * STEPS, 1.0, max_consecutive=1),
    "output": lambda: ABCache(order=2, warmup=1, interval=2, abscissa="step"),
}


def wan(high=True, low=True, boundary=0.5):
    networks = [
        TINY_MODELS["WanTransformer3DModel"].build(seed) if there else None for seed, there in enumerate((high, low))
    ]
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=networks[0],
        transformer_2=networks[1],
        boundary_ratio=boundary,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, seed=0, guidance=4.0, steps=STEPS):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, 5, 16, generator=generator)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
    ).frames


@pytest.mark.parametrize("level", sorted(METHODS))
def test_wan_22_with_a_network_for_each_part_of_the_schedule(level):
    """Both networks are cached as each would be with a handle of its own, and one handle speaks for both."""
    pipe = wan()
    stock = generate(pipe)
    with sostenuto.enable(pipe, "none"):
        assert torch.equal(generate(pipe), stock)
    high = sostenuto.enable(pipe.transformer, METHODS[level](), scheduler=pipe.scheduler)
    low = sostenuto.enable(pipe.transformer_2, METHODS[level](), scheduler=pipe.scheduler)
    alone = generate(pipe)
    assert not torch.equal(alone, stock)
    high_stats, low_stats = high.stats, low.stats
    high.disable(), low.disable()
    with sostenuto.enable(pipe, METHODS[level]()) as handle:
        assert handle.predicted_cache_bytes is None
        with pytest.raises(EngineError, match="no statistics"):
            _ = handle.stats
        assert torch.equal(generate(pipe), alone)
        stats = handle.stats
        assert handle.predicted_cache_bytes >= stats.cache_bytes_peak > 0
    assert (stats.num_steps, stats.num_passes) == (STEPS, 2)
    assert stats.steps == list(range(STEPS))
    assert stats.macs == high_stats.macs + low_stats.macs
    assert stats.macs_uncached == high_stats.macs_uncached + low_stats.macs_uncached
    count = len(high_stats.sites)
    assert stats.sites[0] == f"transformer.{high_stats.sites[0]}"
    assert stats.sites[count] == f"transformer_2.{low_stats.sites[0]}"
    first_low = low_stats.steps[0]
    assert 0 < first_low < STEPS
    for step, row in enumerate(stats.plan):
        ran, idle = (row[:count], row[count:]) if step < first_low else (row[count:], row[:count])
        assert ran == (high_stats.plan + low_stats.plan)[step]
        assert set(idle) == {"idle"}
    assert not handle.enabled
    assert torch.equal(generate(pipe), stock)
    assert not any("sostenuto" in key for net in (pipe.transformer, pipe.transformer_2) for key in vars(net))


def test_statistics_speak_of_the_last_generation_only():
    pipe = wan()
    with sostenuto.enable(pipe, METHODS["branches"]()) as handle:
        generate(pipe)
        both = handle.stats
        pipe.register_to_config(boundary_ratio=0.0)  # the second network isn't called
        generate(pipe)
        first = handle.stats
        assert first.num_steps == STEPS
        assert all(site.startswith("transformer.") for site in first.sites)
        pipe.register_to_config(boundary_ratio=1.1)  # only the second is
        generate(pipe)
        assert all(site.startswith("transformer_2.") for site in handle.stats.sites)
        pipe.register_to_config(boundary_ratio=0.5)
        generate(pipe)
        assert handle.stats == both


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_an_optional_second_network_may_be_missing(missing):
    pipe = wan(
        **{"high" if missing == "transformer" else "low": False}, boundary=None if missing != "transformer" else 1.1
    )
    if missing == "transformer":
        pipe.transformer = None
        pipe.transformer_2.config  # noqa: B018
    with sostenuto.enable(pipe, METHODS["branches"]()) as handle:
        assert isinstance(handle, sostenuto.Handle)
        generate(pipe)
        assert handle.stats.actions["reuse"] > 0


def test_enabling_both_is_all_or_nothing():
    pipe = wan()
    first = sostenuto.enable(pipe.transformer_2, "none", scheduler=pipe.scheduler)
    with pytest.raises(AlreadyEnabledError):
        sostenuto.enable(pipe, METHODS["branches"]())
    assert "_sostenuto_handle" not in vars(pipe.transformer)
    assert first.enabled
    sostenuto.disable(pipe)
    assert not first.enabled
    with sostenuto.enable(pipe, "none") as handle, pytest.raises(AlreadyEnabledError, match="share"):
        sostenuto.enable(pipe, "none")
    handle.disable()


def test_what_needs_one_network_says_which_there_are():
    with pytest.raises(AnatomyError, match="transformer, transformer_2"):
        sostenuto.verify(wan(), "none", lambda *_, **__: None)


@pytest.mark.parametrize("level", sorted(METHODS))
def test_a_network_of_its_own_for_the_unconditional_pass(level):
    """Ideogram 4 calls both at every step."""
    name = "Ideogram4Transformer2DModel"
    conditional, unconditional = TINY_MODELS[name].build(0), TINY_MODELS[name].build(1)
    scheduler, timesteps = schedule()
    pipe = SimpleNamespace(transformer=conditional, unconditional_transformer=unconditional, scheduler=scheduler)

    @torch.no_grad()
    def both(networks=(conditional, unconditional)):
        scheduler.timesteps = scheduler.timesteps.clone()
        return [prediction(net(**inputs(name, step, timesteps))) for step in range(STEPS) for net in networks]

    stock = both()
    expected = []
    for net in (conditional, unconditional):
        with sostenuto.enable(net, METHODS[level](), scheduler=scheduler):
            expected.append(both((net,)))
    with sostenuto.enable(pipe, METHODS[level]()) as handle:
        got = both()
        assert (handle.stats.num_steps, handle.stats.num_passes) == (STEPS, 2)
        assert len(handle.stats.plan[0]) == len(handle.stats.sites) == 2 * len(handle.handles["transformer"].sites)
    assert all(map(torch.equal, got[::2], expected[0]))
    assert all(map(torch.equal, got[1::2], expected[1]))
    assert not torch.equal(got[-1], stock[-1])


# --- one network, several pipelines ----------------------------------------------------------------------------------


def test_pipelines_that_share_a_network_with_a_scheduler_each(tiny):
    first = SimpleNamespace(transformer=tiny, scheduler=DDPMScheduler())
    second = SimpleNamespace(transformer=tiny, scheduler=DPMSolverMultistepScheduler())

    def alone(pipe, steps):
        with sostenuto.enable(pipe, FORA(2)):
            return sample_loop(tiny, pipe.scheduler, steps)[0]

    expected = alone(first, 6), alone(second, 5)
    with sostenuto.enable(first, FORA(2)) as handle:
        with pytest.raises(ClockError, match="share"):
            sample_loop(tiny, second.scheduler, 7)
        handle.share(second)
        for _ in range(2):
            assert torch.equal(sample_loop(tiny, first.scheduler, 6)[0], expected[0])
            assert handle.stats.num_steps == 6
            assert torch.equal(sample_loop(tiny, second.scheduler, 5)[0], expected[1])
            assert handle.stats.num_steps == 5
            assert handle.stats.actions["reuse"] > 0
        first.scheduler.set_timesteps(6)
        second.scheduler.set_timesteps(5)
        call = dict(class_labels=torch.tensor([1]), timestep=first.scheduler.timesteps[:1])
        with torch.no_grad(), pytest.raises(ClockError, match="more than one"):
            tiny(torch.randn(1, 2, 8, 8), **call)
        assert torch.equal(sample_loop(tiny, second.scheduler, 5)[0], expected[1])


def test_pipelines_that_share_network_and_scheduler_need_nothing(tiny, scheduler):
    first, second = (SimpleNamespace(transformer=tiny, scheduler=scheduler) for _ in range(2))
    with sostenuto.enable(first, FORA(2)) as handle:
        expected = sample_loop(tiny, first.scheduler)[0]
        assert torch.equal(sample_loop(tiny, second.scheduler)[0], expected)
        handle.share(second)
        assert torch.equal(sample_loop(tiny, second.scheduler)[0], expected)


def test_sharing_what_is_not_shared_is_refused(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        other = SimpleNamespace(transformer=build_tiny(), scheduler=scheduler)
        for pipe in (other, tiny):
            with pytest.raises(MethodError, match="doesn't call"):
                handle.share(pipe)
    pipe = wan()
    with sostenuto.enable(pipe, "none") as joint:
        with pytest.raises(MethodError, match="doesn't call"):
            joint.share(other)
        joint.share(SimpleNamespace(transformer=pipe.transformer_2, scheduler=scheduler))


# --- threads ---------------------------------------------------------------------------------------------------------


def test_a_second_thread_in_the_same_network_is_refused_and_the_first_goes_on(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        expected = sample_loop(tiny, scheduler)[0]
    inside, leave, refused = threading.Event(), threading.Event(), []
    original = tiny.transformer_blocks[1].forward

    def waiting(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread() and not inside.is_set():
            inside.set()
            assert leave.wait(30)
        return original(*args, **kwargs)

    results = []
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        tiny.transformer_blocks[1].forward = waiting
        thread = threading.Thread(target=lambda: results.append(sample_loop(tiny, scheduler)[0]))
        thread.start()
        assert inside.wait(30)
        try:
            with torch.no_grad():
                tiny(torch.randn(2, 2, 8, 8), scheduler.timesteps[:1].expand(2), torch.tensor([1, 2]))
        except EngineError as error:
            refused.append(str(error))
        leave.set()
        thread.join(30)
        del tiny.transformer_blocks[1].forward
    assert len(refused) == 1
    assert "one thread at a time" in refused[0]
    assert torch.equal(results[0], expected)


def test_two_networks_in_two_threads():
    models, schedulers = [build_tiny(seed=s) for s in range(2)], [DDPMScheduler() for _ in range(2)]
    expected, got = [], {}
    for model, scheduler in zip(models, schedulers, strict=True):
        with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
            expected.append((sample_loop(model, scheduler)[0], handle.stats.as_dict()))

    def work(index):
        with sostenuto.enable(models[index], FORA(2), scheduler=schedulers[index]) as handle:
            for _ in range(3):
                got[index] = sample_loop(models[index], schedulers[index])[0], handle.stats.as_dict()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, (latents, stats) in enumerate(expected):
        assert torch.equal(got[index][0], latents)
        assert got[index][1] == stats


def test_counting_in_two_threads_gives_torchs_stance_back():
    stance = torch._dynamo.eval_frame._stance.stance
    inside = threading.Event()

    def count():
        with MacCounter():
            inside.set()

    with MacCounter():
        thread = threading.Thread(target=count)
        thread.start()
        assert not inside.wait(0.2)  # one at a time
    thread.join(30)
    assert torch._dynamo.eval_frame._stance.stance == stance


def test_statistics_may_be_read_from_another_thread(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        expected = sample_loop(tiny, scheduler, 12)[0]
    done, seen = threading.Event(), []

    def watch():
        while not done.is_set():
            try:
                seen.append(handle.stats.num_steps)
            except EngineError:  # nothing was called yet
                continue

    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        thread = threading.Thread(target=watch)
        thread.start()
        got = sample_loop(tiny, scheduler, 12)[0]
        done.set()
        thread.join(30)
    assert torch.equal(got, expected)
    assert seen == sorted(seen)
