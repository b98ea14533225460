"""``sostenuto.enable`` with diffusers' own configurations: what each is mapped to, and what is refused."""

import logging
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers import hooks as theirs
from diffusers.models.attention_processor import Attention

import sostenuto
from conftest import build_tiny
from sostenuto import PAB, DBCache, MagCache, MethodError, TaylorSeer, foreign_configs
from sostenuto.foreign_configs import translated

STEPS = 24


def test_first_block_cache_is_dbcache_with_one_block_in_front_and_none_behind():
    method = translated(theirs.FirstBlockCacheConfig(threshold=0.12))
    assert method == DBCache(front_blocks=1, back_blocks=0, threshold=0.12, warmup=0)


def test_magcache_keeps_its_ratios_and_bounds():
    ratios = [1.0, 1.25, 0.5, 0.75]  # exact in float32
    config = theirs.MagCacheConfig(
        threshold=0.1, max_skip_steps=2, retention_ratio=0.5, num_inference_steps=4, mag_ratios=ratios
    )
    assert translated(config) == MagCache(tuple(ratios), threshold=0.1, max_consecutive=2, retention=0.5)


def test_pab_keeps_its_ranges_and_window():
    config = theirs.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=6,
        spatial_attention_timestep_skip_range=(150, 850),
        cross_attention_timestep_skip_range=(150, 850),
        temporal_attention_timestep_skip_range=(1, 2),  # of a type that isn't broadcast
    )
    assert translated(config) == PAB(2, None, 6, window=(150, 850))


def test_pab_without_ranges_is_spatial_attention_every_other_step_as_in_diffusers():
    assert translated(theirs.PyramidAttentionBroadcastConfig()) == PAB(2, None, None, window=(100, 800))


def test_taylorseer_keeps_interval_and_order():
    config = theirs.TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=3, max_order=2)
    assert translated(config) == TaylorSeer(interval=4, order=2, first_enhance=5, differences="last-gap")
    assert translated(theirs.TaylorSeerCacheConfig(use_lite_mode=True)).lite


# --- the same steps are computed as by diffusers ----------------------------------------------------------------------


@torch.no_grad()
def sample(model, scheduler):
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    for timestep in scheduler.timesteps:
        noise = model(latents, timestep=timestep.expand(2), class_labels=labels).sample[:, :2]
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def steps_computed_by_diffusers(apply, config, module_of):
    """At which steps a module of a network runs under diffusers' own cache."""
    model, scheduler, ran, step = build_tiny(), DDIMScheduler(), [], [-1]
    module_of(model).register_forward_hook(lambda *_: ran.append(step[0]))

    def tick(*_):
        step[0] += 1

    model.register_forward_pre_hook(tick)
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: scheduler.timesteps[step[0]].item()
    apply(model, config)
    states = sostenuto.compat.CacheStates(model)
    states.set_context(sostenuto.compat.new_cache_context("inference"))
    sample(model, scheduler)
    return ran


def steps_computed_by_us(config, kind):
    model, scheduler = build_tiny(), DDIMScheduler()
    with sostenuto.enable(model, config, scheduler=scheduler) as handle:
        sample(model, scheduler)
        sites = [index for index, site in enumerate(handle.sites) if kind in site.kind.value]
        return [p for p, row in enumerate(handle.stats.plan) if all(row[index] == "compute" for index in sites)]


def last_block(model):
    return model.transformer_blocks[-1].ff.net[0]


def attention(model):
    return next(module for module in model.modules() if isinstance(module, Attention)).to_q


def test_magcache_skips_the_same_steps_as_diffusers():
    config = theirs.MagCacheConfig(
        threshold=0.3, num_inference_steps=STEPS, mag_ratios=[1 + 0.1 * ((7 * p) % 5 - 2) / 2 for p in range(STEPS)]
    )
    expected = steps_computed_by_diffusers(theirs.apply_mag_cache, config, last_block)
    assert 5 < len(expected) < STEPS
    assert steps_computed_by_us(config, "blocks") == expected


def test_pab_skips_the_same_steps_as_diffusers():
    config = theirs.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3, spatial_attention_timestep_skip_range=(200, 700)
    )
    expected = steps_computed_by_diffusers(theirs.apply_pyramid_attention_broadcast, config, attention)
    assert 5 < len(expected) < STEPS
    assert steps_computed_by_us(config, "attention") == expected


