"""The best plan for every budget: dynamic programming over the computed steps, the runs of reuse between them, and the cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sostenuto.plan import Action
from sostenuto.step_state import StepState
from sostenuto.table import FILLS, CacheTable, Fill
from sostenuto.tuning.measurement import WHOLES, Kind, Measurement, filled_name

ANY_ORDER = (0, 1, 2)
"""Degrees of the forecasts that a run of reuse may be filled with; 0 is the last value."""
FORECASTS = (1,)
"""Linear forecasts alone."""
_TICKS = 5000  # that the cost of a generation is counted in


@dataclass(frozen=True)
class Segment:
    """A computed step and the steps after it that reuse what it computed.

    Attributes:
        length: how many steps reuse it, 0 or more.
        kind: what they reuse; of no meaning where there are none.
        order: degree of the forecast that fills them.
    """

    length: int
    kind: Kind
    order: int


EMPTY = Segment(0, Kind.STACK, 0)
"""A computed step that nothing reuses."""


def segment_of(length: int, kind: Kind, order: int) -> Segment:
    """A computed step and so many that reuse it."""
    return Segment(length, kind, order) if length else EMPTY


Schedule = tuple[Segment, ...]
"""A generation: every segment begins with a computed step."""


def filled_cost(costs: Mapping[str, float], kind: Kind, order: int) -> float:
    """Cost of a step that reuses a kind, filled by a forecast; as a last value's where forecasts are not listed apart."""
    return costs.get(filled_name(kind, order), costs[kind.value])


def cost_of(schedule: Schedule, costs: Mapping[str, float]) -> float:
    """Mean cost of a step, by the cost of ``"compute"``, of each kind and of its forecasts."""
    steps = sum(segment.length + 1 for segment in schedule)
    reused = sum(one.length * filled_cost(costs, one.kind, one.order) for one in schedule if one.length)
    return (len(schedule) * costs["compute"] + reused) / (steps * costs["compute"])


def cost_of_table(
    table: CacheTable, costs: Mapping[str, float], sites: Mapping[str, tuple[str, float]] | None = None
) -> float:
    """Mean cost of a step of a table, of a computed one's.

    Args:
        table: the plan.
        costs: of a step, ``"compute"``, each kind and its forecasts.
        sites: where a step lists its sites, their kinds and shares (:attr:`Measurement.sites`): what a kind spares is divided
            among its branches.
    """
    whole = Kind(table.fill)
    kinds = {StepState.REUSE_ATTENTION: Kind.ATTENTION, StepState.REUSE_MLP: Kind.MLP, StepState.REUSE_BOTH: whole}
    spent = 0.0
    for state, order in zip(table.actions, table.forecast_orders, strict=True):
        if state is StepState.COMPUTE:
            spent += costs["compute"]
        elif isinstance(state, StepState):
            spent += filled_cost(costs, kinds[state], order)
        else:
            spared = _spared(costs, order)
            skipped = [(sites or {})[site] for site, action in state.items() if action is not Action.COMPUTE]
            spent += costs["compute"] - sum(share * spared[kind] for kind, share in skipped)
    return spent / (table.num_inference_steps * costs["compute"])


def _spared(costs: Mapping[str, float], order: int) -> dict[str, float]:
    """What each kind spares of a step; ``"branches"`` what those spare that belong to no other kind."""
    spared = {kind.value: costs["compute"] - filled_cost(costs, kind, order) for kind in Kind if kind.value in costs}
    if Kind.BRANCHES.value in spared:
        others = sum(spared.get(kind.value, 0.0) for kind in (Kind.ATTENTION, Kind.MLP))
        spared[Kind.BRANCHES.value] = max(0.0, spared[Kind.BRANCHES.value] - others)
    return spared


_FILL: dict[Kind, Fill] = {Kind(fill): fill for fill in FILLS}


def table_of(schedule: Schedule) -> CacheTable:
    """The schedule as a cache table."""
    states: list[StepState] = []
    orders: list[int] = []
    for segment in schedule:
        states += [StepState.COMPUTE, *[segment.kind.state] * segment.length]
        orders += [0, *[segment.order] * segment.length]
    wholes = {segment.kind for segment in schedule if segment.length and segment.kind in WHOLES}
    order = orders[1] if len(set(orders)) == 1 else tuple(orders)
    return CacheTable(
        tuple(states), method="tuned", forecast_order=order, fill=_FILL[next(iter(wholes), Kind.BRANCHES)]
    )


Weight = Callable[[Kind, int, int], float]
"""How much a squared error that a kind of reuse with a forecast of this order makes at a step counts in the end."""


