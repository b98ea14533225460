"""DeepCache on tiny U-Nets: against the stock models and a naive forward of both classes."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import build_tiny
from sostenuto import FORA, AnatomyError, DeepCache, EpsilonScaling, Forecast, MethodError
from sostenuto.cost import TensorSpec
from sostenuto.plan import Op
from sostenuto.unet import beyond, num_branches
from unets import BUILDERS, build_conditional, build_plain, call, loop


def carried(handle):
    """What each call did, first pass only; statistics would count costs, which takes longer than the generation."""
    return "".join("r" if c.ops == (Op.REUSE,) else "c" for _, which, _, c in handle._record.calls if which == 0)


every_branch = pytest.mark.parametrize(
    ("name", "branch"), [(name, branch) for name, build in BUILDERS.items() for branch in range(num_branches(build()))]
)


@every_branch
def test_every_branch_of_every_kind_gives_what_the_naive_forward_gives(name, branch, monkeypatch):
    def poison(spec):  # whoever reads what a skipped module returns would show it
        return torch.full(spec.shape, float("nan"), dtype=spec.dtype)

    monkeypatch.setattr(TensorSpec, "empty", poison)
    model, scheduler = BUILDERS[name](), DDIMScheduler()
    stock = loop(model, scheduler, 5)
    expected = loop(model, scheduler, 5, branch=branch, full=(0, 2, 4))
    with sostenuto.enable(model, DeepCache(interval=2, branch_id=branch), scheduler=scheduler) as handle:
        got = loop(model, scheduler, 5)
        assert carried(handle) == "crcrc"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, stock, rtol=1e-3, atol=1e-4)


@every_branch
@torch.no_grad()
def test_with_identical_inputs_a_cached_step_is_bit_identical(name, branch):
    model, scheduler = BUILDERS[name](), DDIMScheduler()
    scheduler.set_timesteps(2)
    latents, timestep = torch.randn(2, 2, 8, 8), scheduler.timesteps[0]
    stock = call(model, latents, timestep)
    with sostenuto.enable(model, DeepCache(branch_id=branch), scheduler=scheduler) as handle:
        outputs = []
        handle.driver = lambda _, prober: outputs.extend(map(prober.run, ([Op.STORE], [Op.REUSE]))) or outputs[0]
        call(model, latents, timestep)
    assert len(outputs) == 2
    assert all(torch.equal(output.sample, stock) for output in outputs)


@torch.no_grad()
def test_bit_identical_in_the_memory_format_of_the_model():
    model, scheduler = build_conditional().to(memory_format=torch.channels_last), DDIMScheduler()
    scheduler.set_timesteps(2)
    latents = torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    stock = call(model, latents, scheduler.timesteps[0])
    with sostenuto.enable(model, DeepCache(branch_id=1), scheduler=scheduler) as handle:
        handle.driver = lambda tick, prober: (prober.run([Op.STORE]), prober.run([Op.REUSE]))[1]
        assert torch.equal(call(model, latents, scheduler.timesteps[0]), stock)


def test_what_lies_beyond_a_branch():
    model = build_plain()  # skip connections: input, block 0: 1 2, down 3, block 1: 4 5, down 6, block 2: 7 8
    middle = ["down_blocks.2", "mid_block", "up_blocks.0"]
    assert num_branches(model) == 9
    assert beyond(model, 8) == ["mid_block"]
    assert beyond(model, 7) == ["down_blocks.2.resnets.1", "mid_block", "up_blocks.0.resnets.0"]
    assert beyond(model, 5) == ["down_blocks.1.downsamplers.0", *middle]
    assert beyond(model, 4) == [
        *("down_blocks.1.resnets.1", "down_blocks.1.attentions.1", "down_blocks.1.downsamplers.0", *middle),
        *("up_blocks.1.resnets.0", "up_blocks.1.attentions.0"),
    ]
    assert beyond(model, 3) == [
        *("down_blocks.1", *middle),
        *("up_blocks.1.resnets.0", "up_blocks.1.attentions.0", "up_blocks.1.resnets.1", "up_blocks.1.attentions.1"),
    ]
    assert beyond(model, 0) == [
        *("down_blocks.0", "down_blocks.1", *middle, "up_blocks.1"),
        *("up_blocks.2.resnets.0", "up_blocks.2.resnets.1"),
    ]


def official_runs(model, branch):
    """What the official plug-in runs of a U-Net with two layers per block in a cached step, from its rule."""
    cached_block, cached_layer = divmod(branch, 3)
    runs = set()
    for side, blocks in (("down", model.down_blocks), ("up", reversed(model.up_blocks))):
        for block_id, block in enumerate(blocks):
            place = block_id if side == "down" else len(model.up_blocks) - 1 - block_id
            for kind in ("resnets", "attentions", "downsamplers", "upsamplers"):
                for index in range(len(getattr(block, kind, None) or ())):
                    layer = index if side == "down" else 2 - index
                    layer = {"downsamplers": 2, "upsamplers": 0}.get(kind, layer)
                    within = layer < cached_layer if side == "down" else layer <= cached_layer
                    if block_id < cached_block or (block_id == cached_block and within):
                        runs.add(f"{side}_blocks.{place}.{kind}.{index}")
    return runs


def note_runs(model):
    """The set of layers' paths that really run, from now on."""
    ran = set()
    for path, module in model.named_modules():
        if path.count(".") == 3 and path.split(".")[0] != "mid_block":
            module.forward = lambda *a, path=path, run=module.forward, **k: (ran.add(path), run(*a, **k))[1]
    return ran


