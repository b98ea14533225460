"""What a method says that it keeps for each token is what a generation of a tiny network keeps."""

import re

import pytest
import torch
from diffusers import DDIMScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from promise_cases import SITES, _attention
from sostenuto import (
    FORA,
    L2C,
    PAB,
    ABCache,
    CacheTable,
    DBCache,
    DeepCache,
    DeltaDiT,
    DiTFastAttn,
    DuCa,
    EBCache,
    EpsilonScaling,
    FEBCache,
    Forecast,
    MagCache,
    NoCache,
    Router,
    SmoothCache,
    StepState,
    TaylorSeer,
    TeaCache,
    TimeShift,
    ToCa,
)
from unets import build_plain

STEPS, ROWS, TOKENS = 8, 2, 16
C, A, M, B = StepState
TABLE = CacheTable((C, B, B, C, B, B, B, B))
CASES = [
    (NoCache(), 0),
    (EpsilonScaling(1.01), 0),
    (TimeShift(), 0),
    (EBCache(TABLE), 0),
    (FEBCache(TABLE, eps_scale=1.0), 0),
    (SmoothCache(TABLE), 0),
    (FORA(4), 0),
    (L2C(Router(((-9.0,) * 6,) * 4, SITES, STEPS)), 0),
    (PAB(2, 2, 2, (0, 1000)), 0),
    (ToCa(interval=4, fresh_ratio=0.2, middle_interval=None), 0),
    (DuCa(interval=4, fresh_ratio=0.2, middle_interval=None), 0),
    (TaylorSeer(2, 1, 2), 1),
    (TaylorSeer(2, 2, 3), 2),
    (ABCache(3, 3, 2), 3),
    (DeltaDiT(4), 0),
    (MagCache((1.0,) * STEPS, 0.9, 2), 0),
    (TeaCache(threshold=9.0), 0),
    (DBCache(1, 0, 9.0, warmup=2), 0),
    (DBCache(1, 0, 9.0, warmup=2, max_consecutive=1, forecast_order=1), 1),
    (DiTFastAttn(_attention("CWRWRWRW"), 3), 0),
]


def said(method, order, **letters):
    """The formula of the method's class with numbers in it."""
    formula = type(method).bytes_per_token
    letters = {"b": 4, "order": order, "d": 32, "branches": 6, "attentions": 3, "out": 8, **letters}
    return eval(re.sub("×", "*", formula), {"__builtins__": {}}, letters)


@pytest.mark.parametrize(("method", "order"), CASES, ids=lambda value: repr(value)[:25])
def test_a_tiny_dit_keeps_as_many_bytes_per_token_as_the_method_says(method, order):
    scheduler = DDIMScheduler(clip_sample=False)
    model = build_tiny()
    with sostenuto.enable(model, method, scheduler=scheduler) as handle:
        sample_loop(model, scheduler, STEPS, batch=ROWS)
        assert handle.stats.cache_bytes_peak == ROWS * TOKENS * said(method, order)


def test_deepcache_keeps_one_feature_of_the_up_path():
    scheduler = DDIMScheduler(clip_sample=False)
    model = build_plain(1, num_class_embeds=11)
    with sostenuto.enable(model, DeepCache(2), scheduler=scheduler) as handle:
        sample_loop(model, scheduler, STEPS, batch=ROWS)
        pixels = 8 * 8
        assert handle.stats.cache_bytes_peak == ROWS * pixels * said(DeepCache(2), 0, up=8)


def test_a_forecaster_multiplies_what_is_kept():
    assert Forecast.bytes_per_token == "× (order + 1)"
    scheduler, kept = DDIMScheduler(clip_sample=False), []
    for method in (FORA(2), FORA(2) | Forecast(1), FORA(2) | Forecast(2)):
        model = build_tiny()
        with sostenuto.enable(model, method, scheduler=scheduler) as handle, torch.no_grad():
            sample_loop(model, scheduler, STEPS, batch=ROWS)
            kept.append(handle.stats.cache_bytes_peak)
    assert kept == [kept[0], 2 * kept[0], 3 * kept[0]]


def test_every_method_says_it():
    checked = {type(method) for method, _ in CASES} | {DeepCache, Forecast}
    assert checked == set(sostenuto.available_methods().values())
