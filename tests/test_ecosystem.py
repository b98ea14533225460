"""What else is done with a denoiser (compile, offload, cast, adapt, train, copy) works while enabled, or is refused."""

import copy
import io
import pickle
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiTTransformer2DModel, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import (
    FORA,
    CacheTable,
    DBCache,
    DuCa,
    EBCache,
    EngineError,
    MethodError,
    StepState,
    TaylorSeer,
    TeaCache,
)
from sostenuto.zoo import TINY_MODELS

C, A, M, B = StepState
CPU = torch.device("cpu")


def cached(model, scheduler, method=None, steps=6, **kwargs):
    """Latents of a generation with the method enabled."""
    with sostenuto.enable(model, method or FORA(2), scheduler=scheduler):
        return sample_loop(model, scheduler, steps, **kwargs)[0]


def run_zoo(model, name, scheduler, steps=6):
    """Every output of a generation of a network of the zoo."""
    scheduler.set_timesteps(steps)
    outputs = []
    with torch.no_grad():
        for timestep in scheduler.timesteps.tolist():
            inputs = TINY_MODELS[name].inputs(timestep, torch.Generator().manual_seed(0))
            inputs["hidden_states"] = inputs["hidden_states"] * (1 + timestep / 1000)
            outputs.append(model(**inputs)[0])
    return torch.stack(outputs)


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def compile_blocks(model):
    if not model._repeated_blocks:
        model._repeated_blocks = ["BasicTransformerBlock"]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")