@pytest.mark.parametrize(("before", "interval"), [(3, 5), (1, 2), (4, 3)])
def test_taylorseer_computes_the_same_steps_as_diffusers_and_the_one_after_the_warm_up(before, interval):
    settings = dict(cache_interval=interval, disable_cache_before_step=before)
    applied = theirs.TaylorSeerCacheConfig(**settings, cache_identifiers=[r".*\.attn1", r".*\.ff"])
    expected = steps_computed_by_diffusers(theirs.apply_taylorseer_cache, applied, last_block)
    assert before not in expected
    assert steps_computed_by_us(theirs.TaylorSeerCacheConfig(**settings), "mlp") == sorted([*expected, before])


@torch.no_grad()
def test_first_block_cache_gives_the_same_samples_as_diffusers():
    config, scheduler = theirs.FirstBlockCacheConfig(threshold=0.95), DDIMScheduler()
    model = build_tiny()
    plain = sample(model, scheduler)
    with sostenuto.enable(model, config, scheduler=scheduler) as handle:
        ours = sample(model, scheduler)
        computed = [p for p, row in enumerate(handle.stats.plan) if row[0] == "compute"]
    assert steps_computed_by_diffusers(theirs.apply_first_block_cache, config, last_block) == computed
    assert 1 < len(computed) < STEPS
    theirs.apply_first_block_cache(model, config)
    states = sostenuto.compat.CacheStates(model)
    states.set_context(sostenuto.compat.new_cache_context("inference"))
    torch.testing.assert_close(ours, sample(model, scheduler), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=1e-4)


# --- what is said, and what is refused --------------------------------------------------------------------------------


def test_what_a_configuration_became_is_logged_and_readable_on_the_handle(caplog):
    with (
        caplog.at_level(logging.INFO, logger="sostenuto"),
        sostenuto.enable(
            build_tiny(), theirs.FirstBlockCacheConfig(threshold=0.2), scheduler=DDIMScheduler()
        ) as handle,
    ):
        assert isinstance(handle.method, DBCache)
        assert (handle.method.front_blocks, handle.method.threshold) == (1, 0.2)
    (record,) = [record for record in caplog.records if record.name == "sostenuto"]
    assert record.levelno == logging.INFO
    assert "FirstBlockCacheConfig runs as DBCache(front_blocks=1, back_blocks=0, threshold=0.2" in record.getMessage()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (theirs.FasterCacheConfig(), "FasterCacheConfig has no equivalent here .*PAB"),
        (theirs.SeaCacheConfig(), "SeaCacheConfig has no equivalent here"),
        (theirs.TextKVCacheConfig(), "use it by itself"),
        (
            theirs.LayerSkipConfig(indices=[0]),
            r"LayerSkipConfig has no equivalent here \(it is guidance, no cache\).*; there are FirstBlockCacheConfig",
        ),
        (theirs.FirstBlockCacheConfig(threshold=1.5), "threshold is 1.5"),
        (theirs.FirstBlockCacheConfig(threshold=float("nan")), "threshold"),
        (theirs.MagCacheConfig(calibrate=True), "sostenuto.calibrate"),
        (theirs.TaylorSeerCacheConfig(cache_identifiers=["attn"]), "cache_identifiers name modules"),
        (theirs.TaylorSeerCacheConfig(skip_predict_identifiers=["x"]), "skip_predict_identifiers name modules"),
        (theirs.TaylorSeerCacheConfig(disable_cache_after_step=40), "compute_last=True"),
        (theirs.TaylorSeerCacheConfig(max_order=9), "order"),
        (theirs.PyramidAttentionBroadcastConfig(spatial_attention_block_identifiers=("x",)), "by its type"),
        (
            theirs.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                cross_attention_block_skip_range=2,
                cross_attention_timestep_skip_range=(0, 500),
            ),
            r"several timestep ranges \(\(0, 500\), \(100, 800\)\)",
        ),
    ],
)
def test_what_has_no_equivalent_is_refused_in_words_and_nothing_is_attached(config, reason):
    model = build_tiny()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(MethodError, match=reason):
        sostenuto.enable(model, config, scheduler=DDIMScheduler())
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before


def test_every_configuration_of_diffusers_hooks_is_mapped_or_refused_with_a_reason():
    folder = Path(theirs.__file__).parent
    named = {
        name for file in folder.glob("*.py") for name in re.findall(r"^class (\w+Config)\b", file.read_text(), re.M)
    }
    assert {"FirstBlockCacheConfig", "SmoothedEnergyGuidanceConfig"} < named
    assert named - foreign_configs._MAPPED.keys() - foreign_configs._REFUSED.keys() == set()


def test_what_is_no_configuration_of_diffusers_is_refused_as_before():
    class FirstBlockCacheConfig:
        threshold = 0.1

    with pytest.raises(MethodError, match="a method is a name or a method object"):
        sostenuto.enable(build_tiny(), FirstBlockCacheConfig(), scheduler=DDIMScheduler())
