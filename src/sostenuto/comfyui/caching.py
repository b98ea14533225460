"""Caching of one patched model of ComfyUI's: attached for the time of a sampling, to the network that all its clones share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sostenuto.comfyui.networks import teach
from sostenuto.comfyui.schedule import SigmaSchedule
from sostenuto.config import Config
from sostenuto.enabling import JointHandle, enable
from sostenuto.engine import Handle
from sostenuto.errors import AnatomyError, ClockError, EngineError, MethodError
from sostenuto.stats import Statistics
from sostenuto.switch import DisabledHandle, is_switched_off

KEY = "sostenuto"
SAMPLER_SAMPLE = "sampler_sample"  # the value of comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE

_ONE_CALL = "euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ddim, lcm, res_multistep, deis, ipndm"


class Caching:
    """What the wrapper of a patched model does; one for each node that patches.

    Args:
        config: the method and its limit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._last: Handle | JointHandle | DisabledHandle | None = None  # of the last sampling, disabled by now

    @property
    def stats(self) -> Statistics:
        """Statistics of the last sampling; counted here, so that a sampling doesn't wait for it.

        Raises:
            EngineError: nothing was sampled yet, or the cost of its calls can't be told.
        """
        if self._last is None:
            raise EngineError("nothing was sampled with this model yet")
        return self._last.stats

    @property
    def report(self) -> str:
        """What the last sampling did, in a line."""
        try:
            return _told(self.stats)
        except EngineError as error:
            return str(error)

    def sample(self, executor: Callable[..., Any], guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's ``SAMPLER_SAMPLE`` wrapper: sample with caching attached, whatever happens detach it.

        Args:
            executor: samples.
            guider: what the sampler calls; its ``inner_model`` is ComfyUI's model, loaded and patched by now.
            sigmas: the noise levels of this sampling, one more than steps.
            args: the sampler's other arguments.
            kwargs: the same, by name.

        Raises:
            ClockError: the sampler calls the model more than once a step, or between its noise levels.
            MethodError, TableError: the method doesn't fit this model and these steps.
        """
        if is_switched_off():
            self._last = DisabledHandle()
            return executor(guider, sigmas, *args, **kwargs)
        if len(sigmas) < 2:
            return executor(guider, sigmas, *args, **kwargs)
        model = guider.inner_model
        network = model.diffusion_model
        teach(network)
        schedule = SigmaSchedule(sigmas, model.model_sampling)
        limit = self.config.max_cache_bytes
        with enable(network, self.config.method, scheduler=schedule, max_cache_bytes=limit) as handle:
            try:
                samples = executor(guider, sigmas, *args, **kwargs)
            except ClockError as error:
                raise ClockError(
                    f"{error}. Caching is for samplers that call the model once for each noise level, such as {_ONE_CALL}"
                ) from error
            self._last = handle
        return samples


def _told(stats: Statistics) -> str:
    if stats.disabled:
        return "SOSTENUTO_DISABLE is set: every step was computed"
    actions = ", ".join(f"{count} {name}" for name, count in stats.actions.items() if count)
    return (
        f"{stats.num_steps} steps, {stats.ideal_speedup:.2f}x by multiply-accumulates, "
        f"{stats.cache_bytes_peak / 2**20:.1f} MiB kept; {actions}"
    )


def patched(model: Any, config: Config) -> Any:
    """A clone of a ``MODEL`` that is sampled with caching.

    Raises:
        MethodError: the model is sampled with caching already, or this ComfyUI has no wrappers.
        AnatomyError: the model has no network.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        raise MethodError(
            f"a {type(model).__name__} without add_wrapper_with_key: update ComfyUI (December 2024 or newer)"
        )
    if not isinstance(getattr(getattr(model, "model", None), "diffusion_model", None), torch.nn.Module):
        raise AnatomyError(f"this {type(model).__name__} has no diffusion_model to cache")
    if caching_of(model) is not None:
        raise MethodError("this model has a sostenuto node already: name both methods in one configuration")
    clone = model.clone()
    clone.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, Caching(config).sample)
    return clone


def caching_of(model: Any) -> Caching | None:
    """The caching of a patched model."""
    wrappers = model.get_wrappers(SAMPLER_SAMPLE, KEY)
    return getattr(wrappers[0], "__self__", None) if wrappers else None
