"""What a generation really did: counts of actions, multiply-accumulates and bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from sostenuto.cost import Carried, DryRun
from sostenuto.plan import Action, Op
from sostenuto.sites import Site

_ALWAYS_LISTED = (Action.COMPUTE, Action.REUSE, Action.FORECAST, Action.PARTIAL)


@dataclass(frozen=True)
class Statistics:
    """Statistics of one generation.

    Attributes:
        num_steps: steps that were run.
        steps: the step of each row of ``plan``.
        num_passes: most passes in one step.
        actions: for each kind of action how many times a site carried it out.
        macs: multiply-accumulates of the denoiser, all calls and all rows of the batch; without calls that fill a
            key-value cache of the network's own.
        macs_uncached: the same had every call been computed.
        ideal_speedup: ``macs_uncached / macs``.
        cache_bytes_peak: most bytes of kept features at one time.
        plan: the actions carried out, ``[step][site]`` (of the first pass); besides the actions of a plan ``"skip"``, where a
            larger site around was reused, and ``"idle"``, where another denoiser of the pipeline served the step.
        sites: the ids of the sites.
        site_kinds: what each of them is.
        disabled: whether ``SOSTENUTO_DISABLE`` was set, so that nothing was attached and nothing counted.
    """

    num_steps: int
    steps: list[int]
    num_passes: int
    actions: dict[str, int]
    macs: int
    macs_uncached: int
    ideal_speedup: float
    cache_bytes_peak: int
    plan: list[list[str]]
    sites: list[str]
    site_kinds: list[str]
    disabled: bool = False

    @classmethod
    def of_nothing(cls) -> Statistics:
        """The statistics where nothing was attached: no counts at all."""
        actions = {action.value: 0 for action in _ALWAYS_LISTED}
        return cls(0, [], 0, actions, 0, 0, 1.0, 0, [], [], [], disabled=True)

    def as_dict(self) -> dict[str, Any]:
        """The statistics as plain data, ready for JSON."""
        return dict(vars(self))


@dataclass
class Record:
    """Notes of the generation under way, cheap to take; :meth:`statistics` makes sense of them afterwards."""

    source: Any = None  # the scheduler's list of timesteps that the generation follows
    calls: list[tuple[int, int, int, Carried]] = field(default_factory=list)  # step, pass, signature, what it did
    bytes_peak: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float = field(default_factory=time.monotonic)  # of its last call so far
    num_steps: int = 0  # of the scheduler

    def note_bytes(self, num_bytes: int) -> None:
        """So many bytes of features are kept now."""
        self.bytes_peak = max(self.bytes_peak, num_bytes)

    @property
    def num_passes(self) -> int:
        """Most passes in one step."""
        return max((len(passes) for passes in self.passes.values()), default=0)

    @property
    def passes(self) -> dict[int, set[int]]:
        """The passes of every step."""
        found: dict[int, set[int]] = {}
        for step, pass_index, *_ in self.calls:
            found.setdefault(step, set()).add(pass_index)
        return found

    @property
    def actions(self) -> dict[str, int]:
        """For each kind of action how many times a site carried it out."""
        actions: Counter[str] = Counter()
        for *_, carried in self.calls:
            actions.update(_names(carried.ops))
        return {
            action.value: actions[action.value]
            for action in Action
            if action in _ALWAYS_LISTED or actions[action.value]
        }

    def statistics(self, dry_runs: Sequence[DryRun], sites: Sequence[Site]) -> Statistics:
        """Count everything, with the dry run of a call by its signature and the sites that the ops belong to."""
        macs = uncached = 0
        for _, _, signature, carried in self.calls:
            uncached += dry_runs[signature].cost.macs
            macs += dry_runs[signature].macs(carried)
        return Statistics(
            num_steps=len(self.passes),
            steps=[step for step, pass_index, *_ in self.calls if pass_index == 0],
            num_passes=self.num_passes,
            actions=self.actions,
            macs=macs,
            macs_uncached=uncached,
            ideal_speedup=uncached / macs if macs else 1.0,
            cache_bytes_peak=self.bytes_peak,
            plan=[_names(carried.ops) for _, pass_index, _, carried in self.calls if pass_index == 0],
            sites=[site.id for site in sites],
            site_kinds=[site.kind.value for site in sites],
        )


def current(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records, of those of several denoisers, that belong to the generation that was begun last."""
    newest = max(records.values(), key=lambda record: record.began)
    # A denoiser of the later steps hasn't been called yet where one of the earlier steps has begun anew.
    begins = {name: min(record.passes, default=0) for name, record in records.items()}
    begin = next(begins[name] for name, record in records.items() if record is newest)
    return {
        name: record for name, record in records.items() if record.source is newest.source and begins[name] <= begin
    }


def joined(records: Mapping[str, Record], parts: Mapping[str, Statistics]) -> Statistics:
    """The statistics of one generation that several denoisers served, by their names, which stand before the sites' ids."""
    passes: Counter[int] = Counter()
    actions: Counter[str] = Counter()
    for name, part in parts.items():
        passes.update({step: len(found) for step, found in records[name].passes.items()})
        actions.update(part.actions)
    macs, uncached = sum(part.macs for part in parts.values()), sum(part.macs_uncached for part in parts.values())
    steps: list[int] = []
    plan: list[list[str]] = []
    for step in sorted(passes):
        rows = [[row for at, row in zip(part.steps, part.plan, strict=True) if at == step] for part in parts.values()]
        idle = [["idle"] * len(part.sites) for part in parts.values()]
        for turn in zip_longest(*rows):
            steps.append(step)
            plan.append(list(chain.from_iterable(row or none for row, none in zip(turn, idle, strict=True))))
    return Statistics(
        num_steps=len(passes),
        steps=steps,
        num_passes=max(passes.values()),
        actions=dict(actions),
        macs=macs,
        macs_uncached=uncached,
        ideal_speedup=uncached / macs if macs else 1.0,
        cache_bytes_peak=sum(part.cache_bytes_peak for part in parts.values()),
        plan=plan,
        sites=[f"{name}.{site}" for name, part in parts.items() for site in part.sites],
        site_kinds=[kind for part in parts.values() for kind in part.site_kinds],
    )


def _names(ops: Sequence[Op]) -> list[str]:
    return [op.action.value for op in ops]
