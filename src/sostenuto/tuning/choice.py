"""Which plan and which noise scale are best, by real generations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sostenuto.clock import normalized_times
from sostenuto.distributed.world import world
from sostenuto.methods.feb import noise_scale_curve
from sostenuto.step_state import StepState
from sostenuto.table import CacheTable
from sostenuto.tuning.lab import AGAIN, CLOSER, Lab, Trial, key_of
from sostenuto.tuning.options import TuneOptions
from sostenuto.tuning.search import ErrorModel, Schedule, neighbours

_BELOW = 1e6  # puts scores that are not above 0 below the logarithms of those that are
_NEARNESS = 0.04  # what nearness counts beside the score, in logarithms
_SHORTLIST = 12  # plans that are scored
CLOSEST = 5  # plans that are compared on more samples, where nearness decides
_RUN_OFF = 3  # of those that are scored, how many are scored once more
SCALES = 12  # noise scales that are tried, about
MOST_SCORED = _SHORTLIST + SCALES + 2 * _RUN_OFF
_LEFT_FOR_SCALE = 6  # scored generations that the choice of the noise scale may need

Scale = float | str
"""A noise scale: b, or one with a name; see :meth:`Chooser.scaled`."""


class Planned(NamedTuple):
    """A plan, with what says how much error its changes would make and which of them stay within its budget."""

    plan: Schedule
    model: ErrorModel
    tilt: float
    keeps_budget: Callable[[Schedule], bool]


@dataclass(frozen=True)
class Candidate:
    """A plan that is tried.

    Attributes:
        name: where it comes from: ``"searched"``, ``"interval"``, or the method whose calibration made it.
        table: what it does, with a noise scale of 1.
        planned: how it was searched; ``None`` for a published one.
    """

    name: str
    table: CacheTable
    planned: Planned | None = None

    @property
    def share(self) -> float:
        """Its multiply-accumulates, of the uncached ones."""
        assert self.table.macs_fraction is not None
        return self.table.macs_fraction


class Chooser:
    """Chooses by trials, and where a score decides by scored trials.

    Args:
        lab: runs them.
        options: of the tuning.
        by_score: whether the score decides.
        table_of: makes a plan's table.
    """

    def __init__(
        self, lab: Lab, options: TuneOptions, by_score: bool, table_of: Callable[[Schedule], CacheTable]
    ) -> None:
        self._lab, self._options, self._by_score, self._table_of = lab, options, by_score, table_of

    def best(self, groups: Sequence[Sequence[Candidate]]) -> Candidate:
        """The best plan: the nearest to the uncached images, or of a shortlist that with the best score.

        On the shortlist are the nearest of every group first, then the next ones of each: plans that were made in another way
        may be farther off and yet score better. Those that lead are compared once more on other samples, where the work
        suffices: of many, the best on a few samples is also a lucky one.
        """
        nearest = self.nearest([candidate for group in groups for candidate in group])
        if not self._by_score:
            return self._closest(nearest[:CLOSEST])
        if len(nearest) == 1:
            return nearest[0]
        made = [set(map(_key, group)) for group in groups]
        ranked = [[candidate for candidate in nearest if _key(candidate) in keys] for keys in made]
        turns = [candidate for turn in itertools.zip_longest(*ranked) for candidate in turn if candidate is not None]
        different = list({_key(candidate): candidate for candidate in turns}.values())[:_SHORTLIST]
        left = min(_LEFT_FOR_SCALE * self._lab.size("scored") * nearest[0].share, self._lab.free / 2)
        shortlist = self._affordable("scored", different, left)
        if len(shortlist) < 2:
            return different[0]
        self._lab.prepare("scored", [candidate.table for candidate in shortlist])
        return shortlist[self._leading([candidate.table for candidate in shortlist], left)[0]]

    def nearest(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates by the distance from the uncached images; of those that do the same the first.

        Those that the work doesn't suffice for are left out from the end; for the first there is the reserve.
        """
        different: dict[str, Candidate] = {}
        for candidate in candidates:
            different.setdefault(_key(candidate), candidate)
        first = list(different.values())[:1]
        able = self._affordable("paired", list(different.values()))
        able = able or [one for one in first if self._lab.fits(self._lab.price("paired", one.table))]
        self._lab.prepare("paired", [candidate.table for candidate in able])
        return sorted(able, key=lambda candidate: self._lab.trial(candidate.table).error)

    def _closest(self, nearest: Sequence[Candidate]) -> Candidate:
        """The nearest of some by more samples, where the work suffices; else the first."""
        lab, tables = self._lab, [None, *(candidate.table for candidate in nearest)]
        if len(nearest) < 2 or not all(lab.affordable(CLOSER, tables)):
            return nearest[0]
        lab.prepare(CLOSER, tables)
        lab.closer(None)  # counts
        return min(nearest, key=lambda candidate: lab.closer(candidate.table).error)

    def _affordable(self, bench: str, candidates: Sequence[Candidate], keep: float = 0.0) -> list[Candidate]:
        able = self._lab.affordable(bench, [candidate.table for candidate in candidates], keep)
        return list(itertools.compress(candidates, able))

    def refined(self, candidate: Candidate) -> Candidate:
        """The plan after local changes, each tried for real, those first that the model likes best."""
        planned = candidate.planned
        if planned is None:
            return candidate
        plan, model = planned.plan, planned.model
        best, tried = self._lab.trial(candidate.table).error, {plan}
        for _ in range(self._options.refinements):
            able = filter(planned.keeps_budget, neighbours(plan, model.orders))
            fresh = {other: model.total(other) for other in able if other not in tried}
            likely = sorted(fresh, key=fresh.__getitem__)[: world().size]  # each process tries one
            step = next(iter(likely), None)
            if step is None or fresh[step] == float("inf"):
                break
            table = self._table_of(step)
            if not self._lab.can_spend(self._lab.price("paired", table)):
                break
            tried.add(step)
            self._lab.prepare("paired", [self._table_of(other) for other in likely if fresh[other] < float("inf")])
            error = self._lab.trial(table).error
            if error < best:
                plan, best = step, error
                candidate = Candidate(candidate.name, table, planned._replace(plan=step))
        return candidate

    def better(self, one: Candidate, other: Candidate) -> Candidate:
        """That with the better score of two, where a score decides; otherwise the first."""
        if one == other or not self._by_score or not all(self._lab.affordable("scored", [one.table, other.table])):
            return one
        return min(one, other, key=lambda candidate: merit(self._lab.scored(candidate.table)))

    def _leading(self, tables: Sequence[CacheTable], keep: float = 0.0) -> list[int]:
        """The places of some tables by their scores, best first; of the leading ones by two scores each."""
        lab = self._lab
        first = {place: merit(lab.scored(table)) for place, table in enumerate(tables)}
        leading = sorted(first, key=first.__getitem__)[:_RUN_OFF]
        again = [tables[place] for place in leading]
        if len(again) < 2 or not all(lab.affordable(AGAIN, again, keep)):
            return leading
        lab.prepare(AGAIN, again)

        def both(place: int) -> float:
            error = lab.scored(tables[place]).error
            return first[place] + merit(replace(lab.scored_again(tables[place]), error=error))

        return sorted(leading, key=both)

    def scale(self, candidate: Candidate) -> Scale:
        """The noise scale of a plan."""
        table, lab = candidate.table, self._lab
        if not lab.trial(table).norms:
            return 1.0
        bench = "scored" if self._by_score else "paired"

        def value(one: CacheTable) -> float:
            return merit(lab.scored(one)) if self._by_score else lab.trial(one).error

        grid = sorted({*map(float, self._options.eps_scale_grid), 1.0})
        scores: dict[Scale, float] = {}

        def hear(scales: Iterable[Scale]) -> bool:
            """Score those that weren't yet; whether there were any, and all could be."""
            fresh = [scale for scale in scales if scale not in scores]
            tables = [self.scaled(table, scale) for scale in fresh]
            able = lab.affordable(bench, tables)
            lab.prepare(bench, list(itertools.compress(tables, able)))
            for scale, one in itertools.compress(zip(fresh, tables, strict=True), able):
                scores[scale] = value(one)
            return bool(fresh) and all(able)

        def best(scales: Iterable[Scale]) -> Scale:
            return min((scale for scale in scales if scale in scores), key=scores.__getitem__, default=1.0)

        def near(b: float) -> list[float]:
            return [grid[place] for place in (grid.index(b) - 1, grid.index(b) + 1) if 0 <= place < len(grid)]

        hear([1.0, "b(τ)"])
        while hear(near(constant := float(best(grid)))):
            pass
        if constant != 1:
            hear([f"early {constant:g}"])
        # Computed predictions tend to be too large and reused ones too small: first one factor, then the other.
        computed: dict[Scale, float] = {constant: constant, **{_apart(b, constant): b for b in near(constant)}}
        hear(computed)
        b_computed = computed[best(computed)]
        hear(_apart(b_computed, b) for b in near(constant) if b != b_computed)
        hear(["matched"])
        if not self._by_score:
            return best(scores)
        heard = list(scores)
        return heard[self._leading([self.scaled(table, scale) for scale in heard])[0]] if heard else 1.0

    def scaled(self, table: CacheTable, scale: Scale) -> CacheTable:
        """The table with a noise scale.

        A number is b at every step. ``"early 0.98"`` is that in the noisy half of the time and 1 after it, ``"computed 0.98,
        reused 1.01"`` has a b for the steps that compute everything and one for the others, ``"b(τ)"`` is the curve of
        FEB-Cache with its published values, ``"matched"`` the ratio of the uncached sampler's noise norm to the plan's at every
        step, computed or reused, each of an unscaled generation: where norms drift along, later factors are more than restores.
        """
        steps = table.num_inference_steps
        if not isinstance(scale, str):
            return replace(table, eps_scale=(scale,) * steps)
        taus = normalized_times(steps)
        if scale == "b(τ)":
            return replace(table, eps_scale=noise_scale_curve(taus))
        if scale == "matched":
            wanted, norms = self._lab.trial(None).norms, self._lab.trial(table).norms
            if not norms:  # of a plan that diverges
                return table
            return replace(table, eps_scale=tuple(a / b for a, b in zip(wanted, norms, strict=True)))
        if scale.startswith("early "):
            early = float(scale.removeprefix("early "))
            return replace(table, eps_scale=tuple(early if tau >= 0.5 else 1.0 for tau in taus))
        computed, reused = (float(part.split()[1]) for part in scale.split(", "))
        scales = (computed if state is StepState.COMPUTE else reused for state in table.actions)
        return replace(table, eps_scale=tuple(scales))


def _apart(computed: float, reused: float) -> str:
    """The name of a noise scale of two factors."""
    return f"computed {computed:g}, reused {reused:g}"


def _key(candidate: Candidate) -> str:
    return key_of(candidate.table)


def merit(trial: Trial) -> float:
    """What a score decides by, lower is better: ``log score + log(error) / 25``.

    A score of few images is partly chance, and two plans of like scores may be worlds apart in nearness: ten times the
    error must buy a score that is better by a tenth. A score that is not above 0 has no logarithm and counts by itself; it is
    better than any that is above.
    """
    score = 0.0 if trial.score is None else trial.score
    return score - _BELOW if score <= 0 else math.log(score) + _NEARNESS * math.log(max(trial.error, 1e-9))