@pytest.mark.parametrize("branch", range(6))
def test_a_branch_is_that_of_the_official_plug_in(branch):
    model, scheduler = build_conditional(), DDIMScheduler()
    ran = note_runs(model)
    loop(model, scheduler, 1)
    assert len(ran) == 5 + 6 + 4 + 2  # residual networks down and up, attentions, samplers
    with sostenuto.enable(model, DeepCache(2, branch), scheduler=scheduler):
        loop(model, scheduler, 1)
        with pytest.raises(KeyboardInterrupt):
            loop(model, scheduler, 2, stop_at=1)
        ran.clear()
        call(model, torch.randn(2, 2, 8, 8), scheduler.timesteps[1])
    assert ran == official_runs(model, branch)


@pytest.mark.parametrize(
    ("build", "branch", "scheduler"),
    [
        (build_conditional, 1, DDPMScheduler()),
        (lambda: build_plain(1), 2, PNDMScheduler(skip_prk_steps=True)),
    ],
)
def test_counted_macs_are_those_of_a_real_run(build, branch, scheduler):
    model = build()
    with sostenuto.enable(model, DeepCache(3, branch), scheduler=scheduler) as handle:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loop(model, scheduler, 6)
        stats = handle.stats
        steps = len(scheduler.timesteps)  # PNDM lists one step more than it is asked for, and one timestep twice
        assert stats.macs == counter.get_total_flops() // 2 < stats.macs_uncached
        assert [row for (row,) in stats.plan] == ["reuse" if p % 3 else "compute" for p in range(steps)]
        assert stats.actions == {"compute": 2 + steps % 2, "reuse": 4, "forecast": 0, "partial": 0}
        feature = {1: 8 * 8 * 8, 2: 8 * 4 * 4}[branch]
        assert stats.cache_bytes_peak == handle.predicted_cache_bytes == 2 * feature * 4


