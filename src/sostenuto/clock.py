"""Which step and pass is this call, and is it a new generation? Told from the call's own data, never by counting calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from sostenuto.errors import ClockError
from sostenuto.features import Feature, leaves
from sostenuto.timesteps import GivenAs, Levels, Timesteps, levels_of


class Tick(NamedTuple):
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
_MOST_BACKWARD = 3  # generations of one step in a row, each of which begins before the one before
_AKIN = 0.125


class Clock:
    """Tells the step of every denoiser call from the scheduler's timesteps and the call's arguments.

    A generation begins when the scheduler's timesteps were set anew (``set_timesteps`` makes a new tensor, also with equal
    values), when the timestep jumps back up, or when its first step is called again. Within a step, a call with other
    conditioning is another pass. Passes are told apart by their conditioning, never by their order; only where two passes
    are given the very same inputs are they told apart by order, and then they are interchangeable.

    Args:
        scheduler: the scheduler of the moment.
        given_as: what the network is given for a timestep t, where that is not t or t / 1000, nor the noise level σ or
            σ / (1 + σ).
    """

    def __init__(self, scheduler: Callable[[], Any], given_as: GivenAs | None = None) -> None:
        self._scheduler, self._given_as = scheduler, given_as
        self.forget()

    def forget(self) -> None:
        """Drop everything: the next call opens a generation."""
        self._source: Any = None
        self._timesteps: Timesteps | None = None
        self._opening = self._step = -1
        self._backward = 0  # generations of one step so far, each of which begins before the one before
        self._levels: Levels | None = None  # of the last call
        self._latents: tuple[torch.Tensor, ...] = ()
        self._passes: list[_Conditioning] = []  # that of each pass
        self._called: set[int] = set()  # the passes called at this step

    @property
    def source(self) -> Any:
        """The scheduler's list of timesteps that the generation under way follows."""
        return self._source

    def tick(self, timestep: Any, latents: Feature, conditioning: Sequence[Any] = ()) -> Tick:
        """Place a call.

        Args:
            timestep: what the denoiser is given: a number or a tensor. Where its elements differ (frames or samples at noise
                levels of their own), the noisiest one tells the step; a call at the same step whose elements went on is
                a new turn of it, in which every pass computes.
            latents: its noisy input, ``[batch, …]`` or a list; tells a second pass from another generation at the same
                timestep.
            conditioning: its other arguments, tensors and other values; tell the passes apart.

        Raises:
            ClockError: the scheduler has no timesteps, the timestep is not among them, it rises from call to call, or the pass
                can't be told.
        """
        tensors = tuple(leaves(latents))
        scheduler = self._scheduler()
        source = _timesteps(scheduler)
        if source is None:
            raise ClockError("the scheduler has no timesteps yet: call its set_timesteps before the denoiser")
        if source is not self._source or self._timesteps is None:
            self.forget()
            self._source, self._timesteps = source, Timesteps(scheduler, self._given_as)

        def same() -> bool:  # asked for only where it matters
            return _are_same(self._latents, tensors)

        levels = levels_of(timestep)
        step = self._timesteps.find(levels, scheduler, self._step, same)
        fresh = self._opening < 0 or step < self._step
        again = not fresh and step == self._step and not levels.went_on_from(self._levels)
        known = [] if fresh else self._known(conditioning)
        free = [index for index in known if not again or index not in self._called]
        crowded = len(self._passes) == _MOST_PASSES and not free
        repeated = again and len(free) < len(known) and (crowded or not same())
        if again and step == self._opening:  # a generation may be given up after its first step
            fresh = repeated or not (same() or _are_akin(self._latents, tensors))
        elif repeated:
            raise ClockError(
                f"the denoiser was called again at step {step} with {'the same inputs' if same() else 'other latents'}: "
                "finish one generation before the next, and give every pass of a step conditioning of its own"
            )
        if fresh:
            self._check_direction(step)
            self._opening, self._passes, free = step, [], []
        elif not again:
            self._backward = 0
        if fresh or not again:
            self._called = set()
        pass_index = next(iter(free), None)
        if pass_index is None:
            pass_index = self._new_pass(conditioning)
        self._called.add(pass_index)
        self._step, self._latents = step, tuple(map(_copy, tensors))
        self._levels = levels
        listed = self._timesteps.values
        return Tick(step, pass_index, len(listed), listed, fresh)

    def _check_direction(self, step: int) -> None:
        """Refuse calls that go through the schedule backwards: each begins a generation, and nothing would ever be reused."""
        self._backward = self._backward + 1 if step < self._opening else 0
        if self._backward == _MOST_BACKWARD:
            raise ClockError(
                f"the timestep has risen with each of the last {_MOST_BACKWARD + 1} calls, up to step {step}, so that each "
                "begins a generation and nothing can be reused: if the network is given 1 − t / 1000, declare "
                "reversed_timestep=True in its anatomy (sostenuto.register_anatomy); if you do sample backwards (inversion), "
                "pass the inverse scheduler, or disable sostenuto meanwhile"
            )

    def _known(self, conditioning: Sequence[Any]) -> list[int]:
        """The passes with this conditioning."""
        plain, tensors = _parted(conditioning)
        return [index for index, known in enumerate(self._passes) if known.holds(plain, tensors)]

    def _new_pass(self, conditioning: Sequence[Any]) -> int:
        """A pass not seen before, which begins by computing."""
        if len(self._passes) == _MOST_PASSES:
            raise ClockError(
                f"this call's conditioning matches none of the {_MOST_PASSES} passes seen in this generation: conditioning "
                "that changes from step to step can't be told from another pass, and nothing could be reused"
            )
        self._passes.append(_Conditioning(*_parted(conditioning)))
        return len(self._passes) - 1


