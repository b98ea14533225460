"""DiTFastAttn: window attention, its residual and sharing, against dense and naive computations of their own."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import build_tiny, sample_loop
from naive_attention import SITES, WG, C, G, R, W, guided_loop, naive_copy
from sostenuto import (
    Action,
    CacheTable,
    DiTFastAttn,
    DiTFastAttnCalibration,
    EBCache,
    MethodError,
    TableError,
)
from sostenuto.attention_tap import AttentionTap, window_attention
from sostenuto.plan import Op, Plan, fit, lower, peak_bytes
from sostenuto.sites import inspect
from tiny_pixart import build_pixart, sample_pixart

ROWS = ((C, C, C), (W, R, G), (R, WG, W), (WG, C, R), (G, W, WG), (W, R, R))
WINDOW = 3


def table_of(rows=ROWS, **calibration):
    return CacheTable(
        tuple(dict(zip(SITES, row, strict=True)) for row in rows), method="ditfastattn", calibration=calibration
    )


def attention_tap(model, window=WINDOW, half="first"):
    """The tap of the first self-attention, and what it puts in place of the module's forward."""
    tap = AttentionTap(inspect(model)[0], model, window, half)
    tap.slots = [None]
    return tap, tap.branch(tap.module.forward)


# --- window attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize("window", [1, 3, 5, 16, 31, 32, 100])
def test_window_attention_is_attention_under_a_band_mask(tokens, window):
    q, k, v = torch.randn(3, 2, 2, tokens, 4)
    place = torch.arange(tokens)
    band = (place[:, None] - place).abs() <= window
    expected = ((q @ k.mT / 2).masked_fill(~band, -torch.inf)).softmax(-1) @ v
    torch.testing.assert_close(window_attention(q, k, v, window), expected)


def test_a_window_over_all_tokens_is_full_attention():
    q, k, v = torch.randn(3, 2, 2, 16, 4)
    assert torch.equal(window_attention(q, k, v, 15), F.scaled_dot_product_attention(q, k, v))
    assert not torch.allclose(window_attention(q, k, v, 14), F.scaled_dot_product_attention(q, k, v))