@pytest.mark.parametrize("separate", [False, True])
def test_guidance_by_two_calls_keeps_two_features(separate):
    model, scheduler = build_conditional(), DDIMScheduler()
    expected = loop(model, scheduler, separate=separate, branch=2, full=(0, 3, 6))
    with sostenuto.enable(model, DeepCache(3, 2), scheduler=scheduler) as handle:
        got = loop(model, scheduler, separate=separate)
        assert [which for _, which, *_ in handle._record.calls] == [0, 1][: 1 + separate] * 7
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_another_batch_in_the_middle_computes_first():
    model, scheduler = build_plain(), DDIMScheduler()
    scheduler.set_timesteps(4)
    with sostenuto.enable(model, DeepCache(4, 3), scheduler=scheduler) as handle:
        for step, batch in enumerate((2, 2, 3, 3)):
            call(model, torch.randn(batch, 2, 8, 8), scheduler.timesteps[step])
        assert carried(handle) == "crcr"


@pytest.mark.parametrize(("branch", "size"), [(0, (9, 7)), (1, (8, 8)), (2, (9, 7)), (4, (8, 6)), (5, (9, 7))])
@torch.no_grad()
def test_residuals_of_a_controlnet_are_added_at_full_and_cached_steps(branch, size):
    model, scheduler = build_conditional(), DDIMScheduler()
    scheduler.set_timesteps(2)
    half = tuple((side + 1) // 2 for side in size)  # an odd size makes the network ask for sizes as it goes up
    shapes = [(8, *size)] * 3 + [(8, *half)] + [(16, *half)] * 2
    torch.manual_seed(1)

    def inputs():
        return torch.randn(2, 2, *size), {
            "down_block_additional_residuals": tuple(torch.randn(2, *shape) for shape in shapes),
            "mid_block_additional_residual": torch.randn(2, *shapes[-1]),
        }

    pairs = list(zip((inputs(), inputs()), scheduler.timesteps, strict=True))
    with sostenuto.enable(model, DeepCache(2, branch), scheduler=scheduler) as handle:
        _, got = (call(model, latents, timestep, **extra) for (latents, extra), timestep in pairs)
        assert carried(handle) == "cr"
    # In the stock model: the output of the last module beyond the branch, at the first step, taken over to the second.
    last, feature = model.get_submodule(beyond(model, branch)[-1]), []
    hook = last.register_forward_hook(lambda _m, _i, output: feature.append(output) or feature[0])
    _, expected = (call(model, latents, timestep, **extra) for (latents, extra), timestep in pairs)
    hook.remove()
    assert torch.equal(got, expected)


@torch.no_grad()
def test_residuals_of_an_adapter_work_though_the_network_writes_them_in_place():
    model, scheduler = build_conditional(), DDIMScheduler()
    scheduler.set_timesteps(2)
    torch.manual_seed(2)
    residuals = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    with sostenuto.enable(model, DeepCache(2, 0), scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps:
            call(model, torch.randn(2, 2, 8, 8), timestep, down_intrablock_additional_residuals=list(residuals))
        assert carried(handle) == "cr"


def test_an_interrupted_generation_leaves_nothing_behind():
    model, scheduler = build_plain(), DDIMScheduler()
    method = DeepCache(3, 1)
    with sostenuto.enable(model, method, scheduler=scheduler):
        fresh = loop(model, scheduler, seed=5)
    with sostenuto.enable(model, method, scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            loop(model, scheduler, seed=1, stop_at=2)
        again = loop(model, scheduler, seed=5)
    assert torch.equal(fresh, again)
    copy.deepcopy(model)


def test_an_interval_of_one_is_the_stock_model_and_disabling_gives_it_back():
    model, scheduler = build_conditional(), DDPMScheduler()
    torch.manual_seed(0)
    stock = loop(model, scheduler)
    torch.manual_seed(0)
    with sostenuto.enable(model, DeepCache(1), scheduler=scheduler):
        assert torch.equal(loop(model, scheduler), stock)
    torch.manual_seed(0)
    assert torch.equal(loop(model, scheduler), stock)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_noise_is_scaled_on_top_of_it():
    model, scheduler = build_plain(), DDIMScheduler()
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 2, 8, 8)
    with sostenuto.enable(model, DeepCache(3), scheduler=scheduler):
        plain = [call(model, latents, timestep) for timestep in scheduler.timesteps]
    scheduler.set_timesteps(3)
    with sostenuto.enable(model, DeepCache(3) | EpsilonScaling(1.1), scheduler=scheduler):
        scaled = [call(model, latents, timestep) for timestep in scheduler.timesteps]
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a / 1.1, b)


def test_the_kept_feature_may_be_forecast_in_place_of_reused():
    model, scheduler = build_conditional(), DDIMScheduler()
    expected = loop(model, scheduler, 5, branch=4, full=(0, 2, 4), linear=True)
    with sostenuto.enable(model, DeepCache(2, 4) | Forecast(order=1), scheduler=scheduler) as handle:
        got = loop(model, scheduler, 5)
        assert [c.ops for *_, c in handle._record.calls][3] == (Op.FORECAST,)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_with_a_unet_is_found():
    pipe = DDPMPipeline(build_plain(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with sostenuto.enable(pipe, "deepcache") as handle:
        pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
        assert carried(handle) == "crrc"
    with pytest.raises(AnatomyError, match="UNet2DModel is a U-Net"):
        sostenuto.enable(pipe, FORA(2))


def test_verify_proves_it_on_the_users_own_unet():
    scheduler = DDIMScheduler()
    proved = sostenuto.verify(
        build_plain(1),
        DeepCache(2, 2),
        lambda m, _, num_inference_steps: loop(m, scheduler, num_inference_steps),
        scheduler=scheduler,
    )
    assert (proved["sites"], proved["steps"], proved["passes"]) == (1, 4, 1)


def test_image_to_image_counts_from_its_first_step():
    model, scheduler = build_plain(), DDIMScheduler()
    scheduler.set_timesteps(8)
    with sostenuto.enable(model, DeepCache(3), scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps[2:]:
            call(model, torch.randn(1, 2, 8, 8), timestep)
        assert carried(handle) == "crrcrr"


class Odd(torch.nn.Module):
    def forward(self, sample, timestep):
        return sample


def build_short():
    model = build_plain()
    del model.up_blocks[0].resnets[2]
    return model


@pytest.mark.parametrize(
    ("build", "method", "error", "words"),
    [
        (build_tiny, DeepCache(), MethodError, "this is a DiTTransformer2DModel"),
        (build_plain, DeepCache(branch_id=9), MethodError, "0 to 8 .* can't be 9"),
        (lambda: build_plain(1, mid_block_type=None), DeepCache(branch_id=5), MethodError, "0 to 4"),
        (
            lambda: build_plain(
                down_block_types=("SkipDownBlock2D",) * 3,
                up_block_types=("SkipUpBlock2D",) * 3,
                block_out_channels=(32, 32, 32),
            ),
            DeepCache(),
            AnatomyError,
            "blocks.0 is a Skip",
        ),
        (build_short, DeepCache(), AnatomyError, "hands on 9 skip connections, its up path joins 8"),
        (Odd, DeepCache(), MethodError, "this is a Odd"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_as_it_was(build, method, error, words):
    model = build()
    with pytest.raises(error, match=words):
        sostenuto.enable(model, method, scheduler=DDIMScheduler())
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


SMALL = {
    build_plain: dict(
        block_out_channels=(4, 4),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        mid_block_type=None,
    ),
    build_conditional: dict(block_out_channels=(4, 4), mid_block_type=None),
}


@pytest.mark.parametrize(
    ("build", "backend"), [(build_plain, "eager"), pytest.param(build_conditional, "aot_eager", marks=pytest.mark.slow)]
)
def test_compiled_in_one_graph_per_mode(build, backend):
    torch._dynamo.reset()
    counters.clear()
    scheduler, method = DDIMScheduler(), DeepCache(2, 1)
    model = build(1, **SMALL[build])
    with sostenuto.enable(model, method, scheduler=scheduler):
        expected = loop(model, scheduler, 4)
    model.compile(fullgraph=True, backend=backend)
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        got = loop(model, scheduler, 4)
        assert carried(handle) == "crcr"
        loop(model, scheduler, 4, seed=3)
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
