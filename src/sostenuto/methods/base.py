"""What a method is: a frozen dataclass that turns the facts of a generation into a plan and a noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sostenuto.anatomy import SiteKind
from sostenuto.block_tap import BlocksTap
from sostenuto.correct import NoiseScale, TimeShifter
from sostenuto.errors import MethodError
from sostenuto.plan import Action, Plan
from sostenuto.sites import Site, inspect
from sostenuto.state import Policy, Selector
from sostenuto.tap import BranchTap, Tap
from sostenuto.unet import is_unet

LETTERS = (
    "b: bytes of a number; d: channels of a token; branches, attentions: how many the network has; order: of the extrapolation "
    "(AB-Cache: outputs combined); out: numbers that the denoiser puts out for a token; up: channels of the kept feature, for "
    "each of its pixels"
)
"""What the letters in ``bytes_per_token`` mean."""


@dataclass(frozen=True)
class Facts:
    """What a method may know before the first step of a generation.

    Attributes:
        sites: the sites of the denoiser, in the order in which they run.
        timesteps: the scheduler's timesteps in sampling order.
        denoiser: the network, for checks only.
        scheduler: the scheduler.
        first_step: the step that the generation begins at, above 0 where a pipeline leaves out the noisiest ones.
    """

    sites: Sequence[Site]
    timesteps: tuple[float, ...]
    denoiser: nn.Module
    scheduler: Any
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        """Number of steps of the generation."""
        return len(self.timesteps)


@dataclass(frozen=True)
class Method:
    """Base of all methods. A method overrides the hooks that are its answer to where, when, how and correct.

    Attributes:
        name: what users type.
        paper: where it was published.
        summary: one line.
        calibrated: whether it needs a calibration for each model and sampler.
        compiles: whether it works on a compiled denoiser; what decides on data while the network runs doesn't.
        state: what it keeps, in words; see ``handle.predicted_cache_bytes`` for bytes.
        bytes_per_token: of features that it keeps at most with its usual settings, for each token of a row of the batch, in the
            letters of :data:`LETTERS`.
        denoisers: the kind of network that it is for.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    calibrated: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    state: ClassVar[str] = "nothing"
    bytes_per_token: ClassVar[str] = "0"
    denoisers: ClassVar[str] = "transformer"

    @property
    def skips(self) -> bool:
        """Whether the method decides what is skipped."""
        return type(self).plan is not Method.plan or type(self).policy is not Method.policy

    @property
    def scales_noise(self) -> bool:
        """Whether the method scales the predicted noise."""
        return type(self).noise_scale is not Method.noise_scale

    @property
    def shifts_time(self) -> bool:
        """Whether the method changes the timestep that the denoiser is given."""
        return type(self).time_shifter is not Method.time_shifter

    @property
    def refines(self) -> bool:
        """Whether the method changes how another one fills its gaps."""
        return type(self).refine is not Method.refine

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> Method:
        """The method ready for this denoiser: parameters that depend on the model filled in, what doesn't fit refused.

        Raises:
            MethodError: the method doesn't fit.
        """
        return self

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """Where: the sites that are tapped, in the order in which they run; by default all branches."""
        if not self.skips and is_unet(denoiser):
            return []  # the branches of a U-Net aren't known, and nothing is to be skipped
        return inspect(denoiser)

    def tap(self, site: Site, denoiser: nn.Module) -> Tap:
        """What carries out the actions at a site."""
        if site.last_block is not None:
            return BlocksTap(site, denoiser)
        return Tap(site) if site.kind is SiteKind.OUTPUT else BranchTap(site, denoiser)

    def plan(self, facts: Facts) -> Plan | None:
        """When, known before the first step: the plan of a generation, or ``None`` where every step is computed."""
        return None

    def refine(self, plan: Plan) -> Plan:
        """How, for the gaps of the method that this one is combined with: that method's plan, filled in another way."""
        return plan

    def policy(self, facts: Facts) -> Policy | None:
        """When, decided at run time: one policy for each pass; the method then has one site, of blocks, and no plan."""
        return None

    def selector(self, facts: Facts, latents: torch.Tensor) -> Selector | None:
        """How partial sites choose their tokens: one selector for each pass, which begins with these latents."""
        return None

    def observed(self, denoiser: nn.Module) -> list[str]:
        """Paths of the modules that the selector observes where they are computed; this doesn't work on a compiled denoiser."""
        return []

    def time_shifter(self, facts: Facts) -> TimeShifter | None:
        """What changes the timestep that the denoiser is given, or ``None``."""
        return None

    def noise_scale(self, facts: Facts) -> Sequence[float] | NoiseScale | None:
        """One factor per step for the predicted noise, or two (computed and reused), or ``None`` for no scaling."""
        return None

    def __or__(self, other: Method) -> Combination:
        if not isinstance(other, Method):
            return NotImplemented
        return Combination((*parts(self), *parts(other)))