REGIONAL = [
    ("DiTTransformer2DModel", EBCache(CacheTable((C, B, A, C, B, C)))),
    ("DiTTransformer2DModel", TeaCache(threshold=1.0)),
    *(
        pytest.param(name, method, marks=pytest.mark.slow)
        for name in ("FluxTransformer2DModel", "WanTransformer3DModel")
        for method in (FORA(2), TaylorSeer(3, 1), TeaCache(threshold=1.0), DBCache(1, 0, 0.99, warmup=1))
    ),
]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("order", ["before", pytest.param("after", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "method"), REGIONAL)
def test_regional_compilation_keeps_plan_and_outputs_and_blocks_share_graphs(scheduler, name, method, order):
    tiny = TINY_MODELS[name]
    with sostenuto.enable(tiny.build(), method, scheduler=scheduler) as handle:
        expected = run_zoo(handle._denoiser, name, scheduler)
        plan = handle.stats.plan
    stock = tiny.build()
    compile_blocks(stock)
    run_zoo(stock, name, scheduler, 1)
    of_one_mode = graphs()
    torch._dynamo.reset()
    counters.clear()
    model = tiny.build()
    if order == "before":
        compile_blocks(model)
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        if order == "after":
            compile_blocks(model)
        got = run_zoo(model, name, scheduler)
        assert handle.stats.plan == plan
        assert any("reuse" in row or "forecast" in row for row in plan)
        modes = {
            tuple(op for site, op in zip(handle.sites, carried.ops, strict=True) if site.block == block)
            for _, _, _, carried in handle._record.calls
            for block in {site.block for site in handle.sites}
        }
        if handle._mount.taps[0].in_graph:
            assert of_one_mode < graphs() <= of_one_mode * len(modes)
        else:
            assert graphs() == of_one_mode  # whole blocks are skipped from outside
        before = graphs()
        run_zoo(model, name, scheduler)
        assert graphs() == before
        assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_method_that_looks_at_features_within_compiled_blocks_is_refused(tiny, scheduler):
    compile_blocks(tiny)
    with pytest.raises(MethodError, match="compiled denoiser can't"):
        sostenuto.enable(tiny, DuCa(fresh_ratio=0.2, middle_interval=None, selection="attention"), scheduler=scheduler)
    assert not any("forward" in vars(module) for module in tiny.modules())


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_wrapper_around_the_enabled_denoiser_is_refused_also_with_graph_breaks_allowed(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        compiled = torch.compile(tiny, backend="eager")
        with pytest.raises((EngineError, torch._dynamo.exc.TorchDynamoException), match="enable"):
            sample_loop(compiled, scheduler, 2)


# --- hooks of accelerate and diffusers ---------------------------------------------------------------------------


class Idle(ModelHook):
    called: ClassVar[list] = []

    def pre_forward(self, module, *args, **kwargs):
        Idle.called.append(module)
        return args, kwargs


def hook_everything(model):
    for module in model.modules():
        add_hook_to_module(module, Idle())


def group_offload(model, offload_type="leaf_level", **options):
    try:
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=offload_type, **options)
    except AttributeError as error:
        if torch.accelerator.is_available():
            raise
        raise AttributeError("this diffusers has no group offloading without an accelerator") from error


def group_offload_blocks(model):
    group_offload(model, "block_level", num_blocks_per_group=1)


def remove_group_offloading(model):
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        registry.remove_hook(name, recurse=True)


def remove_accelerate(model):
    remove_hook_from_module(model, recurse=True)


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


HOOKS = {
    "hooks everywhere": (hook_everything, remove_accelerate),
    "model offload": (lambda model: cpu_offload_with_hook(model, "cpu"), remove_accelerate),
    "sequential offload": (lambda model: cpu_offload(model, "cpu"), remove_accelerate),
    "group offload": (group_offload, remove_group_offloading),
    "group offload, blocks": (group_offload_blocks, remove_group_offloading),
    "layerwise casting": (cast, None),
}


@pytest.mark.parametrize("method", [FORA(2), TeaCache(threshold=1.0)], ids=["branches", "blocks"])
@pytest.mark.parametrize("first_off", ["hooks", pytest.param("sostenuto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_put_on_before_or_after_and_taken_off_in_any_order(scheduler, name, order, first_off, method):
    put_on, take_off = HOOKS[name]
    if take_off is None and first_off == "sostenuto":
        pytest.skip("never taken off: the same as the other order")
    plain, model = build_tiny(), build_tiny()
    if name == "layerwise casting":  # loses bits for good
        cast(plain)
    stock, expected = sample_loop(plain, scheduler)[0], cached(plain, scheduler, method)
    if order == "before":
        put_on(model)
    handle = sostenuto.enable(model, method, scheduler=scheduler)
    if order == "after":
        put_on(model)
    assert torch.equal(sample_loop(model, scheduler)[0], expected)
    if first_off == "hooks":
        with sostenuto.enable(build_tiny(), method, scheduler=scheduler) as other:
            sample_loop(other._denoiser, scheduler)
            assert handle.stats.as_dict() == other.stats.as_dict()  # counted without moving or casting a weight
        assert torch.equal(sample_loop(model, scheduler)[0], expected)
    if first_off == "hooks" and take_off is not None:
        take_off(model)
        assert torch.equal(
            sample_loop(model, scheduler)[0], expected
        )  # put in place again where the hooks took it along
    handle.disable()
    assert torch.equal(sample_loop(model, scheduler)[0], stock)
    if first_off == "sostenuto" and take_off is not None:
        take_off(model)
    assert torch.equal(sample_loop(model, scheduler)[0], stock)
    assert not any("sostenuto" in repr(vars(module).get("forward")) for module in model.modules())
    if take_off is not None:
        assert torch.equal(sample_loop(copy.deepcopy(model), scheduler)[0], stock)


def test_hooks_around_a_skipped_branch_that_were_there_first_do_not_run(tiny, scheduler):
    hook_everything(tiny)
    branches = {
        inner for block in tiny.transformer_blocks for part in (block.attn1, block.ff) for inner in part.modules()
    }
    with sostenuto.enable(tiny, FORA(2, anchor="start"), scheduler=scheduler):
        scheduler.set_timesteps(2)
        for step, timestep in enumerate(scheduler.timesteps):
            Idle.called.clear()
            with torch.no_grad():
                tiny(torch.randn(1, 2, 8, 8), timestep[None], torch.tensor([1]))
            assert branches.isdisjoint(Idle.called) == (step == 1)  # no weights are fetched for what is skipped


def test_hooks_changed_in_the_middle_of_a_generation_are_refused_and_the_next_generation_is_right(tiny, scheduler):
    expected = cached(tiny, scheduler)
    hook_everything(tiny)
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(tiny, scheduler, stop_at=2)
        remove_accelerate(tiny)
        with torch.no_grad(), pytest.raises(EngineError, match="between generations"):
            tiny(torch.randn(2, 2, 8, 8), scheduler.timesteps[2].expand(2), torch.tensor([0, 1]))
        assert torch.equal(sample_loop(tiny, scheduler)[0], expected)


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(), PyramidAttentionBroadcastConfig(2)])
def test_a_cache_of_diffusers_at_the_same_time_is_refused_in_either_order(scheduler, config):
    model = TINY_MODELS["FluxTransformer2DModel"].build()
    if isinstance(config, PyramidAttentionBroadcastConfig):
        config.current_timestep_callback = lambda: 500
    model.enable_cache(config)
    with pytest.raises(MethodError, match="disable_cache"):
        sostenuto.enable(model, FORA(2), scheduler=scheduler)
    model.disable_cache()
    expected = run_zoo(model, "FluxTransformer2DModel", scheduler)
    with sostenuto.enable(model, FORA(1), scheduler=scheduler):
        model.enable_cache(config)
        with pytest.raises(MethodError, match="disable_cache"):
            run_zoo(model, "FluxTransformer2DModel", scheduler)
        model.disable_cache()
        assert torch.equal(run_zoo(model, "FluxTransformer2DModel", scheduler), expected)


# --- adapters, quantisation, attention ---------------------------------------------------------------------------


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank addition, in its place as peft puts it there."""

    def __init__(self, base_layer, seed=0):
        super().__init__()
        self.base_layer = base_layer
        generator = torch.Generator().manual_seed(seed)
        self.down = torch.nn.Parameter(torch.randn(base_layer.in_features, 2, generator=generator) / 4)
        self.up = torch.nn.Parameter(torch.randn(2, base_layer.out_features, generator=generator) / 4)
        self.scale = 1.0

    def forward(self, x):
        return self.base_layer(x) + self.scale * (x @ self.down @ self.up)


def adapt(model):
    """Adapters on a tapped linear layer, one in front of it and one within a tapped attention; returns them with a remover."""
    places = [
        (model.single_transformer_blocks[0], "proj_out"),
        (model.single_transformer_blocks[0], "proj_mlp"),
        (model.transformer_blocks[0].attn, "to_q"),
    ]
    adapters = [Adapter(getattr(parent, name)) for parent, name in places]
    for (parent, name), adapter in zip(places, adapters, strict=True):
        setattr(parent, name, adapter)

    def remove():
        for (parent, name), adapter in zip(places, adapters, strict=True):
            setattr(parent, name, adapter.base_layer)

    return adapters, remove


def test_adapters_loaded_switched_and_unloaded_while_enabled(scheduler):
    name = "FluxTransformer2DModel"

    def fresh(scale=None):
        model = TINY_MODELS[name].build().requires_grad_(False)
        if scale is not None:
            for adapter in adapt(model)[0]:
                adapter.scale = scale
        with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
            return run_zoo(model, name, scheduler), handle.stats.macs

    model = TINY_MODELS[name].build().requires_grad_(False)
    with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:

        def check(scale):
            output, macs = fresh(scale)
            assert torch.equal(run_zoo(model, name, scheduler), output)
            assert handle.stats.macs == macs

        check(None)
        adapters, remove = adapt(model)
        for scale in (1.0, -2.0):
            for adapter in adapters:
                adapter.scale = scale
            check(scale)
        remove()
        check(None)


def test_an_adapter_loaded_in_the_middle_of_a_generation_is_refused(scheduler):
    name = "FluxTransformer2DModel"
    model = TINY_MODELS[name].build()
    with sostenuto.enable(model, FORA(2), scheduler=scheduler):
        scheduler.set_timesteps(4)
        inputs = [TINY_MODELS[name].inputs(float(t), torch.Generator().manual_seed(0)) for t in scheduler.timesteps]
        with torch.no_grad():
            model(**inputs[0])
            adapt(model)
            with pytest.raises(EngineError, match="a LoRA loaded"):
                model(**inputs[1])


def test_lora_of_peft_loaded_switched_fused_and_unloaded_while_enabled(scheduler):
    peft = pytest.importorskip("peft")
    name = "FluxTransformer2DModel"
    targets = ["to_q", "to_k", "proj_out", "proj_mlp"]

    def load(model):
        for seed, adapter in enumerate(("one", "two")):
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
            model.add_adapter(config, adapter)

    verbs = [
        load,
        lambda model: model.set_adapters("one"),
        lambda model: model.set_adapters(["one", "two"], [0.3, 0.9]),
        lambda model: model.fuse_lora(),
        lambda model: model.unfuse_lora(),
        lambda model: model.unload_lora(),
    ]
    model, twin = (TINY_MODELS[name].build().requires_grad_(False) for _ in range(2))
    with sostenuto.enable(model, FORA(2), scheduler=scheduler):
        for verb in verbs:
            verb(model)
            verb(twin)
            with sostenuto.enable(twin, FORA(2), scheduler=scheduler):
                expected = run_zoo(twin, name, scheduler)
            torch.testing.assert_close(run_zoo(model, name, scheduler), expected, rtol=1e-5, atol=1e-5)


def test_int8_weights_of_torchao_before_and_while_enabled(scheduler):
    quantization = pytest.importorskip("torchao.quantization")
    twin = build_tiny()
    quantization.quantize_(twin, quantization.Int8WeightOnlyConfig())
    expected = cached(twin, scheduler)
    model = build_tiny()
    with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
        sample_loop(model, scheduler)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        torch.testing.assert_close(sample_loop(model, scheduler)[0], expected)
        assert handle.stats.ideal_speedup > 1


def test_attention_processors_and_projections_are_swapped_while_enabled(tiny, scheduler):
    expected = cached(tiny, scheduler)
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        for block in tiny.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
        torch.testing.assert_close(sample_loop(tiny, scheduler)[0], expected, rtol=1e-4, atol=1e-4)
        for block in tiny.transformer_blocks:
            block.attn1.set_processor(AttnProcessor2_0())
            block.attn1.fuse_projections()
        torch.testing.assert_close(sample_loop(tiny, scheduler)[0], expected, rtol=1e-4, atol=1e-4)


def test_attention_backend_and_fused_projections_of_flux_while_enabled(scheduler):
    name = "FluxTransformer2DModel"
    model = TINY_MODELS[name].build()
    with sostenuto.enable(model, FORA(2), scheduler=scheduler):
        expected = run_zoo(model, name, scheduler)
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(run_zoo(model, name, scheduler), expected, rtol=1e-4, atol=1e-4)
        model.reset_attention_backend()
        model.fuse_qkv_projections()
        torch.testing.assert_close(run_zoo(model, name, scheduler), expected, rtol=1e-4, atol=1e-4)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(run_zoo(model, name, scheduler), expected, rtol=1e-4, atol=1e-4)


# --- gradients ---------------------------------------------------------------------------------------------------


def gradients(model, scheduler, steps=1):
    """Of the sum of squares of the last of some outputs."""
    model.zero_grad()
    scheduler.set_timesteps(4)
    output = None
    for step in range(steps):
        latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        output = model(latents, scheduler.timesteps[step].expand(2), torch.tensor([1, 2])).sample
    output.square().sum().backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["none", FORA(2), TeaCache(threshold=1.0)], ids=["none", "fora", "teacache"])
def test_a_computed_step_has_the_gradients_of_the_stock_model(scheduler, method, checkpointing):
    if isinstance(method, TeaCache) and checkpointing:
        pytest.skip("refused: what it does is decided while the network runs")
    model = build_tiny().requires_grad_(True)
    model.pos_embed.requires_grad_(False)
    expected = gradients(model, scheduler)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with sostenuto.enable(model, method, scheduler=scheduler):
        got = gradients(model, scheduler)
        model.disable_gradient_checkpointing()
        again = gradients(model, scheduler)
    for a, b, c in zip(expected, got, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and torch.equal(a, c))


def test_where_a_step_reuses_the_kept_features_are_constants(scheduler):
    model = build_tiny().requires_grad_(True)
    with sostenuto.enable(model, FORA(2, anchor="start"), scheduler=scheduler):
        got = gradients(model, scheduler, steps=2)
    named = dict(zip([name for name, _ in model.named_parameters()], got, strict=True))
    assert (
        named["transformer_blocks.0.attn1.to_q.weight"] is None
    )  # of the step before, whose output is a constant here
    assert named["transformer_blocks.0.norm1.linear.weight"].any()  # the gates are computed at every step


@torch.enable_grad()
def test_gradients_through_a_whole_cached_sampling_are_those_of_what_was_computed(scheduler):
    model = build_tiny()
    scheduler.set_timesteps(4)
    start = torch.randn(1, 2, 8, 8)

    def end(latents):
        for timestep in scheduler.timesteps:
            latents = latents - 0.1 * model(latents, timestep[None], torch.tensor([1])).sample
        return latents.square().sum()

    direction = torch.randn_like(start)
    latents = start.clone().requires_grad_(True)
    with sostenuto.enable(model, "none", scheduler=scheduler):
        end(latents).backward()
    with torch.no_grad():
        step = 1e-2
        slope = (end(start + step * direction) - end(start - step * direction)) / (2 * step)
    torch.testing.assert_close((latents.grad * direction).sum(), slope, rtol=1e-2, atol=1e-2)
    latents = start.clone().requires_grad_(True)
    with sostenuto.enable(model, FORA(2), scheduler=scheduler):
        end(latents).backward()  # what later steps overwrite was kept for the backward pass
    assert latents.grad.isfinite().all()


@pytest.mark.parametrize("method", [FORA(2, anchor="start"), TeaCache(threshold=1.0)])
def test_skipping_in_training_mode_or_under_gradient_checkpointing_is_refused(scheduler, method):
    model = build_tiny().requires_grad_(True)
    with sostenuto.enable(model, method, scheduler=scheduler):
        with pytest.raises(EngineError, match="training mode"):
            gradients(model.train(), scheduler, steps=2)
        model.eval().enable_gradient_checkpointing()
        with pytest.raises(EngineError, match="gradient checkpointing"):
            gradients(model, scheduler, steps=2)
        model.train()
        sample_loop(model, scheduler)  # without gradients neither matters


# --- saving, copying, moving -------------------------------------------------------------------------------------


def test_what_is_saved_while_enabled_is_the_plain_model(tiny, scheduler, tmp_path):
    stock, keys = sample_loop(tiny, scheduler)[0], list(tiny.state_dict())
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        sample_loop(tiny, scheduler)
        assert list(tiny.state_dict()) == keys
        tiny.save_pretrained(tmp_path)
        weights = io.BytesIO()
        torch.save(tiny.state_dict(), weights)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert "sostenuto" not in (tmp_path / "config.json").read_text()
    assert torch.equal(sample_loop(loaded, scheduler)[0], stock)
    weights.seek(0)
    other = build_tiny(seed=1)
    other.load_state_dict(torch.load(weights))
    assert torch.equal(sample_loop(other, scheduler)[0], stock)


def saved_and_loaded(model):
    """Through ``torch.save``."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("wrapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_copy_of_an_enabled_model_is_plain(tiny, scheduler, how, wrapped):
    stock = sample_loop(tiny, scheduler)[0]
    target = torch.compile(tiny, backend="eager") if wrapped else tiny
    with sostenuto.enable(target, FORA(2), scheduler=scheduler):
        expected = sample_loop(target, scheduler)[0]
        torch.testing.assert_close(sample_loop(how(target), scheduler)[0], stock)
        assert torch.equal(sample_loop(target, scheduler)[0], expected)
    assert not torch.equal(expected, stock)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_block_are_refused_while_enabled_and_fine_afterwards(tiny, scheduler, how):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        sample_loop(tiny, scheduler)
        with pytest.raises(EngineError, match="disable it first"):
            how(tiny.transformer_blocks[0])
    how(tiny.transformer_blocks[0])


def test_a_whole_pipeline_is_copied_with_a_plain_denoiser(tiny, scheduler):
    pipe = SimpleNamespace(transformer=tiny, scheduler=scheduler)
    stock = sample_loop(tiny, scheduler)[0]
    with sostenuto.enable(pipe, FORA(2)):
        twin = copy.deepcopy(pipe)
    assert torch.equal(sample_loop(twin.transformer, twin.scheduler)[0], stock)


def test_with_hooks_put_around_ours_a_copy_is_refused_and_all_stays_as_it_was(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        expected = sample_loop(tiny, scheduler)[0]
        add_hook_to_module(tiny.transformer_blocks[0].attn1, ModelHook())
        with pytest.raises(EngineError, match="hooks around what sostenuto replaced can't be copied"):
            copy.deepcopy(tiny)
        assert torch.equal(sample_loop(tiny, scheduler)[0], expected)


@pytest.mark.parametrize("method", [FORA(2), TeaCache(threshold=1.0)])
def test_the_dtype_may_change_between_generations(scheduler, method):
    model, seen = build_tiny(), []
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)
            twin = build_tiny()
            if seen:  # what went through bfloat16 keeps its precision
                twin.to(torch.bfloat16)
            seen.append(dtype)
            got = sample_loop(model, scheduler, dtype=dtype)[0]
            assert torch.equal(got, cached(twin.to(dtype), scheduler, method, dtype=dtype))
            assert handle.predicted_cache_bytes > 0


def test_inference_mode_and_no_grad_may_take_turns(tiny, scheduler):
    expected = cached(tiny, scheduler)
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                assert torch.equal(sample_loop(tiny, scheduler)[0], expected)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 2, 8, 8)
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        for step, timestep in enumerate(scheduler.timesteps):  # also within one generation
            with torch.no_grad(), torch.inference_mode(step % 2 == 0):
                tiny(latents, timestep[None], torch.tensor([1]))
        assert "reuse" in handle.stats.plan[2]


def test_autocast_is_counted_as_it_was(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            sample_loop(tiny, scheduler)
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes  # read outside of autocast
        assert all(leaf.isfinite().all() for leaf in tree_leaves(sample_loop(tiny, scheduler)[0]))
