"""``sostenuto.tune``: the best plan for a model, its sampler and a budget, with the frontier around it."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sostenuto import compat
from sostenuto.calibrations.base import Calibration, Sample, Score, Settings
from sostenuto.distributed.world import world
from sostenuto.engine import scheduler_of
from sostenuto.errors import InputError
from sostenuto.files import publish_json
from sostenuto.measured import fingerprint, read_json
from sostenuto.progress import progress
from sostenuto.sites import has_stack
from sostenuto.table import CacheTable
from sostenuto.tuning.advice import notes_on
from sostenuto.tuning.choice import Candidate, Chooser, Planned, Scale
from sostenuto.tuning.lab import Lab, Trial, shared
from sostenuto.tuning.measurement import Kind
from sostenuto.tuning.options import TuneOptions, check_speedup
from sostenuto.tuning.published import calibrated, calibrations, work_of
from sostenuto.tuning.result import Point, Tuned, answers, pareto
from sostenuto.tuning.search import (
    ANY_ORDER,
    FORECASTS,
    ErrorModel,
    Frontier,
    Schedule,
    cost_of,
    cost_of_table,
    table_of,
    uniform,
)
from sostenuto.tuning.weights import probe, probed_reuses, probed_steps

_TOO_FEW = 8  # samples, below which the errors of single steps are mostly chance
_WHOLES = (Kind.STACK, Kind.BRANCHES)
_INSTRUMENTED = 8.0  # what an instrumented generation costs, about, in uncached ones


def tune(
    target: Any,
    sample: Sample,
    *,
    num_inference_steps: int = 50,
    speedup: float = 2.0,
    num_samples: int = 16,
    generator: torch.Generator | None = None,
    score: Score | None = None,
    score_sample: Sample | None = None,
    folder: str | Path | None = None,
    scheduler: Any = None,
    show_progress: bool = False,
    options: TuneOptions | None = None,
) -> Tuned:
    """Find the plan, the forecasts and the noise scale that give the best quality within a cost, and those for other costs.

    Processes that are :func:`~sostenuto.distributed.joined` share the work, and find what one of them would.

    From one instrumented uncached run come, for every step, kind of reuse, lag and forecast, the error in the network's output;
    from a few disturbed ones, how much of it is left at the end. Dynamic programming finds the plans with the least error for
    every cost; real generations choose among them, move single reuses and decide the noise scale.

    Args:
        target: the pipeline, or its denoiser (then with ``scheduler``). Nothing may be enabled on it.
        sample: runs one generation of the user's own kind: ``sample(pipe, generator, num_inference_steps=…)``.
        num_inference_steps: steps of the sampler.
        speedup: the speed-up that is wanted, above 1.
        num_samples: rows of the denoiser's batch in the instrumented run.
        generator: source of the noise; its seed decides everything.
        score: judges what ``score_sample`` returned, lower is better (such as a Fréchet distance).
        score_sample: as ``sample``, for scoring; by default ``sample``.
        folder: where what was found is kept: the same call goes on where an interrupted one stopped, and tables and
            ``frontier.json`` are written there.
        scheduler: for a bare denoiser.
        show_progress: tell the cost at the start and show a progress bar.
        options: what else can be chosen.

    Returns:
        The method for the speed-up and the frontier. Where the speed-up is out of reach, the fastest there is, with a warning.

    Raises:
        InputError: a speed-up is not above 1, or the folder holds another tuning.
        MethodError: the sample doesn't run the steps asked for, or a bare denoiser comes without its scheduler.
        AlreadyEnabledError: a method is enabled on the model.
    """
    check_speedup(speedup)
    options = options or TuneOptions()
    settings = Settings(
        target, sample, num_inference_steps, num_samples, generator, score, score_sample, scheduler, show_progress
    )
    if num_samples < _TOO_FEW:
        warnings.warn(
            f"{num_samples} samples are few: the error of a single step is then mostly chance; give {_TOO_FEW} or more",
            stacklevel=2,
        )
    folder = None if folder is None else Path(folder)
    if folder is not None:
        _claim(folder, settings, options)
    with progress(None, "tune (uncached generations)", show_progress) as bar:
        done = [0.0]

        def spent(work: float) -> None:
            done[0] += work
            bar.update(int(done[0]) - int(done[0] - work))

        def expect(work: float) -> None:
            bar.total = round(work)

        found = _Tuner(Lab(settings, folder, options.trial_samples, spent), options, float(speedup), expect).run()
        expect(int(done[0]))  # an estimate is one: what is done is all there was to do
    if folder is not None and world().is_main:
        found.save(folder)
    return found


class _Tuner:
    """One tuning, stage by stage."""

    def __init__(self, lab: Lab, options: TuneOptions, speedup: float, expect: Callable[[float], object]) -> None:
        self.lab, self.options, self.speedup, self.expect = lab, options, speedup, expect
        self.scored = lab.settings.score is not None
        self.by_score = self.scored and options.prefer == "score"
        self.notes: list[str] = []
        self._frontiers: dict[tuple[tuple[Kind, ...], float, tuple[int, ...]], tuple[ErrorModel, Frontier]] = {}

    def run(self) -> Tuned:
        """Measure, search, try, and put together."""
        kinds = _kinds(self.lab.settings.target, self.options)
        self._check_work(kinds)
        self._tell(kinds, self.lab.trial(None))
        on_cpu = next(compat.find_denoiser(self.lab.settings.target).parameters()).device.type == "cpu"
        self.measured = self.lab.measure(kinds, undisturbed=self.options.budget == "time" and on_cpu)
        self.notes += notes_on(self.measured)
        self.costs = dict(self.measured.macs) if self.options.budget == "macs" else self.measured.times
        self.weights = probe(self.lab, self.measured)
        targets = self._targets()
        pivot = min(targets, key=lambda target: (abs(target - self.speedup), target))
        choose = self.choose = Chooser(self.lab, self.options, self.by_score, self._can_spend, self._table)
        groups = self._groups(pivot)
        best = choose.best(groups)
        best = choose.better(choose.refined(best), best)
        scale = choose.scale(best)
        points = [self._point(pivot, best, scale)]  # what was asked for comes before the work runs out
        planned = [candidate for group in groups for candidate in group if candidate.planned]
        way = best.planned or choose.nearest(planned)[0].planned
        assert way is not None
        others = sorted(set(targets) - {pivot}, key=lambda target: abs(target - pivot))
        plans: list[Candidate] = []
        for target in others:
            able = self._searched(target, way.tilt, way.model.orders) or self._searched(target, way.tilt)
            plans.append(choose.refined(choose.nearest(able)[0]))
        if self.scored and world().size > 1:
            self.lab.prepare("scored", [choose.scaled(plan.table, scale) for plan in plans])
        points += [self._point(target, plan, scale) for target, plan in zip(others, plans, strict=True)]
        frontier = pareto(points)
        found = answers(points, frontier)
        return Tuned(
            point=found[pivot],
            frontier=frontier,
            answers=found,
            budget=self.options.budget,
            uncached_score=self.lab.scored(None).score if self.scored else None,
            limit=self.limit,
            notes=tuple(self.notes),
            work=self.lab.work,
        )

    # --- what is possible ----------------------------------------------------------------------------------------

    def _targets(self) -> list[float]:
        """The speed-ups within reach, slow to fast."""
        self.limit = 1 / min(self._frontier(family, self.options.tilts[0])[1].least_cost for family in self._families)
        wanted = sorted({*map(float, self.options.speedups), self.speedup})
        beyond = [f"{target:g}" for target in wanted if target > self.limit and target != self.speedup]
        if beyond:
            self.notes.append(
                f"left out of the frontier: {', '.join(beyond)}, beyond the limit of {self.limit:.2f} times"
            )
        if self.speedup <= self.limit:
            return [target for target in wanted if target <= self.limit]
        self._warn(
            f"a speed-up of {self.speedup:g} is out of reach: in {self.measured.num_steps} steps this model can be made "
            f"{self.limit:.2f} times as fast by {self.options.budget} at most; the fastest point of the frontier is returned"
        )
        return [target for target in wanted if target <= self.limit] + [self.limit]

    @cached_property
    def _families(self) -> list[tuple[Kind, ...]]:
        """The kinds of reuse that a plan may be made of; the first of each family reuses all of a step."""
        partial = tuple(kind for kind in self.measured.runs if kind not in _WHOLES)
        wholes = [kind for kind in _WHOLES if kind in self.measured.runs]
        return [family for whole in wholes for family in {(whole,): 0, (whole, *partial): 0}]

    def _frontier(
        self, family: tuple[Kind, ...], tilt: float, orders: tuple[int, ...] = ANY_ORDER
    ) -> tuple[ErrorModel, Frontier]:
        key = family, tilt, orders
        if key not in self._frontiers:
            model = ErrorModel(self.measured, replace(self.weights, tilt=tilt), family, orders)
            self._frontiers[key] = model, Frontier(model, self.costs)
        return self._frontiers[key]

    # --- what is tried -------------------------------------------------------------------------------------------

    def _groups(self, target: float) -> list[list[Candidate]]:
        """What competes for a target, every way of making plans by itself, in the order in which they are heard."""
        early, late = self.options.tilts[:2], self.options.tilts[2:]
        groups = []
        for tilt in early:
            groups.append(self._searched(target, tilt))
            if self.by_score:
                # Errors of forecasts are larger where features are noisy, but they differ from run to run, while those of
                # last values all point back along the path: images may forgive the first sooner. Only a score can tell.
                groups.append(self._searched(target, tilt, FORECASTS))
        return [*groups, self._published(target), *(self._searched(target, tilt) for tilt in late)]

    def _searched(self, target: float, tilt: float, orders: tuple[int, ...] = ANY_ORDER) -> list[Candidate]:
        """The families' best plans for a target, and the uniform ones, which need no model to be tried."""
        found: dict[Schedule, Candidate] = {}
        fill = "" if orders == ANY_ORDER else f", order {orders[-1]}"
        for family in self._families:
            model, frontier = self._frontier(family, tilt, orders)
            plans = {
                "searched": frontier.schedule(1 / target),
                "interval": uniform(model, self.costs, 1 / target),
            }
            for name, plan in plans.items():
                if plan is not None:
                    found.setdefault(plan, Candidate(name + fill, self._table(plan), Planned(plan, model, tilt)))
        return list(found.values())

    def _published(self, target: float) -> list[Candidate]:
        """The plans of published calibrations within the cost."""
        measured, found = self.measured, []
        whole, share = measured.whole.value, 1 / target
        if self.options.budget == "time":
            # The share of the multiply-accumulates of a plan that takes this share of the time.
            relative = {name: cost / self.costs["compute"] for name, cost in self.costs.items()}
            share = 1 - (1 - share) * (1 - measured.macs[whole]) / max(1e-9, 1 - relative[whole])
        able: list[tuple[str, Calibration, float]] = []
        for name, calibration in calibrations(self.options.published, share, tuple(measured.runs)).items():
            work = work_of(calibration, measured.macs)
            if not self._can_spend(work + sum(before for *_, before in able)):
                break
            able.append((name, calibration, work))

        def make(one: tuple[str, Calibration, float]) -> CacheTable | None:
            folder = self.lab.folder
            return calibrated(
                one[1], self.lab.settings, None if folder is None else folder / f"published-{one[0]}-{target:g}x.json"
            )

        for (name, _, work), table in zip(able, shared(make, able), strict=True):
            self.lab.count(work, f"published {name} {target:g}")
            if table is not None and cost_of_table(table, self.costs) <= 1 / target + 1e-9:
                found.append(Candidate(name, table))
                other = int(not any(table.forecast_orders))  # forecasts in place of last values, or the other way round
                found.append(Candidate(f"{name}, order {other}", table.filled(other)))
        return found

    # --- tables --------------------------------------------------------------------------------------------------

    def _table(self, plan: Schedule) -> CacheTable:
        return replace(table_of(plan), **self.measured.made_for, macs_fraction=cost_of(plan, self.measured.macs))

    def _point(self, target: float, candidate: Candidate, scale: Scale) -> Point:
        table = self.choose.scaled(candidate.table, scale)
        scored = self.scored and self._can_spend(self._scoring_cost(candidate.share))
        trial = self.lab.scored(table) if scored else self.lab.trial(table)
        how = {
            "num_samples": self.measured.num_samples,
            "seed": self.lab.settings.seed,
            "budget": self.options.budget,
            "target": target,
            "plan": candidate.name,
            "noise_scale": scale,
            "error": trial.error,
            "score": trial.score,
        }
        return Point(
            target=target,
            speedup=1 / cost_of_table(table, self.costs),
            ideal_speedup=1 / candidate.share,
            time_speedup=1 / cost_of_table(table, self.measured.times),
            error=trial.error,
            score=trial.score,
            table=replace(table, method="tuned", calibration=how),
        )

    # --- what it costs -------------------------------------------------------------------------------------------

    def _scoring_cost(self, share: float) -> float:
        """Cost of scoring a plan that costs this share of an uncached generation."""
        return self.lab.scored(None).work * share

    def _can_spend(self, work: float) -> bool:
        """Whether so much more may be done; says so once where it may not."""
        if self.lab.work + work <= self.options.max_work:
            return True
        words = (
            f"the work of {self.options.max_work:.0f} uncached generations was used up: fewer changes and scores were tried "
            "than asked for; give fewer speedups, a smaller score_sample, or a larger max_work"
        )
        if words not in self.notes:
            self.notes.append(words)
        return False

    def _warn(self, words: str) -> None:
        self.notes.append(words)
        warnings.warn(words, stacklevel=5)

    def _least_work(self, kinds: tuple[Kind, ...]) -> float:
        """About what measuring costs."""
        settings = self.lab.settings
        probes = len(probed_reuses(kinds)) * len(probed_steps(settings.num_inference_steps))
        return settings.num_samples * (_INSTRUMENTED if len(kinds) > 1 else 1) + probes * max(
            1, settings.num_samples // 4
        )

    def _check_work(self, kinds: tuple[Kind, ...]) -> None:
        least = self._least_work(kinds) + self.options.trial_samples
        if least > self.options.max_work:
            raise InputError(
                f"measuring alone costs about {least:.0f} uncached generations of one row, more than max_work = "
                f"{self.options.max_work:.0f}: give fewer num_samples or trial_samples, or a larger max_work"
            )

    def _tell(self, kinds: tuple[Kind, ...], uncached: Trial) -> None:
        """Say what is to come, where progress is shown."""
        settings, options = self.lab.settings, self.options
        if not settings.show_progress:
            return
        shares = [1 / target for target in {*options.speedups, self.speedup}]
        work = self._least_work(kinds)
        tried = 6 + options.refinements
        work += options.trial_samples * (1 + sum(shares) * tried + 6 * len(options.tilts) / self.speedup)
        work += sum(work_of(one, {}) for one in calibrations(options.published, 1 / self.speedup, kinds).values())
        if self.scored:
            rows = self.lab.scored(None).work
            work += rows * (1 + sum(shares) + 14 / self.speedup * self.by_score)
        if not world().is_main:
            return
        work = min(work, options.max_work)
        self.expect(work)
        minutes = work * uncached.seconds / 60
        print(
            f"tune: about {work:.0f} uncached generations of one row, {minutes:.0f} minutes on this machine",
            file=sys.stderr,
        )


