"""When: the actions of every step and site, and their lowering to what each site does with its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntFlag
from functools import cached_property, lru_cache

from sostenuto.errors import MethodError
from sostenuto.forecast import lagrange_weights

Weights = Callable[[Sequence[int], int], Sequence[float]]
"""``weights(steps of the kept outputs, newest first; the step to forecast)`` → one weight per kept output."""


class Action(Enum):
    """What happens at one site in one step."""

    COMPUTE = "compute"
    REUSE = "reuse"
    FORECAST = "forecast"
    PARTIAL = "partial"
    """Run for some tokens, the others keep their last output."""
    SKIP = "skip"
    """Neither run nor read: a larger site around it is reused."""
    WINDOW = "window"
    """Attention to the near tokens alone; the share of the far ones is that of the last full attention."""
    SHARE = "share-guidance"
    """Run for the conditional half of the batch alone; the unconditional half is given the same output."""
    WINDOW_SHARE = "window+share-guidance"
    """Both."""

    @property
    def changes_attention(self) -> bool:
        """Whether attention runs in another way, which only an attention tap can carry out."""
        return self in _ATTENTION_OPS


class Op(IntFlag):
    """How a site carries out its action. Plain integers, so that ``torch.compile`` traces one graph per combination.

    ``STORE`` and ``RESIDUAL`` say what is kept and are added to what is done; ``WINDOW | SHARE`` does both.
    """

    COMPUTE = 0  # run the branch; nobody will read its output again
    STORE = 1  # keep the output
    RESIDUAL = 2  # keep what the far tokens add to the window attention
    WINDOW = 4  # window attention, plus the kept residual
    SHARE = 8  # run for the conditional half of the batch, the other half is given the same
    REUSE = 16  # return the newest kept output
    FORECAST = 32  # return a weighted sum of the kept outputs
    EXTEND = FORECAST | STORE  # the same, and keep it as if it had been computed
    PARTIAL = 64  # run for the chosen tokens and write them into the newest kept output
    SKIP = 128  # not reached, or an output that nobody reads
    DECIDE = 256  # a policy turns it into STORE, REUSE or FORECAST when the site is reached
    OUTSIDE = 512  # no denoiser call is under way

    @property
    def is_filled(self) -> bool:
        """Whether the output comes from kept ones alone."""
        return self in (Op.REUSE, Op.FORECAST, Op.EXTEND)

    @property
    def action(self) -> Action:
        """What was done, whatever was kept of it."""
        return _ACTION_OF[self & ~(Op.STORE | Op.RESIDUAL)]


_ATTENTION_OPS = {Action.WINDOW: Op.WINDOW, Action.SHARE: Op.SHARE, Action.WINDOW_SHARE: Op.WINDOW | Op.SHARE}
_ACTION_OF = {
    Op.COMPUTE: Action.COMPUTE,
    Op.REUSE: Action.REUSE,
    Op.FORECAST: Action.FORECAST,
    Op.PARTIAL: Action.PARTIAL,
    Op.SKIP: Action.SKIP,
    Op.DECIDE: Action.COMPUTE,  # a call that failed before the decision
    **{op: action for action, op in _ATTENTION_OPS.items()},
}


_LETTERS = {"compute": "c", "reuse": "r", "forecast": "f", "partial": "p", "skip": "r"}


def concise(plan: Sequence[Sequence[str]]) -> str:
    """A plan ``[step][site]`` as ``handle.stats`` has it in a line: a word a step with a letter a site.

    c is computed, r reused, f forecast, p some tokens computed, "?" anything else; one letter where all sites do the same.
    """
    words = ("".join(_LETTERS.get(action, "?") for action in step) for step in plan)
    return " ".join(word[0] if len(set(word)) == 1 else word for word in words)


@dataclass(frozen=True)
class Plan:
    """The actions ``[step][site]`` of one generation, steps in sampling order (0 is the noisiest).

    Attributes:
        actions: one tuple per step, in it one :class:`Action` per site.
        forecast_order: degree of the polynomial through the last computed outputs that a ``FORECAST`` follows
            (1: linear extrapolation from two), one number or one per step; the engine falls back to what history there is.
        weights: how a forecast combines the kept outputs; by default the polynomial through them.
        keep_forecasts: whether a forecast counts as a computed output for the forecasts after it.
        ratios: ``[step][site]``, the share of tokens that a ``PARTIAL`` runs, above 0 and below 1.
    """

    actions: tuple[tuple[Action, ...], ...]
    forecast_order: int | tuple[int, ...] = 1
    weights: Weights = lagrange_weights
    keep_forecasts: bool = False
    ratios: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if len({len(step) for step in self.actions}) > 1:
            raise MethodError("every step of a plan must name the same sites")
        if isinstance(self.forecast_order, tuple) and len(self.forecast_order) != len(self.actions):
            raise MethodError(f"{len(self.forecast_order)} forecast orders for {len(self.actions)} steps")

    @property
    def num_steps(self) -> int:
        """Number of steps that the plan covers."""
        return len(self.actions)

    @property
    def num_slots(self) -> int:
        """Outputs that a site keeps at most."""
        forecasts = any(action is Action.FORECAST for step in self.actions for action in step)
        return max(map(self.order_at, range(self.num_steps))) + 1 + self.keep_forecasts if forecasts else 1

    def order_at(self, step: int) -> int:
        """Degree of the forecasts of a step."""
        return self.forecast_order[step] if isinstance(self.forecast_order, tuple) else self.forecast_order


# Members of an enum are slow to combine and compare, and a row asks this of every site.
_FILLS = int(Op.REUSE | Op.FORECAST | Op.PARTIAL | Op.SKIP | Op.DECIDE | Op.WINDOW | Op.SHARE)
_KEEPS = int(Op.STORE | Op.RESIDUAL | Op.DECIDE)
_STATELESS = (int(Op.COMPUTE), int(Op.SKIP))
_HANDS_OUT = (int(Op.REUSE), int(Op.PARTIAL))
_PARTIAL, _SHARE, _DECIDE = int(Op.PARTIAL), int(Op.SHARE), int(Op.DECIDE)


@dataclass(frozen=True, eq=False)
class Row:
    """The ops of one step, and what follows from them, told once and not at every call.

    Attributes:
        ops: one per site.
        history: for each site the steps whose outputs a ``FORECAST`` combines, newest first, otherwise ``()``.
    """

    ops: tuple[Op, ...]
    history: tuple[tuple[int, ...], ...]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The ops as plain integers."""
        return tuple(map(int, self.ops))

    @cached_property
    def is_plain(self) -> bool:
        """Whether every site is computed and nothing is kept of any."""
        return not any(self.numbers)

    @cached_property
    def stateful(self) -> tuple[int, ...]:
        """The sites that read or write what is kept."""
        return self._sites_of(lambda op: op not in _STATELESS)

    @cached_property
    def read(self) -> tuple[int, ...]:
        """The sites that hand out the very memory that is kept."""
        return self._sites_of(lambda op: op in _HANDS_OUT)

    @cached_property
    def partial(self) -> tuple[int, ...]:
        """The sites that run for some tokens."""
        return self._sites_of(lambda op: op == _PARTIAL)

    @cached_property
    def keeps(self) -> bool:
        """Whether memory may be taken."""
        return any(op & _KEEPS for op in self.numbers)

    @cached_property
    def skips(self) -> bool:
        """Whether anything is, or may be, left out."""
        return any(op & _FILLS for op in self.numbers)

    @cached_property
    def shares_guidance(self) -> bool:
        """Whether the unconditional half of a batch is given what the conditional one has."""
        return any(op & _SHARE for op in self.numbers)

    @cached_property
    def decides(self) -> bool:
        """Whether a policy is asked."""
        return _DECIDE in self.numbers

    def _sites_of(self, fits: Callable[[int], bool]) -> tuple[int, ...]:
        return tuple(site for site, op in enumerate(self.numbers) if fits(op))


