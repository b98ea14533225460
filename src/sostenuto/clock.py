"""Which step and pass is this call, and is it a new generation? Told from the call's own data, never by counting calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sostenuto.errors import ClockError
from sostenuto.features import Feature, leaves


@dataclass(frozen=True)
class Tick:
    """The place of one denoiser call in the sampling.

    Attributes:
        step: position in sampling order, 0 is the noisiest.
        pass_index: 0 for the first call at this step, 1 for the second (such as the unconditional one), …
        num_steps: steps of this generation.
        timesteps: the scheduler's timesteps, in sampling order.
        new_generation: whether this call opens a generation.
    """

    step: int
    pass_index: int
    num_steps: int
    timesteps: tuple[float, ...]
    new_generation: bool

    @property
    def tau(self) -> float:
        """Normalised time τ of the step, from 1 (the noisiest) to 0 (the last)."""
        return normalized_times(self.num_steps)[self.step]


def normalized_times(num_steps: int) -> tuple[float, ...]:
    """τ of every step in sampling order: 1 at the noisiest, 0 at the last, evenly spaced over the steps."""
    return tuple(1 - step / max(1, num_steps - 1) for step in range(num_steps))


_MOST_PASSES = 4
_MOST_VALUES = 256
_PRECISION = 4 * torch.finfo(torch.float32).eps  # of a timestep that was scaled and scaled back
_LOOSE_PRECISION = 1e-4  # of one that was computed in another way
_WHOLE = 0.99999  # what casting to whole numbers may cut off
_UNIT_INTERVAL = 2.0  # a network may be given t / 1000 where the scheduler's timesteps go beyond this


class Clock:
    """Tells the step of every denoiser call from the scheduler's timesteps and the call's arguments.

    A generation begins when the scheduler's timesteps were set anew (``set_timesteps`` makes a new tensor, also with equal
    values), when the timestep jumps back up, or when its first step is called again. Within a step, a call with the same
    latents and other conditioning is another pass. Passes are told apart by their conditioning, never by their order.

    Where several steps have the same timestep, because the scheduler lists it twice or because it was rounded to the network's
    precision, the scheduler's ``step_index`` tells them apart; of schedulers that have none, the next such step is meant.

    Args:
        scheduler: the scheduler of the moment.
        from_timestep: the scheduler's timestep from what the network is given, where that is not t or t / 1000.
    """

    def __init__(self, scheduler: Callable[[], Any], from_timestep: Callable[[float], float] | None = None) -> None:
        self._scheduler, self._from_timestep = scheduler, from_timestep
        self.forget()

    def forget(self) -> None:
        """Drop everything: the next call opens a generation."""
        self._source: Any = None
        self._timesteps: tuple[float, ...] = ()
        self._opening = self._step = -1
        self._reading: _Reading | None = None  # what the network is given, once one call has told
        self._latents: tuple[torch.Tensor, ...] = ()
        self._passes: list[tuple[_Snapshot, ...]] = []  # the conditioning of each pass
        self._called: set[int] = set()  # the passes called at this step

    def tick(self, timestep: Any, latents: Feature, conditioning: Sequence[Any] = ()) -> Tick:
        """Place a call.

        Args:
            timestep: what the denoiser is given: a number or a tensor. Where its elements differ (frames or samples at noise
                levels of their own), the noisiest one tells the step.
            latents: its noisy input, ``[batch, …]`` or a list; tells a second pass from another generation at the same
                timestep.
            conditioning: its other arguments, tensors and other values; tell the passes apart.

        Raises:
            ClockError: the scheduler has no timesteps, the timestep is not among them, or the pass can't be told.
        """
        values = _values(timestep)
        tensors = tuple(leaves(latents))
        scheduler = self._scheduler()
        source = getattr(scheduler, "timesteps", None)
        if source is None:
            raise ClockError("the scheduler has no timesteps yet: call its set_timesteps before the denoiser")
        if source is not self._source:
            self.forget()
            listed = source.tolist() if isinstance(source, torch.Tensor) else source
            self._source, self._timesteps = source, tuple(float(t) for t in listed)
        same_latents = len(self._latents) == len(tensors) and all(map(_equal, self._latents, tensors))
        step = self._position(values, timestep, scheduler, same_latents)
        fresh = self._opening < 0 or step < self._step
        pass_index = 0
        if not fresh:
            pass_index = self._match(conditioning)
            if step == self._step and (not same_latents or pass_index in self._called):
                if step != self._opening:
                    raise ClockError(
                        f"the denoiser was called again at step {step} with "
                        f"{'the same inputs' if same_latents else 'other latents'}: finish one generation before the next, "
                        "and give every pass of a step conditioning of its own"
                    )
                fresh = True  # the first step again: a generation that was given up after it
        if fresh:
            self._opening, self._passes, pass_index = step, [], 0
        if pass_index == len(self._passes):
            self._passes.append(tuple(_Snapshot(tensor) for tensor in conditioning))
        if fresh or step != self._step:
            self._called = set()
        self._called.add(pass_index)
        # Clones: the sampler may write in place.
        self._step, self._latents = step, tuple(tensor.detach().clone() for tensor in tensors)
        return Tick(step, pass_index, len(self._timesteps), self._timesteps, fresh)

    def _position(self, values: Sequence[float], timestep: Any, scheduler: Any, same_latents: bool) -> int:
        # Some frames may be given (timestep 0) or at noise levels of their own: the noisiest that the scheduler lists counts.
        rounding = _rounding(timestep)
        found = [matches for value in values if (matches := self._matches(value, rounding))]
        if not found:
            raise ClockError(
                f"timestep {values[0]:g} is not among the scheduler's {len(self._timesteps)} timesteps: pass the scheduler "
                "that drives this denoiser (scheduler=…) and call its set_timesteps"
            )
        return self._choose(min(found), scheduler, same_latents)

    def _matches(self, value: float, rounding: _Rounding) -> list[int]:
        """The steps at which the network is given this timestep, as far as its rounding tells."""
        if self._reading is not None and (known := self._reading.matches(value, self._timesteps, rounding)):
            return known
        found = {reading: reading.matches(value, self._timesteps, rounding) for reading in self._readings()}
        telling = [reading for reading, matches in found.items() if matches]
        if len(telling) == 1:
            self._reading = telling[0]
        return sorted({step for matches in found.values() for step in matches})

    def _readings(self) -> list[_Reading]:
        if self._from_timestep is not None:
            return [_Reading(self._from_timestep, 1000.0)]
        listed = _Reading(float, 1.0)
        if max(map(abs, self._timesteps), default=0.0) <= _UNIT_INTERVAL:
            return [listed]
        return [listed, _Reading(lambda value: 1000 * value, 1000.0)]

    def _choose(self, matches: Sequence[int], scheduler: Any, same_latents: bool) -> int:
        """The step that is meant, of several that the timestep fits."""
        if len(matches) == 1:
            return matches[0]
        index, begin = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
        if index is not None and index in matches:
            return int(index)
        if self._step in matches and same_latents:
            return self._step
        if self._opening >= 0:
            return next((step for step in matches if step > self._step), matches[0])
        return int(begin) if begin is not None and begin in matches else matches[0]

    def _match(self, conditioning: Sequence[Any]) -> int:
        """The pass with this conditioning; a new one where none has it, which then begins by computing."""
        for index, known in enumerate(self._passes):
            if len(known) == len(conditioning) and all(s.holds(t) for s, t in zip(known, conditioning, strict=True)):
                return index
        if len(self._passes) == _MOST_PASSES:
            raise ClockError(
                f"this call's conditioning matches none of the {_MOST_PASSES} passes seen in this generation: conditioning "
                "that changes from step to step can't be told from another pass, and nothing could be reused"
            )
        return len(self._passes)


class _Snapshot:
    """A value as it was, of a tensor with a quick answer while nobody wrote into it."""

    def __init__(self, value: Any) -> None:
        self._tensor, self._version, self._copy = value, None, value
        if isinstance(value, torch.Tensor):
            self._version, self._copy = _version(value), value.detach().clone()

    def holds(self, other: Any) -> bool:
        """Whether the other value equals that of then."""
        if not isinstance(other, torch.Tensor) or not isinstance(self._copy, torch.Tensor):
            return type(other) is type(self._copy) and bool(other == self._copy)
        if other is self._tensor and self._version is not None and _version(other) == self._version:
            return True
        return _equal(self._copy, other)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass(frozen=True)
class _Rounding:
    """How far a timestep may be from the one it was made from.

    Attributes:
        relative: of its own size, or of the range it was computed in where that is larger.
        absolute: whatever its size.
    """

    relative: float
    absolute: float = 0.0


@dataclass(frozen=True)
class _Reading:
    """One way of giving a network the scheduler's timestep: as t, as t / 1000, or as its anatomy says.

    Attributes:
        to_timestep: the scheduler's timestep from what the network is given.
        span: the range of timesteps that it was computed in.
    """

    to_timestep: Callable[[float], float]
    span: float

    def matches(self, value: float, timesteps: Sequence[float], rounding: _Rounding) -> list[int]:
        """The steps whose timestep this value may be."""
        timestep = self.to_timestep(value)
        gaps = [abs(t - timestep) for t in timesteps]
        size = max(abs(timestep), self.span)
        nearest = min(gaps, default=math.inf)
        reach = max(rounding.relative * size, rounding.absolute)
        if nearest > reach and nearest <= _LOOSE_PRECISION * size:
            reach = nearest
        return [step for step, gap in enumerate(gaps) if gap <= reach]


def _rounding(timestep: Any) -> _Rounding:
    if not isinstance(timestep, torch.Tensor):
        return _Rounding(_PRECISION, _WHOLE if isinstance(timestep, int) else 0.0)
    if not timestep.dtype.is_floating_point:
        return _Rounding(_PRECISION, _WHOLE)
    return _Rounding(max(_PRECISION, torch.finfo(timestep.dtype).eps))


def _values(timestep: Any) -> list[float]:
    """The different values of a timestep."""
    try:
        if not isinstance(timestep, torch.Tensor):
            return [float(timestep)]
        values = timestep.unique().tolist()
        if not 0 < len(values) <= _MOST_VALUES:
            raise ClockError(
                f"the denoiser was given {len(values)} different timesteps at once: its step can't be told"
            )
        return values
    except (TypeError, ValueError):
        raise ClockError(f"{timestep!r} is no timestep") from None