class ErrorModel:
    """How the errors of reuse add up to the error of the final latents, mean square.

    Within a run of reuses the network's errors point in like directions: they are added as vectors, by their measured products,
    each step's with the square root of its weight. Runs are taken to be independent of one another.

    Args:
        measured: the instrumented run.
        weight: what a step's squared error counts.
        kinds: what may be reused.
        orders: degrees of the forecasts that may be used.
        longest: most steps in a row that may be reused; by default as many as were measured.
    """

    def __init__(
        self,
        measured: Measurement,
        weight: Weight,
        kinds: Sequence[Kind],
        orders: Sequence[int] = ANY_ORDER,
        longest: int | None = None,
    ) -> None:
        self.kinds, self.num_steps = tuple(kinds), measured.num_steps
        self._longest = measured.num_steps if longest is None else longest
        self._measured, self._weight, self.orders = measured, weight, tuple(orders)
        self._fillings: dict[tuple[int, int, Kind, int], list[tuple[float, int]]] = {}

    def longest(self, kind: Kind) -> int:
        """Most steps in a row that reuse this kind."""
        return min(self._measured.reach[kind].max_run, self._longest)

    def fillings(self, computed: int, gap: int, kind: Kind, length: int) -> list[tuple[float, int]]:
        """Error and order of the forecasts that may fill a run after a computed step, those of least error first.

        Args:
            computed: the step.
            gap: how many steps it is after the one before; 0: there is none.
            kind: what is reused.
            length: of the run.
        """
        key = computed, gap, kind, length
        if key not in self._fillings:
            known = (order for order in range(len(self._measured.reach[kind].gaps)) if order in self.orders)
            errors = ((self.error(*key, order), order) for order in known)
            self._fillings[key] = sorted(one for one in errors if one[0] < np.inf)
        return self._fillings[key]

    def error(self, computed: int, gap: int, kind: Kind, length: int, order: int) -> float:
        """Error of a run of ``length`` steps; infinite where it wasn't measured."""
        if length == 0:
            return 0.0
        if (order and not gap) or length > self.longest(kind) or computed + length >= self.num_steps:
            return np.inf
        gaps = self._measured.reach[kind].gaps
        if order >= len(gaps) or not gaps[order]:
            return np.inf
        at = self._measured.reach[kind].gap_index(order, gap)
        products = self._measured.runs[kind][order, at, computed, :length, :length]
        steps = range(computed + 1, computed + 1 + length)
        share = np.sqrt([self._weight(kind, order, step) for step in steps])
        error = float(share @ products @ share)
        return np.inf if np.isnan(error) else max(0.0, error)

    def total(self, schedule: Schedule) -> float:
        """Error of a whole schedule."""
        total, step = 0.0, 0
        before: Run | None = None
        for segment in schedule:
            gap = gap_after(before, segment.kind)
            total += self.error(step, gap, segment.kind, segment.length, segment.order)
            before = segment.kind, segment.length
            step += segment.length + 1
        return total


Run = tuple[Kind, int]
"""What steps in a row reuse, and how many there are."""


def gap_after(before: Run | None, kind: Kind) -> int:
    """Distance in steps of a computed step from the one before that left what a forecast of this kind is made from.

    A step that reuses attention or the MLP alone computes the rest: the other, and what the stack adds, are kept anew there.

    Args:
        before: the run of reuse before the computed step; ``None``: it is the first step, and the distance 0.
        kind: what is forecast.
    """
    if before is None:
        return 0
    reused, length = before
    is_kept_anew = reused in (Kind.ATTENTION, Kind.MLP) and kind not in (reused, Kind.BRANCHES)
    return 1 if is_kept_anew else length + 1