@dataclass(frozen=True)
class Program:
    """A plan lowered for a generation that begins at step ``start``.

    Attributes:
        ops: ``[step][site]``; steps before ``start`` are empty.
        history: ``[step][site]``, the steps whose outputs a ``FORECAST`` combines, newest first, otherwise ``()``.
        last_reader: for each site the last step that reads its kept outputs (−1: none), after which they are freed.
        last_residual_reader: the same for its kept residual.
        scored: the steps at which tokens are scored: the newest ones before a ``PARTIAL`` that computed a site in full, but for
            those that are partial themselves.
    """

    ops: tuple[tuple[Op, ...], ...]
    history: tuple[tuple[tuple[int, ...], ...], ...]
    last_reader: tuple[int, ...]
    last_residual_reader: tuple[int, ...]
    scored: frozenset[int] = frozenset()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Ops and history of every step; steps that are alike share one row."""
        made: dict[tuple[tuple[Op, ...], tuple[tuple[int, ...], ...]], Row] = {}
        alike = zip(self.ops, self.history, strict=True)
        return tuple(made.setdefault(key, Row(*key)) for key in alike)

    def freed_after(self, step: int) -> tuple[Sequence[int], Sequence[int]]:
        """The sites whose kept outputs, and those whose residual, nobody reads after this step."""
        return self._freed.get(step, ((), ()))

    @cached_property
    def _freed(self) -> dict[int, tuple[list[int], list[int]]]:
        freed: dict[int, tuple[list[int], list[int]]] = {}
        for kind, readers in enumerate((self.last_reader, self.last_residual_reader)):
            for site, step in enumerate(readers):
                freed.setdefault(step, ([], []))[kind].append(site)
        return freed


@lru_cache
def uniform(op: Op, num_sites: int, num_steps: int) -> Program:
    """The program of a generation without a plan: every site does the same at every step, and nothing is freed."""
    never = (-1,) * num_sites
    return Program(((op,) * num_sites,) * num_steps, (((),) * num_sites,) * num_steps, never, never)


def lower(plan: Plan, start: int = 0) -> Program:
    """Turn actions into ops by liveness: what has no later reader is not stored, what was never computed is not reused."""
    num_sites = len(plan.actions[0]) if plan.actions else 0
    ops = [[Op.COMPUTE] * num_sites for _ in range(plan.num_steps)]
    history: list[list[tuple[int, ...]]] = [[()] * num_sites for _ in range(plan.num_steps)]
    last_reader, last_residual_reader = [-1] * num_sites, [-1] * num_sites
    newest: list[set[int]] = [set() for _ in range(plan.num_steps)]  # by step, those at which a site was last computed
    for site in range(num_sites):
        computed: list[int] = []  # newest first
        full = start  # the newest step with full attention
        for step in range(start, plan.num_steps):
            action = plan.actions[step][site]
            newest[step].update(computed[:1])
            if action is Action.COMPUTE or not computed:
                computed.insert(0, step)
                full = step
                continue
            if action is Action.SKIP:
                ops[step][site] = Op.SKIP
                continue
            if action.changes_attention:
                ops[step][site] = _ATTENTION_OPS[action]
                computed.insert(0, step)
                if ops[step][site] & Op.WINDOW:
                    ops[full][site] |= Op.RESIDUAL
                    last_residual_reader[site] = step
                else:
                    full = step
                continue
            depth = plan.order_at(step) + 1 if action is Action.FORECAST else 1
            read = tuple(computed[:depth])
            if action is Action.PARTIAL:
                ops[step][site] = Op.PARTIAL
            else:
                ops[step][site] = Op.REUSE if len(read) == 1 else Op.FORECAST
            history[step][site] = read
            last_reader[site] = step
            for source in read:
                ops[source][site] = Op.EXTEND if ops[source][site].is_filled else ops[source][site] | Op.STORE
            if plan.keep_forecasts and action is Action.FORECAST:
                computed.insert(0, step)
    partial = {step for step, row in enumerate(ops) if Op.PARTIAL in row}
    return Program(
        ops=tuple(() if step < start else tuple(row) for step, row in enumerate(ops)),
        history=tuple(tuple(row) for row in history),
        last_reader=tuple(last_reader),
        last_residual_reader=tuple(last_residual_reader),
        scored=frozenset().union(*(newest[step] for step in partial)) - partial,
    )


def peak_bytes(
    program: Program, num_slots: int, output_bytes: Sequence[int], residual_bytes: Sequence[int] = ()
) -> int:
    """Most bytes that one pass of a program keeps at one time.

    Args:
        program: the lowered plan.
        num_slots: outputs that a site keeps at most.
        output_bytes: size of one output of each site.
        residual_bytes: size of the residual of each site, where the program keeps any.
    """
    slots, residuals = [0] * len(output_bytes), [0] * len(output_bytes)
    peak = 0
    for step, ops in enumerate(program.ops):
        for site, op in enumerate(ops):
            if op & Op.STORE:
                slots[site] = min(num_slots, slots[site] + 1)
            if op & Op.RESIDUAL:
                residuals[site] = residual_bytes[site]
        outputs = sum(n * size for n, size in zip(slots, output_bytes, strict=True))
        peak = max(peak, outputs + sum(residuals))
        for site in range(len(output_bytes)):
            if program.last_reader[site] == step:
                slots[site] = 0
            if program.last_residual_reader[site] == step:
                residuals[site] = 0
    return peak


def fit(plan: Plan, output_bytes: Sequence[int], max_bytes: int, residual_bytes: Sequence[int] = ()) -> Plan:
    """The plan with as few sites as possible computed always, so that one pass keeps at most ``max_bytes``.

    The last sites are given up first: what is skipped early in the network also spares the norms in front of it. Where sites
    lie within others (``SKIP``) they are given up all together.
    """
    kept = len(output_bytes)
    nested = any(action is Action.SKIP for row in plan.actions for action in row)
    while kept and peak_bytes(lower(plan), plan.num_slots, output_bytes, residual_bytes) > max_bytes:
        kept = 0 if nested else kept - 1
        rows = (row[:kept] + (Action.COMPUTE,) * (len(row) - kept) for row in plan.actions)
        plan = replace(plan, actions=tuple(rows))
    return plan
