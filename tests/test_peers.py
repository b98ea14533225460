"""Other libraries' caches behind the protocol of ``sostenuto.bench.peers``: they skip work, and leave nothing behind."""

import importlib.metadata
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from sostenuto import compat
from sostenuto.bench.peers import available_peers, peer
from sostenuto.counting import MacCounter
from sostenuto.demo.network import build_denoiser
from sostenuto.demo.pipeline import DemoPipeline, load_demo_pipeline
from sostenuto.errors import InputError, MethodError
from sostenuto.methods import FORA, MagCacheRatios
from sostenuto.zoo import TINY_MODELS
from unets import build_conditional, context

STEPS = 6

ON_THE_DEMO = (
    "diffusers-first-block-cache:threshold=0.8",
    "diffusers-magcache:threshold=0.5",
    "diffusers-taylorseer:cache_interval=3,modules=branches",
    "diffusers-pab",
    "diffusers-fastercache",
    "diffusers-seacache:threshold=1.0",
    "cache-dit:residual_diff_threshold=0.8,max_warmup_steps=2",
    "cache-dit-taylorseer:residual_diff_threshold=0.8,max_warmup_steps=2",
    "dit-smoothcache",
)


@pytest.fixture(scope="module")
def pipe():
    return load_demo_pipeline()


def generate(pipe, seed=0, **kwargs):
    with MacCounter() as counter:
        images = pipe([3], STEPS, generator=torch.Generator().manual_seed(seed), output_type="latent", **kwargs).images
    return images, counter.macs


@pytest.fixture(scope="module")
def plain(pipe):
    return generate(pipe)


def marks(pipe):
    """Everything that a library might leave on a pipeline and its network, or change the order of."""
    modules = {path: (dict(vars(module)), list(module._modules)) for path, module in pipe.transformer.named_modules()}
    attributes = {name for name in vars(pipe) if "cache" in name or "context" in name}
    return modules, attributes, dict(vars(type(pipe)))


@pytest.mark.parametrize("name", ON_THE_DEMO)
def test_a_peer_skips_work_on_the_demo_begins_every_generation_anew_and_leaves_no_trace(pipe, plain, name):
    images, macs = plain
    before = marks(pipe)
    with peer(name).attached(pipe, STEPS):
        first, fewer = generate(pipe)
        generate(pipe, seed=1)
        again, as_few = generate(pipe)
    assert fewer < macs
    assert first.isfinite().all()
    assert not torch.equal(first, images)
    assert torch.equal(first, again)
    assert fewer == as_few
    assert marks(pipe) == before
    after, all_of_them = generate(pipe)
    assert torch.equal(after, images)
    assert all_of_them == macs


@pytest.mark.parametrize(
    "name", ["diffusers-taylorseer:modules=branches,disable_cache_before_step=1", "cache-dit", "dit-smoothcache"]
)
def test_an_error_leaves_no_trace_and_an_interrupted_generation_no_state(pipe, plain, name):
    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    before, other = marks(pipe), peer(name)
    with other.attached(pipe, STEPS):
        expected, _ = generate(pipe)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, seed=1, callback_on_step_end=stop)
        after_interruption, _ = generate(pipe)
    assert torch.equal(after_interruption, expected)
    with pytest.raises(KeyboardInterrupt), other.attached(pipe, STEPS):
        generate(pipe, seed=1, callback_on_step_end=stop)
    assert marks(pipe) == before
    assert torch.equal(generate(pipe)[0], plain[0])


# --- networks with random weights, driven without a pipeline ----------------------------------------------------------


@torch.no_grad()
def drive(tiny, model, same=False):
    """One call per step; with ``same`` the very same call at every step, which a cache must reproduce."""
    with MacCounter() as counter:
        outputs = []
        for step in range(STEPS):
            seed, timestep = (0, 500.0) if same else (step, 1000.0 * (1 - step / STEPS))
            outputs.append(
                compat.first_tensor(model(**tiny.inputs(timestep, torch.Generator().manual_seed(seed)))).clone()
            )
    return torch.stack(outputs), counter.macs


