"""AB-Cache: extrapolate the denoiser's output and spare the whole call (arXiv 2504.10540)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from sostenuto.errors import MethodError
from sostenuto.forecast import binomial_weights, lagrange_weights
from sostenuto.methods.base import Facts, Method, whole_steps
from sostenuto.methods.checks import check_choice, check_flag, check_whole
from sostenuto.plan import Plan
from sostenuto.schedulers import is_flow, noise_levels
from sostenuto.sites import CLEAN_SAMPLE, OUTPUT, Site

Abscissa = Literal["auto", "step", "sigma", "lambda"]

_LAMBDA_SCHEDULERS = ("DPMSolver", "UniPC", "DEIS", "SASolver")  # their own formulas are polynomials in λ


@dataclass(frozen=True)
class ABCache(Method):
    """AB-Cache (arXiv 2504.10540): between computed steps the output is a fixed combination of the last ``order`` outputs.

    Adams-Bashforth updates of two neighbouring orders agree where ``f_n ≈ Σ_j (−1)^{j−1} C(k, j) f_{n−j}``, with error
    ``O(h^k)``. A cached step calls no network at all: the extrapolated prediction goes to ``scheduler.step`` as usual, so
    that multistep schedulers keep a history without holes. The predictions of a fused batch, or of separate passes, are
    extrapolated apart; guidance is linear, so this equals extrapolating the guided output as long as its scale is constant,
    and stays right where it isn't. Of a learned variance the newest is taken.

    The paper's relation is for neighbouring steps, but computed steps are up to an interval apart; ``mode`` says what then:

    - ``"lagrange"``: the polynomial through the last computed outputs, at their true places (binomial where they are
      equally spaced and the target is the next);
    - ``"literal"``: binomial weights on the computed outputs whatever their distance, as in a port of the authors' FLUX code;
      the forecast is then constant within a gap;
    - ``"recursive"``: binomial weights, and forecasts enter the queue: a true recurrence over all steps.

    Attributes:
        order: the paper's k, number of outputs combined, 1 (last value) to 5; where the queue holds fewer, that many.
        warmup: so many steps at the beginning are computed, 1 or more.
        interval: afterwards every step is computed whose number in the generation is a multiple of it, 1 or more.
        mode: see above.
        abscissa: where outputs lie, for ``"lagrange"``: ``"step"`` number, ``"sigma"``, or ``"lambda"``, half the log
            signal-to-noise ratio. ``"auto"``: σ for flow matching, λ for the DPM-Solver family, the step number otherwise, and
            wherever two steps share a noise level (second-order schedulers call the network twice at one).
        compute_last: whether the last step is computed in any case.
        extrapolates: ``"prediction"``, what the network predicts, as in the paper; or ``"sample"``, the clean sample that
            follows from it, of which every skipped step makes the prediction for its own x_t. With a sampler that adds noise
            of its own (DDPM, the ancestral ones) that is the one to choose: an old prediction doesn't know the noise that
            came since, which piles up until the next computed step. Ours, no paper's.
    """

    order: int = 2
    warmup: int = 5
    interval: int = 6
    mode: Literal["lagrange", "literal", "recursive"] = "lagrange"
    abscissa: Abscissa = "auto"
    compute_last: bool = False
    extrapolates: Literal["prediction", "sample"] = "prediction"

    name: ClassVar[str] = "ab"
    paper: ClassVar[str] = "arXiv 2504.10540"
    summary: ClassVar[str] = "extrapolates the denoiser's output from the last k, no network call in between"
    state: ClassVar[str] = "order outputs of the denoiser (one more with mode='recursive')"
    bytes_per_token: ClassVar[str] = "b × out × order"
    denoisers: ClassVar[str] = "any"

    def __post_init__(self) -> None:
        check_whole("ABCache's order", self.order, least=1, most=5)
        check_whole("ABCache's warmup", self.warmup, least=1)
        check_whole("ABCache's interval", self.interval, least=1)
        check_choice("ABCache's mode", self.mode, ("lagrange", "literal", "recursive"))
        check_flag("ABCache's compute_last", self.compute_last)
        check_choice("ABCache's extrapolates", self.extrapolates, ("prediction", "sample"))
        check_choice("ABCache's abscissa", self.abscissa, ("auto", "step", "sigma", "lambda"))

    @classmethod
    def flux_dev(cls) -> ABCache:
        """FLUX.1-dev, 50 steps: k = 2, 13 of 50 steps computed, as a port of the authors' code has it."""
        return cls(order=2, warmup=5, interval=6, mode="literal")

    def sites(self, denoiser: nn.Module) -> list[Site]:
        """The denoiser's output."""
        return [CLEAN_SAMPLE if self.extrapolates == "sample" else OUTPUT]

    def is_skipped(self, step: int) -> bool:
        """Whether a step is skipped, counted from the first of the generation; whatever ``compute_last`` says."""
        return step >= self.warmup and step % self.interval != 0

    def plan(self, facts: Facts) -> Plan:
        """Compute the warm-up and every ``interval``-th step, counted from the first of the generation."""
        skip = [self.is_skipped(p - facts.first_step) for p in range(facts.num_steps)]
        if self.compute_last:
            skip[-1] = False
        plan = whole_steps(facts, skip, self.order - 1)
        if self.mode != "lagrange":
            return replace(
                plan, weights=lambda read, _: binomial_weights(len(read)), keep_forecasts=self.mode == "recursive"
            )
        places = abscissae(self.abscissa, facts.scheduler, facts.timesteps)
        return replace(plan, weights=lambda read, step: lagrange_weights([places[p] for p in read], places[step]))


def abscissae(kind: Abscissa, scheduler: Any, timesteps: Sequence[float]) -> list[float]:
    """Where the output of each step lies on the axis along which it is extrapolated.

    Raises:
        MethodError: the scheduler has no noise levels, or they are infinite or the same at two steps.
    """
    steps = [float(p) for p in range(len(timesteps))]
    wanted = _natural(scheduler) if kind == "auto" else kind
    if wanted == "step":
        return steps
    values = _places(wanted, scheduler, timesteps)
    if values is not None and bool(values.isfinite().all()):
        change = values.diff()
        if bool((change > 0).all()) or bool((change < 0).all()):
            return values.tolist()
    if kind == "auto":
        return steps
    raise MethodError(
        f"ABCache can't place outputs by {kind}: {type(scheduler).__name__} has no noise levels that are finite and of one "
        "direction over these steps; use abscissa='step'"
    )


def _natural(scheduler: Any) -> Literal["step", "sigma", "lambda"]:
    if is_flow(scheduler):
        return "sigma"
    return "lambda" if any(family in type(scheduler).__name__ for family in _LAMBDA_SCHEDULERS) else "step"


def _places(wanted: Abscissa, scheduler: Any, timesteps: Sequence[float]) -> torch.Tensor | None:
    """σ of every step, of flow matching as it is, otherwise relative to the signal; or λ = log(α / σ)."""
    try:
        alphas, sigmas = torch.tensor(noise_levels(scheduler, timesteps), dtype=torch.float64).unbind(1)
    except MethodError:
        return None
    if wanted == "lambda":
        return torch.log(alphas / sigmas)
    return sigmas if is_flow(scheduler) else sigmas / alphas
