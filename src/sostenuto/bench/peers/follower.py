"""Which generation and step a denoiser call belongs to: libraries that aren't told by the pipeline learn it from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from sostenuto import compat
from sostenuto.arguments import Reader
from sostenuto.errors import MethodError
from sostenuto.schedulers import noise_levels
from sostenuto.timesteps import Timesteps, levels_of

_RANGE = 1000  # of the timesteps of an unknown scheduler


class Follower:
    """Stands around the calls of one denoiser while a library is attached.

    Args:
        denoiser: the network.
        target: its pipeline, or the network itself.
        num_inference_steps: steps of a generation.
        reset: drops what the library keeps from the generation before.
        tell: given the follower before each call; returns what undoes that after the call.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        target: Any,
        num_inference_steps: int,
        reset: Callable[[], None],
        tell: Callable[[Follower], Callable[[], None]] | None = None,
    ) -> None:
        self._denoiser, self._pipe = denoiser, None if isinstance(target, nn.Module) else target
        self._bare_steps, self._reset, self._tell = num_inference_steps, reset, tell
        self._listed: Any = None  # the scheduler's timesteps of the generation under way
        self._timesteps: Timesteps | None = None
        self._calls, self._step = 0, -1
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # of this call, until its step is known
        self._reader: Reader | None = None

    def follow(self, stack: ExitStack) -> None:
        """Begin, until the stack is left."""
        stack.callback(compat.intercept_calls(self._denoiser, self._around))

    @property
    def num_steps(self) -> int:
        """Steps of this generation."""
        return self._bare_steps if self._listed is None else len(self._listed)

    @property
    def step(self) -> int:
        """The step of this call: that of its timestep, or of a bare denoiser by the number of the call."""
        if self._pipe is None:
            return self._calls - 1
        if self._arguments is not None:
            if self._timesteps is None:
                self._reader = Reader(compat.unwrapped(self._denoiser))
                self._timesteps = Timesteps(self._pipe.scheduler, self._reader.given_as)
            assert self._reader is not None
            given = self._reader.read(*self._arguments).timestep
            self._step = self._timesteps.find(levels_of(given), self._pipe.scheduler, self._step, lambda: False)
            self._arguments = None
        return self._step

    @property
    def timestep(self) -> float:
        """The scheduler's timestep of this call."""
        step = self.step
        return _RANGE * (1 - step / self.num_steps) if self._timesteps is None else self._timesteps.values[step]

    @property
    def sigma(self) -> float:
        """How much of what the network is given is noise, as in flow matching: σ / (α + σ), 0 to 1."""
        step = self.step
        if self._timesteps is None:
            return 1 - step / self.num_steps
        assert self._pipe is not None
        alpha, sigma = noise_levels(self._pipe.scheduler, self._timesteps.values)[step]
        return sigma / (alpha + sigma)

    def _around(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._begins():
                self._reset()
            self._calls += 1
            self._arguments = args, kwargs
            undo = None if self._tell is None else self._tell(self)
            try:
                return inner(*args, **kwargs)
            except BaseException:
                self._listed, self._calls = None, 0  # the next call begins a generation
                raise
            finally:
                self._arguments = None
                if undo is not None:
                    undo()

        return call

    def _begins(self) -> bool:
        """Whether this call begins a generation."""
        if self._pipe is None:
            self._calls %= self._bare_steps
            return self._calls == 0
        listed = self._pipe.scheduler.timesteps
        if listed is self._listed:
            return False
        self._listed, self._timesteps, self._step = listed, None, -1
        return True


def context_setter(denoiser: nn.Module, with_steps: bool = False) -> Callable[[Follower], Callable[[], None]]:
    """Gives diffusers' caches a context where the pipeline sets none, and with ``with_steps`` the step where it leaves it out.

    All calls that aren't labelled share one context, as in diffusers' MagCache.
    """
    states = compat.CacheStates(denoiser)

    def tell(follower: Follower) -> Callable[[], None]:
        given = states.context
        if given is None:
            states.set_context(compat.new_cache_context("inference", **(_place(follower) if with_steps else {})))
        elif with_steps and getattr(given, "step_index", None) is None:
            if not dataclasses.is_dataclass(given) or isinstance(given, type):
                raise MethodError("this diffusers tells its caches no step: it needs 0.42 or newer")
            states.set_context(dataclasses.replace(given, **_place(follower)))
        return lambda: states.set_context(given)

    return tell


def resetter(denoiser: nn.Module) -> Callable[[], None]:
    """Drops what diffusers' caches keep, but not the context that the pipeline has set for this call."""
    states = compat.CacheStates(denoiser)

    def reset() -> None:
        given = states.context
        compat.reset_diffusers_hooks(denoiser)
        states.set_context(given)

    return reset


def _place(follower: Follower) -> dict[str, Any]:
    return {"step_index": follower.step, "num_inference_steps": follower.num_steps, "sigma": follower.sigma}