ON_TINY_NETWORKS = (
    ("FluxTransformer2DModel", "diffusers-taylorseer:taylor_factors_dtype=float32"),
    ("WanTransformer3DModel", "diffusers-seacache:threshold=1000.0"),
    # Its blocks are in no registry of diffusers': they are registered while the peer is attached.
    ("AllegroTransformer3DModel", "diffusers-first-block-cache:threshold=1000.0"),
    *(
        pytest.param("FluxTransformer2DModel", name, marks=pytest.mark.slow)
        for name in (
            "diffusers-first-block-cache:threshold=1000.0",
            "diffusers-magcache",
            "diffusers-pab:timestep_skip_range=[0,1001]",
            "diffusers-fastercache",
            "cache-dit:residual_diff_threshold=10.0,max_warmup_steps=2",
            "dit-smoothcache",
        )
    ),
)


@pytest.mark.parametrize(("network", "name"), ON_TINY_NETWORKS)
def test_a_peer_skips_work_on_a_bare_denoiser_and_reproduces_identical_inputs(network, name):
    tiny = TINY_MODELS[network]
    model = tiny.build()
    plain, macs = drive(tiny, model)
    repeated, _ = drive(tiny, model, same=True)
    other = peer(name, **({"ratios": [1.0]} if "magcache" in name else {}))
    assert other.problem(model) is None
    with other.attached(model, STEPS):
        first, fewer = drive(tiny, model)
        exact, _ = drive(tiny, model, same=True)
        again, _ = drive(tiny, model)
    assert fewer < macs
    assert torch.equal(first, again)
    torch.testing.assert_close(exact, repeated, rtol=1e-3, atol=1e-4)
    assert torch.equal(drive(tiny, model)[0], plain)


def test_blocks_are_registered_with_diffusers_only_while_a_peer_is_attached():
    model = TINY_MODELS["AllegroTransformer3DModel"].build()
    block = type(model.transformer_blocks[0])
    assert not compat.block_is_registered(block)
    with peer("diffusers-first-block-cache").attached(model, STEPS):
        assert compat.block_is_registered(block)
    assert not compat.block_is_registered(block)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("WanVACETransformer3DModel", "diffusers-first-block-cache:threshold=1000.0"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("MotifVideoTransformer3DModel", "diffusers-magcache"),
                ("SD3Transformer2DModel", "diffusers-first-block-cache:threshold=1000.0"),
                ("ConsisIDTransformer3DModel", "cache-dit:residual_diff_threshold=10.0,max_warmup_steps=2"),
            )
        ),
    ],
)
def test_where_a_peer_is_refused_as_wrong_it_is(network, name, monkeypatch):
    tiny = TINY_MODELS[network]
    model = tiny.build()
    expected, _ = drive(tiny, model, same=True)
    other = peer(name, **({"ratios": [1.0]} if "magcache" in name else {}))
    assert other.problem(model) is not None
    monkeypatch.setattr(type(other), "wrong_on", {})
    assert other.problem(model) is None
    try:
        with other.attached(model, STEPS):
            output, _ = drive(tiny, model, same=True)
    except (TypeError, AttributeError):
        return  # the library's hook fails at the first call
    assert ((output - expected).norm() / expected.norm()).item() > 1e-2


# --- what each is told ------------------------------------------------------------------------------------------------


def calls_of(module, run):
    """At which steps a module ran."""
    ran, step = [], -1

    def tick(*_):
        nonlocal step
        step += 1

    hooks = [
        run.pipe.transformer.register_forward_pre_hook(tick),
        module.register_forward_hook(lambda *_: ran.append(step)),
    ]
    try:
        generate(run.pipe)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def test_pab_follows_the_schedulers_timesteps(pipe):
    projection = pipe.transformer.transformer_blocks[5].attn1.to_q
    with peer("diffusers-pab", spatial_attention_block_skip_range=3, timestep_skip_range=(100, 900)).attached(
        pipe, STEPS
    ):
        ran = calls_of(projection, SimpleNamespace(pipe=pipe))
    timesteps = pipe.scheduler.timesteps.tolist()
    assert ran == [p for p, t in enumerate(timesteps) if not (100 < t < 900) or p % 3 == 0]
    assert len(ran) < STEPS


