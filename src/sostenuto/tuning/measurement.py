"""What each kind of reuse costs and does to the network's output at every step: the numbers that a plan is searched with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from sostenuto.errors import InputError
from sostenuto.files import publish
from sostenuto.table import StepState


class Kind(Enum):
    """What a step reuses."""

    STACK = "stack"
    """What all blocks add to their input, kept as one tensor."""
    BRANCHES = "branches"
    """Every branch by itself."""
    ATTENTION = "attention"
    MLP = "mlp"

    @property
    def state(self) -> StepState:
        """The state of a cache table's step."""
        return {Kind.ATTENTION: StepState.REUSE_ATTENTION, Kind.MLP: StepState.REUSE_MLP}.get(
            self, StepState.REUSE_BOTH
        )


@dataclass(frozen=True)
class Reach:
    """Which reuses of a kind are measured.

    Attributes:
        max_run: most steps in a row that reuse.
        gaps: for each degree of forecast from 0 the distances in steps of the outputs that it is made from.
    """

    max_run: int
    gaps: tuple[tuple[int, ...], ...]

    @property
    def num_slots(self) -> int:
        """Outputs that must be kept to measure."""
        return self.max_run + max(order * gaps[-1] for order, gaps in enumerate(self.gaps))

    def gap_index(self, order: int, gap: int) -> int:
        """Position of the measured gap nearest to this one."""
        gaps = self.gaps[order]
        return min(range(len(gaps)), key=lambda index: abs(gaps[index] - gap))


