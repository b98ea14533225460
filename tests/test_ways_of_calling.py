"""Every way in which pipelines call their denoisers, against a naive oracle or a handle that saw nothing else."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler

import sostenuto
from calling_oracle import STEPS, inputs, naive, prediction, run, schedule, tiny
from conftest import build_tiny
from sostenuto import FORA, ABCache, CacheTable, DBCache, DeltaDiT, EBCache, MagCache, StepState, TeaCache

METHODS = {
    "branches": lambda: FORA(2, anchor="start"),
    "stack": lambda: MagCache((1.0,) * STEPS, 1.0, max_consecutive=1),
    "output": lambda: ABCache(order=2, warmup=2, interval=2, abscissa="step"),
}
LEVELS = sorted(METHODS)


def other_text(arguments, seed):
    """The unconditional pass: other text in the same shape."""
    generator = torch.Generator().manual_seed(seed)
    text = arguments["encoder_hidden_states"]
    return arguments | {"encoder_hidden_states": torch.randn(text.shape, generator=generator)}


def guided(name, steps=range(STEPS), uncond=range(STEPS), timesteps=None, **changes):
    timesteps = timesteps or schedule()[1]
    script = []
    for step in steps:
        arguments = inputs(name, step, timesteps, **changes)
        script.append((step, "cond", arguments))
        if step in uncond:
            script.append((step, "uncond", other_text(arguments, 77)))
    return script


def check(name, script, level, num_passes):
    """Cached it is what the oracle says; all computed it is what the network says, bit for bit."""
    model, scheduler = tiny(name), schedule()[0]
    stock, oracle = run(model, script), naive(model, script, level)
    with sostenuto.enable(model, METHODS[level](), scheduler=scheduler) as handle:
        cached = run(model, script)
        assert handle._record.num_passes == num_passes
    with sostenuto.enable(model, "none", scheduler=scheduler):
        assert all(map(torch.equal, run(model, script), stock))
    assert any(not torch.equal(a, b) for a, b in zip(cached, stock, strict=True))
    for (step, which, _), got, wanted in zip(script, cached, oracle, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, s=step, w=which: f"{s} {w}: {m}")
    return handle


FAMILIES = ["WanTransformer3DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_separate_guidance_passes_keep_their_own_features(name, level):
    check(name, guided(name), level, num_passes=2)


@pytest.mark.parametrize("level", LEVELS)
def test_diffusers_cache_context_around_the_passes_changes_nothing(level):
    name = "WanTransformer3DModel"
    model, script = tiny(name), guided(name)
    with torch.no_grad(), sostenuto.enable(model, METHODS[level](), scheduler=schedule()[0]):
        plain = run(model, script)
        sostenuto.engine.handle_of(model)._drop_state()
        for (_, which, arguments), expected in zip(script, plain, strict=True):
            with model.cache_context(which):
                assert torch.equal(prediction(model(**arguments)), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_guidance_within_an_interval_computes_anew_when_it_comes_back(level):
    name = "FluxTransformer2DModel"
    handle = check(name, guided(name, uncond=(0, 1, 4, 5)), level, num_passes=2)
    assert 0 < handle.stats.cache_bytes_peak <= handle.predicted_cache_bytes


def test_a_pass_that_pauses_keeps_no_memory():
    name = "WanTransformer3DModel"
    model = tiny(name)
    with sostenuto.enable(model, METHODS["stack"](), scheduler=schedule()[0]) as handle:
        run(model, guided(name, steps=range(5), uncond=(0, 1, 2)))
        assert set(handle._passes) == {0}


@pytest.mark.parametrize("level", LEVELS)
def test_equal_prompts_on_both_sides_of_the_guidance_are_two_passes(level):
    name = "QwenImageTransformer2DModel"
    script = [(step, which, a) for step, _, a in guided(name, uncond=()) for which in ("cond", "uncond")]
    check(name, script, level, num_passes=2)


@pytest.mark.parametrize("level", LEVELS)
def test_batched_guidance_and_several_images_are_one_pass(level):
    name = "SD3Transformer2DModel"
    script = []
    for step, _, given in guided(name, uncond=()):
        batched = {key: torch.cat([value] * 3) for key, value in given.items()}
        script.append((step, "cond", batched))
    check(name, script, level, num_passes=1)


@pytest.mark.parametrize("level", LEVELS)
def test_embedded_guidance_is_conditioning(level):
    name = "FluxTransformer2DModel"
    script = []
    for step, _, given in guided(name, uncond=()):
        script += [(step, scale, given | {"guidance": torch.full((2,), scale)}) for scale in (1.0, 3.5)]
    check(name, script, level, num_passes=2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("left_out", [[0], [1], [2]])
def test_a_third_pass_that_leaves_out_blocks_keeps_to_itself(level, left_out):
    """Stable Diffusion 3: a batched pass, then one with the conditional half and ``skip_layers``, at some of the steps."""
    name = "SD3Transformer2DModel"
    script = []
    for step, _, given in guided(name, uncond=()):
        script.append((step, "batched", {key: torch.cat([value] * 2) for key, value in given.items()}))
        if step >= 1:
            script.append((step, "skip", given | {"skip_layers": left_out}))
    if level == "stack" and left_out != [1]:  # nothing of such a pass can be skipped as a range: it is computed
        model = tiny(name)
        stock = run(model, script)
        with sostenuto.enable(model, METHODS[level](), scheduler=schedule()[0]) as handle:
            cached = run(model, script)
            assert handle.stats.num_passes == 2
        for (_, which, _), got, plain in zip(script, cached, stock, strict=True):
            assert which == "batched" or torch.equal(got, plain)
        return
    check(name, script, level, num_passes=2)


@pytest.mark.parametrize("left_out", [[0], [1], [2]])
def test_branches_run_where_a_pass_leaves_out_what_would_stand_in_for_them(left_out):
    name = "SD3Transformer2DModel"
    model, script, alone = tiny(name), [], []
    c, b = StepState.COMPUTE, StepState.REUSE_BOTH
    table = CacheTable((c, c, b, c, b, b), fill="stack")
    for step, _, given in guided(name, uncond=()):
        script += [(step, "cond", given), (step, "skip", given | {"skip_layers": left_out})]
        alone.append((step, "cond", given))
    stock = run(model, script)
    with sostenuto.enable(model, EBCache(table), scheduler=schedule()[0]):
        both = run(model, script)
    with sostenuto.enable(model, EBCache(table), scheduler=schedule()[0]):
        assert all(map(torch.equal, both[::2], run(model, alone)))
    if left_out != [1]:  # no whole stack, nothing that is reused
        assert all(map(torch.equal, both[1::2], stock[1::2]))

    def sample(*_, **__):
        run(model, [call for call in script if call[1] == "cond" or call[0] >= 2])  # the second pass begins late

    for method in (FORA(2), EBCache(table)):
        assert (
            sostenuto.verify(model, method, sample, scheduler=schedule()[0], num_inference_steps=STEPS)["passes"] == 2
        )


@pytest.mark.parametrize("left_out", [[0], [1], [2]])
@pytest.mark.parametrize(
    "method", [lambda: TeaCache(threshold=1e9), lambda: DBCache(1, 1, 1e9, warmup=1), lambda: DeltaDiT(2, 0.5, 2)]
)
def test_methods_of_block_ranges_get_along_with_a_pass_without_some_blocks(method, left_out):
    name = "SD3Transformer2DModel"
    model, script, alone = tiny(name), [], []
    for step, _, given in guided(name, uncond=()):
        script.append((step, "cond", given))
        alone.append((step, "cond", given))
        script.append((step, "skip", given | {"skip_layers": left_out}))
    with sostenuto.enable(model, method(), scheduler=schedule()[0]):
        both = run(model, script)[::2]
    with sostenuto.enable(model, method(), scheduler=schedule()[0]):
        assert all(map(torch.equal, both, run(model, alone)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_controlnet_residuals_may_change_every_step(name, level):
    script = []
    for step, _, given in guided(name, uncond=()):
        generator = torch.Generator().manual_seed(step)
        if name.startswith("Flux"):
            tokens, width = given["hidden_states"].shape[1], 16
            names, counts = ("controlnet_block_samples", "controlnet_single_block_samples"), (2, 3)
        else:
            tokens, width = 4, 16
            names, counts = ("block_controlnet_hidden_states",), (3,)
        residuals = {
            what: [torch.randn(2, tokens, width, generator=generator) for _ in range(count)]
            for what, count in zip(names, counts, strict=True)
        }
        script.append((step, "cond", given | residuals))
    check(name, script, level, num_passes=1)


def test_controlnet_that_ends_early_makes_the_rest_begin_by_computing():
    name = "FluxTransformer2DModel"
    script = []
    for step, _, given in guided(name, uncond=()):
        residuals = [torch.randn(2, given["hidden_states"].shape[1], 16) for _ in range(2)]
        controlled = step < 3
        script.append((step, controlled, given | ({"controlnet_block_samples": residuals} if controlled else {})))
    check(name, script, "branches", num_passes=1)


@pytest.mark.parametrize("level", LEVELS)
def test_image_to_image_begins_in_the_middle(level):
    name = "WanTransformer3DModel"
    model = tiny(name)
    script = guided(name, steps=range(3, STEPS))
    stock = run(model, script)
    with sostenuto.enable(model, METHODS[level](), scheduler=schedule()[0]) as handle:
        cached = run(model, script)
        assert handle.stats.steps == [3, 4, 5]
    assert all(map(torch.equal, cached[:2], stock[:2]))  # whatever the plan has there
    if level != "output":
        oracle = naive(model, script, level, first=3)  # steps are counted from where the generation begins
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(cached, oracle, strict=True))


# --- timesteps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("frames", ["equal", "given", "tokens"])
def test_timesteps_of_frames_and_tokens(level, frames):
    """SkyReels V2 in step with itself, with given frames nearly without noise, and Wan 2.2 with a timestep per token."""
    name = "WanTransformer3DModel" if frames == "tokens" else "SkyReelsV2Transformer3DModel"
    script = []
    for step, which, given in guided(name):
        t = given["timestep"][0]
        if frames == "tokens":
            timestep = torch.cat([torch.zeros(2, 6), t.expand(2, 12)], dim=1)
            script.append((step, which, given | {"timestep": timestep}))
        else:
            timestep = t.expand(2, 3).clone()
            if frames == "given":
                timestep[:, 0] = 20
            script.append((step, which, given | {"timestep": timestep, "enable_diffusion_forcing": True}))
    check(name, script, level, num_passes=2)


def test_frames_that_lag_compute_until_the_noisiest_moves():
    """SkyReels V2 out of step: the last frame waits at the first timestep while the others go on, then all go on."""
    name = "SkyReelsV2Transformer3DModel"
    model, (scheduler, timesteps) = tiny(name), schedule()
    script = []
    for turn in range(STEPS + 2):
        rows = [min(max(turn - lag, 0), STEPS) for lag in (0, 1, 2)]
        timestep = torch.tensor([[(*timesteps, 0.0)[row] for row in rows]] * 2)
        arguments = inputs(name, min(turn, STEPS - 1), timesteps, seed=turn)
        arguments |= {"encoder_hidden_states": inputs(name, 0, timesteps)["encoder_hidden_states"]}
        arguments |= {"timestep": timestep, "enable_diffusion_forcing": True}
        step = max(turn - 2, 0)
        script += [(step, "cond", arguments), (step, "uncond", other_text(arguments, 77))]
    stock, oracle = run(model, script), naive(model, script[4:], "branches")
    with sostenuto.enable(model, METHODS["branches"](), scheduler=scheduler) as handle:
        cached = run(model, script)
        stats = handle.stats
    assert all(map(torch.equal, cached[:6], stock[:6]))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(cached[4:], oracle, strict=True))
    assert stats.steps == [0, 0, 0, 1, 2, 3, 4, 5]  # all in one generation
    assert stats.actions["reuse"] == 2 * 3 * len(stats.sites)


def test_timesteps_rounded_to_few_bits_are_told_apart_by_the_scheduler_and_by_order():
    """Hunyuan Video in bfloat16 with a strong shift: neighbouring timesteps become the same number."""
    model = build_tiny()
    timesteps = torch.tensor([1000.0, 997.1, 994.1, 991.0, 987.8, 500.0])
    given = timesteps.to(torch.bfloat16)
    assert given[1] == given[2]
    for stepping in (False, True):
        scheduler = SimpleNamespace(timesteps=timesteps.clone())
        with torch.no_grad(), sostenuto.enable(model, FORA(2, anchor="start"), scheduler=scheduler) as handle:
            for step, t in enumerate(given):
                if stepping:
                    scheduler.step_index = step
                latents = torch.randn(1, 2, 8, 8)
                for label in (1, 10):
                    model(latents, t.float()[None].to(torch.bfloat16), torch.tensor([label]))
            assert handle.stats.steps == list(range(6))
            assert [row[0] for row in handle.stats.plan] == ["compute", "reuse"] * 3


@pytest.mark.parametrize("given", ["sigma", "fraction", "half"])
def test_networks_that_are_given_noise_levels(given):
    """Cosmos: σ, or σ / (1 + σ), where the scheduler's timesteps are whole numbers or far above 1000."""
    model = build_tiny()
    if given == "sigma":
        sigmas = torch.tensor([0.9995, 0.8373, 0.6144, 0.2236, 0.0])
        timesteps = (1000 * sigmas[:-1]).long()
        values = sigmas[:-1]
    else:
        sigmas = torch.tensor([80.0, 60.0, 10.0, 1.0, 0.01, 0.0])
        timesteps = 1000 * sigmas[:-1]
        values = sigmas[:-1] / (1 + sigmas[:-1])
        values = values.bfloat16() if given == "half" else values
    scheduler = SimpleNamespace(timesteps=timesteps, sigmas=sigmas)
    with torch.no_grad(), sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
        for value in values:
            model(torch.randn(1, 2, 8, 8), value[None], torch.tensor([1]))
        assert handle.stats.steps == list(range(len(timesteps)))