def test_taylorseer_computes_the_steps_that_its_interval_says(pipe):
    with peer("diffusers-taylorseer:modules=branches,cache_interval=3,disable_cache_before_step=2").attached(
        pipe, STEPS
    ):
        ran = calls_of(pipe.transformer.transformer_blocks[2].ff.net[0], SimpleNamespace(pipe=pipe))
    assert ran == [0, 1, 3]  # two at first, then those with (p − 2 − 1) mod 3 = 0


def test_smoothcache_follows_a_schedule_file(pipe, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"attn1": [1, 0, 0, 1, 0, 1], "ff": [1, 1, 1, 1, 1, 0]}')
    with peer("dit-smoothcache", schedule=str(path)).attached(pipe, STEPS):
        attention = calls_of(pipe.transformer.transformer_blocks[1].attn1.to_q, SimpleNamespace(pipe=pipe))
        mlp = calls_of(pipe.transformer.transformer_blocks[1].ff.net[0], SimpleNamespace(pipe=pipe))
    assert attention == [0, 3, 5]
    assert mlp == [0, 1, 2, 3, 4]


def test_seacache_is_told_step_and_noise_level_of_the_scheduler(pipe):
    seen = []
    with peer("diffusers-seacache").attached(pipe, STEPS):
        states = compat.CacheStates(pipe.transformer)
        hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen.append(states.context))
        generate(pipe)
        hook.remove()
    assert [told.step_index for told in seen] == list(range(STEPS))
    assert {told.num_inference_steps for told in seen} == {STEPS}
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()  # x_t = √ᾱ x₀ + √(1 − ᾱ) ε
    sigma = (1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())
    torch.testing.assert_close(torch.tensor([told.sigma for told in seen], dtype=torch.float64), sigma)


def test_magcache_measures_with_the_librarys_calibration(pipe):
    residuals, blocks = [], pipe.transformer.transformer_blocks
    given = {}
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, args: given.update(x=args[0])),
        blocks[-1].register_forward_hook(lambda _, __, output: residuals.append(output - given["x"])),
    ]

    def sample(pipe, generator, num_inference_steps):
        pipe([3, 8], num_inference_steps, generator=generator, output_type="latent")

    sample(pipe, torch.Generator().manual_seed(0), STEPS)
    for hook in hooks:
        hook.remove()
    sizes = torch.stack([residual.norm(dim=-1) for residual in residuals])
    expected = [1.0, *(sizes[1:] / sizes[:-1]).mean((1, 2)).tolist()]  # γ_p = mean over tokens of ‖r_p‖ / ‖r_{p−1}‖
    measured = peer("diffusers-magcache").calibrated(pipe, sample, STEPS)
    assert measured.ratios == pytest.approx(expected, rel=1e-4)
    assert "ratios" not in measured.name


def test_magcache_reads_a_ratio_file(pipe, tmp_path):
    path = tmp_path / "ratios.json"
    sample = lambda pipe, generator, num_inference_steps: pipe([3], num_inference_steps, generator=generator)  # noqa: E731
    measured = sostenuto.calibrate(pipe, "magcache", sample, num_inference_steps=STEPS, num_samples=1)
    assert isinstance(measured, MagCacheRatios)
    measured.save(path)
    assert peer("diffusers-magcache", ratios=str(path)).problem(pipe) is None


class UNetPipeline:
    """The least that DeepCache needs of a pipeline."""

    def __init__(self):
        self.unet, self.scheduler = build_conditional(), DDIMScheduler()

    @torch.no_grad()
    def __call__(self, seed=0):
        latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(STEPS)
        with MacCounter() as counter:
            for timestep in self.scheduler.timesteps:
                noise = self.unet(latents, timestep, encoder_hidden_states=context(2)).sample
                latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents, counter.macs


