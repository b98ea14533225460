"""EB-Cache's Algorithm 1 (arXiv 2503.07120): its options, and one run of it over the steps of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sostenuto.attention_tap import ConditionalHalf, is_guided, usual_half
from sostenuto.clock import Tick, normalized_times
from sostenuto.correct import check_noise_scale
from sostenuto.cost import Cost
from sostenuto.engine import Handle
from sostenuto.errors import MethodError
from sostenuto.forecast import check_forecast_order
from sostenuto.methods.checks import check_choice, check_flag, check_number, check_whole, is_number
from sostenuto.plan import Op
from sostenuto.probe import Prober
from sostenuto.step_state import StepActions, StepState
from sostenuto.table import FILLS, Fill, check_include_cross

CANDIDATES = (StepState.REUSE_BOTH, StepState.REUSE_ATTENTION)  # deepest reuse first


@dataclass(frozen=True)
class Algorithm1Options:
    """The choices that EB-Cache (arXiv 2503.07120, Algorithm 1) leaves open. The defaults are those that worked.

    Attributes:
        delta: intercept and slope of the threshold δ(τ) = intercept + slope · τ, with τ = 1 at the noisiest step.
        target_fraction: scale δ by a factor κ, found by bisection, such that a generation costs this share of the uncached
            multiply-accumulates; ``None`` takes δ as it is.
        norm: ``"rms"`` (of the noise channels of each sample), ``"mean_abs"``, or ``"raw"``, the Euclidean norm.
        criterion: ``"vector_gap"``, the norm of the difference between the cached and the uncached prediction, or
            ``"norm_gap"``, the paper's difference of the norms of ε with the cached one scaled by b. The second does not see
            a stale direction: taken alone it lets attention grow stale until images collapse.
        max_consecutive_reuse: most steps in a row for which a branch may be reused; ``None``: no bound.
        aggregation: ``"batch_mean"`` thresholds the mean over the samples, ``"vote"`` takes the deepest reuse
            that more than half of the samples accept by their own gaps; the calls of a step vote, ties to less reuse.
        advance: which prediction the calibration's trajectory follows: that of the ``"selected"`` state, or ``"no_cache"``.
        forecast_order: how reused branches are filled, while calibrating and afterwards: 0 last value, 1 linear.
        fill: what is kept for the steps that reuse everything: ``"branches"``, as in the paper, the whole ``"stack"`` as one
            tensor, which makes these steps nearly free, or the clean ``"sample"``; see :class:`~sostenuto.table.CacheTable`.
        include_cross: whether cross-attention is reused with attention, or else computed at every step; kept in the table.
        candidates: the states that are tried at a step, deepest reuse first; EB-Cache's two by default.
        last_computed: how many of the last steps are always computed; the paper: 1.
        kappa_start: where the bisection of κ begins.
        max_rounds: most values of κ that are tried; the cost changes in leaps, so that none may bring it within a hundredth.
        allow_dearer: whether the nearest may cost more than ``target_fraction``; else it is the nearest of those that don't,
            where there are any.
        eps_scale: b during calibration, and the result where nothing else decides it.
        eps_scale_rule: ``"search"`` chooses one b from the grid by the quality of images, where a ``score`` is given;
            ``"match_norm"`` gives every step the factor that restores the norm of the uncached sampler's prediction, of passes
            in separate calls that of the first one;
            ``"fixed"`` keeps ``eps_scale``.
        eps_scale_grid: the values of b that are tried when a ``score`` is given.
        guidance_scale: s of classifier-free guidance, where both passes are in one batch: what is compared is then each image's
            guided prediction ``u + s·(c − u)``. ``None``: every row of the batch by itself, and of passes in separate calls
            the first one.
        conditional_half: where the conditional pass c lies in such a batch, ``"first"`` or ``"second"``; by default where
            diffusers' pipelines for such a network put it.
    """

    delta: tuple[float, float] = (0.05, 0.15)
    target_fraction: float | None = 0.6
    norm: Literal["rms", "mean_abs", "raw"] = "rms"
    criterion: Literal["vector_gap", "norm_gap"] = "vector_gap"
    max_consecutive_reuse: int | None = 3
    aggregation: Literal["batch_mean", "vote"] = "batch_mean"
    advance: Literal["selected", "no_cache"] = "selected"
    forecast_order: int = 1
    fill: Fill = "branches"
    include_cross: bool = field(default=True, kw_only=True)
    candidates: tuple[StepState, ...] = CANDIDATES
    last_computed: int = 1
    kappa_start: float = 1.0
    eps_scale: float = 1.0
    eps_scale_rule: Literal["search", "match_norm", "fixed"] = "search"
    eps_scale_grid: tuple[float, ...] = (0.97, 0.98, 0.99, 1.0, 1.01)
    max_rounds: int = field(default=8, kw_only=True)
    allow_dearer: bool = field(default=True, kw_only=True)
    guidance_scale: float | None = field(default=None, kw_only=True)
    conditional_half: ConditionalHalf | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.target_fraction is not None:
            check_number("target_fraction", self.target_fraction, above=0, most=1)
        if not (isinstance(self.delta, tuple) and len(self.delta) == 2 and all(map(is_number, self.delta))):
            raise MethodError(f"delta must be (intercept, slope), not {self.delta!r}")
        check_number("kappa_start", self.kappa_start, above=0)
        check_whole("max_rounds", self.max_rounds, least=1)
        check_flag("allow_dearer", self.allow_dearer)
        if self.max_consecutive_reuse is not None:
            check_whole("max_consecutive_reuse", self.max_consecutive_reuse, least=1)
        check_whole("last_computed", self.last_computed, least=1)
        known_states = all(isinstance(state, StepState) and state.groups for state in self.candidates)
        if not self.candidates or not known_states:
            raise MethodError(
                f"candidates must be states of reuse (StepState.REUSE_…), one at least, not {self.candidates!r}"
            )
        check_forecast_order(self.forecast_order)
        if not is_number(self.eps_scale):
            raise MethodError(f"eps_scale must be one number, not {self.eps_scale!r}")
        check_noise_scale(self.eps_scale)
        check_noise_scale(self.eps_scale_grid)
        for name, known in (
            ("norm", ("rms", "mean_abs", "raw")),
            ("criterion", ("vector_gap", "norm_gap")),
            ("fill", FILLS),
            ("aggregation", ("batch_mean", "vote")),
            ("advance", ("selected", "no_cache")),
            ("eps_scale_rule", ("search", "match_norm", "fixed")),
        ):
            check_choice(name, getattr(self, name), known)
        check_include_cross(self.include_cross, self.fill)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, least=0)
        if self.conditional_half is not None:
            check_choice("conditional_half", self.conditional_half, ("first", "second"))

    def candidates_at(self, tau: float) -> tuple[StepState, ...]:
        """The states that are tried at normalised time τ, deepest reuse first."""
        return self.candidates

    def curve_at(self, tau: float) -> float:
        """The shape of b over τ, which ``eps_scale`` and every value of the grid multiply; EB-Cache's b is constant."""
        return 1.0

    def noise_scale_at(self, tau: float) -> float:
        """b at normalised time τ while calibrating."""
        return self.eps_scale * self.curve_at(tau)

    def noise_scales(self, multiplier: float, num_steps: int) -> tuple[float, ...]:
        """b at every step for one value of the grid."""
        return tuple(multiplier * self.curve_at(tau) for tau in normalized_times(num_steps))


