"""``sostenuto.tune``: the best plan for a model, its sampler and a budget, with the frontier around it."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sostenuto import compat
from sostenuto.calibrations.base import Calibration, Sample, Score, Settings, too_few
from sostenuto.distributed.world import gather, world
from sostenuto.errors import InputError
from sostenuto.methods import ABCache
from sostenuto.plan import Op
from sostenuto.progress import progress
from sostenuto.sites import has_stack, inspect
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.tuning.advice import notes_on
from sostenuto.tuning.choice import CLOSEST, MOST_SCORED, SCALES, Candidate, Chooser, Planned, Scale
from sostenuto.tuning.instrument import ops_of
from sostenuto.tuning.lab import CLOSER, Lab, Trial, shared
from sostenuto.tuning.measurement import WHOLES, Kind, instrumented_share, reaches
from sostenuto.tuning.options import TuneOptions, check_speedup
from sostenuto.tuning.published import calibrated, calibrations, work_of
from sostenuto.tuning.record import claim, rehearsed, setting
from sostenuto.tuning.rehearsal import Rehearsal
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
from sostenuto.tuning.weights import probe, probed

_SAMPLED = 3  # intervals that are tried for the clean sample
_TOO_FEW = 8  # samples, below which the errors of single steps are mostly chance


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
        InputError: a speed-up is not above 1, ``max_work`` is less than tuning needs at least, or the folder holds a tuning of
            another setting.
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
        claim(folder, setting(settings, options), timed=options.budget == "time")
    with progress(None, "tune (uncached generations)", show_progress) as bar:
        done = [0.0]

        def spent(work: float) -> None:
            done[0] += work
            bar.update(int(done[0]) - int(done[0] - work))

        def expect(work: float) -> None:
            bar.total = round(work)

        lab = Lab(settings, folder, options.trial_samples, spent, options.max_work)
        found = _Tuner(lab, options, float(speedup), expect).run()
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
        self._frontiers: dict[Any, tuple[ErrorModel, Frontier]] = {}

    def run(self) -> Tuned:
        """Measure, search, try, and put together."""
        lab = self.lab
        kinds = _kinds(lab.settings.target, self.options)
        self._check_work(kinds)  # what is too much whatever the samples are is refused before anything runs
        lab.rehearse([kind for kind in kinds if kind is not Kind.SAMPLE])
        kinds = _told(kinds, lab.rehearsals["paired"])
        if lab.folder is not None:
            samples = lab.rehearsals["paired"], lab.rehearsals.get("scored")
            claim(lab.folder, rehearsed(lab.settings, *samples), begun=True)
        self._check_work(kinds)
        self._tell(kinds, lab.trial(None))
        if self.scored and (few := too_few(lab.settings.score, lab.rehearsals["scored"].num_results)):
            self._warn(few)
        # Before the expensive part: a score that can't judge the model's own images ends here.
        uncached_score = lab.scored(None).score if self.scored else None
        self.measured = lab.measure(kinds, undisturbed=self.options.budget == "time" and self._on_cpu)
        here = gather(lab.settings.machine)
        if self.options.budget == "time" and self.measured.machine not in ("", here[0]):
            raise InputError(
                f"{lab.folder} holds times of another machine ({self.measured.machine}, this is {here[0]}): use another "
                'folder, machines of one kind, or budget="macs"'
            )
        self.notes += notes_on(self.measured, lab.rehearsals["paired"].clean_samples)
        self.costs = dict(self.measured.macs) if self.options.budget == "macs" else self.measured.times
        self.weights = probe(lab, self.measured)
        targets = self._targets()
        pivot = min(targets, key=lambda target: (abs(target - self.speedup), target))
        others = sorted(set(targets) - {pivot}, key=lambda target: abs(target - pivot))
        answer, later = self._reserves(pivot, others)
        others_share = 2 * sum(later)
        lab.reserve = answer + others_share
        choose = self.choose = Chooser(lab, self.options, self.by_score, self._table)
        groups = self._groups(pivot)
        best = choose.best(groups)
        best = choose.better(choose.refined(best), best)
        if self.by_score:
            lab.scored(best.table)  # from here on there is an answer, whatever noise scale is chosen
            lab.reserve = others_share
        scale = choose.scale(best)
        lab.reserve = others_share
        points = [self._point(pivot, best, scale)]  # what was asked for comes before the work runs out
        planned = [candidate for group in groups for candidate in group if candidate.planned]
        way = best.planned or choose.nearest(planned)[0].planned
        assert way is not None
        plans: list[tuple[float, Candidate]] = []
        for target, trial in zip(others, later, strict=True):
            lab.reserve -= trial
            able = self._searched(target, way.tilt, way.model.orders) or self._searched(target, way.tilt)
            plans += [(target, choose.refined(nearest)) for nearest in choose.nearest(able)[:1]]
        if self.scored and world().size > 1:
            tables = [choose.scaled(plan.table, scale) for _, plan in plans]
            lab.prepare("scored", list(itertools.compress(tables, lab.affordable("scored", tables))))
        for target, plan in plans:
            lab.reserve -= later[others.index(target)]
            points.append(self._point(target, plan, scale) or self._point(target, plan, 1.0))  # which was tried
        if lab.was_short:
            self.notes.append(
                f"the work of {self.options.max_work:.0f} uncached generations was used up: fewer changes, scores and targets "
                "were tried than asked for; give fewer speedups, a smaller score_sample, or a larger max_work"
            )
        made = [point for point in points if point is not None]
        frontier = pareto(made)
        found = answers(made, frontier)
        return Tuned(
            point=found[pivot],
            frontier=frontier,
            answers=found,
            budget=self.options.budget,
            uncached_score=uncached_score,
            limit=self.limit,
            notes=tuple(self.notes),
            work=lab.work,
            asked=self.speedup,
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
        """The kinds of reuse that a plan may be made of; the first of each family reuses all of a step.

        Where the stack is kept as one, branches one by one are off as far and cost more.
        """
        partial = tuple(kind for kind in self.measured.runs if kind not in WHOLES)
        wholes = [kind for kind in WHOLES if kind in self.measured.runs]
        if Kind.STACK in wholes:
            wholes = [kind for kind in wholes if kind is not Kind.BRANCHES]
        return [family for whole in wholes for family in {(whole,): 0, (whole, *partial): 0}]

    def _frontier(
        self,
        family: tuple[Kind, ...],
        tilt: float,
        orders: tuple[int, ...] = ANY_ORDER,
        longest: int | None = None,
    ) -> tuple[ErrorModel, Frontier]:
        key = family, tilt, orders, longest
        if key not in self._frontiers:
            model = ErrorModel(self.measured, replace(self.weights, tilt=tilt), family, orders, longest)
            self._frontiers[key] = model, Frontier(model, self.costs)
        return self._frontiers[key]

    # --- what is tried -------------------------------------------------------------------------------------------

    def _groups(self, target: float) -> list[list[Candidate]]:
        """What competes for a target, every way of making plans by itself, in the order in which they are heard."""
        early, late = self.options.tilts[:2], self.options.tilts[2:]
        searched = [self._searched(target, tilt) for tilt in early]
        # Errors of forecasts are larger where features are noisy, but they differ from run to run, while those of last values
        # all point back along the path: images may forgive the first sooner. And of what long runs of reuse do the model
        # knows least. Only real generations can tell.
        even, free = ([self._searched(target, tilt, FORECASTS, is_even) for tilt in early] for is_even in (True, False))
        turns = itertools.chain.from_iterable(zip(even, searched, strict=True))
        sampled = [[plan] for plan in self._sampled(target)]
        return [*turns, self._published(target), *sampled, *free, *(self._searched(target, tilt) for tilt in late)]

    def _sampled(self, target: float) -> list[Candidate]:
        """The plans of AB-Cache of the clean sample.

        Each is heard by itself, those that cost less than asked too: with an ancestral sampler long runs of it are farther from
        the uncached images, and no worse.
        """
        if Kind.SAMPLE not in self.measured.runs:
            return []
        steps, found = self.measured.num_steps, []
        for interval in range(2, steps):
            method = ABCache(2, warmup=2, interval=interval)
            states = [StepState.REUSE_BOTH if method.is_skipped(step) else StepState.COMPUTE for step in range(steps)]
            table = CacheTable(tuple(states), method="tuned", forecast_order=1, fill="sample")
            table = replace(table, **self.measured.made_for, macs_fraction=self._cost(table, self.measured.macs))
            if self._cost(table, self.costs) <= 1 / target + 1e-9:
                found.append(Candidate(f"sample every {interval}", table))
        return found[:_SAMPLED]

    def _even_run(self, target: float, whole_kind: Kind) -> int:
        """One more than the steps in a row that a plan reuses which gets to a target by runs of one length."""
        whole = self.costs[whole_kind.value] / self.costs["compute"]
        computed = max(1 / self.measured.num_steps, (1 / target - whole) / (1 - whole))
        return math.ceil((1 - computed) / computed) + 1

    def _searched(
        self, target: float, tilt: float, orders: tuple[int, ...] = ANY_ORDER, is_even: bool = False
    ) -> list[Candidate]:
        """The families' best plans for a target, and the uniform ones, which need no model to be tried.

        Args:
            target: the speed-up.
            tilt: of the weights.
            orders: degrees of the forecasts that may be used.
            is_even: whether runs of reuse are as short as the target allows.
        """
        found: dict[Schedule, Candidate] = {}

        def keeps_budget(plan: Schedule) -> bool:
            return cost_of(plan, self.costs) <= 1 / target + 1e-9

        fill = "" if orders == ANY_ORDER else f", order {orders[-1]}"
        for family in self._families:
            longest = self._even_run(target, family[0]) if is_even else None
            runs = "" if longest is None else f", runs up to {longest}"
            model, frontier = self._frontier(family, tilt, orders, longest)
            plans = {
                "searched": frontier.schedule(1 / target),
                "interval": uniform(model, self.costs, 1 / target),
            }
            for name, plan in plans.items():
                if plan is not None:
                    planned = Planned(plan, model, tilt, keeps_budget)
                    found.setdefault(plan, Candidate(name + fill + runs, self._table(plan), planned))
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
            work = work_of(calibration, measured.macs, self.lab.rows)
            if not self.lab.can_spend(work + sum(before for *_, before in able)):
                break
            able.append((name, calibration, work))
        made_for = f"{target:g}x.json" if self.options.budget == "macs" else f"{target:g}x-time.json"

        def make(one: tuple[str, Calibration, float]) -> CacheTable | None:
            folder = self.lab.folder
            return calibrated(
                one[1], self.lab.settings, None if folder is None else folder / f"published-{one[0]}-{made_for}"
            )

        for (name, calibration, _), table in zip(able, shared(make, able), strict=True):
            self.lab.count(work_of(calibration, measured.macs, self.lab.rows, table), f"published {name} {target:g}")
            if table is not None:
                other = int(not any(table.forecast_orders))  # forecasts in place of last values, or the other way round
                found += [Candidate(name, table), Candidate(f"{name}, order {other}", table.filled(other))]
        return [one for one in found if self._cost(one.table, self.costs) <= 1 / target + 1e-9]

    # --- tables --------------------------------------------------------------------------------------------------

    def _table(self, plan: Schedule) -> CacheTable:
        return replace(table_of(plan), **self.measured.made_for, macs_fraction=cost_of(plan, self.measured.macs))

    def _cost(self, table: CacheTable, costs: Mapping[str, float]) -> float:
        return cost_of_table(table, costs, self.measured.sites)

    def _point(self, target: float, candidate: Candidate, scale: Scale) -> Point | None:
        """The plan with its noise scale, and what a real generation shows; ``None`` where the work doesn't suffice for one."""
        table, lab = self.choose.scaled(candidate.table, scale), self.lab
        benches = ["scored", "paired"] if self.scored else ["paired"]
        bench = next((bench for bench in benches if all(lab.affordable(bench, [table]))), None)
        if bench is None:
            return None
        run = lab.scored if bench == "scored" else lab.trial
        trial, uncached = run(table), run(None)
        comparable = trial.machine == uncached.machine and not (self._on_cpu and world().size > 1)
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
            speedup=1 / self._cost(table, self.costs),
            ideal_speedup=1 / candidate.share,
            time_speedup=1 / self._cost(table, self.measured.times),
            error=trial.error,
            score=trial.score,
            table=replace(table, method="tuned", calibration=how),
            measured_speedup=uncached.seconds / trial.seconds if comparable else None,
        )

    # --- what it costs -------------------------------------------------------------------------------------------

    @cached_property
    def _on_cpu(self) -> bool:
        denoiser = compat.find_denoiser(self.lab.settings.target)
        return compat.execution_device(denoiser).type == "cpu"

    def _warn(self, words: str) -> None:
        self.notes.append(words)
        warnings.warn(words, stacklevel=5)

    def _measuring(self, kinds: tuple[Kind, ...]) -> float:
        """What the measurements cost; before the rehearsal the least of it."""
        lab, settings = self.lab, self.lab.settings
        rehearsal = lab.rehearsals.get("paired")
        steps = settings.num_inference_steps if rehearsal is None else rehearsal.num_steps
        macs = dict.fromkeys((kind.value for kind in kinds), 0.0) if rehearsal is None else rehearsal.macs
        instrumented = lab.rows(settings.num_samples) * instrumented_share(reaches(kinds, steps), macs, steps)
        return instrumented + lab.rows(lab.num_probed) * (1 + len(probed(kinds, steps)))

    def _reserves(self, pivot: float, others: Sequence[float]) -> tuple[float, list[float]]:
        """What the answer needs at most, a plan that is tried and the result; and what a trial for each other target may cost.

        All others together are left a quarter of the rest.
        """
        lab = self.lab
        most = min(1.0, 1.05 / pivot) if self.options.budget == "macs" else 1.0
        answer = most * (lab.size("paired") + lab.size("scored" if self.scored else "paired"))
        later = [lab.size("paired") / target for target in others]
        part = min(1.0, (lab.max_work - lab.work - answer) / 4 / max(1e-9, 2 * sum(later)))
        return answer, [part * trial for trial in later]

    def _check_work(self, kinds: tuple[Kind, ...]) -> None:
        lab = self.lab
        measuring, tried = self._measuring(kinds), 2 * lab.size("paired")
        judged = 2 * lab.size("scored") if self.scored else lab.size("paired")
        least = lab.work + measuring + tried + judged
        if not lab.fits(measuring + tried + judged):
            raise InputError(
                f"tuning needs about {least:.0f} uncached generations of one row at least ({measuring:.0f} to measure, "
                f"{tried + judged:.0f} to try and judge one plan), more than max_work = {self.options.max_work:g}: give "
                "fewer num_samples or trial_samples, a smaller score_sample, or a larger max_work"
            )

    def _tell(self, kinds: tuple[Kind, ...], uncached: Trial) -> None:
        """Say what is to come, where progress is shown."""
        settings, options, lab = self.lab.settings, self.options, self.lab
        if not settings.show_progress:
            return
        shares = [1 / target for target in {*options.speedups, self.speedup}]
        tried = 6 + options.refinements
        work = lab.work + self._measuring(kinds)
        work += lab.size("paired") * (sum(shares) * tried + 6 * len(options.tilts) / self.speedup)
        macs = lab.rehearsals["paired"].macs
        published = calibrations(options.published, 1 / self.speedup, kinds).values()
        work += sum(work_of(one, macs, lab.rows) for one in published)
        if self.scored:
            work += lab.size("scored") * (1 + sum(shares) + MOST_SCORED / self.speedup * self.by_score)
        if not self.by_score:
            work += lab.size(CLOSER) * (1 + CLOSEST / self.speedup) + lab.size("paired") * SCALES / self.speedup
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
    """What may be reused, as far as the network tells."""
    denoiser = compat.unwrapped(compat.find_denoiser(target))
    sites = inspect(denoiser)

    def is_able(kind: Kind) -> bool:
        if kind is Kind.STACK:
            return has_stack(denoiser)
        return kind is Kind.SAMPLE or Op.REUSE in ops_of(sites, kind, Op.REUSE)

    able = tuple(filter(is_able, Kind))
    if options.kinds is None:
        return able
    kinds = tuple(kind for kind in able if kind.value in options.kinds)
    if not set(WHOLES) & set(kinds):
        raise InputError("the blocks of this network can't be kept as one stack: let kinds hold 'branches'")
    return kinds


def _told(kinds: tuple[Kind, ...], rehearsal: Rehearsal) -> tuple[Kind, ...]:
    """Those that the scheduler doesn't rule out, as it is once it was set up."""
    told = tuple(kind for kind in kinds if kind is not Kind.SAMPLE or rehearsal.clean_samples)
    if not set(WHOLES) & set(told):
        raise InputError("the noise levels of this scheduler don't tell the clean sample: let kinds hold 'branches'")
    return told
