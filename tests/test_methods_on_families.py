"""Every kind of method on networks of every kind: two streams, fused projections, several lists, video with audio."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import sostenuto
from sostenuto import FORA, PAB, DBCache, DeltaDiT, DuCa, EBCache, MagCache, TaylorSeer, TeaCache, ToCa
from sostenuto.features import leaves
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.zoo import TINY_MODELS

STEPS = 6
FAMILIES = (
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "ChromaTransformer2DModel",
    "SD3Transformer2DModel",
    "QwenImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanDiT2DModel",
    "WanVACETransformer3DModel",
    "CogView4Transformer2DModel",
    "LatteTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "ZImageTransformer2DModel",
)
STATES = tuple(
    StepState(name) for name in ("compute", "reuse-attn", "reuse-mlp", "reuse-both", "compute", "reuse-both")
)
METHODS = {
    "fora": FORA(2),
    "pab": PAB(mlp={}),
    "table": EBCache(CacheTable(STATES, forecast_order=1, fill="stack", eps_scale=(0.98,) * STEPS)),
    "taylorseer": TaylorSeer(interval=2, order=1, first_enhance=1),
    "taylorseer-lite": TaylorSeer(interval=2, order=1, first_enhance=1, lite=True),
    "toca": ToCa(interval=2, fresh_ratio=0.5, selection="random", ratio_schedule="constant", spatial_bonus=0),
    "duca": DuCa(interval=3, fresh_ratio=0.5, ratio_schedule="constant", spatial_bonus=0),
    "delta-dit": DeltaDiT(interval=2, switch_step=3, num_cached_blocks=2),
    "dbcache": DBCache(front_blocks=1, back_blocks=0, threshold=10.0, warmup=2),
    "teacache": TeaCache(threshold=10.0, coefficients=(1.0, 0.0)),
    "magcache": MagCache(ratios=(1.0,) * STEPS, threshold=0.5, max_consecutive=1, retention=0.2),
}
REFUSED = {
    ("HunyuanDiT2DModel", "delta-dit"): "later blocks read",
    ("LatteTransformer3DModel", "dbcache"): "another list of blocks",
}


def generate(model, tiny, scheduler):
    """One generation with noise of its own at every step, so that reuse makes a difference."""
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.3, 0.2])
    outputs = []
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps.tolist()):
            inputs = tiny.inputs(timestep, torch.Generator().manual_seed(0))
            name = next(iter(inputs))
            moved = tiny.inputs(timestep, torch.Generator().manual_seed(step))[name]
            outputs.append([t.clone() for t in leaves(model(**{**inputs, name: moved})[0])])
    return outputs


QUICK = ("FluxTransformer2DModel",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_method_runs_saves_and_leaves_nothing_behind(name):
    tiny = TINY_MODELS[name]
    model, scheduler = tiny.build(), FlowMatchEulerDiscreteScheduler()
    stock = generate(model, tiny, scheduler)
    for key, method in METHODS.items():
        if (name, key) in REFUSED:
            with pytest.raises(sostenuto.SostenutoError, match=REFUSED[name, key]):
                sostenuto.enable(model, method, scheduler=scheduler)
            continue
        with sostenuto.enable(model, method, scheduler=scheduler) as handle:
            first = generate(model, tiny, scheduler)
            assert handle.stats.macs < handle.stats.macs_uncached, key
            assert handle.stats.num_passes == 1, key
            second = generate(model, tiny, scheduler)
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)), (
            key
        )
        assert all(tensor.isfinite().all() for step in first for tensor in step), key
        assert all(torch.equal(a, b) for a, b in zip(first[0], stock[0], strict=True)) or key == "table", key
        gap = max(
            (a - b).abs().max().item() for x, y in zip(first, stock, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert gap > 0, key
    after = generate(model, tiny, scheduler)
    assert all(torch.equal(a, b) for x, y in zip(after, stock, strict=True) for a, b in zip(x, y, strict=True))
