"""EB-Cache's calibration: the threshold found for a given cost, the noise scale by the quality of images."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from sostenuto.calibrations.algorithm1 import Algorithm1, Algorithm1Options, NormMatch, Trace
from sostenuto.calibrations.base import Calibration, Settings, Tapped, macs_fraction, made_for, too_few
from sostenuto.distributed.world import on_main, spread, until, world
from sostenuto.engine import attach
from sostenuto.errors import InputError, MethodError
from sostenuto.files import publish_json
from sostenuto.measured import is_number, read_json
from sostenuto.methods import EBCache
from sostenuto.progress import progress
from sostenuto.step_state import StepActions, StepState
from sostenuto.table import CacheTable


@dataclass(frozen=True)
class EBCalibration(Algorithm1Options, Calibration):
    """EB-Cache's calibration; the options are those of Algorithm 1, see :class:`Algorithm1Options`."""

    method: ClassVar[str] = "eb"

    def run(self, settings: Settings) -> CacheTable:
        """Find κ for the cost, then b by the quality of images where a score is given."""
        return _calibrate(self, settings)


def _calibrate(options: EBCalibration, settings: Settings) -> CacheTable:
    target, scheduler = settings.target, settings.scheduler
    num_inference_steps, score, score_sample = settings.num_inference_steps, settings.score, settings.score_sample
    facts: dict[str, Any] = {}

    def run(kappa: float) -> CacheTable:
        with attach(target, Tapped((options.fill,)), scheduler=scheduler) as handle:

            def generation(call: int) -> Trace:
                algorithm = Algorithm1(handle, options, kappa)
                handle.driver, handle.driver_slots = algorithm, options.forecast_order + 1
                settings.generate(settings.generator_of(call))
                trace = algorithm.trace
                settings.check_steps(len(trace.states), trace.num_steps)
                return trace

            traces = until(settings.enough(lambda trace: trace.samples), generation)
            facts.update(sites=handle.sites, cost=traces[0].cost, **made_for(handle))
        states = _vote([trace.states for trace in traces], options.max_consecutive_reuse)
        table = CacheTable(
            actions=tuple(states),
            method=options.method,
            eps_scale=options.noise_scales(options.eps_scale, len(states)),
            forecast_order=options.forecast_order,
            fill=options.fill,
            include_cross=options.include_cross,
            model=facts["model"],
            scheduler=facts["scheduler"],
            calibration={
                "num_samples": sum(trace.samples for trace in traces),
                "seed": settings.seed,
                "kappa": kappa,
                "threshold": [kappa * d for d in options.delta],
                "norm": options.norm,
                "multiplier": options.eps_scale,
                "norms": traces[0].norms,
                "options": _plain(options),
            },
        )
        return replace(table, macs_fraction=macs_fraction(table, facts["sites"], facts["cost"]))

    def follow(states: Sequence[StepActions], call: int, wanted: Sequence[float] | None) -> NormMatch:
        with attach(target, Tapped((options.fill,)), scheduler=scheduler) as handle:
            matching = NormMatch(handle, options, states, wanted)
            handle.driver, handle.driver_slots = matching, options.forecast_order + 1
            settings.generate(settings.generator_of(call))
        return matching

    def matched(table: CacheTable) -> tuple[float, ...]:
        """The factors that restore the norms of each generation's uncached twin, a mean over generations."""
        steps = range(table.num_inference_steps)

        def generation(call: int) -> tuple[int, list[float]]:
            uncached = follow([StepState.COMPUTE] * len(steps), call, None)
            own = follow(table.actions, call, [uncached.norms[step] for step in steps])
            return own.trace.samples, [own.scales[step] for step in steps]

        found = until(settings.enough(lambda generation: generation[0]), generation)
        return tuple(map(fmean, zip(*(scales for _, scales in found), strict=True)))

    grid = options.eps_scale_grid if score is not None and options.eps_scale_rule == "search" else ()
    rounds = 1 if options.target_fraction is None else options.max_rounds
    with progress(rounds + len(grid), "calibrate", settings.show_progress) as bar:
        table = _bisect(lambda kappa: _kept(settings.kept, kappa, run), options, bar.update)
        if options.eps_scale_rule == "match_norm":
            return replace(table, eps_scale=matched(table))
        if score is None or not grid:
            return table

        def judged(scale: float) -> float:
            with attach(
                target, EBCache(table, options.noise_scales(scale, table.num_inference_steps)), scheduler=scheduler
            ):
                noise = settings.fresh_generator()
                images = (score_sample or settings.sample)(target, noise, num_inference_steps=num_inference_steps)
            bar.update()
            facts["images"] = len(images) if hasattr(images, "__len__") else None
            return score(images)

        scores = _scores(settings.kept, grid, judged, bar.update)
    if few := too_few(score, facts.get("images")):
        warnings.warn(f"the noise scale is chosen by a score of few images: {few}", stacklevel=4)
    judged_well = [scale for scale in grid if math.isfinite(scores[scale])]
    if not judged_well:
        raise MethodError(f"the score is not finite with any noise scale: {list(scores.values())}")
    best = min(judged_well, key=scores.__getitem__)
    return replace(
        table,
        eps_scale=options.noise_scales(best, table.num_inference_steps),
        calibration={
            **table.calibration,
            "multiplier": best,
            "scores": {f"{scale:g}": value if math.isfinite(value) else None for scale, value in scores.items()},
        },
    )