class Frontier:
    """The least error for every cost.

    The state of the dynamic program is a computed step and the run of reuse before it; a transition is the run that follows
    and the next computed step. For every state and cost, counted in ticks, the least error is kept, so
    that one pass gives the best schedule for every budget. The last step is always computed.

    Args:
        model: the errors.
        costs: of a step, ``"compute"``, each kind and its forecasts. Where a forecast costs more than what it is better than,
            both are tried.
    """

    def __init__(self, model: ErrorModel, costs: Mapping[str, float]) -> None:
        self._model, self._costs = model, costs
        self._per_step = max(20, _TICKS // model.num_steps)
        self._num_ticks = model.num_steps * self._per_step + 1
        self._runs = [(Kind.STACK, 0)] + [(k, n) for k in model.kinds for n in range(1, model.longest(k) + 1)]
        self._errors: dict[tuple[int, int], np.ndarray] = {}  # by step and place of the run before it, -1 for none
        # Of each: place of the run before the last computed step, and the order that fills the run itself.
        self._from: dict[tuple[int, int], np.ndarray] = {}
        self._solve()

    def schedule(self, budget: float) -> Schedule | None:
        """The schedule with the least error whose mean cost of a step is at most ``budget``; ``None`` if there is none."""
        last = self._model.num_steps - 1
        rounded = 0.5 / self._per_step  # what the ticks of a step may be off by, while the costs below are exact
        top = min(self._num_ticks, math.ceil((budget + rounded) * self._num_ticks) + 1)
        ends = [
            (error, run, tick)
            for (step, run), row in self._errors.items()
            if step == last
            for tick, error in enumerate(row[:top].tolist())
            if error < np.inf
        ]
        for _, run, tick in sorted(ends):
            found = self._trace(run, tick)
            if cost_of(found, self._costs) <= budget + 1e-9:
                return found
        return None

    @property
    def least_cost(self) -> float:
        """The mean cost of a step of the cheapest schedule."""
        last = self._model.num_steps - 1
        ends = [
            (int(np.flatnonzero(row < np.inf)[0]), run) for (step, run), row in self._errors.items() if step == last
        ]
        tick, run = min(ends)
        return cost_of(self._trace(run, tick), self._costs)

    def _solve(self) -> None:
        last, size = self._model.num_steps - 1, self._num_ticks
        begin = np.full(size, np.inf)
        begin[self._ticks(EMPTY)] = 0.0
        self._errors[0, -1] = begin
        for step in range(last):
            for before in sorted(run for at, run in self._errors if at == step):
                past = self._errors[step, before] if step == 0 else self._errors.pop((step, before))
                for number, (kind, length) in enumerate(self._runs):
                    if step + length + 1 <= last:
                        for error, order in self._fillings(step, before, kind, length):
                            self._extend(past, (step, before), number, error, order)

    def _fillings(self, step: int, before: int, kind: Kind, length: int) -> list[tuple[float, int]]:
        """Error and order of what may fill a run: the orders that cost less than all that are better."""
        if not length:
            return [(0.0, 0)]
        found: list[tuple[float, int]] = []
        for error, order in self._model.fillings(step, self._gap(before, kind), kind, length):
            ticks = self._ticks(Segment(length, kind, order))
            if all(ticks < self._ticks(Segment(length, kind, other)) for _, other in found):
                found.append((error, order))
        return found

    def _extend(self, past: np.ndarray, start: tuple[int, int], number: int, error: float, order: int) -> None:
        """The paths to a computed step and the run before it, from all those to the computed step before."""
        (step, before), (kind, length), size = start, self._runs[number], self._num_ticks
        ticks = self._ticks(Segment(length, kind, order))
        if ticks >= size or not np.isfinite(past[: size - ticks]).any():
            return  # dearer than a generation without any reuse
        place = step + length + 1, number
        if place not in self._errors:
            self._errors[place] = np.full(size, np.inf)
            self._from[place] = np.full((size, 2), -1, dtype=np.int16)
        moved = past[: size - ticks] + error
        better = moved < self._errors[place][ticks:]
        self._errors[place][ticks:][better] = moved[better]
        self._from[place][ticks:][better] = before, order

    def _ticks(self, segment: Segment) -> int:
        """What a computed step and a run of reuse cost."""
        unit = self._costs["compute"] / self._per_step
        reused = round(filled_cost(self._costs, segment.kind, segment.order) / unit) if segment.length else 0
        return self._per_step + segment.length * reused

    def _gap(self, before: int, kind: Kind) -> int:
        return gap_after(None if before < 0 else self._runs[before], kind)

    def _trace(self, run: int, tick: int) -> Schedule:
        """The schedule that leads to a state of the last step at this cost."""
        step = self._model.num_steps - 1
        segments = [EMPTY]
        while step:
            before, order = map(int, self._from[step, run][tick])
            segments.append(Segment(self._runs[run][1], self._runs[run][0], order))
            step -= segments[-1].length + 1
            tick -= self._ticks(segments[-1])
            run = before
        return tuple(segments[::-1])


def uniform(model: ErrorModel, costs: Mapping[str, float], budget: float) -> Schedule | None:
    """The best schedule within a budget of those that are published: every N-th step is computed, the first ones and the last.

    The whole step is reused; ``None`` where no interval costs so little.
    """
    kind, steps = model.kinds[0], model.num_steps
    found: dict[Schedule, float] = {}
    for interval in range(1, model.longest(kind) + 1):
        for order, warmup in itertools.product(model.orders, (2, 3)):
            segments = [EMPTY] * min(warmup - 1, steps - 1)
            while (left := steps - 1 - sum(segment.length + 1 for segment in segments)) > 0:
                segments.append(segment_of(min(interval, left - 1), kind, order))
            schedule = (*segments, EMPTY)
            if cost_of(schedule, costs) <= budget + 1e-9:
                found[schedule] = model.total(schedule)
    best = min(found, key=found.__getitem__, default=None)
    return None if best is None or found[best] == np.inf else best


def neighbours(schedule: Schedule, orders: Sequence[int] = ANY_ORDER) -> Iterator[Schedule]:
    """Schedules that reuse as many steps: a reuse moved to another run, or a run filled by a forecast of another order."""
    for one, other in itertools.permutations(range(len(schedule)), 2):
        giving, taking = schedule[one], schedule[other]
        ends = other == len(schedule) - 1  # the last step stays computed
        if giving.length and (giving.kind is taking.kind or not taking.length) and abs(one - other) <= 4 and not ends:
            changed = list(schedule)
            changed[one] = segment_of(giving.length - 1, giving.kind, giving.order)
            changed[other] = Segment(taking.length + 1, giving.kind, taking.order if taking.length else giving.order)
            yield tuple(changed)
    for place, segment in enumerate(schedule):
        for order in orders:
            if segment.length and order != segment.order:
                yield (*schedule[:place], Segment(segment.length, segment.kind, order), *schedule[place + 1 :])
