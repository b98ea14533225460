"""Which step is meant by the timestep that a network is given, in whatever unit and precision it comes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sostenuto.errors import ClockError

GivenAs = Callable[[torch.Tensor], torch.Tensor]
"""What a network is given for the scheduler's timesteps."""

_MOST_VALUES = 256
_PRECISION = 4 * torch.finfo(torch.float32).eps  # of a timestep that was scaled and scaled back
_LOOSE_PRECISION = 1e-4  # of one that was computed in another way
_WHOLE = 0.99999  # what casting to whole numbers may cut off, of readings that go beyond the unit interval
_UNIT_INTERVAL = 2.0  # a network may be given t / 1000 where the scheduler's timesteps go beyond this


_TRIGONOMETRIC = "SCMScheduler"  # Sana-Sprint's: its timesteps are angles


def called_timesteps(scheduler: Any) -> torch.Tensor:
    """The timesteps at which a sampler calls its network, in float64: without a last one to which it only goes."""
    listed = torch.as_tensor(scheduler.timesteps, dtype=torch.float64, device="cpu")
    ends_idle = type(scheduler).__name__ in (_TRIGONOMETRIC, "LTXEulerAncestralRFScheduler")
    return listed[:-1] if ends_idle and len(listed) > 1 and listed[-1] == 0 else listed


class Timesteps:
    """The scheduler's list of timesteps, and what a network may be given for each.

    Where several steps have the same timestep, because the scheduler lists it twice or because it was rounded to the network's
    precision, the scheduler's ``step_index`` tells them apart; of schedulers that have none, the next such step is meant.

    Args:
        scheduler: the scheduler.
        given_as: what the network is given for a timestep t, where that is not t or t / 1000, nor the noise level σ or
            σ / (1 + σ), nor of an angle its share of the sine.
    """

    def __init__(self, scheduler: Any, given_as: GivenAs | None) -> None:
        listed = called_timesteps(scheduler)
        self.values = tuple(listed.tolist())
        self._usual: list[_Reading] = []
        self._others: list[_Reading] = []
        self._told: _Reading | None = None  # which one it is, once a call has told
        if given_as is not None:
            self._usual = [_Reading(given_as(listed))]
            return
        self._usual = [_Reading(listed)]
        if max(map(abs, self.values), default=0.0) > _UNIT_INTERVAL:
            self._usual.append(_Reading(listed / 1000))
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) >= len(listed):
            sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")[: len(listed)]
            self._others = [_Reading(sigmas), _Reading(sigmas / (1 + sigmas))]
        if type(scheduler).__name__ == _TRIGONOMETRIC:
            self._others.append(_Reading(listed.sin() / (listed.cos() + listed.sin())))

    def find(self, levels: Levels, scheduler: Any, last_step: int, same_latents: Callable[[], bool]) -> int:
        """The step of a call.

        Args:
            levels: what the denoiser is given for a timestep.
            scheduler: the scheduler, whose ``step_index`` may tell.
            last_step: the step of the call before, −1 at first.
            same_latents: tells whether the call before had the same latents.

        Raises:
            ClockError: the timestep is not listed.
        """
        # Some frames may be given (timestep 0) or at noise levels of their own: the noisiest that the scheduler lists counts.
        found = [steps for value in levels.values if (steps := self._matches(value, levels.rounding))]
        if not found:
            raise ClockError(
                f"timestep {levels.values[0]:g} is not among the scheduler's {len(self.values)} timesteps: pass the scheduler "
                "that drives this denoiser (scheduler=…) and call its set_timesteps; of a second pipeline with the same "
                "denoiser, tell the handle with handle.share(pipeline)"
            )
        return _choose(min(found), scheduler, last_step, same_latents)

    def _matches(self, value: float, rounding: _Rounding) -> list[int]:
        """The steps at which the network is given this timestep, as far as its rounding tells."""
        if self._told is not None and (known := self._told.matches(value, rounding)):
            return known
        for readings in (self._usual, self._others):
            found = {reading: steps for reading in readings if (steps := reading.matches(value, rounding))}
            if len(found) == 1:
                self._told = next(iter(found))
            if found:
                return sorted({step for steps in found.values() for step in steps})
        return []


