"""What a method is: a frozen dataclass that turns the facts of a generation into a plan and a noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sostenuto.anatomy import Site
from sostenuto.errors import MethodError
from sostenuto.plan import Action, Plan


@dataclass(frozen=True)
class Facts:
    """What a method may know before the first step of a generation.

    Attributes:
        sites: the sites of the denoiser, in the order in which they run.
        timesteps: the scheduler's timesteps in sampling order.
        denoiser: the network, for checks only.
        scheduler: the scheduler, for checks only.
    """

    sites: Sequence[Site]
    timesteps: tuple[float, ...]
    denoiser: nn.Module
    scheduler: Any

    @property
    def num_steps(self) -> int:
        """Number of steps of the generation."""
        return len(self.timesteps)


@dataclass(frozen=True)
class Method:
    """Base of all methods. A method with nothing to skip keeps :meth:`plan`, one that corrects nothing :meth:`noise_scale`."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    calibrated: ClassVar[bool] = False

    @property
    def skips(self) -> bool:
        """Whether the method decides what is skipped."""
        return type(self).plan is not Method.plan

    @property
    def scales_noise(self) -> bool:
        """Whether the method scales the predicted noise."""
        return type(self).noise_scale is not Method.noise_scale

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> Method:
        """The method ready for this denoiser: parameters that depend on the model filled in, what doesn't fit refused.

        Raises:
            MethodError: the method doesn't fit.
        """
        return self

    def plan(self, facts: Facts) -> Plan | None:
        """The plan of a generation, or ``None`` where every step is computed."""
        return None

    def noise_scale(self, facts: Facts) -> Sequence[float] | None:
        """One factor per step for the predicted noise, or ``None`` for no scaling."""
        return None

    def __or__(self, other: Method) -> Combination:
        if not isinstance(other, Method):
            return NotImplemented
        return Combination((*_parts(self), *_parts(other)))


def _parts(method: Method) -> tuple[Method, ...]:
    return method.methods if isinstance(method, Combination) else (method,)


@dataclass(frozen=True)
class Combination(Method):
    """Several methods at once, written ``A | B``: at most one of them skips, at most one of them scales the noise."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        for verb, members in (
            ("decides what is skipped", [m for m in self.methods if m.skips]),
            ("scales the noise", [m for m in self.methods if m.scales_noise]),
        ):
            if len(members) > 1:
                names = " | ".join(type(m).__name__ for m in members)
                raise MethodError(f"{names} can't be combined: each {verb}; keep one of them")

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> Combination:  # noqa: D102
        return Combination(tuple(method.prepare(denoiser, scheduler) for method in self.methods))

    def plan(self, facts: Facts) -> Plan | None:  # noqa: D102
        return next((m.plan(facts) for m in self.methods if m.skips), None)

    def noise_scale(self, facts: Facts) -> Sequence[float] | None:  # noqa: D102
        return next((m.noise_scale(facts) for m in self.methods if m.scales_noise), None)


def whole_steps(facts: Facts, skip: Sequence[bool], forecast_order: int = 0) -> Plan:
    """The plan that computes or skips all sites of a step together."""
    gap = Action.FORECAST if forecast_order else Action.REUSE
    return Plan(
        tuple((gap if skipped else Action.COMPUTE,) * len(facts.sites) for skipped in skip),
        forecast_order=max(1, forecast_order),
    )
