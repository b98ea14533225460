"""What a method is: a frozen dataclass that turns the facts of a generation into a plan and a noise scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
        compiles: whether it works on a compiled denoiser, with some settings at least; what decides on data while the network
            runs doesn't.
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
    def _decides_on_data(self) -> bool:
        """Whether it decides while the network runs what, or which tokens, it skips."""
        return type(self).policy is not Method.policy or type(self).selector is not Method.selector

    @property
    def skips_every_kind(self) -> bool:
        """Whether it skips branches of every kind, which leaves nothing for another method to skip; by default if it skips."""
        return self.skips

    @property
    def scales_noise(self) -> bool:
        """Whether the method scales the predicted noise."""
        return type(self).noise_scale is not Method.noise_scale

    @property
    def shifts_time(self) -> bool:
        """Whether the method changes the timestep that the denoiser is given."""
        return type(self).time_shifter is not Method.time_shifter

    @property
    def works_compiled(self) -> bool:
        """Whether it works on a compiled denoiser, with the settings that it has."""
        return self.compiles

    @property
    def refines(self) -> bool:
        """Whether the method changes how another one fills its gaps."""
        return type(self).refine is not Method.refine

    @property
    def num_inference_steps(self) -> int | None:
        """The one number of steps that it runs with, once what it was calibrated with is loaded; ``None``: any."""
        return None

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


def presets_of(method: type[Method]) -> list[str]:
    """The names of the constructors that hold published settings, and others that make the method of something."""
    return [
        name for name, member in vars(method).items() if isinstance(member, classmethod) and not name.startswith("_")
    ]


def parts(method: Method) -> tuple[Method, ...]:
    """The members of a combination, or the method itself."""
    return method.methods if isinstance(method, Combination) else (method,)


@dataclass(frozen=True)
class Combination(Method):
    """Several methods at once, written ``A | B``: at most one that scales the noise, one that shifts the timestep, and so on.

    Several may skip, where each has a plan of branches before the first step and no branch is skipped by two of them.

    Attributes:
        methods: the methods, in any order.
        own: the sites of each method that skips, where there are several, once they are prepared.
    """

    methods: tuple[Method, ...] = ()
    own: tuple[tuple[Site, ...], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for verb, members in (
            ("scales the noise", [m for m in self.methods if m.scales_noise]),
            ("shifts the timestep", [m for m in self.methods if m.shifts_time]),
            ("says how gaps are filled", [m for m in self.methods if m.refines]),
        ):
            if len(members) > 1:
                raise _clash(members, f"each {verb}")
        for method in self._skipping if self.refines else ():
            if method._decides_on_data:
                raise MethodError(
                    f"{_name(method)} decides while the network runs and fills its gaps itself: "
                    "use its own options in place of a forecaster"
                )
        for method in self._skipping if len(self._skipping) > 1 else ():
            if method._decides_on_data:
                raise _clash(self._skipping, f"{_name(method)} decides while the network runs what is skipped")
            if method.skips_every_kind:
                raise _clash(
                    self._skipping, f"{_name(method)} skips branches of every kind, and leaves none for another"
                )

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
    def num_inference_steps(self) -> int | None:
        """That of the first one that has one; of two that differ one refuses to run."""
        return next((steps for method in self.methods if (steps := method.num_inference_steps)), None)

    @property
    def _skipping(self) -> tuple[Method, ...]:
        return tuple(method for method in self.methods if method.skips)

    @property
    def _one(self) -> Method:
        """The one that skips; where none or several do, one that leaves everything as it is."""
        return self._skipping[0] if len(self._skipping) == 1 else Method()

    def prepare(self, denoiser: nn.Module, scheduler: Any) -> Combination:
        """Every method ready for this denoiser; where several skip, refuse those that skip more than branches."""
        prepared = Combination(tuple(method.prepare(denoiser, scheduler) for method in self.methods))
        skipping = prepared._skipping
        if len(skipping) < 2:
            return prepared
        own = tuple(tuple(method.sites(denoiser)) for method in skipping)
        branches = set() if is_unet(denoiser) else set(inspect(denoiser))
        for method, sites in zip(skipping, own, strict=True):
            larger = next((site for site in sites if site not in branches), None)
            if larger is not None:
                raise _clash(skipping, f"{_name(method)} skips {larger.id!r}, which is more than a branch")
        return replace(prepared, own=own)

    def sites(self, denoiser: nn.Module) -> list[Site]:  # noqa: D102
        if not self.own:
            return self._one.sites(denoiser)
        return [site for site in inspect(denoiser) if any(site in sites for sites in self.own)]

    def tap(self, site: Site, denoiser: nn.Module) -> Tap:
        """That of the method which has one of its own for the site."""
        owners = [m for m, own in zip(self._skipping, self.own, strict=False) if site in own]
        special = [method for method in owners if type(method).tap is not Method.tap]
        if len(special) > 1:
            raise _clash(special, f"each has a way of its own to run {site.id}")
        return (special or [self._one])[0].tap(site, denoiser)

    def plan(self, facts: Facts) -> Plan | None:  # noqa: D102
        if self.own:
            return self._merged(facts)
        plan = self._one.plan(facts)
        return None if plan is None else self.refine(plan)

    def _merged(self, facts: Facts) -> Plan:
        """The plans side by side: every site follows the one method that skips it."""
        columns = {site.id: (Action.COMPUTE,) * facts.num_steps for site in facts.sites}
        skippers: dict[str, Method] = {}
        rule = Plan(())  # of the forecasts
        for method, sites in zip(self._skipping, self.own, strict=True):
            plan = method.plan(replace(facts, sites=sites))
            if plan is None:
                continue
            check_steps(plan, facts.num_steps)
            plan = self.refine(plan)
            if any(Action.FORECAST in row for row in plan.actions):
                if rule.actions and replace(rule, actions=plan.actions) != plan:
                    remedy = "add Forecast(order=…), which fills the gaps of all"
                    raise _clash(self._skipping, "they fill their gaps by different forecasts", remedy)
                rule = plan
            for site, column in zip(sites, zip(*plan.actions, strict=True), strict=True):
                if set(column) == {Action.COMPUTE}:
                    continue
                if site.id in skippers:
                    raise _clash((skippers[site.id], method), f"both skip {site.id} ({site.kind.value})")
                skippers[site.id], columns[site.id] = method, column
        return replace(rule, actions=tuple(zip(*columns.values(), strict=True)))

    def refine(self, plan: Plan) -> Plan:  # noqa: D102
        for method in self.methods:
            plan = method.refine(plan)
        return plan

    def policy(self, facts: Facts) -> Policy | None:  # noqa: D102
        return self._one.policy(facts)

    def selector(self, facts: Facts, latents: torch.Tensor) -> Selector | None:  # noqa: D102
        return self._one.selector(facts, latents)

    def observed(self, denoiser: nn.Module) -> list[str]:  # noqa: D102
        return self._one.observed(denoiser)

    @property
    def shifts_time(self) -> bool:  # noqa: D102
        return any(m.shifts_time for m in self.methods)

    def time_shifter(self, facts: Facts) -> TimeShifter | None:  # noqa: D102
        return next((m.time_shifter(facts) for m in self.methods if m.shifts_time), None)

    def noise_scale(self, facts: Facts) -> Sequence[float] | NoiseScale | None:  # noqa: D102
        return next((m.noise_scale(facts) for m in self.methods if m.scales_noise), None)


def check_steps(plan: Plan, num_steps: int) -> None:
    """Refuse a plan for another number of steps.

    Raises:
        MethodError: with both numbers.
    """
    if plan.num_steps != num_steps:
        raise MethodError(f"the plan has {plan.num_steps} steps, the sampler runs {num_steps}")


def _name(method: Method) -> str:
    return type(method).__name__


def _clash(methods: Sequence[Method], reason: str, remedy: str = "keep one of them") -> MethodError:
    """The error of methods that don't go together."""
    return MethodError(f"{' | '.join(map(_name, methods))} can't be combined: {reason}; {remedy}")


def whole_steps(facts: Facts, skip: Sequence[bool], forecast_order: int = 0) -> Plan:
    """The plan that computes or skips all sites of a step together."""
    gap = Action.FORECAST if forecast_order else Action.REUSE
    return Plan(
        tuple((gap if skipped else Action.COMPUTE,) * len(facts.sites) for skipped in skip),
        forecast_order=max(1, forecast_order),
    )