def test_the_work_of_window_attention_is_that_of_its_chunks():
    q, k, v = torch.randn(3, 2, 3, 32, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        window_attention(q, k, v, 4)
    # 8 chunks of 4 queries with 12 keys each, the first and last with 8; two products, a multiply-accumulate per channel
    assert counter.get_total_flops() // 2 == 2 * 3 * 2 * 8 * 4 * (6 * 12 + 2 * 8)


# --- the tap ---------------------------------------------------------------------------------------------------------


def test_full_attention_that_keeps_its_residual_returns_what_the_module_returns(tiny):
    tap, forward = attention_tap(tiny)
    x = torch.randn(2, 16, 32)
    tap.begin(Op.RESIDUAL | Op.STORE)
    assert torch.equal(forward(x), tap.module(x))
    assert torch.equal(tap.slots[0], tap.module(x))


@pytest.mark.parametrize("qk_norm", [None, "layer_norm", "rms_norm"])
def test_window_and_residual_of_the_same_tokens_is_full_attention(tiny, qk_norm):
    torch.manual_seed(0)
    tiny.transformer_blocks[0].attn1 = Attention(32, heads=4, dim_head=16, qk_norm=qk_norm, out_dim=None)
    tap, forward = attention_tap(tiny)
    x = torch.randn(2, 16, 32)
    tap.begin(Op.RESIDUAL)
    full = forward(x)
    assert tap.residual[0].shape == tap.residual_shape(full.shape) == (2, 16, 64)
    tap.begin(Op.WINDOW)
    torch.testing.assert_close(forward(x), tap.module(x))
    tap.begin(Op.WINDOW)
    assert not torch.allclose(forward(2 * x), tap.module(2 * x))


@pytest.mark.parametrize("op", [Op.SHARE, Op.SHARE | Op.RESIDUAL, Op.SHARE | Op.WINDOW])
@pytest.mark.parametrize("half", ["first", "second"])
def test_sharing_gives_both_halves_what_the_conditional_one_computes(tiny, op, half):
    tap, forward = attention_tap(tiny, half=half)
    x = torch.randn(4, 16, 32)
    tap.begin(Op.RESIDUAL)
    forward(x)
    conditional = tap.module(x)[:2] if half == "first" else tap.module(x)[2:]
    tap.begin(op)
    torch.testing.assert_close(forward(x), torch.cat([conditional, conditional]))
    tap.begin(Op.WINDOW)
    tap.module, same = tap.module, torch.cat([x[:2] if half == "first" else x[2:]] * 2)
    if op & Op.RESIDUAL:  # the shared residual is the conditional one, for both halves
        torch.testing.assert_close(forward(same), tap.module(same))


def test_the_default_window_is_an_eighth_of_the_tokens(tiny):
    x = torch.randn(2, 16, 32)
    residuals = []
    for window in (None, 2):
        tap, forward = attention_tap(tiny, window=window)
        tap.begin(Op.RESIDUAL)
        forward(x)
        residuals.append(tap.residual[0])
    assert torch.equal(*residuals)


# --- plan ------------------------------------------------------------------------------------------------------------


def column(*actions):
    return Plan(tuple((action,) for action in actions))


def ops(*actions, start=0):
    return [row[0] for row in lower(column(*actions), start).ops[start:]]


def test_what_is_kept_follows_from_what_is_read():
    assert ops(C, W, W, C, C) == [Op.RESIDUAL, Op.WINDOW, Op.WINDOW, Op.COMPUTE, Op.COMPUTE]
    assert ops(C, R, W, R) == [Op.STORE | Op.RESIDUAL, Op.REUSE, Op.WINDOW | Op.STORE, Op.REUSE]
    assert ops(C, G, WG, W) == [Op.COMPUTE, Op.SHARE | Op.RESIDUAL, Op.WINDOW | Op.SHARE, Op.WINDOW]
    assert ops(C, G, R) == [Op.COMPUTE, Op.SHARE | Op.STORE, Op.REUSE]


def test_a_generation_that_begins_in_the_middle_has_full_attention_first():
    assert ops(C, W, W, start=1) == [Op.RESIDUAL, Op.WINDOW]
    assert ops(C, WG, start=1) == ops(C, G, start=1) == [Op.COMPUTE]


def test_residuals_are_counted_and_freed_after_their_last_reader():
    program = lower(column(C, W, C, R, C))
    assert program.last_residual_reader == (1,)
    assert program.last_reader == (3,)
    assert peak_bytes(program, 1, [8], [100]) == 100
    assert peak_bytes(lower(column(C, R, W)), 1, [8], [100]) == 108
    assert fit(column(C, W), [8], 99, [100]).actions == ((C,), (C,))


# --- whole generations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional_first", [True, False])
def test_a_plan_gives_what_the_naive_network_gives(tiny, scheduler, conditional_first):
    naive, attentions = naive_copy(tiny, WINDOW, conditional_first)

    class Planned:
        def __call__(self, latents, timestep, labels):
            step = scheduler.timesteps.tolist().index(timestep[0])
            for attention, action in zip(attentions, ROWS[step], strict=True):
                attention.action = action
            return naive(latents, timestep, labels)

    expected, _ = guided_loop(Planned(), scheduler, conditional_first=conditional_first)
    method = DiTFastAttn(table_of(), WINDOW, "first" if conditional_first else "second")
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        got, _ = guided_loop(tiny, scheduler, conditional_first=conditional_first)
        assert handle.stats.plan == [[action.value for action in row] for row in ROWS]
        assert handle.stats.actions == {
            "compute": 4, "reuse": 5, "forecast": 0, "partial": 0, "window": 4, "share-guidance": 2,
            "window+share-guidance": 3,
        }  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_on_pixart_self_attention_alone_is_compressed(scheduler):
    pixart = build_pixart()
    rows = tuple(dict.fromkeys(SITES, action) for action in (C, W, R))
    method = DiTFastAttn(CacheTable(rows), 15)  # over all 16 tokens
    with sostenuto.enable(pixart, method, scheduler=scheduler) as handle:
        whole = sample_pixart(pixart, scheduler, 3)
        assert [site.id for site in handle.sites] == SITES
        assert handle.stats.actions["window"] == handle.stats.actions["reuse"] == 3
    with sostenuto.enable(pixart, DiTFastAttn(CacheTable((rows[0], rows[0], rows[2]))), scheduler=scheduler):
        torch.testing.assert_close(whole, sample_pixart(pixart, scheduler, 3))


def test_computing_everything_is_bit_identical_to_the_stock_model(tiny, scheduler):
    stock, _ = sample_loop(tiny, scheduler, 3)
    with sostenuto.enable(tiny, DiTFastAttn(table_of(((C, C, C),) * 3)), scheduler=scheduler) as handle:
        cached, _ = sample_loop(tiny, scheduler, 3)
        assert handle.stats.ideal_speedup == 1.0
        assert handle.stats.cache_bytes_peak == 0
    assert torch.equal(stock, cached)


def test_counted_macs_are_those_of_a_real_run_and_fall_by_what_is_not_run(tiny, scheduler):
    with sostenuto.enable(tiny, DiTFastAttn(table_of(), WINDOW), scheduler=scheduler) as handle:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            guided_loop(tiny, scheduler)
        assert handle.stats.macs == counter.get_total_flops() // 2
    rows, tokens, width = 4, 16, 32
    projections = 4 * tokens * width**2
    full = 2 * tokens**2 * width
    near = 2 * width * (3 * 6 + 3 * (9 + 9 + 9) + 3 * 7 + 1 * 4)  # chunks 0–2, 3–5 …, 15 with the keys in their reach
    # Residuals of the sites 0 and 1 at step 0 and of site 1 at step 3; for half of the batch of 2 at step 1 and 0 at step 4.
    residuals = near * (3 + 2 / 2)
    saved = {C: 0, R: projections + full, W: full - near, G: (projections + full) / 2}
    saved[WG] = projections / 2 + full - near / 2
    expected = sum(saved[action] for row in ROWS for action in row) - residuals
    assert handle.stats.macs_uncached - handle.stats.macs == rows * expected


def test_peak_bytes_are_as_predicted_and_nothing_is_left(tiny, scheduler):
    with sostenuto.enable(tiny, DiTFastAttn(table_of(), WINDOW), scheduler=scheduler) as handle:
        guided_loop(tiny, scheduler)
        one = 4 * 16 * 32 * 4
        # At step 2 each site still has readers for its output and for its residual.
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes == 6 * one
        assert all(state.num_bytes == 0 for state in handle._passes.values())
    with sostenuto.enable(
        tiny, DiTFastAttn(table_of(), WINDOW), scheduler=scheduler, max_cache_bytes=2 * one
    ) as handle:
        guided_loop(tiny, scheduler)
        assert 0 < handle.stats.cache_bytes_peak <= 2 * one


def test_an_interrupted_generation_leaves_nothing_to_the_next(tiny, scheduler):
    method = DiTFastAttn(table_of(), WINDOW)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        expected, _ = guided_loop(tiny, scheduler, seed=5)
    with sostenuto.enable(tiny, method, scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            guided_loop(tiny, scheduler, seed=1, stop_at=3)
        got, _ = guided_loop(tiny, scheduler, seed=5)
    assert torch.equal(expected, got)


@pytest.mark.slow
def test_one_graph_per_combination_without_a_break(scheduler):
    torch._dynamo.reset()
    counters.clear()
    rows = tuple({SITES[0]: action} for action in (C, WG, R, G, W))
    method = DiTFastAttn(CacheTable(rows), WINDOW)
    model = build_tiny(num_layers=1)
    with sostenuto.enable(model, method, scheduler=scheduler):
        expected, _ = guided_loop(model, scheduler, len(rows))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with sostenuto.enable(compiled, method, scheduler=scheduler) as handle:
        got, _ = guided_loop(compiled, scheduler, len(rows))
        assert counters["stats"]["unique_graphs"] == len({carried for *_, carried in handle._record.calls})
        assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_verify_proves_the_plan_that_ran(tiny, scheduler):
    def sample(model, generator, num_inference_steps):
        return guided_loop(model, scheduler, num_inference_steps)

    method = DiTFastAttn(table_of(ROWS[:3]), WINDOW)
    proved = sostenuto.verify(tiny, method, sample, scheduler=scheduler, num_inference_steps=3)
    assert proved["steps"] == 3


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3])
def test_sharing_without_guidance_in_the_batch_is_refused(tiny, scheduler, batch):
    method = DiTFastAttn(table_of(((C, C, C), (G, C, C))))
    with (
        sostenuto.enable(tiny, method, scheduler=scheduler),
        pytest.raises(MethodError, match=f"batch of {batch} does not hold the same latents twice"),
    ):
        sample_loop(tiny, scheduler, 2, batch=batch)


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (lambda: Attention(32, heads=2, dim_head=16, norm_num_groups=4), "group_norm"),
        (lambda: Attention(32, heads=2, dim_head=16, residual_connection=True), "residual_connection"),
        (lambda: Attention(32, heads=2, dim_head=16, rescale_output_factor=2.0), "rescale_output_factor"),
        (lambda: Attention(32, heads=2, dim_head=16, added_kv_proj_dim=32), "add_k_proj"),
        (lambda: Attention(32, heads=2, dim_head=16, processor=AttnProcessor()), "processor AttnProcessor"),
        (lambda: Attention(32, heads=2, kv_heads=1, dim_head=16), r"\[32, 16, 16\]"),
        (lambda: torch.nn.Linear(32, 32), "no to_q"),
    ],
)
def test_attention_of_another_kind_is_refused_by_name(tiny, scheduler, attention, words):
    tiny.transformer_blocks[1].attn1 = attention()
    with pytest.raises(MethodError, match=words) as caught:
        sostenuto.enable(tiny, DiTFastAttn(table_of()), scheduler=scheduler)
    assert "transformer_blocks.1.attn1" in str(caught.value)


