"""SmoothCache: reuse every type of component for as long as its measured error allows (arXiv 2411.10510)."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from sostenuto.anatomy import SiteKind
from sostenuto.errors import MethodError, TableError
from sostenuto.methods import published
from sostenuto.methods.checks import check_number, check_whole, is_number
from sostenuto.methods.tabled import TableMethod, loaded
from sostenuto.plan import Action
from sostenuto.step_state import StepActions, StepState
from sostenuto.table import CacheTable

GroupBy = Literal["type", "site"]
Errors = Sequence[Sequence[float]]  # [lag − 1][p]

# The authors' schedules by steps and α, 1 computed and 0 reused, the same for attention and MLP.
_DIT_XL_2 = {
    (50, 0.18): "1000100100" + "10" * 19 + "11",
    (50, 0.08): "1001010" + "1" * 43,
    (30, 0.35): "100" + "10" * 12 + "111",
    (70, 0.08): "1000100100" + "10" * 29 + "11",
}


@dataclass(frozen=True)
class SmoothCache(TableMethod):
    """SmoothCache (arXiv 2411.10510): what is computed at step p is reused for j steps, the most with ``err_j(p) ≤ α``.

    ``err_j(p) = ‖o_p − o_{p+j}‖₁ / ‖o_{p+j}‖₁`` is measured in an uncached run and averaged over all blocks of a type of
    component (self-attention, cross-attention, MLP, …), and each type has a schedule of its own. First and last step are
    computed. As in the authors' code the longest stretch counts, also where a shorter one has the larger error.

    Attributes:
        table: the table that ``sostenuto.calibrate(pipe, "smoothcache", …)`` made, or its file. It holds the measured errors:
            see :meth:`from_errors`.
        forecast_order: how skipped branches are filled: 0, as in the paper, with the last value; 1 by linear extrapolation.
    """

    name: ClassVar[str] = "smoothcache"
    paper: ClassVar[str] = "arXiv 2411.10510"
    summary: ClassVar[str] = "reuses each type of branch while its measured error stays below α"

    @classmethod
    def from_errors(
        cls,
        table: CacheTable | str | Path,
        alpha: float = 0.18,
        *,
        max_lag: int | None = None,
        group_by: GroupBy = "type",
        target_fraction: float | None = None,
    ) -> SmoothCache:
        """The method with other options on the errors that a table was calibrated with; nothing is run.

        Args:
            table: a table of SmoothCache's calibration, or its file.
            alpha: the paper's α, the largest error that is accepted, 0 or more.
            max_lag: the longest stretch of reuse; by default what was measured, and no more than that.
            group_by: one schedule for each ``"type"`` of component, or for each ``"site"`` (key per block).
            target_fraction: find α such that a generation costs this share of the uncached multiply-accumulates.

        Raises:
            MethodError: an option makes no sense.
            TableError: the table holds no errors, or those of another number of steps.
        """
        table = loaded(table)
        errors = ReuseErrors.of(table)
        max_lag = errors.max_lag if max_lag is None else max_lag
        check_options(alpha, max_lag, group_by, target_fraction)
        if max_lag > errors.max_lag:
            raise MethodError(
                f"the table holds errors up to lag {errors.max_lag}, not {max_lag}: calibrate with a larger max_lag"
            )
        curves = errors.curves(group_by, max_lag)
        if target_fraction is not None:
            alpha = errors.alpha_for(target_fraction, curves)
        skipped = errors.skipped(curves, alpha)
        options = {"alpha": alpha, "max_lag": max_lag, "group_by": group_by, "target_fraction": target_fraction}
        return cls(
            replace(
                table,
                actions=tuple(
                    _actions({site: row[step] for site, row in skipped.items()}, errors.kinds)
                    for step in range(table.num_inference_steps)
                ),
                macs_fraction=errors.macs_fraction(skipped),
                calibration={**table.calibration, **options},
            )
        )

    @classmethod
    def dit_xl_2(cls, alpha: float = 0.18, num_inference_steps: int = 50) -> SmoothCache:
        """DiT-XL/2 256² with DDIM, the authors' schedules: 50 steps with α = 0.18 or 0.08, 30 with 0.35, 70 with 0.08.

        They compute 24, 46, 16 and 34 steps.
        """
        if (num_inference_steps, alpha) not in _DIT_XL_2:
            known = ", ".join(f"{steps} steps with alpha {value}" for steps, value in _DIT_XL_2)
            raise MethodError(
                f"schedules for DiT-XL/2 are published for {known}, not {num_inference_steps!r} steps with {alpha!r}: calibrate"
            )
        states = {"1": StepState.COMPUTE, "0": StepState.REUSE_BOTH}
        return cls(
            CacheTable(
                tuple(states[letter] for letter in _DIT_XL_2[num_inference_steps, alpha]),
                method=cls.name,
                model=published.DIT_XL_2,
                scheduler={"class": "DDIMScheduler"},
            )
        )


def greedy_schedule(errors: Errors, alpha: float) -> list[bool]:
    """Which steps are skipped: from a computed step p on, as many as the largest j with ``errors[j − 1][p] ≤ alpha``."""
    num_steps = len(errors[0]) + 1
    skipped, step = [True] * num_steps, 0
    while step < num_steps:
        skipped[step] = False
        allowed = [j for j, row in enumerate(errors, 1) if step < len(row) and row[step] <= alpha]
        step += max(allowed, default=0) + 1
    skipped[-1] = False
    return skipped


def check_options(alpha: Any, max_lag: Any, group_by: Any, target_fraction: Any) -> None:
    """Refuse options without meaning.

    Raises:
        MethodError: naming the option and its value.
    """
    check_number("SmoothCache's alpha", alpha, least=0)
    check_whole("SmoothCache's max_lag", max_lag, least=1)
    if group_by not in ("type", "site"):
        raise MethodError(f"SmoothCache's group_by must be 'type' or 'site', not {group_by!r}")
    if target_fraction is not None:
        check_number("target_fraction", target_fraction, above=0, most=1)


@dataclass(frozen=True)
class ReuseErrors:
    """What SmoothCache's calibration measured, all by site id.

    Attributes:
        errors: ``[lag − 1][p]``, the error of using the output of step p at step p + lag.
        kinds: the type of component.
        macs_share: multiply-accumulates of the branch, of those of a whole denoiser call.
    """

    errors: Mapping[str, Errors]
    kinds: Mapping[str, str]
    macs_share: Mapping[str, float]

    @classmethod
    def of(cls, table: CacheTable) -> ReuseErrors:
        """Those that a table was calibrated with.

        Raises:
            TableError: it holds none, or not as many as it has steps.
        """
        found: list[Any] = [table.calibration.get(name) for name in ("errors", "kinds", "macs_share")]
        if (
            not all(isinstance(part, Mapping) and part for part in found)
            or len({frozenset(part) for part in found}) > 1
        ):
            raise TableError(
                "the cache table holds no errors: make it with sostenuto.calibrate(pipe, 'smoothcache', …)"
            )
        errors, kinds, macs_share = found
        steps = table.num_inference_steps
        for site, rows in errors.items():
            lags = len(rows) if isinstance(rows, Sequence) else 0
            if not lags or [_length(row) for row in rows] != [steps - lag for lag in range(1, lags + 1)]:
                raise TableError(f"the errors of {site} are not those of {steps} steps: calibrate again")
        sound = all(map(is_number, macs_share.values())) and all(isinstance(kind, str) for kind in kinds.values())
        if len({len(rows) for rows in errors.values()}) > 1 or not sound:
            raise TableError("the cache table's errors, kinds or macs_share are damaged: calibrate again")
        return cls(errors, kinds, macs_share)

    def as_dict(self) -> dict[str, Any]:
        """The measurements as plain data for a table."""
        return {"errors": dict(self.errors), "kinds": dict(self.kinds), "macs_share": dict(self.macs_share)}

    @property
    def max_lag(self) -> int:
        """The longest stretch of reuse that was measured."""
        return len(next(iter(self.errors.values())))

    def curves(self, group_by: GroupBy, max_lag: int) -> dict[str, Errors]:
        """For every site the errors of its group: the mean over all blocks of its type, or its own."""
        if group_by == "site":
            return {site: rows[:max_lag] for site, rows in self.errors.items()}
        means = {}
        for kind in set(self.kinds.values()):
            members = [self.errors[site][:max_lag] for site in self.errors if self.kinds[site] == kind]
            means[kind] = [[fmean(step) for step in zip(*rows, strict=True)] for rows in zip(*members, strict=True)]
        return {site: means[self.kinds[site]] for site in self.errors}

    def skipped(self, curves: Mapping[str, Errors], alpha: float) -> dict[str, list[bool]]:
        """For every site which steps are skipped."""
        return {site: greedy_schedule(errors, alpha) for site, errors in curves.items()}

    def macs_fraction(self, skipped: Mapping[str, Sequence[bool]]) -> float:
        """Multiply-accumulates of a generation with this schedule, of one without."""
        return 1 - sum(self.macs_share[site] * sum(row) / len(row) for site, row in skipped.items())

    def alpha_for(self, target: float, curves: Mapping[str, Errors]) -> float:
        """The α whose cost is nearest to the target: bisection over the errors, for the schedule changes only there."""
        candidates = [0.0, *sorted({e for rows in curves.values() for e in chain.from_iterable(rows)})]

        def cost(alpha: float) -> float:
            return self.macs_fraction(self.skipped(curves, alpha))

        # The cost falls as α grows, but for small steps up where a longer stretch ends badly for the next.
        found = bisect_left(candidates, -target, key=lambda alpha: -cost(alpha))
        best = min(candidates[max(0, found - 1) : found + 1], key=lambda alpha: abs(cost(alpha) - target))
        if abs(cost(best) - target) > _FAR:
            warnings.warn(
                f"no alpha brings the cost to {target:g} of the multiply-accumulates, the nearest is {cost(best):.2f}: "
                "calibrate with a larger max_lag, or take more steps",
                stacklevel=3,
            )
        return best


_FAR = 0.05  # of the multiply-accumulates


def _actions(skipped: Mapping[str, bool], kinds: Mapping[str, str]) -> StepActions:
    """The state that skips just these, where there is one, otherwise site by site."""
    for state in StepState:
        if all(state.skips_kind(SiteKind(kinds[site])) == skip for site, skip in skipped.items()):
            return state
    return {site: Action.REUSE if skip else Action.COMPUTE for site, skip in skipped.items()}


def _length(row: Any) -> int:
    """The number of errors in a row; 0 where it holds anything else."""
    return len(row) if isinstance(row, Sequence) and all(map(is_number, row)) else 0
