"""Cache tables for a model and sampler of the user's own: the threshold found for a given cost, the noise scale by quality."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch

from sostenuto.algorithm1 import Algorithm1, EBCalibration, NormMatch, Trace
from sostenuto.anatomy import Site
from sostenuto.cost import Cost
from sostenuto.engine import Handle, enable
from sostenuto.errors import MethodError
from sostenuto.methods import EBCache, NoCache
from sostenuto.methods.base import Method
from sostenuto.plan import Action
from sostenuto.progress import progress
from sostenuto.table import CacheTable, StepActions, StepState, fingerprint

Sample = Callable[..., Any]
Score = Callable[[Any], float]


def calibrate(
    target: Any,
    method: str | type[Method] | EBCalibration,
    sample: Sample,
    *,
    num_inference_steps: int = 50,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
    score: Score | None = None,
    score_sample: Sample | None = None,
    scheduler: Any = None,
    show_progress: bool = False,
) -> CacheTable:
    """Make a cache table for a model and sampler, by EB-Cache's Algorithm 1 (arXiv 2503.07120).

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        method: ``"eb"``, or :class:`EBCalibration` with options of one's own.
        sample: runs one generation of the user's own kind, of any batch size: ``sample(pipe, generator,
            num_inference_steps=…)``.
        num_inference_steps: steps of the sampler that the table is for.
        num_samples: rows of the denoiser's batch to calibrate on, 8 suffice (FEB-Cache, arXiv 2503.07120v3). ``sample`` is
            called until there are so many; several calls vote, ties to less reuse.
        generator: source of the noise; every run starts from its seed.
        score: judges what ``score_sample`` returned, lower is better (such as a Fréchet distance). If given, b is chosen
            from the grid by it, on both sides of 1. Norms can't choose it: reuse lowers the norm of the prediction, and
            yet images may be best with b below 1.
        score_sample: as ``sample``, for scoring; by default ``sample``.
        scheduler: for a bare denoiser.
        show_progress: show a progress bar.

    Returns:
        The table, with the model, scheduler, thresholds and measured norms in it.

    Raises:
        MethodError: the method has no calibration, or an option makes no sense.
        AlreadyEnabledError: a method is enabled on the model.
    """
    options = method if isinstance(method, EBCalibration) else EBCalibration()
    if not isinstance(method, EBCalibration) and method not in ("eb", EBCache):
        raise MethodError(f"{method!r} has no calibration; 'eb' has")
    if num_inference_steps < 2 or num_samples < 1:
        raise MethodError(
            f"calibration needs 2 steps and 1 sample at least, not {num_inference_steps} and {num_samples}"
        )
    seed = generator.initial_seed() if generator else 0
    device = generator.device if generator else "cpu"
    facts: dict[str, Any] = {}

    def run(kappa: float) -> CacheTable:
        traces: list[Trace] = []
        noise = torch.Generator(device).manual_seed(seed)
        with enable(target, NoCache(), scheduler=scheduler) as handle:
            while sum(trace.samples for trace in traces) < num_samples:
                algorithm = Algorithm1(handle, options, kappa)
                handle.driver, handle.driver_slots = algorithm, options.forecast_order + 1
                sample(target, noise, num_inference_steps=num_inference_steps)
                trace = algorithm.trace
                # A second-order scheduler makes more denoiser calls than steps: what it lists is what counts.
                if len(trace.states) != trace.num_steps or trace.num_steps < num_inference_steps:
                    raise MethodError(
                        f"sample ran {len(trace.states)} steps instead of {max(trace.num_steps, num_inference_steps)}: it "
                        "must pass num_inference_steps on, and run one whole generation"
                    )
                traces.append(trace)
            facts.update(sites=handle.sites, cost=traces[0].cost, **_made_for(handle))
        states = _vote([trace.states for trace in traces], options.max_consecutive_reuse)
        table = CacheTable(
            actions=tuple(states),
            eps_scale=(options.eps_scale,) * len(states),
            forecast_order=options.forecast_order,
            model=facts["model"],
            scheduler=facts["scheduler"],
            calibration={
                "num_samples": sum(trace.samples for trace in traces),
                "seed": seed,
                "kappa": kappa,
                "threshold": [kappa * d for d in options.delta],
                "norm": options.norm,
                "norms": traces[0].norms,
                "options": _plain(options),
            },
        )
        return replace(table, macs_fraction=_macs_fraction(table, facts["sites"], facts["cost"]))

    def follow(states: Sequence[StepActions], wanted: Sequence[float] | None) -> NormMatch:
        with enable(target, NoCache(), scheduler=scheduler) as handle:
            matching = NormMatch(handle, options, states, wanted)
            handle.driver, handle.driver_slots = matching, options.forecast_order + 1
            sample(target, torch.Generator(device).manual_seed(seed), num_inference_steps=num_inference_steps)
        return matching

    grid = options.eps_scale_grid if score is not None and options.eps_scale_rule == "search" else ()
    rounds = 1 if options.target_fraction is None else _MAX_ROUNDS
    with progress(rounds + len(grid), "calibrate", show_progress) as bar:
        table = _bisect(run, options, bar.update)
        if options.eps_scale_rule == "match_norm":
            steps = range(table.num_inference_steps)
            uncached = follow([StepState.COMPUTE] * len(steps), None)
            matched = follow(table.actions, [fmean(uncached.norms[p]) for p in steps])
            return replace(table, eps_scale=tuple(fmean(matched.scales[p]) for p in steps))
        if score is None or not grid:
            return table
        scores: dict[float, float] = {}
        for scale in grid:
            with enable(target, EBCache(table, eps_scale=scale), scheduler=scheduler):
                noise = torch.Generator(device).manual_seed(seed)
                scores[scale] = score((score_sample or sample)(target, noise, num_inference_steps=num_inference_steps))
            bar.update()
    best = min(scores, key=scores.__getitem__)
    return replace(
        table,
        eps_scale=(best,) * table.num_inference_steps,
        calibration={**table.calibration, "scores": {f"{scale:g}": value for scale, value in scores.items()}},
    )


_MAX_ROUNDS = 8
_FAR = 0.05  # of the multiply-accumulates


def _bisect(run: Callable[[float], CacheTable], options: EBCalibration, done: Callable[[], Any]) -> CacheTable:
    """The table whose κ brings its cost closest to the target; the cost falls as κ grows."""
    if options.target_fraction is None:
        table = run(1.0)
        done()
        return table
    target, low, high, kappa = options.target_fraction, 0.0, None, options.kappa_start
    tables: list[CacheTable] = []
    for _ in range(_MAX_ROUNDS):
        tables.append(run(kappa))
        done()
        excess = _fraction(tables[-1]) - target
        if abs(excess) < 0.01:
            break
        low, high = (kappa, high) if excess > 0 else (low, kappa)
        kappa = 2 * kappa if high is None else (low + high) / 2
    best = min(tables, key=lambda table: abs(_fraction(table) - target))
    if abs(_fraction(best) - target) > _FAR:
        warnings.warn(
            f"no threshold brings the cost to {target:g} of the multiply-accumulates, the nearest is {_fraction(best):.2f}: "
            "raise max_consecutive_reuse, allow more candidates, or take more steps",
            stacklevel=3,
        )
    return best


def _plain(options: EBCalibration) -> dict[str, Any]:
    """The options as JSON data."""
    return {**asdict(options), "candidates": [state.value for state in options.candidates]}


def _fraction(table: CacheTable) -> float:
    assert table.macs_fraction is not None
    return table.macs_fraction


def _vote(runs: Sequence[Sequence[StepState]], bound: int | None) -> list[StepState]:
    """The majority at every step, ties to less reuse; a step that would break the bound on staleness computes."""
    states: list[StepState] = []
    idle: dict[str, int] = {}
    for votes in zip(*runs, strict=True):
        counts = Counter(votes)
        state = min(counts, key=lambda s: (-counts[s], len(s.groups), s.value))
        if bound is not None and any(idle.get(group, 0) >= bound for group in state.groups):
            state = StepState.COMPUTE
        idle = {group: idle.get(group, 0) + 1 for group in state.groups}
        states.append(state)
    return states


def _macs_fraction(table: CacheTable, sites: Sequence[Site], cost: Cost) -> float:
    """Multiply-accumulates of a generation with the table, of one without."""
    skipped = sum(
        macs
        for row in table.plan(sites).actions
        for macs, action in zip(cost.site_macs, row, strict=True)
        if action is not Action.COMPUTE
    )
    return 1 - skipped / (cost.macs * table.num_inference_steps)


def _made_for(handle: Handle) -> dict[str, dict[str, Any]]:
    """The identity of model and scheduler that goes into a table."""
    scheduler = handle._scheduler()
    denoiser = handle._denoiser
    config = getattr(scheduler, "config", {})
    return {
        "model": {
            "class": type(denoiser).__name__,
            "num_blocks": 1 + max(site.block for site in handle.sites),
            "fingerprint": fingerprint(denoiser),
        },
        "scheduler": {
            "class": type(scheduler).__name__,
            "prediction_type": config.get("prediction_type") if hasattr(config, "get") else None,
            "timesteps": [float(t) for t in scheduler.timesteps],
        },
    }
