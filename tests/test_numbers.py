"""Numbers at their limits: NaN and infinity where they arise, float16 forecasts, denormals, the smallest of everything."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import sostenuto
from conftest import build_tiny, sample_loop
from memory_checks import METHODS, STEPS
from sostenuto import FORA, DBCache, MethodError, NotFiniteError, TaylorSeer, TeaCache
from sostenuto.features import combine
from sostenuto.forecast import binomial_weights, lagrange_weights

# --- NaN and infinity ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def broken(network, path, value, call):
    """One call of a module returns a feature with this value in it."""
    calls = iter(range(1000))

    def hook(_module, _inputs, output):
        if next(calls) == call:
            output = output.clone()
            output.view(-1)[3] = value
        return output

    handle = network.get_submodule(path).register_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
@pytest.mark.parametrize("path", ["transformer_blocks.0.attn1.to_out.0", "transformer_blocks.2.ff.net.0"])
def test_a_feature_that_is_not_finite_is_named_by_site_and_step(tiny, scheduler, path, value, word):
    site = ".".join(path.split(".")[:3])
    with sostenuto.enable(tiny, FORA(2, anchor="start"), scheduler=scheduler, check_finite=True) as handle:
        with (
            broken(tiny, path, value, call=1),
            pytest.raises(NotFiniteError, match=rf"^{site} puts out {word} at step 2"),
        ):
            sample_loop(tiny, scheduler, STEPS)
        assert not handle._passes
        latents, _ = sample_loop(tiny, scheduler, STEPS)
    with sostenuto.enable(tiny, FORA(2, anchor="start"), scheduler=scheduler):
        assert torch.equal(sample_loop(tiny, scheduler, STEPS)[0], latents)


def test_latents_and_outputs_that_are_not_finite_are_told_from_features(tiny, scheduler):
    scheduler.set_timesteps(4)
    latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([1])
    latents[0, 0, 0, 0] = math.nan
    with torch.no_grad(), sostenuto.enable(tiny, FORA(2), scheduler=scheduler, check_finite=True):
        with pytest.raises(NotFiniteError, match="latents that the denoiser is given at step 0 hold NaN"):
            tiny(latents, scheduler.timesteps[:1], labels)
        with broken(tiny, "proj_out_2", math.inf, 0), pytest.raises(NotFiniteError, match=r"^output puts out infinity"):
            tiny(latents.nan_to_num(), scheduler.timesteps[:1], labels)


@pytest.mark.parametrize("name", METHODS)
def test_looking_for_it_changes_no_bit_and_leaves_no_trace(name, scheduler):
    network = build_tiny()
    before = {path: set(vars(module)) for path, module in network.named_modules()}
    results = []
    for check_finite in (False, True):
        with sostenuto.enable(network, METHODS[name](), scheduler=scheduler, check_finite=check_finite) as handle:
            results.append((sample_loop(network, scheduler, STEPS)[0], handle.stats.macs))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert {path: set(vars(module)) for path, module in network.named_modules()} == before


@pytest.mark.parametrize("method", [lambda: TeaCache(threshold=1.0), lambda: DBCache(1, 1, 1.0, warmup=1)])
def test_a_range_of_blocks_is_named(tiny, scheduler, method):
    with (
        sostenuto.enable(tiny, method(), scheduler=scheduler, check_finite=True),
        broken(tiny, "transformer_blocks.1.ff.net.2", math.nan, call=0),
        pytest.raises(NotFiniteError, match=r"transformer_blocks\.\d.* puts out NaN at step 0"),
    ):
        sample_loop(tiny, scheduler, STEPS)


def test_a_compiled_network_is_looked_at_too(scheduler):
    torch._dynamo.reset()
    network = build_tiny(num_layers=1)
    network.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad(), sostenuto.enable(network, FORA(2), scheduler=scheduler, check_finite=True):
        scheduler.set_timesteps(2)
        latents, labels = torch.randn(1, 2, 8, 8), torch.tensor([1])
        network(latents, scheduler.timesteps[:1], labels)
        network.transformer_blocks[0].ff.net[2].bias.fill_(math.nan)
        scheduler.set_timesteps(2)
        with pytest.raises(NotFiniteError, match=r"^(transformer_blocks.0.ff|output) puts out NaN at step 0"):
            network(latents, scheduler.timesteps[:1], labels)
    torch._dynamo.reset()


def test_without_asking_nothing_is_looked_at(tiny, scheduler):
    with broken(tiny, "proj_out_2", math.nan, 0), sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        assert sample_loop(tiny, scheduler, 2)[1][0].isnan().any()
    with pytest.raises(MethodError, match="check_finite is true or false"):
        sostenuto.enable(tiny, FORA(2), scheduler=scheduler, check_finite=1)


# --- float16 and denormals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_forecasts_of_high_order_are_summed_in_float32(order, dtype):
    """5 · 30 000 is no number of float16, though the forecast is; and its own sums would lose every digit."""
    weights = binomial_weights(order + 1)
    exact = [30_000.0 + 8 * j for j in range(order + 1)]  # on a line: the forecast is the next point of it
    slots = [torch.full((4,), value, dtype=dtype) for value in exact]
    got = combine(list(slots), torch.tensor(weights))
    expected = sum(w * slot.double() for w, slot in zip(weights, slots, strict=True))
    assert got.dtype == dtype
    assert bool(((got.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_float16_forecast_that_overshoots_the_range_is_its_largest_number(order):
    weights = lagrange_weights([-3.0 * j for j in range(order + 1)], 2.0)
    slots = [torch.full((4,), 60_000.0 * (-1) ** j, dtype=torch.float16) for j in range(order + 1)]
    dtype = torch.float16 if order == 1 else torch.float32
    for sign in (1, -1):
        got = combine([sign * slot for slot in slots], torch.tensor(weights, dtype=dtype))
        assert torch.equal(got, torch.full((4,), sign * 65_504.0, dtype=torch.float16))


def test_forecasts_in_float64_lose_nothing(scheduler):
    network = build_tiny().double()
    with sostenuto.enable(network, FORA(4, anchor="start", forecast_order=2), scheduler=scheduler) as handle:
        sample_loop(network, scheduler, 12, dtype=torch.float64)
        assert handle.stats.actions["forecast"] > 0
    read, step = (8, 4, 0), 10
    weights = lagrange_weights(read, step)
    values = [torch.randn(50, dtype=torch.float64) for _ in read]
    got = combine(list(values), torch.tensor(weights, dtype=torch.float64))
    exact = sum(w * value for w, value in zip(weights, values, strict=True))
    assert (got - exact).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_denormal_features_are_kept_and_forecast_like_others(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    values = [torch.full((3,), smallest * factor, dtype=dtype) for factor in (0.5, 0.25, 0.125)]
    assert bool((values[0] > 0).all())
    assert torch.equal(combine([values[0]], torch.ones(1)), values[0])
    line = combine(values[:2], torch.tensor([2.0, -1.0], dtype=dtype))
    assert torch.allclose(line.double(), torch.full((3,), smallest * 0.75, dtype=torch.float64), rtol=0.01, atol=0)
    parabola = combine(list(values), torch.tensor([3.0, -3.0, 1.0]))
    assert torch.allclose(parabola.double(), torch.full((3,), smallest * 0.875, dtype=torch.float64), rtol=0.01, atol=0)


def test_a_signal_of_zeros_decides_nothing(scheduler):
    """TeaCache divides by the size of its signal: where that is 0 the step is computed."""
    network = build_tiny()
    for block in network.transformer_blocks:
        block.norm1.linear.weight.zero_()
        block.norm1.linear.bias.zero_()
        block.norm1.linear.bias[32:64] = -1  # 1 + scale = 0: the modulated input is zero
    with sostenuto.enable(network, TeaCache(threshold=1.0), scheduler=scheduler) as handle:
        latents, _ = sample_loop(network, scheduler, 4)
        assert handle.stats.actions["reuse"] == 0
    assert latents.isfinite().all()


# --- the smallest of everything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("blocks", [1, 3])
def test_one_image_one_block_and_one_or_two_steps(name, steps, blocks, scheduler):
    network, method = build_tiny(num_layers=blocks), METHODS[name]()
    plain, _ = sample_loop(network, scheduler, steps, batch=1)
    try:
        with sostenuto.enable(network, method, scheduler=scheduler) as handle:
            latents, _ = sample_loop(network, scheduler, steps, batch=1)
            assert {op.action.value for op in handle._record.calls[0][3].ops} == {"compute"}
    except sostenuto.SostenutoError as refused:  # a table of six steps; a range with blocks in front and behind
        assert name in ("table", "stack", "ranges", "run-time decision, forecast"), refused  # noqa: PT017
        return
    assert latents.isfinite().all()
    if steps == 1:
        assert torch.equal(latents, plain)


def test_a_forecast_with_less_history_than_its_order(scheduler):
    network = build_tiny(num_layers=1)
    with sostenuto.enable(network, TaylorSeer(2, 4, 1), scheduler=scheduler) as handle:
        latents, _ = sample_loop(network, scheduler, 2, batch=1)
        assert handle.stats.plan[1] == ["reuse"] * 2
    assert latents.isfinite().all()