@dataclass
class Trace:
    """What one pass of Algorithm 1 found."""

    states: list[StepState]
    norms: list[dict[str, float]]
    samples: int = 0
    num_steps: int = 0
    cost: Cost | None = None


class Algorithm1:
    """One run over the steps: evaluate the candidates at every denoiser call, choose, advance with the choice."""

    def __init__(self, handle: Handle, options: Algorithm1Options, kappa: float) -> None:
        self.handle, self.options, self.kappa = handle, options, kappa
        self.history: dict[tuple[int, int], list[int]] = {}  # (pass, site) → computed steps, newest first
        self.idle: dict[str, int] = {}  # branch group → steps in a row for which it was reused
        self.trace = Trace([], [])

    def __call__(self, tick: Tick, prober: Prober) -> Any:
        """Carry out one denoiser call of the calibration; what it returns goes on to the sampler."""
        self.trace.samples, self.trace.num_steps = prober.batch_size, tick.num_steps
        if tick.pass_index == 0:
            state, output = self._choose(tick, prober)
            self.trace.states.append(state)
        else:  # the passes of a step share its state
            state = self.trace.states[-1]
            output = self._run(tick, prober, state)
        return prober.scaled(output, self._scale(tick, output, prober))

    def _scale(self, tick: Tick, output: Any, prober: Prober) -> float:
        """The factor of the predicted noise that the trajectory advances with."""
        return self.options.noise_scale_at(tick.tau)

    def _choose(self, tick: Tick, prober: Prober) -> tuple[StepState, Any]:
        options, last = self.options, tick.num_steps - self.options.last_computed
        if prober.state.begins or tick.step >= last:
            self.trace.norms.append({})
            self.trace.cost = self.trace.cost or prober.cost()
            return StepState.COMPUTE, self._run(tick, prober, StepState.COMPUTE)
        fresh = self._run(tick, prober, StepState.COMPUTE, keep=False)
        threshold = self.kappa * (options.delta[0] + options.delta[1] * tick.tau)
        measured: dict[str, float] = {}
        chosen = StepState.COMPUTE
        for candidate in options.candidates_at(tick.tau):
            if not self._may(candidate):
                continue
            gaps = self._gap(tick, fresh, self._run(tick, prober, candidate, keep=False), prober)
            if options.aggregation == "batch_mean":
                measured[candidate.value] = abs(gaps.mean().item())
                accepted = measured[candidate.value] < threshold
            else:
                measured[candidate.value] = gaps.abs().mean().item()
                accepted = (gaps.abs() < threshold).float().mean().item() > 0.5
            if accepted:
                chosen = candidate
                break
        self.trace.norms.append(measured)
        output = self._run(tick, prober, chosen)
        if options.advance == "no_cache":
            output = fresh
        return chosen, output

    def _may(self, state: StepState) -> bool:
        bound = self.options.max_consecutive_reuse
        if bound is None:
            return True
        return not any(self.idle.get(group, 0) >= bound for group in state.groups)

    def _run(self, tick: Tick, prober: Prober, state: StepState, keep: bool = True) -> Any:
        """The denoiser's output in one state; with ``keep`` the features of computed branches are stored."""
        if prober.state.begins:
            self.history = {key: steps for key, steps in self.history.items() if key[0] != tick.pass_index}
            state = StepState.COMPUTE
        sites = self.handle.sites
        depth = self.options.forecast_order + 1
        whole = self.options.fill != "branches" and state is StepState.REUSE_BOTH
        ops, histories = [], []
        for index, site in enumerate(sites):
            computed = self.history.get((tick.pass_index, index), [])
            if whole and not site.kind.is_whole:
                histories.append(())
                ops.append(Op.SKIP)
            elif whole or (not site.kind.is_whole and state.skips(site, self.options.include_cross)):
                histories.append(tuple(computed[:depth]))
                ops.append(Op.REUSE if len(histories[-1]) == 1 else Op.FORECAST)
            else:
                histories.append(())
                ops.append(Op.STORE if keep else Op.COMPUTE)
        output = prober.run(ops, histories)
        if keep:
            self._account(tick, state, ops)
        return output

    def _account(self, tick: Tick, state: StepState, ops: Sequence[Op]) -> None:
        for index, op in enumerate(ops):
            if op is Op.STORE:
                self.history.setdefault((tick.pass_index, index), []).insert(0, tick.step)
        if tick.pass_index == 0:
            self.idle = {group: self.idle.get(group, 0) + 1 for group in state.groups}

    def _gap(self, tick: Tick, fresh: Any, cached: Any, prober: Prober) -> torch.Tensor:
        """How far each sample's cached prediction is from the fresh one ``[batch]``; a difference of norms has its sign."""
        norm = self.options.norm
        if self.options.criterion == "vector_gap":
            difference = prober.prediction(fresh).float() - prober.prediction(cached).float()
            return _norm(self._guided(difference, prober), norm)
        scale = self.options.noise_scale_at(tick.tau)
        one, other = (self._guided(prober.noise(output).float(), prober) for output in (fresh, cached))
        return _norm(one, norm) - _norm(scale * other, norm)

    def _guided(self, rows: torch.Tensor, prober: Prober) -> torch.Tensor:
        """What guidance makes of the rows of a batch ``[rows, …]``, where its scale is known and both passes are in it."""
        scale = self.options.guidance_scale
        if scale is None or not is_guided(prober.call.latents):
            return rows
        half = self.options.conditional_half or usual_half(self.handle._denoiser)
        conditional, other = rows.chunk(2) if half == "first" else reversed(rows.chunk(2))
        return other + scale * (conditional - other)


