"""Which step and pass is this call, and is it a new generation? Told from the call's own data, never by counting calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sostenuto.errors import ClockError


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


class Clock:
    """Tells the step of every denoiser call from the scheduler's timesteps and the call's arguments.

    A generation begins when the scheduler's timesteps were set anew (``set_timesteps`` makes a new tensor, also with
    equal values), or when the timestep jumps back up. Within a step, a call with the same latents is the next pass.
    """

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        self._scheduler = scheduler
        self._source: Any = None
        self._timesteps: tuple[float, ...] = ()
        self._step = -1
        self._latents: torch.Tensor | None = None
        self._passes: list[tuple[Any, ...]] = []  # the conditioning of each pass, once there is more than one

    def tick(self, timestep: Any, latents: torch.Tensor, conditioning: Sequence[Any] = ()) -> Tick:
        """Place a call.

        Args:
            timestep: what the denoiser is given: a number, or a tensor whose elements are all equal.
            latents: its first input, ``[batch, …]``; tells a second pass from a new generation at the same timestep.
            conditioning: its other tensor arguments; tell the passes of later steps apart.

        Raises:
            ClockError: the scheduler has no timesteps, the timestep is not among them, or the pass can't be told.
        """
        scheduler = self._scheduler()
        source = getattr(scheduler, "timesteps", None)
        if source is None:
            raise ClockError("the scheduler has no timesteps yet: call its set_timesteps before the denoiser")
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        fresh = source is not self._source
        if fresh:
            values = source.tolist() if isinstance(source, torch.Tensor) else source
            self._source, self._timesteps = source, tuple(float(t) for t in values)
        step = self._position(value, scheduler, -1 if fresh else self._step)
        same_step = not fresh and step == self._step
        if not fresh and not same_step and step < self._step:
            fresh = True
        if same_step and not self._same_latents(latents):
            fresh, same_step = True, False
        pass_index = self._pass(same_step, fresh, tuple(conditioning))
        self._step, self._latents = step, latents
        return Tick(step, pass_index, len(self._timesteps), self._timesteps, fresh)

    def forget(self) -> None:
        """Drop everything: the next call opens a generation."""
        self.__init__(self._scheduler)

    def _position(self, value: float, scheduler: Any, after: int) -> int:
        matches = [p for p, t in enumerate(self._timesteps) if abs(t - value) <= 1e-4 * max(1.0, abs(t))]
        if not matches:
            # Flow-matching pipelines hand over timestep / 1000, some in bfloat16.
            scaled = [p for p, t in enumerate(self._timesteps) if abs(t / 1000 - value) <= 4e-3 * max(1e-3, abs(value))]
            matches = sorted(scaled, key=lambda p: abs(self._timesteps[p] / 1000 - value))[:1]
        if not matches:
            raise ClockError(
                f"timestep {value:g} is not among the scheduler's {len(self._timesteps)} timesteps: pass the scheduler "
                "that drives this denoiser (scheduler=…) and call its set_timesteps"
            )
        if len(matches) == 1:
            return matches[0]
        index = getattr(scheduler, "step_index", None)  # second-order schedulers list a timestep twice
        return index if index in matches else next((p for p in matches if p > after), matches[-1])

    def _same_latents(self, latents: torch.Tensor) -> bool:
        known = self._latents
        return known is not None and known.shape == latents.shape and (known is latents or torch.equal(known, latents))

    def _pass(self, same_step: bool, fresh: bool, conditioning: tuple[Any, ...]) -> int:
        if fresh:
            self._passes, self._pass_count, self._opening = [conditioning], 0, True
            return 0
        if self._opening:  # the first step of a generation shows how many passes there are
            if same_step:
                self._passes.append(conditioning)
                return len(self._passes) - 1
            self._opening = False
        if len(self._passes) == 1:
            if not same_step:
                return 0
            self._passes.append(conditioning)
            return 1
        for index, known in enumerate(self._passes):
            if len(known) == len(conditioning) and all(map(_equal, known, conditioning)):
                return index
        raise ClockError(
            f"a step is made of {len(self._passes)} denoiser calls and this one's conditioning matches none of those "
            "seen in the first step: sostenuto can't tell which cache it belongs to; batch the guidance passes into one call"
        )


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return False