def test_deepcache_skips_the_deep_part_of_a_unet_and_leaves_no_trace():
    pipe = UNetPipeline()
    plain, macs = pipe()
    before = {path: dict(vars(module)) for path, module in pipe.unet.named_modules()}
    with peer("deepcache").attached(pipe, STEPS):
        first, fewer = pipe()
        pipe(1)
        again, _ = pipe()
    assert fewer < macs
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert {path: dict(vars(module)) for path, module in pipe.unet.named_modules()} == before
    assert torch.equal(pipe()[0], plain)


# --- what can't run says why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("diffusers-taylorseer", "nothing of the network would be hooked.*modules=branches"),
        ("diffusers-taylorseer:use_lite_mode=True", "proj_out"),
        ("diffusers-taylorseer:modules=nowhere", "nothing of the network would be hooked"),
        ("diffusers-fastercache:is_guidance_distilled=False", "conditional half of the batch first"),
        (
            "diffusers-pab:spatial_attention_block_skip_range=None,cross_attention_block_skip_range=2",
            "nothing of the network",
        ),
        ("cache-dit:Fn_compute_blocks=8", "nothing is left to be skipped: 8 blocks in front"),
        ("dit-smoothcache:components=['nowhere']", "nothing of the network would be hooked"),
        ("deepcache", "caches U-Nets, and a DiTTransformer2DModel is none"),
    ],
)
def test_a_peer_that_cannot_run_says_why_and_is_refused(pipe, plain, name, reason):
    before, other = marks(pipe), peer(name)
    with pytest.raises(MethodError, match=reason), other.attached(pipe, STEPS):
        raise AssertionError("attached")
    assert marks(pipe) == before


def test_magcache_wants_the_ratios_of_a_network_that_it_cannot_run_by_itself():
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    assert "needs the ratios of this model" in peer("diffusers-magcache").problem(model)


@pytest.mark.parametrize(
    ("network", "name", "reason"),
    [
        ("LatteTransformer3DModel", "diffusers-magcache:threshold=0.1", "run in turn"),
        ("LatteTransformer3DModel", "dit-smoothcache", "attn2 of every block, which .* has as None"),
        ("CogView4Transformer2DModel", "diffusers-taylorseer:modules=branches", "called more than once in a step"),
        ("CogView4Transformer2DModel", "dit-smoothcache", "isn't called once in every step"),
        ("JoyImageEditTransformer3DModel", "diffusers-magcache:threshold=0.1", "where diffusers' caches don't look"),
        ("FluxTransformer2DModel", "diffusers-seacache", "needs the latents as frames"),
        ("ZImageTransformer2DModel", "diffusers-first-block-cache", "its blocks are given 'x'"),
        ("Flux2Transformer2DModel", "diffusers-first-block-cache", "different numbers of streams"),
        ("SD3Transformer2DModel", "cache-dit", "knows neither the pipeline nor a SD3Transformer2DModel"),
    ],
)
def test_a_network_that_a_peer_does_not_support_is_named(network, name, reason):
    other = peer(name, **({"ratios": [1.0]} if "magcache" in name else {}))
    assert re.search(reason, other.problem(TINY_MODELS[network].build()))


def test_para_attn_says_that_it_is_not_installed_or_runs():
    tiny = TINY_MODELS["WanTransformer3DModel"]
    model, other = tiny.build(), peer("para-attn:residual_diff_threshold=10.0")
    if other.version() == "not installed":
        assert other.problem(model) == "para-attn is not installed: pip install para-attn"
        return
    assert "Unknown transformer class name" in other.problem(TINY_MODELS["DiTTransformer2DModel"].build())
    plain, macs = drive(tiny, model)
    repeated, _ = drive(tiny, model, same=True)
    with other.attached(model, STEPS):
        first, fewer = drive(tiny, model)
        exact, _ = drive(tiny, model, same=True)
        again, _ = drive(tiny, model)
    assert fewer < macs
    assert torch.equal(first, again)
    torch.testing.assert_close(exact, repeated, rtol=1e-3, atol=1e-4)
    assert torch.equal(drive(tiny, model)[0], plain)