class NormMatch(Algorithm1):
    """Follows given states; the factor of every step restores a wanted norm, measured on the way where none is given."""

    def __init__(
        self, handle: Handle, options: Algorithm1Options, states: Sequence[StepActions], wanted: Sequence[float] | None
    ) -> None:
        super().__init__(handle, options, 0.0)
        self.states, self.wanted = states, wanted
        self.norms: dict[int, float] = {}
        self.scales: dict[int, float] = {}

    def _choose(self, tick: Tick, prober: Prober) -> tuple[StepState, Any]:
        state = self.states[tick.step]
        assert isinstance(state, StepState)
        return state, self._run(tick, prober, state)

    def _scale(self, tick: Tick, output: Any, prober: Prober) -> float:
        if tick.pass_index == 0:  # the passes of a step share its factor: guidance would amplify a difference
            norm = _norm(self._guided(prober.noise(output).float(), prober), self.options.norm).mean().item()
            self.norms[tick.step] = norm
            self.scales[tick.step] = 1.0 if self.wanted is None else self.wanted[tick.step] / norm
        return self.scales[tick.step]


def _norm(values: torch.Tensor, norm: str) -> torch.Tensor:
    values = values.flatten(1)
    if norm == "raw":
        return values.norm(dim=1)
    return values.square().mean(1).sqrt() if norm == "rms" else values.abs().mean(1)
