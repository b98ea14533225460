"""What each kind of reuse costs and does to the network's output at every step: the numbers that a plan is searched with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from sostenuto.errors import InputError
from sostenuto.files import publish
from sostenuto.step_state import StepState


class Kind(Enum):
    """What a step reuses."""

    STACK = "stack"
    """What all blocks add to their input, kept as one tensor."""
    SAMPLE = "sample"
    """The clean sample that follows from the network's output."""
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


WHOLES = (Kind.STACK, Kind.BRANCHES, Kind.SAMPLE)
"""The kinds that reuse all of a step; each is what a cache table's ``fill`` of that name keeps."""


def filled_name(kind: Kind, order: int) -> str:
    """What a step that reuses a kind, filled by a forecast of this order, is called where costs are listed."""
    return f"{kind.value} {order}" if order else kind.value


def joined_kinds(parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several, each with kinds of its own, of the same generations; times but the kinds' are the first's."""
    first = parts[0]
    whole = whole_of([kind for part in parts for kind in part.reach])
    return replace(
        first,
        roughness=next(part.roughness for part in parts if whole in part.reach),
        reach={kind: reach for part in parts for kind, reach in part.reach.items()},
        runs={kind: runs for part in parts for kind, runs in part.runs.items()},
        macs={name: macs for part in parts for name, macs in part.macs.items()},
        seconds={**{name: seconds for part in parts for name, seconds in part.seconds.items()}, **first.seconds},
        kept_bytes={name: kept for part in parts for name, kept in part.kept_bytes.items()},
        machine=first.machine if len({part.machine for part in parts}) == 1 else SEVERAL,
    )


def reaches(kinds: tuple[Kind, ...], num_steps: int, others: tuple[Kind, ...] = ()) -> dict[Kind, Reach]:
    """What is measured of each kind in a generation of so many steps; ``others`` are measured by other processes."""
    near = (1, 2, 3, 4, 6, 8)
    found = {}
    for kind in kinds:
        # Beside a stack no plan is made of branches: what they tell of noise is one step's.
        if kind is Kind.BRANCHES and Kind.STACK in (*kinds, *others):
            found[kind] = Reach(1, ((0,), (1,)))
            continue
        whole = kind in WHOLES
        most = {Kind.STACK: 10, Kind.SAMPLE: 10, Kind.BRANCHES: 5}.get(kind, 3)
        run = max(1, min(most, num_steps // 3))
        linear = tuple(gap for gap in near if gap <= run + 1) if whole else (2,)
        found[kind] = Reach(run, ((0,), linear, tuple(gap for gap in linear if gap <= 4)) if whole else ((0,), linear))
    return found


_VERSION = (
    4  # of the file: the first had no times of forecasts, the second another roughness, the third no clean samples
)
NUDGES = (0.25, 0.5)
"""How far the network's input is moved towards that of the step before, to see whether its features answer in proportion."""


def whole_of(kinds: Iterable[Kind]) -> Kind:
    """The kind among these that reuses all of a step, every branch by itself where it can be, and features before samples."""
    known = set(kinds)
    return next((kind for kind in (Kind.BRANCHES, Kind.STACK) if kind in known), Kind.SAMPLE)


def nudged_steps(num_steps: int) -> list[int]:
    """The steps at which the input is moved a little, evenly spread."""
    return sorted({round(step) for step in np.linspace(1, num_steps - 1, min(8, num_steps - 1))})


def instrumented_share(reach: Mapping[Kind, Reach], macs: Mapping[str, float], num_steps: int) -> float:
    """Multiply-accumulates of an instrumented generation, of an uncached one.

    Args:
        reach: what is measured.
        macs: of a step of each kind, of a computed one's.
        num_steps: steps of the generation.
    """
    spent, whole = float(num_steps), whole_of(reach)
    if whole in reach:  # else the input is not moved: another process measures the kind that reuses all of a step
        spent += len(NUDGES) * len(nudged_steps(num_steps)) * (1 + macs[whole.value])
    for kind, of_kind in reach.items():
        backs = [order * gap for order, gaps in enumerate(of_kind.gaps) for gap in gaps]
        calls = sum(min(of_kind.max_run, max(0, step - back)) for back in backs for step in range(num_steps))
        spent += calls * macs[kind.value]
    return spent / num_steps


SEVERAL = "several machines"
"""What was timed on more than one."""


@dataclass(frozen=True)
class Measurement:
    """Errors of reuse in the network's output, means over samples and values, and costs; steps in sampling order.

    Attributes:
        reach: what was measured of each kind.
        runs: of each kind ``[order, gap, computed step, i, j]``: the mean product of the output's errors at the i-th and
            the j-th step after the computed one that they reuse, from 0; not a number where it was not measured.
        power: mean square of the output at every step.
        macs: of a step of each kind, ``"compute"`` being 1.
        seconds: time of a denoiser call, the same way, forecasts of a kind apart (:func:`filled_name`); ``"pause"`` is the
            time between one and the next.
        num_samples: rows that the means are over.
        kept_bytes: bytes of one output of each kind, all rows of a call.
        made_for: identity of model and scheduler, ``{"model": …, "scheduler": …}``.
        sites: of every branch by its id the kind that it belongs to, and its share of the multiply-accumulates that this kind
            spares; ``"branches"`` are those that belong to no other kind.
        roughness: the part of the squared error of reusing everything from an input that was moved a little that is out of
            proportion to the move, of the squared error of reuse one step later, at some steps; not a number at the others. 0:
            the network is smooth, 1: features are noise.
        machine: that the seconds were taken on.
    """

    reach: Mapping[Kind, Reach]
    runs: Mapping[Kind, np.ndarray]
    power: np.ndarray
    macs: Mapping[str, float]
    seconds: Mapping[str, float]
    num_samples: int
    kept_bytes: Mapping[str, int]
    made_for: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    roughness: np.ndarray = field(default_factory=lambda: np.zeros(0))
    machine: str = ""

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.power)

    @property
    def work(self) -> float:
        """What it cost, in uncached generations of one row."""
        return self.num_samples * instrumented_share(self.reach, self.macs, self.num_steps)

    def relative(self, kind: Kind, order: int, gap: int, lag: int) -> np.ndarray:
        """Root mean square error of reuse over that of the output ``[step]``, ``lag`` steps after a computed one."""
        errors = np.full(self.num_steps, np.nan)
        column = self.runs[kind][order, self.reach[kind].gap_index(order, gap), :, lag - 1, lag - 1]
        errors[lag:] = np.sqrt(column[: self.num_steps - lag] / np.maximum(self.power[lag:], 1e-30))
        return errors

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step, ``"compute"``, each kind and each forecast of one, with the pause after its call."""
        seconds = dict.fromkeys(self.macs, self.seconds["compute"]) | dict(self.seconds)
        pause = seconds.pop("pause")
        return {name: own + pause for name, own in seconds.items()}

    @property
    def whole(self) -> Kind:
        """The kind that reuses all of a step."""
        return whole_of(self.runs)

    @property
    def forecast_gain(self) -> float | None:
        """Error of a linear forecast one step ahead over that of the last value, geometric mean over the steps.

        Where features move smoothly it is well below 1. Noise alone, independent from step to step, makes it √3: a
        forecast with weights 2 and −1 is off by √(2² + 1² + 1) times the noise, the last value by √2. ``None`` where a
        generation has too few steps to forecast one.
        """
        forecast, reuse = self.relative(self.whole, 1, 1, 1), self.relative(self.whole, 0, 0, 1)
        both = np.isfinite(forecast) & np.isfinite(reuse) & (forecast > 0) & (reuse > 0)
        return float(np.exp(np.mean(np.log(forecast[both] / reuse[both])))) if both.any() else None

    @property
    def noise_share(self) -> float:
        """Share of the squared error of reuse one step later that is noise of the features.

        Two things bound it, and the smaller counts. Features answer a small change of the network's input in proportion, all
        but their noise: that is the ``roughness``. And noise of variance σ² adds 2σ² to the squared error of the last value,
        6σ² to that of a linear forecast, so that it is no more than a third of what the forecast is off. The first excludes
        smooth paths that turn from step to step, the second what a network answers out of proportion, but alike from one step
        to the next. Median over the steps, 0 to 1.
        """
        room = self.relative(self.whole, 1, 1, 1) ** 2 / (3 * self.relative(self.whole, 0, 0, 1) ** 2 + 1e-30)
        # Where no forecast can be measured (the first steps) roughness alone tells.
        shares = [min(rough, np.nan_to_num(most, nan=1.0)) for rough, most in zip(self.roughness, room, strict=False)]
        known = [share for share in shares if np.isfinite(share)]
        return float(np.clip(np.median(known), 0, 1)) if known else 0.0

    def save(self, path: Path) -> None:
        """Write everything to one ``.npz`` file."""
        rest = {
            "version": _VERSION,
            "reach": {kind.value: [reach.max_run, reach.gaps] for kind, reach in self.reach.items()},
            "macs": dict(self.macs),
            "seconds": dict(self.seconds),
            "num_samples": self.num_samples,
            "kept_bytes": dict(self.kept_bytes),
            "made_for": dict(self.made_for),
            "sites": {name: list(of_site) for name, of_site in self.sites.items()},
            "machine": self.machine,
        }
        runs: dict[str, Any] = {f"runs-{kind.value}": values for kind, values in self.runs.items()}
        with publish(path) as partial:  # an interrupted write must not pass for a whole one
            arrays = {"power": self.power, "roughness": self.roughness, **runs}
            np.savez_compressed(partial, rest=np.array(json.dumps(rest)), **arrays)

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: it is something else, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                rest: dict[str, Any] = json.loads(str(content["rest"]))
                if rest.pop("version", None) != _VERSION:
                    raise ValueError("another version of sostenuto wrote it")
                reach = {
                    Kind(name): Reach(run, tuple(tuple(gaps) for gaps in orders))
                    for name, (run, orders) in rest.pop("reach").items()
                }
                runs = {kind: content[f"runs-{kind.value}"] for kind in reach}
                sites = {name: (kind, share) for name, (kind, share) in rest.pop("sites").items()}
                return cls(reach, runs, content["power"], sites=sites, roughness=content["roughness"], **rest)
        # Whatever numpy, zlib and what is read from them make of bytes that are not what was written.
        except Exception as error:
            raise InputError(f"{path} can't be read ({error}): delete it, or use another folder") from None