def test_a_library_that_is_not_installed_is_named(pipe, monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert peer("cache-dit").version() == "not installed"
    assert peer("cache-dit").problem(pipe) == "cache-dit is not installed: pip install cache-dit"


def test_a_peer_does_not_go_on_top_of_another_cache():
    denoiser = build_denoiser()
    pipe = DemoPipeline(denoiser, load_demo_pipeline().scheduler)
    with sostenuto.enable(pipe, FORA(2)):
        assert "sostenuto is enabled" in peer("cache-dit").problem(pipe)
    with peer("diffusers-first-block-cache").attached(pipe, STEPS):
        assert "another cache is enabled" in peer("dit-smoothcache").problem(pipe)
        with pytest.raises(MethodError, match="cache of diffusers' own"):
            sostenuto.enable(pipe, FORA(2))


# --- names and settings -----------------------------------------------------------------------------------------------


def test_every_peer_has_a_name_a_library_a_version_and_settings():
    peers = available_peers()
    assert {"cache-dit", "cache-dit-taylorseer", "dit-smoothcache", "deepcache", "para-attn"} <= peers.keys()
    assert sum(name.startswith("diffusers-") for name in peers) == 6
    for name, other in peers.items():
        assert other.name == name
        assert other.library
        assert isinstance(other.settings, dict)
        assert other.version()
    assert peers["diffusers-pab"].version() == importlib.metadata.version("diffusers")
    assert peers["diffusers-pab"].settings["spatial_attention_block_skip_range"] == 2


@pytest.mark.parametrize("name", [*ON_THE_DEMO, "diffusers-taylorseer:modules=['.*attn1', '.*ff'],max_order=2"])
def test_a_name_with_settings_reads_back_as_the_same_peer(name):
    assert peer(peer(name).name) == peer(name)


def test_settings_in_the_name_and_as_arguments_are_one():
    assert peer("cache-dit:residual_diff_threshold=0.12") == peer("cache-dit", residual_diff_threshold=0.12)
    assert peer("cache-dit", residual_diff_threshold=0.12).name == "cache-dit:residual_diff_threshold=0.12"
    assert peer("diffusers-taylorseer:modules=['a{1,2}', 'b'],max_order=2").modules == ("a{1,2}", "b")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody", "there is no peer 'nobody'; there are .*cache-dit"),
        ("cache-dit:treshold=0.1", "cache-dit has no setting 'treshold', only Fn_compute_blocks"),
        ("para-attn:threshold=1", "only residual_diff_threshold"),
        ("cache-dit:0.12", "write them as name:option=value"),
    ],
)
def test_a_misspelt_peer_is_refused(name, reason):
    with pytest.raises(InputError, match=reason):
        peer(name)


# --- what docs/peers.md says of the libraries themselves --------------------------------------------------------------


def test_cache_dit_taken_off_by_itself_leaves_weights_that_were_not_there_and_the_adapter_none():
    cache_dit = pytest.importorskip("cache_dit")
    model = TINY_MODELS["DiTTransformer2DModel"].build()
    before = list(model.state_dict())
    with peer("cache-dit").attached(model, STEPS):
        drive(TINY_MODELS["DiTTransformer2DModel"], model)
    assert list(model.state_dict()) == before
    cache_dit.enable_cache(model, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    cache_dit.disable_cache(model)
    assert any(name.startswith("_norm1_emb") for name in model.state_dict())


def test_diffusers_taylorseer_is_enabled_with_nothing_hooked():
    from diffusers import TaylorSeerCacheConfig

    tiny = TINY_MODELS["WanTransformer3DModel"]
    model = tiny.build()
    plain, macs = drive(tiny, model)
    model.enable_cache(TaylorSeerCacheConfig())
    assert model.is_cache_enabled
    output, as_many = drive(tiny, model)
    assert as_many == macs
    assert torch.equal(output, plain)
    assert "nothing of the network would be hooked" in peer("diffusers-taylorseer").problem(tiny.build())