class Schedulers:
    """The schedulers that may drive a denoiser: the one whose timesteps were set last does.

    Args:
        first: the scheduler, of the moment, of the pipeline that the denoiser belongs to.
    """

    def __init__(self, first: Callable[[], Any]) -> None:
        self._given = [first]
        self._seen: list[Any] = [None]
        self._driving: int | None = 0

    def add(self, scheduler: Callable[[], Any]) -> None:
        """Take in the scheduler of another pipeline with the same denoiser."""
        self._given.append(scheduler)
        self._seen = [_timesteps(scheduler()) for scheduler in self._given]

    def __call__(self) -> Any:
        """The scheduler in use.

        Raises:
            ClockError: the timesteps of two of them were set since the last call.
        """
        if len(self._given) == 1:
            return self._given[0]()
        schedulers = [scheduler() for scheduler in self._given]
        now = [_timesteps(scheduler) for scheduler in schedulers]
        changed = [index for index, (new, old) in enumerate(zip(now, self._seen, strict=True)) if new is not old]
        self._seen = now
        if changed:
            one = all(now[index] is now[changed[0]] for index in changed)  # also pipelines that share their scheduler
            self._driving = changed[0] if one else None
        if self._driving is None:
            raise ClockError(
                f"{len(self._given)} pipelines share this denoiser and the timesteps of more than one were set since its "
                "last call: set those of a pipeline right before its own steps"
            )
        return schedulers[self._driving]


def _timesteps(scheduler: Any) -> Any:
    return getattr(scheduler, "timesteps", None)


Plain = list[tuple[int, type, Any]]


def _parted(conditioning: Sequence[Any]) -> tuple[Plain, list[torch.Tensor]]:
    """Plain values, each with its place and type (``1 == True``), and tensors."""
    plain = [(i, type(value), value) for i, value in enumerate(conditioning) if not isinstance(value, torch.Tensor)]
    return plain, [value for value in conditioning if isinstance(value, torch.Tensor)]


class _Conditioning:
    """The conditioning of a pass, as it was."""

    def __init__(self, plain: Plain, tensors: list[torch.Tensor]) -> None:
        self._plain, self._tensors = plain, [_Snapshot(tensor) for tensor in tensors]

    def holds(self, plain: Plain, tensors: list[torch.Tensor]) -> bool:
        """Whether another is equal to it."""
        return (
            self._plain == plain
            and len(self._tensors) == len(tensors)
            and all(known.holds(tensor) for known, tensor in zip(self._tensors, tensors, strict=True))
        )


class _Snapshot:
    """A tensor as it was, with a quick answer while nobody wrote into it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version, self._copy = tensor, _version(tensor), _copy(tensor)

    def holds(self, other: torch.Tensor) -> bool:
        """Whether the other tensor equals that of then."""
        if other is self._tensor and self._version is not None and _version(other) == self._version:
            return True
        return _equal(self._copy, other)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is now: the sampler may write in place."""
    return tensor.detach().clone() if tensor.requires_grad else tensor.clone()


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _are_same(known: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
    """Whether the latents are the same, also where one call is given them once for each half of a batched guidance."""
    if not known or not given:
        return False
    few, many = sorted((known, given), key=len)
    if len(few) < len(many):  # one tensor per sample
        return len(many) % len(few) == 0 and all(_equal(many[i], few[i % len(few)]) for i in range(len(many)))
    return all(map(_repeats, known, given))


def _repeats(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape == b.shape or not a.ndim or not b.ndim:
        return _equal(a, b)
    few, many = sorted((a, b), key=len)
    return (
        len(few) > 0
        and len(many) % len(few) == 0
        and _equal(many, few.repeat(len(many) // len(few), *[1] * (few.ndim - 1)))
    )


def _are_akin(known: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
    """Whether the latents agree in a part, which noise of two generations doesn't: frames or channels that aren't zero."""
    return len(known) == len(given) > 0 and all(
        a.shape == b.shape and ((a == b) & (a != 0)).double().mean().item() >= _AKIN
        for a, b in zip(known, given, strict=True)
    )
