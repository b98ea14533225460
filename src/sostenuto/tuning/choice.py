"""Which plan and which noise scale are best, by real generations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sostenuto.clock import normalized_times
from sostenuto.distributed.world import world
from sostenuto.methods.feb import noise_scale_curve
from sostenuto.table import CacheTable
from sostenuto.tuning.lab import Lab, Trial, key_of
from sostenuto.tuning.options import TuneOptions
from sostenuto.tuning.search import ErrorModel, Schedule, neighbours

_NEARNESS = 0.04  # what nearness counts beside the score, in logarithms
_SHORTLIST = 7  # plans that are scored
_LEFT_FOR_SCALE = 6  # scored generations that the choice of the noise scale may need

Scale = float | str
"""A noise scale: b, or ``"matched"``, ``"b(τ)"``, or ``"early 0.98"``; see :meth:`Chooser.scaled`."""


class Planned(NamedTuple):
    """A plan, with what says how much error its changes would make."""

    plan: Schedule
    model: ErrorModel
    tilt: float


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
        can_spend: whether so much more may be done, in uncached generations of one row.
        table_of: makes a plan's table.
    """

    def __init__(
        self,
        lab: Lab,
        options: TuneOptions,
        by_score: bool,
        can_spend: Callable[[float], bool],
        table_of: Callable[[Schedule], CacheTable],
    ) -> None:
        self._lab, self._options, self._by_score = lab, options, by_score
        self._can_spend, self._table_of = can_spend, table_of

    def best(self, groups: Sequence[Sequence[Candidate]]) -> Candidate:
        """The best plan: the nearest to the uncached images, or of a shortlist that with the best score.

        On the shortlist are the nearest of every group first, then the next ones of each: plans that were made in another way
        may be farther off and yet score better.
        """
        ranked = [self.nearest(group) for group in groups if group]
        nearest = self.nearest([candidate for group in groups for candidate in group])
        if not self._by_score or len(nearest) == 1:
            return nearest[0]
        cost = self._lab.scored(None).work * nearest[0].share
        room = (self._options.max_work - self._lab.work) / cost - _LEFT_FOR_SCALE
        turns = [candidate for turn in itertools.zip_longest(*ranked) for candidate in turn if candidate is not None]
        different = list({key_of(candidate.table): candidate for candidate in turns}.values())
        shortlist = different[: max(1, min(_SHORTLIST, int(room)))]
        if len(shortlist) == 1:
            return shortlist[0]
        self._lab.prepare("scored", [candidate.table for candidate in shortlist])
        return min(shortlist, key=lambda candidate: merit(self._lab.scored(candidate.table)))

    def nearest(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates by the distance from the uncached images; of those that do the same the first."""
        different = {key_of(candidate.table): candidate for candidate in reversed(candidates)}
        self._lab.prepare("paired", [candidate.table for candidate in different.values()])
        return sorted(different.values(), key=lambda candidate: self._lab.trial(candidate.table).error)

    def refined(self, candidate: Candidate) -> Candidate:
        """The plan after local changes, each tried for real, those first that the model likes best."""
        if candidate.planned is None:
            return candidate
        plan, model, tilt = candidate.planned
        best, tried = self._lab.trial(candidate.table).error, {plan}
        for _ in range(self._options.refinements):
            fresh = {other: model.total(other) for other in neighbours(plan, model.orders) if other not in tried}
            likely = sorted(fresh, key=fresh.__getitem__)[: world().size]  # each process tries one
            step = next(iter(likely), None)
            work = self._options.trial_samples * candidate.share
            if step is None or fresh[step] == float("inf") or not self._can_spend(work):
                break
            tried.add(step)
            self._lab.prepare("paired", [self._table_of(other) for other in likely if fresh[other] < float("inf")])
            table = self._table_of(step)
            error = self._lab.trial(table).error
            if error < best:
                plan, best, candidate = step, error, Candidate(candidate.name, table, Planned(step, model, tilt))
        return candidate

    def better(self, one: Candidate, other: Candidate) -> Candidate:
        """That with the better score of two, where a score decides; otherwise the first."""
        if one == other or not self._by_score or not self._can_spend(self._lab.scored(None).work * one.share):
            return one
        return min(one, other, key=lambda candidate: merit(self._lab.scored(candidate.table)))

    def scale(self, candidate: Candidate) -> Scale:
        """The noise scale of a plan."""
        table = candidate.table
        if not self._lab.trial(table).norms:
            return 1.0
        if not self._by_score:
            kept, matched = (self._lab.trial(self.scaled(table, scale)).error for scale in (1.0, "matched"))
            return 1.0 if kept <= matched else "matched"
        scores: dict[Scale, float] = {}
        grid = sorted({*map(float, self._options.eps_scale_grid), 1.0})
        waiting: list[Scale] = [1.0, "b(τ)", "matched"]
        while waiting and self._can_spend(self._lab.scored(None).work * candidate.share):
            self._lab.prepare("scored", [self.scaled(table, scale) for scale in waiting[: world().size]])
            scale = waiting.pop(0)
            scores[scale] = merit(self._lab.scored(self.scaled(table, scale)))
            known = {b: value for b, value in scores.items() if not isinstance(b, str)}
            best = grid.index(min(known, key=known.__getitem__))
            nearby = [grid[place] for place in (best - 1, best + 1) if 0 <= place < len(grid)]
            waiting += [b for b in nearby if b not in scores and b not in waiting]
            early = f"early {grid[best]:g}"
            if not waiting and grid[best] != 1 and early not in scores:
                waiting.append(early)
        return min(scores, key=scores.__getitem__, default=1.0)

    def scaled(self, table: CacheTable, scale: Scale) -> CacheTable:
        """The table with a noise scale.

        A number is b at every step. ``"early 0.98"`` is that in the noisy half of the time and 1 after it, ``"b(τ)"`` the
        curve of FEB-Cache with its published values, ``"matched"`` the factor at every step, computed or reused, that
        restores the norm of the uncached noise.
        """
        steps = table.num_inference_steps
        if not isinstance(scale, str):
            return replace(table, eps_scale=(scale,) * steps)
        taus = normalized_times(steps)
        if scale == "b(τ)":
            return replace(table, eps_scale=noise_scale_curve(taus))
        if scale == "matched":
            wanted, norms = self._lab.trial(None).norms, self._lab.trial(table).norms
            return replace(table, eps_scale=tuple(a / b for a, b in zip(wanted, norms, strict=True)))
        early = float(scale.removeprefix("early "))
        return replace(table, eps_scale=tuple(early if tau >= 0.5 else 1.0 for tau in taus))


def merit(trial: Trial) -> float:
    """What a score decides by, lower is better: ``log score + log(error) / 25``.

    A score of few images is partly chance, and two plans of like scores may be worlds apart in nearness: ten times the
    error must buy a score that is better by a tenth. A score that is not above 0 has no logarithm and counts by itself.
    """
    score = 0.0 if trial.score is None else trial.score
    return score if score <= 0 else math.log(score) + _NEARNESS * math.log(max(trial.error, 1e-9))