def parts(method: Method) -> tuple[Method, ...]:
    """The members of a combination, or the method itself."""
    return method.methods if isinstance(method, Combination) else (method,)


@dataclass(frozen=True)
class Combination(Method):
    """Several methods at once, written ``A | B``: at most one that skips, one that scales the noise, and so on."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        for verb, members in (
            ("decides what is skipped", [m for m in self.methods if m.skips]),
            ("scales the noise", [m for m in self.methods if m.scales_noise]),
            ("shifts the timestep", [m for m in self.methods if m.shifts_time]),
            ("says how gaps are filled", [m for m in self.methods if m.refines]),
        ):
            if len(members) > 1:
                names = " | ".join(type(m).__name__ for m in members)
                raise MethodError(f"{names} can't be combined: each {verb}; keep one of them")

    @property
    def skips(self) -> bool:
        """Whether one of them decides what is skipped."""
        return any(method.skips for method in self.methods)

    @property
    def scales_noise(self) -> bool:
        """Whether one of them scales the predicted noise."""
        return any(method.scales_noise for method in self.methods)

    @property
    def refines(self) -> bool:
        """Whether one of them changes how gaps are filled."""
        return any(method.refines for method in self.methods)

    @property
    def _skipping(self) -> Method:
        return next((method for method in self.methods if method.skips), Method())

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> Combination:  # noqa: D102
        return Combination(tuple(method.prepare(denoiser, scheduler) for method in self.methods))

    def sites(self, denoiser: nn.Module) -> list[Site]:  # noqa: D102
        return self._skipping.sites(denoiser)

    def tap(self, site: Site, denoiser: nn.Module) -> Tap:  # noqa: D102
        return self._skipping.tap(site, denoiser)

    def plan(self, facts: Facts) -> Plan | None:  # noqa: D102
        plan = self._skipping.plan(facts)
        if plan is not None:
            return self.refine(plan)
        if self.refines and self._skipping.policy(facts) is not None:
            raise MethodError(
                f"{type(self._skipping).__name__} decides while the network runs and fills its gaps itself: "
                "use its own options in place of a forecaster"
            )
        return None

    def refine(self, plan: Plan) -> Plan:  # noqa: D102
        for method in self.methods:
            plan = method.refine(plan)
        return plan

    def policy(self, facts: Facts) -> Policy | None:  # noqa: D102
        return self._skipping.policy(facts)

    def selector(self, facts: Facts, latents: torch.Tensor) -> Selector | None:  # noqa: D102
        return self._skipping.selector(facts, latents)

    def observed(self, denoiser: nn.Module) -> list[str]:  # noqa: D102
        return self._skipping.observed(denoiser)

    def time_shifter(self, facts: Facts) -> TimeShifter | None:  # noqa: D102
        return next((m.time_shifter(facts) for m in self.methods if m.shifts_time), None)

    def noise_scale(self, facts: Facts) -> Sequence[float] | NoiseScale | None:  # noqa: D102
        return next((m.noise_scale(facts) for m in self.methods if m.scales_noise), None)


def whole_steps(facts: Facts, skip: Sequence[bool], forecast_order: int = 0) -> Plan:
    """The plan that computes or skips all sites of a step together."""
    gap = Action.FORECAST if forecast_order else Action.REUSE
    return Plan(
        tuple((gap if skipped else Action.COMPUTE,) * len(facts.sites) for skipped in skip),
        forecast_order=max(1, forecast_order),
    )