def _kinds(target: Any, options: TuneOptions) -> tuple[Kind, ...]:
    able = [kind for kind in Kind if kind is not Kind.STACK or has_stack(compat.find_denoiser(target))]
    if options.kinds is None:
        return tuple(able)
    kinds = tuple(kind for kind in able if kind.value in options.kinds)
    if not set(_WHOLES) & set(kinds):
        raise InputError("the blocks of this network can't be kept as one stack: let kinds hold 'branches'")
    return kinds


def _claim(folder: Path, settings: Settings, options: TuneOptions) -> None:
    """Make the folder this tuning's, or refuse one that holds what was found for something else."""
    denoiser = compat.unwrapped(compat.find_denoiser(settings.target))
    sampler = scheduler_of(settings.target, settings.scheduler)
    folder.mkdir(parents=True, exist_ok=True)
    weights = sum(float(parameter.detach().double().abs().sum()) for parameter in denoiser.parameters())
    # What begins with an underscore is diffusers' own bookkeeping, in an order that changes from process to process.
    chosen = {key: value for key, value in dict(getattr(sampler, "config", {})).items() if not key.startswith("_")}
    config = json.dumps(chosen, sort_keys=True, default=str)
    made_with = {
        "model": fingerprint(denoiser),
        "weights": f"{weights:.8e}",
        "scheduler": f"{type(sampler).__name__} {hashlib.sha256(config.encode()).hexdigest()[:12]}",
        "num_inference_steps": settings.num_inference_steps,
        "num_samples": settings.num_samples,
        "seed": settings.seed,
        "trial_samples": options.trial_samples,
        "kinds": None if options.kinds is None else sorted(options.kinds),
    }
    path = folder / "run.json"
    if path.exists():
        known = read_json(path, "record of a tuning")
        if not isinstance(known, dict):
            raise InputError(f"{path} is no record of a tuning: use another folder")
        odd = next((key for key in made_with if known.get(key) != made_with[key]), None)
        if odd is not None:
            raise InputError(
                f"{folder} holds a tuning with another {odd} ({known.get(odd)}, now {made_with[odd]}): use another folder"
            )
    publish_json(path, made_with, indent=1)
