"""diffusers' own caches as peers: FirstBlockCache, MagCache, TaylorSeer, PAB, FasterCache, SeaCache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn

from sostenuto import compat
from sostenuto.bench.peers.base import Peer
from sostenuto.bench.peers.diffusers_base import STREAMS, DiffusersCache, known_anatomy, seen_lists
from sostenuto.bench.peers.follower import Follower
from sostenuto.errors import MethodError
from sostenuto.methods.magcache import MagCacheRatios
from sostenuto.sites import inspect

# Found by benchmarks/peer_support.py; the networks add to what is between their blocks, which a residual then takes twice.
_WRONG: dict[str, str] = dict.fromkeys(
    (
        "ConsisIDTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "WanAnimateTransformer3DModel",
        "WanVACETransformer3DModel",
    ),
    "with identical inputs the network returns something else than without the cache (seen with diffusers 0.42.1)",
)


@dataclass(frozen=True)
class FirstBlockCache(DiffusersCache):
    """FirstBlockCache: all blocks but the first are skipped while what that one adds hardly changes.

    Attributes:
        threshold: bound of the relative change.
    """

    threshold: float = 0.05

    kind: ClassVar[str] = "diffusers-first-block-cache"
    config_name: ClassVar[str] = "FirstBlockCacheConfig"
    apply_name: ClassVar[str] = "apply_first_block_cache"
    wants_blocks: ClassVar[bool] = True
    wrong_on: ClassVar[Mapping[str, str]] = {
        **_WRONG,
        "SD3Transformer2DModel": "its last block returns no text, at which the library's tail hook fails",
    }

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        places = seen_lists(known_anatomy(denoiser))
        if len({len(place.streams) for place in places}) > 1:
            return "its kinds of blocks return different numbers of streams, at which the library's tail hook fails"
        odd = next((name for place in places for name in place.streams if name not in STREAMS), None)
        if odd is not None:
            return f"its blocks are given {odd!r}, and the library looks for {' and '.join(STREAMS)} alone"
        return super()._unfit(target, denoiser)

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        return {"threshold": self.threshold}


@dataclass(frozen=True)
class MagCache(DiffusersCache):
    """MagCache: all blocks are skipped while the product of measured ratios stays near 1.

    The ratios belong to a model and sampler: give them, or the file of :class:`sostenuto.MagCacheRatios`, or measure them with
    :meth:`calibrated`, which runs the library's own calibration. On the demo pipeline that is done when it is attached.

    Attributes:
        ratios: one number per step; fewer or more are read at the nearest place.
        threshold: bound of the summed deviation.
        max_skip_steps: most steps skipped in a row.
        retention_ratio: share of the steps at the beginning that are computed.
    """

    ratios: tuple[float, ...] | str | Path | None = field(default=None, metadata={"in_name": False})
    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2

    kind: ClassVar[str] = "diffusers-magcache"
    config_name: ClassVar[str] = "MagCacheConfig"
    apply_name: ClassVar[str] = "apply_mag_cache"
    wants_blocks: ClassVar[bool] = True
    wrong_on: ClassVar[Mapping[str, str]] = _WRONG

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that it is set to; ratios not given are measured by its own calibration."""
        ratios = "its own calibration" if self.ratios is None else self.ratios
        return {**super().settings, "ratios": str(ratios) if isinstance(ratios, Path) else ratios}

    def problem(self, target: Any) -> str | None:
        """Why it can't run there; also, that the ratios of the model are missing."""
        if self.ratios is not None or _is_demo(target):
            return super().problem(target)
        return replace(self, ratios=(1.0,)).problem(target) or (
            "it needs the ratios of this model: give ratios=…, or measure them with calibrated(pipe, sample, steps)"
        )

    def calibrated(self, target: Any, sample: Callable[..., Any], num_inference_steps: int) -> MagCache:
        """The peer with the ratios that the library's calibration mode measures in one generation, averaged over its passes.

        Raises:
            MethodError: the generation had another number of steps.
        """
        with _Calibration(ratios=(1.0,)).attached(target, num_inference_steps):
            sample(target, torch.Generator().manual_seed(0), num_inference_steps=num_inference_steps)
            measured = [
                ratios
                for denoiser in compat.find_denoisers(target).values()
                for ratios in compat.CacheStates(denoiser).values("calibration_ratios")
            ]
        if not measured or any(len(ratios) != num_inference_steps for ratios in measured):
            lengths = ", ".join(str(len(ratios)) for ratios in measured) or "no"
            raise MethodError(f"MagCache's calibration saw {lengths} steps instead of {num_inference_steps}")
        return replace(self, ratios=tuple(fmean(column) for column in zip(*measured, strict=True)))

    @contextmanager
    def attached(self, target: Any, num_inference_steps: int) -> Iterator[None]:
        """The peer enabled; without ratios, on the demo pipeline, measures them first."""
        ready = self
        if self.ratios is None and _is_demo(target):
            from sostenuto.demo.rows import demo_sample

            ready = self.calibrated(target, demo_sample(8), num_inference_steps)
        with super(MagCache, ready).attached(target, num_inference_steps):
            yield

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        ratios = self.ratios
        if isinstance(ratios, (str, Path)):
            ratios = MagCacheRatios.load(ratios).ratios
        return {
            "mag_ratios": list(ratios or (1.0,)),
            "threshold": self.threshold,
            "max_skip_steps": self.max_skip_steps,
            "retention_ratio": self.retention_ratio,
            "num_inference_steps": num_inference_steps,
        }


