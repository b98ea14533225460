"""Which method is meant by a configuration of diffusers' own caches; those without an equivalent are refused in words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from sostenuto.errors import MethodError
from sostenuto.methods.base import Method
from sostenuto.methods.dbcache import DBCache
from sostenuto.methods.magcache import MagCache
from sostenuto.methods.pab import PAB
from sostenuto.methods.taylorseer import TaylorSeer

_log = logging.getLogger("sostenuto")


def translated(config: Any) -> Method:
    """The method that a configuration of diffusers' stands for; what it was mapped to, and what differs, is logged at INFO.

    Args:
        config: an object such as ``diffusers.FirstBlockCacheConfig(threshold=0.1)``, told by the name of its class.

    Raises:
        MethodError: there is no method for it, or one of its fields asks for what the method doesn't do.
    """
    name = type(config).__name__
    if name not in _MAPPED:
        reason = _REFUSED.get(name, "")
        raise MethodError(f"diffusers' {name} has no equivalent here{reason}; there are {', '.join(_MAPPED)}")
    method, difference = _MAPPED[name](config)
    _log.info("diffusers' %s runs as %r: %s", name, method, difference)
    return method


def is_foreign_config(method: Any) -> bool:
    """Whether something is a configuration of diffusers' caches."""
    kind = type(method)
    return kind.__module__.split(".")[0] == "diffusers" and kind.__name__.endswith("Config")


def _first_block_cache(config: Any) -> tuple[Method, str]:
    if config.threshold >= 1:
        raise MethodError(
            f"FirstBlockCacheConfig's threshold is {config.threshold:g}, and from 1 on DBCache compares nothing and caches "
            "every step that it may: give a threshold below 1"
        )
    return DBCache.first_block_cache(
        config.threshold
    ), "the same rule; every pass and every generation has a state of its own"


def _mag_cache(config: Any) -> tuple[Method, str]:
    if config.calibrate:
        raise MethodError(
            "MagCacheConfig(calibrate=True) measures ratios, for which there is sostenuto.calibrate(pipe, 'magcache', …): "
            "pass MagCache(ratios) with what it returns"
        )
    method = MagCache(
        tuple(float(ratio) for ratio in config.mag_ratios),
        threshold=config.threshold,
        max_consecutive=config.max_skip_steps,
        retention=config.retention_ratio,
    )
    return method, "the same rule; the number of steps is the scheduler's, whatever num_inference_steps says"


def _taylor_seer(config: Any) -> tuple[Method, str]:
    for field in ("cache_identifiers", "skip_predict_identifiers"):
        if getattr(config, field):
            raise MethodError(
                f"TaylorSeerCacheConfig's {field} name modules, and TaylorSeer forecasts every residual branch: leave it out"
            )
    if config.disable_cache_after_step is not None:
        raise MethodError(
            "TaylorSeerCacheConfig's disable_cache_after_step has no equivalent: leave it out, or use "
            "sostenuto.TaylorSeer(…, compute_last=True), which computes the last step"
        )
    # diffusers forecasts the first step after its warm-up, computes the second, and counts the interval from there.
    method = TaylorSeer(
        interval=config.cache_interval,
        order=config.max_order,
        first_enhance=config.disable_cache_before_step + 2,
        differences="last-gap",
        lite=bool(config.use_lite_mode),
    )
    kept = "the output of the last block" if method.lite else "every attention and MLP, not attention alone,"
    return method, (
        f"{kept} is kept, in its own dtype; step {config.disable_cache_before_step} is computed, which diffusers forecasts, "
        "and the others are those that it computes"
    )


def _pyramid(config: Any) -> tuple[Method, str]:
    types = ("spatial", "temporal", "cross")
    defaults = {field.name: field.default for field in fields(config)}
    for field in (f"{kind}_attention_block_identifiers" for kind in types):
        if tuple(getattr(config, field)) != defaults[field]:
            raise MethodError(
                f"PyramidAttentionBroadcastConfig's {field} name modules, and PAB tells attention by its type: leave it out"
            )
    ranges = {kind: getattr(config, f"{kind}_attention_block_skip_range") for kind in types}
    if all(every is None for every in ranges.values()):
        ranges["spatial"] = 2  # what diffusers does then
    windows = {
        tuple(getattr(config, f"{kind}_attention_timestep_skip_range")) for kind in types if ranges[kind] is not None
    }
    if len(windows) > 1:
        raise MethodError(
            f"PyramidAttentionBroadcastConfig has several timestep ranges ({', '.join(map(str, sorted(windows)))}), and PAB "
            "one window for all types of attention: make them equal"
        )
    method = PAB(ranges["spatial"], ranges["temporal"], ranges["cross"], window=windows.pop())
    return method, (
        "attention is told by its type, not by names; every pass has a state of its own; the timestep is the scheduler's, and "
        "current_timestep_callback isn't called"
    )


_MAPPED: dict[str, Callable[[Any], tuple[Method, str]]] = {
    "FirstBlockCacheConfig": _first_block_cache,
    "MagCacheConfig": _mag_cache,
    "TaylorSeerCacheConfig": _taylor_seer,
    "PyramidAttentionBroadcastConfig": _pyramid,
}

_REFUSED = {
    "FasterCacheConfig": (
        " (it extrapolates attention by a fixed weight and makes up unconditional passes from conditional ones): "
        "sostenuto.PAB(spatial_range=2, window=…) reuses attention in the same steps"
    ),
    "SeaCacheConfig": " (it decides by filtered latents): sostenuto.TeaCache and sostenuto.DBCache decide by features",
    "LayerSkipConfig": " (it is guidance, no cache): give it to diffusers, and skip steps with a method of sostenuto",
    "SmoothedEnergyGuidanceConfig": " (it is guidance, no cache): give it to diffusers",
    "GroupOffloadingConfig": " (it moves weights, no cache): give it to diffusers before sostenuto.enable",
    "TextKVCacheConfig": " (it keeps the text's keys and values, which is exact): use it by itself, without sostenuto",
}
