"""What a generation really did: counts of actions, multiply-accumulates and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
        num_passes: most denoiser calls in one step.
        actions: for each kind of action how many times a site carried it out.
        macs: multiply-accumulates of the denoiser, all calls and all rows of the batch.
        macs_uncached: the same had every call been computed.
        ideal_speedup: ``macs_uncached / macs``.
        cache_bytes_peak: most bytes of kept features at one time.
        plan: the actions carried out, ``[step][site]`` (of the first pass); besides the actions of a plan ``"skip"``, where a
            larger site around was reused.
        sites: the ids of the sites.
        site_kinds: what each of them is.
    """

    num_steps: int
    num_passes: int
    actions: dict[str, int]
    macs: int
    macs_uncached: int
    ideal_speedup: float
    cache_bytes_peak: int
    plan: list[list[str]]
    sites: list[str]
    site_kinds: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The statistics as plain data, ready for JSON."""
        return dict(vars(self))


@dataclass
class Record:
    """Notes of the generation under way, cheap to take; :meth:`statistics` makes sense of them afterwards."""

    calls: list[tuple[int, int, int, Carried]] = field(default_factory=list)  # step, pass, signature, what it did
    bytes_peak: int = 0

    def note_bytes(self, num_bytes: int) -> None:
        """So many bytes of features are kept now."""
        self.bytes_peak = max(self.bytes_peak, num_bytes)

    @property
    def num_passes(self) -> int:
        """Most denoiser calls in one step."""
        return 1 + max((pass_index for _, pass_index, *_ in self.calls), default=-1)

    def statistics(self, dry_runs: Sequence[DryRun], sites: Sequence[Site]) -> Statistics:
        """Count everything, with the dry run of a call by its signature and the sites that the ops belong to."""
        macs = uncached = 0
        actions: Counter[str] = Counter()
        for _, _, signature, carried in self.calls:
            uncached += dry_runs[signature].cost.macs
            macs += dry_runs[signature].macs(carried)
            actions.update(_names(carried.ops))
        return Statistics(
            num_steps=len({step for step, *_ in self.calls}),
            num_passes=self.num_passes,
            actions={
                action.value: actions[action.value]
                for action in Action
                if action in _ALWAYS_LISTED or (actions[action.value] and action is not Action.SKIP)
            },
            macs=macs,
            macs_uncached=uncached,
            ideal_speedup=uncached / macs if macs else 1.0,
            cache_bytes_peak=self.bytes_peak,
            plan=[_names(carried.ops) for _, pass_index, _, carried in self.calls if pass_index == 0],
            sites=[site.id for site in sites],
            site_kinds=[site.kind.value for site in sites],
        )


def _names(ops: Sequence[Op]) -> list[str]:
    return [op.action.value for op in ops]