@dataclass(frozen=True)
class _Calibration(MagCache):
    """MagCache in its calibration mode, which computes everything."""

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        # One step more than there are: at the last one the library prints its ratios and forgets them.
        return {"calibrate": True, "num_inference_steps": num_inference_steps + 1}


@dataclass(frozen=True)
class TaylorSeer(DiffusersCache):
    """TaylorSeer: modules are computed every few steps and forecast by a Taylor polynomial in between.

    Attributes:
        cache_interval: steps from one computed step to the next.
        max_order: order of the polynomial.
        disable_cache_before_step: so many steps at the beginning are computed.
        disable_cache_after_step: from this step on all is computed.
        taylor_factors_dtype: of what is kept.
        modules: what is cached: ``"default"`` (the library's own patterns, which find attention in some networks and nothing
            in others), ``"branches"`` (every module that a residual branch ends with, as sostenuto caches), or patterns.
        use_lite_mode: keep the output projection alone; blocks return zeros meanwhile.
    """

    cache_interval: int = 5
    max_order: int = 1
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    taylor_factors_dtype: str = "bfloat16"
    modules: str | tuple[str, ...] = "default"
    use_lite_mode: bool = False

    kind: ClassVar[str] = "diffusers-taylorseer"
    config_name: ClassVar[str] = "TaylorSeerCacheConfig"
    apply_name: ClassVar[str] = "apply_taylorseer_cache"

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        if self.use_lite_mode and not hasattr(compat.unwrapped(denoiser), "proj_out"):
            return "its lite mode keeps a module named proj_out, which this network lacks: it would get zeros for its blocks"
        often = [site.id for site in inspect(denoiser) if site.calls > 1] if self.modules == "branches" else []
        if often:
            return f"it counts steps by the calls of each module, and {often[0]} is called more than once in a step"
        return super()._unfit(target, denoiser)

    def _remedy(self) -> str:
        return "the library's patterns match none of its modules; give modules=branches, or patterns"

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        patterns: list[str] | None = None
        if self.modules == "branches":
            patterns = [re.escape(site.id) for site in inspect(denoiser)]
        elif self.modules != "default":
            patterns = [self.modules] if isinstance(self.modules, str) else list(self.modules)
        return {
            "cache_interval": self.cache_interval,
            "max_order": self.max_order,
            "disable_cache_before_step": self.disable_cache_before_step,
            "disable_cache_after_step": self.disable_cache_after_step,
            "taylor_factors_dtype": getattr(torch, self.taylor_factors_dtype),
            "cache_identifiers": patterns,
            "use_lite_mode": self.use_lite_mode,
        }


@dataclass(frozen=True)
class PyramidAttentionBroadcast(DiffusersCache):
    """PAB: attention is computed every few steps while the timestep is in a range. All passes of a step share one state.

    Attributes:
        spatial_attention_block_skip_range: self-attention is computed every so many calls; ``None``: always. The same for
            ``temporal_…`` and ``cross_…``.
        timestep_skip_range: the timesteps between which this is done.
    """

    spatial_attention_block_skip_range: int | None = 2
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    timestep_skip_range: tuple[int, int] = (100, 800)

    kind: ClassVar[str] = "diffusers-pab"
    config_name: ClassVar[str] = "PyramidAttentionBroadcastConfig"
    apply_name: ClassVar[str] = "apply_pyramid_attention_broadcast"
    wants_context: ClassVar[bool] = False

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        ranges = {f"{type_}_attention_timestep_skip_range": self.timestep_skip_range for type_ in _TYPES}
        return {
            **{
                f"{type_}_attention_block_skip_range": getattr(self, f"{type_}_attention_block_skip_range")
                for type_ in _TYPES
            },
            **ranges,
            "current_timestep_callback": lambda: follower().timestep,
        }


