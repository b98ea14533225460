"""Caching of one patched model of ComfyUI's: attached for the time of a sampling, to the network that all its clones share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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

_SAMPLERS = (
    "one call a step: euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ddim, lcm, res_multistep, deis, ipndm; "
    "two: heun, dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde"
)


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
            ClockError: the sampler calls the model at noise levels that its own don't tell.
            MethodError, TableError: the method doesn't fit this model and these steps.
        """
        if is_switched_off():
            self._last = DisabledHandle()
            return executor(guider, sigmas, *args, **kwargs)
        if len(sigmas) < 2:
            return executor(guider, sigmas, *args, **kwargs)
        network, schedule = network_and_schedule(executor, guider, sigmas)
        limit = self.config.max_cache_bytes
        with enable(network, self.config.method, scheduler=schedule, max_cache_bytes=limit) as handle:
            with sampler_told():
                samples = executor(guider, sigmas, *args, **kwargs)
            self._last = handle
        return samples


def network_and_schedule(executor: Any, guider: Any, sigmas: torch.Tensor) -> tuple[torch.nn.Module, SigmaSchedule]:
    """The network that a sampling calls, with its anatomy known, and at which noise levels.

    Raises:
        AnatomyError: no argument of the network has the name of a timestep.
    """
    model = guider.inner_model
    teach(model.diffusion_model)
    return model.diffusion_model, SigmaSchedule(sigmas, model.model_sampling, getattr(executor, "class_obj", None))


@contextmanager
def sampler_told() -> Iterator[None]:
    """Say which samplers will do, where a call is at no noise level that was foreseen."""
    try:
        yield
    except ClockError as error:
        raise ClockError(f"{error}. Samplers that will do: {_SAMPLERS}") from error


def _told(stats: Statistics) -> str:
    if stats.disabled:
        return "SOSTENUTO_DISABLE is set: every step was computed"
    actions = ", ".join(f"{count} {name}" for name, count in stats.actions.items() if count)
    return (
        f"{stats.num_steps} steps, {stats.ideal_speedup:.2f}x by multiply-accumulates, "
        f"{stats.cache_bytes_peak / 2**20:.1f} MiB kept; {actions}"
    )


class Wrapper(Protocol):
    """What samples in the place of ComfyUI's own sampler, and tells of it."""

    @property
    def report(self) -> str:
        """What the last sampling did, in a line."""
        ...

    def sample(self, executor: Callable[..., Any], guider: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's ``SAMPLER_SAMPLE`` wrapper."""
        ...


def patched(model: Any, wrapper: Wrapper) -> Any:
    """A clone of a ``MODEL`` that is sampled with caching, or calibrated.

    Raises:
        MethodError: the model has such a wrapper already, or this ComfyUI has no wrappers.
        AnatomyError: the model has no network.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        raise MethodError(
            f"a {type(model).__name__} without add_wrapper_with_key: update ComfyUI (December 2024 or newer)"
        )
    if not isinstance(getattr(getattr(model, "model", None), "diffusion_model", None), torch.nn.Module):
        raise AnatomyError(f"this {type(model).__name__} has no diffusion_model to cache")
    if wrapper_of(model) is not None:
        raise MethodError("this model has a sostenuto node already: name both methods in one configuration")
    clone = model.clone()
    clone.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, wrapper.sample)
    return clone


def wrapper_of(model: Any) -> Any:
    """The :class:`Wrapper` of a patched model, ``None`` of another."""
    wrappers = model.get_wrappers(SAMPLER_SAMPLE, KEY)
    return getattr(wrappers[0], "__self__", None) if wrappers else None