def test_passes_whose_latents_differ_in_a_part():
    """Cosmos 2: the unconditional pass is given other frames in the place of the given one."""
    name = "CosmosTransformer3DModel"
    script = []
    for step, which, given in guided(name):
        frames = given["hidden_states"].clone()
        frames[:, :, 0] = 1.0 if which == "cond" else -1.0
        script.append((step, which, given | {"hidden_states": frames}))
    check(name, script, "branches", num_passes=2)


@pytest.mark.parametrize("solver", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize(("strength", "separate"), [(1.0, True), (0.5, False)])
def test_second_order_schedulers_call_twice_a_step(solver, strength, separate):
    model, scheduler = build_tiny(), solver()

    def sample():
        scheduler.set_timesteps(6)
        begin = int(len(scheduler.timesteps) * (1 - strength)) // 2 * 2
        scheduler.set_begin_index(begin)
        generator = torch.Generator().manual_seed(0)
        latents, seen = torch.randn(1, 2, 8, 8, generator=generator), []
        for t in scheduler.timesteps[begin:]:
            noise = [model(latents, t[None], torch.tensor([label])).sample for label in (3, 10)[: 1 + separate]]
            seen += noise
            latents = scheduler.step(noise[0], t, latents).prev_sample
        return begin, seen

    with torch.no_grad():
        _, stock = sample()
        with sostenuto.enable(model, "none", scheduler=scheduler):
            assert all(map(torch.equal, sample()[1], stock))
        with sostenuto.enable(model, FORA(2, anchor="start"), scheduler=scheduler) as handle:
            begin, _ = sample()
            assert handle.stats.steps == list(range(begin, len(scheduler.timesteps)))
            reused = [row[0] == "reuse" for row in handle.stats.plan]
            assert reused == [step % 2 == 1 and step > begin for step in handle.stats.steps]
            assert handle.stats.num_passes == 1 + separate


# --- one call after another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["branches", "stack"])
def test_list_valued_latents(level):
    name = "ZImageTransformer2DModel"
    timesteps = schedule()[1]
    script = []
    for step in range(STEPS):
        given = inputs(name, step, timesteps, latents="x")
        doubled = {
            key: [*value, *value] if isinstance(value, list) else torch.cat([value] * 2) for key, value in given.items()
        }
        script += [(step, "batched", doubled), (step, "cond", given)]
    check(name, script, level, num_passes=2)


@pytest.mark.parametrize("level", LEVELS)
def test_other_step_counts_batches_and_sizes_from_call_to_call(level):
    name = "WanTransformer3DModel"
    model = tiny(name)

    def script(num_steps, rows, frames, seed):
        timesteps = schedule(num_steps)[1]
        for step, which, given in guided(name, range(num_steps), timesteps=timesteps, seed=seed):
            cut = {key: value[:rows] for key, value in given.items()}
            yield step, which, cut | {"hidden_states": cut["hidden_states"][:, :, :frames]}

    wanted = ((6, 2, 3, 0), (5, 2, 3, 1), (6, 1, 3, 2), (6, 2, 2, 3))
    scheduler = SimpleNamespace(timesteps=None)

    def generate(shape):
        scheduler.timesteps = schedule(shape[0])[0].timesteps
        return run(model, list(script(*shape)))

    method = {"stack": lambda: MagCache((1.0,) * 6, 1.0, max_consecutive=1)}.get(level, METHODS[level])
    alone = []
    for shape in wanted:
        with sostenuto.enable(model, method(), scheduler=scheduler):
            alone.append(generate(shape))
    with sostenuto.enable(model, method(), scheduler=scheduler):
        for shape, expected in zip(wanted, alone, strict=True):
            assert all(map(torch.equal, generate(shape), expected))


# --- networks with a cache of their own, optional branches -----------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_call_that_fills_flux2s_own_cache_runs_in_full(level):
    """FLUX.2 klein: the first step also runs the reference's tokens and keeps their keys and values for the others."""
    name = "Flux2Transformer2DModel"
    model, (scheduler, timesteps) = tiny(name), schedule()

    @torch.no_grad()
    def generate(seed):
        outputs, cache = [], None
        for step in range(STEPS):
            given = inputs(name, step, timesteps, seed=seed)
            if step == 0:
                first = given | {
                    "hidden_states": torch.cat([given["hidden_states"]] * 2, dim=1),
                    "img_ids": torch.cat([given["img_ids"]] * 2, dim=1),
                }
                first |= {"kv_cache_mode": "extract", "num_ref_tokens": given["hidden_states"].shape[1]}
                output, cache = model(**first, return_dict=False)
                outputs.append(output)
            else:
                outputs.append(model(**given, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[0])
        return outputs

    stock = generate(1)
    with sostenuto.enable(model, "none", scheduler=scheduler):
        assert all(map(torch.equal, generate(1), stock))
    with sostenuto.enable(model, METHODS[level](), scheduler=scheduler) as handle:
        alone = generate(1)
        assert handle.stats.steps == [1, 2, 3, 4, 5]
        assert torch.equal(alone[0], stock[0])
        assert torch.equal(alone[1], stock[1])
        assert handle.stats.ideal_speedup > 1
        generate(2)
        assert all(map(torch.equal, generate(1), alone))


def test_the_networks_own_cache_is_not_kept_beyond_its_generation_and_counts_as_it_was():
    name = "Flux2Transformer2DModel"
    model, (scheduler, timesteps), caches = tiny(name), schedule(), []

    @torch.no_grad()
    def generate(handle):
        given = inputs(name, 0, timesteps)
        first = given | {key: torch.cat([given[key]] * 2, dim=1) for key in ("hidden_states", "img_ids")}
        first |= {"kv_cache_mode": "extract", "num_ref_tokens": given["hidden_states"].shape[1]}
        cache = model(**first, return_dict=False)[1]
        for step in range(1, STEPS):
            model(**inputs(name, step, timesteps), kv_cache=cache, kv_cache_mode="cached", return_dict=False)
        caches.append(weakref.ref(cache))
        cache.clear()  # as the pipeline does at its end
        return handle.stats.macs, len(handle._dry_runs)

    with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
        macs, runs = generate(handle)
        assert generate(handle) == (macs, runs)  # another cache, and the same kind of call
        gc.collect()
        assert caches[0]() is None


def test_a_call_that_fills_anyflows_cache_runs_in_full_between_chunks():
    name = "AnyFlowFARTransformer3DModel"
    model, (scheduler, timesteps) = tiny(name), schedule()

    @torch.no_grad()
    def generate():
        given = inputs(name, 0, timesteps)
        cache, frames = given["kv_cache"], torch.cat([given["hidden_states"]] * 3, dim=1)
        zeros, partition = torch.zeros(2, 9, dtype=torch.int64), [3, 3, 3]
        before = cache[0]["full_cache"].clone()
        mask = model.build_attention_mask(chunk_partition=partition, height=4, width=6, device="cpu", mode="cache")
        fill = {"hidden_states": frames, "timestep": zeros, "r_timestep": zeros, "chunk_partition": partition}
        fill |= {"attention_mask": mask, "kv_cache_flag": dict(num_cached_chunks=2, is_cache_step=True)}
        model(**(given | fill))
        assert not torch.equal(before, cache[0]["full_cache"])
        steps = [inputs(name, step, timesteps) | {"kv_cache": cache} for step in range(STEPS)]
        return run(model, [(step, "cond", arguments) for step, arguments in enumerate(steps)])

    stock = generate()
    with sostenuto.enable(model, METHODS["branches"](), scheduler=scheduler) as handle:
        first = generate()  # one generation after another, with no new timesteps
        assert handle.stats.actions["reuse"] == 3 * len(handle.sites)
        assert torch.equal(first[0], stock[0])
        assert not torch.equal(first[1], stock[1])
        assert all(map(torch.equal, generate(), first))


def test_calls_that_write_glm_images_cache_run_in_full():
    """Editing: the given image is read first, at timestep 0, before the scheduler knows its timesteps."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    name = "GlmImageTransformer2DModel"
    model, (later, timesteps) = tiny(name), schedule()
    scheduler = SimpleNamespace(timesteps=None)

    @torch.no_grad()
    def generate():
        cache, outputs = GlmImageKVCache(num_layers=len(model.transformer_blocks)), []
        cache.set_mode("write")
        given = {key: value[:1] for key, value in inputs(name, 0, timesteps).items()}
        text = given["encoder_hidden_states"][:, :0]
        model(**(given | {"timestep": torch.zeros(1), "encoder_hidden_states": text, "kv_caches": cache}))
        scheduler.timesteps = later.timesteps.clone()
        for _, which, arguments in guided(name):
            cache.set_mode("read" if which == "cond" else "skip")
            outputs.append(prediction(model(**arguments, kv_caches=cache)))
        return outputs

    stock = generate()
    with sostenuto.enable(model, METHODS["branches"](), scheduler=scheduler) as handle:
        first = generate()
        assert handle.stats.num_passes == 2
        assert handle.stats.steps == list(range(STEPS))
        assert all(map(torch.equal, first[:2], stock[:2]))
        assert not torch.equal(first[2], stock[2])
        assert all(map(torch.equal, generate(), first))


@pytest.mark.parametrize("level", ["branches", "stack"])
def test_kandinsky6_without_audio(level):
    name = "Kandinsky6Transformer3DModel"
    model, scheduler = tiny(name), schedule()[0]
    silent = [(s, w, a | {"audio_hidden_states": None}) for s, w, a in guided(name)]
    with_audio = guided(name)
    stock = run(model, silent)
    with sostenuto.enable(model, "none", scheduler=scheduler):
        assert all(map(torch.equal, run(model, silent), stock))
    with sostenuto.enable(model, METHODS[level](), scheduler=scheduler) as handle:
        alone = run(model, silent)
        assert handle.stats.ideal_speedup > 1.2
        assert all(map(torch.equal, alone[:2], stock[:2]))
    with sostenuto.enable(model, METHODS[level](), scheduler=scheduler):
        heard = run(model, with_audio)
        assert all(map(torch.equal, run(model, silent), alone))
        assert all(map(torch.equal, run(model, with_audio), heard))
    # A generation that drops its audio half way begins that part by computing.
    with sostenuto.enable(model, METHODS[level](), scheduler=scheduler):
        mixed = run(model, with_audio[:6] + silent[6:])
    assert all(map(torch.equal, mixed[:6], heard[:6]))
    assert all(map(torch.equal, mixed[6:8], stock[6:8]))