def joined_kinds(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several, each with kinds of its own, of the same generations; times but the kinds' are the first's."""
    first, rest = parts[0], parts[1:]
    return replace(
        first,
        reach={kind: reach for part in parts for kind, reach in part.reach.items()},
        runs={kind: runs for part in parts for kind, runs in part.runs.items()},
        macs={name: macs for part in parts for name, macs in part.macs.items()},
        seconds={**{name: seconds for part in parts for name, seconds in part.seconds.items()}, **first.seconds},
        kept_bytes={name: kept for part in parts for name, kept in part.kept_bytes.items()},
        # Each has run the uncached generations, which one alone would have run once; to digits that don't depend on the order.
        work=round(first.work + sum(part.work - first.num_samples for part in rest), 6),
    )


def reaches(kinds: tuple[Kind, ...], num_steps: int) -> dict[Kind, Reach]:
    """What is measured of each kind in a generation of so many steps."""
    near = (1, 2, 3, 4, 6, 8)
    found = {}
    for kind in kinds:
        whole = kind in (Kind.STACK, Kind.BRANCHES)
        most = {Kind.STACK: 10, Kind.BRANCHES: 5}.get(kind, 3)
        run = max(1, min(most, num_steps // 3))
        linear = tuple(gap for gap in near if gap <= run + 1) if whole else (2,)
        found[kind] = Reach(run, ((0,), linear, tuple(gap for gap in linear if gap <= 4)) if whole else ((0,), linear))
    return found


@dataclass(frozen=True)
class Measurement:
    """Errors of reuse in the network's output, means over samples and values, and costs; steps in sampling order.

    Attributes:
        reach: what was measured of each kind.
        runs: of each kind ``[order, gap, computed step, i, j]``: the mean product of the output's errors at the i-th and
            the j-th step after the computed one that they reuse, from 0; not a number where it was not measured.
        power: mean square of the output at every step.
        macs: of a step of each kind, ``"compute"`` being 1.
        seconds: time of a denoiser call, the same way; ``"pause"`` is the time between one and the next.
        num_samples: rows that the means are over.
        kept_bytes: bytes of one output of each kind, all rows of a call.
        made_for: identity of model and scheduler, ``{"model": …, "scheduler": …}``.
        work: what it cost, in uncached generations of one row.
    """

    reach: Mapping[Kind, Reach]
    runs: Mapping[Kind, np.ndarray]
    power: np.ndarray
    macs: Mapping[str, float]
    seconds: Mapping[str, float]
    num_samples: int
    kept_bytes: Mapping[str, int]
    made_for: Mapping[str, Any] = field(default_factory=dict)
    work: float = 0.0

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.power)

    def relative(self, kind: Kind, order: int, gap: int, lag: int) -> np.ndarray:
        """Root mean square error of reuse over that of the output ``[step]``, ``lag`` steps after a computed one."""
        errors = np.full(self.num_steps, np.nan)
        column = self.runs[kind][order, self.reach[kind].gap_index(order, gap), :, lag - 1, lag - 1]
        errors[lag:] = np.sqrt(column[: self.num_steps - lag] / np.maximum(self.power[lag:], 1e-30))
        return errors

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step, ``"compute"`` and each kind, with the pause after its call."""
        pause = self.seconds["pause"]
        return {name: self.seconds.get(name, self.seconds["compute"]) + pause for name in self.macs}

    @property
    def whole(self) -> Kind:
        """The kind that reuses all of a step."""
        return Kind.BRANCHES if Kind.BRANCHES in self.runs else Kind.STACK

    @property
    def forecast_gain(self) -> float:
        """Error of a linear forecast one step ahead over that of the last value, geometric mean over the steps.

        Where features move smoothly it is well below 1. Noise alone, independent from step to step, makes it √3: a
        forecast with weights 2 and −1 is off by √(2² + 1² + 1) times the noise, the last value by √2.
        """
        return _mean_ratio(self.relative(self.whole, 1, 1, 1), self.relative(self.whole, 0, 0, 1))

    @property
    def noise_share(self) -> float:
        """Share of the squared error of reuse one step later that is there whatever the lag: the noise floor of the features.

        Drift makes the error grow in proportion to the lag, noise doesn't: ``e²(lag) = d²·lag² + n²``, so
        ``n² = (4·e²(1) − e²(2)) / 3``. Median over the steps, 0 to 1.
        """
        one, two = (
            (self.relative(self.whole, 0, 0, lag) ** 2 for lag in (1, 2)) if self._has_two else (np.zeros(1),) * 2
        )
        known = np.isfinite(one) & np.isfinite(two) & (one > 0)
        return float(np.median(np.clip((4 * one[known] - two[known]) / (3 * one[known]), 0, 1))) if known.any() else 0.0

    @property
    def _has_two(self) -> bool:
        return self.reach[self.whole].max_run > 1

    def save(self, path: Path) -> None:
        """Write everything to one ``.npz`` file."""
        rest = {
            "reach": {kind.value: [reach.max_run, reach.gaps] for kind, reach in self.reach.items()},
            "macs": dict(self.macs),
            "seconds": dict(self.seconds),
            "num_samples": self.num_samples,
            "kept_bytes": dict(self.kept_bytes),
            "made_for": dict(self.made_for),
            "work": self.work,
        }
        runs: dict[str, Any] = {f"runs-{kind.value}": values for kind, values in self.runs.items()}
        with publish(path) as partial:  # an interrupted write must not pass for a whole one
            np.savez_compressed(partial, power=self.power, rest=np.array(json.dumps(rest)), **runs)

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: it is something else, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                rest: dict[str, Any] = json.loads(str(content["rest"]))
                reach = {
                    Kind(name): Reach(run, tuple(tuple(gaps) for gaps in orders))
                    for name, (run, orders) in rest.pop("reach").items()
                }
                runs = {kind: content[f"runs-{kind.value}"] for kind in reach}
                return cls(reach, runs, content["power"], **rest)
        # Whatever numpy, zlib and what is read from them make of bytes that are not what was written.
        except Exception as error:
            raise InputError(f"{path} can't be read ({error}): delete it, or use another folder") from None


def _mean_ratio(a: np.ndarray, b: np.ndarray) -> float:
    both = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)
    return float(np.exp(np.mean(np.log(a[both] / b[both])))) if both.any() else 1.0