def test_a_mask_is_refused_where_the_window_is_to_run(tiny):
    tap, forward = attention_tap(tiny)
    tap.begin(Op.RESIDUAL)
    with pytest.raises(MethodError, match=r"transformer_blocks\.0\.attn1 is called with more than"):
        forward(torch.randn(2, 16, 32), attention_mask=torch.ones(2, 16))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: DiTFastAttn(3), "table is a CacheTable"),
        (lambda: DiTFastAttn(window=0), "window must be a whole number"),
        (lambda: DiTFastAttn(window=1.5), "window must be a whole number"),
        (lambda: DiTFastAttn(conditional_half="both"), "conditional_half must be"),
        (lambda: DiTFastAttn.pixart_sigma(image_size=512), "published for images of 1024 and 2048"),
        (lambda: DiTFastAttn.open_sora(window=100), "windows of 50 and 200 are published"),
        (lambda: DiTFastAttnCalibration(theta=0), "theta must be a number above 0"),
        (lambda: DiTFastAttnCalibration(theta=float("nan")), "theta must be a number above 0"),
        (lambda: DiTFastAttnCalibration(window=-1), "window must be a whole number"),
        (lambda: DiTFastAttnCalibration(conditional_half="both"), "conditional_half must be"),
        (lambda: DiTFastAttnCalibration(loss="ratio"), "ratio_abs"),
        (lambda: DiTFastAttnCalibration(candidates=()), "one at least"),
        (lambda: DiTFastAttnCalibration(candidates=(Action.PARTIAL,)), r"Action\.WINDOW"),
        (lambda: DiTFastAttnCalibration.dit_xl_2(7), "D1 … D6"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, words):
    with pytest.raises(MethodError, match=words):
        wrong()


def test_a_table_is_needed_and_must_be_for_these_sites(tiny, scheduler):
    with pytest.raises(MethodError, match="no ditfastattn table ships"):
        sostenuto.enable(tiny, "ditfastattn", scheduler=scheduler)
    with pytest.raises(MethodError, match="window must be"):
        sostenuto.enable(tiny, DiTFastAttn(table_of(window="wide")), scheduler=scheduler)
    odd = CacheTable(({"transformer_blocks.0.ff": C},) * 2)
    with pytest.raises(TableError, match=r"disagree about site .* calibrate a table for this network"):
        sostenuto.enable(tiny, DiTFastAttn(odd), scheduler=scheduler)


def test_a_method_without_attention_taps_refuses_such_actions(tiny, scheduler):
    ids = [site.id for site in inspect(tiny)]
    table = CacheTable((dict.fromkeys(ids, C), dict.fromkeys(ids, W)))
    with (
        sostenuto.enable(tiny, EBCache(table), scheduler=scheduler),
        pytest.raises(MethodError, match=r"EBCache can't carry out 'window' at transformer_blocks\.0\.attn1"),
    ):
        sample_loop(tiny, scheduler, 2)