def _kept(folder: Path | None, kappa: float, run: Callable[[float], CacheTable]) -> CacheTable:
    """What a run with κ found, or had found when the search was interrupted."""
    if folder is None:
        return run(kappa)
    path = folder / f"kappa-{kappa!r}.json"
    found = on_main(lambda: CacheTable.load(path) if path.exists() else None)  # all run it, or none
    if found is None:
        found = run(kappa)
        if world().is_main:
            found.save(path)
    return found


def _scores(
    folder: Path | None, grid: Sequence[float], run: Callable[[float], float], done: Callable[[int], object]
) -> dict[float, float]:
    """The score with every value of b, or what it was when the search was interrupted."""
    paths = {} if folder is None else {scale: folder / f"b-{scale!r}.json" for scale in grid}
    known = on_main(lambda: {scale: _score(path) for scale, path in paths.items() if path.exists()})
    missing = [scale for scale in grid if scale not in known]
    done(len(known))

    def scored(scale: float) -> float:
        found = float(run(scale))
        if paths and math.isfinite(found):
            publish_json(paths[scale], found)
        return found

    fresh = dict(zip(missing, spread(scored, missing), strict=True))
    return {scale: known[scale] if scale in known else fresh[scale] for scale in grid}


def _score(path: Path) -> float:
    found = read_json(path, "score")
    if not is_number(found):
        raise InputError(f"{path} holds no score: delete it")
    return float(found)


_NEAR, _FAR = 0.01, 0.05  # of the multiply-accumulates


def _bisect(run: Callable[[float], CacheTable], options: Algorithm1Options, done: Callable[[], Any]) -> CacheTable:
    """The table whose κ brings its cost closest to the target; the cost falls as κ grows."""
    if options.target_fraction is None:
        table = run(1.0)
        done()
        return table
    target, low, high, kappa = options.target_fraction, 0.0, None, options.kappa_start
    tables: list[CacheTable] = []
    for _ in range(options.max_rounds):
        tables.append(run(kappa))
        done()
        excess = _fraction(tables[-1]) - target
        if abs(excess) < _NEAR:
            break
        low, high = (kappa, high) if excess > 0 else (low, kappa)
        kappa = 2 * kappa if high is None else (low + high) / 2

    def distance(table: CacheTable) -> tuple[bool, float]:
        excess = _fraction(table) - target
        return not options.allow_dearer and excess > _NEAR, abs(excess)

    best = min(tables, key=distance)
    if abs(_fraction(best) - target) > _FAR:
        warnings.warn(
            f"no threshold brings the cost to {target:g} of the multiply-accumulates, the nearest is {_fraction(best):.2f}: "
            "raise max_consecutive_reuse, allow more candidates, or take more steps",
            stacklevel=5,
        )
    return replace(best, calibration={**best.calibration, "rounds": len(tables)})


def _plain(options: Algorithm1Options) -> dict[str, Any]:
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