_TYPES = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class FasterCache(DiffusersCache):
    """FasterCache: attention is extrapolated every other step; the unconditional half of a guided batch may be approximated.

    The library takes every batch for an unconditional half followed by a conditional one unless it is told
    ``is_guidance_distilled=True``, which is the default here: what a call's batch holds can't be known beforehand.

    Attributes:
        spatial_attention_block_skip_range: attention is computed every so many calls.
        spatial_attention_timestep_skip_range: the timesteps between which this is done.
        unconditional_batch_skip_range: the unconditional half is computed every so many calls.
        unconditional_batch_timestep_skip_range: the timesteps between which this is done.
        is_guidance_distilled: leave batches whole.
        attention_weight: how far attention is extrapolated.
        tensor_format: order of the dimensions of the network's output.
    """

    spatial_attention_block_skip_range: int = 2
    spatial_attention_timestep_skip_range: tuple[int, int] = (-1, 681)
    unconditional_batch_skip_range: int = 5
    unconditional_batch_timestep_skip_range: tuple[int, int] = (-1, 641)
    is_guidance_distilled: bool = True
    attention_weight: float = 0.5
    tensor_format: str = "BCHW"

    kind: ClassVar[str] = "diffusers-fastercache"
    config_name: ClassVar[str] = "FasterCacheConfig"
    apply_name: ClassVar[str] = "apply_faster_cache"
    wants_context: ClassVar[bool] = False

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        if not self.is_guidance_distilled and type(compat.unwrapped(denoiser)).__name__ == "DiTTransformer2DModel":
            return (
                "a DiT's pipelines put the conditional half of the batch first and its class labels aren't split by the "
                "library: set is_guidance_distilled=True"
            )
        return super()._unfit(target, denoiser)

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        return {
            "spatial_attention_block_skip_range": self.spatial_attention_block_skip_range,
            "spatial_attention_timestep_skip_range": self.spatial_attention_timestep_skip_range,
            "unconditional_batch_skip_range": self.unconditional_batch_skip_range,
            "unconditional_batch_timestep_skip_range": self.unconditional_batch_timestep_skip_range,
            "is_guidance_distilled": self.is_guidance_distilled,
            "attention_weight_callback": lambda _: self.attention_weight,
            "tensor_format": self.tensor_format,
            "current_timestep_callback": lambda: follower().timestep,
        }


@dataclass(frozen=True)
class SeaCache(DiffusersCache):
    """SeaCache: all blocks are skipped while the filtered latents hardly change.

    The library knows Wan's text-to-video network and Cosmos 3. On DiT and PixArt the adapter uses its documented way for
    others: the registered blocks, and a callback that gives it the latents, each as a video of one frame.

    Attributes:
        threshold: bound of the summed relative change.
        residual_order: 0 reuses the residual, 1 extrapolates it.
        retention_steps: so many steps at the beginning are computed.
        cache_end_steps: so many at the end.
        max_consecutive_cached: most steps skipped in a row.
        power_exp: exponent of the filter.
    """

    threshold: float = 0.25
    residual_order: int = 1
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0

    kind: ClassVar[str] = "diffusers-seacache"
    config_name: ClassVar[str] = "SeaCacheConfig"
    apply_name: ClassVar[str] = "apply_sea_cache"
    wants_blocks: ClassVar[bool] = True
    wants_steps: ClassVar[bool] = True

    def _unfit(self, target: Any, denoiser: nn.Module) -> str | None:
        name = type(compat.unwrapped(denoiser)).__name__
        if name not in (*_KNOWN_TO_SEACACHE, *_IMAGES):
            return f"it needs the latents as frames, which it knows of {', '.join(_KNOWN_TO_SEACACHE)}, not of {name}"
        return super()._unfit(target, denoiser)

    def _options(
        self, denoiser: nn.Module, num_inference_steps: int, follower: Callable[[], Follower]
    ) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "residual_order": self.residual_order,
            "retention_steps": self.retention_steps,
            "cache_end_steps": self.cache_end_steps,
            "max_consecutive_cached": self.max_consecutive_cached,
            "power_exp": self.power_exp,
            "raw_vision_callback": _frames if type(denoiser).__name__ in _IMAGES else None,
        }


_KNOWN_TO_SEACACHE = ("WanTransformer3DModel", "Cosmos3OmniTransformer")
_IMAGES = ("DiTTransformer2DModel", "PixArtTransformer2DModel")


def _frames(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The latents ``[batch, channels, height, width]`` of a call, each as ``[channels, 1, height, width]``."""
    latents = args[0] if args else kwargs["hidden_states"]
    return list(latents[:, :, None].unbind(0))


def _is_demo(target: Any) -> bool:
    return type(target).__name__ == "DemoPipeline"


PEERS: tuple[type[Peer], ...] = (
    FirstBlockCache,
    MagCache,
    TaylorSeer,
    PyramidAttentionBroadcast,
    FasterCache,
    SeaCache,
)
