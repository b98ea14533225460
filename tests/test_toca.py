"""ToCa and DuCa: kinds of steps and ratios as published, what partial steps cost, limits, compilation, misuse."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import build_tiny, sample_loop
from naive_toca import naive_copy
from sostenuto import (
    FORA,
    CacheTable,
    DuCa,
    EBCache,
    EpsilonScaling,
    MethodError,
    RatioSchedule,
    Site,
    SiteKind,
    StepState,
    ToCa,
)
from sostenuto.methods.token_cycle import RATIO_SCHEDULES
from tiny_pixart import build_pixart, sample_pixart

EVEN = {"threshold_weight": 0.0, "middle_interval": None}
MLP_ONLY = {"ratio_schedule": "constant", "spatial_bonus": 0.0, **EVEN}
STRINGS = {
    3: "FCACFFCACFCACFCACFCFACFACFACFACFCFCFCFCFCFCFCFCFCF",
    4: "FFCACACFCFACACFACACFCFCACFCACFCACFCFCFCFCFCFACFACF",
}


def letters(method, num_steps=50):
    return "".join(kind.value for kind in method.kinds(num_steps))


@pytest.mark.parametrize("interval", [3, 4])
def test_kinds_of_steps_are_the_published_sequences(interval):
    assert letters(DuCa(interval)) == STRINGS[interval]
    assert letters(ToCa(interval)) == STRINGS[interval].replace("A", "C")


@pytest.mark.parametrize(
    ("method", "num_steps", "expected"),
    [
        (ToCa(3, fresh_ratio=0.0, middle_interval=None), 10, "FCCFCCFCCF"),  # without tokens w is 0
        (ToCa(1), 10, "F" * 10),
        (DuCa(5, anchor="last-full", pattern_start="conservative_first", **EVEN), 11, "FCACAFCACAF"),
        (DuCa(5, anchor="last-full", pattern_start="aggressive_first", **EVEN), 11, "FACACFACACF"),
        (DuCa(5, pattern_start="code_mod", **EVEN), 11, "FACACFACACF"),  # offsets 4 3 2 1
        (DuCa(4, pattern_start="code_mod", **EVEN), 9, "FCACFCACF"),  # offsets 3 2 1
        (DuCa(4, pattern_start="aggressive_first", **EVEN), 9, "FACAFACAF"),
        (DuCa.open_sora(), 12, "FFFFCAFCAFCA"),
        (DuCa.flux_dev(), 13, "FFFCACAFCACAF"),
        (DuCa.hunyuan_video(), 11, "FCACAFCACAF"),
        (DuCa.qwen_image(), 10, "FCACACACAF"),
        (ToCa.hunyuan_video(), 11, "FCCCCFCCCCF"),
        (DuCa.pixart_alpha(), 20, "FCAFCAFCAFCAFCAFCAFC"),
        (ToCa.pixart_alpha(), 20, "FCCCFCFCCFCCFCCFCCFC"),
    ],
)
def test_kinds_of_steps_by_option_and_preset(method, num_steps, expected):
    assert letters(method, num_steps) == expected


def site(kind, block, name="transformer_blocks"):
    return Site(f"{name}.{block}.x", kind, block, None, 0)


@pytest.mark.parametrize(
    ("schedule", "where", "num_blocks", "step", "num_steps", "share"),
    [
        ("ddim50", site(SiteKind.MLP, 27), 28, 49, 50, 3 * 1.2 * 2.5),
        ("ddim50", site(SiteKind.MLP, 0), 28, 24, 50, (3 - 4 * 25 / 50) * 0.8 * 2.5),
        ("ddim50", site(SiteKind.MLP, 5), 28, 11, 50, 0.0),  # i/S = 0.76
        ("ddim50", site(SiteKind.SELF_ATTENTION, 5), 28, 49, 50, 0.0),
        ("ddpm250", site(SiteKind.MLP, 0), 28, 249, 250, 1.4 * 1.8 * 2.5),
        ("ddpm250", site(SiteKind.MLP, 27), 28, 249, 250, 1.4 * 0.2 * 2.5),
        ("pixart", site(SiteKind.CROSS_ATTENTION, 0), 28, 0, 20, 1.9 * 1.6 * 0.6),
        ("pixart", site(SiteKind.MLP, 27), 28, 10, 20, 1.0 * 0.4 * 1.6),
        ("open-sora", site(SiteKind.MLP, 3), 28, 7, 30, 1.495),
        ("flux", site(SiteKind.MLP, 0), 19, 7, 50, 1.5 * 0.4),
        ("flux", site(SiteKind.MLP, 18, "single_transformer_blocks"), 19, 7, 50, 0.5 * 1.6),
        ("constant", site(SiteKind.MLP, 0), 1, 0, 50, 1.0),
        ("ddpm250", site(SiteKind.MLP, 0), 1, 249, 250, 1.4 * 2.5),  # a single block is in the middle
    ],
)
def test_shares_are_those_of_the_published_factors(schedule, where, num_blocks, step, num_steps, share):
    assert RATIO_SCHEDULES[schedule].share(where, num_blocks, step, num_steps) == pytest.approx(share)


def test_partial_steps_run_as_many_tokens_as_planned_and_the_run_costs_what_is_counted(scheduler):
    tiny, costs = build_tiny(num_layers=1), []
    for ratio in (0.0, 0.05, 0.2, 0.9, 1.0):
        method = ToCa(fresh_ratio=ratio, selection="random", **MLP_ONLY)
        with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                sample_loop(tiny, scheduler, 4)
            assert handle.stats.macs == counter.get_total_flops() // 2
            costs.append(handle.stats.macs)
    tokens = [0, 0, 3, 14, 16]  # int(ratio · 16)
    one_token = 2 * 2 * (2 * 32 * 128)  # partial steps, rows, an MLP of width 32
    assert [cost - costs[0] for cost in costs] == [count * one_token for count in tokens]


def test_a_ratio_of_nothing_is_plain_reuse(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(3), scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 7)
    for ratio in (0.0, 0.05):  # the second comes to less than one of 16 tokens
        with sostenuto.enable(tiny, ToCa(fresh_ratio=ratio, **MLP_ONLY), scheduler=scheduler):
            got, _ = sample_loop(tiny, scheduler, 7)
        assert torch.equal(got, expected)


def test_a_ratio_of_one_computes_the_mlps_and_reuses_attention(tiny, scheduler):
    states = [StepState.REUSE_ATTENTION if kind == "C" else StepState.COMPUTE for kind in "FCCFCCF"]
    with sostenuto.enable(tiny, EBCache(CacheTable(tuple(states))), scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 7)
    with sostenuto.enable(tiny, ToCa(fresh_ratio=1.0, **MLP_ONLY), scheduler=scheduler):
        got, _ = sample_loop(tiny, scheduler, 7)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("selection", ["value-norm", "attention"])
def test_duca_is_duca_written_out(tiny, scheduler, selection):
    method = DuCa(5, 0.3, selection, ratio_schedule="constant", pattern_start="conservative_first", **EVEN)
    kinds = letters(method, 11)
    assert kinds == "FCACAFCACAF"
    naive = naive_copy(tiny, method, kinds, lambda block, branch, step: 0.3 if branch == "ff" else 0.0)
    expected, _ = sample_loop(naive, scheduler, 11)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(tiny, scheduler, 11)
        plan = handle.stats.plan
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert plan[1] == ["reuse", "partial"] * 3 + ["compute"]
    assert plan[2] == ["skip"] * 6 + ["reuse"]


def test_an_aggressive_step_costs_the_head_alone(tiny, scheduler):
    method = DuCa(fresh_ratio=0.3, ratio_schedule="constant", **EVEN)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample_loop(tiny, scheduler, 4)
        assert handle.stats.macs == counter.get_total_flops() // 2
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            scheduler.set_timesteps(4)
            head = []
            for timestep in scheduler.timesteps:
                before = counter.get_total_flops()
                tiny(torch.zeros(2, 2, 8, 8), timestep.expand(2), torch.tensor([0, 1]))
                head.append((counter.get_total_flops() - before) // 2)
    assert letters(method, 4) == "FACF"
    embedding = 2 * (256 * 32 + 32 * 32)
    assert head[1] == 2 * 16 * (2 * 4 * 32) + embedding + 2 * (32 * 64) + 2 * 16 * (32 * 8)


def test_open_sora_computes_cross_attention_at_every_second_full_step():
    model, scheduler = build_pixart(), DDIMScheduler(num_train_timesteps=1000)
    with sostenuto.enable(model, DuCa.open_sora(), scheduler=scheduler) as handle:
        sample_pixart(model, scheduler, 12)
        cross = [row[1] for row in handle.stats.plan]
        attention = [row[0] for row in handle.stats.plan]
    c, r, s = "compute", "reuse", "skip"
    assert cross == [c, c, c, r, r, s, c, r, s, r, r, s]
    assert attention == [c, c, c, c, r, s, c, r, s, c, r, s]


@pytest.mark.parametrize("method", [ToCa.dit_xl_2(), DuCa.dit_xl_2()])
def test_verify_proves_the_plan(scheduler, method):
    model = build_tiny(num_layers=1)

    def sample(model, generator, num_inference_steps):
        return sample_loop(model, scheduler, num_inference_steps)

    assert sostenuto.verify(model, method, sample, scheduler=scheduler, num_inference_steps=8)["steps"] == 8


@pytest.mark.parametrize(
    "preset",
    [
        ToCa.dit_xl_2, ToCa.dit_xl_2_ddpm250, ToCa.flux_dev, ToCa.hunyuan_video,
        DuCa.dit_xl_2, DuCa.flux_dev, DuCa.hunyuan_video, DuCa.qwen_image,
    ],
)  # fmt: skip
def test_presets_run(tiny, scheduler, preset):
    with sostenuto.enable(tiny, preset(), scheduler=scheduler):
        assert torch.isfinite(sample_loop(tiny, scheduler, 8)[0]).all()


@pytest.mark.parametrize("preset", [ToCa.pixart_alpha, ToCa.open_sora, DuCa.pixart_alpha, DuCa.open_sora])
def test_presets_for_text_to_image_run(preset):
    model, scheduler = build_pixart(num_layers=2), DDIMScheduler(num_train_timesteps=1000)
    with sostenuto.enable(model, preset(), scheduler=scheduler):
        assert torch.isfinite(sample_pixart(model, scheduler, 8)).all()


@pytest.mark.parametrize("method", [ToCa(fresh_ratio=0.3, **MLP_ONLY), DuCa(fresh_ratio=0.3, **MLP_ONLY)])
def test_a_generation_that_begins_between_full_steps_computes_first(tiny, scheduler, method):
    scheduler.set_timesteps(8)
    with torch.no_grad(), sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        for timestep in scheduler.timesteps[2:]:
            tiny(torch.full((2, 2, 8, 8), 0.1), timestep.expand(2), torch.tensor([0, 1]))
        assert letters(method, 8)[2] != "F"
        assert set(handle.stats.plan[0]) == {"compute"}


def test_kept_features_stay_within_max_cache_bytes(tiny, scheduler):
    one = 2 * 16 * 32 * 4
    with sostenuto.enable(
        tiny, ToCa(fresh_ratio=0.3, **MLP_ONLY), scheduler=scheduler, max_cache_bytes=4 * one
    ) as handle:
        sample_loop(tiny, scheduler)
        assert handle.stats.cache_bytes_peak == 4 * one


def test_a_network_that_writes_into_a_partial_output_is_refused(tiny, scheduler):
    with torch.inference_mode(), sostenuto.enable(tiny, ToCa(fresh_ratio=0.3, **MLP_ONLY), scheduler=scheduler):
        sample_loop(tiny, scheduler)
        tiny.transformer_blocks[0].ff.register_forward_hook(lambda module, args, output: output.add_(1))
        with pytest.raises(sostenuto.EngineError, match=r"writes into the output of transformer_blocks\.0\.ff"):
            sample_loop(tiny, scheduler)


def test_combined_with_a_corrector_the_noise_is_scaled_too(tiny, scheduler):
    _, plain = sample(tiny, scheduler, DuCa(fresh_ratio=0.3, selection="attention", **MLP_ONLY))
    _, scaled = sample(tiny, scheduler, DuCa(fresh_ratio=0.3, selection="attention", **MLP_ONLY) | EpsilonScaling(1.25))
    torch.testing.assert_close(scaled[0], plain[0] * 0.8)


def sample(model, scheduler, method):
    with sostenuto.enable(model, method, scheduler=scheduler):
        return sample_loop(model, scheduler, 5)


def test_compiled_one_graph_serves_each_kind_of_step(scheduler):
    method = DuCa(fresh_ratio=0.3, **MLP_ONLY)
    model = build_tiny(num_layers=1)
    torch._dynamo.reset()
    counters.clear()
    expected, _ = sample(model, scheduler, method)
    model.compile(backend="aot_eager", fullgraph=True)
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        got, _ = sample_loop(model, scheduler, 5)
        modes = {carried for *_, carried in handle._record.calls}
        sample_loop(model, scheduler, 5, seed=3)
    assert counters["stats"]["unique_graphs"] == len(modes)
    assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(MethodError, match="random tokens"):
        sostenuto.enable(model, ToCa(), scheduler=scheduler)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", 0), ("interval", 2.5), ("interval", True), ("tile", 0), ("first_full_steps", 0),
        ("cross_attention_every", 0), ("seed", -1), ("middle_interval", 0), ("fresh_ratio", 1.1), ("fresh_ratio", -0.1),
        ("fresh_ratio", float("nan")), ("staleness_weight", -1), ("spatial_bonus", "x"), ("threshold_weight", 1.0),
        ("selection", "best"), ("anchor", "middle"), ("ratio_schedule", "nonsense"), ("pattern_start", "full_first"),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(name, value):
    with pytest.raises(MethodError, match=f"DuCa's {name} must be .*, not {value!r}"):
        DuCa(**{name: value})


@pytest.mark.parametrize(
    "wrong", [{"mlp": -1}, {"step_weight": float("inf")}, {"cross_attention": None}, {"streams": (("a", -0.5),)}]
)
def test_ratio_schedules_out_of_range_are_refused(wrong):
    with pytest.raises(MethodError, match="a RatioSchedule's"):
        RatioSchedule(**wrong)


def test_scores_come_from_the_last_full_step_though_mlps_were_computed_since(tiny, scheduler):
    """With a falling ratio all tokens of the MLPs run at the first partial step, and fewer at the next ones."""
    method = ToCa(interval=4, fresh_ratio=0.9, selection="attention", ratio_schedule="pixart", spatial_bonus=0, **EVEN)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        assert torch.isfinite(sample_loop(tiny, scheduler, 12)[0]).all()
        assert any("partial" in row and "compute" in row[1:] for row in handle.stats.plan)


def test_factors_of_streams_are_for_networks_that_have_both(tiny, scheduler):
    schedule = RATIO_SCHEDULES["flux"]
    double, single = site(SiteKind.MLP, 0), site(SiteKind.FUSED, 1, "single_transformer_blocks")
    assert schedule.fit([double, single]) is schedule
    assert schedule.fit([double]).share(double, 1, 0, 50) == pytest.approx(1.0)