def _choose(matches: Sequence[int], scheduler: Any, last_step: int, same_latents: Callable[[], bool]) -> int:
    """The step that is meant, of several that the timestep fits."""
    if len(matches) == 1:
        return matches[0]
    index, begin = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    if index is not None and index in matches:
        return int(index)
    if last_step in matches and same_latents():
        return last_step
    if last_step >= 0:
        return next((step for step in matches if step > last_step), matches[0])
    return int(begin) if begin is not None and begin in matches else matches[0]


@dataclass(frozen=True)
class _Rounding:
    """How far a timestep may be from the one it was made from.

    Attributes:
        relative: of its own size, or of 1 where that is larger.
        whole: whether it was cast to a whole number.
    """

    relative: float
    whole: bool = False


class _Reading:
    """One way of giving a network the scheduler's timesteps: what it is given at each step.

    Sorted, so that a step is found without a look at all of them.
    """

    def __init__(self, given: torch.Tensor) -> None:
        ordered = sorted((value, step) for step, value in enumerate(given.tolist()))
        self._values = [value for value, _ in ordered]
        self._steps = [step for _, step in ordered]
        # Only of what goes beyond the unit interval is anything left when it is cast to a whole number.
        self._is_coarse = max(map(abs, self._values), default=0.0) > _UNIT_INTERVAL

    def matches(self, value: float, rounding: _Rounding) -> list[int]:
        """The steps at which it may be given this value."""
        size = max(abs(value), 1.0)
        at = bisect_left(self._values, value)
        nearest = min((abs(near - value) for near in self._values[max(0, at - 1) : at + 1]), default=size)
        reach = max(rounding.relative * size, _WHOLE if rounding.whole and self._is_coarse else 0.0)
        if reach < nearest <= _LOOSE_PRECISION * size:
            reach = nearest
        first, last = at, at
        while first and value - self._values[first - 1] <= reach:
            first -= 1
        while last < len(self._values) and self._values[last] - value <= reach:
            last += 1
        return sorted(self._steps[first:last])


@dataclass(frozen=True)
class Levels:
    """The noise levels of one call, as its timestep gives them.

    Attributes:
        values: the different ones.
        rounding: how far each may be from the timestep that it was made from.
        each: that of every frame or sample, where there are several.
    """

    values: Sequence[float]
    rounding: _Rounding
    each: torch.Tensor | tuple[float, ...] | None = None

    def went_on_from(self, before: Levels | None) -> bool:
        """Whether some of several noise levels fell and none rose."""
        if before is None or before.each is None or self.each is None or len(self.values) < 2:
            return False
        was, now = torch.as_tensor(before.each), torch.as_tensor(self.each)
        return was.shape == now.shape and bool((now <= was).all()) and bool((now < was).any())


def levels_of(timestep: Any) -> Levels:
    """The noise levels of a call.

    Raises:
        ClockError: the timestep is no number or tensor, or has too many values.
    """
    try:
        if not isinstance(timestep, torch.Tensor):
            return Levels([float(timestep)], _Rounding(_PRECISION, isinstance(timestep, int)))
        rounding = _rounding_to(timestep.dtype)
        if timestep.numel() > _MOST_VALUES:
            each = timestep.detach().clone().flatten()  # a clone: the sampler may write in place
            values = each.unique().tolist()
        else:
            listed: Any = timestep.tolist() if timestep.ndim < 2 else timestep.flatten().tolist()
            each = tuple(listed) if timestep.ndim else (listed,)
            values = sorted({*each})
    except (TypeError, ValueError):
        raise ClockError(f"{timestep!r} is no timestep") from None
    if not 0 < len(values) <= _MOST_VALUES:
        raise ClockError(f"the denoiser was given {len(values)} different timesteps at once: its step can't be told")
    return Levels(values, rounding, each if len(each) > 1 else None)


@cache
def _rounding_to(dtype: torch.dtype) -> _Rounding:
    if not dtype.is_floating_point:
        return _Rounding(_PRECISION, True)
    return _Rounding(max(_PRECISION, torch.finfo(dtype).eps))
